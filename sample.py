"""
Stage 3 of 3: new objects.  A seed gives noise, the denoiser makes a latent of it, G2 makes a volume of the
latent, and the renderer shows the volume from all around (novel views):

    n ~ N(0, I)  --denoise-->  latent z = G1(code)  --G2-->  volume  --render-->  views around it

The denoiser guesses codes, so each sample has one.  Its parts can be exchanged: --shape_of, --colours_of and
--stretch draw one shape in many colours, many shapes in the same colours, or all a little taller.

A picture proves little.  A denoiser can return its training objects, or a training object plus noise that
looks like something new.  So beside each sample stand its nearest training objects, and two numbers tell a
new object from a noisy old one:

    d1           distance to the nearest training latent.  We call a sample a copy if it is under a third of
                 the distance to the second nearest.  Compare d1 with the distances of training objects to
                 each other
    outside      the share of (z - mean object) that no weighted sum of training latents gives, in other words
                 what is outside their span.  Noise lies outside, so a noisy copy has a large share.  Compare
                 it with recombined codes: G1 is not linear, so even they leave the span

Whether samples are *good* is the lab's question: python -m lab.evaluate.

in   runs/diffusion/last.pt and the autodecoder it was trained on; without them the model in pretrained/
out  samples/     viewer.html (open it in a browser), sheet.png, swaps.png (the training objects' shapes in
                  each other's colours), figure3.png, report.txt, report.json;
                  beside.png (yours above those of the model in pretrained/, once you have trained);
                  views/: for each sample its views, their cameras in the SRN layout, mesh.glb and mesh.ply
run  python sample.py                                 half a minute on two cores
     python sample.py --count 64 --seed 1000 --views 0
     python sample.py --shape_of 3 --out samples/one_shape       seed 3's shape in eight colours
     python sample.py --colours_of train_00005 --stretch 1 1 1.2 --out samples/taller
     python sample.py --colours_of "#c03020" --out samples/red
read Config, novelty, exchanged, main; then load_models, contact_sheet.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (Run, UserError, command, grid, intrinsics_at, judge, parse_config, pick_device,
                    save_picture, save_preview, save_text, to_bytes)

import difflib
import json
import re
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from autodecoder import PALETTE, load_autodecoder
from diffusion import latents_of, load_denoiser, nearest, recombined
from diffusion import sample as draw_samples
from shapes.photos import atomic_folder, kinds_of, read_small, write_intrinsics, write_view
from viewer.isosurface import write_mesh
from viewer.page import write_gallery
from volume_render import ANGLES, SIZE, cameras, depth_picture, render_views


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's folder; "": the one that stage 2 was trained on
    out: str = "samples"                 # folder for the sheet, the views and the report
    count: int = 8                       # how many samples (from 1 to 100000)
    seed: int = 0                        # sample k comes from seed + k alone
    sampler: str = ""                    # heun or ancestral; "": heun for an edm training, else ancestral
    steps: int = 0                       # noise levels to visit; 0: the usual number; 1: a mean object only
    shape_of: str = ""                   # a training object's name or a seed, whose shape all samples get
    colours_of: str = ""                 # whose colours all samples get; or their mean, as "#c03020"
    stretch: tuple = (1.0, 1.0, 1.0)     # factors along x, y and z, as 1 1 1.2: taller (from 0.7 to 1.4)
    views: int = 24                      # pictures of each sample, on a turn around it; 0: none
    size: int = 128                      # pixels along a side of those views (from 1 to 4096)
    elevation: float = 20.0              # height of the turn's cameras, in degrees (from -90 to 90)
    batch: int = 64                      # samples denoised at once; changes memory, not results (at least 1)
    device: str = "auto"                 # auto, cpu or cuda


FREE = ("out", "count", "seed", "views", "size", "elevation", "batch", "device")    # change no quality

# "The box" is a trained model that comes with this program, so that a new user sees samples at once
BOX = Path(__file__).parent / "pretrained"


# ----------------------------------------------------------------------------------------------------- models

def is_run(folder):
    return any((folder / name).exists() for name in ("last.pt", "previous.pt"))


def load_models(config, device):
    """-> autodecoder, its objects' names, denoiser: the user's own or, if there is none, those in the box"""
    # The box stands in only for the default folder.  If the user names a folder that is not there, samples of
    # another model would mislead: that is an error
    folder = Path(config.diffusion)
    own = is_run(folder)
    if not own and config.diffusion == Config.diffusion:
        print(f"nothing is in {folder} yet: sampling from the model in the box, {BOX.name}/")
        folder = BOX / "diffusion"
    elif not own and not Path("runs/autodecoder").exists():
        raise UserError(f"{folder}/last.pt is not there: is --diffusion right?  Otherwise run: "
                        "python autodecoder.py, then python diffusion.py")

    # A box is no run: its autodecoder lies beside its denoiser, wherever it was trained
    boxed = BOX.resolve() in folder.resolve().parents
    beside = folder.parent / "autodecoder" if boxed else ""
    model, names, denoiser = load_denoiser(folder, device, config.autodecoder or beside)
    # Finite weights may still compute values that are not finite.  Two steps of the sampler show it quickly
    if not all(some.isfinite().all() for some in (model.volumes_of(model.codes[:1]),
                                                  draw_samples(denoiser, [0], 2))):
        raise UserError(f"{folder}/last.pt: what the weights make is not finite: train both stages again")
    print(f"sampling from {folder}/last.pt")
    return model, names, denoiser


def exchanged(codes, model, names, denoiser, config):
    """The samples' codes (B,W), with the shape, the colours or the stretch that the user asks for"""
    # A code is stretches, shape and palette, which begins with its mean.  A shape takes its stretches along
    if re.fullmatch("#[0-9a-fA-F]{6}", config.colours_of):
        codes[:, -PALETTE:][:, :3] = codes.new_tensor([*bytes.fromhex(config.colours_of[1:])]) / 255
    elif config.colours_of:
        codes[:, -PALETTE:] = code_of(config.colours_of, model, names, denoiser, config)[-PALETTE:]
    if config.shape_of:
        codes[:, :-PALETTE] = code_of(config.shape_of, model, names, denoiser, config)[:-PALETTE]

    # A stretch is a logarithm, in units of stage 1's knob.  Without stretched objects nothing has learned it
    factors = torch.tensor(config.stretch, device=codes.device)
    if not model.config.stretched and (factors != 1).any():
        raise UserError("--stretch: this autodecoder was trained without stretched objects (--stretched 0)")
    codes[:, :3] += factors.log() / model.config.stretch
    return codes


def code_of(name, model, names, denoiser, config):
    """A training object's code, by its name; or a sample's, by its seed -> (W,)"""
    if name in names:
        return model.codes[names.index(name)]
    # Digits alone are a seed, if --seed could be as large
    if name.isdecimal() and len(name) < 13:
        return draw_samples(denoiser, [int(name)], config.steps, config.sampler)[0]
    # A name that is nearly right is probably misspelt, so the most similar ones are offered
    near = difflib.get_close_matches(name, names, 3, 0) or names[:3]
    raise UserError(f"{name} is no training object and no seed; {', '.join(near)} are training objects")


# -------------------------------------------------------------------------------------------------- measuring

def outside_span(latents, training):
    """Latents (B,...), training latents (N,...) -> (B,): the share of a latent's distance from their mean
    that no weighted sum of training latents gives"""
    # N points span N - 1 directions about their mean, and these rows of V are an orthonormal basis of them
    mean = training.mean(0)
    span = torch.linalg.svd((training - mean).flatten(1), full_matrices=False)[2][:len(training) - 1]

    # x @ span.T @ span is the part of x within the span.  What is left of x is outside
    x = (latents - mean).flatten(1)
    return (x - x @ span.T @ span).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)


def is_copy(distance):
    """Distances to the training objects (B,N), nearest first -> (B,) bool"""
    # Gu et al. 2023: the nearest is under a third as far as the second nearest.  A ratio needs no unit, so
    # the same rule holds for every latent space
    return distance[:, 0] < distance[:, 1] / 3


def novelty(latents, training, itself=False):
    """-> for each latent one dict of plain numbers, as report.json keeps it.  `itself`: the latents are the
    training objects, and each is compared with the others only"""
    distance, whose = nearest(latents, training, itself)
    columns = zip(outside_span(latents, training).tolist(), distance[:, :3].tolist(), whose[:, :3].tolist(),
                  is_copy(distance).tolist())
    return [dict(outside=outside, distances=near, nearest=which, copy=copy)
            for outside, near, which, copy in columns]


def summarise(columns):
    """{name: rows of novelty()} -> a table, a line for each number and a column for each set"""
    # The 95th percentile stands beside the median, because a few noisy samples do not move the median
    of = lambda rows, key: torch.tensor([row[key] for row in rows], dtype=torch.float64)
    lines = [("d1, mean", lambda rows: of(rows, "distances")[:, 0].mean()),
             ("copies, share", lambda rows: of(rows, "copy").mean()),
             ("outside the span, median", lambda rows: of(rows, "outside").median()),
             ("outside the span, 95th percentile", lambda rows: of(rows, "outside").quantile(0.95))]
    text = [" " * 36 + "".join(f"{name:>18}" for name in columns)]
    for label, number in lines:
        text.append(f"{label:<36}" + "".join(f"{number(rows):>18.4f}" for rows in columns.values()))
    return "\n".join(text)


# -------------------------------------------------------------------------------------------------- pictures

def contact_sheet(views, rows, seeds, trained, whose, names):
    """One line of pictures for each sample: four views, depth, and the three nearest training objects, by
    latent and by picture.  `views` and `trained` are render_views of samples and of the training objects
    `whose` (a list of their places in names) -> (H,W,3) uint8"""
    # Two different latents can look the same, so a copy may be far away in latent space.  Pictures find it:
    # `apart` is the root mean square difference over the four views
    rgb, alpha, depth, _ = views
    apart = torch.cdist(rgb.flatten(1), trained[0].flatten(1)) / rgb[0].numel() ** 0.5

    # The empty sheet with its heads.  Each tile shows the rendering's pixels twice as large
    tile, strip, gap = SIZE * 2, 14, 4
    width, height = 11 * (tile + gap), tile + strip
    sheet = Image.new("RGB", (width, len(rgb) * height + strip), "white")
    pen = ImageDraw.Draw(sheet)
    heads = ["sample", "", "", "", "depth", "nearest by latent", "", "", "nearest by picture", "", ""]
    for column, head in enumerate(heads):
        pen.text((column * (tile + gap) + 2, 1), head, fill="black")

    # A number stands below each neighbour: its distance, in the measure by which it was found
    for k, row in enumerate(rows):
        by_latent, by_picture = [whose.index(o) for o in row["nearest"]], apart[k].argsort()[:3].tolist()
        pictures = [*rgb[k], depth_picture(depth[k, 0], alpha[k, 0]),
                    *trained[0][by_latent + by_picture, 0]]
        captions = [f"seed {seeds[k]}", "", "", "", f"outside {row['outside']:.2f}"]
        captions += [short(pen, names[o], f"{d:.0f}") for o, d in zip(row["nearest"], row["distances"])]
        captions += [short(pen, names[whose[o]], f"{apart[k, o]:.3f}") for o in by_picture]
        for column, (picture, caption) in enumerate(zip(pictures, captions)):
            x, y = column * (tile + gap), strip + k * height
            pixels = to_bytes(picture).numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.NEAREST), (x, y))
            pen.text((x + 2, y + tile), caption, fill="black")
    return np.asarray(sheet)


def short(pen, name, number, width=2 * SIZE):
    """A caption that fits below a tile: the name is cut, the number is not"""
    caption = f"{name} {number}"
    while pen.textlength(caption) > width and name:
        name = name[:-1]
        caption = f"{name}.. {number}"
    return caption


def swaps(model, rows=6, columns=8):
    """Any shape in any colours: training objects down and across; in the first column each has its own"""
    N, device = len(model.shapes), model.shapes.device
    some = lambda count: torch.linspace(0, N - 1, min(count, N)).long().tolist()
    # Pairs of whose shape (s) and whose palette (a).  A row begins with (s, s): the object as it is.  The
    # zeros are logarithms of stretches: no stretch
    s, a = torch.tensor([(s, a) for s in some(rows) for a in (s, *some(columns))], device=device).unbind(1)
    latents = latents_of(model, model.code(torch.zeros(len(s), 3, device=device), s, model.palettes[a]))
    rgb = render_views(model, latents, cameras(ANGLES[:1]), SIZE)[0][:, 0]
    return grid(to_bytes(rgb), 1 + min(columns, N))


def beside_the_box(rgb, seeds, device):
    """First views of some of our samples (B,H,W,3) -> these and, in a second row, the box's (2,B,H,W,3)"""
    # Both models get the same seeds, so that neither row is picked.  The objects differ, because two
    # trainings make different objects from the same noise
    model, _, denoiser = load_denoiser(BOX / "diffusion", device, BOX / "autodecoder")
    latents = denoiser.latents(draw_samples(denoiser, seeds))
    theirs = render_views(model, latents, cameras(ANGLES[:1]), SIZE)[0][:, 0]
    return to_bytes(torch.stack([rgb, theirs]))


def save_json(path, content):
    """Plain JSON: what is not finite becomes null"""
    # Python writes NaN and Infinity, which are not JSON: a browser refuses the file
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    save_text(path, json.dumps(plain, indent=1))


def write_sample(folder, model, latent, config):
    """One sample's views on a turn around it, and its mesh -> the views (V,H,W,3)"""
    # The folder has the layout of the training photos (SRN's), so other programs for photos with known
    # cameras read it, and so does stage 1
    poses = cameras([(360 * k / config.views, config.elevation) for k in range(config.views)])
    rgb, alpha, _, _ = (picture[0] for picture in render_views(model, latent[None], poses, config.size))
    with atomic_folder(folder) as temporary:
        write_intrinsics(temporary, intrinsics_at(config.size), config.size)
        for k, pose in enumerate(poses):
            write_view(temporary, k, rgb[k].clamp(0, 1), alpha[k], pose)
        write_mesh(temporary / "mesh.glb", model, latent)
    return rgb


# ------------------------------------------------------------------------------------------------------ main

def main(argv=None):
    config = parse_config(Config, argv=argv)
    # These two fields have rules that Config's comments cannot express, so they are checked here
    if config.sampler not in ("", "heun", "ancestral"):
        raise UserError(f"--sampler {config.sampler}: heun or ancestral is wanted")
    if len(config.stretch) != 3:
        raise UserError("--stretch: three factors are wanted, as --stretch 1 1 1.2")
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)

    # Here Run only locks the folder, so that two programs do not write to it at once.  All of this takes half
    # a minute, so there are no checkpoints
    run = Run(config.out, "sample", config, (), "sample.json", stale=())
    seeds, out = range(config.seed, config.seed + config.count), Path(config.out)

    # From noise to codes and latents.  A sample's noise comes from its own seed, so that seed 17 gives the
    # same object in any batch
    began = time.perf_counter()
    codes = torch.cat([draw_samples(denoiser, seeds[k:k + config.batch], config.steps, config.sampler)
                       for k in range(0, config.count, config.batch)])
    codes = exchanged(codes, model, names, denoiser, config)
    latents = latents_of(model, codes)

    # From latents to pictures.  This rendering is only timed: the pictures to keep follow below
    denoised = time.perf_counter()
    render_views(model, latents, cameras(ANGLES[:1]), SIZE)
    rendered = time.perf_counter()
    print(f"{config.count} samples: {(denoised - began) / config.count:.3f} s each, and "
          f"{(rendered - denoised) / config.count:.3f} s to decode and render one view of {SIZE} pixels")

    # Are they new?  The samples' numbers mean little alone.  Two other sets stand beside them: the training
    # objects, each compared with the others, and recombinations of their codes, which need no diffusion
    training = latents_of(model, model.codes)
    others = recombined(model, 64, torch.Generator().manual_seed(0), denoiser.config)
    rows = {"samples": novelty(latents, training),
            "training objects": novelty(training, training, itself=True),
            "recombined codes": novelty(latents_of(model, others), training)}
    text = summarise(rows)

    # Our earphones have kinds (over-ear, buds, ...).  If all nearest objects are of one kind, the samples
    # have lost the others
    kinds = kinds_of(model.config.data, names)
    near = [kinds[row["nearest"][0]] for row in rows["samples"]]
    if len(set(kinds)) > 1:
        text += "\nkinds of the nearest training objects: "
        text += ", ".join(f"{near.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(text)
    copies = sum(row["copy"] for row in rows["samples"]) / config.count
    print(judge(config, FREE, f"copies {copies:.0%}", copies, 0, 0.02, "README.md"))

    # Those who have trained a model on the same objects want to see whether it is as good as the one in the
    # box.  Beside other objects' samples the box's would mean nothing
    own = is_run(Path(config.diffusion)) and (BOX / "diffusion/last.pt").exists()
    # (--diffusion may name the box itself, which needs no comparison with itself)
    own = own and not BOX.samefile(Path(config.diffusion).parent)
    own = own and set(names) <= set(load_autodecoder(BOX / "autodecoder")[1])
    views = [f"views/seed_{seed:06d}" for seed in seeds]
    # report.json lists what this run writes, so that the next run knows what it may delete.  A report that is
    # missing or broken lists nothing, and then nothing is deleted
    wrote, earlier = (["figure3.png"] + views) * (config.views > 0) + ["beside.png"] * own, ()
    with suppress(UserError, OSError, ValueError, TypeError, KeyError, RecursionError):
        earlier = [str(name) for name in json.loads(read_small(out / "report.json", 1e8))["wrote"]]
    # What an earlier run wrote must not stay among the new.  A stranger's stay, also behind a link
    for name in set(earlier) - set(wrote):
        if re.fullmatch(r"views/seed_\d{6,}", name) and not (out / "views").is_symlink():
            shutil.rmtree(out / name, ignore_errors=True)
        elif name in ("figure3.png", "beside.png"):
            with suppress(OSError):
                (out / name).unlink()
    save_text(out / "report.txt", text + "\n")
    save_json(out / "report.json", {"config": asdict(config), "names": names, "rows": rows, "wrote": wrote})

    # Numbers can mislead, so look: each sample stands beside its nearest training objects.  Drawing
    # thousands takes too long: then only the nearest 16 of each sample are drawn
    pictures, whose = render_views(model, latents, cameras(ANGLES), SIZE), [*range(len(names))]
    if len(names) > 256:
        whose = nearest(latents, training)[1][:, :16].unique().tolist()
    trained = render_views(model, training[whose], cameras(ANGLES), SIZE)
    save_picture(out / "sheet.png", contact_sheet(pictures, rows["samples"], seeds, trained, whose, names))
    save_picture(out / "swaps.png", swaps(model))

    if own:
        save_preview(out / "beside.png", beside_the_box(pictures[0][:8, 0], seeds[:8], device))

    # To take away: novel views with their cameras, and meshes
    for k, latent in enumerate(latents) if config.views else ():
        turn = write_sample(out / "views" / f"seed_{seeds[k]:06d}", model, latent, config)
        # The paper's Figure 3: a new object from eight cameras all around it
        if k == 0:
            # Nine angles from 0 to 360 degrees; the ninth is the first again, so eight are kept
            some = turn[torch.linspace(0, config.views, 9)[:8].long()]
            save_picture(out / "figure3.png", grid(to_bytes(some), 8))

    # A page with the first eight samples.  From the seeds' own codes, with nothing exchanged: the first one's
    # way out of the noise, and a walk to the next seed
    write_gallery(out / "viewer.html", model, names, latents[:8], [f"seed {seed}" for seed in seeds[:8]],
                  denoiser, (config.seed, config.seed + 1), steps=config.steps, sampler=config.sampler)
    print(f"wrote {out}: sheet.png, swaps.png, report.txt, report.json, viewer.html"
          + ", figure3.png, views/ (with meshes)" * (config.views > 0) + ", beside.png" * own)
    run.lock.close()


if __name__ == "__main__":
    command(main)

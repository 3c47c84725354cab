"""
Stage 3 of 3: new objects.  Noise from a seed, the denoiser, the latent that it ends at, G2, novel views:

    n ~ N(0, I)  --DDPM or EDM-->  latent z  --G2-->  volume  --render-->  views around it

A picture proves little.  A denoiser can return its training objects, or a training object plus noise that
looks like something new.  So beside each sample stand its nearest training objects, and two numbers tell a
new object from a noisy old one:

    d1           distance to the nearest training latent.  A copy has a small one: under a third of the
                 distance to the second nearest.  Training objects' distances to each other are the yardstick
    outside      the share of (z - mean object) that no weighted sum of training latents gives.  Noise lies
                 outside, so a noisy copy has a large one.  Mixtures of codes are the yardstick: G1 is not
                 linear, so they leave the span a little

Whether samples are *good* is the lab's question: python -m lab.evaluate.

in   runs/diffusion/last.pt and the autodecoder it was trained on; without them the model in pretrained/
out  samples/     viewer.html (open it in a browser), sheet.png, figure3.png, report.txt, report.json;
                  beside.png (yours above those of the model in pretrained/, once you have trained);
                  views/: for each sample its views, their cameras in the SRN layout, and mesh.glb
run  python sample.py                                 half a minute on two cores; 0.003 s to denoise a sample
     python sample.py --count 64 --seed 1000 --views 0
read Config, novelty, main; then load_models, contact_sheet.
"""
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from autodecoder import load_autodecoder
from common import (Run, UserError, command, grid, intrinsics_at, parse_config, pick_device, save_picture,
                    save_preview, save_text, to_bytes)
from diffusion import code_mixtures, fingerprint, latents_of, load_denoiser, nearest
from diffusion import sample as draw_samples
from shapes.photos import atomic_folder, kinds_of, write_intrinsics, write_view
from viewer.isosurface import write_mesh
from viewer.page import write_gallery
from volume_render import ANGLES, SIZE, cameras, depth_picture, render_views


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "samples"                 # folder for the sheet, the views and the report
    count: int = 8                       # how many samples (from 1 to 100000)
    seed: int = 0                        # sample k comes from seed + k alone
    sampler: str = ""                    # heun or ancestral; "": the one of the training's formulation
    steps: int = 0                       # of the sampler; 0: 18 for heun, 1000 for ancestral
    views: int = 24                      # of each sample, on a turn around it; 0: none
    size: int = 128                      # pixels along a side of those views (from 1 to 4096)
    elevation: float = 20.0              # degrees: the turn's height (from -90 to 90)
    batch: int = 64                      # samples denoised at a time: memory, not the result (at least 1)
    device: str = "auto"                 # auto, cpu or cuda


BOX = Path(__file__).parent / "pretrained"       # a trained model that comes with this program


# ----------------------------------------------------------------------------------------------------- models

def load_models(config, device):
    """-> autodecoder, its objects' names, denoiser: of the user's own runs or, without any, of the box"""
    folder = Path(config.diffusion)
    own = any((folder / name).exists() for name in ("last.pt", "previous.pt"))
    if not own and config.diffusion == Config.diffusion:
        print(f"nothing is in {folder} yet: sampling from the model in the box, {BOX.name}/")
        folder = BOX / "diffusion"
    elif not own and not Path("runs/autodecoder").exists():
        raise UserError(f"{folder}/last.pt is not there: is --diffusion right?  Otherwise run: "
                        "python autodecoder.py, then python diffusion.py")
    denoiser, trained_on = load_denoiser(folder, device)

    # A latent means nothing to another decoder, so both halves must be of one training
    boxed = folder.resolve() == (BOX / "diffusion").resolve()
    first = config.autodecoder or (BOX / "autodecoder" if boxed else trained_on["folder"])
    model, names = load_autodecoder(first, device)
    if fingerprint(model) != trained_on["fingerprint"]:
        raise UserError(f"{folder} was trained on another autodecoder than {first} is now. "
                        f"Run: python diffusion.py --autodecoder {first} --out {folder} --fresh")
    print(f"sampling from {folder}/last.pt")
    return model, names, denoiser


# -------------------------------------------------------------------------------------------------- measuring

def outside_span(latents, training):
    """(B,...), (N,...) -> (B,): the share of each one's norm, about the training mean, that no sum of
    training latents gives"""
    # The rows of V span all sums of training latents: N points span N - 1 directions about their mean
    mean = training.mean(0)
    span = torch.linalg.svd((training - mean).flatten(1), full_matrices=False)[2][:len(training) - 1]
    x = (latents - mean).flatten(1)
    return (x - x @ span.T @ span).norm(dim=1) / x.norm(dim=1).clamp(min=1e-9)


def is_copy(distance):
    """Distances to the training objects (B,N), nearest first -> (B,) bool: the nearest is under a third as
    far as the second nearest (Gu et al. 2023)"""
    return distance[:, 0] < distance[:, 1] / 3


def novelty(latents, training, itself=False):
    """-> one dict for each latent"""
    distance, whose = nearest(latents, training, itself)
    columns = zip(outside_span(latents, training).tolist(), distance[:, :3].tolist(), whose[:, :3].tolist(),
                  is_copy(distance).tolist())
    return [dict(outside=outside, distances=near, nearest=which, copy=copy)
            for outside, near, which, copy in columns]


def summarise(columns):
    """{name: rows of novelty()} -> a table, a line for each number and a column for each set"""
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

def contact_sheet(views, rows, seeds, trained, names):
    """Each sample a line: four views, depth, the three nearest training objects by latent and by picture"""
    # A copy in another place of latent space would still look the same: so compare pictures too
    rgb, alpha, depth, _ = views
    apart = torch.cdist(rgb.flatten(1), trained[0].flatten(1)) / rgb[0].numel() ** 0.5     # rms of four views
    tile, strip, gap = SIZE * 2, 14, 4
    width, height = 11 * (tile + gap), tile + strip
    sheet = Image.new("RGB", (width, len(rgb) * height + strip), "white")
    pen = ImageDraw.Draw(sheet)
    heads = ["sample", "", "", "", "depth", "nearest by latent", "", "", "nearest by picture", "", ""]
    for column, head in enumerate(heads):
        pen.text((column * (tile + gap) + 2, 1), head, fill="black")

    # A line: four views of the sample, its depth, and one view of each neighbour with its distance below
    for k, row in enumerate(rows):
        by_picture = apart[k].argsort()[:3].tolist()
        pictures = [*rgb[k], depth_picture(depth[k, 0], alpha[k, 0]),
                    *trained[0][row["nearest"], 0], *trained[0][by_picture, 0]]
        captions = [f"seed {seeds[k]}", "", "", "", f"outside {row['outside']:.2f}"]
        captions += [f"{names[o][:14]} {d:.0f}" for o, d in zip(row["nearest"], row["distances"])]
        captions += [f"{names[o][:14]} {apart[k, o]:.3f}" for o in by_picture]
        for column, (picture, caption) in enumerate(zip(pictures, captions)):
            x, y = column * (tile + gap), strip + k * height
            pixels = to_bytes(picture).numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.NEAREST), (x, y))
            pen.text((x + 2, y + tile), caption, fill="black")
    return np.asarray(sheet)


def beside_the_box(rgb, seeds, device):
    """First views of some samples of ours (B,H,W,3), and in a second row those of the model in the box"""
    model, _ = load_autodecoder(BOX / "autodecoder", device)
    denoiser, _ = load_denoiser(BOX / "diffusion", device)
    theirs = render_views(model, draw_samples(denoiser, seeds), cameras(ANGLES[:1]), SIZE)[0][:, 0]
    return to_bytes(torch.stack([rgb, theirs]))


def save_json(path, content):
    """Plain JSON: what is not finite becomes null"""
    plain = json.loads(json.dumps(content), parse_constant=lambda name: None)
    save_text(path, json.dumps(plain, indent=1))


def write_sample(folder, model, latent, config):
    """One sample's views, on a turn around it, in the SRN layout, and its mesh -> the views"""
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
    if config.sampler not in ("", "heun", "ancestral"):
        raise UserError(f"--sampler {config.sampler}: heun or ancestral is wanted")
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)
    run = Run(config.out, "sample", config, (), "sample.json", stale=())    # holds the folder: one at a time
    seeds, out = range(config.seed, config.seed + config.count), Path(config.out)

    # From noise to latents, and from a latent to a picture
    began = time.perf_counter()
    latents = torch.cat([draw_samples(denoiser, seeds[k:k + config.batch], config.steps, config.sampler)
                         for k in range(0, config.count, config.batch)])
    denoised = time.perf_counter()
    render_views(model, latents, cameras(ANGLES[:1]), SIZE)
    rendered = time.perf_counter()
    print(f"{config.count} samples: {(denoised - began) / config.count:.3f} s each, and "
          f"{(rendered - denoised) / config.count:.3f} s to decode and render one view of {SIZE} pixels")

    # New or old?  Beside the samples the training objects, each compared with the others, and mixtures of
    # their codes, which no diffusion made
    training = latents_of(model, model.codes)
    mixtures = latents_of(model, code_mixtures(model.codes, 128, torch.Generator().manual_seed(0)))
    rows = {"samples": novelty(latents, training),
            "training objects": novelty(training, training, itself=True),
            "code mixtures": novelty(mixtures, training)}
    text = summarise(rows)
    kinds = kinds_of(model.config.data, names)
    near = [kinds[row["nearest"][0]] for row in rows["samples"]]
    if len(set(kinds)) > 1:
        text += "\nkinds of the nearest training objects: "
        text += ", ".join(f"{near.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(text)
    save_text(out / "report.txt", text + "\n")
    save_json(out / "report.json", {"config": asdict(config), "names": names, "rows": rows})

    # Pictures: each sample beside its nearest training objects; and beside those of the model in the box
    views = render_views(model, latents, cameras(ANGLES), SIZE)
    trained = render_views(model, training, cameras(ANGLES), SIZE)
    save_picture(out / "sheet.png", contact_sheet(views, rows["samples"], seeds, trained, names))
    own = Path(config.diffusion, "last.pt").exists() and (BOX / "diffusion/last.pt").exists()
    own = own and not BOX.samefile(Path(config.diffusion).parent)
    if own:
        save_preview(out / "beside.png", beside_the_box(views[0][:8, 0], seeds[:8], device))

    # To take away: novel views with their cameras, meshes, and a page that shows it all.  Those of an earlier
    # model must not stay beside the new
    for old in (out / "views").glob("seed_*"):
        shutil.rmtree(old, ignore_errors=True)
    for k, latent in enumerate(latents) if config.views else ():
        turn = write_sample(out / "views" / f"seed_{seeds[k]:06d}", model, latent, config)
        if k == 0:                         # the paper's Figure 3: a new object from cameras all around it
            some = turn[torch.linspace(0, config.views, 9)[:8].long()]
            save_picture(out / "figure3.png", grid(to_bytes(some), 8))
    write_gallery(out / "viewer.html", model, names, latents[:8], [f"seed {seed}" for seed in seeds[:8]],
                  denoiser, (config.seed, config.seed + 1), config.steps)
    print(f"wrote {out}: sheet.png, report.txt, report.json, viewer.html"
          + ", figure3.png, views/ (and in them mesh.glb)" * (config.views > 0) + ", beside.png" * own)
    run.lock.close()


if __name__ == "__main__":
    command(main)

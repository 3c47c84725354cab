"""
Stage 3 of 3: new objects.  Noise from a seed, the denoiser, the latent that it ends at, G2, novel views:

    n ~ N(0, I)  --EDM or DDPM-->  latent z  --G2-->  volume  --render-->  views around it

A picture proves little: a denoiser can return its training objects, or training objects plus noise that looks
like something new.  So beside each sample stand its nearest training objects, and this is counted:

    outside      the part of z - mean outside the span of the training latents, as a share of its norm.
                 Mixtures of codes leave the span a little, G1 not being linear: they are the yardstick
    d1           distance to the nearest training latent; beside it, training latents' to each other
    copies       share of samples whose nearest training latent is under a third as far as the second nearest
    piece        share of the solid voxels in the largest piece that hangs together, for samples whose nearest
                 training object is in one piece (earbuds are in two)
    haze         mean opacity further than 2 pixels from what is opaque
    colours      distance of the surface's colours from the nearest of 4 colours (k-means): bleeding raises it

in   runs/diffusion/last.pt and the autodecoder it was trained on; without them pretrained/earphones.pt
out  samples/     sheet.png, figure3.png, report.txt, report.json, viewer.html (open it in a browser);
                  beside.png (yours above the box's, once you have trained);
                  views/: for each sample its views, their cameras in the SRN layout, and mesh.glb
run  python sample.py                                 0.003 s a sample on two cores; the report takes longer
     python sample.py --count 64 --seed 1000 --views 0
read Config, measure, contact_sheet, main; and views.py, lab/metrics.py.
"""
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from autodecoder import build_autodecoder, kinds_of, load_autodecoder
from common import (UserError, at_least, atomic_file, atomic_folder, grid, load_checkpoint, load_stage,
                    parse_config, pick_device, save_picture, to_bytes)
from denoiser import sample
from diffusion import averaged, build_denoiser, code_mixtures, fingerprint, latents_of, load_denoiser
from viewer.isosurface import write_mesh
from lab.metrics import colour_residual, haze, largest_piece, nearest, outside_span
from viewer.page import write_gallery
from shapes.photos import write_intrinsics, write_view
from shapes.rasterizer import intrinsics_at
from views import ANGLES, SIZE, cameras, depth_picture, render_views, save_preview


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder, or a file that --pack wrote
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "samples"                 # folder for the sheet, the views and the report
    count: int = 8                       # how many samples
    seed: int = 0                        # sample k comes from seed + k alone
    steps: int = 0                       # of the sampler; 0: 18 for EDM, 1000 for DDPM
    views: int = 24                      # of each sample, on a turn around it; 0: none
    size: int = 128                      # pixels along a side of those views
    elevation: float = 20.0              # degrees: the turn's height
    batch: int = 64                      # samples denoised at a time: memory, not the result
    pack: str = ""                       # a file: write both trained models to it, and draw nothing
    device: str = "auto"                 # auto, cpu or cuda


PRETRAINED = Path(__file__).parent / "pretrained/earphones.pt"


def load_models(config, device):
    """-> autodecoder, its objects' names, denoiser: of the user's own runs or, without any, from the box"""
    if Path(config.diffusion).is_file():
        print(f"sampling from {config.diffusion}")
        return unpack(config.diffusion, device)
    own = Path(config.diffusion, "last.pt").exists()
    if not own and config.diffusion == Config.diffusion and PRETRAINED.exists():
        print(f"nothing is in {config.diffusion} yet: sampling from the model in the box, {PRETRAINED.name}")
        return unpack(PRETRAINED, device)
    if not own and not Path("runs/autodecoder").exists():
        raise UserError(f"{config.diffusion}/last.pt is not there: is --diffusion right?  Otherwise run: "
                        "python autodecoder.py, then python diffusion.py")
    denoiser, trained_on = load_denoiser(config.diffusion, device)
    folder = config.autodecoder or trained_on["folder"]
    model, names = load_autodecoder(folder, device)
    if fingerprint(model) != trained_on["fingerprint"]:
        raise UserError(f"{config.diffusion} was trained on another autodecoder than {folder} is now. "
                        f"Run: python diffusion.py --autodecoder {folder} --out {config.diffusion} --fresh")
    print(f"sampling from {config.diffusion}/last.pt")
    return model, names, denoiser


def pack(config):
    """Both trained models in one file, large tensors in half precision: what pretrained/ holds"""
    second = load_stage(config.diffusion, "stage 2's denoiser", "diffusion.py", "denoiser")
    folder = config.autodecoder or second["config"]["autodecoder"]
    first = load_stage(folder, "stage 1's model", "autodecoder.py", "model")
    small = lambda tensors: {name: t.half() if t.numel() > 10_000 else t for name, t in tensors.items()}
    rest = {name: t for name, t in second["denoiser"].items() if not name.startswith("network.")}
    kept = {key: second[key] for key in ("config", "shape", "components", "planes", "autodecoder")}
    known = {"config": first["config"], "names": first["names"], "model": small(first["model"])}
    state = {"autodecoder": known,
             "diffusion": kept | {"denoiser": small(rest), "ema": small(averaged(second)),
                                   "best": {"ema": None}}}
    with atomic_file(config.pack) as temporary:
        torch.save(state, temporary)
    print(f"wrote {config.pack}: {Path(config.pack).stat().st_size / 1e6:.1f} MB")


def unpack(file, device):
    state = load_checkpoint(file)
    if not {"autodecoder", "diffusion"} <= state.keys() or not isinstance(state["autodecoder"], dict):
        raise UserError(f"{file} does not hold both models, as what --pack writes does: give a run's folder")
    return *build_autodecoder(state["autodecoder"], device), build_denoiser(state["diffusion"], device)[0]


# -------------------------------------------------------------------------------------------------- measuring

MEASURES = ("outside", "d1", "d1_over_d2", "piece", "haze", "colours")


def measure(latents, training, views, itself=False):
    """-> one dict for each latent, of whose views (rgb, alpha, depth, solid) are given"""
    distance, whose = nearest(latents, training, itself)
    outside, rows = outside_span(latents, training), []
    for k, (rgb, alpha, _, solid) in enumerate(zip(*views)):
        numbers = (outside[k].item(), distance[k, 0].item(), (distance[k, 0] / distance[k, 1]).item(),
                   largest_piece(solid), haze(alpha), colour_residual(rgb, alpha))
        rows.append(dict(zip(MEASURES, numbers)) | {"nearest": whose[k, :3].tolist(),
                                                    "distances": distance[k, :3].tolist()})
    return rows


def summarise(columns):
    """{name: rows of measure()} -> a table, a line for each number and a column for each set"""
    of = lambda rows, key: torch.tensor([row[key] for row in rows], dtype=torch.float64)
    whole = lambda rows: of([row for row in rows if row["of_one_piece"]], "piece")
    lines = [("outside the span, median", lambda r: of(r, "outside").median()),
             ("outside the span, 95th percentile", lambda r: of(r, "outside").quantile(0.95)),
             ("d1, mean", lambda r: of(r, "d1").mean()),
             ("copies, d1 / d2 < 1/3", lambda r: (of(r, "d1_over_d2") < 1 / 3).double().mean()),
             ("largest piece, mean", lambda r: whole(r).mean()),
             ("share with under 95 % in it", lambda r: (whole(r) < 0.95).double().mean()),
             ("haze, mean", lambda r: of(r, "haze").mean()),
             ("colours off the nearest of 4", lambda r: of(r, "colours").nanmean())]
    text = [" " * 36 + "".join(f"{name:>16}" for name in columns)]
    for label, number in lines:
        text.append(f"{label:<36}" + "".join(f"{number(rows):>16.4f}" for rows in columns.values()))
    return "\n".join(text)


# -------------------------------------------------------------------------------------------------- pictures

def contact_sheet(views, rows, seeds, trained, names):
    """Each sample a line: four views, depth, the three nearest training objects by latent and by picture"""
    rgb, alpha, depth, _ = views
    apart = torch.cdist(rgb.flatten(1), trained[0].flatten(1)) / rgb[0].numel() ** 0.5     # rms of four views
    tile, strip, gap = SIZE * 2, 14, 4
    width, height = 11 * (tile + gap), tile + strip
    sheet = Image.new("RGB", (width, len(rgb) * height + strip), "white")
    pen = ImageDraw.Draw(sheet)
    heads = ["sample", "", "", "", "depth", "nearest by latent", "", "", "nearest by picture", "", ""]
    for column, head in enumerate(heads):
        pen.text((column * (tile + gap) + 2, 1), head, fill="black")
    for k, row in enumerate(rows):
        by_picture = apart[k].argsort()[:3].tolist()
        pictures = [*rgb[k], depth_picture(depth[k, 0], alpha[k, 0]),
                    *trained[0][row["nearest"], 0], *trained[0][by_picture, 0]]
        captions = [f"seed {seeds[k]}", "", "", "", f"outside {row['outside']:.2f}"]
        captions += [f"{names[o]} {d:.0f}" for o, d in zip(row["nearest"], row["distances"])]
        captions += [f"{names[o]} {apart[k, o]:.3f}" for o in by_picture]
        row["nearest_by_picture"] = by_picture
        for column, (picture, caption) in enumerate(zip(pictures, captions)):
            x, y = column * (tile + gap), strip + k * height
            pixels = to_bytes(picture).numpy()
            sheet.paste(Image.fromarray(pixels).resize((tile, tile), Image.NEAREST), (x, y))
            pen.text((x + 2, y + tile), caption, fill="black")
    return np.asarray(sheet)


def beside(rgb, seeds, device):
    """First views of some samples of ours (B,H,W,3), and in a second row those of the model in the box"""
    model, _, denoiser = unpack(PRETRAINED, device)
    theirs = render_views(model, sample(denoiser, seeds), cameras(ANGLES[:1]), SIZE)[0][:, 0]
    return to_bytes(torch.stack([rgb, theirs]))


def write_sample(folder, model, latent, config):
    """One sample's views, on a turn around it, in the SRN layout, and its mesh"""
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
    at_least(config, count=1, steps=0, views=0, size=1, batch=1)
    if config.pack:
        return pack(config)
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)
    seeds = range(config.seed, config.seed + config.count)

    began = time.perf_counter()
    latents = torch.cat([sample(denoiser, seeds[k:k + config.batch], config.steps)
                         for k in range(0, config.count, config.batch)])
    denoised = time.perf_counter()
    render_views(model, latents, cameras(ANGLES[:1]), SIZE)
    rendered = time.perf_counter()
    print(f"{config.count} samples: {(denoised - began) / config.count:.3f} s each, and "
          f"{(rendered - denoised) / config.count:.3f} s to decode and render one view of {SIZE} pixels")

    # The training objects as the model knows them, and mixtures of their codes, to compare with
    training = latents_of(model, model.codes)
    mixtures = latents_of(model, code_mixtures(model.codes, 128, torch.Generator().manual_seed(0)))
    sets = {"samples": latents, "reconstructions": training, "code mixtures": mixtures}
    views = {name: render_views(model, some, cameras(ANGLES), SIZE) for name, some in sets.items()}
    rows = {name: measure(some, training, views[name], some is training) for name, some in sets.items()}
    whole = [row["piece"] > 0.95 for row in rows["reconstructions"]]
    for name, some in rows.items():
        for k, row in enumerate(some):
            row["of_one_piece"] = whole[k if name == "reconstructions" else row["nearest"][0]]
    text = summarise(rows)
    between = torch.pdist(latents.flatten(1)) if config.count > 1 else torch.tensor([math.nan])
    training_nearest = nearest(training, training, itself=True)[0][:, 0]
    text += (f"\nclosest two samples {between.min():.1f}; training objects' nearest neighbours "
             f"{training_nearest.quantile(0.05):.1f} (5th percentile) to {training_nearest.max():.1f}")
    kinds = kinds_of(model.config.data, names)
    near = [kinds[row["nearest"][0]] for row in rows["samples"]]
    if len(set(kinds)) > 1:
        text += "\nkinds of the nearest training objects: "
        text += ", ".join(f"{near.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(text)

    out = Path(config.out)
    sheet = contact_sheet(views["samples"], rows["samples"], seeds, views["reconstructions"], names)
    save_picture(out / "sheet.png", sheet)
    with atomic_file(out / "report.txt") as temporary:
        temporary.write_text(text + "\n")
    with atomic_file(out / "report.json") as temporary:
        temporary.write_text(json.dumps({"config": asdict(config), "names": names, "rows": rows}))
    own = PRETRAINED.exists() and Path(config.diffusion, "last.pt").exists()
    if own:
        save_preview(out / "beside.png", beside(views["samples"][0][:8, 0], seeds[:8], device))
    for k, latent in enumerate(latents) if config.views else ():
        turn = write_sample(out / "views" / f"seed_{seeds[k]:06d}", model, latent, config)
        if k == 0:                         # the paper's Figure 3: a new object from cameras all around it
            some = turn[torch.linspace(0, config.views, 9)[:8].long()]
            save_picture(out / "figure3.png", grid(to_bytes(some), 8))
    write_gallery(out / "viewer.html", model, names, latents[:8], [f"seed {seed}" for seed in seeds[:8]],
                  denoiser, (config.seed, config.seed + 1), config.steps)
    more = ", figure3.png, views/ (and in them mesh.glb)" * (config.views > 0)
    more += ", beside.png" * own
    print(f"wrote {out}: sheet.png, report.txt, report.json, viewer.html{more}")


if __name__ == "__main__":
    main()

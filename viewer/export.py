"""
After stage 3: things to look at and to take away.  Volumes become meshes that other programs open
(isosurface.py), a page that renders them in a browser (page.py), moving pictures and strips.

in   runs/diffusion and its autodecoder; or with --reconstruct the autodecoder alone
out  export/     viewer.html (open it in a browser), turntable.webp and .gif, sheet.png, denoise.png,
                 walk.png; and for each object <name>/mesh.glb and mesh.ply, a mesh with colours
run  python -m viewer.export                          eight samples and all of the above: 18 s on one core
     python -m viewer.export --interpolate 3 12              walks from seed 3 to seed 12
     python -m viewer.export --reconstruct train_00001 --out export/train_00001
read Config, turntable, main; then isosurface.py, page.py.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (Run, UserError, atomic_file, command, grid, parse_config, pick_device, plain,
                    save_picture, to_bytes)

import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from autodecoder import load_autodecoder
from diffusion import latents_of, sample
from viewer.isosurface import LEVEL, write_mesh
from viewer.page import denoising, walk, write_gallery
from sample import is_run, load_models
from volume_render import ANGLES, cameras, render_views


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "export"                  # folder for all that is written
    reconstruct: str = ""                # a training object's name, or all: these in place of samples
    count: int = 8                       # how many samples, on the page and as meshes (at least 1)
    seed: int = 0                        # sample k comes from seed + k alone
    steps: int = 0                       # of the sampler; 0: its usual number
    interpolate: tuple = ()              # seeds to walk between; else the first two (from 0 to 1000000000000)
    sheet: int = 60                      # samples on the contact sheet; 0: none
    resolution: int = 64                 # grid points along a side that the mesh is made from (at least 8)
    level: float = LEVEL                 # the density of the surface (at least 1)
    frames: int = 24                     # of the turntable; 0: none
    size: int = 160                      # pixels along a side of each object on the turntable (at least 16)
    device: str = "auto"                 # auto, cpu or cuda


# ------------------------------------------------------------------------------------------ motion and sheets

def sheet(model, latents, columns, size=96):
    """One view of each -> (rows,columns) of them, bytes"""
    rgb = render_views(model, latents, cameras(ANGLES[:1]), size)[0][:, 0]
    return grid(to_bytes(rgb), columns)


def turntable(model, latents, frames, size):
    """-> a list of pictures: all the objects, turned together"""
    poses = cameras([(ANGLES[0][0] + 360 * k / frames, 20) for k in range(frames)])
    columns, turns = -(-len(latents) // -(-len(latents) // 4)), []                # rows of four or less, even
    for k, latent in enumerate(latents):
        turns.append(to_bytes(render_views(model, latent[None], poses, size)[0][0]))
        print(f"turntable {k + 1}/{len(latents)}", flush=True)
    return [Image.fromarray(grid(frame, columns)) for frame in torch.stack(turns, 1)]


def save_motion(path, pictures, seconds=4, **options):
    with atomic_file(path) as temporary:
        pictures[0].save(temporary, path.suffix[1:].upper(), save_all=True, append_images=pictures[1:],
                         loop=0, duration=round(1000 * seconds / len(pictures)), **options)


def small(pictures):
    """For a README: half the frames, at most 480 pixels wide, 128 colours"""
    scale = min(1, 480 / pictures[0].width)
    size = (round(pictures[0].width * scale), round(pictures[0].height * scale))
    return [p.resize(size, Image.LANCZOS).quantize(128, Image.Quantize.MAXCOVERAGE) for p in pictures[::2]]


# ------------------------------------------------------------------------------------------------------- main

def load(config, device):
    """-> autodecoder, its objects' names, denoiser (none for reconstructions of a stage 1 by itself)"""
    folder = config.autodecoder or "runs/autodecoder"
    alone = config.autodecoder or config.diffusion == Config.diffusion
    if config.reconstruct and alone and is_run(Path(folder)):
        return *load_autodecoder(folder, device), None
    return load_models(config, device)


def main(argv=None):
    config = parse_config(Config, argv=argv)
    if len(config.interpolate) not in (0, 2):
        raise UserError("--interpolate: two seeds are wanted, as --interpolate 3 12")
    began, out, device = time.perf_counter(), Path(config.out), pick_device(config.device)
    model, names, denoiser = load(config, device)
    if config.reconstruct:
        labels = names if config.reconstruct == "all" else [config.reconstruct]
        if labels[0] not in names:
            raise UserError(f"--reconstruct {config.reconstruct}: the {len(names)} objects that were learnt "
                            f"are {names[0]} to {names[-1]}; or all")
        latents = latents_of(model, model.codes[[names.index(name) for name in labels]])
    else:
        seeds = range(config.seed, config.seed + config.count)
        latents = denoiser.latents(sample(denoiser, seeds, config.steps))
        labels = [f"seed {seed}" for seed in seeds]
    run = Run(config.out, "export", config, (), "export.json", stale=())    # holds the folder: one at a time
    # A training object's folder has its own name, a sample's that of its seed.  An earlier model's samples
    # must not stay beside the new
    folders = labels if config.reconstruct else [f"seed_{seed:06d}" for seed in seeds]
    for old in out.glob("seed_*/mesh.*") if not config.reconstruct else ():
        ours = re.fullmatch(r"seed_\d{6,}/mesh\.(glb|ply)", old.relative_to(out).as_posix())
        if ours and not old.parent.is_symlink():
            old.unlink()
    pair = config.interpolate or (config.seed, config.seed + 1)

    def wrote(name):
        size = (out / name).stat().st_size / 1e6
        print(f"{time.perf_counter() - began:5.1f} s  {out / name}  {size:.2f} MB", flush=True)

    write_gallery(out / "viewer.html", model, names, latents, labels, denoiser, pair,
                  steps=config.steps)
    wrote("viewer.html")
    for folder, latent in zip(folders, latents):
        name = f"{folder}/mesh.glb"
        try:
            if write_mesh(out / name, model, latent, config.resolution, config.level):
                wrote(name)
            else:                                           # nothing is solid: an older mesh would mislead
                for old in (out / name, (out / name).with_suffix(".ply")):
                    old.unlink(missing_ok=True)
        except (OSError, UserError) as error:               # as of an object whose name is viewer.html
            print(plain(f"{folder} is left out: {error}"))
    pictures = {}
    if denoiser:
        pictures["denoise.png"] = sheet(model, denoising(denoiser, pair[0], steps=config.steps)[1], 12)
        pictures["walk.png"] = sheet(model, walk(denoiser, pair, steps=config.steps), 8)
    if denoiser and config.sheet:
        seeds = range(config.seed, config.seed + config.sheet)
        many = denoiser.latents(sample(denoiser, seeds, config.steps))
        pictures["sheet.png"] = sheet(model, many, 10)
    for name, picture in pictures.items():
        save_picture(out / name, picture)
        wrote(name)
    if config.frames:
        motion = turntable(model, latents, config.frames, config.size)
        save_motion(out / "turntable.webp", motion, quality=80, method=4)
        wrote("turntable.webp")
        save_motion(out / "turntable.gif", small(motion), optimize=True)
        wrote("turntable.gif")
    run.lock.close()


if __name__ == "__main__":
    command(main)

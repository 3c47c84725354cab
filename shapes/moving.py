"""
Things that move: headphones that fold, filmed by one camera that goes round them.  For chapters/parts.py.

    part 0  the band        stays where it is
    part 1  the right cup   folds inwards about the end of the band, and slides along it
    part 2  the left cup    likewise, by an angle of its own
    part 3  the boom        swings about the ear's axis, and goes with the right cup

A frame is one photo: each shows the object from another side and in another pose.  So no two photos show the
same thing, as in a video of somebody who plays with their headphones.

out  data/moving/films/<object>/   the SRN layout, a frame for each view.  factors.json: each frame's joints
                                   (fold right, fold left, swing, in degrees; slide, in world units).
                                   parts.npz: the parts' transforms (F,4,4,4), and which part a pixel shows
                                   (F,H,W: its number + 1; 0: none)
run  python -m shapes.moving
read joints_of, transforms_of, main.
"""
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import (DISTANCE, Run, camera_to_world_at, command, grid, intrinsics_at, parse_config,
                    save_picture)
from shapes import earphones
from shapes.meshes import load_obj
from shapes.photos import atomic_folder, load_photos, write_intrinsics, write_view
from shapes.rasterizer import rasterize, to_world


@dataclass
class Config:
    out: str = "data/moving"       # folder for the films
    objects: int = 24              # films (at least 1)
    frames: int = 60               # of each (at least 2)
    size: int = 64                 # pixels along a frame's side (at least 8)
    fold: float = 70.0             # degrees that a cup folds at most (from 0 to 90)
    swing: float = 80.0            # degrees that the boom swings at most (from 0 to 120)
    slide: float = 0.05            # how far a cup slides at most; the object's diagonal is 1 (from 0 to 0.2)
    turns: float = 2.0             # times that the camera goes round (from 0 to 100)
    seed: int = 0                  # of objects, cameras and joints
    fresh: bool = False            # throw away what is in --out and start over


NAMES = "band", "right cup", "left cup", "boom"
COLOURS = [(230, 80, 60), (70, 160, 70), (60, 110, 220), (240, 190, 40)]       # by which parts are told apart


def factors_of(index, seed):
    """Headphones with a boom, in a yoke that a hinge can hold"""
    rng = np.random.default_rng((seed, 77, index))
    at = 6 * index + int(rng.integers(4))
    return earphones.draw_factors("train", at, seed) | {"boom": True, "yoke": "arm"}


def build(factors):
    """-> the surfaces, each one's part, the pivot of the right cup and of the boom, in the file's space"""
    parts = earphones.headphones(factors)
    # headphones() gives the yoke and the cup first (mirrored copies), then the band, then the boom
    cups = 2 + 3                                                 # an arm and its hub; shell, cushion, cloth
    foot = parts[0].points.mean(1)[0] - [0, .12, 0]                   # where the arm leaves the band
    hinge, ear = np.array([foot[0], foot[1], 0]), parts[-2].points.mean(1)[0]
    groups = [1] * cups + [0] * (len(parts) - cups - 2) + [3] * 2
    return parts, groups, hinge, ear


def labels_of(mesh, parts, groups):
    """Which part each vertex belongs to (N,): that of the surface whose points are nearest; and a function
    that brings a point to where the file has it"""
    every, label = [], []
    for part, group in zip(parts, groups):
        for side in (1, -1)[:part.copies]:
            points = part.points[::6, ::6].reshape(-1, 3) * [side, 1, 1]
            every.append(points)
            label += [2 if group == 1 and side < 0 else group] * len(points)
    every = np.concatenate(every)
    # (The file is centred, and its diagonal is 1)
    low, high = every.min(0), every.max(0)
    every = torch.from_numpy((every - (low + high) / 2) / np.linalg.norm(high - low))
    place = lambda point: (point - (low + high) / 2) / np.linalg.norm(high - low)
    return torch.tensor(label)[torch.cdist(mesh.vertices, every).argmin(1)], place


def joints_of(rng, config):
    """-> (F,4): fold right, fold left, swing (degrees), slide: each to and fro, smoothly, in its own time"""
    t = np.linspace(0, 1, config.frames)[:, None]
    times, phase = rng.uniform(1, 3, 4), rng.uniform(0, math.tau, 4)
    share = (1 - np.cos(math.tau * times * t + phase)) / 2
    return share * [config.fold, config.fold, config.swing, config.slide]


def rotation(axis, degrees, pivot):
    """(4,4): a turn about an axis of the file's space (x: ears, y: up, z: front) through a pivot"""
    c, s, M = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), np.eye(4)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    M[a, a], M[b, b], M[a, b], M[b, a] = c, c, -s, s
    M[:3, 3] = pivot - M[:3, :3] @ pivot
    return M


def transforms_of(joints, hinge, ear, to_world):
    """Joints of a frame (4,) -> how each part has moved from where it was built, in the world (4,4,4)"""
    right, left, swing, slide = joints
    down = np.eye(4)
    down[1, 3] = -slide
    flip = np.array([-1.0, 1, 1])
    # A cup folds inwards: towards the other one, about the axis that points to the front
    cup = down @ rotation(2, -right, hinge)
    moved = [np.eye(4), cup, down @ rotation(2, left, hinge * flip), cup @ rotation(0, swing, ear)]
    return np.stack([to_world @ some @ np.linalg.inv(to_world) for some in moved])


def film(index, config, folder):
    """One object's frames, poses, factors.json and parts.npz into the folder"""
    factors = factors_of(index, config.seed)
    parts, groups, hinge, ear = build(factors)
    with tempfile.TemporaryDirectory() as model:
        earphones.write_files(model, parts, factors)
        mesh = load_obj(Path(model, "models/model_normalized.obj"))
    label, place = labels_of(mesh, parts, groups)
    mesh, transform = to_world(mesh)
    rng = np.random.default_rng((config.seed, 78, index))
    joints = joints_of(rng, config)
    larger = np.array([1, 1, 1, 1 / np.linalg.norm(transform[:3, 0])])       # the slide, in the file's units
    moved = np.stack([transforms_of(some * larger, place(hinge), place(ear), transform.numpy())
                      for some in joints])                                                        # (F,4,4,4)
    flat = replace(mesh, material=label[mesh.faces[:, 0]], texels=torch.tensor(COLOURS).byte(),
                   start=torch.arange(4), shape=torch.ones(4, 2).long(), textured=torch.zeros(4).bool())

    # The camera goes round, and up and down a little
    K, t = intrinsics_at(config.size), np.linspace(0, 1, config.frames)
    azimuth = rng.uniform(0, 360) + 360 * config.turns * t
    elevation = 15 + 30 * np.sin(math.tau * (rng.uniform() + 1.5 * t))
    write_intrinsics(folder, K, config.size)
    seen = []
    for number, now in enumerate(moved):
        T = torch.from_numpy(now)[label]                                                          # (N,4,4)
        at = (T[:, :3, :3] @ mesh.vertices[..., None])[..., 0] + T[:, :3, 3]
        pose = camera_to_world_at(azimuth[number], elevation[number], DISTANCE)
        rgb, coverage, _ = rasterize(replace(mesh, vertices=at), pose, K, config.size, 4)
        write_view(folder, number, rgb, coverage, pose)
        which, coverage, _ = rasterize(replace(flat, vertices=at), pose, K, config.size)
        near = torch.cdist(which.view(-1, 3) * 255, torch.tensor(COLOURS).float()).argmin(1) + 1
        seen.append((near.view(config.size, config.size) * (coverage > 0)).byte().numpy())
    np.savez_compressed(folder / "parts.npz", transforms=moved, seen=np.stack(seen))
    factors |= {"joints": joints.round(4).tolist()}
    (folder / "factors.json").write_text(json.dumps(factors, indent=1) + "\n")


def main(argv=None):
    config = parse_config(Config, argv=argv)
    names = [f"film_{index:05d}" for index in range(config.objects)]
    recipe = ("frames", "size", "fold", "swing", "slide", "turns", "seed")
    run = Run(config.out, "moving", config, recipe, "moving.json", stale=("films",))
    with run:
        for index, name in enumerate(names):
            folder = Path(config.out, "films", name)
            if not folder.is_dir():                      # what is there is whole: the same command goes on
                with atomic_folder(folder) as temporary:
                    film(index, config, temporary)
            run.progress("films", index + 1, len(names))
            run.stop_if_asked(index + 1)
    rgb = load_photos(Path(config.out, "films"), config.size, min(config.objects, 8))[0]
    chosen = torch.linspace(0, config.frames - 1, 10).long()
    save_picture(Path(config.out, "films.png"), grid(rgb[:, chosen].flatten(0, 1), len(chosen)))
    print(f"{len(names)} films in {config.out}/films; look at {config.out}/films.png.  "
          "Next: python -m chapters.parts")


if __name__ == "__main__":
    command(main)

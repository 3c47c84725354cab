"""
Stage 0 of 3: meshes in, photos with known cameras out.

    mesh --to_world--> world --camera (R, T)--> OpenCV camera --rasterize--> photo, mask

A photo is what a camera sees of the mesh under ambient light alone: the colour of the nearest surface.  The
paper's renderer, PyTorch3D, has cameras of its own kind; other code for photos (COLMAP, NeRF, ours) uses
OpenCV's.  So cameras are drawn here as PyTorch3D writes them, and converted at once.

in   nothing (procedural earphones, shapes/earphones.py), or --shapenet DIR, a copy of ShapeNetCore v1 or v2
out  data/earphones_train/<object>/{rgb,mask}/000000.png, pose/000000.txt, intrinsics.txt
     data/earphones_test/...            objects that no training sees
     data/earphones_train.png           a picture of all objects
run  python render_shapenet.py               two CPU cores: 36 s, 144 models and 5,472 photos
     python render_shapenet.py --shapenet ~/ShapeNetCore.v2 --synset 03001627 --holdout 100
read Config, look_at, opencv_from_pytorch3d, photograph; then how a run of thousands of models survives broken
     ones, kill -9 and a full disk: render_object, render_all, main.
"""
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common import Run, UserError, command, grid, intrinsics_at, parse_config, pick_device, save_picture
from shapes import earphones
from shapes.meshes import load_obj
from shapes.photos import (atomic_folder, load_photos, numbers, visible, write_intrinsics, write_transforms,
                           write_view)
from shapes.rasterizer import rasterize, to_world


@dataclass
class Config:
    out: str = "data"              # folder for the photos
    shapenet: str = ""             # a ShapeNetCore's root, release or synset folder; empty: our own earphones
    synset: str = "03261776"       # ShapeNet's category: 03261776 earphones, 03001627 chairs, 02958343 cars
    holdout: int = 0               # ShapeNet models that go to _test, which no training sees
    objects: int = 72              # procedural earphones to train on (at least 1)
    test_objects: int = 72         # procedural earphones to report on; half: combinations not in training
    views: int = 30                # photos of an object to train on (at least 1)
    holdout_views: int = 8         # photos of it from other cameras, the last in the folder, to measure by
    size: int = 128                # pixels along a side (at least 1)
    supersample: int = 2           # samples along a pixel's side, averaged; 1: jagged photos (at least 1)
    max_elevation: float = 80.0    # degrees above and below the horizon (from 0.1 to 89.9)
    thin: bool = False             # procedural earphones get cables, thinner than a voxel: hard
    transforms: bool = False       # also write transforms.json, which nerfstudio and instant-ngp read
    renderer: str = "torch"        # torch | pytorch3d: ours, or the paper's where it is installed
    seed: int = 0                  # of the cameras and of the earphones
    workers: int = 0               # processes; 0: one per core, or one where there is a GPU
    device: str = "auto"           # auto, cpu or cuda
    fresh: bool = False            # throw away the photos in --out and start over


DISTANCE = 1.3          # camera to the object's centre.  The object's diagonal is 1; with SRN's focal length
                        # (common.intrinsics_at) it fills at most 85 % of a photo.  All stages look from here
# Photos made with other values of these do not belong in the same folder
RECIPE = ("shapenet", "holdout", "views", "holdout_views", "size", "supersample", "max_elevation", "thin",
          "renderer", "seed")
CATEGORIES = {"03261776": "earphones", "03001627": "chairs", "02958343": "cars"}       # their folders' names


# ---------------------------------------------------------------------------------------------------- cameras

def look_at(azimuth, elevation, distance):
    """Degrees -> a camera that looks at the origin, as PyTorch3D writes it: R (3,3) and T (3,), float64.

    PyTorch3D multiplies rows, X_camera = X_world R + T, so R's *columns* are the camera's axes.  They are +X
    left, +Y up, +Z into the scene."""
    a, e = math.radians(azimuth), math.radians(elevation)
    outward = [math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]
    into = -torch.tensor(outward, dtype=torch.float64)
    left = torch.tensor([math.sin(a), -math.cos(a), 0.0], dtype=torch.float64)    # by azimuth alone: no poles
    R = torch.stack([left, torch.linalg.cross(into, left), into], 1)
    return R, distance * into @ R


def opencv_from_pytorch3d(R, T):
    """PyTorch3D's camera (...,3,3), (...,3) -> camera_to_world (...,4,4) in OpenCV's axes.

    OpenCV multiplies columns, x_camera = R_cv x + t_cv, and has +X right and +Y down: its x and y are the
    negatives of PyTorch3D's.  With F = diag(-1, -1, 1),

        x_cv = F (R^T x + T)          so   R_cv = F R^T = (R F)^T,   t_cv = F T:

    negate the first two *columns* of R, then transpose; negate the first two entries of T.  People often
    negate rows, or forget the transpose.  Inverted, for camera to world: x = R_cv^T (x_cv - t_cv), that is
    the rotation R F and the position -R F F T = -R T."""
    R = torch.as_tensor(R)
    T = torch.as_tensor(T, dtype=R.dtype, device=R.device)
    pose = torch.zeros(*R.shape[:-2], 4, 4, dtype=R.dtype, device=R.device)
    pose[..., :3, :3] = R * torch.tensor([-1.0, -1.0, 1.0], dtype=R.dtype, device=R.device)
    pose[..., :3, 3] = -(R @ T[..., None])[..., 0]
    pose[..., 3, 3] = 1
    return pose


def random_cameras(generator, config):
    """Endless cameras, uniform over the sphere between the elevations -> (4,4) float64 each"""
    # A sphere has equal areas at equal heights: the *sine* of the elevation is uniform
    limit = math.sin(math.radians(config.max_elevation))
    while True:
        azimuth = generator.uniform(0, 360)
        elevation = math.degrees(math.asin(generator.uniform(-limit, limit)))
        yield opencv_from_pytorch3d(*look_at(azimuth, elevation, DISTANCE))


# ----------------------------------------------------------------------------------------------------- photos

def photograph(mesh, folder, config, generator):
    """Write one object's photos, masks and cameras into the folder."""
    # The same intrinsics for all views; random cameras, the first `views` of them to train on
    K = intrinsics_at(config.size)
    write_intrinsics(folder, K, config.size)
    cameras, number, wanted = random_cameras(generator, config), 0, config.views + config.holdout_views
    for tries in range(10 * wanted):
        pose = next(cameras)
        rgb, coverage, _ = rasterize(mesh, pose, K, config.size, config.supersample, config.renderer)
        if not coverage.any():           # a flat sheet seen edge on: draw another camera
            continue
        write_view(folder, number, rgb, coverage, pose)
        number += 1
        if number == wanted:
            break
    else:
        raise NothingSeen


class NothingSeen(Exception):
    """Cameras all around it, and not one of them sees the object."""


# ------------------------------------------------------------------------------------------------------- jobs

def procedural_jobs(config):
    """-> [(split, name, path of the .obj)]"""
    jobs, folder = [], Path(config.out, "procedural/03261776")
    for split, count in (("train", config.objects), ("test", config.test_objects)):
        for index in range(count):
            name = earphones.name(split, index)
            jobs.append((split, name, folder / name / "models/model_normalized.obj"))
    return jobs


def shapenet_jobs(config):
    """-> the same for a copy of ShapeNetCore, v1 or v2, and the synset: DIR may be the root, a release
    or the synset's folder."""
    root = Path(config.shapenet).expanduser()
    if not root.is_dir():
        raise UserError(f"--shapenet {root}: no such folder")

    # v1 and v2 differ in where a model's file lies.  v2 is taken before v1
    names = ("models/model_normalized.obj", "model.obj", "models/model.obj")
    releases = sorted(root.glob(f"*/{config.synset}"), reverse=True)
    for folder in (root, root / config.synset, *releases):
        models = [path for path in visible(folder) if path.is_dir()] if folder.is_dir() else []
        paths = [obj_of(model, names) for model in models]
        if any(paths):
            break
    else:
        raise UserError(f"{root} holds no models of synset {config.synset}: "
                        f"{config.synset}/<model>/models/model_normalized.obj (v2) or <model>/model.obj (v1) "
                        "is looked for there, in ShapeNetCore.v*/ below it, and in it")
    print(f"ShapeNet models of {folder}")
    synset = folder.resolve().name if re.fullmatch(r"\d{8}", folder.resolve().name) else config.synset

    # Which ones are held out follows from the names alone, so that another machine holds out the same
    found = sorted((model.name, path) for model, path in zip(models, paths) if path)
    order = sorted(found, key=lambda model: zlib.crc32(os.fsencode(model[0])))
    if config.holdout >= len(found):
        raise UserError(f"--holdout {config.holdout}: there are {len(found)} models, "
                        "of which some must be left to train on")
    held_out = {name for name, _ in order[:config.holdout]}
    return [("test" if name in held_out else "train", name, path) for name, path in found], synset


def obj_of(model, names):
    """The first of these files in a model's folder, or None"""
    try:
        return next((model / name for name in names if (model / name).is_file()), None)
    except OSError as error:                             # a folder that may not be read: go on without it
        print(f"{model} cannot be read ({error.strerror}): left out")


def render_object(job, folder, config, device):
    """-> remarks about the model, and why there are no photos of it, or None: a broken model
    must not stop the others."""
    # A procedural model is made first, unless it is there already with the same factors
    split, name, path = job
    model = path.parent.parent
    if len(os.fsencode(name)) > 240:                          # a temporary name is longer by a few letters
        return [], f"{path}: the model's name is too long for a folder"
    if not config.shapenet:
        factors = earphones.draw_factors(split, int(name.split("_")[-1]), config.seed) | {"thin": config.thin}
        file = model / "factors.json"
        if not file.is_file() or file.read_text(errors="replace") != json.dumps(factors, indent=1) + "\n":
            with atomic_folder(model) as temporary:
                earphones.write_model(temporary, factors, config.thin)
    try:
        mesh, transform = to_world(load_obj(path))
    except UserError as error:
        return [], str(error) if str(path) in str(error) else f"{path}: {error}"

    # The cameras follow from the seed and the name: the same in any order, on any number of processes
    generator = np.random.default_rng([config.seed, zlib.crc32(os.fsencode(name))])
    try:
        with atomic_folder(folder) as temporary:
            photograph(mesh.to(device), temporary, config, generator)
            (temporary / "mesh_to_world.txt").write_text(numbers(transform) + "\n")
            if (model / "factors.json").is_file():
                shutil.copy(model / "factors.json", temporary / "factors.json")
    except NothingSeen:
        return mesh.notes, f"{path}: no camera sees it"
    return mesh.notes, None


def worker_setup():
    """In each worker process."""
    # One picture is too small to share among threads.  Signals are the parent's to handle.  And if the parent
    # is killed outright, so that it cannot say anything, the worker must end too
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_all(todo, config, device):
    """Yields (name, remarks, failure) as objects are done, by one process per core."""
    workers = config.workers or (os.cpu_count() if device.type == "cpu" else 1)
    if min(workers, len(todo)) <= 1:
        yield from ((job[1], *render_object(job, folder, config, device)) for job, folder in todo)
        return
    # Processes, not threads: small torch operations hold the interpreter's lock too long for threads to pay
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker_setup)
    try:
        work = {pool.submit(render_object, job, folder, config, device): job[1] for job, folder in todo}
        yield from ((work[future], *future.result()) for future in as_completed(work))
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps because memory ran out: try --workers 1; "
                        "the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)           # what has begun is finished, which takes a second


def contact_sheet(folder, path, most=72):
    """Of each object, the photo whose camera stands nearest to the front, to one side and
    above; the margins cut off."""
    photos, _, poses, _, _ = load_photos(folder, 128, most)
    nearest = (poses[:, :, :3, 3] @ torch.tensor([0.55, -0.75, 0.4])).argmax(1)
    save_picture(path, grid(photos[torch.arange(len(photos)), nearest][:, 12:-12, 12:-12], columns=12))


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    config = parse_config(Config, argv=argv)
    if config.holdout and not config.shapenet:
        raise UserError("--holdout keeps ShapeNet's models aside: it goes with --shapenet")
    if not re.fullmatch(r"\d+", config.synset):
        raise UserError("--synset: digits alone, as 03261776")
    device = pick_device(config.device)

    # What is to be made, and where.  An object's folder appears when it is complete, so what is there is done
    jobs, synset = shapenet_jobs(config) if config.shapenet else (procedural_jobs(config), "03261776")
    category = CATEGORIES.get(synset, synset)
    splits = {split: f"{category}_{split}" for split in ("train", "test")}
    folders = [Path(config.out, splits[split], name) for split, name, _ in jobs]
    train = Path(config.out, splits["train"])
    # Where a copy of ShapeNet lies may change; that it is one may not
    source = replace(config, shapenet="ShapeNet" if config.shapenet else "")
    run = Run(config.out, "render_shapenet", source, RECIPE, f"{category}.json",
              stale=[*splits.values(), *([] if config.shapenet else ["procedural"])])

    skipped, done = [], 0
    with run:
        todo = [(job, folder) for job, folder in zip(jobs, folders) if not folder.is_dir()]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} objects are in {config.out} already: "
                  "going on with the rest")
        for name, remarks, failure in render_all(todo, config, device):
            skipped += [failure] if failure else []
            for text in remarks + ([f"skipped: {failure}"] if failure else []):
                run.say(f"{name}: {text}")
            done += 1
            run.progress("objects", done, len(todo))
            if run.stopping:
                raise UserError(f"stopped by {run.stopping}, {done} of {len(todo)} objects done: "
                                "the same command goes on from there")

    # What was made, what was skipped and why, and a picture to look at
    for folder in folders if config.transforms else []:
        if folder.is_dir():
            write_transforms(folder)
    why = "".join(f"; {failure}" for failure in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    print(f"found {len(jobs)} models: {len(jobs) - len(todo)} were rendered already, "
          f"{len(todo) - len(skipped)} now, {len(skipped)} skipped{why}")
    if not train.is_dir():
        raise UserError(f"no photos were made: see above why each of the {len(jobs)} models was skipped")
    contact_sheet(train, train.with_suffix(".png"))
    print(f"photos in {train}; look at {train.with_suffix('.png')}.  Next: python autodecoder.py")


if __name__ == "__main__":
    command(main)

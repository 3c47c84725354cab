"""
Stage 0 of 3: meshes in, posed photos out.

in   nothing (procedural earphones, earphones.py), or --shapenet DIR, a copy of ShapeNetCore v1 or v2
out  data/earphones_train/<object>/{rgb,mask}/000000.png, pose/000000.txt, intrinsics.txt
     and _val, _test, and a picture
run  python render_shapenet.py               two CPU cores: 36 s, 152 models and 5,776 photos
     python render_shapenet.py --shapenet ~/ShapeNetCore.v2 --synset 03001627 --holdout 100
read Config, photograph, render_object, render_all, main.

A photo is what a camera sees of the mesh under ambient light alone: the colour of the nearest surface.  How
it is made stands in rasterizer.py, how it lies on disk in photos.py; here is what is photographed, from
where, and how a run of thousands of models survives broken ones, kill -9 and a full disk.
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

from shapes import earphones
from common import Run, UserError, atomic_folder, grid, parse_config, pick_device, save_picture
from shapes.meshes import load_obj
from shapes.photos import load_photos, numbers, visible, write_intrinsics, write_transforms, write_view
from shapes.rasterizer import opencv_from_pytorch3d  # noqa: F401      for those who bring PyTorch3D's cameras
from shapes.rasterizer import camera_to_world_at, intrinsics_at, rasterize, to_world


@dataclass
class Config:
    out: str = "data"              # folder for the photos
    shapenet: str = ""             # a ShapeNetCore's root, release or synset folder; empty: our own earphones
    synset: str = "03261776"       # ShapeNet's category: 03261776 earphones, 03001627 chairs, 02958343 cars
    holdout: int = 0               # ShapeNet models that go to _test, which no training sees
    objects: int = 72              # procedural earphones to train on
    val_objects: int = 8           # procedural earphones to choose settings by
    test_objects: int = 72         # procedural earphones to report on; half: combinations not in training
    views: int = 30                # photos of an object to train on
    holdout_views: int = 8         # photos of it from other cameras, the last in the folder, to measure by
    size: int = 128                # pixels along a side
    supersample: int = 2           # samples a pixel along a side, averaged: jagged targets cap later numbers
    distance: float = 1.3          # camera to the object's centre; the object's diagonal is 1
    focal: float = 131.25    # in pixels at 128 px, as in the SRN data: the 0.5-sphere spans 85 % of the frame
    max_elevation: float = 80.0    # degrees above and below the horizon
    thin: bool = False             # procedural earphones get cables, thinner than a voxel: hard
    transforms: bool = False       # also write transforms.json, which nerfstudio and instant-ngp read
    renderer: str = "torch"        # torch | pytorch3d: ours, or the paper's where it is installed
    seed: int = 0                  # of the cameras and of the earphones
    workers: int = 0               # processes; 0: one a core, or one where there is a GPU
    device: str = "auto"           # auto, cpu or cuda
    fresh: bool = False            # throw away the photos in --out and start over


# Photos made with other values of these do not belong in the same folder
RECIPE = ("shapenet", "holdout", "views", "holdout_views", "size", "supersample", "distance", "focal",
          "max_elevation", "thin", "renderer", "seed")
CATEGORIES = {"03261776": "earphones", "03001627": "chairs", "02958343": "cars"}       # their folders' names


# ----------------------------------------------------------------------------------------------------- photos

def random_cameras(generator, config):
    """Endless cameras, uniform over the sphere between the elevations."""
    limit = math.sin(math.radians(config.max_elevation))
    while True:
        azimuth = generator.uniform(0, 360)
        elevation = math.degrees(math.asin(generator.uniform(-limit, limit)))
        yield camera_to_world_at(azimuth, elevation, config.distance)


def photograph(mesh, folder, config, generator):
    """Write one object's photos, masks and cameras; views that see nothing of it (a sheet, edge on) are drawn
    again. NothingSeen if that does not help."""
    K = intrinsics_at(config.size, config.focal)
    write_intrinsics(folder, K, config.size)
    cameras, number, wanted = random_cameras(generator, config), 0, config.views + config.holdout_views
    for tries in range(10 * wanted):
        pose = next(cameras)
        rgb, coverage, _ = rasterize(mesh, pose, K, config.size, config.supersample, config.renderer)
        if not coverage.any():
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
    counts = {"train": config.objects, "val": config.val_objects, "test": config.test_objects}
    for split, count in counts.items():
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
    names = ("models/model_normalized.obj", "model.obj", "models/model.obj")
    releases = sorted(root.glob(f"*/{config.synset}"), reverse=True)                    # v2 before v1
    for folder in (root, root / config.synset, *releases):
        models = [path for path in visible(folder) if path.is_dir()] if folder.is_dir() else []
        paths = [next((model / name for name in names if (model / name).is_file()), None) for model in models]
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


def render_object(job, folder, config, device):
    """-> remarks about the model, and why there are no photos of it, or None: a broken model
    must not stop the others."""
    split, name, path = job
    model = path.parent.parent
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
    generator = np.random.default_rng([config.seed, zlib.crc32(os.fsencode(name))])    # the same in any order
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
    """In each worker process: one picture is too small to share among threads; signals are the parent's to
    handle; and if the parent is killed outright, so that it cannot say anything, the worker ends too."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_all(todo, config, device):
    """Yields (name, remarks, failure) as objects are done, by one process a core."""
    workers = config.workers or (os.cpu_count() if device.type == "cpu" else 1)
    if min(workers, len(todo)) <= 1:
        yield from ((job[1], *render_object(job, folder, config, device)) for job, folder in todo)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker_setup)
    try:
        work = {pool.submit(render_object, job, folder, config, device): job[1] for job, folder in todo}
        yield from ((work[future], *future.result()) for future in as_completed(work))
    except BrokenProcessPool:
        raise UserError("a worker process died, for want of memory perhaps: try --workers 1; "
                        "the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)           # what has begun is finished, which takes a second


def contact_sheet(folder, path, most=72):
    """Of each object, the photo whose camera stands nearest to the front, to one side and
    above; the margins cut off."""
    photos, _, poses, _, _ = load_photos(folder, 128, most)
    nearest = (poses[:, :, :3, 3] @ torch.tensor([0.55, -0.75, 0.4])).argmax(1)
    save_picture(path, grid(photos[torch.arange(len(photos)), nearest][:, 12:-12, 12:-12], columns=12))


def check(config):
    """Values that would fail only later, or not at all."""
    counts = (config.objects, config.views, config.size, config.supersample)
    others = (config.val_objects, config.test_objects, config.holdout, config.holdout_views, config.seed,
              config.workers)
    rules = (
        (min(counts) >= 1, "--objects, --views, --size and --supersample: at least 1"),
        (min(others) >= 0,
         "--val_objects, --test_objects, --holdout, --holdout_views, --seed and --workers: not negative"),
        (0.87 <= config.distance < 100, "--distance: from 0.87, outside the object's cube, to 100"),
        (0 < config.focal < 1e5, "--focal: more than 0, less than 1e5"),
        (0 < config.max_elevation < 90, "--max_elevation: between 0 and 90"),
        (re.fullmatch(r"\d+", config.synset), "--synset: digits alone, as 03261776"),
        (config.shapenet or not config.holdout, "--holdout: of ShapeNet's models, with --shapenet"))
    for good, what in rules:
        if not good:
            raise UserError(f"{what}  (--help lists the flags)")


def main(argv=None):
    config = parse_config(Config, argv=argv)
    check(config)
    device = pick_device(config.device)
    jobs, synset = shapenet_jobs(config) if config.shapenet else (procedural_jobs(config), "03261776")
    category = CATEGORIES.get(synset, synset)
    splits = {split: Path(config.out, f"{category}_{split}") for split in ("train", "val", "test")}
    folders = [splits[split] / name for split, name, _ in jobs]
    recipe = Path(config.out, f"{category}.json")
    if any(path.exists() for path in splits.values()) and not recipe.exists():
        raise UserError(f"{config.out} already holds {category} photos that this program did not write: "
                        "use another --out")
    stale = [*splits.values(), recipe, *([] if config.shapenet else [Path(config.out, "procedural")])]
    # Where a copy of ShapeNet lies may change; that it is one may not
    source = "ShapeNet" if config.shapenet else ""
    run = Run(config.out, replace(config, shapenet=source), RECIPE, recipe.name,
              stale if config.fresh else ())

    todo = [(job, folder) for job, folder in zip(jobs, folders) if not folder.is_dir()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} objects are in {config.out} already: "
              "going on with the rest")
    skipped, done = [], 0
    with run:
        for name, remarks, failure in render_all(todo, config, device):
            skipped += [failure] if failure else []
            for text in remarks + ([f"skipped: {failure}"] if failure else []):
                run.say(f"{name}: {text}")
            done += 1
            run.progress("objects", done, len(todo))
            if run.stopping:
                raise UserError(f"stopped by {run.stopping}, {done} of {len(todo)} objects done: "
                                "the same command goes on from there")
    for folder in folders if config.transforms else []:
        if folder.is_dir():
            write_transforms(folder)
    why = "".join(f"; {failure}" for failure in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    print(f"found {len(jobs)} models: {len(jobs) - len(todo)} were rendered already, "
          f"{len(todo) - len(skipped)} now, {len(skipped)} skipped{why}")
    if not splits["train"].is_dir():
        raise UserError(f"no photos were made: see above why each of the {len(jobs)} models was skipped")
    picture = splits["train"].with_suffix(".png")
    contact_sheet(splits["train"], picture)
    print(f"photos in {splits['train']}; look at {picture}")


if __name__ == "__main__":
    main()

"""
Stage 0 of 3: meshes in, photos with known cameras out.

    mesh --to_world--> world --camera (R, T)--> OpenCV camera --rasterize--> photo, mask

A photo shows the mesh under ambient light alone: each pixel has the colour of the nearest surface.  The
paper's renderer, PyTorch3D, has cameras of its own kind.  Other code for photos (COLMAP, the SRN data, ours)
uses OpenCV's.  So cameras are drawn here as PyTorch3D writes them, and converted at once.

in   nothing (procedural models, shapes/earphones.py), or --shapenet DIR, a copy of ShapeNetCore v1 or v2
out  data/earphones_train/<object>/{rgb,mask}/000000.png, pose/000000.txt, intrinsics.txt, factors.json
     data/earphones_test/...            objects that no training sees
     data/earphones_train.png           a picture of all objects, written last
     data/procedural/, earphones.json   the meshes, and how all this was made
run  python render_shapenet.py               two CPU cores: 39 s, 144 models and 5,472 photos
     python render_shapenet.py --category chairs mugs            other kinds of objects, in one folder
     python render_shapenet.py --shapenet ~/ShapeNetCore.v2 --synset 03001627 --holdout 100
read Config, look_at, opencv_from_pytorch3d, photograph.  Then render_object, render_all and main show how a
     run over thousands of models survives broken ones, kill -9 and a full disk.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (DISTANCE, Run, UserError, command, grid, intrinsics_at, judge, parse_config, pick_device,
                    plain, save_picture)

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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shapes import earphones, household
from shapes.meshes import load_obj
from shapes.photos import (atomic_folder, load_objects, numbers, objects_in, read_small, visible,
                           write_intrinsics, write_transforms, write_view)
from shapes.rasterizer import pytorch3d, rasterize, to_world


@dataclass
class Config:
    out: str = "data"              # folder for the photos
    category: tuple = ("earphones",)  # earphones | chairs | tables | lamps | mugs | all: or several
    shapenet: str = ""             # ShapeNetCore's root, release or synset folder; empty: our own models
    synset: str = "03261776"       # ShapeNet's category: 03261776 earphones, 03001627 chairs, 02958343 cars
    holdout: int = 0               # ShapeNet models that go to _test, which no training sees
    objects: int = 72              # procedural objects of each category to train on (at least 1)
    test_objects: int = 72         # objects to report on; half of them are combinations not trained on
    views: int = 30                # photos of an object to train on (at least 1)
    holdout_views: int = 8         # more photos of an object, to measure by; they are the last in its folder
    size: int = 128                # pixels along a side (at least 1)
    supersample: int = 2           # samples along a pixel's side, averaged; 1: jagged photos (at least 1)
    max_elevation: float = 80.0    # degrees above and below the horizon (from 0.1 to 89.9)
    thin: bool = False             # procedural earphones get cables: thinner than a voxel, so hard to learn
    transforms: bool = False       # also write transforms.json, which nerfstudio and instant-ngp read
    renderer: str = "torch"        # torch | pytorch3d: ours, or the paper's where it is installed
    seed: int = 0                  # another seed gives other cameras and other earphones
    workers: int = 0               # processes; 0: one per core, or one where there is a GPU (from 0 to 1000)
    device: str = "auto"           # auto, cpu or cuda
    fresh: bool = False            # throw away the photos in --out and start over


# Photos that were made with other values of these fields do not belong in the same folder
RECIPE = ("shapenet", "holdout", "views", "holdout_views", "size", "supersample", "max_elevation", "thin",
          "renderer", "seed")
# main compares its number with the header's only if no field but these was changed
FREE = ("out", "workers", "device", "fresh", "transforms")
ALL = ("earphones", *household.STYLES)              # what --category all stands for
CATEGORIES = {"03261776": "earphones", "03001627": "chairs", "02958343": "cars"}       # their folders' names


# ---------------------------------------------------------------------------------------------------- cameras

def look_at(azimuth, elevation, distance):
    """Degrees -> a camera that looks at the origin, as PyTorch3D writes it: R (3,3) and T (3,), float64.

    PyTorch3D multiplies rows, X_camera = X_world R + T, so R's *columns* are the camera's axes.  They are +X
    left, +Y up, +Z into the scene."""
    # The third axis: from the camera's place on the sphere straight to the origin
    a, e = math.radians(azimuth), math.radians(elevation)
    outward = [math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]
    into = -torch.tensor(outward, dtype=torch.float64)

    # The first axis has no Z, so the horizon is level in the photo.  It follows from the azimuth alone.  The
    # usual recipe, the cross product of Z and `into`, is zero for a camera straight above the object
    left = torch.tensor([math.sin(a), -math.cos(a), 0.0], dtype=torch.float64)
    R = torch.stack([left, torch.linalg.cross(into, left), into], 1)
    return R, distance * into @ R        # T: the world's origin in the camera's axes, (0, 0, distance)


def opencv_from_pytorch3d(R, T):
    """PyTorch3D's camera (...,3,3), (...,3) -> camera_to_world (...,4,4) in OpenCV's axes.

    OpenCV multiplies columns, x_camera = R_cv x + t_cv, and has +X right and +Y down: its x and y are the
    negatives of PyTorch3D's.  With F = diag(-1, -1, 1),

        x_cv = F (R^T x + T)          so   R_cv = F R^T = (R F)^T,   t_cv = F T:

    negate the first two *columns* of R, then transpose; negate the first two entries of T.  Two mistakes are
    common: to negate rows, and to forget the transpose.  Camera to world is the inverse of this,
    x = R_cv^T (x_cv - t_cv).  Its rotation is R_cv^T = R F and its position is -R F F T = -R T."""
    R = torch.as_tensor(R)
    T = torch.as_tensor(T, dtype=R.dtype, device=R.device)
    # The two results of the derivation: the columns of R F are the camera's axes, and -R T is its position
    pose = torch.zeros(*R.shape[:-2], 4, 4, dtype=R.dtype, device=R.device)
    pose[..., :3, :3] = R * torch.tensor([-1.0, -1.0, 1.0], dtype=R.dtype, device=R.device)
    pose[..., :3, 3] = -(R @ T[..., None])[..., 0]
    pose[..., 3, 3] = 1
    return pose


def random_cameras(generator, config):
    """Endless cameras, uniform over the sphere between the elevations -> (4,4) float64 each"""
    # Slices of a sphere that are equally high have equal areas (Archimedes).  So the height, which is the
    # *sine* of the elevation, is drawn uniformly.  Uniform elevations would crowd the cameras at the poles
    limit = math.sin(math.radians(config.max_elevation))
    while True:
        azimuth = generator.uniform(0, 360)
        elevation = math.degrees(math.asin(generator.uniform(-limit, limit)))
        yield opencv_from_pytorch3d(*look_at(azimuth, elevation, DISTANCE))


# ----------------------------------------------------------------------------------------------------- photos

def photograph(mesh, folder, config, generator):
    """Write one object's photos, masks and poses (camera_to_world matrices) into the folder."""
    # All views have the same intrinsics K: the focal length, and where the optical axis meets the picture
    K = intrinsics_at(config.size)
    write_intrinsics(folder, K, config.size)

    # Poses are random, so the first `views` photos, which stage 1 trains on, are like the held-out ones after
    # them.  The tries are limited, because a broken model may be invisible from everywhere
    cameras, number, wanted = random_cameras(generator, config), 0, config.views + config.holdout_views
    for _ in range(10 * wanted):
        pose = next(cameras)
        rgb, coverage, _ = rasterize(mesh, pose, K, config.size, config.supersample, config.renderer)
        if not coverage.any():           # a flat sheet that is seen edge-on: draw another camera
            continue
        write_view(folder, number, rgb, coverage, pose)
        number += 1
        if number == wanted:
            break
    else:                                # no break: the tries ended before the photos were complete
        raise NothingSeen


class NothingSeen(Exception):
    """Too few of the cameras all around an object see any of it."""


# ------------------------------------------------------------------------------------------------------- jobs

def procedural_jobs(config):
    """-> [(split, name, path of the .obj)]: one job for each object"""
    # The models lie where ShapeNetCore v2 would have them, so that the same code reads both
    jobs = []
    for category in config.category:
        folder = Path(config.out, models_folder(config), "03261776" if category == "earphones" else category)
        for split, count in (("train", config.objects), ("test", config.test_objects)):
            for index in range(count):
                name = earphones.name(split, index)
                name = name if category == "earphones" else f"{category}_{name}"
                jobs.append((split, name, folder / name / "models/model_normalized.obj"))
    return jobs


def set_name(config):
    """Of a set of procedural objects.  ShapeNet's chairs may stand beside ours"""
    if list(config.category) == ["earphones"]:
        return "earphones"
    some = [one for one in ALL if one in config.category]                  # in whatever order they were named
    return "our-all" if some == list(ALL) else f"our-{'-'.join(some)}"


def models_folder(config):
    return "procedural" if set_name(config) == "earphones" else f"procedural_{set_name(config)}"


def procedural_model(split, name, config):
    """-> an object's factors, and the function that writes its model into a folder"""
    *category, _, index = name.split("_")                     # chairs_train_00000; earphones are train_00000
    if category:
        return household.draw_factors(category[0], split, int(index), config.seed), household.write_model
    # Only earphones know --thin.  It is kept with the factors: a change of --thin makes a new model
    factors = earphones.draw_factors(split, int(index), config.seed) | {"thin": config.thin}
    return factors, lambda folder, factors: earphones.write_model(folder, factors, config.thin)


def shapenet_jobs(config):
    """-> the same for a copy of ShapeNetCore, v1 or v2; and the synset, which is ShapeNet's number for a
    category"""
    root = Path(os.path.expanduser(config.shapenet))             # (Path's own fails where there is no HOME)
    if not os.path.isdir(root):
        raise UserError(f"--shapenet {root}: no such folder")

    # Users unpack ShapeNet in different ways: DIR may be the synset's folder, a release, or the folder above
    # the releases.  v1 and v2 also differ in where a model's file lies.  Where both are there, v2 is taken
    names = ("models/model_normalized.obj", "model.obj", "models/model.obj")
    releases = sorted(root.glob(f"*/{config.synset}"), reverse=True)
    for folder in (root, root / config.synset, *releases):
        # A model is a folder with one of these files in it.  Stray files beside the models are passed over
        models = [path for path in visible(folder) if os.path.isdir(path)] if os.path.isdir(folder) else []
        paths = [obj_of(model, names) for model in models]
        if any(paths):
            break
    else:
        # Perhaps it is another category: those that are there have names of eight digits
        names = {path.name for path in (*root.glob("*"), *root.glob("*/*"))} - {config.synset}
        there = " or ".join(sorted(name for name in names if re.fullmatch(r"\d{8}", name)))
        others = f".  Give --synset {there}, which is there" if there else ""
        raise UserError(f"{root} holds no models of synset {config.synset}: "
                        f"{config.synset}/<model>/models/model_normalized.obj (v2) or <model>/model.obj (v1) "
                        f"is looked for there, in ShapeNetCore.v*/ below it, and in it{others}")

    # If DIR is a synset's folder itself, its name tells the category, because --synset may be left as it was
    print(f"ShapeNet models of {folder}")
    synset = folder.resolve().name if re.fullmatch(r"\d{8}", folder.resolve().name) else config.synset

    # The names of all models decide which are held out.  A random choice, or the order of the files, would
    # hold out other models on another machine.  A hash of the name (crc32) gives an order that looks random
    # and is the same everywhere
    found = sorted((model.name, path) for model, path in zip(models, paths) if path)
    order = sorted(found, key=lambda model: zlib.crc32(os.fsencode(model[0])))
    if config.holdout >= len(found):
        raise UserError(f"--holdout {config.holdout}: there are {len(found)} models, "
                        "of which some must be left to train on")
    held_out = {name for name, _ in order[:config.holdout]}
    return [("test" if name in held_out else "train", name, path) for name, path in found], synset


def obj_of(model, names):
    """The first of these files that is in a model's folder, or None"""
    try:
        return next((model / name for name in names if (model / name).is_file()), None)
    except OSError as error:                             # a folder that may not be read: go on without it
        print(plain(f"{model} cannot be read ({error.strerror}): left out"))


def render_object(job, folder, config, device):
    """Make the photos of one object -> remarks about the model, and why there are no photos of it, or None"""
    # A name may have at most 255 bytes in most file systems, and a temporary name is a few letters longer
    split, name, path = job
    model = path.parent.parent
    if len(os.fsencode(name)) > 240:
        return [], f"{path}: the model's name is too long for a folder"

    # A procedural model is made first.  Its factors (kind, colours, proportions, ...) are kept beside it.  If
    # they are still the same, so is the model; after --thin, for example, it is made again
    if not config.shapenet:
        factors, write = procedural_model(split, name, config)
        file = model / "factors.json"
        if not file.is_file() or file.read_text(errors="replace") != json.dumps(factors, indent=1) + "\n":
            with atomic_folder(model) as temporary:
                write(temporary, factors)

    # ShapeNet has broken files.  One of them must not stop thousands of others: its error is returned
    try:
        mesh, transform = to_world(load_obj(path))
    except UserError as error:
        return [], str(error) if str(path) in str(error) else f"{path}: {error}"

    # The cameras follow from the seed and the name alone.  So the photos are the same in any order, on any
    # number of processes, and after an interruption.  The folder gets its name when all is in it.  The
    # factors go with the photos, because later stages report their numbers for each kind of object
    generator = np.random.default_rng([config.seed, zlib.crc32(os.fsencode(name))])
    try:
        with atomic_folder(folder) as temporary:
            photograph(mesh.to(device), temporary, config, generator)
            # to_world turned, moved and scaled the mesh.  This matrix tells others how
            (temporary / "mesh_to_world.txt").write_text(numbers(transform) + "\n")
            if (model / "factors.json").is_file():
                shutil.copy(model / "factors.json", temporary / "factors.json")
    except NothingSeen:
        return mesh.notes, f"{path}: too few cameras see it"
    return mesh.notes, None


def worker_setup():
    """What each worker process does first"""
    # One picture is too small to share among threads.  Ctrl-C reaches all processes of a terminal, but only
    # the parent may decide: the workers finish the object that they have begun
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # A parent that is killed (kill -9) cannot stop its workers, so each worker has a thread that waits for
    # the parent's end.  os._exit, because sys.exit would end this thread alone
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextmanager
def no_ctrl_c():
    """Processes that start in here ignore Ctrl-C at once.  worker_setup comes only after their imports"""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def render_all(todo, config, device):
    """Yields (name, remarks, failure) for each object when it is done"""
    # One process for each core.  On a GPU only one, because several would have to share it
    workers = config.workers or (os.cpu_count() if device.type == "cpu" else 1)
    # Worker processes take seconds to start, so for one object, or one worker, none is started
    if min(workers, len(todo)) <= 1:
        yield from ((job[1], *render_object(job, folder, config, device)) for job, folder in todo)
        return

    # Processes, not threads: small torch operations hold Python's global lock, so threads wait for each
    # other.  "spawn" starts each process from nothing, because the fork of a process with threads can hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker_setup)
    try:
        with no_ctrl_c():
            work = {pool.submit(render_object, job, folder, config, device): job[1] for job, folder in todo}
        yield from ((work[future], *future.result()) for future in as_completed(work))
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps because memory ran out: try --workers 1; "
                        "the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)           # what has begun is finished, which takes a second


def contact_sheet(folder, path, most=72):
    """One photo of each object, as a picture at `path`"""
    # The photo whose camera stands nearest to the usual view of a product: from the front (-Y), turned to one
    # side, a little from above.  12 pixels of white margin are cut off on each side
    found = objects_in(folder, 128)
    chosen = [found[k] for k in np.linspace(0, len(found) - 1, min(len(found), most)).round().astype(int)]
    sheet = []
    for photos, _, poses, _, _ in load_objects(chosen, 128):
        sheet.append(photos[(poses[:, :3, 3] @ np.array([0.55, -0.75, 0.4])).argmax()][12:-12, 12:-12])
    save_picture(path, grid(np.stack(sheet), columns=12))


# ------------------------------------------------------------------------------------------------------- main

def make_missing(folder):
    """What stage 1 calls first: the photos of this stage's default, if they are not there, or not all"""
    # The recipe is written first and the picture of all objects last, so a picture that is missing tells of a
    # run that was stopped.  (A folder without our recipe is somebody's own, and is taken as it is)
    path, ours = Path(folder), {"stage": "render_shapenet"} | {key: getattr(Config, key) for key in RECIPE}
    stopped = False
    if not path.with_suffix(".png").exists() and os.access(path.parent, os.W_OK):
        with suppress(UserError, OSError, ValueError, RecursionError):
            stopped = json.loads(read_small(path.with_name("earphones.json"))) == ours
    if stopped or not path.exists():
        print(f"{folder} is not {'whole' if path.exists() else 'there'}: making it, by render_shapenet.py")
        main([])
    return folder


def main(argv=None):
    # Wrong flags are refused before anything is written.  The synset becomes part of a path
    config = parse_config(Config, argv=argv)
    if config.holdout and not config.shapenet:
        raise UserError("--holdout keeps ShapeNet's models aside: it goes with --shapenet")
    if config.synset != Config.synset and not config.shapenet:
        raise UserError("--synset chooses among ShapeNet's categories: it goes with --shapenet")
    if "all" in config.category:
        config.category = ALL
    if len(set(config.category)) < len(config.category):
        raise UserError("--category: each once")
    if config.shapenet and list(config.category) != ["earphones"]:
        raise UserError("--category is of our own models: ShapeNet's categories are chosen by --synset")
    if not re.fullmatch(r"\d+", config.synset):
        raise UserError("--synset: digits alone, as 03261776")
    if config.renderer == "pytorch3d":
        pytorch3d()                                      # is it there?  --fresh must not delete before that
    device = pick_device(config.device)

    # What is to be made, and where.  Each category has folders of its own, so that several fit into one --out
    if config.shapenet:
        jobs, synset = shapenet_jobs(config)
        category = CATEGORIES.get(synset, synset)
    else:
        jobs, category = procedural_jobs(config), set_name(config)
    splits = {split: f"{category}_{split}" for split in ("train", "test")}
    folders = [Path(config.out, splits[split], name) for split, name, _ in jobs]
    train = Path(config.out, splits["train"])

    # Run refuses to mix photos of two recipes in one folder.  A copy of ShapeNet may move to another place,
    # so the recipe only says whether there is one.  `stale` names what --fresh deletes
    source = replace(config, shapenet="ShapeNet" if config.shapenet else "")
    recipe = Path(config.out, f"{category}.json")
    # (Where our own recipe says that the models came from ShapeNet, a folder `procedural` is a stranger's)
    made = not recipe.is_file() or '"shapenet": ""' in recipe.read_text(errors="replace")
    stale = [*splits.values(), *([models_folder(config)] if made and not config.shapenet else [])]
    run = Run(config.out, "render_shapenet", source, RECIPE, recipe.name, stale)
    # A model that moves from one set to the other, by a new --holdout, would be in both: test photos would
    # then be trained on.  (Our own models have names that tell their set)
    for (split, name, _), folder in zip(jobs, folders):
        other = Path(config.out, splits["test" if split == "train" else "train"], name)
        if other.is_dir() and config.shapenet and not config.fresh:
            raise UserError(f"{other} is there, from a run that found other models; --holdout now puts that "
                            f"one into {folder.parent}: start over with --fresh")

    skipped, done = [], 0
    with run:
        # An object's folder appears only when it is complete.  So what is there is done, and the same command
        # goes on after any interruption without a list of its own
        todo = [(job, folder) for job, folder in zip(jobs, folders) if not folder.is_dir()]
        if len(todo) < len(jobs):
            print(f"{len(jobs) - len(todo)} of {len(jobs)} objects are in {config.out} already: "
                  "going on with the rest")
        if todo:                                               # where it is missing, this is not finished
            train.with_suffix(".png").unlink(missing_ok=True)

        # Objects arrive as the workers finish them, in any order.  A stop is looked for between two objects
        for name, remarks, failure in render_all(todo, config, device):
            skipped += [failure] if failure else []
            for text in remarks + ([f"skipped: {failure}"] if failure else []):
                run.say(f"{name}: {text}")
            done += 1
            run.progress("objects", done, len(todo))
            if run.asked:
                raise UserError(f"stopped by {run.asked}, {done} of {len(todo)} objects done: "
                                "the same command goes on from there")

    # For objects of earlier runs too: --transforms may be added when the photos are there already
    for folder in folders if config.transforms else []:
        if folder.is_dir():
            try:
                write_transforms(folder, config.holdout_views)
            except (OSError, UserError) as error:        # one folder must not stop the others
                print(plain(f"{folder}: {error}: no transforms.json"))

    # What was made, what was skipped and why.  The picture shows wrong colours or a wrong pose at a glance
    why = "".join(f"; {plain(failure)}" for failure in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    print(f"found {len(jobs)} models: {len(jobs) - len(todo)} were rendered already, "
          f"{len(todo) - len(skipped)} now, {len(skipped)} skipped{why}")
    if not train.is_dir():
        raise UserError(f"no photos to train on were made: see above why, of {len(jobs)} models")
    contact_sheet(train, train.with_suffix(".png"))
    # The header promises 144 objects.  judge says whether this run, if it is the default one, made them all
    whole = len(jobs) - len(skipped)
    print(judge(config, FREE, f"{whole} objects", whole, 144, 144, "what was skipped, above"))
    print(f"photos in {train}; look at {train.with_suffix('.png')}.  Next: python autodecoder.py")


if __name__ == "__main__":
    command(main)

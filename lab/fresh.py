"""
Fresh objects, and a network that reads what they are: what evaluate.py compares with.

The earphones are procedural, so there is no end of objects of the training objects' distribution that no
training saw.  Each is seen by 20 cameras at the corners of a dodecahedron: photos by the first eight, and by
all of them depth maps, fused into points on the visible surface.  Volumes are seen by the same cameras, so
that inner faces and hidden seams count on neither side.

The reader is a small convolutional network that names kind, palette, outline and colours from the first four
photos: trained on objects of all cells of factors, those too that training objects never come from.

in   nothing: objects are made here
out  runs/fresh/     fresh.pt, readings.pt, reader.pt: made once, for any model; minutes on two cores
read see_object, cloud, Reader, train_reader, held_out_codes.
"""
import inspect
import math
import multiprocessing
import os
import re
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import fingerprint, fit_codes
from common import (DISTANCE, UserError, camera_to_world_at, digest, fill, intrinsics_at, load_checkpoint,
                    save_checkpoint, to_bytes)
from render_shapenet import no_ctrl_c, worker_setup
from shapes import earphones, surfaces
from shapes.meshes import load_obj
from shapes.packed import Photos, alone, read_photos
from shapes.photos import factors_of
from shapes.rasterizer import rasterize, to_world
from volume_render import camera_rays, cameras

PIXELS = 64
# The corners of a dodecahedron, all around, in such an order that the first four (to compare by) and the
# first eight (to fit codes to) are far apart
CORNERS = [(72 * k + 36 * (height > 0) + 17, height)
           for height in (52.6, 10.8, -10.8, -52.6) for k in range(5)]
FIRST = (6, 14, 0, 15, 18, 2, 3, 4)
AROUND = [CORNERS[k] for k in (*FIRST, *(k for k in range(20) if k not in FIRST))]
FACTORS = {"kind": earphones.KINDS, "palette": tuple(earphones.PALETTES), "part": earphones.PARTS}
SIZES = [len(values) for values in FACTORS.values()]
CELLS = math.prod(SIZES)
# What fresh objects and their pictures are made by: a cache of another shop's earphones is of no use
MADE_BY = [PIXELS, AROUND, *map(inspect.getsource, (earphones, surfaces))]


def kept(file, ingredients, make, enough=lambda content: True):
    """make(), or what it returned last time, from `file`: if it was made of the same ingredients, and is
    enough.  A cache must record how it was made.  Otherwise it returns old results."""
    recipe = digest(ingredients)
    with alone(file):
        if file.exists():
            try:
                state = load_checkpoint(file)
                if state.get("recipe") == recipe and enough(state["content"]):
                    return state["content"]
                print(f"{file} is of other objects, settings or another model: making it again", flush=True)
            except (UserError, LookupError, TypeError, AttributeError) as error:
                print(f"{file} is of something else ({error}): making it again", flush=True)
        content = make()
        save_checkpoint(file, {"recipe": recipe, "content": content})
    return content


# ----------------------------------------------------------------------------------------- seeing objects

def cloud(origins, directions, depth, seen, count):
    """Rays (V,R,3), their depths and whether they hit (V,R) -> (count,3): points spread over what is seen,
    the same whenever asked; all in the middle if nothing is seen"""
    points = (origins + depth[..., None] * directions)[seen]
    if not len(points):
        return torch.zeros(count, 3)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    return points[order.repeat(-(-count // len(points)))[:count]]


def rays_around():
    return camera_rays(cameras(AROUND), intrinsics_at(PIXELS).float(), PIXELS)


def labels(factors):
    return torch.tensor([values.index(factors[key]) for key, values in FACTORS.items()])


def see_object(split, index, seed, views, points):
    """One procedural object, from factors to pictures and points: what each worker process does"""
    factors = earphones.draw_factors(split, index, seed)
    with tempfile.TemporaryDirectory() as folder:
        earphones.write_model(Path(folder), factors)
        mesh, _ = to_world(load_obj(Path(folder, "models/model_normalized.obj")))
    K, seen = intrinsics_at(PIXELS), []
    for azimuth, elevation in AROUND if points else AROUND[:views]:
        seen.append(rasterize(mesh, camera_to_world_at(azimuth, elevation, DISTANCE), K, PIXELS, 2))
    rgb, coverage, depth = (torch.stack(some) for some in zip(*seen))
    hit = depth.isfinite().flatten(1)
    one = {"rgb": to_bytes(rgb[:views]), "mask": to_bytes(coverage[:views]),
           "points": cloud(*rays_around(), depth.flatten(1), hit, points) if points else torch.zeros(0, 3),
           "true labels": labels(factors),
           "colours": torch.tensor(factors["body"] + factors["pad"] + factors["accent"])}
    return {key: value.numpy() for key, value in one.items()}


FEW = 64            # A process takes seconds to start.  So few objects are sooner seen by this one


def see_objects(file, split, numbers, config, views, points, run):
    """The same of many objects of a split (a range of numbers), by all cores, kept for the next time"""
    def make():
        work = [(split, index, config.seed, views, points) for index in numbers]
        rows, found, spawn = [], map(see_object, *zip(*work)), multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(os.cpu_count(), spawn, worker_setup) if len(work) > FEW else None
        try:
            if pool:
                with no_ctrl_c():
                    found = pool.map(see_object, *zip(*work), chunksize=4)
            for one in found:
                rows.append(one)
                run.progress(f"{split} objects", len(rows), len(numbers))
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps because memory ran out: run it again") from None
        except OSError as error:                                 # the folder for temporary files is full
            raise UserError(f"a worker process cannot go on: {error}") from None
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)
        return {key: torch.stack([torch.from_numpy(one[key]) for one in rows]) for key in rows[0]}

    # More objects, or more points on each, will do as well
    enough = lambda seen: len(seen["rgb"]) >= len(numbers) and seen["points"].shape[1] >= points
    seen = kept(file, ["objects", split, numbers[0], config.seed, views, *MADE_BY], make, enough)
    seen["points"] = seen["points"][:, :points]
    return {key: value[:len(numbers)] for key, value in seen.items()}


# ---------------------------------------------------------------------------------------- reading the factors

class Reader(nn.Module):
    """Four pictures of an object -> what it is: kind, palette, outline and its three colours.  What lies
    before the last layer are the features that pictures are compared by."""

    def __init__(self, features=128):
        super().__init__()
        widths = (3, 32, 64, 128, 128)
        self.trunk = nn.Sequential(*[nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU())
                                     for a, b in zip(widths, widths[1:])])         # 64 -> 4 pixels a side
        self.join = nn.Linear(4 * 128 * 4, features)
        self.answer = nn.Linear(features, sum(SIZES) + 9)

    def features(self, rgb):
        """(B,4,H,W,3) in [0, 1] -> (B,128)"""
        x = self.trunk(rgb.flatten(0, 1).permute(0, 3, 1, 2) * 2 - 1)
        return F.silu(self.join(F.avg_pool2d(x, 2).reshape(len(rgb), -1)))

    def forward(self, rgb):
        return self.answer(self.features(rgb)).split((*SIZES, 9), 1)


def blurred(rgb, side):
    """(B,4,H,W,3): as if seen by so few pixels"""
    x = rgb.flatten(0, 1).permute(0, 3, 1, 2)
    x = F.interpolate(F.interpolate(x, size=(side, side), mode="bilinear", antialias=True), size=x.shape[-2:],
                      mode="bilinear")
    return x.permute(0, 2, 3, 1).reshape(rgb.shape)


def train_reader(config, run, device):
    """Trained on photos, now sharp, now blurred: it must read renderings, which are blurred, by the object"""
    ingredients = ["reader", config.seed, config.readings, config.reader_steps, *MADE_BY]
    reader = Reader().to(device)
    make = lambda: teach_reader(config, run, device)
    enough = lambda weights: weights.keys() == reader.state_dict().keys()
    fill(reader, kept(run.folder / "reader.pt", ingredients, make, enough), run.folder)
    return reader.eval().requires_grad_(False)


def teach_reader(config, run, device):
    """-> the weights of a trained reader"""
    torch.manual_seed(config.seed)
    reader = Reader().to(device)
    # The test split holds objects of every cell; the first of it are those of stage 0's test folder
    numbers = range(72, 72 + config.readings)
    seen = see_objects(run.folder / "readings.pt", "test", numbers, config, 4, 0, run)
    rgb, labels, colours = (seen[key].to(device) for key in ("rgb", "true labels", "colours"))

    def loss_of(generator):
        chosen = torch.randint(len(rgb), (16,), generator=generator)
        side = int(torch.randint(14, PIXELS + 1, (), generator=generator))
        pictures = blurred(rgb[chosen].float() / 255, side)
        pictures = pictures.roll(torch.randint(-2, 3, (2,), generator=generator).tolist(), (2, 3))
        *factors, colour = reader(pictures)
        loss = 20 * F.mse_loss(colour, colours[chosen].float())
        for k, logits in enumerate(factors):
            loss = loss + F.cross_entropy(logits, labels[chosen, k])
        return loss
    teach(reader, loss_of, config, run)
    return reader.state_dict()


def teach(reader, loss_of, config, run):
    """Gradient steps downhill in loss_of, which draws its pictures by a generator"""
    optimizer = torch.optim.AdamW(reader.parameters(), weight_decay=0.05)
    for step in range(config.reader_steps):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * step / config.reader_steps))
        loss = loss_of(torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.progress("reader", step + 1, config.reader_steps, f"loss {loss.item():.3f}")


@torch.no_grad()
def read(reader, rgb):
    """(N,4,H,W,3) bytes -> features (N,128), and kind, palette and outline (N,3) as it reads them"""
    device = next(reader.parameters()).device
    features = [reader.features(part.to(device).float() / 255) for part in rgb.split(64)]
    answers = [torch.stack([logits.argmax(1) for logits in reader.answer(some).split((*SIZES, 9), 1)[:3]], 1)
               for some in features]
    return torch.cat(features).cpu(), torch.cat(answers).cpu()


def cell_of(labels):
    """(N,3) -> (N,): which of the CELLS"""
    return (labels * torch.tensor([SIZES[1] * SIZES[2], SIZES[2], 1])).sum(1)


def training_cells(names, folder):
    """The cells of the training objects, by their factors; None if they are not this course's earphones"""
    factors = factors_of(folder, names) if all(name.startswith("train_") for name in names) else None
    try:
        return factors and sorted({cell_of(labels(one)[None]).item() for one in factors})
    except ValueError:                                             # a kind that earphones.py does not have
        return None


# ------------------------------------------------------------------------------- as the decoder can show them

def held_out_codes(model, config, unseen, device):
    """Codes of unseen objects, fitted to eight photos of each; where there are no fresh ones (real data) of
    those that --data names or --holdout kept from training, or None.  Fitted once for a model, and kept."""
    if unseen:
        N = len(unseen["rgb"])
        poses = cameras(AROUND[:8]).expand(N, -1, -1, -1)
        K = intrinsics_at(PIXELS).float().expand(N, 3, 3)
        photos = Photos(unseen["rgb"], unseen["mask"], poses, K, [f"fresh_{k}" for k in range(N)])
    elif unseen_photos(config, model).is_dir():
        photos = read_photos(unseen_photos(config, model), model.config.size, config.fits)
    else:
        return None
    N, views = len(photos.names), torch.arange(photos.rgb.shape[1])
    def make():
        print(f"fitting the codes of {N} unseen objects to {len(views)} photos each, once", flush=True)
        return fit_codes(model, photos, views, config.fit_steps).cpu()
    which, seen = fingerprint(model), [photos.rgb, photos.mask, photos.pose, photos.intrinsics]
    ingredients = ["codes", which, config.fit_steps, photos.names, photos.has_masks, *seen]
    file = Path(config.cache, f"fits_{which[:12]}_{N}_{config.fit_steps}.pt")     # one for each size of study
    return kept(file, ingredients, make).to(device)


def unseen_photos(config, model):
    """The folder where stage 0 puts objects that stage 1 does not train on"""
    return Path(config.data or re.sub("_train$", "_test", model.config.data.rstrip("/")))

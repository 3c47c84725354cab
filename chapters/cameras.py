"""
A chapter on stage 1: cameras learned in training.  Nobody knows from where the photos were taken.

    min over e, G, and a camera c_{i,v} for each photo     mean | render(G(e_i), c_{i,v}) - photo_{i,v} |^2

A camera is three angles: azimuth, elevation, and the turn in the picture; they are learned beside the codes.
Its distance and lens are known, and it looks at the object's middle.

If the angles are roughly known (--start noisy), gradient descent repairs them.  If nothing is known, descent
from a guess nearly always ends in a bad minimum.  So a search comes first, by silhouettes alone.  A few
coarse shapes are seen from 264 sides.  Each silhouette is like some of these views, with probabilities.  Each
shape is moved until its views are the means of the silhouettes that are like them, and so on ("expectation
maximisation").  Nobody says which object is of which shape: that has probabilities too.  The temperature
falls, from "all views are alike" to "the nearest view".  Then the objects are trained, and now and then each
photo is compared with its own object, in colours, from all 264 sides, and takes the best one.

What photos cannot tell counts apart: the frame in which all cameras are right together, and front against
back of an object that looks the same from both.

in   data/earphones_train/       as stage 1; its poses are used to measure, and by --start noisy | true
out  runs/cameras/               last.pt, log.jsonl, previews/, cameras.txt, cameras.png
run  python -m chapters.cameras                 nothing known: 27.67 dB; 71 % right, 29 % from behind (row C1)
     python -m chapters.cameras --start noisy --noise 20 --out runs/cameras_20
     python -m chapters.cameras --start true --out runs/cameras_true
read search, main; and pose_of, bootstrap, measure in poses.py.
"""
import math
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import autodecoder
from autodecoder import (BETAS, FREE, PALETTE, Autodecoder, draw_batch, jitter, learning_rate_share,
                         palette_code, reconstruction_loss)
from chapters.families import improve, record, resume
from chapters.poses import (SIDE, all_sides, angles_of, bootstrap, degrees_off, draw, measure, noisy, pose_of,
                            small)
from common import (Run, UserError, command, intrinsics_at, parse_config, pick_device, save_preview,
                    save_text, to_bytes)
from shapes.packed import read_photos
from volume_render import psnr, render_volumes


@dataclass
class Config(autodecoder.Config):
    out: str = "runs/cameras"            # folder for the model, the log and the pictures
    start: str = "unknown"               # unknown | noisy | true: what is known of the cameras at first
    noise: float = 20.0                  # degrees, rms of the rotation, of noisy cameras (from 0 to 90)
    steps: int = 2000                    # gradient steps (at least 1)
    recolour: float = 0.0                # objects are shown as they are (from 0 to 1)
    stretched: float = 0.0               # and not stretched, which would need cameras first (from 0 to 1)
    camera_lr: float = 1e-2              # the angles' learning rate, in radians
    clusters: int = 4                    # coarse shapes that the search by silhouettes knows (at least 1)
    rounds: int = 100                    # of that search (at least 1)
    starts: int = 2                      # random beginnings of it; the best explanation wins (at least 1)
    max_elevation: float = 80.0          # degrees: no camera is higher or lower (from 1 to 89)
    search_at: tuple = (300, 600, 1000, 1500)  # steps at which each photo is compared from all sides


PRESETS = {"cpu": {}, "gpu": autodecoder.PRESETS["gpu"],
           "smoke": dict(autodecoder.PRESETS["smoke"], clusters=2, rounds=2, starts=1, search_at=(10,))}


@torch.no_grad()
def search(model, photos, views, sides):
    """Each photo, in colours, beside its own object from all sides -> angles (N,V,3)"""
    found, poses = [], pose_of(sides)
    for o, code in enumerate(model.codes):
        volume = model.volumes_of(code[None])
        rgb, alpha, _ = render_volumes(model, volume, poses, intrinsics_at(SIDE).float(), SIDE)
        seen = torch.cat([rgb[0].flatten(1), alpha[0].flatten(1)], 1).cpu()                    # (H,4P)
        photo = torch.cat([small(photos.rgb[o, views]).flatten(1), small(photos.mask[o, views])], 1)
        found.append(sides[torch.cdist(photo, seen).argmin(1)])
    photos.forget()
    return torch.stack(found)


class Cameras(nn.Module):
    """The angles of all photos' cameras, a row for each object; and which coarse shape each object is like"""

    def __init__(self, objects, views):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(objects, 3 * views))
        self.register_buffer("which", torch.zeros(objects, dtype=torch.long))

    @property
    def angles(self):
        return self.table.detach().unflatten(1, (-1, 3))                                       # (N,V,3)

    def poses(self, objects, views):
        """Of some objects' photos: a full set (N,V',4,4), in which only theirs are right"""
        mine = F.embedding(objects, self.table, sparse=True).unflatten(1, (-1, 3))
        return among(objects, torch.arange(mine.shape[1]), pose_of(mine), (len(self.table), views))


def among(objects, views, poses, shape):
    """Poses (B,V,4,4) put into a full set of zeros"""
    return torch.zeros(*shape, 4, 4).index_put((objects[:, None], views), poses)


def refine(model, photos, views, angles, steps=60):
    """Cameras (N,V,3) of these views go downhill; the objects stay"""
    way, views = torch.zeros_like(angles, requires_grad=True), torch.tensor(views)
    optimizer = torch.optim.Adam([way], 0.01)
    recipe = Config(**vars(model.config) | dict(batch_views=len(views), rays=2048))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / steps))
        for objects in torch.arange(len(angles)).split(8):
            generator = torch.Generator().manual_seed(step)
            pose = among(objects, views, pose_of((angles + way)[objects]), photos.rgb.shape[:2])
            _, *batch = draw_batch(photos, recipe, views, generator, objects, pose)
            volume = model.volumes_of(model.codes[objects]).detach()
            place = jitter(batch, recipe.samples, generator, volume.device)
            batch = [some.to(volume.device) for some in batch]
            reconstruction_loss(model, volume, batch, recipe, place, True, photos.has_masks)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    return (angles + way).detach()


def shown(model, photos, o, poses):
    """Object o by these cameras -> pictures (V,H,W,3)"""
    with torch.no_grad():
        volume = model.volumes_of(model.codes[o][None])
        return render_volumes(model, volume, poses, photos.intrinsics[o], photos.size)[0][0].cpu()


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    photos = read_photos(config.data, config.size, config.objects)
    views, held_views = (some.tolist() for some in photos.split(config.holdout_views))
    N, V = len(photos.names), len(views)
    true, sides = photos.pose[..., :3, :3], all_sides(config.max_elevation)
    run = Run(config.out, "cameras", config, [f.name for f in fields(Config) if f.name not in FREE])

    torch.manual_seed(config.seed)
    model, cameras = Autodecoder(config, N).to(device), Cameras(N, V)
    model.palettes.copy_(palette_code(*photos.colours(torch.tensor(views))))      # these need no camera
    decoder = [p for name, p in model.named_parameters() if name != "shapes"]
    optimizers = (torch.optim.Adam(decoder, betas=BETAS),
                  torch.optim.SparseAdam([model.shapes], betas=BETAS),
                  torch.optim.SparseAdam([cameras.table], betas=BETAS))
    networks = {"model": model, "cameras": cameras}
    highest = config.decoder_lr, config.code_lr, config.camera_lr
    with run:
        # Where do the cameras begin?
        step = resume(run, None, networks, optimizers)
        if not step:
            generator = torch.Generator().manual_seed(config.seed)
            which = torch.zeros(N, dtype=torch.long)
            if config.start == "unknown":
                masks = small(photos.mask[:, :V])
                found = [bootstrap(masks, sides, config, generator, partial(run.progress, f"start {k + 1}"))
                         for k in range(config.starts)]
                run.say("errors of the beginnings: " + ", ".join(f"{some[2]:.5f}" for some in found))
                angles, which, _ = min(found, key=lambda some: some[2])
            else:
                angles = angles_of(noisy(true[:, :V], config.noise * (config.start == "noisy"), generator))
            with torch.no_grad():
                cameras.table.copy_(angles.flatten(1))
                cameras.which.copy_(which)
            print(*measure(angles, true[:, :V], which)[0], sep="\n")
        while step < config.steps:
            # Schedule
            share = learning_rate_share(step, config.steps, config.lr_floor)
            for optimizer, rate in zip(optimizers, highest):
                optimizer.param_groups[0]["lr"] = rate * share

            # Batch, by the cameras as they are believed to stand
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            objects = torch.randperm(N, generator=generator)[:config.batch_objects]
            pose = cameras.poses(objects, photos.rgb.shape[1])
            _, *batch = draw_batch(photos, config, torch.tensor(views), generator, objects, pose)
            place = jitter(batch, config.samples, generator, device)
            batch = [part.to(device) for part in batch]

            # Loss, and a step of decoder, codes and cameras
            code = model.code(torch.zeros(len(objects), 3, device=device), objects, model.palettes[objects])
            loss, photo, alpha = reconstruction_loss(model, model.volumes_of(code), batch, config, place,
                                                     step >= config.dense_steps, photos.has_masks)
            learning = optimizers[:2] if config.start == "true" else optimizers
            improve(run, step, loss + config.code_decay * code[:, 3:-PALETTE].square().mean(), *learning)
            step += 1

            # From all sides: does another camera explain a photo better?
            if step in config.search_at and config.start == "unknown":
                found = search(model, photos, views, sides)
                moved = degrees_off(pose_of(found)[..., :3, :3], pose_of(cameras.angles)[..., :3, :3]) > 30
                with torch.no_grad():
                    cameras.table.copy_(torch.where(moved[..., None], found, cameras.angles).flatten(1))
                run.say(f"step {step}: {moved.float().mean():.0%} of the photos move to another side")
            if step % config.preview_every == 0 or step == config.steps:
                run.say(f"step {step}: " + measure(cameras.angles, true[:, :V], cameras.which)[0][0])
                some = torch.linspace(0, N - 1, min(N, 8)).long()
                ours = [shown(model, photos, o, pose_of(cameras.angles[o, :1]))[0] for o in some]
                save_preview(run.folder / f"previews/step_{step:06d}.png",
                             torch.stack([photos.rgb[some, 0], to_bytes(torch.stack(ours))]))
            record(run, None, networks, optimizers, step, config.steps,
                   {"loss": loss, "training_psnr": -10 * photo.log10(), "alpha": alpha})

    # The held-out photos' cameras are found with the objects as they are; then how alike are the pictures?
    model.requires_grad_(False)
    lines, turned = measure(cameras.angles, true[:, :V], cameras.which)
    if config.start == "true":
        held = angles_of(true[:, V:])
    else:
        held = refine(model, photos, held_views, search(model, photos, held_views, sides))
    truth = photos.rgb[:, V:].float() / 255
    quality = [psnr(ours, photo) for o in range(N)
               for ours, photo in zip(shown(model, photos, o, pose_of(held[o])), truth[o])]
    lines.append("held-out photos, each from the camera that was found for it: "
                 f"{sum(quality) / len(quality):.2f} dB")
    save_text(run.folder / "cameras.txt", "\n".join(lines) + "\n")
    some = range(0, N, max(N // 4, 1))[:4]
    draw(turned, angles_of(true[:, :V]), some, photos.names, run.folder / "cameras.png")
    print(*lines, f"wrote {config.out}: last.pt, cameras.txt, cameras.png (row C1: 27.67 dB)", sep="\n")


if __name__ == "__main__":
    command(main)

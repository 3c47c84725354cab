"""
A chapter on stage 1: things that move.  Films of objects that fold, one camera, each frame in another pose.

    in its own space   the decoder makes density and colours, as in stage 1, and for each voxel the weights
                       w_p of the parts it may belong to (a softmax over four: "linear blend skinning")
    in a frame         part p has moved rigidly: what is at x now was at  x_p = R_p (x - q_p) + q_p + t_p
    what is seen       density(x) = sum over p  w_p(x_p) density(x_p);  colours are mixed by the same weights

Rotations R_p and shifts t_p, for each part and frame, are learned beside the codes.  Nobody says which pixel
is which part, or how it moved.  What is given: there are four parts, and where each about is, because the
weights begin there (--no-places: they begin anywhere).  A film adds one thing: from frame to frame little
changes, so a jump in the poses costs.

3DADM finds the poses by 3D and 2D keypoints and a solver between them (PnP).  Here gradient descent finds
them directly, because frames follow each other closely.

in   data/moving/films/          shapes/moving.py; made first, if it is not there
out  runs/parts/                 last.pt, log.jsonl, previews/, parts.txt, strip.png, viewer.html
run  python -m chapters.parts                     held-out frames 24.03 dB; with known motion 29.44 (row J1)
     python -m chapters.parts --motion none --out runs/parts_static        as if nothing moved
     python -m chapters.parts --motion known --out runs/parts_known        the true motion is given
read Config, motion_of, main, strip; and Moving and render_parts in linkage.py.
"""
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import autodecoder
from autodecoder import FREE, PALETTE, jitter, learning_rate_share, palette_code
from chapters.families import AsVolumes, improve, record, resume
from chapters.linkage import Moving, posed, render_parts, share_of_parts, whole_frame
from common import (Run, UserError, command, grid, parse_config, pick_device, save_picture, save_preview,
                    save_text, to_bytes)
from shapes import moving
from shapes.packed import read_photos
from viewer.page import page_objects, write_page
from volume_render import pixel_rays, psnr


@dataclass
class Config(autodecoder.Config):
    data: str = "data/moving/films"      # films, by python -m shapes.moving
    out: str = "runs/parts"              # folder for the model, the log and the pictures
    motion: str = "learned"              # learned | known | none
    places: bool = True                  # the weights begin where the parts about are; no: anywhere
    every: int = 5                       # each fifth frame is held out (at least 2)
    steps: int = 1500                    # gradient steps (at least 1)
    rays: int = 8192                     # rays in a step, shared by its objects (at least 64)
    samples: int = 32                    # bins along a ray (at least 2)
    mask_weight: float = 1.0             # of the opacity: white fog costs nothing before a white background
    pose_lr: float = 1e-2                # of rotations (radians) and shifts
    steady: float = 0.1                  # weight of the poses' second differences from frame to frame
    rest: float = 1e-4                   # weight of the poses' squares: a part's mean pose is its own space's


PRESETS = {"cpu": {}, "gpu": dict(autodecoder.PRESETS["gpu"], rays=16384),
           "smoke": dict(autodecoder.PRESETS["smoke"], objects=2, rays=128, log_every=10)}


def draw(photos, config, frames, generator):
    """As stage 1's draw_batch, and which frame each ray is of -> objects, frames (B,R), the batch"""
    objects = torch.randperm(len(photos.names), generator=generator)[:config.batch_objects]
    B, n, o = len(objects), photos.size, objects[:, None]
    R = config.rays // B
    frame = frames[torch.randint(len(frames), (B, R), generator=generator)]
    u = torch.rand(B, R, generator=generator, dtype=torch.float64)
    near, exists = photos.pixel_near(o, frame, u)
    anywhere = (torch.arange(R) >= int(config.foreground * R)) | ~exists
    pixel = torch.where(anywhere, (u * n * n).long(), near)
    y, x = pixel // n, pixel % n
    rays = pixel_rays(photos.pose[o, frame], photos.intrinsics[o], x + 0.5, y + 0.5)
    rgb, mask = photos.rgb[o, frame, y, x].float() / 255, photos.mask[o, frame, y, x].float() / 255
    photos.forget()
    return objects, frame, [*rays, rgb, mask]


def read_parts(path, frames):
    """-> how each part moves back to where it belongs (F,P,3,4), and which part a pixel shows (F,H,W)"""
    try:
        if not path.is_file():
            raise OSError("there is no such file")
        with np.load(path) as file:
            motion, seen = np.linalg.inv(file["transforms"])[..., :3, :], file["seen"].astype(np.float32)
        if motion.shape != (frames, len(moving.NAMES), 3, 4) or seen.ndim != 3 or len(seen) != frames:
            raise ValueError("it is of another number of frames or parts")
        if not seen.size or not np.isfinite(motion).all():
            raise ValueError("it is empty, or not finite")
        return motion, seen
    except Exception as error:                         # there is no end of what numpy may raise
        raise UserError(f"{path} cannot be read ({error}): photos are wanted as python -m shapes.moving "
                        "makes them") from None


def motion_of(model, config, truth, poses, o, frame):
    """Objects (B,), frames (B,R) -> transforms (B,R,P,3,4): learned, known, or one part that stays"""
    if config.motion == "learned":
        every = model.transforms(poses)                                                    # (B,F,P,3,4)
        return every[torch.arange(len(frame), device=frame.device)[:, None], frame]
    if config.motion == "known":
        return truth.to(frame.device)[o[:, None], frame]
    return torch.eye(3, 4, device=frame.device).expand(*frame.shape, 1, 3, 4)


def steadiness(poses):
    """Poses (B,F,P-1,6) -> mean square of their second differences, and of themselves"""
    return poses.diff(n=2, dim=1).square().mean(), poses.square().mean()


def strip(model, photos, transforms, out):
    """A new object, the shape between two and the colours of a third, folds as in the first one's film"""
    shape, palette = model.shapes[:2].mean(0), model.palettes[-1]
    volume = model.volumes_of(torch.cat([shape.new_zeros(3), shape, palette])[None])
    # Eight frames of the first half of its film: it opens and closes once or twice
    chosen = torch.linspace(0, len(transforms) / 2, 8).long().tolist()
    rows = [torch.stack([to_bytes(whole_frame(model, volume, photos, 0, view, transforms[k])[0])
                         for k in chosen]) for view in (0, len(transforms) // 4)]
    save_picture(out / "strip.png", np.kron(grid(torch.cat(rows), 8), np.ones((2, 2, 1), np.uint8)))
    volumes = torch.stack([posed(model, volume, transforms[k]) for k in chosen])
    labels = [f"frame {k}" for k in chosen]
    objects = page_objects(AsVolumes(), volumes, labels, ["a new object in another one's poses"] * 8)
    sets = [("Poses", "one new object, in eight poses", "", list(range(8)))]
    write_page(out / "viewer.html", "New headphones that fold", "", sets, objects, 96)


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    if not Path(config.data).exists() and config.data == Config.data:
        print(f"{config.data} is not there: making it first, as python -m shapes.moving does")
        moving.main([])
    photos = read_photos(config.data, config.size, config.objects)
    N, frames = photos.rgb.shape[:2]
    held = torch.arange(frames)[config.every // 2::config.every]
    if not len(held):
        raise UserError(f"--every {config.every}: of {frames} frames none would be held out, to measure by")
    train = torch.tensor([k for k in range(frames) if k % config.every != config.every // 2])
    parts = [read_parts(Path(config.data, name, "parts.npz"), frames) for name in photos.names]
    truth = torch.from_numpy(np.stack([motion for motion, _ in parts])).float()
    run = Run(config.out, "parts", config, [f.name for f in fields(Config) if f.name not in FREE])

    torch.manual_seed(config.seed)
    model = Moving(config, N, frames).to(device)
    model.palettes.copy_(palette_code(*photos.colours(train)))
    named = dict(model.named_parameters())
    codes, poses = [named.pop("shapes")], [named.pop("poses"), named.pop("pivot")]
    groups = [(list(named.values()), config.decoder_lr), (codes, config.code_lr), (poses, config.pose_lr)]
    optimizer = torch.optim.Adam([{"params": some} for some, _ in groups], betas=autodecoder.BETAS)
    step = resume(run, None, {"model": model}, [optimizer])
    shown = [(o, held[(3 * o) % len(held)].item()) for o in range(min(N, 8))]
    one = lambda o, frame: motion_of(model, config, truth, model.poses[[o]], torch.tensor([o]),
                                     torch.tensor([[frame]], device=device))[0, 0]
    with run:
        while step < config.steps:
            for group, (_, rate) in zip(optimizer.param_groups, groups):
                group["lr"] = rate * learning_rate_share(step, config.steps, config.lr_floor)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            o, frame, batch = draw(photos, config, train, generator)
            origins, directions, rgb, mask = [some.to(device) for some in batch]
            place = jitter(batch, config.samples, generator, device)

            # All rays of an object share one decoding, whatever their frames' poses
            code = model.code(torch.zeros(len(o), 3, device=device), o, model.palettes[o])
            there = motion_of(model, config, truth, model.poses[o], o, frame.to(device))
            volume = model.volumes_of(code)
            seen, alpha, _ = render_parts(model, volume, origins, directions, there, config.samples, place,
                                          step < config.dense_steps)
            photo, jump, far = (seen - rgb).square().mean(), *steadiness(model.poses[o])
            loss = photo + config.mask_weight * (alpha - mask).square().mean()
            loss = loss + config.steady * jump + config.rest * far
            loss = loss + config.code_decay * code[:, 3:-PALETTE].square().mean()
            improve(run, step, loss, optimizer)
            step += 1
            if step % config.preview_every == 0 or step == config.steps:
                with torch.no_grad():
                    ours = [whole_frame(model, model.volumes_of(model.codes[[o]]), photos, o, k, one(o, k))[0]
                            for o, k in shown]
                save_preview(run.folder / f"previews/step_{step:06d}.png", torch.stack(
                    [torch.stack([photos.rgb[o, k] for o, k in shown]), to_bytes(torch.stack(ours))]))
            record(run, None, {"model": model}, [optimizer], step, config.steps,
                   {"loss": loss, "training_psnr": -10 * photo.log10(), "alpha": alpha.mean()})

    # Held-out frames.  No photo has told their poses: steadiness has put them between their neighbours'
    model.requires_grad_(False)
    quality, maps = [], []
    for o in range(N):
        volume = model.volumes_of(model.codes[[o]])
        for k in held.tolist():
            rgb, alpha, found = whole_frame(model, volume, photos, o, k, one(o, k))
            quality.append(psnr(rgb, photos.rgb[o, k].float() / 255))
            there = torch.from_numpy(parts[o][1][k]).float()[None, None]
            maps.append((found, alpha, F.interpolate(there, photos.size)[0, 0].long()))
    lines = [f"motion {config.motion}; held-out frames: {sum(quality) / len(quality):.2f} dB"]
    if config.motion != "none":
        found = share_of_parts(*map(torch.stack, zip(*maps)))
        lines.append("parts, intersection over union: "
                     + ", ".join(f"{name} {some:.2f}" for name, some in zip(moving.NAMES, found)))
        with torch.no_grad():
            strip(model, photos, torch.stack([one(0, k) for k in range(frames)]), run.folder)
    save_text(run.folder / "parts.txt", "\n".join(lines) + "\n")
    more = "" if config.motion == "none" else ", strip.png, viewer.html"
    print(*lines, f"wrote {config.out}: last.pt, parts.txt{more} (row J1: 24.03 dB)", sep="\n")


if __name__ == "__main__":
    command(main)

"""
A chapter on stage 1: things that move.  Films of objects that fold, one camera, each frame in another pose.

    in its own space   the decoder makes density and colour, as in stage 1, and for each voxel the weights w_p of
                       the parts it may belong to (a softmax over four: "linear blend skinning")
    in a frame         part p has moved rigidly: what the frame shows at x was at x_p = R_p (x - q_p) + q_p + t_p
    what is seen       density(x) = sum over p  w_p(x_p) density(x_p);  colours are mixed by the same weights

Rotations R_p and shifts t_p, for each part and frame, are learned beside the codes.  Nobody says which pixel is
which part, or how it moved.  What is given: there are four parts, and where each about is (--places; the weights
begin there).  A film adds one thing: from frame to frame little changes, so a jump in the poses costs.

3DADM finds the poses by 3D and 2D keypoints and a solver between them (PnP).  Here gradient descent finds them
directly, because frames follow each other closely.

in   data/moving/films/          shapes/moving.py; made first, if it is not there
out  runs/parts/                 last.pt, log.jsonl, previews/, parts.txt, frames.png, strip.png, viewer.html
run  python -m chapters.parts
     python -m chapters.parts --motion none --out runs/parts_static        as if nothing moved
     python -m chapters.parts --motion known --out runs/parts_known        the true motion is given
read Moving, carried, render_parts, main; share_of_parts.
"""
import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import autodecoder
from autodecoder import FREE, GAIN, Autodecoder, fast_precision, jitter, learning_rate_share, unfold_children
from chapters.families import AsVolumes, improve, record, resume
from common import Run, command, grid, parse_config, pick_device, save_picture, save_preview, save_text, to_bytes
from shapes import moving
from shapes.packed import read_photos
from viewer.page import page_objects, write_page
from volume_render import camera_rays, composite, cube, lookup, pixel_rays, psnr


@dataclass
class Config(autodecoder.Config):
    data: str = "data/moving/films"      # films, by python -m shapes.moving
    out: str = "runs/parts"              # folder for the model, the log and the pictures
    motion: str = "learned"              # learned | known | none
    places: bool = True                  # the weights begin where the parts about are; no: anywhere
    every: int = 5                       # each fifth frame is held out (at least 2)
    steps: int = 1500                    # gradient steps (at least 1)
    rays: int = 3072                     # rays in a step, shared by its objects (at least 64)
    samples: int = 32                    # bins along a ray (at least 2)
    pose_lr: float = 1e-2                # of rotations (radians) and shifts
    steady: float = 0.1                  # weight of the poses' second differences from frame to frame
    refine_steps: int = 60               # of the held-out frames' poses, at the end
    rest: float = 1e-4                   # weight of the poses' squares: a part's mean pose is its own space's


PRESETS = {"cpu": {}, "gpu": dict(autodecoder.PRESETS["gpu"], rays=16384),
           "smoke": dict(autodecoder.PRESETS["smoke"], objects=2, rays=128, log_every=10)}
PARTS = len(moving.NAMES)
PLACES = torch.tensor([[0, 0, 0.25], [0.28, 0, -0.12], [-0.28, 0, -0.12], [0.2, -0.25, -0.25]])      # in the world


class Moving(Autodecoder):
    """Stage 1's, with a weight for each part in each voxel, and a pose for each part and frame"""

    def __init__(self, config, objects, frames):
        super().__init__(config, objects)
        self.frames, width = frames, config.channels[-1]
        bias = self.leave[-1].bias[:32].detach().clone()
        self.leave[-1] = nn.Conv3d(width, (4 + PARTS) * 8, 3, padding=1)
        with torch.no_grad():
            self.leave[-1].bias.zero_()[:32] = bias
        # Pivots may be anywhere, because shifts correct them.  The band, part 0, stays
        self.pivot = nn.Parameter(PLACES.clone() if config.places else 0.1 * torch.randn(PARTS, 3))
        self.poses = nn.Parameter(torch.zeros(objects, frames, PARTS - 1, 6))
        n = torch.linspace(-0.5, 0.5, 8 * 2 ** len(config.channels))
        z, y, x = torch.meshgrid(n, n, n, indexing="ij")
        away = (torch.stack([x, y, z]) - PLACES[..., None, None, None]).square().sum(1)            # (P,N,N,N)
        self.register_buffer("prior", -20 * away * config.places)

    def rows(self, table, which):
        return table[which]                              # two dozen objects: no need of sparse gradients

    def to_volume(self, latent):
        """-> density, colours and the parts' weights, before activation (B,4+P,D,H,W)"""
        x = super().to_volume(latent)
        return torch.cat([x[:, :4], x[:, 4:] + self.prior], 1)

    def transforms(self, poses):
        """Poses (...,P-1,6) -> from a frame to the object's own space (...,P,3,4)"""
        x, y, z = poses[..., :3].unbind(-1)
        zero = torch.zeros_like(x)
        skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
        R = torch.linalg.matrix_exp(skew)
        q = self.pivot[1:]
        t = q + poses[..., 3:] - (R @ q[..., None])[..., 0]
        still = torch.eye(3, 4, device=poses.device).expand(*poses.shape[:-2], 1, 3, 4)
        return torch.cat([still, torch.cat([R, t[..., None]], -1)], -3)


def carried(transforms, position):
    """Rays' transforms (B,R,3,4), points on them (B,R,S,3) -> where they were (B,R,S,3)"""
    return position @ transforms[..., :3].mT + transforms[..., None, :, 3]


def at_points(model, volume, position, transforms):
    """-> density (B,R,S), colours (B,R,S,3), weights of the parts (B,R,S,P): of a frame, at these points"""
    density, colour, shares = 0, 0, []
    for p in range(transforms.shape[2]):
        found = lookup(volume, carried(transforms[:, :, p], position))
        sigma, rgb = model.field(found, None)
        share = found[..., 4:].softmax(-1)[..., p] * sigma if transforms.shape[2] > 1 else sigma
        density, colour = density + share, colour + share[..., None] * rgb
        shares.append(share)
    some = density[..., None] + 1e-6
    return density, colour / some, torch.stack(shares, -1) / some


def render_parts(model, volume, origins, directions, transforms, samples, place=None):
    """As volume_render's `render`, the dense way; transforms (B,R,P,3,4) -> rgb (B,R,3), alpha (B,R), how much of
    what is seen belongs to each part (B,R,P)"""
    near, far = cube(origins, directions)
    step = (far - near) / samples
    bins = torch.arange(samples, device=near.device) + (0.5 if place is None else place)
    t = near[..., None] + bins * step[..., None]
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]
    density, colour, shares = at_points(model, volume, position, transforms)
    white = F.pad(torch.ones(3, device=near.device), (0, shares.shape[-1]))
    seen, alpha, _ = composite(density, torch.cat([colour, shares], -1),
                               (step * directions.norm(dim=-1))[..., None], t, white)
    return seen[..., :3], alpha, seen[..., 3:]


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
    return objects, frame, [*rays, rgb, mask]


def whole_frame(model, volume, photos, o, frame, transforms):
    """-> rgb (H,W,3), alpha (H,W), parts (H,W,P); transforms (P,3,4)"""
    n = photos.size
    rays = camera_rays(photos.pose[o, frame], photos.intrinsics[o], n)
    rays = [some[None].to(volume.device) for some in rays]
    there = transforms.expand(1, n * n, *transforms.shape)
    found = [render_parts(model, volume, *(some[:, k] for some in rays), there[:, k], 64)
             for k in torch.arange(n * n).split(1024)]
    return [torch.cat(some, 1)[0].view(n, n, *some[0].shape[2:]).cpu() for some in zip(*found)]


def motion_of(model, config, truth, poses, o, frame):
    """Objects (B,), frames (B,R) -> transforms (B,R,P,3,4): learned, known, or one part that stays"""
    if config.motion == "learned":
        every = model.transforms(poses)                                                    # (B,F,P,3,4)
        return every[torch.arange(len(frame), device=frame.device)[:, None], frame]
    if config.motion == "known":
        return truth.to(frame.device)[o[:, None], frame]
    return torch.eye(3, 4, device=frame.device).expand(*frame.shape, 1, 3, 4)


def share_of_parts(found, alpha, true):
    """Part maps (F,H,W,P), opacity, true labels (F,H,W; 0: nothing) -> intersection over union, for each part; the
    parts are matched by the best of all orders"""
    label = torch.where(alpha > 0.5, found.argmax(-1) + 1, 0)
    both = torch.tensor([[((label == a) & (true == b)).sum() / ((label == a) | (true == b)).sum().clamp(min=1)
                          for b in range(1, PARTS + 1)] for a in range(1, PARTS + 1)])
    best = max(itertools.permutations(range(PARTS)), key=lambda order: sum(both[a, b] for b, a in enumerate(order)))
    return [both[a, b].item() for b, a in enumerate(best)]


def steadiness(poses):
    """Poses (B,F,P-1,6) -> mean square of their second differences, and of themselves"""
    return poses.diff(n=2, dim=1).square().mean(), poses.square().mean()


def refined(model, photos, config, poses, held):
    """The held-out frames' poses, which so far lie between their neighbours', go downhill; all else stays"""
    way = torch.zeros_like(poses, requires_grad=True)
    optimizer = torch.optim.Adam([way], 0.01)
    for step in range(config.refine_steps):
        generator = torch.Generator().manual_seed(step)
        o, frame, batch = draw(photos, config, held, generator)
        device = poses.device
        there = motion_of(model, config, None, (poses + way)[o], o, frame.to(device))
        origins, directions, rgb, mask = [some.to(device) for some in batch]
        seen, alpha, _ = render_parts(model, model.volumes_of(model.codes[o]), origins, directions, there, config.samples)
        loss = (seen - rgb).square().mean() + config.mask_weight * (alpha - mask).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (poses + way).detach()


@torch.no_grad()
def posed(model, volume, transforms, resolution=32):
    """One object (1,C,N,N,N) as it is in a frame -> a volume as stage 1's, before activation (4,N,N,N)"""
    n = (torch.arange(resolution, device=volume.device) + 0.5) / resolution - 0.5
    z, y, x = torch.meshgrid(n, n, n, indexing="ij")
    position = torch.stack([x, y, z], -1).view(1, 1, -1, 3)
    density, colour, _ = at_points(model, volume, position, transforms[None, None])
    raw = torch.where(density > 20, density, torch.expm1(density.clamp(1e-6, 20)).log()) / GAIN
    return torch.cat([raw[..., None], colour.logit(1e-4)], -1)[0, 0].T.view(4, *[resolution] * 3)


def strip(model, photos, transforms, out):
    """A new object, the shape between two and the colours of a third, folds as one of its parents does"""
    every = torch.arange(1, device=model.shapes.device)
    code = model.code(every, every, model.shapes.new_zeros(1, 3))
    W = model.config.shape_width
    code[0, :W] = (model.shapes[0] + model.shapes[1]) / 2
    code[0, W:-3] = model.colours[-1]
    volume = model.volumes_of(code)
    # From the frame in which its cups have turned least to that in which they have turned most
    turned = [some[1:3, :, :3].diagonal(dim1=-2, dim2=-1).sum().item() for some in transforms]
    order = np.argsort(turned)[::-1]
    chosen = [order[k] for k in np.linspace(0, len(order) - 1, 8).round().astype(int)]
    rows = [torch.stack([to_bytes(whole_frame(model, volume, photos, 0, view, transforms[k])[0]) for k in chosen])
            for view in (0, len(transforms) // 4)]
    save_picture(out / "strip.png", np.kron(grid(torch.cat(rows), 8), np.ones((2, 2, 1), np.uint8)))
    volumes = torch.stack([posed(model, volume, transforms[k]) for k in chosen])
    labels = [f"pose {k + 1}" for k in range(8)]
    objects = page_objects(AsVolumes(), volumes, labels, ["from open to closed"] * 8)
    write_page(out / "viewer.html", "A new headphone folds", "", [("poses", "one object, posed", "", list(range(8)))],
               objects, 96)


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    if not Path(config.data).exists() and config.data == Config.data:
        print(f"{config.data} is not there: making it first, as python -m shapes.moving does")
        moving.main([])
    photos = read_photos(config.data, config.size, config.objects)
    N, frames = photos.rgb.shape[:2]
    held = torch.arange(config.every // 2, frames, config.every)
    train = torch.tensor([k for k in range(frames) if k % config.every != config.every // 2])
    parts = [np.load(Path(config.data, name, "parts.npz")) for name in photos.names]
    truth = torch.from_numpy(np.stack([np.linalg.inv(some["transforms"]) for some in parts])).float()[..., :3, :]
    run = Run(config.out, "parts", config, [f.name for f in fields(Config) if f.name not in FREE])

    torch.manual_seed(config.seed)
    model = Moving(config, N, frames).to(device)
    named = dict(model.named_parameters())
    codes, poses = [named.pop("shapes"), named.pop("colours")], [named.pop("poses"), named.pop("pivot")]
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
            code = model.code(o, o, torch.zeros(len(o), 3, device=device))
            there = motion_of(model, config, truth, model.poses[o], o, frame.to(device))
            seen, alpha, _ = render_parts(model, model.volumes_of(code), origins, directions, there, config.samples, place)
            photo, jump, far = (seen - rgb).square().mean(), *steadiness(model.poses[o])
            loss = photo + config.mask_weight * (alpha - mask).square().mean()
            loss = loss + config.steady * jump + config.rest * far + config.code_decay * code.square().mean()
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

    # Held-out frames: as the neighbours say, and with poses that look at the frame
    model.requires_grad_(False)
    lines = []
    tables = {"between its neighbours' poses": model.poses.clone()}
    if config.motion == "learned":
        tables["pose found"] = refined(model, photos, config, model.poses, held)
    for name, table in tables.items():
        model.poses.copy_(table)
        quality, maps = [], []
        for o in range(N):
            volume = model.volumes_of(model.codes[[o]])
            for k in held.tolist():
                rgb, alpha, found = whole_frame(model, volume, photos, o, k, one(o, k))
                quality.append(psnr(rgb, photos.rgb[o, k].float() / 255))
                there = torch.from_numpy(parts[o]["seen"][k]).float()[None, None]
                maps.append((found, alpha, F.interpolate(there, photos.size)[0, 0].long()))
        name = f", {name}" if config.motion == "learned" else ""
        lines.append(f"motion {config.motion}; held-out frames{name}: {sum(quality) / len(quality):.2f} dB")
    if config.motion != "none":
        found = share_of_parts(*map(torch.stack, zip(*maps)))
        lines.append("parts, intersection over union: "
                     + ", ".join(f"{name} {some:.2f}" for name, some in zip(moving.NAMES, found)))
        with torch.no_grad():
            strip(model, photos, torch.stack([one(0, k) for k in range(frames)]), run.folder)
    save_text(run.folder / "parts.txt", "\n".join(lines) + "\n")
    print(*lines, f"wrote {config.out}: last.pt, previews/, parts.txt, strip.png, viewer.html (row M1)", sep="\n")


if __name__ == "__main__":
    command(main)

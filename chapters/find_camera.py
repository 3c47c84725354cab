"""
A chapter on stage 1: where was the camera?  One photo of a new object; its lens is known (or guessed).

    min over azimuth, elevation, distance, shift, code    | render(G(code), camera) - photo |^2

This has many minima: the back of a headphone looks much like its front.  So the search begins coarsely.  All
training objects are seen from 216 sides, and their silhouettes, cut out and made equally large, are compared
with the photo's.  The best eight that differ go on together, downhill in camera and code at once.  The one
that explains the photo best is the answer.  The camera is taken to be level: people hold cameras level.

Errors that one photo cannot reveal are counted separately.  Earphones are symmetric, left and right, so the
mirrored camera sees the same, in a mirror.  From afar front and back have silhouettes that are mirror images,
and after half a turn a headphone looks much as before.

in   runs/diffusion and runs/autodecoder, or the model in the box; photos with cameras, to compare with
out  runs/find_camera/     cameras.txt
run  python -m chapters.find_camera                      the first photo of 72 unseen objects
     python -m chapters.few_views --photo my.png         uses it for a photo of yours
read silhouettes, look_around, find_camera, main.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from autodecoder import PALETTE, palette_code
from common import (DISTANCE, UserError, camera_to_world_at, command, intrinsics_at, parse_config,
                    pick_device, save_text, to_bytes)
from sample import load_models
from shapes.packed import palette, read_photos
from volume_render import cameras, occupancy, pixel_rays, psnr, render, render_volumes


@dataclass
class Config:
    data: str = "data/earphones_test"    # a folder of photos in the SRN layout
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's folder; "": the one that stage 2 was trained on
    out: str = "runs/find_camera"        # folder for the table
    objects: int = 72                    # how many of the folder's objects; 0: all
    steps: int = 100                     # gradient steps (at least 1)
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(objects=2, steps=3)}


def silhouettes(mask, side=24):
    """(N,H,W) -> cut to the object, squared and made small (N,side^2); and the boxes' middles and sizes, in
    shares of the picture"""
    N, H, W = mask.shape
    some = mask > 0.5
    def span(any_, n):
        first, last = any_.float().argmax(1), n - 1 - any_.flip(1).float().argmax(1)
        return first / n, (last + 1) / n
    (x0, x1), (y0, y1) = span(some.any(1), W), span(some.any(2), H)
    middle, size = torch.stack([x0 + x1, y0 + y1], 1) / 2, torch.maximum(x1 - x0, y1 - y0).clamp(min=1 / W)
    theta = torch.zeros(N, 2, 3, device=mask.device)
    theta[:, 0, 0] = theta[:, 1, 1] = size
    theta[:, :, 2] = 2 * middle - 1
    where = F.affine_grid(theta, (N, 1, side, side), align_corners=False)
    return F.grid_sample(mask[:, None].float(), where, align_corners=False).flatten(1), middle, size


@torch.no_grad()
def look_around(model, size=32):
    """All training objects from all around -> their silhouettes as above, azimuths, elevations, whose"""
    angles = [(15 * a, e) for a in range(24) for e in (-68, -50, -33, -16, 0, 16, 33, 50, 68)]
    masks = [render_volumes(model, model.volumes_of(code[None]), cameras(angles), intrinsics_at(size).float(),
                            size)[1][0].cpu() for code in model.codes]
    radians = torch.tensor(angles).deg2rad()
    return (*silhouettes(torch.cat(masks)), radians.repeat(len(masks), 1),
            torch.arange(len(masks)).repeat_interleave(len(angles)))


def find_camera(model, denoiser, rgb, mask, around, steps=100, most=8):
    """rgb (H,W,3), mask (H,W) in [0, 1] -> pose (4,4), intrinsics (3,3), dB: the camera of a level photo"""
    shapes, middles, sizes, angles, whose = around
    seen, middle, size = silhouettes(mask[None])
    both = shapes @ seen[0]
    overlap = both / (shapes.sum(1) + seen.sum() - both)                       # intersection over union
    # The best candidate for each side, so that the few that go on differ
    chosen = []
    for k in overlap.argsort(descending=True).tolist():
        turned = lambda j: (angles[k, 0] - angles[j, 0]).cos() > 0.7
        if not any(turned(j) and (angles[k, 1] - angles[j, 1]).abs() < 0.6 for j in chosen):
            chosen.append(k)
        if len(chosen) == most:
            break
    n, device = len(rgb), model.shapes.device
    K, code = intrinsics_at(n).float().to(device), model.codes[whose[chosen]]
    mean, covariance = palette(to_bytes(rgb), to_bytes(mask))
    code[:, -PALETTE:] = palette_code(mean[None], covariance[None]).to(device)
    start = torch.cat([angles[chosen], (DISTANCE * sizes[chosen] / size).log()[:, None],
                       (middle - middles[chosen])], 1).to(device)                            # (B,5)
    move = torch.zeros_like(start, requires_grad=True)
    way = torch.zeros_like(code, requires_grad=True)
    optimizer = torch.optim.Adam([{"params": [move], "lr": 0.03}, {"params": [way], "lr": 0.05}])
    near = (F.max_pool2d(mask[None, None], 5, 1, 2)[0, 0] > 0).flatten().nonzero()[:, 0]
    def camera():
        now = start + move
        pose = camera_to_world_at(*now[:, :2].rad2deg().T, now[:, 2].exp())
        return pose, K + F.pad(n * now[:, 3:, None], (2, 0, 0, 1))
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        at = torch.cat([near[torch.randint(len(near), (768,), generator=generator)],
                        torch.randint(n * n, (256,), generator=generator)])
        x, y = (at % n + 0.5).to(device), (at // n + 0.5).to(device)
        pose, lens = camera()
        rays = pixel_rays(pose[:, None], lens[:, None], x.expand(len(pose), -1), y.expand(len(pose), -1))
        volume = model.volumes_of(code + denoiser.code_deviation * way)
        full = occupancy(volume, model.field)
        found, alpha, _ = render(volume, *rays, model.config.samples, model.field, None, full)
        target, opacity = rgb.view(-1, 3)[at].to(device), mask.flatten()[at].to(device)
        error = (found - target).square().mean((1, 2)) + 0.3 * (alpha - opacity).square().mean(1)
        optimizer.zero_grad()
        (error.sum() + 1e-3 * way.square().mean(1).sum()).backward()
        optimizer.step()
    with torch.no_grad():
        pose, lens = camera()
        volumes = model.volumes_of(code + denoiser.code_deviation * way)
        seen = [psnr(render_volumes(model, v[None], p[None], k, n)[0][0, 0].cpu(), rgb)
                for v, p, k in zip(volumes, pose, lens)]
        best = torch.tensor(seen).argmax()
    return pose[best].cpu(), lens[best].cpu(), seen[best]


def apart(a, b):
    """Rotations (3,3) -> the angle between them, in degrees"""
    return torch.rad2deg(((torch.trace(a.T @ b) - 1) / 2).clamp(-1, 1).arccos()).item()


MIRRORS = {"left and right": torch.diag(torch.tensor([-1.0, 1, 1])),
           "front and back": torch.diag(torch.tensor([1.0, -1, 1])),
           "half a turn": torch.diag(torch.tensor([-1.0, -1, 1]))}             # both mirrors: a real rotation


def mirror_images(rotation):
    """A camera's rotation (3,3) -> {mirror: that of the camera that sees the mirrored object, mirrored}"""
    # A mirror also flips x in the picture; two mirrors flip it back
    flip = torch.diag(torch.tensor([-1.0, 1, 1]))
    return {name: M @ rotation @ (flip if torch.linalg.det(M) < 0 else torch.eye(3))
            for name, M in MIRRORS.items()}


def read_one(path, size):
    """Any photo of one object, on white or with alpha -> rgb (size,size,3), mask (size,size) in [0, 1], cut
    to the object and squared"""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")    # cameras note how they were held
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is no picture: {error}") from None
    image.thumbnail((1024, 1024))
    pixels = torch.from_numpy(np.array(image)).float() / 255                                 # (H,W,4)
    alpha = pixels[..., 3]
    rgb = pixels[..., :3] * alpha[..., None] + 1 - alpha[..., None]
    mask = alpha if (alpha < 0.9).any() else ((1 - rgb.amin(-1)) > 0.06).float()
    share = (mask > 0.5).float().mean().item()
    if not 0.001 < share < 0.9:
        raise UserError(f"{path}: {share:.0%} of it shows an object; one on white, or with alpha, is wanted")
    # The training objects fill some 70 % of their photos.  What lies outside the photo is white
    y, x = (mask > 0.5).nonzero().T
    middle = torch.stack([x.min() + x.max(), y.min() + y.max()]) / 2
    half = max(x.max() - x.min(), y.max() - y.min()).item() / 2 / 0.7 + 1
    at = torch.linspace(-1 + 1 / size, 1 - 1 / size, size) * half
    H, W = mask.shape
    grid_x, grid_y = 2 * (middle[0] + at + 0.5) / W - 1, 2 * (middle[1] + at + 0.5) / H - 1
    where = torch.stack(torch.meshgrid(grid_y, grid_x, indexing="ij"), -1).flip(-1)[None]
    # Seen through `size` pixels a photo of thousands would be jagged: first as coarse as that
    cut = torch.cat([1 - rgb, mask[..., None]], -1).permute(2, 0, 1)[None]
    coarse = max(int(2 * half / size), 1)
    cut = F.avg_pool2d(cut, coarse, 1, coarse // 2, count_include_pad=False)[..., :H, :W]
    cut = F.grid_sample(cut, where, align_corners=False)[0].permute(1, 2, 0)
    return 1 - cut[..., :3], cut[..., 3]


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    model, names, denoiser = load_models(config, pick_device(config.device))
    photos = read_photos(config.data, model.config.size, config.objects)
    began, errors, lines, around = time.time(), [], [], look_around(model)
    print(f"the training objects from all around: {time.time() - began:.0f} s", flush=True)
    began = time.time()
    for o, name in enumerate(photos.names):
        pose, _, seen = find_camera(model, denoiser, photos.rgb[o, 0] / 255, photos.mask[o, 0] / 255, around,
                                    config.steps)
        true = photos.pose[o, 0, :3, :3]
        wrong = {"": apart(pose[:3, :3], true)}
        wrong |= {mirror: apart(pose[:3, :3], R) for mirror, R in mirror_images(true).items()}
        errors.append([wrong[key] for key in ("", *MIRRORS)])
        nearest = min(wrong, key=wrong.get)
        lines.append(f"{name}  {wrong['']:5.1f} degrees  {seen:.1f} dB"
                     + f"  {nearest} confused" * bool(nearest and wrong[nearest] < 15))
        print(lines[-1], flush=True)
    errors = torch.tensor(errors)
    direct = errors[:, 0] < 15
    mirrored = ~direct & (errors[:, 1:] < 15).any(1)
    seconds = (time.time() - began) / len(errors)
    text = (f"{len(errors)} photos, {seconds:.1f} s each: error of the rotation, median "
            f"{errors[:, 0].median():.1f} degrees; under 15 degrees {direct.float().mean():.0%}; mirrored "
            f"{mirrored.float().mean():.0%} more; median up to mirrors {errors.amin(1).median():.1f} degrees")
    save_text(Path(config.out, "cameras.txt"), "\n".join([*lines, text]) + "\n")
    print(f"wrote {config.out}/cameras.txt.  {text} (row F2: 2.1 degrees, 93 %)")


if __name__ == "__main__":
    command(main)

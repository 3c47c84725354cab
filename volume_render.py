"""
From a volume and rays to a picture: emission-absorption volume rendering, the one renderer of every stage.

A ray x(t) = origin + t direction passes through glowing fog of density sigma (per unit of length) and colour
c.  The light that is left at depth t is T(t) = exp(-integral of sigma up to t), so the camera sees

    colour = integral of  T(t) sigma(t) c(t) |direction| dt   +   (what is left at the end) * white

Cut the ray into bins of length d, with one density and one colour in each.  The integral is then exact, and
becomes a sum (Max 1995):

    tau_i = sigma_i d_i                optical depth of bin i
    T_i   = exp(-sum_{j<i} tau_j)      transmittance: the share of bin i's light that reaches the camera.
                                       j < i, not j <= i: a bin does not hide itself
    w_i   = T_i (1 - exp(-tau_i))      the share of the picture that bin i contributes
    colour = sum w_i c_i + (1 - alpha) white,      alpha = sum w_i,      depth = sum w_i t_i / alpha

in   volume (B,C,D,H,W) of channels before activation; rays; a `field`, which turns looked-up channels into
     density and colour
out  rgb (B,R,3), alpha (B,R), depth (B,R)
run  python volume_render.py        headphones made of solids -> runs/volume_render/*.png, and rays per second
read camera_rays, cube, composite, lookup, render; then render_views.  Skip occupancy and render_sparse, which
     make empty space cheap, at first reading.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from common import (camera_to_world_at, command, intrinsics_at, parse_config, pick_device, save_figure,
                    save_picture, to_bytes)

EMPTY = 0.02         # densities below this are empty space: the whole cube of it would have an opacity of 3 %
ANGLES = ((215, 25), (30, 10), (125, -10), (300, 45))    # azimuth, elevation: the cameras to compare by
SIZE = 64                                                # pixels of those views


@dataclass
class Config:
    out: str = "runs/volume_render"     # folder for the pictures
    resolution: int = 64                # voxels along a side of the analytic volume (at least 2)
    size: int = 256                     # pixels along a side (at least 1)
    samples: int = 128                  # bins along a ray: halve them until you see the steps (at least 1)
    sharpness: float = 3000.0           # how fast density grows below a surface; the cube's side is 1
    azimuth: float = 215.0              # degrees (from -360 to 360)
    elevation: float = 25.0             # degrees (from -90 to 90)
    device: str = "auto"                # auto, cpu or cuda


# ------------------------------------------------------------------------------------------------------- rays

def pixel_rays(camera_to_world, intrinsics, x, y):
    """(...,4,4), (...,3,3), places in the picture (...) -> origins and directions (...,3)"""
    # A direction has camera z = 1, so the ray's t is the z-depth that rasterisers and depth maps speak of
    x = (x - intrinsics[..., 0, 2]) / intrinsics[..., 0, 0]
    y = (y - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1]
    directions = camera_to_world[..., :3, :3] @ torch.stack([x, y, torch.ones_like(x)], -1)[..., None]
    return camera_to_world[..., :3, 3].expand_as(directions[..., 0]), directions[..., 0]


def camera_rays(camera_to_world, intrinsics, size):
    """(...,4,4), (...,3,3), pixels a side -> origins and directions (...,H*W,3), row by row"""
    # Pixel centres are at +0.5: (0, 0) is the corner of the picture
    centre = torch.arange(size, device=camera_to_world.device, dtype=camera_to_world.dtype) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    shape = (*camera_to_world.shape[:-2], size * size)
    x, y = x.reshape(-1).expand(shape), y.reshape(-1).expand(shape)                     # (...,HW)
    return pixel_rays(camera_to_world[..., None, :, :], intrinsics[..., None, :, :], x, y)


def cube(origins, directions):
    """Where rays enter and leave [-0.5, 0.5]^3 -> near, far (...,R); far = near for those that miss it."""
    # The cube is where three slabs meet: a ray is inside from the last entry to the first exit
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (-0.5 - origins) * inverse, (0.5 - origins) * inverse                        # (...,R,3)
    near, far = torch.minimum(a, b).amax(-1).clamp(min=0), torch.maximum(a, b).amin(-1)
    return near, torch.maximum(near, far)


# ----------------------------------------------------------------------------------------------- the renderer

def composite(sigma, rgb, length, t, background=1.0):
    """sigma (...,S), rgb (...,S,3), bin lengths (...,S) or (...,1), t (...,S) -> image (...,3), alpha (...),
    depth (...)"""
    tau = sigma * length                                                                # (...,S)
    # The cumulative sum includes bin i itself; the transmittance must not, so tau_i is taken off again.
    # (Exercise: leave "- tau" out, here and in render_sparse.  The paper's notebook does, and loses 3.7 dB)
    transmittance = torch.exp(-(tau.cumsum(-1) - tau))
    weight = transmittance * -torch.expm1(-tau)                                         # (...,S)
    return on_background((weight[..., None] * rgb).sum(-2), weight.sum(-1), (weight * t).sum(-1), background)


def on_background(rgb, alpha, depth, background):
    """Sums over a ray, (...,3), (...), (...) -> image on the background, alpha, mean depth"""
    alpha = alpha.clamp(max=1)                                                   # rounding may reach 1 + 1e-6
    depth = (depth / alpha.clamp(min=0.01)).masked_fill(alpha <= 0.01, math.inf)
    return rgb + (1 - alpha)[..., None] * background, alpha, depth


def lookup(volume, position):
    """Trilinear: volume (B,C,D,H,W), position (B,...,3) in the world -> (B,...,C); voxel
    centres at (i + 0.5)/N."""
    # grid_sample wants a 3D grid of points; a list of points is a grid of P x 1 x 1
    B, shape = len(position), position.shape[1:-1]
    points = 2 * position.view(B, -1, 1, 1, 3)                            # [-1, 1] is grid_sample's range
    found = F.grid_sample(volume, points, align_corners=False, padding_mode="border")
    return found[..., 0, 0].transpose(1, 2).reshape(B, *shape, volume.shape[1])     # x, y, z: its order too


def voxel_field(channels, position):
    """The plainest field: the first channel is density, the next three are colour.  Interpolate
    first, then activate: a sharp surface between two voxels can only come from a steep activation of
    an interpolated channel."""
    return F.softplus(channels[..., 0]), torch.sigmoid(channels[..., 1:4])


def render(volume, origins, directions, samples, field=voxel_field, generator=None, occupied=None):
    """volume (B,C,D,H,W), origins and directions (B,R,3) -> rgb (B,R,3) on white, alpha (B,R), depth
    (B,R; inf where alpha <= 0.01)"""
    # Equal bins between the cube's faces.  Bins are measured in t, light is lost over a length
    near, far = cube(origins, directions)
    step = (far - near) / samples                                                       # (B,R)
    length = step * directions.norm(dim=-1)

    # One sample in each bin: at its centre, or with a generator anywhere in it (stratified sampling: over a
    # training every depth is visited)
    place = None
    if generator is not None:
        place = torch.rand(*near.shape, samples, generator=generator, device=near.device)   # (B,R,S)
    if occupied is not None:                        # the same picture, but empty space is not looked up
        bins = near, step, length
        return render_sparse(volume, origins, directions, bins, samples, place, field, occupied)

    bins = torch.arange(samples, device=near.device) + (0.5 if place is None else place)
    t = near[..., None] + bins * step[..., None]                                        # (B,R,S)
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]          # (B,R,S,3)
    sigma, rgb = field(lookup(volume, position), position)
    return composite(sigma, rgb, length[..., None], t)


# ----------------------------------------------------------------------------------------- what a model shows

def cameras(angles):
    """[(azimuth, elevation)], in degrees -> camera_to_world (V,4,4), at the training cameras' distance"""
    return torch.stack([camera_to_world_at(azimuth, elevation, 1.3) for azimuth, elevation in angles]).float()


@torch.no_grad()
def render_volumes(model, volumes, poses, K, size):
    """volumes (B,C,D,H,W), each seen by all cameras poses (V,4,4), K (3,3) -> rgb (B,V,H,W,3), alpha
    (B,V,H,W), depth (B,V,H,W)"""
    # All the cameras' pixels are one long list of rays.  Twice the bins of training: pictures want it smooth
    rays = camera_rays(poses.to(volumes.device), K.to(volumes.device), size)
    origins, directions = (some.flatten(0, 1).expand(len(volumes), -1, -1) for some in rays)    # (B,VHW,3)
    pictures = render(volumes, origins, directions, 2 * model.config.samples, model.field,
                      occupied=occupancy(volumes, model.field))
    return tuple(some.view(len(volumes), len(poses), size, size, *some.shape[2:]) for some in pictures)


def render_view(model, volume, pose, K, size):
    """volume (1,C,D,H,W), one camera -> rgb (H,W,3), alpha (H,W), depth (H,W), on the CPU"""
    return tuple(some[0, 0].cpu() for some in render_volumes(model, volume, pose[None], K, size))


@torch.no_grad()
def render_views(model, latents, poses, size, batch=8):
    """latents (B,...), poses (V,4,4) -> rgb (B,V,H,W,3), alpha (B,V,H,W), depth, solid (B,D,H,W) bool"""
    K, parts = intrinsics_at(size).float(), []
    for part in latents.split(batch):
        volumes = model.to_volume(part)
        solid = voxel_opacity(volumes, model.field) > 0.5
        parts.append((*render_volumes(model, volumes, poses, K, size), solid))
    return tuple(torch.cat(pieces).cpu() for pieces in zip(*parts))


def depth_picture(depth, alpha):
    """(H,W) each -> (H,W,3): near is light, far is dark; what is mostly transparent is white."""
    seen = alpha > 0.5
    near, far = (depth[seen].min(), depth[seen].max()) if seen.any() else (0.0, 1.0)
    grey = torch.where(seen, 0.85 - 0.7 * (depth - near) / (far - near + 1e-6), 1.0)
    return grey[..., None].expand(-1, -1, 3)


@torch.no_grad()
def truth_and_ours(model, codes, photos, objects, view):
    """(3,B,H,W,3) uint8: photo, rendering and depth, of one view of these objects, whose codes are given"""
    columns = []
    for o, code in zip(objects, codes):
        volume = model.volumes_of(code[None])
        K = photos.intrinsics[o]
        rgb, alpha, depth = render_view(model, volume, photos.pose[o, view], K, photos.size)
        columns.append(torch.stack([photos.rgb[o, view] / 255, rgb, depth_picture(depth, alpha)]))
    return to_bytes(torch.stack(columns, 1))


@torch.no_grad()
def draw_pipeline(model, photos, path, o=0):
    """The pipeline, from real tensors: code, latent, volume, a held-out view, its depth, the photo."""
    code = model.codes[o]
    latent, volume = model.to_latent(code[None]), model.volumes_of(code[None])
    opacity = voxel_opacity(volume, model.field)[0]
    rgb, alpha, depth = render_view(model, volume, photos.pose[o, -1], photos.intrinsics[o], photos.size)
    side = math.ceil(len(code) ** 0.5)
    square = F.pad(code, (0, side * side - len(code))).view(side, side)
    panels = [("code e", square, "RdBu"),
              ("latent G1(e)\none channel, one slice", latent[0, 0, latent.shape[2] // 2].flip(0), "RdBu"),
              ("volume G2(G1(e))\ndensest along y", opacity.amax(1).flip(0), "Greys"),
              ("rendered", rgb.clamp(0, 1), None), ("its depth", depth_picture(depth, alpha), None),
              ("photo, held out", photos.rgb[o, -1].float() / 255, None)]
    figure = Figure(figsize=(13, 2.6), layout="constrained")
    for axis, (title, picture, colours) in zip(figure.subplots(1, len(panels)), panels):
        axis.imshow(picture.cpu().numpy(), cmap=colours)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    save_figure(path, figure)


# ---------------------------------------------------- empty space costs nothing (skip this at first reading)

def density(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): the density at the voxels' centres."""
    B, C, D, H, W = volume.shape
    z, y, x = ((torch.arange(n, device=volume.device) + 0.5) / n - 0.5 for n in (D, H, W))
    centres = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], -1).expand(B, D, H, W, 3)
    return field(volume.permute(0, 2, 3, 4, 1), centres)[0]


def voxel_opacity(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): the share of its light that a ray loses straight through a voxel"""
    return 1 - torch.exp(-density(volume, field) / volume.shape[-1])


@torch.no_grad()
def occupancy(volume, field=voxel_field):
    """(B,C,N,N,N) -> (B,N+1,N+1,N+1) bool: the cells between voxel centres where a sample can see anything.

    Cell (i,j,k) has voxels i-1 and i, j-1 and j, k-1 and k at its corners.  What a sample in it looks up
    lies between those eight voxels' channels, so it is dense only if one of them is."""
    return any_of_eight(F.pad(density(volume, field) > EMPTY, (1,) * 6))


def any_of_eight(mask):
    """(B,n,n,n) bool -> (B,n-1,n-1,n-1): is any True of the eight that meet at each inner corner?
    Far faster than max_pool3d on a CPU."""
    for dim in (1, 2, 3):
        n = mask.shape[dim] - 1
        mask = mask.narrow(dim, 0, n) | mask.narrow(dim, 1, n)
    return mask


def blocks_around(occupied):
    """(B,n,n,n) bool -> (B,m,m,m), m = n/2 rounded up: is any cell True in a 2^3 block or its neighbours?"""
    blocks = any_of_eight(F.pad(occupied, (0, 1 + occupied.shape[-1] % 2) * 3))[:, ::2, ::2, ::2]
    return any_of_eight(any_of_eight(F.pad(blocks, (1,) * 6)))


def render_sparse(volume, origins, directions, bins, samples, place, field, occupied):
    """render(), with the samples in unoccupied cells left out.  `bins` are near, step and length of each ray,
    `place` (B,R,S) each sample's place in its bin."""
    (B, R), N, device = bins[0].shape, volume.shape[-1], volume.device
    near, step, length = (some.view(-1) for some in bins)                                   # (BR,)
    owner = torch.arange(B, device=device, dtype=torch.int32).repeat_interleave(R)
    o = (origins + 0.5).mul(N).add(0.5).view(-1, 3).T.contiguous()                          # (3,BR) in cells
    d = (directions * N).view(-1, 3).T.contiguous()

    # First whole runs of bins are dropped, by a coarse grid of blocks.  A run ends at most one block from its
    # middle, and a block counts its neighbours: so the middle alone decides
    longest = max(1, 4 / N * samples / math.sqrt(3))
    run = max(n for n in range(1, samples + 1) if samples % n == 0 and n <= longest)
    middle = (torch.arange(samples // run, device=device) + 0.5) * run                      # (G,)
    middle = near[:, None] + step[:, None] * middle                                         # (BR,G)
    kept = is_in(blocks_around(occupied), owner[:, None], o[..., None] / 2, d[..., None] / 2, middle)
    ray, g = kept.nonzero().unbind(1)                                                       # (K,) runs

    # Then single bins.  Those kept become one list, ray after ray: (P,) samples
    number = g * run + torch.arange(run, device=device)[:, None]                            # (run,K)
    place = 0.5 if place is None else place.view(-1, samples)[ray, number]
    t = near[ray] + (number + place) * step[ray]
    kept = is_in(occupied, owner[ray], o[:, ray], d[:, ray], t)
    k, bin = kept.T.nonzero().unbind(1)                                                     # (P,) samples
    ray, t = ray[k], t[bin, k]
    point = torch.addcmul(o[:, ray], t, d[:, ray]).T.sub(0.5).div(N).sub(0.5)               # (P,3) in world
    sigma, rgb = field(lookup_sparse(volume, point, owner[ray]), point)

    # As in composite(), but the cumulative sum runs over the whole list, in double: what a ray has passed is
    # the sum so far less the sum where the ray began
    tau = sigma * length[ray]                                                               # (P,)
    count = ray.bincount(minlength=B * R)                                                   # (BR,)
    total = tau.double().cumsum(0)                                                          # (P,)
    began = F.pad(total, (1, 0))[(count.cumsum(0) - count)[ray]]                            # (P,)
    transmittance = torch.exp(-((total - tau) - began).float())
    weight = transmittance * -torch.expm1(-tau)
    seen = weight[:, None] * torch.cat([rgb, torch.ones_like(t)[:, None], t[:, None]], 1)   # (P,5)
    sums = seen.new_zeros(B * R, 5).index_add(0, ray, seen).view(B, R, 5)
    return on_background(sums[..., :3], sums[..., 3], sums[..., 4], 1.0)


def is_in(mask, owner, origin, direction, t):
    """mask (B,n,n,n) bool; owner; rays (3,...) in units of its cells; t (...) -> bool: the mask at t"""
    n = mask.shape[-1]
    index = owner                                             # 32 bits: half the memory of PyTorch's habit
    for axis in (2, 1, 0):                                                                  # z, y, x
        at = torch.addcmul(origin[axis], t, direction[axis])
        index = index * n + at.int().clamp_(0, n - 1)
    return mask.view(-1)[index]


def lookup_sparse(volume, position, owner):
    """position (P,3), each in the volume of object `owner` (P,), ascending -> (P,C)."""
    # grid_sample wants as many points for each volume: pad to the largest number.  On a CPU it runs parallel
    # over volumes alone, so one volume is better looked up as two, with half of the points each
    counts = owner.bincount(minlength=len(volume)).tolist()
    if len(volume) == 1:
        volume, counts = volume.expand(2, *volume.shape[1:]), [len(owner) // 2, len(owner) - len(owner) // 2]
    padded = nn.utils.rnn.pad_sequence(position.split(counts), batch_first=True)            # (B,most,3)
    found = lookup(volume, padded)                                                          # (B,most,C)
    return torch.cat([one[:n].T for one, n in zip(found, counts)], 1).T                     # channels apart


# ------------------------------------------------------------------------------------------ an example volume

def headphones(resolution, sharpness):
    """Two cups with cushions and a band, as an analytic volume (1,4,N,N,N): density grows with the
    depth below a surface, which is a signed distance; colours are logits, since the field's sigmoid
    comes after the lookup."""
    centre = (torch.arange(resolution) + 0.5) / resolution - 0.5
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    side = x.abs()                                                                 # the mirror plane is x = 0
    radius = torch.hypot(y, z + 0.1)
    cup = torch.maximum(radius - 0.19, (side - 0.33).abs() - 0.05)
    cushion = torch.hypot(radius - 0.14, side - 0.26) - 0.05
    arch = torch.maximum(torch.hypot(torch.hypot(x, z) - 0.33, y) - 0.05, -z)
    stem = torch.maximum(torch.hypot(side - 0.33, y) - 0.05, (z + 0.05).abs() - 0.06)
    parts = torch.stack([cup, cushion, torch.minimum(arch, stem)])                # (3,N,N,N) signed distances
    colours = torch.tensor([[0.10, 0.15, 0.35], [0.45, 0.28, 0.18], [0.75, 0.75, 0.78]])
    nearest, which = parts.min(0)
    rgb = torch.logit(colours)[which].permute(3, 0, 1, 2)
    return torch.cat([-sharpness * nearest[None], rgb])[None]


def main(argv=None):
    config = parse_config(Config, argv=argv)
    device = pick_device(config.device)
    # One camera, one volume; its rays are rendered with and without the empty space, and timed
    volume = headphones(config.resolution, config.sharpness).to(device)
    pose = camera_to_world_at(config.azimuth, config.elevation, 1.3).float().to(device)
    intrinsics = intrinsics_at(config.size).float().to(device)
    origins, directions = camera_rays(pose[None], intrinsics[None], config.size)
    occupied = occupancy(volume)
    for name, cells in (("dense", None), ("empty space skipped", occupied)):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            rgb, alpha, depth = render(volume, origins, directions, config.samples, occupied=cells)
            rgb.sum().item()                                                   # a GPU answers when it is done
            times.append(time.perf_counter() - began)
        speed = directions.shape[1] / min(times) / 1e6
        print(f"{name:<20} {speed:6.2f} million rays per second, {config.samples} samples each")
    picture = lambda values: to_bytes(values.view(config.size, config.size, -1).expand(-1, -1, 3)).cpu()
    square = lambda values: values.view(config.size, config.size)
    pictures = {"colour": picture(rgb), "opacity": picture(alpha),
                "depth": to_bytes(depth_picture(square(depth), square(alpha))).cpu()}
    for name, pixels in pictures.items():
        save_picture(f"{config.out}/{name}.png", pixels)
    print(f"wrote {', '.join(f'{config.out}/{name}.png' for name in pictures)}")


if __name__ == "__main__":
    command(main)

"""
From a volume and rays to a picture: emission-absorption volume rendering, the one
renderer that every stage uses.

A ray x(t) = origin + t direction passes through glowing fog of density sigma (per unit of length) and colour
c.  What is left of the light from depth t is T(t) = exp(-integral of sigma up to t), so that the camera sees

    colour = integral of  T(t) sigma(t) c(t) |direction| dt   +   (what is left at the end) * white

Cut into bins of length d, with one density and one colour in each, the integral is exact
and becomes a sum (Max 1995):

    tau_i = sigma_i d_i                optical depth of bin i
    T_i   = exp(-sum_{j<i} tau_j)      what reaches the camera from bin i: j < i, not j <= i: a bin does not
                                       hide itself
    w_i   = T_i (1 - exp(-tau_i))      the share of the picture that bin i is
    colour = sum w_i c_i + (1 - alpha) white,      alpha = sum w_i,      depth = sum w_i t_i / alpha

in   volume (B,C,D,H,W) of channels before activation; rays; a `field` that makes density and colour of
     looked-up channels
out  rgb (B,R,3), alpha (B,R), depth (B,R)
run  python volume_render.py        headphones made of solids -> runs/volume_render/*.png, and rays per second
read camera_rays, cube, composite, render; then occupancy and render_sparse, which make empty space cheap.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import parse_config, pick_device, save_picture
from shapes.rasterizer import camera_to_world_at, intrinsics_at

EMPTY = 0.02         # densities below this are empty space: the whole cube of it would have an opacity of 3 %


@dataclass
class Config:
    out: str = "runs/volume_render"     # folder for the pictures
    resolution: int = 64                # voxels along a side of the analytic volume
    size: int = 256                     # pixels along a side
    samples: int = 128                  # bins along a ray: halve them until you see the steps
    sharpness: float = 3000.0          # how fast density grows below a surface; the cube's side is 1
    azimuth: float = 215.0              # degrees
    elevation: float = 25.0             # degrees
    device: str = "auto"                # auto, cpu or cuda


def camera_rays(camera_to_world, intrinsics, size):
    """(...,4,4), (...,3,3), pixels a side -> origins (...,H*W,3), directions (...,H*W,3), row by row.

    Directions are scaled to camera z = 1, so that the ray's t is the z-depth that rasterisers
    and depth maps speak of."""
    centre = torch.arange(size, device=camera_to_world.device, dtype=camera_to_world.dtype) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    pixel = torch.stack([x, y, torch.ones_like(x)], -1).view(-1, 3)                     # (HW,3)
    in_camera = pixel @ torch.linalg.inv(intrinsics).transpose(-1, -2)                  # (...,HW,3)
    directions = in_camera @ camera_to_world[..., :3, :3].transpose(-1, -2)             # (...,HW,3)
    return camera_to_world[..., None, :3, 3].expand_as(directions), directions


def cube(origins, directions):
    """Where rays enter and leave [-0.5, 0.5]^3 -> near, far (...,R); far = near for those that miss it."""
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (-0.5 - origins) * inverse, (0.5 - origins) * inverse           # (...,R,3): the slabs of each axis
    near, far = torch.minimum(a, b).amax(-1).clamp(min=0), torch.maximum(a, b).amin(-1)
    return near, torch.maximum(near, far)


def voxel_field(channels, position):
    """The plainest field: the first channel is density, the next three are colour.  Interpolate
    first, then activate: a sharp surface between two voxels can only come from a steep activation of
    an interpolated channel."""
    return F.softplus(channels[..., 0]), torch.sigmoid(channels[..., 1:4])


def composite(sigma, rgb, length, t, background=1.0, transmittance="exclusive"):
    """sigma (...,S), rgb (...,S,3), bin lengths (...,S) or (...,1), t (...,S) -> image (...,3),
    alpha (...), depth (...)"""
    tau = sigma * length                                                                # (...,S)
    through = tau.cumsum(-1) - (tau if transmittance == "exclusive" else 0)
    # For the lesson: "inclusive" (j <= i), a common slip, dims a sample by itself; an opaque
    # one gets no weight at all
    weight = torch.exp(-through) * -torch.expm1(-tau)                                   # (...,S)
    return finish((weight[..., None] * rgb).sum(-2), weight.sum(-1), (weight * t).sum(-1), background)


def finish(rgb, alpha, depth, background):
    """Sums over a ray, (...,3), (...), (...) -> image on the background, alpha, mean depth"""
    alpha = alpha.clamp(max=1)                                                   # rounding may reach 1 + 1e-6
    depth = (depth / alpha.clamp(min=0.01)).masked_fill(alpha <= 0.01, math.inf)
    return rgb + (1 - alpha)[..., None] * background, alpha, depth


def lookup(volume, position):
    """Trilinear: volume (B,C,D,H,W), position (B,...,3) in the world -> (B,...,C); voxel
    centres at (i + 0.5)/N."""
    B, shape = len(position), position.shape[1:-1]
    points = 2 * position.view(B, -1, 1, 1, 3)                            # [-1, 1] is grid_sample's range
    found = F.grid_sample(volume, points, align_corners=False, padding_mode="border")
    return found[..., 0, 0].transpose(1, 2).reshape(B, *shape, volume.shape[1])     # x, y, z: its order too


def render(volume, origins, directions, samples, field=voxel_field, generator=None, occupied=None,
           background=1.0, transmittance="exclusive"):
    """volume (B,C,D,H,W), origins and directions (B,R,3) -> rgb (B,R,3), alpha (B,R), depth
    (B,R; inf where alpha <= 0.01)

    One sample in each of `samples` equal bins: at its centre, or with a `generator` anywhere in it
    (stratified: over a training every depth is visited).  With `occupied`, see occupancy(), samples in empty
    space are not looked up."""
    near, far = cube(origins, directions)
    step = (far - near) / samples                                                       # (B,R)
    length = step * directions.norm(dim=-1)
    u = None
    if generator is not None:
        u = torch.rand(*near.shape, samples, generator=generator, device=near.device)   # (B,R,S)
    if occupied is not None:
        return render_sparse(volume, origins, directions, samples, near, step, length, u, field, occupied,
                             background, transmittance)
    bins = torch.arange(samples, device=near.device) + (0.5 if u is None else u)
    t = near[..., None] + bins * step[..., None]                                        # (B,R,S)
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]          # (B,R,S,3)
    sigma, rgb = field(lookup(volume, position), position)
    return composite(sigma, rgb, length[..., None], t, background, transmittance)


# ---------------------------------------------------------------------------------- empty space costs nothing

def density(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): the density at the voxels' centres."""
    B, C, D, H, W = volume.shape
    z, y, x = ((torch.arange(n, device=volume.device) + 0.5) / n - 0.5 for n in (D, H, W))
    centres = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], -1).expand(B, D, H, W, 3)
    return field(volume.permute(0, 2, 3, 4, 1), centres)[0]


def voxel_opacity(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): what a ray straight through each voxel loses in it"""
    return 1 - torch.exp(-density(volume, field) / volume.shape[-1])


@torch.no_grad()
def occupancy(volume, field=voxel_field):
    """(B,C,N,N,N) -> (B,N+1,N+1,N+1) bool: the cells between voxel centres where a sample can see anything.

    Cell (i,j,k) has voxels i-1 and i, j-1 and j, k-1 and k at its corners.  What a sample in it looks up
    lies between those eight voxels' channels, so it is dense only if one of them is."""
    return either(F.pad(density(volume, field) > EMPTY, (1,) * 6))


def either(cells):
    """(B,n,n,n) bool -> (B,n-1,n-1,n-1): is any True of the eight that meet at each inner corner?
    Far faster than max_pool3d on a CPU."""
    for dim in (1, 2, 3):
        n = cells.shape[dim] - 1
        cells = cells.narrow(dim, 0, n) | cells.narrow(dim, 1, n)
    return cells


def blocks_around(cells):
    """(B,n,n,n) bool -> (B,m,m,m), m = n/2: is any of a block's 2^3 cells True, or any of its neighbours'?"""
    blocks = either(F.pad(cells, (0, 1 + cells.shape[-1] % 2) * 3))[:, ::2, ::2, ::2]
    return either(either(F.pad(blocks, (1,) * 6)))


def render_sparse(volume, origins, directions, samples, near, step, length, u, field, occupied, background,
                  transmittance):
    """What render() does, with the samples in unoccupied cells left out: first runs of bins, by a
    coarse grid of blocks, then single bins.  Those kept become one list, ray after ray: (P,) samples."""
    (B, R), N, device = near.shape, volume.shape[-1], volume.device
    near, step, length = near.view(-1), step.view(-1), length.view(-1)                      # (BR,)
    owner = torch.arange(B, device=device, dtype=torch.int32).repeat_interleave(R)
    o = (origins + 0.5).mul(N).add(0.5).view(-1, 3).T.contiguous()                          # (3,BR) in cells
    d = (directions * N).view(-1, 3).T.contiguous()

    # A run's middle is at most half a run from its ends: the block it lies in knows its neighbours
    longest = max(1, 4 / N * samples / math.sqrt(3))
    run = max(n for n in range(1, samples + 1) if samples % n == 0 and n <= longest)
    middle = (torch.arange(samples // run, device=device) + 0.5) * run                      # (G,)
    middle = near[:, None] + step[:, None] * middle                                         # (BR,G)
    kept = is_in(blocks_around(occupied), owner[:, None], o[..., None] / 2, d[..., None] / 2, middle)
    ray, g = kept.nonzero().unbind(1)                                                       # (K,) runs
    bins = g * run + torch.arange(run, device=device)[:, None]                              # (run,K)
    t = near[ray] + (bins + (0.5 if u is None else u.view(-1, samples)[ray, bins])) * step[ray]
    kept = is_in(occupied, owner[ray], o[:, ray], d[:, ray], t)
    k, bin = kept.T.nonzero().unbind(1)                                                     # (P,) samples
    ray, t = ray[k], t[bin, k]

    point = torch.addcmul(o[:, ray], t, d[:, ray]).T.sub(0.5).div(N).sub(0.5)               # (P,3) in world
    sigma, rgb = field(lookup_sparse(volume, point, owner[ray]), point)
    # As in composite(), but cumulative over the whole list, in double: what a ray has passed is the sum so
    # far less the sum where it began
    tau = sigma * length[ray]                                                               # (P,)
    count = ray.bincount(minlength=B * R)                                                   # (BR,)
    total = F.pad(tau.double().cumsum(0), (1, 0))                                           # (P+1,)
    began = total[(count.cumsum(0) - count)[ray]]                                           # (P,)
    through = (total[:-1] if transmittance == "exclusive" else total[1:]) - began
    weight = torch.exp(-through.float()) * -torch.expm1(-tau)
    seen = weight[:, None] * torch.cat([rgb, torch.ones_like(t)[:, None], t[:, None]], 1)   # (P,5)
    sums = seen.new_zeros(B * R, 5).index_add(0, ray, seen).view(B, R, 5)
    return finish(sums[..., :3], sums[..., 3], sums[..., 4], background)


def is_in(cells, owner, origin, direction, t):
    """cells (B,n,n,n) bool; owner; rays (3,...) in units of cells; t (...) -> bool: is the cell at t True?"""
    n = cells.shape[-1]
    index = owner                                             # 32 bits: half the memory of PyTorch's habit
    for axis in (2, 1, 0):                                                                  # z, y, x
        at = torch.addcmul(origin[axis], t, direction[axis])
        index = index * n + at.int().clamp_(0, n - 1)
    return cells.view(-1)[index]


def lookup_sparse(volume, position, owner):
    """position (P,3), each in the volume of object `owner` (P,), ascending -> (P,C).

    grid_sample wants as many points for each volume: pad to the largest number.  On a CPU it runs parallel
    over volumes alone, so that one volume is better looked up as two, with half of the points each."""
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
    square = lambda values: values.clamp(0, 1).view(config.size, config.size, -1)
    picture = lambda values: (square(values) * 255).byte().expand(-1, -1, 3).cpu()
    far, near = depth[depth.isfinite()].max(), depth[depth.isfinite()].min()
    shade = 1 - (depth - near) / (far - near) * 0.8
    pictures = {"colour": picture(rgb), "opacity": picture(alpha), "depth": picture(shade)}
    for name, pixels in pictures.items():
        save_picture(f"{config.out}/{name}.png", pixels)
    print(f"wrote {', '.join(f'{config.out}/{name}.png' for name in pictures)}: near is light in the depth")


if __name__ == "__main__":
    main()

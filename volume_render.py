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
read camera_rays, cube, composite, render; then occupancy and lookup_sparse, which make empty space cheap.
"""
import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common import parse_config, pick_device, save_picture

EMPTY = 0.02         # densities below this are empty space: the whole cube of it would have an opacity of 3 %


@dataclass
class Config:
    out: str = "runs/volume_render"     # folder for the pictures
    resolution: int = 64                # voxels along a side of the analytic volume
    size: int = 256                     # pixels along a side
    samples: int = 128                  # bins along a ray: halve them until you see the steps
    sharpness: float = 3000.0          # how fast density grows below a surface, per voxel-free unit of length
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


def cube(origins, directions, low=-0.5, high=0.5):
    """Where rays enter and leave a box, ours is [-0.5, 0.5]^3 -> near, far (...,R); far = near
    for those that miss it."""
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (low - origins) * inverse, (high - origins) * inverse           # (...,R,3): the slabs of each axis
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
    alpha = weight.sum(-1).clamp(max=1)                                          # rounding may reach 1 + 1e-6
    image = (weight[..., None] * rgb).sum(-2) + (1 - alpha)[..., None] * background
    depth = (weight * t).sum(-1) / alpha.clamp(min=0.01)
    return image, alpha, depth.masked_fill(alpha <= 0.01, math.inf)


def lookup(volume, position):
    """Trilinear: volume (B,C,D,H,W), position (B,...,3) in the world -> (B,...,C); voxel
    centres at (i + 0.5)/N."""
    B, shape = len(position), position.shape[1:-1]
    points = 2 * position.view(B, -1, 1, 1, 3)                            # [-1, 1] is grid_sample's range
    found = F.grid_sample(volume, points, align_corners=False, padding_mode="border")
    return found[..., 0, 0].transpose(1, 2).reshape(B, *shape, -1)        # x, y, z is grid_sample's order too


def render(volume, origins, directions, samples, field=voxel_field, generator=None, occupied=None,
           background=1.0, transmittance="exclusive"):
    """volume (B,C,D,H,W), origins and directions (B,R,3) -> rgb (B,R,3), alpha (B,R), depth
    (B,R; inf where alpha <= 0.01)

    One sample in each of `samples` equal bins: at its centre, or with a `generator` anywhere in it
    (stratified: over a training every depth is visited).  With `occupied`, see occupancy(), samples in empty
    space are not looked up."""
    near, far = cube(origins, directions)
    step = ((far - near) / samples)[..., None]                                          # (B,R,1)
    u = torch.full((*near.shape, samples), 0.5, device=near.device) if generator is None else \
        torch.rand(*near.shape, samples, generator=generator, device=near.device)
    t = near[..., None] + (torch.arange(samples, device=near.device) + u) * step        # (B,R,S)
    length = step * directions.norm(dim=-1, keepdim=True)
    if occupied is not None:
        return render_sparse(volume, origins, directions, t, length, field, occupied,
                             background, transmittance)
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]          # (B,R,S,3)
    sigma, rgb = field(lookup(volume, position), position)
    return composite(sigma, rgb, length, t, background, transmittance)


# ---------------------------------------------------------------------------------- empty space costs nothing

def density(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): the density at the voxels' centres."""
    B, C, D, H, W = volume.shape
    z, y, x = ((torch.arange(n, device=volume.device) + 0.5) / n - 0.5 for n in (D, H, W))
    centres = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], -1).expand(B, D, H, W, 3)
    return field(volume.permute(0, 2, 3, 4, 1), centres)[0]


@torch.no_grad()
def occupancy(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W) bool: the cells where a sample can see anything.

    A sample lies between eight voxel centres and its channels between theirs, so it is dense only if one of
    the eight is: the cells around dense voxels, one in each direction, are all that need looking up."""
    return F.max_pool3d((density(volume, field) > EMPTY)[:, None].float(), 3, 1, 1)[:, 0] > 0


def render_sparse(volume, origins, directions, t, length, field, occupied, background, transmittance):
    """What render() does, with the samples in unoccupied cells left out: first the rays that pass by the box
    around all that is occupied, then runs of bins, by a coarse grid of blocks of 4^3 cells, then single bins.
    Those kept are looked up and put back among zeros, for the same composite()."""
    (B, R, S), N, device = t.shape, occupied.shape[-1], t.device
    hit = passes_box(occupied, origins, directions).view(-1).nonzero()[:, 0]                # (A,) of B*R
    owner, t, length = hit // R, t.view(-1, S)[hit], length.view(-1, 1)[hit]
    origins, directions = origins.reshape(-1, 3)[hit], directions.reshape(-1, 3)[hit]

    # A run's middle is at most half a run from its ends: near enough for the dilated block
    # it lies in to know of them
    longest = max(1, int(2 * 4 / N * S / math.sqrt(3)))
    run = max(n for n in range(1, longest + 1) if S % n == 0)
    blocks = F.max_pool3d(F.max_pool3d(occupied[:, None].float(), 4, 4), 3, 1, 1)[:, 0] > 0  # (B,N/4,N/4,N/4)
    middle = (t[:, (run - 1) // 2::run] + t[:, run // 2::run]) / 2                          # (A,S/run)
    point = torch.addcmul(origins[:, None], middle[..., None], directions[:, None])
    a, g = is_in(blocks, owner[:, None], point).nonzero().unbind(1)              # (K,) the runs that are kept
    at = t.view(len(t), S // run, run)[a, g]                                                # (K,run)
    point = torch.addcmul(origins[a, None], at[..., None], directions[a, None])             # (K,run,3)
    kept = is_in(occupied, owner[a, None], point)                                           # (K,run)
    target = ((a * S + g * run)[:, None] + torch.arange(run, device=device))[kept]          # (P,) of A*S
    point, owner = point[kept], owner[a, None].expand(-1, run)[kept]

    sigma, rgb = field(lookup_sparse(volume, point, owner), point)
    sigma = torch.zeros(len(t) * S, device=device).index_put((target,), sigma).view(-1, S)
    rgb = torch.zeros(len(t) * S, 3, device=device).index_put((target,), rgb).view(-1, S, 3)
    image, alpha, depth = composite(sigma, rgb, length, t, background, transmittance)
    return (torch.full((B * R, 3), background, device=device).index_put((hit,), image).view(B, R, 3),
            torch.zeros(B * R, device=device).index_put((hit,), alpha).view(B, R),
            torch.full((B * R,), math.inf, device=device).index_put((hit,), depth).view(B, R))


def is_in(cells, owner, point):
    """cells (B,n,n,n) bool, owner (...), point (...,3) -> (...) bool: whether the cell it lies in is True."""
    n = cells.shape[-1]
    x, y, z = ((point + 0.5) * n).long().clamp(0, n - 1).unbind(-1)
    return cells.reshape(-1)[((owner * n + z) * n + y) * n + x]


def passes_box(occupied, origins, directions):
    """(B,R): whether each ray meets the box around its object's occupied cells."""
    n = occupied.shape[-1]
    low, high = [], []
    for dims in ((1, 2), (1, 3), (2, 3)):                                      # x, y, z: what the others hold
        line = occupied.any(dims[1]).any(dims[0]).float()                                   # (B,n)
        low.append(line.argmax(1) / n - 0.5)
        high.append(0.5 - line.flip(1).argmax(1) / n)
    low, high = torch.stack(low, 1)[:, None], torch.stack(high, 1)[:, None]                 # (B,1,3)
    near, far = cube(origins, directions, low, high)
    return far > near


def lookup_sparse(volume, position, owner):
    """position (P,3), each in the volume of object `owner` (P,), ascending -> (P,C).

    grid_sample wants as many points for each volume: pad to the largest number.  On a CPU it runs parallel
    over volumes alone, so that one volume is better looked up as two, with half of the points each."""
    B = len(volume)
    if B == 1 and len(owner):
        half = torch.arange(len(owner), device=owner.device) * 2 // len(owner)
        B, volume, owner = 2, volume.expand(2, *volume.shape[1:]), half
    counts = owner.bincount(minlength=B)
    slot = torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]
    padded = torch.zeros(B, max(int(counts.max()), 1), 3, device=position.device)
    padded = padded.index_put((owner, slot), position)
    return lookup(volume, padded)[owner, slot]


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
    from render_shapenet import camera_to_world_at, intrinsics_at
    config = parse_config(Config, argv=argv)
    device = pick_device(config.device)
    volume = headphones(config.resolution, config.sharpness).to(device)
    pose = camera_to_world_at(config.azimuth, config.elevation, 1.3).float().to(device)
    intrinsics = intrinsics_at(config.size, 131.25).float().to(device)
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

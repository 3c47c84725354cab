"""
Stage 1's decoder for things that move: density, colours, and for each voxel the weights of four parts.  Each
part moves rigidly.  For chapters/parts.py.

read Moving, at_points, render_parts.
"""
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import GAIN, Autodecoder
from chapters.poses import turned_by
from shapes import moving
from volume_render import camera_rays, composite, cube, lookup, occupancy

PARTS = len(moving.NAMES)
# Where they about are, in the world: band, right cup, left cup, boom
PLACES = torch.tensor([[0, 0, 0.25], [0.28, 0, -0.12], [-0.28, 0, -0.12], [0.2, -0.25, -0.25]])


class Moving(Autodecoder):
    """Stage 1's, with a weight for each part in each voxel, and a pose for each part and frame"""

    def __init__(self, config, objects, frames):
        super().__init__(config, objects)
        bias = self.leave[-1].bias[:32].detach().clone()
        self.leave[-1] = nn.Conv3d(config.channels[-1], (4 + PARTS) * 8, 3, padding=1)
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
        R, q = turned_by(poses[..., :3]), self.pivot[1:]
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
        there = carried(transforms[:, :, p], position)
        found = lookup(volume, there)
        sigma, rgb = model.field(found, None)
        # Outside its own space a part is nowhere
        sigma = sigma * (there.detach().abs() < 0.5).all(-1)
        share = found[..., 4:].softmax(-1)[..., p] * sigma if transforms.shape[2] > 1 else sigma
        density, colour = density + share, colour + share[..., None] * rgb
        shares.append(share)
    some = density[..., None] + 1e-6
    return density, colour / some, torch.stack(shares, -1) / some


@torch.no_grad()
def not_empty(model, volume, position, transforms):
    """Points (B,R,S,3) -> the numbers, from 0 to R S, of those where some part may be (B,M), and which of
    these are more than padding (B,M)"""
    full, N, some = occupancy(volume, model.field).flatten(1), volume.shape[-1], False
    for p in range(transforms.shape[2]):
        there = carried(transforms[:, :, p], position)
        x, y, z = ((there + 0.5) * N + 0.5).long().clamp(0, N).unbind(-1)
        dense = full.gather(1, ((z * (N + 1) + y) * (N + 1) + x).flatten(1))
        some = some | dense & (there.abs() < 0.5).all(-1).flatten(1)                             # (B,RS)
    count = some.sum(1)
    real = torch.arange(max(count.max().item(), 1), device=count.device) < count[:, None]        # (B,M)
    numbers = torch.zeros(real.shape, dtype=torch.long, device=count.device)
    numbers[real] = some.nonzero()[:, 1]
    return numbers, real


def render_parts(model, volume, origins, directions, transforms, samples, place=None, dense=False):
    """As volume_render's `render`; transforms (B,R,P,3,4) -> rgb (B,R,3), alpha (B,R), and how much of what
    is seen belongs to each part (B,R,P).  If not dense, only points where something may be are looked up"""
    near, far = cube(origins, directions)
    step = (far - near) / samples
    bins = torch.arange(samples, device=near.device) + (0.5 if place is None else place)
    t = near[..., None] + bins * step[..., None]
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]
    if dense:
        found = at_points(model, volume, position, transforms)
        found = torch.cat([found[0][..., None], *found[1:]], -1)                                 # (B,R,S,4+P)
    else:
        numbers, real = not_empty(model, volume, position, transforms)
        b, each = torch.arange(len(numbers), device=near.device)[:, None], numbers // samples
        points = position.flatten(1, 2)[b, numbers][:, :, None]                                  # (B,M,1,3)
        some = at_points(model, volume, points, transforms[b, each])
        some = torch.cat([some[0][..., None], *some[1:]], -1)[:, :, 0] * real[..., None]
        found = some.new_zeros(*position.shape[:1], position.shape[1] * samples, some.shape[-1])
        found = found.scatter_add(1, numbers[..., None].expand_as(some), some)
        found = found.view(*position.shape[:3], -1)
    white = F.pad(torch.ones(3, device=near.device), (0, found.shape[-1] - 4))
    seen, alpha, _ = composite(found[..., 0], found[..., 1:],
                               (step * directions.norm(dim=-1))[..., None], t, white)
    return seen[..., :3], alpha, seen[..., 3:]


def whole_frame(model, volume, photos, o, frame, transforms):
    """-> rgb (H,W,3), alpha (H,W), parts (H,W,P); transforms (P,3,4)"""
    n = photos.size
    rays = camera_rays(photos.pose[o, frame], photos.intrinsics[o], n)
    rays = [some[None].to(volume.device) for some in rays]
    there = transforms.expand(1, n * n, *transforms.shape)
    found = [render_parts(model, volume, *(some[:, k] for some in rays), there[:, k], 64)
             for k in torch.arange(n * n).split(1024)]
    return [torch.cat(some, 1)[0].view(n, n, *some[0].shape[2:]).cpu() for some in zip(*found)]


@torch.no_grad()
def posed(model, volume, transforms, resolution=32):
    """One object (1,C,N,N,N) as it is in a frame -> a volume as stage 1's, before activation (4,N,N,N)"""
    n = (torch.arange(resolution, device=volume.device) + 0.5) / resolution - 0.5
    z, y, x = torch.meshgrid(n, n, n, indexing="ij")
    position = torch.stack([x, y, z], -1).view(1, 1, -1, 3)
    density, colour, _ = at_points(model, volume, position, transforms[None, None])
    raw = torch.where(density > 20, density, torch.expm1(density.clamp(1e-6, 20)).log()) / GAIN
    return torch.cat([raw[..., None], colour.logit(1e-4)], -1)[0, 0].T.view(4, *[resolution] * 3)


def share_of_parts(found, alpha, true):
    """Part maps (F,H,W,P), opacity, true labels (F,H,W; 0: nothing) -> intersection over union of each part.
    The parts are matched by the best of all orders"""
    label = torch.where(alpha > 0.5, found.argmax(-1) + 1, 0)
    both = torch.tensor([[((label == a) & (true == b)).sum() / ((label == a) | (true == b)).sum().clamp(min=1)
                          for b in range(1, PARTS + 1)] for a in range(1, PARTS + 1)])
    agreement = lambda order: sum(both[a, b] for b, a in enumerate(order))
    best = max(itertools.permutations(range(PARTS)), key=agreement)
    return [both[a, b].item() for b, a in enumerate(best)]

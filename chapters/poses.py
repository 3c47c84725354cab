"""
Cameras as three angles, where they stood by silhouettes alone, and how far two sets of them are apart.  For
chapters/cameras.py.

A camera looks at the object's middle from a known distance.  Its angles are azimuth, elevation, and the turn
in the picture.

read pose_of, bootstrap, measure.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from common import DISTANCE, camera_to_world_at, intrinsics_at, save_figure
from volume_render import camera_rays, render

SIDE = 16                                # pixels of the pictures that are searched by


def pose_of(angles):
    """Radians (...,3): azimuth, elevation, turn in the picture -> camera to world (...,4,4)"""
    flat = angles.reshape(-1, 3)
    pose = camera_to_world_at(*flat[:, :2].rad2deg().T, torch.full_like(flat[:, 0], DISTANCE))
    pose = torch.cat([torch.cat([pose[:, :3, :3] @ about_z(flat[:, 2]), pose[:, :3, 3:]], 2), pose[:, 3:]], 1)
    return pose.view(*angles.shape[:-1], 4, 4)


def angles_of(pose):
    """The other way round, for cameras that look at the middle: rotations (...,3,3) -> (...,3)"""
    azimuth, elevation = torch.atan2(-pose[..., 1, 2], -pose[..., 0, 2]), -pose[..., 2, 2].clamp(-1, 1).asin()
    level = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)], -1)
    down = torch.linalg.cross(pose[..., 2], level)
    turn = torch.atan2((pose[..., 0] * down).sum(-1), (pose[..., 0] * level).sum(-1))
    return torch.stack([azimuth, elevation, turn], -1)


def noisy(pose, degrees, generator):
    """Rotations (...,3,3), turned around random axes; the angle's root mean square is `degrees`"""
    vector = torch.randn(*pose.shape[:-1], generator=generator) * math.radians(degrees) / math.sqrt(3)
    return turned_by(vector) @ pose


def turned_by(vector):
    """(...,3), whose direction is the axis and whose length is the angle -> rotations (...,3,3)"""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    return torch.linalg.matrix_exp(skew)


def about_z(angle):
    return turned_by(torch.stack([0 * angle, 0 * angle, angle], -1))


def all_sides(max_elevation):
    """-> angles (264,3), spread over the sphere between the elevations"""
    height = torch.linspace(-1, 1, 11) * math.sin(math.radians(max_elevation)) * 0.97
    azimuth = torch.arange(24) * math.tau / 24
    return torch.stack([azimuth.repeat(11), height.asin().repeat_interleave(24), torch.zeros(264)], 1)


def small(some):
    """(...,n,n) or (...,n,n,3), bytes -> floats, SIDE pixels a side, flat: (...,P) or (...,P,3)"""
    colours = some.shape[-1] == 3
    x = (some if colours else some[..., None]).float() / 255
    x = F.adaptive_avg_pool2d(x.flatten(0, -4).permute(0, 3, 1, 2), SIDE).flatten(2).mT
    x = x.unflatten(0, some.shape[:-3 if colours else -2])
    return x if colours else x[..., 0]


def bootstrap(masks, sides, config, generator, say):
    """Silhouettes (N,V,P) -> angles (N,V,3), which coarse shape each object is like (N,), squared error"""
    K, G, (N, V, P) = config.clusters, 20, masks.shape
    rays = [some.flatten(0, 1).expand(K, -1, -1)
            for some in camera_rays(pose_of(sides), intrinsics_at(SIDE).float(), SIDE)]
    field = lambda channels, position: (F.softplus(channels[..., 0]), channels.expand(*position.shape) * 0)

    # Random balls of fog, because equal ones would stay equal
    z = torch.linspace(-1, 1, G)
    radius = (z[:, None, None] ** 2 + z[:, None] ** 2 + z ** 2).sqrt()
    ball = 1 - 8 * (radius - 0.5).clamp(min=0) + torch.randn(K, 1, G, G, G, generator=generator)
    shapes = nn.Parameter(ball)
    optimizer = torch.optim.Adam([shapes], 0.2)

    def compare():
        views = render(shapes, *rays, 24, field, None)[1].view(K, -1, P)                       # (K,H,P)
        both = torch.einsum("nvp,khp->nvkh", masks, views.detach())
        squares = masks.square().sum(-1)[..., None, None] + views.detach().square().sum(-1)
        return views, (squares - 2 * both) / P
    for step in range(config.rounds):
        temperature = 0.03 * (0.002 / 0.03) ** min(step / (0.8 * config.rounds), 1)
        views, error = compare()
        # How likely is each view, of each shape; and, from all of an object's photos together, each shape?
        of_shape = torch.logsumexp(-error / temperature, -1).sum(1) / (0.2 * V)                # (N,K)
        likely = of_shape.softmax(-1)[:, None, :, None] * (-error / temperature).softmax(-1)   # (N,V,K,H)
        weight = likely.sum((0, 1))
        means = torch.einsum("nvkh,nvp->khp", likely, masks) / weight.clamp(min=1e-6)[..., None]
        loss = (weight[..., None] * (views - means).square()).sum() / masks.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(step + 1, config.rounds, f"error {loss.item():.5f}")
    with torch.no_grad():
        views, error = compare()
    which = error.min(-1).values.sum(1).argmin(1)                                              # (N,)
    best = error[torch.arange(N), :, which].min(-1)                                            # (N,V)

    # Each shape has a frame of its own.  All are turned until their views are most like the first one's
    around = views.detach().view(K, -1, 24, P)
    apart = torch.stack([(around.roll(k, 2) - around[:1]).square().sum((1, 2, 3)) for k in range(24)])
    angles = sides[best.indices]
    angles[..., 0] += apart.argmin(0)[which][:, None] * math.tau / 24
    return angles, which, best.values.mean().item()


def degrees_off(found, true):
    """Rotations (...,3,3) -> degrees between them"""
    return ((found * true).sum((-1, -2)) / 2 - 0.5).clamp(-1, 1).acos().rad2deg()


def best_frame(found, true, tilt):
    """Turns all rotations found (N,V,3,3) together around the vertical, until most are near the true ones;
    with `tilt` then freely as well, by what the near ones lack on the mean -> the new ones"""
    turned = about_z(torch.arange(360.0).deg2rad())[:, None, None] @ found          # (360,N,V,3,3)
    best = turned[(15 - degrees_off(turned, true)).clamp(min=0).mean((1, 2)).argmax()]
    near = degrees_off(best, true) < 15
    if tilt and near.any():
        U, _, Vh = torch.linalg.svd((true @ best.mT)[near].mean(0))      # the rotation nearest to that mean
        best = U @ Vh @ best
    return best


def measure(angles, true, which):
    """Found angles (N,V,3), true rotations (N,V,3,3), each object's coarse shape (N,) -> lines, and the
    angles in the one frame that is best for all"""
    lines, first, found = [], None, pose_of(angles)[..., :3, :3]
    flip, half = torch.diag(torch.tensor([-1.0, 1, 1])), torch.diag(torch.tensor([-1.0, -1, 1]))
    frames = {"one frame for all": which * 0, "a frame for each coarse shape": which,
              "a frame for each object": torch.arange(len(which))}
    for name, frame in frames.items():
        turned = torch.empty_like(found)
        for k in frame.unique():
            turned[frame == k] = best_frame(found[frame == k], true[frame == k], name.endswith("object"))
        # From behind: half a turn.  In a mirror: the camera that sees the mirrored object, mirrored
        off, behind, mirrored = (degrees_off(some, true)
                                 for some in (turned, half @ turned, flip @ turned @ flip))
        right, turned_round = off < 15, (off >= 15) & (behind < 15)
        reflected = (off >= 15) & (behind >= 15) & (mirrored < 15)
        shares = [f"{some.float().mean():.0%}" for some in (right, turned_round, reflected)]
        lines.append(f"{name}: off by {off.median():.1f} degrees (median); within 15 degrees {shares[0]}; "
                     f"from behind {shares[1]} more, in a mirror {shares[2]} more")
        first = turned if first is None else first
    return lines, angles_of(first)


def draw(found, true, chosen, names, path):
    """True and found cameras of some objects, as a map of the sphere around each"""
    figure = Figure(figsize=(10, 2.2 * len(chosen)), layout="constrained")
    for o, axis in zip(chosen, figure.subplots(len(chosen), 1, squeeze=False)[:, 0]):
        t, f = (some[o].rad2deg() for some in (true, found))
        near = t[:, 0] + (f[:, 0] - t[:, 0] + 180) % 360 - 180                       # the short way round
        for x0, y0, x1, y1 in zip(t[:, 0], t[:, 1], near, f[:, 1]):
            axis.plot([x0, x1], [y0, y1], "-", color="0.7", lw=0.8)
        axis.plot(t[:, 0], t[:, 1], "o", mfc="none", mec="k", ms=6, label="true")
        axis.plot(near, f[:, 1], ".", color="C1", label="found")
        axis.set(xlabel="azimuth, degrees", ylabel="elevation", title=names[o], ylim=(-90, 90))
    axis.legend(fontsize=7)
    save_figure(path, figure)

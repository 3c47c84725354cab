"""
What a model shows: its volumes seen by cameras, and pictures of that to look at.

    code or latent --G1, G2--> volume --volume_render.py--> colour, opacity, depth     of objects x cameras

Photos are compared from their own cameras (render_view), samples from a few that are always the same
(render_views, ANGLES).

read render_volumes, render_view, render_views, preview.
"""
import numpy as np
import torch

from common import grid, save_picture, to_bytes
from decoder import fast_precision
from shapes.rasterizer import camera_to_world_at, intrinsics_at
from volume_render import camera_rays, occupancy, render, voxel_opacity

ANGLES = ((215, 25), (30, 10), (125, -10), (300, 45))    # azimuth, elevation: the cameras to compare by
SIZE = 64                                                # pixels of those views


def cameras(angles):
    """[(azimuth, elevation)], in degrees -> camera_to_world (V,4,4), at the training cameras' distance"""
    return torch.stack([camera_to_world_at(azimuth, elevation, 1.3) for azimuth, elevation in angles]).float()


# -------------------------------------------------------------------------------------------------- rendering

@torch.no_grad()
def decode(model, code, device):
    """One code -> its volume (1,C,D,H,W)"""
    with fast_precision(model.config, device)():
        return model.to_volume(model.to_latent(code[None]))


@torch.no_grad()
def render_volumes(model, volumes, poses, K, size):
    """volumes (B,C,D,H,W), each seen by all cameras poses (V,4,4), K (3,3) -> rgb (B,V,H,W,3), alpha
    (B,V,H,W), depth (B,V,H,W)"""
    rays = camera_rays(poses.to(volumes.device), K.to(volumes.device), size)
    origins, directions = (some.flatten(0, 1).expand(len(volumes), -1, -1) for some in rays)    # (B,VHW,3)
    pictures = render(volumes, origins, directions, 2 * model.config.samples, model.field,
                      occupied=occupancy(volumes, model.field), transmittance=model.config.transmittance)
    return tuple(some.view(len(volumes), len(poses), size, size, *some.shape[2:]) for some in pictures)


def render_view(model, volume, pose, K, size):
    """volume (1,C,D,H,W), one camera -> rgb (H,W,3), alpha (H,W), depth (H,W)"""
    return tuple(some[0, 0] for some in render_volumes(model, volume, pose[None], K, size))


@torch.no_grad()
def render_views(model, latents, poses, size, batch=8):
    """latents (B,...), poses (V,4,4) -> rgb (B,V,H,W,3), alpha (B,V,H,W), depth, solid (B,D,H,W) bool"""
    K, parts = intrinsics_at(size).float(), []
    for part in latents.split(batch):
        volumes = model.to_volume(part)
        solid = voxel_opacity(volumes, model.field) > 0.5
        parts.append((*render_volumes(model, volumes, poses, K, size), solid))
    return tuple(torch.cat(pieces).cpu() for pieces in zip(*parts))


# --------------------------------------------------------------------------------------------------- pictures

def depth_picture(depth, alpha):
    """Near is light; what is mostly transparent is white."""
    seen = alpha > 0.5
    near, far = (depth[seen].min(), depth[seen].max()) if seen.any() else (0.0, 1.0)
    grey = torch.where(seen, 0.85 - 0.7 * (depth - near) / (far - near + 1e-6), 1.0)
    return grey[..., None].expand(-1, -1, 3)


def preview(model, codes, photos, objects, view, device):
    """(3,B,H,W,3) uint8: truth, ours and our depth, of one view of these objects, whose codes are given"""
    columns = []
    for o, code in zip(objects, codes):
        volume = decode(model, code, device)
        rgb, alpha, depth = (t.cpu() for t in render_view(model, volume, photos.pose[o, view],
                                                          photos.intrinsics[o], photos.size))
        columns.append(torch.stack([photos.rgb[o, view] / 255, rgb, depth_picture(depth, alpha)]))
    return to_bytes(torch.stack(columns, 1))


def save_preview(path, rows):
    """Twice as large, to look at."""
    save_picture(path, np.kron(grid(rows.flatten(0, 1), rows.shape[1]), np.ones((2, 2, 1), np.uint8)))

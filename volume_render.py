"""
From a volume and rays to a picture: emission-absorption volume rendering, the one renderer of every stage.

A ray x(t) = origin + t direction passes through glowing fog of density sigma (per unit of length) and colour
c.  The fog also takes light away.  The share T(t) = exp(-integral of sigma up to t) of the light at depth t
reaches the camera, so the camera sees

    colour = integral of  T(t) sigma(t) c(t) |direction| dt   +   (what is left at the end) * white

Cut the ray into bins of length d, with one density and one colour in each.  The integral then becomes a sum,
and the sum is exact (Max 1995):

    tau_i = sigma_i d_i                optical depth of bin i
    T_i   = exp(-sum_{j<i} tau_j)      transmittance: the share of bin i's light that reaches the camera.
                                       j < i, not j <= i: a bin does not hide itself
    w_i   = T_i (1 - exp(-tau_i))      the share of the picture that bin i contributes
    colour = sum w_i c_i + (1 - alpha) white,      alpha = sum w_i,      depth = sum w_i t_i / alpha

in   volume (B,C,D,H,W) of channels before activation; rays; a `field`, which turns looked-up channels into
     density and colour
out  rgb (B,R,3), alpha (B,R), depth (B,R)
run  python volume_render.py        headphones made of solids -> runs/volume_render/*.png, and rays per second
read camera_rays, cube, composite, lookup, render; then render_views.  At first reading, skip occupancy and
     render_sparse, which make empty space cheap.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (DISTANCE, camera_to_world_at, command, intrinsics_at, parse_config, pick_device,
                    save_figure, save_picture, to_bytes)

import math
import time
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure


# Densities below this count as empty.  Fog so thin in the whole cube takes 2 % of the light (diagonal: 3.4 %)
EMPTY = 0.02
# All pictures that compare models show these views: azimuth and elevation in degrees, SIZE x SIZE pixels
ANGLES = ((215, 25), (30, 10), (125, -10), (300, 45))
SIZE = 64

@dataclass
class Config:
    out: str = "runs/volume_render"     # folder for the pictures
    resolution: int = 64                # voxels along a side of the analytic volume (at least 2)
    size: int = 256                     # pixels along a side (at least 1)
    samples: int = 128                  # bins along a ray: with too few you see steps (at least 1)
    sharpness: float = 3000.0           # growth of density for each unit of depth below a surface
    azimuth: float = 215.0              # the camera's direction around Z, in degrees (from -360 to 360)
    elevation: float = 25.0             # its height above the horizon, in degrees (from -90 to 90)
    device: str = "auto"                # auto, cpu or cuda

# ------------------------------------------------------------------------------------------------------- rays

def pixel_rays(camera_to_world, intrinsics, x, y):
    """(...,4,4), (...,3,3), places in the picture (...) -> origins and directions (...,3)"""
    # Undo the intrinsics, then rotate into the world's axes.  The direction is not normalised: it has camera
    # z = 1, so the ray's t is the z-depth that rasterisers and depth maps use
    x = (x - intrinsics[..., 0, 2]) / intrinsics[..., 0, 0]
    y = (y - intrinsics[..., 1, 2]) / intrinsics[..., 1, 1]
    directions = camera_to_world[..., :3, :3] @ torch.stack([x, y, torch.ones_like(x)], -1)[..., None]
    return camera_to_world[..., :3, 3].expand_as(directions[..., 0]), directions[..., 0]

def camera_rays(camera_to_world, intrinsics, size):
    """(...,4,4), (...,3,3), pixels a side -> origins and directions (...,H*W,3), row by row"""
    # (0, 0) is the corner of the picture, so pixel centres are at +0.5.  Without the 0.5 all that is learned
    # would be shifted by half a pixel
    centre = torch.arange(size, device=camera_to_world.device, dtype=camera_to_world.dtype) + 0.5
    y, x = torch.meshgrid(centre, centre, indexing="ij")
    shape = (*camera_to_world.shape[:-2], size * size)
    x, y = x.reshape(-1).expand(shape), y.reshape(-1).expand(shape)                     # (...,HW)
    # A dimension of 1 is put where the rays are, so that one camera serves all of its pixels
    return pixel_rays(camera_to_world[..., None, :, :], intrinsics[..., None, :, :], x, y)

def cube(origins, directions):
    """Where rays enter and leave [-0.5, 0.5]^3 -> near, far (...,R); far = near for those that miss it."""
    # A slab is the space between two parallel faces, and the cube is where three slabs meet.  `a` and `b` are
    # the t at the two faces.  A ray parallel to a slab would divide by zero, and 0 * inf is not a number
    inverse = 1 / torch.where(directions.abs() < 1e-9, 1e-9, directions)
    a, b = (-0.5 - origins) * inverse, (0.5 - origins) * inverse                        # (...,R,3)

    # A ray is in the cube from its last entry into a slab to its first exit from one.  What is behind the
    # camera (t < 0) is not seen.  A ray that misses gets bins of length 0, so it needs no case of its own
    near, far = torch.minimum(a, b).amax(-1).clamp(min=0), torch.maximum(a, b).amin(-1)
    return near, torch.maximum(near, far)

# ----------------------------------------------------------------------------------------------- the renderer

def composite(sigma, rgb, length, t, background=1.0):
    """sigma (...,S), rgb (...,S,3), bin lengths (...,S) or (...,1), t (...,S) -> image (...,3), alpha (...),
    depth (...)"""
    # The cumulative sum includes bin i itself.  The transmittance must not, because a bin does not hide
    # itself, so tau_i is taken off again.
    # (Exercise: leave "- tau" out, here and in render_sparse.  The paper's notebook does, and loses 3.7 dB)
    tau = sigma * length                                                                # (...,S)
    transmittance = torch.exp(-(tau.cumsum(-1) - tau))

    # -expm1(-tau) is 1 - exp(-tau) without its rounding error at small tau, that is in thin fog
    weight = transmittance * -torch.expm1(-tau)                                         # (...,S)
    return on_background((weight[..., None] * rgb).sum(-2), weight.sum(-1), (weight * t).sum(-1), background)

def on_background(rgb, alpha, depth, background):
    """Sums over a ray, (...,3), (...), (...) -> image on the background, alpha, mean depth"""
    # Rounding may bring the opacity to 1 + 1e-6, and the picture would then leave [0, 1].  A ray that meets
    # nearly nothing has no depth: the division by a tiny alpha would only enlarge noise
    alpha = alpha.clamp(max=1)
    depth = (depth / alpha.clamp(min=0.01)).masked_fill(alpha <= 0.01, math.inf)
    return rgb + (1 - alpha)[..., None] * background, alpha, depth

def lookup(volume, position):
    """Trilinear interpolation (a weighted mean of the eight voxels around a point): volume (B,C,D,H,W),
    position (B,...,3) in the world -> (B,...,C)"""
    # grid_sample wants a 3D grid of points: a list of P points is a grid of P x 1 x 1.  It takes x, y, z in
    # [-1, 1], although the volume's dimensions are z, y, x.  Voxel centres are at (i + 0.5)/N
    B, shape = len(position), position.shape[1:-1]
    points = 2 * position.view(B, -1, 1, 1, 3)
    # Within half a voxel of the cube's faces there are no eight voxels; "border" repeats the outermost
    found = F.grid_sample(volume, points, align_corners=False, padding_mode="border")
    return found[..., 0, 0].transpose(1, 2).reshape(B, *shape, volume.shape[1])

def voxel_field(channels, position):
    """The plainest field: channels (...,4 or more) -> density (...), colour (...,3)"""
    # Interpolation comes first and activation after it.  The other order blurs every surface over a voxel,
    # but a steep activation of an interpolated channel can put a sharp surface between two voxels
    return F.softplus(channels[..., 0]), torch.sigmoid(channels[..., 1:4])

def render(volume, origins, directions, samples, field=voxel_field, place=None, occupied=None):
    """volume (B,C,D,H,W), origins and directions (B,R,3), places in the bins (B,R,S) -> rgb (B,R,3) on white,
    alpha (B,R), depth (B,R; inf where alpha <= 0.01)"""
    # All bins between the cube's faces are equal.  A bin's `step` is a difference of depths t.  The fog acts
    # over distances, and the distance is |direction| times as long as the depth
    near, far = cube(origins, directions)
    step = (far - near) / samples                                                       # (B,R)
    length = step * directions.norm(dim=-1)

    # With `occupied` empty space is not looked up.  The picture then lacks only fog thinner than EMPTY
    if occupied is not None:
        bins = near, step, length
        return render_sparse(volume, origins, directions, bins, samples, place, field, occupied)

    # The dense way: a point in every bin, its channels, their density and colour, the sum along the ray.  A
    # point is at its bin's centre or, in training, at a random place between 0 and 1 in it.  The second is
    # called stratified sampling.  It visits every depth, so no wall hides between samples
    bins = torch.arange(samples, device=near.device) + (0.5 if place is None else place)
    t = near[..., None] + bins * step[..., None]                                        # (B,R,S)
    position = origins[..., None, :] + t[..., None] * directions[..., None, :]          # (B,R,S,3)
    sigma, rgb = field(lookup(volume, position), position)
    return composite(sigma, rgb, length[..., None], t)

# ----------------------------------------------------------------------------------------- what a model shows

def cameras(angles):
    """[(azimuth, elevation)], in degrees -> camera_to_world (V,4,4), at the training cameras' distance"""
    return torch.stack([camera_to_world_at(*angle, DISTANCE) for angle in angles]).float()

@torch.no_grad()
def render_volumes(model, volumes, poses, K, size):
    """volumes (B,C,D,H,W), each seen by all cameras poses (V,4,4), K (3,3) -> rgb (B,V,H,W,3), alpha
    (B,V,H,W), depth (B,V,H,W)"""
    # All pixels of all cameras become one list of rays, so one call renders them.  It gets twice the bins of
    # training, because in a picture one sees the steps between bins
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
    # A few at a time, because a volume is much larger than its latent
    for part in latents.split(batch):
        volumes = model.to_volume(part)
        # A voxel that takes more than half of the light is solid.  The lab counts an object's pieces in these
        solid = voxel_opacity(volumes, model.field) > 0.5
        parts.append((*render_volumes(model, volumes, poses, K, size), solid))
    return tuple(torch.cat(pieces).cpu() for pieces in zip(*parts))

def depth_picture(depth, alpha):
    """(H,W) each -> (H,W,3): near is light, far is dark; what is mostly transparent is white."""
    # Each picture spreads its own depths over the greys, because on one scale for all they hardly differ
    seen = alpha > 0.5
    near, far = (depth[seen].min(), depth[seen].max()) if seen.any() else (0.0, 1.0)
    grey = torch.where(seen, 0.85 - 0.7 * (depth - near) / (far - near + 1e-6), 1.0)
    return grey[..., None].expand(-1, -1, 3)

@torch.no_grad()
def truth_and_ours(model, codes, photos, objects, view):
    """(3,B,H,W,3) uint8: photo, rendering and depth, of one view of these objects, whose codes are given"""
    columns = []
    # One object at a time: every photo has its own camera
    for o, code in zip(objects, codes):
        volume = model.volumes_of(code[None])
        K = photos.intrinsics[o]
        rgb, alpha, depth = render_view(model, volume, photos.pose[o, view], K, photos.size)
        columns.append(torch.stack([photos.rgb[o, view] / 255, rgb, depth_picture(depth, alpha)]))
    return to_bytes(torch.stack(columns, 1))

def psnr(picture, truth, mask=None):
    """Peak signal-to-noise ratio in dB, higher is better; over the pixels of a mask, if there is one."""
    # A mean error of 0 would be infinitely many dB: 1e-10 caps it at 100.  An empty mask gives NaN
    error = (picture - truth).square().mean(-1)
    error = error[mask] if mask is not None else error
    return -10 * math.log10(max(error.mean().item(), 1e-10)) if len(error) else math.nan

@torch.no_grad()
def score_views(model, codes, photos, objects, views):
    """These views of these objects, whose codes are given -> a dict per view: PSNR of ours and of a white
    picture, over the full picture and over the object (_fg); and our opacity far from it (haze)."""
    rows = []
    for o, code in zip(objects, codes):
        volume = model.volumes_of(code[None])
        for v in views:
            rgb, alpha, _ = render_view(model, volume, photos.pose[o, v], photos.intrinsics[o], photos.size)
            # A mask says how much of a pixel the object covers, 0 to 255.  More than half counts as object
            truth, mask = photos.rgb[o, v].float() / 255, photos.mask[o, v] > 127
            # A white picture scores well too, because most of a photo is white: so it stands beside ours
            white = torch.ones_like(rgb)
            # Haze is opacity where nothing is.  A margin of 2 pixels is left out: edges are never exact
            beyond = F.max_pool2d((photos.mask[o, v] > 0).float()[None, None], 5, 1, 2)[0, 0] == 0
            rows.append({"object": o, "ours": psnr(rgb, truth), "ours_fg": psnr(rgb, truth, mask),
                         "white": psnr(white, truth), "white_fg": psnr(white, truth, mask),
                         "haze": alpha[beyond].mean().item()})
        # The photos may be a mapped file.  What was read of it would stay in memory for all objects
        photos.forget()
    return rows

def mean_of(rows, key):
    return torch.tensor([row[key] for row in rows], dtype=torch.float64).nanmean().item()

def table(rows, kinds):
    """Stage 1's closing table: means by kind of object, ours beside a white picture."""
    lines = [f"{'PSNR, dB: full / foreground':<28} {'ours':>13}   {'all white':>13}   "
             f"{'opacity beyond 2 px':>19}"]
    # One line for each kind, then one for all: a mean over all would hide that a rare kind failed
    for kind in [*sorted({kinds[row["object"]] for row in rows}), "all"]:
        chosen = [row for row in rows if kind in (kinds[row["object"]], "all")]
        m = {key: mean_of(chosen, key) for key in chosen[0]}
        count = len({row["object"] for row in chosen})
        pairs = "   ".join(f"{m[key]:5.2f} / {m[key + '_fg']:5.2f}" for key in ("ours", "white"))
        lines.append(f"{kind:<16} {count:>3} objects   {pairs}   {m['haze']:>19.4f}")
    return "\n".join(lines)

@torch.no_grad()
def draw_pipeline(model, photos, path, o=0):
    """A figure of the pipeline, from the model's own tensors: code, latent, volume, a held-out view, its
    depth, the photo"""
    # The last view is a held-out one: the model has never seen the photo that stands beside its rendering
    code = model.codes[o]
    latent, volume = model.to_latent(code[None]), model.volumes_of(code[None])
    opacity = voxel_opacity(volume, model.field)[0]
    rgb, alpha, depth = render_view(model, volume, photos.pose[o, -1], photos.intrinsics[o], photos.size)

    # A code has no shape of its own.  It is drawn as a square, filled up with zeros
    side = math.ceil(len(code) ** 0.5)
    square = F.pad(code, (0, side * side - len(code))).view(side, side)

    # Rows of a picture run downwards, Z (and Y, from above) upwards: so slices of volumes are flipped
    panels = [("code e", square, "RdBu"),
              ("latent G1(e)\none channel, from above", latent[0, 0, latent.shape[2] // 2].flip(0), "RdBu"),
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
    # A field may depend on the position.  It wants x, y, z, and the volume's dimensions are z, y, x
    z, y, x = ((torch.arange(n, device=volume.device) + 0.5) / n - 0.5 for n in (D, H, W))
    centres = torch.stack(torch.meshgrid(z, y, x, indexing="ij")[::-1], -1).expand(B, D, H, W, 3)
    return field(volume.permute(0, 2, 3, 4, 1), centres)[0]

def voxel_opacity(volume, field=voxel_field):
    """(B,C,D,H,W) -> (B,D,H,W): the share of light that is lost on a straight way through one voxel"""
    return 1 - torch.exp(-density(volume, field) / volume.shape[-1])

def bounding_box(solid):
    """(B,N,N,N) bool -> (B,3): its sides along x, y and z, in the world"""
    N = solid.shape[-1]
    shadows = torch.stack([solid.amax(dim=axes) for axes in ((1, 2), (1, 3), (2, 3))], 1)   # (B,3,N)
    up = torch.arange(1, N + 1, device=solid.device)
    return ((shadows * up).amax(2) + (shadows * up.flip(0)).amax(2) - N).clamp(min=1) / N

@torch.no_grad()
def occupancy(volume, field=voxel_field):
    """(B,C,N,N,N) -> (B,N+1,N+1,N+1) bool: the cells between voxel centres where a sample can see anything.

    Cell (i,j,k) has voxels i-1 and i, j-1 and j, k-1 and k at its corners.  What a sample in it looks up
    lies between those eight voxels' channels, so it is dense only if one of them is."""
    # The padding stands for the missing voxels of the cells at the cube's faces
    return any_of_eight(F.pad(density(volume, field) > EMPTY, (1,) * 6))

def any_of_eight(mask):
    """(B,n,n,n) bool -> (B,n-1,n-1,n-1): whether any is True of the eight that meet at each inner corner"""
    # An OR of neighbours along one dimension after the other makes an OR of two, of four, of eight.  On a CPU
    # this is far faster than max_pool3d
    for dim in (1, 2, 3):
        n = mask.shape[dim] - 1
        mask = mask.narrow(dim, 0, n) | mask.narrow(dim, 1, n)
    return mask

def blocks_around(occupied):
    """(B,n,n,n) bool -> (B,m,m,m), m = n/2 rounded up: whether any cell is True in a block of 2^3 cells or in
    its neighbours"""
    # An even number of cells is needed, so one or two empty ones are added
    blocks = any_of_eight(F.pad(occupied, (0, 1 + occupied.shape[-1] % 2) * 3))[:, ::2, ::2, ::2]
    # An OR of 2^3, done twice, is an OR of 3^3: the block and its 26 neighbours
    return any_of_eight(any_of_eight(F.pad(blocks, (1,) * 6)))

def render_sparse(volume, origins, directions, bins, samples, place, field, occupied):
    """render(), with the samples in unoccupied cells left out.  `bins` are near, step and length of each ray,
    `place` (B,R,S) each sample's place in its bin."""
    # The rays of all objects become one list, and `owner` says in whose volume a ray is.  Rays are counted in
    # cells: the cell of a point is then its coordinates, rounded down
    (B, R), N, device = bins[0].shape, volume.shape[-1], volume.device
    near, step, length = (some.view(-1) for some in bins)                                   # (BR,)
    owner = torch.arange(B, device=device, dtype=torch.int32).repeat_interleave(R)
    o = (origins + 0.5).mul(N).add(0.5).view(-1, 3).T.contiguous()                          # (3,BR) in cells
    d = (directions * N).view(-1, 3).T.contiguous()

    # First whole runs of bins are dropped, by a coarse grid of blocks of 2^3 cells.  No bin is longer than
    # the cube's diagonal / samples.  A run is at most two blocks (4 cells) long, so it ends at most one block
    # from its middle.  A block counts its neighbours, so the middle alone decides for the run.  (With so few
    # samples that a single bin is longer, all bins are kept)
    longest = 4 / N * samples / math.sqrt(3)
    run = max(n for n in range(1, samples + 1) if samples % n == 0 and n <= max(1, longest))
    middle = (torch.arange(samples // run, device=device) + 0.5) * run                      # (G,)
    middle = near[:, None] + step[:, None] * middle                                         # (BR,G)
    kept = is_in(blocks_around(occupied), owner[:, None], o[..., None] / 2, d[..., None] / 2, middle)
    kept |= longest < 1
    ray, g = kept.nonzero().unbind(1)                                                       # (K,) runs

    # Then single bins of these runs are dropped, by the cells themselves
    number = g * run + torch.arange(run, device=device)[:, None]                            # (run,K)
    place = 0.5 if place is None else place.view(-1, samples)[ray, number]
    t = near[ray] + (number + place) * step[ray]
    kept = is_in(occupied, owner[ray], o[:, ray], d[:, ray], t)

    # The samples that are left become one list: ray after ray, front to back.  Only they are looked up, which
    # is where the time is saved
    k, bin = kept.T.nonzero().unbind(1)                                                     # (P,) samples
    ray, t = ray[k], t[bin, k]
    # From here back from cells to the world: the inverse of `o` above
    point = torch.addcmul(o[:, ray], t, d[:, ray]).T.sub(0.5).div(N).sub(0.5)               # (P,3) in world
    sigma, rgb = field(lookup_sparse(volume, point, owner[ray]), point)

    # As in composite(), but the cumulative sum runs over the whole list: what a ray has passed is the sum so
    # far less the sum where the ray began.  The sums are large, so float32 would lose their small differences
    tau = sigma * length[ray]                                                               # (P,)
    count = ray.bincount(minlength=B * R)                                                   # (BR,)
    total = tau.double().cumsum(0)                                                          # (P,)
    began = F.pad(total, (1, 0))[(count.cumsum(0) - count)[ray]]                            # (P,)
    transmittance = torch.exp(-((total - tau) - began).float())
    weight = transmittance * -torch.expm1(-tau)

    # Colour, opacity and depth are summed over each ray at once.  A ray without samples keeps its zeros
    seen = weight[:, None] * torch.cat([rgb, torch.ones_like(t)[:, None], t[:, None]], 1)   # (P,5)
    sums = seen.new_zeros(B * R, 5).index_add(0, ray, seen).view(B, R, 5)
    return on_background(sums[..., :3], sums[..., 3], sums[..., 4], 1.0)

def is_in(mask, owner, origin, direction, t):
    """mask (B,n,n,n) bool; owner; rays (3,...) in units of its cells; t (...) -> bool: the mask at t"""
    # The place in the flattened mask, dimension by dimension.  `owner` is int32, so all of it is: half the
    # memory of the usual int64
    n = mask.shape[-1]
    index = owner
    for axis in (2, 1, 0):                                                                  # z, y, x
        # Rays that miss the cube have points outside it.  Their bins have length 0, so any cell will do
        at = torch.addcmul(origin[axis], t, direction[axis])
        index = index * n + at.int().clamp_(0, n - 1)
    return mask.view(-1)[index]

def lookup_sparse(volume, position, owner):
    """position (P,3), each in the volume of object `owner` (P,), ascending -> (P,C)."""
    # grid_sample wants equally many points for each volume, so the lists are padded to the longest.  On a CPU
    # it runs in parallel over volumes only: a single volume is looked up as two, each with half of the points
    counts = owner.bincount(minlength=len(volume)).tolist()
    if len(volume) == 1:
        volume, counts = volume.expand(2, *volume.shape[1:]), [len(owner) // 2, len(owner) - len(owner) // 2]
    padded = nn.utils.rnn.pad_sequence(position.split(counts), batch_first=True)            # (B,most,3)
    found = lookup(volume, padded)                                                          # (B,most,C)
    # Each channel lies in one piece in memory, because the field reads channel after channel
    return torch.cat([one[:n].T for one, n in zip(found, counts)], 1).T

# ------------------------------------------------------------------------------------------ an example volume

def headphones(resolution, sharpness):
    """Two cups with cushions and a band, as an analytic volume (1,4,N,N,N)"""
    # A solid is a signed distance to its surface, negative inside.  The larger of two distances is the
    # solids' intersection, and the smaller one is their union.  |x| makes two cups of one
    centre = (torch.arange(resolution) + 0.5) / resolution - 0.5
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    side = x.abs()
    radius = torch.hypot(y, z + 0.1)
    cup = torch.maximum(radius - 0.19, (side - 0.33).abs() - 0.05)
    cushion = torch.hypot(radius - 0.14, side - 0.26) - 0.05

    # The band: the upper half of a ring (where -z is negative), and a stem from it down to each cup
    arch = torch.maximum(torch.hypot(torch.hypot(x, z) - 0.33, y) - 0.05, -z)
    stem = torch.maximum(torch.hypot(side - 0.33, y) - 0.05, (z + 0.05).abs() - 0.06)
    parts = torch.stack([cup, cushion, torch.minimum(arch, stem)])                # (3,N,N,N) signed distances

    # A voxel has the colour of the nearest part.  Density grows with the depth below the surface, so that the
    # interpolated surface is where it should be.  Colours are logits, because the field applies a sigmoid
    colours = torch.tensor([[0.10, 0.15, 0.35], [0.45, 0.28, 0.18], [0.75, 0.75, 0.78]])
    nearest, which = parts.min(0)
    rgb = torch.logit(colours)[which].permute(3, 0, 1, 2)
    return torch.cat([-sharpness * nearest[None], rgb])[None]

def main(argv=None):
    config = parse_config(Config, argv=argv)
    device = pick_device(config.device)

    # The volume is known exactly and nothing is learned, so a wrong picture can only be the renderer's fault
    volume = headphones(config.resolution, config.sharpness).to(device)
    pose = camera_to_world_at(config.azimuth, config.elevation, DISTANCE).float().to(device)
    intrinsics = intrinsics_at(config.size).float().to(device)
    origins, directions = camera_rays(pose[None], intrinsics[None], config.size)
    occupied = occupancy(volume)

    # The same rays with and without the empty space.  The least of four times counts, because other work on
    # the machine only makes it longer.  A GPU works in the background: .item() waits until it is done
    for name, cells in (("dense", None), ("empty space skipped", occupied)):
        times = []
        for _ in range(4):
            began = time.perf_counter()
            rgb, alpha, depth = render(volume, origins, directions, config.samples, occupied=cells)
            rgb.sum().item()
            times.append(time.perf_counter() - began)
        speed = directions.shape[1] / min(times) / 1e6
        print(f"{name:<20} {speed:6.2f} million rays per second, {config.samples} samples each")

    # Pictures of the last rendering, the one that skips empty space: a hole that it leaves would show here
    rgb, alpha, depth = (some.view(config.size, config.size, -1) for some in (rgb, alpha, depth))
    pictures = {"colour": rgb, "opacity": alpha.expand(-1, -1, 3),
                "depth": depth_picture(depth[..., 0], alpha[..., 0])}
    for name, pixels in pictures.items():
        save_picture(f"{config.out}/{name}.png", to_bytes(pixels).cpu())
    print(f"wrote {', '.join(f'{config.out}/{name}.png' for name in pictures)}")


if __name__ == "__main__":
    command(main)

"""
Stage 0 of 3: meshes in, posed photos out.

in   nothing (procedural earphones, earphones.py), or --shapenet DIR, a copy of ShapeNetCore v1 or v2
out  data/earphones_train/<object>/{rgb,mask}/000000.png, pose/000000.txt, intrinsics.txt
     and _val, _test, and a picture
run  python render_shapenet.py               two CPU cores: 36 s, 152 models and 5,776 photos
     python render_shapenet.py --shapenet ~/ShapeNetCore.v2 --synset 03001627 --holdout 100
read Config, camera_to_world_at, rasterize, photograph, load_photos, main.

A photo is what a camera sees of the mesh under ambient light alone: the colour of the nearest
surface.  In OpenCV's axes

    camera_to_world = [ right  down  forward  position ]        x_camera = R^T (x_world - position)
    pixel           = (f X/Z + cx,  f Y/Z + cy)                 and depth is Z, not the distance

The rasteriser below turns each triangle into *spans*: the runs of pixels that one row of the picture has in
common with it.  All rows of all faces are cut at once, then all pixels of all spans are written at once, so
that its cost follows the faces and the pixels that they cover, never their product.
"""
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import earphones
from common import (Run, UserError, atomic_file, atomic_folder, decode, grid, parse_config, pick_device,
                    save_picture)
from meshes import load_obj


@dataclass
class Config:
    out: str = "data"              # folder for the photos
    shapenet: str = ""             # a ShapeNetCore's root, release or synset folder; empty: our own earphones
    synset: str = "03261776"       # ShapeNet's category: 03261776 earphones, 03001627 chairs, 02958343 cars
    holdout: int = 0               # ShapeNet models that go to _test, which no training sees
    objects: int = 72              # procedural earphones to train on
    val_objects: int = 8           # procedural earphones to choose settings by
    test_objects: int = 72         # procedural earphones to report on; half: combinations not in training
    views: int = 30                # photos of an object to train on
    holdout_views: int = 8         # photos of it from other cameras, the last in the folder, to measure by
    size: int = 128                # pixels along a side
    supersample: int = 2           # samples a pixel along a side, averaged: jagged targets cap later numbers
    distance: float = 1.3          # camera to the object's centre; the object's diagonal is 1
    focal: float = 131.25    # in pixels at 128 px, as in the SRN data: the 0.5-sphere spans 85 % of the frame
    max_elevation: float = 80.0    # degrees above and below the horizon
    thin: bool = False             # procedural earphones get cables, thinner than a voxel: hard
    transforms: bool = False       # also write transforms.json, which nerfstudio and instant-ngp read
    renderer: str = "torch"        # torch | pytorch3d: ours, or the paper's where it is installed
    seed: int = 0                  # of the cameras and of the earphones
    workers: int = 0               # processes; 0: one a core, or one where there is a GPU
    device: str = "auto"           # auto, cpu or cuda
    fresh: bool = False            # throw away the photos in --out and start over


# Photos made with other values of these do not belong in the same folder
RECIPE = ("shapenet", "holdout", "views", "holdout_views", "size", "supersample", "distance", "focal",
          "max_elevation", "thin", "renderer", "seed")
CATEGORIES = {"03261776": "earphones", "03001627": "chairs", "02958343": "cars"}       # their folders' names
TIE = 1e-4                         # depths closer than this are the same depth
EMPTY = torch.iinfo(torch.int64).max      # what stands in a z-buffer where no face is
NEAR = 1e-3             # faces that reach behind this depth are dropped: our cameras stand outside the object
SPAN_PIXELS = 1 << 22              # pixels written at once, which bounds the memory: about 200 MB


# ---------------------------------------------------------------------------------------------------- cameras

def to_world(mesh):
    """ShapeNet's Y-up mesh in the project's world, and the 4x4 that took it there: (x, y, z) -> (x, -z, y),
    then the centre of the bounding box of the faces to the origin and its diagonal to 1."""
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    corners = mesh.vertices[mesh.faces.unique()] @ turn.T
    low, high = corners.amin(0), corners.amax(0)
    diagonal = (high - low).norm()
    if not 1e-12 < diagonal < 1e30:
        raise UserError(f"the mesh has no extent (its diagonal is {diagonal:.3g})")
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3] = turn / diagonal
    transform[:3, 3] = -(low + high) / 2 / diagonal
    return replace(mesh, vertices=mesh.vertices @ transform[:3, :3].T + transform[:3, 3]), transform


def camera_to_world_at(azimuth, elevation, distance):
    """Degrees -> (4,4) float64: a camera on a sphere that looks at the origin with the world's Z
    upwards in its picture."""
    a, e = math.radians(azimuth), math.radians(elevation)
    outward = [math.cos(e) * math.cos(a), math.cos(e) * math.sin(a), math.sin(e)]
    position = distance * torch.tensor(outward, dtype=torch.float64)
    forward = -position / position.norm()
    right = torch.tensor([-math.sin(a), math.cos(a), 0.0], dtype=torch.float64)   # by azimuth alone: no poles
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :] = torch.stack([right, torch.linalg.cross(forward, right), forward, position], -1)
    return pose


def random_cameras(generator, config):
    """Endless cameras, uniform over the sphere between the elevations."""
    limit = math.sin(math.radians(config.max_elevation))
    while True:
        azimuth = generator.uniform(0, 360)
        elevation = math.degrees(math.asin(generator.uniform(-limit, limit)))
        yield camera_to_world_at(azimuth, elevation, config.distance)


def opencv_from_pytorch3d(R, T):
    """PyTorch3D's camera (...,3,3), (...,3) -> camera_to_world (...,4,4) in OpenCV's axes.

    PyTorch3D multiplies rows, X_camera = X_world R + T, and its camera looks along +Z with +X left and +Y up.
    OpenCV's has +X right and +Y down: its x and y are the negatives of PyTorch3D's.  With F =
    diag(-1, -1, 1), and in columns,

        x_cv = F (R^T x + T)          so   R_cv = F R^T = (R F)^T,   t_cv = F T:

    negate the first two *columns* of R, then transpose; negate the first two entries of T.  Inverted, for
    camera to world: x = R_cv^T (x_cv - t_cv), that is the rotation R F and the position -R F F T = -R T."""
    R = torch.as_tensor(R)
    T = torch.as_tensor(T, dtype=R.dtype, device=R.device)
    pose = torch.zeros(*R.shape[:-2], 4, 4, dtype=R.dtype, device=R.device)
    pose[..., :3, :3] = R * torch.tensor([-1.0, -1.0, 1.0], dtype=R.dtype, device=R.device)
    pose[..., :3, 3] = -(R @ T[..., None])[..., 0]
    pose[..., 3, 3] = 1
    return pose


def intrinsics_at(size, focal):
    """(3,3) float64: `focal` is in pixels at 128 px, the picture's centre is on the axis."""
    f = focal * size / 128
    return torch.tensor([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]], dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- rasteriser

def rasterize(mesh, camera_to_world, intrinsics, size, supersample=1, renderer="torch"):
    """mesh, (4,4), (3,3), pixels a side -> rgb (H,W,3) on white, coverage (H,W), depth
    (H,W; inf where nothing is).

    With supersample > 1 colour and coverage are box-filtered; depth is the nearest sample's, since a mean of
    two depths is a point where nothing is."""
    fine = size * supersample
    K = torch.as_tensor(intrinsics, dtype=torch.float64, device=mesh.vertices.device).clone()
    K[:2] *= supersample
    pose = torch.as_tensor(camera_to_world, dtype=torch.float64, device=mesh.vertices.device)
    camera = (mesh.vertices - pose[:3, 3]) @ pose[:3, :3]                               # (N,3)
    visible = visible_faces if renderer == "torch" else visible_faces_pytorch3d
    pixel, face, bary, z = visible(mesh, camera, K, fine)                               # P visible pixels
    colour = surface_colour(mesh, face, bary)                                           # (P,3)

    # Each sample adds its share to the pixel that it lies in; white is what is left
    share = 1 / supersample ** 2
    pixel = pixel // fine // supersample * size + pixel % fine // supersample
    shares = torch.full_like(z, share, dtype=torch.float32)
    coverage = torch.zeros(size * size, device=z.device).index_add_(0, pixel, shares)
    rgb = (1 - coverage)[:, None].repeat(1, 3).index_add_(0, pixel, colour * share)
    depth = torch.full((size * size,), math.inf, device=z.device).scatter_reduce_(0, pixel, z.float(), "amin")
    return rgb.view(size, size, 3), coverage.view(size, size), depth.view(size, size)


# Over the first dimension, of three or four rows, where amin and amax on a CPU are ten times slower
smallest = lambda rows: functools.reduce(torch.minimum, rows)
largest = lambda rows: functools.reduce(torch.maximum, rows)


def visible_faces(mesh, camera, K, size):
    """camera (N,3): vertices in the camera's axes -> the pixels that see a face, flat (P,), their faces (P,),
    the perspective-correct weights of its corners (3,P) and the depths (P,).

    In the picture a triangle's 1/Z is an affine function of x and y, which is why 1/Z is what gets
    interpolated.  The arithmetic is float64: ties in depth must not be decided by rounding."""
    kept, x, y, iz, area, top, rows, columns = faces_in_picture(mesh, camera, K, size)
    # A face that is counter-clockwise from its front runs clockwise in a picture whose y points down: its
    # area is negative
    rank = torch.where(area < 0, 0, 2) + (~mesh.textured[mesh.material[kept]]).long()   # (F,) 0: the best
    pixel, f = resolve(z_buffers(x, y, iz, area, rank, top, rows, columns, size))

    # A corner's weight is the area that the pixel spans with the opposite edge, over the whole; then divided
    # by Z
    px, py, x, y = pixel % size + 0.5, pixel // size + 0.5, x.index_select(1, f), y.index_select(1, f)
    dx, dy = x - px, y - py
    weight = (dx.roll(-1, 0) * dy.roll(-2, 0) - dx.roll(-2, 0) * dy.roll(-1, 0)) / area[f]
    weight = weight.clamp(0, 1) * iz.index_select(1, f)
    inverse = weight.sum(0)
    return pixel, kept[f], weight / inverse, 1 / inverse


def centres(edge, size):
    """The first pixel, or pixel row, whose centre c + 0.5 is not before `edge`.

    A centre lies between two edges when centres(left) <= c < centres(right): the left edge is in and the
    right one out, so that two faces with a common edge share no pixel and leave none."""
    return (edge.nan_to_num(0, 0, 0) - 0.5).ceil().clamp(0, size).long()


def faces_in_picture(mesh, camera, K, size):
    """-> of the F faces that may cover a pixel: which they are (F,), their corners' x, y in the picture and
    1/Z (3,F), twice their signed area there, their first row, how many rows and columns they span (F,)"""
    z = camera[:, 2]
    screen = torch.stack([camera[:, 0] / z * K[0, 0] + K[0, 2], camera[:, 1] / z * K[1, 1] + K[1, 2], z], 1)
    x, y, z = screen.index_select(0, mesh.faces.T.reshape(-1)).T.reshape(3, 3, -1)      # (3,F) each
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])                # (F,)
    top, left = centres(smallest(y), size), centres(smallest(x), size)
    rows, columns = centres(largest(y), size) - top, centres(largest(x), size) - left
    kept = ((smallest(z) > NEAR) & (rows > 0) & (columns > 0) & (area.abs() > 1e-12)).nonzero()[:, 0]
    return kept, x[:, kept], y[:, kept], 1 / z[:, kept], area[kept], top[kept], rows[kept], columns[kept]


def z_buffers(x, y, iz, area, rank, top, rows, columns, size):
    """The faces_in_picture, and their rank (F,) -> (4,H*W) int64, one z-buffer a rank.

    An entry packs (depth, face) into 64 bits, so that one minimum finds the nearest face and, among equals,
    the first: the bits of positive floats are in the order of their values."""
    # 1/Z = c + gx x + gy y, and dx/dy along the edges 0-1, 1-2, 2-0
    gx = ((iz[1] - iz[0]) * (y[2] - y[0]) - (iz[2] - iz[0]) * (y[1] - y[0])) / area
    gy = ((iz[2] - iz[0]) * (x[1] - x[0]) - (iz[1] - iz[0]) * (x[2] - x[0])) / area
    slope = (x.roll(-1, 0) - x) / (y.roll(-1, 0) - y)
    plane = torch.stack([iz[0] - gx * x[0] - gy * y[0], gx, gy, smallest(iz), largest(iz)])
    table = torch.cat([x, y, slope, plane]).T.contiguous()                              # (F,14)

    buffer = torch.full((4 * size * size,), EMPTY, device=x.device)
    load = (rows * columns + 1).cumsum(0) // SPAN_PIXELS           # faces with the same are cut together
    counts = load.unique_consecutive(return_counts=True)[1].tolist()
    for chunk in torch.arange(len(rows), device=x.device).split(counts):
        f, row, first, length, begin, step = cut_spans(chunk, top[chunk], rows[chunk], table, size)     # (T,)
        before = length.cumsum(0) - length                                   # (T,) pixels in the spans before
        target = (rank[f] * size + row) * size + first - before
        whole = torch.stack([target, f], 1).repeat_interleave(length, 0)                # (P,2)
        real = torch.stack([begin - before * step, step], 1).repeat_interleave(length, 0)
        pixel = torch.arange(len(whole), device=x.device)
        depth = (1 / (real[:, 0] + pixel * real[:, 1])).float()
        entry = depth.view(torch.int32).long() << 32 | whole[:, 1]
        buffer.scatter_reduce_(0, whole[:, 0] + pixel, entry, "amin")
    return buffer.view(4, -1)


def cut_spans(faces, top, rows, table, size):
    """Faces, their first rows and numbers of rows -> of each span (T,) its face, its row, its first pixel,
    how many it has, 1/Z at the first and what each further one adds to it."""
    f = torch.repeat_interleave(faces, rows)                                            # (T,)
    row = torch.arange(len(f), device=f.device) - (rows.cumsum(0) - rows - top).repeat_interleave(rows)
    x0, x1, x2, y0, y1, y2, s0, s1, s2, c, gx, gy, least, most = table.index_select(0, f).T
    # The row's line crosses two of the three edges
    line = row + 0.5
    below0, below1, below2 = y0 <= line, y1 <= line, y2 <= line
    cut = torch.stack([x0 + (line - y0) * s0, x1 + (line - y1) * s1, x2 + (line - y2) * s2])       # (3,T)
    missed = torch.stack([below0 == below1, below1 == below2, below2 == below0])
    first = centres(smallest(cut.masked_fill(missed, 1e9)), size)
    length = (centres(largest(cut.masked_fill(missed, -1e9)), size) - first).clamp(min=0)
    # 1/Z at the span's ends, kept within the face's own (a sliver's slopes are huge), is linear between them
    begin = (c + gx * (first + 0.5) + gy * line).clamp(least, most)
    end = (c + gx * (first + length - 0.5) + gy * line).clamp(least, most)
    return f, row, first, length, begin, (end - begin) / (length - 1).clamp(min=1)


def resolve(buffer):
    """z-buffers (4,H*W) -> the pixels that see a face (P,) and which it is (P,): among those at the nearest
    depth, to TIE, front before back, textured before plain, then exact depth, then index."""
    pixel = (smallest(buffer) < EMPTY).nonzero()[:, 0]
    best = buffer[:, pixel]                                                             # (4,P)
    depth = (best >> 32).int().view(torch.float32).masked_fill(best == EMPTY, math.inf)
    tied, chosen = depth <= smallest(depth) + TIE, best[3]
    for k in (2, 1, 0):
        chosen = torch.where(tied[k], best[k], chosen)
    return pixel, chosen & 0xFFFFFFFF


def surface_colour(mesh, face, bary):
    """faces (P,), weights of their corners (3,P) -> (P,3) float32: the texture,
    bilinear, texel centres at +0.5.

    Coordinates outside [0, 1] repeat; the filter stops at the texture's edge, lest an atlas
    bleed from its far side."""
    uvs = mesh.uvs.index_select(0, face).permute(2, 1, 0)                               # (2,3,P)
    u, v = sum(uvs[0] * bary), sum(uvs[1] * bary)
    repeat = lambda t: torch.where((t - 0.5).abs() <= 0.5 + 1e-6, t, t - t.floor())
    material = mesh.material[face]
    begin, (height, width) = mesh.start[material], mesh.shape[material].unbind(1)
    x = repeat(u) * width - 0.5
    y = (1 - repeat(v)) * height - 0.5                                                  # OBJ's v runs upwards
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = (x - x0).float()[:, None], (y - y0).float()[:, None]
    inside = lambda i, n: torch.minimum(i.clamp(min=0), n - 1)
    index = lambda x, y: begin + inside(y, height) * width + inside(x, width)
    texel = lambda dx, dy: mesh.texels.index_select(0, index(x0 + dx, y0 + dy)).float()
    upper, lower = texel(0, 0).lerp(texel(1, 0), fx), texel(0, 1).lerp(texel(1, 1), fx)
    return upper.lerp(lower, fy) / 255


def visible_faces_pytorch3d(mesh, camera, K, size):
    """The same as visible_faces, by PyTorch3D, the paper's renderer.  What follows (colour,
    filter, files) is shared."""
    try:
        from pytorch3d.renderer import MeshRasterizer, PerspectiveCameras, RasterizationSettings
        from pytorch3d.structures import Meshes
    except ImportError as error:
        raise UserError(f"--renderer pytorch3d: PyTorch3D cannot be imported ({error}). "
                        "It has no wheel for today's Pythons: build it as its INSTALL.md says, "
                        "or leave the flag out, the default renderer needs nothing") from None
    # The vertices are in OpenCV's camera axes already: what is left of PyTorch3D's camera
    # is to turn x and y around
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], device=camera.device))[None]
    cameras = PerspectiveCameras(R=turn, T=torch.zeros(1, 3, device=camera.device),
                                 in_ndc=False, device=camera.device,
                                 focal_length=K.diagonal()[None, :2].float(),
                                 principal_point=K[None, :2, 2].float(),
                                 image_size=torch.tensor([[size, size]], device=camera.device))
    # bin_size 0: the binned rasteriser leaves holes where a bin overflows
    settings = RasterizationSettings(size, blur_radius=0.0, faces_per_pixel=1, bin_size=0,
                                     perspective_correct=True)
    seen = MeshRasterizer(cameras, settings)(Meshes([camera.float()], [mesh.faces]))
    face = seen.pix_to_face.view(-1)
    pixel = (face >= 0).nonzero()[:, 0]
    weight, z = seen.bary_coords.view(-1, 3)[pixel].T, seen.zbuf.view(-1)[pixel]
    return pixel, face[pixel], weight.double(), z.double()


# ----------------------------------------------------------------------------------------------------- photos

def photograph(mesh, folder, config, generator):
    """Write one object's photos, masks and cameras; views that see nothing of it (a sheet, edge on) are drawn
    again. NothingSeen if that does not help."""
    K = intrinsics_at(config.size, config.focal)
    write_intrinsics(folder, K, config.size)
    cameras, number, wanted = random_cameras(generator, config), 0, config.views + config.holdout_views
    for tries in range(10 * wanted):
        pose = next(cameras)
        rgb, coverage, _ = rasterize(mesh, pose, K, config.size, config.supersample, config.renderer)
        if not coverage.any():
            continue
        write_view(folder, number, rgb, coverage, pose)
        number += 1
        if number == wanted:
            break
    else:
        raise NothingSeen


class NothingSeen(Exception):
    """Cameras all around it, and not one of them sees the object."""


def write_intrinsics(folder, K, size):
    """The one file, and the three folders, of an object in the SRN layout"""
    for sub in ("rgb", "mask", "pose"):
        (folder / sub).mkdir()
    f, cx, cy = K[0, 0].item(), K[0, 2].item(), K[1, 2].item()
    (folder / "intrinsics.txt").write_text(f"{f} {cx} {cy} 0.\n0. 0. 0.\n1.\n{size} {size}\n")


def write_view(folder, number, rgb, coverage, pose):
    """rgb (H,W,3), coverage (H,W) in [0, 1]"""
    # White, 255, is the background's alone: other readers of this layout find their masks by it
    photo = torch.where(coverage[..., None] > 0, (rgb * 255).round().clamp(max=254), 255).byte()
    save_photo(folder / f"rgb/{number:06d}.png", photo)
    save_photo(folder / f"mask/{number:06d}.png", (coverage * 255).round().byte())
    (folder / f"pose/{number:06d}.txt").write_text(numbers(pose) + "\n")


def save_photo(path, pixels):
    Image.fromarray(pixels.cpu().numpy()).save(path, compress_level=2)


def numbers(matrix):
    return " ".join(repr(float(value)) for value in np.asarray(matrix).flatten())


def write_transforms(folder):
    """transforms.json, for nerfstudio, instant-ngp and torch-ngp: OpenGL's camera,
    +Y up and looking along -Z."""
    f, cx, cy = read_numbers(folder / "intrinsics.txt", [0])[:3]
    size = int(read_numbers(folder / "intrinsics.txt", [3])[0])
    frames = []
    for path in visible(folder / "pose"):
        pose = read_pose(path).astype(float) @ np.diag([1.0, -1, -1, 1])
        frames.append({"file_path": f"rgb/{path.stem}.png", "transform_matrix": pose.tolist()})
    with atomic_file(folder / "transforms.json") as temporary:
        temporary.write_text(json.dumps({
            "fl_x": f, "fl_y": f, "cx": cx, "cy": cy, "w": size, "h": size,
            "camera_angle_x": 2 * math.atan(size / 2 / f),
            "aabb_scale": 1, "scale": 0.9, "offset": [0.5, 0.5, 0.5], "white_transparent": True,
            "frames": frames}, indent=1))


# ----------------------------------------------------------------------------------------------- photos, read

def load_photos(folder, size):
    """A folder in the SRN layout, ours or anybody's, at size x size pixels -> photos (B,V,H,W,3)
    uint8 on white, masks (B,V,H,W) uint8 or None, poses (B,V,4,4) float32 camera_to_world,
    intrinsics (B,3,3) float32, names.

    Photos are decoded by threads; what is wrong with the data is a UserError that names the file."""
    folder = Path(folder)
    if size < 1:
        raise UserError(f"photos at {size} pixels a side: at least 1 is wanted")
    if not folder.is_dir():
        raise UserError(f"{folder} is not there. For the procedural earphones, run: "
                        "python render_shapenet.py")
    if (folder / "rgb").is_dir():
        raise UserError(f"{folder} is a single object: give the folder that holds it, "
                        f"{folder.resolve().parent}")
    objects = [entry for entry in visible(folder) if (entry / "rgb").is_dir()]
    if not objects:
        raise UserError(f"{folder} holds no photos: <object>/rgb/*.png, <object>/pose/*.txt and "
                        "<object>/intrinsics.txt wanted")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loaded = list(pool.map(lambda entry: load_object(entry, size), objects))
    photos, masks, poses, intrinsics, sides = zip(*loaded)
    for entry, count, side in zip(objects, map(len, photos), sides):
        if (count, side) != (len(photos[0]), sides[0]):
            raise UserError(f"{entry} has {count} photos of {side} x {side} and {objects[0]} has "
                            f"{len(photos[0])} of {sides[0]} x {sides[0]}: "
                            "every object needs as many, and as large, as the others")
    masks = None if any(mask is None for mask in masks) else torch.from_numpy(np.stack(masks))
    return (torch.from_numpy(np.stack(photos)), masks, torch.from_numpy(np.stack(poses)),
            torch.from_numpy(np.stack(intrinsics)), [entry.name for entry in objects])


def visible(folder):
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def load_object(folder, size):
    """-> photos (V,H,W,3), masks (V,H,W) or None, poses (V,4,4), intrinsics (3,3), the photos' side
    as it stands in the files"""
    pictures = [path for path in visible(folder / "rgb") if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
    beside = visible(folder / "pose") if (folder / "pose").is_dir() else []
    cameras = [path for path in beside if path.suffix == ".txt"]
    if not pictures or [path.stem for path in pictures] != [path.stem for path in cameras]:
        raise UserError(f"{folder} has {len(pictures)} photos (rgb/) and {len(cameras)} cameras (pose/): "
                        "one of each, with the same names, is wanted")
    intrinsics = read_intrinsics(folder / "intrinsics.txt", size)
    poses = np.stack([read_pose(path) for path in cameras])
    photos, masks, sides = zip(*[read_photo(path, size) for path in pictures])
    for path, side in zip(pictures, sides):
        if side != sides[0]:
            raise UserError(f"{path} is {side} x {side} and others are {sides[0]} x {sides[0]}: "
                            "photos of one size are wanted")
    if (folder / "mask").is_dir():
        beside = [folder / "mask" / path.name for path in pictures]
        masks = [read_mask(path if path.exists() else path.with_suffix(".png"), size) for path in beside]
    # An alpha channel that is opaque everywhere, as in SRN's own photos, says nothing of where the object is
    has_masks = all(mask is not None for mask in masks) and any((mask < 255).any() for mask in masks)
    return np.stack(photos), np.stack(masks) if has_masks else None, poses, intrinsics, sides[0]


def read_numbers(path, lines=None):
    """The numbers of a small text file; `lines`: of these lines alone."""
    try:
        if not path.is_file() or path.stat().st_size > 100_000:
            raise UserError(f"{path} is not there" if not path.exists() else f"{path} is no small text file")
        text = path.read_text(errors="replace")
        words = " ".join(text.split("\n")[k] for k in lines).split() if lines else text.split()
        values = np.array([float(word) for word in words])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if not (np.abs(values) < 1e6).all():
        raise UserError(f"{path} holds a number that is not finite, or absurdly large")
    return values


def read_pose(path):
    """16 numbers, on one line or four: camera_to_world, checked to be a camera that stands
    outside the cube and sees it."""
    values = read_numbers(path)
    if len(values) != 16:
        raise UserError(f"{path} has {len(values)} numbers; a camera_to_world matrix has 16")
    pose = values.reshape(4, 4)
    rotation, position, forward = pose[:3, :3], pose[:3, 3], pose[:3, 2]
    orthonormal = np.abs(rotation @ rotation.T - np.eye(3)).max() <= 2e-3 and np.linalg.det(rotation) >= 0
    if not orthonormal or np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise UserError(f"{path} is no camera: a rotation (orthonormal, determinant +1), a position and "
                        "the row 0 0 0 1 are wanted")
    if np.abs(position).max() <= 0.5:
        raise UserError(f"{path}: the camera stands at {position.round(3).tolist()}, "
                        "inside the cube [-0.5, 0.5]^3 of the object")
    if forward @ position >= np.abs(forward).sum() / 2:               # every corner of the cube is behind it
        raise UserError(f"{path}: the camera looks away from the object: is this camera_to_world, "
                        "+Z forward? An OpenGL camera needs its second and third columns negated")
    return pose.astype(np.float32)


def read_intrinsics(path, size):
    """"f cx cy 0." and, on the fourth line, "H W": to use photos at another size
    f, cx and cy are scaled by new/old."""
    camera, extent = read_numbers(path, [0]), read_numbers(path, [3])
    square = len(extent) == 2 and extent[0] == extent[1]
    if len(camera) not in (3, 4) or not square or not (0 < camera[:3]).all() or (camera[1:3] >= extent).any():
        raise UserError(f"{path}: 'f cx cy 0.' on line 1 and 'H W', with H = W, on line 4 are wanted")
    f, cx, cy = camera[:3] * size / extent[0]
    return np.array([[f, 0, cx], [0, f, cy], [0, 0, 1]], np.float32)


def open_picture(path, mode):
    """-> a square PIL image in `mode`, or in RGBA where it has transparency."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not there")
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            square = image.width == image.height <= 8192                # looked at before anything is decoded
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            picture = decode(image, "RGBA" if transparent else mode) if square else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None
    if not square:
        raise UserError(f"{path} is {image.width} x {image.height}: "
                        "square photos of at most 8192 pixels a side are wanted")
    return picture


def read_photo(path, size):
    """-> (H,W,3) on white, the alpha channel (H,W) where there is one, and the side in pixels
    as it stands in the file"""
    image, alpha = open_picture(path, "RGB"), None
    if image.mode == "RGBA":
        alpha = np.array(resize(image.getchannel("A"), size))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.array(resize(image, size)), alpha, image.width


def read_mask(path, size):
    return np.array(resize(open_picture(path, "L").convert("L"), size))


def resize(image, size):
    """A smaller photo is the mean over boxes of a larger one: nearest-neighbour would put
    jagged edges into the data."""
    return image if image.width == size else image.resize((size, size), Image.Resampling.BOX)


# ------------------------------------------------------------------------------------------------------- jobs

def procedural_jobs(config):
    """-> [(split, name, path of the .obj)]"""
    jobs, folder = [], Path(config.out, "procedural/03261776")
    counts = {"train": config.objects, "val": config.val_objects, "test": config.test_objects}
    for split, count in counts.items():
        for index in range(count):
            name = earphones.name(split, index)
            jobs.append((split, name, folder / name / "models/model_normalized.obj"))
    return jobs


def shapenet_jobs(config):
    """-> the same for a copy of ShapeNetCore, v1 or v2, and the synset: DIR may be the root, a release
    or the synset's folder."""
    root = Path(config.shapenet).expanduser()
    if not root.is_dir():
        raise UserError(f"--shapenet {root}: no such folder")
    names = ("models/model_normalized.obj", "model.obj", "models/model.obj")
    releases = sorted(root.glob(f"*/{config.synset}"), reverse=True)                    # v2 before v1
    for folder in (root, root / config.synset, *releases):
        models = [path for path in visible(folder) if path.is_dir()] if folder.is_dir() else []
        paths = [next((model / name for name in names if (model / name).is_file()), None) for model in models]
        if any(paths):
            break
    else:
        raise UserError(f"{root} holds no models of synset {config.synset}: "
                        f"{config.synset}/<model>/models/model_normalized.obj (v2) or <model>/model.obj (v1) "
                        "is looked for there, in ShapeNetCore.v*/ below it, and in it")
    print(f"ShapeNet models of {folder}")
    synset = folder.resolve().name if re.fullmatch(r"\d{8}", folder.resolve().name) else config.synset
    # Which ones are held out follows from the names alone, so that another machine holds out the same
    found = sorted((model.name, path) for model, path in zip(models, paths) if path)
    order = sorted(found, key=lambda model: zlib.crc32(os.fsencode(model[0])))
    if config.holdout >= len(found):
        raise UserError(f"--holdout {config.holdout}: there are {len(found)} models, "
                        "of which some must be left to train on")
    held_out = {name for name, _ in order[:config.holdout]}
    return [("test" if name in held_out else "train", name, path) for name, path in found], synset


def render_object(job, folder, config, device):
    """-> remarks about the model, and why there are no photos of it, or None: a broken model
    must not stop the others."""
    split, name, path = job
    model = path.parent.parent
    if not config.shapenet:
        factors = earphones.draw_factors(split, int(name.split("_")[-1]), config.seed) | {"thin": config.thin}
        file = model / "factors.json"
        if not file.is_file() or file.read_text(errors="replace") != json.dumps(factors, indent=1) + "\n":
            with atomic_folder(model) as temporary:
                earphones.write_model(temporary, factors, config.thin)
    try:
        mesh, transform = to_world(load_obj(path))
    except UserError as error:
        return [], str(error) if str(path) in str(error) else f"{path}: {error}"
    generator = np.random.default_rng([config.seed, zlib.crc32(os.fsencode(name))])    # the same in any order
    try:
        with atomic_folder(folder) as temporary:
            photograph(mesh.to(device), temporary, config, generator)
            (temporary / "mesh_to_world.txt").write_text(numbers(transform) + "\n")
            if (model / "factors.json").is_file():
                shutil.copy(model / "factors.json", temporary / "factors.json")
    except NothingSeen:
        return mesh.notes, f"{path}: no camera sees it"
    return mesh.notes, None


def worker_setup():
    """In each worker process: one picture is too small to share among threads; signals are the parent's to
    handle; and if the parent is killed outright, so that it cannot say anything, the worker ends too."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def render_all(todo, config, device):
    """Yields (name, remarks, failure) as objects are done, by one process a core."""
    workers = config.workers or (os.cpu_count() if device.type == "cpu" else 1)
    if min(workers, len(todo)) <= 1:
        yield from ((job[1], *render_object(job, folder, config, device)) for job, folder in todo)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), worker_setup)
    try:
        work = {pool.submit(render_object, job, folder, config, device): job[1] for job, folder in todo}
        yield from ((work[future], *future.result()) for future in as_completed(work))
    except BrokenProcessPool:
        raise UserError("a worker process died, for want of memory perhaps: try --workers 1; "
                        "the same command goes on from here") from None
    finally:
        pool.shutdown(cancel_futures=True)           # what has begun is finished, which takes a second


def contact_sheet(folder, path, most=72):
    """Of each object, the photo whose camera stands nearest to the front, to one side and
    above; the margins cut off."""
    photos, _, poses, _, _ = load_photos(folder, 128)
    nearest = (poses[:, :, :3, 3] @ torch.tensor([0.55, -0.75, 0.4])).argmax(1)
    save_picture(path, grid(photos[torch.arange(len(photos)), nearest][:most, 12:-12, 12:-12], columns=12))


def check(config):
    """Values that would fail only later, or not at all."""
    counts = (config.objects, config.views, config.size, config.supersample)
    others = (config.val_objects, config.test_objects, config.holdout, config.holdout_views, config.seed,
              config.workers)
    rules = (
        (min(counts) >= 1, "--objects, --views, --size and --supersample: at least 1"),
        (min(others) >= 0,
         "--val_objects, --test_objects, --holdout, --holdout_views, --seed and --workers: not negative"),
        (0.87 <= config.distance < 100, "--distance: from 0.87, outside the object's cube, to 100"),
        (0 < config.focal < 1e5, "--focal: more than 0, less than 1e5"),
        (0 < config.max_elevation < 90, "--max_elevation: between 0 and 90"),
        (re.fullmatch(r"\d+", config.synset), "--synset: digits alone, as 03261776"),
        (config.shapenet or not config.holdout, "--holdout: of ShapeNet's models, with --shapenet"))
    for good, what in rules:
        if not good:
            raise UserError(f"{what}  (--help lists the flags)")


def main(argv=None):
    config = parse_config(Config, argv=argv)
    check(config)
    device = pick_device(config.device)
    jobs, synset = shapenet_jobs(config) if config.shapenet else (procedural_jobs(config), "03261776")
    category = CATEGORIES.get(synset, synset)
    splits = {split: Path(config.out, f"{category}_{split}") for split in ("train", "val", "test")}
    folders = [splits[split] / name for split, name, _ in jobs]
    recipe = Path(config.out, f"{category}.json")
    if any(path.exists() for path in splits.values()) and not recipe.exists():
        raise UserError(f"{config.out} already holds {category} photos that this program did not write: "
                        "use another --out")
    stale = [*splits.values(), recipe, *([] if config.shapenet else [Path(config.out, "procedural")])]
    # Where a copy of ShapeNet lies may change; that it is one may not
    source = "ShapeNet" if config.shapenet else ""
    run = Run(config.out, replace(config, shapenet=source), RECIPE, recipe.name,
              stale if config.fresh else ())

    todo = [(job, folder) for job, folder in zip(jobs, folders) if not folder.is_dir()]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} objects are in {config.out} already: "
              "going on with the rest")
    skipped, done = [], 0
    with run:
        for name, remarks, failure in render_all(todo, config, device):
            skipped += [failure] if failure else []
            for text in remarks + ([f"skipped: {failure}"] if failure else []):
                run.say(f"{name}: {text}")
            done += 1
            run.progress("objects", done, len(todo))
            if run.stopping:
                raise UserError(f"stopped by {run.stopping}, {done} of {len(todo)} objects done: "
                                "the same command goes on from there")
    for folder in folders if config.transforms else []:
        if folder.is_dir():
            write_transforms(folder)
    why = "".join(f"; {failure}" for failure in skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
    print(f"found {len(jobs)} models: {len(jobs) - len(todo)} were rendered already, "
          f"{len(todo) - len(skipped)} now, {len(skipped)} skipped{why}")
    if not splits["train"].is_dir():
        raise UserError(f"no photos were made: see above why each of the {len(jobs)} models was skipped")
    picture = splits["train"].with_suffix(".png")
    contact_sheet(splits["train"], picture)
    print(f"photos in {splits['train']}; look at {picture}")


if __name__ == "__main__":
    main()

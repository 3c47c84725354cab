"""
Your own photos in: a scene of nerfstudio, instant-ngp or COLMAP becomes an object in our layout (photos.py).

    SRC/transforms.json, or          -->   DST/<scene>/{rgb,mask}/000000.png, pose/000000.txt, intrinsics.txt
    SRC/{,sparse/0/}cameras.bin ...        DST/<scene>.png      the cameras around the cube, to check by eye

One scene shows one object.  SRC is a scene, or a folder of scenes.  A photo has an alpha channel, which says
where the object is, or a white background.  Four steps:

    up       the axis to which all cameras' right-hand sides are perpendicular: people hold cameras level
    where    the visual hull: the points that nearly all photos show on the object; its box gets diagonal 1
    aim      each camera turns on the spot until it looks at the middle, and all get one focal length, so that
             the object fills the photo.  A turn on the spot changes no line of sight.  So the new photo's
             pixels are found in the old photo, where the same ray meets it: no depth is needed
    check    the photos pass the reader's own checks before they are written

run  python -m shapes.photos convert SRC DST
     python -m shapes.photos convert SRC DST --size 64 --views 40
read project, find_up, find_object, aim, resample, convert; then the readers of the two formats.
"""
import json
import math
import os
import shutil
import struct
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

from common import UserError, command, intrinsics_at, parse_config, plain, save_figure
from shapes.photos import (WHITE, atomic_folder, check_border, check_rotation, check_views, numbers, on_white,
                           open_picture, visible, write_intrinsics, write_view)


@dataclass
class Config:
    src: str = ""                  # a scene, or a folder of scenes
    dst: str = ""                  # folder for the objects; those that it has already are left as they are
    size: int = 128                # pixels along a side of the photos that are written (at least 8)
    views: int = 0                 # photos of each object, chosen at random; 0: all


FILL = 0.85                        # the share of a photo's width that the object may take
CELLS = 64                         # of the grid that finds the object, along a side
MOST, SMALL = 64, 256              # photos that find it; pixels along the longer side of their silhouettes
MISSES = 0.05                      # the share of the photos that may contradict a point of the hull


@dataclass
class View:
    """A photo of the scene, and its camera"""
    path: Path
    pose: torch.Tensor             # (4,4) float64 camera_to_world, OpenCV's axes
    lens: tuple                    # fx fy cx cy, in pixels; k1 k2 p1 p2: how it bends straight lines
    width: int                     # of the photo that the lens was measured on
    height: int


# --------------------------------------------------------------------------------------------------- geometry

def project(points, view):
    """World points (...,3) -> where the photo shows them (...,2), in [0, 1] across its width and its height;
    and whether it does (...)"""
    x, y, z = ((points - view.pose[:3, 3]) @ view.pose[:3, :3]).unbind(-1)
    fx, fy, cx, cy, k1, k2, p1, p2 = view.lens
    x, y = x / z, y / z
    r2 = x * x + y * y
    bend = 1 + k1 * r2 + k2 * r2 * r2
    u = fx * (x * bend + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + cx
    v = fy * (y * bend + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + cy
    place = torch.stack([u / view.width, v / view.height], -1)
    # Far outside a photo the polynomial of a bent lens turns back, and would show the point inside it
    forth = 1 + 3 * k1 * r2 + 5 * k2 * r2 * r2 > 0
    return place, (z > 1e-9) & forth & (place > 0).all(-1) & (place < 1).all(-1)


def find_up(poses):
    """(V,4,4) -> the rotation (3,3) of the world that brings up to +Z, and turns nothing else"""
    right, up = poses[:, :3, 0], -poses[:, :3, 1].mean(0)
    values, vectors = torch.linalg.eigh(right.T @ right / len(poses))
    if values[0] < 0.3 * values[1]:              # else they are not level, or all look in one direction
        up = vectors[:, 0] * torch.sign(vectors[:, 0] @ up)
    return turn(up / up.norm(), torch.tensor([0.0, 0, 1], dtype=torch.float64))


def turn(a, b):
    """The rotation (3,3) that takes the unit vector a to b by the shortest way (Rodrigues' formula)"""
    if 1 + a @ b < 1e-9:
        return torch.diag(torch.tensor([1.0, -1, -1], dtype=torch.float64))
    x, y, z = torch.linalg.cross(a, b)
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    return torch.eye(3, dtype=torch.float64) + cross + cross @ cross / (1 + a @ b)


def find_object(scene, views, silhouettes):
    """Silhouettes (H,W), True on the object -> the points (N,3) of its visual hull: nearly all photos that
    show them show them on the object.  And its bounding box: two corners (3,)"""
    # The search begins around the point that is nearest to all optical axes: the sum of the squared distances
    # |(1 - f f^T) (c - p)|^2 is least where its gradient is zero, which is a linear equation for c
    poses = torch.stack([view.pose for view in views])
    position, forward = poses[:, :3, 3], poses[:, :3, 2]
    beside = torch.eye(3, dtype=torch.float64) - forward[:, :, None] * forward[:, None]        # (V,3,3)
    if torch.linalg.eigvalsh(beside.mean(0))[0] < 1e-4:
        raise UserError(f"{scene}: all cameras look in one direction: photos from several sides are wanted")
    centre = torch.linalg.solve(beside.sum(0), (beside @ position[:, :, None]).sum(0))[:, 0]
    if ((centre - position) * forward).sum(-1).median() < 0:
        raise UserError(f"{scene}: the cameras look away from the object: transforms.json has OpenGL's axes "
                        "(-Z forward, +Y up), COLMAP has world_to_camera")
    half = (position - centre).norm(dim=-1).median().expand(3)
    if not half[0] > 1e-9 * (1 + position.abs().max()):
        raise UserError(f"{scene}: all cameras stand at one place (or their matrices are transposed)")

    # A grid of cells; those that too many photos contradict go; then a finer grid around what is left.  A
    # cell counts as on the object if any part of it is, so a silhouette grows by the cell's radius.  The last
    # grid is fine: half of that is enough there
    for share in (1, 1, 1, 1, 0.5):
        cell = 2 * half / CELLS
        axis = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS * 2 - 1
        points = centre + half * torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)
        missed = shown = torch.zeros(len(points))
        for view, seen in zip(views, silhouettes):
            H, W = seen.shape
            depth = ((centre - view.pose[:3, 3]) @ view.pose[:3, 2]).clamp(min=half.min() / 10)
            reach = min(round((share * cell.norm() / 2 * view.lens[0] / depth * W / view.width).item()), W)
            # (A square's maximum is that of its columns' maxima, which is faster: a long lens reaches far)
            grown = F.max_pool2d(seen[None].float(), (2 * reach + 1, 1), 1, (reach, 0))
            grown = F.max_pool2d(grown, (1, 2 * reach + 1), 1, (0, reach))[0] > 0
            place, framed = project(points, view)
            column, row = (place.clamp(0, 1) * torch.tensor([W, H])).nan_to_num().long().unbind(-1)
            on = grown[row.clamp(max=H - 1), column.clamp(max=W - 1)]
            missed, shown = missed + (framed & ~on), shown + framed
            keep = missed <= MISSES * len(views)         # what is out already is not looked at again
            points, missed, shown = points[keep], missed[keep], shown[keep]
        points = points[(missed <= MISSES * shown) & (shown >= len(views) / 2)]
        if not len(points):
            raise UserError(f"{scene}: the photos agree on no point of the object: are the cameras right, "
                            "and the backgrounds white or transparent?")
        low, high = points.amin(0) - cell / 2, points.amax(0) + cell / 2
        centre, half = (low + high) / 2, (high - low) * 0.55
    return points, low, high


def aim(pose):
    """The camera turned on the spot, by the least that brings the origin into the middle"""
    forward = -pose[:3, 3] / pose[:3, 3].norm()
    right = pose[:3, 0] - (pose[:3, 0] @ forward) * forward
    right = right / right.norm()
    aimed = pose.clone()
    aimed[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], -1)
    return aimed


def resample(view, image, alpha, pose, f, size):
    """The photo (H,W,3) and its alpha channel (H,W), or None, bytes -> as the aimed camera takes them: rgb
    (S,S,3), coverage (S,S), in [0, 1].  A pixel is the mean of n x n rays where the old are finer"""
    n = min(max(math.ceil(view.lens[0] * image.shape[1] / view.width / f), 1), 8)
    at = ((torch.arange(size * n, dtype=torch.float64) + 0.5) / n - size / 2) / f
    y, x = torch.meshgrid(at, at, indexing="ij")
    rays = torch.stack([x, y, torch.ones_like(x)], -1) @ pose[:3, :3].T                # (Sn,Sn,3)
    place, framed = project(pose[:3, 3] + rays, view)
    place = torch.where(framed[..., None], 2 * place - 1, -9).float()
    # `ink` is what is not white.  So what lies outside of the photo, where grid_sample puts zeros, is white
    layers = [255 - image] + ([] if alpha is None else [alpha[..., None]])
    layers = torch.from_numpy(np.concatenate(layers, -1)).permute(2, 0, 1)[None] / 255
    layers = F.avg_pool2d(F.grid_sample(layers, place[None], align_corners=False), n)[0].permute(1, 2, 0)
    rgb = 1 - layers[..., :3]                                                          # (S,S,3)
    coverage = layers[..., 3] if alpha is not None else (rgb < WHITE / 255).any(-1).float()
    return rgb, torch.where(coverage > 1 / 255, coverage, 0)        # less is the rounding of the look-up


# ---------------------------------------------------------------------------------------------------- readers

def find_model(folder):
    """The file that makes a folder a scene, or None"""
    names = [*(f"{sub}{name}" for sub in ("", "sparse/0/", "sparse/", "colmap/sparse/0/")
               for name in ("images.bin", "images.txt"))]
    found = (folder / name for name in ("transforms.json", *names))
    cameras = lambda path: path.with_name(path.name.replace("images", "cameras"))
    return next((path for path in found if path.is_file() and cameras(path).is_file()), None)


def read_scene(model, folder):
    """-> [View]"""
    try:
        if model.name == "transforms.json":
            views = read_transforms(model)
        else:
            cameras, images = (read_colmap_text if model.suffix == ".txt" else read_colmap_binary)(model)
            if unknown := {which for *_, which, _ in images} - set(cameras):
                raise UserError(f"{model} names camera {min(unknown)}, which is not in the file of cameras")
            views = [colmap_view(folder, name, q, t, *cameras[which]) for q, t, which, name in images]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            MemoryError, struct.error) as error:
        raise UserError(f"{model} cannot be read ({type(error).__name__}: {error})") from None
    if not views:
        raise UserError(f"{model} names no photos")
    for view in views:
        lens = np.array(view.lens)
        if not (np.isfinite(lens).all() and view.pose.isfinite().all() and view.pose.abs().max() < 1e9
                and min(view.width, view.height) > 0 and 0 < lens[:2].min()
                and lens[:2].max() < 1e4 * view.width):
            raise UserError(f"{model}: the camera of {view.path.name} has a number that makes no sense")
        check_rotation(view.pose.numpy(), f"{model}: {view.path.name}")
    return views


def read_transforms(file):
    """nerfstudio's and instant-ngp's file.  A frame's own intrinsics come before those of all."""
    shared, views = json.loads(file.read_text()), []
    for frame in shared["frames"]:
        get = lambda key, default=None: frame.get(key, shared.get(key, default))
        if get("is_fisheye") or "FISHEYE" in get("camera_model", "") or get("k3") or get("k4"):
            raise UserError(f"{file}: the lens is a fisheye, or has k3 or k4: undistort the photos first")
        if not get("fl_x") and not get("camera_angle_x"):
            raise UserError(f"{file} has neither fl_x nor camera_angle_x: how wide is the camera's view?")
        if not get("fl_x") and not 0 < get("camera_angle_x") < math.pi:
            raise UserError(f"{file}: camera_angle_x is an angle in radians, between 0 and pi")
        path = find_photo(file.parent, frame["file_path"])
        width, height = get("w"), get("h")
        if not width or not height:
            width, height = open_picture(path, "RGB", square=False).size
        fx = get("fl_x") or width / 2 / math.tan(get("camera_angle_x") / 2)
        lens = [fx, get("fl_y", fx), get("cx", width / 2), get("cy", height / 2)]
        lens += [get(key, 0.0) for key in ("k1", "k2", "p1", "p2")]
        pose = torch.eye(4, dtype=torch.float64)
        pose[:3] = torch.tensor(frame["transform_matrix"], dtype=torch.float64)[:3]
        pose[:3, 1:3] *= -1                                          # from OpenGL's axes: +Y up, -Z forward
        views.append(View(path, pose, tuple(map(float, lens)), int(width), int(height)))
    return views


# COLMAP's kinds of cameras that are read, by their number in binary files, and where their parameters stand
# in `lens`.  It counts pixels from the corner of the picture, as we do
COLMAP = {"SIMPLE_PINHOLE": (0, (0, 0, 1, 2)), "PINHOLE": (1, (0, 1, 2, 3)),
          "SIMPLE_RADIAL": (2, (0, 0, 1, 2, 3)), "RADIAL": (3, (0, 0, 1, 2, 3, 4)),
          "OPENCV": (4, (0, 1, 2, 3, 4, 5, 6, 7))}


def colmap_lens(file, kind, parameters):
    if kind not in COLMAP:
        raise UserError(f"{file}: cameras of COLMAP's kind {kind} are not read, only "
                        f"{', '.join(COLMAP)}: run `colmap image_undistorter` first")
    if len(parameters) <= max(COLMAP[kind][1]):
        raise UserError(f"{file}: a camera of the kind {kind} has {max(COLMAP[kind][1]) + 1} numbers")
    lens = [float(parameters[k]) for k in COLMAP[kind][1]]
    return tuple(lens + [0.0] * (8 - len(lens)))


def colmap_view(folder, name, quaternion, translation, lens, width, height):
    """COLMAP has x_camera = R x + t, and R as a quaternion: camera_to_world is the inverse."""
    w, x, y, z = np.array(quaternion) / np.linalg.norm(quaternion)
    R = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                  [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                  [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = R.T, -R.T @ translation
    path = find_photo(folder / "images", name) if (folder / "images").is_dir() else find_photo(folder, name)
    return View(path, torch.from_numpy(pose), lens, width, height)


def read_colmap_text(images):
    """-> {number: (lens, width, height)}, [(quaternion, translation, the camera's number, name of photo)]"""
    file = images.with_name("cameras.txt")
    lines = [line.split() for line in file.read_text().splitlines() if line.strip() and line[0] != "#"]
    cameras = {int(words[0]): (colmap_lens(file, words[1], words[4:]), int(words[2]), int(words[3]))
               for words in lines}
    # Two lines for each photo; the second has the points that it shows, and is empty if there are none
    lines = [line for line in images.read_text(errors="surrogateescape").split("\n") if line[:1] != "#"]
    rows = [line.split(maxsplit=9) for line in lines[::2] if line.strip()]
    return cameras, [(list(map(float, row[1:5])), list(map(float, row[5:8])), int(row[8]), row[9].strip())
                     for row in rows]


def read_colmap_binary(images):
    file = images.with_name("cameras.bin")
    data, at, cameras = file.read_bytes(), 8, {}
    kinds = {number: (kind, max(places) + 1) for kind, (number, places) in COLMAP.items()}
    for _ in range(struct.unpack_from("<Q", data)[0]):
        which, number, width, height = struct.unpack_from("<iiQQ", data, at)
        kind, count = kinds.get(number, (number, 0))
        lens = colmap_lens(file, kind, struct.unpack_from(f"<{count}d", data, at + 24))
        cameras[which], at = (lens, width, height), at + 24 + 8 * count
    data, at, found = images.read_bytes(), 8, []
    for _ in range(struct.unpack_from("<Q", data)[0]):
        _, *numbers, which = struct.unpack_from("<I7di", data, at)
        end = data.index(b"\0", at + 64)
        found.append((numbers[:4], numbers[4:], which, os.fsdecode(data[at + 64:end])))
        at = end + 9 + 24 * struct.unpack_from("<Q", data, end + 1)[0]
    return cameras, found


def find_photo(folder, name):
    """A photo without its background is a PNG, beside or in place of the JPEG that the file names"""
    path = folder / name
    return next((some for some in (path.with_name(path.name + ".png"), path.with_suffix(".png"), path)
                 if os.path.isfile(some)), path)


# ---------------------------------------------------------------------------------------------------- a scene

def read_picture(view):
    """-> the photo on white and its alpha channel, or None where it is opaque: PIL images"""
    image, alpha = on_white(open_picture(view.path, "RGB", square=False))
    if abs(image.width * view.height / (image.height * view.width) - 1) > 0.02:
        raise UserError(f"{view.path} is {image.width} x {image.height} and its camera's photos are "
                        f"{view.width} x {view.height}: is it turned, or cropped?")
    return image, None if alpha is None or alpha.getextrema()[0] == 255 else alpha


def silhouette(view):
    """A small photo's pixels (H,W): True on the object"""
    image, alpha = read_picture(view)
    share = min(SMALL / max(image.size), 1)
    size = [max(round(share * side), 1) for side in image.size]
    rgb, mask = (some and np.array(some.resize(size, Image.Resampling.BOX)) for some in (image, alpha))
    check_border(rgb, mask, view.path)
    return torch.from_numpy((rgb < WHITE).any(-1) if mask is None else mask > 63)


def convert(scene, model, config, folder):
    """Write a scene as an object -> a sentence about it"""
    # The order is random, so that the last photos, which are held out of the training, show all sides too
    views = read_scene(model, scene)
    views = [views[k] for k in np.random.default_rng(0).permutation(len(views))]

    # Up, then where the object is; then the similarity x -> s (R x - c), which brings it into the cube
    R = find_up(torch.stack([view.pose for view in views]))
    for view in views:
        view.pose[:3] = R @ view.pose[:3]
    points, low, high = find_object(scene, views[:MOST], [silhouette(view) for view in views[:MOST]])
    s, c = 1 / (high - low).norm(), (low + high) / 2
    points = s * (points - c)
    for view in views:
        view.pose[:3, 3] = s * (view.pose[:3, 3] - c)

    # Photos that cut the object off, or were taken from inside the cube, are left out
    whole = [view for view in views if view.pose[:3, 3].abs().max() > 0.5
             and project(points, view)[1].double().mean() > 0.98][:config.views or None]
    if not whole:
        raise UserError(f"{scene}: each photo cuts off a part of the object")
    if len(whole) < config.views:
        raise UserError(f"{scene}: {len(whole)} photos can be used, and --views {config.views} are wanted")
    poses = torch.stack([aim(view.pose) for view in whole])
    seen = (points - poses[:, None, :3, 3]) @ poses[:, :3, :3]                         # (V,N,3)
    f = (FILL * config.size / 2 / (seen[..., :2].abs() / seen[..., 2:].clamp(min=0.05)).max()).item()
    K = intrinsics_at(config.size, f * 128 / config.size)

    photos, masks = [], True
    for view, pose in zip(whole, poses):
        image, alpha = (some and np.array(some) for some in read_picture(view))
        check_border(image, alpha, view.path)
        photos.append(resample(view, image, alpha, pose, f, config.size))
        masks = masks and alpha is not None
    rgb, coverage = (torch.stack(some) for some in zip(*photos))
    check_views((rgb * 255).numpy(), (coverage * 255).numpy() if masks else None, poses.numpy(), K.numpy(),
                [view.path for view in whole])

    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3], transform[:3, 3] = s * R, -s * c
    draw_cameras(folder.with_name(folder.name + ".png"), points, poses, rgb, f)
    with atomic_folder(folder) as temporary:
        write_intrinsics(temporary, K, config.size)
        for k, pose in enumerate(poses):
            write_view(temporary, k, rgb[k], coverage[k], pose)
        if not masks:                             # one made from colours would lack the object's own white
            shutil.rmtree(temporary / "mask")
        (temporary / "source_to_world.txt").write_text(numbers(transform) + "\n")
    distance = poses[:, :3, 3].norm(dim=-1)
    fewer = " (the others cut the object off, or are more than --views)" if len(whole) < len(views) else ""
    how = "masks from their alpha channels" if masks else "no masks: what is white is the background"
    return (f"{len(whole)} of {len(views)} photos{fewer}, {how}; the cameras stand {distance.min():.2f} to "
            f"{distance.max():.2f} from the middle")


def draw_cameras(path, points, poses, rgb, f):
    """The cube, the hull and the cameras; and four photos, in which the hull's box must enclose the object"""
    points, poses, rgb = points.numpy(), poses.numpy(), rgb.numpy().clip(0, 1)
    corners = np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    edges = [(a, b) for a in range(8) for b in range(a) if (corners[a] != corners[b]).sum() == 1]
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subfigures(1, 2)
    axis = left.add_subplot(projection="3d")
    for a, b in edges:
        axis.plot(*(corners[[a, b]] - 0.5).T, color="black", linewidth=0.8)
    axis.scatter(*points[::len(points) // 2000 + 1].T, s=1, color="tab:orange")
    for pose in poses:                            # where it stands, where it looks, and where its up is
        for colour, way in (("tab:blue", 0.3 * pose[:3, 2]), ("tab:red", -0.1 * pose[:3, 1])):
            axis.plot(*np.stack([pose[:3, 3], pose[:3, 3] + way]).T, color=colour, linewidth=1)
    axis.set(xlabel="x", ylabel="y", zlabel="z", title="blue: looks there; red: its up; orange: the object")
    axis.set_aspect("equal")
    low, high = points.min(0), points.max(0)
    for k, axis in enumerate(right.subplots(2, 2).flat):
        axis.axis("off")
        if k < len(poses):
            seen = (low + corners * (high - low) - poses[k, :3, 3]) @ poses[k, :3, :3]
            place = f * seen[:, :2] / seen[:, 2:] + rgb.shape[1] / 2
            axis.imshow(rgb[k], extent=(0, rgb.shape[2], rgb.shape[1], 0))
            for a, b in edges:
                axis.plot(*place[[a, b]].T, color="tab:blue", linewidth=0.8)
    save_figure(path, figure)


# ------------------------------------------------------------------------------------------------------- main

def main(argv=None):
    # SRC and DST are the first two words; flags come after them
    argv = sys.argv[1:] if argv is None else argv
    words = list(takewhile(lambda word: not word.startswith("-"), argv[:2]))
    config = parse_config(Config, argv=[f"--{flag}={word}" for flag, word in zip(("src", "dst"), words)]
                          + argv[len(words):])
    source, out = Path(config.src), Path(config.dst)
    if not config.src or not config.dst:
        raise UserError("python -m shapes.photos convert SRC DST is wanted, then flags  (--help lists them)")
    if not os.path.isdir(source):
        raise UserError(f"{source} is no folder")

    # SRC is a scene, or holds scenes.  One that is broken must not stop the others
    scenes = [source] if find_model(source) else [path for path in visible(source) if find_model(path)]
    if not scenes:
        raise UserError(f"{source} holds no scene: transforms.json, or COLMAP's cameras and images (.bin or "
                        ".txt) in it, in sparse/0/ or in sparse/, are looked for there and in its folders")
    made = there = 0
    for scene in scenes:
        name = scene.resolve().name
        try:
            if not name.isprintable() or name.startswith(".") or not 0 < len(os.fsencode(name)) <= 200:
                raise UserError(f"{scene}: the object gets the scene's name, and this one cannot be used")
            if os.path.lexists(out / name):
                there += 1
                print(plain(f"{out / name} is there already, and stays as it is"))
                continue
            print(plain(f"{name}: {convert(scene, find_model(scene), config, out / name)}"), flush=True)
            made += 1
        except UserError as error:
            if len(scenes) == 1:
                raise
            print(f"left out: {error}", flush=True)
    if not made + there:
        raise UserError(f"none of the {len(scenes)} scenes of {source} could be converted: see above why")
    print(plain(f"{made} of {len(scenes)} scenes converted, {there} were there: look at {out}/*.png, whether "
                f"the cameras stand around the object.  Next: python autodecoder.py --data {out} "
                "--out runs/mine"))


if __name__ == "__main__":
    command(main)

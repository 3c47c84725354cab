"""
Photos with known cameras on disk, in the layout of the SRN data, so that other people's loaders read ours and
load_photos reads theirs:

    <folder>/<object>/rgb/000000.png       RGB on white, or with an alpha channel
                     /mask/000000.png      8-bit coverage, where there is one
                     /pose/000000.txt      camera_to_world: 16 numbers, row-major, OpenCV axes
                     /intrinsics.txt       "f cx cy 0." / "0. 0. 0." / "1." / "H W"

Other people's data is never quite as announced: each reader checks what it reads, and says in one sentence
which file is wrong, and how.  Photos in another layout are brought into this one by shapes/convert.py:

run  python -m shapes.photos convert SRC DST
read write_view, load_photos, read_pose, check_views, atomic_folder.
"""
import functools
import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UserError, atomic_file, command, plain
from shapes.earphones import draw_factors


# ------------------------------------------------------------------------------------------------------ write

@contextmanager
def atomic_folder(path):
    """Fill the folder given; it then takes its name.  What an interruption leaves is hidden (.name.tmp), so
    that readers pass it by, and is cleared by the next try.  A folder that is replaced steps aside first
    (.name.old), because two renames are not one: a kill between them must not lose both."""
    path = Path(path)
    temporary, aside = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            os.rename(path, aside)
        os.rename(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def write_transforms(folder, holdout_views=8):
    """transforms.json, for nerfstudio, instant-ngp and torch-ngp: OpenGL's camera,
    +Y up and looking along -Z."""
    f, cx, cy = read_numbers(folder / "intrinsics.txt", [0])[:3]
    size = int(read_numbers(folder / "intrinsics.txt", [3])[0])
    frames = []
    for path in visible(folder / "pose"):
        pose = read_pose(path).astype(float) @ np.diag([1.0, -1, -1, 1])
        frames.append({"file_path": f"rgb/{path.stem}.png", "transform_matrix": pose.tolist()})
    # nerfstudio would choose its own photos to measure by, and train on those that we hold out.  While it
    # trains it measures by "val", and at the end by "test"
    files = [frame["file_path"] for frame in frames]
    last = max(len(files) - holdout_views, 0)
    train, test = files[:last], files[last:]
    with atomic_file(folder / "transforms.json") as temporary:
        temporary.write_text(json.dumps({
            "fl_x": f, "fl_y": f, "cx": cx, "cy": cy, "w": size, "h": size,
            "camera_angle_x": 2 * math.atan(size / 2 / f),
            "aabb_scale": 1, "scale": 0.9, "offset": [0.5, 0.5, 0.5], "white_transparent": True,
            "train_filenames": train, "val_filenames": test, "test_filenames": test,
            "frames": frames}, indent=1))


# ------------------------------------------------------------------------------------------------------- read

def load_photos(folder, size, objects=0):
    """A folder in the SRN layout, ours or anybody's, at size x size pixels; its first `objects`, or all
    -> photos (B,V,H,W,3) uint8 on white, masks (B,V,H,W) uint8 or None, poses (B,V,4,4) float32
    camera_to_world, intrinsics (B,3,3) float32, names.

    What is wrong with the data is a UserError that names the file."""
    found = objects_in(folder, size, objects)
    photos, masks, poses, intrinsics, _ = zip(*load_objects(found, size))
    masks = None if any(mask is None for mask in masks) else torch.from_numpy(np.stack(masks))
    return (torch.from_numpy(np.stack(photos)), masks, torch.from_numpy(np.stack(poses)),
            torch.from_numpy(np.stack(intrinsics)), [entry.name for entry in found])


def objects_in(folder, size, objects=0):
    """The folders of the first `objects` objects, or of all"""
    folder = Path(folder)
    if size < 1:
        raise UserError(f"photos at {size} pixels a side: at least 1 is wanted")
    if not os.path.isdir(folder):
        raise UserError(f"{folder} is not there. For the procedural earphones, run: "
                        "python render_shapenet.py")
    if os.path.isdir(folder / "rgb"):
        raise UserError(f"{folder} is a single object: give the folder that holds it, "
                        f"{folder.resolve().parent}")
    found = [entry for entry in visible(folder) if holds_photos(entry)][:objects or None]
    if not found:
        raise UserError(f"{folder} holds no photos: <object>/rgb/*.png, <object>/pose/*.txt and "
                        "<object>/intrinsics.txt wanted")
    return found


def load_objects(found, size):
    """load_object of each, one after the other; threads decode a few ahead"""
    first = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for some in (found[k:k + 16] for k in range(0, len(found), 16)):
            for entry, loaded in zip(some, pool.map(lambda entry: load_object(entry, size), some)):
                count, side = len(loaded[0]), loaded[4]
                first = first or (count, side)
                if (count, side) != first:
                    raise UserError(f"{entry} has {count} photos of {side} x {side} and {found[0]} has "
                                    f"{first[0]} of {first[1]} x {first[1]}: "
                                    "every object needs as many, and as large, as the others")
                yield loaded


def holds_photos(entry):
    """Whether it does.  One that may not be read, or whose name is none, must not stop the others."""
    for folder in (entry, *(entry / sub for sub in ("rgb", "mask", "pose"))):
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
            print(UserError(f"{folder} cannot be read: left out"))          # it writes out what is in a name
            return False
    for sub in ("", "rgb", "mask", "pose"):
        for file in os.scandir(entry / sub) if os.path.isdir(entry / sub) else ():
            if not os.access(file.path, os.R_OK):
                print(UserError(f"{file.path} cannot be read: its object is left out"))
                return False
    there = os.path.isdir(entry / "rgb")
    if there and not entry.name.isprintable():                # bytes that are no UTF-8, or control characters
        print(UserError(f"{entry} has a name that cannot be printed: left out"))
    return there and entry.name.isprintable()


def visible(folder):
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None


def pictures_of(folder):
    return [path for path in visible(folder / "rgb") if path.suffix.lower() in (".png", ".jpg", ".jpeg")]


def load_object(folder, size):
    """-> photos (V,H,W,3), masks (V,H,W) or None, poses (V,4,4), intrinsics (3,3), the photos' side
    as it stands in the files"""
    pictures = pictures_of(folder)
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


def read_small(path, most=100_000):
    """The text of a small file.  What is no file (a pipe, a device, a folder) is not opened: reading it might
    never end."""
    if not path.is_file() or path.stat().st_size > most:
        raise UserError(f"{path} is not there" if not path.exists() else f"{path} is no small text file")
    return path.read_text(errors="replace")


def read_numbers(path, lines=None):
    """The numbers of a small text file; `lines`: of these lines alone."""
    try:
        text = read_small(path)
        if lines and len(text.split("\n")) <= max(lines):
            raise ValueError(f"it has no line {max(lines) + 1}")
        words = " ".join(text.split("\n")[k] for k in lines).split() if lines else text.split()
        values = np.array([float(word) for word in words])
    except (OSError, ValueError) as error:
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
    pose = check_rotation(values.reshape(4, 4), path)
    position, forward = pose[:3, 3], pose[:3, 2]
    if np.abs(position).max() <= 0.5:
        raise UserError(f"{path}: the camera stands at {position.round(3).tolist()}, "
                        "inside the cube [-0.5, 0.5]^3 of the object")
    if forward @ position >= np.abs(forward).sum() / 2:               # every corner of the cube is behind it
        raise UserError(f"{path}: the camera looks away from the object: is this camera_to_world, "
                        "+Z forward? An OpenGL camera needs its second and third columns negated")
    return pose.astype(np.float32)


def check_rotation(pose, path):
    rotation = pose[:3, :3]
    orthonormal = np.abs(rotation @ rotation.T - np.eye(3)).max() <= 2e-3 and np.linalg.det(rotation) >= 0
    if not orthonormal or np.abs(pose[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise UserError(f"{path} is no camera: a rotation (orthonormal, determinant +1), a position and "
                        "the row 0 0 0 1 are wanted")
    return pose


def read_intrinsics(path, size):
    """"f cx cy 0." and, on the fourth line, "H W": to use photos at another size
    f, cx and cy are scaled by new/old."""
    camera, extent = read_numbers(path, [0]), read_numbers(path, [3])
    square = len(extent) == 2 and extent[0] == extent[1] >= 1
    fits = len(camera) in (3, 4) and square and (1e-3 < camera[:3]).all() and (camera[1:3] < extent).all()
    if not fits:
        raise UserError(f"{path}: 'f cx cy 0.' on line 1 and 'H W', with H = W, on line 4 are wanted")
    f, cx, cy = camera[:3] * size / extent[0]
    return np.array([[f, 0, cx], [0, f, cy], [0, 0, 1]], np.float32)


def as_8bit(image, mode):
    """A PIL image as 8 bits a channel in `mode`.  Pillow itself would clip 16-bit greys to white."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def open_picture(path, mode, square=True):
    """-> a PIL image in `mode`, or in RGBA where it has transparency; it must be square, unless said."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is no file" if path.exists() else f"{path} is not there")
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            # Its size is looked at before anything is decoded
            fits = max(image.size) <= 8192 and (image.width == image.height or not square)
            transparent = image.mode in ("RGBA", "LA") or "transparency" in image.info
            picture = as_8bit(image, "RGBA" if transparent else mode) if fits else None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a picture that can be read ({error})") from None
    if not fits:
        raise UserError(f"{path} is {image.width} x {image.height}: "
                        f"{'square ' if square else ''}photos of at most 8192 pixels a side are wanted")
    return picture


def on_white(image):
    """-> a PIL image in RGB on white, and its alpha channel or None"""
    if image.mode != "RGBA":
        return image, None
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB"), image.getchannel("A")


def read_photo(path, size):
    """-> (H,W,3) on white, the alpha channel (H,W) where there is one, and the side in pixels
    as it stands in the file"""
    image, alpha = on_white(open_picture(path, "RGB"))
    if str(path).lower().endswith((".jpg", ".jpeg")):
        pixels = np.array(image)
        pixels[(pixels >= WHITE).all(-1)] = 255     # else a JPEG's background would be taken for the object
        image = Image.fromarray(pixels)
    return np.array(resize(image, size)), alpha and np.array(resize(alpha, size)), image.width


def read_mask(path, size):
    return np.array(resize(open_picture(path, "L").convert("L"), size))


WHITE = 240              # JPEG's white is not quite white: from here up a colour is the background's


def check_border(rgb, mask, path):
    """rgb (H,W,3), mask (H,W) or None, arrays: a background that is not white would train in silence, and the
    model would paint a box around the object"""
    # The outermost pixels, without those that the mask gives to the object.  If most of them are coloured, it
    # is not the object that reaches them
    edge = np.ones(rgb.shape[:2], bool)
    edge[1:-1, 1:-1] = False
    border = rgb[edge & (mask == 0) if mask is not None else edge]
    if len(border) and (border < WHITE).any(-1).mean() > 0.5:
        colour = " ".join(str(int(c)) for c in np.median(border, 0))
        raise UserError(f"{path}: its border has the colour {colour} (red, green, blue), and a white "
                        "background (255 255 255) or an alpha channel is wanted")


def check_views(rgb, mask, poses, K, paths):
    """The views of one object: rgb (V,H,W,3), mask (V,H,W) or None, poses (V,4,4), K (3,3), arrays.  If the
    cameras stand too far away, or the object is not in the middle, it lies where no volume is."""
    seen = mask > 127 if mask is not None else (rgb < WHITE).any(-1)                   # (V,H,W)
    if not seen.any():
        why = "they are all white" if mask is None else "all masks are empty"
        raise UserError(f"{paths[0].parent.parent}: the photos show no object: {why}")
    for k, path in enumerate(paths):
        check_border(rgb[k], None if mask is None else mask[k], path)
        y, x = np.nonzero(seen[k])
        few = slice(None, None, len(x) // 100 + 1)                                     # they are enough
        pixel = np.stack([x[few] + 0.5, y[few] + 0.5, np.ones(len(x[few]))])           # (3,N)
        rays = np.linalg.solve(K, pixel).T @ poses[k, :3, :3].T                        # (N,3)
        # Is one of 32 points on the ray, from the cube's near corner to its far one, inside the cube?
        position = poses[k, :3, 3]
        t = (np.linalg.norm(position) + np.linspace(-0.87, 0.87, 32)) / np.linalg.norm(rays, axis=1)[:, None]
        points = position + t[..., None] * rays[:, None]                               # (N,32,3)
        missed = (np.abs(points) > 0.5).any(-1).all(-1)
        if len(x) and missed.mean() > 0.2:
            raise UserError(f"{path}: {missed.mean():.0%} of the object's pixels look past the cube "
                            "[-0.5, 0.5]^3: is the camera too far away, or the object not in the middle?  "
                            "python -m shapes.photos convert finds the object, and scales it")


def resize(image, size):
    """A smaller photo is the mean over boxes of a larger one: nearest-neighbour would put
    jagged edges into the data."""
    return image if image.width == size else image.resize((size, size), Image.Resampling.BOX)


# ------------------------------------------------------------------------------------------- what they show

def factors_of(folder, names):
    """What the catalogue says of each of our earphones, by its factors.json; where that is absent, as with
    the model in the box, by its name.  None if they are not all ours, or a file is broken"""
    every = []
    for name in names:
        file, match = Path(folder, name, "factors.json"), re.fullmatch(r"(train|val|test)_(\d{5})", name)
        try:
            drawn = draw_factors(match[1], int(match[2]))
            every.append(dict(json.loads(read_small(file))) if file.is_file() else drawn)
            if not drawn.keys() <= every[-1].keys():
                return None
        except (UserError, OSError, ValueError, TypeError, RecursionError):
            return None
    return every


def kinds_of(folder, names):
    """A label for each object where the data has one: our earphones' kind"""
    # Our own photos may not be there, as with the model in the box.  Their names give the kinds too
    ours = [re.fullmatch(r"(train|val|test)_(\d{5})", name) for name in names]
    if not os.path.exists(folder) and Path(folder).name.startswith("earphones_") and all(ours):
        return [draw_factors(one[1], int(one[2]))["kind"] for one in ours]
    kinds, broken = [], []
    for path in [Path(folder, name, "factors.json") for name in names]:
        kind = "objects"
        try:
            if os.path.lexists(path):                                        # foreign data has none
                kind = json.loads(read_small(path))["kind"]
                if not isinstance(kind, str) or not kind.isprintable():
                    raise ValueError
        except (UserError, OSError, ValueError, KeyError, TypeError, RecursionError):
            kind = "objects"
            broken.append(path)
        kinds.append(kind)
    if broken:
        others = f", nor in {len(broken) - 1} others" if broken[1:] else ""
        say_once(f"no kind of object can be read in {broken[0]}{others}: counted as \"objects\"")
    return kinds


@functools.cache                                 # of the same text: some programs ask for the kinds twice
def say_once(text):
    print(plain(text))


if __name__ == "__main__":
    from shapes import convert                   # here, because it imports this module
    if sys.argv[1:2] != ["convert"]:
        raise UserError("python -m shapes.photos convert SRC DST is wanted")
    command(lambda: convert.main(sys.argv[2:]))

"""
Photos as the stages use them: bytes in one file, mapped into memory, from which a batch draws its pixels.

PNGs are slow to decode, and ten thousand objects do not fit into memory.  So a folder of photos is read and
checked once, and packed into hidden files inside it.  When the folder changes, it is packed again.

    .photos_64px_72.bytes           all photos; all masks; for each photo the pixels on or near its object
    .photos_64px_72.pt              cameras and names, and a digest of the folder's files
    .photos_64px_72.measured.pt     colours and bounding boxes, which stage 1 needs

read read_photos, pack, map_photos, Photos.
"""
import math
import mmap
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from common import UserError, atomic_file, digest, load_checkpoint, open_lock, save_checkpoint
from shapes.photos import check_views, load_objects, objects_in, pictures_of


class Photos:
    """Photos of objects, as bytes; and for each, which pixels are on or near the object.  The bytes may be a
    file's, mapped into memory: then only what a batch looks at is read."""

    def __init__(self, rgb, mask, pose, intrinsics, names, near=None, file=None, has_masks=True):
        self.rgb, self.pose, self.intrinsics, self.names = rgb, pose, intrinsics, names
        self.size, self.has_masks, self.file = rgb.shape[2], has_masks and mask is not None, file
        self.mask = mask_of(rgb) if mask is None else mask
        # Near pixels (n,), photo after photo; how many of each (B,V), and where they begin
        self.near, self.near_count = near or map(torch.cat, zip(*map(pixels_near, self.mask)))
        self.near_count = self.near_count.view(self.mask.shape[:2])
        self.near_start = self.near_count.flatten().cumsum(0).view_as(self.near_count) - self.near_count

    def split(self, held, least=1):
        """The views to train on, `least` or more, and the last `held` ones, to measure by"""
        count = self.rgb.shape[1]
        if not 1 <= held <= count - least:
            raise UserError(f"--holdout_views {held}: there are {count} photos of each object, and at least "
                            f"{least} must be left to train on, and one to measure by")
        return torch.arange(count).split([count - held, held])

    def forget(self):
        """What was read of a mapped file counts as this process's memory, until it is given back"""
        if self.file and hasattr(self.file.map, "madvise"):                                # not on Windows
            self.file.map.madvise(mmap.MADV_DONTNEED)

    def pixel_near(self, o, view, u):
        """u in [0, 1) -> in photo `view` of object o, the pixel at share u of those near the object; and
        whether there are any"""
        count = self.near_count[o, view]
        place = (self.near_start[o, view] + (u * count).long()).clamp(max=len(self.near) - 1)
        return self.near[place].long(), count > 0

    def colours(self, views, objects=None):
        """Of these objects (all), by these views: the mean (N,3) and covariance (N,3,3) of their colours"""
        some = range(len(self.names)) if objects is None else objects
        return [torch.stack(part) for part in zip(*(palette(self.rgb[o, views], self.mask[o, views])
                                                    for o in some))]

    def measured(self, views):
        """Of each object, by these views: the mean (N,3) and covariance (N,3,3) of its colours, and the sides
        (N,3) of its bounding box.  With many objects this takes minutes, so it is kept beside the file"""
        key, cache, N = "", None, len(self.names)
        if self.file:
            key, cache = digest([self.file.key, views]), self.file.path.with_suffix(".measured.pt")
            with suppress(UserError, KeyError, TypeError, AttributeError):
                state = load_checkpoint(cache, "measured")
                (mean, covariance), sides = state["measured"]["colours"], state["measured"]["sides"]
                shapes = [some.shape for some in (mean, covariance, sides)]
                if state["key"] == key and shapes == [(N, 3), (N, 3, 3), (N, 3)]:
                    return [mean, covariance], sides
        table = []
        for o in range(N):
            side = extent(self.mask[o, views], self.pose[o, views], self.intrinsics[o])
            keep(table, o, N, (*palette(self.rgb[o, views], self.mask[o, views]), side))
            self.forget()
            if o % 512 == 511:
                print(f"colours and boxes of {o + 1} of {len(self.names)} objects are measured", flush=True)
        *colours, sides = table
        if cache:
            with suppress(UserError):                                       # a folder that may not be written
                save_checkpoint(cache, {"key": key, "measured": {"colours": colours, "sides": sides}})
        return colours, sides


def mask_of(rgb):
    return (rgb < 255).any(-1).byte() * 255


def pixels_near(mask):
    """mask (V,H,W) -> the pixels (n,) int32 that are at most two from the object, photo after photo, and how
    many each photo has (V,)"""
    near = F.max_pool2d(mask[:, None].float(), 5, 1, 2).flatten(1) > 0                         # (V,HW)
    return (near.flatten().nonzero()[:, 0] % near.shape[1]).int(), near.sum(1)


def palette(rgb, mask):
    """rgb (V,H,W,3), mask (V,H,W) -> mean (3,) and covariance (3,3) of an object's colours"""
    colours = rgb[mask == mask.max()].float() / 255              # (of an object that is not seen: all, white)
    # A little variance in all directions: an object of one colour must not be divided by zero
    apart = colours - colours.mean(0)
    return colours.mean(0), apart.T @ apart / len(apart) + 1e-3 * torch.eye(3)


def extent(masks, poses, K, cells=64):
    """(3,): the sides of an object's bounding box, by its visual hull: the cells of a grid that lie inside
    its silhouette in all of these views"""
    centre = (torch.arange(cells) + 0.5) / cells - 0.5
    z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
    hull, last = torch.stack([x, y, z], -1).view(-1, 3), masks.shape[-1] - 1
    for mask, camera in zip(masks, poses):
        seen = (hull - camera[:3, 3]) @ camera[:3, :3] @ K.T
        column, row = (seen[:, :2] / seen[:, 2:]).floor().long().unbind(1)
        framed = (column >= 0) & (row >= 0) & (column <= last) & (row <= last)
        hull = hull[framed & (mask[row.clamp(0, last), column.clamp(0, last)] > 63)]
    return hull.amax(0) - hull.amin(0) + 1 / cells if len(hull) else torch.ones(3)


def stamp(found, size):
    """A digest of what can be known of all files without reading them: names, sizes, times"""
    files = [size]
    for entry in found:
        files.append(entry.name)
        for folder in (entry, entry / "rgb", entry / "mask", entry / "pose"):
            with suppress(OSError), os.scandir(folder) as inside:
                files += sorted(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}"
                                for file in inside if file.is_file())
    return digest("\n".join(map(str, files)))


def read_photos(folder, size, objects=0):
    """The first `objects` of a folder, or all.  The first time they are read, checked and packed into a file
    beside them.  Later that file is mapped into memory, as long as the folder is as it was"""
    found = objects_in(folder, size, objects)
    key, path = stamp(found, size), Path(folder, f".photos_{size}px_{len(found)}.bytes")
    def packed():
        with suppress(UserError, ValueError, OSError, LookupError, TypeError, AttributeError, RuntimeError):
            return map_photos(path, key)
    if photos := packed():
        return photos
    if not os.access(folder, os.W_OK):
        print(UserError(f"{folder} may not be written to: its photos are not packed, but held in memory"))
        parts = list(read_and_check(found, size))
        rgb, mask, poses, K = (torch.stack(some) for some in zip(*[part[:4] for part in parts]))
        return Photos(rgb, mask, poses, K, [entry.name for entry in found],
                      has_masks=all(part[4] for part in parts))
    with alone(path):
        if photos := packed():               # another process has just packed them
            return photos
        pack(found, size, path, key)
    return map_photos(path, key)


@contextmanager
def alone(path):
    """One process at a time makes this file.  The others wait, and then find it made"""
    try:
        file = open_lock(path.with_name(f".{path.name.lstrip('.')}.lock"))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error}") from None
    try:
        with suppress(ImportError):                                       # Windows has no such lock
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"another process is making {path}: waiting for it", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def read_and_check(found, size):
    """-> of each object photos (V,H,W,3), masks (V,H,W), poses, intrinsics; and whether it came with masks"""
    for o, (entry, (rgb, mask, poses, K, _)) in enumerate(zip(found, load_objects(found, size)), 1):
        check_views(rgb, mask, poses, K, pictures_of(entry))
        if o % 256 == 0:
            print(f"photos of {o} of {len(found)} objects are read", flush=True)
        rgb, poses, K = map(torch.from_numpy, (rgb, poses, K))
        yield rgb, mask_of(rgb) if mask is None else torch.from_numpy(mask), poses, K, mask is not None


def pack(found, size, path, key):
    """All photos, then all masks, then the pixels near each, then the key; and beside it what is small"""
    small, end = [], 0
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for o, (rgb, mask, pose, K, had_mask) in enumerate(read_and_check(found, size)):
            near, count = pixels_near(mask)
            end = end or len(found) * (rgb.numel() + mask.numel())
            masks = len(found) * rgb.numel()
            for place, part in ((o * rgb.numel(), rgb), (masks + o * mask.numel(), mask), (end, near)):
                file.seek(place)
                file.write(part.numpy().tobytes())
            end = file.tell()
            keep(small, o, len(found), (pose, K, count, torch.tensor(had_mask)))
        file.write(key.encode())
        end = file.tell()
    pose, K, count, had_masks = small
    save_checkpoint(path.with_suffix(".pt"), {
        "key": key, "bytes": end, "size": size, "names": [entry.name for entry in found],
        "photos": {"pose": pose, "K": K, "count": count, "has_masks": had_masks.all()}})


def keep(table, row, rows, tensors):
    """Puts tensors into the row of a table.  A list of small tensors between large ones that come and go
    would leave holes in memory that nothing fits into: with 4,096 objects, 4 GB"""
    table += [some.new_zeros(rows, *some.shape) for some in tensors] if not table else []
    for column, some in zip(table, tensors):
        column[row] = some


def map_photos(path, key):
    """The packed file as Photos, if it is whole and of this key"""
    index = load_checkpoint(path.with_suffix(".pt"), "names", "photos")
    small, n = index["photos"], index["size"]
    with open(path, "rb") as file:
        # A private copy: should anybody write to it, then not to the file
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if index["key"] != key or len(mapped) != index["bytes"] or mapped[-len(key):] != key.encode():
        raise UserError(f"{path} is of other photos")
    B, V = small["count"].shape
    whole = 4 * B * V * n * n + 4 * small["count"].sum() + len(key) == len(mapped) and n > 0
    shapes = [small["pose"].shape, small["K"].shape] == [(B, V, 4, 4), (B, 3, 3)] and len(index["names"]) == B
    if not whole or not shapes or not small["pose"].isfinite().all():
        raise UserError(f"{path} is of another version")
    part = lambda offset, kind, *shape: torch.frombuffer(mapped, dtype=kind, count=math.prod(shape),
                                                         offset=offset).view(shape)
    rgb, mask = part(0, torch.uint8, B, V, n, n, 3), part(3 * B * V * n * n, torch.uint8, B, V, n, n)
    near = part(4 * B * V * n * n, torch.int32, int(small["count"].sum()))
    return Photos(rgb, mask, small["pose"], small["K"], index["names"], (near, small["count"]),
                  SimpleNamespace(map=mapped, key=key, path=path), bool(small["has_masks"]))

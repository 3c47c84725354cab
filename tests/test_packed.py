"""Photos in one mapped file: the same bytes, packed once, packed again when anything has changed."""
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from common import UserError, load_checkpoint, save_checkpoint
from shapes import packed
from shapes.photos import load_photos


@pytest.fixture
def folder(data, tmp_path):
    return shutil.copytree(data / "earphones_train", tmp_path / "photos",
                           ignore=shutil.ignore_patterns(".photos*"))


def hidden(folder):
    return sorted(path.name for path in folder.iterdir()
                  if path.name.startswith(".photos") and path.suffix != ".lock")


def test_the_packed_photos_are_the_photos(folder):
    rgb, mask, poses, K, names = load_photos(folder, 32)
    photos = packed.read_photos(folder, 32)
    assert hidden(folder) == [f".photos_32px_{len(names)}.bytes", f".photos_32px_{len(names)}.pt"]
    assert torch.equal(photos.rgb, rgb) and torch.equal(photos.mask, mask) and photos.names == names
    assert torch.equal(photos.pose, poses) and torch.equal(photos.intrinsics, K) and photos.has_masks
    near = torch.nn.functional.max_pool2d(mask.flatten(0, 1)[:, None].float(), 5, 1, 2).flatten(1) > 0
    assert torch.equal(photos.near_count.flatten(), near.sum(1))
    for o, v, u in ((0, 0, 0.0), (1, 3, 0.5), (2, 5, 0.9999)):
        pixels = near[o * rgb.shape[1] + v].nonzero()[:, 0]
        index = torch.tensor([o]), torch.tensor([v]), torch.tensor([u], dtype=torch.float64)
        found, exists = photos.pixel_near(*index)
        assert exists and found == pixels[int(u * len(pixels))]
    few = packed.read_photos(folder, 32, 2)
    assert few.names == names[:2] and torch.equal(few.rgb, rgb[:2])
    in_memory = packed.Photos(rgb, mask, poses, K, names)
    assert torch.equal(in_memory.near, photos.near) and torch.equal(in_memory.near_start, photos.near_start)
    for a, b in zip(in_memory.measured(torch.arange(4))[0], photos.measured(torch.arange(4))[0]):
        assert torch.equal(a, b)


def test_what_is_packed_is_not_read_again_until_it_changes(folder, monkeypatch):
    before = packed.read_photos(folder, 32)
    measured = before.measured(torch.arange(4))
    monkeypatch.setattr(packed, "pack", None)                       # it would be a TypeError
    monkeypatch.setattr(packed, "extent", None)
    again = packed.read_photos(folder, 32)
    assert torch.equal(again.rgb, before.rgb) and torch.equal(again.measured(torch.arange(4))[1], measured[1])
    with pytest.raises(TypeError):
        again.measured(torch.arange(3))                             # of other views: not what is kept
    monkeypatch.undo()
    first, second = (folder / f"train_{k:05d}/rgb/000000.png" for k in (0, 1))
    shutil.copyfile(second, first)
    changed = packed.read_photos(folder, 32)
    assert torch.equal(changed.rgb[0, 0], before.rgb[1, 0]) and torch.equal(changed.rgb[1:], before.rgb[1:])


def test_two_that_begin_at_once_pack_once(folder, monkeypatch, capsys):
    real, calls = packed.pack, []

    def slow(*what):
        calls.append(what)
        time.sleep(0.5)
        real(*what)
    monkeypatch.setattr(packed, "pack", slow)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: packed.read_photos(folder, 32), range(2))
    assert len(calls) == 1 and torch.equal(a.rgb, b.rgb) and "waiting for it" in capsys.readouterr().out


def test_a_pipe_in_the_place_of_the_lock_does_not_block(tmp_path):
    os.mkfifo(tmp_path / ".photos.lock")
    with packed.alone(tmp_path / ".photos"):
        pass


@pytest.mark.parametrize("damage", ["cut", "key", "index", "size", "pose", "count", "gone", "folder"])
def test_a_damaged_pack_is_packed_again(folder, damage):
    before = packed.read_photos(folder, 32).rgb.clone()
    pixels = next(folder.glob(".photos*.bytes"))
    index = pixels.with_suffix(".pt")
    content = pixels.read_bytes()
    if damage == "cut":
        pixels.write_bytes(content[:-100])
    elif damage == "key":
        pixels.write_bytes(content[:-1] + b"x")
    elif damage == "index":
        small = bytearray(index.read_bytes())
        small[len(small) // 2] ^= 4
        index.write_bytes(small)
    elif damage in ("size", "pose", "count"):
        state = load_checkpoint(index)
        small = state["photos"] | ({} if damage == "size" else {damage: [1]})
        save_checkpoint(index, state | {"photos": small, "size": -32 if damage == "size" else 32})
    elif damage == "gone":
        index.unlink()
    else:
        index.unlink()
        index.mkdir()
        with pytest.raises(UserError, match="cannot write"):
            packed.read_photos(folder, 32)
        index.rmdir()
    assert torch.equal(packed.read_photos(folder, 32).rgb, before)
    assert pixels.read_bytes() == content


def test_a_folder_that_may_not_be_written_to_is_held_in_memory(folder, monkeypatch, capsys):
    before = packed.read_photos(folder, 32)
    for path in folder.glob(".photos*"):
        path.unlink()
    real = os.access
    monkeypatch.setattr(packed.os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    photos = packed.read_photos(folder, 32)
    assert "held in memory" in capsys.readouterr().out and not hidden(folder)
    assert torch.equal(photos.rgb, before.rgb) and torch.equal(photos.near, before.near)
    photos.forget()                                                 # nothing to forget
    assert torch.equal(photos.rgb, before.rgb)


def test_photos_without_masks_are_packed_too(folder):
    for mask in folder.glob("*/mask"):
        shutil.rmtree(mask)
    photos = packed.read_photos(folder, 32)
    assert not photos.has_masks and torch.equal(photos.mask, packed.mask_of(photos.rgb))
    assert not packed.read_photos(folder, 32).has_masks


def test_writing_to_mapped_photos_leaves_the_file(folder):
    photos = packed.read_photos(folder, 32)
    before = photos.rgb.clone()
    photos.rgb[0] = 7
    assert torch.equal(packed.read_photos(folder, 32).rgb, before)

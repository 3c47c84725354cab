"""Earphones: what stage 0 needs of the files, and what counting novelty needs of the factors."""
import functools
import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image

from shapes import earphones

SAMPLE = range(12)                 # all kinds, with boom and without


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for i in SAMPLE:
        earphones.write_model(folder / str(i), earphones.draw_factors("train", i))
    return [folder / str(i) for i in SAMPLE]


@functools.cache
def read(folder):
    """vertices (V,3), uv (T,2), faces (F,3) of vertices and (F,3) of uv, and the materials used"""
    rows = [line.split() for line in (folder / "models/model_normalized.obj").read_text().splitlines()]
    numbers = lambda key: np.array([row[1:] for row in rows if row[0] == key], float)
    corners = np.array([[c.split("/") for c in row[1:]] for row in rows if row[0] == "f"], int) - 1
    materials = [row[1] for row in rows if row[0] == "usemtl"]
    return numbers("v"), numbers("vt"), corners[..., 0], corners[..., 1], materials


def components(faces, count):
    """The connected surface that each face belongs to."""
    label = np.arange(count)
    while True:
        low = label[faces].min(1)
        new = label.copy()
        np.minimum.at(new, faces.ravel(), low.repeat(3))
        if (new == label).all():
            return label[faces[:, 0]]
        label = new[new]


def test_same_seed_same_bytes(models, tmp_path):
    for i in (0, 4, 5):
        earphones.write_model(tmp_path / str(i), earphones.draw_factors("train", i))
        for path in sorted(p for p in models[i].rglob("*") if p.is_file()):
            assert path.read_bytes() == (tmp_path / str(i) / path.relative_to(models[i])).read_bytes(), path


def test_the_saved_factors_make_the_same_model(models, tmp_path):
    earphones.write_model(tmp_path / "again", json.loads((models[0] / "factors.json").read_text()))
    obj = "models/model_normalized.obj"
    assert (tmp_path / "again" / obj).read_bytes() == (models[0] / obj).read_bytes()


def test_seed_and_split_change_the_object():
    draws = [earphones.draw_factors(split, 3, seed) for split in ("train", "val") for seed in (0, 1)]
    assert len({f["radius"] for f in draws}) == 4


def test_72_hold_24_24_12_12_and_12_booms():
    factors = [earphones.draw_factors("train", i) for i in range(72)]
    assert Counter(f["kind"] for f in factors) == {"over-ear": 24, "on-ear": 24, "neckband": 12, "buds": 12}
    assert Counter(f["kind"] for f in factors if f["boom"]) == {"over-ear": 6, "on-ear": 6}


def test_a_quarter_of_the_cells_is_held_out_evenly():
    cells = product(earphones.KINDS, earphones.PALETTES, earphones.PARTS)
    held = [cell for cell in cells if earphones.held_out(*cell)]
    assert len(held) == 21
    assert set(Counter(c[1:] for c in held).values()) == {1}


def test_training_never_meets_a_held_out_cell_and_half_of_the_test_does():
    def novel(split, i):
        f = earphones.draw_factors(split, i)
        return earphones.held_out(f["kind"], f["palette"], f["part"])
    for split in ("train", "val", "fresh"):
        assert not any(novel(split, i) for i in range(700)), split
    assert sum(novel("test", i) for i in range(72)) == 36


def test_training_meets_all_other_cells():
    draws = [earphones.draw_factors("train", i) for i in range(72 * 4)]
    assert len({(f["kind"], f["palette"], f["part"]) for f in draws}) == 84 - 21


def test_meshes_are_small_closed_and_outward(models):
    for folder in models:
        check_mesh(folder, 1000)


def check_mesh(folder, least):
    """The chairs' test uses it too"""
    vertices, uv, faces, uv_faces, materials = read(folder)
    assert least <= len(faces) <= 10000
    assert len(materials) == len(set(materials)) <= 3
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    assert set(map(tuple, edges)) == set(map(tuple, edges[:, ::-1])), "an edge without its neighbour"
    a, b, c = vertices[faces].transpose(1, 0, 2)
    volume = np.bincount(components(faces, len(vertices)), (a * np.cross(b, c)).sum(1) / 6)
    assert (volume >= 0).all(), "a surface inside out"
    low, high = vertices.min(0), vertices.max(0)
    assert np.abs(low + high).max() < 3e-5 and abs(np.linalg.norm(high - low) - 1) < 3e-5


def test_without_a_boom_the_halves_mirror_each_other(models):
    for folder in models:
        if not json.loads((folder / "factors.json").read_text())["boom"]:
            vertices = read(folder)[0]
            gaps = [np.abs(vertices - v * [-1, 1, 1]).max(1).min() for v in vertices[::11]]
            assert max(gaps) < 3e-5


def test_textures_stay_below_white_and_uv_inside(models):
    for folder in models:
        uv = read(folder)[1]
        assert 0 <= uv.min() and uv.max() <= 1
        images = sorted((folder / "images").iterdir())
        assert 1 <= len(images) <= 3
        assert max(np.asarray(Image.open(path)).max() for path in images) <= 250
        for path in images:
            assert f"../images/{path.name}" in (folder / "models/model_normalized.mtl").read_text()


def test_the_light_is_painted_on(models):
    """Every texture has many colours, a good deal darker in its shade than in its light."""
    for path in [path for folder in models for path in (folder / "images").iterdir()]:
        pixels = np.asarray(Image.open(path)).reshape(-1, 3)
        assert len(np.unique(pixels, axis=0)) > 200, path
        assert np.quantile(pixels, .02) < .8 * np.quantile(pixels, .98), path


def test_thin_adds_cables(tmp_path, models):
    earphones.write_model(tmp_path / "wired", earphones.draw_factors("train", 0), thin=True)
    assert len(read(tmp_path / "wired")[2]) > len(read(models[0])[2])

"""Chairs, tables, lamps and mugs: as the earphones, and several categories in one folder."""
import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_earphones import check_mesh, components, read

import render_shapenet as stage
from common import UserError
from shapes import household
from shapes.photos import kinds_of, load_photos


@pytest.fixture(scope="module", params=household.STYLES)
def models(request, tmp_path_factory):
    """The first of each style that training has, and of each variant"""
    folder, seen, category = tmp_path_factory.mktemp(request.param), set(), request.param
    for index in range(63):
        factors = household.draw_factors(category, "train", index)
        if (factors["style"], factors["part"]) not in seen:
            seen.add((factors["style"], factors["part"]))
            household.write_model(folder / str(index), factors)
    assert len(seen) == 12
    return sorted(folder.iterdir())


def test_meshes_are_small_closed_and_outward(models):
    for folder in models:
        check_mesh(folder, 500)
        vertices, uv, *_ = read(folder)
        x = np.sort(vertices[:, 0])
        assert np.abs(x + x[::-1]).max() < 3e-5                                            # mirrored
        assert 0 <= uv.min() and uv.max() <= 1


def test_nothing_floats(models):
    for folder in models:
        vertices, _, faces, *_ = read(folder)
        of = components(faces, len(vertices))
        parts = [vertices[np.unique(faces[of == k])] for k in np.unique(of)]
        far = lambda a, b: np.linalg.norm(a[:, None] - b, axis=-1).min()
        reached, left = [parts[0]], parts[1:]
        while left:                                                    # the nearest to what is joined so far
            apart, k = min((min(far(one, part) for one in reached), k) for k, part in enumerate(left))
            assert apart < .06 * np.linalg.norm(np.ptp(vertices, axis=0)), (folder, apart)
            reached.append(left.pop(k))


@pytest.mark.parametrize("category", ["chairs", "tables", "lamps"])          # (of mugs the paint differs)
def test_variants_of_a_style_have_other_shapes(category):
    for style in household.STYLES[category]:
        factors = household.draw_factors(category, "train", 0) | {"style": style}
        made = [household.BUILD[category](factors | {"part": part}) for part in household.VARIANTS[category]]
        assert len({b"".join(one.points.tobytes() for one in parts) for parts in made}) == 3, style


def test_the_light_is_painted_on(models):
    for path in [path for folder in models for path in (folder / "images").iterdir()]:
        pixels = np.asarray(Image.open(path)).reshape(-1, 3)
        assert pixels.max() <= 250 and len(np.unique(pixels, axis=0)) > 50, path
        assert np.quantile(pixels, .02) < .85 * np.quantile(pixels, .98), path


@pytest.mark.parametrize("category", household.STYLES)
def test_a_quarter_of_the_cells_is_never_trained_on(category):
    cells = list(product(household.STYLES[category], household.PALETTES, household.VARIANTS[category]))
    held = {cell for cell in cells if household.held_out(category, *cell)}
    cell = lambda split, k: tuple(household.draw_factors(category, split, k)[key]
                                  for key in ("style", "palette", "part"))
    assert len(held) == 21 and {cell("train", k) for k in range(63)} == set(cells) - held
    assert sum(cell("test", k) in held for k in range(72)) == 36
    draw = lambda *seed: household.draw_factors(category, "train", 5, *seed)
    assert draw() == draw() != draw(1)


def test_several_categories_stand_in_one_folder(tmp_path, capsys):
    flags = ["--out", str(tmp_path), "--objects", "2", "--test_objects", "1", "--views", "3",
             "--holdout_views", "1", "--size", "32", "--workers", "1", "--device", "cpu"]
    stage.main([*flags, "--category", "mugs", "earphones"])
    folder = tmp_path / "our-earphones-mugs_train"
    names = load_photos(folder, 32)[-1]
    assert names == ["mugs_train_00000", "mugs_train_00001", "train_00000", "train_00001"]
    assert kinds_of(folder, names)[:2] == ["mugs", "mugs"] and kinds_of(folder, names)[2] != "mugs"
    assert json.loads((folder / "mugs_train_00001/factors.json").read_text())["kind"] == "mugs"
    assert folder.with_suffix(".png").exists()
    # Another category beside them; and again, from what is there
    stage.main([*flags, "--category", "chairs"])
    before = (tmp_path / "our-chairs_train/chairs_train_00000/rgb/000000.png").read_bytes()
    capsys.readouterr()
    stage.main([*flags, "--category", "chairs", "--fresh"])
    assert "3 now" in capsys.readouterr().out and Path(folder, names[0], "rgb").is_dir()
    assert (tmp_path / "our-chairs_train/chairs_train_00000/rgb/000000.png").read_bytes() == before
    for wrong, said in ((["mugs", "mugs"], "each once"), (["cups"], "chairs | tables")):
        with pytest.raises(UserError) as error:
            stage.main([*flags, "--category", *wrong])
        assert said in str(error.value)
    # All of them have a short name
    everything = stage.Config(category=tuple(reversed(stage.ALL)))
    assert stage.set_name(everything) == "our-all" and len(stage.ALL) == 5
    stage.main([*flags[:2], "--objects", "1", "--test_objects", "0", *flags[6:], "--category", "all"])
    assert len(load_photos(tmp_path / "our-all_train", 32)[-1]) == 5
    with pytest.raises(UserError, match="chosen by --synset"):
        stage.main([*flags, "--category", "mugs", "--shapenet", str(tmp_path)])

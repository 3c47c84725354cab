"""Several categories in one model: who is told what, that it learns to obey, and how obedience is counted."""
import json

import pytest
import torch

import autodecoder
import common
import render_shapenet
from chapters import categories
from common import UserError
from diffusion import load_denoiser
from lab import categories as lab
from sample import is_run

SMOKE = ["--preset", "smoke", "--device", "cpu"]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """A smoke-sized autodecoder of three mugs and three lamps"""
    out = tmp_path_factory.mktemp("several")
    render_shapenet.main(["--out", str(out), "--category", "mugs", "lamps", "--objects", "3",
                          "--test_objects", "3", "--views", "5", "--holdout_views", "1", "--size", "64",
                          "--workers", "1", "--device", "cpu"])
    autodecoder.main([*SMOKE, "--data", str(out / "our-lamps-mugs_train"), "--out", str(out / "stage1"),
                      "--holdout_views", "1", "--objects", "0"])
    # Forty steps are too few to bring the shapes of a category together: it is done by hand
    state = common.load_checkpoint(out / "stage1/last.pt")
    state["model"]["shapes"] += torch.tensor([3.0] * 3 + [-3.0] * 3)[:, None]
    common.save_checkpoint(out / "stage1/last.pt", state)
    return out


@pytest.fixture(scope="module")
def drawn(several, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    flags = [*SMOKE, "--autodecoder", str(several / "stage1"), "--out", str(out), "--count", "2"]
    # Codes of 16 numbers, of six objects: few steps are enough to tell mugs from lamps.  (After 350 it is not
    # yet balanced when it is told nothing)
    flags += ["--steps", "700", "--preview_every", "700", "--recombinations", "64",
              "--among", "3", "--components", "40", "--batch", "64", "--width", "64"]
    categories.main(flags)
    return out, flags


def load(folder):
    return load_denoiser(folder, "cpu", "", categories.Config, categories.CategoryDenoiser)


def test_a_mixture_of_two_categories_is_told_nothing(several, monkeypatch):
    model, names = autodecoder.load_autodecoder(several / "stage1")
    assert categories.categories_of(model.config.data, names) == 3 * ["lamps"] + 3 * ["mugs"]
    denoiser = categories.CategoryDenoiser(categories.Config(str(several / "stage1")), model)
    vectors = denoiser.written([{0}, {0, 2}, {1, 5}, {4, 3}], [0, 5, 1, 2], None)[:, 0]
    k = categories.CATEGORIES.index
    assert vectors[0].argmax() == vectors[1].argmax() == k("lamps") and vectors[3].argmax() == k("mugs")
    assert (vectors.sum(1) > 0).tolist() == [True, True, False, True]


def test_it_learns_what_it_is_told_and_draws(drawn, capsys):
    out, flags = drawn
    model, names, denoiser = load(out)
    of = categories.categories_of(model.config.data, names)
    for one in ("mugs", "lamps"):
        near = categories.nearest_category(model, categories.asked(denoiser, one, range(64)), of)
        assert near.count(one) >= 56
    denoiser.guidance = 0.0                                           # not told, it makes both
    near = categories.nearest_category(model, categories.asked(denoiser, "mugs", range(64)), of)
    assert 12 <= near.count("mugs") <= 52
    before = (out / "last.pt").read_bytes()
    categories.main(["mugs", *flags, "--first", "3"])
    assert "2 of 2 samples" in capsys.readouterr().out and (out / "last.pt").read_bytes() == before
    assert "mugs: seed 3" in (out / "drawn/viewer.html").read_text() and (out / "drawn/sheet.png").exists()
    assert is_run(out)


@pytest.mark.parametrize("flags, said", [
    (["chairs"], "knows no chairs: it knows lamps, mugs"),
    (["cups"], "all | earphones"),
    (["--autodecoder", "nowhere"], "needs stage 1 of several categories")])
def test_what_it_cannot_draw_is_one_sentence(drawn, flags, said):
    with pytest.raises(UserError) as error:
        categories.main([*flags[:1], *drawn[1], *flags[1:]] if len(flags) == 1 else [*drawn[1], *flags])
    assert said in str(error.value)


def test_other_objects_have_no_category(tmp_path):
    with pytest.raises(UserError, match="holds objects, or is not there"):
        categories.categories_of(tmp_path, ["a", "b"])


def test_obedience_is_counted(several, drawn, tmp_path, capsys):
    (several / "few").mkdir()
    (several / "few/mugs_test_00000").symlink_to(several / "our-lamps-mugs_test/mugs_test_00000")
    flags = [*SMOKE, "--diffusion", str(drawn[0]), "--out", str(tmp_path)]
    lab.main(flags)
    rows = json.loads((tmp_path / "tables.json").read_text())["rows"]
    assert {"mugs", "lamps", "told nothing", "guidance 1"} < rows.keys() and "earphones" not in rows
    assert 0 <= rows["mugs"]["as asked"] <= 1 and (tmp_path / "figure.png").exists()
    for folder, said in (("nowhere", "of unseen objects"), ("our-lamps-mugs_train", "of unseen objects"),
                         ("few", "few holds too few lamps")):
        with pytest.raises(UserError, match=said):
            lab.main([*flags, "--data", str(several / folder)])
    # A reader that has learned tells them apart, on objects that it has not seen
    photos = lab.read_photos(several / "our-lamps-mugs_test", 64, 0)
    labels = torch.tensor([categories.CATEGORIES.index(name.split("_")[0]) for name in photos.names])
    config = lab.Config(reader_steps=60, out=str(tmp_path))
    run = lab.Run(tmp_path, "reader", config, (), "reader.json", stale=())
    reader = lab.taught(photos, labels, torch.tensor([0, 1, 3, 4]), config, run)
    assert (lab.read_as(reader, photos.rgb[:, :4]) == labels).sum() >= 5

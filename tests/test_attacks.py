"""What a second attack found: each line of it is a test that failed before."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import autodecoder
import common
import diffusion
import render_shapenet
import sample
from chapters import analytic
from common import UserError, load_checkpoint, save_checkpoint
from lab import evaluate
from viewer import box, export

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def denoiser(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("attacks") / "diffusion"
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                    "--out", str(out)])
    return out


def flags(trained, out, *more):
    """A short run of stage 1 on the same photos"""
    data = load_checkpoint(trained / "last.pt")["config"]["data"]
    return ["--preset", "smoke", "--data", data, "--holdout_views", "2", "--steps", "2", "--dense_steps", "1",
            "--preview_every", "2", "--save_every", "2", "--device", "cpu", "--out", str(out), *more]


# ---- what belongs together ----

def test_unseen_photos_that_are_asked_for_are_the_ones_that_are_fitted(denoiser, data, tmp_path, cache):
    """--data was ignored where fresh objects can be made"""
    some = ["--preset", "smoke", "--no-controls", "--diffusion", str(denoiser), "--device", "cpu",
            "--cache", str(cache)]
    with pytest.raises(UserError, match="--data /nowhere is not there"):
        evaluate.main([*some, "--data", "/nowhere", "--out", str(tmp_path / "a")])
    evaluate.main([*some, "--data", str(data / "earphones_test"), "--out", str(tmp_path / "b")])
    assert "2 held-out ones with fitted codes" in (tmp_path / "b/tables.md").read_text()      # as lie there


def test_a_fingerprint_is_of_the_knobs_too(trained):
    """Two decoders of the same weights that stretch by different units are two"""
    model, _ = autodecoder.load_autodecoder(trained)
    first = autodecoder.fingerprint(model)
    model.config = replace(model.config, out="elsewhere", data="moved", save_every=7)
    assert autodecoder.fingerprint(model) == first
    model.config = replace(model.config, stretch=0.5)
    assert autodecoder.fingerprint(model) != first


def test_a_denoiser_of_another_autodecoder_is_not_packed(denoiser, tmp_path):
    state = load_checkpoint(denoiser / "last.pt")
    save_checkpoint(tmp_path / "d/last.pt", state | {"autodecoder": "another"})
    with pytest.raises(UserError, match="was trained on another autodecoder"):
        box.main(["--diffusion", str(tmp_path / "d"), "--out", str(tmp_path / "box")])
    assert not (tmp_path / "box").exists()


def test_a_box_halves_only_what_half_precision_can_hold():
    halved = box.small({"a": torch.ones(20_000), "b": torch.full((20_000,), 1e9), "c": torch.ones(5)})
    assert [some.dtype for some in halved.values()] == [torch.half, torch.float, torch.float]


def test_a_denoiser_that_is_whole_and_wrong_is_not_packed(denoiser, tmp_path):
    state = load_checkpoint(denoiser / "last.pt")
    for wrong in (state | {"config": {}}, state | {"config": state["config"] | {"autodecoder": 5}},
                  {key: value for key, value in state.items() if key != "step"}):
        save_checkpoint(tmp_path / "d/last.pt", wrong)
        with pytest.raises(UserError, match="last.pt|trained by another version"):
            box.main(["--diffusion", str(tmp_path / "d"), "--out", str(tmp_path / "box")])
    assert not (tmp_path / "box").exists()


def test_an_autodecoder_of_one_object_fits_no_other(trained, tmp_path):
    autodecoder.main(flags(trained, tmp_path / "one", "--objects", "1"))
    model, _ = autodecoder.load_autodecoder(tmp_path / "one")
    with pytest.raises(UserError, match="knows no other"):
        autodecoder.fit_codes(model, None, torch.arange(2))
    with pytest.raises(UserError, match="knows 1 objects: at least 3"):
        analytic.main(["--preset", "smoke", "--autodecoder", str(tmp_path / "one"), "--out", str(tmp_path / "a")])


# ---- checked first, deleted later ----

@pytest.mark.parametrize("wrong", [["--holdout_views", "99"], ["shared"]])
def test_what_is_refused_deletes_nothing_and_is_not_remembered(wrong, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    autodecoder.main(flags(trained, out))
    if wrong == ["shared"]:                              # as of three processes
        monkeypatch.setattr(autodecoder, "my_share", lambda items: common.wrong_flag("cannot share"))
    with pytest.raises(UserError, match="cannot share|--holdout_views 99: there are 6 photos"):
        autodecoder.main(flags(trained, out, "--fresh", *(wrong if len(wrong) > 1 else ())))
    monkeypatch.undo()
    assert (out / "last.pt").exists()
    autodecoder.main(flags(trained, out))                                          # the recipe is the old one


def test_a_strangers_models_stay(tmp_path, data):
    """A folder that was begun with --shapenet may hold a stranger's `procedural`"""
    shapes, out = ROOT / "tests/golden/ShapeNetCore.v2", tmp_path / "out"
    small = ["--views", "2", "--holdout_views", "1", "--size", "16", "--device", "cpu", "--workers", "1",
             "--out", str(out)]
    (out / "procedural").mkdir(parents=True)
    (out / "procedural/mine.txt").write_text("mine")
    render_shapenet.main([*small, "--shapenet", str(shapes)])
    render_shapenet.main([*small, "--objects", "1", "--test_objects", "1", "--fresh"])
    assert (out / "procedural/mine.txt").read_text() == "mine"


def test_sample_and_export_delete_only_what_is_named_as_theirs(denoiser, tmp_path):
    files = "s/views/seed_catalogue/a", "s/figure3.png", "e/seed_bank/mesh.blend"
    mine = [tmp_path / file for file in files]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    short = ["--diffusion", str(denoiser), "--count", "2", "--steps", "2", "--device", "cpu"]
    report = tmp_path / "s/report.json"
    (tmp_path / "elsewhere/seed_000009").mkdir(parents=True)
    (tmp_path / "s/views/seed_000009").symlink_to(tmp_path / "elsewhere/seed_000009")
    (tmp_path / "elsewhere/seed_000009/mesh.glb").write_text("mine")
    (tmp_path / "e/seed_000009").symlink_to(tmp_path / "elsewhere/seed_000009")
    (tmp_path / "s/views/seed_000008").mkdir()                 # nothing says that we have written it
    sample.main([*short, "--views", "0", "--out", str(tmp_path / "s")])
    report.write_text('{"wrote": 5}')                          # the next finds what a stranger has written
    sample.main([*short, "--views", "0", "--out", str(tmp_path / "s")])
    assert json.loads(report.read_text())["wrote"] == ["beside.png"]
    assert (tmp_path / "s/views/seed_000008").is_dir() and (tmp_path / "elsewhere/seed_000009").is_dir()
    export.main([*short, "--frames", "0", "--sheet", "0", "--resolution", "8", "--out", str(tmp_path / "e")])
    mine.append(tmp_path / "elsewhere/seed_000009/mesh.glb")
    assert all(file.read_text() == "mine" for file in mine)


@pytest.mark.parametrize("which", ["model", "denoiser"])
def test_weights_that_make_what_is_not_finite_are_one_sentence(which, denoiser, trained, tmp_path):
    first, second = load_checkpoint(trained / "last.pt"), load_checkpoint(denoiser / "last.pt")
    huge = first["model"] if which == "model" else second["denoiser"]
    for name, some in huge.items():
        if which == "model" or name.startswith("network."):
            some.copy_(3e38 * torch.where(some < 0, -1.0, 1.0))
    save_checkpoint(tmp_path / "a/last.pt", first)
    model, _ = autodecoder.load_autodecoder(tmp_path / "a")
    save_checkpoint(tmp_path / "d/last.pt", second | {"autodecoder": autodecoder.fingerprint(model)})
    with pytest.raises(UserError, match="is not finite: train"):
        sample.main(["--diffusion", str(tmp_path / "d"), "--autodecoder", str(tmp_path / "a"), "--count", "1",
                     "--device", "cpu", "--out", str(tmp_path / "s")])


def test_a_stretch_that_nothing_has_learned_is_refused(trained):
    config = SimpleNamespace(shape_of="", colours_of="", stretch=(1.0, 1.0, 1.2))
    model = SimpleNamespace(shapes=torch.zeros(2, 3), config=SimpleNamespace(stretched=0.5, stretch=0.5))
    codes = sample.exchanged(torch.zeros(1, 15), model, [], None, config)
    assert codes[0, [0, 1, *range(3, 15)]].eq(0).all() and codes[0, 2] == pytest.approx(2 * math.log(1.2))
    model.config.stretched = 0.0
    with pytest.raises(UserError, match="trained without stretched objects"):
        sample.exchanged(torch.zeros(1, 15), model, [], None, config)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.txt.tmp").symlink_to(victim)
    common.save_text(tmp_path / "a.txt", "new")
    assert victim.read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"
    assert not (tmp_path / "a.txt").is_symlink()


# ---- one bad item ----

def test_an_object_whose_name_is_a_files_does_not_end_the_export(trained, tmp_path, capsys):
    state = load_checkpoint(trained / "last.pt")
    names = ["viewer.html", *state["names"][1:]]
    save_checkpoint(tmp_path / "run/last.pt", state | {"names": names})
    export.main(["--autodecoder", str(tmp_path / "run"), "--reconstruct", "all", "--frames", "0",
                 "--level", "1", "--resolution", "8", "--device", "cpu", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "viewer.html is left out" in said and (tmp_path / "out/viewer.html").is_file()


def test_one_object_without_transforms_does_not_stop_the_others(tmp_path, capsys, monkeypatch):
    small = ["--objects", "2", "--test_objects", "1", "--views", "2", "--holdout_views", "1", "--size", "16",
             "--device", "cpu", "--workers", "1", "--out", str(tmp_path)]
    render_shapenet.main(small)
    broken, = (tmp_path / "earphones_test").glob("*/intrinsics.txt")
    broken.write_text("nonsense")
    render_shapenet.main([*small, "--transforms"])
    assert "no transforms.json" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*/*/transforms.json"))) == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_photo_that_may_not_be_read_costs_its_object_alone(tmp_path, capsys):
    from shapes.photos import objects_in
    for name in "ab":
        for sub in ("rgb", "pose"):
            (tmp_path / name / sub).mkdir(parents=True)
            (tmp_path / name / sub / "000000.png").write_text("")
    (tmp_path / "a/rgb/000000.png").chmod(0)
    assert [entry.name for entry in objects_in(tmp_path, 8)] == ["b"]
    assert "its object is left out" in capsys.readouterr().out


# ---- manners ----

@pytest.mark.parametrize("script", ["render_shapenet.py", "autodecoder.py", "diffusion.py", "sample.py",
                                    "volume_render.py", "-m lab.evaluate", "-m viewer.export"])
def test_ctrl_c_while_torch_loads_is_one_line(script, tmp_path):
    """A torch that takes Ctrl-C while it is imported"""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    (tmp_path / "numpy.py").write_text("")
    (tmp_path / "start.py").write_text(
        "import runpy, sys\nsys.path[:0] = sys.argv[1:3]\n"
        f"runpy.run_{'module' if '-m' in script else 'path'}({script.split()[-1]!r}, run_name='__main__')\n")
    done = subprocess.run([sys.executable, str(tmp_path / "start.py"), str(tmp_path), str(ROOT)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode and done.stderr == "stopped; what was written before is kept\n"


def test_processes_are_born_deaf_to_ctrl_c():
    import signal
    with render_shapenet.no_ctrl_c():
        ask = "import signal; print(int(signal.getsignal(signal.SIGINT)))"
        child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    assert int(child.stdout) == signal.SIG_IGN


@pytest.mark.parametrize("value", ["a\x1b[31mb", "a\nb", "caf\udce9\x07"])
def test_a_flag_with_control_characters_is_refused(value):
    """A folder of such a name would stand in every message, table and picture"""
    with pytest.raises(UserError, match=r"--out a\\|--out caf\\udce9"):
        common.parse_config(diffusion.Config, diffusion.PRESETS, ["--out", value])
    name = "caf\udce9"                                                   # bytes that are no UTF-8: a name
    assert common.parse_config(diffusion.Config, argv=["--out", name]).out == name


def test_a_row_whose_name_is_no_utf8_stands_in_the_tables(trained, tmp_path):
    from chapters import families
    from types import SimpleNamespace
    model, _ = autodecoder.load_autodecoder(trained)
    shape = model.config.latent_channels, *[model.config.latent_resolution] * 3
    folder = tmp_path / "caf\udce9"
    families.write_samples(folder, model, torch.randn(2, *shape), 1, 0.1)
    found, costs = evaluate.chapters(model, SimpleNamespace(rows=(str(folder),), count=2))
    assert list(found) == ["caf\\udce9"] and costs[0][0] == "caf\\udce9"
    evaluate.plot_rows({name: {"d1": (1.0, 0.1)} for name in found}, tmp_path / "figure.png")

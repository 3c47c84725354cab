"""Configuration, safe writing and pictures."""
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError


@dataclass
class Config:
    steps: int = 100               # how long
    rate: float = 0.5              # per cent: 100% is all
    head: str = "mlp"              # mlp | voxel: what reads the volume
    mirror: bool = False           # both halves at once


PRESETS = {"cpu": {"steps": 10}, "gpu": {"steps": 20, "head": "voxel"}}


def test_defaults_then_preset_then_flags():
    assert common.parse_config(Config, argv=[]) == Config()
    flags = ["--preset", "gpu", "--steps", "7", "--mirror"]
    assert common.parse_config(Config, PRESETS, flags) == Config(7, 0.5, "voxel", True)
    auto = common.parse_config(Config, PRESETS, [])
    assert auto.steps == (20 if torch.cuda.is_available() else 10)


@pytest.mark.parametrize("argv, name", [
    (["--stepz", "1"], "--stepz"),
    (["--step", "1"], "--step"),
    (["--steps", "1.5"], "--steps"),
    (["--head", "x"], "--head"),
    (["--preset", "tpu"], "--preset"),
    (["--steps"], "--steps"),
    (["more"], "more")])
def test_wrong_flags_are_named(argv, name):
    with pytest.raises(UserError, match=name) as error:
        common.parse_config(Config, PRESETS, argv)
    assert "\n" not in str(error.value)


def test_help_is_made_of_the_comments(capsys):
    with pytest.raises(SystemExit) as done:
        common.parse_config(Config, PRESETS, ["--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0 and "per cent: 100% is all (default: 0.5)" in said and "--no-mirror" in said


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/b.txt"
    with common.atomic_file(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(UserError, match="cannot write .*b.txt.*No space"):
        with common.atomic_file(path) as temporary:
            temporary.write_text("sec")
            raise OSError(28, "No space left on device")
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a/b"
    with common.atomic_folder(path) as temporary:
        (temporary / "x").write_text("1")
        assert not path.exists()
    with pytest.raises(UserError, match="cannot write .*No space"):
        with common.atomic_folder(path) as temporary:
            raise OSError(28, "No space left on device")
    assert (path / "x").read_text() == "1" and [p.name for p in path.parent.iterdir()] == ["b"]


def test_clock_and_grid(tmp_path):
    assert [common.clock(s) for s in (9, 65, 3700, 0.4)] == ["9s", "1m05s", "1h01m", "0s"]
    sheet = common.grid(torch.zeros(5, 4, 6, 3, dtype=torch.uint8), columns=3)
    assert sheet.shape == (10, 22, 3) and (sheet == 255).any()
    assert sheet[9, 0].max() == 0 and sheet[9, 21].min() == 255
    common.save_picture(tmp_path / "sheet.png", sheet)
    assert np.array_equal(Image.open(tmp_path / "sheet.png"), sheet)


def test_device():
    with pytest.raises(UserError, match="cuda"):
        torch.cuda.is_available() and pytest.skip("there is a GPU")
        common.pick_device("cuda")
    assert common.pick_device("cpu").type == "cpu"


def test_a_log_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo{"step": 3, "loss": 1.0}\n')
    common.plot_log(tmp_path, "loss", loss="loss", absent="never logged")
    assert (tmp_path / "curve.png").exists()

"""Configuration, safe writing and pictures."""
import os
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError
from shapes import photos

ROOT = Path(common.__file__).parent


@dataclass
class Config:
    steps: int = 100               # how long
    rate: float = 0.5              # per cent: 100% is all
    head: str = "mlp"              # mlp | voxel: what reads the volume
    mirror: bool = False           # both halves at once


PRESETS = {"cpu": {"steps": 10}, "gpu": {"steps": 20, "head": "voxel"}}


@dataclass
class Ranged(Config):
    count: int = 3                 # of things (at least 1)
    tilt: float = 0.0              # degrees (from -90 to 90)
    widths: tuple = (4, 2)         # of layers (at least 1)


@pytest.mark.parametrize("flag, value", [
    ("steps", "-1"), ("rate", "nan"), ("rate", "inf"), ("rate", "-0.1"), ("steps", str(1 << 63)),
    ("count", "0"), ("tilt", "-91"), ("tilt", "90.5"), ("widths", "0")])
def test_ranges_stand_in_the_comments(flag, value):
    with pytest.raises(UserError, match=f"--{flag} {value.replace('.', '[.]')}.*at least"):
        common.parse_config(Ranged, argv=[f"--{flag}", value])


def test_a_chapters_config_inherits_comments_and_ranges(capsys):
    assert common.parse_config(Ranged, argv=["--widths", "8", "9", "--tilt", "-5"]).widths == [8, 9]
    with pytest.raises(SystemExit):
        common.parse_config(Ranged, argv=["--help"])
    said = capsys.readouterr().out
    assert "per cent: 100% is all" in said and "degrees (from -90 to 90)" in said


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
    with photos.atomic_folder(path) as temporary:
        (temporary / "x").write_text("1")
        assert not path.exists()
    with pytest.raises(UserError, match="cannot write .*No space"):
        with photos.atomic_folder(path) as temporary:
            raise OSError(28, "No space left on device")
    assert (path / "x").read_text() == "1" and [p.name for p in path.parent.iterdir()] == ["b"]


def test_a_folder_that_is_replaced_is_never_lost(tmp_path, monkeypatch):
    """Killed between the two renames: the old one stands aside, and the next try brings it back first."""
    path, real = tmp_path / "b", photos.os.rename
    with photos.atomic_folder(path) as temporary:
        (temporary / "x").write_text("old")

    class Killed(BaseException):
        pass

    def rename(a, b):
        real(a, b)
        if str(b).endswith(".old"):
            raise Killed
    monkeypatch.setattr(photos.os, "rename", rename)
    with pytest.raises(Killed):
        with photos.atomic_folder(path) as temporary:
            (temporary / "x").write_text("new")
    monkeypatch.setattr(photos.os, "rename", real)
    assert (tmp_path / ".b.old/x").read_text() == "old"
    with pytest.raises(UserError):
        with photos.atomic_folder(path):
            raise OSError("full")
    assert (path / "x").read_text() == "old"


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


def test_ctrl_c_is_one_line_and_a_closed_pipe_none(tmp_path):
    def run(body, shell=""):
        line = f"{sys.executable} -c 'import common; common.command(lambda: {body})'{shell}"
        return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    done = run('(_ for _ in ()).throw(KeyboardInterrupt)')
    assert done.returncode == 1 and done.stderr == "stopped; what was written before is kept\n"
    done = run('[print("x" * 1000) for _ in range(1000)]', " | head -1")
    assert done.stderr == "" and done.stdout.startswith("xxx")
    done = run('print("x")', " >&-")                                     # closed: Python has no stdout at all
    assert done.returncode == 0 and done.stderr == ""


SCRIPTS = [path for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
           if path.parent.name != "tests" and '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_ctrl_c_in_any_script_is_one_line(path, monkeypatch):
    """A real SIGINT where each one begins, after its imports"""
    import autodecoder, diffusion
    monkeypatch.setattr(sys, "argv", [path.stem])
    for module in (common, autodecoder, diffusion):              # (a chapter begins in its stage)
        monkeypatch.setattr(module, "parse_config", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    # Where the tests themselves run in the background, SIGINT is ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(UserError, match="stopped; what was written before is kept"):
            runpy.run_path(str(path), run_name="__main__")
    finally:
        signal.signal(signal.SIGINT, before)


def test_digests_tell_apart():
    x = torch.arange(4.0)
    things = [x, x.double(), x.view(2, 2), x.bool(), [x], {"a": x}, {"b": x}, [x, x], 1, 1.0, "1", None, [],
              [[]]]
    assert len({common.digest(thing) for thing in things}) == len(things)
    assert common.digest(x[1]) == common.digest(torch.tensor(1.0))
    assert common.digest(x) == common.digest(x.clone())


def test_control_characters_in_a_message_are_written_out(tmp_path, capsys):
    assert str(UserError("a\x1b[31m\nb\udce9 \u00e9")) == "a\\x1b[31m\\nb\\udce9 \u00e9"
    common.Run(tmp_path, "test", Config(), (), stale=()).say("a\x1b[31m\nb\udce9")
    assert capsys.readouterr().out == "a\\x1b[31m\\nb\\udce9\n"


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one(tmp_path, monkeypatch, capsys):
    @dataclass
    class Config:
        out: str = ""
    begin = lambda: common.Run(tmp_path, "test", Config(), (), stale=())
    run = begin()
    run.save({"step": 1})
    run.save({"step": 2})
    run.lock.close()
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    run = begin()
    assert run.load()["step"] == 1 and "damaged" in capsys.readouterr().out

    def full(file, state):
        raise UserError("the disk is full")
    monkeypatch.setattr(common, "save_checkpoint", full)
    with pytest.raises(UserError):
        run.save({"step": 2})
    assert common.load_checkpoint(tmp_path / "previous.pt")["step"] == 1
    run.lock.close()

"""Configuration, safe writing and pictures."""
import copy
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
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
    ("count", "0"), ("tilt", "-91"), ("tilt", "90.5"), ("widths", "0"), ("count", "1000001"),
    ("widths", "1000000000")])
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


@pytest.mark.parametrize("script", ["autodecoder.py", "diffusion.py", "sample.py", "render_shapenet.py",
                                    "volume_render.py", "chapters/__init__.py", "lab/__init__.py",
                                    "viewer/__init__.py"])
def test_common_is_imported_first_because_torch_takes_seconds(script):
    found = re.search(r"^(?:from|import) (\w+)", (ROOT / script).read_text(), re.M)
    assert found[1] == "common"


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
    from shapes import convert
    monkeypatch.setattr(sys, "argv", [path.stem, "convert"])     # (the word that shapes.photos wants)
    for module in (common, autodecoder, diffusion, convert):     # (a chapter begins in its stage)
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


def test_too_little_memory_is_one_sentence_that_names_the_largest_knobs():
    def more(size):
        common.parse_config(Ranged, argv=["--widths", "70000", "--count", "9", "--steps", "5"])
        return torch.empty(size)
    for ask in (lambda: more(1 << 50), lambda: more([1 << 40, 1 << 40]),
                lambda: (more(1), bytearray(1 << 60))):
        with pytest.raises(UserError, match="memory.*knobs are --widths .70000., --count 9, --steps 5"):
            common.command(ask)
    with pytest.raises(RuntimeError, match="a bug"):                     # and no other mistake is hidden
        common.command(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_names_too_long_and_closed_folders_are_one_sentence(tmp_path):
    for path in (tmp_path / ("n" * 300), tmp_path):
        with pytest.raises(UserError, match="too long|directory"):
            common.command(lambda: path.read_text())


def special(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link": path.name}[kind])


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    special(tmp_path / "last.pt", kind)
    special(tmp_path / "config.json", kind)
    for read in (lambda: common.load_checkpoint(tmp_path / "last.pt"), lambda: common.load_newest(tmp_path)):
        with pytest.raises(UserError, match="last.pt is no file"):
            read()
    with pytest.raises(UserError, match="config.json cannot be read"):
        common.Run(tmp_path, "test", Config(), ())


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("last/data.pkl", bytes(10_000_000))
    monkeypatch.setattr(common.torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match="damaged.*size"):
        common.load_checkpoint(tmp_path / "last.pt")


def test_a_checkpoint_that_is_whole_and_wrong_is_one_sentence(tmp_path):
    file = tmp_path / "last.pt"
    for state in ([1, 2], torch.zeros(3), {"step": 1}):
        torch.save(state, file)
        with pytest.raises(UserError, match="no checkpoint of this version"):
            common.load_checkpoint(file)
    for state, part in (({"denoiser": {}, "step": 1}, "model"), ({"model": [1]}, "model"),
                        ({"step": "4"}, "step"), ({"names": "abc"}, "names"), ({"step": math.nan}, "step")):
        common.save_checkpoint(file, state)
        with pytest.raises(UserError, match=f"last.pt holds .*, where {part} .* is wanted"):
            common.load_newest(tmp_path, part)
    # Where the checkpoint before it is right, that one is taken
    common.save_checkpoint(tmp_path / "previous.pt", {"step": 3})
    assert common.load_newest(tmp_path, "step", say=print)["step"] == 3


@pytest.mark.parametrize("change", [
    dict(steps="7"), dict(steps=1.5), dict(steps=True), dict(rate=None), dict(head="x"), dict(tilt=math.nan),
    dict(count=10 ** 11), dict(widths=5), dict(widths=["a"]), dict(widths=[0]), dict(widths=[])])
def test_a_saved_config_is_checked_as_flags_are(change):
    config = vars(Ranged()) | {"widths": [4, 2], "rate": 1}                       # an int is a number too
    assert common.saved_config(Ranged, {"config": config}, "run").rate == 1
    with pytest.raises(UserError, match=f"run/last.pt: --{[*change][0]} .* is wanted"):
        common.saved_config(Ranged, {"config": config | change}, "run")


def test_weights_must_be_the_networks_own():
    linear = torch.nn.Linear(3, 2)
    right = {name: tensor + 1 for name, tensor in linear.state_dict().items()}
    assert torch.equal(common.fill(linear, right, "run").weight, right["weight"])
    with torch.device("meta"):
        fresh = torch.nn.Linear(3, 2)
    assert torch.equal(common.fill(fresh, right, "run").weight, right["weight"])
    for wrong in ({"weight": right["weight"]}, right | {"more": torch.zeros(1)},
                  right | {"bias": torch.zeros(3)}, right | {"bias": torch.zeros(2).int()},
                  right | {"bias": 1},
                  right | {"bias": torch.tensor([0, math.nan])}):
        with pytest.raises(UserError, match="run/last.pt holds (bias|more): .*, where .* is wanted"):
            common.fill(linear, wrong, "run")
    # A network of 10^12 numbers is compared, and never built
    with torch.device("meta"):
        huge = torch.nn.Linear(1_000_000, 1_000_000)
    with pytest.raises(UserError, match=r"holds weight: .*\[2, 3\], where .*\[1000000, 1000000\]"):
        common.fill(huge, right, "run")


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    run = common.Run(tmp_path, "test", Config(), ())
    special(tmp_path / "log.jsonl", "folder")
    with pytest.raises(UserError, match="cannot write the log: .*what is saved is intact"):
        run.log(1, 2)
    (tmp_path / "log.jsonl").rmdir()
    if Path("/dev/full").exists():                                       # as a full disk answers
        (tmp_path / "log.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match="cannot write the log: .*No space"):
            run.log(1, 2)
        (tmp_path / "log.jsonl").unlink()
    special(tmp_path / "log.jsonl", "pipe")                              # it would block for ever
    with pytest.raises(UserError, match="cannot write the log: .*is a pipe"):
        run.log(1, 2)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="cannot write the log: .*No such"):
        run.log(1, 2)
    run.lock.close()


def test_an_optimizers_state_must_be_its_own():
    begin = lambda: torch.optim.Adam([torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,))])
    optimizer = begin()
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    good = optimizer.state_dict()
    common.fill_optimizer(begin(), good, "run")
    def changed(change):
        state = copy.deepcopy(good)
        change(state)
        return state
    for wrong in ({}, {"state": {}, "param_groups": []}, {"state": [], "param_groups": "x"},
                  changed(lambda s: s["param_groups"][0].pop("params")),
                  changed(lambda s: s["state"][0].update(exp_avg=torch.zeros(3, 2))),
                  changed(lambda s: s["state"].update({0: 7}))):
        with pytest.raises(UserError, match="run/last.pt holds the state of another optimizer"):
            common.fill_optimizer(begin(), wrong, "run")


def test_a_damaged_checkpoint_does_not_take_the_place_of_the_good_one(tmp_path, monkeypatch, capsys):
    @dataclass
    class Config:
        out: str = ""
    begin = lambda: common.Run(tmp_path, "test", Config(), (), stale=())
    run = begin()
    run.save({"step": 1})
    run.save({"step": 2})
    run.written()
    run.lock.close()
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    run = begin()
    assert run.load()["step"] == 1 and "damaged" in capsys.readouterr().out

    def full(file, state):
        raise UserError("the disk is full")
    monkeypatch.setattr(common, "save_checkpoint", full)
    with pytest.raises(UserError, match="the disk is full"):
        run.save({"step": 2})                               # a thread writes, so the mistake shows later
        run.written()
    assert common.load_checkpoint(tmp_path / "previous.pt")["step"] == 1
    run.lock.close()


# ---- a run judges itself ----

@dataclass
class Knobs:
    steps: int = 5                 # how long
    out: str = ""                  # where


def test_a_number_is_compared_with_the_promised_one_and_never_fails():
    import diffusion
    from chapters import unet
    usual = diffusion.Config()
    say = lambda config, value: common.judge(config, diffusion.FREE, f"error {value}", value, 1, 2,
                                             "README.md")
    assert say(usual, 1.5) == "error 1.5: as expected (1 to 2)"
    assert say(usual, 3.0) == "error 3.0: not as expected (1 to 2); see README.md"
    assert "not as expected (1 to 2)" in say(usual, float("nan"))
    assert "not judged" in say(replace(usual, steps=3), 1.5) and "not judged" in say(unet.Config(), 1.5)
    assert ": as expected" in say(replace(usual, out="elsewhere", log_every=1), 1.5)


def test_the_last_line_tells_time_and_memory(capsys):
    common.command(lambda: None)
    assert re.search(r"in 0s; peak memory \d+\.\d GB", capsys.readouterr().out)


def test_a_finished_run_cannot_be_lengthened_and_says_why(tmp_path):
    config = lambda steps: Knobs(steps=steps, out=str(tmp_path))
    with common.Run(tmp_path, "stage", config(5), ("steps",)):
        pass
    with pytest.raises(UserError, match="cannot be made longer"):
        common.Run(tmp_path, "stage", config(9), ("steps",))


def test_fresh_throws_away_only_when_there_is_something_new(tmp_path):
    """Memory may run out in the first step, after the old run was to be deleted"""
    @dataclass
    class Config:
        lr: float = 1.0
        fresh: bool = False
    def run(lr, fresh):
        return common.Run(tmp_path, "stage", Config(lr, fresh), ("lr",))
    def files():
        return {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with run(1.0, False) as old:
        old.log(1, 2, loss=1)
        old.save({"step": 1})
        (tmp_path / "previews").mkdir()
        (tmp_path / "previews/step_1.png").write_bytes(b"")
    before = files()

    # It fails before it has saved, or is killed there and started again: the old run is back, whole
    with pytest.raises(MemoryError), run(2.0, True) as new:
        new.log(1, 2, loss=5)
        raise MemoryError
    assert files() == before
    process = subprocess.run([sys.executable, "-c", f"""
import os, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_common import common, dataclass
@dataclass
class Config:
    lr: float = 2.0
    fresh: bool = True
with common.Run({str(tmp_path)!r}, "stage", Config(), ("lr",)) as run:
    run.log(1, 2, loss=5)
    os._exit(9)
"""], cwd=ROOT)
    assert process.returncode == 9 and not (tmp_path / "last.pt").exists()
    run(1.0, False).lock.close()
    assert files() == before

    # Once it has saved, the old one is gone for good
    with pytest.raises(MemoryError), run(2.0, True) as new:
        new.save({"step": 7})
        new.written()
        raise MemoryError
    assert run(2.0, False).load()["step"] == 7
    assert sorted(files()) == [".config.json.lock", "config.json", "last.pt"]

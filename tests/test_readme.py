"""Every command that the README shows runs, at smoke size."""
import importlib
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

import render_shapenet
from common import UserError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [command for before in ("^    ", "`")                 # those of a line, then those of a sentence
            for command in re.findall(before + r"python ((?:-m )?(\w+(?:\.\w+)?)[^`\n#]*)", README, re.M)]
COMMANDS = list(dict.fromkeys((command.strip().removeprefix("-m "), script.removesuffix(".py"))
                              for command, script in COMMANDS if not script.startswith(("tests", "venv"))))
STAGE = "--preset smoke --steps 4 --device cpu "
SMALL = {                                      # what makes each small; of a flag given twice the last counts
    "render_shapenet": "--views 8 --holdout_views 4 --size 32 --workers 1 --device cpu ",
    "autodecoder": STAGE + "--preview_every 4 --save_every 4 --dense_steps 2 --rays 64 --fit_steps 2 "
                           "--holdout_views 4 --objects 4 ",
    "diffusion": STAGE + "--preview_every 4 --save_every 4 --channels 8,8 --holdout 1 ",
    "sample": "--count 2 --steps 2 --views 2 --size 32 --device cpu ",
    "lab.evaluate": "--preset smoke --device cpu ",
    "viewer.export": "--count 1 --frames 2 --sheet 2 --steps 2 --resolution 16 --device cpu ",
    "lab.sweep": STAGE.replace("preset", "stages").replace("steps", "steps1")
             + "--steps2 4 --count 6 --points 64 --fits 4 --hours 0.00001 --data data "}
OWN = "--objects 4 --val_objects 0 --test_objects 3 "       # of the procedural set, not of ShapeNet's


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    golden, home = ROOT / "tests/golden/ShapeNetCore.v2/03261776", folder / "home"
    for synset in ("03261776", "03001627"):                                 # stand-ins: ShapeNet, in ~
        shutil.copytree(golden, home / "ShapeNetCore.v2" / synset)
    render_shapenet.main([*shlex.split(SMALL["render_shapenet"] + OWN), "--out", str(folder / "made")])
    for place in (home / "cars_train", home / "cars_val", folder / "my_photos"):    # SRN's: without masks
        shutil.copytree(folder / "made/earphones_train", place, ignore=shutil.ignore_patterns("mask"))
    return folder


def test_the_readme_shows_commands_of_every_script():
    shown = {script for _, script in COMMANDS}
    assert set(SMALL) <= shown and all((ROOT / f"{script.replace('.', '/')}.py").exists() for script in shown)


@pytest.mark.parametrize("command, script", COMMANDS, ids=[command for command, _ in COMMANDS])
def test_a_command_of_the_readme(command, script, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home"))
    small = SMALL[script]
    if script == "render_shapenet":
        small += "--holdout 1" if "--shapenet" in command else OWN
    argv = [os.path.expanduser(word) for word in shlex.split(command)[1:]] + shlex.split(small)
    stage = importlib.import_module(script)
    if "--help" in argv:
        with pytest.raises(SystemExit) as done:
            stage.main(argv)
        assert done.value.code == 0
    elif script == "lab.sweep":                    # one run of several, then the hours are over
        with pytest.raises(UserError, match="hours 1e-05 are over"):
            stage.main(argv)
    else:
        stage.main(argv)

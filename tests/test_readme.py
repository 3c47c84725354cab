"""Every command that the READMEs show runs, at smoke size."""
import importlib
import os
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import render_shapenet
from common import UserError

ROOT = Path(__file__).parent.parent
ROOMS = ("", "shapes", "lab", "viewer", "chapters")
STAGE = "--preset smoke --steps 4 --device cpu "
SMALL = {                                      # what makes each small; of a flag given twice the last counts
    "render_shapenet": "--views 8 --holdout_views 4 --size 32 --workers 1 --device cpu ",
    "autodecoder": "--preset smoke --steps 100 --preview_every 100 --save_every 100 --dense_steps 2 "
                   "--rays 256 --holdout_views 4 --objects 4 --device cpu ",       # fog renders slowly
    "diffusion": STAGE + "--preview_every 4 --save_every 4 ",
    "sample": "--count 2 --steps 2 --views 2 --size 32 --device cpu ",
    "volume_render": "--resolution 16 --size 16 --samples 8 --device cpu ",
    "lab.evaluate": "--preset smoke --count 4 --points 64 --device cpu ",
    "lab.sweep": STAGE.replace("preset", "stages").replace("steps", "steps1")
                 + "--steps2 4 --count 4 --points 64 --fits 4 --hours 0.00001 --data data ",
    "viewer.export": "--count 1 --frames 2 --sheet 2 --steps 2 --resolution 16 --device cpu ",
    "viewer.box": "",
    "chapters.hybrid": STAGE + "--preview_every 4 --save_every 4 --dense_steps 2 --rays 64 --holdout_views 4 "
                               "--objects 4 --channels 8 ",
    "chapters.few_views": "--preset smoke --objects 2 --device cpu ",
    "chapters.find_camera": "--preset smoke --device cpu ",
    "chapters.prompt": STAGE + "--preview_every 4 --save_every 4 --count 1 ",
    "lab.obedience": "--preset smoke --device cpu ",
    "chapters.categories": STAGE + "--preview_every 4 --save_every 4 --count 1 ",
    "lab.categories": "--preset smoke --device cpu ",
    "chapters.analytic": "--preset smoke --device cpu ",
    "chapters.gaudi": STAGE + "--preview_every 4 --save_every 4 ",
    "chapters.gan3d": "--preset smoke --device cpu ",
    "chapters.autoregressive": "--preset smoke --device cpu ",
    "chapters.lift": "--preset smoke --device cpu ",
    "chapters.hierarchy": "--preset smoke --device cpu ",
    "chapters.image_gan": "--preset smoke --device cpu ",
    "chapters.render_diffusion": "--preset smoke --holdout_views 2 --device cpu ",
    "chapters.distill": "--preset smoke --device cpu ",
    "chapters.hash_codes": "--preset smoke --holdout_views 2 --steps 4 --device cpu ",
    "chapters.perceptual": "--preset smoke --holdout_views 2 --steps 4 --device cpu ",
    "chapters.cameras": "--preset smoke --holdout_views 2 --steps 4 --device cpu ",
    "shapes.moving": "--objects 2 --frames 10 --size 32 ",
    "chapters.parts": "--preset smoke --steps 4 --device cpu ",
    "lab.blind": "--preset smoke --fits 9 --device cpu ",
    "lab.fid": "--preset smoke --device cpu ",
    "chapters.families": "--device cpu ",
    "chapters.unet": STAGE + "--preview_every 4 --save_every 4 --levels 8 8 --count 2 "}
OWN = "--objects 4 --test_objects 3 "          # of the procedural set, not of ShapeNet's


def commands(room):
    """Those of a line, then those of a sentence: (words, module), each once"""
    text = (ROOT / room / "README.md").read_text()
    found = [command for before in ("^    ", "`")
             for command in re.findall(before + r"python ((?:-m )?(\w[\w.]*\w)[^`\n#]*)", text, re.M)]
    clean = [(command.strip().removeprefix("-m "), module.removesuffix(".py")) for command, module in found]
    return [(room, *one) for one in dict.fromkeys(clean) if one[1] in SMALL]


COMMANDS = [one for room in ROOMS for one in commands(room)]
FIRST = {}                   # of each chapter one command runs; of the others the flags are checked
for _, command, module in COMMANDS:
    FIRST.setdefault(module, command)
RUN = [one for one in COMMANDS if not one[2].startswith("chapters.") or FIRST[one[2]] == one[1]]


@pytest.fixture(scope="module")
def made(cache, tmp_path_factory):
    """Stand-ins: ShapeNet in ~, SRN's data, photos of one's own"""
    folder = tmp_path_factory.mktemp("readme")
    golden, home = ROOT / "tests/golden/ShapeNetCore.v2/03261776", folder / "home"
    for synset in ("03261776", "03001627"):
        shutil.copytree(golden, home / "ShapeNetCore.v2" / synset)
    render_shapenet.main([*shlex.split(SMALL["render_shapenet"] + OWN), "--out", str(folder / "made")])
    photo = next((folder / "made/earphones_train").glob("*/rgb/000000.png"))
    shutil.copy(photo, folder / "my.png")
    (folder / "pretrained").symlink_to(ROOT / "pretrained")
    cache.mkdir(exist_ok=True)
    (folder / "runs").mkdir()
    (folder / "runs/fresh_smoke").symlink_to(cache)
    for place in (home / "cars_train", home / "cars_val", folder / "my_photos"):    # SRN's: without masks
        shutil.copytree(folder / "made/earphones_train", place, ignore=shutil.ignore_patterns("mask"))
    return folder


def test_the_readmes_show_commands_of_every_script():
    assert set(SMALL) - {"volume_render", "viewer.box"} <= {module for _, _, module in COMMANDS}
    for room in (*ROOMS, "results", "tests"):
        text = (ROOT / room / "README.md").read_text()
        for link in re.findall(r"\]\(([^)#:]+)[)#]", text):
            assert (ROOT / room / link).exists(), (room, link)
        for line in re.findall(r"^    python .*", text, re.M):
            assert len(line) <= 84 and "#" not in line, line
            module = re.match(r" +python (?:-m )?([\w./]+)", line)[1].removesuffix(".py").replace(".", "/")
            assert (ROOT / f"{module}.py").exists(), line
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_the_other_commands_of_chapters_have_flags_that_exist():
    others = [one for one in COMMANDS if one not in RUN]
    assert len(others) >= 5
    for _, command, module in others:
        Config = importlib.import_module(module).Config
        flags = re.findall(r"--(?:no-)?(\w+)", command)
        assert set(flags) <= {field.name for field in fields(Config)} | {"preset"}, command


@pytest.mark.parametrize("room, command, module", RUN, ids=[f"{r} {c}" for r, c, _ in RUN])
def test_a_command_of_a_readme(room, command, module, made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setenv("HOME", str(made / "home"))
    small = SMALL[module]
    if module == "render_shapenet":
        small += "--holdout 1" if "--shapenet" in command else OWN
    argv = [os.path.expanduser(word) for word in shlex.split(command)[1:]] + shlex.split(small)
    stage = importlib.import_module(module)
    if "--help" in argv:
        with pytest.raises(SystemExit) as done:
            stage.main(argv)
        assert done.value.code == 0
    elif module == "lab.sweep":                # one run of several, then the hours are over
        few = [(str(n), dict(objects=n, steps=4), dict(mix=0.0)) for n in (3, 4)]
        monkeypatch.setitem(stage.SWEEPS, "objects", few)
        with pytest.raises(UserError, match="hours 1e-05 are over"):
            stage.main(argv)
    elif module == "lab.fid":                  # whose weights nobody has here
        with pytest.raises(UserError, match="cannot be read"):
            stage.main(argv)
    else:
        stage.main(argv)

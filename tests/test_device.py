"""A forgotten .to(device) is found without a GPU: all stages on a device that only pretends to be one."""
import common
import pytest
import torch

import autodecoder
import diffusion
import far
import sample
from lab import evaluate
from shapes.packed import read_photos
from viewer import export


@pytest.fixture
def pretended(monkeypatch):
    far.pretend(monkeypatch)
    for module in (autodecoder, diffusion, sample, evaluate, export):
        monkeypatch.setattr(module, "pick_device", lambda name: far.DEVICE)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """-> the folder of the stages' runs, and a function that runs a stage in it"""
    folder = tmp_path_factory.mktemp("device")

    def run(main, *flags):
        main([str(flag).replace("HERE", str(folder)) for flag in flags])
        return folder
    return run


STAGES = {
    "autodecoder": (autodecoder.main, "--preset", "smoke", "--precision", "float32", "--size", 32,
                    "--objects", 3, "--holdout_views", 2, "--steps", 4, "--dense_steps", 2,
                    "--preview_every", 4, "--out", "HERE/autodecoder"),
    "diffusion": (diffusion.main, "--preset", "smoke", "--steps", 4, "--preview_every", 4,
                  "--autodecoder", "HERE/autodecoder", "--out", "HERE/diffusion"),
    "sample": (sample.main, "--diffusion", "HERE/diffusion", "--count", 2, "--views", 1, "--size", 32,
               "--out", "HERE/sample"),
    "export": (export.main, "--diffusion", "HERE/diffusion", "--count", 2, "--size", 24,
               "--out", "HERE/export"),
    "evaluate": (evaluate.main, "--preset", "smoke", "--diffusion", "HERE/diffusion",
                 "--out", "HERE/evaluate"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_on_a_device(stage, run, data, cache, pretended):
    main, *flags = STAGES[stage]
    if stage == "autodecoder":
        flags += ["--data", data / "earphones_train"]
    if stage == "evaluate":
        flags += ["--data", data / "earphones_test", "--cache", cache]
    out = run(main, *flags) / stage
    wanted = {"sample": "sheet.png", "export": "viewer.html", "evaluate": "tables.md"}
    assert (out / wanted.get(stage, "last.pt")).is_file()


def test_new_objects_are_fitted_on_a_device(run, data, pretended):
    folder = run(lambda flags: None)
    model, _ = autodecoder.load_autodecoder(folder / "autodecoder", far.DEVICE)
    photos = read_photos(data / "earphones_test", 32, 2)
    codes = autodecoder.fit_codes(model, photos, torch.arange(3), steps=2)
    assert codes.device == far.DEVICE and codes.cpu().isfinite().all()


def test_a_tensor_on_the_wrong_device_is_found(run, data, pretended, monkeypatch):
    """A mistake is planted: the stretches stay on the CPU"""
    real = autodecoder.Autodecoder.code
    monkeypatch.setattr(autodecoder.Autodecoder, "code",
                        lambda model, s, a, stretch: real(model, s, a, stretch.cpu()))
    main, *flags = STAGES["autodecoder"]
    with pytest.raises(RuntimeError, match="is on the CPU, others are on the device"):
        run(main, *flags[:-1], "HERE/wrong", "--data", data / "earphones_train")
    x = torch.ones(2, 2).to(far.DEVICE)
    with pytest.raises(RuntimeError, match="add: a tensor"):
        x + torch.ones(2, 2)
    assert (x + torch.tensor(1.0)).device == far.DEVICE and x[torch.tensor([0])].device == far.DEVICE
    assert common.digest(x) == common.digest(torch.ones(2, 2))

"""Several processes train as one does: torchrun with two on the CPU, by gloo."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent


def start(script, *flags, processes=2):
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([sys.executable, *many * (processes > 1), script, *map(str, flags)],
                            cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


def finish(*arguments, **more):
    process = start(*arguments, **more)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


def losses(folder):
    rows = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return torch.tensor([[row["step"], row["loss"]] for row in rows if "loss" in row])


def stage1(data, out, steps=50):
    return ("autodecoder.py", "--preset", "smoke", "--data", data / "earphones_train", "--objects", 3,
            "--size", 32, "--holdout_views", 2, "--batch_objects", 2, "--steps", steps, "--preview_every", 50,
            "--log_every", 1, "--save_every", 10, "--device", "cpu", "--precision", "float32", "--out", out)


@pytest.fixture(scope="module")
def both(data, tmp_path_factory):
    """Stage 1 and stage 2, by one process and by two"""
    folder = tmp_path_factory.mktemp("processes")
    for name, count in (("one", 1), ("two", 2)):
        finish(*stage1(data, folder / name / "autodecoder"), processes=count)
        finish("diffusion.py", "--preset", "smoke", "--autodecoder", folder / "one/autodecoder",
               "--steps", 50, "--log_every", 1, "--device", "cpu", "--out", folder / name / "diffusion",
               processes=count)
    return folder


@pytest.mark.parametrize("stage", ["autodecoder", "diffusion"])
def test_two_processes_train_as_one(both, stage):
    one, two = losses(both / "one" / stage), losses(both / "two" / stage)
    assert len(one) == 50 and torch.equal(one[:, 0], two[:, 0])
    assert (one[:, 1] - two[:, 1]).abs().max() < 1e-4
    assert one[:, 1].std() > 1e-3                                        # it is no straight line
    if stage == "autodecoder":                                           # and it falls
        assert one[-10:, 1].mean() < 0.8 * one[:10, 1].mean()


def test_the_first_process_alone_writes(both, data):
    files = lambda folder: sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert files(both / "one") == files(both / "two")
    state = common.load_checkpoint(both / "two/autodecoder/last.pt")
    assert state["step"] == 50
    # One process goes on where two have been, if the recipe is the same
    said = finish(*stage1(data, both / "two/autodecoder"), processes=1)
    assert "going on from step 50" in said


def children(pid):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(word) for word in found.split()]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_one_process_ends_and_the_others_follow(data, tmp_path, number):
    process = start(*stage1(data, tmp_path / "run", steps=100_000))
    log = tmp_path / "run/last.pt"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.2)
    os.kill(children(process.pid)[1], number)
    began = time.time()
    said = process.communicate(timeout=60)[0]
    assert time.time() - began < 30
    wanted = "another process of this run" if number == signal.SIGKILL else "stopped by"
    assert wanted in said, said
    assert common.load_checkpoint(log)["step"] >= 10


def test_a_batch_that_cannot_be_shared_is_one_sentence(data, tmp_path):
    said = start(*stage1(data, tmp_path), "--batch_objects", 3).communicate()[0]
    assert "2 processes cannot share the 3 items of a batch equally" in said

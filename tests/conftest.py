import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:                  # several at a time (pytest -n 2): a core for each
    os.environ["OMP_NUM_THREADS"] = "1"                  # and for the processes that it starts

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
SMOKE = ["--preset", "smoke", "--steps", "12", "--preview_every", "12", "--save_every", "4",
         "--dense_steps", "4", "--rays", "64", "--device", "cpu"]


def train(data, out, *more):
    import autodecoder
    autodecoder.main([*SMOKE, "--data", str(data / "earphones_train"), "--holdout_views", "2",
                      "--out", str(out), *more])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Three small earphones to train on and two to test on"""
    import render_shapenet
    out = tmp_path_factory.mktemp("data")
    render_shapenet.main(["--out", str(out), "--objects", "3", "--test_objects", "2",
                          "--views", "4", "--holdout_views", "2", "--size", "32", "--workers", "1"])
    return out


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder where the lab keeps its fresh objects, and the network that reads them, for all tests"""
    return tmp_path_factory.mktemp("lab") / "fresh"


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A smoke-sized autodecoder of them, trained until space is empty: fog takes long to render"""
    out = tmp_path_factory.mktemp("runs") / "autodecoder"
    train(data, out, "--steps", "150", "--rays", "256", "--preview_every", "150", "--save_every", "75")
    return out

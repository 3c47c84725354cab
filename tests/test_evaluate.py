"""The comparison with fresh objects: its distance by brute force, its identities, and a run of it all."""
import json

import pytest
import torch

import diffusion
import evaluate as stage
from common import UserError


def brute(a, b):
    mean = lambda pairs: sum(pairs) / len(pairs)
    between = mean([(x - y).norm().item() for x in a for y in b])
    others = lambda s: [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
    within = lambda s: mean([(s[i] - s[j]).norm().item() for i, j in others(s)])
    return 2 * between - within(a) - within(b)


def test_energy_distance_is_its_formula():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 5, generator=g), torch.randn(9, 5, generator=g) + 1
    assert abs(stage.energy_distance(a, b).item() - brute(a, b)) < 1e-4
    # an object drawn twice counts twice, and is no pair with itself
    twice = torch.tensor([[2.0, 0, 1, 1, 0, 1, 1, 3, 0]])
    far = (twice[0] / twice.sum()) @ torch.cdist(b, a).mean(1)
    others = [(i, j) for i in range(9) for j in range(9) if i != j]
    counts = [(twice[0, i] * twice[0, j]).item() for i, j in others]
    within_b = sum(n * (b[i] - b[j]).norm().item() for n, (i, j) in zip(counts, others)) / sum(counts)
    within_a = sum((x - y).norm().item() for x in a for y in a) / 42
    assert abs(stage.energy_distance(a, b, twice).item() - (2 * far.item() - within_a - within_b)) < 1e-4


def test_energy_distance_tells_sets_apart():
    g = torch.Generator().manual_seed(1)
    draw = lambda shift: torch.randn(300, 4, generator=g) + shift
    same, apart = stage.energy_distance(draw(0), draw(0)), stage.energy_distance(draw(0), draw(0.7))
    assert abs(same) < 0.05 and apart > 0.2


def test_gaussian_has_the_points_mean_and_covariance():
    g = torch.Generator().manual_seed(2)
    points = torch.randn(50, 2, 3, generator=g) @ torch.randn(3, 3, generator=g) + 5
    drawn = stage.gaussian(points, 40_000, g)
    assert (drawn.mean(0) - points.mean(0)).abs().max() < 0.1
    assert (drawn.flatten(1).T.cov() - points.flatten(1).T.cov()).abs().max() < 0.15


def test_a_run_from_end_to_end(trained, data, tmp_path, capsys):
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                    "--out", str(tmp_path / "diffusion")])
    arguments = ["--diffusion", str(tmp_path / "diffusion"), "--data", str(data / "earphones_test"),
                 "--count", "6", "--out", str(tmp_path / "out"), "--resamplings", "20"]
    stage.main(arguments)
    first = (tmp_path / "out/table.json").read_text()
    stage.main(arguments)
    said = capsys.readouterr().out
    assert said.count("fitting the codes") == 1 and (tmp_path / "out/table.json").read_text() == first
    rows = json.loads(first)["rows"]
    assert rows["ours"]["more_than_ours"] == 0 and rows["training objects"]["copies"] == 0
    with pytest.raises(UserError, match="--count 2"):
        stage.main([*arguments, "--count", "2"])

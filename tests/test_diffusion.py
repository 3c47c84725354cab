"""Stages 2 and 3: schedules by hand, samplers on data whose ideal denoiser is known, resume, and what a user
gets told."""
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import autodecoder
import common
import diffusion as stage
import sample
from shapes.photos import load_photos
from viewer import box
from common import UserError
from conftest import train as train_autodecoder

ROOT = Path(__file__).parent.parent
SMOKE = ["--preset", "smoke", "--steps", "12", "--preview_every", "6", "--save_every", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def diffused(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "diffusion"
    train(trained, out)
    return out


def train(trained, out, *more):
    stage.main([*SMOKE, "--autodecoder", str(trained), "--out", str(out), *more])


def low_rank(count, rank=6, shape=(16, 8, 8, 8), seed=0):
    """Gaussian latents about a mean, in a few of thousands of dimensions"""
    g = torch.Generator().manual_seed(seed)
    ways = torch.linalg.qr(torch.randn(math.prod(shape), rank, generator=g))[0].T
    ways = ways * torch.linspace(40, 10, rank)[:, None]
    g = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(count, rank, generator=g) @ ways + 0.3).view(count, *shape)


def fitted(latents, steps, seed=0, **options):
    """A denoiser trained on latents, as main() trains it"""
    config = replace(stage.Config(), **{"width": 128, "layers": 1, "components": 64, "batch": 64, **options})
    config.components = min(config.components, len(latents))
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    denoiser = stage.Denoiser(config, latents.shape[1:])
    denoiser.fit(latents, latents[:0], g)
    data, optimizer = denoiser.to_components(latents), torch.optim.Adam(denoiser.network.parameters(), 2e-3)
    for _ in range(steps):
        z = data[torch.randint(len(data), (config.batch,), generator=g)]
        u = (torch.arange(len(z)) + torch.rand(len(z), generator=g)) / len(z)
        loss = stage.denoising_loss(denoiser, z, torch.randn(z.shape, generator=g), u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.eval().requires_grad_(False)


# ---- normalisation ----

def test_robust_norm_is_the_formula_and_inverts():
    latents = torch.randn(20, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5, 0.1, 2]).view(4, 1, 1, 1) + torch.arange(27.0).view(3, 3, 3)
    norm = stage.RobustNorm(latents.shape[1:])
    norm.fit(latents)
    assert torch.allclose(norm.denormalize(norm.normalize(latents)), latents, atol=1e-4)
    left = (latents - latents.mean(0)).numpy()
    for channel in range(4):
        q25, q50, q75 = np.quantile(left[:, channel], (0.25, 0.5, 0.75), method="nearest")
        scale = 0.7413 * (q75 - q25)                           # (tolerances: quantiles between two values)
        assert abs(norm.shift[channel].item() - q50) < 0.02 * scale
        assert abs(norm.scale[channel] - scale) < 0.02 * scale


def test_outliers_do_not_move_the_robust_norm():
    latents = torch.randn(400, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    spoilt = latents.clone()
    spoilt.view(-1)[::1001] = 300.0
    scales = []
    for some in (latents, spoilt):
        norm = stage.RobustNorm(some.shape[1:])
        norm.fit(some)
        scales.append(norm.scale.mean().item())
    assert scales[1] < 1.2 * scales[0] and spoilt.std() > 8 * latents.std()


# ---- noise levels ----

def test_posterior_entropy_of_two_points():
    """Two points a distance 2 apart, in a space of 30 dimensions: a line's integral knows the answer."""
    points = torch.zeros(2, 30)
    points[0, 3], points[1, 3] = 1.0, -1.0
    sigmas = [0.05, 0.7, 2.0, 500.0]
    ours = stage.posterior_entropy(points, sigmas, torch.Generator().manual_seed(0), draws=20000)
    for sigma, value in zip(sigmas, ours):
        x = np.linspace(1 - 8 * sigma, 1 + 8 * sigma, 20001)
        density = np.exp(-((x - 1) / sigma) ** 2 / 2) / (sigma * math.sqrt(2 * math.pi))
        p = 1 / (1 + np.exp(np.clip(-2 * x / sigma ** 2, -700, 700)))
        entropy = -(p * np.log(p + 1e-300) + (1 - p) * np.log(1 - p + 1e-300)) / math.log(2)
        assert abs(value.item() - (density * entropy).sum() * (x[1] - x[0])) < 0.01


def test_levels_are_where_the_choice_is():
    denoiser = fitted(low_rank(40), 0)
    points = denoiser.to_components(low_rank(40))
    sigma = denoiser.level(torch.linspace(0, 1, 101))
    entropy = stage.posterior_entropy(points, sigma.tolist(), torch.Generator().manual_seed(1))
    assert (sigma.diff() > 0).all() and entropy[0] < 0.01 and entropy[-1] > 0.9
    between = ((entropy > 0.02) & (entropy < 0.9)).float().mean()
    evenly = torch.linspace(sigma[0].log(), sigma[-1].log(), 101).exp()
    entropy = stage.posterior_entropy(points, evenly.tolist(), torch.Generator().manual_seed(1))
    assert between > 1.3 * ((entropy > 0.02) & (entropy < 0.9)).float().mean()


def test_levels_are_those_of_the_table_and_between():
    denoiser = fitted(low_rank(20), 0)
    assert len(denoiser.levels) == 1000 and (denoiser.levels.diff() > 0).all()
    places = torch.tensor([0.0, 500 / 999, 1.0])
    assert torch.allclose(denoiser.level(places), denoiser.levels[[0, 500, 999]], rtol=1e-4)
    middle = denoiser.level(torch.tensor([500.5 / 999])).item()
    assert denoiser.levels[500] < middle < denoiser.levels[501]


def test_level_embedding_golden():
    found = stage.level_embedding(torch.tensor([0.25]), 3)[0]
    frequency = [100.0, 10.0, 1.0]
    expected = [*(math.sin(0.25 * f) for f in frequency), *(math.cos(0.25 * f) for f in frequency)]
    assert np.allclose(found, expected, atol=1e-5)
    assert abs(found[0] + 0.132352) < 1e-5                                       # sin 25


# ---- the formulations ----

class Seen(torch.nn.Module):
    """A network that keeps what it is given, and says 0, or something of its own"""

    def __init__(self, answer=0.0):
        super().__init__()
        self.answer = answer

    def forward(self, x, level):
        self.x = x
        return torch.zeros_like(x) + self.answer


def with_network(deviation, network, formulation="edm", low=0.02, high=80.0):
    """A denoiser of `deviation`'s numbers by a network given, in float64"""
    denoiser = stage.Denoiser(replace(stage.Config(), components=len(deviation), width=1, layers=0,
                                      formulation=formulation), (len(deviation), 1, 1, 1)).double()
    denoiser.deviation.copy_(deviation)
    denoiser.levels.copy_(torch.linspace(math.log(low), math.log(high), stage.LEVELS).exp())
    denoiser.basis.copy_(torch.eye(len(deviation)))
    denoiser.network = network
    return denoiser


def test_preconditioning_gives_unit_variance():
    g = torch.Generator().manual_seed(0)
    deviation = torch.tensor([30.0, 3.0, 0.2], dtype=torch.float64)
    z, noise = deviation * torch.randn(200_000, 3, generator=g), torch.randn(200_000, 3, generator=g)
    for sigma in (0.1, 1.0, 20.0, 300.0):
        x, level = z + sigma * noise, torch.full((len(z), 1), sigma, dtype=torch.float64)
        network = Seen()
        skipped = with_network(deviation, network).denoise(x, level)                 # c_skip x
        assert (network.x.std(0) - 1).abs().max() < 0.01                             # c_in x
        c_out = with_network(deviation, Seen(1.0)).denoise(x, level) - skipped
        assert (((z - skipped) / c_out).std(0) - 1).abs().max() < 0.01
    # with one deviation for all: the table of Karras et al.
    one = with_network(torch.tensor([0.5]), Seen())
    found = one.denoise(torch.ones(1, 1).double(), torch.full((1, 1), 2.0).double()).item()
    assert abs(found - 0.25 / 4.25) < 1e-6
    assert abs(one.network.x.item() - 1 / 4.25 ** 0.5) < 1e-6


@pytest.mark.parametrize("formulation", ["ddpm", "edm"])
def test_the_loss_is_that_of_the_papers(formulation):
    """DDPM: the squared error of the predicted noise, x' = sqrt(a) z + sqrt(1 - a) n.  EDM: the squared error of
    the network's output against (z - c_skip x) / c_out.  Both in float64, by their own formulas."""
    g = torch.Generator().manual_seed(0)
    deviation = torch.tensor([7.0, 0.4], dtype=torch.float64)
    z, n = deviation * torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g).double()
    u = torch.rand(5, generator=g).double()
    network = torch.nn.Sequential(torch.nn.Linear(2, 2)).double()
    wrapped = Seen()
    wrapped.forward = lambda x, level: network(x)
    denoiser = with_network(deviation, wrapped, formulation)
    ours = stage.denoising_loss(denoiser, z, n, u)
    if formulation == "ddpm":
        sigma = denoiser.levels[(u * 1000).long()][:, None]
        a = 1 / (1 + sigma ** 2)                                                     # alpha_bar
        x = a.sqrt() * z + (1 - a).sqrt() * n
        total = (a * deviation ** 2 + 1 - a).sqrt()
        # the best linear guess of the noise, and what the network adds: its sign is EDM's, flipped
        guess = (1 - a).sqrt() * x / total ** 2 - a.sqrt() * deviation / total * network(x / total)
        expected = (guess - n).square().mean(1)
    else:
        sigma = denoiser.level(u)[:, None]
        total = (sigma ** 2 + deviation ** 2).sqrt()
        x = z + sigma * n
        target = (z - deviation ** 2 / total ** 2 * x) / (sigma * deviation / total)
        expected = (network(x / total) - target).square().mean(1)
    assert torch.allclose(ours, expected, rtol=1e-9)


def test_a_place_that_rounds_up_to_1_is_the_last_level():
    """float32: (1023 + 0.99999) / 1024 is 1"""
    denoiser = with_network(torch.tensor([1.0, 2.0]), Seen(), "ddpm").float()
    u = (torch.tensor([1023.0]) + 0.99999) / 1024
    assert u.item() == 1
    assert stage.denoising_loss(denoiser, torch.ones(1, 2), torch.ones(1, 2), u).isfinite().all()


def test_heun_converges_at_second_order_on_a_gaussian():
    """A network that says 0 leaves the ideal denoiser of a Gaussian, D(x) = c_skip x"""
    deviation, errors = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64), []
    start = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(k)) for k in range(8)])
    for steps in (16, 32, 64):
        ours = stage.sample(with_network(deviation, Seen()), range(8), steps, "heun").flatten(1)
        errors.append((ours / (start * deviation) - 1).abs().max().item())
    assert 2.8 < errors[0] / errors[1] < 6 and errors[1] / errors[2] > 2.5, errors


def test_an_ancestral_step_by_hand():
    """Numbers, against Bayes' rule in DDPM's own variables: q(x' | x, z) from q(x | x') q(x' | z)"""
    z, x, now, after = 1.3, 3.1, 2.0, 1.5                                            # x = z + now * noise
    a, b = 1 / (1 + now ** 2), 1 / (1 + after ** 2)                                  # alpha_bar
    alpha = a / b
    precision = alpha / (1 - alpha) + 1 / (1 - b)
    mean = (math.sqrt(alpha) * math.sqrt(a) * x / (1 - alpha) + math.sqrt(b) * z / (1 - b)) / precision
    denoiser = SimpleNamespace(denoise=lambda x, sigma: torch.full_like(x, z))
    levels = torch.tensor([now, after], dtype=torch.float64)
    start = torch.tensor([[x]], dtype=torch.float64)
    still, moved = (next(iter(stage.ancestral_sample(denoiser, start, levels, lambda: noise)))[2].item()
                    for noise in (torch.zeros(1, 1).double(), torch.ones(1, 1).double()))
    assert abs(still - mean / math.sqrt(b)) < 1e-12
    assert abs(moved - still - precision ** -0.5 / math.sqrt(b)) < 1e-12


def test_ancestral_sampling_of_a_gaussian():
    """The ideal denoiser of a Gaussian: its variance comes out."""
    deviation = torch.tensor([3.0, 0.3], dtype=torch.float64)
    denoiser = with_network(deviation, Seen())
    x = stage.sample(denoiser, range(2000), 400, "ancestral").flatten(1)
    assert (x.std(0) / deviation - 1).abs().max() < 0.06 and (x.mean(0) / deviation).abs().max() < 0.07


@pytest.mark.parametrize("formulation", ["edm", "ddpm"])
def test_low_rank_latents_are_sampled_with_their_variance(formulation):
    latents = low_rank(300)
    denoiser = fitted(latents, 400, formulation=formulation)
    samples = stage.sample(denoiser, range(200), 18 if formulation == "edm" else 200)
    spread = lambda x: (x - latents.mean(0)).square().sum() / len(x)
    assert 0.8 < spread(samples) / spread(latents) < 1.2
    assert sample.outside_span(samples, latents).max() < 0.05


def test_latents_are_really_used():
    """Each element drawn from another object: the same marginals, none of the structure.  Samples of it must
    lie elsewhere: their part outside the real latents' span is large."""
    latents, g = low_rank(100), torch.Generator().manual_seed(3)
    real, other = (sample.outside_span(stage.sample(fitted(some, 100), range(32)), latents).median()
                   for some in (latents, stage.shuffled(latents, g)))
    assert other > 0.5 and other > 5 * real


# ---- the denoisers ----

@pytest.mark.parametrize("options, shape", [
    ({}, (16, 8, 8, 8)),
    ({"components": 20, "width": 64, "layers": 0}, (3, 4, 4, 4)),
    ({"embedding": 7}, (16, 8, 8, 8))])
def test_denoisers(options, shape):
    denoiser = stage.Denoiser(replace(stage.Config(), **options), shape)
    torch.nn.init.normal_(denoiser.basis)
    assert sum(p.numel() for p in denoiser.network.parameters()) < 5e6
    x = denoiser.to_components(torch.randn(2, *shape))
    assert denoiser.to_latents(x).shape == (2, *shape)
    # begins as the best linear denoiser
    assert denoiser.network(x, torch.zeros(2)).abs().max() == 0
    for p in denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    a = denoiser.network(x, torch.tensor([0.0, 0.0]))
    b = denoiser.network(x, torch.tensor([0.0, 1.0]))
    assert a.shape == x.shape
    assert torch.allclose(a[0], b[0], atol=1e-5)
    assert (a[1] - b[1]).abs().max() > 1e-4                                      # level is used
    a.sum().backward()
    assert all(p.grad is not None for p in denoiser.network.parameters())


def test_principal_components_are_orthonormal_and_enough():
    latents = low_rank(50)
    basis = stage.principal((latents - latents.mean(0)).flatten(1), 6)
    assert torch.allclose(basis @ basis.T, torch.eye(6), atol=1e-4)
    x = (latents - latents.mean(0)).flatten(1)
    assert (x - x @ basis.T @ basis).norm() < 1e-3 * x.norm()


def test_mixtures_are_convex_and_of_neighbours():
    codes = torch.cat([torch.eye(4), 100 + torch.eye(4)])
    g = torch.Generator().manual_seed(0)
    near = stage.code_mixtures(codes, 200, g, 4)
    far = stage.code_mixtures(codes, 200, g)
    assert ((near.mean(1) < 2) | (near.mean(1) > 98)).all()
    assert not ((far.mean(1) < 2) | (far.mean(1) > 98)).all()
    assert (near.sum(1) - near.sum(1).round()).abs().max() < 1e-2                # shares add up to one
    low = near[near.mean(1) < 2]
    assert low.min() >= 0 and (low.sum(1) - 1).abs().max() < 1e-5


# ---- running it ----

def test_training_writes_and_samples(diffused, trained, tmp_path, capsys):
    for name in ("last.pt", "previous.pt", "config.json", "log.jsonl", "levels.png",
                 "curve.png", "previews/step_000012.png"):
        assert (diffused / name).exists(), name
    row = json.loads((diffused / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "low", "middle", "high"} <= set(row)
    sample.main(["--diffusion", str(diffused), "--count", "3", "--views", "2", "--size", "32",
                 "--out", str(tmp_path / "s")])
    said = capsys.readouterr().out
    assert "sampling from" in said and "s each" in said
    assert "outside the span, 95th" in said and "kinds of the nearest" in said
    photos, masks, poses, intrinsics, names = load_photos(tmp_path / "s/views", 32)
    assert photos.shape == (3, 2, 32, 32, 3) and masks is not None and names[0] == "seed_000000"
    rows = json.loads((tmp_path / "s/report.json").read_text())["rows"]
    counts = {name: len(some) for name, some in rows.items()}
    assert counts == {"samples": 3, "training objects": 3, "code mixtures": 128}
    assert max(row["outside"] for row in rows["training objects"]) < 1e-3
    assert np.array(Image.open(tmp_path / "s/sheet.png")).shape[0] > 3 * 128
    assert (tmp_path / "s/figure3.png").exists()


def test_a_sample_is_the_same_in_any_batch(diffused):
    denoiser, _ = stage.load_denoiser(diffused)
    together = stage.sample(denoiser, range(5, 12), 6)
    alone = stage.sample(denoiser, [9], 6)
    assert (together[4] - alone[0]).abs().max() < 1e-4 * together.abs().max()
    assert (together[4] - together[5]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [["--formulation", "ddpm"], ["--mix", "0", "--shuffle"],
                                     ["--layers", "0"]])
def test_each_variant_runs(trained, tmp_path, options):
    train(trained, tmp_path / "run", *options)
    denoiser, _ = stage.load_denoiser(tmp_path / "run")
    for sampler in ("", "heun", "ancestral"):
        assert stage.sample(denoiser, range(2), 4, sampler).isfinite().all()


def weights(out):
    state = common.load_checkpoint(out / "last.pt")
    moments = {f"{k}.{n}": t for k, s in state["optimizer"]["state"].items() for n, t in s.items()}
    return state["step"], {**state["denoiser"], **{f"raw.{k}": p for k, p in state["raw"].items()}, **moments}


def test_resume_is_bit_exact(trained, diffused, tmp_path):
    """Killed after 6 of 12 steps (a checkpoint holds 4), then the same command again."""
    code = ("import diffusion as stage, sys, os\n"
            "real, calls = stage.denoising_loss, []\n"
            "def loss(*a):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 7: os._exit(9)\n"
            "    return real(*a)\n"
            "stage.denoising_loss = loss\n"
            "stage.main(sys.argv[1:])\n")
    arguments = [*SMOKE, "--autodecoder", str(trained), "--out", str(tmp_path / "run")]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=threads,
                          capture_output=True)
    assert done.returncode == 9 and weights(tmp_path / "run")[0] == 4, done.stderr
    train(trained, tmp_path / "run")
    (step, ours), (step2, whole) = weights(tmp_path / "run"), weights(diffused)
    assert step == step2 == 12 and len(ours) == len(whole)
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


# ---- what a user gets told ----

def told(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_mistakes_get_one_sentence(trained, diffused, data, tmp_path):
    told(lambda: train(tmp_path / "none", tmp_path / "x"), "none/last.pt", "python autodecoder.py")
    told(lambda: train(trained, tmp_path / "x", "--mix", "1.5"), "--mix 1.5")
    told(lambda: train(trained, tmp_path / "x", "--batch", "0"), "--batch 0", "at least 1")
    told(lambda: train(trained, tmp_path / "x", "--low", "0"), "--low 0", "at least 0.0001")
    told(lambda: train(trained, tmp_path / "x", "--lr", "inf"), "--lr inf")
    told(lambda: sample.main(["--sampler", "euler"]), "--sampler euler", "heun or ancestral")
    told(lambda: train(diffused, tmp_path / "x"), "stage 1's model", "something else",
         "python autodecoder.py")
    told(lambda: train(trained, trained), "another stage's run", "--out")
    told(lambda: sample.main(["--diffusion", str(trained)]), "stage 2's denoiser", "something else")
    told(lambda: train(trained, diffused, "--width", "64"), "--width", "--fresh")
    told(lambda: sample.main(["--diffusion", str(diffused), "--count", "0"]), "--count 0", "at least 1")
    told(lambda: sample.main(["--diffusion", str(tmp_path / "none")]), "none/last.pt", "python diffusion.py")


def test_another_autodecoder_is_told_apart(data, trained, diffused, tmp_path):
    train_autodecoder(data, tmp_path / "auto", "--seed", "5")
    command = ["--diffusion", str(diffused), "--autodecoder", str(tmp_path / "auto"),
               "--out", str(tmp_path / "s")]
    told(lambda: sample.main(command), "another autodecoder", "python diffusion.py --autodecoder", "--fresh")
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((diffused / name).read_bytes())
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["autodecoder"] = str(tmp_path / "auto")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    told(lambda: train(tmp_path / "auto", tmp_path / "run"), "another autodecoder", "--fresh")


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_a_damaged_checkpoint_falls_back(trained, diffused, tmp_path, capsys, harm):
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "previous.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((diffused / name).read_bytes())
    content = bytearray((tmp_path / "run/last.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "run/last.pt").write_bytes(content[:len(content) // 2] if harm == "truncate" else content)
    # Stage 3 reads the checkpoint before it, and says so
    sample.main(["--diffusion", str(tmp_path / "run"), "--count", "1", "--views", "0",
                 "--out", str(tmp_path / "s")])
    said = capsys.readouterr().out
    assert "last.pt is damaged" in said and "taking" in said and "previous.pt" in said
    train(trained, tmp_path / "run")
    assert "previous.pt" in capsys.readouterr().out
    ours, whole = weights(tmp_path / "run")[1], weights(diffused)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), whole.values()))


def test_the_model_in_the_box_is_used_when_nothing_is_trained(trained, diffused, tmp_path, capsys,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "BOX", tmp_path / "box")
    box.main(["--diffusion", str(diffused), "--out", "box"])
    assert (tmp_path / "box/diffusion/last.pt").stat().st_size < (diffused / "last.pt").stat().st_size / 1.9
    told(lambda: sample.main(["--diffusion", "gone"]), "is --diffusion right", "python autodecoder.py")
    sample.main(["--count", "2", "--views", "0"])
    assert "the model in the box" in capsys.readouterr().out and (tmp_path / "samples/sheet.png").exists()
    assert not (tmp_path / "samples/beside.png").exists()
    # One's own run takes precedence, and stands beside it; the box may also be named
    sample.main(["--diffusion", str(diffused), "--count", "2", "--views", "0"])
    assert f"{diffused}/last.pt" in capsys.readouterr().out and (tmp_path / "samples/beside.png").exists()
    both = [sample.load_models(sample.Config(diffusion=where), "cpu")
            for where in ("box/diffusion", str(diffused))]
    a, b = (stage.sample(denoiser, [0, 1]) for _, _, denoiser in both)
    assert 0 < (a - b).norm() < 0.02 * b.norm()                                       # half precision


def test_what_an_earlier_model_left_goes_and_two_do_not_share_a_folder(diffused, tmp_path):
    flags = ["--diffusion", str(diffused), "--views", "2", "--size", "16", "--out", str(tmp_path)]
    sample.main([*flags, "--count", "3"])
    sample.main([*flags, "--count", "1", "--seed", "9"])
    assert [path.name for path in (tmp_path / "views").iterdir()] == ["seed_000009"]
    held = common.Run(tmp_path, "sample", sample.Config(), (), "sample.json", stale=())
    told(lambda: sample.main(flags), "another run is writing", "another --out")
    held.lock.close()
    report = (tmp_path / "report.json").read_text()
    json.loads(report, parse_constant=lambda name: pytest.fail(name))             # plain JSON: no NaN


def test_a_missing_last_checkpoint_is_the_one_before_it(diffused, tmp_path, capsys):
    (tmp_path / "previous.pt").write_bytes((diffused / "previous.pt").read_bytes())
    stage.load_denoiser(tmp_path)
    assert "last.pt is not there: taking" in capsys.readouterr().out


def test_a_fingerprint_is_of_every_bit_and_of_no_thread(trained):
    model, _ = autodecoder.load_autodecoder(trained)
    before = stage.fingerprint(model)
    torch.set_num_threads(1)
    assert stage.fingerprint(model) == before
    torch.set_num_threads(2)
    model.codes[0, 0] = torch.nextafter(model.codes[0, 0], torch.tensor(9.0))
    assert stage.fingerprint(model) != before


def test_a_full_disk_is_one_sentence(trained, diffused, tmp_path):
    code = ("import resource, signal, sys\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "import sample\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
            "sample.main(sys.argv[1:])\n")
    command = [sys.executable, "-c", code, "--diffusion", str(diffused), "--count", "1",
               "--out", str(tmp_path / "s")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr, done.stderr

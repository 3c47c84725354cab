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

import common
import denoiser as denoisers
import diffusion as stage
from lab import metrics
import noise as noises
import render_shapenet
import sample
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
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    denoiser = denoisers.Denoiser(config, latents.shape[1:], min(config.components, len(latents)))
    denoiser.fit(latents, latents[:0], g)
    data, optimizer = denoiser.encode(latents), torch.optim.Adam(denoiser.network.parameters(), 2e-3)
    loss_of = noises.edm_loss if config.formulation == "edm" else noises.ddpm_loss
    for _ in range(steps):
        z = data[torch.randint(len(data), (config.batch,), generator=g)]
        u = (torch.arange(len(z)) + torch.rand(len(z), generator=g)) / len(z)
        loss = loss_of(denoiser, z, torch.randn(z.shape, generator=g), u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.eval().requires_grad_(False)


# ---- normalisation ----

def test_robust_norm_is_the_formula_and_inverts():
    latents = torch.randn(20, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5, 0.1, 2]).view(4, 1, 1, 1) + torch.arange(27.0).view(3, 3, 3)
    for how in ("robust", "robust_global", "meanstd", "none"):
        norm = denoisers.RobustNorm(latents.shape[1:], 3).fit(latents, how)
        assert torch.allclose(norm.denormalize(norm.normalize(latents)), latents, atol=1e-4)
        left = (latents - latents.mean(0)).numpy()
        for channel in range(4):
            values = left if how == "robust_global" else left[:, channel]
            q25, q50, q75 = np.quantile(values, (0.25, 0.5, 0.75), method="nearest")
            shift, scale = {"meanstd": (values.mean(), values.std(ddof=1)), "none": (0, 1)}.get(
                how, (q50, 0.7413 * (q75 - q25)))
            # quantiles between two values
            tolerance = 0.02 * scale
            assert abs(norm.shift[channel].item() - shift) < tolerance
            assert abs(norm.scale[channel] - scale) < tolerance


def test_outliers_do_not_move_the_robust_norm():
    latents = torch.randn(400, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    spoilt = latents.clone()
    spoilt.view(-1)[::1001] = 300.0
    of = lambda x, how: denoisers.RobustNorm(x.shape[1:], 3).fit(x, how).scale.mean().item()
    assert of(spoilt, "robust") < 1.2 * of(latents, "robust")
    assert of(spoilt, "meanstd") > 8 * of(latents, "meanstd")


def test_planes_are_normalised_channel_by_channel():
    latents = torch.randn(10, 3, 4, 5, 5) * torch.arange(1.0, 13).view(3, 4, 1, 1)
    norm = denoisers.RobustNorm(latents.shape[1:], 2).fit(latents)
    assert norm.scale.shape == (3, 4, 1, 1)
    assert torch.allclose(norm.denormalize(norm.normalize(latents)), latents, atol=1e-3)
    assert (norm.scale.flatten() / torch.arange(1.0, 13) - 1).abs().max() < 0.4


# ---- noise levels ----

def test_posterior_entropy_of_two_points():
    """Two points a distance 2 apart, in a space of 30 dimensions: a line's integral knows the answer."""
    points = torch.zeros(2, 30)
    points[0, 3], points[1, 3] = 1.0, -1.0
    sigmas = [0.05, 0.7, 2.0, 500.0]
    ours = noises.posterior_entropy(points, sigmas, torch.Generator().manual_seed(0), draws=20000)
    for sigma, value in zip(sigmas, ours):
        x = np.linspace(1 - 8 * sigma, 1 + 8 * sigma, 20001)
        density = np.exp(-((x - 1) / sigma) ** 2 / 2) / (sigma * math.sqrt(2 * math.pi))
        p = 1 / (1 + np.exp(np.clip(-2 * x / sigma ** 2, -700, 700)))
        entropy = -(p * np.log(p + 1e-300) + (1 - p) * np.log(1 - p + 1e-300)) / math.log(2)
        assert abs(value.item() - (density * entropy).sum() * (x[1] - x[0])) < 0.01


def test_levels_are_where_the_choice_is():
    denoiser = fitted(low_rank(40), 0)
    points = denoiser.encode(low_rank(40))
    u = torch.linspace(0, 1, 101)
    sigma = denoiser.sigma(u)
    entropy = noises.posterior_entropy(points, sigma.tolist(), torch.Generator().manual_seed(1))
    assert (sigma.diff() > 0).all() and entropy[0] < 0.01 and entropy[-1] > 0.9
    between = ((entropy > 0.02) & (entropy < 0.9)).float().mean()
    evenly = torch.linspace(sigma[0].log(), sigma[-1].log(), 101).exp()
    entropy = noises.posterior_entropy(points, evenly.tolist(), torch.Generator().manual_seed(1))
    assert between > 1.3 * ((entropy > 0.02) & (entropy < 0.9)).float().mean()


def test_noise_embedding_golden():
    found = denoisers.noise_embedding(torch.tensor([0.25]), 6)[0]
    frequency = [100.0, 10.0, 1.0]
    expected = [*(math.sin(0.25 * f) for f in frequency), *(math.cos(0.25 * f) for f in frequency)]
    assert np.allclose(found, expected, atol=1e-5)
    assert abs(found[0] + 0.132352) < 1e-5                                       # sin 25


# ---- the formulations ----

def test_preconditioning_gives_unit_variance():
    g = torch.Generator().manual_seed(0)
    deviation = torch.tensor([30.0, 3.0, 0.2])
    z, noise = deviation * torch.randn(200_000, 3, generator=g), torch.randn(200_000, 3, generator=g)
    for sigma in (0.1, 1.0, 20.0, 300.0):
        c_skip, c_out, c_in = noises.precondition(torch.tensor(sigma), deviation)
        x = z + sigma * noise
        assert ((c_in * x).std(0) - 1).abs().max() < 0.01
        assert (((z - c_skip * x) / c_out).std(0) - 1).abs().max() < 0.01
    # with one deviation for all: the table of Karras et al.
    c_skip, c_out, c_in = noises.precondition(torch.tensor(2.0), torch.tensor(0.5))
    expected = torch.tensor([0.25 / 4.25, 1 / 4.25 ** 0.5, 1 / 4.25 ** 0.5])
    assert torch.allclose(torch.stack([c_skip, c_out, c_in]), expected)


def ideal(deviation):
    """A denoiser whose network says 0: the ideal one of a Gaussian, D(x) = c_skip x"""
    return SimpleNamespace(network=lambda x, level: torch.zeros_like(x), deviation=deviation,
                           sigma=lambda u: (math.log(0.02) + u * math.log(80 / 0.02)).exp())


def test_heun_converges_at_second_order_on_a_gaussian():
    deviation = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64)
    errors = []
    for steps in (16, 32, 64):
        generators = [torch.Generator().manual_seed(k) for k in range(8)]
        start = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(k)) for k in range(8)])
        ours = noises.edm_sample(ideal(deviation), generators, (3,), steps)
        errors.append((ours / (start * deviation) - 1).abs().max().item())
    assert 2.8 < errors[0] / errors[1] < 6 and errors[1] / errors[2] > 2.5, errors


def test_ddpm_by_hand():
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - beta)
    assert np.allclose(noises.ddpm_schedule(1), alpha_bar, rtol=1e-12)
    # 7 x the noise for the same signal
    shifted = noises.ddpm_schedule(7.0).numpy()
    assert np.allclose((1 - shifted) / shifted, 49 * (1 - alpha_bar) / alpha_bar, rtol=1e-9)
    # one step, against Bayes' rule for numbers: q(x' | x, z) from q(x | x') q(x' | z)
    t, z, noise = 600, 1.3, -0.4
    now, before = alpha_bar[t], alpha_bar[t - 1]
    x = math.sqrt(now) * z + math.sqrt(1 - now) * noise
    alpha = now / before
    precision = alpha / (1 - alpha) + 1 / (1 - before)
    mean = (math.sqrt(alpha) * x / (1 - alpha) + math.sqrt(before) * z / (1 - before)) / precision
    double = lambda value: torch.tensor(value, dtype=torch.float64)
    ours, spread = noises.ddpm_step(double(x), double(noise), double(now), double(before))
    assert abs(ours.item() - mean) < 1e-12 and abs(spread.item() - precision ** -0.5) < 1e-12
    assert abs(alpha - (1 - beta[t])) < 1e-12


def test_ddpm_samples_a_gaussian():
    """A network that says 0 leaves the best linear guess, ideal for a Gaussian: its variance comes out."""
    deviation = torch.tensor([3.0, 0.3])
    denoiser = SimpleNamespace(deviation=deviation, alpha_bar=noises.ddpm_schedule(4.0))

    denoiser.network = lambda x, level: torch.zeros_like(x)
    generators = [torch.Generator().manual_seed(k) for k in range(20)]
    x = noises.ddpm_sample(denoiser, generators, (100, 2)).view(-1, 2)
    assert (x.std(0) / deviation - 1).abs().max() < 0.06 and (x.mean(0) / deviation).abs().max() < 0.07


@pytest.mark.parametrize("formulation", ["edm", "ddpm"])
def test_low_rank_latents_are_sampled_with_their_variance(formulation):
    latents = low_rank(300)
    denoiser = fitted(latents, 400, formulation=formulation)
    samples = denoisers.sample(denoiser, range(200), 18 if formulation == "edm" else 200)
    spread = lambda x: (x - latents.mean(0)).square().sum() / len(x)
    assert 0.8 < spread(samples) / spread(latents) < 1.2
    assert metrics.outside_span(samples, latents).max() < 0.05


def test_a_denoiser_too_narrow_is_caught():
    """64 hidden numbers cannot take noise off 8,192: what is left shows outside the latents' span."""
    latents = low_rank(100)
    narrow = fitted(latents, 150, components=0, width=64)
    assert metrics.outside_span(denoisers.sample(narrow, range(16)), latents).median() > 0.2


def test_latents_are_really_used():
    """Each element drawn from another object: the same marginals, none of the structure.  Samples of it must
    lie elsewhere: their part outside the real latents' span is large."""
    latents, g = low_rank(100), torch.Generator().manual_seed(3)
    order = torch.rand(len(latents), latents[0].numel(), generator=g).argsort(0)
    shuffled = latents.flatten(1).gather(0, order).view_as(latents)
    real, other = (metrics.outside_span(denoisers.sample(fitted(some, 100), range(32)), latents).median()
                   for some in (latents, shuffled))
    assert other > 0.5 and other > 5 * real


# ---- the denoisers ----

@pytest.mark.parametrize("options, shape, components", [
    ({}, (16, 8, 8, 8), 256),
    ({"components": 0, "width": 64}, (16, 8, 8, 8), 0),
    ({"components": 20}, (3, 16, 8, 8), 20),
    ({"denoiser": "unet"}, (16, 8, 8, 8), 0),
    ({"denoiser": "unet", "channels": "8,16,24"}, (4, 8, 8, 8), 0)])
def test_denoisers(options, shape, components):
    planes = len(shape) == 4 and shape[0] == 3
    denoiser = denoisers.Denoiser(replace(stage.Config(), **options), shape, components, planes)
    count = sum(p.numel() for p in denoiser.network.parameters())
    assert count < 5e6
    x = denoiser.encode(torch.randn(2, *shape))
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
    basis = denoisers.principal((latents - latents.mean(0)).flatten(1), 6)
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
    for name in ("last.pt", "previous.pt", "config.json", "log.jsonl", "levels.png", "histogram.png",
                 "curve.png", "previews/step_000012.png"):
        assert (diffused / name).exists(), name
    row = json.loads((diffused / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "low", "middle", "high"} <= set(row)
    sample.main(["--diffusion", str(diffused), "--count", "3", "--views", "2", "--size", "32",
                 "--out", str(tmp_path / "s")])
    said = capsys.readouterr().out
    assert "sampling from" in said and "s each" in said
    assert "outside the span, 95th" in said and "kinds of the nearest" in said
    photos, masks, poses, intrinsics, names = render_shapenet.load_photos(tmp_path / "s/views", 32)
    assert photos.shape == (3, 2, 32, 32, 3) and masks is not None and names[0] == "seed_000000"
    rows = json.loads((tmp_path / "s/report.json").read_text())["rows"]
    counts = {name: len(some) for name, some in rows.items()}
    assert counts == {"samples": 3, "reconstructions": 3, "code mixtures": 128}
    assert max(row["outside"] for row in rows["reconstructions"]) < 1e-3
    assert np.array(Image.open(tmp_path / "s/sheet.png")).shape[0] > 3 * 128
    assert (tmp_path / "s/figure3.png").exists()


def test_a_sample_is_the_same_in_any_batch(diffused):
    denoiser, _ = stage.load_denoiser(diffused)
    together = denoisers.sample(denoiser, range(5, 12), 6)
    alone = denoisers.sample(denoiser, [9], 6)
    assert (together[4] - alone[0]).abs().max() < 1e-4 * together.abs().max()
    assert (together[4] - together[5]).abs().max() > 1e-2


@pytest.mark.parametrize("options", [["--denoiser", "unet", "--channels", "8,16"], ["--formulation", "ddpm"],
                                     ["--normalization", "meanstd", "--mix", "0"], ["--components", "0"]])
def test_each_variant_runs(trained, tmp_path, options):
    train(trained, tmp_path / "run", *options)
    denoiser, _ = stage.load_denoiser(tmp_path / "run")
    assert denoisers.sample(denoiser, range(2), 4).isfinite().all()


def weights(out):
    state = common.load_checkpoint(out / "last.pt")
    moments = {f"{k}.{n}": t for k, s in state["optimizer"]["state"].items() for n, t in s.items()}
    return state["step"], {**state["denoiser"], **{f"ema.{k}": p for k, p in state["ema"].items()}, **moments}


def test_resume_is_bit_exact(trained, diffused, tmp_path):
    """Killed after 6 of 12 steps (a checkpoint holds 4), then the same command again."""
    code = ("import diffusion as stage, sys, os\n"
            "real, calls = stage.draw_batch, []\n"
            "def draw(*a):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 7: os._exit(9)\n"
            "    return real(*a)\n"
            "stage.draw_batch = draw\n"
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


def test_early_stopping_keeps_the_best(data, trained, tmp_path, capsys, monkeypatch):
    train_autodecoder(data, tmp_path / "auto", "--steps", "2")
    losses = iter([3.0, 2.0, 5.0, 6.0, 7.0])
    monkeypatch.setattr(stage, "held_out_loss", lambda *a: next(losses))
    # three objects are few to keep one aside
    monkeypatch.setattr(stage, "check", lambda *a: None)
    train(tmp_path / "auto", tmp_path / "run", "--preview_every", "2", "--holdout", "1", "--patience", "2")
    state = common.load_checkpoint(tmp_path / "run/last.pt")
    assert state["step"] == 8 and state["best"]["step"] == 4 and state["best"]["loss"] == 2.0
    assert "the weights of step 4 are the ones that sample" in capsys.readouterr().out
    denoiser, _ = stage.load_denoiser(tmp_path / "run")
    ours, best = denoiser.network.state_dict(), state["best"]["ema"]
    assert all(torch.equal(p, best[name]) for name, p in ours.items())


def test_held_out_loss_is_a_loss(diffused):
    denoiser, _ = stage.load_denoiser(diffused)
    latents = torch.randn(2, *denoiser.shape)
    value = stage.held_out_loss(denoiser, noises.edm_loss, latents)
    assert value == stage.held_out_loss(denoiser, noises.edm_loss, latents) and 0 < value < math.inf


# ---- what a user gets told ----

def told(call, *words):
    with pytest.raises(UserError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value), error.value


def test_mistakes_get_one_sentence(trained, diffused, data, tmp_path):
    told(lambda: train(tmp_path / "none", tmp_path / "x"), "none/last.pt", "python autodecoder.py")
    told(lambda: train(trained, tmp_path / "x", "--holdout", "1"), "at least 4")
    told(lambda: train(trained, tmp_path / "x", "--mix", "1.5"), "--mix 1.5")
    told(lambda: train(trained, tmp_path / "x", "--patience", "3"), "--holdout")
    told(lambda: train(trained, tmp_path / "x", "--batch", "0"), "--batch 0", "at least 1")
    told(lambda: train(trained, tmp_path / "x", "--denoiser", "unet", "--channels", "8;8"), "--channels 8;8")
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
    told(lambda: sample.main(["--diffusion", str(tmp_path / "run")]), "damaged")
    train(trained, tmp_path / "run")
    assert "previous.pt" in capsys.readouterr().out
    ours, whole = weights(tmp_path / "run")[1], weights(diffused)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), whole.values()))


def test_the_model_in_the_box_is_used_when_nothing_is_trained(trained, diffused, tmp_path, capsys,
                                                              monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "PRETRAINED", tmp_path / "box.pt")
    told(lambda: sample.main([]), "is --diffusion right", "python autodecoder.py")
    sample.main(["--diffusion", str(diffused), "--pack", "box.pt"])
    sample.main(["--count", "2", "--views", "0"])
    assert "the model in the box" in capsys.readouterr().out and (tmp_path / "samples/sheet.png").exists()
    assert not (tmp_path / "samples/beside.png").exists()
    # One's own run takes precedence, and stands beside it; a packed file may also be named
    sample.main(["--diffusion", str(diffused), "--count", "2", "--views", "0"])
    assert f"{diffused}/last.pt" in capsys.readouterr().out and (tmp_path / "samples/beside.png").exists()
    both = [sample.load_models(sample.Config(diffusion=where), "cpu") for where in ("box.pt", str(diffused))]
    a, b = (denoisers.sample(denoiser, [0, 1]) for _, _, denoiser in both)
    assert 0 < (a - b).norm() < 0.02 * b.norm()                                       # half precision
    told(lambda: sample.main(["--diffusion", str(diffused / "last.pt")]), "does not hold both models")


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

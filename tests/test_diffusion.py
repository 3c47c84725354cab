"""Stages 2 and 3: schedules by hand, samplers on data whose ideal denoiser is known, resume, and what a user
gets told."""
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import autodecoder
import common
import diffusion as stage
import sample
import volume_render
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


@pytest.fixture
def no_pages(monkeypatch):
    """The page and the meshes of untrained fog take seconds, and have other tests"""
    for name in ("write_gallery", "write_mesh"):
        monkeypatch.setattr(sample, name, lambda *_, **__: None)


class Linear:
    """A stand-in for stage 1 whose G1 is linear: its codes are a bell, so its latents are one too, in a few
    of thousands of dimensions.  All have the same palette"""

    def __init__(self, count, rank=6, shape=(16, 8, 8, 8)):
        g = torch.Generator().manual_seed(0)
        ways = torch.linalg.qr(torch.randn(math.prod(shape), rank, generator=g))[0].T
        self.ways, self.shape = ways * torch.linspace(40, 10, rank)[:, None], shape
        self.codes = torch.cat([torch.randn(count, rank, generator=g), torch.zeros(count, 9)], 1)
        self.config = SimpleNamespace(latent_channels=shape[0], latent_resolution=shape[1])

    def to_latent(self, codes):
        return (codes[:, :-9] @ self.ways + 0.3).view(-1, *self.shape)


def fitted(model, steps, seed=0, **options):
    """A denoiser trained on a model's latents, as main() trains it"""
    config = replace(stage.Config(), **{"width": 128, "layers": 1, "components": 64, "batch": 64, **options})
    config.components = min(config.components, len(model.codes))
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    denoiser = stage.Denoiser(config, model)
    data = denoiser.fit(model.codes, model.codes, g)[0]
    optimizer = torch.optim.Adam(denoiser.network.parameters(), 2e-3)
    for _ in range(steps):
        item = torch.randint(len(data), (config.batch,), generator=g)
        z, codes = data[item], model.codes[item]
        u = (torch.arange(len(z)) + torch.rand(len(z), generator=g)) / len(z)
        loss = stage.denoising_loss(denoiser, z, codes, torch.randn(z.shape, generator=g), u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return denoiser.eval().requires_grad_(False)


# ---- normalisation ----

def test_robust_norm_is_the_formula():
    latents = torch.randn(20, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0, 5, 0.1, 2]).view(4, 1, 1, 1) + torch.arange(27.0).view(3, 3, 3)
    norm = stage.RobustNorm(latents.shape[1:])
    norm.fit(latents)
    back = norm.normalize(latents) * norm.scale + norm.shift + norm.centre
    assert torch.allclose(back, latents, atol=1e-4)
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
    model = Linear(40)
    denoiser = fitted(model, 0)
    points = denoiser.to_components(model.to_latent(model.codes))
    sigma = denoiser.sigma_at(torch.linspace(0, 1, 101))
    entropy = stage.posterior_entropy(points, sigma.tolist(), torch.Generator().manual_seed(1))
    assert (sigma.diff() > 0).all() and entropy[0] < 0.01 and entropy[-1] > 0.9
    between = ((entropy > 0.02) & (entropy < 0.9)).float().mean()
    evenly = torch.linspace(sigma[0].log(), sigma[-1].log(), 101).exp()
    entropy = stage.posterior_entropy(points, evenly.tolist(), torch.Generator().manual_seed(1))
    assert between > 1.3 * ((entropy > 0.02) & (entropy < 0.9)).float().mean()


def test_levels_are_those_of_the_table():
    denoiser = fitted(Linear(20), 0)
    assert len(denoiser.levels) == 1000 and (denoiser.levels.diff() > 0).all()
    places = torch.tensor([0.0, 500 / 999, 1.0])
    assert torch.equal(denoiser.sigma_at(places), denoiser.levels[[0, 500, 999]])


def test_level_embedding_golden():
    found = stage.level_embedding(torch.tensor([0.25]), 3)[0]
    frequency = [100.0, 10.0, 1.0]
    expected = [*(math.sin(0.25 * f) for f in frequency), *(math.cos(0.25 * f) for f in frequency)]
    assert np.allclose(found, expected, atol=1e-5)
    assert abs(found[0] + 0.132352) < 1e-5                                       # sin 25


# ---- the formulations ----

class Ideal:
    """The ideal denoiser of a bell with these deviations, in float64: D(x) = c_skip x; or another's D"""

    def __init__(self, deviation, formulation="edm", low=0.002, high=80.0, denoise=None):
        self.config = SimpleNamespace(formulation=formulation)
        self.deviation = deviation
        self.levels = torch.linspace(math.log(low), math.log(high), stage.LEVELS, dtype=torch.float64).exp()
        self.denoise = denoise or (lambda x, sigma: deviation ** 2 / (deviation ** 2 + sigma ** 2) * x)
        self.guess = self.denoise
        self.error = lambda guess, codes, z: guess - z

    sigma_at = stage.Denoiser.sigma_at


@pytest.mark.parametrize("formulation", ["ddpm", "edm"])
def test_the_loss_is_that_of_the_papers(formulation):
    """DDPM: the squared error of the predicted noise, x' = sqrt(a) z + sqrt(1 - a) n.  EDM: the squared error
    of the latent, each component's weighted by 1 / (sigma^2 + a tenth of its variance).  In float64, by their
    own formulas, of a denoiser that is wrong somehow."""
    g = torch.Generator().manual_seed(0)
    deviation = torch.tensor([7.0, 0.4], dtype=torch.float64)
    z, n = deviation * torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g).double()
    u = torch.rand(5, generator=g).double()
    wrong = lambda x, sigma: 0.7 * x + sigma.sin()
    denoiser = Ideal(deviation, formulation, denoise=wrong)
    ours = stage.denoising_loss(denoiser, z, None, n, u)
    share = deviation / deviation.mean()
    if formulation == "ddpm":
        sigma = denoiser.sigma_at(u)[:, None]
        a = 1 / (1 + sigma ** 2)                                                     # alpha_bar
        x = a.sqrt() * z + (1 - a).sqrt() * n
        predicted = (x - a.sqrt() * wrong(x / a.sqrt(), sigma)) / (1 - a).sqrt()
        expected = (share * (predicted - n).square()).mean(1)
    else:
        sigma = denoiser.sigma_at(u)[:, None]
        error = (wrong(z + sigma * n, sigma) - z).square()
        expected = (share * error / (sigma ** 2 + deviation ** 2 / 10)).mean(1)
    assert torch.allclose(ours, expected, rtol=1e-9)


def test_heun_converges_at_second_order_on_a_gaussian():
    deviation, errors = torch.tensor([0.5, 4.0, 20.0], dtype=torch.float64), []
    start = torch.stack([torch.randn(3, generator=torch.Generator().manual_seed(k)) for k in range(8)])
    for steps in (16, 32, 64):
        ours = stage.sample(Ideal(deviation), range(8), steps, "heun")
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
    still, moved = (next(iter(stage.ancestral_sample(denoiser, start, levels, lambda: noise))).item()
                    for noise in (torch.zeros(1, 1).double(), torch.ones(1, 1).double()))
    assert abs(still - mean / math.sqrt(b)) < 1e-12
    assert abs(moved - still - precision ** -0.5 / math.sqrt(b)) < 1e-12


def test_ancestral_sampling_of_a_gaussian():
    """The ideal denoiser of a Gaussian: its variance comes out."""
    deviation = torch.tensor([3.0, 0.3], dtype=torch.float64)
    x = stage.sample(Ideal(deviation), range(2000), 400, "ancestral")
    assert (x.std(0) / deviation - 1).abs().max() < 0.06 and (x.mean(0) / deviation).abs().max() < 0.07


@pytest.mark.parametrize("formulation", ["edm", "ddpm"])
def test_a_bell_is_sampled_with_its_variance(formulation):
    model = Linear(300)
    denoiser = fitted(model, 0, formulation=formulation)         # (the linear guess is a bell's best one)
    codes = stage.sample(denoiser, range(200), 18 if formulation == "edm" else 200)
    ratio = (codes.std(0) / model.codes.std(0))[:-9]
    assert 0.75 < ratio.min() and ratio.max() < 1.25, ratio
    assert sample.outside_span(denoiser.latents(codes), model.to_latent(model.codes)).max() < 0.01


def test_the_linear_guess_is_the_best_one_of_a_bell():
    """Untrained, the denoiser of a bell's latents is the ideal one: c_skip x, for the noised components"""
    model = Linear(200)
    denoiser = fitted(model, 0, components=6)
    z = denoiser.to_components(model.to_latent(model.codes))
    for sigma in (0.5, 10.0, 100.0):
        x = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        ideal = denoiser.deviation ** 2 / (denoiser.deviation ** 2 + sigma ** 2) * x
        found = denoiser.denoise(x, torch.full((len(x), 1), sigma))
        assert ((found - ideal).square().mean() / ideal.square().mean()).sqrt() < 0.002
    # G1 is linear, so the loss's matrix is G1: their errors are the same
    guess, codes = (model.codes[some] for some in (slice(100), slice(100, 200)))
    by_matrix, by_model = denoiser.error(guess, codes, None), denoiser.examples(guess) - z[100:]
    assert (by_matrix - by_model).abs().max() < 1e-5 * by_model.abs().max()


def test_a_denoiser_learns_what_is_no_bell():
    """Codes of -1 and 1: at a noise of 0.2 the linear guess has an error of 0.04, the best one of nearly 0"""
    model, errors = Linear(64, rank=1), []
    model.codes = F.pad(2 * (torch.arange(64.0)[:, None] % 2) - 1, (0, 9))
    for steps in (0, 1000):
        denoiser = fitted(model, steps, components=1, embedding=8)
        z, sigma = denoiser.to_components(model.to_latent(model.codes)), 0.2 * denoiser.deviation
        x = z + sigma * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
        errors.append((denoiser.denoise(x, sigma.expand(64, 1)) - z).square().mean())
    assert errors[1] < errors[0] / 15


def test_the_network_sees_what_noise_has_not_drowned_and_the_palette(trained):
    """Its inputs at sigma: each component's linear guess in its own deviation; the palette in the components,
    of variance 1 together with the noise that it has there"""
    model, _ = autodecoder.load_autodecoder(trained)
    codes = torch.cat([model.codes, stage.recombined(model, 300, torch.Generator().manual_seed(0), knobs())])
    codes[:, -9:] += 0.1 * torch.randn(codes[:, -9:].shape, generator=torch.Generator().manual_seed(1))
    denoiser, seen = stage.Denoiser(knobs(components=60), model), []
    z = denoiser.fit(codes, model.codes, torch.Generator().manual_seed(0))[0]
    denoiser.network.forward = lambda *what: seen.append(what) or torch.zeros(len(what[0]), codes.shape[1])
    plain = ((codes - denoiser.code_mean) / denoiser.code_deviation)[:, -9:]
    for sigma in (1e-3, 5.0):
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
        denoiser.guess(z + sigma * noise, torch.full((len(z), 1), sigma))
    (x, palette, level), (far, noised, _) = seen
    assert torch.allclose(x, z / denoiser.deviation, atol=0.1) and (level == math.log(1e-3) / 4).all()
    assert (palette - plain).square().mean() < 0.1
    kept = denoiser.deviation ** 2 / (denoiser.deviation ** 2 + 25)
    assert torch.allclose(far, kept * (z + 5 * noise) / denoiser.deviation, rtol=1e-3, atol=1e-4)
    assert (noised.var(0) - 1).abs().max() < 0.25 and (noised - plain).abs().mean() > 0.02


# ---- the denoisers ----

@pytest.mark.parametrize("options, shape", [
    ({}, (16, 8, 8, 8)),
    ({"components": 20, "width": 64, "layers": 0}, (3, 4, 4, 4)),
    ({"embedding": 7}, (16, 8, 8, 8))])
def test_denoisers(options, shape):
    torch.manual_seed(0)
    denoiser = stage.Denoiser(replace(stage.Config(), **options), Linear(30, shape=shape))
    torch.nn.init.normal_(denoiser.basis)
    assert sum(p.numel() for p in denoiser.network.parameters()) < 5e6
    x = denoiser.to_components(torch.randn(2, *shape))
    palette = torch.randn(2, 9)
    assert denoiser.network(x, palette, torch.zeros(2)).abs().max() == 0    # begins as the linear guess
    for p in denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    a = denoiser.network(x, palette, torch.tensor([0.0, 0.0]))
    b = denoiser.network(x, palette, torch.tensor([0.0, 1.0]))
    assert a.shape == (2, 15)
    assert torch.allclose(a[0], b[0], atol=1e-5)
    assert (a[1] - b[1]).abs().max() > 1e-4                                      # level is used
    a.sum().backward()
    assert all(p.grad is not None for p in denoiser.network.parameters())
    assert not any("model" in name for name in denoiser.state_dict())            # G1 is not saved again


def test_principal_components_are_orthonormal_and_enough():
    model = Linear(50)
    latents = model.to_latent(model.codes)
    basis = stage.principal((latents - latents.mean(0)).flatten(1), 6)
    assert torch.allclose(basis @ basis.T, torch.eye(6), atol=1e-4)
    x = (latents - latents.mean(0)).flatten(1)
    assert (x - x @ basis.T @ basis).norm() < 1e-3 * x.norm()


knobs = lambda **change: replace(stage.Config(), **change)


def test_recombined_codes_are_of_neighbours_in_others_colours(trained):
    model, _ = autodecoder.load_autodecoder(trained)
    model.shapes = torch.nn.Parameter(torch.cat([torch.eye(4, 8), 100 + torch.eye(4, 8)]))
    model.palettes = torch.arange(8.0)[:, None].expand(8, 9).clone()
    codes = stage.recombined(model, 400, torch.Generator().manual_seed(0), knobs(among=4, spread=1.0))
    stretch, shape, colours = codes.split([3, 8, 9], 1)
    low = shape.mean(1) < 50
    assert shape.shape == (400, 8) and colours.shape == (400, 9) and 100 < low.sum() < 300
    ours = shape - 100 * (~low)[:, None]
    assert ours[:, :4].min() > -1e-3 and (ours[:, :4].sum(1) - 1).abs().max() < 1e-3     # between neighbours
    assert (colours == colours[:, :1]).all() and len(colours[:, 0].unique()) == 8          # somebody's, whole
    assert not (colours[:, 0] < 4).eq(low).all()                                         # not the neighbours'
    assert (stretch.amax(1) - stretch.amin(1)).max() <= 2 + 1e-4
    wide = stage.recombined(model, 400, torch.Generator().manual_seed(0), knobs(among=4, spread=2.0))
    assert wide[:, :4].min() < -0.05                                                       # beyond them
    share = stage.draw_parents(model, 400, torch.Generator().manual_seed(0), knobs())[1]
    assert (share[::2, 2] == 0).all() and (share[1::2] != 0).all()        # of two shapes, of three, in turn
    assert (share.sum(1) - 1).abs().max() < 1e-5


def test_nothing_is_recombined_that_stage_1_has_not_shown(trained):
    """Photos without masks are not recoloured; --stretched 0 stretches none"""
    model, _ = autodecoder.load_autodecoder(trained)
    model.config = replace(model.config, recolour=0.0, stretched=0.0)
    codes = stage.recombined(model, 50, torch.Generator().manual_seed(0), knobs(among=1))
    assert (codes[:, :3] == 0).all()
    own = model.codes[:, None]                   # among 1: each shape is an object's own
    assert ((codes - own).abs().amax(2).amin(0) < 1e-4).all()


def test_recombined_volumes_have_the_usual_diagonal():
    """Of a model whose volumes are boxes with the sides 2^(0.75 stretch) / 2: all diagonals come out equal"""
    class Boxes:
        shapes, palettes = torch.zeros(3, 2), torch.zeros(3, 9)
        field = staticmethod(lambda channels, position: (channels[..., 0], channels[..., :3]))
        config = SimpleNamespace(stretch=0.75 * math.log(2), stretched=0.5, recolour=0.5)
        codes = torch.zeros(3, 14)

        def volumes_of(self, codes):
            half = 2.0 ** (0.75 * codes[:, :3, None]) / 4                                        # (B,3,1)
            inside = (torch.arange(64) + 0.5 - 32).abs() / 64 < half                     # (B,3,64)
            x, y, z = inside.unbind(1)
            box = z[:, :, None, None] & y[:, None, :, None] & x[:, None, None]
            return 1e3 * box[:, None].float().expand(-1, 4, -1, -1, -1)

    model = Boxes()
    codes = stage.recombined(model, 20, torch.Generator().manual_seed(0), knobs())
    assert codes[:, :3].std() > 0.3
    assert (stage.diagonals(model, codes) / (3 ** 0.5 / 2) - 1).abs().max() < 0.06       # a voxel is 3 %


def test_a_bounding_box_by_hand():
    solid = torch.zeros(2, 8, 8, 8, dtype=torch.bool)
    solid[0, 2:4, 1:7, 5] = True                                                          # z, y, x
    assert volume_render.bounding_box(solid).tolist() == [[1 / 8, 6 / 8, 2 / 8], [1 / 8] * 3]


# ---- running it ----

def test_training_writes_and_samples(diffused, trained, tmp_path, capsys):
    for name in ("last.pt", "previous.pt", "config.json", "log.jsonl", "levels.png",
                 "curve.png", "previews/step_000012.png"):
        assert (diffused / name).exists(), name
    row = json.loads((diffused / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "low", "middle", "high"} <= set(row)
    assert stage.load_denoiser(diffused)[2].network.shape.leave[-1].weight.abs().max() > 0       # it has learnt
    sample.main(["--diffusion", str(diffused), "--count", "3", "--views", "2", "--size", "32",
                 "--out", str(tmp_path / "s")])
    said = capsys.readouterr().out
    assert "sampling from" in said and "s each" in said
    assert "outside the span, 95th" in said and "kinds of the nearest" in said
    photos, masks, poses, intrinsics, names = load_photos(tmp_path / "s/views", 32)
    assert photos.shape == (3, 2, 32, 32, 3) and masks is not None and names[0] == "seed_000000"
    rows = json.loads((tmp_path / "s/report.json").read_text())["rows"]
    counts = {name: len(some) for name, some in rows.items()}
    assert counts == {"samples": 3, "training objects": 3, "recombined codes": 64}
    assert max(row["outside"] for row in rows["training objects"]) < 1e-3
    assert min(row["distances"][0] for row in rows["training objects"]) > 0             # not to themselves
    assert np.array(Image.open(tmp_path / "s/sheet.png")).shape[0] > 3 * 128
    assert (tmp_path / "s/figure3.png").exists()


def test_parts_of_samples_are_exchanged(diffused, tmp_path, no_pages):
    """One shape in all the samples' colours, one object's colours on all shapes, taller"""
    model, names, denoiser = stage.load_denoiser(diffused)
    codes = stage.sample(denoiser, range(3), 4)
    ask = lambda **wanted: sample.exchanged(codes.clone(), model, names, denoiser,
                                            replace(sample.Config(), **wanted))
    assert torch.equal(ask(), codes)
    shaped = ask(shape_of="7", colours_of=names[1])
    other = stage.sample(denoiser, [7])[0]
    assert torch.equal(shaped[:, :-9], other[:-9].expand(3, -1))
    assert torch.equal(shaped[:, -9:], model.palettes[1].expand(3, -1))
    red = ask(colours_of="#FF3300")
    assert torch.equal(red[:, :-9], codes[:, :-9]) and torch.equal(red[:, -6:], codes[:, -6:])
    assert torch.allclose(red[:, -9:-6], torch.tensor([1, 0.2, 0]).expand(3, -1))
    told(lambda: ask(colours_of="#12345g"), "#12345g", "no training object and no seed")
    taller = ask(stretch=(1.0, 1.0, 1.2)) - codes
    assert (taller[:, :2] == 0).all() and (taller[:, 3:] == 0).all()
    assert (taller[:, 2] - math.log(1.2) / 0.14).abs().max() < 1e-5
    told(lambda: ask(shape_of="train_0"), "train_0", "no training object and no seed", names[0])
    told(lambda: sample.main(["--stretch", "1", "1.2"]), "--stretch", "three")
    told(lambda: sample.main(["--stretch", "1", "1", "9"]), "--stretch", "1.4")
    sample.main(["--diffusion", str(diffused), "--count", "2", "--views", "0", "--shape-of", names[0],
                 "--stretch", "1", "1", "1.2", "--out", str(tmp_path)])
    assert (tmp_path / "swaps.png").exists()


@pytest.mark.parametrize("sampler", ["heun", "ancestral"])
def test_a_sample_is_the_same_in_any_batch(diffused, sampler):
    _, _, denoiser = stage.load_denoiser(diffused)
    together = stage.sample(denoiser, range(5, 12), 6, sampler)
    alone = stage.sample(denoiser, [9], 6, sampler)
    assert (together[4] - alone[0]).abs().max() < 1e-4 * together.abs().max()
    assert (together[4] - together[5]).abs().max() > 1e-2


def test_a_seed_gives_the_same_pictures_in_any_run(diffused, tmp_path, no_pages):
    flags = ["--diffusion", str(diffused), "--views", "1", "--size", "32", "--out"]
    sample.main([*flags, str(tmp_path / "three"), "--seed", "5", "--count", "3", "--batch", "2"])
    sample.main([*flags, str(tmp_path / "one"), "--seed", "7", "--count", "1"])
    picture = lambda run, seed: np.array(Image.open(
        tmp_path / run / f"views/seed_{seed:06d}/rgb/000000.png")).astype(int)
    alone = picture("one", 7)
    apart = [abs(picture("three", seed) - alone).max() for seed in (5, 6, 7)]
    assert apart[2] <= 1 and min(apart[:2]) > 5


@pytest.mark.parametrize("options", [["--formulation", "ddpm"], ["--mix", "0"],
                                     ["--layers", "0"]])
def test_each_variant_runs(trained, tmp_path, options, monkeypatch):
    real, seen = stage.denoising_loss, []
    monkeypatch.setattr(stage, "denoising_loss", lambda *what: seen.append(what[2]) or real(*what))
    train(trained, tmp_path / "run", *options)
    model, _, denoiser = stage.load_denoiser(tmp_path / "run")
    own = (torch.cat(seen)[:, None] == model.codes).all(2).any(1)            # or else they are recombined
    assert own.all() if "--mix" in options else not own.any()
    for sampler in ("", "heun", "ancestral"):
        assert stage.sample(denoiser, range(2), 4, sampler).isfinite().all()


def weights(out):
    state = common.load_checkpoint(out / "last.pt")
    moments = {f"{k}.{n}": t for k, s in state["optimizer"]["state"].items() for n, t in s.items()}
    return state["step"], {**state["denoiser"], **{f"raw.{k}": p for k, p in state["raw"].items()}, **moments}


def test_resume_is_bit_exact(trained, diffused, tmp_path):
    """Killed after 6 of 12 steps (a checkpoint holds 4), then the same command again."""
    code = ("import diffusion as stage, sys, os, time\n"
            "real, calls = stage.denoising_loss, []\n"
            "def loss(*a):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 7: time.sleep(1); os._exit(9)\n"
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
    told(lambda: train(trained, trained, "--fresh"), "another stage's run", "--out")
    shutil.copytree(diffused, tmp_path / "other")
    told(lambda: train_autodecoder(data, tmp_path / "other", "--fresh"), "another stage's run", "--out")
    assert (tmp_path / "other/last.pt").exists() and (trained / "last.pt").exists()
    told(lambda: sample.main(["--diffusion", str(trained)]), "stage 2's denoiser", "something else")
    told(lambda: train(trained, diffused, "--width", "64"), "--width", "--fresh")
    told(lambda: sample.main(["--diffusion", str(diffused), "--count", "0"]), "--count 0", "at least 1")
    told(lambda: sample.main(["--diffusion", str(tmp_path / "none")]), "none/last.pt", "python diffusion.py")


def test_another_autodecoder_is_told_apart(data, trained, diffused, tmp_path):
    train_autodecoder(data, tmp_path / "auto", "--seed", "5")
    command = ["--diffusion", str(diffused), "--autodecoder", str(tmp_path / "auto"),
               "--out", str(tmp_path / "s")]
    told(lambda: sample.main(command), "another autodecoder", "by its script with --autodecoder", "--fresh")
    (tmp_path / "run").mkdir()
    for name in ("last.pt", "config.json"):
        (tmp_path / "run" / name).write_bytes((diffused / name).read_bytes())
    config = json.loads((tmp_path / "run/config.json").read_text())
    config["autodecoder"] = str(tmp_path / "auto")
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    told(lambda: train(tmp_path / "auto", tmp_path / "run"), "another autodecoder", "--fresh")


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_a_damaged_checkpoint_falls_back(trained, diffused, tmp_path, capsys, no_pages, harm):
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
                                                              monkeypatch, no_pages):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "BOX", tmp_path / "box")
    box.main(["--diffusion", str(diffused), "--out", "box"])
    assert (tmp_path / "box/diffusion/last.pt").stat().st_size < (diffused / "last.pt").stat().st_size / 1.9
    told(lambda: sample.main(["--diffusion", "gone"]), "is --diffusion right", "python autodecoder.py")
    told(lambda: box.main(["--diffusion", str(diffused), "--out", str(diffused.parent)]), "holds a run",
         "another --out")                                                # as --out runs would replace them
    sample.main(["--count", "2", "--views", "0"])
    assert "the model in the box" in capsys.readouterr().out and (tmp_path / "samples/sheet.png").exists()
    assert not (tmp_path / "samples/beside.png").exists()
    # One's own run takes precedence, and stands beside it; the box may also be named
    sample.main(["--diffusion", str(diffused), "--count", "2", "--views", "0"])
    assert f"{diffused}/last.pt" in capsys.readouterr().out and (tmp_path / "samples/beside.png").exists()
    # ... but not beside samples of other objects than the box's
    monkeypatch.setattr(sample, "load_autodecoder", lambda folder: (None, ["another"]))
    sample.main(["--diffusion", str(diffused), "--count", "2", "--views", "0"])
    assert not (tmp_path / "samples/beside.png").exists()
    both = [sample.load_models(sample.Config(diffusion=where), "cpu")
            for where in ("box/diffusion", str(diffused))]
    a, b = (stage.sample(denoiser, [0, 1]) for _, _, denoiser in both)
    assert 0 < (a - b).norm() < 0.02 * b.norm()                                       # half precision


def test_long_names_stay_below_their_own_tile(diffused):
    """ShapeNet's and SRN's names have 24 characters and more"""
    model, names, denoiser = sample.load_models(sample.Config(diffusion=str(diffused)), "cpu")
    training = stage.latents_of(model, model.codes)
    views = volume_render.render_views(model, training, volume_render.cameras(volume_render.ANGLES), 64)
    rows = sample.novelty(training, training, itself=True)
    whose = [*range(len(names))]
    sheet = sample.contact_sheet(views, rows, range(len(rows)), views, whose, ["W" * 40] * len(names))
    # Of thousands a part is drawn, in any order
    other = [whose[-1], *whose[:-1]]
    again = sample.contact_sheet(views, rows, range(len(rows)), [some[other] for some in views], other,
                                 ["W" * 40] * len(names))
    assert np.array_equal(again, sheet)
    tile = 2 * volume_render.SIZE
    captions = sheet[14 + tile:14 + tile + 14]                                       # of the first sample
    assert (captions[:, 5 * (tile + 4):] < 128).any()
    for column in range(5, 11):                                    # white between one caption and the next
        assert (captions[:, column * (tile + 4) - 1:column * (tile + 4) + 1] == 255).all()


def test_what_an_earlier_model_left_goes_and_two_do_not_share_a_folder(diffused, tmp_path, no_pages):
    flags = ["--diffusion", str(diffused), "--views", "2", "--size", "16", "--out", str(tmp_path)]
    sample.main([*flags, "--count", "3"])
    sample.main([*flags, "--count", "1", "--seed", "9"])
    assert [path.name for path in (tmp_path / "views").iterdir()] == ["seed_000009"]
    held = common.Run(tmp_path, "sample", sample.Config(), (), "sample.json", stale=())
    told(lambda: sample.main(flags), "another run is writing", "another --out")
    held.lock.close()
    report = (tmp_path / "report.json").read_text()
    json.loads(report, parse_constant=lambda name: pytest.fail(name))             # plain JSON: no NaN


def test_a_missing_last_checkpoint_is_the_one_before_it(diffused, tmp_path, capsys, monkeypatch):
    (tmp_path / "runs/diffusion").mkdir(parents=True)
    (tmp_path / "runs/diffusion/previous.pt").write_bytes((diffused / "previous.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    sample.load_models(sample.Config(), "cpu")
    said = capsys.readouterr().out
    assert "last.pt is not there: taking" in said and "in the box" not in said


def test_a_fingerprint_is_of_every_bit_and_of_no_thread(trained):
    model, _ = autodecoder.load_autodecoder(trained)
    before, threads = stage.fingerprint(model), torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    assert stage.fingerprint(model) == before
    torch.set_num_threads(threads)
    model.shapes[0, 0] = torch.nextafter(model.shapes[0, 0], torch.tensor(9.0))
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

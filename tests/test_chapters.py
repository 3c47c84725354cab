"""The chapters: their networks do what they say, and each trains by a stage's loop."""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import common
import diffusion
import volume_render
from chapters import few_views, hybrid, unet
from common import UserError
from conftest import train
from test_diffusion import Linear

# ---- hybrid ----


@pytest.mark.parametrize("change, latent", [
    ({}, (2, 3, 16, 8, 8)),
    ({"grid_latent": True}, (2, 3, 16, 8, 8)),
    ({"planes": False}, (2, 16, 8, 8, 8)),
    ({"planes": False, "grid_latent": True, "coordinates": False}, (2, 16, 8, 8, 8)),
    ({"attention": True, "bands": 0, "features": 5}, (2, 3, 16, 8, 8))])
def test_every_knob_decodes_and_learns(change, latent):
    config = replace(hybrid.Config(), channels=(16, 16), shape_width=12, precision="float32", **change)
    torch.manual_seed(0)
    model = hybrid.HybridDecoder(config, 3)
    z = model.to_latent(model.codes[:2])
    v = model.to_volume(z)
    assert z.shape == latent and v.shape == (2, config.features, 32, 32, 32)
    sigma, rgb = model.field(torch.randn(5, 7, config.features), torch.rand(5, 7, 3) - 0.5)
    assert sigma.shape == (5, 7) and rgb.shape == (5, 7, 3)
    assert (sigma >= 0).all() and 0 <= rgb.min() and rgb.max() <= 1
    density = volume_render.density(v, model.field)
    colour = model.field(v.movedim(1, -1), torch.zeros(2, *v.shape[2:], 3))[1]
    (density.mean() + colour.mean()).backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    attention = ["norm.weight", "norm.bias", "qkv.weight", "qkv.bias"]
    assert unused in ([], [f"levels.0.1.{name}" for name in attention])      # attention begins as 0


@pytest.mark.parametrize("width, heads", [(16, 4), (6, 2), (5, 1)])
def test_heads_divide_the_channels(width, heads):
    attention = hybrid.Attention(width)
    assert attention.heads == heads and attention(torch.randn(2, width, 3, 3, 3)).shape == (2, width, 3, 3, 3)


def test_adding_the_coordinates_is_concatenating_them():
    block = hybrid.Block(8, torch.nn.Conv3d, True)
    x = torch.randn(2, 8, 4, 4, 4)
    h = F.silu(block.norm1(x))
    joined = F.conv3d(torch.cat([h, hybrid.coordinates(x).expand(2, -1, -1, -1, -1)], 1),
                      torch.cat([block.conv1.weight, block.where.weight], 1), block.conv1.bias, padding=1)
    expected = x + block.conv2(F.silu(block.norm2(joined)))
    assert (block(x) - expected).abs().max() < 1e-5
    where = hybrid.coordinates(x)[0]
    assert where[0, 0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]         # x along W
    assert where[2, :, 0, 0].tolist() == [-0.75, -0.25, 0.25, 0.75]      # z along D


def test_children_take_their_places_in_planes_too():
    x = torch.arange(16.0).view(1, 16, 1, 1, 1)
    volume = hybrid.unfold_children(x, 2)
    assert volume[0, 1, 0, 1, 1] == 8 + 3 and volume[0, 0, 1, 0, 0] == 4
    planes = hybrid.unfold_children(torch.arange(24.0).view(1, 4, 3, 2), 1)
    assert planes.shape == (1, 1, 6, 4)
    assert planes[0, 0, 0, :2].tolist() == [0, 6] and planes[0, 0, 1, :2].tolist() == [12, 18]


def test_planes_summed_into_a_volume_are_planes():
    xy, xz, yz = torch.randn(3, 1, 2, 8, 8)
    volume = xy[:, :, None] + xz[:, :, :, None] + yz[..., None]
    p = torch.rand(1, 40, 3) - 0.5
    at = lambda plane, axes: F.grid_sample(plane, 2 * p[:, :, None, axes], align_corners=False,
                                           padding_mode="border")[0, :, :, 0].T
    planes = at(xy, [0, 1]) + at(xz, [0, 2]) + at(yz, [1, 2])
    assert (volume_render.lookup(volume, p)[0] - planes).abs().max() < 1e-5


def test_a_stage_does_not_take_a_chapters_model_for_its_own(data, tmp_path):
    from conftest import SMOKE
    flags = ["--data", str(data / "earphones_train"), "--holdout_views", "2", "--out", str(tmp_path / "run")]
    hybrid.main([*SMOKE, *flags, "--channels", "8"])
    hybrid.main([*SMOKE, *flags, "--channels", "8"])                         # resumes, and has nothing to do
    assert "ours" in (tmp_path / "run/table.txt").read_text()
    with pytest.raises(UserError, match="by a chapter"):
        diffusion.main(["--autodecoder", str(tmp_path / "run"), "--out", str(tmp_path / "x")])


# ---- few views ----

def test_codes_are_fitted_to_unseen_objects(data, trained, tmp_path, capsys):
    flags = ["--autodecoder", str(trained), "--data", str(data / "earphones_test"), "--out", str(tmp_path),
             "--device", "cpu", "--steps", "5", "--objects", "0"]
    for views in ("1", "2"):
        few_views.main([*flags, "--views", views])
        said = capsys.readouterr().out
        assert "2 unseen objects" in said and f"{views} photos each" in said
        assert (tmp_path / f"views_{views}.png").exists()
        assert "ours" in (tmp_path / f"views_{views}.txt").read_text()
    with pytest.raises(UserError, match="--views 6"):
        few_views.main([*flags, "--views", "6"])


def test_one_object_has_no_spread_to_fit_by(data, tmp_path):
    train(data, tmp_path / "one", "--objects", "1")
    with pytest.raises(UserError, match="knows one object"):
        few_views.main(["--autodecoder", str(tmp_path / "one"), "--data", str(data / "earphones_test"),
                        "--out", str(tmp_path)])


# ---- unet ----

@pytest.mark.parametrize("options, shape", [({}, (16, 8, 8, 8)), ({"levels": (8, 16, 24)}, (4, 8, 8, 8))])
def test_the_u_net_begins_linear_and_sees_the_level(options, shape):
    denoiser = unet.LatentDenoiser(replace(unet.Config(), **options), Linear(3, shape=shape))
    assert sum(p.numel() for p in denoiser.network.parameters()) < 5e6
    x, latents = torch.randn(2, *shape), torch.randn(3, *shape)
    assert denoiser.network(x, torch.zeros(2)).abs().max() == 0
    assert torch.allclose(denoiser.latents(denoiser.to_components(latents)), latents, atol=1e-5)
    sigma = torch.full((3, 1), 2.0)
    flat = denoiser.to_components(latents)
    assert torch.allclose(denoiser.denoise(flat, sigma), flat / 5)           # c_skip of a unit deviation
    for p in denoiser.network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    a, b = denoiser.network(x, torch.tensor([0.0, 0.0])), denoiser.network(x, torch.tensor([0.0, 1.0]))
    assert a.shape == x.shape and torch.allclose(a[0], b[0], atol=1e-5)
    assert (a[1] - b[1]).abs().max() > 1e-4                                  # level is used
    a.sum().backward()
    assert all(p.grad is not None for p in denoiser.network.parameters())


def test_the_u_net_trains_and_writes_its_samples(trained, tmp_path, capsys):
    flags = ["--preset", "smoke", "--steps", "4", "--preview_every", "4", "--save_every", "4",
             "--device", "cpu", "--autodecoder", str(trained), "--out", str(tmp_path / "run")]
    unet.main(flags)
    assert "Outside the span" in capsys.readouterr().out and (tmp_path / "run/samples.png").exists()
    first = common.load_checkpoint(tmp_path / "run/latents.pt")["latents"]
    assert first.shape == (2, 16, 8, 8, 8) and first.isfinite().all()
    unet.main(flags)                                                # trained already: the same samples
    assert torch.equal(common.load_checkpoint(tmp_path / "run/latents.pt")["latents"], first)

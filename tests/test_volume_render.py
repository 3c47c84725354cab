"""The renderer against closed forms and against a plain Python loop, values and gradients."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import volume_render as v
from common import camera_to_world_at, intrinsics_at
from shapes.packed import Photos


def camera(size=16, azimuth=30, elevation=20):
    pose = camera_to_world_at(azimuth, elevation, 1.3).float()[None]
    return v.camera_rays(pose, intrinsics_at(size, 131.25).float()[None], size)


def uniform(sigma, rgb):
    """(1,4,8,8,8) of one density and one colour, whatever the field's activations."""
    channels = torch.tensor([math.log(math.expm1(sigma)), *torch.logit(torch.tensor(rgb)).tolist()])
    return channels.view(1, 4, 1, 1, 1).expand(1, 4, 8, 8, 8).clone()


@pytest.mark.parametrize("sigma", [0.1, 2.0, 50.0])
@pytest.mark.parametrize("samples", [1, 7, 64])
def test_a_uniform_slab_obeys_beer_and_lambert(sigma, samples):
    origins, directions = camera()
    near, far = v.cube(origins, directions)
    rgb, alpha, depth = v.render(uniform(sigma, (0.2, 0.5, 0.9)), origins, directions, samples)
    path = (far - near) * directions.norm(dim=-1)       # the distance through the cube, not that in depth
    expected = 1 - torch.exp(-sigma * path)
    assert (alpha - expected).abs().max() < 1e-5
    colour = torch.tensor([0.2, 0.5, 0.9])
    assert (rgb - (expected[..., None] * colour + (1 - expected[..., None]))).abs().max() < 1e-5
    seen = alpha > 0.01
    assert (depth[seen] > near[seen]).all() and (depth[seen] < far[seen]).all() and depth[~seen].isinf().all()


@pytest.mark.parametrize("place, skip", [(0.0, False), (0.0, True), (0.9999, False), (0.9999, True)])
def test_a_sample_lies_at_its_place_in_its_bin(place, skip):
    """One bin for the whole way through the cube: the depth is the sample's own"""
    volume, (origins, directions) = uniform(50.0, (0.2, 0.5, 0.9)), camera()
    near, far = v.cube(origins, directions)
    alpha, depth = v.render(volume, origins, directions, 1, place=torch.full((*near.shape, 1), place),
                            occupied=v.occupancy(volume) if skip else None)[1:]
    seen = alpha > 0.5
    assert seen.any() and (depth - (near + place * (far - near)))[seen].abs().max() < 1e-5


def test_values_and_gradients_equal_a_plain_loop():
    """One number after another, in float64: the cube, the lookup, the sum."""
    generator = torch.Generator().manual_seed(0)
    volume = torch.randn(1, 4, 3, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    origins, directions = (t.double()[:, 100:140] for t in camera())
    S = 9

    def loop(volume):
        pixels = []
        for o, d in zip(origins[0], directions[0]):
            near, far = 0.0, math.inf
            for a in range(3):
                t1, t2 = sorted([((-0.5 - o[a]) / d[a]).item(), ((0.5 - o[a]) / d[a]).item()])
                near, far = max(near, t1), min(far, t2)
            far = max(near, far)
            step = (far - near) / S
            left, colour, opacity = 1.0, torch.zeros(3, dtype=torch.float64), 0.0
            for s in range(S):
                p = o + (near + (s + 0.5) * step) * d
                channels = torch.zeros(4, dtype=torch.float64)
                where = [(p[a] + 0.5) * volume.shape[4 - a] - 0.5 for a in range(3)]       # x, y, z in voxels
                where = [w.clamp(0, volume.shape[4 - a] - 1) for a, w in enumerate(where)]
                for corner in range(8):
                    weight, index = 1.0, []
                    for a in range(3):
                        low = min(int(where[a]), volume.shape[4 - a] - 2)
                        up = corner >> a & 1
                        weight = weight * (where[a] - low if up else low + 1 - where[a])
                        index.append(low + up)
                    channels = channels + weight * volume[0, :, index[2], index[1], index[0]]
                tau = F.softplus(channels[0]) * step * d.norm()
                share = left * (1 - torch.exp(-tau))
                colour, opacity = colour + share * torch.sigmoid(channels[1:]), opacity + share
                left = left * torch.exp(-tau)
            pixels.append(torch.cat([colour + left, torch.as_tensor(opacity).view(1)]))
        return torch.stack(pixels)

    def ours(volume):
        rgb, alpha, _ = v.render(volume, origins, directions, S)
        return torch.cat([rgb[0], alpha[0, :, None]], 1)

    weight = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    results = []
    for renderer in (loop, ours):
        out = renderer(volume)
        results.append((out, torch.autograd.grad((out * weight).sum(), volume)[0]))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-9
    assert (results[0][1] - results[1][1]).abs().max() < 1e-9 and results[1][1].abs().max() > 0.01


def test_opacity_stays_within_0_and_1():
    generator = torch.Generator().manual_seed(1)
    volume = torch.randn(2, 4, 8, 8, 8, generator=generator) * 300
    origins, directions = (t.expand(2, -1, -1) for t in camera())
    place = torch.rand(*origins.shape[:2], 32, generator=generator)
    rgb, alpha, _ = v.render(volume, origins, directions, 32, place=place)
    assert alpha.min() >= 0 and alpha.max() <= 1 + 1e-6 and alpha.max() > 0.99
    assert rgb.min() >= 0 and rgb.max() <= 1 + 1e-6


def test_splitting_bins_changes_nothing():
    generator = torch.Generator().manual_seed(2)
    sigma, rgb = torch.rand(5, 12, generator=generator) * 9, torch.rand(5, 12, 3, generator=generator)
    length = torch.rand(5, 12, generator=generator) * 0.2
    whole = v.composite(sigma, rgb, length, torch.zeros(5, 12))
    halves = v.composite(*(x.repeat_interleave(2, 1) for x in (sigma, rgb, length / 2, torch.zeros(5, 12))))
    assert (whole[0] - halves[0]).abs().max() < 1e-6 and (whole[1] - halves[1]).abs().max() < 1e-6


def test_an_opaque_sample_hides_what_is_behind_it_but_not_itself():
    """A common slip, the inclusive product, gives it no weight at all."""
    sigma, rgb = torch.tensor([[100.0, 100.0]]), torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    image, alpha, depth = v.composite(sigma, rgb, torch.ones(1, 1), torch.tensor([[1.0, 2.0]]))
    assert alpha > 0.999 and torch.allclose(image, rgb[:, 0], atol=1e-6) and depth == 1


def test_rays_that_miss_are_white_with_no_gradient():
    volume = uniform(50.0, (0.1, 0.1, 0.1)).requires_grad_()
    origins = torch.tensor([[[2.0, 0, 0], [0, 2, 0], [0, 0, 0.6]]])
    directions = torch.tensor([[[1.0, 0, 0], [1, 0, 0], [1, 1, 0]]])         # away from it, past it, above it
    for occupied in (None, v.occupancy(volume)):
        rgb, alpha, depth = v.render(volume, origins, directions, 16, occupied=occupied)
        assert (rgb == 1).all() and (alpha == 0).all() and depth.isinf().all()
        gradient = torch.autograd.grad(rgb.sum() + alpha.sum(), volume)[0]
        assert (gradient == 0).all()


def test_rays_go_through_their_pixels():
    """A point on a pixel's ray projects back into the pixel's centre, and its t is its depth."""
    K, pose = intrinsics_at(20, 131.25).float(), camera_to_world_at(77, -40, 1.3).float()
    origins, directions = v.camera_rays(pose, K, 20)
    t = torch.rand(400, generator=torch.Generator().manual_seed(3)) + 0.5
    x = (origins + t[:, None] * directions - pose[:3, 3]) @ pose[:3, :3]
    assert (x[:, 2] - t).abs().max() < 1e-5
    pixel = (x / x[:, 2:]) @ K.T
    assert (pixel[:, 0].view(20, 20) - (torch.arange(20) + 0.5)).abs().max() < 1e-4
    assert (pixel[:, 1].view(20, 20) - (torch.arange(20)[:, None] + 0.5)).abs().max() < 1e-4


def test_axes_are_z_y_x():
    """A light in the voxel of largest z is seen at the top by a level camera."""
    volume = torch.full((1, 4, 8, 8, 8), -20.0)
    volume[0, 0, 7, 3:5, 3:5] = 50.0
    origins, directions = camera(32, 0, 0)
    alpha = v.render(volume, origins, directions, 64)[1].view(32, 32)
    assert alpha[:16].sum() > 5 and alpha[16:].sum() < 0.01
    rows, columns = (alpha > 0.5).nonzero(as_tuple=True)
    assert abs(columns.float().mean() - 15.5) < 0.6


@pytest.mark.parametrize("samples, generator", [(64, None), (48, 5), (37, None), (6, 6), (4, 3), (2, 1)])
def test_skipping_empty_space_changes_nothing(samples, generator):
    example = v.headphones(32, 2000.0)
    volumes = torch.cat([example, example.flip(2), torch.full((1, 4, 32, 32, 32), -30.0)])
    volumes.requires_grad_()
    origins, directions = (torch.cat([a, b, a]) for a, b in zip(camera(24), camera(24, 200, -30)))
    results = []
    for occupied in (None, v.occupancy(volumes)):
        g = torch.Generator().manual_seed(generator or 0)
        place = torch.rand(*origins.shape[:2], samples, generator=g) if generator else None
        rgb, alpha, depth = v.render(volumes, origins, directions, samples, place=place, occupied=occupied)
        gradient = torch.autograd.grad((rgb * rgb).sum() + alpha.sum(), volumes)[0]
        results.append((rgb, alpha, depth, gradient))
    (rgb, alpha, depth, gradient), (rgb2, alpha2, depth2, gradient2) = results
    assert (rgb - rgb2).square().mean() < 1e-8 and (alpha - alpha2).abs().max() < 1e-3           # 80 dB
    assert (depth - depth2)[alpha > 0.5].abs().max() < 1e-4
    assert torch.cosine_similarity(gradient.flatten(), gradient2.flatten(), dim=0) > 0.9999
    assert (rgb2[2] == 1).all()                                                         # nothing there at all


def test_a_cell_is_occupied_if_a_voxel_at_its_corners_is_dense():
    N, volume = 4, torch.full((1, 4, 4, 4, 4), -30.0)
    for z, y, x in ((0, 1, 3), (2, 3, 1), (3, 3, 3)):                    # on an edge, on a face, in a corner
        volume[0, 0, z, y, x] = 5.0
    dense = v.density(volume)[0] > v.EMPTY
    expected = torch.zeros(1, N + 1, N + 1, N + 1, dtype=torch.bool)
    for cell in itertools.product(range(N + 1), repeat=3):
        for corner in itertools.product((-1, 0), repeat=3):
            k, j, i = (c + step for c, step in zip(cell, corner))
            if all(0 <= n < N for n in (k, j, i)) and dense[k, j, i]:
                expected[0, cell[0], cell[1], cell[2]] = True
    assert torch.equal(v.occupancy(volume), expected)
    assert 0 < v.occupancy(v.headphones(32, 2000.0)).float().mean() < 0.5


def test_a_field_is_told_x_y_and_z():
    for axis, (n, shape) in enumerate([(5, (1, 1, 1, 5)), (4, (1, 1, 4, 1)), (3, (1, 3, 1, 1))]):
        found = v.density(torch.zeros(1, 1, 3, 4, 5), field=lambda channels, p: (p[..., axis], None))
        assert torch.allclose(found, ((torch.arange(n) + 0.5) / n - 0.5).view(shape).expand(1, 3, 4, 5))


def test_where_nothing_is_all_is_white():
    volume = torch.full((2, 4, 16, 16, 16), -30.0, requires_grad=True)
    origins, directions = (rays.expand(2, -1, -1) for rays in camera(8))
    rgb, alpha, depth = v.render(volume, origins, directions, 16, occupied=v.occupancy(volume))
    assert (rgb == 1).all() and (alpha == 0).all() and depth.isinf().all()
    assert (torch.autograd.grad(rgb.sum() + alpha.sum(), volume)[0] == 0).all()


def test_one_sample_is_looked_up_where_it_is():
    volume = torch.randn(3, 5, 4, 4, 4, generator=torch.Generator().manual_seed(4))
    position = torch.rand(50, 3, generator=torch.Generator().manual_seed(5)) - 0.5
    owner = torch.tensor([0] * 20 + [2] * 30)
    expected = torch.stack([v.lookup(volume[o][None], p.view(1, 1, 3))[0, 0]
                            for o, p in zip(owner, position)])
    assert (v.lookup_sparse(volume, position, owner) - expected).abs().max() < 1e-6
    alone = v.lookup_sparse(volume[:1], position, owner * 0)
    assert (alone - v.lookup(volume[:1], position[None])[0]).abs().max() < 1e-6


def test_the_example_runs(tmp_path, capsys):
    v.main(["--out", str(tmp_path), "--size", "32", "--samples", "32", "--resolution", "32"])
    assert "million rays per second" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["colour.png", "depth.png", "opacity.png"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    volume, (origins, directions) = v.headphones(32, 2000.0), camera(32)
    for skip in (False, True):
        results = []
        for device in ("cpu", "cuda"):
            moved = volume.to(device)
            occupied = v.occupancy(moved) if skip else None
            results.append(v.render(moved, origins.to(device), directions.to(device), 64, occupied=occupied))
        for a, b in zip(*results):
            assert (a - b.cpu()).nan_to_num(0, 0, 0).abs().max() < 1e-4


def test_the_score_of_a_view_by_hand(monkeypatch):
    """A grey picture of a photo whose columns are: the object, its faint edge, two next to it, four beyond"""
    mask, rgb = torch.zeros(1, 1, 8, 8).byte(), torch.full((1, 1, 8, 8, 3), 255.0).byte()
    mask[..., 0], mask[..., 1], rgb[..., 0, :] = 255, 100, 0
    alpha = torch.tensor([1.0, 1, 1, 1, 0.7, 0.1, 0, 0]).expand(8, 8)
    monkeypatch.setattr(v, "render_view", lambda *_: (torch.full((8, 8, 3), 0.9), alpha, None))
    photos = Photos(rgb, mask, torch.eye(4).view(1, 1, 4, 4), torch.eye(3)[None], ["one"])
    row, = v.score_views(SimpleNamespace(volumes_of=lambda codes: None), torch.zeros(1, 3), photos, [0], [0])
    error = {"ours": (0.81 + 7 * 0.01) / 8, "ours_fg": 0.81, "white": 1 / 8, "white_fg": 1.0}
    assert all(abs(row[key] + 10 * math.log10(some)) < 1e-4 for key, some in error.items())
    assert row["object"] == 0 and abs(row["haze"] - 0.2) < 1e-6


def test_the_closing_table_passes_over_kinds_that_no_chosen_object_is_of():
    rows = [{"object": o, **{key: 1.0 + o for key in ("ours", "ours_fg", "white", "white_fg", "haze")}}
            for o in (0, 2)]
    lines = v.table(rows, ["buds", "on-ear", "buds"]).splitlines()
    assert [line.split()[0] for line in lines] == ["PSNR,", "buds", "all"] and "2 objects    2.00" in lines[1]

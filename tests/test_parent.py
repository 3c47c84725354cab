"""What else the parent paper does: hashed codes, perceptual loss, learned cameras, things that move."""
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from chapters import cameras, hash_codes, linkage, parts, perceptual, poses
from common import UserError
from shapes import moving
from shapes.packed import read_photos
from volume_render import camera_rays, render

SMALL = dict(channels=(4,), latent_channels=11, shape_width=16)

# ---- hash codes ----


def hashed(objects=512, **more):
    return hash_codes.HashedAutodecoder(replace(hash_codes.Config(**SMALL, pieces=8), **more), objects)


def test_a_code_is_put_together_from_pieces_where_the_hash_says():
    model, which = hashed(), torch.tensor([0, 7, 511])
    code = model.rows(model.shapes, which)
    for b, i in enumerate(which.tolist()):
        for p in range(8):
            entry = (i * model.a[p].item() + model.b[p].item()) % 2 ** 32 * model.entries >> 32
            assert torch.equal(code[b, 2 * p:2 * p + 2], model.shapes[p * model.entries + entry])
    assert model.codes.shape == (512, 16 + 9 + 3) and model.shapes.numel() == 512 * 16 / 4


def test_only_the_pieces_of_a_steps_objects_get_a_gradient():
    model = hashed()
    model.code(torch.zeros(1, 3), torch.tensor([3]), torch.zeros(1, 9)).sum().backward()
    assert model.shapes.grad.is_sparse and model.shapes.grad._nnz() == 8
    assert torch.equal(model.shapes.grad._indices()[0], model.places(torch.tensor([3]))[0])


def test_strangers_share_few_pieces_unless_the_hash_is_one_for_all():
    assert "0 pairs have one code" in hash_codes.collisions(hashed())
    twins = hashed(hash="modulo")
    assert torch.equal(twins.codes[5], twins.codes[5 + twins.entries])
    assert not torch.equal(hashed().codes[5], hashed().codes[5 + twins.entries])
    assert " 768 pairs" in hash_codes.collisions(twins)                      # 128 fours, of six pairs each


def test_pieces_must_divide_the_code():
    with pytest.raises(UserError, match="--pieces 5: 16 numbers cannot be cut"):
        hashed(pieces=5)


def test_sparse_adam_holds_less_and_codebooks_less_still():
    (N, _, dense, _, sparse, _, books), = hash_codes.costs(hash_codes.Config(**SMALL, pieces=8), [1000])
    assert N == 1000 and books < 0.5 * sparse < 0.5 * dense


# ---- perceptual ----


def test_features_are_the_same_each_time_and_read_after_the_first_of_each_block():
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = perceptual.Features()(x)
    assert [tuple(some.shape[1:]) for some in found] == [(16, 32, 32), (32, 16, 16), (64, 8, 8), (128, 4, 4),
                                                         (128, 2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(found, perceptual.Features()(x)))
    assert all(0.05 < some.square().mean() < 20 for some in found)           # neither dies nor explodes


def vgg_like():
    before, state = 3, {"classifier.0.weight": torch.zeros(2)}
    for number, width in perceptual.LAYERS:
        state |= {f"features.{number}.weight": 0.01 * torch.randn(width, before, 3, 3),
                  f"features.{number}.bias": torch.zeros(width)}
        before = width
    return state


def test_weights_of_a_file_are_checked_and_used(tmp_path):
    state, file = vgg_like(), tmp_path / "vgg19.pth"
    torch.save(state, file)
    x = torch.rand(1, 3, 16, 16)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    plain = (x - mean[:, None, None]) / deviation[:, None, None]
    wanted = F.relu(F.conv2d(plain, state["features.0.weight"], padding=1))
    assert torch.allclose(perceptual.Features(str(file))(x)[0], wanted, atol=1e-6)
    for change, message in ((lambda s: s.pop("features.28.bias"), "features.28.bias is not in it"),
                            (lambda s: s.update({"features.5.weight": torch.zeros(3)}), "another shape")):
        wrong = dict(state)
        change(wrong)
        torch.save(wrong, file)
        with pytest.raises(UserError, match=message):
            perceptual.Features(str(file))
    file.write_bytes(b"no weights")
    (tmp_path / "empty.pth").touch()
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (file, *(tmp_path / f"{name}.pth" for name in ("absent", "empty", "pipe"))):
        with pytest.raises(UserError, match="cannot be read"):
            perceptual.Features(str(path))


def test_features_prefer_a_sharp_edge_near_its_place_to_a_blur():
    """...where the squared error prefers the blur: that is the chapter's point"""
    def edge(at, soft):
        x = torch.arange(32.0)
        return ((x - at) / soft).sigmoid().expand(1, 3, 32, 32)
    truth, moved, blurred = edge(16, 0.1), edge(18, 0.1), edge(16, 2.5)
    features = perceptual.Features()
    error = lambda some: (some - truth).square().mean()
    loss = lambda some: perceptual.perceptual_loss(features, some, truth)
    assert error(blurred) < error(moved) and loss(moved) < loss(blurred) and loss(truth) == 0


def test_a_patch_is_a_piece_of_a_photo(data):
    config = perceptual.Config(size=32, rays=400, batch_objects=2, patch=8)
    photos = read_photos(str(data / "earphones_train"), 32)
    objects, origins, directions, rgb, mask = perceptual.draw_patches(photos, config, torch.arange(3),
                                                                      torch.Generator().manual_seed(0))
    assert rgb.shape == (2, 200, 3) == directions.shape
    for b, o in enumerate(objects.tolist()):
        patch = (rgb[b, :64].view(8, 8, 3) * 255).round()
        pieces = photos.rgb[o, :3].float().unfold(1, 8, 1).unfold(2, 8, 1)       # (V,25,25,3,8,8)
        assert (pieces.permute(0, 1, 2, 4, 5, 3) == patch).all((-1, -2, -3)).any()
        assert mask[b, :64].max() > 0                                            # near the object


# ---- cameras ----


def test_angles_and_poses_are_each_others_inverse():
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(50, 3, generator=generator) - 0.5) * torch.tensor([6.2, 2.7, 3.0])
    pose = poses.pose_of(angles)
    assert torch.allclose(poses.angles_of(pose[:, :3, :3]), angles, atol=1e-4)
    assert torch.allclose(pose[:, :3, 3], -1.3 * pose[:, :3, 2], atol=1e-5)      # it looks at the middle
    flat = poses.pose_of(torch.tensor([0.5, 0.3, 0.0]))
    known = common.camera_to_world_at(math.degrees(0.5), math.degrees(0.3), 1.3)
    assert torch.allclose(flat.double(), known, atol=1e-6)


def test_noise_has_the_size_that_is_asked_for():
    true = torch.eye(3).expand(4000, 3, 3)
    off = poses.degrees_off(poses.noisy(true, 20, torch.Generator().manual_seed(0)), true)
    assert abs(off.square().mean().sqrt() - 20) < 0.5


def test_errors_are_measured_up_to_the_frame_and_confusions_apart():
    generator = torch.Generator().manual_seed(0)
    angles = (torch.rand(4, 30, 3, generator=generator) - 0.5) * torch.tensor([6.2, 2, 0])
    true = poses.pose_of(angles)[..., :3, :3]
    found = angles + torch.tensor([1.0, 0, 0])                                   # all are turned alike
    found[:, :6, 0] += math.pi                                                   # and a fifth is behind
    lines, turned = poses.measure(found, true, torch.zeros(4).long())
    assert "within 15 degrees 80%; from behind 20% more, in a mirror 0% more" in lines[0]
    assert (poses.degrees_off(poses.pose_of(turned)[..., :3, :3], true) < 1).float().mean() > 0.79


def test_an_object_that_is_tilted_has_a_frame_of_its_own():
    true = poses.noisy(torch.eye(3).expand(3, 30, 3, 3), 80, torch.Generator().manual_seed(0))
    tilts = poses.noisy(torch.eye(3).expand(3, 1, 3, 3), 6, torch.Generator().manual_seed(1))
    lines, _ = poses.measure(poses.angles_of(tilts @ true), true, torch.zeros(3).long())
    off = [float(line.split("off by ")[1].split()[0]) for line in lines]
    assert off[0] > 1 and off[2] == 0


def test_silhouettes_alone_tell_where_the_cameras_were():
    """One lopsided shape, 40 silhouettes from unknown sides"""
    sides = poses.all_sides(60)[5 * 24:8 * 24]                                   # three heights of 24
    volume = torch.full((1, 1, 20, 20, 20), -20.0)
    volume[0, 0, 4:10, 5:15, 9:12] = volume[0, 0, 8:17, 5:8, 9:12] = volume[0, 0, 4:8, 5:8, 10:18] = 20
    field = lambda channels, position: (F.softplus(channels[..., 0]), channels.expand(*position.shape) * 0)
    pick = torch.randint(len(sides), (40,), generator=torch.Generator().manual_seed(0))
    rays = camera_rays(poses.pose_of(sides[pick]), common.intrinsics_at(poses.SIDE).float(), poses.SIDE)
    masks = render(volume, *(some.flatten(0, 1)[None] for some in rays), 24, field)[1].view(1, 40, -1)
    config = cameras.Config(clusters=1, rounds=40)
    errors = []
    for seed in range(2):
        found, which, error = poses.bootstrap(masks, sides, config, torch.Generator().manual_seed(seed),
                                                lambda *_: None)
        errors.append((error, found))
    found = min(errors, key=lambda some: some[0])[1]
    true = poses.pose_of(sides[pick])[None, :, :3, :3]
    off = poses.degrees_off(poses.best_frame(poses.pose_of(found)[..., :3, :3], true, False), true)
    assert (off < 20).float().mean() > 0.8


# ---- things that move ----


def small_mover(objects=2, frames=6):
    torch.manual_seed(0)
    return linkage.Moving(parts.Config(**SMALL), objects, frames)


def test_a_part_turns_about_its_pivot_and_the_band_stays():
    model = small_mover()
    still = model.transforms(torch.zeros(6, 3, 6))
    assert torch.allclose(still, torch.eye(3, 4).expand(6, 4, 3, 4), atol=1e-6)
    turned = torch.zeros(3, 6)
    turned[0, 2], turned[0, 3] = math.pi / 2, 0.1                                # about z, then along x
    T = model.transforms(turned)
    x = model.pivot[1] + torch.tensor([0.2, 0, 0])
    wanted = model.pivot[1] + torch.tensor([0.1, 0.2, 0])
    assert torch.allclose(T[1, :, :3] @ x + T[1, :, 3], wanted, atol=1e-5)
    assert torch.allclose(T[0], torch.eye(3, 4)) and torch.allclose(T[2], torch.eye(3, 4), atol=1e-6)


def test_a_still_frame_looks_as_the_renderer_says():
    model, generator = small_mover(), torch.Generator().manual_seed(0)
    volume = torch.randn(1, 8, 8, 8, 8, generator=generator)
    rays = camera_rays(poses.pose_of(torch.tensor([[0.4, 0.3, 0.0]])), common.intrinsics_at(8).float(), 8)
    still = torch.eye(3, 4).expand(1, 64, 4, 3, 4)
    rgb, alpha, shares = linkage.render_parts(model, volume, *rays, still, 24, None, True)
    wanted, opacity, _ = render(volume, *rays, 24, model.field)
    assert torch.allclose(rgb, wanted, atol=1e-4) and torch.allclose(alpha, opacity, atol=1e-5)
    assert torch.allclose(shares.sum(-1), alpha, atol=1e-3)
    shown = linkage.posed(model, volume, still[0, 0], 8)
    density = lambda some: model.field(some.movedim(0, -1), None)[0]
    assert torch.allclose(density(shown), density(volume[0]), atol=1e-2)


def test_skipping_what_is_empty_changes_neither_the_picture_nor_the_gradient():
    model, generator = small_mover(), torch.Generator().manual_seed(0)
    volume = 2 * torch.randn(2, 8, 8, 8, 8, generator=generator) - 1
    volume[:, 0] -= 2                                                            # much is empty
    rays = [some.expand(2, -1, -1) for some in camera_rays(poses.pose_of(torch.tensor([[0.4, 0.3, 0.0]])),
                                                           common.intrinsics_at(8).float(), 8)]
    moved = model.transforms(0.3 * torch.randn(2, 64, 3, 6, generator=generator)).detach().requires_grad_()
    found = []
    for dense in (True, False):
        some = linkage.render_parts(model, volume, *rays, moved, 24, None, dense)
        pictures = torch.cat([one.flatten() for one in some])
        found.append((pictures, torch.autograd.grad(pictures.square().sum(), moved)[0]))
    (a, da), (b, db) = found
    assert (a - b).abs().max() < 0.04 and F.cosine_similarity(da.flatten(), db.flatten(), 0) > 0.99
    numbers, real = linkage.not_empty(model, volume, rays[0][:, :, None] + rays[1][:, :, None], moved)
    assert real.float().mean() <= 1 and numbers.max() < 64


def test_parts_are_matched_before_they_are_compared():
    true = torch.randint(0, 5, (3, 8, 8), generator=torch.Generator().manual_seed(0))
    order = torch.tensor([2, 0, 3, 1])
    maps = F.one_hot(order[(true - 1).clamp(min=0)], 4).float()
    assert linkage.share_of_parts(maps, (true > 0).float(), true) == [1.0] * 4


def test_a_film_folds_rigidly_and_its_parts_are_named(tmp_path):
    moving.main(["--objects", "1", "--frames", "6", "--size", "32", "--out", str(tmp_path)])
    kept = np.load(tmp_path / "films/film_00000/parts.npz")
    T, seen = kept["transforms"], kept["seen"]
    R = T[..., :3, :3]
    assert np.allclose(R @ R.swapaxes(-1, -2), np.eye(3), atol=1e-9) and np.allclose(T[:, 0], np.eye(4))
    assert np.ptp(R[:, 1], 0).max() > 0.3 and np.ptp(R[:, 2], 0).max() > 0.3     # both cups turn
    assert seen.shape == (6, 32, 32) and {0, 1, 2, 3} <= set(np.unique(seen)) <= {0, 1, 2, 3, 4}
    photos = read_photos(tmp_path / "films", 32)
    assert ((photos.mask[0] > 200) & (torch.from_numpy(seen) == 0)).float().mean() < 0.01


# ---- as commands ----


@pytest.mark.parametrize("chapter, more, wrote, said", [
    (hash_codes, [], ["collisions.txt", "cost.png", "cost.txt"], "objects, 4 pieces"),
    (perceptual, ["--perceptual_weight", "0.01"], ["details.png", "details.txt"], "gradient energy"),
    (cameras, [], ["cameras.png", "cameras.txt"], "held-out photos"),
    (cameras, ["--start", "noisy", "--noise", "10"], ["cameras.txt"], "held-out photos")])
def test_a_chapter_runs_and_goes_on(chapter, more, wrote, said, data, tmp_path, capsys):
    arguments = ["--preset", "smoke", "--data", str(data / "earphones_train"), "--holdout_views", "2",
                 "--out", str(tmp_path / "run"), "--steps", "12", "--save_every", "12",
                 "--preview_every", "12", *more]
    chapter.main(arguments)
    printed = capsys.readouterr().out
    assert said in printed and "wrote" in printed
    assert all((tmp_path / "run" / name).stat().st_size > 20 for name in wrote)
    chapter.main(arguments)
    assert "going on from step 12" in capsys.readouterr().out


def test_broken_parts_are_one_sentence(tmp_path):
    file, good = tmp_path / "parts.npz", np.tile(np.eye(4), (3, 4, 1, 1))

    def written(**arrays):
        np.savez(file, **arrays)
        return file
    assert parts.read_parts(written(transforms=good, seen=np.zeros((3, 8, 8))), 3)[0].shape == (3, 4, 3, 4)
    for spoil in (lambda: written(transforms=good), lambda: written(transforms=0 * good, seen=good[..., 0]),
                  lambda: written(transforms=good[:2], seen=np.zeros((2, 8, 8))),
                  lambda: written(transforms=np.array([None]), seen=good[..., 0]),
                  lambda: written(transforms=np.nan * good, seen=np.zeros((3, 8, 8))),
                  lambda: written(transforms=good, seen=np.full((3, 8, 8), "a")),
                  lambda: written(transforms=good, seen=np.zeros((3, 0, 0))),
                  lambda: file.write_bytes(b""), lambda: file.write_bytes(b"PK\3\4 cut"), file.unlink,
                  lambda: os.mkfifo(file)):
        spoil()
        with pytest.raises(UserError, match="cannot be read .*shapes.moving"):
            parts.read_parts(file, 3)


@pytest.mark.parametrize("motion", ["learned", "known", "none"])
def test_a_mover_learns_and_poses_a_new_object(motion, tmp_path_factory, capsys):
    films = tmp_path_factory.getbasetemp() / "films_of_two"
    moving.main(["--objects", "2", "--frames", "10", "--size", "32", "--out", str(films)])
    with pytest.raises(UserError, match="none would be held out"):
        parts.main(["--preset", "smoke", "--data", str(films / "films"), "--every", "100"])
    out = tmp_path_factory.mktemp("mover")
    parts.main(["--preset", "smoke", "--data", str(films / "films"), "--steps", "4",
                "--motion", motion, "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"motion {motion}; held-out frames" in printed
    assert (out / "viewer.html").exists() == (out / "strip.png").exists() == (motion != "none")

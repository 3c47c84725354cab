"""Stage 1: shapes, the loss, resume to the bit, checkpoints that survive, and what a user gets told."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import autodecoder as stage
import common
import volume_render
from common import UserError
from conftest import SMOKE, train
from shapes.packed import Photos, extent, read_photos

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Twelve steps, which a test can take anew"""
    out = tmp_path_factory.mktemp("short") / "autodecoder"
    train(data, out)
    return out


# ---- the model ----

@pytest.mark.parametrize("change, latent, volume", [
    ({}, (2, 25, 8, 8, 8), (2, 4, 32, 32, 32)),
    ({"latent_resolution": 4}, (2, 25, 4, 4, 4), (2, 4, 16, 16, 16)),
    ({"latent_resolution": 16, "channels": (16,)}, (2, 25, 16, 16, 16), (2, 4, 32, 32, 32)),
    ({"latent_channels": 12, "channels": (16, 8, 8)}, (2, 12, 8, 8, 8), (2, 4, 64, 64, 64))])
def test_every_knob_decodes_and_learns(change, latent, volume):
    config = replace(stage.Config(), channels=(16, 16), shape_width=12, precision="float32")
    config = replace(config, **change)
    torch.manual_seed(0)
    model = stage.Autodecoder(config, 3)
    z = model.to_latent(model.codes[:2])
    v = model.to_volume(z)
    assert z.shape == latent and v.shape == volume and torch.equal(v, model.volumes_of(model.codes[:2]))
    sigma, rgb = model.field(torch.randn(5, 7, volume[1]), torch.rand(5, 7, 3) - 0.5)
    assert sigma.shape == (5, 7) and rgb.shape == (5, 7, 3)
    assert (sigma >= 0).all() and 0 <= rgb.min() and rgb.max() <= 1
    density = volume_render.density(v, model.field)
    colour = model.field(v.movedim(1, -1), torch.zeros(2, *v.shape[2:], 3))[1]
    (density.mean() + colour.mean()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_children_take_their_places():
    x = torch.arange(16.0).view(1, 16, 1, 1, 1)                  # two channels of eight children of one voxel
    volume = stage.unfold_children(x, 2)
    assert volume.shape == (1, 2, 2, 2, 2)
    assert volume[0, 1, 0, 1, 1] == 8 + 3 and volume[0, 0, 1, 0, 0] == 4
    two = stage.unfold_children(torch.arange(64.0).view(1, 8, 2, 2, 2), 1)[0, 0]
    assert two[0, 0].tolist() == [0, 8, 1, 9] and two[1, 0, :2].tolist() == [32, 40]


def test_psnr_by_hand():
    picture, truth = torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)
    picture[0, 0] = 0.5
    assert abs(volume_render.psnr(picture, truth) - 12.0412) < 1e-3      # 10 log10 of 1 / (0.25 / 4)
    upper = torch.tensor([[True, True], [False, False]])
    assert abs(volume_render.psnr(picture, truth, upper) - 9.0309) < 1e-3


def test_batches_are_the_photos(data):
    """Each ray of a batch, sent through the whole-photo rays, is the pixel that it claims to be; half are
    near the object."""
    photos = read_photos(data / "earphones_train", 32)
    config = replace(stage.Config(), rays=400, batch_objects=2)
    views = torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    objects, origins, directions, colour, opacity = stage.draw_batch(photos, config, views, generator)
    assert len(set(objects.tolist())) == 2
    assert (opacity[:, :100] > 0).float().mean() > 2 * (opacity[:, 100:] > 0).float().mean()
    for b, o in enumerate(objects):
        rays = [volume_render.camera_rays(photos.pose[o, v], photos.intrinsics[o], 32) for v in range(6)]
        all_o, all_d = zip(*rays)
        all_o, all_d, rgb = torch.cat(all_o), torch.cat(all_d), photos.rgb[o].reshape(-1, 3)
        for r in range(0, 200, 9):
            apart = (all_o - origins[b, r]).abs().sum(-1) + (all_d - directions[b, r]).abs().sum(-1)
            same = apart.argmin()
            assert apart[same] < 1e-5 and same < 4 * 32 * 32     # of a training view
            assert (rgb[same] / 255 - colour[b, r]).abs().max() < 1e-6


# ---- photos that nobody took ----

def test_recoloured_photos_have_the_other_palette(data):
    """Rays of object 0 in the colours of 1: the same opacity and background, and 1's mean and covariance."""
    photos = read_photos(data / "earphones_train", 32)
    views = torch.arange(4)
    (means, covariances), extents = photos.measured(views)
    palettes = stage.palette_code(means, covariances)
    roots = stage.mean_and_root(palettes)[1]
    assert torch.allclose(roots @ roots, covariances, atol=1e-5)
    A = roots[1] @ torch.linalg.inv(roots[0])
    solid = photos.mask[0, views] == 255
    painted = (photos.rgb[0, views][solid] / 255 - means[0]) @ A.T + means[1]
    added = 0.001 * A @ A.T                           # what the palette has more than the colours, painted
    assert (torch.cov(painted.T) + added - covariances[1]).abs().max() < 1e-3

    config = replace(stage.Config(), rays=4000, batch_objects=3, recolour=1.0, batch_views=4)
    objects, *batch = stage.draw_batch(photos, config, views, torch.Generator().manual_seed(0))
    config.stretched = 0.0
    arguments = objects, batch, palettes, extents, config
    stretch, wanted, new = stage.photos_nobody_took(*arguments, 1.0, torch.Generator().manual_seed(3))
    assert not torch.equal(wanted, palettes[objects]) and (stretch == 0).all()
    last = stage.photos_nobody_took(*arguments, 0.0, torch.Generator().manual_seed(3))
    assert torch.equal(last[1], palettes[objects])                # at the end all photos are real ones
    assert torch.equal(last[2][2], batch[2])
    assert all(torch.equal(batch[k], new[k]) for k in (0, 1, 3))
    assert (new[2][batch[3] == 0] - 1).abs().max() < 1e-5                             # white stays white
    for one, o in enumerate(objects):
        same = torch.equal(new[2][one], batch[2][one])
        assert same == torch.equal(wanted[one], palettes[o])

    # Pixels that are partly solid: their colours are painted, and as much white as before stands behind them
    opacity, colour = torch.rand(1, 500), 0.3 + 0.4 * torch.rand(1, 500, 3)
    over_white = lambda some: opacity[..., None] * some + 1 - opacity[..., None]
    batch = torch.zeros(1, 500, 3), torch.zeros(1, 500, 3), over_white(colour), opacity
    for seed in range(9):
        _, wanted, new = stage.photos_nobody_took(torch.tensor([0]), batch, palettes, extents, config, 1.0,
                                                  torch.Generator().manual_seed(seed))
        if torch.equal(wanted[0], palettes[1]):
            break
    painted = over_white((colour - means[0]) @ A.T + means[1])
    assert (new[2] - painted.clamp(0, 1)).abs().max() < 1e-4 and (painted - batch[2]).abs().mean() > 0.02


def test_a_palette_is_measured_and_not_learned(data, tmp_path):
    """It holds all of a mean and a covariance, and after training it is what the training photos say"""
    mean, root = torch.rand(40, 3), 0.1 * torch.randn(40, 3, 3)
    covariance = root @ root.mT + 1e-3 * torch.eye(3)
    m, R = stage.mean_and_root(stage.palette_code(mean, covariance))
    assert torch.equal(m, mean) and torch.allclose(R @ R.mT, covariance, atol=1e-6)
    train(data, tmp_path, "--steps", "2", "--holdout_views", "2")
    model, _ = stage.load_autodecoder(tmp_path)
    palettes, _ = read_photos(data / "earphones_train", 32).measured(torch.arange(4))
    assert torch.allclose(model.palettes, stage.palette_code(*palettes), atol=1e-5)


def test_a_colour_is_mean_and_root_times_pattern():
    """Two codes that differ in their palettes alone: same density, and one pattern in both palettes"""
    torch.manual_seed(0)
    model = stage.Autodecoder(replace(stage.Config(), channels=(8,), shape_width=5, precision="float32"), 2)
    nn.init.normal_(model.leave[-1].weight, 0, 0.1)
    root = torch.rand(2, 3, 3)
    covariance = 0.002 * root @ root.mT + 1e-3 * torch.eye(3)
    palettes = stage.palette_code(0.4 + 0.2 * torch.rand(2, 3), covariance)
    codes = model.code(torch.zeros(2, 3), torch.tensor([1, 1]), palettes)
    latents = model.to_latent(codes)
    assert torch.allclose(latents[0, :-9], latents[1, :-9], atol=1e-6)
    assert torch.allclose(latents[:, -9:, 3, 1, 2], 10 * palettes)
    volumes = model.to_volume(latents)
    assert torch.allclose(volumes[0, 0], volumes[1, 0], atol=1e-5)
    one, other = model.field(volumes.movedim(1, -1), None)[1]
    m, R = stage.mean_and_root(palettes)
    inside = ((one - 0.5).abs() < 0.45).all(-1) & ((other - 0.5).abs() < 0.45).all(-1)
    assert inside.float().mean() > 0.5 and one.std() > 0.01
    pattern = (one - m[0]) @ torch.linalg.inv(R[0])
    assert (pattern @ R[1] + m[1] - other)[inside].abs().max() < 1e-4
    assert 0.0099 < volumes[:, 1:].sigmoid().min() and volumes[:, 1:].sigmoid().max() < 0.9901


def test_stretched_rays_see_the_stretched_object():
    """A volume stretched by D along its axes, seen by the rays as they are, is it along (D o, D d)."""
    torch.manual_seed(0)
    config = replace(stage.Config(), batch_objects=1, recolour=0.0, stretched=1.0)
    pose = volume_render.cameras([(30, 20)])
    origins, directions = volume_render.camera_rays(pose, common.intrinsics_at(32).float()[None], 32)
    batch = origins, directions, torch.ones_like(origins), torch.ones(1, 1024)
    extents = torch.tensor([[0.6, 0.48, 0.64]])
    palettes = stage.palette_code(torch.ones(1, 3), torch.eye(3)[None])
    stretch, _, new = stage.photos_nobody_took(torch.tensor([0]), batch, palettes, extents, config, 1.0,
                                               torch.Generator().manual_seed(1))
    D = stretch.exp()
    assert stretch.abs().max() > 0.02 and abs((D * extents).norm() - 1) < 1e-6   # still of diagonal 1

    # A blob whose axes are known: sigma of the stretched one at p is sigma of the blob at p / D
    blob = lambda p, axes: (-(p / axes).square().sum(-1) / 2).exp()
    axes, t = torch.tensor([0.1, 0.15, 0.2]), torch.linspace(0.5, 2, 40)[:, None, None]
    seen = blob(origins[0] + t * directions[0], axes)
    along = blob(new[0][0] + t * new[1][0], axes * D[0])
    assert (seen - along).abs().max() < 1e-5


def test_extents_are_the_bounding_boxes(data):
    photos = read_photos(data / "earphones_train", 32)
    sides = photos.measured(torch.arange(6))[1]
    assert (sides.norm(dim=1) - 1).abs().max() < 0.15                                  # all have diagonal 1

    # A box of known sides, from six cameras: what lies within all silhouettes is a little larger
    box, K = torch.tensor([0.6, 0.2, 0.4]), common.intrinsics_at(64).float()
    poses = volume_render.cameras([(0, 0), (90, 0), (180, 0), (270, 0), (0, 89), (0, -89)])
    origins, directions = volume_render.camera_rays(poses, K[None], 64)
    near, far = volume_render.cube(origins / box, directions / box)
    larger = extent((near < far).view(6, 64, 64).byte() * 255, poses, K) - box
    assert larger.min() > 0 and larger.max() < 0.06


def test_a_code_is_stretch_and_shape_and_palette():
    model = stage.Autodecoder(replace(stage.Config(), channels=(16,), shape_width=5), 3)
    model.palettes.copy_(torch.randn(3, 9))
    one = model.code(torch.tensor([[0.14, 0.0, -0.07]]), torch.tensor([2]), model.palettes[:1])
    assert (one[0, :3] - torch.tensor([1, 0, -0.5])).abs().max() < 1e-6
    assert torch.equal(one[:, 3:], torch.cat([model.shapes[2:], model.palettes[:1]], 1))
    assert torch.equal(model.codes[:, 3:], torch.cat([model.shapes, model.palettes], 1))
    assert (model.codes[:, :3] == 0).all()


def test_without_masks_nothing_is_recoloured(data, tmp_path, capsys):
    shutil.copytree(data / "earphones_train", tmp_path / "bare")
    for folder in (tmp_path / "bare").iterdir():
        shutil.rmtree(folder / "mask", ignore_errors=True)
    stage.main([*SMOKE, "--data", str(tmp_path / "bare"), "--holdout_views", "2",
                "--out", str(tmp_path / "run")])
    assert "has no masks" in capsys.readouterr().out


# ---- the loss and the schedule ----

def test_the_loss_by_hand():
    """Nothing is there, so all is white and the opacity is 0"""
    model, volume = SimpleNamespace(field=volume_render.voxel_field), torch.full((1, 4, 4, 4, 4), -30.0)
    origins, directions = torch.tensor([[[0.0, 0, 2]] * 2]), torch.tensor([[[0.0, 0, -1], [0, 0.1, -1]]])
    target, opacity = torch.tensor([0.5, 0.8])[None, :, None].expand(1, 2, 3), torch.tensor([[0.6, 0.0]])
    config = replace(stage.Config(), samples=4, mask_weight=0.2)
    for skip, masks, more, expected in ((False, True, None, 0.145 + 0.2 * 0.18), (True, False, None, 0.145),
                                        (True, True, lambda rgb, target: (rgb - target).sum(), 2.281)):
        loss, photo, alpha = stage.reconstruction_loss(model, volume, (origins, directions, target, opacity),
                                                       config, None, skip, masks, more)
        assert abs(loss - expected) < 1e-5 and abs(photo - 0.145) < 1e-5 and alpha < 1e-5


def test_the_learning_rate_by_hand():
    share = [stage.learning_rate_share(step, 100, 0.03) for step in (0, 2, 5, 50, 100)]
    assert np.allclose(share, [0.2, 0.6 * 0.999043, 0.994029, 0.515, 0.03], atol=1e-6)


def test_training_sees_no_held_out_photo_and_follows_its_schedule(data, tmp_path, monkeypatch):
    """A short run tells which photos it may draw from, how many are changed, and when it skips empty space"""
    took, loss, measure = stage.photos_nobody_took, stage.reconstruction_loss, Photos.measured
    drawn, measured, left, skipped = [], [], [], []

    def draw(photos, config, views, generator):
        drawn.append(views.tolist())
        return stage.draw_batch(photos, config, views, generator)
    monkeypatch.setattr(stage, "photos_nobody_took", lambda *what: left.append(what[5]) or took(*what))
    monkeypatch.setattr(stage, "reconstruction_loss", lambda *what: skipped.append(what[5]) or loss(*what))
    monkeypatch.setattr(Photos, "measured", lambda photos, views: measured.append(views.tolist())
                        or measure(photos, views))
    stage.main([*SMOKE, "--data", str(data / "earphones_train"), "--holdout_views", "2", "--steps", "4",
                "--dense_steps", "2", "--out", str(tmp_path)], draw=draw)
    assert drawn == [[0, 1, 2, 3]] * 4 and measured == [[0, 1, 2, 3]]
    assert left == [1, 0.75, 0.5, 0.25] and skipped == [False, False, True, True]


# ---- the run ----

def test_a_run_leaves_what_it_says(trained):
    for name in ("last.pt", "previous.pt", "config.json", "log.jsonl", "table.txt", "curve.png",
                 "figure1.png", "previews/step_000012.png"):
        assert (trained / name).stat().st_size > 0
    table = (trained / "table.txt").read_text()
    assert "all white" in table and "over-ear" in table
    assert all(np.isfinite(list(json.loads(line).values())).all() for line in open(trained / "log.jsonl"))
    model, names = stage.load_autodecoder(trained)
    assert names == ["train_00000", "train_00001", "train_00002"] and not model.training


def test_one_object_trains_alone(data, tmp_path):
    train(data, tmp_path / "one", "--objects", "1")
    assert "ours" in (tmp_path / "one/table.txt").read_text()


def weights(out):
    state = common.load_checkpoint(out / "last.pt")
    moments = {f"{which}.{k}.{name}": tensor for which, kept in enumerate(state["optimizers"])
               for k, one in kept["state"].items() for name, tensor in one.items()
               if isinstance(tensor, torch.Tensor)}
    return state["step"], {**state["model"], **moments}


def test_muon_moves_equally_far_along_all_singular_vectors():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(16, 8, 3, 3, 3))
    weight.grad = torch.randn_like(weight) * torch.logspace(-1, 1, 16).view(-1, 1, 1, 1, 1)
    stage.Muon([weight], lr=0.1).step()
    way = -weight.detach().flatten(1) / (0.1 * 0.2 * 216 ** 0.5)
    U, values, V = torch.linalg.svd(weight.grad.flatten(1), full_matrices=False)
    assert values.max() > 50 * values.min()
    along = (U.T @ way @ V.T).diagonal()
    assert 0.5 < along.min() and along.max() < 1.3
    assert (way - U @ along.diag() @ V).norm() < 1e-3 * way.norm()                  # and along nothing else


def test_convolutions_learn_by_muon_and_all_else_by_adam(data, trained):
    state = common.load_checkpoint(trained / "last.pt")
    adam, muon, codes = ([one for one in kept["state"].values()] for kept in state["optimizers"])
    weights = [value for name, value in state["model"].items() if name not in ("shapes", "palettes")]
    shapes = lambda some: sorted(map(list, (one.shape for one in some)))
    assert shapes(one["mean"] for one in muon) == shapes(w for w in weights if w.dim() >= 4)
    assert shapes(one["exp_avg"] for one in adam) == shapes(w for w in weights if w.dim() < 4)
    assert shapes(one["exp_avg"] for one in codes) == [[*state["model"]["shapes"].shape]]


def test_resume_is_bit_exact(data, trained, tmp_path):
    """Killed after 6 of 12 steps (a checkpoint holds 4), then the same command again."""
    code = ("import autodecoder as stage, sys\n"
            "class Interrupted(Exception): pass\n"
            "real = stage.draw_batch\n"
            "calls = []\n"
            "def draw(*a):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 7: import os, time; time.sleep(1); os._exit(9)\n"
            "    return real(*a)\n"
            "stage.main(sys.argv[1:], draw=draw)\n")
    arguments = [*SMOKE, "--data", str(data / "earphones_train"), "--holdout_views", "2",
                 "--out", str(tmp_path / "run")]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=threads,
                          capture_output=True)
    assert done.returncode == 9
    assert weights(tmp_path / "run")[0] == 4
    train(data, tmp_path / "run")
    (step, ours), (step2, whole) = weights(tmp_path / "run"), weights(trained)
    assert step == step2 == 12 and len(ours) == len(whole)
    assert all(torch.equal(ours[k], whole[k]) for k in whole)


def test_a_signal_saves_and_says_how_to_go_on(data, tmp_path):
    command = [sys.executable, "autodecoder.py", *SMOKE, "--steps", "100000",
               "--data", str(data / "earphones_train"), "--holdout_views", "2",
               "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run/last.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "stopped by SIGTERM at step" in message and "the same command goes on" in message
    assert "Traceback" not in message
    assert weights(tmp_path / "run")[0] > 4


def test_photos_of_a_stopped_stage_0_are_completed_first(tmp_path, monkeypatch):
    made, data = [], tmp_path / "earphones_train"
    monkeypatch.setattr(stage.render_shapenet, "main", made.append)
    config = stage.render_shapenet.Config()
    ours = {"stage": "render_shapenet"} | {key: getattr(config, key) for key in stage.render_shapenet.RECIPE}
    recipe, picture = tmp_path / "earphones.json", data.with_suffix(".png")
    # Nothing; a folder copied from elsewhere; one of the user's own; one that was begun here; a complete one
    for prepare, calls in ((lambda: None, 1), (data.mkdir, 1),
                           (lambda: recipe.write_text(json.dumps(ours | {"views": 2})), 1),
                           (lambda: recipe.write_text(json.dumps(ours)), 2), (picture.touch, 2)):
        prepare()
        stage.render_shapenet.make_missing(data)
        assert len(made) == calls
    recipe.unlink()
    os.mkfifo(recipe)                                               # it is not opened: that would never end
    picture.unlink()
    stage.render_shapenet.make_missing(data)
    assert len(made) == 2
    monkeypatch.setattr(stage.Config, "data", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere"):
        stage.main([*SMOKE, "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")])
    assert len(made) == 3
    with pytest.raises(UserError, match="elsewhere"):                # photos of one's own are never made
        stage.main([*SMOKE, "--data", str(tmp_path / "elsewhere"), "--out", str(tmp_path / "run")])
    assert len(made) == 3


def test_what_ends_a_run_stands_below_its_progress_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage.Run, "save", lambda *_: None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    with pytest.raises(UserError, match="stopped by"), stage.Run(tmp_path, "x", stage.Config(), ()) as run:
        run.log(1, 5, loss=1.0)
        run.stopping = "SIGINT"
        run.stop_if_asked(1)
    assert capsys.readouterr().out.endswith("\n")


def test_nan_steps_are_left_out_and_three_in_a_row_stop(data, tmp_path, monkeypatch, capsys):
    real, count = stage.reconstruction_loss, [0]

    def loss(bad):
        def inner(*arguments):
            count[0] += 1
            total, *rest = real(*arguments)
            return (total * float("nan") if count[0] in bad else total, *rest)
        return inner
    monkeypatch.setattr(stage, "reconstruction_loss", loss({3, 5}))
    train(data, tmp_path / "a")
    assert "2 so far" in capsys.readouterr().out
    assert all(t.isfinite().all() for t in weights(tmp_path / "a")[1].values())
    count[0] = 0
    monkeypatch.setattr(stage, "reconstruction_loss", loss({6, 7, 8}))
    with pytest.raises(UserError, match="three times in a row.*intact"):
        train(data, tmp_path / "b")
    assert weights(tmp_path / "b")[0] == 4


def test_fit_recovers_a_known_code(data):
    """Photos rendered by the model itself, of a code that it was not given: the fit must explain views that
    it did not see."""
    torch.manual_seed(0)
    config = replace(stage.Config(), channels=(16, 16), shape_width=4, samples=24, rays=512,
                     precision="float32")
    model = stage.Autodecoder(config, 3).eval().requires_grad_(False)
    model.shapes *= 30                              # an untrained decoder, driven hard, makes coloured clouds
    model.leave[-1].bias[:8] += 3                   # as dense as solids, so that their palette can be measured
    model.palettes += 0.1 * torch.randn(3, 9)
    real = read_photos(data / "earphones_train", 32, 1)
    photos = Photos(real.rgb.clone(), real.mask.clone(), real.pose, real.intrinsics, real.names)
    volume = model.to_volume(model.to_latent((0.2 * model.codes[0] + 0.8 * model.codes[1])[None]))
    for v in range(6):
        rgb, alpha, _ = volume_render.render_view(model, volume, photos.pose[0, v], photos.intrinsics[0], 32)
        photos.rgb[0, v], photos.mask[0, v] = (rgb * 255).round().byte(), (alpha * 255).round().byte()
    fitted = stage.fit_codes(model, photos, torch.arange(4), steps=60)
    ours, mean = (volume_render.mean_of(volume_render.score_views(model, codes, photos, [0], [4, 5]), "ours")
                  for codes in (fitted, model.codes.mean(0)[None]))
    assert mean < 40 and ours > mean + 6, (ours, mean)


# ---- what goes wrong ----

def test_missing_stage_1(tmp_path):
    with pytest.raises(UserError, match="last.pt is not there. Run: python autodecoder.py"):
        stage.load_autodecoder(tmp_path)


def test_another_config_or_other_objects(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    with pytest.raises(UserError, match="--shape_width 8, not 9.*--fresh"):
        train(data, tmp_path / "run", "--shape_width", "9")
    with pytest.raises(UserError, match="other objects"):
        shutil.copytree(data / "earphones_test", tmp_path / "x")
        (tmp_path / "x/test_00000").rename(tmp_path / "x/other")
        config = json.loads((tmp_path / "run/config.json").read_text()) | {"data": str(tmp_path / "x")}
        (tmp_path / "run/config.json").write_text(json.dumps(config))
        stage.main([*SMOKE, "--data", str(tmp_path / "x"), "--holdout_views", "2",
                    "--out", str(tmp_path / "run")])


def test_no_held_out_views(data, tmp_path):
    with pytest.raises(UserError, match="--holdout_views 0"):
        train(data, tmp_path / "run", "--holdout_views", "0")


def test_missing_data(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        stage.main([*SMOKE, "--data", str(tmp_path / "gone"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("harm", ["truncate", "flip"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(data, trained, tmp_path, harm, capsys):
    shutil.copytree(trained, tmp_path / "run")
    file = tmp_path / "run/last.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content[:len(content) // 2] if harm == "truncate" else content)
    train(data, tmp_path / "run")
    said = capsys.readouterr().out
    assert "last.pt is damaged" in said and "previous.pt" in said and "going on from step 8" in said
    ours, whole = weights(tmp_path / "run")[1], weights(trained)[1]
    assert all(torch.equal(a, b) for a, b in zip(ours.values(), whole.values()))
    file.write_bytes(b"x")
    (tmp_path / "run/previous.pt").write_bytes(b"x")
    with pytest.raises(UserError, match="previous.pt is damaged"):
        train(data, tmp_path / "run")


SAVER = """
import os, signal, sys, torch
from dataclasses import dataclass
sys.path.insert(0, {root!r})
from common import Run
@dataclass
class Config:
    out: str = ""
run = Run({out!r}, "test", Config(), (), stale=())
state = {{"step": 0, "x": torch.arange(200_000.)}}
run.save(state)                                       # the first kill may come before the child's first
run.written()
while True:                                           # one warm parent; each child saves until it is killed
    line = sys.stdin.readline()
    if not line:
        break
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)                       # threads do not survive a fork: not torch's, nor ours
        while True:
            state["step"] += 1
            run._write(state)
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("dead", flush=True)
"""


def test_kill_9_while_saving_never_loses_the_last(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", SAVER.format(root=str(ROOT), out=str(tmp_path))],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    generator, steps = np.random.default_rng(0), set()
    for k in range(50):
        parent.stdin.write("go\n")
        parent.stdin.flush()
        pid = int(parent.stdout.readline())
        time.sleep(0.03 + 0.1 * generator.random())
        os.kill(pid, signal.SIGKILL)
        assert parent.stdout.readline() == "dead\n"
        steps.add(common.load_checkpoint(tmp_path / "last.pt")["step"])     # at any moment it is whole
    parent.stdin.close()
    parent.wait()
    assert len(steps) > 2, steps                                 # they did save, and were cut off anywhere


FULL = """
import resource, sys, torch
from dataclasses import dataclass
sys.path.insert(0, {root!r})
from common import Run
@dataclass
class Config:
    out: str = ""
run = Run({out!r}, "test", Config(), (), stale=())
run.save({{"step": 1, "x": torch.zeros(1000)}})
run.written()
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
run.save({{"step": 2, "x": torch.zeros(100_000)}})
run.written()                                         # a thread saves; what went wrong there is raised here
"""


def test_a_full_disk_is_one_sentence_and_the_good_checkpoint_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL.format(root=str(ROOT), out=str(tmp_path))],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "cannot write" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert common.load_checkpoint(tmp_path / "last.pt")["step"] == 1
    assert sorted(os.listdir(tmp_path)) == [".config.json.lock", "last.pt", "previous.pt"]


def test_a_log_line_cut_off_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo{"step": 3, "loss": 1.0}\n')
    stage.plot_log(tmp_path, "loss", loss="loss", absent="never logged")
    assert (tmp_path / "curve.png").exists()


# ---- what is deleted, and what is believed ----

def test_fresh_deletes_nothing_before_all_checks(data, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    whole = (tmp_path / "run/last.pt").read_bytes()
    for wrong in (["--channels", "0"], ["--rays", "-1"], ["--holdout_views", "6"], ["--decoder_lr", "nan"]):
        with pytest.raises(UserError):
            train(data, tmp_path / "run", "--fresh", *wrong)
    assert (tmp_path / "run/last.pt").read_bytes() == whole and (tmp_path / "run/previews").exists()


def test_fresh_deletes_only_a_run_of_its_own(data, trained, tmp_path):
    strangers = tmp_path / "strangers"
    (strangers / "previews").mkdir(parents=True)
    with pytest.raises(UserError, match="previews is there, but no config.json"):
        train(data, strangers, "--fresh")
    (strangers / "config.json").write_text('{"their": "own"}')
    with pytest.raises(UserError, match="another stage's run, or an older one"):
        train(data, strangers, "--fresh")
    assert (strangers / "previews").exists() and "their" in (strangers / "config.json").read_text()


def test_a_refused_flag_is_not_remembered(data, tmp_path):
    with pytest.raises(UserError, match="--holdout_views 6"):
        train(data, tmp_path / "run", "--holdout_views", "6")
    assert not (tmp_path / "run/config.json").exists()
    train(data, tmp_path / "run")


def test_every_bit_of_a_checkpoint_counts(tmp_path):
    """A flipped bit in the zip's directory passes its checksums: torch then fills a tensor with whatever lies
    in memory.  Every bit is refused, or changes nothing that is read."""
    file, state, wrong = tmp_path / "last.pt", {"x": torch.arange(5000.0), "y": torch.ones(3)}, 0
    common.save_checkpoint(file, state)
    content = file.read_bytes()
    for bit in range(content.index(b"PK\x01\x02") * 8, len(content) * 8):             # the whole directory
        harmed = bytearray(content)
        harmed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(harmed)
        try:
            assert common.digest(common.load_checkpoint(file)) == common.digest(state)
        except UserError as error:
            wrong += "its digest is wrong" in str(error)
    assert wrong > 0                                     # there are bits that nothing but the digest notices


def test_names_in_a_checkpoint_cannot_lead_out_of_a_folder(trained, tmp_path):
    for name in ("../x", "/abs", "a/b", "..", "", "line\nbreak"):
        state = common.load_checkpoint(trained / "last.pt")
        state["names"][0] = name
        common.save_checkpoint(tmp_path / "last.pt", state)
        with pytest.raises(UserError, match="no name of an object"):
            stage.load_autodecoder(tmp_path)


def test_an_old_checkpoint_is_one_sentence(trained, tmp_path):
    state = common.load_checkpoint(trained / "last.pt")
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint of this version"):
        stage.load_autodecoder(tmp_path)
    state["config"]["head"] = "mlp"
    common.save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(UserError, match="another version.*head"):
        stage.load_autodecoder(tmp_path)


def test_a_lock_that_is_a_link_harms_nothing(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run/.config.json.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="cannot write to"):
        train(data, tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "mine"

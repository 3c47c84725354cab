"""The other families: each piece against a closed form or a plain loop, and each chapter at smoke size."""
from types import SimpleNamespace

import pytest
import torch

import common
import diffusion
from chapters import (analytic, autoregressive, distill, families, gan3d, gaudi, hierarchy, image_gan, lift,
                      maps, render_diffusion)
from common import UserError
from lab import evaluate

# ---- analytic ----


def points_and_x(N=5, side=4):
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(N, 3, side, side, side, generator=generator)
    return points, points[:2] + 0.3 * torch.randn(2, 3, side, side, side, generator=generator)


@pytest.mark.parametrize("window, mirror", [(1, False), (3, False), (3, True), (7, False)])
def test_the_local_denoiser_is_a_softmax_for_each_voxel(window, mirror):
    points, x = points_and_x()
    found = analytic.local_denoiser(x, 0.8, points, window, mirror)
    half = window // 2
    for b, z, y, w in [(0, 0, 0, 0), (1, 3, 1, 2), (0, 2, 2, 3)]:
        sums = []
        for point in points:
            total = 0
            for column in (w, 3 - w) if mirror else (w, w):                # the mirror image of a window
                box = [slice(max(k - half, 0), k + half + 1) for k in (z, y, column)]
                at = (slice(None), *box)
                total += (x[b][at] - point[at]).square().sum() / 2
            sums.append(-total / (2 * 0.8 ** 2))
        weight = torch.stack(sums).softmax(0)
        wanted = (weight[:, None] * points[:, :, z, y, w]).sum(0)
        assert torch.allclose(found[b, :, z, y, w], wanted, atol=1e-4)


def test_a_window_of_everything_is_the_ideal_denoiser_and_copies():
    points, x = points_and_x()
    ideal = analytic.local_denoiser(x, 0.8, points, 7, False)
    weight = (-torch.cdist(x.flatten(1), points.flatten(1)).square() / (2 * 0.64)).softmax(1)
    assert torch.allclose(ideal.flatten(1), weight @ points.flatten(1), atol=1e-4)
    assert torch.allclose(ideal, points[:2], atol=1e-3)
    # Left out, a point can only become another one
    others = analytic.local_denoiser(x, 0.8, points, 7, False, torch.tensor([0, 1]))
    assert (others - points[:2]).abs().max() > 0.5


def test_the_linear_denoiser_is_wieners():
    points, x = points_and_x(N=40, side=2)
    rows = points.flatten(1)
    mean, C = rows.mean(0), torch.cov(rows.T, correction=0)
    wanted = mean + (x_flat(x) - mean) @ torch.linalg.solve(C + 0.25 * torch.eye(24), C)
    sigma, others = torch.tensor(0.5), torch.cat([points[:1], points[2:]])
    assert torch.allclose(analytic.wiener_denoiser(x, sigma, points).flatten(1), wanted, atol=1e-4)
    without = analytic.wiener_denoiser(x, sigma, points, torch.tensor([0, 1]))
    assert torch.allclose(without[1], analytic.wiener_denoiser(x[1:], sigma, others)[0], atol=1e-5)


def x_flat(x):
    return x.flatten(1)


def test_leaving_out_prefers_small_windows_where_parts_are_independent():
    generator = torch.Generator().manual_seed(0)
    points = torch.randint(2, (12, 1, 4, 4, 4), generator=generator).float()
    config = SimpleNamespace(draws=2, mirror=False)
    errors = analytic.leave_one_out(points, torch.tensor([0.2]), [1, 7], config)
    assert errors[1][0] < 0.5 * errors[7][0] and len(errors["Wiener"]) == 1


# ---- gan3d ----

def knobs(**change):
    return SimpleNamespace(**{"widths": (8, 6, 4), "noise": 5, "r1": 1.0, "words": 7, "channels": 6,
                              "width": 12, "layers": 2, **change})


def test_the_gan_makes_latents_and_judges_them():
    maker, critic = gan3d.Generator(knobs(), 3, 8), gan3d.Discriminator(knobs(), 3, 8)
    made = maker(torch.randn(2, 5))
    assert made.shape == (2, 3, 8, 8, 8) and critic(made).shape == (2,)


def test_r1_is_the_squared_gradient():
    weight = torch.randn(3 * 8)
    critic = lambda x: (x.flatten(1) @ weight) ** 2 / 2
    real = torch.randn(4, 3, 2, 2, 2)
    said, penalty = gan3d.r1_penalty(critic, real)
    slope = (real.flatten(1) @ weight)[:, None] * weight
    assert torch.allclose(penalty, slope.square().sum(1).mean(), rtol=1e-4)
    assert torch.allclose(said, critic(real))


def test_collapse_is_counted():
    training = torch.eye(4).view(4, 1, 2, 2, 1)
    assert gan3d.named(training[[0, 0, 2]] * 1.1, training) == 2


# ---- autoregressive ----

def test_tokens_are_the_nearest_words_and_spell_them():
    codebook = autoregressive.Codebook(knobs(), 3)
    vectors = torch.randn(2, 6, 2, 2, 2)
    tokens = codebook.tokens(vectors)
    assert tokens.shape == (2, 8)
    for b, t, (z, y, x) in [(0, 0, (0, 0, 0)), (1, 1, (0, 0, 1)), (1, 4, (1, 0, 0))]:
        apart = (codebook.book.words - vectors[b, :, z, y, x]).norm(dim=1)
        assert tokens[b, t] == apart.argmin()
        assert torch.equal(codebook.spell(tokens)[b, :, z, y, x], codebook.book.words[tokens[b, t]])


def test_words_move_to_the_mean_of_their_vectors_and_gradients_go_straight_through():
    torch.manual_seed(0)
    codebook, latents = autoregressive.Codebook(knobs(words=3), 3), torch.randn(4, 3, 4, 4, 4)
    for _ in range(400):
        error, apart, *spoken = codebook.loss(latents)
        codebook.book.move(*spoken, torch.Generator().manual_seed(0))
    vectors = codebook.encoder(latents)
    flat, tokens = vectors.flatten(2).mT.reshape(-1, 6), codebook.tokens(vectors).flatten()
    for k in tokens.unique():
        assert torch.allclose(codebook.book.words[k], flat[tokens == k].mean(0), atol=1e-2)
    error.backward()
    assert codebook.encoder[0].weight.grad.abs().sum() > 0


def test_the_transformer_sees_no_later_token():
    torch.manual_seed(0)
    transformer = autoregressive.Transformer(knobs(), 6).eval()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6]])
    later = tokens.clone()
    later[0, 3:] = 0
    a, b = transformer(tokens), transformer(later)
    assert a.shape == (1, 6, 7)
    assert torch.allclose(a[0, :4], b[0, :4], atol=1e-6) and not torch.allclose(a[0, 4:], b[0, 4:], atol=1e-3)
    whole = autoregressive.drawn(transformer, tokens[:, :3], 6, torch.Generator().manual_seed(0), 1.0)
    assert whole.shape == (1, 6) and torch.equal(whole[:, :3], tokens[:, :3])


def test_bits_are_measured_on_unseen_objects_too(data, trained, tmp_path, capsys):
    flags = ["--preset", "smoke", "--autodecoder", str(trained), "--out", str(tmp_path / "run"), "--device",
             "cpu", "--unseen"]
    autoregressive.main([*flags, str(data / "earphones_train")])
    said = (tmp_path / "run/bits.txt").read_text()
    assert "2 unseen" in said and said.strip() in capsys.readouterr().out
    autoregressive.main([*flags, str(tmp_path / "nothing")])
    assert "nothing is measured on unseen" in capsys.readouterr().out
    assert (tmp_path / "run/bits.txt").read_text() == said.split(",")[0] + "\n"      # the rest is the same


# ---- all ----

@pytest.mark.parametrize("chapter, more", [
    (analytic, []), (gaudi, ["--steps", "4"]), (gan3d, []), (autoregressive, [])])
def test_a_family_runs_and_the_lab_takes_it_as_a_row(chapter, more, trained, tmp_path, capsys):
    flags = ["--preset", "smoke", *more, "--autodecoder", str(trained), "--out", str(tmp_path / "run"),
             "--device", "cpu"]
    chapter.main(flags)
    first = common.load_checkpoint(tmp_path / "run/latents.pt")
    assert {"parameters", "training_seconds", "sample_seconds"} <= first.keys()
    assert (tmp_path / "run/samples.png").exists() and "latents.pt" in capsys.readouterr().out
    if chapter is not analytic:
        chapter.main(flags)                                       # trained already: the same samples
        assert torch.equal(common.load_checkpoint(tmp_path / "run/latents.pt")["latents"], first["latents"])
    from autodecoder import load_autodecoder
    model, _ = load_autodecoder(trained)
    config = SimpleNamespace(rows=(str(tmp_path / "run"),), count=2)
    found, costs = evaluate.chapters(model, config)
    assert costs[0][0] == "run" and len(costs[0]) == 4
    assert list(found) == ["run"] and found["run"][0] is model and len(found["run"][1]) == 2
    families.main(["--autodecoder", str(trained), "--rows", str(tmp_path / "run"), "--out",
                   str(tmp_path / "families.png")])
    assert (tmp_path / "families.png").exists()


def test_samples_of_another_autodecoder_are_refused(trained, tmp_path):
    from autodecoder import fingerprint, load_autodecoder
    model, _ = load_autodecoder(trained)
    latents = torch.randn(3, *([model.config.latent_channels] + 3 * [model.config.latent_resolution]))
    families.write_samples(tmp_path, model, latents, 1, 0.1)
    assert torch.equal(families.read_samples(tmp_path, model)[1], latents)
    common.save_checkpoint(tmp_path / "latents.pt", {"latents": latents, "autodecoder": "another"})
    with pytest.raises(UserError, match="another autodecoder"):
        families.read_samples(tmp_path, model)
    common.save_checkpoint(tmp_path / "latents.pt", {"latents": latents, "autodecoder": fingerprint(model)})
    with pytest.raises(UserError, match="does not say what its samples cost"):
        families.read_samples(tmp_path, model)


# ---- lift ----

def test_a_point_takes_the_features_of_its_pixel():
    """Features that are the pixel's own place: a point then sees where it is projected to."""
    size, generator = 16, torch.Generator().manual_seed(0)
    angles = (20, 10), (200, -30)
    pose = torch.stack([common.camera_to_world_at(*angle, 1.3) for angle in angles]).float()[None]
    K = common.intrinsics_at(size).float()
    centre = (torch.arange(size) + 0.5) / size
    v, u = torch.meshgrid(centre, centre, indexing="ij")
    features = torch.stack([u, v]).expand(1, 2, 2, size, size)
    points = torch.rand(20, 3, generator=generator) * 0.4 - 0.2
    scaled = K.clone()
    scaled[:2] /= size
    seen, where = lift.unproject(features, pose, scaled[None], points)
    for k, camera in enumerate(pose[0]):
        local = torch.linalg.solve(camera, torch.cat([points, torch.ones(20, 1)], 1).T)[:3]
        pixel = K @ (local / local[2]) / size
        assert torch.allclose(seen[0, k], pixel[:2], atol=1e-5)
        assert torch.allclose(where[0, k, 3], local.norm(dim=0), atol=1e-5)
        assert torch.allclose(where[0, k, :3] * where[0, k, 3], points.T - camera[:3, 3:], atol=1e-5)


def test_the_order_of_views_does_not_matter():
    torch.manual_seed(0)
    network = lift.Lift(SimpleNamespace(width=8, blocks=1), 4, 4)
    photos, poses = torch.rand(1, 3, 16, 16, 3), torch.stack(
        [common.camera_to_world_at(a, 20, 1.3) for a in (0, 100, 220)]).float()[None]
    K = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0.5], [0, 0, 1]]])
    first, turned = network(photos, poses, K), network(photos[:, [2, 0, 1]], poses[:, [2, 0, 1]], K)
    assert first.shape == (1, 4, 4, 4, 4) and torch.allclose(first, turned, atol=1e-5)
    assert (network(photos[:, :2], poses[:, :2], K) - first).abs().max() > 1e-4


def test_photos_are_lifted(trained, data, tmp_path, capsys):
    flags = ["--preset", "smoke", "--autodecoder", str(trained), "--data", str(data / "earphones_train"),
             "--unseen", str(data / "earphones_test"), "--device", "cpu", "--out", str(tmp_path / "run")]
    lift.main(flags)
    text = (tmp_path / "run/lift.txt").read_text()
    assert all(name in text for name in ("lifted, then 100 steps", "fit_codes", "2 photos"))
    assert (tmp_path / "run/lift_1.png").exists() and (tmp_path / "run/lift_2.png").exists()
    weights = common.load_checkpoint(tmp_path / "run/last.pt")["network"]
    lift.main([*flags, "--fit_steps", "0"])                           # trained already: it only measures
    assert "going on from step 4" in capsys.readouterr().out
    again = common.load_checkpoint(tmp_path / "run/last.pt")["network"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    with pytest.raises(UserError, match="--given 6: .* has 6 photos"):
        lift.main([*flags, "--given", "6", "--out", str(tmp_path / "more")])


def test_one_word_names_all_folders_that_hold_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert families.folders(("",)) == [] and families.folders(["a", "b"]) == ["a", "b"]
    with pytest.raises(UserError, match="run a chapter first"):
        families.folders(["chapters"])
    rows = families.named(["runs/a/gan", "runs/b/gan", "runs/ours"])
    assert rows == {"gan": "runs/a/gan", "runs/b/gan": "runs/b/gan", "runs/ours": "runs/ours"}
    for file in ("runs/a/latents.pt", "runs/b/volumes.pt", "runs/b/mended/latents.pt"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    assert families.folders(["chapters"]) == ["runs/a", "runs/b", "runs/b/mended"]


# ---- maps, hierarchy ----

def test_heights_go_into_channels_and_back():
    c = torch.randn(2, 8, 2, 2)
    vectors = maps.as_vectors(c)
    assert vectors.shape == (2, 2, 2, 2, 4) and torch.equal(maps.as_map(vectors), c)
    # of channel k = (number, height): the number is the vector's, the height is z
    assert vectors[1, 1, 0, 1, 3] == c[1, 3 * 2 + 1, 0, 1]


def test_a_denoiser_of_maps_is_the_best_linear_one_while_its_network_says_nothing():
    torch.manual_seed(0)
    maker = maps.Maker(3, 2, 8)
    torch.nn.init.zeros_(maker.leave[-1].weight)
    torch.nn.init.zeros_(maker.leave[-1].bias)
    x, told, sigma = torch.randn(2, 3, 4, 4), torch.randn(2, 2, 4, 4), torch.tensor([0.5, 3.0])
    assert torch.allclose(maker.denoise(x, sigma, told), x / (1 + sigma.view(-1, 1, 1, 1) ** 2))


def test_a_denoiser_of_maps_measures_what_it_learns():
    torch.manual_seed(0)
    maker, some = maps.Maker(3, 0, 8), 5 + 2 * torch.randn(40, 3, 4, 4)
    maker.fit(some, torch.Generator().manual_seed(0))
    assert (maker.mean - 5).abs().max() < 0.5 and (maker.spread - 2).abs().max() < 0.3
    assert maker.levels[0] < 0.03 and maker.levels[-1] > 1 and (maker.levels.diff() >= 0).all()
    # A perfect denoiser of Gaussian numbers is the linear one, so its samples have their mean and deviation
    torch.nn.init.zeros_(maker.leave[-1].weight)
    torch.nn.init.zeros_(maker.leave[-1].bias)
    with torch.no_grad():
        made = maker.sample(torch.zeros(64, 0, 4, 4), [diffusion.noise_of(k) for k in range(64)], 40)
    assert abs(made.mean() - 5) < 0.3 and abs(made.std() / 2 - 1) < 0.1


def test_each_level_is_told_those_above():
    makers = hierarchy.Makers(knobs(whole=3, maker=8), 8)
    g, c = torch.randn(2, 3, 1, 1), torch.randn(2, 8, 2, 2)
    assert makers.told("g", g, c).shape == (2, 0, 1, 1)
    assert torch.equal(makers.told("c", g, c), g.expand(-1, -1, 2, 2))
    told = makers.told("f", g, c)
    assert told.shape == (2, 11, 4, 4) and torch.equal(told[:, 3:, ::2, ::2], c)


@pytest.mark.parametrize("implicit", [False, True])
def test_voxels_become_three_latents_and_voxels_again(implicit):
    levels = hierarchy.Levels(knobs(width=8, whole=3, implicit=implicit, words=5), 8)
    volume = torch.randn(2, 4, 8, 8, 8)
    g, c, f = hierarchy.written(levels, volume)
    assert g.shape == (2, 3, 1, 1) and c.shape == (2, 8, 2, 2) and f.shape == (2, 4, 4, 4)
    # c and f are words of their codebooks
    assert torch.cdist(maps.as_vectors(c).reshape(-1, 4), levels.c_words.words).amin(1).max() < 1e-3
    again = hierarchy.read(levels, (g, c, f))
    assert again.shape == (2, hierarchy.FEATURES if implicit else 4, 8, 8, 8)
    density, colour = levels.field(again.movedim(1, -1), None)
    assert density.shape == (2, 8, 8, 8) and colour.shape == (2, 8, 8, 8, 3) and (density >= 0).all()


def test_a_volume_looks_like_itself_and_not_like_another():
    volume = torch.full((1, 4, 8, 8, 8), -1.0)
    volume[:, 0, 2:6, 2:6, 2:6] = 1
    other = volume.clone()
    other[:, 1] = 3                                                                   # redder
    apart = lambda b: families.pictures_apart(volume, b, families.AsVolumes().field, 64,
                                              torch.Generator().manual_seed(0))
    assert apart(volume) == 0 and apart(other) > 0.01


# ---- image_gan ----

def test_a_blur_takes_what_alternates_and_keeps_the_rest():
    flat, chess = torch.ones(1, 1, 6, 6, 6), torch.ones(1, 1, 6, 6, 6)
    chess[..., ::2] = -1
    assert torch.allclose(families.smooth(flat), flat)
    assert families.smooth(chess)[..., 1:-1].abs().max() < 1e-6
    ramp = torch.arange(6.0).expand(1, 1, 6, 6, 6)
    assert torch.allclose(families.smooth(ramp)[..., 1:-1], ramp[..., 1:-1])          # nothing is shifted


def test_the_critic_is_told_the_camera():
    torch.manual_seed(0)
    critic = image_gan.Critic(knobs(critic=(4, 4), size=8))
    pictures, places = torch.rand(2, 8, 8, 3), torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    said = critic(pictures, places)
    assert said.shape == (2,) and (critic(pictures, places.flip(0)) - said).abs().max() > 1e-6


def test_the_front_is_where_objects_look(data):
    """Cameras of --front see an object from where its front is: at -y in the world"""
    poses = torch.stack([common.camera_to_world_at(a, 0, 1.3) for a in (-90, -60, 0, 90)])
    assert image_gan.from_the_front(poses, 45.0).tolist() == [0, 1]
    assert len(image_gan.from_the_front(poses, 180.0)) == 4


# ---- render_diffusion ----

def test_a_sample_through_the_renderer_is_the_same_in_any_batch():
    torch.manual_seed(0)
    config = render_diffusion.Config(size=8, views=2, width=8, blocks=1, channels=(8,), walk=3,
                                     precision="float32")
    network = render_diffusion.Pictures(config).eval()
    alone, three = (render_diffusion.drawn(network, seeds, config) for seeds in ([5], [4, 5, 6]))
    assert alone.shape == (1, 4, 16, 16, 16) and torch.allclose(alone[0], three[1], atol=1e-4)
    assert (three[0] - three[2]).abs().max() > 1e-3


# ---- distill ----

def small_denoiser():
    torch.manual_seed(0)
    return distill.PictureDenoiser(SimpleNamespace(width=8)).eval()


def test_views_at_once_see_each_other_and_single_ones_do_not():
    network, x = small_denoiser(), torch.randn(1, 2, 16, 16, 3)
    network.leave[-1].weight.data.normal_()
    places, sigma, no = torch.zeros(1, 2, 3), torch.ones(1), torch.zeros(1)
    changed = x.clone()
    changed[:, 1] += 1
    with torch.no_grad():
        both, other = network(x, sigma, places, no), network(changed, sigma, places, no)
        assert both.shape == x.shape and (both[:, 0] - other[:, 0]).abs().max() > 1e-5
        # Told where the cameras are, or that it is a sample's rendering, it answers otherwise
        told, label = network(x, sigma, places + 0.5, no), network(x, sigma, places, no + 1)
        assert (told - both).abs().max() > 1e-5 and (label - both).abs().max() > 1e-5
    for way in ("told the camera", "four views at once"):
        poses = distill.around(1, 2, torch.Generator().manual_seed(0))
        answer = lambda some: distill.imagined(network, some, 1.0, poses, way, SimpleNamespace(imagine=2),
                                               torch.Generator().manual_seed(0))
        moved = (answer(x)[:, 0] - answer(changed)[:, 0]).abs().max()
        assert (moved > 1e-5) == (way == "four views at once")


def test_the_contrast_is_what_photos_have_more_than_samples():
    network, x = small_denoiser(), torch.rand(1, 1, 16, 16, 3)
    network.leave[-1].weight.data.normal_()
    same = lambda: torch.Generator().manual_seed(0)
    poses = distill.around(1, 1, same())
    found = distill.contrast(network, x, 1.0, poses, same())
    z = network.plain(x) + torch.randn(x.shape, generator=same())
    places = torch.nn.functional.normalize(poses[..., :3, 3], dim=-1)
    with torch.no_grad():
        photo, made = (network(z, torch.ones(1), places, torch.full((1,), label)) for label in (0.0, 1.0))
    assert found.abs().max() > 1e-5 and torch.allclose(found, (photo - made) * network.spread, atol=1e-6)


def test_many_steps_of_a_denoiser_that_knows_one_photo_end_there():
    photo = torch.rand(1, 1, 8, 8, 3, generator=torch.Generator().manual_seed(0))
    class Knows:
        mean, spread = 0.5, 2.0
        plain = staticmethod(lambda some: (some - 0.5) / 2)
        def __call__(self, x, sigma, places, made):
            return self.plain(photo).expand(x.shape)
    poses = distill.around(1, 1, torch.Generator().manual_seed(0))
    found = distill.imagined(Knows(), torch.zeros(1, 1, 8, 8, 3), 5.0, poses, "told nothing",
                             SimpleNamespace(imagine=3), torch.Generator().manual_seed(0))
    assert torch.allclose(found, photo, atol=1e-5)


def test_azimuths_are_read_where_fronts_look_like_backs():
    poses = torch.stack([common.camera_to_world_at(a, 10, 1.3) for a in (0, 30, 90, 200)]).float()
    places = torch.nn.functional.normalize(poses[:, :3, 3], dim=1)
    right = lambda pictures: maps.doubled(places)
    assert maps.angle_apart(right, None, places).max() < 1e-2
    opposite = lambda pictures: maps.doubled(-places)
    assert maps.angle_apart(opposite, None, places).max() < 1e-2
    same = lambda pictures: maps.doubled(places[:1]).expand(4, -1)
    assert torch.allclose(maps.angle_apart(same, None, places), torch.tensor([0.0, 30, 90, 20]), atol=1e-2)


def test_descent_goes_to_what_the_denoiser_says(monkeypatch):
    """A denoiser that answers every picture with dark red: the object becomes dark red"""
    colour = torch.tensor([0.5, 0.1, 0.1])
    monkeypatch.setattr(distill, "imagined", lambda network, pictures, *rest: colour.expand(pictures.shape))
    config = distill.Config(size=8, rounds=3, descent=10, objects=1, rate=0.2)
    K, cpu = common.intrinsics_at(8).float(), torch.device("cpu")
    volume = distill.distilled(None, config, "told nothing", K, cpu)
    assert volume.shape == (1, 4, 32, 32, 32)
    rgb = torch.sigmoid(volume[0, 1:, 12:20, 12:20, 12:20]).mean((1, 2, 3))
    assert rgb[0] > rgb[1] + 0.1


# ---- those that make volumes ----

@pytest.mark.parametrize("chapter, needs", [
    (hierarchy, "autodecoder"), (image_gan, "data"), (render_diffusion, "data"), (distill, "both")])
def test_a_family_of_volumes_runs_and_the_lab_takes_it_as_a_row(chapter, needs, trained, data, tmp_path):
    flags = ["--preset", "smoke", "--out", str(tmp_path / "run"), "--device", "cpu"]
    flags += ["--data", str(data / "earphones_train")] * (needs != "autodecoder")
    flags += ["--autodecoder", str(trained)] * (needs != "data")
    flags += ["--holdout_views", "2"] * (chapter is render_diffusion)
    if needs == "both":
        diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                        "--out", str(tmp_path / "diffusion")])
        flags += ["--diffusion", str(tmp_path / "diffusion")]
    chapter.main(flags)
    first = common.load_checkpoint(tmp_path / "run/volumes.pt")["volumes"]
    assert (tmp_path / "run/samples.png").exists() and first.isfinite().all()
    chapter.main(flags)                                                # trained already: the same samples
    assert torch.equal(common.load_checkpoint(tmp_path / "run/volumes.pt")["volumes"], first)
    from autodecoder import load_autodecoder
    model, _ = load_autodecoder(trained)
    shown_by, volumes, state = families.read_samples(tmp_path / "run", model)
    assert isinstance(shown_by, families.AsVolumes) and torch.equal(volumes, first.float())
    assert {"parameters", "training_seconds", "sample_seconds"} <= state.keys()
    seen = evaluate.see_volumes(shown_by, volumes, SimpleNamespace(points=16))
    assert seen["points"].shape == (len(volumes), 16, 3)
    common.save_checkpoint(tmp_path / "run/volumes.pt", state | {"volumes": volumes[:, :3]})
    with pytest.raises(UserError, match="holds no volumes"):
        families.read_samples(tmp_path / "run", model)

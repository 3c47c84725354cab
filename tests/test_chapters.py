"""The chapters: their networks do what they say, and each trains by a stage's loop."""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import autodecoder
import common
import diffusion
import volume_render
from autodecoder import descend, load_autodecoder
from chapters import few_views, find_camera, hybrid, unet
from common import UserError
from shapes.packed import read_photos
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

@pytest.fixture(scope="module")
def denoised(trained, tmp_path_factory):
    """Stage 2, smoke-sized, on the smoke-sized autodecoder"""
    out = tmp_path_factory.mktemp("few") / "diffusion"
    diffusion.main(["--preset", "smoke", "--steps", "4", "--autodecoder", str(trained), "--device", "cpu",
                    "--out", str(out)])
    return out


def test_answers_for_unseen_objects(data, denoised, tmp_path, capsys):
    flags = ["--preset", "smoke", "--diffusion", str(denoised), "--data", str(data / "earphones_test"),
             "--out", str(tmp_path), "--device", "cpu", "--objects", "0"]
    for views, more in (("1", ["--count", "2"]), ("2", [])):
        few_views.main([*flags, "--views", views, *more])
        said = capsys.readouterr().out
        assert "2 unseen objects" in said and f"{views} photos each" in said
        assert "Ours less fit_codes" in said and "without diffusion" in said
        assert (tmp_path / f"views_{views}.png").exists()
        text = (tmp_path / f"views_{views}.txt").read_text()
        assert all(name in text for name in ("ours", "fit_codes", "nearest training object"))
        assert ("2 answers" in text) == (views == "1")
    assert (tmp_path / "answers.png").exists()
    with pytest.raises(UserError, match="--views 6"):
        few_views.main([*flags, "--views", "6"])


@pytest.mark.parametrize("axis", [0, 3, -4.3])
def test_a_mirrored_photo_is_a_photo_of_the_mirrored_object(axis, data):
    """Render a volume and its mirror image: the mirrored camera must see in the one what the other's sees"""
    photos = read_photos(data / "earphones_test", 32, 1)
    photos.intrinsics[0, 0, 2] += axis / 2
    both, V = few_views.mirrored(photos), photos.rgb.shape[1]
    volume = torch.randn(1, 4, 8, 8, 8)
    model = SimpleNamespace(config=SimpleNamespace(samples=16), field=volume_render.voxel_field)
    see = lambda some, view: volume_render.render_volumes(model, some, both.pose[0, view][None],
                                                          both.intrinsics[0], 32)[0][0, 0]
    for view in range(2):
        assert (see(volume.flip(-1), V + view) - see(volume, view)).abs().max() < 1e-4
        assert (see(volume, V + view) - see(volume, view)).abs().max() > 0.01
        assert torch.equal(both.rgb[0, V + view], photos.rgb[0, view])


def test_a_single_photo_holds_the_latent_back_as_its_mirror_image_does_not_count(trained, data, monkeypatch):
    model, _ = load_autodecoder(trained)
    photos, pulls, units = read_photos(data / "earphones_test", 32, 2), [], []
    monkeypatch.setattr(few_views, "descend", lambda *what: (units.append(what[3]), pulls.append(what[9])))
    latents = diffusion.latents_of(model, model.codes[:2])
    for views, mirror in ((1, True), (1, False), (2, True), (4, False)):
        config = few_views.Config(mirror=mirror)
        both = few_views.given_photos(photos, torch.arange(views), config)
        few_views.freed(model, latents, *both, torch.arange(2), config, 0)
    assert pulls == pytest.approx([0.03, 0.03, 0.015, 0.0075])
    assert (units[0][:, -9:] == 0).all() and (units[0][:, :-9] > 0).all()               # the palette stays


def test_fits_and_answers_begin_in_the_photos_palette(denoised, data, monkeypatch):
    model, _, denoiser = diffusion.load_denoiser(denoised)
    photos, views, starts = read_photos(data / "earphones_test", 32, 2), torch.tensor([1, 3]), []

    def stay(model, decode, start, *what):
        starts.append(start)
        return start
    monkeypatch.setattr(few_views, "descend", stay)
    monkeypatch.setattr(autodecoder, "descend", stay)
    seen = autodecoder.palette_code(*photos.measured(views)[0])
    autodecoder.fit_codes(model, photos, views)
    few_views.posterior(model, denoiser, photos, views, torch.tensor([1, 0]), few_views.Config(levels=3), 0)
    assert len(starts) == 5                                     # a fit; three levels and the latent set free
    assert torch.allclose(starts[0][:, -9:], seen)
    assert all(torch.allclose(code[:, -9:], seen[[1, 0]], atol=1e-5) for code in starts[1:4])
    assert not torch.allclose(seen, autodecoder.palette_code(*photos.measured(torch.tensor([0]))[0]))


def test_descent_moves_towards_the_photos_and_is_held_back(trained, data):
    model, _ = load_autodecoder(trained)
    photos, objects = read_photos(data / "earphones_test", 32, 2), torch.arange(2)
    start = model.codes[:2].detach()
    ways = {}
    for weight in (0.0, 1e4):
        end = descend(model, model.volumes_of, start, torch.ones(()), photos, torch.arange(2), objects, 10,
                      0.1, weight, 0)
        ways[weight] = (end - start).norm().item()
    assert ways[0.0] > 2 * ways[1e4] > 0


# ---- an unknown camera ----

def test_many_cameras_are_as_many_single_ones_and_have_gradients():
    azimuth, elevation = torch.tensor([20.0, -120, 150]), torch.tensor([5.0, -45, 70])
    distance = torch.tensor([1.3, 1.0, 2.0], requires_grad=True)
    poses = common.camera_to_world_at(azimuth, elevation, distance)
    assert poses.shape == (3, 4, 4)
    for pose, a, e, d in zip(poses, azimuth.tolist(), elevation.tolist(), distance.tolist()):
        one = common.camera_to_world_at(a, e, d)
        assert one.dtype == torch.float64 and (pose - one).abs().max() < 1e-6
    poses.sum().backward()
    assert distance.grad.abs().sum() > 0


def test_silhouettes_are_cut_out_and_made_equal():
    masks = torch.zeros(2, 160, 160)
    masks[0, 16:48, 40:104] = 1
    masks[1, 80:96, 20:52] = 1                                            # the same, half as large, elsewhere
    small, middle, size = find_camera.silhouettes(masks)
    assert (small[0] - small[1]).abs().mean() < 0.02 and small[0].mean() == pytest.approx(0.5, abs=0.06)
    assert torch.allclose(middle, torch.tensor([[0.45, 0.2], [0.225, 0.55]]))
    assert torch.allclose(size, torch.tensor([0.4, 0.2]))


def test_a_mirror_image_is_counted_apart():
    pose = common.camera_to_world_at(30, 20, 1.3)[:3, :3].float()
    mirrored = common.camera_to_world_at(150, 20, 1.3)[:3, :3].float()     # x becomes -x
    assert find_camera.apart(pose, mirrored) > 90
    images = find_camera.mirror_images(pose)
    assert find_camera.apart(images["left and right"], mirrored) < 0.1
    assert find_camera.apart(images["front and back"],
                             common.camera_to_world_at(-30, 20, 1.3)[:3, :3].float()) < 0.1
    assert find_camera.apart(images["half a turn"],
                             common.camera_to_world_at(210, 20, 1.3)[:3, :3].float()) < 0.1
    beside = common.camera_to_world_at(40, 20, 1.3)[:3, :3].float()
    assert find_camera.apart(pose, beside) == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize("form", ["alpha.png", "white.png", "turned.jpg", "large.png"])
def test_any_photo_is_cut_and_squared(form, tmp_path):
    size = (3000, 2000) if form == "large.png" else (300, 200)
    n = size[0] // 300
    image = Image.new("RGBA", size, (255, 255, 255, 0) if form == "alpha.png" else "white")
    image.paste((200, 30, 30, 255), (40 * n, 60 * n, 120 * n, 100 * n))    # 80 x 40, red
    image.paste((30, 30, 200, 255), (40 * n, 60 * n, 60 * n, 100 * n))     # its left quarter blue
    if form == "turned.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6                                                   # "turn it clockwise to look at it"
        image.convert("RGB").rotate(90, expand=True).save(tmp_path / form, exif=exif, quality=95)
    else:
        image.save(tmp_path / form)
    rgb, mask = find_camera.read_one(tmp_path / form, 64)
    assert rgb.shape == (64, 64, 3) and mask.shape == (64, 64)
    y, x = (mask > 0.5).nonzero().T
    assert abs((x.max() - x.min()).item() - 45) <= 2 and abs((y.max() - y.min()).item() - 22) <= 2
    assert abs(x.float().mean() - 31.5) < 1.5 and abs(y.float().mean() - 31.5) < 1.5
    assert rgb[32, 14, 2] > 0.6 and rgb[32, 45, 0] > 0.6 and rgb[2, 2].min() > 0.97


@pytest.mark.parametrize("name, said", [("white.png", "0% of it shows"), ("none.png", "is no picture"),
                                        ("text.png", "is no picture")])
def test_a_photo_of_nothing_is_one_sentence(name, said, tmp_path):
    Image.new("RGB", (40, 40), "white").save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=said):
        find_camera.read_one(tmp_path / name, 32)


def test_a_photo_without_camera(data, denoised, tmp_path, capsys):
    photo = next((data / "earphones_test").glob("*/rgb/000000.png"))
    few_views.main(["--preset", "smoke", "--diffusion", str(denoised), "--photo", str(photo), "--device",
                    "cpu", "--out", str(tmp_path), "--count", "2"])
    assert "Camera: azimuth" in capsys.readouterr().out
    assert (tmp_path / "photo.png").exists() and (tmp_path / "viewer.html").exists()
    find_camera.main(["--preset", "smoke", "--diffusion", str(denoised), "--data",
                      str(data / "earphones_test"), "--device", "cpu", "--out", str(tmp_path / "cameras")])
    assert "error of the rotation" in (tmp_path / "cameras/cameras.txt").read_text()


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


def test_more_levels_than_halvings_are_one_sentence():
    with pytest.raises(UserError, match="5 levels halve a latent of 8 cells a side too often"):
        unet.LatentDenoiser(replace(unet.Config(), levels=(8,) * 5), Linear(3, shape=(4, 8, 8, 8)))


def test_the_u_net_trains_and_writes_its_samples(trained, tmp_path, capsys):
    flags = ["--preset", "smoke", "--steps", "4", "--preview_every", "4", "--save_every", "4",
             "--device", "cpu", "--autodecoder", str(trained), "--out", str(tmp_path / "run")]
    unet.main(flags)
    assert "Outside the span" in capsys.readouterr().out and (tmp_path / "run/samples.png").exists()
    first = common.load_checkpoint(tmp_path / "run/latents.pt")["latents"]
    assert first.shape == (2, 25, 8, 8, 8) and first.isfinite().all()
    unet.main(flags)                                                # trained already: the same samples
    assert torch.equal(common.load_checkpoint(tmp_path / "run/latents.pt")["latents"], first)

"""Ours against PyTorch3D itself, the paper's renderer: pictures of meshes, rays, pictures of volumes
and their gradients.  shapes/README.md says how to install it.  Without it these tests are skipped."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import render_shapenet as stage
import volume_render as v
from common import intrinsics_at
from shapes import earphones
from shapes.meshes import Mesh, load_obj
from shapes.rasterizer import rasterize, to_world

try:
    from pytorch3d.renderer import (EmissionAbsorptionRaymarcher, MeshRasterizer, NDCMultinomialRaysampler,
                                    PerspectiveCameras, RasterizationSettings, RayBundle, VolumeRenderer)
    from pytorch3d.structures import Meshes, Volumes
except ImportError as error:
    pytest.skip(f"PyTorch3D cannot be imported ({error}): requirements-pytorch3d.txt installs it",
                allow_module_level=True)

HERE = Path(__file__).parent


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def camera(azimuth, elevation, size):
    """One camera -> PyTorch3D's own object, our matrix (4,4), our intrinsics (3,3)"""
    R, T = stage.look_at(azimuth, elevation, 1.3)
    K = intrinsics_at(size)
    # Its focal length and middle may be in pixels, as ours, once in_ndc is False and it knows the size
    theirs = PerspectiveCameras(R=R[None].float(), T=T[None].float(), in_ndc=False,
                                image_size=[[size, size]], focal_length=K.diagonal()[None, :2].float(),
                                principal_point=K[None, :2, 2].float())
    return theirs, stage.opencv_from_pytorch3d(R, T), K


def earphone(index, folder):
    earphones.write_model(folder, earphones.draw_factors("test", index, seed=16))
    return to_world(load_obj(folder / "models/model_normalized.obj"))[0]


def soup(count):
    """Triangles of many colours that pierce each other"""
    corners = (random(count, 1, 3) - 0.5) * 0.7 + (random(count, 3, 3, seed=1) - 0.5) * 0.4
    colours, each = (random(count, 3, seed=2) * 255).byte(), torch.arange(count)
    return Mesh(corners.view(-1, 3), torch.arange(3 * count).view(-1, 3), torch.zeros_like(corners)[..., :2],
                each, colours, each, torch.ones(count, 2, dtype=torch.long), each < 0)


@pytest.mark.parametrize("index", [0, 1, 2, 3, "soup"])
def test_the_rasterisers_agree_on_fresh_meshes_and_cameras(index, tmp_path):
    mesh = soup(300) if index == "soup" else earphone(index, tmp_path)
    for azimuth, elevation in ((random(3, 2, seed=7) - 0.5) * torch.tensor([360, 170])).tolist():
        theirs, pose, K = camera(azimuth, elevation, 96)
        rgb, coverage, depth = rasterize(mesh, pose, K, 96)

        # PyTorch3D alone, with its own camera.  bin_size=0: its default, bins, leaves holes in large meshes.
        # What does not meet a pixel's centre does not cover it: blur_radius=0.  -1 stands where nothing is
        settings = RasterizationSettings(96, blur_radius=0.0, faces_per_pixel=1, bin_size=0)
        z = MeshRasterizer(theirs, settings)(Meshes([mesh.vertices.float()], [mesh.faces])).zbuf[0, ..., 0]
        assert ((z > 0) == (coverage > 0)).all() and 0.01 < coverage.mean() < 0.9
        seen = z > 0
        assert (depth - z)[seen].abs().max() < 1e-4

        # Colours, as --renderer pytorch3d draws them: the face and the place on it are PyTorch3D's, the
        # texture's lookup is ours.  Where two triangles of the soup meet in a pixel's middle, either may win
        drawn, covered, _ = rasterize(mesh, pose, K, 96, renderer="pytorch3d")
        assert torch.equal(covered, coverage)
        alike = ((drawn - rgb).abs().amax(-1) <= 1 / 255)[seen].float().mean()
        assert alike >= (0.999 if index == "soup" else 1)


@pytest.mark.parametrize("name", ["golden_boxes", "golden_headphone", "golden_uv_sphere"])
def test_it_draws_the_reference_views(name):
    # tests/golden was drawn on another machine, by PyTorch3D's own loader, textures and renderer
    mesh = load_obj(HERE / f"golden/ShapeNetCore.v2/03261776/{name}/models/model_normalized.obj")
    views = np.load(HERE / f"golden/{name}.npz")
    for k in range(6):
        pose, seen = stage.opencv_from_pytorch3d(views["R"][k], views["T"][k]), views["mask"][k]
        rgb, coverage, depth = rasterize(mesh, pose, views["K"][k], 128, renderer="pytorch3d")
        assert ((coverage.numpy() > 0) == seen).all()
        assert np.abs(depth.numpy() - views["depth"][k])[seen].max() < 1e-4
        assert (np.abs((rgb.numpy() * 255).round() - views["rgb"][k]).max(-1) <= 2).mean() > 0.995


def test_its_cameras_send_out_our_rays():
    # Its rays of a picture start in the middles of the pixels and have camera z = 1, as ours do
    for azimuth, elevation in ((30, 20), (200, -65), (0, 90)):
        theirs, pose, K = camera(azimuth, elevation, 24)
        bundle = NDCMultinomialRaysampler(image_width=24, image_height=24, n_pts_per_ray=1, min_depth=1.0,
                                          max_depth=1.0)(theirs)
        ours = v.camera_rays(pose, K, 24)
        assert (bundle.origins.view(-1, 3) - ours[0]).abs().max() < 1e-5
        assert (bundle.directions.view(-1, 3) - ours[1]).abs().max() < 1e-5


def by_pytorch3d(channels, origins, directions, samples):
    """What v.render computes, by PyTorch3D's VolumeRenderer.  Six things must be matched, or the two differ:

    - the points: its rays may have any points, so they get the centres of our bins, from v.cube;
    - the voxels: in its default, align_corners=True, the outermost *centres* lie on the volume's faces; in
      ours the outermost voxels' outer sides do.  With align_corners=False it still scales by N - 1 voxels,
      so a volume that is N voxels of 1/N wide needs the voxel_size 1 / (N - 1);
    - the border: it looks up zeros outside of the volume, and mixes them in within half a voxel of the faces.
      We repeat the outermost voxel, so it gets a volume with one more layer all around, which is repeated;
    - the order: it takes densities and colours after activation.  Ours come before it, interpolated, so it
      looks up channels, and softplus and sigmoid come before its raymarcher;
    - the opacity: its raymarcher wants numbers between 0 and 1, not a density: 1 - exp(-density * length);
    - the background: its pictures are on black, so the white is added after it.

    Its product of transmittances is exclusive with the default surface_thickness=1, as ours is."""
    march = EmissionAbsorptionRaymarcher()
    near, far = v.cube(origins, directions)
    step = (far - near) / samples
    length = step * directions.norm(dim=-1)

    def rays(cameras, **rest):
        t = near[..., None] + (torch.arange(samples) + 0.5) * step[..., None]           # (B,R,S)
        return RayBundle(origins, directions, t, torch.zeros_like(origins[..., :2]))

    def activate_and_march(rays_densities, rays_features, ray_bundle, **rest):
        opacity = 1 - torch.exp(-F.softplus(rays_densities) * length[..., None, None])
        # A fourth feature, the depth, gives the sum of weights times depths
        features = torch.cat([torch.sigmoid(rays_features), ray_bundle.lengths[..., None]], -1)
        return march(rays_densities=opacity, rays_features=features)

    padded = F.pad(channels, (1,) * 6, mode="replicate")
    size = torch.tensor(channels.shape[:1:-1])                                          # W, H, D: x, y, z
    volumes = Volumes(padded[:, :1], padded[:, 1:], align_corners=False,
                      voxel_size=((size + 2) / size / (size + 1)).tolist())
    sums = VolumeRenderer(rays, activate_and_march)(None, volumes)[0]
    rgb, weighted, alpha = sums[..., :3], sums[..., 3], sums[..., 4]
    return rgb + (1 - alpha)[..., None], alpha, weighted / alpha.clamp(min=0.01)


@pytest.mark.parametrize("bias, most", [(-2, 0.7), (40, 0.99)])     # thin fog, and fog that hides things
def test_the_volume_renderers_agree_values_and_gradients(bias, most):
    generator = torch.Generator().manual_seed(3)
    # Three unequal sides: a swap of axes shows.  Two volumes, each with cameras of its own
    channels = torch.randn(2, 4, 5, 7, 6, generator=generator) * 4
    channels[:, 0] += bias
    poses = torch.stack([camera(azimuth, elevation, 20)[1] for azimuth, elevation in ((215, 25), (30, -50))])
    origins, directions = v.camera_rays(poses.float(), intrinsics_at(20).float()[None], 20)
    weight = torch.randn(2, 400, 4, generator=generator)

    results = []
    for renderer in (v.render, by_pytorch3d):
        leaf = channels.clone().requires_grad_()
        rgb, alpha, depth = renderer(leaf, origins, directions, 24)
        loss = (torch.cat([rgb, alpha[..., None]], -1) * weight).sum()
        results.append((rgb, alpha, depth, torch.autograd.grad(loss, leaf)[0]))
    ours, theirs = results
    assert ours[1].max() > most
    seen = ours[1] > 0.1
    assert (ours[0] - theirs[0]).abs().max() < 1e-5 and (ours[1] - theirs[1]).abs().max() < 1e-5
    assert (ours[2] - theirs[2])[seen].abs().max() < 1e-4
    assert (ours[3] - theirs[3]).abs().max() < 1e-4 * ours[3].abs().max() and ours[3].abs().max() > 0.1

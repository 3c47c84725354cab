"""Stage 0: the rasteriser against PyTorch3D's pictures, the cameras, the photos on disk, and
what becomes of bad ones."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import autodecoder
from shapes import earphones
from shapes import rasterizer
import render_shapenet as stage
from common import UserError, camera_to_world_at, command, intrinsics_at, parse_config
from shapes.meshes import Mesh, load_obj
from shapes.photos import kinds_of, load_photos

HERE = Path(__file__).parent
GOLDEN = ("golden_boxes", "golden_headphone", "golden_uv_sphere")
TINY = ["--objects", "2", "--test_objects", "1", "--views", "2", "--holdout_views", "1",
        "--size", "32", "--workers", "1"]


def golden(name):
    model = load_obj(HERE / f"golden/ShapeNetCore.v2/03261776/{name}/models/model_normalized.obj")
    return model, np.load(HERE / f"golden/{name}.npz")


def mesh_of(vertices, faces, colours=((200, 0, 0),), material=None, textured=None):
    """A mesh of plain colours; `textured` claims which of them count as textures."""
    F, M = len(faces), len(colours)
    uvs = torch.zeros(F, 3, 2, dtype=torch.float64)
    return Mesh(torch.tensor(vertices, dtype=torch.float64), torch.tensor(faces), uvs,
                torch.tensor(material or [0] * F), torch.tensor(colours, dtype=torch.uint8), torch.arange(M),
                torch.ones(M, 2, dtype=torch.long), torch.tensor(textured or [False] * M))


# ---- the rasteriser ----

@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    mesh, views = golden(name)
    for k in range(6):
        pose = stage.opencv_from_pytorch3d(views["R"][k], views["T"][k])
        rgb, coverage, depth = stage.rasterize(mesh, pose, views["K"][k], 128)
        mask, truth = coverage.numpy() > 0, views["mask"][k]
        assert (mask == truth).all()
        error = np.abs((rgb.numpy() * 255).round() - views["rgb"][k])
        assert (error.max(-1)[truth] <= 2).mean() >= 0.995 and (error[~truth] == 0).all()
        assert np.abs(depth.numpy() - views["depth"][k])[truth].max() < 1e-4
        assert np.isinf(depth.numpy()[~truth]).all()


def test_against_a_plain_loop():
    """Every pixel against every triangle, with textures, clipped by the frame, seen
    from within its extent."""
    generator = torch.Generator().manual_seed(3)
    random = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    mesh = mesh_of((random(60, 3) * 1.6 - 0.8).tolist(), torch.arange(60).view(20, 3).tolist(), [(9, 9, 9)])
    mesh = replace(mesh, texels=(random(12, 3) * 255).byte(), shape=torch.tensor([[3, 4]]),
                   textured=torch.tensor([True]), uvs=random(20, 3, 2) * 0.6 + 0.2)
    pose, K, size = camera_to_world_at(40, 25, 0.8), intrinsics_at(24, 131.25), 24
    rgb, coverage, depth = stage.rasterize(mesh, pose, K, size)
    camera = (mesh.vertices - pose[:3, 3]) @ pose[:3, :3]
    for row in range(size):
        for column in range(size):
            ray = [(column + 0.5 - K[0, 2]) / K[0, 0], (row + 0.5 - K[1, 2]) / K[1, 1], 1.0]
            ray = torch.tensor(ray, dtype=torch.float64)
            best = (math.inf, None, None)
            for face in range(20):
                corners = camera[mesh.faces[face]]
                if corners[:, 2].min() < rasterizer.NEAR:
                    continue
                weights = torch.linalg.solve(corners.T, ray)              # ray = sum of weights times corners
                if (weights >= 0).all() and 1 / weights.sum() < best[0]:
                    best = (1 / weights.sum(), face, weights / weights.sum())
            assert (coverage[row, column] > 0) == (best[1] is not None)
            if best[1] is not None:
                assert abs(depth[row, column] - best[0]) < 1e-5
                colour = rasterizer.surface_colour(mesh, torch.tensor([best[1]]), best[2][:, None])[0]
                assert (rgb[row, column] - colour).abs().max() < 1e-3


def wall(distance, clockwise=False):
    """A triangle across the view of a camera on the +X axis, `distance` in front of the origin,
    facing it unless turned."""
    corners = [[distance, -0.5, -0.4], [distance, 0.5, -0.4], [distance, 0, 0.4]]
    return corners[::-1] if clockwise else corners


@pytest.mark.parametrize("first, second, winner, why", [
    ((0.1, False, False), (0.0, False, True), 0, "nearer"),
    ((0.0, True, True), (0.00005, False, False), 1, "front-facing"),
    ((0.00005, True, True), (0.0, False, False), 1, "front-facing, though farther"),
    ((0.0, False, False), (0.0, False, True), 1, "textured"),
    ((0.00005, False, False), (0.0, False, True), 1, "textured, though farther"),
    ((0.0, False, False), (0.00005, False, False), 1, "exact depth"),
    ((0.0, False, False), (0.0, False, False), 0, "index"),
    ((0.0003, True, False), (0.0, False, True), 0, "nearer by more than a tie")])
def test_ties(first, second, winner, why):
    """(distance, clockwise, textured) of two walls: front-facing, then textured, then
    exact depth, then index."""
    mesh = mesh_of(wall(*first[:2]) + wall(*second[:2]), [[0, 1, 2], [3, 4, 5]],
                   [(200, 0, 0), (0, 200, 0)], [0, 1], [first[2], second[2]])
    pose, K = camera_to_world_at(0, 0, 1.3), intrinsics_at(32, 131.25)
    rgb, coverage, _ = stage.rasterize(mesh, pose, K, 32)
    seen = rgb[coverage > 0]
    assert len(seen) > 100 and (seen[:, winner] > 0.7).all(), why


def test_faces_that_share_an_edge_leave_no_gap_and_no_doubt():
    """A square of two triangles, its diagonal through pixel centres: covered once, whatever the winding."""
    for faces in ([[0, 1, 2], [0, 2, 3]], [[0, 2, 1], [2, 0, 3]]):
        mesh = mesh_of([[0, -0.4, -0.4], [0, 0.4, -0.4], [0, 0.4, 0.4], [0, -0.4, 0.4]], faces)
        K = torch.tensor([[40.0, 0, 16], [0, 40, 16], [0, 0, 1]], dtype=torch.float64)
        coverage = stage.rasterize(mesh, camera_to_world_at(0, 0, 1.0), K, 32)[1]
        assert coverage.sum() == 32 * 32                       # +-0.4 * 40 / 1 = 16 pixels each way


def test_supersampling_is_a_box_filter():
    mesh, views = golden("golden_headphone")
    pose = stage.opencv_from_pytorch3d(views["R"][0], views["T"][0])
    fine = stage.rasterize(mesh, pose, np.diag([3, 3, 1]) @ views["K"][0], 384)
    rgb, coverage, depth = stage.rasterize(mesh, pose, views["K"][0], 128, supersample=3)
    assert (rgb - fine[0].view(128, 3, 128, 3, 3).mean((1, 3))).abs().max() < 1e-6
    assert (coverage - fine[1].view(128, 3, 128, 3).mean((1, 3))).abs().max() < 1e-6
    assert torch.equal(depth, fine[2].view(128, 3, 128, 3).amin((1, 3)))


def test_memory_is_bounded(monkeypatch):
    """Cut into chunks or whole, the picture is the same."""
    mesh, views = golden("golden_headphone")
    pose = stage.opencv_from_pytorch3d(views["R"][1], views["T"][1])
    whole = stage.rasterize(mesh, pose, views["K"][1], 128)
    monkeypatch.setattr(rasterizer, "SPAN_PIXELS", 300)
    for a, b in zip(whole, stage.rasterize(mesh, pose, views["K"][1], 128)):
        assert torch.equal(a, b)


def test_huge_and_degenerate_triangles():
    pose, K = camera_to_world_at(0, 0, 1.3), intrinsics_at(64, 131.25)
    huge = mesh_of([[0, -1e6, -1e6], [0, 1e6, -1e6], [0, 0, 1e6]], [[0, 1, 2]])
    assert stage.rasterize(huge, pose, K, 64)[1].mean() == 1
    nothing = mesh_of([[0, 0, 0], [0, 0.1, 0.1], [0, 0.2, 0.2], [5, 0, 0]],
                      [[0, 1, 2], [0, 1, 1], [0, 1, 3]])                 # a line, a point, one behind us
    rgb, coverage, depth = stage.rasterize(nothing, pose, K, 64)
    assert coverage.sum() == 0 and (rgb == 1).all() and depth.isinf().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_and_gpu_agree():
    for name in GOLDEN:
        mesh, views = golden(name)
        pose = stage.opencv_from_pytorch3d(views["R"][0], views["T"][0])
        cpu, gpu = (stage.rasterize(mesh.to(device), pose, views["K"][0], 128, 2)
                    for device in ("cpu", "cuda"))
        for a, b in zip(cpu, gpu):
            assert (a - b.cpu()).nan_to_num(0, 0, 0).abs().max() < 1e-4


# ---- cameras ----

def test_pytorch3d_cameras_become_ours():
    for name in GOLDEN:
        views = golden(name)[1]
        pose = stage.opencv_from_pytorch3d(views["R"], views["T"])
        inverse = torch.linalg.inv(pose)
        assert (inverse[:, :3, :3] - torch.tensor(views["R_cv"])).abs().max() < 1e-6
        assert (inverse[:, :3, 3] - torch.tensor(views["t_cv"])).abs().max() < 1e-6


def test_a_point_lands_on_the_same_pixel_by_every_convention(tmp_path):
    """Through our matrices, through PyTorch3D's rows, through the OpenGL camera of
    transforms.json, and in the picture."""
    generator, size, f = np.random.default_rng(5), 64, 65.625
    for _ in range(10):
        point = generator.uniform(-0.25, 0.25, 3)
        pose = camera_to_world_at(generator.uniform(0, 360), generator.uniform(-80, 80), 1.3).numpy()
        x, y, z = pose[:3, :3].T @ (point - pose[:3, 3])
        ours = np.array([f * x / z + size / 2, f * y / z + size / 2])

        # PyTorch3D: rows, +X left, +Y up
        R = pose[:3, :3] * [-1, -1, 1]
        T = -(pose[:3, 3] @ R)
        assert np.abs(stage.opencv_from_pytorch3d(R, T).numpy() - pose).max() < 1e-12

        x, y, z = point @ R + T
        assert np.abs(ours - (size / 2 - f * x / z, size / 2 - f * y / z)).max() < 1e-9

        shutil.rmtree(tmp_path / "pose", ignore_errors=True)
        (tmp_path / "pose").mkdir()
        (tmp_path / "pose/000000.txt").write_text(stage.numbers(pose))
        (tmp_path / "intrinsics.txt").write_text(
            f"{f} {size / 2} {size / 2} 0.\n0. 0. 0.\n1.\n{size} {size}\n")
        stage.write_transforms(tmp_path)
        written = json.loads((tmp_path / "transforms.json").read_text())
        # OpenGL: +Y up, looks along -Z
        x, y, z, _ = np.linalg.inv(written["frames"][0]["transform_matrix"]) @ [*point, 1]
        theirs = written["cx"] + written["fl_x"] * x / -z, written["cy"] - written["fl_y"] * y / -z
        assert z < 0 and np.abs(ours - theirs).max() < 1e-4
        assert math.isclose(written["camera_angle_x"], 2 * math.atan(size / 2 / f))

        tetrahedron = 0.02 * np.array([[-1, -1, -1], [1, -1, 1], [-1, 1, 1], [1, 1, -1]])
        speck = mesh_of((point + tetrahedron).tolist(), [[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]])
        coverage = stage.rasterize(speck, pose, intrinsics_at(size, 131.25), size, 4)[1]
        rows, columns = (coverage > 0).nonzero(as_tuple=True)
        assert abs(columns.double().mean() + 0.5 - ours[0]) < 0.6
        assert abs(rows.double().mean() + 0.5 - ours[1]) < 0.6


def test_look_at_is_pytorch3ds_of_the_same_camera():
    """By PyTorch3D's own rules: +X left, +Y up, +Z into the scene, rows times R"""
    for azimuth, elevation in ((10, 20), (300, -75), (123.4, 89.9)):
        R, T = stage.look_at(azimuth, elevation, 1.3)
        pose = stage.opencv_from_pytorch3d(R, T)
        assert (pose - camera_to_world_at(azimuth, elevation, 1.3)).abs().max() < 1e-12
        assert (torch.zeros(3).double() @ R + T - torch.tensor([0, 0, 1.3]).double()).abs().max() < 1e-7
        above = torch.tensor([0.0, 0, 0.1]).double() @ R + T
        left = pose[:3, :3] @ torch.tensor([-0.1, 0, 0]).double() @ R + T
        assert above[1] > 0 and abs(above[0]) < 1e-12 and left[0] > 0.09


def test_cameras_stand_upright_and_look_at_the_origin():
    cameras = stage.random_cameras(np.random.default_rng(0), stage.Config())
    for pose in (next(cameras) for _ in range(200)):
        rotation = pose[:3, :3]
        assert (rotation @ rotation.T - torch.eye(3)).abs().max() < 1e-12 and torch.det(rotation) > 0
        assert (pose[:3, 3] + 1.3 * rotation[:, 2]).abs().max() < 1e-12         # forward points at the origin
        assert abs(rotation[2, 0]) < 1e-12 and rotation[2, 1] < 0               # right is level, down is down


def test_to_world():
    mesh = mesh_of([[2, 0, 0], [4, 0, 0], [2, 2, 0], [2, 0, 1], [99, 99, 99]],         # the last in no face
                   [[0, 1, 2], [0, 1, 3]])
    world, transform = stage.to_world(mesh)
    used = world.vertices[:4]
    low, high = used.amin(0), used.amax(0)
    assert torch.allclose(low, -high) and math.isclose((high - low).norm(), 1, rel_tol=1e-9)
    assert (used[2] - used[0])[2] > 0.5 and (used[3] - used[0])[1] < -0.3            # Y goes up, Z towards us
    assert torch.allclose(mesh.vertices @ transform[:3, :3].T + transform[:3, 3], world.vertices)
    with pytest.raises(UserError, match="no extent"):
        stage.to_world(mesh_of([[1, 1, 1]] * 3, [[0, 1, 2]]))


# ---- photos, written ----

@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    out = tmp_path_factory.mktemp("photos")
    stage.main(["--out", str(out), *TINY, "--transforms"])
    return out


def files_of(folder):
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_layout(photos):
    """What SRN's, pixelNeRF's and SSDNeRF's loaders ask of a folder."""
    for name in ("earphones_train/train_00000", "earphones_train/train_00001", "earphones_test/test_00000"):
        folder = photos / name
        assert [len(list((folder / sub).iterdir())) for sub in ("rgb", "mask", "pose")] == [3, 3, 3]
        first, second, third, fourth = (folder / "intrinsics.txt").read_text().split("\n")[:4]
        assert (first, second, third, fourth) == ("32.8125 16.0 16.0 0.", "0. 0. 0.", "1.", "32 32")
        for k in range(3):
            line, end = (folder / f"pose/{k:06d}.txt").read_text().split("\n")
            assert end == "" and len(line.split(" ")) == 16 and "  " not in line
            rgb, mask = (np.array(Image.open(folder / f"{sub}/{k:06d}.png")) for sub in ("rgb", "mask"))
            assert rgb.shape == (32, 32, 3) and rgb.dtype == np.uint8 and mask.any()
            assert rgb[mask > 0].max() <= 254 and (rgb[mask == 0] == 255).all()
        assert len(json.loads((folder / "transforms.json").read_text())["frames"]) == 3
        assert json.loads((folder / "factors.json").read_text())["kind"] in earphones.KINDS
        assert np.loadtxt(folder / "mesh_to_world.txt").shape == (16,)
    assert (photos / "procedural/03261776/train_00000/models/model_normalized.obj").is_file()
    assert (photos / "earphones_train.png").is_file()


def test_reruns_are_byte_identical_and_resume_by_object(photos, tmp_path, capsys):
    stage.main(["--out", str(tmp_path), *TINY, "--transforms", "--workers", "2"])
    whole = files_of(photos)
    assert files_of(tmp_path) == whole
    # An interruption leaves an object under its temporary name, which no reader takes for an object
    (tmp_path / "earphones_train/train_00001").rename(tmp_path / "earphones_train/.train_00001.tmp")
    (tmp_path / "earphones_train/.train_00001.tmp/rgb/000002.png").unlink()
    assert load_photos(tmp_path / "earphones_train", 32)[-1] == ["train_00000"]
    stage.main(["--out", str(tmp_path), *TINY, "--transforms"])
    assert files_of(tmp_path) == whole
    assert "found 3 models: 2 were rendered already, 1 now, 0 skipped" in capsys.readouterr().out


def test_ctrl_c_stops_between_objects_and_the_same_command_goes_on(photos, tmp_path):
    command = [sys.executable, "render_shapenet.py", "--out", str(tmp_path), *TINY,
               "--objects", "400", "--workers", "2"]
    (tmp_path / "earphones_train.png").touch()                      # that of an earlier run
    process = subprocess.Popen(command, cwd=HERE.parent, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / "earphones_train/train_00001").is_dir() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=30)
    assert process.returncode == 1 and "Traceback" not in message
    assert "stopped by SIGINT" in message and "the same command goes on" in message
    names = load_photos(tmp_path / "earphones_train", 32)[-1]
    assert 2 <= len(names) < 400
    assert not (tmp_path / "earphones_train.png").exists()       # by which stage 1 sees that it was stopped
    assert not list(tmp_path.rglob(".*.tmp"))


def test_the_recipe_is_kept(photos, tmp_path):
    with pytest.raises(UserError, match=r"--views 2, not 3.*--fresh"):
        stage.main(["--out", str(photos), *TINY, "--views", "3"])
    (tmp_path / "earphones_train/mine").mkdir(parents=True)
    with pytest.raises(UserError, match="is there, but no earphones.json"):
        stage.main(["--out", str(tmp_path), *TINY])
    assert (tmp_path / "earphones_train/mine").is_dir()
    (tmp_path / "strange/procedural").mkdir(parents=True)
    with pytest.raises(UserError, match="procedural is there, but no earphones.json"):
        stage.main(["--out", str(tmp_path / "strange"), *TINY, "--fresh"])
    assert (tmp_path / "strange/procedural").is_dir()


def test_two_runs_do_not_share_a_folder(photos):
    from common import Run
    held = Run(photos, "other", stage.Config(), (), "earphones.json.other", stale=())
    with pytest.raises(UserError, match="another run is writing"):
        Run(photos, "other", stage.Config(), (), "earphones.json.other", stale=())
    held.lock.close()


def test_cables_come_with_thin_and_fresh(tmp_path):
    faces = []
    for more in ([], ["--thin", "--fresh"]):
        stage.main(["--out", str(tmp_path), *TINY, "--objects", "1", "--test_objects", "0", *more])
        model = tmp_path / "procedural/03261776/train_00000/models/model_normalized.obj"
        faces.append(len(load_obj(model).faces))
    assert faces[1] > faces[0]


def test_transforms_for_photos_that_are_there(tmp_path):
    for more in ([], ["--transforms"]):
        stage.main(["--out", str(tmp_path), *TINY, "--objects", "1", "--test_objects", "0", *more])
    assert (tmp_path / "earphones_train/train_00000/transforms.json").is_file()


def test_fresh_starts_over(tmp_path):
    stage.main(["--out", str(tmp_path), *TINY, "--objects", "1"])
    stage.main(["--out", str(tmp_path), *TINY, "--objects", "1", "--views", "1", "--fresh"])
    assert load_photos(tmp_path / "earphones_train", 32)[0].shape[:2] == (1, 2)


@pytest.mark.parametrize("arguments, message", [
    (["--sise", "3"], "--sise"),
    (["--view", "3"], "--view"),
    (["--views", "many"], "--views"),
    (["--renderer", "opengl"], "--renderer"),
    (["--views", "0"], "--views"),
    (["--shapenet", "/nowhere"], "/nowhere"),
    (["--device", "cuda:7"], "cuda"),
    (["--device", "meta"], "meta"),
    (["--seed", "-1"], "--seed"),
    (["--test_objects", "-1"], "--test_objects"),
    (["--max_elevation", "95"], "--max_elevation"),
    (["--max_elevation", "nan"], "--max_elevation"),
    (["--synset", "../x"], "--synset"),
    (["--synset", "03001627"], "goes with --shapenet"),
    (["--holdout", "3"], "--holdout")])
def test_flags_are_checked_by_name(arguments, message, tmp_path):
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=message):
        stage.main(["--out", str(tmp_path), *arguments])


def test_pytorch3d_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch3d.renderer", None)       # as if it were not installed
    one = ["--out", str(tmp_path), *TINY, "--objects", "1", "--test_objects", "0"]
    stage.main(one)
    for more in ([], ["--fresh"]):                       # nothing is deleted, and the flag is not remembered
        with pytest.raises(UserError, match="requirements-pytorch3d.txt.*the default renderer needs nothing"):
            stage.main([*one, *more, "--renderer", "pytorch3d"])
    assert (tmp_path / "earphones_train/train_00000").is_dir()
    stage.main(one)


def test_an_output_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        stage.main(["--out", str(tmp_path / "file"), *TINY])


# ---- ShapeNet ----

@pytest.fixture
def shapenet(tmp_path):
    """Four models and a broken one, as releases 1 and 2 lay them out."""
    source = HERE / "golden/ShapeNetCore.v2/03261776/golden_uv_sphere"
    for k in range(4):
        shutil.copytree(source, tmp_path / f"v2/ShapeNetCore.v2/03261776/m{k}")
        flat = tmp_path / f"v1/03261776/m{k}"
        shutil.copytree(source / "images", flat / "images")
        shutil.copy(source / "models/model_normalized.mtl", flat)
        shutil.copy(source / "models/model_normalized.obj", flat / "model.obj")
    (tmp_path / "v2/ShapeNetCore.v2/03261776/broken/models").mkdir(parents=True)
    (tmp_path / "v2/ShapeNetCore.v2/03261776/broken/models/model_normalized.obj").write_text("no model\n")
    (tmp_path / "v2/ShapeNetCore.v2/taxonomy.json").write_text("[]")
    return tmp_path


@pytest.mark.parametrize("where, found", [
    ("v2", 5),
    ("v2/ShapeNetCore.v2", 5),
    ("v2/ShapeNetCore.v2/03261776", 5),
    ("v1", 4),
    ("v1/03261776", 4)])
def test_shapenet_is_found_and_a_broken_model_skipped(shapenet, where, found, capsys):
    out = shapenet / "out"
    stage.main(["--out", str(out), "--shapenet", str(shapenet / where), "--holdout", "1", *TINY[4:]])
    train, test = (load_photos(out / f"earphones_{split}", 32)[-1] for split in ("train", "test"))
    assert len(train) + len(test) == 4 and not set(train) & set(test)
    said = capsys.readouterr().out
    assert f"found {found} models" in said and f"{found - 4} skipped" in said
    assert found == 4 or "broken" in said.split("skipped")[-1] and "not an OBJ file" in said


def test_a_model_that_no_camera_sees_is_skipped_every_time(shapenet, capsys):
    (shapenet / "v1/03261776/line").mkdir()
    (shapenet / "v1/03261776/line/model.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    for _ in range(2):
        stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1"), *TINY[4:]])
        assert "1 skipped; " in (said := capsys.readouterr().out) and "too few cameras see it" in said
    assert len(load_photos(shapenet / "out/earphones_train", 32)[-1]) == 4


def test_the_synset_is_read_off_its_own_folder(shapenet):
    (shapenet / "v1/03261776").rename(shapenet / "v1/03001627")
    stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1/03001627"), *TINY[4:]])
    assert (shapenet / "out/chairs_train").is_dir()


def test_nothing_but_broken_models(shapenet):
    for path in (shapenet / "v1/03261776").glob("*/model.obj"):
        path.write_text("broken")
    with pytest.raises(UserError, match="no photos to train on were made"):
        stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1"), *TINY[4:]])


def test_names_that_are_not_utf_8(shapenet):
    os.rename(shapenet / "v1/03261776/m0", os.fsencode(shapenet / "v1/03261776") + b"/caf\xe9")
    stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1"), *TINY[4:]])
    assert len(list((shapenet / "out/earphones_train").iterdir())) == 4


def test_names_that_cannot_be_printed_are_left_out(one, capsys):
    """A checkpoint would keep them for hours, and then no stage could show them."""
    os.rename(one / "train_00000", os.fsencode(one) + b"/caf\xe9")
    shutil.copytree(one / "train_00001", one / "x\x1b[31m\ny")
    assert load_photos(one, 32)[-1] == ["train_00001"]
    said = capsys.readouterr().out
    assert "caf\\udce9 has a name that cannot be printed" in said and "x\\x1b[31m\\ny has a name" in said
    (one / "train_00001/factors.json").write_text('{"kind": "\\ud800\\u001b[31m"}')
    assert kinds_of(one, ["train_00001"]) == ["objects"]


def test_a_name_too_long_is_skipped(shapenet, capsys):
    os.rename(shapenet / "v1/03261776/m0", shapenet / "v1/03261776" / ("n" * 250))
    stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1"), *TINY[4:]])
    assert "1 skipped" in (said := capsys.readouterr().out) and "name is too long" in said
    assert len(list((shapenet / "out/earphones_train").iterdir())) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_left_out(shapenet, photos, tmp_path, capsys):
    (shapenet / "v1/03261776/m0").chmod(0)
    try:
        stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1"), *TINY[4:]])
    finally:
        (shapenet / "v1/03261776/m0").chmod(0o755)
    assert "m0 cannot be read" in capsys.readouterr().out
    assert len(list((shapenet / "out/earphones_train").iterdir())) == 3
    shutil.copytree(photos / "earphones_train", tmp_path / "copy")
    first = sorted((tmp_path / "copy").iterdir())[0]
    for closed in (first, first / "rgb", first / "mask", first / "pose"):
        for mode in (0, 0o400):                                # not to be entered; or to be listed, no more
            closed.chmod(mode)
            try:
                names = load_photos(tmp_path / "copy", 32)[-1]
            finally:
                closed.chmod(0o755)
            assert first.name not in names and f"{closed} cannot be read" in capsys.readouterr().out
    (tmp_path / "copy").chmod(0)
    try:
        with pytest.raises(UserError, match="cannot read .*copy"):
            load_photos(tmp_path / "copy", 32)
    finally:
        (tmp_path / "copy").chmod(0o755)


def test_no_model_is_both_trained_on_and_held_out(shapenet):
    """More models were unpacked later, so the order of their names holds out others."""
    synset, out = shapenet / "v1/03261776", ["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v1")]
    stage.main([*out, "--holdout", "1", *TINY[4:]])
    first = next((shapenet / "out/earphones_test").iterdir()).name
    name = next(f"m{k}" for k in range(100) if zlib.crc32(f"m{k}".encode()) < zlib.crc32(first.encode()))
    shutil.copytree(next(path for path in synset.iterdir() if path.is_dir()), synset / name)
    with pytest.raises(UserError, match=f"earphones_test/{first} is there.*--fresh"):
        stage.main([*out, "--holdout", "1", *TINY[4:]])
    stage.main([*out, "--holdout", "1", *TINY[4:], "--fresh"])
    assert [path.name for path in (shapenet / "out/earphones_test").iterdir()] == [name]


def test_want_of_memory_names_the_callers_knobs():
    """Stage 1 calls stage 0, whose knobs are not what the user has to change"""
    def main():
        parse_config(autodecoder.Config, argv=["--rays", "9000"])
        parse_config(stage.Config, argv=[])
        raise MemoryError
    with pytest.raises(UserError, match="the largest knobs are --rays 9000, --steps 6000"):
        command(main)


def test_shapenet_errors(shapenet):
    with pytest.raises(UserError, match="holds no models of synset 03001627"):
        stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v2"),
                    "--synset", "03001627"])
    with pytest.raises(UserError, match="--holdout 5"):
        stage.main(["--out", str(shapenet / "out"), "--shapenet", str(shapenet / "v2"), "--holdout", "5"])


# ---- photos, read ----

@pytest.fixture
def one(photos, tmp_path):
    shutil.copytree(photos / "earphones_train", tmp_path / "data")
    return tmp_path / "data"


def test_photos_come_back(photos):
    images, masks, poses, intrinsics, names = load_photos(photos / "earphones_train", 32)
    assert images.shape == (2, 3, 32, 32, 3) and masks.shape == (2, 3, 32, 32)
    assert images.dtype == masks.dtype == torch.uint8
    assert poses.shape == (2, 3, 4, 4) and names == ["train_00000", "train_00001"]
    assert np.array_equal(images[1, 2], Image.open(photos / "earphones_train/train_00001/rgb/000002.png"))
    assert intrinsics[0].tolist() == [[32.8125, 0, 16], [0, 32.8125, 16], [0, 0, 1]]
    small = load_photos(photos / "earphones_train", 16)
    assert small[3][0].tolist() == [[16.40625, 0, 8], [0, 16.40625, 8], [0, 0, 1]]
    boxes = images.view(2, 3, 16, 2, 16, 2, 3).float().mean((3, 5))
    assert (small[0] - boxes).abs().max() <= 1                                      # box-filtered, not picked


def test_foreign_photos(one):
    """As SRN's own: poses on one line or four, no masks, hidden files beside; RGBA from
    elsewhere, composited on white."""
    for folder in one.iterdir():
        shutil.rmtree(folder / "mask")
        (folder / "rgb/.DS_Store").write_text("x")
        pose = folder / "pose/000000.txt"
        words = pose.read_text().split()
        pose.write_text("\n".join(" ".join(words[4 * k:4 * k + 4]) for k in range(4)) + "\n")
        # Of another size than the photos
        (folder / "intrinsics.txt").write_text("131.25 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n")
    (one / ".hidden").mkdir()
    images, masks, poses, intrinsics, _ = load_photos(one, 32)
    assert masks is None and intrinsics[0, 0, 0] == 32.8125
    assert torch.equal(poses[0, 0, 3], torch.tensor([0.0, 0, 0, 1]))
    for path in one.glob("*/rgb/*.png"):
        rgb = np.array(Image.open(path))
        Image.fromarray(np.dstack([rgb, np.full((32, 32), 51, np.uint8)])).save(path)
    lighter, masks, *_ = load_photos(one, 32)
    assert (masks == 51).all() and (lighter.float() - (204 + images * 0.2)).abs().max() <= 1


def test_an_opaque_alpha_channel_is_no_mask(one):
    before = load_photos(one, 32)[0]
    for folder in one.iterdir():
        shutil.rmtree(folder / "mask")
        for path in (folder / "rgb").iterdir():
            Image.open(path).convert("RGBA").save(path)
    images, masks, *_ = load_photos(one, 32)
    assert masks is None and torch.equal(images, before)


def test_16_bit_greys_keep_their_values(one):
    before = load_photos(one, 32)[1]
    for path in one.glob("*/mask/*.png"):
        grey = np.array(Image.open(path)).astype(np.uint16) * 257
        Image.fromarray(grey).save(path)
    assert torch.equal(load_photos(one, 32)[1], before)


def test_a_pipe_in_place_of_a_file_is_refused(one):
    (one / "train_00001/pose/000001.txt").unlink()
    os.mkfifo(one / "train_00001/pose/000001.txt")
    with pytest.raises(UserError, match="no small text file"):
        load_photos(one, 32)


def spoil(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)


IDENTITY = "1 0 0 0 0 1 0 0 0 0 1 {} 0 0 0 1"         # looks along +Z: to see the cube it must stand below it


@pytest.mark.parametrize("file, content, message", [
    ("pose/000001.txt", "1 2 3", "has 3 numbers"),
    ("pose/000001.txt", "", "has 0 numbers"),
    ("pose/000001.txt", "a " * 16, "cannot read"),
    ("pose/000001.txt", IDENTITY.format("nan"), "not finite"),
    ("pose/000001.txt", IDENTITY.format("-0.2"), "inside the cube"),
    ("pose/000001.txt", IDENTITY.format("-2").replace("1 0 0", "2 0 0", 1), "is no camera"),
    ("pose/000001.txt", IDENTITY.format("-2").replace("1 0 0", "-1 0 0", 1), "is no camera"),
    ("pose/000001.txt", IDENTITY.format("-2")[:-1] + "3", "is no camera"),
    ("pose/000001.txt", IDENTITY.format("1e300"), "absurdly large"),
    ("pose/000001.txt", IDENTITY.format("2"), "looks away.*OpenGL"),
    ("intrinsics.txt", "32 0 16\n0 32 16\n0 0 1\n32 32", "wanted"),
    ("intrinsics.txt", "1e300 16 16 0.\n0. 0. 0.\n1.\n32 32", "absurdly large"),
    ("intrinsics.txt", "", "cannot read|wanted"),
    ("intrinsics.txt", "5 5\n0\n1\n32 32", "wanted"),
    ("intrinsics.txt", "32 16 16 0.\n0. 0. 0.\n1.\n32 64", "wanted"),
    ("rgb/000001.png", b"\x89PNG", "not a picture"),
    ("rgb/000001.png", b"", "not a picture"),
    ("mask/000002.png", b"no", "not a picture"),
    ("rgb/000009.png", b"", "4 photos .* 3 cameras")])
def test_bad_photos_are_one_sentence(one, file, content, message):
    spoil(one / "train_00001" / file, content)
    with pytest.raises(UserError, match=message) as error:
        load_photos(one, 32)
    assert "train_00001" in str(error.value) and "\n" not in str(error.value)


def test_wrong_folders(one, tmp_path):
    with pytest.raises(UserError, match="Run: python render_shapenet.py|run: python render_shapenet.py"):
        load_photos(tmp_path / "gone", 32)
    with pytest.raises(UserError, match="is a single object"):
        load_photos(one / "train_00000", 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no photos"):
        load_photos(tmp_path / "empty", 32)
    Image.new("RGB", (32, 16)).save(one / "train_00000/rgb/000000.png")
    with pytest.raises(UserError, match="32 x 16: square"):
        load_photos(one, 32)


def test_photos_of_several_sizes(one):
    Image.new("RGB", (48, 48)).save(one / "train_00000/rgb/000001.png")
    with pytest.raises(UserError, match="000001.png is 48 x 48.*32"):
        load_photos(one, 32)


    for path in (one / "train_00000/rgb").iterdir():
        Image.new("RGB", (48, 48)).save(path)
    with pytest.raises(UserError,
                       match="train_00001 has 3 photos of 32 x 32 and .*train_00000 has 3 of 48 x 48"):
        load_photos(one, 32)


def test_unequal_numbers_of_photos(one):
    for sub, suffix in (("rgb", "png"), ("mask", "png"), ("pose", "txt")):
        (one / f"train_00000/{sub}/000002.{suffix}").unlink()
    with pytest.raises(UserError, match="has 3 photos .* has 2"):
        load_photos(one, 32)

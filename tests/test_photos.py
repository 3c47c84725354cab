"""Photos from elsewhere: brought into our layout, and checked where they are read."""
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import render_shapenet
from common import UserError, camera_to_world_at
from shapes import convert
from shapes.meshes import load_obj
from shapes.packed import read_photos
from shapes.photos import kinds_of, load_photos, read_intrinsics, read_photo, write_transforms
from shapes.rasterizer import rasterize, to_world

ROOT = Path(__file__).parent.parent
OBJ = ROOT / "tests/golden/ShapeNetCore.v2/03261776/golden_headphone/models/model_normalized.obj"
W, H, FX, FY, CX, CY = 120, 96, 110.0, 112.0, 62.0, 45.0        # of the photos that "people" took
OPENGL = np.diag([1.0, -1, -1, 1])


def spun(axis, degrees):
    turn = np.eye(4)
    i, j = {"x": (1, 2), "z": (0, 1)}[axis]
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    turn[i, i], turn[i, j], turn[j, i], turn[j, j] = c, -s, s, c
    return turn


@pytest.fixture(scope="module")
def scene():
    """A mesh, level cameras around it that do not look at its middle, photos (RGBA), and where all that is in
    a scene of another size, place and turn"""
    mesh, generator, poses, photos = to_world(load_obj(OBJ))[0], np.random.default_rng(2), [], []
    K = torch.tensor([[FX, 0, CX], [0, FY, CY], [0, 0, 1]], dtype=torch.float64)
    for k in range(14):
        pose = camera_to_world_at(137.5 * k, generator.uniform(-60, 70), generator.uniform(1.5, 2)).numpy()
        aside, below = (spun(axis, generator.uniform(-4, 4))[:3, :3] for axis in "zx")
        pose[:3, :3] = aside @ pose[:3, :3] @ below
        rgb, coverage, _ = rasterize(mesh, pose, K, W, 2)
        ink = (1 - rgb) / coverage.clamp(min=1e-6)[..., None]                # undo the white: straight alpha
        photo = torch.cat([1 - ink, coverage[..., None]], -1)[:H]
        poses.append(pose)
        photos.append(Image.fromarray((photo * 255).round().byte().numpy()))
    similarity = np.diag([7.3, 7.3, 7.3, 1.0]) @ spun("z", 40)
    similarity[:3, 3] = 5, -3, 11
    return mesh, np.array(poses), photos, similarity


def placed(poses, similarity):
    """The cameras of a scene, after a similarity of its world"""
    moved = similarity @ poses
    moved[:, :3, :3] /= np.linalg.det(similarity[:3, :3]) ** (1 / 3)
    return moved


def write_nerf(folder, poses, photos, frame={}, **shared):
    """transforms.json: OpenGL's axes"""
    (folder / "images").mkdir(parents=True)
    frames = []
    for k, (pose, photo) in enumerate(zip(poses, photos)):
        photo.save(folder / f"images/{k}.png")
        matrix = (pose @ OPENGL).tolist()
        frames.append({"file_path": f"./images/{k}.png", "transform_matrix": matrix, **frame})
    (folder / "transforms.json").write_text(json.dumps({**shared, "frames": frames}))
    return folder


INTRINSICS = dict(fl_x=FX, fl_y=FY, cx=CX, cy=CY, w=W, h=H)


def quaternion(R):
    """By the largest diagonal sum, w x y z"""
    w, x, y, z = (math.sqrt(max(0, 1 + s)) / 2 for s in (
        R[0, 0] + R[1, 1] + R[2, 2], R[0, 0] - R[1, 1] - R[2, 2], R[1, 1] - R[0, 0] - R[2, 2],
        R[2, 2] - R[0, 0] - R[1, 1]))
    return [w, math.copysign(x, R[2, 1] - R[1, 2]), math.copysign(y, R[0, 2] - R[2, 0]),
            math.copysign(z, R[1, 0] - R[0, 1])]


def write_colmap(folder, poses, photos, binary, kind="PINHOLE", number=1, parameters=(FX, FY, CX, CY)):
    model = folder / "sparse/0"
    model.mkdir(parents=True)
    (folder / "images").mkdir()
    text, data = "# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME\n", struct.pack("<Q", len(poses))
    for k, (pose, photo) in enumerate(zip(poses, photos)):
        photo.save(folder / f"images/photo {k}.png")
        q, t = quaternion(pose[:3, :3].T), -pose[:3, :3].T @ pose[:3, 3]
        points = "" if k % 2 else "1.5 2.5 -1 3.5 4.5 7"
        text += f"{k + 1} {' '.join(map(repr, map(float, [*q, *t])))} 9 photo {k}.jpg\n{points}\n"
        data += struct.pack("<I7di", k + 1, *q, *t, 9) + f"photo {k}.jpg".encode() + b"\0"
        data += struct.pack("<Q", 2 - k % 2) + struct.pack("<ddq", 1.5, 2.5, -1) * (2 - k % 2)
    if binary:
        (model / "images.bin").write_bytes(data)
        (model / "cameras.bin").write_bytes(struct.pack("<QiiQQ", 1, 9, number, W, H)
                                            + struct.pack(f"<{len(parameters)}d", *parameters))
    else:
        (model / "images.txt").write_text(text)
        lens = " ".join(map(repr, parameters))
        (model / "cameras.txt").write_text(f"# Camera list\n9 {kind} {W} {H} {lens}\n")
    return folder


def run(source, out, *flags):
    convert.main([str(source), str(out), "--size", "64", *flags])
    return out / source.name


# ---- converted ----

@pytest.mark.parametrize("kind", ["shared", "frames", "angle", "text", "binary"])
def test_a_scene_comes_back(scene, tmp_path, capsys, kind):
    """Cameras, object and photos agree with the mesh that was photographed, up to a similarity."""
    mesh, poses, photos, similarity = scene
    if kind in ("text", "binary"):                                # COLMAP's world lies askew too
        similarity = spun("x", 100) @ similarity
    there, source = placed(poses, similarity), tmp_path / "scenes/cup 1"
    if kind == "shared":
        write_nerf(source, there, photos, **INTRINSICS)
    elif kind == "frames":
        write_nerf(source, there, photos, INTRINSICS, w=1, h=1, fl_x=3, cx=0)
    elif kind == "angle":                                         # w, h, and the middle follow from the photo
        moved = [Image.new("RGBA", (2 * round(CX), 2 * round(CY))) for _ in photos]
        for new, photo in zip(moved, photos):
            new.paste(photo)
        write_nerf(source, there, moved, fl_y=FY, camera_angle_x=2 * math.atan(CX / FX))
    else:
        write_colmap(source, there, photos, kind == "binary")
    folder = run(source, tmp_path / "out")
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and "14 of 14 photos, masks from their alpha" in said and "Next:" in said
    assert Image.open(tmp_path / "out/cup 1.png").width > 500

    # The whole way from the mesh into the new cube is a similarity about the vertical
    way = np.loadtxt(folder / "source_to_world.txt").reshape(4, 4) @ similarity
    scale = np.linalg.det(way[:3, :3]) ** (1 / 3)
    assert np.abs(way[:3, :3] @ way[:3, :3].T - scale ** 2 * np.eye(3)).max() < 1e-5
    assert np.abs(way[:3, :3] @ [0, 0, 1] - [0, 0, scale]).max() < 1e-5
    corners = mesh.vertices[mesh.faces.unique()].numpy() @ way[:3, :3].T + way[:3, 3]
    assert 0.93 < np.linalg.norm(corners.max(0) - corners.min(0)) <= 1 and np.abs(corners).max() <= 0.5

    # Each camera stands where it stood, and looks at the middle
    read = read_photos(folder.parent, 64)
    assert read.names == ["cup 1"] and read.has_masks and len(read.rgb[0]) == 14
    expected = placed(poses, way)
    written = read.pose[0].double().numpy()
    apart = np.abs(written[:, None, :3, 3] - expected[None, :, :3, 3]).max(-1)                # (14,14)
    assert sorted(apart.argmin(1)) == list(range(14)) and apart.min(1).max() < 1e-5
    assert np.abs(written[:, :3, 2] + written[:, :3, 3] / np.linalg.norm(written[:, :3, 3], axis=1)[:, None]
                  ).max() < 1e-5

    # The same point of the world is at the same place of the photo: the mesh, drawn anew by the new cameras
    new = torch.from_numpy(mesh.vertices.numpy() @ way[:3, :3].T + way[:3, 3])
    axis = torch.arange(64)
    for k in range(14):
        rgb, coverage, _ = rasterize(replace(mesh, vertices=new), written[k], read.intrinsics[0], 64, 2)
        ours = read.mask[0, k].float() / 255
        overlap = torch.minimum(ours, coverage).sum() / torch.maximum(ours, coverage).sum()
        assert overlap > 0.9 and (read.rgb[0, k] / 255 - rgb).abs().mean() < 0.02, overlap
        middles = [(some[..., None] * torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
                    ).sum((0, 1)) / some.sum() for some in (ours, coverage)]
        assert (middles[0] - middles[1]).abs().max() < 0.15                       # of a pixel
        rows, columns = (coverage > 0).nonzero(as_tuple=True)
        assert 0 < min(rows.min(), columns.min()) and max(rows.max(), columns.max()) < 63
        assert (read.rgb[0, k][read.mask[0, k] == 0] == 255).all()
    seen = read.mask[0].amax(0) > 0                               # cropped to the object: it fills the photos
    assert 0.75 < max(seen.any(d).sum().item() for d in (0, 1)) / 64 < 0.95


def test_photos_without_masks(scene, tmp_path, capsys):
    """JPEGs on white, half as large as their cameras say: no masks are claimed, the background becomes white.
    On black they are refused."""
    _, poses, photos, _ = scene
    names = []
    for folder, colour in (("white", "white"), ("black", "black")):
        source = write_nerf(tmp_path / folder, poses, photos, **INTRINSICS)
        for path in (source / "images").iterdir():
            image = Image.new("RGBA", (W, H), colour)
            image.alpha_composite(Image.open(path))
            path.unlink()
            image.convert("RGB").resize((W // 2, H // 2), Image.Resampling.BOX).save(path, format="JPEG")
    read = read_photos(run(tmp_path / "white", tmp_path / "out").parent, 64)
    assert not read.has_masks and "no masks: what is white is the background" in capsys.readouterr().out
    assert ((read.rgb == 255).all(-1).double().mean() > 0.5) and (read.rgb[:, :, [0, -1]] == 255).all()
    with pytest.raises(UserError, match=r"black/images/\d+.png: its border has the colour \d .*alpha"):
        run(tmp_path / "black", tmp_path / "out")
    assert not (tmp_path / "out/black").exists()


def test_a_jpegs_background_is_not_the_object(scene, tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:44, 16:48] = 200, 60, 30
    Image.fromarray(pixels).save(path, quality=85)
    assert (np.asarray(Image.open(path))[:16] < 255).any() or (np.asarray(Image.open(path))[44:48] < 255).any()
    seen = (read_photo(path, 64)[0] < 255).any(-1)
    assert 24 * 32 <= seen.sum() <= 26 * 34 and seen[20:44, 16:48].all()


def test_photos_that_cut_the_object_are_left_out(scene, tmp_path, capsys):
    _, poses, photos, _ = scene
    source = write_nerf(tmp_path / "s", poses, photos, **INTRINSICS)
    transforms = json.loads((source / "transforms.json").read_text())
    Image.open(source / "images/3.png").crop((0, 0, W // 2, H)).save(source / "images/3.png")
    transforms["frames"][3]["w"] = W // 2
    (source / "transforms.json").write_text(json.dumps(transforms))
    with pytest.raises(UserError, match="13 photos can be used, and --views 14 are wanted"):
        run(source, tmp_path / "out", "--views", "14")
    assert not list((tmp_path).glob("out/s"))
    folder = run(source, tmp_path / "out")
    assert "13 of 14 photos (the others cut" in capsys.readouterr().out
    assert len(list(folder.glob("rgb/*"))) == 13


def test_a_bent_lens(scene, tmp_path):
    """COLMAP's SIMPLE_RADIAL: a point at x, y is seen at f x (1 + k r^2) + cx.  Kinds that are not known are
    refused by name, in both of its formats."""
    _, poses, photos, _ = scene
    k1 = -0.08
    source = write_colmap(tmp_path / "s", poses, photos, False, "SIMPLE_RADIAL", 2, (FX, CX, CY, k1))
    view = convert.read_scene(convert.find_model(source), source)[5]
    x, y = 0.21, -0.17
    point = torch.from_numpy(poses[5][:3, 3] + poses[5][:3, :3] @ [2 * x, 2 * y, 2])
    place, framed = convert.project(point, view)
    r2 = x * x + y * y
    wanted = [(FX * x * (1 + k1 * r2) + CX) / W, (FX * y * (1 + k1 * r2) + CY) / H]
    assert np.abs(place.numpy() - wanted).max() < 1e-9 and framed
    for binary in (False, True):
        source = write_colmap(tmp_path / f"fish{binary}", poses, photos, binary, "OPENCV_FISHEYE", 5,
                              (FX, FY, CX, CY, 0, 0, 0, 0))
        with pytest.raises(UserError, match="kind (OPENCV_FISHEYE|5) are not read.*image_undistorter"):
            run(source, tmp_path / "out")


def set_frames(file, **values):
    transforms = json.loads(file.read_text())
    for key, value in values.items():
        place = transforms["frames"][2] if key in ("file_path", "transform_matrix") else transforms
        place.pop(key) if value is None else place.update({key: value})
    file.write_text(json.dumps(transforms))


@pytest.mark.parametrize("spoil, message", [
    (lambda s: (s / "transforms.json").write_text("{"), "transforms.json cannot be read"),
    (lambda s: (s / "transforms.json").write_text("[" * 20000), "transforms.json cannot be read"),
    (lambda s: (s / "transforms.json").write_bytes(b"\xff\0"), "transforms.json cannot be read"),
    (lambda s: (s / "transforms.json").unlink(), "holds no scene"),
    (lambda s: set_frames(s / "transforms.json", frames=[]), "names no photos"),
    (lambda s: set_frames(s / "transforms.json", frames=3), "cannot be read"),
    (lambda s: set_frames(s / "transforms.json", fl_x=None), "neither fl_x nor camera_angle_x"),
    (lambda s: set_frames(s / "transforms.json", fl_x=None, camera_angle_x=-5), "between 0 and pi"),
    (lambda s: set_frames(s / "transforms.json", fl_x=float("nan")), "makes no sense"),
    (lambda s: set_frames(s / "transforms.json", fl_x=1e10), "makes no sense"),
    (lambda s: set_frames(s / "transforms.json", w=float("inf")), "cannot be read"),
    (lambda s: set_frames(s / "transforms.json", is_fisheye=True), "fisheye"),
    (lambda s: set_frames(s / "transforms.json", h=2 * H), "turned, or cropped"),
    (lambda s: set_frames(s / "transforms.json", transform_matrix=[[1, 2], [3]]), "cannot be read"),
    (lambda s: set_frames(s / "transforms.json", transform_matrix=np.eye(3).tolist()), "cannot be read"),
    (lambda s: set_frames(s / "transforms.json", transform_matrix=np.diag([2.0, 2, 2, 1]).tolist()),
     "2.png is no camera"),
    (lambda s: set_frames(s / "transforms.json", file_path="images/gone.png"), "gone.png is not there"),
    (lambda s: (s / "images/2.png").write_bytes(b"no"), "2.png is not a picture"),
    (lambda s: ((s / "images/2.png").unlink(), os.mkfifo(s / "images/2.png")), "2.png is no file")])
def test_broken_scenes_are_one_sentence(scene, tmp_path, spoil, message):
    _, poses, photos, _ = scene
    source = write_nerf(tmp_path / "s", poses, photos, **INTRINSICS)
    spoil(source)
    with pytest.raises(UserError, match=message) as error:
        run(source, tmp_path / "out")
    assert "\n" not in str(error.value) and not list(tmp_path.glob("out/*"))


def test_cameras_that_cannot_be(scene, tmp_path):
    """OpenCV's axes in transforms.json; one direction alone; COLMAP files that end too early"""
    _, poses, photos, _ = scene
    with pytest.raises(UserError, match="look away from the object.*OpenGL"):
        run(write_nerf(tmp_path / "opencv", poses @ OPENGL, photos, **INTRINSICS), tmp_path / "out")
    with pytest.raises(UserError, match="one direction"):
        run(write_nerf(tmp_path / "one", poses[[0] * 3], photos[:3], **INTRINSICS), tmp_path / "out")
    with pytest.raises(UserError, match="agree on no point"):
        run(write_nerf(tmp_path / "mixed", poses, photos[3:] + photos[:3], **INTRINSICS), tmp_path / "out")
    with pytest.raises(UserError, match="stand at one place"):
        turned = poses.copy()
        turned[:, :3, 3] = 0
        run(write_nerf(tmp_path / "still", turned, photos, **INTRINSICS), tmp_path / "out")
    for binary in (False, True):
        source = write_colmap(tmp_path / f"cut{binary}", poses, photos, binary)
        file = convert.find_model(source)
        file.write_bytes(file.read_bytes()[:-60])
        with pytest.raises(UserError, match="images.* (cannot be read|not there)"):
            run(source, tmp_path / "out")


@pytest.mark.parametrize("text, message", [
    (None, "holds no scene"), ("", "names camera 9"), ("8 SIMPLE_PINHOLE 9 9 9 4 4\n", "names camera 9"),
    (f"9 OPENCV {W} {H} 90 90 20 20\n", "kind OPENCV has 8 numbers")])
def test_the_file_of_cameras_is_the_one_that_is_blamed(scene, tmp_path, text, message):
    _, poses, photos, _ = scene
    source = write_colmap(tmp_path / "s", poses, photos, binary=False)
    file = convert.find_model(source).with_name("cameras.txt")
    file.unlink()
    file.write_text(text) if text is not None else os.mkfifo(file)
    with pytest.raises(UserError, match=message):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("text", ["", "1e-300 16 16 0.\n0. 0. 0.\n1.\n32 32\n", "16 .2 .2\n\n\n.5 .5\n"])
def test_intrinsics_of_no_camera_are_one_sentence(tmp_path, text):
    (tmp_path / "intrinsics.txt").write_text(text)
    with pytest.raises(UserError, match="it has no line 4|'f cx cy 0.' on line 1"):
        read_intrinsics(tmp_path / "intrinsics.txt", 32)


def test_several_scenes(scene, tmp_path, capsys):
    """A broken one stops no other; an object that is there already stays; wrong words are one sentence."""
    _, poses, photos, _ = scene
    for name in "ab":
        write_nerf(tmp_path / "scenes" / name, poses, photos, **INTRINSICS)
    (tmp_path / "scenes/b/transforms.json").write_text("{}")
    shutil.copytree(tmp_path / "scenes/a", tmp_path / "scenes/c")
    (tmp_path / "out/c").mkdir(parents=True)
    convert.main([str(tmp_path / "scenes"), str(tmp_path / "out"), "--size", "32", "--views", "9"])
    said = capsys.readouterr().out
    assert "left out: " in said and "b/transforms.json cannot be read" in said
    assert "out/c is there already" in said and "1 of 3 scenes converted, 1 were there" in said
    assert [len(list((tmp_path / "out/a" / sub).iterdir())) for sub in ("rgb", "mask", "pose")] == [9, 9, 9]
    assert not list((tmp_path / "out/c").iterdir())
    for words in ([], [str(tmp_path)], [str(tmp_path / "gone"), "x"], [str(tmp_path), str(tmp_path / "out")]):
        with pytest.raises(UserError, match="SRC DST is wanted|is no folder|holds no scene"):
            convert.main(words)


def test_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "shapes.photos", "convert", str(tmp_path), "out"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "holds no scene" in done.stderr and done.stderr.count("\n") == 1


# ---- read ----

@pytest.fixture
def earphones(data, tmp_path):
    shutil.copytree(data / "earphones_train", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("masks", [True, False])
def test_a_black_background_is_refused(earphones, masks):
    for path in (earphones / "train_00001/rgb").iterdir():
        photo = np.array(Image.open(path))
        photo[np.array(Image.open(path.parents[1] / "mask" / path.name)) == 0] = 0
        Image.fromarray(photo).save(path)
    if not masks:
        for folder in earphones.glob("train_*"):
            shutil.rmtree(folder / "mask")
    with pytest.raises(UserError, match="train_00001/rgb/000000.png: its border has the colour 0 0 0 "):
        read_photos(earphones, 32)


def test_cameras_too_far_away_are_refused(earphones):
    """All of them, or a single one; or one that looks past the object"""
    read_photos(earphones, 32)
    pose = earphones / "train_00002/pose/000003.txt"
    values = np.loadtxt(pose).reshape(4, 4)
    for change in (np.diag([1.0, 1, 1, 4]), spun("z", 25)):
        moved = values.copy()
        moved[:3, 3] *= change[3, 3]
        moved[:3, :3] = change[:3, :3] @ moved[:3, :3]
        pose.write_text(" ".join(map(str, moved.flatten())))
        with pytest.raises(UserError, match=r"train_00002/rgb/000003.png: \d+% of the .* look past"):
            read_photos(earphones, 32)


def test_photos_that_show_nothing_are_refused(earphones):
    for path in earphones.glob("train_00001/rgb/*"):
        Image.new("RGB", (32, 32), "white").save(path)
    for path in earphones.glob("train_00001/mask/*"):
        Image.new("L", (32, 32)).save(path)
    with pytest.raises(UserError, match="train_00001: the photos show no object: all masks are empty"):
        read_photos(earphones, 32)
    for folder in earphones.glob("*/mask"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="train_00001: the photos show no object: they are all white"):
        read_photos(earphones, 32)


BROKEN = {"broken": b"{", "list": b"[1]", "nothing": b"", "no kind": b"{}", "number": b'{"kind": 3}',
          "deep": b"[" * 20000, "binary": b"\xff\xfe\0", "long": b" " * 200_000 + b'{"kind": "x"}',
          "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_factors_are_an_unlabelled_object_and_said_once(earphones, how, capsys):
    for name in ("train_00000", "train_00002"):
        path = earphones / name / "factors.json"
        path.unlink()
        BROKEN[how](path) if callable(BROKEN[how]) else path.write_bytes(BROKEN[how])
    (earphones / "train_00001/factors.json").write_text('{"kind": "mug"}')
    for _ in range(2):
        assert kinds_of(earphones, [f"train_0000{k}" for k in range(3)]) == ["objects", "mug", "objects"]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "train_00000/factors.json, nor in 1 other" in said
    (earphones / "train_00000/factors.json").rename(earphones / "elsewhere")
    assert kinds_of(earphones, ["train_00000"]) == ["objects"] and not capsys.readouterr().out


@pytest.mark.parametrize("file", ["rgb/000001.png", "mask/000001.png", "pose/000001.txt", "intrinsics.txt"])
def test_special_files_are_not_opened(earphones, file):
    path = earphones / "train_00001" / file
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(UserError, match=f"{file} is no "):
            load_photos(earphones, 32)


# ---- written, and ShapeNet ----

def test_transforms_keep_the_held_out_photos_out(earphones):
    folder = earphones / "train_00000"                                       # 6 photos
    for held, train in ((2, 4), (0, 6), (8, 0)):
        write_transforms(folder, held)
        written = json.loads((folder / "transforms.json").read_text())
        files = [frame["file_path"] for frame in written["frames"]]
        assert written["train_filenames"] == files[:train]
        assert written["test_filenames"] == written["val_filenames"] == files[train:]


def test_render_writes_what_it_holds_out(tmp_path):
    render_shapenet.main(["--out", str(tmp_path), "--objects", "1", "--test_objects", "1", "--views", "2",
                          "--holdout_views", "1", "--size", "32", "--workers", "1", "--transforms"])
    written = json.loads((tmp_path / "earphones_train/train_00000/transforms.json").read_text())
    assert written["test_filenames"] == ["rgb/000002.png"]


def test_shapenet_names_the_synsets_that_are_there(tmp_path):
    for place in ("02958343", "ShapeNetCore.v2/03001627", "ShapeNetCore.v2/notes"):
        (tmp_path / "sn" / place).mkdir(parents=True)
    with pytest.raises(UserError, match="--synset 02958343 or 03001627.*there") as error:
        render_shapenet.main(["--out", str(tmp_path / "out"), "--shapenet", str(tmp_path / "sn")])
    assert "notes" not in str(error.value)
    for name in ("n" * 300, "a\0b"):
        with pytest.raises(UserError, match="no such folder|printable text is wanted"):
            render_shapenet.main(["--out", str(tmp_path / "out"), "--shapenet", str(tmp_path / name)])

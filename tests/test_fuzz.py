"""2,000 seeded mutations of OBJ, MTL, pose and intrinsics files: a valid result or one sentence
of ours, in bounded time."""
import random
import time

import torch
from PIL import Image

import render_shapenet as stage
from common import UserError, camera_to_world_at, intrinsics_at
from shapes.meshes import load_obj
from shapes.photos import load_photos

OBJ = b"""mtllib m.mtl
v -0.5 -0.5 0\nv 0.5 -0.5 0\nv 0.5 0.5 0\nv -0.5 0.5 0\nv 0 0 0.7
vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1
usemtl skin
f 1/1 2/2 3/3 4/4\nf 1/1/1 2/2/1 5/3/1
usemtl plain paint
f -4//1 -3//1 -1//1\nf 3 4 5\nf 4 1 \\\n 5
"""
MTL = (b"newmtl skin\nKd 0.8 0.5 .2\nmap_Kd -s 1 1 1 ../images/t.png\n"
       b"newmtl plain paint\nKd 1e-1 0.9 0.4\nTr 0.5\n")
POSE = (b"0.0 0.5 -0.8660254037844386 1.1258330249197703 1.0 0.0 0.0 0.0 "
        b"0.0 -0.8660254037844386 -0.5 0.65 0.0 0.0 0.0 1.0\n")
INTRINSICS = b"32.8 16. 16. 0.\n0. 0. 0.\n1.\n32 32\n"
TOKENS = [b"nan", b"inf", b"-1", b"0", b"1e400", b"1e29", b"-1e-320", b"99999999999999999999999",
          b"\\", b"\0", b"\n", b"\r", b" ", b"/", b"//", b"#", b"f ", b"v ", b"vt ", b"usemtl ", b"mtllib ",
          b"map_Kd ", b"newmtl ", b"../", b"/etc/passwd", b"\xff\xfe", b"\xef\xbb\xbf", b"-s", b"1_0",
          b"\xd9\xa3", b"f 1 2 3 4 5 1 2 3 4 5\n", b"f -1 -2 -3\n", b"v 1 2\n", b"A" * 5000]


def mutate(text, generator, times=(1, 1, 2, 5), longest=40):
    text = bytearray(text)
    for _ in range(generator.choice(times)):
        a, b = sorted(generator.randrange(len(text) + 1) for _ in range(2))
        b = min(b, a + longest)
        kind = generator.randrange(6)
        if kind == 0:
            text[a:b] = b""
        elif kind == 1:
            text[a:a] = text[a:b] * generator.randrange(1, 4)
        elif kind == 2:
            text[a:a] = generator.choice(TOKENS)
        elif kind == 3 and a < len(text):
            text[a] = generator.randrange(256)
        elif kind == 4:
            del text[a:]
        else:
            text[a:b] = generator.choice(TOKENS)
    return bytes(text)


def test_meshes(tmp_path):
    folder = tmp_path / "model"
    (folder / "models").mkdir(parents=True)
    (folder / "images").mkdir()
    Image.effect_noise((4, 4), 60).convert("RGB").save(folder / "images/t.png")
    generator, results = random.Random(0), {"valid": 0, "refused": 0}
    pose, K = camera_to_world_at(20, 30, 1.3), intrinsics_at(16, 131.25)
    for k in range(1400):
        obj, mtl = (mutate(OBJ, generator), MTL) if k % 4 else (OBJ, mutate(MTL, generator))
        (folder / "models/model_normalized.obj").write_bytes(obj)
        (folder / "models/m.mtl").write_bytes(mtl)
        began = time.monotonic()
        try:
            mesh, transform = stage.to_world(load_obj(folder / "models/model_normalized.obj"))
            rgb, coverage, depth = stage.rasterize(mesh, pose, K, 16)
            corners = mesh.vertices[mesh.faces]
            assert corners.isfinite().all() and corners.abs().max() <= 0.5 + 1e-6
            assert transform.isfinite().all()
            assert rgb.isfinite().all() and 0 <= rgb.min() and rgb.max() <= 1 and not depth.isnan().any()
            assert all(isinstance(note, str) and "\n" not in note for note in mesh.notes)
            results["valid"] += 1
        except UserError as error:
            text = str(error)
            assert ("model_normalized.obj" in text or "no extent" in text) and "\n" not in text, text
            results["refused"] += 1
        assert time.monotonic() - began < 5
    assert results["valid"] > 500 and results["refused"] > 20, results


def test_cameras(tmp_path):
    folder = tmp_path / "data/object"
    for sub in ("rgb", "pose"):
        (folder / sub).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "rgb/000000.png")
    generator, results = random.Random(1), {"valid": 0, "refused": 0}
    for k in range(600):
        (folder / "pose/000000.txt").write_bytes(mutate(POSE, generator, (1,), 2) if k % 2 else POSE)
        camera = INTRINSICS if k % 2 else mutate(INTRINSICS, generator, (1,), 2)
        (folder / "intrinsics.txt").write_bytes(camera)
        try:
            _, _, poses, intrinsics, _ = load_photos(tmp_path / "data", 32)
            rotation = poses[0, 0, :3, :3]
            assert (rotation @ rotation.T - torch.eye(3)).abs().max() < 2e-3 and torch.det(rotation) > 0
            assert poses.isfinite().all() and intrinsics.isfinite().all() and intrinsics[0, 0, 0] > 0
            results["valid"] += 1
        except UserError as error:
            assert "object" in str(error) and "\n" not in str(error), str(error)
            results["refused"] += 1
    assert min(results.values()) > 50, results

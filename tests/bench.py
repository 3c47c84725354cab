"""
How fast is it?  A benchmark, not a test: it asserts nothing, and a noisy machine makes its
numbers worse, never better.

    python tests/bench.py           the rasteriser, on PyTorch3D's golden headphone and spheres of many faces
    python tests/bench.py --data    all of the default data too, from nothing to photos, in a temporary folder

Times are the best of many (milliseconds): the machine's noise only ever adds.
"""
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import render_shapenet as stage
from meshes import Mesh, load_obj


def best(call, times=30):
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return min(seconds) * 1e3


def sphere(n):
    """2 n^2 faces of one colour."""
    theta, phi = torch.linspace(0, math.pi, n + 1), torch.linspace(0, 2 * math.pi, n + 1)
    theta, phi = torch.meshgrid(theta, phi, indexing="ij")
    x, y, z = theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()
    vertices = 0.45 * torch.stack([x, y, z], -1).view(-1, 3).double()
    i = (torch.arange(n)[:, None] * (n + 1) + torch.arange(n)).view(-1)
    faces = torch.cat([torch.stack([i, i + n + 1, i + 1], 1), torch.stack([i + 1, i + n + 1, i + n + 2], 1)])
    one = torch.ones(1, dtype=torch.long)
    uvs = torch.zeros(len(faces), 3, 2, dtype=torch.float64)
    material = torch.zeros(len(faces), dtype=torch.long)
    texels = torch.full((1, 3), 99, dtype=torch.uint8)
    return Mesh(vertices, faces, uvs, material, texels, one - 1, torch.ones(1, 2, dtype=torch.long), one > 1)


def report(mesh, supersample, milliseconds):
    samples = f"{supersample}x{supersample} samples"
    print(f"rasterize {len(mesh.faces):>9,} faces, 128 px, {samples}   {milliseconds:7.1f} ms")


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    golden = Path(__file__).parent / "golden"
    headphone = load_obj(golden / "ShapeNetCore.v2/03261776/golden_headphone/models/model_normalized.obj")
    views = np.load(golden / "golden_headphone.npz")
    poses = stage.opencv_from_pytorch3d(views["R"], views["T"])
    pose, K = stage.camera_to_world_at(30, 20, 1.3), stage.intrinsics_at(128, 131.25)
    for supersample in (1, 2):
        each = [best(lambda: stage.rasterize(headphone, poses[k], views["K"][k], 128, supersample))
                for k in range(6)]
        report(headphone, supersample, sum(each) / 6)
    for n, times in ((224, 10), (708, 3)):
        mesh = sphere(n)
        report(mesh, 1, best(lambda: stage.rasterize(mesh, pose, K, 128), times))
    if "--data" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            stage.main(["--out", folder])
            print(f"python render_shapenet.py, all of it          {time.perf_counter() - began:7.1f} s")


if __name__ == "__main__":
    main()

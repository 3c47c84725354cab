"""
How fast is it?  A benchmark, not a test: it asserts nothing, and a noisy machine makes its
numbers worse, never better.

    python tests/bench.py           the rasteriser, on PyTorch3D's golden headphone and spheres of many faces
    python tests/bench.py --data    all of the default data too, from nothing to photos, in a temporary folder
    python tests/bench.py --render  the renderer, dense and skipping empty space, on a volume of 64^3 that
                                    is trained for it first, on one object of data/earphones_train
    python tests/bench.py --pytorch3d [picture.png]     ours and PyTorch3D in turns, where it is installed:
                                    the golden headphone, and a volume of 64^3, forward and backward
    python tests/bench.py --many    stage 1 on 256 and on 4,096 objects: start, step, peak memory
    python tests/bench.py --export [runs/autodecoder]   meshes: time, distance from the truth; and what
                                    the page's bytes lose, in dB

Times are the best of many (milliseconds): the machine's noise only ever adds.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import autodecoder
import render_shapenet as stage
from common import camera_to_world_at, grid, intrinsics_at, save_picture, to_bytes
from shapes.meshes import Mesh, load_obj
from shapes.packed import read_photos
from viewer import page
from viewer.isosurface import mesh_of
from volume_render import camera_rays, headphones, occupancy, render, voxel_field


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
    return grey_mesh(vertices, faces)


def grey_mesh(vertices, faces):
    one = torch.ones(1, dtype=torch.long)
    uvs = torch.zeros(len(faces), 3, 2, dtype=torch.float64)
    material = torch.zeros(len(faces), dtype=torch.long)
    texels = torch.full((1, 3), 99, dtype=torch.uint8)
    return Mesh(vertices, faces, uvs, material, texels, one - 1, torch.ones(1, 2, dtype=torch.long), one > 1)


def report(mesh, supersample, milliseconds):
    samples = f"{supersample}x{supersample} samples"
    print(f"rasterize {len(mesh.faces):>9,} faces, 128 px, {samples}   {milliseconds:7.1f} ms")


def render_rows():
    """128 x 128 rays of 64 samples through a trained 64^3 volume; of three views the mean"""
    with tempfile.TemporaryDirectory() as folder:
        autodecoder.main("--objects 1 --size 128 --channels 64 32 16 --steps 1000 --preview_every 1000 "
                         f"--rays 4096 --out {folder}".split())
        model, _ = autodecoder.load_autodecoder(folder)
    volume = model.volumes_of(model.codes[:1])
    K = intrinsics_at(128, 131.25).float()[None]
    times, worst_image, worst_gradient = [], math.inf, 1.0
    for azimuth, elevation in ((215, 25), (100, 0), (340, -30)):
        pose = camera_to_world_at(azimuth, elevation, 1.3).float()[None]
        origins, directions = camera_rays(pose, K, 128)

        def forward(skip, volume=volume):
            cells = occupancy(volume, model.field) if skip else None
            return render(volume, origins, directions, 64, model.field, occupied=cells)

        def backward(skip):
            leaf = volume.clone().requires_grad_()
            rgb, alpha, _ = forward(skip, leaf)
            return torch.autograd.grad(rgb.square().mean() + alpha.square().mean(), leaf)[0]

        with torch.no_grad():
            times.append([best(lambda: forward(skip)) for skip in (False, True)])
            error = (forward(False)[0] - forward(True)[0]).square().mean().item()
        times[-1] += [best(lambda: backward(skip)) for skip in (False, True)]
        gradients = [backward(skip).double().flatten() for skip in (False, True)]
        worst_image = min(worst_image, -10 * math.log10(error + 1e-20))
        worst_gradient = min(worst_gradient, torch.cosine_similarity(*gradients, 0).item())
    dense, skipping, dense_both, skipping_both = np.mean(times, 0)
    occupied = occupancy(volume, model.field).float().mean()
    print(f"render 64^3, {occupied:.1%} of it occupied, 128 px, 64 samples: equal to {worst_image:.0f} dB, "
          f"gradients to a cosine of {worst_gradient:.5f}")
    for what, a, b in (("forward", dense, skipping), ("with backward", dense_both, skipping_both)):
        print(f"{what:<14} {a:6.1f} ms dense, {b:5.1f} ms without empty space: {a / b:.1f}x")


def in_turns(calls, times):
    """The best of each call.  Calls take turns, so that a slow minute of the machine meets all of them"""
    return np.min([[best(call, 1) for call in calls] for _ in range(times)], 0)


def pytorch3d_rows(mesh, poses, Ks, picture):
    """Ours and PyTorch3D's in one run: six views of a mesh; 128 x 128 rays of 64 samples through a volume"""
    stage.pytorch3d()                                              # one sentence, if it is not there
    import pytorch3d
    from test_pytorch3d import by_pytorch3d
    print(f"PyTorch3D {pytorch3d.__version__}")
    draw = lambda k, renderer: stage.rasterize(mesh, poses[k], Ks[k], 128, 1, renderer)
    ours, its = ([torch.stack(some) for some in zip(*(draw(k, renderer) for k in range(6)))]
                 for renderer in ("torch", "pytorch3d"))
    both = (ours[1] > 0) & (its[1] > 0)
    masks, colours = (ours[1] == its[1]).float().mean(), (ours[0] - its[0]).abs().max() * 255
    print(f"rasterize {len(mesh.faces):,} faces, 128 px: masks equal at {masks:.2%} of the pixels, colours "
          f"within {colours:.2f}/255, depths within {(ours[2] - its[2])[both].abs().max():.1e}")
    a, b = np.mean([in_turns([lambda: draw(k, "torch"), lambda: draw(k, "pytorch3d")], 10)
                    for k in range(6)], 0)
    print(f"rasterize      ours {a:6.1f} ms, PyTorch3D {b:6.1f} ms: {b / a:.1f}x")

    volume, angles = headphones(64, 300), (215, 25, 1.3)
    rays = camera_rays(camera_to_world_at(*angles).float()[None], intrinsics_at(128).float()[None], 128)
    skipping = lambda volume, *rest: render(volume, *rest, occupied=occupancy(volume))
    renderers = skipping, render, by_pytorch3d

    def backward(renderer):
        leaf = volume.clone().requires_grad_()
        rgb, alpha, _ = renderer(leaf, *rays, 64)
        return rgb.detach(), torch.autograd.grad(rgb.square().mean() + alpha.square().mean(), leaf)[0]

    _, (a, da), (b, db) = [backward(renderer) for renderer in renderers]
    print(f"render 64^3, 128 px, 64 samples: colours within {(a - b).abs().max():.1e}, "
          f"gradients within {(da - db).abs().max() / da.abs().max():.1e} of the largest")
    with torch.no_grad():
        forward = in_turns([lambda r=r: r(volume, *rays, 64) for r in renderers], 15)
    for what, times in (("forward", forward),
                        ("with backward", in_turns([lambda r=r: backward(r) for r in renderers], 8))):
        print(f"{what:<14} ours {times[0]:6.1f} ms, and {times[1]:6.1f} ms with every sample; "
              f"PyTorch3D {times[2]:6.1f} ms: {times[2] / times[0]:.1f}x and {times[2] / times[1]:.1f}x")
    if picture:
        rows = [[*some[0], colours.view(128, 128, 3)] for some, colours in ((ours, a), (its, b))]
        save_picture(picture, grid(to_bytes(torch.stack(sum(rows, []))).numpy(), 7))


def export_rows(folder):
    """What meshes and the page cost, on one core, and what they lose: of nine objects, spread over all"""
    torch.set_num_threads(1)
    model, names = autodecoder.load_autodecoder(folder)
    photos = read_photos(model.config.data, model.config.size, len(names))
    chosen = np.linspace(0, len(names) - 1, min(9, len(names))).round().astype(int).tolist()
    volumes = [model.volumes_of(model.codes[o:o + 1]) for o in chosen]
    large = torch.nn.functional.interpolate(volumes[0], size=(64,) * 3, mode="trilinear")
    seconds = best(lambda: mesh_of(model, large, 64), 5) / 1e3
    faces = mesh_of(model, large, 64)[1]
    print(f"mesh of a 64^3 volume, {len(faces):,} faces: {seconds:.3f} s on one core")
    apart = [mesh_to_truth(model, names[o], volume) for o, volume in zip(chosen, volumes)]
    if apart[0]:
        there, back = np.mean(apart, 0)
        print(f"meshes of {len(apart)} training objects, Chamfer distance from their true visible surfaces: "
              f"{there:.2f} voxels there, {back:.2f} back, the worst {np.mean(apart, 1).max():.2f}")

    # Held-out views, from the volume, from what the page stores, and from the same without the 8 bits
    psnr = {}
    for o, volume in zip(chosen, volumes):
        finer = {f"baked at {n}^3": page.bake_for_page(volume, n)
                 for n in (volume.shape[-1], 2 * volume.shape[-1])}
        stored = {f"{name}, in 8 bits": page.unpack(page.pack(baked)) for name, baked in finer.items()}
        for v in (-1, -2, -3, -4):
            rays = camera_rays(photos.pose[o, v][None], photos.intrinsics[o][None], photos.size)
            truth = photos.rgb[o, v].view(1, -1, 3) / 255
            seen = lambda volume, field: render(volume, *rays, 2 * model.config.samples, field)[0]
            pictures = {"volume": seen(volume, model.field)}
            pictures |= {name: seen(baked[None], voxel_field) for name, baked in (finer | stored).items()}
            for name, picture in pictures.items():
                pair = autodecoder.psnr(picture, truth), autodecoder.psnr(picture, pictures["volume"])
                psnr.setdefault(name, []).append(pair)
    for name, pairs in psnr.items():
        to_photo, to_volume = np.mean(pairs, 0)
        print(f"{name:<24} held-out views {to_photo:.3f} dB, to the volume's {to_volume:.1f} dB")


def mesh_to_truth(model, name, volume):
    """-> mean distances between the visible points of an object's mesh and of its true one, both ways, in
    voxels; () where there is no true one"""
    file = next(Path(model.config.data).parent.glob(f"procedural/*/{name}/models/model_normalized.obj"), None)
    if file is None:
        return ()
    vertices, faces, *_ = mesh_of(model, volume)
    ours = grey_mesh(vertices.double(), faces)
    a, b = (visible_points(mesh) for mesh in (ours, stage.to_world(load_obj(file))[0]))
    apart = torch.cdist(a, b) * volume.shape[-1]
    return apart.min(1).values.mean().item(), apart.min(0).values.mean().item()


def visible_points(mesh, cameras=20, count=6000):
    """Points that cameras all around see, from their depth maps -> (count,3), a fixed draw of them"""
    K, points = intrinsics_at(128, 131.25), []
    for k in range(cameras):                                       # a spiral from pole to pole
        elevation = math.degrees(math.asin(1 - (2 * k + 1) / cameras))
        pose = camera_to_world_at(137.508 * k, elevation, 1.3)
        depth = stage.rasterize(mesh, pose, K, 128)[2].view(-1).double()
        origins, directions = camera_rays(pose, K, 128)
        points.append((origins + depth[:, None] * directions)[depth.isfinite()])
    points = torch.cat(points)
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]]


def main():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "--export" in sys.argv:
        return export_rows((sys.argv + ["runs/autodecoder"])[sys.argv.index("--export") + 1])
    golden = Path(__file__).parent / "golden"
    headphone = load_obj(golden / "ShapeNetCore.v2/03261776/golden_headphone/models/model_normalized.obj")
    views = np.load(golden / "golden_headphone.npz")
    poses = stage.opencv_from_pytorch3d(views["R"], views["T"])
    if "--pytorch3d" in sys.argv:
        picture = (sys.argv + [""])[sys.argv.index("--pytorch3d") + 1]
        return pytorch3d_rows(headphone, poses, views["K"], picture)
    pose, K = camera_to_world_at(30, 20, 1.3), intrinsics_at(128, 131.25)
    for supersample in (1, 2):
        each = [best(lambda: stage.rasterize(headphone, poses[k], views["K"][k], 128, supersample))
                for k in range(6)]
        report(headphone, supersample, sum(each) / 6)
    for n, times in ((224, 10), (708, 3)):
        mesh = sphere(n)
        report(mesh, 1, best(lambda: stage.rasterize(mesh, pose, K, 128), times))
    if "--render" in sys.argv:
        render_rows()
    if "--many" in sys.argv:
        many_rows()
    if "--data" in sys.argv:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            stage.main(["--out", folder])
            print(f"python render_shapenet.py, all of it          {time.perf_counter() - began:7.1f} s")


def many_rows(steps=200):
    """Stage 1 on 256 and on 4,096 objects: the 72, linked again and again under other names"""
    sources = sorted(Path("data/earphones_train").glob("train_*"))
    with tempfile.TemporaryDirectory(dir="data") as folder:
        for count in (256, 4096):
            data, out = Path(folder, f"data_{count}"), Path(folder, f"run_{count}")
            for k in range(count):
                shutil.copytree(sources[k % len(sources)], data / f"copy_{k:05d}", copy_function=os.link)
            began = time.perf_counter()
            photos = read_photos(data, 64)
            packed = time.perf_counter()
            photos.measured(torch.arange(photos.rgb.shape[1] - 8))
            measured = time.perf_counter()
            flags = dict(data=data, out=out, steps=steps, dense_steps=20, preview_every=steps,
                         save_every=steps)
            command = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
            said = subprocess.run([sys.executable, "autodecoder.py", *command], capture_output=True,
                                  text=True, check=True).stdout
            rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            at = {row["step"]: row["seconds"] for row in rows if "loss" in row}
            step = (at[steps] - at[60]) / (steps - 60)
            print(f"{count} objects: packed in {packed - began:.0f} s, measured in "
                  f"{measured - packed:.0f} s, once; 20 steps after {at[20]:.1f} s; "
                  f"{step * 1e3:.1f} ms a step;"
                  f"{said.split(';')[-1].rstrip()}")


if __name__ == "__main__":
    main()

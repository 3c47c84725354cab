"""Meshes against geometry that is known, GLB and PLY files against their rules and another reader, and the
page in a real browser against volume_render.py."""
import base64
import io
import json
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import autodecoder
import browser
import common
import diffusion
import viewer.export as stage
from viewer import isosurface
import viewer.page as viewer
import test_diffusion
import volume_render
from common import UserError, camera_to_world_at
from shapes.earphones import KINDS
from volume_render import ANGLES, camera_rays, headphones, render, voxel_field

needs_chromium = pytest.mark.skipif(not browser.find(),
                                    reason="no Chromium on the PATH (Debian: apt install chromium)")


class Volumes(SimpleNamespace):
    """An autodecoder whose latents are its volumes; they hold density / GAIN, as a trained one's do"""
    config = autodecoder.Config(samples=48, data="data/earphones_train")
    to_volume = staticmethod(lambda latent: latent)
    field = autodecoder.Autodecoder.field


def ball(n=40, radius=0.35, centre=(0.05, -0.02, 0.03)):
    """(1,4,n,n,n): density grows with the depth below a sphere; red where x > its centre's, else blue"""
    axis = (torch.arange(n) + 0.5) / n - 0.5
    z, y, x = torch.meshgrid(axis - centre[2], axis - centre[1], axis - centre[0], indexing="ij")
    depth = radius - (x ** 2 + y ** 2 + z ** 2).sqrt()
    return torch.stack([depth * 300 + 2.0, x.sign() * 6, 0 * x - 6, -x.sign() * 6])[None]   # 20 / GAIN is 2


def closed(faces):
    """Each edge is in two faces, which run along it in opposite directions."""
    edges = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    code, back = edges[:, 0] * (1 << 32) + edges[:, 1], edges[:, 1] * (1 << 32) + edges[:, 0]
    return torch.equal(code.sort().values, back.sort().values) and len(code.unique()) == len(code)


def volume_within(vertices, faces):
    a, b, c = vertices[faces].double().unbind(1)
    return (a * torch.linalg.cross(b, c)).sum().item() / 6


# ---- marching tetrahedra ----

def test_the_mesh_of_a_sphere_is_a_sphere():
    vertices, faces, normals, colours = isosurface.mesh_of(Volumes(), ball(), 40)
    centre, radius = torch.tensor([0.05, -0.02, 0.03]), 0.35
    assert closed(faces)
    assert len(vertices) - 3 * len(faces) // 2 + len(faces) == 2                   # Euler's number
    assert abs(volume_within(vertices, faces) / (4 / 3 * math.pi * radius ** 3) - 1) < 0.01
    out = torch.nn.functional.normalize(vertices - centre, dim=1)
    assert ((vertices - centre).norm(dim=1) - radius).abs().max() < 0.1 / 40
    assert (normals * out).sum(1).min() > 0.99
    a, b, c = vertices[faces].unbind(1)
    assert (torch.linalg.cross(b - a, c - a) * out[faces[:, 0]]).sum(1).min() > 0
    right = vertices[:, 0] > centre[0] + 0.03
    assert colours[right, 0].min() > 0.95 and colours[right, 2].max() < 0.05
    left = vertices[:, 0] < centre[0] - 0.03
    assert colours[left, 2].min() > 0.95 and colours[left, 0].max() < 0.05


def test_all_cases_close_and_face_outwards():
    """Noise meets each of the 16 cases, in each of the 6 tetrahedra; sides differ, lest axes get mixed up."""
    f = torch.full((9, 12, 15), -1.0)
    f[1:-1, 1:-1, 1:-1] = torch.randn(7, 10, 13, generator=torch.Generator().manual_seed(0))
    vertices, faces = isosurface.marching_tetrahedra(f)
    assert closed(faces) and vertices.amax(0).tolist() < [14, 11, 8] and vertices.min() > 0
    # f is linear along each edge: the vertices are where it is 0, and they enclose about what is inside
    low, share = vertices.floor().long(), vertices - vertices.floor()
    one = (share > 0).long()
    a, b = (f[p[:, 2], p[:, 1], p[:, 0]] for p in (low, low + one))
    assert (a > 0).ne(b > 0).all()
    share = share.amax(1)
    assert (a + share * (b - a)).abs().max() < 2e-3 * (b - a).abs().max()
    assert 0.5 < volume_within(vertices, faces) / (f > 0).sum() < 1.5


def test_what_reaches_the_cube_is_closed_on_its_faces():
    full = torch.full((1, 4, 8, 8, 8), 9.0)
    vertices, faces, *_ = isosurface.mesh_of(Volumes(), full, 8)
    assert closed(faces) and (vertices.abs().amax(1) - 0.5).abs().max() < 1e-3
    assert 0.97 < volume_within(vertices, faces) < 1.0                             # its edges are cut off
    assert len(isosurface.mesh_of(Volumes(), -full, 8)[1]) == 0


def test_a_volume_is_baked_finer_as_it_is_looked_up():
    volume = torch.randn(1, 4, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(isosurface.bake(volume, 12), volume[0])
    baked = isosurface.bake(volume, 24)
    x, y, z = 3, 20, 11
    point = ((torch.tensor([x, y, z]) + 0.5) / 24 - 0.5)[None, None]
    assert torch.allclose(baked[:, z, y, x], volume_render.lookup(volume, point)[0, 0], atol=1e-5)


# ---- GLB ----

def read_glb(path):
    """A GLB, checked against the rules of glTF 2.0 -> its document, {attribute: array}, indices"""
    content = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    chunks, at = [], 12
    while at < length:
        size, kind = struct.unpack_from("<I4s", content, at)
        assert size % 4 == 0
        chunks.append((kind, content[at + 8:at + 8 + size]))
        at += 8 + size
    assert at == length and [kind for kind, _ in chunks] == [b"JSON", b"BIN\0"]
    document, binary = json.loads(chunks[0][1]), chunks[1][1]
    assert document["asset"]["version"] == "2.0"
    assert 0 <= len(binary) - document["buffers"][0]["byteLength"] < 4 and "uri" not in document["buffers"][0]
    used = {name for material in document["materials"] for name in material["extensions"]}
    assert used == set(document["extensionsUsed"]) == {"KHR_materials_unlit"}
    end, arrays = 0, []
    for view in document["bufferViews"]:
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] >= end and view["buffer"] == 0
        end = view["byteOffset"] + view["byteLength"]
    assert end <= document["buffers"][0]["byteLength"]
    for accessor in document["accessors"]:
        view = document["bufferViews"][accessor["bufferView"]]
        width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        kind = np.dtype({5126: "<f4", 5123: "<u2", 5125: "<u4"}[accessor["componentType"]])
        each = width * kind.itemsize
        assert each % 4 == 0 and accessor["count"] * each == view["byteLength"]
        start = view["byteOffset"]
        array = np.frombuffer(binary[start:start + view["byteLength"]], kind).reshape(-1, width)
        arrays.append(array)
    (node,) = document["scenes"][document["scene"]]["nodes"]
    (primitive,) = document["meshes"][document["nodes"][node]["mesh"]]["primitives"]
    assert primitive.get("mode", 4) == 4 and primitive["material"] == 0
    named = {name: arrays[k] for name, k in primitive["attributes"].items()}
    accessor = {name: document["accessors"][k] for name, k in primitive["attributes"].items()}
    indices, position = arrays[primitive["indices"]], named["POSITION"]
    assert {len(array) for array in named.values()} == {len(position)} and np.isfinite(position).all()
    assert accessor["POSITION"]["min"] == position.min(0).tolist()
    assert accessor["POSITION"]["max"] == position.max(0).tolist()
    assert np.abs(np.linalg.norm(named["NORMAL"], axis=1) - 1).max() < 1e-4
    assert accessor["COLOR_0"]["normalized"] and accessor["COLOR_0"]["componentType"] == 5123
    assert len(indices) % 3 == 0 and indices.max() < len(position)
    target = lambda a: document["bufferViews"][a["bufferView"]]["target"]
    assert {target(a) for a in accessor.values()} == {34962}
    assert target(document["accessors"][primitive["indices"]]) == 34963
    return document, named, indices


@pytest.fixture(scope="module")
def glb(tmp_path_factory):
    path = tmp_path_factory.mktemp("glb") / "mesh.glb"
    assert isosurface.write_mesh(path, Volumes(), ball()[0], 40)
    return path


def test_the_glb_obeys_gltf(glb):
    _, named, indices = read_glb(glb)
    position = torch.from_numpy(named["POSITION"].copy()).double()
    assert closed(torch.from_numpy(indices.astype(np.int64)).view(-1, 3))
    # glTF's Y is our Z, its Z our -Y; and the turn is no mirror: what is enclosed stays positive
    middle = (position.amax(0) + position.amin(0)) / 2
    assert (middle - torch.tensor([0.05, 0.03, 0.02])).abs().max() < 2e-3
    assert volume_within(position, torch.from_numpy(indices.astype(np.int64)).view(-1, 3)) > 0.17
    out = torch.nn.functional.normalize(position - middle, dim=1)
    assert (out * torch.from_numpy(named["NORMAL"].copy())).sum(1).min() > 0.99
    # sigmoid(6) of red is 0.9975 on a screen, and 0.9946 of the light
    red = named["COLOR_0"][position[:, 0].argmax()] / 65535
    assert abs(red[0] - 0.9946) < 2e-3 and red[1] < 1e-3 and red[3] == 1


def test_parts_of_any_length_are_aligned(tmp_path):
    for resolution in (9, 10, 11, 12, 14):                                         # as many lengths of JSON
        isosurface.write_mesh(tmp_path / "mesh.glb", Volumes(), ball(12)[0], resolution)
        read_glb(tmp_path / "mesh.glb")


def test_colours_are_made_linear():
    found = isosurface.linear(torch.tensor([0.0, 0.02, 0.2, 0.5, 1.0]))
    assert (found - torch.tensor([0.0, 0.001548, 0.033105, 0.214041, 1.0])).abs().max() < 1e-5


def test_another_reader_agrees(glb):
    trimesh = pytest.importorskip("trimesh")
    (mesh,) = trimesh.load(glb).geometry.values()
    _, named, indices = read_glb(glb)
    assert len(mesh.vertices) == len(named["POSITION"]) and len(mesh.faces) == len(indices) // 3
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2
    assert abs(mesh.volume / (4 / 3 * math.pi * 0.35 ** 3) - 1) < 0.01
    colours = mesh.visual.vertex_attributes["color"]
    assert np.array_equal(colours, named["COLOR_0"]) and np.ptp(colours[:, 0].astype(int)) > 60_000


def read_ply(path):
    """-> points and triangles as the header declares them; nothing may be left over"""
    header, rest = path.read_bytes().split(b"end_header\n", 1)
    lines = header.decode("ascii").splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    counts = [int(line.split()[2]) for line in lines if line.startswith("element")]
    kinds = {"float": "<f4", "uchar": "u1", "int": "<i4"}
    scalars = [line.split()[1:] for line in lines if line.startswith("property") and "list" not in line]
    assert "property list uchar int vertex_indices" in lines
    point = np.dtype([(name, kinds[kind]) for kind, name in scalars])
    triangle = np.dtype([("count", "u1"), ("corners", "<i4", 3)])
    assert len(rest) == counts[0] * point.itemsize + counts[1] * triangle.itemsize
    triangles = np.frombuffer(rest, triangle, counts[1], counts[0] * point.itemsize)
    assert (triangles["count"] == 3).all()
    return np.frombuffer(rest, point, counts[0]), triangles["corners"]


def test_a_ply_lies_beside_the_glb_in_the_worlds_axes_and_a_screens_colours(glb):
    points, triangles = read_ply(glb.with_suffix(".ply"))
    vertices, faces, normals, colours = isosurface.mesh_of(Volumes(), ball(), 40)
    assert np.array_equal(triangles, faces.numpy())
    column = lambda *names: torch.tensor(np.stack([points[name] for name in names], 1))
    assert torch.equal(column("x", "y", "z"), vertices) and torch.equal(column("nx", "ny", "nz"), normals)
    assert (column("red", "green", "blue") / 255 - colours).abs().max() <= 0.51 / 255


def test_another_reader_keeps_the_plys_colours(glb):
    trimesh = pytest.importorskip("trimesh")
    mesh = trimesh.load(glb.with_suffix(".ply"), process=False)
    assert mesh.is_watertight and mesh.visual.kind == "vertex"
    points, _ = read_ply(glb.with_suffix(".ply"))
    assert np.array_equal(mesh.visual.vertex_colors[:, 0], points["red"]) and np.ptp(points["red"]) > 200


# ---- what the page stores ----

def phones(n=32):
    """The analytic headphones as an autodecoder would hold them"""
    volume = headphones(n, 1500.0)
    volume[:, 0] /= autodecoder.GAIN
    return volume


def test_what_is_stored_renders_the_same():
    volume, model = phones(), Volumes()
    packed = viewer.pack(viewer.bake_for_page(volume, 32))
    assert len(packed["data"]) < 0.5 * 4 * 32 ** 3                                 # most of it is empty
    stored = viewer.unpack(packed)[None]
    pose = camera_to_world_at(*ANGLES[0], 1.3).float()[None]
    rays = camera_rays(pose, torch.tensor([[[65.6, 0, 32], [0, 65.6, 32], [0, 0, 1]]]), 64)
    for a, b in zip(render(volume, *rays, 96, model.field)[:2], render(stored, *rays, 96, voxel_field)[:2]):
        assert (a - b).abs().mean() < 0.002 and (a - b).abs().max() < 0.1
    for nothing in (-10.0, 10.0):                                                  # empty; all solid
        volume = torch.full((1, 4, 8, 8, 8), nothing)
        stored = viewer.unpack(viewer.pack(viewer.bake_for_page(volume, 8)))[None]
        alpha = render(stored, *rays, 32, voxel_field)[1]
        assert (alpha.max() < 1e-3) if nothing < 0 else (alpha.max() > 0.999)


def write_page(path, volumes, times=1):
    labels = [f"object {k}" for k in range(len(volumes))]
    objects = viewer.page_objects(Volumes(), volumes, labels, ["<b>note</b>"] * len(labels)) * times
    objects = [{**one, "beside": len(objects) - 1} for one in objects]
    last = [len(objects) - 1]
    sets = [("One", "all", "Near", list(range(len(objects)))), ("Other", "the last", "Far", last)]
    viewer.write_page(path, "</script> & title", "about", sets, objects, 96)
    return path


def test_a_page_of_eight_is_small(tmp_path):
    page = write_page(tmp_path / "page.html", phones(64), times=8)                 # 4 x 64^3 numbers each
    assert 1e6 < page.stat().st_size < 6e6
    text = page.read_text()
    assert not [word for word in ("http:", "https:", "src=\"", "import ", "fetch(") if word in text]


# ---- the page, in a browser ----

@pytest.fixture(scope="module")
def diffused(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "diffusion"
    test_diffusion.train(trained, out)
    return out


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    volumes = torch.cat([phones(), phones().flip(1), phones().flip(-1).clone()])
    volumes[1] = phones()[0]
    volumes[1, 1:] = -volumes[1, 1:]                                               # other colours
    volumes[2, 0] = ball(32)[0, 0]                                                 # another shape
    return write_page(tmp_path_factory.mktemp("page") / "a page.html", volumes), volumes


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    found = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


# Drawn, and at full resolution: while things move, a slow machine draws coarsely
SETTLED = ("new Promise(go => {{ const busy = () => dirty || frame.coarse || performance.now() - moved < 200;"
           "const look = () => busy() ? requestAnimationFrame(look) : go({});"
           "requestAnimationFrame(look); }})")
BEGIN = "set({...START, set: 0, frame: 0, all: 0, steps: 16})"


# A still is read before it is drawn
LOADED = ("new Promise(go => { const look = () => !dirty && shown().picture?.complete ? go(1) : "
          "requestAnimationFrame(look); look(); })")


def picture(chromium, canvas="view"):
    """What is drawn now -> (H,W,3) in [0, 1]"""
    text = chromium.run(SETTLED.format(f"document.getElementById('{canvas}').toDataURL()"))
    image = Image.open(io.BytesIO(base64.b64decode(text.split(",")[1]))).convert("RGB")
    return torch.from_numpy(np.asarray(image).copy()) / 255


def opened(chromium, page, fragment="", **options):
    """On one object: the first, if the fragment names no other"""
    fragment = f"frame=0&{fragment}" if "frame=" not in fragment else fragment
    chromium.open(page[0].as_uri() + "#" + fragment, **{"width": 860, "height": 570, **options})
    return picture(chromium)


def click(chromium, selector, across=0.5):
    """With the mouse, `across` of the way from its left to its right"""
    box = chromium.run(f"(() => {{ const e = document.querySelector('{selector}');"
                       "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
                       "return [b.x, b.y, b.width, b.height]; })()")
    x, y = box[0] + across * box[2], box[1] + box[3] / 2
    for kind in ("mousePressed", "mouseReleased"):
        chromium.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    return x, y


def expected(volume, shape, azimuth, elevation, distance, samples, density=1):
    H, W, _ = shape
    f = 131.25 / 128 * min(H, W)
    K, side = torch.tensor([[[f, 0, W / 2], [0, f, H / 2], [0, 0, 1]]]), max(H, W)
    pose = camera_to_world_at(azimuth, elevation, distance).float()[None]
    field = lambda channels, position: (density * Volumes().field(channels, position)[0],
                                        Volumes().field(channels, position)[1])
    rgb, alpha, depth = render(volume[None], *camera_rays(pose, K, side), samples, field)
    return rgb.view(side, side, 3)[:H, :W], alpha.view(side, side)[:H, :W]


@needs_chromium
@pytest.mark.parametrize("camera", [(0, 215, 25, 1.3, 96, 1), (1, 30, -40, 0.9, 48, 1),
                                    (2, 120, 10, 2.0, 96, 1),
                                    (0, 215, 25, 0.8, 12, 0.03)])          # few bins of fog: each one counts
def test_the_shader_agrees_with_the_renderer(chromium, page, camera):
    names = ("frame", "azimuth", "elevation", "distance", "steps", "density")
    seen = opened(chromium, page, "&".join(f"{name}={value}" for name, value in zip(names, camera)))
    ours, alpha = expected(page[1][camera[0]], seen.shape, *camera[1:])
    something = alpha > 0.01
    assert (seen - ours).abs().mean() < 1 / 255 and something.float().mean() > 0.03
    assert (seen - ours)[something].abs().mean() < 1 / 255
    assert not chromium.errors


@needs_chromium
def test_opacity_and_depth_agree_too(chromium, page):
    seen = opened(chromium, page, "mode=2")
    _, alpha = expected(page[1][0], seen.shape, *ANGLES[0], 1.3, 96)
    assert (1 - seen[..., 0] - alpha).abs().mean() < 4 / 255
    depth = opened(chromium, page, "mode=1")
    assert (depth - seen).abs().mean() > 0.02
    assert ((depth == 1).all(-1) == (seen == 1).all(-1)).float().mean() > 0.99     # the same is empty


@needs_chromium
def test_every_control_changes_the_picture(chromium, page):
    before = opened(chromium, page, "steps=16")
    changed = lambda: (picture(chromium) - before).abs().mean().item() > 1e-3
    for selector, across in {"#density": 0.1, "#steps": 0.9, "#clip": 0.5, "#modes button:nth-child(2)": 0.5,
                             "#wide": 0.9, "#deep": 0.1, "#high": 0.9,
                             "#modes button:nth-child(4)": 0.5, "#strip button:nth-child(2)": 0.5,
                             "#sets button:nth-child(2)": 0.5}.items():
        chromium.run(BEGIN)
        click(chromium, selector, across)
        assert changed(), selector
    chromium.run(BEGIN)
    click(chromium, "#axes button:nth-child(3)")
    click(chromium, "#clip", 0.5)
    chromium.run("set({elevation: 0})")
    seen = picture(chromium)
    upper, lower = seen.chunk(2)                                               # the upper half is cut away
    assert chromium.run("state.clip") == 0.5 and (upper[:-2] == 1).all() and (lower < 1).any()
    assert not chromium.errors


@needs_chromium
def test_objects_are_painted_and_stretched(chromium, page):
    """In the picture and in the saved mesh alike; `reset` takes both back"""
    before = opened(chromium, page, "steps=64&azimuth=270&elevation=0&distance=2")
    mesh = lambda: {key: torch.tensor(value) for key, value in chromium.run("meshOf(shown())").items()
                    if key != "faces"}
    solid = lambda seen: (seen < 0.9).any(-1)
    plain = mesh()
    chromium.run("set({colour: 0xc03020, high: 1.3})")
    seen, made = picture(chromium), mesh()
    tall = [solid(some).any(1).sum().item() for some in (before, seen)]
    assert abs(tall[1] / tall[0] - 1.3) < 0.06
    wide = [solid(some).any(0).sum().item() for some in (before, seen)]
    assert abs(wide[1] / wide[0] - 1) < 0.04
    wanted = torch.tensor([0xc0, 0x30, 0x20]) / 255
    own = torch.tensor(chromium.run("mean(shown())"))
    assert (own - wanted).abs().max() > 0.1
    assert chromium.run("$('colour').value") == "#c03020"
    assert torch.allclose(made["vertices"], plain["vertices"] * torch.tensor([1, 1, 1.3]), atol=1e-5)
    added = made["colours"] - plain["colours"]
    inside = ((plain["colours"] + wanted - own - 0.5).abs() < 0.4).all(1)
    assert inside.any() and (added - (wanted - own))[inside].abs().max() < 0.15
    longer = plain["normals"] / torch.tensor([1, 1, 1.3])
    assert torch.allclose(made["normals"], longer / longer.norm(dim=1, keepdim=True), atol=1e-5)
    chromium.run("$('own').click()")
    assert (picture(chromium) - before).abs().mean() < 1e-3
    chromium.run("set({colour: 0, wide: 1.2}); $('reset').click()")
    assert (picture(chromium) - opened(chromium, page)).abs().mean() < 1e-3 and not chromium.errors


@needs_chromium
def test_every_key_changes_the_picture_and_back(chromium, page):
    before = opened(chromium, page, "steps=16")
    off = lambda: (picture(chromium) - before).abs()
    for key, back in (("ArrowLeft", "ArrowRight"), ("ArrowUp", "ArrowDown"), ("+", "-"), ("2", "1"),
                      ("3", "1"), ("4", "1"), (".", ","), (",", ".")):
        chromium.key(key)
        assert off().mean() > 1e-3, key
        chromium.key(back)
        assert off().max() < 2 / 255, back
    chromium.key("ArrowRight", modifiers=8)                                        # with shift it moves
    assert off().mean() > 1e-3 and chromium.run("state.azimuth") == 215
    chromium.key("r")
    assert chromium.run("[state.x, state.y, state.z, state.steps]") == [0, 0, 0, 96]


@needs_chromium
def test_mouse_wheel_and_fingers(chromium, page):
    state = lambda: chromium.run("({...state})")
    opened(chromium, page, "steps=16")
    x, y = click(chromium, "#view")
    mouse = lambda kind, x, y, **more: chromium.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)
    for button, buttons, keys in (("left", 1, ("azimuth", "elevation")), ("right", 2, ("x", "y", "z"))):
        before = state()
        mouse("mousePressed", x, y, button=button, buttons=buttons)
        mouse("mouseMoved", x + 40, y + 30, button=button, buttons=buttons)
        mouse("mouseReleased", x + 40, y + 30, button=button)
        after = state()
        assert {key for key in after if after[key] != before[key]} == set(keys)
    mouse("mouseWheel", x, y, deltaX=0, deltaY=-120)
    chromium.run(SETTLED.format("1"))
    assert state()["distance"] < 1.3
    chromium.key("r")
    points = lambda at: [{"x": x + dx, "y": y, "id": k} for k, dx in enumerate(at)]
    fingers = lambda kind, *at: chromium.call("Input.dispatchTouchEvent", type=kind, touchPoints=points(at))
    fingers("touchStart", -20, 20)
    fingers("touchMove", -40, 40)
    fingers("touchEnd")
    assert abs(state()["distance"] - 0.65) < 0.02 and state()["azimuth"] == 215    # twice apart: half as far
    assert not chromium.errors


@needs_chromium
def test_two_fingers_on_two_tiles_zoom_and_enter_opens_a_tile_that_was_dragged(chromium, page):
    opened(chromium, page, "steps=16")
    chromium.run("set({...HOME, all: 1})")
    places = chromium.run("[...$('tiles').children].slice(0, 2).map(tile => tile.getBoundingClientRect())"
                          ".map(b => [b.x + b.width / 2, b.y + b.height / 2])")
    (x0, y0), (x1, y1) = places
    fingers = lambda kind, *at: chromium.call("Input.dispatchTouchEvent", type=kind, touchPoints=[
        {"x": x, "y": y, "id": k} for k, (x, y) in enumerate(at)])
    before = chromium.run("({...state})")
    fingers("touchStart", *places)
    nearer = [(0.75 * x0 + 0.25 * x1, 0.75 * y0 + 0.25 * y1), (0.25 * x0 + 0.75 * x1, 0.25 * y0 + 0.75 * y1)]
    fingers("touchMove", *nearer)
    fingers("touchEnd")
    after = chromium.run("({...state})")
    assert after["distance"] > 1.5 * before["distance"] and after["azimuth"] == before["azimuth"]

    mouse = lambda kind, x, **more: chromium.call("Input.dispatchMouseEvent", type=kind, x=x, y=y0,
                                                  button="left", clickCount=1, **more)
    mouse("mousePressed", x0, buttons=1)
    mouse("mouseMoved", x0 + 20, buttons=1)
    mouse("mouseReleased", x0 + 20)
    assert chromium.run("state.all") == 1
    chromium.run("$('tiles').firstChild.focus()")
    chromium.key("Enter", text="\r")
    assert chromium.run("state.all") == 0 and not chromium.errors


@needs_chromium
def test_it_plays_and_turns(chromium, page):
    opened(chromium, page, "steps=16")
    until = "new Promise(go => {{ const look = () => {} ? go(true) : requestAnimationFrame(look); look(); }})"
    chromium.key(" ")
    assert chromium.run(until.format("state.frame === 2"))
    chromium.key(" ")
    chromium.key("t")
    assert chromium.run(until.format("state.azimuth > 220"))
    chromium.key("t")
    assert not chromium.run("turning || playing")
    assert chromium.run("document.title") == "</script> & title" and not chromium.errors
    assert chromium.run("document.getElementById('note').textContent") == "<b>note</b>"


PHONES = [(390, 844), (320, 600), (844, 390)]


@needs_chromium
@pytest.mark.parametrize("width, height", [(1280, 860), *PHONES])
def test_it_fits_the_screen(chromium, page, width, height):
    colours = {}
    for dark in (False, True):
        seen = opened(chromium, page, "steps=8", width=width, height=height, dark=dark)
        assert chromium.run("document.documentElement.scrollWidth") <= width
        small = chromium.run("[...document.querySelectorAll('button')].filter(b => b.offsetParent && ("
                             "b.offsetHeight < 22 || b.offsetWidth < 18 || b.scrollWidth > b.offsetWidth + 1"
                             ")).map(b => b.textContent)")
        assert small == []
        box = rectangle(chromium, ".stage")
        assert box["bottom"] <= height and box["height"] > 250                     # the object is in sight
        colours[dark] = seen[0, 0].mean()
    assert colours[False] == 1 and colours[True] < 0.4
    assert not chromium.errors


def rectangle(chromium, selector):
    return chromium.run(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")


@needs_chromium
@pytest.mark.parametrize("width, height", PHONES)
def test_a_phones_controls_suit_a_finger_and_the_stage_stays_in_sight(chromium, page, width, height):
    opened(chromium, page, "steps=8", width=width, height=height, mobile=True)
    small = chromium.run("[...document.querySelectorAll('button, input')].filter(e => e.offsetParent && "
                         "(e.offsetHeight < 44 || e.offsetWidth < 44)).map(e => e.id + e.textContent)")
    assert small == []
    for selector in ("#density", "#steps", "#clip", "#glb"):               # whole, and not one over the other
        chromium.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
        stage, control = rectangle(chromium, ".stage"), rectangle(chromium, selector)
        assert stage["top"] >= 0 and stage["bottom"] <= height and control["bottom"] <= height
        assert control["top"] >= stage["bottom"] or control["left"] >= stage["right"], selector
    # A finger that begins beside or below the stage scrolls the page
    free = chromium.run("[...document.querySelectorAll('body, nav, aside')]"
                        ".map(e => getComputedStyle(e).touchAction)")
    assert set(free) == {"auto"}
    assert width - stage["width"] >= 200 or height - stage["height"] >= 200


@needs_chromium
def test_each_slider_has_its_words(chromium, page):
    opened(chromium, page, "steps=16")
    labels = "[...document.querySelectorAll('label')]"
    words = dict(chromium.run(f"{labels}.map(e => [e.textContent, e.control.id])"))
    assert words == {"Density": "density", "Steps along a ray": "steps", "Cut away": "clip", "Width": "wide",
                     "Depth": "deep", "Height": "high", "Paint": "colour"}
    assert not chromium.run("document.querySelectorAll('label button').length")
    chromium.call("Accessibility.enable")
    nodes = chromium.call("Accessibility.getFullAXTree")["nodes"]
    role = lambda node: node.get("role", {}).get("value")
    sliders = [node["name"]["value"] for node in nodes if role(node) == "slider"]
    assert sliders == list(words)[:-1]
    chromium.call("Accessibility.disable")
    chromium.run("set({axis: 2})")
    click(chromium, "label[for=clip]")
    assert chromium.run("[state.axis, document.activeElement.id]") == [2, "clip"]


@needs_chromium
def test_a_lost_context_shows_stills_and_then_comes_back(chromium, page):
    opened(chromium, page, "frame=0&steps=16")
    chromium.run("window.lose = gl.getExtension('WEBGL_lose_context'); lose.loseContext();"
                 "new Promise(go => setTimeout(go, 100))")
    pictures = []
    for frame in (2, 0):
        chromium.run(f"set({{frame: {frame}}})")
        chromium.run(LOADED)
        pictures.append(picture(chromium))
        assert chromium.run("$('label').textContent") == f"object {frame}"
    assert (pictures[0] - pictures[1]).abs().mean() > 1e-3
    assert "taken the graphics card" in chromium.run("document.querySelector('.notice').innerText")
    chromium.run("set({frame: 2}); new Promise(go => { lose.restoreContext();"
                 "glass.addEventListener('webglcontextrestored', () => go(1)); })")
    seen = picture(chromium)
    ours, _ = expected(page[1][2], seen.shape, *ANGLES[0], 1.3, 16)
    assert (seen - ours).abs().mean() < 1 / 255
    assert chromium.run("!$('notice').textContent && !$('controls').disabled")


@needs_chromium
def test_long_names_stay_in_their_place(chromium, page):
    for width in (1280, 390):
        opened(chromium, page, "steps=8", width=width, height=844)
        name = "10155655850468db78d106ce0a280f87"
        chromium.run(f"data.objects.forEach(o => o.label = '{name}'); fill(); show()")
        wide = chromium.run("['#strip button', '.beside b', '.beside', '.caption h2'].filter(s => {"
                            "const e = document.querySelector(s), box = e.getBoundingClientRect();"
                            "return e.scrollWidth > e.clientWidth + 1 || box.right > innerWidth; })")
        assert wide == [] and chromium.run("document.documentElement.scrollWidth") <= width
        span = "getComputedStyle(document.querySelector('#strip span'))"
        assert chromium.run(f"{span}.textOverflow") == "ellipsis"
        assert chromium.run("document.querySelector('#strip button').title.length") == 32


def light(rgb):
    return (isosurface.linear(rgb) * torch.tensor([0.2126, 0.7152, 0.0722])).sum(-1)


@needs_chromium
@pytest.mark.parametrize("width, height", [(1280, 800), (390, 844), (844, 390)])
def test_the_note_can_be_read_in_the_dark_and_in_the_light(chromium, page, width, height):
    for dark in (False, True):
        seen = opened(chromium, page, "distance=4&x=0.6&steps=8", width=width, height=height, dark=dark)
        chromium.run("$('note').textContent = '112 from the nearest training latent; '.repeat(2)")
        note, stage = rectangle(chromium, "#note"), rectangle(chromium, ".stage")
        x, y = int(note["left"] - stage["left"]), int(note["top"] - stage["top"])
        ground = light(seen[y:y + int(note["height"]), x:x + int(note["width"])])
        colour = chromium.run("getComputedStyle($('note')).color.match(/\\d+/g).map(Number)")
        ink = light(torch.tensor(colour) / 255)
        contrast = (torch.maximum(ground, ink) + 0.05) / (torch.minimum(ground, ink) + 0.05)
        assert contrast.min() >= 4.5, (dark, contrast.min())


@needs_chromium
def test_reset_restores_all_that_can_be_set(chromium, page):
    opened(chromium, page, "frame=1&steps=8")
    chromium.run("set({azimuth: 10, elevation: 5, distance: 2, x: 0.1, mode: 3, density: 3, steps: 40, "
                 "axis: 2, clip: 0.4}); turning = true")
    click(chromium, "#reset")
    assert chromium.run("Object.keys(START).filter(name => state[name] !== START[name])") == []
    assert chromium.run("[state.frame, turning, +$('steps').value, +$('clip').value]") == [1, False, 96, 0]


@needs_chromium
@pytest.mark.parametrize("fragment, state", [
    ("frame=-1", dict(frame=0)), ("frame=1.5", dict(frame=2)),
    ("set=-1&frame=1", dict(set=0, frame=1)), ("set=0.6&frame=0", dict(set=1)),
    ("clip=5&steps=1e9&density=0", dict(clip=1, steps=256, density=0.01)),
    ("mode=7&axis=-2&elevation=500", dict(mode=3, axis=0, elevation=89.9)),
    ("distance=0&x=9", dict(distance=0.25, x=0.6)),
    ("frame=0&clip=nan&steps=&azimuth=Infinity", dict(clip=0, steps=96, azimuth=215))])
def test_what_the_address_asks_is_brought_within_bounds(chromium, page, fragment, state):
    chromium.open(page[0].as_uri() + "#" + fragment, width=320, height=600)
    assert chromium.run(f"(({{{', '.join(state)}}}) => ({{{', '.join(state)}}}))(state)") == state
    assert chromium.run("$('clip-is').textContent") in ("0 %", "100 %")
    assert chromium.run("$('label').textContent") and not chromium.errors


@needs_chromium
def test_it_opens_on_all_of_them_turning(chromium, page):
    look = "new Promise(go => setTimeout(() => go([state.all, turning, state.azimuth]), 300))"
    chromium.open(page[0].as_uri(), width=860, height=570)
    everything, turning, azimuth = chromium.run(look)
    assert everything and turning and azimuth > 215
    tiles = "[...document.querySelectorAll('#tiles button')].map(b => b.offsetParent && b.textContent)"
    assert chromium.run(tiles) == ["object 0", "object 1", "object 2"]
    chromium.run("turning = false; set({...HOME, steps: 24})")
    chromium.run(SETTLED.format("1"))
    chromium.run("document.querySelectorAll('#tiles canvas').forEach((e, k) => e.id = 'tile-' + k)")
    for k in range(3):                                                     # each tile shows its own object
        seen = picture(chromium, f"tile-{k}")
        ours, _ = expected(page[1][k], seen.shape, *ANGLES[0], 1.3, 24)
        assert (seen - ours).abs().mean() < 1 / 255
    click(chromium, "#tiles button:nth-child(2)")                          # a click opens one, and stops it
    assert chromium.run("[state.all, state.frame, turning, $('tiles').hidden, $('label').textContent]") == \
        [0, 1, False, True, "object 1"]
    chromium.key("g")
    assert chromium.run("[state.all, $('view').hidden]") == [1, True]
    opened(chromium, page, "frame=2")
    assert chromium.run(look) == [0, False, 215] and not chromium.errors


@needs_chromium
def test_the_page_saves_a_mesh_and_a_picture(chromium, page, tmp_path):
    opened(chromium, page, "frame=1&steps=16")
    chromium.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for kind in ("glb", "png"):
        click(chromium, f"#{kind}")
        file = tmp_path / f"object_1.{kind}"
        for _ in range(200):
            if not file.exists():
                chromium.run("new Promise(go => setTimeout(go, 50))")
    saved = np.asarray(Image.open(tmp_path / "object_1.png").convert("RGB")) / 255
    assert np.abs(saved - picture(chromium).numpy()).max() < 1 / 255

    # The same mesh as isosurface.py's: of the very bytes that the page has; nearly, of the volume itself
    _, named, indices = read_glb(tmp_path / "object_1.glb")
    position = torch.from_numpy(named["POSITION"].copy())
    faces = torch.from_numpy(indices.astype(np.int64)).view(-1, 3)
    assert closed(faces)
    content = page_content(page[0])["objects"][1]
    stored = viewer.unpack(content)[None] / torch.tensor([autodecoder.GAIN, 1, 1, 1]).view(4, 1, 1, 1)
    upright = lambda v: torch.stack([v[:, 0], v[:, 2], -v[:, 1]], 1)
    for volume, tolerance, share in ((stored, 1e-4, 1e-3), (page[1][1:2], 0.1 / 64, 0.01)):
        vertices, theirs, *_ = isosurface.mesh_of(Volumes(), volume, 64)
        assert abs(len(vertices) - len(position)) <= share * len(position)
        assert abs(len(theirs) - len(faces)) <= share * len(faces)
        for end in ("amin", "amax"):
            assert (getattr(upright(vertices), end)(0) - getattr(position, end)(0)).abs().max() < tolerance
        assert abs(volume_within(position, faces) / volume_within(upright(vertices), theirs) - 1) < share
    vertices, _, normals, colours = isosurface.mesh_of(Volumes(), stored, 64)
    some = torch.arange(0, len(position), 37)
    apart, same = torch.cdist(position[some].double(), upright(vertices).double()).min(1)
    assert apart.max() < 1e-5
    assert (torch.from_numpy(named["NORMAL"].copy())[some] * upright(normals)[same]).sum(1).mean() > 0.99
    shade = torch.from_numpy(named["COLOR_0"][:, :3].copy())[some] / 65535
    assert (shade - isosurface.linear(colours)[same]).abs().mean() < 0.01
    assert not chromium.errors


@needs_chromium
def test_without_webgl2_it_says_so_and_shows_the_still(chromium, page):
    script = ("const canvas = HTMLCanvasElement.prototype, real = canvas.getContext; canvas.getContext = "
              "function (kind, ...more) { return kind === 'webgl2' ? null : real.call(this, kind, ...more) }")
    added = chromium.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    chromium.open(page[0].as_uri() + "#frame=0")
    chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)
    assert "WebGL2" in chromium.run("document.querySelector('.notice').innerText")
    chromium.run(LOADED)
    before = picture(chromium)
    click(chromium, "#strip button:nth-child(2)")
    chromium.run(LOADED)
    assert (before < 1).any() and (picture(chromium) - before).abs().mean() > 1e-3
    assert not chromium.errors


@needs_chromium
def test_a_card_that_refuses_the_shader_leaves_the_stills(chromium, page):
    script = "WebGL2RenderingContext.prototype.getShaderParameter = () => false"
    added = chromium.call("Page.addScriptToEvaluateOnNewDocument", source=script)["identifier"]
    chromium.open(page[0].as_uri() + "#frame=0")
    chromium.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added)
    assert "refuses" in chromium.run("$('notice').innerText")
    chromium.run(LOADED)
    assert (picture(chromium) < 1).any() and chromium.run("$('strip').children.length") > 1


# ---- samples, and a run of it all ----

def test_walks_and_denoising_end_at_the_samples(diffused):
    _, _, denoiser = diffusion.load_denoiser(diffused)
    samples = denoiser.latents(diffusion.sample(denoiser, [3, 8], 5))
    path = viewer.walk(denoiser, (3, 8), 4, steps=5)
    assert (path[[0, 3]] - samples).abs().max() < 1e-3 * samples.abs().max()
    assert (path[1] - path[0]).abs().max() > 1e-2
    sigmas, moments = viewer.denoising(denoiser, 3, 4, steps=5)
    assert (moments[-1] - samples[0]).abs().max() < 1e-3 * samples.abs().max()
    assert len(moments) == len(sigmas) == 4
    assert sigmas == sorted(sigmas, reverse=True) and sigmas[-1] == 0
    assert abs(viewer.between(0, 1, 0.3)((100_000,)).std() - 1) < 0.01
    for sampler in ("heun", "ancestral"):
        trace = []
        diffusion.sample(denoiser, [0], 6, sampler, trace)
        assert len(trace) == 6 and all(a[0] > b[0] for a, b in zip(trace, trace[1:]))


def page_content(path):
    return json.loads(path.read_text().split('type="application/json">')[1].split("</script>")[0])


def test_all_of_it(trained, diffused, tmp_path, capsys):
    (tmp_path / "e/seed_000007").mkdir(parents=True)
    for kind in ("glb", "ply"):
        (tmp_path / f"e/seed_000007/mesh.{kind}").write_text("an earlier model's")
    stage.main(["--diffusion", str(diffused), "--count", "2", "--interpolate", "5", "9", "--sheet", "3",
                "--frames", "4", "--size", "32", "--steps", "4", "--level", "1", "--resolution", "24",
                "--out", str(tmp_path / "e")])
    for name in ("viewer.html", "sheet.png", "denoise.png", "walk.png"):
        assert (tmp_path / "e" / name).exists(), name
    assert not list((tmp_path / "e/seed_000007").iterdir())
    assert Image.open(tmp_path / "e/turntable.webp").n_frames == 4
    assert Image.open(tmp_path / "e/turntable.gif").n_frames == 2
    content = page_content(tmp_path / "e/viewer.html")
    assert [len(some["objects"]) for some in content["sets"]] == [2, 4 + 1, 8, 3]
    assert content["sets"][2]["about"].count("5") and content["sets"][2]["about"].count("9")
    assert {content["objects"][content["objects"][k]["beside"]]["label"] for k in range(18)} <= \
        set(autodecoder.load_autodecoder(trained)[1])
    # The colours' row: beside each stands the object whose colours it has, and that object's kind
    colours = [content["objects"][k] for k in content["sets"][3]["objects"]]
    beside = [content["objects"][one["beside"]] for one in colours]
    assert [one["label"] for one in colours] == [one["label"] for one in beside]
    assert "seed 5" in content["sets"][3]["about"] and "seed 5" in colours[0]["note"]
    assert {one["note"] for one in beside} <= set(KINDS)


def test_the_colours_row_has_one_shape_and_each_objects_colours(trained, diffused):
    model, names, denoiser = diffusion.load_denoiser(diffused)
    code = diffusion.sample(denoiser, [5], 4)[0]
    said, whose, latents = viewer.palette(model, names, "", denoiser, (5, 9), steps=4)
    assert said == "seed 5" and whose == [0, 1, 2]
    for o, latent in zip(whose, latents):
        mixed = torch.cat([code[:-9], model.palettes[o]])
        assert torch.allclose(diffusion.latents_of(model, mixed[None])[0], latent, atol=1e-5)
    said, _, latents = viewer.palette(model, names, names[1], None, None)          # of a reconstruction
    assert said == names[1]
    assert torch.allclose(latents[1], diffusion.latents_of(model, model.codes)[1], atol=1e-5)


def test_no_kind_is_named_where_none_is_known(trained, diffused, monkeypatch):
    model, names, denoiser = diffusion.load_denoiser(diffused)
    monkeypatch.setattr(viewer, "kinds_of", lambda folder, names: ["objects", "over-ear", "objects"])
    _, objects = viewer.gallery(model, names, diffusion.latents_of(model, model.codes), names)
    notes = {one["label"]: one["note"] for one in objects if "beside" not in one}
    assert notes == dict(zip(names, ["", "over-ear", ""]))


def test_reconstructions(trained, tmp_path):
    names = autodecoder.load_autodecoder(trained)[1]
    arguments = ["--autodecoder", str(trained), "--frames", "0", "--level", "1", "--out", str(tmp_path / "r")]
    stage.main([*arguments, "--reconstruct", names[1]])
    objects = page_content(tmp_path / "r/viewer.html")["objects"]
    assert objects[0]["label"] == names[1] and objects[objects[0]["beside"]]["label"] != names[1]
    for wrong, words in ((["--reconstruct", "nobody"], ("nobody", names[0])),
                         (["--count", "0"], ("--count 0",)),
                         (["--interpolate", "3"], ("--interpolate",)),
                         (["--level", "0"], ("--level 0",))):
        with pytest.raises(UserError) as error:
            stage.main([*arguments, *wrong])
        assert all(word in str(error.value) for word in words), error.value


def test_any_name_is_a_folder_of_its_own(trained, tmp_path, monkeypatch, capsys):
    """Written into a folder whose name is no UTF-8, from the checkpoint before a last.pt that is missing"""
    state, names = common.load_checkpoint(trained / "last.pt"), ["a b", "a_b", "<b>|&\u00e9"]
    common.save_checkpoint(tmp_path / "run/previous.pt", state | {"names": names})
    out = tmp_path / "caf\udce9"
    write = lambda path, *_: common.save_text(path, path.parent.name) or True
    monkeypatch.setattr(stage, "write_mesh", write)
    flags = ["--autodecoder", str(tmp_path / "run"), "--reconstruct", "all", "--frames", "0",
             "--out", str(out)]
    stage.main(flags)
    said = capsys.readouterr().out
    assert "previous.pt" in said and "caf\\udce9/a b/mesh.glb" in said
    assert {path.parent.name: path.read_text() for path in out.glob("*/mesh.glb")} == dict(zip(names, names))
    assert [one["label"] for one in page_content(out / "viewer.html")["objects"][:3]] == names
    held = common.Run(out, "export", stage.Config(), (), "export.json", stale=())
    with pytest.raises(UserError, match="another run is writing"):
        stage.main(flags)
    held.lock.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        stage.main([*flags, "--out", str(tmp_path / "file")])

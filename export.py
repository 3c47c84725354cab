"""
After stage 3: things to look at and to take away.  Volumes become meshes that other programs open, moving
pictures, and one page that renders them in a browser: viewer.html, volume_render.py once more as a shader.

A surface is where the density, before its softplus, crosses a level: the zeros of

    f(x) = GAIN channel(x) - level,      f > 0 inside,      normal = -grad f / |grad f|

Marching tetrahedra finds them.  Each cube between eight grid points is cut into six tetrahedra; in each, f
is taken to be linear, and its zeros are a triangle or two.  A tetrahedron has four corners, inside or
outside: 16 cases, where a cube has 256, some of them ambiguous.  Neighbours share whole faces: no holes.

in   runs/diffusion and its autodecoder; or with --reconstruct the autodecoder alone
out  export/     viewer.html (open it in a browser), turntable.webp and .gif, sheet.png, denoise.png,
                 walk.png; and for each object <name>/mesh.glb, a mesh with colours (glTF 2.0)
run  python export.py                                 eight samples and all of the above: 18 s on one core
     python export.py --interpolate 3 12              walks from seed 3 to seed 12
     python export.py --reconstruct train_00001 --out export/train_00001
read Config, marching_tetrahedra, mesh_of, write_glb, pack; then viewer_template.html.
"""
import base64
import io
import itertools
import json
import struct
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from autodecoder import kinds_of, load_autodecoder
from common import UserError, at_least, atomic_file, grid, parse_config, pick_device, save_picture, to_bytes
from decoder import GAIN
from denoiser import sample
from diffusion import latents_of
from sample import cameras, load_models, nearest, render_views
from volume_render import EMPTY, composite, either, lookup


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder, or a file that sample.py --pack wrote
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "export"                  # folder for all that is written
    reconstruct: str = ""                # a training object's name, or all: these in place of samples
    count: int = 8                       # how many samples, on the page and as meshes
    seed: int = 0                        # sample k comes from seed + k alone
    steps: int = 0                       # of the sampler; 0: 18 for EDM, 1000 for DDPM
    interpolate: tuple = ()              # two seeds to walk between; by default the first two samples'
    sheet: int = 60                      # samples on the contact sheet; 0: none
    resolution: int = 64                 # grid points along a side that the mesh is made from
    level: float = 20.0                  # the density of the surface: 1/30 of it halves the light
    frames: int = 24                     # of the turntable; 0: none
    size: int = 160                      # pixels along a side of each object on the turntable
    device: str = "auto"                 # auto, cpu or cuda


ANGLE = (215, 25)                        # azimuth, elevation: of stills and sheets, as sample.py's
TEMPLATE = Path(__file__).parent / "viewer_template.html"


# ------------------------------------------------------------------------------------- marching tetrahedra

# A tetrahedron's corners are 0 to 3, its edges are these pairs of them
PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
# The triangles of each case; bit i of its number: is corner i inside?  Each corner of a triangle lies on an
# edge.  Seen from outside they run counter-clockwise, in a tetrahedron in which corners 1, 2, 3 do so when
# seen from the far side of 0 (det > 0).  A case and its complement have the same triangles, turned round.
CASES = ["", "01 02 03", "01 13 12", "02 03 13  02 13 12",
         "02 12 23", "01 12 23  01 23 03", "01 13 23  01 23 02", "03 13 23",
         "03 23 13", "01 23 13  01 02 23", "01 23 12  01 03 23", "02 23 12",
         "02 13 03  02 12 13", "01 12 13", "01 03 02", ""]
TABLE = torch.full((16, 6), -1)
for number, edges in enumerate(CASES):
    for place, (a, b) in enumerate(edges.split()):
        TABLE[number, place] = PAIRS.index((int(a), int(b)))


def marching_tetrahedra(f):
    """f (D,H,W), positive inside -> vertices (N,3) in units of the grid, x first; faces (F,3) of them,
    counter-clockwise from outside.  The surface is closed wherever f's outermost layer is negative."""
    D, H, W = f.shape
    stride, device = (H * W, W, 1), f.device
    f, inside = f.reshape(-1), (f > 0).view(D, H, W)
    within = lambda z, y, x: inside[z:D - 1 + z, y:H - 1 + y, x:W - 1 + x].reshape(-1)
    first = torch.arange(D * H * W, device=device).view(D, H, W)[:-1, :-1, :-1].reshape(-1)   # of each cube

    # Each tetrahedron's edges that are cut: an edge is known by its lower end and by its direction, 1 to 7
    # (bits z, y, x), so that the tetrahedra around it agree which vertex it carries
    cuts = []
    for order in itertools.permutations(range(3)):            # from the cube's first corner along the axes
        corner = [(0, 0, 0)]
        for axis in order:
            corner.append(tuple(c + (a == axis) for a, c in enumerate(corner[-1])))
        case = sum(within(*c).byte() << i for i, c in enumerate(corner))                      # (cubes,)
        cell = ((case > 0) & (case < 15)).nonzero()[:, 0]
        offset = torch.tensor([sum(s * c for s, c in zip(stride, at)) for at in corner], device=device)
        kind = torch.tensor([4 * z + 2 * y + x for z, y, x in corner], device=device)
        lower, upper = torch.tensor(PAIRS, device=device).T
        edge = (first[cell, None] + offset[lower]) * 8 + kind[upper] - kind[lower]            # (n,6)
        table = TABLE.to(device)[case[cell].long()]                                           # (n,6)
        faces = edge.gather(1, table.clamp(min=0)).view(-1, 3)[table.view(-1, 3)[:, 0] >= 0]  # (2n or less,3)
        odd = sum(a > b for a, b in itertools.combinations(order, 2)) % 2
        cuts.append(faces if odd else faces.flip(1))          # axes counted from z are a left-handed three
    edge, faces = torch.cat(cuts).unique(return_inverse=True)                                 # (N,), (F,3)

    # Where f is zero on each; never quite at its ends, where vertices of several edges would coincide
    a, kind = edge // 8, edge % 8
    step = torch.stack([kind & 1, kind >> 1 & 1, kind >> 2], 1)                               # (N,3) x, y, z
    b = a + step @ torch.tensor(stride[::-1], device=device)
    share = (f[a] / (f[a] - f[b])).clamp(0.001, 0.999)
    at = torch.stack([a % W, a // W % H, a // (H * W)], 1)
    return at + share[:, None] * step, faces


def bake(model, volume, resolution):
    """volume (1,C,D,H,W), whatever its head -> (4,N,N,N): density and colours before activation, at the
    centres of N^3 voxels.  What lies between is to be interpolated, then activated: the volume of a voxel
    head comes back unchanged at its own resolution."""
    if model.config.head == "voxel" and resolution == volume.shape[-1]:
        return volume[0]
    centre = (torch.arange(resolution, device=volume.device) + 0.5) / resolution - 0.5
    position = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij")[::-1], -1)[None]
    return model.before_activation(lookup(volume, position), position)[0].movedim(-1, 0)


def closed(f):
    """f (N,N,N) -> (N+2,N+2,N+2): a layer around it puts zeros on the cube's faces, where rays end too"""
    f = F.pad(f[None, None], (1,) * 6, mode="replicate")[0, 0]
    shell = F.pad(torch.zeros_like(f[1:-1, 1:-1, 1:-1], dtype=torch.bool), (1,) * 6, value=True)
    return torch.where(shell, -f.abs() - 1e-6, f)


@torch.no_grad()
def mesh_of(model, volume, resolution=64, level=20.0):
    """volume (1,C,D,H,W) -> vertices (N,3) in the world, faces (F,3), normals (N,3), colours (N,3)"""
    f = GAIN * bake(model, volume, resolution)[0] - level     # softplus(level) = level: it is far from 0
    vertices, faces = marching_tetrahedra(closed(f))
    vertices = (vertices - 0.5) / resolution - 0.5           # index 1 is the first voxel, whose centre is 0.5
    normals = outward(f, vertices)
    return vertices, faces, normals, seen_colours(model, volume, vertices, normals)


def outward(f, points):
    """f (N,N,N), points (P,3) -> (P,3): -grad f / |grad f|, by differences over two voxels"""
    shift = torch.eye(3, device=f.device) / f.shape[-1]
    around = torch.stack([points + way * axis for axis in shift for way in (-1, 1)])          # (6,P,3)
    value = lookup(f[None, None], around[None])[0, ..., 0]                                    # (6,P)
    return F.normalize(value[0::2] - value[1::2], dim=0).T.contiguous()


def seen_colours(model, volume, points, normals, bins=8):
    """What a camera straight above each point sees: a short ray, from a voxel above it to two below.  The
    colour at the very point counts for little in a photo, and so was learnt from little."""
    voxel = 1 / volume.shape[-1]
    t = ((torch.arange(bins, device=points.device) + 0.5) / bins * 3 - 1) * voxel
    position = (points[:, None] - t[:, None] * normals[:, None])[None]                        # (1,P,S,3)
    sigma, rgb = model.field(lookup(volume, position), position)
    rgb, alpha, _ = composite(sigma, rgb, 3 * voxel / bins, t, background=0)
    return (rgb / alpha.clamp(min=1e-3)[..., None])[0].clamp(0, 1)


def write_glb(path, vertices, faces, normals, colours):
    """A binary glTF 2.0: one mesh, unlit, since its colours already are what photos showed.  glTF wants +Y
    up, linear colours, and every part to begin at a multiple of four bytes."""
    upright = lambda v: torch.stack([v[:, 0], v[:, 2], -v[:, 1]], 1).cpu().numpy().astype("<f4")
    position = upright(vertices)
    rgba = F.pad((linear(colours) * 65535).round(), (0, 1), value=65535).cpu().numpy().astype("<u2")
    arrays = (position, upright(normals), rgba, faces.cpu().numpy().astype("<u4").reshape(-1))
    views, accessors, begin = [], [], 0
    codes = (5126, 5126, 5123, 5125)                                       # float, float, 16 and 32 bits
    for array, code, kind in zip(arrays, codes, ("VEC3", "VEC3", "VEC4", "SCALAR")):
        target = 34963 if kind == "SCALAR" else 34962                      # indices, or of vertices
        views.append(dict(buffer=0, byteOffset=begin, byteLength=array.nbytes, target=target))
        accessors.append(dict(bufferView=len(views) - 1, componentType=code, count=len(array), type=kind))
        begin += array.nbytes
    accessors[0].update(min=position.min(0).tolist(), max=position.max(0).tolist())
    accessors[2].update(normalized=True)
    attributes = dict(POSITION=0, NORMAL=1, COLOR_0=2)
    material = dict(pbrMetallicRoughness=dict(metallicFactor=0, roughnessFactor=1),
                    extensions=dict(KHR_materials_unlit={}))
    document = dict(asset=dict(version="2.0", generator="export.py"), extensionsUsed=["KHR_materials_unlit"],
                    scene=0, scenes=[dict(nodes=[0])], nodes=[dict(mesh=0)], materials=[material],
                    meshes=[dict(primitives=[dict(attributes=attributes, indices=3, material=0)])],
                    buffers=[dict(byteLength=begin)], bufferViews=views, accessors=accessors)
    text = json.dumps(document, separators=(",", ":")).encode()
    chunks = ((b"JSON", text + b" " * (-len(text) % 4)), (b"BIN\0", b"".join(a.tobytes() for a in arrays)))
    body = b"".join(struct.pack("<I4s", len(data), name) + data for name, data in chunks)
    with atomic_file(path) as temporary:
        temporary.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(body)) + body)


def linear(srgb):
    """Colours as screens take them -> proportional to light (IEC 61966-2-1)"""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


@torch.no_grad()
def write_mesh(path, model, latent, resolution=64, level=20.0):
    """-> whether there was anything to write"""
    vertices, faces, normals, colours = mesh_of(model, model.to_volume(latent[None]), resolution, level)
    if len(faces) == 0:                          # glTF allows no mesh of nothing
        print(f"{path} is not written: nothing in its volume is as dense as {level:g}")
        return False
    write_glb(path, vertices, faces, normals, colours)
    return True


# ----------------------------------------------------------------------------------------- the page's volumes

def pack(channels):
    """channels (4,N,N,N) before activation, density times GAIN -> a dict for the page: 8 bits a number, and
    only of the voxels that some sample in a non-empty cell can see: about one in twelve.  A bit for each
    voxel says whether it is one; their bytes follow, in the same order."""
    dense = F.softplus(channels[None, 0]) > EMPTY
    seen = either(either(F.pad(dense, (1,) * 6)))[0]                              # those, and all beside them
    values = channels[:, seen] if seen.any() else channels.new_tensor([-20.0, 0, 0, 0])[:, None]
    low, high = values.amin(1), values.amax(1)
    low[0] = low[0].clamp(max=-20)               # what is not stored is byte 0, and must be empty
    high = torch.maximum(high, low + 1e-6)
    bytes_ = ((values - low[:, None]) / (high - low)[:, None] * 255).round().byte()
    data = np.packbits(seen.cpu().numpy(), bitorder="little").tobytes()
    data += bytes_.T.cpu().numpy().tobytes() if seen.any() else b""
    return dict(n=channels.shape[-1], low=low.tolist(), span=(high - low).tolist(),
                data=base64.b64encode(data).decode())


def unpack(packed):
    """What the page makes of it -> (4,N,N,N)"""
    n, data = packed["n"], base64.b64decode(packed["data"])
    bits = -(-n ** 3 // 8)
    seen = np.unpackbits(np.frombuffer(data[:bits], np.uint8), count=n ** 3, bitorder="little").astype(bool)
    texels = np.zeros((n ** 3, 4), np.uint8)
    texels[seen] = np.frombuffer(data[bits:], np.uint8).reshape(-1, 4)
    low, span = (torch.tensor(packed[key])[:, None] for key in ("low", "span"))
    return (low + span * torch.from_numpy(texels).T / 255).view(4, n, n, n)


def bake_for_page(model, volume, resolution):
    gain = torch.tensor([GAIN, 1, 1, 1], device=volume.device)
    return bake(model, volume, resolution) * gain.view(4, 1, 1, 1)


@torch.no_grad()
def page_objects(model, latents, labels, notes, most=64):
    """latents (B,...), a label and a note each -> dicts for the page, each with a still of 192 pixels and at
    most `most` voxels a side"""
    objects = []
    rgb, alpha, *_ = render_views(model, latents, cameras([ANGLE]), 192)
    for k, latent in enumerate(latents):
        volume = model.to_volume(latent[None])
        # The mlp head makes more of a volume than its voxels: baked at their size it loses 1.0 dB, at twice
        # that 0.14
        fine = volume.shape[-1] * (2 if model.config.head == "mlp" else 1)
        objects.append(dict(label=labels[k], note=notes[k], still=data_uri(rgb[k, 0], alpha[k, 0]),
                            **pack(bake_for_page(model, volume, min(fine, most)))))
    return objects


def data_uri(rgb, alpha):
    """A picture on white -> on nothing, so that it suits a dark page too"""
    rgb = (rgb - 1 + alpha[..., None]) / alpha.clamp(min=1 / 255)[..., None]
    pixels = to_bytes(torch.cat([rgb, alpha[..., None]], -1)).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "WEBP", quality=80, method=1)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def write_page(path, title, about, sets, objects, samples):
    """sets: [(name, what it is, indices of its objects)]; samples: bins along a ray, at first"""
    content = dict(title=title, about=about, samples=samples, objects=objects,
                   sets=[dict(zip(("name", "about", "objects"), some)) for some in sets])
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")     # no name can end the script
    with atomic_file(path) as temporary:
        temporary.write_text(TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text), encoding="utf-8")


# ------------------------------------------------------------------------------------------ motion and sheets

def sheet(model, latents, columns, size=96):
    """One view of each -> (rows,columns) of them, bytes"""
    rgb = render_views(model, latents, cameras([ANGLE]), size)[0][:, 0]
    return grid(to_bytes(rgb), columns)


def turntable(model, latents, frames, size):
    """-> a list of pictures: all the objects, turned together"""
    poses = cameras([(ANGLE[0] + 360 * k / frames, 20) for k in range(frames)])
    columns, turns = -(-len(latents) // -(-len(latents) // 4)), []                # rows of four or less, even
    for k, latent in enumerate(latents):
        turns.append(to_bytes(render_views(model, latent[None], poses, size)[0][0]))
        print(f"turntable {k + 1}/{len(latents)}", flush=True)
    return [Image.fromarray(grid(frame, columns)) for frame in torch.stack(turns, 1)]


def save_motion(path, pictures, seconds=4, **options):
    with atomic_file(path) as temporary:
        pictures[0].save(temporary, path.suffix[1:].upper(), save_all=True, append_images=pictures[1:],
                         loop=0, duration=round(1000 * seconds / len(pictures)), **options)


def small(pictures):
    """For a README: half the frames, at most 480 pixels wide, 128 colours"""
    scale = min(1, 480 / pictures[0].width)
    size = (round(pictures[0].width * scale), round(pictures[0].height * scale))
    return [p.resize(size, Image.LANCZOS).quantize(128, Image.Quantize.MAXCOVERAGE) for p in pictures[::2]]


# ---------------------------------------------------------------------------------------------- what is shown

def denoising(denoiser, seed, steps=0, count=12):
    """-> `count` noise levels, and the latents (count,...) that the denoiser expects; last, the sample"""
    trace = []
    trace.append((0.0, sample(denoiser, [seed], steps, trace)))
    chosen = torch.linspace(0, len(trace) - 1, min(count, len(trace))).round().long().tolist()
    return [trace[k][0] for k in chosen], torch.cat([trace[k][1] for k in chosen])


def walk(denoiser, pair, steps=0, count=8):
    """Samples of noise between two seeds' -> latents (count,...)"""
    return sample(denoiser, [(*pair, share) for share in torch.linspace(0, 1, count).tolist()], steps)


def gallery(model, names, latents, labels, denoiser=None, pair=None, steps=0):
    """-> the page's sets and objects: these latents, and with a denoiser how the first of the seeds `pair`
    came out of noise, and a walk between the two; last, whichever training object is the nearest of each"""
    training = latents_of(model, model.codes)
    apart = nearest(training, training, itself=True)[0][:, 0]
    shown = [("Samples" if denoiser else "Reconstructions", "", latents, labels, 64)]
    if denoiser:
        sigmas, moments = denoising(denoiser, pair[0], steps)
        path, (a, b) = walk(denoiser, pair, steps), pair
        levels = [f"\u03c3 = {sigma:.3g}" for sigma in sigmas[:-1]]
        between = [f"{k} of {len(path) - 1}" for k in range(1, len(path) - 1)]
        shown += [("Denoising", f"Where the denoiser expects to end, as seed {a}'s noise (\u03c3) falls.",
                   moments, [*levels, f"seed {a}"], 32),
                  ("Walk", f"Samples of the noise between seed {a}'s and seed {b}'s.", path,
                   [f"seed {a}", *between, f"seed {b}"], 64)]
    sets, objects, whose = [], [], []
    for name, about, some, said, most in shown:
        distance, near = nearest(some, training)
        k = int(not denoiser and len(names) > 1)              # a reconstruction's nearest is itself
        notes = [f"{d:.0f} from the nearest{'' if denoiser else ' other'} training latent; those are "
                 f"{apart.mean():.0f} from their own nearest" if len(names) > 1 else ""
                 for d in distance[:, k].tolist()]
        sets.append((name, about, list(range(len(objects), len(objects) + len(some)))))
        objects += page_objects(model, some, said, notes, most)
        whose += near[:, k].tolist()
    kinds, used = kinds_of(model.config.data, names), sorted(set(whose))
    for packed, o in zip(objects, whose):
        packed["beside"] = len(objects) + used.index(o)
    objects += page_objects(model, training[used], [names[o] for o in used], [kinds[o] for o in used])
    return sets, objects


def write_gallery(path, model, names, latents, labels, denoiser=None, pair=None, steps=0):
    sets, objects = gallery(model, names, latents, labels, denoiser, pair, steps)
    what = Path(model.config.data).name.removesuffix("_train")
    said = "samples, none picked" if denoiser else "training objects, reconstructed"
    size = " \u00d7 ".join([str(objects[0]["n"])] * 3)
    about = f"{len(latents)} {said}: volumes of {size} voxels, ray-marched by your browser."
    title = f"{'New' if denoiser else 'Known'} {what}"
    write_page(path, title, about, sets, objects, 2 * model.config.samples)


# ------------------------------------------------------------------------------------------------------- main

def load(config, device):
    """-> autodecoder, its objects' names, denoiser (none for reconstructions of a stage 1 by itself)"""
    folder = config.autodecoder or "runs/autodecoder"
    alone = config.autodecoder or config.diffusion == Config.diffusion
    if config.reconstruct and alone and Path(folder, "last.pt").exists():
        return *load_autodecoder(folder, device), None
    return load_models(config, device)


def check(config):
    at_least(config, count=1, steps=0, sheet=0, resolution=8, frames=0, size=16)
    if config.level < 1:
        raise UserError(f"--level {config.level:g}: a density of at least 1 is wanted; the cube full of that "
                        "lets a third through")


def main(argv=None):
    config = parse_config(Config, argv=argv)
    check(config)
    began, out, device = time.perf_counter(), Path(config.out), pick_device(config.device)
    model, names, denoiser = load(config, device)
    if config.reconstruct:
        labels = names if config.reconstruct == "all" else [config.reconstruct]
        if labels[0] not in names:
            raise UserError(f"--reconstruct {config.reconstruct}: the {len(names)} objects that were learnt "
                            f"are {names[0]} to {names[-1]}; or all")
        latents = latents_of(model, model.codes[[names.index(name) for name in labels]])
    else:
        seeds = range(config.seed, config.seed + config.count)
        latents, labels = sample(denoiser, seeds, config.steps), [f"seed {seed}" for seed in seeds]
    pair = config.interpolate or (config.seed, config.seed + 1)

    def wrote(name):
        size = (out / name).stat().st_size / 1e6
        print(f"{time.perf_counter() - began:5.1f} s  {out / name}  {size:.2f} MB", flush=True)

    write_gallery(out / "viewer.html", model, names, latents, labels, denoiser, pair, config.steps)
    wrote("viewer.html")
    for label, latent in zip(labels, latents):
        name = label.replace(" ", "_") + "/mesh.glb"
        if write_mesh(out / name, model, latent, config.resolution, config.level):
            wrote(name)
    pictures = {}
    if denoiser:
        pictures["denoise.png"] = sheet(model, denoising(denoiser, pair[0], config.steps)[1], 12)
        pictures["walk.png"] = sheet(model, walk(denoiser, pair, config.steps), 8)
    if denoiser and config.sheet:
        many = sample(denoiser, range(config.seed, config.seed + config.sheet), config.steps)
        pictures["sheet.png"] = sheet(model, many, 10)
    for name, picture in pictures.items():
        save_picture(out / name, picture)
        wrote(name)
    if config.frames:
        motion = turntable(model, latents, config.frames, config.size)
        save_motion(out / "turntable.webp", motion, quality=80, method=4)
        wrote("turntable.webp")
        save_motion(out / "turntable.gif", small(motion), optimize=True)
        wrote("turntable.gif")


if __name__ == "__main__":
    main()

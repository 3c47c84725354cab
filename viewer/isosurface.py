"""
From a volume to a mesh that other programs open.

A surface is where the density, before its softplus, crosses a level: the zeros of

    f(x) = GAIN channel(x) - level,      f > 0 inside,      normal = -grad f / |grad f|

Marching tetrahedra finds them.  Each cube between eight grid points is cut into six tetrahedra; in each, f
is taken to be linear, and its zeros are a triangle or two.  A tetrahedron has four corners, inside or
outside: 16 cases, where a cube has 256, some of them ambiguous.  Neighbours share whole faces: no holes.

in   a volume of the decoder's
out  mesh.glb: vertices, faces, normals and colours, as binary glTF 2.0; mesh.ply: the same, as binary PLY
read marching_tetrahedra, mesh_of, seen_colours, write_glb, write_ply.
"""
import itertools
import json
import struct

import numpy as np
import torch
import torch.nn.functional as F

from autodecoder import GAIN
from common import atomic_file, to_bytes
from volume_render import composite, lookup

LEVEL = 20.0                         # the density of the surface: 1/30 of the cube of it halves the light

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


# ------------------------------------------------------------------------------------------- of a volume

def bake(volume, resolution):
    """volume (1,4,D,H,W) -> (4,N,N,N): density and colours before activation, at the centres of N^3 voxels.
    At its own resolution the volume comes back unchanged."""
    if resolution == volume.shape[-1]:
        return volume[0]
    centre = (torch.arange(resolution, device=volume.device) + 0.5) / resolution - 0.5
    position = torch.stack(torch.meshgrid(centre, centre, centre, indexing="ij")[::-1], -1)[None]
    return lookup(volume, position)[0].movedim(-1, 0)


def closed(f):
    """f (N,N,N) -> (N+2,N+2,N+2): a layer around it puts zeros on the cube's faces, where rays end too"""
    f = F.pad(f[None, None], (1,) * 6, mode="replicate")[0, 0]
    shell = F.pad(torch.zeros_like(f[1:-1, 1:-1, 1:-1], dtype=torch.bool), (1,) * 6, value=True)
    return torch.where(shell, -f.abs() - 1e-6, f)


@torch.no_grad()
def mesh_of(model, volume, resolution=64, level=LEVEL):
    """volume (1,C,D,H,W) -> vertices (N,3) in the world, faces (F,3), normals (N,3), colours (N,3)"""
    f = GAIN * bake(volume, resolution)[0] - level     # softplus(level) = level: it is far from 0
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


# ------------------------------------------------------------------------------------------------ the files

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
    document = dict(asset=dict(version="2.0", generator="isosurface.py"),
                    extensionsUsed=["KHR_materials_unlit"], scene=0, scenes=[dict(nodes=[0])],
                    nodes=[dict(mesh=0)], materials=[material],
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


def write_ply(path, vertices, faces, normals, colours):
    """A binary PLY, for programs that lose a GLB's colours.  PLY has no rule for axes and colours: here they
    are the world's (Z up) and as screens take them, in 8 bits."""
    point = [(name, "<f4") for name in ("x", "y", "z", "nx", "ny", "nz")]
    points = np.empty(len(vertices), point + [(name, "u1") for name in ("red", "green", "blue")])
    for name, column in zip(points.dtype.names, torch.cat([vertices, normals, to_bytes(colours)], 1).cpu().T):
        points[name] = column
    triangles = np.empty(len(faces), [("count", "u1"), ("corners", "<i4", 3)])
    triangles["count"], triangles["corners"] = 3, faces.cpu()
    words = {"<f4": "float", "|u1": "uchar"}
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
              *(f"property {words[kind]} {name}" for name, kind in points.dtype.descr),
              f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header\n"]
    with atomic_file(path) as temporary:
        temporary.write_bytes("\n".join(header).encode() + points.tobytes() + triangles.tobytes())


@torch.no_grad()
def write_mesh(path, model, latent, resolution=64, level=LEVEL):
    """mesh.glb, and mesh.ply beside it -> whether there was anything to write"""
    vertices, faces, normals, colours = mesh_of(model, model.to_volume(latent[None]), resolution, level)
    if len(faces) == 0:                          # glTF allows no mesh of nothing
        print(f"{path} is not written: nothing in its volume is as dense as {level:g}")
        return False
    write_glb(path, vertices, faces, normals, colours)
    write_ply(path.with_suffix(".ply"), vertices, faces, normals, colours)
    return True

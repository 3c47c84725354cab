"""
Where a point of the world lands in a picture, and which surface is seen there: stage 0's rasteriser.

A camera, in OpenCV's axes:

    camera_to_world = [ right  down  forward  position ]        x_camera = R^T (x_world - position)
    pixel           = (f X/Z + cx,  f Y/Z + cy)                 and depth is Z, not the distance

The rasteriser turns each triangle into *spans*: the runs of pixels that one row of the picture has in common
with it.  All rows of all faces are cut at once, then all pixels of all spans are written at once, so that
its cost follows the faces and the pixels that they cover, never their product.

read to_world, rasterize, visible_faces, z_buffers, resolve.
"""
import functools
import math
from dataclasses import replace

import torch

from common import UserError

TIE = 1e-4                         # depths closer than this are the same depth
NO_FACE = torch.iinfo(torch.int64).max      # what stands in a z-buffer where no face is
NEAR = 1e-3             # faces that reach behind this depth are dropped: our cameras stand outside the object
SPAN_PIXELS = 1 << 22              # pixels written at once, which bounds the memory: about 200 MB


# ------------------------------------------------------------------------------------------------------ world

def to_world(mesh):
    """ShapeNet's Y-up mesh in the project's world, and the 4x4 that took it there: (x, y, z) -> (x, -z, y),
    then the centre of the bounding box of the faces to the origin and its diagonal to 1."""
    turn = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    corners = mesh.vertices[mesh.faces.unique()] @ turn.T
    low, high = corners.amin(0), corners.amax(0)
    diagonal = (high - low).norm()
    if not 1e-12 < diagonal < 1e30:
        raise UserError(f"the mesh has no extent (its diagonal is {diagonal:.3g})")
    transform = torch.eye(4, dtype=torch.float64)
    transform[:3, :3] = turn / diagonal
    transform[:3, 3] = -(low + high) / 2 / diagonal
    return replace(mesh, vertices=mesh.vertices @ transform[:3, :3].T + transform[:3, 3]), transform


# ------------------------------------------------------------------------------------------------- rasteriser

def rasterize(mesh, camera_to_world, intrinsics, size, supersample=1, renderer="torch"):
    """mesh, (4,4), (3,3), pixels a side -> rgb (H,W,3) on white, coverage (H,W), depth
    (H,W; inf where nothing is).

    With supersample > 1 colour and coverage are box-filtered; depth is the nearest sample's, since a mean of
    two depths is a point where nothing is."""
    fine = size * supersample
    K = torch.as_tensor(intrinsics, dtype=torch.float64, device=mesh.vertices.device).clone()
    K[:2] *= supersample
    pose = torch.as_tensor(camera_to_world, dtype=torch.float64, device=mesh.vertices.device)
    camera = (mesh.vertices - pose[:3, 3]) @ pose[:3, :3]                               # (N,3)
    visible = visible_faces if renderer == "torch" else visible_faces_pytorch3d
    pixel, face, bary, z = visible(mesh, camera, K, fine)                               # P visible pixels
    colour = surface_colour(mesh, face, bary)                                           # (P,3)

    # Each sample adds its share to the pixel that it lies in; white is what is left
    share = 1 / supersample ** 2
    pixel = pixel // fine // supersample * size + pixel % fine // supersample
    shares = torch.full_like(z, share, dtype=torch.float32)
    coverage = torch.zeros(size * size, device=z.device).index_add_(0, pixel, shares)
    rgb = (1 - coverage)[:, None].repeat(1, 3).index_add_(0, pixel, colour * share)
    depth = torch.full((size * size,), math.inf, device=z.device).scatter_reduce_(0, pixel, z.float(), "amin")
    return rgb.view(size, size, 3), coverage.view(size, size), depth.view(size, size)


# Over the first dimension, of three or four rows, where amin and amax on a CPU are ten times slower
smallest = lambda rows: functools.reduce(torch.minimum, rows)
largest = lambda rows: functools.reduce(torch.maximum, rows)


def visible_faces(mesh, camera, K, size):
    """camera (N,3): vertices in the camera's axes -> the pixels that see a face, flat (P,), their faces (P,),
    the perspective-correct weights of its corners (3,P) and the depths (P,).

    In the picture a triangle's 1/Z is an affine function of x and y, which is why 1/Z is what gets
    interpolated.  The arithmetic is float64: ties in depth must not be decided by rounding."""
    kept, x, y, iz, area, top, rows, columns = faces_in_picture(mesh, camera, K, size)
    # A face that is counter-clockwise from its front runs clockwise in a picture whose y points down: its
    # area is negative
    rank = torch.where(area < 0, 0, 2) + (~mesh.textured[mesh.material[kept]]).long()   # (F,) 0: the best
    pixel, f = resolve(z_buffers(x, y, iz, area, rank, top, rows, columns, size))

    # A corner's weight is the area that the pixel spans with the opposite edge, over the whole; then divided
    # by Z
    px, py, x, y = pixel % size + 0.5, pixel // size + 0.5, x.index_select(1, f), y.index_select(1, f)
    dx, dy = x - px, y - py
    weight = (dx.roll(-1, 0) * dy.roll(-2, 0) - dx.roll(-2, 0) * dy.roll(-1, 0)) / area[f]
    weight = weight.clamp(0, 1) * iz.index_select(1, f)
    inverse = weight.sum(0)
    return pixel, kept[f], weight / inverse, 1 / inverse


def centres(edge, size):
    """The first pixel, or pixel row, whose centre c + 0.5 is not before `edge`.

    A centre lies between two edges when centres(left) <= c < centres(right): the left edge is in and the
    right one out, so that two faces with a common edge share no pixel and leave none."""
    return (edge.nan_to_num(0, 0, 0) - 0.5).ceil().clamp(0, size).long()


def faces_in_picture(mesh, camera, K, size):
    """-> of the F faces that may cover a pixel: which they are (F,), their corners' x, y in the picture and
    1/Z (3,F), twice their signed area there, their first row, how many rows and columns they span (F,)"""
    z = camera[:, 2]
    screen = torch.stack([camera[:, 0] / z * K[0, 0] + K[0, 2], camera[:, 1] / z * K[1, 1] + K[1, 2], z], 1)
    x, y, z = screen.index_select(0, mesh.faces.T.reshape(-1)).T.reshape(3, 3, -1)      # (3,F) each
    area = (x[1] - x[0]) * (y[2] - y[0]) - (x[2] - x[0]) * (y[1] - y[0])                # (F,)
    top, left = centres(smallest(y), size), centres(smallest(x), size)
    rows, columns = centres(largest(y), size) - top, centres(largest(x), size) - left
    kept = ((smallest(z) > NEAR) & (rows > 0) & (columns > 0) & (area.abs() > 1e-12)).nonzero()[:, 0]
    return kept, x[:, kept], y[:, kept], 1 / z[:, kept], area[kept], top[kept], rows[kept], columns[kept]


def z_buffers(x, y, iz, area, rank, top, rows, columns, size):
    """The faces_in_picture, and their rank (F,) -> (4,H*W) int64, one z-buffer a rank.

    An entry packs (depth, face) into 64 bits, so that one minimum finds the nearest face and, among equals,
    the first: the bits of positive floats are in the order of their values."""
    # 1/Z = c + gx x + gy y, and dx/dy along the edges 0-1, 1-2, 2-0
    gx = ((iz[1] - iz[0]) * (y[2] - y[0]) - (iz[2] - iz[0]) * (y[1] - y[0])) / area
    gy = ((iz[2] - iz[0]) * (x[1] - x[0]) - (iz[1] - iz[0]) * (x[2] - x[0])) / area
    slope = (x.roll(-1, 0) - x) / (y.roll(-1, 0) - y)
    plane = torch.stack([iz[0] - gx * x[0] - gy * y[0], gx, gy, smallest(iz), largest(iz)])
    table = torch.cat([x, y, slope, plane]).T.contiguous()                              # (F,14)

    buffer = torch.full((4 * size * size,), NO_FACE, device=x.device)
    load = (rows * columns + 1).cumsum(0) // SPAN_PIXELS           # faces with the same are cut together
    counts = load.unique_consecutive(return_counts=True)[1].tolist()
    for chunk in torch.arange(len(rows), device=x.device).split(counts):
        f, row, first, length, begin, step = cut_spans(chunk, top[chunk], rows[chunk], table, size)     # (T,)
        before = length.cumsum(0) - length                                   # (T,) pixels in the spans before
        target = (rank[f] * size + row) * size + first - before
        whole = torch.stack([target, f], 1).repeat_interleave(length, 0)                # (P,2)
        real = torch.stack([begin - before * step, step], 1).repeat_interleave(length, 0)
        pixel = torch.arange(len(whole), device=x.device)
        depth = (1 / (real[:, 0] + pixel * real[:, 1])).float()
        entry = depth.view(torch.int32).long() << 32 | whole[:, 1]
        buffer.scatter_reduce_(0, whole[:, 0] + pixel, entry, "amin")
    return buffer.view(4, -1)


def cut_spans(faces, top, rows, table, size):
    """Faces, their first rows and numbers of rows -> of each span (T,) its face, its row, its first pixel,
    how many it has, 1/Z at the first and what each further one adds to it."""
    f = torch.repeat_interleave(faces, rows)                                            # (T,)
    row = torch.arange(len(f), device=f.device) - (rows.cumsum(0) - rows - top).repeat_interleave(rows)
    x0, x1, x2, y0, y1, y2, s0, s1, s2, c, gx, gy, least, most = table.index_select(0, f).T
    # The row's line crosses two of the three edges
    line = row + 0.5
    below0, below1, below2 = y0 <= line, y1 <= line, y2 <= line
    cut = torch.stack([x0 + (line - y0) * s0, x1 + (line - y1) * s1, x2 + (line - y2) * s2])       # (3,T)
    missed = torch.stack([below0 == below1, below1 == below2, below2 == below0])
    first = centres(smallest(cut.masked_fill(missed, 1e9)), size)
    length = (centres(largest(cut.masked_fill(missed, -1e9)), size) - first).clamp(min=0)
    # 1/Z at the span's ends, kept within the face's own (a sliver's slopes are huge), is linear between them
    begin = (c + gx * (first + 0.5) + gy * line).clamp(least, most)
    end = (c + gx * (first + length - 0.5) + gy * line).clamp(least, most)
    return f, row, first, length, begin, (end - begin) / (length - 1).clamp(min=1)


def resolve(buffer):
    """z-buffers (4,H*W) -> the pixels that see a face (P,) and which it is (P,): among those at the nearest
    depth, to TIE, front before back, textured before plain, then exact depth, then index."""
    pixel = (smallest(buffer) < NO_FACE).nonzero()[:, 0]
    best = buffer[:, pixel]                                                             # (4,P)
    depth = (best >> 32).int().view(torch.float32).masked_fill(best == NO_FACE, math.inf)
    tied, chosen = depth <= smallest(depth) + TIE, best[3]
    for k in (2, 1, 0):
        chosen = torch.where(tied[k], best[k], chosen)
    return pixel, chosen & 0xFFFFFFFF


def surface_colour(mesh, face, bary):
    """faces (P,), weights of their corners (3,P) -> (P,3) float32: the texture,
    bilinear, texel centres at +0.5.

    Coordinates outside [0, 1] repeat; the filter stops at the texture's edge, because
    an atlas would bleed from its far side."""
    uvs = mesh.uvs.index_select(0, face).permute(2, 1, 0)                               # (2,3,P)
    u, v = sum(uvs[0] * bary), sum(uvs[1] * bary)
    repeat = lambda t: torch.where((t - 0.5).abs() <= 0.5 + 1e-6, t, t - t.floor())
    material = mesh.material[face]
    begin, (height, width) = mesh.start[material], mesh.shape[material].unbind(1)
    x = repeat(u) * width - 0.5
    y = (1 - repeat(v)) * height - 0.5                                                  # OBJ's v runs upwards
    x0, y0 = x.floor().long(), y.floor().long()
    fx, fy = (x - x0).float()[:, None], (y - y0).float()[:, None]
    inside = lambda i, n: torch.minimum(i.clamp(min=0), n - 1)
    index = lambda x, y: begin + inside(y, height) * width + inside(x, width)
    texel = lambda dx, dy: mesh.texels.index_select(0, index(x0 + dx, y0 + dy)).float()
    upper, lower = texel(0, 0).lerp(texel(1, 0), fx), texel(0, 1).lerp(texel(1, 1), fx)
    return upper.lerp(lower, fy) / 255


def pytorch3d():
    """What we need of it, if it is there: also asked before a run begins"""
    try:
        from pytorch3d.renderer import MeshRasterizer, PerspectiveCameras, RasterizationSettings
        from pytorch3d.structures import Meshes
    except ImportError as error:
        raise UserError(f"--renderer pytorch3d: PyTorch3D cannot be imported ({error}). "
                        "In an environment of its own: pip install -r requirements-pytorch3d.txt; "
                        "or leave the flag out, the default renderer needs nothing") from None
    return MeshRasterizer, PerspectiveCameras, RasterizationSettings, Meshes


def visible_faces_pytorch3d(mesh, camera, K, size):
    """The same as visible_faces, by PyTorch3D, the paper's renderer.  What follows (colour,
    filter, files) is shared."""
    MeshRasterizer, PerspectiveCameras, RasterizationSettings, Meshes = pytorch3d()
    # The vertices are in OpenCV's camera axes already: what is left of PyTorch3D's camera
    # is to turn x and y around
    turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], device=camera.device))[None]
    cameras = PerspectiveCameras(R=turn, T=torch.zeros(1, 3, device=camera.device),
                                 in_ndc=False, device=camera.device,
                                 focal_length=K.diagonal()[None, :2].float(),
                                 principal_point=K[None, :2, 2].float(),
                                 image_size=torch.tensor([[size, size]], device=camera.device))
    # bin_size 0: the binned rasteriser leaves holes where a bin overflows
    settings = RasterizationSettings(size, blur_radius=0.0, faces_per_pixel=1, bin_size=0,
                                     perspective_correct=True)
    seen = MeshRasterizer(cameras, settings)(Meshes([camera.float()], [mesh.faces]))
    face = seen.pix_to_face.view(-1)
    pixel = (face >= 0).nonzero()[:, 0]
    weight, z = seen.bary_coords.view(-1, 3)[pixel].T, seen.zbuf.view(-1)[pixel]
    return pixel, face[pixel], weight.double(), z.double()

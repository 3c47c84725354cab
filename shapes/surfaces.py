"""
Closed surfaces from curves, light painted into their textures, and both as OBJ text: what earphones.py builds
its models from.

    surface  = a grid of points: a profile carried round an outline (revolve), a section along a curve (sweep)
    texture  = (albedo * light(point, normal) + gloss) * openness          one chart for each surface

The photos of this course are lit by ambient light alone: a pixel shows its material's colour and nothing
else, and flat colours would make paper cut-outs.  So the light is painted on: `light` is a sky and softboxes,
`openness` the ambient occlusion of all parts by all parts.  Both are the same under x -> -x, so that the two
halves of an object share their charts.

read Part, revolve, sweep, openness, light, bake, triangles.
"""
from dataclasses import dataclass

import numpy as np

GLOSS = {"body": .40, "pad": .12, "accent": .55}       # of the three materials: its share of the shine
K = 6                                          # texels along the edge of a mesh cell


# ---------------------------------------------------------------------------------- surfaces: grids of points

@dataclass
class Part:
    points: np.ndarray             # (rows*K+1, cols*K+1, 3): texels lie between these, every K-th is a vertex
    along: np.ndarray              # (rows*K+1,) radius (revolve), or share of the length (sweep)
    skin: tuple                    # material, colour, paint (None: plain)
    copies: int = 2                # 2: also mirrored, 1: as it is


def lerp(low, high, t):
    return low + (high - low) * t


def spline(control, n, closed=False):
    """Quadratic B-spline of a control polygon -> (n+1, dims), as many samples at each corner."""
    p = np.asarray(control, float)
    if closed:
        p = np.concatenate([p[-1:], p, p[:1]])
    start, corner, end = (p[:-2] + p[1:-1]) / 2, p[1:-1], (p[1:-1] + p[2:]) / 2
    if not closed:
        start[0], end[-1] = p[0], p[-1]
    t = np.linspace(0, len(corner), n + 1)
    i = np.minimum(t.astype(int), len(corner) - 1)
    t = (t - i)[:, None]
    return (1 - t) ** 2 * start[i] + 2 * t * (1 - t) * corner[i] + t * t * end[i]


def outline(shape, theta):
    """Radius of a cup's edge at angle theta: 0 is the front, pi/2 the top."""
    if shape == "oval":
        return 1 / np.hypot(np.cos(theta) / .78, np.sin(theta) / 1.12)
    if shape == "D":                # a circle cut by a straight front edge; the power rounds the corners
        return 1.1 * (1 + (np.maximum(np.cos(theta), 0) / .55) ** 6) ** (-1 / 6)
    return np.ones_like(theta)


def turn(about_y, about_z):
    """Rotation about z (a cup's top leans in), then about y (its front turns out)."""
    cy, sy, cz, sz = np.cos(about_y), np.sin(about_y), np.cos(about_z), np.sin(about_z)
    return np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]) @ np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])


def revolve(profile, rows, cols, radius, shape, pose, skin, closed=False):
    """A profile (r in radii, x outwards), outer pole to inner, carried round an outline."""
    r, x = spline(profile, rows * K, closed).T
    theta = np.linspace(0, 2 * np.pi, cols * K + 1)
    r_edge = r[:, None] * radius * outline(shape, theta)
    points = np.stack([x[:, None] + 0 * theta, r_edge * np.sin(theta), r_edge * np.cos(theta)], -1)
    rotation, centre = pose
    return Part(points @ rotation.T + centre, r, skin)


def sweep(curve, half, rows, cols, side, skin, power=4., shape=None, copies=2):
    """A section carried along a curve (N,3), with round ends.

    half (n,2) are its half widths along `side` and across it, at n even steps.  The section is a superellipse
    (power 2: an ellipse, 5: nearly a rectangle), or an outline.
    """
    half = np.atleast_2d(half)
    length = np.r_[0, np.cumsum(np.linalg.norm(np.diff(curve, axis=0), axis=1))]
    end, total = min(half.min() * .8, length[-1] * .3), length[-1]
    q = end * (1 - np.cos(np.linspace(0, np.pi / 2, 3 * K + 1)))       # three mesh rows for each rounded end
    s = np.r_[q, np.linspace(end, total - end, (rows - 6) * K + 1)[1:-1], total - q[::-1]]
    follow = lambda values: np.stack([np.interp(s, length, c) for c in values.T], -1)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
    path, tangent = follow(curve), unit(follow(np.gradient(curve, length, axis=0)))
    side = unit(side - (tangent @ side)[:, None] * tangent)
    across = np.cross(tangent, side)
    to_end = np.minimum(np.minimum(s, total - s) / end, 1)
    round_off = np.sqrt(np.maximum(1 - (1 - to_end) ** 2, 0))[:, None]
    wide, thick = (round_off * np.interp(s / total, np.linspace(0, 1, len(h)), h)[:, None] for h in half.T)
    theta = np.linspace(0, 2 * np.pi, cols * K + 1)
    c, d = np.cos(theta), np.sin(theta)
    if shape:
        c, d = c * outline(shape, theta), d * outline(shape, theta)
    else:
        c, d = np.sign(c) * abs(c) ** (2 / power), np.sign(d) * abs(d) ** (2 / power)
    points = path[:, None] + (wide * c)[..., None] * side[:, None] + (thick * d)[..., None] * across[:, None]
    return Part(points, s / total, skin, copies)


# ----------------------------------------------------------------------------------------------- light, baked

def centres(grid):
    """(R+1,C+1,...) -> (R,C,...)"""
    return (grid[:-1, :-1] + grid[1:, :-1] + grid[:-1, 1:] + grid[1:, 1:]) / 4


def discs(points, every):
    """A grid as discs, one for `every` x `every` texels: centres (N,3), unit normals (N,3), areas (N,1)"""
    p = points[::every, ::every]
    area = np.cross(p[:-1, 1:] - p[1:, :-1], p[1:, 1:] - p[:-1, :-1]).reshape(-1, 3) / 2
    size = np.linalg.norm(area, axis=1, keepdims=True)
    return [a.astype(np.float32) for a in (centres(p).reshape(-1, 3), area / np.maximum(size, 1e-9), size)]


def openness(parts):
    """For each part, how much of the sky each of its mesh cells sees, (rows*cols,).

    Of the sky of a point p, a disc q hides the form factor A cos_p cos_q / (pi r^2 + A), where both face each
    other (Bunnell, GPU Gems 2, chapter 14).  The exponential keeps discs that lie behind one another from
    hiding more than there is.
    """
    grids = [part.points for part in parts]
    mirrored = [part.points[:, ::-1] * [-1, 1, 1] for part in parts if part.copies == 2]
    p, n, _ = map(np.concatenate, zip(*[discs(grid, K) for grid in grids]))
    q, m, area = map(np.concatenate, zip(*[discs(grid, 2 * K) for grid in grids + mirrored]))     # P, Q discs
    cos_p = np.maximum(n @ q.T - (n * p).sum(1, keepdims=True), 0)     # (P,Q)  times r, as is the next
    cos_q = np.maximum((m * q).sum(1) - p @ m.T, 0)
    r2 = np.maximum((p * p).sum(1, keepdims=True) + (q * q).sum(1) - 2 * p @ q.T, 1e-4)
    hidden = (cos_p * cos_q / (r2 * (np.pi / area.T * r2 + 1))).sum(1)
    sizes = [(grid.shape[0] // K) * (grid.shape[1] // K) for grid in grids]
    return np.split(np.exp(-.85 * hidden), np.cumsum(sizes)[:-1])


def refine(cells):
    """Mesh cells (r,c) -> texels (r*K, c*K), linear between cell centres; columns wrap."""
    cells = np.pad(np.pad(cells, ((0, 0), (1, 1)), "wrap"), ((1, 1), (0, 0)), "edge")
    for axis in (0, 1):
        x = (np.arange((cells.shape[axis] - 2) * K) + .5) / K + .5
        i = x.astype(int)
        w = np.expand_dims(x - i, 1 - axis)
        cells = np.take(cells, i, axis) * (1 - w) + np.take(cells, i + 1, axis) * w
    return cells


def normals(points):
    """Unit normals of texels (R,C,3), columns wrapping."""
    area = np.cross(np.roll(points, -1, 1) - np.roll(points, 1, 1), np.gradient(points, axis=0))
    return area / np.maximum(np.linalg.norm(area, axis=-1, keepdims=True), 1e-12)


def light(p, n):
    """Points, normals (R,C,3) -> diffuse light, shine (R,C).  A sky; at each side, above, a large softbox in
    front and a small one behind, near enough that their light fades over a flat surface too."""
    right = np.where(p[..., :1] < 0, -1, 1) * [1, 0, 0] + [0, 1, 1]
    p, n = p * right, n * right
    diffuse, shine = .54 + .14 * n[..., 1], 0
    for place, strength in (((2.8, 2.4, 2.0), .40), ((2.2, 1.6, -2.8), .20)):
        ray = np.array(place) - p
        r = np.linalg.norm(ray, axis=-1)
        facing = np.maximum((n * ray).sum(-1) / r, 0)
        diffuse = diffuse + strength * facing * (3.2 / r) ** 2
        shine = shine + strength * (facing ** 14 + .25 * facing ** 3) * (3.2 / r) ** 2
    return diffuse, shine


def bake(part, cells):
    """The part's chart (R,C,3); 250/255 at most, so that no object is as white as the background."""
    p = centres(part.points)
    rows, cols = p.shape[:2]
    u, theta = ((np.arange(rows) + .5) / rows)[:, None], (np.arange(cols) + .5)[None] / cols * 2 * np.pi
    material, albedo, paint = part.skin
    n, albedo = normals(p), np.broadcast_to(albedo, p.shape)
    if paint:
        albedo, relief = paint(albedo, u, (part.along[1:, None] + part.along[:-1, None]) / 2, theta)
        n = normals(p + relief[..., None] * n)
    diffuse, shine = light(p, n)
    colour = albedo * diffuse[..., None] + GLOSS[material] * shine[..., None]
    return np.clip(colour * refine(cells.reshape(rows // K, cols // K))[..., None], 0, 250 / 255)


# ---------------------------------------------------------------------------------------------------- as text

def textures(parts):
    """One image a material, its charts stacked; margins of two texels keep bilinear lookups from bleeding.
    -> {material: image}, and for each part the row at which its chart begins"""
    stacks, rows = {}, []
    for part, cells in zip(parts, openness(parts)):
        chart = np.pad(bake(part, cells), ((0, 0), (2, 2), (0, 0)), "wrap")
        stack = stacks.setdefault(part.skin[0], [])
        rows.append(sum(len(c) for c in stack) + 2)
        stack.append(np.pad(chart, ((2, 2), (0, 0), (0, 0)), "edge"))
    for material, stack in stacks.items():
        wide = max(c.shape[1] for c in stack)
        stack = [np.pad(c, ((0, 0), (0, wide - c.shape[1]), (0, 0)), "edge") for c in stack]
        stacks[material] = np.concatenate(stack)
    return stacks, rows


def triangles(points):
    """Grid (r,c,3) -> vertices (V,3), and the corners (F,3) of its faces as vertices and as grid points.
    Faces run counter-clockwise seen from outside.  Points at one place (a pole, where columns meet) become
    one vertex, so that the surface is closed."""
    cols = points.shape[1]
    points = np.concatenate([points[:, :-1], points[:, :1]], 1)    # they meet; sin(2 pi) is not quite 0
    a = (np.arange(points.shape[0] - 1)[:, None] * cols + np.arange(cols - 1)).ravel()
    grid = np.stack([a, a + 1, a + cols + 1, a, a + cols + 1, a + cols], 1).reshape(-1, 3)
    rounded = points.reshape(-1, 3).round(5) + 0.                      # + 0. makes -0 a 0
    vertices, same = np.unique(rounded, axis=0, return_inverse=True)
    corners = same.ravel()[grid]
    solid = (corners != np.roll(corners, 1, 1)).all(1)
    return vertices, corners[solid], grid[solid]


def obj_text(parts, images, rows):
    """Vertices part by part, then faces material by material."""
    solids = [(part, row, side) for part, row in zip(parts, rows) for side in (1, -1)[:part.copies]]
    every = np.concatenate([part.points[::K, ::K].reshape(-1, 3) * [side, 1, 1] for part, _, side in solids])
    low, high = every.min(0), every.max(0)
    text, faces, v_count, t_count = ["mtllib model_normalized.mtl\n"], {m: [] for m in images}, 1, 1
    for part, row, side in solids:
        height, width = images[part.skin[0]].shape[:2]
        points = (part.points[::K, ::K] * [side, 1, 1] - (low + high) / 2) / np.linalg.norm(high - low)
        r, c = np.indices(points.shape[:2]) * K
        uv = np.stack([(c + 2) / width, 1 - (r + row) / height], -1)
        points, uv = points[:, ::side], uv[:, ::side].reshape(-1, 2)   # mirrored: run round the other way
        vertices, corners, grid = triangles(points)
        text.append("v %.5f %.5f %.5f\n" * len(vertices) % tuple(vertices.ravel()))
        text.append("vt %.5f %.5f\n" * len(uv) % tuple(uv.ravel()))
        faces[part.skin[0]].append(np.stack([corners + v_count, grid + t_count], -1).ravel())
        v_count, t_count = v_count + len(vertices), t_count + len(uv)
    for material, corners in faces.items():
        corners = np.concatenate(corners)
        text.append(f"usemtl {material}\n" + "f %d/%d %d/%d %d/%d\n" * (len(corners) // 6) % tuple(corners))
    return "".join(text)

"""
ShapeNet's OBJ/MTL files in, whatever state they are in.

ShapeNet was collected from the web: its files have negative indices, polygons, half-given texture
coordinates, names with spaces, materials that are missing and textures that are somewhere else.  `load_obj`
takes all of that, drops the faces that mean nothing and counts them in `mesh.notes`, and otherwise raises
UserError with one sentence that names the file.

Two simplifications make the renderer short.  Every material is a texture (a plain colour Kd is a
texture of one texel), and all the textures of a mesh lie in one long row of texels, so that a lookup
never asks which material it is in:

    texels  ....aaaaaaaaaaaabbbbbbbbbbbbbbbbbbbc....
    texel (x, y) of material m:  texels[start[m] + y * width[m] + x]

in   a path to an .obj file; its .mtl and its images are not followed out of the model's own folder
out  Mesh
read Mesh, load_obj, read_obj, read_mtl.
"""
import functools
import math
import os
import re
import unicodedata
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UserError
from shapes.photos import as_8bit

MAX_BYTES = 500_000_000        # of one file, and
MAX_FACES = 5_000_000         # triangles of one mesh: beyond these it is not a ShapeNet model but an accident
MAX_POINTS = 5_000_000         # vertices of one mesh, and texture coordinates: a gigabyte while they are read
MAX_LIBRARIES = 100            # material files of one mesh, and
MAX_LIBRARY = 2_000_000        # bytes of each
MAX_TEXELS = 1 << 26           # of all textures of one mesh, 200 MB: for the others the plain colour Kd
MAX_PIXELS = 8192 * 8192       # of a texture, read from its header before anything is decoded
MAX_DECODED = 1 << 29          # of all textures of one mesh: ten seconds
MAX_SIDE = 512            # larger textures are box-filtered down to this: at 128 px the rest would only alias
GREY = (0.5, 0.5, 0.5)         # a face without a material, or a material without a Kd (as in PyTorch3D)


@dataclass
class Mesh:
    vertices: torch.Tensor     # (N,3) float64
    faces: torch.Tensor        # (F,3) int64
    uvs: torch.Tensor          # (F,3,2) float64, of each face's corners; v runs upwards, as in OBJ
    material: torch.Tensor     # (F,) int64
    texels: torch.Tensor       # (T,3) uint8, all textures one after another, row by row from the top
    start: torch.Tensor        # (M,) int64, where each material's texels begin
    shape: torch.Tensor        # (M,2) int64, height and width of each material's texture
    textured: torch.Tensor     # (M,) bool, False for a plain colour
    notes: list = field(default_factory=list)      # sentences: what was dropped or missing, and how often

    def to(self, device):
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def load_obj(path):
    """All that ShapeNet's OBJ files do -> Mesh, in the file's own coordinates; or a
    UserError that names the file."""
    path = Path(path)
    # ShapeNet v2 keeps <model>/models/model_normalized.obj beside <model>/images/; v1 has all in one folder
    folder = Path(os.path.realpath(path.parent))
    folder = folder.parent if folder.name == "models" else folder
    if not Path(os.path.realpath(path)).is_relative_to(folder):
        raise UserError(f"{path} is a link that leads out of the model's folder: refused")
    notes = {}
    vertices, uvs, corners, corner_uvs, material_names, libraries = read_obj(path, notes)

    materials, read, libraries = {}, set(), list(dict.fromkeys(libraries))
    if len(libraries) > MAX_LIBRARIES:
        note(notes, f"{len(libraries)} material files: only the first {MAX_LIBRARIES} are looked for")
    for line in libraries[:MAX_LIBRARIES]:
        whole = find(line, path.parent, folder, notes)
        # One name with spaces in it, or several names
        for name in [line] if whole else line.split()[:MAX_LIBRARIES]:
            file = whole or find(name, path.parent, folder, notes)
            if file is None:
                note(notes, f"material file {short(name)} is missing")
            elif file not in read and len(read) < MAX_LIBRARIES:
                read.add(file)
                materials = read_mtl(file, notes) | materials

    # Two entries a material, its texture and its plain Kd: a face without texture
    # coordinates takes the second
    names = sorted(set(material_names), key=lambda name: name or "")
    textures, opened, texels, left = [], {}, 0, MAX_DECODED
    for name in names:
        if name is not None and name not in materials:
            note(notes, f"material {short(name)} is in no material file: grey")
        kd, texture = materials.get(name, (GREY, None))
        plain = np.uint8(np.round(np.clip(kd, 0, 1) * 255)).reshape(1, 1, 3)
        if texture and texture not in opened:
            opened[texture] = None
            if texels >= MAX_TEXELS:
                note(notes, "more textures than fit into 200 MB: their Kd instead")
            else:
                opened[texture], pixels = read_texture(texture, path.parent, folder, notes, left)
                left -= pixels
            texels += 0 if opened[texture] is None else opened[texture].size // 3
        image = opened[texture] if texture else None
        textures += [plain if image is None else image, plain]
    number = {name: 2 * k for k, name in enumerate(names)}
    material = np.array([number[name] for name in material_names])
    has_uvs = (corner_uvs >= 0).all(1)
    uvs = np.concatenate([uvs, np.zeros((1, 2))])[np.where(has_uvs[:, None], corner_uvs, -1)]      # (F,3,2)
    has_uvs &= np.isfinite(uvs).all((1, 2))
    uvs[~has_uvs] = 0

    shape = np.array([texture.shape[:2] for texture in textures])
    distinct = {id(texture): texture for texture in textures}         # a texture's materials share its texels
    sizes = [texture.shape[0] * texture.shape[1] for texture in distinct.values()]
    begin = dict(zip(distinct, np.cumsum([0] + sizes)))
    start = np.array([begin[id(texture)] for texture in textures])
    return Mesh(torch.from_numpy(vertices), torch.from_numpy(corners), torch.from_numpy(uvs),
                torch.from_numpy(np.where(has_uvs, material, material + 1)),
                torch.from_numpy(np.concatenate([texture.reshape(-1, 3) for texture in distinct.values()])),
                torch.from_numpy(start), torch.from_numpy(shape), torch.from_numpy(shape.prod(1) > 1),
                [text if count == 1 else f"{text} ({count} times)" for text, count in notes.items()])


def note(notes, text):
    """Counts a remark; after the twentieth different one, only how many there were."""
    text = text if text in notes or len(notes) < 20 else "more of the like"
    notes[text] = notes.get(text, 0) + 1


def short(name):
    return repr(name if len(name) <= 80 else name[:80] + "...")


# ---------------------------------------------------------------------------------------------------- text in

def read_lines(path, most):
    """Lines as lists of words.  Bytes that are not UTF-8 survive (surrogateescape), so that
    names still match files."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not there" if not path.exists() else f"{path} is not a file")
        if path.stat().st_size > most:
            raise UserError(f"{path} is larger than {most // 1_000_000} MB: not a model for this")
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    lines = iter(text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    for line in lines:
        if line.endswith("\\") and not line.lstrip().startswith("#"):    # a `\` at the end continues the line
            parts = [line]
            while parts[-1].endswith("\\"):
                parts[-1:] = [parts[-1][:-1], next(lines, "")]
            line = " ".join(parts)
        words = line.split()
        if words and not words[0].startswith("#"):
            yield words


def number(word):
    """.5 and 1e-07 are numbers; what is none becomes nan, and its faces are dropped later."""
    try:
        return float(word)
    except ValueError:
        return math.nan


def read_obj(path, notes):
    """-> vertices (N,3), uvs (M,2), corners (F,3), corner_uvs (F,3; -1: none), a material name
    a face, the mtllib lines"""
    vertices, uvs, libraries, names = [], [], [], []
    triangles = []                                   # each its face, 3 vertices, 3 uvs, its material
    faces, out_of_range, too_few, material = 0, 0, 0, -1
    for words in read_lines(path, MAX_BYTES):
        keyword = words[0]
        if max(len(vertices), len(uvs)) > MAX_POINTS:
            raise UserError(f"{path} has more than {MAX_POINTS:,} vertices: not a model for this")
        if keyword == "v":
            vertices.append([number(word) for word in words[1:4]] if len(words) > 3 else [math.nan] * 3)
        elif keyword == "vt":
            u, v = (words[1:3] + ["0", "0"])[:2]     # a one-dimensional texture coordinate has no v
            uvs.append((number(u), number(v)))
        elif keyword == "f":
            faces += 1
            if len(words) + len(triangles) > MAX_FACES:
                raise UserError(f"{path} has more than {MAX_FACES:,} triangles: not a model for this")
            if "#" in words:
                words = words[:words.index("#")]
            try:
                v, t = zip(*[corner(word) for word in words[1:]])
            except ValueError:                       # no integers, or no corners at all
                out_of_range += 1
                continue
            # A negative index counts back from what was read *so far*, at this line, not from the file's last
            v = [i - 1 if i > 0 else len(vertices) + i for i in v]
            t = [i - 1 if i >= 0 else len(uvs) + i if -i <= len(uvs) else -2 for i in t]
            if min(v) < 0 or min(t) < -1:
                out_of_range += 1
            elif len(set(v)) < 3:
                too_few += 1
            else:                                    # a polygon is a fan of triangles
                triangles += [(faces, v[0], v[k], v[k + 1], t[0], t[k], t[k + 1], material)
                              for k in range(1, len(v) - 1) if v[0] != v[k] != v[k + 1] != v[0]]
        elif keyword == "usemtl":
            names.append(" ".join(words[1:]))
            material = len(names) - 1
        elif keyword == "mtllib":
            libraries.append(" ".join(words[1:]))
    if not vertices and not faces:
        raise UserError(f"{path} is not an OBJ file: it has no vertices and no faces")

    vertices, uvs = np.array(vertices, np.float64).reshape(-1, 3), np.array(uvs, np.float64).reshape(-1, 2)
    face, *corners, material = np.array(triangles, np.int64).reshape(-1, 8).T
    corners, corner_uvs = np.stack(corners[:3], 1), np.stack(corners[3:], 1)
    # Upper bounds are known only now: an index may point to a line further down.  A polygon
    # goes whole or not at all
    good = ~np.isin(face, face[(corners >= len(vertices)).any(1) | (corner_uvs >= len(uvs)).any(1)])
    sound = (np.abs(vertices) < 1e30).all(1)         # False for nan too
    finite = good & ~np.isin(face, face[good][~sound[corners[good]].all(1)])
    count = lambda kept: len(np.unique(face[kept]))
    for number_of, why in ((out_of_range + count(~good), "an index out of range"),
                           (too_few, "fewer than 3 distinct corners"),
                           (count(good & ~finite), "a vertex that is not finite")):
        if number_of:
            notes[f"{number_of} faces dropped, with {why}"] = 1
    if not finite.any():
        raise UserError(f"{path} has no face that can be used" + "".join(f"; {text}" for text in notes))
    names.append(None)                               # what -1, faces before any usemtl, stands for
    return vertices, uvs, corners[finite], corner_uvs[finite], [names[m] for m in material[finite]], libraries


@functools.lru_cache(1 << 16)                        # most words of a file stand in six faces
def corner(word):
    """`a`, `a/b`, `a//c` or `a/b/c` -> the integers of vertex and texture coordinate as
    written, 0 where there is none."""
    v, _, rest = word.partition("/")
    t = rest.partition("/")[0]
    v, t = int(v), int(t) if t else None
    if v == 0 or t == 0 or max(abs(v), abs(t or 0)) > 1 << 40:
        raise ValueError("indices count from 1, and fit 64 bits")
    return v, t or 0


def read_mtl(path, notes):
    """-> {name: (Kd, texture line or None)}.  Transparency (Tr, d) is ignored: exporters
    disagree about its direction."""
    materials, name = {}, None
    try:
        lines = list(read_lines(path, MAX_LIBRARY))
    except UserError as error:
        note(notes, str(error))
        return {}
    for words in lines:
        keyword = words[0].lower()
        if keyword == "newmtl":
            name = " ".join(words[1:])
            materials[name] = (GREY, None)
        elif name is not None and keyword == "kd":
            kd = [number(word) for word in words[1:4]]
            kd = kd * 3 if len(kd) == 1 else kd      # one number: grey
            if len(kd) == 3 and all(map(math.isfinite, kd)):
                materials[name] = (tuple(kd), materials[name][1])
        elif name is not None and keyword == "map_kd":
            materials[name] = (materials[name][0], texture_name(words[1:]))
    return materials


def texture_name(words):
    """The file's name after the options of a map line: each starts with `-` and takes words (-clamp on) or up
    to three numbers (-s 1 1 1); the name may have spaces."""
    words, numbers = list(words), {"-s", "-o", "-t", "-mm", "-bm", "-boost", "-texres"}
    while len(words) > 1 and re.fullmatch(r"-[a-z]+", words[0]):
        option, taken = words.pop(0), 0
        if option in numbers:
            while len(words) > 1 and taken < 3 and math.isfinite(number(words[0])):
                words.pop(0)
                taken += 1
        else:
            words.pop(0)
    return " ".join(words)


# ----------------------------------------------------------------------------------------------- files beside

def find(name, beside, folder, notes):
    """The file that an OBJ or MTL line means, or None: with either slash, in any case, in
    the folder beside or above.

    Whatever leaves the model's own folder is refused: `..` beyond it, an absolute path, a
    symbolic link out of it."""
    name = name.strip().strip('"').replace("\\", "/")
    if not name or "\0" in name:
        return None
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        note(notes, f"{short(name)} is an absolute path: refused")
        return None
    for base in (Path(os.path.realpath(beside)), folder):   # ./images/a.png is often meant as ../images/a.png
        inside = Path(os.path.normpath(base / name)).is_relative_to(folder)
        parts = [part for part in name.split("/") if part not in ("", ".")]
        file = match_case(base, parts) if inside else None
        if not inside and base != folder or file and not Path(os.path.realpath(file)).is_relative_to(folder):
            note(notes, f"{short(name)} leads out of the model's folder: refused")
            return None
        if file:
            return file
    return None


def match_case(path, parts):
    """path / parts, where each part may differ in case from what is on the disk; None if it is not there."""
    for part in parts:
        exact = path.parent if part == ".." else path / part
        try:
            if not exact.exists():
                exact = listing(path, path.stat().st_mtime_ns).get(plain(part))
        except OSError:                              # a part that is no folder, or a name that is too long
            return None
        if exact is None:
            return None
        path = exact
    return path if path.is_file() else None


def plain(text):
    return unicodedata.normalize("NFC", text).lower()


@functools.lru_cache(1024)                           # thousands of names may be looked for in one folder
def listing(folder, changed):
    """-> {name in lower case: entry}, the first of several that differ in case"""
    return {plain(entry.name): entry for entry in sorted(folder.iterdir(), reverse=True)}


def read_texture(name, beside, folder, notes, left=MAX_DECODED):
    """-> (H,W,3) uint8, or None with a note: the material's Kd stands in; and how many pixels were decoded.
    `left`: how many may be"""
    file = find(name, beside, folder, notes)
    if file is None:
        note(notes, f"texture {short(name)} is missing: its Kd instead")
        return None, 0
    try:
        with Image.open(file, formats=["PNG", "JPEG"]) as image:
            pixels = image.width * image.height
            if pixels > min(MAX_PIXELS, left):
                size = f"{image.width} x {image.height}"
                why = "too large" if pixels > MAX_PIXELS else "with the others more than is decoded"
                note(notes, f"texture {short(name)} is {size}: {why}, its Kd instead")
                return None, 0
            image = as_8bit(image, "RGBA" if "transparency" in image.info else "RGB").convert("RGB")
            if max(image.size) > MAX_SIDE:
                image = image.reduce(-(-max(image.size) // MAX_SIDE))
            return np.array(image), pixels
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        note(notes, f"texture {short(name)} is broken ({type(error).__name__}): its Kd instead")
        return None, 0

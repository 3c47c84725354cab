"""
Before stage 0, for those without ShapeNet: earphones to learn from.  Parametric models in the form of
ShapeNetCore.v2's (an OBJ, an MTL, textures), so that one loader reads both; render_shapenet.py makes them.

    factors  = what a catalogue says of an object: kind, palette, outline, band, proportions     from a seed
    model    = a dozen closed surfaces that may run into one another (surfaces.py), each with a paint

A quarter of the cells kind x palette x part never occurs in training (`held_out`), and half of the test
objects lie in those cells: a model that makes one has combined what it learnt, not copied it.

File space is ShapeNet's: Y up, x from ear to ear, z to the front; mirror plane x = 0; bounding box centred,
its diagonal 1.  Before that last scaling an ear is about 0.8 from the middle, and the diagonal about 3.

read draw_factors, held_out, shell_paint, headphones, buds, write_model.
"""
import json
import os
import zlib

import numpy as np
from PIL import Image

from shapes.surfaces import lerp, obj_text, outline, revolve, spline, sweep, textures, turn

KINDS = ("over-ear", "on-ear", "neckband", "buds")
PARTS = ("round", "oval", "D")                 # the outline of cups, pods and bulbs
PALETTES = {                                   # albedos: the body; pads and accents to draw one each from
    "black":    ((.165, .167, .175), [(.14, .14, .145), (.25, .24, .24)],
                 [(.78, .11, .11), (.74, .48, .32), (.64, .66, .68), (.18, .62, .66)]),
    "graphite": ((.34, .355, .375), [(.16, .16, .17), (.46, .46, .47)],
                 [(.88, .45, .12), (.18, .60, .62), (.76, .77, .79)]),
    "white":    ((.88, .88, .865), [(.74, .735, .72), (.42, .43, .45)],
                 [(.82, .65, .40), (.36, .60, .82), (.55, .56, .58)]),
    "silver":   ((.67, .685, .71), [(.19, .19, .20), (.62, .49, .38)],
                 [(.18, .19, .21), (.18, .38, .70), (.80, .21, .17)]),
    "beige":    ((.82, .735, .62), [(.57, .40, .29), (.72, .63, .52)],
                 [(.76, .50, .34), (.32, .26, .22), (.86, .84, .80)]),
    "navy":     ((.155, .22, .42), [(.13, .15, .24), (.60, .41, .27)],
                 [(.84, .68, .40), (.76, .78, .80), (.88, .42, .24)]),
    "rose":     ((.86, .59, .58), [(.68, .46, .46), (.84, .79, .77)],
                 [(.82, .62, .52), (.88, .86, .84), (.46, .22, .28)]),
}
BANDS = {"over-ear": ("arched", "double", "padded"), "on-ear": ("arched", "double", "padded"),
         "neckband": ("docked", "stalk"), "buds": ("rod", "blade", "drop")}
YOKES = ("fork", "arm", "stem")                # a cup hangs in a fork, on an arm, or on the band itself
CAPS = ("dome", "bevel", "step", "dish")
ARTS = ("ring", "plate", "grille", "logo", "rim")
PROPORTIONS = ("radius", "depth", "cushion", "height", "width", "toe", "arch", "tilt")      # each from 0 to 1
HALF = .076                                    # half the least thickness: 0.04 of the largest diagonal
FRONT, UP = np.array([0., 0, 1]), np.array([0., 1, 0])


# ---------------------------------------------------------------------------------------------------- factors

def name(split, index):
    return f"{split}_{index:05d}"


def held_out(kind, palette, part):
    """21 of the 84 cells, as in a Latin square: each palette in each outline misses one kind."""
    return (KINDS.index(kind) + list(PALETTES).index(palette) + PARTS.index(part)) % 4 == 0


def draw_cell(split, index, seed, kind):
    """Palette and part.  The cells of a kind are dealt like cards, so that none comes back too soon."""
    block, slot = divmod(index, 6)
    novel = split == "test" and block % 2 == 1
    cells = [(a, b) for a in PALETTES for b in PARTS if held_out(kind, a, b) == novel]
    block = block // 2 if split == "test" else block
    dealt = 2 * block + slot // 2 if slot < 4 else block   # a block has two of either headphones
    lap, card = divmod(dealt, len(cells))
    deal = np.random.default_rng((seed, zlib.crc32(split.encode()), KINDS.index(kind), lap))
    return cells[deal.permutation(len(cells))[card]]


def drawing(rng):
    """-> functions that draw one of several options, and a colour near another"""
    pick = lambda options: options[rng.integers(len(options))]
    near = lambda rgb: np.clip(np.array(rgb) * rng.normal(1, .05) * rng.normal(1, .012, 3), .05, .9)
    return pick, lambda rgb: near(rgb).round(4).tolist()


def draw_factors(split, index, seed=0):
    """Object `index` of a split, the same whether 72 are made or 4096.  All else follows from its factors."""
    rng = np.random.default_rng((seed, zlib.crc32(split.encode()), index))
    pick, near = drawing(rng)
    block, slot = divmod(index, 6)
    kind = KINDS[(0, 1, 0, 1, 2, 3)[slot]]             # of 72: 24, 24, 12, 12
    palette, part = draw_cell(split, index, seed, kind)
    body, pads, accents = PALETTES[palette]
    factors = {"split": split, "index": index, "seed": seed, "kind": kind, "palette": palette, "part": part,
               "band": pick(BANDS[kind]), "yoke": pick(YOKES if slot < 4 else ("none",)),
               "cap": pick(CAPS if slot < 4 else ("bulb",)), "art": pick(ARTS),
               "boom": slot == block % 4,              # of 72: 12, all on headphones
               "body": near(body), "pad": near(pick(pads)), "accent": near(pick(accents))}
    factors["metal"] = factors[pick(("accent", "body", "body"))]            # the colour of yokes and sleeves
    return factors | {key: round(rng.random(), 4) for key in PROPORTIONS}


# --------------------------------------------------------------------------- paints: seams, stitches, grilles
# A paint gets the flat albedo (R,C,3), u (R,1) from 0 to 1 over the rows, along (R,1) and theta (1,C).  It
# returns albedo and relief (R,C); relief tilts the normals that are lit, not the mesh.  No pattern is finer
# than two pixels of a 128-pixel photo.

def mix(colour, other, weight):
    return colour + (np.asarray(other) - colour) * np.minimum(weight, 1)[..., None]


def step(x, edge, soft):
    """0 below the edge, 1 above it, smooth between."""
    t = np.clip((x - edge) / soft + .5, 0, 1)
    return t * t * (3 - 2 * t)


def window(x, low, high, soft):
    return step(x, low, soft) * (1 - step(x, high, soft))


def ridge(x, at, width):
    return np.exp(-((x - at) / width) ** 2)


def thread(f):
    return np.clip(np.add(f["pad"], .25), 0, .85)


def shell_paint(f):
    """A shell: a seam round its side, and a ring, plate, grille or logo on its cap, or a coloured rim."""
    def paint(albedo, u, rho, theta):
        cap = (1 - step(u, .62, .02)) + 0 * theta      # rho falls again behind the rim
        seam = ridge(u, .64, .012) + 0 * theta
        relief = -.010 * seam
        if f["art"] == "ring":
            albedo = mix(albedo, f["accent"], cap * window(rho, .52, .70, .05))
        elif f["art"] == "plate":
            albedo = mix(albedo, f["accent"], cap * (1 - step(rho, .58, .04)))
            relief = relief - .012 * cap * ridge(rho, .62, .04)
        elif f["art"] == "grille":
            slots = cap * window(rho, .20, .56, .06) * step(np.cos(10 * theta), -.1, .7)
            albedo = mix(mix(albedo, np.multiply(f["body"], .25), .9 * slots), f["accent"],
                         cap * (window(rho, .61, .70, .04) + (1 - step(rho, .13, .04))))
            relief = relief - .02 * slots
        elif f["art"] == "logo":
            edge = rho * outline(f["part"], theta)
            bar = step(-abs(edge * np.cos(theta)), -.34, .08) * step(-abs(edge * np.sin(theta)), -.12, .08)
            albedo = mix(albedo, f["accent"], cap * bar)
        else:
            albedo = mix(albedo, f["accent"], window(u, .65, .82, .02) + 0 * theta)
        return mix(albedo, np.multiply(f["body"], .3), .8 * seam), relief
    return paint


def leather_paint(f):
    """A cushion: a seam and a line of stitches round it, and wrinkles that gather there."""
    phase = np.random.default_rng(f["index"]).uniform(0, 2 * np.pi, 3)
    def paint(albedo, u, rho, theta):
        waves = sum(np.sin(n * theta + p + 3 * np.sin(2 * np.pi * u + p)) for n, p in zip((7, 11, 17), phase))
        seam = ridge(u, .30, .018) + 0 * theta
        stitches = ridge(u, .35, .018) * step(np.cos(40 * theta), -.2, .8)
        relief = .0035 * waves * (ridge(u, .33, .12) + ridge(u, .75, .12)) - .012 * seam
        return mix(mix(albedo, np.multiply(f["pad"], .45), seam), thread(f), .7 * stitches), relief
    return paint


def cloth_paint(albedo, u, rho, theta):
    """Over a speaker or a microphone: a weave coarse enough for a small photo."""
    weave = np.cos(2 * np.pi * rho / .2) * np.cos(14 * theta)
    return albedo * (1 + .15 * weave[..., None]), .004 * weave


def quilt_paint(f, ribs):
    """A padded band: ribs across it and stitches along both edges."""
    def paint(albedo, u, t, theta):
        bulge = abs(np.sin(np.pi * ribs * t)) ** .5 + 0 * theta
        stitches = ridge(abs(np.cos(theta)), .45, .07) * step(np.cos(2 * np.pi * 24 * t), -.2, .8)
        return mix(albedo * (.65 + .35 * bulge[..., None]), thread(f), .6 * stitches), .03 * bulge
    return paint


def inlay_paint(colour):
    """A band or a stem: a thin inlay in a groove along each edge."""
    def paint(albedo, u, t, theta):
        groove = ridge(abs(np.cos(theta)), .93, .05) + 0 * t
        return mix(albedo, colour, .55 * groove), -.008 * groove
    return paint


def sleeve_paint(f):
    """What the band slides into: a collar where it comes out, notches on the outside."""
    def paint(albedo, u, t, theta):
        t, edge = t + 0 * theta, abs(np.cos(theta))
        notch = window(t, .25, .6, .05) * step(np.cos(2 * np.pi * 4.5 * t), 0, 1) * (1 - step(edge, .8, .1))
        collar = f["accent"] if f["metal"] != f["accent"] else f["body"]
        albedo = mix(albedo, collar, window(t, .70, .84, .03))
        return albedo * (1 - .35 * notch[..., None]), -.008 * notch
    return paint


def pod_paint(f):
    """A neckband's pod: three keys in its upper side and a collar where the neckband leaves it."""
    def paint(albedo, u, t, theta):
        keys = step(np.cos(theta), .75, .1) * sum(window(t, at, at + .08, .025) for at in (.30, .43, .56))
        albedo = mix(albedo, f["accent"], window(t, .80, .88, .02) + 0 * theta)
        return mix(albedo, f["pad"], .8 * keys), .01 * keys
    return paint


# ------------------------------------------------------------------------------------------------- headphones

PROFILES = {         # a shell from the middle of its cap over the rim to behind it: r in radii, x in depths
    "dome":  [(0, 1), (.06, 1), (.5, 1), (.8, .9), (.97, .62), (1, .3), (1, .1), (.97, 0), (.5, 0), (0, 0)],
    "bevel": [(0, 1), (.06, 1), (.6, 1), (.7, .97), (.97, .5), (1, .4), (1, .04), (.94, 0), (.5, 0), (0, 0)],
    "step":  [(0, 1), (.06, 1), (.6, 1), (.67, .96), (.7, .56), (.96, .54), (1, .4), (1, 0), (.9, 0), (0, 0)],
    "dish":  [(0, .7), (.06, .7), (.5, .72), (.6, 1), (.76, 1), (1, .6), (1, .35), (1, 0), (.9, 0), (0, 0)],
}
CUSHION = [(.72, 0), (.98, 0), (1.02, -.35), (.98, -.85), (.82, -1.05), (.62, -.95), (.52, -.6), (.54, 0)]
CLOTH = [(0, .02), (.62, .02), (.62, -.06), (.5, -.08), (.04, -.08), (0, -.08)]
HUB = [(0, .12), (.05, .12), (.9, .12), (1, .10), (1, .02), (1, -.10), (0, -.10)]


def stretched(profile, depth):
    return [(r, x * depth) for r, x in profile]


def cup(f, radius, depth, thick, pose):
    """Shell, cushion, and the cloth over the speaker; the plane x = 0 parts shell and cushion."""
    shell, part = stretched(PROFILES[f["cap"]], depth), f["part"]
    leather, cloth = ("pad", f["pad"], leather_paint(f)), ("pad", np.multiply(f["pad"], .6), cloth_paint)
    return [revolve(shell, 12, 28, radius, part, pose, ("body", f["body"], shell_paint(f))),
            revolve(stretched(CUSHION, thick), 8, 28, radius, part, pose, leather, closed=True),
            revolve(CLOTH, 4, 20, radius, part, pose, cloth)]


def arch(half_width, foot, top, power, low=0., high=1., n=120):
    """A superellipse over the head from +x to -x, or what lies between two shares of its angle -> (n+1,3)"""
    a = np.linspace(low * np.pi, high * np.pi, n + 1)
    c, s = np.cos(a), np.maximum(np.sin(a), 0)
    x, y = half_width * np.sign(c) * abs(c) ** (2 / power), foot + (top - foot) * s ** (2 / power)
    return np.stack([x, y, 0 * a], -1)


def headband(f, x, foot):
    """The band between two feet at (+-x, foot, 0), and the sleeves into which it slides."""
    top, power, wide = lerp(1.20, 1.46, f["height"]), lerp(2.05, 2.7, f["arch"]), lerp(.10, .17, f["width"])
    metal, sleeve = ("accent", f["metal"], None), ("accent", f["metal"], sleeve_paint(f))
    plastic, quilt = ("body", f["body"], inlay_paint(f["accent"])), ("pad", f["pad"], quilt_paint(f, 7))
    curve, slide = arch(x, foot, top, power), .13
    if f["band"] == "double":                          # two rods, and a strap under them
        strap, seamed = arch(x - .02, foot, top - .24, power, .06, .94), ("pad", f["pad"], quilt_paint(f, 1))
        parts = [sweep(strap, (.15, HALF), 26, 12, FRONT, seamed, copies=1)]
        for z in (-.17, .17):
            parts.append(sweep(curve + z * FRONT, (HALF, HALF), 26, 10, FRONT, metal, 2.4, copies=1))
        wide, slide = .19, .09
    else:
        half = np.array([(wide * .75, HALF), (wide, HALF), (wide, HALF), (wide, HALF), (wide * .75, HALF)])
        parts = [sweep(curve, half, 28, 12, FRONT, plastic, 5, copies=1)]
    if f["band"] == "padded":
        pad = arch(x - .07, foot, top - .09, power, .2, .8)
        parts += [sweep(pad, (wide + .045, .095), 24, 12, FRONT, quilt, 3, copies=1)]
    ends = arch(x, foot, top, power, 0, slide)
    return parts + [sweep(ends, (wide + .02, HALF + .03), 10, 12, FRONT, sleeve)]


def yoke(f, at, rotation, tall, depth, radius):
    """What joins a cup to the band -> parts, and the band's foot.  `at` takes a cup's coordinates to ours."""
    metal = "accent", f["metal"], None
    if f["yoke"] == "stem":
        return [], at(.48 * depth, tall - .10, 0)
    if f["yoke"] == "fork":                            # its ends sink into the shell, where the pivots are
        theta = np.linspace(-.25, np.pi + .25, 60)
        clear = np.minimum(1.6 * np.sin(np.linspace(0, np.pi, 60)), 1) * (HALF + .025)
        reach = radius * outline(f["part"], theta) + clear
        round_cup = np.stack([0 * theta, reach * np.sin(theta), reach * np.cos(theta)], -1) @ rotation.T
        fork = sweep(round_cup + at(.42 * depth, 0, 0), (HALF + .012, HALF), 20, 10, rotation[:, 0], metal)
        return [fork], at(.42 * depth, tall + .06, 0)
    foot = at(.55 * depth, tall + .10, 0)
    bends = at(depth, tall * .8, 0), at(depth + .03, tall * .4, 0), at(depth, -.05, 0)
    arm = sweep(spline([foot + [0, .12, 0], foot, *bends], 60), (.115, HALF), 18, 10, FRONT, metal)
    return [arm, revolve(HUB, 8, 20, .2, "round", (rotation, at(depth, 0, 0)), metal)], foot


def boom(f, start):
    """A microphone at the mouth: an arm from one cup, and foam.  It stays within the cups' width, so that the
    bounding box keeps its middle."""
    curve = spline([start, start + [0, -.12, .30], start + [-.16, -.26, .58], start + [-.40, -.30, .74]], 60)
    return [sweep(curve, (HALF, HALF), 14, 10, UP, ("body", f["body"], None), 2, copies=1),
            sweep(curve[-14:], (.115, .115), 10, 12, UP, ("pad", f["pad"], None), 2, copies=1)]


def headphones(f):
    if f["kind"] == "over-ear":
        sizes = (.50, .60), (.24, .34), (.20, .28)
    else:
        sizes = (.39, .47), (.20, .28), (.15, .22)
    radius, depth, thick = (lerp(*span, f[key]) for span, key in zip(sizes, ("radius", "depth", "cushion")))
    middle = .18 * radius if f["part"] == "D" else 0   # the axis of a D is not its middle
    rotation, centre = turn(lerp(.04, .22, f["toe"]), lerp(.02, .10, f["tilt"])), np.array([.80, 0, middle])
    at = lambda *local: rotation @ np.array(local) + centre
    tall = radius * outline(f["part"], np.array(np.pi / 2))
    parts, foot = yoke(f, at, rotation, tall, depth, radius)
    parts += cup(f, radius, depth, thick, (rotation, centre)) + headband(f, foot[0], foot[1])
    return parts + (boom(f, at(.45 * depth, -.45 * radius, .55 * radius)) if f["boom"] else [])


# ----------------------------------------------------------------------------------------- buds and neckbands

BULB = [(0, .6), (.06, .6), (.6, .6), (.92, .5), (1, .2), (1, -.1), (.8, -.5), (.5, -.7), (.4, -1), (0, -1)]
TIP = [(0, -.8), (.3, -.8), (.66, -.8), (.7, -1), (.6, -1.3), (.5, -1.5), (.24, -1.55), (.2, -1.4), (0, -1.4)]


def bud(f, size, pose):
    """A bulb, and the silicone tip of its nozzle, which looks along -x."""
    skin = "body", f["body"], shell_paint(f)
    return [revolve(stretched(BULB, size), 12, 24, size, f["part"], pose, skin),
            revolve(stretched(TIP, size), 8, 20, size, "round", pose, ("pad", f["pad"], None))]


def buds(f):
    """A pair of wireless buds that stand apart, each on a stem whose end wears the accent."""
    size, centre = lerp(.21, .27, f["radius"]), np.array([.40, 0, 0])
    pose = turn(lerp(-.5, -.9, f["toe"]), lerp(-.1, -.3, f["tilt"])), centre
    halves = {"rod": [(.085, .085)], "blade": [(.13, .075)], "drop": [(.13, .11), (.085, .08)]}
    half = np.array(halves[f["band"]]) * lerp(.95, 1.2, f["width"])
    foot = centre + [0, -lerp(.60, .95, f["height"]), lerp(.02, .20, f["arch"])]
    curve = spline([centre, centre + [.02, -.2, .02], foot], 40)
    stem = sweep(curve, half, 14, 14, FRONT, ("body", f["body"], inlay_paint(f["pad"])), 2.5)
    end = sweep(curve[-9:] - [0, .015, 0], half[-1] + .012, 10, 14, FRONT, ("accent", f["accent"], None), 2.5)
    return bud(f, size, pose) + [stem, end]


def neckband(f):
    """A collar, open in front, higher at the nape; a pod at each end, and buds docked there or on stalks."""
    width, depth, drop = lerp(.62, .84, f["width"]), lerp(.75, .95, f["depth"]), lerp(.25, .6, f["tilt"])
    half = np.array([(.62, 1), (.92, .7), (1, .35), (1, 0), (1, -.45), (.8, -.88), (.42, -1.02), (0, -1.02)])
    x, z = np.concatenate([half, half[-2::-1] * [-1, 1]]).T * [[width], [depth]]
    collar, above = spline(np.stack([x, -drop * z, z], -1), 160), UP + drop * FRONT
    fat, size = lerp(.10, .13, f["radius"]), lerp(.14, .18, f["cushion"])
    pod, widths = collar[:int(lerp(36, 54, f["height"]))], np.array([(1, 1), (1.1, 1.1), (1, 1), (.75, .75)])
    band_skin, pod_skin = ("pad", f["pad"], inlay_paint(f["accent"])), ("body", f["body"], pod_paint(f))
    parts = [sweep(collar, (.066, .074), 34, 10, above, band_skin, 3, copies=1),
             sweep(pod, fat * widths, 16, 14, above, pod_skin, shape=f["part"])]
    tip, ahead = collar[0], (collar[0] - collar[6]) / np.linalg.norm(collar[0] - collar[6])
    if f["band"] == "docked":
        return parts + bud(f, size, (turn(-.9, -.2), tip + ahead * .12))
    ear = tip + [.04, lerp(.40, .62, f["arch"]), .10]
    stalk = spline([tip - ahead * .12, tip + ahead * .30, ear], 40)
    parts += [sweep(stalk, (.063, .063), 14, 10, np.array([1., 0, 0]), ("accent", f["metal"], None), 2)]
    return parts + bud(f, size, (turn(-.5, -.2), ear))


def cables(parts):
    """Two cables that meet, a tail and a plug: thinner than a voxel, hence only for those who ask."""
    points = np.concatenate([part.points.reshape(-1, 3) for part in parts if part.copies == 2])
    start = points[points[:, 1].argmin()]
    joint = np.array([0, start[1] - .55, start[2] + .1])
    fork = spline([start + [0, .05, 0], start - [0, .3, 0], joint + [.05, .3, 0], joint], 60)
    tail = spline([joint + [0, .04, 0], joint - [0, .3, 0], joint + [0, -.5, .15]], 40)
    rubber, brass = ("body", (.12, .12, .12), None), ("accent", (.72, .60, .36), None)
    return [sweep(fork, (.018, .018), 30, 8, FRONT, rubber, 2),
            sweep(tail, (.022, .022), 20, 8, FRONT, rubber, 2, copies=1),
            sweep(tail[-8:], (.04, .04), 10, 8, FRONT, brass, 2, copies=1)]


BUILD = {"over-ear": headphones, "on-ear": headphones, "neckband": neckband, "buds": buds}


# ------------------------------------------------------------------------------------------------------ files

def write_model(folder, factors, thin=False):
    """Into the folder: models/model_normalized.obj and .mtl, images/texture0.png ..., factors.json"""
    parts = BUILD[factors["kind"]](factors)
    write_files(folder, parts + (cables(parts) if thin else []), factors)


def write_files(folder, parts, factors):
    """The same for surfaces of any kind of object"""
    images, rows = textures(parts)
    mtl = "".join("newmtl %s\nKd %.4f %.4f %.4f\nmap_Kd ../images/texture%d.png\n\n"
                  % (material, *image.mean((0, 1)), i) for i, (material, image) in enumerate(images.items()))
    for sub in ("models", "images"):
        os.makedirs(os.path.join(folder, sub), exist_ok=True)
    for i, image in enumerate(images.values()):
        pixels = Image.fromarray((image * 255).round().astype(np.uint8))
        pixels.save(os.path.join(folder, f"images/texture{i}.png"))
    texts = {"models/model_normalized.obj": obj_text(parts, images, rows), "models/model_normalized.mtl": mtl,
             "factors.json": json.dumps(factors, indent=1) + "\n"}
    for path, text in texts.items():
        with open(os.path.join(folder, path), "w", newline="\n") as file:
            file.write(text)

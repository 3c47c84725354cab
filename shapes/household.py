"""
More kinds of objects for those without ShapeNet: chairs, tables, lamps and mugs, built as earphones.py builds
its own.

    factors  = what a catalogue says of an object: style, palette, a second choice, proportions   from a seed
    model    = a dozen closed surfaces that may run into one another (surfaces.py), each with a paint

As with the earphones, a quarter of the cells style x palette x variant never occurs in training, and half of
the test objects lie in those cells.  File space is ShapeNet's: Y up, z to the front, mirror plane x = 0.

read STYLES, draw_factors, chair, table, lamp, mug.
"""
import zlib

import numpy as np

from shapes.earphones import FRONT, HALF, UP, drawing, mix, ridge, step, window, write_files
from shapes.surfaces import lerp, revolve, spline, sweep

STYLES = {                                     # of each category; the variants are a second choice
    "chairs": ("panel", "slats", "hoop", "stool"),
    "tables": ("four legs", "pedestal", "trestle", "drawers"),
    "lamps": ("cone", "drum", "globe", "desk"),
    "mugs": ("cylinder", "taper", "barrel", "bowl"),
}
VARIANTS = {"chairs": ("straight", "splayed", "sled"), "tables": ("square", "round", "long"),
            "lamps": ("post", "vase", "tripod"), "mugs": ("plain", "band", "dots")}
PALETTES = {                                   # the body, and pads and accents to draw one each from
    "oak":     ((.70, .53, .34), [(.80, .77, .70), (.30, .38, .36)], [(.25, .25, .26), (.84, .82, .78)]),
    "walnut":  ((.38, .26, .18), [(.76, .66, .52), (.17, .17, .18)], [(.72, .60, .36), (.66, .67, .68)]),
    "black":   ((.17, .17, .18), [(.55, .17, .15), (.40, .41, .43)], [(.72, .60, .36), (.75, .76, .78)]),
    "white":   ((.87, .87, .85), [(.45, .55, .62), (.80, .68, .48)], [(.70, .53, .34), (.25, .25, .26)]),
    "teal":    ((.19, .46, .48), [(.85, .80, .68), (.16, .22, .26)], [(.85, .83, .78), (.80, .56, .26)]),
    "red":     ((.66, .20, .17), [(.88, .84, .78), (.24, .22, .22)], [(.86, .84, .80), (.24, .23, .23)]),
    "mustard": ((.80, .61, .22), [(.30, .33, .36), (.87, .84, .76)], [(.28, .24, .20), (.85, .84, .80)]),
}
PROPORTIONS = ("width", "depth", "height", "thick", "lean", "shape")                     # each from 0 to 1
UPRIGHT = np.array([[0., -1, 0], [1, 0, 0], [0, 0, 1]])     # turns a surface of revolution's axis to Y


# ---------------------------------------------------------------------------------------------------- factors

def held_out(category, style, palette, variant):
    """21 of the 84 cells, as in a Latin square: each palette in each variant misses one style"""
    return (STYLES[category].index(style) + list(PALETTES).index(palette)
            + VARIANTS[category].index(variant)) % 4 == 0


def draw_factors(category, split, index, seed=0):
    """Object `index` of a split, the same whether 72 are made or 4096"""
    place = seed, zlib.crc32(f"{category} {split}".encode())
    rng = np.random.default_rng((*place, index))
    pick, near = drawing(rng)
    novel = split == "test" and index % 2 == 1
    cells = [(style, palette, variant) for style in STYLES[category] for palette in PALETTES
             for variant in VARIANTS[category]
             if held_out(category, style, palette, variant) == novel]
    # Cells are dealt like cards, so that none comes back too soon
    lap, card = divmod(index // 2 if split == "test" else index, len(cells))
    deal = np.random.default_rng((*place, novel, lap)).permutation(len(cells))
    style, palette, variant = cells[deal[card]]
    body, pads, accents = PALETTES[palette]
    return {"split": split, "index": index, "seed": seed, "kind": category, "style": style,
            "palette": palette, "part": variant, "extra": bool(rng.integers(2)),
            "body": near(body), "pad": near(pick(pads)), "accent": near(pick(accents)),
            **{key: round(rng.random(), 4) for key in PROPORTIONS}}


# ----------------------------------------------------------------------------------------------- paints, bars

def grain_paint(f):
    """Wood: a few soft stripes along the surface, and nothing finer"""
    phase = np.random.default_rng(f["index"]).uniform(0, 2 * np.pi, 2)
    def paint(albedo, u, t, theta):
        waves = np.sin(3 * theta + phase[0] + 2 * np.sin(6 * t + phase[1])) + 0 * t
        return albedo * (1 + .06 * waves[..., None]), .002 * waves
    return paint


def cushion_paint(f):
    """A seam along both edges, and buttons"""
    def paint(albedo, u, t, theta):
        edge = abs(np.cos(theta)) + 0 * t
        seam, button = ridge(edge, .92, .05), step(np.cos(2 * np.pi * 3 * t) * np.cos(2 * theta), .75, .2)
        return mix(mix(albedo, np.multiply(f["pad"], .5), .7 * seam), f["accent"], button), -.01 * button
    return paint


def wood(f):
    return "body", f["body"], grain_paint(f)


def metal(f):
    return "accent", f["accent"], None


def bar(start, end, half, skin, power=4., side=FRONT, copies=2, rows=12):
    """A straight rail from here to there"""
    curve = np.linspace(start, end, 24).astype(float)
    return sweep(curve, half, rows, 10, np.asarray(side, float), skin, power, copies=copies)


def slab(width, depth, thick, height, skin, power=5.):
    """A board that lies flat, from back to front: half width, half depth, half thickness"""
    curve = np.linspace((0, height, -depth), (0, height, depth), 40)
    return sweep(curve, (width, thick), 24, 20, np.array([1., 0, 0]), skin, power, copies=1)


def lathe(profile, rows, cols, skin, height=0., middle=0., closed=False):
    """A profile (radius, height) turned about the vertical"""
    part = revolve(profile, rows, cols, 1., "round", (UPRIGHT, np.array([0, height, middle])), skin, closed)
    part.copies = 1
    return part


# -------------------------------------------------------------------------------------------------- furniture

def chair(f):
    width, depth = lerp(.48, .66, f["width"]), lerp(.48, .62, f["depth"])
    seat, thick, top = 0., lerp(.06, .09, f["thick"]), lerp(.85, 1.25, f["height"])
    floor, half = seat - lerp(.75, 1.0, f["shape"]), lerp(HALF, .10, f["thick"])
    lean = lerp(.02, .22, f["lean"])
    out = .16 if f["part"] == "splayed" else 0.
    parts = [slab(width, depth, thick, seat, wood(f))]
    if f["extra"]:
        parts.append(slab(width * .88, depth * .86, .08, seat + thick + .03,
                          ("pad", f["pad"], cushion_paint(f)), 3))

    # Legs: four, or two frames that stand on runners
    x, z = width - half - .02, depth - half - .02
    for side in (-1, 1):
        parts.append(bar((x, seat, side * z), (x + out, floor, side * (z + out)), (half, half), wood(f)))
    if f["part"] == "sled":
        parts.append(bar((x, floor, -z - .05), (x, floor, z + .05), (half, half), metal(f), side=UP))
    if f["style"] == "stool":
        rest = (floor + seat) / 2
        return parts + [bar((-x, rest, z), (x, rest, z), (HALF, HALF), metal(f), side=UP, copies=1)]

    # The back leans: its places are between the seat and the top
    at = lambda x, share: np.array([x, lerp(seat, top, share), -z - lean * share])
    if f["style"] == "hoop":
        theta = np.linspace(0, np.pi, 60)
        hoop = np.array([at(x * np.cos(a), np.sin(a) ** .7) for a in theta])
        parts.append(sweep(hoop, (HALF, HALF), 28, 10, FRONT, wood(f), 2, copies=1))
        parts += [bar(at(place * x, 0), at(place * x, .88), (.055, .055), wood(f), 2) for place in (.28, .62)]
    else:
        parts.append(bar(at(x, 0), at(x, 1), (half, half), wood(f)))
        parts.append(bar(at(-x, .93), at(x, .93), (.10, HALF), wood(f), side=UP, copies=1, rows=16))
        if f["style"] == "panel":
            skin = ("pad", f["pad"], cushion_paint(f)) if f["extra"] else wood(f)
            curve = np.array([at(0, share) for share in np.linspace(.25, .85, 24)])
            parts.append(sweep(curve, (x - half, HALF), 16, 16, np.array([1., 0, 0]), skin, 5, copies=1))
        else:
            parts += [bar(at(place * x, 0), at(place * x, .92), (.07, .055), wood(f), side=(1, 0, 0))
                      for place in (.2, .62)]
    return parts


def table(f):
    width = lerp(.95, 1.2, f["width"]) if f["part"] == "long" else lerp(.62, .8, f["width"])
    depth, thick = lerp(.55, .7, f["depth"]), lerp(.055, .085, f["thick"])
    floor, half = -lerp(.7, 1.0, f["height"]), lerp(HALF, .11, f["thick"])
    is_round = f["part"] == "round"
    top = wood(f) if f["extra"] else ("pad", f["pad"], None)
    if is_round:
        disc = [(0, thick), (.06, thick), (width * .9, thick), (width, thick * .6), (width, -thick * .6),
                (width * .9, -thick), (0, -thick)]
        parts, depth = [lathe(disc, 10, 32, top)], width
    else:
        parts = [slab(width, depth, thick, 0, top)]
    share = .66 if is_round else 1.
    x, z, out = share * width - half - .03, share * depth - half - .03, lerp(0, .14, f["lean"])
    if f["style"] == "pedestal":
        foot = lerp(.34, .5, f["shape"])
        column = [(0, 0), (half, -.02), (half * 1.2, -.2), (half, .5 * floor), (half * 1.7, .86 * floor),
                  (foot, .95 * floor), (foot, floor), (0, floor)]
        return parts + [lathe(column, 16, 24, metal(f))]
    if f["style"] == "trestle":                        # two crossed legs at each end
        for side in (-1, 1):
            parts.append(bar((x, 0, -side * z), (x, floor, side * (z + out)), (half, half), wood(f)))
        rail = np.array([x, 0, 0])
        return parts + [bar(.5 * floor * UP - rail, .5 * floor * UP + rail, (HALF, HALF), metal(f), side=UP,
                            copies=1)]
    for side in (-1, 1):
        parts.append(bar((x, 0, side * z), (x + out, floor, side * (z + out)), (half, half), wood(f)))
    if f["style"] == "drawers":
        parts.append(slab(x, z, .13, -.14, wood(f)))
        parts.append(bar((.12, -.15, z + .05), (.38, -.15, z + .05), (HALF, HALF), metal(f), side=UP))
    return parts


SHADES = {"cone": [(.34, .42), (.62, -.30)], "drum": [(.52, .34), (.54, -.34)],
          "globe": [(.22, .44), (.50, .28), (.58, 0), (.50, -.28), (.30, -.42)]}


def shade(profile, scale, skin, height, middle=0.):
    """An open lamp shade with a thick wall: down the outside and up the inside"""
    outside = [(r * scale, y * scale) for r, y in profile]
    inside = [(max(r - .09, .04), y) for r, y in outside[::-1]]
    return lathe(outside + inside, 14, 28, skin, height, middle, closed=True)


def shade_paint(f):
    """Lit from within: bright in the middle of its height, with a rim in the accent"""
    def paint(albedo, u, t, theta):
        rim = window(u, .0, .05, .02) + window(u, .44, .52, .02) + 0 * theta
        glow = .18 * np.exp(-((u - .25) / .14) ** 2) + 0 * theta
        return mix(np.minimum(albedo * (1 + glow[..., None]), .9), f["accent"], rim), 0 * rim
    return paint


def legs(f, hub, reach, half):
    """Three of them, to the floor: the mirror image of the second is the third"""
    ends = [(angle, hub + [reach * np.cos(angle), -hub[1], reach * np.sin(angle)])
            for angle in (np.pi / 2, -np.pi / 6)]
    return [bar(hub, end, (half, half), wood(f), 2, UP, copies=1 if angle > 1 else 2) for angle, end in ends]


def lamp(f):
    tall, scale = lerp(.95, 1.45, f["height"]), lerp(.85, 1.15, f["width"])
    half, foot = lerp(HALF, .10, f["thick"]), lerp(.34, .5, f["depth"])
    skin = "pad", f["pad"], shade_paint(f)
    if f["style"] == "desk":                           # two arms and a small shade that looks down
        elbow, head = np.array([0, .62 * tall, -lerp(.2, .5, f["lean"])]), np.array([0, tall, .5])
        bell = [(0, .2), (half, .2), (foot * .6, .12), (foot * .75, 0), (foot * .75, -.07), (0, -.07)]
        disc = [(0, .07), (foot * .9, .07), (foot, 0), (foot, -.07), (0, -.07)]
        low, stand = 0, [lathe(bell if f["part"] == "vase" else disc, 8, 24, wood(f), 0, -.1)]
        if f["part"] == "tripod":
            low, stand = .22, legs(f, np.array([0, .22, -.1]), foot, half)
        parts = [*stand, bar((0, low, -.1), elbow, (half, half), metal(f), 2, copies=1),
                 bar(elbow, head, (half, half), metal(f), 2, copies=1)]
        return parts + [shade(SHADES["cone"], .62 * scale, skin, head[1] - .12, head[2] + .05)]
    # A bar across the shade, from wall to wall, carries it
    reach = {"cone": .48, "drum": .53, "globe": .55}[f["style"]] * scale - .05
    parts = [shade(SHADES[f["style"]], scale, skin, tall),
             bar((-reach, tall - .04, 0), (reach, tall - .04, 0), (HALF, HALF), metal(f), 2, UP, copies=1)]
    if f["part"] == "tripod":
        hub = np.array([0, .55 * tall, 0])
        return [*parts, *legs(f, hub, foot * 1.3, half),
                bar(hub - [0, .1, 0], (0, tall, 0), (half, half), metal(f), 2, copies=1)]
    if f["part"] == "vase":
        belly = lerp(.22, .36, f["shape"])
        profile = [(0, .72 * tall), (half, .72 * tall), (half, .6 * tall), (belly, .42 * tall),
                   (belly * 1.1, .22 * tall), (belly * .6, .04), (belly * .7, 0), (0, 0)]
        parts.append(lathe(profile, 16, 28, ("body", f["body"], band_paint(f, (.35, .5)))))
    else:
        disc = [(0, .08), (foot * .9, .08), (foot, .02), (foot, -.05), (0, -.05)]
        parts.append(lathe(disc, 8, 24, wood(f)))
    return parts + [bar((0, 0, 0), (0, tall, 0), (half, half), metal(f), 2, copies=1)]


# ------------------------------------------------------------------------------------------------------- mugs

def band_paint(f, where):
    """A painted band round a vessel"""
    def paint(albedo, u, rho, theta):
        return mix(albedo, f["accent"], window(u, *where, .02) + 0 * theta), 0 * u + 0 * theta
    return paint


def glaze_paint(f):
    """The outside of a mug: plain, with a band, or with dots; the inside in the second colour"""
    def paint(albedo, u, rho, theta):
        inside = 1 - step(u, .5, .02) + 0 * theta
        pattern = 0 * inside
        if f["part"] == "band":
            pattern = window(u, .62, .72, .02) + 0 * theta
        elif f["part"] == "dots":
            pattern = step(np.cos(6 * theta) * np.cos(2 * np.pi * 7 * u), .35, .2) * window(u, .56, .84, .04)
        return mix(mix(albedo, f["accent"], pattern), f["pad"], inside), 0 * inside
    return paint


def mug(f):
    radius, tall, wall = lerp(.55, .72, f["width"]), lerp(.95, 1.45, f["height"]), lerp(.09, .12, f["thick"])
    bulge = {"cylinder": (1, 1, 1), "taper": (.72, .86, 1), "barrel": (.82, 1.12, .88),
             "bowl": (.5, .95, 1.1)}
    low, middle, high = (radius * share for share in bulge[f["style"]])
    tall = tall * (.72 if f["style"] == "bowl" else 1)
    profile = [(0, .12), (.06, .12), (low - wall, .12), (low - wall, .16), (middle - wall, .5 * tall),
               (high - wall, tall - .03), (high - wall, tall), (high, tall), (high, tall - .03),
               (middle, .5 * tall), (low, .05), (low, 0), (.06, 0), (0, 0)]
    body = lathe(profile, 26, 36, ("body", f["body"], glaze_paint(f)))
    if f["style"] == "bowl" and f["extra"]:
        return [body]                                  # a bowl may have no handle

    # The handle: an ear that begins and ends inside the wall
    reach, thick = lerp(.32, .5, f["depth"]), lerp(HALF, .095, f["lean"])
    at = lambda share: np.interp(share, (0, .5, 1), (low, middle, high)) - .6 * wall
    top, foot = (.80, .24) if f["shape"] > .5 else (.86, .40)
    curve = spline([(0, top * tall, at(top)), (0, top * tall + .04, at(top) + .7 * reach),
                    (0, (top + foot) / 2 * tall, at(.5) + 1.5 * reach),
                    (0, foot * tall - .04, at(foot) + .7 * reach), (0, foot * tall, at(foot))], 50)
    skin = "body", f["accent"] if f["extra"] else f["body"], None
    return [body, sweep(curve, (thick * 1.15, thick), 22, 12, np.array([1., 0, 0]), skin, 2.5, copies=1)]


BUILD = {"chairs": chair, "tables": table, "lamps": lamp, "mugs": mug}


def write_model(folder, factors):
    write_files(folder, BUILD[factors["kind"]](factors), factors)

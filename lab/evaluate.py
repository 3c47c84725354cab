"""
Is it good, is it new, is it diverse?  The numbers, beside controls that need no diffusion at all.

The earphones are procedural, so there is no end of fresh ones (fresh.py): objects of the training objects'
distribution that no training saw.  Good samples cannot be told from them.  README.md explains each number in
plain words; in short, and for each the value of a perfect generator:

    shapes      points on the visible surface, seen by 20 cameras; of two shapes the Chamfer distance
                1-NNA   Put samples and fresh objects together.  How often does a shape's nearest neighbour
                        come from its own group?  50 % means that the groups cannot be told apart.  Against
                        fresh objects' meshes it tells volumes from meshes; "decoded": against fresh objects
                        as the decoder can show them (codes fitted to photos), in groups of as many
                COV     the share of fresh objects that are the nearest to some sample     higher is better
                MMD     the mean distance from a fresh object to its nearest sample, x 1,000          lower
    pictures    the features of a network that reads factors from four views.  The kernel distance of two sets
                of them, MMD^2 with (x y / d + 1)^3 (Binkowski et al. 2018): 0 where the sets are alike.  (Not
                KID: that is the same with Inception's features)
    copies      the share of samples whose nearest training object is under a third as far as the second
    Z_U         Are samples nearer to the training objects than unseen objects are?  (Mann-Whitney, z-scored;
                Meehan et al. 2020)  Below -3 is copying, 0 is right
    cells       kind x palette x outline as that network reads them: the share of the training objects' cells
                that samples reach, and of all other cells
    in pieces   the share of samples that fall apart, among those whose nearest training object is whole
    haze        mean opacity further than 2 pixels from what is opaque                            0 is right
    colours     distance of the colours from the nearest of 4 (k-means): bleeding raises it

Training objects themselves have the best 1-NNA: read it with Z_U.  +- is a deviation, by bootstrap.

in   runs/diffusion, runs/autodecoder        stages 1 and 2, or the model in the box
out  runs/evaluate/      tables.md, tables.json, figure.png
run  python -m lab.evaluate
read judge, rivals, main; and metrics.py, fresh.py.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import Run, UserError, command, parse_config, pick_device, save_figure, save_text, to_bytes

import functools
import html
import math
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from chapters.families import named, read_samples
from diffusion import latents_of, nearest, recombined
from diffusion import sample as draw_samples
from lab.fresh import (AROUND, CELLS, FACTORS, PIXELS, blurred, cell_of, cloud, held_out_codes, rays_around,
                       read, see_objects, train_reader, training_cells)
from lab.metrics import (chamfer, colour_residual, coverage, cubic, haze, kernel_distance, largest_piece,
                         minus_distance, mmd, one_nna, z_u)
from sample import is_copy, load_models, outside_span, save_json
from volume_render import cameras, render_views


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    data: str = ""                       # unseen objects' photos; "": fresh ones, else _test for _train
    cache: str = "runs/fresh"            # folder for the fresh objects and the network that reads factors
    out: str = "runs/evaluate"           # folder for the tables
    count: int = 500                     # samples of each kind, and fresh objects (at least 4)
    points: int = 1024                   # on each shape (at least 1)
    fits: int = 128                      # fresh objects that get codes, fitted to 8 photos each (at least 4)
    fit_steps: int = 400                 # gradient steps for each batch of codes (at least 1)
    readings: int = 1024                 # objects that the reader learns from, 4 pictures each (at least 32)
    reader_steps: int = 4000             # gradient steps of the reader (at least 1)
    controls: bool = True                # no: ours, training and held-out objects alone
    rows: tuple = ("",)                  # chapters' folders that become rows, as runs/gan3d; chapters: all
    bootstrap: int = 200                 # resamplings, for the deviations (at least 2)
    seed: int = 0                        # of the first sample, the controls, the fresh objects
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(count=4, points=64, fits=4, fit_steps=3, readings=32,
                                               reader_steps=10, bootstrap=20,
                                               cache="runs/fresh_smoke")}


# ------------------------------------------------------------------------------------------------- the tables

def resampled(count, config, name):
    """(T,count): how often each of `count` objects is drawn, in each of T bootstrap resamplings.  The draws
    follow from the seed and a name."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + zlib.crc32(name.encode()))
    drawn = torch.randint(count, (config.bootstrap, count), generator=generator)
    return torch.zeros(config.bootstrap, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def see_volumes(model, latents, config):
    """latents (N,...), or volumes and who shows them -> as fresh.see_object does of meshes, pictures
    (N,4,H,W,3) bytes and points (N,P,3); and how neat they are: largest piece, haze and colours, (N,) each"""
    origins, directions = rays_around()
    pictures, points, neatness = [], [], []
    for part in latents.split(32):
        rgb, alpha, depth, solid = render_views(model, part, cameras(AROUND), PIXELS, batch=2)
        pictures.append(to_bytes(rgb[:, :4]))
        points += [cloud(origins, directions, d, a > 0.5, config.points)
                   for a, d in zip(alpha.flatten(2), depth.flatten(2))]
        neatness += [(largest_piece(s), haze(a[:4]), colour_residual(c[:4], a[:4]))
                     for c, a, s in zip(rgb, alpha, solid)]
    piece, fog, colours = torch.tensor(neatness, dtype=torch.float64).T
    return {"rgb": torch.cat(pictures), "points": torch.stack(points).to(latents.device), "latents": latents,
            "piece": piece, "haze": fog, "colours": colours}


def judge(some, fresh, held, training, cells, config):
    """One row of all tables: {number: (value, itself in each resampling)}, of what is defined for it.  Means
    are redrawn by bootstrap, and what asks for the nearest shape by halves, because a shape that is drawn
    twice would be its own neighbour"""
    row = {}

    def mean(name, values):
        values = values.double()
        row[name] = values.mean().item(), resampled(len(values), config, name) @ values / len(values)

    def apart(name, statistic, a, b):
        # The other set is resampled alike for all rows, so that its luck cancels in differences
        weights = resampled(len(a), config, name), resampled(len(b), config, "the others")
        row[name] = statistic(a, b).item(), statistic(a, b, *weights)

    for name, other in (("1-NNA", fresh), ("1-NNA, decoded", held)) if "points" in some else ():
        if other and some is not other:
            N = min(len(some["points"]), len(other["points"]))
            between = chamfer(some["points"], other["points"][:N])
            row[name] = told_apart(name, within(some), between, within(other)[:N, :N], config)
            if other is fresh:
                cover = lambda distance: len(coverage(distance).unique()) / distance.shape[1]
                both = zip(halves(N, config, name), halves(N, config, "COV"))
                again = [cover(between[a][:, b]) for a, b in both]
                row["COV"] = cover(between[:N]), torch.tensor(again)
                near = mmd(between[:N]).double()
                row["MMD"] = near.mean().item(), resampled(N, config, "COV") @ near / N
    if "features" in some:
        apart("to photos", functools.partial(kernel_distance, cubic), some["features"], fresh["features"])
        if some is not held and "piece" in some:
            apart("to reconstructions", functools.partial(kernel_distance, cubic), some["features"],
                  held["features"])
    if "labels" in some:
        cell = cell_of(some["labels"])
        new = ~torch.isin(cell, torch.tensor(cells))
        row["training cells"] = len(cell[~new].unique()) / len(cells), None
        row["other cells"] = len(cell[new].unique()) / (CELLS - len(cells)), None
        mean("in other cells", new)
    # What asks for latents is not defined for volumes that this autodecoder did not make
    if "latents" in some:
        latent = some["to training"]
        mean("d1", latent[:, 0])
        mean("copies", is_copy(latent))
        row["closest two of 64"] = torch.pdist(some["latents"][:64].flatten(1)).min().item(), None
        row["outside"] = outside_span(some["latents"], training["latents"]).quantile(0.95).item(), None
        if held and some is not held:
            apart("Z_U", z_u, latent[:, 0], held["to training"][:, 0])
    if "piece" in some:
        shape, whole = some["shape to training"], training["piece"][some["whose"]] > 0.95
        mean("copies, shapes", is_copy(shape))
        if whole.any():
            mean("in pieces", ~(some["piece"][whole] >= 0.95))        # an empty one (NaN) is not whole
        mean("haze", some["haze"])
        if (full := some["colours"].isfinite()).any():
            mean("colours", some["colours"][full])
        if held and some is not held:
            apart("Z_U, shapes", z_u, shape[:, 0], held["shape to training"][:, 0])
            apart("pixels", functools.partial(kernel_distance, minus_distance), pixels(some), pixels(held))
    return row


def halves(count, config, name):
    """(T,count/2): which half of `count` objects is drawn, in each of T resamplings.  A statistic varies over
    halves of one set about as it does over whole sets ("delete-half jackknife", Shao and Wu 1989)"""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + zlib.crc32(f"half {name}".encode()))
    return torch.rand(config.bootstrap, count, generator=generator).argsort(1)[:, :(count + 1) // 2]


def told_apart(name, own, between, among_others, config):
    """1-NNA and its resamplings: of each group of as many samples as there are others (N), then the mean"""
    def groups(own, between, others):
        N = len(others)
        return torch.stack([one_nna(own[k:k + N, k:k + N], between[k:k + N], others).double().mean()
                            for k in range(0, len(own) - N + 1, N)]).mean()
    some = zip(halves(len(own), config, name), halves(len(among_others), config, name + " others"))
    redrawn = [groups(own[a][:, a], between[a][:, b], among_others[b][:, b]) for a, b in some]
    return groups(own, between, among_others).item(), torch.stack(redrawn)


def within(some):
    """The distances of a set's shapes to each other, once"""
    if "within" not in some:
        some["within"] = chamfer(some["points"], some["points"])
    return some["within"]


def pixels(some):
    """(N,4,H,W,3) bytes -> (N,K): half as large, to compare as they are"""
    small = F.avg_pool2d(some["rgb"].flatten(0, 1).permute(0, 3, 1, 2) / 255, 2)
    return small.reshape(len(some["rgb"]), -1)


def rivals(model, denoiser, config, device):
    """-> {name: latents (N,...)}: ours and the controls"""
    generator, count = torch.Generator().manual_seed(config.seed), config.count
    seeds, training = range(config.seed, config.seed + count), latents_of(model, model.codes)
    sets = {"ours": torch.cat([denoiser.latents(draw_samples(denoiser, seeds[k:k + 64]))
                               for k in range(0, count, 64)])}
    if config.controls:
        anybody = lambda: torch.randint(len(training), (count,), generator=generator).to(device)
        plain = torch.zeros(count, 3, device=device)                               # not stretched
        parts = [gaussian(part, count, generator) for part in (model.shapes, model.palettes)]
        sets |= {"recombined codes": latents_of(model, recombined(model, count, generator, denoiser.config)),
                 "swapped colours": latents_of(model,
                                               model.code(plain, anybody(), model.palettes[anybody()])),
                 "Gaussian of codes": latents_of(model, torch.cat([plain, *parts], 1)),
                 "Gaussian of latents": gaussian(training, count, generator),
                 "a copier": training[anybody()]}
    return sets | {"training objects": training}


def chapters(model, config):
    """-> {name: (who shows them, latents or volumes)} of samples that chapters wrote, at most as many as of
    ours; and what they cost"""
    found = {name: read_samples(row, model) for name, row in named(config.rows).items()}
    for name, (_, some, _) in found.items():
        if len(some) < config.count:
            print(f"{name}: {len(some)} samples, ours are {config.count}: COV and cells do not compare")
    return ({name: (shown_by, some[:config.count].to(model.shapes.device))
             for name, (shown_by, some, _) in found.items()},
            [[name, *(f"{state[key]:.3g}" for key in ("parameters", "training_seconds", "sample_seconds"))]
             for name, (_, _, state) in found.items()])


def gaussian(points, count, generator):
    """points (N,...) -> (count,...) from the Gaussian with their mean and covariance"""
    mean = points.mean(0)
    weight = torch.randn(count, len(points), generator=generator).to(points.device)
    weight = weight / math.sqrt(len(points) - 1)
    return mean + (weight @ (points - mean).flatten(1)).view(count, *points.shape[1:])


MOST = 1024                                        # training objects that are seen and compared by shape
LADDER = ("noise", "fresh objects, blurred", "Gaussian of codes", "fresh objects")
TABLES = {
    "Generation": ("1-NNA", "1-NNA, decoded", "COV", "MMD", "to photos", "to reconstructions", "pixels"),
    "Further from fresh objects than ours": ("to photos", "to reconstructions", "pixels"),
    "Memorisation": ("d1", "copies", "Z_U", "copies, shapes", "Z_U, shapes", "closest two of 64"),
    "Neatness": ("in pieces", "haze", "colours", "outside"),
    "Factors": ("training cells", "other cells", "in other cells")}
PERCENT = ("1-NNA", "1-NNA, decoded", "COV", "copies", "copies, shapes", "training cells", "other cells",
           "in other cells", "in pieces")


def compared(rows):
    """{row: {number: (value, resamplings)}} -> the same of the differences from ours: fresh objects are drawn
    alike for all rows, and what they share in luck cancels"""
    ours = rows["ours"]
    return {name: {key: (row[key][0] - ours[key][0], row[key][1] - ours[key][1])
                   for key in ("to photos", "to reconstructions", "pixels") if key in row and key in ours}
            for name, row in rows.items() if row is not ours}


def with_deviation(rows):
    return {name: {key: (value, None if again is None else again.std().item())
                   for key, (value, again) in row.items()} for name, row in rows.items()}


def shown(name, number):
    """(value, deviation or None) or None, as it stands in a table"""
    if number is None:
        return "-"
    scale = 100 if name in PERCENT else 1000 if name == "MMD" else 1
    digits = 1 if scale == 100 or name in ("d1", "closest two of 64") else 4 if name == "haze" else 2
    value, deviation = number
    if abs(value) > 1e4:                                           # noise, by the distance of pictures
        return f"{value:.0e}"
    text = f"{scale * value:.{digits}f}"
    return text if deviation is None else f"{text} +- {scale * deviation:.{digits}f}"


def markdown(title, head, rows):
    # A name in a table must not open a cell, a line or an HTML tag
    plain = lambda cell: html.escape(" ".join(cell.split()), quote=False).replace("|", "\\|")
    line = lambda cells: "| " + " | ".join(map(plain, cells)) + " |"
    return "\n".join([f"### {title}", "", line(head), "|---" * len(head) + "|", *map(line, rows)]) + "\n"


def plot_rows(rows, path):
    """The headline numbers, each row a point with twice its deviation"""
    rows = {name: row for name, row in rows.items() if name != "noise"}               # far off any scale
    names = [name for name in ("1-NNA, decoded", "Z_U, shapes", "to photos", "to reconstructions")
             if any(name in row for row in rows.values())] or ["d1"]
    figure = Figure(figsize=(3 * len(names), 3.2), layout="constrained")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names):
        for k, row in enumerate(rows.values()):
            if name in row:
                value, deviation = row[name]
                axis.errorbar(value, -k, xerr=2 * deviation, fmt="o", ms=4, color="C3" if k == 0 else "C0")
        axis.axvline(0.5 if "1-NNA" in name else 0, color="grey", lw=0.7)
        axis.set_title(name)
        if name.startswith("to"):
            axis.set_xscale("symlog", linthresh=0.2)
            axis.set_xticks([0, 0.1, 1], ["0", "0.1", "1"])
    axes[0, 0].set_yticks([-k for k in range(len(rows))], list(rows))
    save_figure(path, figure)


# ------------------------------------------------------------------------------------------------------ main

def read_sets(reader, sets, fresh, control, cells):
    """Adds features and factors to each set, and the sets by which to check the distance of pictures -> how
    well the reader reads"""
    noise = torch.randint(256, fresh["rgb"][:, :4].shape, generator=torch.Generator().manual_seed(0)).byte()
    sets["fresh objects"] = {"rgb": control["rgb"], "points": control["points"]}
    sets["fresh objects, blurred"] = {"rgb": blurred(control["rgb"][:, :4].float(), 8).byte()}
    sets["noise"] = {"rgb": noise}
    for some in (fresh, *sets.values()):
        features, some["labels"] = read(reader, some["rgb"][:, :4])
        if some is fresh:
            mean, deviation = features.mean(0), features.std(0) + 1e-6
        some["features"] = (features - mean) / deviation
    del sets["fresh objects, blurred"]["labels"], sets["noise"]["labels"]
    right = fresh["labels"] == fresh["true labels"]
    inside = torch.isin(cell_of(sets["training objects"]["labels"]), torch.tensor(cells)).double().mean()
    each = ", ".join(f"{name} {share:.1%}" for name, share in zip(FACTORS, right.double().mean(0).tolist()))
    return (f"The reader, on photos of fresh objects: {each}, all three {right.all(1).double().mean():.1%} "
            f"right. Of the training objects' reconstructions it puts {inside:.1%} into cells of training "
            "objects, where all of them belong.\n")


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)
    families, costs = chapters(model, config)        # first, because a wrong folder must not cost an hour
    if config.data and not Path(config.data).is_dir():
        raise UserError(f"--data {config.data} is not there")
    # If a folder cannot be written, say so now, and not after an hour.  Two evaluations may share the cache:
    # they make the same, file by file
    run = Run(config.cache, "fresh", config, (), "fresh.json", stale=())
    run.lock.close()
    lock, out = Run(config.out, "evaluate", config, (), "evaluate.json", stale=()).lock, Path(config.out)
    cells, count, unseen = training_cells(names, model.config.data), config.count, None
    if cells:
        # Three sets of fresh objects: to compare with, to be compared, and to fit codes to (the first, so
        # that they are the same for any count)
        n = config.fits
        reader = train_reader(config, run, device)
        numbers = range(n + 2 * count)
        every = see_objects(run.folder / "fresh.pt", "fresh", numbers, config, 8, config.points, run)
        every["points"] = every["points"].to(device)
        fresh, control, unseen = ({key: value[a:b] for key, value in every.items()}
                                  for a, b in ((n, n + count), (n + count, None), (0, n)))

    # All shapes are compared with all, so of thousands of training objects the first ones are seen.  (They
    # are dealt like cards.)  Latents are compared with those of all
    own = rivals(model, denoiser, config, device)
    known, own["training objects"] = own["training objects"], own["training objects"][:MOST]
    sets = {name: (model, latents) for name, latents in own.items()} | families
    codes = held_out_codes(model, config, None if config.data else unseen, device)
    if codes is not None:
        sets["held-out objects"] = model, latents_of(model, codes)
    for name, (shown_by, some) in sets.items():
        print(f"seeing {len(some)} of {name}", flush=True)
        sets[name] = see_volumes(shown_by, some, config)
        if shown_by is not model:
            del sets[name]["latents"]
    training, held = sets["training objects"], sets.get("held-out objects")
    for some in sets.values():
        shape = chamfer(some["points"], training["points"]).sqrt()
        shape = shape.fill_diagonal_(math.inf) if some is training else shape
        some["shape to training"], whose = shape.sort(1)
        if "latents" in some:
            distance, whose = nearest(some["latents"], known, some is training)
            some["to training"], whose = distance.cpu(), whose[whose < MOST].view(len(whose), -1)
        some["whose"] = torch.arange(len(whose)) if some is training else whose[:, 0].cpu()
    if cells:
        remark = read_sets(reader, sets, fresh, control, cells)
    else:
        fresh, remark = held, ("The training objects are not those of earphones.py: there are no fresh ones. "
                               "Shapes are compared with held-out objects as the decoder shows them, if "
                               "stage 0 kept some aside (--holdout).\n")
    if len(known) > MOST:
        remark += f"Of {len(known)} training objects {MOST} stand for all, but in distances of latents.\n"
    rows = {name: judge(some, fresh, held, training, cells, config) for name, some in sets.items()}
    more, rows = with_deviation(compared(rows)), with_deviation(rows)

    if cells:
        rungs = [rows[name]["to photos"][0] for name in LADDER if name in rows]
        falls = "falls" if rungs == sorted(rungs, reverse=True) else "does NOT fall"
        remark += f"\nThe distance of pictures {falls} down the ladder {', '.join(LADDER)}.\n"
    others = f"{count if cells else 0} fresh objects, {len(held['latents']) if held else 0} held-out ones"
    text = [f"{count} samples of a kind, {others} with fitted codes; +- is a deviation ({config.bootstrap} "
            "resamplings).\n", remark]
    for title, columns in TABLES.items():
        some = more if "ours" in title else rows
        known = {column for row in some.values() for column in row}
        lines = [[name, *(shown(column, row.get(column)) if column in known else "not defined"
                          for column in columns)]
                 for name, row in some.items() if row.keys() & set(columns) or name == "ours"]
        text.append(markdown(title, ["", *(f"{c}, %" if c in PERCENT else c for c in columns)], lines))
    if costs:
        text.append(markdown("Cost", ["", "parameters", "training, s", "a sample, s"], costs))
    print("\n" + "\n".join(text))
    save_text(out / "tables.md", "\n".join(text))
    save_json(out / "tables.json", {"config": asdict(config), "rows": rows, "more": more})
    plot_rows(rows, out / "figure.png")
    print(f"wrote {out}: tables.md, tables.json, figure.png")
    lock.close()


if __name__ == "__main__":
    command(main)

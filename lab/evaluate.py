"""
Is it good, is it new, is it diverse?  The numbers, beside controls that need no diffusion at all.

The earphones are procedural, so there is no end of fresh ones (fresh.py): objects of the training objects'
distribution that no training saw.  Good samples cannot be told from them.

    shapes      points on the visible surface, seen by the same 20 cameras.  Of two shapes the Chamfer
                distance; of two sets
                1-NNA   how often a shape's nearest other is of its own set: 50 % where sets are alike.
                        Against fresh objects' meshes it tells volumes from meshes, whatever the samples;
                        "decoded": against those as the decoder can show them (codes fitted to photos),
                        the mean over groups of as many samples as there are of those
                COV     the share of fresh objects that are some sample's nearest
                MMD     the mean distance from a fresh object to its nearest sample (x 1,000)
    pictures    the features of a network that reads factors off four views.  Of two sets their kernel
                distance, MMD^2 with (x y / d + 1)^3 (Binkowski et al. 2018): 0 where they are alike.  (Not
                KID: that is the same of Inception's features.)  To photos of fresh objects, and to fresh
                objects as the decoder can show them
    copies      the share of samples whose nearest training object is under a third as far as the second
    Z_U         are samples nearer to the training objects than unseen objects are?  (Mann-Whitney, z-scored;
                Meehan et al. 2020)  Below -3: copying
    cells       kind x palette x outline as that network reads them: how many of those that training objects
                come from the samples reach, and how many of all others
    d1          the mean distance of a latent to the nearest training object's; "closest two of 64": of the
                first 64 latents to each other.  "shapes": a number by Chamfer distance, not by latents
    pixels      the energy distance of the small pictures as they are
    foreground  PSNR over the object's own pixels

Training objects themselves have the best 1-NNA: read it with Z_U.  +- is a deviation, by bootstrap.

in   runs/diffusion, runs/autodecoder, data/       stages 0 to 2, or the model in the box;
     runs/shuffled                                 a control, if it is there
out  runs/evaluate/      tables.md, tables.json, figure.png, nearest.png, worst.png
run  python -m lab.evaluate
     python diffusion.py --shuffle --out runs/shuffled       trains that control: latents of nothing
read judge, rivals, main; and metrics.py, fresh.py.
"""
import functools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from autodecoder import Config as Stage1
from autodecoder import fit_codes, mean_of, mean_photo, measure
from common import (Run, at_least, atomic_file, new_figure, parse_config, pick_device, save_figure,
                    save_picture, to_bytes)
from denoiser import sample as draw_samples
from diffusion import code_mixtures, fingerprint, latents_of, load_denoiser
from lab.fresh import (AROUND, CELLS, FACTORS, PIXELS, blurred, cell_of, cloud, held_out_codes, rays_around, read,
                   see_objects, train_reader, training_cells, unseen_photos)
from lab.metrics import (chamfer, copies, coverage, cubic, kernel_distance, minus_distance, mmd, nearest, one_nna,
                     z_u)
from lab.metrics import psnr  # noqa: F401      with the others, for those who import evaluate
from shapes.photos import read_photos
from sample import contact_sheet, load_models
from sample import measure as measure_samples
from views import ANGLES, cameras, preview, render_views, save_preview


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder, or a file that sample.py --pack wrote
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    data: str = ""                       # unseen objects' photos; "": as the training ones', _test for _train
    shuffled: str = "runs/shuffled"      # a denoiser trained with --shuffle; not there: left out
    cache: str = "runs/fresh"            # folder for the fresh objects and the network that reads factors
    out: str = "runs/evaluate"           # folder for the tables
    count: int = 500                     # samples of each kind, and fresh objects
    points: int = 1024                   # on each shape
    fits: int = 128                      # fresh objects that codes are fitted to, from 8 photos each
    fit_steps: int = 400                 # gradient steps for each batch of codes
    readings: int = 1024                 # objects that the reader learns from, by four pictures each
    reader_steps: int = 4000             # gradient steps of the reader
    controls: bool = True                # no: ours, training and held-out objects alone
    reconstructions: int = 24            # unseen objects in the table of reconstructions; 0: no such table
    bootstrap: int = 200                 # resamplings, for the deviations
    seed: int = 0                        # of the first sample, the controls, the fresh objects
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(count=6, points=64, fits=4, fit_steps=3, readings=32,
                                               reader_steps=10, reconstructions=2, bootstrap=20,
                                               cache="runs/fresh_smoke")}


# ------------------------------------------------------------------------------------------------- the tables

def resampled(count, config, salt):
    """(T,count): how often each of `count` objects is drawn, in each of T bootstrap resamplings"""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + salt)
    drawn = torch.randint(count, (config.bootstrap, count), generator=generator)
    return torch.zeros(config.bootstrap, count, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def see_volumes(model, latents, config):
    """latents (N,...) -> what fresh.see_object gives of meshes: pictures (N,4,H,W,3) bytes, points (N,P,3)"""
    origins, directions = rays_around()
    pictures, points = [], []
    for latent in latents.split(32):
        rgb, alpha, depth, _ = render_views(model, latent, cameras(AROUND), PIXELS, batch=2)
        pictures.append(to_bytes(rgb[:, :4]))
        points += [cloud(origins, directions, d, a > 0.5, config.points)
                   for a, d in zip(alpha.flatten(2), depth.flatten(2))]
    points = torch.stack(points).to(latents.device)
    return {"rgb": torch.cat(pictures), "points": points, "latents": latents}


def judge(some, fresh, held, training, cells, config):
    """One row of all tables: {number: (value, itself in each resampling)}, of what is defined for it"""
    row, salt = {}, iter(range(100))
    again = lambda what: resampled(len(what), config, next(salt))

    def share(name, hits):
        row[name] = hits.double().mean().item(), again(hits) @ hits.double() / len(hits)

    def apart(name, statistic, a, b):
        weights = again(a), resampled(len(b), config, 1000)         # of the fresh objects always the same
        row[name] = statistic(a, b).item(), statistic(a, b, *weights)

    def told_apart(name, between, among_others):
        """1-NNA: of each group of as many samples as there are others (N), then the mean"""
        N, own = between.shape[1], within(some)
        groups = [slice(k, k + N) for k in range(0, len(own) - N + 1, N)]
        hits = [one_nna(own[g, g], between[g], among_others) for g in groups]
        hits = torch.stack(hits).double()                                                  # (G,2N)
        ours, theirs = hits[:, :N].flatten(), hits[:, N:].mean(0)                          # (GN,), (N,)
        redrawn = (again(ours) @ ours / len(ours) + again(theirs) @ theirs / N) / 2
        row[name] = (ours.mean().item() + theirs.mean().item()) / 2, redrawn

    for name, other in (("1-NNA", fresh), ("1-NNA, decoded", held)) if "points" in some else ():
        if other and some is not other:
            N = min(len(some["points"]), len(other["points"]))
            between = chamfer(some["points"], other["points"][:N])
            told_apart(name, between, within(other)[:N, :N])
        if other and some is not other is fresh:
            named, near = coverage(between[:N]), mmd(between[:N]).double()
            weight = again(named)
            redrawn = [len(named[w > 0].unique()) / N for w in weight]
            row["COV"] = len(named.unique()) / N, torch.tensor(redrawn)
            row["MMD"] = near.mean().item(), weight @ near / N
    if "features" in some:
        apart("to photos", functools.partial(kernel_distance, cubic), some["features"], fresh["features"])
        if some is not held and "latents" in some:
            apart("to reconstructions", functools.partial(kernel_distance, cubic), some["features"],
                  held["features"])
    if "labels" in some:
        cell = cell_of(some["labels"])
        new = ~torch.isin(cell, torch.tensor(cells))
        row["training cells"] = len(cell[~new].unique()) / len(cells), None
        row["other cells"] = len(cell[new].unique()) / (CELLS - len(cells)), None
        share("in other cells", new)
    if "latents" in some:
        latent, shape = some["to training"], some["shape to training"]
        row["d1"] = latent[:, 0].mean().item(), again(latent) @ latent[:, 0].double() / len(latent)
        share("copies", copies(latent))
        share("copies, shapes", copies(shape))
        row["closest two of 64"] = torch.pdist(some["latents"][:64].flatten(1)).min().item(), None
        if held and some is not held:
            apart("Z_U", z_u, latent[:, 0], held["to training"][:, 0])
            apart("Z_U, shapes", z_u, shape[:, 0], held["shape to training"][:, 0])
            apart("pixels", functools.partial(kernel_distance, minus_distance), pixels(some), pixels(held))
    return row


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
    draw = lambda denoiser: torch.cat([draw_samples(denoiser, seeds[k:k + 64]) for k in range(0, count, 64)])
    sets = {"ours": draw(denoiser)}
    if config.controls:
        sets |= {"mixtures of codes": latents_of(model, code_mixtures(model.codes, count, generator)),
                 "Gaussian of codes": latents_of(model, gaussian(model.codes, count, generator)),
                 "Gaussian of latents": gaussian(training, count, generator)}
        if Path(config.shuffled, "last.pt").exists():
            other, trained_on = load_denoiser(config.shuffled, device)
            if trained_on["fingerprint"] == fingerprint(model):
                sets["shuffled latents"] = draw(other)
        sets["a copier"] = training[torch.randint(len(training), (count,), generator=generator)]
    return sets | {"training objects": training}


def gaussian(points, count, generator):
    """points (N,...) -> (count,...) from the Gaussian with their mean and covariance"""
    mean = points.mean(0)
    weight = torch.randn(count, len(points), generator=generator).to(points.device)
    weight = weight / math.sqrt(len(points) - 1)
    return mean + (weight @ (points - mean).flatten(1)).view(count, *points.shape[1:])


LADDER = ("noise", "fresh objects, blurred", "Gaussian of codes", "ours", "fresh objects")
RECONSTRUCTION = ("PSNR, dB", "foreground", "white", "its foreground", "mean photo", "its foreground",
                  "deviation over objects", "worst three")


def reconstruction_rows(model, names, config, device):
    """Held-out views of training objects, and of unseen objects known from 1, 2 and 8 photos, where there are
    photos -> rows of a table; and a picture of the worst three of each: truth, ours, depth (3,B,H,W,3)"""
    pictures = []

    def row(what, photos, codes, views, white):
        rows = measure(model, codes, photos, range(len(codes)), views, device, white)
        each = [mean_of([r for r in rows if r["object"] == o], "ours") for o in range(len(codes))]
        worst = sorted(range(len(codes)), key=each.__getitem__)[:3]
        pictures.append(preview(model, codes[worst], photos, worst, views[0], device))
        numbers = [mean_of(rows, key) for key in ("ours", "ours_fg", "white", "white_fg", "mean", "mean_fg")]
        return [what, *(f"{number:.2f}" for number in (*numbers, torch.tensor(each).std().item())),
                ", ".join(f"{photos.names[o]} {each[o]:.1f}" for o in worst)]

    rows, size = [], model.config.size
    if Path(model.config.data).is_dir():
        photos = read_photos(model.config.data, size, len(names))
        taught = photos.rgb.shape[1] - model.config.holdout_views
        if photos.names == names:
            rows.append(row(f"{len(names)} training objects, held-out views", photos, model.codes,
                            range(taught, photos.rgb.shape[1]), mean_photo(photos, torch.arange(taught))))
    if unseen_photos(config, model).is_dir():
        photos = read_photos(unseen_photos(config, model), size, config.reconstructions)
        count = photos.rgb.shape[1]
        for given in (1, 2, 8):
            if given < count:
                recipe = Stage1(fit_steps=config.fit_steps)
                codes = fit_codes(model, photos, torch.arange(given), recipe, device)
                rows.append(row(f"{len(codes)} unseen objects from {given} photos", photos, codes,
                                range(max(given, count - 8), count), mean_photo(photos, torch.arange(count))))
    return rows, pictures


TABLES = {
    "Generation": ("1-NNA", "1-NNA, decoded", "COV", "MMD", "to photos", "to reconstructions", "pixels"),
    "Further from fresh objects than ours": ("to photos", "to reconstructions", "pixels"),
    "Memorisation": ("d1", "copies", "Z_U", "copies, shapes", "Z_U, shapes", "closest two of 64"),
    "Factors": ("training cells", "other cells", "in other cells")}
PERCENT = ("1-NNA", "1-NNA, decoded", "COV", "copies", "copies, shapes", "training cells", "other cells",
           "in other cells")


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
    digits = 1 if scale == 100 or name in ("d1", "closest two of 64") else 2
    value, deviation = number
    if abs(value) > 1e4:                                           # noise, by the distance of pictures
        return f"{value:.0e}"
    text = f"{scale * value:.{digits}f}"
    return text if deviation is None else f"{text} +- {scale * deviation:.{digits}f}"


def markdown(title, head, rows):
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def plot_rows(rows, path):
    """The headline numbers, each row a point with twice its deviation"""
    rows = {name: row for name, row in rows.items() if name != "noise"}               # far off any scale
    names = [name for name in ("1-NNA, decoded", "Z_U, shapes", "to photos", "to reconstructions")
             if any(name in row for row in rows.values())] or ["d1"]
    figure, axes = new_figure(1, len(names), figsize=(3 * len(names), 3.2), sharey=True, squeeze=False)
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
    save_figure(figure, path)


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
    at_least(config, count=4, points=1, fits=4, readings=32, reader_steps=1, reconstructions=0, bootstrap=2)
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)
    cells, count, unseen = training_cells(names, model.config.data), config.count, None
    if cells:
        # Three sets of fresh objects: to compare with, to be compared, and to fit codes to (the first, so
        # that they are the same for any count)
        n = config.fits
        run = Run(config.cache, config, ("seed", "readings", "reader_steps"), name="fresh.json")
        run.lock.close()                   # two evaluations may share it: they make the same, file by file
        reader = train_reader(config, run, device)
        numbers = range(n + 2 * count)
        every = see_objects(run.folder / "fresh.pt", "fresh", numbers, config, 8, config.points, run)
        every["points"] = every["points"].to(device)
        fresh, control, unseen = ({key: value[a:b] for key, value in every.items()}
                                  for a, b in ((n, n + count), (n + count, None), (0, n)))

    sets = rivals(model, denoiser, config, device)
    codes = held_out_codes(model, config, unseen, device)
    if codes is not None:
        sets["held-out objects"] = latents_of(model, codes)
    for name, latents in sets.items():
        print(f"seeing {len(latents)} of {name}", flush=True)
        sets[name] = see_volumes(model, latents, config)
    training, held = sets["training objects"], sets.get("held-out objects")
    for some in sets.values():
        shape = chamfer(some["points"], training["points"]).sqrt()
        shape = shape.fill_diagonal_(math.inf) if some is training else shape
        some["shape to training"] = shape.sort(1).values
        some["to training"] = nearest(some["latents"], training["latents"], some is training)[0].cpu()
    if cells:
        remark = read_sets(reader, sets, fresh, control, cells)
    else:
        fresh, remark = held, ("The training objects are not those of earphones.py: there are no fresh ones. "
                               "Shapes are compared with held-out objects as the decoder shows them, if "
                               "stage 0 kept some aside (--holdout).\n")
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
    pictures = []
    if config.reconstructions:
        lines, pictures = reconstruction_rows(model, names, config, device)
        if pictures:
            text.append(markdown("Reconstruction", ("", *RECONSTRUCTION), lines))
            save_preview(Path(config.out, "worst.png"), torch.cat(pictures, 1))
    print("\n" + "\n".join(text))

    out = Path(config.out)
    for file, content in (("tables.md", "\n".join(text)),
                          ("tables.json", json.dumps({"config": asdict(config), "rows": rows, "more": more},
                                                     indent=1))):
        with atomic_file(out / file) as temporary:
            temporary.write_text(content)
    plot_rows(rows, out / "figure.png")
    few = {name: render_views(model, sets[name]["latents"][:most], cameras(ANGLES), 64)
           for name, most in (("ours", 16), ("training objects", len(names)))}
    measured = measure_samples(sets["ours"]["latents"][:16], training["latents"], few["ours"])
    seeds = range(config.seed, config.seed + 16)
    save_picture(out / "nearest.png",
                 contact_sheet(few["ours"], measured, seeds, few["training objects"], names))
    print(f"wrote {out}: tables.md, tables.json, figure.png, nearest.png" + ", worst.png" * bool(pictures))


if __name__ == "__main__":
    main()

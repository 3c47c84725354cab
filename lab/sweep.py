"""
Many small runs: what does each choice change?  Every run is stages 1 and 2 at a size that two cores do in
minutes, and evaluate.py's numbers; a figure and a table are made of what is done.

    objects         72, 256, 1,024 or 4,096 training objects, at equal quality (by Adam), and nothing
                    recombined: does the plain method stop copying, and make what is new?
    latent          4, 8, 16 voxels along a side of the latent volume: 3DADM's ablation
    mix             the share of mixtures in a batch: 0, 0.25, 0.5 (which all other sweeps have), 1

out  runs/sweep/NAME/     table.md, figure.png; in stage1/ and stage2/ beside it a folder for each run
run  python -m lab.sweep mix                 the same command again goes on where it stopped
     python -m lab.sweep objects --hours 1
read SWEEPS, one_run, main.
"""
import json
import math
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

import autodecoder
import diffusion
import render_shapenet
from common import Run, UserError, command, parse_config, save_figure, save_text
from lab import evaluate
from shapes.photos import objects_in, read_small


@dataclass
class Config:
    out: str = "runs/sweep"              # folder for all runs
    hours: float = 8.0                   # begin no run after so many
    data: str = "data_large"             # folder of photos; made if it is not there
    steps1: int = 1500                   # of stage 1 (at least 1)
    steps2: int = 3000                   # of stage 2 (at least 1)
    count: int = 128                     # samples, and fresh objects (at least 4)
    points: int = 512                    # on each shape (at least 1)
    fits: int = 32                       # fresh objects that codes are fitted to (at least 4)
    seeds: int = 1                       # trainings of stage 2 for each choice (at least 1)
    cache: str = "runs/fresh"            # evaluate.py's folder of fresh objects
    stages: str = "cpu"                  # cpu | gpu | smoke: the preset of every stage
    device: str = "auto"                 # auto, cpu or cuda


# For each choice a label, stage 1's flags and stage 2's
SWEEPS = {
    "objects": [(f"{n:,}", dict(objects=n, steps=steps, code_lr=rate), dict(mix=0.0))
                for n, steps, rate in ((72, 2600, 1e-2), (256, 3600, 1e-2), (1024, 8000, 1e-2),
                                       (4096, 10000, 3e-2))],
    "latent": [("4", dict(latent_resolution=4, channels=(64, 64, 32)), {}), ("8", {}, {}),
               ("16", dict(latent_resolution=16, channels=(32,)), {})],
    "mix": [(str(share), {}, {} if share == 0.5 else dict(mix=share)) for share in (0.0, 0.25, 0.5, 1.0)],
}
COLUMNS = ("1-NNA, decoded", "1-NNA", "COV", "to photos", "to reconstructions", "copies", "copies, shapes",
           "Z_U", "Z_U, shapes", "in other cells")
PLOTTED = ("1-NNA, decoded", "COV", "Z_U", "Z_U, shapes", "to photos")


def arguments(**flags):
    listed = lambda value: value if isinstance(value, tuple) else [value]
    return [word for name, value in flags.items() for word in (f"--{name}", *map(str, listed(value)))]


def one_run(config, first, second, seed, begun=lambda: None):
    """-> the row of this choice: evaluate.py's numbers of our samples, and stage 1's PSNR"""
    key = lambda flags: "_".join(f"{field}={value}" for field, value in flags.items()) or "default"
    stage1 = Path(config.out, "stage1", key(first))
    stage2 = Path(config.out, "stage2", f"{key(first)}+{key(second)}+{seed}")
    tables = stage2 / "evaluate/tables.json"
    if not tables.exists():
        common = dict(device=config.device, preset=config.stages)
        if not (stage1 / "table.txt").exists():
            autodecoder.main(arguments(**common, data=f"{config.data}/earphones_train", out=stage1,
                                       **({"objects": 72, "steps": config.steps1} | first)))
        begun()
        if not (stage2 / "curve.png").exists():
            second = {"mix": 0.5} | second                     # where few steps still show what copies
            diffusion.main(arguments(**common, autodecoder=stage1, out=stage2, steps=config.steps2, seed=seed,
                                     **second))
        numbers = {field: getattr(config, field) for field in ("count", "points", "fits", "cache")}
        evaluate.main(["--no-controls", *arguments(**common, diffusion=stage2, out=stage2 / "evaluate",
                                                   **numbers)])
    # What a kill cut off, or somebody else wrote, is not a run's row
    try:
        row = json.loads(read_small(tables, 1e8))["rows"]["ours"]
        row = {column: row[column] for column in COLUMNS if column in row}
        row = {column: [float(one), None if deviation is None else float(deviation)]
               for column, (one, deviation) in row.items()}
        fine = [abs(one) < 1e12 and 0 <= (deviation or 0) < 1e12 for one, deviation in row.values()]
        if not all(fine) or not set(PLOTTED) & set(row):
            raise ValueError("its numbers are no numbers")
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as error:
        raise UserError(f"{tables} cannot be read ({error!r}): delete it and run this again")
    return {"PSNR": held_out_psnr(stage1), **row}


def held_out_psnr(folder):
    """That of all objects (of thousands, 256 of them) in stage 1's closing table, or NaN"""
    file = folder / "table.txt"
    text = file.read_text(errors="replace") if file.is_file() else ""
    last = re.search(r"^all .* objects +(\d+\.\d+) /", text, re.M)
    return float(last[1]) if last else math.nan


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    config = parse_config(Config, argv=argv[1:] if name else argv)
    if name not in SWEEPS:
        raise UserError(f"which sweep?  python -m lab.sweep NAME, where NAME is one of {', '.join(SWEEPS)}")
    # Runs of other sizes do not belong in the same figure
    recipe = ("data", "steps1", "steps2", "count", "points", "fits", "stages")
    run = Run(config.out, "sweep", config, recipe, "sweep.json", stale=())
    run.lock.close()                     # two sweeps may share a folder: each of their runs has its own lock

    def begun():                         # writes the recipe, now that no stage has refused a flag of it
        with run:
            pass
    most = max(first.get("objects", 0) for _, first, _ in SWEEPS[name])
    if config.data == Config.data or not Path(config.data).exists():    # those there are kept
        render_shapenet.main(arguments(out=config.data, objects=max(most, 72), test_objects=0))
    if most and len(objects_in(Path(config.data, "earphones_train"), 64)) < most:
        raise UserError(f"{config.data} holds fewer than the {most} objects of this sweep")
    began, rows = time.time(), []
    for seed in range(config.seeds):
        for label, first, second in SWEEPS[name]:
            if time.time() - began > 3600 * config.hours:
                raise UserError(f"--hours {config.hours:g} are over, {len(rows)} runs done: "
                                "the same command goes on")
            rows.append((label, one_run(config, first, second, seed, begun)))
            report(Path(config.out, name), name, rows)


def report(folder, name, rows):
    """table.md and figure.png of what is done so far"""
    columns = [column for column in COLUMNS if any(column in row for _, row in rows)]
    head = [name, "PSNR, dB", *(f"{c}, %" if c in evaluate.PERCENT else c for c in columns)]
    scale = lambda column: 100 if column in evaluate.PERCENT else 1
    lines = [[label, f"{row['PSNR']:.2f}", *(evaluate.shown(column, row.get(column)) for column in columns)]
             for label, row in rows]
    text = evaluate.markdown(name, head, lines)
    print(text)
    save_text(folder / "table.md", text)
    plotted = [column for column in PLOTTED if column in columns]
    figure = Figure(figsize=(2.6 * len(plotted), 2.8), layout="constrained")
    axes = figure.subplots(1, len(plotted), squeeze=False)
    labels = list(dict.fromkeys(label for label, _ in rows))
    for axis, column in zip(axes[0], plotted):
        for label, row in rows:
            value, deviation = row.get(column) or (math.nan, None)
            axis.errorbar(labels.index(label), scale(column) * value,
                          yerr=2 * scale(column) * (deviation or 0), fmt="o", color="C0", capsize=3)
        long = len("".join(labels)) > 16
        axis.set_xticks(range(len(labels)), labels, rotation=20 if long else 0, fontsize=8 if long else None)
        if column in evaluate.PERCENT:
            axis.set_ylim(-3, 103)
        axis.set(title=f"{column}, %" if column in evaluate.PERCENT else column, xlabel=name)
        axis.margins(x=0.2)
    save_figure(folder / "figure.png", figure)


if __name__ == "__main__":
    command(main)

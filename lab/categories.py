"""
Does chapters/categories.py make what is asked for?  Samples of each category, read by a small network that
was trained on photos of other objects: those that stage 1 does not train on.

    as asked    the share of samples that are read as the category asked for
    variety     how far samples of a category are from each other (root of the Chamfer distance), over how far
                its training objects are.  Near 1 is right, 0 is one object
    copies      samples whose nearest training latent is under a third as far as the second
    in pieces   samples that fall apart, among those whose nearest training object is whole

The reader itself errs.  Its rows on photos of objects that it has not seen, and on training objects as the
decoder shows them, are the ceiling.

in   runs/categories_diffusion/  the chapter's model; and photos of unseen objects, made with the others
out  runs/lab_categories/        tables.md, tables.json, figure.png (guidance weight against both)
run  python -m lab.categories
read taught, judged, main.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from chapters import categories
from chapters.categories import CATEGORIES, categories_of
from chapters.prompt import asked
from common import Run, UserError, command, parse_config, pick_device, save_figure, save_text
from diffusion import latents_of, load_denoiser, nearest
from lab.evaluate import markdown, see_volumes
from lab.fresh import PIXELS, Reader, blurred, teach, unseen_photos
from lab.metrics import chamfer
from sample import is_copy, save_json
from shapes.packed import read_photos


@dataclass
class Config:
    diffusion: str = "runs/categories_diffusion"  # the chapter's folder
    autodecoder: str = ""                # stage 1's; "": the one that the chapter was trained on
    data: str = ""                       # unseen objects' photos; "": _test for stage 1's _train
    out: str = "runs/lab_categories"     # folder for the tables
    count: int = 64                      # samples of each category (at least 2)
    points: int = 512                    # on each shape (at least 1)
    reader_steps: int = 1500             # gradient steps of the reader (at least 1)
    weights: tuple = (0.0, 1.0, 2.0, 3.0, 5.0)    # guidance weights in the figure (from 0 to 20)
    seed: int = 0                        # of the first sample and the reader
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(count=2, points=64, reader_steps=10, weights=(1.0, 2.0))}


def taught(photos, labels, known, config, run):
    """-> a network that names the category of an object from four photos, trained on the objects `known`"""
    torch.manual_seed(config.seed)
    reader = Reader()
    reader.answer = nn.Linear(reader.answer.in_features, len(CATEGORIES))

    def loss_of(generator):
        # Four photos from anywhere, sharp or blurred, because renderings of our volumes are blurred
        chosen = known[torch.randint(len(known), (16,), generator=generator)]
        views = torch.rand(16, photos.rgb.shape[1], generator=generator).argsort(1)[:, :4]
        side = int(torch.randint(14, PIXELS + 1, (), generator=generator))
        pictures = blurred(photos.rgb[chosen[:, None], views].float() / 255, side)
        return F.cross_entropy(reader.answer(reader.features(pictures)), labels[chosen])
    teach(reader, loss_of, config, run)
    return reader.eval().requires_grad_(False)


def read_as(reader, rgb):
    """(N,4,H,W,3) bytes -> categories (N,), as numbers"""
    return torch.cat([reader.answer(reader.features(part.float() / 255)).argmax(1) for part in rgb.split(64)])


def spread(points):
    """Mean distance of the shapes (N,P,3) to each other"""
    return chamfer(points, points).sqrt()[~torch.eye(len(points), dtype=bool)].mean().item()


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names, denoiser = load_denoiser(config.diffusion, device, config.autodecoder, categories.Config,
                                           categories.CategoryDenoiser)
    of, folder = categories_of(model.config.data, names), unseen_photos(config, model)
    if not folder.is_dir() or folder.resolve() == Path(model.config.data).resolve():
        raise UserError(f"the reader learns from photos of unseen objects, and {folder} has none: name a "
                        "folder by --data")
    run, out = Run(config.out, "categories", config, (), "categories.json", stale=()), Path(config.out)

    # The reader: two of three unseen objects teach it, the others measure it.  They are shuffled, because
    # factors follow each other in the folder like dealt cards
    photos = read_photos(folder, PIXELS, 0)
    labels = torch.tensor([CATEGORIES.index(one) for one in categories_of(folder, photos.names)])
    every = torch.randperm(len(labels), generator=torch.Generator().manual_seed(config.seed))
    held, learnt = every.tensor_split([-(-len(every) // 3)])
    asked_for = [one for one in CATEGORIES if of.count(one) > 1]
    for one in asked_for:
        if not all((labels[some] == CATEGORIES.index(one)).any() for some in (learnt, held)):
            raise UserError(f"{folder} holds too few {one}: some to learn from, some to measure by")
    if not asked_for or photos.rgb.shape[1] < 4:
        raise UserError("wanted: two training objects of a category, four photos of each unseen object")
    reader = taught(photos, labels, learnt, config, run)
    training = latents_of(model, model.codes)
    known = see_volumes(model, training, config)
    true = torch.tensor([CATEGORIES.index(one) for one in of])
    right = lambda rgb, wanted: (read_as(reader, rgb) == wanted).double().mean().item()
    rows = {"ceiling: photos of unseen objects": {"as asked": right(photos.rgb[held][:, :4], labels[held])},
            "ceiling: training objects, decoded": {"as asked": right(known["rgb"][:, :4], true)}}

    def judged(wanted, count):
        """Samples of a category (or told nothing) -> a row, and how they are read"""
        seeds = range(config.seed, config.seed + count)
        latents = latents_of(model, asked(denoiser, wanted, seeds))
        some, (distance, whose) = see_volumes(model, latents, config), nearest(latents, training)
        seen = read_as(reader, some["rgb"][:, :4])
        pieces = ~(some["piece"][known["piece"][whose[:, 0].cpu()] > 0.95] >= 0.95)       # NaN: nothing there
        row = {"copies": is_copy(distance).double().mean().item(),
               "in pieces": pieces.double().mean().item() if len(pieces) else None}
        if wanted in of:
            alike = known["points"][torch.tensor([one == wanted for one in of])]
            row = {"as asked": (seen == CATEGORIES.index(wanted)).double().mean().item(),
                   "variety": spread(some["points"]) / spread(alike) if spread(alike) > 1e-6 else None, **row}
        run.say(f"{wanted}, guidance {denoiser.guidance:g}: {row}")
        return row, seen

    denoiser.guidance = categories.Config.guidance
    for one in asked_for:
        rows[one] = judged(one, config.count)[0]
    denoiser.guidance = 0.0
    rows["told nothing"], seen = judged("told nothing", config.count)
    shares = ", ".join(f"{(seen == k).double().mean():.0%} {one}" for k, one in enumerate(CATEGORIES))

    # Guidance weight against obedience and variety
    few, curve = max(2, config.count // 4), []
    for denoiser.guidance in config.weights:
        some = [judged(one, few)[0] for one in asked_for]
        curve.append([sum(row[key] or 0 for row in some) / len(some) for key in ("as asked", "variety")])
        rows[f"guidance {denoiser.guidance:g}"] = dict(zip(("as asked", "variety"), curve[-1]))

    columns = "as asked", "variety", "copies", "in pieces"
    cell = lambda key, x: "-" if x is None else f"{x:.2f}" if key == "variety" else f"{100 * x:.1f}"
    text = markdown("Categories", ["", *(key if key == "variety" else f"{key}, %" for key in columns)],
                    [[name, *(cell(key, row.get(key)) for key in columns)] for name, row in rows.items()])
    text += (f"\n{config.count} samples of each category at guidance {categories.Config.guidance:g}; "
             f"guidance: {few} of each.  Told nothing, it makes {shares}.\n")
    print("\n" + text)
    save_text(out / "tables.md", text)
    save_json(out / "tables.json", {"config": asdict(config), "rows": rows})
    axis = Figure(figsize=(5, 3.4), layout="constrained").subplots()
    for values, label in zip(zip(*curve), ("read as asked", "variety")):
        axis.plot(config.weights, values, "o-", ms=3, label=label)
    axis.set(xlabel="guidance weight", ylim=(0, None))
    axis.legend()
    save_figure(out / "figure.png", axis.figure)
    mean = sum(rows[one]["as asked"] for one in asked_for) / len(asked_for)
    print(f"wrote {out}: tables.md, tables.json, figure.png.  As asked: {mean:.0%} (row K1: 97 %)")
    run.lock.close()


if __name__ == "__main__":
    command(main)

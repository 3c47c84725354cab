"""
Does chapters/prompt.py obey?  64 prompts that name kind, palette and outline, 8 samples each, read by a
network that was trained on photos of other objects (fresh.Reader).

    obeyed      the share of samples whose kind, palette, outline, all three are read as asked
    reached     the share of prompts for which some sample is read as asked
    variety     how far samples of one prompt are from each other (root of the Chamfer distance; difference of
                pictures), divided by how far fresh objects of one description are (a mean over all pairs,
                and so mostly of headphones; their photos are sharper than samples).  0 is one object
    copies      samples whose nearest training latent is under a third as far as the second
    in pieces   samples that fall apart, among those whose nearest training object is whole

21 of the prompts ask for a combination that no training object can have, and a few for one that none has by
chance.  (Recombined codes show them in training.)  The reader itself errs: its rows on photos of fresh
objects, and on fresh objects as the decoder shows them, are to compare with.  Their mix of kinds is another.

in   runs/prompt/                the chapter's model
out  runs/obedience/             tables.md, tables.json, figure.png (guidance weight against both)
run  python -m lab.obedience
read descriptions, obedience, main.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from chapters import prompt
from common import Run, UserError, command, parse_config, pick_device, save_figure, save_text
from diffusion import latents_of, load_denoiser, nearest
from lab.evaluate import markdown, pixels, see_volumes
from lab.fresh import FACTORS, cell_of, held_out_codes, read, see_objects, train_reader, training_cells
from lab.metrics import chamfer
from sample import is_copy, save_json
from shapes.earphones import KINDS, PALETTES, PARTS, held_out


@dataclass
class Config:
    prompt: str = "runs/prompt"          # the chapter's folder
    autodecoder: str = ""                # stage 1's; "": the one that the chapter was trained on
    cache: str = "runs/fresh"            # folder for the fresh objects and the network that reads factors
    out: str = "runs/obedience"          # folder for the tables
    prompts: int = 64                    # how many prompts (from 1 to 84)
    count: int = 8                       # samples of each (at least 2)
    fresh: int = 448                     # fresh objects, to compare the variety with (at least 32)
    points: int = 512                    # on each shape (at least 1)
    fits: int = 64                       # fresh objects that get codes, fitted to 8 photos each (at least 4)
    fit_steps: int = 250                 # gradient steps for each batch of codes (at least 1)
    readings: int = 1024                 # objects that the reader learns from, 4 pictures each (at least 32)
    reader_steps: int = 4000             # gradient steps of the reader (at least 1)
    weights: tuple = (0.0, 1.0, 2.0, 3.0, 5.0, 8.0)    # guidance weights in the figure (from 0 to 20)
    seed: int = 0                        # of the first sample, the reader and the fresh objects
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(prompts=3, count=2, fresh=32, points=64, fits=4, fit_steps=3,
                                               readings=32, reader_steps=10, weights=(1.0, 3.0),
                                               cache="runs/fresh_smoke")}
SAID = ({"over-ear": "over-ear headphones", "on-ear": "on-ear headphones", "neckband": "neckband",
         "buds": "buds"}, {"round": "round", "oval": "oval", "D": "d-shaped"})


def descriptions(count):
    """-> texts, and the labels that they ask for (P,3)

    Those that no training object can have come first, 21 of the 84 cells; then as many others as wanted."""
    every = [(kind, palette, part) for kind in KINDS for palette in PALETTES for part in PARTS]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = sorted((every[k] for k in order), key=lambda cell: not held_out(*cell))[:count]
    texts = [f"{palette} {SAID[1][part]} {SAID[0][kind]}" for kind, palette, part in chosen]
    wanted = torch.tensor([[values.index(one) for values, one in zip(FACTORS.values(), cell)]
                           for cell in chosen])
    return texts, wanted


def pairs(group, distance):
    """Mean of distance (N,N) over pairs of the same group (N,)"""
    same = (group[:, None] == group).triu(1)
    return distance[same].mean()


def variety(some, group, fresh, their_group):
    """-> how far those of one group are from each other, by shape and by picture, over fresh objects' """
    shape = lambda one: chamfer(one["points"], one["points"]).sqrt()
    picture = lambda one: torch.cdist(pixels(one), pixels(one))
    return [(pairs(group, far(some)) / pairs(their_group, far(fresh))).item() for far in (shape, picture)]


def obedience(labels, wanted):
    """Labels as read (N,3) and as wanted (N,3) -> shares right: of each factor, of all three"""
    right = labels == wanted
    return dict(zip((*FACTORS, "all three"), [*right.double().mean(0).tolist(),
                                             right.all(1).double().mean().item()]))


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names, denoiser = load_denoiser(config.prompt, device, config.autodecoder, prompt.Config,
                                           prompt.PromptDenoiser)
    cells = training_cells(names, model.config.data)
    if not cells:
        raise UserError("the training objects are not those of earphones.py, which the reader knows")
    run = Run(config.cache, "fresh", config, (), "fresh.json", stale=())
    run.lock.close()
    lock, out = Run(config.out, "obedience", config, (), "obedience.json", stale=()).lock, Path(config.out)

    # The ceiling, and what to compare with: fresh objects by photos, and as the decoder shows them
    reader = train_reader(config, run, device)
    fresh = see_objects(run.folder / "fresh.pt", "fresh", range(config.fresh), config, 8, config.points, run)
    unseen = {key: value[:config.fits] for key, value in fresh.items()}
    decoded = see_volumes(model, latents_of(model, held_out_codes(model, config, unseen, device)), config)
    read_off = lambda some: read(reader, some["rgb"][:, :4])[1]
    rows = {"ceiling: photos of fresh objects": obedience(read_off(fresh), fresh["true labels"]),
            "ceiling: fresh objects, decoded": obedience(read_off(decoded), unseen["true labels"])}

    # Ours: `count` samples of each prompt, from the same seeds
    texts, wanted = descriptions(config.prompts)
    known = torch.isin(cell_of(wanted), torch.tensor(cells))
    training = latents_of(model, model.codes)
    whole = see_volumes(model, training, config)["piece"] > 0.95
    seeds, group = range(config.seed, config.seed + config.count), torch.arange(len(texts))
    each = lambda some: some.repeat_interleave(config.count, 0)

    def drawn(chosen, count=config.count):
        return torch.cat([latents_of(model, prompt.asked(denoiser, texts[k], seeds[:count])) for k in chosen])

    def judged(name, latents, wanted, group):
        some = see_volumes(model, latents, config)
        read_as = read_off(some)
        distance, whose = nearest(latents, training)
        pieces = ~(some["piece"][whole[whose[:, 0].cpu()]] >= 0.95)          # NaN: there is nothing
        reached = [(read_as[group == k] == wanted[group == k]).all(1).any().item() for k in group.unique()]
        shape, picture = variety(some, group, fresh, cell_of(fresh["true labels"]))
        rows[name] = obedience(read_as, wanted) | {
            "reached": sum(reached) / len(reached), "variety, shapes": shape, "variety, pictures": picture,
            "copies": is_copy(distance).double().mean().item(),
            "in pieces": pieces.double().mean().item() if len(pieces) else None}
        run.say(f"{name}: {rows[name]}")

    denoiser.guidance = prompt.Config.guidance                 # and not what its training happened to be told
    print(f"drawing {config.count} samples for each of {len(texts)} prompts", flush=True)
    latents = drawn(range(len(texts)))
    for name, chosen in (("ours, all prompts", known | True), ("ours, known combinations", known),
                         ("ours, combinations that no training object has", ~known)):
        if chosen.any():
            judged(name, latents[each(chosen)], each(wanted[chosen]), each(group[chosen]))

    # Guidance weight against obedience and variety, on every third prompt
    some, few, curve = range(0, len(texts), 3), max(2, config.count // 2), []
    for weight in config.weights:
        denoiser.guidance = weight
        name = f"guidance {weight:g}"
        again = lambda values: values[::3].repeat_interleave(few, 0)
        judged(name, drawn(some, few), again(wanted), again(group))
        curve.append([rows[name][key] for key in ("all three", "variety, shapes", "variety, pictures")])

    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    percent = {key for key in columns if "variety" not in key}
    number = lambda key, value: f"{100 * value:.1f}" if key in percent else f"{value:.2f}"
    cell = lambda key, value: "-" if value is None else number(key, value)
    text = markdown("Obedience", ["", *(f"{key}, %" * (key in percent) or key for key in columns)],
                    [[name, *(cell(key, row.get(key)) for key in columns)] for name, row in rows.items()])
    text += f"\n{len(texts)} prompts, {config.count} samples each; guidance: each third prompt, {few} each.\n"
    print("\n" + text)
    save_text(out / "tables.md", text)
    save_json(out / "tables.json", {"config": asdict(config), "rows": rows, "prompts": texts})
    axis = Figure(figsize=(5, 3.4), layout="constrained").subplots()
    labels = "read as asked, all three", "variety of shapes", "variety of pictures"
    for values, label in zip(zip(*curve), labels):
        axis.plot(config.weights, values, "o-", ms=3, label=label)
    axis.set(xlabel="guidance weight", ylim=(0, None))
    axis.legend()
    save_figure(out / "figure.png", axis.figure)
    print(f"wrote {out}: tables.md, tables.json, figure.png.  All three as asked: "
          f"{rows['ours, all prompts']['all three']:.0%} (row P1: 59 %)")
    lock.close()


if __name__ == "__main__":
    command(main)

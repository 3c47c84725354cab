"""
A chapter on stages 1 and 2: many kinds of objects in one model.  One autodecoder and one denoiser learn
earphones, chairs, tables, lamps and mugs together.  The denoiser is told the category y, or nothing:

    guess(x, sigma)  =  g(x, sigma, nothing) + w (g(x, sigma, y) - g(x, sigma, nothing)),      w = --guidance

This is the guidance of chapters/prompt.py.  Only what is said differs: a category is one of five numbers that
is not 0 (one-hot), so the first layer's columns are the categories' embeddings.  At w = 0 the model is not
told anything, and makes what it likes.

Stage 1 needs no change.  Its codes find the categories by themselves: nobody tells it which object is a
chair.  So the colours of a mug may be given to a headphone.  Shapes are mixed with the nearest shapes, and
these are of the same category nearly always.  The few mixtures across two categories are told nothing.

in   runs/categories/last.pt         stage 1, trained on all categories: the first two commands below
out  runs/categories_diffusion/      as stage 2; drawn/: sheet.png, viewer.html
run  python render_shapenet.py --category all
     python autodecoder.py --data data/our-all_train --out runs/categories
     python -m chapters.categories                  trains as long as stage 2; then draws each category
     python -m chapters.categories mugs --count 16
     python -m lab.categories                       does it obey?  Counted by another network
read categories_of, CategoryDenoiser, main.
"""
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import diffusion
from autodecoder import PALETTE, load_autodecoder
from chapters.prompt import LOUD, GuidedDenoiser, asked, page, train_once
from common import UserError, command, parse_config, pick_device, save_picture, to_bytes
from diffusion import latents_of, load_denoiser
from render_shapenet import ALL as CATEGORIES
from sample import is_run
from shapes.earphones import KINDS
from shapes.household import STYLES
from shapes.photos import kinds_of
from viewer.page import write_gallery
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config(diffusion.Config):
    category: str = "all"                # all | earphones | chairs | tables | lamps | mugs: what to draw
    autodecoder: str = "runs/categories"  # stage 1's folder
    out: str = "runs/categories_diffusion"  # folder for the model, the log and the pictures
    silent: float = 0.1                  # share of codes that the network is told nothing of (from 0 to 1)
    guidance: float = 2.0                # w: 1 is to follow the category, 0 to ignore it (from 0 to 20)
    count: int = 8                       # samples of each category (from 1 to 64)
    first: int = 0                       # seed of the first sample


PRESETS = diffusion.PRESETS
FREE = (*diffusion.FREE, "category", "guidance", "count", "first")        # not of the training


def categories_of(folder, names):
    """-> each object's category, by its factors.json"""
    kinds = kinds_of(folder, names)
    if strange := set(kinds) - {*KINDS, *STYLES}:
        raise UserError(f"{folder} holds {', '.join(sorted(strange)[:3])}, or is not there: objects with a "
                        f"factors.json are wanted, of {', '.join(CATEGORIES)}")
    return ["earphones" if kind in KINDS else kind for kind in kinds]


def say(names):
    """Names of categories -> (N,5), LOUD in one place; 0 for anything else"""
    return torch.tensor([[LOUD * (name == one) for one in CATEGORIES] for name in names])


class CategoryDenoiser(GuidedDenoiser):
    """It is told the category of all the parents of a code's shape, if they are of the same one."""

    def __init__(self, config, model):
        super().__init__(config, model, len(CATEGORIES))
        self.say = say

    def written(self, shapes, colours, generator):
        names = load_autodecoder(self.config.autodecoder)[1]
        of = categories_of(self.model[0].config.data, names)
        every = [{of[o] for o in some} for some in shapes]
        mixed = sum(len(some) > 1 for some in every)
        print(f"{len(names)} objects: {', '.join(f'{n} {name}' for name, n in Counter(of).items())}; "
              f"{mixed} of {len(shapes)} codes are of more than one category")
        return say([some.pop() if len(some) == 1 else "several" for some in every])[:, None]


# ------------------------------------------------------------------------------------------------------ main

@torch.no_grad()
def nearest_category(model, codes, of):
    """-> the category of the training object whose shape code is nearest (B,)"""
    return [of[o] for o in torch.cdist(codes[:, 3:-PALETTE], model.shapes).argmin(1).tolist()]


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--category", argv[0]]
    config = parse_config(Config, PRESETS, argv)
    if not is_run(Path(config.autodecoder)):
        raise UserError(f"this needs stage 1 of several categories, and {config.autodecoder} has none. The "
                        "first lines of python -m chapters.categories --help say how to train it")
    model, names = load_autodecoder(config.autodecoder)
    of = categories_of(model.config.data, names)
    every = [one for one in CATEGORIES if one in of]
    if config.category not in ("all", *every):                   # said before the training, and not after it
        raise UserError(f"{config.autodecoder} knows no {config.category}: it knows {', '.join(every)}")
    train_once(argv, config, Config, PRESETS, CategoryDenoiser, FREE)
    device, out = pick_device(config.device), Path(config.out, "drawn")
    model, names, denoiser = load_denoiser(config.out, device, "", Config, CategoryDenoiser)
    denoiser.guidance = config.guidance

    # The same seeds for each category that the model knows, and told nothing
    wanted = [*every, "told nothing"] if config.category == "all" else [config.category]
    seeds = range(config.first, config.first + config.count)
    codes = {one: asked(denoiser, one, seeds) for one in wanted}
    latents = torch.stack([latents_of(model, some) for some in codes.values()])             # (P,B,C,r,r,r)
    rgb = render_views(model, latents.flatten(0, 1), cameras(ANGLES[:1]), 2 * SIZE)[0][:, 0]
    save_picture(out / "sheet.png", page(wanted, to_bytes(rgb).unflatten(0, latents.shape[:2]), 1))

    right = [one == near for one, some in codes.items() if one in every
             for near in nearest_category(model, some, of)]
    denoiser.asked = denoiser.say([wanted[0]])                   # what the page's walk is told
    labels = [f"{one}: seed {seed}" for one in wanted for seed in (seeds if len(wanted) == 1 else seeds[:2])]
    shown = latents[0] if len(wanted) == 1 else latents[:, :2].flatten(0, 1)
    write_gallery(out / "viewer.html", model, names, shown, labels, denoiser,
                  (config.first, config.first + 1))
    print(f"wrote {out}: sheet.png, viewer.html.  {sum(right)} of {len(right)} samples have a nearest "
          "training object of the category that was asked for (the lab reads pictures: row K1)")


if __name__ == "__main__":
    command(main)

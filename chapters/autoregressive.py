"""
A chapter on stage 2: a codebook and a transformer, as a language model writes text (VQ-VAE, van den Oord
2017).

    latent (25 x 8^3) --encoder--> 4^3 vectors --nearest of 1,024 code words--> 64 tokens --decoder--> latent
    p(tokens) = product over t of p(token_t | tokens before it)

First an encoder and a decoder learn to write a latent as 64 tokens: each is a word of a codebook, and says
what is in one of 4^3 boxes of space.  Then a transformer learns to guess the next token, box after box, from
the bottom to the top.  To sample, it draws one token after the other.  To *complete* an object, the tokens of
its lower half are given, and it draws the rest: in several ways, because many upper halves fit.

The nearest word has no gradient.  So the decoder's gradient is handed to the encoder as if the word were the
vector itself ("straight through"), the vector is drawn to its word, and the word to the mean of its vectors.

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
     data/earphones_test/            unseen objects: how well does the transformer guess their tokens?
out  runs/autoregressive/            last.pt, log.jsonl, curve.png, latents.pt, samples.png, report.txt;
                                     bits.txt; completed.png: objects, the same from tokens, six completions
run  python -m chapters.autoregressive                          two CPU cores: 11 min to train (row L2)
     python -m lab.evaluate --rows runs/autoregressive           in the lab's table
read Codebook, Transformer, drawn, main.
"""
import math
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import (fast_precision, fit_codes, learning_rate_share, load_autodecoder, plot_log,
                         unfold_children)
from chapters.families import improve, record, resume, to_learn, with_box, write_samples
from chapters.maps import Words
from common import (Run, UserError, command, grid, parse_config, pick_device, save_picture, save_text,
                    to_bytes)
from diffusion import latents_of
from shapes.packed import read_photos
from volume_render import ANGLES, SIZE, cameras, psnr, render_views


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/autoregressive"     # folder for the model, the log and the samples
    unseen: str = "data/earphones_test"  # photos of objects that nobody was trained on, to measure by
    objects: int = 24                    # how many of those; 0: all
    fit_steps: int = 250                 # gradient steps to find their codes (at least 1)
    recombinations: int = 4096           # codes to learn from (at least 1)
    words: int = 1024                    # in the codebook (at least 2)
    channels: int = 64                   # of the encoder and decoder; a word has as many numbers (at least 1)
    width: int = 192                     # of the transformer (at least 8)
    layers: int = 4                      # of the transformer (at least 1)
    first_steps: int = 2000              # gradient steps of the codebook (at least 1)
    steps: int = 2000                    # gradient steps of the transformer (at least 1)
    batch: int = 32                      # latents in a step (at least 2)
    lr: float = 1e-3                     # learning rate of both, at its highest
    temperature: float = 1.0             # below 1: likelier tokens, less variety (from 0.01 to 10)
    count: int = 192                     # samples drawn at the end (at least 2)
    seed: int = 0                        # of the weights, the batches and the samples
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(steps=20000, width=384, layers=8),
           "smoke": dict(recombinations=32, words=16, channels=8, width=16, layers=1, first_steps=4, steps=4,
                         batch=4, count=2, objects=2, fit_steps=2, save_every=2, log_every=2)}
FREE = ("out", "device", "log_every", "save_every", "fresh", "count", "temperature", "unseen", "objects",
        "fit_steps")


class Codebook(nn.Module):
    """Latents to tokens and back.  A box is 2^3 cells of the latent."""

    def __init__(self, config, channels):
        super().__init__()
        c = config.channels
        self.encoder = nn.Sequential(nn.Conv3d(channels, c, 3, padding=1), nn.SiLU(), nn.Conv3d(c, c, 2, 2),
                                     nn.SiLU(), nn.Conv3d(c, c, 1))
        # As in stage 1, each box names its eight cells at once
        self.boxes = nn.Sequential(nn.Conv3d(c, 2 * c, 3, padding=1), nn.SiLU(), nn.Conv3d(2 * c, 8 * c, 1))
        self.cells = nn.Sequential(nn.SiLU(), nn.Conv3d(c, c, 3, padding=1), nn.SiLU(),
                                   nn.Conv3d(c, channels, 3, padding=1))
        self.book, self.width = Words(config.words, c), c

    def decoder(self, vectors):
        return self.cells(unfold_children(self.boxes(vectors), self.width))

    def tokens(self, vectors):
        """(B,c,n,n,n) -> (B,n^3): the nearest word's number, box by box, x fastest, z slowest"""
        return self.book.nearest(vectors.flatten(2).mT)

    def spell(self, tokens):
        """(B,n^3) -> (B,c,n,n,n)"""
        return boxes_of(self.book.words[tokens])

    def loss(self, latents):
        """-> error of the latents, how far vectors are from their words; and what `move` wants"""
        spelled, apart, *spoken = self.book.through(self.encoder(latents).flatten(2).mT)
        return (self.decoder(boxes_of(spelled)) - latents).square().mean(), apart, *spoken


def boxes_of(vectors):
    """(B,n^3,c) -> (B,c,n,n,n)"""
    side = round(vectors.shape[1] ** (1 / 3))
    return vectors.mT.reshape(len(vectors), -1, side, side, side)


class Transformer(nn.Module):
    """Tokens before t -> logits of token t.  Each box may look at all earlier ones, at no later one."""

    def __init__(self, config, length):
        super().__init__()
        self.begin = nn.Parameter(torch.zeros(1, 1, config.width))
        self.word = nn.Embedding(config.words, config.width)
        self.place = nn.Parameter(0.02 * torch.randn(length, config.width))
        heads = max(h for h in (1, 2, 4, 6) if config.width % h == 0)
        self.layers = nn.ModuleList([
            nn.TransformerEncoderLayer(config.width, heads, 4 * config.width, 0.1, F.gelu, batch_first=True,
                                       norm_first=True) for _ in range(config.layers)])
        self.leave = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.words))

    def forward(self, tokens):
        """(B,T) -> logits (B,T+1,words), or (B,T,words) if T is all: the first from nothing"""
        x = torch.cat([self.begin.expand(len(tokens), -1, -1), self.word(tokens)], 1)[:, :len(self.place)]
        x = x + self.place[:x.shape[1]]
        mask = torch.full((x.shape[1],) * 2, -math.inf, device=x.device).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        return self.leave(x)


@torch.no_grad()
def drawn(transformer, given, length, generator, temperature):
    """Given tokens (B,T) -> (B,length): the rest is drawn, one after the other"""
    tokens = given
    while tokens.shape[1] < length:
        logits = transformer(tokens)[:, -1] / temperature
        one = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator).to(tokens.device)
        tokens = torch.cat([tokens, one], 1)
    return tokens


def codes_of_unseen(model, photos, config):
    """Codes found from eight photos of each object in --unseen (N,W), or None if there are no photos"""
    if not photos:
        print(f"no photos in {config.unseen}: nothing is measured on unseen objects")
        return None
    count = photos.rgb.shape[1]
    views = torch.linspace(0, count - 1, min(8, count)).round().long()
    print(f"fitting the codes of {len(photos.names)} unseen objects to {len(views)} photos each", flush=True)
    return fit_codes(model, photos, views, config.fit_steps)


def main(argv=None):
    config = parse_config(Config, PRESETS, with_box(argv, Config))
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    photos = Path(config.unseen).is_dir() and read_photos(config.unseen, model.config.size, config.objects)
    side = model.config.latent_resolution
    if side % 2 or len(names) < 3:
        raise UserError(f"{config.autodecoder}: a latent of even side, of at least 3 objects, is wanted")
    run = Run(config.out, "autoregressive", config, [f.name for f in fields(Config) if f.name not in FREE])

    data, to_numbers, to_latents = to_learn(model, config)
    own = latents_of(model, model.codes)
    read = lambda tokens: to_latents(torch.cat([codebook.decoder(codebook.spell(part))
                                                for part in tokens.split(64)]))

    torch.manual_seed(config.seed)
    codebook, length = Codebook(config, len(own[0])).to(device), (side // 2) ** 3
    transformer = Transformer(config, length).to(device)
    weights = [p for p in codebook.parameters()], list(transformer.parameters())
    optimizers = [torch.optim.AdamW(some, weight_decay=0.01, betas=(0.9, 0.99)) for some in weights]
    networks = {"codebook": codebook, "transformer": transformer}
    step = resume(run, model, networks, optimizers)

    total, tokens = config.first_steps + config.steps, None
    write = torch.no_grad()(lambda some: torch.cat([codebook.tokens(codebook.encoder(part))
                                                    for part in some.split(64)]))
    def bits(some):
        """Of a token, on average: how badly the transformer guesses it from those before it"""
        with fast_precision(model.config, device):
            logits = transformer(some).float()
        return F.cross_entropy(logits.flatten(0, 1), some.flatten()) / math.log(2)
    with run:
        while step < total:
            second = step >= config.first_steps
            here, steps = (step - config.first_steps, config.steps) if second else (step, config.first_steps)
            optimizers[second].param_groups[0]["lr"] = config.lr * learning_rate_share(here, steps, 0.03)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            torch.manual_seed(config.seed * 1_000_003 + step)                          # the dropout's
            item = torch.randint(len(data), (config.batch,), generator=generator).to(device)
            if second:
                tokens = write(data) if tokens is None else tokens
                numbers = {"bits": (loss := bits(tokens[item]))}
            else:
                error, apart, *spoken = codebook.loss(data[item])
                loss, numbers = error + 0.25 * apart, {"error": error, "apart": apart}
            if improve(run, step, loss, optimizers[second]) and not second:
                codebook.book.move(*spoken, generator)
            step += 1
            record(run, model, networks, optimizers, step, total, numbers)

    transformer.eval()
    unseen = codes_of_unseen(model, photos, config)
    with torch.no_grad():
        # The transformer read mixtures alone.  How well does it guess the tokens of the objects themselves?
        mine, generator = write(to_numbers(own)), torch.Generator().manual_seed(config.seed)
        guessed = f"{bits(mine).item():.2f} bits for each token of the training objects"
        if unseen is not None:
            theirs = write(to_numbers(latents_of(model, unseen)))
            guessed += f", {bits(theirs).item():.2f} of {len(unseen)} unseen ones"
        began = time.time()
        latents = read(drawn(transformer, mine.new_zeros(config.count, 0), length, generator,
                                   config.temperature))
        seconds = (time.time() - began) / config.count
        write_samples(run.folder, model, latents, sum(p.numel() for some in weights for p in some), seconds)

        # Completion: the tokens of the lower half are given.  How well is that half kept?
        some = torch.linspace(0, len(mine) - 1, min(4, len(mine))).long()
        half = mine[some, :length // 2].repeat_interleave(6, 0)
        whole = torch.cat([own[some], read(mine[some]),
                           read(drawn(transformer, half, length, generator, config.temperature))])
        rgb = render_views(model, whole, cameras(ANGLES[:1]), SIZE)[0][:, 0]
        given, spelled, made = rgb[:len(some)], rgb[len(some):2 * len(some)], rgb[2 * len(some):]
        low = slice(SIZE // 2, None)                                   # the picture's lower half, nearly
        known = [psnr(made[6 * k + j][low], given[k][low]) for k in range(len(some)) for j in range(6)]
        rows = [torch.stack([given[k], spelled[k], *made[6 * k:6 * k + 6]]) for k in range(len(some))]
        save_picture(run.folder / "completed.png", grid(to_bytes(torch.cat(rows)), 8))
    plot_log(run.folder, "bits for each token", bits="transformer")
    save_text(run.folder / "bits.txt", guessed + "\n")
    print(f"wrote {run.folder}: last.pt, latents.pt, samples.png, completed.png.  {guessed}; completions "
          f"keep the lower half to {sum(known) / len(known):.1f} dB (row L2: 6.3, 7.6 bits, 24 dB)")


if __name__ == "__main__":
    command(main)

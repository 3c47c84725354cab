"""
A chapter on stage 2: NeuralField-LDM's hierarchy (Kim et al. 2023).  Three latents, coarse to fine, and three
diffusions:

    p(V, g, c, f) = p(V | g, c, f)  p(f | g, c)  p(c | g)  p(g)

V are voxels of density and colour, here stage 1's volumes.  An autoencoder writes V as three latents: g, 32
numbers for the whole object; c, coarse voxels; f, a fine map seen from above.  A KL term keeps g small; the
vectors of c and f become words of codebooks.  Then one denoiser learns g, a second one c when it is told g,
and a third one f when it is told both.  The paper's reason: no diffusion copes with all voxels at once, and
each of these is small.  levels.png shows what each decides: some are held, and the others are drawn anew.

Density stands in V as a number of its own (explicit).  With --implicit V holds features, and a small network
makes density and colour of the features at each point.  The paper found explicit density better.

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/hierarchy/                 last.pt, log.jsonl, curve.png, volumes.pt and three pictures
run  python -m chapters.hierarchy                                one core: 25 min (row L4)
     python -m chapters.hierarchy --implicit --out runs/implicit
read Levels, Makers, main; and Maker in maps.py.
"""
import copy
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import BETAS, fast_precision, learning_rate_share, load_autodecoder, plot_log
from chapters.families import (AsVolumes, follow, improve, pictures_apart, record, resume, to_learn, with_box,
                               write_volumes)
from chapters.maps import Block2d, Maker, Words, as_map, as_vectors
from common import Run, UserError, command, grid, parse_config, pick_device, save_picture, to_bytes
from diffusion import latents_of, noise_of
from volume_render import ANGLES, SIZE, cameras, psnr, render_views, voxel_opacity


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/hierarchy"          # folder for the model, the log and the samples
    recombinations: int = 2048           # volumes to learn from (at least 2)
    implicit: bool = False               # voxels hold features, of which a network makes density and colour
    whole: int = 32                      # numbers in g (at least 1)
    words: int = 512                     # in each codebook (at least 2)
    width: int = 160                     # channels of the autoencoder (at least 4)
    maker: int = 128                     # channels of the three denoisers (at least 4)
    density: float = 0.05                # weight of the voxels' own density, if it is explicit
    kl: float = 1e-4                     # weight of g's divergence from a normal distribution
    first_steps: int = 1600              # gradient steps of the autoencoder (at least 1)
    steps: int = 1200                    # gradient steps of the denoisers (at least 1)
    batch: int = 16                      # volumes in a step; denoisers take twice as many (at least 2)
    rays: int = 512                      # rays through each volume (at least 8)
    lr: float = 2e-3                     # learning rate of all, at its highest
    ema: float = 0.998                   # decay of the denoisers' averaged weights (from 0 to 1)
    count: int = 192                     # samples drawn at the end (at least 2)
    seed: int = 0                        # of the weights, the batches and the samples
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(width=256, maker=256, first_steps=20000, steps=20000),
           "smoke": dict(recombinations=16, whole=4, words=8, width=8, maker=8, first_steps=4, steps=4,
                         batch=2, rays=32, count=2, save_every=2, log_every=2)}
FREE = ("out", "device", "log_every", "save_every", "fresh", "count")
FEATURES, HEUN, PLAIN = 8, 18, AsVolumes()   # numbers in an implicit voxel; steps; who shows explicit ones


class Levels(nn.Module):
    """The autoencoder: voxels V (B,4,N,N,N) -> g (B,G), c (B,n,n,n,4), f (B,2n,2n,4), n = N/4 -> voxels"""

    def __init__(self, config, N):
        super().__init__()
        w, self.out = config.width, FEATURES if config.implicit else 4
        block = lambda: nn.Sequential(Block2d(w), Block2d(w))
        # As in the paper, all is 2D: a column of voxels, and 2x2 columns at once, stand in the channels
        self.enter, self.fine, self.coarse = nn.Conv2d(4 * N * 4, w, 1), block(), block()
        self.to_f, self.to_c, G = nn.Conv2d(w, 4, 1), nn.Conv2d(w, N, 1), config.whole
        self.to_g = nn.Linear(w, 2 * G)
        self.f_words, self.c_words = Words(config.words, 4), Words(config.words, 4)
        self.from_g, self.from_c = nn.Linear(G, w), nn.Conv2d(N, w, 3, padding=1)
        self.from_f, self.low, self.high = nn.Conv2d(4, w, 3, padding=1), block(), block()
        self.leave = nn.Conv2d(w, self.out * N * 4, 3, padding=1)
        head = nn.Sequential(nn.Linear(FEATURES, 32), nn.SiLU(), nn.Linear(32, 4))
        self.head = head if config.implicit else nn.Identity()

    def encode(self, volume):
        """-> mean and log variance of g, vectors of c and f"""
        # What a renderer sees of V, in bounded numbers: density, and colour where something is near
        near = F.max_pool3d(voxel_opacity(volume, PLAIN.field)[:, None], 3, 1, 1)
        seen = torch.cat([torch.tanh(volume[:, :1] / 4), near * torch.tanh(volume[:, 1:] / 2)], 1)
        h = self.fine(self.enter(F.pixel_unshuffle(seen.flatten(1, 2), 2)))
        f, h = self.to_f(h), self.coarse(F.avg_pool2d(h, 2))
        return (*(some.float() for some in self.to_g(h.mean((2, 3))).chunk(2, 1)),
                as_vectors(self.to_c(h).float()), f.movedim(1, -1).float())

    def decode(self, g, c, f):
        h = self.low(self.from_g(g)[..., None, None] + self.from_c(as_map(c)))
        h = self.high(F.interpolate(h, scale_factor=2) + self.from_f(f.movedim(-1, 1)))
        volume = F.pixel_shuffle(self.leave(h), 2).float()                              # (B,4N,N,N)
        return volume.view(len(volume), self.out, -1, *volume.shape[2:])

    def field(self, channels, position):
        return PLAIN.field(self.head(channels), position)


class Makers(nn.ModuleDict):
    """The three denoisers: of g, of c when told g, of f when told both"""

    def __init__(self, config, N):
        super().__init__()
        self.side, G = N // 4, config.whole
        sizes = dict(g=(G, 0), c=(N, G), f=(4, G + N))
        self.update({name: Maker(*some, config.maker) for name, some in sizes.items()})

    def told(self, name, g, c):
        """g (B,G,1,1), c (B,N,n,n) -> the maps that a level is told"""
        wide = lambda side: g.expand(-1, -1, side, side)
        return (g[:, :0] if name == "g" else wide(self.side) if name == "c" else
                torch.cat([wide(2 * self.side), F.interpolate(c, scale_factor=2)], 1))

    def sample(self, levels, draws, steps, g=None, c=None):
        """Each level from those above, which may be given -> maps g, c, f"""
        if g is None:
            g = self["g"].sample(levels.f_words.words.new_zeros(len(draws), 0, 1, 1), draws, steps)
        # What is drawn becomes words, as the autoencoder's own vectors did
        if c is None:
            c = self["c"].sample(self.told("c", g, None), draws, steps)
            c = as_map(levels.c_words.snap(as_vectors(c)))
        f = self["f"].sample(self.told("f", g, c), draws, steps)
        return g, c, levels.f_words.snap(f.movedim(1, -1)).movedim(-1, 1)


@torch.no_grad()
def written(levels, volumes):
    """The three latents of volumes (P,4,N,N,N), as maps g (P,G,1,1), c (P,N,n,n), f (P,4,2n,2n)"""
    parts = []
    for some in volumes.split(32):
        g, _, c, f = levels.encode(some.float())
        c, f = levels.c_words.snap(c), levels.f_words.snap(f)
        parts.append((g[..., None, None], as_map(c), f.movedim(-1, 1)))
    return [torch.cat(some) for some in zip(*parts)]


@torch.no_grad()
def read(levels, maps):
    """Maps g, c, f -> volumes (P,C,N,N,N)"""
    return torch.cat([levels.decode(g[..., 0, 0], as_vectors(c), f.movedim(1, -1))
                      for g, c, f in zip(*(some.split(16) for some in maps))])


def first_losses(levels, volume, config, generator, fast):
    """The autoencoder's, with their weights {name: loss}; and what moves the words of c and f"""
    with fast:
        mean, log_variance, c, f = levels.encode(volume)
        c, c_apart, *c_spoken = levels.c_words.through(c)
        f, f_apart, *f_spoken = levels.f_words.through(f)
        g = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator).to(mean)
        made = levels.decode(g, c, f)
    losses = {"pictures": pictures_apart(volume, made, levels.field, config.rays, generator),
              "kl": config.kl / 2 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(),
              "apart": 0.01 * (c_apart + f_apart)}
    if not config.implicit:                              # density has a place of its own, so it can be shown
        density = torch.tanh(made[:, 0] / 4) - torch.tanh(volume[:, 0] / 4)
        losses["density"] = config.density * density.square().mean()
    return losses, c_spoken, f_spoken


def main(argv=None):
    config = parse_config(Config, PRESETS, with_box(argv, Config))
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    run = Run(config.out, "hierarchy", config, [f.name for f in fields(Config) if f.name not in FREE])

    # What to learn from: the volumes of recombined codes.  The objects' own measure the autoencoder
    data, _, to_latents = to_learn(model, config)
    with torch.no_grad():
        data, own = (torch.cat([model.to_volume(part).half() for part in some.split(8)])
                     for some in (to_latents(data), latents_of(model, model.codes)))
    own, N, maps, total = own.float(), own.shape[-1], None, config.first_steps + config.steps
    if N % 8 or len(names) < 3:
        raise UserError(f"{config.autodecoder}: 8, 16, 32, ... voxels a side, and 3 objects, are wanted")
    torch.manual_seed(config.seed)
    levels, makers = Levels(config, N).to(device), Makers(config, N).to(device)
    average = copy.deepcopy(makers).requires_grad_(False)
    optimizers = [torch.optim.Adam(some.parameters(), betas=BETAS) for some in (levels, makers)]
    networks = {"levels": levels, "makers": makers, "average": average}
    step = resume(run, model, networks, optimizers)
    parameters = sum(p.numel() for some in (levels, makers) for p in some.parameters())
    print(f"{len(data)} volumes; {parameters / 1e6:.2f} M parameters")
    with run:
        while step < total:
            second = step >= config.first_steps
            here, steps = (step - config.first_steps, config.steps) if second else (step, config.first_steps)
            optimizers[second].param_groups[0]["lr"] = config.lr * learning_rate_share(here, steps, 0.03)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            item = torch.randint(len(data), (config.batch * (1 + second),), generator=generator).to(device)
            fast = fast_precision(model.config, device)
            if second and maps is None:                                   # the latents of all volumes, once
                maps = dict(zip("gcf", written(levels, data)))
                for network in (makers, average) if here == 0 else ():
                    for name in "gcf":
                        network[name].fit(maps[name][:512], torch.Generator().manual_seed(config.seed))
            if second:
                g, c, f = (maps[name][item] for name in "gcf")
                with fast:
                    losses = {name: makers[name].loss(some, makers.told(name, g, c), generator)
                              for name, some in zip("gcf", (g, c, f))}
            else:
                losses, *spoken = first_losses(levels, data[item].float(), config, generator, fast)
            well = improve(run, step, sum(losses.values()), optimizers[second])
            if well and second:
                follow(average, makers, here, config.ema)
            elif well:
                for words, some in zip((levels.c_words, levels.f_words), spoken):
                    words.move(*some, generator)
            step += 1
            record(run, model, networks, optimizers, step, total, losses)

    # How well do three latents hold an object?  Then samples, as volumes that stage 1's renderer shows
    show = AsVolumes(levels.field)
    look = lambda who, some: render_views(who, some, cameras(ANGLES[:1]), SIZE)[0][:, 0]
    before, after = look(PLAIN, own), look(show, read(levels, written(levels, own)))
    save_picture(run.folder / "written.png", grid(to_bytes(torch.cat([before[:8], after[:8]])), 8))
    began, draws = time.time(), [noise_of(seed) for seed in range(config.count)]
    with torch.no_grad():
        maps = [torch.cat(some) for some in zip(*[average.sample(levels, draws[k:k + 32], HEUN)
                                                  for k in range(0, config.count, 32)])]
        volumes = levels.head(read(levels, maps).movedim(1, -1)).movedim(-1, 1)    # of features: at centres
        write_volumes(run.folder, volumes, parameters, (time.time() - began) / config.count)
        # What does each level decide?  Seed 0, and seven times some of its levels anew
        g, c, f = (some[:1].expand(7, *some.shape[1:]) for some in maps)
        again, first = [noise_of(1000 + k) for k in range(7)], read(levels, [some[:1] for some in maps])
        new, same_g = average.sample(levels, again, HEUN), average.sample(levels, again, HEUN, g)
        rows = [(g, c, average.sample(levels, again, HEUN, g, c)[2]), (g, same_g[1], f), (new[0], c, f),
                same_g, new]
        rows = [look(show, torch.cat([first, read(levels, row)])) for row in rows]
    save_picture(run.folder / "levels.png", grid(to_bytes(torch.cat(rows)), 8))
    moved = ", ".join(f"{name} {(row[1:] - row[:1]).square().mean().sqrt():.3f}"
                      for name, row in zip(("f", "c", "g", "c and f", "all"), rows))
    plot_log(run.folder, "loss", pictures="pictures", g="g", c="c", f="f")
    print(f"wrote {run.folder}.  From its latents an object has {psnr(after, before):.2f} dB of stage 1's "
          f"picture (row L4: 31.90).  Drawn anew, a level moves pictures by {moved}")


if __name__ == "__main__":
    command(main)

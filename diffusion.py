"""
Stage 2 of 3: diffuse the latents.  Learn to take noise off the latents z_i = G1(e_i) of stage 1:

    min over D    mean_{i, sigma, n}  weight(sigma) | D(z_i + sigma n, sigma) - z_i |^2,      n ~ N(0, I)

A denoiser D that can do this knows the way to the latents: (D(x, sigma) - x) / sigma^2 is the score, the
direction in which noised latents become more likely (Tweedie).  Followed from pure noise it ends at a latent,
and G2 makes an object of it.

There are 72 latents of 8,192 numbers each.  Three things follow, and each is a knob:
    levels        Up to sigma = 15 a perfect denoiser still recognises the object.  The choice between objects
                  happens at larger sigma, so we place many training levels there.  See levels.png
    components    An MLP with 1,024 hidden units cannot output arbitrary noise in 8,192 dimensions, so it
                  cannot remove all of it.  Some noise stays in every sample.  We therefore work in principal
                  components
    mix           A perfect denoiser of 72 latents returns those 72.  So ours learns from the latents of mixed
                  codes: objects that could exist

in   runs/autodecoder/last.pt        stage 1's codes and decoder
out  runs/diffusion/                 last.pt, log.jsonl, previews/, levels.png, curve.png
run  python diffusion.py                                      3.5 min on two cores: no copies (rows D1, D14)
     python diffusion.py --mix 0 --steps 6000 --out runs/copies   a lesson: 28 % of the samples are copies
     python diffusion.py --formulation ddpm --steps 6500 --out runs/ddpm    DDPM (compare rows D12 to D14)
read Config, RobustNorm, MLP, Denoiser, denoising_loss, the two samplers, code_mixtures, main.
"""
import copy
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from autodecoder import load_autodecoder, plot_log
from common import (BETAS, CLIP, Run, UserError, command, digest, learning_rate_share, load_stage,
                    parse_config, pick_device, save_figure, save_preview, saved_config, to_bytes)
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/diffusion"          # folder for the model, the log and the pictures
    # the latents
    mix: float = 1.0                     # share of a batch that is G1 of mixed codes; 0: none (from 0 to 1)
    mixtures: int = 2048                 # how many such mixtures there are (at least 1)
    among: int = 8                       # codes are mixed with this many nearest ones; 0: any with any
    components: int = 240                # principal components that the network works in (at least 1)
    shuffle: bool = False                # a control: each number of a latent comes from another object
    # the noise, and the network that removes it
    formulation: str = "edm"             # edm | ddpm: ddpm needs 1.6 times the steps (D12 to D14)
    low: float = 0.1                     # the least sigma, in deviations of the latents (from 0.0001 to 10)
    width: int = 1024                    # hidden units (at least 1)
    layers: int = 3                      # hidden layers
    embedding: int = 64                  # sines and cosines of the noise level (at least 2)
    # training
    steps: int = 4000                    # gradient steps: more is neater, but nearer to copies (at least 1)
    batch: int = 256                     # latents in a step (at least 1)
    lr: float = 1e-3                     # learning rate, at its highest
    lr_floor: float = 0.01               # at the end, as a share of the highest (from 0 to 1)
    ema: float = 0.999                   # decay of the averaged weights, which sample (from 0 to 1)
    seed: int = 0                        # of the weights, the mixtures and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines (at least 1)
    preview_every: int = 1000            # steps between previews (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {
    "cpu": {},
    "gpu": dict(steps=20000, batch=1024, preview_every=5000, save_every=2000),
    "smoke": dict(steps=20, batch=16, mixtures=32, components=8, width=32, layers=1, preview_every=10,
                  save_every=10, log_every=5),
}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh")    # may change on resume


# -------------------------------------------------------------------------- what the network sees of a latent

class RobustNorm(nn.Module):
    """(latent - centre - median) / (0.7413 x inter-quartile range), per channel        (3DADM, section 3.4)

    Latents are bell-shaped with long tails.  The tails would inflate a standard deviation.  0.7413 times the
    inter-quartile range ignores them; for a bell both are equal.  The centre is ours: it is the mean object,
    voxel by voxel.  Without it most of each latent is what all objects share."""

    def __init__(self, shape):
        super().__init__()
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("shift", torch.zeros(shape[0], 1, 1, 1))
        self.register_buffer("scale", torch.ones(shape[0], 1, 1, 1))

    def fit(self, latents):
        """latents (N,C,r,r,r)"""
        self.centre.copy_(latents.mean(0))
        values = (latents - self.centre).transpose(0, 1).flatten(1).sort(1).values             # (C,N r^3)
        at = lambda share: values[:, round(share * (values.shape[1] - 1)), None, None, None]
        self.shift.copy_(at(0.5))
        self.scale.copy_((0.7413 * (at(0.75) - at(0.25))).clamp(min=1e-6))

    def normalize(self, latents):
        return (latents - self.centre - self.shift) / self.scale

    def denormalize(self, numbers):
        return numbers * self.scale + self.shift + self.centre


def principal(rows, count):
    """rows (P,D) -> (count,D): orthonormal, the directions in which the rows are longest"""
    rows = rows.double()
    longest = torch.linalg.eigh(rows @ rows.T)[1][:, -count:].flip(1)              # (P,count)
    return torch.linalg.qr(rows.T @ longest)[0].T.float()


class MLP(nn.Module):
    """The paper's network: the noised numbers and an embedding of the noise level in, as many numbers out."""

    def __init__(self, numbers, config):
        super().__init__()
        width, self.half = config.width, config.embedding // 2
        self.enter = nn.Linear(numbers + 2 * self.half, width)
        layer = lambda outer: nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outer))
        self.hidden = nn.ModuleList([layer(width) for _ in range(config.layers)])
        self.leave = layer(numbers)
        # The last layer starts at zero.  The network then outputs 0, and the denoiser is the best linear one
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x, level):
        """x (B,K), level = log(sigma) / 4 (B,) -> (B,K)"""
        h = self.enter(torch.cat([x, level_embedding(level, self.half)], 1))
        for layer in self.hidden:
            h = h + layer(h)
        return self.leave(h)


def level_embedding(level, half):
    """(B,) -> (B,2 half): sines and cosines, with wavelengths from 2 pi / 100 to 2 pi, geometrically"""
    angle = level[:, None] * 100.0 ** torch.linspace(1, 0, half, device=level.device)
    return torch.cat([angle.sin(), angle.cos()], 1)


class Denoiser(nn.Module):
    """D(x, sigma), and what it must know of the latents: their normalisation, principal components, the
    deviation in each, and the noise levels."""

    def __init__(self, config, shape):
        super().__init__()
        self.config, self.shape, K = config, tuple(shape), min(config.components, math.prod(shape))
        self.norm = RobustNorm(shape)
        self.register_buffer("basis", torch.zeros(K, math.prod(shape)))
        self.register_buffer("deviation", torch.ones(K))
        self.register_buffer("importance", torch.ones(K))
        self.register_buffer("levels", torch.ones(LEVELS))
        self.network = MLP(K, config)

    def fit(self, latents, mixtures, generator):
        """All but the network's weights, from latents (N,C,r,r,r) and those of mixtures (M,C,r,r,r)"""
        # Normalise by the objects alone; find the directions in which objects and mixtures vary most
        self.norm.fit(latents)
        both = self.norm.normalize(torch.cat([latents, mixtures])).flatten(1)
        self.basis.copy_(principal(both, len(self.basis)))

        # EDM's sigma_data is one number, 0.5.  Ours is measured in each component, because the first are much
        # longer than the last.  An error counts by its component's share of the variance.  If all counted
        # alike, the many short components would outweigh the few that make the shape
        self.deviation.copy_((both @ self.basis.T).square().mean(0).sqrt().clamp(min=1e-3))
        self.importance.copy_(self.deviation ** 2 / self.deviation.square().mean())

        # The levels depend on how far apart the objects are
        least = self.config.low * self.norm.normalize(latents).square().mean().sqrt().item()
        levels, sigma, entropy = choose_levels(self.to_components(latents), least, generator)
        self.levels.copy_(levels)
        return sigma, entropy

    def to_components(self, latents):
        return self.norm.normalize(latents).flatten(1) @ self.basis.T                        # (B,K)

    def to_latents(self, z):
        return self.norm.denormalize((z @ self.basis).view(-1, *self.shape))                 # (B,C,r,r,r)

    def level(self, u):
        """Places in [0, 1] -> noise levels sigma: the table's, and what lies between two of them"""
        at = u * (LEVELS - 1)
        below = at.long().clamp(max=LEVELS - 2)
        low, high = self.levels[below].log(), self.levels[below + 1].log()
        return torch.lerp(low, high, at - below).exp()

    def denoise(self, x, sigma):
        """x = z + sigma n (B,K), sigma (B,1) -> the mean of all z that x can have come from

        Preconditioning (Karras et al. 2022, table 1): the network's input and its target have unit variance
        at every sigma.  c_skip x is already the best *linear* denoiser; the network learns the rest."""
        total = (sigma ** 2 + self.deviation ** 2).sqrt()
        c_skip, c_out, c_in = self.deviation ** 2 / total ** 2, sigma * self.deviation / total, 1 / total
        return c_skip * x + c_out * self.network(c_in * x, sigma.flatten().log() / 4)


def load_denoiser(folder, device="cpu"):
    """The trained denoiser of a run, and of the autodecoder that it is for: folder and fingerprint"""
    state = load_stage(folder, "stage 2's denoiser", "diffusion.py", "denoiser")
    denoiser = Denoiser(saved_config(Config, state, folder), state["shape"])
    denoiser.load_state_dict(state["denoiser"])
    denoiser = denoiser.to(device).eval().requires_grad_(False)
    return denoiser, {"folder": state["config"]["autodecoder"], "fingerprint": state["autodecoder"]}


# ------------------------------------------------------------------------------------------- the noise levels

LEVELS = 1000                      # DDPM's number of time steps: here the length of the table of levels


def posterior_entropy(points, sigmas, generator, draws=2048):
    """points (N,K) -> for each sigma, a perfect denoiser's doubt which point it sees: the entropy of
    p(i | x) ~ exp(-|x - z_i|^2 / 2 sigma^2), from 0 to 1 (all N are alike), the mean over `draws` noised x"""
    points = points.double().cpu()
    values, vectors = torch.linalg.eigh(points @ points.T)         # only the span of the points matters
    points = vectors * values.clamp(min=0).sqrt()                                          # (N,N)
    truth = points[torch.arange(draws) % len(points)]
    noise, result = torch.randn(truth.shape, generator=generator, dtype=torch.float64), []
    for sigma in sigmas:
        distance = torch.cdist(truth + sigma * noise, points).square()                     # (draws,N)
        log_p = torch.log_softmax(-distance / (2 * sigma ** 2), -1)
        result.append(-(log_p.exp() * log_p).sum(-1).mean() / math.log(len(points)))
    return torch.stack(result)


def choose_levels(points, least, generator):
    """points (N,K) -> levels (LEVELS,), ascending, to train and sample at; to plot, sigmas and entropies"""
    # From almost no noise to four times the widest spread of the points
    spread = torch.linalg.matrix_norm(points.double(), 2).item() / math.sqrt(len(points))
    sigma = torch.linspace(math.log(least), math.log(4 * spread), 32, dtype=torch.float64).exp()
    entropy = posterior_entropy(points, sigma, generator)

    # Half of the levels go where the entropy rises, because there a sample becomes this object or that one.
    # The other half is spread evenly over log sigma, because all the noise must be removed in the end
    rise = entropy.diff().clamp(min=0)
    share = rise / rise.sum().clamp(min=1e-9) + 1 / len(rise)                      # of levels between sigmas
    cdf = F.pad((share / share.sum()).cumsum(0), (1, 0))                           # (32,) from 0 to 1

    # Invert it: at which sigma is 0, 1/999, 2/999, ... of the cumulative share reached?
    u = torch.linspace(0, 1, LEVELS, dtype=torch.float64)
    k = torch.searchsorted(cdf, u).clamp(1, len(cdf) - 1)
    between = ((u - cdf[k - 1]) / (cdf[k] - cdf[k - 1])).clamp(0, 1)
    return torch.lerp(sigma.log()[k - 1], sigma.log()[k], between).exp(), sigma, entropy


# ---------------------------------------------------------------------------- one noise, and two formulations

def denoising_loss(denoiser, z, noise, u):
    """z and noise (B,K), u (B,) in [0, 1): the place of each one's level -> (B,)

    DDPM (Ho et al. 2020; a: their alpha-bar) has x' = sqrt(a) z + sqrt(1 - a) n and predicts n.  Divide x' by
    sqrt(a): it is our x = z + sigma n with sigma^2 = (1 - a) / a.  Predicting n is predicting z, because
    n = (x - z) / sigma.  So one denoiser serves both formulations.  Three things differ:

                 which sigmas               weight of |D - z|^2                   which sampler
        DDPM     one of the 1,000 levels    1 / sigma^2, from the error in n      ancestral: noise each step
        EDM      any between them           1 / sigma^2 + 1 / deviation^2         Heun: noise only at first
    DDPM's weight is small at large sigma, where the choice between objects happens: it learns that late."""
    if denoiser.config.formulation == "ddpm":
        sigma = denoiser.levels[(u * LEVELS).long().clamp(max=LEVELS - 1), None]     # u may round up to 1
        weight = 1 / sigma ** 2
    else:
        sigma = denoiser.level(u)[:, None]
        weight = 1 / sigma ** 2 + 1 / denoiser.deviation ** 2         # = 1 / c_out^2: the network's own error
    error = denoiser.denoise(z + sigma * noise, sigma) - z
    return (weight * denoiser.importance * error.square()).mean(1)


def ancestral_sample(denoiser, x, sigmas, draw):
    """DDPM's (Ho et al., algorithm 2) -> sigma, expected z and next x, step by step"""
    for now, after in zip(sigmas, [*sigmas[1:], torch.zeros_like(sigmas[0])]):
        clean = denoiser.denoise(x, now.expand(len(x), 1))
        # If z = clean, x at the next level has this mean and deviation, given x at this one (equations 6, 7)
        kept = (after / now) ** 2
        x = clean + kept * (x - clean) + after * (1 - kept).sqrt() * draw()
        yield now.item(), clean, x


def heun_sample(denoiser, x, sigmas, draw):
    """EDM's (Karras et al., algorithm 1): down dx/dsigma = (x - D(x, sigma)) / sigma -> the same"""
    slope_at = lambda x, sigma: (x - denoiser.denoise(x, sigma.expand(len(x), 1))) / sigma
    for now, after in zip(sigmas, [*sigmas[1:], torch.zeros_like(sigmas[0])]):
        slope = slope_at(x, now)
        clean = x - now * slope
        # Heun's method: a step along the slope here, then again along the mean of the slopes at both its ends
        ahead = x + (after - now) * slope
        x = x + (after - now) * (slope + slope_at(ahead, after)) / 2 if after > 0 else ahead
        yield now.item(), clean, x


SAMPLERS = {"heun": (heun_sample, 18), "ancestral": (ancestral_sample, LEVELS)}      # and their usual steps


def noise_of(seed):
    """A function that draws a sample's noise, from a generator of its own"""
    generator = torch.Generator().manual_seed(int(seed))
    return lambda shape: torch.randn(shape, generator=generator)


@torch.no_grad()
def sample(denoiser, seeds, steps=0, sampler="", trace=None):
    """One latent for each seed, the same in any batch -> (B,C,r,r,r).  A seed may also be a function that
    draws noise.  A list `trace` gets (sigma, latents expected) for each step."""
    walk, usual = SAMPLERS[sampler or ("heun" if denoiser.config.formulation == "edm" else "ancestral")]
    draws = [seed if callable(seed) else noise_of(seed) for seed in seeds]
    draw = lambda: torch.stack([one(denoiser.deviation.shape) for one in draws]).to(denoiser.levels)

    # From the highest level down.  There x is nearly all noise, so it begins as noise of x's own deviation
    sigmas = denoiser.level(torch.linspace(1, 0, steps or usual).to(denoiser.levels))
    x = draw() * (sigmas[0] ** 2 + denoiser.deviation ** 2).sqrt()
    for sigma, clean, x in walk(denoiser, x, sigmas, draw):
        if trace is not None:
            trace.append((sigma, denoiser.to_latents(clean)))
    return denoiser.to_latents(x)


# ----------------------------------------------------------------------------------------------- the latents

@torch.no_grad()
def latents_of(model, codes):
    return torch.cat([model.to_latent(part).float() for part in codes.split(64)])


@torch.no_grad()
def code_mixtures(codes, count, generator, among=0):
    """(count,width): weighted means of two or three codes; of any, or of the `among` nearest to one, because
    there is no object half-way between a bud and a headphone."""
    N, among = len(codes), min(among, len(codes))
    first = torch.randint(N, (count, 1), generator=generator)
    others = torch.randint(among or N, (count, 2), generator=generator)
    if among:
        others = torch.cdist(codes, codes).argsort(1).cpu()[first, others]         # the nearest is itself
    share = -torch.rand(count, 3, generator=generator).clamp(min=1e-9).log()       # uniform on the triangle
    share[::2, 2] = 0                                                              # every other one: of two
    share = (share / share.sum(1, keepdim=True)).to(codes.device)
    return (share[..., None] * codes[torch.cat([first, others], 1).to(codes.device)]).sum(1)


def shuffled(latents, generator):
    """(N,...): each number from another object: as likely one by one, together latents of nothing"""
    order = torch.rand(latents.flatten(1).shape, generator=generator).argsort(0).to(latents.device)
    return latents.flatten(1).gather(0, order).view_as(latents)


def nearest(latents, training, itself=False):
    """-> distances to the training latents, nearest first (B,N), and whose they are (B,N)"""
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(latents.flatten(1), training.flatten(1), compute_mode=exact)
    return (distance.fill_diagonal_(math.inf) if itself else distance).sort(1)   # itself: each to the others


def fingerprint(model):
    return digest(model.state_dict())          # tells one trained autodecoder from any other, to the last bit


# -------------------------------------------------------------------------------------------------- pictures

def plot_levels(denoiser, sigma, entropy, path):
    """How unsure a perfect denoiser is at each level, and where we therefore train and sample"""
    levels = denoiser.levels.cpu()
    count, edges = torch.histogram(levels.log(), 40)
    habit = torch.exp(-((sigma.log() + 1.2) / 1.2) ** 2 / 2)
    axis = Figure(figsize=(7, 3.6), layout="constrained").subplots()
    axis.plot(sigma, entropy, label="a perfect denoiser's doubt which object it sees")
    axis.fill_between(edges.exp()[:-1], count / count.max(), step="post", alpha=0.2, label="training levels")
    axis.plot(levels[::55], torch.full((len(levels[::55]),), -0.04), "k|", ms=9, label="Heun's steps")
    axis.plot(sigma, habit, ":", color="grey", label="EDM's usual levels, for pictures")
    axis.set(xscale="log", xlabel="sigma", ylabel="doubt; shaded: density")
    axis.legend(fontsize=7)
    save_figure(path, axis.figure)


# ------------------------------------------------------------------------------------------------------ main

def main(argv=None, Config=Config, presets=PRESETS, Denoiser=Denoiser):
    """A chapter may train a denoiser of its own by this loop, with a Config that adds knobs to this one."""
    config = parse_config(Config, presets, argv)
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    if len(names) < 3:
        raise UserError(f"{config.autodecoder} knows {len(names)} objects: at least 3 are wanted")
    run = Run(config.out, Denoiser.__name__, config, [f.name for f in fields(Config) if f.name not in FREE])

    # What to train on: the objects' latents, then those of mixtures of their codes
    generator = torch.Generator().manual_seed(config.seed)
    latents = latents_of(model, model.codes)
    mixed = latents_of(model, code_mixtures(model.codes, config.mixtures, generator, config.among))
    if config.shuffle:
        latents, mixed = shuffled(latents, generator), shuffled(mixed, generator)
    config.components = min(config.components, len(latents) + len(mixed))

    # The denoiser, and a second one whose weights are the running mean of the first's: it will sample
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config, latents.shape[1:]).to(device)
    sigma, entropy = denoiser.fit(latents, mixed, generator)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.network.parameters(), betas=BETAS)
    state, step = run.load(), 0
    if state:
        if state["autodecoder"] != fingerprint(model):
            raise UserError(f"{config.out} was trained on another autodecoder than {config.autodecoder} is: "
                            "start over with --fresh, or use another --out")
        average.load_state_dict(state["denoiser"])
        denoiser.load_state_dict(state["denoiser"] | state["raw"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"going on from step {step} of {config.out}/last.pt")
    data = denoiser.to_components(torch.cat([latents, mixed]))
    size = sum(p.numel() for p in denoiser.network.parameters()) / 1e6
    print(f"{len(latents)} latents and {len(mixed)} mixtures; network of {size:.2f} M parameters; noise from "
          f"{denoiser.levels[0]:.2g} to {denoiser.levels[-1]:.3g}")

    with run:
        plot_levels(denoiser, sigma, entropy, run.folder / "levels.png")
        while step < config.steps:
            # Schedule
            share = learning_rate_share(step, config.steps, config.lr_floor)
            optimizer.param_groups[0]["lr"] = config.lr * share

            # Batch: objects or mixtures, each with a level of its own, spread evenly over low and high noise
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            is_mixture = torch.rand(config.batch, generator=generator) < config.mix
            mixture = len(latents) + torch.randint(len(mixed), (config.batch,), generator=generator)
            item = torch.randint(len(latents), (config.batch,), generator=generator)
            z = data[torch.where(is_mixture, mixture, item).to(device)]
            u = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)
            noise = torch.randn(z.shape, generator=generator).to(device)

            # Loss
            losses = denoising_loss(denoiser, z, noise, u.to(device))
            loss = losses.mean()

            # Step, and the running mean: short at first, because the first weights are worth little
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(denoiser.network.parameters(), CLIP)
            if run.finite(step, loss.item() + norm.item()):
                optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))
                for mean, p in zip(average.network.parameters(), denoiser.network.parameters()):
                    mean.lerp_(p.detach(), 1 - decay)
            step += 1

            # Log, preview, save
            if step % config.log_every == 0 or step == config.steps:
                low, middle, high = (part.mean().item() for part in losses.detach().tensor_split(3))
                run.log(step, config.steps, loss=loss.item(), low=low, middle=middle, high=high,
                        lr=share * config.lr)
            if step % config.preview_every == 0 or step == config.steps:
                rgb = render_views(model, sample(average, range(8), 18), cameras(ANGLES[:2]), SIZE)[0]
                save_preview(run.folder / f"previews/step_{step:06d}.png", to_bytes(rgb.transpose(0, 1)))
            if step % config.save_every == 0 or step == config.steps or run.stopping:
                raw = {f"network.{name}": weights for name, weights in denoiser.network.state_dict().items()}
                run.save({"config": asdict(config), "step": step, "shape": list(denoiser.shape),
                          "autodecoder": fingerprint(model), "denoiser": average.state_dict(), "raw": raw,
                          "optimizer": optimizer.state_dict()})
            run.stop_if_asked(step)

    plot_log(run.folder, "loss", low="low noise", middle="middle noise", high="high noise")
    print(f"wrote {run.folder}: last.pt, levels.png, curve.png, previews/.  Next: python sample.py")


if __name__ == "__main__":
    command(main)

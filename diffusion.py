"""
Stage 2 of 3: diffuse the latents.  Learn to take noise off the latents z_i = G1(e_i) of stage 1:

    min over D    mean_{i, sigma, n} | D(z_i + sigma n, sigma) - z_i |^2,      n ~ N(0, I)

A denoiser that can do this knows the way from anywhere to the latents: the score of noised latents is
(D(x, sigma) - x) / sigma^2 (Tweedie).  Followed from pure noise it ends at a latent, of which G2
makes an object.

There are 72 latents of 8,192 numbers.  Three things follow, and each is a knob to turn:
    which noise   up to sigma ~ 10 it is plain which of the 72 is under the noise; what a sample becomes is
                  decided above.  Levels are chosen from the latents, not from habit: see levels.png
    components    an MLP of width 1,024 cannot put out noise in 8,192 dimensions, nor so take it off: its
                  samples keep what is left.  In principal components there is nothing it cannot put out
    mix           a perfect denoiser of 72 latents returns those 72.  Half of each batch are latents of codes
                  mixed with their neighbours: objects that could have been

in   runs/autodecoder/last.pt        stage 1's codes and decoder
out  runs/diffusion/                 last.pt, log.jsonl, previews/, levels.png, histogram.png
run  python diffusion.py                                      2.5 min on two cores (README, row D1): no copies
     python diffusion.py --mix 0 --steps 6000 --out runs/copies   a lesson: 22 % of the samples are copies
     python diffusion.py --preset paper --out runs/paper      the paper's DDPM: 72 % copies
     python diffusion.py --preset unet --out runs/unet        3DADM's denoiser: wants more time, colours bleed
read Config, RobustNorm, choose_levels, the EDM and DDPM functions side by side, MLP, UNet, main.
"""
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import Attention, load_autodecoder, render_view, save_preview
from common import (Run, UserError, load_stage, new_figure, parse_config, pick_device, plot_log,
                    save_figure, to_bytes)
from render_shapenet import camera_to_world_at, intrinsics_at


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/diffusion"          # folder for the model, the log and the pictures
    # the latents
    normalization: str = "robust"        # robust | robust_global | meanstd | none: before the diffusion
    mix: float = 0.5                     # share of a batch that is G1 of mixtures of 2-3 codes; 0: copies
    mixtures: int = 2048                 # how many such mixtures there are
    among: int = 8                       # codes are mixed with so many nearest ones; 0: any with any
    components: int = 240                # the MLP's: principal components it works in; 0: the bare numbers
    shuffle: bool = False                # a control: each number of a latent from an object of its own
    holdout: int = 0                     # objects kept aside, to watch the loss of
    patience: int = 0                    # end when that has not fallen for so many previews; 0: never
    # the denoiser
    denoiser: str = "mlp"                # mlp | unet: the paper's, or 3DADM's
    width: int = 1024                    # of the MLP
    layers: int = 3                      # of the MLP, hidden ones
    channels: str = "48,96"              # of the U-Net's levels, each halving the resolution
    embedding: int = 64                  # sines and cosines of the noise level
    # noise
    formulation: str = "edm"             # edm | ddpm: 3DADM's, or the paper's
    low: float = 0.1                     # the least sigma, in deviations of the latents
    # training
    steps: int = 2500                    # gradient steps: more make neater samples, and nearer to copies
    batch: int = 256                     # latents a step
    lr: float = 1e-3                     # Adam's, at its highest
    ema: float = 0.999                   # of the weights that sample; ramps up to this
    seed: int = 0                        # of the weights, the mixtures and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines
    preview_every: int = 1000            # steps between previews
    save_every: int = 500                # steps between checkpoints
    fresh: bool = False                  # throw away what is in --out and start over


PRESETS = {
    "cpu": {},
    "gpu": dict(steps=20000, batch=1024, preview_every=5000, save_every=2000),
    "smoke": dict(steps=20, batch=16, mixtures=32, components=8, width=32, layers=1, preview_every=10,
                  save_every=10, log_every=5),
    "unet": dict(denoiser="unet", batch=16, steps=4000),
    "paper": dict(formulation="ddpm", steps=6000),
    "3dadm": dict(denoiser="unet", channels="128,384", batch=64, steps=50000, normalization="robust_global",
                  lr=4.5e-4),
}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh")
RECIPE = tuple(field.name for field in fields(Config) if field.name not in FREE)
TIMES = 1000                       # DDPM's steps


# ----------------------------------------------------------------------------------------------- the latents

class RobustNorm(nn.Module):
    """(latent - centre - median) / (0.7413 x inter-quartile range)        (3DADM, section 3.4)

    The centre is the mean object, voxel by voxel; median and range are those of what is left, per channel
    or over all.  Latents are bell-shaped with long tails, and a deviation would be made by the tails;
    0.7413 x the range *is* a bell's deviation.  The centre is ours: without it most of each latent is what
    all objects share."""

    def __init__(self, shape, spatial):
        super().__init__()
        self.channels = len(shape) - spatial               # 1; or 2, the planes too, in stage 1's 2d mode
        each = (*shape[:self.channels], *[1] * spatial)
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("shift", torch.zeros(each))
        self.register_buffer("scale", torch.ones(each))

    def fit(self, latents, how="robust"):
        """latents (N,C,r,r,r) -> self"""
        if how == "none":
            return self
        self.centre.copy_(latents.mean(0))
        values = (latents - self.centre).movedim(0, -1).flatten(self.channels)     # (C,r^3 N)
        values = values.flatten() if how == "robust_global" else values
        ordered = values.sort(-1).values
        at = lambda share: ordered[..., round(share * (ordered.shape[-1] - 1))]
        shift, scale = (values.mean(-1), values.std(-1)) if how == "meanstd" else \
            (at(0.5), 0.7413 * (at(0.75) - at(0.25)))
        alone = (..., *[None] * (self.shift.dim() - shift.dim()))
        self.shift.copy_(shift[alone])
        self.scale.copy_(scale.clamp(min=1e-6)[alone])
        return self

    def normalize(self, latents):
        return (latents - self.centre - self.shift) / self.scale

    def denormalize(self, numbers):
        return numbers * self.scale + self.shift + self.centre


@torch.no_grad()
def code_mixtures(codes, count, generator, among=0):
    """(count,width): convex mixtures of two or three codes in random shares; of any, or of the `among`
    nearest to one: a bud and a headphone have no half-way."""
    N, among = len(codes), min(among, len(codes))
    first = torch.randint(N, (count, 1), generator=generator)
    others = torch.randint(among or N, (count, 2), generator=generator)
    if among:
        others = torch.cdist(codes, codes).argsort(1).cpu()[first, others]         # the nearest is itself
    share = -torch.rand(count, 3, generator=generator).clamp(min=1e-9).log()       # uniform on the triangle
    share[::2, 2] = 0                                                              # every other one: of two
    share = (share / share.sum(1, keepdim=True)).to(codes.device)
    return (share[..., None] * codes[torch.cat([first, others], 1).to(codes.device)]).sum(1)


@torch.no_grad()
def latents_of(model, codes):
    return torch.cat([model.to_latent(part).float() for part in codes.split(64)])


def shuffled(latents, generator):
    """(N,...): each number from another object: as likely one by one, together latents of nothing"""
    order = torch.rand(len(latents), latents[0].numel(), generator=generator).argsort(0).to(latents.device)
    return latents.flatten(1).gather(0, order).view_as(latents)


def fingerprint(model):
    """A number that tells one trained autodecoder from another."""
    return float(sum(p.double().abs().sum() for p in model.parameters()))


# ------------------------------------------------------------------------------------------ the noise levels

def posterior_entropy(points, sigmas, generator, draws=2048):
    """points (N,K) -> for each sigma, the ideal denoiser's doubt which point it sees: the entropy of
    p(i | x) ~ exp(-|x - z_i|^2 / 2 sigma^2), 0 to 1 (all N alike), the mean over `draws` noised points x"""
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


def choose_levels(points, low, generator):
    """points (N,K) -> log_sigma (256,), cdf (256,), entropy (256,): where to train and to sample.

    Below some sigma it is certain which object is under the noise, above another all are alike; what a
    sample becomes is decided between.  Half of the levels go there, as the entropy's slope has it, half
    evenly (in log sigma) over all: the noise that is left must be cleared away too."""
    spread = torch.linalg.matrix_norm(points.double(), 2).item() / math.sqrt(len(points))     # the widest way
    log_sigma = torch.linspace(math.log(low), math.log(4 * spread), 256, dtype=torch.float64)
    coarse = log_sigma[::8]
    entropy = posterior_entropy(points, coarse.exp(), generator)
    at = torch.linspace(0, len(coarse) - 1, 256, dtype=torch.float64)
    below = at.long().clamp(max=len(coarse) - 2)
    entropy = entropy[below].lerp(entropy[below + 1], at - below)
    slope = F.pad(entropy.diff().clamp(min=0), (1, 0))
    density = slope / slope.sum().clamp(min=1e-9) + 1 / 256
    cdf = density.cumsum(0) - density[0]
    return log_sigma, cdf / cdf[-1], entropy


# --------------------------------------------------- two formulations, function by function: EDM, then DDPM

def precondition(sigma, deviation):
    """c_skip, c_out, c_in of Karras et al. 2022, table 1: the network's input and target have unit variance
    at every sigma.  `deviation` is their sigma_data, here one for each number where the numbers are principal
    components: c_skip x is then the best *linear* denoiser, and the network learns what is not linear."""
    total = (sigma ** 2 + deviation ** 2).sqrt()
    return deviation ** 2 / total ** 2, sigma * deviation / total, 1 / total


def edm_loss(denoiser, z, noise, u):
    """z and noise (B,...), u (B,) in [0, 1): the level's place -> squared errors (B,)"""
    sigma = per_item(denoiser.sigma(u), z)
    c_skip, c_out, c_in = precondition(sigma, denoiser.deviation)
    x = z + sigma * noise
    target = (z - c_skip * x) / c_out
    error = denoiser.network(c_in * x, sigma.flatten().log() / 4) - target
    return (error.square() * denoiser.importance).flatten(1).mean(1)


def edm_denoise(denoiser, x, sigma):
    """x (B,...) noised by sigma (a number) -> the mean of the latents it can have come from"""
    c_skip, c_out, c_in = precondition(sigma, denoiser.deviation)
    return c_skip * x + c_out * denoiser.network(c_in * x, (sigma.log() / 4).expand(len(x)))


def edm_sample(denoiser, generators, shape, steps, trace=None):
    """Heun's method on dx/dsigma = (x - D(x, sigma)) / sigma  (Karras et al., algorithm 1).  A list `trace`
    gets each step's sigma, and what the denoiser then takes x for."""
    sigmas = denoiser.sigma(torch.linspace(1, 0, steps, device=denoiser.deviation.device))
    x = draw(generators, shape, denoiser) * (sigmas[0] ** 2 + denoiser.deviation ** 2).sqrt()
    for k, sigma in enumerate(sigmas):
        after = sigmas[k + 1] if k + 1 < steps else torch.zeros_like(sigma)
        clean = edm_denoise(denoiser, x, sigma)
        if trace is not None:
            trace.append((sigma.item(), clean))
        slope = (x - clean) / sigma
        ahead = x + (after - sigma) * slope
        if after > 0:                                                              # the second half of Heun's
            slope = (slope + (ahead - edm_denoise(denoiser, ahead, after)) / after) / 2
        x = x + (after - sigma) * slope
    return x


def ddpm_schedule(shift):
    """alpha_bar (TIMES,) of Ho et al. 2020, linear betas, made for numbers of unit deviation; with `shift`
    times as much noise at each t, for latents that keep their secret up to larger sigmas: SNR / shift^2."""
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, TIMES, dtype=torch.float64)).cumprod(0)
    return alpha_bar / (alpha_bar + shift ** 2 * (1 - alpha_bar))


def ddpm_loss(denoiser, z, noise, u):
    """The network predicts the noise  (Ho et al., equation 14)."""
    alpha_bar = per_item(denoiser.alpha_bar[(u * TIMES).long()], z)
    x = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
    error = ddpm_noise(denoiser, x, alpha_bar) - noise
    return error.square().flatten(1).mean(1)


def ddpm_noise(denoiser, x, alpha_bar):
    """x (B,...), alpha_bar (B,...) -> the noise in x: as in EDM the best linear guess, plus what the network
    makes of x scaled to unit variance.  (A plain network errs most where all is noise, where ddpm_step
    divides its error by almost 0: samples came out with twice their variance.)"""
    total = (alpha_bar * denoiser.deviation ** 2 + 1 - alpha_bar).sqrt()
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    left = denoiser.network(x / total, sigma.flatten().log() / 4)
    return (1 - alpha_bar).sqrt() * x / total ** 2 + alpha_bar.sqrt() * denoiser.deviation / total * left


def ddpm_sample(denoiser, generators, shape, steps=TIMES, trace=None):
    """Ancestral sampling  (Ho et al., algorithm 2; fewer steps skip times evenly); trace as in edm_sample"""
    times = torch.linspace(TIMES - 1, 0, steps).round().long().tolist()
    x = draw(generators, shape, denoiser)
    for k, t in enumerate(times):
        now = denoiser.alpha_bar[t]
        before = denoiser.alpha_bar[times[k + 1]] if k + 1 < steps else torch.ones_like(now)
        noise = ddpm_noise(denoiser, x, per_item(now.expand(len(x)), x))
        if trace is not None:
            trace.append((((1 - now) / now).sqrt().item(), (x - (1 - now).sqrt() * noise) / now.sqrt()))
        x, spread = ddpm_step(x, noise, now, before)
        if k + 1 < steps:
            x = x + spread * draw(generators, shape, denoiser)
    return x


def ddpm_step(x, noise, now, before):
    """-> mean and deviation of q(x before | x now, z), z being x without the noise  (equations 6 and 7)"""
    z = (x - (1 - now).sqrt() * noise) / now.sqrt()
    beta = 1 - now / before
    mean = (before.sqrt() * beta * z + (now / before).sqrt() * (1 - before) * x) / (1 - now)
    return mean, (beta * (1 - before) / (1 - now)).sqrt()


def per_item(values, like):
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def draw(generators, shape, denoiser):
    """Noise from each sample's own generator: a sample is the same in any batch, and on any device."""
    return torch.stack([noise(g, shape) for g in generators]).to(denoiser.deviation.device)


def noise(generator, shape):
    """N(0, I) from a generator.  From (one, other, share) it lies between theirs, on a circle: cos and sin
    times independent N(0, I) add up to N(0, I), where a straight line would lose its length halfway."""
    if isinstance(generator, tuple):
        one, other, share = generator
        angle = share * math.pi / 2
        return math.cos(angle) * noise(one, shape) + math.sin(angle) * noise(other, shape)
    return torch.randn(shape, generator=generator)


# --------------------------------------------------------------------------------------------- two denoisers

def noise_embedding(level, width):
    """level (B,) -> (B,width): its sines and cosines, wavelengths from 2 pi / 100 to 2 pi, geometrically"""
    frequency = 100.0 ** torch.linspace(1, 0, width // 2, device=level.device)
    angle = level[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def begin_at_zero(layer):
    """So that training begins at the best linear denoiser, which is what a network of 0 makes of c_skip"""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """The paper's: the numbers and the embedding of the noise level, concatenated."""

    def __init__(self, numbers, config):
        super().__init__()
        self.embedding = config.embedding
        self.enter = nn.Linear(numbers + config.embedding, config.width)
        width = config.width
        layer = lambda outer: nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outer))
        self.hidden = nn.ModuleList([layer(width) for _ in range(config.layers)])
        self.leave = layer(numbers)
        begin_at_zero(self.leave[-1])

    def forward(self, x, level):
        h = self.enter(torch.cat([x.flatten(1), noise_embedding(level, self.embedding)], 1))
        for layer in self.hidden:
            h = h + layer(h)
        return self.leave(h).view_as(x)


class Residual(nn.Module):
    """Two convolutions around a skip; the noise level scales and shifts what is between them."""

    def __init__(self, inner, outer, embedding):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, inner), nn.GroupNorm(1, outer)
        self.conv1, self.conv2 = nn.Conv3d(inner, outer, 3, padding=1), nn.Conv3d(outer, outer, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * outer)
        self.skip = nn.Conv3d(inner, outer, 1) if inner != outer else nn.Identity()
        begin_at_zero(self.conv2)

    def forward(self, x, level):
        scale, shift = self.level(level)[..., None, None, None].chunk(2, 1)
        h = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class UNet(nn.Module):
    """3DADM's: down to coarse levels, where every voxel can ask every other, and up again."""

    def __init__(self, numbers, config):
        super().__init__()
        widths, e = [int(width) for width in config.channels.split(",")], 4 * config.embedding
        self.embedding = config.embedding
        self.level = nn.Sequential(nn.Linear(config.embedding, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.enter = nn.Conv3d(numbers, widths[0], 3, padding=1)
        inner = [widths[0], *widths]
        self.down = nn.ModuleList([Residual(inner[k], width, e) for k, width in enumerate(widths)])
        self.middle, self.attention = Residual(widths[-1], widths[-1], e), Attention(widths[-1])
        self.up = nn.ModuleList([Residual(widths[min(k + 1, len(widths) - 1)] + width, width, e)
                                 for k, width in enumerate(widths)])
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[0]), nn.SiLU(),
                                   nn.Conv3d(widths[0], numbers, 3, padding=1))
        begin_at_zero(self.leave[-1])

    def forward(self, x, level):
        level = self.level(noise_embedding(level, self.embedding))
        h, kept = self.enter(x.contiguous(memory_format=torch.channels_last_3d)), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool3d(h, 2) if k else h, level)
            kept.append(h)
        h = self.attention(self.middle(h, level))
        for k in reversed(range(len(self.up))):
            h = self.up[k](torch.cat([h, kept[k]], 1), level)
            h = F.interpolate(h, scale_factor=2) if k else h
        return self.leave(h)


class Denoiser(nn.Module):
    """A network, and what it needs to know of the latents: how they are normalised, the principal components
    that the MLP works in, their deviations, and the noise levels."""

    def __init__(self, config, shape, components=0, planes=False):
        super().__init__()
        self.config, self.shape = config, tuple(shape)
        self.norm = RobustNorm(shape, 2 if planes else 3)
        total = math.prod(shape)
        self.register_buffer("basis", torch.zeros(components, total))
        self.register_buffer("deviation", torch.ones(components or 1))
        self.register_buffer("log_sigma", torch.zeros(256, dtype=torch.float64))
        self.register_buffer("cdf", torch.linspace(0, 1, 256, dtype=torch.float64))
        self.register_buffer("alpha_bar", torch.ones(TIMES, dtype=torch.float64))
        self.register_buffer("importance", torch.ones(components or 1))
        numbers = shape[0] if config.denoiser == "unet" else components or total
        self.network = (UNet if config.denoiser == "unet" else MLP)(numbers, config)

    def fit(self, latents, mixtures, generator):
        """All but the network's weights, from the latents (N,...) and those of mixtures (M,...) -> the ideal
        denoiser's entropy at each of log_sigma, to plot"""
        self.norm.fit(latents, self.config.normalization)
        both = self.norm.normalize(torch.cat([latents, mixtures]))
        if len(self.basis):
            self.basis.copy_(principal(both.flatten(1), len(self.basis)))
        # sigma_data is measured: one number, or one for each component.  Errors in a component count by its
        # share of the variance: alike, the many small components would outweigh the few that make the shape
        rms = self.norm.normalize(latents).square().mean().sqrt()
        self.deviation.fill_(rms)
        if len(self.basis):
            self.deviation.copy_((both.flatten(1) @ self.basis.T).square().mean(0).sqrt().clamp(min=1e-3))
            self.importance.copy_(self.deviation ** 2 / self.deviation.square().mean())
        points = self.encode(latents).flatten(1)
        log_sigma, cdf, entropy = choose_levels(points, self.config.low * rms.item(), generator)
        self.log_sigma.copy_(log_sigma)
        self.cdf.copy_(cdf)
        # DDPM's noise at half time is put where the choice is half made
        middle = log_sigma[(entropy - 0.5).abs().argmin()].exp()
        usual = ddpm_schedule(1)[TIMES // 2]
        self.alpha_bar.copy_(ddpm_schedule(middle / ((1 - usual) / usual).sqrt()))
        return entropy

    def sigma(self, u):
        """Places in [0, 1] -> noise levels, dense where the cdf is steep"""
        u = u.to(self.cdf)
        k = torch.searchsorted(self.cdf, u.contiguous()).clamp(1, 255)
        share = (u - self.cdf[k - 1]) / (self.cdf[k] - self.cdf[k - 1])
        return self.log_sigma[k - 1].lerp(self.log_sigma[k], share).exp().float()

    def encode(self, latents):
        """(B,C,r,r,r) -> what is diffused: (B,K) components or (B,C,r,r,r)"""
        z = self.norm.normalize(latents)
        return z.flatten(1) @ self.basis.T if len(self.basis) else z

    def decode(self, z):
        z = (z @ self.basis).view(-1, *self.shape) if len(self.basis) else z
        return self.norm.denormalize(z)


def principal(rows, count):
    """rows (P,D) -> (count,D): orthonormal, the directions in which the rows are longest"""
    rows = rows.double()
    longest = torch.linalg.eigh(rows @ rows.T)[1][:, -count:].flip(1)              # (P,count)
    return torch.linalg.qr(rows.T @ longest)[0].T.float()


@torch.no_grad()
def sample(denoiser, seeds, steps=0, trace=None):
    """One latent for each seed, the same in any batch -> (B,C,r,r,r); steps 0: the formulation's own.  A seed
    may be (a, b, share): on the way from a to b.  A list `trace` gets (sigma, latents expected) a step."""
    of = lambda seed: torch.Generator().manual_seed(int(seed))
    generators = [(of(s[0]), of(s[1]), s[2]) if isinstance(s, tuple) else of(s) for s in seeds]
    shape = (len(denoiser.basis),) if len(denoiser.basis) else denoiser.shape
    sampler, usual = (edm_sample, 18) if denoiser.config.formulation == "edm" else (ddpm_sample, TIMES)
    latents = denoiser.decode(sampler(denoiser, generators, shape, steps or usual, trace))
    if trace is not None:
        trace[:] = [(sigma, denoiser.decode(z)) for sigma, z in trace]
    return latents


def load_denoiser(folder, device="cpu"):
    """The trained denoiser of a run, and of the autodecoder that it is for: folder and fingerprint"""
    return build_denoiser(load_stage(folder, "stage 2's denoiser", "diffusion.py"), device)


def averaged(state):
    """The averaged weights: of the best step where --patience chose one, otherwise of the last"""
    return state["best"]["ema"] or state["ema"]


def build_denoiser(state, device="cpu"):
    denoiser = Denoiser(Config(**state["config"]), state["shape"], state["components"], state["planes"])
    network = {f"network.{name}": weights for name, weights in averaged(state).items()}
    denoiser.load_state_dict(state["denoiser"] | network)
    return (denoiser.to(device).eval().requires_grad_(False),
            {"folder": state["config"]["autodecoder"], "fingerprint": state["autodecoder"]})


# -------------------------------------------------------------------------------------------------- pictures

def plot_levels(denoiser, entropy, path):
    """How unsure the ideal denoiser is at each level, and where we therefore train and sample"""
    log_sigma, u = denoiser.log_sigma.cpu(), torch.linspace(1, 0, 18, device=denoiser.cdf.device)
    sigma, density = log_sigma.exp(), denoiser.cdf.diff().cpu()
    times = ((1 - denoiser.alpha_bar) / denoiser.alpha_bar).sqrt().cpu()[::50]
    habit = torch.exp(-((log_sigma + 1.2) / 1.2) ** 2 / 2)
    figure, axis = new_figure(figsize=(7, 3.6))
    axis.plot(sigma, entropy, label="the ideal denoiser's doubt which object it sees")
    axis.fill_between(sigma[1:], density / density.max(), alpha=0.2, color="C1", label="training levels")
    axis.plot(denoiser.sigma(u).cpu(), torch.full((18,), -0.04), "k|", ms=9, label="EDM: 18 steps")
    axis.plot(times, torch.full_like(times, -0.10), "C3|", ms=9, label="DDPM: every 50th, shifted")
    axis.plot(sigma, habit, ":", color="grey", label="EDM's usual levels, for pictures")
    axis.set(xscale="log", xlabel="sigma", xlim=(sigma[0] * 0.9, sigma[-1] * 1.1))
    axis.legend(fontsize=7)
    save_figure(figure, path)


def plot_histogram(denoiser, latents, path):
    """Why normalise: the values of each channel before and after, each a curve"""
    channels = denoiser.norm.channels
    figure, axes = new_figure(1, 2, figsize=(8, 3))
    for axis, values, title in ((axes[0], latents, "latents, by channel"),
                                (axes[1], denoiser.norm.normalize(latents), "normalised")):
        rows = values.movedim(0, -1).flatten(channels).flatten(0, channels - 1).cpu()      # (C,N r^3)
        edge = 1.2 * rows[:, ::101].abs().max().item() + 1e-6
        for row in rows:
            count, edges = torch.histogram(row, 80, range=(-edge, edge), density=True)
            axis.plot((edges[1:] + edges[:-1]) / 2, count, lw=0.7)
        axis.set(title=title, yscale="log")
    save_figure(figure, path)


def preview(model, denoiser, raw, averaged, size=64):
    """(2,8,H,W,3) bytes: seeds 0 to 7 by the raw weights; below by the averaged, which stay in the network"""
    pose, K, rows = camera_to_world_at(215, 25, 1.3).float(), intrinsics_at(size, 131.25).float(), []
    for weights in (raw, averaged):
        denoiser.network.load_state_dict(weights)
        volumes = [model.to_volume(z[None]) for z in sample(denoiser, range(8))]
        rows.append(torch.stack([render_view(model, volume, pose, K, size)[0].cpu() for volume in volumes]))
    return to_bytes(torch.stack(rows))


# ------------------------------------------------------------------------------------------------------ main

def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    check(config, model, len(names))
    ours = ("config.json", "last.pt", "previous.pt", "log.jsonl", "previews")
    stale = [Path(config.out, name) for name in ours] if config.fresh else ()
    run = Run(config.out, config, RECIPE, stale=stale)

    # Everything to train on: the objects' latents, then those of mixtures of their codes
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(names), generator=generator)
    aside, kept = order[:config.holdout], order[config.holdout:]
    latents = latents_of(model, model.codes[kept])
    mixed = latents_of(model, code_mixtures(model.codes[kept], config.mixtures, generator, config.among))
    if config.shuffle:
        latents, mixed = shuffled(latents, generator), shuffled(mixed, generator)
    components = min(config.components, len(latents) + len(mixed)) if config.denoiser == "mlp" else 0
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config, latents.shape[1:], components, model.planes).to(device)
    entropy = denoiser.fit(latents, mixed, generator)
    network = denoiser.network
    ema = {name: p.detach().clone() for name, p in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    state, step, best = run.load(), 0, {"loss": math.inf, "step": 0, "ema": None}
    if state:
        if state["autodecoder"] != fingerprint(model):
            raise UserError(f"{config.out} was trained on another autodecoder than {config.autodecoder} is: "
                            "start over with --fresh, or use another --out")
        denoiser.load_state_dict(state["denoiser"])
        ema = {name: p.to(device) for name, p in state["ema"].items()}
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
        print(f"going on from step {step} of {config.out}/last.pt")
    data, unseen = denoiser.encode(torch.cat([latents, mixed])), latents_of(model, model.codes[aside])
    plot_levels(denoiser, entropy, run.folder / "levels.png")
    plot_histogram(denoiser, latents, run.folder / "histogram.png")
    lowest, highest = denoiser.sigma(torch.tensor([0.0, 1.0], device=device)).tolist()
    size, rms = sum(p.numel() for p in network.parameters()) / 1e6, denoiser.norm.normalize(latents).std()
    print(f"{len(latents)} latents, sigma_data {rms:.2f}, and {len(mixed)} mixtures; {config.denoiser} of "
          f"{size:.2f} M parameters; noise from {lowest:.2g} to {highest:.3g}")
    loss_of = edm_loss if config.formulation == "edm" else ddpm_loss

    with run:
        while step < config.steps:
            # Warm-up, then half a cosine
            share = min(1.0, (step + 1) / (0.05 * config.steps))
            share *= 0.505 + 0.495 * math.cos(math.pi * step / config.steps)
            optimizer.param_groups[0]["lr"] = config.lr * share
            # All that is random in a step follows from (seed, step)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            z = data[draw_batch(config, len(latents), generator).to(device)]
            u = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)   # all levels alike
            noise = torch.randn(z.shape, generator=generator).to(device)
            losses = loss_of(denoiser, z, noise, u.to(device))
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if run.finite(step, loss.item() + norm.item()):
                optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))                # short at first: a ramp
                for name, p in network.state_dict().items():
                    ema[name].lerp_(p, 1 - decay)
            step += 1

            if step % config.log_every == 0 or step == config.steps:
                low, middle, high = (part.mean().item() for part in losses.detach().tensor_split(3))
                run.log(step, config.steps, loss=loss.item(), low=low, middle=middle, high=high,
                        lr=share * config.lr)
            if step % config.preview_every == 0 or step == config.steps:
                raw = {name: p.clone() for name, p in network.state_dict().items()}
                save_preview(run.folder / f"previews/step_{step:06d}.png", preview(model, denoiser, raw, ema))
                if config.holdout:
                    held = held_out_loss(denoiser, loss_of, unseen)              # by the averaged weights
                    run.log(step, config.steps, show=False, heldout=held)
                    run.say(f"step {step}: loss of {config.holdout} objects kept aside {held:.4f}")
                    if config.patience and held < best["loss"]:
                        best = {"loss": held, "step": step, "ema": {k: p.clone() for k, p in ema.items()}}
                network.load_state_dict(raw)
            tired = config.patience and step - best["step"] >= config.patience * config.preview_every
            if step % config.save_every == 0 or step == config.steps or run.stopping or tired:
                run.save({"config": asdict(config), "step": step, "shape": list(denoiser.shape),
                          "components": components, "planes": model.planes, "autodecoder": fingerprint(model),
                          "denoiser": denoiser.state_dict(), "ema": ema, "best": best,
                          "optimizer": optimizer.state_dict()})
            if tired:
                run.say(f"stopped early: the weights of step {best['step']} are the ones that sample")
                break
            if run.stopping:
                raise UserError(f"stopped by {run.stopping} at step {step}, saved: the same command goes on "
                                "from there")
    plot_log(run.folder, "loss", low="low noise", middle="middle noise", high="high noise",
             heldout="objects kept aside")
    print(f"wrote {run.folder}: last.pt, levels.png, histogram.png, curve.png, previews/. "
          "Next: python sample.py")


def check(config, model, objects):
    if config.denoiser == "unet" and model.planes:
        raise UserError("--denoiser unet wants latent volumes, and this autodecoder's are planes: "
                        "use --denoiser mlp")
    least = 3 + config.holdout
    if objects < least:
        raise UserError(f"{config.autodecoder} knows {objects} objects: at least {least} are wanted")
    if not 0 <= config.mix <= 1 or config.mix and config.mixtures < 1:
        raise UserError(f"--mix {config.mix} of --mixtures {config.mixtures}: a share from 0 to 1 is wanted, "
                        "of at least one mixture")
    if config.patience and not config.holdout:
        raise UserError("--patience watches the loss of objects kept aside: give --holdout too, 8 for one")


def draw_batch(config, objects, generator):
    """-> indices into the data, (batch,): the objects come first, then the mixtures"""
    B = config.batch
    mixture = torch.rand(B, generator=generator) < config.mix
    return torch.where(mixture, objects + torch.randint(max(config.mixtures, 1), (B,), generator=generator),
                       torch.randint(objects, (B,), generator=generator))


@torch.no_grad()
def held_out_loss(denoiser, loss_of, latents):
    """The loss of latents at 32 levels each, always the same noise"""
    z = denoiser.encode(latents).repeat_interleave(32, 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    u = ((torch.arange(32) + 0.5) / 32).repeat(len(latents)).to(z.device)
    parts = zip(z.split(64), noise.split(64), u.split(64))
    return torch.cat([loss_of(denoiser, *part) for part in parts]).mean().item()


if __name__ == "__main__":
    main()

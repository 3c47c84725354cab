"""
Stage 2 of 3: diffuse the latents.  Learn to take noise off the latents z_i = G1(e_i) of stage 1:

    min over D    mean_{i, sigma, n}  weight(sigma) | D(z_i + sigma n, sigma) - z_i |^2,      n ~ N(0, I)

A denoiser D that can do this knows the way to the latents: (D(x, sigma) - x) / sigma^2 is the score, the
direction in which noised latents become more likely (Tweedie's formula).  From pure noise we follow it to a
latent, and G2 makes an object of that.  Four choices are made on this page:

    guess         D(x, sigma) = G1(guess(x, sigma)).  We guess a *code*, and stage 1's frozen G1 makes the
                  latent: then few specks remain.  (In training a matrix stands in for G1)
    recombine     A perfect denoiser of 72 latents returns those 72.  So ours learns from recombined codes:
                  the shape of neighbours, the colours of another object, a little wider or taller
    levels        Up to sigma = 15 a perfect denoiser still recognises the object.  The choice between objects
                  happens at larger sigma, so we place many training levels there.  See levels.png
    components    A latent has 12,800 numbers and varies in some 200 directions: the network sees 240 alone

in   runs/autodecoder/last.pt        stage 1's codes and decoder
out  runs/diffusion/                 last.pt, log.jsonl, previews/, levels.png, curve.png
run  python diffusion.py                        no copies, none of the samples in pieces (rows D23, V11)
     python diffusion.py --mix 0 --out runs/copies    nothing recombined: nearer to the 72 (row D16)
read Config, RobustNorm, Network, MLP, Denoiser, denoising_loss, the two samplers, recombined, main.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (Run, UserError, command, fill, fill_optimizer, judge, load_stage, my_share, parse_config,
                    pick_device, save_figure, save_preview, saved_config, to_bytes, together)
import copy
import math
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from autodecoder import BETAS, CLIP, PALETTE, fingerprint, learning_rate_share, load_autodecoder, plot_log
from volume_render import ANGLES, SIZE, bounding_box, cameras, render_views, voxel_opacity

@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/diffusion"          # folder for the model, the log and the pictures
    # the latents
    mix: float = 1.0                     # share of a batch that is recombined; 0: only objects (from 0 to 1)
    recombinations: int = 4096           # how many there are to learn from (at least 1)
    among: int = 8                       # shapes are mixed within the nearest 8, itself too; 0: any with any
    spread: float = 1.6                  # 1: between the mixed shapes; above: also beyond them (from 0 to 4)
    components: int = 240                # principal components that the network sees (from 1 to 3000)
    # the noise, and the network that removes it
    formulation: str = "edm"             # edm | ddpm: see denoising_loss; ddpm once took 1.6 times the steps
    low: float = 0.1                     # the least sigma, in deviations of the latents (from 0.0001 to 10)
    width: int = 1024                    # hidden units (at least 1)
    layers: int = 3                      # hidden layers (from 0 to 100)
    embedding: int = 64                  # sines and cosines of the noise level (at least 2)
    # training
    steps: int = 5000                    # with more, samples end nearer to what it learns from (at least 1)
    batch: int = 256                     # latents in a step (at least 1)
    lr: float = 1e-3                     # learning rate, at its highest
    lr_floor: float = 0.01               # at the end, as a share of the highest (from 0 to 1)
    ema: float = 0.999                   # decay of the averaged weights, which sample (from 0 to 1)
    seed: int = 0                        # of the weights, the recombinations and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines (at least 1)
    preview_every: int = 1000            # steps between previews (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over

PRESETS = {
    "cpu": {},
    "gpu": dict(steps=20000, batch=1024, preview_every=5000, save_every=2000),
    "smoke": dict(steps=20, batch=16, recombinations=32, components=8, width=32, layers=1, preview_every=10,
                  save_every=10, log_every=5)}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh")    # may change on resume

# -------------------------------------------------------------------------- what the network sees of a latent
class RobustNorm(nn.Module):
    """(latent - centre - median) / (0.7413 x inter-quartile range), per channel  (Ntavelis et al. 2023, 3.4)
    Long tails would inflate a standard deviation; a Gaussian's quartiles are 1 / 0.7413 of it apart.  The
    centre, the mean object, is ours: it is most of every latent."""
    def __init__(self, shape):
        super().__init__()
        self.register_buffer("centre", torch.zeros(shape))
        self.register_buffer("shift", torch.zeros(shape[0], 1, 1, 1))
        self.register_buffer("scale", torch.ones(shape[0], 1, 1, 1))

    def fit(self, latents):                                                                    # (N,C,r,r,r)
        self.centre.copy_(latents.mean(0))
        values = (latents - self.centre).transpose(0, 1).flatten(1).sort(1).values             # (C,N r^3)
        at = lambda share: values[:, round(share * (values.shape[1] - 1)), None, None, None]
        self.shift.copy_(at(0.5))
        self.scale.copy_((0.7413 * (at(0.75) - at(0.25))).clamp(min=1e-6))

    def normalize(self, latents):
        return (latents - self.centre - self.shift) / self.scale

    def undo(self, normalized):
        return normalized * self.scale + self.shift + self.centre

def principal(rows, count):
    """rows (P,D) -> (count,D): orthonormal, the directions in which the rows are longest"""
    rows = rows.double()
    longest = torch.linalg.eigh(rows @ rows.T)[1][:, -count:].flip(1)     # (P,count); usually P < D, so P x P
    return torch.linalg.qr(rows.T @ longest)[0].T.float()                                  # each of length 1

class Network(nn.Module):
    """Two MLPs, because nine numbers of a palette would be learned late among hundreds of others"""
    def __init__(self, seen, told, said, config):
        super().__init__()
        self.shape = MLP(seen + told, said - PALETTE, config)
        self.palette = MLP(PALETTE + told, PALETTE, replace(config, width=max(config.width // 4, 1)))

    def forward(self, x, palette, level, *told):
        return torch.cat([self.shape(x, level, *told), self.palette(palette, level, *told)], 1)

class MLP(nn.Module):
    """The paper's network: noised numbers and an embedding of the noise level in, numbers out."""
    def __init__(self, seen, said, config):
        super().__init__()
        width, self.half = config.width, config.embedding // 2
        self.enter = nn.Linear(seen + 2 * self.half, width)
        layer = lambda outer: nn.Sequential(nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, outer))
        self.hidden = nn.ModuleList([layer(width) for _ in range(config.layers)])
        self.leave = layer(said)
        # The last layer starts at zero.  The network then outputs 0, and the guess is the linear one alone
        for weights in self.leave[-1].parameters():
            nn.init.zeros_(weights)

    def forward(self, x, level, *told):
        """x (B,K), level (B,) = log(sigma) / 4 as in EDM, and what a chapter adds -> (B,W)"""
        h = self.enter(torch.cat([x, level_embedding(level, self.half), *told], 1))
        for layer in self.hidden:
            h = h + layer(h)
        return self.leave(h)

def level_embedding(level, half):
    """(B,) -> (B,2 half): sines and cosines, with wavelengths from 2 pi / 100 to 2 pi, geometrically"""
    angle = level[:, None] * 100.0 ** torch.linspace(1, 0, half, device=level.device)
    return torch.cat([angle.sin(), angle.cos()], 1)

class Denoiser(nn.Module):
    """D(x, sigma), and what it must know: how latents are normalised, their principal components and the
    deviation in each, the codes' mean and deviation, matrices between both spaces, the noise levels."""
    def __init__(self, config, model):
        super().__init__()
        shape = (model.config.latent_channels, *[model.config.latent_resolution] * 3)
        K, W = min(config.components, math.prod(shape)), model.codes.shape[1]
        self.config, self.model = config, (model,)           # in a tuple: its weights are not this module's
        self.norm, self.network = RobustNorm(shape), Network(K, 0, W, config)
        for name, size in dict(basis=(K, math.prod(shape)), deviation=(K,), to_code=(K, W), from_code=(W, K),
                               to_palette=(K, PALETTE), code_mean=(W,), code_deviation=(W,),
                               levels=(LEVELS,)).items():
            self.register_buffer(name, torch.ones(size))

    def fit(self, codes, own, generator):
        """All but the network's weights, from the codes to learn from (P,W) and the objects' own (N,W) ->
        components (P,K); and to plot, sigmas and entropies"""
        # Normalise by the objects alone; find the directions in which the latents to learn from vary most
        latents = latents_of(self.model[0], own)
        self.norm.fit(latents)
        rows = self.norm.normalize(latents_of(self.model[0], codes)).flatten(1)              # (P,D)
        self.basis.copy_(principal(rows[:3000], len(self.basis)))              # (more rows would take long)
        # EDM's sigma_data is one number, 0.5.  Ours is measured in each component: the first vary the most
        z = rows @ self.basis.T                                                              # (P,K)
        self.deviation.copy_(z.square().mean(0).sqrt().clamp(min=1e-3))
        # Least-squares matrices: components to codes, and back.  The second stands in for G1 in the loss: it
        # explains 96 % of the variance of G1's latents, in a thousandth of the time
        self.code_mean.copy_(codes.mean(0))
        self.code_deviation.copy_(codes.std(0, correction=0) + 1e-6)
        plain = (codes - self.code_mean) / self.code_deviation
        # gelsd leaves out directions in which the rows hardly vary.  torch has it on the CPU alone
        fit = lambda a, b: torch.linalg.lstsq(a.cpu(), b.cpu(), rcond=1e-4, driver="gelsd").solution
        self.to_code.copy_(fit(z, plain))
        self.from_code.copy_(fit(plain, z))
        # The last nine rows turn a palette into components.  The pseudo-inverse reads it back from components
        self.to_palette.copy_(torch.linalg.pinv(self.from_code[-PALETTE:]))
        # The levels depend on how far apart the objects are
        least = self.config.low * self.norm.normalize(latents).square().mean().sqrt().item()
        levels, sigma, entropy = choose_levels(self.to_components(latents), least, generator)
        self.levels.copy_(levels)
        return z, sigma, entropy

    def examples(self, codes):
        return self.to_components(latents_of(self.model[0], codes))            # what is noised in training

    def to_components(self, latents):
        return self.norm.normalize(latents).flatten(1) @ self.basis.T                        # (B,K)

    def sigma_at(self, u):
        return self.levels[(u * (LEVELS - 1)).round().long()]              # places in [0, 1] -> noise levels

    def guess(self, x, sigma, *told):
        """x = z + sigma n (B,K), sigma (B,1) -> the code that it can have come from (B,W)"""
        # Where noise is larger than a component's deviation, the component is shrunk towards 0.  What is left
        # gives a linear guess.  The network sees it too, divided by the deviations, and learns the rest
        clean = self.deviation ** 2 / (sigma ** 2 + self.deviation ** 2) * x
        # It also sees the palette in x, whose own deviation is 1, and whose noise is sigma times a length
        palette = x @ self.to_palette / (1 + (sigma * self.to_palette.norm(dim=0)) ** 2).sqrt()
        learned = self.network(clean / self.deviation, palette, sigma.flatten().log() / 4, *told)
        return self.code_mean + self.code_deviation * (clean @ self.to_code + learned)

    def told(self, item, generator):
        return ()                                  # what else the network is told: see chapters/prompt.py

    def error(self, guess, codes, z):
        """D - z (B,K), nearly: from codes (B,W) by the matrix, not by G1.  (z is for chapters/unet.py)"""
        return (guess - codes) / self.code_deviation @ self.from_code

    def denoise(self, x, sigma):
        return self.to_components(self.latents(self.guess(x, sigma)))                        # D(x, sigma)

    def latents(self, codes):
        return latents_of(self.model[0], codes)

def load_denoiser(folder, device="cpu", autodecoder="", Config=Config, Denoiser=Denoiser):
    """A run -> the autodecoder that it was trained on (or a copy of it), its objects' names, the denoiser"""
    state = load_stage(folder, "stage 2's denoiser", "diffusion.py", "denoiser", "autodecoder")
    config = saved_config(Config, state, folder)
    model, names = load_autodecoder(first := autodecoder or config.autodecoder, device)
    # A latent means nothing to another decoder, so both halves must be of one training
    if fingerprint(model) != state["autodecoder"]:
        raise UserError(f"{folder} was trained on another autodecoder than {first} is now: train it again, "
                        f"by its script with --autodecoder {first} --out {folder} --fresh")
    with torch.device("meta"):                      # shapes alone: `fill` compares them first
        denoiser = Denoiser(config, model)
    return model, names, fill(denoiser, state["denoiser"], folder).to(device).eval().requires_grad_(False)

# ------------------------------------------------------------------------------------------- the noise levels
LEVELS = 1000                      # DDPM's number of time steps: here the length of the table of levels

def posterior_entropy(points, sigmas, generator, draws=2048):
    """points (N,K) -> for each sigma, a perfect denoiser's doubt which point it sees: the mean entropy,
    from 0 to 1, of p(i | x) ~ exp(-|x - z_i|^2 / 2 sigma^2)"""
    points = points.double().cpu()
    truth = points[torch.arange(draws) % len(points)]
    noise, result = torch.randn(truth.shape, generator=generator, dtype=torch.float64), []
    for sigma in sigmas:
        distance = torch.cdist(truth + sigma * noise, points).square()                     # (draws,N)
        log_p = torch.log_softmax(-distance / (2 * sigma ** 2), -1)
        result.append(-(log_p.exp() * log_p).sum(-1).mean() / math.log(len(points)))
    return torch.stack(result)

def choose_levels(points, least, generator):
    """points (N,K) -> levels (LEVELS,), ascending, to train and sample at; to plot, sigmas and entropies"""
    # At four times the largest deviation noise hides nearly everything: there sampling starts
    widest = torch.linalg.matrix_norm(points.double(), 2).item() / math.sqrt(len(points))
    sigma = torch.linspace(math.log(least), math.log(4 * widest), 32, dtype=torch.float64).exp()
    entropy = posterior_entropy(points, sigma, generator)
    # Half of the levels go where the entropy rises: there a sample becomes this object or that one.  The rest
    # is spread evenly over log sigma, because all the noise must be removed in the end
    rise = entropy.diff().clamp(min=0)
    share = rise / rise.sum().clamp(min=1e-9) + 1 / len(rise)                      # of levels between sigmas
    cdf = F.pad((share / share.sum()).cumsum(0), (1, 0))                           # (32,) from 0 to 1
    # Invert it: at which sigma is 0, 1/999, 2/999, ... of the cumulative share reached?
    return torch.from_numpy(np.exp(np.interp(np.linspace(0, 1, LEVELS), cdf, sigma.log()))), sigma, entropy

def plot_levels(denoiser, sigma, entropy, path):
    count, edges = torch.histogram(denoiser.levels.cpu().log(), 40)
    axis = Figure(figsize=(7, 3.6), layout="constrained").subplots()
    axis.plot(sigma, entropy)
    axis.fill_between(edges.exp()[:-1], count / count.max(), step="post", alpha=0.2)
    axis.set(xscale="log", xlabel="sigma", ylabel="a perfect denoiser's doubt (shaded: levels)")
    save_figure(path, axis.figure)

# ---------------------------------------------------------------------------- one noise, and two formulations
def denoising_loss(denoiser, z, codes, noise, u, *told):
    """Components z and noise (B,K), the codes they come from (B,W), places u (B,) in [0, 1] of levels -> (B,)

    DDPM (Ho et al. 2020; a: their alpha-bar) has x' = sqrt(a) z + sqrt(1 - a) n and predicts n.  Divide x' by
    sqrt(a): it is our x = z + sigma n with sigma^2 = (1 - a) / a.  Predicting n is predicting z, because
    n = (x - z) / sigma.  So one denoiser serves both formulations.  Two things differ:

                 weight of |D - z|^2                                  which sampler
        DDPM     1 / sigma^2, from the error in n                     ancestral: noise at each step
        EDM      here 1 / (sigma^2 + a tenth of the variance of z):   Heun: noise only at first
                 theirs, 1 / sigma^2 + 1 / variance, gives the low levels more"""
    # Both count components by their deviation.  Alike, small ones would drown shapes; by variance, not count
    sigma, weight = denoiser.sigma_at(u)[:, None], denoiser.deviation / denoiser.deviation.mean()
    error = denoiser.error(denoiser.guess(z + sigma * noise, sigma, *told), codes, z)
    floor = 0 if denoiser.config.formulation == "ddpm" else 0.1 * denoiser.deviation ** 2
    return (weight * error.square() / (sigma ** 2 + floor)).mean(1)

def ancestral_sample(denoiser, x, sigmas, draw):
    """DDPM's (Ho et al., algorithm 2) -> x at the next level, step by step"""
    for now, after in zip(sigmas, sigmas[1:]):
        clean = denoiser.denoise(x, now.expand(len(x), 1))
        # If z = clean, x at the next level has this mean and deviation (equations 6, 7)
        kept = (after / now) ** 2
        x = clean + kept * (x - clean) + after * (1 - kept).sqrt() * draw()
        yield x

def heun_sample(denoiser, x, sigmas, draw):
    """EDM's (Karras et al., algorithm 1): down dx/dsigma = (x - D(x, sigma)) / sigma -> the same"""
    slope_at = lambda x, sigma: (x - denoiser.denoise(x, sigma.expand(len(x), 1))) / sigma
    for now, after in zip(sigmas, sigmas[1:]):
        slope = slope_at(x, now)
        # Heun's method: a step along the slope here, then again along the mean of the slopes at both its ends
        ahead = x + (after - now) * slope
        x = x + (after - now) * (slope + slope_at(ahead, after)) / 2
        yield x

SAMPLERS = {"heun": (heun_sample, 18), "ancestral": (ancestral_sample, LEVELS)}      # and their usual steps

def noise_of(seed):                            # a function that draws a sample's noise, by its own generator
    generator = torch.Generator().manual_seed(int(seed))
    return lambda shape: torch.randn(shape, generator=generator)

@torch.no_grad()
def sample(denoiser, seeds, steps=0, sampler="", trace=None):
    """One code for each seed, the same in any batch -> (B,W); `denoiser.latents` makes latents of them.  A
    seed may also be a function that draws noise.  A list `trace` gets (sigma, codes guessed) at each step"""
    walk, usual = SAMPLERS[sampler or ("heun" if denoiser.config.formulation == "edm" else "ancestral")]
    draws = [seed if callable(seed) else noise_of(seed) for seed in seeds]
    draw = lambda: torch.stack([one(denoiser.deviation.shape) for one in draws]).to(denoiser.levels)
    # From the highest level down.  There x is nearly all noise, so it begins as noise of x's own deviation
    sigmas = denoiser.sigma_at(torch.linspace(1, 0, steps or usual).to(denoiser.levels))
    x = draw() * (sigmas[0] ** 2 + denoiser.deviation ** 2).sqrt()
    path = [x, *walk(denoiser, x, sigmas, draw)]                                       # x at each level
    guess = lambda sigma, x: denoiser.guess(x, sigma.expand(len(x), 1))
    if trace is not None:
        trace += zip(sigmas.tolist(), map(guess, sigmas, path))
    return guess(sigmas[-1], path[-1])                         # at the lowest level the guess is the sample

# ----------------------------------------------------------------------------------------------- the latents
@torch.no_grad()
def latents_of(model, codes):
    return torch.cat([model.to_latent(part).float() for part in codes.split(64)])

def draw_parents(model, count, generator, config):
    """-> whose shapes are to be mixed (count,3), their weights (count,3), and whose colours (count,)"""
    shapes, N = model.shapes, len(model.shapes)
    # An object's shape is mixed with two shapes near it, or one.  Far ones are not mixed, because nothing is
    # half-way between a bud and a headphone
    first = torch.randint(N, (count, 1), generator=generator)
    others = torch.randint(min(config.among or N, N), (count, 2), generator=generator)
    others = torch.cdist(shapes, shapes).argsort(1).cpu()[first, others]           # the nearest is itself
    share = -torch.rand(count, 3, generator=generator).clamp(min=1e-9).log()    # over their sum: any mixture
    share[::2, 2] = 0
    share = share / share.sum(1, keepdim=True)
    # A mean lies between its parts, so mixtures vary less than objects do.  Weights that are further from
    # equal, some of them below 0, bring the variety back
    equal = (share > 0).float() / (share > 0).sum(1, keepdim=True)
    share = equal + config.spread * (share - equal)
    whose = torch.randint(N, (count,), generator=generator) if model.config.recolour else first[:, 0]
    return torch.cat([first, others], 1), share, whose

@torch.no_grad()
def recombined(model, count, generator, config):
    """Codes of objects that could exist (count,W): a shape near those of neighbours, the colours of any
    object, and a stretch"""
    shapes = model.shapes
    parents, share, whose = (some.to(shapes.device) for some in draw_parents(model, count, generator, config))
    shape = (share[..., None] * shapes[parents]).sum(1)
    # Stretches, in units of stage 1's --stretch.  All three are shifted, so that the box's diagonal is as
    # long as training objects' mean one (256 are enough)
    stretch = (2 * torch.rand(count, 3, generator=generator) - 1).to(shapes.device)
    codes = torch.cat([stretch, shape, model.palettes[whose]], 1)
    longer = (diagonals(model, codes) / diagonals(model, model.codes[:256]).mean()).log().clamp(-0.5, 0.5)
    codes[:, :3] = (stretch - longer[:, None] / model.config.stretch) * (model.config.stretched > 0)
    return codes

def diagonals(model, codes):
    """(B,W) -> (B,): the length of each object's bounding box, corner to corner"""
    solid = lambda some: voxel_opacity(model.volumes_of(some), model.field) > 0.5
    return torch.cat([bounding_box(solid(some)) for some in codes.split(8)]).norm(dim=1)

def nearest(latents, training, itself=False):
    """-> distances to the training latents, nearest first (B,N), and whose they are (B,N)"""
    # (The faster formula subtracts large squares, and so loses the digits of small distances)
    distance = torch.cdist(latents.flatten(1), training.flatten(1), 2, "donot_use_mm_for_euclid_dist")
    return (distance.fill_diagonal_(math.inf) if itself else distance).sort(1)   # itself: each to the others

# ------------------------------------------------------------------------------------------------------ main
def main(argv=None, Config=Config, presets=PRESETS, Denoiser=Denoiser, free=FREE):
    """A chapter may train a denoiser of its own by this loop, with a Config that adds knobs to this one."""
    config = parse_config(Config, presets, argv)
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    if len(names) < 3:
        raise UserError(f"{config.autodecoder} knows {len(names)} objects: at least 3 are wanted")
    my_share(config.batch)                                          # can the processes share it equally?
    run = Run(config.out, Denoiser.__name__, config, [f.name for f in fields(Config) if f.name not in free])

    # What to learn from: the objects' codes, then recombined ones
    generator = torch.Generator().manual_seed(config.seed)
    own, count = model.codes, config.recombinations
    codes = torch.cat([own, recombined(model, count, generator, config)])
    config.components = min(config.components, len(codes))             # N codes vary in at most N directions

    # The denoiser, and a second network whose weights are the running mean of the first's: it will sample
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config, model).to(device)
    data, sigma, entropy = denoiser.fit(codes, own, generator)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.network.parameters(), betas=BETAS)
    state, step = run.load("autodecoder", "denoiser", "raw", "optimizer", "step"), 0
    if state:
        if state["autodecoder"] != fingerprint(model):
            raise UserError(f"{config.out} was trained on another autodecoder than {config.autodecoder} is: "
                            "start over with --fresh, or use another --out")
        # Only the network's weights differ from the average's: `raw` holds those that are trained
        fill(average, state["denoiser"], config.out)
        fill(denoiser, state["denoiser"] | state["raw"], config.out)
        fill_optimizer(optimizer, state["optimizer"], config.out)
        step, data = state["step"], denoiser.examples(codes)                  # in the saved basis
        print(f"going on from step {step} of {config.out}/last.pt")
    print(f"{len(own)} objects and {count} recombinations; noise from {denoiser.levels[0]:.2g} to "
          f"{denoiser.levels[-1]:.3g}; {sum(p.numel() for p in denoiser.network.parameters())} parameters")

    with run:
        if run.first_process:
            plot_levels(denoiser, sigma, entropy, run.folder / "levels.png")
        while step < config.steps:
            # Schedule
            share = learning_rate_share(step, config.steps, config.lr_floor)
            optimizer.param_groups[0]["lr"] = config.lr * share

            # Batch: objects or recombinations, each with a level of its own, spread evenly over low and high
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            is_new = torch.rand(config.batch, generator=generator) < config.mix
            new = len(own) + torch.randint(count, (config.batch,), generator=generator)
            old = torch.randint(len(own), (config.batch,), generator=generator)
            item = torch.where(is_new, new, old).to(device)
            u = (torch.arange(config.batch) + torch.rand(config.batch, generator=generator)) / config.batch
            noise = torch.randn(config.batch, data.shape[1], generator=generator).to(device)

            # Loss.  Several processes (torchrun) share the batch
            told, mine = denoiser.told(item, generator), my_share(config.batch)
            item, noise, u, *told = [some[mine] for some in (item, noise, u.to(device), *told)]
            losses = denoising_loss(denoiser, data[item], codes[item], noise, u, *told)
            loss = losses.mean()

            # Step, and the running mean: short at first, because the first weights are worth little
            optimizer.zero_grad()
            loss.backward()
            for p in denoiser.network.parameters():
                together(p.grad)
            norm = nn.utils.clip_grad_norm_(denoiser.network.parameters(), CLIP)
            if run.finite(step, loss.item() + norm.item()):
                optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))
                for mean, p in zip(average.network.parameters(), denoiser.network.parameters()):
                    mean.lerp_(p.detach(), 1 - decay)
            step += 1

            # Log, preview, save
            if step % config.log_every == 0 or step == config.steps:
                parts = [part.mean() for part in (losses, *losses.tensor_split(3))]   # u ascends: low first
                loss, low, middle, high = together(torch.stack(parts).detach()).tolist()
                run.log(step, config.steps, loss=loss, low=low, middle=middle, high=high)
            if run.first_process and (step % config.preview_every == 0 or step == config.steps):
                latents = average.latents(sample(average, range(8), 18))           # 18 steps: only a preview
                rgb = render_views(model, latents, cameras(ANGLES[:2]), SIZE)[0]
                save_preview(run.folder / f"previews/step_{step:06d}.png", to_bytes(rgb.transpose(0, 1)))
            if step % config.save_every == 0 or step == config.steps or run.stopping:
                run.save({"config": asdict(config), "step": step, "autodecoder": fingerprint(model),
                          "denoiser": average.state_dict(), "optimizer": optimizer.state_dict(),
                          "raw": denoiser.network.state_dict(prefix="network.")})
            run.stop_if_asked(step)

    if not run.first_process:
        return
    near = nearest(average.latents(sample(average, range(8))), latents_of(model, own))[0][:, 0].mean().item()
    print(judge(config, free, f"eight samples' mean distance to the nearest training latent {near:.0f}", near,
                95, 140, "README.md"))
    plot_log(run.folder, "loss", low="low noise", middle="middle noise", high="high noise")
    print(f"wrote {run.folder}: last.pt, levels.png, curve.png, previews/.  Next: python sample.py")

if __name__ == "__main__":
    command(main)

"""
Of stage 2: which noise to train on, and how to come back from it.  Two formulations, function by function:
EDM (Karras et al. 2022), 3DADM's, and DDPM (Ho et al. 2020), the paper's.

    EDM     x = z + sigma n                                 walk down dx/dsigma = (x - D(x, sigma)) / sigma
    DDPM    x = sqrt(alpha_bar) z + sqrt(1 - alpha_bar) n   walk back t by t, with new noise at each

Divided by sqrt(alpha_bar) the second is the first with sigma^2 = (1 - alpha_bar) / alpha_bar.

read choose_levels, precondition, edm_loss, edm_sample; then the DDPM functions beside them.
"""
import math

import torch
import torch.nn.functional as F

TIMES = 1000                       # DDPM's steps


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

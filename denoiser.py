"""
Of stage 2: the denoiser.  What it works on (latents, normalised, in principal components), and the network
within: the paper's MLP, or 3DADM's 3D U-Net.

    latent (16 x 8^3) --normalize--> --basis--> z (240) --noise.py: x = z + sigma n--> network --> z again

read RobustNorm, MLP, UNet, Denoiser, sample.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import widths_of
from decoder import Attention
from noise import TIMES, choose_levels, ddpm_sample, ddpm_schedule, edm_sample


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
        widths, e = widths_of(config.channels), 4 * config.embedding
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

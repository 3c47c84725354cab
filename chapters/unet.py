"""
A chapter on stage 2: 3DADM's denoiser, a 3D U-Net, in place of the paper's MLP.

    noised latent (25 x 8^3) --down--> coarse levels, where every voxel can ask every other --up--> latent

The MLP needs principal components, because its hidden units are fewer than a latent's 12,800 numbers.  A
convolutional network has no such bottleneck: it can output noise in all of them, and works on the latent as
it is.  It also knows what the MLP must learn: neighbours in a latent belong together.  Its price is time.
After 4,000 steps of 16 latents colours still bleed a little, and there are specks beside some objects.

in   runs/autodecoder/last.pt
out  runs/unet/                  as stage 2; and latents.pt, samples.png
run  python -m chapters.unet                                     one core: 19 min (row D18)
     python -m chapters.unet --mix 0 --out runs/unet_plain       nothing recombined
read UNet, LatentDenoiser, main.
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffusion
from chapters.families import finish, with_box
from chapters.hybrid import Attention
from common import UserError, command
from diffusion import Denoiser, latents_of, level_embedding


@dataclass
class Config(diffusion.Config):
    out: str = "runs/unet"               # folder for the model, the log and the pictures
    mix: float = 0.5                     # share of a batch that is recombined; 0: none (from 0 to 1)
    steps: int = 4000                    # gradient steps (at least 1)
    batch: int = 16                      # latents in a step (at least 1)
    levels: tuple = (48, 96)             # channels of the levels; each halves the resolution (at least 1)
    count: int = 64                      # samples drawn at the end (at least 1)


PRESETS = {"cpu": {}, "gpu": dict(levels=(128, 384), batch=64, steps=50000, lr=4.5e-4, save_every=2000),
           "smoke": dict(steps=20, batch=4, recombinations=32, embedding=8, levels=(8, 8), preview_every=10,
                         save_every=10, log_every=5, count=2)}


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


def begin_at_zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class UNet(nn.Module):
    """Down to coarse levels, attention, and up again; each level up also sees its level down."""

    def __init__(self, channels, config):
        super().__init__()
        widths, self.half = config.levels, config.embedding // 2
        e = 8 * self.half
        self.level = nn.Sequential(nn.Linear(2 * self.half, e), nn.SiLU(), nn.Linear(e, e), nn.SiLU())
        self.enter = nn.Conv3d(channels, widths[0], 3, padding=1)
        inner = [widths[0], *widths]
        self.down = nn.ModuleList([Residual(inner[k], width, e) for k, width in enumerate(widths)])
        self.middle, self.attention = Residual(widths[-1], widths[-1], e), Attention(widths[-1])
        self.up = nn.ModuleList([Residual(widths[min(k + 1, len(widths) - 1)] + width, width, e)
                                 for k, width in enumerate(widths)])
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[0]), nn.SiLU(),
                                   nn.Conv3d(widths[0], channels, 3, padding=1))
        begin_at_zero(self.leave[-1])

    def forward(self, x, level):
        """x (B,C,r,r,r), level (B,) -> (B,C,r,r,r)"""
        level = self.level(level_embedding(level, self.half))
        h, kept = self.enter(x.contiguous(memory_format=torch.channels_last_3d)), []
        for k, block in enumerate(self.down):
            h = block(F.avg_pool3d(h, 2) if k else h, level)
            kept.append(h)
        h = self.attention(self.middle(h, level))
        for k in reversed(range(len(self.up))):
            h = self.up[k](torch.cat([h, kept[k]], 1), level)
            h = F.interpolate(h, scale_factor=2) if k else h
        return self.leave(h)


class LatentDenoiser(Denoiser):
    """Stage 2's, on the normalised latent itself: no principal components, one deviation for all numbers, and
    the network guesses the latent, not its code."""

    def __init__(self, config, model):
        if model.config.latent_resolution % 2 ** (len(config.levels) - 1):
            raise UserError(f"--levels: {len(config.levels)} levels halve a latent of "
                            f"{model.config.latent_resolution} cells a side too often")
        config.components = 1                                  # a basis that is not used
        super().__init__(config, model)
        self.deviation = torch.ones(self.norm.centre.numel())
        self.network = UNet(len(self.norm.centre), config)

    def fit(self, codes, own, generator):
        latents = latents_of(self.model[0], own)
        self.norm.fit(latents)
        rms = self.norm.normalize(latents).square().mean().sqrt()
        self.deviation.fill_(rms.item())
        least = self.config.low * rms.item()
        points = self.to_components(latents)
        points = points @ diffusion.principal(points, len(points)).T          # as far apart, in fewer numbers
        levels, sigma, entropy = diffusion.choose_levels(points, least, generator)
        self.levels.copy_(levels)
        return self.to_components(latents_of(self.model[0], codes)), sigma, entropy

    def to_components(self, latents):
        return self.norm.normalize(latents).flatten(1)                                       # (B,C r^3)

    def latents(self, z):
        return self.norm.undo(z.view(len(z), *self.norm.centre.shape))

    def denoise(self, x, sigma):
        """x = z + sigma n (B,C r^3), sigma (B,1) -> the latent that it can have come from (B,C r^3)

        Preconditioning (Karras et al. 2022, table 1): the network's input and its target have unit variance
        at every sigma.  c_skip x is already the best *linear* denoiser; the network learns the rest."""
        total = (sigma ** 2 + self.deviation ** 2).sqrt()
        c_skip, c_out, c_in = self.deviation ** 2 / total ** 2, sigma * self.deviation / total, 1 / total
        seen = (c_in * x).view(len(x), *self.norm.centre.shape)
        return c_skip * x + c_out * self.network(seen, sigma.flatten().log() / 4).flatten(1)

    guess = denoise                                       # a sample is a latent, where stage 2 has a code

    def error(self, guess, codes, z):
        return guess - z


def main(argv=None):
    argv = with_box(argv, Config)
    diffusion.main(argv, Config, PRESETS, LatentDenoiser, (*diffusion.FREE, "count"))
    rows = finish(argv, Config, PRESETS, LatentDenoiser)
    outside = torch.tensor([row["outside"] for row in rows]).quantile(0.95)
    print(f"wrote latents.pt, samples.png, report.txt.  Outside the span, 95th percentile: {outside:.2f} "
          "(row D18: 0.36; lower is better)")


if __name__ == "__main__":
    command(main)

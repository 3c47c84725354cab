"""
A chapter on stage 2: GAUDI's way (Bautista et al. 2022).  Diffuse the codes themselves, not the latents:

    stage 2      x = G1(code) + sigma n     12,800 numbers are noised; the network guesses the code under them
    here         x = code + sigma n         140 numbers are noised; the same network guesses the code

GAUDI learns one code for each scene, without an encoder, and then the distribution of the codes.  It is stage
1 and this chapter.  What does the latent buy?  Two codes that differ much may decode to nearly the same
latent, and the other way round.  Noise on a latent hides small parts first and large parts last, because it
is noise on something that looks like the object.  Noise on a code hides all of its numbers alike.  Codes are
cheap: sampling does not run through G1 at each step, and no principal components are needed.

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/gaudi/                     as stage 2; and latents.pt, samples.png
run  python -m chapters.gaudi                            two CPU cores: 4 min 28 s (row L2)
     python -m lab.evaluate --rows runs/gaudi           in the lab's table, beside stage 2
read CodeDenoiser, main.
"""
from dataclasses import dataclass

import torch

import diffusion
from chapters.families import finish, with_box
from common import command
from diffusion import Denoiser


@dataclass
class Config(diffusion.Config):
    out: str = "runs/gaudi"              # folder for the model, the log and the pictures
    components: int = 3000               # not used: a code is seen whole (from 1 to 3000)
    count: int = 192                     # samples drawn at the end (at least 1)


PRESETS = {**diffusion.PRESETS, "smoke": dict(diffusion.PRESETS["smoke"], count=2)}


class CodeDenoiser(Denoiser):
    """Stage 2's, with codes in the place of the latents' components"""

    def __init__(self, config, model):
        config.components = model.codes.shape[1]
        super().__init__(config, model)

    def fit(self, codes, own, generator):
        # Each number of a code counts in its own deviations.  The matrices between both spaces are then 1
        self.code_mean.copy_(codes.mean(0))
        self.code_deviation.copy_(codes.std(0, correction=0) + 1e-6)
        self.to_code.copy_(torch.eye(len(self.code_mean)))
        self.from_code.copy_(torch.eye(len(self.code_mean)))
        self.to_palette.copy_(self.to_code[:, -self.to_palette.shape[1]:])
        z = self.examples(codes)
        points = self.to_components(own)
        levels, sigma, entropy = diffusion.choose_levels(points, self.config.low, generator)
        self.levels.copy_(levels)
        return z, sigma, entropy

    def examples(self, codes):
        return self.to_components(codes)

    def to_components(self, codes):
        return (codes - self.code_mean) / self.code_deviation

    def denoise(self, x, sigma):
        return self.to_components(self.guess(x, sigma))


def main(argv=None):
    argv = with_box(argv, Config)
    diffusion.main(argv, Config, PRESETS, CodeDenoiser, (*diffusion.FREE, "count"))
    rows = finish(argv, Config, PRESETS, CodeDenoiser)
    d1 = sum(row["distances"][0] for row in rows) / len(rows)
    print(f"wrote latents.pt, samples.png, report.txt.  Mean distance to the nearest latent: {d1:.0f}"
          " (row L2: 164, with the latents of A5)")


if __name__ == "__main__":
    command(main)

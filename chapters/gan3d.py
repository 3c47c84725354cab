"""
A chapter on stage 2: a GAN (3D-GAN, Wu et al. 2016) on the same latents, in the place of diffusion.

    min over G, max over D    mean log s(D(real)) + mean log(1 - s(D(G(noise)))),      s the sigmoid

G turns 64 random numbers into a latent by convolutions that double the side: 2, 4, 8 cells.  D looks at a
latent and says real or not.  G learns from D's gradient alone.  It never sees a real latent.  A sample takes
one pass through G, where stage 2 asks its network 35 times.

What goes wrong is that nothing asks G for all objects.  It may make a few that D believes, whatever the
noise: *mode collapse*.  It is counted here, as training goes: of 192 samples, how many different training
objects are the nearest one of some sample?  (`named`, in log.jsonl.)  The cure shown is R1 (Mescheder et al.
2018): D pays for the square of its gradient at real latents, so that it stays smooth and its advice useful.
`--r1 0` is a GAN without any cure (3D-GAN pauses a D that wins too often).  Both learn from what stage 2
learns from, recombined codes.

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/gan3d/                     last.pt, log.jsonl, curve.png, previews/, latents.pt, samples.png, report
run  python -m chapters.gan3d                                    two CPU cores: 13 min (row L2)
     python -m chapters.gan3d --r1 0 --out runs/gan3d_plain      without the cure
     python -m lab.evaluate --rows runs/gan3d runs/gan3d_plain   in the lab's table
read Generator, Discriminator, r1_penalty, main.
"""
import copy
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import diffusion
from autodecoder import load_autodecoder, plot_log
from chapters.families import follow, record, resume, to_learn, with_box, write_samples
from common import Run, UserError, command, parse_config, pick_device, save_preview, to_bytes
from diffusion import latents_of, nearest, noise_of
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/gan3d"              # folder for the model, the log and the samples
    recombinations: int = 4096           # codes to learn from (at least 1)
    noise: int = 64                      # random numbers for each sample (at least 1)
    widths: tuple = (128, 64, 32)        # channels of both networks, coarse to fine (at least 1)
    r1: float = 100.0                    # weight of the squared gradient at real latents; 0: the plain GAN
    steps: int = 3000                    # steps of both networks (at least 1)
    batch: int = 32                      # latents in a step (at least 2)
    lr: float = 1e-3                     # learning rate of both
    ema: float = 0.998                   # decay of the averaged generator, which samples (from 0 to 1)
    count: int = 192                     # samples drawn at the end (at least 2)
    seed: int = 0                        # of the weights and the batches
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    preview_every: int = 500             # steps between previews and counts (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(widths=(256, 128, 64), steps=20000),
           "smoke": dict(recombinations=32, widths=(8, 8, 8), steps=8, batch=4, count=4, preview_every=4,
                         save_every=4, log_every=2)}
FREE = (*diffusion.FREE, "count")


class Generator(nn.Module):
    """Numbers (B,K) -> latents (B,C,r,r,r): 2^3 cells, doubled until they are r^3"""

    def __init__(self, config, channels, side):
        super().__init__()
        first, *_ = widths = config.widths
        self.shape = first, *[side // 2 ** (len(widths) - 1)] * 3
        self.enter = nn.Linear(config.noise, torch.Size(self.shape).numel())
        level = lambda a, b: nn.Sequential(nn.GroupNorm(1, a), nn.SiLU(), nn.Conv3d(a, b, 3, padding=1))
        self.levels = nn.ModuleList([level(a, b) for a, b in zip(widths, (*widths[1:], widths[-1]))])
        self.leave = nn.Sequential(nn.SiLU(), nn.Conv3d(widths[-1], channels, 3, padding=1))

    def forward(self, noise):
        x = self.enter(noise).view(-1, *self.shape)
        for k, level in enumerate(self.levels):
            x = level(F.interpolate(x, scale_factor=2, mode="trilinear") if k else x)
        return self.leave(x)


class Discriminator(nn.Module):
    """Latents (B,C,r,r,r) -> (B,): above 0 for those that it takes for real"""

    def __init__(self, config, channels, side):
        super().__init__()
        widths = config.widths[::-1]
        self.levels = nn.Sequential(nn.Conv3d(channels, widths[0], 3, padding=1), nn.LeakyReLU(0.2), *[
            layer for a, b in zip(widths, (*widths[1:], widths[-1]))
            for layer in (nn.Conv3d(a, b, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool3d(2))][:-1])
        self.leave = nn.Linear(widths[-1] * (side // 2 ** (len(widths) - 1)) ** 3, 1)

    def forward(self, latents):
        return self.leave(self.levels(latents).flatten(1))[:, 0]


def r1_penalty(discriminator, real):
    """-> D(real), and the mean squared length of its gradient there"""
    real = real.detach().requires_grad_(True)
    said = discriminator(real)
    gradient, = torch.autograd.grad(said.sum(), real, create_graph=True)
    return said, gradient.square().flatten(1).sum(1).mean()


def compete(run, step, optimizers, critic_loss, maker_loss):
    """A step of the critic, then one of the maker -> the loss of the maker.  That is a function: the critic
    moves first"""
    optimizers[1].zero_grad()
    critic_loss.backward()
    if critic_loss.isfinite():
        optimizers[1].step()
    loss = maker_loss()
    optimizers[0].zero_grad()
    loss.backward()
    if run.finite(step, critic_loss.item() + loss.item()):
        optimizers[0].step()
    return loss


def named(latents, training):
    """How many training objects are the nearest one of some latent"""
    return len(nearest(latents, training)[1][:, 0].unique())


def main(argv=None):
    config = parse_config(Config, PRESETS, with_box(argv, Config))
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    side, channels = model.config.latent_resolution, model.config.latent_channels
    if side % 2 ** (len(config.widths) - 1) or len(names) < 3:
        raise UserError(f"--widths: {len(config.widths)} levels halve {side} cells too often, or "
                        f"{len(names)} objects are too few (3 are wanted)")
    run = Run(config.out, "gan3d", config, [f.name for f in fields(Config) if f.name not in FREE])

    real, _, to_latents = to_learn(model, config)
    training = latents_of(model, model.codes)
    torch.manual_seed(config.seed)
    maker, critic = (Network(config, channels, side).to(device) for Network in (Generator, Discriminator))
    average = copy.deepcopy(maker).requires_grad_(False)
    # Without momentum, because each network's target moves with the other one
    optimizers = [torch.optim.Adam(net.parameters(), config.lr, betas=(0.0, 0.99)) for net in (maker, critic)]
    networks = {"maker": maker, "critic": critic, "average": average}
    step = resume(run, model, networks, optimizers)
    parameters = sum(p.numel() for p in maker.parameters())
    print(f"{len(real)} latents; generator of {parameters} parameters")

    @torch.no_grad()
    def drawn(seeds):
        noise = torch.stack([noise_of(seed)((config.noise,)) for seed in seeds]).to(device)
        return to_latents(torch.cat([average(part) for part in noise.split(64)]))

    with run:
        while step < config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            item = torch.randint(len(real), (config.batch,), generator=generator).to(device)
            noise = torch.randn(2, config.batch, config.noise, generator=generator).to(device)

            # The critic: up on real latents, down on made ones
            said, steep = r1_penalty(critic, real[item])
            fake = critic(maker(noise[0]).detach())
            critic_loss = (F.softplus(-said) + F.softplus(fake)).mean()

            # The maker: up on what it makes, by the critic's gradient
            maker_loss = compete(run, step, optimizers, critic_loss + config.r1 / 2 * steep,
                                 lambda: F.softplus(-critic(maker(noise[1]))).mean())
            follow(average, maker, step, config.ema)
            step += 1

            if step % config.preview_every == 0 or step == config.steps:
                run.log(step, config.steps, show=False, named=named(drawn(range(config.count)), training))
                rgb = render_views(model, drawn(range(8)), cameras(ANGLES[:2]), SIZE)[0]
                save_preview(run.folder / f"previews/step_{step:06d}.png", to_bytes(rgb.transpose(0, 1)))
            record(run, model, networks, optimizers, step, config.steps,
                   {"maker": maker_loss, "critic": critic_loss, "real": said.sigmoid().mean(),
                    "made": fake.sigmoid().mean()})

    began = time.time()
    latents = drawn(range(config.count))
    write_samples(run.folder, model, latents, parameters, (time.time() - began) / config.count)
    plot_log(run.folder, "share taken for real", real="real latents", made="made latents")
    print(f"wrote {run.folder}: last.pt, latents.pt, samples.png, curve.png.  {named(latents, training)} of "
          f"{len(names)} training objects are the nearest of some of {config.count} samples "
          "(row L2: 49 with R1, 1 without)")


if __name__ == "__main__":
    command(main)

"""
A chapter on all stages at once: diffusion through the renderer (RenderDiffusion, HoloDiffusion, DMV3D).
There is no stage 1, no code and no latent:

    min over G    mean | render(G(photos + sigma n, cameras, sigma), any camera) - photo from there |^2

A denoiser of pictures usually answers with pictures.  This one answers with a volume.  It lifts a few noised
photos of an object into space (chapters/lift.py), a decoder makes a volume of that, and the renderer makes
the pictures that are compared.  So the 3D object is inside the denoiser, as a bottleneck.  To sample, we
begin with pictures of pure noise, at cameras around nothing.  At each step G guesses a volume, and its
renderings are the pictures that the noise moves towards.  The last guess is the object.

Photos of one object must be known to belong together.  With `--views 1` only one is noised, as in
RenderDiffusion: then what is behind is guessed from one side.  (The loss still sees the others' pixels, which
RenderDiffusion does without.)

in   data/earphones_train/       photos and cameras
out  runs/render_diffusion/      last.pt, log.jsonl, curve.png, volumes.pt, samples.png, steps.png
run  python -m chapters.render_diffusion                         one core: 18 min, then 4 to sample (row L6)
     python -m chapters.render_diffusion --views 1 --out runs/one_view
     python -m lab.evaluate --rows runs/render_diffusion         in the lab's table
read Pictures, main.
"""
import copy
import math
import time
from dataclasses import dataclass, fields
from types import SimpleNamespace

import torch
import torch.nn as nn

import autodecoder
from autodecoder import (BETAS, GREY, PALETTE, Autodecoder, draw_batch, fast_precision, jitter,
                         learning_rate_share, palette_code, photos_nobody_took, plot_log, reconstruction_loss)
from chapters.families import AsVolumes, follow, improve, record, resume, write_volumes
from chapters.lift import Lift
from common import Run, command, intrinsics_at, parse_config, pick_device, save_preview, to_bytes
from diffusion import ancestral_sample, noise_of
from shapes.packed import read_photos
from volume_render import cameras, render_volumes


@dataclass
class Config:
    data: str = "data/earphones_train"   # a folder of photos in the SRN layout (shapes/README.md)
    out: str = "runs/render_diffusion"   # folder for the model, the log and the samples
    views: int = 4                       # noised photos of each object; 1: RenderDiffusion (from 1 to 30)
    size: int = 64                       # pixels along a photo's side (at least 8)
    holdout_views: int = 8               # the last photos of each object are not trained on
    recolour: float = 0.5                # share of objects in another one's colours (from 0 to 1)
    low: float = 0.3                     # the least sigma; photos lie in [-1, 1] (from 0.001 to 1)
    high: float = 150.0                  # and the largest (from 1 to 1000)
    width: int = 64                      # channels of the three lifting networks (at least 4)
    blocks: int = 4                      # blocks of the 3D one (at least 1)
    channels: tuple = (64, 32)           # widths of the decoder's levels, as stage 1's (at least 1)
    samples: int = 48                    # bins along a ray (at least 2)
    rays: int = 8192                     # rays in a step, shared by its objects (at least 64)
    foreground: float = 0.5              # share of the rays drawn near the object (from 0 to 1)
    batch_objects: int = 8               # objects in a step (at least 1)
    batch_views: int = 30                # photos of each object that a step draws its rays from (at least 1)
    mask_weight: float = 0.1             # weight of the opacity's squared error
    steps: int = 2500                    # gradient steps (at least 1)
    dense_steps: int = 200               # steps before empty space is skipped
    lr: float = 2e-3                     # learning rate, at its highest
    ema: float = 0.998                   # decay of the averaged weights, which sample (from 0 to 1)
    walk: int = 16                       # steps of the sampler (at least 2)
    count: int = 64                      # samples drawn at the end (at least 2)
    precision: str = "auto"              # auto | bf16 | float32: of the convolutions; auto asks the hardware
    seed: int = 0                        # of the weights and the batches
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(width=128, blocks=6, channels=(128, 64), steps=30000, batch_objects=16,
                                  rays=32768),
           "smoke": dict(size=16, views=2, width=8, blocks=1, channels=(8,), samples=8, rays=64,
                         batch_objects=2, steps=4, dense_steps=2, walk=3, count=2, save_every=2, log_every=2)}
FREE = ("out", "device", "log_every", "save_every", "fresh", "count", "walk")
PAINT = autodecoder.Config(recolour=1.0, stretched=0.0)      # of the photos that nobody took: colours alone


class Pictures(nn.Module):
    """Noised photos (B,V,H,W,3) in [-1, 1] + sigma n, their cameras, sigma (B,) -> volumes (B,4,N,N,N)"""

    def __init__(self, config):
        super().__init__()
        self.config = autodecoder.Config(channels=config.channels, precision=config.precision)
        self.lift = Lift(config, self.config.latent_channels, self.config.latent_resolution, seen=4)
        # Stage 1's second half, G2, with fresh weights
        self.decoder = Autodecoder(self.config, 1)
        with torch.no_grad():                      # a palette of zeros is black, and has no gradient there
            self.lift.leave[-1].bias[-PALETTE:] = autodecoder.PAINT * torch.tensor(GREY)

    def forward(self, noised, poses, K, sigma):
        # The fourth channel says how much noise there is.  All numbers stay near 1
        sigma = sigma.view(-1, 1, 1, 1, 1)
        level = (sigma.log() / 4).expand(*noised.shape[:-1], 1)
        seen = torch.cat([noised / (1 + sigma ** 2).sqrt(), level], -1)
        with fast_precision(self.config, noised.device):
            return self.decoder.to_volume(self.lift(seen, poses, K))


@torch.no_grad()
def drawn(network, seeds, config, trace=None):
    """-> volumes (B,4,N,N,N), from pictures of noise at cameras around the object"""
    poses = cameras([(40 + 360 * k / config.views, 15) for k in range(config.views)])
    poses = poses.to(network.decoder.shapes)
    K, B, real = intrinsics_at(1).float().to(poses), len(seeds), intrinsics_at(config.size).float()
    draws = [noise_of(seed) for seed in seeds]
    shape = config.views, config.size, config.size, 3
    noise = lambda: torch.stack([draw(shape) for draw in draws]).to(poses)
    levels = torch.linspace(math.log(config.high), math.log(config.low), config.walk).exp()
    volumes = None

    def denoise(x, sigma):
        """What stage 2's sampler asks for: a volume's renderings, as the clean pictures"""
        nonlocal volumes
        volumes = network(x, poses.expand(B, -1, -1, -1), K.expand(B, 3, 3), sigma[:, 0])
        seen = 2 * render_volumes(AsVolumes(), volumes, poses, real, config.size)[0] - 1
        if trace is not None:
            trace.append((x, seen))
        return seen
    bound, sigmas = SimpleNamespace(denoise=denoise), torch.cat([levels, torch.zeros(1)]).to(poses)
    for _ in ancestral_sample(bound, config.high * noise(), sigmas, noise):
        pass
    return volumes


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    photos = read_photos(config.data, config.size)
    train = photos.split(config.holdout_views, config.views)[0]
    colours, extents = photos.measured(train)
    palettes = palette_code(*colours)
    run = Run(config.out, "render_diffusion", config, [f.name for f in fields(Config) if f.name not in FREE])
    torch.manual_seed(config.seed)
    network = Pictures(config).to(device)
    average = copy.deepcopy(network).requires_grad_(False)
    weights = [p for name, p in network.named_parameters() if ".g1" not in name and ".spread" not in name
               and name != "decoder.shapes"]
    optimizer = torch.optim.Adam(weights, betas=BETAS)
    networks = {"network": network, "average": average}
    step, parameters = resume(run, None, networks, [optimizer]), sum(p.numel() for p in weights)
    print(f"{len(photos.names)} objects; {parameters / 1e6:.2f} M parameters")
    K = photos.intrinsics[:1].clone()
    K[:, :2] /= config.size

    with run:
        while step < config.steps:
            optimizer.param_groups[0]["lr"] = config.lr * learning_rate_share(step, config.steps, 0.03)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            objects, *rays, rgb, opacity = draw_batch(photos, config, train, generator)
            B, o = len(objects), objects[:, None]
            view = train[torch.rand(B, len(train), generator=generator).argsort(1)[:, :config.views]]
            given, solid = photos.rgb[o, view].float() / 255, photos.mask[o, view].float() / 255

            # Some objects in the colours of others, in the noised photos and in what is asked for alike
            both = torch.cat([given.flatten(1, 3), rgb], 1), torch.cat([solid.flatten(1), opacity], 1)
            *_, (*rays, colours, _) = photos_nobody_took(objects, (*rays, *both), palettes, extents, PAINT,
                                                         config.recolour, generator)
            given, rgb = colours[:, :-rgb.shape[1]].view(given.shape), colours[:, -rgb.shape[1]:]

            # One level for all photos of an object, spread evenly over log sigma
            u = (torch.arange(B) + torch.rand(B, generator=generator)) / B
            sigma = (math.log(config.low) + u * math.log(config.high / config.low)).exp()
            noise = torch.randn(given.shape, generator=generator)
            noised = 2 * given - 1 + sigma.view(-1, 1, 1, 1, 1) * noise
            volume = network(noised.to(device), photos.pose[o, view].to(device), K.expand(B, 3, 3).to(device),
                             sigma.to(device))
            batch = [some.to(device) for some in (*rays, rgb, opacity)]
            place = jitter(batch, config.samples, generator, device)
            loss, photo, alpha = reconstruction_loss(network.decoder, volume, batch, config, place,
                                                     step >= config.dense_steps, photos.has_masks)
            if improve(run, step, loss, optimizer):
                follow(average, network, step, config.ema)
            step += 1
            record(run, None, networks, [optimizer], step, config.steps,
                   {"loss": loss, "photo": photo, "opacity": alpha})

    began, trace = time.time(), []
    parts = [range(k, min(k + 16, config.count)) for k in range(0, config.count, 16)]
    volumes = torch.cat([drawn(average, seeds, config, None if seeds[0] else trace) for seeds in parts])
    write_volumes(run.folder, volumes, parameters, (time.time() - began) / config.count)
    some = torch.linspace(0, config.walk - 1, min(8, config.walk)).long()
    rows = [torch.stack([(trace[k][which][0, 0] / 2 + 0.5).clamp(0, 1) for k in some]) for which in (0, 1)]
    save_preview(run.folder / "steps.png", to_bytes(torch.stack(rows)))
    plot_log(run.folder, "squared error", photo="renderings")
    print(f"wrote {run.folder}: last.pt, volumes.pt, samples.png, curve.png, steps.png (above what G sees, "
          "below what it answers, from pure noise to the end)")


if __name__ == "__main__":
    command(main)

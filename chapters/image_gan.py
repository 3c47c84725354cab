"""
A chapter on stages 1 and 2: adversarial learning from pictures (pi-GAN, EG3D, GET3D).  No codes of objects,
no latents, no diffusion, and nobody says which photos show one object:

    min over G, max over D    mean log s(D(photo)) + mean log(1 - s(D(render(G(noise), camera))))

G turns random numbers into a volume.  It is stage 1's decoder, untrained, with noise in the place of a code.
A renderer shows the volume to a camera drawn from the photos' cameras.  D, a 2D network, is told the camera
(as in EG3D) and says whether the picture looks like a photo; s is the sigmoid.  Its gradient comes back
through the renderer.  One volume must look right from any camera, and this alone makes it 3D.

What goes wrong?  *Collapse*, as with every GAN: few objects for all noise.  It is counted (`named`).  And the
*hollow face*: if all photos are taken from the front, nothing is known of the depth, and a flat or hollow
shape convinces D just as well.  `--front 40` keeps only such photos; look at turned.png.

in   data/earphones_train/       photos and cameras
out  runs/image_gan/             last.pt, log.jsonl, curve.png, previews/, volumes.pt, samples.png, turned.png
run  python -m chapters.image_gan                                              one core: 19 min (row L5)
     python -m chapters.image_gan --front 40 --steps 900 --out runs/hollow    photos from the front alone
     python -m lab.evaluate --rows runs/image_gan                              in the lab's table
read Critic, pictures_of, main.
"""
import copy
import math
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

import autodecoder
from autodecoder import GREY, Autodecoder, plot_log
from chapters.families import AsVolumes, follow, record, resume, shown, smooth, write_volumes
from chapters.gan3d import compete, r1_penalty
from chapters.maps import places_of
from common import Run, UserError, command, parse_config, pick_device, save_preview, to_bytes
from diffusion import noise_of
from shapes.packed import read_photos
from volume_render import cameras, render_views, render_volumes


@dataclass
class Config:
    data: str = "data/earphones_train"   # a folder of photos in the SRN layout (shapes/README.md)
    out: str = "runs/image_gan"          # folder for the model, the log and the samples
    size: int = 32                       # pixels along a photo's side (at least 16)
    front: float = 180.0                 # a camera's largest angle to the front, degrees (from 10 to 180)
    noise: int = 64                      # random numbers for each sample (from 2 to 4096)
    channels: tuple = (48, 24)           # widths of the generator's levels (at least 1)
    critic: tuple = (32, 64, 128)        # widths of the critic's; each halves the picture (at least 1)
    samples: int = 32                    # bins along a ray (at least 2)
    r1: float = 10.0                     # weight of the squared gradient at photos (chapters/gan3d.py)
    steps: int = 2200                    # steps of both networks (at least 1)
    batch: int = 12                      # pictures in a step (at least 2)
    lr: float = 1e-3                     # learning rate of both
    ema: float = 0.998                   # decay of the averaged generator, which samples (from 0 to 1)
    count: int = 192                     # samples drawn at the end (at least 2)
    seed: int = 0                        # of the weights and the batches
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    preview_every: int = 500             # steps between previews (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(size=64, channels=(128, 64, 32), critic=(64, 128, 256, 256), batch=32,
                                  steps=30000),
           "smoke": dict(size=16, noise=4, channels=(8,), critic=(8, 8), samples=8, steps=4, batch=2, count=2,
                         preview_every=2, save_every=2, log_every=2)}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh", "count")
TURN = [(-90, 15), (-60, 15), (-30, 15), (0, 15), (90, 15)]      # azimuth and elevation; the front is at -90


class Critic(nn.Module):
    """Pictures (B,H,W,3) and where their cameras are (B,3) -> (B,): above 0 for what it takes for a photo"""

    def __init__(self, config):
        super().__init__()
        widths = config.critic
        level = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.2),
                                           nn.Conv2d(b, b, 3, padding=1), nn.LeakyReLU(0.2), nn.AvgPool2d(2))
        self.levels = nn.Sequential(*[level(a, b) for a, b in zip((6, *widths), widths)])
        self.leave = nn.Linear(widths[-1] * (config.size // 2 ** len(widths)) ** 2, 1)

    def forward(self, pictures, places):
        told = places[:, :, None, None].expand(-1, -1, *pictures.shape[1:3])
        h = self.levels(torch.cat([2 * pictures.permute(0, 3, 1, 2) - 1, told], 1))
        return self.leave(h.flatten(1))[:, 0]


def make_generator(config):
    """Stage 1's decoder, for codes of random numbers"""
    return Autodecoder(autodecoder.Config(shape_width=config.noise, channels=config.channels,
                                          samples=config.samples), 1)


def volumes_of(network, noise):
    """noise (B,K) -> volumes (B,4,N,N,N).  A code has three stretches and a palette too"""
    grey = noise.new_tensor(GREY).expand(len(noise), -1)
    return smooth(network.volumes_of(torch.cat([F.pad(noise, (3, 0)), grey], 1)))


def pictures_of(network, noise, poses, K, config, place=None):
    """Each volume as its camera sees it -> (B,H,W,3)"""
    return shown(volumes_of(network, noise), poses[:, None], K[:, None], config.size, config.samples,
                 network.field, place)[:, 0]


def from_the_front(poses, most):
    """Which cameras (P,4,4) stand within so many degrees of the front, which is at -y"""
    towards = -places_of(poses)[:, 1]
    return (towards >= math.cos(math.radians(most)) - 1e-6).nonzero()[:, 0]


@torch.no_grad()
def named(volumes, photos):
    """How many of the photos' objects are the nearest one of some volume, by two photos of each"""
    show, apart = AsVolumes(), []
    for o in range(len(photos.names)):
        rgb = render_volumes(show, volumes, photos.pose[o, :2], photos.intrinsics[o], photos.size)[0].cpu()
        apart.append((rgb - photos.rgb[o, :2].float() / 255).square().flatten(1).mean(1))
    return len(torch.stack(apart).argmin(0).unique())


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    photos = read_photos(config.data, config.size)
    if config.size % 2 ** len(config.critic):
        raise UserError(f"--size {config.size}: {len(config.critic)} levels of the critic halve it too often")
    # Every photo stands for itself: which object it shows is not known from here on
    rgb, poses, K = photos.rgb.flatten(0, 1), photos.pose.flatten(0, 1), photos.intrinsics[:1].to(device)
    places, some = places_of(poses), from_the_front(poses, config.front)
    if len(some) < config.batch:
        raise UserError(f"--front {config.front}: {len(some)} photos are taken from there, too few")
    run = Run(config.out, "image_gan", config, [f.name for f in fields(Config) if f.name not in FREE])

    torch.manual_seed(config.seed)
    maker, critic = make_generator(config).to(device), Critic(config).to(device)
    average = copy.deepcopy(maker).requires_grad_(False)
    weights = [p for name, p in maker.named_parameters() if name != "shapes"]
    optimizers = [torch.optim.Adam(some, config.lr, betas=(0.0, 0.99))
                  for some in (weights, critic.parameters())]
    networks = {"maker": maker, "critic": critic, "average": average}
    step = resume(run, None, networks, optimizers)
    parameters = sum(p.numel() for p in weights)
    print(f"{len(some)} photos; generator of {parameters} parameters")

    @torch.no_grad()
    def drawn(seeds):
        noise = torch.stack([noise_of(seed)((config.noise,)) for seed in seeds]).to(device)
        return torch.cat([volumes_of(average, part) for part in noise.split(16)])

    with run:
        while step < config.steps:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            real, seen, again = some[torch.randint(len(some), (3, config.batch), generator=generator)]
            noise = torch.randn(2, config.batch, config.noise, generator=generator).to(device)
            place = torch.rand(2, config.batch, config.size ** 2, config.samples, generator=generator)
            show = lambda k, which: pictures_of(maker, noise[k], poses[which].to(device), K, config,
                                                place[k].to(device))

            # The critic: up on photos, down on renderings.  It is told where each picture's camera stands
            critic_of = lambda which: lambda pictures: critic(pictures, places[which].to(device))
            said, steep = r1_penalty(critic_of(real), (rgb[real].float() / 255).to(device))
            with torch.no_grad():
                fake = show(0, seen)
            told = critic_of(seen)(fake)
            critic_loss = (F.softplus(-said) + F.softplus(told)).mean()

            # The maker: up on what it makes, by the critic's gradient through the renderer
            maker_loss = compete(run, step, optimizers, critic_loss + config.r1 / 2 * steep,
                                 lambda: F.softplus(-critic_of(again)(show(1, again))).mean())
            follow(average, maker, step, config.ema)
            step += 1

            if step % config.preview_every == 0 or step == config.steps:
                turned = render_views(AsVolumes(), drawn(range(8)), cameras(TURN), 2 * config.size)[0]
                save_preview(run.folder / f"previews/step_{step:06d}.png", to_bytes(turned.transpose(0, 1)))
            record(run, None, networks, optimizers, step, config.steps,
                   {"maker": maker_loss, "critic": critic_loss, "real": said.sigmoid().mean(),
                    "made": told.sigmoid().mean()})

    began = time.time()
    volumes = drawn(range(config.count))
    write_volumes(run.folder, volumes, parameters, (time.time() - began) / config.count)
    turned = render_views(AsVolumes(), volumes[:8], cameras(TURN), 2 * config.size)[0]
    save_preview(run.folder / "turned.png", to_bytes(turned.transpose(0, 1)))
    plot_log(run.folder, "share taken for photos", real="photos", made="renderings")
    print(f"wrote {run.folder}: last.pt, volumes.pt, samples.png, curve.png, turned.png (each from the "
          f"front, and further round).  {named(volumes[:64], photos)} of {len(photos.names)} objects are the "
          "nearest of some of 64 samples (row L5: 17)")


if __name__ == "__main__":
    command(main)

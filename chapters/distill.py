"""
A chapter on stage 3: score distillation (DreamFusion), the Janus problem, and its cure (MVDream).  A
diffusion model of *pictures* makes 3D objects, one by one, by descent:

    min over volume    mean over cameras, n    | render(volume, camera) - D(render + sigma n, sigma) |^2

D, a denoiser of small photos, is held fixed.  It knows nothing of space.  It only says of each rendering
which photo it could be.  If D is not told where the camera stands, each side of the object may become the
same favourite view: a head with two faces (Janus), or headphones with a cup on every side.  It is counted.
A network learns from photos to read the camera's azimuth.  Of a good object it reads the azimuth that we
rendered; of a Janus object it reads the same one everywhere.  One D serves three ways: it is told nothing;
it is told the camera; it sees four views of an object at once, and says what could be *one* object.

DreamFusion takes one step of D and one of the volume, in turn.  Here D takes several, to imagine a photo for
each of four cameras, the volume some towards them, and then again with less noise.

Last comes NeuralField-LDM's post-optimisation.  D also learns what renderings of stage 2's samples look like,
by a label.  Then it guides those samples away from that label, towards photos (negative guidance).

in   data/earphones_train; stages 1 and 2, or the model in the box
out  runs/distill/            last.pt, log.jsonl, curve.png, janus.txt, janus.png, mended.png, volumes.pt;
     runs/distill/mended/     latents.pt: stage 2's first samples after post-optimisation, a row for the lab
run  python -m chapters.distill                                          one core: 23 min (row L9)
     python -m lab.evaluate --rows runs/distill runs/distill/mended      in the lab's table
read imagined, distilled, contrast, mended, main; and PictureDenoiser in maps.py.
"""
import time
from dataclasses import dataclass, fields

import torch

from autodecoder import BETAS, fast_precision, learning_rate_share, plot_log
from chapters.families import AsVolumes, improve, record, resume, shown, smooth, write_samples, write_volumes
from chapters.maps import PictureDenoiser, ViewReader, angle_apart, doubled, loss_of, places_of
from common import (DISTANCE, Run, UserError, camera_to_world_at, command, parse_config, pick_device,
                    save_preview, save_text, to_bytes)
from diffusion import sample
from sample import load_models
from shapes.packed import read_photos
from volume_render import ANGLES, SIZE, cameras, render_views, render_volumes


@dataclass
class Config:
    data: str = "data/earphones_train"   # a folder of photos in the SRN layout (shapes/README.md)
    diffusion: str = "runs/diffusion"    # stage 2's folder, whose samples are mended
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "runs/distill"            # folder for the model, the log and the objects
    size: int = 32                       # pixels along a picture's side (at least 16)
    width: int = 32                      # channels of the denoiser; they double twice, coarser (at least 8)
    steps: int = 3000                    # gradient steps of the denoiser (at least 1)
    batch: int = 48                      # pictures in a step (at least 4)
    lr: float = 2e-3                     # learning rate, at its highest
    rounds: int = 12                     # times that D imagines an object's photos (at least 1)
    descent: int = 15                    # steps towards them, each time; 1: DreamFusion's (at least 1)
    rate: float = 0.1                    # of these steps
    imagine: int = 8                     # steps of D from noise to a photo; 1: DreamFusion's (at least 1)
    objects: int = 8                     # distilled each way (at least 1)
    seen: int = 64                       # samples of stage 2 whose renderings it learns (at least 1)
    mended: int = 32                     # samples of stage 2 that are mended (at least 2)
    mending: int = 60                    # steps for each (at least 1)
    mend_rate: float = 0.005             # of these steps, in deviations of the latents
    guidance: float = 1.0                # weight of the contrast (from -20 to 20)
    seed: int = 0                        # of the weights, the batches and the objects
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(size=64, width=96, steps=20000, batch=128, rounds=24),
           "smoke": dict(size=16, width=8, steps=4, batch=4, rounds=2, descent=2, objects=2, seen=2, mended=2,
                         mending=2, save_every=2, log_every=2)}
FREE = ("out", "device", "log_every", "save_every", "fresh", "rounds", "descent", "rate", "objects", "mended",
        "mending", "mend_rate", "imagine", "guidance", "autodecoder")
LOW, HIGH, SAMPLES, VIEWS = 0.2, 60.0, 48, 4      # noise levels; bins along a ray; views at once
HAZE = 0.25                                       # density of what is empty, while it descends


def around(count, views, generator):
    """Cameras around `count` objects: a quarter turn between the four -> poses (count,views,4,4)"""
    turn = 360 * torch.rand(count, 1, generator=generator) + 360 / views * torch.arange(views)
    lift = (60 * torch.rand(count, 1, generator=generator) - 20).expand_as(turn)
    return camera_to_world_at(turn, lift, torch.full_like(turn, DISTANCE))


def imagined(network, pictures, sigma, poses, way, config, generator):
    """What D makes of these pictures, noised: photos (B,V,H,W,3) that they could be, without gradients"""
    B, V = pictures.shape[:2]
    places = places_of(poses) * (way != "told nothing")
    with torch.no_grad():
        z = network.plain(pictures)
        x = z + sigma * torch.randn(z.shape, generator=generator).to(z)
        if way != "four views at once":                             # each view is an object of its own
            x, places = x.flatten(0, 1)[:, None], places.flatten(0, 1)[:, None]
        # One step gives the mean of all photos that x could be, which is pale.  Several steps decide for one
        levels = [sigma * (LOW / sigma) ** (k / config.imagine) for k in range(config.imagine + 1)]
        for now, after in zip(levels, levels[1:]):
            clean = network(x, torch.full((len(x),), now).to(x), places, x.new_zeros(len(x)))
            x = clean + after / now * (x - clean)
        return clean.view(z.shape) * network.spread + network.mean


def distilled(network, config, way, K, device):
    """-> volumes (objects,4,N,N,N), from fog, in rounds"""
    N, field = 32, AsVolumes().field
    generator = torch.Generator().manual_seed(config.seed + 1)
    centre = (torch.arange(N) + 0.5) / N - 0.5
    ball = -(centre[:, None, None] ** 2 + centre[:, None] ** 2 + centre ** 2) / 0.08
    free = torch.cat([ball.exp()[None] - 0.4, torch.zeros(3, N, N, N)]).expand(config.objects, -1, -1, -1, -1)
    free = (free + 0.05 * torch.randn(free.shape, generator=generator)).to(device).requires_grad_(True)
    optimizer = torch.optim.Adam([free], config.rate, betas=BETAS)
    for k in range(config.rounds):
        # Much noise first, because it decides what the object is, and little at the end, for its details
        sigma = HIGH * (0.5 / HIGH) ** (k / config.rounds)
        poses = around(config.objects, VIEWS, generator).to(device)
        pictures = shown(smooth(free), poses, K, config.size, SAMPLES, field)
        goal = imagined(network, pictures, sigma, poses, way, config, generator)
        for _ in range(config.descent):
            place = torch.rand(len(free), VIEWS * config.size ** 2, SAMPLES, generator=generator).to(device)
            pictures = shown(smooth(free), poses, K, config.size, SAMPLES, field, place)
            optimizer.zero_grad()
            (pictures - goal).square().sum(0).mean().backward()
            optimizer.step()
            # What is empty has no gradient, and could never come back: some haze stays until the end
            free.data[:, 0].clamp_(min=-HAZE)
    free = free.detach()
    free[:, 0][free[:, 0] <= -HAZE + 0.02] = -2
    return smooth(free)


def mended(network, model, latents, config, K):
    """Post-optimisation: latents (B,...) of samples, after some steps away from how samples look"""
    generator, parts = torch.Generator().manual_seed(config.seed + 2), []
    for latent in latents.split(8):
        free = latent.clone().requires_grad_(True)
        # Adam divides by the gradient's size, so the weight of the contrast must be the size of a step
        step = config.mend_rate * abs(config.guidance) * latents.std().item()
        optimizer = torch.optim.Adam([free], step, betas=BETAS)
        for _ in range(config.mending):
            poses = around(len(free), VIEWS, generator).to(free)
            sigma = 0.2 * 10 ** torch.rand((), generator=generator).item()
            with fast_precision(model.config, free.device):
                volume = model.to_volume(free)
            pictures = shown(volume, poses, K, config.size, SAMPLES, model.field)
            away = contrast(network, pictures.detach(), sigma, poses, generator)
            optimizer.zero_grad()
            ((1 if config.guidance < 0 else -1) * away * pictures).sum(0).mean().backward()
            optimizer.step()
        parts.append(free.detach())
    return torch.cat(parts)


@torch.no_grad()
def contrast(network, pictures, sigma, poses, generator):
    """What photos have more than samples' renderings, by what D makes of the same noised pictures.  What D
    cannot draw at all, both lack alike"""
    x, places = network.plain(pictures), places_of(poses)
    x = x + sigma * torch.randn(x.shape, generator=generator).to(x)
    level, photo = torch.full((len(x),), sigma).to(x), x.new_zeros(len(x))
    return (network(x, level, places, photo) - network(x, level, places, photo + 1)) * network.spread


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device = pick_device(config.device)
    model, names, stage2 = load_models(config, device)
    photos = read_photos(config.data, config.size)
    if config.size % 8 or photos.rgb.shape[1] < VIEWS:
        raise UserError(f"--size {config.size}: a multiple of 8 is wanted, and {VIEWS} photos of each object")
    run = Run(config.out, "distill", config, [f.name for f in fields(Config) if f.name not in FREE])

    # Pictures of both labels: photos, and renderings of stage 2's samples from the photos' own cameras
    generator, K = torch.Generator().manual_seed(config.seed), photos.intrinsics[0].to(device)
    samples = stage2.latents(sample(stage2, range(1000, 1000 + config.seen)))
    some = torch.randint(len(photos.names), (16,), generator=generator), torch.arange(16) % len(photos.rgb[0])
    volumes = lambda latent: model.to_volume(latent[None])
    made = torch.cat([to_bytes(render_volumes(model, volumes(one), photos.pose[some], K, config.size)[0])
                      for one in samples]).cpu()
    rgb, train = (photos.rgb, made), max(len(photos.rgb[0]) - 8, VIEWS)     # the last photos test the reader
    places = places_of(photos.pose), places_of(photos.pose[some])[None].expand(len(made), -1, -1)
    torch.manual_seed(config.seed)
    network, reader = PictureDenoiser(config).to(device), ViewReader(config).to(device)
    network.mean.copy_(photos.rgb.float().mean((0, 1, 2, 3)) / 255)
    network.spread.copy_(photos.rgb.float().std() / 255)
    networks, numbers = {"network": network, "reader": reader}, {}
    optimizers = [torch.optim.Adam(some.parameters(), betas=BETAS) for some in (network, reader)]
    step, parameters = resume(run, model, networks, optimizers), sum(p.numel() for p in network.parameters())
    print(f"photos of {len(photos.names)} objects; {parameters / 1e6:.2f} M parameters")

    with run:
        while step < config.steps:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = config.lr * learning_rate_share(step, config.steps, 0.03)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            # One batch in four is of single views.  One in four of either is of samples' renderings
            V, label = 1 if step % 4 == 0 else VIEWS, step // 4 % 4 == 3
            B = config.batch // V
            o = torch.randint(len(rgb[label]), (B, 1), generator=generator)
            view = torch.rand(B, min(train, len(rgb[label][0])), generator=generator).argsort(1)[:, :V]
            pictures, place = rgb[label][o, view].to(device) / 255, places[label][o, view].to(device)
            told = V == VIEWS or torch.rand((), generator=generator) < 0.5
            sigma = (LOW * (HIGH / LOW) ** torch.rand(B, generator=generator)).to(device)
            z = network.plain(pictures)
            x = z + sigma.view(-1, 1, 1, 1, 1) * torch.randn(z.shape, generator=generator).to(z)
            with fast_precision(model.config, device):
                clean = network(x, sigma, place * told, torch.full_like(sigma, label))
            loss = loss_of(clean, z, sigma.view(-1, 1, 1, 1, 1))
            reading = (reader(pictures.flatten(0, 1)) - doubled(place.flatten(0, 1))).square().mean()
            improve(run, step, loss, optimizers[0]) and improve(run, step, reading, optimizers[1])
            step += 1
            numbers |= {"four" if V == VIEWS else "single": loss.detach(), "reading": reading.detach()}
            record(run, model, networks, optimizers, step, config.steps, numbers)

    # Objects by distillation, three ways.  Of each a turn of eight views, and what the reader reads of them
    began, lines, rows = time.time(), [], []
    turn = cameras([(45 * k + 22.5, 15) for k in range(8)])

    def line(name, pictures, places):
        apart = angle_apart(reader, pictures.to(device), places.to(device))
        wrong = (apart > 22.5).double().mean()
        lines.append(f"{name:<20} {apart.median():5.1f} degrees   {wrong:4.0%}")
    line("photos, held out", photos.rgb[:, -8:].flatten(0, 1).float() / 255,
         places_of(photos.pose[:, -8:]).flatten(0, 1))
    for way in ("told nothing", "told the camera", "four views at once"):
        volumes = distilled(network, config, way, K, device)
        seen = render_volumes(AsVolumes(), volumes, turn, K, config.size)[0]
        line(way, seen.flatten(0, 1), places_of(turn).repeat(len(seen), 1))
        rows += [*to_bytes(render_views(AsVolumes(), volumes[:3], turn, SIZE)[0])]
    write_volumes(run.folder, volumes, parameters, (time.time() - began) / 3 / config.objects)
    save_preview(run.folder / "janus.png", torch.stack(rows))
    text = "\n".join(["the azimuth that is read is off by, and by more than 22.5 degrees in", *lines, ""])
    print(text)
    save_text(run.folder / "janus.txt", text)

    # Stage 2's first samples, before and after
    before, began = stage2.latents(sample(stage2, range(config.mended))), time.time()
    after = mended(network, model, before, config, K)
    seconds = (time.time() - began) / config.mended
    write_samples(run.folder / "mended", model, after, parameters, seconds, run.folder)
    pictures = [to_bytes(render_views(model, some[:8], cameras(ANGLES[:2]), SIZE)[0].transpose(0, 1))
                for some in (before, after)]
    save_preview(run.folder / "mended.png", torch.cat(pictures))
    plot_log(run.folder, "loss", single="single views", four="four views at once")
    print(f"wrote {run.folder}: last.pt, volumes.pt, janus.txt, janus.png (three objects each way, a turn of "
          "each), mended.png (two views before, two after), mended/latents.pt")


if __name__ == "__main__":
    command(main)

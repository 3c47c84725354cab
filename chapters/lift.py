"""
A chapter on stage 1: photos in, volume out, in one pass of a network.  No code is searched.

    latent = K( mean and deviation over views of  M(F(photo) at the point's pixel, where the camera is) )

The middle of each of the latent's cells is sent through each photo's camera, and takes the photo's features
at the pixel where it is seen (pixelNeRF, 2021; "lift-splat"; NeuralField-LDM's scene encoder).  F is a
small 2D network, M mixes what one view says of one point, and K, a 3D network, turns what all views say
into stage 1's latent.  G2 and the renderer stay as they are.  A point sees only its own ray, so it cannot
know its depth from one photo.  K must guess that from its neighbours, and from what earphones look like.

It learns from pairs of photos and latents.  Stage 1 can make as many as we like: decode recombined codes and
render them.  A share of the steps see the real photos of the training objects.

in   data/earphones_train, data/earphones_test; runs/autodecoder/last.pt, without it the model in the box
out  runs/lift/              last.pt, log.jsonl, curve.png, lift.txt (beside fit_codes), lift_1.png, ...
run  python -m chapters.lift                 two CPU cores: 15 min; 8 photos, 100 steps: 29.88 dB (row L3)
read unproject, Lift, main.
"""
import time
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import (BETAS, Block, descend, fast_precision, fit_codes, learning_rate_share,
                         load_autodecoder, plot_log)
from chapters.families import improve, record, resume, to_learn, with_box
from chapters.few_views import OfLatents, decoder_of, pictures
from common import Run, UserError, command, parse_config, pick_device, save_preview, save_text, to_bytes
from diffusion import latents_of
from shapes.packed import read_photos
from volume_render import mean_of, render_volumes, score_views


@dataclass
class Config:
    data: str = "data/earphones_train"   # photos of the objects that the autodecoder knows
    unseen: str = "data/earphones_test"  # photos of others, which measure it
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/lift"               # folder for the model, the log and the table
    objects: int = 24                    # of the unseen ones; 0: all
    recombinations: int = 1024           # made objects to learn from (at least 1)
    rendered: int = 8                    # pictures of each made object (from 1 to 64)
    real: float = 0.25                   # share of a batch that are real photos (from 0 to 1)
    given: tuple = (1, 2, 8)             # photos given, when it is measured (from 1 to 64)
    width: int = 64                      # channels of all three networks (at least 4)
    blocks: int = 3                      # blocks of the 3D network (at least 1)
    steps: int = 2000                    # gradient steps (at least 1)
    batch: int = 16                      # objects in a step (at least 1)
    lr: float = 2e-3                     # learning rate, at its highest
    fit_steps: int = 400                 # of fit_codes, which is measured beside it; 0: it is not
    seed: int = 0                        # of the weights and the batches
    device: str = "auto"                 # auto, cpu or cuda
    log_every: int = 20                  # steps between log lines (at least 1)
    save_every: int = 500                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over


PRESETS = {"cpu": {}, "gpu": dict(width=128, steps=20000, recombinations=16384),
           "smoke": dict(recombinations=4, rendered=2, steps=4, batch=2, width=8, blocks=1, objects=2,
                         given=(1, 2), fit_steps=2, save_every=4, log_every=2)}
FREE = ("out", "device", "log_every", "save_every", "fresh", "unseen", "objects", "given", "fit_steps")


def unproject(features, poses, K, points):
    """features (B,V,C,h,w), poses (B,V,4,4), K (B,3,3) of photos of side 1, points (P,3) in the world -> what
    each point sees in each view (B,V,C,P), and where that camera is, seen from the point (B,V,4,P)"""
    B, V = poses.shape[:2]
    away = points - poses[:, :, None, :3, 3]                                               # (B,V,P,3)
    camera = away @ poses[:, :, :3, :3]                                                    # R^T (p - t)
    pixel = (camera / camera[..., 2:]) @ K[:, None].mT                                     # in [0, 1]
    grid = (2 * pixel[..., :2] - 1).flatten(0, 1)[:, None]                                 # (BV,1,P,2)
    seen = F.grid_sample(features.flatten(0, 1), grid, align_corners=False, padding_mode="border")
    distance = away.norm(dim=-1, keepdim=True)
    return seen.view(B, V, -1, len(points)), torch.cat([away / distance, distance], -1).mT


class Lift(nn.Module):
    """Photos (B,V,H,W,3) in [0, 1] and their cameras -> latents (B,C,r,r,r), normalised"""

    def __init__(self, config, channels, side, seen=3):
        super().__init__()
        width = config.width
        self.side = side                                 # a point in the middle of each of the latent's cells
        layer = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.GroupNorm(1, b),
                                                   nn.SiLU())
        self.look = nn.Sequential(layer(seen, width // 4, 1), layer(width // 4, width // 2, 2),
                                  layer(width // 2, width, 2), nn.Conv2d(width, width, 3, padding=1))
        self.mix = nn.Sequential(nn.Conv1d(width + 4, width, 1), nn.SiLU(), nn.Conv1d(width, width, 1))
        # Three more channels say where in the cube a point is: a convolution alone would not know
        self.enter = nn.Conv3d(2 * width + 3, width, 1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(config.blocks)])
        self.leave = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(),
                                   nn.Conv3d(width, channels, 3, padding=1))
        centre = (torch.arange(self.side) + 0.5) / self.side - 0.5
        z, y, x = torch.meshgrid(centre, centre, centre, indexing="ij")
        self.register_buffer("points", torch.stack([x, y, z], -1).view(-1, 3))             # (P,3)

    def forward(self, photos, poses, K):
        B, V = photos.shape[:2]
        features = self.look(photos.flatten(0, 1).permute(0, 3, 1, 2))                     # (BV,C,h,w)
        seen, where = unproject(features.view(B, V, *features.shape[1:]), poses, K, self.points)
        said = self.mix(torch.cat([seen, where], 2).flatten(0, 1)).view(B, V, -1, len(self.points))
        # The mean does not depend on the views' number or order.  The deviation says where they differ
        both = torch.cat([said.mean(1), said.std(1, correction=0),
                          2 * self.points.T.expand(B, -1, -1)], 1)                         # (B,2C+3,P)
        return self.leave(self.blocks(self.enter(both.view(B, -1, *[self.side] * 3))))


@torch.no_grad()
def made_photos(model, latents, poses, K, size, count, generator):
    """`count` renderings of each latent by any of these cameras -> rgb (N,V,H,W,3) uint8, poses (N,V,4,4)"""
    which = torch.randint(len(poses), (len(latents), count), generator=generator)
    rgb = []
    for k, latent in enumerate(latents):
        seen = render_volumes(model, model.to_volume(latent[None]), poses[which[k]], K, size)[0][0]
        rgb.append(to_bytes(seen.cpu()))
        if k % 256 == 255:
            print(f"{k + 1} of {len(latents)} made objects are rendered", flush=True)
    return torch.stack(rgb), poses[which]


def draw_views(rgb, poses, items, count, generator):
    """Of each item `count` of its photos, each at most once"""
    view = torch.rand(len(items), rgb.shape[1], generator=generator).argsort(1)[:, :count]
    return rgb[items[:, None], view].float() / 255, poses[items[:, None], view]


@torch.no_grad()
def lifted(network, photos, views, to_latents, device):
    """The network's answer to these views of all objects -> latents (N,C,r,r,r), and seconds for each"""
    began, K = time.time(), photos.intrinsics / photos.size
    K[:, 2, 2] = 1
    latents = [to_latents(network((photos.rgb[o, views].float() / 255)[None].to(device),
                                  photos.pose[o, views][None].to(device), K[o][None].to(device)))
               for o in range(len(photos.names))]
    return torch.cat(latents), (time.time() - began) / len(latents)


def main(argv=None):
    config = parse_config(Config, PRESETS, with_box(argv, Config))
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    photos, unseen = (read_photos(*some) for some in ((config.data, model.config.size),
                                                      (config.unseen, model.config.size, config.objects)))
    count, size = photos.rgb.shape[1], photos.size
    if photos.names[:len(names)] != names:
        raise UserError(f"--data {config.data}: the autodecoder was trained on other objects")
    if max(config.given) >= unseen.rgb.shape[1]:
        raise UserError(f"--given {max(config.given)}: {config.unseen} has {unseen.rgb.shape[1]} photos of "
                        "each object, of which one is needed to measure by")
    run = Run(config.out, "lift", config, [f.name for f in fields(Config) if f.name not in FREE])

    # Pairs of photos and latents: made ones, and the training objects' own (but for the held-out views)
    made, to_numbers, to_latents = to_learn(model, config)
    own = to_numbers(latents_of(model, model.codes))
    train = max(count - model.config.holdout_views, 1)
    generator, K = torch.Generator().manual_seed(config.seed), photos.intrinsics.clone()
    rgb, poses = made_photos(model, to_latents(made), photos.pose[:, :train].flatten(0, 1), K[0], size,
                             config.rendered, generator)
    K[:, :2] /= size
    torch.manual_seed(config.seed)
    network = Lift(config, made.shape[1], made.shape[2]).to(device)
    optimizer = torch.optim.Adam(network.parameters(), betas=BETAS)
    step = resume(run, model, {"network": network}, [optimizer])
    print(f"{len(made)} made and {len(own)} real objects; "
          f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters")

    with run:
        while step < config.steps:
            optimizer.param_groups[0]["lr"] = config.lr * learning_rate_share(step, config.steps, 0.03)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            # A step shows all its objects from equally many sides: one, two, four or eight
            real = torch.rand((), generator=generator) < config.real
            views = 2 ** torch.randint(4, (), generator=generator).item()
            target, *source = (own, photos.rgb[:, :train], photos.pose) if real else (made, rgb, poses)
            item = torch.randint(len(target), (config.batch,), generator=generator)
            seen = draw_views(*source, item, min(views, source[0].shape[1]), generator)
            lens = K[item] if real else K[:1].expand(len(item), 3, 3)      # made ones have the first one's
            seen = [some.to(device) for some in (*seen, lens)]

            with fast_precision(model.config, device):
                guess = network(*seen).float()
            loss = (guess - target[item.to(device)]).square().mean()
            improve(run, step, loss, optimizer)
            step += 1
            record(run, model, {"network": network}, [optimizer], step, config.steps,
                   {"real" if real else "made": loss, "views": views})

    # Unseen objects: the last photos, at most eight, measure all ways
    show, N = OfLatents(model), len(unseen.names)
    others = torch.arange(max(config.given), unseen.rgb.shape[1])[-8:]
    lines = [f"{N} unseen objects of {config.unseen}; PSNR on other photos in dB: full / over the object; "
             "seconds for each object"]
    for given in config.given:
        views = torch.arange(given)
        ways = {"lifted": lifted(network, unseen, views, to_latents, device)}
        began, first = time.time(), ways["lifted"][0]
        unit = first.std((0, 2, 3, 4), keepdim=True)                                   # one for each channel
        moved = torch.cat([descend(model, decoder_of(model), first[which], unit, unseen, views, which, 100,
                                   0.05, 3e-3, config.seed) for which in torch.arange(N).split(8)])
        ways["lifted, then 100 steps"] = moved, ways["lifted"][1] + (time.time() - began) / N
        if config.fit_steps:
            began = time.time()
            codes = fit_codes(model, unseen, views, config.fit_steps)
            ways["fit_codes"] = latents_of(model, codes), (time.time() - began) / N
        for name, (latents, seconds) in ways.items():
            rows = score_views(show, latents, unseen, range(N), others)
            lines.append(f"{given} photos  {name:<24} {mean_of(rows, 'ours'):5.2f} / "
                         f"{mean_of(rows, 'ours_fg'):5.2f}   {seconds:6.2f} s")
        columns = [torch.cat([unseen.rgb[o, others[:1]],
                              *(to_bytes(pictures(model, latents[o], unseen, o, others[:1]))
                                for latents, _ in ways.values())]) for o in range(min(N, 8))]
        save_preview(run.folder / f"lift_{given}.png", torch.stack(columns, 1))
    text = "\n".join(lines)
    print(text)
    save_text(run.folder / "lift.txt", text + "\n")
    plot_log(run.folder, "squared error of the latent", made="made objects", real="real photos")
    print(f"wrote {run.folder}: last.pt, lift.txt, curve.png, lift_{config.given[0]}.png (from above: photo, "
          f"{', '.join(ways)}; from {config.given[0]} photos).  Row L3: lifted "
          "from 1, 2 and 8 photos 21.63, 22.68 and 23.41 dB")


if __name__ == "__main__":
    command(main)

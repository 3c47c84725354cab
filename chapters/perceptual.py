"""
A chapter on stage 1: the perceptual loss.  3DADM compares features of pictures, not their pixels:

    loss = squared error, as in stage 1, + w sum over scales 1, 1/2, 1/4, layers l  | F_l(ours) - F_l(photo) |

The squared error of pixels has a blurred edge half-way between its neighbours: an edge at a slightly wrong
place costs twice what a blur costs.  The features F_l of a convolutional network answer to edges, dots and
textures, wherever they are within a few pixels, so a sharp edge near its place is better than a blur.
Features need neighbouring pixels, so a step draws square patches besides scattered rays.

3DADM's features are those of VGG-19, which was trained to name photos.  Nothing is downloaded here:
--weights takes a file of them.  Without one the same layers, a quarter as wide, have random weights.  For
losses between a picture and its target that does nearly as well (Liu et al. 2021, "Generic Perceptual Loss").

in   data/earphones_train/       as stage 1; --weights: a state dict with torchvision's names, of vgg19
out  runs/perceptual/            as stage 1; and details.txt, details.png
run  python -m chapters.perceptual            27.71 dB; stage 1 in a tenth more time 28.78 (A9, by Adam)
     python -m chapters.perceptual --weights vgg19.pth
read Features, perceptual_loss, draw_patches, details.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import autodecoder
from autodecoder import Autodecoder, draw_batch, load_autodecoder
from common import (RANK, UserError, command, fill, grid, load_newest, parse_config, pick_device,
                    save_picture, save_text, to_bytes)
from lab.metrics import colour_residual, read_weights
from shapes.packed import read_photos
from volume_render import pixel_rays, psnr, render_view


@dataclass
class Config(autodecoder.Config):
    out: str = "runs/perceptual"         # folder for the model, the log and the pictures
    steps: int = 2400                    # gradient steps (at least 1)
    perceptual_weight: float = 0.003     # of the features' error beside the pixels' (from 0 to 1000)
    patch: int = 24                      # pixels along a patch's side; one patch an object (at least 8)
    weights: str = ""                    # file of VGG-19's weights; "": random ones, a quarter as wide
    beside: str = "runs/autodecoder"     # stage 1's run, to compare with, if it is there


PRESETS = {"cpu": {}, "gpu": dict(autodecoder.PRESETS["gpu"], patch=48),
           "smoke": dict(autodecoder.PRESETS["smoke"], patch=8)}

# VGG-19's convolutions up to conv5_1: torchvision's number of each, and its width.  The features are read
# after the first of each block, and pooling comes before it
LAYERS = [(0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256), (16, 256),
          (19, 512), (21, 512), (23, 512), (25, 512), (28, 512)]
FIRST = (0, 5, 10, 19, 28)


class Features(nn.Module):
    def __init__(self, weights=""):
        super().__init__()
        self.trained, before = bool(weights), 3
        self.layers = nn.ModuleDict()
        generator = torch.Generator().manual_seed(0)
        for number, width in LAYERS:
            width //= 1 if weights else 4
            conv = nn.Conv2d(before, width, 3, padding=1).requires_grad_(False)
            # Random weights of this size keep the features' variance from layer to layer (He et al. 2015)
            noise = torch.randn(conv.weight.shape, generator=generator)
            conv.weight.copy_(math.sqrt(2 / (9 * before)) * noise)
            conv.bias.zero_()
            self.layers[str(number)], before = conv, width
        if weights:
            read_vgg(self.layers, weights)

    def forward(self, pictures):
        """(B,3,H,W) in [0, 1] -> the features after each block's first convolution"""
        # VGG was trained on photos that were normalised so; random weights only want the middle at 0
        mean, deviation = (((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if self.trained
                           else ((0.5, 0.5, 0.5), (0.3, 0.3, 0.3)))
        mean, deviation = (pictures.new_tensor(some)[:, None, None] for some in (mean, deviation))
        x = (pictures - mean) / deviation
        found = []
        for number, conv in self.layers.items():
            if int(number) in FIRST[1:]:
                if x.shape[-1] < 4:                                              # nothing is left to look at
                    break
                x = F.max_pool2d(x, 2)
            x = F.relu(conv(x))
            if int(number) in FIRST:
                found.append(x)
        return found


def read_vgg(layers, path):
    """Weights of a file with torchvision's names, checked"""
    state = read_weights(path, "--weights")
    wanted = {f"features.{number}.{kind}": some for number, conv in layers.items()
              for kind, some in conv.named_parameters()}
    for name, some in wanted.items():
        if name not in state or state[name].shape != some.shape:
            what = "has another shape" if name in state else "is not in it"
            raise UserError(f"--weights {path}: {name} {what}; torchvision's vgg19 is wanted")
    for name, some in wanted.items():
        some.copy_(state[name])


def perceptual_loss(features, ours, photo):
    """Pictures (B,3,S,S) -> mean absolute difference of features, summed over scales and layers"""
    loss = 0
    for scale in (1, 2, 4):
        pairs = zip(*(features(F.avg_pool2d(some, scale)) for some in (ours, photo)))
        loss = loss + sum((a - b).abs().mean() for a, b in pairs)
    return loss


def draw_patches(photos, config, views, generator):
    """As stage 1's draw_batch; but the first rays of each object are one patch, row by row"""
    side, n = config.patch, photos.size
    objects, *rays = draw_batch(photos, config, views, generator)
    B, o = len(objects), objects[:, None]
    # The patch lies around a pixel near the object, and inside the photo
    view = views[torch.randint(len(views), (B, 1), generator=generator)]
    u = torch.rand(B, 1, generator=generator, dtype=torch.float64)
    centre, _ = photos.pixel_near(o, view, u)                                                       # (B,1)
    inside = lambda some: (some - side // 2).clamp(0, n - side)[..., None, None]
    steps = torch.arange(side)
    y, x = torch.broadcast_tensors(inside(centre // n) + steps[:, None], inside(centre % n) + steps)
    y, x = y.flatten(1), x.flatten(1)                                                               # (B,S S)
    rgb, mask = photos.rgb[o, view, y, x].float() / 255, photos.mask[o, view, y, x].float() / 255
    patch = *pixel_rays(photos.pose[o, view], photos.intrinsics[o], x + 0.5, y + 0.5), rgb, mask
    photos.forget()
    keep = rays[0].shape[1] - side * side                           # the number of rays stays the recipe's
    return objects, *(torch.cat([new, old[:, :keep]], 1) for new, old in zip(patch, rays))


@torch.no_grad()
def details(model, photos, views):
    """-> means over the objects: PSNR, foreground, gradient energy as a share of the photos', and how far the
    colours are from the nearest four, ours and those in the photos"""
    rows = []
    for o, code in enumerate(model.codes):
        volume = model.volumes_of(code[None])
        shown = [render_view(model, volume, photos.pose[o, v], photos.intrinsics[o], photos.size)
                 for v in views]
        ours, alpha = (torch.stack([some[k] for some in shown]).cpu() for k in (0, 1))
        truth, mask = photos.rgb[o, views].float() / 255, photos.mask[o, views].float() / 255
        energy = lambda some: sum(some.diff(dim=d).square().sum() for d in (1, 2)).item()
        mean = lambda some: sum(some) / len(views)
        rows.append({"psnr": mean(map(psnr, ours, truth)),
                     "foreground": mean(map(psnr, ours, truth, mask > 0.5)),
                     "sharpness": energy(ours) / energy(truth), "colours": colour_residual(ours, alpha),
                     "in photos": colour_residual(truth, mask)})
        photos.forget()
    return {key: torch.tensor([row[key] for row in rows]).nanmean().item() for key in rows[0]}


@torch.no_grad()
def close_ups(models, photos, view, objects, enlarge=3):
    """Rows: the photo, then each model"""
    rows = [photos.rgb[objects, view]]
    for model in models:
        rows.append(to_bytes(torch.stack([
            render_view(model, model.volumes_of(model.codes[o][None]), photos.pose[o, view],
                        photos.intrinsics[o], photos.size)[0] for o in objects])).cpu())
    pictures = torch.stack(rows).repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    return grid(pictures.flatten(0, 1), len(objects))


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    if config.patch > config.size or config.patch ** 2 >= config.rays // config.batch_objects:
        raise UserError(f"--patch {config.patch}: it must fit into a photo of {config.size} pixels, and into "
                        f"an object's {config.rays // config.batch_objects} rays")
    features, area = Features(config.weights), config.patch ** 2

    def more(rgb, target):
        square = lambda some: some[:, :area].mT.reshape(len(some), 3, config.patch, config.patch)
        found = perceptual_loss(features.to(rgb.device), square(rgb), square(target))
        return config.perceptual_weight * found
    autodecoder.main(argv, Config, PRESETS, Autodecoder, draw_patches, more)
    if RANK:
        return

    # What did it buy?
    state, device = load_newest(config.out, "names", "model"), pick_device(config.device)
    ours = fill(Autodecoder(config, len(state["names"])), state["model"], config.out).to(device).eval()
    models, photos = {"perceptual": ours}, read_photos(config.data, config.size, config.objects)
    if Path(config.beside, "last.pt").is_file():
        model, names = load_autodecoder(config.beside, device)
        if names == photos.names and model.config.size == config.size:
            models = {"stage 1": model} | models
    views = photos.split(config.holdout_views)[1].tolist()
    found = {name: details(model, photos, views) for name, model in models.items()}
    lines = [f"{'held-out views':<14} {'PSNR':>8} {'foreground':>11} {'gradient energy':>16} {'off 4':>10}"]
    lines += [f"{name:<14} {m['psnr']:>8.2f} {m['foreground']:>11.2f} {m['sharpness']:>16.3f} "
              f"{m['colours']:>10.4f}" for name, m in found.items()]
    lines += [f"{'the photos':<35} {1:>16.3f} {found['perceptual']['in photos']:>10.4f}"]
    save_text(Path(config.out, "details.txt"), "\n".join(lines) + "\n")
    some = torch.linspace(0, len(photos.names) - 1, min(len(photos.names), 8)).long().tolist()
    save_picture(Path(config.out, "details.png"), close_ups(models.values(), photos, views[0], some))
    print(*lines, f"wrote {config.out}: as stage 1, details.txt, details.png (row A9: 27.71 dB)", sep="\n")


if __name__ == "__main__":
    command(main)

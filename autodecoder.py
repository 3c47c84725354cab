"""
Stage 1 of 3: fit the autodecoder.  One learned code e_i per object and one decoder G explain every photo:

    min over e, G    mean_{i,v} | render(G(e_i), camera_v) - photo_{i,v} |^2  + regularisers

There is no encoder: a code is found by gradient descent on it, for the training objects together with the
decoder, for new objects (fit_codes) with the decoder frozen.  G is split where stage 2 will diffuse:

    code e (256) --G1--> latent volume (16 x 8^3) --G2--> volume (4 x 32^3) --render--> photo

in   data/earphones_train/       photos and cameras; made by stage 0 first, if they are not there
out  runs/autodecoder/           last.pt, log.jsonl, previews/, table.txt, curve.png, figure1.png
run  python autodecoder.py                                       72 objects: 31.34 dB, 6 to 11 min (row A1)
     python autodecoder.py --objects 1 --steps 1000 --out runs/one   one: 31.1 dB, Figure 2
     python autodecoder.py --fit data/earphones_test --views 2       new objects, from two photos each
     python autodecoder.py --preset smoke --out runs/smoke           checks the plumbing, not the quality
read Config, draw_batch, reconstruction_loss, fit_codes, main; and decoder.py, views.py.
"""
import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import render_shapenet
from common import (Run, UserError, at_least, atomic_file, load_stage, new_figure, parse_config, pick_device,
                    plot_log, save_figure)
from decoder import Autodecoder, fast_precision
from lab.metrics import largest_piece, psnr
from shapes.photos import read_photos
from views import decode, depth_picture, preview, render_view, save_preview
from volume_render import occupancy, render, voxel_opacity


@dataclass
class Config:
    data: str = "data/earphones_train"   # a folder of photos in the SRN layout
    out: str = "runs/autodecoder"        # folder for the model, the log and the pictures
    objects: int = 0                     # how many of the folder's objects to learn; 0: all
    size: int = 64                       # pixels along a photo's side
    holdout_views: int = 8               # of each object, the last photos: not trained on, but measured by
    # the decoder
    latent: str = "code"                 # code | grid: a vector per object, or a small volume of its own
    code_width: int = 256                # numbers in a code
    latent_resolution: int = 8           # 4 | 8 | 16: voxels along a side of the latent volume
    latent_channels: int = 16            # numbers in a latent voxel
    channels: str = "64,32"              # of G2's levels, from the latent's resolution up, each doubling it
    children: int = 2                    # 1 | 2: voxels a side that each voxel of the last level becomes
    blocks: int = 1                      # residual blocks a level
    attention: bool = False              # self-attention at the latent's resolution, as 3DADM has
    coordinates: bool = False            # each block sees where its voxels are ("position concatenation")
    grid: str = "3d"                     # 3d | 2d: a volume, or three feature planes (with the mlp head)
    head: str = "voxel"                  # voxel | mlp: density and colour, or features that a small MLP reads
    features: int = 8                    # channels of the volume that the mlp head reads
    mlp_width: int = 32                  # of the mlp head
    bands: int = 4                       # octaves of sines and cosines of the position that the mlp head sees
    # rendering
    samples: int = 48                    # bins along a ray
    transmittance: str = "exclusive"     # exclusive | inclusive: the second is a common slip, for the lesson
    dense_steps: int = 200               # then empty space is skipped: until then shapes may be born anywhere
    # training
    steps: int = 6000                    # gradient steps
    batch_objects: int = 8               # objects a step
    batch_views: int = 30                # photos of each object that a step draws its rays from
    rays: int = 8192                     # rays a step, shared by its objects
    foreground: float = 0.5              # share of the rays drawn near the object; the others from anywhere
    decoder_lr: float = 8e-3             # Adam's, at its highest
    code_lr: float = 1e-2                # the codes'
    mask_weight: float = 0.1             # of the squared error of the opacity
    code_decay: float = 1e-4             # of the mean square of the codes
    smoothness: float = 0.0              # of the volume's total variation
    latent_noise: float = 0.0            # added to the latents in training, so that G2 forgives stage 2
    mixture_penalty: float = 0.0         # of half-transparency where two codes are mixed: decode without fog
    precision: str = "auto"              # auto | bf16 | float32: of the convolutions; auto asks the hardware
    seed: int = 0                        # of the weights, the codes and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines
    preview_every: int = 500             # steps between previews and held-out PSNR
    save_every: int = 250                # steps between checkpoints
    fresh: bool = False                  # throw away what is in --out and start over
    # new objects
    fit: str = ""                        # a folder of unseen objects: fit their codes, train nothing
    views: int = 2                       # photos of each that the fit sees; 0: all but 8; others measure it
    fit_objects: int = 24                # how many of the folder's objects; 0: all
    fit_steps: int = 400                 # gradient steps for each batch of codes
    fit_lr: float = 0.1                  # Adam's, on codes in units of the training codes' deviation
    fit_decay: float = 1e-3              # pull towards the training codes' mean; matters with few views


GPU = dict(size=128, channels="128,64,32", rays=32768, batch_objects=8, samples=96, steps=12000,
           dense_steps=1000, code_width=256, preview_every=2000, save_every=1000)
PRESETS = {
    "cpu": {},
    "gpu": GPU,
    "smoke": dict(size=32, objects=4, steps=40, channels="16", code_width=16, rays=512, batch_objects=2,
                  samples=24, dense_steps=20, preview_every=20, save_every=20, log_every=5, fit_steps=5,
                  fit_objects=2),
    # What knobs can express of the paper's notebook; not its cropped 90-degree camera, nor its dead ReLU
    "seed": dict(transmittance="inclusive", coordinates=True, latent_resolution=4, channels="32,16,16,16",
                 children=1, head="mlp", mask_weight=0.0, foreground=0.0, batch_objects=1, batch_views=1,
                 code_decay=0.0),
    "3dadm": GPU | dict(code_width=1024, latent_channels=256, channels="256,128,64,32", children=1,
                        blocks=4, attention=True, samples=128, batch_views=4, decoder_lr=5e-4, code_lr=5e-4),
}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh", "fit", "views", "fit_objects",
        "fit_steps", "fit_lr", "fit_decay")
RECIPE = tuple(field.name for field in fields(Config) if field.name not in FREE)


def load_autodecoder(folder, device="cpu"):
    """The trained model of a run, built from the config it was trained with -> model in eval mode, names"""
    return build_autodecoder(load_stage(folder, "stage 1's model", "autodecoder.py", "model"), device)


def build_autodecoder(state, device="cpu"):
    model = Autodecoder(Config(**state["config"]), len(state["names"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval().requires_grad_(False), state["names"]


# ---------------------------------------------------------------------------------------------------- data

def kinds_of(folder, names):
    """A label for each object where the data has one: our earphones' kind"""
    files = [Path(folder, name, "factors.json") for name in names]
    return [json.loads(file.read_text())["kind"] if file.exists() else "objects" for file in files]


def draw_batch(photos, config, views, generator, objects=None):
    """-> objects (B,), origins and directions (B,R,3), their colours (B,R,3) and opacities (B,R).  A share
    of the rays (`foreground`) is drawn where the object is: most of a photo is white, and teaches little."""
    if objects is None:
        objects = torch.randperm(len(photos.names), generator=generator)[:config.batch_objects]
    B, n, o = len(objects), photos.size, objects[:, None]
    R = config.rays // B
    seen = torch.rand(B, len(views), generator=generator).argsort(1)[:, :config.batch_views]   # (B,V)
    view = views[seen.gather(1, torch.randint(seen.shape[1], (B, R), generator=generator))]    # (B,R)
    u = torch.rand(B, R, generator=generator, dtype=torch.float64)
    near = photos.near_start[o, view] + (u * photos.near_count[o, view]).long()
    near = photos.near[near.clamp(max=len(photos.near) - 1)]
    anywhere = (torch.arange(R) >= int(config.foreground * R)) | (photos.near_count[o, view] == 0)
    pixel = torch.where(anywhere, (u * n * n).long(), near)
    origins, directions = rays_through(photos, o, view, pixel)
    y, x = pixel // n, pixel % n
    rgb, mask = photos.rgb[o, view, y, x].float() / 255, photos.mask[o, view, y, x].float() / 255
    return objects, origins, directions, rgb, mask


def rays_through(photos, o, view, pixel):
    """camera_rays() for single pixels, each of its own photo."""
    pose, K = photos.pose[o, view], photos.intrinsics[o]                           # (B,R,4,4), (B,1,3,3)
    x, y = pixel % photos.size + 0.5, pixel // photos.size + 0.5
    x, y = (x - K[..., 0, 2]) / K[..., 0, 0], (y - K[..., 1, 2]) / K[..., 1, 1]
    directions = pose[..., :3, :3] @ torch.stack([x, y, torch.ones_like(x)], -1)[..., None]
    return pose[..., :3, 3], directions[..., 0]                                    # (B,R,3)


# ---------------------------------------------------------------------------------------------------- loss

def reconstruction_loss(model, volume, batch, config, generator, skip_empty, has_masks=True):
    """-> loss; and to log, the error of colour and the mean opacity (0 or 1 is a collapse)"""
    origins, directions, target, opacity = batch
    occupied = occupancy(volume, model.field) if skip_empty else None
    rgb, alpha, _ = render(volume, origins, directions, config.samples, model.field, generator, occupied,
                           transmittance=config.transmittance)
    photo = (rgb - target).square().mean()
    mask = (alpha - opacity).square().mean() if has_masks else torch.zeros((), device=photo.device)
    return photo + config.mask_weight * mask, photo, alpha.mean()


def total_variation(volume):
    return sum(volume.diff(dim=d).abs().mean() for d in (2, 3, 4))


def fog(model, generator, count):
    """How half-transparent the volumes of random mixtures of two codes are: 0 where all is empty or solid."""
    pairs = torch.randint(len(model.codes), (count, 2), generator=generator)
    weight = torch.rand(count, 1, generator=generator).to(model.codes.device)
    mixed = weight * model.codes[pairs[:, 0]] + (1 - weight) * model.codes[pairs[:, 1]]
    alpha = voxel_opacity(model.to_volume(model.to_latent(mixed)), model.field)
    return (alpha * (1 - alpha)).mean()


def on_device(generator, device):
    seed = generator.initial_seed()
    return generator if device.type == "cpu" else torch.Generator(device).manual_seed(seed)


# ----------------------------------------------------------------------------------------------- new objects

def fit_codes(model, photos, views, config, device):
    """Test-time auto-decoding: codes of unseen objects from the photos `views` (indices) of each, the decoder
    frozen.

    Started at the mean of the training codes: from a random start it often ends elsewhere.  The pull back
    towards the training codes' own distribution decides what one photo does not show."""
    mean, deviation = model.codes.mean(0), model.codes.std(0) + 1e-6
    recipe = replace(model.config, rays=config.rays, batch_views=len(views))
    fitted, cast = [], fast_precision(model.config, device)
    for objects in torch.arange(len(photos.names)).split(8):
        z = torch.zeros(len(objects), len(mean), device=device, requires_grad=True)    # in deviations
        optimizer = torch.optim.Adam([z], config.fit_lr)
        for step in range(config.fit_steps):
            share = (1 + math.cos(math.pi * step / config.fit_steps)) / 2
            optimizer.param_groups[0]["lr"] = config.fit_lr * share
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            batch = [t.to(device) for t in draw_batch(photos, recipe, views, generator, objects)[1:]]
            with cast():
                volume = model.to_volume(model.to_latent(mean + deviation * z))
            loss, *_ = reconstruction_loss(model, volume, batch, recipe, on_device(generator, device), True,
                                           photos.has_masks)
            loss = loss + config.fit_decay * z.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        fitted.append((mean + deviation * z).detach())
    return torch.cat(fitted)


# ------------------------------------------------------------------------------------------------- measuring

MEASURES = ("ours", "ours_fg", "white", "white_fg", "mean", "mean_fg", "fog", "piece")


def measure(model, codes, photos, objects, views, device, mean_photo):
    """These views of these objects, whose codes are given -> a dict a view: PSNR of ours, of a white picture
    and of the mean photo, each full and foreground; opacity beyond 2 px of the silhouette; largest piece."""
    rows = []
    for o, code in zip(objects, codes):
        volume = decode(model, code, device)
        piece = largest_piece(voxel_opacity(volume, model.field)[0] > 0.5)
        for v in views:
            truth, mask = photos.rgb[o, v].float() / 255, photos.mask[o, v] > 127
            view = render_view(model, volume, photos.pose[o, v], photos.intrinsics[o], photos.size)
            rgb, alpha, _ = (t.cpu() for t in view)
            pictures = (rgb, torch.ones_like(rgb), mean_photo)
            beyond = F.max_pool2d((photos.mask[o, v] > 0).float()[None, None], 5, 1, 2)[0, 0] == 0
            numbers = [psnr(p, truth, m) for p in pictures for m in (None, mask)]
            rows.append({"object": o, **dict(zip(MEASURES, [*numbers, alpha[beyond].mean().item(), piece]))})
    return rows


def mean_of(rows, key):
    values = [row[key] for row in rows if not math.isnan(row[key])]
    return sum(values) / max(len(values), 1)


def table(rows, kinds):
    """The closing table: means by kind of object, ours beside a white picture and the mean training photo."""
    lines = [f"{'PSNR, dB: full / foreground':<28} {'ours':>13}   {'all white':>13}   {'mean photo':>13}   "
             f"{'opacity beyond 2 px':>19}   {'largest piece':>13}"]
    for kind in [*sorted(set(kinds)), "all"]:
        chosen = [row for row in rows if kind in (kinds[row["object"]], "all")]
        m = {key: mean_of(chosen, key) for key in MEASURES}
        count = len({row["object"] for row in chosen})
        pairs = "   ".join(f"{m[key]:5.2f} / {m[key + '_fg']:5.2f}" for key in ("ours", "white", "mean"))
        lines.append(f"{kind:<16} {count:>3} objects   {pairs}   {m['fog']:>19.4f}   {m['piece']:>13.3f}")
    return "\n".join(lines)


def mean_photo(photos, views):
    return photos.rgb[:, views].float().mean((0, 1)) / 255


# -------------------------------------------------------------------------------------------------- pictures

@torch.no_grad()
def figure1(model, photos, path, device, o=0):
    """The pipeline, from real tensors: code, latent, volume, a held-out view, its depth, the photo."""
    code = model.codes[o]
    latent, volume = model.to_latent(code[None]), decode(model, code, device)
    opacity = voxel_opacity(volume, model.field)[0]
    rgb, alpha, depth = render_view(model, volume, photos.pose[o, -1], photos.intrinsics[o], photos.size)
    side = math.ceil(len(code) ** 0.5)
    square = F.pad(code, (0, side * side - len(code))).view(side, side)
    middle = latent[0, 0, 0] if model.planes else latent[0, 0, latent.shape[2] // 2]
    panels = [("code e", square, "RdBu"), ("latent G1(e)\none channel, one slice", middle.flip(0), "RdBu"),
              ("volume G2(G1(e))\ndensest along y", opacity.amax(1).flip(0), "Greys"),
              ("rendered", rgb.clamp(0, 1), None), ("its depth", depth_picture(depth, alpha), None),
              ("photo, held out", photos.rgb[o, -1].float() / 255, None)]
    figure, axes = new_figure(1, len(panels), figsize=(13, 2.6))
    for axis, (title, picture, colours) in zip(axes, panels):
        axis.imshow(picture.cpu().numpy(), cmap=colours)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    save_figure(figure, path)


# ------------------------------------------------------------------------------------------------------ main

def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    at_least(config, objects=0, size=8, samples=2, steps=1, batch_objects=1, batch_views=1, rays=64,
             log_every=1, preview_every=1, save_every=1, views=0, fit_objects=0, fit_steps=1)
    device = pick_device(config.device)
    if config.fit:
        return fit(config, device)
    if not Path(config.data).exists() and config.data == Config.data:
        print(f"{config.data} is not there: making it first, as python render_shapenet.py does")
        render_shapenet.main([])
    photos = read_photos(config.data, config.size, config.objects)
    count = photos.rgb.shape[1]
    if not 1 <= config.holdout_views < count:
        raise UserError(f"--holdout_views {config.holdout_views}: {config.data} has {count} photos of each "
                        "object, of which at least one is to be held out to measure by, and one to train on")
    train_views, test_views = torch.arange(count).split([count - config.holdout_views, config.holdout_views])
    ours = ("config.json", "last.pt", "previous.pt", "log.jsonl", "previews")
    stale = [Path(config.out, name) for name in ours] if config.fresh else ()
    run = Run(config.out, config, RECIPE, stale=stale)

    torch.manual_seed(config.seed)
    model = Autodecoder(config, len(photos.names)).to(device)
    decoder = [p for name, p in model.named_parameters() if name != "codes"]
    optimizer = torch.optim.Adam([{"params": decoder}, {"params": [model.codes]}], betas=(0.9, 0.99))
    state, step = run.load(), 0
    if state:
        if state["names"] != photos.names:
            raise UserError(f"{config.out} was trained on other objects than those in {config.data}: use "
                            "another --out, or --fresh")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"going on from step {step} of {config.out}/last.pt")
    size = sum(p.numel() for p in decoder) / 1e6
    print(f"{len(photos.names)} objects, {len(train_views)} views each to train and {len(test_views)} held "
          f"out; decoder of {size:.2f} M parameters")
    cast, white = fast_precision(config, device), mean_photo(photos, train_views)
    shown = torch.linspace(0, len(photos.names) - 1, min(len(photos.names), 8)).long().tolist()

    with run:
        while step < config.steps:
            # Warm-up, then half a cosine
            share = min(1.0, (step + 1) / (0.05 * config.steps))
            share *= 0.515 + 0.485 * math.cos(math.pi * step / config.steps)
            for group, rate in zip(optimizer.param_groups, (config.decoder_lr, config.code_lr)):
                group["lr"] = rate * share
            # All that is random in a step follows from (seed, step): resuming needs the step's number alone
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            objects, *batch = [t.to(device) for t in draw_batch(photos, config, train_views, generator)]
            with cast():
                latent = model.to_latent(model.codes[objects])
                if config.latent_noise:
                    noise = torch.randn(latent.shape, generator=generator).to(device)
                    latent = latent + config.latent_noise * noise
                volume = model.to_volume(latent)
            skip_empty = step >= config.dense_steps
            jitter = on_device(generator, device)
            loss, photo, alpha = reconstruction_loss(model, volume, batch, config, jitter, skip_empty,
                                                     photos.has_masks)
            loss = loss + config.code_decay * model.codes.square().mean()
            if config.smoothness:
                loss = loss + config.smoothness * total_variation(volume)
            if config.mixture_penalty:
                loss = loss + config.mixture_penalty * fog(model, generator, 2)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if run.finite(step, loss.item() + norm.item()):
                optimizer.step()
            step += 1

            if step % config.log_every == 0 or step == config.steps:
                run.log(step, config.steps, loss=loss.item(), psnr=-10 * math.log10(photo.item() + 1e-10),
                        alpha=alpha.item(), lr=share * config.decoder_lr)
            if step % config.preview_every == 0 or step == config.steps:
                rows = measure(model, model.codes[shown], photos, shown, test_views[:4], device, white)
                full, foreground = mean_of(rows, "ours"), mean_of(rows, "ours_fg")
                run.log(step, config.steps, show=False, heldout=full, heldout_foreground=foreground)
                run.say(f"step {step}: held-out views of {len(shown)} objects: {full:.2f} dB, "
                        f"foreground {foreground:.2f} dB")
                save_preview(run.folder / f"previews/step_{step:06d}.png",
                             preview(model, model.codes[shown], photos, shown, test_views[0], device))
            if step % config.save_every == 0 or step == config.steps or run.stopping:
                run.save({"config": asdict(config), "names": photos.names, "step": step,
                          "model": model.state_dict(), "optimizer": optimizer.state_dict()})
            if run.stopping:
                raise UserError(f"stopped by {run.stopping} at step {step}, saved: the same command goes on "
                                "from there")

    rows = measure(model, model.codes, photos, range(len(photos.names)), test_views, device, white)
    print(table(rows, kinds_of(config.data, photos.names)))
    with atomic_file(run.folder / "table.txt") as temporary:
        temporary.write_text(table(rows, kinds_of(config.data, photos.names)) + "\n")
    plot_log(run.folder, "PSNR (dB)", psnr="training rays", heldout="held-out views",
             heldout_foreground="held-out views, foreground")
    figure1(model, photos, run.folder / "figure1.png", device)
    if len(photos.names) == 1:                       # the paper's Figure 2: trained, truth, depth
        truth, ours, depth = preview(model, model.codes, photos, [0], test_views[0], device)
        save_preview(run.folder / "figure2.png", torch.stack([ours, truth, depth], 1))
    names = ["last.pt", "table.txt", "curve.png", "figure1.png", "previews/"]
    print(f"wrote {run.folder}: " + ", ".join(names + ["figure2.png"] * (len(photos.names) == 1)))


def fit(config, device):
    """--fit FOLDER: codes for objects that training never saw, from few photos; measured on the others."""
    model, _ = load_autodecoder(config.out, device)
    photos = read_photos(config.fit, model.config.size, config.fit_objects)
    count = photos.rgb.shape[1]
    given = config.views or count - 8
    if not 1 <= given < count:
        raise UserError(f"--views {config.views}: {config.fit} has {count} photos of each object, and at "
                        "least one is wanted to measure by")
    began = time.time()
    codes = fit_codes(model, photos, torch.arange(given), config, device)
    seconds = (time.time() - began) / len(codes)
    others = torch.arange(max(given, count - 8), count)
    everything = range(len(codes))
    rows = measure(model, codes, photos, everything, others, device, mean_photo(photos, torch.arange(count)))
    print(f"{len(codes)} unseen objects of {config.fit}, codes fitted to {given} photos each in "
          f"{seconds:.1f} s, measured on {len(others)} others")
    print(table(rows, kinds_of(config.fit, photos.names)))
    shown = torch.linspace(0, len(codes) - 1, min(len(codes), 8)).long().tolist()
    path = Path(config.out, f"fit_{given}_views.png")
    save_preview(path, preview(model, codes[shown], photos, shown, others[0], device))
    print(f"wrote {path}: truth, ours, depth")


if __name__ == "__main__":
    main()

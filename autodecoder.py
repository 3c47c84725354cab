"""
Stage 1 of 3: fit the autodecoder.  One learned code e_i per object and one decoder G explain every photo:

    min over e, G    mean_{i,v} | render(G(e_i), camera_v) - photo_{i,v} |^2  + mask and code terms

There is no encoder.  A code is found by gradient descent on its numbers: together with the decoder for the
training objects, and with the decoder frozen for new objects (fit_codes).  G has two halves, because stage 2
diffuses what lies between them:

    code e (140) --G1--> latent volume (25 x 8^3) --G2--> volume (4 x 32^3) --render--> photo

A code is 3 stretches along x, y and z, 128 numbers for the shape, and 9 for the palette.  Only the shape is
learned.  The palette is measured in the photos: the mean m of an object's colours, and the symmetric root R
of their covariance (which is R R).  The decoder gives each voxel three numbers w, its pattern, and the colour
is m + R w: any shape can have any palette.  Stage 1 also trains with photos that nobody took: objects in
others' palettes (all light is equal from everywhere, so a photo holds the materials' colours alone), and
wider or taller ones.

in   data/earphones_train/       photos and cameras; made by stage 0 first, if they are not there
out  runs/autodecoder/           last.pt, log.jsonl, previews/, table.txt, curve.png, figure1.png
run  python autodecoder.py                                       72 objects: 31.62 dB (row A14)
     python autodecoder.py --objects 1 --steps 1000 --out runs/one   one object: 31.42 dB
read Config, Autodecoder, draw_batch, photos_nobody_took, reconstruction_loss, Muon, main; fit_codes.
"""
# First, because it makes Ctrl-C one line, also while torch loads
from common import (Run, UserError, command, digest, fill, fill_optimizer, first_then_others, judge,
                    load_stage, my_share, parse_config, pick_device, save_figure, save_preview, save_text,
                    saved_config, together)
import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
import render_shapenet
from shapes.packed import read_photos
from shapes.photos import kinds_of
from volume_render import (draw_pipeline, mean_of, occupancy, pixel_rays, render, score_views, table,
                           truth_and_ours)

@dataclass
class Config:
    data: str = "data/earphones_train"   # a folder of photos in the SRN layout (shapes/README.md)
    out: str = "runs/autodecoder"        # folder for the model, the log and the pictures
    objects: int = 0                     # how many of the folder's objects to learn; 0: all
    size: int = 64                       # pixels along a photo's side (at least 8)
    holdout_views: int = 8               # the last photos of each object only measure the result (at least 1)
    # the decoder
    shape_width: int = 128               # numbers in a code that say the shape (at least 1)
    latent_resolution: int = 8           # voxels along a side of the latent volume (at least 1)
    latent_channels: int = 25            # numbers in a latent voxel; the last 9 are the palette (at least 10)
    channels: tuple = (64, 32)           # G2's levels; each after the first doubles the side (at least 1)
    # rendering
    samples: int = 48                    # bins along a ray (at least 2)
    dense_steps: int = 200               # steps before empty space is skipped: shapes must be born first
    # photos that nobody took
    recolour: float = 0.5                # objects in other colours, share at the first step (from 0 to 1)
    stretched: float = 0.5               # and share of stretched objects.  Both fall to 0 (from 0 to 1)
    stretch: float = 0.14                # log of the largest, before the diagonal is 1 again (from 0.01 to 1)
    # training
    steps: int = 6000                    # gradient steps (at least 1)
    batch_objects: int = 8               # objects in a step (at least 1)
    batch_views: int = 30                # photos of each object that a step draws its rays from (at least 1)
    rays: int = 8192                     # rays in a step, shared by its objects (at least 64)
    foreground: float = 0.5              # share of the rays drawn near the object (from 0 to 1)
    decoder_lr: float = 8e-3             # the decoder's learning rate, at its highest
    code_lr: float = 1e-2                # the codes' learning rate, at its highest; thousands: 3e-2
    lr_floor: float = 0.03               # of both at the end, as a share of the highest (from 0 to 1)
    mask_weight: float = 0.1             # weight of the opacity's squared error
    code_decay: float = 1e-4             # weight of the shapes' mean square: keeps codes near each other
    precision: str = "auto"              # auto | bf16 | float32: of the convolutions; auto asks the hardware
    seed: int = 0                        # of the weights, the codes and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines (at least 1)
    preview_every: int = 500             # steps between previews and held-out PSNR (at least 1)
    save_every: int = 250                # steps between checkpoints (at least 1)
    fresh: bool = False                  # throw away the run in --out and start over

PRESETS = {
    "cpu": {},
    "gpu": dict(size=128, channels=(128, 64, 32), rays=32768, samples=96, steps=12000, dense_steps=1000,
                preview_every=2000, save_every=1000),
    "smoke": dict(size=32, objects=4, steps=40, channels=(16,), shape_width=8, rays=512,
                  batch_objects=2, samples=12, dense_steps=20, preview_every=20, save_every=20, log_every=5),
    # The paper's notebook: one photo of one object per step, rays from anywhere, no mask, a small latent
    "notebook": dict(latent_resolution=4, channels=(32, 16, 16), mask_weight=0.0, foreground=0.0,
                     batch_objects=1, batch_views=1, code_decay=0.0, recolour=0.0, stretched=0.0)}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh")   # may change on resume

# ------------------------------------------------------------------------------------------------ the decoder
GAIN = 10.0                        # density = softplus(GAIN * channel): a surface must fit between two voxels
BORN = -0.2                        # the density channel at first: thin fog, which any seed can shape
GREY = 0.5, 0.5, 0.5, 0.25, 0, 0, 0.25, 0, 0.25    # a palette until one is measured: mean, R's upper triangle
PALETTE, PAINT = len(GREY), 10.0   # palettes stand in latents times PAINT: distances then see colours too

class Block(nn.Module):
    """Two 3^3 convolutions, each after a norm and a nonlinearity, around a skip."""
    def __init__(self, width):
        super().__init__()
        # One group: on a CPU, with channels last, eight groups make the norm's gradient 20 times slower
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1, self.conv2 = nn.Conv3d(width, width, 3, padding=1), nn.Conv3d(width, width, 3, padding=1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))

class Autodecoder(nn.Module):
    """The codes of all training objects, and the decoder that they share, in three steps:
    to_latent (G1), to_volume (G2), and `field`, which the renderer calls with looked-up channels."""
    def __init__(self, config, objects):
        super().__init__()
        self.config, widths, first = config, config.channels, config.channels[0]
        self.shapes = nn.Parameter(torch.normal(0.0, 0.1, (objects, config.shape_width)))
        self.register_buffer("palettes", torch.tensor(GREY).repeat(objects, 1))  # measured, and not learned
        # G1: the code is spread over 4^3 voxels, enlarged to the latent's resolution, and narrowed to a few
        # channels.  Stage 2 will diffuse these: the fewer, the easier
        self.spread = nn.Linear(3 + config.shape_width, first * 4 ** 3)
        self.g1 = nn.Sequential(Block(first), nn.Conv3d(first, config.latent_channels - PALETTE, 1))

        # G2: one block at each level.  Between two levels the channels are narrowed *before* the resolution
        # doubles, because the finest level costs the most
        self.enter = nn.Conv3d(config.latent_channels - PALETTE, first, 3, padding=1)
        self.levels = nn.ModuleList([nn.Sequential(Block(width)) for width in widths])
        self.narrow = nn.ModuleList([nn.Conv3d(a, b, 1) for a, b in zip(widths, widths[1:])])
        # The last doubling is nearly free: each voxel of the last level names its eight children, of four
        # channels each (density and the pattern).  A whole level at that resolution takes twice the time
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[-1]), nn.SiLU(),
                                   nn.Conv3d(widths[-1], 4 * 8, 3, padding=1))
        # A volume that is born empty has no gradient: the paper's notebook "might have to run multiple times"
        nn.init.constant_(self.leave[-1].bias[:8], BORN)           # the density of a voxel's eight children

    def code(self, stretch, s, palettes):
        """Log stretches (B,3), shapes of objects s (B,), palettes (B,9) -> codes (B,W)"""
        return torch.cat([stretch / self.config.stretch, self.rows(self.shapes, s), palettes], 1)

    def rows(self, table, which):
        # Sparse gradients have rows for these objects alone: ten objects cost the same as a million
        return F.embedding(which.to(table.device), table, sparse=True)

    @property
    def codes(self):
        """The objects as they are: each in its own colours, not stretched -> (N,W)"""
        every = torch.arange(len(self.shapes), device=self.shapes.device)
        return self.code(self.shapes.new_zeros(len(every), 3), every, self.palettes)

    def to_latent(self, codes):
        """G1: (B,W) -> (B,C,r,r,r).  Each voxel repeats the palette, so that a latent alone says all"""
        r, palettes = self.config.latent_resolution, PAINT * codes[:, -PALETTE:, None, None, None]
        x = self.spread(codes[:, :-PALETTE]).view(len(codes), -1, 4, 4, 4)
        return torch.cat([self.g1(packed(resize(x, r))).float(), palettes.expand(-1, -1, r, r, r)], 1)

    def to_volume(self, latent):
        """G2: (B,C,r,r,r) -> (B,4,D,H,W) before activation"""
        x = self.enter(packed(latent[:, :-PALETTE]))
        for k, level in enumerate(self.levels):
            x = level(x if k == 0 else packed(resize(self.narrow[k - 1](x), 2 * x.shape[-1])))
        x = unfold_children(self.leave(x), self.leave[-1].out_channels // 8).float()
        # The pattern in the palette's colours, m + R w: as logits, because `field` ends with a sigmoid.  In a
        # latent that is not from G1 voxels may disagree about the palette, so their mean counts
        m, R = mean_and_root(latent[:, -PALETTE:].float().mean((2, 3, 4), keepdim=True) / PAINT)
        colour = m + (R * x[:, None, 1:4]).sum(2)
        # logit(0) and logit(1) are infinite, so colours end at 0.01 and 0.99.  A chapter adds channels
        return torch.cat([x[:, :1], torch.logit(colour, 0.01), x[:, 4:]], 1)

    def field(self, channels, position):
        """What was looked up (...,4) -> density (...), colour (...,3).  Only chapters/ need the position"""
        return F.softplus(GAIN * channels[..., 0]), torch.sigmoid(channels[..., 1:4])

    def volumes_of(self, codes):
        """G2(G1(codes)), with fast convolutions: (B,W) -> (B,4,D,H,W)"""
        with fast_precision(self.config, codes.device):
            return self.to_volume(self.to_latent(codes))

def packed(x):
    return x.contiguous(memory_format=torch.channels_last_3d)    # 3D convolutions take half the time on a CPU

def resize(x, size):
    return x if x.shape[-1] == size else F.interpolate(x, size=(size,) * 3, mode="trilinear")

def palette_code(mean, covariance):
    """Mean (N,3) and covariance (N,3,3) of objects' colours -> palettes (N,9)"""
    # The root of a symmetric matrix has its eigenvectors, and the roots of its eigenvalues
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag_embed(values.clamp(min=1e-12) ** 0.5) @ vectors.mT
    row, column = torch.triu_indices(3, 3)                     # of a symmetric matrix six numbers are enough
    return torch.cat([mean, root[:, row, column]], 1)

def mean_and_root(palettes):
    """palettes (B,9,...) -> m (B,3,...) and R (B,3,3,...): its lower triangle mirrors the upper one"""
    return palettes[:, :3], palettes[:, [3, 4, 5, 4, 6, 7, 5, 7, 8]].unflatten(1, (3, 3))

def unfold_children(x, width):
    """(B,8C,n,n,n) -> (B,C,2n,2n,2n): eight numbers of a voxel become the 2^3 voxels in its place"""
    B, _, n, _, _ = x.shape
    x = x.view(B, width, 2, 2, 2, n, n, n).permute(0, 1, 5, 2, 6, 3, 7, 4)          # (B,C,n,2,n,2,n,2)
    return x.reshape(B, width, 2 * n, 2 * n, 2 * n)

def fast_precision(config, device):
    """A context in which convolutions run in bf16 (16-bit floats with float32's range) where the hardware
    has it: twice as fast.  Rendering and losses stay float32."""
    # torch says this of a CPU only by a private name.  A torch without that name gets float32
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    known = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu()
    enabled = config.precision == "bf16" or config.precision == "auto" and known
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

def load_autodecoder(folder, device="cpu"):
    """The trained model of a run, built from the config that it was trained with -> model, objects' names"""
    state = load_stage(folder, "stage 1's model", "autodecoder.py", "model", "names")
    with torch.device("meta"):                      # shapes alone: `fill` compares them first
        model = Autodecoder(saved_config(Config, state, folder), len(state["names"]))
    for name in state["names"]:                     # they become folders: none may lead out of its place
        if type(name) is not str or Path(name).name != name or name in ("", "..") or not name.isprintable():
            raise UserError(f"{folder}/last.pt: {name!r} is no name of an object")
    return fill(model, state["model"], folder).to(device).eval().requires_grad_(False), state["names"]

def fingerprint(model):
    """Tells one trained autodecoder from any other, to the last bit, by its weights and its knobs"""
    knobs = {key: value for key, value in asdict(model.config).items() if key not in (*FREE, "data")}
    return digest([model.state_dict(), knobs])

# -------------------------------------------------------------------------------------- a batch, and its loss
def draw_batch(photos, config, views, generator, objects=None, pose=None):
    """-> objects (B,), origins and directions (B,R,3), their colours (B,R,3) and opacities (B,R)"""
    if objects is None:         # few objects, many rays each: decoding a code to its volume costs the most
        objects = torch.randperm(len(photos.names), generator=generator)[:config.batch_objects]
    B, n, o, R = len(objects), photos.size, objects[:, None], max(config.rays // len(objects), 1)
    seen = torch.rand(B, len(views), generator=generator).argsort(1)[:, :config.batch_views]   # (B,V)
    view = views[seen.gather(1, torch.randint(seen.shape[1], (B, R), generator=generator))]    # (B,R)
    # Most of a photo is white and teaches little, so the first rays go near the object, if the photo shows it
    u = torch.rand(B, R, generator=generator, dtype=torch.float64)
    near, exists = photos.pixel_near(o, view, u)
    anywhere = (torch.arange(R) >= int(config.foreground * R)) | ~exists
    pixel = torch.where(anywhere, (u * n * n).long(), near)
    y, x = pixel // n, pixel % n
    pose = photos.pose if pose is None else pose                # (a chapter gives its own guesses)
    origins, directions = pixel_rays(pose[o, view], photos.intrinsics[o], x + 0.5, y + 0.5)
    rgb, mask = photos.rgb[o, view, y, x].float() / 255, photos.mask[o, view, y, x].float() / 255
    photos.forget()
    return objects, origins, directions, rgb, mask

def photos_nobody_took(objects, batch, palettes, extents, config, left, generator):
    """Paints some objects in others' palettes, and stretches some -> log stretches (B,3), palettes (B,9), the
    changed batch.  `left`: how much is left of the shares in Config, from 1 to 0"""
    (origins, directions, rgb, opacity), B = batch, len(objects)
    others = torch.randint(len(extents), (B,), generator=generator)
    whose = torch.where(torch.rand(B, generator=generator) < left * config.recolour, others, objects)
    # A photo is solid (m + R w) + (1 - solid) white.  Take the pattern w out, and put it into another palette
    (m, R), (other_m, other_R) = mean_and_root(palettes[objects]), mean_and_root(palettes[whose])
    solid = opacity[..., None]
    pattern = (rgb - (1 - solid) - solid * m[:, None]) @ torch.linalg.inv(R)    # solid w (R is symmetric)
    painted = pattern @ other_R + solid * other_m[:, None] + 1 - solid
    rgb = torch.where((whose == objects)[:, None, None], rgb, painted.clamp(0, 1))
    # A world that is stretched by the diagonal matrix D looks the same along stretched rays, (D o, D d).  The
    # three stretches are scaled together, so that the bounding box's diagonal stays 1, as all objects have it
    stretch, extent = config.stretch * (2 * torch.rand(B, 3, generator=generator) - 1), extents[objects]
    longer = (stretch.exp() * extent).norm(dim=1, keepdim=True) / extent.norm(dim=1, keepdim=True)
    stretch = (stretch - longer.log()) * (torch.rand(B, 1, generator=generator) < left * config.stretched)
    D = stretch.exp()[:, None]                                                                  # (B,1,3)
    return stretch, palettes[whose], (origins * D, directions * D, rgb, opacity)

def reconstruction_loss(model, volume, batch, config, place, skip_empty, has_masks, more=None):
    """-> loss; and to log, the error of colour and the mean opacity (0 or 1 means that all has collapsed)"""
    origins, directions, target, opacity = batch
    occupied = occupancy(volume, model.field) if skip_empty else None
    rgb, alpha, _ = render(volume, origins, directions, config.samples, model.field, place, occupied)
    # paper: L1 and perceptual losses; here the squared error, which is PSNR's own
    photo, mask = (rgb - target).square().mean(), (alpha - opacity).square().mean()
    loss = photo + (config.mask_weight * mask if has_masks else 0) + (more(rgb, target) if more else 0)
    return loss, photo, alpha.mean()

def jitter(batch, samples, generator, device):
    """A random place in each bin of each ray (B,R,S), drawn on the device, as it is a batch's largest part"""
    if device.type != "cpu":
        # A CPU generator cannot draw on a GPU, so one with the same seed is made there
        generator = torch.Generator(device).manual_seed(generator.initial_seed())
    return torch.rand(*batch[0].shape[:2], samples, generator=generator, device=device)

# ---------------------------------------------------------------------------------------------------- the log
def read_log(folder):
    """The rows of log.jsonl.  Lines that a kill cut off, or that are no rows, are passed over"""
    rows, log = [], Path(folder) / "log.jsonl"
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
        with suppress(ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            rows.append({key: float(value) for key, value in json.loads(line).items()})
    return rows

def plot_log(folder, ylabel, **labels):
    """log.jsonl -> curve.png: the numbers that labels name, where they were logged"""
    axis = Figure(figsize=(6, 3.5), layout="constrained").subplots()
    for key, label in labels.items():
        if points := [(row["step"], row[key]) for row in read_log(folder) if {"step", key} <= set(row)]:
            axis.plot(*zip(*points), lw=1, marker="o" if len(points) < 50 else "", ms=3, label=label)
    axis.set(xlabel="step", ylabel=ylabel)
    axis.legend()
    save_figure(Path(folder, "curve.png"), axis.figure)

# ------------------------------------------------------------------------------------------------------ main
# Adam's second beta is below the usual 0.999, so a rare large gradient is forgotten after a hundred steps.
BETAS, CLIP = (0.9, 0.99), 1.0                # gradients longer than CLIP are shortened to it

class Muon(torch.optim.SGD):
    """(Jordan et al. 2024)  The gradient is U S V^T, its singular value decomposition.  The step is U V^T, so
    as far along rare directions as along common ones: 1.9 dB more than Adam after 1,500 steps (row A11)"""
    @torch.no_grad()
    def step(self):
        for p in [p for p in self.param_groups[0]["params"] if p.grad is not None]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.05)
            way = p.grad.lerp(mean, 0.95).flatten(1)             # Nesterov's momentum, as a matrix
            way = way / (way.norm() + 1e-12)
            # Five rounds of 3.4 s - 4.8 s^3 + 2.0 s^5 bring each singular value s > 0.003 to 0.7 ... 1.2
            for _ in range(5):
                gram = way @ way.T
                way = 3.4445 * way + (2.0315 * gram @ gram - 4.775 * gram) @ way
            # Entries of U V^T are near 1 / sqrt(longer side), and Adam's near 0.2: one rate serves both
            p -= self.param_groups[0]["lr"] * 0.2 * max(way.shape) ** 0.5 * way.view_as(p)

def learning_rate_share(step, steps, floor):
    """The share of the highest learning rate at this step: a linear warm-up times a falling half cosine"""
    # In the first 5 % an optimizer knows little of the gradients.  At the end small steps average out noise
    cosine = (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * step / steps)
    return min(1.0, (step + 1) / (0.05 * steps)) * cosine

def main(argv=None, Config=Config, presets=PRESETS, Decoder=Autodecoder, draw=draw_batch, more=None):
    """A chapter may train by this loop: its own decoder, with more knobs, rays drawn otherwise, more loss"""
    config = parse_config(Config, presets, argv)
    device = pick_device(config.device)

    # The photos.  The last ones of each object are held out
    if config.data == Config.data:
        first_then_others(lambda: render_shapenet.make_missing(config.data))
    photos = first_then_others(lambda: read_photos(config.data, config.size, config.objects))
    train_views, test_views = photos.split(config.holdout_views)
    B = min(config.batch_objects, len(photos.names))
    my_share(B)                                                     # can the processes share them equally?

    # The model, its optimizers, and what an earlier run has saved
    run = Run(config.out, Decoder.__name__, config, [f.name for f in fields(Config) if f.name not in FREE])
    torch.manual_seed(config.seed)
    model = Decoder(config, len(photos.names)).to(device)
    decoder = [p for name, p in model.named_parameters() if name != "shapes"]
    # Muon moves the convolutions' weights.  Shapes have sparse gradients, which only SparseAdam takes
    optimizers = (torch.optim.Adam([p for p in decoder if p.dim() < 4], betas=BETAS),
                  Muon([p for p in decoder if p.dim() >= 4]),
                  torch.optim.SparseAdam([model.shapes], betas=BETAS))
    state, step = run.load("names", "model", "optimizers", "step"), 0
    if state:
        if state["names"] != photos.names:
            raise UserError(f"{config.out} was trained on other objects than {config.data}'s: add --fresh")
        fill(model, state["model"], config.out)
        for optimizer, kept in zip_longest(optimizers, state["optimizers"]):
            fill_optimizer(optimizer, kept, config.out)
        step = state["step"]
        print(f"going on from step {step} of {config.out}/last.pt")
    print(f"{len(photos.names)} objects, {len(train_views)} views each to train and {len(test_views)} held "
          f"out; decoder of {sum(p.numel() for p in decoder) / 1e6:.2f} M parameters")
    if config.recolour and not photos.has_masks:
        print(f"{config.data} has no masks, which say what to paint: no object is shown in other colours")
        config.recolour = 0.0
    colours, extents = first_then_others(lambda: photos.measured(train_views))
    model.palettes.copy_(palettes := palette_code(*colours))
    shown = torch.linspace(0, len(photos.names) - 1, min(len(photos.names), 8)).long().tolist()

    with run:
        while step < config.steps:
            # Schedule
            share = learning_rate_share(step, config.steps, config.lr_floor)
            for optimizer, rate in zip(optimizers, (config.decoder_lr, config.decoder_lr, config.code_lr)):
                optimizer.param_groups[0]["lr"] = rate * share

            # Batch.  All that is random follows from (seed, step): resuming needs the step's number alone
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            objects, *batch = draw(photos, config, train_views, generator)
            left = 1 - step / config.steps                     # at the end all photos are real ones
            stretch, painted, batch = photos_nobody_took(objects, batch, palettes, extents, config, left,
                                                         generator)
            place = jitter(batch, config.samples, generator, device)

            # Loss: decode the codes, render the rays, compare.  Several processes share the objects
            code, mine = model.code(stretch.to(device), objects, painted.to(device)), my_share(len(objects))
            # A process decodes only its share of these codes, so the hook averages their gradients over all
            code.register_hook(together)
            volume, batch = model.volumes_of(code[mine]), [part[mine].to(device) for part in batch]
            loss, photo, alpha = reconstruction_loss(model, volume, batch, config, place[mine],
                                                     step >= config.dense_steps, photos.has_masks, more)
            loss = loss + config.code_decay * code[:, 3:-PALETTE].square().mean()

            # Step.  One that is not finite is left out
            model.zero_grad()
            loss.backward()
            for p in [p for p in decoder if p.grad is not None]:
                together(p.grad)
            norm = nn.utils.clip_grad_norm_(decoder, CLIP)
            if run.finite(step, loss.item() + norm.item()):
                for optimizer in optimizers:
                    optimizer.step()
            step += 1

            # Log, preview, save
            if step % config.log_every == 0 or step == config.steps:
                loss, photo, alpha = together(torch.stack([loss, photo, alpha]).detach()).tolist()
                run.log(step, config.steps, loss=loss, alpha=alpha, lr=share * config.decoder_lr,
                        training_psnr=-10 * math.log10(photo + 1e-10))
            if run.first_process and (step % config.preview_every == 0 or step == config.steps):
                rows = score_views(model, model.codes[shown], photos, shown, test_views[:4])
                full, foreground = mean_of(rows, "ours"), mean_of(rows, "ours_fg")
                run.log(step, config.steps, show=False, heldout=full, heldout_foreground=foreground)
                run.say(f"step {step}: {len(shown)} objects' held-out views {full:.2f} / {foreground:.2f} dB")
                save_preview(run.folder / f"previews/step_{step:06d}.png",
                             truth_and_ours(model, model.codes[shown], photos, shown, test_views[0]))
            if step % config.save_every == 0 or step == config.steps or run.stopping:
                run.save({"config": asdict(config), "names": photos.names, "model": model.state_dict(),
                          "optimizers": [some.state_dict() for some in optimizers], "step": step})
            run.stop_if_asked(step)

    if not run.first_process:
        return
    # The numbers: all held-out views of all objects; of thousands, 256 are enough, drawn without a pattern
    order = torch.randperm(len(photos.names), generator=torch.Generator().manual_seed(0))
    chosen = sorted(order[:256].tolist())
    rows = score_views(model, model.codes[chosen], photos, chosen, test_views)
    text, full = table(rows, kinds_of(config.data, photos.names)), mean_of(rows, "ours")
    print(text, judge(config, FREE, f"held-out views {full:.2f} dB", full, 31.2, 32.0, "README.md"), sep="\n")
    save_text(run.folder / "table.txt", text + "\n")
    plot_log(run.folder, "PSNR (dB)", training_psnr="training rays", heldout="held-out views",
             heldout_foreground="held-out views, foreground")
    draw_pipeline(model, photos, run.folder / "figure1.png")
    print(f"wrote {run.folder}: last.pt, table.txt, curve.png, figure1.png.  Next: python diffusion.py")

# ----------------------------------------------------------------------------------------------- new objects
def fit_codes(model, photos, views, steps=400, rate=0.1, decay=1e-3, seed=0):
    """Test-time auto-decoding: codes of unseen objects from the photos `views` (indices) of each, the decoder
    frozen -> (N,W)"""
    if len(model.shapes) < 2:
        raise UserError("an autodecoder of one object knows no other: a new one cannot be fitted to photos")
    # The search moves in units of the training codes' deviations, from their mean and the photos' palette: a
    # random start often ends badly.  The pull back to 0 decides whatever the given photos do not show
    deviation = model.codes.std(0) + 1e-6
    deviation[:3] = 0.5 * (model.config.stretched > 0)      # training drew them around 0, or not at all
    start = model.codes.mean(0).repeat(len(photos.names), 1)
    start[:, -PALETTE:] = palette_code(*photos.colours(views))                             # seen, not guessed
    return torch.cat([descend(model, model.volumes_of, start[some], deviation, photos, views, some, steps,
                              rate, decay, seed) for some in torch.arange(len(start)).split(8)])

def descend(model, decode, start, unit, photos, views, objects, steps, rate, pull, seed):
    """Moves start (B,...) downhill until decode(start) looks like these objects' photos `views`.  `pull` is
    the weight of the squared way, counted in units"""
    way, recipe = torch.zeros_like(start, requires_grad=True), replace(model.config, batch_views=len(views))
    optimizer = torch.optim.Adam([way], rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        batch = [t.to(start.device) for t in draw_batch(photos, recipe, views, generator, objects)[1:]]
        # Training's loss of photos and masks.  The optimizer has only the way, so the decoder cannot move
        volume, place = decode(start + unit * way), jitter(batch, recipe.samples, generator, start.device)
        loss = reconstruction_loss(model, volume, batch, recipe, place, True, photos.has_masks)[0]
        optimizer.zero_grad()
        (loss + pull * way.square().mean()).backward()
        optimizer.step()
    return (start + unit * way).detach()

if __name__ == "__main__":
    command(main)

"""
Stage 2 of 3: diffuse the latents.  Learn to take noise off the latents z_i = G1(e_i) of stage 1:

    min over D    mean_{i, sigma, n} | D(z_i + sigma n, sigma) - z_i |^2,      n ~ N(0, I)

A denoiser that can do this knows the way from anywhere to the latents: the score of noised latents is
(D(x, sigma) - x) / sigma^2 (Tweedie).  Followed from pure noise it ends at a latent, of which G2
makes an object.

There are 72 latents of 8,192 numbers.  Three things follow, and each is a knob to turn:
    which noise   up to sigma ~ 15 it is plain which of the 72 is under the noise; what a sample becomes is
                  decided above.  Levels are chosen from the latents, not from habit: see levels.png
    components    an MLP of width 1,024 cannot put out noise in 8,192 dimensions, nor so take it off: its
                  samples keep what is left.  In principal components there is nothing it cannot put out
    mix           a perfect denoiser of 72 latents returns those 72.  So it learns from latents of codes mixed
                  with their neighbours: objects that could have been

in   runs/autodecoder/last.pt        stage 1's codes and decoder
out  runs/diffusion/                 last.pt, log.jsonl, previews/, levels.png, histogram.png
run  python diffusion.py                                      3.5 min on two cores (README, row D1): no copies
     python diffusion.py --mix 0 --steps 6000 --out runs/copies   a lesson: 28 % of the samples are copies
     python diffusion.py --preset paper --out runs/paper      the paper's DDPM: 72 % copies
     python diffusion.py --preset unet --out runs/unet        3DADM's denoiser: wants more time, colours bleed
read noise.py, denoiser.py; then Config, code_mixtures, main.
"""
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn

from autodecoder import load_autodecoder
from common import (Run, UserError, at_least, load_stage, new_figure, parse_config, pick_device, plot_log,
                    save_figure, to_bytes)
from denoiser import RobustNorm  # noqa: F401      where it stood, for those who import it from here
from denoiser import Denoiser, sample
from noise import ddpm_loss, edm_loss
from shapes.rasterizer import intrinsics_at
from views import ANGLES, cameras, render_view, save_preview


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/diffusion"          # folder for the model, the log and the pictures
    # the latents
    normalization: str = "robust"        # robust | robust_global | meanstd | none: before the diffusion
    mix: float = 1.0                     # share of a batch that is G1 of mixtures of 2-3 codes; 0: none
    mixtures: int = 2048                 # how many such mixtures there are
    among: int = 8                       # codes are mixed with so many nearest ones; 0: any with any
    components: int = 240                # the MLP's: principal components it works in; 0: the bare numbers
    shuffle: bool = False                # a control: each number of a latent from an object of its own
    holdout: int = 0                     # objects kept aside, to watch the loss of
    patience: int = 0                    # end when that has not fallen for so many previews; 0: never
    # the denoiser
    denoiser: str = "mlp"                # mlp | unet: the paper's, or 3DADM's
    width: int = 1024                    # of the MLP
    layers: int = 3                      # of the MLP, hidden ones
    channels: str = "48,96"              # of the U-Net's levels, each halving the resolution
    embedding: int = 64                  # sines and cosines of the noise level
    # noise
    formulation: str = "edm"             # edm | ddpm: 3DADM's, or the paper's
    low: float = 0.1                     # the least sigma, in deviations of the latents
    # training
    steps: int = 4000                    # gradient steps: more make neater samples, and nearer to copies
    batch: int = 256                     # latents a step
    lr: float = 1e-3                     # Adam's, at its highest
    ema: float = 0.999                   # of the weights that sample; ramps up to this
    seed: int = 0                        # of the weights, the mixtures and the batches
    device: str = "auto"                 # auto, cpu or cuda
    # housekeeping
    log_every: int = 20                  # steps between log lines
    preview_every: int = 1000            # steps between previews
    save_every: int = 500                # steps between checkpoints
    fresh: bool = False                  # throw away what is in --out and start over


PRESETS = {
    "cpu": {},
    "gpu": dict(steps=20000, batch=1024, preview_every=5000, save_every=2000),
    "smoke": dict(steps=20, batch=16, mixtures=32, components=8, width=32, layers=1, preview_every=10,
                  save_every=10, log_every=5),
    "unet": dict(denoiser="unet", batch=16, steps=4000, mix=0.5),
    "paper": dict(formulation="ddpm", steps=6000, mix=0.5),
    "3dadm": dict(denoiser="unet", channels="128,384", batch=64, steps=50000, normalization="robust_global",
                  lr=4.5e-4),
}
FREE = ("out", "device", "log_every", "preview_every", "save_every", "fresh")
RECIPE = tuple(field.name for field in fields(Config) if field.name not in FREE)


def load_denoiser(folder, device="cpu"):
    """The trained denoiser of a run, and of the autodecoder that it is for: folder and fingerprint"""
    return build_denoiser(load_stage(folder, "stage 2's denoiser", "diffusion.py", "denoiser"), device)


def averaged(state):
    """The averaged weights: of the best step where --patience chose one, otherwise of the last"""
    return state["best"]["ema"] or state["ema"]


def build_denoiser(state, device="cpu"):
    denoiser = Denoiser(Config(**state["config"]), state["shape"], state["components"], state["planes"])
    network = {f"network.{name}": weights for name, weights in averaged(state).items()}
    denoiser.load_state_dict(state["denoiser"] | network)
    return (denoiser.to(device).eval().requires_grad_(False),
            {"folder": state["config"]["autodecoder"], "fingerprint": state["autodecoder"]})


# ----------------------------------------------------------------------------------------------- the latents

@torch.no_grad()
def code_mixtures(codes, count, generator, among=0):
    """(count,width): convex mixtures of two or three codes in random shares; of any, or of the `among`
    nearest to one: a bud and a headphone have no half-way."""
    N, among = len(codes), min(among, len(codes))
    first = torch.randint(N, (count, 1), generator=generator)
    others = torch.randint(among or N, (count, 2), generator=generator)
    if among:
        others = torch.cdist(codes, codes).argsort(1).cpu()[first, others]         # the nearest is itself
    share = -torch.rand(count, 3, generator=generator).clamp(min=1e-9).log()       # uniform on the triangle
    share[::2, 2] = 0                                                              # every other one: of two
    share = (share / share.sum(1, keepdim=True)).to(codes.device)
    return (share[..., None] * codes[torch.cat([first, others], 1).to(codes.device)]).sum(1)


@torch.no_grad()
def latents_of(model, codes):
    return torch.cat([model.to_latent(part).float() for part in codes.split(64)])


def shuffled(latents, generator):
    """(N,...): each number from another object: as likely one by one, together latents of nothing"""
    order = torch.rand(len(latents), latents[0].numel(), generator=generator).argsort(0).to(latents.device)
    return latents.flatten(1).gather(0, order).view_as(latents)


def fingerprint(model):
    """A number that tells one trained autodecoder from another."""
    return float(sum(p.double().abs().sum() for p in model.parameters()))


# -------------------------------------------------------------------------------------------------- pictures

def plot_levels(denoiser, entropy, path):
    """How unsure the ideal denoiser is at each level, and where we therefore train and sample"""
    log_sigma, u = denoiser.log_sigma.cpu(), torch.linspace(1, 0, 18, device=denoiser.cdf.device)
    sigma, density = log_sigma.exp(), denoiser.cdf.diff().cpu()
    times = ((1 - denoiser.alpha_bar) / denoiser.alpha_bar).sqrt().cpu()[::50]
    habit = torch.exp(-((log_sigma + 1.2) / 1.2) ** 2 / 2)
    figure, axis = new_figure(figsize=(7, 3.6))
    axis.plot(sigma, entropy, label="the ideal denoiser's doubt which object it sees")
    axis.fill_between(sigma[1:], density / density.max(), alpha=0.2, color="C1", label="training levels")
    axis.plot(denoiser.sigma(u).cpu(), torch.full((18,), -0.04), "k|", ms=9, label="EDM: 18 steps")
    axis.plot(times, torch.full_like(times, -0.10), "C3|", ms=9, label="DDPM: every 50th, shifted")
    axis.plot(sigma, habit, ":", color="grey", label="EDM's usual levels, for pictures")
    axis.set(xscale="log", xlabel="sigma", ylabel="doubt; shaded: density",
             xlim=(sigma[0] * 0.9, sigma[-1] * 1.1))
    axis.legend(fontsize=7)
    save_figure(figure, path)


def plot_histogram(denoiser, latents, path):
    """Why normalise: the values of each channel before and after, each a curve"""
    channels = denoiser.norm.channels
    figure, axes = new_figure(1, 2, figsize=(8, 3))
    for axis, values, title in ((axes[0], latents, "latents, by channel"),
                                (axes[1], denoiser.norm.normalize(latents), "normalised")):
        rows = values.movedim(0, -1).flatten(channels).flatten(0, channels - 1).cpu()      # (C,N r^3)
        edge = 1.2 * rows[:, ::101].abs().max().item() + 1e-6
        for row in rows:
            count, edges = torch.histogram(row, 80, range=(-edge, edge), density=True)
            axis.plot((edges[1:] + edges[:-1]) / 2, count, lw=0.7)
        axis.set(title=title, yscale="log")
    save_figure(figure, path)


def preview(model, denoiser, raw, averaged, size=64):
    """(2,8,H,W,3) bytes: seeds 0 to 7 by the raw weights; below by the averaged, which stay in the network"""
    pose, K, rows = cameras(ANGLES)[0], intrinsics_at(size).float(), []
    for weights in (raw, averaged):
        denoiser.network.load_state_dict(weights)
        volumes = [model.to_volume(z[None]) for z in sample(denoiser, range(8))]
        rows.append(torch.stack([render_view(model, volume, pose, K, size)[0].cpu() for volume in volumes]))
    return to_bytes(torch.stack(rows))


# ------------------------------------------------------------------------------------------------------ main

def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    at_least(config, mixtures=0, among=0, components=0, holdout=0, patience=0, width=1, layers=0, steps=1,
             batch=1, log_every=1, preview_every=1, save_every=1)
    device = pick_device(config.device)
    model, names = load_autodecoder(config.autodecoder, device)
    check(config, model, len(names))
    ours = ("config.json", "last.pt", "previous.pt", "log.jsonl", "previews")
    stale = [Path(config.out, name) for name in ours] if config.fresh else ()
    run = Run(config.out, config, RECIPE, stale=stale)

    # Everything to train on: the objects' latents, then those of mixtures of their codes
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(names), generator=generator)
    aside, kept = order[:config.holdout], order[config.holdout:]
    latents = latents_of(model, model.codes[kept])
    mixed = latents_of(model, code_mixtures(model.codes[kept], config.mixtures, generator, config.among))
    if config.shuffle:
        latents, mixed = shuffled(latents, generator), shuffled(mixed, generator)
    components = min(config.components, len(latents) + len(mixed)) if config.denoiser == "mlp" else 0
    torch.manual_seed(config.seed)
    denoiser = Denoiser(config, latents.shape[1:], components, model.planes).to(device)
    entropy = denoiser.fit(latents, mixed, generator)
    network = denoiser.network
    ema = {name: p.detach().clone() for name, p in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    state, step, best = run.load(), 0, {"loss": math.inf, "step": 0, "ema": None}
    if state:
        if state["autodecoder"] != fingerprint(model):
            raise UserError(f"{config.out} was trained on another autodecoder than {config.autodecoder} is: "
                            "start over with --fresh, or use another --out")
        denoiser.load_state_dict(state["denoiser"])
        ema = {name: p.to(device) for name, p in state["ema"].items()}
        optimizer.load_state_dict(state["optimizer"])
        step, best = state["step"], state["best"]
        print(f"going on from step {step} of {config.out}/last.pt")
    data, unseen = denoiser.encode(torch.cat([latents, mixed])), latents_of(model, model.codes[aside])
    plot_levels(denoiser, entropy, run.folder / "levels.png")
    plot_histogram(denoiser, latents, run.folder / "histogram.png")
    lowest, highest = denoiser.sigma(torch.tensor([0.0, 1.0], device=device)).tolist()
    size, rms = sum(p.numel() for p in network.parameters()) / 1e6, denoiser.norm.normalize(latents).std()
    print(f"{len(latents)} latents, sigma_data {rms:.2f}, and {len(mixed)} mixtures; {config.denoiser} of "
          f"{size:.2f} M parameters; noise from {lowest:.2g} to {highest:.3g}")
    loss_of = edm_loss if config.formulation == "edm" else ddpm_loss

    with run:
        while step < config.steps:
            # Warm-up, then half a cosine
            share = min(1.0, (step + 1) / (0.05 * config.steps))
            share *= 0.505 + 0.495 * math.cos(math.pi * step / config.steps)
            optimizer.param_groups[0]["lr"] = config.lr * share
            # All that is random in a step follows from (seed, step)
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            z = data[draw_batch(config, len(latents), generator).to(device)]
            u = (torch.arange(len(z)) + torch.rand(len(z), generator=generator)) / len(z)   # all levels alike
            noise = torch.randn(z.shape, generator=generator).to(device)
            losses = loss_of(denoiser, z, noise, u.to(device))
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            if run.finite(step, loss.item() + norm.item()):
                optimizer.step()
                decay = min(config.ema, (1 + step) / (10 + step))                # short at first: a ramp
                for name, p in network.state_dict().items():
                    ema[name].lerp_(p, 1 - decay)
            step += 1

            if step % config.log_every == 0 or step == config.steps:
                low, middle, high = (part.mean().item() for part in losses.detach().tensor_split(3))
                run.log(step, config.steps, loss=loss.item(), low=low, middle=middle, high=high,
                        lr=share * config.lr)
            if step % config.preview_every == 0 or step == config.steps:
                raw = {name: p.clone() for name, p in network.state_dict().items()}
                save_preview(run.folder / f"previews/step_{step:06d}.png", preview(model, denoiser, raw, ema))
                if config.holdout:
                    held = held_out_loss(denoiser, loss_of, unseen)              # by the averaged weights
                    run.log(step, config.steps, show=False, heldout=held)
                    run.say(f"step {step}: loss of {config.holdout} objects kept aside {held:.4f}")
                    if config.patience and held < best["loss"]:
                        best = {"loss": held, "step": step, "ema": {k: p.clone() for k, p in ema.items()}}
                network.load_state_dict(raw)
            tired = config.patience and step - best["step"] >= config.patience * config.preview_every
            if step % config.save_every == 0 or step == config.steps or run.stopping or tired:
                run.save({"config": asdict(config), "step": step, "shape": list(denoiser.shape),
                          "components": components, "planes": model.planes, "autodecoder": fingerprint(model),
                          "denoiser": denoiser.state_dict(), "ema": ema, "best": best,
                          "optimizer": optimizer.state_dict()})
            if tired:
                run.say(f"stopped early: the weights of step {best['step']} are the ones that sample")
                break
            if run.stopping:
                raise UserError(f"stopped by {run.stopping} at step {step}, saved: the same command goes on "
                                "from there")
    plot_log(run.folder, "loss", low="low noise", middle="middle noise", high="high noise",
             heldout="objects kept aside")
    print(f"wrote {run.folder}: last.pt, levels.png, histogram.png, curve.png, previews/. "
          "Next: python sample.py")


def check(config, model, objects):
    if config.denoiser == "unet" and model.planes:
        raise UserError("--denoiser unet wants latent volumes, and this autodecoder's are planes: "
                        "use --denoiser mlp")
    least = 3 + config.holdout
    if objects < least:
        raise UserError(f"{config.autodecoder} knows {objects} objects: at least {least} are wanted")
    if not 0 <= config.mix <= 1 or config.mix and config.mixtures < 1:
        raise UserError(f"--mix {config.mix} of --mixtures {config.mixtures}: a share from 0 to 1 is wanted, "
                        "of at least one mixture")
    if config.patience and not config.holdout:
        raise UserError("--patience watches the loss of objects kept aside: give --holdout too, 8 for one")


def draw_batch(config, objects, generator):
    """-> indices into the data, (batch,): the objects come first, then the mixtures"""
    B = config.batch
    mixture = torch.rand(B, generator=generator) < config.mix
    return torch.where(mixture, objects + torch.randint(max(config.mixtures, 1), (B,), generator=generator),
                       torch.randint(objects, (B,), generator=generator))


@torch.no_grad()
def held_out_loss(denoiser, loss_of, latents):
    """The loss of latents at 32 levels each, always the same noise"""
    z = denoiser.encode(latents).repeat_interleave(32, 0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    u = ((torch.arange(32) + 0.5) / 32).repeat(len(latents)).to(z.device)
    parts = zip(z.split(64), noise.split(64), u.split(64))
    return torch.cat([loss_of(denoiser, *part) for part in parts]).mean().item()


if __name__ == "__main__":
    main()

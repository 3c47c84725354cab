"""
A chapter on stage 2: denoisers that nobody trains.  The training latents z_1 ... z_N are all that they have.

    ideal      D(x) = sum_i w_i z_i,   w = softmax_i of -|x - z_i|^2 / 2 sigma^2
    local      the same, apart at each voxel p: w_i(p) sees only a window of k^3 voxels around p
    Wiener     D(x) = mean + C (C + sigma^2)^-1 (x - mean),   C = the latents' covariance

The ideal denoiser is the one that stage 2's loss asks for, if nothing is recombined.  It can only return
training objects.  So what a trained network makes of its own must come from the ways in which it is not
ideal.  Kamb & Ganguli (2024) name two for convolutional networks: they see a window, and they treat all
places alike (left out here, because earphones stand in one pose).  A voxel that sees only its window cannot
know which object it belongs to.  It may follow object 3 here and object 7 there, and a sample becomes a
patchwork of parts.  Two windows that are each other's mirror images vote together
(--mirror), because earphones are symmetric: without that, left and right would not agree.

How large a window?  Large at high noise, where only the whole tells anything, and small at low noise.  Here
it is chosen at each sigma by leaving out: each training latent is noised, and denoised by means of all
others.  The window with the least error wins.

in   runs/autodecoder/last.pt        stage 1; without it the model in the box
out  runs/analytic/                  samples.png (a line for each denoiser), windows.png, latents.pt, report
run  python -m chapters.analytic                        no training
     python -m chapters.analytic --window 5             one window for all noise
     python -m lab.evaluate --rows runs/analytic        the local one in the lab's table
read local_denoiser, wiener_denoiser, leave_one_out, main.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from autodecoder import load_autodecoder
from chapters.families import with_box, write_samples
from common import (UserError, command, grid, parse_config, pick_device, save_figure, save_picture, save_text,
                    to_bytes)
from diffusion import RobustNorm, heun_sample, latents_of, noise_of
from sample import novelty, summarise
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    out: str = "runs/analytic"           # folder for the samples and the figure
    window: int = 0                      # voxels along a side of the window, odd; 0: chosen by leaving out
    mirror: bool = True                  # a window and its mirror image vote together
    steps: int = 24                      # noise levels of the sampler (at least 2)
    low: float = 0.1                     # the least sigma, in deviations of the latents (from 0.0001 to 10)
    count: int = 64                      # samples of each denoiser (at least 2)
    draws: int = 2                       # noises for each object and level, when one is left out (at least 1)
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(steps=4, count=2, draws=1)}


def windowed(square, window, mirror):
    """Squared differences (...,r,r,r) -> their sums over the window around each voxel"""
    r, sums = square.shape[-1], square.flatten(0, -4)[:, None]
    if window >= 2 * r - 1:                                       # from any voxel it sees all of them
        return square.sum((-3, -2, -1), keepdim=True).expand_as(square)
    # avg_pool divides by window^3 everywhere, because outside the volume the difference counts as 0
    sums = F.avg_pool3d(sums, window, 1, window // 2).view(square.shape) * window ** 3
    # World x runs along W: left and right.  The mean, and not the sum: no more evidence than one window
    return (sums + sums.flip(-1)) / 2 if mirror else sums


def local_denoiser(x, sigma, points, window, mirror, left_out=None):
    """x (B,C,r,r,r), points (N,C,r,r,r) -> D(x) (B,C,r,r,r).  left_out (B,): which point each may not use"""
    square = (x[:, None] - points).square().sum(2)                                           # (B,N,r,r,r)
    score = -windowed(square, window, mirror) / (2 * sigma ** 2)
    if left_out is not None:
        score[torch.arange(len(x)), left_out] = -math.inf
    return torch.einsum("bndhw,ncdhw->bcdhw", score.softmax(1), points)


def wiener_denoiser(x, sigma, points, left_out=None):
    """The best linear one.  The covariance of N points has rank N - 1, so N x N matrices are enough"""
    if left_out is not None:
        keep = ~torch.eye(len(points), dtype=torch.bool, device=x.device)
        return torch.cat([wiener_denoiser(x[k:k + 1], sigma, points[keep[o]])
                          for k, o in enumerate(left_out)])
    mean = points.mean(0)
    rows = (points - mean).flatten(1) / math.sqrt(len(points))                               # C = rows^T rows
    gram = rows @ rows.T
    # C (C + s^2)^-1 = rows^T (rows rows^T + s^2)^-1 rows
    inner = torch.linalg.solve(gram + sigma ** 2 * torch.eye(len(gram), device=x.device),
                               rows @ (x - mean).flatten(1).T)
    return mean + (rows.T @ inner).T.view_as(x)


def leave_one_out(points, sigmas, windows, config):
    """-> mean squared error for each number that matters: {window or "Wiener": [at each sigma]}"""
    generator, errors = torch.Generator().manual_seed(0), {}
    for sigma in sigmas:
        for _ in range(config.draws):
            noise = torch.randn(points.shape, generator=generator).to(points)
            everyone = torch.arange(len(points), device=points.device)
            for part in everyone.split(8):
                x = points[part] + sigma * noise[part]
                ways = {window: local_denoiser(x, sigma, points, window, config.mirror, part)
                        for window in windows} | {"Wiener": wiener_denoiser(x, sigma, points, part)}
                for name, clean in ways.items():
                    here = errors.setdefault(name, {}).setdefault(float(sigma), [])
                    here.append((clean - points[part]).square().mean().item())
    return {name: [sum(some) / len(some) for some in by.values()] for name, by in errors.items()}


@torch.no_grad()
def main(argv=None):
    config = parse_config(Config, PRESETS, with_box(argv, Config))
    device, out = pick_device(config.device), Path(config.out)
    model, names = load_autodecoder(config.autodecoder, device)
    if len(names) < 3:
        raise UserError(f"{config.autodecoder} knows {len(names)} objects: at least 3 are wanted")
    training = latents_of(model, model.codes)
    r = training.shape[-1]
    if config.window and (config.window % 2 == 0 or config.window >= r):
        raise UserError(f"--window {config.window}: an odd number below {r}, the latent's side, is wanted")
    norm = RobustNorm(training.shape[1:]).to(device)
    norm.fit(training)
    points = norm.normalize(training)

    # From four times the widest spread down to almost no noise, evenly in log sigma
    spread = torch.linalg.matrix_norm(points.flatten(1), 2).item() / math.sqrt(len(points))
    least = config.low * points.square().mean().sqrt().item()
    sigmas = torch.linspace(math.log(4 * spread), math.log(least), config.steps).exp().to(device)
    everything = 2 * r - 1
    windows = [config.window] if config.window else [*range(1, r, 2), everything]
    errors = leave_one_out(points, sigmas, windows, config)
    best = [min(windows, key=lambda window: errors[window][k]) for k in range(len(sigmas))]
    print("window at each sigma: " + ", ".join(f"{s:.2g}: {w}" for s, w in zip(sigmas.tolist(), best)))

    at = lambda sigma: best[(sigmas.log() - sigma.flatten()[0].log()).abs().argmin()]
    ways = {"ideal": lambda x, s: local_denoiser(x, s.flatten()[0], points, everything, False),
            "local": lambda x, s: local_denoiser(x, s.flatten()[0], points, at(s), config.mirror),
            "Wiener": lambda x, s: wiener_denoiser(x, s.flatten()[0], points)}
    rows, pictures, seconds = {"training objects": novelty(training, training, itself=True)}, [], {}
    for name, denoise in ways.items():
        began, parts = time.time(), []
        for seeds in torch.arange(config.count).split(8):
            x = torch.stack([noise_of(seed)(points.shape[1:]) for seed in seeds]).to(device)
            x = x * math.sqrt(sigmas[0] ** 2 + points.square().mean())
            for x in heun_sample(SimpleNamespace(denoise=denoise), x, sigmas, None):
                pass
            clean = denoise(x, sigmas[-1])
            parts.append(norm.undo(clean))
        latents, seconds[name] = torch.cat(parts), (time.time() - began) / config.count
        rows[name] = novelty(latents, training)
        pictures.append(render_views(model, latents[:8], cameras(ANGLES[:1]), SIZE)[0][:, 0])
        if name == "local":
            write_samples(out, model, latents, 0, seconds[name])
    text = summarise(rows) + "\nseconds a sample: " + ", ".join(f"{k} {v:.2f}" for k, v in seconds.items())
    print(text)
    save_text(out / "report.txt", text + "\n")
    save_picture(out / "samples.png", grid(to_bytes(torch.cat(pictures)), min(8, config.count)))

    axis = Figure(figsize=(6, 4), layout="constrained").subplots()
    for name, values in errors.items():
        label = name if name == "Wiener" else "all voxels: ideal" if name == everything else f"{name}^3"
        axis.plot(sigmas.cpu(), values, label=label, ls="--" if name == "Wiener" else "-", lw=1.2)
    axis.set(xscale="log", yscale="log", xlabel="sigma", ylabel="error on the latent that was left out")
    axis.legend(fontsize=7, title="window")
    save_figure(out / "windows.png", axis.figure)
    copies = {name: sum(row["copy"] for row in some) / len(some) for name, some in rows.items()}
    print(f"wrote {out}: samples.png, windows.png, latents.pt, report.txt.  Copies: "
          f"ideal {copies['ideal']:.0%}, local {copies['local']:.0%}, Wiener {copies['Wiener']:.0%} "
          "(row L1: 100 %, 0 %, 0 %)")


if __name__ == "__main__":
    command(main)

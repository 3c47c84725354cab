"""
What the chapters on other ways to make new objects share; and their sheet, a line of pictures for each
family.

in   runs/*/latents.pt, volumes.pt   samples of the chapters, and what they cost
out  runs/families.png               eight samples of each, seeds 0 to 7: none is picked
run  python -m chapters.families
     python -m lab.evaluate --rows runs/analytic runs/gaudi       the same families in the lab's table
read to_learn, improve, record, write_samples, read_samples.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from autodecoder import CLIP, Autodecoder, fingerprint, load_autodecoder, read_log
from common import (DISTANCE, UserError, camera_to_world_at, command, fill, fill_optimizer, grid,
                    load_checkpoint, parse_config, pick_device, plain, save_checkpoint, save_picture,
                    save_text, to_bytes)
from diffusion import Config as Stage2
from diffusion import RobustNorm, latents_of, load_denoiser, recombined, sample
from sample import BOX, is_run, novelty, summarise
from volume_render import (ANGLES, SIZE, camera_rays, cameras, occupancy, render, render_views,
                           voxel_opacity)


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    rows: tuple = ("chapters",)          # folders of chapters; `chapters`: all that are in runs/
    out: str = "runs/families.png"       # the sheet
    device: str = "auto"                 # auto, cpu or cuda


def with_box(argv, Config):
    """The command line; with the autodecoder in the box, if the user has trained none"""
    argv = list(sys.argv[1:] if argv is None else argv)
    named = any(word.split("=")[0] == "--autodecoder" for word in argv)
    if not named and not is_run(Path(Config.autodecoder)):
        print(f"nothing is in {Config.autodecoder} yet: taking the autodecoder in the box")
        argv += ["--autodecoder", str(BOX / "autodecoder")]
    return argv


def to_learn(model, config):
    """-> what a family learns from: recombined codes' latents (P,C,r,r,r), normalised, of mean square 1; a
    function that makes such numbers of latents, and one that makes latents of such numbers"""
    own, norm = latents_of(model, model.codes), RobustNorm(latents_of(model, model.codes[:1]).shape[1:])
    norm.to(own.device).fit(own)
    generator = torch.Generator().manual_seed(config.seed)
    codes = recombined(model, config.recombinations, generator, Stage2())
    data = norm.normalize(latents_of(model, codes))
    scale = data.square().mean().sqrt()
    return (data / scale, lambda latents: norm.normalize(latents) / scale,
            lambda numbers: norm.undo(numbers * scale))


class AsVolumes:
    """Stage 1's renderer, for functions that make volumes of what they get, and get volumes"""
    def __init__(self, field=None):
        self.config, self.to_volume = SimpleNamespace(samples=48), lambda volume: volume
        self.field = field or (lambda channels, position: Autodecoder.field(self, channels, position))


def smooth(volume):
    """A blur by 1 2 1.  Small pictures do not show single voxels, so only this keeps neighbours alike"""
    return F.avg_pool3d(F.avg_pool3d(volume, 2, 1, 1, count_include_pad=False), 2, 1)


def shown(volumes, poses, K, size, samples, field, place=None):
    """volumes (B,4,N,N,N), each by cameras of its own (B,V,4,4) -> pictures (B,V,H,W,3), with gradients"""
    rays = [some.flatten(1, 2) for some in camera_rays(poses, K, size)]
    rgb, _, _ = render(volumes, *rays, samples, field, place, occupancy(volumes, field))
    return rgb.view(*poses.shape[:2], size, size, 3)


def pictures_apart(volume, made, field, count, generator):
    """Squared difference of what volumes (B,4,N,N,N) and others, of this field, show along the same rays"""
    # Rays come from anywhere around.  Half of them go through something solid, the others anywhere
    draw, plain = lambda *n: torch.rand(*n, generator=generator), AsVolumes().field
    B, N = len(volume), volume.shape[-1]
    azimuth, elevation = 360 * draw(B, count), torch.asin(2 * draw(B, count) - 1).rad2deg()
    origins = camera_to_world_at(azimuth, elevation, torch.full_like(azimuth, DISTANCE))[..., :3, 3]
    solid = voxel_opacity(volume, plain).cpu().flatten(1) + 1e-6
    at = torch.multinomial(solid, count, replacement=True, generator=generator)
    point = (torch.stack([at % N, at // N % N, at // N ** 2], -1) + draw(B, count, 3)) / N - 0.5     # x, y, z
    point[:, count // 2:] = draw(B, count - count // 2, 3) - 0.5
    rays, place = (origins.to(volume), (point - origins).to(volume), 48), draw(B, count, 48).to(volume)
    with torch.no_grad():
        rgb, alpha, _ = render(volume, *rays, plain, place, occupancy(volume, plain))
    ours, ours_alpha, _ = render(made, *rays, field, place, occupancy(made, field))
    return (ours - rgb).square().mean() + 0.1 * (ours_alpha - alpha).square().mean()


def resume(run, model, networks, optimizers):
    """Fills networks {name: network} and the optimizers with what the run saved -> the step to go on from.
    model: the autodecoder that is under them, or None"""
    state = run.load("autodecoder", "optimizers", *networks, "step")
    if not state:
        return 0
    if state["autodecoder"] != (fingerprint(model) if model else ""):
        raise UserError(f"{run.folder} was trained on another autodecoder: start over with --fresh")
    for name, network in networks.items():
        fill(network, state[name], run.folder)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        fill_optimizer(optimizer, saved, run.folder)
    print(f"going on from step {state['step']} of {run.folder}/last.pt")
    return state["step"]


def improve(run, step, loss, optimizer, *others):
    """One step of the optimizer, and of others whose gradients are not clipped, if the loss and its gradient
    are finite -> whether they were"""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    for one in (optimizer, *others):
        one.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(weights, CLIP)
    well = run.finite(step, loss.item() + norm.item())
    for one in (optimizer, *others) if well else ():
        one.step()
    return well


def follow(average, network, step, ema):
    """The running mean of a network's weights: short at first, because the first weights are worth little"""
    for mean, p in zip(average.parameters(), network.parameters()):
        mean.lerp_(p.detach(), 1 - min(ema, (1 + step) / (10 + step)))


def record(run, model, networks, optimizers, step, steps, numbers):
    """What follows a step: the log, the checkpoint, and the end if the user asked for it"""
    every = run.config
    if step % every["log_every"] == 0 or step == steps:
        run.log(step, steps, **{name: torch.as_tensor(number).item() for name, number in numbers.items()})
    if step % every["save_every"] == 0 or step == steps or run.stopping:
        keep(run, model, networks, optimizers, step)
    run.stop_if_asked(step)


def keep(run, model, networks, optimizers, step):
    run.save({"config": run.config, "step": step, "autodecoder": fingerprint(model) if model else "",
              "optimizers": [some.state_dict() for some in optimizers],
              **{name: network.state_dict() for name, network in networks.items()}})


def trained_for(folder):
    """-> seconds of training, by log.jsonl.  A run that was continued began to count anew"""
    seconds = [row["seconds"] for row in read_log(folder) if "seconds" in row]
    return sum(now for now, after in zip(seconds, [*seconds[1:], 0.0]) if after < now)


def write_samples(out, model, latents, parameters, sample_seconds, trained_in=None):
    """Samples of a family -> latents.pt for the lab, samples.png, report.txt; and the report's rows"""
    training = latents_of(model, model.codes)
    rows = {"samples": novelty(latents, training),
            "training objects": novelty(training, training, itself=True)}
    text = summarise(rows)
    print(text)
    save_text(Path(out, "report.txt"), text + "\n")
    save_checkpoint(Path(out, "latents.pt"), {"latents": latents.cpu(), "autodecoder": fingerprint(model),
                                           "parameters": parameters, "sample_seconds": sample_seconds,
                                           "training_seconds": trained_for(trained_in or out)})
    save_sheet(out, model, latents)
    return rows["samples"]


def write_volumes(out, volumes, parameters, sample_seconds):
    """The same of a family that makes volumes (B,4,N,N,N), as G2 makes them -> volumes.pt, samples.png"""
    save_checkpoint(Path(out, "volumes.pt"), {"volumes": volumes.half().cpu(), "parameters": parameters,
                                           "sample_seconds": sample_seconds,
                                           "training_seconds": trained_for(out)})
    save_sheet(out, AsVolumes(), volumes)


def save_sheet(out, model, some):
    rgb = render_views(model, some[:16], cameras(ANGLES[:1]), SIZE)[0][:, 0]
    save_picture(Path(out, "samples.png"), grid(to_bytes(rgb), min(8, len(rgb))))


@torch.no_grad()
def finish(argv, Config, presets, Denoiser):
    """Of a chapter that trains a denoiser by stage 2's loop: its samples -> the report's rows"""
    config = parse_config(Config, presets, argv)
    device = pick_device(config.device)
    model, _, denoiser = load_denoiser(config.out, device, config.autodecoder, Config, Denoiser)
    began = time.time()
    latents = torch.cat([denoiser.latents(sample(denoiser, range(k, min(k + 16, config.count))))
                         for k in range(0, config.count, 16)])
    seconds, parameters = (time.time() - began) / config.count, denoiser.network.parameters()
    return write_samples(config.out, model, latents, sum(p.numel() for p in parameters), seconds)


def read_samples(folder, model):
    """A chapter's latents.pt, if it is of this autodecoder, or its volumes.pt -> who shows them, latents or
    volumes (B,...), and the whole state"""
    kind = "volumes" if Path(folder, "volumes.pt").exists() else "latents"
    file = Path(folder, f"{kind}.pt")
    state = load_checkpoint(file)
    some = state.get(kind)
    if kind == "latents" and state.get("autodecoder") != fingerprint(model):
        raise UserError(f"{file} was made with another autodecoder: run its chapter again")
    shape = model.config.latent_channels, *[model.config.latent_resolution] * 3
    right = isinstance(some, torch.Tensor) and some.dim() == 5 and some.isfinite().all()
    if not right or kind == "latents" and some.shape[1:] != shape or kind == "volumes" and some.shape[1] != 4:
        raise UserError(f"{file} holds no {kind}" + f" of the shape {shape}" * (kind == "latents"))
    if not {"parameters", "training_seconds", "sample_seconds"} <= state.keys():
        raise UserError(f"{file} does not say what its samples cost: run its chapter again")
    return model if kind == "latents" else AsVolumes(), some.float(), state


def folders(rows):
    """The folders named; for the one word `chapters`, all in runs/ that hold samples"""
    if list(rows) != ["chapters"]:
        return [row for row in rows if row]
    found = {file.parent for kind in ("latents", "volumes") for file in Path("runs").glob(f"**/{kind}.pt")}
    if not found:
        raise UserError("no folder in runs/ holds samples: run a chapter first, as python -m chapters.gaudi")
    return sorted(map(str, found))


def named(rows):
    """-> {name: folder}: the last part of a folder is its row's name, or all of it where that is taken"""
    found = {}
    for row in folders(rows):
        name = plain(Path(row).name)
        found[plain(row) if name in found or name in ("ours", "training objects", "noise") else name] = row
    return found


@torch.no_grad()
def main(argv=None):
    config = parse_config(Config, argv=with_box(argv, Config))
    model, _ = load_autodecoder(config.autodecoder, pick_device(config.device))
    rows, lines = folders(config.rows), []
    for row in rows:
        shown_by, some, _ = read_samples(row, model)
        some = some[:8].to(model.shapes.device)
        rgb = to_bytes(render_views(shown_by, some, cameras(ANGLES[:1]), SIZE)[0][:, 0])
        lines.append(torch.cat([rgb, torch.full((8 - len(rgb), *rgb.shape[1:]), 255, dtype=torch.uint8)]))
    save_picture(config.out, grid(torch.cat(lines), 8))
    print(f"wrote {config.out}; lines, from above: {', '.join(rows)}")


if __name__ == "__main__":
    command(main)

"""
What the chapters on other ways to make new objects share; and their sheet, a line of pictures for each
family.

in   runs/*/latents.pt               samples of the chapters, and what they cost
out  runs/families.png               eight samples of each, seeds 0 to 7: none is picked
run  python -m chapters.families
     python -m lab.evaluate --rows runs/analytic runs/gaudi       the same families in the lab's table
read to_learn, write_samples, read_samples.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from autodecoder import fingerprint, load_autodecoder, read_log
from common import (UserError, command, fill, fill_optimizer, grid, load_checkpoint, parse_config,
                    pick_device, save_checkpoint, save_picture, save_text, to_bytes)
from diffusion import Config as Stage2
from diffusion import RobustNorm, latents_of, load_denoiser, recombined, sample
from sample import BOX, is_run, novelty, summarise
from volume_render import ANGLES, SIZE, cameras, render_views


@dataclass
class Config:
    autodecoder: str = "runs/autodecoder"  # stage 1's folder
    rows: tuple = ("",)                  # folders of chapters; none: all that are in runs/
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
    """-> what a family learns from: recombined codes' latents (P,C,r,r,r), normalised, of mean square 1; the
    objects' own, alike; and a function that makes latents of such numbers"""
    own, norm = latents_of(model, model.codes), RobustNorm(latents_of(model, model.codes[:1]).shape[1:])
    norm.to(own.device).fit(own)
    generator = torch.Generator().manual_seed(config.seed)
    codes = recombined(model, config.recombinations, generator, Stage2())
    data = norm.normalize(latents_of(model, codes))
    scale = data.square().mean().sqrt()
    return data / scale, norm.normalize(own) / scale, lambda numbers: norm.undo(numbers * scale)


def resume(run, model, networks, optimizers):
    """Fills networks {name: network} and the optimizers with what the run saved -> the step to go on from"""
    state = run.load("autodecoder", "optimizers", *networks, "step")
    if not state:
        return 0
    if state["autodecoder"] != fingerprint(model):
        raise UserError(f"{run.folder} was trained on another autodecoder: start over with --fresh")
    for name, network in networks.items():
        fill(network, state[name], run.folder)
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        fill_optimizer(optimizer, saved, run.folder)
    print(f"going on from step {state['step']} of {run.folder}/last.pt")
    return state["step"]


def keep(run, model, networks, optimizers, step):
    run.save({"config": run.config, "step": step, "autodecoder": fingerprint(model),
              "optimizers": [some.state_dict() for some in optimizers],
              **{name: network.state_dict() for name, network in networks.items()}})


def trained_for(folder):
    """-> seconds of training, by log.jsonl.  A run that was continued began to count anew"""
    seconds = [row["seconds"] for row in read_log(folder) if "seconds" in row]
    return sum(now for now, after in zip(seconds, [*seconds[1:], 0.0]) if after < now)


def write_samples(out, model, latents, parameters, sample_seconds):
    """Samples of a family -> latents.pt for the lab, samples.png, report.txt; and the report's rows"""
    training = latents_of(model, model.codes)
    rows = {"samples": novelty(latents, training),
            "training objects": novelty(training, training, itself=True)}
    text = summarise(rows)
    print(text)
    save_text(Path(out, "report.txt"), text + "\n")
    save_checkpoint(Path(out, "latents.pt"), {"latents": latents.cpu(), "autodecoder": fingerprint(model),
                                           "parameters": parameters, "sample_seconds": sample_seconds,
                                           "training_seconds": trained_for(out)})
    rgb = render_views(model, latents[:16], cameras(ANGLES[:1]), SIZE)[0][:, 0]
    save_picture(Path(out, "samples.png"), grid(to_bytes(rgb), min(8, len(rgb))))
    return rows["samples"]


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
    """A chapter's latents.pt, if it is of this autodecoder -> latents (B,...), and the whole state"""
    state = load_checkpoint(Path(folder, "latents.pt"))
    latents = state.get("latents")
    shape = model.config.latent_channels, *[model.config.latent_resolution] * 3
    if state.get("autodecoder") != fingerprint(model):
        raise UserError(f"{folder}/latents.pt was made with another autodecoder: run its chapter again")
    if not isinstance(latents, torch.Tensor) or latents.shape[1:] != shape or not latents.isfinite().all():
        raise UserError(f"{folder}/latents.pt holds no latents of the shape {shape}")
    if not {"parameters", "training_seconds", "sample_seconds"} <= state.keys():
        raise UserError(f"{folder}/latents.pt does not say what its samples cost: run its chapter again")
    return latents.float(), state


@torch.no_grad()
def main(argv=None):
    config = parse_config(Config, argv=with_box(argv, Config))
    model, _ = load_autodecoder(config.autodecoder, pick_device(config.device))
    found = sorted(str(file.parent) for file in Path("runs").glob("*/latents.pt"))
    rows = [row for row in config.rows if row] or found
    if not rows:
        raise UserError("no folder in runs/ holds samples: run a chapter first, as python -m chapters.gaudi")
    lines = []
    for row in rows:
        latents = read_samples(row, model)[0][:8].to(model.shapes.device)
        rgb = to_bytes(render_views(model, latents, cameras(ANGLES[:1]), SIZE)[0][:, 0])
        lines.append(torch.cat([rgb, torch.full((8 - len(rgb), *rgb.shape[1:]), 255, dtype=torch.uint8)]))
    save_picture(config.out, grid(torch.cat(lines), 8))
    print(f"wrote {config.out}; lines, from above: {', '.join(rows)}")


if __name__ == "__main__":
    command(main)

"""
Both trained models as two small run folders: what pretrained/ holds.  Large tensors are stored in half
precision, and what only training needs (optimisers, the weights before averaging) is left out.
load_autodecoder and load_denoiser read them as they read any run.

in   runs/diffusion and its autodecoder
out  pretrained/autodecoder/last.pt, pretrained/diffusion/last.pt
run  python -m viewer.box --out pretrained
"""
from dataclasses import dataclass
from pathlib import Path

from autodecoder import fingerprint, load_autodecoder
from common import UserError, command, load_stage, parse_config, save_checkpoint
from diffusion import load_denoiser


@dataclass
class Config:
    diffusion: str = "runs/diffusion"    # stage 2's folder
    out: str = "packed"                  # folder for both


def small(tensors):
    """{name: tensor} -> the same, large ones in half precision"""
    fits = lambda t: t.numel() > 10_000 and t.half().isfinite().all()
    return {name: t.half() if fits(t) else t for name, t in tensors.items()}


def main(argv=None):
    config = parse_config(Config, argv=argv)
    for name in ("autodecoder", "diffusion"):            # --out runs would replace the runs by their boxes
        if Path(config.out, name, "config.json").exists():
            raise UserError(f"{Path(config.out, name)} holds a run of its own: use another --out")
    load_denoiser(config.diffusion)          # refuses one that was trained on another autodecoder
    second = load_stage(config.diffusion, "stage 2's denoiser", "diffusion.py", "denoiser", "step")
    first = load_stage(second["config"]["autodecoder"], "stage 1's model", "autodecoder.py", "model", "step")
    kept = {key: first[key] for key in ("config", "names", "step")}
    save_checkpoint(Path(config.out, "autodecoder/last.pt"), kept | {"model": small(first["model"])})
    # Rounding changed the weights a little: the denoiser is now that of the rounded autodecoder
    model, _ = load_autodecoder(Path(config.out, "autodecoder"))
    kept = {key: second[key] for key in ("config", "step")}
    save_checkpoint(Path(config.out, "diffusion/last.pt"),
                    kept | {"denoiser": small(second["denoiser"]), "autodecoder": fingerprint(model)})
    for name in ("autodecoder", "diffusion"):
        file = Path(config.out, name, "last.pt")
        print(f"wrote {file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)

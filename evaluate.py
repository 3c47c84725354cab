"""
How good are the samples, beside what needs no diffusion at all?

    python evaluate.py         after stages 1 and 2: prints and writes runs/evaluate/table.txt, table.json

Fresh objects are those of `--data`, which no training saw, as the autodecoder knows them: codes fitted to
their photos (fit_codes), decoded, seen from four fixed cameras.  (The photos themselves would measure the
decoder's blur.)  Samples are good if their views are distributed as those are.  The distance of two sets of
pictures is the energy distance of their pixels (Szekely and Rizzo 2013),

    E(A, B) = 2 mean |a - b| - mean |a - a'| - mean |b - b'|,

0 for sets of one distribution, by chance a little below.  Its deviation, and that of the difference from
ours, come from drawing the fresh objects again and again.  d1 and copies are those of sample.py.

The controls are what diffusion has to beat: G1 of random mixtures of codes, a Gaussian fitted to the codes,
one fitted to the latents; and what it cannot: the training objects themselves.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autodecoder import Config as Stage1, Photos, fit_codes
from common import Run, UserError, atomic_file, load_checkpoint, parse_config, pick_device
from diffusion import code_mixtures, fingerprint, latents_of
from diffusion import sample as draw_samples
from sample import ANGLES, cameras, load_models, nearest, render_views


@dataclass
class Config:
    data: str = "data/earphones_test"    # fresh objects: no training saw them
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    out: str = "runs/evaluate"           # folder for the table
    count: int = 256                     # samples of each kind
    seed: int = 0                        # the first sample's; and of the controls
    objects: int = 0                     # fresh objects; 0: all
    resamplings: int = 500               # for the deviations
    device: str = "auto"                 # auto, cpu or cuda


def gaussian(points, count, generator):
    """points (N,...) -> (count,...) from the Gaussian with their mean and covariance"""
    mean = points.mean(0)
    weight = torch.randn(count, len(points), generator=generator).to(points.device)
    weight = weight / math.sqrt(len(points) - 1)
    return mean + (weight @ (points - mean).flatten(1)).view(count, *points.shape[1:])


def pictures(model, latents, size=32):
    """-> (B,V*H*W*3): the views to compare by"""
    return render_views(model, latents, cameras(ANGLES), size)[0].flatten(1)


def energy_distance(a, b, weight=None):
    """(M,K), (N,K), and how often each of b counts (..., N) -> (...)"""
    weight = torch.ones(1, len(b)) if weight is None else weight
    share = weight / weight.sum(-1, keepdim=True)                                  # (T,N)
    among = torch.cdist(b, b)
    within_a = torch.cdist(a, a).sum() / (len(a) * (len(a) - 1))
    # pairs of b of different draws: an object drawn twice is one pair too many at distance 0
    pairs = (weight @ among * weight).sum(-1)
    within_b = pairs / (weight.sum(-1) ** 2 - weight.square().sum(-1)).clamp(min=1)
    return 2 * share @ torch.cdist(a, b).mean(0) - within_a - within_b


def fresh_codes(config, model, device):
    """Fitted once, kept in --out for the next time."""
    photos = Photos(config.data, model.config.size, config.objects)
    run = Run(config.out, config, ("data", "objects"), name="fresh.json")
    run.lock.close()
    file = run.folder / "fresh.pt"
    if file.exists() and load_checkpoint(file)["fingerprint"] == fingerprint(model):
        return load_checkpoint(file)["codes"].to(device)
    views = photos.rgb.shape[1]
    print(f"fitting the codes of {len(photos.names)} fresh objects to {views} photos each, once")
    codes = fit_codes(model, photos, torch.arange(views), Stage1(), device)
    with atomic_file(file) as temporary:
        torch.save({"codes": codes.cpu(), "fingerprint": fingerprint(model)}, temporary)
    return codes


def main(argv=None):
    config = parse_config(Config, argv=argv)
    if config.count < 4:
        raise UserError(f"--count {config.count}: at least 4 samples are wanted to compare")
    device = pick_device(config.device)
    model, _, denoiser = load_models(config, device)
    training = latents_of(model, model.codes)
    fresh = pictures(model, latents_of(model, fresh_codes(config, model, device)))
    generator = torch.Generator().manual_seed(config.seed)
    sets = {
        "ours": draw_samples(denoiser, range(config.seed, config.seed + config.count)),
        "mixtures of codes": latents_of(model, code_mixtures(model.codes, config.count, generator)),
        "Gaussian of codes": latents_of(model, gaussian(model.codes, config.count, generator)),
        "Gaussian of latents": gaussian(training, config.count, generator),
        "training objects": training}
    drawn = torch.randint(len(fresh), (config.resamplings, len(fresh)), generator=generator)
    weight = torch.zeros(config.resamplings, len(fresh)).scatter_add_(1, drawn, torch.ones(drawn.shape))
    rows, resampled = {}, {}
    for name, latents in sets.items():
        views = pictures(model, latents)
        resampled[name] = energy_distance(views, fresh, weight)
        more = resampled[name] - resampled["ours"]
        distance, _ = nearest(latents, training, itself=latents is training)
        rows[name] = {"distance": energy_distance(views, fresh).item(),
                      "deviation": resampled[name].std().item(),
                      "more_than_ours": more.mean().item(), "its_deviation": more.std().item(),
                      "d1": distance[:, 0].mean().item(),
                      "copies": (distance[:, 0] < distance[:, 1] / 3).float().mean().item()}
    title = f"to {len(fresh)} fresh objects"
    text = [f"{title:<22} {'energy distance':>18} {'more than ours':>18} {'d1':>8} {'copies':>8}"]
    for name, row in rows.items():
        distance, sd, more, its_sd, d1, copies = row.values()
        text.append(f"{name:<22} {distance:>9.3f} +- {sd:.3f} {more:>9.3f} +- {its_sd:.3f} {d1:>8.1f} "
                    f"{copies:>8.3f}")
    print("\n".join(text))
    for file, content in (("table.txt", "\n".join(text) + "\n"),
                          ("table.json", json.dumps({"config": asdict(config), "rows": rows}, indent=1))):
        with atomic_file(Path(config.out) / file) as temporary:
            temporary.write_text(content)


if __name__ == "__main__":
    main()

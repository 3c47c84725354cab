"""
A chapter on stages 1 and 2: earphones from photos of them, with the diffusion model as the prior.

    p(object | photos)  ~  p(photos | object) p(object)        rendering says the first, diffusion the second

One photo leaves the back open.  fit_codes (stage 1) fills it in by a pull towards the mean code, and gives
one answer.  Here an answer is drawn, along the noise levels of stage 2 (Zhang et al. 2024, "DAPS").  At each
level:

    guess      the denoiser takes the noise off: a code that could exist, in the photos' palette
    look       gradient descent moves the code until its renderings look like the photos, and not far
    noise      its latent gets noise again, less than before

At high noise the guess decides, at the end the photos.  Another seed gives another answer: --count 4 draws
four.  At last the latent itself moves a little: it has 8,192 numbers beside the palette, a code has 131.

Two things help with few photos.  Earphones are symmetric, so a mirrored camera would have taken the same
photo: one more for free (--mirror; only a boom is on one side).  And a camera that is not known (--photo) is
searched, by find_camera.py.

in   runs/diffusion and runs/autodecoder, or the model in the box; data/earphones_test/, or a photo on white
out  runs/few_views/      views_2.txt, views_2.png (photo, ours, the same without diffusion, fit_codes);
                          answers.png with --count; photo.png and viewer.html with --photo
run  python -m chapters.few_views --views 1
     python -m chapters.few_views --views 1 --objects 8 --count 4       four answers for each photo
     python -m chapters.few_views --photo my.png
read posterior, main; find_camera.py; and fit_codes, descend in autodecoder.py.
"""
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from autodecoder import PALETTE, descend, fast_precision, fit_codes, palette_code
from chapters.find_camera import find_camera, look_around, read_one
from common import (UserError, command, grid, parse_config, pick_device, save_picture, save_preview,
                    save_text, to_bytes)
from diffusion import heun_sample, latents_of, noise_of
from sample import load_models
from shapes.packed import Photos, read_photos
from viewer.page import write_gallery
from volume_render import ANGLES, cameras, mean_of, psnr, render_views, render_volumes, score_views


@dataclass
class Config:
    data: str = "data/earphones_test"    # a folder of photos in the SRN layout
    photo: str = ""                      # instead: one photo, on white or with alpha, whose camera is unknown
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's folder; "": the one that stage 2 was trained on
    out: str = "runs/few_views"          # folder for the tables and the pictures
    views: int = 2                       # photos of each object that are given; 0: all but the last 8
    objects: int = 24                    # how many of the folder's objects; 0: all
    count: int = 1                       # answers for each object (from 1 to 16)
    mirror: bool = True                  # use each photo's mirror image too: for symmetric objects
    levels: int = 8                      # noise levels on the way down (at least 1)
    steps: int = 25                      # gradient steps at each level; six times as many last (at least 1)
    pull: float = 1e-3                   # weight of the squared distance from the guess, in codes' deviations
    latent_pull: float = 3e-2            # and of the latent's from its code's, divided by how many photos
    seed: int = 0                        # of the noise and the rays
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(objects=2, levels=2, steps=2)}


# ---------------------------------------------------------------------------------- photos with known cameras

def mirrored(photos):
    """The same photos, and after them the same again, seen by the mirrored cameras"""
    # Reflect a photo's own rays (x to -x).  They meet in the mirrored object what they met in the object
    M = torch.diag(torch.tensor([-1.0, 1, 1, 1]))
    twice = lambda some: torch.cat([some, some], 1)
    return Photos(twice(photos.rgb), twice(photos.mask) if photos.has_masks else None,
                  torch.cat([photos.pose, M @ photos.pose], 1), photos.intrinsics, photos.names)


def given_photos(photos, views, config):
    """The photos that an answer sees, and which of them: with --mirror, those of the mirror too"""
    twice = lambda: (mirrored(photos), torch.cat([views, views + photos.rgb.shape[1]]))
    return twice() if config.mirror else (photos, views)


def freed(model, latent, photos, views, objects, config, seed):
    """The latents (B,...), moved away from their codes a little: they can show what no code can"""
    # A latent has 8,192 numbers, so it would fit a single photo too well and spoil what that photo does not
    # show.  More photos need less pull.  A channel counts in its deviation over the voxels: the palette stays
    pull = config.latent_pull / (len(views) / (1 + config.mirror))
    unit = latent.std((2, 3, 4), keepdim=True, correction=0)
    return descend(model, decoder_of(model), latent, unit, photos, views, objects, 6 * config.steps, 0.05,
                   pull, seed)


def posterior(model, denoiser, photos, views, objects, config, seed):
    """One answer for each of these objects -> latents (B,C,r,r,r)"""
    draws = [noise_of(seed * 1_000_003 + o) for o in objects.tolist()]
    draw = lambda: torch.stack([one(denoiser.deviation.shape) for one in draws]).to(denoiser.levels)
    see = lambda decode, start, unit, pull, steps, rate, k: descend(
        model, decode, start, unit, photos, views, objects, steps, rate, pull, seed * 1000 + k)
    places = torch.linspace(1, 0, config.levels).to(denoiser.levels)
    x = draw() * (denoiser.sigma_at(places[0]) ** 2 + denoiser.deviation ** 2).sqrt()
    seen = palette_code(*photos.colours(views, objects)).to(x)
    for k, place in enumerate(places):
        # Three of Heun's steps from here to almost no noise: one guess alone would be a mean of many objects
        sigmas = denoiser.sigma_at(place * torch.tensor([1, 0.6, 0.3, 0.0]).to(places))
        with torch.no_grad():
            for clean in heun_sample(denoiser, x, sigmas, None) if place > 0 else [x]:
                pass
            code = denoiser.guess(clean, sigmas[-1].expand(len(x), 1))
            code[:, -PALETTE:] = seen
        last = k == len(places) - 1
        code = see(model.volumes_of, code, denoiser.code_deviation, config.pull * (0.3 if last else 1),
                   config.steps * (6 if last else 1), 0.1 if last else 0.05, k)
        if not last:
            x = denoiser.to_components(denoiser.latents(code)) + denoiser.sigma_at(places[k + 1]) * draw()
    return freed(model, denoiser.latents(code), photos, views, objects, config, seed * 1000 + len(places))


def decoder_of(model):
    """G2 alone, with fast convolutions"""
    def decode(latent):
        with fast_precision(model.config, latent.device):
            return model.to_volume(latent)
    return decode


class OfLatents:
    """The model, for functions that decode codes and get latents instead"""
    def __init__(self, model):
        self.config, self.field, self.volumes_of = model.config, model.field, model.to_volume


def pictures(model, latent, photos, o, views):
    """A latent, by these cameras of an object -> (V,H,W,3)"""
    return render_volumes(model, model.to_volume(latent[None]), photos.pose[o, views], photos.intrinsics[o],
                          photos.size)[0][0].cpu()


def nearest_training(model, photos, views, objects):
    """-> for each object the training object whose renderings are the nearest to its photos"""
    volumes, best = model.volumes_of(model.codes), []
    for o in objects:
        error = 0
        for view in views:                       # one by one, because all rays at once would take gigabytes
            pose, K = photos.pose[o, view][None], photos.intrinsics[o]
            rgb = render_volumes(model, volumes, pose, K, photos.size)[0]
            error = error + (rgb[:, 0].cpu() - photos.rgb[o, view] / 255).square().flatten(1).mean(1)
        best.append(error.argmin().item())
    return best


# ------------------------------------------------------------------------------------------------------ main

def answers(model, denoiser, photos, views, config):
    """-> latents (count,B,C,r,r,r) of each object's answers"""
    photos, views = given_photos(photos, views, config)
    return torch.stack([torch.cat([posterior(model, denoiser, photos, views, objects, config, config.seed + k)
                                   for objects in torch.arange(len(photos.names)).split(8)])
                        for k in range(config.count)])


def one_photo(model, names, denoiser, config):
    """--photo: find its camera, then answers as for any other"""
    rgb, mask = read_one(config.photo, model.config.size)
    print("looking at the training objects from all around, then for the camera: half a minute", flush=True)
    pose, K, seen = find_camera(model, denoiser, rgb, mask, look_around(model))
    photos = Photos(*(some[None, None] for some in (to_bytes(rgb), to_bytes(mask), pose)), K[None], ["photo"])
    latents = answers(model, denoiser, photos, torch.arange(1), config)[:, 0]
    out = Path(config.out)
    same = render_volumes(model, model.to_volume(latents), pose[None], K, len(rgb))[0][:, 0].cpu()
    around = torch.cat([same[:, None], render_views(model, latents, cameras(ANGLES), len(rgb))[0]], 1)
    rows = torch.cat([photos.rgb[0].expand(len(latents), -1, -1, -1)[:, None], to_bytes(around)], 1)
    save_picture(out / "photo.png", grid(rows.flatten(0, 1), rows.shape[1]))
    said, seeds = [f"answer {k}" for k in range(len(latents[:8]))], (config.seed, config.seed + 1)
    write_gallery(out / "viewer.html", model, names, latents[:8], said, denoiser, seeds)
    x, y, z = pose[:3, 3].tolist()
    azimuth, elevation = math.degrees(math.atan2(y, x)), math.degrees(math.asin(z / math.hypot(x, y, z)))
    print(f"wrote {out}: photo.png (photo, ours, four other sides), viewer.html.  Camera: azimuth "
          f"{azimuth:.0f}, elevation {elevation:.0f} degrees; ours shows it to {psnr(same[0], rgb):.1f} dB")


def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    device, out = pick_device(config.device), Path(config.out)
    model, names, denoiser = load_models(config, device)
    if config.photo:
        return one_photo(model, names, denoiser, config)
    photos = read_photos(config.data, model.config.size, config.objects)
    count, N = photos.rgb.shape[1], len(photos.names)
    given = config.views or count - 8
    if not 1 <= given < count:
        raise UserError(f"--views {config.views}: {config.data} has {count} photos of each object, of which "
                        "one is needed to measure by")

    # Four ways, from the first photos; measured on the last eight
    views, others, objects = torch.arange(given), torch.arange(max(given, count - 8), count), range(N)
    began = time.time()
    latents = answers(model, denoiser, photos, views, config)
    seconds = (time.time() - began) / N / config.count
    fitted = latents_of(model, fit_codes(model, photos, views))
    # What is ours without diffusion?  The mirror, and the latent set free of its code
    both = given_photos(photos, views, config)
    plain = torch.cat([freed(model, part, *both, which, config, config.seed) for part, which in zip(
        latents_of(model, fit_codes(model, *both)).split(8), torch.arange(N).split(8))])
    known = latents_of(model, model.codes[nearest_training(model, photos, views, objects)])
    show = OfLatents(model)
    lines = [f"{N} unseen objects of {config.data}, {given} photos each, {seconds:.1f} s for each object; "
             "PSNR in dB: full / over the object"]
    score = {}
    for name, some in (("ours", latents[0]), ("the same without diffusion", plain), ("fit_codes", fitted),
                       ("the nearest training object", known)):
        rows, seen = (score_views(show, some, photos, objects, which) for which in (others, views))
        score[name] = mean_of(rows, "ours")
        lines.append(f"{name:<28} {score[name]:5.2f} / {mean_of(rows, 'ours_fg'):5.2f}   on the given photos "
                     f"{mean_of(seen, 'ours'):5.2f} / {mean_of(seen, 'ours_fg'):5.2f}")
    path, view = out / f"views_{given}.png", others[:1]
    chosen = torch.linspace(0, N - 1, min(N, 8)).long().tolist()
    columns = [torch.cat([photos.rgb[o, view], *(to_bytes(pictures(model, some[o], photos, o, view))
                                                 for some in (latents[0], plain, fitted))]) for o in chosen]
    save_preview(path, torch.stack(columns, 1))

    # Several answers: where do they differ?  How good is the best, and the mean of their pictures?
    if config.count > 1:
        every, numbers = [], []
        for o in objects:
            seen, unseen = (torch.stack([pictures(model, some[o], photos, o, which) for some in latents])
                            for which in (views, others))                              # (count,V,H,W,3)
            truth = photos.rgb[o, others] / 255
            each = [psnr(one, truth) for one in unseen]
            numbers.append([seen.std(0).mean().item(), unseen.std(0).mean().item(), sum(each) / len(each),
                            max(each), psnr(unseen.mean(0), truth)])
            every.append((seen, unseen))
        text = "{} answers: deviation on given photos {:.4f}, on others {:.4f}; PSNR of one {:.2f}, of "
        text += "the best {:.2f}, of their mean {:.2f}"
        lines.append(text.format(config.count, *torch.tensor(numbers).mean(0)))
        rows = [torch.cat([photos.rgb[o, which[:1]], to_bytes(some[:, 0]),
                           to_bytes(1 - 4 * some[:, :1].std(0))])
                for o in chosen[:4] for which, some in zip((views, others), every[o])]
        save_picture(out / "answers.png", grid(torch.cat(rows), config.count + 2))
    text = "\n".join(lines)
    print(text)
    save_text(path.with_suffix(".txt"), text + "\n")
    print(f"wrote {path}: photo, ours, without diffusion, fit_codes; and {path.with_suffix('.txt')}.  Ours "
          f"less fit_codes: {score['ours'] - score['fit_codes']:+.2f} dB (row F1: +0.09, +0.69, +1.55)")


if __name__ == "__main__":
    command(main)

"""
One page that shows volumes in any browser, without a server or the network: viewer.html.  Its shader is
volume_render.py once more, pixel by pixel; here is what it is fed: stills, words, and volumes in 8 bits,

    channel = low + span byte / 255,      of the voxels alone that a ray can see

in   latents, and with a denoiser the ways out of noise and from one sample to another;
     one of their shapes in the colours of training objects
out  viewer.html, of viewer_template.html
read pack, page_objects, gallery; then viewer_template.html.
"""
import base64
import io
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from autodecoder import GAIN, PALETTE
from common import save_text, to_bytes
from diffusion import latents_of, nearest, noise_of, sample
from shapes.photos import kinds_of
from viewer.isosurface import CASES, LEVEL, bake
from volume_render import ANGLES, EMPTY, any_of_eight, cameras, render_views

TEMPLATE = Path(__file__).parent / "viewer_template.html"


# ---------------------------------------------------------------------------------------- a volume in 8 bits

def pack(channels):
    """channels (4,N,N,N) before activation, density times GAIN -> a dict for the page: 8 bits a number, and
    only of the voxels that some sample in a non-empty cell can see: about one in twelve.  A bit for each
    voxel says whether it is one; their bytes follow, in the same order."""
    dense = F.softplus(channels[None, 0]) > EMPTY
    seen = any_of_eight(any_of_eight(F.pad(dense, (1,) * 6)))[0]                  # those, and all beside them
    values = channels[:, seen] if seen.any() else channels.new_tensor([-20.0, 0, 0, 0])[:, None]
    low, high = values.amin(1), values.amax(1)
    low[0] = low[0].clamp(max=-20)               # what is not stored is byte 0, and must be empty
    high = torch.maximum(high, low + 1e-6)
    bytes_ = ((values - low[:, None]) / (high - low)[:, None] * 255).round().byte()
    data = np.packbits(seen.cpu().numpy(), bitorder="little").tobytes()
    data += bytes_.T.cpu().numpy().tobytes() if seen.any() else b""
    return dict(n=channels.shape[-1], low=low.tolist(), span=(high - low).tolist(),
                data=base64.b64encode(data).decode())


def unpack(packed):
    """What the page makes of it -> (4,N,N,N)"""
    n, data = packed["n"], base64.b64decode(packed["data"])
    bits = -(-n ** 3 // 8)
    seen = np.unpackbits(np.frombuffer(data[:bits], np.uint8), count=n ** 3, bitorder="little").astype(bool)
    texels = np.zeros((n ** 3, 4), np.uint8)
    texels[seen] = np.frombuffer(data[bits:], np.uint8).reshape(-1, 4)
    low, span = (torch.tensor(packed[key])[:, None] for key in ("low", "span"))
    return (low + span * torch.from_numpy(texels).T / 255).view(4, n, n, n)


def bake_for_page(volume, resolution):
    gain = torch.tensor([GAIN, 1, 1, 1], device=volume.device)
    return bake(volume, resolution) * gain.view(4, 1, 1, 1)


# --------------------------------------------------------------------------------------------------- the page

@torch.no_grad()
def page_objects(model, latents, labels, notes, most=64):
    """latents (B,...), a label and a note each -> dicts for the page, each with a still of 192 pixels and at
    most `most` voxels a side"""
    objects = []
    rgb, alpha, *_ = render_views(model, latents, cameras(ANGLES[:1]), 192)
    for k, latent in enumerate(latents):
        volume = model.to_volume(latent[None])
        baked = bake_for_page(volume, min(volume.shape[-1], most))
        objects.append(dict(label=labels[k], note=notes[k], still=data_uri(rgb[k, 0], alpha[k, 0]),
                            **pack(baked)))
    return objects


def data_uri(rgb, alpha):
    """A picture on white -> on nothing, so that it suits a dark page too"""
    rgb = (rgb - 1 + alpha[..., None]) / alpha.clamp(min=1 / 255)[..., None]
    pixels = to_bytes(torch.cat([rgb, alpha[..., None]], -1)).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "WEBP", quality=80, method=1)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def write_page(path, title, about, sets, objects, samples):
    """sets: [(name, what it is, what stands beside its objects, their indices)]; samples: bins along a ray,
    at first.  The page makes meshes too, of the same level and cases as isosurface.py"""
    content = dict(title=title, about=about, samples=samples, level=LEVEL, cases=CASES, objects=objects,
                   sets=[dict(zip(("name", "about", "beside", "objects"), some)) for some in sets])
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")     # no name can end the script
    save_text(path, TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text))


# ---------------------------------------------------------------------------------------------- what is shown

def denoising(denoiser, seed, count=12, **how):
    """-> `count` noise levels, and the latents (count,...) that the denoiser expects; last, the sample"""
    trace = []
    trace.append((0.0, sample(denoiser, [seed], trace=trace, **how)))
    chosen = torch.linspace(0, len(trace) - 1, min(count, len(trace))).round().long().tolist()
    return [trace[k][0] for k in chosen], denoiser.latents(torch.cat([trace[k][1] for k in chosen]))


def walk(denoiser, pair, count=8, **how):
    """Samples of noise between two seeds' -> latents (count,...)"""
    shares = torch.linspace(0, 1, count).tolist()
    return denoiser.latents(sample(denoiser, [between(*pair, share) for share in shares], **how))


def between(a, b, share):
    """Noise on the way from seed a's to seed b's, on a circle: cos and sin times independent N(0, I) add up
    to N(0, I).  A straight line would shrink it halfway, and the denoiser has never seen such noise."""
    one, other, angle = noise_of(a), noise_of(b), share * math.pi / 2
    return lambda shape: math.cos(angle) * one(shape) + math.sin(angle) * other(shape)


def palette(model, names, label, denoiser, pair, count=8, **how):
    """One shape in the colours of training objects -> whose shape, whose colours (count,), latents"""
    if denoiser:
        said, code = f"seed {pair[0]}", sample(denoiser, pair[:1], **how)
    else:
        said, code = label, model.codes[[names.index(label)]]
    # The next one is always the one whose colours are the furthest from all that are chosen
    whose = [0]
    while len(whose) < min(count, len(names)):
        whose.append(torch.cdist(model.palettes, model.palettes[whose]).amin(1).argmax().item())
    whose, codes = sorted(whose), code.repeat(len(whose), 1)
    codes[:, -PALETTE:] = model.palettes[whose]                                # a code ends with its palette
    return said, whose, latents_of(model, codes)


def gallery(model, names, latents, labels, denoiser=None, pair=None, **how):
    """-> the page's sets and objects: these latents; with a denoiser how the first of the seeds `pair` came
    out of noise, and a walk between the two; one shape in many colours; last, the training objects that stand
    beside all these: the nearest one, or the one whose colours they are"""
    training = latents_of(model, model.codes)
    apart = nearest(training, training, itself=True)[0][:, 0]
    shown = [("Samples" if denoiser else "Reconstructions", "", latents, labels, 64)]
    if denoiser:
        sigmas, moments = denoising(denoiser, pair[0], **how)
        path, (a, b) = walk(denoiser, pair, **how), pair
        levels = [f"\u03c3 = {sigma:.3g}" for sigma in sigmas[:-1]]
        between = [f"{k} of {len(path) - 1}" for k in range(1, len(path) - 1)]
        shown += [("Denoising", f"Where the denoiser expects to end, as seed {a}'s noise (\u03c3) falls.",
                   moments, [*levels, f"seed {a}"], 32),
                  ("Walk", f"Samples of the noise between seed {a}'s and seed {b}'s.", path,
                   [f"seed {a}", *between, f"seed {b}"], 64)]
    sets, objects, whose = [], [], []

    def add(name, about, says, some, said, notes, beside, most=64):
        sets.append((name, about, says, list(range(len(objects), len(objects) + len(some)))))
        objects.extend(page_objects(model, some, said, notes, most))
        whose.extend(beside)

    for name, about, some, said, most in shown:
        distance, near = nearest(some, training)
        k = int(not denoiser and len(names) > 1)              # a reconstruction's nearest is itself
        notes = [f"{d:.0f} from the nearest{'' if denoiser else ' other'} training latent; those are "
                 f"{apart.mean():.0f} from their own nearest" if len(names) > 1 else ""
                 for d in distance[:, k].tolist()]
        add(name, about, "Nearest training object", some, said, notes, near[:, k].tolist(), most)
    shape, colours, some = palette(model, names, labels[0], denoiser, pair, **how)
    said = [names[o] for o in colours]
    add("Colours", f"The shape of {shape} in the colours of {len(some)} training objects.",
        "Whose colours these are", some, said, [f"The shape of {shape}, the colours of {o}" for o in said],
        colours)

    # "objects" is what kinds_of says where no kind is known: it would tell nobody anything
    kinds = [kind * (kind != "objects") for kind in kinds_of(model.config.data, names)]
    used = sorted(set(whose))
    for packed, o in zip(objects, whose):
        packed["beside"] = len(objects) + used.index(o)
    objects += page_objects(model, training[used], [names[o] for o in used], [kinds[o] for o in used])
    return sets, objects


def write_gallery(path, model, names, latents, labels, denoiser=None, pair=None, **how):
    sets, objects = gallery(model, names, latents, labels, denoiser, pair, **how)
    what = Path(model.config.data).name.removesuffix("_train")
    said = "samples, none picked" if denoiser else "training objects, reconstructed"
    size = " \u00d7 ".join([str(objects[0]["n"])] * 3)
    about = f"{len(latents)} {said}: volumes of {size} voxels, ray-marched by your browser."
    title = f"{'New' if denoiser else 'Known'} {what}"
    write_page(path, title, about, sets, objects, 2 * model.config.samples)

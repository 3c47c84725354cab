"""
FID and KID: the numbers by which papers on pictures compare, for those who have Inception's weights.

    FID   Frechet distance of two Gaussians, fitted to the features of two sets of pictures (Heusel et al.
          2017): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).  It falls as sets grow: compare equal sizes
    KID   the kernel distance of the same features, with (x y / d + 1)^3 (Binkowski et al. 2018), x 1,000:
          unbiased

Nothing is downloaded here, so the network that everybody compares by, Inception v3, must be given as a file:
pytorch-fid's pt_inception-2015-12-05-6726825d.pth, whose numbers papers print, or torchvision's
inception_v3_google-0cc3c7bd.pth.  They pool differently, and give different numbers.  The lab's own distance
of pictures (evaluate.py), by the features of a network that is trained here, needs no file.

in   runs/diffusion, runs/autodecoder (or the model in the box); Inception's weights
out  runs/fid/fid.md     fresh objects, ours, training objects, chapters: four pictures of each
run  python -m lab.fid --inception pt_inception-2015-12-05-6726825d.pth
read Inception, frechet, main.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from chapters.families import named, read_samples
from common import Run, UserError, command, parse_config, pick_device, save_text, to_bytes
from diffusion import latents_of, sample
from lab.evaluate import markdown
from lab.fresh import AROUND, PIXELS, see_objects
from lab.metrics import cubic, kernel_distance, read_weights
from sample import load_models
from volume_render import cameras, render_views


@dataclass
class Config:
    inception: str = ""                  # a file with Inception v3's weights; the header says which
    diffusion: str = "runs/diffusion"    # stage 2's folder
    autodecoder: str = ""                # stage 1's; "": the one that stage 2 was trained on
    cache: str = "runs/fresh"            # folder for the fresh objects, shared with lab.evaluate
    out: str = "runs/fid"                # folder for the table
    rows: tuple = ("",)                  # chapters' folders that become rows, as runs/gan3d; chapters: all
    count: int = 500                     # samples, and fresh objects, of four pictures each (at least 4)
    seed: int = 0                        # of the first sample and the fresh objects
    device: str = "auto"                 # auto, cpu or cuda


PRESETS = {"cpu": {}, "gpu": {}, "smoke": dict(count=4, cache="runs/fresh_smoke")}


# ----------------------------------------------------------------------------------------------- Inception v3
# Szegedy et al. 2016; the layers have torchvision's names, so its files, and pytorch-fid's, can be read

class Convolution(nn.Module):
    def __init__(self, a, b, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(a, b, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(b, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions, and one that pools"""

    def __init__(self, inner, chains, pool, pooled=0, stride=1):
        super().__init__()
        self.chains, self.pool, self.stride = list(chains.values()), pool, stride
        for chain in chains.values():
            width = inner
            for name, outer, kernel, *more in chain:
                # A last layer that is a pair splits: both take what came before
                self.add_module(name, Convolution(width, outer, kernel, *(more or [1, same(kernel)])))
                width = width if name.endswith("a") else outer
        if pooled:
            self.branch_pool = Convolution(inner, pooled, 1)
        ends = [sum(outer for name, outer, *_ in chain if name[-1] in "ab" or name == chain[-1][0])
                for chain in self.chains]
        self.width = sum(ends) + (pooled or inner)

    def forward(self, x):
        found = []
        for chain in self.chains:
            h = x
            for name, *_ in chain:
                if name.endswith("a"):
                    found.append(self.get_submodule(name)(h))
                else:
                    h = self.get_submodule(name)(h)
            found.append(h)
        if self.stride == 2:
            return torch.cat([*found, F.max_pool2d(x, 3, 2)], 1)
        # pytorch-fid's weights come from a network that leaves the padding out of the mean, and whose last
        # block takes the largest
        h = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(
            x, 3, 1, 1, count_include_pad=self.pool == "padded mean")
        return torch.cat([*found, self.branch_pool(h)], 1)


def same(kernel):
    """The padding that keeps a picture's size"""
    return tuple(k // 2 for k in kernel) if isinstance(kernel, tuple) else kernel // 2


class Inception(nn.Module):
    """Pictures (B,3,H,W) in [0, 1] -> features (B,2048)"""

    def __init__(self, classes=1008):
        super().__init__()
        for name, *layer in [("1a_3x3", 3, 32, 3, 2), ("2a_3x3", 32, 32, 3), ("2b_3x3", 32, 64, 3, 1, 1),
                             ("3b_1x1", 64, 80, 1), ("4a_3x3", 80, 192, 3)]:
            self.add_module(f"Conv2d_{name}", Convolution(*layer))
        mean, width = "mean" if classes == 1008 else "padded mean", 192

        def add(name, chains, pooled=0, stride=1, pool=mean):
            nonlocal width
            chains = {k: [(f"branch{k}{part}", *layer) for part, *layer in chain]
                      for k, chain in chains.items()}
            self.add_module(f"Mixed_{name}", Mixed(width, chains, pool, pooled, stride))
            width = self.get_submodule(f"Mixed_{name}").width

        for name, pooled in (("5b", 32), ("5c", 64), ("5d", 64)):
            add(name, {"1x1": [("", 64, 1)], "5x5": [("_1", 48, 1), ("_2", 64, 5)],
                       "3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3)]}, pooled)
        add("6a", {"3x3": [("", 384, 3, 2)], "3x3dbl": [("_1", 64, 1), ("_2", 96, 3), ("_3", 96, 3, 2)]},
            stride=2)
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            add(name, {"1x1": [("", 192, 1)], "7x7": [("_1", c, 1), ("_2", c, (1, 7)), ("_3", 192, (7, 1))],
                       "7x7dbl": [("_1", c, 1), ("_2", c, (7, 1)), ("_3", c, (1, 7)), ("_4", c, (7, 1)),
                                  ("_5", 192, (1, 7))]}, 192)
        add("7a", {"3x3": [("_1", 192, 1), ("_2", 320, 3, 2)],
                   "7x7x3": [("_1", 192, 1), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, 3, 2)]},
            stride=2)
        for name, pool in (("7b", mean), ("7c", "max" if classes == 1008 else mean)):
            pair = [("a", 384, (1, 3)), ("b", 384, (3, 1))]
            add(name, {"1x1": [("", 320, 1)], "3x3": [("_1", 384, 1), *((f"_2{k}", *l) for k, *l in pair)],
                       "3x3dbl": [("_1", 448, 1), ("_2", 384, 3), *((f"_3{k}", *l) for k, *l in pair)]}, 192,
                pool=pool)
        self.fc = nn.Linear(width, classes)                      # not used: the features lie before it

    def forward(self, x):
        x = 2 * F.interpolate(x, size=(299, 299), mode="bilinear", align_corners=False) - 1
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = F.max_pool2d(x, 3, 2)
            x = layer(x) if name != "fc" else x
        return x.mean((2, 3))


def load_inception(file):
    """The network with the weights of a file, which must have all of its names and shapes"""
    if not file:
        raise UserError("FID compares by Inception v3, whose weights this project does not carry: give a "
                        "file by --inception, as pytorch-fid's pt_inception-2015-12-05-6726825d.pth.  "
                        "python -m lab.evaluate needs none")
    weights = read_weights(file, "--inception")
    with torch.device("meta"):
        network = Inception(weights["fc.bias"].numel() if "fc.bias" in weights else 1008)
    wanted = {name: some for name, some in network.state_dict().items() if "num_batches" not in name}
    wrong = [name for name, some in wanted.items() if getattr(weights.get(name), "shape", None) != some.shape]
    if wrong:
        raise UserError(f"--inception {file} holds no Inception v3: {wrong[0]} of the shape "
                        f"{[*wanted[wrong[0]].shape]} is wanted")
    network.load_state_dict({name: weights[name].float() for name in wanted}, strict=False, assign=True)
    for name, some in network.named_buffers():
        if some.is_meta:                        # the counters of batches, which nothing reads
            network.get_submodule(name.rpartition(".")[0]).num_batches_tracked = torch.zeros(())
    return network.eval().requires_grad_(False)


# -------------------------------------------------------------------------------------------- the two numbers

def frechet(a, b):
    """Features (M,K), (N,K) -> FID"""
    (m1, C1), (m2, C2) = ((some.double().mean(0), torch.cov(some.double().T)) for some in (a, b))
    # tr (C1 C2)^(1/2) is the sum of the roots of C1^(1/2) C2 C1^(1/2)'s eigenvalues, which is symmetric
    values, vectors = torch.linalg.eigh(C1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ C2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + C1.trace() + C2.trace() - 2 * both).item()


def kid(a, b, generator, subsets=50, size=200):
    """Features (N,views,K), (M,views,K) -> KID x 1,000, and its deviation over subsets"""
    # KID's pictures are independent, and views of one object are not: so a subset has one view of each
    size = min(size, len(a), len(b))
    def draw(some):
        view = torch.randint(some.shape[1], (size,), generator=generator)
        return some[torch.randperm(len(some), generator=generator)[:size], view].double()
    found = torch.stack([kernel_distance(cubic, draw(a), draw(b)).squeeze() for _ in range(subsets)])
    return 1000 * found.mean().item(), 1000 * found.std().item()


@torch.no_grad()
def main(argv=None):
    config = parse_config(Config, PRESETS, argv)
    network = load_inception(config.inception)
    device = pick_device(config.device)
    network.to(device)
    model, names, denoiser = load_models(config, device)
    families = {name: read_samples(row, model)[:2] for name, row in named(config.rows).items()}
    run = Run(config.cache, "fresh", config, (), "fresh.json", stale=())
    run.lock.close()
    lock = Run(config.out, "fid", config, (), "fid.json", stale=()).lock

    # Two sets of fresh objects: the first row says how far apart two sets are that differ by chance alone
    count = config.count
    fresh = see_objects(run.folder / "fresh.pt", "fresh", range(2 * count), config, 8, 1, run)["rgb"][:, :4]
    seeds = range(config.seed, config.seed + count)
    ours = torch.cat([denoiser.latents(sample(denoiser, seeds[k:k + 64])) for k in range(0, count, 64)])
    sets = {"ours": (model, ours), "training objects": (model, latents_of(model, model.codes))} | families
    poses = cameras(AROUND[:4])
    look = lambda who, some: to_bytes(render_views(who, some[:count], poses, PIXELS, batch=2)[0])
    pictures = {"fresh objects": fresh[count:]} | {name: look(who, some.to(device))
                                                   for name, (who, some) in sets.items()}

    def features(rgb):
        parts = rgb.flatten(0, 1).permute(0, 3, 1, 2).split(16)
        found = torch.cat([network(part.float().to(device) / 255).cpu() for part in parts])
        return found.unflatten(0, (-1, 4))
    truth, lines = features(fresh[:count]), []
    for name, rgb in pictures.items():
        print(f"{name}: {4 * len(rgb)} pictures", flush=True)
        found = features(rgb)
        value, deviation = kid(found, truth, torch.Generator().manual_seed(0))
        lines.append([name, str(4 * len(rgb)), f"{frechet(found.flatten(0, 1), truth.flatten(0, 1)):.2f}",
                      f"{value:.2f} +- {deviation:.2f}"])
    title = f"From {4 * count} pictures of fresh objects, by {Path(config.inception).name}"
    text = markdown(title, ["", "pictures", "FID", "KID x 1,000"], lines)
    print(text)
    save_text(Path(config.out, "fid.md"), text)
    lock.close()
    print(f"wrote {config.out}/fid.md")


if __name__ == "__main__":
    command(main)

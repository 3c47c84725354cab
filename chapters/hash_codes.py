"""
A chapter on stage 1: codes for a million objects.  3DADM's hash embedding, made for Objaverse's 300,000:

    code of object i  =  ( C_1[h_1(i)],  C_2[h_2(i)],  ...,  C_P[h_P(i)] )       P pieces, from P codebooks
    h_p(i)            =  floor( M ((a_p i + b_p) mod 2^32) / 2^32 )              M entries in each codebook

A table of codes has a row for each object.  Here objects share the entries of smaller codebooks: with a
quarter of the storage four objects share each entry.  But each piece has a hash function of its own (a random
odd number a_p: "multiplicative hashing"), so the four that share one piece are strangers in the next.
Two objects have the same code only if they collide in all pieces.  --hash modulo shows that: all pieces then
collide at once, and objects i and i + M cannot be told apart.

Nothing else changes.  A step touches the entries of its own objects alone (stage 1's sparse gradient and
SparseAdam), so its cost does not grow with the set, as the cost of a plain Adam does.

in   data/earphones_train/       as stage 1
out  runs/hash_codes/            as stage 1; and collisions.txt, cost.txt, cost.png
run  python -m chapters.hash_codes
     python render_shapenet.py --objects 512 --out data/many
     python -m chapters.hash_codes --data data/many/earphones_train --steps 2000
     (26.62 dB with a quarter of the storage, where a table has 25.88: row A8, before stage 1 had Muon)
read HashedAutodecoder, collisions, costs.
"""
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

import autodecoder
from autodecoder import BETAS, GREY, Autodecoder
from common import RANK, UserError, command, load_newest, parse_config, save_figure, save_text


@dataclass
class Config(autodecoder.Config):
    out: str = "runs/hash_codes"         # folder for the model, the log and the pictures
    pieces: int = 32                     # that a shape code is put together from (at least 1)
    storage: float = 0.25                # numbers kept, as a share of a table's (from 0.001 to 1)
    hash: str = "multiplicative"         # multiplicative | modulo: the second is the same in all pieces
    largest: int = 1000000               # objects up to which the cost of a step is measured (at least 1000)


PRESETS = {"cpu": {}, "gpu": autodecoder.PRESETS["gpu"],
           "smoke": dict(autodecoder.PRESETS["smoke"], pieces=4, largest=1000)}


class HashedAutodecoder(Autodecoder):
    """Stage 1's.  `shapes` is now a codebook, and `rows` puts codes together from it"""

    def __init__(self, config, objects):
        super().__init__(config, 0)
        self.objects, self.entries = objects, max(1, round(config.storage * objects))
        width = config.shape_width
        if width % config.pieces:
            raise UserError(f"--pieces {config.pieces}: {width} numbers cannot be cut into so many")
        self.shapes = nn.Parameter(0.1 * torch.randn(config.pieces * self.entries, width // config.pieces))
        self.register_buffer("palettes", torch.tensor(GREY).repeat(objects, 1))
        # The hash functions' random numbers: from a seed of their own, and kept with the weights
        generator = torch.Generator().manual_seed(0)
        draw = lambda: torch.randint(2 ** 31, (config.pieces,), generator=generator)
        self.register_buffer("a", 2 * draw() + 1)
        self.register_buffer("b", draw())

    def places(self, which):
        """Objects (B,) -> which rows of the codebooks, all pieces in one table, are theirs (B,P)"""
        which = which.to(self.a.device)[:, None]
        if self.config.hash == "modulo":
            entry = (which % self.entries).expand(-1, len(self.a))
        else:
            # The highest bits depend on all bits of i; the lowest one of a i, for example, on i's lowest
            entry = (which * self.a + self.b) % 2 ** 32 * self.entries // 2 ** 32
        return torch.arange(len(self.a), device=entry.device) * self.entries + entry

    def rows(self, table, which):
        return F.embedding(self.places(which), table, sparse=True).flatten(1)          # (B,P,w) -> (B,P w)

    @property
    def codes(self):
        every = torch.arange(self.objects, device=self.a.device)
        return self.code(self.shapes.new_zeros(self.objects, 3), every, self.palettes)


def collisions(model):
    """-> a sentence: how many pieces do two objects share?"""
    place = model.places(torch.arange(min(model.objects, 2048)))                                # (N,P)
    same = torch.stack([(one == place).sum(1) for one in place]).triu(1)                        # (N,N)
    pairs = torch.ones_like(same).triu(1).sum().clamp(min=1)
    twins = (same == len(model.a)).sum()
    return (f"{model.objects} objects, {len(model.a)} pieces from {model.entries} entries each: two objects "
            f"share {same.sum() / pairs:.2f} pieces on the mean, {same.max()} at most; "
            f"{twins} pairs have one code")


def costs(config, sizes, objects=8, steps=10):
    """Milliseconds of a step on the codes alone, and bytes of codes, gradients and Adam's two moments

    -> for each number of objects: a table with plain Adam, a table with SparseAdam, codebooks with it"""
    rows = []
    for N in sizes:
        row = [N]
        for build, plain in ((Autodecoder, True), (Autodecoder, False), (HashedAutodecoder, False)):
            # (The decoder is made as small as it can be: only the codes are timed)
            model = build(Config(**vars(config) | dict(channels=(1,), latent_channels=10)), N)
            tables = [model.shapes]
            optimizer = (torch.optim.Adam if plain else torch.optim.SparseAdam)(tables, betas=BETAS)
            seconds = []
            for step in range(steps):
                began = time.perf_counter()
                which = torch.randint(N, (objects,), generator=torch.Generator().manual_seed(step))
                model.code(torch.zeros(objects, 3), which, model.palettes[which]).square().mean().backward()
                for table in tables if plain else ():
                    table.grad = table.grad.to_dense()
                optimizer.step()
                seconds.append(time.perf_counter() - began)
                moments = [some for kept in optimizer.state.values() for some in kept.values()
                           if isinstance(some, torch.Tensor)]
                held = [*tables, *moments, *(table.grad for table in tables)]
                values = lambda some: some.coalesce().values() if some.is_sparse else some
                size = sum(4 * values(some).numel() for some in held)
                optimizer.zero_grad()
            row += [1e3 * sorted(seconds)[len(seconds) // 2], size]
            del model, tables, optimizer, moments, held
        rows.append(row)
    return rows


def write_costs(rows, folder):
    """cost.txt, and cost.png: milliseconds and megabytes against objects"""
    names = "table, plain Adam", "table, SparseAdam", "codebooks, SparseAdam"
    lines = [f"{'codes alone: ms a step / MB held':<34}" + "".join(f"{name:>24}" for name in names)]
    cells = lambda some: "".join(f"{a:>13.2f} / {b / 1e6:>8.1f}" for a, b in zip(some[::2], some[1::2]))
    lines += [f"{N:>10} objects{'':<16}{cells(some)}" for N, *some in rows]
    save_text(Path(folder, "cost.txt"), "\n".join(lines) + "\n")
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    labels = "ms a step, codes alone", "MB: codes, gradients, Adam's state"
    for k, (axis, label) in enumerate(zip(figure.subplots(1, 2), labels)):
        for m, name in enumerate(names):
            values = [row[1 + 2 * m + k] / (1, 1e6)[k] for row in rows]
            axis.plot([row[0] for row in rows], values, "o-", ms=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="objects", ylabel=label)
    axis.legend(fontsize=7)
    save_figure(Path(folder, "cost.png"), figure)
    return "\n".join(lines)


def main(argv=None):
    autodecoder.main(argv, Config, PRESETS, HashedAutodecoder)
    if RANK:
        return
    config = parse_config(Config, PRESETS, argv)
    names = load_newest(config.out, "names")["names"]
    with torch.no_grad():
        said = collisions(HashedAutodecoder(config, len(names)))
    save_text(Path(config.out, "collisions.txt"), said + "\n")
    sizes = [10 ** k for k in range(3, 7) if 10 ** k <= config.largest]
    print(said, write_costs(costs(config, sizes), config.out), sep="\n")
    print(f"wrote {config.out}: as stage 1, collisions.txt, cost.png (A8, by Adam, 512 objects: 26.62 dB)")


if __name__ == "__main__":
    command(main)

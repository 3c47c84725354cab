"""
A chapter on stage 1: the paper's hybrid decoder, in place of a voxel volume.

    code --G1--> three feature planes --G2--> finer planes --sum--> features --MLP--> density, colour

The paper stores features where stage 1 stores density and colour, and a small MLP reads them together with
the position ("neural field").  Its features lie on three planes: a point (x, y, z) looks up xy(x, y),
xz(x, z) and yz(y, z), and adds them.  2D convolutions on planes are cheaper than 3D ones.  But the MLP runs
at every sample of every ray, and that is where the time goes.

Four of its choices are knobs, so that each can be tried alone: the planes, the latent grid (a small volume
per object in place of a code), position concatenation (every block sees where its voxels are), and
self-attention.

in   data/earphones_train/       as stage 1
out  runs/hybrid/                as stage 1
run  python -m chapters.hybrid                              23.45 dB by older code (row A2)
     python -m chapters.hybrid --no-planes --steps 6000 --out runs/mlp_head       33.35 dB (row A15)
     (stage 1 has 31.6 dB, in half the time)
read HybridDecoder, Block, Attention.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

import autodecoder
from autodecoder import BORN, GAIN, PALETTE, Autodecoder
from common import UserError, command


@dataclass
class Config(autodecoder.Config):
    out: str = "runs/hybrid"             # folder for the model, the log and the pictures
    steps: int = 600                     # gradient steps (at least 1)
    recolour: float = 0.0                # the paper shows objects in their own colours alone (from 0 to 1)
    stretched: float = 0.0               # and as they are (from 0 to 1)
    latent_channels: int = 16            # numbers in a latent voxel: no palette is among them (at least 1)
    planes: bool = True                  # three feature planes; no: a feature volume
    grid_latent: bool = False            # each object has a small volume of its own in place of a code
    coordinates: bool = True             # each block sees where its voxels are ("position concatenation")
    attention: bool = False              # self-attention at the latent's resolution, as 3DADM has
    features: int = 8                    # channels that the MLP reads (at least 1)
    mlp_width: int = 32                  # hidden units of the MLP (at least 1)
    bands: int = 4                       # octaves of sines and cosines of the position that the MLP sees


PRESETS = {"cpu": {}, "gpu": autodecoder.PRESETS["gpu"], "smoke": autodecoder.PRESETS["smoke"]}


class Block(nn.Module):
    """Stage 1's, in 2D or 3D, with the voxels' places concatenated to the input.

    The convolution of a concatenation is the sum of two convolutions.  The coordinates' one is the same for
    all objects, so it is done once and added."""

    def __init__(self, width, Conv, with_coordinates):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1, self.conv2 = Conv(width, width, 3, padding=1), Conv(width, width, 3, padding=1)
        axes = 3 if Conv is nn.Conv3d else 2
        self.where = Conv(axes, width, 3, padding=1, bias=False) if with_coordinates else None

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.where(coordinates(x)) if self.where else h
        return x + self.conv2(F.silu(self.norm2(h)))


def coordinates(x):
    """x (B,C,...) -> (1,dims,...) in [-1, 1]: for each voxel where it is, x first"""
    axes = [(torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n * 2 - 1 for n in x.shape[2:]]
    return packed(torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])[None])


class Attention(nn.Module):
    """Every voxel asks every other: 3DADM's, at 8^3, where there are 512 of them."""

    def __init__(self, width):
        super().__init__()
        self.heads = math.gcd(4, width)
        self.norm, self.qkv = nn.GroupNorm(1, width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)                                            # begins as the identity

    def forward(self, x):
        B, C, n = *x.shape[:2], self.heads
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))                    # (B,DHW,3C)
        q, k, v = qkv.view(B, -1, 3, n, C // n).permute(2, 0, 3, 1, 4)             # (B,n,DHW,C/n) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class HybridDecoder(Autodecoder):
    """As stage 1's Autodecoder: codes, to_latent, to_volume, field.

    With planes the latent is (B,3,C,r,r).  The planes are decoded by 2D convolutions and spread into a volume
    as the sum V(x,y,z) = xy(x,y) + xz(x,z) + yz(y,z).  A trilinear lookup in that sum *is* a bilinear lookup
    in the planes, so the one renderer serves both."""

    def __init__(self, config, objects):
        nn.Module.__init__(self)
        self.config, widths, first = config, config.channels, config.channels[0]
        Conv, dims = (nn.Conv2d, 2) if config.planes else (nn.Conv3d, 3)
        copies = 3 if config.planes else 1
        block = lambda width: Block(width, Conv, config.coordinates)

        if config.grid_latent and config.recolour:
            raise UserError("--grid_latent learns an object's own colours: --recolour 0 is wanted with it")
        # A code is spread over 4^dims places; a latent grid has 8 numbers in each place of its resolution
        self.start = (config.latent_resolution if config.grid_latent else 4,) * dims
        shape = copies * 8 * self.start[0] ** dims if config.grid_latent else config.shape_width
        self.shapes = nn.Parameter(0.1 * torch.randn(objects, shape))
        self.register_buffer("palettes", torch.zeros(objects, PALETTE))
        self.spread = (Conv(8, first, 1) if config.grid_latent
                       else nn.Linear(3 + shape + PALETTE, copies * first * self.start[0] ** dims))
        self.g1 = nn.Sequential(block(first), Conv(first, config.latent_channels, 1))

        # G2, level by level as stage 1's; the last one names each voxel's children
        self.enter = Conv(config.latent_channels, first, 3, padding=1)
        self.levels = nn.ModuleList([nn.Sequential(block(width)) for width in widths])
        self.narrow = nn.ModuleList([Conv(a, b, 1) for a, b in zip(widths, widths[1:])])
        if config.attention:
            self.levels[0].append(Attention(first))
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[-1]), nn.SiLU(),
                                   Conv(widths[-1], config.features * 2 ** dims, 3, padding=1))

        # The field: features, the position, and its sines and cosines, to density and colour
        seen, w = config.features + 3 + 6 * config.bands, config.mlp_width
        self.mlp = nn.Sequential(nn.Linear(seen, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(), nn.Linear(w, 4))
        with torch.no_grad():
            self.mlp[-1].bias[0] = BORN

    def to_latent(self, codes):
        """(B,numbers) -> (B,C,r,r,r), or (B,3,C,r,r) for planes"""
        # A latent grid has no room for a palette and three stretches, so it learns its colours itself
        grid = self.config.grid_latent
        x = self.spread(codes[:, 3:-PALETTE].reshape(-1, 8, *self.start) if grid else codes)
        x = x.reshape(-1, self.enter.out_channels, *self.start)
        x = self.g1(packed(resize(x, self.config.latent_resolution)))
        return x.view(-1, 3, *x.shape[1:]) if self.config.planes else x

    def to_volume(self, latent):
        """-> (B,features,D,H,W)"""
        x = self.enter(packed(latent.flatten(0, 1) if self.config.planes else latent))
        for k, level in enumerate(self.levels):
            x = level(x if k == 0 else packed(resize(self.narrow[k - 1](x), 2 * x.shape[-1])))
        x = unfold_children(self.leave(x), self.config.features)
        if self.config.planes:
            xy, xz, yz = x.view(-1, 3, *x.shape[1:]).unbind(1)                     # (B,C,n,n) each
            x = xy[:, :, None] + xz[:, :, :, None] + yz[..., None]                 # (B,C,n,n,n)
        return x.float()

    def field(self, channels, position):
        """What was looked up (...,C), and where (...,3) -> density (...), colour (...,3)"""
        # Without the sines an MLP of this size is smooth: it cannot place an edge
        octaves = math.pi * 2.0 ** torch.arange(self.config.bands, device=position.device)
        angle = (position[..., None] * octaves).flatten(-2)
        channels = self.mlp(torch.cat([channels, position, angle.sin(), angle.cos()], -1))
        return F.softplus(GAIN * channels[..., 0]), torch.sigmoid(channels[..., 1:4])


def packed(x):
    """Channels last in memory: halves the time of convolutions on a CPU."""
    return x.contiguous(memory_format=torch.channels_last_3d if x.dim() == 5 else torch.channels_last)


def resize(x, size):
    mode = "bilinear" if x.dim() == 4 else "trilinear"
    return x if x.shape[-1] == size else F.interpolate(x, size=(size,) * (x.dim() - 2), mode=mode)


def unfold_children(x, width):
    """(B,8C,n,n,n) -> (B,C,2n,2n,2n): eight channels become the halves of each axis; in 2D, four"""
    B, _, *n = x.shape
    axes = len(n)
    x = x.view(B, width, *[2] * axes, *n)
    order = [d for a in range(axes) for d in (2 + axes + a, 2 + a)]                # n, 2, n, 2, n, 2
    return x.permute(0, 1, *order).reshape(B, width, *[2 * k for k in n])


def main(argv=None):
    autodecoder.main(argv, Config, PRESETS, HybridDecoder)


if __name__ == "__main__":
    command(main)

"""
Of stage 1: the decoder G, from a learned code to a volume that can be rendered.  It is split where stage 2
will diffuse:

    code e (256) --G1--> latent volume (16 x 8^3) --G2--> volume (4 x 32^3) --field--> density, colour

Convolutions in 3D, as in 3DADM, or in three feature planes; density and colour straight from the volume
(`head = "voxel"`), or by a small MLP from looked-up features and the position ("mlp", the paper's hybrid
field).  Every size is a knob of autodecoder.py's Config.

read Autodecoder, Block, unfold_children, Attention.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import widths_of

GAIN = 10.0                        # density = softplus(GAIN * channel): a surface must fit between two voxels
BORN = -0.2                        # the density channel at first: thin fog, which any seed can shape


class Block(nn.Module):
    """Two 3^n convolutions, each after a norm and a nonlinearity, around a skip.

    With "position concatenation" the first also sees where each voxel is.  The convolution of a concatenation
    is the sum of two convolutions: the coordinates', the same for all objects, is done once and added."""

    def __init__(self, inner, outer, Conv, with_coordinates=True):
        super().__init__()
        # One group: on a CPU, with channels last, eight groups make the norm's gradient 20 times slower
        self.norm1, self.norm2 = nn.GroupNorm(1, inner), nn.GroupNorm(1, outer)
        self.conv1, self.conv2 = Conv(inner, outer, 3, padding=1), Conv(outer, outer, 3, padding=1)
        axes = 3 if Conv is nn.Conv3d else 2
        self.where = Conv(axes, outer, 3, padding=1, bias=False) if with_coordinates else None
        self.skip = Conv(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.where(coordinates(x)) if self.where else h
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def coordinates(x):
    """x (B,C,...) -> (1,dims,...) in [-1, 1]: for each voxel where it is, x first."""
    axes = [(torch.arange(n, device=x.device, dtype=x.dtype) + 0.5) / n * 2 - 1 for n in x.shape[2:]]
    return packed(torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1])[None])


def packed(x):
    """Channels last in memory: halves the time of 3D convolutions on a CPU."""
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


class Attention(nn.Module):
    """Every voxel asks every other: 3DADM's, at 8^3, where there are 512 of them."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(1, width), nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)                                            # begins as the identity

    def forward(self, x):
        B, C = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))                    # (B,DHW,3C)
        q, k, v = qkv.view(B, -1, 3, 4, C // 4).permute(2, 0, 3, 1, 4)             # (B,4,DHW,C/4) each
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, -1, C)
        return x + self.out(h).transpose(1, 2).reshape(x.shape)


class Autodecoder(nn.Module):
    """codes (N,code_width);  to_latent = G1: code -> latent;  to_volume = G2: latent -> volume;  field: what
    a sample sees.

    In the 2d mode the latent is three planes (B,3,C,r,r), decoded by 2D convolutions and spread into a
    volume as the sum V(x,y,z) = xy(x,y) + xz(x,z) + yz(y,z): trilinear lookup in that sum *is* bilinear
    lookup in the planes, so that one renderer serves both."""

    def __init__(self, config, objects):
        super().__init__()
        self.config, self.planes = config, config.grid == "2d"
        Conv, dims = (nn.Conv2d, 2) if self.planes else (nn.Conv3d, 3)
        widths = widths_of(config.channels)
        first, copies = widths[0], 3 if self.planes else 1
        block = lambda width: Block(width, width, Conv, config.coordinates)
        # G1: a code is spread over 4^3 voxels; a latent grid begins at its own resolution
        self.start = (4 if config.latent == "code" else config.latent_resolution,) * dims
        numbers = config.code_width if config.latent == "code" else copies * 8 * self.start[0] ** dims
        self.codes = nn.Parameter(0.1 * torch.randn(objects, numbers))
        self.spread = (nn.Linear(numbers, copies * first * self.start[0] ** dims) if config.latent == "code"
                       else Conv(8, first, 1))
        self.g1 = nn.Sequential(block(first), Conv(first, config.latent_channels, 1))
        # G2: each level but the first narrows before it doubles the resolution: the finest costs the most
        self.enter = Conv(config.latent_channels, first, 3, padding=1)
        level = lambda width: nn.Sequential(*[block(width) for _ in range(config.blocks)])
        self.levels = nn.ModuleList([level(width) for width in widths])
        self.narrow = nn.ModuleList([Conv(a, b, 1) for a, b in zip(widths, widths[1:])])
        if config.attention:
            self.levels[0].append(Attention(first))
        # The volume: density and three colours, or the features that the MLP reads with the position
        self.width = config.features if config.head == "mlp" else 4
        self.leave = nn.Sequential(nn.GroupNorm(1, widths[-1]), nn.SiLU(),
                                   Conv(widths[-1], self.width * config.children ** dims, 3, padding=1))
        if config.head == "mlp":
            seen, w = config.features + 3 + 6 * config.bands, config.mlp_width
            self.mlp = nn.Sequential(nn.Linear(seen, w), nn.SiLU(), nn.Linear(w, w), nn.SiLU(),
                                     nn.Linear(w, 4))
        with torch.no_grad():
            born = self.mlp[-1].bias[:1] if config.head == "mlp" else self.leave[-1].bias.view(4, -1)[0]
            born.fill_(BORN)

    def to_latent(self, codes):
        """(B,code_width) -> (B,C,r,r,r), or (B,3,C,r,r) for planes"""
        x = self.spread(codes if self.config.latent == "code" else codes.view(-1, 8, *self.start))
        x = x.reshape(-1, self.enter.out_channels, *self.start)
        x = self.g1(packed(resize(x, self.config.latent_resolution)))
        return x.view(-1, 3, *x.shape[1:]) if self.planes else x

    def to_volume(self, latent):
        """-> (B,C,D,H,W) before activation"""
        x = self.enter(packed(latent.flatten(0, 1) if self.planes else latent))
        for k, level in enumerate(self.levels):
            x = level(x if k == 0 else packed(resize(self.narrow[k - 1](x), 2 * x.shape[-1])))
        x = self.leave(x)
        x = unfold_children(x, self.width) if self.config.children == 2 else x
        if self.planes:
            xy, xz, yz = x.view(-1, 3, *x.shape[1:]).unbind(1)
            x = xy[:, :, None] + xz[:, :, :, None] + yz[..., None]
        return x.float()

    def before_activation(self, channels, position):
        """What was looked up (...,C), and where (...,3) -> density and three colours (...,4)"""
        if self.config.head == "mlp":
            octaves = math.pi * 2.0 ** torch.arange(self.config.bands, device=position.device)
            angle = (position[..., None] * octaves).flatten(-2)
            channels = self.mlp(torch.cat([channels, position, angle.sin(), angle.cos()], -1))
        return channels

    def field(self, channels, position):
        """The same -> density (...), colour (...,3)"""
        channels = self.before_activation(channels, position)
        return F.softplus(GAIN * channels[..., 0]), torch.sigmoid(channels[..., 1:4])


def fast_precision(config, device):
    """The autocast that the decoder's convolutions run under: bf16 where the hardware has it."""
    cpu = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    known = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu()
    enabled = config.precision == "bf16" or config.precision == "auto" and known
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=enabled)

"""
The numbers: of a picture, of a shape, of two sets of either.  Each is a function of tensors alone; what they
mean, and what to compare them with, stands in README.md.

read largest_piece, chamfer, one_nna, z_u, kernel_distance.
"""
import math
import os

import torch
import torch.nn.functional as F

from common import UserError


# ------------------------------------------------------------------------------------- one picture, one shape

def largest_piece(solid):
    """(D,H,W) bool -> the share of True voxels in the largest piece that hangs together (by corners too)"""
    label = torch.arange(1.0, solid.numel() + 1, device=solid.device).view_as(solid) * solid
    while True:                                                                    # the highest label spreads
        spread = F.max_pool3d(label[None], 3, 1, 1)[0] * solid
        if torch.equal(spread, label):
            break
        label = spread
    counts = label[solid].unique(return_counts=True)[1]
    return (counts.max() / counts.sum()).item() if len(counts) else math.nan


def haze(alpha):
    """(V,H,W) -> mean opacity further than 2 pixels from what is opaque"""
    beyond = F.max_pool2d((alpha > 0.5).float()[:, None], 5, 1, 2)[:, 0] == 0
    return alpha[beyond].mean().item() if beyond.any() else 0.0


def colour_residual(rgb, alpha, count=4):
    """(V,H,W,3), (V,H,W) -> how far the opaque pixels' colours are from the nearest of `count` (rms)"""
    colours = rgb[alpha > 0.9]
    if len(colours) < count:
        return math.nan
    means = colours[torch.linspace(0, len(colours) - 1, count).long()]
    for _ in range(10):                                            # k-means
        which = torch.cdist(colours, means).argmin(1)
        means = torch.stack([colours[which == k].mean(0) if (which == k).any() else means[k]
                             for k in range(count)])
    return torch.cdist(colours, means).min(1).values.square().mean().sqrt().item()


# --------------------------------------------------------------------------------------------- sets of shapes

def chamfer(a, b, tile=1 << 18):
    """(M,P,3), (N,P,3) -> (M,N): mean squared distance to the nearest point of the other, both ways, summed

    |p - q|^2 = (-2p, 1, |p|^2) . (q, |q|^2, 1): one product for a tile of all pairs, small enough for the
    processor's cache, which is what the time goes to otherwise."""
    square = lambda x: x.square().sum(-1, keepdim=True)
    one = lambda x: torch.ones_like(x[..., :1])
    left, right = torch.cat([-2 * a, one(a), square(a)], -1), torch.cat([b, square(b), one(b)], -1)
    tile, together = (1 << 26, 64) if a.is_cuda else (tile, 8)
    result, P = torch.zeros(len(a), len(b), device=a.device), b.shape[1]
    for i, p in enumerate(left):
        for k in range(i if a is b else 0, len(b), together):          # of a set with itself half will do
            q = right[k:k + together]
            flat, forth, back = q.flatten(0, 1).T, 0, torch.full(q.shape[:2], math.inf, device=a.device)
            for part in p.split(max(1, tile // flat.shape[1])):
                distance = (part @ flat).view(len(part), len(q), P)
                forth = forth + distance.amin(2).clamp(min=0).sum(0)
                back = torch.minimum(back, distance.amin(0))
            result[i, k:k + together] = forth / len(p) + back.clamp(min=0).mean(1)
    return (result.triu() + result.triu(1).T if a is b else result).cpu()


def coverage(between):
    """between (S,R) from samples to references -> (S,): which reference is each sample's nearest.  COV is the
    share of references named.  Some published code counts the other way round, which is wrong."""
    return between.argmin(1)


def mmd(between):
    """(S,R) -> (R,): from each reference to its nearest sample"""
    return between.min(0).values


def one_nna(within_a, between, within_b):
    """(N,N), (N,N), (N,N) -> (2N,) bool: of each shape, is its nearest other of its own set?"""
    everything = torch.cat([torch.cat([within_a, between], 1), torch.cat([between.T, within_b], 1)])
    nearest_other = everything.fill_diagonal_(math.inf).argmin(1)
    N = len(within_a)
    return (nearest_other < N) == (torch.arange(2 * N) < N)


def z_u(samples, unseen, weight_a=None, weight_b=None):
    """Distances to the nearest training object, of samples (M,) and of unseen objects (N,) -> (T,): how many
    deviations the samples' are larger than chance would have them"""
    M, N = len(samples), len(unseen)
    larger = (samples[:, None] > unseen).double() + 0.5 * (samples[:, None] == unseen)
    larger = (once(samples, weight_a) @ larger * once(unseen, weight_b)).sum(1)
    return (larger - M * N / 2) / math.sqrt(M * N * (M + N + 1) / 12)


def once(objects, weight):
    """How often each counts, (T,N): each once, unless it is said"""
    return torch.ones(1, len(objects), dtype=torch.float64) if weight is None else weight


def mean_kernel(kernel, a, b, weight_a=None, weight_b=None):
    """The mean of kernel(a_i, b_j) over pairs (of two different ones, where b is a), or for each of T
    resamplings by how often each counts, (T,M) and (T,N)"""
    weight_a = once(a, weight_a)
    values = kernel(a.double(), b.double())
    if a is b:                                # one drawn twice is no pair with itself
        values.fill_diagonal_(0)
        pairs = weight_a.sum(1) ** 2 - weight_a.square().sum(1)
        return (weight_a @ values * weight_a).sum(1) / pairs.clamp(min=1)
    weight_b = once(b, weight_b)
    return (weight_a @ values * weight_b).sum(1) / (weight_a.sum(1) * weight_b.sum(1))


def kernel_distance(kernel, a, b, weight_a=None, weight_b=None):
    """(M,K), (N,K) -> (T,): the squared distance of the two distributions in the kernel's space, unbiased: by
    chance a little below 0 where they are the same.  With -|x - y| it is the energy distance."""
    within = mean_kernel(kernel, a, a, weight_a) + mean_kernel(kernel, b, b, weight_b)
    return within - 2 * mean_kernel(kernel, a, b, weight_a, weight_b)


def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def minus_distance(x, y):
    return -torch.cdist(x, y)


# ----------------------------------------------------------------------------------- networks of other people

def read_weights(file, flag):
    """{name: tensor} of a file that somebody else saved by torch.save: those that are plain finite numbers"""
    plain = lambda some: (isinstance(some, torch.Tensor) and some.is_floating_point() and not some.is_meta
                          and some.layout == torch.strided and some.isfinite().all())
    try:
        if not os.path.isfile(file):                       # a pipe might never end
            raise OSError("there is no such file")
        state = torch.load(file, map_location="cpu", weights_only=True)
        return {name: some.float() for name, some in state.items() if plain(some)}
    except Exception as error:                            # there is no end of what pickle and torch may raise
        why = (str(error) or type(error).__name__).splitlines()[0][:80]
        why = "it is no file of plain tensors" if why.startswith("Weights only") else why
        raise UserError(f"{flag} {file} cannot be read: {why}") from None

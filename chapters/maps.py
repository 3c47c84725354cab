"""
Networks that chapters on other families share: a codebook (autoregressive.py, hierarchy.py), a denoiser of
maps (hierarchy.py), one of pictures that may see several views of an object at once, and a reader of azimuths
(distill.py).  Both denoisers are EDM's, as in stage 2: a linear guess, and a network for the rest.
"""
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from diffusion import choose_levels, heun_sample, level_embedding


def guess(x, sigma, said):
    """EDM's: a linear guess, and what the network said for the rest.  Its error weighs alike at all levels"""
    total = (1 + sigma ** 2).sqrt()
    return x / total ** 2 + sigma / total * said


def loss_of(clean, z, sigma):
    """Squared error of a guess, with EDM's weight"""
    return ((clean - z).square() * (1 + sigma ** 2) / sigma ** 2).mean()


class Words(nn.Module):
    """A codebook: `count` words of c numbers.  Vectors become their nearest word"""

    def __init__(self, count, c):
        super().__init__()
        self.register_buffer("words", torch.randn(count, c))
        self.register_buffer("used", torch.ones(count))                # running counts, and sums of vectors
        self.register_buffer("sums", self.words.clone())

    def nearest(self, vectors):
        """(...,c) -> (...): the nearest word's number"""
        return torch.cdist(vectors.flatten(0, -2), self.words).argmin(1).view(vectors.shape[:-1])

    def snap(self, vectors):
        """Vectors (...,c) -> their words"""
        return self.words[self.nearest(vectors)]

    def through(self, vectors):
        """(...,c) -> their words, with the vectors' gradient ("straight through"); how far they are apart;
        the vectors (P,c) and their words' numbers (P,), for `move`"""
        tokens = self.nearest(vectors.detach())
        spelled = self.words[tokens]
        apart = (vectors - spelled).square().mean()
        return (vectors + (spelled - vectors).detach(), apart, vectors.detach().flatten(0, -2),
                tokens.flatten())

    def move(self, vectors, tokens, generator):
        """Words go to the running mean of their vectors"""
        share = torch.full((len(tokens),), 0.02, device=tokens.device)
        self.used.mul_(0.98).index_add_(0, tokens, share)
        self.sums.mul_(0.98).index_add_(0, tokens, 0.02 * vectors)
        mean = self.sums / self.used[:, None]
        self.words.copy_(torch.where(self.used[:, None] > 0.01, mean, self.words))
        # A word that nobody uses becomes some vector of this batch, else most of the codebook dies
        dead = (self.used < 0.01).nonzero()[:, 0]
        some = vectors[torch.randint(len(vectors), (len(dead),), generator=generator).to(vectors.device)]
        self.words[dead], self.used[dead], self.sums[dead] = some, 0.02, 0.02 * some


class Block2d(nn.Module):
    """Two 3^2 convolutions around a skip.  What is told scales and shifts what is between them"""

    def __init__(self, width, told=0):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, width), nn.GroupNorm(1, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.told = nn.Linear(told, 2 * width) if told else None

    def forward(self, x, told=None):
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        if told is not None:
            scale, shift = self.told(told)[..., None, None].chunk(2, 1)
            h = h * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


def two_layers(a, b):
    return nn.Sequential(nn.Linear(a, b), nn.SiLU(), nn.Linear(b, b), nn.SiLU())


def as_vectors(c):
    """(B,4n,n,n), heights in the channels -> (B,n,n,n,4)"""
    return c.view(len(c), 4, -1, *c.shape[2:]).movedim(1, -1)


def as_map(c):
    return c.movedim(-1, 1).flatten(1, 2)


class Maker(nn.Module):
    """A denoiser of maps (B,C,h,w) that is told other maps (B,K,h,w)"""

    def __init__(self, channels, told, width):
        super().__init__()
        self.half, self.channels = 16, channels
        self.enter = nn.Conv2d(channels + told, width, 3, padding=1)
        self.level = two_layers(2 * self.half, width)
        self.blocks = nn.ModuleList([Block2d(width, width) for _ in range(4)])
        self.leave = nn.Sequential(nn.GroupNorm(1, width), nn.SiLU(),
                                   nn.Conv2d(width, channels, 3, padding=1))
        for name, shape in dict(levels=(1000,), mean=(channels, 1, 1), spread=(channels, 1, 1)).items():
            self.register_buffer(name, torch.ones(shape))

    def fit(self, maps, generator):
        """Means, deviations and noise levels, from some of the maps to learn"""
        self.mean.copy_(maps.mean((0, 2, 3))[:, None, None])
        self.spread.copy_(maps.std((0, 2, 3))[:, None, None] + 1e-6)
        self.levels.copy_(choose_levels(((maps - self.mean) / self.spread).flatten(1), 0.02, generator)[0])

    def denoise(self, x, sigma, told):
        """x = z + sigma n, of mean square 1 without the noise -> z"""
        sigma = sigma.view(-1, 1, 1, 1)
        level = level_embedding(sigma.flatten().log() / 4, self.half)
        h = self.enter(torch.cat([x / (1 + sigma ** 2).sqrt(), told], 1))
        for block in self.blocks:
            h = block(h, self.level(level))
        return guess(x, sigma, self.leave(h).float())

    def loss(self, maps, told, generator):
        z, u = (maps - self.mean) / self.spread, torch.rand(len(maps), generator=generator)
        sigma = self.levels[(999 * u).round().long().to(z.device)].view(-1, 1, 1, 1)
        x = z + sigma * torch.randn(z.shape, generator=generator).to(z)
        return loss_of(self.denoise(x, sigma, told), z, sigma)

    def sample(self, told, draws, steps):
        """told (B,K,h,w), a function that draws noise for each -> (B,C,h,w)"""
        sigmas = self.levels[torch.linspace(999, 0, steps).round().long()]
        x = torch.stack([draw((self.channels, *told.shape[2:])) for draw in draws]).to(told)
        bound = SimpleNamespace(denoise=lambda x, sigma: self.denoise(x, sigma, told))
        *_, x = heun_sample(bound, x * (1 + sigmas[0] ** 2).sqrt(), sigmas, None)
        return self.denoise(x, sigmas[-1].expand(len(x)), told) * self.spread + self.mean


class PictureDenoiser(nn.Module):
    """A U-Net on pictures (B,V,H,W,3) of B objects, of mean 0 and deviation 1"""

    def __init__(self, config):
        super().__init__()
        w, self.half = config.width, 16
        self.level = two_layers(2 * self.half + 5, 4 * w)
        self.enter, block = nn.Conv2d(3, w, 3, padding=1), lambda width: Block2d(width, 4 * w)
        self.down = nn.ModuleList([block(w), block(2 * w), block(4 * w)])
        self.up = nn.ModuleList([block(w), block(2 * w), block(4 * w)])
        self.wider = nn.ModuleList([nn.Conv2d(w, 2 * w, 1), nn.Conv2d(2 * w, 4 * w, 1)])
        self.narrower = nn.ModuleList([nn.Conv2d(2 * w, w, 1), nn.Conv2d(4 * w, 2 * w, 1)])
        self.norm, self.attention = nn.LayerNorm(4 * w), nn.MultiheadAttention(4 * w, 4, batch_first=True)
        self.leave = nn.Sequential(nn.GroupNorm(1, w), nn.SiLU(), nn.Conv2d(w, 3, 3, padding=1))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, x, sigma, places, made):
        """Noised pictures, sigma (B,), where the cameras are (B,V,3) or zeros, made (B,): 1 for renderings of
        stage 2's samples -> clean pictures"""
        B, V = x.shape[:2]
        level = level_embedding(sigma.log() / 4, self.half)[:, None].expand(-1, V, -1)
        told = self.level(torch.cat([level, places, places.norm(dim=2, keepdim=True),
                                     made.view(-1, 1, 1).expand(-1, V, 1)], 2).flatten(0, 1))
        sigma = sigma.view(-1, 1, 1, 1, 1)
        h, kept = self.enter((x / (1 + sigma ** 2).sqrt()).flatten(0, 1).permute(0, 3, 1, 2)), []
        for k, level in enumerate(self.down):
            h = level(F.avg_pool2d(self.wider[k - 1](h), 2) if k else h, told)
            kept.append(h)
        # On the coarsest level every place of every view may look at all places of all views of its object
        tokens = h.view(B, V, *h.shape[1:]).permute(0, 1, 3, 4, 2).flatten(1, 3)
        normed = self.norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        h = tokens.view(B * V, *h.shape[2:], -1).permute(0, 3, 1, 2)
        for k in (2, 1, 0):
            h = self.up[k](h + kept[k], told)
            h = F.interpolate(self.narrower[k - 1](h), scale_factor=2) if k else h
        return guess(x, sigma, self.leave(h).float().permute(0, 2, 3, 1).view(x.shape))

    def plain(self, pictures):
        return (pictures - self.mean) / self.spread


class ViewReader(nn.Module):
    """Pictures (B,H,W,3) -> (B,2): cosine and sine of twice the azimuth, since fronts look like backs"""

    def __init__(self, config):
        super().__init__()
        level = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(1, b), nn.SiLU())
        self.layers = nn.Sequential(level(3, 32), level(32, 64), level(64, 96), nn.Flatten(),
                                    nn.Linear(96 * (config.size // 8) ** 2, 2))

    def forward(self, pictures):
        return self.layers(pictures.permute(0, 3, 1, 2) * 2 - 1)


def places_of(poses):
    """Where cameras (...,4,4) stand: directions (...,3)"""
    return F.normalize(poses[..., :3, 3], dim=-1)


def doubled(places):
    """Where cameras are (...,3) -> cosine and sine of twice their azimuth"""
    azimuth = torch.atan2(places[..., 1], places[..., 0])
    return torch.stack([(2 * azimuth).cos(), (2 * azimuth).sin()], -1)


@torch.no_grad()
def angle_apart(reader, pictures, places):
    """How far the azimuth that is read is from the camera's, in degrees, where fronts look like backs (B,)"""
    read, true = reader(pictures), doubled(places)
    turn = torch.atan2(read[:, 1], read[:, 0]) - torch.atan2(true[:, 1], true[:, 0])
    return torch.atan2(turn.sin(), turn.cos()).abs().rad2deg() / 2

"""Networks that generate: flows, diffusion, autoencoders, adversaries."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from architectures.common import job, to_target
from memfit.types.job import Job


class Flow(nn.Module):
    """A neural ODE with fixed Runge-Kutta steps; each step is checkpointed by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(
            nn.Linear(33, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 32)
        )

    def slope(self, t: float, x: torch.Tensor) -> torch.Tensor:
        return self.field(torch.cat([x, torch.full_like(x[:, :1], t)], -1))

    def step(self, x: torch.Tensor, t: float, dt: float) -> torch.Tensor:
        k1 = self.slope(t, x)
        k2 = self.slope(t + dt / 2, x + dt / 2 * k1)
        k3 = self.slope(t + dt / 2, x + dt / 2 * k2)
        return x + dt / 6 * (k1 + 2 * k2 + 2 * k3 + self.slope(t + dt, x + dt * k3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(8):
            x = checkpoint(self.step, x, i / 8, 1 / 8, use_reentrant=False)
        return x


def neural_ode() -> Job:
    return job(
        "neural-ode",
        Flow,
        lambda g: (torch.randn(1024, 32, generator=g), torch.randn(1024, 32, generator=g)),
        to_target,
        rows=1024,
    )


class Variational(nn.Module):
    """A convolutional variational autoencoder: sampled latents, upsampling, two losses."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        )
        self.latent, self.open = nn.Linear(32 * 144, 32), nn.Linear(16, 32 * 144)
        self.decode = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.InstanceNorm2d(16),
            nn.PReLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(4, 1, 3, padding=1),
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_var = self.latent(self.encode(x)).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decode(self.open(z).view(-1, 32, 12, 12)), mean, log_var


def vae() -> Job:
    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        again, mean, log_var = model(x)
        apart = -0.5 * (1 + log_var - mean.square() - log_var.exp()).sum(-1).mean()
        return functional.binary_cross_entropy_with_logits(again, x) + 1e-3 * apart

    return job("vae", Variational, lambda g: torch.rand(32, 1, 48, 48, generator=g), loss, rows=32)


class Coupling(nn.Module):
    """Normalise, mix channels by an invertible matrix, and shift and scale one half by the other (Kingma and
    Dhariwal 2018)."""

    def __init__(self, channels: int, width: int = 48) -> None:
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))
        self.mix = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self.net = nn.Sequential(
            nn.Conv2d(channels // 2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = x.shape[-1] * x.shape[-2]
        x = (x + self.shift) * self.scale.exp()
        x = functional.conv2d(x, self.mix[:, :, None, None])
        kept, moved = x.chunk(2, 1)
        shift, scale = self.net(kept).chunk(2, 1)
        scale = torch.sigmoid(scale + 2)
        volume = volume + pixels * (self.scale.sum() + torch.linalg.slogdet(self.mix)[1])
        return torch.cat([kept, (moved + shift) * scale], 1), volume + scale.log().flatten(1).sum(1)


class Glow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Coupling(12) for _ in range(4)] + [Coupling(24) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, volume, prior = functional.pixel_unshuffle(x, 2), torch.zeros(len(x)), torch.zeros(len(x))
        for index, block in enumerate(self.blocks):
            if index == 4:
                x, out = functional.pixel_unshuffle(x, 2).chunk(2, 1)
                prior = prior + out.square().flatten(1).sum(1)
            x, volume = block(x, volume)
        return (0.5 * (prior + x.square().flatten(1).sum(1)) - volume).mean()


def glow() -> Job:
    return job(
        "glow", Glow, lambda g: torch.rand(8, 3, 32, 32, generator=g), lambda m, x: m(x) / 3072, rows=8
    )


class Conditioned(nn.Module):
    def __init__(self, inner: int, outer: int, time: int = 64) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.time = nn.Linear(time, 2 * outer)
        self.norm, self.second = nn.GroupNorm(8, outer), nn.Conv2d(outer, outer, 3, padding=1)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time(functional.silu(time))[..., None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.second(functional.silu(h)) + self.skip(x)


class Denoiser(nn.Module):
    """A small diffusion U-Net; a copy follows its weights as a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.down = nn.ModuleList([Conditioned(32, 32), Conditioned(32, 64)])
        self.middle, self.attention = Conditioned(64, 64), nn.MultiheadAttention(64, 4, batch_first=True)
        self.up = nn.ModuleList([Conditioned(128, 32), Conditioned(64, 32)])
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(16) / 2)
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        x, kept = self.first(x), []
        for block in self.down:
            x = block(x, time)
            kept.append(x)
            x = functional.avg_pool2d(x, 2)
        x = self.middle(x, time)
        tokens = x.flatten(2).transpose(1, 2)
        x = x + self.attention(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view_as(x)
        for block in self.up:
            x = functional.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, kept.pop()], 1), time)
        return self.last(x)


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Denoiser()
        self.average = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                kept.lerp_(new, 0.001)
        level = torch.cos(t)[:, None, None, None]
        noisy = level * x + (1 - level.square()).sqrt() * noise
        return functional.mse_loss(self.net(noisy, t).float(), noise)


def diffusion() -> Job:
    return job(
        "diffusion-ema",
        Diffusion,
        lambda g: (
            torch.randn(8, 3, 32, 32, generator=g),
            torch.rand(8, generator=g),
            torch.randn(8, 3, 32, 32, generator=g),
        ),
        lambda m, b: m(*b),
        rows=8,
    )


class Adversaries(nn.Module):
    """A critic with a gradient penalty, and the generator it judges, in one loss (Gulrajani et al. 2017)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(64, 4 * width * 16),
            nn.Unflatten(1, (4 * width, 4, 4)),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )
        self.critic = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.InstanceNorm2d(2 * width, affine=True),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * 64, 1),
        )

    def forward(self, real: torch.Tensor, noise: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        made = self.generator(noise)
        between = (share * real + (1 - share) * made.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(self.critic(between).sum(), between, create_graph=True)
        penalty = (slope.flatten(1).norm(2, dim=1) - 1).square().mean()
        judged = self.critic(made.detach()).mean() - self.critic(real).mean() + 10 * penalty
        return judged - self.critic(made).mean()


def adversaries() -> Job:
    return job(
        "wgan-gp",
        Adversaries,
        lambda g: (
            torch.randn(16, 3, 32, 32, generator=g),
            torch.randn(16, 64, generator=g),
            torch.rand(16, 1, 1, 1, generator=g),
        ),
        lambda m, b: m(*b),
        rows=16,
    )

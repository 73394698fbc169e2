"""The networks that world models are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of the given sizes with an activation between them, none after the last."""
    layers: list[nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


class Standardise(nn.Module):
    """Vision by no network at all: a standardised vector, certain (std 0). The default for vectors."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.latent = size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        """A column that does not vary keeps scale 1: dividing by its rounding noise would blow it up."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu = (x - self.mean) / self.scale
        return mu, torch.zeros_like(mu)

    def decode(self, z: Tensor) -> Tensor:
        return z * self.scale + self.mean


class MLPVAE(nn.Module):
    """A VAE for vectors."""

    def __init__(self, size: int, latent: int, hidden: int = 256):
        super().__init__()
        self.latent = latent
        self.standardise = Standardise(size)
        self.encoder = mlp([size, hidden, hidden, 2 * latent])
        self.decoder = mlp([latent, hidden, hidden, size])

    def set_scale(self, mean: Tensor, std: Tensor) -> None:
        self.standardise.set_scale(mean, std)

    def target(self, x: Tensor) -> Tensor:
        return self.standardise(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(self.target(x)).chunk(2, -1)
        return mu, (0.5 * logvar.clamp(-10, 4)).exp()

    def reconstruct(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def decode(self, z: Tensor) -> Tensor:
        return self.standardise.decode(self.reconstruct(z))


class ConvVAE(nn.Module):
    """The VAE of World Models (arXiv 1803.10122, appendix A.1): 4x4 convolutions of stride 2 with 32-64-128-256
    channels, for images (H, W, C) uint8 whose sides are 64 or 96."""

    def __init__(self, shape: tuple[int, ...], latent: int, width: int = 32):
        super().__init__()
        height, w, channels = shape
        if height not in (64, 96) or w not in (64, 96):
            raise ValueError(
                f"got images of {height}x{w}, expected sides of 64 or 96 for vision=conv; set env.resize=[64,64]"
            )
        self.shape, self.latent = shape, latent
        c = [channels, width, 2 * width, 4 * width, 8 * width]
        convs: list[nn.Module] = []
        for a, b in zip(c[:-1], c[1:], strict=True):
            convs += [nn.Conv2d(a, b, 4, stride=2), nn.ReLU()]
        self.convs = nn.Sequential(*convs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.no_grad():
            self.grid = self.convs(torch.zeros(1, channels, height, w)).shape[1:]  # (256, 2, 2) for 64x64
        flat = self.grid.numel()
        self.to_latent = nn.Linear(flat, 2 * latent)
        self.from_latent = nn.Linear(latent, flat)
        deconvs: list[nn.Module] = []
        for a, b in zip(c[:0:-1], c[-2::-1], strict=True):
            # the last kernel is 6: 30 -> 64 and 46 -> 96, where 4 would give 62 and 94
            deconvs += [nn.ConvTranspose2d(a, b, 4 if b != channels else 6, stride=2), nn.ReLU()]
        self.deconvs = nn.Sequential(*deconvs[:-1]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def target(self, x: Tensor) -> Tensor:
        """(N, H, W, C) uint8 -> (N, C, H, W) in [0, 1]; the permuted view is channels-last as it lies."""
        return x.permute(0, 3, 1, 2).float() / 255.0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.convs(self.target(x)).flatten(1)  # (N, C, H, W) -> (N, flat)
        mu, logvar = self.to_latent(hidden).float().chunk(2, -1)
        return mu, (0.5 * logvar.clamp(-10, 4)).exp()

    def reconstruct(self, z: Tensor) -> Tensor:
        grid = self.from_latent(z).unflatten(1, self.grid)  # (N, flat) -> (N, 256, h, w)
        return self.deconvs(grid.contiguous(memory_format=torch.channels_last)).float()

    def decode(self, z: Tensor) -> Tensor:
        image = (self.reconstruct(z).clamp(0, 1) * 255).round().to(torch.uint8)
        return image.permute(0, 2, 3, 1)  # (N, C, H, W) -> (N, H, W, C)

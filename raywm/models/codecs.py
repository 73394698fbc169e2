"""Encoders and decoders of observations with named columns: an MLP for all vectors, a CNN for each image."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from raywm.models.heads import biased, initialise, norm_mlp, symlog

Columns = Mapping[str, tuple[tuple[int, ...], bool]]  # name -> (shape, is_image)
MULTIPLES = (1, 2, 4, 8)  # channels of the convolutions, in units of `depth`: each halves the image and doubles them
LEAST_SIDE = 4  # of the last feature map


class ChannelNorm(nn.Module):
    """LayerNorm over channels and SiLU; in channels-last memory the channels lie together."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(channels), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)  # (N,C,H,W) as channels-last, and back


def stages(name: str, shape: tuple[int, ...]) -> int:
    """How many times an image is halved. Raises ValueError for sides that do not halve well."""
    height, width, _ = shape
    count = 0
    while count < len(MULTIPLES) and min(height, width) >> count >= 2 * LEAST_SIDE:
        count += 1
    if count == 0 or height % (1 << count) or width % (1 << count):
        raise ValueError(
            f"observation {name!r} is an image of {height}x{width}, expected sides of at least {2 * LEAST_SIDE} that "
            f"can be halved {max(count, 1)} times (as 64x64, 96x96, 80x128); set env.resize=[64,64]"
        )
    return count


class Encoder(nn.Module):
    """Observations -> tokens (N, ``size``). Vectors are squashed by symlog where asked for."""

    def __init__(self, columns: Columns, units: int, layers: int, depth: int, squash: bool = True):
        super().__init__()
        self.vectors = [name for name, (_, image) in sorted(columns.items()) if not image]
        self.images = [name for name, (_, image) in sorted(columns.items()) if image]
        self.squash, self.size = squash, 0
        self.mlp: nn.Sequential | None = None
        if self.vectors:
            self.mlp = norm_mlp([sum(_length(columns[n][0]) for n in self.vectors), *[units] * layers], raw=True)
            self.size += units
        self.cnns = nn.ModuleDict()
        for name in self.images:
            shape = columns[name][0]
            channels = [shape[2], *(depth * m for m in MULTIPLES[: stages(name, shape)])]
            convs: list[nn.Module] = []
            for a, b in zip(channels[:-1], channels[1:], strict=True):
                convs += [nn.Conv2d(a, b, 4, stride=2, padding=1, bias=not convs), ChannelNorm(b)]
            self.cnns[name] = nn.Sequential(*convs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            halved = len(channels) - 1
            self.size += channels[-1] * (shape[0] >> halved) * (shape[1] >> halved)
        initialise(self)
        for part in [self.mlp] * bool(self.vectors) + list(self.cnns.values()):
            biased(part[0])  # type: ignore[index,arg-type]

    def vector(self, obs: Mapping[str, Tensor]) -> Tensor:
        """All vectors as one (N, D), squashed where asked for: what is encoded, and what is to be decoded."""
        flat = torch.cat([obs[n].float().flatten(1) for n in self.vectors], -1)
        return symlog(flat) if self.squash else flat

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Columns (N, *) -> (N, size)"""
        tokens = [] if self.mlp is None else [self.mlp(self.vector(obs))]
        for name, cnn in self.cnns.items():
            x = obs[name].permute(0, 3, 1, 2).float() / 255 - 0.5  # (N,H,W,C) uint8: channels-last as it lies
            tokens.append(cnn(x).flatten(1))
        return torch.cat(tokens, -1)


class Decoder(nn.Module):
    """Features (N, F) -> "vector" (N, D), all vectors together as ``Encoder.vector`` gives them, and images by name,
    (N, C, H, W) in [0, 1]."""

    def __init__(self, columns: Columns, features: int, units: int, layers: int, depth: int):
        super().__init__()
        self.shapes = {name: shape for name, (shape, image) in sorted(columns.items()) if not image}
        self.mlp: nn.Sequential | None = None
        if self.shapes:
            self.mlp = norm_mlp([features, *[units] * layers])
            self.mlp.append(nn.Linear(units, sum(map(_length, self.shapes.values()))))
        self.first, self.cnns = nn.ModuleDict(), nn.ModuleDict()
        self.grids: dict[str, tuple[int, int, int]] = {}
        for name, (shape, image) in sorted(columns.items()):
            if not image:
                continue
            halved = stages(name, shape)
            channels = [*(depth * m for m in reversed(MULTIPLES[:halved])), shape[2]]
            self.grids[name] = grid = (shape[0] >> halved, shape[1] >> halved, channels[0])
            # by way of fewer units: all features to all of the first map would be most of a large model's weights
            self.first[name] = norm_mlp([features, 2 * units]).append(nn.Linear(2 * units, _length(grid), bias=False))
            convs: list[nn.Module] = [ChannelNorm(channels[0])]
            for a, b in zip(channels[:-2], channels[1:-1], strict=True):
                convs += [nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False), ChannelNorm(b)]
            convs.append(nn.ConvTranspose2d(channels[-2], channels[-1], 4, stride=2, padding=1))
            self.cnns[name] = nn.Sequential(*convs).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        initialise(self)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        if self.mlp is not None:
            out["vector"] = self.mlp(features).float()
        for name, cnn in self.cnns.items():
            x = self.first[name](features).unflatten(-1, self.grids[name])  # (N,F) -> (N,h,w,C)
            out[name] = cnn(x.permute(0, 3, 1, 2)).float().sigmoid()
        return out

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """(N, D) -> the vector columns, in their shapes."""
        parts = vector.split([_length(shape) for shape in self.shapes.values()], -1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts)}


def _length(shape: tuple[int, ...]) -> int:
    length = 1
    for side in shape:
        length *= side
    return length

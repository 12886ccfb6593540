"""Randomness under differential privacy.

Noise and samples must be secret: who can repeat them can subtract them. They come from the
operating system, never from the seed of a run, which the server knows. So a private run cannot be
repeated bit for bit. Tests inject another source.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Chance(Protocol):
    """A source of uniform random numbers."""

    def uniform(self, count: int) -> np.ndarray:
        """``count`` float64 numbers in [0, 1), multiples of 2**-53."""
        ...


class System:
    """The random numbers of the operating system."""

    def uniform(self, count: int) -> np.ndarray:
        drawn = np.frombuffer(os.urandom(8 * count), np.uint64)
        return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


class Seeded:
    """Repeatable random numbers, for tests. They protect nothing."""

    def __init__(self, seed: int):
        self._generator = np.random.default_rng(seed)

    def uniform(self, count: int) -> np.ndarray:
        return self._generator.random(count)


def poisson(chance: Chance, units: int, rate: float) -> np.ndarray:
    """A Poisson sample: each of ``units`` units is in with probability ``rate``, independently.

    Returns:
        The numbers of the chosen units, in order.
    """
    return np.flatnonzero(chance.uniform(units) < rate)


def some(chance: Chance, rows: np.ndarray, most: int) -> np.ndarray:
    """At most ``most`` of the rows, chosen uniformly; all of them where there are no more."""
    if len(rows) <= most:
        return rows
    return np.sort(rows[np.argsort(chance.uniform(len(rows)), kind="stable")[:most]])


def gaussian(chance: Chance, count: int, deviation: float) -> np.ndarray:
    """``count`` independent normal numbers of standard deviation ``deviation``, as float64.

    The method is Box and Muller's, in double precision.
    """
    half = (count + 1) // 2
    length = np.sqrt(-2.0 * np.log1p(-chance.uniform(half)))  # 1 - u is in (0, 1]
    angle = 2.0 * np.pi * chance.uniform(half)
    drawn = np.concatenate([length * np.cos(angle), length * np.sin(angle)])
    return deviation * drawn[:count]


def noises(chance: Chance, like: Mapping[str, Tensor], deviation: float) -> dict[str, Tensor]:
    """Independent normal noise for each tensor, of its shape, type and device.

    The tensors share one draw, in the order of their names.
    """
    import torch

    names = sorted(like)
    drawn = gaussian(chance, sum(like[name].numel() for name in names), deviation)
    parts = torch.from_numpy(drawn).split([like[name].numel() for name in names])
    return {n: p.view(like[n].shape).to(like[n]) for n, p in zip(names, parts, strict=True)}

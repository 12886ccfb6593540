"""An upload as whole numbers of 32 bits whose sum, modulo 2^32, is the sum of the uploads.

The numbers are ``[1, w, w * values]``: a count, the weight, and the weighted values. A fraction is
rounded up or down at random, so that the mean of many rounds has no bias. The random numbers are
the operating system's. The bits of a number leave room for the sum of all sites, so that no sum
can wrap. A value beyond the bound is an error.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass

import numpy as np

from fedvlm.errors import FedVLMError
from fedvlm.privacy.blind.masks import stream

logger = logging.getLogger("fedvlm")

HEAD = 2
"""Numbers before the values: the count and the weight."""


class Overflow(FedVLMError):
    """A value is too large for the encoding."""


@dataclass(frozen=True)
class Encoding:
    """The encoding of one round, alike at all sites and at the server.

    Attributes:
        sites: most sites in the sum.
        bound: the bound of the weight and of a weighted value; values beyond it are an error.
    """

    sites: int
    bound: float

    @property
    def bits(self) -> int:
        """Bits of a number without its sign."""
        return math.floor(31 - math.log2(self.sites))

    @property
    def most(self) -> int:
        """The largest number of one site."""
        return 2**self.bits - 1

    @property
    def quantum(self) -> float:
        """The value of the number 1; a rounded value is off by less.

        The bound is one number below the largest, so that no rounding exceeds the largest.
        """
        return self.bound / (self.most - 1)

    def encoded(self, values: np.ndarray, weight: float) -> np.ndarray:
        """The numbers of a site, uint32 ``[HEAD + values]``.

        Args:
            values: the values of the site, flat, of any float type.
            weight: the weight of the site, above 0.

        Raises:
            Overflow: a weighted value is not finite or beyond the bound.
        """
        if not 0 < weight <= self.bound:
            raise Overflow(f"a weight must be above 0 and at most {self.bound:g}")
        wide = np.empty(HEAD - 1 + len(values))
        wide[0] = weight
        np.multiply(values, weight, out=wide[1:])
        wide /= self.quantum
        largest = float(np.abs(wide).max())
        if not largest <= self.most - 0.5:
            # The error travels to the server, which must not learn a number of one upload.
            logger.warning("the largest weighted value is %.4g", largest * self.quantum)
            raise Overflow(
                f"the upload has a weighted value that is too large: {self.bound:g} is the largest"
                if math.isfinite(largest)
                else "the upload has a value that is not finite"
            )
        wide[1:] += _uniform(len(values))
        numbers = np.empty(HEAD + len(values), np.int64)
        numbers[0], numbers[1] = 1, round(wide[0])
        numbers[HEAD:] = np.floor(wide[1:], out=wide[1:])
        return numbers.astype(np.uint32)

    def decoded(self, total: np.ndarray, sites: int) -> tuple[np.ndarray, float]:
        """The weighted sum of the sites' values (float64), and the sum of their weights.

        Args:
            total: the sum of the sites' numbers modulo 2^32, uint32.
            sites: the number of sites in the sum.

        Raises:
            ValueError: no sum of that many sites has these numbers.
        """
        signed = total.astype(np.uint32).view(np.int32).astype(np.int64)
        if int(signed[0]) != sites:
            raise ValueError(
                f"the sum counts {int(signed[0])} sites instead of {sites}: a site has sent "
                "numbers without meaning, or wrong masks"
            )
        if int(np.abs(signed).max()) > sites * self.most:
            raise ValueError(f"the sum has a number that {sites} sites cannot reach")
        weight = float(signed[1]) * self.quantum
        if not 0 < weight <= sites * self.bound:
            raise ValueError(f"the sum of {sites} weights is {weight:g}")
        return signed[HEAD:] * self.quantum, weight


def _uniform(count: int) -> np.ndarray:
    """``count`` numbers in [0, 1), from a key of the operating system."""
    return stream(os.urandom(32), count).astype(np.float64) * 2.0**-32

"""Shamir's secret sharing of 32-byte secrets over GF(2^128), one half of the secret at a time.

The field and the polynomials are those of ``Crypto.Protocol.SecretSharing`` of pycryptodome, so
that our tests can read the shares of one with the other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from functools import lru_cache

BYTES = 32
MOST = 255
"""Most shares of a secret."""
_HALF = 16
_BITS = 128
_POLYNOMIAL = (1 << _BITS) | 0b10000111  # x^128 + x^7 + x^2 + x + 1


def split(secret: bytes, threshold: int, shares: int) -> dict[int, bytes]:
    """The shares of a secret, by number from 1.

    Args:
        secret: 32 bytes.
        threshold: the number of shares that give the secret; fewer give nothing.
        shares: the number of shares.
    """
    if len(secret) != BYTES:
        raise ValueError(f"a shared secret has {BYTES} bytes, got {len(secret)}")
    if not 1 <= threshold <= shares <= MOST:
        raise ValueError(
            f"a secret has 1 to {MOST} shares and a threshold among them, got a threshold of "
            f"{threshold} and {shares} shares"
        )
    halves = [_polynomial(secret[:_HALF], threshold), _polynomial(secret[_HALF:], threshold)]
    return {
        number: b"".join(_value(half, number).to_bytes(_HALF, "big") for half in halves)
        for number in range(1, shares + 1)
    }


def join(shares: Mapping[int, bytes]) -> bytes:
    """The secret from shares by number; other bytes where a share is wrong or one is missing."""
    if not shares:
        raise ValueError("a secret needs at least one share")
    for number, share in shares.items():
        if not 1 <= number <= MOST or len(share) != BYTES:
            raise ValueError(f"share {number} is no share: it has {len(share)} bytes")
    factors = _factors(tuple(sorted(shares)))
    found = b""
    for first in (0, _HALF):
        total = 0
        for number, factor in factors.items():
            part = int.from_bytes(shares[number][first : first + _HALF], "big")
            total ^= _times(part, factor)
        found += total.to_bytes(_HALF, "big")
    return found


def _polynomial(constant: bytes, threshold: int) -> list[int]:
    """Random coefficients, the highest power first, and the secret as the last one."""
    drawn = [int.from_bytes(secrets.token_bytes(_HALF), "big") for _ in range(threshold - 1)]
    return [*drawn, int.from_bytes(constant, "big")]


def _value(polynomial: list[int], at: int) -> int:
    value = 0
    for coefficient in polynomial:
        value = _times(value, at) ^ coefficient
    return value


@lru_cache
def _factors(numbers: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's factors of the shares for the value at 0."""
    found = {}
    for number in numbers:
        above, below = 1, 1
        for other in numbers:
            if other != number:
                above, below = _times(above, other), _times(below, other ^ number)
        found[number] = _times(above, _inverse(below))
    return found


def _times(a: int, b: int) -> int:
    """The product in GF(2^128)."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        b >>= 1
        a <<= 1
        if a >> _BITS:
            a ^= _POLYNOMIAL
    return product


def _inverse(a: int) -> int:
    """The inverse in GF(2^128), by Euclid's algorithm for polynomials."""
    if not a:
        raise ZeroDivisionError("0 has no inverse")
    left, right, of_left, of_right = a, _POLYNOMIAL, 1, 0
    while left != 1:
        shift = left.bit_length() - right.bit_length()
        if shift < 0:
            left, right, of_left, of_right = right, left, of_right, of_left
            shift = -shift
        left ^= right << shift
        of_left ^= of_right << shift
    while of_left >> _BITS:
        of_left ^= _POLYNOMIAL << (of_left.bit_length() - _BITS - 1)
    return of_left

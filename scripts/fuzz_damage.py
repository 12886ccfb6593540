"""Damage for scripts/fuzz.py: odd words, and bytes that are flipped, cut, repeated or replaced."""

from __future__ import annotations

import random


class Wrong(Exception):
    """The input was taken, but the result is wrong."""


ODD = (
    "true false no yes on off null ~ 007 0x10 1_000 1e2 1E400 .nan .inf -1 0 1.5 '' \"5\" [] {} "
    "[[ {{ &a *a <<: !!python/name:os.system !!binary | > # % @ ` ? : - , a.b 2024-01-01 1:30 "
    "9999999999999999999999 \x1b[2J \x00 \u202e \U0001f600 é \ufeff \r\n \t --- ... __class__ tiny "
    "column iid explicit part:language&layer:0-3 ( [a-z] /etc/passwd ../.. {a:[0,1]}"
)
WORDS = ODD.split(" ")
SMALL = (
    "data.scenes.sites=2",
    "data.scenes.rows=12",
    "partition.min_rows=4",
    "algorithm.name=plora",
    "train.rounds=2",
    "train.local_steps=1",
    "eval.max_rows=2",
    "eval.max_new_tokens=2",
    "lora.rank=2",
    "engine.threads=1",
)


def spoiled(rng: random.Random, content: bytes, most: int = 4) -> bytes:
    """Bytes with some flipped, cut, repeated, removed or replaced by a word."""
    found = bytearray(content)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(found) + 1)
        size = rng.choice((1, 1, 2, 8, 64))
        how = rng.randrange(7)
        if how == 0 and found:
            found[at % len(found)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del found[at : at + size]
        elif how == 2:
            found[at:at] = found[at : at + size] * rng.choice((1, 2, 50))
        elif how == 3:
            found[at : at + size] = rng.randbytes(size)
        elif how == 4:
            found[at:at] = rng.choice(WORDS).encode()
        elif how == 5:
            found[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"))
        elif rng.random() < 0.2:
            del found[at:]
    return bytes(found)

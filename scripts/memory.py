"""Writes the tables of docs/memory.md: which models fit where, by the plan of ``--dry-run``.

    python scripts/memory.py            # renew the tables
    python scripts/memory.py --check    # exit 1 where they are not current

The models are those of the recipes, and those of ``_sizes.py``. Neither the hub nor weights are
needed, and no GPU: the memory of a GPU is assumed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import _sizes
from fedvlm.cli.tables import size
from fedvlm.config import load
from fedvlm.engines import memory
from fedvlm.models import load as loading
from fedvlm.models import lora
from fedvlm.models.shards import blocks_of
from fedvlm.models.spread import SHARE
from fedvlm.planning import footprint
from recipes import FOLDER, filled, table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "memory.md"
GPUS = (8, 16, 24, 40, 80)  # GiB
SEVERAL = ((2, 24), (4, 24), (2, 80), (4, 80), (8, 80))  # GPUs, and GiB of each
KINDS = {
    "fp32": ("model.dtype=float32",),
    "bf16": ("model.dtype=bfloat16",),
    "4 bits": ("model.quantization=4bit",),
}
CLIENTS = 16  # the most in a cell
BATCH = 10**9  # bytes for the batch of a client, at least
LARGE = 3 * 10**9  # parameters of a model in the table of several GPUs


@dataclass(frozen=True)
class Plan:
    """The sizes of a model, by the plan of a run with LoRA on the language model.

    Attributes:
        weights: bytes of the frozen weights.
        each: bytes of a client in a pass, without its batch.
        parameters: number of parameters of the frozen model.
        blocks: bytes of the layers that ``model.shard`` divides.
        block: bytes of the largest of them.
    """

    weights: int
    each: int
    parameters: int
    blocks: int
    block: int


def models() -> dict[str, Any]:
    """Name of a model -> the content of its ``config.json``; the smallest models first."""
    told = {f.name: json.loads((f / "config.json").read_text()) for f in FOLDER.glob("models/*")}
    return told | _sizes.CONFIGS


@cache
def plan(name: str, kind: str) -> Plan:
    """The plan of a model with weights of one kind."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(models()[name]))
        words = (f"model.name={folder}", "model.device=cpu", "lora.target=language")
        config = load(None, *words, *KINDS[kind])
        with mock.patch.object(loading, "quantization", return_value={}):
            bare = loading.load_shapes(config.model)
    blocks = [sum(p.nbytes for p in block.parameters()) for block in blocks_of(bare)]
    model = lora.attach(bare, config.lora, config.seed)
    found = footprint.measure(config, model, footprint.shapes(model, config), [])
    return Plan(found.weights, found.each, found.parameters, sum(blocks), max(blocks))


def cell(each: int, weights: Iterable[int], gib: int) -> str:
    """The clients of a pass, and GB for the batch of each; on GPUs with some weights."""
    held = {torch.device("cuda", n): own for n, own in enumerate(weights)}
    with mock.patch.object(memory, "total", return_value=gib * 2**30):
        room = memory.room("auto", held)
    clients = min(CLIENTS, int(room / (each + BATCH)))
    return f"{clients}: {(room / clients - each) / 1e9:.1f}" if clients > 0 else "no"


def one_gpu(name: str) -> Iterator[list[str]]:
    """A model's rows of the table of one GPU."""
    for kind in KINDS:
        found = plan(name, kind)
        cells = [cell(found.each, [found.weights], gib) for gib in GPUS]
        yield [name, kind, size(found.weights), size(found.each), *cells]


def several_gpus(name: str) -> Iterator[list[str]]:
    """A model's rows of the table of several GPUs."""
    found = plan(name, "bf16")
    spread, shared = [], []
    for count, gib in SEVERAL:
        part = found.weights // count
        fits = part <= SHARE * gib * 2**30
        spread.append(cell(found.each, [part] * count, gib) if fits else "no")
        own = found.weights - found.blocks + found.blocks // count + found.block
        shared.append(cell(found.each, [own], gib))
    yield [name, size(found.weights), "device_map", *spread]
    yield [name, size(found.weights), "shard", *shared]


def page() -> str:
    """The page with current tables."""
    by_size = sorted(models(), key=lambda name: plan(name, "bf16").parameters)
    large = [name for name in by_size if plan(name, "bf16").parameters > LARGE]
    head = ["model", "weights", "bytes", "a client", *(f"{gib} GiB" for gib in GPUS)]
    more = ["model", "bytes", "setting", *(f"{count} x {gib} GiB" for count, gib in SEVERAL)]
    tables = {
        "one": table(head, (row for name in by_size for row in one_gpu(name))),
        "several": table(more, (row for name in large for row in several_gpus(name))),
    }
    return filled(PAGE.read_text(encoding="utf-8"), tables, Path(__file__).name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    text = page()
    current = text == PAGE.read_text(encoding="utf-8")
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    return int(check and not current)


if __name__ == "__main__":
    sys.exit(main())

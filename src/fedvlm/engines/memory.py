"""The number of clients that fit into one pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedvlm import processes
from fedvlm.models.spool import nbytes
from fedvlm.models.spread import held, local
from fedvlm.tree import Tree

COPIES = 8  # of an adapter: factors, gradients, two moments, copies from its begin and its end
SPARE = 1.5  # margin for rows longer than the measured ones, and for temporary tensors
MOST = {"cpu": 16, "cuda": 64}  # larger passes are not faster; on 2 CPU cores, 12 equal 4


def clients_in_a_pass(
    memory: int | Literal["auto"],
    model: Any,
    adapter: Tree,
    activations: int,
    most: int | None = None,
) -> int:
    """The number of clients that a pass can hold; at least 1.

    It depends on the machine and the model, not on the memory that is free now. So a resumed run
    has the same passes.

    Args:
        memory: MiB that a pass may add to the model. ``auto``: half of the machine's memory, or
            four fifths of the GPUs' memory less the model.
        model: the frozen model.
        adapter: the adapter of one client.
        activations: bytes that the batch of one client keeps for its backward pass.
        most: the largest pass that is faster than smaller ones; None: as measured for clients.
    """
    weights = held(model) or {torch.device("cpu"): 0}
    gpus = {device: size for device, size in weights.items() if device.type == "cuda"}
    each = SPARE * activations + COPIES * nbytes(dict(adapter))
    return fitting(room(memory, gpus or weights), next(iter(gpus or weights)), each, most)


def fitting(room: int, device: torch.device, each: float, most: int | None = None) -> int:
    """The number of clients of ``each`` bytes that fit into ``room`` bytes; at least 1."""
    return max(1, min(most or MOST.get(device.type, MOST["cpu"]), int(room / each)))


def room(memory: int | Literal["auto"], weights: Mapping[torch.device, int]) -> int:
    """Bytes that a pass may add to a model over some devices; the fullest decides for each.

    Args:
        memory: see :func:`clients_in_a_pass`.
        weights: bytes of the frozen weights by device.
    """
    rooms = [budget(memory, device, size) for device, size in weights.items()]
    return rooms[0] if memory != "auto" else len(rooms) * min(rooms)


def budget(memory: int | Literal["auto"], device: torch.device, weights: int) -> int:
    """Bytes that a pass may add to a model of ``weights`` bytes."""
    if memory != "auto":
        return memory * 2**20
    if device.type == "cuda":
        return int(0.8 * total(device)) - weights
    return total(device) // 2


def total(device: torch.device) -> int:
    """Bytes of a device's memory; on the CPU, this process's share of its control group's limit."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        machine = min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    _, here = processes.local()
    return machine // here


def kept_for_backward(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes that ``forward`` keeps for a backward pass, without the model's own parameters."""
    weights = (*map(local, model.parameters()), *model.buffers())
    own = {p.untyped_storage().data_ptr() for p in weights}
    kept: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage._cdata] = storage
        return tensor.detach()  # a graph that holds its own outputs is never freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # its graph holds the kept tensors until they are counted
    # A sharded weight has left its memory by now.
    total = sum(storage.nbytes() for storage in kept.values())
    del result
    return total

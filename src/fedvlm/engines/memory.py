"""How many clients fit into one pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fedvlm import processes
from fedvlm.models.spool import nbytes
from fedvlm.tree import Tree

COPIES = 8  # of a client's adapter: factors, gradients, two moments, what it began and ended with
SPARE = 1.5  # rows longer than those that were measured, and what an operation needs on the way
MOST = {"cpu": 16, "cuda": 64}  # more gain nothing; on 2 CPU cores, 12 are no faster than 4


def clients_in_a_pass(
    memory: int | Literal["auto"], model: Any, adapter: Tree, activations: int
) -> int:
    """The number of clients that a pass can hold; 1 at least.

    It follows from the machine and the model alone, not from what is free now, so that a resumed
    run has the same passes.

    Args:
        memory: MiB for all that a pass adds to the model, or ``auto``: half of the machine's
            memory, or four fifths of the GPU's, less the model.
        model: the frozen one.
        adapter: a client's.
        activations: bytes that a client's batch keeps for its backward pass.
    """
    device = next(model.parameters()).device
    room = budget(memory, device, nbytes(list(model.parameters())))
    each = SPARE * activations + COPIES * nbytes(dict(adapter))
    return fitting(room, device, each)


def fitting(room: int, device: torch.device, each: float) -> int:
    """How many clients of ``each`` bytes a pass holds; 1 at least."""
    return max(1, min(MOST.get(device.type, MOST["cpu"]), int(room / each)))


def budget(memory: int | Literal["auto"], device: torch.device, weights: int) -> int:
    """Bytes for all that a pass adds to a model of ``weights`` bytes."""
    if memory != "auto":
        return memory * 2**20
    if device.type == "cuda":
        return int(0.8 * total(device)) - weights
    return total(device) // 2


def total(device: torch.device) -> int:
    """Bytes of a device's memory; of the CPU's, this process's share of its control group's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no control group, or no limit ("max")
        machine = min(machine, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    _, here = processes.local()
    return machine // here


def kept_for_backward(model: Any, forward: Callable[[], Any]) -> int:
    """Bytes that ``forward`` keeps for a backward pass, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a graph that held its own outputs would never be freed

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()  # its graph holds what it keeps until it is counted
    del result
    return sum(kept.values())

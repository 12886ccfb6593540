"""The frozen base in parts: every process of a run holds a share of each block, by FSDP2.

FSDP2 gathers the weights of a block for the time of its pass and drops them after it. It expects
that all processes need the same blocks in the same order. The processes of a run train and score
different clients, which differ in their steps and in the lengths of their answers. So the processes
agree on the next block before they gather it (:class:`Lockstep`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fedvlm import processes
from fedvlm.errors import FedVLMError
from fedvlm.models.spread import local

PATIENCE = timedelta(hours=6)  # a process may wait for another that trains longer
# torch 2.13 has another name for it.
GATHERED = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Groups:
    """Groups of all processes: one for weights, on the devices, and one for short messages."""

    weights: Any
    messages: Any


@contextlib.contextmanager
def in_turn(device: torch.device) -> Iterator[Groups]:
    """Lets the processes of a machine do something one after another.

    So the machine's memory holds one whole base while the processes load it.
    """
    groups = _groups(device.type)
    number, here = processes.local()
    for turn in range(here):
        if turn == number:
            yield groups
        with _there():
            dist.barrier(groups.messages)


@functools.cache
def _groups(device: str) -> Groups:
    weights = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    return Groups(weights, dist.new_group(backend="gloo", timeout=PATIENCE))


def sharded(model: Any, device: torch.device, groups: Groups) -> None:
    """Leaves this process its share of each block of a model, on the device; in place.

    The rest of the model (norms, projector, tied embeddings) is whole in every process.

    Args:
        model: the frozen model, on the CPU.
        device: the device of this process.
        groups: see :func:`in_turn`.

    Raises:
        FedVLMError: the model has no blocks, or torch is too old.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_custom_all_gather"):
        raise FedVLMError(
            f"model.shard needs a newer version of torch than {torch.__version__}: "
            "pip install --upgrade torch"
        )
    blocks = blocks_of(model)
    if not blocks:
        raise FedVLMError(
            f"model.shard: {type(model).__name__} has no list of layers that could be divided; use "
            "model.shard=false"
        )
    mesh = DeviceMesh.from_group(groups.weights, device.type)
    for block in blocks:
        block.register_forward_hook(_no_view)
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    lockstep = Lockstep(blocks, groups.messages)
    for number, block in enumerate(blocks):
        block.set_custom_all_gather(Gather(lockstep, number))
    model.to(device)
    model.lockstep = lockstep


def blocks_of(model: Any) -> list[Any]:
    """The parts of a model that are gathered as a whole, in the order of a forward pass.

    These are the members of its lists of layers, and embeddings that are not tied.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            uses[id(p)] = uses.get(id(p), 0) + 1
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    own = [m for m in ends if isinstance(m, nn.Module) and _alone(m, uses)]
    first, last = (own[:1], own[1:]) if len(own) > 1 else (own, [])
    found = [block for block in _listed(model) if _alone(block, uses)]
    return [*first, *found, *last]


def _alone(block: nn.Module, uses: dict[int, int]) -> bool:
    """Whether a block has weights, and shares none of them."""
    weights = [p for m in block.modules() for p in m.parameters(recurse=False)]
    return bool(weights) and all(uses[id(p)] == 1 for p in weights)


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the outermost lists of layers; a list in a list is one of them too."""
    for child in module.children():
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _listed(child)


def _no_view(block: nn.Module, given: Any, out: Any) -> Any:
    """Copies an output that is a view: a later step in place would drop FSDP2's hook on it."""
    return out.clone() if isinstance(out, Tensor) and out._is_view() else None


class Lockstep:
    """Lets processes gather blocks that they need at different times.

    Every process names the block that it needs next, or that it needs none. All gather the block of
    the lowest number; the others drop it and ask again. Passes forward come first, then passes
    backward from the last block. So a process that is ahead waits for the others, and they gather
    the same blocks together again.

    Args:
        blocks: the sharded blocks, in the order of a forward pass.
        group: a gloo group of all processes.
    """

    def __init__(self, blocks: list[Any], group: Any):
        self._blocks, self._group = blocks, group
        self._none = 2 * len(blocks)
        self._helps = False

    def wait_for(self, number: int) -> None:
        """Returns when all processes gather this block; helps with other blocks until then."""
        if self._helps:
            return
        # While autograd computes gradients, it has a task. FSDP2 asks for it in the same way.
        backward = torch._C._current_graph_task_id() != -1
        turn = self._none - 1 - number if backward else number
        while (next_ := self._agreed(turn)) != turn:
            self._help(next_)

    def settle(self) -> None:
        """Helps the others until no process needs a block.

        Every process calls this at the end of its part.
        """
        while (next_ := self._agreed(self._none)) != self._none:
            self._help(next_)

    def _agreed(self, turn: int) -> int:
        found = torch.tensor([turn])
        with _there():
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self._group)
        return int(found)

    def _help(self, turn: int) -> None:
        block = self._blocks[min(turn, self._none - 1 - turn)]
        whole = all(local(p) is p for p in block.parameters())
        self._helps = True
        try:
            block.reshard()  # a block that is whole here would not be gathered
            block.unshard()
            if not whole:
                block.reshard()
        finally:
            self._helps = False


@contextlib.contextmanager
def _there() -> Iterator[None]:
    """Turns a broken connection into an error for the user."""
    try:
        yield
    except RuntimeError as error:
        raise FedVLMError(
            "another process of this run ended or does not answer; its output, if any, is above. "
            "Finished rounds are kept: resume with 'fedvlm run --resume DIR'"
        ) from error


class Gather:
    """Gathers a block when its turn has come; FSDP2's own form of a custom ``all_gather``."""

    def __init__(self, lockstep: Lockstep, number: int):
        self._lockstep, self._number = lockstep, number

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The memory of a gathered block."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        """Fills ``output_tensor`` with the shares of all processes."""
        self._lockstep.wait_for(self._number)
        return GATHERED(output_tensor, input_tensor, group, async_op=async_op)

"""Messages between the processes of one run, by gloo: Python objects that may hold tensors."""

from __future__ import annotations

import contextlib
import io
import math
import pickle
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fedvlm.errors import FedVLMError
from fedvlm.processes import rank, size

if TYPE_CHECKING:
    from torch import Tensor


PATIENCE = timedelta(hours=6)  # for a silent process; a process that ended is noticed at once


SENT = 2**30  # bytes sent in one piece


class End:
    """The last message of process 0: the run is over."""

    def __init__(self, error: Exception | None = None):
        self.error = error


class Group:
    """The processes that work on one run.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
    """

    def __init__(self, handle: Any = None):
        self.rank, self.size, self._handle = rank(), size(), handle
        self._busy = set(range(1, self.size))  # processes that owe process 0 an answer

    def send(self, message: Any, to: int) -> None:
        """Sends a message to a process; returns when the message has arrived.

        Raises:
            FedVLMError: the process ended.
        """
        import torch
        import torch.distributed as dist

        head, body = pack(message)
        self._busy.add(to)
        with _there(to):
            lengths = torch.tensor([len(head), len(body)])
            for part in (lengths, head, body):
                for piece in part.split(SENT) if len(part) else ():
                    dist.send(piece, to, group=self._handle)

    def receive(self, sender: int) -> Any:
        """The next message of a process.

        Raises:
            FedVLMError: the process ended.
        """
        import torch
        import torch.distributed as dist

        def take(into: Tensor) -> Tensor:
            for piece in into.split(SENT) if len(into) else ():
                dist.recv(piece, sender, group=self._handle)
            return into

        with _there(sender):
            lengths = take(torch.zeros(2, dtype=torch.int64)).tolist()
            head, body = (take(torch.empty(n, dtype=torch.uint8)) for n in lengths)
        self._busy.discard(sender)
        return unpack(head, body)

    def end(self, error: Exception | None = None) -> None:
        """Sends all other processes the last message; process 0 calls this."""
        for other in range(1, self.size):
            if other not in self._busy:
                with contextlib.suppress(FedVLMError):
                    self.send(End(error), other)


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Connects this process to the others; does nothing in a run of one process."""
    if size() == 1:
        yield Group()
        return
    import torch.distributed as dist

    with _there(0):
        if not dist.is_initialized():  # once a process: a second call would find old addresses
            dist.init_process_group("gloo", timeout=PATIENCE)
        handle = dist.new_group(backend="gloo", timeout=PATIENCE)
    group = Group(handle)
    error: Exception | None = None
    try:
        yield group
    except Exception as raised:
        error = raised if isinstance(raised, FedVLMError) else FedVLMError("process 0 failed")
        raise
    except BaseException:
        group._busy.update(range(group.size))  # stopped: send nothing, the connections close
        raise
    finally:
        if group.rank == 0:
            group.end(error)
        dist.destroy_process_group(handle)


@contextlib.contextmanager
def _there(other: int) -> Iterator[None]:
    """Turns a broken connection into an error that names the other process."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise FedVLMError(
            f"process {other} of this run ended or does not answer; its output, if any, is above. "
            f"Finished rounds are kept: resume with 'fedvlm run --resume DIR' ({reason})"
        ) from error


class _Pickler(pickle.Pickler):
    """Takes the tensors out; a tensor that occurs twice is sent once."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, obj: Any) -> int | None:
        import torch

        if not isinstance(obj, torch.Tensor):
            return None
        return self.tensors.setdefault(id(obj), (len(self.tensors), obj))[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self.tensors[pid]


def pack(message: Any) -> tuple[Tensor, Tensor]:
    """A message as bytes: its structure, and the values of its tensors."""
    import torch

    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    tensors = [t.detach().cpu() for _, t in pickler.tensors.values()]
    head = pickle.dumps(([(t.shape, t.dtype) for t in tensors], file.getvalue()))
    parts = [t.reshape(-1).view(torch.uint8) for t in tensors]
    body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(head), dtype=torch.uint8), body


def unpack(head: Tensor, body: Tensor) -> Any:
    """The inverse of :func:`pack`."""
    forms, pickled = pickle.loads(head.numpy().tobytes())
    tensors, start = [], 0
    for shape, dtype in forms:
        end = start + math.prod(shape) * dtype.itemsize
        tensors.append(body[start:end].clone().view(dtype).view(shape))
        start = end
    return _Unpickler(io.BytesIO(pickled), tensors).load()

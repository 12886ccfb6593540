"""Messages between the processes of one run, by gloo. The processes of one machine use loopback."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from fedvlm.engines.portable import pack, portable, unpack
from fedvlm.errors import FedVLMError
from fedvlm.processes import local, rank, size

if TYPE_CHECKING:
    from torch import Tensor


PATIENCE = timedelta(hours=6)  # for a silent process; a process that ended is noticed at once


SENT = 2**30  # bytes sent in one piece


@portable
@dataclass(frozen=True)
class End:
    """The last message of process 0: the run is over."""

    error: Exception | None = None


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

    _stay_here()
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


def _stay_here() -> None:
    """Lets gloo listen on the loopback interface only, if all processes are on this machine.

    Its connections are neither encrypted nor authenticated. ``GLOO_SOCKET_IFNAME`` chooses another
    interface; a run on several machines needs one, on a network that nobody else is on.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if local()[1] == size() and names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])


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

"""Optimizers, clipping and random streams for stacks of clients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedvlm.models.runs import Place
from fedvlm.settings.train import TrainConfig


@dataclass(frozen=True)
class Session:
    """The optimizer of a stretch of training, for the clients of that stretch.

    Attributes:
        optimizer: over the runs of ``trained``.
        trained: name of a factor -> its place in the runs.
        clients: the number of clients.
        left: the state of clients with fewer steps than others, after their last step: client ->
            name of a factor -> kind of state -> the client's rows of the optimizer's state.
    """

    optimizer: torch.optim.Optimizer
    trained: dict[str, Place]
    clients: int
    left: dict[int, dict[str, dict[str, Tensor]]] = field(default_factory=dict)

    def leave(self, clients: Iterable[int]) -> None:
        """Saves the state of clients that have done their steps while others still train."""
        for client in clients:
            if client not in self.left:
                self.left[client] = {name: self._rows(name, client) for name in self.trained}

    def _rows(self, name: str, client: int) -> dict[str, Tensor]:
        place = self.trained[name]
        state = self.optimizer.state[place.run].items()
        return {key: place.of(t)[client].clone() for key, t in state if t is not None and t.dim()}

    def resumed(self, fresh: Session, places: Sequence[int], steps: int) -> Session:
        """A session for some of the clients, with the state of this optimizer.

        Args:
            fresh: a new optimizer over the runs of these clients.
            places: their places in this session, in the order of the new session.
            steps: the number of steps of each of these clients with this optimizer.
        """
        same = all(self.trained[name].run is p.run for name, p in fresh.trained.items())
        if same and not self.left and list(places) == list(range(self.clients)):
            return self
        for name, place in fresh.trained.items():
            rows = [self.left.get(k, {}).get(name) or self._rows(name, k) for k in places]
            state = fresh.optimizer.state[place.run]
            for key in rows[0]:
                if key not in state:
                    state[key] = torch.zeros_like(place.run, requires_grad=False)
                place.of(state[key]).copy_(torch.stack([row[key] for row in rows]))
            known = self.optimizer.state[self.trained[name].run].get("step")
            if known is not None:
                state["step"] = torch.full_like(known, steps)
        return fresh


class Streams:
    """One random stream a client, for dropout: the state of the global generator is swapped.

    Args:
        seed: ``(client) -> the seed`` of its stream.
    """

    def __init__(self, seed: Callable[[int], int]):
        self._seed = seed
        self._states: dict[int, tuple[Tensor, list[Tensor]]] = {}

    @contextlib.contextmanager
    def of(self, client: int) -> Iterator[None]:
        """Activates the client's stream, at the position of its last use."""
        cuda = torch.cuda.is_available()
        with torch.random.fork_rng():
            if client in self._states:
                state, states = self._states[client]
                torch.set_rng_state(state)
                torch.cuda.set_rng_state_all(states)
            else:
                torch.manual_seed(self._seed(client))
            yield
            states = torch.cuda.get_rng_state_all() if cuda else []
            self._states[client] = torch.get_rng_state(), states


def clip(runs: Sequence[Tensor], limit: float) -> None:
    """Scales the gradient of each client to a norm of at most ``limit``, like ``clip_grad_norm_``.

    Args:
        runs: parameters ``[pieces, clients, ranks, width]``.
        limit: largest norm.
    """
    grads = [p.grad for p in runs if p.grad is not None]
    first = grads[0].device
    each = [torch.linalg.vector_norm(g.flatten(2), dim=2).to(first) for g in grads]
    norms = torch.linalg.vector_norm(torch.cat(each), dim=0)  # [clients]
    scale = (limit / (norms + 1e-6)).clamp(max=1.0).view(-1, 1, 1)
    scales = {device: scale.to(device) for device in {g.device for g in grads}}
    for g in grads:
        g.mul_(scales[g.device])


def make_optimizer(
    runs: Mapping[str, Sequence[nn.Parameter]], settings: TrainConfig, scale: float
) -> torch.optim.Optimizer:
    """A fresh optimizer over the runs of each factor, with a learning rate for A and one for B."""
    groups = [{"params": list(runs[f]), "lr": rate * scale} for f, rate in settings.rates.items()]
    groups = [g for g in groups if g["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    first = next(run for own in runs.values() for run in own)
    fused = first.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused
    )

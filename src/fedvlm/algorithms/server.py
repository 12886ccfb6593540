"""Optimizers at the server.

The optimizer takes the change of a round as its gradient. FedAdagrad, FedYogi and FedAdam: Reddi et
al., arXiv 2003.00295, algorithm 2, without bias correction; the second moment begins at tau
squared. FedAvgM: Hsu et al., arXiv 1909.06335; the momentum is a sum, not a mean, of the rounds'
changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from fedvlm.algorithms.base import Algorithm, Averaged, State
from fedvlm.settings.method import Section
from fedvlm.tree import Tree, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

Second = Callable[["Tensor", "Tensor", float], "Tensor"]  # (v, change squared, beta2) -> v

SECOND: dict[str, Second] = {
    "adagrad": lambda v, square, beta2: v + square,
    "yogi": lambda v, square, beta2: v - (1 - beta2) * square * (v - square).sign(),
    "adam": lambda v, square, beta2: beta2 * v + (1 - beta2) * square,
}


class ServerConfig(Section):
    """An optimizer at the server; its gradient is the change of a round (arXiv 2003.00295)."""

    name: Literal["none", "avgm", "adagrad", "yogi", "adam"] = Field(
        "none", description="server optimizer; none: plain mean; avgm: arXiv 1909.06335"
    )
    lr: Annotated[float, Field(gt=0)] | None = Field(
        None, description="server learning rate; empty: 1 for avgm, 0.01 for the others"
    )
    beta1: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="momentum; empty: 0 for adagrad, 0.9 for the others"
    )
    beta2: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99, description="yogi, adam: decay of the second moment"
    )
    tau: Annotated[float, Field(gt=0)] = Field(
        1e-3, description="adagrad, yogi, adam: degree of adaptivity; smaller adapts more"
    )

    @model_validator(mode="after")
    def _settings_have_a_meaning(self) -> ServerConfig:
        fields = type(self).model_fields
        idle = [n for n in fields if n != "name" and getattr(self, n) != fields[n].default]
        if self.name == "none" and idle:
            raise ValueError(
                f"{', '.join(idle)} has no meaning without an optimizer: set "
                "algorithm.server.name, or leave it out"
            )
        return self

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.lr or (1.0 if self.name == "avgm" else 0.01)

    @property
    def momentum(self) -> float:
        """The decay of the first moment."""
        if self.beta1 is not None:
            return self.beta1
        return 0.0 if self.name == "adagrad" else 0.9


def optimized(algorithm: Algorithm, settings: ServerConfig) -> Algorithm:
    """``algorithm`` with an optimizer at the server.

    Args:
        algorithm: an algorithm whose server is :class:`Averaged` and takes the whole step to the
            mean.
        settings: the settings of the optimizer.
    """
    if settings.name == "none":
        return algorithm
    server = algorithm.server
    assert isinstance(server, Averaged)
    second, beta1 = SECOND.get(settings.name), settings.momentum

    def init(initial: Tree) -> State:
        state = algorithm.init(initial)
        first = named("first", {n: t.new_zeros(t.shape) for n, t in state.items()})
        if second is None:
            return {**state, **first}
        begun = {n: t.new_full(t.shape, settings.tau**2) for n, t in state.items()}
        return {**state, **first, **named("second", begun)}

    def update(state: State, mean: Tree, round: int) -> Tree:
        old = plain(state)
        new = server.update(old, mean, round)  # without factors that were not trained
        moments, squares = part(state, "first"), part(state, "second")
        moved, first, seconds = dict(new), dict[str, "Tensor"](), dict[str, "Tensor"]()
        for name in new.keys() & old.keys():
            delta = new[name] - old[name]
            if second is None:
                first[name] = beta1 * moments[name] + delta
                moved[name] = old[name] + settings.rate * first[name]
                continue
            first[name] = beta1 * moments[name] + (1 - beta1) * delta
            seconds[name] = second(squares[name], delta.square(), settings.beta2)
            ratio = first[name] / (seconds[name].sqrt() + settings.tau)
            moved[name] = old[name] + settings.rate * ratio
        return {**moved, **named("first", first), **named("second", seconds)}

    return replace(
        algorithm,
        init=init,
        send=lambda state, visit: algorithm.send(plain(state), visit),
        server=replace(server, update=update),
    )

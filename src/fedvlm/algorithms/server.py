"""What the server makes of the rounds' means: steps of an optimizer, or a mean over the rounds.

Optimizers, to which a round's change is a gradient. FedAdagrad, FedYogi and FedAdam: Reddi et al.,
arXiv 2003.00295, algorithm 2: no bias correction, and the second moment begins at tau squared.
FedAvgM: Hsu et al., arXiv 1909.06335: the momentum is a sum, not a mean, of the rounds' changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Client, State, everywhere
from fedvlm.tree import Tree, named, part, plain

if TYPE_CHECKING:
    from torch import Tensor

    from fedvlm.settings.sections import ServerConfig

Second = Callable[["Tensor", "Tensor", float], "Tensor"]  # (v, change squared, beta2) -> v

SECOND: dict[str, Second] = {
    "adagrad": lambda v, square, beta2: v + square,
    "yogi": lambda v, square, beta2: v - (1 - beta2) * square * (v - square).sign(),
    "adam": lambda v, square, beta2: beta2 * v + (1 - beta2) * square,
}


def optimized(algorithm: Algorithm, server: ServerConfig) -> Algorithm:
    """``algorithm``, whose means are steps of an optimizer that the server runs.

    Args:
        algorithm: one that averages factors; its own step towards the mean must be a whole one.
        server: which optimizer, and its settings.
    """
    if server.name == "none":
        return algorithm
    second = SECOND.get(server.name)

    def init(adapter: Tree) -> State:
        state = algorithm.init(adapter)
        first = named("first", {n: t.new_zeros(t.shape) for n, t in state.items()})
        if second is None:
            return {**state, **first}
        begun = {n: t.new_full(t.shape, server.tau**2) for n, t in state.items()}
        return {**state, **first, **named("second", begun)}

    def change(one: Algorithm) -> Algorithm:
        def download(state: State, client: Client) -> Tree:
            return one.download(plain(state), client)

        def update(state: State, mean: Tree) -> State:
            old = plain(state)
            new = one.update(old, mean)
            moments, squares = part(state, "first"), part(state, "second")
            for name in mean:  # what was not sent this round stays, and so do its moments
                delta = new[name] - old[name]
                if second is None:
                    moments[name] = server.momentum * moments[name] + delta
                    new[name] = old[name] + server.rate * moments[name]
                    continue
                beta1 = server.momentum
                moments[name] = beta1 * moments[name] + (1 - beta1) * delta
                squares[name] = second(squares[name], delta.square(), server.beta2)
                ratio = moments[name] / (squares[name].sqrt() + server.tau)
                new[name] = old[name] + server.rate * ratio
            return {**new, **named("first", moments), **named("second", squares)}

        return replace(one, init=init, download=download, update=update)

    return everywhere(change, algorithm)


def late_mean(algorithm: Algorithm, power: int = 3) -> Algorithm:
    """``algorithm``, whose last round, ``final``, is sent a mean of the states after all others.

    Round ``t`` of ``T`` weighs about ``(t / T) ** power``: polynomial-decay averaging, Shamir and
    Zhang, arXiv 1212.1824. So it is mostly of the last quarter, however many rounds there are.

    Args:
        algorithm: with a last round, in which its state stays as it is.
        power: 0 is the plain mean of all rounds.
    """
    last = algorithm.final
    assert last is not None

    def init(adapter: Tree) -> State:
        import torch

        state = algorithm.init(adapter)
        late = {n: t.clone() for n, t in state.items()}  # a checkpoint has every tensor once
        return {**state, **named("late", late), **named("late_mean", {"rounds": torch.tensor(0)})}

    def update(state: State, mean: Tree) -> State:
        new, late = algorithm.update(plain(state), mean), part(state, "late")
        rounds = part(state, "late_mean")["rounds"] + 1
        weight = (power + 1) / (int(rounds) + power)
        late = {n: t.lerp(new[n], weight) for n, t in late.items()}
        return {**new, **named("late", late), **named("late_mean", {"rounds": rounds})}

    return replace(
        algorithm,
        init=init,
        download=lambda state, client: algorithm.download(plain(state), client),
        update=update,
        final=replace(
            last,
            init=init,
            download=lambda state, client: last.download(part(state, "late"), client),
        ),
    )

"""A client's round without training, on an adapter that has shapes and no values.

The plan of a run and the form of a message follow from the algorithm alone: its functions run on
tensors of the ``meta`` device. Whole numbers keep their values, because later shapes may depend on
them (a client's rank).
"""

from __future__ import annotations

from typing import NamedTuple

from fedvlm.algorithms.base import Algorithm, Local, Score, Sent, Train, Trained, Visit, step
from fedvlm.errors import FedVLMError
from fedvlm.tree import Tree

PATH = {"A": 1.0, "B": 1.0}


class Rehearsal(NamedTuple):
    """The requests and the result of a client's round.

    Attributes:
        stretches: the requests for training.
        sent: the result of the round; names and shapes are right, values mean nothing.
        scores: whether the program asks for scores on validation rows.
    """

    stretches: tuple[Train, ...]
    sent: Sent
    scores: bool = False


def rehearse(
    algorithm: Algorithm, initial: Tree, visit: Visit, down: Tree, steps: int
) -> Rehearsal:
    """Runs the program of a client without kept state, and answers its requests without training.

    Args:
        algorithm: the algorithm of the run.
        initial: the common initial adapter, or one without values.
        visit: the client and the round.
        down: the client's download, with or without values.
        steps: the usual number of steps of a round.

    Raises:
        FedVLMError: the algorithm reads the value of a tensor.
    """
    try:
        return _rehearse(algorithm, initial, visit, down, steps)
    except (RuntimeError, NotImplementedError) as error:
        if "meta" not in str(error):
            raise
        raise FedVLMError(
            "the algorithm reads the value of a tensor. Its functions also run on tensors without "
            "values, for plans and for the forms of messages: names and shapes may depend on the "
            f"round and on the download only ({str(error).splitlines()[0]:.120})"
        ) from error


def _rehearse(
    algorithm: Algorithm, initial: Tree, visit: Visit, down: Tree, steps: int
) -> Rehearsal:
    begin = algorithm.model(initial, down, {})
    program = algorithm.work(Local(visit, begin, down, {}, steps))
    stretches: list[Train] = []
    scores = False
    ask = step(program)
    while not isinstance(ask, Sent):
        if isinstance(ask, Score):
            scores, ask = True, step(program, ())
        else:
            stretches.append(ask)
            ask = step(program, Trained(ask.begin, PATH))
    return Rehearsal(tuple(stretches), ask, scores)


def bare(tree: Tree) -> Tree:
    """The tensors without values, except for whole numbers."""
    return {n: t.to("meta") if t.is_floating_point() else t for n, t in tree.items()}

"""FedRep on LoRA: a round trains the personal factor A first, then the shared factor B.

Collins et al., arXiv 2102.07078: a client trains its head for some steps with the representation
frozen, then the representation with the head frozen, and sends the representation. Here A is the
head and B the representation, in every adapted layer.
"""

from __future__ import annotations

from pydantic import Field

from fedvlm import Algorithm, AlgorithmConfig, Averaged, Entry, Local, Sent, Train
from fedvlm.tree import factor, split


class FedRepConfig(AlgorithmConfig):
    """Settings: `fedvlm run algorithm.name=fedrep algorithm.head_steps=2`."""

    head_steps: int = Field(2, ge=0, description="steps of a round that train A; B has the rest")


def is_a(name: str) -> bool:
    return factor(name) == "A"


def is_b(name: str) -> bool:
    return factor(name) == "B"


def fedrep(head_steps: int) -> Algorithm:
    """B is shared, A is personal, and a round trains them one after the other."""

    def work(local: Local):
        head = min(head_steps, local.steps)
        now, _ = yield Train(local.begin, is_a, head)
        now, _ = yield Train(now, is_b, local.steps - head)
        shared, personal = split(now, is_b)
        return Sent(shared, personal)

    return Algorithm(
        init=lambda initial: split(initial, is_b)[0],
        send=lambda state, visit: state,
        model=lambda initial, down, mine: {**initial, **down, **mine},
        work=work,
        server=Averaged(lambda state, mean, round: mean),
    )


FEDREP = Entry(
    sends="B",
    keeps="A",
    source="FedRep, arXiv 2102.07078",
    build=lambda settings, lora: fedrep(settings.head_steps),
    settings=FedRepConfig,
    ranks=True,
)

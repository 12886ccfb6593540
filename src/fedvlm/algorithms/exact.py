"""Aggregation of the products B A themselves, of which the means of A and of B are not the factors.

- FedEx-LoRA, Singhal et al., arXiv 2410.09432: clients begin with the means of A and of B, and
  what these lack of the mean product is added to the frozen weights.
- FLoRA, Wang et al., arXiv 2409.05976: the clients' factors are stacked, weighted by examples, so
  that their product is the mean product; clients add it to the frozen weights and begin anew.

Here the frozen weights stay what they are. What is added to them is carried in ``spare`` ranks of
the adapter that no client trains, so that engines, exports and PEFT see an ordinary LoRA. It is
exact while these ranks suffice for the sum of all that was added; beyond that it is the nearest
matrix of that rank (truncated SVD). FLoRA's clients begin each round with the common initial A and
zero B (the paper's code attaches a new LoRA). Its payload down is the spare ranks, not the stack.
"""

from __future__ import annotations

from functools import partial

from fedvlm.algorithms.base import Algorithm, Client, Phase, State
from fedvlm.tree import Tree, cut, factorized, mask, named, pad, part, plain, products

PRODUCT = "product"
BEGIN = "begin"


def exact(ranks: int, spare: int, *, restart: bool = False) -> Algorithm:
    """The mean of the clients' products.

    Args:
        ranks: the adapter's first ranks, which clients train and send.
        spare: the ranks after these, for what is added to the frozen weights.
        restart: FLoRA: everything is added, and clients begin with the initial adapter.
            Otherwise FedEx-LoRA: they go on with the means of A and of B.
    """

    def init(adapter: Tree) -> State:
        return {**adapter, **(named(BEGIN, cut(adapter, 0, ranks)) if restart else {})}

    def lift(upload: Tree, client: Client) -> Tree:
        return {**({} if restart else upload), **named(PRODUCT, products(upload))}

    def update(state: State, mean: Tree) -> State:
        begin = part(state, BEGIN) if restart else plain(mean)
        lacking = products({} if restart else begin)
        carried = cut(plain(state), ranks, ranks + spare)
        total = {
            module: carry + part(mean, PRODUCT)[module] - lacking.get(module, 0.0)
            for module, carry in products(carried).items()
        }
        kept = pad(factorized(total, carried, spare), ranks, 0)
        new = {n: t + kept[n] for n, t in pad(begin, 0, spare).items()}
        return {**new, **(named(BEGIN, begin) if restart else {})}

    def trained(name: str) -> bool:
        return True

    return Algorithm(
        init=init,
        download=lambda state, client: plain(state),
        start=lambda adapter, down, mine: {**adapter, **down},
        phases=(Phase(trained, mask=partial(mask, first=0, last=ranks)),),
        finish=lambda work: (cut(work.end, 0, ranks), {}),
        update=update,
        lift=lift,
    )

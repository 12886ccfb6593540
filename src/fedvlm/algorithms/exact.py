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

from fedvlm.algorithms.base import Algorithm, Averaged, Local, Program, Sent, State, Train, Visit
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

    def init(initial: Tree) -> State:
        return {**initial, **(named(BEGIN, cut(initial, 0, ranks)) if restart else {})}

    def work(local: Local) -> Program:
        end, _ = yield Train(local.begin, mask=partial(mask, first=0, last=ranks))
        return Sent(cut(end, 0, ranks))

    def lift(upload: Tree, visit: Visit) -> tuple[Tree, float]:
        factors = {} if restart else upload
        return {**factors, **named(PRODUCT, products(upload))}, visit.weight

    def update(state: State, mean: Tree, round: int) -> Tree:
        begin = part(state, BEGIN) if restart else plain(mean)
        lacking = products({} if restart else begin)
        carried = cut(plain(state), ranks, ranks + spare)
        total = {
            module: carry + part(mean, PRODUCT)[module] - lacking.get(module, 0.0)
            for module, carry in products(carried).items()
        }
        kept = pad(factorized(total, carried, spare), ranks, 0)
        return {n: t + kept[n] for n, t in pad(begin, 0, spare).items()}

    return Algorithm(
        init=init,
        send=lambda state, visit: plain(state),
        model=lambda initial, down, mine: {**initial, **down},
        work=work,
        server=Averaged(update, lift),
    )

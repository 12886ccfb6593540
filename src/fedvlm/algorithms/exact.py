"""Exact aggregation: the mean of the products B A, not the product of the means of A and of B.

- FedEx-LoRA, Singhal et al., arXiv 2410.09432: clients begin with the means of A and of B. The
  difference between the mean product and the product of the means is added to the frozen weights.
- FLoRA, Wang et al., arXiv 2409.05976: the clients' factors are stacked, weighted by examples, so
  that the product of the stack is the mean product. Clients add this product to the frozen weights
  and begin with a new LoRA.

In this implementation the frozen weights do not change. The ``spare`` ranks of the adapter, which
no client trains, hold the sum of all additions to the frozen weights. So engines, exports and PEFT
see an ordinary LoRA. The result is exact while the spare ranks suffice for this sum. Beyond that,
it is the nearest matrix of that rank (truncated SVD). In FLoRA, clients begin each round with the
common initial A and zero B (the paper's code attaches a new LoRA), and download the spare ranks
instead of the stack.
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
        ranks: number of the adapter's first ranks, which clients train and send.
        spare: number of the ranks after these, for the additions to the frozen weights.
        restart: True: FLoRA, which adds the whole mean product, and whose clients begin with the
            initial adapter. False: FedEx-LoRA, whose clients begin with the means of A and of B.
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

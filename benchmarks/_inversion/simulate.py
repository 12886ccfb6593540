"""The server's simulation of a site: the gradient that given rows would cause.

The server has the base model, the download and the settings. So it can compute the gradient of any
row that it can think of, and compare this gradient with a site's change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedvlm.batches.objectives import adapter_off, answer_nll
from fedvlm.engines.cohort import CohortEngine
from fedvlm.models.norms import lengthen
from fedvlm.tree import Tree

AT_ONCE = 50  # rows in a pass
Batch = dict[str, Tensor]
Gradients = dict[str, Tensor]
"""Name of a factor -> gradients ``[places, ...]``."""


class Simulator:
    """Computes gradients of many imagined sites in one pass.

    Args:
        engine: an engine whose model and rows the simulator uses. Its run is over.
    """

    def __init__(self, engine: CohortEngine):
        self.model, self.stack, self.collator = engine.model, engine.stack, engine.collator
        lengthen(self.model)

    def batch(self, rows: Sequence[int], pictures: Tensor | None = None) -> Batch:
        """The batch of some rows, with other pictures where given ``[rows, 3, side, side]``."""
        batch = self.collator.training(rows)
        return batch if pictures is None else {**batch, "pixel_values": pictures[:, None]}

    def pictures(self, rows: Sequence[int]) -> Tensor:
        """The pictures of some rows as the model reads them ``[rows, 3, side, side]``."""
        found = [self.collator.picture(int(row))["pixel_values"][:, 0] for row in rows]
        return torch.cat(found)

    def features(self, pictures: Tensor) -> Tensor:
        """What the untuned vision side makes of pictures ``[pictures, image tokens, width]``."""
        base = self.model.get_base_model()
        with torch.no_grad(), adapter_off(self.model):
            found = base.get_image_features(pictures[:, None], None, return_dict=True).pooler_output
        return torch.stack(list(found))

    def gradients(
        self, begin: Tree, batch: Batch, places: int, names: Sequence[str], graph: bool = False
    ) -> Gradients:
        """The gradient of each place's mean loss; the batch's rows are split evenly over places.

        Args:
            begin: the adapter.
            batch: inputs and labels ``[places * rows, ...]``.
            places: the number of imagined sites.
            names: the factors whose gradients are asked for.
            graph: whether the gradients can be differentiated with respect to the batch.
        """
        wanted = set(names)
        self.stack.spread(begin, places, wanted.__contains__)
        self.stack.activate(range(places))
        self.stack.batch(len(batch["labels"]), 1, lambda: True)
        self.model.train()
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
            nll, tokens, _ = answer_nll(self.model, batch)
            loss = (nll.view(places, -1).sum(1) / tokens.view(places, -1).sum(1)).sum()
            params = [self.stack.shared[n] for n in names]
            found = torch.autograd.grad(loss, params, create_graph=graph)
        return dict(zip(names, found, strict=True))

    def of_rows(
        self, begin: Tree, rows: Sequence[int], names: Sequence[str], pictures: Tensor | None = None
    ) -> Gradients:
        """The gradient of each row alone ``[rows, ...]``, with other pictures where given."""
        parts = []
        for first in range(0, len(rows), AT_ONCE):
            own = slice(first, first + AT_ONCE)
            shown = None if pictures is None else pictures[own]
            batch = self.batch(rows[own], shown)
            parts.append(self.gradients(begin, batch, len(rows[own]), names))
        return {n: torch.cat([part[n] for part in parts]) for n in names}


def likeness(found: Mapping[str, Tensor], goal: Mapping[str, Tensor], noisy: bool) -> Tensor:
    """The cosine of imagined gradients and the observed change ``[places]``.

    Args:
        found: imagined gradients ``[places, ...]``.
        goal: the change downhill, of one site ``[...]`` or of as many sites as places.
        noisy: the cosine of all factors together, the best under equal noise on every number.
            Otherwise the mean of the factors' cosines, which gives small factors a voice.
    """
    names = [n for n in goal if n in found]
    ours = [found[n].flatten(1) for n in names]
    theirs = [goal[n].reshape(-1, f.shape[1]) for n, f in zip(names, ours, strict=True)]
    if noisy:
        return torch.cosine_similarity(torch.cat(ours, 1), torch.cat(theirs, 1), dim=1)
    each = [torch.cosine_similarity(f, t, dim=1) for f, t in zip(ours, theirs, strict=True)]
    return torch.stack(each).mean(0)


def downhill(moved: Mapping[str, Tensor]) -> Tree:
    """The sum of the gradients that a change shows: minus the change, of the factors that moved."""
    return {n: -t for n, t in moved.items() if t.any()}

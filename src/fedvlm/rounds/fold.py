"""Checks the uploads of a round at the server, and folds them into the mean one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedvlm.algorithms.base import Averaged, Gathered, State, Upload, Visit
from fedvlm.engines.summand import Summed
from fedvlm.engines.wire import Forms, Reply
from fedvlm.errors import FedVLMError
from fedvlm.rounds.noisymean import NoisyMean
from fedvlm.rounds.robust import NormBound, Trimmed
from fedvlm.settings.aggregate import AggregateConfig
from fedvlm.tree import Mean, Tree, saved_bytes


class Fold:
    """Checks the uploads of a round and folds them one by one; rejects bad uploads by name.

    Args:
        known: client -> its visit, as registered.
        downs: client -> its download.
        forms: checks the messages.
        settings: how uploads become one result; None: the defaults.
        noisy: the mean of ``privacy.unit=client``, which replaces that of ``settings``; or None.

    Attributes:
        losses: client -> its training loss, or None where it is not told, for accepted uploads.
        rejected: client -> the reason for the rejection of its upload.
        bytes_up: client -> bytes of its message.
        steps: client -> optimizer steps, of the clients whose engine counts them.
        passes: client -> forward passes in rows, of the same clients.
        bounded: client -> the norm of its change and the bound to which the change was shrunk, for
            uploads that were shrunk.
    """

    def __init__(
        self,
        known: Mapping[str, Visit],
        downs: Mapping[str, Tree],
        forms: Forms,
        settings: AggregateConfig | None = None,
        noisy: NoisyMean | None = None,
    ):
        self.known, self.downs, self.forms = known, downs, forms
        self.server = forms.algorithm.server
        self.losses: dict[str, float | None] = {}
        self.rejected: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self.steps: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        settings = settings or AggregateConfig()
        bound = settings.kind == "norm" and noisy is None
        self._bound = NormBound(settings.bound, downs) if bound else None
        self.bounded = self._bound.bounded if self._bound else {}
        self._mean = Trimmed(settings.trim) if settings.kind == "trimmed" else noisy or Mean()
        self._uploads: list[Upload] = []

    def add(self, reply: Reply | Summed) -> bool:
        """Adds the reply of a client; returns whether the upload is accepted."""
        assert isinstance(reply, Reply), "a sum needs a SumFold"
        client, visit = reply.client, self.known[reply.client]
        self.bytes_up[client] = saved_bytes(reply.upload)
        try:
            upload, moved = self.forms.measured(
                visit, self.downs[client], reply.upload, reply.weight
            )
        except FedVLMError as error:
            self.rejected[client] = str(error)
            return False
        if reply.loss is not None and not math.isfinite(reply.loss):
            self.rejected[client] = f"the loss of client '{client}' is {reply.loss}"
            return False
        if upload:
            one = Upload(replace(visit, weight=reply.weight), upload)
            for ready in self._bound.add(one, moved) if self._bound else [one]:
                self._take(ready)
        self.losses[client] = reply.loss
        if reply.passes or reply.steps:
            self.steps[client], self.passes[client] = reply.steps, reply.passes
        return True

    @property
    def answered(self) -> set[str]:
        """The clients that have sent a reply, accepted or not."""
        return self.losses.keys() | self.rejected.keys()

    @property
    def told(self) -> dict[str, object]:
        """The part of the round's line of metrics about rejected and shrunk uploads."""
        found: dict[str, object] = {"rejected": self.rejected} if self.rejected else {}
        return found | ({"bounded": self.bounded} if self.bounded else {})

    def _take(self, upload: Upload) -> None:
        if isinstance(self.server, Averaged):
            self._mean.add(*self.server.lift(upload.tree, upload.visit))
        else:
            self._uploads.append(upload)

    def update(self, state: State, round_: int) -> State:
        """The state after the round.

        Raises:
            FedVLMError: every upload was rejected.
        """
        if self.rejected and not self.losses:
            told = "\n".join(f"  - {why}" for why in self.rejected.values())
            raise FedVLMError(
                f"all {len(self.rejected)} uploads of this round were rejected:\n{told}"
            )
        for upload in self._bound.rest() if self._bound else ():
            self._take(upload)
        if isinstance(self.server, Gathered):
            changes = self.server.update(state, self._uploads, round_) if self._uploads else {}
        else:
            mean = self._mean
            changes = self.server.update(state, mean.tree(), round_) if mean.total else {}
        check_changes(changes, state)
        return {**state, **changes}


def check_changes(changes: Any, state: State) -> None:
    """Refuses what an algorithm's server returns, before it is the next state.

    Raises:
        FedVLMError: it is no tree, or a tensor of the state has another shape or type in it.
    """
    if not isinstance(changes, dict):
        raise FedVLMError(
            "the update of the algorithm's server returns a dict of the tensors that change, got "
            f"{type(changes).__name__}"
        )
    for name, tensor in changes.items():
        old = state.get(name)
        if old is not None and (old.shape != tensor.shape or old.dtype != tensor.dtype):
            raise FedVLMError(
                f"the update of the algorithm's server returns '{name}' as {tensor.dtype} "
                f"{list(tensor.shape)}, and the state has {old.dtype} {list(old.shape)}"
            )

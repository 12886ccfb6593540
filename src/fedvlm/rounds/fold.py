"""A round's uploads at the server: checked, then folded into the mean one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from fedvlm.algorithms.base import Averaged, Gathered, State, Upload, Visit
from fedvlm.engines.wire import Forms, Reply
from fedvlm.errors import FedVLMError
from fedvlm.tree import Mean, Tree, saved_bytes


class Fold:
    """A round's uploads at the server: checked and folded one by one, a bad one left out by name.

    Args:
        known: the cohort, as registered.
        downs: what each client was sent.
        forms: the checks.

    Attributes:
        losses: client -> its training loss, of those whose upload counts.
        rejected: client -> why its upload does not count.
        bytes_up: client -> bytes of its message.
    """

    def __init__(self, known: Mapping[str, Visit], downs: Mapping[str, Tree], forms: Forms):
        self.known, self.downs, self.forms = known, downs, forms
        self.server = forms.algorithm.server
        self.losses: dict[str, float] = {}
        self.rejected: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self._mean, self._uploads = Mean(), list[Upload]()

    def add(self, reply: Reply) -> bool:
        """Takes a client's reply; whether its upload counts."""
        client, visit = reply.client, self.known[reply.client]
        self.bytes_up[client] = saved_bytes(reply.upload)
        try:
            upload = self.forms.received(visit, self.downs[client], reply.upload, reply.weight)
        except FedVLMError as error:
            self.rejected[client] = str(error)
            return False
        if not math.isfinite(reply.loss):
            self.rejected[client] = f"the loss of client '{client}' is {reply.loss}"
            return False
        if upload:
            self._take(upload, replace(visit, weight=reply.weight))
        self.losses[client] = reply.loss
        return True

    def _take(self, upload: Tree, visit: Visit) -> None:
        if isinstance(self.server, Averaged):
            self._mean.add(*self.server.lift(upload, visit))
        else:
            self._uploads.append(Upload(visit, upload))

    def update(self, state: State, round_: int) -> State:
        """The state after the round.

        Raises:
            FedVLMError: every upload was rejected.
        """
        if self.rejected and not self.losses:
            told = "\n".join(f"  - {why}" for why in self.rejected.values())
            raise FedVLMError(
                f"none of the {len(self.rejected)} uploads of this round can be used:\n{told}"
            )
        if isinstance(self.server, Gathered):
            changes = self.server.update(state, self._uploads, round_) if self._uploads else {}
        else:
            mean = self._mean
            changes = self.server.update(state, mean.tree(), round_) if mean.total else {}
        return {**state, **changes}

"""A round's uploads at the server: checked, then folded into the mean one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedvlm.algorithms.base import Algorithm, Client, State, Upload
from fedvlm.engines.wire import Forms, Reply
from fedvlm.errors import FedVLMError
from fedvlm.tree import Mean, Tree, saved_bytes


class Fold:
    """A round's uploads at the server: checked and folded one by one, a bad one left out by name.

    Args:
        algorithm: of the round.
        known: the cohort, as registered.
        downs: what each was sent.
        forms: the checks.

    Attributes:
        losses: client -> its training loss, of those whose upload counts.
        rejected: client -> why its upload does not.
        bytes_up: client -> bytes of its message.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        known: Mapping[str, Client],
        downs: Mapping[str, Tree],
        forms: Forms,
    ):
        self.algorithm, self.known, self.downs, self.forms = algorithm, known, downs, forms
        self.losses: dict[str, float] = {}
        self.rejected: dict[str, str] = {}
        self.bytes_up: dict[str, int] = {}
        self._mean, self._uploads = Mean(), list[Upload]()

    def add(self, reply: Reply) -> bool:
        """Takes a client's reply; whether its upload counts."""
        client, one = self.known[reply.client], self.algorithm
        down, message = self.downs[client.name], reply.upload
        self.bytes_up[client.name] = saved_bytes(message)
        try:
            upload = self.forms.received(one, client, down, message, reply.weight)
        except FedVLMError as error:
            self.rejected[client.name] = str(error)
            return False
        if not math.isfinite(reply.loss):
            self.rejected[client.name] = f"the loss of client '{client.name}' is {reply.loss}"
            return False
        if upload and one.gather:
            self._uploads.append(Upload(client, upload))
        elif upload:
            self._mean.add(one.lift(upload, client), reply.weight)
        self.losses[client.name] = reply.loss
        return True

    def update(self, state: State) -> State:
        """The state after the round.

        Raises:
            FedVLMError: every upload was rejected.
        """
        if self.rejected and not self.losses:
            told = "\n".join(f"  - {why}" for why in self.rejected.values())
            raise FedVLMError(
                f"none of the {len(self.rejected)} uploads of this round can be used:\n{told}"
            )
        if self.algorithm.gather and self._uploads:
            return self.algorithm.gather(state, self._uploads)
        if self._mean.total:
            return self.algorithm.update(state, self._mean.tree())
        return state

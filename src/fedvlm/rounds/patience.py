"""Early stopping (``train.patience``): the rounds end where the validation loss no longer falls.

After each evaluation (``eval.every``), the personal models of the scored clients get their loss on
the clients' validation rows, and the mean over the clients is compared with the lowest mean so far.
After ``train.patience`` evaluations in a row without a lower one, no further round is trained, and
the ending follows. The run is then one of that many rounds: ``train.rounds`` in its folder is their
number, and ``planned`` in ``table.json`` has the number before. So its models are the last ones,
not the best ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fedvlm.algorithms.base import State
from fedvlm.engines.base import Engine
from fedvlm.errors import DataError
from fedvlm.metrics import mean
from fedvlm.rounds import more
from fedvlm.rounds.results import personal_models
from fedvlm.rounds.schedule import Round, plan
from fedvlm.settings.sections import Config
from fedvlm.store import replanned
from fedvlm.store.run import Store

LOSSES = "validation"
"""Key of the clients' validation losses in a line of metrics."""
STOPPED = replanned.STOPPED
"""Key of the last round before the ending, in the line of metrics of an ending that came early."""


class Patience:
    """The rounds of a run, which may end early.

    Args:
        config: the settings of the run.
        engine: scores the clients' models.
        store: the folder of the run, locked.
        names: the names of all clients.
        clients: the names of the scored clients.

    Attributes:
        config: the settings; their number of rounds falls when the rounds end early.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        store: Store,
        names: Sequence[str],
        clients: Sequence[str],
    ):
        self.config, self.engine, self.store = config, engine, store
        self.names, self.clients = names, clients
        changes = replanned.planned(store.folder) if config.train.patience else []
        self._since = changes[-1]["done"] if changes else 0

    def rounds(self, last: int | None) -> Iterator[Round]:
        """The rounds of the run. Each is committed before the next is asked for.

        Args:
            last: the last round that a privacy budget allows; None: ``train.rounds``.
        """
        for round_ in plan(self.config, self.engine.algorithm, self.names, last):
            yield round_
            if self._over(round_):
                self._stop(round_.number)
                break
        else:
            return
        yield from (r for r in plan(self.config, self.engine.algorithm, self.names) if r.final)

    def told(self, round_: Round, state: State) -> dict[str, Any]:
        """What the line of metrics of a trained round has besides; empty without patience.

        Raises:
            DataError: no scored client has validation rows.
        """
        if self.config.train.patience is None or not round_.evaluate:
            return {}
        if round_.final:
            early = replanned.stopped(self.store.folder) is not None
            return {STOPPED: round_.number - 1} if early else {}
        models = personal_models(self.engine, round_, state, self.clients)
        if not (losses := self.engine.validate(models)):
            raise DataError(
                f"train.patience={self.config.train.patience} needs validation rows, and no scored "
                "client has any: raise data.val_fraction, or leave train.patience out"
            )
        return {LOSSES: losses}

    def _over(self, round_: Round) -> bool:
        """Whether the rounds end after this one, from the lines of metrics alone."""
        patience = self.config.train.patience
        if patience is None or round_.final or round_.number >= self.config.train.rounds:
            return False
        if round_.number <= self._since or not round_.evaluate:
            return False
        lines = [line for line in self.store.lines() if line["round"] <= round_.number]
        return exhausted(lines, patience, self._since)

    def _stop(self, number: int) -> None:
        more.change(self.store, number, stopped=True)
        train = self.config.train.model_copy(update={"rounds": number})
        self.config = self.config.model_copy(update={"train": train})


def exhausted(lines: Sequence[dict[str, Any]], patience: int, since: int = 0) -> bool:
    """Whether the last ``patience`` evaluations brought no lower mean of the validation losses.

    Args:
        lines: the lines of metrics, in order.
        patience: ``train.patience``.
        since: the round after which evaluations count; all of them are compared with.
    """
    lowest, idle = float("inf"), 0
    for line in lines:
        if losses := line.get(LOSSES):
            loss = mean(losses.values())
            idle = 0 if loss < lowest else idle + (line["round"] > since)
            lowest = min(lowest, loss)
    return idle >= patience

"""The privacy budget of a run: the plan of every client, and the rounds that it allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedvlm.algorithms.base import NOBODY, Algorithm, State
from fedvlm.algorithms.checks import BY_VALIDATION
from fedvlm.algorithms.dry import bare, rehearse
from fedvlm.algorithms.table import find
from fedvlm.errors import ConfigError
from fedvlm.privacy import accountant
from fedvlm.privacy.chance import System
from fedvlm.privacy.plan import Plan, planned
from fedvlm.rounds.noisymean import NoisyMean
from fedvlm.rounds.schedule import Round, plan
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.engines.shell import Shell

EVERYBODY = ""
"""The name under which all clients are counted together."""


@dataclass(frozen=True)
class Budget:
    """The privacy budget of a run.

    Attributes:
        unit: the protected unit.
        plans: client -> its plan. Clients with one set of rows, and ``unit=client``, have one plan.
        steps: client -> its noisy steps in the whole run.
        floats: the largest number of trained floats in a round.
        rounds: the last round that keeps the budget; the ending of the run follows it.
        together: whether all steps count against one plan.
    """

    unit: str
    plans: Mapping[str, Plan]
    steps: Mapping[str, int]
    floats: int
    rounds: int
    together: bool = False

    def epsilon(self, lines: Sequence[Mapping[str, Any]]) -> float:
        """The largest epsilon of a client after some rounds.

        Args:
            lines: the lines of metrics of these rounds.
        """
        spent: Counter[str] = Counter()
        for line in lines:
            if self.unit == "client":
                spent[EVERYBODY] += 0 < line["round"] <= self.rounds
            else:
                for client, steps in line.get("steps", {}).items():
                    spent[EVERYBODY if self.together else client] += steps
        kinds = {(p.units, p.noise, spent[self._key(c)]): p for c, p in self.plans.items()}
        return max(p.epsilon(steps) for (*_, steps), p in kinds.items())

    def mean(self, algorithm: Algorithm, state: State, round_: Round) -> NoisyMean | None:
        """The noisy mean of a round, with ``unit=client``; else None."""
        if self.unit != "client" or round_.final:
            return None
        down = algorithm.send(state, round_.visit(EVERYBODY))
        return NoisyMean(down, self.plans[EVERYBODY], System())

    @property
    def loudness(self) -> float:
        """The largest ratio of the norm of a step's noise to the largest norm of its signal."""
        return max(p.loudness(self.floats) for p in self.plans.values())

    def _key(self, client: str) -> str:
        return EVERYBODY if self.together else client

    def described(self) -> dict[str, Any]:
        """The content of ``privacy.json``: everything that the guarantee depends on."""
        one = next(iter(self.plans.values()))
        return {
            "noise_to_signal": round(self.loudness, 4),
            "unit": self.unit,
            "adjacency": "one unit is added or removed",
            "sampling": "Poisson",
            "accountant": accountant.ACCOUNTANT,
            "simulated": True,
            "epsilon": one.budget,
            "delta": one.delta,
            "clip": one.clip,
            "rounds": self.rounds,
            "clients": {
                client: {
                    "units": p.units,
                    "expected_batch": p.batch,
                    "noise": p.noise,
                    "steps": self.steps[self._key(client)],
                }
                for client, p in self.plans.items()
            },
        }


def budget_of(engine: Shell) -> Budget | None:
    """The budget of a run in this process; None without differential privacy.

    Args:
        engine: knows the clients' rows.

    Raises:
        ConfigError: the budget does not allow a single round.
    """
    config, names = engine.config, engine.partition.clients
    units: dict[str, int] = {}
    if config.privacy.local:
        units = {client: len(engine.units(client)) for client in names}
    return budget(config, engine.algorithm, engine.adapter, names, units)


def budget(
    config: Config,
    algorithm: Algorithm,
    adapter: Tree,
    names: Sequence[str],
    units: Mapping[str, int],
) -> Budget | None:
    """The budget of a run; None without differential privacy.

    Args:
        config: the settings of the run.
        algorithm: its algorithm.
        adapter: the common initial adapter, or one without values.
        names: the clients.
        units: client -> the number of its units; not used with ``privacy.unit=client``.

    Raises:
        ConfigError: the budget does not allow a single round.
    """
    settings = config.privacy
    if settings.unit is None:
        return None
    accountant.check_installed()
    if settings.unit == "client":
        return _of_clients(config, algorithm, adapter, names)
    pools = find(config.algorithm.name).pools
    rounds = list(plan(config, algorithm, names))
    done, floats = work(config, algorithm, adapter, rounds)
    spent: Counter[str] = Counter()
    for round_, steps in zip(rounds, done, strict=True):
        for client in round_.cohort:
            spent[EVERYBODY if pools else client] += steps
    plans = {
        client: planned(
            settings,
            count,
            config.train.batch_size,
            spent[EVERYBODY if pools else client],
            EVERYBODY if pools else client,
        )
        for client, count in units.items()
    }
    last = _last(rounds, done, plans, pools)
    return Budget(settings.unit, plans, spent, floats, last, together=pools)


def _of_clients(
    config: Config, algorithm: Algorithm, adapter: Tree, names: Sequence[str]
) -> Budget:
    down = algorithm.send(algorithm.init(bare(adapter)), NOBODY)
    floats = sum(t.numel() for t in down.values() if t.is_floating_point())
    cohort, rounds = config.train.clients_per_round or len(names), config.train.rounds
    one = planned(config.privacy, len(names), cohort, rounds)
    last = next((n for n in range(rounds, 0, -1) if one.fits(n)), 0)
    _check_any(last, config.privacy.epsilon)
    return Budget("client", {EVERYBODY: one}, {EVERYBODY: rounds}, floats, last, together=True)


def work(
    config: Config, algorithm: Algorithm, adapter: Tree, rounds: Sequence[Round]
) -> tuple[list[int], int]:
    """The optimizer steps of a client in each round, and the most floats that a step trains."""
    empty = bare(adapter)
    state, found, floats = algorithm.init(empty), [], 0
    for round_ in rounds:
        visit = round_.visit(next(iter(round_.cohort), EVERYBODY))
        usual = config.train.steps(0, round_.final)
        asked, _, scores = rehearse(algorithm, empty, visit, algorithm.send(state, visit), usual)
        if scores:
            raise ConfigError(
                [
                    f"algorithm.name={config.algorithm.name} cannot run with "
                    f"privacy.unit={config.privacy.unit}: {BY_VALIDATION}"
                ]
            )
        found.append(sum(usual if ask.steps is None else ask.steps for ask in asked))
        for ask in asked:
            floats = max(floats, sum(t.numel() for n, t in ask.begin.items() if ask.trains(n)))
    return found, floats


def _last(
    rounds: Sequence[Round], steps: Sequence[int], plans: Mapping[str, Plan], pools: bool
) -> int:
    """The last round with which every client keeps its budget; the ending is set aside first."""
    spent: Counter[str] = Counter()
    for round_, count in zip(rounds, steps, strict=True):
        if round_.final:
            spent.update(dict.fromkeys([EVERYBODY] if pools else round_.cohort, count))
    last = 0
    for round_, count in zip(rounds, steps, strict=True):
        if round_.final:
            break
        for client in round_.cohort:
            spent[EVERYBODY if pools else client] += count
        kinds = {(p.units, p.noise, spent[EVERYBODY if pools else c]): p for c, p in plans.items()}
        if not all(p.fits(number) for (*_, number), p in kinds.items()):
            break
        last = round_.number
    _check_any(last, next(iter(plans.values())).budget)
    return last


def _check_any(last: int, epsilon: float | None) -> None:
    if not last:
        raise ConfigError(
            [
                f"privacy.epsilon={epsilon:g} does not allow a single round with this noise: raise "
                "privacy.noise or privacy.epsilon, or leave privacy.noise out"
            ]
        )

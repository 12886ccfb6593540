"""audit(): how much a run's models reveal of its canaries, to an attacker with one of three views.

- ``upload``: the last upload of each client, as an honest but curious server sees it.
- ``global``: the shared model.
- ``personal``: the model that each client has.

:mod:`fedvlm.after.attacks` scores the canaries, :mod:`fedvlm.privacy.audit` judges the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.after.opened import open_run
from fedvlm.algorithms.base import NOBODY, Algorithm
from fedvlm.errors import FedVLMError
from fedvlm.privacy import audit as statistics
from fedvlm.privacy import canaries
from fedvlm.privacy.audit import Finding
from fedvlm.privacy.canaries import Canary
from fedvlm.rounds import seen
from fedvlm.rounds.beginning import check_same, described
from fedvlm.rounds.objects import Objects
from fedvlm.rounds.prepare import prepare
from fedvlm.rounds.results import global_models, personal_models
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files, sealed
from fedvlm.store.run import CONFIG, Store
from fedvlm.tree import Tree
from fedvlm.version import __version__

if TYPE_CHECKING:
    from fedvlm.engines.shell import Shell

FILE = "audit.json"
VIEWS = ("upload", "global", "personal")
READING = (
    "upload: what a curious server sees of a client; global: the shared model; personal: what a "
    "client has. The bound of a view is the larger one of its two",
    "a low bound is no proof: a better attack may find more",
)


@dataclass(frozen=True)
class Claim:
    """The guarantee of a run for one canary in one view."""

    epsilon: float
    delta: float


@dataclass(frozen=True)
class Audit:
    """The audit of a run.

    Attributes:
        folder: the run's folder.
        unit: ``privacy.unit`` of the run; None without differential privacy.
        claims: view -> the guarantee of the run; views without a guarantee are missing.
        views: view -> attack -> the finding. A view is missing where the run has no such models.
    """

    folder: Path
    unit: str | None
    claims: dict[str, Claim]
    views: dict[str, dict[str, Finding]]

    @property
    def bounds(self) -> dict[str, float]:
        """View -> the lower bound of epsilon at 95 %, the larger one of the two attacks."""
        return {
            view: max(found.best.epsilon for found in attacks.values())
            for view, attacks in self.views.items()
        }

    @property
    def broken(self) -> tuple[str, ...]:
        """The views whose bound is above the guarantee."""
        known = self.claims
        return tuple(v for v, low in self.bounds.items() if v in known and low > known[v].epsilon)

    @classmethod
    def read(cls, folder: str | Path) -> Audit:
        """Reads the audit of a run from its ``audit.json``.

        Raises:
            FedVLMError: the file is missing or damaged.
        """
        found = sealed.read(Path(folder) / FILE)
        claims = {view: Claim(**claim) for view, claim in found["claims"].items()}
        views = {
            view: {attack: statistics.read(one) for attack, one in attacks.items()}
            for view, attacks in found["views"].items()
        }
        return cls(Path(folder), found["unit"], claims, views)


def verdict(found: Audit) -> list[str]:
    """The sentences that compare the bounds with the guarantee of the run."""
    if not found.claims:
        return ["the run claims no differential privacy (privacy.unit is empty)"]
    lines = []
    for view, bound in found.bounds.items():
        if view not in found.claims:
            lines.append(f"{view}: no guarantee, with privacy.unit={found.unit}")
            continue
        claim = f"the guarantee, epsilon {found.claims[view].epsilon:.4g}"
        if view in found.broken:
            lines.append(f"{view}: BROKEN: the bound {bound:.2f} is above {claim}")
        else:
            lines.append(f"{view}: the bound {bound:.2f} does not contradict {claim}")
    return lines


def audit(folder: str | Path, *overrides: str, algorithm: Algorithm | None = None) -> Audit:
    """Audits a finished run with canaries, and writes ``audit.json`` to its folder.

    Args:
        folder: the run's folder.
        *overrides: settings that differ from the run's, such as ``"model.device=cpu"``.
        algorithm: the object that the run was made with, if it was one.

    Raises:
        FedVLMError: the folder holds no finished run, the run has no canaries, or its data or its
            model have changed.
    """
    from fedvlm.after.attacks import Attackers

    run = open_run(folder, *overrides, algorithm=algorithm)
    if not (run.folder / canaries.FILE).exists():
        raise FedVLMError(
            f"the run in '{folder}' has no canaries to audit. Train once more with them: fedvlm "
            f"run {run.folder / CONFIG} privacy.canaries=500 output=DIR; then: fedvlm audit DIR"
        )
    sent = {n: d for n, d in run.results.files.items() if n.startswith(f"{seen.FOLDER}/")}
    sealed.check(run.folder, sent)
    engine, found = _prepared(run.config, run.folder, algorithm)
    attackers, trained = Attackers(engine, found), [one.trained for one in found]
    claims, views = claims_of(run.results.table), {}
    scores = {view: attackers.scores(_models(view, engine, found)) for view in VIEWS}
    for view, attacks in scores.items():
        if attacks:
            delta = claims[view].delta if view in claims else 0.0
            level = 1 - (1 - statistics.CONFIDENCE) / len(attacks)  # so the larger bound holds
            views[view] = {
                attack: statistics.find(list(own.values()), [trained[k] for k in own], delta, level)
                for attack, own in attacks.items()
            }
    result = Audit(run.folder, run.config.privacy.unit, claims, views)
    sealed.write(run.folder / FILE, _record(result, found, scores))
    return result


def claims_of(table: Mapping[str, Any]) -> dict[str, Claim]:
    """View -> the guarantee of a run for one canary, which is in or out of training.

    It is the epsilon that the run has spent. With ``unit=client``, a canary is one row of a client.
    In or out, its client's change is another one: one client is removed, another one is added. Only
    what the server sends has noise then.

    Args:
        table: the content of ``table.json``.
    """
    about = table.get("privacy")
    if about is None:
        return {}
    epsilon, delta = about["spent"], about["delta"]
    if about["unit"] == "client":
        return {"global": Claim(2 * epsilon, min(1.0, delta * (1 + math.exp(epsilon))))}
    return dict.fromkeys(VIEWS, Claim(epsilon, delta))


def _prepared(
    config: Config, folder: Path, algorithm: Algorithm | None
) -> tuple[Shell, tuple[Canary, ...]]:
    """The reference engine with the run's rows and states, and the canaries.

    Raises:
        FedVLMError: data or model differ from those of the run.
    """
    plain = config.engine.model_copy(update={"name": "reference"})
    scored = config.eval.model_copy(update={"own": ()})  # an audit needs losses alone
    config = config.model_copy(update={"engine": plain, "eval": scored, "output": str(folder)})
    engine, partition, _ = prepare(config, store=Store(folder), objects=Objects(algorithm))
    check_same(folder, described(config, engine.collator.rows, partition))
    return engine, canaries.of(partition)


def _models(
    view: str, engine: Shell, found: Sequence[Canary]
) -> Iterator[tuple[Sequence[int], Tree]]:
    """The models of a view, each with the positions of the canaries that it may reveal."""
    algorithm, clients = engine.algorithm, engine.partition.clients
    last, state = standing(engine.config, algorithm), engine.store.server()
    of: dict[str, list[int]] = {}
    for at, one in enumerate(found):
        of.setdefault(one.client, []).append(at)
    if view == "upload":
        for client, path in seen.paths(engine.store.folder, clients).items():
            if client in of and path.exists():
                yield of[client], algorithm.model(engine.adapter, files.load_tree(path), {})
    elif view == "personal":
        for client, tree in engine.made(personal_models(engine, last, state, of)):
            yield of[client], tree
    elif algorithm.send(state, NOBODY):  # something is shared
        ((_, tree),) = engine.made(global_models(engine, last, state, [""]))
        yield range(len(found)), tree


def _record(
    result: Audit, found: Sequence[Canary], scores: Mapping[str, Mapping[str, Mapping[int, float]]]
) -> dict[str, Any]:
    """The content of ``audit.json``: the findings, and the coins and scores behind them."""
    return {
        "version": __version__,
        "level": statistics.CONFIDENCE,
        "shares": statistics.SHARES,
        "unit": result.unit,
        "claims": {view: asdict(claim) for view, claim in result.claims.items()},
        "bounds": result.bounds,
        "views": {v: {a: asdict(f) for a, f in own.items()} for v, own in result.views.items()},
        "canaries": [
            {
                "client": one.client,
                "numbers": one.numbers,
                "trained": one.trained,
                "scores": {
                    view: {attack: own[at] for attack, own in attacks.items() if at in own}
                    for view, attacks in scores.items()
                },
            }
            for at, one in enumerate(found)
        ],
    }

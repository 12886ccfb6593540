"""audit(): how much a run's models reveal of its canaries.

The attacker of :mod:`fedvlm.privacy.audit` knows all canaries, the base model, and one of three
views: the last upload of each client, the global model, or the personal models. It scores a canary
by its losses on the base model and on the model of the view. A loss is the negative log-likelihood
of the wrong answer in nats (SFT), or the loss of the swapped pair (DPO).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.after.opened import open_run
from fedvlm.algorithms.base import NOBODY, Algorithm
from fedvlm.errors import FedVLMError
from fedvlm.models import lora
from fedvlm.privacy import audit as statistics
from fedvlm.privacy import canaries
from fedvlm.privacy.audit import Finding
from fedvlm.privacy.canaries import Canary
from fedvlm.rounds import seen
from fedvlm.rounds.beginning import check_same, described
from fedvlm.rounds.prepare import prepare
from fedvlm.rounds.results import global_models, personal_models
from fedvlm.rounds.schedule import standing
from fedvlm.settings.sections import Config
from fedvlm.store import files, sealed
from fedvlm.store.run import Store
from fedvlm.tree import Tree
from fedvlm.version import __version__

if TYPE_CHECKING:
    from fedvlm.engines.shell import Shell

FILE = "audit.json"
VIEWS = ("upload", "global", "personal")


@dataclass(frozen=True)
class Audit:
    """The audit of a run.

    Attributes:
        folder: the run's folder.
        unit: ``privacy.unit`` of the run; None without differential privacy.
        epsilon: ``privacy.epsilon`` of the run.
        delta: ``privacy.delta``; 0 without differential privacy.
        views: view -> the finding. A view is missing where the run has no such models.
    """

    folder: Path
    unit: str | None
    epsilon: float | None
    delta: float
    views: dict[str, Finding]

    @property
    def broken(self) -> tuple[str, ...]:
        """The views whose lower bound is above the run's epsilon."""
        return tuple(
            view
            for view, found in self.views.items()
            if self.epsilon is not None and found.best.epsilon > self.epsilon
        )


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
    run = open_run(folder, *overrides, algorithm=algorithm)
    if not (run.folder / canaries.FILE).exists():
        raise FedVLMError(
            f"the run in '{folder}' has no canaries. Train once more with them, in another folder: "
            f"fedvlm run {run.folder / 'config.yaml'} privacy.canaries=500 output=DIR; then "
            "fedvlm audit DIR"
        )
    sent = {n: d for n, d in run.results.files.items() if n.startswith(f"{seen.FOLDER}/")}
    sealed.check(run.folder, sent)
    engine, found = _prepared(run.config, run.folder, algorithm)
    everyone = range(len(found))
    base = _losses(engine, found, [(everyone, engine.adapter)])
    losses = {view: _losses(engine, found, _models(view, engine, found)) for view in VIEWS}
    settings, delta, views = run.config.privacy, run.config.privacy.delta or 0.0, {}
    for view, own in losses.items():
        if own:
            scores = statistics.scores([base[at] for at in own], list(own.values()))
            views[view] = statistics.find(scores, [found[at].trained for at in own], delta)
    result = Audit(run.folder, settings.unit, settings.epsilon, delta, views)
    sealed.write(run.folder / FILE, _record(result, found, {"base": base, **losses}))
    return result


def _prepared(
    config: Config, folder: Path, algorithm: Algorithm | None
) -> tuple[Shell, tuple[Canary, ...]]:
    """The reference engine with the run's rows and states, and the canaries.

    Raises:
        FedVLMError: data or model differ from those of the run.
    """
    plain = config.engine.model_copy(update={"name": "reference"})
    config = config.model_copy(update={"engine": plain, "output": str(folder)})
    engine, partition, _ = prepare(config, store=Store(folder), algorithm=algorithm)
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


def _losses(
    engine: Shell, found: Sequence[Canary], models: Iterable[tuple[Sequence[int], Tree]]
) -> dict[int, float]:
    """Position of a canary -> the sum of its rows' losses on its model."""
    import torch

    losses: dict[int, float] = {}
    size = engine.config.eval.batch_size
    params = lora.handles(engine.model)
    engine.model.eval()
    for positions, tree in models:
        lora.write(params, tree)
        owners = [(at, row) for at in positions for row in found[at].rows]
        for start in range(0, len(owners), size):
            part = owners[start : start + size]
            batch = engine.collator.training([row for _, row in part])
            with torch.no_grad():
                terms = engine.objective.terms(engine.model, batch)
            for (at, _), loss in zip(part, terms.loss.tolist(), strict=True):
                losses[at] = losses.get(at, 0.0) + loss
    return losses


def _record(
    result: Audit, found: Sequence[Canary], losses: Mapping[str, Mapping[int, float]]
) -> dict[str, Any]:
    """The content of ``audit.json``: the findings, and all numbers that they follow from."""
    told = asdict(result)
    del told["folder"]
    return {
        "version": __version__,
        **told,
        "level": statistics.CONFIDENCE,
        "shares": statistics.SHARES,
        "canaries": [
            {
                "client": one.client,
                "numbers": one.numbers,
                "trained": one.trained,
                "loss": {view: own[at] for view, own in losses.items() if at in own},
            }
            for at, one in enumerate(found)
        ],
    }

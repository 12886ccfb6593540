"""The results of a run: scores per client and model, their summary, and the bytes sent."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedvlm.algorithms.base import State
from fedvlm.engines.base import Answer, Engine, Models
from fedvlm.errors import FedVLMError, counted
from fedvlm.intervals import FEW_ROWS, ends, from_means, intervals, mean_interval, over_rows
from fedvlm.metrics import METRICS, admit, average, summarize
from fedvlm.rounds import grouped, shown
from fedvlm.rounds.grouped import by as by
from fedvlm.rounds.schedule import Round, standing
from fedvlm.seeds import derive
from fedvlm.settings.sections import Config
from fedvlm.store import sealed
from fedvlm.store.files import read_lines, slugs, write_text
from fedvlm.store.marks import CHECKPOINT, DONE, goes_on, mark
from fedvlm.store.replanned import planned
from fedvlm.store.run import Store

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

BUDGET = "privacy.json"
"""The file with everything that the privacy guarantee of a run depends on."""
FILES = "files"  # key of the digests in table.json
UNSCORED = "no client told its scores; each site has its models' answers in its own folder"
ANSWERED = ("untuned", "global", "personal")
MODELS = ("untuned", "global_before", "global", "personal_before", "personal")

logger = logging.getLogger("fedvlm")


@dataclass(frozen=True, repr=False)
class Results:
    """A finished run.

    Attributes:
        folder: the folder of the run.
        table: the content of ``table.json``.
        files: name -> digest of the answers and adapters that were written at the end.
    """

    folder: Path
    table: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """Reads the results of a finished run.

        Raises:
            FedVLMError: ``table.json`` is missing or damaged.
        """
        path = Path(folder)
        table = sealed.read(path / DONE)
        admit(table.get("own", ()))
        known = table.pop(FILES, {})
        if known.pop(CHECKPOINT, None) != mark(path) and not goes_on(path):
            raise sealed.damaged(path / DONE, f"it is of another run than {CHECKPOINT}")
        return cls(path, table, known)

    @property
    def metric(self) -> str:
        """The main metric, ``eval.metric``."""
        return self.table["metric"]

    @property
    def metrics(self) -> list[str]:
        """All metrics of the run, the main metric first; empty where no client told its scores."""
        found = self.table["models"]["personal"]["summary"]
        return sorted((m for m in METRICS if m in found), key=lambda m: m != self.metric)

    def scores(self, model: str = "personal", metric: str | None = None) -> dict[str, float]:
        """Client -> its score; ``metric`` None: ``eval.metric``."""
        metric = metric or self.metric
        return {c: s[metric] for c, s in self.table["models"][model]["clients"].items()}

    def summary(self, model: str = "personal", metric: str | None = None) -> dict[str, Any]:
        """The summary of a metric.

        ``mean`` and ``std`` over the clients; ``worst10`` for a metric with a direction;
        ``interval`` of the mean (Student's t, from three clients); ``mean_rows``, the mean over all
        clients' rows, and its ``interval_rows``. What is not known is None.

        Raises:
            FedVLMError: no client told its scores, as in deployed runs under differential privacy.
        """
        if not self.metrics:
            raise FedVLMError(f"'{self.folder}': {UNSCORED}")
        return self.table["models"][model]["summary"][metric or self.metric]

    def to_pandas(self) -> pd.DataFrame:
        """A row for each client and model: all scores, and their 95 % intervals."""
        return shown.frame(self.table)

    def by(self, column: str | None = None) -> pd.DataFrame:
        """Scores by the values of ``eval.group_by``: a row for each model, client and value.

        The client is empty for all clients together. The columns ``METRIC_low`` and ``METRIC_high``
        are 95 % intervals over rows.

        Args:
            column: the column, which has to be ``eval.group_by``; None: that one.

        Raises:
            FedVLMError: the answers have no value of this column.
        """
        import pandas as pd

        known = (self.table.get("groups") or {}).get("column")
        if known is None or column not in (None, known):
            has = f"by '{known}' alone" if known else "by no column"
            raise FedVLMError(
                f"'{self.folder}' has scores {has}: the column is chosen before a run, by "
                "eval.group_by, and the rows must have it; answers of a deployed run stay at the "
                "sites"
            )
        return pd.DataFrame(grouped.rows(known, {m: self.answers(m) for m in ANSWERED}))

    def plot(self) -> Figure:
        """The scores by round and at the end, as in ``curves.png``.

        Raises:
            FedVLMError: no client told its scores.
        """
        from fedvlm.figures import plots

        if not self.metrics:
            raise FedVLMError(f"'{self.folder}': {UNSCORED}")
        title = f"{self.table['algorithm']}, {counted(self.table['clients'], 'client')}"
        return plots.figure_run(Store(self.folder).lines(), title, metric=self.metric)

    def __repr__(self) -> str:
        return shown.line(self.folder, self.table)

    def _repr_html_(self) -> str:
        return shown.html(self.folder, self.table)

    def answers(self, model: str = "personal") -> list[dict[str, Any]]:
        """Answers and scores of a model (``untuned``, ``global``, ``personal``), one a row.

        Raises:
            FedVLMError: the file is missing or damaged.
        """
        name = f"answers/{model}.jsonl"
        sealed.check(self.folder, {name: self.files[name]} if name in self.files else {})
        return read_lines(self.folder / name)

    def adapter(self, client: str | None = None) -> Path:
        """The PEFT folder of a client's adapter; without a client, of the global adapter."""
        name = "global" if client is None else self.table["folders"][client]
        return self.folder / "adapters" / name


def write_results(config: Config, names: Sequence[str], store: Store, engine: Engine) -> Results:
    """Writes the answers, the adapters and the tables; ``table.json`` last.

    An adapter that cannot be written is a warning, because it can be made again.
    """
    lines, state = store.lines(), store.server()
    last, clients = standing(config, engine.algorithm), scored(config, names)
    answers = {"untuned": read_lines(store.folder / "answers" / "untuned.jsonl")}
    for kind, models in (("global", global_models), ("personal", personal_models)):
        found = engine.answer(kind, models(engine, last, state, clients))
        answers[kind] = write_answers(store.folder, kind, found)
    table = tabulate(config, lines, names, answers) | {"groups": _groups(config, answers)}
    table |= _private(store, lines)
    if config.eval.own:
        table["own"] = list(config.eval.own)
    if earlier := planned(store.folder):
        table["planned"] = earlier
    folder = store.folder / "adapters"
    folders = {client: folder / name for client, name in table["folders"].items()}
    again = "every command that needs an adapter makes it again"
    with optional(f"the global adapter in '{folder}'", again):
        engine.export(global_models(engine, last, state, [""]), {"": folder / "global"})
    with optional(f"adapters of clients in '{folder}'", again):
        engine.export(personal_models(engine, last, state, clients), folders)
    write_text(store.folder / "table.csv", as_csv(table))
    if table["groups"]:
        write_text(store.folder / "groups.csv", groups_csv(config.eval.group_by, answers))
    ends = [*store.folder.glob("answers/*.jsonl"), *folder.glob("[!.]*/adapter_*")]
    ends += store.folder.glob("uploads/*.safetensors")
    digests = sealed.digests(store.folder, sorted(str(p.relative_to(store.folder)) for p in ends))
    digests[CHECKPOINT] = mark(store.folder)  # no table of another run
    sealed.write(store.folder / DONE, table | {FILES: digests})
    return Results.read(store.folder)


def _private(store: Store, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The privacy guarantee of the run and the epsilon that it spent; empty without a budget."""
    path = store.folder / BUDGET
    if not path.exists():
        return {}
    about = json.loads(path.read_bytes())
    return {"privacy": {**about, "spent": lines[-1].get("epsilon", 0.0)}}


@contextlib.contextmanager
def optional(what: str, again: str) -> Iterator[None]:
    """Work without which a run is still complete: an error becomes a warning.

    Args:
        what: what may be missing then.
        again: how it can be made later.
    """
    try:
        yield
    except FedVLMError:
        raise  # such as too few sites: the run can be resumed
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("%s was not written (%.300s); %s", what, reason, again)


def scored(config: Config, clients: Sequence[str]) -> tuple[str, ...]:
    """The scored clients, a function of the settings: the same clients in every round."""
    most = config.eval.clients or len(clients)
    if most >= len(clients):
        return tuple(clients)
    draw = np.random.default_rng(derive(config.seed, "scored clients"))
    chosen = sorted(draw.choice(len(clients), size=most, replace=False))
    return tuple(clients[i] for i in chosen)


def of_all(some: Collection[str], clients: Collection[str]) -> str:
    """The number of clients, and of scored clients where they are fewer, as text."""
    count = counted(len(clients), "client")
    return count if len(some) == len(clients) else f"{count}, {len(some):,} of them scored"


def global_models(engine: Engine, round_: Round, state: State, clients: Iterable[str]) -> Models:
    """The models of clients that keep nothing: the shared factors on the initial adapter."""
    down = engine.algorithm.send(state, round_.visit(""))
    return Models("global", ((round_.visit(client), down) for client in clients))


def personal_models(engine: Engine, round_: Round, state: State, clients: Iterable[str]) -> Models:
    """The personal models: the shared factors and the kept state of each client."""
    visits = map(round_.visit, clients)
    return Models("personal", ((v, engine.algorithm.send(state, v)) for v in visits))


def write_answers(
    folder: Path, model: str, answers: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """Writes ``answers/MODEL.jsonl``, a line for each held-out row; returns the lines.

    Without answers, it writes nothing.
    """
    if not answers:
        return []
    lines = [{"client": client, **a} for client, found in answers.items() for a in found]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_text(folder / "answers" / f"{model}.jsonl", text)
    return lines


def tabulate(
    config: Config,
    lines: list[dict[str, Any]],
    clients: Sequence[str],
    answers: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """The final table, from the lines of metrics, and the answers for its intervals."""
    last, folders = lines[-1]["evaluation"], slugs(clients)
    models = {"untuned": lines[0]["evaluation"]["personal"], **last}
    trained = [line for line in lines if line["round"] > 0]
    sent = {
        way: [n for line in trained for n in line[way].values()]
        for way in ("bytes_up", "bytes_down")
    }
    return {
        "algorithm": config.algorithm.name,
        "objective": config.objective.name,
        "metric": config.metric,
        "seed": config.seed,
        "rounds": config.train.rounds,
        "split": config.eval.split,
        "models": {
            name: scored_model(models[name], answers.get(name) or [])
            for name in MODELS
            if name in models
        },
        "few_rows": {
            client: scores["examples"]
            for client, scores in models["personal"].items()
            if scores.get("examples", FEW_ROWS) < FEW_ROWS
        },
        "bytes": {
            way: {"per_client_round": sum(n) / max(1, len(n)), "total": sum(n)}
            for way, n in sent.items()
        },
        **{
            key: sum(sum(line.get(key, {}).values()) for line in trained)
            for key in ("steps", "passes")
        },
        "clients": len(clients),
        "folders": {c: f"client-{folders[c]}" for c in scored(config, clients)},
    }


def as_csv(table: dict[str, Any]) -> str:
    """One row per client and model."""
    return _csv(shown.rows_of(table))


def groups_csv(column: str, answers: Mapping[str, list[Answer]]) -> str:
    """One row per model, client and value of ``eval.group_by``; all clients together first."""
    return _csv(grouped.rows(column, answers))


def _csv(rows: list[dict[str, Any]]) -> str:
    first = rows[0] if rows else {}
    measured = [m for m in METRICS if m in first]
    bounds = list(ends(measured, {}))
    names = [n for n in first if n not in (*measured, *bounds, "examples")]
    columns = [*names, *measured, "examples", *bounds]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _groups(config: Config, answers: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    """Scores by the value of ``eval.group_by``, over all clients' rows; None without a value."""
    values = sorted({a["group"] for a in answers["personal"] if a["group"] is not None})
    if not values:
        return None
    grouped = {model: by("group", found) for model, found in answers.items()}
    return {
        "column": config.eval.group_by,
        "models": {m: {v: average(found[v]) for v in values} for m, found in grouped.items()},
        "intervals": {m: {v: intervals(found[v]) for v in values} for m, found in grouped.items()},
    }


def scored_model(clients: dict[str, dict[str, float]], answers: list[Answer]) -> dict[str, Any]:
    """A model's scores by client, their intervals over rows, and their summary.

    Without answers, which stay at deployed sites, shares still have intervals.
    """
    own = by("client", answers)
    rows = [scores.get("examples", 0) for scores in clients.values()]
    return {
        "clients": clients,
        "intervals": {
            c: intervals(own[c]) if c in own else from_means(scores)
            for c, scores in clients.items()
        },
        "rows": sum(rows) if min(rows, default=0) > 0 else None,
        "summary": _summary(clients, answers),
    }


def _summary(
    clients: dict[str, dict[str, float]], answers: list[Answer]
) -> dict[str, dict[str, Any]]:
    """Mean and spread of every score over clients, and its mean over rows, with intervals."""
    measured = next(iter(clients.values()), {})
    pooled = {m: over_rows(m, clients.values()) for m in METRICS if m in measured}
    known = {m: mean for m, mean in pooled.items() if mean is not None}
    rows = sum(scores.get("examples", 0) for scores in clients.values())
    bounds = intervals(_evenly(answers)) if answers else from_means(known | {"examples": rows})
    return {
        name: {
            **summarize({c: s[name] for c, s in clients.items()}, metric.better),
            "interval": mean_interval((s[name] for s in clients.values()), metric.bounds),
            "mean_rows": pooled[name],
            "interval_rows": bounds.get(name),
        }
        for name, metric in METRICS.items()
        if name in measured
    }


def _evenly(answers: list[Answer]) -> list[Answer]:
    """Answers with weights that make a loss over all of them the clients' losses by their rows."""
    totals = {
        c: sum(a["weight"] for a in own) / len(own) for c, own in by("client", answers).items()
    }
    return [{**a, "weight": a["weight"] / totals[a["client"]]} for a in answers]

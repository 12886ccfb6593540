"""What comes out of a run: scores per client and model, their summary, and the bytes."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.metrics import summarize
from fedvlm.sections import Config
from fedvlm.store import DONE, Store, write_text
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition
    from fedvlm.engines.reference import ReferenceEngine

METRICS = ("exact_match", "token_f1", "rouge_l", "loss")
MODELS = ("untuned", "global_before", "global", "personal_before", "personal")


@dataclass(frozen=True)
class Results:
    """A finished run.

    Attributes:
        folder: where everything is.
        table: the content of ``table.json``.
    """

    folder: Path
    table: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Results:
        """The results of a finished run."""
        return cls(Path(folder), json.loads((Path(folder) / DONE).read_text(encoding="utf-8")))

    def scores(self, model: str = "personal", metric: str = "exact_match") -> dict[str, float]:
        """One number per client."""
        return {c: s[metric] for c, s in self.table["models"][model]["clients"].items()}

    def summary(self, model: str = "personal", metric: str = "exact_match") -> dict[str, float]:
        """``mean``, ``std`` and ``worst10`` over the clients."""
        return self.table["models"][model]["summary"][metric]

    def adapter(self, client: str | None = None) -> Path:
        """The PEFT folder of a client's adapter, or of the global one."""
        name = "global" if client is None else self.table["folders"][client]
        return self.folder / "adapters" / name


def write_results(
    config: Config, partition: Partition, store: Store, engine: ReferenceEngine
) -> Results:
    """Writes adapters, the table as CSV and JSON, and the picture; ``table.json`` last."""
    from fedvlm.algorithms import Client, build
    from fedvlm.models.lora import save_adapter
    from fedvlm.report.plots import plot_run

    lines = store.lines()
    table = tabulate(config, lines, store)
    algorithm, state = build(config.algorithm), store.server()

    def sent(client: str) -> Tree:
        return algorithm.download(state, Client(client, 1.0))

    first = partition.clients[0]
    folder = store.folder / "adapters"
    save_adapter(engine.model, algorithm.start(engine.adapter, sent(first), {}), folder / "global")
    for client, name in table["folders"].items():
        tree = engine.personal(algorithm, client, sent(client))
        save_adapter(engine.model, tree, folder / name)
    write_text(store.folder / "table.csv", as_csv(table))
    title = f"{config.algorithm.name}, {len(partition.clients)} clients"
    plot_run(lines, store.folder / "curves.png", title)
    write_text(store.folder / DONE, json.dumps(table, indent=2) + "\n")
    return Results(store.folder, table)


def tabulate(config: Config, lines: list[dict[str, Any]], store: Store) -> dict[str, Any]:
    """The final table from the metrics lines."""
    last = lines[-1]["evaluation"]
    models = {"untuned": lines[0]["evaluation"]["personal"], **last}
    trained = [line for line in lines if line["round"] > 0]
    sent = {
        way: [n for line in trained for n in line[way].values()]
        for way in ("bytes_up", "bytes_down")
    }
    return {
        "algorithm": config.algorithm.name,
        "seed": config.seed,
        "rounds": config.train.rounds,
        "split": config.eval.split,
        "models": {
            name: {"clients": models[name], "summary": _summary(models[name])} for name in MODELS
        },
        "bytes": {
            way: {"per_client_round": sum(n) / len(n), "total": sum(n)} for way, n in sent.items()
        },
        "folders": {c: f"client-{slug}" for c, slug in store.slugs.items()},
    }


def as_csv(table: dict[str, Any]) -> str:
    """One row per client and model."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["client", "model", *METRICS, "examples"])
    for model, scored in table["models"].items():
        for client, s in scored["clients"].items():
            writer.writerow([client, model, *(s[m] for m in METRICS), s["examples"]])
    return out.getvalue()


def _summary(clients: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {
        metric: summarize(
            {c: s[metric] for c, s in clients.items()}, higher_is_better=metric != "loss"
        )
        for metric in METRICS
    }

"""The beginning of a run's folder, or of a resumed run: the files that describe the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.errors import FedVLMError
from fedvlm.privacy import canaries
from fedvlm.rounds.budget import Budget
from fedvlm.rounds.prepare import environment
from fedvlm.rounds.results import BUDGET
from fedvlm.settings.sections import Config
from fedvlm.store import run as stores

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


def described(
    config: Config, rows: Any, partition: Partition, budget: Budget | None = None
) -> dict[str, str]:
    """The files that describe data and model: name -> text. A resumed run must repeat them."""
    from fedvlm.data.fingerprint import content
    from fedvlm.models.load import mark_of

    columns = content(rows, (config.partition.column, config.eval.group_by))
    private = {BUDGET: json.dumps(budget.described(), indent=2) + "\n"} if budget else {}
    return {
        "model.json": json.dumps({"mark": mark_of(config.model)}) + "\n",
        "data.json": json.dumps({"rows": len(rows), "columns": columns}, indent=2) + "\n",
        "partition.json": json.dumps(partition.to_dict()),
        **canaries.described(partition),
        **private,
    }


def begin(config: Config, store: stores.Store, described: Mapping[str, str], resume: bool) -> None:
    """Creates a run's folder, or takes it back to the last finished round.

    Args:
        config: the settings of the run.
        store: the folder of the run, locked.
        described: name of a file -> its text about the clients, which a resumed run must repeat.
        resume: whether the run has begun before.

    Raises:
        FedVLMError: the folder is in use, or the clients have changed.
    """
    if resume:
        check_same(store.folder, described)
        store.rewind()
    else:
        stores.check_fresh(store.folder)
        about = {
            "environment.json": json.dumps(environment(), indent=2) + "\n",
            stores.CONFIG: configs.dump(config),
        }
        store.create({**described, **about})


def check_same(folder: Path, described: Mapping[str, str]) -> None:
    """Refuses data or a model other than those that the run in ``folder`` began with.

    Raises:
        FedVLMError: the message says what differs.
    """
    for name, text in described.items():
        if (folder / name).read_bytes() != text.encode():
            raise FedVLMError(_changed(folder, name, text))


def _changed(folder: Path, name: str, text: str) -> str:
    """The message for data or a model that differ from those that a run began with."""
    if name == "model.json":
        return (
            f"the base model is not what it was when the run in '{folder}' began; give the place "
            "of that model with model.name=..., or start a new run with output=DIR"
        )
    differ = "they give another partition"
    if name == "data.json":
        then, now = json.loads((folder / name).read_bytes()), json.loads(text)
        differ = f"there are {now['rows']} rows, and there were {then['rows']}"
        if then["rows"] == now["rows"]:
            columns = {**then["columns"], **now["columns"]}
            other = [c for c in columns if then["columns"].get(c) != now["columns"].get(c)]
            differ = f"the rows differ in {', '.join(other)}"
    return (
        f"the data are not what they were when the run in '{folder}' began: {differ}; restore the "
        "data, or start a new run with output=DIR"
    )

"""``fedvlm site check``: what a run would find at a site. No connection is opened.

The rows are read, checked and split as a run does it (:mod:`fedvlm.rounds.prepare`), with the
site's own settings. A model is loaded only where one is named.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import config as configs
from fedvlm.data.sources import load_rows
from fedvlm.deploy import balance, limits
from fedvlm.deploy.policy import Allowed, Policy, read_policy
from fedvlm.errors import ConfigError, DataError, FedVLMError, brief, shown
from fedvlm.models.pin import pin
from fedvlm.privacy.units import units_of
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.progress import Quiet
from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition

LOW = 2**30  # bytes; with less free room on the disk, a line warns
TOP = 8  # most frequent answers that are shown
OURS = ("image", "question", "answer", "row", "image_hash")


@dataclass
class Report:
    """The result of a check.

    Attributes:
        found: lines about what a run would find.
        problems: what would stop a run, each on a line of its own.
        answers: whether answers of rows may be among the lines.
    """

    found: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    answers: bool = True

    def raise_all(self) -> None:
        """Raises one error with all problems, if there are any.

        Raises:
            FedVLMError: lists the problems.
        """
        count = len(self.problems)
        if count:
            head = (
                "the check found a problem" if count == 1 else f"the check found {count} problems"
            )
            raise FedVLMError("\n".join([f"{head}:", *(f"  - {p}" for p in self.problems)]))


def check(
    data: str,
    policy: str | None,
    model: str | None = None,
    state: str = ".",
    answers: bool = True,
) -> Report:
    """Checks a site's rows, policy, models and disk, and finds all problems at once.

    Args:
        data: the site's rows.
        policy: file with the site's policy; None: the default policy.
        model: a model of the policy, which is loaded and gets every row; None: no model is loaded.
        state: folder of the site's state; it need not exist.
        answers: whether the most frequent answers are among the lines.
    """
    report = Report(answers=answers)
    try:
        rules = read_policy(policy)
    except ConfigError as error:
        report.problems += error.problems
        report.found.append("the policy cannot be used: the rows are checked by the default policy")
        rules = Policy()
    _models(report, rules, model)
    report.found.append(balance.limit(rules))
    _rows(report, rules, data, model if model in rules.models else None, state)
    _disk(report, Path(state))
    return report


def _rows(report: Report, policy: Policy, data: str, model: str | None, state: str) -> None:
    """Reads the rows as a run does, and lets a model check them."""
    if not Path(data).exists():
        report.problems.append(f"data {shown(data, 200)}: there is no such file or folder")
        return
    with _warnings() as warnings:
        try:
            strict, config = _settings(policy, str(Path(data).absolute()), model)
            rows = load_rows(config.data, config.seed)
            partition = preparing.partitioned(config, rows)
            report.found += [
                *_columns(config, rows),
                *_counts(len(rows), partition, report.answers),
            ]
            limits.admitted(policy, config, next(iter(partition.splits.values())))
            report.found += _protected(policy, rows, partition, state)
            if model:
                partition = _encoded(config, rows, partition)
                report.found += [f"rows that '{model}' can take: {_splits(partition)}"]
        except FedVLMError as error:
            found = error.problems if isinstance(error, ConfigError) else [str(error)]
            report.problems += found
            strict = False
    left = [text for text in warnings if text.startswith("left out")]
    if strict and left:
        report.problems += [
            f"a run would stop: {text}. Repair these rows, or put data.on_error: skip into 'set' "
            "of the policy"
            for text in left
        ]
    report.found += [f"warning: {text}" for text in warnings if not (strict and text in left)]


def _settings(policy: Policy, data: str, model: str | None) -> tuple[bool, Config]:
    """Whether an unusable row stops a run, and the site's settings that leave such rows out."""
    name = model or "tiny"
    models = policy.models if model else {name: Allowed(path=name)}
    local = policy.model_copy(update={"models": models})
    config = local.localized(configs.load({"model": {"name": name}}), data, Path("check"))
    tree: dict[str, Any] = config.model_dump()
    strict = tree["data"]["on_error"] == "fail"
    tree["data"] |= {"on_error": "skip", "cache": 0}
    return strict, configs.load(tree)


def _protected(policy: Policy, rows: Any, partition: Partition, state: str) -> Iterator[str]:
    """The protected units of the training rows, and what earlier runs have spent on them."""
    (split,) = partition.splits.values()
    column = policy.column
    if column is not None and column not in rows.column_names:
        raise DataError(f"dp_unit: the rows have no column {shown(column)}")
    count = len(units_of(rows, split.train, column))
    yield f"protected units to train on: {count} ('{column or 'row'}')"
    if policy.delta_max is not None and policy.delta_max * count >= 1:
        yield (
            f"warning: delta_max={policy.delta_max:g} is not below 1 / number of units: "
            f"{0.1 / count:.1g} or less would protect them"
        )
    yield balance.on(state, policy, rows, split.train, column)


def _columns(config: Config, rows: Any) -> Iterator[str]:
    columns = config.data.columns
    roles = f"picture '{columns.image}', question '{columns.question}', answer '{columns.answer}'"
    others = [brief(name, 40) for name in rows.column_names if name not in OURS]
    yield f"columns: {roles}" + (f"; others: {', '.join(others)}" if others else "")


def _counts(count: int, partition: Partition, answers: bool) -> Iterator[str]:
    (skew,) = partition.skew.values()
    yield f"rows: {count}, of which {_splits(partition)}"
    often = ", ".join(f"{shown(text, 40)} {100 * n / count:.0f} %" for text, n in skew.top[:TOP])
    yield f"answers: {skew.distinct} different" + (f"; most frequent: {often}" if answers else "")


def _splits(partition: Partition) -> str:
    (counts,) = partition.counts().values()
    return ", ".join(f"{split} {n}" for split, n in counts.items())


def _encoded(config: Config, rows: Any, partition: Partition) -> Partition:
    """The partition of the rows that the model can take."""
    from fedvlm.models.load import load_model

    loaded = load_model(config.model)
    return preparing.usable(config, rows, partition, loaded, None, Quiet())[1]


def _models(report: Report, policy: Policy, model: str | None) -> None:
    """Compares the digests of the models with the policy; only local folders are looked at."""
    if model is not None and model not in policy.models:
        known = ", ".join(map(shown, policy.models)) or "none"
        report.problems.append(f"model {shown(model)} is not in the policy; it allows {known}")
    for name, allowed in policy.models.items():
        if model is None or name == model:
            _model(report, name, allowed)


def _model(report: Report, name: str, allowed: Allowed) -> None:
    if not Path(allowed.path).is_dir():
        if allowed.path == "tiny":
            report.found.append(f"model {shown(name)}: the bundled model")
        elif allowed.path.startswith(("/", ".", "~")) or allowed.sha256:
            report.problems.append(f"model {shown(name)}: {shown(allowed.path, 200)} is no folder")
        else:
            report.found.append(
                f"model {shown(name)}: {shown(allowed.path, 200)} on the hub; not looked at"
            )
        return
    try:
        found = pin(allowed.path).digest
    except FedVLMError as error:
        report.problems.append(f"model {shown(name)}: {error}")
        return
    if allowed.sha256 and found != allowed.sha256:
        report.problems.append(
            f"model {shown(name)}: its SHA-256 is {found}, but the policy allows {allowed.sha256}"
        )
    else:
        pinned = "as the policy wants" if allowed.sha256 else "not pinned in the policy (sha256)"
        report.found.append(f"model {shown(name)}: SHA-256 {found}, {pinned}")


def _disk(report: Report, state: Path) -> None:
    place = state.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    low = "; this is little, and a site with a full disk leaves rounds out" if free < LOW else ""
    report.found.append(f"disk of {shown(str(state), 200)}: {free / 1e9:.1f} GB free{low}")


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Collects this package's warnings instead of printing them."""
    found: list[str] = []

    class Collected(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = logging.getLogger("fedvlm"), Collected(logging.WARNING)
    before = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = before

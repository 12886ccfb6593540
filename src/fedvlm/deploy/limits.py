"""The numbers in a site's policy: what they allow a run, before and after the rows are read.

A message about a limit goes to the server. It names the limit and never a number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedvlm.deploy import digests
from fedvlm.errors import FedVLMError, counted
from fedvlm.metrics import METRICS, rounded
from fedvlm.settings.method import Positive, Section
from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Split

SHARES = ("length", *(name for name, metric in METRICS.items() if metric.share))
"""Scores that are means of whole numbers or of shares, which can tell their divisor."""
FASTEST = 1.0  # learning rate
FORGOTTEN = 0.1  # share of the weights that a step may take away
STEEPEST = 10.0  # objective.beta: a larger one lifts small differences above the rounding
LOUDEST = 64.0  # lora.alpha, in ranks
OWN = ("output", "data", "partition")
"""Sections of a run's configuration from which a site takes nothing."""


class Refused(FedVLMError):
    """A site refuses a request; the server gets the message."""


class Spent(Refused):
    """A site refuses a round because the run has no privacy left for it."""


class Budgets(Section):
    """The numbers in a site's policy; see :class:`fedvlm.deploy.policy.Policy`."""

    train_rows: Positive = Field(
        20, description="fewest rows to train on, at the site and in one round (batch size x steps)"
    )
    batch_rows: Positive = Field(4, description="fewest rows of an optimizer step")
    scored_rows: Positive = Field(
        10, description="fewest rows that a score is a mean of; a multiple of it is scored"
    )
    scores: Positive = Field(100, description="most scorings of a run")
    score_step: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="step to which scores and losses are rounded; 0: not rounded"
    )
    tell_rows: bool = Field(True, description="whether the server learns the number of rows")
    rounds: Positive | None = Field(
        1000, description="most rounds of a run; empty: any number, as with the next six"
    )
    steps: Positive | None = Field(100_000, description="most optimizer steps of a run")
    batch: Positive | None = Field(256, description="most rows of a batch, trained or scored")
    rank: Positive | None = Field(256, description="largest rank, spare ranks included")
    new_tokens: Positive | None = Field(512, description="most new tokens of an answer")
    bytes_per_round: Positive | None = Field(
        2**30, description="most bytes of one message up or down"
    )
    disk: Positive | None = Field(20 * 2**30, description="most bytes of a run's folder")
    runs: Positive | None = Field(100, description="most runs kept at the site; empty: any number")


def digest_of(config: Config) -> str:
    """The digest of :func:`used`."""
    return digests.digest_of(used(config))


def used(config: Config) -> dict[str, Any]:
    """A run's configuration as the server sends it, without what no site uses."""
    found = {n: part for n, part in config.model_dump(mode="json").items() if n not in OWN}
    found["engine"] = {"name": config.engine.name}  # a site takes no other setting of the engine
    return found


def exceeded(policy: Budgets, config: Config) -> list[str]:
    """The parts of a run that a site's numbers do not allow, as far as settings show them.

    Args:
        policy: the numbers in the policy of the site.
        config: the run's settings as they hold at the site.
    """
    train, scored = config.train, config.eval
    steps = None if train.local_epochs else train.rounds * train.steps(0) + train.tuning
    rank = config.lora.rank + _spare(config)
    most = (
        (train.rounds, "rounds", "train.rounds", "rounds"),
        (steps, "optimizer steps", "train.rounds x train.local_steps, and finish_steps", "steps"),
        (train.batch_size, "rows in a batch", "train.batch_size", "batch"),
        (scored.batch_size, "rows in a batch", "eval.batch_size", "batch"),
        (rank, "ranks", "lora.rank and lora.spare", "rank"),
        (scored.max_new_tokens, "new tokens", "eval.max_new_tokens", "new_tokens"),
        (scorings(config), "scorings", "train.rounds and eval.every", "scores"),
    )
    wrong = [
        f"{number} {what} ({setting}), and the limit is {limit} ({name})"
        for number, what, setting, name in most
        if number is not None and (limit := getattr(policy, name)) is not None and number > limit
    ]
    seen = None if train.local_epochs else train.batch_size * train.steps(0)
    last = train.batch_size * train.tuning or None
    least = (
        (seen, "training rows in a round", "train.batch_size x train.local_steps", "train_rows"),
        (last, "training rows at the end", "train.batch_size x finish_steps", "train_rows"),
        (train.batch_size, "rows in a step", "train.batch_size", "batch_rows"),
        (scored.max_rows, "scored rows", "eval.max_rows", "scored_rows"),
    )
    wrong += [
        f"{number} {what} ({setting}), and the minimum is {getattr(policy, name)} ({name})"
        for number, what, setting, name in least
        if number is not None and number < getattr(policy, name)
    ]
    if not policy.tell_rows and train.local_epochs:
        wrong.append("train.local_epochs, whose steps tell the number of rows (tell_rows)")
    return wrong + _lopsided(config)


def _lopsided(config: Config) -> list[str]:
    """Settings with which one step decides a round, so that an upload shows that step's rows."""
    train = config.train
    rate = max(rate for rate in (train.lr, train.lr_a, train.lr_b) if rate is not None)
    pulls = (train.weight_decay, getattr(config.algorithm, "prox_mu", 0.0) or 0.0)
    wrong = [f"a learning rate of {rate:g}, and the limit is {FASTEST:g}"] * (rate > FASTEST)
    if rate * max(pulls) > FORGOTTEN:
        wrong.append(
            f"a learning rate of {rate:g} and a pull of {max(pulls):g} (train.weight_decay, "
            f"algorithm.prox_mu), whose product is more than {FORGOTTEN:g}: a step would undo the "
            "steps before it"
        )
    beta, scale = config.objective.beta, config.lora.alpha / config.lora.rank
    wrong += [f"objective.beta={beta:g}, and the limit is {STEEPEST:g}"] * (beta > STEEPEST)
    return wrong + [
        f"lora.alpha of {scale:g} times the rank, and the limit is {LOUDEST:g} times"
    ] * (scale > LOUDEST)


def _spare(config: Config) -> int:
    from fedvlm.algorithms.table import spare_ranks

    return spare_ranks(config.algorithm.name, config.lora)


def scorings(config: Config) -> int:
    """The largest number of scorings that an honest server asks of a site in a run.

    Before round 1 these are two models. A scored round has the client's model before the server's
    step, and its personal and its global model after it. It also has the global model before the
    round, which is a new question only where the round before was not scored.
    """
    from fedvlm.algorithms.table import of_run

    rounds, every = config.train.rounds, config.eval.every
    count = rounds // every if every else 0
    if of_run(config).final or not every or rounds % every:
        count += 1
    return 2 + count * (3 if every == 1 else 4)


def admitted(policy: Budgets, config: Config, split: Split) -> Split:
    """The rows of a site that a run may use.

    The number of scored rows is a multiple of the minimum. So the rows that are scored in one run
    and not in another are never fewer than the minimum. The same holds for the validation rows: an
    algorithm that asks for their scores gets those of the same rows in every run.

    Args:
        policy: the numbers in the policy of the site.
        config: the run's settings as they hold at the site.
        split: all rows of the site.

    Raises:
        Refused: there are too few rows, or too many steps for their number.
    """
    from fedvlm.engines.shell import MOST_VALIDATED

    train, least, part = config.train, policy.scored_rows, config.eval.split
    held = getattr(split, part)
    count = min(len(held), config.eval.max_rows or len(held)) // least * least
    steps = train.rounds * train.steps(len(split.train)) + train.tuning
    wrong = []
    if len(split.train) < policy.train_rows:
        wrong.append(
            f"the site has fewer than {counted(policy.train_rows, 'row')} to train on (train_rows)"
        )
    if not count:
        wrong.append(
            f"the site has fewer than {counted(least, 'row')} in '{part}' to score (scored_rows)"
        )
    if policy.steps is not None and steps > policy.steps:
        wrong.append(f"it asks for more than {policy.steps} optimizer steps (steps)")
    if wrong:
        raise Refused("the site's policy refuses this run: " + "; ".join(wrong))
    val = split.val[: min(len(split.val), MOST_VALIDATED) // least * least]
    return replace(replace(split, val=val), **{part: held[:count]})


def told(policy: Budgets, scores: Mapping[str, Any]) -> dict[str, Any]:
    """A site's scores as the server gets them: rounded, and without the number of rows if secret.

    Where the number of rows is secret, a share is rounded to a multiple of 1 / ``scored_rows``.
    Every such multiple is a possible mean of any allowed number of rows, so that it reveals none.
    """
    step, whole = policy.score_step, dict(scores)
    coarse = step
    if not policy.tell_rows:
        whole.pop("examples", None)
        coarse = max(step, 1 / policy.scored_rows)
    return {
        name: value
        if name == "examples"
        else rounded(value, coarse if name in SHARES else scaled(step, value))
        for name, value in whole.items()
    }


def scaled(step: float, value: float) -> float:
    """The step for a value whose scale the server can set: larger above 16, with the value."""
    size = abs(value) / 16
    return step * 2.0 ** math.floor(math.log2(size)) if 1 < size < math.inf else step


def check_bytes(policy: Budgets, size: int, way: str) -> None:
    """Refuses a message that is too large; ``way`` is up or down."""
    if policy.bytes_per_round is not None and size > policy.bytes_per_round:
        raise Refused(
            f"the site's policy refuses this run: {size} bytes {way} in a round, and the limit is "
            f"{policy.bytes_per_round} (bytes_per_round)"
        )


def check_disk(policy: Budgets, folder: Path, more: int = 0) -> None:
    """Refuses work whose result would make a run's folder larger than allowed.

    Args:
        policy: the numbers in the policy of the site.
        folder: the folder of the run.
        more: bytes that are about to be written.
    """
    if policy.disk is None:
        return
    size = more + sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
    if size > policy.disk:
        raise Refused(
            f"the site's policy refuses this round: the run's folder would hold {size} bytes, and "
            f"the limit is {policy.disk} (disk)"
        )


def check_runs(policy: Budgets, folder: Path) -> None:
    """Refuses a new run at a site that keeps as many runs as it may.

    Args:
        policy: the numbers in the policy of the site.
        folder: the folder of the run, beside the folders of other runs.
    """
    if policy.runs is None or folder.exists():
        return
    others = sum(path.is_dir() for path in folder.parent.glob("*"))
    if others >= policy.runs:
        raise Refused(
            f"the site's policy refuses this run: the site keeps {others} runs, and the limit is "
            f"{policy.runs} (runs); the site removes old ones"
        )

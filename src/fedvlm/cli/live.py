"""The progress of a run: live bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedvlm.cli.bars import NOTE, bars, named, noted
from fedvlm.errors import brief, counted
from fedvlm.metrics import METRICS, summarize
from fedvlm.rounds.progress import Progress, Quiet, source
from fedvlm.settings.sections import Config

if TYPE_CHECKING:
    from fedvlm.data.partition import Partition


SECURE = (
    "secure aggregation: the server gets sums of uploads only, so the mean is plain "
    "(aggregate.kind=mean): no change is shrunk or left out"
)


class Plain(Progress):
    """Prints one line per round."""

    def __init__(self, prefix: str = ""):
        self.prefix = prefix

    def _say(self, text: str) -> None:
        print(f"{self.prefix}{text}", flush=True)

    @contextlib.contextmanager
    def started(self, config: Config) -> Iterator[None]:
        self.config = config
        self._say(f"{config.algorithm.name} on {source(config)}, into {config.output}")
        if config.wire.secure:
            self._say(SECURE)
        yield

    def partitioned(self, partition: Partition) -> None:
        self._say(dealt(partition, self.config))

    def encoded(self, done: int, rows: int) -> None:
        if done == 1:
            self._say(f"encoding {counted(rows, 'row')}; later runs reuse them")

    def checked(self, done: int, rows: int) -> None:
        if done == 1:
            self._say(f"checking {counted(rows, 'row')}")

    def round(self, line: dict[str, Any], seconds: float) -> None:
        self._say(describe(line, self.config) + (f"  {seconds:.1f} s" if seconds else ""))


class Live(Progress):
    """Shows a bar over the rounds with the time left, and prints a line for every evaluation."""

    def __init__(self) -> None:
        self.bars = bars()

    @contextlib.contextmanager
    def started(self, config: Config) -> Iterator[None]:
        self.config = config
        with self.bars:
            self.task = self.bars.add_task(
                named(config.algorithm.name),
                total=config.train.rounds,
                note=noted(f"loading {source(config)}"),
            )
            yield

    def partitioned(self, partition: Partition) -> None:
        self.bars.console.print(dealt(partition, self.config), highlight=False, markup=False)
        if self.config.wire.secure:
            self.bars.console.print(SECURE, highlight=False, markup=False)

    def encoded(self, done: int, rows: int) -> None:
        self.bars.update(self.task, note=noted(f"encoding row {done:,} of {rows:,}"))

    def checked(self, done: int, rows: int) -> None:
        self.bars.update(self.task, note=noted(f"checking row {done:,} of {rows:,}"))

    def trained(self, client: str, loss: float) -> None:
        told = "trained" if math.isnan(loss) else f"loss {loss:.3f}"
        self.bars.update(self.task, note=f"{brief(client, NOTE - len(told) - 1)} {told}")

    def round(self, line: dict[str, Any], seconds: float) -> None:
        rounds = line.get("stopped", self.config.train.rounds)
        done = min(line["round"], rounds)
        self.bars.update(self.task, note="training")
        if line["round"] > rounds:
            self.bars.update(self.task, note="last round done")
        self.bars.update(self.task, completed=done)
        if line["evaluation"] or line.get("rejected"):
            self.bars.console.print(describe(line, self.config))


def choose(quiet: bool = False) -> Progress:
    """Bars on a terminal, plain lines elsewhere, nothing if ``quiet``."""
    if quiet:
        return Quiet()
    return Live() if sys.stdout.isatty() else Plain()


def dealt(partition: Partition, config: Config) -> str:
    """A table of how the clients differ (at most twenty), and the number of scored clients."""
    some = min(config.eval.clients or len(partition.clients), len(partition.clients))
    text = partition.table(most=20)
    if some < len(partition.clients):
        text += (
            f"\n{some:,} of {len(partition.clients):,} clients are scored (eval.clients); export "
            "the model of any other client with: fedvlm export --client NAME"
        )
    return text


def means(line: dict[str, Any], config: Config) -> dict[str, float]:
    """The mean scores of the personal and of the global models; empty without an evaluation."""
    found = line["evaluation"]
    if not found or not found["personal"]:
        return {}
    return {
        model: summarize({c: s[config.metric] for c, s in found[model].items()})["mean"]
        for model in ("personal", "global")
    }


def describe(line: dict[str, Any], config: Config) -> str:
    """A metrics line as text."""
    rounds, metric = line.get("stopped", config.train.rounds), config.metric
    number = line["round"]
    last = "local tuning" if config.train.tuning else "average"
    head = f"round {number:>3}/{rounds}" if number <= rounds else f"{last:<13}"
    parts = []
    if losses := line.get("train_loss"):
        parts.append(
            f"{counted(len(losses), 'client')}, loss {sum(losses.values()) / len(losses):.3f}"
        )
    if scores := means(line, config):
        parts += [f"{model} {mean:.1%}" for model, mean in scores.items()]
        parts[-1] += f" {METRICS[metric].head}" + ("" if number else ", before any training")
    if "epsilon" in line:
        parts.append(f"epsilon {line['epsilon']:.3g}")
    if summed := line.get("secure"):
        parts.append(
            f"void: {summed['void']}"
            if "void" in summed
            else f"{len(summed['clients'])} clients in the secure sum"
            + ("" if summed["loss"] is None else f", loss {summed['loss']:.3f}")
        )
    if rejected := line.get("rejected"):
        parts.append(f"rejected: {', '.join(rejected)}")
    if bounded := line.get("bounded"):
        parts.append(f"shrunk: {', '.join(bounded)}")
    return f"{head}  " + ", ".join(parts)

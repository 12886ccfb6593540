"""The server's part in the secure sums of a run: it asks the sites step by step.

A site that does not answer in a step has dropped out. A step has a limit of time, so a round ends
in any case: with a sum, or void.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from fedvlm.algorithms.base import Algorithm
from fedvlm.deploy.digests import sha256
from fedvlm.deploy.limits import digest_of
from fedvlm.deploy.weights import Limits
from fedvlm.engines.blinded import common, read
from fedvlm.engines.summand import Summand, Summed
from fedvlm.engines.wire import Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.privacy.blind.collector import Collector

STEP = 60.0  # seconds for a step without tensors

Wrong = (KeyError, TypeError, ValueError, AttributeError)
"""Errors from reading an answer that no site of this version sends."""


class Asks(Protocol):
    """The part of :class:`fedvlm.deploy.remote.Remote` that asks the sites."""

    algorithm: Algorithm
    adapter: Tree
    limits: Limits
    claimed: dict[str, float]
    weights: dict[str, float]
    tell: Callable[[dict[str, Any]], None]

    def each(self, sites: Iterable[str], asked: Any, checked: Any = None) -> Iterator[Any]:
        """Sites and their checked answers, in order; a failed site has its error as the answer."""
        ...

    def failed(self, site: str, why: str) -> None:
        """Leaves a site out of the next rounds, because its answer is invalid."""
        ...

    def came(self, site: str) -> None:
        """Forgets the failures of a site, because it has taken part in a round."""
        ...


class Sums:
    """The secure sums of a run.

    Args:
        engine: asks the sites.
        run: the name of the run.
        config: the settings of the run.

    Raises:
        FedVLMError: a site's weight is limited, which a sum cannot do.
    """

    def __init__(self, engine: Asks, run: str, config: Config):
        self._engine, self._run, self._config = engine, run, config
        unit = max(engine.weights.values())
        less = [s for s, w in engine.weights.items() if w < min(engine.claimed[s], unit)]
        if less:
            raise FedVLMError(
                f"the weight of {', '.join(less)} is limited to fewer rows than the site reports "
                "(rows in project.yml), and with wire.secure each site weighs its own upload: "
                "correct the number there, or set wire.secure=false"
            )

    def train(self, due: Mapping[str, Task], blob: bytes) -> Iterator[Reply | Summed]:
        """A round: the replies without uploads, and then the sum.

        Args:
            due: site -> its task.
            blob: the download as bytes, the same for all.
        """
        from fedvlm.privacy.blind.collector import Collector
        from fedvlm.privacy.blind.encoding import HEAD
        from fedvlm.privacy.blind.messages import Context, Void

        down, visit = common(list(due.values())), next(iter(due.values())).visit
        unit = max(task.visit.weight for task in due.values())
        context = Context(
            self._run,
            visit.round,
            time.time_ns() // 1000,
            digest_of(self._config),
            sha256(blob),
            float(unit),
            visit.sampled,
        )
        limit = self._config.wire.max_norm
        summand = Summand(self._engine.algorithm, self._engine.adapter, visit, down, limit)
        collector = Collector(context, HEAD + summand.size, self._engine.limits.min_sites)
        sent = Counter[str]()
        yield from self._trained(due, blob, collector, sent)
        try:
            self._step("share", collector.asks_share, collector.shared, collector, sent)
            self._step("mask", collector.asks_mask, collector.masked, collector, sent)
            self._step("agree", collector.asks_agree, collector.agreed, collector, sent)
            self._step("unmask", collector.asks_unmask, collector.unmasked, collector, sent)
            found = read(self._config, collector, summand, sent)
            if self._config.privacy.local:
                found = replace(found, loss=None)
        except Void as why:
            found = Summed(bytes_up=dict(sent), void=str(why))
        for site in found.clients:
            self._engine.came(site)
        self._report(visit.round, found, collector.odd)
        yield found

    def _trained(
        self, due: Mapping[str, Task], blob: bytes, collector: Collector, sent: Counter[str]
    ) -> Iterator[Reply]:
        """Training, and the keys of the sites."""
        engine, context = self._engine, collector.context
        about = {"attempt": context.attempt, "unit": context.unit}

        def asked(site: str) -> tuple[dict[str, Any], bytes, float]:
            header = {"do": "train", "round": context.round, "sampled": context.sampled}
            return {**header, "blind": about}, blob, engine.limits.train_s

        for site, answer in engine.each(list(due), asked, _timed):
            if isinstance(answer, Exception):
                continue
            header, _, seconds = answer
            try:
                there = float(header.get("seconds", 0.0))
                collector.advertised(site, header["keys"])
            except Wrong as wrong:
                engine.failed(site, f"its keys are refused: {wrong}")
                continue
            sent[site] += len(json.dumps(header["keys"]))
            event = {"event": "trained", "site": site, "round": context.round, "loss": None}
            took = {"seconds": round(seconds, 3), "seconds_there": there}
            engine.tell({**event, "bytes_up": sent[site], **took})
            yield Reply(site, {}, engine.weights[site], float("nan"))

    def _step(
        self,
        step: str,
        asks: Callable[[], dict[str, Any]],
        take: Callable[..., None],
        collector: Collector,
        sent: Counter[str],
    ) -> None:
        """One step: asks all sites that are still there, and takes their answers."""
        engine, context = self._engine, collector.context
        messages = asks()
        about = {"do": "blind", "step": step, "round": context.round, "attempt": context.attempt}
        limit = engine.limits.train_s if step == "mask" else STEP

        def asked(site: str) -> tuple[dict[str, Any], bytes, float]:
            return {**about, "message": messages[site]}, b"", limit

        for site, answer in engine.each(list(messages), asked, _timed):
            if isinstance(answer, Exception):
                continue
            header, blob, _ = answer
            told = {name: value for name, value in header.items() if name not in ("id", "number")}
            try:
                take(site, told, *([blob] if step == "mask" else []))
            except Wrong as wrong:
                engine.failed(site, f"its answer to '{step}' is refused: {wrong}")
                continue
            sent[site] += len(blob) + len(json.dumps(told))

    def _report(self, round_: int, found: Summed, odd: list[str]) -> None:
        if found.void:
            self._engine.tell({"event": "void", "round": round_, "why": found.void})
        else:
            about = {"sites": list(found.clients), "loss": found.loss, "odd": odd}
            self._engine.tell({"event": "summed", "round": round_, **about})


def _timed(site: str, header: dict[str, Any], blob: bytes, seconds: float) -> Any:
    return header, blob, seconds

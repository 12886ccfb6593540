"""An engine whose clients are other machines: it asks the sites, and checks their answers.

:mod:`fedvlm.deploy.nvflare.server` provides the transport. A site that does not answer, or gives an
invalid answer, is left out of the round, and after several failures also of following rounds. The
replies come in the order of the cohort, so that sums are bit-identical whichever site is first. A
site keeps the tensors of its answer until the server fetches them. At most ``at_once`` sites are at
work or wait to be fetched, and the server holds at most ``held`` answers.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.table import of_run
from fedvlm.deploy.blind import Sums
from fedvlm.deploy.downloads import Written
from fedvlm.deploy.unanswered import Bench, Declined, Exhausted, Gone, Unanswered
from fedvlm.deploy.weights import Limits as Limits
from fedvlm.deploy.weights import described, weighed
from fedvlm.engines.base import Answer, Models, Scores
from fedvlm.engines.compress import compression
from fedvlm.engines.stages import Stage
from fedvlm.engines.summand import Summed
from fedvlm.engines.wire import Reply, Task
from fedvlm.errors import FedVLMError
from fedvlm.metrics import measured
from fedvlm.privacy.blind.messages import LEAST
from fedvlm.settings.sections import Config
from fedvlm.store.files import save_tree
from fedvlm.tree import Tree, digest, read
from fedvlm.version import __version__

Call = Callable[[str, dict[str, Any], bytes, float], tuple[dict[str, Any], bytes]]
"""``(site, header, tensors, seconds) -> (header, tensors)``; raises :class:`Unanswered`.

The tensors may be left for a second call. Then the header has ``kept``, the number to fetch.
"""

PING = 5.0  # seconds for a site that failed to report that it is back
AGAIN = 4  # more questions for a site that is gone in the last step of a run
PAUSE = 10.0  # seconds before each of them
FETCH = 60.0  # least seconds for fetching the tensors of an answer, even after a slow answer

MALFORMED = (KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""Errors from reading a malformed answer, such as a number of 400 digits or deeply nested lists."""


class Remote:
    """The server's side of :class:`fedvlm.engines.base.Engine`.

    Args:
        call: asks one site.
        sites: the names of the sites, which are the names of the clients.
        limits: limits of time, size and number.
        tell: called with every event at the sites.

    Attributes:
        claimed: client -> the number of its training rows, as it reports. If any site does not
            report its rows, all numbers are 1.
        weights: client -> its weight in a mean: its claim, within the server's limits.
        rows: client -> its numbers of train, val and test rows, for sites that report them.
    """

    secure = True

    def __init__(
        self,
        call: Call,
        sites: Sequence[str],
        limits: Limits | None = None,
        tell: Callable[[dict[str, Any]], None] = lambda event: None,
    ):
        self._call, self.limits, self.tell = call, limits or Limits(), tell
        self.sites = tuple(sites)
        self.adapter: Tree = {}
        self.algorithm: Algorithm
        self.stages: tuple[Stage, ...] = ()
        self.claimed: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.rows: dict[str, dict[str, int]] = {}
        self._peft: dict[str, Any] = {}
        self._measured: set[str] = set()
        self._private = False  # the sites tell no losses and no scores
        self._bench = {site: Bench() for site in sites}
        self._round = 0
        self._sums: Sums | None = None

    def open(self, run: str, config: Config, *, known: Mapping[str, float] | None = None) -> None:
        """Lets the sites load data and model.

        Args:
            run: the name of the run's state at the sites.
            config: the run's settings.
            known: for a resumed run: client -> the number of rows that it claimed.

        Raises:
            FedVLMError: too few sites can take part, or the sites have changed.
        """
        asked = {"do": "open", "run": run, "config": as_sent(config), "fedvlm": __version__}
        self.algorithm = of_run(config)
        self.stages = compression(config.wire)
        self._measured = measured(config.objective.name)
        self._private = config.privacy.local
        found: dict[str, dict[str, Any]] = {}
        opened = self.each(
            self.sites,
            lambda s: (asked, b"", self.limits.open_s),
            lambda s, about, *_: described(about),
        )
        for site, outcome in opened:
            if not isinstance(outcome, Unanswered):
                found[site] = outcome
                self.tell({**outcome, "event": "opened", "site": site})
        self._enough(len(found), "could open the run")
        self._agree(found)
        self.rows = {s: about["rows"] for s, about in found.items() if "rows" in about}
        told = len(self.rows) == len(found)
        claims = {s: float(self.rows[s]["train"]) if told else 1.0 for s in found}
        self.claimed = claims if known is None else dict(known)
        changed = sorted(s for s, n in claims.items() if self.claimed.get(s) != n)
        if changed:
            raise FedVLMError(
                f"the rows of {', '.join(changed)} have changed since the run began: restore them, "
                "or start a new run"
            )
        self.weights = weighed(self.claimed, self.limits, self.tell)
        self.sites = tuple(self.weights)
        self._bench = {site: self._bench.get(site, Bench()) for site in self.sites}
        self._sums = Sums(self, run, config) if config.wire.secure else None

    def _agree(self, found: dict[str, dict[str, Any]]) -> None:
        """Fetches the initial adapter from one site, and checks that all sites have the same."""
        for site in list(found):
            try:
                about, blob = self._ask(site, {"do": "adapter"}, b"", self.limits.open_s)
                about, blob = self._fetched(site, about, blob, self.limits.open_s)
                self.adapter, self._peft = self._read(blob), dict(about["peft"])
                break
            except (Unanswered, *MALFORMED) as wrong:
                error = wrong if isinstance(wrong, Unanswered) else _uncounted(wrong)
                self._failed(site, error)
                found.pop(site)
        self._enough(len(found), "gave their initial adapter")
        own = digest(self.adapter)
        odd = sorted(site for site, about in found.items() if about["adapter"] != own)
        if odd:
            raise FedVLMError(
                f"{', '.join(odd)}: the initial adapter differs from that of the other sites; all "
                "sites need the same model and the same versions of the packages"
            )

    # -- the protocol

    def train(self, tasks: Sequence[Task]) -> Iterator[Reply | Summed]:
        self._round = tasks[0].round if tasks else self._round
        due = {t.client: t for t in tasks if self._bench[t.client].until <= self._round}
        least = max(self.limits.min_sites, LEAST if self._sums else 1)
        if len(due) < least:  # ask all sites rather than end the run
            due = {t.client: t for t in tasks}
        for site in (t.client for t in tasks if t.client not in due):
            self.tell({"event": "benched", "site": site, "round": self._round})
        count, exhausted, written = 0, 0, Written()
        if self._sums:
            yield from self._sums.train(due, written(tasks[0].down))
            left = sum(bench.until <= self._round for bench in self._bench.values())
            return self._enough(left, f"are left in round {self._round}")

        def asked(site: str) -> tuple[dict[str, Any], bytes, float]:
            sampled = due[site].visit.sampled
            header = {"do": "train", "round": self._round, "sampled": sampled}
            return header, written(due[site].down), self.limits.train_s

        for site, outcome in self.each(list(due), asked, self._arrived(due)):
            exhausted += isinstance(outcome, Exhausted)
            if not isinstance(outcome, Unanswered):
                self.came(site)
                count += 1
                yield outcome
        if exhausted < max(1, len(due)):  # else nobody trains any more, and the run can end
            self._enough(count, f"finished round {self._round}")

    def score(self, models: Models) -> dict[str, Scores]:
        """Scores by site; empty under differential privacy, where no score leaves a site."""
        if self._private:
            deque(models.downs, maxlen=0)  # the iteration is what trains the cohort
            return {}

        def checked(site: str, header: dict[str, Any], blob: bytes, seconds: float) -> Scores:
            scores = header.get("scores")
            if not isinstance(scores, dict) or not scores:
                raise Unanswered("it sent no scores")
            if scores.keys() - {"examples"} != self._measured:
                raise Unanswered(f"its scores are {sorted(scores)}"[:500])
            if not all(math.isfinite(value) for value in scores.values()):
                raise Unanswered("its scores are not finite")
            whole = {"examples": int}
            return {n: whole.get(n, float)(value) for n, value in scores.items()}

        found = self._about(models, {"do": "score"}, checked)
        return {site: scores for site, scores in found if not isinstance(scores, Unanswered)}

    def answer(self, name: str, models: Models) -> dict[str, list[Answer]]:
        """Lets the sites write answers to their own folders; the answers stay there."""
        list(self._about(models, {"do": "answer", "name": name}))
        return {}

    def validate(self, models: Models) -> dict[str, float]:
        """Empty: no site is asked for losses on its validation rows."""
        return {}

    def export(self, models: Models, folders: Mapping[str, Path]) -> None:
        """Writes the global model here; the sites write personal models, which stay there."""
        if models.kind == "global":
            for visit, down in models.downs:
                tree, folder = self.algorithm.model(self.adapter, down, {}), folders[visit.client]
                save_tree(folder / "adapter_model.safetensors", tree)
                text = json.dumps(self._peft, indent=2, sort_keys=True)
                (folder / "adapter_config.json").write_text(text + "\n")
        else:
            list(self._about(models, {"do": "export", "name": "personal"}, last=True))

    # -- asking

    def _about(
        self, models: Models, header: dict[str, Any], checked: Any = None, last: bool = False
    ) -> Iterator[Any]:
        """Asks each client about its model; skips sites that are left out for now.

        Where this is the ``last`` question of a run, no site is skipped, and those that are gone
        are asked up to ``AGAIN`` more times, after the others.
        """
        due = {
            visit.client: (visit, down)
            for visit, down in models.downs
            if last or self._bench[visit.client].until <= self._round
        }
        written = Written()

        def asked(site: str) -> tuple[dict[str, Any], bytes, float]:
            visit, down = due[site]
            about = {**header, "kind": models.kind, "round": visit.round}
            return about, written(down), self.limits.score_s

        left = list(due)
        for more in range(AGAIN if last else 0, -1, -1):
            gone = []
            for site, found in self.each(left, asked, checked):
                if more and isinstance(found, Gone):
                    gone.append(site)
                else:
                    yield site, found
            left = gone
            if left:
                time.sleep(PAUSE)

    def _arrived(self, tasks: Mapping[str, Task]) -> Any:
        """The check of every reply to a training request; it gives the reply with its upload."""

        def checked(site: str, header: dict[str, Any], blob: bytes, seconds: float) -> Reply:
            upload, loss = self._read(blob), None
            if not self._private:
                loss = float(header["loss"])
                if not math.isfinite(loss):
                    raise Unanswered(f"its loss is {loss}")
            self.tell(
                {
                    "event": "trained",
                    "site": site,
                    "round": tasks[site].round,
                    **({} if loss is None else {"loss": loss}),
                    "bytes_up": len(blob),
                    "seconds": round(seconds, 3),
                    "seconds_there": float(header.get("seconds", 0.0)),
                }
            )
            return Reply(site, upload, self.weights[site], loss)

        return checked

    def each(self, sites: Iterable[str], asked: Any, checked: Any = None) -> Iterator[Any]:
        """Sites and their checked answers, in order; a failed site has its error as the answer."""
        left = iter(sites)

        def work(site: str, header: dict[str, Any], blob: bytes, limit: float) -> Any:
            began = time.perf_counter()
            if self._bench[site].failures:  # after a failure, do not wait a whole deadline again
                self._ask(site, {"do": "ping"}, b"", PING)
            answer = self._ask(site, header, blob, limit)
            return *answer, limit, time.perf_counter() - began

        def take(site: str, working: Future[Any]) -> Any:
            try:
                header, blob, limit, taken = working.result()
                began = time.perf_counter()
                header, blob = self._fetched(site, header, blob, limit - taken)
                taken += time.perf_counter() - began
                return checked(site, header, blob, taken) if checked else (header, blob)
            except Unanswered as error:
                return error
            except (*MALFORMED, FedVLMError) as error:
                return _uncounted(error)

        most, held = self.limits.at_once, self.limits.held
        with ThreadPoolExecutor(most) as workers, ThreadPoolExecutor(held) as takers:
            working: deque[tuple[str, Future[Any]]] = deque()
            taking: deque[tuple[str, Future[Any]]] = deque()
            while True:
                for site in islice(left, most - len(working) - len(taking)):
                    working.append((site, workers.submit(work, site, *asked(site))))
                while working and len(taking) < held:
                    site, future = working.popleft()
                    taking.append((site, takers.submit(take, site, future)))
                if not taking:
                    return
                site, future = taking.popleft()
                outcome = future.result()
                if isinstance(outcome, Unanswered):
                    self._failed(site, outcome)
                yield site, outcome
                del future, outcome

    def _ask(self, site: str, header: dict[str, Any], blob: bytes, limit: float) -> Any:
        answer, tensors = self._call(site, header, blob, limit)
        if "error" in answer:
            kind = Declined if answer["error"] == "refused" else Unanswered
            kind = Exhausted if kind is Declined and answer.get("spent") is True else kind
            raise kind(f"{answer['error']}: {answer.get('message', '')}"[:2000])
        if len(tensors) > self.limits.max_bytes:
            raise Unanswered(f"{len(tensors)} bytes are more than {self.limits.max_bytes}")
        return answer, tensors

    def _fetched(self, site: str, header: dict[str, Any], blob: bytes, limit: float) -> Any:
        """An answer with its tensors, which are fetched if the site has kept them."""
        if "kept" not in header:
            return header, blob
        fetch = {"do": "fetch", "number": header["kept"]}
        return self._ask(site, fetch, b"", max(FETCH, limit))

    def _read(self, blob: bytes) -> Tree:
        try:
            return read(blob)
        except FedVLMError as error:
            raise Unanswered(str(error)) from None

    def failed(self, site: str, why: str) -> None:
        """Leaves a site out of the next rounds, because its answer is invalid."""
        self._failed(site, Unanswered(why))

    def came(self, site: str) -> None:
        """Forgets the failures of a site, because it has taken part in a round."""
        self._bench[site] = Bench()

    def _failed(self, site: str, error: Unanswered) -> None:
        """Leaves a site out of the next rounds: none after one failure, then 1, 2, 4, at most 8."""
        bench = self._bench[site]
        bench.failures += not isinstance(error, Declined)
        bench.until = self._round + 1 + min(8, 2 ** max(0, bench.failures - 1) // 2)
        if self._sums and isinstance(error, Declined):
            bench.until = self._round  # it refuses a sum, and still gives scores
        self.tell(
            {
                "event": "failed",
                "site": site,
                "round": self._round,
                "why": str(error),
                "gone": isinstance(error, Gone),
                "again_in_round": bench.until,
            }
        )

    def _enough(self, count: int, what: str) -> None:
        if count < self.limits.min_sites:
            how = "fedvlm deploy run --resume RUN" if self._round else "the same command again"
            raise FedVLMError(
                f"{count} of {len(self.sites)} sites {what}, but at least {self.limits.min_sites} "
                f"must (min_sites); the lines above give the reasons. When they are gone: {how}"
            )


def as_sent(config: Config) -> dict[str, Any]:
    """A run's settings without the server's paths; each site replaces them with its own."""
    tree = config.model_dump()
    tree["output"], tree["data"]["path"] = "here", None
    return tree


def _uncounted(error: Exception) -> Unanswered:
    return Unanswered(f"its answer is invalid: {error!r:.500}")

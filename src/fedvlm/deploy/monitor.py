"""What Prometheus reads of a server or a site, by its own client library.

Nothing is sent anywhere: Prometheus asks. The numbers come from the files of the federation
(:mod:`fedvlm.deploy.overview`) and from the audit log of a site, when Prometheus asks.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from fedvlm.deploy import overview
from fedvlm.deploy.auditlog import NAME
from fedvlm.deploy.events import NewLines
from fedvlm.errors import ConfigError, FedVLMError, shown

HOST = "127.0.0.1"
REQUESTS = ("open", "adapter", "train", "score", "answer", "export", "blind", "other")
DECISIONS = ("done", "refused", "failed", "other")


def place(text: str) -> tuple[str, int]:
    """The address and the port in ``PORT`` or ``ADDRESS:PORT``.

    >>> place("9100"), place("[::1]:9100")
    (('127.0.0.1', 9100), ('::1', 9100))

    Raises:
        ConfigError: the text is neither.
    """
    host, colon, port = text.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16 or (colon and not host):
        raise ConfigError(
            [f"metrics: {shown(text)} is no PORT or ADDRESS:PORT, such as 9100 or 127.0.0.1:9100"]
        )
    return host.strip("[]") or HOST, int(port)


def publish(source: Any, where: str) -> tuple[str, int]:
    """Answers Prometheus from threads of this process, until it ends.

    Args:
        source: has ``collect``, see :class:`ServerNumbers`.
        where: ``PORT`` or ``ADDRESS:PORT``.

    Returns:
        The address and the port.

    Raises:
        FedVLMError: the address cannot be used, or Prometheus' library is missing.
    """
    host, port = place(where)
    if find_spec("prometheus_client") is None:
        raise FedVLMError("metrics need Prometheus' library: pip install 'fedvlm[deploy]'")
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry(auto_describe=False)
    registry.register(source)
    try:
        start_http_server(port, host, registry)
    except OSError as error:
        raise FedVLMError(
            f"metrics: {host}:{port} cannot be used ({error.strerror}); choose another port"
        ) from None
    return host, port


class ServerNumbers:
    """The numbers of a federation, as the server's machine knows them.

    Args:
        folder: the federation.
        sites: the sites of the project. A label ``site`` is one of them.
    """

    def __init__(self, folder: Path, sites: list[str]):
        self.folder, self.known = folder, overview.Overview(folder, sites)

    def collect(self) -> Iterator[Any]:
        """All numbers now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        known = self.known.read()
        run, totals = known.run, known.totals

        def gauge(name: str, what: str, *labels: str) -> Any:
            return GaugeMetricFamily(f"fedvlm_{name}", what, labels=labels)

        def counter(name: str, what: str, found: Any, *labels: str) -> Any:
            family = CounterMetricFamily(f"fedvlm_{name}", what, labels=labels)
            for key, value in sorted(found.items()):
                family.add_metric(key, value)
            return family

        connected = gauge("site_connected", "1 if the site is connected", "site")
        seen = gauge("site_last_seen_timestamp_seconds", "Time of its last message", "site")
        trained = gauge("site_round", "Last round whose upload has arrived", "site")
        late = gauge("site_late", "1 if the site works much longer than in its last round", "site")
        now = datetime.now().timestamp()
        for name, site in known.sites.items():
            connected.add_metric([name], float(site.connected))
            late.add_metric([name], float(site.late(now)))
            if site.seen is not None:
                seen.add_metric([name], site.seen)
            if site.trained is not None:
                trained.add_metric([name], site.trained)
        yield from (connected, seen, trained, late)

        state = gauge("run_state", "1 for the state of the newest run", "state")
        for each in overview.STATES:
            state.add_metric([each], float(each == run.state))
        yield state
        last = gauge("run_last_event_timestamp_seconds", "Time of the newest run's last event")
        for family, value in (
            (gauge("run_round", "Last finished round of the newest run"), run.round),
            (gauge("run_rounds_planned", "Rounds of the newest run"), run.planned),
            (gauge("run_epsilon", "Epsilon of the newest run, where it is told"), run.epsilon),
            (last, run.at),
        ):
            if value is not None:
                family.add_metric([], value)
            yield family

        yield counter("rounds", "Finished rounds", {(): totals.rounds})
        yield counter("round_seconds", "Time of finished rounds", {(): totals.round_seconds})
        what = "Rounds in which a site's work did not count"
        none = dict.fromkeys(product(known.sites, overview.REASONS), 0)  # 0 to 1 is an increase
        yield counter("failures", what, none | totals.failures, "site", "reason")
        yield counter("bytes", "Bytes of uploads and downloads", totals.bytes, "site", "way")
        what = "Time of rounds at a site, and of its transfers"
        yield counter("site_seconds", what, totals.seconds, "site", "phase")

        free = gauge("disk_free_bytes", "Free bytes of a disk", "place")
        for name, size in known.free.items():
            free.add_metric([name], size)
        yield free
        end = gauge("certificate_end_timestamp_seconds", "End of a certificate", "certificate")
        for who, when in self._ends().items():
            end.add_metric([who], when.timestamp())
        yield end

    def _ends(self) -> dict[str, datetime]:
        """Who -> the end of its certificate; empty for a folder without a federation."""
        from fedvlm.deploy.nvflare.ending import ends
        from fedvlm.deploy.nvflare.project import PROJECT, read_project

        path = self.folder / PROJECT
        return ends(self.folder, read_project(path)) if path.exists() else {}


class SiteNumbers:
    """The numbers of a site, from its own audit log. They say nothing about rows.

    Args:
        state: the folder of the site's state.
    """

    def __init__(self, state: Path):
        self.state = state
        self._new = NewLines(state / NAME)
        self._answers = Counter(dict.fromkeys(product(REQUESTS, DECISIONS), 0))
        self._bytes: Counter[tuple[str]] = Counter()
        self._last: float | None = None
        self._round: int | None = None

    def collect(self) -> Iterator[Any]:
        """All numbers now."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        self._read()
        answers = CounterMetricFamily(
            "fedvlm_site_answers", "Answers to the server", labels=("request", "decision")
        )
        for answer, number in sorted(self._answers.items()):
            answers.add_metric(answer, number)
        size = CounterMetricFamily("fedvlm_site_bytes", "Bytes of tensors", labels=("way",))
        for way, number in sorted(self._bytes.items()):
            size.add_metric(way, number)
        yield from (answers, size)
        last = "fedvlm_site_last_request_timestamp_seconds"
        for name, what, value in (
            (last, "Time of the server's last request", self._last),
            ("fedvlm_site_trained_round", "Round of the last training", self._round),
            ("fedvlm_site_requests_waiting", "Runs that wait for approval", self._waiting()),
            ("fedvlm_site_disk_free_bytes", "Free bytes", shutil.disk_usage(self.state).free),
            (
                "fedvlm_site_certificate_end_timestamp_seconds",
                "End of the site's certificate",
                _end(self.state / "nvflare" / "startup" / "client.crt"),
            ),
        ):
            family = GaugeMetricFamily(name, what)
            if value is not None:
                family.add_metric([], value)
            yield family

    def _waiting(self) -> int | None:
        """The number of runs that wait for a person; None if that is not known."""
        from fedvlm.deploy.approval import Requests

        try:
            return sum(one.decision == "waiting" for one in Requests(self.state).all())
        except FedVLMError:  # a damaged file, which 'site requests' reports
            return None

    def _read(self) -> None:
        """Reads the new lines of the audit log."""
        for line in self._new():
            if found := _line(line):
                self._note(found)

    def _note(self, line: dict[str, Any]) -> None:
        if line.get("event") == "request":
            self._last = datetime.fromisoformat(line["time"]).timestamp()
            self._bytes[("down",)] += line.get("bytes_down", 0)
        elif line.get("event") == "answer":
            asked, decision = line.get("do"), line.get("decision")
            key = asked if asked in REQUESTS else "other"
            self._answers[key, decision if decision in DECISIONS else "other"] += 1
            self._bytes[("up",)] += line.get("bytes_up", 0)
            if asked == "train" and decision == "done":
                self._round = line.get("round")


def _line(text: bytes) -> dict[str, Any]:
    """A line of an audit log; empty for a torn one, which 'audit-log verify' reports."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _end(path: Path) -> float | None:
    """Seconds since 1970 at which a certificate ends; None without one."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None

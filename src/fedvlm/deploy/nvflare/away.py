"""What a run has lost and may have again: its sites, and the server's process that works on it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

AGAIN = 3  # number of jobs in a row without a finished round that is an error
LOST = 30.0  # seconds without an answer, or without work on the job, until the server is gone


class Away:
    """The sites that are lost. A site that is back may take part in the next job.

    Attributes:
        since: site -> time at which it gave no answer, in seconds since 1970.
    """

    def __init__(self) -> None:
        self.since: dict[str, float] = {}
        self._tried: Counter[str] = Counter()

    def note(self, event: dict[str, Any]) -> None:
        """Takes note of one event of a job."""
        site = event.get("site", "")
        if event["event"] == "failed" and event.get("gone"):
            self.since[site] = event["time"]
        elif event["event"] in ("opened", "trained"):
            self.since.pop(site, None)
        if event["event"] == "trained":
            self._tried.pop(site, None)

    def back(self, clients: Sequence[Any]) -> list[str]:
        """The sites that have connected again. A site is returned ``AGAIN`` times at most.

        A finished training step sets a site's count back to zero.

        Args:
            clients: the clients that NVFlare's server lists, each with ``name`` and
                ``last_connect_time``.
        """
        heard = {client.name: client.last_connect_time or 0 for client in clients}
        found = [site for site, since in self.since.items() if heard.get(site, 0) > since]
        found = [site for site in found if self._tried[site] < AGAIN]
        self._tried.update(found)
        for site in found:
            del self.since[site]
        return found


def held(job: str, status: str, working: Sequence[Any]) -> bool:
    """Whether the server works on a job, or says that the job waits or has ended.

    A server that is killed and started again lists its jobs as running ever after.

    Args:
        job: its id.
        status: what the server says of it.
        working: the jobs that the server works on, each with ``job_id``.
    """
    return status != "RUNNING" or job in {one.job_id for one in working}


class Dropped:
    """Tells when a server no longer works on a job that it lists as running."""

    def __init__(self) -> None:
        self._held = time.monotonic()

    def __call__(self, job: str, status: str, working: Sequence[Any]) -> bool:
        """Whether the job was not :func:`held` for ``LOST`` seconds; the same arguments."""
        if held(job, status, working):
            self._held = time.monotonic()
        return time.monotonic() - self._held > LOST

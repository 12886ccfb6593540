"""Secure aggregation among five sites in processes of their own, killed with SIGKILL in a step.

Each site has the real supervisor, socket, worker and state; its loss is a formula. A process kills
itself when it is asked, or when its answer is ready and has not left. The supervisor starts another
one and asks again, as in a deployed run.
"""

import multiprocessing
import os
import signal
import socket
import subprocess

import pytest

from fedvlm.deploy import worker
from fedvlm.deploy.lifetime import from_lasting_thread
from fedvlm.deploy.supervisor import Supervisor
from fedvlm.store import sealed
from toysites import FIVE, Five, ToyWorker, config, run

pytestmark = pytest.mark.usefixtures("no_pictures")

FORK = multiprocessing.get_context("fork")


class Dying(ToyWorker):
    """Kills its process at a moment, once.

    Attributes:
        fault: the round, the step, the moment (``asked`` or ``ready``) and a file that marks that
            it has happened.
    """

    fault = (0, "", "", None)

    def perform(self, asked, blob):
        round_, step, moment, mark = self.fault
        due = (asked.get("round"), asked.get("step", asked["do"])) == (round_, step)
        due = due and not mark.exists()
        if due:
            mark.touch()
        if due and moment == "asked":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = super().perform(asked, blob)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return answer


class Child:
    """A forked process with the methods of :class:`subprocess.Popen` that a supervisor calls."""

    def __init__(self, target):
        self._process = FORK.Process(target=target, daemon=True)
        self._process.start()
        self.pid, self.kill = self._process.pid, self._process.kill

    def wait(self, seconds):
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", seconds)
        return self._process.exitcode


class Forking(Supervisor):
    """A supervisor whose workers are forks of this process: they need no seconds for imports."""

    fault = Dying.fault

    def _start(self, opens=True):
        from_lasting_thread(self._fork)  # one fork at a time: another child would hold the socket
        if opens and self._opening:
            self._opens_until = float("inf")
            worker.send(self._sock, self._opening, b"")

    def _fork(self):
        self._sock, theirs = socket.socketpair()

        def serve():
            one = Dying(self.own)
            one.fault = self.fault
            worker.serve(theirs, one)

        with theirs:
            self._process = Child(serve)


class Processes(Five):
    """The five sites, each with its supervisor."""

    def __init__(self, state, faults, **policy):
        super().__init__(state, **policy)
        self.supervisors = {site: Forking(own) for site, own in self.own.items()}
        for site, (round_, step, moment) in faults.items():
            self.supervisors[site].fault = (round_, step, moment, state / f"{site}.killed")

    def __call__(self, site, header, blob, limit):
        answer = self.supervisors[site].call(header, blob, 60.0)
        self.seen.append((site, header.get("round"), header.get("step", header["do"]), *answer))
        return answer

    def end(self):
        for supervisor in self.supervisors.values():
            supervisor.end()


@pytest.fixture
def federated(tmp_path):
    """Runs two rounds of sites of which some are killed; returns the sites, lines and events."""
    began = []

    def go(faults, **limits):
        began.append(Processes(tmp_path / "state", faults))
        lines, events = run(began[0], config(), tmp_path / "run", **limits)
        killed = [site for site, one in began[0].supervisors.items() if one.restarts]
        assert killed == sorted(faults), "every fault has happened, once"
        return began[0], lines, events

    yield go
    for sites in began:
        sites.end()


@pytest.mark.parametrize("moment", ["asked", "ready"])
@pytest.mark.parametrize("step", ["train", "share", "mask", "unmask"])
def test_a_killed_site_costs_at_most_its_own_upload(federated, tmp_path, step, moment):
    _, lines, events = federated({"site-2": (1, step, moment)})
    uploaded = step in ("train", "unmask")  # the next process trains again, with fresh keys
    there = [site for site in FIVE if uploaded or site != "site-2"]
    assert [line["secure"]["clients"] for line in lines[1:]] == [there, list(FIVE)]
    failed = [(e["round"], e["site"]) for e in events if e["event"] == "failed"]
    assert failed == ([] if step == "train" else [(1, "site-2")])
    journal = sealed.read(tmp_path / "state/site-2/blind/run-1.json")
    assert journal["round"] == 2


def test_a_masked_upload_that_has_not_left_is_not_sent_under_other_masks(federated, tmp_path):
    """Its journal is written before the answer, so that the next process refuses the round."""
    sites, *_ = federated({"site-2": (1, "mask", "ready")})
    (answer,) = (h for s, r, step, h, _ in sites.seen if (s, r, step) == ("site-2", 1, "mask"))
    assert "they were in memory only" in answer["message"]
    asked = {"do": "train", "round": 1, "sampled": 1.0, "blind": {"attempt": 2**60, "unit": 1.0}}
    again, blob = sites.supervisors["site-2"].call(asked, b"", 60.0)
    assert again["error"] == "refused"
    assert not blob


@pytest.mark.parametrize("moment", ["asked", "ready"])
def test_two_of_five_make_the_round_void_and_the_next_one_has_fresh_keys(federated, moment):
    """'agree' is asked only where a site has dropped out before it."""
    faults = {"site-1": (1, "mask", moment), "site-2": (1, "agree", moment)}
    sites, lines, _ = federated(faults)
    assert "3 sites have confirmed" in lines[1]["secure"]["void"]
    assert lines[2]["secure"]["clients"] == list(FIVE)
    keys = [h["keys"]["mask"] for _, _, step, h, _ in sites.seen if step == "train"]
    assert len(set(keys)) == len(keys) == 10

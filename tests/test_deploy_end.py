"""The last step of a deployed run, in which each site writes its own model."""

import subprocess
import sys

import pytest

from fedvlm.algorithms.base import Visit
from fedvlm.deploy import remote
from fedvlm.deploy.unanswered import Gone, Unanswered
from fedvlm.engines.base import Models

SITES = ("north", "south", "west")


class Sites:
    """Sites of which some are gone for a number of questions.

    Args:
        gone: site -> the number of questions that it does not answer.
    """

    def __init__(self, **gone):
        self.gone, self.wrote = gone, []

    def __call__(self, site, header, blob, limit):
        if self.gone.get(site, 0) > 0:
            self.gone[site] -= 1
            raise Gone("it is away")
        if header["do"] == "export":
            self.wrote.append(site)
        return {}, b""


def ended(sites, **failed):
    """The names of the sites whose failure was told in the last step."""
    told = []
    engine = remote.Remote(sites, SITES, remote.Limits(), told.append)
    for site in failed:
        engine.failed(site, "it failed in the scores just before")
    told.clear()
    engine.export(Models("personal", [(Visit(s, 1.0, round=3), {}) for s in SITES]), {})
    return [event["site"] for event in told]


@pytest.fixture(autouse=True)
def _pause(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.0)


def test_every_site_is_asked_for_its_own_model_whatever_failed_before():
    sites = Sites()
    assert ended(sites, west=True) == []
    assert sorted(sites.wrote) == sorted(SITES)


def test_a_site_that_is_gone_in_the_last_step_is_asked_again():
    sites = Sites(south=remote.AGAIN)
    assert ended(sites) == ["south"] * remote.AGAIN, "each time is told"
    assert sorted(sites.wrote) == sorted(SITES)


def test_a_site_that_stays_away_ends_the_questions():
    sites = Sites(south=100)
    assert set(ended(sites)) == {"south"}
    assert sites.gone["south"] == 100 - remote.AGAIN - 1
    assert sites.wrote == ["north", "west"]


def test_a_site_that_answers_with_an_error_is_not_asked_again():
    class Failing(Sites):
        def __call__(self, site, header, blob, limit):
            if site == "south" and header["do"] == "export":
                raise Unanswered("failed: its disk is full")
            return super().__call__(site, header, blob, limit)

    assert ended(Failing()) == ["south"]


def test_the_commands_at_the_server_do_without_torch():
    """They run for months; torch takes 250 MB of memory."""
    code = "import sys, fedvlm.deploy.remote; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr

"""fedvlm watch: the live page of a run, on the loopback address, for whoever has its address."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import hostile
from fedvlm.deploy.events import events_of
from fedvlm.report.live import page
from fedvlm.report.watch import HOST, Watch
from fedvlm.report.write import html
from fedvlm.rounds import federate
from fedvlm.store.files import append_line
from stopping import Stop


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was stopped in its second round."""
    settings = hostile.settings(tmp_path_factory.mktemp("watch"))
    with pytest.raises(KeyboardInterrupt):
        federate.run(settings, progress=Stop(3))
    return Path(settings["output"])


@pytest.fixture
def served(begun):
    with Watch(begun) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def asked(address, **headers):
    request = urllib.request.Request(address, headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.headers, answer.read().decode()


def test_the_page_has_the_round_and_comes_again(served):
    headers, text = asked(served.address)
    assert '<meta http-equiv="refresh" content="5">' in text
    assert "1 of 2 done" in text
    assert "&lt;/script&gt;&lt;b&gt;x" in text
    assert "<b>x" not in text
    assert headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_only_who_has_the_address_gets_the_page(served):
    home = f"http://{HOST}:{served.server_port}"
    assert served.server_address[0] == "127.0.0.1"
    assert len(served.token) >= 24
    wrong = [
        home,
        f"{home}/",
        f"{home}/{served.token}",
        f"{home}/{'x' * 24}/",
        f"{home}/../../etc/",
    ]
    for address in (*wrong, f"{served.address}?x", f"{served.address}metrics.jsonl"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            asked(address)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        asked(served.address, Host=f"evil.example:{served.server_port}")


def test_two_servers_have_two_addresses(begun):
    with Watch(begun) as one, Watch(begun) as two:
        assert one.token != two.token
        assert one.server_port != two.server_port


def test_a_run_that_ends_turns_into_its_report(begun, tmp_path):
    folder = Path(shutil.copytree(begun.parent, tmp_path / "all")) / "run"
    with Watch(folder) as server:
        assert page(folder).refresh
        federate.resume(folder)
        text = server.content().decode()
        assert 'http-equiv="refresh"' not in text
        assert "Questions and answers" in text
        assert server.content() == text.encode()


def test_a_folder_without_a_run_waits(tmp_path):
    found = page(tmp_path / "none")
    assert found.refresh
    assert "This page waits for it" in html(found)


def test_a_folder_of_runs_is_named(begun):
    assert "holds 1 runs; choose one" in html(page(begun.parent))


def test_a_deployed_run_shows_what_the_server_heard(begun, tmp_path):
    for number, output in enumerate((begun, tmp_path / "other", begun)):
        job = tmp_path / "federation" / "runs" / str(number)
        job.mkdir(parents=True)
        (job / "job.json").write_text(json.dumps({"config": {"output": str(output)}}))
        for site in ("north", "<i>south"):
            event = {"time": 100.0 + number, "event": "trained", "site": site, "round": number}
            append_line(job / "events.jsonl", event | {"bytes_up": 1000 * number})
    job = tmp_path / "federation" / "runs" / "2"
    failed = {"time": 110.0, "event": "failed", "site": "north", "round": 3, "why": "<b>no\x1b[2J"}
    append_line(job / "events.jsonl", failed)
    events = events_of(tmp_path / "federation", begun)
    assert [e["round"] for e in events] == [0, 0, 2, 2, 3]
    text = html(page(begun, events))
    assert "gave no answer, round 3: &lt;b&gt;no\\x1b[2J" in text
    assert "&lt;i&gt;south" in text
    assert "has trained, round 2, 2.0 kB up" in text

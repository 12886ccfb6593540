"""What Prometheus reads: from events as a run writes them, and the names in examples/monitoring."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

pytest.importorskip("prometheus_client", reason="needs Prometheus' library: fedvlm[deploy]")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fedvlm.cli.status import screen
from fedvlm.deploy import monitor
from fedvlm.deploy.auditlog import AuditLog
from fedvlm.deploy.overview import REASONS, Overview
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.store import files
from test_cli import call

SITES = ["north", "south", "west"]
EXAMPLES = Path(__file__).parents[1] / "examples" / "monitoring"
EVIL = '\x1b[2J[red]x"} 1\nfedvlm_evil{a="b"'
ROUND = {"event": "round", "seconds": 5.0, "bytes_up": {"north": 10}, "bytes_down": {"north": 20}}


@pytest.fixture
def home(tmp_path):
    """A federation whose first run is done, and whose second one is in its second round."""
    now = time.time()
    (tmp_path / "server").mkdir()
    files.write_text(tmp_path / "admitted.json", json.dumps({"sites": {"north": ["k"]}}))
    heard = {"north": {"connected": True, "seen": now - 3}, "admin@x": {"connected": True}}
    heard |= {"west": {"connected": True, "seen": now - 500}}
    seen = {"written": now, "sites": heard}
    files.write_text(tmp_path / "server" / "seen.json", json.dumps(seen))
    for number, resume in (("1", False), ("2", False)):
        config = {"output": f"/runs/{number}", "train": {"rounds": 9, "clients_per_round": None}}
        job = {"config": config, "resume": resume, "run": number}
        files.write_text(tmp_path / "runs" / number / "job.json", json.dumps(job))
    first, second = (tmp_path / "runs" / n / "events.jsonl" for n in "12")
    for event in ({"event": "begun", "sites": SITES}, ROUND | {"round": 1}, {"event": "done"}):
        files.append_line(first, {"time": now - 900, **event})
    trained = {"event": "trained", "round": 1, "seconds": 4.0, "seconds_there": 3.0, "bytes_up": 9}
    for event in (
        {"event": "begun", "sites": SITES},
        trained | {"site": "north"},
        trained | {"site": "south"},
        {"event": "rejected", "site": "west", "round": 1, "why": f"it {EVIL} is not finite"},
        {"event": "failed", "site": EVIL, "round": 1, "why": EVIL, "gone": False},
        ROUND | {"round": 1, "epsilon": 1.5},
        {"event": "failed", "site": "south", "round": 2, "why": f"refused: {EVIL}", "gone": False},
    ):
        files.append_line(second, {"time": now - 60, **event})
    return tmp_path


def exported(source):
    registry = CollectorRegistry(auto_describe=False)
    registry.register(source)
    return generate_latest(registry).decode()


def values(text):
    """(name, *labels by their names) -> value."""
    return {
        (s.name, *s.labels.values()): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_prometheus_reads_the_state_of_all_runs_and_of_the_newest_one(home):
    found = values(exported(monitor.ServerNumbers(home, SITES)))
    assert found["fedvlm_run_state", "running"] == 1
    assert found["fedvlm_run_round",] == 1
    assert found["fedvlm_run_rounds_planned",] == 9
    assert found["fedvlm_run_epsilon",] == 1.5
    assert found["fedvlm_rounds_total",] == 2, "of both runs"
    assert found["fedvlm_bytes_total", "north", "down"] == 40
    assert found["fedvlm_failures_total", "not_finite", "west"] == 1
    assert found["fedvlm_failures_total", "refused", "south"] == 1
    assert found["fedvlm_failures_total", "too_large", "west"] == 0, "the first one is an increase"
    assert found["fedvlm_site_seconds_total", "training", "north"] == 3
    assert found["fedvlm_site_connected", "north"] == 1
    assert found["fedvlm_site_connected", "west"] == 0, "a connection without a heartbeat"
    assert found["fedvlm_site_late", "north"] == 1, "60 s are more than twice 4 s and 10 s"
    assert found["fedvlm_disk_free_bytes", "federation"] > 0


def test_only_new_lines_are_read_and_a_dead_server_has_no_sites(home):
    known = Overview(home, SITES)
    assert known.read().read().totals.rounds == 2
    files.append_line(home / "runs" / "2" / "events.jsonl", ROUND | {"round": 2, "time": 1.0})
    assert known.read().totals.rounds == 3
    path = home / "server" / "seen.json"
    old = json.loads(path.read_text()) | {"written": time.time() - 60}
    path.write_text(json.dumps(old))
    assert not known.read().sites["north"].connected


def test_text_of_a_site_is_neither_a_label_nor_a_line_nor_markup(home):
    from rich.console import Console

    text = exported(monitor.ServerNumbers(home, SITES))
    assert "evil" not in text
    found = [labels for labels in values(text) if labels[0] == "fedvlm_failures_total"]
    assert {(site in SITES, reason in REASONS) for _, reason, site in found} == {(True, True)}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(screen(Overview(home, SITES)))
    shown = console.export_text()
    assert "refused: refused:" in shown
    assert "[red]x" in shown, "shown as it was written"
    assert "\x1b" not in shown
    assert "LATE, working for 60 s" in shown
    assert "1 of 9 rounds done" in shown


def test_the_screen_is_shown_until_ctrl_c(home, capsys, monkeypatch):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    shown = []

    def ctrl_c(seconds):
        shown.append(seconds)
        if len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("fedvlm.cli.status.time.sleep", ctrl_c)
    files.write_text(home / "project.yml", f"server: {{address: h}}\nsites: {SITES}")
    code, out, _ = call(capsys, monkeypatch, "deploy", "status", "--watch", "-f", str(home))
    assert code == 0
    assert "/runs/2: running, 1 of 9 rounds done" in out
    assert all(site in out for site in SITES)


def test_a_site_tells_its_own_prometheus_what_it_has_answered(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", site="north")
    source = monitor.SiteNumbers(tmp_path)
    assert values(exported(source))["fedvlm_site_requests_waiting",] == 0
    log.note("request", do="train", round=3, bytes_down=5)
    log.note("answer", do="train", round=3, decision="done", bytes_up=7)
    log.note("answer", do=EVIL, decision=EVIL, bytes_up=0)
    with open(tmp_path / "audit.jsonl", "ab") as file:
        file.write(b'{"torn')
    text = exported(source)
    found = values(text)
    assert "evil" not in text
    assert found["fedvlm_site_answers_total", "done", "train"] == 1
    assert found["fedvlm_site_answers_total", "other", "other"] == 1
    assert found["fedvlm_site_answers_total", "failed", "train"] == 0
    assert (found["fedvlm_site_bytes_total", "up"], found["fedvlm_site_trained_round",]) == (7, 3)


def test_prometheus_asks_on_the_loopback_address_unless_another_is_given(home):
    from fedvlm.deploy.nvflare.demo import free_ports

    (port,) = free_ports(1)
    source = monitor.ServerNumbers(home, SITES)
    assert monitor.publish(source, str(port)) == ("127.0.0.1", port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert b'fedvlm_site_connected{site="north"} 1.0' in answer.read()
    with pytest.raises(FedVLMError, match="choose another port"):
        monitor.publish(source, str(port))
    for wrong in ("", "x", ":9100", "9" * 6, "a:b"):
        with pytest.raises(ConfigError, match="is no PORT or ADDRESS:PORT"):
            monitor.place(wrong)


def queries():
    """All queries of the dashboard."""
    panels = json.loads((EXAMPLES / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_examples_name_only_what_fedvlm_exports(home, tmp_path):
    names = {key[0] for key in values(exported(monitor.ServerNumbers(home, SITES)))}
    (site := tmp_path / "site").mkdir()
    kit = site / "nvflare" / "startup"
    log = AuditLog(site / "audit.jsonl")
    log.note("request", do="train", bytes_down=1)
    log.note("answer", do="train", decision="done", round=1, bytes_up=1)
    names |= {key[0] for key in values(exported(monitor.SiteNumbers(site)))}
    ends = {f"fedvlm_{who}certificate_end_timestamp_seconds" for who in ("", "site_")}
    assert not kit.exists(), "there is no certificate here, so that both ends are missing"
    names |= ends
    rules = yaml.safe_load((EXAMPLES / "alerts.yml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    used = set(re.findall(r"\bfedvlm_\w+", " ".join(alerts + queries())))
    assert len(used) > 15
    assert used <= names, used - names
    unused = {n for n in names if n.endswith("_total") or "_created" in n} - used
    assert not [n for n in unused if n.endswith("_total")], "every counter is drawn or watched"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt: prometheus)")
def test_prometheus_accepts_the_rules_and_the_numbers(home):
    done = subprocess.run(
        ["promtool", "check", "config", EXAMPLES / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = exported(monitor.ServerNumbers(home, SITES))
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (apt: prometheus)")
def test_every_query_of_the_dashboard_has_an_answer_from_prometheus(home, tmp_path):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    from fedvlm.deploy.nvflare.demo import free_ports, loopback
    from fedvlm.deploy.nvflare.project import provision

    provision(loopback(SITES), home)  # its certificates
    log = AuditLog(tmp_path / "site" / "audit.jsonl")
    log.note("request", do="train", bytes_down=1)
    log.note("answer", do="train", decision="done", round=1, bytes_up=1)
    *ports, own = free_ports(3)
    sources = (monitor.ServerNumbers(home, SITES), monitor.SiteNumbers(tmp_path / "site"))
    for source, port in zip(sources, ports, strict=True):
        monitor.publish(source, str(port))
    targets = [{"targets": [f"127.0.0.1:{port}" for port in ports]}]
    asked = {"job_name": "fedvlm", "scrape_interval": "1s", "static_configs": targets}
    files.write_text(tmp_path / "asked.yml", json.dumps({"scrape_configs": [asked]}))
    command = ["prometheus", f"--config.file={tmp_path / 'asked.yml'}"]
    command += [f"--storage.tsdb.path={tmp_path / 'kept'}", f"--web.listen-address=127.0.0.1:{own}"]
    events = home / "runs" / "2" / "events.jsonl"
    late = {"event": "failed", "site": "west", "round": 2, "why": "no answer", "gone": True}
    left, until = queries(), time.monotonic() + 60
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while left and time.monotonic() < until:
                time.sleep(0.5)
                log.note("answer", do="train", decision="done", round=1, bytes_up=1)
                files.append_line(events, {"time": time.time(), **late})
                left = [query for query in left if not answered(own, query)]
        finally:
            process.terminate()
    assert not left


def answered(port, query):
    """Whether Prometheus has numbers for a query."""
    words = urllib.parse.urlencode({"query": query})
    address = f"http://127.0.0.1:{port}/api/v1/query?{words}"
    try:
        with urllib.request.urlopen(address, timeout=10) as answer:
            return bool(json.load(answer)["data"]["result"])
    except OSError:  # it has not started yet
        return False

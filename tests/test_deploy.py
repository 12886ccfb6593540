"""A deployed run of real processes with mutual TLS, and the commands around it."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fedvlm.algorithms.ending import without
from fedvlm.config import load
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.rounds import federate
from fedvlm.store import files
from test_cli import call

pytestmark = pytest.mark.waits("machines")
needed = pytest.mark.skipif(
    find_spec("nvflare") is None, reason="needs NVFlare: pip install 'fedvlm[deploy]'"
)
SITES = ("north", "south", "west")
SMALL = ("train.rounds=2", "eval.max_new_tokens=4")
EXACT = "model.dtype=float64"  # in single precision AdamW amplifies rounding errors


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder and the output of a small ``fedvlm deploy demo``."""
    folder = tmp_path_factory.mktemp("deploy") / "demo"
    command = [sys.executable, "-m", "fedvlm", "deploy", "demo", "--to", str(folder), *SMALL, EXACT]
    paths = [str(Path(federate.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def state(folder, site):
    (found,) = (folder / "sites" / site / "runs").iterdir()
    return found


@needed
def test_a_deployed_run_has_the_adapters_and_scores_of_one_process(demo, tmp_path):
    folder, _ = demo
    settings = load(folder / "run" / "config.yaml", f"output={tmp_path / 'run'}")
    here = federate.run(settings)
    there = json.loads((folder / "run" / "table.json").read_text())
    for model in ("untuned", "global", "personal"):
        for site in SITES:
            theirs = there["models"][model]["clients"][site]
            mine = here.table["models"][model]["clients"][site]
            assert theirs == pytest.approx(mine, abs=0.005 + 1e-4), "sites round to 0.01"
    pairs = [(here.adapter(), folder / "run" / "adapters" / "global")]
    pairs += [(here.adapter(s), state(folder, s) / "adapters" / "personal") for s in SITES]
    for mine, theirs in pairs:
        a, b = (files.load_tree(f / "adapter_model.safetensors") for f in (mine, theirs))
        assert max((a[n] - b[n]).abs().max() for n in a) <= 1e-7


@needed
def test_what_is_personal_is_at_the_sites_only(demo):
    folder, said = demo
    at_server = [p for part in ("run", "federation") for p in (folder / part).rglob("*")]
    assert not [p for p in at_server if "personal" in p.name or p.parent.name == "answers"]
    for site in SITES:
        kept = state(folder, site)
        mine = files.load_tree(kept / "rounds" / "00002" / "mine.safetensors")
        assert all(".lora_A." in name for name in without(mine))
        assert (kept / "answers" / "personal.jsonl").exists()
    assert "personal adapters and all answers stay at the sites" in said


@needed
def test_the_run_can_be_followed(demo):
    _, said = demo
    for part in ("north: connected", "west: ready", "south: round 2, loss", "round 2 done"):
        assert part in said


@needed
def test_the_run_has_a_report_without_rows(demo):
    folder, said = demo
    report = folder / "run" / "report.html"
    assert f"report: {report}" in said
    text = report.read_text(encoding="utf-8")
    assert "The rows of a deployed run never leave the sites" in text
    assert "Numbers of rows that the sites report" in text
    assert "data:image" not in text


@needed
def test_a_site_allows_one_class_and_no_code(demo):
    folder, _ = demo
    kit = folder / "sites" / "north" / "nvflare"
    resources = json.loads((kit / "local" / "resources.json").read_text())
    text = (kit / "local" / "authorization.json").read_text()
    rights = json.loads(text)["permissions"]["project_admin"]
    names = [path.name for part in ("startup", "local") for path in (kit / part).iterdir()]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert [c for c in resources["class_allow_list"] if c.startswith("fedvlm")] == [
        "fedvlm.deploy.nvflare.client.Client"
    ]
    assert rights["byoc"] == rights["shell_commands"] == "none"
    assert not [n for n in names if n.endswith(".sh") or "server" in n]
    mode = (kit / "startup" / "client.key").stat().st_mode
    assert mode & 0o077 == 0, "only its owner may read the key"


@needed
def test_the_servers_files_tell_the_state_of_the_run(demo):
    from fedvlm.deploy.overview import Overview

    folder, _ = demo
    known = Overview(folder / "federation", list(SITES)).read()
    table = json.loads((folder / "run" / "table.json").read_text())
    assert (known.run.state, known.run.output) == ("done", str(folder / "run"))
    assert known.run.planned == 2 <= known.run.round
    for way in ("up", "down"):
        total = sum(known.totals.bytes[site, way] for site in SITES)
        assert total == table["bytes"][f"bytes_{way}"]["total"] > 0
    for site in known.sites.values():
        assert site.admitted
        assert site.trained >= 2
        assert known.run.at - 60 < site.seen < known.run.at + 60, "the gate has noted heartbeats"
        assert known.totals.seconds[site.name, "training"] > 0


@needed
def test_logs_are_json_lines_with_run_and_round_and_without_rows(demo):
    import pandas

    folder, _ = demo
    (about,) = (folder / "run").glob("sites.json")
    run = json.loads(about.read_text())["run"]
    texts, pictures = set(), []
    for site in SITES:
        rows = pandas.read_parquet(folder / "data" / f"{site}.parquet")
        texts |= {t for t in [*rows["question"], *rows["chosen"]] if len(t) > 12}
        pictures += [picture["bytes"][-64:] for picture in rows["image"]]
        lines = files.read_lines(folder / "sites" / site / "site.log")
        assert {"time", "level", "run", "round", "message"} == set(lines[-1])
        assert {line["run"] for line in lines} == {run}
        assert {line["round"] for line in lines} >= {1, 2}
    events = files.read_lines(next((folder / "federation" / "runs").glob("*/events.jsonl")))
    assert {event["run"] for event in events} == {run}
    assert [event["round"] for event in events] == sorted(event["round"] for event in events)
    pieces = [text.encode() for text in texts] + pictures
    assert len(texts) > 5
    written = [p for p in folder.rglob("*") if p.is_file() and _is_log(p)]
    assert len(written) > 15
    assert not [(p, piece) for p in written for piece in pieces if piece in p.read_bytes()]
    answers = state(folder, "north") / "answers" / "personal.jsonl"
    assert any(text in answers.read_text() for text in texts), "the search finds what is there"


def _is_log(path):
    kinds = (".log", "log.txt", "log.json", "events.jsonl", "audit.jsonl", "metrics.jsonl")
    return path.name.endswith(kinds) and path.stat().st_size > 0


PROJECTS = {
    "sites: [a]": "server: it is required",
    "server: {address: 10.0.0.1}\nsites: [a]": "a host name",
    "server: {address: h}\nsites: [a, a]": "named twice",
    "server: {address: h}\nsites: ['a b']": "is no name for a site",
    "server: {address: h, prot: 1}\nsites: [a]": "server.prot",
}


@pytest.mark.parametrize("text", PROJECTS)
def test_a_wrong_project_says_what_is_wrong(text, tmp_path):
    from fedvlm.deploy.nvflare.project import read_project

    (tmp_path / "project.yml").write_text(text)
    with pytest.raises(ConfigError, match=PROJECTS[text]):
        read_project(tmp_path / "project.yml")


@needed
def test_mistakes_are_one_message_and_exit_code_2(tmp_path, capsys, monkeypatch):
    for words, said in (
        (("deploy", "init", "no.yml"), "cannot be read"),
        (("deploy", "server", "-f", str(tmp_path)), "holds no federation"),
        (("deploy", "run", "-f", str(tmp_path)), "holds no federation"),
        (("deploy", "run", "--resume", str(tmp_path)), "no deployed run"),
        (("site", "start", "--data", "x", "--state", "s"), "there is no such file"),
        (
            ("site", "start", "--data", str(tmp_path), "--state", str(tmp_path / "s")),
            "has joined no federation",
        ),
    ):
        code, _, errors = call(capsys, monkeypatch, *words)
        assert code == 2
        assert said in errors
        assert "Traceback" not in errors


def test_without_nvflare_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("fedvlm.cli.options.find_spec", lambda name: None)
    code, _, errors = call(capsys, monkeypatch, "deploy", "status")
    assert code == 2
    assert "pip install 'fedvlm[deploy]'" in errors


def test_pooled_algorithms_are_refused_before_anything_is_sent(tmp_path):
    pytest.importorskip("nvflare", reason="needs NVFlare: pip install 'fedvlm[deploy]'")
    from fedvlm.deploy.nvflare.federation import check

    with pytest.raises(FedVLMError, match="all rows in one place"):
        check(load({"algorithm": {"name": "centralized"}, "output": str(tmp_path / "r")}), False)


@needed
def test_a_finished_or_a_lost_job_does_not_block_a_run(tmp_path):
    from fedvlm.deploy.nvflare.federation import Federation

    class Session:
        alive = ("j1",)

        def list_jobs(self):
            return [{"job_id": "j1", "status": "RUNNING"}]

        def get_system_info(self):
            return SimpleNamespace(job_info=[SimpleNamespace(job_id=job) for job in self.alive])

    (tmp_path / "server").mkdir()
    (tmp_path / "project.yml").write_text("server: {address: h}\nsites: [a]")
    job = tmp_path / "runs" / "1"
    job.mkdir(parents=True)
    (job / "submitted").write_text("j1")
    (job / "job.json").write_text(json.dumps({"config": {"output": "elsewhere"}}))
    files.append_line(job / "events.jsonl", {"event": "round"})
    federation, settings = Federation(tmp_path), load({"output": str(tmp_path / "run")})
    with pytest.raises(FedVLMError, match="j1 is under way"):
        federation._clear(Session(), settings, False)
    Session.alive = ()  # the server that had started it was killed
    federation._clear(Session(), settings, False)
    Session.alive = ("j1",)
    files.append_line(job / "events.jsonl", {"event": "done"})
    federation._clear(Session(), settings, False)


@needed
def test_a_job_that_ends_meanwhile_does_not_keep_another_from_its_end(tmp_path, monkeypatch):
    from contextlib import contextmanager

    from fedvlm.deploy.nvflare.federation import Federation

    alive = ("left", "now")  # not 'lost', whose server was killed

    class Session:
        said = "server internal error: Job left is not running."

        def list_jobs(self):
            return [{"job_id": job, "status": "RUNNING"} for job in ("lost", "left", "now")]

        def get_system_info(self):
            return SimpleNamespace(job_info=[SimpleNamespace(job_id=job) for job in alive])

        def abort_job(self, job):
            assert job in alive
            if job == "left":
                raise RuntimeError(self.said)

    @contextmanager
    def session(self):
        yield Session()

    (tmp_path / "server").mkdir()
    (tmp_path / "project.yml").write_text("server: {address: h}\nsites: [a]")
    monkeypatch.setattr(Federation, "session", session)
    assert Federation(tmp_path).abort() == ["now"]
    Session.said = "no reply"
    with pytest.raises(FedVLMError, match="job left cannot be ended: no reply"):
        Federation(tmp_path).abort()


@needed
def test_a_server_is_gone_only_after_some_time_without_an_answer(tmp_path, monkeypatch):
    from nvflare.fuel.flare_api.flare_api import NoConnection

    from fedvlm.deploy.nvflare import away
    from fedvlm.deploy.nvflare import federation as runs

    class Session:
        def __init__(self, *said):
            self.said = list(said)

        def get_job_meta(self, job):
            if isinstance(answer := self.said.pop(0), Exception):
                raise answer
            return {"status": answer}

        def get_system_info(self):
            return SimpleNamespace(job_info=[], client_info=[])

    (tmp_path / "server").mkdir()
    (tmp_path / "project.yml").write_text("server: {address: h}\nsites: [a]")
    followed = ("j", tmp_path / "events", load({"output": "r"}), runs.Away(), id)
    federation, late = runs.Federation(tmp_path), NoConnection("late")
    monkeypatch.setattr(runs, "ASKED", 0.0)
    session = Session(late, "RUNNING", late, "FINISHED:COMPLETED")
    assert federation._follow(session, *followed) == "FINISHED:COMPLETED"
    monkeypatch.setattr(away, "LOST", -1.0)
    assert federation._follow(Session("SUBMITTED", "RUNNING"), *followed).startswith("ABANDONED")
    for error, patience in ((late, 0.0), (RuntimeError("closed"), 60.0)):
        monkeypatch.setattr(runs, "LOST", patience)
        with pytest.raises(FedVLMError, match="the server is gone"):
            federation._follow(Session(error), *followed)


def test_a_project_is_read_as_it_is_written(tmp_path):
    from fedvlm.deploy.nvflare.project import Project, read_project

    project = Project.model_validate({"server": {"address": "fl.example.org"}, "sites": ["a", "b"]})
    (tmp_path / "p.yml").write_text(yaml.safe_dump(project.model_dump()))
    assert read_project(tmp_path / "p.yml") == project


@needed
def test_a_site_that_reconnects_is_let_in_a_limited_number_of_times():
    from fedvlm.deploy.nvflare.away import AGAIN, Away

    def heard(when):
        return [SimpleNamespace(name="a", last_connect_time=when)]

    away = Away()
    away.note({"event": "failed", "site": "a", "gone": False, "time": 5.0})
    assert not away.since, "the running job asks a site again that still answers"
    for attempt in range(AGAIN):
        away.note({"event": "failed", "site": "a", "gone": True, "time": 10.0})
        assert away.back(heard(9.0)) == [], "the site has not connected since it failed"
        assert away.back(heard(11.0)) == ["a"], attempt
    away.note({"event": "failed", "site": "a", "gone": True, "time": 10.0})
    assert away.back(heard(11.0)) == []
    away.note({"event": "trained", "site": "a"})
    away.note({"event": "failed", "site": "a", "gone": True, "time": 20.0})
    assert away.back(heard(21.0)) == ["a"]


def test_what_a_site_says_does_not_steer_the_terminal():
    from fedvlm.cli.deploy import line, plain

    event = {"event": "failed", "site": "north", "round": 1, "why": "\x1b[2Jno\nround 9 done"}
    assert plain(line(event)) == "  north: FAILED in round 1: ?[2Jno\n    round 9 done"

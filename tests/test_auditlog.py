"""The audit log: every request and answer, each line linked to the one before it."""

import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from typer.testing import CliRunner

from fedvlm.cli.app import app
from fedvlm.config import load
from fedvlm.deploy import auditlog
from fedvlm.deploy.auditlog import AuditLog, verify
from fedvlm.deploy.digests import digest_of, sha256
from fedvlm.deploy.recorded import audited, audited_calls
from fedvlm.deploy.worker import Worker
from fedvlm.errors import FedVLMError
from fedvlm.store import run as store
from fedvlm.store.files import read_lines
from sites import opening


@pytest.fixture
def log(tmp_path):
    """A log of five lines."""
    made = AuditLog(tmp_path / "state" / "audit.jsonl", site="north")
    for number in range(4):
        made.note("request", do="train", round=number)
    return made


def lines(log):
    return log.path.read_bytes().splitlines(keepends=True)


def wrong(log, changed):
    log.path.write_bytes(b"".join(changed))
    with pytest.raises(FedVLMError) as error:
        verify(log.path)
    return str(error.value)


def test_a_whole_log_is_verified_and_begins_with_version_and_site(log):
    found = verify(log.path)
    assert (found.lines, found.torn) == (5, 0)
    assert found.first["site"] == "north"
    assert found.first["version"]
    assert found.last == auditlog.sha256(lines(log)[-1].rstrip())


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_changed_line_is_found_even_the_last_one(log, at):
    text = lines(log)
    text[at] = text[at].replace(b'"time":"2', b'"time":"1')
    assert f"line {at + 1}: it was changed" in wrong(log, text)


def test_a_line_that_was_changed_with_its_own_hash_does_not_fit_the_next_one(log):
    text = lines(log)
    line = json.loads(text[2])
    del line["own"]
    line["round"] = 77
    text[2] = auditlog._bytes({**line, "own": auditlog.sha256(auditlog._bytes(line))}) + b"\n"
    assert "line 4: it does not follow the line before it" in wrong(log, text)


def test_a_dropped_line_is_found(log):
    text = lines(log)
    assert "line 3: lines before it are missing: it has number 3" in wrong(log, text[:2] + text[3:])
    assert "line 1: lines before it are missing" in wrong(log, text[1:])


def test_lines_in_another_order_are_found(log):
    a, b, c, d, e = lines(log)
    assert "line 3: lines before it are missing: it has number 3" in wrong(log, [a, b, d, c, e])
    assert "line 4: it was moved or repeated" in wrong(log, [a, b, c, c, d, e])


def test_a_line_of_other_text_is_found(log):
    a, *rest = lines(log)
    for text in (b"hello\n", b"[]\n", b"\n", b'{"own": 1}\n', b"[" * 10_000 + b"\n", b"\xff\n"):
        assert "line 2: it was changed: it" in wrong(log, [a, text, *rest])


def test_a_missing_end_shows_only_against_a_noted_hash(log):
    noted, text = verify(log.path).last, lines(log)
    log.note("more")
    assert verify(log.path, noted).noted, "the log has grown since"
    log.path.write_bytes(b"".join(text[:-1]))
    assert verify(log.path).lines == 4, "the chain alone does not show it"
    with pytest.raises(FedVLMError, match=r"none has the noted hash .* at the end were removed"):
        verify(log.path, noted)


def test_a_line_cut_short_by_a_kill_is_closed_at_the_next_start(log):
    whole = log.path.read_bytes()
    for end in (1, 30, len(whole.splitlines()[-1]) - 1):
        torn = whole.splitlines()[-1][:end]
        log.path.write_bytes(whole + torn)
        assert verify(log.path).torn == end, "it is no error"
        AuditLog(log.path, site="north").note("started")
        assert verify(log.path).lines == 7
        closed = json.loads(lines(log)[-2])
        assert (closed["event"], closed["bytes"]) == ("torn", end)
        assert closed["sha256"] == auditlog.sha256(torn)


def test_a_first_line_cut_short_is_closed_too(tmp_path):
    (tmp_path / "audit.jsonl").write_bytes(b'{"n":0,"ti')
    AuditLog(tmp_path / "audit.jsonl").note("started")
    assert [line["event"] for line in read_lines(tmp_path / "audit.jsonl")] == [
        "begun",
        "torn",
        "started",
    ]
    verify(tmp_path / "audit.jsonl")


def test_a_process_killed_while_it_writes_leaves_a_log_that_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    code = (
        "import sys; from fedvlm.deploy.auditlog import AuditLog\n"
        "log = AuditLog(sys.argv[1])\n"
        "while True:\n    log.note('request', do='train'); print(flush=True)"
    )
    started = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    for _ in range(30):
        assert started.stdout.readline()
    started.kill()
    started.wait()
    AuditLog(path).note("started")
    assert verify(path).lines >= 32


def test_several_writers_make_one_chain(log):
    def write():
        for number in range(20):
            AuditLog(log.path, site="north").note("request", round=number)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(log.path).lines == 85


def noted_together(log, monkeypatch, synced):
    """Notes five lines of five threads: one is written while the others wait. One is too long."""
    hold, plain, outcomes = threading.Event(), os.fsync, {}
    entered = threading.Event()

    def slow(handle):
        synced.append(handle)
        entered.set()
        assert hold.wait(10)
        plain(handle)

    def note(number):
        facts = {f"k{n}": "x" * 300 for n in range(300)} if number == 4 else {}
        try:
            outcomes[number] = log.note("request", number=number, **facts)
        except FedVLMError as error:
            outcomes[number] = error

    monkeypatch.setattr(os, "fsync", slow)
    threads = [threading.Thread(target=note, args=(number,)) for number in range(5)]
    threads[0].start()
    assert entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    while len(log._waiting) < 4:
        time.sleep(0.01)
    hold.set()
    for thread in threads:
        thread.join()
    return outcomes


def test_lines_that_wait_at_the_same_time_go_to_the_disk_together(log, monkeypatch):
    synced = []
    outcomes = noted_together(log, monkeypatch, synced)
    assert len(synced) == 2, "one for the first line, and one for the four that waited"
    assert isinstance(outcomes.pop(4), FedVLMError), "the line that is too long fails alone"
    written = {json.loads(line).get("number"): auditlog.sha256(line[:-1]) for line in lines(log)}
    assert outcomes == {number: written[number] for number in range(4)}
    verify(log.path)


def test_no_line_that_waited_counts_as_written_when_the_disk_fails(log, monkeypatch):
    failing, real = [], auditlog._append

    def broken(file, texts):
        if failing:
            raise OSError(5, "Input/output error")
        failing.append(True)
        real(file, texts)

    monkeypatch.setattr(auditlog, "_append", broken)
    outcomes = noted_together(log, monkeypatch, [])
    assert isinstance(outcomes.pop(0), str)
    assert all("cannot be written" in str(outcome) for outcome in outcomes.values())
    assert len(outcomes) == 4


def test_every_line_is_on_the_disk_before_the_call_returns(log, monkeypatch):
    synced = []
    plain = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), plain(handle)))
    log.note("request")
    log.note("request")
    assert len(synced) == 2


def test_the_log_is_for_its_owner_only(log):
    assert log.path.stat().st_mode & 0o777 == 0o600
    assert log.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_request_and_its_answer_have_bytes_and_digests_and_no_content(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", site="north")
    asked = {"do": "score", "run": "r", "round": 3, "kind": "end", "secret": "Mrs Smith", "id": 1}
    answer = {"scores": {"loss": 0.5}}, b"tensors"
    assert audited(log, asked, b"down", lambda: answer) == answer
    _, request, done = (json.loads(line) for line in lines(log))
    assert (request["event"], request["do"], request["round"]) == ("request", "score", 3)
    assert (request["bytes_down"], request["sha256_down"]) == (4, auditlog.sha256(b"down"))
    assert (done["event"], done["decision"], done["bytes_up"]) == ("answer", "done", 7)
    assert done["sha256_up"] == auditlog.sha256(b"tensors")
    assert b"Smith" not in log.path.read_bytes()
    assert b"0.5" not in log.path.read_bytes()


def test_a_refusal_is_a_decision_with_its_message(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", site="north")
    refused = {"error": "refused", "message": "the site's policy\x1b[2J refuses " + "x" * 999}, b""
    audited(log, {"do": "open", "run": "r"}, b"", lambda: refused)
    line = json.loads(lines(log)[-1])
    assert line["decision"] == "refused"
    assert line["message"].startswith(r"the site's policy\x1b[2J refuses xxx")
    assert len(line["message"]) <= auditlog.TEXT


def test_a_request_of_odd_values_has_a_line_too(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    odd = {"do": ["x"] * 10**4, "run": "\ud800\n", "round": float("nan"), "kind": 10**400}
    audited(log, odd, b"", lambda: ({}, b""))
    assert verify(log.path).lines == 3


def test_without_a_line_nothing_is_done(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")
    done = []
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FedVLMError, match=r"'audit.jsonl' cannot be written, .* disk is full") as e:
        audited(log, {"do": "train"}, b"", lambda: done.append(1))
    assert not done
    assert str(tmp_path) not in str(e.value)


def test_without_a_line_no_answer_leaves(tmp_path, monkeypatch):
    log = AuditLog(tmp_path / "audit.jsonl")

    def act():
        monkeypatch.setattr(os, "fsync", full)
        return {"loss": 1.0}, b"upload"

    with pytest.raises(FedVLMError, match="cannot be written"):
        audited(log, {"do": "train"}, b"", act)


def test_the_refusals_on_a_full_disk_are_noted_from_the_reserve(log, monkeypatch):
    reserve = log.path.with_name(".audit.jsonl.reserve")
    assert reserve.stat().st_size == auditlog.TAIL
    plain = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: full(handle) if reserve.exists() else plain(handle)
    )
    log.note("answer", decision="failed")
    assert json.loads(lines(log)[-1])["decision"] == "failed"


def full(handle):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_site_notes_every_request_with_the_digests_of_configuration_and_policy(tmp_path):
    (tmp_path / "policy.yml").write_text("algorithms: [lora]")
    own = {"name": "north", "data": "rows.parquet", "state": str(tmp_path / "state")}
    worker = Worker(own | {"policy": str(tmp_path / "policy.yml")})
    config = load({"algorithm": {"name": "plora"}}).model_dump()
    asked = json.loads(json.dumps(opening(config)))
    assert worker.perform(asked, b"")[0]["error"] == "refused"
    assert worker.perform({"do": "train", "round": 1, "sampled": 1.0}, b"x")[0]["error"] == "failed"
    found = read_lines(tmp_path / "state" / "audit.jsonl")
    assert [f.get("decision") for f in found] == [None, None, "refused", None, "failed"]
    assert found[1]["config"] == digest_of(config)
    assert found[1]["policy"] == sha256((tmp_path / "policy.yml").read_bytes())
    assert "algorithm 'plora'" in found[2]["message"]
    assert str(tmp_path) not in (tmp_path / "state" / "audit.jsonl").read_text()
    verify(tmp_path / "state" / "audit.jsonl")


def test_a_site_answers_nothing_that_its_log_does_not_have(tmp_path, monkeypatch):
    worker = Worker({"name": "north", "data": "rows.parquet", "state": str(tmp_path)})
    monkeypatch.setattr(worker, "_answer", lambda asked, blob: ({"secret": 1}, b"upload"))
    monkeypatch.setattr(os, "fsync", full)
    answer, blob = worker.perform({"do": "train"}, b"")
    assert (answer["error"], blob) == ("failed", b"")
    assert "cannot be written" in answer["message"]


def test_a_server_notes_the_site_and_a_call_without_an_answer(tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl", server="fedvlm")

    def call(site, header, blob, limit):
        if site == "south":
            raise TimeoutError("/secret/path")
        return {"loss": 1.0}, b"12345"

    asked = audited_calls(log, call)
    assert asked("north", {"do": "train", "round": 1}, b"1", 9.0) == ({"loss": 1.0}, b"12345")
    with pytest.raises(TimeoutError):
        asked("south", {"do": "train", "round": 1}, b"1", 9.0)
    found = [json.loads(line) for line in lines(log)]
    assert [(f["site"], f.get("decision")) for f in found[1:]] == [
        ("north", None),
        ("north", "done"),
        ("south", None),
        ("south", "none"),
    ]
    assert found[2]["bytes_up"] == 5
    assert "secret" not in log.path.read_text()


def test_a_run_may_begin_in_a_folder_that_has_only_an_audit_log(tmp_path):
    AuditLog(tmp_path / "audit.jsonl", server="fedvlm").note("request", do="open")
    store.check_fresh(tmp_path)
    (tmp_path / "other").touch()
    with pytest.raises(FedVLMError, match="is not empty"):
        store.check_fresh(tmp_path)


def test_the_command_prints_the_last_hash_and_exits_with_2_for_a_broken_log(log):
    run = CliRunner().invoke
    found = run(app, ["audit-log", "verify", str(log.path)])
    assert found.exit_code == 0
    assert "5 lines, all linked" in found.output
    assert verify(log.path).last in found.output
    assert "north" in found.output
    noted = run(app, ["audit-log", "verify", str(log.path), "--noted", verify(log.path).last])
    assert "the noted line is there" in noted.output
    text = lines(log)
    log.path.write_bytes(b"".join(text[:2] + text[3:]))
    broken = run(app, ["audit-log", "verify", str(log.path)])
    assert isinstance(broken.exception, FedVLMError), "the program exits with code 2 for these"
    assert "line 3" in str(broken.exception)


def test_a_file_that_is_no_log_is_refused(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(FedVLMError, match="is no audit log: it has no whole line"):
        verify(tmp_path / "x")

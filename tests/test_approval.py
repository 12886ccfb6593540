"""A person at the site accepts each run, and the operator's signature says who has ordered it."""

import json
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import fedvlm
from fedvlm.cli.app import app
from fedvlm.config import load
from fedvlm.deploy import approval
from fedvlm.deploy.approval import Requests, decided
from fedvlm.deploy.auditlog import verify
from fedvlm.deploy.digests import digest_of
from fedvlm.deploy.outline import outline
from fedvlm.deploy.remote import Remote, as_sent
from fedvlm.deploy.signature import OPERATOR, sign
from fedvlm.deploy.worker import Worker
from fedvlm.errors import FedVLMError
from fedvlm.store.files import read_lines
from sites import config, opening
from test_signature import ca, key, pem  # noqa: F401

# -- requests


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A site that demands approval and, unless a test says otherwise, opens runs in no time."""
    ledger = SimpleNamespace(begin=lambda run, config: None)
    site = SimpleNamespace(rows={"train": 1}, described=lambda: {"adapter": "x"}, ledger=ledger)
    monkeypatch.setattr("fedvlm.deploy.site.Site", lambda *args: site)
    monkeypatch.setattr(approval, "outline", lambda *args: approval_words)
    (tmp_path / "policy.yml").write_text("approval: true\n")
    return {
        "name": "north",
        "data": str(tmp_path / "rows.parquet"),
        "state": str(tmp_path / "state"),
        "policy": str(tmp_path / "policy.yml"),
    }


approval_words = SimpleNamespace(sent=("factor B, 3 kB",), stays=("factor A",))


def opened(own, run, *settings, **more):
    """The answer of a new worker of the site to ``open``."""
    tree = as_sent(load({"algorithm": {"name": "plora"}}, *settings))
    return opened_as(own, opening(tree, run) | more)


def waits(answer):
    return answer.get("error") == "refused" and "waits for a person's approval" in answer["message"]


def only(own):
    (found,) = Requests(own["state"]).all()
    return found


def test_a_run_waits_until_a_person_approves_it(place):
    assert waits(opened(place, "run1"))
    assert waits(opened(place, "run1")), "asking again changes nothing"
    decided(place["state"], only(place).number, "approved")
    assert opened(place, "run1") == {"adapter": "x"}
    assert opened(place, "run1") == {"adapter": "x"}, "the same run, as after a crash"


def test_a_site_that_demands_no_approval_asks_nobody(place, tmp_path):
    (tmp_path / "policy.yml").write_text("rounds: 100\n")
    assert opened(place, "run1") == {"adapter": "x"}
    assert not (tmp_path / "state" / "requests").exists()


def test_an_approval_is_for_the_configuration_not_for_the_run(place):
    opened(place, "run1")
    decided(place["state"], only(place).number, "approved")
    assert waits(opened(place, "run1", "train.lr=1e-30")), "the approved digest is what runs"
    assert waits(opened(place, "run1", "algorithm.name=fedsa"))
    assert opened(place, "run1") == {"adapter": "x"}


def test_an_opened_run_takes_no_other_configuration_even_an_approved_one(place):
    opened(place, "run1")
    opened(place, "run2", "algorithm.name=fedsa")
    for request in Requests(place["state"]).all():
        decided(place["state"], request.number, "approved")
    assert opened(place, "run1") == {"adapter": "x"}
    refused = opened(place, "run1", "algorithm.name=fedsa")
    assert "run 'run1' was approved with another configuration" in refused["message"]
    assert opened(place, "run2", "algorithm.name=fedsa") == {"adapter": "x"}


def test_an_approval_is_for_the_first_run_that_opens_with_it(place):
    opened(place, "run1")
    decided(place["state"], only(place).number, "approved")
    assert opened(place, "run2") == {"adapter": "x"}, "'deploy run' has made a new number"
    assert waits(opened(place, "run3")), "a second run of the same configuration waits again"
    first, second = Requests(place["state"]).all()
    assert (first.run, first.bound, second.run) == ("run2", True, "run3")
    assert second.number == f"{first.number}-2"
    decided(place["state"], "run3", "approved")
    assert opened(place, "run3") == opened(place, "run2") == {"adapter": "x"}


def test_an_approval_ends_when_the_sites_settings_change(place, tmp_path):
    opened(place, "run1")
    decided(place["state"], only(place).number, "approved")
    assert opened(place, "run1") == {"adapter": "x"}
    (tmp_path / "policy.yml").write_text("approval: true\nset: {data.columns.answer: patient}\n")
    assert waits(opened(place, "run1"))
    assert only(place).here["data"]["columns"]["answer"] == "patient"
    decided(place["state"], "run1", "approved")
    assert opened(place, "run1") == {"adapter": "x"}


def test_a_refused_run_stays_refused_and_the_server_gets_the_reason(place):
    opened(place, "run1")
    decided(place["state"], only(place).number, "refused", "ask the ethics board\x1b[2J")
    for run in ("run1", "run2"):
        answer = opened(place, run)
        assert answer["error"] == "refused"
        assert r"has refused this run (request " in answer["message"]
        assert r"ask the ethics board\x1b[2J" in answer["message"]
    decided(place["state"], only(place).number, "approved")
    assert opened(place, "run1") == {"adapter": "x"}, "a person may decide otherwise later"


def test_a_run_that_the_policy_refuses_never_asks_a_person(place, tmp_path):
    (tmp_path / "policy.yml").write_text("approval: true\nrounds: 2\n")
    assert "the site's policy refuses" in opened(place, "run1", "train.rounds=9")["message"]
    assert not (tmp_path / "state" / "requests").exists()


def test_a_server_cannot_fill_the_disk_with_requests(place, monkeypatch):
    monkeypatch.setattr(approval, "WAITING", 3)
    for seed in range(3):
        assert waits(opened(place, "run1", f"seed={seed}"))
    assert "3 requests wait" in opened(place, "run1", "seed=9")["message"]
    assert len(Requests(place["state"]).all()) == 3
    assert waits(opened(place, "run1", "seed=2")), "those that wait can still be asked for"


def test_configurations_whose_digests_begin_alike_are_two_requests(place, monkeypatch):
    monkeypatch.setattr(approval, "DIGITS", 0)
    opened(place, "run1", "seed=1")
    opened(place, "run1", "seed=2")
    first, second = Requests(place["state"]).all()
    assert first.digest != second.digest
    assert first.number != second.number


def test_a_damaged_request_is_an_error_and_no_approval(place):
    opened(place, "run1")
    path = next((approval.Requests(place["state"]).folder).glob("*.json"))
    path.write_text(path.read_text().replace('"waiting"', '"approved"'))
    answer = opened(place, "run1")
    assert answer["error"] == "refused"
    assert "cannot read or write its requests" in answer["message"]
    assert place["state"] not in answer["message"]


def test_an_unsigned_run_is_refused_where_the_site_has_the_authoritys_certificate(
    place, ca, tmp_path
):
    (tmp_path / "root.pem").write_bytes(ca.root)
    own = place | {"root": str(tmp_path / "root.pem")}
    digest = digest_of(as_sent(load({"algorithm": {"name": "plora"}})))
    assert "needs the operator's signature" in opened(own, "run1")["message"]
    signed = sign("run1", digest, ca.key, ca.operator)
    assert "for another run" in opened(own, "run2", operator=signed)["message"]
    assert "another configuration" in opened(own, "run1", "seed=7", operator=signed)["message"]
    assert not (tmp_path / "state" / "requests").exists()
    assert waits(opened(own, "run1", operator=signed))
    assert only(own).signed_by == OPERATOR
    (tmp_path / "policy.yml").write_text("approval: false\n")
    assert "needs the operator's signature" in opened(own, "run1")["message"]
    assert opened(own, "run1", operator=signed) == {"adapter": "x"}


def test_the_server_sends_the_operators_signature_with_open_only():
    from fedvlm.deploy.nvflare.server import signed

    seen = []

    def call(site, header, blob, limit):
        seen.append(header)
        return {"error": "refused", "message": "no"}, b""

    engine = Remote(signed({"signature": "s"}, call), ["north"])
    settings = load({"algorithm": {"name": "plora"}})
    with pytest.raises(FedVLMError, match="0 of 1 sites could open"):
        engine.open("run1", settings)
    (header,) = seen
    assert header["operator"] == {"signature": "s"}
    assert digest_of(header["config"]) == digest_of(as_sent(settings))


def test_deploy_run_signs_what_the_sites_of_its_federation_accept(place, tmp_path):
    from fedvlm.deploy.nvflare import federation as runs
    from fedvlm.deploy.nvflare.demo import loopback
    from fedvlm.deploy.nvflare.project import provision
    from fedvlm.deploy.nvflare.server import signed
    from fedvlm.deploy.remote import Limits

    home = tmp_path / "federation"
    provision(loopback(["north"]), home)
    (tmp_path / "policy.yml").write_text("{}")
    own = place | {"root": str(home / "admin" / "startup" / "rootCA.pem")}
    settings = load({"algorithm": {"name": "plora"}}, f"output={tmp_path / 'run'}")
    session = SimpleNamespace(submit_job=lambda folder: "1")
    federation, ask = runs.Federation(home), (session, settings, ["north"], Limits())
    _, events = federation._submit(*ask, False, lambda event: None)
    job = json.loads((events.parent / "job.json").read_text())
    call = signed(job["operator"], lambda site, header, blob, limit: opened_as(own, header))
    header = opening(as_sent(load(job["config"])), job["run"])
    assert call("north", header, b"", 9.0) == {"adapter": "x"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sites.json").write_text(json.dumps({"run": "begun-before"}))
    _, events = federation._submit(*ask, True, lambda event: None)
    resumed = json.loads((events.parent / "job.json").read_text())
    assert resumed["run"] == "begun-before", "a resumed run keeps its number"
    header = header | {"run": "begun-before"}
    assert "for another run number" in call("north", header, b"", 9.0)["message"]
    header["operator"] = resumed["operator"]
    assert opened_as(own, header) == {"adapter": "x"}


def opened_as(own, header):
    worker = Worker(own)
    answer = worker.perform(json.loads(json.dumps(header)), b"")[0]
    if worker._lock:
        worker._lock.__exit__(None, None, None)
    return answer


# -- words


def words(*settings, rows=True):
    found = outline(load({"train": {"rounds": 4}}, *settings), "north", rows)
    return "\n".join(found.sent), "\n".join(found.stays)


def test_the_words_name_the_factors_that_leave_and_those_that_stay():
    sent, stays = words("algorithm.name=plora")
    assert "in each of 4 rounds (rounds 1 to 4): factor B of 47 modules (18 vision, 1 proj" in sent
    assert "289.2 kB up and 289.2 kB down, 1.2 MB up in all" in sent
    assert "the mean training loss" in sent
    assert "factor A" not in sent
    assert "personal: factor A of 47 modules" in stays
    assert "questions and answers" in stays


def test_the_words_tell_rounds_apart_that_send_different_things():
    sent, stays = words("algorithm.name=rolora", "train.average=none")
    assert "in each of 2 rounds (rounds 1, 3): factor B" in sent
    assert "in each of 2 rounds (rounds 2, 4): factor A" in sent
    assert "no factor is personal" in stays
    sent, _ = words("algorithm.name=auto")
    assert "'doubts', 4 tensors beside the factors" in sent


def test_the_words_know_what_the_settings_change():
    sent, stays = words("algorithm.name=local", rows=False)
    assert sent.startswith("no factor")
    assert "personal: factors A and B of 47 modules" in stays
    assert "numbers of training" not in sent
    assert "78.7 kB up" in words("algorithm.name=plora", "wire.compress=int8")[0]
    sent, _ = words("algorithm.name=share", "algorithm.share={part:vision: AB}")
    assert "factors A and B of 18 modules (18 vision)" in sent


PRIVATE = ("privacy.unit=patient", "privacy.epsilon=3", "privacy.delta=1e-5")


def test_the_words_of_a_private_run_name_no_score_no_loss_and_no_rows():
    sent, stays = words("algorithm.name=ffa", *PRIVATE)
    assert "unit 'patient', epsilon 3 at delta 1e-05 for the whole run" in sent
    assert "the seconds that it took, to ten seconds" in sent
    for word in ("loss", "scores", "numbers of"):
        assert word not in sent
        assert word in stays


def test_a_request_of_a_private_run_says_what_is_left(place, tmp_path):
    limit = "approval: true\nepsilon_max: 4\ndelta_max: 1e-4\n"
    (tmp_path / "policy.yml").write_text(limit)
    opened(place, "run1", *PRIVATE)
    opened(place, "run2", *PRIVATE, "privacy.epsilon=5")
    (request,) = Requests(place["state"]).all()
    assert request.privacy == (
        "differential privacy: at most epsilon 4 at delta 0.0001 over all runs on the same rows",
        "spent at this site so far: nothing",
    )
    assert request.privacy[1] in run("requests", "--state", place["state"]).output


# -- the commands


def run(*words_):
    return CliRunner().invoke(app, ["site", *words_])


def test_a_person_reads_the_request_and_decides(place):
    state = ("--state", place["state"])
    opened(place, "run1", "train.rounds=7")
    number = only(place).number
    shown = run("requests", *state).output
    for text in (
        f"request {number}: waits",
        "as run run1",
        "would be sent to the server:\n    - factor B, 3 kB",
        "would stay at this site:\n    - factor A",
        "train.rounds: 7",
        f"data.path: {place['data']}",
        f"fedvlm site approve {number} --state",
        digest_of(as_sent(load({"algorithm": {"name": "plora"}}, "train.rounds=7"))),
    ):
        assert text in shown
    assert "train.lr:" not in shown
    assert "train.lr:" in run("requests", number, *state).output, "all settings of one request"
    assert "is approved" in run("approve", number, *state).output
    listed = run("requests", *state).output
    assert f"request {number}: approved" in listed
    assert "no request waits" in listed
    assert opened(place, "run1", "train.rounds=7") == {"adapter": "x"}
    assert "for run run1" in run("requests", *state).output
    run("refuse", number, "--because", "no", *state)
    assert "refused" in opened(place, "run1", "train.rounds=7")["message"]


def test_decisions_are_in_the_audit_log(place):
    opened(place, "run1")
    decided(place["state"], "run1", "approved")
    log = f"{place['state']}/audit.jsonl"
    events = [line["event"] for line in read_lines(approval.Path(log))]
    assert events == ["begun", "request", "asked for approval", "answer", "approved"]
    verify(log)


def test_what_a_server_writes_cannot_steer_the_terminal(place):
    pattern = '"\\x1b.2J\\nrequest 1: approved"'
    opened(place, "run1", "algorithm.name=share", f"algorithm.share={{{pattern}: B}}")
    shown = run("requests", "--state", place["state"]).output
    assert r"\x1b.2J\nrequest 1: approved" in shown
    assert "\x1b" not in shown
    assert "\nrequest 1: approved" not in shown


def test_a_request_that_is_not_there_is_an_error_that_lists_the_others(place):
    opened(place, "run1")
    number = only(place).number
    with pytest.raises(FedVLMError, match=f"no request 'zzz' at this site; there are: {number}"):
        decided(place["state"], "zzz", "approved")
    assert "no such folder" in str(run("approve", "x", "--state", "/nowhere").exception)


def test_a_model_that_cannot_be_described_stops_no_decision(place, monkeypatch):
    def fails(*args):
        raise FedVLMError("the folder is damaged")

    monkeypatch.setattr(approval, "outline", fails)
    assert waits(opened(place, "run1"))
    assert (
        "is not known: FedVLMError: the folder is damaged"
        in run("requests", "--state", place["state"]).output
    )
    decided(place["state"], "run1", "approved")
    assert opened(place, "run1") == {"adapter": "x"}


def test_an_approved_run_opens_for_real(tmp_path):
    fedvlm.scenes(sites=1, rows=60).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "policy.yml").write_text("approval: true\nalgorithms: [plora]\ntrain_rows: 8\n")
    own = {"name": "north", "data": str(tmp_path / "rows.parquet")}
    own |= {"state": str(tmp_path / "state"), "policy": str(tmp_path / "policy.yml")}
    tree = json.loads(json.dumps(as_sent(config(tmp_path, "model.name=tiny", "eval.max_rows=10"))))
    asked = opening(tree)
    worker = Worker(own)
    assert waits(worker.perform(dict(asked), b"")[0])
    assert "factor B of 47 modules" in "".join(only(own).sent)
    decided(own["state"], "r", "approved")
    assert worker.perform(dict(asked), b"")[0]["rows"]["train"] > 0

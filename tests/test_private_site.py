"""Deployed runs under differential privacy: what leaves a site, and what a site refuses."""

import json

import pytest
from typer.testing import CliRunner

import fedvlm
from fedvlm.algorithms.base import NOBODY, Visit
from fedvlm.cli.app import app
from fedvlm.cli.live import describe
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.deploy.remote import Limits, Remote
from fedvlm.deploy.site import Site
from fedvlm.deploy.spending import Spending
from fedvlm.deploy.worker import Worker
from fedvlm.engines.wire import Task
from fedvlm.errors import FedVLMError
from fedvlm.rounds.results import Results
from fedvlm.store import run as store
from fedvlm.store.files import read_lines
from sites import FEW, SITES, Here, config, deployed, opening, written

PRIVATE = (
    "algorithm.name=ffa",
    "privacy.unit=row",
    "privacy.epsilon=1.4",
    "privacy.delta=0.01",
    "privacy.noise=1.0",  # four steps of the sites' 19 rows spend 1.28, six spend 1.58
)
LIMIT = {"dp_required": True, "epsilon_max": 1.6, "delta_max": 0.01}


class Recorded(Here):
    """Sites in this process, with the bytes that the server has sent them."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sent = {}

    def __call__(self, site, header, blob, limit):
        self.sent[site, header["do"], header.get("round")] = blob
        return super().__call__(site, header, blob, limit)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with a parquet file of each site's rows, and one of all rows."""
    folder = tmp_path_factory.mktemp("data")
    table = fedvlm.scenes(style="concept", sites=3, rows=30).to_pandas()
    table["patient"] = [f"p{n // 2}" for n in range(len(table))]
    table.to_parquet(folder / "all.parquet", index=False)
    for site in SITES:
        table[table["site"] == site].to_parquet(folder / f"{site}.parquet", index=False)
    return folder


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A run under differential privacy over three sites: results, its sites, and its events."""
    folder = tmp_path_factory.mktemp("private")
    policy = written(folder / "policy.yml", **LIMIT)
    call, events = Recorded(data, folder / "state", policy), []
    results = deployed(call, config(data, *PRIVATE), folder / "run", events=events)
    return results, call, events, folder


def charges(state):
    spending = Spending(state)
    with spending.locked():
        return spending.charges()


def heads(call):
    """The JSON of all answers of the sites."""
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(answer.decode("latin-1"))[0] for answer in call.wire]


def test_no_loss_no_score_and_no_number_of_rows_leaves_a_site(done):
    results, call, events, _ = done
    allowed = {"adapter", "peft", "seconds"}
    assert set().union(*heads(call)) == allowed
    seconds = [head["seconds"] for head in heads(call) if "seconds" in head]
    assert all(taken % 10 == 0 for taken in seconds)
    assert not [event for event in events if {"loss", "rows"} & event.keys()]
    assert "score" not in {what for _, what, _ in call.asked}, "the server does not even ask"
    for line in store.Store(results.folder).lines():
        assert not line.get("train_loss")
        assert not (line["evaluation"] or {}).get("personal")
        assert describe(line, config(call_data(call), *PRIVATE))


def call_data(call):
    from pathlib import Path

    return Path(call.own["site-0"]["data"]).parent


def test_a_site_keeps_its_own_scores(done):
    *_, folder = done
    own = read_lines(folder / "state/site-0/runs/run-1/answers/personal.jsonl")
    assert all("exact_match" in line for line in own)


def test_a_site_refuses_to_score_for_a_server_that_asks(done):
    _, call, *_ = done
    asked = {"do": "score", "kind": "global", "round": 0}
    answer, _ = call.workers["site-0"].perform(asked, b"")
    assert answer["error"] == "refused"
    assert "no score leaves a site under differential privacy" in answer["message"]


def test_every_round_is_in_the_ledger_with_the_plan_that_it_was_trained_by(done):
    _, call, _, folder = done
    for name in SITES:
        plan = call.workers[name].site.engine.plans[name]
        found = charges(folder / "state" / name)
        assert [c.round for c in found] == [1, 2]
        assert all(c.spend == plan.spend(2) for c in found)


def test_the_results_say_that_there_are_no_scores(done):
    results, *_ = done
    assert results.metrics == []
    assert results.adapter().exists()
    with pytest.raises(FedVLMError, match="no client told its scores"):
        results.summary()
    assert Results.read(results.folder) == results
    shown = CliRunner().invoke(app, ["plot", str(results.folder)])
    assert shown.exit_code == 0


def test_a_saved_reply_is_sent_again_for_nothing(done):
    _, call, _, folder = done
    before = charges(folder / "state" / "site-1")
    asked = {"do": "train", "round": 2, "sampled": 1.0}
    replies = {call("site-1", asked, call.sent["site-1", "train", 2], 9)[1] for _ in range(2)}
    assert len(replies) == 1
    assert replies != {b""}
    assert charges(folder / "state" / "site-1") == before


def test_another_download_of_a_round_is_spent_until_the_budget_of_the_run_ends(done):
    _, call, _, folder = done
    asked = {"do": "train", "round": 2, "sampled": 1.0}
    first = call.sent["site-1", "train", 1]
    assert first != call.sent["site-1", "train", 2]
    answer, blob = call("site-1", asked, first, 9)
    assert (answer["error"], blob) == ("refused", b"")
    assert answer["message"] == (
        "round 2 would make the epsilon of this run 1.6 at delta 0.01, and its budget is 1.4 "
        "(privacy.epsilon): rounds that were trained again are spent again"
    )
    assert len(charges(folder / "state" / "site-1")) == 2
    assert call.workers["site-1"].site.store.rounds() == [1, 2], "the site keeps its state"


def test_a_run_ends_although_no_site_has_privacy_left_for_a_round(done):
    _, call, *_ = done
    events = []
    engine = Remote(call, SITES, Limits(), events.append)
    engine.open("run-1", config(call_data(call), *PRIVATE))
    down = engine.algorithm.send(engine.algorithm.init(engine.adapter), NOBODY)
    tasks = [Task(Visit(site, 1.0, round=2), down) for site in SITES]
    assert list(engine.train(tasks)) == [], "no reply and no error"
    assert [event["site"] for event in events if event["event"] == "failed"] == list(SITES)
    call.broken = "train"
    with pytest.raises(FedVLMError, match="0 of 3 sites finished round 2"):
        list(engine.train(tasks))
    call.broken = None


def test_more_steps_than_were_charged_stay_at_the_site(data, tmp_path):
    policy, asked = Policy(**FEW), config(data, *PRIVATE)
    site = Site("s", asked, str(data / "site-0.parquet"), tmp_path / "runs" / "r", policy)
    site.account.steps[1] -= 1
    down = site.algorithm.send(site.algorithm.init(site.engine.adapter), NOBODY)
    plain, known = site.engine.train, []

    def train(tasks):
        known.extend(charges(tmp_path))
        return plain(tasks)

    site.engine.train = train
    with pytest.raises(FedVLMError, match="round 1 trained 2 steps, and 1 were planned and charg"):
        site.train(1, down)
    assert site.store.rounds() == [], "neither sent nor kept"
    assert [c.spend.steps for c in charges(tmp_path)] == [1]
    assert known == charges(tmp_path), "the charge is written before the first step"


def opened(call, run, *settings, site="site-0"):
    """The answer of a new worker of a site to the request to open a run."""
    worker = Worker(call.own[site])
    tree = config(call_data(call), *PRIVATE, *settings).model_dump()
    return worker.perform(opening(tree, run), b"")[0]


def test_a_second_run_on_the_same_rows_is_refused_before_its_first_round(done):
    _, call, _, folder = done
    refused = opened(call, "run-2")
    assert refused["message"] == (
        "the site's policy refuses this run: its rows have spent epsilon 1.3, this run would spend "
        "1.3, together 1.9 at delta 0.01, and the limit is 1.6 (epsilon_max)"
    )
    assert not (folder / "state/site-0/runs/run-2").exists()
    assert "adapter" in opened(call, "run-3", "privacy.noise=3")


def test_a_run_without_privacy_is_refused_by_a_site_that_requires_it(done):
    _, call, *_ = done
    refused = opened(
        call, "run-4", *(f"privacy.{n}=null" for n in ("unit", "epsilon", "delta", "noise"))
    )
    assert "training without differential privacy, which the site requires" in refused["message"]


def test_a_failure_in_training_is_told_without_its_reason(done, monkeypatch, caplog):
    _, call, *_ = done
    worker = call.workers["site-2"]

    def train(*args):
        raise FedVLMError("row 7 is odd")

    monkeypatch.setattr(worker.site, "train", train)
    answer, _ = worker.perform({"do": "train", "round": 2, "sampled": 1.0}, b"")
    assert answer == {"error": "failed", "message": "FedVLMError; see the site's log"}
    assert "row 7 is odd" in caplog.text


def test_a_site_protects_its_own_unit(data, tmp_path):
    policy = Policy(**FEW, dp_unit="patient", epsilon_max=2, delta_max=0.06)
    own = "s", config(data, *PRIVATE, "privacy.delta=0.06"), str(data / "site-0.parquet")
    site = Site(*own, tmp_path / "runs" / "r", policy)
    rows = len(site.engine.partition.splits["s"].train)
    assert site.account.claim.unit == "patient"
    assert site.engine.plans["s"].units < rows
    with pytest.raises(Refused, match="must be below 1 / their number") as error:
        Site(*own, tmp_path / "runs" / "q", Policy(**FEW))
    assert str(rows) not in str(error.value), "the number of units is not for the server"


def test_a_person_at_the_site_sees_what_was_spent(done):
    *_, folder = done
    state, policy = str(folder / "state/site-1"), str(folder / "policy.yml")
    shown = CliRunner().invoke(app, ["site", "budget", "--state", state, "--policy", policy]).output
    assert "at most epsilon 1.6 at delta 0.01 over all runs on the same rows" in shown
    assert "rows of run run-1: unit 'row', 2 rounds" in shown
    assert "  epsilon 1.282 at delta 0.01, and 0.3184 is left" in shown

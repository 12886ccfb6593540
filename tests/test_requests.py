"""A site's worker and a server that sends requests of another form."""

from __future__ import annotations

import json

import pytest

import fedvlm
from fedvlm.deploy.worker import Worker
from fedvlm.hub import Undelivered
from sites import config, opening, written

NAN = float("nan")


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A worker that has opened a run."""
    folder = tmp_path_factory.mktemp("site")
    fedvlm.scenes(sites=1, rows=24).to_parquet(folder / "rows.parquet")
    own = {"name": "s", "data": str(folder / "rows.parquet"), "state": str(folder / "s")}
    found = Worker(own | {"policy": written(folder / "policy.yml")})
    opened, _ = found.perform(opening(config(folder).model_dump()), b"")
    assert opened["rows"]["train"] > 0
    return found


def test_a_site_reads_no_file_of_its_own_for_a_server(tmp_path):
    secret = tmp_path / "key.yaml"
    secret.write_text("password: sk-12345")
    worker = Worker({"name": "site-0", "data": "rows.parquet", "state": str(tmp_path / "s")})
    for config_ in (str(secret), None, [1]):
        refused, _ = worker.perform(opening(config_), b"")
        assert refused["error"] == "failed"
        assert "must be a mapping" in refused["message"]
        assert "sk-12345" not in json.dumps(refused)


def test_a_server_does_not_learn_why_the_hub_refuses_a_site(worker, monkeypatch, caplog):
    def fails(*_):
        raise Undelivered("https://mirror.example refuses the token (that of HF_TOKEN)")

    monkeypatch.setattr(worker, "_perform", fails)
    answer, _ = worker.perform({"do": "open"}, b"")
    assert answer == {"error": "failed", "message": "Undelivered; see the site's log"}
    assert "refuses the token" in caplog.text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"round": 1.9}, "a round is a whole number, got 1.9"),
        ({"round": True}, "a round is a whole number"),
        ({"round": None}, "a round is a whole number"),
        ({"round": 0}, "begins with round 1"),
        ({"round": 99}, "round 99"),
        ({"sampled": "1"}, "share is a number"),
        ({"sampled": NAN}, "share of all examples"),
        ({"sampled": 1.5}, "share of all examples"),
        ({"do": "score", "kind": "foo"}, "a model is one of global, personal, end, got 'foo'"),
        ({"do": "score", "kind": ["end"]}, "a model is one of"),
        ({"do": "export", "kind": "end", "name": "x"}, "a model is one of global, personal"),
        (
            {"do": "export", "kind": "personal", "name": "initial"},
            "name is one of global, personal",
        ),
        ({"do": "answer", "kind": "personal", "name": "../x"}, "name is one of untuned, global"),
        ({"do": "score", "kind": "end", "round": 1}, "no result of round 1"),
    ],
)
def test_a_site_refuses_a_request_of_another_form(worker, changed, said):
    header = {"do": "train", "round": 2, "sampled": 1.0, "kind": "global"} | changed
    refused, blob = worker.perform(header, b"")
    assert said in refused["message"]
    assert not blob

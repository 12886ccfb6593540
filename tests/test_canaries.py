"""Canaries: how they are drawn, what a run does with them, and the audit of whole runs."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

import fedvlm
from fedvlm.after.audit import audit, claims_of
from fedvlm.cli.app import app
from fedvlm.config import load
from fedvlm.data.partition import Partition, Split
from fedvlm.deploy.policy import Policy, Refused
from fedvlm.errors import DataError, FedVLMError
from fedvlm.planning.forecast import forecast
from fedvlm.privacy import chance
from fedvlm.privacy.audit import find
from fedvlm.privacy.canaries import drawn, planted, spread
from fedvlm.rounds.seen import Watched, watched
from fedvlm.store import sealed
from fedvlm.store.files import load_tree
from stopping import Stop

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def rows():
    """Forty rows of two clients; the first client has three quarters of them."""
    return datasets.Dataset.from_dict(
        {
            "question": ["?"] * 40,
            "answer": [f"a{k % 4}" for k in range(40)],
            "rejected": [f"b{k % 4}" for k in range(40)],
            "patient": [f"p{k // 3}" for k in range(40)],
            "row": list(range(100, 140)),
        }
    )


def partition():
    splits = {
        "big": Split(np.arange(28), np.arange(28, 29), np.arange(29, 30)),
        "small": Split(np.arange(30, 39), np.arange(0), np.arange(39, 40)),
    }
    return Partition("explicit", "answer", tuple(splits), splits, {}, ())


def settings(count, **privacy):
    return load({"privacy": {"canaries": count, **privacy}})


def rows_of(canaries):
    return [row for one in canaries for row in one.rows]


def test_canaries_are_a_function_of_the_seed(rows):
    first = drawn(rows, partition(), settings(12), pairs=False)
    assert first == drawn(rows, partition(), settings(12), pairs=False)
    other = settings(12).model_copy(update={"seed": 1})
    assert first != drawn(rows, partition(), other, pairs=False)


def test_every_client_gets_its_share_of_distinct_training_rows(rows):
    found = drawn(rows, partition(), settings(12), pairs=False)
    own = {c: [one for one in found if one.client == c] for c in ("big", "small")}
    assert {c: len(mine) for c, mine in own.items()} == {"big": 9, "small": 3}
    assert len(set(rows_of(found))) == 12
    for client, mine in own.items():
        assert set(rows_of(mine)) <= set(partition().splits[client].train.tolist())
    assert all(one.numbers == (100 + one.rows[0],) for one in found)


def test_the_coins_are_fair(rows):
    many = Split(np.arange(38), np.arange(0), np.arange(38, 40))
    config = settings(36)
    trained = 0
    for seed in range(30):
        whole = replace(partition(), clients=("all",), splits={"all": many})
        found = drawn(rows, whole, config.model_copy(update={"seed": seed}), pairs=False)
        trained += sum(one.trained for one in found)
    assert abs(trained / (30 * 36) - 0.5) < 0.06  # four standard deviations


def test_a_canary_has_a_wrong_answer_and_held_out_rows_stay(rows):
    found = drawn(rows, partition(), settings(20), pairs=False)
    new, left = planted(rows, partition(), settings(20), pairs=False)
    changed = {k for k in range(40) if new[k]["answer"] != rows[k]["answer"]}
    assert changed == set(rows_of(found))
    assert {new[k]["answer"] for k in changed} <= set(rows["answer"])
    out = {row for one in found if not one.trained for row in one.rows}
    assert out
    assert len(out) < 20
    for client, split in partition().splits.items():
        kept = left.splits[client]
        assert kept.train.tolist() == [row for row in split.train if row not in out]
        assert np.array_equal(kept.test, split.test)
        assert np.array_equal(kept.val, split.val)


def test_canaries_of_preferences_are_swapped_pairs(rows):
    new, left = planted(rows, partition(), settings(12), pairs=True)
    for row in rows_of(left.canaries):
        assert (new[row]["answer"], new[row]["rejected"]) == (
            rows[row]["rejected"],
            rows[row]["answer"],
        )


def test_a_canary_is_a_whole_unit_of_the_protected_column(rows):
    private = {"unit": "patient", "epsilon": 3, "delta": 1e-3}
    found = drawn(rows, partition(), settings(5, **private), pairs=False)
    for one in found:
        train = partition().splits[one.client].train.tolist()
        patient = rows[one.rows[0]]["patient"]
        assert sorted(one.rows) == [k for k in train if rows[k]["patient"] == patient]


def test_more_canaries_than_rows_are_refused_with_the_largest_number(rows):
    with pytest.raises(DataError, match=r"privacy\.canaries=34: .* room for 33 canaries"):
        drawn(rows, partition(), settings(34), pairs=False)
    assert spread(33, {"big": 28, "small": 9, "tiny": 1}) == {"big": 26, "small": 7, "tiny": 0}
    assert sum(spread(10, {str(k): 3 + k for k in range(7)}).values()) == 10


def test_a_client_of_one_answer_has_no_canary(rows):
    same = rows.remove_columns("answer").add_column("answer", ["yes"] * 40)
    with pytest.raises(DataError, match="client 'big' have the answer 'yes'"):
        drawn(same, partition(), settings(4), pairs=False)


def test_sites_refuse_canaries():
    with pytest.raises(Refused, match=r"canaries \(privacy\.canaries\), .* simulated run"):
        Policy().check(settings(1))


@pytest.mark.parametrize(
    "more", [{"wire": {"secure": True}}, {"algorithm": {"name": "centralized"}}]
)
def test_no_upload_is_kept_where_no_server_sees_one(rows, more, tmp_path):
    plain = load({"privacy": {"canaries": 12}, "algorithm": {"name": "lora"}})
    engine = SimpleNamespace(adapter={}, algorithm=None, stages=())
    left = planted(rows, partition(), plain, pairs=False)[1]
    assert isinstance(watched(engine, left, plain, tmp_path), Watched)
    assert watched(engine, partition(), plain, tmp_path) is engine
    other = load({"privacy": {"canaries": 12}, "algorithm": {"name": "lora"}, **more})
    assert watched(engine, left, other, tmp_path) is engine


# Whole runs. One run of two clients serves all tests that do not write to its folder.


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    """A run without differential privacy that learns its rows by heart."""
    return fedvlm.run(config(tmp_path_factory.mktemp("planted") / "run")).folder


def config(folder, **sections):
    """Settings of a run with 24 canaries."""
    return {
        "output": str(folder),
        "data": {"scenes": {"sites": 2, "rows": 24, "style": "iid"}, "val_fraction": 0},
        "partition": {"min_rows": 4},
        "algorithm": {"name": "lora"},
        "train": {"rounds": 2, "local_steps": 12, "batch_size": 8, "lr": 0.01, "average": "none"},
        "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 2},
        "lora": {"target": "language", "rank": 8},
        "engine": {"threads": 1},
        "privacy": {"canaries": 24},
        **sections,
    }


def test_a_run_keeps_its_canaries_and_the_last_uploads(planted_run):
    told = json.loads((planted_run / "canaries.json").read_text())["canaries"]
    assert len(told) == 24
    assert 0 < sum(one["trained"] for one in told) < 24
    kept = sorted(path.name for path in (planted_run / "uploads").iterdir())
    assert kept == ["client-site-0.safetensors", "client-site-1.safetensors"]
    mean = load_tree(planted_run / "adapters" / "global" / "adapter_model.safetensors")
    sent = [load_tree(planted_run / "uploads" / name) for name in kept]
    weights = [len(s.train) for s in fedvlm.open_run(planted_run).partition.splits.values()]
    for name, tensor in mean.items():
        both = sum(w * tree[name] for w, tree in zip(weights, sent, strict=True)) / sum(weights)
        assert (both - tensor).abs().max() < 1e-5


def test_an_audit_finds_what_the_models_learnt_by_heart(planted_run):
    found = audit(planted_run)
    assert list(found.views) == ["upload", "global", "personal"]
    for attacks in found.views.values():
        assert attacks["loss"].auc > 0.8
        assert attacks["loss"].canaries == 24
    assert found.bounds["upload"] > 0.3
    assert (found.claims, found.broken) == ({}, ())
    told = sealed.read(planted_run / "audit.json")  # everything can be computed again from it
    coins = [one["trained"] for one in told["canaries"]]
    for view, attacks in found.views.items():
        for attack, finding in attacks.items():
            scores = [one["scores"][view][attack] for one in told["canaries"]]
            assert find(scores, coins, 0.0, 1 - 0.05 / 2) == finding


def test_a_resumed_run_repeats_its_canaries(planted_run, tmp_path, caplog):
    again = config(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(again, progress=Stop(3))
    assert "privacy.canaries=24: this run is an experiment for 'fedvlm audit'" in caplog.text
    fedvlm.resume(again["output"])
    for name in ("canaries.json", *(f"uploads/client-site-{k}.safetensors" for k in (0, 1))):
        assert (tmp_path / "run" / name).read_bytes() == (planted_run / name).read_bytes()


def test_the_card_of_its_model_warns(planted_run, tmp_path):
    fedvlm.export(planted_run, to=tmp_path / "model")
    assert "**An experiment: 24 canaries," in (tmp_path / "model" / "README.md").read_text()


def test_a_damaged_upload_is_named(planted_run, tmp_path):
    folder = shutil.copytree(planted_run, tmp_path / "run")
    path = folder / "uploads" / "client-site-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FedVLMError, match=r"client-site-1\.safetensors' is damaged"):
        audit(folder)


def test_a_plan_counts_the_rows_that_are_trained_on(planted_run):
    told = json.loads((planted_run / "canaries.json").read_text())["canaries"]
    out = Counter(one["client"] for one in told if not one["trained"])
    plain, planned = (forecast(load(config("x", **p))).rows["train"] for p in ({"privacy": {}}, {}))
    assert planned.most == plain.most - min(out.values())
    assert planned.least == plain.least - max(out.values())


def test_an_algorithm_that_sends_nothing_has_personal_models_only(tmp_path):
    local = config(tmp_path / "run", algorithm={"name": "local"})
    fedvlm.run(local, "train.rounds=1", "train.local_steps=1")
    assert list(audit(tmp_path / "run").views) == ["personal"]


def test_runs_without_canaries_and_folders_without_runs_are_refused(finished_run, tmp_path):
    with pytest.raises(FedVLMError, match=r"has no canaries .* privacy\.canaries=500 output=DIR"):
        audit(finished_run)
    with pytest.raises(FedVLMError, match="there is no folder"):
        audit(tmp_path / "nothing")


PRIVATE = {"unit": "row", "epsilon": 0.5, "delta": 1e-5, "clip": 0.1, "canaries": 24}


def test_too_little_noise_is_found_and_the_command_exits_with_one(tmp_path, monkeypatch):
    steps = {"rounds": 1, "local_steps": 2, "batch_size": 64, "optimizer": "sgd", "lr": 1.0}
    steps |= {"average": "none", "max_grad_norm": None}
    private = config(tmp_path / "run", train=steps, algorithm={"name": "ffa"}, privacy=PRIVATE)
    whole = chance.gaussian
    monkeypatch.setattr(chance, "gaussian", lambda *a: 0 * whole(*a))
    fedvlm.run(private)
    done = CliRunner().invoke(app, ["audit", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert "upload: BROKEN: the bound 1.12 is above the guarantee, epsilon 0.5" in done.output
    assert "a low bound is no proof" in done.output


def test_claims_hold_for_one_canary():
    row = claims_of({"privacy": {"unit": "row", "spent": 2.5, "delta": 1e-5}})
    assert {v: (c.epsilon, c.delta) for v, c in row.items()} == dict.fromkeys(
        ("upload", "global", "personal"), (2.5, 1e-5)
    )
    (view, claim), *others = claims_of(
        {"privacy": {"unit": "client", "spent": 2.0, "delta": 1e-5}}
    ).items()
    assert (view, others) == ("global", [])
    assert claim.epsilon == 4
    assert claim.delta == pytest.approx(1e-5 * (1 + np.exp(2)))

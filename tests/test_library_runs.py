"""The algorithms in whole runs: resumption, messages, files and exports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import fedvlm
from fedvlm.algorithms.table import TABLE, of_run, spare_ranks
from fedvlm.errors import ConfigError
from fedvlm.rounds import federate
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.comparison import compare
from fedvlm.store import files
from fedvlm.tree import cut, pairs, products
from formulas import drive
from test_federate import Stop, bytes_of

pytestmark = pytest.mark.usefixtures("no_pictures")


def settings(small, name):
    """Three rounds with two of three sites each, which take about a second."""
    tree = json.loads(json.dumps(small))
    tree["data"]["scenes"] |= {"rows": 12}
    tree["train"] |= {"rounds": 3, "local_steps": 1, "clients_per_round": 2, "average": "mean"}
    tree["train"]["finish_steps"] = 4
    tree["eval"] |= {"every": 0, "max_rows": 2, "max_new_tokens": 2}
    tree["algorithm"] = {"name": name}
    if name == "scaffold":
        tree["train"] |= {"optimizer": "sgd", "lr": 0.1}
    return tree


@pytest.mark.parametrize("compress", ["none", "int8"])
@pytest.mark.parametrize("name", [n for n in TABLE if n != "share"])
def test_a_stopped_run_of_formulas_resumes_to_the_same_bytes(tmp_path, name, compress):
    """Every algorithm in the real round loop and store, with two of three clients a round."""
    tree = {"algorithm": {"name": name}, "lora": {"rank": 2}, "wire": {"compress": compress}}
    tree["train"] = {"rounds": 4, "clients_per_round": 2}
    if name == "scaffold":
        tree["train"]["optimizer"] = "sgd"
    config = fedvlm.load_config(tree, f"output={tmp_path / 'whole'}")
    spare = spare_ranks(name, config.lora)
    whole = drive(config, spare=spare)
    last = config.train.rounds + of_run(config).final
    assert len(files.read_lines(whole / "metrics.jsonl")) == last + 1
    for after in (0, 2, last - 1) if compress == "none" else [2]:
        stopped = fedvlm.load_config(tree, f"output={tmp_path / f'stopped-{after}'}")
        with pytest.raises(KeyboardInterrupt):
            drive(stopped, Stop(after), spare=spare)
        assert bytes_of(drive(stopped, resume=True, spare=spare)) == bytes_of(whole)


@pytest.mark.parametrize("name", ["ditto", "fedex", "similar"])
def test_a_stopped_run_resumes_to_the_same_bytes(small, tmp_path, name):
    """With a real model: two models a client, spare ranks, and a server that gathers."""
    whole = fedvlm.run(settings(small, name), f"output={tmp_path / 'whole'}")
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        federate.run(settings(small, name), f"output={stopped}", progress=Stop(2))
    federate.resume(stopped)
    assert bytes_of(stopped) == bytes_of(whole.folder)
    assert whole.table["bytes"]["bytes_up"]["total"] > 0
    for line in files.read_lines(whole.folder / "metrics.jsonl")[1:]:
        assert len(set(line["bytes_up"].values())) == 1
        assert all(line["bytes_down"].values())


def test_centralized_training_is_one_client_with_all_rows(small):
    """The steps equal those of one site with the rows of all three sites."""
    tree = settings(small, "centralized")
    tree["train"] |= {"rounds": 1, "local_steps": 2, "clients_per_round": None, "finish_steps": 0}
    tree["train"]["average"] = "none"
    config = fedvlm.load_config(tree)
    engine, partition, _ = preparing.prepare(config)
    rows = np.concatenate([partition.splits[c].train for c in partition.clients])
    assert all(np.array_equal(s.train, rows) for s in engine.partition.splits.values())
    assert engine.config.train.local_steps == 3 * 2
    results = fedvlm.run(config)
    line = files.read_lines(results.folder / "metrics.jsonl")[-1]
    assert len(line["cohort"]) == 1
    assert results.scores("personal") == results.scores("global")
    assert set(results.scores()) == set(partition.clients), "every client is scored on its own rows"


def test_a_client_can_be_named_in_the_prompt(small):
    engine, partition, _ = preparing.prepare(
        fedvlm.load_config(settings(small, "centralized+name"))
    )
    other, _, _ = preparing.prepare(fedvlm.load_config(settings(small, "centralized")))
    for client in partition.clients:
        for row in map(int, partition.splits[client].test):
            question = engine.collator.rows[row]["question"]
            assert question == f"{client}: {other.collator.rows[row]['question']}"


def test_auto_begins_with_the_b_of_the_least_doubt_on_validation_rows(small, monkeypatch):
    from fedvlm.algorithms.auto import OWN
    from fedvlm.engines.cohort import CohortEngine

    asked, begun = [], []
    validate, train = CohortEngine._validate, CohortEngine._train

    def seen(engine, trees, rows):
        found = validate(engine, trees, rows)
        asked.append((trees, found))
        return found

    def started(engine, group):
        begun.append([member.wanted.begin for member in group])
        return train(engine, group)

    monkeypatch.setattr(CohortEngine, "_validate", seen)
    monkeypatch.setattr(CohortEngine, "_train", started)
    tree = settings(small, "auto")
    tree["train"] |= {"rounds": 2, "clients_per_round": 3, "lr": 0.02, "finish_steps": 0}
    fedvlm.run(tree)
    first, second = begun
    assert all(torch.equal(one[n], other[n]) for one in first for other in first for n in one)
    assert {len(trees) for trees, _ in asked} == {len(OWN)}
    for start in second:
        assert any(all(torch.equal(t[n], start[n]) for n in t) for trees, _ in asked for t in trees)
    assert all(0 <= f.doubt <= 1 for _, found in asked for f in found)


@pytest.mark.parametrize("name", ["plora", "auto"])
def test_a_run_with_unequal_ranks_sends_fewer_bytes_from_the_smaller_clients(small, name):
    tree = settings(small, name) | {"lora": {"rank": 4, "ranks": {"site-0": 1, "1$": 2}}}
    tree["train"]["clients_per_round"] = None
    results = fedvlm.run(tree)
    sent = files.read_lines(results.folder / "metrics.jsonl")[1]["bytes_up"]
    assert sent["site-0"] < sent["site-1"] < sent["site-2"]
    for site, ranks in (("site-0", 1), ("site-1", 2), ("site-2", 4)):
        tree_ = files.load_tree(results.adapter(site) / "adapter_model.safetensors")
        for a, b in pairs(tree_).values():
            assert (tree_[a].norm(dim=1) > 0).tolist() == [k < ranks for k in range(4)]
            assert not tree_[b][:, ranks:].any()


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_spare_ranks_export_and_load_as_an_ordinary_adapter(small, name):
    results = fedvlm.run(settings(small, name), "lora.spare=6")
    tree = files.load_tree(results.adapter() / "adapter_model.safetensors")
    config = json.loads((results.adapter() / "adapter_config.json").read_text())
    assert config["r"] == 2 + 6
    assert config["lora_alpha"] / config["r"] == small["lora"]["alpha"] / small["lora"]["rank"]
    opened = fedvlm.open_run(results.folder)
    params = dict(opened.write(tree).named_parameters())
    for a, b in pairs(tree).values():
        for factor in (a, b):
            held = params[factor.replace(".weight", ".default.weight")]
            assert torch.equal(held.detach().cpu(), tree[factor])
    carried = products(cut(tree, 2, 8)).values()
    assert all(t.abs().max() > 0 for t in carried)


def test_all_algorithms_begin_with_the_same_model(small, tmp_path):
    plain = fedvlm.run(settings(small, "lora"), f"output={tmp_path / 'lora'}")
    spare = fedvlm.run(settings(small, "fedex"), f"output={tmp_path / 'fedex'}")
    untuned, other = (
        files.read_lines(r.folder / "metrics.jsonl")[0]["evaluation"] for r in (plain, spare)
    )
    for site, scores in untuned["personal"].items():
        assert scores == pytest.approx(other["personal"][site], abs=1e-5)


def test_a_comparison_gives_every_algorithm_the_settings_that_mean_something_to_it(small):
    tree = settings(small, "fedex") | {"lora": {"rank": 2, "alpha": 4, "spare": 3}}
    found = compare(["fedex", "plora", "ditto"], tree, "algorithm.server_lr=0.5")
    assert {row["algorithm"] for row in found.rows} == {"fedex", "plora", "ditto"}


def test_a_comparison_with_an_algorithm_that_cannot_be_run_says_why(small):
    with pytest.raises(ConfigError, match=r"scaffold.*train\.optimizer=sgd"):
        compare(["plora", "scaffold"], settings(small, "plora"))

"""Runs with many clients: which clients are scored, and what is held in memory."""

import json
import weakref

import pytest
import torch
from safetensors.torch import save

import fedvlm
from fedvlm.cli.live import Plain
from fedvlm.config import load
from fedvlm.engines.shell import Shell
from fedvlm.rounds import federate
from fedvlm.rounds.results import scored
from fedvlm.store import files
from fedvlm.tree import saved_bytes

SITES = ["site-0", "site-1", "site-2"]


@pytest.fixture(scope="module", params=["plora", "auto"])
def both(request, tmp_path_factory):
    """The same run twice: with all clients scored, and with one client scored."""
    folder = tmp_path_factory.mktemp("scale")
    settings = {
        "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16}},
        "partition": {"min_rows": 4},
        "algorithm": {"name": request.param},
        "train": {
            "rounds": 2,
            "clients_per_round": 2,
            "local_steps": 2,
            "batch_size": 4,
            "finish_steps": 2,
        },
        "eval": {"every": 1, "max_rows": 3, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4},
    }
    whole = federate.run({**settings, "output": str(folder / "whole")})
    settings["eval"]["clients"] = 1
    return whole, federate.run({**settings, "output": str(folder / "some")})


def others(results):
    return [site for site in SITES if site not in results.scores()]


def test_the_clients_that_are_scored_are_a_function_of_the_seed():
    clients = [f"client-{k}" for k in range(1000)]
    config = load(None, "eval.clients=10")
    assert scored(config, clients) == scored(config, clients)
    assert scored(config, clients) != scored(load(config, "seed=1"), clients)
    assert list(scored(config, clients)) == sorted(scored(config, clients), key=clients.index)
    assert scored(config, clients[:10]) == scored(load(None), clients[:10]) == tuple(clients[:10])


def test_scoring_fewer_clients_changes_nothing_but_what_is_told(both):
    whole, some = both
    (client,) = some.scores()
    assert some.table["clients"] == 3
    for one, all_ in zip(
        *(files.read_lines(r.folder / "metrics.jsonl") for r in (some, whole)), strict=True
    ):
        for model, scores in (one.pop("evaluation") or {}).items():
            assert list(scores) == [client]
            assert scores[client]["examples"] == all_["evaluation"][model][client]["examples"]
        all_.pop("evaluation")
        assert one == all_
    for path in (whole.folder / "personal").iterdir():
        assert (some.folder / "personal" / path.name).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in (some.folder / "adapters").iterdir()) == [
        f"client-{client}",
        "global",
    ]
    assert {a["client"] for a in some.answers()} == {client}


def test_the_model_of_a_client_that_was_not_scored_can_be_exported(both, tmp_path):
    whole, some = both
    for client in others(some):
        target = fedvlm.export(some.folder, client=client, to=tmp_path / client)
        expected = files.load_tree(whole.adapter(client) / "adapter_model.safetensors")
        found = files.load_tree(target / "adapter_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        settings = [
            json.loads((f / "adapter_config.json").read_text())
            for f in (target, whole.adapter(client))
        ]
        assert settings[0]["r"] == settings[1]["r"]
        card = (target / "README.md").read_text()
        assert "3 clients, 1 of them scored" in card
        assert "On this client's own" not in card


def test_a_run_says_how_many_clients_are_scored(small, capsys):
    small["train"]["rounds"] = 1
    federate.run(small, "eval.clients=2", progress=Plain())
    said = capsys.readouterr().out
    assert "2 of 3 clients are scored (eval.clients)" in said
    assert "fedvlm export --client" in said


def test_a_pass_is_scored_before_the_next_is_trained(small, monkeypatch):
    plain, alive, most = Shell.train, [], []

    def watched(self, tasks):
        for reply in plain(self, tasks):
            alive.append(weakref.ref(next(iter(self.ended[reply.client].values()))))
            yield reply
            del reply
            most.append(sum(ref() is not None for ref in alive))

    monkeypatch.setattr(Shell, "train", watched)
    small["data"]["scenes"]["sites"] = 8
    federate.run(small, "train.rounds=1", "engine.clients=2", "eval.max_new_tokens=2")
    assert len(most) == 8
    assert max(most) <= 3, "at most one pass and the first client of the next"


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"a": torch.zeros(3)},
        {"b": torch.zeros(2, 3), "größe": torch.zeros(5, dtype=torch.bfloat16), "c": torch.ones(0)},
        {"q": torch.zeros(7, dtype=torch.int8), "s": torch.tensor(1.0)},
    ],
)
def test_the_bytes_of_a_message_are_those_of_its_file(tree):
    assert saved_bytes(tree) == (len(save(tree)) if tree else 0)
    assert saved_bytes({name: tensor + 1 for name, tensor in tree.items()}) == saved_bytes(tree)

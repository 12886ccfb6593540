"""The round loop on a small model: results, files, resumption and refusals."""

import contextlib
import json
import random
import signal
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import smallest
from fedvlm.algorithms.base import Visit
from fedvlm.algorithms.table import build
from fedvlm.batches.draw import Length, batches
from fedvlm.batches.objectives import sft_terms
from fedvlm.cli.tables import print_run
from fedvlm.config import load
from fedvlm.errors import DataError, FedVLMError
from fedvlm.models import lora
from fedvlm.rounds import federate
from fedvlm.rounds import prepare as preparing
from fedvlm.rounds.prepare import environment
from fedvlm.rounds.schedule import plan
from fedvlm.seeds import derive
from fedvlm.store import files
from fedvlm.store import run as store
from fedvlm.tree import digest, factor
from stopping import Stop

ALGORITHMS = ("plora", "lora", "fedsa", "ffa", "local")
ENDING = {"average": "mean", "finish_steps": 2}


def bytes_of(folder):
    """File -> digest, without the files that differ between equal runs."""
    skipped = {".lock", "timing.jsonl", "config.yaml", "report.html"}
    return {
        str(p.relative_to(folder)): sha256(_content(p)).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.name not in skipped
    }


def _content(path):
    """The bytes of a file. The digest of config.yaml, which holds the run's folder, is left out."""
    if path.name != "checkpoint.json":
        return path.read_bytes()
    content = json.loads(path.read_bytes())
    return repr(content | {"seal": "", "files": content["files"] | {"config.yaml": ""}}).encode()


def without_pictures(files):
    return {name: digest for name, digest in files.items() if not name.endswith(".png")}


class Finished(dict):
    """Algorithm -> its finished run, on the same clients. A run is made when it is first used.

    Args:
        folder: gets the runs.
        pictures: a context in which runs draw; the run of plora is in it.
    """

    def __init__(self, folder, pictures):
        self.folder, self.pictures = folder, pictures

    def __missing__(self, name):
        algorithm, _, ends = name.partition(" ")
        ending = ENDING if ends else {"average": "none"}
        config = {
            "output": str(self.folder / name.replace(" ", "-")),
            "model": {"name": smallest.model()},
            "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16}},
            "partition": {"min_rows": 4},
            "algorithm": {"name": algorithm},
            "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, **ending},
            "eval": {"every": 1, "max_rows": 3, "max_new_tokens": 3},
            "lora": {"rank": 2, "alpha": 4},
        }
        with self.pictures() if name == "plora" else contextlib.nullcontext():
            self[name] = federate.run(config)
        return self[name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    return Finished(tmp_path_factory.mktemp("runs"), pictures)


def evaluation(results, round_=-1):
    return files.read_lines(results.folder / "metrics.jsonl")[round_]["evaluation"]


def test_the_environment_has_the_version_that_is_installed():
    assert environment()["packages"]["fedvlm"] == version("fedvlm")


@pytest.mark.parametrize("name", [*ALGORITHMS, "lora ended"])
def test_the_output_folder_holds_what_the_readme_says(finished, name):
    folder = finished[name].folder
    for file in (
        "config.yaml",
        "environment.json",
        "partition.json",
        "metrics.jsonl",
        "timing.jsonl",
        "table.json",
        "table.csv",
        "adapters/global/adapter_config.json",
        "adapters/client-site-2/adapter_model.safetensors",
        *(("partition.png", "curves.png") if name == "plora" else ()),
    ):
        assert (folder / file).stat().st_size > 0, file
    rounds = [line["round"] for line in files.read_lines(folder / "metrics.jsonl")]
    assert rounds == ([0, 1, 2, 3] if name == "lora ended" else [0, 1, 2])


@pytest.mark.parametrize("name", ALGORITHMS)
def test_only_what_is_shared_reaches_the_server(finished, name):
    folder = finished[name].folder
    sends = {"plora": "B", "lora": "AB", "fedsa": "A", "ffa": "B", "local": ""}
    state = files.load_tree(next((folder / "server").glob("*.safetensors")))
    assert "".join(sorted({factor(n) for n in state})) == sends[name]
    keeps = {"plora": "A", "lora": "", "fedsa": "B", "ffa": "", "local": "AB"}
    kept = store.Store(folder).personal(["site-0", "site-1", "site-2"])
    assert ["".join(sorted({factor(n) for n in tree})) for tree in kept] == [keeps[name]] * 3


def test_all_algorithms_start_from_the_same_clients_and_the_same_model(finished):
    first = finished["plora"].folder
    for results in (finished[name] for name in ALGORITHMS):
        assert (results.folder / "partition.json").read_bytes() == (
            first / "partition.json"
        ).read_bytes()
        assert evaluation(results, 0) == evaluation(finished["plora"], 0)
        untuned = evaluation(results, 0)
        assert untuned["personal"] == untuned["global"]


def test_who_shares_everything_has_one_model_and_who_shares_nothing_keeps_its_own(finished):
    for name in ("lora", "ffa"):
        assert evaluation(finished[name])["personal"] == evaluation(finished[name])["global"]
    alone = evaluation(finished["local"])
    assert alone["personal"] == alone["personal_before"]
    assert alone["global"] == evaluation(finished["local"], 0)["global"]
    assert finished["local"].table["bytes"]["bytes_up"]["total"] == 0
    for name in ("plora", "fedsa"):
        after = evaluation(finished[name])
        assert after["personal"] != after["personal_before"]
        assert after["personal"] != after["global"]


def test_the_global_model_of_the_round_before_may_be_left_out(finished, tmp_path):
    whole, output = finished["lora"], f"output={tmp_path / 'run'}"
    less = federate.run(whole.folder / "config.yaml", output, "eval.global_before=false")
    before = evaluation(whole)
    assert before.pop("global_before") == evaluation(whole, 1)["global"]
    assert evaluation(less) == before
    models = {name: m for name, m in whole.table["models"].items() if name != "global_before"}
    assert less.table["models"] == models


@pytest.mark.parametrize(("name", "ended"), [("plora", False), ("lora ended", True)])
def test_scores_before_the_aggregation_may_be_left_out(name, ended, finished, tmp_path, capsys):
    whole, output = finished[name], f"output={tmp_path / 'run'}"
    less = federate.run(whole.folder / "config.yaml", output, "eval.personal_before=false")
    expected = [evaluation(whole, n) for n in range(1, len(store.Store(whole.folder).lines()))]
    for found in expected[: len(expected) - ended]:
        del found["personal_before"]
    assert [evaluation(less, n + 1) for n in range(len(expected))] == expected
    print_run(less)
    assert ("personal_before" in less.table["models"]) == ended
    assert ("personal before the last aggregation" in capsys.readouterr().out) == ended


def test_local_tuning_changes_the_personal_models_alone(finished):
    before, after = (evaluation(finished["lora ended"], n) for n in (2, 3))
    assert before == evaluation(finished["lora"], 2), "before the tuning, it equals lora"
    assert after["global"] == before["global"]
    assert after["personal"] != before["personal"]


def test_bytes_are_those_of_the_real_payloads(finished):
    def up(name):
        line = files.read_lines(finished[name].folder / "metrics.jsonl")[1]
        assert line["bytes_up"] == line["bytes_down"]
        return set(line["bytes_up"].values())

    state = next((finished["lora"].folder / "server").glob("*.safetensors"))
    assert up("lora") == {state.stat().st_size}
    assert up("plora") == up("ffa")
    assert max(up("plora")) < max(up("lora"))
    assert max(up("fedsa")) < max(up("lora"))


def test_personal_adapters_combine_the_shared_with_the_own(finished):
    folder = finished["plora"].folder
    state = files.load_tree(folder / "server" / "00002.safetensors")
    for site in ("site-0", "site-1"):
        file = finished["plora"].adapter(site) / "adapter_model.safetensors"
        whole = files.load_tree(file)
        (own,) = store.Store(folder).personal([site])
        assert digest(whole) == digest({**state, **own})


@pytest.mark.parametrize("name", ["reference", "cohort"])
def test_one_client_and_one_round_equal_a_plain_training_loop(small, name):
    small["data"]["scenes"]["sites"] = 1
    small["train"] |= {"rounds": 1, "local_steps": 5, "max_grad_norm": 1.0, "lr": 1e-3}
    config = load(small, "algorithm.name=lora", f"engine.name={name}")
    results = federate.run(config)
    plain = load(config, "output=elsewhere", "engine.name=reference")  # with PEFT's own layers
    engine, partition, _ = preparing.prepare(plain)
    model, params = engine.model.train(), lora.handles(engine.model)
    optimizer = torch.optim.AdamW(params.values(), lr=config.train.lr, weight_decay=0.0)
    rows = partition.splits["site-0"].train
    for batch in batches(rows, 4, 5, derive(0, 1, "site-0", 0, "batches")):
        sft_terms(model, engine.collator.training(batch)).mean().backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    server = files.load_tree(results.folder / "server" / "00001.safetensors")
    for name, tensor in lora.read(params).items():
        assert torch.allclose(server[name], tensor, atol=1e-5), name


def test_the_average_is_weighted_by_examples(small):
    config = load(small, "algorithm.name=lora", "train.rounds=1")
    engine, partition, folder = preparing.prepare(config)
    visits = [Visit(c, 1.0, round=1) for c in partition.clients]
    with folder.locked():
        replies = list(engine.train([federate.Task(v, engine.adapter) for v in visits]))
    total = sum(len(partition.splits[c].train) for c in partition.clients)
    name = next(iter(engine.adapter))
    expected = sum(
        r.upload[name] * (len(partition.splits[r.client].train) / total) for r in replies
    )
    results = federate.run(load(config, f"output={config.output}-2"))
    server = files.load_tree(results.folder / "server" / "00001.safetensors")
    assert torch.allclose(server[name], expected, atol=1e-6)


def test_cohorts_are_sampled_by_seed_and_round():
    config = load(
        None, "algorithm.name=lora", "train.rounds=6", "train.clients_per_round=3", "eval.every=4"
    )
    clients = [f"client-{i}" for i in range(10)]
    rounds = list(plan(config, build(config.algorithm), clients))
    again = list(plan(config, build(config.algorithm), clients))
    assert [r.cohort for r in rounds] == [r.cohort for r in again]
    assert all(len(set(r.cohort)) == 3 for r in rounds)
    assert len({r.cohort for r in rounds}) > 1
    assert [r.number for r in rounds if r.evaluate] == [4, 6]
    other = list(plan(load(config, "seed=1"), build(config.algorithm), clients))
    assert [r.cohort for r in rounds] != [r.cohort for r in other]


def test_a_sampled_cohort_leaves_the_others_alone(small):
    results = federate.run(small, "train.clients_per_round=1", "train.rounds=2")
    lines = results.folder / "metrics.jsonl"
    seen = {c for line in files.read_lines(lines)[1:] for c in line["cohort"]}
    sites = ["site-0", "site-1", "site-2"]
    kept = dict(zip(sites, store.Store(results.folder).personal(sites), strict=True))
    assert {site for site, tree in kept.items() if tree} == seen
    assert set(results.scores()) == {"site-0", "site-1", "site-2"}, "all clients are scored"


def test_batches_cover_every_row_before_one_repeats():
    rows = torch.arange(10).numpy()
    taken = [b.tolist() for b in batches(rows, 4, 6, seed=1)]
    assert [len(b) for b in taken] == [4, 4, 2, 4, 4, 2]
    for epoch in (taken[:3], taken[3:]):
        assert sorted(row for batch in epoch for row in batch) == list(range(10))
    assert taken[:3] != taken[3:]


def test_batches_sorted_by_length_hold_the_same_rows_with_less_padding():
    rows, lengths = np.arange(100, 140), np.random.default_rng(0).integers(5, 50, 140)
    length = Length(lambda row: int(lengths[row]), seed=3)
    plain, by_length = (list(batches(rows, 4, 13, 1, each)) for each in (None, length))
    other = list(batches(rows[::-1] - 100, 4, 13, 2, length))

    def padding(found):
        return sum(len(b) * lengths[b].max() - lengths[b].sum() for b in found)

    assert sorted(np.concatenate(by_length[:10])) == rows.tolist(), "a pass takes every row once"
    assert sorted(np.concatenate(by_length[10:])) == sorted(np.concatenate(plain[10:]))
    assert padding(by_length) < padding(plain) / 3
    longest = [lengths[b].max() for b in by_length[:10]]
    assert longest != sorted(longest), "the order of batches is random, not by length"
    ranks, others = (np.argsort([lengths[b].max() for b in x[:10]]) for x in (by_length, other))
    assert (ranks == others).mean() >= 0.8, "clients have their long batches at the same step"


@pytest.mark.parametrize("name", ["plora", "lora ended"])
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_stopped_run_resumes_to_the_same_bytes(small, finished, name, after):
    algorithm, _, ends = name.partition(" ")
    small["train"] |= ENDING if ends else {}
    config = load(small | {"algorithm": {"name": algorithm}})
    with pytest.raises(KeyboardInterrupt):
        federate.run(config, progress=Stop(after))
    assert not store.is_done(config.output)
    federate.resume(config.output)
    assert bytes_of(config.output) == without_pictures(bytes_of(finished[name].folder))


def test_a_finished_run_resumes_to_its_results(finished):
    before = bytes_of(finished["plora"].folder)
    assert federate.resume(finished["plora"].folder).table == finished["plora"].table
    assert bytes_of(finished["plora"].folder) == before


@pytest.mark.slow
def test_a_run_killed_at_random_moments_resumes_to_the_same_bytes(small, finished, commands):
    config = Path(small["output"]).parent / "config.yaml"
    config.write_text(yaml.safe_dump(small))
    folder = Path(small["output"])
    draw = random.Random(0)
    arguments, kills = [str(config)], 0
    for _ in range(40):
        commands.start("run", *arguments)
        seen = draw.randrange(1, 4)  # lines of progress before the kill
        while kills < 3 and len(commands.lines()) < seen and commands.running():
            time.sleep(0.01)
        if kills < 3:
            time.sleep(draw.random() * 0.3)
            commands.send(signal.SIGKILL)
            kills += 1
        code = commands.code()
        if code == 0:
            break
        assert code == -signal.SIGKILL, commands.err.read_text()
        if store.is_run(folder):
            arguments = ["--resume", str(folder)]
    assert code == 0
    assert kills == 3
    assert bytes_of(folder) == bytes_of(finished["plora"].folder)


def test_a_folder_inside_the_data_is_no_output(small, tmp_path):
    small["data"] = {"path": str(tmp_path)}
    with pytest.raises(FedVLMError, match=r"lies in data\.path"):
        federate.run(small)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(FedVLMError, match="holds no run"):
        federate.resume(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=/no/such.parquet"], "/no/such.parquet"),
        (["model.name=./no-model"], "no model folder"),
        (["lora.rank=999"], "lora.rank"),
        (["lora.target=nothing_like_it"], "matches none"),
        (["algorithm.name=share", "algorithm.share={nothing_like_it: B}"], "matches none"),
        (["partition.kind=iid", "partition.clients=1000"], "1000"),
        (["partition.kind=column", "partition.column=hospital"], "hospital"),
        (["partition.kind=dirichlet", "partition.clients=4", "partition.min_rows=12"], "12"),
    ],
)
def test_a_run_that_cannot_be_done_writes_nothing(small, overrides, said):
    with pytest.raises(FedVLMError, match=said):
        federate.run(small, *overrides)
    assert not Path(small["output"]).exists()


def test_a_second_run_in_the_same_folder_is_refused(small, finished):
    small["output"] = str(finished["plora"].folder)
    before = bytes_of(small["output"])
    with pytest.raises(FedVLMError, match="holds a finished run"):
        federate.run(small)
    assert bytes_of(small["output"]) == before


def test_a_diverging_client_is_named(small):
    with pytest.raises(FedVLMError, match=r"client 'site-\d' diverged in round \d: .*train\.lr"):
        federate.run(small, "train.lr=1e30", "train.max_grad_norm=null", "train.optimizer=sgd")


def test_validation_rows_can_be_scored_instead(small):
    results = federate.run(small, "eval.split=val", "train.rounds=1")
    partition = json.loads((results.folder / "partition.json").read_text())
    assert results.table["split"] == "val"
    assert partition


def test_an_empty_validation_split_is_refused(small):
    with pytest.raises(DataError, match="val"):
        federate.run(small, "eval.split=val", "data.val_fraction=0")

"""Algorithms from outside the package: as objects, and from an installed package."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fedvlm
import smallest
from fedvlm.algorithms import table
from fedvlm.algorithms.sharing import sharing
from fedvlm.cli.algorithms import print_algorithms
from fedvlm.config import dump, load, own
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.rounds.contenders import planned
from fedvlm.store import files
from test_federate import Stop, bytes_of
from toy import FEDAVG

EXAMPLE = Path(__file__).parents[1] / "examples" / "fedrep"
SHORT = (
    f"model.name={smallest.model()}",
    "data.scenes.sites=2",
    "data.scenes.rows=14",
    "partition.min_rows=4",
    "train.rounds=1",
    "train.local_steps=3",
    "train.batch_size=4",
    "eval.max_rows=2",
    "eval.max_new_tokens=2",
    "eval.every=0",
    "lora.rank=2",
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder with the example package, installed by pip."""
    folder = tmp_path_factory.mktemp("fedrep")
    source = shutil.copytree(EXAMPLE, folder / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
    ]
    target = folder / "site"
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def fedvlm_(warm, installed):
    """The command line, with the example package installed."""
    paths = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])

    def command(*words):
        environment = {**warm.env, "PYTHONPATH": paths}
        return subprocess.run(
            [warm.fedvlm, *words], env=environment, capture_output=True, text=True
        )

    return command


@pytest.fixture(scope="module")
def compared(fedvlm_, tmp_path_factory):
    """A comparison of the example with an algorithm of the table, in two processes."""
    out = tmp_path_factory.mktemp("compared") / "out"
    words = ("compare", "fedrep,plora", f"output={out}", "algorithm.head_steps=1", *SHORT)
    done = fedvlm_(*words, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    return out


def test_the_example_is_a_package_of_one_short_file():
    assert [p.name for p in EXAMPLE.glob("*.py")] == ["fedvlm_fedrep.py"]
    assert len((EXAMPLE / "fedvlm_fedrep.py").read_text().splitlines()) < 80


def test_an_installed_algorithm_is_compared_by_the_command_line(compared):
    rows = list(csv.DictReader((compared / "comparison.csv").open()))
    assert {row["algorithm"] for row in rows} == {"fedrep", "plora"}
    assert {row["bytes_up"] for row in rows} == {rows[0]["bytes_up"]}, "both algorithms send only B"
    config = (compared / "fedrep-seed-0" / "config.yaml").read_text()
    assert "head_steps: 1" in config


def test_an_installed_algorithm_is_listed_exported_and_checked(compared, fedvlm_):
    run = compared / "fedrep-seed-0"
    listed = fedvlm_("algorithms", "fedrep").stdout
    assert "algorithm.head_steps" in listed
    assert "steps of a round that train A" in " ".join(listed.split())
    assert "fedrep" in fedvlm_("algorithms").stdout
    exported = fedvlm_("export", str(run), "--client", "site-0")
    assert exported.returncode == 0, exported.stderr
    assert (Path(exported.stdout.strip()) / "adapter_model.safetensors").exists()
    wrong = fedvlm_("run", "algorithm.name=fedrep", "algorithm.head_stepz=1", "seed=-1")
    assert wrong.returncode == 2
    assert "algorithm.head_stepz': did you mean 'algorithm.head_steps'?" in wrong.stderr
    assert "seed: " in wrong.stderr, "the error lists all mistakes"
    assert "Traceback" not in wrong.stderr


def test_without_the_package_its_runs_say_what_is_missing(compared, monkeypatch):
    with pytest.raises(ConfigError, match=r"algorithm\.name 'fedrep' is unknown"):
        fedvlm.open_run(compared / "fedrep-seed-0")


@pytest.fixture
def fedrep(installed, monkeypatch):
    """The example's algorithm, in this process."""
    monkeypatch.syspath_prepend(str(installed))
    import fedvlm_fedrep

    return fedvlm_fedrep


def test_fedrep_trains_a_then_b_and_sends_b(fedrep):
    name = "layer.lora_{}.weight"
    initial = {name.format("A"): torch.ones(1, 2), name.format("B"): torch.zeros(3, 1)}
    clients = {"x": (1.0, lambda n, now: now - 1.5), "y": (1.0, lambda n, now: now - 3.0)}
    run = fedvlm.simulate(fedrep.fedrep(2), clients, initial, 1, steps=5, lr=0.1)
    first, last = run.ends["x"]
    a, b = (name.format(f) for f in "AB")
    assert torch.equal(first[b], initial[b])
    assert torch.allclose(first[a], 1.5 - 0.5 * torch.ones(1, 2) * 0.9**2)
    assert torch.equal(last[a], first[a])
    assert torch.allclose(last[b], 1.5 * torch.ones(3, 1) * (1 - 0.9**3))
    assert {n for up in run.uploads.values() for n in up} == {b}
    assert not torch.equal(run.kept["x"][a], run.kept["y"][a])


@pytest.mark.parametrize("head", [0, 3])
@pytest.mark.parametrize("engine", ["reference", "cohort"])
def test_a_stretch_of_no_steps_is_one(fedrep, small, no_pictures, head, engine):
    small["train"] |= {"rounds": 1, "local_steps": 3}
    small["eval"] |= {"every": 0, "max_rows": 1, "max_new_tokens": 1}
    del small["algorithm"]
    results = fedvlm.run(small, f"engine.name={engine}", algorithm=fedrep.fedrep(head))
    still = "lora_A" if head == 0 else "lora_B"
    initial = fedvlm.load_config(small).lora.rank
    tree = files.load_tree(results.adapter("site-0") / "adapter_model.safetensors")
    moved = {n for n, t in tree.items() if "lora_B" in n and t.any()}
    assert initial == 2
    assert bool(moved) == (still == "lora_A"), "B changes only if it is trained"


# Objects


def test_an_object_runs_resumes_and_is_compared(small, tmp_path, no_pictures):
    small["eval"] |= {"every": 0, "max_rows": 1, "max_new_tokens": 1}
    named = fedvlm.run(small, f"output={tmp_path / 'named'}")
    del small["algorithm"]
    plora = sharing({"": "B"})
    whole = fedvlm.run(small, f"output={tmp_path / 'whole'}", algorithm=plora)
    tree, other = (
        files.load_tree(r.adapter("site-1") / "adapter_model.safetensors") for r in (whole, named)
    )
    assert all(torch.equal(tree[n], t) for n, t in other.items())
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(small, f"output={stopped}", algorithm=plora, progress=Stop(1))
    with pytest.raises(FedVLMError, match=r"given as an object; give it again"):
        fedvlm.resume(stopped)
    fedvlm.resume(stopped, algorithm=plora)
    assert bytes_of(stopped) == bytes_of(whole.folder)
    found = fedvlm.compare(["plora", ("mine", plora)], small, f"output={tmp_path / 'compared'}")
    scores = {row["algorithm"]: row["personal"] for row in found.rows}
    assert scores["mine"] == scores["plora"]
    with pytest.raises(FedVLMError, match=r"mine-seed-0' holds a run of an object"):
        fedvlm.compare(["plora", ("mine", sharing({}))], small, f"output={tmp_path / 'compared'}")
    assert fedvlm.open_run(whole.folder, algorithm=plora).algorithm is plora
    with pytest.raises(FedVLMError, match=r"given as an object; give it again in Python"):
        _ = fedvlm.open_run(whole.folder).algorithm


def test_an_object_and_settings_for_another_algorithm_exclude_each_other(small):
    with pytest.raises(ConfigError, match=r"leave out algorithm\.name"):
        fedvlm.run({**small, "algorithm": {"name": "lora"}}, algorithm=sharing({}))
    with pytest.raises(ConfigError, match=r"leave out algorithm\.server_lr"):
        fedvlm.run({**small, "algorithm": {"server_lr": 0.5}}, algorithm=sharing({}))
    with pytest.raises(ConfigError, match=r"leave out algorithm\.prox_mu"):
        own(load({**small, "algorithm": {}}), "algorithm.prox_mu=3")
    with pytest.raises(ConfigError, match=r"leave out algorithm\.name"):
        own({"algorithm": "lora"})
    assert own(load({**small, "algorithm": {}})).algorithm.name == table.OWN
    with pytest.raises(FedVLMError, match=r"must be a fedvlm\.Algorithm, got 'lora'"):
        fedvlm.run(small, algorithm="lora")
    with pytest.raises(ConfigError, match=r"hand it over instead: fedvlm\.run\(\.\.\., algorithm="):
        fedvlm.run({**small, "algorithm": sharing({})})


@pytest.mark.parametrize(
    ("algorithms", "jobs", "said"),
    [
        ([("mine", sharing({}))], 2, "cannot go to another process; set jobs=1"),
        ([("a/b", sharing({}))], 1, "'a/b' is no label"),
        ([("lora", sharing({}))], 1, "'lora' is no label"),
        ([("x", sharing({})), ("x", FEDAVG)], 1, "'x' stands for two algorithms"),
        ([sharing({})], 1, r"a name, or \(label, fedvlm\.Algorithm\)"),
        ([("x", "lora")], 1, r"a name, or \(label, fedvlm\.Algorithm\)"),
        (["lorra"], 1, "did you mean 'lora'"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(small, algorithms, jobs, said):
    del small["algorithm"]
    with pytest.raises(ConfigError, match=said):
        fedvlm.compare(algorithms, small, jobs=jobs)


def test_a_setting_that_none_of_the_compared_takes_is_refused(small):
    del small["algorithm"]
    with pytest.raises(ConfigError, match=r"mix_a: none of lora, plora has this setting"):
        fedvlm.compare(["lora", "plora"], small, "algorithm.mix_a=0.2")
    with pytest.raises(ConfigError, match=r"lora\.ranks: none of fedex, pair has this setting"):
        fedvlm.compare(["fedex", "pair"], small, "lora.ranks={x: 1}")
    runs = planned(["lora", "mix"], small, "algorithm.mix_a=0.2")
    assert runs["mix seed 0"].algorithm.mix_a == 0.2
    assert "mix_a" not in json.dumps(runs["lora seed 0"].model_dump())


@pytest.mark.parametrize("name", ["auto", "lora", "ditto"])
def test_a_whole_configuration_is_compared_like_a_short_one(small, tmp_path, name):
    """`--print-config` writes every setting with its default; none of these is meant."""
    whole = load({**small, "algorithm": {"name": name}})
    (tmp_path / "c.yaml").write_text(dump(whole))
    for source in (whole, tmp_path / "c.yaml"):
        runs = planned(["plora", "ditto", "fedsa"], source)
        assert runs["ditto seed 0"].algorithm.prox_mu == 0.1
        assert len(runs) == 3


NO_SECTION = fedvlm.Entry("", "", "", lambda c, lora: sharing({}), settings=dict)


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch, capsys):
    from importlib.metadata import EntryPoint

    points = {
        "broken": EntryPoint("broken", "no_such_module:X", table.GROUP),
        "other": EntryPoint("other", "json:dumps", table.GROUP),
    }
    points["dict"] = EntryPoint("dict", "test_outside:NO_SECTION", table.GROUP)
    points["lora"] = points["own:x"] = points["other"]
    monkeypatch.setattr(
        table, "entry_points", lambda group, name=None: [points[name]] if name else points.values()
    )
    assert set(table.names()) == {*table.TABLE, "broken", "other", "dict"}
    with pytest.raises(ConfigError, match=r"'broken' .* cannot be loaded from 'no_such_module:X'"):
        load(None, "algorithm.name=broken")
    with pytest.raises(ConfigError, match=r"'json:dumps' must be a fedvlm\.Entry, got function"):
        load(None, "algorithm.name=other")
    with pytest.raises(
        ConfigError, match=r"subclass of fedvlm\.AlgorithmConfig, got <class 'dict'>"
    ):
        load(None, "algorithm.name=dict")
    print_algorithms()
    said = " ".join(capsys.readouterr().out.split())
    assert "error: algorithm 'broken'" in said.replace(" │ ", " ")
    assert "plora" in said

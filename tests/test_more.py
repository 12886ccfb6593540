"""More rounds for a run that has begun."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import fedvlm
from fedvlm.config import load
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.rounds import more
from fedvlm.rounds.results import Results
from fedvlm.store import run as stores
from fedvlm.store.files import read_lines
from fedvlm.store.run import Store
from stopping import Stop

CLIENTS = ["site-0", "site-1", "site-2"]
ENDINGS = {"none": {"average": "none"}, "mean": {"average": "mean", "finish_steps": 2}}


def settings(small, folder, rounds, ending="mean", **train):
    whole = small["train"] | {"rounds": rounds, "local_steps": 1, **ENDINGS[ending], **train}
    return small | {"output": str(folder), "train": whole}


def trees(folder):
    """All factors that a run has: of the server, of the clients, and of the exported adapters."""
    store = Store(folder)
    found = [store.server(), *store.personal(CLIENTS)]
    return found + [load_file(p) for p in sorted(folder.glob("adapters/*/*.safetensors"))]


def same(one, other):
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(t, theirs[n]) for n, t in mine.items())


def lines(folder):
    return [
        (line["round"], line.get("train_loss"), line["evaluation"])
        for line in read_lines(folder / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("more")


@pytest.mark.parametrize("ending", ENDINGS)
def test_two_rounds_and_then_four_are_four(small, runs, ending):
    whole = fedvlm.run(settings(small, runs / f"whole-{ending}", 4, ending))
    first = fedvlm.run(settings(small, runs / f"two-{ending}", 2, ending))
    folder, before = first.folder, first.table
    with pytest.raises(KeyboardInterrupt):
        fedvlm.resume(folder, "train.rounds=4", progress=Stop(4))
    # The tables of the finished run stand until the added rounds are done.
    assert Results.read(folder).table == before
    assert not stores.is_done(folder)
    with pytest.raises(FedVLMError, match=r"unfinished run; finish it first"):
        fedvlm.open_run(folder)
    longer = fedvlm.resume(folder)
    same(trees(folder), trees(whole.folder))
    assert lines(folder) == lines(whole.folder)
    assert longer.table == whole.table | {"planned": [{"rounds": 2, "done": 2}]}
    assert fedvlm.open_run(folder).config.train.rounds == 4
    assert "planned before: 2" in fedvlm.write_report(folder).read_text()
    assert fedvlm.resume(folder, "train.rounds=4").table == longer.table


@pytest.fixture
def done(runs, small, tmp_path):
    """A copy of a finished run of two rounds, whose ending has been."""
    source = runs / "done"
    if not source.exists():
        fedvlm.run(settings(small, source, 2))
    return shutil.copytree(source, tmp_path / "copy")


def test_a_kill_between_the_checkpoint_and_the_settings_loses_nothing(done, monkeypatch):
    from fedvlm.store import replanned

    def killed(path, text):
        raise KeyboardInterrupt

    monkeypatch.setattr(replanned, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        fedvlm.resume(done, "train.rounds=3")
    monkeypatch.undo()
    assert "rounds: 2" in (done / "config.yaml").read_text()
    assert fedvlm.resume(done).table["rounds"] == 3


def test_fewer_rounds_than_are_done_are_refused(done):
    kept = (done / "checkpoint.json").read_bytes()
    with pytest.raises(ConfigError, match=r"train\.rounds=1: the run has done 2 rounds already"):
        fedvlm.resume(done, "train.rounds=1")
    assert (done / "checkpoint.json").read_bytes() == kept


def test_an_unfinished_run_may_end_earlier_where_it_was_scored(small, runs, done, caplog):
    folder = runs / "stopped"
    long = settings(small, folder, 9, schedule="linear")
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(long | {"eval": small["eval"] | {"every": 0}}, progress=Stop(6))
    with pytest.raises(ConfigError, match=r"was not scored .* give 3 or more"):
        more.check(folder, load(folder / "config.yaml", "train.rounds=2"), ends=False)
    shorter = fedvlm.resume(folder, "train.rounds=2")
    assert shorter.table["planned"] == [{"rounds": 9, "done": 2}]
    assert "train.schedule=linear, which counts on all rounds" in caplog.text
    assert "told 9 rounds when it began, not 2" in fedvlm.write_report(folder).read_text()
    assert [line[0] for line in lines(folder)] == [line[0] for line in lines(done)]


def test_deployed_and_private_runs_keep_their_rounds(done):
    (done / stores.SITES).write_text(json.dumps({}))
    with pytest.raises(ConfigError, match="a deployed run keeps its 2 rounds"):
        fedvlm.resume(done, "train.rounds=3")
    (done / stores.SITES).unlink()
    private = load(
        {
            "algorithm": {"name": "lora"},
            "train": {"rounds": 3},
            "privacy": {"unit": "client", "epsilon": 3, "delta": 1e-3},
        }
    )
    with pytest.raises(ConfigError, match=r"the noise of this run was chosen for 2 rounds"):
        more.check(done, private, True)

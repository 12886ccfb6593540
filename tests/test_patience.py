"""Rounds that end where the validation loss no longer falls."""

from __future__ import annotations

import math

import pytest

import fedvlm
from fedvlm.cli.tables import print_run
from fedvlm.config import load
from fedvlm.deploy.nvflare import federation
from fedvlm.engines.shell import Shell
from fedvlm.errors import ConfigError
from fedvlm.rounds import comparison
from fedvlm.rounds.patience import LOSSES, exhausted
from fedvlm.store.files import read_lines
from stopping import Stop
from test_more import same, settings, trees


def lines(*losses):
    """Lines of metrics, where None is a round without an evaluation."""
    told = [{"round": n} | ({LOSSES: {"a": x}} if x else {}) for n, x in enumerate(losses, 1)]
    return [{"round": 0}, *told]


@pytest.mark.parametrize(
    ("losses", "since", "over"),
    [
        ([3, 2, 1], 0, False),
        ([3, 2, 2], 0, False),
        ([3, 2, 2, 2.5], 0, True),
        ([3, None, 4, None, 4], 0, True),
        ([3, 4, 2.9, 3], 0, False),
        ([3, math.nan, math.nan], 0, True),
        ([3, 4, 4, 4], 3, False),  # rounds before the number of rounds changed do not count
        ([3, 4, 4, 4, 4], 3, True),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(losses, since, over):
    assert exhausted(lines(*losses), 2, since) is over


class Script:
    """Replaces the validation losses by a list; the real ones are looked at on the way."""

    def __init__(self, monkeypatch, losses):
        real, self.left = Shell.validate, list(losses)

        def validate(engine, models):
            found = real(engine, models)
            splits = engine.partition.splits
            assert set(found) == {c for c in splits if len(splits[c].val)}
            assert all(0 < loss < 100 for loss in found.values())
            return dict.fromkeys(found, self.left.pop(0))

        monkeypatch.setattr(Shell, "validate", validate)


def test_a_run_that_stops_early_is_a_run_of_that_many_rounds(small, tmp_path, monkeypatch, capsys):
    script = Script(monkeypatch, [3, 2, 2.5])
    held = {"data": small["data"] | {"val_fraction": 0.25}}
    asked = settings(small, tmp_path / "run", 6) | held
    asked["train"] |= {"patience": 1}
    with pytest.raises(KeyboardInterrupt):
        fedvlm.run(asked, progress=Stop(9))  # after round 3, in the ending
    assert not script.left
    found = fedvlm.resume(tmp_path / "run")
    whole = fedvlm.run(settings(small, tmp_path / "whole", 3) | held)
    same(trees(found.folder), trees(whole.folder))
    told = {"rounds": 6, "done": 3, "stopped": True}
    assert found.table == whole.table | {"planned": [told]}
    assert read_lines(found.folder / "metrics.jsonl")[-1]["stopped"] == 3
    print_run(found)
    assert "stopped after round 3 of 6" in capsys.readouterr().out
    assert "planned: 6" in fedvlm.write_report(found.folder).read_text()
    assert comparison.done(load(asked)), "a comparison takes it for the run that it asked for"
    script.left = [9]
    assert fedvlm.resume(found.folder, "train.rounds=8").table["planned"] == [
        told,
        {"rounds": 3, "done": 3},
        {"rounds": 8, "done": 4, "stopped": True},
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval": {"every": 0}}, "eval.every=0 makes none"),
        ({"data": {"val_fraction": 0}}, "needs validation rows"),
        ({"privacy": {"unit": "row", "epsilon": 3, "delta": 1e-3}}, "which has no noise"),
    ],
)
def test_settings_that_patience_cannot_have_are_refused(settings, said):
    with pytest.raises(ConfigError, match=f"train.patience=2 .*{said}"):
        load({"algorithm": {"name": "lora"}, "train": {"patience": 2}, **settings})


def test_a_deployed_run_has_no_patience():
    config = load({"algorithm": {"name": "lora"}, "train": {"patience": 2}})
    with pytest.raises(ConfigError, match="which no site sends"):
        federation.check(config, resume=False)

"""The configuration: all mistakes at once, with the nearest valid name."""

import pytest

from fedvlm.config import dump, load
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config


def problems(*overrides, source=None):
    with pytest.raises(ConfigError) as caught:
        load(source, *overrides)
    return caught.value.problems


def test_defaults_are_valid_and_survive_a_round_trip(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(dump(load()))
    assert load(path) == load()
    assert load().algorithm.name == Config().algorithm.name == "auto"


def test_overrides_win_over_the_file(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\ntrain: {rounds: 7, lr: 1e-4}\n")
    config = load(path, "train.rounds=9")
    assert (config.seed, config.train.rounds, config.train.lr) == (3, 9, 1e-4)


def test_all_mistakes_are_reported_at_once_with_the_nearest_names():
    found = problems("trian.rounds=3", "train.lrr=1", "train.lr=fast", "seed=-1", "nonsense")
    assert len(found) == 5
    text = "\n".join(found)
    assert "unknown key 'trian': did you mean 'train'?" in text
    assert "unknown key 'train.lrr': did you mean 'train.lr'?" in text
    assert "train.lr: " in text
    assert "'fast'" in text
    assert "seed: " in text
    assert "'nonsense' is not of the form key=value" in text


def test_a_key_given_without_its_section_is_found():
    assert "did you mean 'train.rounds'?" in problems("rounds=3")[0]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.name=plara", "did you mean 'plora'?"),
        ("partition.kind=column", "partition.column"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.rounds=1.5", "1.5"),
        ("data.test_fraction=0.95", "no rows are left to train"),
        ("data.scenes.strength=2", "less than or equal to 1"),
        ("train.rounds.x=1", "train.rounds"),
    ],
)
def test_impossible_values_are_refused_by_name(override, said):
    assert said in "\n".join(problems(override))


def test_steps_and_epochs_exclude_each_other():
    assert "not both" in problems("train.local_steps=2", "train.local_epochs=1")[0]
    train = load(None, "train.local_epochs=2", "train.batch_size=8").train
    assert train.steps(rows=20) == 6
    assert load(None, "train.local_steps=3").train.steps(rows=1000) == 3


def test_an_own_share_map_names_the_algorithm_and_refuses_another():
    assert load({"algorithm": {"share": {"vision": "B"}}}).algorithm.name == "share"
    assert "share" in problems(source={"algorithm": {"name": "lora", "share": {"x": "A"}}})[0]
    assert "regular expression" in problems(source={"algorithm": {"share": {"(": "A"}}})[0]


@pytest.mark.parametrize("text", ["- a list", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert str(path) in problems(source=path)[0]


def test_a_missing_file_is_named():
    assert "nowhere.yaml" in problems(source="nowhere.yaml")[0]


def test_schedules_start_full_and_warm_up():
    train = load(None, "train.rounds=10", "train.schedule=linear").train
    assert train.rate_scale(1) == 1.0
    assert train.rate_scale(6) == pytest.approx(0.5)
    assert train.rate_scale(11) == 1.0  # local tuning at the end
    warm = load(None, "train.rounds=10", "train.schedule=cosine", "train.warmup_rounds=3").train
    assert [warm.rate_scale(r) for r in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 1.0]
    assert 0 < warm.rate_scale(10) < 0.1

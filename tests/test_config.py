"""The configuration: all mistakes at once, with the nearest valid name."""

import enum
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm.config import absent, dump, load, read_file
from fedvlm.deploy.policy import Policy
from fedvlm.errors import MOST, ConfigError
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


# Values: data are text, a number is a number

TEXTS = ("no", "on", "007", "2024-01-01", "a: b #c", "Größe #1", "*", "0x1")
NO_NUMBERS = ("true", "yes", "007", "0x10", "1_000", "1:30", "-1", "1.5", "1e400", "[1]", "5#6")


@pytest.mark.parametrize(
    "text", ["no", "on", "007", "2024-01-01", "a: b #c", "Größe #1", "*", "0x1"]
)
def test_a_text_stays_as_it_is_written(text, tmp_path):
    assert load(None, f"partition.column={text}").partition.column == text
    path = tmp_path / "c.yaml"
    path.write_text(dump(load({"partition": {"column": text}})))
    assert load(path).partition.column == text


def test_a_whole_number_may_name_a_column():
    assert load(None, "partition.column=2024").partition.column == "2024"
    assert load({"partition": {"column": 2024}}).partition.column == "2024"
    assert load(None, 'partition.column="2024"').partition.column == "2024"


@pytest.mark.parametrize("text", ["1e2", "2024.0", "true", "[a]"])
def test_a_text_that_looks_like_another_type_needs_quotes(text):
    assert "partition.column='\"TEXT\"'" in problems(f"partition.column={text}")[0]
    assert load(None, f'partition.column="{text}"').partition.column == text


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"train.rounds={v}"
            for v in [
                "true",
                "yes",
                "007",
                "0x10",
                "1_000",
                "1:30",
                "-1",
                "1.5",
                "1e400",
                "[1]",
                "5#6",
            ]
        ),
        "train.rounds=5 # five",
        *(f"train.lr={v}" for v in ("true", "1_0.5", "0x1", "' 1'", "--1")),
        "lora.ranks={a: true}",
        "lora.ranks={a: '1_0'}",
        "engine.memory=true",
        "engine.memory=Auto",
        "seed=99999999999999999999",
        "partition.lists={a: [0, true]}",
        "partition.lists={a: [0, 99999999999999999999]}",
        "output=",
        'output=""',
        'data.path=""',
        'data.columns.image=""',
    ],
)
def test_no_value_is_taken_for_another_type(override):
    key = override.partition("=")[0]
    extra = ["partition.kind=explicit"] if "lists" in key else []
    assert problems(override, *extra)[0].startswith(key)


@pytest.mark.parametrize("text", ["20", "20.0", "2e1", '"20"', "+20"])
def test_a_number_may_be_written_in_several_ways(text):
    assert load(None, f"train.rounds={text}").train.rounds == 20


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_text_in_quotes_is_that_text(text):
    tree = {"partition": {"column": text}, "output": text}
    found = load(tree)
    assert (found.partition.column, found.output) == (text, text)


def test_an_unreadable_mapping_is_explained():
    (found,) = problems("lora.ranks={a: 1, a: 2}")
    assert "'a' stands in line 1 and again in line 1" in found


@pytest.mark.parametrize(
    "override",
    ["=3", "a.b.c.d.e=1", "__class__.x=1", "a..b=1", ".=1", "train.rounds.x=1", "x" * 10**6],
)
def test_odd_keys_are_refused_in_few_words(override):
    assert len(str(ConfigError(problems("train.rounds=3", override)))) < 1500
    assert len(problems("a." * 10**5 + "b=1")[0]) < 300


def test_many_mistakes_and_long_values_give_a_short_message():
    with pytest.raises(ConfigError) as caught:
        load({"train": {f"k{i}": 1 for i in range(10**4)} | {"rounds": "x\x1b[2J" * 10**4}})
    text = str(caught.value)
    assert len(text) <= MOST
    assert "more" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("pattern", ["(", "a{99999}", "(" * 5000 + ")" * 5000])
def test_a_pattern_that_cannot_be_read_is_refused_with_all_other_mistakes(pattern):
    for tree in ({"lora": {"target": pattern}}, {"lora": {"ranks": {pattern: 2}}}):
        found = problems("seed=-1", source=tree)
        assert len(found) == 2
        assert any("regular expression" in text for text in found)
    assert "regular expression" in problems(source={"algorithm": {"share": {pattern: "A"}}})[0]


# Settings from Python


class Rounds(enum.IntEnum):
    FEW = 3


class Name(enum.StrEnum):
    SITE = "site"


def test_paths_tuples_and_numbers_of_numpy_are_settings():
    lists = {1: (0, np.int64(1)), "b": [2]}
    tree = {
        "output": Path("runs/x"),
        "train": {"rounds": Rounds.FEW, "lr": np.float32(0.5)},
        "partition": {"kind": "explicit", "lists": lists},
        "eval": {"group_by": Name.SITE},
    }
    found = load(tree)
    assert (found.output, found.train.rounds, found.train.lr) == ("runs/x", 3, 0.5)
    assert found.partition.lists == {"1": [0, 1], "b": [2]}
    assert found.eval.group_by == "site"
    assert tree["output"] == Path("runs/x")
    assert tree["partition"]["lists"] is lists
    assert type(lists[1]) is tuple


def test_overrides_leave_the_callers_dict_as_it_is():
    shared = {"rounds": 3}
    tree = {"train": shared}
    assert load(tree, "train.rounds=4").train.rounds == 4
    assert tree == {"train": {"rounds": 3}}


def test_objects_that_are_no_settings_are_all_named_by_key_and_type():
    import datasets

    loop = {}
    loop["lora"] = loop
    rows = datasets.Dataset.from_dict({"a": [1]})
    found = problems(
        source={
            "data": {"path": rows, "split": b"train"},
            "train": {"lr": {1, 2}, "rounds": object(), "batch_size": np.arange(3)},
            "lora": loop,
            "output": "a\0b",
            "model": {"name": "\ud800"},
            None: 1,
        }
    )
    text = "\n".join(found)
    for key, said in {
        "data.path": "datasets.arrow_dataset.Dataset); write the data set to a file",
        "data.split": "builtins.bytes",
        "train.lr": "builtins.set",
        "train.rounds": "builtins.object",
        "train.batch_size": "numpy.ndarray",
        "lora.lora": "holds itself",
        "output": "a character that no text has",
        "model.name": "a character that no text has",
        "the configuration: the key None": "no text",
    }.items():
        assert key in text
        assert said in text


@pytest.mark.parametrize("source", [[1], object(), 5, b"x"])
def test_a_source_of_another_type_is_refused(source):
    assert "a YAML file, a dict or a fedvlm.Config" in problems(source=source)[0]


# Files


def test_missing_inputs_are_named_with_all_other_mistakes():
    tree = {"data": {"path": "no.csv"}, "model": {"name": "./no"}, "partition": {"lists": "l.json"}}
    assert [p.split()[0] for p in absent(tree)] == ["data.path", "model.name", "partition.lists:"]
    hub = {"data": {"path": "org/name"}, "model": {"name": "gpt2"}}
    assert absent(hub) == absent({"data": {"path": None}, "model": 3}) == []
    with pytest.raises(ConfigError) as caught:
        load(tree, "train.rounds=0", inputs=True)
    assert len(caught.value.problems) >= 4


WRONG = """
import sys
sys.argv = ["fedvlm", *{words}]
from fedvlm.cli.app import main
try:
    main()
except SystemExit as stop:
    heavy = {{"torch", "transformers", "datasets", "pandas", "matplotlib", "pyarrow", "peft"}}
    print(stop.code, sorted(heavy & set(sys.modules)))
"""


def test_wrong_settings_are_reported_before_anything_heavy_is_imported(tmp_path):
    wrong = ["train.rounds=true", "data.path=no.csv", "partition.lists=no.json", "seed=-1"]
    for words in (["run", *wrong], ["run", "--dry-run", *wrong], ["compare", "plora,lora", *wrong]):
        code = WRONG.format(words=words)
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout == "2 []\n"
        for key in ("train.rounds", "data.path", "partition.lists", "seed"):
            assert f"  - {key}" in done.stderr


def test_a_policy_is_read_like_a_configuration(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text("rounds: true\nset: {data.columns.answer: no}\n")
    with pytest.raises(ConfigError, match=r"policy '.*': rounds: it must be a number"):
        read_file(path, Policy, "policy")
    path.write_text("set: {data.columns.answer: no, model.device: 007}\n")
    assert read_file(path, Policy, "policy").set == {
        "data.columns.answer": "no",
        "model.device": "007",
    }


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [1", b"a: 1\na: 2", b"- 1", b"x"])
def test_a_file_with_a_mistake_is_named_with_the_line(tmp_path, content):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    (found,) = problems(source=path)
    assert str(path) in found
    path.write_bytes(b"\xef\xbb\xbfseed: 3")
    assert load(path).seed == 3

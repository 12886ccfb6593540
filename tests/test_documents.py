"""Documents: data are text, documents have limits, and messages stay short."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedvlm import documents
from fedvlm.documents import read_json, read_yaml, write_yaml
from fedvlm.errors import MOST, ConfigError, FedVLMError, cut, one_record, shown
from work import lines

HALF = st.characters(exclude_categories=["Cs"])
WORDS = [
    "no",
    "yes",
    "on",
    "off",
    "y",
    "007",
    "0x10",
    "0o7",
    "1_000",
    "1:30",
    "2024-01-01",
    "1.2.3",
    "NULL_",
    ".5.",
]
TEXT = st.text(HALF, max_size=30)
LOOKS = st.sampled_from(
    [
        "no",
        "on",
        "yes",
        "off",
        "true",
        "null",
        "~",
        "007",
        "1_000",
        "0x10",
        "0o7",
        "1:30",
        "2024-01-01",
        "1e2",
        "1E2",
        "-.5",
        ".inf",
        "<<",
        "=",
        "*",
        "&",
        "!",
        "#",
        "[a",
        "a:b",
    ]
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)  # JSON has no infinity
SCALAR = st.one_of(TEXT, LOOKS, st.none(), st.booleans(), st.integers(-(2**64), 2**64), FLOATS)
TREE = st.recursive(
    SCALAR, lambda t: st.lists(t, max_size=3) | st.dictionaries(TEXT | LOOKS, t, max_size=3)
)


@settings(max_examples=100, deadline=None)
@given(TREE)
def test_what_is_written_is_read_back_by_this_and_other_readers(tree):
    text = write_yaml(tree)
    assert read_yaml(text, "it") == tree
    assert read_json(json.dumps(tree), "it") == tree


@settings(max_examples=100, deadline=None)
@given(TREE)
def test_a_reader_of_yaml_1_1_reads_what_is_written(tree):
    found = yaml.safe_load(write_yaml(tree))
    assert found == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (t, t)
            for t in [
                "no",
                "yes",
                "on",
                "off",
                "y",
                "007",
                "0x10",
                "0o7",
                "1_000",
                "1:30",
                "2024-01-01",
                "1.2.3",
                "NULL_",
                ".5.",
            ]
        ),
        *((t, None) for t in ("null", "~", "")),
        *((t, True) for t in ("true", "True")),
        ("3e-4", 3e-4),
        ("1E2", 100.0),
        ("-.5", -0.5),
        ("12", 12),
        ("'12'", "12"),
        ("|\n  12", "12"),
        ("!!str 12", "12"),
    ],
)
def test_a_scalar_is_text_unless_it_clearly_is_not(text, value):
    found = read_yaml(f"a: {text}", "it")["a"]
    assert found == value
    assert type(found) is type(value)


def test_keys_are_the_texts_that_were_written():
    text = "no: 1\non: 2\n1: 3\n007: 4\n1e2: 5\n2024-01-01: 6\ntrue: 7\nnull: 8"
    assert list(read_yaml(text, "it")) == text.replace(":", "").split()[::2]


def bomb(level: int = 20) -> str:
    """Nine aliases a level, in less than a kilobyte."""
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, level)]
    return "\n".join(lines)


def merging(level: int = 30) -> str:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{p: *a{n - 1}, <<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, level)]
    return "\n".join(lines)


def test_aliases_work_within_their_limits_and_share_nothing():
    tree = read_yaml("a: &x {lr: 1, b: [1]}\nc: *x\nd: {<<: *x, lr: 2}", "it")
    assert tree == {"a": {"lr": 1, "b": [1]}, "c": {"lr": 1, "b": [1]}, "d": {"lr": 2, "b": [1]}}
    tree["c"]["b"].append(3)
    assert tree["a"]["b"] == tree["d"]["b"] == [1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(), "aliases"),
        (merging(), "aliases"),
        ("a: &a [*a]", "line 1, column 8: .*names nothing before"),
        ("[" * 10_000, "more than 64"),
        ("- " * 10_000, "more than 64"),
        ("{a: " * 10_000, "more than 64"),
        ("\n".join(" " * n + "a:" for n in range(100)), "line 65, .*more than 64"),
        ("a: 1\nb: 2\na: 3", "line 3, .* 'a' stands in line 1 and again in line 3"),
        ("1: a\n'1': b", "'1' stands in line 1 and again in line 2"),
        ('{"a":\t1, "a": 2}', "'a' stands there twice"),
        ("a: !!python/object/apply:os.system [x]", "the tag '.*os.system' is not read"),
        ("a: !!binary eHg=", "the tag '.*binary'"),
        ("a: b\n---\nc: d", "line 2, .*second document"),
        ("? [a, b]\n: c", "a key must be a text"),
        ("? \n: c", "a key is missing"),
        ("a: [1, 2", "line 1|line 2"),
        ("a: \x00", "no YAML"),
        ("a: " + "9" * 5000, "more than 300 digits"),
        ("a: \ud800", "half a character"),
        ("a: " + "x" * 100, "limit"),
    ],
)
@pytest.mark.parametrize("loader", ["CSafeLoader", "SafeLoader"])
def test_a_bad_document_is_refused_at_once_and_in_few_words(text, said, loader, monkeypatch):
    if loader == "SafeLoader":
        monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    most = 90 if said == "limit" else documents.SIZE
    with pytest.raises(ValueError, match=said) as caught:
        lines(read_yaml, text, "'file.yaml'", most, most=500_000)
    assert str(caught.value).startswith("'file.yaml'")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": ' * 100, '{"a": 1, "a": 2}', "NaN", '"\\ud800"', "{", "9" * 5000]
)
def test_bad_json_is_refused_with_a_value_error(text):
    with pytest.raises(ValueError, match="it") as caught:
        read_json(text, "it")
    assert len(str(caught.value)) < 300


def test_a_bomb_of_aliases_takes_little_memory(tmp_path):
    code = f"""
import resource
from fedvlm import config
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
open("b.yaml", "w").write({bomb()!r})
try:
    config.load("b.yaml")
except config.ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "aliases" in done.stdout, done.stderr


def test_a_number_is_read_in_few_steps():
    text = "\n".join(f"c{n}: {list(range(n * 1000, n * 1000 + 1000))}" for n in range(10))
    lines(read_yaml, text, "it", most=600_000)  # 34 for each number; PyYAML's resolvers take 560


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=3000), st.integers(60, 2500))
def test_a_cut_text_is_visible_and_no_longer_than_asked(text, most):
    found = cut(text, most)
    assert len(found) <= most
    assert found.replace("\n", "").isprintable()
    if "left out" not in found:
        assert len(found) >= len(text)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=3000), min_size=1, max_size=30))
def test_no_message_is_longer_than_two_thousand_characters(texts):
    error = ConfigError(texts)
    assert len(str(error)) <= MOST
    assert len(error.problems) == len(texts)
    assert str(error).splitlines()[1][4:] == error.problems[0]
    assert len(str(FedVLMError("".join(texts)))) <= MOST


def test_a_message_names_the_number_of_characters_it_leaves_out():
    text = str(FedVLMError("head " + "x" * 5000 + " tail"))
    left = int(text.split("[…")[1].split()[0])
    assert left + len(text) - len(f" […{left} characters left out…] ") == 5010
    assert text.startswith("head x")
    assert text.endswith("x tail")


def test_escape_sequences_of_data_are_shown_and_not_sent():
    assert str(FedVLMError("a\x1b[2J\rb\nc")) == "a\\x1b[2J\\rb\nc"
    assert shown("a\nb") == "'a\\nb'"
    assert len(shown(list(range(10**6)))) <= 80


def test_log_lines_are_cut_and_escaped(caplog):
    import logging

    log = logging.getLogger("fedvlm.test")
    log.addFilter(one_record)
    log.warning("left out %s", "x\x1b[2J" * 1000)
    assert len(caplog.messages[0]) <= MOST
    assert "\x1b" not in caplog.messages[0]

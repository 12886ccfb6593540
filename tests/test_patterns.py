"""Regular expressions in settings: searched in linear time, with the syntax of RE2."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedvlm
from fedvlm.config import load
from fedvlm.errors import ConfigError
from fedvlm.layers import LONGEST, matcher, searcher

EVIL = r"^(([a-z]|[a-z_])+\.?)+[A-Z]$"
"""Python's ``re`` needs more than a year for this pattern and a module's name."""
NAME = "model.text_model.layers.0.self_attn.q_proj"
SEARCHED = f"""
from fedvlm.config import load
from fedvlm.layers import matcher, searcher, select

load({{"lora": {{"target": {EVIL!r}, "ranks": {{{EVIL!r}: 1}}}}}})
name = "base_model.model.{NAME}.lora_A.weight"
print(matcher({EVIL!r})({NAME!r}), searcher({EVIL!r})({NAME!r}), select({{{EVIL!r}: "A"}})(name))
"""


def test_no_pattern_of_a_server_hangs_a_site():
    command = [sys.executable, "-c", SEARCHED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["False"] * 3, done.stderr


def test_client_names_are_matched_against_patterns_in_linear_time():
    assert not searcher(EVIL)("site_" * 10_000)
    assert searcher("^küche-[0-9]+$")("küche-12")
    assert searcher("a.c")("a\udc80c"), "a name may hold half a character"


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (r"(?=a)b", "no look-around"),
        (r"(a)\1", "no references back"),
        (r"a\Z", r"\\z is the end"),
        ("(", "missing"),
        ("((a{1000}){1000}){1000}", "repetition"),
        ("(?:" + "x{900}" * 100 + ")", "too large"),
        ("a" * (LONGEST + 1), f"has {LONGEST + 1} characters, .* at most {LONGEST}"),
    ],
)
def test_a_pattern_that_cannot_be_searched_is_refused_with_the_reason(pattern, said):
    with pytest.raises(ValueError, match=said):
        matcher(pattern)
    for lora in ({"target": pattern}, {"ranks": {pattern: 2}}):
        with pytest.raises(ConfigError, match=said):
            load({"lora": lora})
    with pytest.raises(ConfigError, match=said):
        load({"algorithm": {"name": "share", "share": {pattern: "A"}}})


WORKER = r"""rf"{re.escape(place)}[^\s'\"]*" """.strip()
"""The expression by which a site hides its paths."""


def test_python_compiles_only_expressions_of_its_own():
    """Settings become expressions in one place, :func:`fedvlm.layers.searcher`."""
    calls = ("compile", "match", "fullmatch", "search", "sub", "findall", "split", "finditer")
    found = set()
    for file in sorted(Path(fedvlm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            if not (isinstance(called, ast.Attribute) and called.attr in calls):
                continue
            if isinstance(called.value, ast.Name) and called.value.id in ("re", "re2"):
                names = {n.id for n in ast.walk(node.args[0]) if isinstance(n, ast.Name)}
                if {name for name in names if not name.lstrip("_").isupper()}:
                    found.add((file.name, ast.unparse(node.args[0])))
    assert found == {
        ("control.py", "'|'.join(map(re.escape, self.texts))"),  # texts of the model, as texts
        ("worker.py", ast.unparse(ast.parse(WORKER, mode="eval"))),  # a path of the site, as text
        ("layers.py", "pattern.encode()"),  # by RE2
        ("names.py", "pattern"),  # NATIVE
    }

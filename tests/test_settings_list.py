"""``fedvlm config``, ``--schema`` and ``--version``: what a person looks up before a run."""

import json

import pytest
from typer.testing import CliRunner

import fedvlm
from fedvlm.cli.app import app
from fedvlm.cli.settings import rows_of
from fedvlm.config import dump, load
from fedvlm.documents import read_yaml
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config


def shown(*words):
    found = CliRunner().invoke(app, list(words), env={"COLUMNS": "140"})
    if found.exception and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.output


def test_every_setting_has_a_type_and_a_meaning():
    rows = list(rows_of(Config, ""))
    assert len(rows) > 90
    assert [name for name, kind, _, about in rows if not kind or not about] == []


def test_a_section_or_one_setting_is_listed_alone():
    assert "train.lr" in shown("config", "train")
    assert "data.path" not in shown("config", "train")
    one = shown("config", "train.optimizer")
    assert "adamw | sgd" in one
    assert "train.lr " not in one


def test_an_unknown_setting_is_named_with_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no setting 'trian': did you mean 'train'\?"):
        shown("config", "trian")
    with pytest.raises(ConfigError, match=r"leave out 'train'"):
        shown("config", "train", "--schema")


def test_the_schema_takes_every_default_and_refuses_an_unknown_key():
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema to read the schema")
    schema = json.loads(shown("config", "--schema"))
    check = jsonschema.Draft202012Validator(schema)
    for name in ("auto", "share", "fedprox"):
        words = ["algorithm.share={vision_model: B}"] if name == "share" else []
        tree = read_yaml(dump(load({"algorithm": {"name": name}}, *words)), "x")
        assert [error.message for error in check.iter_errors(tree)] == []
    (wrong,) = check.iter_errors({"train": {"roundz": 3}})
    assert "roundz" in wrong.message


def test_the_version_is_that_of_the_package():
    assert shown("--version") == f"fedvlm {fedvlm.__version__}\n"

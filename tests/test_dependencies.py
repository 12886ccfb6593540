"""Imports match the dependencies in pyproject.toml, and the version is the same everywhere."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml

from fedvlm.version import __version__

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "fedvlm"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = {
    "PIL": "pillow",
    "grpc": "grpcio",
    "mlflow": "mlflow-skinny",
    "re2": "google-re2",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Module -> distribution, where the names differ."""


def declared(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", text)[0].replace("_", "-").lower() for text in requirements}


CORE = declared(PROJECT["dependencies"])
EXTRAS = {
    extra: declared(texts)
    for extra, texts in PROJECT["optional-dependencies"].items()
    if extra != "dev"
}


def nodes(tree: ast.AST, functions: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from nodes(node, functions)


def imports(tree: ast.AST, functions: bool = True) -> set[str]:
    """The distributions that a file imports, except our own and the standard library.

    Args:
        tree: the file.
        functions: whether to count imports inside functions too.
    """
    modules = set()
    for node in nodes(tree, functions):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, "fedvlm"}
    return {NAMES.get(module, module.replace("_", "-").lower()) for module in modules}


ROOMS = ("app/page.py", "deploy/nvflare/", "privacy/blind/")
"""Places that need an extra as a whole; other files import them inside functions."""


@cache
def trees() -> dict[str, ast.Module]:
    files = sorted(PACKAGE.rglob("*.py"))
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in files}


def test_every_import_is_declared_in_the_core_or_in_an_extra():
    known = CORE.union(*EXTRAS.values())
    undeclared = {file: imports(tree) - known for file, tree in trees().items()}
    assert {file: names for file, names in undeclared.items() if names} == {}


def test_every_core_dependency_is_imported():
    assert CORE - set().union(*map(imports, trees().values())) == set()


def test_an_extra_is_imported_inside_functions_or_in_the_room_that_needs_it():
    extras = set().union(*EXTRAS.values()) - CORE
    assert {"nvflare", "scikit-learn"} <= extras & set().union(*map(imports, trees().values()))
    others = {f: tree for f, tree in trees().items() if not f.startswith(ROOMS)}
    early = {file: imports(tree, functions=False) & extras for file, tree in others.items()}
    assert {file: names for file, names in early.items() if names} == {}


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert PROJECT["version"] == cited == __version__

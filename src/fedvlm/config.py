"""Reads and writes the configuration of a run: a typed tree from a file and ``key=value`` texts.

:func:`load` collects *all* mistakes before it raises, and suggests the nearest valid name for an
unknown key. The sections are in :mod:`fedvlm.settings.sections`. The class of the section
``algorithm`` comes from the algorithm's row of the table.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedvlm import documents, hub
from fedvlm.algorithms import checks, table
from fedvlm.errors import ConfigError, FedVLMError, shown
from fedvlm.metrics import admit
from fedvlm.settings.method import AlgorithmConfig
from fedvlm.settings.plain import plain
from fedvlm.settings.sections import Config

S = TypeVar("S", bound=BaseModel)
Source = str | Path | dict[str, Any] | Config | None
PRIVATE = "plora"  # the algorithm under differential privacy, where a run names none
SHOWN = 30  # most problems of one section that are described
PARTS = 16  # most parts of a dotted key
LARGEST = 2**28  # bytes of a configuration, which may hold the row numbers of partition.lists


def load(source: Source = None, *overrides: str, inputs: bool = False) -> Config:
    """Builds the configuration from a YAML file or a dict, and ``key=value`` overrides.

    Args:
        source: path of a YAML file, a nested dict, a :class:`Config`, or None for the defaults.
        *overrides: dotted assignments such as ``train.rounds=20``; for values see
            :func:`value_of`.
        inputs: whether the files that the configuration names must exist.

    Raises:
        ConfigError: lists every unknown key, wrong type and impossible value at once.
    """
    tree, problems = read(source, *overrides)
    return checked(tree, [*problems, *absent(tree)] if inputs else problems)


def absent(tree: Mapping[str, Any]) -> list[str]:
    """A problem for each file or folder that a tree of settings names and that does not exist.

    Names on the Hugging Face hub are not looked up. The model and the rows are opened later.
    """
    found = []
    for section, key, on_hub in (
        ("data", "path", hub.is_name),
        ("model", "name", partial(hub.is_name, organized=False)),
        ("partition", "lists", None),
    ):
        part = tree.get(section)
        path = part.get(key) if isinstance(part, dict) else None
        if not isinstance(path, str) or not path or _exists(path):
            continue
        if on_hub is None:
            found.append(f"{section}.{key}: {shown(path, 200)} does not exist")
        elif not on_hub(path):
            found.append(
                f"{section}.{key} {shown(path, 200)} does not exist (looked in "
                f"{shown(str(Path.cwd()), 200, quotes=False)}), and is not a name on the Hugging "
                f"Face hub either ({hub.NAMES})"
            )
    return found


def _exists(path: str) -> bool:
    try:
        return Path(os.path.expanduser(path)).exists()
    except (OSError, ValueError, RuntimeError):  # too long, or the home of an unknown user
        return False


def own(source: Source = None, *overrides: str, label: str = "") -> Config:
    """Builds the configuration like :func:`load`, for an algorithm given as an object.

    Args:
        source: as for :func:`load`.
        *overrides: as for :func:`load`.
        label: the object's name in a comparison.

    Raises:
        ConfigError: as :func:`load`; or the section ``algorithm`` holds settings, which an object
            cannot take.
    """
    tree = _read(source)
    if isinstance(source, Config):  # its defaults were filled in
        section = source.algorithm
        given = {key: tree["algorithm"][key] for key in section.model_fields_set}
        tree["algorithm"] = {} if given == {"name": AlgorithmConfig().name} else given
    tree, problems = read(tree, *overrides)
    given = tree.get("algorithm") or {}
    if not isinstance(given, dict):
        given = {"name": given}
    name = given.pop("name", table.OWN)
    if given or str(name).partition(":")[0] != table.OWN:
        problems.append(
            "algorithm: the algorithm of this run is given as an object; leave out "
            + ", ".join(f"algorithm.{key}" for key in given or ["name"])
        )
    tree["algorithm"] = {"name": f"{table.OWN}:{label}" if label else name}
    return checked(tree, problems)


def chosen(given: Any) -> Any:
    """The section ``algorithm`` without settings that have their default.

    A whole configuration, such as ``fedvlm run --print-config`` writes, names them all.
    """
    if not isinstance(given, dict):
        return given
    name = given.get("name", AlgorithmConfig().name)
    try:
        defaults = table.find(name).settings(name=name).model_dump() if name else {}
    except (KeyError, FedVLMError, ValidationError, TypeError):  # the check of the section says so
        return given
    return {k: v for k, v in given.items() if k == "name" or k not in defaults or v != defaults[k]}


def read(source: Source = None, *overrides: str) -> tuple[dict[str, Any], list[str]]:
    """The unchecked tree of settings, and a problem for each override that cannot be read.

    Raises:
        ConfigError: the file cannot be read, or holds no mapping.
    """
    problems: list[str] = []
    tree = plain(_read(source), problems)
    for text in overrides:
        key, eq, value = text.partition("=") if isinstance(text, str) else (text, "", "")
        if not eq or not key.strip():
            problems.append(f"{shown(text)} is not of the form key=value, such as train.rounds=20")
            continue
        key = key.strip()
        if not documents.whole(key):
            problems.append(f"{shown(key)} is no key: it holds half a character")
            continue
        known, value = len(problems), plain(value_of(value), problems, key)
        if len(problems) == known:
            problems.extend(_assign(tree, key, value))
    return tree, problems


def value_of(text: str) -> Any:
    """The value in the text of an override.

    A mapping, a list and a text in quotes are YAML. Any other text is a plain scalar as a whole:
    ``#``, ``:`` and ``*`` have no meaning in it. So is a text that only looks like YAML, such as
    the pattern ``[a-z]+_proj``.
    """
    text = text.strip()
    if text[:1] in tuple("{[\"'"):
        try:
            return documents.read_yaml(text, "the value", LARGEST)
        except ValueError:
            return text
    return documents.scalar(text)


def checked(tree: dict[str, Any], problems: Sequence[str] = ()) -> Config:
    """The configuration of a tree of settings.

    Args:
        tree: sections by name; missing settings have their defaults.
        problems: earlier mistakes.

    Raises:
        ConfigError: lists all mistakes, the earlier ones first.
    """
    algorithm, wrong = _algorithm(tree.get("algorithm"), _default(tree.get("privacy")))
    problems = [*problems, *wrong]
    try:
        config = Config.model_validate({**tree, "algorithm": algorithm})
    except ValidationError as error:
        raise ConfigError([*problems, *_described(error, Config)]) from None
    if problems:
        raise ConfigError(problems)
    admit(config.eval.own)
    if wrong := checks.general(config, table.find(config.algorithm.name)):
        raise ConfigError(wrong)
    return config


def _default(privacy: Any) -> str:
    """The algorithm of a run that names none."""
    unit = privacy.get("unit") if isinstance(privacy, dict) else None
    return AlgorithmConfig().name if unit is None else PRIVATE


def _algorithm(given: Any, default: str) -> tuple[AlgorithmConfig, list[str]]:
    """The section ``algorithm`` in the class of its algorithm, and its problems.

    Args:
        given: the section as written.
        default: the name of the algorithm where the section gives none.
    """
    given = {} if given is None else given
    if not isinstance(given, dict):
        return AlgorithmConfig(), [f"algorithm: it must hold settings, got {shown(given)}"]
    default = "share" if given.get("share") is not None else default
    name = given.get("name", default)
    name = str(name) if type(name) is int else name
    try:
        settings = table.find(name).settings if isinstance(name, str) else AlgorithmConfig
    except KeyError:
        return AlgorithmConfig(), [_unknown(name)]
    except FedVLMError as error:
        return AlgorithmConfig(), [str(error)]
    try:
        name = table.ALIASES.get(name, name) if isinstance(name, str) else name
        return settings.model_validate({**given, "name": name}), []
    except ValidationError as error:
        return AlgorithmConfig(), [_of_algorithm(e, settings, str(name)) for e in _errors(error)]


def _of_algorithm(error: Any, settings: type[AlgorithmConfig], name: str) -> str:
    """A validation error of the section ``algorithm`` as a readable text."""
    where = ".".join(str(p) for p in error["loc"])
    elsewhere = (entry.settings.model_fields for entry in table.TABLE.values())
    if error["type"] == "extra_forbidden" and any(where in fields for fields in elsewhere):
        return (
            f"algorithm.{where} has no meaning for algorithm.name={shown(name, quotes=False)}; "
            "leave it out"
        )
    return _describe(
        error, settings, "algorithm.", f"algorithm.name={shown(name, quotes=False)} takes"
    )


def _unknown(name: str) -> str:
    known = [*table.names(), *table.ALIASES]
    close = difflib.get_close_matches(name[:200], known, n=1)
    hint = f" (did you mean '{close[0]}'?)" if close else ""
    return (
        f"algorithm.name {shown(name)} is unknown{hint}; there are {', '.join(table.names())}; if "
        "a package adds it, install that package here"
    )


def dump(config: Config) -> str:
    """The configuration as YAML, defaults included; :func:`load` reads it back unchanged."""
    return documents.write_yaml(config.model_dump())


def _read(source: Source) -> dict[str, Any]:
    if source is None:
        return {}
    if isinstance(source, Config):
        return source.model_dump()
    if isinstance(source, dict):
        return source
    if not isinstance(source, str | Path):
        raise ConfigError(
            [
                "a configuration is the path of a YAML file, a dict or a fedvlm.Config, got an "
                f"object of type {type(source).__module__}.{type(source).__qualname__}"
            ]
        )
    tree = _document(source, "configuration file")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(
            [f"{shown(str(source), 200)} must hold a mapping of sections, got {shown(tree)}"]
        )
    return tree


def _document(path: str | Path, what: str) -> Any:
    try:
        return documents.read_yaml(documents.read_text(path, LARGEST), f"'{path}'", LARGEST)
    except OSError as error:
        problem = f"{error.strerror or error}"
    except ValueError as error:
        problem = str(error)
    raise ConfigError([f"the {what} {shown(str(path), 200)} cannot be read: {problem}"])


def read_file(path: str | Path, kind: type[S], what: str) -> S:
    """Reads a file of other settings, such as a site's policy.

    Args:
        path: a YAML file.
        kind: the class of the settings.
        what: the name of the file in messages.

    Raises:
        ConfigError: lists all mistakes in the file.
    """
    tree = _document(path, what)
    problems: list[str] = []
    tree = plain({} if tree is None else tree, problems)
    try:
        if not problems:
            return kind.model_validate(tree)
    except ValidationError as error:
        problems = _described(error, kind)
    raise ConfigError([f"{what} '{path}': {text}" for text in problems])


def _assign(tree: dict[str, Any], key: str, value: Any) -> list[str]:
    node = tree
    *parents, leaf = key.split(".", PARTS)
    if len(parents) == PARTS or not all((*parents, leaf)):
        return [f"{shown(key)} is no key; keys are such as train.rounds"]
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            return [f"{shown(key)}: {shown(part)} has the value {shown(child)} and so no keys"]
        node = child
    node[leaf] = value
    return []


def _errors(error: ValidationError) -> list[Any]:
    return list(error.errors(include_url=False, include_context=False))


def _described(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    found = _errors(error)
    more = [f"{len(found) - SHOWN} more settings are wrong"] if len(found) > SHOWN else []
    return [*(_describe(one, kind) for one in found[:SHOWN]), *more]


def _describe(error: Any, kind: type[BaseModel], prefix: str = "", about: str = "there are") -> str:
    """A validation error as a readable text.

    Args:
        error: the error of pydantic.
        kind: the validated class.
        prefix: the prefix of its keys, for a section.
        about: words before the list of keys.
    """
    where = prefix + ".".join(str(p) for p in error["loc"])
    where = shown(where.removesuffix("."), 200, quotes=False)
    if error["type"] == "extra_forbidden":
        return f"unknown key '{where}'" + _nearest(where, kind, prefix, about)
    if error["type"] == "missing":
        return f"{where}: it is required"
    message, given = error["msg"].removeprefix("Value error, "), error["input"]
    if not where or isinstance(given, BaseModel | dict):
        return f"{where}: {message}" if where else message
    return f"{where}: {message} (got {shown(given)}{_hint(error, where)})"


def _hint(error: Any, where: str) -> str:
    """The way to write a value that was read as another type."""
    given = error["input"]
    if error["type"] == "string_type" and isinstance(given, bool | float | list):
        return f"; a text that looks like another type stands in quotes: {where}='\"TEXT\"'"
    if isinstance(given, str) and given[:1] in ("{", "[") and "type" in error["type"]:
        try:
            documents.read_yaml(given, "the value")
        except ValueError as problem:
            return f"; {problem}"
    return ""


def _nearest(where: str, kind: type[BaseModel], prefix: str = "", about: str = "there are") -> str:
    keys = [key for key in _keys(kind, prefix) if key != "algorithm.name"]
    close = difflib.get_close_matches(where, keys, n=1, cutoff=0.6)
    leaf = where.rpartition(".")[2]
    by_leaf = [k for k in keys if k.rpartition(".")[2] == leaf]
    if not close and not by_leaf:
        leaves = {k.rpartition(".")[2]: k for k in keys}
        by_leaf = [leaves[m] for m in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)]
    best = by_leaf or close
    if best:
        return f": did you mean '{best[0]}'?"
    known = ", ".join(name for name in kind.model_fields if not prefix or name != "name")
    return f"; {about} {known or 'no settings'}"


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of the tree."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")

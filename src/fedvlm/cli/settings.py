"""The settings of a run, as a person reads them, and as a JSON schema for editors."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.table import Table

from fedvlm.cli.tables import console_for_tables
from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config

Row = tuple[str, str, str, str]
"""A setting: its name, its type or choices, its default, its meaning."""


def print_settings(part: str | None = None) -> None:
    """A table of all settings, or of those whose names begin with ``part``, such as ``train``.

    Raises:
        ConfigError: there is no such section or setting.
    """
    rows = list(rows_of(Config, ""))
    if part is not None:
        own = [row for row in rows if row[0] == part or row[0].startswith(f"{part}.")]
        if not own:
            near = difflib.get_close_matches(part, _names(rows), n=1)
            hint = f": did you mean '{near[0]}'?" if near else ""
            sections = ", ".join(sorted({row[0].partition(".")[0] for row in rows}))
            raise ConfigError([f"there is no setting '{part}'{hint}; there are {sections}"])
        rows = own
    out, section = Table("setting", "type", "default", "meaning"), rows[0][0].partition(".")[0]
    for row in rows:
        if (name := row[0].partition(".")[0]) != section:
            out.add_section()
            section = name
        out.add_row(*row)
    console = console_for_tables()
    console.print(out)
    console.print(
        "fedvlm run KEY=VALUE changes a setting · its algorithm's own: fedvlm algorithms NAME",
        highlight=False,
    )


def schema() -> str:
    """The JSON schema of a configuration file.

    An editor checks and completes a YAML file that begins with
    ``# yaml-language-server: $schema=fedvlm.schema.json``. The section ``algorithm`` takes the
    settings of any algorithm.
    """
    found = Config.model_json_schema()
    found["title"] = "Configuration of a fedvlm run"
    found["$defs"]["AlgorithmConfig"]["additionalProperties"] = True
    return json.dumps(found, indent=2)


def rows_of(kind: type[BaseModel], prefix: str) -> Iterable[Row]:
    """The settings of a section and of the sections in it."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from rows_of(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _kind(inner), _default(field), field.description or ""


def _names(rows: Iterable[Row]) -> list[str]:
    """The names of settings and sections."""
    whole = [row[0].split(".") for row in rows]
    return sorted({".".join(parts[:n]) for parts in whole for n in range(1, len(parts) + 1)})


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else str(field.default)


def _kind(annotation: Any) -> str:
    """A type as a person reads it: choices, or the name."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    if options and all(isinstance(a, str) for a in options):
        return " | ".join(options)
    if str(annotation).startswith("dict"):
        return "mapping"
    if options:
        return _kind(options[0])
    return getattr(annotation, "__name__", str(annotation))

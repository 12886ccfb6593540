"""The columns of a source: their types, and one message for all that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fedvlm.errors import DataError, brief
from fedvlm.errors import shown as quoted
from fedvlm.settings.sections import DataConfig

TEXT = ("string", "large_string")
SHOWN = "conversation_image"  # column of rows that come from conversations
OURS = ("row", "image_hash")  # columns that the package adds


def listed(names: Iterable[str], most: int = 20) -> str:
    """Lists names for a message: at most ``most`` of them, each shortened."""
    names = list(names)
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(_quoted, names[:most])) + more


def _quoted(name: str) -> str:
    """A short name; in quotes unless it is one word, so that its spaces are seen."""
    return brief(name, 40) if re.fullmatch(r"[^\s,;']+", name) else quoted(name, 40)


def name_of(data: DataConfig) -> str:
    """The source, for a message."""
    return f"data.path '{brief(data.path, 200)}'" if data.path else "the bundled scenes"


def shown(role: str) -> str:
    """The name of a role, for a message."""
    return "rejected answer" if role == "rejected" else role


def roles_of(have: Iterable[str], data: DataConfig, roles: Iterable[str]) -> dict[str, str]:
    """The column of each role. Without an image column, ``file_name`` is used."""
    have = list(have)
    names = {role: getattr(data.columns, role) for role in roles}
    if names["image"] not in have and "file_name" in have:
        names["image"] = "file_name"
    return names


def check_columns(
    features: Mapping[str, Any], names: Mapping[str, str], data: DataConfig, by: str | None
) -> None:
    """Refuses columns that are missing, or have the wrong type, all in one message.

    Args:
        features: the columns of the source.
        names: role -> column.
        data: of the configuration.
        by: the column that makes the clients, or that labels the rows.

    Raises:
        DataError: the message lists every mistake, and the columns of the source.
    """
    absent = {role: name for role, name in names.items() if name not in features}
    problems = [f"no column '{brief(name)}' for the {shown(role)}" for role, name in absent.items()]
    renamed = by is not None and by.startswith("source_")  # perhaps given to a column later
    if by is not None and not renamed and by not in (*features, *names, *OURS):
        problems.append(f"no column '{brief(by)}' for partition.column")
    wrong = [f"data.columns.{role}" for role in absent]
    parts = []
    if problems:
        parts.append(f"{name_of(data)} has " + ", and ".join(problems))
    if len(set(names.values())) < len(names):
        twice = {role: brief(name, 40) for role, name in names.items()}
        parts.append(f"data.columns has one column for two roles: {twice}; name different columns")
    for role, name in names.items():
        if name in features and (fault := _fault(role, name, features[name])):
            parts.append(fault)
            wrong.append(f"data.columns.{role}")
    mapped = by is None or by not in features or by in names.values()
    if by is not None and not mapped and not is_scalar(features[by]):
        parts.append(
            f"partition.column '{brief(by)}' holds {kind_of(features[by])}, but a client's name "
            "or a label is a text, a number or a date"
        )
    if parts:
        remedy = "".join(f". Set {setting}=<one of them>" for setting in wrong[:1])
        remedy += "".join(f", {setting}=<one of them>" for setting in wrong[1:])
        have = listed(features) or "none"
        raise DataError(f"{'; '.join(parts)}; its columns are {have}{remedy}")


def _fault(role: str, name: str, feature: Any) -> str:
    if role == "image":
        if may_be_image(feature):
            return ""
        return (
            f"the column '{brief(name)}' holds {kind_of(feature)}, not images (encoded bytes, or "
            "paths)"
        )
    import datasets

    if isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "") in TEXT:
        return ""
    return (
        f"the column '{brief(name)}' holds {kind_of(feature)}, but the {shown(role)} must be text: "
        "map another column, or convert it to text"
    )


def may_be_image(feature: Any) -> bool:
    """Whether a column of this type may hold images or paths, or lists of them."""
    import datasets

    from fedvlm.data.embedded import is_list, may_embed

    if is_list(feature):
        return not is_list(feature.feature) and may_be_image(feature.feature)
    if isinstance(feature, datasets.Image) or may_embed(feature):
        return True
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return getattr(feature, "dtype", "") in (*TEXT, "binary", "large_binary")


def is_scalar(feature: Any) -> bool:
    """Whether a column of this type holds texts, numbers, flags or dates."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return True
    return isinstance(feature, datasets.Value) and "binary" not in feature.dtype


def kind_of(feature: Any) -> str:
    """The type of a column, for a message."""
    import datasets

    if isinstance(feature, datasets.Value | datasets.ClassLabel):
        return feature.dtype
    if isinstance(feature, datasets.Json):
        return "lists or objects"
    return "a structure" if isinstance(feature, dict) else type(feature).__name__.lower()


def free_name(name: str, taken: Iterable[str]) -> str:
    """``source_<name>``, with a number if this name is taken."""
    taken = set(taken)
    found, number = f"source_{name}", 2
    while found in taken:
        found, number = f"source_{name}_{number}", number + 1
    return found

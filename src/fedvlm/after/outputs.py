"""Output of the commands after training: what must not be overwritten, and files of results."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError, shown
from fedvlm.store.files import write_bytes
from fedvlm.store.run import belongs

FORMATS = (".jsonl", ".json", ".csv", ".parquet")


def check_out(out: str | Path | None, *inputs: Any) -> None:
    """Refuses a file that cannot be written or must not be, before any work is done.

    Args:
        out: the file to write; None: none.
        inputs: files and folders that the command reads; other values are left out.

    Raises:
        FedVLMError: the format is not known; ``out`` is a folder, an input, in a folder of inputs,
            or a file of a run.
    """
    if out is None:
        return
    try:
        path = Path(os.path.expanduser(out))
        refuse_inputs("--out", path, *inputs)
        if path.suffix.lower() not in FORMATS:
            raise FedVLMError(f"--out '{path}' must end in {', '.join(FORMATS)}")
        if path.is_dir():
            raise FedVLMError(f"--out '{path}' is a folder; give a file in it")
        check_writable("--out", path)
    except (OSError, ValueError, RuntimeError) as error:  # such as a name that is too long
        why = getattr(error, "strerror", None) or error
        raise FedVLMError(f"--out {shown(str(out))} cannot be written: {why}") from error


def check_writable(option: str, path: Path) -> None:
    """Refuses a path that cannot be written, before any work is done.

    Raises:
        FedVLMError: the path lies in a file, or in a folder that is read-only.
    """
    place = path.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if place != path.absolute() and not place.is_dir():
        raise FedVLMError(f"{option} '{path}' cannot be written: '{place}' is no folder")
    if not os.access(place if place.is_dir() else place.parent, os.W_OK):
        raise FedVLMError(f"{option} '{path}' cannot be written: '{place}' is read-only")


def refuse_run(option: str, path: Path) -> None:
    """Refuses an output that is a file of a run, or is in a folder of a run, except ``export``.

    Raises:
        FedVLMError: names the run.
    """
    if owner := belongs(path):
        raise FedVLMError(
            f"{option} '{path}' is a file or folder of the run in '{owner}'; choose another place"
        )


def refuse_inputs(option: str, path: Path, *inputs: Any) -> None:
    """Refuses an output that is an input or in a folder of inputs, or that belongs to a run.

    Links are followed. Case is ignored where the disk ignores it.

    Raises:
        FedVLMError: names the input or the run.
    """
    refuse_run(option, path)
    parents = [Path(os.path.realpath(path)), *Path(os.path.realpath(path)).parents]
    for given in inputs:
        source = Path(os.path.expanduser(given)) if isinstance(given, str | Path) else None
        if source is None or not os.path.exists(source):
            continue
        if path.exists() and path.samefile(source):
            raise FedVLMError(f"{option} '{path}' is the file that is read; choose another one")
        if source.is_dir() and any(p.exists() and p.samefile(source) for p in parents):
            raise FedVLMError(
                f"{option} '{path}' is in the folder that is read, '{source}', and would be "
                "read there later; choose another place"
            )


def write_table(rows: list[dict[str, Any]], out: str | Path) -> Path:
    """Writes rows as JSON lines, a JSON list, CSV or parquet, chosen by the file's suffix.

    The file is written atomically.

    Raises:
        FedVLMError: the file cannot be written.
    """
    path = Path(os.path.expanduser(out))
    suffix = path.suffix.lower()
    text = io.StringIO()
    if suffix == ".parquet":
        import datasets

        buffer = io.BytesIO()
        datasets.Dataset.from_list(rows).to_parquet(buffer)
        content = buffer.getvalue()
    elif suffix == ".csv":
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    elif suffix == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        content = "".join(lines).encode()
    else:
        content = (json.dumps(rows, indent=2, ensure_ascii=False) + "\n").encode()
    try:
        write_bytes(path, content)
    except OSError as error:
        raise FedVLMError(f"--out '{path}' cannot be written: {error.strerror}") from error
    return path

"""The audit log of a site or of the server: JSON lines, each of which holds a hash of the last one.

Every request is a line before it is carried out. Its answer is a line before it leaves. A line that
cannot be written stops the request, so nothing leaves without a line. The log holds kinds of
requests, decisions, numbers of bytes and digests. It holds no content of rows and no path.

The keys of every line::

    n         number of the line, from 0
    time      UTC
    event     the kind of the line; the first line is "begun"
    previous  SHA-256 of the bytes of the previous line, without its end; 64 zeros in the first line
    own       SHA-256 of this line without this key
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from fedvlm.deploy.digests import sha256
from fedvlm.errors import FedVLMError, shown
from fedvlm.store.files import sync
from fedvlm.version import BY, FORMAT, __version__, check_format

NAME = "audit.jsonl"
NONE = "0" * 64
TAIL = 2**16  # bytes of the longest line, and of the reserve
TEXT = 400  # characters of the longest text in a line
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass
class _Line:
    """A line that waits to be written, and what has become of it."""

    event: str
    facts: Mapping[str, Any]
    written: str = ""
    error: BaseException | None = None


class AuditLog:
    """A log that several processes may write. Every line is on the disk before the call returns.

    Lines of several threads that wait at the same time go to the disk together.

    Args:
        path: the file. It is made when the first line is written, readable by its owner only.
        who: facts for the first line, such as the name of the site.
    """

    kind = "audit log"

    def __init__(self, path: str | Path, **who: Any):
        self.path, self.who = Path(path), who
        self._waiting: deque[_Line] = deque()
        self._turn = threading.Lock()

    def note(self, event: str, **facts: Any) -> str:
        """Writes a line, and returns its SHA-256. Texts of more than 400 characters are cut.

        Raises:
            FedVLMError: the line cannot be written.
        """
        line = _Line(event, facts)
        self._waiting.append(line)
        with self._turn:
            if not line.written and not line.error:
                self._write_waiting()
        if line.error is None:
            return line.written
        error = line.error
        if not isinstance(error, OSError | ValueError):
            raise error
        why = error.strerror if isinstance(error, OSError) else str(error)
        why = "the disk is full" if getattr(error, "errno", 0) in FULL else why
        raise FedVLMError(
            f"the {self.kind} '{self.path.name}' cannot be written, and without it nothing is "
            f"done: {why}"
        ) from error

    def _write_waiting(self) -> None:
        """Writes the lines that wait now. A line has its hash or its error afterwards."""
        lines = [self._waiting.popleft() for _ in range(len(self._waiting))]
        try:
            try:
                self._write(lines)
            except OSError as error:
                if error.errno not in FULL or not self._reserve.exists():
                    raise
                self._reserve.unlink(
                    missing_ok=True
                )  # a full disk: the refusals that follow are noted, too
                self._write(lines)
        except BaseException as error:
            for line in lines:
                line.error = line.error or error
            if not isinstance(error, Exception):
                raise

    @property
    def _reserve(self) -> Path:
        return self.path.with_name(f".{self.path.name}.reserve")

    def _write(self, lines: Sequence[_Line]) -> None:
        with self._opened() as file:
            number, previous, torn = _end(file)
            new = not number and not torn
            texts: list[bytes] = []

            def add(event: str, facts: Mapping[str, Any]) -> str:
                nonlocal number, previous
                texts.append(_text(number, previous, event, facts))
                number, previous = number + 1, sha256(texts[-1])
                return previous

            if number:
                _check_begun(file, self.path.name)
            else:
                add("begun", {"version": __version__, "format": FORMAT, **self.who})
            if torn:
                add("torn", {"bytes": len(torn), "sha256": sha256(torn)})
            marks: dict[int, str] = {}
            for at, line in enumerate(lines):
                try:
                    marks[at] = add(line.event, line.facts)
                except ValueError as error:  # this line alone is too long
                    line.error = error
            _append(file, texts)
        for at, mark in marks.items():
            lines[at].written = mark
        if new:
            sync(self.path.parent)
        if not self._reserve.exists():
            self._keep_reserve()

    def _keep_reserve(self) -> None:
        """Takes the room for some lines, as far as the disk has it."""
        handle = os.open(self._reserve, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            os.write(handle, bytes(TAIL))
        except OSError as error:
            if error.errno not in FULL:
                raise
        finally:
            os.close(handle)

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file, locked against all other writers."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _end(file: IO[bytes]) -> tuple[int, str, bytes]:
    """The next line's number and ``previous``, and the rest that a killed process has left.

    The position of the file is then the end of the last whole line.
    """
    size = file.seek(0, os.SEEK_END)
    start = file.seek(max(0, size - 2 * TAIL))
    whole, end, torn = file.read().rpartition(b"\n")
    file.seek(size - len(torn))
    if not end:
        if start:
            raise ValueError("its last line is longer than a line of an audit log")
        return 0, NONE, torn
    last = whole.rpartition(b"\n")[2]
    try:
        number = json.loads(last)["n"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            "its last line is no line of an audit log; see 'fedvlm audit-log verify'"
        ) from error
    return int(number) + 1, sha256(last), torn


def _check_begun(file: IO[bytes], name: str) -> None:
    """Refuses to add a line to a log of a newer format. The position of the file stays."""
    at = file.tell()
    file.seek(0)
    text = file.readline(TAIL)
    file.seek(at)
    with suppress(ValueError, RecursionError):  # 'audit-log verify' reports a damaged line
        _check_format(json.loads(text), name)


def _check_format(first: Any, name: str) -> None:
    if isinstance(first, dict):
        about = {"fedvlm": first.get("version"), "format": first.get("format", 1)}
        check_format({BY: about}, name)


def _text(number: int, previous: str, event: str, facts: Mapping[str, Any]) -> bytes:
    """A line, without its end.

    Raises:
        ValueError: it is too long.
    """
    time = datetime.now(UTC).isoformat(timespec="milliseconds")
    short = {key: _short(value) for key, value in facts.items() if value is not None}
    line = {"n": number, "time": time, "event": event, **short, "previous": previous}
    text = _bytes({**line, "own": sha256(_bytes(line))})
    if len(text) >= TAIL:
        raise ValueError(f"a line of {len(text)} bytes is too long, at most {TAIL} are allowed")
    return text


def _append(file: IO[bytes], texts: Iterable[bytes]) -> None:
    """Writes lines at the file's position, to the disk: all of them or none."""
    at = file.tell()
    try:
        file.write(b"".join(text + b"\n" for text in texts))
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        os.ftruncate(file.fileno(), at)  # half a line helps nobody
        raise


def _bytes(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":")).encode()


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return shown(value, TEXT, quotes=False)
    return value if isinstance(value, bool | int | float) else shown(repr(value), TEXT, False)


# -- reading


@dataclass(frozen=True)
class Verified:
    """A whole log.

    Attributes:
        lines: the number of its lines.
        first: the facts of the first line: version, and the site or server.
        last: the SHA-256 of the last line.
        torn: bytes of an unfinished line at the end, from a process that was killed.
        noted: whether the log has the line whose hash was noted before; None: none was given.
    """

    lines: int
    first: dict[str, Any]
    last: str
    torn: int
    noted: bool | None = None


def verify(path: str | Path, noted: str | None = None) -> Verified:
    """Checks every line of a log.

    The chain alone cannot show that lines at the end are missing. For that, note the last hash
    elsewhere, and give it here later.

    Args:
        path: the file.
        noted: the hash of a line, from an earlier :attr:`Verified.last`.

    Raises:
        FedVLMError: a line was changed, dropped, inserted or moved; the message has its number. Or
            the log lacks the line with the noted hash, or has a newer format.
    """
    number, previous = 0, NONE
    first: dict[str, Any] = {}
    found: bool | None = None if noted is None else False
    with open(path, "rb") as file:
        for line, previous in read(file, str(path)):
            first = first or line
            number += 1
            found = found or (None if noted is None else previous == noted.strip().lower())
        torn = file.read()
    if not number:
        raise FedVLMError(f"'{path}' is no audit log: it has no whole line")
    if first["event"] != "begun":
        raise _wrong(str(path), 1, "it is not the beginning of a log: lines before it are missing")
    if found is False:
        raise FedVLMError(
            f"'{path}': all of its {number} lines are linked, but none has the noted hash "
            f"{shown(noted)}: lines at the end were removed, or this is another log"
        )
    own = ("n", "time", "event", "previous", "own")
    facts = {key: value for key, value in first.items() if key not in own}
    return Verified(number, facts, previous, len(torn), found)


def read(
    file: IO[bytes], path: str, number: int = 0, previous: str = NONE
) -> Iterator[tuple[dict[str, Any], str]]:
    """Every whole line of a log, checked, with its SHA-256.

    At the end, the position of the file is before the rest that a killed process has left.

    Args:
        file: the log, at its beginning or at the first line that was not read before.
        path: its place, for messages.
        number: the number of that line.
        previous: the SHA-256 of the line before it.

    Raises:
        FedVLMError: see :func:`verify`.
    """
    for text in iter(file.readline, b""):
        if not text.endswith(b"\n"):
            file.seek(-len(text), os.SEEK_CUR)
            return
        line = _checked(text[:-1], number, previous, path)
        number, previous = number + 1, sha256(text[:-1])
        yield line, previous


def _checked(text: bytes, number: int, previous: str, path: str) -> dict[str, Any]:
    """A line, if it is the one that was written at this place."""
    at = number + 1
    try:
        line = json.loads(text)
        if not number:
            _check_format(line, path)
        own = line.pop("own")
        same = own == sha256(_bytes(line)) and text == _bytes({**line, "own": own})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _wrong(path, at, "it was changed: it is no line of an audit log") from None
    if not same:
        raise _wrong(path, at, "it was changed: its content does not have its hash ('own')")
    if line["n"] != number:
        where = "lines before it are missing" if line["n"] > number else "it was moved or repeated"
        raise _wrong(path, at, f"{where}: it has number {line['n']}, and {number} was expected")
    if line["previous"] != previous:
        raise _wrong(
            path, at, "it does not follow the line before it, which was written anew ('previous')"
        )
    return line


def _wrong(path: str, at: int, why: str) -> FedVLMError:
    return FedVLMError(f"'{path}', line {at}: {why}. Lines 1 to {at - 1} are whole")

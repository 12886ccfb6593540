"""The errors for users. A message names the mistake, the value it got, and the remedy.

No message is longer than :data:`MOST` characters, and none can move the cursor of a terminal.
"""

from __future__ import annotations

import logging
import reprlib
from typing import Any

MOST = 2000  # characters of the longest message
PROBLEM = 600  # characters of one problem of several


def visible(text: str, newlines: bool = False) -> str:
    """A text without control characters: each is shown by its escape, such as ``\\x1b``.

    Args:
        text: the text.
        newlines: whether line ends stay.
    """
    if text.isprintable():
        return text
    kept = "\n" if newlines else ""
    return "".join(c if c.isprintable() or c == kept else repr(c)[1:-1] for c in text)


def cut(text: str, most: int = MOST, newlines: bool = True) -> str:
    """A visible text of at most ``most`` characters: the head and the tail of a longer one."""
    if len(text) <= most:
        whole = visible(text, newlines)
        if len(whole) <= most:
            return whole
    room = most - len(f" […{len(text)} characters left out…] ")
    head = _head(text[:room], room - room // 4, newlines)
    tail = _head(text[-room:][::-1], room // 4, newlines)[::-1]
    left = len(text) - len(head) - len(tail)
    note = f" […{left} characters left out…] "
    return "".join(
        [*(visible(c, newlines) for c in head), note, *(visible(c, newlines) for c in tail)]
    )


def _head(text: str, room: int, newlines: bool) -> str:
    """The longest head of a text that is at most ``room`` characters long once it is visible."""
    for count, character in enumerate(text):
        room -= len(visible(character, newlines))
        if room < 0:
            return text[:count]
    return text


def shown(value: Any, most: int = 80, quotes: bool = True) -> str:
    """A value as a message shows it: short, on one line.

    Args:
        value: the value.
        most: the most characters.
        quotes: whether a text stands in quotes.
    """
    if isinstance(value, str):
        text = cut(value, most, newlines=False)
        return f"'{text}'" if quotes else text
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = most
    try:
        return cut(brief.repr(value), most, newlines=False)
    except ValueError:  # a number of very many digits
        return f"a value of type {type(value).__name__}"


def brief(value: object, most: int = 200) -> str:
    """A value on one line, without its end where it is longer than ``most`` characters."""
    text = " ".join(str(value)[: 4 * most].split())
    text = visible(text)
    return text if len(text) <= most else text[: most - 1] + "…"


def counted(count: int, noun: str) -> str:
    """A number with its noun, such as ``1 client`` and ``1,200 clients``."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def one_record(record: logging.LogRecord) -> bool:
    """A filter for a logger: cuts and escapes each message like the message of an error."""
    record.msg, record.args = cut(record.getMessage()), ()
    return True


class FedVLMError(Exception):
    """A mistake in the input, found before the first write.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: object = ""):
        super().__init__(cut(str(message)))


class ConfigError(FedVLMError):
    """One or more mistakes in the configuration. The message lists all of them.

    Attributes:
        problems: the mistakes, each on one line.
    """

    def __init__(self, problems: list[str]):
        self.problems = [cut(p, PROBLEM, newlines=False) for p in problems]
        head = (
            "the configuration has a problem:"
            if len(problems) == 1
            else f"the configuration has {len(problems)} problems:"
        )
        lines = [head, *(f"  - {p}" for p in self.problems)]
        whole, room = 0, MOST - 40  # characters for the last line
        for line in lines:
            room -= len(line) + 1
            whole += room >= 0
        if whole < len(lines):
            lines = [*lines[:whole], f"  - and {len(lines) - whole} more problems"]
        super().__init__("\n".join(lines))

    def __reduce__(self):  # makes the error picklable, for other processes
        return type(self), (self.problems,)


class DataError(FedVLMError):
    """A mistake in the data: a missing column, a corrupt image, a client without rows."""

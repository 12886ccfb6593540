"""The work of a call, counted without a clock, so that other load does not matter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


def lines(function: Callable[..., Any], *args: Any, most: float = float("inf")) -> int:
    """Counts the lines of Python that a call runs in this thread, those of libraries included.

    Args:
        function: the function.
        args: its arguments.
        most: the test fails, and the call ends, at the first line beyond this number.
    """
    count = 0

    def seen(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count > most:
                pytest.fail(f"more than {most:.0f} lines of Python ran")
        return seen

    before = sys.gettrace()
    sys.settrace(seen)
    try:
        function(*args)
    finally:
        sys.settrace(before)
    return count

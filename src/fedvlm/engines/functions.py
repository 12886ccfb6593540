"""Metrics that a program hands over as functions, and the scores that they give."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from fedvlm.errors import ConfigError, FedVLMError, shown
from fedvlm.metrics import NAME, TAKEN

Function = Callable[..., Any]
"""``function(prediction, reference) -> float`` in [0, 1]; a parameter named ``question`` gets the
question of the row as well."""


def checked(functions: Mapping[str, Function] | None) -> dict[str, Function]:
    """The functions of a program by name.

    Raises:
        ConfigError: it is no mapping of names to functions of two texts.
    """
    if functions is None:
        return {}
    form = 'it is a dict such as {"name": function}'
    if not isinstance(functions, Mapping):
        raise ConfigError([f"metrics: {form}, got {type(functions).__name__}"])
    wrong = []
    for name, function in functions.items():
        if not isinstance(name, str) or not callable(function):
            wrong.append(f"metrics: {form}, got {shown(name)}: {shown(function, 60)}")
            continue
        if not re.fullmatch(NAME, name) or name in TAKEN:
            wrong.append(
                f"metrics[{shown(name)}]: choose a name of small letters, digits and _, at most "
                "40, which no other column of the tables has"
            )
        try:
            _bound(function, "a", "b", "c")
        except (TypeError, ValueError) as error:
            wrong.append(
                f"metrics[{shown(name)}]: it must take (prediction, reference), and may take "
                f"question: {shown(str(error), 200, quotes=False)}"
            )
    if wrong:
        raise ConfigError(wrong)
    return dict(functions)


def own_scores(
    functions: Mapping[str, Function], prediction: str, row: Mapping[str, Any]
) -> dict[str, float]:
    """The scores of one answer by the functions of a program.

    Args:
        functions: name -> function.
        prediction: the answer of the model.
        row: the row, with its question and answer.

    Raises:
        FedVLMError: a function fails, or gives no number in [0, 1].
    """
    found = {}
    for name, function in functions.items():
        where = f"metrics[{shown(name)}] on row {row.get('row', '?')}"
        try:
            arguments = _bound(function, prediction, row["answer"], row["question"])
            value = function(*arguments.args, **arguments.kwargs)
        except Exception as error:
            why = shown(f"{type(error).__name__}: {error}", 300, quotes=False)
            raise FedVLMError(f"{where}: the function failed with {why}") from error
        if not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise FedVLMError(
                f"{where}: the function gave {shown(value, 60)}, and a score is a number from 0 to "
                f"1 (prediction {shown(prediction, 60)}, reference {shown(row['answer'], 60)})"
            )
        found[name] = float(value)
    return found


def _bound(
    function: Function, prediction: str, reference: str, question: str
) -> inspect.BoundArguments:
    signature = inspect.signature(function)
    asks = "question" in signature.parameters
    return signature.bind(prediction, reference, **({"question": question} if asks else {}))

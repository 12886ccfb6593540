"""Messages between the processes of one run, as bytes: JSON, and the values of its tensors.

Only plain values, tensors, errors and the classes marked by :func:`portable` travel. No code does,
unlike with pickle: whoever sends bytes to a process cannot make it call anything.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fedvlm.errors import ConfigError, DataError, FedVLMError

if TYPE_CHECKING:
    from torch import Tensor

Class = TypeVar("Class", bound=type)

_CLASSES: dict[str, Any] = {}
_ERRORS: dict[str, Any] = {
    kind.__name__: kind for kind in (FedVLMError, ConfigError, DataError, RuntimeError)
}


def portable(kind: Class) -> Class:
    """Marks a dataclass whose fields are portable; a decorator."""
    assert dataclasses.is_dataclass(kind)
    _CLASSES[kind.__name__] = kind
    return kind


def pack(message: Any) -> tuple[Tensor, Tensor]:
    """A message as bytes: its structure, and the values of its tensors.

    Raises:
        TypeError: it holds a value of another kind.
    """
    import torch

    tensors: dict[int, tuple[int, Tensor]] = {}  # a tensor that occurs twice is sent once
    structure = _written(message, tensors)
    kept = [t.detach().cpu() for _, t in tensors.values()]
    forms = [[list(t.shape), str(t.dtype).removeprefix("torch.")] for t in kept]
    head = json.dumps([forms, structure]).encode()
    parts = [t.reshape(-1).view(torch.uint8) for t in kept]
    body = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(head), dtype=torch.uint8), body


def unpack(head: Tensor, body: Tensor) -> Any:
    """The inverse of :func:`pack`.

    Raises:
        ValueError: the bytes are no message.
    """
    import torch

    try:
        forms, structure = json.loads(head.numpy().tobytes())
        tensors, start = [], 0
        for shape, kind in forms:
            dtype = getattr(torch, kind)
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"'{kind}' is no type of tensors")
            end = start + math.prod(shape) * dtype.itemsize
            tensors.append(body[start:end].clone().view(dtype).view(shape))
            start = end
        return _read(structure, tensors)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"these bytes are no message of another process: {error!r}") from error


def _written(value: Any, tensors: dict[int, tuple[int, Tensor]]) -> Any:
    """A value as JSON; a mapping with one key names the kind of all but plain values."""
    import torch

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor):
        return {"tensor": tensors.setdefault(id(value), (len(tensors), value))[0]}
    if isinstance(value, Mapping):
        pairs = [[_written(k, tensors), _written(v, tensors)] for k, v in value.items()]
        return {"map": pairs}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_written(part, tensors) for part in value]}
    name = type(value).__name__
    if _CLASSES.get(name) is type(value):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return {"is": [name, *(_written(part, tensors) for part in fields)]}
    if isinstance(value, Exception):
        kind = name if name in _ERRORS else _parent(value)
        said = getattr(value, "problems", None) if kind == "ConfigError" else str(value)
        return {"error": [kind, said]}
    if hasattr(value, "item"):  # a number of numpy
        return _written(value.item(), tensors)
    raise TypeError(f"a value of type {name} does not travel between processes")


def _parent(error: Exception) -> str:
    return "FedVLMError" if isinstance(error, FedVLMError) else "RuntimeError"


def _read(value: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((shape, held),) = value.items()
    if shape == "tensor":
        return tensors[held]
    if shape == "map":
        return {_read(k, tensors): _read(v, tensors) for k, v in held}
    if shape == "error":
        return _ERRORS[held[0]](held[1])
    if shape == "is":
        return _CLASSES[held[0]](*(_read(part, tensors) for part in held[1:]))
    return {"list": list, "tuple": tuple}[shape](_read(part, tensors) for part in held)

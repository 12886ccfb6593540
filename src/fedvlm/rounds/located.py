"""The paths in a run's settings, absolute; and rows that are objects, as files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fedvlm.errors import ConfigError
from fedvlm.settings.sections import Config


def located(config: Config) -> Config:
    """The settings with absolute paths of data and model; names of the hub are unchanged."""
    from fedvlm.models.load import BUNDLED

    model, data = config.model, config.data
    if model.name not in BUNDLED:
        model = model.model_copy(update={"name": _absolute(model.name)})
    if data.path is not None:
        data = data.model_copy(update={"path": _absolute(data.path)})
    return config.model_copy(update={"model": model, "data": data})


def with_rows(config: Config, data: Any) -> Config:
    """The settings of a run whose rows are an object; see :mod:`fedvlm.data.handed`.

    Args:
        config: the settings; the rows are written into the parent folder of ``output``.
        data: the rows; None: the settings name them.

    Raises:
        ConfigError: the settings name rows as well.
        DataError: the object holds no rows.
    """
    if data is None:
        return config
    if config.data.path is not None:
        raise ConfigError(
            [
                f"data.path is '{config.data.path}', and rows were handed over too (data=...): "
                "leave one of them out"
            ]
        )
    from fedvlm.data.handed import kept

    folder = Path(config.output).parent
    path = str(kept(data, folder, config.data.split, config.data.columns.image))
    rows = config.data.model_copy(update={"path": path, "split": "train"})
    return config.model_copy(update={"data": rows})


def _absolute(name: str) -> str:
    """An absolute path if there is such a file or folder here, else the name unchanged."""
    path = Path(os.path.expanduser(name))
    return os.path.abspath(path) if path.exists() else name


def check_apart(config: Config) -> None:
    """Refuses an output in the folder of the data, where its files would be read as rows.

    Raises:
        ConfigError: ``output`` is ``data.path``, or lies in it.
    """
    if config.data.path is None or not Path(os.path.expanduser(config.data.path)).is_dir():
        return
    data = Path(os.path.realpath(Path(os.path.expanduser(config.data.path))))
    output = Path(os.path.realpath(config.output))
    if output == data or data in output.parents:
        raise ConfigError(
            [
                f"output: '{config.output}' lies in data.path '{config.data.path}', so its files "
                "would be read as rows later; choose a folder elsewhere with output=DIR"
            ]
        )

"""What runs read again and again, read once in a process: a sixth of a small run's time.

The functions replace those of the package where a run looks them up. A test module that imports
them by name has the package's own.
"""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import os
import sys


def replacements():
    """Triples: a module, the name of a function, and the function that replaces it."""
    from fedvlm.data import sources
    from fedvlm.models import load

    yield load, "load_model", models(load.load_model)
    yield sources, "load_rows", scenes(sources.load_rows)
    yield importlib.metadata, "version", functools.cache(importlib.metadata.version)


def models(read):
    """``load_model`` that copies what it has read, for the bundled model and those of families."""
    from fedvlm.models.load import Loaded, identity

    kept: dict[str, Loaded] = {}

    def load_model(config):
        folders = getattr(sys.modules.get("zoo"), "FOLDERS", ())
        plain = config.quantization == config.device_map == "none" and not config.shard
        if not plain or config.name not in ("tiny", *folders):
            return read(config)
        key = identity(config)
        if key not in kept:
            kept[key] = read(config)
        found = kept[key]
        model, processor = copy.deepcopy((found.model, found.processor))
        return Loaded(model, processor, found.device, found.name)

    return load_model


def scenes(read):
    """``load_rows`` that returns the rows it has read, for the bundled scenes."""
    kept = {}

    def load_rows(data, seed=0, **options):
        if data.path is not None:
            return read(data, seed, **options)
        where = os.environ.get("FEDVLM_CACHE")
        key = data.model_dump_json(), seed, where, *sorted(options.items())
        if key not in kept:
            kept[key] = read(data, seed, **options)
        return copy.copy(kept[key])

    return load_rows

"""Tables of rows and settings for the tests of partitions."""

from __future__ import annotations

import datasets
import numpy as np

from fedvlm.settings.sections import Config, DataConfig, PartitionConfig


def table(n=200, labels=4, seed=0, **columns) -> datasets.Dataset:
    """Rows without images, which a partition does not need."""
    rng = np.random.default_rng(seed)
    rows = {
        "question": ["What?"] * n,
        "answer": [f"answer {v}" for v in rng.integers(0, labels, n)],
        "row": list(range(n)),
        **columns,
    }
    return datasets.Dataset.from_dict(rows)


def config(seed=0, data=None, **partition) -> Config:
    data = DataConfig.model_validate({"path": "rows.parquet", **(data or {})})
    rest = {"partition": PartitionConfig(**partition), "algorithm": {"name": "plora"}}
    return Config(seed=seed, data=data, **rest)

"""What the tests share: small runs on the bundled model and data, one thread, no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def small(tmp_path):
    """Settings of a run that takes a second or two: three sites, two rounds."""
    return {
        "output": str(tmp_path / "run"),
        "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16}},
        "partition": {"min_rows": 4},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4},
        "eval": {"every": 1, "max_rows": 4, "max_new_tokens": 6},
        "lora": {"rank": 2, "alpha": 4},
    }


@pytest.fixture
def shared_data():
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not there")
    return SHARED

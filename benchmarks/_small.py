"""Shared by the benchmarks: a model of another size, cheap rows, and the settings of a run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


def write_model(folder: Path, width: int = 32, layers: int | None = 1) -> str:
    """Writes a model of the bundled model's classes in another size, with random weights.

    Args:
        folder: receives the model and its processor.
        width: size of the hidden states, in the vision tower and in the language model.
        layers: number of layers of each of the two; None keeps that of the bundled model.
    """
    import torch
    import transformers as hf

    from fedvlm.models.load import locate

    source, _ = locate("tiny")
    config = hf.AutoConfig.from_pretrained(source)
    for part in (config.text_config, config.vision_config):
        part.num_hidden_layers = layers or part.num_hidden_layers
        part.hidden_size, part.intermediate_size = width, 2 * width
        part.num_attention_heads = 2
    config.text_config.num_key_value_heads = 2
    config.text_config.head_dim = width // 2
    torch.manual_seed(0)
    model = hf.AutoModelForImageTextToText.from_config(config)
    model.generation_config = hf.GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder)
    for name in Path(source).iterdir():
        if name.suffix in (".json", ".jinja") and not (folder / name.name).exists():
            (folder / name.name).write_bytes(name.read_bytes())
    return str(folder)


def write_rows(path: Path, clients: int, rows: int) -> str:
    """Writes ``rows`` rows for each client: one of 64 pictures, a question, one of 50 answers."""
    import datasets
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(64):
        stream = io.BytesIO()
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), "u1"))
        Image.fromarray(pixels).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    count = clients * rows
    table = {
        "image": [pictures[k % 64] for k in range(count)],
        "question": ["what is it?"] * count,
        "chosen": [f"thing {k % 50}" for k in rng.permutation(count)],
    }
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(table).save_to_disk(path)
    return str(path)


def settings(folder: Path, clients: int, cohort: int, rows: int = 3) -> dict[str, Any]:
    """Settings of a run on such a model and rows: two rows a batch, evaluation only at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    model, data = folder / "model", folder / f"rows-{clients}"
    return {
        "output": str(folder / f"run-{clients}-{cohort}"),
        "model": {"name": str(model) if model.exists() else write_model(model)},
        "data": {
            "path": str(data) if data.exists() else write_rows(data, clients, rows),
            "cache": 0,
        },
        "partition": {"kind": "iid", "clients": clients, "min_rows": 2},
        "lora": {"rank": 2, "alpha": 4},
        "train": {"rounds": 1000, "clients_per_round": cohort, "batch_size": 2},
        "eval": {"every": 0, "clients": 4, "max_new_tokens": 2},
        "engine": {"threads": 1},
    }

"""Memory of a process that reads data larger than memory: 2 GB of parquet in RLAIF-V's schema.

The script writes synthetic parquet shards to a temporary folder, once in the layout of Hugging
Face's writer (row groups of 100 MB, pages of about 1 MB) and once with a single row group a shard,
the layout of pandas (pages of 1024 rows of any size). A fresh process loads the shards, checks
every image, partitions the rows and decodes a sample of them, as training does. The script prints
the rise of that process's memory above the level after imports:

- anonymous: the allocations of the process, which must fit into memory
- resident: the same plus the pages of memory-mapped files in memory. The system takes these pages
  back when it needs them.

    python benchmarks/streaming.py [--quick]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MB = 10**6
HUGGING_FACE = {"use_content_defined_chunking": True, "write_page_index": True}
LAYOUTS: dict[str, tuple[int, dict[str, bool]]] = {  # bytes a row group, options of the writer
    "as Hugging Face writes": (100 * MB, HUGGING_FACE),
    "one row group a shard": (10**12, {}),
}
SAMPLE = 200  # decoded rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory while reading data larger than memory.")
    parser.add_argument("--quick", action="store_true", help="200 MB instead of 2 GB")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    size, shard = (200 * MB, 100 * MB) if arguments.quick else (2000 * MB, 1000 * MB)
    worst = 0.0
    print(f"{'layout':<24} {'data MB':>8} {'load s':>7} {'anonymous MB':>13} {'resident MB':>12}")
    for layout, (block, options) in LAYOUTS.items():
        with tempfile.TemporaryDirectory(prefix="fedvlm-streaming-") as folder:
            free = shutil.disk_usage(folder).free
            if free < 3 * size:
                sys.exit(f"{folder} has {free // MB} MB free, and {3 * size // MB} MB are needed")
            write(Path(folder) / "data", size, shard, block, options)
            found = in_fresh_process(Path(folder))
        worst = max(worst, found["anonymous"])
        print(
            f"{layout:<24} {found['data']:>8.0f} {found['seconds']:>7.1f} "
            f"{found['anonymous']:>13.0f} {found['resident']:>12.0f}",
            flush=True,
        )
        for stage, peaks in found["stages"].items():
            print(f"  {stage:<38} {peaks[0]:>17.0f} {peaks[1]:>12.0f}")
    print(f"RATIO {worst * MB / size:.3f} peak anonymous memory above imports / size of the data")


def write(folder: Path, size: int, shard: int, block: int, options: dict[str, bool]) -> None:
    """Writes shards of ``shard`` bytes in RLAIF-V's schema, in row groups of ``block`` bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = ["ds_name", "question", "chosen", "rejected", "origin_dataset", "origin_split"]
    fields = [(name, pa.string()) for name in (*text, "idx", "image_path")]
    image = ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([image, *fields])
    folder.mkdir()
    made = rows(size)
    for number in range(size // shard):
        name = f"train-{number:05d}-of-{size // shard:05d}.parquet"
        with pq.ParquetWriter(folder / name, schema, **options) as writer:
            for group in groups(made, shard, block):
                writer.write_table(pa.Table.from_pylist(group, schema))


def groups(made: Iterator[dict[str, Any]], shard: int, block: int) -> Iterator[list[Any]]:
    group: list[dict[str, Any]] = []
    total = held = 0
    while total < shard and (row := next(made, None)):
        group.append(row)
        held += len(row["image"]["bytes"])
        total += len(row["image"]["bytes"])
        if held >= block:
            yield group
            group, held = [], 0
    if group:
        yield group


def rows(size: int) -> Iterator[dict[str, Any]]:
    """Rows with pictures of noise, alternately JPEG and PNG, of about ``size`` bytes in total."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(size):
        pixels = rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        if number % 2:
            pixels = np.kron(pixels[:128, :128], np.ones((4, 4, 1), np.uint8))
        stream = io.BytesIO()
        kind: dict[str, Any] = {"format": "PNG", "compress_level": 0}
        if number % 2:
            kind = {"format": "JPEG", "quality": 85}
        Image.fromarray(pixels).save(stream, **kind)
        name = f"{number}.jpg"
        yield {
            "ds_name": "synthetic",
            "image": {"bytes": stream.getvalue(), "path": name},
            "question": f"What is in picture {number}?",
            "chosen": "yes" if rng.random() < 0.5 else f"Noise, number {number % 100}. " * 10,
            "rejected": "A cat.",
            "origin_dataset": f"set-{number % 7}",
            "origin_split": '{"model": "none", "type": "question"}',
            "idx": str(number),
            "image_path": f"images/{name}",
        }
        size -= len(stream.getvalue())
        if size <= 0:
            return


def in_fresh_process(folder: Path) -> dict[str, Any]:
    """Runs :func:`measure` in a fresh process, with every cache inside ``folder``."""
    places = {name: str(folder / name.lower()) for name in ("HF_HOME", "HF_DATASETS_CACHE")}
    command = [sys.executable, __file__, "--measure", str(folder / "data")]
    environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path) -> dict[str, Any]:
    """Loads, partitions and decodes; returns MB above the level after imports, and seconds."""
    import numpy as np
    from PIL import Image

    from fedvlm.batches.collate import Collator  # noqa: F401  counts torch among the imports
    from fedvlm.data.partition import make_partition
    from fedvlm.data.sources import load_rows, open_image
    from fedvlm.settings.sections import Config

    Image.init()
    config = Config.model_validate(
        {"data": {"path": str(folder)}, "partition": {"kind": "dirichlet", "clients": 8}}
    )
    peak = Peak()
    with peak:
        start = time.perf_counter()
        data = load_rows(config.data, 0)
        seconds = time.perf_counter() - start
        peak.stage("load_rows: convert and check images")
        partition = make_partition(data, config)
        peak.stage("make_partition")
        train = np.concatenate([partition.splits[c].train for c in partition.clients])
        for row in np.random.default_rng(0).choice(train, SAMPLE):
            open_image(data[int(row)]["image"]).load()
        peak.stage(f"decode {SAMPLE} rows")
        load_rows(config.data, 0)
        peak.stage("load_rows again, from the cache")
    size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "data": size / MB,
        "seconds": seconds,
        "anonymous": max(anonymous for anonymous, _ in peak.stages.values()),
        "resident": max(resident for _, resident in peak.stages.values()),
        "stages": peak.stages,
    }


class Peak:
    """Peak anonymous and resident memory of this process, by stage, in MB above the start.

    The kernel records the peak of the resident memory. A thread samples the anonymous memory 500
    times a second.
    """

    def __init__(self) -> None:
        self.stages: dict[str, tuple[float, float]] = {}

    def __enter__(self) -> Peak:
        start = _memory()
        self._start = start["RssAnon"], start["VmRSS"]
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._reset()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def stage(self, name: str) -> None:
        resident = _memory()["VmHWM"]
        self.stages[name] = (self._top - self._start[0], resident - self._start[1])
        self._reset()

    def _reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak
        self._top = _memory()["RssAnon"]

    def _sample(self) -> None:
        while not self._done.wait(0.002):
            self._top = max(self._top, _memory()["RssAnon"])


def _memory() -> dict[str, float]:
    """The memory of this process as Linux reports it, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = [line.split() for line in lines if line.startswith(("Vm", "Rss"))]
    return {name.rstrip(":"): int(kib) * 1024 / MB for name, kib, _ in fields}


if __name__ == "__main__":
    main()

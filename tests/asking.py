"""A malicious server for tests: it asks a site's worker by messages, as JSON there and back."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load, save

import fedvlm
from fedvlm.algorithms.base import NOBODY
from fedvlm.config import load as read
from fedvlm.deploy.remote import as_sent
from fedvlm.deploy.worker import Worker

RUN = {
    "algorithm": {"name": "plora"},
    "train": {"rounds": 4, "local_steps": 5, "batch_size": 4, "lr": 5e-3, "average": "none"},
    "eval": {"every": 0, "max_rows": 10, "max_new_tokens": 3},
}


def told(**other):
    """The configuration that a server sends; the sections in ``other`` are changed."""
    tree = json.loads(json.dumps(RUN))
    for name, part in other.items():
        tree[name] = {**tree.get(name, {}), **part} if isinstance(part, dict) else part
    return as_sent(read(tree))


def ask(worker, blob=b"", **header):
    """One message, as JSON there and back."""
    answer, sent = worker.perform(json.loads(json.dumps({"sampled": 1.0} | header)), blob)
    return json.loads(json.dumps(answer)), sent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The site's rows: 64, with a column ``patient`` that is no one's business."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    frame = fedvlm.scenes(style="iid", sites=1, rows=64).to_pandas()
    frame["patient"] = [f"Alma Turing MRN-{n * 7919 % 10000:04d}" for n in range(len(frame))]
    frame.to_parquet(path, index=False)
    return path


class At:
    """A site: starts workers on its rows and its state."""

    def __init__(self, rows, folder, **policy):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "policy.yml").write_text(json.dumps(policy))
        self.own = {"name": "site-0", "data": str(rows), "state": str(folder / "state")}
        self.own |= {"policy": str(folder / "policy.yml"), "log": str(folder / "site.log")}
        self.runs = folder / "state" / "runs"

    def open(self, run="r", **other):
        """A new worker, and its answer to the request to open a run."""
        worker = Worker(self.own)
        return worker, ask(
            worker, do="open", fedvlm=fedvlm.__version__, run=run, config=told(**other)
        )[0]


def close(worker):
    """Ends a worker as its process would: its lock is free."""
    if worker._lock:
        worker._lock.__exit__(None, None, None)
        worker._lock = None


def sent_to(worker):
    """The first download of a run."""
    algorithm = worker.site.algorithm
    return algorithm.send(algorithm.init(worker.site.engine.adapter), NOBODY)


def moved(tree, by):
    """Another download of the same form."""
    return {n: t + by if t.is_floating_point() else t for n, t in tree.items()}


@pytest.fixture(scope="module")
def plora(rows, tmp_path_factory):
    """The state of a site after two rounds of plora, and the last upload."""
    site = At(rows, tmp_path_factory.mktemp("plora"))
    worker, opened = site.open()
    assert opened["rows"]["train"] >= 20
    down = sent_to(worker)
    for number in (1, 2):
        about, up = ask(worker, save(down), do="train", round=number)
        assert about["loss"] > 0
        down = load(up)
    close(worker)
    return site, down


@pytest.fixture
def after(plora, rows, tmp_path):
    """A copy of that site."""
    old, down = plora
    site = At(rows, tmp_path)
    shutil.copytree(old.runs, site.runs)
    return site, down

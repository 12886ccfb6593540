"""fedvlm's side of `deploy.py`: a server, its sites and a run, each in a process."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from _deploy.watch import Outcome, Watch, check_memory

NAMES = {"runner_process": "job", "server_train": "server", "deploy server": "command"}
MODELS = {"tiny": 68_096, "wide": 117_760}  # model -> bytes of all LoRA factors of rank 1
NEEDS = {"tiny": 650, "wide": 1000}  # MB of memory a site
MOST = 128  # the largest rank of the tiny model


def chosen(megabytes: float) -> tuple[str, int]:
    """The model and the rank whose uploads have about this size."""
    size = megabytes * 1e6
    name = "tiny" if size <= MOST * MODELS["tiny"] else "wide"
    return name, max(1, round(size / MODELS[name]))


def measure(
    folder: Path, sites: int, megabytes: float, repeats: int, at_once: int, secure: bool = False
) -> Outcome:
    """Provisions a federation, runs it and ends its processes.

    Args:
        folder: an empty folder.
        sites: number of sites.
        megabytes: approximate size of an upload.
        repeats: number of rounds that count. One more round runs before them, and one more after
            them, in which the sites evaluate.
        at_once: number of parallel calls of the server.
        secure: with secure aggregation, whose sites pin one another's keys.
    """
    from fedvlm import config as configs
    from fedvlm.deploy.nvflare.demo import Started, enrol, loopback, pinned
    from fedvlm.deploy.nvflare.federation import Federation
    from fedvlm.deploy.nvflare.project import provision
    from fedvlm.deploy.remote import Limits
    from fedvlm.errors import FedVLMError
    from fedvlm.store.files import load_tree, read_lines

    check_memory(sites, NEEDS[chosen(megabytes)[0]])
    names = [f"site-{number}" for number in range(sites)]
    _write_rows(folder, sites)
    settings = _settings(folder, megabytes, repeats + 2)
    policy = folder / "policy.yaml"
    if secure:
        settings["wire"] = {"secure": True}
        policy = pinned(folder / "sites", names, **json.loads(policy.read_text()))
    kits = provision(loopback(names), folder / "federation")
    limits = Limits(min_sites=sites, at_once=at_once, open_s=600, train_s=120, score_s=300)
    with Watch(NAMES) as watch, Started(folder) as started:
        started.start("server", "deploy", "server", "-f", str(folder / "federation"))
        watch.add(started.processes["server"].pid)
        for name in names:
            data, state = str(folder / f"{name}.parquet"), str(folder / "sites" / name)
            enrol(kits[name], Path(state))
            words = ["--data", data, "--state", state, "--policy", str(policy)]
            started.start(name, "site", "start", *words)
            watch.add_other(started.processes[name].pid)
        federation = Federation(folder / "federation")
        try:
            federation.run(configs.load(settings), limits=limits, wait=300.0)
        except FedVLMError as error:
            raise SystemExit(f"{error}\n{_failures(folder)}") from None
    if failures := _failures(folder):
        raise SystemExit(failures)
    counted = range(2, repeats + 2)
    ends = {e["round"]: e["time"] for e in _events(folder, "round")}
    trained = _events(folder, "trained")
    adapter = load_tree(folder / "run" / "adapters" / "global" / "adapter_model.safetensors")
    return Outcome(
        walls=[ends[n] - ends[n - 1] for n in counted],
        there=[max(e["seconds_there"] for e in trained if e["round"] == n) for n in counted],
        sent=max(read_lines(folder / "run" / "metrics.jsonl")[2]["bytes_up"].values()),
        saving=statistics.median(map(_saving, folder.glob("sites/*/runs/*/rounds/[0-9]*"))),
        peaks=watch.peaks,
        shapes=[list(tensor.shape) for tensor in adapter.values()],
    )


def _settings(folder: Path, megabytes: float, rounds: int) -> dict[str, Any]:
    """The settings of the run. Writes the policy of the sites and, where needed, the wide model."""
    model, rank = chosen(megabytes)
    allowed = model if model == "tiny" else _write_wide(folder)
    policy = {
        "models": {model: allowed},
        "train_rows": 1,
        "batch_rows": 1,
        "scored_rows": 1,
        "rank": None,
    }
    (folder / "policy.yaml").write_text(json.dumps(policy))
    return {
        "output": str(folder / "run"),
        "model": {"name": model},
        "data": {"path": str(folder / "site-0.parquet")},
        "algorithm": {"name": "lora"},
        "lora": {"rank": rank},
        "partition": {"kind": "column", "column": "site", "splits": "alone", "min_rows": 2},
        "train": {"rounds": rounds, "local_steps": 1, "batch_size": 1},
        "eval": {"every": 0, "max_rows": 1, "max_new_tokens": 1},
        "engine": {"clients": 1, "threads": 1},
    }


def _write_wide(folder: Path) -> str:
    """Writes a model of twice the width, because the bundled model's uploads stay too small."""
    from _small import write_model

    return write_model(folder / "wide", width=256, layers=None)


def _write_rows(folder: Path, sites: int) -> None:
    import fedvlm

    table = fedvlm.scenes(sites=sites, rows=12).to_pandas()
    for name, rows in table.groupby("site"):
        rows.to_parquet(folder / f"{name}.parquet", index=False)


def _events(folder: Path, kind: str) -> list[dict[str, Any]]:
    from fedvlm.store.files import read_lines

    files = sorted((folder / "federation" / "runs").glob("*/events.jsonl"))
    return [event for file in files for event in read_lines(file) if event["event"] == kind]


def _failures(folder: Path) -> str:
    return "\n".join(f"{e['site']}: {e['why']}" for e in _events(folder, "failed"))


def _saving(folder: Path) -> float:
    """Seconds from the creation of a saved round's folder to its renaming after the last write."""
    command = ["stat", "-c", "%.6W %.6Z", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    born, changed = map(float, done.stdout.split())
    return changed - born


def shapes(megabytes: float) -> list[list[int]]:
    """The shapes of the tensors in an upload, without a run."""
    from fedvlm import config as configs
    from fedvlm.rounds import prepare as preparing

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_rows(folder, 1)
        settings = _settings(folder, megabytes, 1)
        if settings["model"]["name"] == "wide":
            settings["model"]["name"] = str(folder / "wide")
        engine, _, _ = preparing.prepare(configs.load(settings))
    return [list(tensor.shape) for tensor in engine.adapter.values()]

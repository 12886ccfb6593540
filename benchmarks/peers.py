"""One federated job in fedvlm and in its peers. The sides run their rounds by turns.

    python benchmarks/peers.py [--quick] [--batch 1,8] [--peers flower,pfl] [--venv DIR]

The job is LoRA with FedAvg on the bundled tiny model: 10 clients with the bundled scenes, all
clients in every round, AdamW, clipped gradients. All sides get the same model, the same initial
adapter and the same collated batches. After the first round the aggregated adapter of each side is
compared with ours: at most one of 10,000 numbers may differ by more than 1e-4. Single numbers do
differ, because AdamW makes a step of full length from a gradient of rounding errors: a plain loop
in double precision differs as much from the same loop in single precision. The first round does not
count. Start-up of a peer is the time until it can begin a round, imports included. Start-up of
fedvlm is the time from data to model. The sides:

- fedvlm: a round of `fedvlm run`, with its checkpoint and without evaluation
- fedvlm-torchrun: the same with one process for each core
- trainer: a Hugging Face `Trainer` for every client, with PEFT's state dicts in and out
- pfl: the simulated FedAvg of pfl-research
- flower: Flower's simulation on Ray with its FedAvg. The ClientApp follows FlowerTune (`Trainer`,
  PEFT's state dicts). There is one actor for each core, and the model stays in the actor.
- flower-plain: the same with a plain PyTorch loop instead of the `Trainer`
- flower-reload: the same as flower, but every message loads the model, as in the template

The first run installs Flower and pfl-research into a separate environment. The last line is
`RATIO <number> <what>`.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _common import best_threads, environment, paired, ratio, seconds

HERE = Path(__file__).resolve().parent
VENV = Path("~/.cache/fedvlm-bench/peers").expanduser()
PEERS = {  # name -> module in benchmarks/, and its arguments after JOB and NAME
    "fedvlm-torchrun": ["_peer.fedvlm"],
    "trainer": ["_peer.trainer", "trainer"],
    "pfl": ["_peer.pfl"],
    "flower": ["_peer.flower", "trainer"],
    "flower-plain": ["_peer.flower", "plain"],
    "flower-reload": ["_peer.flower", "trainer", "reload"],
}
OURS = ("fedvlm-torchrun", "trainer")  # sides in this environment
QUIET = {  # without these, Flower and Ray ask the network
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
CLIENTS, ROWS = 10, 40
LIMIT, SAME = 600, 1e-4  # seconds until a side counts as dead; tolerance of the first round


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="batch 1, 2 steps, two peers")
    parser.add_argument("--batch", default="1,8", help="batch sizes (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps of a client in a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the first")
    parser.add_argument("--peers", help=f"some of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--venv", type=Path, default=VENV, help="the peers' environment")
    options = parser.parse_args()
    if options.quick:
        options.batch, options.steps = "1", 2
        options.peers = options.peers or "pfl,flower-plain"
    names = options.peers.split(",") if options.peers else list(PEERS)
    if unknown := set(names) - set(PEERS):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    python = install(options.venv) if set(names) - set(OURS) else Path(sys.executable)
    print(environment())
    for batch in map(int, options.batch.split(",")):
        found = compare(names, python, batch, options.steps, options.repeats)
    first = next(n for n in ("flower", "flower-plain", *names) if n in found)
    best = min(1.0, found.get("fedvlm-torchrun", 1.0))
    print(
        f"RATIO {found[first] / best:.2f} {first} / fedvlm as it is fastest, wall time of a round "
        f"of {CLIENTS} clients, {options.steps} steps of batch {batch}, tiny"
    )


def install(folder: Path) -> Path:
    """The Python of the peers' environment. Creates or completes the environment where needed."""
    ours = [f"{name}=={version(name).split('+')[0]}" for name in ("torch", "transformers", "peft")]
    # Flower 1.42.0 needs a newer certifi than some package indexes have.
    wanted = [*ours, "accelerate", "flwr[simulation]==1.41.0", "pfl==0.6.0"]
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if done.exists() and done.read_text().split() == wanted:
        return python
    print(f"installing {', '.join(wanted[3:])} into {folder}, once", flush=True)
    venv.create(folder, with_pip=True, symlinks=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, wanted[0]], check=True
    )  # first and alone: pip might choose another build for a range
    for package in wanted[1:]:
        subprocess.run([*pip, *ours, package], check=True)
    done.write_text("\n".join(wanted) + "\n")
    return python


def compare(
    names: list[str], python: Path, batch: int, steps: int, repeats: int
) -> dict[str, float]:
    """Prints a table of all sides; returns the time of each peer over the time of fedvlm."""
    with tempfile.TemporaryDirectory(prefix="fedvlm-peers-") as folder:
        ours = Ours(Path(folder), batch, steps, 1 + repeats)
        print(
            f"\nbatch {batch}, {steps} steps, {CLIENTS} clients, {ours.elements} numbers in an "
            f"adapter, {ours.threads} thread(s) for fedvlm; medians of {repeats} rounds"
        )
        peers: dict[str, Peer] = {}
        try:
            for name in names:
                peers[name] = Peer(name, python, Path(folder))
            sides = {"fedvlm": ours.round, **{name: peer.round for name, peer in peers.items()}}
            taken = paired(sides, 1 + repeats)
            apart = {name: ours.apart(name) for name in names}
        finally:
            for peer in peers.values():
                peer.stop()
    head = (
        "side",
        "startup s",
        "first round s",
        "round s",
        "x fedvlm",
        "range",
        "difference",
        "over 1e-4",
    )
    print(("{:<14}" + "{:>15}" * 7).format(*head))
    found = {}
    for name, times in taken.items():
        startup = ours.startup if name == "fedvlm" else peers[name].startup
        row = [name, f"{startup:.1f}", f"{times[0]:.2f}", f"{statistics.median(times[1:]):.3f}"]
        if name != "fedvlm":
            found[name], low, high = ratio(times[1:], taken["fedvlm"][1:])
            row += [f"{found[name]:.2f}", f"{low:.2f} to {high:.2f}"]
            row += [f"{apart[name][0]:.1e}", str(apart[name][1])]
        print(("{:<14}" + "{:>15}" * (len(row) - 1)).format(*row), flush=True)
    if odd := [name for name, (_, many) in apart.items() if many > ours.elements / 10_000]:
        sys.exit(
            f"not the same job: the adapters of {', '.join(odd)} differ from ours after a round"
        )
    return found


class Ours:
    """The side of fedvlm, in this process. Writes the job for the other sides."""

    def __init__(self, folder: Path, batch: int, steps: int, rounds: int):
        import fedvlm
        from fedvlm.rounds import prepare as preparing

        began = time.perf_counter()
        self.config = fedvlm.load_config(
            {
                "output": str(folder / "run"),
                "data": {"scenes": {"sites": CLIENTS, "rows": ROWS}},
                "algorithm": {"name": "lora"},
                "train": {"rounds": rounds, "batch_size": batch, "local_steps": steps},
                "eval": {"every": 0},
            }
        )
        self.folder, self.number = folder, 0
        self.engine, self.partition, self.store = preparing.prepare(self.config)
        self.state = self.engine.algorithm.init(self.engine.adapter)
        self.startup = time.perf_counter() - began
        self.elements = sum(t.numel() for t in self.state.values())
        self._write_job(steps, rounds)
        self.threads = best_threads(self._train)

    def _write_job(self, steps: int, rounds: int) -> None:
        import torch
        from safetensors.torch import save_file

        from _sides import drawn
        from fedvlm.config import dump
        from fedvlm.models.load import load_model
        from fedvlm.tree import module

        loaded = load_model(self.config.model)
        loaded.model.save_pretrained(self.folder / "model")
        loaded.processor.save_pretrained(self.folder / "model")
        save_file(dict(self.engine.adapter), self.folder / "adapter.safetensors")
        for number, client in enumerate(self.partition.clients):
            rows = self.partition.splits[client].train
            found: list[list[Any]] = []
            for round_ in range(1, rounds + 1):
                indices = drawn(self.config, rows, client, round_)
                found.append([self.engine.collator.training(i) for i in indices])
            torch.save(found, self.folder / f"batches-{number}.pt")
        train, lora = self.config.train, self.config.lora
        modules = sorted({module(name) for name in self.engine.adapter})
        job = {
            "weights": [len(self.partition.splits[c].train) for c in self.partition.clients],
            "rounds": rounds,
            "steps": steps,
            "lr": train.lr,
            "weight_decay": train.weight_decay,
            "max_grad_norm": train.max_grad_norm,
            "lora": {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": modules},
        }
        (self.folder / "job.json").write_text(json.dumps(job))
        (self.folder / "config.yaml").write_text(dump(self.config))

    def _plan(self, number: int) -> Any:
        from fedvlm.rounds.schedule import Round

        return Round(number, tuple(self.partition.clients), evaluate=False)

    def _train(self) -> None:
        from fedvlm.engines.wire import Forms
        from fedvlm.rounds import federate
        from fedvlm.rounds.progress import Progress

        plan = self._plan(self.number + 1)
        forms = Forms(self.engine.algorithm, self.engine.adapter)
        self.result = federate.one_round(
            plan, self.engine, self.partition.weights, self.state, (), Progress(), forms
        )

    def round(self) -> float:
        """Seconds of one round of :func:`fedvlm.rounds.federate.run`."""
        return seconds(self._round)

    def _round(self) -> None:
        self._train()
        self.number += 1
        self.state, line = self.result
        self.store.commit(self.number, self.state, line, {"round": self.number})
        if self.number == 1:
            self.first = self.state

    def apart(self, peer: str) -> tuple[float, int]:
        """The distance of a peer's aggregated adapter from ours after the first round.

        Returns:
            The largest difference, and the count of numbers that differ by more than 1e-4.
        """
        import torch
        from safetensors.torch import load_file

        theirs = load_file(self.folder / f"{peer}-1.safetensors")
        if theirs.keys() != self.first.keys():
            sys.exit(f"{peer} has other tensors: {sorted(theirs.keys() ^ self.first.keys())[:3]}")
        gaps = torch.cat([(theirs[n] - t).abs().flatten() for n, t in self.first.items()])
        return gaps.max().item(), int((gaps > SAME).sum())


class Peer:
    """The process of a peer. It runs one round on demand."""

    def __init__(self, name: str, python: Path, folder: Path):
        module, *rest = PEERS[name]
        start = [sys.executable if name in OURS else str(python)]
        if name == "fedvlm-torchrun":
            start += ["-m", "torch.distributed.run", "--nproc-per-node", str(os.cpu_count())]
        command = [*start, "-m", module, str(folder), name, *rest]
        path = [str(HERE)]  # Ray's workers import the module from there as well
        if name in OURS:
            path += filter(None, [os.environ.get("PYTHONPATH")])
        self._log = open(folder / f"{name}.log", "w+")  # noqa: SIM115
        began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._name = name
        self._heard()
        self.startup = time.perf_counter() - began

    def round(self) -> float:
        """Runs one round; returns its wall time in seconds, measured inside the process."""
        assert self._process.stdin is not None
        self._process.stdin.write("round\n")
        self._process.stdin.flush()
        return float(self._heard())

    def _heard(self) -> str:
        """The next message of the process. Other lines of output are kept for the error text."""
        assert self._process.stdout is not None
        timer = threading.Timer(LIMIT, self._end, [signal.SIGTERM])
        timer.start()
        others: collections.deque[str] = collections.deque(maxlen=20)
        try:
            for line in self._process.stdout:
                if line.startswith("@ "):
                    return line[2:].strip()
                others.append(line)
        finally:
            timer.cancel()
        self._log.seek(0)
        tail = "".join([*others, *self._log.readlines()[-20:]])
        sys.exit(f"{self._name} ended, or sent no message for {LIMIT} s:\n{tail}")

    def stop(self) -> None:
        """Waits until the process ends after its last round; ends it by a signal after 20 s."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        for again in (signal.SIGTERM, signal.SIGKILL, None):
            try:
                self._process.wait(timeout=20)
                break
            except subprocess.TimeoutExpired:
                if again:
                    self._end(again)
        self._log.close()

    def _end(self, how: signal.Signals) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, how)


if __name__ == "__main__":
    main()

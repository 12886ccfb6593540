"""The job of every peer: its model, its batches and its pace. Does not import fedvlm.

`peers.py` writes the folder of the job: `job.json`, the base model in the format of transformers,
the common initial adapter, and the collated batches of every client and round.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

Tree = dict[str, torch.Tensor]
Batches = list[dict[str, torch.Tensor]]


class Job:
    """The folder of a job, read."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name, value in json.loads((self.folder / "job.json").read_text()).items():
            setattr(self, name, value)
        self.weights: list[int]  # number of training rows of each client
        self.rounds: int
        self.steps: int
        self.lr: float
        self.weight_decay: float
        self.max_grad_norm: float
        self.lora: dict[str, Any]
        self.adapter = load_file(self.folder / "adapter.safetensors")

    @functools.cache  # noqa: B019  there is one job in a process
    def _batches(self, client: int) -> list[Batches]:
        return torch.load(self.folder / f"batches-{client}.pt")

    def batches(self, client: int, round_: int) -> Batches:
        """The batches of a client in a round. Rounds count from 1."""
        return self._batches(client)[round_ - 1]

    def model(self) -> Any:
        """The PEFT model with the common initial adapter."""
        base = AutoModelForImageTextToText.from_pretrained(self.folder / "model")
        model = get_peft_model(base, LoraConfig(**self.lora))
        write(model, self.adapter)
        return model.train()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay, fused=True)


def read(model: Any) -> Tree:
    """A copy of the adapter. PEFT returns some parameters themselves, not copies."""
    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}


def write(model: Any, tree: Tree) -> None:
    set_peft_model_state_dict(model, tree)


def train_plain(model: Any, batches: Batches, job: Job) -> None:
    """A plain PyTorch loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = job.optimizer(trained)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.max_grad_norm)
        optimizer.step()


class InOrder(Trainer):
    """A `Trainer` that keeps the order of the batches."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_by_trainer(model: Any, batches: Batches, job: Job) -> None:
    """A Hugging Face `Trainer` for this client and round, as in FlowerTune's template."""
    settings = TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # a "row" is a collated batch
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        weight_decay=job.weight_decay,
        max_grad_norm=job.max_grad_norm,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with contextlib.redirect_stdout(sys.stderr):
        InOrder(
            model=model, args=settings, train_dataset=batches, data_collator=lambda found: found[0]
        ).train()


LOOPS = {"trainer": train_by_trainer, "plain": train_plain}


def best_threads(job: Job, model: Any) -> None:
    """Sets torch's threads to 1 or to the number of cores, whichever trains this job faster."""
    taken = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        train_plain(model, job.batches(0, 1)[:1], job)
        began = time.perf_counter()
        train_plain(model, job.batches(0, 1)[:2], job)
        taken[threads] = time.perf_counter() - began
    torch.set_num_threads(min(taken, key=lambda n: taken[n]))
    write(model, job.adapter)


class Pace:
    """Runs a round when `peers.py` requests one, and saves its result in the folder of the job."""

    def __init__(self, job: Job, name: str):
        self.job, self.name, self.round = job, name, 0
        self._say("ready")

    def wait(self) -> None:
        """Waits for the request of the next round; returns at once after the last round."""
        if self.round == self.job.rounds:
            return
        if not sys.stdin.readline():
            raise RuntimeError("peers.py ended before the last round")
        self.round += 1
        self.began = time.perf_counter()

    def done(self, tree: Tree) -> None:
        """Ends the requested round: saves the adapter and reports the seconds."""
        taken = time.perf_counter() - self.began
        tensors = {n: t.detach().contiguous().clone() for n, t in tree.items()}
        save_file(tensors, self.job.folder / f"{self.name}-{self.round}.safetensors")
        self._say(str(taken))

    def _say(self, word: str) -> None:
        print(f"@ {word}", flush=True)

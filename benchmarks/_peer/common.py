"""The job that every peer does: its model, its batches, its pace. Needs no fedvlm.

The folder of a job is written by `peers.py`: `job.json`, the base model as transformers saves it,
the common initial adapter, and every client's batches of every round, collated already.
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
    """What `peers.py` wrote."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        for name, value in json.loads((self.folder / "job.json").read_text()).items():
            setattr(self, name, value)
        self.weights: list[int]  # a client's number of training rows
        self.rounds: int
        self.steps: int
        self.lr: float
        self.weight_decay: float
        self.max_grad_norm: float
        self.lora: dict[str, Any]
        self.adapter = load_file(self.folder / "adapter.safetensors")

    @functools.cache  # noqa: B019  one job a process
    def _batches(self, client: int) -> list[Batches]:
        return torch.load(self.folder / f"batches-{client}.pt")

    def batches(self, client: int, round_: int) -> Batches:
        """A client's batches of a round, from 1."""
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
    """A copy of the adapter: some of PEFT's tensors are the parameters themselves."""
    return {n: t.detach().clone() for n, t in get_peft_model_state_dict(model).items()}


def write(model: Any, tree: Tree) -> None:
    set_peft_model_state_dict(model, tree)


def train_plain(model: Any, batches: Batches, job: Job) -> None:
    """A bare PyTorch loop."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = job.optimizer(trained)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.max_grad_norm)
        optimizer.step()


class InOrder(Trainer):
    """Takes the batches as they lie."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train_by_trainer(model: Any, batches: Batches, job: Job) -> None:
    """A Hugging Face `Trainer` for this client and round, as FlowerTune's template has it."""
    settings = TrainingArguments(
        output_dir=str(job.folder / "trainer"),
        max_steps=len(batches),
        per_device_train_batch_size=1,  # of batches that are collated already
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
    """Sets torch's threads to 1 or to every core's, whichever trains this job faster here."""
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
    """One round whenever `peers.py` asks for one; what came out lies in the job's folder."""

    def __init__(self, job: Job, name: str):
        self.job, self.name, self.round = job, name, 0
        self._say("ready")

    def wait(self) -> None:
        """Until the next round is asked for, if there is one."""
        if self.round == self.job.rounds:
            return
        if not sys.stdin.readline():
            raise RuntimeError("peers.py has ended")
        self.round += 1
        self.began = time.perf_counter()

    def done(self, tree: Tree) -> None:
        """Ends the round that was asked for."""
        taken = time.perf_counter() - self.began
        tensors = {n: t.detach().contiguous().clone() for n, t in tree.items()}
        save_file(tensors, self.job.folder / f"{self.name}-{self.round}.safetensors")
        self._say(str(taken))

    def _say(self, word: str) -> None:
        print(f"@ {word}", flush=True)

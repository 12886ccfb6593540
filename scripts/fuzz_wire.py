"""The trials of scripts/fuzz.py with messages: frames, requests, tensor files, uploads."""

from __future__ import annotations

import random
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fuzz_damage import SMALL, Wrong, spoiled


def messages(rng: random.Random, folder: Path) -> None:
    """A damaged frame, request, tensor file or upload."""
    rng.choice((_frame, _request, _tensors, _upload))(rng, folder)


def _frame(rng: random.Random, folder: Path) -> None:
    from fedvlm.deploy.frames import receive, send

    one, other = socket.socketpair()
    third, fourth = socket.socketpair()
    with one, other, third, fourth:
        send(one, {"do": "train", "round": 3, "a": [1, {"b": None}]}, rng.randbytes(50))
        third.sendall(spoiled(rng, other.recv(2**16), 2))
        third.shutdown(socket.SHUT_WR)
        header, _ = receive(fourth, limit=2.0)
        if not isinstance(header, dict):
            raise Wrong(f"the header {header!r:.60} is no mapping")


def _request(rng: random.Random, folder: Path) -> None:
    from fedvlm.config import load
    from fedvlm.deploy.worker import Worker
    from fedvlm.errors import FedVLMError
    from fedvlm.version import __version__

    config = load(None, *SMALL).model_dump(mode="json")
    odd = [None, 1, "x", "../x", [], {}, {"a": {}}, 2**70, "\0", "\ud800", [[[]]], True, "a" * 9999]
    asked: dict[str, Any] = {
        "do": "open",
        "fedvlm": __version__,
        "run": "r",
        "config": config,
        "round": 1,
        "sampled": 1.0,
    }
    if rng.random() < 0.5:
        asked["do"] = rng.choice(("train", "score", "answer", "export", "adapter", "x", "open"))
    for _ in range(rng.randint(1, 3)):
        asked[rng.choice(list(asked))] = rng.choice(odd)
    if isinstance(asked["config"], dict) and rng.random() < 0.5:
        asked["config"][rng.choice(list(config))] = rng.choice(odd)
    own = {"name": "a", "data": str(folder / "none.csv"), "state": str(folder / "state")}
    answer, _ = Worker({**own, "policy": None}).perform(asked, rng.randbytes(9))
    if "error" not in answer:
        raise Wrong(f"a request without data is answered: {answer!r:.100}")
    kind = str(answer["message"]).removesuffix("; see the site's log")
    if kind != answer["message"] and kind != "DataError":
        raise RuntimeError(f"the worker failed with {kind} at {str(asked)[:150]}")
    raise FedVLMError(answer["message"])


def _tensors(rng: random.Random, folder: Path) -> None:
    from safetensors.torch import save

    from fedvlm.deploy.remote import Limits, Remote, Unanswered
    from fedvlm.errors import FedVLMError

    blob = save(_upload_parts()[3])
    try:
        tree = Remote._read(SimpleNamespace(limits=Limits()), spoiled(rng, blob, 2))  # type: ignore[arg-type]
    except Unanswered as error:
        raise FedVLMError(error) from error
    forms, visit, down, _ = _upload_parts()
    forms.received(visit, down, tree, 12.0)


def _upload(rng: random.Random, folder: Path) -> None:
    import torch

    forms, visit, down, message = _upload_parts()
    name = rng.choice(list(message))
    tensor = message[name].clone()
    odd = [
        *(tensor * float("nan"), tensor * 1e38 * 1e38, tensor.double(), tensor.half(), tensor[:1]),
        *(tensor.T, tensor.flatten(), torch.empty(0), tensor.to(torch.int64), tensor + 100),
    ]
    wrong = rng.random() < 0.9
    changed = {**message, name: rng.choice(odd)} if wrong else message
    if rng.random() < 0.2:
        changed, wrong = {**changed, rng.choice(("x", "", "\0")): tensor}, True
    weight = rng.choice((12.0, 12.0, 0.0, -1.0, float("nan"), 1e9))
    found = forms.received(visit, down, changed, weight)
    if wrong or weight != 12.0 or any(not t.isfinite().all() for t in found.values()):
        raise Wrong(f"an upload of {weight} examples is taken")


def _upload_parts() -> Any:
    import torch

    from fedvlm.algorithms.base import Visit
    from fedvlm.algorithms.sharing import sharing
    from fedvlm.engines.wire import Forms

    layer = "base_model.model.layers.0.q_proj.lora_"
    generator = torch.Generator().manual_seed(0)
    whole = {
        f"{layer}A.weight": torch.randn(2, 5, generator=generator),
        f"{layer}B.weight": torch.zeros(4, 2),
    }
    algorithm = sharing({"": "AB"})
    visit = Visit("site-0", 12.0, round=1)
    down = algorithm.send(algorithm.init(whole), visit)
    message = {n: t + 0.1 for n, t in down.items()}
    return Forms(algorithm, whole, (), max_norm=50.0), visit, down, message

"""Loads the frozen model and its processor: the bundled one, a local folder, or a hub name."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedvlm.errors import FedVLMError
from fedvlm.models.processors import load_processor
from fedvlm.sections import ModelConfig

ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = {"tiny": ASSETS / "tiny"}


@dataclass(frozen=True)
class Loaded:
    """A frozen model on its device, with its processor."""

    model: Any
    processor: Any
    device: torch.device
    name: str


def load_model(config: ModelConfig) -> Loaded:
    """Loads ``config.name`` with ``AutoModelForImageTextToText`` and ``AutoProcessor``.

    Raises:
        FedVLMError: no such folder or hub model, the hub is out of reach, or no such device.
    """
    device = pick_device(config.device)
    source, local = locate(config.name)
    quiet_transformers()
    from transformers import AutoModelForImageTextToText

    try:
        processor = load_processor(source, local)
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=getattr(torch, config.dtype), local_files_only=local
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise FedVLMError(_why(config.name, local, error)) from error
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    return Loaded(model, processor, device, config.name)


def locate(name: str) -> tuple[str, bool]:
    """Where a model's files are: (folder or hub name, whether it is local)."""
    if name in BUNDLED:
        return str(BUNDLED[name]), True
    if Path(name).is_dir():
        return name, True
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists():
        raise FedVLMError(
            f"model.name: there is no model folder '{name}'; give a folder with config.json and "
            "weights, a hub name such as HuggingFaceTB/SmolVLM-256M-Instruct, or 'tiny'"
        )
    return name, False


def pick_device(name: str) -> torch.device:
    """``auto`` is the first GPU, else the CPU.

    Raises:
        FedVLMError: the device does not exist here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise FedVLMError(
            f"model.device: '{name}' cannot be used here ({reason}); use auto or cpu"
        ) from None
    return device


def quiet_transformers() -> None:
    """No progress bars, no advice about optional packages: what matters, we say ourselves."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="transformers")


def _why(name: str, local: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else repr(error)
    if local:
        return (
            f"model.name: the folder '{name}' does not load as a vision-language model: {reason}; "
            "it must hold what save_pretrained of the model and of its processor wrote"
        )
    return (
        f"model.name: '{name}' is neither a local folder nor a model that the Hugging Face hub "
        f"gave us: {reason}\n    Without a connection, download it elsewhere (hf download {name} "
        "--local-dir DIR), copy the folder, and set model.name=DIR; or use the bundled 'tiny'"
    )

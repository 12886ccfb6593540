"""Names of checkpoints in transformers' own format, for releases that need custom code."""

from __future__ import annotations

import json
import re
from pathlib import Path

from fedvlm.errors import FedVLMError, brief

# (name of a release, name of the same weights in transformers' own format)
NATIVE = (
    (r"microsoft/Florence-2-(base|large)(-ft)?", r"florence-community/Florence-2-\1\2"),
    (r"liuhaotian/llava-v1\.5-(7b|13b)", r"llava-hf/llava-1.5-\1-hf"),
    (r"liuhaotian/llava-v1\.6-(.+)", r"llava-hf/llava-v1.6-\1-hf"),
    (r"lmms-lab/llava-onevision-(qwen2-.+)", r"llava-hf/llava-onevision-\1-hf"),
    (r"OpenGVLab/InternVL(2_5|3)-(.+?)(?<!-hf)", r"OpenGVLab/InternVL\1-\2-hf"),
    (r"OpenGVLab/InternVL3_5-(.+?)(?<!-hf)", r"OpenGVLab/InternVL3_5-\1-HF"),
)


HANDED = "handed:"
"""Prefix of the name of a model that a program handed over; a digest follows."""


def refuse_handed(name: str) -> None:
    """Refuses to load a model that no file holds.

    Raises:
        FedVLMError: with the ways to give it.
    """
    if name.startswith(HANDED):
        raise FedVLMError(
            f"model.name: '{brief(name)}' was handed over by a Python program, and its weights are "
            "not in the run's folder. To resume the run, hand it over again: fedvlm.resume(DIR, "
            "model=(model, processor)). For other commands, write the model and its processor to "
            "a folder (save_pretrained) and add --set model.name=FOLDER"
        )


def native_name(name: str) -> str | None:
    """The checkpoint to use instead of ``name``; None if ``name`` itself is the one to use.

    >>> native_name("microsoft/Florence-2-base-ft")
    'florence-community/Florence-2-base-ft'
    """
    for pattern, native in NATIVE:
        found = re.fullmatch(pattern, name, flags=re.IGNORECASE)
        if found:
            return found.expand(native)
    return None


def refuse_foreign_release(name: str) -> None:
    """Refuses a release that only its custom code can read.

    Raises:
        FedVLMError: with the name of the same weights in transformers' own format.
    """
    native = native_name(name)
    if native is not None:
        raise FedVLMError(
            f"model.name: '{brief(name)}' needs custom code, which fedvlm does not run; use "
            f"'{brief(native)}', "
            "the same model in transformers' own format"
        )


def refuse_own_code(folder: str) -> None:
    """Refuses a local model that needs custom code.

    Raises:
        FedVLMError: the folder's configuration asks for code that came with the weights.
    """
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # loading reports what is wrong with the file
    if not isinstance(config, dict) or not config.get("auto_map"):
        return
    former = str(config.get("_name_or_path") or "")
    native = native_name(former)
    advice = (
        f"use '{native}'"
        if native
        else "use the checkpoint in transformers' own format, often with a name that ends in -hf "
        "(Florence-2: florence-community/Florence-2-base)"
    )
    raise FedVLMError(
        f"model.name: the model in '{brief(folder)}' needs custom code (auto_map in its "
        f"config.json), which fedvlm does not run; {advice}"
    )

"""Checks of a model's folder that need no weights in memory: its files, and what they name."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fedvlm.errors import FedVLMError, brief

ADAPTER = "adapter_config.json"
END = 2**16  # bytes at each end of a file of weights
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "tokenizer.json",
)


def check_folder(folder: str, *, weights: bool = True) -> None:
    """Refuses a folder that cannot be a whole model, and says what is wrong with it.

    It reads the JSON files and the heads of the weights. A changed byte within the weights shows
    only in a digest, so it is not found.

    Args:
        folder: the path of the folder.
        weights: the folder must have weights.

    Raises:
        FedVLMError: the folder cannot be read, holds an adapter, lacks a file, or holds a damaged
            file.
    """
    try:
        files = set(os.listdir(folder))
    except OSError as error:
        raise refused(folder, f"it cannot be read ({error.strerror})") from error
    if ADAPTER in files:
        raise _adapter(folder, alone="config.json" not in files)
    if "config.json" not in files:
        raise refused(folder, "it has no config.json")
    for file in DOCUMENTS:
        if file in files:
            document = _document(folder, file)
            if file == "config.json" and not isinstance(document.get("model_type"), str):
                raise refused(folder, "its config.json names no model_type")
            # models.names answers a config.json with auto_map by another checkpoint's name.
            if file not in ("config.json", "tokenizer.json") and _has_code(document):
                raise refused(
                    folder,
                    f"its {file} asks for custom code (auto_map), which fedvlm does not run; a "
                    "model in transformers' own format needs no auto_map: remove it",
                )
    for file in _weights(folder, files) if weights else ():
        _check_weights(folder, file)


def mark(folder: str | Path) -> str:
    """A digest that differs for another model: of its configuration, and the ends of its weights.

    Training changes all weights, so the first and the last bytes of a file are enough.
    """
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(folder).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            with open(path, "rb") as f:
                first = f.read(END)
                f.seek(max(0, size - END))
                digest.update(f"{path.name} {size} ".encode() + first + f.read(END))
    return digest.hexdigest()


def refuse_adapter(name: str, config: dict[str, Any] | None) -> None:
    """Refuses a hub model with an adapter beside it, which transformers would add to the model.

    Args:
        name: the hub name.
        config: the content of its ``adapter_config.json``; empty or None without this file.
    """
    if config:
        base = brief(config.get("base_model_name_or_path"))
        raise FedVLMError(
            f"model.name: '{brief(name)}' holds an adapter (of the base model '{base}'): use that "
            "base model, or a whole model with the adapter merged into it"
        )


def refused(folder: str, why: str) -> FedVLMError:
    """The error for a folder that does not load."""
    return FedVLMError(
        f"model.name: the folder '{brief(folder)}' does not load as a vision-language model: {why}"
        "; it must hold the files that save_pretrained writes for the model and its processor"
    )


def _adapter(folder: str, alone: bool) -> FedVLMError:
    try:
        base = brief(_document(folder, ADAPTER).get("base_model_name_or_path"))
    except FedVLMError:
        base = "unknown"
    if alone:
        return FedVLMError(
            f"model.name: '{brief(folder)}' is an adapter and no whole model; its base model is "
            f"'{base}': use that, or merge the adapter into it (fedvlm export --merge)"
        )
    return FedVLMError(
        f"model.name: '{brief(folder)}' holds an adapter beside the model ({ADAPTER}, of the base "
        f"model '{base}'), and transformers would add it to the model; merge it (fedvlm export "
        "--merge) or remove its files"
    )


def _document(folder: str, file: str) -> dict[str, Any]:
    """A JSON object from a file of the folder."""
    try:
        document = json.loads((Path(folder) / file).read_text(encoding="utf-8"))
    except OSError as error:
        raise refused(folder, f"its {file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise refused(folder, f"its {file} is no JSON ({brief(error)})") from error
    if not isinstance(document, dict):
        kind = type(document).__name__
        raise refused(folder, f"its {file} must hold a JSON object, but it holds a {kind}")
    return document


def _has_code(document: Any) -> bool:
    """Whether a document names code that came with the model, however deep."""
    if isinstance(document, list):
        return any(map(_has_code, document))
    if not isinstance(document, dict):
        return False
    return bool(document.get("auto_map")) or any(map(_has_code, document.values()))


def check_size(folder: str, elements: int) -> None:
    """Refuses weights that are much smaller than the model that ``config.json`` describes.

    A model of another size would take its memory before its weights are compared.

    Args:
        folder: the path of the folder.
        elements: number of elements of the described model.

    Raises:
        FedVLMError: there is less than half a byte an element.
    """
    files = _weights(folder, set(os.listdir(folder)))
    held = sum(os.path.getsize(os.path.join(folder, file)) for file in files)
    if elements > 2 * held:
        raise refused(
            folder,
            f"its config.json describes {elements:,} weights, but its files have {held:,} bytes",
        )


def weights_of(folder: str) -> list[str]:
    """The names of the files with weights, relative to the folder.

    Raises:
        FedVLMError: there are none, or an index names a file that is missing or outside.
    """
    return _weights(folder, set(os.listdir(folder)))


def _weights(folder: str, files: set[str]) -> list[str]:
    """The names of the files with weights, relative to the folder."""
    for whole in WEIGHTS:
        if whole in files:
            return [whole]
        index = f"{whole}.index.json"
        if index not in files:
            continue
        shards = _document(folder, index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise refused(folder, f"its {index} has no weight_map")
        found = {str(shard): shard for shard in shards.values()}
        for name, shard in found.items():
            if not isinstance(shard, str) or not _inside(shard):
                raise refused(folder, f"its {index} names '{brief(name)}', a file outside of it")
            if not os.path.isfile(os.path.join(folder, shard)):
                raise refused(folder, f"it has no '{brief(name)}', which its {index} names")
        return sorted(found)
    if any(f.endswith((".h5", ".msgpack", ".gguf")) for f in files):
        raise refused(folder, "its weights are not in PyTorch's or safetensors' format")
    raise refused(folder, f"it has no weights ({' or '.join(WEIGHTS)}, or an index of several)")


def _inside(name: str) -> bool:
    """Whether a relative path stays in its folder, and is a path at all."""
    plain = os.path.normpath(name.replace("\\", "/"))
    return "\0" not in name and not os.path.isabs(plain) and plain.split("/")[0] not in ("..", ".")


def _check_weights(folder: str, file: str) -> None:
    """Refuses a file of weights that is empty, or cut, as its head shows."""
    from safetensors import SafetensorError, safe_open

    path = os.path.join(folder, file)
    try:
        if not os.path.isfile(path) or os.path.getsize(path) == 0:
            raise refused(folder, f"its {brief(file)} is empty or no file")
        if file.endswith(".safetensors"):
            with safe_open(path, framework="pt"):
                pass
    except (OSError, SafetensorError) as error:
        raise refused(folder, f"its {brief(file)} is damaged or cut ({brief(error)})") from error

"""export(): writes a PEFT adapter or a whole model that loads without fedvlm."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedvlm.after import card, loading
from fedvlm.after.names import GLOBAL, label
from fedvlm.after.opened import WEIGHTS, Opened, open_run
from fedvlm.after.outputs import check_writable, refuse_inputs
from fedvlm.errors import FedVLMError
from fedvlm.store import files, sealed
from fedvlm.tree import Tree

# Largest change of a logit by merging, as a share of the largest logit. Measured on the bundled
# model: 8e-7 (float32), 1.1e-2 (bfloat16), 1.6e-3 (float16). Half precision rounds the merged
# weights once more.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def export(
    folder: str | Path,
    *overrides: str,
    client: str | None = None,
    merge: bool = False,
    to: str | Path | None = None,
) -> Path:
    """Exports one model of a finished run, with a model card.

    Without ``merge`` the folder holds ``adapter_config.json`` and ``adapter_model.safetensors``,
    for ``PeftModel.from_pretrained`` and servers of many LoRA adapters. With ``merge`` it holds a
    whole model and its processor, for plain ``AutoModelForImageTextToText`` and ``AutoProcessor``.
    A merged model is loaded again and compared before the folder takes its name.

    Args:
        folder: the run's folder.
        *overrides: settings that differ from the run's, such as
            ``"model.name=/where/it/is/now"``.
        client: the client, or a site that joined after training; None means the global model.
        merge: write the whole model.
        to: the new folder; None means ``FOLDER/export/NAME``, or ``NAME-merged`` with ``merge``.

    Returns:
        The new folder.

    Raises:
        FedVLMError: the run is not finished, there is no such client, the folder is not empty, or
            the merged model's logits differ from the adapter's.
    """
    run = open_run(folder, *overrides)
    target = default_target(run, client, merge) if to is None else Path(os.path.expanduser(to))
    check_target(run, target)
    return write_export(run, client, merge, target)


def export_many(
    folder: str | Path,
    *overrides: str,
    clients: tuple[str, ...] = (),
    global_: bool = False,
    every: bool = False,
    merge: bool = False,
    to: str | Path | None = None,
) -> list[Path]:
    """Exports several models, each into a folder within ``to``. See :func:`export`."""
    run = open_run(folder, *overrides)
    chosen: list[str | None] = list(dict.fromkeys(clients))
    if every:
        chosen = [*run.clients, *run.onboarded]
    if global_ or every:
        chosen.append(None)
    if not chosen:
        names = ", ".join(run.clients[:3])
        raise FedVLMError(f"choose what to export: --client NAME ({names}), --global, or --all")
    targets = [default_target(run, c, merge) for c in chosen]
    if to is not None:
        place = Path(os.path.expanduser(to))
        targets = [place / t.name for t in targets] if len(chosen) > 1 else [place]
    for name, target in zip(chosen, targets, strict=True):
        check_target(run, target)
        run.adapter_folder(name)
    return [write_export(run, c, merge, t) for c, t in zip(chosen, targets, strict=True)]


def folder_name(run: Opened, client: str | None) -> str:
    """The name of a model's folder, which is readable, safe, and no other model's name."""
    names = [GLOBAL, *(label(c) for c in (*run.names, *run.onboarded))]
    return files.slugs(names).get(GLOBAL if client is None else label(client), "client")


def default_target(run: Opened, client: str | None, merge: bool) -> Path:
    """``RUN/export/NAME``."""
    return run.folder / "export" / (folder_name(run, client) + "-merged" * merge)


def check_target(run: Opened, target: Path) -> None:
    """Refuses a folder that is not empty, cannot be written, or lies where the run reads."""
    refuse_inputs("--to", target, *run.inputs)
    check_empty(target)
    check_writable("--to", target)


def write_export(
    run: Opened, client: str | None, merge: bool, target: Path, at: loading.At | None = None
) -> Path:
    """Writes one export atomically.

    Args:
        run: the run.
        client: the client; None: the global model.
        merge: write the whole model.
        target: the new folder.
        at: the place on the hub to which the folder goes; None: it stays here.
    """
    from fedvlm.models.load import BUNDLED

    source = run.adapter_folder(client)
    name = run.config.model.name
    base = name if at and name in BUNDLED else base_name(name)
    tree = files.load_tree(source / WEIGHTS)
    with new_folder(target) as scratch:
        if merge:
            _merge(run, tree, scratch)
            shown = loading.of_merged()
        else:
            write_adapter(source, base, scratch)
            shown = loading.of_adapter(base, name in BUNDLED, at)
        shown = loading.filled(shown, run.config)
        parts: Any = {"base": base, "tree": tree, "loading": shown, "merged": merge}
        if client is not None and client in run.onboarded:
            told = sealed.read(source / "scores.json")
            text = card.of_site(run, told, **parts)
        else:
            text = card.of_run(run, client, **parts)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return target


def base_name(name: str) -> str:
    """The base model's name for readers: a hub name unchanged, else an absolute path.

    Raises:
        FedVLMError: the name is a path, and there is no such folder.
    """
    from fedvlm.models.load import locate
    from fedvlm.models.names import refuse_handed

    refuse_handed(name)
    try:
        where, local = locate(name)
    except FedVLMError as error:
        raise FedVLMError(
            f"the base model of the run is not at '{name}' any more; give its place with "
            "--set model.name=FOLDER"
        ) from error
    return str(Path(os.path.expanduser(where)).resolve()) if local else where


def write_adapter(source: Path, base: str, target: Path) -> None:
    """Copies an adapter and sets ``base`` as the base model in its configuration."""
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"], config["revision"] = loading.parted(base)
    if float(config["lora_alpha"]).is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])  # servers expect an int
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / "adapter_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)


def check_empty(target: Path) -> None:
    """Refuses a folder that is not empty.

    Raises:
        FedVLMError: ``target`` is a file, or a folder that is not empty.
    """
    if target.is_file():
        raise FedVLMError(f"'{target}' is a file; choose a new folder with --to FOLDER")
    if target.is_dir() and any(target.iterdir()):
        raise FedVLMError(
            f"'{target}' is not empty; remove it, or choose a new folder with --to FOLDER"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, renamed to ``target`` once everything is written.

    Raises:
        FedVLMError: ``target`` is not empty, or cannot be written.
    """
    check_empty(target)
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # left by a killed process
        scratch.mkdir()
    except OSError as error:
        raise FedVLMError(f"'{target}' cannot be written: {error.strerror}") from error
    try:
        yield scratch
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except OSError as error:
        raise FedVLMError(f"'{target}' cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _merge(run: Opened, tree: Tree, target: Path) -> None:
    """Writes base plus adapter as one model, then loads the result and checks it.

    The model is loaded anew each time: removing a merged adapter is not exact, and two models at
    once may not fit in memory.
    """
    section = run.config.model
    if section.device_map != "none":  # PEFT merges into weights that are in memory
        section = section.model_copy(update={"device_map": "none", "device": "cpu"})
    fresh = Opened(run.folder, run.config.model_copy(update={"model": section}))
    model, expected = fresh.write(tree), fresh.probe(tree)
    merged = model.merge_and_unload(safe_merge=True)
    with files.disk_errors():
        merged.save_pretrained(target)
    fresh.base.processor.save_pretrained(target)
    del model, merged, fresh
    settings = section.model_copy(update={"name": str(target)})
    again = Opened(run.folder, run.config.model_copy(update={"model": settings}))
    difference = float((again.probe(None) - expected).abs().max())
    limit = TOLERANCE[section.dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise FedVLMError(
            f"the logits of the merged '{section.name}' differ from the adapter's by "
            f"{difference:.2g}, but at most {limit:.2g} is allowed; PEFT does not merge this "
            "family correctly. Export the adapter (without --merge), or train with "
            "lora.target=language"
        )

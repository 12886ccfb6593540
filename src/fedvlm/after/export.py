"""export(): folders that others load without fedvlm, as a PEFT adapter or as a whole model."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedvlm.after import card
from fedvlm.after.opened import GLOBAL, WEIGHTS, Opened, label, open_run
from fedvlm.errors import FedVLMError
from fedvlm.store import files
from fedvlm.tree import Tree

# Largest difference of logits that merging may make, as a share of the largest logit. Measured on
# the bundled model: 8e-7, 1.1e-2, 1.6e-3; half precision rounds the merged weights once more.
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


def export(
    folder: str | Path,
    *overrides: str,
    client: str | None = None,
    merge: bool = False,
    to: str | Path | None = None,
) -> Path:
    """Exports one model of a finished run, with a model card.

    Without ``merge`` the folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, as
    ``PeftModel.from_pretrained`` and servers of many LoRA adapters take them. With ``merge`` it
    holds a whole model and its processor, for plain ``AutoModelForImageTextToText`` and
    ``AutoProcessor``; before it counts as written, it is loaded again and compared.

    Args:
        folder: the run's folder.
        *overrides: settings other than the run's, such as ``"model.name=/where/it/is/now"``.
        client: whose model, also a site that joined after training; None is the global one.
        merge: write the whole model.
        to: the new folder; None is ``FOLDER/export/NAME``, ``NAME-merged`` for a merged one.

    Returns:
        The new folder.

    Raises:
        FedVLMError: no finished run, no such client, the folder holds something, or the merged
            model does not answer as the adapter does.
    """
    run = open_run(folder, *overrides)
    target = Path(to) if to is not None else default_target(run, client, merge)
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
    """Exports several models; ``to`` then holds a folder for each. See :func:`export`."""
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
        targets = [Path(to) / t.name for t in targets] if len(chosen) > 1 else [Path(to)]
    for name, target in zip(chosen, targets, strict=True):
        run.adapter_folder(name)
        check_empty(target)
    return [write_export(run, c, merge, t) for c, t in zip(chosen, targets, strict=True)]


def default_target(run: Opened, client: str | None, merge: bool) -> Path:
    """``RUN/export/NAME``, safe as a folder name."""
    names = [label(c) for c in (*run.partition.clients, *run.onboarded)]
    slug = GLOBAL if client is None else files.slugs(names).get(label(client), "client")
    return run.folder / "export" / (slug + "-merged" * merge)


def write_export(run: Opened, client: str | None, merge: bool, target: Path) -> Path:
    """Writes one export, whole or not at all."""
    from fedvlm.models.load import BUNDLED

    source = run.adapter_folder(client)
    base = base_name(run.config.model.name)
    tree = files.load_tree(source / WEIGHTS)
    with new_folder(target) as scratch:
        if merge:
            _merge(run, tree, scratch)
            loading = card.loading_merged()
        else:
            write_adapter(source, base, scratch)
            loading = card.loading_adapter(base, run.config.model.name in BUNDLED)
        loading = card.filled(loading, run.config)
        parts: Any = {"base": base, "tree": tree, "loading": loading, "merged": merge}
        if client is not None and client in run.onboarded:
            told = json.loads((source / "scores.json").read_text(encoding="utf-8"))
            text = card.of_site(run, told, **parts)
        else:
            text = card.of_run(run, client, **parts)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    return target


def base_name(name: str) -> str:
    """What a reader loads as the base model: a hub name as it is, else an absolute path."""
    from fedvlm.models.load import locate

    where, local = locate(name)
    return str(Path(where).expanduser().resolve()) if local else where


def write_adapter(source: Path, base: str, target: Path) -> None:
    """Copies an adapter, its configuration naming a base model that can be loaded."""
    config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if float(config["lora_alpha"]).is_integer():
        config["lora_alpha"] = int(config["lora_alpha"])  # servers expect an int
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (target / "adapter_config.json").write_text(text, encoding="utf-8")
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)


def check_empty(target: Path) -> None:
    """Refuses a folder that holds something.

    Raises:
        FedVLMError: naming it.
    """
    if target.is_file():
        raise FedVLMError(f"'{target}' is a file; choose a new folder with --to FOLDER")
    if target.is_dir() and any(target.iterdir()):
        raise FedVLMError(
            f"'{target}' is not empty; remove it, or choose a new folder with --to FOLDER"
        )


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, which takes its name once all is written.

    Raises:
        FedVLMError: ``target`` holds something, or cannot be written.
    """
    check_empty(target)
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
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
    """Writes base plus adapter as one model, and checks what a reader will load.

    The model is loaded anew each time: taking an adapter out again is not exact, and two models at
    once may not fit.
    """
    fresh = Opened(run.folder, run.config)
    model, expected = fresh.write(tree), fresh.probe(tree)
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(target)
    fresh.base.processor.save_pretrained(target)
    del model, merged, fresh
    section = run.config.model
    settings = section.model_copy(update={"name": str(target)})
    again = Opened(run.folder, run.config.model_copy(update={"model": settings}))
    difference = float((again.probe(None) - expected).abs().max())
    limit = TOLERANCE[section.dtype] * max(1.0, float(expected.abs().max()))
    if not difference <= limit:
        raise FedVLMError(
            f"the merged '{section.name}' does not answer as the adapter does: its logits differ "
            f"by {difference:.2g}, and {limit:.2g} is allowed; PEFT does not merge this "
            "family right. Export the adapter (without --merge), or train with lora.target=language"
        )

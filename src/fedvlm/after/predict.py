"""predict(): answers of a run's models to questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm.after import inputs
from fedvlm.after.opened import none_chosen, open_run


@dataclass(frozen=True)
class Answers:
    """What the models answer.

    Attributes:
        models: the columns, one a model.
        rows: a dict a row: ``image`` (its file) or ``row`` (its number in the data), ``question``,
            ``answer`` where the data has answers, and each model's answer under its name.
    """

    models: tuple[str, ...]
    rows: list[dict[str, Any]]


def predict(
    folder: str | Path, image: Any, question: str, *overrides: str, client: str | None = None
) -> str:
    """Asks a finished run's model a question about one image.

    The base model is loaded for every call; for many questions, ``run = fedvlm.open_run(folder)``
    once and then ``run.predict(image, question, client=...)``.

    Args:
        folder: the run's folder.
        image: a path, encoded bytes, or a PIL image.
        question: what is asked.
        *overrides: settings other than the run's, such as ``"model.device=cpu"`` or
            ``"eval.max_new_tokens=64"``.
        client: whose model; None is the global one.

    Returns:
        The answer, stripped.

    Raises:
        FedVLMError: no finished run, no such client, or an image that does not decode.
    """
    return open_run(folder, *overrides).predict(image, question, client=client)


def predict_many(
    folder: str | Path,
    source: Any,
    question: str | None = None,
    *,
    clients: Sequence[str] = (),
    global_: bool = False,
    untuned: bool = False,
    every: bool = False,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Answers:
    """Asks several of a run's models about an image, a folder of images, or a file of rows.

    Args:
        folder: the run's folder.
        source: an image, a folder of images, or any data source that :func:`fedvlm.run` takes;
            the column of answers may be missing.
        question: for all images; a file of rows may bring its own.
        clients: whose personal models.
        global_: with the global model.
        untuned: with the model before training.
        every: with all of these.
        out: also write the rows to this file (.jsonl, .json, .csv or .parquet).
        overrides: settings other than the run's, such as ``"eval.max_new_tokens=64"``.

    Raises:
        FedVLMError: no finished run, no such client, no model chosen, or unusable rows.
    """
    run = open_run(folder, *overrides)
    if not (clients or global_ or untuned or every):
        raise none_chosen(run)
    for client in clients:
        run.adapter_folder(client)
    inputs.check_out(out)
    # The run's sample and split are about its own data.
    data = run.config.data.model_copy(update={"max_rows": _own(overrides, "data.max_rows")})
    rows = inputs.rows_to_ask(data, source, question)
    models = run.chosen(clients, global_=global_, untuned=untuned, every=every)
    texts = run.answers(rows, models)
    which = {"image": "name"} if "name" in rows.column_names else {"row": "row"}
    columns: dict[str, list[Any]] = {
        **{head: rows[column][:] for head, column in which.items()},
        "question": rows["question"][:],
    }
    given = rows["answer"][:] if "answer" in rows.column_names else []
    if any(answer and answer.strip() for answer in given):
        columns["answer"] = [(answer or "").strip() for answer in given]
    columns |= texts
    table = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    answers = Answers(tuple(texts), table)
    if out is not None:
        inputs.write_table(answers.rows, out)
    return answers


def _own(overrides: Sequence[str], key: str) -> int | None:
    """A limit that was asked for now, not when the run was made."""
    given = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == key]
    return int(given[-1]) if given and given[-1].strip().isdigit() else None

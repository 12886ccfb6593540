"""predict(): asks a run's models questions about images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvlm.after import inputs
from fedvlm.after.names import none_chosen
from fedvlm.after.opened import open_run
from fedvlm.after.outputs import check_out, write_table
from fedvlm.errors import FedVLMError


@dataclass(frozen=True)
class Answers:
    """The models' answers.

    Attributes:
        models: the names of the models.
        rows: one dict per row: ``image`` (its file) or ``row`` (its number in the data),
            ``question``, ``answer`` if the data has answers, and each model's answer under its
            name.
    """

    models: tuple[str, ...]
    rows: list[dict[str, Any]]


def predict(
    folder: str | Path, image: Any, question: str, *overrides: str, client: str | None = None
) -> str:
    """Asks a finished run's model a question about an image, or about several.

    Every call loads the base model. For many questions, call ``run = fedvlm.open_run(folder)``
    once and then ``run.predict(image, question, client=...)``.

    Args:
        folder: the run's folder.
        image: a path, encoded bytes, a PIL image, or a list of these.
        question: the question.
        *overrides: settings that differ from the run's, such as ``"model.device=cpu"`` or
            ``"eval.max_new_tokens=64"``.
        client: the client whose model answers; None means the global model.

    Returns:
        The answer, stripped.

    Raises:
        FedVLMError: the run is not finished, there is no such client, or the image does not decode.
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
        source: an image, a list of images that the question is about, a folder of images, or any
            data source that :func:`fedvlm.run` accepts;
            the column of answers may be missing.
        question: the question for all images. A file of rows may have its own questions.
        clients: clients to ask with their personal models.
        global_: also ask the global model.
        untuned: also ask the model before training.
        every: ask all of these models.
        out: also write the rows to this file (.jsonl, .json, .csv or .parquet).
        overrides: settings that differ from the run's, such as ``"eval.max_new_tokens=64"``.

    Raises:
        FedVLMError: the run is not finished, there is no such client, no model is chosen, or the
            rows cannot be used.
    """
    run = open_run(folder, *overrides)
    check_out(out, source, *run.inputs)
    if not (clients or global_ or untuned or every):
        raise none_chosen(run.clients)
    for client in clients:
        run.adapter_folder(client)
    # The run's limit on rows was for its own data.
    data = run.config.data.model_copy(update={"max_rows": _own(overrides, "data.max_rows")})
    rows = run.usable(inputs.rows_to_ask(data, source, question))
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
        write_table(answers.rows, out)
    return answers


@dataclass(frozen=True)
class SideBySide:
    """One held-out row, and the answers of all models of a run to it.

    Attributes:
        client: the client that has the row.
        question: the question.
        reference: the answer in the data.
        image: the picture, as encoded bytes.
        answers: model -> its answer.
    """

    client: str
    question: str
    reference: str
    image: bytes
    answers: dict[str, str]


def side_by_side(folder: str | Path) -> SideBySide:
    """Asks all models of a finished run about one row that its client held out.

    The row is the first one that its client's personal model answered right, or the first one of
    all where there is none.

    Raises:
        FedVLMError: the run is not finished, or it was deployed, so that its rows are at the sites;
            or the data have changed.
    """
    from fedvlm.rounds.prepare import rows_of

    run = open_run(folder)
    known = run.results.answers("personal")
    if not known or run.deployed:
        raise FedVLMError(f"'{run.folder}': its held-out rows and answers are not here")
    first = next((a for a in known if a.get("exact_match") == 1), known[0])
    rows = rows_of(run.config)
    numbers = enumerate(rows["row"])  # of the source, in which there may be more rows
    there = [place for place, number in numbers if number == first["row"]]
    same = [k for k in there if rows[k]["answer"].strip() == first["reference"]]
    if not same:
        raise FedVLMError(f"'{run.folder}': row {first['row']} of its data is another one by now")
    rows = rows.select(same[:1])
    models = run.chosen(global_=True, untuned=True, every=True)
    answers = {name: texts[0] for name, texts in run.answers(rows, models).items()}
    row = rows[0]
    return SideBySide(
        first["client"], row["question"], first["reference"], row["image"]["bytes"], answers
    )


def _own(overrides: Sequence[str], key: str) -> int | None:
    """A limit from this call's overrides, not from the run's settings."""
    given = [o.partition("=")[2] for o in overrides if o.partition("=")[0].strip() == key]
    return int(given[-1]) if given and given[-1].strip().isdigit() else None

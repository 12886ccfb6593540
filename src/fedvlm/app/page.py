"""The layout of the playground, and what its buttons do."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from fedvlm.after.asked import Asked, Replies
from fedvlm.after.heldout import HeldOut
from fedvlm.after.names import GLOBAL, UNTUNED
from fedvlm.after.outputs import write_table
from fedvlm.app import answers
from fedvlm.errors import DataError, FedVLMError

FIRST = 10  # sites that are chosen at the beginning
PICTURES = 200  # most pictures of a batch
QUESTION = "What is in the picture?"
FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # none is fetched


def theme() -> Any:
    """Calm colours, and fonts that the browser has."""
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="slate", font=FONTS, font_mono=("ui-monospace", "monospace")
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
    )


class Handlers:
    """What the page does with a person's input; each method is one button.

    Args:
        asked: the models.
        folder: folder of uploads, and of files to download.
    """

    def __init__(self, asked: Asked, folder: Path):
        self.asked = asked
        self._folder = folder.resolve()
        self._rows: HeldOut | None = None

    def ask(
        self, picture: str | None, question: str, models: Sequence[str], reference: str | None
    ) -> str:
        """The answers to one question about one picture."""
        if not picture:
            return answers.problem("there is no picture; drop one, or take a held-out row")
        try:
            found = self.asked.ask(self._uploaded(picture), question, models)
        except FedVLMError as error:
            return answers.problem(str(error))
        return answers.answers(found, reference, bool(self.asked.alone))

    def take(self, site: str, number: float | None) -> tuple[Any, Any, str | None, str]:
        """A held-out row: its picture, question and reference answer, and a remark."""
        try:
            self._rows = self._rows or self.asked.held_out()
            row = self._rows.row(site, int(number or 0))
        except FedVLMError as error:
            return gr.skip(), gr.skip(), None, answers.problem(error)
        if (count := len(row.images)) > 1:
            said = f"this row has {count} pictures, and a question here is about one; write it "
            said += "into a file of rows and use the command 'fedvlm predict'"
            return gr.skip(), gr.skip(), None, answers.problem(said)
        said = f"Row {int(number or 0)} of {self._rows.counts[site]} of {site}. In the data, the "
        return (
            row.images[0],
            row.question,
            row.reference,
            answers.note(f"{said}answer is: {row.reference}"),
        )

    def ask_many(
        self,
        files: Sequence[str] | None,
        question: str,
        models: Sequence[str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by its default
    ) -> tuple[str, Any]:
        """The answers to one question about several pictures, and a file with them."""
        nothing = gr.DownloadButton(visible=False)
        if not files:
            return answers.problem("there are no pictures; choose some"), nothing
        if len(files) > PICTURES:
            said = f"these are {len(files)} pictures; choose at most {PICTURES}, or use the "
            return answers.problem(f"{said}command 'fedvlm predict' for a whole folder"), nothing
        try:
            names = self.asked.check(question, models)
        except FedVLMError as error:
            return answers.problem(error), nothing
        found: dict[str, Replies | FedVLMError] = {}
        for at, file in enumerate(files):
            progress((at, len(files)), desc="pictures")
            name = Path(file).name
            name = f"{name} ({at + 1})" if name in found else name
            try:
                found[name] = self.asked.ask(self._uploaded(file), question, models)
            except FedVLMError as error:
                found[name] = error
        made = tempfile.mkdtemp(dir=self._folder)
        path = write_table(answers.table(found, question), Path(made) / "answers.csv")
        return answers.batch(found, names), gr.DownloadButton(value=str(path), visible=True)

    def _uploaded(self, file: str) -> bytes:
        """The content of an uploaded file. A request could name any other file of this machine.

        Raises:
            DataError: it is no uploaded file.
        """
        path = Path(file).resolve()
        if not (path.is_relative_to(self._folder) and path.is_file()):
            raise DataError("the picture was not uploaded here; drop it again")
        return path.read_bytes()


def page(asked: Asked, folder: Path) -> gr.Blocks:
    """The page of a run.

    Args:
        asked: the models of the run.
        folder: folder of uploads, and of files to download.
    """
    does, run = Handlers(asked, folder), asked.run
    sites = [name for name in asked.models if name not in (GLOBAL, UNTUNED)]
    first = [*sites[:FIRST], GLOBAL, UNTUNED]
    with gr.Blocks(title=f"fedvlm: {run.folder.resolve().name}", analytics_enabled=False) as blocks:
        reference = gr.State(None)
        gr.HTML(_head(asked, len(sites)))
        with gr.Row(equal_height=False):
            models = gr.Dropdown(
                list(asked.models),
                value=first,
                multiselect=True,
                label="Models",
                scale=5,
                min_width=320,
            )
            with gr.Column(scale=1, min_width=150):
                everyone = gr.Button(f"All {len(asked.models)} models", size="sm")
                few = gr.Button(f"First {FIRST} sites", size="sm", visible=len(sites) > FIRST)
        with gr.Tab("One picture"), gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    type="filepath",
                    format="png",
                    sources=["upload"],
                    label="Picture",
                    elem_id="picture",
                    height=300,
                    buttons=[],
                )
                question = gr.Textbox(QUESTION, label="Question", lines=2, max_length=10_000)
                ask = gr.Button("Ask", variant="primary")
                if run.deployed:
                    gr.HTML(answers.note("The held-out rows of this run are at its sites."))
                else:
                    with gr.Accordion("Take a held-out row", open=False):
                        with gr.Row():
                            site = gr.Dropdown(list(run.names), label="Site", min_width=120)
                            number = gr.Number(1, precision=0, minimum=1, label="Row", min_width=80)
                        take = gr.Button("Take this row")
                        about = gr.HTML()
            with gr.Column(scale=3, min_width=300):
                shown = gr.HTML(answers.note("Answers appear here."), elem_id="answers")
        with gr.Tab("Many pictures"):
            files = gr.File(
                file_count="multiple",
                file_types=["image", ".dcm", ".tif", ".tiff"],
                label="Pictures",
                height=160,
            )
            common = gr.Textbox(QUESTION, label="Question for all pictures", max_length=10_000)
            ask_many = gr.Button("Ask about all pictures", variant="primary")
            many = gr.HTML(elem_id="batch")
            download = gr.DownloadButton("Download the answers (CSV)", visible=False)

        # The models' own reader opens pictures, within its limits; gradio's would open them first.
        picture.preprocess = lambda given: given and given.path  # type: ignore[method-assign]
        quiet: dict[str, Any] = {"api_visibility": "private"}
        everyone.click(lambda: list(asked.models), None, models, **quiet)
        few.click(lambda: first, None, models, **quiet)
        inputs = [picture, question, models, reference]
        gr.on([ask.click, question.submit], does.ask, inputs, shown, scroll_to_output=True, **quiet)
        gr.on(
            [picture.upload, picture.clear, question.input], lambda: None, None, reference, **quiet
        )
        if not run.deployed:
            outputs = [picture, question, reference, about]
            take.click(does.take, [site, number], outputs, **quiet)
        ask_many.click(does.ask_many, [files, common, models], [many, download], **quiet)
    return blocks


def _head(asked: Asked, sites: int) -> str:
    run, name = asked.run, f"The models of run {asked.run.folder.resolve().name}"
    said = (
        f"{sites} sites · base model {run.config.model.name} · algorithm "
        f"{run.config.algorithm.name} · pictures stay in this process and are deleted when it ends"
    )
    alone = f"The models answer one after another: {asked.alone}." if asked.alone else ""
    return (
        f"<h1>{answers.text(name)}</h1>{answers.note(said)}{answers.note(alone) if alone else ''}"
    )


CSS = """
.gradio-container { width: 100% !important; max-width: 1200px !important;
  margin: 0 auto !important; }
h1 { font-size: 1.35rem; font-weight: 650; margin: 0.4rem 0 0.1rem; overflow-wrap: anywhere; }
#picture img { width: 100%; height: 100%; object-fit: contain; }
.note { opacity: 0.75; font-size: 0.9rem; margin: 0.2rem 0; overflow-wrap: anywhere; }
.problem { border-left: 4px solid #b3261e; padding: 0.6rem 0.8rem; overflow-wrap: anywhere; }
.answers p { margin: 0 0 0.6rem; overflow-wrap: anywhere; }
.answers table { width: 100%; border-collapse: collapse; margin: 0.4rem 0 0.8rem;
  border: 0 !important; }
.answers thead, .answers tbody, .answers tr { border: 0 !important; }
.answers table tr > * { text-align: left; vertical-align: top; padding: 0.5rem 0.8rem 0.5rem 0;
  border-width: 0 0 1px !important; border-color: var(--border-color-primary) !important;
  border-style: solid !important; overflow-wrap: anywhere; }
.answers table tr > :last-child { padding-right: 0; }
.answers table thead tr > * { font-size: 0.85rem; font-weight: 500; }
.answers tbody th { font-weight: 600; }
.answers > table { table-layout: fixed; }
.answers > table tr > :last-child { width: 6rem; font-variant-numeric: tabular-nums; }
.answers > table tr > :first-child { width: 27%; }
.said { white-space: pre-wrap; }
.mark { display: inline-block; min-width: 1.5em; padding: 0 0.3em; border-radius: 4px;
  border: 1px solid currentColor; text-align: center; font-size: 0.8rem; font-weight: 600;
  margin-right: 0.2em; color: #5b3a8c; background: #f3eefb; }
.mark-A { color: #0f5f59; background: #e6f4f1; }
.dark .mark { color: #d8c6f5; background: #38294f; }
.dark .mark-A { color: #a9e3dc; background: #143d39; }
.right { font-size: 0.85rem; font-weight: 600; white-space: nowrap; color: #1b6e34; }
.dark .right { color: #8ad8a0; }
.bar { display: block; height: 4px; border-radius: 2px; margin-top: 0.3rem;
  background: var(--border-color-primary); }
.bar > span { display: block; height: 4px; border-radius: 2px; background: var(--primary-600); }
.wide { overflow-x: auto; }
.wide tr > * { min-width: 7.5rem; }
.wide small { white-space: nowrap; }
footer { display: none !important; }
"""

"""The text of every recipe of examples/recipes: a model's settings with those of a task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A checkpoint on the hub.

    Attributes:
        stem: first part of the recipe's file name.
        title: its name in a sentence.
        name: its name on the hub.
        about: its image tokens.
        licence: its licence, as lines of the head of a recipe.
        short: its licence in a cell of a table.
        lr: the rate of supervised training, and of DPO. Neither is tuned.
        settings: further lines of the section ``model``.
        data: further lines of the section ``data``.
    """

    stem: str
    title: str
    name: str
    about: str
    licence: str
    short: str
    lr: tuple[str, str] = ("2e-4", "2e-5")
    settings: str = ""
    data: str = ""


@dataclass(frozen=True)
class Task:
    """A public data set and what is learned from it.

    Attributes:
        stem: last part of the recipe's file name.
        title: what is learned, in a sentence.
        name: the data set's name on the hub.
        rows: the rows of its split ``train``, by its card.
        columns: its columns.
        licence: its licence, as lines of the head of a recipe.
        sites: why and how the rows are dealt, as lines of the head of a recipe.
        data: the setting ``columns``, and further lines of the section ``data``.
        partition: lines of the section ``partition``.
        objective: lines of the section ``objective``; empty: the default.
        steps: rounds, local steps and rows of a batch.
        eval: further lines of the section ``eval``.
    """

    stem: str
    title: str
    name: str
    rows: int
    columns: str
    licence: str
    sites: str
    data: str
    partition: str
    objective: str
    steps: tuple[int, int, int]
    eval: str

    @property
    def preferences(self) -> bool:
        return "dpo" in self.objective


LESS_MEMORY = "  gradient_checkpointing: true             # less memory, slower\n"
GEMMA = "gated: accept Google's Gemma terms on the hub, then `hf auth login`."
MODELS = (
    Model(
        "florence2-base",
        "Florence-2 base",
        "florence-community/Florence-2-base",
        "577 image tokens a picture",
        "MIT.",
        "MIT",
        lr=("5e-4", "5e-5"),
    ),
    Model(
        "gemma3-4b",
        "Gemma 3 4B",
        "google/gemma-3-4b-it",
        "256 image tokens a picture",
        GEMMA,
        "Gemma terms, gated",
        settings=LESS_MEMORY,
    ),
    Model(
        "paligemma2-3b",
        "PaliGemma 2 (3B, 224 pixels)",
        "google/paligemma2-3b-pt-224",
        "256 image tokens a picture",
        GEMMA,
        "Gemma terms, gated",
        settings=LESS_MEMORY,
    ),
    Model(
        "qwen2.5-vl-3b",
        "Qwen2.5-VL-3B in 4 bits",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "a token for 28 x 28 pixels, so at most 640 with max_pixels",
        "Qwen Research Licence, non-commercial.\n"
        "#   Quantized weights need `pip install 'fedvlm[quant]'`, and a CUDA device or a CPU.",
        "Qwen Research Licence",
        settings="  quantization: 4bit\n" + LESS_MEMORY,
        data="  max_pixels: 501760                       # 640 x 28 x 28\n",
    ),
    *(
        Model(
            f"smolvlm-{size}",
            f"SmolVLM-{size.upper()}",
            f"HuggingFaceTB/SmolVLM-{size.upper()}-Instruct",
            "up to 17 tiles of 64 image tokens a picture",
            "Apache-2.0.",
            "Apache-2.0",
            lr=("5e-4", "5e-5"),
        )
        for size in ("256m", "500m")
    ),
)
CLUSTERS = "kind: dirichlet\n  clusters: {0}\n  alpha: 0.3\n  clients: {0}\n  min_rows: {1}\n"
RLAIF_V = {
    "name": "openbmb/RLAIF-V-Dataset",
    "rows": 83_132,
    "columns": "image, question, chosen, rejected, origin_dataset",
    "licence": "CC BY-NC 4.0.",
    "sites": "# The data set has no site, so the rows are dealt by the data set that they came "
    "from (Dirichlet).\n# The run takes a sample of 8,000 rows, but the hub delivers all files: "
    "more than ten, of about 1 GB each.\n",
    "partition": "kind: dirichlet\n  column: origin_dataset\n  alpha: 0.3\n  clients: 8\n"
    "  min_rows: 100\n",
}
TASKS = (
    Task(
        "pathvqa",
        "questions about pathology pictures (PathVQA)",
        "flaviagiammarino/path-vqa",
        19_654,
        "image, question, answer",
        "MIT by its card, which also says that\n"
        "#   the pictures belong to the publishers of two textbooks and of a library.",
        "# The data set has no site, so the rows are dealt by clusters of their answers "
        "(Dirichlet). This needs\n# `pip install 'fedvlm[clusters]'`.\n",
        "{image: image, question: question, answer: answer}\n",
        CLUSTERS.format(8, 100),
        "",
        (25, 10, 8),
        "  max_rows: 200\n  max_new_tokens: 16\n  metric: token_f1\n",
    ),
    Task(
        stem="rlaifv-dpo",
        title="preferences between two answers about photographs (RLAIF-V), DPO",
        data="{image: image, question: question, answer: chosen, rejected: rejected}\n"
        "  max_rows: 8000\n",
        objective="  name: dpo\n  beta: 0.1\n",
        steps=(25, 10, 4),
        eval="  max_rows: 100\n",
        **RLAIF_V,
    ),
    Task(
        stem="rlaifv-sft",
        title="long answers about photographs (RLAIF-V), supervised",
        data="{image: image, question: question, answer: chosen}\n  max_rows: 8000\n",
        objective="  name: sft\n",
        steps=(25, 10, 8),
        eval="  max_rows: 100\n  max_new_tokens: 256\n  metric: rouge_l\n",
        **RLAIF_V,
    ),
    Task(
        "vqarad",
        "questions about radiology pictures (VQA-RAD)",
        "flaviagiammarino/vqa-rad",
        1_793,
        "image, question, answer",
        "CC0.",
        "# The copy on the hub has neither a site nor an organ, so the rows are dealt by clusters "
        "of their\n# answers (Dirichlet). This needs `pip install 'fedvlm[clusters]'`.\n",
        "{image: image, question: question, answer: answer}\n",
        CLUSTERS.format(6, 20),
        "",
        (24, 5, 8),
        "  max_rows: 80\n  max_new_tokens: 12\n  metric: token_f1\n",
    ),
)


def texts() -> dict[str, str]:
    """Name of a recipe -> the text of its file."""
    return {f"{m.stem}-{t.stem}": text(m, t) for m in MODELS for t in TASKS}


def text(model: Model, task: Task) -> str:
    """The recipe for a model and a task."""
    recipe = f"{model.stem}-{task.stem}"
    run = f"fedvlm run examples/recipes/{recipe}.yaml"
    rounds, steps, batch = task.steps
    objective = f"objective:\n{task.objective}\n" if task.objective else ""
    return f"""\
# {model.title}: {task.title}.
#
#   {run} --dry-run      the plan, without weights or data
#   {run}                the run
#
# Data: {task.name} on the hub, split train, {task.rows:,} rows.
#   Columns: {task.columns}.
#   Licence: {task.licence}
# Model: {model.name}; {model.about}.
#   Licence: {model.licence}
#
{task.sites}# In a real federation each site has its own files: see docs/deploy.md.
#
# Never run: this model, this data set, and these settings, of which none is tuned.
# Checked: the settings, and the plan from the real sizes in models/{model.name.rpartition("/")[2]}\
/config.json.

output: runs/{recipe}
seed: 0

model:
  name: {model.name}
  dtype: bfloat16
{model.settings}
data:
  path: {task.name}
  columns: {task.data}{model.data}  val_fraction: 0.1
  test_fraction: 0.25

partition:
  {task.partition}
lora:
  rank: 8
  alpha: 16
  target: language

{objective}train:
  rounds: {rounds}
  local_steps: {steps}
  batch_size: {batch}
  lr: {model.lr[task.preferences]}                                 # not tuned

eval:
  every: 0                                 # scores at the end only
{task.eval}"""

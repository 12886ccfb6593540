"""``fedvlm demo``: its settings, two minutes on two cores, and its last table."""

from __future__ import annotations

from pathlib import Path

ALGORITHMS = ("auto", "fedsa", "lora", "plora", "local")
"""In this order, one of two processes runs the two longest, and the other one the three others."""

SETTINGS = {
    "output": "runs/demo",
    "data": {
        "scenes": {"style": "odd", "strength": 1.0, "sites": 8, "rows": 100},
        "test_fraction": 0.5,
    },
    "lora": {"target": "language"},
    "train": {"rounds": 12, "local_steps": 10, "batch_size": 4, "lr": 5e-3},
    "eval": {
        "every": 4,
        "max_rows": 50,
        "max_new_tokens": 18,
        "global_before": False,
        "personal_before": False,  # in no table or curve of the demo
    },
}

INTRODUCTION = """\
Eight sites ask questions about pictures. Seven sites answer in German. The
last one, site-7, answers in English, as the model does before training. No
site shares its data. All sites start from one small vision-language model
and train LoRA adapters (factors A and B) for the same number of steps:

  auto     the default: A is averaged; the sites vote with validation rows
           on the B they begin a round with: average, own, or between
  fedsa    FedSA-LoRA: A is averaged, B stays at each site
  plora    personalized LoRA (FedVLM): B is averaged, A stays at each site
  lora     standard federated LoRA: both are averaged, one model for all
  local    every site trains alone

In the end: a verdict for each site (should it take part, and how?), and the
answers of all models to one picture.
"""


def print_demo(run: Path) -> None:
    """Prints the answers of a run's models to one held-out picture, and saves the picture."""
    from fedvlm.after.predict import side_by_side
    from fedvlm.cli.aftertables import print_side_by_side
    from fedvlm.store.files import write_bytes

    found = side_by_side(run)
    picture = run.parent / "picture.png"
    write_bytes(picture, found.image)
    print_side_by_side(found, picture, run.name)

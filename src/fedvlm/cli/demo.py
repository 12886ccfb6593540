"""``fedvlm demo``: its settings, two to three minutes on two cores, and its last table."""

from __future__ import annotations

from pathlib import Path

ALGORITHMS = ("auto", "fedsa", "plora", "lora", "local")

SETTINGS = {
    "output": "runs/demo",
    "data": {
        "scenes": {"style": "odd", "strength": 1.0, "sites": 8, "rows": 100},
        "test_fraction": 0.5,
    },
    "lora": {"target": "language"},
    "train": {"rounds": 12, "local_steps": 10, "batch_size": 4, "lr": 5e-3},
    "eval": {"every": 6, "max_rows": 50, "max_new_tokens": 18},
}

INTRODUCTION = """\
Eight sites ask questions about pictures. Seven sites answer in German. The last one, site-7,
answers in English, as the model does before training. No site shares its data. All sites start
from one small vision-language model and train LoRA adapters on it, for the same number of steps:

  auto     the default: A is averaged over the sites; their validation rows choose the B that all
           sites begin a round with: the average, their own, or the mean of both
  fedsa    FedSA-LoRA: A is averaged over the sites, B stays at each site
  plora    personalized LoRA (FedVLM): B is averaged over the sites, A stays at each site
  lora     standard federated LoRA: A and B are averaged, one model for all sites
  local    every site trains alone

In the end, a verdict for each site: should it take part, and how?
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

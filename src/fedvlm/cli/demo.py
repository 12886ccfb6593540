"""The settings of ``fedvlm demo``, small enough for two minutes on two cores."""

from __future__ import annotations

ALGORITHMS = ("auto", "plora", "lora", "local", "lora+ft")

SETTINGS = {
    "output": "runs/demo",
    "data": {"scenes": {"style": "mixed", "strength": 1.0, "sites": 8, "rows": 120}},
    "algorithm": {"ft_steps": 12},
    "train": {"rounds": 8, "local_steps": 5, "batch_size": 4, "lr": 5e-3},
    "eval": {"every": 0, "max_rows": 20},
}

INTRODUCTION = """\
Eight sites ask questions about pictures. Each site has its own camera, its own words for the
answers and its own mix of questions. No site shares its data. All sites start from one small
vision-language model and train LoRA adapters on it:

  auto     the default: each site mixes its own adapter with the average of all sites; its
           validation rows choose the mixture; a final local tuning follows
  plora    personalized LoRA (FedVLM): B is averaged over the sites, A stays at each site
  lora     standard federated LoRA: A and B are averaged, one model for all sites
  local    every site trains alone
  lora+ft  standard federated LoRA, then local tuning at every site
"""

"""fedvlm: federated fine-tuning of vision-language models, a personal adapter for every site."""

__version__ = "0.1.0"

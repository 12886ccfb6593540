"""fedvlm: federated fine-tuning of vision-language models, a personal adapter for every site.

import fedvlm
results = fedvlm.run("config.yaml", "algorithm.name=plora")
results.summary("personal")   # {"mean": ..., "std": ..., "worst10": ...}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedvlm.version import __version__ as __version__

# Loaded on first use: importing fedvlm, or asking the command line for help, stays instant.
_HOMES = {
    "run": "fedvlm.rounds.federate",
    "resume": "fedvlm.rounds.federate",
    "compare": "fedvlm.rounds.comparison",
    "export": "fedvlm.after.export",
    "predict": "fedvlm.after.predict",
    "evaluate": "fedvlm.after.evaluate",
    "onboard": "fedvlm.after.onboard",
    "open_run": "fedvlm.after.opened",
    "Results": "fedvlm.rounds.results",
    "Comparison": "fedvlm.rounds.comparison",
    "Config": "fedvlm.settings.sections",
    "load_config": "fedvlm.config",
    "Algorithm": "fedvlm.algorithms.base",
    "Client": "fedvlm.algorithms.base",
    "Phase": "fedvlm.algorithms.base",
    "sharing": "fedvlm.algorithms.sharing",
    "tuned": "fedvlm.algorithms.sharing",
    "scenes": "fedvlm.data.scenes",
    "FedVLMError": "fedvlm.errors",
    "ConfigError": "fedvlm.errors",
    "DataError": "fedvlm.errors",
}

__all__ = [
    "Algorithm",
    "Client",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "FedVLMError",
    "Phase",
    "Results",
    "compare",
    "evaluate",
    "export",
    "load_config",
    "onboard",
    "open_run",
    "predict",
    "resume",
    "run",
    "scenes",
    "sharing",
    "tuned",
]

if TYPE_CHECKING:
    from fedvlm.after.evaluate import evaluate
    from fedvlm.after.export import export
    from fedvlm.after.onboard import onboard
    from fedvlm.after.opened import open_run
    from fedvlm.after.predict import predict
    from fedvlm.algorithms.sharing import sharing, tuned
    from fedvlm.algorithms.table import Algorithm, Client, Phase
    from fedvlm.config import load as load_config
    from fedvlm.data.scenes import scenes
    from fedvlm.errors import ConfigError, DataError, FedVLMError
    from fedvlm.rounds.comparison import Comparison, compare
    from fedvlm.rounds.federate import resume, run
    from fedvlm.rounds.results import Results
    from fedvlm.settings.sections import Config


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedvlm' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), "load" if name == "load_config" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

"""fedvlm: federated fine-tuning of vision-language models, a personal adapter for every site.

import fedvlm
results = fedvlm.run("config.yaml", "algorithm.name=plora")
results.summary("personal")   # {"mean": ..., "std": ..., "worst10": ...}
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use: importing fedvlm, or asking the command line for help, stays instant.
_HOMES = {
    "run": "fedvlm.federate",
    "resume": "fedvlm.federate",
    "compare": "fedvlm.comparison",
    "export": "fedvlm.after.export",
    "predict": "fedvlm.after.predict",
    "evaluate": "fedvlm.after.evaluate",
    "onboard": "fedvlm.after.onboard",
    "open_run": "fedvlm.after.opened",
    "Results": "fedvlm.results",
    "Comparison": "fedvlm.comparison",
    "Config": "fedvlm.sections",
    "load_config": "fedvlm.config",
    "Algorithm": "fedvlm.algorithms",
    "Client": "fedvlm.algorithms",
    "Phase": "fedvlm.algorithms",
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
    from fedvlm.algorithms import Algorithm, Client, Phase
    from fedvlm.algorithms.sharing import sharing, tuned
    from fedvlm.comparison import Comparison, compare
    from fedvlm.config import load as load_config
    from fedvlm.data.scenes import scenes
    from fedvlm.errors import ConfigError, DataError, FedVLMError
    from fedvlm.federate import resume, run
    from fedvlm.results import Results
    from fedvlm.sections import Config


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedvlm' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), "load" if name == "load_config" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

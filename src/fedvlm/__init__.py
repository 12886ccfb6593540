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
    "run": "fedvlm.report.runs",
    "resume": "fedvlm.report.runs",
    "compare": "fedvlm.report.runs",
    "simulate": "fedvlm.engines.simulate",
    "export": "fedvlm.after.export",
    "predict": "fedvlm.after.predict",
    "push_to_hub": "fedvlm.after.push",
    "evaluate": "fedvlm.after.evaluate",
    "onboard": "fedvlm.after.onboard",
    "open_run": "fedvlm.after.opened",
    "write_report": "fedvlm.report.write",
    "scenes": "fedvlm.data.scenes",
    "load_config": "fedvlm.config",
    "Callback": "fedvlm.rounds.progress",
    "Results": "fedvlm.rounds.results",
    "Comparison": "fedvlm.rounds.comparison",
    "Config": "fedvlm.settings.sections",
    "AlgorithmConfig": "fedvlm.settings.method",
    "Entry": "fedvlm.algorithms.entry",
    "Algorithm": "fedvlm.algorithms.base",
    "Averaged": "fedvlm.algorithms.base",
    "Gathered": "fedvlm.algorithms.base",
    "Local": "fedvlm.algorithms.base",
    "Score": "fedvlm.algorithms.base",
    "Sent": "fedvlm.algorithms.base",
    "Term": "fedvlm.algorithms.base",
    "Train": "fedvlm.algorithms.base",
    "Visit": "fedvlm.algorithms.base",
    "sharing": "fedvlm.algorithms.sharing",
    "FedVLMError": "fedvlm.errors",
    "ConfigError": "fedvlm.errors",
    "DataError": "fedvlm.errors",
}

_NAMES = {"load_config": "load", "Callback": "Progress"}

__all__ = [
    "Algorithm",
    "AlgorithmConfig",
    "Averaged",
    "Callback",
    "Comparison",
    "Config",
    "ConfigError",
    "DataError",
    "Entry",
    "FedVLMError",
    "Gathered",
    "Local",
    "Results",
    "Score",
    "Sent",
    "Term",
    "Train",
    "Visit",
    "compare",
    "evaluate",
    "export",
    "load_config",
    "onboard",
    "open_run",
    "predict",
    "push_to_hub",
    "resume",
    "run",
    "scenes",
    "sharing",
    "simulate",
    "write_report",
]

if TYPE_CHECKING:
    from fedvlm.after.evaluate import evaluate
    from fedvlm.after.export import export
    from fedvlm.after.onboard import onboard
    from fedvlm.after.opened import open_run
    from fedvlm.after.predict import predict
    from fedvlm.after.push import push_to_hub
    from fedvlm.algorithms.base import (
        Algorithm,
        Averaged,
        Gathered,
        Local,
        Score,
        Sent,
        Term,
        Train,
        Visit,
    )
    from fedvlm.algorithms.entry import Entry
    from fedvlm.algorithms.sharing import sharing
    from fedvlm.config import load as load_config
    from fedvlm.data.scenes import scenes
    from fedvlm.engines.simulate import simulate
    from fedvlm.errors import ConfigError, DataError, FedVLMError
    from fedvlm.report.runs import compare, resume, run
    from fedvlm.report.write import write_report
    from fedvlm.rounds.comparison import Comparison
    from fedvlm.rounds.progress import Progress as Callback
    from fedvlm.rounds.results import Results
    from fedvlm.settings.method import AlgorithmConfig
    from fedvlm.settings.sections import Config


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedvlm' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), _NAMES.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

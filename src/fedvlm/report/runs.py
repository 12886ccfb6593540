"""``fedvlm.run``, ``resume`` and ``compare``: the functions of ``rounds``, and a report at the end.

The commands call ``rounds`` themselves, because their tables come between a run and its report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm import processes

if TYPE_CHECKING:
    from fedvlm import config as configs
    from fedvlm.algorithms.base import Algorithm
    from fedvlm.engines.functions import Function
    from fedvlm.rounds.comparison import Comparison, Tell
    from fedvlm.rounds.contenders import Compared
    from fedvlm.rounds.progress import Progress
    from fedvlm.rounds.results import Results


def run(
    config: configs.Source = None,
    *overrides: str,
    data: Any = None,
    algorithm: Algorithm | None = None,
    metrics: Mapping[str, Function] | None = None,
    model: tuple[Any, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Progress] = (),
    report: bool = True,
) -> Results:
    """Runs one federated fine-tuning, from data to a folder with all results and a report.

    Where ``torchrun`` has started several processes, each process calls this function, and the
    processes share the clients. ``progress`` gets the events of the first process.

    Args:
        config: path of a YAML file, a nested dict, a ``Config``, or None for the defaults.
        *overrides: dotted assignments, such as ``"train.rounds=20"``.
        data: the rows as an object, instead of ``data.path``: a ``datasets.Dataset`` or
            ``DatasetDict``, a pandas ``DataFrame``, or a list of dicts. They are written to
            ``rows-DIGEST.parquet`` in the parent folder of ``output``.
        algorithm: your own algorithm; then leave out the section ``algorithm``.
        metrics: your own metrics, name -> ``function(prediction, reference) -> float`` in [0, 1];
            a parameter named ``question`` gets the question. ``eval.metric`` may choose one.
        model: the frozen model and its processor, instead of ``model.name``; they stay unchanged.
        resume: continue the unfinished run in ``config.output``.
        progress: gets the run's events; None: no output.
        callbacks: more receivers of the run's events, see :class:`fedvlm.Callback`.
        report: write ``report.html`` at the end, which shows held-out rows. A report that cannot be
            made is a warning.

    Returns:
        The results: scores per client and their summary, the bytes, the folder.

    Raises:
        ConfigError: the configuration is wrong; the error lists all mistakes.
        DataError: the data do not allow this configuration.
        FedVLMError: the model, the device or the output folder cannot be used.
    """
    from fedvlm.rounds import federate

    results = federate.run(
        config,
        *overrides,
        data=data,
        algorithm=algorithm,
        metrics=metrics,
        model=model,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
    )
    return _reported(results, report)


def resume(
    folder: str | Path,
    *overrides: str,
    progress: Progress | None = None,
    callbacks: Sequence[Progress] = (),
    algorithm: Algorithm | None = None,
    metrics: Mapping[str, Function] | None = None,
    model: tuple[Any, Any] | None = None,
    report: bool = True,
) -> Results:
    """Continues the run in ``folder``; the result is bit-identical to an uninterrupted run's.

    Args:
        folder: the folder of the run.
        *overrides: ``data.path=...`` or ``model.name=...``, if the data or the model have moved;
            ``train.rounds=...`` for another number of rounds, also of a finished run.
        progress: gets the run's events; None: no output.
        callbacks: more receivers of the run's events.
        algorithm: the object, if the run was started with one.
        metrics: the same functions, if the run was started with some.
        model: the same model and processor, if the run was started with them.
        report: write ``report.html`` at the end, as :func:`fedvlm.run`.

    Raises:
        ConfigError: another setting is overridden.
        FedVLMError: the folder holds no run, or the data or the model have changed.
    """
    from fedvlm.rounds import federate

    results = federate.resume(
        folder,
        *overrides,
        progress=progress,
        callbacks=callbacks,
        algorithm=algorithm,
        metrics=metrics,
        model=model,
    )
    return _reported(results, report)


def compare(
    algorithms: Sequence[Compared],
    config: configs.Source = None,
    *overrides: str,
    data: Any = None,
    seeds: int = 1,
    jobs: int = 1,
    tell: Tell | None = None,
    report: bool = True,
) -> Comparison:
    """Runs every algorithm with every seed; finished runs are skipped, unfinished ones continued.

    For one seed, all algorithms get the same rows, clients, splits, cohorts, batches and initial
    adapter. A setting of the section ``algorithm`` applies to the algorithms that have it.

    Args:
        algorithms: names, see ``fedvlm algorithms``; or objects, as ``(label, algorithm)``.
        config: as for :func:`fedvlm.run`; ``output`` is the folder of the comparison.
        *overrides: dotted assignments.
        data: the rows as an object, as for :func:`fedvlm.run`.
        seeds: number of seeds: ``config.seed``, ``config.seed + 1``, ...
        jobs: runs at a time, each in its own process with one thread. Objects need jobs=1, because
            they do not cross processes.
        tell: called with (run, metrics line, seconds) after every round.
        report: write ``report.html`` at the end, for the comparison and for each of its runs.

    Raises:
        FedVLMError: as :func:`fedvlm.run`; or the folder holds other runs.
    """
    from fedvlm.rounds.comparison import compare

    comparison = compare(
        algorithms, config, *overrides, data=data, seeds=seeds, jobs=jobs, tell=tell
    )
    if report:
        from fedvlm.report.write import after_comparison

        after_comparison(comparison.folder)
    return comparison


def _reported(results: Results, report: bool) -> Results:
    """The results of a run. The first of its processes writes the report."""
    if report and processes.rank() == 0:
        from fedvlm.report.write import after

        after(results.folder)
    return results

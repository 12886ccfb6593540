"""Shared fixtures: small runs on the bundled model and data, one thread, no network."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections import defaultdict
from pathlib import Path

import pytest

import again
import smallest
from fedvlm.processes import cores
from forked import Commands, Warm

SHARED = Path(__file__).parents[2] / "shared" / "data"

# Runs make little that is garbage in circles, and a search for it costs more than it frees.
gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_pictures():
    """Runs draw no pictures, because drawing takes a third of a small run's time."""
    from fedvlm.figures import plots, skewplot

    drawing = (
        (plots, "plot_run", plots.plot_run),
        (skewplot, "plot_partition", skewplot.plot_partition),
    )
    with pytest.MonkeyPatch.context() as patch:
        for module, name, _ in drawing:
            patch.setattr(module, name, lambda *args, **options: None)
        yield drawing


@pytest.fixture(scope="session")
def pictures(no_pictures):
    """A context in which runs draw their pictures."""

    @contextlib.contextmanager
    def drawn():
        with pytest.MonkeyPatch.context() as patch:
            for draws in no_pictures:
                patch.setattr(*draws)
            yield

    return drawn


@pytest.fixture(scope="session", autouse=True)
def _no_reports():
    """Runs from Python write no report, unless a test asks with ``report=True``."""
    from fedvlm.report import runs

    with pytest.MonkeyPatch.context() as patch:
        for function in (runs.run, runs.resume, runs.compare):
            patch.setitem(function.__kwdefaults__, "report", False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _read_once():
    """Runs copy the models, rows and versions that an earlier run of this process has read."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, function in again.replacements():
            patch.setattr(module, name, function)
        yield


@pytest.fixture
def small(tmp_path):
    """Settings of a run that takes a second: three sites, two rounds, the smallest model."""
    return {
        "output": str(tmp_path / "run"),
        "model": {"name": smallest.model()},
        "data": {"scenes": {"style": "mixed", "sites": 3, "rows": 16}},
        "partition": {"min_rows": 4},
        "algorithm": {"name": "plora"},
        "train": {"rounds": 2, "local_steps": 2, "batch_size": 4, "average": "none"},
        "eval": {"every": 1, "max_rows": 3, "max_new_tokens": 3},
        "lora": {"rank": 2, "alpha": 4},
    }


@pytest.fixture
def shared_data():
    """The folder of real data beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the real data in {SHARED}, which is not there")
    return SHARED


# The table of model families: ``pytest tests/test_families.py --families-table FILE``.

OUTCOMES: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
CAPABILITIES = {
    "test_load": "load",
    "test_loss": "loss on the answer",
    "test_several": "several pictures",
    "test_generate": "generate",
    "test_lora": "LoRA placements",
    "test_sft_round": "SFT round",
    "test_dpo_round": "DPO round",
    "test_reload": "reload by PEFT",
    "test_export": "export, merged too",
}


def pytest_addoption(parser):
    parser.addoption("--families-table", help="write what test_families.py found as Markdown")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Two workers more than cores: some wait for deployed runs and other processes."""
    return cores() + 2


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Runs tests that wait first, and the tests of a family, which share a model, together."""
    ours = [n for n, item in enumerate(items) if item.path.name == "test_families.py"]
    by_family = sorted((items[n] for n in ours), key=lambda item: item.callspec.params["family"])
    for n, item in zip(ours, by_family, strict=True):
        items[n] = item
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = dealt(items, workers, lambda item: item.get_closest_marker("waits"))


def dealt(items, workers, mark):
    """The items in an order in which workers begin with tests that wait, one group a worker.

    The workers of ``--dist=worksteal`` begin with equal shares of the list. A worker without tests
    then takes some from the end of another share, so that the beginning of a share stays together.

    Args:
        items: the tests.
        workers: the number of workers.
        mark: returns the mark ``waits(group)`` of a test, or None.
    """
    rest, waiting = [], defaultdict(list)
    for item in items:
        found = mark(item)
        (waiting[found.args] if found else rest).append(item)
    groups, order = list(waiting.values()), []
    for worker in range(workers):
        end = len(order) + (len(items) - len(order)) // (workers - worker)
        order += [item for group in groups[worker::workers] for item in group]
        more = max(0, end - len(order))
        order += rest[:more]
        del rest[:more]
    return order + rest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    family = getattr(item, "callspec", None) and item.callspec.params.get("family")
    if family and item.originalname in CAPABILITIES and (report.when == "call" or report.failed):
        said = dict(report.user_properties).get("cell") if report.passed else None
        OUTCOMES[family][item.originalname].append(said or report.outcome)
    return report


def pytest_sessionfinish(session):
    target = session.config.getoption("--families-table")
    if target and OUTCOMES:
        Path(target).write_text(families_table(), encoding="utf-8")


def families_table() -> str:
    """The outcomes so far: one row for each family, one column for each capability."""
    from datetime import date
    from importlib.metadata import version

    names = [name for name in CAPABILITIES if any(name in found for found in OUTCOMES.values())]
    rows = [
        [family, *(_cell(found[name]) for name in names)]
        for family, found in sorted(OUTCOMES.items())
    ]
    head = ["family", *(CAPABILITIES[name] for name in names)]
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    packages = ", ".join(f"{n} {version(n)}" for n in ("transformers", "peft", "torch"))
    return (
        "# Model families\n\n`make families` writes this page. It runs tests/test_families.py on a "
        "tiny model of every family, built from the real classes.\n"
        f"{date.today()}, {packages}, CPU, no torchvision.\n\n"
        + "\n".join(f"| {line} |" for line in lines)
        + "\n"
    )


def _cell(outcomes: list[str]) -> str:
    if len(outcomes) == 1 and outcomes[0] not in ("passed", "failed"):
        return outcomes[0]
    passed = outcomes.count("passed")
    return "yes" if passed == len(outcomes) > 0 else f"{passed} of {len(outcomes)} tests"


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A ``python`` and a ``fedvlm`` whose imports are done."""
    name = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    found = Warm(tmp_path_factory.mktemp("warm"), name)
    yield found
    found.close()


@pytest.fixture(scope="session")
def commands(warm, tmp_path_factory):
    """Runs commands of fedvlm in processes, for tests that interrupt or kill them."""
    return Commands(warm, tmp_path_factory.mktemp("commands"))


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    """The folder of a finished pLoRA run of three sites. A test that writes uses ``own_run``."""
    from fedvlm.rounds import federate

    folder = tmp_path_factory.mktemp("finished") / "run"
    settings = {
        "output": str(folder),
        "data": {"scenes": {"style": "concept", "sites": 3, "rows": 24}},
        "partition": {"min_rows": 4},
        "algorithm": {"name": "plora"},
        "train": {"rounds": 2, "local_steps": 3, "batch_size": 4},
        "eval": {"every": 0, "max_rows": 4, "max_new_tokens": 6},
        "lora": {"rank": 2, "alpha": 8},
        "engine": {"threads": 1},
    }
    federate.run(settings)
    return folder


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of the finished run, to write to."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="session")
def new_rows(tmp_path_factory):
    """A folder with rows of one site that no run has seen, and with one of their pictures."""
    import fedvlm
    from fedvlm.data.images import open_image

    folder = tmp_path_factory.mktemp("new")
    rows = fedvlm.scenes(style="concept", sites=3, rows=24, seed=7)
    table = rows.to_pandas()
    table[table["site"] == "site-1"].to_parquet(folder / "site.parquet", index=False)
    open_image(rows[0]["image"]).save(folder / "picture.png")
    return folder

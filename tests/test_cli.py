"""The command line: help, messages, exit codes, tables."""

import gc
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

import fedvlm
import smallest
from fedvlm import processes
from fedvlm.cli.app import app, main
from fedvlm.cli.report import reported_early
from fedvlm.rounds import comparison
from fedvlm.store import run as store
from stopping import refused

SMALL = (
    f"model.name={smallest.model()}",
    "data.scenes.sites=2",
    "data.scenes.rows=16",
    "partition.min_rows=4",
    "algorithm.name=plora",
    "train.rounds=1",
    "train.local_steps=1",
    "eval.max_rows=3",
    "eval.max_new_tokens=4",
    "lora.rank=2",
    "engine.threads=1",
)


def call(capsys, monkeypatch, *words):
    """Runs the command in this process. Returns its exit code, its output and its errors."""
    monkeypatch.setattr(sys, "argv", ["fedvlm", *words])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


COMMANDS = ("run", "compare", "demo", "algorithms", "export", "predict", "evaluate", "onboard")
COMMANDS += ("audit", "report", "watch")
HELP = """
import sys, fedvlm
from fedvlm.cli.app import app
from typer.testing import CliRunner
for name in sys.argv[1:]:
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
heavy = {"torch", "transformers", "datasets", "peft", "matplotlib", "sklearn", "numpy"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_help_imports_nothing_heavy():
    subprocess.run([sys.executable, "-c", HELP, *COMMANDS], check=True)


FIRST = """
import sys
class First:
    def isatty(self): return False
    def flush(self): pass
    def write(self, text):
        heavy = {"torch", "transformers", "datasets", "pandas", "peft", "matplotlib", "scipy"}
        print(text.split()[0], sorted(heavy & set(sys.modules)), file=sys.__stdout__)
        sys.exit()
sys.argv = ["fedvlm", *sys.argv[1:]]
sys.stdout = sys.stderr = First()
from fedvlm.cli.app import main
main()
"""


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["run"], "auto"),  # the first line of its progress
        (["run", "--print-config"], "output:"),
        (["export", "no-run"], "error:"),
        (["report", "no-run"], "error:"),
    ],
)
def test_the_first_output_waits_for_nothing_heavy(words, word, tmp_path):
    command = [sys.executable, "-c", FIRST, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"{word} []\n"


def test_imports_are_without_the_collector_and_its_state_comes_back(monkeypatch, tmp_path):
    (tmp_path / "some_imported.py").write_text("import gc\non = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(processes, "_own", False)
    frozen = gc.get_freeze_count()
    processes.imported("some_imported")
    assert sys.modules.pop("some_imported").on is False
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen, "another program's objects stay collectable"
    monkeypatch.setattr(processes, "_own", True)
    processes.imported("some_imported")
    assert gc.get_freeze_count() > frozen
    gc.unfreeze()
    with pytest.raises(ModuleNotFoundError):
        processes.imported("no_such_module")
    assert gc.isenabled()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert command in result.output


def test_a_run_prints_lines_and_a_table_and_says_where_everything_is(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    code, text, errors = call(capsys, monkeypatch, "run", f"output={out}", *SMALL)
    assert (code, errors) == (0, "")
    assert "round   1/1" in text
    assert "site-1" in text
    assert "worst 10 %" in text
    assert str(out) in text.replace("\n", "")
    shown = json.loads((out / "table.json").read_text())["models"]["personal"]["summary"]
    assert f"{100 * shown['exact_match']['mean']:.1f} %" in text


def test_quiet_prints_only_the_table(tmp_path, capsys, monkeypatch):
    code, text, _ = call(capsys, monkeypatch, "run", "-q", f"output={tmp_path / 'run'}", *SMALL)
    assert code == 0
    assert "round   1/1" not in text
    assert "worst 10 %" in text


def test_mistakes_are_one_message_and_exit_code_two(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    words = (f"output={out}", "train.round=3", "train.lr=fast")
    code, text, errors = call(capsys, monkeypatch, "run", *words)
    assert (code, text) == (2, "")
    assert errors.startswith("error: the configuration has 2 problems:")
    assert "did you mean 'train.rounds'?" in errors
    assert "Traceback" not in errors
    assert not out.exists()


def test_resume_takes_no_other_settings(capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, "run", "--resume", "x", "train.lr=3")
    assert code == 2
    assert "train.lr=3" in errors


def test_print_config_is_a_valid_configuration(tmp_path, capsys, monkeypatch):
    code, text, _ = call(capsys, monkeypatch, "run", "--print-config", "train.rounds=3")
    assert code == 0
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert fedvlm.load_config(path).train.rounds == 3
    assert yaml.safe_load(text)["seed"] == 0


def test_the_docs_list_of_algorithms_is_the_table():
    import re

    from fedvlm.algorithms.table import TABLE

    page = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name, entry in TABLE.items():
        paper = re.sub(r"arXiv ([\d.]+)", r"arXiv [\1](https://arxiv.org/abs/\1)", entry.source)
        own = [key for key in entry.settings.model_fields if key != "name"]
        own += ["lora.ranks"] * entry.ranks + ["lora.spare"] * entry.spare
        settings = ", ".join(f"`{s}`" for s in own) or "none"
        row = f"| `{name}` | {entry.sends} | {entry.keeps} | {paper} | {settings} |"
        assert row in page.splitlines(), row


def test_the_list_of_algorithms_names_all_of_them(capsys, monkeypatch):
    from fedvlm.algorithms.table import TABLE

    code, text, _ = call(capsys, monkeypatch, "algorithms")
    assert code == 0
    assert all(name in text and entry.source.split(",")[0] in text for name, entry in TABLE.items())


def test_ctrl_c_leaves_a_run_that_can_be_resumed_and_prints_how(tmp_path, commands):
    out = tmp_path / "run"
    commands.start("run", f"output={out}", *SMALL, "train.rounds=500", "eval.every=0")
    while not any("round   2" in line for line in commands.lines()):
        assert commands.running(), commands.err.read_text()
        time.sleep(0.02)
    time.sleep(0.2)
    commands.send(signal.SIGINT)
    assert commands.code() == 130
    errors = commands.err.read_text()
    assert f"fedvlm run --resume {out}" in errors
    assert "Traceback" not in errors
    assert store.Store(out).finished() >= 2


SLEEPERS = """
import os, time
from pathlib import Path
from fedvlm.rounds import comparison

def work(name, config, tell):
    Path(name).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    comparison.each(work, {"one": None, "two": None}, jobs=2)
"""


def test_when_a_comparison_is_killed_its_processes_end(tmp_path):
    (tmp_path / "sleepers.py").write_text(SLEEPERS)
    parent = subprocess.Popen([sys.executable, "sleepers.py"], cwd=tmp_path)
    names, end = [tmp_path / "one", tmp_path / "two"], time.monotonic() + 60
    while not all(path.exists() and path.read_text() for path in names):
        assert parent.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children(recursive=True)
    assert {int(path.read_text()) for path in names} < {child.pid for child in children}
    parent.kill()
    parent.wait()
    _, left = psutil.wait_procs(children, timeout=30)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left), "children outlive it"


def test_compare_skips_what_is_done_and_reports_the_gain(tmp_path, capsys, monkeypatch):
    out = tmp_path / "compare"
    words = ("compare", "plora,lora", f"output={out}", *SMALL, "--seeds", "2")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    assert "over lora" in text
    rows = json.loads((out / "comparison.json").read_text())["algorithms"]
    assert {r["algorithm"] for r in rows} == {"plora", "lora"}
    lora = next(r for r in rows if r["algorithm"] == "lora")
    assert lora["gain_over_lora"] in (0.0, None)
    assert lora["standard_error"] is not None
    assert lora["seeds"] == 2
    before = {p: p.stat().st_mtime_ns for p in out.rglob("adapter_model.safetensors")}
    assert len(before) == 2 * 2 * 3
    words = ("compare", "plora,lora,local", f"output={out}", *SMALL, "--seeds", "2")
    code, text, _ = call(capsys, monkeypatch, *words)
    assert code == 0
    assert "local seed 1" in text
    assert "plora seed 0" not in text, "finished runs are skipped"
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    code, _, errors = call(capsys, monkeypatch, *words, "train.lr=1e-3")
    assert code == 2
    assert "other settings" in errors


def test_compare_in_two_processes_gives_the_same_scores(tmp_path):
    names = ["plora", "local"]
    settings = [*SMALL, "train.rounds=2"]
    alone = fedvlm.compare(names, None, f"output={tmp_path / 'a'}", *settings)
    told, reports = [], []

    def idle(folders):
        reported_early(folders)
        reports.extend(folder / "report.html" for folder in folders)

    both = comparison.compare(
        names, None, f"output={tmp_path / 'b'}", *settings, jobs=2, tell=told.append, idle=idle
    )
    assert 1 <= len(reports) <= 2, "one run is done, and at times the other one as well"
    assert all(report.exists() for report in reports)
    clock = "seconds"
    assert [{**r, clock: 0} for r in alone.rows] == [{**r, clock: 0} for r in both.rows]
    assert {(name, line["round"]) for name, line, _ in told} == {
        (f"{n} seed 0", r) for n in names for r in (0, 1, 2, 3)
    }


def test_an_error_in_a_process_of_compare_is_the_same_clear_error(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "run_one", refused)
    words = ("compare", "plora", "--jobs", "2", f"output={tmp_path}", "lora.rank=999")
    code, _, errors = call(capsys, monkeypatch, *words)
    assert (code, errors.count("error: ")) == (2, 1)
    assert "lora.rank: 999 is larger than a layer, plora seed 0 says" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("words", [("compare", "plora,nope"), ("compare", ",")])
def test_compare_refuses_unknown_names(words, tmp_path, capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, *words, f"output={tmp_path / 'x'}")
    assert code == 2
    assert "there are auto, plora, lora" in errors


def test_the_public_names_are_these_and_all_load():
    assert len(fedvlm.__all__) <= 32
    for name in fedvlm.__all__:
        assert getattr(fedvlm, name) is not None
    assert callable(fedvlm.compare)
    with pytest.raises(AttributeError):
        _ = fedvlm.nothing


def test_no_source_file_is_longer_than_400_lines():
    root = Path(__file__).parents[1]
    long = {
        str(p): n
        for folder in ("src", "tests", "scripts", "benchmarks")
        for p in (root / folder).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "x" * 9000), 2, "error: No space left on device"),
        (MemoryError(), 2, "error: MemoryError"),
        (RecursionError("too deep"), 2, "error: RecursionError: too deep"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 2, "error: UnicodeEncodeError"),
        (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_machine_are_one_line(error, code, said, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("fedvlm.cli.app.parse", fail)
    out = sys.stdout
    found, _, errors = call(capsys, monkeypatch, "run")
    monkeypatch.setattr(sys, "stdout", out)
    assert found == code
    assert errors.startswith(said)
    assert errors.count("\n") == (1 if said else 0)
    assert len(errors) < 2100


def test_a_defect_keeps_its_traceback_and_is_called_one(capsys, monkeypatch):
    monkeypatch.setattr("fedvlm.cli.app.parse", lambda words: 1 / 0)
    code, _, errors = call(capsys, monkeypatch, "run")
    assert code == 1
    assert "ZeroDivisionError" in errors
    assert errors.endswith("this is a defect of fedvlm; please report it with these lines\n")


@pytest.mark.parametrize(
    "words", [["run", "--no\x1b[2J" + "x" * 9000], ["x" * 9000], ["run", "x" * 9000], ["run", "\0"]]
)
def test_odd_words_give_one_short_message(words, capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, *words)
    assert code == 2
    assert len(errors) < 2300
    assert "\x1b" not in errors
    assert "Traceback" not in errors


def test_escape_sequences_of_data_do_not_reach_the_terminal(capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, "run", "train.lr=\x1b[2J", "\udcff=1")
    assert code == 2
    assert "\\x1b[2J" in errors
    assert "\x1b" not in errors

"""The command line as a person meets it: help, messages, exit codes, tables."""

import json
import os
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
from fedvlm.cli.app import app, main
from fedvlm.store import run as store

SMALL = (
    "data.scenes.sites=2",
    "data.scenes.rows=16",
    "partition.min_rows=4",
    "train.rounds=1",
    "train.local_steps=1",
    "eval.max_rows=3",
    "eval.max_new_tokens=4",
    "lora.rank=2",
    "engine.threads=1",
)


def call(capsys, monkeypatch, *words):
    """Runs the command in this process; returns exit code, output, errors."""
    monkeypatch.setattr(sys, "argv", ["fedvlm", *words])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fedvlm.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'matplotlib', 'sklearn'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "command", ["run", "compare", "demo", "algorithms", "export", "predict", "evaluate", "onboard"]
)
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
    code, _, errors = call(capsys, monkeypatch, "run", "--resume", "x", "train.rounds=3")
    assert code == 2
    assert "train.rounds=3" in errors


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


def test_ctrl_c_leaves_a_run_that_goes_on_and_says_how(tmp_path):
    out = tmp_path / "run"
    words = ["run", f"output={out}", *SMALL, "train.rounds=500", "eval.every=0"]
    command = [sys.executable, "-m", "fedvlm", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # A shell that runs the tests in the background has Ctrl-C ignored by all that it starts.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while "round   2" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
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
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left), "they outlive it"


def test_compare_skips_what_is_done_and_reports_the_gain(tmp_path, capsys, monkeypatch):
    out = tmp_path / "compare"
    words = ("compare", "plora,lora", f"output={out}", *SMALL, "--seeds", "2")
    code, text, errors = call(capsys, monkeypatch, *words)
    assert (code, errors) == (0, "")
    assert "over lora" in text
    rows = json.loads((out / "comparison.json").read_text())
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
    assert "plora seed 0" not in text, "it was done before"
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    code, _, errors = call(capsys, monkeypatch, *words, "train.lr=1e-3")
    assert code == 2
    assert "other settings" in errors


def test_compare_in_two_processes_gives_the_same_scores(tmp_path):
    names = ["plora", "local"]
    settings = [*SMALL, "train.rounds=2"]
    alone = fedvlm.compare(names, None, f"output={tmp_path / 'a'}", *settings)
    told = []
    both = fedvlm.compare(
        names, None, f"output={tmp_path / 'b'}", *settings, jobs=2, tell=told.append
    )
    clock = "seconds"
    assert [{**r, clock: 0} for r in alone.rows] == [{**r, clock: 0} for r in both.rows]
    assert {(name, line["round"]) for name, line, _ in told} == {
        (f"{n} seed 0", r) for n in names for r in (0, 1, 2)
    }


def test_an_error_in_a_process_of_compare_is_the_same_clear_error(tmp_path, capsys, monkeypatch):
    words = ("compare", "plora,lora", "--jobs", "2", f"output={tmp_path}", "lora.rank=999")
    code, _, errors = call(capsys, monkeypatch, *words, "engine.threads=1")
    assert code == 2
    assert errors.startswith("error: lora.rank: 999")


@pytest.mark.parametrize("words", [("compare", "plora,nope"), ("compare", ",")])
def test_compare_refuses_unknown_names(words, tmp_path, capsys, monkeypatch):
    code, _, errors = call(capsys, monkeypatch, *words, f"output={tmp_path / 'x'}")
    assert code == 2
    assert "there are auto, plora, lora" in errors


def test_the_public_names_are_these_and_all_load():
    assert len(fedvlm.__all__) <= 30
    for name in fedvlm.__all__:
        assert getattr(fedvlm, name) is not None
    assert callable(fedvlm.compare)
    with pytest.raises(AttributeError):
        _ = fedvlm.nothing


@pytest.mark.parametrize(
    "first", ["algorithms.table", "config", "rounds.comparison", "rounds.federate", "after.export"]
)
def test_any_module_may_be_imported_first(first):
    subprocess.run([sys.executable, "-c", f"import fedvlm.{first}"], check=True)


def test_no_source_file_is_longer_than_400_lines():
    root = Path(__file__).parents[1]
    long = {
        str(p): n
        for folder in ("src", "tests", "scripts", "benchmarks")
        for p in (root / folder).rglob("*.py")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long

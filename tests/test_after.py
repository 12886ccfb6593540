"""The commands after training: what they refuse, with which message."""

import os

import pytest

import fedvlm
from fedvlm.after import export
from fedvlm.after.opened import open_run
from fedvlm.config import load
from fedvlm.errors import FedVLMError
from fedvlm.rounds.located import located
from fedvlm.store import sealed
from fedvlm.store.files import load_tree
from test_cli import call
from test_federate import Stop, bytes_of
from test_florence import folder as florence  # noqa: F401 - a fixture

COMMANDS = {
    "export": ("--global",),
    "predict": ("picture.png", "What?", "--global"),
    "evaluate": ("--data", "x.parquet"),
    "onboard": ("--data", "x.parquet"),
}


def test_an_unfinished_run_says_how_to_go_on(small, capsys, monkeypatch):
    from fedvlm.rounds import federate

    with pytest.raises(KeyboardInterrupt):
        federate.run(small, progress=Stop(1))
    for command, more in COMMANDS.items():
        code, text, errors = call(capsys, monkeypatch, command, small["output"], *more)
        assert (code, text) == (2, ""), command
        assert f"fedvlm run --resume {small['output']}" in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_a_run_is_refused(command, tmp_path, finished_run, capsys, monkeypatch):
    for folder, said in (
        (tmp_path / "no", "there is no folder"),
        (tmp_path, "holds no run"),
        (finished_run.parent, f"choose one, such as '{finished_run}'"),
    ):
        words = (command, str(folder), *COMMANDS[command])
        code, _, errors = call(capsys, monkeypatch, *words)
        assert code == 2
        assert said in errors


def test_what_was_trained_cannot_be_set_otherwise(finished_run):
    with pytest.raises(FedVLMError, match=r"lora\.rank=3.* cannot change after training"):
        open_run(finished_run, "lora.rank=3")
    with pytest.raises(FedVLMError, match=r"did you mean 'model\.device'"):
        open_run(finished_run, "model.devise=cpu")


def test_an_adapter_that_is_gone_is_named(own_run):
    (own_run / "adapters" / "global" / "adapter_model.safetensors").unlink()
    with pytest.raises(FedVLMError, match=r"global/adapter_model\.safetensors' is missing"):
        fedvlm.export(own_run)


def test_adapters_of_another_model_are_refused(finished_run, florence):  # noqa: F811
    with pytest.raises(FedVLMError, match="do not fit the model"):
        open_run(finished_run, f"model.name={florence}").probe({})
    run = open_run(finished_run)
    tree = load_tree(run.adapter_folder(None) / "adapter_model.safetensors")
    for wrong in ({}, {name: tensor[:1] for name, tensor in tree.items()}):
        with pytest.raises(FedVLMError, match="do not fit the model"):
            run.write(wrong)


def test_the_model_gets_lora_where_the_run_had_it_and_the_same_start(finished_run):
    from fedvlm.rounds.prepare import prepare
    from fedvlm.tree import digest

    run = open_run(finished_run)
    engine, _, _ = prepare(run.config)
    assert digest(run.initial) == digest(engine.adapter)


def test_layers_that_the_run_left_out_stay_without_lora(own_run):
    from safetensors.torch import save_file

    path = own_run / "adapters" / "global" / "adapter_model.safetensors"
    whole = load_tree(path)
    save_file({n: t for n, t in whole.items() if "vision" not in n}, path)
    table = sealed.read(own_run / "table.json")
    table["files"] |= sealed.digests(own_run, ["adapters/global/adapter_model.safetensors"])
    sealed.write(own_run / "table.json", table)
    run = open_run(own_run)
    assert 0 < len(run.initial) < len(whole)
    assert not [n for n in run.initial if "vision" in n]


def test_a_client_that_is_not_there_is_refused_with_the_nearest_name(
    finished_run, new_rows, capsys, monkeypatch
):
    data = ("--data", str(new_rows / "site.parquet"))
    for words in (
        ("export", str(finished_run), "-c", "sit-1"),
        ("predict", str(finished_run), str(new_rows / "picture.png"), "What?", "-c", "sit-1"),
        ("evaluate", str(finished_run), *data, "-c", "sit-1"),
    ):
        code, _, errors = call(capsys, monkeypatch, *words)
        assert code == 2
        assert "has no client 'sit-1'; did you mean 'site-1'?" in errors


def test_the_commands_are_public_names():
    assert {"export", "predict", "evaluate", "onboard", "open_run"} <= set(fedvlm.__all__)


def test_the_commands_in_the_documents_exist_with_their_options():
    import typer

    from fedvlm.cli.app import app
    from test_readme import ROOT, commands, parse

    pages = [ROOT / "docs" / name for name in ("serving.md", "hub.md")]
    blocks = [block for page in pages for block in parse(page.read_text(encoding="utf-8"))]
    assert all(block.language for block in blocks)
    lines = [c for b in blocks if b.language == "bash" for c in commands(b)]
    ours = [line.split() for line in lines if line.startswith("fedvlm ")]
    after = {"app", "export", "predict", "evaluate", "onboard", "push"}
    assert {words[1] for words in ours} == {*after, "run"}
    known = typer.main.get_command(app).commands
    for words in ours:
        options = {o for p in known[words[1]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, words


# What a command reads, it does not overwrite


@pytest.fixture
def questions(tmp_path):
    """A file of questions in a folder of its own."""
    path = tmp_path / "asked" / "q.jsonl"
    path.parent.mkdir()
    path.write_text('{"image": "0.png", "question": "What?"}\n')
    return path


def links_to(path, folder):
    """The same file under other names: relative, through links, and as a hard link."""
    (folder / "soft.jsonl").symlink_to(path)
    os.link(path, folder / "hard.jsonl")
    (folder / "linked").symlink_to(path.parent)
    return [
        path,
        path.parent / ".." / path.parent.name / path.name,
        folder / "soft.jsonl",
        folder / "hard.jsonl",
        folder / "linked" / path.name,
    ]


def test_an_output_that_is_an_input_is_refused_before_any_work(
    finished_run, questions, tmp_path, capsys, monkeypatch
):
    before = questions.read_bytes()
    for out in links_to(questions, tmp_path):
        for words in (
            ("predict", str(finished_run), str(questions), "--global"),
            ("evaluate", str(finished_run), "--data", str(questions)),
        ):
            code, _, errors = call(capsys, monkeypatch, *words, "--out", str(out))
            assert (code, "is the file that is read" in errors) == (2, True), (words, out)
    code, _, errors = call(
        *(capsys, monkeypatch, "predict", str(finished_run), str(questions.parent), "What?"),
        *("--global", "--out", str(tmp_path / "linked" / "new" / "a.jsonl")),
    )
    assert code == 2
    assert "is in the folder that is read" in errors
    assert questions.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["table.json", "TABLE.json", "metrics.jsonl", "answers/new.jsonl", "adapters/a/b.csv"]
)
def test_an_output_that_belongs_to_a_run_is_refused(
    name, own_run, questions, tmp_path, capsys, monkeypatch
):
    (tmp_path / "other").symlink_to(own_run)
    before = bytes_of(own_run)
    for folder in (own_run, tmp_path / "other"):
        for words in (
            ("predict", str(own_run), str(questions), "--global", "--out", str(folder / name)),
            ("evaluate", str(own_run), "--data", str(questions), "--out", str(folder / name)),
            ("export", str(own_run), "--global", "--to", str(folder / name)),
        ):
            code, _, errors = call(capsys, monkeypatch, *words)
            assert code == 2
            assert "of the run in" in errors
    assert bytes_of(own_run) == before


def test_an_own_file_in_the_runs_folder_may_be_written(own_run, new_rows):
    for _ in range(2):  # the second time, the file exists
        fedvlm.evaluate(
            own_run, new_rows / "site.parquet", clients=["site-0"], untuned=False, max_rows=1,
            out=own_run / "scores.json",
        )  # fmt: skip
    assert fedvlm.export(own_run, to=own_run / "export" / "mine") == own_run / "export" / "mine"


def test_a_base_model_that_has_moved_is_asked_for(own_run, tmp_path):
    run = open_run(own_run, f"model.name={tmp_path / 'gone'}")
    with pytest.raises(FedVLMError, match=r"not at '.*gone' any more; .*model\.name=FOLDER"):
        export.write_export(run, None, False, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_paths_of_a_run_are_absolute_and_names_of_the_hub_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "tiny").mkdir()
    (tmp_path / "rows.jsonl").touch()
    mine = located(load(None, "model.name=base", "data.path=rows.jsonl"))
    assert (mine.model.name, mine.data.path) == (
        str(tmp_path / "base"),
        str(tmp_path / "rows.jsonl"),
    )
    assert located(mine) == mine
    for name in ("tiny", "HuggingFaceTB/SmolVLM-256M-Instruct"):
        hub = load(None, f"model.name={name}", "data.path=openbmb/RLAIF-V-Dataset")
        assert located(hub) == hub


def test_a_folder_with_other_files_is_no_output_of_a_comparison(small, tmp_path):
    small["output"] = str(tmp_path)
    (tmp_path / "comparison.csv").write_text("mine")
    with pytest.raises(FedVLMError, match=r"comparison\.csv' exists and is of no comparison"):
        fedvlm.compare(["lora"], small)
    assert (tmp_path / "comparison.csv").read_text() == "mine"


def test_pictures_are_drawn_again_from_the_files(own_run, capsys, monkeypatch, pictures):
    for name in ("partition.png", "curves.png"):
        (own_run / name).unlink(missing_ok=True)
    with pictures():
        code, text, errors = call(capsys, monkeypatch, "plot", str(own_run))
    assert (code, errors) == (0, "")
    assert text.split() == [str(own_run / name) for name in ("partition.png", "curves.png")]
    assert all((own_run / name).stat().st_size for name in ("partition.png", "curves.png"))
    comparison = own_run.parent / "comparison"
    comparison.mkdir()
    own_run.rename(comparison / "plora-seed-0")
    (comparison / "comparison.json").write_text('{"algorithms": [{"algorithm": "plora"}]}')
    code, text, errors = call(capsys, monkeypatch, "plot", str(comparison))
    assert (code, errors) == (0, "")
    assert text.split() == [str(comparison / "comparison.png")]
    assert (comparison / "comparison.png").stat().st_size
    code, _, errors = call(capsys, monkeypatch, "plot", str(own_run.parent))
    assert code == 2
    assert "holds no run and no comparison" in errors

"""The commands after training: what they refuse, with which message."""

import pytest

import fedvlm
from fedvlm.after.opened import open_run
from fedvlm.errors import FedVLMError
from fedvlm.store.files import load_tree
from test_cli import call
from test_federate import Stop
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
    with pytest.raises(FedVLMError, match=r"file of the run is missing: .*global/adapter_model"):
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


def test_the_commands_in_the_document_exist_with_their_options():
    import typer

    from fedvlm.cli.app import app
    from test_readme import ROOT, commands, parse

    blocks = parse((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    assert all(block.language for block in blocks)
    lines = [c for b in blocks if b.language == "bash" for c in commands(b)]
    ours = [line.split() for line in lines if line.startswith("fedvlm ")]
    assert {words[1] for words in ours} == {"export", "predict", "evaluate", "onboard"}
    known = typer.main.get_command(app).commands
    for words in ours:
        options = {o for p in known[words[1]].params for o in p.opts}
        assert {w for w in words if w.startswith("--")} <= options, words

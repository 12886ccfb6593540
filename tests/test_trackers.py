"""Callbacks and experiment trackers, each with its real client, without a network."""

import contextlib
import json
import logging
from pathlib import Path

import pytest

import fedvlm
from fedvlm.errors import ConfigError
from fedvlm.rounds import trackers
from fedvlm.rounds.trackers import values_of
from fedvlm.store.files import read_lines

SETTINGS = {
    "algorithm": {"name": "lora"},
    "data": {"scenes": {"sites": 2, "rows": 12}},
    "train": {"rounds": 2, "local_steps": 1, "batch_size": 2},
    "eval": {"every": 0, "max_rows": 2, "max_new_tokens": 2},
    "lora": {"rank": 2, "target": "language"},
    "partition": {"min_rows": 4},
}

pytestmark = pytest.mark.usefixtures("no_pictures")


def run(folder, *words, **options):
    return fedvlm.run({**SETTINGS, "output": str(folder / "run")}, *words, **options)


class Told(fedvlm.Callback):
    def __init__(self, dies_in=None):
        self.events, self.dies_in = [], dies_in

    @contextlib.contextmanager
    def started(self, config):
        self.events.append("started")
        yield
        self.events.append("ended")

    def partitioned(self, partition):
        self.events.append(f"{len(partition.clients)} clients")

    def round(self, line, seconds):
        self.events.append(line["round"])
        if line["round"] == self.dies_in:
            raise RuntimeError("enough")

    def finished(self, results):
        self.events.append(type(results).__name__)


def test_a_callback_gets_every_event_in_order(tmp_path):
    told = Told()
    run(tmp_path, callbacks=[told])
    assert told.events == ["started", "2 clients", 0, 1, 2, 3, "Results", "ended"]


def test_an_exception_in_a_callback_ends_the_run_and_it_can_be_resumed(tmp_path):
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, callbacks=[Told(dies_in=1)])
    told = Told()
    fedvlm.resume(tmp_path / "run", callbacks=[told])
    assert told.events == ["started", "2 clients", 2, 3, "Results", "ended"]


def test_the_numbers_of_a_line_have_unique_plain_names():
    scores = {"a/b": {"exact_match": 1.0}, "a_b": {"exact_match": 0.0}}
    line = {
        "round": 1,
        "train_loss": {"a/b": 1.0, "a_b": 3.0},
        "evaluation": {"personal": scores, "global": {}},
        "bytes_up": {"a/b": 5, "a_b": 6},
        "epsilon": 0.5,
    }
    found = values_of(line, 2.0)
    assert found["loss/mean"] == 2.0
    assert found["personal/exact_match/mean"] == 0.5
    assert (found["bytes_up"], found["epsilon"], found["seconds"]) == (11, 0.5, 2.0)
    assert len([name for name in found if name.startswith("personal/exact_match/")]) == 3
    assert not [name for name in found if name.count("/") > 2]


def test_a_tracker_that_is_not_installed_is_refused_before_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install wandb mlflow-skinny"):
        run(tmp_path, "report_to=[wandb, mlflow]")
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match="report_to"):
        fedvlm.load_config({}, "report_to=[wandbx]")


def test_a_tracker_that_fails_is_a_warning_and_the_run_is_whole(tmp_path, monkeypatch, caplog):
    class Failing(trackers.Tracker):
        package = "json"

        def open(self, number):
            raise OSError("no network")

    monkeypatch.setitem(trackers.TRACKERS, "wandb", Failing)
    with caplog.at_level(logging.WARNING):
        results = run(tmp_path, "report_to=[wandb]")
    assert results.metrics
    (warning,) = [r.getMessage() for r in caplog.records if "report_to" in r.getMessage()]
    assert "the run goes on: OSError: no network" in warning


def test_no_file_with_rows_goes_to_a_tracker(tmp_path, monkeypatch):
    kept = []

    class Keeping(trackers.Tracker):
        name = package = "json"
        open = log = close = lambda self, *given: None

        def keep(self, files):
            kept.extend(files)

    monkeypatch.setattr(Keeping, "open", lambda self, number: self)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Keeping)
    results = run(tmp_path, "report_to=[wandb]", callbacks=[Reported()])
    assert (results.folder / "report.html").exists()
    words = [row["question"] for row in fedvlm.scenes(sites=2, rows=12)]
    for path in kept:
        assert not [w for w in words if w.encode() in path.read_bytes()], path
    assert {path.name for path in kept} >= {"config.yaml", "table.csv"}


class Reported(fedvlm.Callback):
    """Leaves the report of an earlier end, as a run that is given more rounds has it."""

    def round(self, line, seconds):
        folder = Path(self.config.output)
        questions = [row["question"] for row in fedvlm.scenes(sites=2, rows=12)]
        (folder / "report.html").write_text("\n".join(questions))

    @contextlib.contextmanager
    def started(self, config):
        self.config = config
        yield


# -- the real clients


def lines(folder):
    return read_lines(folder / "run" / "metrics.jsonl")


def test_tensorboard_has_every_number_of_every_round(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'fedvlm[trackers]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(tmp_path, "report_to=[tensorboard]")
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    wanted = {n for line in lines(tmp_path) for n in values_of(line, 1.0)}
    assert set(found.Tags()["scalars"]) == wanted
    (settings,) = found.Tensors("settings/text_summary")
    assert b"    algorithm.name: lora\n" in settings.tensor_proto.string_val[0]
    up = {event.step: event.value for event in found.Scalars("bytes_up")}
    assert up == {x["round"]: sum(x["bytes_up"].values()) for x in lines(tmp_path)[1:]}


def test_mlflow_has_settings_scores_and_files_and_a_resumed_run_is_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'fedvlm[trackers]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, "report_to=[mlflow]", callbacks=[Told(dies_in=1)])
    fedvlm.resume(tmp_path / "run")
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("fedvlm").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["algorithm.name"] == "lora"
    history = client.get_metric_history(found.info.run_id, "bytes_up")
    assert {m.step: m.value for m in history} == {
        x["round"]: sum(x["bytes_up"].values()) for x in lines(tmp_path)[1:]
    }
    names = {file.path for file in client.list_artifacts(found.info.run_id)}
    assert {"config.yaml", "table.csv"} <= names


def test_wandb_writes_an_offline_run_that_a_resumed_run_continues(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install 'fedvlm[trackers]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logged = []
    log = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run,
        "log",
        lambda own, found, step=None: (logged.append((step, found)), log(own, found, step=step))[1],
    )
    run(tmp_path, "report_to=[wandb]")
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    number = json.loads((tmp_path / "run" / trackers.KNOWN).read_text())["wandb"]
    assert folder.name.endswith(number)
    (written,) = folder.glob("*.wandb")
    wandb.teardown()  # the client's own process writes in the background
    assert written.stat().st_size > 1000
    assert [step for step, _ in logged] == [line["round"] for line in lines(tmp_path)]
    assert all(
        set(found) >= set(values_of(x, 0.0))
        for (_, found), x in zip(logged, lines(tmp_path), strict=True)
    )


def test_trackio_has_every_round_and_a_resumed_run_is_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="needs trackio: pip install 'fedvlm[trackers]'")
    from trackio.sqlite_storage import SQLiteStorage

    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path, "report_to=[trackio]", callbacks=[Told(dies_in=1)])
    fedvlm.resume(tmp_path / "run")
    (name,) = SQLiteStorage.get_runs("fedvlm")
    found = {log["step"]: log for log in SQLiteStorage.get_logs("fedvlm", name)}
    assert list(found) == [line["round"] for line in lines(tmp_path)]
    for line in lines(tmp_path):
        for number, value in values_of(line, 0.0).items():
            if number != "seconds":
                assert found[line["round"]][number] == pytest.approx(value), number
    assert SQLiteStorage.get_run_config("fedvlm", name)["algorithm"]["name"] == "lora"
    (artifact,) = SQLiteStorage.list_artifacts("fedvlm")
    files = SQLiteStorage.get_artifact_manifest("fedvlm", artifact["name"], "latest")
    assert {"config.yaml", "table.csv"} <= {file["path"] for file in files["manifest"]}

"""One run in two real processes, by torchrun and gloo, has the results of one process."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import smallest
from fedvlm.algorithms.base import Visit
from fedvlm.engines.group import End
from fedvlm.engines.portable import pack, unpack
from fedvlm.engines.sharded import Outcome, ScorePart, TrainPart, parts
from fedvlm.engines.wire import Reply, Task
from fedvlm.errors import ConfigError, DataError
from fedvlm.models import load as loading
from fedvlm.models.shards import blocks_of
from fedvlm.rounds import federate
from fedvlm.rounds.results import Results
from fedvlm.settings.sections import ModelConfig
from fedvlm.store import files
from fedvlm.store import run as store
from test_cli import call

SETTINGS = (
    f"model.name={smallest.model()}",
    "data.scenes.sites=4",
    "data.scenes.rows=16",
    "partition.min_rows=4",
    "train.rounds=2",
    "train.local_steps=2",
    "train.batch_size=4",
    "eval.every=0",
    "eval.max_rows=2",
    "eval.max_new_tokens=3",
    "lora.rank=2",
    "engine.threads=1",
)
SAME_PASSES = (*SETTINGS, "algorithm.name=lora", "train.finish_steps=1", "engine.clients=1")
RUNS = {
    "plora": (*SETTINGS, "algorithm.name=plora", "train.optimizer=sgd"),
    # Passes of two clients and of one client: then process 0 has nothing to do.
    "odd": (*SAME_PASSES, "train.rounds=1", "train.clients_per_round=3"),
    # In two processes, each holds a share of the base. One gathers weights for the other.
    "shares": (*SAME_PASSES, "train.clients_per_round=3", "model.shard=true"),
}

# Process 1 dies in round 2, after it has written its clients' personal states.
KILLED = """
import os, signal, sys
from fedvlm.cli.app import main
from fedvlm.engines.shell import Shell

train = Shell.train

def dying(self, tasks, **part):
    for reply in train(self, tasks, **part):
        if os.environ["RANK"] == "1" and tasks[0].round == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield reply

Shell.train = dying
main()
"""

# Resumes the run above, does two more runs, and then one in which process 1 finds a mistake.
SEVERAL = """
import json, os, sys
import psutil
import fedvlm
from fedvlm.cli.app import main
from fedvlm.engines import shell
from fedvlm.models.spread import local

prepared = shell.Shell.__init__

def noted(self, model, *args):
    frozen = [local(p) for n, p in model.named_parameters() if ".lora_" not in n]
    print(f"process {os.environ['RANK']} holds:", sum(p.nbytes for p in frozen), flush=True)
    prepared(self, model, *args)

shell.Shell.__init__ = noted
killed, runs, failing = json.loads(sys.argv[1])
results = [fedvlm.resume(killed, report=False), *(fedvlm.run(None, *w, report=False) for w in runs)]
if os.environ["RANK"] == "1":
    print("as process 1 sees it:", json.dumps([r.scores() for r in results]))

    def fail(*_):
        listening = [c.laddr.ip for c in psutil.Process().net_connections("tcp") if not c.raddr]
        print("process 1 listens on:", json.dumps(sorted(set(listening))), flush=True)
        raise fedvlm.FedVLMError("client 'site-3' has a mistake")

    shell.check_finite = fail
sys.argv = ["fedvlm", "run", *failing]
main()
"""


@pytest.fixture(scope="module")
def launch(warm):
    """Runs a command in two processes. Returns the exit code, the output and the errors."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]

    def launched(*command):
        done = subprocess.run(
            [warm.python, *torchrun, warm.python, *map(str, command)],
            env=warm.env,
            capture_output=True,
            text=True,
            timeout=600,  # a guard against waiting for ever
        )
        return done.returncode, done.stdout, done.stderr

    return launched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs in one process: ``one/plora`` and ``one/odd``."""
    folder = tmp_path_factory.mktemp("sharded")
    for name, words in RUNS.items():
        federate.run(None, *words, f"output={folder / 'one' / name}")
    return folder


@pytest.fixture(scope="module")
def killed(folder, launch):
    """A run of two processes, one of which was killed."""
    script = folder / "killed.py"
    script.write_text(KILLED)
    code, _, errors = launch(script, "run", *RUNS["plora"], f"output={folder / 'killed'}")
    return folder / "killed", code, errors


@pytest.fixture(scope="module")
def two(folder, killed, launch):
    """Runs in two processes: ``two/plora``, ``two/odd``, and ``two/resumed`` after the kill."""
    script = folder / "several.py"
    script.write_text(SEVERAL)
    resumed = shutil.copytree(killed[0], folder / "two" / "resumed")
    runs = [(*words, f"output={folder / 'two' / name}") for name, words in RUNS.items()]
    failing = (*RUNS["shares"], f"output={folder / 'two' / 'failing'}")
    return launch(script, json.dumps([str(resumed), runs, failing]))


def tensors_of(folder):
    """The server's state, the clients' personal states and all exported adapters, by name."""
    trees = {str(p): files.load_tree(p) for p in folder.glob("server/*")}
    trees |= {p.parent.name: files.load_tree(p) for p in folder.glob("adapters/*/*.safetensors")}
    clients = list(json.loads((folder / "table.json").read_text())["folders"])
    trees |= dict(zip(clients, store.Store(folder).personal(clients), strict=True))
    whole = {f"{Path(k).name} {n}": t for k, tree in trees.items() for n, t in tree.items()}
    assert len(whole) > 100
    return whole


def assert_close(found, expected, atol):
    assert found.keys() == expected.keys()
    assert max((found[n] - t).abs().max().item() for n, t in expected.items()) <= atol


def assert_told_the_same(found, expected):
    """Files must be equal in order and text. Numbers may differ in their last digits."""

    def numbers(tree):
        if isinstance(tree, dict):
            return {k: numbers(v) for k, v in tree.items()}
        if isinstance(tree, list):
            return [numbers(v) for v in tree]
        return pytest.approx(tree, abs=1e-4) if isinstance(tree, float) else tree

    for name in ("metrics.jsonl", "answers/personal.jsonl", "answers/global.jsonl"):
        lines = files.read_lines(expected / name)
        assert [list(line) for line in files.read_lines(found / name)] == [list(a) for a in lines]
        assert files.read_lines(found / name) == numbers(lines), name
    assert Results.read(found).table == numbers(Results.read(expected).table)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "atol"), [("plora", 1e-6), ("odd", 0.0), ("shares", 0.0)])
def test_two_processes_train_what_one_trains(folder, two, name, atol):
    found, expected = folder / "two" / name, folder / "one" / name
    assert_close(tensors_of(found), tensors_of(expected), atol)
    assert_told_the_same(found, expected)
    environment = json.loads((found / "environment.json").read_text())
    assert environment["processes"] == 2


@pytest.mark.slow
def test_every_process_knows_the_results(folder, two):
    line = next(row for row in two[1].splitlines() if row.startswith("as process 1 sees it: "))
    names = ("resumed", *RUNS)
    expected = [federate.Results.read(folder / "two" / name).scores() for name in names]
    assert json.loads(line.partition(": ")[2]) == expected


@pytest.mark.slow
def test_each_of_two_processes_holds_half_of_the_weights_of_all_layers(folder, two):
    model = loading.load_model(ModelConfig(name=smallest.model())).model
    whole = sum(p.nbytes for p in model.parameters())
    blocks = sum(p.nbytes for block in blocks_of(model) for p in block.parameters())
    assert blocks > 0.9 * whole
    held = [
        [int(line.partition(": ")[2]) for line in two[1].splitlines() if line.startswith(begin)]
        for begin in ("process 0 holds: ", "process 1 holds: ")
    ]
    for own in held:  # the resumed run, then RUNS, then the run that fails
        assert own == [whole] * 3 + [whole - blocks // 2] * 2


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_goes_on(folder, killed, two):
    stopped, code, errors = killed
    assert code != 0
    assert "SIGKILL" in errors
    assert store.Store(stopped).finished() == 1, "the kill interrupted round 2"
    assert any(p.name.startswith("00002") for p in (stopped / "personal").iterdir())
    resumed, whole = tensors_of(folder / "two" / "resumed"), tensors_of(folder / "two" / "plora")
    assert_close(resumed, whole, 0.0)
    lines = [folder / "two" / name / "metrics.jsonl" for name in ("resumed", "plora")]
    assert lines[0].read_bytes() == lines[1].read_bytes()


@pytest.mark.slow
def test_one_process_goes_on_with_a_run_of_two(folder, killed):
    alone = shutil.copytree(killed[0], folder / "alone")
    federate.resume(alone)
    assert_close(tensors_of(alone), tensors_of(folder / "one" / "plora"), 1e-6)
    assert_told_the_same(alone, folder / "one" / "plora")


@pytest.mark.slow
def test_a_mistake_in_one_process_is_one_message_and_ends_all(folder, two):
    code, _, errors = two
    assert code != 0
    assert errors.count("error: client 'site-3' has a mistake") == 1
    assert "exitcode  : 2" in errors
    assert "process 0 of this run ended" not in errors
    assert store.Store(folder / "two" / "failing").finished() == 0


@pytest.mark.slow
def test_processes_of_one_machine_listen_on_the_loopback_interface_only(two):
    line = next(row for row in two[1].splitlines() if row.startswith("process 1 listens on: "))
    assert set(json.loads(line.partition(": ")[2])) in ({"127.0.0.1"}, {"127.0.0.1", "::1"})


def test_a_mistake_that_all_processes_find_is_printed_once(launch):
    code, output, errors = launch("-m", "fedvlm", "run", "train.round=3")
    said = "error: the configuration has a problem"
    assert code != 0
    assert (errors.count("error: "), errors.count(said), output) == (1, 1, "")
    assert "exitcode  : 2" in errors


def test_a_command_for_one_process_is_refused_in_several(capsys, monkeypatch):
    started = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    code, output, errors = call(capsys, monkeypatch, "compare", "plora,lora")
    assert (code, output) == (2, "")
    assert errors.startswith("error: 'fedvlm compare' works in one process, but 2 were started")


def test_a_message_arrives_as_it_was_and_no_tensor_travels_twice():
    shared = torch.randn(3, 5)[1]
    message = {
        "trees": [{"a": shared, "b": torch.tensor(2.5, dtype=torch.bfloat16)}, {"a": shared}],
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.empty(0, 4),
        "numbers": (torch.arange(3), {"loss": 0.1}),
    }
    head, body = pack(message)
    assert len(body) == 5 * 4 + 2 + 3 + 3 * 8
    found = unpack(head, body)
    assert found["trees"][0]["a"] is found["trees"][1]["a"]
    assert torch.equal(found["trees"][0]["a"], shared)
    assert found["trees"][0]["b"].dtype == torch.bfloat16
    assert found["nothing"].shape == (0, 4)
    assert found["mask"].tolist() == [True, False, True]
    assert found["numbers"][0].tolist() == [0, 1, 2]
    assert found["numbers"][1] == {"loss": 0.1}


def test_every_message_of_a_run_travels_without_pickle():
    visit, tensor = Visit("site-0", 8.0, 0.5, 3, True), torch.tensor(1.5)
    orders = [
        TrainPart(3, (Task(visit, {"a": tensor}, rated=True),), 2, fresh=True),
        ScorePart([("site-0", {"a": tensor}), ("site-1", None)], texts=False),
        Outcome([Reply("site-0", {"a": tensor}, 8.0, float("nan"), 2, 16)]),
        Outcome({"site-0": {"loss": np.float32(0.5), "examples": np.int64(3)}}),
        Outcome({"site-0": [{"row": 1, "group": None, "reference": "ä", "weight": 1.0}]}),
        End(),
    ]
    for order in orders:
        assert repr(unpack(*pack(order))) == repr(order).replace("np.float32(0.5)", "0.5").replace(
            "np.int64(3)", "3"
        )
    for error in (ConfigError(["a: b", "c: d"]), DataError("no rows"), RuntimeError("x")):
        found = unpack(*pack(Outcome(error=error))).error
        assert (type(found), str(found)) == (type(error), str(error))
    with pytest.raises(TypeError, match="of type PosixPath does not travel"):
        pack({"a": Path("x")})


@pytest.mark.parametrize(
    "structure",
    [{"is": ["Popen", "touch x"]}, {"error": ["SystemExit", "1"]}, {"tensor": 7}, {"set": []}],
)
def test_bytes_of_a_stranger_become_no_other_object(structure):
    head = torch.frombuffer(bytearray(json.dumps([[], structure]).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="no message of another process"):
        unpack(head, torch.empty(0, dtype=torch.uint8))


def test_no_file_of_the_package_unpickles_what_others_wrote():
    """One use is left: a copy of a table of this process, which opens the table's files again."""
    users = {
        file.name
        for file in Path(loading.__file__).parents[1].rglob("*.py")
        if re.search(r"import pickle|torch\.load\b|\w_object(_list)?\(", file.read_text())
    }
    assert users == {"images.py"}


@pytest.mark.parametrize("count", [0, 1, 5, 16, 33])
def test_parts_are_neighbours_and_as_equal_as_can_be(count):
    split = parts(list(range(count)), 4)
    assert [n for part in split for n in part] == list(range(count))
    sizes = [len(part) for part in split]
    assert len(sizes) == 4
    assert max(sizes) - min(sizes) <= 1


def test_processes_of_a_machine_have_a_gpu_each(monkeypatch):
    taken = []
    started = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in (started | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert loading.pick_device("auto") == torch.device("cuda:3") == taken[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert loading.pick_device("cuda") == torch.device("cuda:1")

"""Messages whose heads are long: they are refused before they are parsed."""

import json
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fedvlm.deploy import frames
from fedvlm.deploy.remote import Remote
from fedvlm.deploy.unanswered import Unanswered
from fedvlm.deploy.worker import Worker
from fedvlm.errors import FedVLMError
from fedvlm.tree import HEAD, read

MEASURED = """
import json
from fedvlm.deploy import frames
from fedvlm.tree import HEAD, read

def long(size):
    one = '"%08d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    text = "{" + "".join(one % n for n in range(size // 60))[:-1] + "}"
    return len(text).to_bytes(8, "little") + text.encode()

def nested(size):
    return '{"a":[' + ",".join(["[[]]"] * (size // 5 - 4)) + "]}"

def highest():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 2**10

def measure(made, reading):
    open("/proc/self/clear_refs", "w").write("5")  # the highest memory begins anew
    before, told = highest(), "read"
    try:
        kept = reading(made)
    except Exception:
        told = "refused"
    return told, highest() - before

read(long(1000))  # imports torch
tensors = [measure(long(size), read) for size in (2**26, HEAD - 2**16)]
headers = [measure(nested(size), frames.parsed) for size in (2**26, frames.HEADER - 2**10)]
print(json.dumps([*tensors, *headers]))
"""


def head_of(length):
    return length.to_bytes(8, "little") + b"{"


def test_a_long_head_of_tensors_is_refused_at_both_ends(tmp_path):
    long = head_of(HEAD + 1) + bytes(HEAD)
    with pytest.raises(FedVLMError, match=f"a head of {HEAD + 1} bytes .* {HEAD} are the most"):
        read(long)
    with pytest.raises(Unanswered, match="a head of"):
        Remote(lambda *_: ({}, b""), ["a"])._read(long)
    worker = Worker({"name": "a", "data": "rows", "state": str(tmp_path)})
    worker.site = SimpleNamespace(private=False)
    answer, _ = worker.perform({"do": "train", "round": 1, "sampled": 1.0}, long)
    assert f"a head of {HEAD + 1} bytes" in answer["message"]


def test_tensors_of_an_honest_size_are_read_and_other_bytes_are_refused():
    import torch
    from safetensors.torch import save

    tree = {f"{'name.' * 20}{n}": torch.zeros(1) for n in range(10_000)}
    assert read(save(tree)).keys() == tree.keys()
    assert read(b"") == {}
    with pytest.raises(FedVLMError, match="no safetensors file"):
        read(b"12345678" * 9)


def test_a_long_header_is_refused_by_the_receiver_whoever_sent_it():
    text = json.dumps({"a": "x" * frames.HEADER})
    with pytest.raises(frames.NoMessage, match=f"and {frames.HEADER} are the most"):
        frames.parsed(text)
    for wrong, why in (("[1]", "no mapping"), ("{", "no JSON"), ("[" * 10**5, "no JSON")):
        with pytest.raises(frames.NoMessage, match=why):
            frames.parsed(wrong)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frames._SIZES.pack(frames.HEADER + 1, 0))
        with pytest.raises(frames.Closed, match="this is no message"):
            frames.receive(theirs, 5.0)


@pytest.mark.skipif(sys.platform != "linux", reason="the highest memory is read from /proc")
def test_a_message_takes_little_memory_whatever_its_head_is():
    command = [sys.executable, "-c", MEASURED]
    done = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (told, tensors), (read_, most), (said, header), (parsed, largest) = json.loads(done)
    assert (told, said) == ("refused", "refused")
    assert max(tensors, header) < 8, "MiB for 64 MiB, which would take 1.2 GiB when parsed"
    assert (read_, parsed) == ("read", "read")
    assert max(most, largest) < 130, "MiB for the longest that is read"

"""Faults of a site whose processes have this folder on their path. The site's name selects one.

Python imports this file when it starts. It changes the requests and answers of a site's worker
process, at the socket to its supervisor. The owner of the machine could do the same.
"""

import json
import os
import signal
import sys

SITE = json.loads(os.environ.get("FEDVLM_SITE", "{}"))
STOPPED, FULL = 2, 3  # the rounds in which a worker stops, and in which a disk is full


def stop():
    """Stops this process when it begins a round. The process after it does not stop."""
    mark = os.path.join(SITE["state"], "stopped")
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)


def fill():
    """Fills the disk of the site's state."""
    with open(os.path.join(SITE["state"], "filler"), "ab", buffering=0) as file:
        for size in (2**20, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def changed(change):
    """Returns a lie that changes every name and tensor of a safetensors file."""

    def lie(header, blob):
        from safetensors.torch import load, save

        return header, save(dict(change(*item) for item in load(blob).items()))

    return lie


LIES = {
    1: changed(lambda name, tensor: (name, tensor * float("nan"))),
    2: lambda header, blob: (header, b"\x80\x04" + blob[2:]),
    3: changed(lambda name, tensor: (name, tensor[:-1].contiguous())),
    4: lambda header, blob: (header, blob + bytes(2**20)),
    5: changed(lambda name, tensor: (name.replace("lora_B", "lora_C"), tensor)),
    6: lambda header, blob: (header | {"loss": float("nan")}, blob),
    7: lambda header, blob: (header, blob + bytes(2**24)),
}
"""Round -> the function by which the liar changes its worker's answer."""


def install():
    from fedvlm.deploy import frames

    receive, send, asked = frames.receive, frames.send, {}

    def receiving(sock, limit=None):
        header, blob = receive(sock, limit)
        asked.update({"round": 0} | header)
        if (SITE["name"], header["do"], header.get("round")) == ("slow", "train", STOPPED):
            stop()
        if (SITE["name"], header["do"], header.get("round")) == ("full", "train", FULL):
            fill()
        return header, blob

    def sending(sock, header, blob=b"", limit=None):
        if SITE["name"] == "liar" and "error" not in header:
            if asked["do"] == "train":
                header, blob = LIES[asked["round"]](header, blob)
            elif asked["do"] == "score":
                header = header | {"scores": {"done": 1.0}}
        send(sock, header, blob, limit)

    frames.receive, frames.send = receiving, sending


if "fedvlm.deploy.worker" in sys.orig_argv:
    install()

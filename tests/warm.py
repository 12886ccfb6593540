"""Python whose imports are done: a process forks for every command, as ``python`` would run it.

    python -S warm.py -m fedvlm run          # as `python -m fedvlm run`, without seconds of imports
    python warm.py serve SOCKET FILE         # the process that forks, until its last lease ends;
                                             # FILE is the number of the first lease's socket

The first form sends its words, folder, environment, input and outputs to the process that listens
at ``$WARM_PYTHON``. It ends as the fork ends, by its exit code or its signal. If it is killed, so
is the fork.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
from typing import NoReturn

PASSED = (signal.SIGINT, signal.SIGTERM)


def ask(address: str, words: list[str], env: dict[str, str], files: list[int]) -> socket.socket:
    """Asks for a command. The answer has its process id in one line and its end in another."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(address)
    text = json.dumps([words, os.getcwd(), env]).encode()
    socket.send_fds(line, [len(text).to_bytes(8, "big")], files)
    line.sendall(text)
    return line


def client(words: list[str]) -> NoReturn:
    """Stands for a command: passes its input, outputs, signals and end on."""
    line = ask(os.environ["WARM_PYTHON"], words, dict(os.environ), [0, 1, 2])
    for number in PASSED:
        signal.signal(number, lambda n, _: line.sendall(bytes([n])))
    with line.makefile("r") as answer:
        answer.readline()
        code = int(answer.readline() or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)


def serve(address: str, first: int) -> None:
    """Imports what commands need, and forks for every command, until no lease is left."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.idefics3.modeling_idefics3  # noqa: F401

    import fedvlm.cli.live
    import fedvlm.cli.tables
    import fedvlm.engines.cohort
    import fedvlm.figures.plots  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch a command
    here = socket.socket(socket.AF_UNIX)
    here.bind(address)
    here.listen(64)
    leases = [socket.socket(fileno=first)]
    leases[0].sendall(b"leased\n")
    while True:
        for ready in select.select([here, *leases], [], [])[0]:
            if ready is not here:
                leases.remove(ready)
                if not leases:
                    os._exit(0)
                continue
            line, _ = here.accept()
            head, files, _, _ = socket.recv_fds(line, 8, 8)
            if not files:
                leases.append(line)
                line.sendall(b"leased\n")
            elif os.fork() == 0:
                here.close()
                for lease in leases:
                    lease.close()
                _watch(line, int.from_bytes(head, "big"), files)
            for file in files:
                os.close(file)
            if files:
                line.close()


def _watch(line: socket.socket, size: int, files: list[int]) -> None:
    """Runs a command in a fork, and reports its end. Returns in the fork of the command only."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    words, folder, env = json.loads(line.recv(size, socket.MSG_WAITALL))
    if (command := os.fork()) == 0:
        line.close()
        _command(words, folder, env, files)
    for file in files:
        os.close(file)
    line.sendall(f"{command}\n".encode())
    threading.Thread(target=_pass_on, args=(line, command), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
    try:
        line.sendall(f"{code}\n".encode())
    finally:
        os._exit(0)


def _pass_on(line: socket.socket, command: int) -> None:
    """Passes signals to a command, and kills it when nobody listens any more."""
    while number := line.recv(1):
        os.kill(command, number[0])
    os.kill(command, signal.SIGKILL)


def _command(words: list[str], folder: str, env: dict[str, str], files: list[int]) -> NoReturn:
    """Runs a command as ``python`` does: a module (-m) or a file."""
    import importlib
    import runpy

    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, errors="backslashreplace", buffering=1)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = ["", *(path for path in paths if path and path not in sys.path)]
    importlib.invalidate_caches()
    if torch := sys.modules.get("torch"):  # makes its threads anew, before several may ask for them
        torch.set_num_threads(torch.get_num_threads())
    code = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Ends a command as the interpreter does: waits for threads, runs what was registered."""
    import atexit

    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        client(sys.argv[1:])

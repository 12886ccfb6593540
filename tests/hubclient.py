"""A process whose clients of the hub know one hub and one cache, for several commands.

The clients read ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` when they are imported, and
imports take seconds. So a process stays for all commands of a hub.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

LOADS = """
import json, sys
from fedvlm.config import load
from fedvlm.data.sources import load_rows
from fedvlm.models.load import load_model, mark_of
config = load(None, *sys.argv[1:])
rows = load_rows(config.data)
load_model(config.model)
print(json.dumps([mark_of(config.model), len(rows)]))
"""


class Client:
    """The process. Used as a context, it ends with it.

    Args:
        env: the environment of the clients, see ``Hub.env``.
        folder: the working folder.
    """

    def __init__(self, env: dict[str, str], folder: Path):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
            cwd=folder,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate()

    def __call__(self, *words: object, token: str = "") -> tuple[int, str, str]:
        """Runs ``fedvlm`` with these words; returns its exit code, its output and its errors."""
        return self._ask([*map(str, words)], "", token)

    def code(self, text: str, *words: object, token: str = "") -> str:
        """Runs Python code; returns what it prints."""
        code, out, errors = self._ask([*map(str, words)], text, token)
        assert code == 0, errors
        return out

    def loads(self, *settings: str, token: str = "") -> tuple[str, int]:
        """Loads the model and the rows of some settings; returns its mark and their number."""
        mark, rows = json.loads(self.code(LOADS, *settings, token=token))
        return mark, rows

    def _ask(self, words: list[str], code: str, token: str) -> tuple[int, str, str]:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([words, code, token]) + "\n")
        stdin.flush()
        return tuple(json.loads(stdout.readline()))


def serve() -> None:
    """Runs one command for each line of the input, and writes a line about its end."""
    from fedvlm.cli.app import main

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        words, code, os.environ["HF_TOKEN"] = json.loads(line)
        sys.argv, ended, out, errors = ["fedvlm", *words], 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                exec(code, {"__name__": "__main__"}) if code else main()
            except SystemExit as stop:
                ended = stop.code or 0
            except Exception:
                traceback.print_exc()
                ended = 1
        answers.write(json.dumps([ended, out.getvalue(), errors.getvalue()]) + "\n")


if __name__ == "__main__":
    serve()

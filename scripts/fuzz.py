"""Feeds damaged input to fedvlm: configurations, pictures, data files, run folders, messages.

    python scripts/fuzz.py --seconds 600 --seed 0
    python scripts/fuzz.py --kinds config,pictures
    python scripts/fuzz.py --repeat pictures:1234       # one trial, with its traceback

A trial depends on its kind and its number only. Each trial ends as one of:

- `clear`: an error for users, short and without control characters
- `same`: the input is taken, and the result is right as far as an oracle knows
- `wrong`: the input is taken, but the result is wrong; or the message of an error is
- `traceback`: any other exception, or the end of the interpreter
- `hang`: more than LIMIT seconds
- `memory`: more than ROOM bytes

Trials run in other processes. The last line counts them. Failures stand above with their repeat.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

LIMIT = 20  # seconds of a trial
START = 60  # seconds in which the first process of a kind has to start
ROOM = 6 * 2**30  # bytes of address space above that of the imports
BATCH = 400  # trials of a process, which is then replaced
OUTCOMES = ("clear", "same", "traceback", "wrong", "hang", "memory")
SHOWN = 40  # failures that are printed


class Hang(BaseException):
    """The trial took too long."""


def outcome(kind: str, number: int, folder: Path) -> tuple[str, str]:
    """Runs one trial in this process: its outcome, and a line about it."""
    import fuzz_damage
    import fuzz_kinds
    from fedvlm.deploy.frames import Closed
    from fedvlm.errors import MOST, FedVLMError

    def late(*_: object) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        fuzz_kinds.KINDS[kind](random.Random(f"{kind}:{number}"), folder)
    except FedVLMError as error:
        text = str(error)
        if len(text) > MOST or not text.replace("\n", "").isprintable():
            return "wrong", f"a message of {len(text)} characters: {text[:100]!r}"
        return "clear", text.partition("\n")[0][:200]
    except (Closed, TimeoutError) as error:  # which frames.py documents
        return "clear", f"{type(error).__name__}: {error}"[:200]
    except fuzz_damage.Wrong as error:
        return "wrong", str(error)[:300]
    except Hang:
        return "hang", f"more than {LIMIT} s"
    except MemoryError:
        return "memory", traceback.format_exc(limit=-2)[-300:]
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/fedvlm/" in f.filename]
        place = own[-1] if own else last
        at = f"{Path(place.filename).name}:{place.lineno}"
        return "traceback", f"{at}: {type(error).__name__}: {error}"[:300].replace("\n", " ")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "same", ""


def work(kind: str, begin: int, count: int, folder: Path) -> None:
    """The child process: a line of JSON before and after each trial."""
    import fuzz_kinds

    fuzz_kinds.warm(kind, folder)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a trial prints is not read
    os.dup2(1, 2)
    for number in range(begin, begin + count):
        print(json.dumps({"begin": number}), file=out)
        end, text = outcome(kind, number, folder)
        print(json.dumps({"number": number, "end": end, "text": text}), file=out)


class Batch:
    """A child process that runs the trials of one kind from a number on."""

    def __init__(self, kind: str, begin: int, folder: Path):
        self.kind, self.begin, self.now = kind, begin, begin
        self.lines: queue.Queue[str | None] = queue.Queue()
        command = [sys.executable, __file__, "--work", kind, str(begin), str(folder)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.put(line)
        self.lines.put(None)

    def started(self) -> float:
        """Waits for the first trial, at most START seconds; returns the seconds that it took."""
        began = time.monotonic()
        while self.lines.empty() and time.monotonic() - began < START:
            time.sleep(0.05)
        return time.monotonic() - began

    def results(self, until: float):
        """Yields (number, outcome, text) until the time is over or the process ends."""
        running = False
        while (left := until - time.monotonic()) > 0:
            try:
                line = self.lines.get(timeout=min(left, 3 * LIMIT))
            except queue.Empty:
                if left > 3 * LIMIT and running:  # not even the alarm ends the trial
                    yield self.now, "hang", "the process had to be killed"
                break
            if line is None:
                if running or self.now == self.begin:
                    yield self.now, "traceback", f"the process ended: {self.process.wait()}"
                break
            told = json.loads(line)
            running = "begin" in told
            self.now = told["begin"] if running else told["number"]
            if not running:
                yield self.now, told["end"], told["text"]
        self.process.kill()
        self.process.wait()


def fuzz(kinds: list[str], seed: int, seconds: float, folder: Path) -> collections.Counter[str]:
    """Gives each kind its share of the time; prints the failures, one for each text."""
    counts: collections.Counter[str] = collections.Counter()
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
    end = time.monotonic() + seconds
    for position, kind in enumerate(kinds):
        share = (end - time.monotonic()) / (len(kinds) - position)
        until, begin, own = time.monotonic() + share, seed * 10**6, collections.Counter()
        while time.monotonic() < until:
            batch = Batch(kind, begin, folder)
            if begin == seed * 10**6:  # imports are no trials, and slow on a busy machine
                late = batch.started()
                until, end = until + late, end + late
            for number, found, text in batch.results(until):
                own[found] += 1
                if found not in ("clear", "same"):
                    place = kind, found, ": ".join(text.split(": ")[:2])[:80]
                    seen[place] += 1
                    if seen[place] == 1 and len(seen) <= SHOWN:
                        print(f"{found}: {text}\n    --repeat {kind}:{number}", flush=True)
                begin = number + 1
        print(f"{kind}: " + ", ".join(f"{own[o]} {o}" for o in OUTCOMES), flush=True)
        counts += own
    return counts


def last_line(counts: collections.Counter[str]) -> str:
    """The counts of all trials."""
    return (
        f"tried {counts.total()}, clear errors {counts['clear']}, same result {counts['same']}, "
        f"tracebacks {counts['traceback']}, accepted wrongly {counts['wrong']}, "
        f"hangs {counts['hang']}, out of memory {counts['memory']}"
    )


def main() -> int:
    """Parses the options; 1 if a trial failed."""
    if sys.argv[1:2] == ["--work"]:
        kind, begin, folder = sys.argv[2:5]
        work(kind, int(begin), BATCH, Path(folder))
        return 0
    import fuzz_kinds

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(fuzz_kinds.KINDS))
    parser.add_argument("--repeat", metavar="KIND:NUMBER")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    if options.repeat:
        kinds = [options.repeat.partition(":")[0]]
    if unknown := sorted(set(kinds) - set(fuzz_kinds.KINDS)):
        parser.error(f"there is no kind {unknown[0]}; there are {', '.join(fuzz_kinds.KINDS)}")
    with tempfile.TemporaryDirectory(prefix="fedvlm-fuzz-") as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        fuzz_kinds.make(kinds, folder)
        if options.repeat:
            number = int(options.repeat.partition(":")[2])
            fuzz_kinds.warm(kinds[0], folder)
            fuzz_kinds.KINDS[kinds[0]](random.Random(f"{kinds[0]}:{number}"), folder)
            print("same")
            return 0
        counts = fuzz(kinds, options.seed, options.seconds, folder)
    print(last_line(counts))
    return int(any(counts[o] for o in OUTCOMES[2:]))


if __name__ == "__main__":
    sys.exit(main())

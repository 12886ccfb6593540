"""Bars of progress: whatever they show fits 80 columns, and texts are no markup."""

import io

import pytest
from rich.console import Console

from fedvlm.cli import board as boards
from fedvlm.cli.bars import bars, named, noted
from fedvlm.config import load


@pytest.mark.parametrize("name", ["auto", "a-very-long-algorithm-name-seed-12", "[red]x[/]"])
@pytest.mark.parametrize("note", ["", "personal 100%, global 100%", "site-" + 90 * "0"])
def test_a_line_fits_80_columns_with_its_whole_name_and_times(name, note):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    shown = bars(console)
    shown.add_task(named(name), total=9999, completed=9999, note=noted(note))
    with console.capture() as found:
        console.print(shown.make_tasks_table(shown.tasks))
    (line,) = found.get().rstrip("\n").split("\n")
    assert len(line) <= 80
    assert line.startswith(named(name))
    assert noted(note) in line
    assert line.rstrip().endswith("0:00:00 --:--")


def test_the_bar_of_all_runs_ends_when_all_rounds_are_done(monkeypatch):
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    made = []
    monkeypatch.setattr(boards.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(boards, "bars", lambda: made.append(bars(console)) or made[0])
    runs = {name: load({"train": {"rounds": 2}}) for name in ("a", "b")}
    with boards.board(runs, quiet=False) as tell:
        for name in runs:
            for number in range(4):  # the last line is the average of the end
                scores = {"c": {"exact_match": 0.5}} if number in (0, 3) else {}
                found = {"personal": scores, "global": scores} if scores else None
                tell((name, {"round": number, "evaluation": found}, 1.0))
    every, *each = made[0].tasks
    assert (every.completed, every.total) == (6, 6)
    assert [task.fields["note"] for task in each] == 2 * ["personal 50%, global 50%"]

"""The spending ledger of a site: what all runs under differential privacy have spent, and on what.

It is written ahead: a line is on the disk before a step is trained. There are no refunds, and
nothing else of a run can change the ledger. So a process that is killed at any moment leaves at
least as much in the ledger as has left the site. In ``STATE/spending``::

    ledger.jsonl   the lines, each linked to the one before; 'fedvlm audit-log verify' checks them
    head.json      the newest line: shows that no line at the end is missing
    rows/          the marks of the rows and units of a run, one file for each set
    secret         the site's key of the marks

**Marks.** A run has a mark for each picture of the training rows, and one for each unit with a
value, 16 bytes each. A mark is a keyed digest and says nothing without the secret. Two runs *meet*
if they have a mark in common. What they spend then adds up, because they may have a unit in common.
All runs with a unit have a mark of it, so they all meet. Runs that do not meet have no unit in
common, and the larger of their epsilons holds for both. Runs may meet without a common unit, such
as two runs on different questions about one picture: then the sum is too large, never too small.
A picture that was encoded anew is another picture.

**A torn line**, the rest of a line that a process did not finish, is no proof that nothing was
trained. It counts as the costliest round of every run that is named before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from fedvlm.data.groups import each_picture
from fedvlm.data.labels import values_of
from fedvlm.deploy import auditlog
from fedvlm.deploy.auditlog import NONE, AuditLog
from fedvlm.errors import shown
from fedvlm.privacy import accountant
from fedvlm.privacy.accountant import Spend
from fedvlm.store import sealed
from fedvlm.store.files import only_one, sync, write_bytes

FOLDER = "spending"
LEDGER, HEAD, ROWS, SECRET = "ledger.jsonl", "head.json", "rows", "secret"
MARK = 16  # bytes of a mark
PATIENCE = 60.0  # seconds to wait for another process that reads or writes the ledger
LONGEST = 200  # characters of a unit's name in the ledger

Marks = frozenset[bytes]


@dataclass(frozen=True)
class Claim:
    """A run as it began: what it may spend in a round.

    Attributes:
        run: the number of the run.
        rows: the name of its marks.
        unit: the protected unit: ``row`` or a column.
        spend: the most that one round spends.
        delta: of the run's own guarantee.
        budget: its largest epsilon.
    """

    run: str
    rows: str
    unit: str
    spend: Spend
    delta: float
    budget: float


@dataclass(frozen=True)
class Charge:
    """Steps that may have been trained.

    Attributes:
        claim: the run.
        round: the round; 0 for a torn line, which may be of any round.
        spend: the steps.
    """

    claim: Claim
    round: int
    spend: Spend


class Log(AuditLog):
    """The lines of the ledger."""

    kind = "ledger of differential privacy"


class Spending:
    """The ledger of a site. Every method but :meth:`locked` needs the lock.

    Args:
        state: the folder of the site's state.
    """

    def __init__(self, state: str | Path):
        self.folder = Path(state) / FOLDER
        self.path = self.folder / LEDGER
        self._claims: list[Claim] = []
        self._charges: list[Charge] = []
        self._at, self._last, self._hashes = 0, NONE, {NONE}  # of the lines that were read

    @property
    def begun(self) -> bool:
        """Whether the site has a ledger."""
        return any((self.folder / name).exists() for name in (LEDGER, HEAD, SECRET))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from reading and writing the ledger. Makes its folder."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sync(self.folder.parent)
        with only_one(self.folder, "another process has the ledger: try again", PATIENCE):
            yield

    # -- marks

    def marks(self, rows: Any, chosen: np.ndarray, column: str | None) -> Marks:
        """The marks of some rows.

        Args:
            rows: from :func:`fedvlm.data.sources.load_rows`.
            chosen: positions of the training rows.
            column: rows with equal values in it are one unit; None: every row is one.
        """
        secret = self._secret()
        pictures = each_picture(rows)
        texts = {text for row in chosen.tolist() for text in pictures[row]}
        found = {_mark(secret, "picture", text) for text in texts}
        if column is not None:
            values = values_of(rows, column)[chosen]
            found |= {_mark(secret, "unit", value) for value in values if value}
        return frozenset(found)

    def keep(self, marks: Marks) -> str:
        """Writes marks to the disk, and returns their name, a digest."""
        content = b"".join(sorted(marks))
        name = sealed.blake(content)
        path = self.folder / ROWS / name
        if not path.exists():
            write_bytes(path, content)
            sync(self.folder)
        return name

    def kept(self, name: str) -> Marks:
        """The marks with a name.

        Raises:
            FedVLMError: the file is missing or damaged.
        """
        path = self.folder / ROWS / name
        sealed.check(path.parent, {path.name: name})
        content = path.read_bytes()
        return frozenset(content[at : at + MARK] for at in range(0, len(content), MARK))

    def _secret(self) -> bytes:
        path = self.folder / SECRET
        if not path.exists() and not self.path.exists():
            write_bytes(path, os.urandom(32))
        try:
            return path.read_bytes()
        except OSError as error:
            raise sealed.unreadable(path, error) from error

    # -- lines

    def charges(self) -> list[Charge]:
        """All charges, the oldest first.

        Raises:
            FedVLMError: the ledger is damaged, or lines are missing.
        """
        rest = self._read()
        return self._charges + (self._torn() if rest else [])

    def claims(self) -> list[Claim]:
        """All runs as they began, the oldest first; a run that began anew has several."""
        self._read()
        return list(self._claims)

    def begin(self, claim: Claim) -> None:
        """Notes a run, unless the last line about it is the same."""
        known = [one for one in self.claims() if one.run == claim.run]
        if known[-1:] != [claim]:
            about = {"epsilon": claim.budget, "delta": claim.delta}
            self._note("run", claim, claim.spend, **about)

    def charge(self, claim: Claim, round_: int, down: str, spend: Spend) -> None:
        """Notes steps that are about to be trained. They are on the disk when the call returns.

        Args:
            claim: the run, which has begun.
            round_: the round.
            down: the digest of the download.
            spend: the steps.
        """
        self._note("spend", claim, spend, round=round_, down=down)

    def _note(self, event: str, claim: Claim, spend: Spend, **facts: Any) -> None:
        log = Log(self.path, key=sealed.blake(self._secret()))
        named = {"run": claim.run, "rows": claim.rows, "unit": claim.unit}
        steps = {"rate": spend.rate, "noise": spend.noise, "steps": spend.steps}
        last = log.note(event, **named, **facts, **steps)
        sync(self.folder)  # the name of the file, if a process was killed before it synced it
        sealed.write(self.folder / HEAD, {"last": last})

    def _read(self) -> bool:
        """Reads and checks the lines since the last call; whether an unfinished line follows."""
        head = sealed.read(self.folder / HEAD)["last"] if (self.folder / HEAD).exists() else NONE
        if not self.path.exists():
            if head != NONE:
                raise sealed.damaged(self.path, "it is missing, and runs were noted in it")
            return False
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._at:
                raise sealed.damaged(self.path, "lines at its end are missing")
            file.seek(self._at)
            for line, mark in auditlog.read(
                file, str(self.path), len(self._hashes) - 1, self._last
            ):
                self._take(line)
                self._last = mark
                self._hashes.add(mark)
            self._at = file.tell()
            rest = file.read()
        if head not in self._hashes:
            raise sealed.damaged(self.path, "lines at its end are missing")
        return bool(rest)

    def _take(self, line: dict[str, Any]) -> None:
        event = line["event"]
        if not line["n"] and line.get("key") != sealed.blake(self._secret()):
            raise sealed.damaged(self.folder / SECRET, "it is not the key of this ledger")
        if event == "run":
            named = line["run"], line["rows"], line["unit"]
            self._claims.append(Claim(*named, _spend(line), line["delta"], line["epsilon"]))
        elif event == "spend":
            self._charges.append(Charge(self._claim(line), line["round"], _spend(line)))
        elif event == "torn":
            self._charges += self._torn()

    def _claim(self, line: dict[str, Any]) -> Claim:
        """The run of a charge, as it began last."""
        named = line["run"], line["rows"], line["unit"]
        return next(c for c in reversed(self._claims) if (c.run, c.rows, c.unit) == named)

    def _torn(self) -> list[Charge]:
        """What an unfinished line counts as."""
        latest = {(c.run, c.rows, c.unit): c for c in self._claims}
        return [Charge(claim, 0, claim.spend) for claim in latest.values()]

    # -- sums

    def meeting(self, marks: Marks, charges: Sequence[Charge]) -> list[Charge]:
        """The charges of the runs that have a mark in common with ``marks``."""
        meets = {
            name: not marks.isdisjoint(self.kept(name)) for name in {c.claim.rows for c in charges}
        }
        return [charge for charge in charges if meets[charge.claim.rows]]


def spent(charges: Iterable[Charge], delta: float) -> float:
    """The epsilon at ``delta`` of some charges together.

    Raises:
        ConfigError: the accountant's library is missing.
    """
    accountant.check_installed()
    return accountant.epsilon((charge.spend for charge in charges), delta)


def _mark(secret: bytes, kind: str, value: str) -> bytes:
    return blake2b(f"{kind}:{value}".encode(), digest_size=MARK, key=secret).digest()


def named(unit: str | None) -> str:
    """The name of a unit as the ledger has it."""
    return shown(unit or "row", LONGEST, quotes=False)


def _spend(line: dict[str, Any]) -> Spend:
    return Spend(line["rate"], line["noise"], line["steps"])

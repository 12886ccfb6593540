"""A site's part in the secure sums of a run.

The site trains, and sends its fresh keys in place of the upload. Four more steps follow, see
:mod:`fedvlm.privacy.blind`. ``STATE/blind/RUN.json`` has the newest round whose masked
upload has left the site. That round is over for the site: the same upload under other masks, in a
sum of other sites, would make the difference of two sums one upload. The file outlives the run:
``fedvlm site erase --run RUN`` keeps it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedvlm.deploy import limits, peers
from fedvlm.deploy.digests import sha256
from fedvlm.deploy.frames import Message
from fedvlm.deploy.limits import Refused, scaled
from fedvlm.deploy.sitestore import Version, on_a_full_disk
from fedvlm.deploy.statefolder import SUMS
from fedvlm.engines.blinded import encoded
from fedvlm.engines.summand import Summand
from fedvlm.errors import FedVLMError
from fedvlm.metrics import rounded
from fedvlm.store import sealed
from fedvlm.tree import Tree

if TYPE_CHECKING:
    from fedvlm.deploy.site import Site
    from fedvlm.privacy.blind.client import Client


class Journal:
    """What a site has sent in secure sums of a run, on disk before it is sent.

    Args:
        state: the site's state folder.
        run: the run's name.
    """

    def __init__(self, state: str | Path, run: str):
        self._path = Path(state) / SUMS / f"{run}.json"

    def check(self, round_: int) -> None:
        """Refuses a round whose masked upload has left the site, and earlier rounds.

        Raises:
            Refused: the round is over for this site.
        """
        known = sealed.read(self._path) if self._path.exists() else {"round": 0}
        if round_ <= known["round"]:
            raise Refused(
                f"the part of this site in round {known['round']} is over, and no upload leaves "
                f"under two masks: round {round_} is over here too; go on with the next round"
            )

    def note(self, round_: int, attempt: int, fact: str) -> None:
        """Writes a fact about an attempt at a round."""
        with on_a_full_disk(round_):
            self._path.parent.mkdir(exist_ok=True, mode=0o700)
            sealed.write(self._path, {"round": round_, "attempt": attempt, "fact": fact})


class Part:
    """A site's part in the secure sums of a run.

    Args:
        site: the client of the run.
        state: the site's state folder, which has its long-lived key.
        run: the name of the run.
        config: the digest of the run's configuration as the server sent it.
    """

    def __init__(self, site: Site, state: str, run: str, config: str):
        self.site, self._run, self._config = site, run, config
        self.identity = peers.identity(state, site.name)
        self.pins = peers.pins(site.policy)
        self.journal = Journal(state, site.folder.name)
        self._client: Client | None = None
        self._values: tuple[Any, float] = (None, 0.0)

    def check(self, round_: int, asked: dict[str, Any]) -> None:
        """Refuses a round before it is trained; see :meth:`Journal.check`."""
        self._client = None
        _numbers(asked.get("blind"))
        self.journal.check(round_)

    def begin(self, asked: dict[str, Any], blob: bytes, down: Tree, done: Version) -> Message:
        """Step 1 after training: fresh keys in place of the upload.

        Args:
            asked: the request to train, with ``attempt`` and ``unit`` in ``blind``.
            blob: the download as bytes.
            down: the download.
            done: the result of the training.
        """
        from fedvlm.privacy.blind.client import Client
        from fedvlm.privacy.blind.messages import Context

        attempt, unit = _numbers(asked.get("blind"))
        sampled, site = float(asked["sampled"]), self.site
        visit = site._visit(done.round, sampled)
        limit = site.config.wire.max_norm
        summand = Summand(site.algorithm, site.engine.adapter, visit, down, limit)
        limits.check_bytes(site.policy, 4 * summand.size, "up")
        loss = 0.0  # under differential privacy, no loss leaves the site, not even in a sum
        if not site.private:
            loss = rounded(done.loss, scaled(site.policy.score_step, done.loss))
        if not site.policy.tell_rows:  # a weight below 1 would show the number of rows
            visit = replace(visit, weight=unit)
        self._values = summand.values(done.trees["upload"], visit, unit, loss)
        context = Context(self._run, done.round, attempt, self._config, sha256(blob), unit, sampled)
        least = site.policy.min_sites
        record = self.journal.note
        self._client = Client(
            self.identity,
            context,
            self.pins,
            least,
            lambda fact: record(context.round, context.attempt, fact),
        )
        return {"keys": self._client.advertise()}, b""

    def step(self, asked: dict[str, Any]) -> Message:
        """Steps 2 to 5.

        Raises:
            Refused: this process has no keys for the attempt, or the answer could reveal more than
                the sum.
        """
        from fedvlm.privacy.blind.messages import Withheld

        client, round_, attempt = self._client, asked.get("round"), asked.get("attempt")
        if client is None or (client.context.round, client.context.attempt) != (round_, attempt):
            raise Refused(
                f"this site has no keys for attempt {attempt!r:.30} at round {round_!r:.30}: its "
                "process began after them, or another attempt did; they were in memory only"
            )
        message = asked.get("message")
        try:
            return self._answer(client, asked.get("step"), message)
        except Withheld as error:
            raise Refused(str(error)) from None

    def _answer(self, client: Client, step: Any, message: Any) -> Message:
        if step == "share":
            return client.share(message), b""
        if step == "mask":
            values, weight = self._values
            self._values = (None, 0.0)
            if values is None:
                raise Refused("this site has sent its masked upload")
            numbers = partial(encoded, self.site.config, client, values, weight)
            return client.mask(message, numbers)
        if step == "agree":
            return client.agree(message), b""
        if step == "unmask":
            return client.unmask(message), b""
        raise FedVLMError(f"a secure sum has no step {step!r:.30}")


def _numbers(given: Any) -> tuple[int, float]:
    """The attempt and the unit of weights in a request.

    Raises:
        Refused: they are missing, as if the run had single uploads, or impossible.
    """
    if not isinstance(given, dict):
        raise Refused("this run has secure aggregation (wire.secure): no single upload is sent")
    attempt, unit = given.get("attempt"), given.get("unit")
    if type(attempt) is not int or attempt < 1:
        raise Refused(f"an attempt is a whole number from 1, got {attempt!r:.30}")
    if isinstance(unit, bool) or not isinstance(unit, int | float) or not 0 < unit < 1e15:
        raise Refused(f"the unit of weights is a number above 0, got {unit!r:.30}")
    return attempt, float(unit)

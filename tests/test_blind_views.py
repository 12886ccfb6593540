"""A server that shows its sites different keys: no site's upload is opened.

Thirteen pinned sites, three of which work with the server: fewer than a third of all, and of every
list of keys that an honest site is shown. Before shares were sealed for one list of keys, this read
the upload of ``i``: a small group opened its seed by "all have uploaded", and the same sites then
opened the keys of its peers by "some have dropped out".
"""

import copy

import numpy as np
import pytest

from fedvlm.privacy.blind.client import Client
from fedvlm.privacy.blind.identity import Identity
from fedvlm.privacy.blind.messages import Context, Withheld

LIARS = ("m1", "m2", "m3")
FIRST = ("r1", "z1", "z2", "z3")
VIEWS = {
    "i": ("i", "r1", "r2", "r3", "z1", "z2", "z3", *LIARS),
    **dict.fromkeys(FIRST, ("i", *FIRST, "m1", "m2")),
    **{r: ("i", r, "y1", "y2", "y3", "m1", "m2") for r in ("r2", "r3")},
    **dict.fromkeys(("y1", "y2", "y3"), ("r2", "r3", "y1", "y2", "y3", "m1", "m2")),
}
UPLOAD = np.arange(50, dtype=np.uint32)


def shared():
    """All clients after step 2, each with its own list of keys; and every sealed share."""
    names = (*VIEWS, *LIARS)
    identities = {name: Identity(name) for name in names}
    pins = {name: one.fingerprint for name, one in identities.items()}
    context = Context("run", 1, 1, "0" * 64, "1" * 64, 10.0)
    clients = {name: Client(identities[name], context, pins) for name in names}
    keys = {name: client.advertise() for name, client in clients.items()}
    sealed = {}
    for name, view in VIEWS.items():
        sealed[name, view] = clients[name].share({"keys": {n: keys[n] for n in view}})["shares"]
    for name in LIARS:  # a liar takes part in every list with one set of keys
        for view in {view for view in VIEWS.values() if name in view}:
            again = copy.copy(clients[name])
            again._shares, again._next = {}, ("share",)
            sealed[name, view] = again.share({"keys": {n: keys[n] for n in view}})["shares"]
    return clients, sealed


def asked(sealed, site, peers):
    """The request to mask, with the shares of peers, each by the list that the peer was shown."""
    of = {n: sealed[n, VIEWS.get(n, VIEWS[site])] for n in peers if n != site}
    return {"shares": {n: shares[site] for n, shares in of.items()}}


def test_shares_that_were_sealed_for_another_list_of_keys_are_refused():
    clients, sealed = shared()
    with pytest.raises(Withheld, match="are not for this site, round and attempt"):
        clients["i"].mask(asked(sealed, "i", ("i", "r1", "r2", "r3", *LIARS)), lambda: UPLOAD)


def test_sites_with_one_list_of_keys_go_on():
    """The control: in the group of equal lists, everybody masks but for the site outside it."""
    clients, sealed = shared()
    group = ("y1", "y2", "y3", "m1", "m2")
    for site in group[:3]:
        told, blob = clients[site].mask(asked(sealed, site, group), lambda: UPLOAD)
        assert told["signature"]
        assert len(blob) == UPLOAD.nbytes


def test_nothing_is_encoded_before_the_message_is_checked():
    """An error of the encoding tells something about the upload."""
    clients, sealed = shared()

    def encoded():
        raise AssertionError("encoded too early")

    with pytest.raises(Withheld):
        clients["i"].mask(asked(sealed, "i", ("i", "r1", "r2", "r3", *LIARS)), encoded)
    with pytest.raises(Withheld):
        clients["y1"].unmask({"signatures": {}})


@pytest.mark.parametrize("key", ["mask", "shares"])
def test_a_key_of_low_order_is_refused_with_its_site(key):
    names = ("a", "b", "c")
    identities = {name: Identity(name) for name in names}
    context = Context("run", 1, 1, "0" * 64, "1" * 64, 10.0)
    clients = {name: Client(identities[name], context) for name in names}
    keys = {name: client.advertise() for name, client in clients.items()}
    from fedvlm.privacy.blind.messages import advertised

    bad = {**keys["b"], key: "00" * 32}
    bad["signature"] = identities["b"].sign(advertised(context.digest, "b", bad)).hex()
    with pytest.raises(Withheld, match="'b' has advertised a key that is none"):
        clients["a"].share({"keys": {**keys, "b": bad}})

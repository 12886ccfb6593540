"""The parts of secure aggregation: uniform masks, shares of secrets, long-lived keys."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedvlm.privacy.blind import shamir
from fedvlm.privacy.blind.identity import Identity, plain
from fedvlm.privacy.blind.masks import MASK, SHARES, Masked, agreed, stream
from veiled import CONTEXT, Veiled, other

# -- what the server sees


def uniform(blob):
    """The chi-squared statistic of the bytes, in standard deviations from its mean."""
    counts = np.bincount(np.frombuffer(blob, np.uint8), minlength=256)
    expected = len(blob) / 256
    return (((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255)


def test_masked_uploads_are_uniform_and_plain_ones_are_not():
    run = Veiled(3, size=262_144)
    run.run()
    assert all(abs(uniform(blob)) < 5 for blob in run.blobs.values())
    total = sum(np.frombuffer(blob, np.uint32) for blob in run.blobs.values())
    assert abs(uniform(total.tobytes())) < 5  # the seeds' masks are still on the sum
    assert uniform(run.numbers("site-0").tobytes()) > 1000  # the control


def test_two_uploads_of_the_same_values_share_no_bytes():
    first, second = Veiled(3), Veiled(3)
    first.run(), second.run()
    one, two = (np.frombuffer(r.blobs["site-0"], np.uint32) for r in (first, second))
    assert (one == two).mean() < 0.05


def test_two_sites_agree_on_a_key_that_depends_on_round_purpose_and_names():
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    mine, theirs = (key.public_key().public_bytes_raw() for key in (one, two))
    known = agreed(one, theirs, MASK, CONTEXT.digest, ("a", "b"))
    assert agreed(two, mine, MASK, CONTEXT.digest, ("a", "b")) == known
    others = [
        agreed(one, theirs, MASK, other(download="e" * 32).digest, ("a", "b")),
        agreed(one, theirs, SHARES, CONTEXT.digest, ("a", "b")),
        agreed(one, theirs, MASK, CONTEXT.digest, ("a", "c")),
    ]
    assert known not in others
    with pytest.raises(ValueError):
        agreed(one, bytes(32), MASK, CONTEXT.digest, ("a", "b"))


def test_masks_are_added_and_subtracted_in_place_as_their_streams():
    numbers = np.array([0, 1, 2**32 - 1, 7], np.uint32)
    masked, keys = Masked(numbers.copy()), [bytes(32), b"\1" + bytes(31)]
    for key in keys:
        masked.add(key)
    assert np.array_equal(masked.total, numbers + stream(keys[0], 4) + stream(keys[1], 4))
    masked.add(keys[0], -1)
    assert np.array_equal(masked.total, numbers + stream(keys[1], 4))


def test_streams_of_different_keys_differ():
    assert not np.array_equal(stream(bytes(32), 8), stream(b"\1" + bytes(31), 8))


# -- secrets in shares


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not():
    secret = bytes(range(32))
    shares = shamir.split(secret, 4, 7)
    for kept in ([1, 2, 3, 4], [7, 5, 3, 1], [1, 2, 3, 4, 5, 6, 7]):
        assert shamir.join({k: shares[k] for k in kept}) == secret
    assert shamir.join({k: shares[k] for k in (1, 2, 3)}) != secret


def test_our_shares_and_those_of_pycryptodome_are_the_same():
    from Crypto.Protocol.SecretSharing import Shamir

    secret = bytes(range(100, 132))
    ours = shamir.split(secret, 3, 5)
    for half in (slice(0, 16), slice(16, 32)):
        assert Shamir.combine([(k, ours[k][half]) for k in (2, 5, 3)]) == secret[half]
    theirs = [dict(Shamir.split(3, 5, secret[half])) for half in (slice(0, 16), slice(16, 32))]
    assert shamir.join({k: theirs[0][k] + theirs[1][k] for k in (1, 4, 5)}) == secret


@pytest.mark.parametrize("bad", [(b"short", 2, 3), (bytes(32), 4, 3), (bytes(32), 1, 256)])
def test_impossible_shares_are_errors(bad):
    with pytest.raises(ValueError, match=r"32 bytes|1 to 255 shares"):
        shamir.split(*bad)


# -- long-lived keys


def test_an_identity_is_the_same_after_it_was_stored():
    one = Identity("north")
    again = Identity("north", one.secret)
    assert again.fingerprint == one.fingerprint != Identity("north").fingerprint


def test_a_fingerprint_may_be_written_in_groups():
    mark = Identity("north").fingerprint
    grouped = ":".join(mark[k : k + 4] for k in range(0, 64, 4)).upper()
    assert plain(grouped) == plain(f" {mark} ") == mark
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        plain("abc")

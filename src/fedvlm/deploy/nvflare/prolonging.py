"""A certificate once more, for the same key, with a later end."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa

from fedvlm.deploy.nvflare import keys
from fedvlm.errors import FedVLMError


def prolonged(
    old: x509.Certificate,
    authority: rsa.RSAPrivateKey,
    days: int,
    latest: datetime.datetime | None = None,
) -> x509.Certificate:
    """The same certificate from now on: its name, its key and all it says.

    A key stays because others know it: sites know that of the authority, and NVFlare's server has
    signed with its own the tokens of the sites that are connected.

    Args:
        old: the certificate, which may have ended.
        authority: signs it.
        days: its length. NVFlare wants that of the authority to be exactly this long.
        latest: the authority's end, if that is earlier.

    Raises:
        FedVLMError: the authority has ended.
    """
    begin = datetime.datetime.now(datetime.UTC).replace(microsecond=0) - keys.SKEW
    end = begin + datetime.timedelta(days=days)
    if latest and latest <= begin + keys.SKEW:
        raise FedVLMError(
            f"the federation's authority ended on {latest:%Y-%m-%d}: give 'fedvlm deploy renew' "
            "where its key is"
        )
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(old.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(min(end, latest or end))
    )
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(authority, hashes.SHA256())

"""Names that several of NVFlare's processes need, some of which load little else."""

ADMIN = "admin@fedvlm.local"
"""The operator's name in the certificate of the federation's ``admin`` kit."""
REFUSED = "fedvlm refused a message"
"""Begins the guard's lines in NVFlare's log."""
INSIDE = {
    "internal": {
        "scheme": "tcp",
        "resources": {"host": "localhost", "connection_security": "mtls"},
    }
}
"""NVFlare's setting for connections among the processes of a machine. Its default is plain TCP.

Any user of the machine could connect there, claim to be the server and be obeyed.
"""

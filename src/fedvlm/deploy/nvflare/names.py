"""Names that several of NVFlare's processes need, some of which load little else."""

ADMIN = "admin@fedvlm.local"
"""The operator's name in the certificate of the federation's ``admin`` kit."""
REFUSED = "fedvlm refused a message"
"""Begins the guard's lines in NVFlare's log."""

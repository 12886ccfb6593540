"""The version of the package, and the format of the files that a later version reads again.

One number stands for the formats of all such files: folders of runs, the state of a site, its
ledgers, backups, and the files of a federation. Each file has it beside the version that wrote it.
``FORMAT`` goes up when a version writes something that an older one would misread. ``READS`` goes
up when a version stops reading an old format. tests/test_formats.py says what else to do then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedvlm.errors import FedVLMError, shown

__version__ = "0.2.0"

FORMAT = 1
"""What this version writes, and the newest that it reads."""
READS = 1
"""The oldest format that this version reads."""
BY = "written_by"


def written_by() -> dict[str, Any]:
    """What a file has under the key ``BY``."""
    return {"fedvlm": __version__, "format": FORMAT}


def check_format(content: Mapping[str, Any], what: object) -> None:
    """Refuses a file in a format that this version does not read.

    Args:
        content: the file's content. Without the key ``BY`` it is of format 1.
        what: names the file in the message.

    Raises:
        FedVLMError: the message names the version that has written the file.
    """
    about = content.get(BY, {"fedvlm": "0.2.0", "format": 1})
    found = about.get("format") if isinstance(about, Mapping) else None
    if type(found) is int and READS <= found <= FORMAT:
        return
    by = shown(about.get("fedvlm") if isinstance(about, Mapping) else None, 20, quotes=False)
    reads = f"format {FORMAT}" if READS == FORMAT else f"formats {READS} to {FORMAT}"
    raise FedVLMError(
        f"'{what}' was written by fedvlm {by} in format {shown(found, 20)}, and this is fedvlm "
        f"{__version__}, which reads {reads}: use pip install 'fedvlm=={by}' for it"
    )


def minor(version: object) -> str:
    """The first two numbers of a version; empty for what is none.

    >>> minor("0.2.7"), minor("1.10.0rc1"), minor(None), minor("x")
    ('0.2', '1.10', '', '')
    """
    parts = version.split(".") if isinstance(version, str) and len(version) < 40 else []
    whole = len(parts) > 2 and all(part.isascii() and part.isdigit() for part in parts[:2])
    return ".".join(parts[:2]) if whole else ""

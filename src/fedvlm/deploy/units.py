"""The units with which systemd runs the server and a site: their own user, and little to write."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fedvlm.errors import FedVLMError, shown

KEPT = Path("/var/lib")  # systemd makes the folders below it that a unit names
UNIT = """\
# {file}
[Unit]
Description=fedvlm {what}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=15min
StartLimitBurst=10
{mounts}
[Service]
Type=exec
ExecStart={command}
User={user}
Restart=always
RestartSec=10
KillMode=mixed
TimeoutStopSec=60
# A worker without memory ends alone, and another one starts. MemoryMax= and TasksMax= are yours.
OOMPolicy=continue
{places}
CacheDirectory=%N
CacheDirectoryMode=0700
Environment=XDG_CACHE_HOME=%C/%N
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
{devices}
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
NO_DEVICES = "PrivateDevices=yes"
GPUS = "DevicePolicy=closed\nDeviceAllow=char-nvidia* rw"


def site_unit(
    data: str | Path,
    state: str | Path,
    policy: str | Path | None = None,
    *,
    user: str,
    credential: str | Path | None = None,
) -> str:
    """The text of ``/etc/systemd/system/fedvlm-site.service``.

    Args:
        data: the site's rows.
        state: the site's folder, the only one that the unit may write.
        policy: the site's policy.
        user: the user of the site's processes.
        credential: the site's key, as ``systemd-creds encrypt`` writes it; None: in the state.

    Raises:
        FedVLMError: a path or the user cannot stand in a unit.
    """
    rows, home = _absolute(data), _absolute(state)
    words = ["site", "start", "--data", rows, "--state", home]
    words += ["--policy", _absolute(policy)] if policy else []
    places = [_written(home), *_secret("site.key", credential)]
    return _unit("site", words, user, places, GPUS, [rows, home])


def server_unit(
    folder: str | Path,
    runs: str | Path | None = None,
    more: Sequence[str] = (),
    *,
    user: str,
    credential: str | Path | None = None,
) -> str:
    """The text of ``/etc/systemd/system/fedvlm-server.service``.

    The unit's processes see neither the authority's key nor the operator's.

    Args:
        folder: the federation.
        runs: the folder for the results of runs; None: ``runs`` beside the federation.
        more: further words of ``fedvlm deploy server``.
        user: the user of the server's processes.
        credential: the server's key, as ``systemd-creds encrypt`` writes it; None: it is in the
            federation.

    Raises:
        FedVLMError: a path or the user cannot stand in a unit.
    """
    home = _absolute(folder)
    results = _absolute(runs) if runs else str(Path(home).parent / "runs")
    hidden = " ".join(quoted(f"-{home}/{part}") for part in ("ca", "admin"))
    places = [_written(home, results), f"InaccessiblePaths={hidden}"]
    places += _secret("server.key", credential)
    words = ["deploy", "server", "-f", home, *more]
    return _unit("server", words, user, places, NO_DEVICES, [home, results])


def _unit(
    what: str, words: list[str], user: str, places: list[str], devices: str, mounts: list[str]
) -> str:
    if re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", user) is None:
        raise FedVLMError(f"--user {shown(user)} is no user's name: use a-z, 0-9, _ and -")
    first, *rest = [sys.executable, "-m", "fedvlm", *words]
    if set(first) & {'"', "'", "\\"}:
        raise FedVLMError(f"systemd starts no program named {shown(first, 200)}: rename its folder")
    command = " ".join([quoted(first), *(quoted(word).replace("$", "$$") for word in rest)])
    return UNIT.format(
        file=f"/etc/systemd/system/fedvlm-{what}.service",
        what=what,
        command=command,
        user=user,
        places="\n".join(places),
        devices=devices,
        mounts=f"RequiresMountsFor={' '.join(map(quoted, mounts))}\n",
    )


def quoted(text: str) -> str:
    """A word of a unit: ``%`` is doubled; quotes and backslashes are escaped.

    >>> print(quoted("/data/100% of 'rows'"))
    "/data/100%% of 'rows'"

    Raises:
        FedVLMError: the text has a character that a unit cannot hold.
    """
    if not text.isprintable():
        raise FedVLMError(f"{shown(text)} cannot stand in a unit of systemd: rename the file")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return escaped if re.fullmatch(r"[\w/.,:=%+-]+", escaped) else f'"{escaped}"'


def _absolute(path: str | Path) -> str:
    return str(Path(path).absolute())


def _written(*folders: str) -> str:
    """The settings that let a unit write to folders. systemd makes those below ``/var/lib``."""
    made: list[str] = []
    other: list[str] = []
    for folder in folders:
        inside = Path(folder).is_relative_to(KEPT) and re.fullmatch(r"[\w/.-]+", folder)
        (made if inside and folder != str(KEPT) else other).append(folder)
    lines = []
    if made:
        names = " ".join(str(Path(folder).relative_to(KEPT)) for folder in made)
        lines += [f"StateDirectory={names}", "StateDirectoryMode=0700"]
    if other:
        lines.append(f"ReadWritePaths={' '.join(map(quoted, other))}")
    return "\n".join(lines)


def _secret(name: str, credential: str | Path | None) -> list[str]:
    if credential is None:
        return []
    path = _absolute(credential)
    if re.fullmatch(r"[\w/.+-]+", path) is None:
        raise FedVLMError(f"--credential {shown(path)}: use a path of letters, digits and /._+-")
    return [f"LoadCredentialEncrypted={name}:{path}"]

"""Two lines of an audit log for each request: one before it is carried out, one for its answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedvlm.deploy.auditlog import NAME, AuditLog
from fedvlm.deploy.digests import digest_of, sha256
from fedvlm.deploy.frames import Message
from fedvlm.errors import FedVLMError


def audited(
    log: AuditLog, asked: Mapping[str, Any], blob: bytes, act: Callable[[], Message], **facts: Any
) -> Message:
    """Carries out a request between two lines: the request, and its answer.

    Args:
        log: the log.
        asked: the request's header.
        blob: the request's tensors, as bytes.
        act: carries out the request. Its exceptions pass, after a line of their kind.
        **facts: more facts for both lines.

    Raises:
        FedVLMError: a line cannot be written. The answer must not leave then.
    """
    about = facts | {key: asked.get(key) for key in ("do", "run", "round", "kind")}
    body = {key: value for key, value in asked.items() if key not in ("id", "number", "limit")}
    log.note("request", **about, header=digest_of(body), **_size("down", blob))
    try:
        answer, tensors = act()
    except Exception as error:
        log.note("answer", **about, decision="none", message=type(error).__name__)
        raise
    failed = {"message": answer.get("message")} if "error" in answer else {}
    log.note(
        "answer",
        **about,
        decision=answer.get("error", "done"),
        **failed,
        header=digest_of(answer),
        **_size("up", tensors),
    )
    return answer, tensors


def _size(way: str, blob: bytes) -> dict[str, Any]:
    return {f"bytes_{way}": len(blob), f"sha256_{way}": sha256(blob) if blob else None}


def audited_calls(log: AuditLog, call: Callable[..., Message]) -> Callable[..., Message]:
    """The server's function that asks a site, with two lines for each request.

    Args:
        log: the server's log of the run.
        call: ``(site, header, tensors, seconds) -> (header, tensors)``.
    """

    def asked(site: str, header: dict[str, Any], blob: bytes, limit: float) -> Message:
        return audited(log, header, blob, lambda: call(site, header, blob, limit), site=site)

    return asked


def at_site(own: Mapping[str, Any]) -> AuditLog:
    """The log of a site, in the folder of its state.

    Args:
        own: the site's ``name`` and ``state``.
    """
    return AuditLog(Path(own["state"]) / NAME, site=own["name"])


def audited_at_site(
    own: Mapping[str, Any], asked: Mapping[str, Any], blob: bytes, act: Callable[[], Message]
) -> Message:
    """Carries out a server's request as :func:`audited` does. Without a line, it is refused.

    Args:
        own: the site's ``name``, ``state`` and ``policy`` (file or None).
        asked: the request's header.
        blob: the request's tensors, as bytes.
        act: carries out the request; it raises nothing.
    """
    facts: dict[str, str | None] = {}
    if isinstance(asked.get("config"), dict):
        try:
            facts["config"] = digest_of(asked["config"])
        except (RecursionError, ValueError, TypeError):
            facts["config"] = None  # no settings: the request is refused for it
        policy = Path(own["policy"]) if own.get("policy") else None
        facts["policy"] = sha256(policy.read_bytes()) if policy and policy.is_file() else None
    try:
        return audited(at_site(own), asked, blob, act, **facts)
    except FedVLMError as error:
        return {"error": "failed", "message": str(error)}, b""

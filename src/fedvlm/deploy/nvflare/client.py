"""A site's process for one run, as NVFlare starts it: thin, so that little can end it.

It has no torch, no rows and no model; tensors pass through it as bytes. NVFlare ends a whole job
when one of these processes dies, which is why the work is done in another one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from nvflare.collab import collab

from fedvlm.deploy.calls import Desk, settle
from fedvlm.deploy.nvflare.processes import SITE
from fedvlm.deploy.supervisor import Supervisor
from fedvlm.deploy.worker import log_to

logger = logging.getLogger("fedvlm")

# NVFlare's own form of tensors imports torch; without it nothing but bytes and text is accepted.
sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]


class Client:
    """What the server may call at a site: one method."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.desk: Desk | None = None

    @collab.init
    def begin(self) -> None:
        own = json.loads(os.environ[SITE])
        if own["name"] != collab.site_name:
            raise RuntimeError(f"this is site '{own['name']}', and not '{collab.site_name}'")
        log_to(own["log"])
        self.supervisor = Supervisor(own)
        self.desk = Desk(self.supervisor.call)
        settle()

    @collab.publish
    def ask(self, header: str, blob: bytes) -> list[Any]:
        """Does what the header says; other sites may not ask."""
        if collab.caller != "server":
            logger.warning("refused a call by '%s'", collab.caller)
            return [json.dumps({"error": "refused", "message": "only the server may ask"}), b""]
        assert self.desk is not None
        answer, tensors = self.desk.ask(json.loads(header), blob)
        return [json.dumps(answer), tensors]

    @collab.final
    def end(self) -> None:
        if self.supervisor:
            self.supervisor.end()

"""A site's process for one run, started by NVFlare. It is thin, so that little can end it.

It has no torch, no rows and no model. Tensors pass through it as bytes. NVFlare ends the whole job
when one of these processes dies. Therefore another process, the worker, does the work.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from typing import Any

from nvflare.collab import collab

from fedvlm.deploy.calls import Desk, settle
from fedvlm.deploy.frames import parsed
from fedvlm.deploy.nvflare.processes import SITE
from fedvlm.deploy.supervisor import Supervisor
from fedvlm.deploy.worker import log_to

logger = logging.getLogger("fedvlm")

# NVFlare's serialization of tensors imports torch. Without it, only bytes and text are accepted.
sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]


class Client:
    """The one method that the server may call at a site."""

    def __init__(self) -> None:
        self.supervisor: Supervisor | None = None
        self.desk: Desk | None = None

    @collab.init
    def begin(self) -> None:
        own = json.loads(os.environ[SITE])
        if own["name"] != collab.site_name:
            raise RuntimeError(f"the job is for site '{collab.site_name}', this is '{own['name']}'")
        log_to(own["log"])
        self.supervisor = Supervisor(own)
        self.desk = Desk(self.supervisor.call)
        settle()

    @collab.publish
    def ask(self, header: str, blob: bytes) -> list[Any]:
        """Answers one message of the server. Calls by other sites are refused."""
        if collab.caller != "server":
            logger.warning("refused a call by '%s'", collab.caller)
            return [json.dumps({"error": "refused", "message": "only the server may ask"}), b""]
        assert self.desk is not None
        answer, tensors = self.desk.ask(parsed(header), blob)
        return [json.dumps(answer), tensors]

    @collab.final
    def end(self) -> None:
        if self.supervisor:
            self.supervisor.end()

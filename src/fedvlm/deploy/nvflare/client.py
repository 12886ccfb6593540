"""A site's process for one run, started by NVFlare. It is thin, so that little can end it.

It has no torch, no rows and no model. Tensors pass through it as bytes. NVFlare ends the whole job
when one of these processes dies. Therefore another process, the worker, does the work.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from fedvlm.deploy import logs
from fedvlm.deploy.calls import Desk, settle
from fedvlm.deploy.nvflare import guard
from fedvlm.deploy.nvflare.processes import MARK, SITE
from fedvlm.deploy.nvflare.signing import Forged, Verifier
from fedvlm.deploy.supervisor import Supervisor

logger = logging.getLogger("fedvlm")

# NVFlare's serialization of tensors imports torch. Without it, only bytes and text are accepted.
sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]


class Client:
    """The one method that the server may call at a site."""

    def __init__(self) -> None:
        guard.install()  # NVFlare makes this object before it connects to anything
        self.supervisor: Supervisor | None = None
        self.desk: Desk | None = None
        self.verifier: Verifier | None = None

    @collab.init
    def begin(self) -> None:
        own = json.loads(os.environ[SITE])
        if own["name"] != collab.site_name:
            raise RuntimeError(f"the job is for site '{collab.site_name}', this is '{own['name']}'")
        logs.log_to(own["log"])
        startup, job = Path(os.environ[MARK]) / "startup", str(collab.fl_ctx.get_job_id())
        self.verifier = Verifier(startup, job, own["name"])
        self.supervisor = Supervisor(own)
        self.desk = Desk(self.supervisor.call)
        settle()

    @collab.publish
    def ask(self, header: str, blob: bytes) -> list[Any]:
        """Answers one message of the server.

        Whatever the server has not signed for this site and this job is refused, whoever sends it.
        """
        assert self.desk is not None
        assert self.verifier is not None
        try:
            asked = self.verifier.header(header, blob)
        except Forged as error:
            logger.warning("refused a request of '%s': %s", collab.caller, error)
            return [json.dumps({"error": "refused", "message": f"the request: {error}"}), b""]
        logs.about(asked)
        answer, tensors = self.desk.ask(asked, blob)
        return [json.dumps(answer), tensors]

    @collab.final
    def end(self) -> None:
        if self.supervisor:
            self.supervisor.end()

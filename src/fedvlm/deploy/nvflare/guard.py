"""Which messages NVFlare's processes take, and from whom.

NVFlare 2.9 authenticates the two ends of a connection. It does not check what a message claims
about its origin against the connection on which the message arrives, and a site's process performs
an administrator's command for anyone. Here a site takes messages from the server and from its own
processes only, and the server relays none from one site to another.

``python -m fedvlm.deploy.nvflare.guard client.client_train ...`` starts NVFlare's process with
these rules. They are this machine's, so a kit or a job cannot take them away.
"""

from __future__ import annotations

import functools
import logging
import runpy
import ssl
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.tcp_driver import TcpStreamServer
from nvflare.fuel.utils.zip_utils import unzip_all_from_bytes
from nvflare.lighter.utils import verify_folder_signature_and_get_signers
from nvflare.private.admin_defs import Message, error_reply
from nvflare.private.defs import TrainingTopic
from nvflare.private.fed.client.admin import RequestProcessor
from nvflare.private.fed.client.client_req_processors import ClientRequestProcessors

from fedvlm.deploy.nvflare.names import ADMIN, REFUSED

SERVER = "server"
HANDSHAKE = 10.0  # seconds that a process at this machine may take for the handshake of TLS
OPERATOR = (ADMIN, "fedvlm", "project_admin")
"""Name, organization and role in the certificate that may sign jobs."""
COMMANDS = (
    TrainingTopic.CHECK_RESOURCE,
    TrainingTopic.CANCEL_RESOURCE,
    TrainingTopic.DEPLOY,
    TrainingTopic.START_JOB,
    TrainingTopic.ABORT,
    TrainingTopic.NOTIFY_JOB_STATUS,
)
"""The commands that a site performs: those of a job. NVFlare has others, such as shell commands."""

logger = logging.getLogger(__name__)


def refusal(own: str, peer: str, headers: dict[str, Any], inward: bool = False) -> str:
    """Says why a message may not pass. An empty text means that it may.

    Args:
        own: the name of the cell that has received it, such as ``north`` or ``north.JOB``.
        peer: the cell at the other end of the connection, by its certificate.
        headers: the message's headers, as its sender has written them.
        inward: whether the other end has opened the connection.
    """
    origin = headers.get(MessageHeaderKey.ORIGIN)
    destination = headers.get(MessageHeaderKey.DESTINATION)
    if not (isinstance(origin, str) and isinstance(destination, str)):
        return "it has no origin or no destination"
    here, there, of, to = map(_family, (own, peer, origin, destination))
    if here == SERVER:
        if of != there:
            return "its origin is another site than its sender"
        return "" if there == SERVER or to in (SERVER, there) else "it is for another site"
    if of not in (SERVER, here):
        return "it is of another site"
    if to not in (SERVER, here):
        return "it is for another site"
    if there not in (SERVER, here) or (inward and there != here):
        return "its sender is no process of this site, and not the server"
    if of == SERVER and there == here and not own.startswith(peer + "."):
        return "a process of this site is not the server"
    if own == here and headers.get(MessageHeaderKey.CHANNEL) == CellChannel.CLIENT_MAIN:
        return "" if origin == SERVER or of == here else "only the server may command"
    return ""


def _family(cell: str) -> str:
    """The name of a cell's site, or ``server``."""
    return cell.split(".", 1)[0]


@functools.cache
def install() -> None:
    """Makes all cells of this process refuse messages. They are not answered."""
    take, seen = CoreCell.process_message, Counter[tuple[str, str]]()

    @functools.wraps(take)
    def guarded(self: Any, endpoint: Any, connection: Any, app_id: int, message: Any) -> None:
        connector = getattr(connection, "connector", None)
        inward = connector is not None and connector.mode == Mode.PASSIVE
        why = refusal(self.my_info.fqcn, endpoint.name, message.headers or {}, inward)
        if not why:
            take(self, endpoint, connection, app_id, message)
            return
        seen[endpoint.name, why] += 1
        if (count := seen[endpoint.name, why]) & (
            count - 1
        ) == 0:  # 1, 2, 4, 8: the log stays small
            logger.warning("%s (%d) from '%s': %s", REFUSED, count, endpoint.name, why)

    CoreCell.process_message = guarded
    _without_waiting()


def _without_waiting() -> None:
    """Lets the listener for processes of this machine accept several handshakes at a time.

    NVFlare's listener waits for the handshake before it accepts the next connection. Any process
    of the machine could thus keep a job's process out, by saying nothing.
    """
    activate, finish = TcpStreamServer.server_activate, TcpStreamServer.finish_request

    def patient(self: Any) -> None:
        if self.ssl_context:
            self.socket.do_handshake_on_connect = False
        activate(self)

    def shaken(self: Any, request: Any, address: Any) -> None:
        if isinstance(request, ssl.SSLSocket):  # in a thread of its own
            request.settimeout(HANDSHAKE)
            try:
                request.do_handshake()
            except OSError as error:
                logger.warning("%s: a process of this machine has no key: %s", REFUSED, error)
                return
            request.settimeout(None)
        finish(self, request, address)

    TcpStreamServer.server_activate = patient
    TcpStreamServer.finish_request = shaken


class Signed(RequestProcessor):
    """Takes jobs that the operator has signed, and hands them to NVFlare's processor.

    NVFlare accepts the signature of any certificate of the federation, also a site's.
    """

    def __init__(self, deploy: RequestProcessor):
        self.deploy = deploy

    def get_topics(self) -> list[str]:
        return list(self.deploy.get_topics())

    def process(self, req: Message, app_ctx: Any) -> Message:
        root = Path(app_ctx.args.workspace) / "startup" / "rootCA.pem"
        if why := unsigned(req.body, root):
            logger.warning("fedvlm refused a job: %s", why)
            return error_reply(why)
        return self.deploy.process(req, app_ctx)


def unsigned(app: bytes, root: Path) -> str:
    """Says why a job is not signed by the operator. An empty text means that it is.

    Args:
        app: the job's files, as a zip archive.
        root: the certificate of the federation's authority.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            unzip_all_from_bytes(app, folder)
        except Exception as error:  # the archive is the sender's
            return f"its files are no zip archive: {error!r:.200}"
        verified, signers = verify_folder_signature_and_get_signers(folder, str(root))
    if not verified:
        return "it is not signed, or was changed"
    if list(signers) != [OPERATOR]:
        return f"it is signed by {[name for name, *_ in signers]}, and only '{ADMIN}' may"
    return ""


def restrict() -> None:
    """Leaves a site's process the commands of :data:`COMMANDS`, and checks the jobs' signatures."""
    processors = ClientRequestProcessors.request_processors
    kept = [each for each in processors if set(each.get_topics()) <= set(COMMANDS)]
    deploys = [TrainingTopic.DEPLOY]
    processors[:] = [Signed(each) if each.get_topics() == deploys else each for each in kept]


def main() -> None:
    """Runs the module of NVFlare that the first argument names, with all other arguments."""
    module = sys.argv.pop(1)
    install()
    restrict()
    runpy.run_module(f"nvflare.private.fed.app.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

"""A user of a site's machine says to be the server: ``python local_user.py PORT SITE JOB KEYS``.

Asks the site's process for a job to work, by the listener for the processes of the machine, until
it answers. Prints the answer, or ``no answer`` when it is asked to end. ``KEYS`` is a folder with
the certificate and key of another site, which this user has, or ``none``.
"""

import os
import signal
import sys
import time
from pathlib import Path

from nvflare.collab.runtime.defs import CALL_PROTOCOL_VERSION, CallHeaderKey
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.drivers.driver_params import DriverParams


def end(*_):
    print("no answer", flush=True)
    os._exit(0)


signal.signal(signal.SIGTERM, end)
port, site, job, keys = sys.argv[1:]
name, scheme, credentials = f"server.{job}", "tcp", {}
if keys != "none":
    scheme = "stcp"
    credentials = {
        DriverParams.CA_CERT.value: str(Path(keys) / "rootCA.pem"),
        DriverParams.CLIENT_CERT.value: str(Path(keys) / "client.crt"),
        DriverParams.CLIENT_KEY.value: str(Path(keys) / "client.key"),
    }
cell = Cell(
    fqcn=name,
    root_url="",
    secure=bool(credentials),
    credentials=credentials,
    parent_url=f"{scheme}://localhost:{port}",
)
cell.start()
while True:
    request = new_cell_message(
        {
            CallHeaderKey.PROTOCOL_VERSION: CALL_PROTOCOL_VERSION,
            CallHeaderKey.TARGET_NAME: f"{site}.client",
            CallHeaderKey.METHOD_NAME: "ask",
        },
        {
            "caller": "server",
            "target_name": f"{site}.client",
            "method_name": "ask",
            "kwargs": {"header": '{"do": "ping", "number": "1"}', "blob": b""},
        },
    )
    reply = cell.send_request(
        channel="collab", topic="call", target=f"{site}.{job}", request=request, timeout=3.0
    )
    if isinstance(reply.payload, dict):
        print(reply.payload, flush=True)
        os._exit(0)  # some threads of NVFlare would go on
    time.sleep(0.5)

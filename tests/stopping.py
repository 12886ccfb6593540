"""Progress that stops a run."""

from __future__ import annotations

from fedvlm.rounds.progress import Progress


class Stop(Progress):
    """Acts like Ctrl-C after a number of trained clients."""

    def __init__(self, after):
        self.left = after

    def trained(self, client, loss):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

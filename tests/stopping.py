"""Ways in which a run of a test ends before its time."""

from __future__ import annotations

from fedvlm.errors import ConfigError
from fedvlm.rounds.progress import Progress


class Stop(Progress):
    """Acts like Ctrl-C after a number of trained clients."""

    def __init__(self, after):
        self.left = after

    def trained(self, client, loss):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def refused(name, config, tell):
    """Stands for a run that fails, also in another process, which imports this file."""
    raise ConfigError([f"lora.rank: {config.lora.rank} is larger than a layer, {name} says"])

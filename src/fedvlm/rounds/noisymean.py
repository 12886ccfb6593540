"""Differential privacy of whole clients: the noisy mean of clipped changes, for simulations.

DP-FedAvg with Poisson samples of clients and a fixed divisor (McMahan et al., arXiv 1710.06963):
the server clips the change of each client to the norm ``C``, all tensors together, sums the
changes, adds Gaussian noise, and divides by the expected number of clients. Clients have no
weights. What a client keeps never leaves it, so it needs no noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedvlm.algorithms.base import Algorithm, Averaged, by_examples
from fedvlm.engines.wire import norm
from fedvlm.errors import ConfigError, FedVLMError
from fedvlm.privacy.chance import Chance, noises
from fedvlm.privacy.plan import Plan
from fedvlm.settings.sections import Config
from fedvlm.tree import Tree, change

if TYPE_CHECKING:
    from torch import Tensor


class NoisyMean:
    """The noisy mean of a round's uploads.

    Args:
        down: the download of every client.
        plan: the clipping norm, the noise and the expected number of clients.
        chance: the source of the noise.

    Attributes:
        total: 1: an empty round has a result too, else its emptiness would show.
    """

    total = 1.0

    def __init__(self, down: Tree, plan: Plan, chance: Chance):
        self.down, self.plan, self.chance = down, plan, chance
        self._sum = {n: t.double() * 0 for n, t in down.items() if t.is_floating_point()}

    def add(self, tree: Mapping[str, Tensor], weight: float) -> None:
        """Adds the clipped change of one upload.

        Raises:
            FedVLMError: the upload has other tensors than the download.
        """
        if tree.keys() != self._sum.keys():
            odd = sorted(tree.keys() ^ self._sum.keys())
            raise FedVLMError(
                "privacy.unit=client needs uploads with the tensors of the download, and this "
                f"algorithm's differ in {len(odd)}, '{odd[0]}' first: choose another algorithm"
            )
        moved = change(self.down, dict(tree))
        share = min(1.0, self.plan.clip / max(norm(moved), 1e-30))
        for name, tensor in moved.items():
            self._sum[name] += share * tensor.double()

    def tree(self) -> Tree:
        """The download, moved by the noisy mean change. To be called once."""
        noise = noises(self.chance, self._sum, self.plan.noise * self.plan.clip)
        found = {}
        for name, total in self._sum.items():
            old, step = self.down[name], (total + noise[name]) / self.plan.batch
            found[name] = (old.double() + step).to(old.dtype)
        return found


def check(config: Config, algorithm: Algorithm) -> None:
    """Refuses algorithms whose uploads have no noisy mean (``privacy.unit=client``).

    Raises:
        ConfigError: the server needs single uploads, or the summands are not the uploads.
    """
    if config.privacy.unit != "client":
        return
    server, name = algorithm.server, config.algorithm.name
    if not isinstance(server, Averaged) or server.lift is not by_examples:
        raise ConfigError(
            [
                f"algorithm.name={name} cannot run with privacy.unit=client: its server uses more "
                "of the uploads than their mean; choose plora, fedsa, ffa, rolora or lora"
            ]
        )

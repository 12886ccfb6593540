"""The settings of algorithms whose server averages factors."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedvlm.algorithms.base import Algorithm
from fedvlm.algorithms.client_terms import proximal
from fedvlm.algorithms.server import ServerConfig, optimized
from fedvlm.settings.method import AlgorithmConfig

Step = Annotated[float, Field(gt=0)]


class ServerStep(AlgorithmConfig):
    """The server's step."""

    server_lr: Step = Field(
        1.0, description="step of the server towards the clients' mean; 1 reaches it"
    )


class Averaging(ServerStep):
    """The server's step or optimizer, and the clients' proximal term."""

    server: ServerConfig = ServerConfig()
    prox_mu: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="pull towards the download in training; empty: 0.01 for fedprox, else 0",
    )


def averaging(algorithm: Algorithm, settings: Averaging, mu: float | None = None) -> Algorithm:
    """``algorithm`` with the server's optimizer and the clients' proximal term.

    Args:
        algorithm: an algorithm whose server averages factors.
        settings: the settings of the algorithm.
        mu: the strength of the pull where the settings leave it empty.
    """
    strength = mu if settings.prox_mu is None else settings.prox_mu
    return proximal(optimized(algorithm, settings.server), strength)

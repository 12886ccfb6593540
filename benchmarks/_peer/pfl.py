"""The simulated FedAvg of pfl-research on the same PEFT model.

Run by `peers.py`: python -m _peer.pfl JOB NAME
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model_state_dict
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from _peer.common import Job, Pace, best_threads


class Collated(Dataset):
    """The collated batches of a client. Its length is the number of training rows."""

    def __init__(self, batches: list[Any], rows: int, client: int):
        super().__init__(raw_data=[], user_id=str(client))
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return self._rows

    def iter(self, batch_size: int | None) -> Iterator[Any]:
        yield from self._batches


class Paced(TrainingProcessCallback):
    """A round waits for its request."""

    def __init__(self, pace: Pace, model: Any):
        self._pace, self._model = pace, model

    def on_train_begin(self, *, model: Any) -> Metrics:
        self._pace.wait()
        return Metrics()

    def after_central_iteration(
        self, metrics: Metrics, model: Any, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        self._pace.done(get_peft_model_state_dict(self._model))
        self._pace.wait()
        return False, Metrics()


def main() -> None:
    folder, name = sys.argv[1:]
    job = Job(folder)
    peft = job.model()
    best_threads(job, peft)
    # Wrapped as in pfl-research's benchmark of language models. Only round 1 needs metrics.
    peft.loss = types.MethodType(lambda self, **batch: self(**batch).loss, peft)
    peft.metrics = types.MethodType(
        lambda self, **batch: {"loss": Weighted.from_unweighted(self(**batch).loss.item())}, peft
    )
    trained = [p for p in peft.parameters() if p.requires_grad]
    model = PyTorchModel(
        model=peft,
        local_optimizer_create=lambda parameters, lr: torch.optim.AdamW(
            parameters, lr=lr, weight_decay=job.weight_decay, fused=True
        ),
        central_optimizer=torch.optim.SGD(trained, 1.0),
    )
    pace = Pace(job, name)

    def dataset(client: int) -> Collated:
        return Collated(job.batches(client, pace.round), job.weights[client], client)

    clients = list(range(len(job.weights)))
    data = FederatedDataset(dataset, get_user_sampler("minimize_reuse", clients))
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=job.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=len(clients),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1,
            local_learning_rate=job.lr,
            local_batch_size=None,
            local_max_grad_norm=job.max_grad_norm,
        ),
        callbacks=[Paced(pace, peft)],
    )


if __name__ == "__main__":
    main()

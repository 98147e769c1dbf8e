"""Client of LIFL federated learning jobs.

A client only ever calls out: it joins a job, asks for work, fetches the model, trains, and sends
its update. `Client.train` is that loop; the other methods are its steps.
"""

from lifl_client.client import Client, Receipt, Task, TrainFn
from lifl_client.errors import (
    JobFailed,
    LiflError,
    ModelCorrupt,
    Rejected,
    RoundClosed,
    Unreachable,
    UpdateRejected,
)
from lifl_client.retry import Retry

__all__ = [
    "Client",
    "JobFailed",
    "LiflError",
    "ModelCorrupt",
    "Receipt",
    "Rejected",
    "Retry",
    "RoundClosed",
    "Task",
    "TrainFn",
    "Unreachable",
    "UpdateRejected",
]

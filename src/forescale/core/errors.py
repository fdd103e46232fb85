"""Every error Forescale raises on purpose.

ForescaleError
├── InvalidInput            the request cannot be carried out as written
│   ├── CaptureFailed       a model whose forward cannot be turned into a graph
│   ├── InfeasiblePlan      no split fits the devices' memory
│   ├── TaskFailed          the user's own code (task file, loss, optimizer) raised
│   ├── CheckpointMismatch  a checkpoint of another model
│   ├── NotFound            a model, version, alias or deployment that does not exist
│   ├── NoRoom              a deployment for more memory than the pool has
│   └── UntrustedModel      a model's file holds code, and nobody said that it may run
├── RunFailed               a run that had started could not go on
│   ├── WorkerLost          a worker process died
│   ├── NonFiniteLoss       the loss became NaN or infinite
│   └── CheckpointFailed    a checkpoint could not be written
├── RegistryFailed          the registry's database or artifact store cannot be used
│   └── ArtifactCorrupt     a stored file is not what was put in
├── ServerFailed            a server cannot be reached, or could not do what it was asked
├── RequestFailed           a request to a served model got no answer; .status says why as HTTP does
│   ├── BadRequest          it makes no sense, or does not fit the model
│   ├── NotServed           nothing of that name or version is served
│   ├── TooBusy             it cannot be answered in time; .retry_after_s says when to try again
│   └── ModelFailed         the model could not compute an answer
└── ChannelFailed           coordinator and worker cannot talk to each other
    └── PeerGone            the other end is no longer there, or never was
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forescale.control.report import TrainingReport


class ForescaleError(Exception):
    """Base of all errors; the message is one line that says what to do."""


class InvalidInput(ForescaleError):
    """The request cannot be carried out as written."""


class CaptureFailed(InvalidInput):
    """The model's forward cannot be captured as a graph."""

    def __init__(self, reason: str, *, operator: str | None = None, source: str | None = None) -> None:
        self.operator = operator
        self.source = source
        where = [f"operator {operator}"] if operator else []
        where += [f"at {source}"] if source else []
        super().__init__(
            ": ".join(["cannot capture the model", *([" ".join(where)] if where else []), reason])
        )


class InfeasiblePlan(InvalidInput):
    """No split of the model fits the devices' memory.

    Attributes:
        short_bytes: bytes missing on the tightest device of the best attempt.
        device: name of that device.
        fits: what would fit, as a sentence (fewer rows per batch, more devices, ...).
    """

    def __init__(self, *, short_bytes: int, device: str, fits: str) -> None:
        self.short_bytes = short_bytes
        self.device = device
        self.fits = fits
        super().__init__(f"no plan fits: {device} is short of {short_bytes:,} bytes; {fits}")


class TaskFailed(InvalidInput):
    """The user's own code raised; the message names the place."""


class CheckpointMismatch(InvalidInput):
    """A checkpoint that belongs to another model."""


class NotFound(InvalidInput):
    """A model, version, alias or deployment that does not exist."""


class NoRoom(InvalidInput):
    """A deployment for more memory than the pool has beside the others."""


class UntrustedModel(InvalidInput):
    """A model's file holds something that only code would need.

    Attributes:
        found: what, as a clause.
    """

    def __init__(self, found: str) -> None:
        self.found = found
        super().__init__(
            f"the model may hold code ({found}): only a server that was started with --trust serves it"
        )


class RunFailed(ForescaleError):
    """A run that had started could not go on.

    Attributes:
        checkpoint: path of the last complete checkpoint, if one exists.
        report: the steps that were done, without the model's state; None if there were none.
    """

    def __init__(self, message: str, *, checkpoint: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.report: TrainingReport | None = None
        kept = f"; resume from {checkpoint}" if checkpoint else "; no checkpoint had been written"
        super().__init__(message + kept)


class WorkerLost(RunFailed):
    """A worker process died."""

    def __init__(self, *, device: str, cause: str, checkpoint: str | None) -> None:
        self.device = device
        self.cause = cause
        super().__init__(f"the worker on {device} was lost ({cause})", checkpoint=checkpoint)


class NonFiniteLoss(RunFailed):
    """The loss became NaN or infinite."""

    def __init__(self, *, step: int, loss: float, checkpoint: str | None) -> None:
        self.step = step
        self.loss = loss
        super().__init__(f"the loss is {loss} at step {step}", checkpoint=checkpoint)


class CheckpointFailed(RunFailed):
    """A checkpoint could not be written."""


class RegistryFailed(ForescaleError):
    """The registry's database or its artifact store cannot be used."""


class ArtifactCorrupt(RegistryFailed):
    """A stored file is missing or is not what was put in."""

    def __init__(self, sha256: str, found: str) -> None:
        self.sha256 = sha256
        super().__init__(f"artifact {sha256[:12]} is damaged ({found}); add the model again")


class ServerFailed(ForescaleError):
    """A server cannot be reached, or could not do what it was asked."""


class RequestFailed(ForescaleError):
    """A request to a served model got no answer.

    Attributes:
        status: HTTP status code.
    """

    status = 500


class BadRequest(RequestFailed):
    """The request makes no sense, or does not fit the model."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


class NotServed(RequestFailed):
    """Nothing of that name or version is served."""

    status = 404


class TooBusy(RequestFailed):
    """The request cannot be answered in time."""

    status = 503

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class ModelFailed(RequestFailed):
    """The model could not compute an answer."""


class ChannelFailed(ForescaleError):
    """Coordinator and worker cannot talk to each other."""


class PeerGone(ChannelFailed):
    """The other end of a channel is no longer there, never was, or refused the connection."""

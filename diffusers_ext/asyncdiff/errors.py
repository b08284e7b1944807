"""The errors of AsyncDiff."""


class AsyncDiffError(RuntimeError):
    """The processes, the model or the run are not as AsyncDiff needs them; the message says what to do."""


class AsyncDiffCommunicationError(AsyncDiffError):
    """A rank is gone, is too slow, or is at another place of the run.

    Attributes:
        rank: this process, counted within the group.
        stage: the stage that it computes.
        step: denoiser call of the run, counted from 0; None outside of a run.
        peer: the rank that it waited for; None where it was all of them.
    """

    def __init__(self, message: str, *, rank: int, stage: int, step: int | None, peer: int | None) -> None:
        super().__init__(message)
        self.rank = rank
        self.stage = stage
        self.step = step
        self.peer = peer

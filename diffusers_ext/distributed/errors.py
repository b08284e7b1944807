"""The one error of this room."""


class CommunicationError(RuntimeError):
    """A message did not come or go in time, a peer is gone, or the ranks disagree.

    Attributes:
        rank: this process, counted within the group.
        peer: the process that it waited for; None where it was all of them.
        what: which message or agreement.
    """

    def __init__(self, message: str, *, rank: int, peer: int | None, what: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.what = what

"""The state of one run of calls of one kind."""

from dataclasses import dataclass, field

from torch import Tensor

from .arguments import Signature
from .mailbox import Mailbox
from .plan import Plan
from .results import Results
from .rounds import Rounds
from .trace import DenoiserTrace, Label, OutputSpec
from .unit_timer import UnitTimer


@dataclass
class Stream:
    """The calls of one kind in one run.

    Attributes:
        rounds: the schedule.
        signature: what all its calls must look like.
        trace: of its first call.
        plan: None until the costs are measured.
        timer: measures them.
        output: of the denoiser.
        store: what the stages gave in the last round, or in the last exact call; with several ranks only the latter.
        older: what they gave in the one before, for extrapolation.
        times: timesteps of the calls that gave both, the older first.
        replays: with `simulate`, results of the calls to come in this round.
        mailbox, results: with several ranks, from the first round on.
    """

    rounds: Rounds
    signature: Signature
    trace: DenoiserTrace | None = None
    plan: Plan | None = None
    timer: UnitTimer | None = None
    output: OutputSpec | None = None
    store: dict[Label, Tensor] = field(default_factory=dict)
    older: dict[Label, Tensor] = field(default_factory=dict)
    times: list[float | None] = field(default_factory=list)
    replays: dict[int, list[Tensor]] = field(default_factory=dict)
    mailbox: Mailbox | None = None
    results: Results | None = None

    def note_time(self, time: float | None) -> None:
        """The stages gave their outputs at this timestep."""
        self.times = [*self.times[-1:], time]

    def drain(self) -> None:
        """Wait for activations under way, which perhaps nobody will read any more."""
        if self.mailbox is not None:
            self.mailbox.drain()

    def settle(self) -> None:
        """The run is over: wait for everything under way."""
        for box in (self.mailbox, self.results):
            if box is not None:
                box.settle()

    def abandon(self) -> None:
        """The call failed: send what is owed, marked as invalid."""
        for box in (self.mailbox, self.results):
            if box is not None:
                box.abandon()

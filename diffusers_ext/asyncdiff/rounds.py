"""The paper's schedule as arithmetic: which call of a run does what, and on which timestep each stage conditions.

Notation: calls k = 0..T-1, N stages, stride S, warm-up W, time shift d in {0, 1}. Rank r < N - 1 holds stage r; the
last stage is there S times: replica S - 1 on rank N - 1, replica j < S - 1 on rank N + j.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """The schedule of a run.

    Attributes:
        num_stages: N.
        stride: S.
        warmup_steps: W.
        time_shift: d.
        num_calls: T, or None where it is not known; then no round is known to be the last.
    """

    num_stages: int
    stride: int
    warmup_steps: int
    time_shift: bool = False
    num_calls: int | None = None

    @property
    def num_ranks(self) -> int:
        """N + S - 1."""
        return self.num_stages + self.stride - 1

    def position(self, call: int) -> tuple[int, int] | None:
        """(round b, place j in it) of call k = W + b S + j; None in the warm-up. A round computes at j = 0."""
        return None if call < self.warmup_steps else divmod(call - self.warmup_steps, self.stride)

    def first_call(self, round_: int) -> int:
        """k_b = W + b S."""
        return self.warmup_steps + round_ * self.stride

    def is_last(self, round_: int) -> bool:
        """Whether the run is known to end with this round."""
        return self.num_calls is not None and self.first_call(round_ + 1) >= self.num_calls

    def num_results(self, round_: int) -> int:
        """How many calls the round serves: S, fewer in the last one."""
        if self.num_calls is None:
            return self.stride
        return min(self.stride, self.num_calls - self.first_call(round_))

    def stage_of(self, rank: int) -> int:
        """The stage that a rank computes."""
        return min(rank, self.num_stages - 1)

    def replica_of(self, rank: int) -> int | None:
        """Which replica of the last stage a rank is; None where it computes another stage."""
        if rank < self.num_stages - 1:
            return None
        return self.stride - 1 if rank == self.num_stages - 1 else rank - self.num_stages

    def rank_of_replica(self, replica: int) -> int:
        """Where replica j of the last stage is; its output is call k_b + j's."""
        return self.num_stages - 1 if replica == self.stride - 1 else self.num_stages + replica

    def ranks_of(self, stage: int) -> range:
        """The ranks that compute a stage."""
        return range(stage, stage + 1) if stage < self.num_stages - 1 else range(self.num_stages - 1, self.num_ranks)

    def call_of_timestep(self, round_: int, rank: int) -> int:
        """k' of the timestep t[k'] that a rank's stage conditions on: `min(k_b + S - 1, T - 1) - d`.

        For replica j of the last stage `min(k_b + j, T - 1) - d`.
        """
        replica = self.replica_of(rank)
        call = self.first_call(round_) + (self.stride - 1 if replica is None else replica)
        if self.num_calls is not None:
            call = min(call, self.num_calls - 1)
        return call - int(self.time_shift)

    def is_needed(self, round_: int, rank: int) -> bool:
        """Whether anybody reads what a rank computes in a round: in the last one only outputs of calls that exist."""
        if not self.is_last(round_):
            return True
        replica = self.replica_of(rank)
        return replica is not None and replica < self.num_results(round_)

"""What a rank did since AsyncDiff was applied."""

from dataclasses import dataclass


@dataclass
class AsyncDiffStats:
    """Of this rank, since apply; one object per denoiser, kept up to date.

    Attributes:
        rank: this process within its N + S - 1; None when it plays all of them (`simulate`).
        stage: the stage that it computes; None with `simulate`.
        runs: sampling runs begun, of each kind of call.
        exact_calls: denoiser calls computed as they are, in the warm-up.
        computed_calls: calls at which a round was computed.
        replayed_calls: calls that gave what the round before had computed for them (`stride` above 1).
        compute_s: seconds in denoiser calls without waiting, on the host's clock (accelerators run behind it).
        wait_s: seconds spent waiting for other ranks.
        bytes_sent: by this rank.
        bytes_received: by this rank.
        bound: how much sooner the last run could be at best, by the costs of the plan.
    """

    rank: int | None = None
    stage: int | None = None
    runs: int = 0
    exact_calls: int = 0
    computed_calls: int = 0
    replayed_calls: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    bound: float = 1.0

    @property
    def wait_share(self) -> float:
        """Waiting over all time in denoiser calls, in [0, 1]."""
        total = self.compute_s + self.wait_s
        return self.wait_s / total if total else 0.0

    def __str__(self) -> str:
        who = "all ranks in one process" if self.rank is None else f"rank {self.rank}, stage {self.stage}"
        return (
            f"{who}: {self.runs} runs, {self.exact_calls} exact calls, {self.computed_calls} rounds, "
            f"{self.replayed_calls} replayed; {self.compute_s:.2f} s of computation, {self.wait_s:.2f} s of waiting "
            f"({self.wait_share:.0%}), {self.bytes_sent / 1e6:.1f} MB sent, {self.bytes_received / 1e6:.1f} MB "
            f"received; bound {self.bound:.2f}x"
        )

"""What a rank did since Video-Infinity was applied."""

from dataclasses import dataclass


@dataclass
class VideoInfinityStats:
    """Of this rank, since apply; one object per denoiser, kept up to date.

    Attributes:
        rank: this process; None where one process holds the whole video.
        clips: of the last call.
        num_frames: of the last call's video.
        calls: of the denoiser.
        frames_computed: frames that this rank computed, over all calls, whatever the batch.
        bytes_sent: by this rank.
        rounds: of messages.
        compute_s: seconds in denoiser calls without waiting, on the host's clock (accelerators run behind it).
        wait_s: seconds spent waiting for other ranks.
    """

    rank: int | None = None
    clips: int = 0
    num_frames: int = 0
    calls: int = 0
    frames_computed: int = 0
    bytes_sent: int = 0
    rounds: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0

    def __str__(self) -> str:
        who = "one process" if self.rank is None else f"rank {self.rank}"
        return (
            f"{who}: {self.calls} calls, {self.num_frames} frames in {self.clips} clips; {self.compute_s:.2f} s of "
            f"computation, {self.wait_s:.2f} s of waiting, {self.bytes_sent / 1e6:.1f} MB sent in {self.rounds} rounds"
        )

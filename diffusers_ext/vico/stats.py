"""What guidance did in the runs of a pipeline."""

from dataclasses import dataclass, field


@dataclass
class VicoStats:
    """Since Vico was enabled on a pipeline.

    Attributes:
        runs: denoising loops with something to guide.
        guided_steps: denoising steps at which the flow was measured.
        updates: updates of latents, those of all samples and iterations together.
        most_drift: the most that one step has moved a sample, root mean square in the latents' units.
        seconds: taken by guidance, in all.
        reasons: why runs were left as they were, with how many of them.
    """

    runs: int = 0
    guided_steps: int = 0
    updates: int = 0
    most_drift: float = 0.0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)

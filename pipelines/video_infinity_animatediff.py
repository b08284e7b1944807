"""AnimateDiff for long videos by Video-Infinity, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AnimateDiffPipeline

from diffusers_ext import video_infinity


class VideoInfinityAnimateDiffPipeline(video_infinity.VideoInfinityMixin, AnimateDiffPipeline):
    """`AnimateDiffPipeline` for videos much longer than its motion modules were trained on.

    Video-Infinity (https://huggingface.co/papers/2406.16260). Alone it makes the video clip by clip; with N processes,
    under `torchrun --nproc_per_node N script.py` or `accelerate launch --multi_gpu --num_processes N script.py`, each
    makes one clip:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_video_infinity(num_clips=state.num_processes, local_frames=8)
        noise = torch.Generator().manual_seed(0)  # the same in each process
        pipe("a ship in a storm", num_frames=16 * state.num_processes, generator=noise, output_path="ship.mp4")
        pipe.disable_video_infinity()
    ```

    Motion modules know 32 positions of frames. A longer video counts positions within each clip and its
    neighbourhood (`frame_positions`), so a clip and `local_frames` on both sides of it must fit the 32; one process
    with `num_clips=N` makes the frames that N processes make.

    Without `enable_video_infinity` it is the base pipeline.
    """

    def __call__(
        self,
        prompt: str | Sequence[str] | Mapping[int, str] | None = None,
        num_frames: int = 16,
        *args: Any,
        noise: str = "sliced",
        gather: str = "rank0",
        output_path: str | os.PathLike[str] | None = None,
        output_fps: float = 8,
        decode_chunk_size: int = 16,
        prompt_transition_frames: int = 0,
        **kwargs: Any,
    ) -> Any:
        """The base pipeline's call, for one video.

        Args:
            prompt: one, or several for the frames of the one video: a list, spread evenly over them, or {first frame:
                prompt}.
            num_frames: of the whole video, whatever the number of processes.
            *args: as in the base pipeline, from `height` on; give them by name.
            noise: `"sliced"` (what the base pipeline draws), `"per_frame"` or `"rescheduled"`, see
                `diffusers_ext.video_infinity.prepare_clip_latents`.
            gather: `"rank0"`: process 0 returns the video, the others `frames=None`; `"all"`; or `"none"`: each its
                clip. Latents (`output_type="latent"`) come whole to all.
            output_path: a video file that process 0 writes as the frames come, or a folder for PNG files; the output
                then has `frames=None`.
            output_fps: of the file.
            decode_chunk_size: frames decoded at once.
            prompt_transition_frames: over so many frames a prompt changes to the next; 0: at once.
            **kwargs: see the base pipeline.

        Raises:
            ValueError, TypeError: naming the argument, its value and what is expected, before any work.
        """
        if args:
            raise TypeError("Give arguments from `height` on by name.")
        return self.sample_long_video(
            prompt,
            num_frames,
            noise=noise,
            gather=gather,
            output_path=output_path,
            output_fps=output_fps,
            decode_chunk_size=decode_chunk_size,
            prompt_transition_frames=prompt_transition_frames,
            forward_arguments={},
            call_arguments=kwargs,
        )

"""Wan with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import WanPipeline

from diffusers_ext import asyncdiff


class AsyncDiffWanPipeline(asyncdiff.AsyncDiffMixin, WanPipeline):
    """`WanPipeline` whose transformer is split over processes (https://huggingface.co/papers/2406.06911).

    Each process runs the same lines, under `torchrun --nproc_per_node 2 script.py` or `accelerate launch --multi_gpu
    --num_processes 2 script.py`, on GPUs and on CPUs:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_async_diff(num_stages=2)
        noise = torch.Generator().manual_seed(0)
        output = pipe("a lighthouse in a storm", num_frames=81, generator=noise, output_rank=0)
        if state.process_index == 0:
            export_to_video(output.frames[0], "video.mp4", fps=16)
        pipe.disable_async_diff()
    ```

    The conditional and the unconditional call of a step have each their own warm-up and their own activations. Of Wan
    2.2 both transformers are split; each warms up when its turn comes.

    The authors have no setting for Wan; those of their class are ours too (`num_stages=2, stride=1, warmup_steps=1`).
    Default topology `"auto"`, which for transformers is the chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the frames.
    """

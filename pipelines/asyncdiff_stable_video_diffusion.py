"""Stable Video Diffusion with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import StableVideoDiffusionPipeline

from diffusers_ext import asyncdiff


class AsyncDiffStableVideoDiffusionPipeline(asyncdiff.AsyncDiffMixin, StableVideoDiffusionPipeline):
    """`StableVideoDiffusionPipeline` whose UNet is split over processes (https://huggingface.co/papers/2406.06911).

    Each process runs the same lines, under `torchrun --nproc_per_node 2 script.py` or `accelerate launch --multi_gpu
    --num_processes 2 script.py`, on GPUs and on CPUs:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_async_diff(num_stages=2)
        noise = torch.Generator().manual_seed(0)
        output = pipe(image, decode_chunk_size=8, generator=noise, output_rank=0)
        if state.process_index == 0:
            export_to_video(output.frames[0], "video.mp4", fps=7)
        pipe.disable_async_diff()
    ```

    The first frame is an input of the UNet's call and therefore never stale.

    Authors' default for Stable Video Diffusion: `num_stages=2, stride=1, warmup_steps=1` (its default of steps), two
    processes. Default topology `"auto"`: wrap where its speed-up bound is at least 0.9 of the chain's, else chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the frames.
    """

"""AnimateDiff with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import AnimateDiffPipeline

from diffusers_ext import asyncdiff


class AsyncDiffAnimateDiffPipeline(asyncdiff.AsyncDiffMixin, AnimateDiffPipeline):
    """`AnimateDiffPipeline` whose UNet is split over processes (https://huggingface.co/papers/2406.06911).

    Each process runs the same lines, under `torchrun --nproc_per_node 2 script.py` or `accelerate launch --multi_gpu
    --num_processes 2 script.py`, on GPUs and on CPUs:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_async_diff(num_stages=2)
        noise = torch.Generator().manual_seed(0)
        output = pipe("a lighthouse in a storm", num_frames=16, generator=noise, output_rank=0)
        if state.process_index == 0:
            export_to_video(output.frames[0], "video.mp4", fps=8)
        pipe.disable_async_diff()
    ```

    Motion modules are layers of their own that the splitter may put on another process than the layer before.

    Authors' default for AnimateDiff: `num_stages=2, stride=1, warmup_steps=2` (DDIM with `timestep_spacing="linspace"`
    and linear betas), two processes. Default topology `"auto"`: wrap where its speed-up bound is at least 0.9 of the
    chain's, else chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the frames.
    """

"""Stable Diffusion x4 upscaler with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import StableDiffusionUpscalePipeline

from diffusers_ext import asyncdiff


class AsyncDiffStableDiffusionUpscalePipeline(asyncdiff.AsyncDiffMixin, StableDiffusionUpscalePipeline):
    """`StableDiffusionUpscalePipeline` whose UNet is split over processes (https://huggingface.co/papers/2406.06911).

    Each process runs the same lines, under `torchrun --nproc_per_node 2 script.py` or `accelerate launch --multi_gpu
    --num_processes 2 script.py`, on GPUs and on CPUs:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_async_diff(num_stages=2)
        noise = torch.Generator().manual_seed(0)
        output = pipe("a lighthouse in a storm", image=small, generator=noise, output_rank=0)
        if state.process_index == 0:
            output.images[0].save("image.png")
        pipe.disable_async_diff()
    ```

    The small image is an input of the UNet's call and therefore never stale.

    Authors' default for the x4 upscaler: `num_stages=2, stride=1, warmup_steps=1` (its default of steps), two
    processes. Default topology `"auto"`: wrap where its speed-up bound is at least 0.9 of the chain's, else chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the images.
    """

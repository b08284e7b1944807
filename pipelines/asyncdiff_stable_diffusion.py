"""Stable Diffusion with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import StableDiffusionPipeline

from diffusers_ext import asyncdiff


class AsyncDiffStableDiffusionPipeline(asyncdiff.AsyncDiffMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` whose UNet is split over processes (https://huggingface.co/papers/2406.06911).

    Each process runs the same lines, under `torchrun --nproc_per_node 2 script.py` or `accelerate launch --multi_gpu
    --num_processes 2 script.py`, on GPUs and on CPUs:

    ```python
    with diffusers_ext.distributed.distributed_session() as state:
        pipe.to(state.device)
        pipe.enable_async_diff(num_stages=2)
        noise = torch.Generator().manual_seed(0)
        output = pipe("a lighthouse in a storm", generator=noise, output_rank=0)
        if state.process_index == 0:
            output.images[0].save("image.png")
        pipe.disable_async_diff()
    ```

    Any UNet of Stable Diffusion 1.x and 2.x, fine-tunes included: the split is found for the model, not looked up.

    Authors' default for Stable Diffusion: `num_stages=3, stride=2, warmup_steps=9` (50 steps), four processes. Default
    topology `"auto"`: wrap where its speed-up bound is at least 0.9 of the chain's, else chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the images.
    """

"""FLUX.1 with AsyncDiff, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import FluxPipeline

from diffusers_ext import asyncdiff


class AsyncDiffFluxPipeline(asyncdiff.AsyncDiffMixin, FluxPipeline):
    """`FluxPipeline` whose transformer is split over processes (https://huggingface.co/papers/2406.06911).

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

    Double-stream and single-stream blocks are cut as one sequence. With `true_cfg_scale` above 1 the two calls of a
    step have their own warm-up and their own activations.

    The authors have no setting for FLUX.1; those of their class are ours too (`num_stages=2, stride=1,
    warmup_steps=1`). Default topology `"auto"`, which for transformers is the chain.

    Without `enable_async_diff` it is the base pipeline. The call takes one more argument, `output_rank`: only that
    process decodes, the others return None in place of the images.
    """

"""AnimateDiff with Vico, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import AnimateDiffPipeline

from diffusers_ext import vico


class VicoAnimateDiffPipeline(vico.VicoMixin, AnimateDiffPipeline):
    """`AnimateDiffPipeline` that gives every word of the prompt its influence.

    Vico (https://huggingface.co/papers/2407.06182):

    ```python
    pipe.enable_vico()
    frames = pipe("a dog and a red car on a beach", subjects=["dog", "red car"], num_inference_steps=50).frames[0]
    print(pipe.vico_trace[-1]["scores"])  # influence of each word, before the last update
    pipe.disable_vico()
    ```

    The authors sample AnimateDiff with DDIM and 50 steps. IP-Adapters stay part of the call; the flow is that of the
    text. With FreeInit each of its rounds is guided. FreeNoise is refused.

    Without `enable_vico` it is the base pipeline.
    """

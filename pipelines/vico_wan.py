"""Wan with Vico, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import WanPipeline

from diffusers_ext import vico


class VicoWanPipeline(vico.VicoMixin, WanPipeline):
    """`WanPipeline` that gives every word of the prompt its influence.

    Vico (https://huggingface.co/papers/2407.06182), which the authors tried on UNets only:

    ```python
    pipe.enable_vico(checkpointing=True)
    frames = pipe("a dog and a red car on a beach", subjects=["dog", "red car"], num_frames=81).frames[0]
    print(pipe.vico_trace[-1]["scores"])  # influence of each word, before the last update
    pipe.disable_vico()
    ```

    Temporal attention is read off the full attention, along each place of the grid. Of Wan 2.2 both transformers are
    guided, each at its steps.

    Without `enable_vico` it is the base pipeline.
    """

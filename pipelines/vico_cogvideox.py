"""CogVideoX with Vico, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import CogVideoXPipeline

from diffusers_ext import vico


class VicoCogVideoXPipeline(vico.VicoMixin, CogVideoXPipeline):
    """`CogVideoXPipeline` that gives every word of the prompt its influence.

    Vico (https://huggingface.co/papers/2407.06182); the authors' CogVideoX pipeline cannot run as released:

    ```python
    pipe.enable_vico(checkpointing=True)
    frames = pipe("a dog and a red car on a beach", subjects=["dog", "red car"], num_frames=49).frames[0]
    print(pipe.vico_trace[-1]["scores"])  # influence of each word, before the last update
    pipe.disable_vico()
    ```

    Text and video share one attention: its text columns are the cross-attention, and temporal attention is read along
    each place of the grid.

    Without `enable_vico` it is the base pipeline.
    """

"""AnimateDiff video to video with Vico, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from diffusers import AnimateDiffVideoToVideoPipeline

from diffusers_ext import vico


class VicoAnimateDiffVideoToVideoPipeline(vico.VicoMixin, AnimateDiffVideoToVideoPipeline):
    """`AnimateDiffVideoToVideoPipeline` that gives every word of the prompt its influence.

    Vico (https://huggingface.co/papers/2407.06182), for editing a video by a new prompt:

    ```python
    pipe.enable_vico()
    output = pipe(video=video, prompt="a dog and a red car on a beach", subjects=["dog", "red car"], strength=0.7)
    print(pipe.vico_trace[-1]["scores"])  # influence of each word, before the last update
    pipe.disable_vico()
    ```

    `guided_fraction` and `refine` count the steps that are really run, those that `strength` leaves.

    Without `enable_vico` it is the base pipeline.
    """

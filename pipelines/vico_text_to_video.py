"""Text to video with Vico, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from typing import Any

from diffusers import TextToVideoSDPipeline

from diffusers_ext import vico


class VicoTextToVideoPipeline(vico.VicoMixin, TextToVideoSDPipeline):
    """`TextToVideoSDPipeline` that gives every word of the prompt its influence.

    Vico (https://huggingface.co/papers/2407.06182), for ModelScope, Zeroscope and VideoCrafter2:

    ```python
    pipe.enable_vico()
    frames = pipe("a dog and a red car on a beach", subjects=["dog", "red car"], num_inference_steps=50).frames[0]
    print(pipe.vico_trace[-1]["scores"])  # influence of each word, before the last update
    pipe.disable_vico()
    ```

    The authors sample VideoCrafter2 and Zeroscope with DPM-Solver++, 50 steps and a guidance scale of 12.

    Without `enable_vico` it is the base pipeline.
    """

    def __call__(
        self,
        *args: Any,
        token_indices: Any = None,
        subjects: Any = None,
        text_range: Any = None,
        fps: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The call of `VicoMixin`.

        Args:
            *args, token_indices, subjects, text_range, **kwargs: see `VicoMixin` and the base pipeline.
            fps: told to VideoCrafter's UNet (24 in the authors' videos, and unless given); None for others.

        Raises:
            ValueError: `fps` with another UNet, or while Vico is not enabled; and see `VicoMixin`.
        """
        words = {"token_indices": token_indices, "subjects": subjects, "text_range": text_range}
        return self.call_with_vico(args, kwargs, words, further_arguments=self.frame_rate_arguments(fps))

"""U-ViT with a learned cache, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

import operator
import os
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext import hub, learning_to_cache


class LearnedCacheUViTPipeline(learning_to_cache.LearnedCacheMixin, DiffusionPipeline):
    """Images of a class by U-ViT, which can reuse layers of the evaluation before, by a trained router
    (https://huggingface.co/papers/2406.01733).

    ```python
    pipe.enable_learned_cache(router="org/name")
    images = pipe(class_labels=[207], num_inference_steps=20).images
    pipe.learned_cache_stats
    pipe.disable_learned_cache()
    ```

    Args:
        vae: decodes latents; its config has the `scaling_factor`, 0.18215 for U-ViT's.
        transformer: a `UViTTransformer2DModel` with class labels.
        scheduler: a `SinglestepDPMSolver2Scheduler`, whose grid U-ViT routers are trained on, or another that you set.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        transformer: learning_to_cache.UViTTransformer2DModel,
        scheduler: SchedulerMixin,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | list[int],
        guidance_scale: float = 1.4,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per class label.

        Args:
            class_labels: class ids.
            guidance_scale: classifier-free guidance as everywhere in diffusers, `null + scale * (cond - null)`, off at
                1 or below. U-ViT's authors count from 0: their 0.4 is 1.4 here. The null class is the last one.
            generator: of the initial noise, one or one per image.
            num_inference_steps: evaluations of the transformer, for `SinglestepDPMSolver2Scheduler` an even number
                (two a step); with a learned cache, the router's `num_steps`.
            latents: (images, channels, size, size), the initial noise, instead of drawing it.
            output_type: `"pil"`, `"np"`, `"pt"`, or `"latent"` for latents as the transformer has them.
            return_dict: give an `ImagePipelineOutput` instead of a tuple.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: an argument is out of range, or the learned cache is for another number of evaluations.
        """
        config = self.transformer.config
        if config.num_classes is None:
            raise ValueError("This pipeline draws by class, and the transformer has `num_classes=None`.")
        try:
            labels = [operator.index(label) for label in np.atleast_1d(class_labels)]
        except TypeError:
            raise TypeError(
                f"`class_labels` must be an integer or a list of integers, got {class_labels!r}."
            ) from None
        if not labels or not all(0 <= label < config.num_classes for label in labels):
            raise ValueError(f"`class_labels` must lie in 0..{config.num_classes - 1}, got {class_labels}.")
        if isinstance(generator, list) and len(generator) not in (1, len(labels)):
            raise ValueError(f"`generator` must be one or one per image, {len(labels)}, got {len(generator)}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")
        self.scheduler.set_timesteps(num_inference_steps)
        self.start_learned_cache_run(len(self.scheduler.timesteps))

        device, dtype = self._execution_device, self.transformer.dtype
        # Between evaluations latents stay in float32, as the authors have them.
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(device, torch.float32) * self.scheduler.init_noise_sigma
        labels = torch.tensor(labels, device=device)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_classes - 1)])

        for timestep in self.progress_bar(self.scheduler.timesteps):
            scaled = self.scheduler.scale_model_input(latents, timestep)
            doubled = torch.cat([scaled, scaled]) if guided else scaled
            timesteps = torch.as_tensor(timestep, device=device).expand(len(doubled))
            noise = self.transformer(doubled.to(dtype), timestep=timesteps, class_labels=labels).sample.float()
            if guided:
                conditional, null = noise.chunk(2)
                noise = null + guidance_scale * (conditional - null)
            latents = self.scheduler.step(noise, timestep, latents).prev_sample

        images = latents
        if output_type != "latent":
            images = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
            images = self.image_processor.postprocess(images, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As diffusers' `save_pretrained`, and the files by which a repository's components of ours are found."""
        hub.write_component_modules(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

"""DiT with a learned cache, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`."""

from contextlib import ExitStack, contextmanager

import torch
from diffusers import DDIMScheduler, DiTPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_ext import learning_to_cache


class LearnedCacheDiTPipeline(learning_to_cache.LearnedCacheMixin, DiTPipeline):
    """`DiTPipeline` that can reuse layers of the step before, by a trained router (https://huggingface.co/papers/2406.01733).

    ```python
    pipe.enable_learned_cache(router="org/name")
    images = pipe(class_labels=[207], num_inference_steps=20).images
    pipe.learned_cache_stats
    pipe.disable_learned_cache()
    ```

    A checkpoint's `DDIMScheduler` is replaced for the time of a call by `RespacedDDIMScheduler`, whose grid routers
    are trained on; any other scheduler that you set is used as it is. Saving writes the base pipeline's
    `model_index.json`.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
        guidance_channels: int | None = None,
        original_embeddings: bool = False,
    ) -> ImagePipelineOutput | tuple:
        """Draw one image per class label.

        Args:
            class_labels: class ids; `get_label_ids` finds them by name.
            guidance_scale: classifier-free guidance, off at 1 or below.
            generator: of the initial noise, one or one per image.
            num_inference_steps: evaluations of the transformer; with a learned cache, the router's `num_steps`.
            output_type: `"pil"`, `"np"` or `"pt"`.
            return_dict: give an `ImagePipelineOutput` instead of a tuple.
             guidance_channels: how many latent channels guidance applies to; all when None. The authors of DiT guide
                the first 3 of 4: use 3 with their checkpoints.
            original_embeddings: embed timesteps as the original DiT code; True for the authors' checkpoints, False for
                models trained with diffusers.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple of them.

        Raises:
            ValueError: the learned cache is for another number of evaluations, or `guidance_channels` is out of range.
        """
        latent_channels = self.transformer.config.in_channels
        guided_channels = latent_channels if guidance_channels is None else guidance_channels
        if not 1 <= guided_channels <= latent_channels:
            raise ValueError(f"`guidance_channels` must lie in 1..{latent_channels}, got {guidance_channels}.")
        with self._respaced_scheduler():
            self.scheduler.set_timesteps(num_inference_steps)
            self.start_learned_cache_run(len(self.scheduler.timesteps))

        device = self._execution_device
        size = self.transformer.config.sample_size
        latents = randn_tensor(
            (len(class_labels), latent_channels, size, size),
            generator=generator,
            device=device,
            dtype=self.transformer.dtype,
        )
        labels = torch.tensor(class_labels, device=device).reshape(-1)
        guided = guidance_scale > 1
        if guided:
            null_class = self.transformer.config.num_embeds_ada_norm
            labels = torch.cat([labels, torch.full_like(labels, null_class)])

        with ExitStack() as call:
            call.enter_context(self._respaced_scheduler())
            if original_embeddings:
                call.enter_context(learning_to_cache.original_dit_embeddings(self.transformer))
            self.scheduler.set_timesteps(num_inference_steps)
            for timestep in self.progress_bar(self.scheduler.timesteps):
                # Both halves of the input are the conditional half's latents.
                doubled = torch.cat([latents, latents]) if guided else latents
                doubled = self.scheduler.scale_model_input(doubled, timestep)
                timesteps = torch.as_tensor(timestep, device=device).expand(len(doubled))
                output = self.transformer(doubled, timestep=timesteps, class_labels=labels).sample
                noise = output[:, :latent_channels]  # what follows is learned sigma
                if guided:
                    conditional, null = noise.chunk(2)
                    mixed = null + guidance_scale * (conditional - null)
                    own = noise[:, guided_channels:]
                    noise = torch.cat([torch.cat([mixed, mixed])[:, :guided_channels], own], dim=1)
                latents = self.scheduler.step(noise, timestep, doubled).prev_sample
                if guided:
                    latents = latents.chunk(2)[0]

        images = self.vae.decode(1 / self.vae.config.scaling_factor * latents).sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @contextmanager
    def _respaced_scheduler(self):
        given = self.scheduler
        if isinstance(given, DDIMScheduler):
            self.scheduler = learning_to_cache.RespacedDDIMScheduler.from_config(given.config)
        try:
            yield
        finally:
            self.scheduler = given

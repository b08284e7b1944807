"""The mixin that gives a pipeline `enable_vico`, words to equalise, and heat maps of them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from ..hooks import find_hook
from ..videocrafter import VideoCrafterUNet3DConditionModel
from .apply import HOOK, applied_config, apply_vico, find_denoisers, is_vico_applied, remove_vico
from .attribution import VicoAttribution
from .config import VicoConfig
from .driver import DenoisingRun
from .heatmaps import HeatmapRecorder, VicoHeatmaps
from .stats import VicoStats
from .words import resolve_tokens
from .words_of_call import SampleWords, words_by_sample


logger = logging.getLogger(__name__)

# Of one prompt: a token's position or several for each word.
TokenIndices = Sequence[int | Sequence[int]]


class VicoMixin:
    """For text-to-video pipelines: `class MyPipeline(VicoMixin, WanPipeline)`.

    The pipeline's own loop runs; guidance acts on the latents that it holds, inside of the denoiser's calls.
    """

    _vico_run: DenoisingRun | None = None
    _vico_trace: Sequence[dict[str, Any]] = ()
    _vico_stats: VicoStats | None = None
    _vico_recorder: HeatmapRecorder | None = None
    _vico_denoisers: Sequence[weakref.ref[nn.Module]] = ()

    def enable_vico(self, config: VicoConfig | None = None, **overrides: Any) -> None:
        """Let the pipeline's calls equalise the influence of words.

        Args:
            config: complete configuration; default: `VicoConfig()`.
            **overrides: fields of `VicoConfig`, over those of `config`.

        Raises:
            ValueError, TypeError, NotImplementedError: as `VicoConfig` and `apply_vico`; `TypeError` also for a
                pipeline whose loop has no callback at the end of a step.
        """
        if config is not None and not isinstance(config, VicoConfig):
            raise TypeError(f"`config` must be a VicoConfig, got {type(config).__name__}.")
        config = VicoConfig(**overrides) if config is None else dataclasses.replace(config, **overrides)
        parameters = inspect.signature(super().__call__).parameters
        if "callback_on_step_end" not in parameters and "callback" not in parameters:
            raise TypeError(
                f"Vico follows a pipeline's loop by its callback, and {type(self).__name__} takes none "
                "(`callback_on_step_end` or `callback`)."
            )
        apply_vico(self, config)
        self._vico_denoisers = [weakref.ref(denoiser) for denoiser in find_denoisers(self)]
        self._vico_stats, self._vico_trace = VicoStats(), []

    def disable_vico(self) -> None:
        """Take Vico off; the denoiser is then as it was before, also one that has been exchanged since."""
        exchanged = [one for one in self._enabled_denoisers() if one not in find_denoisers(self)]
        self._vico_denoisers = ()
        for denoiser in exchanged:
            remove_vico(denoiser)
        if self.vico_enabled or not exchanged:
            remove_vico(self)

    @property
    def vico_enabled(self) -> bool:
        """Whether it is enabled."""
        return is_vico_applied(self)

    @property
    def vico_trace(self) -> list[dict[str, Any]]:
        """Of the latest call under Vico, an entry for each guided step; see `DenoisingRun.trace`."""
        return list(self._vico_trace)

    @property
    def vico_stats(self) -> VicoStats | None:
        """What guidance did since Vico was enabled; None while it is not."""
        return self._vico_stats if is_vico_applied(self) else None

    def __call__(
        self,
        *args: Any,
        token_indices: TokenIndices | Sequence[TokenIndices] | None = None,
        subjects: Sequence[str] | Sequence[Sequence[str]] | None = None,
        text_range: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base pipeline's call; with Vico enabled, the first steps are guided.

        Args:
            *args: as in the base pipeline.
            token_indices: the words, each a position in the tokenized prompt (0 is CLIP's begin token) or several; or
                such a list for each prompt.
            subjects: the words, or phrases, as they stand in the prompt, whatever the case; or such a list for each
                prompt. Without `subjects` and `token_indices`: all nouns and verbs, which needs NLTK and its data.
            text_range: positions of the prompt's tokens, half-open, without begin, end and padding; or one for each
                prompt. Needed with `prompt_embeds`, where there is no prompt to count in.
            **kwargs: as in the base pipeline.

        Returns:
            the base pipeline's output. `vico_trace` and `vico_stats` tell what guidance did.

        Raises:
            ValueError, TypeError, ImportError: words that the prompt lacks, lists of another length than the prompts,
                and see `resolve_tokens`; before any work.
            RuntimeError: the denoiser was replaced after `enable_vico`.
        """
        words = {"token_indices": token_indices, "subjects": subjects, "text_range": text_range}
        return self.call_with_vico(args, kwargs, words)

    def call_with_vico(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        words: dict[str, Any],
        *,
        further_arguments: Mapping[str, Any] | None = None,
    ) -> Any:
        """For `__call__` of subclasses.

        Args:
            args, kwargs: of the base pipeline's call.
            words: `token_indices`, `subjects` and `text_range` of the call.
            further_arguments: given to the denoiser in each of its calls.
        """
        self._check_denoisers()
        config = applied_config(self)
        if config is None:
            given = [name for name, value in words.items() if value is not None]
            if given:
                logger.warning(f"Vico is not enabled, so that `{given[0]}` changes nothing; call `enable_vico` first.")
            return super().__call__(*args, **kwargs)
        parameters = inspect.signature(super().__call__).parameters
        arguments = {**_named(args, parameters), **kwargs}
        recorder = self._vico_recorder
        samples = self._words_of(arguments, parameters, config, recorder is not None, **words)

        def observer(step: int, found: VicoAttribution) -> None:
            recorder.add(found, run.words)

        run = DenoisingRun(
            self,
            config,
            samples,
            self._vico_stats,
            further_arguments=further_arguments,
            observer=observer if recorder is not None and samples else None,
        )
        self._vico_trace = run.trace
        arguments |= _callbacks(self, run, arguments, parameters)
        with self._following(run):
            output = super().__call__(**arguments)
        run.finish()
        return output

    def vico_heatmaps(self, *args: Any, config: VicoConfig | None = None, **kwargs: Any) -> VicoHeatmaps:
        """A call that also tells where each word goes, frame by frame: the flow of words, in the mean over the steps.

        While Vico is enabled the call is guided as always, and measured behind the guidance of each step. Else nothing
        is guided: the output is the base pipeline's, bit for bit. Each step costs a forward more. One word is enough.

        Args:
            *args, **kwargs: of the pipeline's call, with `subjects` or `token_indices`.
            config: how to measure while Vico is not enabled; default: `VicoConfig()`. Its schedule is not looked at.

        Returns:
            the call's output, a map for each word, and their scores by step; draw them by `overlay_heatmaps`.

        Raises:
            ValueError: `config` while Vico is enabled, or a prompt without words; before any work.
            RuntimeError: no step was seen, since the loop's latents are not those that Vico knows of.
            Others: as the call and `enable_vico` do.
        """
        if self.vico_enabled and config is not None:
            raise ValueError("`config` is for a pipeline without Vico, and here Vico is enabled with its own.")
        alone = not self.vico_enabled
        if alone:
            self.enable_vico(config, guided_fraction=0.0)
        self._vico_recorder = HeatmapRecorder(applied_config(self).subtoken_reduce)
        try:
            return self._vico_recorder.finish(self(*args, **kwargs))
        finally:
            self._vico_recorder = None
            if alone:
                self.disable_vico()

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        """The base pipeline's, which a guided loop starts with."""
        latents = super().prepare_latents(*args, **kwargs)
        if self._vico_run is None:
            return latents
        given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        if any(one.untyped_storage().data_ptr() == latents.untyped_storage().data_ptr() for one in given):
            latents = latents.clone()  # the caller's own stay as they are
        self._vico_run.begin(latents)
        return latents

    def _apply_free_init(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """FreeInit's, of AnimateDiff, which runs the loop several times."""
        latents, timesteps = super()._apply_free_init(*args, **kwargs)
        if self._vico_run is not None:
            self._vico_run.begin(latents)
        return latents, timesteps

    def frame_rate_arguments(self, fps: float | None) -> dict[str, Any]:
        """What the UNet is told of the frame rate: nothing, unless it is VideoCrafter's.

        Raises:
            ValueError: another UNet, with an `fps`; Vico is not enabled, so that nothing could tell it.
        """
        if fps is None:
            return {}
        denoiser = find_denoisers(self)[0]
        if not isinstance(denoiser, VideoCrafterUNet3DConditionModel):
            raise ValueError(
                f"`fps` conditions VideoCrafter's UNet only, got fps={fps} with a {type(denoiser).__name__}."
            )
        if not self.vico_enabled:
            raise ValueError("`fps` reaches the UNet by Vico: call `enable_vico` first.")
        return {"fps": fps}

    def to_json_string(self) -> str:
        """For `model_index.json`: that of the base pipeline, which loads without this package."""
        config = json.loads(super().to_json_string())
        bases = [cls.__name__ for cls in type(self).__mro__ if cls.__module__.split(".")[0] == "diffusers"]
        if VicoMixin in type(self).__bases__ and bases:
            config["_class_name"] = bases[0]
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _check_denoisers(self) -> None:
        """Whether all denoisers are those that Vico was enabled on, unless it was taken off them."""
        enabled = {id(denoiser) for denoiser in self._enabled_denoisers()}
        if enabled and enabled != {id(denoiser) for denoiser in find_denoisers(self)}:
            raise RuntimeError(
                "Another denoiser has taken the place of one that Vico was enabled on, and is not guided: call "
                "`disable_vico` and `enable_vico`."
            )

    def _enabled_denoisers(self) -> list[nn.Module]:
        """Those that Vico was enabled on and is on still."""
        denoisers = (weak() for weak in self._vico_denoisers)
        return [one for one in denoisers if one is not None and find_hook(one, HOOK) is not None]

    @contextlib.contextmanager
    def _following(self, run: DenoisingRun) -> Iterator[None]:
        hooks = [find_hook(denoiser, HOOK) for denoiser in find_denoisers(self)]
        self._vico_run = run
        for hook in hooks:
            hook.on_call = run.on_call
        try:
            yield
        finally:
            self._vico_run = None
            for hook in hooks:
                hook.on_call = None

    def _words_of(
        self,
        arguments: Mapping[str, Any],
        parameters: Mapping[str, inspect.Parameter],
        config: VicoConfig,
        observed: bool,
        token_indices: Any,
        subjects: Any,
        text_range: Any,
    ) -> list[SampleWords]:
        """Of each prompt; none where nothing is to be done with them."""
        prompt = arguments.get("prompt")
        if token_indices is None and subjects is None and config.guided_fraction == 0 and not observed:
            return []
        if prompt is None:
            groups, ranges = _words_without_prompt(arguments.get("prompt_embeds"), token_indices, subjects, text_range)
        else:
            length = arguments.get("max_sequence_length", _default(parameters, "max_sequence_length"))
            groups, ranges = [], []
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            given = (
                _by_prompt("subjects", subjects, prompt, lambda value: isinstance(value, str)),
                _by_prompt("token_indices", token_indices, prompt, lambda value: isinstance(value, int)),
                _by_prompt("text_range", text_range, prompt, lambda value: isinstance(value, int)),
            )
            for text, names, indices, own_range in zip(prompts, *given, strict=True):
                found, counted = resolve_tokens(
                    self.tokenizer, self._as_tokenized(text), names, indices, max_length=length
                )
                groups.append(found)
                ranges.append(counted if own_range is None else own_range)
        if observed and not all(groups):
            raise ValueError(
                "Heat maps need words of every prompt: name them by `subjects` or `token_indices`, got "
                f"`subjects`={subjects!r} and `token_indices`={token_indices!r}."
            )
        if all(len(one) < 2 for one in groups):
            if config.guided_fraction > 0:
                logger.info("Fewer than two words are chosen, so that there is nothing to equalise: not guided.")
            if not observed:
                return []
        # A sample without words takes part as one with a single word, which is not guided either.
        groups = [one or [[pair[0]]] for one, pair in zip(groups, ranges, strict=True)]
        return words_by_sample(groups, ranges, len(groups), config)

    def _as_tokenized(self, prompt: str) -> str:
        """What the pipeline makes of a prompt before its tokenizer sees it."""
        for cls in type(self).__mro__:
            clean = getattr(sys.modules.get(cls.__module__), "prompt_clean", None)
            if clean is not None and cls.__module__.split(".")[0] == "diffusers":
                return clean(prompt)
        if isinstance(self, TextualInversionLoaderMixin):
            return self.maybe_convert_prompt(prompt, self.tokenizer)
        return prompt


def _named(args: tuple, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    names = [
        name
        for name, parameter in parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if len(args) > len(names):
        raise TypeError(f"The pipeline takes {len(names)} positional arguments, got {len(args)}.")
    return dict(zip(names, args, strict=False))


def _default(parameters: Mapping[str, inspect.Parameter], name: str) -> Any:
    return parameters[name].default if name in parameters else None


def _by_prompt(name: str, value: Any, prompt: Any, is_member: Callable[[Any], bool]) -> list[Any]:
    """One entry a prompt, of an argument that is for a prompt or has an entry for each."""
    if isinstance(prompt, str):
        return [value]
    if value is None:
        return [None] * len(prompt)
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"`{name}` must be a list with an entry for each prompt, got {value!r}.")
    if any(map(is_member, value)) and len(prompt) == 1:
        return [value]
    if any(map(is_member, value)) or len(value) != len(prompt):
        raise ValueError(
            f"`{name}` must have an entry, a list, for each of the {len(prompt)} prompts, got {list(value)!r}."
        )
    return list(value)


def _words_without_prompt(
    embeddings: Any, token_indices: Any, subjects: Any, text_range: Any
) -> tuple[list[Any], list[Any]]:
    if not isinstance(embeddings, Tensor):
        return [], []  # the base pipeline says that it needs one of both
    if subjects is not None or token_indices is None or text_range is None:
        raise ValueError(
            "With `prompt_embeds` and no `prompt` there is no text to look for words in: give `token_indices` and "
            f"`text_range`, got `subjects`={subjects!r}, `token_indices`={token_indices!r} and `text_range`="
            f"{text_range!r}."
        )
    prompts = [""] * len(embeddings)
    ranges = _by_prompt("text_range", text_range, prompts, lambda value: isinstance(value, int))
    if len(prompts) == 1 and not _is_nested(token_indices, 3):
        token_indices = [token_indices]
    by_prompt = _by_prompt("token_indices", token_indices, prompts, lambda value: isinstance(value, int))
    return [[[one] if isinstance(one, int) else list(one) for one in words] for words in by_prompt], ranges


def _is_nested(value: Any, depth: int) -> bool:
    return depth == 0 or (isinstance(value, Sequence) and len(value) > 0 and _is_nested(value[0], depth - 1))


def _callbacks(
    pipeline: VicoMixin, run: DenoisingRun, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    """Arguments by which the loop tells the run of its latents; the caller's own callback comes first."""
    if "callback_on_step_end" in parameters:
        return _step_end_callback(run, arguments, parameters)
    return _legacy_callback(pipeline, run, arguments)


def _step_end_callback(
    run: DenoisingRun, arguments: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]
) -> dict[str, Any]:
    name = "callback_on_step_end_tensor_inputs"
    own = arguments.get("callback_on_step_end")
    # Callback objects of diffusers name what they need, and pipelines look for that only on the object itself.
    shown = getattr(own, "tensor_inputs", None) or arguments.get(name, _default(parameters, name)) or []

    def callback_on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        outputs: Any = {}
        if own is not None:
            outputs = own(pipeline, step, timestep, {key: tensors[key] for key in shown})
        if not isinstance(outputs, dict):
            return outputs  # which the base pipeline complains about
        latents = run.end_evaluation(step, outputs.get("latents", tensors["latents"]))
        return {**outputs, "latents": latents}

    return {"callback_on_step_end": callback_on_step_end, name: list(dict.fromkeys([*shown, "latents"]))}


def _legacy_callback(pipeline: VicoMixin, run: DenoisingRun, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of pipelines that take nothing back from it; a callback changes latents only in place."""
    own, every = arguments.get("callback"), arguments.get("callback_steps", 1)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        return {}  # which the base pipeline complains about

    def callback(step: int, timestep: Any, latents: Tensor) -> None:
        scheduler = pipeline.scheduler
        evaluation = min((step + 1) * getattr(scheduler, "order", 1), len(scheduler.timesteps)) - 1
        if own is not None and evaluation % every == 0:
            own(step, timestep, latents)
        run.hold(evaluation, latents)

    return {"callback": callback, "callback_steps": 1}

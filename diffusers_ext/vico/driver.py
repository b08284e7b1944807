"""Guides the denoising loop of a pipeline from inside of its denoiser's calls, so that no loop is written anew."""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .attribution import VicoAttribution, vico_attribution
from .config import VicoConfig
from .guidance import VicoStep, optimize_latents
from .mappings import find_mapping
from .schedule import StepPlan, guidance_plan
from .stats import VicoStats
from .words_of_call import SampleWords


logger = logging.getLogger(__name__)

# Arguments of a denoiser with a row for each sample, which guidance gives the rows of the conditional half.
BY_SAMPLE = (
    "timestep",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "attention_mask",
    "encoder_hidden_states_image",
    "added_cond_kwargs",
    "class_labels",
    "timestep_cond",
    "fps",
)


class DenoisingRun:
    """One call of a pipeline under guidance.

    The pipeline tells it of the loop's latents: `begin` where a loop starts, `end_evaluation` behind each of its
    evaluations. The hook on the denoiser hands it each call. At the first call of a denoising step it moves the
    latents and writes them into the loop's own tensor, so that this call, the unconditional one and the scheduler's
    step see them moved.

    Args:
        pipeline: whose loop it is; its scheduler is asked for timesteps and `scale_model_input`.
        config: of the guidance.
        words: of each sample; empty: nothing is guided.
        stats: what is done is added there.
        further_arguments: given to the denoiser in each of its calls.
        observer: called at each step behind its guidance with (step, `VicoAttribution`), which costs a forward.

    Attributes:
        trace: an entry for each guided step: `step` and `timestep`; `losses` [iterations][samples] and `scores`
            [iterations][samples][words], before each update; `updates` and `drift` [samples]; `seconds`.
    """

    def __init__(
        self,
        pipeline: Any,
        config: VicoConfig,
        words: Sequence[SampleWords],
        stats: VicoStats,
        *,
        further_arguments: Mapping[str, Any] | None = None,
        observer: Callable[[int, VicoAttribution], None] | None = None,
    ) -> None:
        self._pipeline = weakref.ref(pipeline)
        self.config = config
        self.words = list(words)
        self.stats = stats
        self.further_arguments = dict(further_arguments or {})
        self.observer = observer
        self.trace: list[dict[str, Any]] = []
        self.guides = config.guided_fraction > 0 and any(len(one.groups) >= 2 for one in self.words)
        self._latents: Tensor | None = None
        self._evaluation = 0  # of the loop, at which a scheduler of a higher order may have several a step
        self._plans: list[StepPlan | None] | None = None
        self._seen = False  # whether the evaluation's first call has come
        self._given: Tensor | None = None  # the evaluation's input as the loop made it
        self._rebuild: Callable[[Tensor], Tensor] | None = None  # of the evaluation, where it was guided
        self._measuring = False
        self._lost = False

    # What the pipeline tells.

    def begin(self, latents: Tensor) -> None:
        """A loop starts with these latents, the very tensor that it goes on with."""
        self._to_evaluation(0)
        self._latents, self._plans = latents, None
        if self.words and len(latents) % len(self.words) == 0:  # several videos a prompt stand side by side
            self.words = [one for one in self.words for _ in range(len(latents) // len(self.words))]
        self.stats.runs += self.guides

    def end_evaluation(self, evaluation: int, latents: Any) -> Any:
        """The loop goes on with the latents that this returns.

        Those that are to be moved are a copy: the scheduler, or a callback, may have kept the tensor.
        """
        self._to_evaluation(evaluation + 1)
        if self._plans is not None and isinstance(latents, Tensor) and self._plan() is not None:
            latents = latents.clone()
        self._latents = latents if isinstance(latents, Tensor) else None
        return latents

    def hold(self, evaluation: int, latents: Tensor) -> None:
        """As `end_evaluation`, for a loop that takes no latents back."""
        self._to_evaluation(evaluation + 1)
        self._latents = latents

    def finish(self) -> None:
        """The call has ended well; says so where it was to be guided and nothing came of it."""
        if not self.guides or any(sum(entry["updates"]) for entry in self.trace):
            return
        if self._lost:
            reason = "the latents of the loop were not found in the denoiser's input"
        elif not self.trace:
            reason = "no denoising step was guided"
        elif all(loss != loss for entry in self.trace for losses in entry["losses"] for loss in losses):
            reason = "the loss was not a number"
        elif any(len(entry["losses"]) == 1 for entry in self.trace) and self._below_thresholds():
            reason = "every loss was below its threshold from the start, so the words were balanced already"
        else:
            reason = "no gradient had a direction"
        self.stats.reasons[reason] = self.stats.reasons.get(reason, 0) + 1
        logger.warning(f"Vico has left this video as the base pipeline makes it: {reason}.")

    # What the hook asks.

    def on_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments with which a call of the denoiser is to run."""
        if self._measuring:
            return args, kwargs
        if self.further_arguments:
            kwargs = {**kwargs, **self.further_arguments}
        if self._seen and self._rebuild is None:
            return args, kwargs
        arguments = {**_by_name(denoiser, args), **kwargs}
        name = find_mapping(denoiser).sample_argument
        if not self._seen:
            self._seen, self._given = True, arguments[name]
            self._measuring = True
            try:
                self._rebuild = self._guide(denoiser, arguments, name)
            finally:
                self._measuring = False
        # Another input than the first belongs to an evaluation of which the loop has not told.
        if self._rebuild is None or arguments[name] is not self._given:
            return args, kwargs
        moved = self._rebuild(arguments[name])
        if name in kwargs:
            return args, {**kwargs, name: moved}
        position = list(arguments).index(name)  # in its own place, so that a compiled denoiser sees the same call
        return (*args[:position], moved, *args[position + 1 :]), kwargs

    def _to_evaluation(self, evaluation: int) -> None:
        self._evaluation = evaluation
        self._seen, self._given, self._rebuild = False, None, None

    def _guide(self, denoiser: nn.Module, arguments: dict[str, Any], name: str) -> Callable[[Tensor], Tensor] | None:
        """Moves the latents; returns how the denoiser's input is made of them, or None where they stay."""
        plan = self._plan()
        if plan is None and (self.observer is None or self._inner()):
            return None
        given = arguments[name]
        found = self._match(given, arguments["timestep"])
        if found is None:
            if not self._lost:
                logger.warning(
                    "The denoiser's input is not made of the latents that Vico knows of, so that they cannot be moved "
                    "here. Does a callback or a scheduler replace them?"
                )
            self._lost = True
            return None
        scale, copies = found
        latents = self._latents
        conditional = _conditional(arguments, len(latents), copies)
        call = {key: value for key, value in conditional.items() if key not in (name, "timestep", "return_dict")}
        call |= {
            "token_groups": [one.groups for one in self.words],
            "text_range": [one.text_range for one in self.words],
            "config": self.config,
        }

        def as_input(moved: Tensor) -> Tensor:
            return scale(moved).to(given.dtype)

        if plan is not None:
            self._move(denoiser, latents, conditional["timestep"], call, plan, as_input)
        if self.observer is not None and not self._inner():
            found = vico_attribution(denoiser, as_input(latents), conditional["timestep"], return_grad=False, **call)
            self.observer(self._step(), found)
        if plan is None:
            return None
        return lambda old: as_input(torch.cat([latents] * (len(old) // len(latents))))

    def _move(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timestep: Tensor,
        call: dict[str, Any],
        plan: StepPlan,
        as_input: Callable[[Tensor], Tensor],
    ) -> None:
        started = time.perf_counter()
        result = optimize_latents(
            denoiser,
            latents,
            timestep,
            step_size=plan.step_size,
            iterations=plan.iterations,
            threshold=plan.threshold,
            scale_model_input=as_input,
            **call,
        )
        # Samples without an update keep their bits, also where master latents have more of them.
        moved = (result.updates > 0).tolist()
        for sample in (index for index, is_moved in enumerate(moved) if is_moved):
            latents[sample].copy_(result.latents[sample])
        entry = trace_entry(self._step(), float(timestep.flatten()[0]), result, time.perf_counter() - started)
        self.trace.append(entry)
        self.stats.guided_steps += 1
        self.stats.updates += sum(entry["updates"])
        self.stats.most_drift = max(self.stats.most_drift, *entry["drift"])
        self.stats.seconds += entry["seconds"]

    def _match(self, given: Tensor, timestep: Tensor) -> tuple[Callable[[Tensor], Tensor], int] | None:
        """How the denoiser's input is made of the latents, (scaling, copies of the batch); None if it is not.

        Not every pipeline scales its latents; the input tells, to the bit.
        """
        latents, pipeline = self._latents, self._pipeline()
        if latents is None or not isinstance(given, Tensor) or given.shape[1:] != latents.shape[1:]:
            return None
        copies = len(given) // len(latents)
        if copies not in (1, 2) or len(given) != copies * len(latents) or len(latents) != len(self.words):
            return None
        candidates = [lambda values: values]
        scheduler = pipeline.scheduler
        if hasattr(scheduler, "scale_model_input"):
            moment = torch.as_tensor(timestep).flatten()[0]
            candidates.insert(0, lambda values: scheduler.scale_model_input(values, moment))
        whole = torch.cat([latents] * copies)
        for scale in candidates:
            if torch.equal(scale(whole).to(given.dtype), given):
                return scale, copies
        return None

    def _plan(self) -> StepPlan | None:
        """Of the present evaluation; only the first of a step's is guided."""
        if not self.guides or self._inner():
            return None
        if self._plans is None:
            pipeline = self._pipeline()
            # Image-to-image loops leave the scheduler's first timesteps out, and count what is left.
            evaluations = getattr(pipeline, "_num_timesteps", None) or len(pipeline.scheduler.timesteps)
            self._plans = guidance_plan(self.config, -(-evaluations // self._order()))
        step = self._step()
        return self._plans[step] if step < len(self._plans) else None

    def _step(self) -> int:
        return self._evaluation // self._order()

    def _inner(self) -> bool:
        return self._evaluation % self._order() != 0

    def _order(self) -> int:
        return getattr(self._pipeline().scheduler, "order", 1)

    def _below_thresholds(self) -> bool:
        return all(
            loss < self._plans[entry["step"]].threshold or len(self.words[sample].groups) < 2
            for entry in self.trace
            for sample, loss in enumerate(entry["losses"][0])
        )


def trace_entry(step: int, timestep: float, result: VicoStep, seconds: float) -> dict[str, Any]:
    """What happened at a denoising step, as plain numbers; see `DenoisingRun.trace`."""
    return {
        "step": step,
        "timestep": timestep,
        "losses": result.losses.tolist(),
        "scores": result.scores.tolist(),
        "updates": result.updates.tolist(),
        "drift": result.drift.tolist(),
        "seconds": seconds,
    }


def _by_name(denoiser: nn.Module, args: tuple) -> dict[str, Any]:
    """Positional arguments of a forward by the names of its parameters."""
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def _conditional(arguments: Mapping[str, Any], batch: int, copies: int) -> dict[str, Any]:
    """The arguments of a call with the conditional half alone; pipelines put the unconditional one before it."""
    if copies == 1:
        return dict(arguments)

    def half(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 0 and len(value) % (copies * batch) == 0:
            return value[-(len(value) // copies) :]
        if isinstance(value, tuple | list):
            return type(value)(map(half, value))
        if isinstance(value, dict):
            return {key: half(one) for key, one in value.items()}
        return value

    return {key: half(value) if key in BY_SAMPLE else value for key, value in arguments.items()}

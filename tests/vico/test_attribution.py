"""Flow, scores, loss and gradient of a denoiser's call, for every kind of denoiser."""

import dataclasses

import pytest
import torch
from diffusers import ConfigMixin, EulerDiscreteScheduler, ModelMixin
from diffusers.models.attention_processor import Attention

from diffusers_ext.vico import VicoConfig, attention_flow, flow_loss, flow_scores, mappings
from diffusers_ext.vico.attribution import FlowMeter, vico_attribution
from diffusers_ext.vico.capture import MapCapture

from .denoisers import BASES, GROUPS, KINDS, TEXT_RANGE, call
from .test_capture import state_of


@pytest.fixture
def doubles(monkeypatch):
    """Denoisers in fp64 all the way: diffusers casts some of Wan's and LTX's numbers to fp32."""
    narrow, cast = torch.Tensor.float, torch.Tensor.to

    def to(self, *args, **kwargs):
        return self if self.dtype == torch.float64 and args == (torch.float32,) else cast(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype == torch.float64 else narrow(self))
    monkeypatch.setattr(torch.Tensor, "to", to)


OTHER_MODES = [(name, mode) for name in ("unet3d", "wan") for mode in ("hard", "rollout", "cross")]


@pytest.mark.parametrize(("name", "mode"), [(name, "soft") for name in BASES] + OTHER_MODES)
def test_the_gradient_is_that_of_central_differences(name, mode, doubles):
    base = BASES[name]
    denoiser = base.build().double()
    given = call(base, denoiser, config=base.vico(mode=mode))
    sample = given.pop("sample")
    grad = vico_attribution(sample=sample, **given).grad

    def loss_at(step, direction):
        return vico_attribution(sample=sample + step * direction, **given, return_grad=False).loss.item()

    # Along the gradient and across: an error of any element shows in the second.
    for direction in (grad / grad.norm(), torch.randn_like(grad) / grad.numel() ** 0.5):
        expected = (loss_at(1e-6, direction) - loss_at(-1e-6, direction)) / 2e-6
        assert (grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-7 * grad.norm().item())


@pytest.mark.parametrize("name", KINDS)
def test_flow_scores_and_loss_are_those_of_the_captured_maps(name):
    base = BASES[name]
    denoiser = base.build().double()
    kept = []
    original = MapCapture.__call__

    def keeping(self, arguments):
        kept.extend(original(self, arguments))
        return kept

    config = base.vico(loss="softmin", skip="add", token_weights=(1.0, 3.0), sharpness=50.0, subtoken_reduce="mean")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MapCapture, "__call__", keeping)
        found = vico_attribution(**call(base, denoiser, 2, config=config), return_grad=False)
    flows = [attention_flow(maps.cross, maps.temporal, skip="add").unflatten(2, maps.grid).detach() for maps in kept]
    flow = sum(flows) / len(flows)
    torch.testing.assert_close(found.flow, flow, rtol=1e-12, atol=1e-14)
    assert found.flow.shape == (2, base.frames, *base.grid, 5)
    scores = flow_scores(flow, GROUPS, offset=1, sharpness=50.0, subtoken_reduce="mean")
    torch.testing.assert_close(found.scores, scores, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.loss, flow_loss(scores, "softmin", (1.0, 3.0)), rtol=1e-12, atol=1e-14)
    assert found.grad is None


@pytest.mark.parametrize("name", KINDS)
def test_early_exit_and_checkpointing_change_nothing(name):
    base = BASES[name]
    denoiser = base.build().double()
    found = [
        vico_attribution(**call(base, denoiser, config=base.vico(early_exit=early, checkpointing=again)))
        for early in (True, False)
        for again in (False, True)
    ]
    for other in found[1:]:
        for field in dataclasses.fields(other):
            torch.testing.assert_close(
                getattr(other, field.name), getattr(found[0], field.name), rtol=1e-10, atol=1e-10
            )


@pytest.mark.parametrize("name", KINDS)
def test_two_prompts_in_a_batch_are_as_two_calls(name):
    base = BASES[name]
    denoiser = base.build().double()
    words, ranges = [[[1], [3, 4]], [[2], [5], [7]]], [(1, 6), (1, 9)]
    both = vico_attribution(**call(base, denoiser, 2, token_groups=words, text_range=ranges))
    for number in range(2):
        alone = vico_attribution(
            **call(
                base,
                denoiser,
                sample=base.sample(2)[number : number + 1],
                encoder_hidden_states=base.text(2)[number : number + 1],
                token_groups=words[number],
                text_range=ranges[number],
            )
        )
        columns, count = ranges[number][1] - 1, len(words[number])
        torch.testing.assert_close(both.flow[number, ..., :columns], alone.flow[0])
        torch.testing.assert_close(both.scores[number, :count], alone.scores[0])
        torch.testing.assert_close(both.loss[number], alone.loss[0])
        torch.testing.assert_close(both.grad[number], alone.grad[0])
    assert both.flow[0, ..., 5:].eq(0).all() and both.scores[0, 2:].isnan().all()


def test_the_frames_of_animatediff_may_have_their_text_already():
    base = BASES["animatediff"]
    denoiser = base.build().double()
    text = base.text(2)
    once = vico_attribution(**call(base, denoiser, 2))
    repeated = vico_attribution(**call(base, denoiser, 2, encoder_hidden_states=text.repeat_interleave(3, dim=0)))
    assert torch.equal(once.grad, repeated.grad)
    with pytest.raises(ValueError, match="2 or 6 rows for 2 samples of 3 frames, got 4"):
        vico_attribution(**call(base, denoiser, 2, encoder_hidden_states=base.text(4)))


def test_all_grids_are_brought_to_the_quarter_grid():
    base = BASES["videocrafter"]
    denoiser = base.build().double()
    found = vico_attribution(**call(base, denoiser, config=VicoConfig(grid="all")))
    assert found.flow.shape == (1, 3, 2, 4, 5)
    with_all = vico_attribution(
        **call(base, denoiser, config=VicoConfig(grid="all", layers=r"(down|up)_blocks\.[12]"))
    )
    quarter = vico_attribution(**call(base, denoiser))
    assert not torch.equal(with_all.flow, quarter.flow)
    only = VicoConfig(grid="all", layers=r"down_blocks\.2|up_blocks\.1\.")
    torch.testing.assert_close(vico_attribution(**call(base, denoiser, config=only)).flow, quarter.flow)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["videocrafter", "animatediff", "ltx"])
def test_half_precision_gives_scores_in_fp32_near_those_of_fp64(name, dtype):
    base = BASES[name]
    denoiser = base.build()
    exact = vico_attribution(**call(base, base.build().double()))
    half = denoiser.to(dtype)
    found = vico_attribution(**call(base, half))
    assert found.flow.dtype == found.scores.dtype == found.loss.dtype == found.grad.dtype == torch.float32
    torch.testing.assert_close(found.flow.double(), exact.flow, rtol=0.05, atol=5e-3)
    cosine = torch.cosine_similarity(found.grad.double().flatten(), exact.grad.flatten(), dim=0)
    assert cosine > 0.7


def test_latents_narrower_or_wider_than_the_weights_are_cast():
    base = BASES["videocrafter"]
    denoiser = base.build()
    expected = vico_attribution(**call(base, denoiser))
    wide = vico_attribution(**call(base, denoiser, sample=base.sample(dtype=torch.float64)))
    assert expected.grad.dtype == torch.float32 and wide.grad.dtype == torch.float64
    torch.testing.assert_close(wide.grad.float(), expected.grad)
    narrow = vico_attribution(**call(base, denoiser, sample=base.sample(dtype=torch.float16)))
    assert narrow.grad.dtype == torch.float32
    torch.testing.assert_close(narrow.scores, expected.scores, rtol=0.02, atol=1e-2)


def test_the_scale_of_the_loss_cancels():
    base = BASES["unet3d"]
    denoiser = base.build().double()
    grads = [vico_attribution(**call(base, denoiser, config=base.vico(loss_scale=s))).grad for s in (1.0, 3000.0)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(mode):
    base = BASES["videocrafter"]
    denoiser = base.build()
    expected = vico_attribution(**call(base, denoiser))
    with mode():
        given = call(base, denoiser)
        given["sample"], given["encoder_hidden_states"] = (
            given[n].clone() for n in ("sample", "encoder_hidden_states")
        )
        found = vico_attribution(**given)
    assert torch.equal(found.grad, expected.grad) and not found.flow.requires_grad


def test_it_measures_in_an_autocast_region_as_outside():
    base = BASES["videocrafter"]
    denoiser = base.build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = vico_attribution(**call(base, denoiser))
    assert found.flow.dtype == torch.float32
    torch.testing.assert_close(found.flow, vico_attribution(**call(base, denoiser)).flow, rtol=0.05, atol=5e-3)


def test_euler_latents_are_scaled_inside_of_the_graph():
    base = BASES["unet3d"]
    denoiser = base.build().double()
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    timestep = scheduler.timesteps[2].double()
    sample = base.sample() * float(scheduler.init_noise_sigma)
    given = call(base, denoiser, timestep=timestep)
    for name in ("denoiser", "sample", "timestep", "encoder_hidden_states"):
        given.pop(name)
    meter = FlowMeter(
        denoiser,
        sample,
        timestep,
        base.text(),
        **given,
        scale_model_input=lambda latents: scheduler.scale_model_input(latents, timestep),
        denoiser_kwargs={},
    )
    scaled = scheduler.scale_model_input(sample, timestep)
    factor = (scaled / sample).flatten()[0]
    direct = vico_attribution(**call(base, denoiser, sample=scaled, timestep=timestep))
    with meter:
        latents = sample.clone().requires_grad_()
        loss = meter(latents).loss
        (grad,) = torch.autograd.grad(loss.sum(), latents)
    torch.testing.assert_close(loss.detach(), direct.loss)
    torch.testing.assert_close(grad, factor * direct.grad)
    assert factor < 0.5


@pytest.mark.parametrize("name", KINDS)
def test_the_denoiser_is_as_it_was(name):
    base = BASES[name]
    denoiser = base.build()
    next(denoiser.parameters()).requires_grad_(False)
    before = state_of(denoiser)
    vico_attribution(**call(base, denoiser))
    assert state_of(denoiser) == before


def test_one_frame_and_one_word_are_enough():
    base = BASES["videocrafter"]
    denoiser = base.build().double()
    sample = base.sample()[:, :, :1]
    found = vico_attribution(**call(base, denoiser, sample=sample, token_groups=[[2]]))
    assert found.flow.shape == (1, 1, 2, 4, 5) and found.scores.shape == (1, 1)
    assert found.grad.shape == sample.shape and found.grad.abs().sum() > 0


def test_fps_and_other_arguments_reach_the_denoiser():
    base = BASES["videocrafter"]
    denoiser = base.build()
    slow, fast = (vico_attribution(**call(base, denoiser), fps=fps).loss for fps in (1, 60))
    assert not torch.equal(slow, fast)


def test_a_registered_denoiser_is_measured():
    class Own(ModelMixin, ConfigMixin):
        def __init__(self):
            super().__init__()
            self.read = torch.nn.Conv3d(3, 8, (1, 2, 2), (1, 2, 2))
            self.cross = torch.nn.ModuleList([Attention(8, 6, heads=2, dim_head=4) for _ in range(2)])
            self.time = torch.nn.ModuleList([Attention(8, heads=2, dim_head=4) for _ in range(2)])

        def forward(self, sample, timestep, encoder_hidden_states):
            hidden = self.read(sample).permute(0, 2, 3, 4, 1)
            batch, frames, height, width, _ = hidden.shape
            hidden = hidden.flatten(0, 1).flatten(1, 2)
            text = encoder_hidden_states.repeat_interleave(frames, dim=0)
            for cross, time in zip(self.cross, self.time, strict=True):
                hidden = hidden + cross(hidden, text)
                fibres = hidden.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
                fibres = fibres + time(fibres)
                hidden = fibres.unflatten(0, (batch, height * width)).transpose(1, 2).flatten(0, 1)
            return hidden

    mappings.register_vico_mapping(Own, cross=r"cross\.(\d+)", temporal=("time.{0}",), cell_size=2)
    sample, text = torch.randn(2, 3, 4, 8, 6), torch.randn(2, 7, 6)
    found = vico_attribution(
        Own(), sample, 5, text, token_groups=GROUPS, text_range=TEXT_RANGE, config=VicoConfig(grid=(4, 3))
    )
    assert found.flow.shape == (2, 4, 4, 3, 5) and found.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("error", "changes", "message"),
    [
        (TypeError, {"denoiser": "unet"}, "`denoiser`"),
        (TypeError, {"denoiser": torch.nn.Linear(1, 1)}, "register_vico_mapping"),
        (TypeError, {"sample": [1.0]}, "`sample`"),
        (TypeError, {"sample": torch.zeros(1, 4, 3, 8, 16, dtype=torch.int64)}, "`sample`.*int64"),
        (TypeError, {"config": {"mode": "soft"}}, "`config`"),
        (ValueError, {"sample": torch.zeros(4, 3, 8, 16)}, r"`sample` must be \(batch, channels, frames, H, W\)"),
        (ValueError, {"encoder_hidden_states": torch.zeros(5, 16)}, "`encoder_hidden_states`"),
        (ValueError, {"text_range": (1, 78)}, "`text_range` must end within the .* tokens"),
        (ValueError, {"token_groups": [[1], [7]]}, "within `text_range`"),
        (ValueError, {"config": VicoConfig(grid=(3, 3))}, r"\(3, 3\)"),
        (ValueError, {"config": VicoConfig(token_weights=(1, 1, 1))}, "token_weights"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(error, changes, message):
    base = BASES["videocrafter"]
    denoiser = base.build()
    denoiser.forward = None
    with pytest.raises(error, match=message):
        vico_attribution(**{**call(base, denoiser), **changes})

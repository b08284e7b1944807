"""Maps that a forward hands out against whole maps, and what the denoiser is like afterwards."""

import contextlib
import gc
import weakref

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading, apply_layerwise_casting
from diffusers.models.attention import FeedForward, FreeNoiseTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0

from diffusers_ext.hooks._compat import ATTENTION_CLASSES
from diffusers_ext.vico.capture import MapCapture, check_denoiser, checkpoint_parts, install, uninstall
from diffusers_ext.vico.mappings import find_mapping, select_groups
from diffusers_ext.vico.processor import VicoAttnProcessor

from .denoisers import BASES, KINDS, call, forward, motion_unet


def captured(base, denoiser, batch=1, columns=slice(1, 6), config=None, given=None, **options):
    """A capture, and the arguments of its forward."""
    config = config or base.vico()
    arguments = given or call(base, denoiser, batch)
    for name in ("denoiser", "token_groups", "text_range", "config"):
        arguments.pop(name, None)
    sample = arguments.pop("sample")
    mapping = find_mapping(denoiser)
    shape = mapping.video_shape(denoiser, sample, arguments)
    if mapping.text_per_frame:
        arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].repeat_interleave(shape.frames, dim=0)
    arguments |= {mapping.sample_argument: sample, "timestep": arguments["timestep"].expand(batch)}
    groups = select_groups(denoiser, mapping, config, shape)
    return MapCapture(denoiser, mapping, groups, shape, columns, **options), arguments


class Whole:
    """A processor in the place of another that keeps the whole map: (rows, queries, keys), averaged over heads."""

    def __init__(self, processor):
        self.project = VicoAttnProcessor(processor).project
        self.processor = processor

    def __call__(self, attn, *args, image_rotary_emb=None, **kwargs):
        # In the signature, else diffusers does not pass it.
        kwargs |= {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        given = self.project(attn, *args, **kwargs)
        logits = torch.einsum("bhqc,bhkc->bhqk", given.query, given.key) * given.scale
        self.logits = logits if given.bias is None else logits + given.bias
        return self.processor(attn, *args, **kwargs)

    @property
    def map(self):
        return self.logits.softmax(dim=-1).mean(dim=1)


def whole_maps(denoiser, arguments):
    """By name of the layer."""
    layers = {name: part for name, part in denoiser.named_modules() if isinstance(part, ATTENTION_CLASSES)}
    before = {name: layer.processor for name, layer in layers.items()}
    for layer in layers.values():
        layer.processor = Whole(layer.processor)
    with torch.no_grad():
        denoiser(**arguments)
    whole = {name: layer.processor for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.processor = before[name]
    return whole


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["unet3d", "videocrafter", "animatediff"])
def test_maps_of_unets_are_those_of_their_layers(name):
    base = BASES[name]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser, 2)
    with torch.no_grad(), capture:
        maps = capture(arguments)
    whole = whole_maps(denoiser, arguments)
    assert len(maps) == len(capture.groups) >= 2
    cells = base.grid[0] * base.grid[1]
    for group, found in zip(capture.groups, maps, strict=True):
        assert found.grid == base.grid
        same(found.cross, whole[group.cross].map.reshape(2, base.frames, cells, -1)[..., 1:6])
        assert len(found.temporal) == 2
        for layer, temporal in zip(group.temporal, found.temporal, strict=True):
            same(temporal, whole[layer].map.reshape(2, cells, base.frames, base.frames))


def test_animatediff_pairs_at_the_coarsest_grid():
    """There motion modules of blocks without text come between those of blocks with text."""
    base = BASES["animatediff"]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser, config=base.vico(grid=(1, 2)))
    with torch.no_grad(), capture:
        (maps,) = capture(arguments)
    whole = whole_maps(denoiser, arguments)
    assert capture.groups[0].cross == "mid_block.attentions.0.transformer_blocks.0.attn2"
    for number, temporal in enumerate(maps.temporal, 1):
        layer = whole[f"mid_block.motion_modules.0.transformer_blocks.0.attn{number}"]
        same(temporal, layer.map.reshape(1, 2, 3, 3))


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_maps_of_transformers_are_columns_and_fibres_of_the_whole_map(name):
    base = BASES[name]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser, 2, joint_normalize=False)
    with torch.no_grad(), capture:
        maps = capture(arguments)
    whole = whole_maps(denoiser, arguments)
    cells, frames = base.grid[0] * base.grid[1], base.frames
    for group, found in zip(capture.groups, maps, strict=True):
        text = arguments["encoder_hidden_states"].shape[1] if name == "cogvideox" else 0
        same(found.cross, whole[group.cross].map[:, text:, 1:6].reshape(2, frames, cells, -1))
        logits = whole[group.temporal[0]].logits[:, :, text:, text:]
        for cell in range(cells):
            places = [frame * cells + cell for frame in range(frames)]
            fibre = logits[:, :, places][..., places].softmax(dim=-1).mean(dim=1)
            same(found.temporal[0][:, cell], fibre)


def test_rows_of_joint_attention_are_divided_by_their_share_of_the_text():
    base = BASES["cogvideox"]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser)
    text = arguments["encoder_hidden_states"].shape[1]
    with torch.no_grad(), capture:
        normalised = capture(arguments)[0].cross
    capture, arguments = captured(base, denoiser, columns=slice(0, text), joint_normalize=False)
    with torch.no_grad(), capture:
        raw = capture(arguments)[0].cross
    same(normalised, (raw / raw.sum(dim=-1, keepdim=True))[..., 1:6])


def test_cells_of_large_videos_are_averaged_to_sixteen_on_a_side():
    base = BASES["wan"]
    denoiser = base.build().double()
    given = call(base, denoiser, sample=torch.randn(1, 16, 2, 36, 8, dtype=torch.float64))
    capture, arguments = captured(base, denoiser, given=given)
    with torch.no_grad(), capture:
        maps = capture(arguments)[0]
    whole = whole_maps(denoiser, arguments)
    assert maps.grid == (9, 4)
    cross = whole[capture.groups[0].cross].map[..., 1:6].unflatten(1, (2, 18, 4))
    same(maps.cross.unflatten(2, (9, 4)), cross.unflatten(2, (9, 2)).mean(dim=3))
    same(maps.temporal[0].sum(dim=-1), torch.ones(1, 36, 2, dtype=torch.float64))


def test_cross_maps_alone_need_no_temporal_layer():
    base = BASES["animatediff"]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser, with_temporal=False)
    with torch.no_grad(), capture:
        assert [maps.temporal for maps in capture(arguments)] == [[], [], []]
        temporal = denoiser.get_submodule(capture.groups[0].temporal[0])
        assert not isinstance(temporal.processor, VicoAttnProcessor)


def calls_of(denoiser):
    """Names of the modules that ran, in a list that grows."""
    ran = []
    for name, module in denoiser.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize("name", KINDS)
def test_the_forward_ends_with_the_last_map(name):
    base = BASES[name]
    denoiser = base.build().double()
    last = {"unet3d": "conv_out", "videocrafter": "up_blocks.2", "animatediff": "up_blocks.2"}.get(name, "proj_out")
    ran = calls_of(denoiser)
    capture, arguments = captured(base, denoiser)
    with torch.no_grad(), capture:
        early = capture(arguments)
    assert not any(one.startswith(last) for one in ran)
    capture, arguments = captured(base, denoiser, early_exit=False)
    with torch.no_grad(), capture:
        late = capture(arguments)
    assert any(one.startswith(last) for one in ran)
    for one, other in zip(early, late, strict=True):
        assert torch.equal(one.cross, other.cross)
        assert all(map(torch.equal, one.temporal, other.temporal))


def state_of(denoiser):
    """What must be the same afterwards: each module's `__dict__`, and the flags of its parameters."""
    found = {}
    for name, module in denoiser.named_modules():
        for key, value in vars(module).items():
            found[name, key] = {k: id(v) for k, v in value.items()} if isinstance(value, dict) else id(value)
        found[name, "processor"] = id(getattr(module, "processor", None))
    for name, parameter in denoiser.named_parameters():
        found[name, "requires_grad"] = parameter.requires_grad
    return found


class Broken(Exception):
    pass


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_denoiser_is_as_it_was_whatever_happens_inside(name, checkpointing, fails):
    base = BASES[name]
    denoiser = base.build().double()
    for number, parameter in enumerate(denoiser.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    expected, before = forward(base, denoiser), state_of(denoiser)
    capture, arguments = captured(base, denoiser, checkpointing=checkpointing)
    inside = {}
    with contextlib.suppress(Broken), capture:
        inside = state_of(denoiser)
        assert not any(parameter.requires_grad for parameter in denoiser.parameters())
        layer = denoiser.get_submodule(capture.groups[0].cross)
        if fails:
            layer.processor.reader = lambda projections: (_ for _ in ()).throw(Broken)
        capture(arguments)
    assert inside != before and state_of(denoiser) == before
    assert torch.equal(forward(base, denoiser), expected)


def test_nothing_is_left_of_an_entry_that_fails():
    denoiser = BASES["animatediff"].build()
    layer = denoiser.down_blocks[2].motion_modules[0].transformer_blocks[0].attn2
    layer.set_processor(object())
    capture, _ = captured(BASES["animatediff"], denoiser)
    before = state_of(denoiser)
    with pytest.raises(NotImplementedError, match="object"), capture:
        pass
    assert state_of(denoiser) == before


@pytest.mark.parametrize("name", ["wan", "animatediff"])
def test_the_models_own_checkpointing_is_off_inside_and_on_again_afterwards(name):
    base = BASES[name]
    denoiser = base.build().double()
    denoiser.enable_gradient_checkpointing()
    assert denoiser.is_gradient_checkpointing
    denoiser.train()
    capture, arguments = captured(base, denoiser)
    with capture:
        assert not denoiser.is_gradient_checkpointing
        maps = capture(arguments)
        assert all(group.cross is not None for group in maps)
    assert denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("name", BASES)
def test_parts_that_are_recomputed_hold_no_layer_that_is_read(name):
    denoiser = BASES[name].build()
    capture, _ = captured(BASES[name], denoiser)
    layers = {id(denoiser.get_submodule(layer)) for layer in capture._layers()}
    parts = checkpoint_parts(denoiser, layers)
    inside = [id(child) for part in parts for child in part.modules()]
    assert len(inside) == len(set(inside)), "a part lies in another"
    assert not layers & set(inside)
    names = {id(module): name for name, module in denoiser.named_modules()}
    found = {names[id(part)] for part in parts}
    feed_forwards = [module for module in denoiser.modules() if isinstance(module, FeedForward)]
    assert all(id(module) in inside for module in feed_forwards)
    if name == "wan":
        assert found == {"blocks.0", "blocks.2", "blocks.1.ffn"}
    if name == "animatediff":
        assert {"down_blocks.0.attentions.0", "down_blocks.0.resnets.0", "down_blocks.0.motion_modules.0"} <= found
        assert "down_blocks.2.attentions.0.transformer_blocks.0.attn1" in found


def kept_numbers(base, checkpointing):
    denoiser = base.build()
    denoiser.requires_grad_(False)
    capture, arguments = captured(base, denoiser, checkpointing=checkpointing)
    arguments[capture.mapping.sample_argument].requires_grad_()
    weights = {parameter.data_ptr() for parameter in denoiser.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with capture, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        maps = capture(arguments)
    del maps
    return sum(kept.values())


def test_checkpointing_keeps_less():
    assert kept_numbers(BASES["videocrafter"], True) < 0.5 * kept_numbers(BASES["videocrafter"], False)


def test_a_layer_that_does_not_run_is_named():
    base = BASES["wan"]
    denoiser = base.build().double()

    class Skipped(torch.nn.Module):
        def forward(self, hidden_states, *args):
            return hidden_states

    capture, arguments = captured(base, denoiser)
    with pytest.raises(RuntimeError, match=r"did not run.*blocks\.1\.attn1, blocks\.1\.attn2"), capture:
        denoiser.blocks[1].forward = Skipped().forward
        capture(arguments)


def test_a_layer_that_runs_twice_is_named():
    base = BASES["wan"]
    denoiser = base.build().double()
    block = denoiser.blocks[1]
    capture, arguments = captured(base, denoiser)
    original = block.attn1.forward
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 ran twice"), capture:
        block.attn1.forward = lambda *args, **kwargs: original(*args, **kwargs) + original(*args, **kwargs)
        capture(arguments)


def test_rows_that_are_not_those_of_the_video_are_refused():
    base = BASES["animatediff"]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser)
    arguments["sample"] = arguments["sample"][:, :, :2]
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"][:2]
    with pytest.raises(RuntimeError, match=r"expected to have 3 rows of 8 queries .* has 2 of 8"), capture:
        capture(arguments)


def test_a_cache_sees_nothing_of_a_forward_that_reads_maps():
    base = BASES["wan"]
    denoiser = base.build().double()
    plain, cached = [base.build().double() for _ in range(2)]
    for one in (denoiser, cached):
        one.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    outputs = {id(denoiser): [], id(cached): []}
    for step in range(3):
        for one in (denoiser, cached):
            with one.cache_context("cond"):
                if one is denoiser:
                    capture, arguments = captured(base, denoiser)
                    with torch.no_grad(), capture:
                        found = capture(arguments)
                    capture, arguments = captured(base, plain)
                    with torch.no_grad(), capture:
                        assert torch.equal(found[0].cross, capture(arguments)[0].cross)
                shifted = call(base, one, sample=base.sample(seed=step))
                arguments = captured(base, one, given=shifted)[1]
                with torch.no_grad():
                    outputs[id(one)].append(one(**arguments).sample)
    for one, other in zip(outputs[id(denoiser)], outputs[id(cached)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_denoiser_is_read_as_it_is_written(whole):
    base = BASES["wan"]
    denoiser = base.build().double()
    capture, arguments = captured(base, denoiser)
    with torch.no_grad(), capture:
        expected = capture(arguments)
    if whole:
        denoiser.compile(backend="eager")
    else:
        denoiser.compile_repeated_blocks(backend="eager")
    output = forward(base, denoiser)
    capture, arguments = captured(base, denoiser)
    with torch.no_grad(), capture:
        found = capture(arguments)
    assert torch.equal(found[0].cross, expected[0].cross)
    assert torch.equal(forward(base, denoiser), output)
    torch._dynamo.reset()


def test_what_it_does_not_go_with_is_refused():
    unet = motion_unet()
    part = unet.down_blocks[0].motion_modules[0]
    old = part.transformer_blocks[0]
    part.transformer_blocks[0] = FreeNoiseTransformerBlock(8, 2, 4, positional_embeddings=None)
    with pytest.raises(NotImplementedError, match="FreeNoise"):
        check_denoiser(unet)
    part.transformer_blocks[0] = old
    check_denoiser(unet)
    unet._parallel_config = object()
    with pytest.raises(NotImplementedError, match="context parallelism"):
        check_denoiser(unet)


def test_group_offload_is_refused():
    denoiser = BASES["wan"].build()
    apply_group_offloading(denoiser, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(NotImplementedError, match="group offload"):
        check_denoiser(denoiser)


def test_weights_in_fp8_are_refused():
    denoiser = BASES["wan"].build()
    apply_layerwise_casting(denoiser, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match="fp8"):
        check_denoiser(denoiser)


def test_processors_that_are_modules_stay_in_the_state_dict():
    denoiser = BASES["animatediff"].build()

    class Trained(torch.nn.Module, AttnProcessor2_0):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        __call__ = AttnProcessor2_0.__call__

    layer = denoiser.down_blocks[2].attentions[0].transformer_blocks[0].attn2
    layer.set_processor(Trained())
    keys = list(denoiser.state_dict())
    wrapper = VicoAttnProcessor(AttnProcessor2_0())
    before = install(layer, wrapper)
    assert layer.processor is wrapper and list(denoiser.state_dict()) == keys
    assert uninstall(layer, wrapper, before)
    assert isinstance(layer.processor, Trained) and "processor" not in vars(layer)


def test_the_graph_does_not_outlive_the_capture():
    base = BASES["unet3d"]
    denoiser = base.build()
    capture, arguments = captured(base, denoiser)
    arguments["sample"].requires_grad_()
    gc.disable()
    try:
        with capture:
            maps = capture(arguments)
            alive = weakref.ref(maps[0].cross)
            del maps
            assert alive() is None
    finally:
        gc.enable()

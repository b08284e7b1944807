"""Which layers Vico finds in each denoiser, in which order, and which of them a config takes."""

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from diffusers_ext.vico import VicoConfig
from diffusers_ext.vico.mappings import (
    AttentionGroup,
    VicoMapping,
    VideoShape,
    find_mapping,
    groups_by_name,
    halved,
    register_vico_mapping,
    select_groups,
)
from tests.tiny_checkpoints.denoisers import dit_transformer, text_to_video_unet, wan_transformer

from .denoisers import BASES, motion_unet, three_levels


def groups_of(denoiser, shape=None, **fields):
    return select_groups(denoiser, find_mapping(denoiser), VicoConfig(**fields), shape)


def shape_of(denoiser, *size, kwargs=None):
    return find_mapping(denoiser).video_shape(denoiser, torch.zeros(size), kwargs or {})


def execution_order(denoiser, names, run):
    """The named layers in the order in which a forward calls them."""
    order = []
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name in names
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return order


def run_unet(unet, height=8, width=16, frames=3):
    sample, text = torch.zeros(1, 4, frames, height, width), torch.zeros(1, 5, unet.config.cross_attention_dim)
    if isinstance(unet, UNetMotionModel):
        text = text.repeat_interleave(frames, dim=0)
    unet(sample, 5, text)


@pytest.mark.parametrize("kind", ["unet3d", "animatediff"])
def test_groups_of_unets_are_in_the_order_in_which_their_layers_run(kind):
    unet = (
        motion_unet(layers_per_block=2)
        if kind == "animatediff"
        else UNet3DConditionModel(**(three_levels("3D") | {"layers_per_block": 2}), attention_head_dim=4)
    )
    groups = find_mapping(unet).find_groups(unet)
    assert len(groups) == 3 * 2 + 1 + 3 * 3
    names = [name for group in groups for name in (group.cross, *group.temporal)]
    assert execution_order(unet, names, lambda: run_unet(unet)) == names


def test_a_group_of_unet3d_is_a_spatial_transformer_and_the_temporal_one_of_its_place():
    unet = text_to_video_unet()
    assert find_mapping(unet).find_groups(unet)[1] == AttentionGroup(
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        (
            "mid_block.temp_attentions.0.transformer_blocks.0.attn1",
            "mid_block.temp_attentions.0.transformer_blocks.0.attn2",
        ),
        level=1,
    )


def test_motion_modules_of_blocks_without_cross_attention_belong_to_no_group():
    unet = motion_unet()
    names = {name for group in find_mapping(unet).find_groups(unet) for name in group.temporal}
    assert "down_blocks.2.motion_modules.0.transformer_blocks.0.attn1" in names
    assert any(name.startswith("down_blocks.3.motion_modules") for name, _ in unet.named_modules())
    assert not any(name.startswith(("down_blocks.3", "up_blocks.0")) for name in names)
    for group in find_mapping(unet).find_groups(unet):
        place, _, rest = group.cross.partition(".attentions.")
        assert all(name.startswith(f"{place}.motion_modules.{rest.split('.')[0]}.") for name in group.temporal)


def test_a_mid_block_without_motion_modules_gives_a_group_without_temporal_maps():
    unet = motion_unet(use_motion_mid_block=False)
    middle = [group for group in find_mapping(unet).find_groups(unet) if group.cross.startswith("mid_block")]
    assert [group.temporal for group in middle] == [()]


def test_temporal_layers_come_behind_the_last_of_several_spatial_blocks():
    unet = motion_unet(transformer_layers_per_block=2, temporal_transformer_layers_per_block=2)
    groups = [group for group in find_mapping(unet).find_groups(unet) if group.cross.startswith("down_blocks.1.")]
    assert [len(group.temporal) for group in groups] == [0, 4]
    names = [name for group in groups for name in (group.cross, *group.temporal)]
    assert execution_order(unet, names, lambda: run_unet(unet)) == names


@pytest.mark.parametrize(("height", "width"), [(8, 16), (10, 6), (13, 9)])
@pytest.mark.parametrize("kind", ["unet3d", "animatediff"])
def test_grids_of_unets_are_those_of_their_layers(kind, height, width):
    unet = motion_unet() if kind == "animatediff" else UNet3DConditionModel(**three_levels("3D"), attention_head_dim=4)
    mapping, shape = find_mapping(unet), shape_of(unet, 1, 4, 3, height, width)
    seen = {}
    handles = [
        unet.get_submodule(group.cross.partition(".transformer_blocks")[0]).register_forward_pre_hook(
            lambda module, args, kwargs, name=group.cross: seen.update(
                {name: tuple((args[0] if args else kwargs["hidden_states"]).shape[-2:])}
            ),
            with_kwargs=True,
        )
        for group in mapping.find_groups(unet)
    ]
    with torch.no_grad():
        run_unet(unet, height, width)
    for handle in handles:
        handle.remove()
    assert {group.cross: mapping.grid_of(group, shape) for group in mapping.find_groups(unet)} == seen


def test_the_quarter_grid_takes_the_layers_of_the_released_code():
    unet = motion_unet(layers_per_block=2)
    chosen = [group.cross for group in groups_of(unet, shape_of(unet, 1, 4, 2, 16, 32))]
    down = [f"down_blocks.2.attentions.{n}.transformer_blocks.0.attn2" for n in range(2)]
    assert chosen == down + [f"up_blocks.1.attentions.{n}.transformer_blocks.0.attn2" for n in range(3)]


def test_the_quarter_grid_is_known_before_the_size_and_rounded_up_for_sizes_that_do_not_divide():
    unet = motion_unet()
    known = groups_of(unet)
    assert [group.level for group in known] == [2, 2, 2]
    assert groups_of(unet, shape_of(unet, 1, 4, 2, 10, 7)) == known
    assert halved((10, 7), 2) == (3, 2)


def test_a_grid_of_numbers_takes_the_layers_that_have_it_and_all_takes_every_layer():
    unet = motion_unet()
    shape = shape_of(unet, 1, 4, 2, 8, 16)
    assert {group.level for group in groups_of(unet, shape, grid=(4, 8))} == {1}
    assert len(groups_of(unet, shape, grid="all")) == 10


def test_a_grid_that_no_layer_has_is_refused_with_those_there_are():
    unet = motion_unet()
    shape = shape_of(unet, 1, 4, 2, 8, 16)
    with pytest.raises(ValueError, match=r"grid \(3, 5\).*\[\(8, 16\), \(4, 8\), \(2, 4\), \(1, 2\)\]"):
        groups_of(unet, shape, grid=(3, 5))
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(4, 8\), \(2, 4\)"):
        groups_of(text_to_video_unet(), shape_of(text_to_video_unet(), 1, 4, 2, 4, 8))
    with pytest.raises(ValueError, match="quarter"):
        groups_of(text_to_video_unet())


def test_layers_of_a_transformer_are_the_middle_third_or_those_that_are_numbered():
    transformer = wan_transformer(num_layers=7)
    assert [group.block for group in groups_of(transformer)] == [2, 3, 4]
    assert [group.block for group in groups_of(transformer, layers=[6, 0])] == [0, 6]
    assert [group.block for group in groups_of(wan_transformer(num_layers=1))] == [0]
    assert groups_of(transformer, layers=[6])[0] == AttentionGroup("blocks.6.attn2", ("blocks.6.attn1",), block=6)
    with pytest.raises(ValueError, match=r"0 to 6.*\[7\]"):
        groups_of(transformer, layers=[7])


def test_blocks_are_counted_as_numbers_beyond_nine():
    assert [group.block for group in groups_of(wan_transformer(num_layers=12), layers=[2, 11])] == [2, 11]
    assert groups_of(wan_transformer(num_layers=12), layers=[10])[0].cross == "blocks.10.attn2"


def test_layers_by_a_regular_expression_and_what_does_not_fit():
    unet = motion_unet()
    chosen = groups_of(unet, layers=r"up_blocks\.1\.")
    assert [group.cross.split(".attentions")[0] for group in chosen] == ["up_blocks.1"] * 2
    with pytest.raises(ValueError, match=r"fits no layer.*down_blocks\.0\.attentions\.0"):
        groups_of(unet, layers="blocks_that_are_not_there")
    with pytest.raises(ValueError, match="regular expression"):
        groups_of(unet, layers=[0])


@pytest.mark.parametrize("name", ["wan", "ltx", "cogvideox"])
def test_sizes_of_transformers(name):
    base = BASES[name]
    denoiser = base.build()
    mapping = find_mapping(denoiser)
    shape = mapping.video_shape(denoiser, base.sample(2), base.kwargs(2))
    assert (shape.batch, shape.frames, shape.cells) == (2, base.frames, base.grid)


def test_sizes_of_ltx_must_be_told():
    base = BASES["ltx"]
    denoiser = base.build()
    for kwargs in ({}, {"num_frames": 3, "height": 2, "width": 5}):
        with pytest.raises(ValueError, match="24 places"):
            find_mapping(denoiser).video_shape(denoiser, base.sample(), kwargs)


def test_cells_of_transformers_are_joined_to_at_most_sixteen_on_a_side():
    mapping = find_mapping(wan_transformer())
    for cells, grid in (((30, 52), (15, 13)), ((16, 17), (16, 9)), ((5, 33), (5, 11))):
        assert mapping.grid_of(AttentionGroup(""), VideoShape(1, 2, cells, cells)) == grid


def test_subclasses_have_the_mapping_of_their_parent():
    assert find_mapping(BASES["videocrafter"].build()) is find_mapping(text_to_video_unet())


def test_a_denoiser_without_a_mapping_is_refused_with_those_that_have_one():
    with pytest.raises(TypeError, match=r"DiTTransformer2DModel.*WanTransformer3DModel.*register_vico_mapping"):
        find_mapping(dit_transformer())


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    {"text": Attention(4, 4, heads=1, dim_head=4), "time": Attention(4, heads=1, dim_head=4)}
                )
                for _ in range(11)
            ]
        )


def test_an_own_denoiser_is_registered_by_names():
    class Registered(Own):
        pass

    register_vico_mapping(
        Registered, cross=r"layers\.(\d+)\.text", temporal=("layers.{0}.time", "layers.{0}.more"), cell_size=2
    )
    denoiser = Registered()
    shape = shape_of(denoiser, 2, 3, 5, 4, 8)
    assert shape == VideoShape(2, 5, (4, 8), (2, 4))
    groups = groups_of(denoiser, shape, grid=(2, 4))
    assert [group.block for group in groups] == list(range(11))
    assert groups[10] == AttentionGroup("layers.10.text", ("layers.10.time",), block=10)
    assert [group.block for group in groups_of(denoiser, layers=[3])] == [3]
    with pytest.raises(TypeError, match="Own"):
        find_mapping(Own())


def test_an_own_mapping_replaces_the_one_before():
    class Registered(Own):
        pass

    mapping = VicoMapping(groups_by_name(r"layers\.(\d+)\.text", ()), lambda *_: None)
    register_vico_mapping(Registered, cross="nothing")
    register_vico_mapping(Registered, mapping)
    assert find_mapping(Registered()) is mapping


@pytest.mark.parametrize(
    ("error", "arguments", "message"),
    [
        (TypeError, {"denoiser_class": "Own", "cross": "x"}, "denoiser_class"),
        (TypeError, {"denoiser_class": Own, "mapping": "x"}, "VicoMapping"),
        (ValueError, {"denoiser_class": Own}, "not both"),
        (ValueError, {"denoiser_class": Own, "cross": "("}, "regular expression"),
        (ValueError, {"denoiser_class": Own, "cross": "x", "cell_size": 0}, "cell_size"),
    ],
)
def test_a_registration_that_cannot_be_is_refused(error, arguments, message):
    with pytest.raises(error, match=message):
        register_vico_mapping(**arguments)


def test_names_that_no_layer_has_are_refused():
    class Registered(Own):
        pass

    register_vico_mapping(Registered, cross=r"layers\.(\d+)\.text", temporal=("layers.{0}.tiem",))
    with pytest.raises(ValueError, match="tiem"):
        groups_of(Registered())
    register_vico_mapping(Registered, cross="nothing")
    with pytest.raises(ValueError, match="no cross-attention"):
        groups_of(Registered())

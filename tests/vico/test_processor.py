"""Queries and keys as each processor makes them: with the values they must give what the layer gives."""

import copy
import inspect

import pytest
import torch
from diffusers.models import attention_processor as plain
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_ltx import LTXAttention
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed

from diffusers_ext.vico.processor import VicoAttnProcessor
from tests.tiny_checkpoints.denoisers import cogvideox_transformer
from tests.tiny_checkpoints.parameters import randomize_zero_parameters

from .denoisers import rotation


WIDTH, TEXT_WIDTH, PLACES, TOKENS = 16, 12, 10, 7


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ready(layer):
    randomize_zero_parameters(layer)
    for module in layer.modules():
        if "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    return layer.double().eval()


def read(layer, *args, **kwargs):
    """The layer's output, and the projections that its wrapped processor hands out."""
    seen = []
    wrapper = VicoAttnProcessor(layer.processor)
    expected = layer(*args, **kwargs)
    vars(layer)["processor"] = wrapper
    assert layer(*args, **kwargs) is not None and not seen
    wrapper.reader = seen.append
    output = layer(*args, **kwargs)
    for one, other in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (output, expected)), strict=True):
        assert torch.equal(one, other)
    (projections,) = seen
    return output, projections


def attended(projections, value, heads):
    """(rows, queries, channels), by the plain formula."""
    logits = projections.query @ projections.key.transpose(-2, -1) * projections.scale
    if projections.bias is not None:
        logits = logits + projections.bias
    value = value.unflatten(2, (heads, -1)).transpose(1, 2)
    return (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def out_of(layer, hidden):
    return layer.to_out[1](layer.to_out[0](hidden))


def plain_attention(processor, cross=True, **changes):
    sizes = {"query_dim": WIDTH, "heads": 2, "dim_head": 8, "cross_attention_dim": TEXT_WIDTH if cross else None}
    return ready(Attention(**(sizes | {"processor": processor} | changes)))


PLAIN = {
    "sdpa": (plain.AttnProcessor2_0(), {}),
    "sdpa, normalised": (plain.AttnProcessor2_0(), {"qk_norm": "layer_norm"}),
    "sdpa, text normalised": (plain.AttnProcessor2_0(), {"cross_attention_norm": "layer_norm"}),
    "sdpa, group norm": (plain.AttnProcessor2_0(), {"norm_num_groups": 4}),
    "sdpa, layer without a scale": (plain.AttnProcessor2_0(), {"scale_qk": False}),
    "bmm": (plain.AttnProcessor(), {}),
    "bmm, layer without a scale": (plain.AttnProcessor(), {"scale_qk": False}),
    "bmm, normalised in vain": (plain.AttnProcessor(), {"qk_norm": "layer_norm"}),
    "sliced": (plain.SlicedAttnProcessor(1), {}),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_cross_attention(name, masked):
    processor, changes = PLAIN[name]
    layer = plain_attention(processor, **changes)
    hidden, text = noise(3, PLACES, WIDTH), noise(3, TOKENS, TEXT_WIDTH, seed=1)
    mask = 4 * noise(3, 1, TOKENS, seed=2) if masked else None
    output, projections = read(layer, hidden, encoder_hidden_states=text, attention_mask=mask)
    source = layer.norm_encoder_hidden_states(text) if layer.norm_cross else text
    close(out_of(layer, attended(projections, layer.to_v(source), 2)), output)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_self_attention(name):
    processor, changes = PLAIN[name]
    layer = plain_attention(processor, **{"cross": False, **{k: v for k, v in changes.items() if "cross" not in k}})
    hidden = noise(3, PLACES, WIDTH)
    output, projections = read(layer, hidden)
    source = hidden if layer.group_norm is None else layer.group_norm(hidden.mT).mT
    close(out_of(layer, attended(projections, layer.to_v(source), 2)), output)


@pytest.mark.parametrize("cross", [False, True])
def test_fused_attention_reads_the_fused_weights(cross):
    layer = plain_attention(plain.AttnProcessor2_0(), cross=cross)
    layer.fuse_projections()
    layer.set_processor(plain.FusedAttnProcessor2_0())
    torch.nn.init.normal_(layer.to_k.weight)  # what the fused processor does not look at
    text = noise(3, TOKENS, TEXT_WIDTH, seed=1) if cross else None
    hidden = noise(3, PLACES, WIDTH)
    output, projections = read(layer, hidden, encoder_hidden_states=text)
    value = layer.to_kv(text).chunk(2, dim=-1)[1] if cross else layer.to_qkv(hidden).chunk(3, dim=-1)[2]
    close(out_of(layer, attended(projections, value, 2)), output)


@pytest.mark.parametrize("cls", [plain.IPAdapterAttnProcessor, plain.IPAdapterAttnProcessor2_0])
def test_text_is_read_beside_the_images_of_an_ip_adapter(cls):
    layer = plain_attention(None)
    layer.set_processor(ready(cls(WIDTH, TEXT_WIDTH, num_tokens=(4,), scale=0.0)))
    hidden, text, images = noise(3, PLACES, WIDTH), noise(3, TOKENS, TEXT_WIDTH, seed=1), noise(3, 1, 4, TEXT_WIDTH)
    output, projections = read(layer, hidden, encoder_hidden_states=(text, [images]))
    close(out_of(layer, attended(projections, layer.to_v(text), 2)), output)


@pytest.mark.parametrize("fused", [False, True])
def test_wan_self_attention_with_rotation(fused):
    layer = ready(WanAttention(WIDTH, heads=2, dim_head=8, processor=WanAttnProcessor()))
    rotary = tuple(part.double() for part in WanRotaryPosEmbed(8, (1, 1, 1), 32)(torch.zeros(1, 1, 2, 1, 5)))
    if fused:
        layer.fuse_projections()
    hidden = noise(3, PLACES, WIDTH)
    output, projections = read(layer, hidden, None, None, rotary)
    close(out_of(layer, attended(projections, layer.to_v(hidden), 2)), output)


@pytest.mark.parametrize("fused", [False, True])
def test_wan_cross_attention_leaves_image_keys_out(fused):
    sizes = {"heads": 2, "dim_head": 8, "cross_attention_dim_head": 8, "added_kv_proj_dim": WIDTH}
    layer = ready(WanAttention(WIDTH, **sizes, processor=WanAttnProcessor()))
    torch.nn.init.zeros_(layer.add_v_proj.weight)
    torch.nn.init.zeros_(layer.add_v_proj.bias)
    if fused:
        layer.fuse_projections()
    hidden, context = noise(2, PLACES, WIDTH), noise(2, 3 + 512, WIDTH, seed=1)
    output, projections = read(layer, hidden, context)
    assert projections.key.shape[2] == 512
    value = layer.to_v(context[:, 3:])
    close(out_of(layer, attended(projections, value, 2)), output)


def test_ltx_cross_attention_with_its_mask():
    layer = ready(LTXAttention(WIDTH, heads=2, kv_heads=2, dim_head=8, cross_attention_dim=TEXT_WIDTH))
    hidden, text = noise(3, PLACES, WIDTH), noise(3, TOKENS, TEXT_WIDTH, seed=1)
    mask = torch.zeros(3, 1, TOKENS, dtype=torch.float64)
    mask[:, :, 4:] = -10000.0
    output, projections = read(layer, hidden, text, mask)
    close(out_of(layer, attended(projections, layer.to_v(text), 2)), output)


def test_ltx_self_attention_with_rotation():
    layer = ready(LTXAttention(WIDTH, heads=2, kv_heads=2, dim_head=8))
    rotary = tuple(part.float() for part in rotation(1, 1, PLACES, WIDTH))  # it rotates in fp32 anyway
    hidden = noise(3, PLACES, WIDTH)
    output, projections = read(layer, hidden, None, None, rotary)
    close(out_of(layer, attended(projections, layer.to_v(hidden), 2)), output)


@pytest.mark.parametrize("fused", [False, True])
def test_cogvideox_joint_attention(fused):
    transformer = ready(cogvideox_transformer(num_layers=1))
    if fused:
        transformer.fuse_qkv_projections()
    layer = transformer.transformer_blocks[0].attn1
    hidden, text = noise(2, 18, 32), noise(2, TOKENS, 32, seed=1)
    (video_out, text_out), projections = read(layer, hidden, encoder_hidden_states=text, image_rotary_emb=rotation())
    assert projections.text_length == TOKENS
    value = layer.to_v(torch.cat([text, hidden], dim=1))
    output = out_of(layer, attended(projections, value, 2))
    close(output, torch.cat([text_out, video_out], dim=1))


def test_it_stands_in_the_signature_of_what_it_wraps():
    for processor in (plain.AttnProcessor2_0(), plain.CogVideoXAttnProcessor2_0(), WanAttnProcessor()):
        wrapper = VicoAttnProcessor(processor)
        assert isinstance(wrapper, VicoAttnProcessor)
        assert type(wrapper).__name__ == "VicoAttnProcessor"
        assert inspect.signature(wrapper.__call__) == inspect.signature(processor.__call__)


def test_arguments_that_diffusers_drops_are_dropped_as_without_it():
    layer = plain_attention(plain.AttnProcessor2_0())
    hidden, text = noise(1, PLACES, WIDTH), noise(1, TOKENS, TEXT_WIDTH)
    expected = layer(hidden, text, scale=0.5)  # with a deprecation error if it reached the processor
    vars(layer)["processor"] = VicoAttnProcessor(layer.processor)
    assert torch.equal(layer(hidden, text, scale=0.5), expected)


def test_what_it_wraps_by_default_is_that_of_diffusers():
    assert isinstance(VicoAttnProcessor().wrapped, plain.AttnProcessor2_0)


def test_backends_are_set_on_what_it_wraps():
    processor = WanAttnProcessor()
    wrapper = VicoAttnProcessor(processor)
    wrapper._attention_backend = "native"
    assert processor._attention_backend == wrapper._attention_backend == "native"
    assert wrapper._parallel_config is None
    assert not hasattr(VicoAttnProcessor(plain.AttnProcessor2_0()), "_attention_backend")


def test_a_copy_of_it_wraps_a_copy():
    wrapper = VicoAttnProcessor(WanAttnProcessor())
    copied = copy.deepcopy(wrapper)
    assert copied.wrapped is not wrapper.wrapped and copied.reader is None


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (plain.XFormersAttnProcessor(), "xformers"),
        (plain.JointAttnProcessor2_0(), r"JointAttnProcessor2_0.*AttnProcessor2_0"),
        (type("Strange", (), {"__call__": lambda self, attn, x: x})(), "Strange"),
    ],
)
def test_what_cannot_be_read_is_refused(processor, message):
    with pytest.raises(NotImplementedError, match=message):
        VicoAttnProcessor(processor)


def test_context_parallel_processors_are_refused():
    processor = WanAttnProcessor()
    processor._parallel_config = object()
    with pytest.raises(NotImplementedError, match="context parallelism"):
        VicoAttnProcessor(processor)

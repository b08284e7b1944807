"""An independent, slow DiT with layer reuse: written from the paper's equations, for tests to compare with."""

import torch
from torch import Tensor


def reference_run(
    transformer: torch.nn.Module,
    inputs: list[tuple[Tensor, Tensor]],
    class_labels: Tensor,
    schedule: Tensor,
    *,
    store_gated: bool = False,
    linear: bool = False,
) -> list[Tensor]:
    """Outputs of a run of denoiser calls, reusing unit outputs by the table.

    Args:
        transformer: a `DiTTransformer2DModel`; only its submodules are called.
        inputs: per row, hidden states (batch, channels, height, width) and timestep (batch,).
        class_labels: (batch,).
        schedule: (N, M) bool over `attn1`, `ff` of each block in turn.
        store_gated: store outputs after their gate, which is *not* the method.
        linear: a reused output lies on the line through the two computed last, as a function of the timestep.
    """
    computed: dict[int, list[tuple[float, Tensor]]] = {}  # by column: timestep and output
    outputs = []
    for row, (sample, timestep) in enumerate(inputs):
        t = float(timestep[0])
        h = transformer.pos_embed(sample)
        for i, block in enumerate(transformer.transformer_blocks):
            c = block.norm1.emb(timestep, class_labels, hidden_dtype=h.dtype)
            shift1, scale1, gate1, shift2, scale2, gate2 = block.norm1.linear(torch.nn.functional.silu(c)).chunk(6, 1)
            for unit, (shift, scale, gate, norm, function) in enumerate(
                (
                    (shift1, scale1, gate1, block.norm1.norm, block.attn1),
                    (shift2, scale2, gate2, block.norm3, block.ff),
                )
            ):
                column = 2 * i + unit
                gate = gate[:, None]
                if schedule[row, column]:
                    value = function(norm(h) * (1 + scale[:, None]) + shift[:, None])
                    computed.setdefault(column, []).append((t, gate * value if store_gated else value))
                last_t, value = computed[column][-1]
                if linear and not schedule[row, column] and len(computed[column]) > 1:
                    before_t, before = computed[column][-2]
                    value = value + (value - before) / (last_t - before_t) * (t - last_t)
                h = h + (value if store_gated else gate * value)
        c = transformer.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=h.dtype)
        shift, scale = transformer.proj_out_1(torch.nn.functional.silu(c)).chunk(2, 1)
        h = transformer.proj_out_2(transformer.norm_out(h) * (1 + scale[:, None]) + shift[:, None])
        side, p, channels = int(h.shape[1] ** 0.5), transformer.patch_size, transformer.out_channels
        h = h.view(-1, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        outputs.append(h.reshape(-1, channels, side * p, side * p))
    return outputs


def random_inputs(num_rows: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Samples (batch, 4, 8, 8) and descending timesteps (batch,) of a run of `num_rows` calls."""
    times = torch.linspace(999, 0, num_rows).round().long()
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(batch, 4, 8, 8, generator=generator, dtype=dtype), t.expand(batch)) for t in times]


def call(transformer: torch.nn.Module, inputs: list[tuple[Tensor, Tensor]], class_labels: Tensor) -> list[Tensor]:
    """The denoiser's outputs for these inputs, called as a pipeline calls it."""
    with torch.no_grad():
        return [transformer(sample, timestep=t, class_labels=class_labels).sample for sample, t in inputs]

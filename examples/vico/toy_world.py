"""Coloured squares that move: clips whose captions name more than they show, and a video transformer to learn them.

    world = SquareWorld(num_frames=4)
    frames, captions = world.draw(4000, generator)     # (4000, 3, 4, 8, 8) in [-1, 1], (4000, 6)
    present = shows(frames, BLUE)                      # (4000, 4): in which frames there is a blue square

For `toy_dominance.py` beside this file.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_3d_condition import UNet3DConditionOutput
from torch import Tensor, nn

from diffusers_ext.vico.mappings import register_vico_mapping


CANVAS_SIZE, SQUARE_SIZE, CELL_SIZE = 8, 3, 2
RED, BLUE = 0, 2  # channels
BOS, EOS, PAD, RED_WORD, AND, BLUE_WORD = range(6)
BOTH_WORDS = (BOS, RED_WORD, AND, BLUE_WORD, EOS, PAD)
RED_ALONE = (BOS, RED_WORD, EOS, PAD, PAD, PAD)
BLUE_ALONE = (BOS, BLUE_WORD, EOS, PAD, PAD, PAD)
NO_WORDS = (BOS, EOS, PAD, PAD, PAD, PAD)
# Of 5 pixels in each frame a square is said to be there: more than half of it.
FEWEST_PIXELS = 5


class SquareWorld:
    """Clips of a red and a blue square on black, each moving by a pixel a frame and back at the border.

    Four of five captions are "red and blue"; of their clips 35% show both, 55% red and 10% blue alone. The others name
    what they show.

    Args:
        num_frames: of a clip.
        late_blue: the blue square enters after half of the frames.
    """

    def __init__(self, num_frames: int = 4, late_blue: bool = False) -> None:
        self.num_frames = num_frames
        self.late_blue = late_blue

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Clips (count, 3, frames, 8, 8) in [-1, 1], and their captions (count, 6)."""
        both_named = torch.rand(count, generator=generator) < 0.8
        kind = torch.rand(count, generator=generator)
        first = torch.rand(count, generator=generator) < 0.5
        shows_red = torch.where(both_named, kind < 0.9, first)
        shows_blue = torch.where(both_named, (kind < 0.35) | (kind >= 0.9), ~first)
        red, blue = self._squares(count, generator)
        blue = blue & self.blue_in_sight()[:, None, None]
        frames = torch.zeros(count, 3, self.num_frames, CANVAS_SIZE, CANVAS_SIZE)
        frames[:, RED] = (red & shows_red[:, None, None, None]).float()
        frames[:, BLUE] = (blue & shows_blue[:, None, None, None]).float()
        alone = torch.where(first[:, None], torch.tensor(RED_ALONE), torch.tensor(BLUE_ALONE))
        captions = torch.where(both_named[:, None], torch.tensor(BOTH_WORDS), alone)
        return frames * 2 - 1, captions

    def blue_in_sight(self) -> Tensor:
        """In which frames of clips that show blue it is there, (frames,)."""
        return torch.arange(self.num_frames) >= (self.num_frames // 2 if self.late_blue else 0)

    def _squares(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Masks (count, frames, 8, 8) of two squares that never touch one another."""
        red, blue = torch.empty(2, count, self.num_frames, CANVAS_SIZE, CANVAS_SIZE, dtype=torch.bool)
        missing = torch.arange(count)
        while len(missing):
            red[missing], blue[missing] = self._paths(len(missing), generator), self._paths(len(missing), generator)
            missing = missing[(red[missing] & blue[missing]).flatten(1).any(dim=1)]
        return red, blue

    def _paths(self, count: int, generator: torch.Generator) -> Tensor:
        """Masks (count, frames, 8, 8) of a square that moves along one side."""
        room = CANVAS_SIZE - SQUARE_SIZE
        start = torch.randint(2 * room, (count, 2, 1), generator=generator)  # the second half: on the way back
        along = F.one_hot(torch.randint(2, (count,), generator=generator), 2)[:, :, None]
        place = (start + along * torch.arange(self.num_frames)) % (2 * room)
        place = torch.where(place > room, 2 * room - place, place)[..., None]  # (count, 2, frames, 1)
        inside = (torch.arange(CANVAS_SIZE) >= place) & (torch.arange(CANVAS_SIZE) < place + SQUARE_SIZE)
        return inside[:, 0, :, :, None] & inside[:, 1, :, None, :]


def pixels_of(frames: Tensor, colour: int) -> Tensor:
    """Pixels (n, frames, 8, 8) of a colour in frames (n, 3, frames, 8, 8): more than half of it, no other."""
    bright = frames > 0
    others = [channel for channel in range(3) if channel != colour]
    return bright[:, colour] & ~bright[:, others].any(dim=1)


def shows(frames: Tensor, colour: int) -> Tensor:
    """Frames (n, 3, frames, 8, 8) in which there is a square of the colour, (n, frames)."""
    return pixels_of(frames, colour).sum(dim=(-2, -1)) >= FEWEST_PIXELS


def steadiness(frames: Tensor, colour: int) -> Tensor:
    """Share of the steps between two frames with the colour over which its centre moves by at most 1.5 pixels, (n,).

    nan where no two consecutive frames show it.
    """
    pixels, present = pixels_of(frames, colour).float(), shows(frames, colour)
    mass = pixels.sum(dim=(-2, -1)).clamp_min(1)
    grid = torch.arange(CANVAS_SIZE, dtype=pixels.dtype)
    centre = torch.stack(
        [(pixels.sum(dim=-1) * grid).sum(dim=-1) / mass, (pixels.sum(dim=-2) * grid).sum(dim=-1) / mass], dim=-1
    )
    near = centre.diff(dim=1).norm(dim=-1) <= 1.5
    both = present[:, 1:] & present[:, :-1]
    return (near & both).sum(dim=1) / both.sum(dim=1)


class ToyBlock(nn.Module):
    """Attention inside of frames, to the caption, twice over frames, and an MLP; each normalised before and added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        sizes = {"query_dim": width, "heads": heads, "dim_head": width // heads}
        self.spatial = Attention(**sizes)
        self.cross = Attention(**sizes, cross_attention_dim=width)
        self.temporal = nn.ModuleList([Attention(**sizes) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(5)])

    def forward(self, hidden: Tensor, text: Tensor) -> Tensor:
        """hidden (n, frames, cells, width) and text (n, tokens, width)."""
        num_frames, num_cells = hidden.shape[1:3]

        def in_frames(function, normalised: Tensor) -> Tensor:
            return function(normalised.flatten(0, 1)).unflatten(0, (-1, num_frames))

        repeated = text.repeat_interleave(num_frames, dim=0)
        hidden = hidden + in_frames(self.spatial, self.norms[0](hidden))
        hidden = hidden + in_frames(lambda x: self.cross(x, encoder_hidden_states=repeated), self.norms[1](hidden))
        for attention, norm in zip(self.temporal, self.norms[2:4], strict=True):
            fibres = norm(hidden).transpose(1, 2).flatten(0, 1)
            hidden = hidden + attention(fibres).unflatten(0, (-1, num_cells)).transpose(1, 2)
        return hidden + self.mlp(self.norms[4](hidden))


class ToyVideoTransformer(ModelMixin, ConfigMixin):
    """A factorised video transformer of 0.2 M parameters over cells of 2x2 pixels, with a table for the six words.

    Args:
        num_frames: of a clip.
        width: of the features.
        num_blocks: of layers.
        heads: of each attention.
    """

    @register_to_config
    def __init__(self, num_frames: int = 4, width: int = 48, num_blocks: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(6, width)
        self.word_places = nn.Parameter(0.02 * torch.randn(len(BOTH_WORDS), width))
        self.read = nn.Conv3d(3, width, (1, CELL_SIZE, CELL_SIZE), (1, CELL_SIZE, CELL_SIZE))
        self.cell_places = nn.Parameter(0.02 * torch.randn((CANVAS_SIZE // CELL_SIZE) ** 2, width))
        self.frame_places = nn.Parameter(0.02 * torch.randn(num_frames, 1, width))
        self.time = Timesteps(width, True, 0)
        self.time_embedding = TimestepEmbedding(width, width)
        self.blocks = nn.ModuleList([ToyBlock(width, heads) for _ in range(num_blocks)])
        self.norm = nn.LayerNorm(width)
        self.write = nn.ConvTranspose3d(width, 3, (1, CELL_SIZE, CELL_SIZE), (1, CELL_SIZE, CELL_SIZE))

    def embed(self, captions: Tensor) -> Tensor:
        """Captions (n, 6) to what the blocks attend to, (n, 6, width)."""
        return self.words(captions) + self.word_places

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = True
    ) -> UNet3DConditionOutput | tuple[Tensor]:
        """sample (n, 3, frames, 8, 8), timestep () or (n,), text (n, 6, width), to the velocity, like the sample."""
        cells = self.read(sample)
        hidden = cells.permute(0, 2, 3, 4, 1).flatten(2, 3) + self.cell_places + self.frame_places
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        hidden = hidden + self.time_embedding(self.time(timestep).to(sample.dtype))[:, None, None]
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states)
        velocity = self.write(self.norm(hidden).permute(0, 3, 1, 2).unflatten(3, cells.shape[3:]))
        return UNet3DConditionOutput(sample=velocity) if return_dict else (velocity,)


register_vico_mapping(
    ToyVideoTransformer,
    cross=r"blocks\.(\d+)\.cross",
    temporal=("blocks.{0}.temporal.0", "blocks.{0}.temporal.1"),
    cell_size=CELL_SIZE,
)

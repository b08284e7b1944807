"""The two custom pipelines: the base pipeline until enabled, then equal frames on any number of ranks, and files."""

import ast
import dataclasses
import importlib.util
import json
import re
import textwrap
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_ext import VideoInfinityConfig, video_infinity
from diffusers_ext.hub import pipeline_class_name, validate_model_card
from diffusers_ext.video_infinity import clip_bounds, prepare_clip_latents
from diffusers_ext.videocrafter import VideoCrafterUNet3DConditionModel
from tests.ranks import run_on_ranks
from tests.tiny_checkpoints import TINY_PIPELINES, realign_parameters


PIPELINES = Path(__file__).parents[2] / "pipelines"

# Tiny checkpoint, by pipeline.
BASES = {"text_to_video": "text_to_video_sd", "animatediff": "animatediff"}
WHOLE = {"local_frames": None, "global_frames": 0, "global_phase": None, "local_phase": None}
SCOPE = {"local_frames": 1, "global_frames": 2}
FRAMES = 7  # uneven on two and on three ranks
PROMPTS = ["a red cat", "a blue dog on a mat", "a dog"]
CLOSE = 2e-4

each_pipeline = pytest.mark.parametrize("name", BASES)


@dataclasses.dataclass
class Pair:
    """A custom pipeline, and the stock one of the same checkpoint."""

    ours: DiffusionPipeline
    stock: DiffusionPipeline


def load(name: str, checkpoint: Path | str, **components) -> DiffusionPipeline:
    file = str(PIPELINES / f"video_infinity_{name}.py")
    pipe = DiffusionPipeline.from_pretrained(checkpoint, custom_pipeline=file, trust_remote_code=True, **components)
    return settled(pipe)


def settled(pipe: DiffusionPipeline) -> DiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    realign_parameters(pipe)
    return pipe


def arguments(name: str, **changes) -> dict:
    return {**TINY_PIPELINES[BASES[name]].call_kwargs(), "num_frames": FRAMES, **changes}


def draw(pipe: DiffusionPipeline, name: str, **changes) -> np.ndarray | None:
    frames = pipe(**arguments(name, **changes)).frames
    return None if frames is None else np.asarray(frames)


def draw_with(pipe: DiffusionPipeline, name: str, fields: dict, **changes) -> np.ndarray | None:
    """With Video-Infinity enabled for this call."""
    pipe.enable_video_infinity(**fields)
    try:
        return draw(pipe, name, **changes)
    finally:
        pipe.disable_video_infinity()


def grey_levels(frames: np.ndarray) -> np.ndarray:
    """(frames, height, width, 3) in [0, 1] to uint8, rounded."""
    return np.round(frames * 255).astype(np.uint8)


def png_folder(folder: Path) -> np.ndarray:
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(len(files))]
    return np.stack([np.asarray(PIL.Image.open(file)) for file in files])


@pytest.fixture(scope="module")
def pairs(tiny_checkpoint):
    """Loaded once for each name; a test leaves Video-Infinity off."""
    found: dict[str, Pair] = {}

    def pair(name: str) -> Pair:
        if name not in found:
            checkpoint = tiny_checkpoint(BASES[name])
            found[name] = Pair(load(name, checkpoint), settled(DiffusionPipeline.from_pretrained(checkpoint)))
        return found[name]

    return pair


@pytest.fixture
def pair(pairs, name):
    found = pairs(name)
    yield found
    if found.ours.video_infinity_enabled:
        found.ours.disable_video_infinity()


# What a pipeline is


def test_these_are_all_pipelines_of_the_method():
    assert {path.stem for path in PIPELINES.glob("video_infinity_*.py")} == {
        f"video_infinity_{name}" for name in BASES
    }


@each_pipeline
def test_exactly_one_pipeline_class_is_visible_besides_the_base(name):
    """diffusers takes the class of the file that is not its own; of two it would take any."""
    file = PIPELINES / f"video_infinity_{name}.py"
    spec = importlib.util.spec_from_file_location(f"alone_{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    ours = [
        cls
        for cls in classes
        if issubclass(cls, DiffusionPipeline) and not cls.__module__.startswith("diffusers.pipelines.")
    ]
    assert [cls.__name__ for cls in ours] == [pipeline_class_name(file.read_text(), name)]


@each_pipeline
def test_a_pipeline_is_the_mixin_before_the_base_and_says_how_it_is_started(pair, name):
    ours, stock = type(pair.ours), type(pair.stock)
    assert ours.__bases__ == (video_infinity.VideoInfinityMixin, stock)
    assert "torchrun" in ours.__doc__ and "accelerate launch" in ours.__doc__
    assert {key for key in vars(ours) if not key.startswith("__")} <= {"_abc_impl"}


# The base pipeline, and away from it and back


@each_pipeline
@pytest.mark.parametrize(("output_type", "num_frames"), [("np", 4), ("pt", 4), ("pil", 4), ("latent", 4), ("np", 16)])
def test_until_enabled_it_is_the_stock_pipeline_bit_for_bit(pair, name, output_type, num_frames):
    ours, stock = (
        pipe(**arguments(name, num_frames=num_frames, output_type=output_type)).frames
        for pipe in (pair.ours, pair.stock)
    )
    assert type(ours) is type(stock)
    if output_type == "pil":
        assert isinstance(ours[0][0], PIL.Image.Image)
        ours, stock = ([[np.asarray(frame) for frame in video] for video in film] for film in (ours, stock))
    assert np.array_equal(np.asarray(ours), np.asarray(stock))
    assert pair.ours.video_infinity_stats is None


@each_pipeline
def test_until_enabled_a_list_of_prompts_makes_a_video_each_and_chunks_are_decoded_as_asked(pair, name):
    prompts = {"prompt": PROMPTS[:2], "negative_prompt": None}
    expected = draw(pair.stock, name, **prompts)
    assert len(expected) == 2
    assert np.array_equal(draw(pair.ours, name, **prompts), expected)
    rows = []
    handle = pair.ours.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    draw(pair.ours, name, decode_chunk_size=3)
    handle.remove()
    assert max(rows) == (FRAMES if name == "text_to_video" else 3)  # the stock one decodes all at once


@each_pipeline
def test_one_clip_and_the_whole_window_are_the_base_pipeline(pair, name):
    expected = draw(pair.stock, name)
    np.testing.assert_allclose(draw_with(pair.ours, name, WHOLE), expected, rtol=0, atol=CLOSE)
    np.testing.assert_allclose(draw_with(pair.ours, name, WHOLE | {"num_clips": 3}), expected, rtol=0, atol=CLOSE)


@each_pipeline
def test_enabled_it_draws_other_frames_the_same_each_time_and_disabled_the_old_ones(pair, name):
    before = draw(pair.ours, name)
    pair.ours.enable_video_infinity(VideoInfinityConfig(local_frames=3, global_frames=2), local_frames=1, num_clips=2)
    first = draw(pair.ours, name)
    assert np.array_equal(draw(pair.ours, name), first)
    stats = pair.ours.video_infinity_stats
    assert (stats.rank, stats.calls, stats.clips, stats.num_frames) == (None, 6, 2, FRAMES)
    assert stats.bytes_sent == 0
    pair.ours.disable_video_infinity()
    assert pair.ours.video_infinity_stats is None
    assert first.shape == before.shape and np.abs(first - before).max() > 1e-3
    assert np.array_equal(draw(pair.ours, name), before)
    assert np.array_equal(draw_with(pair.ours, name, SCOPE | {"num_clips": 2}), first)


class Stop(Exception):
    pass


@each_pipeline
def test_an_error_in_a_callback_leaves_the_next_run_right(pair, name):
    pair.ours.enable_video_infinity(**SCOPE)
    expected = draw(pair.ours, name)

    def stop(*_):
        raise Stop

    callback = "callback" if name == "text_to_video" else "callback_on_step_end"
    with pytest.raises(Stop):
        draw(pair.ours, name, prompt=PROMPTS, **{callback: stop})
    assert np.array_equal(draw(pair.ours, name), expected)


# Prompts


def by_hand(stock: DiffusionPipeline, name: str, texts: torch.Tensor, **changes) -> np.ndarray:
    """The stock pipeline with the text of each frame, (2, frames, length, width), put in where layers read it."""
    rows = texts.flatten(0, 1)
    if name == "text_to_video":  # its UNet repeats one text for all frames, so it is changed behind that
        readers = [module for module in stock.unet.modules() if type(module).__name__ == "Transformer2DModel"]
    else:
        readers = [stock.unet]

    def put(module, args, kwargs):
        assert kwargs["encoder_hidden_states"].shape == rows.shape
        return args, {**kwargs, "encoder_hidden_states": rows}

    handles = [reader.register_forward_pre_hook(put, with_kwargs=True) for reader in readers]
    try:
        return draw(stock, name, **changes)
    finally:
        for handle in handles:
            handle.remove()


def texts_of(stock: DiffusionPipeline, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each prompt's and the negative prompt's embedding, (prompts, length, width) and (length, width)."""
    negative = TINY_PIPELINES["animatediff"].call_kwargs()["negative_prompt"]
    with torch.no_grad():
        encoded = [stock.encode_prompt(prompt, "cpu", 1, True, negative) for prompt in prompts]
    return torch.cat([positive for positive, _ in encoded]), encoded[0][1][0]


@each_pipeline
@pytest.mark.parametrize(
    ("prompts", "owners"),
    [
        (PROMPTS, [frame * 3 // FRAMES for frame in range(FRAMES)]),  # floor(f P / F)
        (tuple(PROMPTS[:2]), [0, 0, 0, 0, 1, 1, 1]),
        ({4: PROMPTS[1], 0: PROMPTS[0], 5: PROMPTS[2]}, [0, 0, 0, 0, 1, 2, 2]),
        ([PROMPTS[0]], [0] * FRAMES),
    ],
    ids=["list", "tuple", "dict", "one"],
)
def test_each_frame_reads_its_prompt(pair, name, prompts, owners):
    positive, negative = texts_of(pair.stock, PROMPTS)
    texts = torch.stack((negative.expand(FRAMES, -1, -1), positive[owners]))
    expected = by_hand(pair.stock, name, texts)
    found = draw_with(pair.ours, name, WHOLE, prompt=prompts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)
    clips = draw_with(pair.ours, name, WHOLE | {"num_clips": 3, "spatial_chunk_frames": 2}, prompt=prompts)
    np.testing.assert_allclose(clips, expected, rtol=0, atol=CLOSE)
    if len(set(owners)) > 1:
        assert np.abs(expected - draw(pair.stock, name, prompt=PROMPTS[0])).max() > 1e-2


@each_pipeline
def test_without_guidance_too(pair, name):
    positive, _ = texts_of(pair.stock, PROMPTS)
    owners = [frame * 3 // FRAMES for frame in range(FRAMES)]
    expected = by_hand(pair.stock, name, positive[owners][None], guidance_scale=1.0)
    found = draw_with(pair.ours, name, WHOLE, prompt=PROMPTS, guidance_scale=1.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


@each_pipeline
def test_a_list_of_equal_prompts_is_one_prompt(pair, name):
    one = draw_with(pair.ours, name, SCOPE, prompt=PROMPTS[0])
    found = draw_with(pair.ours, name, SCOPE, prompt=[PROMPTS[0]] * 3)
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-5)


@each_pipeline
@pytest.mark.parametrize(
    ("length", "shares"),
    [(0, [0, 0, 0, 1, 1, 1, 1]), (2, [0, 0, 1 / 3, 2 / 3, 1, 1, 1]), (3, [0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1])],
)
def test_a_prompt_changes_to_the_next_over_some_frames(pair, name, length, shares):
    positive, negative = texts_of(pair.stock, PROMPTS[:2])
    share = torch.tensor(shares)[:, None, None]
    texts = torch.stack((negative.expand(FRAMES, -1, -1), positive[0] * (1 - share) + positive[1] * share))
    expected = by_hand(pair.stock, name, texts)
    prompts = {0: PROMPTS[0], 3: PROMPTS[1]}
    found = draw_with(pair.ours, name, WHOLE, prompt=prompts, prompt_transition_frames=length)
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE)


# Noise


@each_pipeline
@pytest.mark.parametrize("noise", ["sliced", "per_frame", "rescheduled"])
def test_noise_is_what_prepare_clip_latents_draws(pair, name, noise):
    fields = SCOPE | {"num_clips": 2}
    call = {"num_frames": 18, "num_inference_steps": 1}  # beyond the window of 16
    latents = prepare_clip_latents((1, 4, 18, 8, 16), generator=torch.Generator().manual_seed(0), noise=noise)
    expected = draw_with(pair.ours, name, fields, **call, latents=latents)
    assert np.array_equal(draw_with(pair.ours, name, fields, **call, noise=noise), expected)
    sliced = draw_with(pair.ours, name, fields, **call)
    assert np.array_equal(sliced, expected) == (noise == "sliced")


@each_pipeline
def test_sliced_noise_is_the_stock_pipelines(pair, name):
    """The latents that it begins with, seen at the first call of the UNet."""
    seen = []
    for pipe in (pair.ours, pair.stock):
        handle = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        draw(pipe, name, num_inference_steps=1)
        handle.remove()
    assert torch.equal(*seen)


# What is returned


@each_pipeline
def test_kinds_of_output_hold_the_same_frames(pair, name):
    pair.ours.enable_video_infinity(**SCOPE)
    array = pair.ours(**arguments(name, output_type="np")).frames
    tensor = pair.ours(**arguments(name, output_type="pt")).frames
    pictures = pair.ours(**arguments(name, output_type="pil")).frames
    latents = pair.ours(**arguments(name, output_type="latent")).frames
    assert array.shape == (1, FRAMES, 16, 32, 3)
    assert np.array_equal(array, tensor.permute(0, 1, 3, 4, 2).numpy())
    assert np.array_equal(np.stack([np.asarray(frame) for frame in pictures[0]]), grey_levels(array[0]))
    assert latents.shape == (1, 4, FRAMES, 8, 16)
    decoded = pair.ours.decode_clip(latents, decode_chunk_size=3)
    frames = pair.ours.video_processor.postprocess_video(decoded, output_type="np")
    np.testing.assert_allclose(frames, array, rtol=0, atol=1e-6)


@each_pipeline
@pytest.mark.parametrize("output_type", ["np", "latent"])
def test_a_tuple_where_no_output_object_is_asked_for(pair, name, output_type):
    pair.ours.enable_video_infinity(**SCOPE)
    found = pair.ours(**arguments(name, output_type=output_type, return_dict=False))
    assert isinstance(found, tuple) and len(found) == 1
    assert np.array_equal(found[0], pair.ours(**arguments(name, output_type=output_type)).frames)


@each_pipeline
@pytest.mark.parametrize("gather", ["rank0", "all", "none"])
def test_a_process_that_is_alone_gets_the_video(pair, name, gather):
    pair.ours.enable_video_infinity(**SCOPE, num_clips=2)
    assert np.array_equal(draw(pair.ours, name, gather=gather), draw(pair.ours, name))


@each_pipeline
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_size_of_decoded_chunks_changes_nothing_but_rounding(pair, name, size):
    pair.ours.enable_video_infinity(**SCOPE)
    rows = []
    handle = pair.ours.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    found = draw(pair.ours, name, decode_chunk_size=size)
    handle.remove()
    assert max(rows) == min(size, FRAMES) and sum(rows) == FRAMES
    np.testing.assert_allclose(found, draw(pair.ours, name), rtol=0, atol=1e-6)


# Files


@each_pipeline
def test_a_folder_of_pngs_holds_the_frames_rounded(pair, name, tmp_path):
    pair.ours.enable_video_infinity(**SCOPE)
    output = pair.ours(**arguments(name, output_path=tmp_path / "new" / "film", decode_chunk_size=3))
    assert output.frames is None
    assert pair.ours(**arguments(name, output_path=str(tmp_path / "again"), return_dict=False)) == (None,)
    expected = grey_levels(draw(pair.ours, name)[0])
    for folder in (tmp_path / "new" / "film", tmp_path / "again"):
        assert np.array_equal(png_folder(folder), expected)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "again"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"film"}


@each_pipeline
@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_film_is_what_the_rounded_frames_encode_to(pair, name, suffix, tmp_path):
    film, alike = tmp_path / f"film{suffix}", tmp_path / f"alike{suffix}"
    film.write_bytes(b"what was there is replaced")
    pair.ours.enable_video_infinity(**SCOPE)
    pair.ours(**arguments(name, output_path=film, output_fps=5, decode_chunk_size=3))
    expected = grey_levels(draw(pair.ours, name)[0])
    options = {"duration": 200, "loop": 0} if suffix == ".gif" else {"fps": 5, "macro_block_size": 1}
    imageio.mimwrite(alike, expected, **options)
    found, reference = (np.stack(imageio.mimread(path))[..., :3] for path in (film, alike))
    assert found.shape == expected.shape
    assert np.array_equal(found, reference)
    assert np.abs(found.astype(float) - expected).mean() < 30  # noise is hard to encode; another film is 50 apart
    meta = imageio.get_reader(film).get_meta_data()
    assert meta["duration"] == 200 if suffix == ".gif" else meta["fps"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {film.name, alike.name}


@each_pipeline
def test_until_enabled_files_are_written_too(pair, name, tmp_path):
    pair.ours(**arguments(name, output_path=tmp_path / "film"))
    assert np.array_equal(png_folder(tmp_path / "film"), grey_levels(draw(pair.stock, name)[0]))


@each_pipeline
@pytest.mark.parametrize("film", ["film.mp4", "film.gif", "film"])
def test_after_a_failure_nothing_is_half_written_and_what_was_there_stays(pair, name, film, tmp_path, monkeypatch):
    pair.ours.enable_video_infinity(**SCOPE)
    pair.ours(**arguments(name, output_path=tmp_path / film))
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    decode, calls = pair.ours.vae.decode, []

    def fail_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        return decode(*args, **kwargs)

    monkeypatch.setattr(pair.ours.vae, "decode", fail_at_the_third, raising=False)
    for path in (tmp_path / film, tmp_path / f"other-{film}"):
        calls.clear()
        with pytest.raises(Stop):
            draw(pair.ours, name, prompt=PROMPTS[1], output_path=path, decode_chunk_size=2)
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before
    assert {path.name for path in tmp_path.iterdir()} == {film}


@each_pipeline
def test_a_folder_that_holds_anything_else_is_left_alone(pair, name, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises((ValueError, OSError), match="output_path"):
        draw(pair.ours, name, output_path=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


# Ranks


def load_in_turn(name: str, checkpoint: str, **components) -> DiffusionPipeline:
    """One rank after the other: each copies a local file anew, which another would find half-written."""
    state = PartialState(cpu=True)
    for rank in range(state.num_processes):
        if rank == state.process_index:
            pipe = load(name, checkpoint, **components)
        state.wait_for_everyone()
    return pipe


TWO_STEPS = {"num_inference_steps": 2}


def draw_on_rank(rank: int, world_size: int, checkpoints: dict[str, str], folder: str) -> dict[str, dict]:
    """What each pipeline draws on this rank, by pipeline and job."""
    found = {}
    for name, checkpoint in checkpoints.items():
        pipe = load_in_turn(name, checkpoint)
        fields = fields_of(name, world_size)
        pipe.enable_video_infinity(**fields)
        found[name] = {
            job: draw(pipe, name, gather="all", **TWO_STEPS, **changes) for job, changes in jobs_of(name, world_size)
        }
        for gather in ("rank0", "none"):
            found[name][gather] = draw(pipe, name, gather=gather, **TWO_STEPS)
        for film in ("film", "film.mp4"):
            path = Path(folder) / f"{name}-{film}"
            found[name][film] = pipe(**arguments(name, output_path=path, decode_chunk_size=2, **TWO_STEPS)).frames
        found[name]["tuple"] = pipe(**arguments(name, return_dict=False, num_inference_steps=1))[0]
        found[name]["stats"] = pipe.video_infinity_stats
        pipe.disable_video_infinity()
        found[name]["whole"] = draw_with(pipe, name, WHOLE | {"frame_positions": "global"}, gather="all")
    if "text_to_video" in checkpoints:
        pipe = load_in_turn("text_to_video", checkpoints["text_to_video"], unet=frame_rate_unet())
        found["videocrafter"] = draw_with(pipe, "text_to_video", SCOPE, fps=6, gather="all")
    return found


# Name -> arguments of the call.
JOBS = {
    "one prompt": {},
    "list": {"prompt": PROMPTS},
    "dict": {"prompt": {0: PROMPTS[0], 4: PROMPTS[1]}, "prompt_transition_frames": 2},
    "no guidance": {"prompt": PROMPTS[:2], "guidance_scale": 1.0},
    "per_frame": {"noise": "per_frame"},
    "rescheduled": {"noise": "rescheduled", "num_frames": 18},
    "stochastic": {"eta": 1.0},
    "chunks": {"decode_chunk_size": 1},
}


def jobs_of(name: str, clips: int) -> list[tuple[str, dict]]:
    """Without 18 frames in one clip where 16 positions are all there are."""
    return [job for job in JOBS.items() if (name, clips, job[0]) != ("animatediff", 1, "rescheduled")]


def fields_of(name: str, clips: int) -> dict:
    """Positions in clips depend on the clips, so one process is told how many there are."""
    return SCOPE | ({"frame_positions": "clip", "num_clips": clips} if name == "animatediff" else {})


@pytest.fixture(scope="module", params=[1, 2, 3])
def drawn(request, tiny_checkpoint, tmp_path_factory):
    """Number of ranks, what each drew, and where they wrote."""
    folder = tmp_path_factory.mktemp("films")
    checkpoints = {name: str(tiny_checkpoint(base)) for name, base in BASES.items()}
    return request.param, run_on_ranks(draw_on_rank, request.param, checkpoints, str(folder), timeout=300), folder


@each_pipeline
def test_ranks_draw_what_one_process_draws(drawn, pair, name):
    """Every prompt, noise and size of chunk."""
    world_size, ranks, _ = drawn
    fields = fields_of(name, world_size)
    for job, changes in jobs_of(name, world_size):
        expected = draw_with(pair.ours, name, fields, **TWO_STEPS, **changes)
        for found in ranks:
            np.testing.assert_allclose(found[name][job], expected, rtol=0, atol=CLOSE, err_msg=job)
            assert np.array_equal(found[name][job], ranks[0][name][job])
    assert np.abs(ranks[0][name]["list"] - ranks[0][name]["one prompt"]).max() > 1e-2
    assert np.abs(ranks[0][name]["dict"] - ranks[0][name]["list"]).max() > 1e-3


@each_pipeline
def test_attending_to_the_whole_video_ranks_draw_the_stock_frames(drawn, pair, name):
    for found in drawn[1]:
        np.testing.assert_allclose(found[name]["whole"], draw(pair.stock, name), rtol=0, atol=CLOSE)


@each_pipeline
def test_each_rank_gets_what_it_asks_for(drawn, name):
    world_size, ranks, _ = drawn
    whole = ranks[0][name]["one prompt"]
    for rank, (start, end) in enumerate(clip_bounds(FRAMES, world_size)):
        found = ranks[rank][name]
        np.testing.assert_allclose(found["none"], whole[:, start:end], rtol=0, atol=1e-6)
        assert (found["rank0"] is None) == (found["tuple"] is None) == (rank != 0)
        assert found["film"] is found["film.mp4"] is None
        stats = found["stats"]
        assert stats.clips == world_size and stats.rank == (None if world_size == 1 else rank)
        assert (stats.bytes_sent > 0) == (world_size > 1)
    np.testing.assert_allclose(ranks[0][name]["rank0"], whole, rtol=0, atol=1e-6)


@each_pipeline
def test_rank_0_writes_the_film_of_all(drawn, pair, name, tmp_path):
    world_size, ranks, folder = drawn
    frames = grey_levels(ranks[0][name]["one prompt"][0]).astype(int)
    film = png_folder(folder / f"{name}-film").astype(int)
    assert film.shape == frames.shape and np.abs(film - frames).max() <= 1
    pair.ours.enable_video_infinity(**fields_of(name, world_size), mode="single")
    pair.ours(**arguments(name, output_path=tmp_path / "film", decode_chunk_size=2, **TWO_STEPS))
    assert np.abs(film - png_folder(tmp_path / "film").astype(int)).max() <= 1
    assert len(imageio.mimread(folder / f"{name}-film.mp4")) == FRAMES
    written = {path.name for path in folder.iterdir()}
    assert written == {f"{one}-{film}" for one in BASES for film in ("film", "film.mp4")}


# VideoCrafter's UNet


def frame_rate_unet() -> VideoCrafterUNet3DConditionModel:
    """A tiny one, the same each time."""
    plain = TINY_PIPELINES["text_to_video_sd"].build().unet
    config = {key: value for key, value in plain.config.items() if not key.startswith("_")}
    unet = VideoCrafterUNet3DConditionModel(**config, fps_cond=True)
    missing, unexpected = unet.load_state_dict(plain.state_dict(), strict=False)
    assert missing and not unexpected and all(key.startswith("fps_embedding.") for key in missing)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in unet.fps_embedding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return unet.eval()


def told_by_hand(stock: DiffusionPipeline, fps: float) -> np.ndarray:
    """The stock pipeline's frames, each call of the UNet told the frame rate."""
    handle = stock.unet.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "fps": fps}), with_kwargs=True
    )
    try:
        return draw(stock, "text_to_video")
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def frame_rate_pair(tiny_checkpoint):
    checkpoint = tiny_checkpoint("text_to_video_sd")
    ours = load("text_to_video", checkpoint, unet=frame_rate_unet())
    return Pair(ours, settled(DiffusionPipeline.from_pretrained(checkpoint, unet=frame_rate_unet())))


def test_the_frame_rate_reaches_videocrafters_unet(frame_rate_pair):
    ours, stock = frame_rate_pair.ours, frame_rate_pair.stock
    drawn = {fps: draw_with(ours, "text_to_video", WHOLE, fps=fps) for fps in (6, 24)}
    for fps, found in drawn.items():
        np.testing.assert_allclose(found, told_by_hand(stock, fps), rtol=0, atol=CLOSE)
    assert np.abs(drawn[6] - drawn[24]).max() > 1e-3
    untold = draw_with(ours, "text_to_video", WHOLE)  # 24 by the UNet's default
    np.testing.assert_allclose(untold, drawn[24], rtol=0, atol=1e-6)
    assert np.array_equal(draw(ours, "text_to_video"), draw(stock, "text_to_video"))


def test_the_frame_rate_reaches_it_on_every_rank(drawn, frame_rate_pair):
    expected = draw_with(frame_rate_pair.ours, "text_to_video", SCOPE, fps=6)
    for found in drawn[1]:
        np.testing.assert_allclose(found["videocrafter"], expected, rtol=0, atol=CLOSE)


# What cannot be


@pytest.fixture
def no_work(pair):
    """Nothing is encoded, denoised or decoded."""

    def refuse(module, args):
        raise AssertionError(f"{type(module).__name__} was called")

    modules = (pair.ours.text_encoder, pair.ours.unet, pair.ours.vae.decoder)
    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    yield
    for handle in handles:
        handle.remove()


TWO_VIDEOS = {
    "prompt": None,
    "negative_prompt": None,
    "prompt_embeds": torch.zeros(2, 8, 32),
    "negative_prompt_embeds": torch.zeros(2, 8, 32),
}

# (arguments, what the error must say); an `output_path` is within a temporary folder.
BAD = [
    ({"prompt": []}, "`prompt` must be a string, a list of strings or a dict"),
    ({"prompt": 3}, "`prompt` must be a string, a list of strings or a dict"),
    ({"prompt": ["a", 3]}, "`prompt` must be a string, a list of strings or a dict"),
    ({"prompt": ["a"] * (FRAMES + 1)}, f"`prompt` has {FRAMES + 1} prompts, more than the video's {FRAMES} frames"),
    ({"prompt": {}}, "`prompt` must have a prompt for frame 0"),
    ({"prompt": {1: "a"}}, "`prompt` must have a prompt for frame 0"),
    ({"prompt": {0: "a", FRAMES: "b"}}, rf"`prompt` must have frames in 0\.\.{FRAMES - 1}, got \[{FRAMES}\]"),
    ({"prompt": {0: "a", -1: "b"}}, rf"`prompt` must have frames in 0\.\.{FRAMES - 1}, got \[-1\]"),
    ({"prompt": {0: "a", "1": "b"}}, "`prompt` must map frame numbers to strings, got '1': 'b'"),
    ({"prompt": {0: 1}}, "`prompt` must map frame numbers to strings, got 0: 1"),
    ({"prompt": PROMPTS, "prompt_transition_frames": -1}, "`prompt_transition_frames` must be .* got -1"),
    ({"prompt": PROMPTS, "prompt_transition_frames": 1.5}, "`prompt_transition_frames` must be .* got 1.5"),
    ({"prompt": PROMPTS, "prompt_transition_frames": 3}, "`prompt_transition_frames` must be at most 2"),
    ({"prompt_transition_frames": -1}, "`prompt_transition_frames` must be .* got -1"),
    ({"num_frames": 0}, "`num_frames` must be .* got 0"),
    ({"num_frames": -1}, "`num_frames` must be .* got -1"),
    ({"num_frames": 4.0}, "`num_frames` must be .* got 4.0"),
    ({"num_frames": True}, "`num_frames` must be .* got True"),
    ({"num_frames": None}, "`num_frames` must be .* got None"),
    ({"noise": "white"}, "`noise` must be one of .* got 'white'"),
    ({"noise": "per_frame", "generator": None}, '`noise="per_frame"` needs a `generator`'),
    ({"noise": "per_frame", "latents": torch.zeros(1, 4, FRAMES, 8, 16)}, "`latents` are given"),
    ({"noise": "per_frame", "generator": [torch.Generator()] * 2}, "`generator` must be one or 1 of them"),
    ({"latents": torch.zeros(1, 4, FRAMES + 1, 8, 16)}, f"`latents` must be .* num_frames={FRAMES}, h, w"),
    ({"latents": torch.zeros(4, FRAMES, 8, 16)}, "`latents` must be .* got "),
    (
        {"prompt": PROMPTS, "negative_prompt": None, "negative_prompt_embeds": torch.zeros(1, 8, 32)},
        "`negative_prompt_embeds` cannot be given with several prompts",
    ),
    ({"gather": "rank1"}, "`gather` must be one of .* got 'rank1'"),
    ({"gather": None}, "`gather` must be one of .* got None"),
    ({"decode_chunk_size": 0}, "`decode_chunk_size` must be an integer of at least 1, got 0"),
    ({"decode_chunk_size": True}, "`decode_chunk_size` must be an integer of at least 1, got True"),
    ({"decode_chunk_size": 2.0}, "`decode_chunk_size` must be an integer of at least 1, got 2.0"),
    ({"output_path": "film.txt"}, r"`output_path` must end in one of .* got 'film\.txt'"),
    ({"output_path": 3}, "`output_path` must .* got 3"),
    ({"output_path": "film.mp4", "output_fps": 0}, "`output_fps` must be a number above 0, got 0"),
    ({"output_path": "film.mp4", "output_fps": "8"}, "`output_fps` must be a number above 0, got '8'"),
    (
        {"output_path": "film", "output_type": "latent"},
        '`output_path` needs decoded frames, got `output_type="latent"`',
    ),
    ({"output_path": "film", **TWO_VIDEOS}, "`output_path` takes one video, got 2"),
    ({"output_type": "film"}, "`output_type` must be one of .* got 'film'"),
]


@each_pipeline
@pytest.mark.parametrize(("changes", "message"), BAD, ids=[str(number) for number in range(len(BAD))])
def test_what_cannot_be_is_said_before_any_work(pair, name, changes, message, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair.ours.enable_video_infinity(**SCOPE)
    with pytest.raises((ValueError, TypeError), match=message):
        pair.ours(**arguments(name, **changes))
    assert not list(tmp_path.iterdir())


@each_pipeline
def test_more_clips_than_frames_are_refused_before_any_work(pair, name, no_work):
    pair.ours.enable_video_infinity(**SCOPE, num_clips=FRAMES + 1)
    with pytest.raises(ValueError, match=rf"{FRAMES} frames cannot be cut into {FRAMES + 1} clips \(`num_clips`"):
        draw(pair.ours, name)


@pytest.mark.parametrize("name", ["animatediff"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame_positions": "global"}, '`frame_positions="global"` needs at most 16 frames'),
        ({"frame_positions": "clip", "num_clips": 2, "local_frames": 4}, "`local_frames` can be at most 3"),
        ({"local_frames": None}, "needs a number for `local_frames`, got None"),
    ],
)
def test_positions_that_do_not_fit_are_refused_before_any_work(pair, name, fields, message, no_work):
    pair.ours.enable_video_infinity(**fields)
    with pytest.raises(ValueError, match=message):
        draw(pair.ours, name, num_frames=20)


@each_pipeline
def test_arguments_without_a_name_are_refused(pair, name, no_work):
    with pytest.raises(TypeError, match="by name"):
        pair.ours("a red cat", *((16, 32, FRAMES, 3) if name == "text_to_video" else (FRAMES, 16, 32, 3)))


@each_pipeline
@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": {0: "a red cat", 3: "a blue dog"}},
        {"prompt": PROMPTS, "prompt_transition_frames": 1},
        {"prompt": PROMPTS, "noise": "per_frame"},
        {"prompt": PROMPTS, "output_path": "film"},
    ],
    ids=["dict", "transition", "noise", "file"],
)
def test_until_enabled_several_prompts_for_one_video_are_refused(pair, name, changes, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"negative_prompt": None, **changes}
    with pytest.raises(ValueError, match="call `enable_video_infinity` first"):
        draw(pair.ours, name, **changes)


@pytest.mark.parametrize("name", ["text_to_video"])
def test_a_frame_rate_that_nothing_would_read_is_refused(pair, frame_rate_pair, name, no_work):
    pair.ours.enable_video_infinity(**SCOPE)
    with pytest.raises(ValueError, match=r"`fps` conditions VideoCrafter's UNet only, got fps=8 with a UNet3D"):
        draw(pair.ours, name, fps=8)
    with pytest.raises(ValueError, match="`fps` reaches the UNet by Video-Infinity"):
        draw(frame_rate_pair.ours, name, fps=8)
    for fps in (0, "fast", float("nan"), True):
        with pytest.raises(ValueError, match=f"`fps` must be a number above 0, got {fps!r}"):
            draw(frame_rate_pair.ours, name, fps=fps)


@each_pipeline
def test_a_film_without_its_encoder_is_refused_before_any_work(pair, name, no_work, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "imageio_ffmpeg" else find(name))
    with pytest.raises(ImportError, match=r"\.mp4 files needs imageio with ffmpeg: pip install"):
        draw(pair.ours, name, output_path=tmp_path / "film.mp4")
    assert not list(tmp_path.iterdir())


@each_pipeline
@pytest.mark.parametrize("latents", [torch.zeros(1, 4, 8, 16), "noise"], ids=["four dimensions", "text"])
def test_only_latents_of_a_video_are_decoded(pair, name, latents):
    with pytest.raises(ValueError, match="`latents` must be a tensor"):
        pair.ours.decode_clip(latents)


@each_pipeline
def test_enabling_refuses_what_cannot_be_and_changes_nothing(pair, name):
    with pytest.raises(TypeError, match="`config` must be a VideoInfinityConfig, got dict"):
        pair.ours.enable_video_infinity({"local_frames": 2})
    with pytest.raises(ValueError, match="`local_frames` must be None or an integer of at least 0, got -1"):
        pair.ours.enable_video_infinity(local_frames=-1)
    with pytest.raises(RuntimeError, match=r'`mode="distributed"` needs a process group.*torchrun --nproc_per_node 2'):
        pair.ours.enable_video_infinity(mode="distributed")
    assert not pair.ours.video_infinity_enabled
    pair.ours.enable_video_infinity(**SCOPE)
    with pytest.raises(ValueError, match="already applied"):
        pair.ours.enable_video_infinity(**SCOPE)


# Saved files, and cards


@each_pipeline
def test_saving_writes_the_base_pipelines_files(pair, name, tmp_path):
    pair.ours.enable_video_infinity(**SCOPE)
    enabled = draw(pair.ours, name)
    pair.ours.save_pretrained(tmp_path / "ours")
    pair.stock.save_pretrained(tmp_path / "stock")
    ours, stock = (json.loads((tmp_path / which / "model_index.json").read_text()) for which in ("ours", "stock"))
    for config in (ours, stock):
        config.pop("_name_or_path", None)
    assert ours == stock
    again = DiffusionPipeline.from_pretrained(tmp_path / "ours")
    assert type(again) is type(pair.stock)
    assert np.array_equal(draw(settled(again), name), draw(pair.stock, name))
    again = load(name, tmp_path / "ours")
    assert np.array_equal(draw_with(again, name, SCOPE), enabled)


def card_of(name: str) -> tuple[str, list[str]]:
    """Its text, and the blocks of Python in it."""
    text = (PIPELINES / f"video_infinity_{name}.md").read_text()
    return text, re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@each_pipeline
def test_a_card_names_its_base_both_doors_and_the_commands_of_both_launchers(name):
    text, blocks = card_of(name)
    card = validate_model_card(text)
    assert card["base_model"] and "base_model_relation" not in card and "pipeline_tag" not in card
    assert {"diffusers-ext", "video-infinity"} <= set(card["tags"])
    assert "https://huggingface.co/papers/2406.16260" in text
    plain, custom, *_ = blocks
    models = card["base_model"] if isinstance(card["base_model"], list) else [card["base_model"]]
    base = {"text_to_video": "TextToVideoSDPipeline", "animatediff": "AnimateDiffPipeline"}[name]
    assert f"import {base}" in plain and "apply_video_infinity(pipe, " in plain
    assert all(f'"{model}"' in plain for model in models)
    assert f'custom_pipeline="org/video-infinity-{name.replace("_", "-")}"' in custom
    assert "trust_remote_code" not in plain and "trust_remote_code=True" in custom
    for block in blocks:
        ast.parse(block)
        assert block.count("from_pretrained(") == len(re.findall(r'\brevision="commit id"', block))
    for launcher in ("torchrun --nproc_per_node 2", "accelerate launch --multi_gpu --num_processes 2"):
        for prefix in ("", "OMP_NUM_THREADS=4 "):  # on GPUs, on CPUs
            assert re.search(rf"^{prefix}{launcher} \w+\.py$", text, re.MULTILINE)


@each_pipeline
def test_a_card_names_every_argument_that_the_pipeline_adds(name):
    text, _ = card_of(name)
    tree = ast.parse((PIPELINES / f"video_infinity_{name}.py").read_text())
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__call__")
    for argument in call.args.kwonlyargs:
        assert f"`{argument.arg}" in text


@each_pipeline
def test_the_scripts_of_a_card_run(name, tiny_checkpoint, tmp_path, monkeypatch):
    """As they are printed, but for the checkpoints, in one process, small and short: one door, then the other."""
    text, (plain, custom, *_) = card_of(name)
    local = {
        '"cerspense/zeroscope_v2_576w"': repr(str(tiny_checkpoint("text_to_video_sd"))),
        '"stable-diffusion-v1-5/stable-diffusion-v1-5"': repr(str(tiny_checkpoint("sd"))),
        '"guoyww/animatediff-motion-adapter-v1-5-2"': repr(str(tmp_path / "adapter")),
        f'"org/video-infinity-{name.replace("_", "-")}"': repr(str(PIPELINES / f"video_infinity_{name}.py")),
        'custom_revision="commit id",': "",
        'revision="commit id",': "",
        ', revision="commit id"': "",
        "generator=noise": "generator=noise, num_inference_steps=2",
        "height=320, width=576": "height=16, width=32",
        "num_frames=96": "num_frames=8",
        '"height": 320, "width": 576, "num_frames": 96': '"height": 16, "width": 32, "num_frames": 8',
        "prompt_transition_frames=8": "prompt_transition_frames=2",
        "local_frames=8": "local_frames=1",
    }
    TINY_PIPELINES["animatediff"].build().motion_adapter.save_pretrained(tmp_path / "adapter")
    for printed, instead in local.items():
        plain, custom = plain.replace(printed, instead), custom.replace(printed, instead)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(compile(plain, f"{name}, without remote code", "exec"), scope)
    assert (tmp_path / "video.mp4").stat().st_size > 0
    (tmp_path / "video.mp4").unlink()
    custom = f"with distributed_session() as state:\n{textwrap.indent(custom, '    ')}"
    exec(compile(custom, f"{name}, custom pipeline", "exec"), scope)
    assert (tmp_path / "video.mp4").stat().st_size > 0

"""From latents to frames in chunks, to all ranks or to one, and into a file that is whole or not there."""

import contextlib
import copy
import os

import imageio.v2 as imageio
import numpy as np
import PIL.Image
import pytest
import torch

from diffusers_ext.video_infinity import VideoInfinityContext
from diffusers_ext.video_infinity.decoding import (
    FilmWriter,
    check_decoding,
    decode_in_chunks,
    gather_frames,
    stream_frames,
    to_uint8,
)
from tests.ranks import run_on_ranks


SIZE = (16, 24)  # height, width


def film(num_frames, seed=0):
    """Frames (n, H, W, 3) of one flat colour each, which survive any encoder."""
    colours = torch.randint(40, 216, (num_frames, 1, 1, 3), generator=torch.Generator().manual_seed(seed))
    return colours.to(torch.uint8).expand(num_frames, *SIZE, 3).contiguous()


def as_decoded(frames):
    """The same as a decoder gives them, (1, n, 3, H, W) in [-1, 1]."""
    return (frames.double() / 127.5 - 1).permute(0, 3, 1, 2)[None].float()


# Decoding


@pytest.fixture(scope="module")
def pipe():
    # Imported here: the ranks import this module as well, and need none of it.
    from tests.tiny_checkpoints import TINY_PIPELINES

    return TINY_PIPELINES["text_to_video_sd"].build()


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_chunks_are_what_the_pipeline_decodes_at_once(pipe, chunk_size, batch_size):
    latents = torch.randn(batch_size, 4, 7, 4, 6)
    with torch.no_grad():
        expected = pipe.decode_latents(latents).transpose(1, 2)
    chunks = list(decode_in_chunks(pipe.vae, latents, chunk_size))
    assert [chunk.shape[1] for chunk in chunks] == [min(chunk_size, 7 - first) for first in range(0, 7, chunk_size)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=0, atol=1e-5)
    assert not any(chunk.requires_grad for chunk in chunks)


def test_no_more_frames_than_a_chunk_are_decoded_at_once_and_only_when_asked_for(pipe):
    rows = []
    handle = pipe.vae.decoder.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    chunks = decode_in_chunks(pipe.vae, torch.randn(2, 4, 7, 4, 6), 3)
    assert rows == []
    next(chunks)
    assert rows == [6]
    list(chunks)
    handle.remove()
    assert rows == [6, 6, 2]


def test_latents_take_the_dtype_of_the_autoencoder_and_frames_are_single_precision(pipe):
    latents = torch.randn(1, 4, 2, 4, 6)
    (frames,) = decode_in_chunks(pipe.vae, latents.double(), 4)
    assert frames.dtype == torch.float32
    vae = copy.deepcopy(pipe.vae).double()
    (expected,) = decode_in_chunks(vae, latents, 4)
    assert expected.dtype == torch.float32
    torch.testing.assert_close(frames, expected, rtol=0, atol=1e-5)


# Numbers of pixels


def test_pixels_are_rounded_and_not_truncated():
    values = np.linspace(-1.5, 1.5, 3 * 4 * 50).reshape(1, 1, 3, 4, 50)
    found = to_uint8(torch.from_numpy(values))
    expected = np.zeros((1, 4, 50, 3))
    for c in range(3):
        for y in range(4):
            for x in range(50):
                expected[0, y, x, c] = round((min(max(values[0, 0, c, y, x], -1), 1) + 1) * 127.5)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert np.array_equal(found.numpy(), expected)
    assert to_uint8(torch.full((1, 1, 3, 1, 1), 0.999)).unique().tolist() == [255]


def test_every_number_of_a_pixel_comes_back():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_uint8(as_decoded(frames)), frames)


# Arguments


@pytest.mark.parametrize("size", [0, -1, 1.0, True, None, "4"])
def test_a_chunk_has_at_least_one_frame(size):
    with pytest.raises(ValueError, match="`decode_chunk_size` must be an integer of at least 1, got"):
        check_decoding(size, "all", None, 8)


@pytest.mark.parametrize("gather", ["rank1", "", None, True])
def test_an_unknown_gather_is_refused(gather):
    with pytest.raises(ValueError, match="`gather` must be one of .'rank0', 'all', 'none'., got"):
        check_decoding(1, gather, None, 8)


@pytest.mark.parametrize("path", ["film.txt", "film.png", "film.webm", "folder/film.v2"])
def test_a_suffix_that_no_encoder_writes_is_refused(path):
    with pytest.raises(ValueError, match=r"`output_path` must end in one of .*\.mp4.*or name a folder.*" + path):
        check_decoding(1, "all", path, 8)


@pytest.mark.parametrize("path", ["film.mp4", "film.MP4", "film.gif", "a/b/film.mkv", "folder", "a.b/folder"])
def test_films_and_folders_are_taken(path):
    check_decoding(1, "rank0", path, 8)
    check_decoding(1, "rank0", None, 8)


@pytest.mark.parametrize("fps", [0, -8, True, None, "8", float("nan")])
def test_a_film_has_a_frame_rate_above_0(fps):
    with pytest.raises(ValueError, match="`fps` must be a number above 0, got"):
        check_decoding(1, "rank0", "film.mp4", fps)


# Writing


def read(path):
    if path.is_dir():
        return [np.asarray(PIL.Image.open(file)) for file in sorted(path.iterdir())]
    with imageio.get_reader(path) as reader:
        return [np.asarray(frame)[..., :3] for frame in reader]


def write(path, frames, fps=8, chunk=4):
    writer = FilmWriter(path, fps)
    for part in frames.split(chunk):
        writer.append(part)
    writer.close()


NAMES = ["film", "film.gif", "film.mp4"]
# Largest difference of a flat colour: PNG keeps it, GIF's palette and the colour planes of H.264 do not quite.
KEPT = {"film": 0, "film.gif": 8, "film.mp4": 8}


def check(path, frames):
    found = read(path)
    assert len(found) == len(frames)
    for one, other in zip(found, frames.numpy(), strict=True):
        assert one.shape == other.shape
        assert np.abs(one.astype(int) - other.astype(int)).max() <= KEPT[path.name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [1, 4, 20])
def test_all_frames_are_written_in_order_at_their_size(tmp_path, name, chunk):
    frames = film(11)
    write(tmp_path / name, frames, chunk=chunk)
    check(tmp_path / name, frames)
    assert os.listdir(tmp_path) == [name]


def test_files_of_a_folder_sort_as_their_frames_do(tmp_path):
    write(tmp_path / "film", film(12))
    assert sorted(os.listdir(tmp_path / "film")) == [f"{number:06d}.png" for number in range(12)]


def test_sizes_that_are_no_multiple_of_16_are_kept(tmp_path):
    frames = torch.full((3, 18, 34, 3), 90, dtype=torch.uint8)
    write(tmp_path / "film.mp4", frames)
    check(tmp_path / "film.mp4", frames)


@pytest.mark.parametrize("fps", [4, 10, 12.5])
def test_a_film_has_its_frame_rate(tmp_path, fps):
    write(tmp_path / "film.mp4", film(4), fps)
    with imageio.get_reader(tmp_path / "film.mp4") as reader:
        assert reader.get_meta_data()["fps"] == pytest.approx(fps, rel=1e-3)
    write(tmp_path / "film.gif", film(4), fps)
    with PIL.Image.open(tmp_path / "film.gif") as image:
        assert image.info["duration"] == pytest.approx(1000 / fps, abs=10)  # a GIF counts in hundredths of a second
        assert image.info["loop"] == 0


@pytest.mark.parametrize("name", ["film.GIF", "film.MP4"])
def test_a_suffix_in_capitals_is_the_same_suffix(tmp_path, name):
    write(tmp_path / name, film(5))
    assert len(read(tmp_path / name)) == 5
    if name == "film.GIF":
        with PIL.Image.open(tmp_path / name) as image:
            assert image.info["loop"] == 0 and image.info["duration"] == 120


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".mkv", ".avi", ".mov"])
def test_every_accepted_suffix_makes_a_film_that_can_be_read(tmp_path, suffix):
    path, frames = tmp_path / f"film{suffix}", film(5)
    check_decoding(1, "rank0", path, 8)
    write(path, frames)
    found = read(path)
    assert len(found) == 5
    for one, other in zip(found, frames.numpy(), strict=True):
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 20


def test_a_size_that_the_encoder_cannot_write_is_an_error_and_no_empty_film(tmp_path):
    """Or a film of that size."""
    path, frames = tmp_path / "film.mp4", torch.full((4, 17, 25, 3), 90, dtype=torch.uint8)
    old = film(3)
    write(path, old)
    try:
        stream_frames(iter([as_decoded(frames)]), None, (), 4, path, 8)
    except (ValueError, RuntimeError):
        check(path, old)
    else:
        assert len(read(path)) == 4
    assert os.listdir(tmp_path) == ["film.mp4"]


def test_files_of_the_user_in_a_folder_are_never_deleted(tmp_path):
    folder = tmp_path / "film"
    folder.mkdir()
    (folder / "notes.txt").write_text("of the user")
    with contextlib.suppress(OSError, ValueError):  # refusing is as good as leaving them there
        check_decoding(4, "rank0", folder, 8)
        stream_frames(iter([as_decoded(film(3))]), None, (), 4, folder, 8)
    assert (folder / "notes.txt").read_text() == "of the user"
    assert os.listdir(tmp_path) == ["film"]


@pytest.mark.parametrize("name", ["film", "film.mp4"])
def test_a_folder_in_the_place_of_a_file_or_a_file_in_that_of_a_folder_is_an_error_and_stays(tmp_path, name):
    if name == "film":
        (tmp_path / name).write_text("of the user")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises((OSError, ValueError)):
        stream_frames(iter([as_decoded(film(3))]), None, (), 4, tmp_path / name, 8)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).is_dir() == (name == "film.mp4")


@pytest.mark.parametrize("name", NAMES)
def test_the_film_is_at_its_place_only_when_it_is_complete(tmp_path, name):
    writer = FilmWriter(tmp_path / name, 8)
    writer.append(film(5))
    assert not (tmp_path / name).exists()
    writer.close()
    check(tmp_path / name, film(5))


@pytest.mark.parametrize("name", NAMES)
def test_an_abandoned_film_leaves_nothing(tmp_path, name):
    writer = FilmWriter(tmp_path / name, 8)
    writer.append(film(5))
    writer.abandon()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_film_abandoned_before_its_first_frame_leaves_nothing(tmp_path, name):
    FilmWriter(tmp_path / name, 8).abandon()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_an_older_film_stays_until_the_new_one_is_complete_and_is_replaced_then(tmp_path, name):
    old, new = film(9, seed=1), film(4, seed=2)
    write(tmp_path / name, old)
    writer = FilmWriter(tmp_path / name, 8)
    writer.append(new)
    check(tmp_path / name, old)
    writer.close()
    check(tmp_path / name, new)
    abandoned = FilmWriter(tmp_path / name, 8)
    abandoned.append(old)
    abandoned.abandon()
    check(tmp_path / name, new)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", NAMES)
def test_folders_above_a_film_are_made(tmp_path, name):
    write(tmp_path / "a" / "b" / name, film(3))
    check(tmp_path / "a" / "b" / name, film(3))


# One process


def test_one_process_has_all_frames_already():
    clip = torch.randn(1, 4, 3, 2, 2)
    alone = VideoInfinityContext(num_frames=4, bounds=[(0, 2), (2, 4)])
    for context in (None, alone):
        for gather in ("rank0", "all", "none"):
            assert gather_frames(clip, context, gather) is clip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_size", [2, 3, 16])
def test_one_process_streams_its_chunks_into_a_file(tmp_path, name, chunk_size):
    frames = film(7)
    chunks = iter(as_decoded(frames).split(chunk_size, dim=1))
    stream_frames(chunks, None, (), chunk_size, tmp_path / name, 8)
    check(tmp_path / name, frames)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [0, 1])
def test_a_failing_decoder_leaves_no_file_and_its_own_error(tmp_path, name, after):
    def chunks():
        yield from as_decoded(film(6)).split(3, dim=1)[:after]
        raise KeyboardInterrupt("stopped")

    with pytest.raises(KeyboardInterrupt, match="stopped"):
        stream_frames(chunks(), None, (), 3, tmp_path / name, 8)
    assert os.listdir(tmp_path) == []


# Ranks


BOUNDS = {2: ((0, 3), (3, 8)), 3: ((0, 4), (4, 5), (5, 8))}


def context_of(rank, bounds):
    return VideoInfinityContext(
        num_frames=bounds[-1][1], bounds=bounds, rank=rank, group=torch.distributed.group.WORLD
    )


def bytes_handed_to(channel, function):
    """What a rank hands to its channel while a function runs, counted there."""
    sent, exchange = [], channel.exchange

    def counted(operations):
        sent.extend(tensor.nbytes for is_sent, tensor, *_ in operations if is_sent)
        return exchange(operations)

    channel.exchange = counted
    function()
    channel.exchange = exchange
    return sum(sent)


def everything_on_rank(rank, world_size, video, frames, bounds, folder):
    """In one start of processes: that takes far longer than what is tried."""
    context = context_of(rank, bounds)
    clip = video[:, slice(*bounds[rank])]
    found = {name: gather_frames(clip, context, gather) for name, gather in GATHERED.items()}
    found["bytes"] = bytes_handed_to(context.channel, lambda: gather_frames(clip, context, "rank0"))
    own = as_decoded(frames[slice(*bounds[rank])])
    for chunk_size in CHUNK_SIZES:
        for name in NAMES:
            chunks = iter(own.split(chunk_size, dim=1))
            stream_frames(chunks, context, bounds, chunk_size, folder / str(chunk_size) / name, 8)
    return found


GATHERED = {"rank0": "rank0", "all": "all", "none": "none", "rank0 again": "rank0"}
CHUNK_SIZES = (2, 3, 16)


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def on_ranks(request, tmp_path_factory):
    """The video, the film, the clips, what each rank found, and the folder that films were streamed into."""
    video, frames, bounds = torch.randn(2, 8, 3, 4, 2), film(8, seed=3), BOUNDS[request.param]
    folder = tmp_path_factory.mktemp("streamed")
    return (
        video,
        frames,
        bounds,
        run_on_ranks(everything_on_rank, request.param, video, frames, bounds, folder),
        folder,
    )


def test_frames_are_gathered_in_order_on_the_ranks_that_get_them(on_ranks):
    video, _, bounds, results, _ = on_ranks
    for rank, found in enumerate(results):
        assert torch.equal(found["all"], video)
        assert torch.equal(found["none"], video[:, slice(*bounds[rank])])
        for name in ("rank0", "rank0 again"):
            assert torch.equal(found[name], video) if rank == 0 else found[name] is None


def test_for_one_rank_the_others_send_their_own_frames_once_and_it_sends_none(on_ranks):
    video, _, bounds, results, _ = on_ranks
    frame = video[:, 0].nbytes
    assert [found["bytes"] for found in results] == [0, *(frame * (end - start) for start, end in bounds[1:])]


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_frames_of_all_ranks_are_streamed_in_order_into_one_file(on_ranks, name, chunk_size):
    _, frames, _, _, folder = on_ranks
    check(folder / str(chunk_size) / name, frames)
    assert sorted(os.listdir(folder / str(chunk_size))) == NAMES


def failing_stream_on_rank(rank, world_size, frames, bounds, folder):
    def chunks():
        yield from as_decoded(frames[slice(*bounds[rank])]).split(1, dim=1)[:1]
        if rank == 1:
            os._exit(1)
        yield from as_decoded(frames[slice(*bounds[rank])]).split(1, dim=1)[1:]

    try:
        stream_frames(chunks(), context_of(rank, bounds), bounds, 1, folder / "film", 8)
    except RuntimeError as error:
        return type(error).__name__, error.peer, str(error)


def test_when_a_rank_dies_while_it_decodes_rank_0_names_it_and_leaves_no_file(tmp_path):
    found = run_on_ranks(failing_stream_on_rank, 2, film(8), BOUNDS[2], tmp_path, may_die=(1,))
    name, peer, message = found[0]
    assert name == "CommunicationError" and peer == 1 and "decoded frames" in message
    assert os.listdir(tmp_path) == []

"""What the speed of Vico is compared with does what it says."""

import pytest
import torch
import vico_speed
import vico_workers


class Cells:
    def cell(self, key, compute):
        return compute()


SIZES = ((32, 32, 32, 32), 16, 4)


@pytest.fixture(scope="module", params=["unet3d", "motion"])
def steps(request):
    return vico_workers.Steps(request.param, *SIZES)


def test_all_guided_steps_end_alike_and_leave_no_trace(steps):
    processors = [part.processor for part in steps.unet.modules() if hasattr(part, "processor")]
    before, all_maps = steps.unguided(), steps.all_maps()
    assert torch.equal(before, steps.unguided())
    left = [part.processor for part in steps.unet.modules() if hasattr(part, "processor")]
    assert all(one is other for one, other in zip(processors, left, strict=True))
    moved = (all_maps - before).norm()
    assert moved > 1e-3 * before.norm()
    for config in vico_workers.WAYS.values():
        if config is not None:
            assert (steps.guided(config) - all_maps).norm() < 0.02 * moved


def test_attend_and_excite_runs_on_images_of_the_same_widths():
    parts = vico_speed.image_parts(*SIZES[:2])
    assert parts["unet"].config.block_out_channels == SIZES[0]
    ids = parts["tokenizer"]("a b").input_ids
    assert len(ids) == 4, "a letter is a token"
    timings = vico_speed.time_images(Cells(), *SIZES[:2], rounds=1)
    assert timings.ratio(vico_speed.EXCITE, vico_speed.IMAGE).median > 1, "it does more"

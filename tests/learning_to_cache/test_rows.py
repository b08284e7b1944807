import pytest

from diffusers_ext.learning_to_cache.rows import RowState, RowStates, StepMismatchError, locate_row


def state(next_row=0, time=None, start_time=None):
    found = RowState()
    found.next_row, found.time, found.start_time = next_row, time, start_time
    return found


@pytest.mark.parametrize(
    ("found", "time", "row"),
    [
        (state(), 999, 0),
        (state(1, 999), 946, 1),
        (state(7, 500), 400, 7),
        (state(3, 800), 999, 0),  # an earlier run ended before its time
        (state(20, 0), 999, 0),  # the last run was complete
        (state(1, 999), 999, 0),  # stopped after the first call
        (state(5, None, 999), None, 5),  # timesteps on a device
        (state(20, None, 999), 999, 0),
    ],
)
def test_the_row_follows_from_count_and_time(found, time, row):
    assert locate_row(found, 20, time) == row


@pytest.mark.parametrize(
    ("found", "time", "message"),
    [
        (state(20, 53), 40, "goes on at timestep 40 after 20 evaluations"),
        (state(20, None, 999), 40, "goes on at timestep 40 after 20 evaluations"),
        (state(4, 800), 800, "twice at timestep 800.*calls_per_step=2"),
    ],
)
def test_a_run_that_does_not_fit_the_table_is_refused(found, time, message):
    with pytest.raises(StepMismatchError, match=message):
        locate_row(found, 20, time)


def test_the_contexts_step_index_decides_where_a_pipeline_gives_one():
    assert locate_row(state(3, 800), 20, 790, step_index=7) == 7
    with pytest.raises(StepMismatchError, match="step 20.*table of 20"):
        locate_row(state(), 20, 0, step_index=20)


def test_calls_without_context_take_turns():
    states = RowStates(calls_per_step=2)
    first, second, third = (states.state_of_call()[0] for _ in range(3))
    assert first is third and first is not second

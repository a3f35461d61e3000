"""The stream is the same however its lanes are split over ranks, and every row is drawn at most once."""

import pytest
import torch

from scale_sae.activations.buffer import LaneBuffer, rows_of_lanes
from scale_sae.activations.schedule import Schedule

SCHEDULE = Schedule(batch=32, buffer=64, lanes=8, training_rows=400, chunk_rows=24)


def chunk_counts() -> list[int]:
    """Uneven chunks, one of them empty: special tokens leave different numbers of rows."""
    pattern = [24, 23, 0, 17, 24, 1, 20]
    return pattern * 10


def run(blocks: list[range], schedule: Schedule = SCHEDULE, until: int | None = None) -> list[torch.Tensor]:
    """The row indices in every batch when each of ``blocks`` is hosted by a buffer of its own."""
    buffers = [LaneBuffer({"h": 2}, block, schedule, 7, torch.float64, torch.device("cpu")) for block in blocks]
    chunks = iter(chunk_counts())
    batches = []
    for step in range(schedule.steps if until is None else until):
        while buffers[0].inserted < schedule.rows_before_draw(step):
            insert(buffers, next(chunks), schedule)
        batches.append(torch.cat([draw(buffer, step) for buffer in buffers]))
    return batches


def draw(buffer: LaneBuffer, step: int) -> torch.Tensor:
    """The next batch, after a look at it that must leave everything as it is."""
    before = buffer.state()["h"].clone()
    found = buffer.peek(step)["h"]
    assert torch.equal(buffer.state()["h"], before)
    buffer.remove(step)
    return found


def insert(buffers: list[LaneBuffer], count: int, schedule: Schedule) -> None:
    start = buffers[0].inserted
    values = torch.arange(start, start + count, dtype=torch.float64)[:, None] * torch.tensor([1.0, -1.0])
    for buffer in buffers:
        own = rows_of_lanes(start, count, buffer.lanes, schedule.lanes)
        # As the transport delivers it: longer than needed.
        buffer.insert({"h": torch.cat([values[own], torch.full((3, 2), torch.nan)])}, count)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_batches_do_not_depend_on_who_hosts_the_lanes(parts: int) -> None:
    whole = run([range(8)])
    split = run([range(i * 8 // parts, (i + 1) * 8 // parts) for i in range(parts)])
    for a, b in zip(whole, split, strict=True):
        assert torch.equal(a, b)


def test_each_row_is_drawn_at_most_once_and_rows_are_shuffled() -> None:
    batches = run([range(8)])
    assert len(batches) == SCHEDULE.steps == 12
    index = torch.cat(batches)[:, 0]
    assert len(index.unique()) == len(index) == 12 * 32
    assert torch.equal(torch.cat(batches)[:, 1], -index)
    # Lanes are visited in order, and what a batch holds was in the stream when it was drawn.
    assert torch.equal(batches[0][:, 0] % 8, torch.arange(8.0).repeat_interleave(4))
    for step, batch in enumerate(batches):
        assert batch[:, 0].max() < SCHEDULE.rows_before_draw(step) + SCHEDULE.chunk_rows
    # Not first in, first out: the first batch reaches beyond the first 32 rows.
    assert batches[0][:, 0].max() >= 48


def test_at_the_end_exactly_the_needed_rows_are_inserted() -> None:
    # 400 rows make 12 whole batches: the buffer drains, and no chunk past row 384 is asked for.
    assert SCHEDULE.rows_needed == 384
    assert SCHEDULE.rows_before_draw(0) == 64
    assert SCHEDULE.rows_before_draw(9) == 352
    assert SCHEDULE.rows_before_draw(11) == 384


def test_a_lane_never_overflows() -> None:
    # The largest chunk on a buffer that just missed its mark: draws assert that every slot is within capacity.
    schedule = Schedule(batch=8, buffer=8, lanes=8, training_rows=800, chunk_rows=24)
    assert len(run([range(8)], schedule)) == 100


@pytest.mark.parametrize("parts", [1, 4])
def test_state_goes_on_elsewhere(parts: int) -> None:
    whole = run([range(8)])
    first = LaneBuffer({"h": 2}, range(8), SCHEDULE, 7, torch.float64, torch.device("cpu"))
    chunks = iter(chunk_counts())
    for step in range(5):
        while first.inserted < SCHEDULE.rows_before_draw(step):
            insert([first], next(chunks), SCHEDULE)
        draw(first, step)
    saved = first.state()["h"].clone()
    blocks = [range(i * 8 // parts, (i + 1) * 8 // parts) for i in range(parts)]
    others = [LaneBuffer({"h": 2}, block, SCHEDULE, 7, torch.float64, torch.device("cpu")) for block in blocks]
    for other in others:
        other.restore(lambda name, block=other.lanes: saved[block.start : block.stop], first.inserted, 5)  # type: ignore[misc]
    for step in range(5, SCHEDULE.steps):
        while others[0].inserted < SCHEDULE.rows_before_draw(step):
            insert(others, next(chunks), SCHEDULE)
        assert torch.equal(torch.cat([draw(other, step) for other in others]), whole[step])


def test_row_norms_are_those_of_the_filled_slots() -> None:
    buffer = LaneBuffer({"h": 2}, range(2, 5), SCHEDULE, 7, torch.float64, torch.device("cpu"))
    insert([buffer], 24, SCHEDULE)
    insert([buffer], 20, SCHEDULE)
    buffer.rows["h"][0, buffer.capacity - 1] = 9.0  # nobody's row: that slot was never filled
    norms = buffer.row_norms("h")
    # Row i is (i, -i) and in lane i % 8; of 44 rows, lanes 2 and 3 have 6 and lane 4 has 5.
    expected = [[2**0.5 * (8 * slot + lane) for slot in range(5 + (lane < 4))] for lane in (2, 3, 4)]
    for found, lane in zip(norms, expected, strict=True):
        torch.testing.assert_close(found[found.isfinite()], torch.tensor(lane, dtype=torch.float64))
    assert norms.dtype == torch.float64 and norms.shape == (3, 6)


def test_row_norms_in_float64_whatever_the_rows() -> None:
    buffer = LaneBuffer({"h": 64}, range(8), SCHEDULE, 7, torch.bfloat16, torch.device("cpu"))
    buffer.insert({"h": torch.full((24, 64), 1e30, dtype=torch.bfloat16)}, 24)  # the square is no bfloat16 or float32
    one = torch.tensor(1e30).bfloat16().double().item()
    torch.testing.assert_close(buffer.row_norms("h"), torch.full((8, 3), 8 * one, dtype=torch.float64))

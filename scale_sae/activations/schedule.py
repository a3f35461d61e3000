"""The arithmetic of the activation stream: when a chunk enters the buffer and how many steps a run has.

Everything here follows from the config and the number of rows in each chunk, so that all ranks agree unasked.
"""

from dataclasses import dataclass

from scale_sae.config import RunConfig


@dataclass(frozen=True)
class Schedule:
    """Sizes in rows (one row = the activation at one kept token)."""

    batch: int
    buffer: int
    lanes: int
    training_rows: int
    chunk_rows: int

    @property
    def steps(self) -> int:
        """Steps of a run whose text is long enough."""
        return self.training_rows // self.batch

    @property
    def rows_needed(self) -> int:
        return self.steps * self.batch

    def rows_before_draw(self, step: int) -> int:
        """Chunks are inserted before draw ``step`` until this many rows ever were, and not one chunk more."""
        return min(self.buffer + step * self.batch, self.rows_needed)

    @property
    def lane_capacity(self) -> int:
        """Slots a lane needs: before an insertion fewer than ``buffer`` rows are held, and one chunk comes on top."""
        return -(-(self.buffer + self.chunk_rows) // self.lanes) + 1

    def inserted(self, lane: int, rows: int) -> int:
        """How many of the first ``rows`` rows of the stream went to ``lane`` (row i goes to lane i % lanes)."""
        return rows // self.lanes + (lane < rows % self.lanes)

    def most_rows(self, lanes: int) -> int:
        """The most rows of one chunk that can fall into ``lanes`` neighbouring lanes."""
        return -(-self.chunk_rows // self.lanes) * lanes


def schedule(config: RunConfig, positions: int) -> Schedule:
    """The schedule of a run whose contexts have at most ``positions`` kept positions."""
    return Schedule(
        batch=config.train.train_batch_size_tokens,
        buffer=config.buffer.tokens,
        lanes=config.buffer.lanes,
        training_rows=config.train.training_tokens,
        chunk_rows=config.data.chunk_contexts * positions,
    )

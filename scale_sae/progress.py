"""Progress bars, the same for every long task of the package."""

import sys
from typing import IO, Any

# Seconds between two lines where no terminal shows them: a log file of a day then has some thousand lines.
SECONDS_PER_LINE = 30.0


def progress_bar(total: int, description: str, unit: str = "it", initial: int = 0, unit_scale: bool = True) -> Any:
    """A tqdm bar on stderr.

    Where stderr is no terminal (a log file, a cluster's output), each state is a line of its own, twice a minute.
    ``TQDM_DISABLE=1`` in the environment shows no bars at all.

    Args:
        total: how many units the task has.
        description: what stands before the bar.
        unit: what is counted.
        initial: units that were done before.
        unit_scale: whether large counts are written as 1.2M.
    """
    from tqdm import tqdm  # late: the core of the package does without it

    shown = sys.stderr.isatty()
    pause = 0.1 if shown else SECONDS_PER_LINE
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        file=sys.stderr if shown else _Lines(sys.stderr),
        dynamic_ncols=shown,
        mininterval=pause,
        maxinterval=max(pause, 10.0),
    )


class _Lines:
    """A text file for tqdm on which a bar does not return to the beginning of its line, but begins a new one."""

    def __init__(self, file: IO[str]):
        self.file = file

    def write(self, text: str) -> None:
        state = text.strip("\r\n ")
        if state:
            self.file.write(state + "\n")

    def flush(self) -> None:
        self.file.flush()

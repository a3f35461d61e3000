"""What a run says about itself: ``metrics.jsonl``, a progress bar, and wandb when it is asked for.

Metric names are SAELens's where the quantity is the same; ``docs/logging.md`` says what each means.
"""

import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from scale_sae.collectives import Ranks
from scale_sae.config import LoggingConfig
from scale_sae.errors import UserError
from scale_sae.progress import progress_bar

# Edges of the bins of every feature-density histogram: log10 of the share of tokens on which a latent fires, plus
# 1e-10. A latent that never fired is thus in the first bin, which no other can reach. Quarters are exact in binary.
DENSITY_BINS: tuple[float, ...] = tuple(-10 + i / 4 for i in range(41))
# The end of the names of all metrics that are such a histogram: one count of latents per bin.
DENSITY_HISTOGRAM = "feature_density_histogram"
# How long a run that failed waits for wandb: all ranks are to end within a minute of the loss of one.
SECONDS_TO_FINISH = 15


def density_histogram(share: Tensor) -> Tensor:
    """How many latents are in each of ``DENSITY_BINS``: int64 ``[40]``, from the share of tokens ``[d_sae]`` of each.

    A bin holds its lower edge; the last one holds latents that fire on every token too.
    """
    inner = torch.tensor(DENSITY_BINS[1:-1], dtype=torch.float64, device=share.device)
    return torch.bincount(torch.bucketize(_log10(share), inner, right=True), minlength=len(DENSITY_BINS) - 1)


def feature_density(fired: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What is logged of the latents' firing. Names and formulas: SAELens 6.54's; the histogram's bins are our own.

    Args:
        fired: int64 ``[d_sae]``, on how many tokens each latent fired.
        tokens: int64 scalar, of how many.
    """
    share = fired.double() / tokens
    return {
        "metrics/mean_log10_feature_sparsity": _log10(share).mean(),
        "sparsity/below_1e-5": (share < 1e-5).sum(),
        "sparsity/below_1e-6": (share < 1e-6).sum(),
        f"plots/{DENSITY_HISTOGRAM}": density_histogram(share),
    }


def _log10(share: Tensor) -> Tensor:
    return torch.log10(share.double() + 1e-10)


def explained_variance(target: Tensor, output: Tensor, n_rows: int, dp: Ranks) -> Tensor:
    """``1 - Σ‖y - ŷ‖² / Σ‖y - mean‖²`` over the ``n_rows`` rows of all dp ranks, scalar. Formula: SAELens 6.54's.

    ``target`` and ``output`` are this rank's rows, ``[n, d]``.
    """
    wide = torch.promote_types(target.dtype, torch.float32)
    target, output = target.to(wide), output.detach().to(wide)
    mean = dp.all_reduce(target.sum(0)) / n_rows
    sums = torch.stack([(target - output).square().sum(), (target - mean).square().sum()])
    error, variance = dp.all_reduce(sums)
    return 1 - error / variance


class Stopwatch:
    """Where a rank's time goes, by the clock of its host: every moment counts to one of ``PARTS``.

    Work on a GPU goes on while its host does something else: its time is found where the host waits for a result.
    """

    PARTS = ("activations", "training", "checkpoint", "evaluation", "logging", "other")

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        self.part = "other"
        self.since = time.monotonic()

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        """The block's time is that of ``part``, and no longer of the part that it stands in."""
        outer = self._switch(part)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> dict[str, float]:
        """``perf/seconds_<part>`` since the last lap; together they are all of the time."""
        self._switch(self.part)
        found = {f"perf/seconds_{part}": seconds for part, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(self.PARTS, 0.0)
        return found

    def _switch(self, part: str) -> str:
        now, before = time.monotonic(), self.part
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before


class RunLog:
    """What the main process says of a run, as a context: a file of JSON lines, a progress bar, wandb.

    Attributes:
        file: None where the run has no folder.
        wandb: the run there, or None.
        owns_wandb: whether the wandb run ends with the log.
    """

    owns_wandb = True

    def __init__(
        self,
        path: Path | None,
        option: str,
        total_steps: int,
        batch: int,
        unit: str,
        start_step: int,
        begin: Callable[[], Any] | None,
    ):
        """Goes on after ``start_step`` steps: what the file holds of later ones is dropped.

        Args:
            path: of the file; None for none.
            option: what the user calls the folder of the file, for messages.
            total_steps, batch, unit: of the progress bar.
            start_step: steps that were done before.
            begin: begins the wandb run; None for none.
        """
        self.option, self.batch = option, batch
        self.file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, start_step)
            self.file = path.open("a")
        self.wandb = None if begin is None else begin()
        self.bar = progress_bar(total_steps * batch, "training", unit, start_step * batch)

    def put(self, step: int, records: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> None:
        """Writes ``records`` to the file and sends ``values`` to wandb. ``UserError`` if the file cannot be written."""
        if self.file is not None:
            try:
                self.file.writelines(json.dumps(record) + "\n" for record in records)
                self.file.flush()
            except OSError as error:
                raise UserError(
                    f"{self.option}: {self.file.name} cannot be written: {error.strerror}; make room"
                ) from error
        if self.wandb is not None:
            self.wandb.log({name: for_wandb(name, value) for name, value in values.items()}, step=step)

    def show(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The progress bar's figures: means over the SAEs."""
        self.bar.set_postfix(_summary(records), refresh=False)

    def advance(self) -> None:
        """One step more."""
        self.bar.update(self.batch)

    def say(self, line: str) -> None:
        """A line on stderr that does not break the progress bar."""
        self.bar.write(line, file=sys.stderr)

    def close(self, failed: bool = False) -> None:
        """Ends the logs; of a run that ``failed``, wandb has a few seconds to send what it holds."""
        self.bar.close()
        if self.file is not None:
            with suppress(OSError) if failed else nullcontext():  # a full disk: what failed has said so
                self.file.close()
        if self.wandb is None or not self.owns_wandb:
            return
        # The process may end at once after this, and its threads with it.
        finish = threading.Thread(target=self.wandb.finish, args=(int(failed),), name="wandb", daemon=True)
        finish.start()
        finish.join(SECONDS_TO_FINISH if failed else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close(failed=error is not None)


class MetricsWriter(RunLog):
    """The logs of a command's run: one record per SAE and log step."""

    def __init__(
        self,
        run_dir: Path,
        logging: LoggingConfig,
        total_steps: int,
        batch: int,
        start_step: int,
        config: dict[str, Any],
    ):
        begin = partial(_wandb_run, run_dir, logging, config) if logging.log_to_wandb else None
        self.stores_weights = logging.log_to_wandb and logging.log_weights_to_wandb
        super().__init__(run_dir / "metrics.jsonl", "output_dir", total_steps, batch, "tok", start_step, begin)

    def write(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs one record per SAE at ``step`` (steps done so far)."""
        self.write_evaluation(step, records)
        self.show(records)

    def write_evaluation(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """As ``write``, what was measured at ``step`` on held-out text; the progress bar does not show it."""
        values = {
            f"{record['sae_id']}/{name}": value
            for record in records
            for name, value in record.items()
            if name not in ("step", "tokens", "sae_id")
        }
        self.put(step, records, {**values, "tokens": step * self.batch})

    def store_weights(self, folder: Path) -> None:
        """Stores a complete checkpoint with wandb, as an artifact, if the config asks for it.

        wandb copies the files before this returns, so that the checkpoint may be removed, and sends them while the
        training goes on.
        """
        if not self.stores_weights:
            return
        import wandb

        assert self.wandb is not None
        artifact = wandb.Artifact(f"{self.wandb.id}-checkpoint", type="model", metadata={"checkpoint": folder.name})
        artifact.add_dir(str(folder))
        self.wandb.log_artifact(artifact, aliases=["latest", folder.name])


def _wandb_run(run_dir: Path, logging: LoggingConfig, config: dict[str, Any]) -> Any:
    """The run at wandb, the same over all launches: its id is kept in the folder of the run."""
    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    return begin_wandb(
        "logging",
        project=logging.wandb_project,
        entity=logging.wandb_entity,
        name=logging.run_name,
        id=id_file.read_text(),
        dir=str(run_dir),
        config=config,
    )


def begin_wandb(section: str, **options: Any) -> Any:
    """A run at wandb, or the one of the same id, with the options of ``wandb.init``. ``UserError`` if none begins.

    ``section`` holds ``log_to_wandb`` in messages.
    """
    import wandb

    try:
        return wandb.init(resume="allow", **options)
    except (wandb.Error, OSError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{section}.log_to_wandb: true, but wandb does not begin ({said[0].rstrip('.')}); run `wandb login`, set "
            "WANDB_MODE=offline to send the logs later, or set it to false"
        ) from error


def for_wandb(name: str, value: Any) -> Any:
    """A metric as wandb takes it: a histogram of `DENSITY_BINS` as its own kind of histogram."""
    if not name.endswith(DENSITY_HISTOGRAM):
        return value
    import wandb

    return wandb.Histogram(np_histogram=(value, DENSITY_BINS))


def _summary(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The progress bar's figures: means over the SAEs."""

    def mean(name: str) -> float:
        return sum(record[name] for record in records) / len(records)

    return {
        "loss": f"{mean('losses/overall_loss'):.3g}",
        "L0": f"{mean('metrics/l0'):.1f}",
        "EV": f"{mean('metrics/explained_variance'):.3f}",
        "dead": f"{mean('sparsity/dead_features'):.0f}",
    }


def _truncate(path: Path, step: int) -> None:
    """Drops the lines after ``step``: a resumed run writes them again."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}")
    with path.open() as old, aside.open("w") as new:
        new.writelines(line for line in old if line.endswith("\n") and _step_of(line) <= step)
    aside.replace(path)


def _step_of(line: str) -> float:
    """The step of a line of ``metrics.jsonl``; infinite for what is none, such as a killed run leaves at the end."""
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        return float("inf")


def to_floats(values: Mapping[str, Tensor | float]) -> dict[str, Any]:
    """All of ``values`` as floats, those with a dimension as lists, in their order.

    Numbers and 0-dim tensors take one transfer from each device.
    """
    found: dict[str, Any] = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    found |= {name: tensor.tolist() for name, tensor in tensors.items() if tensor.dim()}
    scalars = {name: tensor.double() for name, tensor in tensors.items() if not tensor.dim()}
    for device in {tensor.device for tensor in scalars.values()}:
        there = {name: tensor for name, tensor in scalars.items() if tensor.device == device}
        found |= zip(there, torch.stack(list(there.values())).tolist(), strict=True)
    return {name: found[name] for name in values}

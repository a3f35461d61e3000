"""What a run says about itself: ``metrics.jsonl``, a progress bar, and wandb when it is asked for.

Metric names are SAELens's where the quantity is the same.
"""

import json
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sae.collectives import Ranks
from scale_sae.config import LoggingConfig
from scale_sae.errors import UserError


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


class MetricsWriter:
    """The main process's logs: one JSON line per SAE and log step, a progress bar, wandb."""

    def __init__(
        self,
        run_dir: Path,
        logging: LoggingConfig,
        total_steps: int,
        batch: int,
        start_step: int,
        config: dict[str, Any],
    ):
        from tqdm import tqdm

        self.path = run_dir / "metrics.jsonl"
        _truncate(self.path, start_step)
        self.file = self.path.open("a")
        self.bar = tqdm(
            total=total_steps * batch,
            initial=start_step * batch,
            unit="tok",
            unit_scale=True,
            desc="training",
            file=sys.stderr,
        )
        self.batch = batch
        self.wandb = None
        if logging.log_to_wandb:
            import wandb

            id_file = run_dir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(uuid.uuid4().hex[:8])
            run_id = id_file.read_text()
            self.wandb = wandb.init(
                project=logging.wandb_project, id=run_id, resume="allow", dir=str(run_dir), config=config
            )

    def write(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Logs one record per SAE at ``step`` (steps done so far)."""
        try:
            for record in records:
                self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"output_dir: {self.file.name} cannot be written: {error.strerror}; make room") from error
        self.bar.set_postfix(_summary(records))
        if self.wandb is not None:
            values = {
                f"{record['sae_id']}/{name}": value
                for record in records
                for name, value in record.items()
                if isinstance(value, int | float) and name not in ("step", "tokens")
            }
            self.wandb.log({**values, "tokens": step * self.batch}, step=step)

    def advance(self) -> None:
        self.bar.update(self.batch)

    def say(self, line: str) -> None:
        """A line on stderr that does not break the progress bar."""
        self.bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()


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
        # A killed run may leave half a line at the end.
        new.writelines(line for line in old if line.endswith("\n") and json.loads(line)["step"] <= step)
    aside.replace(path)


def to_floats(values: Mapping[str, Tensor | float]) -> dict[str, float]:
    """All of ``values`` (numbers and 0-dim tensors) as floats, in their order; one transfer from each device."""
    found = {name: float(value) for name, value in values.items() if not isinstance(value, Tensor)}
    tensors = {name: value.detach().double() for name, value in values.items() if isinstance(value, Tensor)}
    for device in {tensor.device for tensor in tensors.values()}:
        there = {name: tensor for name, tensor in tensors.items() if tensor.device == device}
        found |= zip(there, torch.stack(list(there.values())).tolist(), strict=True)
    return {name: found[name] for name in values}

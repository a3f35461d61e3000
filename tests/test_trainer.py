"""What the trainer makes of a batch before an SAE sees it: rows that do not count, and the scale of the inputs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness import run_ranks
from scale_sae import checkpoint, config, topology
from scale_sae.activations.buffer import rows_of_lanes
from scale_sae.activations.schedule import schedule
from scale_sae.activations.transport import ReceivedChunk
from scale_sae.collectives import Ranks, Shard
from scale_sae.job_trainer import JobTrainer, new_sae
from scale_sae.jobs import resolve
from scale_sae.metrics import MetricsWriter
from scale_sae.saes import StandardTrainingSAE, TrainStepInput, TrainStepOutput
from scale_sae.trainer import Trainer

IN, OUT = "model.layers.1.mlp:in", "model.layers.1.mlp"
WIDTH = 256
CHUNK = 48
BATCH = 32


class Rows:
    """A stream of given rows ``{hookpoint: [n, width]}``, as a rank of a group receives it."""

    def __init__(self, rows: dict[str, Tensor], trainer: Trainer):
        self.rows, self.buffer = rows, trainer.buffer
        self.chunks = 0

    def next_chunk(self) -> ReceivedChunk | None:
        first = self.chunks * CHUNK
        count = min(CHUNK, len(self.rows[IN]) - first)
        if count <= 0:
            return None
        own = first + rows_of_lanes(first, count, self.buffer.lanes, self.buffer.schedule.lanes)
        self.chunks += 1
        return ReceivedChunk(self.chunks - 1, first, count, {name: x[own] for name, x in self.rows.items()}, {})

    def close(self) -> None:
        pass


def config_of(folder: Path, saes: list[dict[str, Any]], n_rows: int, tp: int = 1, buffer: int = 64) -> config.RunConfig:
    tree = {
        "output_dir": str(folder / f"tp{tp}"),
        "recipe": "saelens",
        "model": {"dtype": "float64"},
        "hookpoints": [IN],
        "saes": [{"d_sae": 64, "dtype": "float64", **sae} for sae in saes],
        "train": {"training_tokens": n_rows, "train_batch_size_tokens": BATCH},
        "buffer": {"tokens": buffer, "lanes": 8},
        "topology": {"lm": "colocated", "sae": {"tp": tp}},
    }
    return config.from_dict(tree)


def train(run: config.RunConfig, rows: dict[str, Tensor], look: Callable[[Trainer], Any]) -> list[Any]:
    """Trains on the given rows to the end; what ``look`` sees of the trainer afterwards, per rank."""

    return run_ranks(run.topology.world_size, partial(train_here, run, rows, look), init=False)


def train_here(
    run: config.RunConfig,
    rows: dict[str, Tensor],
    look: Callable[[Trainer], Any],
    rank: int,
    world: int,
    writer: MetricsWriter | None = None,
) -> Any:
    """As ``train``, on this rank."""
    store = topology.connect(rank, world, "gloo")
    widths, specs = resolve(run)
    planned = topology.plan(run.topology, [spec.planned for spec in specs], run.buffer.lanes)
    place = topology.build(planned, rank, torch.device("cpu"), "gloo", store)
    trainer = Trainer(run, specs, widths, schedule(run, CHUNK), place, torch.float64)
    assert trainer.fit(Rows(rows, trainer), lambda: False, writer) is False
    return look(trainer)


def made_up_rows(n: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {name: torch.randn(n, WIDTH, dtype=torch.float64, generator=draw) for name in (IN, OUT)}


TRANSCODER = {"name": "t", "architecture": "transcoder", "hookpoint_out": OUT}
AT_IN = {"name": "in", "architecture": "standard"}
AT_OUT = {"name": "out", "architecture": "topk", "k": 4, "hookpoints": [OUT]}


def indices(found: list[Tensor], rows: Tensor) -> list[int]:
    """Which of ``rows`` those are that were found, in their order."""
    place = {tuple(row[:2].tolist()): i for i, row in enumerate(rows)}
    return [place[tuple(row[:2].tolist())] for part in found for row in part]


def test_each_sae_gets_the_rows_that_count_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n = 4 * BATCH
    rows = made_up_rows(n)
    not_finite_in, infinite_out, outliers_in, outliers_out = {3, 50, 90}, {7, 90}, {11}, {12, 50, 101}
    rows[IN][list(not_finite_in), 5] = torch.nan
    rows[OUT][list(infinite_out), 9] = -torch.inf
    for name, outliers in ((IN, outliers_in), (OUT, outliers_out)):
        rows[name][list(outliers)] *= 100  # far beyond OUTLIER_RATIO times the median
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    step = JobTrainer.step

    def watch(self: JobTrainer, x: Tensor, target: Tensor, *rest: Any) -> dict[str, Tensor | float]:
        seen.setdefault(self.spec.sae_id.rpartition("/")[2], []).append((x, target))
        return step(self, x, target, *rest)

    monkeypatch.setattr(JobTrainer, "step", watch)

    def look(trainer: Trainer) -> Any:
        counted = {job.spec.sae_id.rpartition("/")[2]: int(job.window_tokens) for job in trainer.jobs}
        return seen, counted, {name: part.tolist() for name, part in trainer.left_out.items()}

    ((saw, counted, left_out),) = train(config_of(tmp_path, [TRANSCODER, AT_IN, AT_OUT], n), rows, look)
    bad_in, bad_out = not_finite_in | outliers_in, infinite_out | outliers_out
    expected = {"in": bad_in, "out": bad_out, "t": bad_in | bad_out}
    for name, bad in expected.items():
        found = indices([x for x, _ in saw[name]], rows[OUT if name == "out" else IN])
        assert sorted(found) == sorted(set(range(n)) - bad), name  # each other row once in the run
        assert counted[name] == n - len(bad)
        if name == "t":
            assert indices([target for _, target in saw[name]], rows[OUT]) == found  # still the same tokens
        else:
            assert all(target is x for x, target in saw[name])
    assert left_out == {IN: [3, 1], OUT: [2, 3]}


@pytest.mark.parametrize("tp", [1, 2])
def test_a_batch_without_a_usable_row_is_no_update(tmp_path: Path, tp: int) -> None:
    """Every other input and every other target is NaN, so that no token has both."""
    n = 2 * BATCH
    rows = made_up_rows(n)
    rows[IN][::2, 0] = torch.nan
    rows[OUT][1::2, 0] = torch.nan
    transcoder = {**TRANSCODER, "architecture": "batchtopk_skip_transcoder", "k": 4}
    run = config_of(tmp_path, [transcoder, AT_IN], n, tp)

    def look(trainer: Trainer) -> Any:
        predicts, reconstructs = trainer.jobs
        started = new_sae(predicts.spec, trainer.topology.shard, torch.device("cpu"), run.seed)
        fresh = JobTrainer(predicts.spec, started, 2)
        ours = {**predicts.row_tensors(), **predicts.replicated_tensors()}
        theirs = {**fresh.row_tensors(), **fresh.replicated_tensors()}
        changed = [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])]
        return changed, int(reconstructs.window_tokens)

    # All is as it was, the count of updates that were skipped as not finite too; the other SAE had its rows.
    assert train(run, rows, look) == [([], n // 2)] * tp
    assert checkpoint.step_of(checkpoint.complete(Path(run.output_dir))[0]) == 2


SCALED = {"normalize_activations": "expected_average_only_in"}


def test_the_scale_of_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """√d_in over the mean norm of the rows that fill the buffer first, by a direct computation, at any tp."""
    n, buffer = 8 * BATCH, 2 * CHUNK
    rows = made_up_rows(n)
    rows[IN] *= 3
    rows[OUT] *= 0.2
    rows[IN][buffer:] *= 5  # rows that come after the first filling say nothing
    rows[IN][5] *= 1000
    rows[OUT][6, 0] = torch.nan
    saes = [{**TRANSCODER, **SCALED}, {**AT_IN, **SCALED}, {**AT_IN, "name": "plain"}]
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    forward = StandardTrainingSAE.training_forward_pass

    def watch(self: StandardTrainingSAE, step_input: TrainStepInput) -> TrainStepOutput:
        inputs.setdefault(id(self), (step_input.sae_in, step_input.target))
        return forward(self, step_input)

    monkeypatch.setattr(StandardTrainingSAE, "training_forward_pass", watch)
    filled = {IN: torch.arange(buffer) != 5, OUT: torch.arange(buffer) != 6}
    expected = {name: 16 / rows[name][:buffer][keep].norm(dim=1).mean().item() for name, keep in filled.items()}  # √256
    found = {}
    for tp in (1, 2):
        run = config_of(tmp_path, saes, n, tp, buffer)

        def look(trainer: Trainer) -> Any:
            return [
                (job.spec.sae_id.rpartition("/")[2], job.scale.item(), job.target_scale.item(), inputs[id(job.sae)])
                for job in trainer.jobs
            ]

        ranks = train(run, rows, look)
        found[tp] = ranks[0]
        for scales in ranks:
            assert [entry[:3] for entry in scales] == [entry[:3] for entry in ranks[0]]
    for (name, scale, target_scale, (sae_in, target)), other in zip(found[1], found[2], strict=True):
        assert (scale, target_scale) == other[1:3], name  # bit for bit
        if name == "plain":
            assert (scale, target_scale) == (1, 1)
        else:
            # The same formula in the same dtype; only the order of the sum may differ.
            assert scale == pytest.approx(expected[IN], rel=1e-13)
            assert target_scale == pytest.approx(expected[OUT if name == "t" else IN], rel=1e-13)
        # What the SAE saw are rows of the stream times the factors, targets beside their inputs.
        places = [
            torch.cdist(seen / factor, rows[hookpoint].nan_to_num(1e3)).min(dim=1)
            for seen, factor, hookpoint in ((sae_in, scale, IN), (target, target_scale, OUT if name == "t" else IN))
        ]
        assert torch.equal(places[0].indices, places[1].indices)
        assert max(float(place.values.max()) for place in places) < 1e-5  # cdist's own rounding, against norms of 3
    saved = checkpoint.complete(tmp_path / "tp2")[0]
    for name, scale, target_scale, _ in found[2]:
        stored = load_file(checkpoint.sae_folder(saved, f"{IN}/{name}") / checkpoint.REPLICATED)
        assert stored["activation_scale"].dtype == stored["target_scale"].dtype == torch.float64
        assert (stored["activation_scale"].item(), stored["target_scale"].item()) == (scale, target_scale)


def test_the_next_batch_is_under_way_while_a_step_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 4
    run = config_of(tmp_path, [AT_IN], steps * BATCH, 2)
    events: list[tuple[str, int]] = []
    start, step = Ranks.start_all_gather, JobTrainer.step

    def started(ranks: Ranks, x: Tensor) -> Callable[[], Tensor]:
        number = sum(name == "begin" for name, _ in events)
        events.append(("begin", number))
        finish = start(ranks, x)

        def finished() -> Tensor:
            events.append(("wait", number))
            return finish()

        return finished

    def stepped(job: JobTrainer, *args: Any) -> Any:
        events.append(("step", args[3]))
        return step(job, *args)

    monkeypatch.setattr(Shard, "start_all_gather", started)
    monkeypatch.setattr(JobTrainer, "step", stepped)
    expected = [("begin", 0)]
    for number in range(steps):
        ahead = [("begin", number + 1)] if number + 1 < steps else []
        expected += [("wait", number), *ahead, ("step", number)]
    assert train(run, made_up_rows(steps * BATCH), lambda trainer: events) == [expected] * 2

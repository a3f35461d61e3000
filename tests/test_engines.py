"""Engines: the SAE of a run that divides batch and optimizer state over dp ranks is that of one that does not."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import runs
from harness import run_ranks
from saes_for_tests import shard_in_grid
from scale_sae import checkpoint
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig, from_dict, to_dict
from scale_sae.engines import FSDP2Engine, LocalEngine
from scale_sae.job_trainer import JobTrainer
from scale_sae.kernels import workspace
from scale_sae.optim import Optimizer
from scale_sae.saes import TrainStepInput, create, training_config
from scale_sae.trainer import Trainer

HOOKPOINT = "model.layers.1"
STEPS, BATCH = 40, 128
# name → (topology section, number of ranks)
TOPOLOGIES: dict[str, tuple[dict[str, Any], int]] = {
    "local, tp=4": ({"lm": "colocated", "sae": {"tp": 4}}, 4),
    "fsdp2, dp=2, tp=2": ({"lm": "colocated", "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}, 4),
    "fsdp2, dp=2, tp=2, LM tp=1, dp=2": ({"lm": {"dp": 2}, "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}, 6),
    "fsdp2, dp=4, LM tp=1": ({"lm": {"tp": 1}, "sae": {"dp": 4}, "engine": "fsdp2"}, 5),
    "local, tp=4, LM tp=1": ({"lm": {"tp": 1}, "sae": {"tp": 4}}, 5),
    "fsdp2, dp=4": ({"lm": "colocated", "sae": {"dp": 4}, "engine": "fsdp2"}, 4),
    "fsdp2, dp=1, tp=2": ({"lm": "colocated", "sae": {"tp": 2}, "engine": "fsdp2"}, 2),
}
REFERENCE = "local, tp=4"
# float64 over 40 steps: a changed summation order gives about 1e-13. A row of the wrong weight, a latent selected
# otherwise or a gradient summed wrongly shows at 1e-4 and more.
TOLERANCE = 1e-9
SHORT = {"dead_feature_window_tokens": 1000, "dtype": "float64"}
SAES: list[dict[str, Any]] = [
    {"name": "topk", "d_sae": 512, "k": 4, **SHORT},
    {"name": "batchtopk", "architecture": "batchtopk", "d_sae": 256, "k": 5.3, **SHORT},
    {
        "name": "jumprelu",
        "architecture": "jumprelu",
        "d_sae": 256,
        "l0_coefficient": 0.3,
        "jumprelu_bandwidth": 0.4,
        "pre_act_loss_coefficient": 0.1,
        "lr": 1e-2,  # so that updates take thresholds below 0
        **SHORT,
    },
    {
        "name": "matryoshka",
        "architecture": "matryoshka_batchtopk",
        "d_sae": 256,
        "k": 4,
        "matryoshka_widths": [24, 100],
        "use_matryoshka_aux_loss": True,
        "normalize_activations": "expected_average_only_in",
        **SHORT,
    },
]


class Runs:
    """Runs of the same SAEs on several topologies, each made once."""

    def __init__(self, folder: Path, topologies: dict[str, tuple[dict[str, Any], int]], saes: list[dict[str, Any]]):
        self.folder = folder
        self.topologies = topologies
        self.saes = saes

    def of(self, name: str) -> Path:
        return self.make(name, name)

    def resumed(self, first: str, then: str) -> Path:
        """A run under ``then`` from the checkpoint in the middle of that under ``first``."""
        half = self.of(first) / f"checkpoints/step_{STEPS // 2:08d}"
        return self.make(f"{first}, then {then}", then, resume=str(half))

    def make(self, key: str, topology: str, **changes: Any) -> Path:
        folder = self.folder / key.replace(" ", "_")
        if not folder.exists():
            folder.mkdir()
            section, world = self.topologies[topology]
            config = runs.tiny_config(
                self.folder,
                output_dir=str(folder / "run"),
                hookpoints=[HOOKPOINT],
                saes=self.saes,
                train={"training_tokens": STEPS * BATCH, "train_batch_size_tokens": BATCH, "lr": 1e-3},
                checkpoint={"every_steps": STEPS // 2},
                topology=section,
                **changes,
            )
            runs.forked_run(runs.write_config(folder, config), world)
        return folder / "run"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("engines"), TOPOLOGIES, SAES)


def metrics(run: Path) -> dict[str, Tensor]:
    """Every figure that a run logged, but its speed: ``sae_id/name`` → one per log step."""
    found: dict[str, list[float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        sae_id = record.pop("sae_id")
        for name, value in record.items():
            if not name.startswith("perf/"):
                found.setdefault(f"{sae_id}/{name}", []).append(value)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


SLOW = ("local, tp=4, LM tp=1", "fsdp2, dp=4", "fsdp2, dp=2, tp=2, LM tp=1, dp=2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in TOPOLOGIES if name != REFERENCE],
)
def test_an_engine_never_changes_the_result(name: str, made: Runs) -> None:
    ours, reference = made.of(name), made.of(REFERENCE)
    difference = runs.largest_difference(runs.sae_state(ours), runs.sae_state(reference))
    logged = runs.largest_difference(metrics(ours), metrics(reference))
    print(f"{name}: largest difference of any tensor {difference:.1e}, of any logged figure {logged:.1e}")
    assert difference <= TOLERANCE
    assert logged <= TOLERANCE


def test_the_runs_are_worth_comparing(made: Runs) -> None:
    state, logged = runs.sae_state(made.of(REFERENCE)), metrics(made.of(REFERENCE))
    dead = state[f"{HOOKPOINT}/topk/tokens_since_fired"] > 1000
    assert int(dead.sum()) > 128  # more than AuxK's k of d_in / 2, so that it selects
    for name in ("topk", "matryoshka"):
        assert (logged[f"{HOOKPOINT}/{name}/losses/auxiliary_reconstruction_loss"] > 0).any()
    assert (state[f"{HOOKPOINT}/jumprelu/threshold"] < 0).any()  # of which the next step would make 0
    for sae in SAES:
        clipped = logged[f"{HOOKPOINT}/{sae['name']}/details/grad_norm"] > 1
        assert clipped.any(), sae["name"]
        assert not torch.equal(*(state[f"{HOOKPOINT}/{sae['name']}/{part}"] for part in ("W_enc_rows", "W_dec")))


RESUMED = [
    ("local, tp=4", "fsdp2, dp=2, tp=2"),
    ("fsdp2, dp=2, tp=2", "fsdp2, dp=4, LM tp=1"),
    ("fsdp2, dp=4, LM tp=1", "local, tp=4"),
    pytest.param("fsdp2, dp=2, tp=2", "local, tp=4", marks=pytest.mark.slow),
    pytest.param("local, tp=4", "fsdp2, dp=4, LM tp=1", marks=pytest.mark.slow),
    pytest.param("fsdp2, dp=4, LM tp=1", "fsdp2, dp=2, tp=2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("first", "then"), RESUMED)
def test_a_run_goes_on_under_another_engine(first: str, then: str, made: Runs) -> None:
    resumed = runs.sae_state(made.resumed(first, then))
    assert runs.largest_difference(resumed, runs.sae_state(made.of(REFERENCE))) <= TOLERANCE


def test_a_run_goes_on_bitwise_under_its_own_engine(made: Runs) -> None:
    name = "fsdp2, dp=2, tp=2"
    resumed, whole = runs.sae_state(made.resumed(name, name)), runs.sae_state(made.of(name))
    assert [key for key, tensor in resumed.items() if not torch.equal(tensor, whole[key])] == []


def test_a_checkpoint_holds_each_latent_once(made: Runs) -> None:
    for name, parts in (("fsdp2, dp=2, tp=2", 4), ("fsdp2, dp=4, LM tp=1", 4)):
        newest = checkpoint.complete(made.of(name))[0]
        files = sorted(checkpoint.sae_folder(newest, f"{HOOKPOINT}/topk").glob("rows_*"))
        bounds = [tuple(map(int, file.stem.split("_")[1:])) for file in files]
        assert bounds == [(512 // parts * i, 512 // parts * (i + 1)) for i in range(parts)]


# ---- rows that do not count -----------------------------------------------------------------------------------------

GRIDS: dict[str, dict[str, Any]] = {
    "local": {"sae": {"dp": 1, "tp": 1}},
    "dp=2, tp=2": {"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"},
    "dp=4": {"sae": {"dp": 4, "tp": 1}, "engine": "fsdp2"},
}
SCALED = {"normalize_activations": "expected_average_only_in"}
KINDS: list[dict[str, Any]] = [
    {"name": "skip", "architecture": "batchtopk_skip_transcoder", "hookpoint_out": stream.OUT, "k": 4.3, **SCALED},
    {"name": "standard", "architecture": "standard", "l1_coefficient": 0.1},
    {"name": "gated", "architecture": "gated", "l1_coefficient": 0.1},
    {"name": "topk", "architecture": "topk", "k": 3, "dead_feature_window_tokens": 40},
]
N_ROWS = 12 * stream.BATCH


def rows_of_half_the_lanes() -> dict[str, Tensor]:
    """The rows that the upper half of the ranks gets do not count at first: outliers, and some that are not finite.

    By the median of their own rows, those ranks would find no outlier.
    """
    rows = stream.made_up_rows(N_ROWS)
    index = torch.arange(N_ROWS)
    for x in rows.values():
        x[(index % 8 >= 4) & (index < N_ROWS // 2)] *= 1000
        x[(index % 8 == 7) & (index < N_ROWS // 2), 3] = torch.nan
    rows[stream.OUT][5] *= 1000  # one of a row that counts as an input
    return rows


def trained(folder: Path, topology: dict[str, Any], saes: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``topology`` makes of the rows: the tensors of every SAE, whole, and what the trainer counted."""
    tree = to_dict(stream.config_of(folder, saes, N_ROWS, buffer=32))
    config = from_dict({**tree, "topology": {"lm": "colocated", **topology}, "output_dir": str(folder / "run")})
    empty: list[bool] = []
    step = JobTrainer.step

    def watch(self: JobTrainer, x: Tensor, target: Tensor, n_rows: int, *rest: Any) -> Any:
        empty.append(n_rows > 0 and not len(x))
        return step(self, x, target, n_rows, *rest)

    def look(trainer: Trainer) -> Any:
        parts = {job.spec.sae_id: (job.start, job.row_tensors(), job.replicated_tensors()) for job in trainer.jobs}
        return parts, trainer.left_out, sum(empty)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobTrainer, "step", watch)
        ranks = stream.train(config, rows_of_half_the_lanes(), look)
    result: dict[str, Any] = {"empty": [rank[2] for rank in ranks]}
    result["left_out"] = {name: counts.tolist() for name, counts in ranks[0][1].items()}
    for sae_id, (_, own, replicated) in ranks[0][0].items():
        parts = [rows for _, rows, _ in sorted((rank[0][sae_id] for rank in ranks), key=lambda part: part[0])]
        result |= {f"{sae_id}/{name}": torch.cat([part[name] for part in parts]) for name in own}
        result |= {f"{sae_id}/{name}": tensor for name, tensor in replicated.items()}
        for rank in ranks[1:]:
            assert all(torch.equal(rank[0][sae_id][2][name], tensor) for name, tensor in replicated.items()), sae_id
    return result


@pytest.mark.parametrize("name", ["dp=2, tp=2", "dp=4"])
def test_rows_count_alike_on_every_dp_rank(name: str, tmp_path: Path) -> None:
    ours, expected = (trained(tmp_path / key, GRIDS[key], KINDS) for key in (name, "local"))
    half = len(ours["empty"]) // 2
    assert not any(ours["empty"][:half]) and all(count > 8 for count in ours["empty"][half:])  # without a row, often
    assert not any(expected["empty"])
    assert ours["left_out"] == expected["left_out"] and expected["left_out"][stream.IN] == [24, 72]
    tensors = {key: value for key, value in expected.items() if isinstance(value, Tensor)}
    assert runs.largest_difference({key: ours[key] for key in tensors}, tensors) <= TOLERANCE


def test_an_sae_that_diverges_on_dp_ranks_is_frozen_and_the_others_go_on(tmp_path: Path) -> None:
    """Its scores overflow inside the step, while ``fully_shard`` holds its parameters gathered."""
    healthy = {"name": "healthy", "architecture": "topk", "k": 3}
    diverging = {**healthy, "name": "diverging", "lr": 1e300}
    both = trained(tmp_path / "both", GRIDS["dp=2, tp=2"], [healthy, diverging])
    alone = trained(tmp_path / "alone", GRIDS["dp=2, tp=2"], [healthy])
    assert both[f"{stream.IN}/diverging/frozen"] and not both[f"{stream.IN}/healthy/frozen"]
    names = [key for key, value in alone.items() if "/healthy/" in key and isinstance(value, Tensor)]
    assert names and all(torch.equal(both[key], alone[key]) for key in names)


# ---- one SAE alone --------------------------------------------------------------------------------------------------

D_IN, D_SAE, ROWS = 16, 64, 32


def updates(shard: Shard, mesh: DeviceMesh | None, part: slice) -> tuple[list[Tensor], dict[str, Tensor], slice]:
    """12 updates of a JumpReLU SAE whose thresholds have another dtype; (norms, parameters, own latents)."""
    options = {"d_sae": D_SAE, "dtype": "float64", "l0_coefficient": 0.3, "jumprelu_bandwidth": 0.4}
    sae = create("jumprelu", training_config("jumprelu", D_IN, options, "saes.0"), shard)
    sae.initialize(0, "model.layers.0")
    sae.threshold = nn.Parameter(sae.get_parameter("threshold").data.float())
    engine = FSDP2Engine(sae, mesh) if mesh else LocalEngine(sae)
    optimizer = Optimizer(engine, TrainConfig(lr=0.01), 12)
    norms = []
    for step in range(12):
        x = 3 * torch.randn(ROWS, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(step))[part]
        dead = torch.zeros(sae.n_local, dtype=torch.bool)
        step_input = TrainStepInput(
            sae_in=x,
            coefficients={"l0": 0.3},
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
            num_dead=0,
        )
        loss = engine.training_forward_pass(step_input).loss
        norms.append(optimizer.step(loss, step, len(x) / ROWS))
    rows = {name: engine.own_rows(p.data) for name, p in engine.parameters.items() if name not in sae.replicated}
    start = sae.rows.start + engine.own.start
    return (
        norms,
        rows | {"b_dec": engine.parameters["b_dec"].data},
        slice(start, start + D_SAE // shard.size // shard.dp.size),
    )


def test_a_parameter_of_another_dtype_stays_whole() -> None:
    """fully_shard mixes no dtypes. The rows are divided unevenly: 5 to the first dp rank, 27 to the second."""

    def worker(rank: int, world: int) -> Any:
        shard = shard_in_grid(rank, 2, 2)
        assert shard.dp.group is not None
        part = slice(0, 5) if shard.dp.rank == 0 else slice(5, ROWS)
        return updates(shard, DeviceMesh.from_group(shard.dp.group, "cpu"), part)

    norms, expected, _ = updates(Shard(), None, slice(None))
    assert expected["threshold"].dtype == torch.float32 and not (expected["threshold"] == 0.01).any()
    for found_norms, found, own in run_ranks(4, worker):
        # Thresholds and their gradients are rounded to float32, 6e-8, and 12 updates carry that on.
        torch.testing.assert_close(torch.stack(found_norms), torch.stack(norms), rtol=1e-5, atol=0)
        for name, tensor in expected.items():
            part = tensor if name == "b_dec" else tensor[own]
            torch.testing.assert_close(found[name], part, rtol=0, atol=1e-5 * float(tensor.abs().max()))


def test_what_an_sae_changes_in_place_is_kept() -> None:
    """In its step, as a JumpReLU does with thresholds below 0, and in ``whole``, as for a release's weights."""

    def worker(rank: int, world: int) -> None:
        shard = shard_in_grid(rank, 2, 1)
        assert shard.dp.group is not None
        sae = create(
            "jumprelu", training_config("jumprelu", D_IN, {"d_sae": D_SAE, "dtype": "float64"}, "saes.0"), shard
        )
        sae.initialize(0, "model.layers.0")
        before = sae.get_parameter("W_dec").detach().clone()
        engine = FSDP2Engine(sae, DeviceMesh.from_group(shard.dp.group, "cpu"))
        assert engine.own == slice(32 * rank, 32 * rank + 32)
        threshold = engine.parameters["threshold"]
        threshold[:5] = -1
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        step_input = TrainStepInput(
            sae_in=torch.ones(2, D_IN, dtype=torch.float64),
            coefficients={"l0": 0.0},
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
            num_dead=0,
        )
        engine.backward(engine.training_forward_pass(step_input).loss)
        assert threshold.tolist() == [0.0] * 5 + [0.01] * 27
        with engine.whole(changes=True):
            assert torch.equal(sae.get_parameter("W_dec"), before)
            sae.fold_activation_norm_scaling_factor(0.5)
        assert torch.equal(engine.parameters["W_dec"], 2 * before[engine.own])

    run_ranks(2, worker)


# ---- memory ---------------------------------------------------------------------------------------------------------


def living_bytes() -> int:
    """The bytes of all tensors of this process, each storage once.

    Those of subclasses are left out: a DTensor's memory is that of a plain tensor, and what torch.compile traced in
    other tests, or the meta device, has none.
    """
    gc.collect()
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, torch.nn.Parameter) and not item.is_meta]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(("dp", "tp"), [(1, 4), (2, 2), (4, 1)])
def test_parameters_and_state_are_divided_over_all_ranks(dp: int, tp: int) -> None:
    """W_enc, W_dec and b_enc, with two moments each, by dp x tp; b_dec and its moments whole: float64."""
    d_in, d_sae, batch = 32, 4096, 8

    def worker(rank: int, world: int) -> int:
        shard = shard_in_grid(rank, dp, tp)
        assert shard.dp.group is not None
        mesh = None if dp == 1 else DeviceMesh.from_group(shard.dp.group, "cpu")
        workspace.take(batch, d_sae // tp, torch.float64, torch.device("cpu"))  # stays, whatever the SAE
        before = living_bytes()
        sae = create(
            "topk", training_config("topk", d_in, {"d_sae": d_sae, "k": 4, "dtype": "float64"}, "saes.0"), shard
        )
        sae.initialize(0, "model.layers.0")
        optimizer = Optimizer(FSDP2Engine(sae, mesh) if mesh else LocalEngine(sae), TrainConfig(lr=0.01), 2)
        for step in range(2):
            x = torch.randn(batch, d_in, dtype=torch.float64)
            dead = torch.zeros(sae.n_local, dtype=torch.bool)
            step_input = TrainStepInput(
                sae_in=x,
                coefficients={},
                dead_neuron_mask=dead,
                n_training_steps=step,
                is_logging_step=False,
                num_dead=0,
            )
            loss = optimizer.engine.training_forward_pass(step_input).loss
            optimizer.step(loss, step, 1 / dp)
            del step_input, loss, dead, x
        return living_bytes() - before

    formula = 3 * 8 * ((2 * d_in + 1) * d_sae / (dp * tp) + d_in)
    for found in run_ranks(4, worker):
        assert found == pytest.approx(formula, rel=0.05)

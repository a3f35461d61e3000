"""Whole runs of every architecture: many at once on one pass of the language model, interrupted, moved, released."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import runs
from harness import run_ranks
from scale_sae import checkpoint, train
from scale_sae.activations.source import ActivationSource, inspect_model
from scale_sae.activations.tokens import open_chunks
from scale_sae.config import RunConfig, load
from scale_sae.consolidate import consolidate
from scale_sae.evaluate import batches
from scale_sae.saes import SAE, registry
from scale_sae.trainer import Trainer

L1 = {"l1_coefficient": 2.0, "l1_warm_up_steps": 10}
# Inputs of norm √256 give pre-activations of about 1.6: the bandwidth lets a good part of them move the thresholds.
L0 = {"l0_coefficient": 2.0, "l0_warm_up_steps": 10, "jumprelu_bandwidth": 0.5}
SCALED = {"normalize_activations": "expected_average_only_in"}
SAES: dict[str, dict[str, Any]] = {
    "standard": {**L1, **SCALED},
    "gated": {**L1, **SCALED},
    "jumprelu": {**L0, **SCALED, "jumprelu_init_threshold": 0.7, "pre_act_loss_coefficient": 1e-2},
    "topk": {"k": 4},
    "abstopk": {"k": 4, "normalize_activations": "layer_norm"},
    "batchtopk": {"k": 3.5, **SCALED},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [40, 100], "use_matryoshka_aux_loss": True},
}
TRANSCODERS: dict[str, dict[str, Any]] = {
    "transcoder": {**L1, **SCALED},
    "skip_transcoder": {**L1, **SCALED},
    "jumprelu_transcoder": {**L0, **SCALED, "jumprelu_sparsity_loss_mode": "tanh"},
    "jumprelu_skip_transcoder": {**L0, **SCALED, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 16},
    "batchtopk_transcoder": {"k": 4},
    "batchtopk_skip_transcoder": {"k": 4, **SCALED},
}


def entries(layers: tuple[int, ...], **options: Any) -> list[dict[str, Any]]:
    """One SAE of each architecture at the given layers, transcoders from the input of its MLP to the output."""
    common = {"d_sae": 320, "dead_feature_window_tokens": 1000, **options}
    saes = [{"name": name, "architecture": name, **common, **own} for name, own in SAES.items()]
    transcoders = [
        {
            "name": name,
            "architecture": name,
            "hookpoints": [f"model.layers.{i}.mlp:in" for i in layers],
            "hookpoint_out": [f"model.layers.{i}.mlp" for i in layers],
            **common,
            **own,
        }
        for name, own in TRANSCODERS.items()
    ]
    return saes + transcoders


def config_of(folder: Path, layers: tuple[int, ...], steps: int, dtype: str, **changes: Any) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    config = {
        "model": {"name": "embedded", "dtype": dtype},
        "hookpoints": [f"model.layers.{i}" for i in layers],
        "saes": entries(layers, dtype=dtype),
        "train": {"training_tokens": steps * 128, "train_batch_size_tokens": 128, "lr": 2e-3},
        "checkpoint": {"every_steps": 1000},
        **changes,
    }
    return runs.tiny_config(folder, **config)


def test_none_is_left_out() -> None:
    assert set(SAES) | set(TRANSCODERS) == {name for name in registry._CLASSES if not registry.is_custom(name)}


# ---- any topology ----------------------------------------------------------------------------------------------------

# float64 over 60 steps: a changed summation order gives about 1e-13. One latent that is selected, gated or jumps
# otherwise shows at 1e-4 and more. Such a flip needs a score within 1e-13 of its threshold, and a run has 2e7 scores at
# distances of about 1: one run in 1e5 or so would meet one. That holds for JumpReLU's steps and for the windows of its
# estimators, for gates and for selections alike. A threshold that is clamped to 0 stays exactly 0.
TOLERANCE = 1e-9


def states(folder: Path, topology: dict[str, Any], world: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(every tensor of the final checkpoint, every figure that was logged of an SAE) of a run."""
    config = runs.write_config(folder, config_of(folder, (1,), 60, "float64", topology=topology))
    runs.forked_run(config, world)
    records = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    figures = {
        f"{record['sae_id']} {name} at step {record['step']}": record[name]
        for record in records
        for name in record
        if name.startswith(("losses/", "metrics/", "sparsity/", "details/"))
    }
    return runs.sae_state(folder / "run"), figures


@pytest.fixture(scope="module")
def on_one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Tensor], dict[str, float]]:
    return states(tmp_path_factory.mktemp("one"), {"lm": "colocated", "sae": {"tp": 1}}, 1)


@pytest.mark.parametrize(
    ("sae", "world"),
    [
        pytest.param({"groups": 2, "tp": 2}, 4, id="groups=2, tp=2"),
        pytest.param({"tp": 4}, 4, id="tp=4", marks=pytest.mark.slow),
    ],
)
def test_topology_never_changes_any_architecture(
    tmp_path: Path, on_one_rank: tuple[dict[str, Tensor], dict[str, float]], sae: dict[str, int], world: int
) -> None:
    state, figures = states(tmp_path, {"lm": "colocated", "sae": sae}, world)
    assert state.keys() == on_one_rank[0].keys()
    worst: dict[str, float] = {}
    for name in state:
        difference = runs.largest_difference({name: state[name]}, {name: on_one_rank[0][name]})
        folder = name.rpartition("/")[0]
        worst[folder] = max(worst.get(folder, 0), difference)
    print({folder: f"{value:.0e}" for folder, value in worst.items()})
    assert len(worst) == len(SAES) + len(TRANSCODERS)
    assert max(worst.values()) <= TOLERANCE, worst
    # A sum over shards that is missing in a loss may leave the gradients as they are; the loss itself is then wrong.
    assert figures == pytest.approx(on_one_rank[1], rel=TOLERANCE, abs=TOLERANCE)


def test_the_run_is_worth_comparing(on_one_rank: tuple[dict[str, Tensor], dict[str, float]]) -> None:
    """Every part that could differ was at work: dead latents, thresholds, gates, skips, scales."""
    state = {name.removeprefix("model.layers.1").lstrip("./"): tensor for name, tensor in on_one_rank[0].items()}
    for name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "mlp.in/batchtopk_transcoder"):
        dead = int((state[f"{name}/tokens_since_fired"] > 1000).sum())
        assert 128 < dead < 320, name  # more than AuxK's k of d_in / 2, so that it selects
    assert int((state["jumprelu/tokens_since_fired"] > 1000).sum()) > 0  # for its pre-activation loss
    for name, start in (
        ("jumprelu", 0.7),
        ("mlp.in/jumprelu_transcoder", 0.01),
        ("mlp.in/jumprelu_skip_transcoder", 0.01),
    ):
        moved = (state[f"{name}/threshold"] - start).abs() > 1e-3
        assert int(moved.sum()) > 160, name  # most thresholds have left their start
    for name in ("skip_transcoder", "jumprelu_skip_transcoder", "batchtopk_skip_transcoder"):
        assert float(state[f"mlp.in/{name}/W_skip"].abs().max()) > 0.01
    assert float((state["gated/b_gate"] - state["gated/b_mag"]).abs().max()) > 0.01
    assert float(state["gated/r_mag"].abs().max()) > 0.01
    assert float(state["standard/activation_scale"]) != 1 != float(state["mlp.in/transcoder/target_scale"])


# ---- all of them at two layers, interrupted, released ----------------------------------------------------------------

STEPS, STOP_AT = 24, 10


def run_until_stopped(config: Path, world: int, stop_at: int) -> None:
    """A run that finds its stop file after ``stop_at`` steps."""

    def worker(rank: int, world: int) -> None:
        original = Trainer._train_step

        def step(self: Trainer, *args: Any) -> None:
            original(self, *args)
            if self.step == stop_at and self.is_main:
                (self.run_dir / "stop").touch()

        Trainer._train_step = step  # type: ignore[method-assign,assignment]
        assert train.run(str(config), (), {}) == 0

    run_ranks(world, worker, timeout=180, init=False)


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted float32 run: 26 SAEs in two groups of two ranks, one rank for the model."""
    folder = tmp_path_factory.mktemp("all")
    topology = {"lm": {"tp": 1}, "sae": {"groups": 2, "tp": 2}}
    config = config_of(folder, (0, 1), STEPS, "float32", topology=topology)
    runs.forked_run(runs.write_config(folder, config), 5)
    return folder


def test_one_pass_of_the_model_serves_all(all_of_them: Path) -> None:
    """The LM ran the chunks that one SAE alone would need, each once: counted here by packing the text anew."""
    config = load(all_of_them / "config.yaml")
    tokens = rows = 0
    for chunk in open_chunks(config.data, config.model):
        tokens, rows = tokens + chunk.tokens.numel(), rows + int(chunk.keep.sum())
        if rows >= STEPS * 128:
            break
    summary = json.loads((all_of_them / "run/summary.json").read_text())
    assert summary["lm_forward_tokens"] == tokens
    assert summary["rows_trained"] == STEPS * 128
    last = [json.loads(line) for line in (all_of_them / "run/metrics.jsonl").read_text().splitlines()[-26:]]
    assert {record["step"] for record in last} == {STEPS}
    assert len({record["sae_id"] for record in last}) == 26
    # Every one has begun to learn.
    first = [json.loads(line) for line in (all_of_them / "run/metrics.jsonl").read_text().splitlines()[:26]]
    for before, after in zip(first, last, strict=True):
        assert after["losses/mse_loss"] < before["losses/mse_loss"], after["sae_id"]


def test_interrupted_and_resumed_is_bitwise_the_same(tmp_path: Path, all_of_them: Path) -> None:
    shutil.copy(all_of_them / "texts.jsonl", tmp_path)
    text = (all_of_them / "config.yaml").read_text()
    config = tmp_path / "config.yaml"
    config.write_text(text.replace(f"output_dir: {all_of_them}/run", f"output_dir: {tmp_path}/run"))
    run_until_stopped(config, 5, STOP_AT)
    stopped_at = checkpoint.step_of(checkpoint.complete(tmp_path / "run")[0])
    assert STOP_AT <= stopped_at <= STOP_AT + 2
    runs.forked_run(config, 5)
    assert json.loads((tmp_path / "run/summary.json").read_text())["launched_at_step"] == stopped_at
    state, expected = runs.sae_state(tmp_path / "run"), runs.sae_state(all_of_them / "run")
    assert state.keys() == expected.keys()
    assert [name for name in state if not torch.equal(state[name], expected[name])] == []


def held_out_rows(config: RunConfig, hookpoints: list[str], tokens: int) -> dict[str, Tensor]:
    """Activations of text that was held out of training, at the positions that training keeps: ``[n, d_in]`` each."""
    source = ActivationSource(config.model, inspect_model(config.model, hookpoints))
    found: dict[str, list[Tensor]] = {name: [] for name in hookpoints}
    for batch in batches(config, tokens):
        for name, rows in source.capture(batch.tokens).items():
            found[name].append(rows[batch.keep])
    return {name: torch.cat(parts) for name, parts in found.items()}


def test_every_release_is_read_alike_by_sae_lens(tmp_path: Path, all_of_them: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    reports = consolidate(all_of_them / "run", tmp_path / "release")
    assert len(reports) == 26
    hookpoints = ["model.layers.0", "model.layers.1", "model.layers.0.mlp:in", "model.layers.1.mlp:in"]
    rows = held_out_rows(load(all_of_them / "config.yaml"), hookpoints, 512)
    for report in reports:
        folder = tmp_path / "release" / checkpoint.folder_name(report.sae_id)
        ours, theirs = SAE.load_from_disk(folder), sae_lens.SAE.load_from_disk(str(folder))
        x = rows[report.sae_id.rpartition("/")[0]]
        with torch.no_grad():
            a, b = ours.encode(x), theirs.encode(x)
            # float32 rounds a pre-activation by 1e-6: of 1e5 of them, one may fall on the other side of its threshold.
            assert int(((a - b).abs() > 1e-5 * b.abs().max()).sum()) <= 1, report.sae_id
            assert int((b != 0).sum()) > len(x), report.sae_id
            # The same weights in float64, where nothing is that near.
            ours, theirs = (
                SAE.load_from_disk(folder, dtype="float64"),
                sae_lens.SAE.load_from_disk(folder, "cpu", "float64"),
            )
            x = x.double()
            a, b = ours.encode(x), theirs.encode(x)
            assert float((a - b).abs().max() / b.abs().max()) < 1e-5, report.sae_id
            a, b = ours(x), theirs(x)
            assert float((a - b).abs().max() / b.abs().max()) < 1e-5, report.sae_id


# ---- the threshold of BatchTopK's releases ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch_topk_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a float32 run of 200 steps of 1024 rows; its release is in ``release``."""
    folder = tmp_path_factory.mktemp("batch_topk")
    common = {"d_sae": 512, "k": 16}
    changes: dict[str, Any] = {
        "saes": [
            {"name": "batchtopk", "architecture": "batchtopk", **common},
            {"name": "scaled", "architecture": "batchtopk", **common, **SCALED},
            {"name": "matryoshka", "architecture": "matryoshka_batchtopk", "matryoshka_widths": [64], **common},
        ],
        "hookpoints": ["model.layers.0"],
        "train": {"training_tokens": 200 * 1024, "train_batch_size_tokens": 1024, "lr": 1e-3},
        "buffer": {"tokens": 8192, "lanes": 8},
    }
    config = config_of(folder, (0,), 200, "float32", **changes)
    config["data"] |= {"context_size": 64, "chunk_contexts": 32, "eval_fraction": 0.2}
    config["data"]["dataset"] = str(runs.write_texts(folder / "texts.jsonl", 60))
    runs.forked_run(runs.write_config(folder, config), 1)
    consolidate(folder / "run", folder / "release")
    return folder


@pytest.mark.parametrize("name", ["batchtopk", "scaled", "matryoshka"])
def test_the_released_threshold_keeps_k_on_held_out_text(batch_topk_run: Path, name: str) -> None:
    """Printed beside it: what the mean of the thresholds of all steps gives, the logged one, and SAELens's.

    SAELens's, which starts at 0, is the logged one times what the weights of its terms add up to.
    """
    x = held_out_rows(load(batch_topk_run / "config.yaml"), ["model.layers.0"], 16384)["model.layers.0"]
    sae = SAE.load_from_disk(batch_topk_run / "release/model.layers.0" / name)
    saved = checkpoint.complete(batch_topk_run / "run")[0]
    job = load_file(checkpoint.sae_folder(saved, f"model.layers.0/{name}") / checkpoint.REPLICATED)
    pre, threshold = sae.pre_activations(x), float(sae.state_dict()["threshold"][0])
    units = threshold / float(job["release_threshold"])  # a scale of the inputs is folded into all thresholds alike

    def l0(value: float) -> float:
        return float((pre > value).sum() / len(x))

    mean = units * float(job["topk_threshold"])
    found = {
        "released": l0(threshold),
        "mean": l0(mean),
        "SAELens's mean": l0(mean * float(job["topk_threshold_weight"])),
    }
    print(f"{name}: L0 on {len(x)} held-out rows with k = 16: {found}")
    assert float((sae.encode(x) != 0).sum() / len(x)) == pytest.approx(found["released"])
    # Weights move fast in 200 steps without decay, and the held-out text is 12 files.
    assert found["released"] == pytest.approx(16, rel=0.1)


# ---- a sweep as a list in one file -----------------------------------------------------------------------------------


def test_a_sweep_of_k_is_one_launch(tmp_path: Path) -> None:
    """``configs/k_sweep.yaml`` as its first lines say to start it, on a short stream."""
    config = tmp_path / "k_sweep.yaml"
    shutil.copy(runs.ROOT / "configs/k_sweep.yaml", config)
    overrides = {
        "output_dir": tmp_path / "run",
        "data.dataset": runs.write_texts(tmp_path / "texts.jsonl"),
        "data.eval_fraction": 0.2,
        "train.training_tokens": 25 * 256,
        "train.train_batch_size_tokens": 256,
        # At so few steps latents of norm 1 still fire on other text than on that trained on.
        "recipe": "saelens",
        "train.lr": 1e-3,
        "train.lr_decay_steps": 10,
        "buffer.tokens": 4096,
    }
    arguments = [f"--{key}={value}" for key, value in overrides.items()]
    code, output = runs.finish(runs.launch(config, 2, *arguments))
    assert code == 0, output[-3000:]
    expected = {f"model.layers.1/k{k}": k for k in (8, 16, 32, 64, 128)}
    last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()[-5:]]
    # In training exactly k · batch activations are selected.
    assert {record["sae_id"]: record["metrics/l0"] for record in last} == expected
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["lm_rows_kept"] == summary["rows_trained"] + summary["rows_in_buffer"]  # one pass for all five
    reports = consolidate(tmp_path / "run", tmp_path / "release")
    rows = held_out_rows(load(tmp_path / "run/config.yaml"), ["model.layers.1"], 4096)["model.layers.1"]
    found = {
        report.sae_id: held_out_l0(tmp_path / "release" / checkpoint.folder_name(report.sae_id), rows)
        for report in reports
    }
    print(found)
    for sae_id, k in expected.items():
        # The threshold is that of the last batch's 256 rows, which tell it to a few percent.
        assert found[sae_id] == pytest.approx(k, rel=0.1), sae_id


def held_out_l0(folder: Path, x: Tensor) -> float:
    return float((SAE.load_from_disk(folder).encode(x) != 0).sum() / len(x))

"""From a config to its jobs: what transcoders predict, which widths follow, what a job costs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from scale_sae.collectives import Shard
from scale_sae.config import from_dict, load
from scale_sae.errors import UserError
from scale_sae.jobs import JobSpec, resolve, with_rates
from scale_sae.recipes import learning_rate
from scale_sae.saes import StandardTrainingSAE, TopKTrainingSAE, TrainStepInput, create, training_config
from scale_sae.topology import Job, plan, split_jobs


def run_of(*saes: dict[str, Any], hookpoints: tuple[str, ...] = ("model.layers.*.mlp:in",), **keys: Any) -> Any:
    return from_dict({"hookpoints": list(hookpoints), "saes": [{"d_sae": 64, **sae} for sae in saes], **keys})


def widths_of(job: JobSpec) -> tuple[int, int]:
    cfg: Any = job.cfg  # of a transcoder
    return cfg.d_in, cfg.d_out


TRANSCODER = {"architecture": "transcoder", "hookpoint_out": "model.layers.*.mlp"}


def test_each_transcoder_predicts_the_module_of_its_own_layer() -> None:
    sae = {"d_sae": 32, "name": "sae", "architecture": "standard", "hookpoints": ["model.layers.2"]}
    widths, jobs = resolve(run_of(TRANSCODER, sae))
    *transcoders, last = jobs
    assert [(job.hookpoint, job.target) for job in transcoders] == [
        (f"model.layers.{i}.mlp:in", f"model.layers.{i}.mlp") for i in range(4)
    ]
    assert [widths_of(job) for job in transcoders] == [(256, 256)] * 4
    assert (last.sae_id, last.hookpoint, last.target) == ("model.layers.2/sae", "model.layers.2", "model.layers.2")
    # What crosses to the SAE ranks: inputs and targets, in model order, and nothing else that a pattern matches.
    assert list(widths) == [
        "model.layers.0.mlp:in",
        "model.layers.0.mlp",
        "model.layers.1.mlp:in",
        "model.layers.1.mlp",
        "model.layers.2",
        "model.layers.2.mlp:in",
        "model.layers.2.mlp",
        "model.layers.3.mlp:in",
        "model.layers.3.mlp",
    ]
    # Five products of rows with a matrix of width times latents.
    assert transcoders[1].planned == Job(
        "model.layers.1.mlp:in", "model.layers.1.mlp:in", 5 * 256 * 64, "model.layers.1.mlp"
    )
    assert last.planned == Job("model.layers.2/sae", "model.layers.2", 5 * 256 * 32)
    assert transcoders[1].to_dict()["target"] == "model.layers.1.mlp"
    assert transcoders[1].to_dict()["cfg"]["d_out"] == 256


def test_targets_may_be_listed() -> None:
    hookpoints = ("model.layers.0.mlp:in", "model.layers.2.mlp:in")
    entry = {**TRANSCODER, "hookpoint_out": ["model.layers.1", "model.layers.0.mlp"]}
    _, jobs = resolve(run_of(entry, hookpoints=hookpoints))
    assert [(job.hookpoint, job.target) for job in jobs] == [
        ("model.layers.0.mlp:in", "model.layers.1"),
        ("model.layers.2.mlp:in", "model.layers.0.mlp"),
    ]


def test_a_target_of_another_width_must_be_said_to_be_so() -> None:
    """In the embedded model the widths are 256, and 640 inside the MLP."""
    inner = {**TRANSCODER, "hookpoint_out": "model.layers.*.mlp.act_fn"}
    with pytest.raises(
        UserError, match=r"saes\.0\.d_out: missing; .*mlp:in has width 256 .* width 640, so set d_out: 640"
    ):
        resolve(run_of(inner))
    _, jobs = resolve(run_of({**inner, "d_out": 640}))
    assert {widths_of(job) for job in jobs} == {(256, 640)}
    with pytest.raises(UserError, match=r"saes\.0\.d_out: 256 must be 640, the width of model\.layers\.0\.mlp\.act_fn"):
        resolve(run_of({**inner, "d_out": 256}))
    with pytest.raises(UserError, match=r"saes\.0\.d_out: 640 must be 256, the width of model\.layers\.0\.mlp$"):
        resolve(run_of({**TRANSCODER, "d_out": 640}))


@pytest.mark.parametrize(
    ("entry", "parts"),
    [
        ({"architecture": "transcoder"}, ["saes.0.hookpoint_out: missing", "predict"]),
        ({**TRANSCODER, "architecture": "topk", "k": 4}, ["saes.0.hookpoint_out:", "topk", "choose a transcoder"]),
        ({"architecture": "standard", "d_out": 256}, ["saes.0.d_out: not an option of standard", "skip_transcoder"]),
        ({**TRANSCODER, "hookpoint_out": "model.layers.*.mpl"}, ["saes.0.hookpoint_out:", "model.layers.*.mpl"]),
        ({**TRANSCODER, "apply_b_dec_to_input": True}, ["saes.0.apply_b_dec_to_input: True", "false"]),
        ({**TRANSCODER, "normalize_activations": "layer_norm"}, ["saes.0.normalize_activations: 'layer_norm'", "none"]),
    ],
)
def test_what_is_refused(entry: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(run_of(entry))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# ---- what a job costs ------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [64]},
    "transcoder": {"d_out": 32},
    "jumprelu_skip_transcoder": {"d_out": 32},
    "batchtopk_skip_transcoder": {"d_out": 32, "k": 4},
}


@pytest.mark.parametrize("architecture", OPTIONS)
def test_multiply_adds_are_those_of_a_training_step(architecture: str) -> None:
    """Torch counts those of matrix products, two operations each, of one step forward and back."""
    rows, d_in, d_sae = 256, 64, 512
    options = OPTIONS[architecture]
    cfg = training_config(architecture, d_in, {"d_sae": d_sae, **options}, "saes.0")
    d_out = options.get("d_out", d_in)
    sae = create(architecture, cfg, Shard())
    sae.initialize(0, "h")
    x, target = torch.randn(rows, d_in), torch.randn(rows, d_out)
    step = TrainStepInput(
        sae_in=x,
        target=target,
        coefficients={"l1": 1.0, "l0": 1.0},
        dead_neuron_mask=torch.zeros(d_sae, dtype=torch.bool),
        n_training_steps=0,
        is_logging_step=False,
        num_dead=0,
    )
    with FlopCounterMode(display=False) as counter:
        sae.training_forward_pass(step).loss.backward()
    # What it does not see: the products of codes, which gather rows.
    sparse = cfg.k * (d_in + 3 * d_out) if "topk" in architecture else 0
    counted = counter.get_total_flops() / 2 / rows + sparse
    # Beside the products of rows there is one of a vector, the gradient of b_dec by way of the encoder: 1/256 of one.
    assert counted == pytest.approx(type(sae).multiply_adds(cfg), rel=0.01)


class DenseTopK(TopKTrainingSAE):
    """Its activations are its own, so its step is one on dense activations."""

    def get_activation_fn(self) -> Any:
        return torch.relu


class OwnStandard(StandardTrainingSAE):
    pass


def test_a_class_of_ones_own_costs_what_its_step_does() -> None:
    topk = training_config("topk", 256, {"d_sae": 512, "k": 4}, "saes.0")
    standard = training_config("standard", 256, {"d_sae": 512}, "saes.0")
    assert DenseTopK.multiply_adds(topk) == OwnStandard.multiply_adds(standard) == 5 * 256 * 512
    assert TopKTrainingSAE.multiply_adds(topk) == 256 * 512 + 4 * 4 * 256


def groups_of(groups: int, *saes: dict[str, Any]) -> list[list[str]]:
    """The sae_ids of each group."""
    _, jobs = resolve(run_of(*saes))
    dealt = split_jobs([job.planned for job in jobs], groups)
    return [[jobs[index].sae_id for index in group] for group in dealt]


def test_dense_saes_are_dealt_out_against_several_topk_ones() -> None:
    """Gated 8, standard 5, TopK 1 each (and a little for k): equal latents are no equal work."""
    one_of_each: list[dict[str, Any]] = [
        {"architecture": "gated", "hookpoints": ["model.layers.0"]},
        {"architecture": "standard", "hookpoints": ["model.layers.1"]},
        {"architecture": "topk", "k": 1, "hookpoints": ["model.layers.2", "model.layers.3", "model.layers.*.mlp"]},
    ]
    gated, others = groups_of(2, *one_of_each)
    assert gated == ["model.layers.0", "model.layers.2.mlp", "model.layers.3.mlp"]  # 8 + 2 against 5 + 4
    assert len(others) == 5


def test_width_and_architecture_are_weighed_together() -> None:
    """A TopK SAE of 512 latents is the work of a standard one of about 100; at one hookpoint they go together."""
    standard = {
        "name": "s",
        "architecture": "standard",
        "d_sae": 64,
        "hookpoints": ["model.layers.0", "model.layers.1"],
    }
    topk = {"name": "t", "architecture": "topk", "k": 4, "d_sae": 512, "hookpoints": ["model.layers.2"]}
    assert groups_of(2, standard, topk) == [
        ["model.layers.2/t"],
        ["model.layers.0/s", "model.layers.1/s"],
    ]
    beside = {**standard, "hookpoints": ["model.layers.2"], "d_sae": 128}
    assert groups_of(3, standard, topk, beside) == [
        ["model.layers.2/t", "model.layers.2/s"],
        ["model.layers.0/s"],
        ["model.layers.1/s"],
    ]


# ---- configs/ --------------------------------------------------------------------------------------------------------

# Those of the model that is here; tests/test_configs.py has the others.
CONFIGS = [
    path
    for path in sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
    if load(path).model.name == "embedded"
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_how_many_processes_it_takes(path: Path) -> None:
    run = load(path)
    _, jobs = resolve(run)
    planned = plan(run.topology, [job.planned for job in jobs], run.buffer.lanes)
    command = re.search(
        rf"--config_file (\S+)(?: --num_processes (\d+))? .*--config configs/{path.name}", path.read_text()
    )
    assert command is not None
    launcher, processes = command.groups()
    wanted = (
        yaml.safe_load((path.parents[1] / launcher).read_text())["num_processes"] if processes is None else processes
    )
    assert planned.world_size == int(wanted)


def test_every_layer_has_two_saes() -> None:
    run = load(next(path for path in CONFIGS if path.stem == "every_layer"))
    _, jobs = resolve(run)
    layers = [f"model.layers.{layer}" for layer in range(4)]
    assert sorted(job.sae_id for job in jobs) == sorted([*layers, *(f"{layer}.mlp" for layer in layers)])
    groups = plan(run.topology, [job.planned for job in jobs], run.buffer.lanes).groups
    assert [len(group.hookpoints) for group in groups] == [4, 4]
    assert not set(groups[0].hookpoints) & set(groups[1].hookpoints)


def test_the_rate_that_a_config_leaves_open_is_by_the_width_of_the_hookpoints() -> None:
    narrow, wide = "model.layers.0.mlp", "model.layers.0.mlp.act_fn"
    run = run_of(
        {"name": "own", "k": 4, "lr": 0.5, "hookpoints": [narrow, wide]},
        {"name": "narrow", "k": 4, "hookpoints": [narrow]},
        {"name": "both", "k": 4, "hookpoints": [narrow, wide]},
        {"name": "saelens", "k": 4, "recipe": "saelens", "hookpoints": [narrow]},
    )
    widths, jobs = resolve(run)
    assert (widths[narrow], widths[wide]) == (256, 640)
    rates = {(job.sae_id.rpartition("/")[2], job.hookpoint): job.train.lr for job in jobs}
    assert rates == {
        ("own", narrow): 0.5,
        ("own", wide): 0.5,
        ("narrow", narrow): learning_rate("topk", 256, 64),
        ("both", narrow): learning_rate("topk", 640, 64),
        ("both", wide): learning_rate("topk", 640, 64),
        ("saelens", narrow): 3e-4,
    }
    # A run's folder has numbers, with which it goes on whatever another version's rule.
    written = with_rates(run, jobs)
    assert [entry.train["lr"] for entry in written.saes] == [
        0.5,
        *(rates[name] for name in (("narrow", narrow), ("both", wide), ("saelens", narrow))),
    ]
    assert with_rates(written, resolve(written)[1]) == written
    assert resolve(written)[1] == jobs

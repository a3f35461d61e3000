"""From a config to its jobs: what transcoders predict, and which widths follow."""

from typing import Any

import pytest

from scale_sae.config import from_dict
from scale_sae.errors import UserError
from scale_sae.jobs import JobSpec, resolve
from scale_sae.topology import Job


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
    assert transcoders[1].planned == Job(
        "model.layers.1.mlp:in", "model.layers.1.mlp:in", 256 * 64, "model.layers.1.mlp"
    )
    assert last.planned == Job("model.layers.2/sae", "model.layers.2", 256 * 32)
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

"""The TopK family: the step on codes against that on dense activations, what crosses the links, released thresholds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from saes_for_tests import (
    BATCH,
    D_IN,
    D_SAE,
    K_AUX,
    Case,
    K,
    Step,
    assert_close,
    build,
    inputs,
    join,
    local_step,
    on_shards,
    step_input,
    targets,
)
from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes import TrainingSAE, training_class, training_config
from scale_sae.saes.base import SparseTrainStepOutput

# What SAELens's class has too and a subclass of it may replace.
HOOKS = ("get_activation_fn", "process_sae_in", "encode_with_hidden_pre", "decode", "calculate_aux_loss")
FAMILY = [
    Case("topk", n_dead=30),
    Case("topk", {"rescale_acts_by_decoder_norm": False}, 3),
    Case("abstopk", n_dead=30),
    Case("batchtopk", n_dead=30),
    Case("batchtopk", {"normalize_activations": "layer_norm"}, 30),
    Case("matryoshka_batchtopk", n_dead=30),
    Case("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True}, 30),
    Case("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True, "rescale_acts_by_decoder_norm": False}, 30),
    Case("batchtopk_skip_transcoder", n_dead=30),
]


def with_hook(base: type[TrainingSAE], hook: str, called: list[str]) -> type[TrainingSAE]:
    """A researcher's subclass whose ``hook`` does what it did before, and notes that it was called."""

    def replaced(self: TrainingSAE, *args: Any) -> Any:
        called.append(hook)
        return getattr(base, hook)(self, *args)

    return type(f"{base.__name__}_{hook}", (base,), {hook: replaced})


@pytest.mark.parametrize("tp", [1, 2])
def test_a_subclass_with_a_hook_of_its_own_makes_the_same_step(tp: int) -> None:
    def run(shard: Shard) -> list[list[tuple[Step, Step]]]:
        found = []
        for case in FAMILY:
            sae = build(case, shard)
            steps = [local_step(sae, case)]
            for hook in HOOKS:
                called: list[str] = []
                own = build(case, shard, sae_class=with_hook(training_class(case.architecture), hook, called))
                steps.append(local_step(own, case))
                assert called, (case, hook)
                for name, tensor in own.tensors().items():  # running thresholds among them
                    torch.testing.assert_close(tensor, sae.tensors()[name], rtol=1e-13, atol=0)
                output = own.training_forward_pass(step_input(own, case, inputs(), targets(case)))
                assert not isinstance(output, SparseTrainStepOutput)
            output = sae.training_forward_pass(step_input(sae, case, inputs(), targets(case)))
            assert isinstance(output, SparseTrainStepOutput)
            found.append(steps)
        return found

    for case, *by_rank in zip(FAMILY, *on_shards(tp, run), strict=True):
        sparse, *dense = (join(list(parts)) for parts in zip(*by_rank, strict=True))
        assert len(dense) == len(HOOKS)
        for hook, step in zip(HOOKS, dense, strict=True):
            assert_close(step, sparse, 1e-13, (case, hook))  # sums in another order


def test_a_hook_that_changes_something_does() -> None:
    """Each hook of the dense step, with its first result halved, gives another loss."""
    case = Case("topk", n_dead=30)
    usual = local_step(build(case, Shard()), case)[1]["loss"]
    for hook in HOOKS:
        base = training_class("topk")

        def halved(self: TrainingSAE, *args: Any, hook: str = hook, base: Any = base) -> Any:
            result = getattr(base, hook)(self, *args)
            if isinstance(result, Tensor):
                return result / 2
            if isinstance(result, tuple):
                return result[0] / 2, result[1]
            if isinstance(result, dict):
                return {name: loss / 2 for name, loss in result.items()}
            return lambda pre: result(pre) / 2

        own = build(case, Shard(), sae_class=type("Halved", (base,), {hook: halved}))
        assert abs(local_step(own, case)[1]["loss"] / usual - 1) > 1e-3, hook


class _Traffic(TorchDispatchMode):
    """Notes the collectives that run under it, each as (name, elements that this rank gives)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            gathers = "allgather" in func.__name__
            given = args[1] if gathers else args[0][0]
            self.calls.append(("all_gather" if gathers else "all_reduce", given.numel()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_dead", [0, 3, 30])
def test_what_crosses_the_links(n_dead: int) -> None:
    """Values for the selection, one sum for all reconstructions, b_dec's gradient: nothing of B × d_sae."""

    def run(shard: Shard) -> dict[str, list[tuple[str, int]]]:
        found = {}
        for name in ("topk", "abstopk", "matryoshka_batchtopk"):
            case = Case(name, n_dead=n_dead)
            sae = build(case, shard)
            with _Traffic() as traffic:
                sae.training_forward_pass(step_input(sae, case, inputs())).loss.backward()
            found[name] = traffic.calls
        return found

    chosen = [("all_gather", BATCH * K_AUX)] if n_dead > K_AUX else []
    sizes = {"topk": 1, "matryoshka_batchtopk": 3}  # reconstructions of levels
    for calls in on_shards(2, run):
        assert calls["topk"] == calls["abstopk"]
        for name, levels in sizes.items():
            whole = [*chosen, ("all_reduce", BATCH * D_IN * (levels + (n_dead > 0)))]
            if name == "topk":
                assert calls[name] == [("all_gather", BATCH * K), *whole, ("all_reduce", D_IN)]
            else:  # after the histograms of the selection, before the smallest activation
                assert calls[name][-2 - len(whole) :] == [*whole, ("all_reduce", 1), ("all_reduce", D_IN)]


# ---- the threshold of a BatchTopK release ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "batchtopk_transcoder"])
def test_the_release_has_the_mean_threshold_of_the_last_steps(architecture: str) -> None:
    """A 32nd of each; in the first 256 steps more, the first eight alone."""
    case = Case(architecture)
    sae, x = build(case, Shard()), inputs()
    threshold = 0.0
    for steps, share in ((0, 1), (7, 1), (15, 1 / 2), (127, 1 / 16), (255, 1 / 32), (10_000, 1 / 32)):
        given = replace(step_input(sae, case, (1 + steps % 10) * x, targets(case)), n_training_steps=steps)
        acts = sae.training_forward_pass(given).feature_acts.detach()
        threshold += share * (float(acts[acts > 0].min()) - threshold)
        assert float(sae.get_buffer("release_threshold")) == pytest.approx(threshold, rel=1e-12)
    # Rows without any active latent say nothing.
    sae.get_parameter("b_enc").data.fill_(-1e6)
    sae.training_forward_pass(replace(given, n_training_steps=1))
    assert float(sae.get_buffer("release_threshold")) == pytest.approx(threshold, rel=1e-12)


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_sae": 64, "kk": 3}, r"saes\.2\.kk: not an option of topk \(did you mean k\?\); its options are .*, d_sae"),
        ({"d_sae": 64, "l1_coefficient": 1}, r"saes\.2\.l1_coefficient: not an option of topk.*; its options are "),
        ({"d_sae": 64, "k": 0}, r"saes\.2\.k: 0 must be from 1 to d_sae \(64\)"),
        ({"d_sae": 64, "k": 65}, r"saes\.2\.k: 65 must be from 1 to d_sae \(64\)"),
        ({"d_sae": 64, "k": 3.5}, r"saes\.2\.k: 3\.5 must be an integer"),
        ({"d_sae": 64, "k": True}, r"saes\.2\.k: True must be an integer"),
        ({"d_sae": -64, "k": 4}, r"saes\.2\.d_sae: -64 must be at least 1"),
        ({"k": 4}, r"saes\.2\.d_sae: missing; topk needs an integer"),
        (
            {"d_sae": 64, "k": 4, "dtype": "float16"},
            r"saes\.2\.dtype: 'float16' must be float32 or float64 or bfloat16",
        ),
        ({"d_sae": 64, "k": 4, "decoder_init_norm": 0}, r"saes\.2\.decoder_init_norm: 0 must be more than 0"),
        ({"d_sae": 64, "k": 4, "decoder_init_norm": "x"}, r"saes\.2\.decoder_init_norm: 'x' must be a number or null"),
        ({"d_sae": 64, "k": 4, "aux_loss_coefficient": -1}, r"saes\.2\.aux_loss_coefficient: -1 must be 0 or more"),
        ({"d_sae": 64, "k": 4, "apply_b_dec_to_input": 1}, r"saes\.2\.apply_b_dec_to_input: 1 must be true or false"),
        (
            {"d_sae": 64, "k": 4, "normalize_activations": "covariance_whitening"},
            r"normalize_activations: 'covariance_whitening' must be none or ",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        training_config("topk", D_IN, options, "saes.2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("standard", {"lp_norm": 0}, r"saes\.2\.lp_norm: 0 must be above 0"),
        ("standard", {"l1_coefficient": -1}, r"saes\.2\.l1_coefficient: -1 must be 0 or more"),
        ("gated", {"l1_warm_up_steps": -1}, r"saes\.2\.l1_warm_up_steps: -1 must be 0 or more"),
        ("jumprelu", {"jumprelu_bandwidth": 0}, r"saes\.2\.jumprelu_bandwidth: 0 must be above 0"),
        ("jumprelu", {"jumprelu_init_threshold": -1}, r"saes\.2\.jumprelu_init_threshold: -1 must be 0 or more"),
        ("jumprelu", {"l0_coefficient": float("nan")}, r"saes\.2\.l0_coefficient: nan must be a number"),
        ("jumprelu", {"pre_act_loss_coefficient": -1}, r"pre_act_loss_coefficient: -1 must be 0 or more, or null"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic"}, r"saes\.2\.target_l0: None must be above 0"),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "steps"}, r"'steps' must be step or tanh or quadratic"),
        ("batchtopk", {"k": 0.0}, r"saes\.2\.k: 0\.0 must be above 0 and at most d_sae \(64\)"),
        ("batchtopk", {"k": 4, "topk_threshold_lr": 0}, r"saes\.2\.topk_threshold_lr: 0 must be above 0"),
        ("matryoshka_batchtopk", {"k": 4}, r"saes\.2\.matryoshka_widths: \[\] must name the widths"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [8, 8]}, r"must be positive and increase"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [0, 8]}, r"must be positive and increase"),
        ("matryoshka_batchtopk", {"k": 4, "matryoshka_widths": [8, 65]}, r"must not exceed d_sae \(64\)"),
        ("transcoder", {"apply_b_dec_to_input": True}, r"saes\.2\.apply_b_dec_to_input: True must be false"),
        ("skip_transcoder", {"normalize_activations": "layer_norm"}, r"'layer_norm' must be none or expected_average"),
    ],
)
def test_wrong_options_of_other_architectures(architecture: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        training_config(architecture, D_IN, {"d_sae": D_SAE, **options}, "saes.2")
    assert "\n" not in str(caught.value)


def test_unknown_architecture() -> None:
    with pytest.raises(UserError, match=r"saes\.0\.architecture: unknown architecture 'tokp' \(did you mean topk"):
        training_config("tokp", D_IN, {"d_sae": 64}, "saes.0")

"""One training step of every architecture, on 1, 2 and 4 shards, against SAELens's; transcoders against a plain one.

``pytest -s tests/test_parity.py`` prints the table of the largest differences.
"""

from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saes_for_tests import (
    D_SAE,
    K_AUX,
    TRAINED,
    TRANSCODERS,
    Case,
    Step,
    assert_close,
    build,
    dead_mask,
    differences,
    gradients,
    inputs,
    on_shards,
    our_step,
    saelens_sae,
    saelens_step,
    sharded_steps,
    step_input,
)
from scale_sae.collectives import Shard
from scale_sae.saes import TrainCoefficientConfig
from written_out import Plain

pytest.importorskip("sae_lens")

# Sums in another order, and divisions where SAELens does not cancel: some roundings of 1e-16, or of 1e-7, magnified by
# steep slopes up to a thousandfold in float64 (roots) and less than a hundredfold in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
TP = (1, 2, 4)
NORMS = ("layer_norm", "constant_norm_rescale")

pytestmark = pytest.mark.filterwarnings("ignore:WARNING. The final matryoshka level")


def with_norms(architecture: str, n_dead: int = 0) -> list[Case]:
    return [Case(architecture, {"normalize_activations": norm}, n_dead) for norm in NORMS]


def topk_cases(architecture: str, *more: Case) -> list[Case]:
    """n_dead: none, few, one more than are used, many. The third chooses among negative values too."""
    return [
        *(Case(architecture, n_dead=n) for n in (0, 3, K_AUX + 1, 30)),
        *(Case(architecture, {"rescale_acts_by_decoder_norm": False}, n) for n in (0, 30)),
        Case(architecture, {"apply_b_dec_to_input": False}, 30),
        Case(architecture, {"aux_loss_coefficient": 0.25}, 30),
        Case(architecture, {"aux_loss_coefficient": 0.0}, 30),
        Case(architecture, {"k": 50}, 30),  # more than the positive pre-activations of any row
        *more,
    ]


CASES: dict[str, list[Case]] = {
    "standard": [
        Case("standard"),
        Case("standard", {"lp_norm": 2.0}),
        Case("standard", {"lp_norm": 0.5}),
        *(Case("standard", {"l1_warm_up_steps": 10}, step=step) for step in (0, 3, 10)),
        Case("standard", {"apply_b_dec_to_input": False}, n_dead=30),
        *with_norms("standard"),
    ],
    "gated": [
        Case("gated"),
        *(Case("gated", {"l1_warm_up_steps": 10}, step=step) for step in (0, 3, 10)),
        Case("gated", {"apply_b_dec_to_input": False}, n_dead=30),
    ],
    "jumprelu": [
        *(
            Case("jumprelu", {"jumprelu_sparsity_loss_mode": mode, "jumprelu_ste_to_input": to_input, "target_l0": 9.0})
            for mode in ("step", "tanh", "quadratic")
            for to_input in (False, True)
        ),
        *(Case("jumprelu", n_dead=n_dead) for n_dead in (0, 3, 30)),
        Case("jumprelu", {"pre_act_loss_coefficient": None}, 30),
        Case("jumprelu", {"jumprelu_ste_to_input": True}, 30),
        Case("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 1.5}),
        *(Case("jumprelu", {"l0_warm_up_steps": 10}, step=step) for step in (0, 3, 10)),
        Case("jumprelu", {"apply_b_dec_to_input": False}, n_dead=30),
        *with_norms("jumprelu"),
    ],
    "topk": topk_cases("topk", *with_norms("topk")),
    "abstopk": topk_cases("abstopk", *with_norms("abstopk")),
    "batchtopk": topk_cases("batchtopk", *with_norms("batchtopk")),
    "matryoshka_batchtopk": topk_cases(
        "matryoshka_batchtopk",
        *(
            Case("matryoshka_batchtopk", {"matryoshka_widths": widths, "use_matryoshka_aux_loss": own}, n_dead)
            # Levels on the shards' borders; inside shards, some in the same one; a single one inside the last shard.
            for widths in ([16, 32, D_SAE], [2, 10, 37, 41], [60])
            for own in (False, True)
            for n_dead in (0, 3, 30)
        ),
        Case("matryoshka_batchtopk", {"use_matryoshka_aux_loss": True, "rescale_acts_by_decoder_norm": False}, 30),
    ),
}
# What SAELens does otherwise, and why it is not followed; these steps are compared with ones that are written out.
# (That its JumpReLU thresholds are float32 in a float64 SAE too is undone in its SAEs here. How the BatchTopK threshold
# differs: test_running_threshold_is_saelens_s_without_its_start.)
DIFFERENCES: dict[str, list[Case]] = {
    "SAELens refuses AuxK with statistics of rows: it would compare normalised rows with rows": [
        case for kind in ("topk", "abstopk", "batchtopk") for n in (3, 30) for case in with_norms(kind, n)
    ],
    "SAELens's gated auxiliary loss takes rows that are not normalised, unlike the gate that it trains": with_norms(
        "gated"
    ),
    "SAELens's nested reconstructions fail with statistics of rows: the outer one has dropped them": [
        Case("matryoshka_batchtopk", {"normalize_activations": norm, "use_matryoshka_aux_loss": own}, n)
        for norm in NORMS
        for own in (False, True)
        for n in (0, 30)
    ],
}
OF_KINDS: dict[str, list[dict[str, Any]]] = {
    "standard": [{"l1_warm_up_steps": 10}, {"lp_norm": 2.0}],
    "jumprelu": [{"jumprelu_sparsity_loss_mode": mode, "target_l0": 9.0} for mode in ("step", "tanh", "quadratic")],
    "batchtopk": [{"rescale_acts_by_decoder_norm": False}, {"aux_loss_coefficient": 0.25}],
}
TRANSCODED = {
    name: [
        *(Case(name, n_dead=n_dead) for n_dead in (0, 3, 30)),
        *(Case(name, options, n_dead=30, step=3) for options in OF_KINDS[kind]),
    ]
    for name, kind in TRANSCODERS.items()
}
ALL_CASES = {**CASES, **DIFFERENCES, **TRANSCODED}

Key = tuple[str, int, torch.dtype]  # of ALL_CASES: its key, number of the case, dtype


@pytest.fixture(scope="module", params=TP, ids="tp{}".format)
def steps(request: pytest.FixtureRequest) -> tuple[int, dict[Key, Step]]:
    """Every step on some number of shards."""
    named: dict[Key, Case] = {
        (name, i, dtype): case
        for name, cases in ALL_CASES.items()
        for i, case in enumerate(cases)
        for dtype in case.dtypes
    }
    found = sharded_steps(request.param, [our_step(case, key[2]) for key, case in named.items()])
    return request.param, dict(zip(named, found, strict=True))


@cache
def saelens(architecture: str, i: int, dtype: torch.dtype) -> Step:
    return saelens_step(CASES[architecture][i], dtype)


@cache
def written_out(name: str, i: int, dtype: torch.dtype) -> Step:
    return Plain(ALL_CASES[name][i], dtype).step()


@pytest.fixture(scope="module")
def table() -> Iterator[dict[tuple[str, int, str], tuple[float, float, float]]]:
    """The largest differences in losses, outputs with activations, gradients; printed when all is done."""
    rows: dict[tuple[str, int, str], tuple[float, float, float]] = {}
    yield rows
    print(f"\n\n{'architecture':<22}{'tp':>3} {'dtype':<9}{'losses':>9}{'outputs':>9}{'gradients':>11}")
    for (architecture, tp, dtype), worst in sorted(rows.items()):
        print(f"{architecture:<22}{tp:>3} {dtype:<9}{worst[0]:>9.0e}{worst[1]:>9.0e}{worst[2]:>11.0e}")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["f64", "f32"])
@pytest.mark.parametrize("architecture", TRAINED)
def test_a_step_equals_saelens(
    steps: tuple[int, dict[Key, Step]], architecture: str, dtype: torch.dtype, table: dict[Any, Any]
) -> None:
    tp, ours = steps
    worst = [0.0, 0.0, 0.0]
    for i, case in enumerate(CASES[architecture]):
        if dtype not in case.dtypes:
            continue
        found = assert_close(ours[architecture, i, dtype], saelens(architecture, i, dtype), TOLERANCE[dtype], case)
        for name, difference in found.items():
            group = 2 if "grad" in name else 0 if "loss" in name else 1
            worst[group] = max(worst[group], difference)
    table[architecture, tp, str(dtype).removeprefix("torch.")] = (worst[0], worst[1], worst[2])


@pytest.mark.parametrize("reason", DIFFERENCES, ids=lambda reason: reason.split(":")[0])
def test_what_differs_from_saelens_on_purpose(steps: tuple[int, dict[Key, Step]], reason: str) -> None:
    for i, case in enumerate(DIFFERENCES[reason]):
        ours = steps[1][reason, i, torch.float64]
        assert_close(ours, written_out(reason, i, torch.float64), 1e-12, case)


@pytest.mark.parametrize("reason", DIFFERENCES, ids=lambda reason: reason.split(":")[0])
def test_saelens_still_differs(reason: str) -> None:
    """Once it does not, the cases belong to CASES."""
    for i, case in enumerate(DIFFERENCES[reason]):
        try:
            theirs = saelens_step(case, torch.float64)
        except (ValueError, AttributeError):
            continue
        assert max(differences(theirs, written_out(reason, i, torch.float64)).values()) > 0.05


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_step_of_a_transcoder(steps: tuple[int, dict[Key, Step]], architecture: str) -> None:
    for i, case in enumerate(TRANSCODED[architecture]):
        for dtype in case.dtypes:
            ours = steps[1][architecture, i, dtype]
            assert_close(ours, written_out(architecture, i, dtype), TOLERANCE[dtype], case)
            assert ("grad W_skip" in ours) == ("skip" in architecture)


@pytest.mark.parametrize("architecture", TRAINED)
def test_what_is_written_out_is_saelens_s(architecture: str) -> None:
    for i, case in enumerate(CASES[architecture]):
        if case.n_dead or "topk" not in architecture:  # AuxK is written out for steps that have it
            assert_close(
                written_out(architecture, i, torch.float64), saelens(architecture, i, torch.float64), 1e-12, case
            )


@pytest.mark.parametrize("architecture", TRAINED)
def test_the_cases_show_something(architecture: str) -> None:
    """Every loss term and every gradient of the loss is somewhere other than 0."""
    found = [saelens(architecture, i, torch.float64) for i in range(len(CASES[architecture]))]
    names = {name for step in found for name in step if "acts' grad" not in name}
    assert len([name for name in names if name.startswith("grad")]) >= 4
    assert all(any(step[name].any() for step in found if name in step) for name in names)


def test_estimators_norms_and_levels_show_something() -> None:
    sae = build(Case("jumprelu"), Shard())
    out = sae.training_forward_pass(step_input(sae, Case("jumprelu"), inputs()))
    near = (out.hidden_pre - sae.get_parameter("threshold")).abs() < sae.cfg.jumprelu_bandwidth / 2
    assert near.double().mean() > 0.05
    norms = sae.W_dec.norm(dim=1)
    assert norms.max() > 1.9 and norms.min() < 0.5
    dead = [[int(dead_mask(n)[a:b].sum()) for a, b in ((0, 2), (2, 10), (10, 37), (37, 41))] for n in (3, 30)]
    assert min(dead[0]) == 0 and max(dead[1]) > K_AUX > min(dead[1]) > 0


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0])
def test_rows_without_activations_pull_at_nothing(p: float) -> None:
    """The p-norm of zeros has no slope; SAELens takes 0 for it, and so do we: one row is silent, then all are."""
    case = Case("standard", {"lp_norm": p})
    saes: list[Any] = [build(case, Shard()), saelens_sae(case, torch.float64)]
    step: Any = SimpleNamespace(coefficients={"l1": 1.0})
    for shift in (5.0, 1000.0):
        found = []
        for sae in saes:
            sae.b_enc.data -= shift
            acts = sae.encode(inputs())
            assert not acts.any(1).all() and bool(acts.any()) == (shift == 5)
            loss = sae.calculate_aux_loss(step, acts, acts, acts)["l1_loss"]
            found.append({"loss": loss.detach(), **gradients(loss, {"b_enc": sae.b_enc, "W_dec": sae.W_dec})})
        assert_close(found[0], found[1], 1e-12, shift)


def test_coefficients_warm_up_as_saelens_s() -> None:
    from sae_lens.training.optim import CoefficientScheduler

    for steps_, value in ((0, 2.0), (1, 2.0), (7, 0.3)):
        scheduler, ours = CoefficientScheduler(steps_, value), TrainCoefficientConfig(value, steps_)
        for step in range(12):
            assert ours.at(step) == pytest.approx(scheduler.current_value, rel=1e-15)
            scheduler.step()


@pytest.mark.parametrize("tp", [1, 2])
def test_running_threshold_is_saelens_s_without_its_start(tp: int) -> None:
    """SAELens's mean begins at 0, so that early releases are too dense; without that start it is what ours is."""
    case = Case("batchtopk", {"topk_threshold_lr": 0.2})
    batches = [scale * inputs().roll(i, 0)[: 20 + i] for i, scale in enumerate((1.0, 3.0, 0.5, 2.0))]

    def run(shard: Shard) -> list[Tensor]:
        sae: Any = build(case, shard)
        seen = []
        for x in batches:
            sae.training_forward_pass(step_input(sae, case, x))
            seen.append(sae.topk_threshold.clone())
        sae.b_enc.data -= 1000  # no activation: the mean stays
        out = sae.training_forward_pass(step_input(sae, case, batches[0]))
        assert out.active_latents == 0
        return [*seen, sae.topk_threshold.clone()]

    theirs = saelens_sae(case, torch.float64)
    wanted = []
    for n, x in enumerate(batches, 1):
        theirs.update_topk_threshold(theirs.encode(x))
        wanted.append(theirs.topk_threshold / (1 - 0.8**n))  # what the weights of n batches add up to
    assert torch.stack(wanted).std() > 0.01
    for found in on_shards(tp, run):
        torch.testing.assert_close(found, [*wanted, wanted[-1]], rtol=1e-13, atol=0)  # some roundings

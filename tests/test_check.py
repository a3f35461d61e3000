"""What the check of custom classes says of those in classes_to_check.py, and the simulated shards that it runs on."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes import registry
from scale_sae.saes.check import check_custom
from scale_sae.saes.simulated_shards import OutOfStepError, on_shards

pytest.importorskip("sae_lens")  # for a class that returns SAELens's output

CLASSES = Path(__file__).with_name("classes_to_check.py")


def checked(name: str, d_in: int = 24, tp: int = 2, **options: Any) -> str | None:
    """What the check says of a class in ``classes_to_check``, on a few latents."""
    path = f"classes_to_check:{name}"
    return check_custom(path, registry.training_config(path, d_in, {"d_sae": 24, **options}, "saes.0"), tp)


# class → (options, what the line tells)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "SumOverLocal": ({}, ["losses/l1_loss is another on 2 shards than on one", "self.shard", "sum"]),
    "SmallSumOverLocal": ({}, ["loss is another on 2 shards", "sum"]),
    "LocalNorm": ({}, ["feature_acts is another on 2 shards", "self.shard"]),
    "LocalPrefix": ({"k": 3}, ["losses/inner is another on 2 shards", "prefix"]),
    "LocalMetric": ({}, ["metrics/mean_act is another on 2 shards", "sum"]),
    "LocalBuffer": ({}, ["seen after a step is another on 2 shards"]),
    "SkipsEmpty": ({}, ["make different calls at ", "classes_to_check.py:", "shard 0", "shard 1", "prefix"]),
    "CallsWhenOthersAreDone": (
        {},
        ["make different calls at ", "classes_to_check.py:", "shard 0 is at the end of the step"],
    ),
    "PastTheShard": ({}, ["in training_forward_pass at ", "classes_to_check.py:"]),
    "NoCopy": ({}, ["the gradient of gain is another on 2 shards", "self.shard.copy"]),
    "CopyTooMuch": ({}, ["the gradient of gain is another on 2 shards", "without it"]),
    "NotNamed": ({}, ["gain has shape [1] on a shard of 24 latents", "`replicated`"]),
    "ForgetsBase": ({}, ["b_dec has shape [16]", "`replicated`"]),
    "FullSize": ({}, ["b_more has shape [24] on a shard of 12 latents", "self.n_local"]),
    "RandomStart": ({}, ["initial gain is another when it is computed again", "initialize(seed, hookpoint)"]),
    "LocalStart": ({}, ["initial b_enc is another on 2 shards", "self.draw_rows"]),
    "Dropout": ({}, ["feature_acts is another when it is computed again", "seeds.generator"]),
    "Narrows": ({}, ["sae_out is another on 2 shards", "promote_types"]),
    "SaeLensOutput": ({}, ["returned a sae_lens.saes.sae.TrainStepOutput", "scale_sae.TrainStepOutput"]),
    "NoOutput": ({}, ["returned a builtins.NoneType"]),
    "LossPerRow": ({}, ["loss has shape [8]", "scalar"]),
    "LossDetached": ({}, ["loss has no gradient"]),
    "LossesOfFloats": ({}, ["losses/mse_loss is a float", "scalar tensor"]),
    "LossesAsTensor": ({}, ["losses is a Tensor", "dict"]),
    "MetricPerLatent": ({}, ["metrics/acts has shape [24]", "scalar"]),
    "WholeActs": ({}, ["feature_acts", "has shape [8, 48]", "[batch, self.n_local], here [8, 24]"]),
    "RowOut": ({}, ["sae_out", "has shape [16]", "[batch, d_out], here [8, 16]"]),
    "NotFinite": ({}, ["the gradient of", "is not finite"]),
    "Raises": ({}, ["IndexError in training_forward_pass", ": first second"]),
    "RaisesOnOneShard": ({}, ["IndexError in training_forward_pass", "only here"]),
    "RaisesBackward": ({}, ["RuntimeError in the backward pass", "inplace operation"]),
    "DropsBias": ({}, ["b_enc are missing", "process_state_dict_for_saving_inference"]),
    "KeepsMore": ({}, ["gain are unknown", "process_state_dict_for_saving_inference"]),
    "ReleaseOfOtherShape": ({}, ["W_enc has shape [24, 16]", "[16, 24]"]),
    "ReleaseMixesLatents": ({}, ["b_enc of the release is another where latents 0 to 0", "no other latent"]),
    "ReleaseDiffers": ({}, ["pre-activations of its release differ", "consolidate would refuse"]),
    "ReleasedDecoderDiffers": (
        {"apply_b_dec_to_input": False},
        ["reconstructions of its release differ", "consolidate would refuse"],
    ),
    "NeedsManyLatents": ({}, ["ValueError while its release is made by blocks", "too few latents"]),
    "ForgetsToFold": (
        {"normalize_activations": "expected_average_only_in"},
        ["reconstructions of its release differ", "fold_activation_norm_scaling_factor"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_class_is_refused_in_one_line(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(UserError) as raised:
        checked(name, **options)
    line = str(raised.value)
    assert line.startswith(f"classes_to_check:{name}: ") and "\n" not in line
    assert [word for word in words if word not in line] == [], line


def test_an_exception_is_placed_in_the_class_s_own_file() -> None:
    number = next(n for n, line in enumerate(CLASSES.read_text().splitlines(), 1) if line.endswith("# HERE"))
    with pytest.raises(UserError, match=re.escape(f" at {CLASSES}:{number}: ")):
        checked("Raises")


def test_a_class_that_ends_the_process_on_one_shard_leaves_no_other_waiting() -> None:
    with pytest.raises(SystemExit):
        checked("LeavesOnOneShard")


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("name", ["Replicated", "Noisy"])
def test_a_class_that_is_ported_well_passes(name: str, tp: int) -> None:
    checked(name, tp=tp)


@pytest.mark.parametrize("name", ["SumOverLocal", "LocalNorm", "NoCopy", "Dropout", "RandomStart"])
def test_on_one_shard_nothing_need_be_sharded(name: str) -> None:
    checked(name, tp=1)


PACKAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "matryoshka_batchtopk": {"matryoshka_widths": [8, 16], "use_matryoshka_aux_loss": True},
    "jumprelu": {"pre_act_loss_coefficient": 3e-6, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0},
}


@pytest.mark.parametrize(
    ("architecture", "normalize"),
    [
        (architecture, normalize)
        for architecture in sorted(registry._CLASSES)
        for normalize in ("none", "expected_average_only_in", "layer_norm")
        if not (normalize == "layer_norm" and "transcoder" in architecture)  # which refuse it
    ],
)
def test_every_architecture_of_the_package_passes(architecture: str, normalize: str) -> None:
    options = {"normalize_activations": normalize, **PACKAGE_OPTIONS.get(architecture, {})}
    options |= {"k": 3} if "topk" in architecture else {}
    if "transcoder" in architecture:
        options["d_out"] = 20
    cfg = registry.training_config(architecture, 24, {"d_sae": 24, **options}, "saes.0")
    assert check_custom(architecture, cfg, 3) is None


def test_a_class_may_tie_its_options_to_d_in() -> None:
    checked("TiedToWidth", d_in=42, groups=7)
    with pytest.raises(UserError, match=r"ValueError while it is made.*groups must divide d_in"):
        checked("TiedToWidth", d_in=40, groups=7)


def test_what_is_tried_is_narrow_whatever_the_width() -> None:
    widths = importlib.import_module("classes_to_check").WIDTHS
    widths.clear()
    checked("Counted", d_in=10**6)
    assert widths and max(widths) == 16


def test_a_release_with_other_activations_is_noted() -> None:
    note = checked("NoReleasedClass")
    assert note is not None and "of architecture standard" in note and "register_sae_class" in note
    # BatchTopK's release has a threshold by intent
    assert checked("Fitted", k=3) is None


def test_a_tensor_that_is_not_on_the_run_s_device_is_named() -> None:
    path = "classes_to_check:OnCpu"
    cfg = registry.training_config(path, 24, {"d_sae": 24}, "saes.0")
    with pytest.raises(UserError, match="b_more is on cpu, not on meta; make it there: device=device"):
        check_custom(path, cfg, 2, "meta")


# ---- simulated shards ------------------------------------------------------------------------------------------------


def test_simulated_shards_sum_and_gather() -> None:
    def fn(shard: Shard) -> list[Tensor]:
        x = torch.tensor([1.0, shard.rank])
        return [shard.all_reduce(x), shard.all_reduce(x, "max"), shard.all_reduce(x, "min"), shard.all_gather(x)]

    gathered = torch.tensor([[1.0, 0], [1, 1], [1, 2]])
    for found in on_shards(3, fn):
        wanted = [torch.tensor([3.0, 3]), torch.tensor([1.0, 2]), torch.tensor([1.0, 0]), gathered]
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_what_a_simulated_shard_has_given_is_its_own_again() -> None:
    def fn(shard: Shard) -> None:
        for _ in range(300):  # whichever thread is first
            x = torch.ones(1)
            total = shard.all_reduce(x)
            x += 5
            assert total == 3

    on_shards(3, fn)


def test_simulated_shards_that_fall_out_of_step_all_end() -> None:
    def fn(shard: Shard) -> None:
        if shard.rank != 1:
            shard.all_reduce(torch.zeros(2))

    with pytest.raises(OutOfStepError, match=r"shard 0 is at all_reduce.*shard 1 at the end"):
        on_shards(3, fn)


def test_the_error_of_a_simulated_shard_ends_the_others() -> None:
    def fn(shard: Shard) -> None:
        if shard.rank == 1:
            raise KeyError("mine")
        shard.all_gather(torch.zeros(2))

    with pytest.raises(KeyError, match="mine"):
        on_shards(3, fn)

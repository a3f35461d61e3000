"""What all architectures share: initialisation, bfloat16, what is released of them, classes of a researcher's own."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from saes_for_tests import (
    D_IN,
    D_OUT,
    TRAINED,
    TRANSCODERS,
    Case,
    Step,
    assert_close,
    build,
    inputs,
    join,
    local_step,
    on_shards,
    our_step,
    saelens_sae,
    saelens_start,
    saelens_step,
    sharded_steps,
    step_input,
    targets,
)
from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes import (
    SAE,
    StandardTrainingSAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    create,
    inference,
    register_sae_training_class,
    training_class,
    training_config,
)

pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:WARNING. The final matryoshka level")

ARCHITECTURES = (*TRAINED, *TRANSCODERS)
WIDTH = 192  # latents: shards of 96, 48 and 32 begin or end inside a block of latents that share a random stream


# ---- initialisation -------------------------------------------------------------------------------------------------


def initialized(
    architecture: str = "topk", shard: Shard | None = None, hookpoint: str = "layers.0", seed: int = 0, **options: Any
) -> TrainingSAE:
    given = Case(architecture, {"d_sae": WIDTH, **options}).all_options(torch.float32)
    sae = create(architecture, training_config(architecture, D_IN, given, "saes.0"), shard or Shard())
    for name in ("W_enc_rows", "W_dec"):
        torch.nn.init.constant_(sae.get_parameter(name), torch.nan)  # nothing that was there before may stay
    sae.initialize(seed, hookpoint)
    return sae


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shards_start_as_parts_of_the_whole(architecture: str) -> None:
    whole = initialized(architecture)
    for size in (2, 4, 6):
        parts = [initialized(architecture, Shard(rank, size)) for rank in range(size)]
        for name, tensor in whole.tensors().items():
            found = [part.tensors()[name] for part in parts]
            if name in whole.replicated:
                assert all(torch.equal(part, tensor) for part in found), name
            else:
                assert torch.equal(torch.cat(found), tensor), name


@pytest.mark.parametrize("architecture", TRAINED)
def test_initial_weights_are_saelens_s(architecture: str) -> None:
    sae = initialized(architecture)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((WIDTH,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    theirs = saelens_start(Case(architecture), torch.float32)
    expected = {name.replace("W_enc", "W_enc_rows"): tensor for name, tensor in theirs.named_parameters()}
    found = dict(sae.named_parameters())
    assert found.keys() == expected.keys()
    for name in found.keys() - {"W_enc_rows", "W_dec"}:
        assert expected[name].unique().numel() == 1 and torch.equal(found[name].unique(), expected[name].unique()), name


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_initial_weights_of_transcoders(architecture: str) -> None:
    sae = initialized(architecture)
    assert (sae.W_enc_rows.shape, sae.W_dec.shape, sae.b_dec.shape) == ((WIDTH, D_IN), (WIDTH, D_OUT), (D_OUT,))
    for rows in (sae.W_enc_rows, sae.W_dec):
        torch.testing.assert_close(rows.norm(dim=1), torch.full((WIDTH,), 0.1))
    assert ("W_skip" in dict(sae.named_parameters())) == ("skip" in architecture)
    assert "skip" not in architecture or not sae.get_parameter("W_skip").any()
    same_width = initialized(architecture, d_out=None)
    assert same_width.W_dec.shape == same_width.W_enc_rows.shape
    # Directions in 16 dimensions that were drawn apart: their cosines vary by 1/4 about 0, and the mean of 192 by 1/55.
    cosines = torch.nn.functional.cosine_similarity(same_width.W_dec, same_width.W_enc_rows)
    assert cosines.abs().max() < 0.9 and cosines.mean().abs() < 0.1


def test_norms_as_drawn() -> None:
    drawn = initialized(decoder_init_norm=None).W_dec
    bound = (6 / D_IN) ** 0.5
    assert drawn.abs().max() <= bound
    # A uniform draw has a standard deviation of bound/√3; that of 3072 such draws varies by 0.8 %.
    assert abs(drawn.std() / (bound / 3**0.5) - 1) < 0.04
    torch.testing.assert_close(torch.nn.functional.normalize(drawn) * 0.1, initialized().W_dec)


@pytest.mark.parametrize("architecture", ["topk", "skip_transcoder"])
def test_every_seed_and_hookpoint_starts_elsewhere(architecture: str) -> None:
    others: list[dict[str, Any]] = [{}, {"seed": 1}, {"hookpoint": "layers.1"}]
    starts = [initialized(architecture, **other) for other in others]
    for name in ("W_enc_rows", "W_dec"):
        rows = torch.cat([start.get_parameter(name) for start in starts])
        assert len(rows.unique(dim=0)) == 3 * WIDTH
        assert torch.equal(initialized(architecture).get_parameter(name), starts[0].get_parameter(name))


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def test_bfloat16_trains_like_float32() -> None:
    """bf16 keeps 3 significant digits, so near-ties are selected otherwise; the loss is not far from float32's."""
    cases = [Case(architecture, n_dead=30) for architecture in ARCHITECTURES]
    narrow = sharded_steps(2, [our_step(case, torch.bfloat16) for case in cases])
    cosine = torch.nn.functional.cosine_similarity
    for case, actual in zip(cases, narrow, strict=True):
        (expected,) = sharded_steps(1, [our_step(case, torch.float32)])
        assert actual["sae_out"].dtype == torch.bfloat16 and actual["mse_loss"].dtype == torch.float32
        for name in [name for name in expected if "loss" in name]:
            assert abs(actual[name] / expected[name] - 1) < 0.03, (case, name)
        grads = actual["grad W_dec"].float().flatten(), expected["grad W_dec"].flatten()
        assert cosine(*grads, dim=0) > 0.98, case
    thresholds = [step["threshold"].dtype for case, step in zip(cases, narrow, strict=True) if case.kind == "jumprelu"]
    assert thresholds == [torch.float32] * 3


# ---- the release ----------------------------------------------------------------------------------------------------


def released(sae: TrainingSAE) -> SAE:
    return inference.build(sae.cfg.get_inference_sae_cfg_dict(), sae.inference_state_dict(), "a test")


def release_cases() -> list[Case]:
    scaled = {"normalize_activations": "expected_average_only_in"}
    cases = [Case(name, scaled) for name in ARCHITECTURES]
    cases += [Case(name, {"normalize_activations": norm}) for name in TRAINED for norm in ("none", "layer_norm")]
    cases += [Case(name, {**scaled, "rescale_acts_by_decoder_norm": False}) for name in ARCHITECTURES if "topk" in name]
    return cases + [Case(name, {**scaled, "apply_b_dec_to_input": False}) for name in TRAINED]


@pytest.mark.parametrize("case", release_cases(), ids=lambda case: f"{case.architecture}-{'-'.join(case.options)}")
def test_a_release_does_to_inputs_what_training_did_to_scaled_ones(case: Case) -> None:
    sae, x = build(case, Shard()), inputs()
    scale, target_scale = 1.0, 1.0
    if sae.cfg.normalize_activations == "expected_average_only_in":
        scale, target_scale = 0.37, 2.1 if case.architecture in TRANSCODERS else 0.37
    out = sae.training_forward_pass(step_input(sae, case, scale * x, targets(case)))
    acts = out.feature_acts.detach()  # some are made now, by the weights as they are
    if case.kind.endswith("batchtopk"):
        sae.get_buffer("release_threshold").mul_(1 - 1e-9)  # the smallest activation is the threshold: let it pass
    trained = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    if case.architecture in TRANSCODERS:
        sae.fold_activation_norm_scaling_factor(scale, target_scale)
    else:
        sae.fold_activation_norm_scaling_factor(scale)
    folded = {name: tensor.clone() for name, tensor in sae.tensors().items()}
    release = released(sae)
    assert all(torch.equal(tensor, folded[name]) for name, tensor in sae.tensors().items())
    assert scale == 1 or not torch.equal(folded["W_dec"], trained["W_dec"])
    # Folding rounds each weight a few times: some 1e-16 of the largest activation, about 10.
    torch.testing.assert_close(release(x), out.sae_out.detach() / target_scale, rtol=1e-13, atol=1e-13)
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)  # then in the units of the decoder's norms
    torch.testing.assert_close(release.encode(x), acts / (target_scale if rescaled else 1), rtol=1e-13, atol=1e-13)
    assert 0.02 < (acts != 0).double().mean() < 0.9


@pytest.mark.parametrize("architecture", TRAINED)
def test_released_files_are_saelens_s(tmp_path: Path, architecture: str) -> None:
    case = Case(architecture)
    sae, theirs = build(case, Shard()), saelens_sae(case, torch.float64)
    if "batchtopk" in architecture:  # theirs is the running mean
        theirs.topk_threshold = torch.tensor(1.7, dtype=torch.float64)
        sae.get_buffer("release_threshold").fill_(1.7)
    weights, cfg = theirs.save_inference_model(tmp_path)
    expected = json.loads(cfg.read_text())
    expected.pop("metadata")
    assert sae.cfg.get_inference_sae_cfg_dict() == expected
    stored = load_file(weights)
    if architecture == "jumprelu":
        # As the last update made them, though its next step would lift those below 0.
        assert stored["threshold"].min() < 0
        stored["threshold"].clamp_(min=0)
    assert_close(sae.inference_state_dict(), stored, 1e-15)  # one rounding may be another


# ---- classes of a researcher's own ----------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MyConfig(TrainingSAEConfig):
    l1_coefficient: float = 0.7

    @classmethod
    def architecture(cls) -> str:
        return "standard_of_a_test"

    def get_inference_config_class(self) -> type[inference.SAEConfig]:
        return inference.sae_class("standard")[1]


class MySAE(TrainingSAE):
    """A researcher's class: plain autograd on dense local activations, with what mixes latents left to the shard."""

    cfg: MyConfig

    def __init__(self, cfg: MyConfig, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        return {"l1": TrainCoefficientConfig(self.cfg.l1_coefficient, 0)}

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        return self.activation_fn(hidden_pre), hidden_pre

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> Tensor:
        l1 = self.shard.sum((feature_acts * self.W_dec.norm(dim=1)).sum(1))
        return step_input.coefficients["l1"] * l1.mean()


def test_a_class_of_plain_tensors_shards_too() -> None:
    register_sae_training_class("standard_of_a_test", MySAE, MyConfig)
    assert training_class("standard_of_a_test") is MySAE
    with pytest.raises(UserError, match="already registered"):
        register_sae_training_class("standard_of_a_test", MySAE, StandardTrainingSAEConfig)
    expected = saelens_step(Case("standard"), torch.float64)
    expected.pop("l1_loss")  # a loss without a name is in the sum alone

    def run(shard: Shard) -> tuple[Step, Step]:
        case = Case("standard")
        cfg = training_config("standard_of_a_test", D_IN, case.all_options(torch.float64), "saes.0")
        ours, filled = create("standard_of_a_test", cfg, shard), build(case, shard)
        ours.load_state_dict(filled.state_dict())
        return local_step(ours, case)

    for tp in (1, 2):
        assert_close(join(on_shards(tp, run)), expected, 1e-13)


def test_an_input_of_its_own_making() -> None:
    """``process_sae_in`` is a hook of SAELens's: what replaces it is what the encoder sees, in every architecture."""
    for architecture in TRAINED:
        case = Case(architecture, {"apply_b_dec_to_input": False})
        base = training_class(architecture)

        def halved(self: TrainingSAE, sae_in: Tensor) -> Tensor:
            return sae_in / 2

        sae = build(case, Shard(), sae_class=type("Halved", (base,), {"process_sae_in": halved}))
        found = sae.training_forward_pass(step_input(sae, case, inputs(), targets(case)))
        plain = build(case, Shard())
        expected = plain.training_forward_pass(step_input(plain, case, inputs() / 2, targets(case)))
        torch.testing.assert_close(found.feature_acts, expected.feature_acts, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(found.sae_out, expected.sae_out, rtol=1e-13, atol=1e-13)
        assert expected.active_latents > 0

"""The TopK SAE: one step against SAELens's, shards against the whole, initialisation, export, options."""

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness import run_ranks
from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes import SAE, TopKSAE, TrainingSAE, TrainStepInput, TrainStepOutput, create, training_config
from scale_sae.saes.base import TrainingSAEConfig, mean_over_rows, squared_error
from scale_sae.saes.registry import register_sae_training_class, training_class

sae_lens = pytest.importorskip("sae_lens")

D_IN, D_SAE, K, BATCH = 16, 64, 6, 32
K_AUX = D_IN // 2
ONE = Shard()
Result = TypeVar("Result")


def on_shards(tp: int, fn: Callable[[Shard], Result]) -> list[Result]:
    """``fn`` of each of tp shards, in their order."""
    if tp == 1:
        return [fn(ONE)]
    return run_ranks(tp, lambda rank, world: fn(Shard(rank, world)))


def weights(dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole parameters with biases and decoder rows of norm 0.4 to 2, so that rescaling decides what is selected."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    directions = torch.nn.functional.normalize(draw(D_SAE, D_IN))
    tensors = {
        "W_enc_rows": directions + 0.2 * draw(D_SAE, D_IN),
        "W_dec": directions * torch.linspace(0.4, 2, D_SAE, dtype=torch.float64).roll(29)[:, None],
        "b_enc": 0.1 * draw(D_SAE),
        "b_dec": 0.3 * draw(D_IN),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def inputs(dtype: torch.dtype) -> Tensor:
    return torch.randn(BATCH, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def dead_mask(n_dead: int) -> Tensor:
    """n_dead latents of the first three quarters: with tp=4 the last shard has none, with few the first has all."""
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    among = 16 if n_dead <= 16 else 48
    mask[torch.randperm(among, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    return mask


def build(shard: Shard, dtype: torch.dtype, **options: Any) -> TrainingSAE:
    given = {"d_sae": D_SAE, "k": K, "dtype": str(dtype).removeprefix("torch."), **options}
    sae = create(training_config("topk", D_IN, given, "saes.0"), shard)
    for name, value in weights(dtype).items():
        sae.get_parameter(name).data.copy_(value if name in sae.replicated else value[sae.rows])
    return sae


def step_input(sae: TrainingSAE, x: Tensor, n_dead: int = 0, row_weights: Tensor | None = None) -> TrainStepInput:
    return TrainStepInput(x, dead_mask(n_dead)[sae.rows], n_dead, 0, False, row_weights)


def tensors_of(sae: TrainingSAE, out: TrainStepOutput) -> dict[str, Tensor]:
    """What a step gave this shard, after the backward pass."""
    assert out.codes is not None
    acts = torch.zeros(len(out.l0), sae.n_local, dtype=sae.dtype)
    acts[out.codes.rows, out.codes.latents] = out.codes.values
    grads = {f"grad {name}": p.grad for name, p in sae.named_parameters() if p.grad is not None}
    found = {"loss": out.loss, "sae_out": out.sae_out, **out.losses, **grads}
    found |= {"acts": acts.T, "fire_counts": out.fire_counts, "l0": out.l0}
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def sharded_step(
    tp: int, x: Tensor, n_dead: int, row_weights: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """One step on tp shards, put together; what must be the same on all of them is checked to be, bit for bit."""

    def run(shard: Shard) -> dict[str, Tensor]:
        sae = build(shard, x.dtype, **options)
        out = sae.training_forward_pass(step_input(sae, x, n_dead, row_weights))
        out.loss.backward()
        return tensors_of(sae, out)

    parts = on_shards(tp, run)
    whole = {}
    for name, tensor in parts[0].items():
        if name in ("acts", "fire_counts", "grad W_enc_rows", "grad W_dec", "grad b_enc"):
            whole[name] = torch.cat([part[name] for part in parts])
        else:
            assert all(torch.equal(part[name], tensor) for part in parts), name
            whole[name] = tensor
    return whole


def saelens_sae(dtype: torch.dtype, **options: Any) -> Any:
    cfg = sae_lens.TopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, **{"k": K, "dtype": str(dtype).removeprefix("torch."), **options}
    )
    sae = sae_lens.TopKTrainingSAE(cfg)
    for name, value in weights(dtype).items():
        (sae.W_enc if name == "W_enc_rows" else sae.get_parameter(name)).data = (
            value.T.contiguous() if name == "W_enc_rows" else value
        )
    return sae


def saelens_step(x: Tensor, n_dead: int, **options: Any) -> dict[str, Tensor]:
    from sae_lens.saes.sae import TrainStepInput as SAELensInput

    sae = saelens_sae(x.dtype, **options)
    out = sae.training_forward_pass(
        SAELensInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead_mask(n_dead), n_training_steps=0, is_logging_step=False
        )
    )
    out.loss.backward()
    found = {"loss": out.loss, "sae_out": out.sae_out, **out.losses, "acts": out.feature_acts.T}
    found |= {f"grad {name}": p.grad for name, p in sae.named_parameters()}
    found["grad W_enc_rows"] = found.pop("grad W_enc").T
    found["fire_counts"] = (out.feature_acts > 0).sum(0)
    found["l0"] = (out.feature_acts > 0).sum(1)
    return {name: tensor.detach() for name, tensor in found.items()}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Each tensor within ``tolerance`` of the largest entry of the expected one; integers exactly."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        difference = (actual[name] - tensor).abs().max()
        bound = tolerance * tensor.abs().max() if tensor.is_floating_point() else 0
        assert difference <= bound, f"{name}: {difference.item():.1e} of {tensor.abs().max().item():.1e}"


# SAELens divides by the norms where we cancel them, and sums in another order: some roundings of 2e-16, or of 1e-7.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("n_dead", [0, 3, K_AUX + 1, 30])  # the third chooses negative values too
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_a_step_equals_saelens(tp: int, n_dead: int, dtype: torch.dtype, tolerance: float) -> None:
    x = inputs(dtype)
    expected = saelens_step(x, n_dead)
    assert (expected["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)
    assert_close(sharded_step(tp, x, n_dead), expected, tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"aux_loss_coefficient": 0.25},
        {"k": 50},  # more than the positive pre-activations of any row
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_step_with_options_equals_saelens(options: dict[str, Any]) -> None:
    x = inputs(torch.float64)
    expected = saelens_step(x, 30, **options)
    assert options != {"k": 50} or expected["l0"].max() < 50
    assert_close(sharded_step(2, x, 30, **options), expected, 1e-13)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("n_dead", [0, 3, 30])
def test_rows_of_weight_zero_take_no_part(tp: int, n_dead: int) -> None:
    """A step is the one on the batch without these rows. The zeros that they hold would select by the biases alone."""
    x = inputs(torch.float64)
    left_out = torch.tensor([0, 7, BATCH - 1])
    kept = torch.ones(BATCH, dtype=torch.bool).index_fill(0, left_out, False)
    expected = sharded_step(1, x[kept], n_dead)
    actual = sharded_step(tp, x * kept[:, None], n_dead, row_weights=kept.double())
    assert not actual["l0"][left_out].any() and not actual["acts"][:, left_out].any()
    for name in ("sae_out", "l0"):
        actual[name] = actual[name][kept]
    actual["acts"] = actual["acts"][:, kept]
    assert_close(actual, expected, 1e-13)  # sums over the batch in another order


def test_bfloat16_trains_like_float32() -> None:
    """bf16 keeps 3 significant digits, so near-ties are selected otherwise; the loss is not far from float32's."""
    x = inputs(torch.float32)
    expected = sharded_step(1, x, 30)
    actual = sharded_step(2, x.bfloat16(), 30)
    for name in ("mse_loss", "auxiliary_reconstruction_loss"):
        assert actual[name].dtype == torch.float32
        assert abs(actual[name] / expected[name] - 1) < 0.02
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(actual["grad W_dec"].float().flatten(), expected["grad W_dec"].flatten(), dim=0) > 0.99


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
    """Values for the selection, one sum for both reconstructions, counts, b_dec's gradient: nothing of B × d_sae."""

    def run(shard: Shard) -> list[tuple[str, int]]:
        sae = build(shard, torch.float64)
        with _Traffic() as traffic:
            out = sae.training_forward_pass(step_input(sae, inputs(torch.float64), n_dead))
            out.loss.backward()
        return traffic.calls

    expected = [("all_gather", BATCH * K)]
    expected += [("all_gather", BATCH * K_AUX)] if n_dead > K_AUX else []
    expected += [("all_reduce", BATCH * D_IN * (2 if n_dead else 1)), ("all_reduce", BATCH), ("all_reduce", D_IN)]
    assert on_shards(2, run) == [expected, expected]


# ---- initialisation -------------------------------------------------------------------------------------------------


def initialized(shard: Shard = ONE, hookpoint: str = "model.layers.0", seed: int = 0, **options: Any) -> TrainingSAE:
    sae = create(training_config("topk", D_IN, {"d_sae": 192, "k": K, **options}, "saes.0"), shard)
    for parameter in sae.parameters():
        torch.nn.init.constant_(parameter, torch.nan)  # nothing that was there before may stay
    sae.initialize(seed, hookpoint)
    return sae


@pytest.mark.parametrize("size", [2, 4, 6])  # 96 and 48 latents begin or end inside a block of 64; so do 32
def test_shards_start_as_parts_of_the_whole(size: int) -> None:
    whole = initialized()
    for name in ("W_enc_rows", "W_dec"):
        parts = [initialized(Shard(rank, size)).get_parameter(name).data for rank in range(size)]
        assert torch.equal(torch.cat(parts), whole.get_parameter(name))


def test_initial_weights_are_saelens_s() -> None:
    sae = initialized()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((192,), 0.1))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    assert not sae.get_parameter("b_enc").any() and not sae.b_dec.any()
    drawn = initialized(decoder_init_norm=None).W_dec
    bound = (6 / D_IN) ** 0.5
    assert drawn.abs().max() <= bound
    # A uniform draw has a standard deviation of bound/√3; that of 3072 such draws varies by 0.8 %.
    assert abs(drawn.std() / (bound / 3**0.5) - 1) < 0.04
    torch.testing.assert_close(torch.nn.functional.normalize(drawn) * 0.1, sae.W_dec)


def test_every_seed_and_hookpoint_starts_elsewhere() -> None:
    starts = [initialized(), initialized(seed=1), initialized(hookpoint="model.layers.1")]
    rows = torch.cat([start.W_dec for start in starts])
    assert len(rows.unique(dim=0)) == 3 * 192
    assert torch.equal(initialized().W_dec, starts[0].W_dec)


# ---- export ---------------------------------------------------------------------------------------------------------


def release(sae: TrainingSAE, folder: Path, block: int = 10) -> None:
    """What consolidation does: released tensors from blocks of latents."""
    stored = {name: p.data for name, p in sae.named_parameters() if name not in sae.replicated}
    blocks = [
        sae.export_rows(sae.cfg, {name: tensor[start : start + block] for name, tensor in stored.items()})
        for start in range(0, D_SAE, block)
    ]
    tensors = {name: torch.cat([part[name] for part in blocks]) for name in blocks[0]}
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    tensors |= sae.export_replicated(sae.cfg, {"b_dec": sae.b_dec.data})
    folder.mkdir()
    save_file(tensors, folder / "sae_weights.safetensors")
    cfg = sae.inference_config(sae.cfg) | {"metadata": {"sae_lens_version": "6.54.12"}}
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_release_works_like_the_trained_sae(tmp_path: Path, rescale: bool, apply_b_dec: bool) -> None:
    options = {"rescale_acts_by_decoder_norm": rescale, "apply_b_dec_to_input": apply_b_dec}
    sae, x = build(Shard(), torch.float64, **options), inputs(torch.float64)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    release(sae, tmp_path / "ours")
    assert all(torch.equal(p, before[name]) for name, p in sae.named_parameters())
    out = sae.training_forward_pass(step_input(sae, x))
    acts = tensors_of(sae, out)["acts"].T

    saelens_sae(torch.float64, **options).save_inference_model(tmp_path / "theirs")
    folders = {"ours": tmp_path / "ours", "theirs": tmp_path / "theirs"}
    for name, folder in folders.items():
        for loaded in (SAE.load_from_disk(folder), sae_lens.SAE.load_from_disk(folder)):
            # Folding the norms rounds each weight once: a few 1e-16 of the activations.
            torch.testing.assert_close(loaded.encode(x), acts, rtol=1e-13, atol=1e-13, msg=name)
            torch.testing.assert_close(loaded(x), out.sae_out.detach(), rtol=1e-13, atol=1e-13, msg=name)
    ours, theirs = (json.loads((folder / "cfg.json").read_text()) for folder in folders.values())
    ours.pop("metadata"), theirs.pop("metadata")
    assert ours == theirs


def test_fold_is_exact_to_the_last_rounding() -> None:
    """In float32 every released number is the float64 fold, rounded once."""
    sae = build(Shard(), torch.float32)
    exact = build(Shard(), torch.float64)
    for name, parameter in exact.named_parameters():
        parameter.data.copy_(sae.get_parameter(name))
    stored, exact_stored = ({n: p.data for n, p in s.named_parameters() if n != "b_dec"} for s in (sae, exact))
    expected = exact.export_rows(exact.cfg, exact_stored)
    for name, tensor in sae.export_rows(sae.cfg, stored).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name].float()), name


def test_released_sae_takes_any_leading_shape_and_another_dtype(tmp_path: Path) -> None:
    release(build(Shard(), torch.float64), tmp_path / "sae")
    sae = SAE.load_from_disk(tmp_path / "sae", dtype=torch.float32)
    assert isinstance(sae, TopKSAE) and sae.cfg.k == K and sae.cfg.metadata == {"sae_lens_version": "6.54.12"}
    assert (sae.W_enc.shape, sae.W_dec.shape, sae.W_dec.dtype) == ((D_IN, D_SAE), (D_SAE, D_IN), torch.float32)
    x = inputs(torch.float64)
    assert torch.equal(sae(x.view(4, 8, D_IN)), sae(x).view(4, 8, D_IN))
    assert torch.equal(sae(x[0]), sae(x[:1])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "topkk"}, r"unknown architecture 'topkk' \(did you mean topk\?\); known are topk"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations 'layer_norm' is not supported"),
        (None, "holds no cfg.json"),
    ],
)
def test_unusable_releases(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    folder = tmp_path / "sae"
    release(build(Shard(), torch.float32), folder)
    cfg = folder / "cfg.json"
    if change is None:
        cfg.unlink()
    else:
        cfg.write_text(json.dumps(json.loads(cfg.read_text()) | change))
    with pytest.raises(UserError, match=message):
        SAE.load_from_disk(folder)


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_have_saelens_s_names_and_defaults() -> None:
    ours = training_config("topk", D_IN, {"d_sae": 128}, "saes.0")
    theirs = sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=128)
    assert all(getattr(ours, field.name) == getattr(theirs, field.name) for field in fields(ours))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"d_sae": 64, "kk": 3},
            r"saes\.2\.kk: not an option of topk \(did you mean k\?\); its options are .*, d_sae, ",
        ),
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
            {"d_sae": 64, "k": 4, "normalize_activations": "layer_norm"},
            r"normalize_activations: 'layer_norm' must be none",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        training_config("topk", D_IN, options, "saes.2")
    assert "\n" not in str(caught.value)


def test_unknown_architecture() -> None:
    with pytest.raises(UserError, match=r"saes\.0\.architecture: unknown architecture 'tokp' \(did you mean topk\?\)"):
        training_config("tokp", D_IN, {"d_sae": 64}, "saes.0")


# ---- another architecture on the same base --------------------------------------------------------------------------


@dataclass
class ReluConfig(TrainingSAEConfig):
    l1_coefficient: float = 0.5

    @classmethod
    def architecture(cls) -> str:
        return "relu_of_a_test"


class ReluSAE(TrainingSAE):
    """A researcher's class: plain autograd on dense local activations, with what mixes latents left to the shard."""

    def __init__(self, cfg: ReluConfig, shard: Shard, device: torch.device | str = "cpu"):
        super().__init__(cfg, shard, device)
        self.b_enc = self.zeros(self.n_local, device=device)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x = step_input.sae_in
        acts = ((x - self.shard.copy(self.b_dec)) @ self.W_enc + self.b_enc).relu()
        sae_out = self.shard.sum(acts @ self.W_dec) + self.b_dec
        l1 = self.shard.sum((acts * self.W_dec.norm(dim=1)).sum(1))
        losses = {
            "mse_loss": mean_over_rows(squared_error(sae_out, x), None),
            "l1_loss": self.cfg.l1_coefficient * l1.mean(),
        }
        l0 = self.shard.all_reduce((acts > 0).sum(1))
        return TrainStepOutput(x, sae_out, sum(losses.values(), x.new_zeros(())), losses, {}, (acts > 0).sum(0), l0)

    @classmethod
    def export_rows(cls, cfg: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"W_enc": rows["W_enc_rows"], "W_dec": rows["W_dec"], "b_enc": rows["b_enc"]}

    @classmethod
    def inference_config(cls, cfg: Any) -> dict[str, Any]:
        return {"architecture": "standard"}


def test_an_architecture_of_plain_tensors_shards_too() -> None:
    register_sae_training_class("relu_of_a_test", ReluSAE, ReluConfig)
    assert training_class("relu_of_a_test") is ReluSAE
    with pytest.raises(UserError, match="already registered"):
        register_sae_training_class("relu_of_a_test", ReluSAE, ReluConfig)
    cfg = training_config("relu_of_a_test", D_IN, {"d_sae": D_SAE, "dtype": "float64"}, "saes.0")

    def run(shard: Shard) -> dict[str, Tensor]:
        sae = create(cfg, shard)
        sae.initialize(0, "mlp")
        out = sae.training_forward_pass(step_input(sae, inputs(torch.float64)))
        out.loss.backward()
        return {name: p.grad for name, p in sae.named_parameters() if p.grad is not None} | {"loss": out.loss.detach()}

    (whole,) = on_shards(1, run)
    parts = on_shards(2, run)
    for name, expected in whole.items():
        per_latent = name in ("W_enc_rows", "W_dec", "b_enc")
        actual = torch.cat([part[name] for part in parts]) if per_latent else parts[0][name]
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13, msg=name)

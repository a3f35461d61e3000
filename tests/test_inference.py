"""Released SAEs: every architecture against SAELens's own, and folders that cannot be used."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from scale_sae.collectives import NonFiniteError
from scale_sae.errors import UserError
from scale_sae.kernels.codes import Codes
from scale_sae.saes import inference
from scale_sae.saes.inference import SAE, SAEConfig, build, register_sae_class, released_architectures, sae_class
from scale_sae.saes.released import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)

sae_lens = pytest.importorskip("sae_lens")
from sae_lens.registry import get_sae_class, get_sae_training_class  # noqa: E402

D_IN, D_SAE, D_OUT, K, ROWS = 12, 40, 10, 5, 23
N_HEADS = 3
HOOK_Z = "blocks.0.attn.hook_z"
# Sums of a few dozen products of size 1, in another order: a few units in the last place.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
NO_TRANSCODERS = ("standard", "gated", "jumprelu", "topk", "abstopk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = NO_TRANSCODERS + TRANSCODERS


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(*leading: int) -> Tensor:
    return draw(*leading, D_IN, seed=7) + 0.3


def randomize(sae: Any) -> Any:
    """Fills a SAELens SAE: biases, decoder rows of norm 0.4 to 2, thresholds that a good part of activations pass."""
    for seed, (name, parameter) in enumerate(sorted(sae.named_parameters())):
        value = draw(*parameter.shape, seed=seed)
        if name == "W_enc":
            value /= D_IN**0.5
        elif name == "W_dec":
            value = F.normalize(value) * torch.linspace(0.4, 2, D_SAE, dtype=torch.float64).roll(17)[:, None]
        elif name == "threshold":
            value = 0.1 + 0.5 * value.abs()
        else:
            value *= 0.3
        parameter.data.copy_(value)
    return sae


def theirs(architecture: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A SAELens SAE of random weights."""
    made, config_class = get_sae_class(architecture)
    if architecture in TRANSCODERS:
        options = {"d_out": D_OUT, "apply_b_dec_to_input": False} | options
    if "topk" in architecture:
        options = {"k": K, "rescale_acts_by_decoder_norm": True} | options
    name = str(dtype).removeprefix("torch.")
    sae = randomize(made(config_class(d_in=D_IN, d_sae=D_SAE, dtype=name, **options)))
    sae.cfg.metadata.hook_name = HOOK_Z
    return sae


def both(tmp_path: Path, architecture: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[SAE, Any]:
    sae = theirs(architecture, dtype, **options)
    sae.save_model(tmp_path)
    return SAE.load_from_disk(tmp_path), sae


def assert_same(ours: SAE, sae: Any, x: Tensor) -> None:
    """Activations, decoding and forward pass. Both forget about ``x`` with a decode, so each check encodes first."""
    expected = sae.encode(x)
    tolerance = TOLERANCE[ours.dtype]
    acts = ours.encode(x)
    fired = (expected != 0).double().mean().item()
    assert 0.02 < fired < 0.9, "a test of activations that are all 0, or never, shows little"
    assert torch.equal(acts != 0, expected != 0)
    torch.testing.assert_close(acts, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours.decode(acts), sae.decode(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ours(x), sae(x), rtol=tolerance, atol=tolerance)


def dense(codes: Codes) -> Tensor:
    acts = torch.zeros(codes.n_rows, codes.n_latents, dtype=codes.values.dtype)
    acts[codes.rows, codes.latents] = codes.values
    return acts


# ---- against SAELens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_equals_saelens(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    ours, sae = both(tmp_path, architecture, dtype)
    assert ours.dtype == dtype and not any(parameter.requires_grad for parameter in ours.parameters())
    assert ours.state_dict().keys() == sae.state_dict().keys()
    for leading in ((ROWS,), (4, 5), ()):
        assert_same(ours, sae, inputs(*leading).to(dtype))


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_normalised_and_shifted_inputs(tmp_path: Path, architecture: str, norm: str) -> None:
    for apply_b_dec in (False,) if architecture in TRANSCODERS else (False, True):
        ours, sae = both(tmp_path, architecture, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec)
        assert_same(ours, sae, 3 * inputs(4, 5))


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", NO_TRANSCODERS)
def test_heads_are_joined_and_parted_again(tmp_path: Path, architecture: str, norm: str) -> None:
    ours, sae = both(tmp_path, architecture, reshape_activations="hook_z", normalize_activations=norm)
    for leading in ((ROWS,), (4, 5), ()):
        x = inputs(*leading).unflatten(-1, (N_HEADS, -1))
        assert_same(ours, sae, x)
        assert ours(x).shape == x.shape
        assert torch.equal(ours(x.flatten(-2)), ours(x).flatten(-2))  # rows that are joined already


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
def test_decoder_norms_in_the_selection(tmp_path: Path, architecture: str, rescale: bool) -> None:
    ours, sae = both(tmp_path, architecture, rescale_acts_by_decoder_norm=rescale)
    x = inputs(ROWS)
    assert_same(ours, sae, x)
    other = theirs(architecture, rescale_acts_by_decoder_norm=not rescale)
    assert not torch.equal(ours.encode(x) != 0, other.encode(x) != 0)
    assert ((ours.encode(x) < 0).any() == (architecture == "abstopk")).item()


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk"])
def test_what_saelens_trained(tmp_path: Path, architecture: str) -> None:
    """Files of save_inference_model: folded, and of another architecture than the trained one where that is so."""
    made, config_class = get_sae_training_class(architecture)
    options = {"k": K} if "topk" in architecture else {}
    sae = randomize(made(config_class(d_in=D_IN, d_sae=D_SAE, dtype="float64", **options)))
    if architecture == "batchtopk":
        sae.topk_threshold.fill_(0.4)
    sae.save_inference_model(tmp_path)
    released = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(SAE.load_from_disk(tmp_path), released, inputs(ROWS))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pre_activations_and_gradients_of_the_input(tmp_path: Path, architecture: str) -> None:
    ours, sae = both(tmp_path, architecture)
    x = inputs(ROWS)
    expected = sae.run_with_cache(x)[1]["hook_sae_acts_pre"]
    torch.testing.assert_close(ours.pre_activations(x), expected, rtol=1e-13, atol=1e-13)
    grads = []
    for model in (ours, sae):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)  # of size 10, as the squares are


def test_configs_have_saelens_s_fields_and_defaults() -> None:
    for architecture in ARCHITECTURES:
        options: dict[str, Any] = {"apply_b_dec_to_input": False} if architecture in TRANSCODERS else {}
        expected = get_sae_class(architecture)[1](d_in=D_IN, d_sae=D_SAE, **options).to_dict()
        cfg = sae_class(architecture)[1](d_in=D_IN, d_sae=D_SAE, **options)
        assert cfg.to_dict() == {**expected, "metadata": {}}
        assert type(cfg).from_dict({**cfg.to_dict(), "of_another_version": 1}) == cfg


# ---- sparse codes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 4, 1000])  # rows at once: alone, with a rest, all
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codes_are_the_dense_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, norm: str, block: int
) -> None:
    monkeypatch.setattr(inference, "_ENCODE_ELEMENTS", block * D_SAE + 1)
    ours, _ = both(tmp_path, architecture, normalize_activations=norm)
    largest = 0
    encode = ours.encode

    def watched(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, len(x))
        return encode(x)

    monkeypatch.setattr(ours, "encode", watched)
    x = inputs(ROWS, 2)
    codes = ours.encode_codes(x)
    assert largest == min(block, 2 * ROWS)
    monkeypatch.undo()
    x_hat = ours.add_skip(ours.decode(dense(codes)), x.flatten(0, 1))  # with the statistics of all rows
    # Blocks of other sizes are multiplied in another order.
    torch.testing.assert_close(dense(codes), ours.encode(x).flatten(0, 1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(x_hat, ours(x).flatten(0, 1), rtol=1e-13, atol=1e-13)
    keys = codes.rows * D_SAE + codes.latents
    assert (keys.diff() > 0).all() and (codes.values != 0).all()


def test_codes_of_heads_of_one_row_and_of_none(tmp_path: Path) -> None:
    ours, _ = both(tmp_path, "topk", reshape_activations="hook_z")
    x = inputs(2, 3).unflatten(-1, (N_HEADS, -1))
    codes = ours.encode_codes(x)
    torch.testing.assert_close(dense(codes), ours.encode(x).flatten(0, 1), rtol=1e-13, atol=1e-13)
    assert ours.encode_codes(x[0, 0]).n_rows == 1
    empty = ours.encode_codes(x[:0])
    assert (empty.n_rows, len(empty.values)) == (0, 0)


def test_ties_go_to_the_lower_latent() -> None:
    tensors = {
        "W_enc": torch.zeros(2, 6),
        "W_dec": torch.zeros(6, 2),
        "b_enc": torch.tensor([1.0, 2, 1, 1, -3, 0]),
        "b_dec": torch.zeros(2),
    }
    cfg = {"d_in": 2, "d_sae": 6, "k": 3}
    acts = build({**cfg, "architecture": "topk"}, tensors, "here").encode(torch.zeros(2))
    assert acts.tolist() == [1, 2, 1, 0, 0, 0]
    acts = build({**cfg, "architecture": "abstopk"}, tensors, "here").encode(torch.zeros(2))
    assert acts.tolist() == [1, 2, 0, 0, -3, 0]


def test_a_nan_is_not_hidden(tmp_path: Path) -> None:
    x = inputs(3)
    x[1, 2] = torch.nan
    for architecture in ("standard", "gated", "jumprelu"):
        ours, sae = both(tmp_path, architecture)
        assert ours(x).isnan().any(-1).tolist() == sae(x).isnan().any(-1).tolist() == [False, True, False]
    with pytest.raises(NonFiniteError):
        both(tmp_path, "topk")[0](x)


# ---- a class of one's own -------------------------------------------------------------------------------------------


@dataclass
class GeluSAEConfig(StandardSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "gelu_of_a_test"


class GeluSAE(StandardSAE):
    cfg: GeluSAEConfig

    def __init__(self, cfg: GeluSAEConfig):
        super().__init__(cfg)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        return torch.nn.GELU()


def test_the_gelu_sae_of_saelens_s_guide(tmp_path: Path) -> None:
    register_sae_class("gelu_of_a_test", GeluSAE, GeluSAEConfig)
    register_sae_class("gelu_of_a_test", GeluSAE, GeluSAEConfig)  # as when its module is imported again
    assert sae_class("gelu_of_a_test") == (GeluSAE, GeluSAEConfig)
    assert "gelu_of_a_test" in released_architectures()
    with pytest.raises(UserError, match="'gelu_of_a_test' is already registered; register the class under another"):
        register_sae_class("gelu_of_a_test", StandardSAE, GeluSAEConfig)

    sae = theirs("standard")
    sae.save_model(tmp_path)
    change_cfg(tmp_path, architecture="gelu_of_a_test")
    ours = SAE.load_from_disk(tmp_path)
    assert isinstance(ours, GeluSAE) and isinstance(ours.cfg, GeluSAEConfig)
    x = inputs(ROWS)
    expected = F.gelu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(ours.encode(x), expected.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours(x), (expected @ sae.W_dec + sae.b_dec).detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dense(ours.encode_codes(x)), expected.detach(), rtol=1e-13, atol=1e-13)


def test_an_empty_sae_starts_with_zeros() -> None:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="bfloat16"))
    assert {name: list(p.shape) for name, p in sae.named_parameters()} == {
        "W_enc": [D_IN, D_SAE],
        "W_dec": [D_SAE, D_IN],
        "b_enc": [D_SAE],
        "b_dec": [D_IN],
        "threshold": [D_SAE],
    }
    assert not any(p.any() for p in sae.parameters()) and sae.dtype == torch.bfloat16
    assert sae.device == torch.device("cpu")


# ---- building and loading -------------------------------------------------------------------------------------------


def change_cfg(folder: Path, **changes: Any) -> None:
    """Changes fields of a cfg.json; those that become None go."""
    cfg = json.loads((folder / "cfg.json").read_text()) | changes
    (folder / "cfg.json").write_text(json.dumps({name: value for name, value in cfg.items() if value is not None}))


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "sae_weights.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def test_build_shares_the_given_tensors() -> None:
    sae = theirs("jumprelu", torch.float32)
    tensors = dict(sae.named_parameters()) | {"threshold": sae.threshold.double()}
    ours = build({**sae.cfg.to_dict(), "dtype": "bfloat16", "device": "cuda"}, tensors, "here")
    for name, tensor in ours.state_dict().items():
        assert (tensor.data_ptr(), tensor.dtype) == (tensors[name].data_ptr(), tensors[name].dtype)
    assert sae.W_enc.requires_grad and not ours.W_enc.requires_grad
    assert (ours.cfg.dtype, ours.cfg.device) == ("float32", "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16", "torch.bfloat16", torch.float16], ids=repr)
def test_thresholds_stay_wide(tmp_path: Path, dtype: torch.dtype | str) -> None:
    sae = theirs("jumprelu", torch.float32)
    sae.save_model(tmp_path)
    ours = SAE.load_from_disk(tmp_path, dtype=dtype)
    narrow = ours.dtype
    assert narrow.itemsize == 2 and str(narrow).endswith(str(dtype).removeprefix("torch."))
    assert ours.cfg.dtype == str(narrow).removeprefix("torch.")
    for name, tensor in ours.state_dict().items():
        expected = sae.get_parameter(name).data
        assert torch.equal(tensor, expected if name == "threshold" else expected.to(narrow)), name
    assert not torch.equal(ours.state_dict()["threshold"].to(narrow).float(), sae.threshold)
    assert ours(inputs(ROWS)).dtype == narrow
    assert SAE.load_from_disk(tmp_path, dtype=torch.float64).state_dict()["threshold"].dtype == torch.float64


def test_metadata_is_kept_and_the_device_of_training_is_not(tmp_path: Path) -> None:
    theirs("topk").save_model(tmp_path)
    change_cfg(tmp_path, device="cuda:3", metadata={"hook_name": HOOK_Z, "sae_lens_version": "6.54.12", "l0": 3.5})
    ours = SAE.load_from_disk(str(tmp_path))
    assert isinstance(ours, TopKSAE) and isinstance(ours.cfg, TopKSAEConfig)
    assert ours.cfg.metadata == {"hook_name": HOOK_Z, "sae_lens_version": "6.54.12", "l0": 3.5}
    assert (ours.cfg.k, ours.cfg.device, ours.device) == (K, "cpu", torch.device("cpu"))


def test_a_factor_that_was_not_folded_is_left_out_as_in_saelens(tmp_path: Path) -> None:
    sae = theirs("standard", normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    with pytest.warns(UserWarning, match=r"expected_average_only_in, but its factor is not folded"):
        ours = SAE.load_from_disk(tmp_path)
    assert_same(ours, sae, inputs(ROWS))


def test_a_normalisation_that_old_files_only_call_true(tmp_path: Path) -> None:
    theirs("standard").save_model(tmp_path)
    cfg = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float64", "normalize_activations": True}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.warns(UserWarning, match="its factor is not folded"):
        ours = SAE.load_from_disk(tmp_path)
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path), inputs(ROWS))


def test_old_tensors(tmp_path: Path) -> None:
    sae = theirs("jumprelu")
    sae.save_model(tmp_path)
    ones = torch.ones(D_SAE, dtype=torch.float64)
    change_tensors(tmp_path, threshold=None, log_threshold=sae.threshold.detach().log(), scaling_factor=ones)
    assert_same(SAE.load_from_disk(tmp_path), sae, inputs(ROWS))
    change_tensors(tmp_path, scaling_factor=2 * ones)
    with pytest.raises(UserError, match="holds a scaling_factor other than 1"):
        SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
        {"activation_fn_str": "relu", "activation_fn_kwargs": {}, "architecture": "standard"},
        {"hook_point": "blocks.1.attn.hook_z"},
        {"normalize_activations": False, "apply_b_dec_to_input": False},
    ],
    ids=str,
)
def test_files_of_before_version_6(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Flat, with other names, and with defaults for what had no name yet."""
    theirs("standard").save_model(tmp_path)
    cfg = {"hook_name": "blocks.1.hook_resid_pre", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float64", "lr": 3e-4}
    cfg |= fields
    if "hook_point" in fields:
        del cfg["hook_name"]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    ours, sae = SAE.load_from_disk(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    assert ours.cfg.architecture() == sae.cfg.architecture()
    assert ours.cfg.metadata == {"hook_name": sae.cfg.metadata.hook_name}
    x = inputs(ROWS)
    assert_same(ours, sae, x.unflatten(-1, (N_HEADS, -1)) if "hook_point" in fields else x)


def no_cfg(folder: Path) -> None:
    (folder / "cfg.json").unlink()


def no_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_cfg(folder: Path) -> None:
    (folder / "cfg.json").write_text('{"architecture": ')


def list_cfg(folder: Path) -> None:
    (folder / "cfg.json").write_text("[1]")


def cfg(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_cfg(folder, **changes)


def tensors(**changes: Tensor | None) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder, **changes)


@pytest.mark.parametrize(
    ("architecture", "harm", "message"),
    [
        ("topk", no_cfg, "holds no cfg.json; give the folder of one SAE"),
        ("topk", no_weights, "holds no sae_weights.safetensors; give the folder of one SAE"),
        ("topk", cut_weights, "sae_weights.safetensors: is not a whole safetensors file"),
        ("topk", cut_cfg, "cfg.json: is not JSON"),
        ("topk", list_cfg, "cfg.json: must hold an object with the SAE's fields, not list"),
        (
            "topk",
            cfg(architecture="topkk"),
            r"unknown architecture 'topkk' \(did you mean topk.*\?\); known are abstopk, .*; "
            "a class of your own must be registered with register_sae_class first",
        ),
        ("topk", cfg(architecture=3), "unknown architecture 3; known are "),
        ("topk", cfg(d_in=None), "d_in: missing; an SAE of architecture topk needs it"),
        ("topk", cfg(d_sae="40"), "d_sae: '40' must be an integer of at least 1"),
        ("topk", cfg(k=0), "k: 0 must be an integer of at least 1"),
        ("topk", cfg(dtype="float33"), r"dtype: 'float33' must be float32 or .*\(did you mean float32"),
        ("topk", cfg(normalize_activations="covariance_whitening"), "normalize_activations: 'covariance_whitening' is"),
        ("topk", cfg(reshape_activations="hook_y"), "reshape_activations: 'hook_y' is not supported; it must be none"),
        ("topk", cfg(d_sae=41), r"tensor W_enc has shape \[12, 40\], but by cfg.json \[12, 41\]"),
        ("topk", cfg(d_sae=10**12), r"tensor W_enc has shape"),  # and no memory is taken for it
        ("topk", tensors(b_enc=None), "tensors b_enc are missing; topk needs W_enc, W_dec, b_dec, b_enc"),
        ("topk", tensors(threshold=torch.ones(D_SAE)), "tensors threshold are unknown; topk has W_enc, W_dec, b_dec,"),
        ("topk", cfg(architecture="gated"), "tensors b_gate, b_mag, r_mag are missing; gated needs "),
        ("transcoder", cfg(apply_b_dec_to_input=True), "apply_b_dec_to_input: must be false for a transcoder"),
        ("transcoder", cfg(d_out=0), "d_out: 0 must be an integer of at least 1"),
        ("skip_transcoder", tensors(W_skip=torch.ones(D_IN, D_OUT)), r"tensor W_skip has shape \[12, 10\], but by "),
    ],
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, architecture: str, harm: Callable[[Path], None], message: str
) -> None:
    theirs(architecture).save_model(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        SAE.load_from_disk(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


def test_no_pickle_is_ever_read(tmp_path: Path) -> None:
    sae = theirs("topk")
    sae.save_model(tmp_path)
    for name in ("pytorch_model.bin", "ae.pt", "sae_weights.pt", "sparsity.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    assert_same(SAE.load_from_disk(tmp_path), sae, inputs(ROWS))
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes((tmp_path / "ae.pt").read_bytes())
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        SAE.load_from_disk(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"holds no sae_weights\.safetensors"):
        SAE.load_from_disk(tmp_path)
    assert not (tmp_path / "mark").exists()
    pickle.loads((tmp_path / "ae.pt").read_bytes())
    assert (tmp_path / "mark").exists()  # so the trap works


def test_a_config_without_an_architecture_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        SAEConfig(d_in=1, d_sae=1)  # type: ignore[abstract]

"""Splicing against SAELens, against evaluation, and against SAEs whose effect is known beforehand."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.saes.sae import SAE as SAELensSAE
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import runs
from scale_sae import evaluate
from scale_sae.activations.tokens import held_out_contexts
from scale_sae.config import from_dict, to_dict
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError
from scale_sae.saes.inference import SAE, build
from scale_sae.splice import _substitute, splice

D_IN, D_SAE = 256, 64
BOS, PAD = 0, 2
IDS = torch.tensor([[BOS, *range(40, 59)], [BOS, *range(60, 70), BOS, *range(80, 88)]])


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=dtype).eval()


@pytest.fixture
def model() -> Any:
    return load_model()


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer()


def write_sae(
    folder: Path, architecture: str = "standard", seed: int = 0, metadata: dict[str, Any] | None = None, **cfg: Any
) -> Path:
    """A random SAE of any architecture; its decoder is small, so that the model goes on to compute something usual."""
    generator = torch.Generator().manual_seed(seed)
    transcoder = "transcoder" in architecture
    tensors = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator) / 16,
        "W_dec": torch.randn(D_SAE, D_IN, generator=generator) / 16,
        "b_enc": torch.randn(D_SAE, generator=generator) / 16,
        "b_dec": torch.randn(D_IN, generator=generator) / 16,
        **({"threshold": torch.full((D_SAE,), 0.1)} if "jumprelu" in architecture else {}),
        **({"W_skip": torch.randn(D_IN, D_IN, generator=generator) / 16} if "skip" in architecture else {}),
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    about = {"sae_lens_version": "6.54.12", "hook_name": "blocks.1.hook_resid_post", **(metadata or {})}
    shape = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": not transcoder}
    shape |= {"d_out": D_IN} if transcoder else {}
    written = {"architecture": architecture, "dtype": "float32", **shape, "metadata": about, **cfg}
    (folder / "cfg.json").write_text(json.dumps(written))
    return folder


def exact_sae(hookpoint: str = "model.layers.1", **metadata: Any) -> SAE:
    """x = relu(x) - relu(-x), of which every row comes back as it was."""
    eye = torch.eye(D_IN)
    tensors = {
        "W_enc": torch.cat([eye, -eye], 1),
        "W_dec": torch.cat([eye, -eye]),
        "b_enc": torch.zeros(2 * D_IN),
        "b_dec": torch.zeros(D_IN),
    }
    about = {"hf_hook_name": hookpoint, **metadata}
    cfg = {"architecture": "standard", "d_in": D_IN, "d_sae": 2 * D_IN, "metadata": about}
    return build(cfg, tensors, "exact")


def logits_of(model: Any, ids: Tensor = IDS) -> Tensor:
    logits: Tensor = model(ids).logits
    return logits


@cache
def load_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


def logits_of_clean(ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return logits_of(load_model(), ids)


# What SAELens and we splice in together: SAEs of several kinds at several places, and a transcoder.
TOGETHER: list[dict[str, Any]] = [
    {"architecture": "topk", "k": 5, "metadata": {"hook_name": "blocks.0.hook_resid_post"}},
    {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.1.attn.hook_z"}, "reshape_activations": "hook_z"},
    {"architecture": "standard", "metadata": {"hook_name": "blocks.2.hook_attn_out"}},
    {
        "architecture": "transcoder",  # SAELens leaves out the skip of one that has it
        "metadata": {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"},
    },
    {"architecture": "standard", "normalize_activations": "layer_norm"}
    | {"metadata": {"hook_name": "blocks.3.hook_resid_pre"}},
]


class TestAgainstSAELens:
    """The same release in both: logits, feature activations, and gradients with regard to them."""

    @pytest.mark.parametrize("use_error_term", [False, True])
    @pytest.mark.parametrize("which", [[0], [1], [3], [4], [0, 1, 2, 3]])
    def test_same_logits_and_gradients(
        self, which: list[int], use_error_term: bool, model: Any, tokenizer: Any, tmp_path: Path
    ) -> None:
        folders = [write_sae(tmp_path / str(n), seed=n, **TOGETHER[n]) for n in which]
        bridge = SAETransformerBridge.boot_transformers(
            "embedded", hf_model=copy.deepcopy(model), tokenizer=tokenizer, device="cpu"
        )
        theirs = [SAELensSAE.load_from_disk(folder) for folder in folders]
        for sae in theirs:
            bridge.add_sae(sae, use_error_term=use_error_term)
        acts: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> Tensor:
            acts[hook.name] = value
            return value

        names = [bridge.get_sae_hook_name(sae) for sae in theirs]
        wanted = bridge.run_with_hooks(IDS, fwd_hooks=[(name, keep) for name in names])
        wanted_gradients = torch.autograd.grad(wanted.square().mean(), [acts[name] for name in names])

        with splice(model, [SAE.load_from_disk(folder) for folder in folders], use_error_term) as spliced:
            found = logits_of(model)
        hook_names = [sae.cfg.metadata.hook_name for sae in theirs]
        ours = [spliced.feature_acts[name] for name in hook_names]
        gradients = torch.autograd.grad(found.square().mean(), ours)
        # float32 through two to four layers, in another order of sums; the logits are up to 20.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        for name, act, gradient, wanted_gradient in zip(names, ours, gradients, wanted_gradients, strict=True):
            torch.testing.assert_close(act, acts[name], rtol=1e-4, atol=1e-4)
            scale = float(wanted_gradient.abs().max())
            assert scale > 0
            torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_skip_transcoder_reads_its_input_and_replaces_its_target(model: Any, tmp_path: Path) -> None:
    about = {"hf_hook_name": "model.layers.1.mlp:in", "hf_hook_name_out": "model.layers.1.mlp"}
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", "skip_transcoder", metadata=about))
    seen: dict[str, Tensor] = {}
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    with torch.no_grad(), splice(model, sae) as spliced:
        found = logits_of(model)
    handle.remove()
    handle = mlp.register_forward_hook(lambda module, args, output: sae(args[0]))
    with torch.no_grad():
        wanted = logits_of(model)
    handle.remove()
    assert torch.equal(found, wanted)
    assert torch.equal(spliced.feature_acts["model.layers.1.mlp:in"], sae.encode(seen["x"]))
    with torch.no_grad(), splice(model, sae, use_error_term=True):
        # The logits are up to 20; the sum of reconstruction and error is rounded once more.
        torch.testing.assert_close(logits_of(model), logits_of_clean(), rtol=0, atol=1e-5)


def test_an_exact_sae_changes_nothing_and_leaves_nothing_behind(model: Any) -> None:
    clean = logits_of_clean()
    with torch.no_grad(), splice(model, exact_sae()) as spliced:
        assert torch.equal(logits_of(model), clean)  # relu(x) - relu(-x) is not even rounded
        zeros = exact_sae()
        zeros.W_dec.zero_()
    assert spliced.feature_acts["model.layers.1"].shape == (2, 20, 2 * D_IN)
    with torch.no_grad(), splice(model, {"blocks.1.hook_resid_post": zeros}) as other:
        assert (logits_of(model) - clean).abs().max() > 1
    assert list(other.feature_acts) == ["model.layers.1"]
    with torch.no_grad():
        assert torch.equal(logits_of(model), clean)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_an_exception_inside_takes_the_saes_out(model: Any) -> None:
    with pytest.raises(ZeroDivisionError), splice(model, exact_sae(), tokenizer=load_tokenizer()):
        raise ZeroDivisionError
    with pytest.raises(UserError, match="there are none: no forward"), splice(model, exact_sae()) as spliced:
        spliced.feature_acts["model.layers.1"]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_codes_are_the_entries_that_are_not_zero(model: Any, tmp_path: Path) -> None:
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", "topk", k=5))
    with splice(model, [sae]) as spliced:
        logits_of(model)
    codes = spliced.codes("blocks.1.hook_resid_post")
    dense = torch.zeros(codes.n_rows, codes.n_latents)
    dense[codes.rows, codes.latents] = codes.values
    assert torch.equal(dense.view(2, 20, D_SAE), spliced.feature_acts["model.layers.1"])
    assert 0 < len(codes.values) <= 5 * 40 and not codes.values.requires_grad


class TestPositions:
    """Positions that training left out pass through unchanged, given the tokenizer."""

    def test_special_tokens(self, model: Any, tokenizer: Any, tmp_path: Path) -> None:
        for exclude, ids in ((True, [BOS]), ([45, 61], [45, 61]), (False, [])):
            about = {"exclude_special_tokens": exclude}
            sae = SAE.load_from_disk(write_sae(tmp_path / str(exclude), metadata=about))
            outputs: list[Tensor] = []
            with torch.no_grad(), splice(model, sae, tokenizer=tokenizer) as spliced:
                after = model.model.layers[2]
                handle = after.register_forward_pre_hook(lambda m, args, seen=outputs: seen.append(args[0]))
                logits_of(model)
                handle.remove()
            left_out = torch.isin(IDS, torch.tensor(ids))
            assert torch.equal(spliced.feature_acts["model.layers.1"].abs().sum(-1) == 0, left_out)
            with torch.no_grad():
                unspliced = model(IDS, output_hidden_states=True).hidden_states[2]
            assert torch.equal((outputs[0] == unspliced).all(-1), left_out)
            # Without the tokenizer every position is replaced.
            with torch.no_grad(), splice(model, sae) as spliced:
                logits_of(model)
            assert (spliced.feature_acts["model.layers.1"].abs().sum(-1) > 0).all()

    def test_slices_of_positions_also_with_a_cache(self, model: Any, tokenizer: Any, tmp_path: Path) -> None:
        about = {"exclude_special_tokens": False, "seqpos_slice": [3, None]}
        sae = SAE.load_from_disk(write_sae(tmp_path / "sae", metadata=about))
        with torch.no_grad(), splice(model, sae, tokenizer=tokenizer) as spliced:
            whole = logits_of(model)
            acts = spliced.feature_acts["model.layers.1"]
            assert acts[:, :3].abs().sum() == 0 and (acts[:, 3:].abs().sum(-1) > 0).all()
            first = model(IDS[:, :2], use_cache=True)
            rest = model(IDS[:, 2:], past_key_values=first.past_key_values)
            # The same sums over a cache: float32 rounding of logits up to 20.
            torch.testing.assert_close(rest.logits, whole[:, 2:], rtol=1e-4, atol=1e-4)
            generated = model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
            assert torch.equal(generated[0, 20:21], whole[0, -1].argmax()[None])

    def test_rows_of_which_none_is_kept(self, model: Any, tokenizer: Any, tmp_path: Path) -> None:
        about = {"exclude_special_tokens": True}
        for architecture, cfg in (("standard", {}), ("topk", {"k": 3}), ("jumprelu", {})):
            sae = SAE.load_from_disk(write_sae(tmp_path / architecture, architecture, metadata=about, **cfg))
            ids = torch.full((1, 4), PAD)
            with torch.no_grad(), splice(model, sae, tokenizer=tokenizer):
                assert torch.equal(logits_of(model, ids), logits_of_clean(ids))

    def test_the_model_itself_must_be_called_with_tokens(self, model: Any, tokenizer: Any) -> None:
        with splice(model, exact_sae(exclude_special_tokens=True), tokenizer=tokenizer):
            logits_of(model)  # its tokens are not those of what follows
            for call in (lambda: model.model(IDS), lambda: model(inputs_embeds=torch.zeros(1, 3, D_IN))):
                with pytest.raises(UserError, match="tokenizer: given, so the model itself must be called"):
                    call()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("left_out", [False, True])
def test_gradients_with_regard_to_feature_acts(
    left_out: bool, trainable: bool, model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    model.requires_grad_(trainable)
    about = {"exclude_special_tokens": True}
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", metadata=about))
    with splice(model, sae, tokenizer=tokenizer if left_out else None) as spliced:
        loss = logits_of(model).square().mean()
        (gradient,) = torch.autograd.grad(loss, [spliced.feature_acts["model.layers.1"]])
    assert gradient.shape == (2, 20, D_SAE)
    # A position that passes through has none.
    assert torch.equal(gradient.abs().amax(-1) > 0, (IDS != BOS) | torch.tensor(not left_out))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_model_and_sae_on_different_devices(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = write_sae(tmp_path / "sae", metadata={"exclude_special_tokens": True})
    for chosen in (None, tokenizer):
        with torch.no_grad(), splice(model, SAE.load_from_disk(folder), tokenizer=chosen):
            wanted = logits_of(model)
        with torch.no_grad(), splice(model, SAE.load_from_disk(folder, "cuda"), tokenizer=chosen) as spliced:
            torch.testing.assert_close(logits_of(model), wanted, rtol=1e-4, atol=1e-4)  # sums in another order
        assert spliced.feature_acts["model.layers.1"].device.type == "cuda"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_input_and_target_on_different_devices(device: str, tmp_path: Path) -> None:
    """As those of a transcoder may be where the model's layers are spread."""
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", "skip_transcoder"), device)
    x, y = torch.randn(2, 2, 5, D_IN, generator=torch.Generator().manual_seed(0))
    keep = torch.arange(10).reshape(2, 5) % 3 > 0
    wanted = _substitute(sae.to("cpu"), x, y, keep, False)
    found = _substitute(sae.to(device), x.to("cuda"), y, keep.to("cuda"), False)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-4)  # sums in another order
    assert (found[0].device.type, found[1].device.type) == (device, "cpu")


@pytest.mark.parametrize("use_error_term", [False, True])
def test_model_and_sae_of_different_dtypes(use_error_term: bool, tmp_path: Path) -> None:
    model = load_model(torch.bfloat16)
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae"))
    with torch.no_grad(), splice(model, sae, use_error_term) as spliced:
        found = logits_of(model)
    assert found.dtype == torch.bfloat16
    assert spliced.feature_acts["model.layers.1"].dtype == torch.float32
    with torch.no_grad():
        # The error is a float32: what it adds up to rounds to the very bfloat16 that it came from.
        assert torch.equal(found, logits_of(model)) == use_error_term


def test_outputs_that_are_tuples_and_inputs(model: Any) -> None:
    clean = logits_of_clean()
    for hookpoint in ("model.layers.2.self_attn", "model.layers.2.self_attn.o_proj:in", "model.layers.2:in"):
        with torch.no_grad(), splice(model, exact_sae(hookpoint)) as spliced:
            assert torch.equal(logits_of(model), clean)
        assert list(spliced.feature_acts) == [hookpoint]


class TestErrors:
    def check(self, words: str, model: Any, saes: Any) -> None:
        with pytest.raises(UserError, match=words) as error, splice(model, saes):
            logits_of(model)
        assert "\n" not in str(error.value)
        with torch.no_grad():
            assert torch.equal(logits_of(model), logits_of_clean())

    def test_one_line_for_each(self, model: Any, tmp_path: Path) -> None:
        self.check(r"saes\.0: hook_name: no module .*did you mean model.layers.1", model, exact_sae("model.layer.1"))
        self.check(
            r"saes\.blocks\.7\.hook_resid_post: .*layers 0 to 3", model, {"blocks.7.hook_resid_post": exact_sae()}
        )
        elsewhere = exact_sae(hook_name="blocks.1.hook_resid_post")  # is no answer to a name that was given
        self.check(r"saes\.model\.layer\.1: .*did you mean model.layers.1", model, {"model.layer.1": elsewhere})
        self.check(r"saes\.0: Linear is no released SAE", model, [torch.nn.Linear(2, 2)])
        self.check("another SAE is at model.layers.1 already", model, [exact_sae(), exact_sae()])
        self.check(
            "model.layers.1.mlp.up_proj has width 640 .* for 256", model, exact_sae("model.layers.1.mlp.up_proj")
        )
        backwards = {"hf_hook_name": "model.layers.2", "hf_hook_name_out": "model.layers.1"}
        sae = SAE.load_from_disk(write_sae(tmp_path / "sae", "transcoder", metadata=backwards))
        self.check("a forward reaches its target model.layers.1 before its input", model, sae)

    def test_nested_contexts(self, model: Any) -> None:
        clean = logits_of_clean()
        with torch.no_grad(), splice(model, exact_sae("model.layers.1")) as outer:
            with splice(model, exact_sae("model.layers.2")) as inner:
                assert torch.equal(logits_of(model), clean)
            with pytest.raises(UserError, match=r"an SAE is spliced in at model.layers.1 already; leave"):
                splice(model, exact_sae("model.layers.1")).__enter__()
            outer.feature_acts.clear()
            logits_of(model)
            assert list(outer.feature_acts) == ["model.layers.1"]
        assert list(inner.feature_acts) == ["model.layers.2"]
        with splice(model, exact_sae("model.layers.1")):
            pass


def test_cross_entropy_is_that_of_evaluate(tmp_path: Path) -> None:
    """The same held-out contexts through both: excluded positions pass through, the loss counts all predictions."""
    config = from_dict(runs.tiny_config(tmp_path, model={"name": "embedded"}))
    release = tmp_path / "release"
    folders = []
    for layer in (1, 3):
        name = f"model.layers.{layer}"
        about = {"hook_name": name, "exclude_special_tokens": True, "seqpos_slice": [None]}
        folders.append(write_sae(release / name, "topk", metadata=about, k=16))
        (folders[-1] / "runner_cfg.json").write_text(json.dumps(to_dict(config)))
    evaluate.main(str(release), tokens=1024)
    alone, other, together = (
        json.loads((folder / "eval.json").read_text())["model_performance_preservation"]
        for folder in (*folders, release)
    )
    contexts = list(held_out_contexts(config.data, config.model))[: 1024 // config.data.context_size]
    ids = torch.stack([tokens for tokens, _ in contexts])
    model, tokenizer = load_model(), load_tokenizer()
    saes = [SAE.load_from_disk(folder) for folder in folders]

    def loss() -> float:
        with torch.no_grad():
            return float(F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))

    # Means of some 1000 float32 losses in batches of another size.
    assert loss() == pytest.approx(alone["ce_loss_without_sae"], rel=1e-5)
    with splice(model, saes[0], tokenizer=tokenizer):
        assert loss() == pytest.approx(alone["ce_loss_with_sae"], rel=1e-5)
    with splice(model, saes, tokenizer=tokenizer):
        assert loss() == pytest.approx(together["ce_loss_with_sae"], rel=1e-5)
    # The three differ by far more than they agree to, so none stands for another.
    for one in (alone, other):
        assert together["ce_loss_with_sae"] != pytest.approx(one["ce_loss_with_sae"], rel=1e-4)
    with splice(model, saes[0]):
        assert loss() != pytest.approx(alone["ce_loss_with_sae"], rel=1e-4)

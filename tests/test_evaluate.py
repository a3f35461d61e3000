"""Evaluation against direct formulas, and against SAEs whose figures are known beforehand."""

import json
import math
import os
import shutil
import signal
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import runs
from scale_sae import evaluate, held_out, reconstruction
from scale_sae.activations.source import ActivationSource, inspect_model
from scale_sae.config import ModelConfig, from_dict, to_dict
from scale_sae.consolidate import consolidate
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError
from scale_sae.held_out import Batch, HeldOutModel, batches
from scale_sae.reconstruction import Reconstruction, Sums
from scale_sae.saes.inference import SAE
from scale_sae.saes.released import TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig
from scale_sae.session import run_command

D_IN = 256


def write_sae(
    folder: Path,
    run: dict[str, Any],
    tensors: dict[str, Tensor],
    architecture: str = "topk",
    hooks: tuple[str, ...] = ("model.layers.1",),
    **fields: Any,
) -> Path:
    folder.mkdir(parents=True)
    d_in, d_sae = tensors["W_enc"].shape
    metadata = dict(zip(("hook_name", "hook_name_out"), hooks, strict=False))
    cfg = {"architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float32", **fields}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "metadata": metadata}))
    (folder / "runner_cfg.json").write_text(json.dumps(run))
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def identity_sae() -> dict[str, Tensor]:
    """x = relu(x) - relu(-x): exact where k covers every input dimension."""
    eye = torch.eye(D_IN)
    return {
        "W_enc": torch.cat([eye, -eye], 1).contiguous(),
        "W_dec": torch.cat([eye, -eye]),
        "b_enc": torch.zeros(2 * D_IN),
        "b_dec": torch.zeros(D_IN),
    }


@pytest.fixture
def run_config(tmp_path: Path) -> dict[str, Any]:
    return to_dict(from_dict(runs.tiny_config(tmp_path, model={"name": "embedded"})))


def test_an_exact_sae_loses_nothing_and_a_zero_sae_everything(tmp_path: Path, run_config: dict[str, Any]) -> None:
    release = tmp_path / "release"
    exact = identity_sae()
    write_sae(release / "exact", run_config, exact, k=D_IN)
    write_sae(release / "zero", run_config, {**exact, "W_dec": torch.zeros(2 * D_IN, D_IN)}, k=D_IN)
    evaluate.run(release, (), None, 2048, {})
    figures = {name: json.loads((release / name / "eval.json").read_text()) for name in ("exact", "zero")}
    good = figures["exact"]["model_performance_preservation"]
    # The same numbers come back through other arithmetic: float32 rounding through two layers.
    assert good["ce_loss_with_sae"] == pytest.approx(good["ce_loss_without_sae"], rel=1e-5)
    assert good["ce_loss_score"] == pytest.approx(1, abs=1e-4)
    assert figures["exact"]["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-9)
    assert figures["exact"]["reconstruction_quality"]["cossim"] == pytest.approx(1)
    assert figures["exact"]["shrinkage"]["l2_ratio"] == pytest.approx(1)
    assert figures["exact"]["sparsity"]["l0"] == D_IN  # of every pair, the one of the right sign
    bad = figures["zero"]["model_performance_preservation"]
    assert bad["ce_loss_with_sae"] == bad["ce_loss_with_ablation"] > bad["ce_loss_without_sae"] + 0.5
    assert bad["ce_loss_score"] == 0
    # BOS is no row: 2048 tokens in contexts of 32 keep at most 31 each.
    assert figures["zero"]["token_stats"]["total_tokens_eval_reconstruction"] <= 2048 // 32 * 31


def test_figures_equal_their_formulas(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    d_in, d_sae, k = 12, 40, 3
    tensors = {
        "W_enc": torch.randn(d_in, d_sae, generator=generator),
        "W_dec": torch.randn(d_sae, d_in, generator=generator) * 0.2,
        "b_enc": torch.randn(d_sae, generator=generator) - 1,
        "b_dec": torch.randn(d_in, generator=generator),
    }
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", {}, tensors, k=k), dtype=torch.float64)
    x = (
        torch.randn(500, d_in, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 13)).double()
        + 3
    )
    sums = Reconstruction(sae)
    for part in x.split(130):
        sums.add(part, part)
    figures = sums.sums.figures()
    acts = sae.encode(x)
    x_hat = sae.decode(acts)
    quality, sparsity = figures["reconstruction_quality"], figures["sparsity"]
    residual, centred = (x - x_hat).square().sum(), x - x.mean(0)
    # float64 sums in another order: 1e-9 is far above their rounding and far below any wrong formula.
    assert quality["explained_variance"] == pytest.approx(float(1 - residual / centred.square().sum()), rel=1e-9)
    assert quality["mse"] == pytest.approx(float(residual / 500), rel=1e-9)
    singular = torch.linalg.svdvals(centred)
    assert quality["pca_fvu"] == pytest.approx(float(singular[k:].square().sum() / singular.square().sum()), rel=1e-9)
    active = acts > 0
    assert sparsity["l0"] == pytest.approx(float(active.sum(1).double().mean()))
    assert sparsity["l0_max"] == int(active.sum(1).max()) <= k
    assert sparsity["dead_fraction"] == pytest.approx(float((~active.any(0)).double().mean()))
    assert figures["shrinkage"]["relative_reconstruction_bias"] == pytest.approx(
        float(x_hat.square().sum() / (x * x_hat).sum()), rel=1e-9
    )


def test_held_out_text_never_enters_the_stream(tmp_path: Path, run_config: dict[str, Any]) -> None:
    from scale_sae.activations.tokens import open_chunks

    config = from_dict(run_config)
    # Whole documents are held out, so a held-out context as it stands would be found in the stream.
    trained = {row.numpy().tobytes() for chunk in open_chunks(config.data, config.model) for row in chunk.tokens}
    held_out = {row.numpy().tobytes() for batch in evaluate.batches(config, 10**9) for row in batch.tokens}
    assert len(held_out) > 10
    assert not trained & held_out


@pytest.mark.parametrize(
    ("release", "extra", "options", "words"),
    [
        ("nowhere", (), {}, "holds no released SAE"),
        ("release", (), {"sae_id": "exat"}, "did you mean exact"),
        ("release", ("more",), {}, "more: no argument of evaluate"),
        ("release", (), {"tokens": 0}, "--tokens: 0 must be a positive integer"),
        ("release", (), {"toknes": 5}, "--toknes: no argument of evaluate"),
    ],
)
def test_bad_arguments(
    release: str,
    extra: tuple[str, ...],
    options: dict[str, Any],
    words: str,
    tmp_path: Path,
    run_config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(str(tmp_path / release), *extra, **options)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1


def test_a_release_without_its_run_s_config_is_refused(
    tmp_path: Path, run_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    theirs = write_sae(tmp_path / "release/theirs", run_config, identity_sae(), k=D_IN)
    (theirs / "runner_cfg.json").unlink()
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(str(tmp_path / "release"), tokens=512)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {theirs}: has no runner_cfg.json; ") and error.count("\n") == 1
    assert "config of the SAE's run" in error and "releases of scale_sae" in error


def test_a_release_cannot_consent_to_code_of_others(tmp_path: Path, run_config: dict[str, Any]) -> None:
    run_config["model"]["trust_remote_code"] = True
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(UserError, match="--trust_remote_code: the release asks to run code"):
        evaluate.run(tmp_path / "release", (), None, 512, {})


# A TopK SAE finds NaN when it selects; a standard one computes with it to the end.
@pytest.mark.parametrize(("architecture", "fields"), [("topk", {"k": D_IN}), ("standard", {})])
def test_one_broken_sae_does_not_hide_the_others(
    architecture: str,
    fields: dict[str, Any],
    tmp_path: Path,
    run_config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = identity_sae()
    broken["W_enc"][0, 0] = torch.inf
    write_sae(tmp_path / "release/broken", run_config, broken, architecture, **fields)
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    stale = [tmp_path / "release/broken/eval.json", tmp_path / "release/eval.json"]
    for path in stale:
        path.write_text("{}")
    with pytest.raises(UserError, match=r"^broken: some activations are NaN"):
        evaluate.run(tmp_path / "release", (), None, 512, {})
    assert "\nexact " in capsys.readouterr().out
    assert not any(path.exists() for path in stale)


def test_saes_that_break_together_have_their_own_figures(
    tmp_path: Path, run_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the first one gives is finite, and so are the products of the second one, but not those of both."""
    one, two = identity_sae(), identity_sae()
    one["W_dec"] *= 1e15
    two["W_enc"] *= 1e30
    two["W_dec"] *= 1e-30
    write_sae(tmp_path / "release/one", run_config, one, k=D_IN, hooks=("model.layers.0",))
    write_sae(tmp_path / "release/two", run_config, two, k=D_IN, hooks=("model.layers.1",))
    with pytest.raises(UserError, match=r"^all SAEs at once: some activations are NaN"):
        evaluate.run(tmp_path / "release", (), None, 64, {})
    assert "\ntwo " in capsys.readouterr().out
    assert {path.parent.name for path in (tmp_path / "release").rglob("eval.json")} == {"one", "two"}


def test_saes_of_one_model_and_text_share_them(
    tmp_path: Path, run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else their runs' configs say; and no second model is there before the first one is gone."""
    release = tmp_path / "release"
    other = {**run_config, "train": {**run_config["train"], "lr": 0.5}, "output_dir": "elsewhere"}
    third = {**run_config, "data": {**run_config["data"], "eval_fraction": 0.2}}
    for name, run in (("a", run_config), ("b", other), ("c", third)):
        write_sae(release / name, run, identity_sae(), k=D_IN)
    opened: list[weakref.ref[ActivationSource]] = []
    original = evaluate.open_model

    def open_model(*args: Any) -> ActivationSource:
        assert not any(source() for source in opened)
        source = original(*args)
        opened.append(weakref.ref(source))
        return source

    monkeypatch.setattr(evaluate, "open_model", open_model)
    evaluate.run(release, (), None, 64, {})
    assert len(opened) == 2 and len(list(release.rglob("eval.json"))) == 3


def test_tokens_of_an_image_model_are_its_positions(
    run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 17 positions each: 16 patches and the class's, whatever data.context_size is.
    images = [(torch.zeros(3, 16, 16), torch.ones(17, dtype=torch.bool))] * 100
    monkeypatch.setattr(held_out, "held_out_contexts", lambda *_: iter(images))
    assert [batch.positions for batch in batches(from_dict(run_config), 17 * 18 + 3)] == [16 * 17, 2 * 17]


def test_a_broken_model_gives_one_line(tmp_path: Path, run_config: dict[str, Any]) -> None:
    shutil.copytree(MODEL_FOLDER, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    run_config["model"]["name"] = str(tmp_path / "model")
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(UserError, match=r"^exact: all activations at model.layers.1 are NaN or infinite"):
        evaluate.run(tmp_path / "release", (), None, 512, {})


# ---- rows and positions that do not count ----------------------------------------------------------------------------


class Doubling(TopKSAE):
    """An SAE that gives every row twice."""

    most = 0  # rows at once

    def __init__(self) -> None:
        super().__init__(TopKSAEConfig(d_in=4, d_sae=8, k=2))

    def encode(self, x: Tensor) -> Tensor:
        self.most = max(self.most, len(x))
        return torch.cat([x, x], 1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return 2 * feature_acts[:, :4]


@pytest.mark.parametrize(("dense", "most"), [(2**26, 1024), (8 * 100 + 3, 100)])
def test_unusable_rows_pass_through(dense: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruction, "DENSE_AT_ONCE", dense)
    rows = torch.linspace(1, 2, 3000)[:, None].repeat(1, 4)  # more than go through an SAE at once
    rows[3] = torch.nan
    rows[2007] = 1e4
    sae = Doubling()
    sums = Reconstruction(sae)
    out = sums.add(rows, rows)
    assert sums.sums.rows == 2998 and sae.most == most
    usable = [row for row in range(3000) if row not in (3, 2007)]
    assert torch.equal(out[usable], 2 * rows[usable])
    assert out[3].isnan().all() and torch.equal(out[2007], rows[2007])


def test_a_transcoder_s_rows_count_where_both_its_ends_do() -> None:
    class Widening(Transcoder):
        """Predicts a row's two values, and both again with the other sign."""

        def encode(self, x: Tensor) -> Tensor:
            return torch.cat([x, -x], 1)

        def decode(self, feature_acts: Tensor) -> Tensor:
            return feature_acts

    @dataclass(kw_only=True)
    class WideningConfig(TranscoderConfig):
        k: int = 2

    x, y = torch.full((10, 2), 3.0), torch.ones(10, 4)
    x[2], y[5] = torch.nan, 1e4
    sums = Reconstruction(Widening(WideningConfig(d_in=2, d_sae=4, d_out=4, apply_b_dec_to_input=False)))
    out = sums.add(x, y)
    assert sums.sums.rows == 8
    assert torch.equal(out[[2, 5]], y[[2, 5]])
    assert torch.equal(out[0], torch.tensor([3.0, 3, -3, -3]))
    figures = sums.sums.figures()
    # By hand: y - ŷ = (-2, -2, 4, 4), of norm² 40; ‖y‖ = 2, ‖ŷ‖ = 6, their product is 0; all y are the same.
    assert math.isnan(figures["shrinkage"]["relative_reconstruction_bias"])
    assert math.isnan(figures["reconstruction_quality"]["explained_variance"])
    # The target's principal components are no rival of what is predicted from another place.
    assert "pca_fvu" not in figures["reconstruction_quality"]
    assert figures["reconstruction_quality"]["mse"] == pytest.approx(40)
    assert figures["shrinkage"]["l2_norm_in"] == pytest.approx(2) and figures["shrinkage"]["l2_ratio"] == pytest.approx(
        3
    )
    assert figures["sparsity"]["l1"] == pytest.approx(12) and figures["sparsity"]["l0"] == 4


def test_excluded_positions_stay_as_they_are() -> None:
    model = ModelConfig("embedded")
    held_out = HeldOutModel(ActivationSource(model, inspect_model(model, ["model.layers.1", "model.layers.2"])))
    tokens = torch.arange(20).view(2, 10)
    keep = torch.ones(2, 10, dtype=torch.bool)
    keep[0, 0] = keep[1, 4] = False
    batch = Batch(tokens, keep)
    clean = held_out.clean(batch, ["model.layers.1"])
    whole = held_out.source.capture(tokens)["model.layers.1"]
    assert torch.equal(clean.rows["model.layers.1"], whole[keep]) and batch.rows == 18
    seen: list[Tensor] = []

    def zero(rows: Tensor) -> Tensor:
        seen.append(rows)
        return torch.zeros_like(rows)

    # What a later hook sees of the change: zeros at the kept positions, the others as they were.
    with (
        held_out.changed("model.layers.1", zero, keep),
        held_out.source.observe("model.layers.1", seen.append),
    ):
        held_out.source.forward(tokens)
    assert torch.equal(seen[0], whole[keep])
    assert torch.equal(seen[1][~keep], whole[~keep]) and not seen[1][keep].any()


# ---- every architecture ----------------------------------------------------------------------------------------------

MLP = {"hookpoints": ["model.layers.1.mlp:in"], "hookpoint_out": "model.layers.1.mlp"}
# From 640 to 256 values.
PROJECTION = ("model.layers.1.mlp.down_proj:in", "model.layers.1.mlp.down_proj")
SPARSE = {"d_sae": 64, "hookpoints": ["model.layers.1"]}
TRAINED: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", **SPARSE, "normalize_activations": "layer_norm"},
    "gated": {"architecture": "gated", **SPARSE},
    "jumprelu": {"architecture": "jumprelu", **SPARSE, "normalize_activations": "constant_norm_rescale"},
    "topk": {"architecture": "topk", **SPARSE, "k": 5, "normalize_activations": "expected_average_only_in"},
    "abstopk": {"architecture": "abstopk", **SPARSE, "k": 5},
    "batchtopk": {"architecture": "batchtopk", **SPARSE, "k": 4.5},
    "matryoshka": {"architecture": "matryoshka_batchtopk", **SPARSE, "k": 4, "matryoshka_widths": [16, 64]},
    "transcoder": {"architecture": "transcoder", "d_sae": 64, **MLP},
    "skip": {
        "architecture": "skip_transcoder",
        "d_sae": 64,
        "d_out": 256,
        "hookpoints": [PROJECTION[0]],
        "hookpoint_out": PROJECTION[1],
    },
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder", "d_sae": 64, **MLP},
    "batchtopk_skip": {"architecture": "batchtopk_skip_transcoder", "d_sae": 64, "k": 4, **MLP},
}
TOKENS = 1024


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A released and evaluated run of every kind of SAE."""
    folder = tmp_path_factory.mktemp("every")
    config = runs.tiny_config(folder, saes=[{"name": name, "dtype": "float64", **TRAINED[name]} for name in TRAINED])
    config["train"]["training_tokens"] = 12 * 128
    runs.forked_run(runs.write_config(folder, config), 1)
    consolidate(folder / "run", folder / "release")
    evaluate.main(str(folder / "release"), tokens=TOKENS)
    return folder / "release"


def folder_of(release: Path, name: str) -> Path:
    (folder,) = [path.parent for path in release.rglob("cfg.json") if path.parent.name == name]
    return folder


class Direct:
    """The model of a run and its held-out text, with hooks of its own."""

    def __init__(self, config: dict[str, Any]):
        parts = evaluate.batches(from_dict(config), TOKENS)
        self.tokens = torch.cat([part.tokens for part in parts])
        self.keep = torch.cat([part.keep for part in parts])
        self.model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float64).eval()

    @torch.no_grad()
    def loss(self, sae: SAE | None, hook_name: str, hook_name_out: str) -> tuple[float, Tensor, Tensor, Tensor]:
        """(cross-entropy, input rows, target rows, logits); with an SAE, its output takes the targets' place."""
        seen: dict[str, Tensor] = {}

        def at_input(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["x"] = args[0][self.keep]

        def at_output(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            seen["y"] = output[self.keep]
            new = output.clone()
            new[self.keep] = seen["y"] if sae is None else sae(seen.get("x", seen["y"]))
            return new

        handles = [self.model.get_submodule(hook_name_out).register_forward_hook(at_output)]
        if hook_name != hook_name_out:
            module = self.model.get_submodule(hook_name.removesuffix(":in"))
            handles.append(module.register_forward_pre_hook(at_input))
        output = self.model(self.tokens, labels=self.tokens)
        for handle in handles:
            handle.remove()
        return float(output.loss), seen.get("x", seen["y"]), seen["y"], output.logits


@pytest.fixture(scope="module")
def direct(release: Path) -> Direct:
    return Direct(json.loads((folder_of(release, "topk") / "runner_cfg.json").read_text()))


@pytest.mark.parametrize("name", TRAINED)
def test_every_architecture_against_direct_computation(name: str, release: Path, direct: Direct) -> None:
    folder = folder_of(release, name)
    figures = json.loads((folder / "eval.json").read_text())
    places = evaluate.place_of(folder)
    assert (places[0] != places[1]) == ("hookpoint_out" in TRAINED[name])
    sae = SAE.load_from_disk(folder)
    clean, x, y, logits = direct.loss(None, *places)
    spliced, *_, spliced_logits = direct.loss(sae, *places)
    acts, y_hat = sae.encode(x), sae(x)
    assert figures["token_stats"]["total_tokens_eval_reconstruction"] == len(y) > 900
    performance = figures["model_performance_preservation"]
    # float64 throughout, but for transformers' loss, which takes the logits in float32 and sums in float32.
    assert performance["ce_loss_without_sae"] == pytest.approx(clean, rel=1e-5)
    assert performance["ce_loss_with_sae"] == pytest.approx(spliced, rel=1e-5)
    p, q = logits.softmax(-1), spliced_logits.softmax(-1)
    # SAELens's direction, KL(clean || spliced), over all positions. float64 sums in another order.
    kl = float((p * (p.log() - q.log())).sum(-1).mean())
    assert figures["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(kl, rel=1e-9)
    # The reconstruction of so short a training is one that the model notices.
    assert abs(spliced - clean) > 1e-3
    error = (y - y_hat).square().sum()
    expected = {
        "explained_variance": 1 - error / (y - y.mean(0)).square().sum(),
        "mse": error / len(y),
        "cossim": torch.cosine_similarity(y, y_hat).mean(),
        "l2_norm_in": y.norm(dim=1).mean(),
        "l2_norm_out": y_hat.norm(dim=1).mean(),
        "l2_ratio": (y_hat.norm(dim=1) / y.norm(dim=1)).mean(),
        "relative_reconstruction_bias": y_hat.square().sum() / (y * y_hat).sum(),
        "l0": (acts != 0).sum(1).double().mean(),
        "l0_max": (acts != 0).sum(1).max(),
        "l1": acts.abs().sum(1).mean(),
        "dead_fraction": (acts == 0).all(0).double().mean(),
        "dense_fraction": ((acts != 0).double().mean(0) > 0.1).double().mean(),
    }
    found = {key: value for section in figures.values() for key, value in section.items()}
    # float64 sums in another order; the activations came through batches of other sizes.
    assert {key: found[key] for key in expected} == pytest.approx(
        {key: float(value) for key, value in expected.items()}, rel=1e-7
    )
    assert ("pca_fvu" in found) == (name in ("topk", "abstopk"))
    log_density = torch.log10((acts != 0).double().mean(0) + 1e-10).clamp(max=0)  # of those that fire on every row
    assert found["feature_density_histogram"] == torch.histc(log_density, 40, -10, 0).tolist()


def test_the_release_has_what_the_figures_are_tested_on(release: Path, direct: Direct) -> None:
    """Activations of both signs, an input wider than its target, a skip that does something."""
    rows = direct.loss(None, "model.layers.1", "model.layers.1")[2]
    assert (SAE.load_from_disk(folder_of(release, "abstopk")).encode(rows) < 0).any()
    sae: Any = SAE.load_from_disk(folder_of(release, "skip"))
    assert (sae.cfg.d_in, sae.cfg.d_out) == (640, 256) and sae.W_skip.any()


def test_the_table_has_a_dash_for_what_is_not_there(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, dashes in (("abstopk", 0), ("gated", 1), ("transcoder", 1)):
        folder = folder_of(release, name)
        evaluate.main(str(release), sae_id=folder.relative_to(release).as_posix(), tokens=64)
        heading, row = capsys.readouterr().out.splitlines()
        assert "PCA-k FVU" in heading and row.split().count("-") == dashes


# ---- transcoders -----------------------------------------------------------------------------------------------------


def linear_transcoder() -> dict[str, Tensor]:
    """The module model.layers.1.mlp.down_proj: all of it is in the skip."""
    weight = load_file(MODEL_FOLDER / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float()
    d_out, d_in = weight.shape
    return {
        "W_enc": torch.zeros(d_in, 8),
        "W_dec": torch.ones(8, d_out),
        "b_enc": torch.zeros(8),
        "b_dec": torch.zeros(d_out),  # the module has no bias
        "W_skip": weight.contiguous(),
    }


def test_a_transcoder_that_is_the_module_loses_nothing(tmp_path: Path, run_config: dict[str, Any]) -> None:
    release = tmp_path / "release"
    fields = {"d_out": D_IN, "apply_b_dec_to_input": False}
    exact = linear_transcoder()
    write_sae(release / "exact", run_config, exact, "skip_transcoder", PROJECTION, **fields)
    zero = {**exact, "W_skip": torch.zeros_like(exact["W_skip"])}
    write_sae(release / "zero", run_config, zero, "skip_transcoder", PROJECTION, **fields)
    evaluate.run(release, (), None, 2048, {})
    figures = {name: json.loads((release / name / "eval.json").read_text()) for name in ("exact", "zero")}
    good, bad = (figures[name]["model_performance_preservation"] for name in figures)
    # The same products in another order: float32 rounding through three layers.
    assert good["ce_loss_with_sae"] == pytest.approx(good["ce_loss_without_sae"], rel=1e-5)
    assert good["ce_loss_score"] == pytest.approx(1, abs=1e-2)  # of a difference of some hundredths
    assert figures["exact"]["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-9)
    assert figures["exact"]["sparsity"]["l0"] == 0
    assert bad["ce_loss_with_sae"] == bad["ce_loss_with_ablation"] > bad["ce_loss_without_sae"] + 0.01


def test_a_transcoder_towards_an_earlier_place_is_refused(
    tmp_path: Path, run_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    backwards = ("model.layers.2", "model.layers.1")
    fields = {"d_out": D_IN, "apply_b_dec_to_input": False}
    write_sae(tmp_path / "release/back", run_config, identity_sae(), "transcoder", backwards, **fields)
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(str(tmp_path / "release"), tokens=512)
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: back: reads model.layers.2, which a forward reaches after model.layers.1")
    assert "\nexact " in printed.out
    assert not (tmp_path / "release/back/eval.json").exists()


def test_observed_activations_are_copies() -> None:
    model = ModelConfig("embedded")
    source = ActivationSource(model, inspect_model(model, ["model.layers.1"]))
    tokens = torch.arange(20).view(2, 10)
    clean = source.logits(tokens)
    with source.observe("model.layers.1", Tensor.zero_):
        assert torch.equal(source.logits(tokens), clean)
    seen: list[Tensor] = []
    with source.observe("model.layers.1", seen.append):
        source.forward(tokens)
    assert torch.equal(seen[0], source.capture(tokens)["model.layers.1"]) and len(seen) == 1


# ---- several ranks, and several SAEs at once -------------------------------------------------------------------------


def evaluate_on(world: int, release: Path, tokens: int = TOKENS, **options: Any) -> list[int]:
    """The exit code of every rank."""

    def worker(rank: int, world: int) -> int:
        work = partial(evaluate.run, release, (), None, tokens, options)
        return run_command(lambda session: work(session=session))

    return runs.run_ranks(world, worker, timeout=120, init=False)


def figures_in(release: Path) -> dict[str, float]:
    """All numbers of all eval.json, by file and name."""
    found: dict[str, float] = {}
    for path in release.rglob("eval.json"):
        for section, part in json.loads(path.read_text()).items():
            for name, value in part.items():
                if isinstance(value, list):
                    found |= {f"{path.relative_to(release)} {section} {name} {i}": n for i, n in enumerate(value)}
                else:
                    found[f"{path.relative_to(release)} {section} {name}"] = value
    return found


def some_of(release: Path, folder: Path, *names: str) -> Path:
    """A release with some SAEs of another."""
    for name in names:
        source = folder_of(release, name)
        shutil.copytree(source, folder / source.relative_to(release))
    return folder


@pytest.mark.parametrize(
    ("world", "options"),
    [
        pytest.param(2, {"topology.lm.tp": 2}, marks=pytest.mark.slow),
        pytest.param(3, {"topology.lm.dp": 3}, marks=pytest.mark.slow),  # three copies, two batches
        (4, {"topology.lm.tp": 2, "topology.lm.dp": 2}),
    ],
)
def test_several_ranks_find_the_same(
    world: int, options: dict[str, Any], release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = Sums.pca_fvu

    def on_the_main_rank(self: Sums) -> float:
        assert os.environ.get("RANK", "0") == "0"
        return components(self)

    monkeypatch.setattr(Sums, "pca_fvu", on_the_main_rank)
    some = some_of(release, tmp_path / "release", "topk", "skip")
    evaluate.run(some, (), None, TOKENS, {})
    alone = figures_in(some)
    assert len({name.split()[0] for name in alone}) == 3  # two SAEs, and both together
    for path in some.rglob("eval.json"):
        path.unlink()
    assert evaluate_on(world, some, **options) == [0] * world
    found = figures_in(some)
    # float64: sums in another order, and over tp activations that differ by rounding.
    assert found == pytest.approx(alone, rel=1e-9, abs=1e-12)


def test_all_saes_at_once_against_direct_computation(
    release: Path,
    direct: Direct,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    some = some_of(release, tmp_path / "release", "topk", "skip")
    loaded: list[str] = []
    load = SAE.load_from_disk

    def counted(folder: Path, *args: Any) -> SAE:
        loaded.append(folder.name)
        return load(folder, *args)

    monkeypatch.setattr(SAE, "load_from_disk", counted)
    bytes_of_topk = sum(tensor.nbytes for tensor in load(folder_of(some, "topk")).state_dict().values())
    monkeypatch.setattr(evaluate, "SAE_BYTES", bytes_of_topk)
    evaluate.run(some, (), None, TOKENS, {})
    # Once for its own figures; then one that is kept, and one that is read for each of two batches.
    assert sorted(loaded) == ["skip"] * 3 + ["topk"] * 2
    figures = json.loads((some / "eval.json").read_text())["model_performance_preservation"]
    assert f"all at once: CE with SAEs {figures['ce_loss_with_sae']:.4f}, CE score" in capsys.readouterr().out
    saes = {name: SAE.load_from_disk(folder_of(some, name)) for name in ("topk", "skip")}
    places = {name: evaluate.place_of(folder_of(some, name)) for name in saes}
    seen: dict[str, Tensor] = {}

    def at_input(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["x"] = args[0][direct.keep]

    def at_output(name: str, module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        new = output.clone()
        new[direct.keep] = saes[name](seen["x"] if name == "skip" else output[direct.keep])
        return new

    source = direct.model.get_submodule(places["skip"][0].removesuffix(":in"))
    handles = [source.register_forward_pre_hook(at_input)]
    for name, (_, target) in places.items():
        handles.append(direct.model.get_submodule(target).register_forward_hook(partial(at_output, name)))
    with torch.no_grad():
        loss = float(direct.model(direct.tokens, labels=direct.tokens).loss)
    for handle in handles:
        handle.remove()
    # transformers takes the logits in float32.
    assert figures["ce_loss_with_sae"] == pytest.approx(loss, rel=1e-5)
    each = [json.loads((folder_of(some, name) / "eval.json").read_text()) for name in saes]
    alone = [one["model_performance_preservation"]["ce_loss_with_sae"] for one in each]
    assert all(abs(figures["ce_loss_with_sae"] - one) > 1e-4 for one in alone)


def test_a_rank_that_is_asked_to_stop_ends(
    tmp_path: Path, run_config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    monkeypatch.setattr(evaluate, "open_evaluator", lambda *_: os.kill(os.getpid(), signal.SIGTERM))

    class Ended(BaseException):
        """What SIGTERM does in this test's ranks, in place of ending them at once."""

    def end(*_: Any) -> None:
        raise Ended

    def worker(rank: int, world: int) -> bool:
        signal.signal(signal.SIGTERM, end)
        try:
            run_command(lambda session: evaluate.run(tmp_path / "release", (), None, 64, {}, session=session))
        except Ended:
            return True
        return False

    assert runs.run_ranks(1, worker, init=False) == [True]


def test_two_saes_at_one_place_have_no_joint_figure(release: Path) -> None:
    assert not (release / "eval.json").exists()


def test_one_broken_sae_does_not_hold_up_other_ranks(
    tmp_path: Path, run_config: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Only one copy of the model meets the row on which it breaks."""
    broken = identity_sae()
    broken["W_enc"][0, 0] = torch.inf
    write_sae(tmp_path / "release/broken", run_config, broken, k=D_IN)
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    assert evaluate_on(2, tmp_path / "release")
    assert capfd.readouterr().err.count("error: broken: some activations are NaN") == 1
    assert (tmp_path / "release/exact/eval.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topology.lm.tp": 2}, "tp 2 times dp 1 are 2 ranks, but 1 were started"),
        ({"topology.lm.dp": 2}, "tp 1 times dp 2 are 2 ranks, but 1 were started"),
        ({"topology.lm.tq": 2}, "topology.lm.tq: unknown key"),
        ({"topology.lm": "colocated"}, "run the model alone"),
        ({"topology.sae.tp": 2}, "--topology.sae.tp: no argument of evaluate"),
    ],
)
def test_a_topology_that_does_not_fit(
    options: dict[str, Any], words: str, tmp_path: Path, run_config: dict[str, Any]
) -> None:
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(UserError, match=words):
        evaluate.run(tmp_path / "release", (), None, 512, options)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("cfg.json", "{", "cfg.json: is not JSON"),
        ("cfg.json", "[]", "must hold an object"),
        ("runner_cfg.json", "{", "runner_cfg.json: is no JSON object"),
        ("runner_cfg.json", "[]", "runner_cfg.json: is no JSON object"),
        ("runner_cfg.json", "{}", "runner_cfg.json: "),
        ("sae_weights.safetensors", "no tensors", "sae_weights.safetensors"),
    ],
)
def test_a_corrupt_file_is_one_line(
    file: str, content: str, words: str, tmp_path: Path, run_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    (folder / file).write_text(content)
    with pytest.raises(SystemExit, match="1"):
        evaluate.main(str(tmp_path / "release"), tokens=64)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ") and words in line


def test_the_name_of_the_place_is_that_of_the_transformers_model(tmp_path: Path, run_config: dict[str, Any]) -> None:
    folder = write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"hook_name": "blocks.1.hook_resid_post", "hf_hook_name": "model.layers.1"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert evaluate.place_of(folder) == ("model.layers.1", "model.layers.1")
    cfg["metadata"] |= {"hf_hook_name_out": "model.layers.2", "hook_name_out": "blocks.2.hook_resid_post"}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    assert evaluate.place_of(folder) == ("model.layers.1", "model.layers.2")

"""Evaluation against direct formulas, and against SAEs whose figures are known beforehand."""

import json
import math
import shutil
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import runs
from scale_sae import evaluate, held_out, reconstruction
from scale_sae.activations.source import ActivationSource, inspect_model
from scale_sae.config import ModelConfig, from_dict, to_dict
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError
from scale_sae.held_out import Batch, HeldOutModel, batches
from scale_sae.reconstruction import Reconstruction
from scale_sae.saes.inference import SAE
from scale_sae.saes.released import TopKSAE, TopKSAEConfig, Transcoder, TranscoderConfig

D_IN = 256
# From 640 to 256 values.
PROJECTION = ("model.layers.1.mlp.down_proj:in", "model.layers.1.mlp.down_proj")


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

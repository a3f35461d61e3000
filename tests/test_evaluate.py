"""Evaluation against direct formulas, and against SAEs whose figures are known beforehand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import runs
from scale_sae import evaluate
from scale_sae.config import from_dict, to_dict
from scale_sae.errors import UserError
from scale_sae.saes.inference import SAE, TopKSAEConfig

D_IN = 256


def write_sae(folder: Path, run: dict[str, Any], tensors: dict[str, Tensor], k: int) -> Path:
    folder.mkdir(parents=True)
    d_in, d_sae = tensors["W_enc"].shape
    cfg = {"architecture": "topk", "d_in": d_in, "d_sae": d_sae, "k": k, "dtype": "float32"}
    (folder / "cfg.json").write_text(json.dumps({**cfg, "metadata": {"hook_name": "model.layers.1"}}))
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
    sae = SAE.load_from_disk(write_sae(tmp_path / "sae", {}, tensors, k), dtype=torch.float64)
    x = (
        torch.randn(500, d_in, generator=generator, dtype=torch.float64) @ torch.diag(torch.arange(1.0, 13)).double()
        + 3
    )
    sums = evaluate.Reconstruction(sae)
    for part in x.split(130):
        sums.add(part)
    figures = sums.figures()
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


def test_a_release_cannot_consent_to_code_of_others(tmp_path: Path, run_config: dict[str, Any]) -> None:
    run_config["model"]["trust_remote_code"] = True
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(UserError, match="--trust_remote_code: the release asks to run code"):
        evaluate.run(tmp_path / "release", (), None, 512, {})


def test_one_broken_sae_does_not_hide_the_others(
    tmp_path: Path, run_config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = identity_sae()
    broken["W_enc"][0, 0] = torch.inf
    write_sae(tmp_path / "release/broken", run_config, broken, k=D_IN)
    write_sae(tmp_path / "release/exact", run_config, identity_sae(), k=D_IN)
    with pytest.raises(UserError, match=r"^broken: some activations are NaN"):
        evaluate.run(tmp_path / "release", (), None, 512, {})
    assert "\nexact " in capsys.readouterr().out
    assert not (tmp_path / "release/broken/eval.json").exists()


def test_unusable_rows_pass_through() -> None:
    class Doubling(torch.nn.Module):
        cfg = TopKSAEConfig("topk", 4, 8, "float32", k=2)
        b_dec = torch.zeros(4)

        def encode(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], 1)

        def decode(self, acts: Tensor) -> Tensor:
            return 2 * acts[:, :4]

    rows = torch.ones(10, 4)
    rows[3] = torch.nan
    rows[7] = 1e4
    sums = evaluate.Reconstruction(Doubling())  # type: ignore[arg-type]
    out = sums.add(rows)
    assert sums.rows == 8
    assert out[3].isnan().all() and torch.equal(out[7], rows[7]) and torch.equal(out[0], 2 * rows[0])


def test_excluded_positions_stay_as_they_are() -> None:
    x = torch.arange(12.0).view(2, 3, 2)
    keep = torch.tensor([[False, True, True], [True, False, True]])
    out = evaluate.at_kept_positions(torch.zeros_like, keep)(x)
    assert torch.equal(out[~keep], x[~keep]) and not out[keep].any()
    assert torch.equal(x, torch.arange(12.0).view(2, 3, 2))

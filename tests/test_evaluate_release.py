"""Evaluation of a trained release: every architecture against direct computation, on one rank and several."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import runs
from scale_sae import evaluate
from scale_sae.config import from_dict, to_dict
from scale_sae.consolidate import consolidate
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.reconstruction import Sums
from scale_sae.saes.inference import SAE
from scale_sae.session import run_command
from test_evaluate import D_IN, PROJECTION, identity_sae, write_sae

MLP = {"hookpoints": ["model.layers.1.mlp:in"], "hookpoint_out": "model.layers.1.mlp"}
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


@pytest.fixture
def run_config(tmp_path: Path) -> dict[str, Any]:
    return to_dict(from_dict(runs.tiny_config(tmp_path, model={"name": "embedded"})))


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

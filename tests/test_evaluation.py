"""Evaluation while a run trains: the same figures in every topology, those of the release, and nothing else changes."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import runs
from scale_sae import cache_activations, checkpoint, evaluate, held_out, train, trainer
from scale_sae.config import load
from scale_sae.consolidate import consolidate
from scale_sae.evaluation import Evaluation, JobEvaluation, Mail
from scale_sae.held_out import loss_sums
from scale_sae.job_trainer import JobTrainer
from scale_sae.trainer import Trainer

SAES: list[dict[str, Any]] = [
    # Scaled: the activations that are reported are the release's, whose weights have the factors.
    {"name": "topk", "k": 5, "normalize_activations": "expected_average_only_in", "hookpoints": ["model.layers.0"]},
    {
        "name": "batchtopk",
        "architecture": "batchtopk",
        "k": 4.5,
        "normalize_activations": "expected_average_only_in",
        "hookpoints": ["model.layers.1"],
    },
    {
        "name": "jumprelu",
        "architecture": "jumprelu",
        "normalize_activations": "layer_norm",
        "hookpoints": ["model.layers.1"],
    },
    {
        "name": "skip",
        "architecture": "batchtopk_skip_transcoder",
        "k": 4,
        "normalize_activations": "expected_average_only_in",
        "hookpoints": ["model.layers.1.mlp:in"],
        "hookpoint_out": "model.layers.1.mlp",
    },
]
STEPS = 12
# 40 contexts: two batches of 16 and one of 8.
EVALUATION = {"every_steps": 5, "tokens": 1280}
# float64 throughout: the order of summation gives 1e-14; a threshold, a factor or a row that is wrong, 1e-3 and more.
TOLERANCE = 1e-9
# name → (topology, ranks); P copies of the model share three batches.
TOPOLOGIES: dict[str, tuple[dict[str, Any], int]] = {
    "LM dp=2, SAE tp=2": ({"lm": {"dp": 2}, "sae": {"tp": 2}}, 4),
}
SLOW: dict[str, tuple[dict[str, Any], int]] = {
    "LM tp=2, SAE groups=2": ({"lm": {"tp": 2}, "sae": {"groups": 2}}, 4),
    "colocated tp=2": ({"lm": "colocated", "sae": {"tp": 2}}, 2),
    "colocated groups=2, tp=2": ({"lm": "colocated", "sae": {"groups": 2, "tp": 2}}, 4),
    "LM dp=2, fsdp2 dp=2, tp=2": ({"lm": {"dp": 2}, "sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"}, 6),
    "colocated fsdp2 dp=2": ({"lm": "colocated", "sae": {"dp": 2}, "engine": "fsdp2"}, 2),
    "LM tp=2, dp=2, SAE tp=4": ({"lm": {"tp": 2, "dp": 2}, "sae": {"tp": 4}}, 8),
}


def config(folder: Path, **changes: Any) -> dict[str, Any]:
    saes = [{"d_sae": 64, "dtype": "float64", "lr": 1e-2, **sae} for sae in SAES]
    made = runs.tiny_config(folder, saes=saes, evaluation=EVALUATION, checkpoint={"every_steps": 4})
    made["train"]["training_tokens"] = STEPS * 128
    return made | changes


def run(folder: Path, world: int = 1, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    runs.forked_run(runs.write_config(folder, config(folder, **changes)), world)
    return folder / "run"


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in lines(run_dir) if "reconstruction_quality/mse" in record]


def difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> float:
    """The largest relative difference of any figure; what are no numbers must be equal."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name, value in b.items():
            if isinstance(value, float):
                worst = max(worst, abs(a[name] - value) / max(abs(value), 1e-3))
            else:
                assert a[name] == value, name
    return worst


@pytest.fixture(scope="module", autouse=True)
def some_rows_are_left_out() -> Iterator[None]:
    """Rows that are only a little longer than usual count as outliers, in all runs and evaluations here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(trainer, "OUTLIER_RATIO", 1.2)
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("reference"))


def test_every_sae_is_evaluated_at_every_interval_and_at_the_last_step(reference: Path) -> None:
    found = evaluations(reference)
    names = [f"{sae['hookpoints'][0]}/{sae['name']}" for sae in SAES]
    assert [(r["step"], r["sae_id"]) for r in found] == [(step, name) for step in (5, 10, STEPS) for name in names]
    assert all(r["tokens"] == 128 * r["step"] for r in found)
    # Of 40 contexts of 32 tokens, whose first is a special one.
    rows = {r["token_stats/total_tokens_eval_reconstruction"] for r in found}
    assert all(700 < n < 40 * 31 for n in rows) and len(rows) > 1
    losses = [r["model_performance_preservation/ce_loss_without_sae"] for r in found]
    assert len(set(losses)) == 1  # the same text each time
    # The figures of training stand on lines of their own, under other names.
    trained = {name for r in lines(reference) if r not in found for name in r}
    assert trained & set(found[0]) == {"step", "tokens", "sae_id"}


def few_rows_at_once(patched: pytest.MonkeyPatch, rows: int = 100) -> None:
    """Evaluations may make a few copies of the dense activations of as many rows, and must not make more."""
    begin, release = JobEvaluation.__init__, JobTrainer.as_released

    def init(self: JobEvaluation, job: JobTrainer) -> None:
        job.sae.pre_activation_bytes = 4 * rows * job.sae.n_local * job.sae.dtype.itemsize
        begin(self, job)

    def as_released(self: JobTrainer, x: Tensor) -> tuple[Tensor, Tensor]:
        assert len(x) <= rows
        return release(self, x)

    patched.setattr(JobEvaluation, "__init__", init)
    patched.setattr(JobTrainer, "as_released", as_released)


def one_sae_at_a_time(patched: pytest.MonkeyPatch, sae_ranks: int) -> None:
    """SAE ranks hold what they send of one SAE: a message for each of two copies of the model, at most."""
    send = Mail.send

    def checked(self: Mail, tensor: Tensor, to: int) -> None:
        send(self, tensor, to)
        assert self.rank >= sae_ranks or len(self.sent) <= 2

    patched.setattr(Mail, "send", checked)


@pytest.mark.parametrize("name", [*TOPOLOGIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_figures_are_the_same_in_every_topology(
    name: str, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology, world = (TOPOLOGIES | SLOW)[name]
    few_rows_at_once(monkeypatch)
    if "colocated" not in name:
        one_sae_at_a_time(monkeypatch, sae_ranks=world - math.prod(topology["lm"].values()))
    run_dir = run(tmp_path, world, topology=topology)
    worst = difference(evaluations(run_dir), evaluations(reference))
    print(f"{name}: largest difference of any figure {worst:.1e}")
    assert worst <= TOLERANCE


@pytest.mark.slow
def test_figures_are_the_same_from_cached_activations(reference: Path, tmp_path: Path) -> None:
    """Ranks that only read rows load the model for evaluations alone."""
    path = runs.write_config(tmp_path, config(tmp_path))
    folder = tmp_path / "cache"
    runs.run_ranks(1, lambda rank, world: cache_activations.cache(load(path), folder), init=False)
    run_dir = run(tmp_path, 2, topology={"lm": {"cache": str(folder)}, "sae": {"tp": 2}})
    assert difference(evaluations(run_dir), evaluations(reference)) <= TOLERANCE


def test_figures_are_those_of_the_release(reference: Path, tmp_path: Path) -> None:
    consolidate(reference, tmp_path / "release")
    evaluate.run(tmp_path / "release", (), None, EVALUATION["tokens"], {})
    for record in evaluations(reference)[-len(SAES) :]:
        figures = json.loads(
            (tmp_path / "release" / checkpoint.folder_name(record["sae_id"]) / "eval.json").read_text()
        )
        # The principal components of the text do not change while SAEs train: only the command finds them.
        figures["reconstruction_quality"].pop("pca_fvu", None)
        released = {f"{section}/{name}": value for section, part in figures.items() for name, value in part.items()}
        ours = {name: value for name, value in record.items() if name not in ("step", "tokens", "sae_id")}
        # The factors are folded into weights that are rounded once more, in float64.
        assert difference([ours], [released]) <= TOLERANCE
        assert released["sparsity/l0"] > 1 and released["model_performance_preservation/ce_loss_score"] != 1


def test_training_is_the_same_with_and_without(reference: Path, tmp_path: Path) -> None:
    """Bit for bit, the whole checkpoint: what evaluation fits for the release alone is put back."""
    without = run(tmp_path, evaluation={})
    assert not evaluations(without)
    ours, theirs = checkpoint.complete(reference)[0], checkpoint.complete(without)[0]
    files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors"))
    assert len(files) > len(SAES)
    for file in files:
        assert (ours / file).read_bytes() == (theirs / file).read_bytes(), file


# ---- ends of all kinds -----------------------------------------------------------------------------------------------


def run_with(folder: Path, world: int, patch: Callable[[int], None], **changes: Any) -> list[tuple[int, float]]:
    """(exit code, seconds) of every rank, each of which has been patched; none may hang."""
    folder.mkdir(exist_ok=True)
    path = runs.write_config(folder, config(folder, **changes))

    def worker(rank: int, world: int) -> tuple[int, float]:
        patch(rank)
        began = time.monotonic()
        return train.run(str(path), (), {}), time.monotonic() - began

    return runs.run_ranks(world, worker, timeout=120, init=False)


def stop_at(step: int, by: int) -> Callable[[int], None]:
    """A patch: rank ``by`` gets a signal once that many steps are done."""

    def patch(rank: int) -> None:
        original = Trainer.advance

        def advance(self: Trainer, *args: Any) -> bool:
            if self.step == step and rank == by:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, *args)

        Trainer.advance = advance  # type: ignore[assignment,method-assign]

    return patch


def stop_while_waiting(rank: int) -> None:
    """A patch: the last LM rank gets a signal when it first waits for an evaluation."""
    original = Evaluation._join

    def join(self: Evaluation, *args: Any) -> bool:
        if rank == 2 and self.count == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    Evaluation._join = join  # type: ignore[assignment,method-assign]


DEDICATED = {"lm": {"dp": 2}, "sae": {"tp": 1}}


def ends(patch: Callable[[int], None], reference: Path, folder: Path, every: int) -> int:
    """A run that is stopped ends, goes on, and has every evaluation once; returns the step at which it was stopped."""
    evaluation = {**EVALUATION, "every_steps": every}
    codes = run_with(folder, 3, patch, topology=DEDICATED, evaluation=evaluation)
    assert [code for code, _ in codes] == [0, 0, 0]
    stopped = int(json.loads((folder / "run/summary.json").read_text())["step"])
    run_with(folder, 3, lambda rank: None, topology=DEDICATED, evaluation=evaluation)
    found = evaluations(folder / "run")
    due = sorted({*range(every, STEPS, every), STEPS})
    assert [r["step"] for r in found] == [at for at in due for _ in SAES]
    last = [r for r in found if r["step"] == STEPS]
    assert difference(last, [r for r in evaluations(reference) if r["step"] == STEPS]) <= TOLERANCE
    return stopped


def test_a_rank_that_waits_for_an_evaluation_hears_and_heeds_a_stop(reference: Path, tmp_path: Path) -> None:
    assert ends(stop_while_waiting, reference, tmp_path, every=5) < STEPS


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("step", [0, 3, 4, 9, 10])
def test_a_stop_at_any_step(step: int, every: int, reference: Path, tmp_path: Path) -> None:
    # What one rank says at a step all heed at the next.
    assert ends(stop_at(step, 0), reference, tmp_path, every) <= min(step + 2, STEPS)


@pytest.mark.slow
def test_after_a_crash_each_evaluation_is_there_once(reference: Path, tmp_path: Path) -> None:
    """The run before died at step 7, after its evaluation at step 5 and its checkpoint of step 4."""

    def crash(rank: int) -> None:
        original = Trainer.advance

        def advance(self: Trainer, *args: Any) -> bool:
            if self.step == 7:
                raise RuntimeError("a defect")
            return original(self, *args)

        Trainer.advance = advance  # type: ignore[assignment,method-assign]

    assert [code for code, _ in run_with(tmp_path, 1, crash)] == [1]
    assert [r["step"] for r in evaluations(tmp_path / "run")] == [5] * len(SAES)
    run(tmp_path)
    assert evaluations(tmp_path / "run") == evaluations(reference)


@pytest.mark.parametrize("dp", [2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_a_text_that_ends_early(dp: int, tmp_path: Path) -> None:
    """The last step that the text is enough for is evaluated, and no rank waits for what does not come."""
    made = config(tmp_path)
    text = "".join(json.dumps({"text": line[:300]}) + "\n" for line in runs.texts(40).splitlines())
    (tmp_path / "short.jsonl").write_text(text)
    data = {**made["data"], "dataset": str(tmp_path / "short.jsonl")}
    results = run_with(
        tmp_path,
        1 + dp,
        lambda rank: None,
        topology={"lm": {"dp": dp}, "sae": {"tp": 1}},
        data=data,
        train={**made["train"], "training_tokens": 10**6},
        saes=made["saes"][:1],
        evaluation={"every_steps": 9, "tokens": 256},
    )
    assert [code for code, _ in results] == [1] * (1 + dp)  # the text was to last longer
    last = json.loads((tmp_path / "run/summary.json").read_text())["step"]
    found = sorted({r["step"] for r in evaluations(tmp_path / "run")})
    assert last > 9 and found == [*range(9, last, 9), last]


def test_a_diverged_sae_has_no_figures_and_the_others_have_theirs(tmp_path: Path) -> None:
    wild = {"name": "wild", "k": 5, "d_sae": 64, "dtype": "float64", "lr": 1e300, "hookpoints": ["model.layers.1"]}
    tame = {**wild, "name": "tame", "lr": 1e-3, "hookpoints": ["model.layers.0"]}
    run_dir = run(tmp_path, 3, saes=[wild, tame], topology=DEDICATED)
    found = {(r["step"], r["sae_id"].rpartition("/")[2]) for r in evaluations(run_dir)}
    assert {name for step, name in found if step == STEPS} == {"tame"}
    assert {step for step, name in found if name == "tame"} == {5, 10, STEPS}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_that_is_killed_in_an_evaluation_ends_all(victim: int, tmp_path: Path) -> None:
    """SAE ranks and LM ranks evaluate after every step, so that most of the time goes to it."""
    made = config(tmp_path, topology=DEDICATED, evaluation={"every_steps": 1, "tokens": 4096})
    made["train"]["training_tokens"] = 100_000 - 100_000 % 128
    process = runs.launch(runs.write_config(tmp_path, made), 3)
    runs.wait_for_step(tmp_path / "run", 2, process)
    os.kill(runs.rank_pids(process)[victim], signal.SIGKILL)
    code, output = runs.finish(process, timeout=90)
    assert code != 0 and f"lost rank {victim}" in output


def test_a_run_without_held_out_text_says_so_before_it_trains(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path)
    results = run_with(tmp_path, 1, lambda rank: None, data={**made["data"], "eval_fraction": 0.0})
    assert [code for code, _ in results] == [1]
    error = capfd.readouterr().err
    assert "error: data.eval_fraction: 0.0 of " in error and "holds no whole context of 32 tokens" in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


# ---- formulas --------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation under it makes, other than by a view."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result._is_view():
            self.elements = max(self.elements, result.numel())
        return result


# Of 11 words: all positions at once, three, and one where not even that many fit.
@pytest.mark.parametrize(("at_once", "largest"), [(2**26, 77), (35, 33), (10, 11)])
def test_losses_equal_their_formulas(at_once: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    clean, changed = torch.randn(2, 3, 7, 11, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 11, (3, 7), generator=generator)
    with _Largest() as made:
        found = loss_sums(changed, tokens, clean)
    # The token ids are copied too: 21.
    assert made.elements <= max(largest, 21)

    def entropy(logits: Tensor) -> float:
        total = 0.0
        for context, ids in zip(logits, tokens, strict=True):
            for at in range(6):
                total += math.log(float(context[at].exp().sum())) - float(context[at, ids[at + 1]])
        return total

    p, q = clean.softmax(-1), changed.softmax(-1)
    # float64 sums in another order.
    assert found.ce == pytest.approx(entropy(changed), rel=1e-12)
    assert found.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-12)  # KL(clean || changed), as SAELens's


def test_a_word_that_the_model_rules_out_adds_nothing() -> None:
    clean = torch.tensor([[[0.0, 1.0, -torch.inf], [1.0, 0.0, -torch.inf]]])
    changed = torch.tensor([[[1.0, 0.0, -torch.inf], [1.0, 0.0, -torch.inf]]])
    p = torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)])
    found = loss_sums(changed, torch.tensor([[0, 1]]), clean)
    # float32 values near 1.
    assert found.kl == pytest.approx(float(p[1] - p[0]), rel=1e-6)

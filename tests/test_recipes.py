"""Recipes: what a config leaves out, b_dec at the mean of the first rows, k_aux and Adam's eps."""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import test_trainer as stream
import torch
import yaml
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from harness import run_ranks
from saes_for_tests import (
    D_IN,
    D_OUT,
    TRAINED,
    TRANSCODERS,
    Case,
    assert_close,
    build,
    gradients,
    inputs,
    our_step,
    shard_in_grid,
    sharded_steps,
    step_input,
)
from scale_sae import TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig, config, recipes, rundir
from scale_sae.collectives import Shard
from scale_sae.config import RunConfig, SAEEntry, TrainConfig
from scale_sae.engines import FSDP2Engine, LocalEngine
from scale_sae.errors import UserError
from scale_sae.job_trainer import JobTrainer, new_sae
from scale_sae.jobs import resolve
from scale_sae.optim import Optimizer
from scale_sae.sae_trainer import SAETrainer, SAETrainerConfig
from scale_sae.saes import registry, training_config
from scale_sae.trainer import Trainer
from scale_sae.zero import DeepSpeedEngine, ZeroOptimizer
from written_out import Plain

DEFAULT: dict[type, Any] = recipes._DEFAULT  # type: ignore[assignment]
TOKENS, BATCH = 4_000_000, 1000
NEEDED: dict[str, dict[str, Any]] = {
    "topk": {"k": 8},
    "abstopk": {"k": 8},
    "batchtopk": {"k": 8},
    "matryoshka_batchtopk": {"k": 8, "matryoshka_widths": [64]},
    "batchtopk_transcoder": {"k": 8},
    "batchtopk_skip_transcoder": {"k": 8},
}
TOP_K = ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "batchtopk_transcoder", "batchtopk_skip_transcoder"]
PENALISED = [
    *("standard", "gated", "jumprelu", "transcoder", "skip_transcoder"),
    *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
]


def load(*saes: dict[str, Any], **keys: Any) -> RunConfig:
    train = {"training_tokens": TOKENS, "train_batch_size_tokens": BATCH, **keys.pop("train", {})}
    lanes = {"tokens": 10_000, "lanes": 10}
    return config.from_dict({"hookpoints": ["a"], "saes": list(saes), "train": train, "buffer": lanes, **keys})


def entry_of(**keys: Any) -> SAEEntry:
    return load({"d_sae": 16384, **NEEDED.get(keys.get("architecture", "topk"), {}), **keys}).saes[0]


# ---- what is filled in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TOP_K)
def test_the_default_recipe_of_topk(architecture: str) -> None:
    entry = entry_of(architecture=architecture)
    # 4000 steps; the rate is halved where there are eight times as many latents as 2048.
    assert entry.train == {
        "lr": pytest.approx(1.25e-3, rel=1e-12),
        "lr_warm_up_steps": 200,
        "lr_decay_steps": 800,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "dead_feature_window_tokens": 307_200,  # 150 times the 16384 / 8 tokens between two firings
    }
    assert {name: entry.options[name] for name in entry.options.keys() & recipes.OPTIONS} == {
        "decoder_init_norm": 0.1,
        "b_dec_init": "mean",
        "normalize_activations": "expected_average_only_in",
        "aux_loss_coefficient": 1.0,
        "k_aux": None,
    }
    assert registry.training_config(architecture, 16, entry.options, "saes.0").problems() == {}


@pytest.mark.parametrize("architecture", PENALISED)
def test_the_default_recipe_of_the_others(architecture: str) -> None:
    entry = entry_of(architecture=architecture)
    assert (entry.train["lr"], entry.train["lr_decay_steps"]) == (pytest.approx(5e-4, rel=1e-12), 800)
    penalty = (
        {"l0_warm_up_steps": 200} if "jumprelu" in architecture else {"l1_coefficient": 2, "l1_warm_up_steps": 200}
    )
    assert entry.options == {
        "d_sae": 16384,
        "decoder_init_norm": 0.1,
        "b_dec_init": "mean",
        "normalize_activations": "expected_average_only_in",
        **penalty,
    }
    assert registry.training_config(architecture, 16, entry.options, "saes.0").problems() == {}


def test_every_architecture_is_tested() -> None:
    ours = [name for name, (made, _) in registry._CLASSES.items() if made.__module__.startswith("scale_sae.")]
    assert sorted(ours) == sorted([*TOP_K, *PENALISED])


def test_the_window_has_ten_steps_at_least() -> None:
    assert load({"d_sae": 64, "k": 4}).saes[0].train["dead_feature_window_tokens"] == 10 * BATCH


def test_what_is_given_wins_wherever_it_stands(tmp_path: Path) -> None:
    run = load(
        {"name": "a", "d_sae": 2048, "k": 8, "lr": 0.5, "aux_loss_coefficient": 0, "normalize_activations": "none"},
        {"name": "b", "d_sae": 2048, "k": 8},
        {"name": "c", "d_sae": 2048, "k": 8, "recipe": "saelens"},
        train={"lr": 0.25, "adam_eps": 1e-6, "lr_end": None},
    )
    a, b, c = (run.train_of(entry) for entry in run.saes)
    assert (a.lr, b.lr, c.lr) == (0.5, 0.25, 0.25)
    assert {train.adam_eps for train in (a, b, c)} == {1e-6}
    assert (a.lr_decay_steps, b.lr_decay_steps, c.lr_decay_steps) == (800, 800, 0)
    options = [entry.options for entry in run.saes]
    assert (options[0]["aux_loss_coefficient"], options[0]["normalize_activations"]) == (0, "none")
    assert [found["aux_loss_coefficient"] for found in options] == [0, 1.0, 1.0]
    assert [found["b_dec_init"] for found in options] == ["mean", "mean", "zeros"]
    path = tmp_path / "run.yaml"
    path.write_text("hookpoints: [a]\nsaes: [{d_sae: 2048, k: 8}]\n")
    again = config.load(path, {"train.lr": "1e-2", "saes.0.b_dec_init": "zeros"})
    assert (again.train_of(again.saes[0]).lr, again.saes[0].options["b_dec_init"]) == (1e-2, "zeros")


@pytest.mark.parametrize("recipe", ["default", "saelens"])
def test_a_resolved_config_is_filled_no_further(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load({"d_sae": 4096, "k": 8}, recipe=recipe)
    tree = json.loads(json.dumps(config.to_dict(run)))
    # Not by another version's recipes either.
    monkeypatch.setitem(DEFAULT, TopKTrainingSAE, lambda run: {"lr": 7.0, "decoder_init_norm": 7.0})
    monkeypatch.setattr(recipes, "_saelens", lambda run: {"lr": 7.0})
    assert config.from_dict(tree) == run


def test_warm_up_and_decay_fit_beside_what_is_given() -> None:
    for given, expected in (
        ({"lr_warm_up_steps": 3900}, (3900, 100)),
        ({"lr_decay_steps": 3900}, (100, 3900)),
        ({"lr_decay_steps": 0}, (200, 0)),
        ({"lr_decay_steps": 4000}, (0, 4000)),
    ):
        for where in ({"train": given}, given):
            keys = {"d_sae": 64, "k": 4, **({} if "train" in where else where)}
            run = load(keys, **(where if "train" in where else {}))
            train = run.train_of(run.saes[0])
            assert (train.lr_warm_up_steps, train.lr_decay_steps) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"recipe": "sealens"}, "recipe: 'sealens' is not one of default, saelens"),
        ({"saes": [{"d_sae": 8, "recipe": "best"}]}, "saes.0.recipe: 'best' is not"),
        ({"saes": [{"d_sae": 8, "architecture": "topkk"}]}, "saes.0.architecture: unknown architecture 'topkk'"),
        ({"train": {"adam_eps": 0}}, "train.adam_eps: 0.0 must be above 0"),
        ({"train": {"train_batch_size_tokens": 0}}, "train.train_batch_size_tokens: 0 must be above 0"),
        ({"train": {"training_tokens": 5}}, "train.training_tokens: 5 is less than one batch"),
    ],
)
def test_wrong_values_are_named(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.from_dict({"hookpoints": ["a"], "saes": [{"d_sae": 8, "k": 2}], **keys})
    assert str(caught.value).startswith(message)


def test_wrong_options_are_named() -> None:
    for name, value, message in (
        ("k_aux", 0, "must be at least 1"),
        ("k_aux", 1.5, "must be an integer or null"),
        ("b_dec_init", "median", "must be zeros or mean"),
    ):
        with pytest.raises(UserError, match=rf"^saes\.0\.{name}: {value!r} {message}"):
            training_config("topk", 16, {"d_sae": 64, "k": 4, name: value}, "saes.0")


# ---- runs that were made --------------------------------------------------------------------------------------------


def made(folder: Path, run: RunConfig) -> Path:
    """A run's folder with its config."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_dict(run)))
    return folder / "config.yaml"


def test_a_run_of_before_there_were_recipes_is_what_it_was(tmp_path: Path) -> None:
    """Its config has all training keys, and of the options only those that its file gave."""
    tree = config.to_dict(load({"d_sae": 64, "k": 4}, recipe="saelens", train={"lr": 0.5}))
    tree.pop("recipe")
    tree["saes"] = [{"architecture": "topk", "d_sae": 64, "k": 4}]
    saved = config.from_saved(tree)
    assert saved.saes[0].options == {"d_sae": 64, "k": 4} and saved.train_of(saved.saes[0]).lr == 0.5
    # To go on with it under another recipe is refused, by name.
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"^output_dir: .*saes\.0\.aux_loss_coefficient: absent != 1\.0"):
        rundir.check(config.from_dict({**tree, "output_dir": str(tmp_path / "run")}))


def test_a_run_with_other_recipes_is_refused_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"output_dir": str(tmp_path / "run")}
    path = made(tmp_path / "run", load({"d_sae": 2048, "k": 4}, **keys))
    rundir.check(load({"d_sae": 2048, "k": 4}, **keys))
    before = DEFAULT[TopKTrainingSAE]
    monkeypatch.setitem(DEFAULT, TopKTrainingSAE, lambda run: {**before(run), "lr": 7.0})
    with pytest.raises(UserError, match=r"saes\.0\.lr: 0\.0025 != 7\.0"):
        rundir.check(load({"d_sae": 2048, "k": 4}, **keys))
    rundir.check(config.load(path))


def test_a_run_grows_with_the_values_that_it_had(tmp_path: Path) -> None:
    keys = {"output_dir": str(tmp_path / "run")}
    path = made(tmp_path / "run", load({"d_sae": 2048, "k": 4}, **keys))
    longer = load({"d_sae": 2048, "k": 4}, train={"training_tokens": 2 * TOKENS}, **keys)
    with pytest.raises(UserError, match=r"^train\.training_tokens: .*saes\.0\.\w+: \d+ != \d+.*config\.yaml"):
        rundir.check(longer)
    rundir.check(config.load(path, {"train.training_tokens": 2 * TOKENS}))
    # Another width is no matter of length.
    with pytest.raises(UserError, match=r"^output_dir: .*another config"):
        rundir.check(replace(longer, saes=(replace(longer.saes[0], options={"d_sae": 4096, "k": 4}),)))


# ---- classes of one's own -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MineConfig(TopKTrainingSAEConfig):
    decoder_init_norm: float | None = 0.3

    @classmethod
    def architecture(cls) -> str:
        return "mine"


class Mine(TopKTrainingSAE):
    cfg: MineConfig


@dataclass(kw_only=True)
class BareConfig(TrainingSAEConfig):
    @classmethod
    def architecture(cls) -> str:
        return "topk"  # in whose form it is released


class Bare(TrainingSAE):
    cfg: BareConfig

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden_pre = x @ self.W_enc
        return hidden_pre.relu(), hidden_pre


def test_a_class_of_ones_own_has_the_recipe_of_its_base() -> None:
    theirs, mine = entry_of(k=100), entry_of(architecture="test_recipes:Mine")  # whose k is 100, TopK's default
    assert mine.train == theirs.train
    # But for what it has chosen itself.
    assert "decoder_init_norm" not in mine.options
    assert {**mine.options, "decoder_init_norm": 0.1, "k": 100} == theirs.options
    found = entry_of(architecture="test_recipes:Mine", recipe="saelens").options
    assert (found["decoder_init_norm"], found["b_dec_init"]) == (0.3, "zeros")


def test_a_class_that_derives_from_no_architecture_has_training_keys_alone() -> None:
    entry = entry_of(architecture="test_recipes:Bare")
    assert entry.options == {"d_sae": 16384}
    assert (entry.train["lr"], entry.train["lr_decay_steps"]) == (4e-4, 800)


# ---- SAELens's values -----------------------------------------------------------------------------------------------


def test_saelens_is_what_saelens_has() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(sae_lens.LanguageModelSAERunnerConfig)
    }
    run = load({"d_sae": 16384, "k": 8}, recipe="saelens")
    train = run.train_of(run.saes[0])
    same = (
        *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps", "n_restart_cycles"),
        *("adam_beta1", "adam_beta2", "feature_sampling_window"),
    )
    assert {name: getattr(train, name) for name in same} == {name: theirs[name] for name in same}
    assert train.dead_feature_window_tokens == theirs["dead_feature_window"] * BATCH
    assert train.adam_eps == torch.optim.Adam([torch.zeros(1)]).defaults["eps"]
    # Written out in its trainer's step.
    assert train.max_grad_norm == 1.0
    assert recipes._saelens(recipes.Run(16384, 32, TOKENS, BATCH)).keys() == {
        *same, "dead_feature_window_tokens", "adam_eps", "max_grad_norm"
    }  # fmt: skip


@pytest.mark.parametrize("architecture", TRAINED)
def test_options_of_saelens_are_those_of_its_classes(architecture: str) -> None:
    registered = pytest.importorskip("sae_lens.registry")
    theirs = registered.get_sae_training_class(architecture)[1]
    defaults = {field.name: field.default for field in dataclasses.fields(theirs)}
    names = ["decoder_init_norm", "normalize_activations"]
    expected = {name: defaults[name] for name in names} | {"b_dec_init": "zeros"}  # what it does, without a name for it
    penalty = ["aux_loss_coefficient", "l1_coefficient", "l1_warm_up_steps", "l0_warm_up_steps"]
    expected |= {name: defaults[name] for name in penalty if name in defaults}
    if architecture in TOP_K:
        expected |= {"k_aux": None}
    for name in (architecture, *(name for name, kind in TRANSCODERS.items() if kind == architecture)):
        options = entry_of(architecture=name, recipe="saelens").options
        assert {name: options[name] for name in recipes.OPTIONS & options.keys()} == expected


# ---- b_dec at the mean of the first rows ----------------------------------------------------------------------------

SCALED = {"normalize_activations": "expected_average_only_in", "b_dec_init": "mean"}
AT_MEAN: list[dict[str, Any]] = [
    {"name": "topk", "architecture": "topk", "k": 4, **SCALED},
    {**stream.TRANSCODER, **SCALED},
    {"name": "plain", "architecture": "standard", "b_dec_init": "mean", "normalize_activations": "none"},
    {"name": "normed", "architecture": "topk", "k": 4, "b_dec_init": "mean", "normalize_activations": "layer_norm"},
    {"name": "zeros", "architecture": "topk", "k": 4, "b_dec_init": "zeros"},
    {"name": "narrow", "architecture": "topk", "k": 4, **SCALED, "dtype": "bfloat16"},
]
FIRST = 2 * stream.CHUNK  # rows of the buffer's first filling
GRIDS: dict[str, dict[str, Any]] = {
    "tp=1": {"sae": {"tp": 1}},
    "tp=4": {"sae": {"tp": 4}},
    "dp=2, tp=2": {"sae": {"dp": 2, "tp": 2}, "engine": "fsdp2"},
}


def first_rows() -> dict[str, Tensor]:
    """Rows with means of their own; some do not count, and those after the first filling say nothing."""
    rows = stream.made_up_rows(4 * FIRST)
    rows[stream.IN] += torch.linspace(-2, 3, stream.WIDTH, dtype=torch.float64)
    rows[stream.OUT] = 0.2 * rows[stream.OUT] + torch.linspace(1, 0, stream.WIDTH, dtype=torch.float64)
    for x in rows.values():
        x[FIRST:] *= 5
    rows[stream.IN][5] *= 1000
    rows[stream.OUT][[6, 77]] = torch.nan
    return rows


def expected_b_dec(scales: dict[str, tuple[float, float]]) -> dict[str, Tensor]:
    """Written out: the mean over the rows that count, times the scale of the targets that the run has found."""
    counts = {stream.IN: torch.arange(FIRST) != 5, stream.OUT: ~torch.isin(torch.arange(FIRST), torch.tensor([6, 77]))}
    kept = {name: x[:FIRST][counts[name]] for name, x in first_rows().items()}
    x = kept[stream.IN]
    normed = (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-5)
    found = {"plain": x.mean(0), "normed": normed.mean(0), "zeros": torch.zeros(stream.WIDTH, dtype=torch.float64)}
    found |= {"topk": x.mean(0), "narrow": x.mean(0), "t": kept[stream.OUT].mean(0)}
    return {name: found[name] * scales[name][1] for name in scales}


Start = dict[str, tuple[Tensor, Tensor, tuple[float, float]]]


def starts(folder: Path, saes: list[dict[str, Any]], grid: str) -> list[Start]:
    """Per rank and SAE: what its optimizer has of b_dec before the first step, what the SAE has, the factors."""
    tree = config.to_dict(stream.config_of(folder, saes, 2 * stream.BATCH, buffer=FIRST))
    run = config.from_dict({**tree, "topology": {"lm": "colocated", **GRIDS[grid]}, "output_dir": str(folder / "run")})
    seen: Start = {}
    original = Trainer._start_from_rows

    def watch(trainer: Trainer) -> None:
        original(trainer)
        for job in trainer.jobs:
            b_dec = job.engine.parameters["b_dec"].detach().clone(), job.sae.b_dec.detach().clone()
            seen[job.spec.sae_id.rpartition("/")[2]] = (*b_dec, (job.scale.item(), job.target_scale.item()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_start_from_rows", watch)
        return stream.train(run, first_rows(), lambda trainer: seen)


def test_b_dec_starts_at_the_mean(tmp_path: Path) -> None:
    by_grid = {grid: starts(tmp_path / grid, AT_MEAN, grid) for grid in ("tp=1", "tp=4", "dp=2, tp=2")}
    (whole,) = by_grid["tp=1"]
    expected = expected_b_dec({name: scales for name, (_, _, scales) in whole.items()})
    assert whole["topk"][2][0] != 1 and whole["t"][2][0] != whole["t"][2][1]
    for name, (owned, used, _) in whole.items():
        if name == "narrow":  # float32 masters, which hold what bfloat16 loses
            assert (owned.dtype, used.dtype) == (torch.float32, torch.bfloat16)
            torch.testing.assert_close(owned, expected[name].float(), rtol=1e-6, atol=1e-6)
            assert torch.equal(used, owned.bfloat16()) and not torch.equal(used.float(), owned)
        else:
            # Sums of 96 rows in another order.
            torch.testing.assert_close(owned, expected[name], rtol=0, atol=1e-13)
            assert torch.equal(used, owned)
    for ranks in by_grid.values():
        for rank in ranks:
            for name, start in rank.items():
                assert all(torch.equal(a, b) for a, b in zip(start[:2], whole[name][:2], strict=True)), name


def test_b_dec_is_set_under_deepspeed(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    spec = resolve(stream.config_of(tmp_path, [{**AT_MEAN[0], "dtype": "float32"}], stream.BATCH))[1][0]
    mean = torch.linspace(-1, 1, stream.WIDTH, dtype=torch.float64)

    def worker(rank: int, world: int) -> list[Tensor]:
        sae = new_sae(spec, shard_in_grid(rank, 2, 1), torch.device("cpu"), 0)
        job = JobTrainer(spec, sae, 1, deepspeed={"zero_optimization": {"stage": 1}})
        job.set_scales(3.0, 3.0)
        job.set_b_dec(mean)
        return [tensor.detach().clone() for tensor in (job.engine.parameters["b_dec"], job.sae.b_dec)]

    for found in run_ranks(2, worker):
        assert all(torch.equal(tensor, (mean * 3).float()) for tensor in found)


def test_weights_that_are_loaded_keep_their_b_dec(tmp_path: Path) -> None:
    run = stream.config_of(tmp_path, [AT_MEAN[0]], stream.BATCH)
    spec = resolve(run)[1][0]
    made = [replace(spec, init_from=init_from) for init_from in (None, config.InitFrom("a/release"))]
    jobs = [JobTrainer(spec, new_sae(spec, Shard(), torch.device("cpu"), 0), 1) for spec in made]
    assert [job.starts_at_mean for job in jobs] == [True, False]


@pytest.mark.parametrize("scales", [False, True])
def test_the_library_sets_b_dec_from_the_batches_of_its_estimate(scales: bool) -> None:
    batches = [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)).double() + i for i in range(6)]
    batches[1][3, 2] = torch.inf
    options: dict[str, Any] = SCALED if scales else {"b_dec_init": "mean"}
    cfg = TopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, dtype="float64", **options)
    first = torch.cat(batches[:3])
    first = first[first.isfinite().all(1)]
    factor = 4 / first.norm(dim=1).mean() if scales else 1.0

    def start(rank: int, world: int, given: float) -> tuple[Tensor, int]:
        sae = TrainingSAE.from_dict(cfg.to_dict(), shard=Shard(rank, world))
        sae.b_dec.data.fill_(given)
        settings = SAETrainerConfig(24, 8, n_batches_for_norm_estimate=3)
        trainer = SAETrainer(settings, sae, iter(batches) if rank == 0 else None)
        trainer._start_from_rows()
        return sae.b_dec.data.clone(), trainer.n_samples_drawn

    for found, drawn in [start(0, 1, 0.0), *run_ranks(2, start, 0.0)]:
        torch.testing.assert_close(found, first.mean(0) * factor, rtol=0, atol=1e-13)  # sums in another order
        assert drawn == 24
    # What a script has set stays.
    found, drawn = start(0, 1, 0.5)
    assert (found == 0.5).all() and drawn == (24 if scales else 0)


# ---- k_aux and Adam's eps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_k_aux(tp: int) -> None:
    """Steps with 30 dead latents, of which k_aux are chosen, against the same written out; at last all are."""
    own = {"use_matryoshka_aux_loss": True}
    cases = [
        *(Case(kind, {"k_aux": 3}, n_dead=30) for kind in ("topk", "abstopk", "batchtopk_skip_transcoder")),
        Case("matryoshka_batchtopk", {"k_aux": 5, **own}, n_dead=30),
        Case("topk", {"k_aux": 40}, n_dead=30),
    ]
    steps = sharded_steps(tp, [our_step(case, torch.float64) for case in cases])
    for case, step in zip(cases, steps, strict=True):
        # Sums in another order, as in test_parity.
        assert_close(step, Plain(case, torch.float64).step(), 1e-12, case)
    losses = [float(step["auxiliary_reconstruction_loss"]) for step in steps]
    assert min(losses) > 0 and losses[0] != losses[4]


def test_k_aux_null_is_half_of_the_width() -> None:
    for architecture, width in (("topk", D_IN), ("batchtopk_transcoder", D_OUT)):
        cases = [Case(architecture, {"k_aux": k_aux}, n_dead=30) for k_aux in (None, width // 2)]
        null, half = (our_step(case, torch.float64)(Shard()) for case in cases)
        for found, expected in zip(null, half, strict=True):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


EPS = 0.03


@pytest.mark.parametrize("engine", ["local", "fsdp2", "deepspeed"])
def test_adam_s_eps(engine: str) -> None:
    """The first update of Adam is lr · g / (|g| + eps), whatever the betas: of matrices, of biases, in every engine."""
    if engine == "deepspeed":
        pytest.importorskip("deepspeed")
    dtype = torch.float32 if engine == "deepspeed" else torch.float64
    case, train = Case("topk"), TrainConfig(lr=0.01, adam_eps=EPS, max_grad_norm=1e9)
    whole = build(case, Shard(), dtype)
    before = {name: parameter.detach().clone() for name, parameter in whole.named_parameters()}
    loss = whole.training_forward_pass(step_input(whole, case, inputs(dtype))).loss
    grads = gradients(loss, dict(whole.named_parameters()))
    size = torch.cat([grad.abs().flatten() for grad in grads.values()])
    assert (size < EPS).any() and (size > EPS).any()

    def worker(rank: int, world: int) -> dict[str, Tensor]:
        dp = 1 if engine == "local" else 2
        sae = build(case, shard_in_grid(rank, dp, world // dp), dtype)
        if engine == "deepspeed":
            made = DeepSpeedEngine(sae, {"zero_optimization": {"stage": 1}}, train)
            optimizer: Optimizer = ZeroOptimizer(made, train, 1)
        else:
            mesh = DeviceMesh("cpu", list(range(dp))) if engine == "fsdp2" else None
            optimizer = Optimizer(FSDP2Engine(sae, mesh) if mesh else LocalEngine(sae), train, 1)
        rows = inputs(dtype).chunk(dp)[rank % dp]
        optimizer.step(optimizer.engine.training_forward_pass(step_input(sae, case, rows)).loss, 0, 1 / dp)
        return {name: parameter.detach().clone() for name, parameter in optimizer.engine.parameters.items()}

    parts = run_ranks(2, worker)
    for name, start in before.items():
        found = parts[0][name] if name in whole.replicated else torch.cat([part[name] for part in parts])
        moved = 0.01 * grads[name] / (grads[name].abs() + EPS)
        # Of a step of 0.01: gradients summed in another order, and in float32 the rounding of weights of about 1.
        torch.testing.assert_close(found, start - moved, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)

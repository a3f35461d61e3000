"""Recipes: what a config leaves out."""

import dataclasses
import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import runs
from harness import RankError
from saes_for_tests import (
    TRAINED,
    TRANSCODERS,
)
from scale_sae import TopKTrainingSAE, TopKTrainingSAEConfig, TrainingSAE, TrainingSAEConfig, config, recipes, rundir
from scale_sae.config import RunConfig, SAEEntry
from scale_sae.errors import UserError
from scale_sae.saes import registry, training_config

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
    return load({"d_sae": 8192, **NEEDED.get(keys.get("architecture", "topk"), {}), **keys}).saes[0]


# ---- what is filled in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", TOP_K)
def test_the_default_recipe_of_topk(architecture: str) -> None:
    entry = entry_of(architecture=architecture)
    # Of 4000 steps. The rate is for the hookpoint's width to say.
    assert entry.train == {
        "lr": None,
        "lr_warm_up_steps": 200,
        "lr_decay_steps": 800,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99 if architecture in ("topk", "abstopk") else 0.999,
        "adam_eps": 1e-8,
        "dead_feature_window_tokens": 153_600,  # 150 times the 8192 / 8 tokens between two firings
    }
    assert {name: entry.options[name] for name in entry.options.keys() & recipes.OPTIONS} == {
        "decoder_init_norm": 0.8 if architecture in ("topk", "abstopk") else 0.1,
        "b_dec_init": "mean",
        "normalize_activations": "expected_average_only_in",
        "aux_loss_coefficient": 1.0,
        "k_aux": 8 if architecture in ("topk", "abstopk") else None,
    }
    assert registry.training_config(architecture, 16, entry.options, "saes.0").problems() == {}


@pytest.mark.parametrize("architecture", PENALISED)
def test_the_default_recipe_of_the_others(architecture: str) -> None:
    entry = entry_of(architecture=architecture)
    assert (entry.train["lr"], entry.train["lr_decay_steps"]) == (None, 800)
    penalty = (
        {"l0_warm_up_steps": 200} if "jumprelu" in architecture else {"l1_coefficient": 2, "l1_warm_up_steps": 200}
    )
    assert entry.options == {
        "d_sae": 8192,
        "decoder_init_norm": 0.1,
        "b_dec_init": "mean",
        "normalize_activations": "expected_average_only_in",
        **penalty,
    }
    assert registry.training_config(architecture, 16, entry.options, "saes.0").problems() == {}


def test_every_architecture_is_tested() -> None:
    ours = [name for name, (made, _) in registry._CLASSES.items() if made.__module__.startswith("scale_sae.")]
    assert sorted(ours) == sorted([*TOP_K, *PENALISED])


@pytest.mark.parametrize(("architectures", "scale"), [(TOP_K, 0.04), (PENALISED, 0.016)])
def test_the_learning_rate_falls_with_both_widths(architectures: list[str], scale: float) -> None:
    for architecture in architectures:
        rate = partial(recipes.learning_rate, architecture)
        assert rate(256, 2048) == pytest.approx(scale / 16, rel=1e-12)
        assert rate(1024, 2048) == pytest.approx(scale / 32, rel=0.05)  # two digits
        assert rate(256, 16 * 2048) == pytest.approx(scale / 32, rel=0.05)
        assert rate(576, 2048) == pytest.approx(scale / 24, rel=0.05)


def test_the_window_has_ten_steps_at_least() -> None:
    assert load({"d_sae": 64, "k": 4}).saes[0].train["dead_feature_window_tokens"] == 10 * BATCH


def test_a_key_that_no_sae_would_take_is_refused(tmp_path: Path) -> None:
    """As with the config of a run's folder, in which entries go before `train`."""
    path = made(tmp_path / "run", load({"name": "a", "d_sae": 64, "k": 4}, {"name": "b", "d_sae": 64, "k": 4}))
    with pytest.raises(UserError, match=r"^train\.lr: 0\.5 changes nothing, .* set saes\.0\.lr"):
        config.load(path, {"train.lr": 0.5})
    assert config.load(path, {"saes.0.lr": 0.5}).saes[0].train["lr"] == 0.5
    assert config.load(path, {"train.training_tokens": 2 * TOKENS}).train.training_tokens == 2 * TOKENS
    tree = yaml.safe_load(path.read_text())
    del tree["saes"][1]["lr"]
    path.write_text(yaml.safe_dump(tree))
    assert config.load(path, {"train.lr": 0.5}).saes[1].train.get("lr", 0.5) == 0.5


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
    with pytest.raises(UserError, match=r"saes\.0\.lr: None != 7\.0"):
        rundir.check(load({"d_sae": 2048, "k": 4}, **keys))
    rundir.check(config.load(path))


def test_a_run_writes_down_the_rate_that_the_width_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = runs.tiny_config(tmp_path, recipe="default")
    tree["train"] = {"training_tokens": 20 * 128, "train_batch_size_tokens": 128}
    path = runs.write_config(tmp_path, tree)
    runs.forked_run(path, 1, {"logging.log_every_steps": 1})
    rates = [recipes.learning_rate("topk", 256, d_sae) for d_sae in (256, 512)]
    saved = tmp_path / "run/config.yaml"
    assert [entry["lr"] for entry in yaml.safe_load(saved.read_text())["saes"]] == rates
    # Of 20 steps one is warm-up.
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {line["sae_id"]: line["details/current_learning_rate"] for line in lines if line.get("step") == 1}
    assert [logged[f"model.layers.1/{name}"] for name in ("small", "wide")] == rates
    runs.forked_run(path, 1)
    # With its folder's config it goes on whatever the rule has become; with its own file the difference is named.
    monkeypatch.setattr(recipes, "learning_rate", lambda *_: 7.0)
    runs.forked_run(saved, 1)
    with pytest.raises(RankError, match="exit code 1"):
        runs.forked_run(path, 1)


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
    assert recipes.learning_rate("test_recipes:Mine", 256, 2048) == recipes.learning_rate("topk", 256, 2048)
    # But for what it has chosen itself.
    assert "decoder_init_norm" not in mine.options
    assert {**mine.options, "decoder_init_norm": 0.8, "k": 100} == theirs.options
    found = entry_of(architecture="test_recipes:Mine", recipe="saelens").options
    assert (found["decoder_init_norm"], found["b_dec_init"]) == (0.3, "zeros")


def test_a_class_that_derives_from_no_architecture_has_training_keys_alone() -> None:
    entry = entry_of(architecture="test_recipes:Bare")
    assert entry.options == {"d_sae": 8192}
    assert (entry.train["lr"], entry.train["lr_decay_steps"]) == (None, 800)
    assert recipes.learning_rate("test_recipes:Bare", 256, 8192) == 4e-4


# ---- SAELens's values -----------------------------------------------------------------------------------------------


def test_saelens_is_what_saelens_has() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(sae_lens.LanguageModelSAERunnerConfig)
    }
    run = load({"d_sae": 8192, "k": 8}, recipe="saelens")
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
    assert recipes._saelens(recipes.Run(8192, 32, TOKENS, BATCH)).keys() == {
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

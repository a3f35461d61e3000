"""The configs for real models: each is one that `train` would take, says what is true, and fits the GPUs that it names.

There is no network, so that the models are their architectures alone; nothing else is needed before weights are loaded.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import real_models
import runs
from scale_sae import plan, recipes
from scale_sae.activations.architecture import build_architecture
from scale_sae.cli import COMMANDS
from scale_sae.config import RunConfig, load
from scale_sae.planning.hardware import find
from scale_sae.planning.memory import items
from scale_sae.planning.workload import Workload

MODELS = tuple(real_models.ARCHITECTURES)
GIB = 2**30
PER_NODE = 8


def path_of(name: str) -> Path:
    return runs.ROOT / "configs" / f"{name}.yaml"


def comment_of(name: str) -> str:
    """The comment at the top of a config, as one line."""
    lines = path_of(name).read_text().splitlines()
    top = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    return re.sub(r" \\? +", " ", " ".join(line.removeprefix("#").strip() for line in top))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the architectures are: one for all tests, as what is known of a model is kept by its name."""
    return tmp_path_factory.mktemp("models")


@cache
def config_of(name: str, folder: Path) -> RunConfig:
    return load(path_of(name), {"model.name": str(real_models.write_architecture(name, folder))})


@cache
def workload_of(name: str, folder: Path) -> Workload:
    return Workload.of(config_of(name, folder))


def device_of(name: str) -> tuple[int, str]:
    """The GPUs that the config's call of the planner is for: their number, and what they are."""
    found = re.search(rf"scale_sae.plan --config configs/{name}.yaml --gpus (\d+) --device (\S+)", comment_of(name))
    assert found is not None
    return int(found[1]), found[2]


def slow_but(*quick: str) -> list[Any]:
    """Every model; those but ``quick`` take seconds to profile or to run."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in MODELS]


def options(**given: Any) -> dict[str, Any]:
    base = {"gpus": None, "gpus_per_node": PER_NODE, "device": None, "price": None, "search": False, "dry_run": False}
    return base | given


def test_every_config_has_its_model() -> None:
    embedded = {path.stem for path in (runs.ROOT / "configs").glob("*.yaml") if load(path).model.name == "embedded"}
    assert {path.stem for path in (runs.ROOT / "configs").glob("*.yaml")} - embedded == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_one_that_is_meant(name: str, folder: Path) -> None:
    parameters = build_architecture(config_of(name, folder).model).parameters()
    assert sum(parameter.numel() for parameter in parameters) == real_models.PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_as_many_ranks_as_the_comment_starts(name: str, folder: Path) -> None:
    comment = comment_of(name)
    nodes = re.search(r"sbatch --nodes (\d+)", comment)
    processes = re.search(r"--num_processes (\d+)", comment)
    launcher = re.search(r"--config_file (\S+)", comment)
    started = []
    if nodes is not None:
        started.append(PER_NODE * int(nodes[1]))
    if processes is not None:
        started.append(int(processes[1]))
    if launcher is not None:
        started.append(yaml.safe_load((runs.ROOT / launcher[1]).read_text())["num_processes"])
    world = workload_of(name, folder).plan.world_size
    assert started and {*started, device_of(name)[0]} == {world}


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_trained_and_the_groups_are_as_even_as_they_can_be(name: str, folder: Path) -> None:
    w = workload_of(name, folder)
    layers = build_architecture(w.config.model).config.num_hidden_layers
    assert len(w.specs) == len({spec.hookpoint for spec in w.specs}) == layers
    sizes = {len(group.jobs) for group in w.plan.groups}
    assert max(sizes) - min(sizes) <= 1


def bytes_per_latent_and_dimension(w: Workload) -> int:
    """Encoder and decoder: what a product reads, float32 masters beside bfloat16 weights, two Adam moments."""
    spec = w.specs[0]
    weights = {"float32": 4, "bfloat16": 2 + 4}[spec.cfg.dtype]
    return 2 * (weights + 2 * {"float32": 4, "bfloat16": 2}[spec.train.moments_dtype])


@pytest.mark.parametrize("name", MODELS)
def test_the_products_in_the_comment_are_right_and_the_first_is_of_this_config(name: str, folder: Path) -> None:
    w = workload_of(name, folder)
    found = re.findall(r"((?:\d+(?: SAEs| latents)? x )+\d+) bytes = ([\d.]+) (GiB|TiB)", comment_of(name))
    factors = [[int(part) for part in re.findall(r"\d+", product)] for product, _, _ in found]
    width = next(iter(w.widths.values()))
    assert factors[0] == [len(w.specs), w.specs[0].cfg.d_sae, width, bytes_per_latent_and_dimension(w)]
    for numbers, (_, amount, unit) in zip(factors, found, strict=True):
        digits = len(amount.partition(".")[2])
        assert round(math.prod(numbers) / (GIB if unit == "GiB" else 1024 * GIB), digits) == float(amount)


@pytest.mark.parametrize("name", MODELS)
def test_the_learning_rate_is_the_recipe_s(name: str, folder: Path) -> None:
    assert "All else is the recipe's" in comment_of(name) or "all else is the recipe's" in comment_of(name)
    tree, w = yaml.safe_load(path_of(name).read_text()), workload_of(name, folder)
    for spec in w.specs:
        tokens, batch = tree["train"]["training_tokens"], tree["train"]["train_batch_size_tokens"]
        run = recipes.Run(spec.cfg.d_sae, spec.cfg.to_dict()["k"], tokens, batch)
        values = recipes._top_k(run) if spec.architecture == "topk" else recipes._batch_top_k(run)  # and Matryoshka
        filled = {key: value for key, value in values.items() if key in recipes.TRAIN_KEYS}
        given = tree["train"].keys() & filled.keys()
        assert given <= {"dead_feature_window_tokens"}
        rate = 0.04 * (2048 / run.d_sae) ** 0.25 / spec.cfg.d_in**0.5
        assert spec.train.lr == pytest.approx(rate, rel=0.05)  # two digits
        filled["lr"] = spec.train.lr
        assert {key: getattr(spec.train, key) for key in filled} == {**filled, **{k: tree["train"][k] for k in given}}


@pytest.mark.parametrize("name", slow_but("gpt2", "pythia-160m", "llama-3.1-8b"))
def test_it_fits_the_gpus_that_it_names(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpus, device = device_of(name)
    code = plan.plan(config_of(name, folder), options(gpus=gpus, device=device), {})
    printed = capsys.readouterr().out
    assert code == 0 and ". It fits" in printed, printed


@pytest.mark.parametrize("name", slow_but("gpt2", "pythia-160m", "llama-3.1-8b"))
def test_weights_and_moments_take_what_the_comment_says(name: str, folder: Path) -> None:
    w = workload_of(name, folder)
    width = next(iter(w.widths.values()))
    for role in w.roles():
        if role.group is None:
            continue
        profile = plan.profile_of(w, w.config, find("h100", {})) if role.runs_lm else None
        held = {item.what: item.bytes for item in items(w, role, profile, "cuda")}
        share = len(role.group.jobs) * w.specs[0].cfg.d_sae * width // role.group.tp
        # Biases and thresholds come on top: a few numbers per latent, against its thousands of weights.
        wanted = share * bytes_per_latent_and_dimension(w)
        assert held["SAE parameters"] + held["optimizer state"] == pytest.approx(wanted, rel=5e-3)


def test_what_does_not_fit_names_the_key_to_change(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("llama-3.1-8b", folder)
    assert plan.plan(config, options(device="h100"), {"memory_gib": 20}) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize("name", slow_but("pythia-160m"))
def test_every_rank_gets_through_a_step_of_a_dry_run(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.plan(config_of(name, folder), options(dry_run=True), {}) == 0, capsys.readouterr().out


def test_the_guide_names_what_is_there() -> None:
    guide = (runs.ROOT / "docs/planning.md").read_text()
    files = set(re.findall(r"(?:configs|launch|slurm)/[\w.-]+\.(?:yaml|sbatch|sh)", guide))
    assert len(files) > len(MODELS) and not [file for file in files if not (runs.ROOT / file).is_file()]
    assert {f"configs/{name}.yaml" for name in MODELS} <= files
    commands = set(re.findall(r"-m scale_sae\.(\w+)", guide))
    assert commands and commands <= set(COMMANDS)


@pytest.mark.parametrize("name", MODELS)
def test_a_short_first_run_as_in_the_guide(name: str) -> None:
    guide = (runs.ROOT / "docs/planning.md").read_text()
    assert "--train.training_tokens=100_000_000" in guide
    run = load(path_of(name), {"train.training_tokens": "100_000_000"})
    train = run.train_of(run.saes[0])
    steps = train.training_tokens // train.train_batch_size_tokens
    # The schedule is that of the short run: the learning rate arrives, stays and decays.
    assert 0 < train.lr_warm_up_steps < steps - train.lr_decay_steps < steps

"""What the launcher and the files of DeepSpeed say about the engine, against what the run's config says."""

import json
from pathlib import Path
from typing import Any

import pytest

from scale_sae.config import RunConfig, from_dict
from scale_sae.engine_settings import check_jobs, deepspeed_settings
from scale_sae.errors import UserError
from scale_sae.jobs import resolve

ROOT = Path(__file__).parents[1]


def config_of(topology: dict[str, Any], **sae: Any) -> RunConfig:
    saes = [{"d_sae": 64, "k": 4, **sae}]
    return from_dict({"hookpoints": ["model.layers.1"], "saes": saes, "topology": topology})


def settings(topology: dict[str, Any], **environment: str) -> dict[str, Any] | None:
    return deepspeed_settings(config_of(topology).topology, environment)


def refusal(topology: dict[str, Any], **environment: str) -> str:
    with pytest.raises(UserError) as error:
        settings(topology, **environment)
    assert "\n" not in str(error.value)
    return str(error.value)


DEEPSPEED: dict[str, Any] = {"sae": {"dp": 2}, "engine": "deepspeed"}


def test_other_engines_have_none() -> None:
    assert settings({}) is None
    assert settings({"engine": "fsdp2"}, ACCELERATE_USE_FSDP="true") is None


@pytest.mark.parametrize("engine", ["local", "fsdp2"])
def test_a_launcher_for_deepspeed_and_another_engine(engine: str) -> None:
    said = refusal({"engine": engine}, ACCELERATE_USE_DEEPSPEED="true")
    assert said.startswith(f"topology.engine: '{engine}', but accelerate was asked for DeepSpeed")


@pytest.mark.parametrize("engine", ["local", "deepspeed"])
def test_a_launcher_for_fsdp_and_another_engine(engine: str) -> None:
    said = refusal({"engine": engine}, ACCELERATE_USE_FSDP="True")
    assert said.startswith(f"topology.engine: '{engine}', but accelerate was asked for FSDP")


def test_settings_come_from_the_config_or_the_launcher_or_are_zero1(tmp_path: Path) -> None:
    mine = str(ROOT / "launch/deepspeed/zero2.json")
    assert settings(DEEPSPEED) == {"zero_optimization": {"stage": 1}}
    assert settings({**DEEPSPEED, "deepspeed": mine}) == json.loads(Path(mine).read_text())
    assert settings(DEEPSPEED, ACCELERATE_DEEPSPEED_CONFIG_FILE=mine) == json.loads(Path(mine).read_text())
    same = settings({**DEEPSPEED, "deepspeed": mine}, ACCELERATE_DEEPSPEED_CONFIG_FILE=mine)
    assert same == json.loads(Path(mine).read_text())
    asked = settings(
        DEEPSPEED, ACCELERATE_DEEPSPEED_ZERO_STAGE="2", ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"
    )
    assert asked == {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    auto = tmp_path / "auto.json"
    auto.write_text(json.dumps({"zero_optimization": {"stage": 1}, "train_batch_size": "auto", "wall_clock": True}))
    assert settings({**DEEPSPEED, "deepspeed": str(auto)}) == {"zero_optimization": {"stage": 1}, "wall_clock": True}


def test_two_files_are_an_error_that_names_both() -> None:
    said = refusal({**DEEPSPEED, "deepspeed": "mine.json"}, ACCELERATE_DEEPSPEED_CONFIG_FILE="launched.json")
    assert "mine.json" in said and "launched.json" in said


def test_a_file_for_another_engine() -> None:
    assert refusal({"deepspeed": "mine.json"}).startswith("topology.deepspeed: mine.json is for topology.engine: dee")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"zero_optimization": {"stage": 3}}', "zero_optimization.stage is 3, and must be 1 or 2"),
        ("{}", "zero_optimization.stage is None"),
        ('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}', "gradient_clipping is set by train.max_grad"),
        ('{"zero_optimization": {"stage": 1}, "bf16": {"enabled": true}}', "bf16 is set by dtype of each SAE"),
        ('{"zero_optimization": {"stage": 1, "round_robin_gradients": true}}', "round_robin_gradients is not support"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "'nvme' must be cpu or none"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', "write {\"device\": 'cpu'}"),
    ],
)
def test_files_that_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    if text is not None:
        path.write_text(text)
    message = refusal({**DEEPSPEED, "deepspeed": str(path)})
    assert message.startswith(f"topology.deepspeed: {path}") and said in message


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload"])
def test_the_files_that_come_with_the_package(name: str) -> None:
    path = str(ROOT / f"launch/deepspeed/{name}.json")
    found = settings({**DEEPSPEED, "deepspeed": path})
    assert found is not None
    zero = found["zero_optimization"]
    assert zero["stage"] == int(name[4]) and ("offload_optimizer" in zero) == ("offload" in name)


@pytest.mark.parametrize(
    ("topology", "sae", "said"),
    [
        ({"sae": {"dp": 2, "tp": 2}, "engine": "deepspeed"}, {"d_sae": 60}, "d_sae: 60 must be a multiple of 2 x"),
        ({"sae": {"dp": 1, "tp": 2}, "engine": "deepspeed"}, {"d_sae": 62}, "x topology.sae.tp (4)"),
        (DEEPSPEED, {"dtype": "float64"}, "saes.0.dtype: float64, but topology.engine: deepspeed keeps float32"),
    ],
)
def test_saes_that_do_not_suit_the_engine(topology: dict[str, Any], sae: dict[str, Any], said: str) -> None:
    config = config_of(topology, **sae)
    with pytest.raises(UserError) as error:
        check_jobs(config.topology, resolve(config)[1])
    assert said in str(error.value) and "\n" not in str(error.value)

"""What the engine of a run needs besides its name, and whether the launcher and the SAEs suit it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scale_sae.config import TopologyConfig
from scale_sae.errors import UserError
from scale_sae.jobs import JobSpec

# accelerate tells the processes that it starts what it was asked for by these variables.
_ASKED = {
    "deepspeed": ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed (use_deepspeed)"),
    "fsdp2": ("ACCELERATE_USE_FSDP", "FSDP (use_fsdp)"),
}
# What a DeepSpeed file may hold beside ZeRO is about speed and logging; this is what the run's config says.
_OF_THE_RUN = {
    "optimizer": "train.lr, train.adam_beta1, train.adam_beta2",
    "scheduler": "train.lr_scheduler_name",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.train_batch_size_tokens",
    "train_micro_batch_size_per_gpu": "train.train_batch_size_tokens",
    "gradient_accumulation_steps": "train.train_batch_size_tokens",
    "gradient_allreduce_op": "nothing else: losses are weighted by their rows, and gradients summed",
    "fp16": "dtype of each SAE",
    "bf16": "dtype of each SAE",
    "amp": "dtype of each SAE",
}


def deepspeed_settings(topology: TopologyConfig, environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings of DeepSpeed for the ranks of a run; None for other engines.

    They come from the file ``topology.deepspeed``, else from what accelerate was given (a file, or its stage and
    offload options), else they are ZeRO-1.

    Args:
        topology: of the run.
        environment: what accelerate left in the environment of this process.

    Returns:
        What a DeepSpeed JSON file holds, with ``zero_optimization.stage`` 1 or 2.

    Raises:
        UserError: accelerate was asked for another engine than the run's config; the file is none of DeepSpeed's, has
            another stage, or says what the run's config says.
    """
    for engine, (variable, name) in _ASKED.items():
        if environment.get(variable, "false").lower() == "true" and topology.engine != engine:
            raise UserError(
                f"topology.engine: {topology.engine!r}, but accelerate was asked for {name}; set topology.engine: "
                f"{engine}, or launch with another accelerate config, such as launch/one_node_8_gpus.yaml"
            )
    path = topology.deepspeed
    if topology.engine != "deepspeed":
        if path is not None:
            raise UserError(
                f"topology.deepspeed: {path} is for topology.engine: deepspeed, which is {topology.engine}; remove one"
            )
        return None
    launched = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if launched != "none":
        if path is not None and Path(path).resolve() != Path(launched).resolve():
            raise UserError(
                f"topology.deepspeed: {path}, but accelerate was given {launched}; name one of them, or the same"
            )
        return _read(launched)
    if path is not None:
        return _read(path)
    zero: dict[str, Any] = {"stage": int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1"))}
    if (device := environment.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")) != "none":
        zero["offload_optimizer"] = {"device": device}
    return _checked({"zero_optimization": zero}, "of accelerate's options")


def _read(path: str) -> dict[str, Any]:
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"topology.deepspeed: {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"topology.deepspeed: {path} is no JSON: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"topology.deepspeed: {path} holds no JSON object; launch/deepspeed/zero1.json is an example")
    return _checked(settings, path)


def _checked(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings without what is left to others ("auto")."""
    settings = {key: value for key, value in settings.items() if value != "auto"}
    for key, place in _OF_THE_RUN.items():
        if key in settings:
            raise UserError(f"topology.deepspeed: {where}: {key} is set by {place}; remove it there")
    zero = settings.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2):
        raise UserError(
            f"topology.deepspeed: {where}: zero_optimization.stage is {stage}, and must be 1 or 2; parameters are "
            "divided by topology.sae.tp, or by topology.engine: fsdp2"
        )
    assert isinstance(zero, dict)
    for key in ("offload_param", "round_robin_gradients", "parameter_alignment", "zenflow"):
        if zero.get(key):
            raise UserError(f"topology.deepspeed: {where}: zero_optimization.{key} is not supported; remove it")
    offload = zero.get("offload_optimizer") or {}
    device = offload.get("device", "none") if isinstance(offload, dict) else offload
    if device not in ("none", "cpu"):
        raise UserError(
            f"topology.deepspeed: {where}: zero_optimization.offload_optimizer.device: {device!r} must be cpu or none"
        )
    if not isinstance(offload, dict):
        raise UserError(
            f'topology.deepspeed: {where}: zero_optimization.offload_optimizer: write {{"device": {offload!r}}}'
        )
    return settings


def check_jobs(topology: TopologyConfig, specs: Sequence[JobSpec]) -> None:
    """``UserError`` unless the latents and the dtype of every SAE suit the engine.

    That the ranks of a group divide the latents is checked with the config.
    """
    if topology.engine != "deepspeed":
        return
    # DeepSpeed's parts of a parameter are multiples of two elements; this makes them whole rows.
    parts = 2 * topology.sae.dp * topology.sae.tp
    for spec in specs:
        d_sae, dtype = spec.cfg.d_sae, spec.cfg.dtype
        if d_sae % parts:
            raise UserError(
                f"saes.{spec.entry}.d_sae: {d_sae} must be a multiple of 2 x topology.sae.dp x topology.sae.tp "
                f"({parts}) with topology.engine: deepspeed"
            )
        if dtype != "float32":
            raise UserError(
                f"saes.{spec.entry}.dtype: {dtype}, but topology.engine: deepspeed keeps float32; set it to float32, "
                "or topology.engine to fsdp2"
            )
        if spec.train.moments_dtype != "float32":
            raise UserError(
                f"saes.{spec.entry}.moments_dtype: {spec.train.moments_dtype}, but topology.engine: deepspeed keeps "
                "float32; set it to float32, or topology.engine to fsdp2"
            )

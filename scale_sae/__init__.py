"""scale_sae: sparse autoencoders trained on the activations of neural networks, sharded exactly over many ranks."""

import importlib
from typing import Any

from scale_sae.mixing_buffer import mixing_buffer
from scale_sae.saes import *  # noqa: F403
from scale_sae.saes import __all__ as _saes
from scale_sae.splice import splice

# mixing_buffer and splice are imported at once: else the modules of these names would stand in the functions' place.
# What needs more than torch and safetensors is imported when it is asked for: name → module.
_LATE = {
    "ActivationScaler": "activation_scaler",
    "CacheActivationsRunner": "runners",
    "CacheActivationsRunnerConfig": "runner_config",
    "DataProvider": "data_provider",
    "Evaluator": "sae_trainer",
    "LanguageModelSAERunnerConfig": "runner_config",
    "LanguageModelSAETrainingRunner": "runners",
    "LoggingConfig": "sae_trainer_config",
    "PretokenizeRunner": "pretokenize",
    "PretokenizeRunnerConfig": "pretokenize",
    "SAETrainer": "sae_trainer",
    "SAETrainerConfig": "sae_trainer_config",
    "launched_shard": "launched",
    "upload_saes_to_huggingface": "upload",
}

__all__ = ["mixing_buffer", "splice", *_saes, *_LATE]


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)

"""SAE architectures. Each is handed a Shard and never sees the topology."""

from scale_sae.saes.base import TrainingSAE, TrainingSAEConfig, TrainStepInput, TrainStepOutput
from scale_sae.saes.inference import SAE, SAEConfig, TopKSAE, TopKSAEConfig
from scale_sae.saes.registry import create, register_sae_training_class, training_class, training_config
from scale_sae.saes.topk import TopKTrainingSAE, TopKTrainingSAEConfig

register_sae_training_class("topk", TopKTrainingSAE, TopKTrainingSAEConfig)

__all__ = [
    "SAE",
    "SAEConfig",
    "TopKSAE",
    "TopKSAEConfig",
    "TopKTrainingSAE",
    "TopKTrainingSAEConfig",
    "TrainStepInput",
    "TrainStepOutput",
    "TrainingSAE",
    "TrainingSAEConfig",
    "create",
    "register_sae_training_class",
    "training_class",
    "training_config",
]

"""SAE architectures. Each is handed a Shard and never sees the topology."""

from scale_sae.saes.base import (
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from scale_sae.saes.batchtopk import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from scale_sae.saes.gated import GatedTrainingSAE, GatedTrainingSAEConfig
from scale_sae.saes.inference import SAE, SAEConfig, register_sae_class
from scale_sae.saes.jumprelu import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from scale_sae.saes.registry import create, register_sae_training_class, training_class, training_config
from scale_sae.saes.released import (
    AbsTopKSAE,
    AbsTopKSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from scale_sae.saes.standard import StandardTrainingSAE, StandardTrainingSAEConfig
from scale_sae.saes.topk import (
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from scale_sae.saes.transcoder import (
    BatchTopKSkipTrainingTranscoder,
    BatchTopKSkipTranscoderTrainingConfig,
    BatchTopKTrainingTranscoder,
    BatchTopKTranscoderTrainingConfig,
    JumpReLUSkipTrainingTranscoder,
    JumpReLUSkipTranscoderTrainingConfig,
    JumpReLUTrainingTranscoder,
    JumpReLUTranscoderTrainingConfig,
    SkipTrainingTranscoder,
    SkipTranscoderTrainingConfig,
    TrainingTranscoder,
    TranscoderTrainingConfig,
)

_TRAINED: list[tuple[type[TrainingSAE], type[TrainingSAEConfig]]] = [
    (StandardTrainingSAE, StandardTrainingSAEConfig),
    (GatedTrainingSAE, GatedTrainingSAEConfig),
    (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
    (TopKTrainingSAE, TopKTrainingSAEConfig),
    (AbsTopKTrainingSAE, AbsTopKTrainingSAEConfig),
    (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    (TrainingTranscoder, TranscoderTrainingConfig),
    (SkipTrainingTranscoder, SkipTranscoderTrainingConfig),
    (JumpReLUTrainingTranscoder, JumpReLUTranscoderTrainingConfig),
    (JumpReLUSkipTrainingTranscoder, JumpReLUSkipTranscoderTrainingConfig),
    (BatchTopKTrainingTranscoder, BatchTopKTranscoderTrainingConfig),
    (BatchTopKSkipTrainingTranscoder, BatchTopKSkipTranscoderTrainingConfig),
]
for _sae_class, _config_class in _TRAINED:
    register_sae_training_class(_config_class.architecture(), _sae_class, _config_class)

__all__ = [
    "SAE",
    "AbsTopKSAE",
    "AbsTopKSAEConfig",
    "AbsTopKTrainingSAE",
    "AbsTopKTrainingSAEConfig",
    "BatchTopKTrainingSAE",
    "BatchTopKTrainingSAEConfig",
    "GatedSAE",
    "GatedSAEConfig",
    "GatedTrainingSAE",
    "GatedTrainingSAEConfig",
    "JumpReLUSAE",
    "JumpReLUSAEConfig",
    "JumpReLUTrainingSAE",
    "JumpReLUTrainingSAEConfig",
    "MatryoshkaBatchTopKTrainingSAE",
    "MatryoshkaBatchTopKTrainingSAEConfig",
    "SAEConfig",
    "StandardSAE",
    "StandardSAEConfig",
    "StandardTrainingSAE",
    "StandardTrainingSAEConfig",
    "TopKSAE",
    "TopKSAEConfig",
    "TopKTrainingSAE",
    "TopKTrainingSAEConfig",
    "TrainCoefficientConfig",
    "TrainStepInput",
    "TrainStepOutput",
    "TrainingSAE",
    "TrainingSAEConfig",
    "create",
    "register_sae_class",
    "register_sae_training_class",
    "training_class",
    "training_config",
]

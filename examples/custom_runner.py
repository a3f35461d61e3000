"""A runner of your own, to start from: an SAE on any layer of any torch module. Here that is a small random MLP.

    python examples/custom_runner.py --output_path=my_sae
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 examples/custom_runner.py --output_path=my_sae

Replace ``_load_model``, ``_inputs`` and the defaults of the config. Both commands train the same SAE; the second shares
its latents over two processes, of which the first alone runs the model.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fire
import torch
from torch import Tensor, nn

from scale_sae import (
    ActivationScaler,
    DataProvider,
    Evaluator,
    LoggingConfig,
    SAETrainer,
    SAETrainerConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    launched_shard,
)


@dataclass
class MyCustomRunnerConfig:
    """Configuration of the runner."""

    # The model and the layer
    layer_name: str = "2"
    seed: int = 0

    # The SAE
    d_in: int = 64
    d_sae: int = 256
    k: int = 8
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"

    # Training
    training_samples: int = 100_000
    batch_size: int = 512
    lr: float = 1e-3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    log_to_wandb: bool = False

    # Output
    checkpoint_path: str | None = None
    output_path: str | None = None


class MyCustomRunner:
    """Trains an SAE on what one layer of the model puts out."""

    def __init__(self, cfg: MyCustomRunnerConfig):
        self.cfg = cfg
        self.shard = launched_shard()  # first: it gives each process its own GPU
        self.sae = self._create_sae()

    def _create_sae(self) -> TrainingSAE[Any]:
        cfg = self.cfg
        sae_cfg = TopKTrainingSAEConfig(
            d_in=cfg.d_in,
            d_sae=cfg.d_sae,
            k=cfg.k,
            dtype=cfg.dtype,
            normalize_activations="expected_average_only_in",
        )
        sae = TrainingSAE.from_dict(sae_cfg.to_dict(), shard=self.shard, seed=cfg.seed).to(cfg.device)
        sae.metadata["hook_name"] = cfg.layer_name
        return sae

    def _load_model(self) -> nn.Module:
        torch.manual_seed(self.cfg.seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, self.cfg.d_in), nn.GELU(), nn.Linear(64, 8))
        return model.to(self.cfg.device).eval()

    def _inputs(self) -> Iterator[Tensor]:
        """Batches of inputs of the model, without end."""
        while True:
            active = torch.rand(self.cfg.batch_size, 32) < 0.1
            yield 5 * torch.rand(self.cfg.batch_size, 32) * active

    def _create_data_provider(self) -> DataProvider:
        """Yields ``[n, d_in]``; the trainer cuts it into batches."""
        model = self._load_model()
        found: dict[str, Tensor] = {}

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found["acts"] = output.flatten(0, -2)

        model.get_submodule(self.cfg.layer_name).register_forward_hook(hook)
        for inputs in self._inputs():
            with torch.no_grad():
                model(inputs.to(self.cfg.device))
            yield found["acts"]

    def _create_evaluator(self) -> Evaluator[TrainingSAE[Any]] | None:
        def evaluator(
            sae: TrainingSAE[Any], data_provider: DataProvider, activation_scaler: ActivationScaler
        ) -> dict[str, Any]:
            """Called on every process, with the same batches; they are trained on afterwards."""
            x = activation_scaler(next(data_provider))
            acts = sae.encode(x)  # of this process's latents; sums over all of them go through the shard
            l0 = sae.shard.sum((acts != 0).sum(dim=-1)).double().mean()
            mse = (sae.decode(acts) - x).square().mean()
            return {"eval/mse": mse, "eval/l0": l0}

        return evaluator

    def run(self) -> TrainingSAE[Any]:
        cfg = self.cfg
        trainer_cfg = SAETrainerConfig(
            total_training_samples=cfg.training_samples,
            train_batch_size_samples=cfg.batch_size,
            device=cfg.device,
            lr=cfg.lr,
            lr_decay_steps=cfg.training_samples // cfg.batch_size // 5,
            dead_feature_window=50,
            n_batches_for_norm_estimate=10,
            checkpoint_path=cfg.checkpoint_path,
            logger=LoggingConfig(log_to_wandb=cfg.log_to_wandb, eval_every_n_wandb_logs=10),
        )
        trainer = SAETrainer(
            cfg=trainer_cfg,
            sae=self.sae,
            data_provider=self._create_data_provider() if self.shard.rank == 0 else None,
            evaluator=self._create_evaluator(),
        )
        trained_sae = trainer.fit()
        if cfg.output_path is not None:
            trained_sae.save_inference_model(cfg.output_path)
        return trained_sae


def main(**options: Any) -> None:
    MyCustomRunner(MyCustomRunnerConfig(**options)).run()


if __name__ == "__main__":
    fire.Fire(main)

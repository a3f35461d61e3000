"""An SAE on the patches of a vision transformer.

    python examples/vision_transformer.py --output_path=vision_sae
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 examples/vision_transformer.py

To try it anywhere, the model is a tiny ViT with random weights and the images are striped patterns. For a real one, see
``_load_model`` and ``_images``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import fire
import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

from scale_sae import (
    BatchTopKTrainingSAEConfig,
    LoggingConfig,
    SAETrainer,
    SAETrainerConfig,
    TrainingSAE,
    launched_shard,
    mixing_buffer,
)


@dataclass
class VisionSAEConfig:
    """Configuration of the runner."""

    layer_name: str = "layers.1"
    image_size: int = 32
    batch_size: int = 64  # images
    seed: int = 0

    # The SAE
    d_in: int = 48
    d_sae: int = 384
    k: float = 8
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"

    # Training
    training_tokens: int = 100_000  # patches
    train_batch_size: int = 512
    lr: float = 1e-3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    log_to_wandb: bool = False

    output_path: str | None = None


class VisionSAERunner:
    """Trains an SAE on the output of one layer, at every patch and the CLS token."""

    def __init__(self, cfg: VisionSAEConfig):
        self.cfg = cfg
        self.shard = launched_shard()
        sae_cfg = BatchTopKTrainingSAEConfig(
            d_in=cfg.d_in,
            d_sae=cfg.d_sae,
            k=cfg.k,
            dtype=cfg.dtype,
            normalize_activations="expected_average_only_in",
        )
        self.sae = TrainingSAE.from_dict(sae_cfg.to_dict(), shard=self.shard, seed=cfg.seed).to(cfg.device)
        self.sae.metadata |= {"hook_name": cfg.layer_name, "hf_hook_name": cfg.layer_name}

    def _load_model(self) -> ViTModel:
        """For a trained one: ``ViTModel.from_pretrained("google/vit-base-patch16-224")``, of width 768."""
        torch.manual_seed(self.cfg.seed)
        size = {"hidden_size": self.cfg.d_in, "num_hidden_layers": 2, "num_attention_heads": 4}
        vit = ViTConfig(**size, intermediate_size=96, image_size=self.cfg.image_size, patch_size=8)
        return ViTModel(vit, add_pooling_layer=False).to(self.cfg.device).eval()

    def _images(self) -> Iterator[Tensor]:
        """``[batch, 3, size, size]`` without end: stripes of random direction, width and colour."""
        draw = torch.Generator().manual_seed(self.cfg.seed)
        y, x = torch.meshgrid(*[torch.linspace(-1, 1, self.cfg.image_size)] * 2, indexing="ij")
        while True:
            angle, width = torch.rand(2, self.cfg.batch_size, 1, 1, 1, generator=draw) * 3
            colour = torch.rand(self.cfg.batch_size, 3, 1, 1, generator=draw)
            yield colour * torch.sin((x * angle.cos() + y * angle.sin()) * (2 + 5 * width))

    def _iterate_activations(self) -> Iterator[Tensor]:
        """Yields ``[images * (patches + 1), d_in]``."""
        model = self._load_model()
        found: dict[str, Tensor] = {}
        layer = model.get_submodule(self.cfg.layer_name)
        layer.register_forward_hook(lambda module, inputs, output: found.update(acts=output))
        for images in self._images():
            with torch.no_grad():
                model(images.to(self.cfg.device))
            yield found["acts"].flatten(0, 1)

    def run(self) -> TrainingSAE[Any]:
        cfg = self.cfg
        provider = None
        if self.shard.rank == 0:
            provider = mixing_buffer(8192, cfg.train_batch_size, self._iterate_activations(), seed=cfg.seed)
        trainer_cfg = SAETrainerConfig(
            total_training_samples=cfg.training_tokens,
            train_batch_size_samples=cfg.train_batch_size,
            device=cfg.device,
            lr=cfg.lr,
            dead_feature_window=50,
            n_batches_for_norm_estimate=10,
            logger=LoggingConfig(log_to_wandb=cfg.log_to_wandb),
        )
        trained_sae = SAETrainer(cfg=trainer_cfg, sae=self.sae, data_provider=provider).fit()
        if cfg.output_path is not None:
            trained_sae.save_inference_model(cfg.output_path)
        return trained_sae


def main(**options: Any) -> None:
    VisionSAERunner(VisionSAEConfig(**options)).run()


if __name__ == "__main__":
    fire.Fire(main)

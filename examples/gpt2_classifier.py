"""An SAE on a block of GPT-2 with a classification head, a model that the training command does not know.

    python examples/gpt2_classifier.py --output_path=classifier_sae
    accelerate launch --config_file launch/cpu.yaml --num_processes 2 examples/gpt2_classifier.py

To try it anywhere, the model is a tiny one with random weights, which reads bytes of made-up reviews. For a real one,
see ``_load_model`` and ``_texts``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import fire
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2ForSequenceClassification

from scale_sae import (
    DataProvider,
    LoggingConfig,
    SAETrainer,
    SAETrainerConfig,
    StandardTrainingSAEConfig,
    TrainingSAE,
    launched_shard,
    mixing_buffer,
)

PADDING = 256  # the first id after the bytes


@dataclass
class ClassifierSAERunnerConfig:
    """Configuration of the runner."""

    hook_layer: int = 1  # which block
    seed: int = 0

    # The SAE
    d_in: int = 64
    expansion_factor: int = 8
    l1_coefficient: float = 1.0
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"

    # Training
    training_tokens: int = 100_000
    train_batch_size: int = 512
    batch_size_prompts: int = 16
    context_size: int = 64
    n_batches_in_buffer: int = 8
    lr: float = 1e-3
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    log_to_wandb: bool = False

    output_path: str | None = None


class ClassifierSAERunner:
    """Trains an SAE on the output of one block, at the positions that are no padding."""

    def __init__(self, cfg: ClassifierSAERunnerConfig):
        self.cfg = cfg
        self.shard = launched_shard()
        sae_cfg = StandardTrainingSAEConfig(
            d_in=cfg.d_in,
            d_sae=cfg.d_in * cfg.expansion_factor,
            l1_coefficient=cfg.l1_coefficient,
            l1_warm_up_steps=20,
            dtype=cfg.dtype,
            normalize_activations="expected_average_only_in",
        )
        self.sae = TrainingSAE.from_dict(sae_cfg.to_dict(), shard=self.shard, seed=cfg.seed).to(cfg.device)
        # Where the SAE belongs: in TransformerLens's words, and by the name of the module in transformers.
        self.sae.metadata |= {
            "model_name": "gpt2",
            "hook_name": f"blocks.{cfg.hook_layer}.hook_resid_post",
            "hf_hook_name": f"transformer.h.{cfg.hook_layer}",
        }

    def _load_model(self) -> GPT2ForSequenceClassification:
        """For a trained one: ``GPT2ForSequenceClassification.from_pretrained``, and its tokenizer in ``_tokens``."""
        torch.manual_seed(self.cfg.seed)
        size = {"n_layer": 3, "n_embd": self.cfg.d_in, "n_head": 4, "n_positions": self.cfg.context_size}
        ids = {"vocab_size": PADDING + 1, "pad_token_id": PADDING, "bos_token_id": None, "eos_token_id": None}
        return GPT2ForSequenceClassification(GPT2Config(num_labels=2, **size, **ids)).to(self.cfg.device).eval()

    def _texts(self) -> list[str]:
        """For real ones: ``datasets.load_dataset("imdb", split="train")["text"]``."""
        things, verbs = ("film", "plot", "music", "cast", "ending", "script"), ("was", "is", "felt", "became")
        words = ("wonderful", "dull", "moving", "far too long", "a surprise", "forgettable", "brilliant", "confused")
        return [f"The {thing} {verb} {word}." for thing, verb, word in product(things, verbs, words)]

    def _tokens(self, texts: list[str]) -> Tensor:
        """int64 ``[texts, longest]``, filled up with padding."""
        rows = [torch.tensor(list(text.encode())[: self.cfg.context_size]) for text in texts]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)

    def _iterate_raw_activations(self) -> Iterator[Tensor]:
        """Yields ``[tokens, d_in]`` of one batch of texts after another, without end."""
        model, texts = self._load_model(), self._texts()
        found: dict[str, Tensor] = {}

        def hook(module: Any, inputs: Any, output: Any) -> None:
            found["acts"] = output[0] if isinstance(output, tuple) else output

        model.transformer.h[self.cfg.hook_layer].register_forward_hook(hook)
        draw = torch.Generator().manual_seed(self.cfg.seed)
        while True:
            chosen = torch.randperm(len(texts), generator=draw)[: self.cfg.batch_size_prompts]
            ids = self._tokens([texts[i] for i in chosen.tolist()]).to(self.cfg.device)
            kept = ids != PADDING
            with torch.no_grad():
                model(ids, attention_mask=kept.long())
            yield found["acts"][kept]

    def _create_data_provider(self) -> DataProvider:
        cfg = self.cfg
        return mixing_buffer(
            buffer_size=cfg.n_batches_in_buffer * cfg.batch_size_prompts * cfg.context_size,
            batch_size=cfg.train_batch_size,
            activations_loader=self._iterate_raw_activations(),
            seed=cfg.seed,
        )

    def run(self) -> TrainingSAE[Any]:
        cfg = self.cfg
        trainer_cfg = SAETrainerConfig(
            total_training_samples=cfg.training_tokens,
            train_batch_size_samples=cfg.train_batch_size,
            device=cfg.device,
            lr=cfg.lr,
            lr_warm_up_steps=10,
            n_batches_for_norm_estimate=10,
            logger=LoggingConfig(log_to_wandb=cfg.log_to_wandb, wandb_project="classifier-sae"),
        )
        provider = self._create_data_provider() if self.shard.rank == 0 else None
        trained_sae = SAETrainer(cfg=trainer_cfg, sae=self.sae, data_provider=provider).fit()
        if cfg.output_path is not None:
            trained_sae.save_inference_model(cfg.output_path)
        return trained_sae


def main(**options: Any) -> None:
    ClassifierSAERunner(ClassifierSAERunnerConfig(**options)).run()


if __name__ == "__main__":
    fire.Fire(main)

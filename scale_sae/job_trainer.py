"""One SAE in training on one rank: its shard, its engine and optimizer, what is counted of its latents."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from scale_sae import checkpoint
from scale_sae.collectives import Shard
from scale_sae.config import TrainConfig
from scale_sae.engines import FSDP2Engine, LocalEngine
from scale_sae.init_from import load_release
from scale_sae.jobs import JobSpec
from scale_sae.metrics import explained_variance, feature_density
from scale_sae.optim import Optimizer
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAE, TrainStepInput, TrainStepOutput
from scale_sae.saes.training_config import TrainCoefficientConfig
from scale_sae.zero import DeepSpeedEngine, ZeroOptimizer


class JobTrainer:
    """One SAE in training on this rank. All per-latent tensors are local rows.

    What is counted of the latents covers the rows of all dp ranks, and each dp rank has it of all of the shard's.

    Attributes:
        start: the first global latent of those whose rows this rank saves.
        scale, target_scale: float64 scalars, the factors that inputs and targets are multiplied by before they reach
            the SAE: 1, or with ``expected_average_only_in`` what the trainer found before the first step.
    """

    def __init__(
        self,
        spec: JobSpec,
        sae: TrainingSAE,
        total_steps: int,
        dp_mesh: DeviceMesh | None = None,
        deepspeed: Mapping[str, Any] | None = None,
    ):
        """Trains ``sae``, of ``spec.cfg`` and with its first weights, on the device where it is.

        ``dp_mesh``, of the ranks of ``sae.shard.dp``, makes the engine fsdp2; ``deepspeed``, its settings, deepspeed.
        With neither, it is local.
        """
        self.spec = spec
        self.sae = sae
        self.shard = sae.shard
        self.total_steps = total_steps
        device = sae.device
        self.coefficients = {
            name: value if isinstance(value, TrainCoefficientConfig) else TrainCoefficientConfig(value, 0)
            for name, value in self.sae.get_coefficients().items()
        }
        self.optimizer = _optimizer(self.sae, spec.train, total_steps, dp_mesh, deepspeed)
        self.engine = self.optimizer.engine
        self.start = self.sae.rows.start + self.engine.own.start
        n = self.sae.n_local
        self.tokens_since_fired = torch.zeros(n, dtype=torch.int64, device=device)
        self.fired_count = torch.zeros(n, dtype=torch.int64, device=device)
        self.window_tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.scale = torch.ones((), dtype=torch.float64, device=device)
        self.target_scale = torch.ones((), dtype=torch.float64, device=device)
        self.frozen = torch.zeros((), dtype=torch.bool)

    def load_release(self) -> None:
        """Takes the weights of the release that the config names, if it names one. UserError where they do not fit."""
        if self.spec.init_from is None:
            return
        # Into an SAE of its own: no rank waits for another here, of which one may fail alone.
        loaded = registry.create(self.spec.architecture, self.spec.cfg, self.shard, self.window_tokens.device)
        sae_id, key = checkpoint.folder_name(self.spec.sae_id), f"saes.{self.spec.entry}.init_from"
        load_release(loaded, self.spec.init_from, sae_id, key)
        self.engine.fill(loaded)

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are multiplied by a factor that is found in the data."""
        return bool(self.spec.cfg.normalize_activations == "expected_average_only_in")

    def set_scales(self, scale: float, target_scale: float) -> None:
        """Sets the factors of inputs and targets. Weights that were loaded are of unscaled ones, and are refitted."""
        self.scale.fill_(scale)
        self.target_scale.fill_(target_scale)
        if self.spec.init_from is not None:
            with self.engine.whole(changes=True):
                self.sae.fold_activation_norm_scaling_factor(1 / scale, 1 / target_scale)

    @property
    def starts_at_mean(self) -> bool:
        """Whether b_dec is to start at the mean of the first targets; weights that were loaded have their own."""
        return self.spec.cfg.b_dec_init == "mean" and self.spec.init_from is None

    @torch.no_grad()
    def set_b_dec(self, mean: Tensor) -> None:
        """Sets b_dec to ``mean [d_out]`` of the normalised targets, float64, times their factor."""
        self.engine.parameters["b_dec"].copy_(mean * self.target_scale)
        self.engine.follow({"b_dec"})

    def step(
        self, x: Tensor, target: Tensor, n_rows: int, step: int, is_logging_step: bool
    ) -> dict[str, Tensor | float]:
        """One update; returns metrics if it logs.

        Args:
            x: ``[n, d_in]``, this rank's rows.
            target: ``[n, d_out]``, what to reconstruct.
            n_rows: the rows of all dp ranks; this one may have none of them.
            step: the update, from 0.
            is_logging_step: whether metrics are wanted.
        """
        train = self.spec.train
        if step % train.feature_sampling_window == 0:
            self.fired_count.zero_()
            self.window_tokens.zero_()
        if not n_rows:
            return {}
        dead = self.tokens_since_fired > train.dead_feature_window_tokens
        # No latent can be dead before the window has passed once, and this is known without asking the device.
        may_be_dead = step * train.train_batch_size_tokens > train.dead_feature_window_tokens
        sae_in = self._scaled(x, self.scale)
        wanted = sae_in if target is x else self._scaled(target, self.target_scale)
        output = self.engine.training_forward_pass(
            TrainStepInput(
                sae_in=sae_in,
                target=wanted,
                coefficients={name: coefficient.at(step) for name, coefficient in self.coefficients.items()},
                dead_neuron_mask=dead,
                num_dead=int(self.shard.all_reduce(dead.sum())) if may_be_dead else 0,
                n_training_steps=step,
                is_logging_step=is_logging_step,
            )
        )
        # Before the update: activations that are made when they are asked for are those of these weights.
        own = _called(output.metrics) if is_logging_step else {}
        grad_norm = self.optimizer.step(output.loss, step, len(x) / n_rows)
        self.tokens_since_fired += n_rows
        fire_counts = self.shard.dp.all_reduce(output.fire_counts)
        self.tokens_since_fired.masked_fill_(fire_counts > 0, 0)
        self.fired_count += fire_counts
        self.window_tokens += n_rows
        return self._metrics(output, own, wanted, n_rows, grad_norm, dead, step) if is_logging_step else {}

    def as_released(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the release would make of this rank's rows ``x [n, d_in]``, while the engine holds parameters whole.

        Returns:
            The reconstruction ``[n, d_out]`` of targets as they come, and this shard's activations ``[n, n_local]``.
        """
        sae_in = self._scaled(x, self.scale)
        acts = self.sae.encode_as_released(sae_in)
        output = self.sae.add_skip(self.sae.decode(acts), sae_in)
        if not self.scales_inputs:
            return output, acts
        wide = output.to(torch.promote_types(output.dtype, torch.float32))
        return wide / self.target_scale.to(wide), acts / self.sae.activation_factor(float(self.target_scale))

    def _scaled(self, x: Tensor, scale: Tensor) -> Tensor:
        if not self.scales_inputs:
            return x.to(self.sae.dtype)
        # In float32 at least: a factor rounded to bfloat16 would not be the one that is folded into the release.
        wide = torch.promote_types(x.dtype, torch.float32)
        return (x.to(wide) * scale.to(wide)).to(self.sae.dtype)

    def _metrics(
        self,
        output: TrainStepOutput,
        own: dict[str, Tensor | float],
        target: Tensor,
        n_rows: int,
        grad_norm: Tensor,
        dead: Tensor,
        step: int,
    ) -> dict[str, Tensor | float]:
        active = self.shard.dp.all_reduce(output.active_latents)
        sums = self.shard.all_reduce(torch.stack([dead.sum(), self.tokens_since_fired.sum(), active]))
        losses = {"overall_loss": output.loss, **output.losses}
        return {
            **self._means({f"losses/{name}": value for name, value in losses.items()}, len(target) / n_rows),
            "metrics/explained_variance": explained_variance(target, output.sae_out, n_rows, self.shard.dp),
            "metrics/l0": sums[2] / n_rows,
            **self._means({f"metrics/{name}": value for name, value in own.items()}, len(target) / n_rows),
            "sparsity/dead_features": sums[0],
            "sparsity/mean_tokens_since_fired": sums[1] / self.spec.cfg.d_sae,
            "details/grad_norm": grad_norm,
            "details/skipped_updates": self.optimizer.skipped,
            **{f"details/{name}_coefficient": coefficient.at(step) for name, coefficient in self.coefficients.items()},
            **self._feature_density(step),
        }

    def _feature_density(self, step: int) -> dict[str, Tensor]:
        """How often the latents fired in the window that ``step`` ends, or nothing if it ends none."""
        if not ends_window(self.spec.train, step, self.total_steps):
            return {}
        # Every shard computes on all of the counts, so that the sums are the same bit for bit at any tp.
        return feature_density(self.shard.all_gather(self.fired_count).flatten(), self.window_tokens)

    def _means(self, values: Mapping[str, Tensor | float], share: float) -> dict[str, Tensor | float]:
        """Means over the rows of all dp ranks, of which a ``share`` is this rank's, from means over its own."""
        if not values:
            return {}
        device = self.window_tokens.device
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values.values()])
        means = self.shard.dp.sum_in_order(own * share if share else torch.zeros_like(own))
        return dict(zip(values, means, strict=True))

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def row_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds of this rank's latents: dim 0 is the latent, from ``start`` on."""
        return {name: self.engine.own_rows(tensor) for name, tensor in self._latent_tensors().items()}

    def _latent_tensors(self) -> dict[str, Tensor]:
        """Every tensor over latents: of all of the shard's, or of those whose rows this rank owns."""
        own = {name: tensor for name, tensor in self.tensors().items() if name not in self.sae.replicated}
        counters = {"tokens_since_fired": self.tokens_since_fired, "fired_count": self.fired_count}
        return {**own, **self.optimizer.row_tensors(), **counters}

    def tensors(self) -> dict[str, Tensor]:
        """The SAE's parameters, as this rank owns them, and its buffers."""
        return {name: tensor.data for name, tensor in (self.sae.tensors() | self.engine.parameters).items()}

    def replicated_tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds once per SAE."""
        own = {name: tensor for name, tensor in self.tensors().items() if name in self.sae.replicated}
        rest = {
            "window_tokens": self.window_tokens,
            "activation_scale": self.scale,
            "target_scale": self.target_scale,
            "frozen": self.frozen,
        }
        return {**own, **self.optimizer.replicated_tensors(), **rest}

    def load(self, folder: Path) -> None:
        """Takes up what a checkpoint holds of this SAE in ``folder``. Exchanges nothing with other ranks."""
        for name, tensor in self._latent_tensors().items():
            is_whole = len(tensor) == self.sae.n_local
            checkpoint.load_rows(folder, {name: tensor}, self.sae.rows.start if is_whole else self.start)
        for name, tensor in self.engine.followers().items():
            checkpoint.load_rows(folder, {name: tensor}, self.sae.rows.start)
        checkpoint.load_replicated(folder, self.replicated_tensors())
        self.engine.follow()

    def check_replicas(self) -> None:
        """``RuntimeError`` unless what is replicated is bit for bit the same on all shards and dp ranks."""
        for name, tensor in self.tensors().items():
            if name not in self.sae.replicated:
                continue
            high = self.shard.dp.all_reduce(self.shard.all_reduce(tensor, "max"), "max")
            low = self.shard.dp.all_reduce(self.shard.all_reduce(tensor, "min"), "min")
            if not torch.equal(high, low):
                raise RuntimeError(
                    f"{self.spec.sae_id}: {name} differs between the ranks; this is a defect, please report it"
                )


def new_sae(spec: JobSpec, shard: Shard, device: torch.device, seed: int) -> TrainingSAE:
    """This shard's part of a job's SAE, with its first weights."""
    sae = registry.create(spec.architecture, spec.cfg, shard, device)
    sae.initialize(seed, spec.hookpoint)
    return sae


def ends_window(train: TrainConfig, step: int, total_steps: int) -> bool:
    """Whether ``step``, from 0, is the last of a ``feature_sampling_window`` or of the run, and is to be logged."""
    return (step + 1) % train.feature_sampling_window == 0 or step + 1 == total_steps


def _optimizer(
    sae: TrainingSAE,
    train: TrainConfig,
    total_steps: int,
    dp_mesh: DeviceMesh | None,
    deepspeed: Mapping[str, Any] | None,
) -> Optimizer:
    """The optimizer of a filled SAE, with its engine."""
    if deepspeed is not None:
        return ZeroOptimizer(DeepSpeedEngine(sae, deepspeed, train), train, total_steps)
    return Optimizer(LocalEngine(sae) if dp_mesh is None else FSDP2Engine(sae, dp_mesh), train, total_steps)


def _called(metrics: dict[str, Tensor | float | int | Callable[[], Tensor | float | int]]) -> dict[str, Tensor | float]:
    """An SAE's own metrics, with those called that are functions."""
    return {name: value() if callable(value) else value for name, value in metrics.items()}

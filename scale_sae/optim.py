"""The optimizer of one SAE: clip-norm over all ranks, a guard against non-finite steps, Adam on own rows."""

import math
import zlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scale_sae import kernels
from scale_sae.engines import LocalEngine
from scale_sae.kernels.rows import AdamStep, RowGradient

if TYPE_CHECKING:  # reading config files needs more than torch
    from scale_sae.config import TrainConfig


def learning_rate(step: int, total_steps: int, train: "TrainConfig") -> float:
    """SAELens's schedule: linear warm-up, the main part, linear decay to 0.

    Args:
        step: the update, from 0.
        total_steps: updates of the whole run.
        train: gives lr, lr_end, lr_scheduler_name, n_restart_cycles, lr_warm_up_steps and lr_decay_steps.
    """
    lr = train.lr
    assert lr is not None, "a job's rate is a number"
    lr_end = lr / 10 if train.lr_end is None else train.lr_end
    warm_up, decay = train.lr_warm_up_steps, train.lr_decay_steps
    if step < warm_up:
        return lr * (step + 1) / warm_up
    if step >= total_steps - decay:
        start = lr if train.lr_scheduler_name == "constant" else lr_end
        return start * (total_steps - step) / decay
    if train.lr_scheduler_name == "constant":
        return lr
    cycles = train.n_restart_cycles if train.lr_scheduler_name == "cosineannealingwarmrestarts" else 1
    period = (total_steps - warm_up - decay) // cycles
    progress = (step - warm_up) % period / period
    return lr_end + (lr - lr_end) * (1 + math.cos(math.pi * progress)) / 2


def adam_of(groups: Iterable[Iterable[Tensor]], settings: "TrainConfig") -> torch.optim.Adam:
    """Adam for groups of parameters, with the constants of an SAE; `Update.prepare` sets the rate."""
    params = [{"params": list(group)} for group in groups]
    betas = (settings.adam_beta1, settings.adam_beta2)
    return torch.optim.Adam(params, betas=betas, eps=settings.adam_eps, fused=True)


@dataclass(frozen=True)
class Update:
    """What one step does to the parameters; all are scalar tensors but the learning rate.

    Attributes:
        norm: of the gradient over all ranks.
        clip: the factor of every gradient.
        skip: bool, whether parameters and moments stay as they are.
    """

    norm: Tensor
    clip: Tensor
    skip: Tensor
    rate: float

    def prepare(self, adam: torch.optim.Adam) -> None:
        """Sets the rate, clips the gradients that ``adam`` is about to use, tells it whether to skip them."""
        for group in adam.param_groups:
            group["lr"] = self.rate
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.clip.to(parameter.device))
        # Fused Adam leaves parameters and state alone where this is 1; it is how torch's gradient scaler skips.
        adam.found_inf = self.skip.to(torch.float32)  # type: ignore[attr-defined]


class Optimizer:
    """Adam for what one rank owns of one SAE.

    Attributes:
        skipped: int64 scalar tensor, the updates left out because the loss or the gradient was not finite.
    """

    def __init__(self, engine: LocalEngine, settings: "TrainConfig", total_steps: int):
        """The state exists from here on, as zeros, so that a checkpoint can be copied into it."""
        self.engine = engine
        self.sae = sae = engine.sae
        self.shard = sae.shard
        self.settings = settings
        self.total_steps = total_steps
        self.parameters = engine.parameters
        self.skipped = torch.zeros((), dtype=torch.int64, device=sae.b_dec.device)
        moments = {name: torch.bfloat16 for name in engine.matrices if settings.moments_dtype == "bfloat16"}
        self.state = {
            name: {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, dtype=moments.get(name)),
                "exp_avg_sq": torch.zeros_like(parameter, dtype=moments.get(name)),
            }
            for name, parameter in self.parameters.items()
        }
        others = self.parameters.keys() - engine.updated_elsewhere - set(engine.matrices)
        own = {name: parameter for name, parameter in self.parameters.items() if name in others}
        self.adam = adam_of([own.values()], settings)
        for name, parameter in own.items():
            self.adam.state[parameter] = self.state[name]

    def step(self, loss: Tensor, step: int, share: float = 1.0) -> Tensor:
        """Backward, clip, update, and drop the gradients.

        Args:
            loss: scalar, the same on every shard: a mean over this rank's rows.
            step: the update, from 0: sets the learning rate.
            share: how many of the rows of all dp ranks are this rank's: the weight of its loss. Without rows (0) the
                loss may be NaN.

        Returns:
            The gradient's norm over all ranks before clipping, scalar. Where it or a loss is not finite, nothing is
            updated and ``skipped`` grows by 1.
        """
        # Backward without rows too: its sums over the other ranks wait for this one.
        rows = self.engine.backward(loss * share)
        loss = self.shard.dp.sum_in_order(loss * share if share else torch.zeros_like(loss))
        update = self._update(rows, loss, step)
        self.skipped += update.skip
        return update.norm

    def _update(self, rows: Mapping[str, RowGradient], loss: Tensor, step: int) -> "Update":
        """Changes the parameters, unless the gradients or the ``loss`` of all rows are not finite."""
        norm = self._gradient_norm(rows)
        update = self._planned(norm, loss, learning_rate(step, self.total_steps, self.settings))
        for name, gradient in rows.items():
            self._update_rows(name, gradient, update, step)
        update.prepare(self.adam)
        self.adam.step()
        self.adam.zero_grad()
        self.engine.follow(self.engine.narrow.keys() - rows.keys())  # the rows' own have been written with them
        return update

    def _update_rows(self, name: str, gradient: RowGradient, update: "Update", step: int) -> None:
        """Adam, in the pass that sums a matrix's gradient."""
        state, weight = self.state[name], self.parameters[name]
        state["step"] += ~update.skip
        kernels.on(weight).adam_rows(
            gradient,
            weight.detach(),
            state["exp_avg"],
            state["exp_avg_sq"],
            AdamStep(
                step=state["step"],
                rate=update.rate,
                beta1=self.settings.adam_beta1,
                beta2=self.settings.adam_beta2,
                clip=update.clip,
                skip=update.skip,
                eps=self.settings.adam_eps,
                seed=zlib.crc32(f"{name} {step}".encode()),
                first=self.sae.rows.start + (self.engine.own.start if name in self.engine.divided else 0),
            ),
            self.engine.narrow.get(name),
        )

    def _planned(self, norm: Tensor, loss: Tensor, rate: float) -> "Update":
        clip = (self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        return Update(norm, clip, ~(loss.isfinite() & norm.isfinite()), rate)

    def row_tensors(self) -> dict[str, Tensor]:
        """Adam's moments of this rank's latents, ``adam.exp_avg.W_dec`` and so on: the latent is dimension 0."""
        return self._moments(self.parameters.keys() - self.sae.replicated)

    def replicated_tensors(self) -> dict[str, Tensor]:
        """What is the same on every rank: moments of replicated parameters, Adam's step counts, ``skipped``."""
        steps = {f"adam.step.{name}": state["step"] for name, state in self.state.items()}
        return self._moments(self.sae.replicated & self.parameters.keys()) | steps | {"skipped": self.skipped}

    def _moments(self, names: Set[str]) -> dict[str, Tensor]:
        return {
            f"adam.{moment}.{name}": self.state[name][moment]
            for name in sorted(names)
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def _gradient_norm(self, rows: Mapping[str, RowGradient], elsewhere: Tensor | None = None) -> Tensor:
        """Over all ranks, what several of them hold counted once; in float32 where gradients are narrower.

        ``rows`` are the gradients of matrices; ``elsewhere`` is the norm over all ranks of what another library
        updates.

        Summed in order: ranks whose norms differed in the last bit would clip what is replicated differently.
        """
        replicated = self.parameters.keys() & self.sae.replicated
        of_shard = self._squares(rows, self.parameters.keys() - replicated - self.engine.divided)
        if divided := self.engine.divided - self.engine.updated_elsewhere:
            of_shard += self.shard.dp.sum_in_order(self._squares(rows, divided))
        squares = self.shard.sum_in_order(of_shard) + self._squares(rows, replicated)
        return (squares if elsewhere is None else squares + elsewhere.square()).sqrt()

    def _squares(self, rows: Mapping[str, RowGradient], names: Set[str]) -> Tensor:
        dtype = torch.promote_types(self.sae.dtype, torch.float32)
        total = torch.zeros((), dtype=dtype, device=self.sae.b_dec.device)
        for name, parameter in self.parameters.items():
            if name not in names:
                continue
            if name in rows:
                total += kernels.on(parameter).row_squares(rows[name]).sum()
            elif parameter.grad is not None:
                total += torch.linalg.vector_norm(parameter.grad, dtype=dtype).square()
        return total

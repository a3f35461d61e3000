"""The engine deepspeed: ZeRO-1 or ZeRO-2 over the dp ranks, with optimizer state on the GPU or in CPU memory.

Every dp rank computes with whole parameters of its shard; DeepSpeed divides a float32 copy of them, the gradients and
Adam's state. It joins the parameters of a group of its optimizer to one vector, of which each rank gets an equal part.
Here each parameter is a group of its own, so that a rank's part is whole rows of it, ``own``, as with fsdp2: what the
rest of the package clips, saves and loads are views of these parts. What is replicated over tp, which is small, stays
with the optimizer of this package.

DeepSpeed calls the update of its parts between its reduction of gradients and its gathering of parameters; at that
place the gradients are clipped by the norm over everything, and an update that is not finite is skipped.
"""

import logging
import os
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.engines import DividingEngine, Step
from scale_sae.errors import UserError
from scale_sae.kernels.rows import RowGradient
from scale_sae.optim import Optimizer, Update, adam_of, learning_rate
from scale_sae.saes.base import TrainingSAE, TrainStepInput, TrainStepOutput

if TYPE_CHECKING:  # reading config files needs more than torch
    from scale_sae.config import TrainConfig


class DeepSpeedEngine(DividingEngine):
    """DeepSpeed's ZeRO over the dp ranks; the attributes are those of `LocalEngine`.

    Every rank of the SAE's group makes one at the same time. ``parameters`` holds views of the float32 copies for what
    is divided; the SAE's own tensors follow them at every update.
    """

    def __init__(self, sae: TrainingSAE, settings: Mapping[str, Any], train: "TrainConfig"):
        """Divides a filled float32 SAE.

        Args:
            sae: with the same weights on all dp ranks, whose number twice divides that of its latents.
            settings: what a DeepSpeed JSON file holds; see `engine_settings`.
            train: Adam's constants.
        """
        super().__init__(sae)
        deepspeed = _deepspeed(sae.b_dec.device)
        assert (self.own.stop - self.own.start) % 2 == 0, f"{sae.n_local} latents over {self.dp.size} ranks"
        self.updated_elsewhere = self.divided
        names = [name for name in self.parameters if name in self.divided]
        for name in names:
            sae.get_parameter(name).tensor_model_parallel = True  # type: ignore[attr-defined]  # for the norm
        self.adam = adam_of([[sae.get_parameter(name)] for name in names], train)
        try:
            self.model, self.zero, _, _ = deepspeed.initialize(
                # Its device, which it would otherwise take to be the one of the local rank's number.
                args=SimpleNamespace(device_rank=sae.b_dec.device.index or 0),
                model=Step(sae),
                optimizer=self.adam,
                mpu=Grid(sae.shard),
                dist_init_required=False,
                config=_config(settings),
            )
        except (ValueError, AssertionError) as error:
            lines = " ".join(str(error).split())
            raise UserError(f"topology.deepspeed: DeepSpeed refuses the settings: {lines}") from error
        # From here on, the groups hold this rank's parts.
        self.parts = {name: group["params"][0] for name, group in zip(names, self.adam.param_groups, strict=True)}
        for name, part in self.parts.items():
            whole = sae.get_parameter(name)
            assert part.numel() * self.dp.size == whole.numel(), f"{name}: DeepSpeed has filled up its parts"
            self.parameters[name] = part.detach().view(-1, *whole.shape[1:])

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        loss = self.model(step_input)
        self._keep_changes(self.sae.changed_in_step)
        output = self.model.module.take_output()
        output.loss = loss
        return output

    def _run_backward(self, loss: Tensor) -> None:
        self.model.backward(loss)

    @torch.no_grad()
    def fill(self, other: TrainingSAE) -> None:
        super().fill(other)
        for name, parameter in other.named_parameters():
            self.sae.get_parameter(name).copy_(parameter)

    def followers(self) -> dict[str, Tensor]:
        return {name: self.sae.get_parameter(name).data for name in self.divided}


class ZeroOptimizer(Optimizer):
    """The optimizer of an SAE under DeepSpeed: of what is replicated, and between DeepSpeed's two halves of a step."""

    engine: DeepSpeedEngine

    def __init__(self, engine: DeepSpeedEngine, settings: "TrainConfig", total_steps: int):
        super().__init__(engine, settings, total_steps)
        for name, part in engine.parts.items():
            state = self.state[name]
            moments = {key: state[key].view(-1) for key in ("exp_avg", "exp_avg_sq")}
            engine.adam.state[part] = {"step": state["step"], **moments}

    def _update(self, rows: Mapping[str, RowGradient], loss: Tensor, step: int) -> Update:
        assert not rows, "matrices that DeepSpeed does not update"
        rate = learning_rate(step, self.total_steps, self.settings)
        planned: list[Update] = []

        def before(adam: Any, args: Any, kwargs: Any) -> None:
            """At the first part, DeepSpeed knows the norm over all that it has."""
            if not planned:
                norm = self.engine.zero._global_grad_norm
                # Each dp rank has it from a tp group of its own, which may have added in another order.
                norm = self.engine.dp.all_gather(torch.as_tensor(norm, device=loss.device))[0]
                planned.append(self._planned(self._gradient_norm(rows, norm), loss, rate))
            planned[0].prepare(adam)

        hook = self.engine.adam.register_step_pre_hook(before)
        try:
            self.engine.model.step()
        finally:
            hook.remove()
        # It leaves its parts alone, and never asks, where that norm is not finite.
        update = planned[0] if planned else self._planned(torch.full_like(loss, torch.inf), loss, rate)
        update.prepare(self.adam)
        self.adam.step()
        self.adam.zero_grad()
        return update


class Grid:
    """The place of a rank in its SAE group, in the words that DeepSpeed asks for (Megatron's)."""

    def __init__(self, shard: Shard):
        self.shard = shard

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.shard.dp.group

    def get_data_parallel_world_size(self) -> int:
        return self.shard.dp.size

    def get_data_parallel_rank(self) -> int:
        return self.shard.dp.rank

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.shard.group

    def get_model_parallel_world_size(self) -> int:
        return self.shard.size

    def get_model_parallel_rank(self) -> int:
        return self.shard.rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def _config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The user's settings, and those that the run decides."""
    return {
        **settings,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31 - 1,
        # It would wait for all that the device has to do, twice a step.
        "timers": {"throughput": {"enabled": False}},
        # Of a "sample" DeepSpeed only counts; a step here is one call.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        # Losses come weighted by their rows.
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
    }


def _deepspeed(device: torch.device) -> Any:
    """The library, made to talk over the process groups that `topology.build` has made."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would take a GPU that the run was told to leave alone
    os.environ.setdefault("LOCAL_RANK", "0")  # which it asks for; a process without a launcher has none
    import deepspeed  # here, because it is slow, and not for the other engines

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # One that it raises at every launch, of torch's new names.
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor.* is deprecated", FutureWarning)
    if not deepspeed.comm.is_initialized():
        # Without GPUs it would compile an extension for a minute, which it uses for inference only.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.comm.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed

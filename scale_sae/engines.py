"""Engines: who owns an SAE's parameters while it trains, and how the dp ranks share its gradients.

An engine runs the SAE's step on whole parameters and leaves gradients beside ``parameters``, plain tensors that the
optimizer updates. So clipping, guard and Adam are one code path, whatever the engine.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from scale_sae.saes.base import TrainingSAE, TrainStepInput, TrainStepOutput


class LocalEngine:
    """Every rank owns all that it computes with: for dp = 1.

    Attributes:
        sae: what trains.
        parameters: what this rank updates, by name; ``backward`` fills the ``grad`` of each.
        divided: names of the parameters of which each dp rank has a part of the shard's rows; the others are whole.
        own: the latents of the shard, by their local numbers, whose rows this rank has and saves.
        updated_elsewhere: names of the parameters that another library clips and updates.
    """

    updated_elsewhere: frozenset[str] = frozenset()

    def __init__(self, sae: TrainingSAE):
        self.sae = sae
        self.parameters: dict[str, Tensor] = dict(sae.named_parameters())
        self.divided: frozenset[str] = frozenset()
        self.own = slice(0, sae.n_local)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The SAE's step on this rank's rows."""
        return self.sae.training_forward_pass(step_input)

    def backward(self, loss: Tensor) -> None:
        """Sums the gradients of every dp rank's ``loss``, scalar, which comes from the last forward pass."""
        loss.backward()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the SAE's parameters are whole, for reading and for changes in place."""
        yield

    @torch.no_grad()
    def fill(self, other: TrainingSAE) -> None:
        """Copies the parameters of another SAE of the same shape, which are whole."""
        for name, parameter in other.named_parameters():
            self.parameters[name].copy_(self.own_rows(parameter) if name in self.divided else parameter)

    def followers(self) -> dict[str, Tensor]:
        """Whole tensors that hold what ``parameters`` of the same name hold parts of, and follow at every update."""
        return {}

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor over the shard's latents, a view: of a whole one, or of one that is them."""
        return tensor[self.own] if len(tensor) == self.sae.n_local else tensor


class DividingEngine(LocalEngine):
    """What the engines share whose dp ranks divide the rows of the shard: equal, contiguous parts in rank order."""

    def __init__(self, sae: TrainingSAE):
        super().__init__(sae)
        self.dp = sae.shard.dp
        rows = sae.n_local // self.dp.size
        assert rows * self.dp.size == sae.n_local, f"{sae.n_local} latents over {self.dp.size} dp ranks"
        self.own = slice(self.dp.rank * rows, (self.dp.rank + 1) * rows)
        # The others are small: what is replicated over tp, and what libraries do not mix with the SAE's dtype.
        self.divided = frozenset(
            name for name, p in self.parameters.items() if name not in sae.replicated and p.dtype == sae.dtype
        )

    @torch.no_grad()
    def _keep_changes(self, names: Set[str] | None) -> None:
        """Takes what the SAE changed in place, in whole parameters of these names or (None) any, over to the parts."""
        for name in self.divided if names is None else self.divided & names:
            self.parameters[name].copy_(self.sae.get_parameter(name)[self.own])


class FSDP2Engine(DividingEngine):
    """torch's ``fully_shard`` over the dp ranks, which divide the rows of parameters, gradients and Adam state.

    Replicated parameters stay whole on every dp rank, and so do those of another dtype than the SAE's (a JumpReLU's
    thresholds beside bfloat16), which ``fully_shard`` does not mix: both are small.
    """

    def __init__(self, sae: TrainingSAE, mesh: DeviceMesh):
        """Divides a filled SAE.

        Args:
            sae: with the same weights on all ranks of ``mesh``; its latents must be a multiple of them.
            mesh: one-dimensional, the ranks of ``sae.shard.dp``.
        """
        super().__init__(sae)
        self.step = Step(sae)
        fully_shard(
            self.step,
            mesh=mesh,
            reshard_after_forward=False,  # backward follows at once
            # Sums of bfloat16 gradients over many ranks would lose what each of them adds.
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.promote_types(sae.dtype, torch.float32)),
            ignored_params={sae.get_parameter(name) for name in self.parameters.keys() - self.divided},
        )
        # Losses come weighted, so their gradients are summed and not averaged; sums are what every backend can do.
        self.step.set_gradient_divide_factor(1.0)  # type: ignore[operator]
        self.step.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        with torch.no_grad():
            for name in self.divided:
                self.parameters[name] = sae.get_parameter(name).to_local().detach()  # type: ignore[attr-defined]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        try:
            loss = self.step(step_input)
        except BaseException:
            self.step.reshard()  # type: ignore[operator]
            raise
        self._keep_changes(self.sae.changed_in_step)
        output = self.step.take_output()
        output.loss = loss
        return output

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for name, parameter in self.sae.named_parameters():
            if parameter.grad is None:
                continue
            if name in self.divided:
                self.parameters[name].grad = parameter.grad.to_local()  # type: ignore[attr-defined]
                parameter.grad = None
            else:
                parameter.grad = self.dp.sum_in_order(parameter.grad)

    @contextmanager
    def whole(self) -> Iterator[None]:
        self.step.unshard()  # type: ignore[operator]
        try:
            yield
            self._keep_changes(None)
        finally:
            self.step.reshard()  # type: ignore[operator]


class Step(nn.Module):
    """The SAE's step as the forward pass of a module, which is where libraries gather parameters."""

    def __init__(self, sae: TrainingSAE):
        super().__init__()
        self.sae = sae
        self.output: TrainStepOutput | None = None

    def forward(self, step_input: TrainStepInput) -> Tensor:
        """The loss alone: ``fully_shard`` looks into what is returned, and would ask for the dense activations."""
        self.output = self.sae.training_forward_pass(step_input)
        return self.output.loss.clone()  # no view, whatever the class returns

    def take_output(self) -> TrainStepOutput:
        """What the last forward pass returned, once."""
        output, self.output = self.output, None
        assert output is not None
        return output

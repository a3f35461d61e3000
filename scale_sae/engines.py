"""Engines: who owns an SAE's parameters while it trains, and how the dp ranks share its gradients.

An engine runs the SAE's step on whole parameters and finds the gradients of ``parameters``, plain tensors that the
optimizer updates. So clipping, guard and Adam are one code path, whatever the engine.
"""

from collections.abc import Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from scale_sae.kernels import plain
from scale_sae.kernels.rows import Collected, RowGradient
from scale_sae.saes.base import TrainingSAE, TrainStepInput, TrainStepOutput

_ROWS = 4096  # of a matrix that are compared at once: bounds the memory that it takes


class LocalEngine:
    """Every rank owns all that it computes with: for dp = 1.

    Where the SAE computes in a type narrower than float32, ``parameters`` are float32 copies: a step of the learning
    rate is often less than half of the last bit of a bfloat16. The SAE's own follow them at every update.

    Attributes:
        sae: what trains.
        parameters: what this rank updates, by name.
        divided: names of the parameters of which each dp rank has a part of the shard's rows; the others are whole.
        own: the latents of the shard, by their local numbers, whose rows this rank has and saves.
        updated_elsewhere: names of the parameters that another library clips and updates.
        narrow: parameters of the SAE that are whole and narrower than ``parameters``, by name.
    """

    updated_elsewhere: frozenset[str] = frozenset()

    def __init__(self, sae: TrainingSAE):
        self.sae = sae
        self.parameters: dict[str, Tensor] = dict(sae.named_parameters())
        self.own, self.divided = self._division()
        self.narrow: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if _is_narrow(parameter) and name not in self.divided:
                self.narrow[name] = parameter.detach()
                self.parameters[name] = parameter.detach().float()

    def _division(self) -> tuple[slice, frozenset[str]]:
        """``own`` and ``divided``; and where the backward pass leaves the gradients of large matrices."""
        self.sae.row_gradients = {"W_enc_rows": Collected(), "W_dec": Collected()}
        return slice(0, self.sae.n_local), frozenset()

    @property
    def matrices(self) -> list[str]:
        """Names of the parameters with a row per latent that are updated here."""
        names = self.parameters.keys() - self.sae.replicated - self.updated_elsewhere
        return [name for name, parameter in self.parameters.items() if name in names and parameter.dim() == 2]

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The SAE's step on this rank's rows."""
        output = self.sae.training_forward_pass(step_input)
        self._keep_changes(self.sae.changed_in_step)
        return output

    def backward(self, loss: Tensor) -> dict[str, RowGradient]:
        """Sums the gradients of every dp rank's ``loss``, scalar, which comes from the last forward pass.

        Returns:
            Those of ``matrices``, where there are any. The others are in the ``grad`` of ``parameters``.
        """
        self._run_backward(loss)
        found, matrices = {}, self.matrices
        for name, parameter in self.parameters.items():  # in one order on all ranks
            if name in self.updated_elsewhere:
                continue
            grad = self._take_grad(name)
            if name not in matrices:
                parameter.grad = None if grad is None else grad.to(parameter.dtype)
                continue
            collected = (self.sae.row_gradients or {}).get(name)
            gradient = None if collected is None else collected.take(len(parameter))
            if grad is not None:
                # A class may add terms of its own to what works on codes.
                gradient = RowGradient(extra_rows=grad if gradient is None else grad + plain.dense_rows(gradient))
            if gradient is not None:
                found[name] = gradient
        return found

    def _run_backward(self, loss: Tensor) -> None:
        loss.backward()

    def _take_grad(self, name: str) -> Tensor | None:
        """The dense gradient of this rank's rows of a parameter, over all dp ranks; the SAE has it no longer."""
        parameter = self.sae.get_parameter(name)
        grad, parameter.grad = parameter.grad, None
        return grad

    @torch.no_grad()
    def follow(self, names: Set[str] | None = None) -> None:
        """Takes changed ``parameters`` (None: all) over to the SAE's own, where these are narrower."""
        for name, follower in self.narrow.items():
            if names is None or name in names:
                follower.copy_(self.parameters[name])

    @torch.no_grad()
    def _keep_changes(self, names: Set[str] | None) -> None:
        """Takes what the SAE changed in place, in its own parameters of these names or (None) any, over to ours."""
        for name in self.divided | self.narrow.keys():
            if names is not None and name not in names:
                continue
            parameter, changed = self.parameters[name], self.sae.get_parameter(name).detach()
            if name in self.divided:
                changed = changed[self.own]
            if changed.dtype == parameter.dtype:
                parameter.copy_(changed)
                continue
            for kept, new in zip(parameter.split(_ROWS), changed.split(_ROWS), strict=True):
                # What is as we left it has not been changed, though it is not what we have.
                kept.copy_(torch.where(new == kept.to(new.dtype), kept, new.to(kept.dtype)))

    @contextmanager
    def whole(self, changes: bool) -> Iterator[None]:
        """Inside, the SAE's parameters are whole, for reading and, with ``changes``, for changes in place."""
        yield
        if changes:
            self._keep_changes(None)

    @torch.no_grad()
    def fill(self, other: TrainingSAE) -> None:
        """Copies the parameters of another SAE of the same shape, which are whole."""
        for name, parameter in other.named_parameters():
            self.parameters[name].copy_(self.own_rows(parameter) if name in self.divided else parameter)
        self.follow()

    def followers(self) -> dict[str, Tensor]:
        """Whole tensors that hold what ``parameters`` of the same name hold parts of, and follow at every update."""
        return {}

    def own_rows(self, tensor: Tensor) -> Tensor:
        """This rank's rows of a tensor over the shard's latents, a view: of a whole one, or of one that is them."""
        return tensor[self.own] if len(tensor) == self.sae.n_local else tensor


class DividingEngine(LocalEngine):
    """What the engines share whose dp ranks divide the rows of the shard: equal, contiguous parts in rank order."""

    def __init__(self, sae: TrainingSAE):
        self.dp = sae.shard.dp
        super().__init__(sae)

    def _division(self) -> tuple[slice, frozenset[str]]:
        sae = self.sae
        rows = sae.n_local // self.dp.size
        assert rows * self.dp.size == sae.n_local, f"{sae.n_local} latents over {self.dp.size} dp ranks"
        # The others are small: what is replicated over tp, and what libraries do not mix with the SAE's dtype.
        own = slice(self.dp.rank * rows, (self.dp.rank + 1) * rows)
        return own, frozenset(
            name for name, p in self.parameters.items() if name not in sae.replicated and p.dtype == sae.dtype
        )

    def _take_grad(self, name: str) -> Tensor | None:
        grad = super()._take_grad(name)
        return grad if grad is None or name in self.divided else self.dp.sum_in_order(grad)


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
        wide = torch.promote_types(sae.dtype, torch.float32)
        for name in self.divided:
            parameter = sae.get_parameter(name)
            parameter.data = parameter.data.to(wide)
        fully_shard(
            self.step,
            mesh=mesh,
            reshard_after_forward=False,  # backward follows at once
            # Gathered in the SAE's dtype; sums of bfloat16 gradients over many ranks would lose what each of them adds.
            mp_policy=MixedPrecisionPolicy(param_dtype=sae.dtype, reduce_dtype=wide),
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

    def _take_grad(self, name: str) -> Tensor | None:
        grad = super()._take_grad(name)
        return grad if grad is None or name not in self.divided else grad.to_local()  # type: ignore[attr-defined]

    @contextmanager
    def whole(self, changes: bool) -> Iterator[None]:
        self.step.unshard()  # type: ignore[operator]
        try:
            yield
            if changes:
                self._keep_changes(None)
        finally:
            self.step.reshard()  # type: ignore[operator]


def _is_narrow(parameter: Tensor) -> bool:
    return parameter.dtype.itemsize < torch.float32.itemsize


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

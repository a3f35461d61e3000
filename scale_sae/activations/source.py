"""Runs a model and takes the activations at the hookpoints, whole on every rank also where the model is split."""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from scale_sae.activations.architecture import (
    attach,
    auto_class,
    fill_pattern,
    first_line,
    input_name,
    inspect_model,
    kept_positions,
    match_hookpoints,
    model_path,
)
from scale_sae.activations.compiled import compile_between, is_compiler_error
from scale_sae.activations.device_map import MaxMemory
from scale_sae.activations.tensor_parallel import parallelize
from scale_sae.config import ModelConfig
from scale_sae.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ActivationSource", "fill_pattern", "inspect_model", "kept_positions", "match_hookpoints"]


class _Captured(Exception):
    """All hookpoints have been seen: the rest of the forward is not needed."""


class ActivationSource:
    """A model in eval mode and the activations at its hookpoints.

    Args:
        model: what to load, and in which dtype.
        hookpoints: hookpoint → width, from ``inspect_model``.
        device: where the model runs.
        mesh: the ranks that share the model, one-dimensional; all of them make a source and then call the same methods
            with the same inputs. They may be a part of the world. None, or one rank: not split.
        spread: what each of this rank's devices may hold (``device_map.max_memory``), for a model that is spread over
            them. ``device`` is then where inputs come from and activations go to.

    Attributes:
        model: the transformers model.
        forward_tokens: positions run by ``capture`` so far.

    Raises:
        UserError: the weights are missing or not in safetensors, or the model cannot be split over the mesh.
    """

    def __init__(
        self,
        model: ModelConfig,
        hookpoints: Mapping[str, int],
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
        spread: MaxMemory | None = None,
    ) -> None:
        self.hookpoints = dict(hookpoints)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.mesh = mesh if mesh is not None and mesh.size() > 1 else None
        self.forward_tokens = 0
        if spread is None:
            self.model = _load(model, self.dtype)
            if self.mesh is not None:
                parallelize(self.model, self.mesh, model.name)
            self.model.to(self.device)
        else:
            # For weights that fit on no device, where they cannot be read from the model's own files.
            folder = tempfile.mkdtemp(prefix="scale_sae_offload_")
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            # In a balanced map no GPU has more of the model than it must: activations take room too.
            placing = {"device_map": "balanced", "max_memory": dict(spread), "offload_folder": folder}
            self.model = _load(model, self.dtype, **placing)
        self._input_name = input_name(model)

    def compile(self) -> None:
        """Runs the model through torch.compile from now on; activations then differ by rounding."""
        compile_between(self.model, self.hookpoints)

    @torch.no_grad()
    def capture(self, inputs: Tensor) -> dict[str, Tensor]:
        """The activations at all hookpoints; what comes after the last of them is not computed.

        Args:
            inputs: token ids int64 ``[n, context]`` or pixel values ``[n, C, H, W]``.

        Returns:
            Hookpoint → ``[n, positions, width]`` in the model's dtype, whole and equal on every rank of the mesh.

        Raises:
            UserError: the model is split in a way in which a hookpoint's activation cannot be put together.
        """
        found: dict[str, Tensor] = {}

        def take(hookpoint: str) -> Callable[[Tensor], None]:
            def see(activation: Tensor) -> None:
                # A copy, since some models go on to add to a module's output in place (Falcon's parallel blocks do).
                found[hookpoint] = _arrived(activation).to(self.device, copy=True)
                if len(found) == len(self.hookpoints):
                    raise _Captured

            return see

        handles = [attach(self.model, hookpoint, take(hookpoint)) for hookpoint in self.hookpoints]
        try:
            self.forward(inputs)
        except _Captured:
            pass
        finally:
            for handle in handles:
                handle.remove()
        captured = {hookpoint: self._whole(hookpoint, found[hookpoint]) for hookpoint in self.hookpoints}
        first = next(iter(captured.values()))
        self.forward_tokens += first.shape[0] * first.shape[1]
        return captured

    @contextmanager
    def observe(self, hookpoint: str, see: Callable[[Tensor], object]) -> Iterator[None]:
        """While open, forwards call ``see`` with a copy of the activation ``[n, positions, width]``."""

        def look(activation: Tensor) -> None:
            see(self._whole(hookpoint, _arrived(activation)).to(self.device, copy=True))

        handle = attach(self.model, hookpoint, look)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replace(self, hookpoint: str, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """While open, forwards go on with ``fn(x)`` for the activation x ``[n, positions, width]``."""

        def see(activation: Tensor) -> Tensor:
            whole = self._whole(hookpoint, _arrived(activation)).to(self.device)
            return self._share(fn(whole).to(activation.device), activation)

        handle = attach(self.model, hookpoint, see)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """The logits of a full forward, ``[n, context, vocabulary]`` of a language model."""
        logits: Tensor = _arrived(self.forward(inputs).logits).to(self.device)
        return logits

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Any:
        """A full forward; returns transformers' output object. ``UserError`` where the model cannot be compiled."""
        dtype = self.dtype if inputs.is_floating_point() else inputs.dtype
        try:
            return self.model(**{self._input_name: inputs.to(self.device, dtype)})
        except Exception as error:
            if is_compiler_error(error):
                raise UserError(f"model.compile: true, but {first_line(error)}; set it to false") from error
            raise

    def _whole(self, hookpoint: str, activation: Tensor) -> Tensor:
        """``activation`` with all of its columns, gathered over the mesh where a rank has only its own."""
        if isinstance(activation, DTensor):
            return _arrived(activation.full_tensor())
        width, columns = self.hookpoints[hookpoint], activation.shape[-1]
        if columns == width:
            return activation
        if self.mesh is None or columns * self.mesh.size() != width:
            message = f"hookpoints: {hookpoint} has {columns} of {width} columns on an LM rank and cannot be gathered"
            raise UserError(f"{message}; use topology.lm.tp: 1 or another hookpoint")
        parts = [torch.empty_like(activation) for _ in range(self.mesh.size())]
        dist.all_gather(parts, activation.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim=-1)

    def _share(self, whole: Tensor, like: Tensor) -> Tensor:
        """The part of ``whole`` that this rank has in ``like``."""
        if isinstance(like, DTensor):
            return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
        if self.mesh is None or like.shape == whole.shape:
            return whole
        return whole.chunk(self.mesh.size(), dim=-1)[self.mesh.get_local_rank()]


def _load(model: ModelConfig, dtype: torch.dtype, **placing: Any) -> "PreTrainedModel":
    chosen = auto_class(model)
    try:
        network: PreTrainedModel = chosen.from_pretrained(
            model_path(model),
            revision=model.revision,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=model.trust_remote_code,
            **placing,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {model.name} cannot be loaded: {first_line(error)}") from error
    # A key-value cache would be filled and dropped in every forward.
    network.config.use_cache = False
    return network.eval().requires_grad_(False)


def _arrived(tensor: Tensor) -> Tensor:
    """``tensor`` once the collective that makes it is done."""
    return tensor.wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor

"""What a rank of the language model holds, computes and moves, found without weights.

The model is built and run once, as ``ActivationSource.capture`` runs it, on tensors that have shapes and no values, and
every operation is noted. Over several ranks it is split as in a run, in a world of which only this rank exists.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from scale_sae import topology
from scale_sae.activations.architecture import auto_class, build_architecture, first_line, input_name, model_path
from scale_sae.activations.source import ActivationSource
from scale_sae.activations.tensor_parallel import parallelize
from scale_sae.config import ModelConfig, RunConfig
from scale_sae.errors import UserError
from scale_sae.planning.flow import Flow
from scale_sae.planning.operations import Op, Operations, shapes_only
from scale_sae.topology import Group, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LMProfile", "Op", "bytes_while_loading", "profile"]

# What fake tensors raise where a value is needed.
BRANCHES = (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException)


@dataclass(frozen=True)
class LMProfile:
    """One rank of a copy of the language model, and what it does for one chunk.

    Attributes:
        tp: ranks that share the copy.
        weights: bytes of parameters and buffers that the rank keeps.
        weights_whole: those of the whole model, which every rank reads before it keeps its part.
        peak: most bytes that tensors have at once beside the weights while a chunk is captured and its rows are
            chosen; ``captured`` is included.
        captured: bytes of the activations of one chunk, whole at all hookpoints: the most that its rows take until they
            are sent.
        ops: each kind of operation, and how often it runs per chunk.
        flows: what the rank moves per chunk (``count`` is per chunk) on the link "LM tp".
    """

    tp: int
    weights: int
    weights_whole: int
    peak: int
    captured: int
    ops: tuple[tuple[Op, int], ...]
    flows: tuple[Flow, ...]

    @property
    def flops(self) -> int:
        """Of one chunk."""
        return sum(op.flops * count for op, count in self.ops)

    @property
    def bytes(self) -> int:
        """Read and written for one chunk."""
        return sum(op.bytes * count for op, count in self.ops)

    @property
    def n_ops(self) -> int:
        """Operations of one chunk."""
        return sum(count for _, count in self.ops)


def profile(config: RunConfig, widths: Mapping[str, int], kind: Literal["cuda", "cpu"] = "cuda") -> LMProfile:
    """One rank of a copy of the model as ``config.topology.lm`` splits it, and its work for a chunk.

    Args:
        config: the run's.
        widths: hookpoint → width, from ``inspect_model``.
        kind: of device, which decides how attention is computed.

    Returns:
        Of the first rank of a copy, which has the most where a size does not divide. With ``parallel: device_map`` the
        weights are those of all devices of the rank, over which whole layers are spread, and one device after the other
        computes. Eager operations: ``model.compile`` makes fewer of them and reads and writes less.

    Raises:
        UserError: the model's shapes depend on values.
    """
    data, tp = config.data, config.topology.lm.tp
    return _profile(config.model, tuple(widths.items()), data.chunk_contexts, data.context_size, tp, kind)


def bytes_while_loading(config: RunConfig, profile: LMProfile) -> int:
    """Host memory that a rank needs of its own until its weights are on its device.

    Files are mapped into memory, so that the ranks of a node share what they read, and the system may drop it again.
    A rank has of its own the part that it cuts out, or if ``model.dtype`` is not that of the files (what their
    config.json says) the whole model converted. With ``parallel: device_map`` layers go to their device one by one.
    """
    from transformers import AutoConfig

    model = config.model
    if config.topology.lm.parallel == "device_map":
        return 0
    keys = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    stored = AutoConfig.from_pretrained(model_path(model), **keys).dtype or torch.float32
    if stored != getattr(torch, model.dtype):
        return profile.weights_whole
    return profile.weights if profile.tp > 1 else 0


@functools.cache
def _profile(
    model: ModelConfig,
    widths: tuple[tuple[str, int], ...],
    contexts: int,
    context_size: int,
    tp: int,
    kind: Literal["cuda", "cpu"],
) -> LMProfile:
    config = build_architecture(model).config  # before tensors lose their values: it is kept for others
    with _mesh(tp) as mesh, shapes_only(kind) as operations:
        network = _weightless(model, config)
        whole = _weight_bytes(network)
        if mesh is not None:
            parallelize(network, mesh, model.name)
        source = _Source(network, model, dict(widths), mesh)
        weights = _weight_bytes(network)
        inputs = _inputs(model, config, contexts, context_size)
        try:
            if mesh is not None:
                source.capture(inputs)  # DTensors run an operation once more where they meet it first
            before = operations.held
            operations.restart()
            captured = source.capture(inputs)
        except BRANCHES as error:
            message = f"model.name: {model.name} computes what its activations' values decide, so that its memory and "
            raise UserError(
                f"{message}time cannot be planned ({first_line(error)}); measure them in a short run"
            ) from error
        sizes = [tensor.nbytes for tensor in captured.values()]
        kept = sum(sizes)
        rows = next(iter(captured.values())).shape[:2].numel()
        return LMProfile(
            tp=tp,
            weights=weights,
            weights_whole=whole,
            # Choosing the rows, by numbers of 8 bytes, copies one hookpoint after the other.
            peak=max(operations.peak - before, kept + max(sizes) + 8 * rows),
            captured=kept,
            ops=tuple(operations.ops.items()),
            flows=_flows(operations, tp),
        )


@contextmanager
def _mesh(tp: int) -> Iterator[DeviceMesh | None]:
    """The mesh of the first rank of a copy over ``tp`` ranks, in a world of one copy and one SAE rank."""
    if tp == 1:
        yield None
        return
    plan = Plan(tp + 1, False, (tuple(range(1, tp + 1)),), (Group(0, (0,), 1, 1, (), ()),), 1)
    with topology.fake_world(1, tp + 1) as store:
        yield topology.build(plan, 1, torch.device("cpu"), "fake", store).lm_mesh


def _weightless(model: ModelConfig, config: Any) -> "PreTrainedModel":
    """As ``source._load`` gives it, but for the weights."""
    from transformers.initialization import no_init_weights

    keys = {"dtype": getattr(torch, model.dtype), "trust_remote_code": model.trust_remote_code}
    with no_init_weights():  # some look at what they drew
        network: PreTrainedModel = auto_class(model).from_config(deepcopy(config), **keys)
    network.tie_weights()
    return network.eval().requires_grad_(False)


class _Source(ActivationSource):
    """Of a model that is already there."""

    def __init__(
        self, network: "PreTrainedModel", model: ModelConfig, widths: Mapping[str, int], mesh: DeviceMesh | None
    ):
        self.model = network
        self.hookpoints = dict(widths)
        self.device = torch.device("cpu")
        self.dtype = getattr(torch, model.dtype)
        self.mesh = mesh
        self.forward_tokens = 0
        self._input_name = input_name(model)


def _inputs(model: ModelConfig, config: Any, contexts: int, context_size: int) -> Tensor:
    """A chunk, as `scale_sae.activations.tokens` makes it."""
    if input_name(model) == "input_ids":
        # A token like any other: models look for padding, which is mostly the first or the last of the vocabulary.
        return torch.full((contexts, context_size), config.get_text_config().vocab_size // 2)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return torch.empty(contexts, config.num_channels, height, width)


def _weight_bytes(network: nn.Module) -> int:
    """Of what this rank has of all parameters and buffers, tied ones once."""
    tensors: Iterable[Tensor] = [*network.parameters(), *network.buffers()]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({id(storage): storage.nbytes() for storage in (tensor.untyped_storage() for tensor in local)}.values())


def _flows(operations: Operations, tp: int) -> tuple[Flow, ...]:
    return tuple(
        Flow(
            link="LM tp",
            what=f"{call.name.replace('_', '-')} in the model",
            op=call.name,
            bytes=call.bytes,
            count=count,
            ranks=tp,
            formula=call.formula,
        )
        for call, count in operations.collectives.items()
    )

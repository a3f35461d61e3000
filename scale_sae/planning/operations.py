"""Runs code on tensors that have shapes and no values, and notes what each operation computes, reads and writes."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter"]

# Whole numbers up to this many elements have values: positions and masks of a chunk, on which a model's code branches.
MOST_VALUES = 1 << 22
aten, functional = torch.ops.aten, torch.ops._c10d_functional
# They make a tensor without touching its memory.
EMPTY = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided}
# They read of their first tensor only what they give.
GATHERS = {aten.embedding, aten.index, aten.index_select, aten.gather}
# CUDA's fused attention: widths of a head are multiples of 16 bytes, or at most so many columns of half precision.
ALIGNMENT, MOST_FLASH_WIDTH = 16, 256
# Collective → its name, and the factors of its elements as ``Flow`` counts them, by what it is given and what it makes.
COLLECTIVES: dict[Any, tuple[CollectiveName, Callable[[list[Tensor], list[Tensor]], tuple[int, ...]]]] = {
    functional.all_reduce: ("all_reduce", lambda given, made: (2, *made[0].shape)),
    functional.all_reduce_: ("all_reduce", lambda given, made: (2, *made[0].shape)),
    functional.all_gather_into_tensor: ("all_gather", lambda given, made: tuple(made[0].shape)),
    functional.reduce_scatter_tensor: ("reduce_scatter", lambda given, made: tuple(given[0].shape)),
    torch.ops.c10d.allgather_: ("all_gather", lambda given, made: (len(made), *made[0].shape)),
}


def _grouped_mm(rows: Tensor, matrices: Tensor, *rest: Any) -> Tensor:
    """Of rows [n, a], each times one of [e, a, b]; torch's own rule takes no other dtype than bfloat16."""
    return rows.new_empty(len(rows), matrices.shape[-1])


def _grouped_flops(rows: Tensor, *rest: Any, out_val: Tensor, **keys: Any) -> int:
    return 2 * out_val.numel() * rows.shape[-1]


RULES: dict[Any, Callable[..., Tensor]] = {aten._grouped_mm: _grouped_mm}
FLOPS: dict[Any, Callable[..., int]] = {**flop_registry, aten._grouped_mm: _grouped_flops}


@dataclass(frozen=True)
class Op:
    """One operation. ``flops``: 2 per multiply-add of its matrix products; ``bytes``: of what it reads and writes."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class Collective:
    """One collective on ``dtype``; the product of ``factors`` is the number of elements, as ``Flow`` counts bytes."""

    name: CollectiveName
    factors: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.factors) * self.dtype.itemsize

    @property
    def formula(self) -> str:
        return f"{' x '.join(map(str, self.factors))} x {self.dtype.itemsize} bytes"


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Of all ``tensors``; of an expanded one what it has in memory."""
    return sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in tensors)


class Operations(TorchDispatchMode):
    """Notes the operations on this rank's own tensors while it is open, inside a ``FakeTensorMode``.

    Attributes:
        ops: operation → how often.
        collectives: collective → how often.
        held: bytes of the tensors that are alive, of those that were made while this was open.
        peak: most that ``held`` was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[Op] = Counter()
        self.collectives: Counter[Collective] = Counter()
        self.held = self.peak = 0
        self.alive: dict[int, weakref.ref[UntypedStorage]] = {}

    def restart(self) -> None:
        """Forgets all but what is held."""
        self.ops.clear()
        self.collectives.clear()
        self.peak = self.held

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # They call operations on their local tensors, which then come here.
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        if func.overloadpacket is functional.wait_tensor:
            return args[0]  # as it is with values
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        result = RULES[func.overloadpacket](*args) if func.overloadpacket in RULES else _run(func, given, args, kwargs)
        made = _tensors(result)
        if made:
            self._note(func, given, made, args, kwargs, result)
        for tensor in made:
            self._hold(tensor.untyped_storage())
        return result

    def _note(
        self, func: Any, given: list[Tensor], made: list[Tensor], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        packet = func.overloadpacket
        if packet in COLLECTIVES:
            name, factors = COLLECTIVES[packet]
            self.collectives[Collective(name, factors(given, made), made[0].dtype)] += 1
            return
        before = {id(tensor.untyped_storage()) for tensor in given}
        is_view = not func._schema.is_mutable and all(id(tensor.untyped_storage()) in before for tensor in made)
        if is_view or packet in EMPTY:
            return
        assert func.namespace not in ("c10d", "_c10d_functional"), f"{func} is a collective that is not counted"
        count = FLOPS.get(packet)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        read = given[1:] + made if packet in GATHERS else given
        self.ops[Op(flops, nbytes(read) + nbytes(made))] += 1

    def _hold(self, storage: UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.alive:
            return

        def gone(reference: object) -> None:
            del self.alive[key]
            self.held -= size

        self.alive[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _run(func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``func``'s result: with values where they follow from the code alone and are few, else without."""
    if any(isinstance(tensor, FakeTensor) for tensor in given):
        return func(*args, **kwargs)
    if not given:
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.is_floating_point() or result.numel() > MOST_VALUES:
            return result
    elif _numel(given) > MOST_VALUES:
        return func(*args, **kwargs)
    with unset_fake_temporarily():
        return func(*args, **kwargs)


def _numel(tensors: list[Tensor]) -> int:
    """Elements of an elementwise operation's result."""
    try:
        return torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel()
    except RuntimeError:  # it is of another kind
        return max(tensor.numel() for tensor in tensors)


# ---- attention -------------------------------------------------------------------------------------------------------


def is_fused(kind: Literal["cuda", "cpu"], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether ``scaled_dot_product_attention`` on such a device keeps no matrix [query, key] in memory.

    On GPUs the rules of flash and memory-efficient attention (``can_use_flash_attention`` and
    ``can_use_mem_efficient_attention`` in torch's aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    widths = {query.shape[-1], key.shape[-1], value.shape[-1]}
    if query.ndim != 4:
        return False
    if kind == "cpu":
        return len(widths) == 1
    half = query.dtype in (torch.bfloat16, torch.float16)
    flash = half and mask is None and len(widths) == 1 and max(widths) <= MOST_FLASH_WIDTH
    aligned = all(width * query.element_size() % ALIGNMENT == 0 for width in widths)
    efficient = (half or query.dtype == torch.float32) and query.shape[1] == key.shape[1] and aligned
    return flash or efficient


def attention_flops(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> int:
    """Of both products of fused attention, which leaves out what a causal mask hides."""
    *batch, n, width = query.shape
    pairs = n * (n + 1) // 2 if is_causal else n * key.shape[-2]
    return 2 * int(torch.Size(batch).numel()) * pairs * (width + value.shape[-1])


class Attention(TorchFunctionMode):
    """While open, fused attention is noted as one operation, as a device of ``kind`` would compute it."""

    def __init__(self, operations: Operations, kind: Literal["cuda", "cpu"]):
        super().__init__()
        self.operations = operations
        self.kind: Literal["cuda", "cpu"] = kind

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if not is_fused(self.kind, query, key, value, attn_mask):
            with sdpa_kernel(SDPBackend.MATH):
                return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        # Laid out like the query, whose heads lie side by side, so that the model's next transpose copies nothing.
        batch, heads, n, width = query.shape
        if value.shape[-1] == width:
            result = torch.empty_like(query)
        else:
            result = query.new_empty(batch, n, heads, value.shape[-1]).transpose(1, 2)
        touched = [query, key, value, result, *([] if attn_mask is None else [attn_mask])]
        self.operations.ops[Op(attention_flops(query, key, value, is_causal), nbytes(touched))] += 1
        return result


@contextmanager
def shapes_only(kind: Literal["cuda", "cpu"]) -> Iterator[Operations]:
    """While open, tensors have shapes and no values, and all operations are noted.

    Whole numbers that follow from the code alone (positions, masks) have values, since models branch on them. Tensors
    are on the CPU in name, attention is that of ``kind``.
    """
    operations = Operations()
    fake = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with torch.no_grad(), fake, operations, Attention(operations, kind):
        yield operations

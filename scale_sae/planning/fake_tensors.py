"""Runs the code of a rank on tensors that have shapes and no values (torch's meta tensors), and with nobody to talk to.

What the host computes for itself (which rows a lane takes, headers, schedules) is computed as in a run. What a device
would hold has a shape, a dtype and a place in the sum of bytes. A value that is asked for is answered: 1.0, of whole
numbers 0, zeros for a copy on the host, and for a mask as many entries as it had where it came from the host, else all
or a given most. ``all`` is true and ``any`` false, as where everything is finite; what is compared of single numbers
follows from their answers. The kernels are replaced by what they return.
"""

import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from scale_sae import interleave, kernels
from scale_sae.kernels import dense
from scale_sae.kernels.rows import RowGradient
from scale_sae.planning.operations import RULES, is_fused
from scale_sae.saes.base import TrainingSAE

# torch.optim has something else of this name.
optimizer: Any = importlib.import_module("torch.optim.optimizer")
META = torch.device("meta")
aten = torch.ops.aten


class Shapes(TorchDispatchMode):
    """Answers for values that do not exist, while it is open, and counts the bytes of meta tensors.

    Attributes:
        held: bytes of the meta tensors that are alive, of those that were made while this was open.
        peak: most that ``held`` was.
    """

    def __init__(self, collective: Callable[[str, Sequence[Tensor], str], None] = lambda op, tensors, group: None):
        """``collective`` is told of each of torch's functional collectives: its name, its tensors, its group's name."""
        super().__init__()
        self.collective = collective
        self.held = self.peak = 0
        self.counts = True
        self.alive: dict[int, weakref.ref[UntypedStorage]] = {}
        self.sizes: dict[int, int] = {}
        self.true: Any = WeakIdKeyDictionary()  # mask that came from the host → its entries that are true
        self.here = threading.local()

    @property
    def most(self) -> int | None:
        """Of the entries of a mask that are true, for this thread; None: all."""
        return getattr(self.here, "most", None)

    @most.setter
    def most(self, most: int | None) -> None:
        self.here.most = most

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # They call operations on their local tensors, which then come here.
        if any(issubclass(kind, DTensor | AsyncCollectiveTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        result = self._run(func, given, args, kwargs)
        for tensor in _tensors(result):
            if tensor.is_meta:
                self._hold(tensor.untyped_storage())
        return result

    def _run(self, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        packet = func.overloadpacket
        if func.namespace in ("_c10d_functional", "_dtensor"):
            names = [argument.name for argument in func._schema.arguments]
            if "group_name" in names:
                self.collective(packet.__name__, given, (args + tuple(kwargs.values()))[names.index("group_name")])
        if not any(tensor.is_meta for tensor in given):
            result = func(*args, **kwargs)
            if packet is aten._to_copy and result.is_meta and result.dtype is torch.bool:
                self.true[result] = int(args[0].sum())
            return result
        if packet in ANSWERS:
            return ANSWERS[packet](self, *args, **kwargs)
        if packet is aten._to_copy and torch.device(kwargs.get("device", META)).type != "meta":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if packet is aten.copy_ and not args[0].is_meta:
            return args[0].zero_()
        result = func(*args, **kwargs)
        if func.namespace == "aten" and not kwargs and all(tensor.dim() == 0 for tensor in given):
            self._compare(func, args, result)
        return result

    def _compare(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Notes what is true of single numbers, if ``result`` says so."""
        if isinstance(result, Tensor) and result.is_meta and result.dtype is torch.bool and result.dim() == 0:
            self.true[result] = int(func(*tree_map_only(Tensor, self._answered, args)))

    def _answered(self, x: Tensor) -> Tensor:
        return torch.tensor(_number(self, x), dtype=x.dtype) if x.is_meta else x

    def n_true(self, mask: Tensor) -> int:
        """How many entries of a meta tensor of bools are taken to be true."""
        if mask in self.true:
            return int(self.true[mask])
        return mask.numel() if self.most is None else min(mask.numel(), self.most)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Inside, tensors are made that a run makes in another memory: they are not counted."""
        self.counts = False
        try:
            yield
        finally:
            self.counts = True

    def add(self, size: int) -> None:
        """Counts ``size`` more bytes (fewer, where negative) that are held."""
        self.held += size
        self.peak = max(self.peak, self.held)

    def _hold(self, storage: UntypedStorage) -> None:
        key = id(storage)
        if key in self.alive:
            return

        def gone(reference: object) -> None:
            del self.alive[key]
            self.held -= self.sizes.pop(key)

        self.alive[key], self.sizes[key] = weakref.ref(storage, gone), 0
        self.resized(storage)

    def resized(self, storage: UntypedStorage) -> None:
        """``fully_shard`` frees and makes whole parameters by changing the size of their memory."""
        key = id(storage)
        if self.counts and key in self.alive:
            size, self.sizes[key] = storage.nbytes() - self.sizes[key], storage.nbytes()
            self.add(size)


# ---- answers ---------------------------------------------------------------------------------------------------------


def _number(shapes: Shapes, x: Tensor) -> bool | int | float:
    if x.dtype is torch.bool:
        return bool(shapes.true.get(x, False))
    return 1.0 if x.is_floating_point() else 0  # people divide by scales and norms


def _all(shapes: Shapes, x: Tensor, *rest: Any, **keys: Any) -> Tensor:
    return _taken(shapes, aten.all(x, *rest, **keys), True)


def _any(shapes: Shapes, x: Tensor, *rest: Any, **keys: Any) -> Tensor:
    return _taken(shapes, aten.any(x, *rest, **keys), False)


def _taken(shapes: Shapes, result: Tensor, answer: bool) -> Tensor:
    if result.dim() == 0:  # else it is a mask, of which what counts is how many are true
        shapes.true[result] = int(answer)
    return result


def _grouped(shapes: Shapes, rows: Tensor, matrices: Tensor, *rest: Any, **keys: Any) -> Tensor:
    return RULES[aten._grouped_mm](rows, matrices)


def _nonzero(shapes: Shapes, x: Tensor) -> Tensor:
    return x.new_empty((shapes.n_true(x), x.dim()), dtype=torch.int64)


def _indices(shapes: Shapes, indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Indices with numbers in the place of masks."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            n = shapes.n_true(index) if index.is_meta else int(index.sum())
            found += [torch.empty(n, dtype=torch.int64, device=META) for _ in range(index.dim())]
        else:
            found.append(index)
    return found


def _index(shapes: Shapes, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    result: Tensor = aten.index.Tensor(x, _indices(shapes, indices))
    return result


def _index_put_(shapes: Shapes, x: Tensor, indices: Sequence[Tensor | None], *rest: Any, **keys: Any) -> Tensor:
    return x


def _masked_select(shapes: Shapes, x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(shapes.n_true(mask))


def _unique(shapes: Shapes, x: Tensor, *rest: Any, **keys: Any) -> tuple[Tensor, Tensor, Tensor]:
    numbers = torch.empty(x.numel(), dtype=torch.int64, device=META)
    return x.new_empty(x.numel()), numbers, numbers.clone()


def _bincount(shapes: Shapes, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return x.new_empty(max(minlength, 1), dtype=torch.int64)


def _equal(shapes: Shapes, x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape


ANSWERS: dict[Any, Callable[..., Any]] = {
    aten._local_scalar_dense: _number,
    aten.all: _all,
    aten.any: _any,
    aten._grouped_mm: _grouped,
    aten.nonzero: _nonzero,
    aten.index: _index,
    aten.index_put_: _index_put_,
    aten._index_put_impl_: _index_put_,
    aten.masked_select: _masked_select,
    aten._unique2: _unique,
    aten.bincount: _bincount,
    aten.equal: _equal,
    aten.allclose: lambda shapes, *rest, **keys: True,
}


# ---- what is replaced ------------------------------------------------------------------------------------------------


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weighted_sums(
    indices: Tensor, offsets: Tensor, weights: Tensor, table: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    assert indices.shape == weights.shape and offsets.dim() == 1 and table.dim() == 2
    return table.new_empty(len(offsets) - 1, table.shape[1], dtype=dtype or table.dtype)


def _dot_rows(rows: Tensor, latents: Tensor, g: Tensor, W: Tensor) -> Tensor:
    assert rows.shape == latents.shape and g.shape[1] == W.shape[1]
    return g.new_empty(len(rows), dtype=_wide(g.dtype))


def _row_squares(gradient: RowGradient) -> Tensor:
    source = gradient.extra_rows if gradient.table is None else gradient.table
    assert source is not None
    return source.new_empty(gradient.shape[0], dtype=_wide(source.dtype))


def _adam_rows(
    gradient: RowGradient, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, update: Any, follower: Any = None
) -> None:
    assert gradient.shape == weight.shape == exp_avg.shape == exp_avg_sq.shape


def _score_maxima(scores: Tensor, scale: Tensor | None, bias: Tensor | None, width: int, magnitude: bool) -> Tensor:
    assert all(part is None or part.shape == scores.shape[1:] for part in (scale, bias))
    return scores.new_empty(len(scores), scores.shape[1] // width)


def _attend(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *rest: Any, **keys: Any
) -> Tensor:
    """``scaled_dot_product_attention`` as a GPU computes it, which mostly makes no matrix [query, key]."""
    mask = rest[0] if rest else keys.get("attn_mask")
    if not query.is_meta or isinstance(query, DTensor) or not is_fused("cuda", query, key, value, mask):
        return attend(query, key, value, *rest, **keys)
    assert key.shape[-2] == value.shape[-2] and query.shape[-1] == key.shape[-1]
    batch, heads, n, _ = query.shape
    return query.new_empty(batch, n, heads, value.shape[-1]).transpose(1, 2)


KERNELS = SimpleNamespace(
    weighted_sums=_weighted_sums,
    dot_rows=_dot_rows,
    row_squares=_row_squares,
    adam_rows=_adam_rows,
    score_maxima=_score_maxima,
)


@contextmanager
def replaced(where: Any, name: str, new: Any) -> Iterator[None]:
    """Inside, ``where.name`` is ``new``."""
    missing = object()
    old = vars(where).get(name, missing)  # as it stands there: of a class not bound, and not inherited
    setattr(where, name, new)
    try:
        yield
    finally:
        if old is missing:
            delattr(where, name)
        else:
            setattr(where, name, old)


@contextmanager
def open_shapes(shapes: Shapes) -> Iterator[Shapes]:
    """Inside, SAEs and language models run on meta tensors: the package's own code, and torch's."""
    on, work, resize = kernels.on, interleave._work_as_second, UntypedStorage.resize_

    def as_second(turns: Any) -> None:
        with shapes:  # modes are a thread's own
            work(turns)

    def resized(storage: UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        shapes.resized(storage)
        return result

    handle = SimpleNamespace(**vars(torch.cpu) | {"current_device": lambda: 0})
    supported = [*optimizer._get_fused_kernels_supported_devices(), "meta"]
    with ExitStack() as stack:
        for where, name, new in (
            (F, "scaled_dot_product_attention", partial(_attend, F.scaled_dot_product_attention)),
            (kernels, "on", lambda x: KERNELS if x.is_meta else on(x)),
            # Before training has gone on for a while every entry counts.
            (dense, "DENSE_ABOVE", dense.DENSE_ABOVE | {"meta": -1.0}),
            (TrainingSAE, "draw_rows", lambda sae, target, *key: None),
            (interleave, "_work_as_second", as_second),
            (UntypedStorage, "resize_", resized),
            (optimizer, "_get_fused_kernels_supported_devices", lambda: supported),
            # fully_shard asks torch for the streams of a device, and whether somebody forgot to fill its parameters.
            (torch, "meta", handle),
            (FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
        ):
            stack.enter_context(replaced(where, name, new))
        stack.enter_context(shapes)
        yield shapes


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]

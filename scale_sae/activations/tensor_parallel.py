"""Splits a transformers model over a mesh that is a part of the world, by the model's own plan.

transformers can do it only for the whole world, so its plan is translated to torch's ``parallelize_module``.
"""

import math
import re
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from scale_sae.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The model computes on its part of these: the parts must be equal.
SPLIT = {"colwise": 0, "rowwise": 1}  # style: dimension of the weight [out, in] that is cut
# These stay whole on every rank.
WHOLE = {"replicate", "replicated_with_grad_allreduce"}
# What to do where a model cannot be split.
WITHOUT_TP = "set topology.lm.tp: 1, and topology.lm.parallel: device_map if one GPU cannot hold the model"


def parallel_styles(network: "PreTrainedModel", tp: int, name: str) -> dict[str, ParallelStyle]:
    """The model's plan for ``tp`` ranks as torch's styles by module name; reads no weights.

    Raises:
        UserError: the model has no plan, the plan has a style that is not known here, or ``tp`` does not divide the
            heads or another size that is to be split.
    """
    key, model = f"topology.lm.tp: {tp}", f"{name} ({type(network).__name__})"
    if not network.base_model.tp_plan:
        raise UserError(f"{key}, but {model} has no tensor-parallel plan; {WITHOUT_TP}")
    parts = dict(network.named_modules()) | dict(network.named_parameters())
    styles: dict[str, ParallelStyle] = {}
    sizes: dict[str, int] = {}
    for pattern, style in network.tp_plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        for part in filter(expression.fullmatch, parts):
            translated = _translate(style)
            if style in WHOLE:
                continue
            if translated is None or not isinstance(parts[part], nn.Linear | nn.Embedding):
                message = f"{key}, but the plan of {model} splits {part} by {style}, which is not supported"
                raise UserError(f"{message}; {WITHOUT_TP}")
            styles[part] = translated
            if style in SPLIT:
                sizes[f"the size of {part}"] = parts[part].weight.shape[SPLIT[style]]
    if any(style == "colwise" for style in network.tp_plan.values()):
        config: Any = network.config.get_text_config()
        heads = {size: getattr(config, size, None) for size in ("num_attention_heads", "num_key_value_heads")}
        sizes = {size: count for size, count in heads.items() if isinstance(count, int)} | sizes
    for what, size in sizes.items():
        if size % tp:
            most = math.gcd(*sizes.values())
            ways = f"use a divisor of {most}, or {WITHOUT_TP}" if most > 1 else WITHOUT_TP
            raise UserError(f"{key} does not divide {what} of {model}, {size}; {ways}")
    return styles


def _translate(style: str) -> ParallelStyle | None:
    if style == "colwise":
        return ColwiseParallel()
    if style == "rowwise":
        return RowwiseParallel()
    if style in ("colwise_gather_output", "colwise_rep"):
        return ColwiseParallel(output_layouts=Replicate())
    if style in ("rowwise_split_input", "rowwise_rep", "embedding_rowwise"):
        return RowwiseParallel(input_layouts=Replicate())
    return None


def parallelize(network: "PreTrainedModel", mesh: DeviceMesh, name: str) -> None:
    """Split ``network``, whole on every rank of the one-dimensional ``mesh``, in place; each keeps its own shards."""
    styles = parallel_styles(network, mesh.size(), name)
    # Without a source rank nothing is sent: every rank cuts its shard out of the weights that it has.
    parallelize_module(network, mesh, styles, src_data_rank=None)

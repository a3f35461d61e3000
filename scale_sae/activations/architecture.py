"""What can be known of a model before its weights are loaded: its modules, their widths, what it reads.

The model is built from its config on the meta device and run once on fake tensors, which have shapes and no values.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scale_sae import embedded
from scale_sae.activations.device_map import check_device_map
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The shape of the fake forward's batch: small, and unlikely to be a width or a number of heads.
BATCH, CONTEXT = 3, 7
INPUT = ":in"


def model_path(model: ModelConfig) -> str:
    """What transformers' ``from_pretrained`` takes for ``model``: a hub id or a folder."""
    return str(embedded.MODEL_FOLDER) if model.name == embedded.NAME else model.name


def first_line(error: Exception) -> str:
    """The first line of an error's message, for a message of one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def auto_class(model: ModelConfig) -> Any:
    """transformers' class ``model.auto_class``; ``UserError`` if there is none."""
    import transformers

    found = getattr(transformers, model.auto_class, None)
    if not hasattr(found, "from_config"):
        names = (name for name in dir(transformers) if name.startswith("AutoModel"))
        raise UserError(f"model.auto_class: {model.auto_class} is no auto class{nearest(model.auto_class, names)}")
    return found


@cache
def build_architecture(model: ModelConfig) -> "PreTrainedModel":
    """The model without weights (on the meta device).

    Raises:
        UserError: there is no such model, or ``model.auto_class`` does not fit it.
    """
    from transformers import AutoConfig

    chosen, trust = auto_class(model), model.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(model_path(model), revision=model.revision, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name: {model.name} cannot be loaded: {first_line(error)}") from error
    try:
        with torch.device("meta"):
            # bfloat16 whatever the run computes in: some kernels have shape rules for no other type.
            network = chosen.from_config(config, dtype=torch.bfloat16, trust_remote_code=trust)
    except ValueError as error:
        message = f"model.auto_class: {model.auto_class} cannot load {model.name}: {first_line(error)}"
        raise UserError(message) from error
    network.config.use_cache = False
    return network.eval()


def input_name(model: ModelConfig) -> str:
    """What the model reads: ``input_ids`` (token ids) or ``pixel_values`` (images)."""
    name: str = build_architecture(model).main_input_name
    if name not in ("input_ids", "pixel_values"):
        raise UserError(f"model.name: {model.name} reads {name}; only text and image models are supported")
    return name


def match_hookpoints(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The hookpoints among ``names`` that any of ``patterns`` matches, in the order of ``names``.

    ``*`` in a pattern stands for any characters but a dot; the suffix ``:in`` must be written out.

    Raises:
        UserError: a pattern matches nothing.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        expression = _expression(pattern)
        matches = [name for name in names if expression.fullmatch(name)]
        if not matches:
            raise UserError(f"hookpoints: {pattern} matches no module of the model{nearest(pattern, names)}")
        found.update(matches)
    return [name for name in names if name in found]


def _expression(pattern: str) -> re.Pattern[str]:
    """A hookpoint pattern as a regular expression with a group for each ``*``."""
    return re.compile("([^.:]*)".join(map(re.escape, pattern.split("*"))))


def fill_pattern(targets: Iterable[str], patterns: Iterable[str], name: str) -> str:
    """The target of hookpoint ``name``: that of the first of ``patterns`` which matches it.

    Each ``*`` in it is replaced by what the ``*`` at the same place in the pattern, which has at least as many, stands
    for in ``name``.
    """
    pairs = ((target, _expression(pattern).fullmatch(name)) for target, pattern in zip(targets, patterns, strict=True))
    target, match = next((target, match) for target, match in pairs if match)
    first, *rest = target.split("*")
    return first + "".join(part + text for part, text in zip(match.groups(), rest, strict=False))


def inspect_model(model: ModelConfig, patterns: Sequence[str], tp: int = 1, parallel: str = "tp") -> dict[str, int]:
    """Find the hookpoints that ``patterns`` name and the widths of their activations; loads no weights.

    Args:
        model: the model.
        patterns: hookpoints, in which ``*`` stands for anything but a dot.
        tp: LM ranks that the model is to be split over; whether its plan allows that is checked too.
        parallel: ``device_map`` where it is to be spread over one rank's devices; whether that is possible is checked.

    Returns:
        Hookpoint → width (size of the last dimension), in model order; a module's input comes before its output.

    Raises:
        UserError: the model does not exist; a pattern matches nothing; a hookpoint gives no
            ``[batch, position, width]`` tensor exactly once per forward; the model cannot be split in this way.
    """
    network = build_architecture(model)
    if tp > 1:
        # Late: torch's own takes as long to import as half of torch, and splicing, which a notebook does, needs none.
        from scale_sae.activations.tensor_parallel import parallel_styles

        parallel_styles(network, tp, model.name)
    if parallel == "device_map":
        check_device_map(network, model.name)
    modules = [name for name, _ in network.named_modules() if name]
    hookpoints = match_hookpoints(patterns, [name + suffix for name in modules for suffix in (INPUT, "")])
    shapes = _shapes(model, hookpoints)
    positions = CONTEXT if input_name(model) == "input_ids" else image_positions(model)
    for hookpoint in hookpoints:
        _check_shapes(hookpoint, shapes[hookpoint], positions)
    return {hookpoint: shapes[hookpoint][0][2] for hookpoint in hookpoints}


@cache
def image_positions(model: ModelConfig) -> int:
    """Positions per image (patches, class token) of an image model: those of its last hidden state."""
    network = build_architecture(model)
    shapes: list[tuple[int, ...]] = []
    handle = network.base_model.register_forward_hook(lambda module, args, output: shapes.append(output[0].shape))
    try:
        _fake_forward(model)
    finally:
        handle.remove()
    if len(shapes[0]) != 3:
        raise UserError(f"model.name: {model.name} has no last hidden state [batch, position, width]")
    return int(shapes[0][1])


def kept_positions(model: ModelConfig, data: DataConfig) -> int:
    """The most positions of one context whose activations can become rows."""
    if input_name(model) == "pixel_values":
        return image_positions(model)
    return len(range(data.context_size)[slice(*data.seqpos_slice)])


def attach(network: nn.Module, hookpoint: str, see: Callable[[Any], Any]) -> RemovableHandle:
    """Call ``see`` with the activation at ``hookpoint`` in every forward; what it returns replaces it, unless None.

    The activation is the module's output or with ``:in`` its first argument; of a tuple it is the first element.
    """

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = see(args[0] if args else next(iter(kwargs.values()), None))
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else ((), kwargs | {next(iter(kwargs)): new})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return see(output)
        new = see(output[0])
        return None if new is None else (new, *output[1:])

    module = network.get_submodule(hookpoint.removesuffix(INPUT))
    if hookpoint.endswith(INPUT):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _shapes(model: ModelConfig, hookpoints: Iterable[str]) -> Mapping[str, list[tuple[int, ...]]]:
    """The shape of the activation at each hookpoint, once per call of the module in one forward; () for no tensor."""
    network = build_architecture(model)
    shapes: dict[str, list[tuple[int, ...]]] = {hookpoint: [] for hookpoint in hookpoints}

    def note(hookpoint: str) -> Callable[[Any], None]:
        return lambda x: shapes[hookpoint].append(tuple(x.shape) if isinstance(x, Tensor) else ())

    handles = [attach(network, hookpoint, note(hookpoint)) for hookpoint in shapes]
    try:
        _fake_forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _check_shapes(hookpoint: str, shapes: list[tuple[int, ...]], positions: int) -> None:
    if len(shapes) != 1:
        raise UserError(f"hookpoints: {hookpoint} is called {len(shapes)} times per forward; choose one called once")
    shape = shapes[0]
    if len(shape) == 3 and shape[:2] == (BATCH, positions):
        return
    found = f"a tensor {list(shape)}" if shape else "no tensor"
    wanted = f"[batch, position, width], here [{BATCH}, {positions}, width]"
    raise UserError(f"hookpoints: {hookpoint} gives {found}, not {wanted}; choose a layer or a part of one")


def _fake_forward(model: ModelConfig) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    network = build_architecture(model)
    name = input_name(model)
    # Fake tensors rather than bare meta tensors: models skip their value-dependent branches for them.
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        if name == "input_ids":
            inputs = torch.zeros(BATCH, CONTEXT, dtype=torch.int64, device="meta")
        else:
            config: Any = network.config
            size = config.image_size
            height, width = (size, size) if isinstance(size, int) else size
            inputs = torch.zeros(BATCH, config.num_channels, height, width, dtype=torch.bfloat16, device="meta")
        try:
            network(**{name: inputs})
        except (ValueError, TypeError) as error:
            loaded = f"{model.name} as {model.auto_class}"
            raise UserError(f"model.name: {loaded} does not run on {name} alone: {first_line(error)}") from error

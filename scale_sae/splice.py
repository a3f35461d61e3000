"""Runs a model with released SAEs in the place of its activations.

    with splice(model, [SAE.load_from_disk("release/model.layers.3")]) as spliced:
        logits = model(input_ids).logits
    spliced.feature_acts["model.layers.3"]

An SAE's reconstruction takes the place of the activation that it was trained on; a transcoder reads at its input and
replaces its target. The model is transformers' own and stays as it is: all hooks go when the context ends.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from scale_sae.activations.architecture import INPUT, attach
from scale_sae.activations.tokens import excluded_tokens
from scale_sae.errors import UserError
from scale_sae.hook_names import places, to_hf
from scale_sae.kernels.codes import Codes
from scale_sae.saes.inference import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class FeatureActs(dict[str, Tensor]):
    """Hookpoint → ``[batch, positions, d_sae]``. A hookpoint may also be given by its name in TransformerLens."""

    def __init__(self, module_names: Iterable[str]):
        super().__init__()
        self._module_names = set(module_names)

    def __missing__(self, name: str) -> Tensor:
        hookpoint = to_hf(name, self._module_names)
        if hookpoint not in self:
            found = ", ".join(self) or "none: no forward has been run"
            raise UserError(f"feature_acts: {name} has no activations of an SAE; there are {found}")
        return self[hookpoint]


class Spliced:
    """The SAEs that are spliced into a model, and what they made of its last forward.

    Attributes:
        saes: hookpoint at which the SAE reads → SAE.
        feature_acts: hookpoint → ``[batch, positions, d_sae]`` in the SAE's dtype, 0 where a position passed through.
            Part of the graph of the logits, where there is one: ``torch.autograd.grad`` can be taken with regard to it.
    """

    def __init__(self, saes: Mapping[str, SAE], module_names: Iterable[str]):
        self.saes = dict(saes)
        self.feature_acts = FeatureActs(module_names)

    def codes(self, hookpoint: str) -> Codes:
        """The activations that are not 0; row r is position r % positions of context r // positions."""
        acts = self.feature_acts[hookpoint].detach().flatten(0, -2)
        rows, latents = acts.nonzero(as_tuple=True)
        return Codes(rows, latents, acts[rows, latents], len(acts), acts.shape[1])


@dataclass(frozen=True)
class _Place:
    """Where an SAE belongs: the hookpoint that it reads, and the one that it replaces."""

    sae: SAE
    hookpoint: str
    target: str


# Module → those of its ends ("" and ":in") at which an SAE stands now.
_taken: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


@contextmanager
def splice(
    model: nn.Module,
    saes: SAE | Iterable[SAE] | Mapping[str, SAE],
    use_error_term: bool = False,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Iterator[Spliced]:
    """While open, forwards of the model go on with what the SAEs make of its activations.

    Args:
        model: a transformers model. It computes in its dtype, and each SAE in its own.
        saes: released SAEs, each at the place that its metadata names; or hookpoint → SAE. The names are those of
            modules (``model.layers.3``, ``model.layers.3.mlp:in``) or TransformerLens's.
        use_error_term: add what the SAE left out, as a constant: the logits stay those of the model alone, and
            gradients reach what comes before only through the SAE.
        tokenizer: with it, positions on which an SAE was not trained pass through as they are: those of
            ``exclude_special_tokens`` and ``seqpos_slice`` in its metadata. Without it every position is replaced.

    Raises:
        UserError: a hookpoint is unknown or has an SAE already; in a forward: a width is not the SAE's.
    """
    names = [name for name, _ in model.named_modules() if name]
    found = _find_places(saes, names)
    spliced = Spliced({place.hookpoint: place.sae for place in found}, names)
    positions = _Positions(tokenizer)
    with ExitStack() as stack:
        if tokenizer is not None:
            stack.callback(model.register_forward_pre_hook(positions.note, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(positions.forget, always_call=True).remove)
        for place in found:
            stack.callback(_take(model, place.target))
            for handle in _hooks(model, place, spliced, positions, use_error_term):
                stack.callback(handle.remove)
        yield spliced


def _find_places(saes: SAE | Iterable[SAE] | Mapping[str, SAE], names: list[str]) -> list[_Place]:
    given: list[tuple[str | None, Any]]
    if isinstance(saes, Mapping):
        given = list(saes.items())
    else:
        given = [(None, sae) for sae in ([saes] if isinstance(saes, SAE) else saes)]
    found: list[_Place] = []
    for index, (name, sae) in enumerate(given):
        where = f"saes.{index if name is None else name}"
        if not isinstance(sae, SAE):
            raise UserError(f"{where}: {type(sae).__name__} is no released SAE; load one with SAE.load_from_disk")
        metadata = sae.cfg.metadata
        try:
            given_place = {} if name is None else {"hf_hook_name": name, "hook_name": name}
            place = _Place(sae, *places({**metadata, **given_place}, names))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        for other in found:
            if other.hookpoint == place.hookpoint or other.target == place.target:
                same = place.hookpoint if other.hookpoint == place.hookpoint else place.target
                raise UserError(f"{where}: another SAE is at {same} already; splice in one of them at a time")
        found.append(place)
    return found


def _take(model: nn.Module, hookpoint: str) -> Callable[[], None]:
    """Marks a hookpoint as one where an SAE stands; what is returned frees it."""
    name = hookpoint.removesuffix(INPUT)
    ends, end = _taken.setdefault(model.get_submodule(name), set()), hookpoint.removeprefix(name)
    if end in ends:
        raise UserError(f"saes: an SAE is spliced in at {hookpoint} already; leave that context first")
    ends.add(end)
    return partial(ends.remove, end)


class _Positions:
    """The tokens of the forward that is under way, and which of them an SAE was trained on."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None"):
        self.tokenizer = tokenizer
        self.tokens: Tensor | None = None
        self.past = 0

    def note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        self.past = 0 if cache is None else int(cache.get_seq_length())

    def forget(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tokens = None

    def keep(self, sae: SAE, x: Tensor) -> Tensor | None:
        """bool ``[batch, positions]``: where the SAE takes part; None where it does everywhere."""
        if self.tokenizer is None:
            return None
        excluded = excluded_tokens(sae.cfg.metadata.get("exclude_special_tokens") or False, self.tokenizer)
        arguments = sae.cfg.metadata.get("seqpos_slice") or (None,)
        if self.tokens is None or self.tokens.shape != x.shape[:-1]:
            raise UserError("tokenizer: given, so the model itself must be called, with the input_ids of all positions")
        positions = torch.zeros(self.past + x.shape[1], dtype=torch.bool, device=x.device)
        positions[slice(*arguments)] = True
        tokens = self.tokens.to(x.device)
        return ~torch.isin(tokens, torch.tensor(excluded, dtype=tokens.dtype, device=x.device)) & positions[self.past :]


def _hooks(
    model: nn.Module, place: _Place, spliced: Spliced, positions: _Positions, use_error_term: bool
) -> Iterator[RemovableHandle]:
    """Puts the SAE in; yields the handles that take it out again."""
    inputs: list[Tensor] = []

    def read(x: Tensor) -> None:
        _check_width(place.hookpoint, x, place.sae.cfg.d_in)
        # A copy, since some models go on to add to an activation in place.
        inputs[:] = [x.clone()]

    def replace(y: Tensor) -> Tensor:
        _check_width(place.target, y, place.sae.d_out)
        if place.hookpoint != place.target and not inputs:
            raise UserError(f"saes.{place.hookpoint}: a forward reaches its target {place.target} before its input")
        x = inputs.pop() if place.hookpoint != place.target else y
        acts, out = _substitute(place.sae, x, y, positions.keep(place.sae, x), use_error_term)
        spliced.feature_acts[place.hookpoint] = acts
        return out

    if place.hookpoint != place.target:
        yield attach(model, place.hookpoint, read)
    yield attach(model, place.target, replace)


def _check_width(hookpoint: str, x: Any, width: int) -> None:
    if not isinstance(x, Tensor):
        raise UserError(f"saes: {hookpoint} gives no tensor in this model; an SAE cannot be spliced in there")
    if x.shape[-1] != width:
        found = f"saes: {hookpoint} has width {x.shape[-1]} in this model, but the SAE is for {width}"
        raise UserError(f"{found}; use the model that its metadata names")


def _substitute(sae: SAE, x: Tensor, y: Tensor, keep: Tensor | None, use_error_term: bool) -> tuple[Tensor, Tensor]:
    """Feature activations ``[batch, positions, d_sae]``, and what takes the place of ``y``, in its dtype.

    ``keep`` marks the positions at which the SAE takes part: no other is even read, as in training. It is where ``x``
    is; ``y`` may be on another device, as may the SAE.
    """
    if keep is None:
        rows, goal = x.to(sae.device), y
        acts = sae.encode(rows)
    else:
        rows, goal = x[keep].to(sae.device), y[keep.to(y.device)]
        own = sae.encode(rows)
        acts = own.new_zeros(*keep.shape, own.shape[-1]).index_put((keep.to(own.device),), own)
    if torch.is_grad_enabled() and not acts.requires_grad:
        acts.requires_grad_()  # in a model without gradients too, the logits have some with regard to them
    x_hat = sae.add_skip(sae.decode(acts if keep is None else acts[keep.to(acts.device)]), rows)
    if use_error_term:
        # In the wider dtype of both: rounded to the narrower one, the two would not add up to y again.
        x_hat = x_hat.to(torch.promote_types(x_hat.dtype, goal.dtype))
        x_hat = x_hat + (goal.to(x_hat) - x_hat).detach()
    x_hat = x_hat.to(y)
    return acts, x_hat if keep is None else y.index_put((keep.to(y.device),), x_hat)

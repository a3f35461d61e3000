"""Held-out text, and what a language model loses on it when something takes the place of its activations.

Cross-entropy and Kullback-Leibler divergence are SAELens's (6.54, ``evals``): KL(clean || changed), in nats, as a mean
over all positions; the cross-entropy as one over all predicted tokens.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from scale_sae.activations.source import ActivationSource
from scale_sae.activations.tokens import held_out_contexts
from scale_sae.config import RunConfig
from scale_sae.errors import UserError

# Contexts of a batch: many, but with few positions in all, since logits have a value for every word at each of them.
CONTEXTS_PER_BATCH = 16
POSITIONS_PER_BATCH = 8192
# As many logits become wide probabilities at once, a few copies of them: 256 MiB each in float32.
LOGITS_AT_ONCE = 2**26


@dataclass(frozen=True)
class Batch:
    """Held-out contexts: ``tokens`` (or pixel values) with a context in each row, ``keep`` bool ``[n, positions]``."""

    tokens: Tensor
    keep: Tensor

    @property
    def rows(self) -> int:
        """The kept positions."""
        return int(self.keep.sum())

    @property
    def positions(self) -> int:
        return self.keep.numel()

    @property
    def predictions(self) -> int:
        """The tokens that follow another one."""
        return len(self.keep) * (self.keep.shape[1] - 1)


def batches(config: RunConfig, tokens: int) -> list[Batch]:
    """The first ``tokens`` held-out tokens in whole contexts, or all of them if there are fewer.

    A context of an image model is one image; its positions are counted. ``UserError`` if there is not one whole
    context.
    """
    found = held_out_contexts(config.data, config.model)
    first = next(found, None)
    if first is None:
        raise UserError(
            f"data.eval_fraction: {config.data.eval_fraction} of {config.data.dataset} holds no whole context of "
            f"{config.data.context_size} tokens; use a larger eval_fraction"
        )
    size = len(first[1])
    contexts = [first, *islice(found, max(1, tokens // size) - 1)]
    n = max(1, min(CONTEXTS_PER_BATCH, POSITIONS_PER_BATCH // size))
    parts = (contexts[start : start + n] for start in range(0, len(contexts), n))
    return [Batch(torch.stack([t for t, _ in part]), torch.stack([keep for _, keep in part])) for part in parts]


@dataclass(frozen=True)
class Clean:
    """A forward of a batch as it is.

    Attributes:
        rows: hookpoint → ``[kept rows, width]``, in the order in which the forward met them, in the model's dtype.
        logits: ``[n, context, vocabulary]``; None for a model that predicts no tokens.
    """

    rows: dict[str, Tensor]
    logits: Tensor | None

    def reaches(self, hookpoint: str, before: str) -> bool:
        """Whether a forward has been at ``hookpoint`` when it comes to ``before``."""
        met = list(self.rows)
        return met.index(hookpoint) <= met.index(before)


@dataclass(frozen=True)
class Losses:
    """Sums over a batch, in nats: the cross-entropy, and the divergence from the clean forward."""

    ce: float
    kl: float


# From rows of some hookpoint to rows that take their place: [kept rows, width] -> [kept rows, width].
Substitute = Callable[[Tensor], Tensor]


def instead(rows: Tensor) -> Substitute:
    """What puts ``rows`` in the place of any."""
    return lambda _: rows


class HeldOutModel:
    """Forwards of a language model on held-out batches. Where several ranks share it, all call the same methods."""

    def __init__(self, source: ActivationSource):
        self.source = source
        self.predicts = bool(source.model.can_generate())  # no encoder, no classifier

    @torch.no_grad()
    def clean(self, batch: Batch, hookpoints: Sequence[str]) -> Clean:
        """The forward as it is, with the rows at ``hookpoints``."""
        rows: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in hookpoints:
                stack.enter_context(self.source.observe(name, self._looking(name, rows.__setitem__, batch.keep)))
            logits = self._forward(batch)
        return Clean(rows, logits)

    @torch.no_grad()
    def losses(
        self,
        batch: Batch,
        clean: Tensor,
        changes: Mapping[str, Substitute],
        see: Callable[[str, Tensor], object] = lambda name, rows: None,
        seen: Sequence[str] = (),
    ) -> Losses:
        """What the model loses while ``changes`` replace the kept rows of hookpoints.

        Args:
            batch: what to forward.
            clean: the logits of its clean forward.
            changes: hookpoint → what takes its place.
            see: called with the kept rows at the hookpoints ``seen``, as the changes have left them.
        """
        with ExitStack() as stack:
            for name, change in changes.items():
                stack.enter_context(self.changed(name, change, batch.keep))
            for name in seen:
                stack.enter_context(self.source.observe(name, self._looking(name, see, batch.keep)))
            logits = self._forward(batch)
        assert logits is not None, "a model that predicts no tokens loses nothing"
        return loss_sums(logits, batch.tokens, clean)

    def _looking(self, name: str, see: Callable[[str, Tensor], object], keep: Tensor) -> Callable[[Tensor], None]:
        def look(activation: Tensor) -> None:
            see(name, activation[keep.to(activation.device)].to(self.source.dtype))

        return look

    def _forward(self, batch: Batch) -> Tensor | None:
        tokens = batch.tokens.to(self.source.device)
        if self.predicts:
            return self.source.logits(tokens)
        self.source.forward(tokens)
        return None

    @contextmanager
    def changed(self, name: str, change: Substitute, keep: Tensor) -> Iterator[None]:
        """While open, forwards go on with what ``change`` makes of the kept rows at a hookpoint."""

        def replace(activation: Tensor) -> Tensor:
            out, mask = activation.clone(), keep.to(activation.device)
            out[mask] = change(activation[mask].to(self.source.dtype)).to(out.device, out.dtype)
            return out

        with self.source.replace(name, replace):
            yield


def loss_sums(logits: Tensor, tokens: Tensor, clean: Tensor) -> Losses:
    """The losses of ``logits [n, context, vocabulary]`` whose clean forward gave ``clean``.

    In float32 at least, for `LOGITS_AT_ONCE` of them at a time: all of a batch would take tens of GiB with a large
    vocabulary.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    n = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    ce = kl = torch.zeros((), dtype=torch.float64, device=logits.device)
    for changed, before, ids in zip(logits, clean, tokens.to(logits.device), strict=True):
        for at in range(0, len(ids), n):
            log_q = changed[at : at + n].to(wide).log_softmax(-1)
            following = ids[at + 1 : at + n + 1]
            ce = ce - log_q[: len(following)].gather(1, following[:, None]).sum(dtype=torch.float64)
            log_p = before[at : at + n].to(wide).log_softmax(-1)
            p = log_p.exp()
            # A word that the model rules out, by a logit of -inf, adds nothing.
            kl = kl + log_p.sub_(log_q).mul_(p).masked_fill_(p == 0, 0).sum(dtype=torch.float64)
    return Losses(float(ce), float(kl))


class WithoutSAE:
    """What a model loses on ``data`` as it is, and with zeros in the place of activations: each is found once.

    Attributes:
        losses: by the hookpoints that are zero, none of them for the model as it is, and the number of the batch.
    """

    def __init__(self, data: Sequence[Batch]):
        self.data = data
        self.losses: dict[tuple[tuple[str, ...], int], Losses] = {}

    def find(self, model: HeldOutModel, number: int, logits: Tensor, targets: tuple[str, ...]) -> None:
        """Finds what is new of a batch whose clean forward gave ``logits``, for SAEs at ``targets``."""
        batch = self.data[number]
        if ((), number) not in self.losses:
            self.losses[(), number] = loss_sums(logits, batch.tokens, logits)
        if (targets, number) not in self.losses:
            self.losses[targets, number] = model.losses(batch, logits, dict.fromkeys(targets, torch.zeros_like))

    def figures(self, targets: tuple[str, ...], with_sae: Mapping[int, Losses]) -> dict[str, dict[str, float]]:
        """The figures of SAEs at ``targets`` with which each batch lost as much; none where nothing was lost."""
        if not with_sae:  # a model that predicts no tokens
            return {}
        numbers = range(len(self.data))
        clean, ablated = (total([self.losses[places, number] for number in numbers]) for places in ((), targets))
        return loss_figures(self.data, clean, total([with_sae[number] for number in numbers]), ablated)


def loss_figures(
    data: Sequence[Batch], clean: Losses, with_sae: Losses, ablated: Losses
) -> dict[str, dict[str, float]]:
    """SAELens's figures of what the model loses, from sums over all of ``data``; nothing if no token is predicted."""
    predictions, positions = sum(b.predictions for b in data), sum(b.positions for b in data)
    if not predictions:
        return {}
    without, ce, ce_ablated = (losses.ce / predictions for losses in (clean, with_sae, ablated))
    kl, kl_ablated = with_sae.kl / positions, ablated.kl / positions
    return {
        "model_performance_preservation": {
            "ce_loss_score": ratio(ce_ablated - ce, ce_ablated - without),
            "ce_loss_with_ablation": ce_ablated,
            "ce_loss_with_sae": ce,
            "ce_loss_without_sae": without,
        },
        "model_behavior_preservation": {
            "kl_div_score": ratio(kl_ablated - kl, kl_ablated),
            "kl_div_with_ablation": kl_ablated,
            "kl_div_with_sae": kl,
        },
    }


def total(parts: Sequence[Losses]) -> Losses:
    """The sum, in this order."""
    return Losses(sum(part.ce for part in parts), sum(part.kl for part in parts))


def ratio(a: float, b: float) -> float:
    """a / b, NaN where there is none: of activations that are all 0, or all the same."""
    return a / b if b else math.nan

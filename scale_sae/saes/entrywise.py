"""SAEs whose activations depend on one pre-activation each, and what they share: they compute on few entries."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from scale_sae.kernels.dense import AllEntries, Entries, choose_entries, encode_dense
from scale_sae.saes.base import SparseTrainStepOutput, TrainingSAE, TrainStepInput, TrainStepOutput


class EntrywiseTrainingSAE(TrainingSAE):
    """An SAE whose activation, of a latent on a row, depends on that pre-activation and the latent's parameters alone.

    Its formulas are written once, for values at ``Entries``. Where few of a batch's entries can be active, only these
    are computed on, with results that differ by rounding; each shard decides for itself, as the collectives are the
    same. A subclass that replaces one of ``DENSE_HOOKS`` is trained on dense activations.
    """

    changed_in_step: ClassVar[frozenset[str] | None] = frozenset()

    @classmethod
    @abstractmethod
    def works_on_entries(cls) -> bool:
        """Whether the step is that on entries: ``keeps_hooks`` of the class that wrote its formulas."""

    @property
    @abstractmethod
    def encoder_bias(self) -> Tensor:
        """``[n_local]``, what the encoder adds."""

    @abstractmethod
    def may_count(self, pre: Tensor, step_input: TrainStepInput) -> Tensor:
        """bool ``[B, n_local]``: False where the activation and all gradients of a pre-activation are sure to be 0.

        What is not a number counts, so that it reaches the loss.
        """

    @abstractmethod
    def activate(self, entries: Entries, pre: Tensor) -> tuple[Tensor, Tensor]:
        """(activations, pre-activations of the magnitudes) at entries with the encoder's results ``pre``."""

    @abstractmethod
    def losses_at(
        self, step_input: TrainStepInput, entries: Entries, pre: Tensor, feature_acts: Tensor
    ) -> dict[str, Tensor]:
        """What is added to the squared error, from values at entries."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._activate_all(self.pre_activations(x, self.encoder_bias))

    def _activate_all(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        return self.activate(AllEntries(pre), pre)

    def reconstruct(self, step_input: TrainStepInput, entries: Entries, values: Tensor) -> Tensor:
        """What activations at entries decode to over all shards, ``[B, d_out]``. One all-reduce."""
        whole = self.shard.sum(entries.decode(values, self.W_dec))
        return self.add_skip(self.row_norm.restore(whole + self.b_dec), step_input.sae_in)

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        if not self.works_on_entries():
            return super().training_forward_pass(step_input)
        encoder = self.encoder(step_input.sae_in, self.encoder_bias)
        rows = self.block_rows(self.n_local)
        entries = choose_entries(encoder, rows, lambda pre: self.may_count(pre, step_input))
        pre = entries.encode(encoder)
        feature_acts, hidden_pre = self.activate(entries, pre)
        sae_out = self.reconstruct(step_input, entries, feature_acts)
        mse_loss = self.mse_loss_fn(sae_out, step_input.target).sum(dim=-1).mean()
        losses = {"mse_loss": mse_loss, **self.losses_at(step_input, entries, pre, feature_acts)}
        loss = sum(losses.values(), torch.zeros_like(mse_loss))
        if isinstance(entries, AllEntries):
            return TrainStepOutput(step_input.sae_in, sae_out, feature_acts, hidden_pre, loss, losses)
        return SparseTrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            codes=entries.active(feature_acts),
            # From the same encoder: its shift must be summed over the shards once, whichever way each of them goes.
            dense=lambda: self._activate_all(encode_dense(encoder)),
            loss=loss,
            losses=losses,
        )

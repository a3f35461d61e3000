"""Normalisations that are worked out anew for every row, in training and in use (SAELens's names and formulas)."""

from typing import Protocol

import torch
from torch import Tensor

LAYER_NORM_EPS = 1e-5
SMALLEST_INPUT_NORM = 1e-12  # a row of zeros stays one
RUNTIME_NORMS = ("layer_norm", "constant_norm_rescale")


class RowNorm(Protocol):
    """Maps rows to what the encoder sees and reconstructions back, by the statistics of the rows last normalised."""

    def normalize(self, x: Tensor) -> Tensor:
        """``[..., d_in]`` to ``[..., d_in]``."""

    def restore(self, x_hat: Tensor) -> Tensor:
        """A reconstruction of the normalised rows as one of the rows."""

    def restore_difference(self, difference: Tensor) -> Tensor:
        """A difference of two normalised rows as one of rows: scaled, not shifted."""


class NoNorm:
    """``none``, and ``expected_average_only_in``, whose factor is applied outside and folded into a release."""

    def normalize(self, x: Tensor) -> Tensor:
        return x

    def restore(self, x_hat: Tensor) -> Tensor:
        return x_hat

    def restore_difference(self, difference: Tensor) -> Tensor:
        return difference


class LayerNorm:
    """``layer_norm``: mean 0 and (unbiased) standard deviation 1 in every row."""

    mean: Tensor
    std: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        self.mean = x.mean(dim=-1, keepdim=True)
        self.std = x.std(dim=-1, keepdim=True)
        return (x - self.mean) / (self.std + LAYER_NORM_EPS)

    def restore(self, x_hat: Tensor) -> Tensor:
        return x_hat * self.std + self.mean

    def restore_difference(self, difference: Tensor) -> Tensor:
        return difference * self.std


class ConstantNorm:
    """``constant_norm_rescale``: every row has norm √d_in."""

    factor: Tensor

    def normalize(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        self.factor = x.shape[-1] ** 0.5 / norms.clamp_min(SMALLEST_INPUT_NORM)
        return x * self.factor

    def restore(self, x_hat: Tensor) -> Tensor:
        return x_hat / self.factor

    def restore_difference(self, difference: Tensor) -> Tensor:
        return difference / self.factor


def row_norm(kind: str) -> RowNorm:
    """The normalisation that ``normalize_activations`` names."""
    classes: dict[str, type[RowNorm]] = {"layer_norm": LayerNorm, "constant_norm_rescale": ConstantNorm}
    return classes.get(kind, NoNorm)()

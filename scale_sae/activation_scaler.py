"""The factor that activations are multiplied by before an SAE sees them (``expected_average_only_in``)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_sae.errors import UserError


@dataclass
class ActivationScaler:
    """Scales activations. Names are SAELens's.

    Attributes:
        scaling_factor: what they are multiplied by; None: they stay as they are.
    """

    scaling_factor: float | None = None

    def scale(self, acts: Tensor) -> Tensor:
        """``acts [..., d_in]`` times the factor."""
        return acts if self.scaling_factor is None else acts * self.scaling_factor

    def unscale(self, acts: Tensor) -> Tensor:
        """``acts [..., d_in]`` divided by the factor."""
        return acts if self.scaling_factor is None else acts / self.scaling_factor

    def __call__(self, acts: Tensor) -> Tensor:
        return self.scale(acts)

    @torch.no_grad()
    def estimate_scaling_factor(
        self, d_in: int, data_provider: Iterator[Tensor], n_batches_for_norm_estimate: int = 1000
    ) -> None:
        """Sets the factor to √d_in / mean row norm, so that a row's norm is √d_in on average. Formula: SAELens 6.54's.

        Args:
            d_in: width of the rows.
            data_provider: yields ``[n, d_in]``; as many batches are taken from it as the next argument says.
            n_batches_for_norm_estimate: how many.

        Raises:
            UserError: the provider ends before, or no row has a norm that is finite and not 0.
        """
        total, count = 0.0, 0
        for number in range(n_batches_for_norm_estimate):
            batch = next(data_provider, None)
            if batch is None:
                raise UserError(
                    f"n_batches_for_norm_estimate: {n_batches_for_norm_estimate}, but data_provider ended after "
                    f"{number} batches; lower it, and leave batches to train on"
                )
            # In float64, in which even a wide float16 row has a norm.
            norms = torch.linalg.vector_norm(batch, dim=-1, dtype=torch.float64)
            norms = norms[norms.isfinite()]
            total, count = total + float(norms.sum()), count + len(norms)
        if not total:
            raise UserError("data_provider: no row has a finite norm above 0, so that no scaling factor can be found")
        self.scaling_factor = d_in**0.5 * count / total

"""How well and how sparsely a released SAE reconstructs: sums over rows of activations, and the figures from them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_sae.collectives import NonFiniteError
from scale_sae.saes.inference import SAE
from scale_sae.trainer import usable_rows

ROWS_PER_PART = 1024


class Reconstruction:
    """Sums over rows, in float64, from which the reconstruction and sparsity figures of one SAE follow."""

    def __init__(self, sae: SAE):
        self.sae = sae
        device = sae.device
        self.rows = 0
        self.sum = torch.zeros(sae.d_out, dtype=torch.float64, device=device)
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=device)
        self.l0_max = 0
        # ‖y - ŷ‖², cosine, ‖y‖, ‖ŷ‖, ‖y‖², y·ŷ, ‖ŷ‖², L1 of the activations.
        self.totals = torch.zeros(8, dtype=torch.float64, device=device)
        # Principal components to compare with, or 0. Not for transcoders: their target's are not found from the input.
        k = 0 if hasattr(sae.cfg, "d_out") else getattr(sae.cfg, "k", 0)
        self.components = k if isinstance(k, int) and k < sae.d_out else 0
        width = sae.d_out if self.components else 0
        self.outer = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """Counts the rows ``x [n, d_in]`` with their targets ``y [n, d_out]`` and returns the reconstruction of these.

        Rows that training leaves out (not finite, or far above the usual norm, in ``x`` or ``y``) are not counted and
        stay as they are. For all but transcoders ``x`` is ``y``.
        """
        usable = usable_rows(x)[0] if x is y else usable_rows(x)[0] & usable_rows(y)[0]
        out = y.clone()
        # In parts: the dense activations of a wide SAE are large.
        parts = zip(x[usable].split(ROWS_PER_PART), y[usable].split(ROWS_PER_PART), strict=True)
        out[usable] = torch.cat([self._add(*part) for part in parts]).to(y.dtype)
        return out

    def _add(self, x: Tensor, y: Tensor) -> Tensor:
        acts = self.sae.encode(x)
        y_hat = self.sae.add_skip(self.sae.decode(acts), x)
        wide, wide_hat = y.double(), y_hat.double()
        self.rows += len(y)
        self.sum += wide.sum(0)
        if self.components:
            self.outer += wide.T @ wide
        active = acts != 0  # a latent of AbsTopK may be negative
        self.fired += active.sum(0)
        self.l0_max = max([self.l0_max, *active.sum(1).tolist()])
        self.totals += torch.stack(
            [
                (wide - wide_hat).square().sum(),
                F.cosine_similarity(wide, wide_hat).sum(),
                wide.norm(dim=1).sum(),
                wide_hat.norm(dim=1).sum(),
                wide.square().sum(),
                (wide * wide_hat).sum(),
                wide_hat.square().sum(),
                acts.abs().sum(dtype=torch.float64),
            ]
        )
        return y_hat

    def pca_fvu(self) -> float:
        """Variance that the first ``components`` principal components of these very rows leave unexplained."""
        mean = self.sum / self.rows
        variances = torch.linalg.eigvalsh(self.outer / self.rows - torch.outer(mean, mean)).clamp(min=0)
        return float(variances[: len(variances) - self.components].sum() / variances.sum())

    def figures(self) -> dict[str, dict[str, float]]:
        """SAELens's metrics, formulas and names (6.54, ``evals``), and a few of our own.

        A transcoder is compared with its target. NonFiniteError where the SAE gave NaN or infinite values.
        """
        if not self.totals.isfinite().all():
            raise NonFiniteError("the activations or reconstructions hold NaN or infinite values")
        error, cosine, norm_in, norm_out, square_in, inner, square_out, l1 = (self.totals / self.rows).tolist()
        variance = square_in - float((self.sum / self.rows).square().sum())
        figures = {
            "reconstruction_quality": {
                "explained_variance": 1 - _ratio(error, variance),
                "mse": error,
                "cossim": cosine,
            },
            "shrinkage": {
                "l2_norm_in": norm_in,
                "l2_norm_out": norm_out,
                "l2_ratio": _ratio(norm_out, norm_in),
                "relative_reconstruction_bias": _ratio(square_out, inner),
            },
            "sparsity": {
                "l0": float(self.fired.sum()) / self.rows,
                "l0_max": float(self.l0_max),
                "l1": l1,
                "dead_fraction": float((self.fired == 0).double().mean()),
            },
            "token_stats": {"total_tokens_eval_reconstruction": float(self.rows)},
        }
        if self.components:
            figures["reconstruction_quality"]["pca_fvu"] = self.pca_fvu()
        return figures


def _ratio(a: float, b: float) -> float:
    """a / b, NaN where there is none: of activations that are all 0, or all the same."""
    return a / b if b else math.nan

"""How well and how sparsely an SAE reconstructs: sums over rows of activations, and the figures from them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scale_sae.collectives import NonFiniteError, Ranks, Shard
from scale_sae.held_out import ratio
from scale_sae.metrics import DENSITY_HISTOGRAM, density_histogram
from scale_sae.saes.inference import SAE
from scale_sae.trainer import usable_rows

ROWS_PER_PART = 1024
# Activations that are dense at once, a few copies of them: 256 MiB each in float32.
DENSE_AT_ONCE = 2**26
# A latent that fires on more than this share of the rows is dense.
DENSE = 0.1
# Below this norm of a row SAELens takes 1 for it, in the ratio of norms.
SMALLEST_NORM = 1e-4

# Section → name → number, or a histogram's counts.
Figures = dict[str, dict[str, Any]]


def usable(*rows: Tensor) -> Tensor:
    """bool ``[n]``: the rows of a batch that training would not leave out at any of these places."""
    masks = [usable_rows(x)[0] for x in rows]
    return torch.stack(masks).all(0)


class Sums:
    """Sums over rows, in float64, from which the reconstruction and sparsity figures of one SAE follow.

    Its latents may be a shard of them: what is counted of latents is then the shard's until ``figures``.
    """

    def __init__(
        self, d_out: int, n_latents: int, device: torch.device, shard: Shard | None = None, components: int = 0
    ):
        """``components``: with how many principal components of the targets to compare, or 0."""
        self.shard = shard or Shard()
        self.components = components
        self.device = device
        wide = torch.float64
        self.rows = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(d_out, dtype=wide, device=device)
        width = d_out if components else 0
        self.outer = torch.zeros(width, width, dtype=wide, device=device)
        self.fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.l0_max = torch.zeros((), dtype=torch.int64, device=device)
        # ‖y - ŷ‖², cosine, ‖y‖, ‖ŷ‖, ‖ŷ‖ / ‖y‖, ‖y‖², y·ŷ, ‖ŷ‖².
        self.totals = torch.zeros(8, dtype=wide, device=device)
        self.l1 = torch.zeros((), dtype=wide, device=device)

    def add(self, y: Tensor, y_hat: Tensor, acts: Tensor) -> None:
        """Counts rows: targets and reconstructions ``[n, d_out]``, activations ``[n, n_latents]``."""
        wide, wide_hat = y.double(), y_hat.double()
        self.rows += len(y)
        self.sum += wide.sum(0)
        if self.components:
            self.outer += wide.T @ wide
        active = acts != 0  # a latent of AbsTopK may be negative
        self.fired += active.sum(0)
        counts = self.shard.all_reduce(active.sum(1))
        self.l0_max = torch.cat([self.l0_max[None], counts]).amax()
        self.l1 += acts.abs().sum(dtype=torch.float64)
        norms, norms_hat = wide.norm(dim=1), wide_hat.norm(dim=1)
        self.totals += torch.stack(
            [
                (wide - wide_hat).square().sum(),
                F.cosine_similarity(wide, wide_hat).sum(),
                norms.sum(),
                norms_hat.sum(),
                (norms_hat / torch.where(norms < SMALLEST_NORM, 1, norms)).sum(),
                wide.square().sum(),
                (wide * wide_hat).sum(),
                wide_hat.square().sum(),
            ]
        )

    def over(self, ranks: Ranks, device: torch.device) -> None:
        """Sums over ranks that counted different rows; ``device`` is one that their group carries tensors of."""
        for name in ("rows", "sum", "outer", "fired", "totals", "l1"):
            setattr(self, name, ranks.all_reduce(getattr(self, name).to(device)).to(self.device))
        self.l0_max = ranks.all_reduce(self.l0_max.to(device), "max").to(self.device)

    def pca_fvu(self) -> float:
        """Variance that the first ``components`` principal components of these very rows leave unexplained."""
        mean = self.sum / self.rows
        variances = torch.linalg.eigvalsh(self.outer / self.rows - torch.outer(mean, mean)).clamp(min=0)
        return float(variances[: len(variances) - self.components].sum() / variances.sum())

    def figures(self, pca: bool = True) -> Figures:
        """SAELens's metrics, formulas and names (6.54, ``evals``), and a few of our own. All shards call it together.

        ``pca``: whether with those of principal components, which take long where there are many dimensions. A
        transcoder is compared with its target. NonFiniteError, on all shards, where the SAE gave NaN or infinite
        values; there must be rows.
        """
        rows = int(self.rows)
        share = self.fired.double() / rows
        own = torch.stack([self.fired.sum(), (self.fired == 0).sum(), (share > DENSE).sum(), self.l1])
        latents = self.shard.all_reduce(torch.cat([own, density_histogram(share).double()]))
        fired, dead, dense, l1 = latents[:4].tolist()
        if not (self.totals.isfinite().all() and latents.isfinite().all()):
            raise NonFiniteError("the activations or reconstructions hold NaN or infinite values")
        error, cosine, norm_in, norm_out, norm_ratio, square_in, inner, square_out = (self.totals / rows).tolist()
        variance = square_in - float((self.sum / rows).square().sum())
        d_sae = len(self.fired) * self.shard.size
        figures: Figures = {
            "reconstruction_quality": {
                "explained_variance": 1 - ratio(error, variance),
                "mse": error,
                "cossim": cosine,
            },
            "shrinkage": {
                "l2_norm_in": norm_in,
                "l2_norm_out": norm_out,
                "l2_ratio": norm_ratio,
                "relative_reconstruction_bias": ratio(square_out, inner),
            },
            "sparsity": {
                "l0": fired / rows,
                "l0_max": float(self.l0_max),
                "l1": l1 / rows,
                "dead_fraction": dead / d_sae,
                "dense_fraction": dense / d_sae,
                DENSITY_HISTOGRAM: [int(count) for count in latents[4:].tolist()],
            },
            "token_stats": {
                "total_tokens_eval_reconstruction": float(rows),
                "total_tokens_eval_sparsity_variance": float(rows),
            },
        }
        if self.components and pca:
            figures["reconstruction_quality"]["pca_fvu"] = self.pca_fvu()
        return figures


class Reconstruction:
    """What a released SAE makes of rows, and the sums over them."""

    def __init__(self, sae: SAE):
        self.sae = sae
        # Not for transcoders: their target's principal components are not found from the input.
        k = 0 if hasattr(sae.cfg, "d_out") else getattr(sae.cfg, "k", 0)
        components = k if isinstance(k, int) and k < sae.d_out else 0
        self.sums = Sums(sae.d_out, sae.cfg.d_sae, sae.device, components=components)

    def add(self, x: Tensor, y: Tensor, counts: bool = True) -> Tensor:
        """As `reconstructed`. ``counts``: whether the rows that do not stay as they are go into the sums."""
        return reconstructed(self.sae, x, y, self.sums.add if counts else _ignore)


def _ignore(y: Tensor, y_hat: Tensor, acts: Tensor) -> None:
    pass


def reconstructed(sae: SAE, x: Tensor, y: Tensor, see: Callable[[Tensor, Tensor, Tensor], None] = _ignore) -> Tensor:
    """The reconstruction of the rows ``x [n, d_in]`` with targets ``y [n, d_out]``, in the place of these.

    Rows that training leaves out (not finite, or far above the usual norm, in ``x`` or ``y``) stay as they are.
    For all but transcoders ``x`` is ``y``. ``see`` is called with the others: as `Sums.add` is.
    """
    mask = usable(x) if x is y else usable(x, y)
    out = y.clone()
    # In parts: the dense activations of a wide SAE are large.
    rows = max(1, min(ROWS_PER_PART, DENSE_AT_ONCE // sae.cfg.d_sae))
    found = []
    for some, targets in zip(x[mask].split(rows), y[mask].split(rows), strict=True):
        acts = sae.encode(some)
        y_hat = sae.add_skip(sae.decode(acts), some)
        see(targets, y_hat, acts)
        found.append(y_hat.to(y.dtype))
    out[mask] = torch.cat(found)
    return out

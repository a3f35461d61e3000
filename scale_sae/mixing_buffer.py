"""Mixes rows that come in the order of their source, so that a batch holds rows of many documents or images."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from scale_sae.errors import UserError


def mixing_buffer(
    buffer_size: int,
    batch_size: int,
    activations_loader: Iterable[Tensor],
    mix_fraction: float = 0.5,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yields batches of shuffled rows. Whenever ``buffer_size`` rows are there, they are shuffled and part is served.

    Names and rule are SAELens's, and so are the batches under the same ``torch.manual_seed``, but at the end of a
    finite source: SAELens serves the last rows in the order in which they came, here they are shuffled like the others.

    Args:
        buffer_size: rows that are gathered before any are served.
        batch_size: rows of each batch.
        activations_loader: yields ``[n, d_in]``; n may differ from one to the next.
        mix_fraction: the share of ``buffer_size`` that stays for the next round; 0 serves the rows in their order.
        seed: of the order; None: torch's global generator decides.

    Yields:
        ``[batch_size, d_in]``. Rows that fill no whole batch at the end are left out.

    Raises:
        UserError: a wrong argument, at the call, or a tensor of the loader that is no matrix.
    """
    for name, value in (("buffer_size", buffer_size), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name}: {value} must be at least 1")
    if buffer_size < batch_size:
        raise UserError(f"buffer_size: {buffer_size} must be at least batch_size ({batch_size})")
    if not 0 <= mix_fraction <= 1:
        raise UserError(f"mix_fraction: {mix_fraction} must be from 0 to 1")
    draw = None if seed is None else torch.Generator().manual_seed(seed)
    return _mix(buffer_size, batch_size, activations_loader, mix_fraction, draw)


def _mix(
    buffer_size: int,
    batch_size: int,
    loader: Iterable[Tensor],
    mix_fraction: float,
    draw: torch.Generator | None,
) -> Iterator[Tensor]:
    def shuffled(rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=draw)] if mix_fraction > 0 else rows

    parts: list[Tensor] = []  # joined once per round: joining at every arrival would copy the buffer each time
    held = 0
    for arrived in loader:
        if arrived.dim() != 2:
            raise UserError(
                f"activations_loader: yielded a tensor of shape {list(arrived.shape)}; flatten it to [rows, d_in]"
            )
        parts.append(arrived.clone())  # a loader may write its next rows where these are
        held += len(arrived)
        if held < buffer_size:
            continue
        rows = torch.cat(parts)
        parts = []  # while rows are served they are held once
        rows = shuffled(rows)
        served = max(1, (held - int(buffer_size * mix_fraction)) // batch_size) * batch_size
        yield from rows[:served].split(batch_size)
        parts, held = [rows[served:].clone()], held - served
        del rows
    if held >= batch_size:
        rows = torch.cat(parts)
        parts = []
        yield from shuffled(rows)[: held // batch_size * batch_size].split(batch_size)

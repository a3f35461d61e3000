"""Times of the Triton kernels alone, beside the bytes that each must move: one line of JSON per kernel and type.

    python benchmarks/triton_kernels.py --rows 8192 --d 4096 --latents 131072 --k 64

Codes are random, so that every latent has ``rows * k / latents`` entries on average. Bytes are those that memory sees
at best: what is read again from the cache is counted once, and a gather from a table that is larger than the cache in
full. With TRITON_INTERPRET=1 in the environment it runs on a CPU, at sizes like ``--rows 8 --d 64 --latents 32 --k 4``,
to try the script: such figures say nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from scale_sae.kernels import fused
from scale_sae.kernels.rows import AdamStep, RowGradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCORES = 2**29  # bytes of a block of rows, as they are worked through


def milliseconds(function: Callable[[], object], repeats: int) -> float:
    """Median of some calls, after one that compiles."""
    times = []
    for _ in range(repeats + 1):
        if DEVICE == "cuda":
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            function()
            done.record()
            done.synchronize()
            times.append(begun.elapsed_time(done))
        else:
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def random_codes(rows: int, latents: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rows and latents of row-major entries, offsets of rows; rows of latent-major entries, offsets of latents."""
    of_row = torch.randint(latents, (rows, k), device=DEVICE).sort(1).values.flatten()
    row = torch.arange(rows, device=DEVICE).repeat_interleave(k)
    sorted_latents, order = of_row.sort(stable=True)
    offsets = torch.searchsorted(sorted_latents, torch.arange(latents + 1, device=DEVICE))
    return row, of_row, torch.arange(0, rows * k + 1, k, device=DEVICE), row[order], offsets


def kernels(
    rows: int, d: int, latents: int, k: int, dtype: torch.dtype, moments: torch.dtype
) -> dict[str, tuple[Callable[[], object], int]]:
    """Name → call and bytes."""
    row, latent, row_offsets, row_by_latent, latent_offsets = random_codes(rows, latents, k)
    latent_by_latent = latent.sort().values
    nnz, matrix, batch = rows * k, latents * d, rows * d * dtype.itemsize
    values = torch.randn(nnz, device=DEVICE)
    x, W = torch.randn(rows, d, device=DEVICE).to(dtype), torch.randn(latents, d, device=DEVICE).to(dtype)
    gradient = RowGradient(row_by_latent, latent_offsets, values, x)
    weight = torch.randn(latents, d, device=DEVICE)
    m, v = (torch.zeros(latents, d, dtype=moments, device=DEVICE) for _ in range(2))
    follower = None if dtype is torch.float32 else W
    number, one, no = (torch.tensor(value, device=DEVICE) for value in (1.0, 1.0, False))
    update = AdamStep(number, 0.0, 0.9, 0.999, one, no)
    block = max(1, min(rows, SCORES // (latents * dtype.itemsize)))
    scores, bias = torch.randn(block, latents, device=DEVICE).to(dtype), torch.zeros(latents, device=DEVICE)
    width = next(width for width in (32, 16, 8, 4, 2, 1) if latents % width == 0)
    gather, entries = nnz * d * dtype.itemsize, 12 * nnz
    adam_bytes = matrix * (8 + 4 * moments.itemsize + (0 if follower is None else 2)) + batch + entries
    return {
        "decode": (lambda: fused.weighted_sums(latent, row_offsets, values, W), gather + batch + entries),
        "dot_rows, by row": (lambda: fused.dot_rows(row, latent, x, W), gather + batch + 20 * nnz),
        "dot_rows, by latent": (
            lambda: fused.dot_rows(row_by_latent, latent_by_latent, x, W),
            matrix * dtype.itemsize + batch + 20 * nnz,
        ),
        "scatter": (
            lambda: fused.weighted_sums(row_by_latent, latent_offsets, values, x),
            matrix * dtype.itemsize + batch + entries,
        ),
        "row_squares": (lambda: fused.row_squares(gradient), batch + entries),
        "adam_rows": (lambda: fused.adam_rows(gradient, weight, m, v, update, follower), adam_bytes),
        f"score_maxima, {block} rows": (
            lambda: fused.score_maxima(scores, None, bias, width, False),
            2 * scores.numel() * dtype.itemsize,
        ),
        "a copy of the matrix": (lambda: weight.clone(), 8 * matrix),
    }


def main(rows: int, d: int, latents: int, k: int, repeats: int) -> None:
    torch.manual_seed(0)
    for dtype, moments in (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        for name, (function, moved) in kernels(rows, d, latents, k, dtype, moments).items():
            took = milliseconds(function, repeats)
            size = {"rows": rows, "d": d, "latents": latents, "k": k}
            types = {"dtype": str(dtype)[6:], "moments": str(moments)[6:]}
            figures = {"ms": round(took, 3), "GB/s": round(moved / took / 1e6, 1)}
            print(json.dumps({"kernel": name, **types, **figures, **size}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for option, default in {"rows": 8192, "d": 4096, "latents": 131072, "k": 64, "repeats": 7}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    main(**vars(parser.parse_args()))

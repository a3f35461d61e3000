"""The shuffle buffer of the library, against SAELens's, and the scaler of activations."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from scale_sae import (
    ActivationScaler,
    mixing_buffer,
)
from scale_sae.errors import UserError

D_IN = 16


def documents(n: int) -> Iterator[Tensor]:
    for number in range(n):
        yield torch.arange(number * 100, number * 100 + 37 + number % 5, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("mix_fraction", [0.0, 0.5, 1.0])
def test_mixing_buffer_serves_saelenss_batches(mix_fraction: float) -> None:
    theirs = pytest.importorskip("sae_lens.training.mixing_buffer").mixing_buffer
    torch.manual_seed(3)
    expected = list(theirs(120, 16, documents(20), mix_fraction))
    torch.manual_seed(3)
    ours = list(mixing_buffer(120, 16, documents(20), mix_fraction))
    assert len(ours) == len(expected)
    # All but those of the end, which SAELens does not shuffle; what it kept back is at most a buffer.
    served = len(ours) - (120 + 41) // 16 if mix_fraction else len(ours)
    assert served > 30 and all(torch.equal(a, b) for a, b in zip(ours[:served], expected[:served], strict=True))
    rows, all_rows = torch.cat(ours).flatten(), torch.cat(list(documents(20))).flatten()
    assert len(rows.unique()) == len(rows) and set(rows.tolist()) <= set(all_rows.tolist())
    assert len(all_rows) - len(rows) < 16  # only what fills no batch is left out


def test_mixing_buffer_has_a_seed_and_shuffles_the_end() -> None:
    one, same, other = (torch.cat(list(mixing_buffer(500, 10, documents(8), seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert not torch.equal(one.sort(dim=0).values, one)  # smaller than the buffer, and mixed all the same


def test_mixing_buffer_holds_its_rows_once() -> None:
    width = 977  # of no other tensor

    def held() -> int:
        tensors = [found for found in gc.get_objects() if type(found) is Tensor and found.shape[-1:] == (width,)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) // (4 * width)

    def loader() -> Iterator[Tensor]:
        for number in range(40):
            if number == 29:  # the last before rows are served for the second time
                found.append(held())
            yield torch.zeros(50, width)

    found: list[int] = []
    batches = mixing_buffer(1000, 100, loader(), seed=0)
    for _ in range(6):
        assert next(batches).shape == (100, width)
    # A buffer, and what the loader yielded last.
    assert found[0] <= 1000 + 50 and held() <= 1000 + 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer_size": 8, "batch_size": 16}, r"buffer_size: 8 must be at least batch_size \(16\)"),
        ({"buffer_size": 0, "batch_size": 16}, "buffer_size: 0 must be at least 1"),
        ({"buffer_size": 32, "batch_size": 16, "mix_fraction": 2}, "mix_fraction: 2 must be from 0 to 1"),
    ],
)
def test_mixing_buffer_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mixing_buffer(activations_loader=documents(3), **arguments)
    with pytest.raises(UserError, match=r"yielded a tensor of shape \[2, 3, 4\]; flatten it"):
        next(mixing_buffer(8, 4, iter([torch.zeros(2, 3, 4)])))


def test_activation_scaler() -> None:
    scaler, x = ActivationScaler(), torch.randn(5, D_IN)
    assert torch.equal(scaler(x), x) and torch.equal(scaler.unscale(x), x)
    batches = [torch.randn(n, D_IN, dtype=torch.float64) * n for n in (3, 40, 7)]
    scaler.estimate_scaling_factor(D_IN, iter(batches), 2)
    norms = torch.cat(batches[:2]).norm(dim=1)
    assert scaler.scaling_factor == pytest.approx(float(D_IN**0.5 / norms.mean()), rel=1e-14)
    assert torch.equal(scaler.scale(x), x * scaler.scaling_factor)
    torch.testing.assert_close(scaler.unscale(scaler(x)), x)
    with pytest.raises(UserError, match="no row has a finite norm above 0"):
        scaler.estimate_scaling_factor(D_IN, iter([torch.zeros(3, D_IN)]), 1)

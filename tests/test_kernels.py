"""Sparse products against the dense ones that they stand for."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sae.kernels.codes import (
    Codes,
    Columns,
    Decoder,
    Encoder,
    decode,
    decode_columns,
    decode_selected,
    dot_rows,
    encode_selected,
    scatter_rows,
)

# Results differ from the dense product (in float64) by the rounding of the inputs' products: some units in the last
# place of the largest entry. bfloat16 has 8 bits, of which only the last rounding of a float32 sum is lost.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8}


def random_codes(
    n_rows: int = 12, n_latents: int = 20, density: float = 0.3, dtype: torch.dtype = torch.float64
) -> Codes:
    """Codes with rows and latents that have no entry, among them the first and the last."""
    chosen = torch.rand(n_rows, n_latents) < density
    chosen[[0, 5, -1]] = False
    chosen[:, [0, 7, -1]] = False
    rows, latents = chosen.nonzero().unbind(1)
    return Codes(rows, latents, torch.randn(len(rows)).to(dtype), n_rows, n_latents)


def dense(codes: Codes) -> Tensor:
    out = torch.zeros(codes.n_rows, codes.n_latents, dtype=torch.float64)
    out[codes.rows, codes.latents] = codes.values.double()
    return out


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_products_equal_dense_ones(dtype: torch.dtype) -> None:
    codes = random_codes(dtype=dtype)
    W, g = torch.randn(20, 6).to(dtype), torch.randn(12, 6).to(dtype)
    found = {
        "decode": (decode(codes, W), dense(codes) @ W.double()),
        "scatter_rows": (scatter_rows(codes, g), dense(codes).T @ g.double()),
        "dot_rows": (dot_rows(codes.rows, codes.latents, g, W), (g.double() @ W.double().T)[codes.rows, codes.latents]),
    }
    for name, (actual, expected) in found.items():
        wanted = torch.promote_types(dtype, torch.float32) if name == "dot_rows" else dtype  # weights of later sums
        assert actual.dtype == wanted and actual.shape == expected.shape, name
        assert relative(actual, expected) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_inputs_need_not_be_contiguous(dtype: torch.dtype) -> None:
    codes = random_codes(dtype=dtype)
    W, g = torch.randn(6, 20).to(dtype).T, torch.randn(6, 1).to(dtype).expand(6, 12).T
    products = (g.double() @ W.double().T)[codes.rows, codes.latents]
    assert relative(decode(codes, W), dense(codes) @ W.double()) <= TOLERANCE[dtype]
    assert relative(scatter_rows(codes, g), dense(codes).T @ g.double()) <= TOLERANCE[dtype]
    assert relative(dot_rows(codes.rows, codes.latents, g, W), products) <= TOLERANCE[dtype]


def test_no_entries_give_zeros() -> None:
    codes = random_codes(density=0.0)
    W, g = torch.randn(20, 6).double(), torch.randn(12, 6).double()
    assert torch.equal(decode(codes, W), torch.zeros(12, 6).double())
    assert torch.equal(scatter_rows(codes, g), torch.zeros(20, 6).double())
    assert dot_rows(codes.rows, codes.latents, g, W).shape == (0,)


def test_counts_come_from_the_offsets() -> None:
    codes = random_codes()
    assert torch.equal(codes.row_offsets.diff(), (dense(codes) != 0).sum(1))
    assert torch.equal(codes.by_latent[1].diff(), (dense(codes) != 0).sum(0))


def test_other_values_share_the_order_but_not_the_values() -> None:
    codes = random_codes()
    order = codes.by_latent
    doubled = codes.with_values(2 * codes.values)
    assert doubled.by_latent is order
    assert torch.equal(dense(doubled), 2 * dense(codes))


@pytest.mark.parametrize("with_shift", [True, False])
def test_gradients_of_selected_entries(with_shift: bool) -> None:
    codes = random_codes(n_rows=6, n_latents=9)
    x = torch.randn(6, 4).double()

    def reconstruct(shift: Tensor, W_enc_rows: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        shifted = x - shift if with_shift else x
        pre = (shifted @ W_enc_rows.T + b_enc)[codes.rows, codes.latents].detach()
        encoder = Encoder(shifted.detach(), shift if with_shift else None, W_enc_rows, b_enc)
        return decode_selected(encode_selected(codes.with_values(pre), encoder), codes, Decoder(W_dec))

    inputs = [torch.randn(shape).double().requires_grad_() for shape in ((4,), (9, 4), (9,), (9, 4))]
    inputs[0].requires_grad_(with_shift)
    assert gradcheck(reconstruct, inputs)


def chosen_columns(chosen: Tensor, latents: Tensor, pre: Tensor, slots: int, block_rows: int) -> Columns:
    """The pre-activations ``pre [B, n]`` of ``latents`` where ``chosen [B, m]``, in slots of which some are empty."""
    places = torch.full((len(chosen), slots), -1)
    values = torch.full(places.shape, 99.0, dtype=torch.float64)  # what is in an empty slot says nothing
    for row, mask in enumerate(chosen):
        (found,) = mask.nonzero(as_tuple=True)
        places[row, : len(found)] = found
        values[row, : len(found)] = pre[row, latents[found]]
    return Columns(latents, values, places, block_rows)


@pytest.mark.parametrize("block_rows", [1, 4, 100])
@pytest.mark.parametrize("latents", [[7, 1, 4], []])
@pytest.mark.parametrize("all_chosen", [True, False])
def test_gradients_of_columns(latents: list[int], all_chosen: bool, block_rows: int) -> None:
    x, numbers = torch.randn(6, 4).double(), torch.tensor(latents, dtype=torch.int64)
    chosen = torch.rand(6, len(latents)) < 0.5
    chosen[2:4] = False

    def reconstruct(shift: Tensor, W_enc_rows: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        pre = ((x - shift) @ W_enc_rows.T + b_enc).detach()
        columns = Columns(numbers, pre[:, numbers], None, block_rows)
        if not all_chosen:
            columns = chosen_columns(chosen, numbers, pre, len(latents), block_rows)
        return decode_columns(columns, Encoder((x - shift).detach(), shift, W_enc_rows, b_enc), Decoder(W_dec))

    def plainly(shift: Tensor, W_enc_rows: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
        pre = ((x - shift) @ W_enc_rows.T + b_enc)[:, numbers]
        return (pre if all_chosen else pre * chosen) @ W_dec[numbers]

    inputs = [torch.randn(shape).double().requires_grad_() for shape in ((4,), (9, 4), (9,), (9, 5))]
    upstream = torch.randn(6, 5).double()
    found, expected = reconstruct(*inputs), plainly(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    grads = [torch.autograd.grad(out, inputs, upstream, materialize_grads=True) for out in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


class _LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation under it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_dense_is_made() -> None:
    """Neither rows × latents (16384 here) nor entries × d (four times the entries), forward or backward."""
    codes, x = random_codes(n_rows=128, n_latents=128, density=0.15), torch.randn(128, 4).double()
    shift, b_enc = torch.randn(4).double().requires_grad_(), torch.randn(128).double().requires_grad_()
    W_enc_rows, W_dec = (torch.randn(128, 4).double().requires_grad_() for _ in range(2))
    assert len(codes.rows) > W_dec.numel()
    with _LargestTensor() as largest:
        values = encode_selected(codes, Encoder(x, shift, W_enc_rows, b_enc))
        decode_selected(values, codes, Decoder(W_dec)).square().sum().backward()
    assert largest.numel == len(codes.rows)
    assert W_dec.grad is not None

"""Compiles the Triton kernels for Hopper GPUs (sm_90) at the sizes of real runs, without a GPU; see test_fused.py.

The wrappers are called with tensors that have no data, and each launch is compiled instead of run: what is reported is
what they would launch. One JSON object per launch is printed.
"""

import contextlib
import io
import json
import re
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from scale_sae.kernels import fused
from scale_sae.kernels.rows import AdamStep, RowGradient

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.bool: "*i1"}
HOPPER = GPUTarget("cuda", 90, 32)
_compiled: set[str] = set()


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands for ``JITFunction.run``; describes arguments to the compiler as that does."""
    values = {**dict(zip(kernel.arg_names, args, strict=False)), **options}
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list]] = {}
    for place, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.pop(parameter.name)
        special = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = POINTERS[value.dtype]
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            types[name] = "fp32"
        if types[name].startswith("*") or (types[name] != "constexpr" and special and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    if (launch := repr((kernel.__name__, types, constants, attributes))) in _compiled:
        return
    _compiled.add(launch)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        source = ASTSource(kernel, types, constants, attributes)
        ptx = triton.compile(source, target=HOPPER, options=values).asm["ptx"]
    report(kernel.__name__, values["num_warps"], types, constants, ptx, log.getvalue())


def report(name: str, warps: int, types: dict, constants: dict, ptx: str, log: str) -> None:
    def number(pattern: str) -> int:
        found = re.findall(pattern, log)
        assert len(found) == 1, f"what the assembler says is not as expected: {log}"
        return int(found[0])

    facts = {
        "kernel": name,
        "types": " ".join(value for value in types.values() if value != "constexpr"),
        "constants": {key: value for key, value in constants.items() if value is not None},
        "warps": warps,
        "target": re.findall(r"\.target (\w+)", ptx)[0],
        "registers": number(r"Used (\d+) registers"),
        "spill_stores": number(r"(\d+) bytes spill stores"),
        "spill_loads": number(r"(\d+) bytes spill loads"),
        "stack": number(r"(\d+) bytes stack frame"),
        "vector_loads": len(re.findall(r"\bld\.global\S*\.v[248]\.", ptx)),
        "atomics": len(re.findall(r"\b(?:atom|red)\.global", ptx)),
    }
    print(json.dumps(facts), flush=True)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def gradient(n: int, d: int, dtype: torch.dtype, extra: bool) -> RowGradient:
    entries = 4 * n
    return RowGradient(
        empty(entries, dtype=torch.int64),
        empty(n + 1, dtype=torch.int64),
        empty(entries),
        empty(8192, d, dtype=dtype),
        empty(n, dtype=torch.int64) if extra else None,
        empty(256, d, dtype=dtype) if extra else None,
    )


def launch_all(n: int, d: int, dtype: torch.dtype, moments: torch.dtype, extra: bool, nnz: int = 8192 * 64) -> None:
    """Each kernel once: ``n`` latents of size ``d``, tables of ``dtype``."""
    entries, rows = empty(nnz, dtype=torch.int64), empty(8193, dtype=torch.int64)
    fused.weighted_sums(entries, rows, empty(nnz, dtype=dtype), empty(n, d, dtype=dtype))
    fused.dot_rows(entries, entries, empty(8192, d, dtype=dtype), empty(n, d, dtype=dtype))
    fused.row_squares(gradient(n, d, dtype, extra))
    update = AdamStep(empty(), 1e-4, 0.9, 0.999, empty(), empty(dtype=torch.bool), seed=2**32 - 1)
    follower = empty(n, d, dtype=torch.bfloat16) if dtype is torch.bfloat16 else None
    state = empty(n, d), empty(n, d, dtype=moments), empty(n, d, dtype=moments)
    fused.adam_rows(gradient(n, d, dtype, extra), *state, update, follower)
    scores = empty(1024 if n > 1 else 1, n, dtype=dtype)
    fused.score_maxima(scores, empty(n) if extra else None, empty(n), min(32, n), magnitude=not extra)


def main() -> None:
    JITFunction.run = compile_launch
    triton.knobs.compilation.always_compile = True  # what is found in the cache comes without the assembler's log
    triton.knobs.nvidia.dump_ptxas_log = True
    launch_all(131_072, 4096, torch.bfloat16, torch.float32, extra=False)
    launch_all(131_072, 4096, torch.bfloat16, torch.bfloat16, extra=True)
    launch_all(131_072, 4096, torch.float32, torch.float32, extra=True)
    launch_all(131_072, 2304, torch.bfloat16, torch.float32, extra=False)
    launch_all(1, 1, torch.float32, torch.bfloat16, extra=True, nnz=1)  # the compiler treats numbers of 1 differently


if __name__ == "__main__":
    main()

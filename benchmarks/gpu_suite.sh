#!/usr/bin/env bash
# What one GPU can show, in one call of under 10 minutes; what there is no time for is left out and said:
#
#   bash benchmarks/gpu_suite.sh [OUT_DIR]
#
# 1. the machine's ceilings: products in TFLOP/s, copies and an Adam pass in GB/s;
# 2. the tests that use a GPU, the Triton kernels among them;
# 3. our step against the peers' (sparsify with its own Triton kernels) at d_in 4096, d_sae 131072, k 64, batch 8192,
#    in bfloat16 and float32. One rank of tp=8 with d_sae 1048576 holds 131072 latents as well: its share of the products
#    is the same, and of the 64 codes of a row about 8 are its own. That share is measured as k 8, without the messages.
#
# It installs nothing. Peers that cannot be imported are left out; PEERS may name a folder that holds them:
#
#   pip install --target PEERS --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 \
#       natsort schedulefree simple-parsing docstring-parser einops
#
# OUT_DIR (default: runs/gpu_suite) takes what it prints (suite.log), peers' JSON lines and what they said.
# SIZE=tiny goes the same way on a CPU in a minute or two, to try the script; its figures say nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-runs/gpu_suite}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PEERS:+:$PEERS}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec > >(tee "$out/suite.log") 2>&1
end=$((SECONDS + ${SECONDS_AT_MOST:-570}))
failed=0

if [[ ${SIZE:-full} == tiny ]]; then
    device=cpu dtypes=float32 subjects=floor,ours tests=(tests/test_harness.py)
    kernels=(--rows 16 --d 32 --latents 24 --k 2)
    size=(--sizes 64x512 --batch 128 --k 8 --rounds 1 --steps 1 --warmup 1) shard=(--sizes 64x512 --batch 128 --k 1)
else
    device=cuda dtypes="bfloat16 float32" subjects=floor,ours,sae_lens,sparsify,dictionary_learning
    tests=(tests/test_fused.py)  # others fork, which a process with CUDA's threads cannot
    kernels=(--rows 8192 --d 4096 --latents 131072 --k 64)
    size=(--sizes 4096x131072 --batch 8192 --k 64 --rounds 5 --steps 3 --warmup 3) shard=("${size[@]}" --k 8)
fi

# part TITLE SECONDS COMMAND…: runs it for at most so long, and for no longer than there is time left.
part() {
    local title=$1 seconds=$2
    shift 2
    local left=$((end - SECONDS))
    echo
    echo "## $title"
    if ((left < 5)); then
        echo "left out: no time is left"
        failed=1
        return
    fi
    timeout --kill-after=5 $((left < seconds ? left : seconds)) "$@"
    local code=$?
    if ((code != 0)); then
        echo "failed: exit code $code"
        failed=1
    fi
}

# peers FILE ARGUMENTS…: the last line that it prints is JSON.
peers() {
    local file=$1
    shift
    if "$python" benchmarks/peers.py --device "$device" --alone "$@" > "$out/$file.md" 2> "$out/$file.log"; then
        sed '$d' "$out/$file.md"
        sed -n '$p' "$out/$file.md" > "$out/$file.json"
    else
        tail -n 20 "$out/$file.log"
        return 1
    fi
}
export -f peers
export python device out

part "The machine" 20 bash -c 'nvidia-smi || true; git log -1 --format="commit %h" || true'
part "Ceilings" 60 "$python" - "$device" <<'PYTHON'
import sys
import time

import torch

cuda = sys.argv[1] == "cuda"
device = torch.device(sys.argv[1])
print("torch", torch.__version__, torch.cuda.get_device_name() if cuda else "CPU")


def seconds(call, repeats=20 if cuda else 3):
    """The median of single calls."""
    found = []
    for _ in range(3 + repeats):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return sorted(found[3:])[repeats // 2]


m, d, n = (8192, 4096, 131072) if cuda else (128, 64, 512)
for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
    torch.backends.cuda.matmul.allow_tf32 = tf32
    x, weight = torch.randn(m, d, device=device, dtype=dtype), torch.randn(d, n, device=device, dtype=dtype)
    out = torch.empty(m, n, device=device, dtype=dtype)
    took = seconds(lambda: torch.mm(x, weight, out=out))
    print(f"encoder GEMM, {dtype}{' in TF32' if tf32 else ''}: {took * 1e3:.2f} ms, {2 * m * d * n / took / 1e12:.1f} TFLOP/s")
    took = seconds(lambda: torch.topk(out, min(64, n), sorted=False))
    print(f"torch.topk of its result, {dtype}: {took * 1e3:.2f} ms")
    del x, weight, out
a = torch.empty(2**30 if cuda else 2**22, dtype=torch.uint8, device=device)
b = torch.empty_like(a)
took = seconds(lambda: b.copy_(a))
print(f"copy: {2 * a.nbytes / took / 1e9:.0f} GB/s read and written")
matrices = [torch.zeros(n, d, device=device) for _ in range(2)]
for matrix in matrices:
    matrix.grad = torch.randn_like(matrix)
adam = torch.optim.Adam(matrices, fused=True)
took = seconds(adam.step)
moved = 28 * 2 * n * d  # bytes: weight, gradient and two moments read, all but the gradient written
print(f"fused Adam over W_enc and W_dec: {took * 1e3:.2f} ms, {moved / took / 1e9:.0f} GB/s")
PYTHON
[[ $device == cpu ]] && interpret=TRITON_INTERPRET=1 || interpret=TRITON_INTERPRET=0
part "Kernels" 60 env "$interpret" "$python" benchmarks/triton_kernels.py "${kernels[@]}"
part "Tests" 200 "$python" -m pytest -v -x -p no:cacheprovider "${tests[@]}"
for dtype in $dtypes; do
    part "One of 8 shards in $dtype" 60 bash -c 'peers "$@"' _ "shard_$dtype" --dtype "$dtype" "${size[@]}" "${shard[@]}" \
        --subjects floor,ours --architectures topk
done
for dtype in $dtypes; do
    for architecture in topk batchtopk; do
        part "A $architecture step in $dtype" 100 bash -c 'peers "$@"' _ "${architecture}_$dtype" --dtype "$dtype" \
            "${size[@]}" --subjects "$subjects" --architectures "$architecture"
    done
done
echo
echo "took $SECONDS s; failed parts: $failed"
exit $failed

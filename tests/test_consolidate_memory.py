"""Memory of a consolidation: bounded by its blocks, whatever the size of the SAE.

Measured on a CPU (peak resident memory, VmHWM, of the command's process):
4.3 GB of weights: 628 MiB in all, 224 of which are Python, torch and the imported command; 75 s of CPU time.
201 MB of weights in blocks of 2 MiB: 43 MiB above the process that has only imported the command.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

import made_up_run
from scale_sae import checkpoint
from scale_sae.saes import registry

MIB = 2**20
SAE_ID = "model.layers.1"

MEASURE = """
import json, sys
from scale_sae import tensorfile
from scale_sae.consolidate import main

def memory(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

run_dir, out, block_bytes = sys.argv[1:]
tensorfile.BLOCK_BYTES = int(block_bytes)
idle = memory("VmRSS")
main(run_dir, out=out)
print(json.dumps({"idle": idle, "peak": memory("VmHWM")}))
"""


def latent_rows(block: Tensor, start: int, stop: int) -> Tensor:
    """Rows ``start..stop`` of a made-up matrix in which no two rows are alike: ``block`` again and again, scaled."""
    index = torch.arange(start, stop)
    return block[index % len(block)] * (1 + index[:, None] / 1e5)


def save_large_run(run_dir: Path, d_in: int, d_sae: int, shards: int) -> None:
    """A checkpoint whose W_enc and W_dec are all of it; a shard at a time is in memory."""
    torch.manual_seed(0)
    block = torch.randn(1021, d_in) / d_in**0.5
    cfg = registry.training_config("topk", d_in, {"d_sae": d_sae, "k": 32}, "saes.0")
    root = checkpoint.begin(run_dir, 1)
    folder = checkpoint.sae_folder(root, SAE_ID)
    replicated = {"b_dec": torch.randn(d_in), **made_up_run.job_scalars(window_tokens=1000)}
    digests = checkpoint.save_replicated(root, folder, replicated)
    for shard in range(shards):
        start, stop = shard * d_sae // shards, (shard + 1) * d_sae // shards
        W_dec = latent_rows(block, start, stop)
        counts = torch.arange(start, stop)
        rows = {"W_enc_rows": W_dec, "W_dec": W_dec, "b_enc": counts / d_sae}
        rows |= {"tokens_since_fired": counts, "fired_count": counts % 1000}
        digests |= checkpoint.save_rows(root, folder, rows, start)
    config = made_up_run.resolved_config([{"d_sae": d_sae, "k": 32}], [SAE_ID])
    job = made_up_run.job_entry(SAE_ID, SAE_ID, 0, cfg)
    checkpoint.seal(root, digests, {"step": 1, "tokens": 2048, "config": config, "jobs": [job], "stream": {}})


def consolidate_and_measure(run_dir: Path, out: Path, block_bytes: int) -> dict[str, int]:
    command = [sys.executable, "-c", MEASURE, str(run_dir), str(out), str(block_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    measured: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return measured


def assert_released(out: Path, d_in: int, d_sae: int) -> None:
    """The last latent is where and what it should be (the command itself has compared all)."""
    with safetensors.safe_open(out / SAE_ID / "sae_weights.safetensors", "pt") as file:
        assert file.get_slice("W_enc").get_shape() == [d_in, d_sae]
        W_dec = file.get_slice("W_dec")[d_sae - 1 :]
    torch.manual_seed(0)
    row = latent_rows(torch.randn(1021, d_in) / d_in**0.5, d_sae - 1, d_sae)
    torch.testing.assert_close(W_dec, row / row.norm())


def test_memory_is_that_of_the_blocks(tmp_path: Path) -> None:
    """201 MB of weights in blocks of 2 MiB: a whole W_enc or W_dec anywhere would be 96 MiB."""
    d_in, d_sae = 1024, 24576
    save_large_run(tmp_path / "run", d_in, d_sae, shards=2)
    measured = consolidate_and_measure(tmp_path / "run", tmp_path / "out", 2 * MIB)
    assert_released(tmp_path / "out", d_in, d_sae)
    # The check keeps four matrices of [16 rows, d_sae] in float64, 3 MiB each; ten blocks of 1 MiB are alive at a time.
    assert measured["peak"] - measured["idle"] < 56 * MIB


@pytest.mark.slow
def test_four_gigabytes_consolidate_in_less_than_one(tmp_path: Path) -> None:
    """The promise: 4 GiB of weights, the command as it is shipped, less than 1 GB above an idle Python."""
    d_in, d_sae = 4096, 131072
    save_large_run(tmp_path / "run", d_in, d_sae, shards=8)
    idle = int(subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, check=True).stdout)
    measured = consolidate_and_measure(tmp_path / "run", tmp_path / "out", 64 * MIB)
    assert_released(tmp_path / "out", d_in, d_sae)
    assert measured["peak"] - idle < 10**9


IDLE = "print(int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024)"

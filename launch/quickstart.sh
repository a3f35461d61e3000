#!/usr/bin/env bash
# From nothing to a released and evaluated SAE: installs into .venv, trains on the embedded model and text on every GPU
# (or on 4 CPU processes: language model tp=2, SAE tp=2), consolidates, evaluates, prints a table and makes a page.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

run=runs/quickstart
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if ((gpus == 0)); then
    options=(--config_file launch/cpu.yaml --num_processes 4)
    overrides=()
else
    # The largest power of two that the GPUs allow; each runs the language model and holds its share of the SAEs.
    processes=1
    while ((processes * 2 <= gpus && processes < 64)); do processes=$((processes * 2)); done
    options=(--num_processes "$processes")
    if ((processes > 1)); then options+=(--multi_gpu); fi
    overrides=(--topology.lm=colocated "--topology.sae.tp=$processes")
fi

accelerate launch "${options[@]}" -m scale_sae.train --config configs/quickstart.yaml \
    "--output_dir=$run" ${overrides[@]+"${overrides[@]}"}
# A release of the same run is made again; anything else in its place is left alone.
python -m scale_sae.consolidate "$run" --out "$run/release"
python -m scale_sae.evaluate "$run/release"
python -m scale_sae.report "$run"

"""Settings that must hold before any test module is imported."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the harness's forks
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network: a missing model is an error at once, not after retries

import torch

# Forked ranks hang if their parent ever ran a multi-threaded operation.
torch.set_num_threads(1)

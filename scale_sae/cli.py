"""``scale-sae <command> …``: the commands of which one process is enough; ``accelerate launch`` starts more."""

import importlib
import sys

import fire

COMMANDS = ("bench", "cache_activations", "consolidate", "evaluate", "plan", "pretokenize", "report", "train", "upload")


def main() -> None:
    """Runs ``python -m scale_sae.<command>`` with the remaining arguments."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(
            f"usage: scale-sae {{{','.join(COMMANDS)}}} … (--help after a command lists its options)", file=sys.stderr
        )
        sys.exit(0 if sys.argv[1:] in (["--help"], ["-h"]) else 2)
    name = sys.argv.pop(1)
    fire.Fire(importlib.import_module(f"scale_sae.{name}").main, name=f"scale-sae {name}")

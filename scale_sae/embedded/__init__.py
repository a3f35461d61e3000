"""A small trained causal LM and a text to run it on, so that the main job needs no network.

The model (a byte-level Llama in ``model/``) was trained by ``python -m scale_sae.embedded.train`` on the text that
``load_text`` returns: the source of the installed Python's standard library.
"""

import hashlib
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "embedded"
MODEL_FOLDER = Path(__file__).parent / "model"


def standard_library_files() -> list[Path]:
    """The installed Python's own ``.py`` files, third-party packages left out, in an order that a rerun repeats."""
    root = Path(sysconfig.get_path("stdlib"))
    third_party = {"site-packages", "dist-packages", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not third_party.intersection(path.relative_to(root).parts))
    # Sorted by the hash of the relative path: neighbouring files of one package do not land in the same chunk.
    return sorted(files, key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest())


def load_text() -> "Dataset":
    """The standard library as a ``datasets.Dataset`` with one row ``{"text": str, "path": str}`` per file."""
    from datasets import Dataset

    root = Path(sysconfig.get_path("stdlib"))
    texts, paths = [], []
    for path in standard_library_files():
        # Some test files are written in other encodings on purpose; they are left out.
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            texts.append(text)
            paths.append(path.relative_to(root).as_posix())
    return Dataset.from_dict({"text": texts, "path": paths})

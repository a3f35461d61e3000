"""A small trained causal LM and a text to run it on, so that the main job needs no network.

The model (a byte-level Llama in ``model/``) was trained by ``python -m scale_sae.embedded.train`` on the text that
``load_text`` returns: the source of the installed Python's standard library.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

NAME = "embedded"
MODEL_FOLDER = Path(__file__).parent / "model"
PIECE = 2048  # characters, and what is left of the line


def standard_library_files() -> list[Path]:
    """The installed Python's own ``.py`` files, third-party packages left out, in an order that a rerun repeats."""
    root = Path(sysconfig.get_path("stdlib"))
    third_party = {"site-packages", "dist-packages", "__pycache__"}
    files = (path for path in root.rglob("*.py") if not third_party.intersection(path.relative_to(root).parts))
    return sorted(files, key=lambda path: _order(path.relative_to(root).as_posix()))


def load_text() -> "Dataset":
    """The standard library as a ``datasets.Dataset`` with one row ``{"text": str, "path": str}`` per piece of a file.

    In pieces, since some files are a thousand times as long as others: a buffer would hold rows of a single one, and
    the held-out text would be a handful of them.
    """
    from datasets import Dataset

    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in standard_library_files():
        # Some test files are written in other encodings on purpose; they are left out.
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = path.relative_to(root).as_posix()
        found += [(_order(f"{name} {number}"), text, name) for number, text in enumerate(_pieces(text))]
    found.sort()
    return Dataset.from_dict({"text": [text for _, text, _ in found], "path": [path for _, _, path in found]})


def _pieces(text: str) -> Iterator[str]:
    """Whole lines of ``text``, about ``PIECE`` characters of them at a time."""
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= PIECE:
            yield piece
            piece = ""
    if piece:
        yield piece


def _order(name: str) -> str:
    """What to sort by so that neighbours of a package or a file do not land in the same chunk, in every run alike."""
    return hashlib.sha256(name.encode()).hexdigest()

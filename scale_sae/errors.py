"""The one exception for what a user can put right, and the help it gives."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A wrong input. Its message is one line that names the key, the value and what would be right."""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`` (did you mean a, b?)`` with the up to three candidates most like ``word``, or nothing."""
    found = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.5)
    return f" (did you mean {', '.join(found)}?)" if found else ""

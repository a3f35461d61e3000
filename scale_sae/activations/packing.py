"""Cuts token ids into contexts of one length, as SAELens does (6.54, ``concat_and_batch_sequences``)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """Documents are joined, and contexts cut from the line that they make; None stands for no token.

    A special token that is already where it would be put is not doubled.

    Attributes:
        context_size: token ids per context, the special ones included; above 1 where every context begins with one.
        begin_context: begins every context.
        separator: stands between two documents of one context.
        begin_document: begins every document, after one of the above.
    """

    context_size: int
    begin_context: int | None = None
    separator: int | None = None
    begin_document: int | None = None

    def fill(self, context: list[int], ids: list[int], used: int, begins: bool) -> tuple[int, bool]:
        """Moves ids from ``used`` on into ``context`` until one of them ends.

        An open context is only ever continued with another document: the last one ended inside it.

        Args:
            context: the context that is being filled, shorter than ``context_size``.
            ids: a document, longer than ``used``.
            used: how many of its ids are in contexts already.
            begins: whether the document's begin is still to come.

        Returns:
            ``used`` and ``begins`` afterwards.
        """
        lead = self.separator if context else self.begin_context
        begin = self.begin_document if begins and ids[used] != self.begin_document else None
        prefix = [] if begin is None else [begin]
        if lead is not None and lead != (ids[used] if begin is None else begin):
            prefix.insert(0, lead)
        room = self.context_size - len(context)
        end = used + max(0, room - len(prefix))
        context += prefix[:room] + ids[used:end]
        return min(end, len(ids)), begin is not None and len(prefix) > room

    def contexts(self, documents: Iterable[list[int]]) -> Iterator[list[int]]:
        """The whole contexts of some documents; the rest of the last one is left out."""
        context: list[int] = []
        for ids in documents:
            used, begins = 0, True
            while used < len(ids):
                used, begins = self.fill(context, ids, used, begins)
                if len(context) == self.context_size:
                    yield context
                    context = []

    def one_per_document(self, documents: Iterable[list[int]]) -> Iterator[list[int]]:
        """The first ``context_size`` ids of every document that has so many with its begin; the others are left out."""
        begin = self.begin_context if self.begin_document is None else self.begin_document
        for ids in documents:
            if begin is not None and len(ids) >= self.context_size - 1 and ids and ids[0] != begin:
                ids = [begin, *ids]
            if len(ids) >= self.context_size:
                yield ids[: self.context_size]

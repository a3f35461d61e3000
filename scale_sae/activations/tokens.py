"""From a dataset to chunks of model inputs: documents are tokenised and packed into contexts, images taken one by one.

The packing is SAELens's. Documents held out for evaluation never enter a training chunk. Every chunk carries a cursor,
a small JSON-able dict from which another process goes on with exactly the chunks that would have followed.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scale_sae import embedded
from scale_sae.activations.architecture import first_line, image_positions, input_name, model_path
from scale_sae.activations.packing import Packing
from scale_sae.activations.pretokenized import check_pretokenized, check_token_ids, vocabulary_size
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset
    from transformers import PreTrainedTokenizerBase

# Documents tokenised in one call. A resume reads and tokenises at most this many documents again.
DOCUMENTS_PER_BATCH = 64
IMAGES_PER_BATCH = 8
# Columns of token ids that stand in for the default text column where a dataset has none.
TOKEN_COLUMNS = ("tokens", "input_ids")
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
START: dict[str, Any] = {"chunk": 0, "dataset": None, "row": 0, "used": 0}


@dataclass(frozen=True)
class Chunk:
    """Contexts that one LM replica forwards in one go.

    Attributes:
        index: the chunk's number in the stream, from 0.
        tokens: int64 ``[contexts, context_size]``; for images the pixel values, float32 ``[contexts, C, H, W]``.
        keep: bool ``[contexts, positions]``, the positions whose activations become rows.
        cursor: where the next chunk begins, JSON-able.
    """

    index: int
    tokens: Tensor
    keep: Tensor
    cursor: dict[str, Any]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to evaluation: decided by its content, so that a copy of it is held out too."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def load_tokenizer(model: ModelConfig, data: DataConfig) -> "PreTrainedTokenizerBase":
    """``data.tokenizer``, or else the model's own tokenizer.

    Raises:
        UserError: it does not exist or does not load.
    """
    if data.tokenizer:
        return open_tokenizer(data.tokenizer, "data.tokenizer", trust_remote_code=model.trust_remote_code)
    return open_tokenizer(model.name, "model.name", model.revision, model.trust_remote_code)


def open_tokenizer(
    name: str, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a hub id, a folder or ``embedded``; ``key`` names it in the ``UserError`` if there is none."""
    from transformers import AutoTokenizer

    path = model_path(ModelConfig(name=name))
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        cure = "set data.tokenizer" if key == "model.name" else "give a hub id or a folder that has one"
        raise UserError(f"{key}: no tokenizer can be loaded from {name} ({first_line(error)}); {cure}") from error


def excluded_tokens(exclude: bool | Sequence[int], tokenizer: "PreTrainedTokenizerBase | None") -> list[int]:
    """The ids that ``exclude_special_tokens`` leaves out: its own, or with true the tokenizer's special tokens."""
    if not isinstance(exclude, bool):
        return list(exclude)
    if not exclude:
        return []
    found = (getattr(tokenizer, name, None) for name in SPECIAL_TOKENS)
    return sorted({token for token in found if token is not None})


class TextChunks:
    """The chunks of a text dataset, in dataset order, once through.

    Documents are tokenised without special tokens and joined, with the separator token between two of one context; each
    context starts with BOS (with ``data.prepend_bos``; the CLS token where the tokenizer has no BOS), so that it holds
    ``context_size - 1`` new tokens. A special token that is already there is not doubled. A column of token ids is used
    as it is in place of text: a row of ``context_size`` ids that starts with BOS is one context.

    Args:
        data: dataset and packing.
        model: the model whose tokenizer is used, unless ``data.tokenizer`` names another.
        cursor: ``Chunk.cursor`` of the chunk after which to go on; None starts at the beginning.
        held_out: iterate over the held-out documents instead of the others.

    Raises:
        UserError: dataset, split, column or tokenizer is missing or of the wrong kind.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, cursor: dict[str, Any] | None = None, *, held_out: bool = False
    ) -> None:
        self.data = data
        self._cursor = cursor or START
        self._held_out = held_out
        self._rows = _open_dataset(data)
        self._column = _find_column(self._rows, data)
        first = _first_value(self._rows, self._column, data)
        self._is_text = _holds_text(first, self._column)
        needs_tokenizer = data.prepend_bos or data.sequence_separator_token or data.exclude_special_tokens is True
        self._tokenizer = load_tokenizer(model, data) if self._is_text or needs_tokenizer else None
        self._bos = self._special_token("data.prepend_bos", "bos", "false") if data.prepend_bos else None
        separator = data.sequence_separator_token
        self._separator = self._special_token("data.sequence_separator_token", separator, "null") if separator else None
        self._excluded = torch.tensor(excluded_tokens(data.exclude_special_tokens, self._tokenizer), dtype=torch.int64)
        self._packing = Packing(data.context_size, self._bos, self._separator)
        self._positions = torch.zeros(data.context_size, dtype=torch.bool)
        self._positions[slice(*data.seqpos_slice)] = True
        self._model = model
        if not self._is_text:
            self._vocabulary = vocabulary_size(model)
            self._check_ids([first] if first else [])
            check_pretokenized(data, model, self._bos, self._tokenizer_named)

    def _check_ids(self, documents: list[list[int]]) -> None:
        check_token_ids(documents, self._vocabulary, self.data.dataset, self._model.name)

    def _tokenizer_named(self, name: str | None) -> "PreTrainedTokenizerBase":
        if name is not None:
            return open_tokenizer(name, "data.dataset")
        return self._tokenizer or load_tokenizer(self._model, self.data)

    def __iter__(self) -> Iterator[Chunk]:
        index, used = self._cursor["chunk"], self._cursor["used"]
        context: list[int] = []
        contexts: list[list[int]] = []
        place: dict[str, Any] = {}
        for place, ids in self._documents():
            while used < len(ids):
                used, _ = self._packing.fill(context, ids, used, begins=False)
                if len(context) == self.data.context_size:
                    contexts.append(context)
                    context = []
                if len(contexts) == self.data.chunk_contexts:
                    yield self._chunk(index, contexts, place | {"used": used})
                    index += 1
                    contexts = []
            used = 0
        if contexts:
            yield self._chunk(index, contexts, place | {"used": 0})

    def _documents(self) -> Iterator[tuple[dict[str, Any], list[int]]]:
        """Each document's place in the dataset and its token ids; at last the end's place and no ids."""
        place: dict[str, Any] = {}
        for place, values in _batches(self._rows, self._column, self._cursor, DOCUMENTS_PER_BATCH):
            wanted = [row for row in range(place["row"], len(values)) if self._is_wanted(values[row])]
            documents = self._token_ids([values[row] for row in wanted])
            for row, ids in zip(wanted, documents, strict=True):
                yield place | {"row": row}, ids
        yield place, []

    def _is_wanted(self, document: str | list[int] | None) -> bool:
        if not document:
            return False
        text = document if isinstance(document, str) else " ".join(map(str, document))
        return is_held_out(text, self.data.eval_fraction) == self._held_out

    def _token_ids(self, documents: list[Any]) -> list[list[int]]:
        if not self._is_text:
            self._check_ids(documents)
        if not self._is_text or not documents:
            return documents
        assert self._tokenizer is not None
        # Not verbose: that a document is longer than the model's context is no news to a packer.
        ids: list[list[int]] = self._tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _chunk(self, index: int, contexts: list[list[int]], place: dict[str, Any]) -> Chunk:
        tokens = torch.tensor(contexts)
        keep = ~torch.isin(tokens, self._excluded) & self._positions
        return Chunk(index, tokens, keep, place | {"chunk": index + 1})

    def _special_token(self, key: str, kind: str, without: str) -> int:
        token: int | None = getattr(self._tokenizer, f"{kind}_token_id")
        if token is None and kind == "bos":
            token = getattr(self._tokenizer, "cls_token_id")  # noqa: B009 (the attribute is made at run time)
        if token is None:
            value = "true" if key == "data.prepend_bos" else kind
            raise UserError(f"{key}: {value}, but the model's tokenizer has no {kind.upper()} token; use {without}")
        return token


class ImageChunks:
    """The chunks of an image dataset: one image, a float array ``[C, H, W]`` ready for the model, is one context.

    Args:
        data: dataset; of the packing keys only ``chunk_contexts`` and ``eval_fraction`` apply.
        positions: positions (patches and class token) per image at the hookpoints; all are kept.
        cursor: as for ``TextChunks``.
        held_out: as for ``TextChunks``.

    Raises:
        UserError: dataset, split or column is missing, or a row holds no such array.
    """

    def __init__(
        self, data: DataConfig, positions: int, cursor: dict[str, Any] | None = None, *, held_out: bool = False
    ) -> None:
        self.data = data
        self.positions = positions
        self._cursor = cursor or START
        self._held_out = held_out
        self._rows = _open_dataset(data).with_format("numpy")
        self._column = _find_column(self._rows, data)
        self._pixels(_first_value(self._rows, self._column, data))

    def __iter__(self) -> Iterator[Chunk]:
        index = self._cursor["chunk"]
        images: list[Tensor] = []
        place: dict[str, Any] = {}
        for place, values in _batches(self._rows, self._column, self._cursor, IMAGES_PER_BATCH):
            for row in range(place["row"], len(values)):
                pixels = self._pixels(values[row])
                if is_held_out(pixels.numpy().tobytes().decode("latin-1"), self.data.eval_fraction) != self._held_out:
                    continue
                images.append(pixels)
                if len(images) == self.data.chunk_contexts:
                    yield self._chunk(index, images, place | {"row": row + 1})
                    index += 1
                    images = []
        if images:
            yield self._chunk(index, images, place)

    def _pixels(self, value: Any) -> Tensor:
        import numpy

        array = numpy.asarray(value)
        if array.ndim != 3 or array.dtype.kind not in "fiu":
            found = f"{type(value).__name__} of shape {list(array.shape)}"
            raise UserError(f"data.column: {self._column} holds {found}, not images as float arrays [C, H, W]")
        return torch.from_numpy(numpy.array(array, dtype=numpy.float32))

    def _chunk(self, index: int, images: list[Tensor], place: dict[str, Any]) -> Chunk:
        keep = torch.ones(len(images), self.positions, dtype=torch.bool)
        return Chunk(index, torch.stack(images), keep, place | {"chunk": index + 1, "used": 0})


def open_chunks(
    data: DataConfig, model: ModelConfig, cursor: dict[str, Any] | None = None, *, held_out: bool = False
) -> TextChunks | ImageChunks:
    """The chunks that ``model`` reads: of text, or of images for an image model. Arguments as for ``TextChunks``."""
    if input_name(model) == "input_ids":
        return TextChunks(data, model, cursor, held_out=held_out)
    return ImageChunks(data, image_positions(model), cursor, held_out=held_out)


def held_out_contexts(data: DataConfig, model: ModelConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out contexts, made as in training: tokens (or pixel values) and keep bool ``[positions]`` of each."""
    for chunk in open_chunks(data, model, held_out=True):
        yield from zip(chunk.tokens, chunk.keep, strict=True)


def _batches(
    rows: "IterableDataset", column: str, cursor: dict[str, Any], size: int
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Batches of up to ``size`` values from the cursor's place on, each with its place; at last the end's, and none.

    A place is the dataset's state before the batch and the first row of the batch that is still new.
    """
    # A dataset object has one state, that of its last iteration. This makes one of our own.
    dataset = rows.select_columns([column])
    state, first = cursor["dataset"], cursor["row"]
    if state is None:
        state = dataset.state_dict()
    else:
        dataset.load_state_dict(state)
    iterator = iter(dataset)
    while values := _read(iterator, column, size):
        yield {"dataset": state, "row": first}, values
        state, first = dataset.state_dict(), 0
    yield {"dataset": state, "row": 0}, []


def _read(rows: Iterator[dict[str, Any]], column: str, size: int) -> list[Any]:
    """The column's next ``size`` values or fewer; ``UserError`` where a row cannot be read."""
    from datasets.exceptions import DatasetsError

    try:
        return [row[column] for row in islice(rows, size)]
    except (OSError, ValueError, TypeError, RuntimeError, DatasetsError) as error:
        raise UserError(f"data.dataset: reading column {column} failed: {first_line(error)}") from error


def _open_dataset(data: DataConfig) -> "IterableDataset":
    from datasets import Dataset

    opened = open_dataset(
        data.dataset, data.split, name=data.dataset_name, revision=data.revision, streaming=data.streaming
    )
    # One kind of dataset for all: it reads in batches and its state says where it is.
    return opened.to_iterable_dataset() if isinstance(opened, Dataset) else opened


def open_dataset(
    dataset: str, split: str | None, keys: tuple[str, str] = ("data.dataset", "data.split"), **options: Any
) -> Any:
    """A ``Dataset`` or ``IterableDataset``.

    Args:
        dataset: hub id, local file or folder (also one that ``save_to_disk`` wrote), or ``embedded``.
        split: one of its splits; None for a dataset that has just one.
        keys: what the two are called in messages.
        options: of ``datasets.load_dataset``, where that is what opens it.

    Raises:
        UserError: there is no such dataset or split, or it cannot be opened.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(dataset)
    try:
        if dataset == embedded.NAME:
            opened: Any = {"train": embedded.load_text()}
        elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            saved = load_from_disk(path)
            # A part, such as train[:10%], goes by the name of the split.
            is_one = isinstance(saved, Dataset)
            opened = {str(saved.split or "train").partition("[")[0]: saved} if is_one else saved
        else:
            if path.is_file():
                dataset, options = str(path.parent.resolve()), {**options, "data_files": path.name}
            opened = load_dataset(dataset, split=split, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        message = f"{keys[0]}: {dataset}, {keys[1]}: {split}: cannot be opened: {first_line(error)}"
        raise UserError(message) from error
    return _choose_split(opened, split, f"{keys[1]}: {split}, but {path}") if isinstance(opened, dict) else opened


def _choose_split(splits: dict[str, Any], split: str | None, wanted: str) -> Any:
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        raise UserError(f"{wanted} has the splits {', '.join(splits)}")
    return splits[split]


def _find_column(rows: "IterableDataset", data: DataConfig) -> str:
    columns: Sequence[str] = rows.column_names or list(next(iter(rows), {}))
    if not columns:
        raise UserError(f"data.dataset: {data.dataset} has no rows in split {data.split}")
    names = (data.column, *TOKEN_COLUMNS) if data.column == DataConfig.column else (data.column,)
    for name in names:
        if name in columns:
            return name
    raise UserError(f"data.column: {data.column}, but {data.dataset} has the columns {', '.join(columns)}")


def _first_value(rows: "IterableDataset", column: str, data: DataConfig) -> Any:
    row = next(iter(rows.select_columns([column])), None)
    if row is None:
        raise UserError(f"data.dataset: {data.dataset} has no rows in split {data.split}")
    return row[column]


def _holds_text(value: Any, column: str) -> bool:
    """Whether a column's value is text (True) or token ids (False); anything else is refused."""
    if isinstance(value, str):
        return True
    if isinstance(value, list) and all(isinstance(token, int) for token in value):
        return False
    raise UserError(f"data.column: {column} holds {type(value).__name__}, neither text nor lists of token ids")

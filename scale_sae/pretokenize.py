"""Tokenises a dataset once, for many runs: ``python -m scale_sae.pretokenize --tokenizer_name T --dataset_path D …``.

The contexts are those of SAELens's runner (6.54) for the same options, which have its names and defaults. A file
``sae_lens.json`` beside them says how they were made: SAELens and the training command read it.
"""

import json
import secrets
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import fire
from jinja2.exceptions import TemplateError

from scale_sae.activations.architecture import first_line
from scale_sae.activations.packing import Packing
from scale_sae.activations.pretokenized import METADATA_FILE
from scale_sae.activations.tokens import open_dataset, open_tokenizer
from scale_sae.config_parsing import convert, from_mapping, require
from scale_sae.errors import UserError
from scale_sae.saes.inference import SAELENS_VERSION

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_BATCH = 1000  # tokenised in one call
WORDS = {"null": None, "true": True, "false": False}  # of a command line, which fire leaves as they are
SpecialToken = int | Literal["bos", "eos", "sep"] | None


@dataclass
class PretokenizeRunnerConfig:
    """What to tokenise, how to cut it into contexts, and where to put them. UserError for a wrong value."""

    # Hub id or folder of the tokenizer, or "embedded".
    tokenizer_name: str = "gpt2"
    # Hub id, local file or folder, or "embedded".
    dataset_path: str = ""
    # The dataset's configuration on the hub, where it has several.
    dataset_name: str | None = None
    # Must be null or false: no dataset brings code of its own any more.
    dataset_trust_remote_code: bool | None = None
    # null: for a dataset that has just one.
    split: str | None = "train"
    # Files of the dataset, and the folder of it that they are in, where it is not to be taken whole.
    data_files: tuple[str, ...] | None = None
    data_dir: str | None = None
    # Processes that tokenise, each a part of the documents: no context goes over the border of two parts.
    num_proc: int = 4
    # Token ids per context, special ones included.
    context_size: int = 128
    column_name: str = "text"
    # Whether the column holds conversations (or texts: a user's message each) for the tokenizer's chat template.
    use_chat_formatting: bool = False
    shuffle: bool = True
    # Of the shuffle; null: one is drawn. sae_lens.json says which it was.
    seed: int | None = None
    # Read the dataset while tokenising instead of downloading it first. It is then shuffled only in a window.
    streaming: bool = False
    # Documents that are packed together: what is left of them is lost. null: all of them, so that nothing is.
    pretokenize_batch_size: int | None = DOCUMENTS_PER_BATCH
    # Special tokens, by kind or id: at the begin of every context, of every document, and between two documents.
    begin_batch_token: SpecialToken = "bos"
    begin_sequence_token: SpecialToken = None
    sequence_separator_token: SpecialToken = "bos"
    # One context of each document that is long enough, and nothing of the others.
    disable_concat_sequences: bool = False
    # A new folder.
    save_path: str | None = None
    # A dataset on the hub, and how it is written there.
    hf_repo_id: str | None = None
    hf_num_shards: int = 64
    hf_revision: str = "main"
    hf_is_private_repo: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            setattr(self, name, convert(list(value) if isinstance(value, tuple) else value, kind, name))
        require(self.dataset_path != "", "dataset_path", self.dataset_path, "must name a dataset")
        require(
            not self.dataset_trust_remote_code, "dataset_trust_remote_code", True, "must be left out: no code is run"
        )
        for name in ("num_proc", "context_size", "pretokenize_batch_size", "hf_num_shards"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "must be above 0")
        if self.begin_batch_token is not None:
            require(
                self.context_size > 1, "context_size", self.context_size, "must be above 1: begin_batch_token takes one"
            )
        require(not self.streaming or self.num_proc == 1, "streaming", True, "is for one process; set num_proc: 1")

    def metadata(self) -> dict[str, Any]:
        """What ``sae_lens.json`` says, under SAELens's keys."""
        return {
            "sae_lens_version": SAELENS_VERSION,
            "tokenizer_name": self.tokenizer_name,
            "original_dataset": self.dataset_path,
            "original_dataset_name": self.dataset_name,
            "original_split": self.split,
            "original_data_files": self.data_files and list(self.data_files),
            "original_column_name": self.column_name,
            "context_size": self.context_size,
            "shuffled": self.shuffle,
            "seed": self.seed,
            "begin_batch_token": self.begin_batch_token,
            "begin_sequence_token": self.begin_sequence_token,
            "sequence_separator_token": self.sequence_separator_token,
            "disable_concat_sequences": self.disable_concat_sequences,
            "use_chat_formatting": self.use_chat_formatting,
        }


class PretokenizeRunner:
    """Tokenises a dataset and writes it to a folder, to the hub, or to both."""

    def __init__(self, cfg: PretokenizeRunnerConfig):
        self.cfg = cfg

    def run(self) -> "Dataset | IterableDataset":
        """Does it all; returns the contexts, torch tensors int64 ``[context_size]`` in the column ``input_ids``.

        Raises:
            UserError: tokenizer, dataset, column or special token is missing; no context comes out; the folder is there
                already; the hub does not take the dataset.
        """
        cfg = self.cfg
        if cfg.save_path is not None:
            _check_new(Path(cfg.save_path))
        tokenizer = open_tokenizer(cfg.tokenizer_name, "tokenizer_name")
        cut = partial(_contexts, tokenizer=tokenizer, cfg=cfg, packing=_packing(cfg, tokenizer))
        documents = self._documents()
        if cfg.shuffle:
            cfg.seed = secrets.randbelow(2**31) if cfg.seed is None else cfg.seed
        if cfg.save_path is None:
            contexts = self._make(documents, cut, None)
        else:
            contexts = self._save(documents, cut, Path(cfg.save_path))
        if cfg.hf_repo_id is not None:
            _push(contexts, cfg)
        return contexts.with_format("torch")

    def _save(self, documents: Any, cut: "partial[Iterator[list[int]]]", folder: Path) -> Any:
        """Writes the contexts and their metadata aside, and moves both to their place at last."""
        from datasets import Dataset, load_from_disk

        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            whole, cache = Path(aside, "whole"), Path(aside, "cache")
            cache.mkdir()
            contexts = self._make(documents, cut, cache)
            finite = contexts
            if self.cfg.streaming:
                rows = partial(iter, contexts)
                finite = Dataset.from_generator(rows, cache_dir=str(cache), fingerprint=_fingerprint())
            finite.save_to_disk(whole)
            (whole / METADATA_FILE).write_text(json.dumps(self.cfg.metadata(), indent=2, ensure_ascii=False))
            if folder.exists():
                folder.rmdir()  # an empty one
            whole.rename(folder)
        return contexts if self.cfg.streaming else load_from_disk(folder)

    def _make(self, documents: Any, cut: "partial[Iterator[list[int]]]", cache: Path | None) -> Any:
        """The contexts, in their order; ``cache``: where datasets keeps them until they are saved. None: in its own."""
        contexts = self._tokenise(documents, cut, cache)
        if not self.cfg.shuffle:
            return contexts
        kept = {} if cache is None or self.cfg.streaming else {"indices_cache_file_name": str(cache / "order.arrow")}
        return contexts.shuffle(seed=self.cfg.seed, **kept)

    def _documents(self) -> Any:
        """The dataset with its one column."""
        cfg = self.cfg
        files = {"data_files": list(cfg.data_files)} if cfg.data_files else {}
        folder = {"data_dir": cfg.data_dir} if cfg.data_dir else {}
        options = {"name": cfg.dataset_name, "streaming": cfg.streaming, **files, **folder}
        found = open_dataset(cfg.dataset_path, cfg.split, ("dataset_path", "split"), **options)
        if isinstance(found, dict):
            raise UserError(f"split: null, but {cfg.dataset_path} has the splits {', '.join(found)}; name one")
        if cfg.streaming and hasattr(found, "to_iterable_dataset"):  # a local one that has been read already
            found = found.to_iterable_dataset()
        first = next(iter(found), None)
        if first is None:
            raise UserError(f"dataset_path: {cfg.dataset_path} has no rows in split {cfg.split}")
        if cfg.column_name not in first:
            columns = ", ".join(first)
            raise UserError(f"column_name: {cfg.column_name}, but {cfg.dataset_path} has the columns {columns}")
        _check_column(first[cfg.column_name], cfg)
        return found.select_columns([cfg.column_name])

    def _tokenise(self, documents: Any, cut: "partial[Iterator[list[int]]]", cache: Path | None) -> Any:
        from datasets import Dataset, IterableDataset

        cfg = self.cfg
        if cfg.pretokenize_batch_size is None and cfg.num_proc == 1:
            make = partial(_rows, documents, cfg.column_name, cut)
            if cfg.streaming:
                return IterableDataset.from_generator(make)
            place = None if cache is None else str(cache)
            contexts: Any = Dataset.from_generator(make, cache_dir=place, fingerprint=_fingerprint())
        else:
            processes = cfg.num_proc if cfg.num_proc > 1 else None  # 1 would start a pool of one
            options: dict[str, Any] = {}
            if not cfg.streaming:
                options = {"num_proc": processes, "new_fingerprint": _fingerprint()}
                if cache is not None:
                    options["cache_file_name"] = str(cache / "contexts.arrow")
            contexts = documents.map(
                partial(_columns, column=cfg.column_name, cut=cut),
                batched=True,
                batch_size=cfg.pretokenize_batch_size,
                remove_columns=[cfg.column_name],
                **options,
            )
        if not cfg.streaming and len(contexts) == 0:
            found = f"context_size: {cfg.context_size}, but no context of this size comes out of {cfg.dataset_path}"
            raise UserError(f"{found}; give a smaller one")
        return contexts


def _packing(cfg: PretokenizeRunnerConfig, tokenizer: "PreTrainedTokenizerBase") -> Packing:
    def token(key: str) -> int | None:
        kind = getattr(cfg, key)
        if kind is None or isinstance(kind, int):
            return kind
        found: int | None = getattr(tokenizer, f"{kind}_token_id")
        if found is None:
            missing = f"{key}: {kind}, but the tokenizer {cfg.tokenizer_name} has no {kind.upper()} token"
            raise UserError(f"{missing}; give the id of another token, or null for none")
        return found

    return Packing(
        cfg.context_size, token("begin_batch_token"), token("sequence_separator_token"), token("begin_sequence_token")
    )


def _check_column(value: Any, cfg: PretokenizeRunnerConfig) -> None:
    if cfg.use_chat_formatting and isinstance(value, list) and all(isinstance(turn, Mapping) for turn in value):
        return
    if not isinstance(value, str):
        wanted = "texts, nor conversations" if cfg.use_chat_formatting else "texts"
        raise UserError(f"column_name: {cfg.column_name} holds {type(value).__name__}, not {wanted}")


def _contexts(
    documents: Iterable[Any], tokenizer: "PreTrainedTokenizerBase", cfg: PretokenizeRunnerConfig, packing: Packing
) -> Iterator[list[int]]:
    ids = _token_ids(documents, tokenizer, cfg.use_chat_formatting)
    return packing.one_per_document(ids) if cfg.disable_concat_sequences else packing.contexts(ids)


def _token_ids(documents: Iterable[Any], tokenizer: "PreTrainedTokenizerBase", chat: bool) -> Iterator[list[int]]:
    """The ids of each document, with the special tokens that the tokenizer itself adds."""
    remaining = iter(documents)
    while texts := list(islice(remaining, DOCUMENTS_PER_BATCH)):
        if chat:
            yield from (_chat_ids(text, tokenizer) for text in texts)
        elif present := [text for text in texts if text is not None]:
            # Not verbose: that a document is longer than the model's context is no news to a packer.
            yield from tokenizer(present, verbose=False)["input_ids"]


def _chat_ids(conversation: Any, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    turns = [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
    try:
        ids: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except (ValueError, KeyError, TypeError, TemplateError) as error:
        raise UserError(
            f"use_chat_formatting: true, but a conversation cannot be formatted: {first_line(error)}"
        ) from error
    return list(ids)


def _columns(batch: dict[str, list[Any]], column: str, cut: "partial[Iterator[list[int]]]") -> dict[str, Any]:
    return {"input_ids": list(cut(batch[column]))}


def _rows(documents: Iterable[Any], column: str, cut: "partial[Iterator[list[int]]]") -> Iterator[dict[str, Any]]:
    for ids in cut(row[column] for row in documents):
        yield {"input_ids": ids}


def _fingerprint() -> str:
    """A new name for what datasets caches: a tokenizer may have changed where its name has not."""
    return secrets.token_hex(8)


def _check_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"save_path: {folder} is there already; remove it, or give another folder")


def _push(contexts: Any, cfg: PretokenizeRunnerConfig) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        contexts.push_to_hub(
            cfg.hf_repo_id,
            num_shards=cfg.hf_num_shards,
            private=cfg.hf_is_private_repo,
            revision=cfg.hf_revision,
        )
        HfApi().upload_file(
            path_or_fileobj=json.dumps(cfg.metadata(), indent=2, ensure_ascii=False).encode(),
            path_in_repo=METADATA_FILE,
            repo_id=str(cfg.hf_repo_id),
            repo_type="dataset",
            revision=cfg.hf_revision,
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"hf_repo_id: {cfg.hf_repo_id}: the hub does not take it: {first_line(error)}") from error


def main(*extra: object, **options: Any) -> None:
    """Tokenises a dataset and cuts it into contexts, for training runs to read.

    Every field of PretokenizeRunnerConfig is an option: --tokenizer_name (hub id, folder or embedded), --dataset_path
    (hub id, local file or folder, or embedded), --split, --column_name, --context_size, --begin_batch_token,
    --begin_sequence_token, --sequence_separator_token (bos, eos, sep, an id, or null), --disable_concat_sequences,
    --shuffle, --seed, --num_proc, --streaming, --pretokenize_batch_size, and where it goes: --save_path, --hf_repo_id.
    """
    try:
        if extra:
            raise UserError(
                f"{extra[0]}: no argument of pretokenize; its options have names, as --dataset_path={extra[0]}"
            )
        given = {name: WORDS.get(value, value) if isinstance(value, str) else value for name, value in options.items()}
        cfg = from_mapping(PretokenizeRunnerConfig, given, "")
        if cfg.save_path is None and cfg.hf_repo_id is None:
            raise UserError("save_path: missing; give a folder, or a dataset on the hub with --hf_repo_id")
        contexts = PretokenizeRunner(cfg).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    count = "" if cfg.streaming else f"{len(contexts):,} "
    print(f"{count}contexts of {cfg.context_size} tokens: {cfg.save_path or cfg.hf_repo_id}")


if __name__ == "__main__":
    fire.Fire(main)

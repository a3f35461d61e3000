"""Chunks of text and images: packing against SAELens's, resuming, held-out documents, wrong inputs."""

import dataclasses
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Array3D, Dataset, DatasetDict, Features, load_from_disk
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, ViTConfig

from scale_sae.activations.tokens import (
    DOCUMENTS_PER_BATCH,
    Chunk,
    ImageChunks,
    TextChunks,
    held_out_contexts,
    is_held_out,
    load_tokenizer,
    open_chunks,
)
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.embedded import load_text, standard_library_files
from scale_sae.errors import UserError

MODEL = ModelConfig()
BOS, EOS, PAD = 0, 1, 2
CONTEXT = 16


def random_documents(count: int = 300, seed: int = 0) -> list[str]:
    """Documents of 0 to 60 random letters: many end inside a context, many contexts lie inside a document."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghijklmnop", k=draw.randrange(61))) for _ in range(count)]


def saved(folder: Path, columns: dict[str, list[Any]], **kinds: Any) -> str:
    Dataset.from_dict(columns, **kinds).save_to_disk(folder)
    return str(folder)


def config(dataset: str, **keys: Any) -> DataConfig:
    data = DataConfig(dataset=dataset, context_size=CONTEXT, chunk_contexts=4, eval_fraction=0.0)
    return dataclasses.replace(data, **keys)


def contexts(chunks: Iterable[Chunk]) -> Tensor:
    return torch.cat([chunk.tokens for chunk in chunks])


@cache
def byte_tokenizer() -> Any:
    return load_tokenizer(MODEL, DataConfig())


def byte_ids(text: str) -> list[int]:
    ids: list[int] = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def assert_same(found: list[Chunk], wanted: list[Chunk]) -> None:
    assert [chunk.index for chunk in found] == [chunk.index for chunk in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.keep, b.keep)


class TestPacking:
    @pytest.mark.parametrize("bos", [True, False])
    @pytest.mark.parametrize("separator", ["bos", "eos", None])
    def test_equals_saelens(self, tmp_path: Path, bos: bool, separator: Any) -> None:
        documents = [byte_ids(text) for text in random_documents()]
        # Special tokens that are already there, at every place a document can start or be cut.
        draw = random.Random(1)
        for ids in documents:
            if ids and draw.random() < 0.3:
                ids[draw.choice([0, 0, -1, draw.randrange(len(ids))])] = draw.choice([BOS, EOS])
        data = config(
            saved(tmp_path, {"tokens": documents}), column="tokens", prepend_bos=bos, sequence_separator_token=separator
        )
        wanted = concat_and_batch_sequences(
            (torch.tensor(ids) for ids in documents if ids),
            CONTEXT,
            begin_batch_token_id=BOS if bos else None,
            sequence_separator_token_id={"bos": BOS, "eos": EOS, None: None}[separator],
        )
        assert torch.equal(contexts(TextChunks(data, MODEL)), torch.stack(list(wanted)))

    def test_text_is_the_documents_in_order(self, tmp_path: Path) -> None:
        documents = random_documents()
        data = config(saved(tmp_path, {"text": documents}), prepend_bos=False, sequence_separator_token=None)
        line = [token for text in documents for token in byte_ids(text)]
        whole = len(line) // CONTEXT * CONTEXT
        assert contexts(TextChunks(data, MODEL)).flatten().tolist() == line[:whole]

    def test_chunks_are_full_but_the_last(self, tmp_path: Path) -> None:
        ids = [list(range(4, 4 + 11 * CONTEXT + 5))]
        data = config(saved(tmp_path, {"tokens": ids}), prepend_bos=False)
        chunks = list(TextChunks(data, MODEL))
        assert [len(chunk.tokens) for chunk in chunks] == [4, 4, 3]
        assert [chunk.index for chunk in chunks] == [0, 1, 2]
        assert chunks[0].tokens.dtype == torch.int64
        assert chunks[0].keep.shape == (4, CONTEXT)

    def test_rows_that_are_contexts_stay_as_they_are(self, tmp_path: Path) -> None:
        rows = [[BOS, *range(10, 9 + CONTEXT)] for _ in range(6)]
        data = config(saved(tmp_path, {"input_ids": rows}))
        assert contexts(TextChunks(data, MODEL)).tolist() == rows

    def test_cls_begins_contexts_where_there_is_no_bos(self, tmp_path: Path) -> None:
        words = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "a": 3}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel(words)), cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
        )
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        dataset = saved(tmp_path / "data", {"tokens": [[3, 3, 1, 2, 3]]})
        data = config(dataset, tokenizer=str(tmp_path / "tokenizer"), context_size=6)
        chunk = next(iter(TextChunks(data, MODEL)))
        assert chunk.tokens.tolist() == [[0, 3, 3, 1, 2, 3]]
        assert chunk.keep.tolist() == [[False, True, True, False, False, True]]

    def test_embedded_text(self) -> None:
        chunks = TextChunks(DataConfig(eval_fraction=0.01), MODEL)
        first = next(iter(chunks))
        assert first.tokens.shape == (32, 128)
        assert (first.tokens[:, 0] == BOS).all()
        document = next(text for text in load_text()["text"] if not is_held_out(text, 0.01))
        assert first.tokens[0, 1:].tolist() == byte_ids(document)[:127]

    def test_the_embedded_text_is_the_files_in_pieces(self) -> None:
        """All lines of every file, a few at a time, and seldom two pieces of a file beside each other."""
        pieces, places = defaultdict(list), []
        for row in load_text():
            pieces[row["path"]].append(row["text"])
            places.append(row["path"])
        file = next(path for path in standard_library_files() if path.name == "typing.py")
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        found = pieces["typing.py"]
        assert Counter(line for text in found for line in text.splitlines(keepends=True)) == Counter(lines)
        sizes = sorted(len(text) for text in found)
        assert sizes[1] >= 2048 and sizes[-1] < 2048 + max(map(len, lines))
        neighbours = sum(a == b for a, b in pairwise(places))
        assert neighbours < len(places) / 100


class TestKeep:
    IDS = (BOS, EOS, PAD, *range(10, 7 + CONTEXT))

    @pytest.mark.parametrize(
        ("keys", "dropped"),
        [
            ({}, [0, 1, 2]),
            ({"exclude_special_tokens": False}, []),
            ({"exclude_special_tokens": (10, 12)}, [3, 5]),
            ({"exclude_special_tokens": False, "seqpos_slice": (1, -2)}, [0, 14, 15]),
            ({"seqpos_slice": (None, None, 2)}, [0, 1, 2, 3, 5, 7, 9, 11, 13, 15]),
        ],
    )
    def test_special_tokens_and_positions(self, tmp_path: Path, keys: dict[str, Any], dropped: list[int]) -> None:
        data = config(saved(tmp_path, {"tokens": [list(self.IDS)]}), **keys)
        chunk = next(iter(TextChunks(data, MODEL)))
        assert chunk.tokens[0].tolist() == list(self.IDS)
        assert chunk.keep[0].logical_not().nonzero().flatten().tolist() == dropped


class TestHeldOut:
    def test_documents_are_split_by_content(self, tmp_path: Path) -> None:
        # Document i is 20 times the token 10 + i, and each document is there twice.
        documents = [[10 + i] * 20 for i in range(100)] * 2
        text = {10 + i: " ".join([str(10 + i)] * 20) for i in range(100)}
        data = config(saved(tmp_path, {"tokens": documents}), eval_fraction=0.3, prepend_bos=False, context_size=4)
        data_ids = {token for token in contexts(TextChunks(data, MODEL)).unique().tolist() if token >= 10}
        held_ids = {token for row, _ in held_out_contexts(data, MODEL) for token in row.tolist() if token >= 10}
        assert held_ids == {token for token in text if is_held_out(text[token], 0.3)}
        assert data_ids == set(text) - held_ids
        assert 10 < len(held_ids) < 60

    def test_packed_as_in_training(self, tmp_path: Path) -> None:
        documents = random_documents()
        held = [text for text in documents if is_held_out(text, 0.5)]
        data = config(saved(tmp_path / "all", {"text": documents}), eval_fraction=0.5)
        alone = config(saved(tmp_path / "held", {"text": held}))
        found = list(held_out_contexts(data, MODEL))
        wanted = list(TextChunks(alone, MODEL))
        assert torch.equal(torch.stack([row for row, _ in found]), contexts(wanted))
        assert torch.equal(torch.stack([keep for _, keep in found]), torch.cat([chunk.keep for chunk in wanted]))


def make_source(kind: str, folder: Path) -> str:
    documents = random_documents()
    if kind == "saved":
        return saved(folder, {"text": documents})
    folder.mkdir(parents=True)
    for part in range(3):  # three files: a place in the dataset is then a file and a row
        rows = documents[part * 100 : part * 100 + 100]
        if kind == "jsonl":
            (folder / f"{part}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
        elif kind == "parquet":
            Dataset.from_dict({"text": rows, "other": list(range(100))}).to_parquet(folder / f"{part}.parquet", 30)
        else:
            (folder / f"{part}.txt").write_text("".join(text + "\n" for text in rows))
    return str(folder)


class TestResume:
    @pytest.mark.parametrize("kind", ["saved", "jsonl", "parquet", "txt"])
    @pytest.mark.parametrize("streaming", [True, False])
    def test_goes_on_with_what_would_have_followed(self, tmp_path: Path, kind: str, streaming: bool) -> None:
        data = config(make_source(kind, tmp_path / "data"), eval_fraction=0.2, streaming=streaming)
        chunks = list(TextChunks(data, MODEL))
        assert len(chunks) > 100
        for index in [0, 1, 2, 29, 30, 31, len(chunks) - 2, len(chunks) - 1]:
            cursor = json.loads(json.dumps(chunks[index].cursor))
            assert_same(list(TextChunks(data, MODEL, cursor)), chunks[index + 1 :])

    def test_sources_give_the_same_chunks(self, tmp_path: Path) -> None:
        chunks = [
            list(TextChunks(config(make_source(kind, tmp_path / kind / str(streaming)), streaming=streaming), MODEL))
            for kind in ("saved", "jsonl", "parquet", "txt")
            for streaming in (True, False)
        ]
        for other in chunks[1:]:
            assert_same(other, chunks[0])

    def test_cursors_after_a_resume_are_as_good(self, tmp_path: Path) -> None:
        data = config(make_source("parquet", tmp_path / "data"), chunk_contexts=32)
        chunks = list(TextChunks(data, MODEL))
        assert len(chunks) > 10
        found, cursor = [], None
        while following := next(iter(TextChunks(data, MODEL, cursor)), None):
            found.append(following)
            cursor = following.cursor
        assert_same(found, chunks)

    def test_inside_a_long_document(self, tmp_path: Path) -> None:
        ids = [[4 + place % 250 for place in range(length)] for length in (500, 300)]
        data = config(saved(tmp_path, {"tokens": ids}))
        chunks = list(TextChunks(data, MODEL))
        for index, chunk in enumerate(chunks):
            assert_same(list(TextChunks(data, MODEL, chunk.cursor)), chunks[index + 1 :])

    def test_tokenises_only_from_its_place_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = config(saved(tmp_path, {"text": random_documents(2000)}))
        chunk = [chunk for chunk, _ in zip(TextChunks(data, MODEL), range(500), strict=False)][-1]
        resumed = TextChunks(data, MODEL, chunk.cursor)
        counted: list[int] = []
        tokenise = resumed._token_ids

        def counting(texts: list[Any]) -> list[list[int]]:
            counted.append(len(texts))
            return tokenise(texts)

        monkeypatch.setattr(resumed, "_token_ids", counting)
        next(iter(resumed))
        assert sum(counted) <= 2 * DOCUMENTS_PER_BATCH

    def test_iterations_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        chunks = TextChunks(config(saved(tmp_path, {"text": random_documents()})), MODEL)
        first, second = iter(chunks), iter(chunks)
        interleaved = [(next(first), next(second)) for _ in range(60)]
        assert_same([a for a, _ in interleaved], [b for _, b in interleaved])
        cursor = interleaved[-1][0].cursor
        assert_same(list(TextChunks(chunks.data, MODEL, cursor)), list(first))


class TestWrongInputs:
    def check(self, data: DataConfig, *parts: str) -> None:
        with pytest.raises(UserError) as error:
            TextChunks(data, MODEL)
        message = str(error.value)
        assert "\n" not in message
        for part in parts:
            assert part in message

    def test_dataset(self, tmp_path: Path) -> None:
        self.check(config("no-such-org/no-such-dataset"), "data.dataset: no-such-org/no-such-dataset")
        self.check(config(str(tmp_path / "missing")), f"data.dataset: {tmp_path}/missing")
        (tmp_path / "empty").mkdir()
        Dataset.from_dict({"text": []}).to_parquet(tmp_path / "empty" / "0.parquet")
        self.check(config(str(tmp_path / "empty")), "data.dataset", "no rows")

    def test_split(self, tmp_path: Path) -> None:
        self.check(config("embedded", split="test"), "data.split: test", "splits train")
        self.check(config(make_source("jsonl", tmp_path / "jsonl"), split="valid"), "data.split: valid", "train")
        part = Dataset.from_dict({"text": ["a" * 100]})
        DatasetDict(train=part, validation=part).save_to_disk(tmp_path / "splits")
        self.check(config(str(tmp_path / "splits"), split="test"), "data.split: test", "train, validation")
        assert len(list(TextChunks(config(str(tmp_path / "splits"), split="validation"), MODEL))) == 2

    def test_column(self, tmp_path: Path) -> None:
        self.check(config(saved(tmp_path / "a", {"body": ["a"], "n": [1]})), "data.column: text", "columns body, n")
        self.check(config(saved(tmp_path / "b", {"text": ["a"]}), column="body"), "data.column: body", "columns text")
        self.check(config(saved(tmp_path / "c", {"text": [1.5]})), "data.column: text holds float")

    def test_special_tokens_and_tokenizer(self, tmp_path: Path) -> None:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
        tokenizer.save_pretrained(tmp_path / "bare")
        bare = {"tokenizer": str(tmp_path / "bare")}
        dataset = saved(tmp_path / "data", {"text": ["a"]})
        self.check(config(dataset, **bare), "data.prepend_bos: true", "no BOS token; use false")
        keys = {"prepend_bos": False, "sequence_separator_token": "eos"}
        self.check(config(dataset, **bare, **keys), "data.sequence_separator_token: eos", "no EOS token; use null")
        self.check(config(dataset, tokenizer="/no/such/folder"), "data.tokenizer", "/no/such/folder")


class TestImages:
    SHAPE = (3, 4, 5)

    def dataset(self, folder: Path, count: int = 50) -> str:
        images = torch.rand(count, *self.SHAPE, generator=torch.Generator().manual_seed(0))
        features = Features({"pixel_values": Array3D(self.SHAPE, "float32")})
        return saved(folder, {"pixel_values": images.tolist()}, features=features)

    def test_every_image_is_a_context(self, tmp_path: Path) -> None:
        folder = self.dataset(tmp_path)
        chunks = list(ImageChunks(config(folder, column="pixel_values"), positions=7))
        assert [len(chunk.tokens) for chunk in chunks] == [4] * 12 + [2]
        wanted = torch.tensor(load_from_disk(folder)["pixel_values"][:])
        assert torch.equal(contexts(chunks), wanted)
        assert chunks[0].keep.shape == (4, 7)
        assert chunks[0].keep.all()

    def test_resume_and_held_out(self, tmp_path: Path) -> None:
        data = config(self.dataset(tmp_path), column="pixel_values", eval_fraction=0.3)
        chunks = list(ImageChunks(data, 7))
        for index, chunk in enumerate(chunks):
            cursor = json.loads(json.dumps(chunk.cursor))
            assert_same(list(ImageChunks(data, 7, cursor)), chunks[index + 1 :])
        held = list(ImageChunks(data, 7, held_out=True))
        together = torch.cat([contexts(chunks), contexts(held)])
        assert len(contexts(held)) > 0
        assert len(together.unique(dim=0)) == len(together) == 50

    def test_image_model_reads_images(self, tmp_path: Path) -> None:
        ViTConfig(hidden_size=32, num_hidden_layers=1, image_size=16, patch_size=8).save_pretrained(tmp_path / "vit")
        model = ModelConfig(name=str(tmp_path / "vit"), auto_class="AutoModel")
        chunks = open_chunks(config(self.dataset(tmp_path / "data"), column="pixel_values"), model)
        assert next(iter(chunks)).keep.shape == (4, 5)  # four patches and the class token

    def test_what_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"data.column: text holds .*not images as float arrays \[C, H, W\]"):
            ImageChunks(config(saved(tmp_path, {"text": ["a"]})), 7)

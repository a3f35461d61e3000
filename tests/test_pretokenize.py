"""Pretokenised datasets: their contexts against SAELens's, training from them, and wrong inputs."""

import dataclasses
import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, load_from_disk
from huggingface_hub import HfApi
from sae_lens import PretokenizeRunner as SAELensRunner
from sae_lens import PretokenizeRunnerConfig as SAELensConfig
from sae_lens.pretokenize_runner import metadata_from_config
from sae_lens.tokenization_and_batching import concat_and_batch_sequences
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from scale_sae import pretokenize
from scale_sae.activations.packing import Packing
from scale_sae.activations.tokens import TextChunks
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError
from scale_sae.pretokenize import PretokenizeRunner, PretokenizeRunnerConfig

LETTERS = "abcdefghijklmnop"
CONTEXT = 16


def write_documents(path: Path, count: int = 300) -> Path:
    draw = random.Random(0)
    texts = ["".join(draw.choices(LETTERS, k=draw.randrange(60))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text, "other": len(text)}) + "\n" for text in texts))
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "documents.jsonl")


def make_tokenizer(folder: Path, **special: str) -> str:
    """One that puts special tokens around every text by itself, as Llama's and BERT's do."""
    words = {word: index for index, word in enumerate(["<b>", "<e>", "<s>", "<u>", *LETTERS, "user", "assistant"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<u>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.post_processor = processors.TemplateProcessing(single="<b> $A <e>", special_tokens=[("<b>", 0), ("<e>", 1)])
    names = {"bos_token": "<b>", "eos_token": "<e>", "sep_token": "<s>", "unk_token": "<u>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    made.chat_template = "{% for turn in messages %}{{ turn.role[0] }}{{ turn.content }}{% endfor %}"
    made.save_pretrained(folder)
    return str(folder)


class TestPacking:
    @pytest.mark.parametrize("concatenated", [True, False])
    def test_equals_saelens_for_every_combination(self, concatenated: bool) -> None:
        draw = random.Random(0)
        # Special ids 0 to 3 are frequent, so that they often stand where one of them would be put.
        documents = [[draw.randrange(7) for _ in range(draw.randrange(12))] for _ in range(120)]
        compared = 0
        for size, begin, separator, begin_document in product((1, 2, 3, 5, 8), (None, 0), (None, 0, 1), (None, 0, 2)):
            if size == 1 and begin is not None:
                continue  # contexts of nothing but their begin, without end
            packing = Packing(size, begin, separator, begin_document)
            found = packing.contexts(documents) if concatenated else packing.one_per_document(documents)
            wanted = concat_and_batch_sequences(
                (torch.tensor(ids, dtype=torch.int64) for ids in documents),
                size,
                begin_batch_token_id=begin,
                begin_sequence_token_id=begin_document,
                sequence_separator_token_id=separator,
                disable_concat_sequences=not concatenated,
            )
            ours, theirs = list(found), [row.tolist() for row in wanted]
            assert ours == theirs, (size, begin, separator, begin_document)
            compared += len(ours)
        assert compared > 1000


def both(
    documents: Path, tokenizer: str | None = None, **options: Any
) -> tuple[list[list[int]], list[list[int]], SAELensConfig]:
    """Our contexts, SAELens's, and its config, for the same options."""
    options = {
        "tokenizer_name": tokenizer or str(MODEL_FOLDER),
        "dataset_path": "json",
        "data_files": [str(documents)],
        "context_size": CONTEXT,
        "num_proc": 1,
        "seed": 5,
        **options,
    }
    theirs_config = SAELensConfig(**options)
    theirs = [row["input_ids"].tolist() for row in SAELensRunner(theirs_config).run()]
    ours = [row["input_ids"].tolist() for row in PretokenizeRunner(PretokenizeRunnerConfig(**options)).run()]
    return ours, theirs, theirs_config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False, "pretokenize_batch_size": 7, "begin_batch_token": None, "sequence_separator_token": "eos"},
        {"num_proc": 2, "pretokenize_batch_size": 50},
        {"streaming": True, "pretokenize_batch_size": 64},
        {"pretokenize_batch_size": None, "begin_sequence_token": 9, "sequence_separator_token": None},
        {"disable_concat_sequences": True, "context_size": 30},
    ],
    ids=str,
)
def test_contexts_equal_saelens(options: dict[str, Any], documents: Path) -> None:
    ours, theirs, _ = both(documents, **options)
    assert len(ours) > 50
    assert ours == theirs


@pytest.mark.parametrize("separator", ["bos", "eos", "sep"])
def test_a_tokenizer_that_adds_special_tokens_itself(separator: str, documents: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    ours, theirs, _ = both(documents, tokenizer, sequence_separator_token=separator, begin_sequence_token="sep")
    assert len(ours) > 50
    assert ours == theirs


def test_conversations_equal_saelens(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"chat": turns * (n % 4 + 1)}) + "\n" for n in range(40)))
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    ours, theirs, _ = both(path, tokenizer, column_name="chat", use_chat_formatting=True)
    assert len(ours) > 5
    assert ours == theirs


def test_what_is_saved_says_how_it_was_made(documents: Path, tmp_path: Path) -> None:
    saved = tmp_path / "made" / "here"
    _, wanted, theirs = both(documents)
    options = {name: value for name, value in vars(theirs).items() if name in PretokenizeRunnerConfig.__annotations__}
    PretokenizeRunner(PretokenizeRunnerConfig(**options | {"save_path": str(saved)})).run()
    assert load_from_disk(saved)["input_ids"][:] == wanted
    assert sorted(p.name for p in saved.parent.iterdir()) == ["here"]
    about = json.loads((saved / "sae_lens.json").read_text())
    assert about == metadata_from_config(theirs).__dict__


@pytest.mark.parametrize("documents_together", [100, None])
def test_nothing_else_is_left(
    documents_together: int | None, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache of datasets holds the documents once, and no copy of the contexts for each run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    left = []
    for name in ("one", "two"):
        options: dict[str, Any] = {
            "num_proc": 1,
            "pretokenize_batch_size": documents_together,
            "save_path": str(tmp_path / name),
        }
        made = PretokenizeRunner(PretokenizeRunnerConfig("embedded", str(documents), context_size=CONTEXT, **options))
        rows = [row["input_ids"].tolist() for row in made.run()]
        assert rows == load_from_disk(tmp_path / name)["input_ids"][:]
        left.append(sorted((tmp_path / "hub").rglob("*.arrow")))
    assert left[0] == left[1] and len(left[0]) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.jsonl", "hub", "one", "two"]


def contexts_of(data: DataConfig, model: ModelConfig | None = None) -> torch.Tensor:
    return torch.cat([chunk.tokens for chunk in TextChunks(data, model or ModelConfig())])


class TestTraining:
    """What a run reads of a pretokenised dataset, and what it refuses."""

    def make(self, folder: Path, documents: Path, **options: Any) -> str:
        given = {"tokenizer_name": "embedded", "context_size": CONTEXT, "num_proc": 1, "shuffle": False, **options}
        PretokenizeRunner(PretokenizeRunnerConfig(dataset_path=str(documents), save_path=str(folder), **given)).run()
        return str(folder)

    @pytest.mark.parametrize("bos", [True, False])
    @pytest.mark.parametrize("separator", ["bos", "eos", None])
    def test_as_its_text_would_be_read(self, bos: bool, separator: Any, documents: Path, tmp_path: Path) -> None:
        tokens = {"begin_batch_token": "bos" if bos else None, "sequence_separator_token": separator}
        made = self.make(tmp_path / "made", documents, pretokenize_batch_size=None, **tokens)
        text = DataConfig(str(documents), context_size=CONTEXT, eval_fraction=0.0, prepend_bos=bos)
        text = dataclasses.replace(text, sequence_separator_token=separator)
        assert torch.equal(contexts_of(dataclasses.replace(text, dataset=made)), contexts_of(text))

    def test_a_part_of_a_split(self, documents: Path, tmp_path: Path) -> None:
        """It is read as the split that it is of."""
        made = self.make(tmp_path / "made", documents, split="train[:50%]")
        data = DataConfig(made, context_size=CONTEXT, eval_fraction=0.0)
        assert data.split == "train"
        whole = dataclasses.replace(data, dataset=self.make(tmp_path / "whole", documents))
        assert 0 < len(contexts_of(data)) < len(contexts_of(whole))

    def check(self, data: DataConfig, *words: str, model: ModelConfig | None = None) -> None:
        with pytest.raises(UserError) as error:
            contexts_of(data, model)
        assert "\n" not in str(error.value)
        for word in words:
            assert word in str(error.value)

    def test_contexts_of_another_length(self, documents: Path, tmp_path: Path) -> None:
        data = DataConfig(self.make(tmp_path / "made", documents), context_size=2 * CONTEXT)
        self.check(data, "data.context_size: 32", "tokenised in contexts of 16; set it to 16 at most")
        # Longer ones are cut anew, and nothing is lost but the end.
        shorter = dataclasses.replace(data, context_size=CONTEXT // 2, eval_fraction=0.0)
        tokens = sum(
            int((row != 0).sum()) for row in load_from_disk(tmp_path / "made").with_format("torch")["input_ids"]
        )
        assert tokens - CONTEXT // 2 <= int((contexts_of(shorter) != 0).sum()) <= tokens

    def test_contexts_without_bos(self, documents: Path, tmp_path: Path) -> None:
        data = DataConfig(self.make(tmp_path / "made", documents, begin_batch_token=None), context_size=CONTEXT)
        self.check(data, "data.prepend_bos: true", "do not begin with BOS", "set it to false")
        # Contexts of one document begin as documents do.
        for begin in ("bos", 0):
            alone = {"disable_concat_sequences": True, "begin_batch_token": None, "begin_sequence_token": begin}
            made = self.make(tmp_path / f"alone_{begin}", documents, **alone)
            assert len(contexts_of(dataclasses.replace(data, dataset=made))) > 50

    def test_another_tokenizer(self, documents: Path, tmp_path: Path) -> None:
        other = make_tokenizer(tmp_path / "tokenizer")
        made = self.make(tmp_path / "made", documents, tokenizer_name=other)
        data = DataConfig(made, context_size=CONTEXT)
        self.check(
            data, f"was tokenised for {other}, which has other tokens than embedded", "--tokenizer_name=embedded"
        )
        assert len(contexts_of(dataclasses.replace(data, tokenizer=other))) > 50
        # The same tokenizer under another name, and one that cannot be had: nothing is known against them.
        for name in (str(MODEL_FOLDER), str(tmp_path / "gone")):
            about = json.loads(Path(made, "sae_lens.json").read_text()) | {"tokenizer_name": name}
            Path(made, "sae_lens.json").write_text(json.dumps(about))
            assert len(contexts_of(data)) > 50

    def test_ids_that_the_model_does_not_have(self, tmp_path: Path) -> None:
        for name, ids in (("above", [[5] * 20, [5] * 20 + [260]]), ("below", [[-1, 5]]), ("first", [[300]])):
            Dataset.from_dict({"tokens": ids}).save_to_disk(tmp_path / name)
            data = DataConfig(str(tmp_path / name), context_size=4, eval_fraction=0.0)
            wrong = {"above": 260, "below": -1, "first": 300}[name]
            self.check(data, f"holds token id {wrong}, but embedded has the tokens 0 to 259; tokenise")

    @pytest.mark.parametrize(("text", "words"), [("{", "is not JSON"), ("[]", "holds no object")])
    def test_damaged_metadata(self, text: str, words: str, documents: Path, tmp_path: Path) -> None:
        data = DataConfig(self.make(tmp_path / "made", documents), context_size=CONTEXT)
        (tmp_path / "made" / "sae_lens.json").write_text(text)
        self.check(data, f"{tmp_path}/made: its sae_lens.json {words}")


class TestCommand:
    def test_makes_a_dataset(self, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        options: dict[str, Any] = {"context_size": CONTEXT, "num_proc": 1, "begin_sequence_token": 7}
        words = {"begin_batch_token": "null", "shuffle": "true", "disable_concat_sequences": "false"}
        pretokenize.main(tokenizer_name="embedded", dataset_path=str(documents), save_path=str(out), **options, **words)
        options["begin_batch_token"] = None
        made = load_from_disk(out)
        assert f"{len(made)} contexts of 16 tokens: {out}" in capsys.readouterr().out
        about = json.loads((out / "sae_lens.json").read_text())
        assert about["begin_sequence_token"] == 7
        # The seed was drawn and is written down: with it the same order comes again.
        runner = PretokenizeRunner(PretokenizeRunnerConfig("embedded", str(documents), seed=about["seed"], **options))
        assert made["input_ids"][:] == [row["input_ids"].tolist() for row in runner.run()]

    def test_streaming_is_saved_too(self, documents: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        cfg = PretokenizeRunnerConfig(
            "embedded", str(documents), streaming=True, num_proc=1, save_path=str(out), seed=1
        )
        contexts = [row["input_ids"].tolist() for row in PretokenizeRunner(cfg).run()]
        assert load_from_disk(out)["input_ids"][:] == contexts

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"dataset_path": ""}, "dataset_path: "),
            ({"save_path": None}, "save_path: missing"),
            ({"save_path": "{tmp}"}, "is there already; remove it"),
            ({"dataset_path": "{tmp}/nothing"}, "dataset_path: {tmp}/nothing, split: train: cannot be opened"),
            ({"split": "test"}, "split: test"),
            ({"column_name": "body"}, "column_name: body, but {tmp}/documents.jsonl has the columns text, other"),
            ({"column_name": "other"}, "column_name: other holds int, not texts"),
            ({"tokenizer_name": "{tmp}/no"}, "tokenizer_name: no tokenizer can be loaded from {tmp}/no"),
            ({"begin_batch_token": "sep"}, "begin_batch_token: sep, but the tokenizer embedded has no SEP token"),
            ({"begin_batch_token": "boss"}, "begin_batch_token: 'boss' is not"),
            ({"context_sise": 3}, "context_sise: unknown key, set to 3 (did you mean context_size"),
            ({"context_size": 1}, "context_size: 1 must be above 1: begin_batch_token takes one"),
            ({"context_size": 10**6}, "no context of this size comes out"),
            ({"streaming": True, "num_proc": 2}, "streaming: True is for one process; set num_proc: 1"),
            ({"use_chat_formatting": True}, "use_chat_formatting: true, but a conversation cannot be formatted"),
            ({"dataset_trust_remote_code": True}, "dataset_trust_remote_code: True must be left out"),
            ({"hf_repo_id": "a//b", "save_path": None}, "hf_repo_id: a//b: the hub does not take it"),
        ],
        ids=str,
    )
    def test_one_line_for_what_is_wrong(
        self, options: dict[str, Any], words: str, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = {"tokenizer_name": "embedded", "dataset_path": str(documents), "num_proc": 1, "save_path": "{tmp}/out"}
        here = {"tmp": tmp_path}
        given = {k: v.format(**here) if isinstance(v, str) else v for k, v in {**given, **options}.items()}
        with pytest.raises(SystemExit, match="1"):
            pretokenize.main(**given)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and words.format(**here) in lines[0]
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    def test_the_hub_gets_contexts_and_metadata(
        self, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What huggingface's clients are told to send: they do the sending."""
        sent: list[Any] = []
        monkeypatch.setattr(Dataset, "push_to_hub", lambda self, name, **how: sent.append((len(self), name, how)))
        monkeypatch.setattr(HfApi, "upload_file", lambda self, **how: sent.append(how))
        cfg = PretokenizeRunnerConfig(
            "embedded", str(documents), num_proc=1, hf_repo_id="user/tokens", hf_num_shards=2, hf_revision="v1"
        )
        count = len(PretokenizeRunner(cfg).run())
        rows, file = sent
        assert rows == (count, "user/tokens", {"num_shards": 2, "private": False, "revision": "v1"})
        assert json.loads(file.pop("path_or_fileobj")) == cfg.metadata()
        place = {"path_in_repo": "sae_lens.json", "repo_id": "user/tokens", "repo_type": "dataset", "revision": "v1"}
        assert file == place

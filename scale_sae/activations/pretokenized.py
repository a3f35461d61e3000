"""Datasets that were tokenised beforehand: what is known of them, and whether a run can use them.

SAELens and ``scale_sae.pretokenize`` put a file ``sae_lens.json`` beside such a dataset.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scale_sae.activations.architecture import build_architecture, first_line
from scale_sae.config import DataConfig, ModelConfig
from scale_sae.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METADATA_FILE = "sae_lens.json"


def read_metadata(dataset: str, revision: str | None = None) -> dict[str, Any] | None:
    """What ``sae_lens.json`` of a dataset in a folder or on the hub says; None where there is none.

    Raises:
        UserError: the file is no JSON object.
    """
    path = _metadata_file(dataset, revision)
    if path is None:
        return None
    try:
        about = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"data.dataset: {dataset}: its {METADATA_FILE} is not JSON ({first_line(error)})") from None
    if not isinstance(about, dict):
        raise UserError(f"data.dataset: {dataset}: its {METADATA_FILE} holds no object")
    return about


def check_pretokenized(
    data: DataConfig, model: ModelConfig, bos: int | None, load_tokenizer: Callable[[str | None], Any]
) -> None:
    """Whether a dataset of token ids fits the run, by its metadata. Nothing is known of one without.

    Args:
        data: the dataset.
        model: the model that is to read it.
        bos: what ``data.prepend_bos`` puts before every context, if anything.
        load_tokenizer: gives the tokenizer of a name, and for None that of the run; ``UserError`` where it cannot.

    Raises:
        UserError: it was made for another tokenizer, has shorter contexts, or would be cut anew.
    """
    about = read_metadata(data.dataset, data.revision)
    if about is None:
        return
    length, theirs, ours = about.get("context_size"), about.get("tokenizer_name"), data.tokenizer or model.name
    if isinstance(length, int) and length < data.context_size:
        found = f"data.context_size: {data.context_size}, but {data.dataset} was tokenised in contexts of {length}"
        raise UserError(f"{found}; set it to {length} at most, or tokenise the text again")
    begin = about.get("begin_batch_token")
    if about.get("disable_concat_sequences") and about.get("begin_sequence_token") is not None:
        begin = about["begin_sequence_token"]
    if bos is not None and length == data.context_size and begin not in ("bos", bos):
        found = f"data.prepend_bos: true, but the contexts of {data.dataset} do not begin with BOS"
        raise UserError(f"{found} and would be cut anew to make room for it; set it to false")
    if theirs != ours and isinstance(theirs, str) and not _same_tokenizer(theirs, load_tokenizer):
        found = f"data.dataset: {data.dataset} was tokenised for {theirs}, which has other tokens than {ours}"
        raise UserError(f"{found}; use that model, or tokenise the text with --tokenizer_name={ours}")


def vocabulary_size(model: ModelConfig) -> int:
    """How many token ids a model knows: the rows of its embedding."""
    embedding: Any = build_architecture(model).get_input_embeddings()
    return int(embedding.weight.shape[0])


def check_token_ids(documents: list[list[int]], size: int, dataset: str, model: str) -> None:
    """UserError where a document, none of them empty, holds an id that is not below ``size``."""
    for ids in documents:
        worst = max(ids) if min(ids) >= 0 else min(ids)
        if not 0 <= worst < size:
            found = f"data.dataset: {dataset} holds token id {worst}, but {model} has the tokens 0 to {size - 1}"
            raise UserError(f"{found}; tokenise the text for this model")


def _metadata_file(dataset: str, revision: str | None) -> Path | None:
    folder = Path(dataset)
    if folder.exists():
        path = folder / METADATA_FILE
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(dataset, METADATA_FILE, repo_type="dataset", revision=revision))
    except (HfHubHTTPError, HFValidationError, OSError):  # not there, no name of a dataset, no network
        return None


def _same_tokenizer(name: str, load_tokenizer: Callable[[str | None], "PreTrainedTokenizerBase"]) -> bool:
    """Whether a tokenizer has the tokens of the run's; taken for granted where one of them cannot be had."""
    try:
        theirs, ours = load_tokenizer(name), load_tokenizer(None)
    except UserError:
        return True
    same: bool = theirs.get_vocab() == ours.get_vocab()
    return same

"""Releases in the formats of sparsify and dictionary_learning: what these libraries compute with them, and refusals."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from made_up_run import D_IN, SCALES, save_run
from scale_sae import export, formats, tensorfile
from scale_sae.consolidate import consolidate, is_release
from scale_sae.errors import UserError
from scale_sae.saes import SAE

TOPK: dict[str, Any] = {"architecture": "topk", "d_sae": 96, "k": 8}
BATCHTOPK: dict[str, Any] = {**TOPK, "architecture": "batchtopk"}
SCALED: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}
NOT_IN: dict[str, Any] = {"apply_b_dec_to_input": False}
FOLDER = "model.layers.1"

TOPK_VARIANTS: dict[str, dict[str, Any]] = {
    "rescaled": TOPK,
    "not rescaled": {**TOPK, "rescale_acts_by_decoder_norm": False},
    "b_dec not in the input": {**TOPK, **NOT_IN},
    "scaled": {**TOPK, **SCALED},
    "k = d_sae": {**TOPK, "d_sae": 40, "k": 40},
}
# name -> (an entry of saes, the class that dictionary_learning must load)
CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    **{f"topk, {name}": (entry, "AutoEncoderTopK") for name, entry in TOPK_VARIANTS.items()},
    "standard": ({"architecture": "standard", "d_sae": 96}, "AutoEncoder"),
    "standard, b_dec not in the input": ({"architecture": "standard", "d_sae": 96, **NOT_IN}, "AutoEncoder"),
    "gated": ({"architecture": "gated", "d_sae": 96}, "GatedAutoEncoder"),
    "gated, b_dec not in the input": ({"architecture": "gated", "d_sae": 96, **NOT_IN}, "GatedAutoEncoder"),
    "jumprelu": ({"architecture": "jumprelu", "d_sae": 96}, "JumpReluAutoEncoder"),
    "jumprelu, b_dec in the input": (
        {"architecture": "jumprelu", "d_sae": 96, "apply_b_dec_to_input": True},
        "JumpReluAutoEncoder",
    ),
    "batchtopk": (BATCHTOPK, "BatchTopKSAE"),
    "batchtopk, scaled": ({**BATCHTOPK, **SCALED}, "BatchTopKSAE"),
    "batchtopk, b_dec not in the input": ({**BATCHTOPK, **NOT_IN}, "BatchTopKSAE"),
    "batchtopk, no whole k": ({**BATCHTOPK, "k": 7.5}, "JumpReluAutoEncoder"),
    "matryoshka": (
        {**TOPK, "architecture": "matryoshka_batchtopk", "matryoshka_widths": [5, 30]},
        "MatryoshkaBatchTopKSAE",
    ),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 11 latents, so that these small SAEs are cut too, and not where the shards are."""
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 11 * 2 * 8 * D_IN)


@pytest.fixture
def dictionary_learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's functions that load SAEs. Its package imports nnsight, which they never call."""
    pytest.importorskip("zstandard")
    if "nnsight" not in sys.modules:
        stand_in = ModuleType("nnsight")
        stand_in.LanguageModel = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "nnsight", stand_in)
    return pytest.importorskip("dictionary_learning.utils")


def release(tmp_path: Path, entry: dict[str, Any], layout: str, dtype: str | None = None) -> tuple[SAE, Path]:
    """(the SAE as SAELens's format has it, the folder in another format) of one made-up run."""
    save_run(tmp_path / "run", saes=[entry])
    consolidate(tmp_path / "run", tmp_path / "ours", dtype=dtype)
    (report,) = consolidate(tmp_path / "run", tmp_path / "theirs", dtype=dtype, layout=layout)
    # The promise of a release: what rounding explains.
    assert report.difference < (1e-6 if dtype is None else export.tolerance(dtype))
    assert is_release(tmp_path / "theirs")
    return SAE.load_from_disk(tmp_path / "ours" / FOLDER, dtype=torch.float32), tmp_path / "theirs" / FOLDER


def inputs(entry: dict[str, Any]) -> Tensor:
    """Rows on whose scale the made-up SAE was trained."""
    rows = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5))
    return rows / SCALES[0] if "normalize_activations" in entry else rows


def assert_same(theirs: Tensor, ours: Tensor) -> None:
    """Both compute in float32, where a pre-activation of 32 terms is off by some 1e-6 of the largest."""
    assert ((theirs - ours).abs().max() / ours.abs().max()).item() < 1e-5


@pytest.mark.parametrize("variant", TOPK_VARIANTS)
def test_sparsify_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")  # which needs a GPU; read when it is imported
    sparsify = pytest.importorskip("sparsify")
    entry = TOPK_VARIANTS[variant]
    ours, folder = release(tmp_path, entry, "sparsify")
    theirs = sparsify.Sae.load_from_disk(folder)
    x = inputs(entry)
    with torch.no_grad():
        values, latents, _ = theirs.encode(x)
        acts = torch.zeros_like(ours.encode(x)).scatter_(1, latents, values)
        assert_same(acts, ours.encode(x))
        assert_same(theirs.decode(values, latents), ours(x))
    assert theirs.cfg.k == entry["k"] and theirs.num_latents == entry["d_sae"]
    assert (acts != 0).sum() > len(x)  # the agreement is not about zeros


@pytest.mark.parametrize("variant", CLASSES)
def test_dictionary_learning_computes_the_same(tmp_path: Path, dictionary_learning: Any, variant: str) -> None:
    entry, dict_class = CLASSES[variant]
    ours, folder = release(tmp_path, entry, "dictionary_learning")
    theirs, config = dictionary_learning.load_dictionary(str(folder), device="cpu")
    assert type(theirs).__name__ == dict_class
    x = inputs(entry)
    with torch.no_grad():
        acts = ours.encode(x)
        # The library takes a standard SAE's decoder rows to norm 1.
        units = ours.W_dec.norm(dim=1) if dict_class == "AutoEncoder" else 1
        assert_same(theirs.encode(x), acts * units)
        assert_same(theirs.decode(theirs.encode(x)), ours(x))
    assert (acts != 0).sum() > len(x)
    # What SAELens's own reader of this format asks for beside the weights.
    assert (config["trainer"]["activation_dim"], config["trainer"]["dict_size"]) == (D_IN, entry["d_sae"])
    assert (config["trainer"]["layer"], config["trainer"]["lm_name"]) == (1, "embedded")
    assert config["buffer"]["ctx_len"] == 128


def test_a_pt_file_holds_plain_tensors(tmp_path: Path) -> None:
    _, folder = release(tmp_path, CLASSES["matryoshka"][0], "dictionary_learning", dtype="bfloat16")
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    assert {tensor.dtype for name, tensor in tensors.items() if name[0] in "Wb"} == {torch.bfloat16}
    assert tensors["threshold"].dtype == torch.float32 and tensors["threshold"].shape == ()
    assert tensors["group_sizes"].tolist() == [5, 25, 66] and tensors["k"].item() == 8
    names = {"ae.pt", "config.json", "runner_cfg.json", "sparsity.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    weights = 2 * (2 * 96 * D_IN + 96 + D_IN)
    assert (folder / "ae.pt").stat().st_size < weights + 6000  # no tensor is in it twice; the rest is headers


def test_the_card_says_how_to_load_it(tmp_path: Path) -> None:
    for layout, words in {"sparsify": "Sae.load_from_disk", "dictionary_learning": "load_dictionary"}.items():
        release(tmp_path, TOPK, layout)
        card = (tmp_path / "theirs" / "README.md").read_text()
        assert f'{words}("path/to/this/folder/{FOLDER}"' in card and f"--format {layout} --out release" in card
    assert json.loads((tmp_path / "theirs" / FOLDER / "config.json").read_text())["metadata"]["training_steps"] == 40


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sparsify, standard": ("sparsify", {"architecture": "standard", "d_sae": 96}, "architecture standard (only topk)"),
    "sparsify, batchtopk": ("sparsify", BATCHTOPK, "architecture jumprelu (only topk)"),
    "sparsify, layer_norm": ("sparsify", {**TOPK, "normalize_activations": "layer_norm"}, "layer_norm"),
    "abstopk": ("dictionary_learning", {**TOPK, "architecture": "abstopk"}, "architecture abstopk (only standard, "),
    "transcoder": (
        "dictionary_learning",
        {"architecture": "transcoder", "d_sae": 96, "d_out": 20, "hookpoint_out": "model.layers.1.mlp"},
        "architecture transcoder",
    ),
    "constant_norm_rescale": (
        "dictionary_learning",
        {**TOPK, "normalize_activations": "constant_norm_rescale"},
        "normalize_activations: constant_norm_rescale",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_cannot_express(tmp_path: Path, case: str) -> None:
    """Nothing is written then, not even of the SAEs that it can express."""
    layout, entry, words = REFUSED[case]
    save_run(tmp_path / "run", saes=[{**TOPK, "name": "fine"}, {**entry, "name": "not"}])
    with pytest.raises(UserError) as caught:
        consolidate(tmp_path / "run", tmp_path / "out", layout=layout)
    message = str(caught.value)
    assert message.startswith(f"--format {layout}: cannot express ") and words in message
    assert message.endswith("use --format saelens") and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("layout", ["sparsify", "dictionary_learning"])
def test_a_wrong_conversion_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """The comparison with the shards does not rest on the conversion."""
    save_run(tmp_path / "run", saes=[{**TOPK, **NOT_IN}])
    monkeypatch.setattr(formats, "move_b_dec", lambda block, subtracted, to_be_subtracted: dict(block))
    with pytest.raises(export.ExportError, match="differs from the sharded one by"):
        consolidate(tmp_path / "run", tmp_path / "out", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("layout", "name"), [("sparsify", "W_dec"), ("dictionary_learning", "decoder.weight")])
def test_a_number_that_the_disk_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, name: str
) -> None:
    save_run(tmp_path / "run")
    write = export.write_weights

    def write_and_change(sae: export.StoredSAE, path: Path, dtype: torch.dtype) -> None:
        write(sae, path, dtype)
        if layout == "sparsify":
            with tensorfile.Reader(path) as reader:
                tensors = {key: reader.tensor(key) for key in reader.entries}
        else:
            tensors = torch.load(path)
        last = tensors[name].view(torch.int32)
        last[3, 5] ^= 1  # the last bit of a float32
        if layout == "sparsify":
            tensorfile.save(path, tensors)
        else:
            torch.save(tensors, path)

    monkeypatch.setattr(export, "write_weights", write_and_change)
    with pytest.raises(export.ExportError, match=f"{name} read back from the release is not what was written"):
        consolidate(tmp_path / "run", tmp_path / "out", layout=layout)

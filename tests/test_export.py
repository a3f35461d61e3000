"""Releases: equal to the SAE that was trained, loaded by SAELens, refused where they are not; wrong ones named."""

import gc
import hashlib
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import safetensors.torch
import torch
from torch import Tensor

import made_up_run
from made_up_run import D_IN, save_run
from scale_sae import checkpoint, export, tensorfile
from scale_sae.collectives import Shard
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError
from scale_sae.saes import SAE, TrainingSAE, TrainStepInput, registry
from scale_sae.saes.inference import CFG_FILE, WEIGHTS_FILE

TOPK: dict[str, Any] = {"architecture": "topk", "d_sae": 96, "k": 8}
D_OUT = 20  # of transcoders
TRANSCODER: dict[str, Any] = {"d_sae": 96, "d_out": D_OUT, "hookpoint_out": "model.layers.1.mlp"}
SCALED: dict[str, Any] = {"normalize_activations": "expected_average_only_in"}

VARIANTS: dict[str, dict[str, Any]] = {
    "topk, rescaled": TOPK,
    "topk, not rescaled": {**TOPK, "rescale_acts_by_decoder_norm": False},
    "topk, b_dec not in the input": {**TOPK, "apply_b_dec_to_input": False},
    "topk, float64": {**TOPK, "dtype": "float64"},
    "topk, k = d_sae": {**TOPK, "d_sae": 40, "k": 40},
    "topk, layer_norm": {**TOPK, "normalize_activations": "layer_norm"},
    "topk, scaled": {**TOPK, **SCALED},
    "abstopk": {**TOPK, "architecture": "abstopk"},
    "abstopk, constant_norm_rescale": {
        **TOPK,
        "architecture": "abstopk",
        "normalize_activations": "constant_norm_rescale",
    },
    "batchtopk": {**TOPK, "architecture": "batchtopk", "k": 7.5},
    "batchtopk, scaled": {**TOPK, "architecture": "batchtopk", **SCALED},
    "batchtopk, scaled, not rescaled": {
        **TOPK,
        "architecture": "batchtopk",
        "rescale_acts_by_decoder_norm": False,
        **SCALED,
    },
    "matryoshka": {**TOPK, "architecture": "matryoshka_batchtopk", "matryoshka_widths": [5, 30]},
    "standard": {"architecture": "standard", "d_sae": 96},
    "standard, layer_norm": {"architecture": "standard", "d_sae": 96, "normalize_activations": "layer_norm"},
    "gated": {"architecture": "gated", "d_sae": 96},
    "gated, scaled": {"architecture": "gated", "d_sae": 96, **SCALED},
    "jumprelu": {"architecture": "jumprelu", "d_sae": 96},
    "jumprelu, scaled": {"architecture": "jumprelu", "d_sae": 96, **SCALED},
    "transcoder": {"architecture": "transcoder", **TRANSCODER},
    "skip_transcoder": {"architecture": "skip_transcoder", **TRANSCODER},
    "skip_transcoder, scaled": {"architecture": "skip_transcoder", **TRANSCODER, **SCALED},
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder", **TRANSCODER},
    "jumprelu_skip_transcoder, scaled": {"architecture": "jumprelu_skip_transcoder", **TRANSCODER, **SCALED},
    "batchtopk_transcoder": {"architecture": "batchtopk_transcoder", "k": 8, **TRANSCODER},
    "batchtopk_skip_transcoder": {"architecture": "batchtopk_skip_transcoder", "k": 8, **TRANSCODER},
    "batchtopk_skip_transcoder, scaled": {
        "architecture": "batchtopk_skip_transcoder",
        "k": 8,
        **TRANSCODER,
        **SCALED,
    },
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 11 latents, so that these small SAEs are cut too, and not where the shards are."""
    monkeypatch.setattr(tensorfile, "BLOCK_BYTES", 11 * 2 * 8 * D_IN)


def rows_of_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def trained_output(sae_id: str, entry: dict[str, Any], x: Tensor) -> Tensor:
    """What the SAE gives in training, unsharded, in float64 on the stored values, for inputs as they are.

    In training BatchTopK compares with a batch; used row by row, it goes by its threshold.
    """
    options = {name: value for name, value in entry.items() if name not in ("architecture", "hookpoint_out")}
    cfg = registry.training_config(entry["architecture"], D_IN, options, "saes.0")
    stored = made_up_run.weights(entry["architecture"], cfg, sae_id)
    sae = registry.create(entry["architecture"], replace(cfg, dtype="float64"), Shard())
    scale, target_scale = made_up_run.scales(cfg)
    with torch.no_grad():
        for name, tensor in sae.tensors().items():
            tensor.copy_(stored[name])
        if "release_threshold" in stored:
            pre = sae.encode_with_hidden_pre(x * scale)[1]
            acts = pre.masked_fill(pre <= stored["release_threshold"], 0)
            return sae.add_skip(sae.decode(acts), x * scale) / target_scale
        step = TrainStepInput(
            sae_in=x * scale,
            coefficients=dict.fromkeys(sae.get_coefficients(), 1.0),
            dead_neuron_mask=torch.zeros(cfg.d_sae, dtype=torch.bool),
            n_training_steps=0,
            is_logging_step=False,
            num_dead=0,
            target=torch.zeros(len(x), sae.d_out, dtype=x.dtype),
        )
        return sae.training_forward_pass(step).sae_out / target_scale


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def test_every_architecture_has_a_variant() -> None:
    assert {entry["architecture"] for entry in VARIANTS.values()} == {
        name for name in registry._CLASSES if ":" not in name
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_release_computes_what_training_did(tmp_path: Path, variant: str) -> None:
    entry = VARIANTS[variant]
    save_run(tmp_path / "run", saes=[entry])
    (report,) = consolidate(tmp_path / "run", tmp_path / "out")
    x = rows_of_input()
    sae = SAE.load_from_disk(tmp_path / "out" / "model.layers.1", dtype=torch.float64)
    # one rounding of each weight to float32 (6e-8), averaged over the sums; float64 is not rounded
    bound = 1e-13 if entry.get("dtype") == "float64" else 1e-6
    assert relative(sae(x), trained_output("model.layers.1", entry, x)) < bound
    assert report.difference < bound


@pytest.mark.parametrize("variant", VARIANTS)
def test_sae_lens_loads_the_release_and_agrees(tmp_path: Path, variant: str) -> None:
    save_run(tmp_path / "run", saes=[VARIANTS[variant]])
    consolidate(tmp_path / "run", tmp_path / "out")
    folder = tmp_path / "out" / "model.layers.1"
    theirs = sae_lens.SAE.load_from_disk(str(folder))
    ours = SAE.load_from_disk(folder)
    x = rows_of_input(ours.W_enc.dtype)
    acts = ours.encode(x)
    assert relative(theirs.encode(x), acts) < 1e-5
    assert relative(theirs.decode(acts), ours.decode(acts)) < 1e-5
    assert relative(theirs(x), ours(x)) < 1e-5
    assert (acts != 0).sum() > len(x)  # the agreement is not about zeros


# What is per latent, by the dimension that counts the latents, and what is not.
PER_LATENT = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0, "b_gate": 0, "b_mag": 0, "r_mag": 0}
WHOLE = {"b_dec": None, "W_skip": None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_latent_axes(tmp_path: Path, variant: str) -> None:
    """Found by comparing SAEs of different widths, whatever d_in and d_out are beside them."""
    entry = VARIANTS[variant]
    (job,) = checkpoint.read_meta(save_run(tmp_path / "run", saes=[entry]))["jobs"]
    stored = export.StoredSAE(checkpoint.complete(tmp_path / "run")[0], job)
    expected = ["W_enc", "W_dec", "b_dec"]
    expected += ["b_gate", "b_mag", "r_mag"] if entry["architecture"] == "gated" else ["b_enc"]
    has_threshold = any(name in entry["architecture"] for name in ("jumprelu", "batchtopk"))
    expected += ["threshold"] * has_threshold + ["W_skip"] * ("skip" in entry["architecture"])
    assert stored.axes == {name: (PER_LATENT | WHOLE)[name] for name in expected}


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_threshold_of_a_batchtopk_release(tmp_path: Path, dtype: str, rescaled: bool) -> None:
    """One number for all latents, in float32 also beside narrower weights, in units of the folded decoder norms."""
    entry = {**TOPK, "architecture": "batchtopk", "rescale_acts_by_decoder_norm": rescaled, **SCALED, "dtype": dtype}
    save_run(tmp_path / "run", saes=[entry])
    consolidate(tmp_path / "run", tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.layers.1" / WEIGHTS_FILE)
    options = {name: value for name, value in entry.items() if name != "architecture"}
    cfg = registry.training_config("batchtopk", D_IN, options, "saes.0")
    stored = made_up_run.weights("batchtopk", cfg, "model.layers.1")["release_threshold"]
    factor = made_up_run.SCALES[0] if rescaled else 1  # the fold makes decoder rows longer by 1 / factor
    assert weights["W_dec"].dtype == getattr(torch, dtype)
    assert torch.equal(weights["threshold"], (stored / factor).float().expand(96))
    cfg_json = json.loads((tmp_path / "out" / "model.layers.1" / CFG_FILE).read_text())
    assert (cfg_json["architecture"], cfg_json["normalize_activations"]) == ("jumprelu", "none")
    assert "k" not in cfg_json and cfg_json["metadata"]["training_architecture_details"]["k"] == 8


def test_decoder_rows_of_a_release_have_norm_one(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    consolidate(tmp_path / "run", tmp_path / "out")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.layers.1" / WEIGHTS_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"W_enc": (D_IN, 96), "W_dec": (96, D_IN), "b_enc": (96,), "b_dec": (D_IN,)}
    # each of 32 squares is off by one float32 rounding
    assert (weights["W_dec"].norm(dim=1) - 1).abs().max() < 1e-6


def test_split_of_the_checkpoint_does_not_change_a_byte(tmp_path: Path) -> None:
    hashes = set()
    for name, cuts in {"a": (), "b": (24, 48, 72), "c": (1, 50)}.items():
        save_run(tmp_path / name, cuts=cuts)
        consolidate(tmp_path / name, tmp_path / f"out_{name}")
        path = tmp_path / f"out_{name}" / "model.layers.1" / WEIGHTS_FILE
        hashes.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(hashes) == 1


def test_dtype_of_the_release(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    (report,) = consolidate(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    folder = tmp_path / "out" / "model.layers.1"
    assert all(t.dtype == torch.bfloat16 for t in safetensors.torch.load_file(folder / WEIGHTS_FILE).values())
    assert json.loads((folder / CFG_FILE).read_text())["dtype"] == "bfloat16"
    assert sae_lens.SAE.load_from_disk(str(folder)).W_dec.dtype == torch.bfloat16
    # the measure that tolerance() rests on: rounding gives about 0.3 eps, and is not missed either
    eps = torch.finfo(torch.bfloat16).eps
    assert 0.05 * eps < report.difference < eps


def test_a_release_is_rounded_once(tmp_path: Path) -> None:
    """bfloat16 weights released as float32 are the nearest float32 to the fold, not rounded to bfloat16 first."""
    save_run(tmp_path / "run", saes=[{**TOPK, "dtype": "bfloat16"}])
    consolidate(tmp_path / "run", tmp_path / "out", dtype="float32")
    weights = safetensors.torch.load_file(tmp_path / "out" / "model.layers.1" / WEIGHTS_FILE)
    cfg = registry.training_config("topk", D_IN, {"d_sae": 96, "k": 8, "dtype": "bfloat16"}, "saes.0")
    stored = made_up_run.weights("topk", cfg, "model.layers.1")
    rows = {name: tensor.double() for name, tensor in stored.items()}
    norms = rows["W_dec"].norm(dim=1, keepdim=True)
    assert torch.equal(weights["W_enc"].T, (rows["W_enc_rows"] * norms).float())
    assert torch.equal(weights["W_dec"], (rows["W_dec"] / norms).float())
    assert torch.equal(weights["b_enc"], (rows["b_enc"] * norms[:, 0]).float())


def test_cfg_and_metadata(tmp_path: Path) -> None:
    keys = {"data": {"context_size": 64, "exclude_special_tokens": [0, 2], "seqpos_slice": [1, None]}}
    saes = [
        {**TOPK, "name": "small"},
        {**TOPK, "name": "wide", "d_sae": 128, "k": 4, "dead_feature_window_tokens": 1000},
    ]
    save_run(tmp_path / "run", saes=saes, hookpoints=["model.layers.1:in"], keys=keys)
    consolidate(tmp_path / "run", tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "model.layers.1.in" / "small" / CFG_FILE).read_text())
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"], cfg["k"]) == ("topk", D_IN, 96, 8)
    about = cfg["metadata"]
    assert (about["hook_name"], about["hf_hook_name"]) == ("blocks.1.hook_resid_pre", "model.layers.1:in")
    assert about["neuronpedia_id"] is None and "hook_name_out" not in about
    assert (about["model_name"], about["model_class_name"]) == ("embedded", "AutoModelForCausalLM")
    assert (about["context_size"], about["prepend_bos"], about["dataset_path"]) == (64, True, "embedded")
    assert (about["exclude_special_tokens"], about["seqpos_slice"]) == ([0, 2], [1, None])
    assert about["training_architecture_details"] == {
        "aux_loss_coefficient": 1.0,
        "b_dec_init": "zeros",
        "decoder_init_norm": 0.1,
        "k_aux": None,
    }
    assert (about["training_steps"], about["training_tokens"]) == (40, 40 * 2048)
    assert about["l0"] == sum(i % 7 for i in range(96)) / 100
    assert about["num_dead_features"] == 96 - 51  # latent i last fired 10 i tokens ago; dead above 500
    wide = json.loads((tmp_path / "out" / "model.layers.1.in" / "wide" / CFG_FILE).read_text())["metadata"]
    assert wide["num_dead_features"] == 128 - 101  # by its own window of 1000
    loaded = sae_lens.SAE.load_from_disk(str(tmp_path / "out" / "model.layers.1.in" / "small"))
    assert loaded.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
    assert loaded.cfg.metadata.sae_lens_version == "6.54.12"


def test_sparsity_and_runner_cfg(tmp_path: Path) -> None:
    saved = save_run(tmp_path / "run")
    consolidate(tmp_path / "run", tmp_path / "out")
    folder = tmp_path / "out" / "model.layers.1"
    sparsity = safetensors.torch.load_file(folder / export.SPARSITY)
    expected = torch.log10((torch.arange(96) % 7).double() / 100 + 1e-10).float()
    assert list(sparsity) == ["sparsity"] and torch.equal(sparsity["sparsity"], expected)
    assert json.loads((folder / export.RUNNER_CFG).read_text()) == checkpoint.read_meta(saved)["config"]


def test_every_job_is_released_and_in_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saes = [{**TOPK, "name": "a"}, {**TOPK, "name": "b", "d_sae": 48}]
    save_run(tmp_path / "run", saes=saes, hookpoints=["model.layers.0", "model.layers.1:in"])
    consolidate(tmp_path / "run", tmp_path / "out")
    folders = [f"{hookpoint}/{name}" for name in "ab" for hookpoint in ("model.layers.0", "model.layers.1.in")]
    card = (tmp_path / "out" / "README.md").read_text()
    printed = capsys.readouterr().out
    for folder in folders:
        assert {path.name for path in (tmp_path / "out" / folder).iterdir()} == export_files()
        assert f"| `{folder}` |" in card
        assert f"{folder.replace('.in/', ':in/')}: written as float32, reloaded, equals the sharded SAE" in printed
    assert card.startswith("---\nlibrary_name: saelens\n")
    assert "python -m scale_sae.consolidate RUN_DIR --step 40 --dtype float32 --out release\n" in card
    assert str(tmp_path) not in card


def export_files() -> set[str]:
    return {WEIGHTS_FILE, CFG_FILE, export.SPARSITY, export.RUNNER_CFG}


def test_blocks_do_not_outlive_their_sae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An SAE that refers to itself is only freed when Python collects garbage: many blocks later, each 64 MiB."""
    save_run(tmp_path / "run", saes=[{**TOPK, "name": "a"}, {**TOPK, "name": "b"}])
    made: list[weakref.ref[TrainingSAE]] = []
    alive: list[int] = []
    create = registry.create

    def counted(*arguments: Any) -> TrainingSAE:
        alive.append(sum(sae() is not None for sae in made))
        sae = create(*arguments)
        made.append(weakref.ref(sae))
        return sae

    monkeypatch.setattr(registry, "create", counted)
    gc.collect()
    gc.disable()
    try:
        consolidate(tmp_path / "run", tmp_path / "out")
    finally:
        gc.enable()
    assert len(made) > 2 * 4 * 9 and max(alive) <= 2  # 9 blocks, which are written and compared
    assert not any(sae() for sae in made)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_wrong_fold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functional comparison does not rest on the fold: it fails when the fold forgets the norms."""
    save_run(tmp_path / "run")

    def forgets(self: Any, state_dict: dict[str, Tensor]) -> None:
        state_dict["W_dec"] = state_dict["W_dec"] / state_dict["W_dec"].norm(dim=1, keepdim=True)

    monkeypatch.setattr(registry.training_class("topk"), "process_state_dict_for_saving_inference", forgets)
    with pytest.raises(export.ExportError, match="differs from the sharded one by"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("variant", ["topk, scaled", "standard, scaled", "skip_transcoder, scaled"])
def test_a_forgotten_scale_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    """The comparison does not rest on the fold of the inputs' factor either."""
    save_run(tmp_path / "run", saes=[VARIANTS.get(variant, {**VARIANTS["standard"], **SCALED})])
    monkeypatch.setattr(TrainingSAE, "fold_activation_norm_scaling_factor", lambda self, scale, target_scale: None)
    with pytest.raises(export.ExportError, match="differs from the sharded one by"):
        consolidate(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold", "W_skip"])
def test_a_bit_that_the_disk_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One bit of the written file flips before it is read back; a weight's last bit is far below any tolerance."""
    save_run(tmp_path / "run", saes=[VARIANTS["batchtopk_skip_transcoder"]])
    write = export.write_weights

    def write_and_flip(sae: export.StoredSAE, path: Path, dtype: torch.dtype) -> None:
        write(sae, path, dtype)
        with tensorfile.Reader(path) as reader:
            entry = reader.entries[name]
        data = bytearray(path.read_bytes())
        data[entry.offset + entry.nbytes // 2] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(export, "write_weights", write_and_flip)
    with pytest.raises(export.ExportError, match=f"{name} read back from the release is not what was written"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [CFG_FILE, export.RUNNER_CFG])
@pytest.mark.parametrize("end", ["", '"'])
def test_a_description_that_the_disk_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, end: str
) -> None:
    """A value in it, or its end."""
    save_run(tmp_path / "run")

    def write(path: Path, value: dict[str, Any]) -> None:
        text = json.dumps(value)
        changed = text.replace('"k": 8', '"k": 9') + end
        assert changed != text
        path.write_text(changed if path.name == name else text)

    monkeypatch.setattr(export, "write_json", write)
    with pytest.raises(export.ExportError, match=f"layers.1: {name} read back from the release is not what was writ"):
        consolidate(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sparsity_that_the_disk_changed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One count of a latent, by a rounding of float32."""
    save_run(tmp_path / "run")
    save = export.save

    def save_and_flip(path: Path, tensors: dict[str, Tensor]) -> None:
        save(path, tensors)
        data = bytearray(path.read_bytes())
        data[-4] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(export, "save", save_and_flip)
    with pytest.raises(export.ExportError, match="sparsity read back from the release is not what was written"):
        consolidate(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("name", ["W_enc_rows", "W_dec", "b_enc", "b_dec"])
def test_weights_that_are_not_numbers_are_refused(tmp_path: Path, name: str) -> None:
    """In one latent, of an SAE without rescaling, where it reaches the least of the others."""
    saved = save_run(tmp_path / "run", saes=[{**TOPK, "rescale_acts_by_decoder_norm": False}], cuts=())
    folder = checkpoint.sae_folder(saved, "model.layers.1")
    for path in folder.glob("*.safetensors"):
        with tensorfile.Reader(path) as reader:
            tensors = {entry: reader.tensor(entry) for entry in reader.entries}
        if name in tensors:
            tensors[name][3] = torch.nan
            tensorfile.save(path, tensors)
    job = checkpoint.read_meta(saved)["jobs"][0]
    with pytest.raises(export.DivergedError, match=f"{name.removesuffix('_rows')} is not finite"):
        export.export_sae(saved, job, tmp_path / "out", {})


WRONG_FIELDS: list[dict[str, Any]] = [
    {"architecture": ["topk"]},
    {"architecture": None},
    {"architecture": "tpok"},
    {"d_in": "32"},
    {"d_sae": 96.0},
    {"d_sae": True},
    {"k": None},
    {"dtype": 32},
    {"dtype": ["float32"]},
    {"apply_b_dec_to_input": "false"},
    {"rescale_acts_by_decoder_norm": 1},
    {"normalize_activations": ["none"]},
    {"reshape_activations": {}},
    {"metadata": None},
    {"metadata": ["hook_name"]},
]


@pytest.mark.parametrize("fields", WRONG_FIELDS)
def test_a_wrong_field_of_a_release_is_one_line(tmp_path: Path, fields: dict[str, Any]) -> None:
    save_run(tmp_path / "run")
    consolidate(tmp_path / "run", tmp_path / "out")
    folder = tmp_path / "out" / "model.layers.1"
    cfg = json.loads((folder / CFG_FILE).read_text())
    (folder / CFG_FILE).write_text(json.dumps(cfg | fields))
    with pytest.raises(UserError, match=next(iter(fields))) as caught:
        SAE.load_from_disk(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [CFG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("contents", [b"", b"\xff" * 40, b"[]", b'{"hook_name": 3, "d_in": 4}', b"[" * 100_000])
def test_a_corrupt_file_of_a_release_is_one_line(tmp_path: Path, name: str, contents: bytes) -> None:
    save_run(tmp_path / "run")
    consolidate(tmp_path / "run", tmp_path / "out")
    (tmp_path / "out" / "model.layers.1" / name).write_bytes(contents)
    with pytest.raises(UserError, match=str(tmp_path / "out" / "model.layers.1")) as caught:
        SAE.load_from_disk(tmp_path / "out" / "model.layers.1")
    assert "\n" not in str(caught.value)


def test_an_sae_that_was_loaded_is_saved_again(tmp_path: Path) -> None:
    save_run(tmp_path / "run")
    consolidate(tmp_path / "run", tmp_path / "out")
    folder = tmp_path / "out" / "model.layers.1"
    sae = SAE.load_from_disk(folder)
    paths = sae.save_model(tmp_path / "deep" / "again")
    assert [path.name for path in paths] == [WEIGHTS_FILE, CFG_FILE]
    assert json.loads(paths[1].read_text()) == json.loads((folder / CFG_FILE).read_text())
    again, theirs = SAE.load_from_disk(tmp_path / "deep" / "again"), sae_lens.SAE.load_from_disk(paths[1].parent)
    for name, tensor in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) and torch.equal(theirs.state_dict()[name], tensor)

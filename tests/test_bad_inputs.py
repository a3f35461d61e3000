"""Wrong inputs: one clear line from one rank, exit code 1 on every rank, no hang, and nothing overwritten."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
from refusals import TIMEOUT, check_refused, contents, end_of, short_config
from scale_sae import checkpoint, config, jobs
from scale_sae.activations.tokens import open_chunks
from scale_sae.embedded import MODEL_FOLDER
from scale_sae.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A config. What every rank would import and build for it by itself, forked ranks have from the start."""
    folder = tmp_path_factory.mktemp("loaded")
    tree = short_config(folder)
    jobs.resolve(config.load(runs.write_config(folder, tree)))
    return tree


# ---- before anything is trained --------------------------------------------------------------------------------------

NESTED = [
    {"d_sae": 64, "k": 4, "hookpoints": ["model.layers.*"]},
    {"d_sae": 64, "k": 4, "hookpoints": ["model.layers.1"]},
]
# name → (dotted keys, what the line must tell)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"train.lr_warmup_steps": 5}, ["train.lr_warmup_steps", "5", "lr_warm_up_steps"]),
    "key without its section": ({"lr": 1e-3}, ["lr: unknown key", "train.lr"]),
    "wrong type": ({"train.lr": "fast"}, ["train.lr", "'fast'", "a number"]),
    "k above d_sae": ({"saes.0.k": 65}, ["saes.0.k", "65", "d_sae"]),
    "d_sae not divisible by tp": ({"saes.0.d_sae": 63}, ["saes.0.d_sae", "63", "topology.sae.tp (2)"]),
    "another number of ranks": (
        {"topology.sae.tp": 4},
        ["needs 5 ranks", "3 were started", "accelerate launch", "--num_processes 5", "--config", "config.yaml"],
    ),
    "unknown hookpoint": (
        {"hookpoints": ["model.layer.1"]},
        ["hookpoints", "model.layer.1", "did you mean", "layers.1"],
    ),
    "pattern without a match": ({"hookpoints": ["model.blocks.*"]}, ["hookpoints", "model.blocks.*", "matches no"]),
    "more groups than SAEs": (
        {"topology.sae": {"groups": 2}, "hookpoints": ["model.layers.1"]},
        ["topology.sae.groups", "2 groups for 1 SAE"],
    ),
    "two patterns, one sae_id": ({"saes": NESTED}, ["saes.1.name", "model.layers.1", "saes.0"]),
    "two patterns, one sae_id with a name": (
        {"saes": [{**entry, "name": "a"} for entry in NESTED]},
        ["saes.1.name", "'a'", "model.layers.1/a", "saes.0"],
    ),
    "a named SAE inside an unnamed one": (
        {"saes": [NESTED[0], {**NESTED[1], "name": "a"}]},
        ["saes.1.name", "'a'", "model.layers.1", "saes.0"],
    ),
    "an unnamed SAE around a named one": (
        {"saes": [{**NESTED[0], "name": "a"}, NESTED[1]]},
        ["saes.1.name", "model.layers.1/a", "saes.0"],
    ),
    "LM tp that does not divide": (
        {"topology": {"lm": {"tp": 3}, "sae": {"tp": 1}}},
        ["topology.lm.tp: 3", "num_attention_heads", "use a divisor of"],
    ),
    "GPUs per LM rank without GPUs": (
        {"topology.lm": {"parallel": "device_map", "devices_per_rank": 4}},
        ["topology.lm.devices_per_rank: 4", "counts GPUs", "remove it"],
    ),
    "misspelt train key of an SAE": ({"saes.0.lrr": 1e-3}, ["saes.0.lrr", "did you mean", "lr"]),
    "misspelt own key of an SAE": (
        {"saes.0.hookpoint": "model.layers.0"},
        ["saes.0.hookpoint", "did you mean hookpoints"],
    ),
    "misspelt option of an SAE": ({"saes.0.aux_loss_coeficient": 1}, ["saes.0", "did you mean aux_loss_coefficient"]),
    "unknown architecture": ({"saes.0.architecture": "topkk"}, ["saes.0.architecture", "topkk", "did you mean topk"]),
    "a transcoder without a target": (
        {"saes.0": {"architecture": "transcoder", "d_sae": 64}},
        ["saes.0.hookpoint_out: missing", "name the hookpoint"],
    ),
    "a release to start from that is not there": (
        {"saes.0.init_from": "./no/release"},
        ["saes.0.init_from", "./no/release"],
    ),
    "missing model": ({"model.name": "./no/model"}, ["model.name", "./no/model", "cannot be loaded"]),
    "missing model on the hub": (
        {"model.name": "nobody/nothing"},
        ["model.name", "nobody/nothing", "cannot be loaded"],
    ),
    "missing dataset": ({"data.dataset": "./no/texts"}, ["data.dataset", "./no/texts"]),
    "missing dataset on the hub": ({"data.dataset": "nobody/nothing"}, ["data.dataset", "nobody/nothing"]),
    "missing split": ({"data.split": "test"}, ["data.split: test"]),
    "missing column": ({"data.column": "body"}, ["data.column: body", "text"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(name: str, tmp_path: Path, loaded: dict[str, Any]) -> None:
    overrides, words = REFUSED[name]
    path = runs.write_config(tmp_path, {**loaded, "output_dir": str(tmp_path / "run")})
    world = 4 if "LM tp" in name else 3
    check_refused(end_of(path, world, overrides), words)
    # No trace but the lock of a folder that was free: corrected, the run starts there as if nothing had been.
    assert set(contents(tmp_path / "run")) <= {".lock"}
    reads = "data." in words[0] or "init_from" in words[0]
    assert set(contents(tmp_path / "run")) == ({".lock"} if reads else set())


TRANSCODER = {
    "architecture": "transcoder",
    "d_sae": 64,
    "hookpoints": ["model.layers.*.mlp:in"],
    "hookpoint_out": "model.layers.*.mlp",
}
# From 640 to 256 values.
NARROWING = TRANSCODER | {"hookpoints": ["model.layers.1.mlp.down_proj:in"], "hookpoint_out": "model.layers.1.mlp"}
MATRYOSHKA = {"architecture": "matryoshka_batchtopk", "d_sae": 64, "k": 4}
JUMPRELU = {"architecture": "jumprelu", "d_sae": 64}
QUADRATIC = JUMPRELU | {"jumprelu_sparsity_loss_mode": "quadratic"}
STANDARD = {"architecture": "standard", "d_sae": 64}
TOPK = {"d_sae": 64, "k": 4}
OWN = "my_saes:"
# name → (entry of saes, what the line must tell)
ENTRIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an architecture like another": (
        STANDARD | {"architecture": "jump_relu"},
        [".architecture", "'jump_relu'", "did you mean jumprelu, ", "known are ", " abstopk, ", "module:Class"],
    ),
    "an option of others": (
        TOPK | {"l1_coefficient": 1},
        [
            ".l1_coefficient: not an option of topk",
            "but of ",
            " gated, ",
            " standard",
            "options are",
            "aux_loss_coefficient",
        ],
    ),
    "a k without a choice of k": (
        STANDARD | {"k": 4},
        [".k: not an option of standard", "but of ", " abstopk, ", " topk"],
    ),
    "a misspelt option": (STANDARD | {"l1_coeficient": 1}, [".l1_coeficient", "did you mean l1_coefficient"]),
    "another width than the hookpoint's": (TOPK | {"d_in": 13}, [".d_in: 13 must be 256", "leave it out"]),
    "a share as k": (TOPK | {"k": 0.05}, [".k: 0.05 must be an integer"]),
    "half a latent": (TOPK | {"k": 4.5}, [".k: 4.5 must be an integer"]),
    "no number as k": (TOPK | {"k": None}, [".k: None is not an integer", "or a number"]),
    "no latent": (MATRYOSHKA | {"k": 0, "matryoshka_widths": [16]}, [".k: 0 must be above 0 and at most d_sae"]),
    "no widths": (MATRYOSHKA, [".matryoshka_widths: []", "for example [512, 2048]"]),
    "empty widths": (MATRYOSHKA | {"matryoshka_widths": []}, [".matryoshka_widths: []", "for example [512, 2048]"]),
    "falling widths": (MATRYOSHKA | {"matryoshka_widths": [32, 16]}, [".matryoshka_widths: [32, 16]", "increase"]),
    "equal widths": (MATRYOSHKA | {"matryoshka_widths": [16, 16]}, [".matryoshka_widths: [16, 16]", "increase"]),
    "a width of 0": (MATRYOSHKA | {"matryoshka_widths": [0, 16]}, [".matryoshka_widths: [0, 16]", "positive"]),
    "a width above d_sae": (
        MATRYOSHKA | {"matryoshka_widths": [16, 65]},
        [".matryoshka_widths: [16, 65] must not exceed d_sae (64)"],
    ),
    "shares as widths": (
        MATRYOSHKA | {"matryoshka_widths": [0.25, 1.0]},
        [".matryoshka_widths: [0.25, 1.0] must be a list, each item an integer"],
    ),
    "one width": (MATRYOSHKA | {"matryoshka_widths": 16}, [".matryoshka_widths: 16 must be a list"]),
    "two widths and no d_out": (NARROWING, [".d_out: missing", "640", "256", "set d_out: 256"]),
    "a wrong d_out": (NARROWING | {"d_out": 640}, [".d_out: 640 must be 256, the width of model.layers.1.mlp"]),
    "a target for an SAE that has none": (
        TOPK | {"hookpoint_out": "model.layers.1.mlp"},
        [".hookpoint_out: model.layers.1.mlp", "topk, which reconstructs its input", "choose a transcoder"],
    ),
    "an unknown target": (
        TRANSCODER | {"hookpoint_out": "model.layers.1.mpl"},
        [".hookpoint_out: model.layers.1.mpl matches no module", "did you mean model.layers.1.mlp"],
    ),
    "a target that is no activation": (
        TRANSCODER | {"hookpoint_out": "model.layers"},
        [".hookpoint_out: model.layers is called 0 times"],
    ),
    "a target that some layers lack": (
        TRANSCODER | {"hookpoint_out": "model.layers.1*.mlp"},
        [".hookpoint_out: model.layers.10.mlp, for model.layers.0.mlp:in, is no module of the model"],
    ),
    "a target with more *": (
        TRANSCODER | {"hookpoint_out": "model.*.*.mlp"},
        [".hookpoint_out: 'model.*.*.mlp' has more * than model.layers.*.mlp:in", "stand for"],
    ),
    "targets that are too few": (
        TRANSCODER | {"hookpoints": ["model.layers.1.mlp:in", "model.layers.2.mlp:in"], "hookpoint_out": ["a.b"]},
        [".hookpoint_out: ['a.b']", "one for each of the 2 hookpoints"],
    ),
    "a target that is no text": (TRANSCODER | {"hookpoint_out": [5]}, [".hookpoint_out.0: 5 is not text"]),
    "b_dec before a transcoder's encoder": (
        TRANSCODER | {"apply_b_dec_to_input": True},
        [".apply_b_dec_to_input: True must be false"],
    ),
    "layer_norm of a transcoder": (
        TRANSCODER | {"normalize_activations": "layer_norm"},
        [".normalize_activations: 'layer_norm' must be none or expected_average_only_in"],
    ),
    "an unknown normalization": (
        TOPK | {"normalize_activations": "layernorm"},
        [".normalize_activations: 'layernorm' must be none or", " or layer_norm or constant_norm_rescale"],
    ),
    "quadratic without a target": (QUADRATIC, [".target_l0: None must be above 0", "(64)", "quadratic"]),
    "quadratic with a target above d_sae": (
        QUADRATIC | {"target_l0": 65},
        [".target_l0: 65 must be above 0 and at most d_sae (64)"],
    ),
    "an unknown loss": (
        JUMPRELU | {"jumprelu_sparsity_loss_mode": "tan"},
        [".jumprelu_sparsity_loss_mode: 'tan' must be step or tanh or quadratic"],
    ),
    "no bandwidth": (JUMPRELU | {"jumprelu_bandwidth": 0}, [".jumprelu_bandwidth: 0 must be above 0"]),
    "a negative l1": (STANDARD | {"l1_coefficient": -1}, [".l1_coefficient: -1 must be 0 or more"]),
    "a negative warm-up": (STANDARD | {"l1_warm_up_steps": -1}, [".l1_warm_up_steps: -1 must be 0 or more"]),
    "a negative l0": (JUMPRELU | {"l0_coefficient": -0.5}, [".l0_coefficient: -0.5 must be 0 or more"]),
    "a negative loss of the dead": (
        JUMPRELU | {"pre_act_loss_coefficient": -1},
        [".pre_act_loss_coefficient: -1 must be 0 or more, or null"],
    ),
    "a negative AuxK": (TOPK | {"aux_loss_coefficient": -0.5}, [".aux_loss_coefficient: -0.5 must be 0 or more"]),
    "an infinite AuxK": (
        TOPK | {"aux_loss_coefficient": float("inf")},
        [".aux_loss_coefficient: inf must be a number"],
    ),
    "a norm of order 0": (STANDARD | {"lp_norm": 0}, [".lp_norm: 0 must be above 0"]),
    "a release that is a list": (TOPK | {"init_from": ["a"]}, [".init_from: ['a']", "user/repo:sae_id", "mapping of"]),
    "a release without a name": (TOPK | {"init_from": {"release": ""}}, [".init_from: ", "names no release"]),
    "a misspelt key of a release": (
        TOPK | {"init_from": {"relese": "x"}},
        [".init_from.relese: unknown key", "'x'", "did you mean release"],
    ),
    "a class in no module": (
        STANDARD | {"architecture": "no_saes:SAE"},
        [".architecture: no_saes cannot be imported", "No module named 'no_saes'", "PYTHONPATH"],
    ),
    "a module that fails": (
        STANDARD | {"architecture": "failing_saes:SAE"},
        [".architecture: failing_saes cannot be imported: ZeroDivisionError"],
    ),
    "a class that is not there": (
        STANDARD | {"architecture": OWN + "MySEA"},
        [".architecture: my_saes has no class 'MySEA'", "did you mean MySAE"],
    ),
    "a class that is no SAE": (
        STANDARD | {"architecture": OWN + "NoSAE"},
        [".architecture: my_saes:NoSAE is no subclass of scale_sae.TrainingSAE"],
    ),
    "a class without its method": (
        STANDARD | {"architecture": OWN + "MySAE"},
        [".architecture: MySAE does not define encode_with_hidden_pre"],
    ),
    "a class by the name of its file": (
        STANDARD | {"architecture": "./my_saes.py:MySAE"},
        [".architecture: './my_saes.py:MySAE' must be package.module:Class"],
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_that_cannot_be_trained(
    name: str, tmp_path: Path, loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process alone: that every rank ends with the one line is seen above. No file is touched so early."""
    entry, words = ENTRIES[name]
    (tmp_path / "my_saes.py").write_text(
        "import scale_sae\nclass MySAE(scale_sae.TrainingSAE): pass\nclass NoSAE: pass\n"
    )
    (tmp_path / "failing_saes.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    tree = {**loaded, "saes": [entry], "hookpoints": ["model.layers.1"], "output_dir": str(tmp_path / "run")}
    path = runs.write_config(tmp_path, tree)
    with pytest.raises(UserError) as refused:
        jobs.resolve(config.load(path))
    sys.modules.pop("my_saes", None)
    line = str(refused.value)
    assert line.startswith(f"saes.0{words[0]}") and [word for word in words if word not in line] == [], line
    assert "\n" not in line and not (tmp_path / "run").exists()


def test_refused_without_a_readable_config(tmp_path: Path) -> None:
    check_refused(end_of(tmp_path / "none.yaml", 2), ["none.yaml", "cannot be read"])
    (tmp_path / "broken.yaml").write_text("saes: [\n")
    check_refused(end_of(tmp_path / "broken.yaml", 2), ["broken.yaml", "YAML"])


def test_refused_output_dir_inside_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    path = runs.write_config(tmp_path, short_config(tmp_path, output_dir=str(tmp_path / "file/run")))
    check_refused(end_of(path, 3), ["output_dir", str(tmp_path / "file/run"), "cannot be written"])
    assert (tmp_path / "file").read_text() == "mine"


# ---- while it trains -------------------------------------------------------------------------------------------------


def broken_model(folder: Path, layer: int) -> str:
    """The embedded model with a NaN in one weight of ``layer``: from there on every activation has one."""
    shutil.copytree(MODEL_FOLDER, folder)
    weights = load_file(folder / "model.safetensors")
    weights[f"model.layers.{layer}.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_nan_activations_in_one_group_end_all(tmp_path: Path) -> None:
    """One SAE group sees NaN, the other and the LM ranks (of which tp peers only wait for each other) do not."""
    overrides = {
        "model.name": broken_model(tmp_path / "model", 1),
        "topology": {"lm": {"tp": 2}, "sae": {"groups": 2}},
        "train.training_tokens": 60 * 128,
    }
    path = runs.write_config(tmp_path, short_config(tmp_path))
    words = ["hookpoints", "128 of 128", "model.layers.1", "NaN or infinite", "model.dtype"]
    check_refused(end_of(path, 4, overrides), words)


def test_text_that_ends_early(tmp_path: Path) -> None:
    tree = short_config(tmp_path, topology={"lm": {"dp": 2}, "sae": {"tp": 1}})
    tree["checkpoint"] = {"every_steps": 100}
    runs.write_texts(Path(tree["data"]["dataset"]), 3)
    path = runs.write_config(tmp_path, tree)
    loaded = config.load(path)
    rows = sum(int(chunk.keep.sum()) for chunk in open_chunks(loaded.data, loaded.model))
    assert rows > 1024 and rows % 128
    steps = rows // 128
    overrides = {"train.training_tokens": 10 * rows}
    words = ["data.dataset", f"gave {rows} rows", f"needs {10 * rows // 128 * 128}", f"all {steps} whole batches"]
    newest = tmp_path / f"run/checkpoints/step_{steps:08d}"
    # The same command again finds no more text.
    for said in ([], [f"going on from {newest}"]):
        check_refused(end_of(path, 3, overrides), words, said)
        assert checkpoint.complete(tmp_path / "run")[0] == newest and checkpoint.verify(newest) == []
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == steps


def test_text_that_cannot_be_read_far_into_the_stream(tmp_path: Path) -> None:
    """Only one LM rank reads: its tensor-parallel peer and the SAE rank learn of it by its end."""
    texts = tmp_path / "texts"
    texts.mkdir()
    runs.write_texts(texts / "a.jsonl", 6)
    (texts / "b.jsonl").write_text(json.dumps({"text": [{"not": "text"}]}) + "\n")
    topology = {"lm": {"tp": 2}, "sae": {"tp": 1}}
    tree = short_config(tmp_path, topology=topology)
    tree["data"] |= {"dataset": str(texts)}
    tree["train"] |= {"training_tokens": 1_000_000}
    ended = end_of(runs.write_config(tmp_path, tree), 3)
    check_refused(ended, ["data.dataset: reading column text failed", "cast"])  # the last are pyarrow's words for it


# ---- the same by the real launcher -----------------------------------------------------------------------------------


def line_of_launch(path: Path, *arguments: str) -> str:
    """The one line of a launch of 4 ranks that fails; every rank has ended."""
    process = runs.launch(path, 4, *arguments)
    code, output = runs.finish(process, 2 * TIMEOUT)
    assert code != 0 and runs.rank_pids(process) == []
    (line,) = [line for line in output.replace("\r", "\n").splitlines() if line.startswith("error")]
    return line


def test_launch_refuses_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 comes up last: were the others to end before, the launcher would end it before it can speak."""
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(3 * (os.environ.get('RANK') == '0'))\n")
    paths = {"PYTHONPATH": f"{tmp_path}:{runs.ROOT}"}
    environment = {**runs.environment(), **paths}
    monkeypatch.setattr(runs, "environment", lambda: environment)
    path = runs.write_config(tmp_path, short_config(tmp_path, topology={"lm": {"tp": 2}, "sae": {"tp": 2}}))
    line = line_of_launch(path, "--train.lr_warmup_steps=5")
    assert line.startswith("error: train.lr_warmup_steps: unknown key, set to 5 (did you mean lr_warm_up_steps")
    assert not (tmp_path / "run").exists()


def test_launch_ends_at_nan_activations(tmp_path: Path) -> None:
    path = runs.write_config(tmp_path, short_config(tmp_path, topology={"lm": {"tp": 2}, "sae": {"tp": 2}}))
    model = broken_model(tmp_path / "model", 0)
    line = line_of_launch(path, f"--model.name={model}", "--train.training_tokens=100000")
    assert line.startswith("error: hookpoints: 128 of 128 activations at model.layers.0 are NaN")

"""Whole runs on models that are no causal language models, and with wandb: the same engine, other inputs and logs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Array3D, Dataset, Features

import runs
from scale_sae.embedded import MODEL_FOLDER

SIZES: dict[str, int] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def make_encoder(folder: Path) -> dict[str, Any]:
    transformers.BertModel(transformers.BertConfig(vocab_size=260, **SIZES)).save_pretrained(folder)
    return {"model": {"name": str(folder), "auto_class": "AutoModel"}, "hookpoints": ["encoder.layer.0"]}


def make_classifier(folder: Path) -> dict[str, Any]:
    config = transformers.LlamaConfig(vocab_size=260, num_labels=3, pad_token_id=2, **SIZES)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return {
        "model": {"name": str(folder), "auto_class": "AutoModelForSequenceClassification"},
        "hookpoints": ["model.layers.1"],
    }


def make_image_model(folder: Path) -> dict[str, Any]:
    config = transformers.ViTConfig(image_size=16, patch_size=4, **SIZES)
    transformers.ViTModel(config).save_pretrained(folder)
    images = torch.rand(400, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    features = Features({"pixel_values": Array3D(shape=(3, 16, 16), dtype="float32")})
    Dataset.from_dict({"pixel_values": images}, features=features).save_to_disk(folder / "images")
    return {
        "model": {"name": str(folder), "auto_class": "AutoModel"},
        "hookpoints": ["layers.1"],
        "data": {"dataset": str(folder / "images"), "column": "pixel_values", "chunk_contexts": 16},
    }


@pytest.mark.parametrize("make", [make_encoder, make_classifier, make_image_model])
@pytest.mark.parametrize("name", ["colocated tp=1", "SAE tp=4"])
def test_other_kinds_of_model_train(make: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    topology, world = runs.TOPOLOGIES[name]
    config = runs.tiny_config(
        tmp_path,
        saes=[{"d_sae": 128, "k": 8}],
        train={"training_tokens": 40 * 128, "train_batch_size_tokens": 128, "lr": 3e-3},
        topology=topology,
    )
    changes = make(tmp_path / "model")
    data = {**config["data"], "tokenizer": str(MODEL_FOLDER), **changes.pop("data", {})}
    runs.forked_run(runs.write_config(tmp_path, {**config, **changes, "data": data}), world)
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 40
    assert records[-1]["metrics/l0"] <= 8
    # Trained, and not on constants: the first step explains nothing yet.
    assert records[-1]["metrics/explained_variance"] > records[0]["metrics/explained_variance"] + 0.1


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = runs.tiny_config(tmp_path, logging={"wandb": True, "wandb_project": "test"})
    config["train"]["training_tokens"] = 20 * 128
    path = runs.write_config(tmp_path, config)
    runs.forked_run(path, 1)
    first = (tmp_path / "run/wandb_id").read_text()
    runs.forked_run(path, 1, {"train.training_tokens": 30 * 128})
    # The run keeps its id over a resume; wandb writes one offline folder per launch.
    assert (tmp_path / "run/wandb_id").read_text() == first
    offline = sorted((tmp_path / "run/wandb").glob(f"offline-run-*-{first}"))
    assert len(offline) >= 1
    logged = b"".join(path.read_bytes() for folder in offline for path in folder.glob("*.wandb"))
    assert b"model.layers.0/small/metrics/explained_variance" in logged

"""Training that starts from a released SAE: the same function, read by rows, whatever the topology."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from harness import run_ranks
from runs import forked_run, largest_difference, sae_state, tiny_config, write_config
from scale_sae import SAE, create, training_config
from scale_sae.collectives import Shard
from scale_sae.config import InitFrom
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError
from scale_sae.init_from import load_release
from scale_sae.saes.registry import training_class
from scale_sae.tensorfile import Reader

D_IN, D_SAE = 8, 24
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 4},
    "abstopk": {"k": 4},
    "batchtopk": {"k": 4},
    "matryoshka_batchtopk": {"k": 4, "matryoshka_widths": [6]},
    "transcoder": {"d_out": 5},
    "jumprelu_skip_transcoder": {"d_out": 5},
    "batchtopk_skip_transcoder": {"d_out": 5, "k": 4},
}


def config_of(architecture: str, **options: Any) -> Any:
    given = {"d_sae": D_SAE, "dtype": "float64", **OPTIONS[architecture], **options}
    return training_config(architecture, D_IN, given, "saes.0")


def write_release(folder: Path, architecture: str, **options: Any) -> dict[str, Tensor]:
    """A release of an SAE with random weights, in float64."""
    cfg = config_of(architecture, **options)
    sae = create(architecture, cfg, Shard())
    generator = torch.Generator().manual_seed(3)
    for tensor in sae.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, dtype=torch.float64, generator=generator).abs())
    state = {name: tensor.contiguous() for name, tensor in sae.inference_state_dict().items()}
    folder.mkdir(parents=True)
    save_file(state, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg.get_inference_sae_cfg_dict() | {"metadata": {}}))
    return state


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_every_architecture_starts_from_its_release(tmp_path: Path, tp: int) -> None:
    releases = {name: write_release(tmp_path / name, name) for name in OPTIONS}

    def load(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
        parts = {}
        for name in OPTIONS:
            sae = create(name, config_of(name), Shard(rank, world))
            load_release(sae, InitFrom(str(tmp_path / name)), "unused", "saes.0.init_from")
            parts[name] = {n: p.detach().clone() for n, p in sae.named_parameters()}
        return parts

    parts = [load(0, 1)] if tp == 1 else run_ranks(tp, load)
    for name, released in releases.items():
        replicated = training_class(name).replicated
        for tensor in parts[0][name]:
            pieces = [part[name][tensor] for part in parts]
            whole = pieces[0] if tensor in replicated else torch.cat(pieces)
            expected = released["W_enc"].T if tensor == "W_enc_rows" else released[tensor]
            assert all(torch.equal(piece, whole) for piece in pieces) or tensor not in replicated
            assert torch.equal(whole, expected), (name, tensor)


def test_a_rank_reads_its_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_release(tmp_path / "sae", "jumprelu")
    asked: list[tuple[str, int, int]] = []
    for kind in ("rows", "columns"):
        read = getattr(Reader, kind)

        def note(self: Reader, name: str, start: int, stop: int, read: Callable[..., Tensor] = read) -> Tensor:
            asked.append((name, start, stop))
            return read(self, name, start, stop)

        monkeypatch.setattr(Reader, kind, note)
    sae = create("jumprelu", config_of("jumprelu"), Shard(1, 3))
    load_release(sae, InitFrom(str(tmp_path / "sae")), "unused", "saes.0.init_from")
    assert sorted(asked) == [(name, 8, 16) for name in ("W_dec", "W_enc", "b_enc", "threshold")]


def test_a_run_goes_on_from_a_release(tmp_path: Path) -> None:
    """With a learning rate of 1e-12 a second run releases what the first did: scales are undone and redone."""
    saes = [
        {"name": "batch", "architecture": "batchtopk", "d_sae": 64, "k": 8, "dtype": "float64"},
        {"name": "scaled", "architecture": "jumprelu", "d_sae": 64, "dtype": "float64"},
        {
            "name": "skip",
            "architecture": "skip_transcoder",
            "d_sae": 64,
            "dtype": "float64",
            "hookpoints": ["model.layers.1.mlp.down_proj:in"],
            "hookpoint_out": "model.layers.1",
            "d_out": 256,
        },
    ]
    for entry in saes[1:]:
        entry["normalize_activations"] = "expected_average_only_in"
    config = tiny_config(tmp_path, saes=saes, hookpoints=["model.layers.0"])
    config["train"]["training_tokens"] = 20 * 128
    forked_run(write_config(tmp_path, config), 1)
    consolidate(tmp_path / "run", tmp_path / "first")

    for entry in saes:
        entry |= {"init_from": str(tmp_path / "first"), "lr": 1e-12}
    again = config | {"output_dir": str(tmp_path / "again"), "train": {**config["train"], "training_tokens": 128}}
    path = write_config(tmp_path, again)
    forked_run(path, 1)
    consolidate(tmp_path / "again", tmp_path / "second")
    for cfg in sorted((tmp_path / "first").rglob("cfg.json")):
        before, after = (SAE.load_from_disk(r / cfg.parent.relative_to(tmp_path / "first")) for r in _both(tmp_path))
        for name, tensor in before.state_dict().items():
            if cfg.parent.name == "batch" and name == "threshold":
                continue  # of other rows
            difference = (after.state_dict()[name] - tensor).abs().max()
            # One Adam step of 1e-12, times a scale of about 1, and roundings.
            assert difference < 1e-10, (cfg.parent.name, name, difference)

    state = sae_state(tmp_path / "again")
    forked_run(path, 2, {"output_dir": str(tmp_path / "sharded"), "topology.sae.tp": "2"})
    assert largest_difference(sae_state(tmp_path / "sharded"), state) < 1e-9


def _both(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "first", tmp_path / "second"


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("standard", {}, "holds a topk SAE; standard starts from a standard release"),
        ("topk", {"d_sae": 32}, "has d_sae: 24, this SAE 32; set the same"),
        ("topk", {"apply_b_dec_to_input": False}, "has apply_b_dec_to_input: True, this SAE False; set the same"),
        ("topk", {"rescale_acts_by_decoder_norm": False}, "has rescale_acts_by_decoder_norm: True, this SAE False"),
        ("topk", {"normalize_activations": "layer_norm"}, "has normalize_activations: none, this SAE layer_norm"),
    ],
)
def test_releases_that_do_not_fit(tmp_path: Path, architecture: str, options: dict[str, Any], message: str) -> None:
    write_release(tmp_path / "sae", "topk")
    sae = create(architecture, config_of(architecture, **options), Shard())
    with pytest.raises(UserError, match=rf"^saes\.0\.init_from: .*sae: {message}"):
        load_release(sae, InitFrom(str(tmp_path / "sae")), "unused", "saes.0.init_from")


def test_what_a_cfg_leaves_out_has_the_release_s_default(tmp_path: Path) -> None:
    """SAELens's TopK releases need not say whether they rescale, and then do not."""
    write_release(tmp_path / "sae", "topk", rescale_acts_by_decoder_norm=False)
    path = tmp_path / "sae/cfg.json"
    cfg = json.loads(path.read_text())
    del cfg["rescale_acts_by_decoder_norm"], cfg["normalize_activations"]
    path.write_text(json.dumps(cfg))
    release = InitFrom(str(tmp_path / "sae"))
    with pytest.raises(UserError, match="has rescale_acts_by_decoder_norm: False, this SAE True; set the same"):
        load_release(create("topk", config_of("topk"), Shard()), release, "unused", "saes.0.init_from")
    plain = create("topk", config_of("topk", rescale_acts_by_decoder_norm=False), Shard())
    load_release(plain, release, "unused", "saes.0.init_from")


def test_damaged_releases(tmp_path: Path) -> None:
    write_release(tmp_path / "sae", "topk")
    weights = tmp_path / "sae/sae_weights.safetensors"
    sae = create("topk", config_of("topk"), Shard())

    def load() -> None:
        load_release(sae, InitFrom(str(tmp_path / "sae")), "unused", "saes.0.init_from")

    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=r"^saes\.0\.init_from: .*truncated"):
        load()
    for broken in (b"\xff" * 8 + whole[8:], b"\x02" + bytes(7) + b"[]", b"\x0e" + bytes(7) + b'{"W_enc": {} }'):
        weights.write_bytes(broken)
        with pytest.raises(UserError, match=r"^saes\.0\.init_from: .*is not a whole safetensors file"):
            load()
    save_file({"W_enc": torch.zeros(D_IN, D_SAE)}, weights)
    with pytest.raises(UserError, match=r"has no tensor W_dec; it holds W_enc"):
        load()
    weights.unlink()
    with pytest.raises(UserError, match=r"^saes\.0\.init_from: .*sae_weights"):
        load()
    with pytest.raises(UserError, match=r"^saes\.0\.init_from: .*sae_id.*model.layers.1/k8"):
        load_release(sae, InitFrom(str(tmp_path)), "model.layers.1/k8", "saes.0.init_from")

"""Classes of one's own: the examples of docs/custom_architectures.md, names, and runs with classes of others."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from refusals import check_refused, end_of, short_config
from runs import forked_run, largest_difference, sae_state, tiny_config, write_config
from scale_sae import checkpoint, config, jobs, train
from scale_sae.collectives import Shard
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError
from scale_sae.saes import SAE, TrainStepInput, registry

sae_lens = pytest.importorskip("sae_lens")

DOCS = runs.ROOT / "docs" / "custom_architectures.md"
MATRYOSHKA = "matryoshka_sae:TopKMatryoshkaTrainingSAE"
ORTHOGONAL = "orthogonal_sae:OrthogonalTrainingSAE"
GELU = "gelu_sae:GeluTrainingSAE"
HOOKPOINT = "model.layers.1"
EXAMPLES: dict[str, dict[str, Any]] = {
    "matryoshka": {"architecture": MATRYOSHKA, "d_sae": 256, "k": 8, "inner_matryoshka_widths": [40, 200]},
    "orthogonal": {
        "architecture": ORTHOGONAL,
        "d_sae": 128,
        "l1_coefficient": 0.1,
        "orthogonality_coefficient": 0.5,
        "orthogonality_warm_up_steps": 10,
    },
    "gelu": {"architecture": GELU, "d_sae": 128, "l1_coefficient": 0.1, "l1_warm_up_steps": 5},
}
# float64: only the order of sums differs between topologies, and 20 steps of Adam amplify it little.
SAME = 1e-9


def code_blocks() -> dict[str, str]:
    """The page's Python blocks that name a file, by that name."""
    blocks = re.findall(r"```python\n(# (\w+\.py).*?)```", DOCS.read_text(), re.DOTALL)
    return {name: text for text, name in blocks}


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on sys.path with the page's examples and the modules below, as a user would have it."""
    folder = tmp_path_factory.mktemp("modules")
    for name, text in code_blocks().items():
        (folder / name).write_text(text)
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


# ---- the examples of the page ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, modules: Path) -> dict[int, Path]:
    """tp → the run directory of a run of all examples."""
    found = {}
    for tp in (1, 2):
        folder = tmp_path_factory.mktemp(f"tp{tp}")
        entries = [{"name": name, "dtype": "float64", **options} for name, options in EXAMPLES.items()]
        settings = {
            "hookpoints": [HOOKPOINT],
            "saes": entries,
            # The window ends within the run, so that dead latents count too.
            "train": {
                "training_tokens": 20 * 128,
                "train_batch_size_tokens": 128,
                "lr": 1e-3,
                "dead_feature_window_tokens": 1000,
            },
            "topology": {"lm": "colocated", "sae": {"tp": tp}},
            "logging": {"log_every_steps": 1},
        }
        forked_run(write_config(folder, tiny_config(folder, **settings)), tp)
        found[tp] = folder / "run"
    return found


@pytest.fixture(scope="module")
def release(trained: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("release") / "out"
    reports = consolidate(trained[2], out)
    assert len(reports) == len(EXAMPLES)
    # float64 throughout: nothing is rounded, only sums come in another order.
    assert max(report.difference for report in reports) < 1e-12
    return out


def test_examples_are_the_same_on_two_shards(trained: dict[int, Path]) -> None:
    assert largest_difference(sae_state(trained[2]), sae_state(trained[1])) <= SAME


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["sae_id"].endswith(name)]


def test_every_loss_metric_and_coefficient_is_logged(trained: dict[int, Path]) -> None:
    own = {
        "matryoshka": ["losses/auxiliary_reconstruction_loss", "losses/inner_mse_loss_40", "losses/inner_mse_loss_200"],
        "orthogonal": ["losses/l1_loss", "losses/orthogonality_loss", "metrics/mean_decoder_norm"],
        "gelu": ["losses/l1_loss"],
    }
    for name, keys in own.items():
        lines = records(trained[2], name)
        assert len(lines) == 20
        for line in lines:
            losses = {key for key in line if key.startswith("losses/")} - {"losses/overall_loss"}
            assert losses == {"losses/mse_loss", *(key for key in keys if key.startswith("losses/"))}
            assert {key for key in keys if key not in line} == set()
            # metrics.jsonl holds all digits; the parts are summed in another order
            assert sum(line[key] for key in losses) == pytest.approx(line["losses/overall_loss"], rel=1e-12)
    # 10 steps of warm-up from 0 to 0.5, in exact decimals but for one rounding to float32
    warm_up = [line["details/orthogonality_coefficient"] for line in records(trained[2], "orthogonal")]
    assert warm_up == pytest.approx([0.5 * min(1, step / 10) for step in range(20)], rel=1e-6)
    assert records(trained[2], "gelu")[3]["details/l1_coefficient"] == pytest.approx(0.1 * 3 / 5, rel=1e-6)
    # SAELens's initial decoder rows have norm 0.1, and one step of Adam moves an entry by no more than lr = 1e-3
    norms = [line["metrics/mean_decoder_norm"] for line in records(trained[2], "orthogonal")]
    assert norms[0] != norms[-1] and abs(norms[0] - 0.1) < 1e-3 * 128**0.5


def test_metrics_are_the_same_on_two_shards(trained: dict[int, Path]) -> None:
    for name in EXAMPLES:
        for one, two in zip(records(trained[1], name), records(trained[2], name), strict=True):
            assert one.keys() == two.keys()
            for key in {key for key in one if key != "sae_id" and not key.startswith("perf/")}:
                assert two[key] == pytest.approx(one[key], rel=SAME, abs=SAME), key


def whole_sae(run_dir: Path, name: str) -> Any:
    """An example as it was trained, unsharded, in float64."""
    folder = checkpoint.complete(run_dir)[0]
    job = next(job for job in checkpoint.read_meta(folder)["jobs"] if job["sae_id"].endswith(name))
    cfg = registry.training_config(job["architecture"], job["d_in"], job["cfg"], "saes.0")
    sae = registry.create(job["architecture"], cfg, Shard())
    state = sae_state(run_dir)
    for key, tensor in sae.tensors().items():
        tensor.data.copy_(state[f"{HOOKPOINT}/{name}/{key}"])
    return sae


def rows_of_input(d_in: int) -> Tensor:
    return torch.randn(32, d_in, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize(("name", "released"), [("matryoshka", "topk"), ("orthogonal", "standard"), ("gelu", "gelu")])
def test_releases_compute_what_was_trained(trained: dict[int, Path], release: Path, name: str, released: str) -> None:
    folder = release / HOOKPOINT / name
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == released
    assert cfg["metadata"]["training_architecture"] == EXAMPLES[name]["architecture"]
    importlib.import_module("gelu_sae")
    if "gelu" not in sae_lens.registry.SAE_CLASS_REGISTRY:
        importlib.import_module("gelu_for_sae_lens")
    ours, theirs = SAE.load_from_disk(folder), sae_lens.SAE.load_from_disk(str(folder))
    sae = whole_sae(trained[2], name)
    x = rows_of_input(sae.cfg.d_in)
    with torch.no_grad():
        acts, expected = sae.encode(x), sae(x)
    for read in (ours, theirs):
        # float64: one sum in another order
        assert (read.encode(x) - acts).abs().max() < 1e-12 * acts.abs().max()
        assert (read(x) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert (acts != 0).sum() > len(x)  # the agreement is not about zeros


def test_no_example_of_the_page_is_left_out() -> None:
    assert set(code_blocks()) == {
        "matryoshka_sae.py",
        "orthogonal_sae.py",
        "gelu_sae.py",
        "gelu_for_sae_lens.py",
        "train_mine.py",
    }


def test_the_page_s_unit_test_runs() -> None:
    (text,) = re.findall(r"```python\n(from scale_sae import training_config.*?)```", DOCS.read_text(), re.DOTALL)
    exec(text, {})


# ---- against SAELens -------------------------------------------------------------------------------------------------


def their_matryoshka(d_in: int, d_sae: int, k: int, widths: list[int], rescale: bool) -> Any:
    """The Matryoshka SAE of SAELens's guide, written for SAELens, with its inner loss taken of the inner output."""

    base: Any = sae_lens.TopKTrainingSAE

    class Matryoshka(base):
        def training_forward_pass(self, step_input: Any) -> Any:
            output = super().training_forward_pass(step_input)
            for width in widths:
                acts = self.activation_fn(output.hidden_pre[:, :width])
                if rescale:
                    acts = acts / self.W_dec[:width].norm(dim=-1)
                inner_out = acts @ self.W_dec[:width] + self.b_dec
                inner_loss = self.mse_loss_fn(inner_out, step_input.sae_in).sum(dim=-1).mean()
                output.losses[f"inner_mse_loss_{width}"] = inner_loss
                output.loss = output.loss + inner_loss
            return output

    cfg = sae_lens.TopKTrainingSAEConfig(
        d_in=d_in, d_sae=d_sae, k=k, dtype="float64", rescale_acts_by_decoder_norm=rescale
    )
    return Matryoshka(cfg)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("n_dead", [0, 20])
def test_matryoshka_step_is_that_of_sae_lens_s_guide(rescale: bool, n_dead: int) -> None:
    d_in, d_sae, widths = 16, 64, [12, 40]
    options = {"d_sae": d_sae, "k": 4, "dtype": "float64", "rescale_acts_by_decoder_norm": rescale}
    cfg = registry.training_config(MATRYOSHKA, d_in, {**options, "inner_matryoshka_widths": widths}, "saes.0")
    ours, theirs = registry.create(MATRYOSHKA, cfg, Shard()), their_matryoshka(d_in, d_sae, 4, widths, rescale)
    draw = torch.Generator().manual_seed(0)
    values = {
        "W_enc": torch.randn(d_in, d_sae, generator=draw, dtype=torch.float64),
        "W_dec": torch.randn(d_sae, d_in, generator=draw, dtype=torch.float64),
        "b_enc": torch.randn(d_sae, generator=draw, dtype=torch.float64),
        "b_dec": torch.randn(d_in, generator=draw, dtype=torch.float64),
    }
    x = torch.randn(32, d_in, generator=draw, dtype=torch.float64)
    dead = torch.arange(d_sae) < n_dead
    with torch.no_grad():
        for name, value in values.items():
            theirs.get_parameter(name).copy_(value)
            ours.get_parameter("W_enc_rows" if name == "W_enc" else name).copy_(value.T if name == "W_enc" else value)
    given: dict[str, Any] = {
        "sae_in": x,
        "coefficients": {},
        "dead_neuron_mask": dead,
        "n_training_steps": 7,
        "is_logging_step": False,
    }
    output = ours.training_forward_pass(TrainStepInput(**given, num_dead=n_dead))
    expected = theirs.training_forward_pass(sae_lens.saes.sae.TrainStepInput(**given))
    assert set(output.losses) == set(expected.losses)
    for name, loss in expected.losses.items():
        torch.testing.assert_close(output.losses[name].double(), torch.as_tensor(loss).double(), rtol=1e-12, atol=0)
    output.loss.backward()
    expected.loss.backward()
    for name in values:
        grad = ours.get_parameter("W_enc_rows" if name == "W_enc" else name).grad
        wanted = theirs.get_parameter(name).grad
        assert grad is not None
        # float64 sums in another order, of gradients of about 10
        torch.testing.assert_close(grad.T if name == "W_enc" else grad, wanted, rtol=1e-10, atol=1e-12)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_registered_name_trains_from_a_script_of_one_s_own(modules: Path, tmp_path: Path) -> None:
    """The page's script, started as a user starts it: nothing but the folder that it lies in is on the path."""
    (tmp_path / "train_mine.py").write_text(code_blocks()["train_mine.py"])
    (tmp_path / "my_saes.py").write_text(
        code_blocks()["matryoshka_sae.py"] + "\n\nfrom scale_sae import register_sae_training_class\n\n"
        'register_sae_training_class("my_matryoshka", TopKMatryoshkaTrainingSAE, TopKMatryoshkaTrainingSAEConfig)\n'
    )
    saes = [{"architecture": "my_matryoshka", "d_sae": 64, "k": 4, "inner_matryoshka_widths": [16]}]
    path = write_config(tmp_path, short_config(tmp_path, saes=saes, topology={"lm": "colocated", "sae": {"tp": 1}}))
    command = [sys.executable, "train_mine.py", "--config", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=runs.environment(), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    lines = records(tmp_path / "run", HOOKPOINT)
    assert lines and all("losses/inner_mse_loss_16" in line for line in lines)


MODULES = {
    "raises": "import no_such_package",
    "fails": "raise RuntimeError('line one\\nline two')",
    "unready": """
        from __future__ import annotations
        from dataclasses import dataclass
        from typing import TYPE_CHECKING, Any
        import sae_lens
        from scale_sae import StandardTrainingSAE, StandardTrainingSAEConfig, TrainingSAE, TrainingSAEConfig
        if TYPE_CHECKING:
            from elsewhere import Config

        class Plain: pass
        class Lens(sae_lens.StandardTrainingSAE): pass
        class Abstract(TrainingSAE): pass
        class NoConfig(StandardTrainingSAE): pass
        class HiddenConfig(StandardTrainingSAE):
            cfg: Config
        class Undecorated(StandardTrainingSAEConfig):
            strength: float
        class WithUndecorated(StandardTrainingSAE):
            cfg: Undecorated
        @dataclass
        class NoArchitecture(TrainingSAEConfig):
            pass
        class WithNoArchitecture(StandardTrainingSAE):
            cfg: NoArchitecture
        @dataclass
        class Unreleased(TrainingSAEConfig):
            @classmethod
            def architecture(cls): return "unreleased"
        class WithUnreleased(StandardTrainingSAE):
            cfg: Unreleased
        @dataclass
        class Picky(StandardTrainingSAEConfig):
            sizes: dict[str, int]
            def problems(self): return super().problems() | {"sizes": f"{self.sizes['a']}"}
        class WithPicky(StandardTrainingSAE):
            cfg: Picky
        number = 3
    """,
}
# path → what the line tells
NOT_LOADED = {
    "no_such_module:MySAE": ["cannot be imported", "ModuleNotFoundError", "no_such_module", "PYTHONPATH"],
    "raises:MySAE": ["raises cannot be imported", "no_such_package"],
    "fails:MySAE": ["RuntimeError: line one line two"],
    "unready:plain": ["has no class 'plain'", "did you mean Plain"],
    "unready:number": ["has no class 'number'"],
    "unready:Plain": ["no subclass of scale_sae.TrainingSAE", "derive"],
    "unready:Lens": ["no subclass of scale_sae.TrainingSAE", "instead of sae_lens"],
    "unready:Abstract": ["Abstract does not define encode_with_hidden_pre"],
    "unready:NoConfig": ["NoConfig does not say its config class", "cfg: MyConfig"],
    "unready:HiddenConfig": ["HiddenConfig", "'Config' is not defined"],
    "unready:WithUndecorated": ["Undecorated has strength", "@dataclass"],
    "unready:WithNoArchitecture": ["does not say its config class", "architecture()"],
    "unready:WithUnreleased": ["unreleased", "register_sae_class"],
}


@pytest.mark.parametrize("path", NOT_LOADED)
def test_what_is_no_class_to_train_is_one_line(path: str) -> None:
    with pytest.raises(UserError) as raised:
        registry.training_config(path, 24, {"d_sae": 24}, "saes.0")
    line = str(raised.value)
    assert line.startswith("saes.0.arch") and "\n" not in line
    assert [word for word in NOT_LOADED[path] if word not in line] == [], line


def test_what_a_config_class_raises_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^saes\.0: Picky: KeyError: 'a'$"):
        registry.training_config("unready:WithPicky", 24, {"d_sae": 24, "sizes": {}}, "saes.0")


# ---- in a run --------------------------------------------------------------------------------------------------------

# Through the command, on two SAE ranks and one of the LM. The rest differs in the words alone.
ENDED = {
    "classes_to_check:SumOverLocal": [
        "saes.0.architecture: classes_to_check:SumOverLocal",
        "losses/l1_loss is another on 2 shards",
    ],
    "classes_to_check:RaisesOnOneShard": ["IndexError", "only here"],
    "unready:Abstract": ["saes.0.architecture", "does not define encode_with_hidden_pre"],
}


@pytest.mark.parametrize("path", ENDED)
def test_a_wrong_class_ends_the_run_before_it_trains(tmp_path: Path, path: str) -> None:
    jobs.resolve(config.load(write_config(tmp_path, short_config(tmp_path))))  # so that forked ranks need not load it
    settings = short_config(tmp_path, saes=[{"architecture": path, "d_sae": 64}])
    check_refused(end_of(write_config(tmp_path, settings), 3), ENDED[path])
    assert not (tmp_path / "run").exists()


def test_a_note_does_not_end_the_run(tmp_path: Path) -> None:
    saes = [{"architecture": "classes_to_check:NoReleasedClass", "d_sae": 64}]
    settings = short_config(tmp_path, saes=saes, topology={"lm": "colocated", "sae": {"tp": 1}})
    ended = end_of(write_config(tmp_path, settings), 1)
    assert ended.codes == [0], ended.printed
    assert [
        line for line in ended.lines if line.startswith("note: saes.0.architecture: classes_to_check:NoReleasedClass")
    ]


def test_equal_configs_are_tried_once(tmp_path: Path) -> None:
    widths = importlib.import_module("classes_to_check").WIDTHS
    counts = []
    for hookpoints in (["model.layers.0"], ["model.layers.0", "model.layers.1"]):
        saes = [{"architecture": "classes_to_check:Counted", "d_sae": 64}]
        _, specs = jobs.resolve(config.from_dict(tiny_config(tmp_path, saes=saes, hookpoints=hookpoints)))
        widths.clear()
        train.check_classes(specs, 2, torch.device("cpu"))
        counts.append(len(widths))
    assert counts[0] == counts[1] > 0

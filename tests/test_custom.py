"""Classes of one's own: the examples of docs/custom_architectures.md, and what the check says of others."""

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
from test_bad_inputs import check_refused, end_of, short_config
from torch import Tensor

import runs
from runs import forked_run, largest_difference, sae_state, tiny_config, write_config
from scale_sae import checkpoint, config, jobs, train
from scale_sae.collectives import Shard
from scale_sae.consolidate import consolidate
from scale_sae.errors import UserError
from scale_sae.saes import SAE, TrainStepInput, registry
from scale_sae.saes.check import check_custom
from scale_sae.saes.simulated_shards import OutOfStepError, on_shards

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
    """A folder on sys.path with the page's examples and the classes below, as a user would have it."""
    folder = tmp_path_factory.mktemp("modules")
    for name, text in code_blocks().items():
        (folder / name).write_text(text)
    (folder / "classes.py").write_text(CLASSES)
    for name, text in MODULES.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def checked(name: str, d_in: int = 24, tp: int = 2, **options: Any) -> str | None:
    """What the check says of a class in ``classes``, on a few latents."""
    path = name if ":" in name else f"classes:{name}"
    return check_custom(path, registry.training_config(path, d_in, {"d_sae": 24, **options}, "saes.0"), tp)


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
            for key in one.keys() - {"perf/tokens_per_second", "sae_id"}:
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


# ---- the check -------------------------------------------------------------------------------------------------------

CLASSES = '''
"""Classes that are ported well, and classes with one mistake each."""

from dataclasses import dataclass, replace

import sae_lens
import torch
from torch import nn

from scale_sae import (
    BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig, TopKTrainingSAE,
    TopKTrainingSAEConfig, TrainStepOutput,
)
from scale_sae.seeds import generator


@dataclass
class Config(StandardTrainingSAEConfig):
    groups: int = 1


class Base(StandardTrainingSAE):
    cfg: Config


# ---- ported well


class Replicated(Base):
    """Parameters that are not per latent, used on both sides of the sum; drawn ones of both kinds."""

    replicated = Base.replicated | {"gain", "W_skip"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.gain = self.zeros(1, device=device)
        self.W_skip = self.zeros(cfg.d_in, cfg.d_in, device=device)
        self.W_more = self.zeros(self.n_local, cfg.d_in, device=device)

    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.draw_rows(self.W_more, seed, hookpoint, "W_more")
        draw = generator(seed, hookpoint, "W_skip")
        self.W_skip.copy_(torch.randn(self.W_skip.shape, generator=draw, dtype=torch.float64))

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        acts = self.shard.copy(self.gain) * output.feature_acts
        out = self.shard.sum(acts @ self.W_more) + step_input.sae_in @ self.W_skip.T
        loss = (out - step_input.target).square().sum(-1).mean()
        losses = output.losses | {"more": loss}
        fired = lambda: self.shard.all_reduce(output.active_latents)
        return replace(output, loss=output.loss + loss, losses=losses, metrics={"fired": fired, "one": 1})

    def process_state_dict_for_saving_inference(self, state_dict):
        for name in ("gain", "W_skip", "W_more"):
            del state_dict[name]


class Noisy(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        draw = generator("noise", len(x))
        noise = torch.rand(len(x), self.cfg.d_sae, generator=draw, dtype=torch.float64)[:, self.rows]
        return acts * noise.to(acts), hidden_pre


class TiedToWidth(Base):
    """Not made for the small width that the check takes first."""

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        if cfg.d_in % cfg.groups:
            raise ValueError("groups must divide d_in")


WIDTHS = []


class Counted(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        WIDTHS.append(cfg.d_in)


class NoReleasedClass(Base):
    def get_activation_fn(self):
        return torch.nn.functional.gelu


class Fitted(BatchTopKTrainingSAE):
    cfg: BatchTopKTrainingSAEConfig


# ---- one mistake each


class SumOverLocal(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": feature_acts.sum(-1).mean()}


class SmallSumOverLocal(Base):
    """Its mistake is a part in 10⁶ of the loss."""

    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return 1e-6 * feature_acts.sum(-1).mean()


class LocalNorm(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        return acts / acts.norm(dim=-1, keepdim=True).clamp(min=1e-3), hidden_pre


class LocalPrefix(TopKTrainingSAE):
    cfg: TopKTrainingSAEConfig

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        acts = self.activation_fn(output.hidden_pre[:, :6])
        loss = (self.decode(acts, slice(0, 6)) - step_input.target).square().sum(-1).mean()
        output.losses["inner"] = loss
        output.loss = output.loss + loss
        return output


class LocalMetric(Base):
    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        output.metrics["mean_act"] = output.feature_acts.sum()
        return output


class SkipsEmpty(Base):
    """Makes a call on those shards alone that have latents of the prefix."""

    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        inner = self.shard.prefix(6)
        if inner.stop == 0:
            return {"inner": sae_out.sum() * 0}
        return {"inner": self.shard.sum(feature_acts[:, inner].sum(-1)).mean()}


class PastTheShard(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        total = feature_acts.sum()
        torch.distributed.all_reduce(total, group=self.shard.group)
        return {"l1_loss": total}


class Gain(Base):
    replicated = Base.replicated | {"gain"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.gain = self.zeros(1, device=device)

    def process_state_dict_for_saving_inference(self, state_dict):
        del state_dict["gain"]


class NoCopy(Gain):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.sum((self.gain * feature_acts).sum(-1)).mean()}


class CopyTooMuch(Gain):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.copy(self.gain).sum() * self.shard.sum(feature_acts.sum(-1)).mean()}


class NotNamed(Gain):
    replicated = Base.replicated


class ForgetsBase(Gain):
    replicated = frozenset({"gain"})


class FullSize(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_more = self.zeros(cfg.d_sae, device=device)


class RandomStart(Gain):
    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.gain.copy_(torch.randn(1))


class LocalStart(Base):
    """Draws a stream of its own on every shard, but the same rows."""

    @torch.no_grad()
    def initialize(self, seed, hookpoint):
        super().initialize(seed, hookpoint)
        self.b_enc.copy_(torch.rand(self.n_local, generator=generator(seed), dtype=torch.float64))


class Dropout(Base):
    def encode_with_hidden_pre(self, x):
        acts, hidden_pre = super().encode_with_hidden_pre(x)
        return nn.functional.dropout(acts), hidden_pre


class LocalBuffer(Base):
    replicated = Base.replicated | {"seen"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64, device=device))

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        self.seen += output.feature_acts.detach().sum()
        return output


class Narrows(Base):
    def decode(self, feature_acts, latents=slice(None)):
        return self.shard.sum((feature_acts @ self.W_dec[latents]).float()).double() + self.b_dec


class SaeLensOutput(Base):
    def training_forward_pass(self, step_input):
        ours = super().training_forward_pass(step_input)
        fields = ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses")
        return sae_lens.saes.sae.TrainStepOutput(**{name: getattr(ours, name) for name in fields})


class Returns(Base):
    changes = {}

    def training_forward_pass(self, step_input):
        output = super().training_forward_pass(step_input)
        return replace(output, **{name: fn(output) for name, fn in self.changes.items()})


class NoOutput(Base):
    def training_forward_pass(self, step_input):
        super().training_forward_pass(step_input)


class LossPerRow(Returns):
    changes = {"loss": lambda output: (output.sae_out - output.sae_in).square().sum(-1)}


class LossDetached(Returns):
    changes = {"loss": lambda output: output.loss.detach()}


class LossesOfFloats(Returns):
    changes = {"losses": lambda output: {"mse_loss": output.losses["mse_loss"].item()}}


class LossesAsTensor(Returns):
    changes = {"losses": lambda output: output.loss}


class MetricPerLatent(Returns):
    changes = {"metrics": lambda output: {"acts": output.feature_acts.mean(0)}}


class WholeActs(Returns):
    changes = {"feature_acts": lambda output: torch.cat([output.feature_acts] * 2, dim=1)}


class RowOut(Returns):
    changes = {"sae_out": lambda output: output.sae_out.sum(0)}


class NotFinite(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        return {"l1_loss": self.shard.sum((0 * feature_acts).sqrt().sum(-1)).mean()}


class Raises(Base):
    def encode_with_hidden_pre(self, x):
        return self.helper(x)

    def helper(self, x):
        raise IndexError("first\\nsecond")  # HERE


class RaisesOnOneShard(Base):
    """The others are already waiting for it in decode."""

    def decode(self, feature_acts, latents=slice(None)):
        if self.shard.rank == 1:
            raise IndexError("only here")
        return super().decode(feature_acts, latents)


class LeavesOnOneShard(Base):
    def decode(self, feature_acts, latents=slice(None)):
        if self.shard.rank == 1:
            raise SystemExit(7)
        return super().decode(feature_acts, latents)


class RaisesBackward(Base):
    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out):
        acts = feature_acts * 1
        loss = acts.square().sum()
        acts.add_(1)
        return {"l1_loss": loss}


class DropsBias(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        del state_dict["b_enc"]


class KeepsMore(Gain):
    def process_state_dict_for_saving_inference(self, state_dict):
        pass


class ReleaseOfOtherShape(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["W_enc"] = state_dict["W_enc"].T


class ReleaseMixesLatents(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_enc"] = state_dict["b_enc"] - state_dict["b_enc"].mean()


class ReleaseDiffers(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["W_enc"] = 2 * state_dict["W_enc"]


class ReleasedDecoderDiffers(Base):
    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_dec"] = 2 * state_dict["b_dec"]


class NeedsManyLatents(Base):
    """Cannot be made of a block of latents."""

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        if cfg.d_sae < 8:
            raise ValueError("too few latents")


class ForgetsToFold(Base):
    """A bias in the unit of the scaled input, that fold_activation_norm_scaling_factor leaves as it is."""

    replicated = Base.replicated | {"b_pre"}

    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_pre = self.zeros(cfg.d_in, device=device)

    def process_sae_in(self, sae_in):
        return super().process_sae_in(sae_in) - self.shard.copy(self.b_pre)

    def encode_with_hidden_pre(self, x):
        hidden_pre = self.process_sae_in(x) @ self.W_enc + self.b_enc
        return self.activation_fn(hidden_pre), hidden_pre

    def process_state_dict_for_saving_inference(self, state_dict):
        state_dict["b_enc"] = state_dict["b_enc"] - state_dict.pop("b_pre") @ state_dict["W_enc"]


class OnCpu(Base):
    def __init__(self, cfg, shard, device="cpu"):
        super().__init__(cfg, shard, device)
        self.b_more = self.zeros(self.n_local, device="cpu")
'''

# class → (options, what the line tells)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "SumOverLocal": ({}, ["losses/l1_loss is another on 2 shards than on one", "self.shard", "sum"]),
    "SmallSumOverLocal": ({}, ["loss is another on 2 shards", "sum"]),
    "LocalNorm": ({}, ["feature_acts is another on 2 shards", "self.shard"]),
    "LocalPrefix": ({"k": 3}, ["losses/inner is another on 2 shards", "prefix"]),
    "LocalMetric": ({}, ["metrics/mean_act is another on 2 shards", "sum"]),
    "LocalBuffer": ({}, ["seen after a step is another on 2 shards"]),
    "SkipsEmpty": ({}, ["make different calls at ", "classes.py:", "shard 0", "shard 1", "prefix"]),
    "PastTheShard": ({}, ["in training_forward_pass at ", "classes.py:"]),
    "NoCopy": ({}, ["the gradient of gain is another on 2 shards", "self.shard.copy"]),
    "CopyTooMuch": ({}, ["the gradient of gain is another on 2 shards", "without it"]),
    "NotNamed": ({}, ["gain has shape [1] on a shard of 24 latents", "`replicated`"]),
    "ForgetsBase": ({}, ["b_dec has shape [16]", "`replicated`"]),
    "FullSize": ({}, ["b_more has shape [24] on a shard of 12 latents", "self.n_local"]),
    "RandomStart": ({}, ["initial gain is another when it is computed again", "initialize(seed, hookpoint)"]),
    "LocalStart": ({}, ["initial b_enc is another on 2 shards", "self.draw_rows"]),
    "Dropout": ({}, ["feature_acts is another when it is computed again", "seeds.generator"]),
    "Narrows": ({}, ["sae_out is another on 2 shards", "promote_types"]),
    "SaeLensOutput": ({}, ["returned a sae_lens.saes.sae.TrainStepOutput", "scale_sae.TrainStepOutput"]),
    "NoOutput": ({}, ["returned a builtins.NoneType"]),
    "LossPerRow": ({}, ["loss has shape [8]", "scalar"]),
    "LossDetached": ({}, ["loss has no gradient"]),
    "LossesOfFloats": ({}, ["losses/mse_loss is a float", "scalar tensor"]),
    "LossesAsTensor": ({}, ["losses is a Tensor", "dict"]),
    "MetricPerLatent": ({}, ["metrics/acts has shape [24]", "scalar"]),
    "WholeActs": ({}, ["feature_acts", "has shape [8, 48]", "[batch, self.n_local], here [8, 24]"]),
    "RowOut": ({}, ["sae_out", "has shape [16]", "[batch, d_out], here [8, 16]"]),
    "NotFinite": ({}, ["the gradient of", "is not finite"]),
    "Raises": ({}, ["IndexError in training_forward_pass", ": first second"]),
    "RaisesOnOneShard": ({}, ["IndexError in training_forward_pass", "only here"]),
    "RaisesBackward": ({}, ["RuntimeError in the backward pass", "inplace operation"]),
    "DropsBias": ({}, ["b_enc are missing", "process_state_dict_for_saving_inference"]),
    "KeepsMore": ({}, ["gain are unknown", "process_state_dict_for_saving_inference"]),
    "ReleaseOfOtherShape": ({}, ["W_enc has shape [24, 16]", "[16, 24]"]),
    "ReleaseMixesLatents": ({}, ["b_enc of the release is another where latents 0 to 0", "no other latent"]),
    "ReleaseDiffers": ({}, ["pre-activations of its release differ", "consolidate would refuse"]),
    "ReleasedDecoderDiffers": (
        {"apply_b_dec_to_input": False},
        ["reconstructions of its release differ", "consolidate would refuse"],
    ),
    "NeedsManyLatents": ({}, ["ValueError while its release is made by blocks", "too few latents"]),
    "ForgetsToFold": (
        {"normalize_activations": "expected_average_only_in"},
        ["reconstructions of its release differ", "fold_activation_norm_scaling_factor"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_class_is_refused_in_one_line(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(UserError) as raised:
        checked(name, **options)
    line = str(raised.value)
    assert line.startswith(f"classes:{name}: ") and "\n" not in line
    assert [word for word in words if word not in line] == [], line


def test_an_exception_is_placed_in_the_class_s_own_file(modules: Path) -> None:
    number = next(n for n, line in enumerate(CLASSES.splitlines(), 1) if line.endswith("# HERE"))
    with pytest.raises(UserError, match=re.escape(f" at {modules / 'classes.py'}:{number}: ")):
        checked("Raises")


def test_a_class_that_ends_the_process_on_one_shard_leaves_no_other_waiting() -> None:
    with pytest.raises(SystemExit):
        checked("LeavesOnOneShard")


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("name", ["Replicated", "Noisy"])
def test_a_class_that_is_ported_well_passes(name: str, tp: int) -> None:
    checked(name, tp=tp)


@pytest.mark.parametrize("name", ["SumOverLocal", "LocalNorm", "NoCopy", "Dropout", "RandomStart"])
def test_on_one_shard_nothing_need_be_sharded(name: str) -> None:
    checked(name, tp=1)


PACKAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "matryoshka_batchtopk": {"matryoshka_widths": [8, 16], "use_matryoshka_aux_loss": True},
    "jumprelu": {"pre_act_loss_coefficient": 3e-6, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0},
}


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "layer_norm"])
@pytest.mark.parametrize("architecture", sorted(registry._CLASSES))
def test_every_architecture_of_the_package_passes(architecture: str, normalize: str) -> None:
    options = {"normalize_activations": normalize, **PACKAGE_OPTIONS.get(architecture, {})}
    options |= {"k": 3} if "topk" in architecture else {}
    if "transcoder" in architecture:
        if normalize == "layer_norm":
            pytest.skip("transcoders do not have it")
        options["d_out"] = 20
    cfg = registry.training_config(architecture, 24, {"d_sae": 24, **options}, "saes.0")
    assert check_custom(architecture, cfg, 3) is None


def test_a_class_may_tie_its_options_to_d_in() -> None:
    checked("TiedToWidth", d_in=42, groups=7)
    with pytest.raises(UserError, match=r"ValueError while it is made.*groups must divide d_in"):
        checked("TiedToWidth", d_in=40, groups=7)


def test_what_is_tried_is_narrow_whatever_the_width() -> None:
    widths = importlib.import_module("classes").WIDTHS
    widths.clear()
    checked("Counted", d_in=10**6)
    assert widths and max(widths) == 16


def test_a_release_with_other_activations_is_noted() -> None:
    note = checked("NoReleasedClass")
    assert note is not None and "of architecture standard" in note and "register_sae_class" in note
    # BatchTopK's release has a threshold by intent
    assert checked("Fitted", k=3) is None


def test_a_tensor_that_is_not_on_the_run_s_device_is_named() -> None:
    path = "classes:OnCpu"
    cfg = registry.training_config(path, 24, {"d_sae": 24}, "saes.0")
    with pytest.raises(UserError, match="b_more is on cpu, not on meta; make it there: device=device"):
        check_custom(path, cfg, 2, "meta")


# ---- in a run --------------------------------------------------------------------------------------------------------

# Through the command, on two SAE ranks and one of the LM. The rest differs in the words alone.
ENDED = {
    "classes:SumOverLocal": ["saes.0.architecture: classes:SumOverLocal", "losses/l1_loss is another on 2 shards"],
    "classes:RaisesOnOneShard": ["IndexError", "only here"],
    "unready:Abstract": ["saes.0.architecture", "does not define encode_with_hidden_pre"],
}


@pytest.mark.parametrize("path", ENDED)
def test_a_wrong_class_ends_the_run_before_it_trains(tmp_path: Path, path: str) -> None:
    jobs.resolve(config.load(write_config(tmp_path, short_config(tmp_path))))  # so that forked ranks need not load it
    settings = short_config(tmp_path, saes=[{"architecture": path, "d_sae": 64}])
    check_refused(end_of(write_config(tmp_path, settings), 3), ENDED[path])
    assert not (tmp_path / "run").exists()


def test_a_note_does_not_end_the_run(tmp_path: Path) -> None:
    saes = [{"architecture": "classes:NoReleasedClass", "d_sae": 64}]
    settings = short_config(tmp_path, saes=saes, topology={"lm": "colocated", "sae": {"tp": 1}})
    ended = end_of(write_config(tmp_path, settings), 1)
    assert ended.codes == [0], ended.printed
    assert [line for line in ended.lines if line.startswith("note: saes.0.architecture: classes:NoReleasedClass")]


def test_equal_configs_are_tried_once(tmp_path: Path) -> None:
    widths = importlib.import_module("classes").WIDTHS
    counts = []
    for hookpoints in (["model.layers.0"], ["model.layers.0", "model.layers.1"]):
        saes = [{"architecture": "classes:Counted", "d_sae": 64}]
        _, specs = jobs.resolve(config.from_dict(tiny_config(tmp_path, saes=saes, hookpoints=hookpoints)))
        widths.clear()
        train.check_classes(specs, 2, torch.device("cpu"))
        counts.append(len(widths))
    assert counts[0] == counts[1] > 0


# ---- simulated shards ------------------------------------------------------------------------------------------------


def test_simulated_shards_sum_and_gather() -> None:
    def fn(shard: Shard) -> list[Tensor]:
        x = torch.tensor([1.0, shard.rank])
        return [shard.all_reduce(x), shard.all_reduce(x, "max"), shard.all_reduce(x, "min"), shard.all_gather(x)]

    gathered = torch.tensor([[1.0, 0], [1, 1], [1, 2]])
    for found in on_shards(3, fn):
        wanted = [torch.tensor([3.0, 3]), torch.tensor([1.0, 2]), torch.tensor([1.0, 0]), gathered]
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_simulated_shards_that_fall_out_of_step_all_end() -> None:
    def fn(shard: Shard) -> None:
        if shard.rank != 1:
            shard.all_reduce(torch.zeros(2))

    with pytest.raises(OutOfStepError, match=r"shard 0 is at all_reduce.*shard 1 at the end"):
        on_shards(3, fn)


def test_the_error_of_a_simulated_shard_ends_the_others() -> None:
    def fn(shard: Shard) -> None:
        if shard.rank == 1:
            raise KeyError("mine")
        shard.all_gather(torch.zeros(2))

    with pytest.raises(KeyError, match="mine"):
        on_shards(3, fn)

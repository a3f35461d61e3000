"""Tries a class of one's own before it is trained: shards against the whole on one small batch, and its release.

The shards are threads that hand each other tensors. So the check needs no process group, comes to one result wherever
it runs, and finds collectives that would leave the ranks of a run waiting for each other.
"""

import copy
import math
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scale_sae.collectives import Shard
from scale_sae.errors import UserError
from scale_sae.saes import registry
from scale_sae.saes.base import TrainingSAE, TrainStepInput, TrainStepOutput
from scale_sae.saes.inference import SAE, build
from scale_sae.saes.simulated_shards import LeftAloneError, OutOfStepError, on_shards
from scale_sae.saes.training_config import TrainCoefficientConfig
from scale_sae.seeds import generator

ROWS = 8
WIDTH = 16  # of the input, at most: memory stays small with any d_sae
LARGEST = 2**25  # d_in · d_sae up to which the real width may be tried instead
STEP = 10**6  # late in training: whatever a schedule brings in is there
SELECTED = 32  # activations per row that the releases' decoders are compared on, as in consolidation

# Both sides compute the same sums in float64, in another order: 1e-16 times the root of the number of terms, of which
# there are millions at most. What a class does wrong is far above, even where a small coefficient stands before it.
TOLERANCE = 1e-9
ROUNDED = 1e-5  # float32 on the way explains less
SMALLEST = 1e-6  # below it a largest entry may itself be what rounding left of 0

VALUES = "what mixes latents must go through self.shard (sum, copy, prefix), self.activation_fn or self.decode"
REPLICATED = (
    "let it reach local latents through self.shard.copy, and join what is already summed over the shards without it"
)
INITIAL = (
    "draw it in initialize(seed, hookpoint): rows of latents with self.draw_rows, anything else with a generator of "
    "scale_sae.seeds.generator(seed, hookpoint, name)"
)
RANDOM = (
    "draw random numbers for all d_sae latents with scale_sae.seeds.generator(step_input.n_training_steps, name), and "
    "take self.rows of them"
)
FLOAT32 = (
    "; or, as it is so little: compute in the dtype that comes in, and widen it to "
    "torch.promote_types(x.dtype, torch.float32), not with .float()"
)


def check_custom(architecture: str, cfg: Any, tp: int, device: torch.device | str = "cpu") -> str | None:
    """Trains a class for one step on 8 random rows, in float64 and at a width of at most 16, and releases it.

    The step runs on one shard and on tp shards. Compared are the initial tensors, the outputs, losses, metrics,
    gradients and buffers. On a GPU the step on one shard is repeated there.

    Args:
        architecture: as in a config file; any will do, but those of this package need no check.
        cfg: its checked config (``registry.training_config``).
        tp: shards of the run.
        device: where the run trains; the shards are compared on the CPU.

    Returns:
        A line that the user should read though nothing is wrong for certain, or None.

    Raises:
        UserError: one line: the class, what it does or which tensor differs by how much, and the remedy.
    """
    trial = _Trial(architecture, cfg, min(cfg.d_in, WIDTH))
    try:
        whole, expected = trial.on_one_shard()
    except UserError as error:
        if error.__cause__ is None or not WIDTH < cfg.d_in <= LARGEST / cfg.d_sae:
            raise
        # The class raised something itself. It may tie its options to d_in: then a small one does not do.
        trial = _Trial(architecture, cfg, cfg.d_in)
        whole, expected = trial.on_one_shard()
    trial.check_finite(expected)
    if tp > 1:
        trial.compare(expected, [trial.on_one_shard()[1]], "when it is computed again", RANDOM)
        trial.compare(expected, on_shards(tp, trial.on_shard), f"on {tp} shards than on one")
    if torch.device(device).type != "cpu":
        trial.on_device(torch.device(device))
    with torch.no_grad():
        return trial.check_release(whole)


class _Value(NamedTuple):
    """A tensor of a trial. ``axis``: that of the latents; None where all shards have the same."""

    tensor: Tensor
    axis: int | None
    remedy: str


class _Trial:
    """A class, a config of small width, and the batch that it is tried on."""

    def __init__(self, architecture: str, cfg: Any, width: int):
        self.architecture = architecture
        self.sae_class = registry.training_class(architecture)
        self.cfg = copy.copy(cfg)
        self.cfg.d_in, self.cfg.dtype = width, "float64"
        d_out = getattr(cfg, "d_out", None)
        if d_out is not None and width < cfg.d_in:
            self.cfg.d_out = width if d_out == cfg.d_in else min(d_out, width - 4)
        rows = generator("check", "rows")
        self.sae_in = torch.randn(ROWS, width, dtype=torch.float64, generator=rows)
        self.target = self.sae_in
        if d_out is not None:
            self.target = torch.randn(ROWS, self.cfg.d_out, dtype=torch.float64, generator=rows)
        self.start: dict[str, Tensor] = {}  # the whole SAE's tensors before the step
        self.dead = torch.rand(cfg.d_sae, generator=generator("check", "dead")) < 0.5

    def refusal(self, problem: str) -> UserError:
        return UserError(f"{self.architecture}: {problem}")

    @contextmanager
    def blamed(self, doing: str) -> Iterator[None]:
        """What the class raises becomes a UserError with the line of its file."""
        try:
            yield
        except (UserError, LeftAloneError):
            raise
        except OutOfStepError as error:
            raise self.refusal(
                f"the shards make different calls{self._place(error)}: {error}; call self.shard alike on all of them, "
                "also on one that has none of a prefix's latents"
            ) from error
        except Exception as error:
            line = registry.one_line(error)
            raise self.refusal(f"{type(error).__name__} {doing}{self._place(error)}: {line}") from error

    def _place(self, error: Exception) -> str:
        """The innermost line of the class's own files that an error came through."""
        own = [
            cls.__module__ for cls in self.sae_class.__mro__ if not cls.__module__.startswith(("scale_sae.", "torch."))
        ]
        files = {getattr(sys.modules.get(module), "__file__", None) for module in own}
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
        return f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""

    # ---- one step ---------------------------------------------------------------------------------------------------

    def on_one_shard(self) -> tuple[TrainingSAE, dict[str, _Value]]:
        """The whole SAE after a step, and all that the step made."""
        sae, values = self._initialized(Shard())
        self._disturb(sae)
        self.start = {name: tensor.detach().clone() for name, tensor in sae.tensors().items()}
        return sae, values | self._step(sae)

    def on_shard(self, shard: Shard) -> dict[str, _Value]:
        """What a step makes on one of several shards."""
        sae, values = self._initialized(shard)
        _copy_rows(sae, self.start, sae.rows)
        return values | self._step(sae)

    def on_device(self, device: torch.device) -> None:
        """A step of the whole SAE on the run's device."""
        self._step(self._initialized(Shard(), device)[0])

    def _initialized(self, shard: Shard, device: torch.device | str = "cpu") -> tuple[TrainingSAE, dict[str, _Value]]:
        with self.blamed("while it is made"):
            sae = registry.create(self.architecture, self.cfg, shard, device)
            sae.initialize(0, "check")
        for name, tensor in sae.tensors().items():
            if tensor.device.type != torch.device(device).type:
                raise self.refusal(f"{name} is on {tensor.device}, not on {device}; make it there: device=device")
            if name not in sae.replicated and tensor.shape[:1] != (sae.n_local,):
                raise self.refusal(
                    f"{name} has shape {list(tensor.shape)} on a shard of {sae.n_local} latents; make it "
                    f"[self.n_local, ...] if it has a row per latent, else name it in `replicated`"
                )
        return sae, {f"initial {name}": value for name, value in _state(sae, INITIAL).items()}

    @torch.no_grad()
    def _disturb(self, sae: TrainingSAE) -> None:
        """Moves all parameters, so that what starts at 0 counts too; upwards, so that what must be positive is."""
        for name, parameter in sae.named_parameters():
            noise = torch.rand(parameter.shape, dtype=torch.float64, generator=generator("check", name))
            parameter.add_((0.05 * noise).to(parameter))

    def _step(self, sae: TrainingSAE) -> dict[str, _Value]:
        device = sae.b_dec.device
        coefficients = {
            name: value.value if isinstance(value, TrainCoefficientConfig) else value
            for name, value in sae.get_coefficients().items()
        }
        sae_in = self.sae_in.to(device)
        step_input = TrainStepInput(
            sae_in=sae_in,
            target=sae_in if self.target is self.sae_in else self.target.to(device),
            coefficients=coefficients,
            dead_neuron_mask=self.dead[sae.rows].to(device),
            num_dead=int(self.dead.sum()),
            n_training_steps=STEP,
            is_logging_step=True,
        )
        with self.blamed("in training_forward_pass"):
            output = sae.training_forward_pass(step_input)
        values = self._outputs(sae, output)
        with self.blamed("in the backward pass"):
            output.loss.backward()
        values |= _gradients(sae)
        with self.blamed("in metrics"):
            values |= self._metrics(output)
        return values | {f"{name} after a step": value for name, value in _state(sae, VALUES).items()}

    def _outputs(self, sae: TrainingSAE, output: Any) -> dict[str, _Value]:
        """What training_forward_pass returned, once it is what the trainer takes."""
        if not isinstance(output, TrainStepOutput):
            kind = type(output)
            raise self.refusal(
                f"training_forward_pass returned a {kind.__module__}.{kind.__qualname__}; return a "
                "scale_sae.TrainStepOutput"
            )
        with self.blamed("in training_forward_pass"):
            acts = {"hidden_pre": output.hidden_pre, "feature_acts": output.feature_acts}
        widths = {"hidden_pre": sae.n_local, "feature_acts": sae.n_local, "sae_out": sae.d_out}
        for name, tensor in {**acts, "sae_out": output.sae_out}.items():
            if not isinstance(tensor, Tensor) or tensor.shape != (ROWS, widths[name]):
                what = "d_out" if name == "sae_out" else "self.n_local"
                raise self.refusal(
                    f"{name} of the TrainStepOutput {_shape(tensor)}; it must be [batch, {what}], here "
                    f"[{ROWS}, {widths[name]}]"
                )
        if not isinstance(output.losses, dict):
            raise self.refusal(f"losses is a {type(output.losses).__name__}; it must be a dict of scalar tensors")
        losses = {f"losses/{name}": loss for name, loss in output.losses.items()} | {"loss": output.loss}
        for name, loss in losses.items():
            if not isinstance(loss, Tensor) or loss.dim():
                raise self.refusal(f"{name} {_shape(loss)}; it must be a scalar tensor: take .sum(dim=-1).mean()")
        if not output.loss.requires_grad:
            raise self.refusal("loss has no gradient; compute it from the parameters, without detach or no_grad")
        same = {"sae_out": output.sae_out} | losses
        return {name: _value(tensor, 1) for name, tensor in acts.items()} | {
            name: _value(tensor, None) for name, tensor in same.items()
        }

    def _metrics(self, output: TrainStepOutput) -> dict[str, _Value]:
        values = {}
        for name, metric in output.metrics.items():
            tensor = torch.as_tensor(metric() if callable(metric) else metric)
            if tensor.dim():
                raise self.refusal(f"metrics/{name} {_shape(tensor)}; it must be a number or a scalar tensor")
            values[f"metrics/{name}"] = _value(tensor, None)
        return values

    # ---- comparison -------------------------------------------------------------------------------------------------

    def check_finite(self, values: Mapping[str, _Value]) -> None:
        for name, value in values.items():
            if not name.startswith("metrics/") and not value.tensor.isfinite().all():
                raise self.refusal(
                    f"{name} is not finite on random rows; keep roots, logarithms and divisions away from 0"
                )

    def compare(
        self, expected: Mapping[str, _Value], shards: Sequence[Mapping[str, _Value]], when: str, remedy: str = ""
    ) -> None:
        """UserError for the first tensor that differs. ``remedy``, if given, is for all but the initial tensors."""
        for values in shards:
            if odd := expected.keys() ^ values.keys():
                raise self.refusal(
                    f"other values are made {when}: {', '.join(sorted(odd))}; make the same on all shards"
                )
        for name, value in expected.items():
            parts = [values[name].tensor for values in shards]
            for tensor in parts if value.axis is None else [torch.cat(parts, value.axis)]:
                if tensor.shape != value.tensor.shape:
                    shapes = f"{list(tensor.shape)}, not {list(value.tensor.shape)}"
                    raise self.refusal(f"{name} has another shape {when}: {shapes}; {value.remedy}")
                difference = _difference(tensor, value.tensor)
                if difference > TOLERANCE:
                    cure = remedy if remedy and value.remedy != INITIAL else value.remedy
                    cure += FLOAT32 if difference < ROUNDED else ""
                    raise self.refusal(f"{name} is another {when}, by {difference:.1e} of its largest entry; {cure}")

    # ---- the release ------------------------------------------------------------------------------------------------

    def check_release(self, whole: TrainingSAE) -> str | None:
        """What consolidation asks of the class: blocks of latents that stand for themselves, a release that agrees."""
        # With a factor that is not 1 where the config has one at all; a transcoder has two.
        scaled = self.cfg.normalize_activations == "expected_average_only_in"
        scale = 2.0 if scaled else 1.0
        factors = scale, 3.0 if scaled and self.target is not self.sae_in else scale
        with self.blamed("while its release is made"):
            unscaled, released = self._release(whole, 0, self.cfg.d_sae, factors)
            trained = unscaled.encode(self.sae_in)
            difference = _difference(released.encode(self.sae_in), trained)
            # A class whose released rule is another, as BatchTopK's, which is a threshold, means it to be.
            meant = _difference(unscaled.encode_as_released(self.sae_in), trained) > ROUNDED
        with self.blamed("while its release is made by blocks of latents"):
            self._check_blocks(whole, factors, unscaled.inference_state_dict())
        if difference > ROUNDED and not meant:
            return (
                f"{self.architecture}: its release, of architecture {released.cfg.architecture()}, has other "
                f"activations than training, by {difference:.1e} of the largest; if that is not meant, register a "
                "released class of its own with register_sae_class"
            )
        return None

    def _block(self, whole: TrainingSAE, start: int, stop: int) -> TrainingSAE:
        """Latents ``start..stop`` as an SAE of their own."""
        cfg = copy.copy(self.cfg)
        cfg.d_sae = stop - start
        sae = registry.create(self.architecture, cfg, Shard())
        _copy_rows(sae, whole.tensors(), slice(start, stop))
        return sae

    def _release(
        self, whole: TrainingSAE, start: int, stop: int, factors: tuple[float, float]
    ) -> tuple[TrainingSAE, SAE]:
        """Latents ``start..stop`` for inputs without the ``factors`` of training, and as they are released."""
        sae = self._block(whole, start, stop)
        if factors != (1, 1):
            sae.fold_activation_norm_scaling_factor(*factors)
        cfg = {**self.cfg.get_inference_sae_cfg_dict(), "dtype": "float64", "d_sae": stop - start}
        try:
            return sae, build(cfg, sae.inference_state_dict(), "its release")
        except UserError as error:
            raise self.refusal(f"{error}; process_state_dict_for_saving_inference must leave what it has") from None

    def _check_blocks(self, whole: TrainingSAE, factors: tuple[float, float], state: Mapping[str, Tensor]) -> None:
        """As consolidation, which writes and compares by blocks, the smallest of one latent.

        Compared are all pre-activations, and reconstructions from the largest of them in each row.
        """
        scaled = self.sae_in * factors[0]
        pre = whole.encode_with_hidden_pre(scaled)[1]
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        chosen.scatter_(1, pre.topk(min(SELECTED, self.cfg.d_sae)).indices, True)
        wanted, got = [], []
        sums: list[Any] = [0.0, 0.0]
        cuts = sorted({min(cut, self.cfg.d_sae) for cut in (0, 1, 3, self.cfg.d_sae)})
        for start, stop in pairwise(cuts):
            unscaled, released = self._release(whole, start, stop, factors)
            self._check_state(unscaled.inference_state_dict(), state, start, stop)
            wanted.append(unscaled.encode_with_hidden_pre(self.sae_in)[1])
            got.append(released.pre_activations(self.sae_in))
            sides: Any = (self._block(whole, start, stop), scaled, pre[:, start:stop]), (released, self.sae_in, got[-1])
            for i, (part, rows, values) in enumerate(sides):
                part.process_sae_in(rows)  # decoding goes by these rows' statistics
                nothing = part.decode(torch.zeros_like(values))
                sums[i] = sums[i] + part.decode(values.relu() * chosen[:, start:stop]) - nothing
                if start == 0:
                    sums[i] = sums[i] + part.add_skip(nothing, rows)
        self._require_agreement("pre-activations", torch.cat(got, 1), torch.cat(wanted, 1))
        self._require_agreement("reconstructions", sums[1], sums[0] / factors[1])

    def _check_state(self, block: Mapping[str, Tensor], whole: Mapping[str, Tensor], start: int, stop: int) -> None:
        """Whether latents ``start..stop`` are released alike by themselves and among all."""
        for name, tensor in whole.items():
            part = block[name]
            axis = next((i for i in range(tensor.dim()) if part.shape[i] != tensor.shape[i]), None)
            wanted = tensor if axis is None else tensor.narrow(axis, start, stop - start)
            if _difference(part, wanted) > TOLERANCE:
                raise self.refusal(
                    f"{name} of the release is another where latents {start} to {stop - 1} are released by themselves; "
                    "what process_state_dict_for_saving_inference does to a latent must depend on no other latent"
                )

    def _require_agreement(self, what: str, released: Tensor, trained: Tensor) -> None:
        difference = _difference(released, trained) if released.shape == trained.shape else math.inf
        if difference > TOLERANCE:
            raise self.refusal(
                f"{what} of its release differ from those of training by {difference:.1e} of the largest, so that "
                "consolidate would refuse it; put it right in process_state_dict_for_saving_inference, in "
                "fold_activation_norm_scaling_factor or in the released class"
            )


# ---- tensors ---------------------------------------------------------------------------------------------------------


def _value(tensor: Tensor, axis: int | None, remedy: str = VALUES) -> _Value:
    return _Value(tensor.detach().cpu().double().clone(), axis, remedy)


def _state(sae: TrainingSAE, remedy: str) -> dict[str, _Value]:
    """All parameters and buffers as they are now."""
    return {
        name: _value(tensor, None if name in sae.replicated else 0, remedy) for name, tensor in sae.tensors().items()
    }


def _gradients(sae: TrainingSAE) -> dict[str, _Value]:
    """Those of latents' rows first: where they are right, a replicated parameter is to blame for its own."""
    found = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in sae.named_parameters()
    }
    rows = {name: _value(grad, 0) for name, grad in found.items() if name not in sae.replicated}
    whole = {name: _value(grad, None, REPLICATED) for name, grad in found.items() if name in sae.replicated}
    return {f"the gradient of {name}": value for name, value in {**rows, **whole}.items()}


@torch.no_grad()
def _copy_rows(sae: TrainingSAE, tensors: Mapping[str, Tensor], rows: slice) -> None:
    """Gives an SAE its rows of a whole one's tensors."""
    for name, tensor in sae.tensors().items():
        tensor.copy_(tensors[name] if name in sae.replicated else tensors[name][rows])


def _shape(value: Any) -> str:
    return f"has shape {list(value.shape)}" if isinstance(value, Tensor) else f"is a {type(value).__name__}"


def _difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference of two tensors of one shape, as a share of the largest entry of ``wanted``."""
    if not wanted.numel():
        return 0.0
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    differences = (got - wanted).abs().masked_fill(same, 0)
    return (differences.max() / wanted.abs().max().clamp(min=SMALLEST)).nan_to_num(math.inf).item()

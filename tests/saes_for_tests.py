"""Training steps of every architecture with given weights, on any number of shards and in SAELens.

A step comes as a dict of whole tensors, per-latent ones with the latent first, under the same names from both.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from harness import run_ranks
from scale_sae.collectives import Ranks, Shard
from scale_sae.saes import TrainCoefficientConfig, TrainingSAE, TrainStepInput, create, training_config

D_IN, D_OUT, D_SAE, K, BATCH = 16, 12, 64, 6, 32
K_AUX = D_IN // 2
TRAINED = ("standard", "gated", "jumprelu", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
# Each transcoder, and the architecture that it is one of.
TRANSCODERS = {
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "batchtopk_transcoder": "batchtopk",
    "batchtopk_skip_transcoder": "batchtopk",
}
# A bandwidth in which many pre-activations lie; a k that is no integer; a width that ends one of four shards, one that
# does not, and d_sae left out.
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {"l1_coefficient": 0.7},
    "gated": {"l1_coefficient": 0.7},
    "jumprelu": {"l0_coefficient": 0.3, "jumprelu_bandwidth": 0.4, "pre_act_loss_coefficient": 0.2},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": 5.3},
    "matryoshka_batchtopk": {"k": 5.3, "matryoshka_widths": [16, 37]},
}
Step = dict[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Case:
    """One training step: ``options`` on top of ``OPTIONS``, how many latents are dead, the number of the step."""

    architecture: str
    options: dict[str, Any] = field(default_factory=dict)
    n_dead: int = 0
    step: int = 0

    @property
    def kind(self) -> str:
        return TRANSCODERS.get(self.architecture, self.architecture)

    @property
    def d_out(self) -> int:
        return D_OUT if self.architecture in TRANSCODERS else D_IN

    @property
    def dtypes(self) -> list[torch.dtype]:
        """What to compare it in. Options differ in the formula, which shows best in float64."""
        return [torch.float64] if self.options else [torch.float64, torch.float32]

    def all_options(self, dtype: torch.dtype) -> dict[str, Any]:
        width = {"d_out": D_OUT} if self.architecture in TRANSCODERS else {}
        given = {"d_sae": D_SAE, "dtype": str(dtype).removeprefix("torch."), **width}
        return copy.deepcopy(given | OPTIONS[self.kind] | self.options)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter that an architecture may have: biases, decoder rows of norm 0.4 to 2, thresholds 0 to 1.2."""
    directions = F.normalize(draw(0, D_SAE, D_IN))
    written = F.normalize(directions[:, : case.d_out])
    tensors = {
        "W_enc_rows": directions + 0.2 * draw(1, D_SAE, D_IN),
        "W_dec": written * torch.linspace(0.4, 2, D_SAE, dtype=torch.float64).roll(29)[:, None],
        "b_enc": 0.1 * draw(2, D_SAE),
        "b_dec": 0.3 * draw(3, case.d_out),
        "b_gate": 0.3 * draw(4, D_SAE),
        "b_mag": 0.3 * draw(5, D_SAE),
        "r_mag": 0.2 * draw(6, D_SAE),
        "threshold": torch.linspace(-0.1, 1.2, D_SAE, dtype=torch.float64).roll(11),  # a step lifts the first ones to 0
        "W_skip": 0.2 * draw(7, case.d_out, D_IN),
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def inputs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of different norms, with a mean of their own."""
    rows = torch.linspace(0.5, 1.5, BATCH, dtype=torch.float64)[:, None] * draw(8, BATCH, D_IN)
    return (rows + 0.3 * draw(11, BATCH, 1)).to(dtype)


def targets(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    return draw(9, BATCH, D_OUT).to(dtype) if case.architecture in TRANSCODERS else inputs(dtype)


def dead_mask(n_dead: int) -> Tensor:
    """n_dead latents of the first three quarters: with tp=4 the last shard has none, with few the first has all."""
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    among = 16 if n_dead <= 16 else 48
    mask[torch.randperm(among, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    return mask


def gradients(of: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name; zeros where there is none."""
    found = torch.autograd.grad(of, list(parameters.values()), retain_graph=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def probe(acts: Tensor, hidden_pre: Tensor, rows: slice = slice(None)) -> Tensor:
    """A number that depends on every activation and pre-activation, each by a weight of its own."""
    by_act, by_pre = draw(10, 2, BATCH, D_SAE).to(acts.dtype)[:, :, rows]
    return (by_act * acts).sum() + (by_pre * hidden_pre).sum()


# ---- on shards ------------------------------------------------------------------------------------------------------


def on_shards(tp: int, fn: Callable[[Shard], Result]) -> list[Result]:
    """``fn`` of each of tp shards, in their order."""
    return [fn(Shard())] if tp == 1 else run_ranks(tp, lambda rank, world: fn(Shard(rank, world)))


def shard_in_grid(rank: int, dp: int, tp: int) -> Shard:
    """The place of a rank in a (dp, tp) grid of the whole world, row-major as in a run; makes the groups."""
    rows = [dist.new_group([p * tp + t for t in range(tp)]) for p in range(dp)]
    columns = [dist.new_group([p * tp + t for p in range(dp)]) for t in range(tp)]
    p, t = divmod(rank, tp)
    return Shard(t, tp, rows[p], dp=Ranks(p, dp, columns[t]))


def build(case: Case, shard: Shard, dtype: torch.dtype = torch.float64, sae_class: Any = None) -> TrainingSAE:
    """This shard's part of the SAE, as one of ``sae_class`` if it is given."""
    cfg = training_config(case.architecture, D_IN, case.all_options(dtype), "saes.0")
    sae = sae_class(cfg, shard) if sae_class else create(case.architecture, cfg, shard)
    whole = weights(case, dtype)
    for name, parameter in sae.named_parameters():
        parameter.data.copy_(whole[name] if name in sae.replicated else whole[name][sae.rows])
    return sae


def step_input(sae: TrainingSAE, case: Case, x: Tensor, target: Tensor | None = None) -> TrainStepInput:
    coefficients = {}
    for name, coefficient in sae.get_coefficients().items():
        assert isinstance(coefficient, TrainCoefficientConfig)
        coefficients[name] = coefficient.at(case.step)
    return TrainStepInput(
        sae_in=x,
        target=x if target is None else target,
        coefficients=coefficients,
        dead_neuron_mask=dead_mask(case.n_dead)[sae.rows],
        num_dead=case.n_dead,
        n_training_steps=case.step,
        is_logging_step=False,
    )


def local_step(sae: TrainingSAE, case: Case) -> tuple[Step, Step]:
    """One step on this shard: what is of its latents, and what must be the same on all shards."""
    out = sae.training_forward_pass(step_input(sae, case, inputs(sae.dtype), targets(case, sae.dtype)))
    parameters = dict(sae.named_parameters())
    grads = gradients(out.loss, parameters)
    acts_grads = gradients(probe(out.feature_acts, out.hidden_pre, sae.rows), parameters)
    local = {"acts": out.feature_acts.T, "hidden_pre": out.hidden_pre.T, "fire_counts": out.fire_counts}
    same = {"loss": out.loss, "sae_out": out.sae_out, **out.losses}
    same["active_latents"] = sae.shard.all_reduce(out.active_latents)
    for name, parameter in parameters.items():
        place = same if name in sae.replicated else local
        place |= {f"grad {name}": grads[name], f"acts' grad {name}": acts_grads[name], name: parameter}
    return detached(local), detached(same)


def detached(tensors: Step) -> Step:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def join(parts: list[tuple[Step, Step]]) -> Step:
    """The whole step from its shards' parts; what must be the same is checked to be, bit for bit."""
    for name, tensor in parts[0][1].items():
        assert all(torch.equal(same[name], tensor) for _, same in parts), name
    return parts[0][1] | {name: torch.cat([local[name] for local, _ in parts]) for name in parts[0][0]}


def sharded_steps(tp: int, makers: list[Callable[[Shard], tuple[Step, Step]]]) -> list[Step]:
    """Several steps in one go, since every group of processes takes its time to start."""
    by_rank = on_shards(tp, lambda shard: [make(shard) for make in makers])
    return [join(list(parts)) for parts in zip(*by_rank, strict=True)]


def our_step(case: Case, dtype: torch.dtype) -> Callable[[Shard], tuple[Step, Step]]:
    return lambda shard: local_step(build(case, shard, dtype), case)


# ---- in SAELens -----------------------------------------------------------------------------------------------------


def saelens_start(case: Case, dtype: torch.dtype) -> Any:
    """SAELens's SAE of the case as it makes it."""
    from sae_lens.registry import get_sae_training_class

    made, config_class = get_sae_training_class(case.architecture)
    return made(config_class(d_in=D_IN, **case.all_options(dtype)))


def saelens_sae(case: Case, dtype: torch.dtype) -> Any:
    """The same with ``weights``. Its thresholds too are in ``dtype``: SAELens keeps them in float32."""
    sae = saelens_start(case, dtype)
    whole = weights(case, dtype)
    whole["W_enc"] = whole["W_enc_rows"].T.contiguous()
    for name in dict(sae.named_parameters()):
        setattr(sae, name, torch.nn.Parameter(whole[name]))
    return sae


def saelens_step(case: Case, dtype: torch.dtype) -> Step:
    from sae_lens.saes.sae import TrainStepInput as SAELensInput
    from sae_lens.training.optim import CoefficientScheduler

    sae, x = saelens_sae(case, dtype), inputs(dtype)
    schedulers = {
        name: CoefficientScheduler(coefficient.warm_up_steps, coefficient.value)
        for name, coefficient in sae.get_coefficients().items()
    }
    for _ in range(case.step):
        for scheduler in schedulers.values():
            scheduler.step()
    out = sae.training_forward_pass(
        SAELensInput(
            sae_in=x,
            coefficients={name: scheduler.current_value for name, scheduler in schedulers.items()},
            dead_neuron_mask=dead_mask(case.n_dead),
            n_training_steps=case.step,
            is_logging_step=False,
        )
    )
    parameters = {name: p for name, p in sae.named_parameters() if name != "W_enc"}
    found = whole_step(
        out.loss, out.losses, out.sae_out, out.feature_acts, out.hidden_pre, parameters | {"W_enc": sae.W_enc}
    )
    return {name.replace("W_enc", "W_enc_rows"): x.T if "W_enc" in name else x for name, x in found.items()}


def whole_step(
    loss: Tensor, losses: Step, sae_out: Tensor, acts: Tensor, hidden_pre: Tensor, parameters: dict[str, Tensor]
) -> Step:
    """What ``local_step`` and ``join`` give, of an SAE in one piece."""
    grads, acts_grads = gradients(loss, parameters), gradients(probe(acts, hidden_pre), parameters)
    found = {"loss": loss, "sae_out": sae_out, **losses, "acts": acts.T, "hidden_pre": hidden_pre.T}
    found |= {"fire_counts": (acts != 0).sum(0), "active_latents": (acts != 0).sum(), **parameters}
    found |= {f"grad {name}": grad for name, grad in grads.items()}
    found |= {f"acts' grad {name}": grad for name, grad in acts_grads.items()}
    return detached(found)


def differences(actual: Step, expected: Step) -> dict[str, float]:
    """The largest difference of each tensor, of the largest entry of the expected one; inf for unequal integers."""
    assert actual.keys() == expected.keys()
    found = {}
    for name, tensor in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (tensor.shape, tensor.dtype), name
        difference, largest = (actual[name] - tensor).abs().max().item(), tensor.abs().max().item()
        if difference == 0:
            found[name] = 0.0
        else:
            found[name] = difference / largest if tensor.is_floating_point() and largest else float("inf")
    return found


def assert_close(actual: Step, expected: Step, tolerance: float, what: object = "") -> dict[str, float]:
    """``differences``, none of them above ``tolerance``."""
    found = differences(actual, expected)
    wrong = {name: f"{value:.1e}" for name, value in found.items() if not value <= tolerance}
    assert not wrong, f"{what}: {wrong}"
    return found

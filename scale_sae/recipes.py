"""Recipes: the values of training keys and options that a config leaves out, by architecture and size of the run.

`default` is measured (``benchmarks/results/quality.md``), `saelens` has SAELens's values. They fill in configs alone:
the classes of the library, and the dataclass fields of `config_schema`, keep SAELens's defaults.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

from scale_sae.config_schema import RunConfig, SAEEntry, TrainConfig
from scale_sae.saes import (
    BatchTopKTrainingSAE,
    GatedTrainingSAE,
    JumpReLUTrainingSAE,
    StandardTrainingSAE,
    TopKTrainingSAE,
    TrainingSAE,
    TrainingSAEConfig,
    registry,
)

Values = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What the values of a recipe depend on.

    Attributes:
        d_sae: latents of the SAE.
        k: its active latents per row; None for architectures without k.
        tokens: rows of the whole run.
        batch: rows of a step.
    """

    d_sae: int
    k: float | None
    tokens: int
    batch: int

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.tokens // self.batch


def _schedule_and_adam(run: Run) -> Values:
    """What all architectures share."""
    return {
        # By the width of the hookpoint: `learning_rate`.
        "lr": None,
        # A twentieth of the run, as Conerly et al. (Anthropic, April 2024) have it for their penalty. FVU 0.0427 with
        # it, 0.0435 without.
        "lr_warm_up_steps": run.steps // 20,
        # To zero over the last fifth: theirs, and dictionary_learning's. FVU 0.0427 with it, 0.0487 without.
        "lr_decay_steps": run.steps // 5,
        # These are torch's, and SAELens's.
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
    }


def _top_k_family(run: Run) -> Values:
    """TopK, AbsTopK, BatchTopK, Matryoshka. Measured: ``benchmarks/LOG.md``, 2026-11-22, recipes."""
    assert run.k is not None
    return {
        **_schedule_and_adam(run),
        # FVU 0.0427 and no silent latents; from zeros 0.0437 and 0.6 %.
        "b_dec_init": "mean",
        # To norm √d_in, so that one learning rate fits all layers and models. FVU 0.0427; 0.0432 as they come.
        "normalize_activations": "expected_average_only_in",
        # SAELens's. Adam does not see the coefficient where a latent has no other gradient.
        "aux_loss_coefficient": 1.0,
        # In which a latent that fires as often as the others do does so 150 times; at least 10 steps. So AuxK begins at
        # once: no latent is given up, at a rate at which a sixth of them would be, and FVU is the same.
        "dead_feature_window_tokens": max(math.ceil(150 * run.d_sae / run.k), 10 * run.batch),
    }


def _top_k(run: Run) -> Values:
    """TopK, AbsTopK."""
    assert run.k is not None
    return {
        **_top_k_family(run),
        # At which the first reconstructions are about as large as the inputs. At 0.1 they are far too small: what fires
        # grows, and the others never fire again. Of 32768 latents at d_in 256, 97 % have not fired in the last 50 of
        # 300 steps; at 0.5 51 %, at 0.75 0.4 %.
        "decoder_init_norm": 0.8,
        # Fewer than d_in / 2, so that each has more of the residual to learn. Of 8192 latents 7 % are silent, not 18 %,
        # for 1 % of FVU; with 2048 it makes no difference.
        "k_aux": math.ceil(run.k),
        # A latent that has long not fired is moved by up to lr / √(1 − β2) when it does. FVU 0.0414; 0.0431 with 0.999.
        "adam_beta2": 0.99,
    }


def _batch_top_k(run: Run) -> Values:
    """BatchTopK, Matryoshka. With beta2 0.99 seven times as many latents are silent, for 2 % of FVU."""
    return {
        **_top_k_family(run),
        # No norm fits: at 0.8 a few rows take most of the firings, and are reconstructed far too large. At 0.1 many
        # latents die, and AuxK brings them back. FVU with 2048 latents 0.0367, at 0.4 0.0370, at 0.7 0.0379; with 8192
        # 0.0339, at 0.45 0.0357.
        "decoder_init_norm": 0.1,
        # d_in / 2, as Gao et al. 2024 have it, appendix B.1. With k fewer come back: 35 % of 8192 silent, not 25 %.
        "k_aux": None,
    }


def _penalised(run: Run) -> Values:
    """Standard, gated, JumpReLU: their sparsity comes from a loss, of which latents die at a high rate."""
    return {
        **_schedule_and_adam(run),
        # SAELens's.
        "decoder_init_norm": 0.1,
        "b_dec_init": "mean",
        "normalize_activations": "expected_average_only_in",
        # SAELens's; AuxK is TopK's alone, so it is only counted.
        "dead_feature_window_tokens": 1000 * run.batch,
    }


def _l1(run: Run) -> Values:
    """Standard and gated."""
    # The coefficient gives L0 30 (standard, width 256, 2048 latents); 5, Conerly et al.'s, 15. Its rise is theirs.
    return {**_penalised(run), "l1_coefficient": 2.0, "l1_warm_up_steps": run.steps // 20}


def _jumprelu(run: Run) -> Values:
    return {**_penalised(run), "l0_warm_up_steps": run.steps // 20}


def _unknown(run: Run) -> Values:
    """A class of one's own that derives from none of the others: nothing is known of its options."""
    return {**_schedule_and_adam(run), "dead_feature_window_tokens": 1000 * run.batch}


# The nearest of these among a class's bases decides: a transcoder has the values of its kind, and so has a class of
# one's own that derives from one of them.
_DEFAULT: dict[type[TrainingSAE], Callable[[Run], Values]] = {
    TopKTrainingSAE: _top_k,
    BatchTopKTrainingSAE: _batch_top_k,
    StandardTrainingSAE: _l1,
    GatedTrainingSAE: _l1,
    JumpReLUTrainingSAE: _jumprelu,
}


def _base(sae_class: type[TrainingSAE]) -> type[TrainingSAE] | None:
    return next((base for base in sae_class.__mro__ if base in _DEFAULT), None)


def learning_rate(architecture: str, d_in: int, d_sae: int) -> float:
    """The peak learning rate by the default recipe, to two digits.

    c · (2048 / d_sae)^¼ / √d_in. Of 2000 steps on activations of norm √d_in, the best for TopK are 2.5e-3 to 4e-3 at
    d_in 256 with 2048 latents, 2e-3 there with 8192 latents, 2e-3 at d_in 576 with 2048 latents; c is at the lower end,
    where no latents fall silent. Gao et al. 2024 (arXiv 2406.04093) find the root of d_sae in long runs of wide models;
    at d_in 4096 with 131072 latents this gives 2.2e-4. Of 8000 steps BatchTopK does as well at half of it, and half as
    many latents are silent; of 2000 it does worse.

    Args:
        architecture: name in the registry, or ``module:Class``.
        d_in: width of the input.
        d_sae: latents over all shards.
    """
    base = _base(registry.lookup(architecture, "architecture")[0])
    if base is None:
        return 4e-4
    # At three times 0.016 half of JumpReLU's latents are silent.
    scale = 0.04 if issubclass(base, TopKTrainingSAE) else 0.016
    return float(f"{scale * (2048 / d_sae) ** 0.25 / math.sqrt(d_in):.2g}")


def _saelens(run: Run) -> Values:
    """SAELens 6.54's `LanguageModelSAERunnerConfig`; of the options, the config classes have its defaults."""
    return {
        "lr": 3e-4,
        "lr_end": None,
        "lr_scheduler_name": "constant",
        "n_restart_cycles": 1,
        "lr_warm_up_steps": 0,
        "lr_decay_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,  # torch's
        "max_grad_norm": 1.0,
        "dead_feature_window_tokens": 1000 * run.batch,  # there in steps
        "feature_sampling_window": 2000,
    }


_EXAMPLE = Run(d_sae=2048, k=32, tokens=2_000_000, batch=2048)
# The keys of `train`, and the options, that some recipe gives.
_KEYS = frozenset(key for values in (*_DEFAULT.values(), _unknown, _saelens) for key in values(_EXAMPLE))
TRAIN_KEYS = _KEYS & {field.name for field in fields(TrainConfig)}
OPTIONS = _KEYS - TRAIN_KEYS


def fill(config: RunConfig, given: Collection[str]) -> RunConfig:
    """``config`` with what its recipes give put into the entries of ``saes``, where nothing else gives it.

    Args:
        config: with positive tokens, batch and widths.
        given: the keys that the `train` section of the file holds; what it says of them goes for all entries.

    Raises:
        UserError: an architecture that is unknown or whose class cannot be imported.
    """
    entries = [_fill_entry(config, entry, f"saes.{index}", given) for index, entry in enumerate(config.saes)]
    return replace(config, saes=tuple(entries))


def _fill_entry(config: RunConfig, entry: SAEEntry, key: str, given: Collection[str]) -> SAEEntry:
    sae_class, config_class = registry.lookup(entry.architecture, f"{key}.architecture")
    defaults = _defaults(config_class)
    k = entry.options.get("k", defaults.get("k"))
    run = Run(entry.d_sae, k, config.train.training_tokens, config.train.train_batch_size_tokens)
    if (entry.recipe or config.recipe) == "saelens":
        values = _saelens(run) | {name: defaults[name] for name in OPTIONS & defaults.keys()}
    else:
        base = _base(sae_class)
        values = _DEFAULT[base](run) if base else _unknown(run)
        # A class of one's own that has another default than the class it derives from has chosen it.
        theirs = _defaults(registry.config_class_of(base)) if base else {}
        own = {name for name in OPTIONS & values.keys() if name not in defaults or defaults[name] != theirs[name]}
        values = {name: value for name, value in values.items() if name not in own}
    train = {name: values[name] for name in TRAIN_KEYS & values.keys() - entry.train.keys() - set(given)}
    _shorten(train, replace(config.train, **entry.train), run.steps)
    options = {name: values[name] for name in OPTIONS & values.keys() - entry.options.keys()}
    return replace(entry, train=entry.train | _sorted(train), options=entry.options | _sorted(options))


def _defaults(config_class: type[TrainingSAEConfig]) -> Values:
    """The options that may be left out, with what they then are."""
    return {field.name: field.default for field in fields(config_class)}


def _sorted(values: Values) -> Values:
    return dict(sorted(values.items()))


def _shorten(filled: Values, chosen: TrainConfig, steps: int) -> None:
    """Lets warm-up and decay that are filled in fit beside one that was chosen, in place."""
    if "lr_warm_up_steps" in filled and "lr_decay_steps" not in filled:
        filled["lr_warm_up_steps"] = max(0, min(filled["lr_warm_up_steps"], steps - chosen.lr_decay_steps))
    if "lr_decay_steps" in filled and "lr_warm_up_steps" not in filled:
        filled["lr_decay_steps"] = max(0, min(filled["lr_decay_steps"], steps - chosen.lr_warm_up_steps))

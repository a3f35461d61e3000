"""The options of every SAE in training, and how a loss coefficient rises. Names and defaults are SAELens's."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, NamedTuple, TypeVar

from scale_sae.errors import UserError
from scale_sae.saes.inference import SAEConfig, released_architectures, sae_class

Config = TypeVar("Config", bound="TrainingSAEConfig")


class TrainCoefficientConfig(NamedTuple):
    """A loss coefficient that rises linearly from 0, at step 0, to ``value`` in ``warm_up_steps`` steps."""

    value: float
    warm_up_steps: int

    def at(self, step: int) -> float:
        """The value at a step, from 0."""
        return self.value * min(1.0, step / self.warm_up_steps) if self.warm_up_steps > 0 else self.value


@dataclass(kw_only=True)
class TrainingSAEConfig(ABC):
    """Options of every architecture; names and defaults are SAELens's, but for ``b_dec_init``, which it has not."""

    d_in: int  # width of the activations
    d_sae: int  # latents, over all shards
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"  # of the parameters
    apply_b_dec_to_input: bool = True  # subtract b_dec before the encoder
    normalize_activations: Literal["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"] = "none"
    reshape_activations: Literal["none"] = "none"
    decoder_init_norm: float | None = 0.1  # norm of each decoder row at the start; null: as drawn
    b_dec_init: Literal["zeros", "mean"] = "zeros"  # b_dec at the start; mean: that of the first targets

    @classmethod
    @abstractmethod
    def architecture(cls) -> str:
        """The name that a config file gives this architecture."""

    def problems(self) -> dict[str, str]:
        """What is wrong with the values: field → what it must be. Types are checked before."""
        found = {}
        if self.d_sae <= 0:
            found["d_sae"] = "must be at least 1"
        if self.decoder_init_norm is not None and not self.decoder_init_norm > 0:
            found["decoder_init_norm"] = "must be more than 0, or null to keep the norms as drawn"
        return found

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``architecture``: what ``from_dict`` and ``TrainingSAE.from_dict`` read."""
        return asdict(self) | {"architecture": self.architecture()}

    @classmethod
    def from_dict(cls: type[Config], config_dict: Mapping[str, Any]) -> Config:
        """The config of a ``to_dict``. Keys that are no field of this class are ignored, as in SAELens."""
        known = {f.name: f for f in fields(cls)}
        for name, f in known.items():
            if name not in config_dict and f.default is MISSING and f.default_factory is MISSING:
                raise UserError(f"{name}: missing; {cls.architecture()} needs it")
        return cls(**{name: value for name, value in config_dict.items() if name in known})

    def get_inference_config_class(self) -> type[SAEConfig]:
        """The config class of the released SAE: that of the same name, or of the name of the class derived from."""
        for cls in type(self).__mro__:
            if issubclass(cls, TrainingSAEConfig) and cls.architecture() in released_architectures():
                return sae_class(cls.architecture())[1]
        raise UserError(
            f"architecture {self.architecture()}: has no released form; register one of that name with "
            "register_sae_class, or let get_inference_config_class name one"
        )

    def get_inference_sae_cfg_dict(self) -> dict[str, Any]:
        """The released cfg.json without its metadata: the released config's fields, with the values they have here."""
        released = self.get_inference_config_class()
        names = {f.name for f in fields(released)} & {f.name for f in fields(self)}
        cfg = {name: getattr(self, name) for name in sorted(names)}
        if self.normalize_activations == "expected_average_only_in":
            cfg["normalize_activations"] = "none"  # its factor is folded into the weights
        return {"architecture": released.architecture(), "device": "cpu", **cfg}

"""Released SAEs in SAELens's format: their configs, what every one can do, and how a folder becomes one.

Each is whole and on one device. The architectures are in ``released``; a class of one's own joins them with
``register_sae_class``. Names and signatures are SAELens's.
"""

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scale_sae.errors import UserError, nearest
from scale_sae.kernels.codes import Codes
from scale_sae.saes.norms import RUNTIME_NORMS, row_norm
from scale_sae.tensorfile import save

CFG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
SAELENS_VERSION = "6.54.12"  # whose format releases have; SAELens's loaders ask
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
RELEASED_NORMS = ("none", "expected_average_only_in", *RUNTIME_NORMS)
_ENCODE_ELEMENTS = 2**26  # dense activations that encode_codes holds at once: 256 MiB in float32
Config = TypeVar("Config", bound="SAEConfig")


@dataclass(kw_only=True)
class SAEConfig(ABC):
    """What every cfg.json says.

    Attributes:
        d_in: width of the activations.
        d_sae: latents.
        dtype: of the parameters; a name of ``DTYPES``.
        device: of the parameters.
        apply_b_dec_to_input: subtract b_dec before the encoder.
        normalize_activations: one of ``RELEASED_NORMS``.
        reshape_activations: ``hook_z`` where activations come as ``[..., n_heads, d_head]``, else ``none``.
        metadata: where the SAE comes from and how to use it.
    """

    d_in: int
    d_sae: int
    dtype: str = "float32"
    device: str = "cpu"
    apply_b_dec_to_input: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """UserError for a value that cannot be worked with."""
        for name in ("d_in", "d_sae"):
            check_positive_integer(name, getattr(self, name))
        as_dtype(self.dtype)
        for f in fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                raise UserError(f"{f.name}: {getattr(self, f.name)!r} must be true or false")
        if not isinstance(self.metadata, dict):
            raise UserError(f"metadata: {self.metadata!r} must be an object")
        for name, allowed in (
            ("normalize_activations", RELEASED_NORMS),
            ("reshape_activations", ("none", "hook_z")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}: {getattr(self, name)!r} is not supported; it must be {' or '.join(allowed)}")

    @classmethod
    @abstractmethod
    def architecture(cls) -> str:
        """The name that cfg.json gives this architecture."""

    @classmethod
    def from_dict(cls: type[Config], config_dict: Mapping[str, Any]) -> Config:
        """The config of a cfg.json. Fields that this class does not have are ignored, as in SAELens."""
        known = {f.name: f for f in fields(cls)}
        for name, f in known.items():
            if name not in config_dict and f.default is MISSING and f.default_factory is MISSING:
                raise UserError(f"{name}: missing; an SAE of architecture {cls.architecture()} needs it")
        return cls(**{name: value for name, value in config_dict.items() if name in known})

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``architecture``."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"architecture": self.architecture()}


class SAE(nn.Module, ABC):
    """A released SAE, without gradients for its parameters.

    A class of one's own overrides ``get_activation_fn``, or ``initialize_weights`` and ``encode``.

    Attributes:
        cfg: its config, of the architecture's own class.
        W_enc: ``[d_in, d_sae]``.
        W_dec: ``[d_sae, d_out]``; d_out is d_in but for transcoders.
        b_enc: ``[d_sae]``, in the architectures that have one.
        b_dec: ``[d_out]``.
        activation_fn: what ``get_activation_fn`` gave.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    b_enc: nn.Parameter
    b_dec: nn.Parameter
    activation_fn: Callable[[Tensor], Tensor]

    def __init__(self, cfg: Any):
        """All parameters are 0, on the config's device and in its dtype."""
        super().__init__()
        self.cfg = cfg
        self.norm = row_norm(cfg.normalize_activations)
        self._d_head: int | None = None  # of the last input, where its heads were apart
        self.activation_fn = self.get_activation_fn()
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Makes the parameters; a subclass with more of them calls this first."""
        self.W_enc = self.zeros(self.cfg.d_in, self.cfg.d_sae)
        self.W_dec = self.zeros(self.cfg.d_sae, self.d_out)
        self.b_dec = self.zeros(self.d_out)

    def zeros(self, *shape: int) -> nn.Parameter:
        """A parameter of zeros, on the config's device and in its dtype."""
        dtype = as_dtype(self.cfg.dtype)
        return nn.Parameter(torch.zeros(shape, dtype=dtype, device=self.cfg.device), requires_grad=False)

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Maps pre-activations to feature activations; ReLU unless overridden."""
        return nn.ReLU()

    @property
    def d_out(self) -> int:
        """Width of the reconstruction."""
        return self.cfg.d_in

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights, in which the SAE computes."""
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        """That of the weights."""
        return self.W_dec.device

    @staticmethod
    def load_from_disk(
        folder: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
    ) -> "SAE":
        """The SAE of a folder with ``cfg.json`` and ``sae_weights.safetensors``; no other file is read.

        Args:
            folder: the folder of one SAE of a release.
            device: where the SAE goes.
            dtype: what its tensors are cast to; None: the dtype of its cfg.json. Thresholds stay at least float32.

        Raises:
            UserError: a file is missing or unreadable; an architecture, value or tensor is not what it can be.
        """
        folder = Path(folder)
        cfg = read_cfg(folder)
        try:
            dtype = as_dtype(cfg.get("dtype", "float32") if dtype is None else dtype)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from None
        return build(cfg, _read_tensors(folder / WEIGHTS_FILE, device, dtype), str(folder))

    def save_model(self, folder: Path | str) -> tuple[Path, Path]:
        """Writes the SAE as a folder that ``load_from_disk`` and SAELens read; the folder is made if it is not there.

        Returns:
            The paths of ``sae_weights.safetensors`` and ``cfg.json``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / WEIGHTS_FILE, self.state_dict())
        cfg = self.cfg.to_dict() | {"device": "cpu"}
        cfg["metadata"] = {"sae_lens_version": SAELENS_VERSION} | cfg["metadata"]
        (folder / CFG_FILE).write_text(json.dumps(cfg, indent=1) + "\n")
        return folder / WEIGHTS_FILE, folder / CFG_FILE

    # What a script calls on the SAE that a runner has trained, whose class in SAELens is another.
    save_inference_model = save_model

    @staticmethod
    def from_pretrained(
        release: str,
        sae_id: str | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | str | None = None,
        revision: str | None = None,
        force_download: bool = False,
    ) -> "SAE":
        """An SAE of a release on disk, on the Hugging Face hub or in SAELens's list: see ``load_pretrained``."""
        from scale_sae.saes.pretrained import load_pretrained  # which needs this module

        return load_pretrained(release, sae_id, device, dtype, revision, force_download)

    def process_sae_in(self, x: Tensor) -> Tensor:
        """What the encoder sees of ``x``, ``[..., d_in]`` in the SAE's dtype.

        ``x`` is ``[..., d_in]``, or with ``hook_z`` also ``[..., n_heads, d_head]``. The statistics of its rows and its
        d_head are kept for ``decode``.
        """
        x = x.to(self.dtype)
        self._d_head = x.shape[-1] if self._heads_apart(x) else None
        if self._d_head is not None:
            x = x.flatten(-2)
        x = self.norm.normalize(x)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """``[..., d_in]`` to ``[..., d_sae]``, in the SAE's dtype."""
        return F.linear(self.process_sae_in(x), self.W_enc.T, self.b_enc)

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Feature activations ``[..., d_sae]`` of ``[..., d_in]``."""

    @torch.no_grad()
    def encode_codes(self, x: Tensor) -> Codes:
        """The entries of ``encode`` that are not 0, in blocks of rows: never all d_sae of all rows at once.

        ``x`` is ``[..., d_in]`` (or as for ``process_sae_in``); the codes have one row for each of its rows.
        """
        width = 2 if self._heads_apart(x) else 1
        x = x.reshape(-1, *x.shape[-width:])
        found, first = [], 0
        for block in x.split(max(1, _ENCODE_ELEMENTS // self.cfg.d_sae)):
            acts = self.encode(block)
            rows, latents = acts.nonzero(as_tuple=True)
            found.append((rows + first, latents, acts[rows, latents]))
            first += len(block)
        self.process_sae_in(x)  # decode needs the statistics of all rows, not of the last block
        rows, latents, values = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Codes(rows, latents, values, len(x), self.cfg.d_sae)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction ``[..., d_in]`` from ``[..., d_sae]``.

        Normalisation and reshaping are undone with what the last ``encode`` met, so its rows must be these.
        """
        x_hat = self.norm.restore(feature_acts @ self.W_dec + self.b_dec)
        return x_hat if self._d_head is None else x_hat.unflatten(-1, (-1, self._d_head))

    def add_skip(self, sae_out: Tensor, x: Tensor) -> Tensor:
        """``sae_out`` with what goes past the latents from ``x``: nothing, but in transcoders with a skip."""
        return sae_out

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of ``[..., d_in]``."""
        return self.add_skip(self.decode(self.encode(x)), x)

    def _heads_apart(self, x: Tensor) -> bool:
        return self.cfg.reshape_activations == "hook_z" and x.shape[-1] != self.cfg.d_in


_CLASSES: dict[str, tuple[type[SAE], type[SAEConfig]]] = {}


def register_sae_class(architecture: str, sae_class: type[SAE], sae_config_class: type[SAEConfig]) -> None:
    """Make a class known by the name that cfg.json has. UserError where another class has the name."""
    if _CLASSES.get(architecture, (sae_class, sae_config_class)) != (sae_class, sae_config_class):
        raise UserError(f"architecture {architecture!r} is already registered; register the class under another name")
    _CLASSES[architecture] = sae_class, sae_config_class


def released_architectures() -> list[str]:
    """The names of the registered architectures."""
    return sorted(_CLASSES)


def sae_class(architecture: Any) -> tuple[type[SAE], type[SAEConfig]]:
    """The classes of a registered architecture; UserError for an unknown one."""
    if not isinstance(architecture, str) or architecture not in _CLASSES:
        known = ", ".join(released_architectures())
        raise UserError(
            f"unknown architecture {architecture!r}{nearest(str(architecture), _CLASSES)}; known are {known}; "
            "a class of your own must be registered with register_sae_class first"
        )
    return _CLASSES[architecture]


def build(cfg_dict: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> SAE:
    """An SAE that shares the memory of ``tensors``; its dtype and device are theirs.

    Args:
        cfg_dict: what a cfg.json holds, ``architecture`` included.
        tensors: all parameters and buffers of the architecture, by name; nothing is cast.
        where: the file or folder they come from, for messages.

    Raises:
        UserError: unknown architecture; a wrong value; a tensor that is missing, unknown or of a wrong shape.
    """
    try:
        made, config_class = sae_class(cfg_dict.get("architecture"))
        # On the meta device, so that no memory is taken for zeros that the tensors replace.
        sae = made(config_class.from_dict({**cfg_dict, "device": "meta"}))
        _check_tensors(sae, tensors)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    # Detached: a parameter of the caller's would otherwise lose its gradient.
    sae.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
    sae.requires_grad_(False)
    sae.cfg.device, sae.cfg.dtype = str(sae.device), str(sae.dtype).removeprefix("torch.")
    if sae.cfg.normalize_activations == "expected_average_only_in":
        warnings.warn(
            f"{where}: normalize_activations is expected_average_only_in, but its factor is not folded into the "
            "weights; activations are taken as they are, as SAELens does",
            stacklevel=2,
        )
    return sae


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype from its name, as ``float32`` or ``torch.float32``; UserError for another."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"dtype: {name!r} must be {' or '.join(DTYPES)}{nearest(name, DTYPES)}")
    return DTYPES[name]


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A released tensor in the SAE's dtype; a threshold in at least float32: rounded, it would fire other latents."""
    if name in ("threshold", "log_threshold"):
        dtype = torch.promote_types(dtype, torch.float32)
    return tensor.to(dtype)


def check_positive_integer(name: str, value: Any) -> None:
    """UserError unless the value is an integer of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: {value!r} must be an integer of at least 1")


def _check_tensors(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    expected = sae.state_dict()
    architecture = sae.cfg.architecture()
    if missing := sorted(expected.keys() - tensors.keys()):
        raise UserError(f"tensors {', '.join(missing)} are missing; {architecture} needs {', '.join(expected)}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise UserError(f"tensors {', '.join(unknown)} are unknown; {architecture} has {', '.join(expected)}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            found, wanted = list(tensors[name].shape), list(tensor.shape)
            raise UserError(f"tensor {name} has shape {found}, but by cfg.json {wanted}")


def read_cfg(folder: Path) -> dict[str, Any]:
    """The cfg.json of a release's folder, in today's form. UserError where there is none that can be read."""
    path = folder / CFG_FILE
    if not path.is_file():
        raise UserError(f"{folder}: holds no {CFG_FILE}; give the folder of one SAE of a release")
    try:
        cfg = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: is not JSON ({error}); get the file again") from None
    if not isinstance(cfg, dict):
        raise UserError(f"{path}: must hold an object with the SAE's fields, not {type(cfg).__name__}")
    if "architecture" in cfg and "metadata" in cfg:
        return cfg
    try:
        return _of_before_v6(cfg)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: is no cfg.json of an SAE ({error!r}); get the file again") from None


def _of_before_v6(cfg: dict[str, Any]) -> dict[str, Any]:
    """A flat cfg.json as SAELens wrote it before version 6, in today's form and with the defaults of its time."""
    cfg = dict(cfg)
    for old, new in (("hook_point", "hook_name"), ("activation_fn_str", "activation_fn")):
        if old in cfg:
            cfg[new] = cfg.pop(old)
    cfg.setdefault("architecture", "standard")
    if cfg.get("activation_fn") == "topk" and "k" in (cfg.get("activation_fn_kwargs") or {}):
        cfg |= {"architecture": "topk", "k": cfg["activation_fn_kwargs"]["k"]}
    normalize = cfg.get("normalize_activations") or "none"
    cfg["normalize_activations"] = "expected_average_only_in" if normalize is True else normalize
    in_heads = "hook_z" in (cfg.get("hook_name") or "")
    cfg.setdefault("reshape_activations", "hook_z" if in_heads else "none")
    about = {"model_name", "hook_name", "hook_head_index", "dataset_path", "context_size", "prepend_bos"}
    cfg.setdefault("metadata", {name: cfg[name] for name in sorted(about & cfg.keys())})
    return cfg


def _read_tensors(path: Path, device: torch.device | str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a weights file, cast, with those of old releases turned into today's."""
    if not path.is_file():
        raise UserError(f"{path.parent}: holds no {path.name}; give the folder of one SAE of a release")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: cast(name, file.get_tensor(name), dtype) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: is not a whole safetensors file ({error}); get the file again") from None
    if "log_threshold" in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors and not (tensors.pop("scaling_factor") == 1).all():
        raise UserError(f"{path}: holds a scaling_factor other than 1, which is not supported; fold it into W_dec")
    return tensors

"""The layouts that a release can have on disk: SAELens's, and those of sparsify and dictionary_learning.

A layout takes blocks of latents under SAELens's names, in float64, and gives them its own names, orientation and
biases. Where its library subtracts b_dec from the input and the SAE does not, or the other way round, the difference is
moved into the encoder's bias: ``(x - b_dec) W + b = x W + (b - b_dec W)``. Sources: sparsify 1.3.3
(``sparse_coder.py``) and dictionary_learning 0.1.0 (``dictionary.py``, ``trainers/``).
"""

import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from scale_sae.errors import UserError
from scale_sae.saes.inference import CFG_FILE, WEIGHTS_FILE
from scale_sae.saes.released import decoder_norms
from scale_sae.tensorfile import Reader, Writer

Shapes = Mapping[str, tuple[torch.dtype, Sequence[int]]]


class Layout(ABC):
    """How one SAE lies on disk.

    Attributes:
        weights: name of the file of weights.
        description: name of the JSON file beside it.
        cfg: fields of an SAE under SAELens's names that computes, with what ``restore`` gives, what readers compute.
    """

    weights: ClassVar[str]
    description: ClassVar[str]
    cfg: dict[str, Any]

    @abstractmethod
    def __init__(self, cfg: Mapping[str, Any], training: Any):
        """``cfg``: fields of the SAE's cfg.json in SAELens's format. UserError: the layout cannot express the SAE."""

    @abstractmethod
    def convert(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block of latents in SAELens's names, as this layout has it."""

    @abstractmethod
    def restore(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The reverse: SAELens's names for what was read; biases stay as they are."""

    @abstractmethod
    def describe(self, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """What the JSON file says."""

    def told(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """``cfg`` with what the JSON file, read back, says of it; that file names few of the fields."""
        return self.cfg

    def units(self, W_dec: Tensor) -> Tensor | float:
        """By what each latent's activation is larger than the trained one: factors ``[n]``, or one for all."""
        return 1.0

    def writer(self, path: Path, shapes: Shapes) -> "Writer | PtWriter":
        """The file of weights, to be filled in blocks."""
        return Writer(path, shapes)

    def reader(self, path: Path) -> "Reader | PtReader":
        """The file of weights, to be read in blocks."""
        return Reader(path)


class SAELens(Layout):
    """SAELens's format, in which every architecture here can be expressed."""

    weights = WEIGHTS_FILE
    description = CFG_FILE

    def __init__(self, cfg: Mapping[str, Any], training: Any):
        self.cfg = dict(cfg)

    def convert(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(block)

    def restore(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(block)

    def describe(self, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.cfg, "dtype": dtype, "metadata": dict(metadata)}

    def told(self, described: Mapping[str, Any]) -> dict[str, Any]:
        return dict(described)


class Sparsify(Layout):
    """sparsify's folder: TopK alone, b_dec subtracted from the input."""

    weights = "sae.safetensors"
    description = "cfg.json"
    names: ClassVar = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}

    def __init__(self, cfg: Mapping[str, Any], training: Any):
        require("sparsify", cfg, ("topk",))
        self.b_dec_in = cfg["apply_b_dec_to_input"]
        self.unit_norm = cfg["rescale_acts_by_decoder_norm"]
        self.cfg = {**cfg, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}

    def convert(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = move_b_dec(block, self.b_dec_in, True)
        return {name: transposed(moved[ours], ours) for name, ours in self.names.items()}

    def restore(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {ours: transposed(block[name], ours) for name, ours in self.names.items()}

    def describe(self, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "activation": "topk",
            "expansion_factor": max(1, self.cfg["d_sae"] // self.cfg["d_in"]),  # num_latents goes before it
            "normalize_decoder": self.unit_norm,
            "num_latents": self.cfg["d_sae"],
            "k": self.cfg["k"],
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": self.cfg["d_in"],
            "metadata": dict(metadata),  # which sparsify leaves alone
        }

    def told(self, described: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.cfg, "d_in": described["d_in"], "d_sae": described["num_latents"], "k": described["k"]}


def transposed(tensor: Tensor, ours: str) -> Tensor:
    """SAELens's W_enc ``[d_in, n]`` as a linear layer has it, and back; all others as they are."""
    return tensor.T if ours == "W_enc" else tensor


# dictionary_learning's classes: theirs -> SAELens's names, and whether they subtract b_dec from the input.
_LINEAR = {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "encoder.bias": "b_enc"}
_MATRICES = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
_CLASSES: dict[str, tuple[dict[str, str], bool]] = {
    "AutoEncoder": ({**_LINEAR, "bias": "b_dec"}, True),
    "GatedAutoEncoder": (
        {
            "encoder.weight": "W_enc.T",
            "decoder.weight": "W_dec.T",
            "decoder_bias": "b_dec",
            "r_mag": "r_mag",
            "gate_bias": "b_gate",
            "mag_bias": "b_mag",
        },
        True,
    ),
    "JumpReluAutoEncoder": ({**_MATRICES, "threshold": "threshold"}, False),
    "AutoEncoderTopK": ({**_LINEAR, "b_dec": "b_dec"}, True),
    "BatchTopKSAE": ({**_LINEAR, "b_dec": "b_dec"}, True),
    "MatryoshkaBatchTopKSAE": (_MATRICES, True),
}


class DictionaryLearning(Layout):
    """dictionary_learning's folder: a plain dict of tensors as ``ae.pt``, its class named in ``config.json``.

    BatchTopK and Matryoshka SAEs keep their kind where k is a whole number, which the library wants, and are JumpReLU
    SAEs otherwise. A standard SAE's decoder rows get norm 1, as the library does itself when it loads one: activations
    are larger by the rows' norms.
    """

    weights = "ae.pt"
    description = "config.json"

    def __init__(self, cfg: Mapping[str, Any], training: Any):
        require("dictionary_learning", cfg, ("standard", "gated", "jumprelu", "topk"))
        self.training = training
        self.b_dec_in = cfg["apply_b_dec_to_input"]
        self.k: float = getattr(training, "k", 0)  # of the TopK family
        self.dict_class = self._dict_class(cfg["architecture"])
        self.names, subtracts = _CLASSES[self.dict_class]
        self.cfg = {**cfg, "apply_b_dec_to_input": subtracts}
        if "rescale_acts_by_decoder_norm" in cfg:
            self.cfg["rescale_acts_by_decoder_norm"] = False

    def _dict_class(self, released: str) -> str:
        trained = self.training.architecture()
        if trained in ("batchtopk", "matryoshka_batchtopk") and self.k == int(self.k):
            return "BatchTopKSAE" if trained == "batchtopk" else "MatryoshkaBatchTopKSAE"
        return {
            "standard": "AutoEncoder",
            "gated": "GatedAutoEncoder",
            "jumprelu": "JumpReluAutoEncoder",
            "topk": "AutoEncoderTopK",
        }[released]

    @property
    def in_batches(self) -> bool:
        """Whether the class has one threshold for all latents."""
        return self.dict_class in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")

    def units(self, W_dec: Tensor) -> Tensor | float:
        return decoder_norms(W_dec) if self.dict_class == "AutoEncoder" else 1.0

    def convert(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        moved = move_b_dec(block, self.b_dec_in, self.cfg["apply_b_dec_to_input"])
        if self.dict_class == "AutoEncoder":
            norms = decoder_norms(moved["W_dec"])
            moved |= {"W_enc": moved["W_enc"] * norms, "b_enc": moved["b_enc"] * norms}
            moved["W_dec"] = moved["W_dec"] / norms[:, None]
        tensors = {
            name: moved[ours.removesuffix(".T")].T if ours.endswith(".T") else moved[ours]
            for name, ours in self.names.items()
        }
        if self.dict_class == "AutoEncoderTopK" or self.in_batches:
            tensors["k"] = torch.tensor(int(self.k), dtype=torch.int32)
            # -1 is the library's "not known yet"; its TopK does not go by the threshold
            tensors["threshold"] = moved["threshold"][0] if self.in_batches else torch.tensor(-1.0)
        if self.dict_class == "MatryoshkaBatchTopKSAE":
            ends = torch.tensor([0, *self.training.widths])
            tensors["group_sizes"] = ends.diff()
        return tensors

    def restore(self, block: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {
            ours.removesuffix(".T"): block[name].T if ours.endswith(".T") else block[name]
            for name, ours in self.names.items()
        }
        if self.in_batches:
            tensors["threshold"] = block["threshold"].expand(len(tensors["W_dec"]))
        return tensors

    def describe(self, dtype: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
        """Also what SAELens's reader of this format asks for."""
        layer = re.search(r"\.(\d+)(\.|:|$)", metadata["hf_hook_name"])
        return {
            "trainer": {
                "dict_class": self.dict_class,
                "activation_dim": self.cfg["d_in"],
                "dict_size": self.cfg["d_sae"],
                **({"k": int(self.k)} if self.dict_class == "AutoEncoderTopK" or self.in_batches else {}),
                "lm_name": metadata["model_name"],
                "layer": int(layer[1]) if layer else None,
                "submodule_name": metadata["hf_hook_name"],
                "steps": metadata["training_steps"],
            },
            "buffer": {"ctx_len": metadata["context_size"], "d_submodule": self.cfg["d_in"]},
            "metadata": dict(metadata),
        }

    def told(self, described: Mapping[str, Any]) -> dict[str, Any]:
        trainer = described["trainer"]
        k = {"k": trainer["k"]} if "k" in self.cfg else {}
        return {**self.cfg, "d_in": trainer["activation_dim"], "d_sae": trainer["dict_size"], **k}

    def writer(self, path: Path, shapes: Shapes) -> "PtWriter":
        return PtWriter(path, shapes)

    def reader(self, path: Path) -> "PtReader":
        return PtReader(path)


LAYOUTS: dict[str, type[Layout]] = {
    "saelens": SAELens,
    "sparsify": Sparsify,
    "dictionary_learning": DictionaryLearning,
}


def require(name: str, cfg: Mapping[str, Any], architectures: Sequence[str]) -> None:
    """UserError unless a library can compute what an SAE of this cfg.json does."""
    if cfg["architecture"] not in architectures:
        raise UserError(
            f"--format {name}: cannot express an SAE of architecture {cfg['architecture']} (only "
            f"{', '.join(architectures)}); use --format saelens"
        )
    if cfg["normalize_activations"] != "none":
        raise UserError(
            f"--format {name}: cannot express normalize_activations: {cfg['normalize_activations']}; use "
            "--format saelens"
        )


def move_b_dec(block: Mapping[str, Tensor], subtracted: bool, to_be_subtracted: bool) -> dict[str, Tensor]:
    """The same latents for a reader that subtracts b_dec from its input, or one that does not."""
    moved = dict(block)
    if subtracted == to_be_subtracted:
        return moved
    shift = moved["b_dec"] @ moved["W_enc"] * (1 if to_be_subtracted else -1)
    if "b_gate" in moved:
        moved["b_gate"] = moved["b_gate"] + shift
        moved["b_mag"] = moved["b_mag"] + moved["r_mag"].exp() * shift
    else:
        moved["b_enc"] = moved["b_enc"] + shift
    return moved


class PtWriter:
    """A file of ``torch.save``, a dict of tensors, filled in blocks: they lie in files of their own until the end."""

    def __init__(self, path: Path, shapes: Shapes):
        self.path = path
        self._parts = path.with_name(f".{path.name}.parts")
        self._parts.mkdir()
        self.tensors = {name: self._mapped(name, *shapes[name]) for name in shapes}

    def _mapped(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
        numel = torch.Size(shape).numel()
        return torch.from_file(str(self._parts / name), shared=True, size=numel, dtype=dtype).view(tuple(shape))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: object, *_: object) -> None:
        if exception is None:
            with self.path.open("wb") as file:
                torch.save(self.tensors, file)
                file.flush()
                os.fsync(file.fileno())
        self.tensors.clear()
        shutil.rmtree(self._parts)

    def tensor(self, name: str, value: Tensor) -> None:
        """Writes a whole tensor."""
        self.tensors[name].copy_(value)

    def rows(self, name: str, start: int, value: Tensor) -> None:
        """Writes rows from ``start`` on."""
        self.tensors[name][start : start + len(value)] = value

    def columns(self, name: str, start: int, value: Tensor) -> None:
        """Writes columns from ``start`` on, all rows of the matrix."""
        self.tensors[name][:, start : start + value.shape[1]] = value


class PtReader:
    """A file of ``torch.save`` with a dict of tensors, read in blocks; it holds tensors or is not read."""

    def __init__(self, path: Path):
        self.path = path
        self.tensors: dict[str, Tensor] = torch.load(str(path), map_location="cpu", mmap=True, weights_only=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tensors.clear()

    def tensor(self, name: str) -> Tensor:
        """The whole tensor."""
        return self.tensors[name].clone()

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start..stop`` of dimension 0."""
        return self.tensors[name][start:stop].clone()

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns ``start..stop`` of a matrix."""
        return self.tensors[name][:, start:stop].clone()

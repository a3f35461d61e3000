"""The configs of the runners: SAELens's fields, names and defaults, put into the words of ``config_schema``.

A field whose value can have no effect here is accepted at SAELens's default alone; any other value is a UserError that
names the field and what does the same here.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from scale_sae import config, topology
from scale_sae.activations.architecture import build_architecture
from scale_sae.activations.cache import CONTENTS, read_contents
from scale_sae.config import CheckpointConfig, ModelConfig, RunConfig
from scale_sae.config_parsing import from_mapping, show
from scale_sae.errors import UserError
from scale_sae.hook_names import to_hf
from scale_sae.sae_trainer_config import LoggingConfig
from scale_sae.saes import TrainingSAEConfig

# SAELens's other classes of models are TransformerLens's own.
_AUTO_CLASSES = {"HookedTransformer": "AutoModelForCausalLM"}
# TransformerLens's short names of models on the hub, where they are no names there.
_MODEL_NAMES = {"gpt2-small": "gpt2", "pythia-": "EleutherAI/pythia-", "gemma-": "google/gemma-"}
# The largest number of lanes; it must divide the batch.
LANES = 64

_BUFFER = "has no effect: the shuffle buffer gives every row of every batch at random; set n_batches_in_buffer"
_DEVICES = "has no effect: ranks have a device each; set topology and start them with accelerate launch"
_ALWAYS = "has no effect: the steps are compiled kernels already; leave it out"
_MODEL = "is not handed to the model; leave it out (revision and trust_remote_code are)"
# Field → what to do instead; its default is the one value that is accepted.
_INERT = {
    "hook_head_index": "takes one head; train on all of them, at blocks.N.attn.hook_z",
    "use_chat_formatting": "is not there; format the text with PretokenizeRunner, and train on its dataset",
    "disable_concat_sequences": "is not there in training; set it in PretokenizeRunner, and train on its dataset",
    "activations_mixing_fraction": _BUFFER,
    "llm_device": _DEVICES,
    "act_store_device": _DEVICES,
    "prefetch_llm_batches": "has no effect; topology={'lm': {'dp': 1}} gives the model a rank of its own",
    "autocast": "is not there; set sae.dtype to bfloat16 (it computes in bfloat16 and keeps float32 masters)",
    "autocast_lm": "is not there; set dtype to bfloat16, in which the model then computes",
    "llm_compilation_mode": "cannot be chosen; leave it out",
    "compile_sae": _ALWAYS,
    "sae_compilation_mode": _ALWAYS,
    "n_batches_for_norm_estimate": "has no effect: the factor is found in the shuffle buffer; leave it out",
    "model_kwargs": _MODEL,
    "buffer_size_gb": "has no effect: shards of a cache have about 1 GiB; leave it out",
    "hf_repo_id": "is not there; upload the finished folder with huggingface-cli upload",
    "hf_num_shards": "has no effect: shards of a cache have about 1 GiB; leave it out",
    "hf_revision": "is not there; upload the finished folder with huggingface-cli upload",
    "hf_is_private_repo": "is not there; upload the finished folder with huggingface-cli upload",
}


def _refuse_inert(cfg: Any) -> None:
    """UserError for a field with a value that would have no effect."""
    for f in fields(cfg):
        if f.name in _INERT:
            default = f.default_factory() if callable(f.default_factory) else f.default
            if getattr(cfg, f.name) != default:
                raise UserError(f"{f.name}: {show(getattr(cfg, f.name))} {_INERT[f.name]}")


def _check_device(device: str) -> None:
    """UserError for a device that this process does not get."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device: {device!r} is not supported; use cuda or cpu")
    if device not in ("cpu", "cuda", "cuda:0"):
        raise UserError(
            f"device: {device!r} cannot be chosen by number; set CUDA_VISIBLE_DEVICES, and device to {kind}"
        )
    if kind == "cuda" and not topology.usable_gpus():
        raise UserError(f"device: {device!r}, but this process has no GPU (or ACCELERATE_USE_CPU is set); use cpu")


def _model(cfg: Any) -> dict[str, Any]:
    """The model section. ``dtype`` is what the model computes in, and so what the SAE reads."""
    name = cfg.model_class_name
    if name == "HookedMamba":
        raise UserError(
            "model_class_name: HookedMamba is not supported; use AutoModelForCausalLM for transformers' Mamba"
        )
    kwargs = dict(cfg.model_from_pretrained_kwargs or {})
    kwargs.pop("center_writing_weights", None) if kwargs.get("center_writing_weights") is False else None
    known = {key: kwargs.pop(key) for key in ("revision", "trust_remote_code") if key in kwargs}
    for key, value in kwargs.items():
        raise UserError(f"model_from_pretrained_kwargs.{key}: {show(value)} {_MODEL}")
    auto_class = _AUTO_CLASSES.get(name, name)
    compiled = {"compile": cfg.compile_llm, "dtype": cfg.dtype.removeprefix("torch.")}
    return {"name": hub_name(cfg.model_name), "auto_class": auto_class, **compiled, **known}


def hub_name(model_name: str) -> str:
    """The hub's name of a model that TransformerLens knows by a short one; any other name as it is."""
    for short, name in _MODEL_NAMES.items():
        if model_name == short or (short.endswith("-") and model_name.startswith(short)):
            return name + model_name.removeprefix(short)
    return model_name


def _hookpoint(hook_name: str, model: Mapping[str, Any]) -> str:
    """The hookpoint of a name in either form; reads the model's config, no weights."""
    network = build_architecture(from_mapping(ModelConfig, model, "model"))
    return to_hf(hook_name, [name for name, _ in network.named_modules()])


def _data(cfg: Any, chunk_contexts: int) -> dict[str, Any]:
    """The data section of either config."""
    special = cfg.exclude_special_tokens
    return {
        "dataset": cfg.dataset_path or "embedded",
        "streaming": cfg.streaming,
        "context_size": cfg.context_size,
        "chunk_contexts": chunk_contexts,
        "prepend_bos": cfg.prepend_bos,
        "sequence_separator_token": cfg.sequence_separator_token,
        "exclude_special_tokens": list(special) if isinstance(special, list | tuple) else special,
        "seqpos_slice": list(cfg.seqpos_slice),
    }


def default_cache(dataset_path: str, model_name: str, hook_name: str) -> str:
    """Where activations are cached if no folder is named, as in SAELens."""
    return f"activations/{dataset_path.replace('/', '_')}/{model_name.replace('/', '_')}/{hook_name}"


@dataclass
class LanguageModelSAERunnerConfig:
    """A training run. Fields and defaults are SAELens's; comments say where meanings are wider or narrower."""

    # Any training config of scale_sae, or of a class of one's own that is registered.
    sae: TrainingSAEConfig
    # A hub id, a local folder, or a name such as gpt2-small; "embedded" is the model that comes with the package.
    model_name: str = "gelu-2l"
    # HookedTransformer stands for AutoModelForCausalLM: transformers runs the model. Or another class of transformers.
    model_class_name: str = "HookedTransformer"
    # TransformerLens's name, or a module of transformers' model (with :in, its input).
    hook_name: str = "blocks.0.hook_mlp_out"
    # Nothing reads it, in SAELens neither.
    hook_eval: str = "NOT_IN_USE"
    hook_head_index: int | None = None
    dataset_path: str = ""
    # Nothing: datasets runs no code of theirs any more.
    dataset_trust_remote_code: bool = True
    streaming: bool = True
    # Nothing: columns of text and of tokens are told apart.
    is_dataset_tokenized: bool = True
    use_chat_formatting: bool = False
    context_size: int = 128
    use_cached_activations: bool = False
    # A folder that CacheActivationsRunner filled; None: the one that it fills if none is named.
    cached_activations_path: str | None = None
    # A released SAE to start from: a folder, or user/repo:sae_id.
    from_pretrained_path: str | None = None
    # The buffer has n_batches_in_buffer * store_batch_size_prompts * context_size rows, and at least a batch.
    n_batches_in_buffer: int = 20
    training_tokens: int = 2_000_000
    store_batch_size_prompts: int = 32
    seqpos_slice: tuple[int | None, ...] = (None,)
    disable_concat_sequences: bool = False
    sequence_separator_token: Literal["bos", "eos"] | None = "bos"
    activations_mixing_fraction: float = 0.5
    # cuda: each rank on a GPU of its own.
    device: str = "cpu"
    llm_device: str | None = None
    act_store_device: str | None = None
    prefetch_llm_batches: bool | int = False
    seed: int = 42
    # Of the model and of the activations; the SAE's is sae.dtype.
    dtype: str = "float32"
    prepend_bos: bool = True
    autocast: bool = False
    autocast_lm: bool = False
    compile_llm: bool = False
    llm_compilation_mode: str | None = None
    compile_sae: bool = False
    sae_compilation_mode: str | None = None
    train_batch_size_tokens: int = 4096
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    lr: float = 3e-4
    lr_scheduler_name: str = "constant"
    lr_warm_up_steps: int = 0
    lr_end: float | None = None
    lr_decay_steps: int = 0
    n_restart_cycles: int = 1
    # Steps without firing after which a latent is dead.
    dead_feature_window: int = 1000
    feature_sampling_window: int = 2000
    # Nothing reads it, in SAELens neither.
    dead_feature_threshold: float = 1e-8
    # An evaluation has n_eval_batches * eval_batch_size_prompts * context_size tokens of held-out text; 0: none.
    n_eval_batches: int = 10
    # None: store_batch_size_prompts.
    eval_batch_size_prompts: int | None = None
    logger: LoggingConfig = field(default_factory=LoggingConfig)
    # Checkpoints that are kept, evenly spaced, before the last step; fewer where there are only a few steps to each.
    # Others are made in any case: an interrupted run goes on.
    n_checkpoints: int = 0
    # The run's folder is made in it, under a name that the config decides: metrics.jsonl, checkpoints. None: a folder
    # beside output_path that is removed at the end.
    checkpoint_path: str | None = "checkpoints"
    save_final_checkpoint: bool = False
    # Folder of the released SAE; None: it is returned and not kept.
    output_path: str | None = "output"
    # A checkpoint of another run to start from: <run's folder>/checkpoints/step_….
    resume_from_checkpoint: str | None = None
    # Nothing: what is said is said in any case.
    verbose: bool = True
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    # revision and trust_remote_code.
    model_from_pretrained_kwargs: dict[str, Any] | None = None
    exclude_special_tokens: bool | list[int] = False
    n_batches_for_norm_estimate: int = 1000
    # Not SAELens's: the topology section of a config file, such as {"lm": {"tp": 2}, "sae": {"tp": 2}}. None: every
    # process runs the model, and they share out the SAE's latents.
    topology: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """UserError for a field that cannot mean here what it means in SAELens."""
        if not isinstance(self.sae, TrainingSAEConfig):
            kind = f"{type(self.sae).__module__}.{type(self.sae).__name__}"
            raise UserError(f"sae: {kind} is no training config of scale_sae; import it from scale_sae")
        if not isinstance(self.logger, LoggingConfig):
            raise UserError(f"logger: {type(self.logger).__name__} must be a scale_sae.LoggingConfig")
        _refuse_inert(self)
        _check_device(self.device)
        if self.n_eval_batches < 0 or self.n_checkpoints < 0:
            raise UserError(f"n_eval_batches: {self.n_eval_batches} and n_checkpoints must be at least 0")
        if self.logger.run_name is None:
            size = f"{self.training_tokens:3.3e}"
            name = f"{self.sae.architecture()}-{self.sae.d_sae}-LR-{self.lr}-Tokens-{size}"
            self.logger = replace(self.logger, run_name=name)  # the caller may share it among runs
        if self.use_cached_activations and self.cached_activations_path is None:
            self.cached_activations_path = default_cache(self.dataset_path, self.model_name, self.hook_name)

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.training_tokens // self.train_batch_size_tokens

    def to_run_config(self, world_size: int) -> RunConfig:
        """The same run in the words of a config file, checked. ``UserError`` for a wrong value.

        Args:
            world_size: the processes that were started, for a run that names no topology.
        """
        batch = self.train_batch_size_tokens
        if batch <= 0:
            raise UserError(f"train_batch_size_tokens: {batch} must be above 0")
        lanes = math.gcd(LANES, batch)
        rows = self.n_batches_in_buffer * self.store_batch_size_prompts * self.context_size
        model = _model(self)
        sae = {key: value for key, value in self.sae.to_dict().items() if key != "device"}
        entry = sae if self.from_pretrained_path is None else sae | {"init_from": self.from_pretrained_path}
        train_keys = (
            *("training_tokens", "train_batch_size_tokens", "lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps"),
            *("lr_decay_steps", "n_restart_cycles", "adam_beta1", "adam_beta2", "feature_sampling_window"),
        )
        train = {key: getattr(self, key) for key in train_keys}
        tree = {
            "hookpoints": [_hookpoint(self.hook_name, model)],
            "saes": [entry],
            "recipe": "saelens",
            "seed": self.seed,
            "model": model,
            "data": _data(self, self._chunk_contexts()),
            "topology": self._topology(world_size),
            "train": train | {"dead_feature_window_tokens": self.dead_feature_window * batch},
            "buffer": {"tokens": max(rows // lanes * lanes, batch), "lanes": lanes},
            "checkpoint": self._checkpoints(),
            "evaluation": self._evaluation(),
            "logging": self._logging(),
        }
        checked = config.from_dict(tree)
        folder = self._run_folder(checked)
        own = self.resume_from_checkpoint
        resume = "auto" if own is None or Path(own).resolve().is_relative_to(folder.resolve()) else own
        return config.from_dict(config.to_dict(checked) | {"output_dir": str(folder), "resume": resume})

    def _chunk_contexts(self) -> int:
        folder = Path(self.cached_activations_path or "")
        if self.use_cached_activations and (folder / CONTENTS).exists():
            filled_with: int = read_contents(folder)["data"].get("chunk_contexts", self.store_batch_size_prompts)
            return filled_with
        return self.store_batch_size_prompts

    def _topology(self, world_size: int) -> dict[str, Any]:
        chosen = dict(self.topology or {})
        if self.use_cached_activations:
            if "lm" in chosen:
                raise UserError("topology.lm: with use_cached_activations there are no ranks that run the model")
            chosen["lm"] = {"cache": self.cached_activations_path}
        lm = chosen.setdefault("lm", "colocated")
        counts = [lm.get("tp", 1), lm.get("dp", 1)] if isinstance(lm, dict) and lm.get("cache") is None else [0]
        if not all(isinstance(count, int) for count in counts):
            counts = [0]  # which is refused later, by name
        return {"sae": {"tp": max(1, world_size - math.prod(counts))}, **chosen}

    def _checkpoints(self) -> dict[str, Any]:
        if self.n_checkpoints == 0:
            return {}
        # The last step is none of those that are kept. Between two of them, as many as in any run, for a restart.
        spacing = max(1, math.ceil(self.steps / (self.n_checkpoints + 1)))
        parts = math.ceil(spacing / CheckpointConfig.every_steps)
        every = math.ceil(spacing / parts)
        return {"every_steps": every, "keep_every": every * parts}

    def _evaluation(self) -> dict[str, Any]:
        if self.n_eval_batches == 0:
            return {"every_steps": None}
        prompts = self.eval_batch_size_prompts or self.store_batch_size_prompts
        every = self.logger.eval_every_n_wandb_logs * self.logger.wandb_log_frequency
        return {"every_steps": every, "tokens": self.n_eval_batches * prompts * self.context_size}

    def _logging(self) -> dict[str, Any]:
        logger = self.logger
        return {
            "log_every_steps": logger.wandb_log_frequency,
            "log_to_wandb": logger.log_to_wandb,
            "wandb_project": logger.wandb_project,
            "wandb_entity": logger.wandb_entity,
            "run_name": logger.run_name,
            "log_weights_to_wandb": logger.log_to_wandb and logger.log_weights_to_wandb,
        }

    def _run_folder(self, checked: RunConfig) -> Path:
        """Where the run lives: the same for the same config, so that an interrupted run is found again."""
        text = json.dumps(config.identity(checked), sort_keys=True, default=str)
        name = self.logger.wandb_id or hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        if self.checkpoint_path is not None:
            return Path(self.checkpoint_path) / name
        beside = Path(self.output_path or "output")
        return beside.with_name(f".{beside.name}_{name}")


@dataclass
class CacheActivationsRunnerConfig:
    """What is cached. Fields and defaults are SAELens's; comments say where meanings are wider or narrower."""

    dataset_path: str
    # As for LanguageModelSAERunnerConfig.
    model_name: str
    # Prompts in one forward, and in one chunk of the stream.
    model_batch_size: int
    hook_name: str
    # Checked against the model.
    d_in: int
    training_tokens: int
    context_size: int = -1
    model_class_name: str = "HookedTransformer"
    # None: activations/<dataset>/<model>/<hook name>.
    new_cached_activations_path: str | None = None
    # Nothing: rows are kept in the order of the text, and shuffled when they are trained on.
    shuffle: bool = True
    seed: int = 42
    dtype: str = "float32"
    # None: cuda where there is a GPU.
    device: str | None = None
    buffer_size_gb: float = 2.0
    hf_repo_id: str | None = None
    hf_num_shards: int | None = None
    hf_revision: str = "main"
    hf_is_private_repo: bool = False
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    compile_llm: bool = False
    llm_compilation_mode: str | None = None
    prepend_bos: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    streaming: bool = True
    autocast_lm: bool = False
    # Nothing: datasets runs no code of theirs any more.
    dataset_trust_remote_code: bool | None = None
    use_chat_formatting: bool = False
    # Not SAELens's: how the model is laid over ranks, such as {"lm": {"tp": 2}}. None: each process runs a copy.
    topology: dict[str, Any] | None = None
    # Not SAELens's: those of the training run, whose rows these are.
    exclude_special_tokens: bool | list[int] = False
    sequence_separator_token: Literal["bos", "eos"] | None = "bos"

    def __post_init__(self) -> None:
        """UserError for a field that cannot mean here what it means in SAELens."""
        _refuse_inert(self)
        if self.device is None:
            self.device = "cuda" if topology.usable_gpus() else "cpu"
        _check_device(self.device)
        if self.context_size <= 0:
            raise UserError(
                f"context_size: {self.context_size}; give the tokens per context (of a pre-tokenised dataset, the "
                "length of its rows)"
            )
        if self.new_cached_activations_path is None:
            self.new_cached_activations_path = default_cache(self.dataset_path, self.model_name, self.hook_name)

    def to_run_config(self) -> RunConfig:
        """A run whose stream is to be cached, checked. ``UserError`` for a wrong value."""
        model = _model(self)
        return config.from_dict(
            {
                "hookpoints": [_hookpoint(self.hook_name, model)],
                # No SAE is trained: what is asked for is the stream. The d_in is checked against the model.
                "saes": [{"architecture": "standard", "d_sae": 1, "d_in": self.d_in}],
                "recipe": "saelens",
                "model": model,
                "data": _data(self, self.model_batch_size),
                "topology": self.topology or {},
                "train": {"training_tokens": self.training_tokens, "train_batch_size_tokens": 1},
                "buffer": {"tokens": 1, "lanes": 1},
            }
        )

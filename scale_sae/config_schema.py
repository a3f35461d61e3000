"""The keys of a config: what each means, what it may be, and what it is when it is left out.

A config file is YAML; its keys are the fields of ``RunConfig`` and of the sections that it holds. The comments beside
the fields are the reference; ``configs/quickstart.yaml`` is a complete example, and ``config.load`` reads and checks.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from scale_sae.config_parsing import convert, from_mapping, read_number, require, require_mapping, to_plain
from scale_sae.errors import UserError


@dataclass(frozen=True)
class ModelConfig:
    """The language model (or vision model) whose activations are captured."""

    # Hub id, local folder, or "embedded": the small trained LM that comes with the package.
    name: str = "embedded"
    # The class of transformers that loads it: AutoModelForCausalLM, AutoModel, AutoModelForSequenceClassification...
    auto_class: str = "AutoModelForCausalLM"
    # What the model computes in, and so what crosses from LM ranks to SAE ranks.
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    # Branch, tag or commit on the hub; null: its default branch.
    revision: str | None = None
    # Whether code that comes with the model may run.
    trust_remote_code: bool = False
    # Run the model through torch.compile: the first chunk takes up to minutes, the others less time, on GPUs above all.
    # Activations then differ by rounding (of float32 in a float64 model too, whose norms are float32), also over lm.tp.
    compile: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The text (or images) that the model reads, and how it is cut into contexts."""

    # Hub id, local file or folder, or "embedded": the source of the installed Python's standard library.
    dataset: str = "embedded"
    # The dataset's configuration on the hub, where it has several ("en", "sample-10BT").
    dataset_name: str | None = None
    # Branch, tag or commit on the hub; null: its default branch.
    revision: str | None = None
    split: str = "train"
    # The column that holds text, or token ids (lists of integers), or images for a vision model.
    column: str = "text"
    # Read the dataset while training instead of downloading it first.
    streaming: bool = True
    # Tokens per context, BOS included.
    context_size: int = 128
    # Contexts per chunk; one LM replica forwards one chunk at a time. Part of the run: it decides the order of rows.
    chunk_contexts: int = 32
    # Share of the documents held out of training for evaluation, chosen by their content.
    eval_fraction: float = 0.01
    # Whether every context starts with the tokenizer's BOS token.
    prepend_bos: bool = True
    # The token between two documents of one context; null: none.
    sequence_separator_token: Literal["bos", "eos"] | None = "bos"
    # Whether the activations at special tokens (BOS, EOS, padding...) are left out; or the token ids to leave out.
    exclude_special_tokens: bool | tuple[int, ...] = True
    # The arguments of Python's slice: which positions of a context give activations. [1, null] leaves out the first.
    seqpos_slice: tuple[int | None, ...] = (None,)
    # Hub id or local folder of the tokenizer; null: the model's own.
    tokenizer: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """The length of the stream and the optimizer. All but ``STREAM_KEYS`` may also stand in an entry of ``saes``.

    Where a comment says "by the recipe", a config that leaves the key out has the value that `recipes` gives for the
    SAE's architecture and size, in the entry of ``saes``; the default here is that of the library's classes.
    """

    # Activations (tokens that are kept) that every SAE is trained on.
    training_tokens: int = 2_000_000
    # Activations per step, over all ranks.
    train_batch_size_tokens: int = 2048
    # Peak learning rate of Adam; null, as by the recipe: what `recipes.learning_rate` gives for d_sae and the width of
    # the SAE's hookpoints (the widest of them). In the run's config.yaml it is a number.
    lr: float | None = None
    # Where the schedule's main part and the decay end; null: lr / 10.
    lr_end: float | None = None
    # The schedule between warm-up and decay.
    lr_scheduler_name: Literal["constant", "cosineannealing", "cosineannealingwarmrestarts"] = "constant"
    # Cycles of cosineannealingwarmrestarts.
    n_restart_cycles: int = 1
    # Steps in which lr rises linearly to its peak. By the recipe: a twentieth of the run.
    lr_warm_up_steps: int = 0
    # Steps at the end in which lr falls linearly to zero. By the recipe: a fifth of the run.
    lr_decay_steps: int = 0
    # Adam's decay of the moments, and what is added to the root of the second. By the recipe.
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    # The norm that the gradient of one SAE (all of its parameters on all shards) is clipped to.
    max_grad_norm: float = 1.0
    # A latent that has not fired on this many tokens is dead. By the recipe: 150 · d_sae / k for TopK.
    dead_feature_window_tokens: int = 1_000_000
    # Steps over which firing frequencies are counted before they start anew.
    feature_sampling_window: int = 2000
    # Of Adam's moments of W_enc and W_dec. bfloat16 halves their memory and is rounded stochastically.
    moments_dtype: Literal["float32", "bfloat16"] = "float32"
    # Whether NVIDIA GPUs multiply float32 matrices in TF32: several times faster, with 10 bits after the point, not 23.
    # Of the whole process, the language model too.
    allow_tf32: bool = False


# Names of the recipes.
Recipe = Literal["default", "saelens"]

# The keys of `train` that are the same for all SAEs of a run.
STREAM_KEYS = frozenset({"training_tokens", "train_batch_size_tokens", "allow_tf32"})


@dataclass(frozen=True)
class InitFrom:
    """The released SAE whose weights an SAE starts from.

    In YAML also as text: a folder of one SAE, or ``user/repo:sae_id``.
    """

    # Hub repository (user/repo) or local folder.
    release: str
    # The SAE's folder in the release; null: the release is itself an SAE's folder, or has the sae_id of this run.
    sae_id: str | None = None
    # Branch, tag or commit on the hub; null: its default branch.
    revision: str | None = None

    @classmethod
    def from_yaml(cls, value: Any, key: str) -> "InitFrom":
        """Text or a mapping."""
        if isinstance(value, str):
            release, _, sae_id = value.partition(":")
            found = cls(release, sae_id or None)
        else:
            remedy = "is neither text such as user/repo:sae_id nor a mapping of release, sae_id, revision"
            require(isinstance(value, Mapping), key, value, remedy)
            found = from_mapping(cls, value, key)
        require(found.release != "", key, value, "names no release; write user/repo:sae_id, or the folder of an SAE")
        return found

    def to_yaml(self) -> dict[str, str | None]:
        """What ``from_yaml`` reads."""
        return {"release": self.release, "sae_id": self.sae_id, "revision": self.revision}


@dataclass(frozen=True)
class SAEEntry:
    """One entry of ``saes``: an SAE that is trained at every hookpoint, or at its own ``hookpoints``.

    In YAML an entry is flat: ``{name: wide, architecture: topk, d_sae: 65536, k: 32, lr: 2.0e-4}``.
    """

    architecture: str = "topk"
    # What fills in the keys that this entry and `train` leave out; null: the run's recipe.
    recipe: Recipe | None = None
    # Ends the sae_id: `<hookpoint>/<name>`. Needed where a hookpoint has several SAEs.
    name: str | None = None
    # Hookpoints of this SAE alone; null: those of the run.
    hookpoints: tuple[str, ...] | None = None
    # Where a transcoder's target is taken; each * in it stands for what the same * in the hookpoint stands for. Or a
    # list, one for each of the hookpoints.
    hookpoint_out: str | tuple[str, ...] | None = None
    # A released SAE to start from; null: random weights.
    init_from: InitFrom | None = None
    # Keys of the `train` section that differ for this SAE (all but STREAM_KEYS).
    train: dict[str, Any] = field(default_factory=dict)
    # Every other key: d_sae (the number of latents, required) and the options of the architecture, such as k.
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def d_sae(self) -> int:
        """The number of latents over all shards."""
        return int(self.options["d_sae"])

    @classmethod
    def from_yaml(cls, value: Any, key: str) -> "SAEEntry":
        """The entry in the flat mapping ``value``; UserError naming ``key`` and what is wrong."""
        hints, train_hints = get_type_hints(cls), get_type_hints(TrainConfig)
        own = ("architecture", "recipe", "name", "hookpoints", "hookpoint_out", "init_from")
        require_mapping(value, key, (*own, "d_sae", "k", "..."))
        entry: dict[str, Any] = {"train": {}, "options": {}}
        for name, item in value.items():
            dotted = f"{key}.{name}"
            require(name not in ("train", "options"), dotted, item, "is a level too many; write its keys beside d_sae")
            require(name not in STREAM_KEYS, dotted, item, f"is the same for all SAEs; set train.{name}")
            if name in own:
                entry[name] = convert(item, hints[name], dotted)
            elif name in train_hints:
                entry["train"][name] = convert(item, train_hints[name], dotted)
            else:
                entry["options"][name] = read_number(item)
        options = entry["options"]
        if "d_sae" not in options:
            raise UserError(f"{key}.d_sae: missing; give the number of latents")
        convert(options["d_sae"], int, f"{key}.d_sae")
        require(options["d_sae"] > 0, f"{key}.d_sae", options["d_sae"], "must be above 0")
        if "k" in options:
            convert(options["k"], int | float, f"{key}.k")
            require(0 < options["k"] <= options["d_sae"], f"{key}.k", options["k"], "must be above 0 and at most d_sae")
        return cls(**entry)

    def to_yaml(self) -> dict[str, Any]:
        """The flat mapping that ``from_yaml`` reads."""
        own = {
            "name": self.name,
            "architecture": self.architecture,
            "recipe": self.recipe,
            "hookpoints": self.hookpoints,
            "hookpoint_out": self.hookpoint_out,
            "init_from": self.init_from,
        }
        return {name: to_plain(item) for name, item in {**own, **self.train, **self.options}.items()}


@dataclass(frozen=True)
class LMTopology:
    """The ranks that run the language model: ``{tp: .., dp: ..}`` of their own, or the word ``colocated``.

    Or none: ``{cache: DIR}`` reads what ``scale_sae.cache_activations`` wrote.
    """

    # Tensor parallelism: the ranks that one copy of the model is split over.
    tp: int = 1
    # Data parallelism: the copies of the model. They take the chunks in turn.
    dp: int = 1
    # `lm: colocated` in YAML: every SAE rank also runs a whole copy (tp 1, dp = all of them).
    colocated: bool = False
    # Folder of cached activations, from which SAE ranks read their rows; null: none. The batches are those of the model
    # that filled it, and the run needs no LM ranks.
    cache: str | None = None
    # How one copy is split: tp over tp ranks, by the model's own plan; device_map over the GPUs of one rank (tp 1),
    # layer after layer, for any model. What does not fit on them is kept in RAM or on disk, which is slow.
    parallel: Literal["tp", "device_map"] = "tp"
    # With device_map, the GPUs of each LM rank; null: an even share of those that the SAE ranks of its machine leave.
    # SAE ranks have one GPU each, so start fewer processes than there are GPUs.
    devices_per_rank: int | None = None
    # With device_map, GiB of weights that each of these GPUs (without GPUs: the RAM) holds at most; null: what is free.
    max_memory_gib: float | None = None

    @classmethod
    def from_yaml(cls, value: Any, key: str) -> "LMTopology":
        """``colocated`` or a mapping; where colocated, dp is set by ``TopologyConfig``, which knows the SAE ranks."""
        if value == "colocated":
            return cls(colocated=True)
        require(isinstance(value, Mapping), key, value, "is neither {tp: .., dp: ..} nor colocated")
        if "colocated" in value:
            raise UserError(f"{key}.colocated: unknown key; write {key}: colocated, without tp and dp")
        return from_mapping(cls, value, key)

    @property
    def shares_ranks(self) -> bool:
        """Whether there are no ranks that run the model alone."""
        return self.colocated or self.cache is not None

    def to_yaml(self) -> dict[str, Any] | str:
        """What ``from_yaml`` reads."""
        if self.colocated:
            return "colocated"
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "colocated"}


@dataclass(frozen=True)
class SAETopology:
    """The ranks that hold the SAEs: ``groups`` grids of ``dp`` x ``tp``."""

    # Groups of ranks; the SAEs are dealt out to them.
    groups: int = 1
    # Ranks that share the batch.
    dp: int = 1
    # Shards: each holds d_sae / tp latents of every SAE of its group.
    tp: int = 1


@dataclass(frozen=True)
class TopologyConfig:
    """How the work is laid over ranks (processes, one per GPU). It never changes the result."""

    lm: LMTopology = field(default_factory=LMTopology)
    sae: SAETopology = field(default_factory=SAETopology)
    # What owns the optimizer state; dp > 1 needs fsdp2 or deepspeed.
    engine: Literal["local", "fsdp2", "deepspeed"] = "local"
    # JSON file for the engine deepspeed, such as launch/deepspeed/zero2.json; null: the one that accelerate was given,
    # else ZeRO-1.
    deepspeed: str | None = None
    # Most MiB of one SAE's pre-activations that exist at once on a rank: a batch is worked through in blocks of rows.
    pre_activation_mib: int = 512

    @classmethod
    def from_yaml(cls, value: Any, key: str) -> "TopologyConfig":
        """The section in the mapping ``value``, with the dp of a colocated LM filled in."""
        topology = from_mapping(cls, value, key)
        if not topology.lm.colocated:
            return topology
        return dataclasses.replace(topology, lm=LMTopology(tp=1, dp=topology.sae_ranks, colocated=True))

    @property
    def sae_ranks(self) -> int:
        """The number of processes that hold SAE shards."""
        return self.sae.groups * self.sae.dp * self.sae.tp

    @property
    def world_size(self) -> int:
        """The number of processes that the run needs."""
        return self.sae_ranks if self.lm.shares_ranks else self.lm.tp * self.lm.dp + self.sae_ranks


@dataclass(frozen=True)
class BufferConfig:
    """The shuffle buffer of each hookpoint, split evenly over the ranks of a group."""

    # Activations that the buffer holds.
    tokens: int = 65536
    # Slices that are shuffled each on its own. A multiple of sae.dp x sae.tp; part of the run, so choose it for the
    # largest number of ranks that the run may ever have.
    lanes: int = 64


@dataclass(frozen=True)
class CheckpointConfig:
    """When and what to save for a restart."""

    every_steps: int = 200
    # Newest checkpoints to keep.
    keep: int = 2
    # Beside them, the checkpoints of every so many steps are kept for good; a multiple of every_steps. null: none.
    keep_every: int | None = None
    # save: with the shuffle buffer, so that a restart is bitwise. refill: without it, smaller; a restart fills it from
    # the text that follows, and the rows then differ.
    buffer: Literal["save", "refill"] = "save"


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on held-out text while the run trains. It changes nothing of what is trained."""

    # Steps between evaluations; null: none.
    every_steps: int | None = None
    # Held-out tokens of one evaluation, the same each time.
    tokens: int = 16384


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged, and how often; always to ``metrics.jsonl`` in the output folder."""

    log_every_steps: int = 10
    # Also to Weights & Biases. `wandb` is another name for this key.
    log_to_wandb: bool = False
    wandb_project: str = "scale_sae"
    # The team or user that the project belongs to, and the name of the run; null: what wandb chooses.
    wandb_entity: str | None = None
    run_name: str | None = None
    # Also store every checkpoint with Weights & Biases, as an artifact.
    log_weights_to_wandb: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Two runs with equal configs, but for the keys in ``NOT_IDENTITY``, train the same SAEs."""

    # Module names of the model, in which * stands for anything but a dot: model.layers.12, model.layers.*.
    # Captured is the module's output, or with the suffix :in its input.
    hookpoints: tuple[str, ...]
    saes: tuple[SAEEntry, ...]
    # What fills in the keys that neither `train` nor an entry of ``saes`` holds: values that train good SAEs, by
    # architecture and size (default), or SAELens's own (saelens). The config in the run's folder has them, in ``saes``.
    recipe: Recipe = "default"
    # Decides the initial weights and the order of the activations.
    seed: int = 0
    # The run's folder: resolved config, metrics, checkpoints. All nodes must see it.
    output_dir: str = "runs/quickstart"
    # auto: go on from the newest checkpoint in output_dir, if any. never: refuse a folder that holds a run.
    # Otherwise the path of a checkpoint to start from.
    resume: str = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def hookpoints_of(self, entry: SAEEntry) -> tuple[str, ...]:
        """The hookpoint patterns that ``entry`` is trained at."""
        return self.hookpoints if entry.hookpoints is None else entry.hookpoints

    def targets_of(self, entry: SAEEntry) -> tuple[str, ...]:
        """The patterns of a transcoder's targets, one for each of ``hookpoints_of``; none for other SAEs."""
        if entry.hookpoint_out is None:
            return ()
        if isinstance(entry.hookpoint_out, str):
            return (entry.hookpoint_out,) * len(self.hookpoints_of(entry))
        return entry.hookpoint_out

    def train_of(self, entry: SAEEntry) -> TrainConfig:
        """The training settings of ``entry``: the run's, with its own in their place."""
        return dataclasses.replace(self.train, **entry.train)


# Sections and keys that may differ between two launches of the same run.
NOT_IDENTITY = frozenset({"topology", "checkpoint", "evaluation", "logging", "resume", "output_dir"})

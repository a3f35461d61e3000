"""What is planned of the language model, against the same model with weights, run by real ranks."""

import ctypes
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as record
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    ViTConfig,
)
from transformers.models.llama.modeling_llama import LlamaMLP

import scale_sae.config
from harness import run_ranks
from real_models import ARCHITECTURES, PARAMETERS, write_architecture
from scale_sae.activations.architecture import build_architecture, input_name, inspect_model, kept_positions
from scale_sae.activations.source import ActivationSource, _load
from scale_sae.activations.tensor_parallel import parallelize
from scale_sae.activations.tokens import Chunk
from scale_sae.activations.transport import kept_rows
from scale_sae.config import DataConfig, ModelConfig, RunConfig
from scale_sae.errors import UserError
from scale_sae.planning.language_model import LMProfile, Op, bytes_while_loading, profile
from scale_sae.planning.operations import is_fused, shapes_only
from scale_sae.profiling import peak_memory

CONTEXTS, CONTEXT = 4, 48
CPU = torch.device("cpu")
# Of measured memory: what a kernel takes for itself is not known, nor how long a collective keeps what it was given.
ROOM = 0.1
# Where there is no such thing. Of small tensors the profiler's account is exact.
EXACT = 1e-3
SIZES: dict[str, Any] = {
    "vocab_size": 301,  # not divisible by any number of ranks
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=4)
GPT2 = GPT2Config(vocab_size=301, n_positions=64, n_embd=128, n_layer=3, n_head=8)
NEOX = GPTNeoXConfig(**SIZES)
VIT = ViTConfig(
    hidden_size=128, intermediate_size=320, num_hidden_layers=3, num_attention_heads=8, image_size=56, patch_size=8
)


def saved(folder: Path, config: PreTrainedConfig, auto: Any = AutoModelForCausalLM) -> str:
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    return str(folder)


def run_config(name: str = "embedded", *hookpoints: str, tp: int = 1, **keys: Any) -> RunConfig:
    model: dict[str, Any] = {"name": name, **{key: keys.pop(key) for key in ("dtype", "auto_class") if key in keys}}
    return scale_sae.config.from_dict(
        {
            "model": model,
            "hookpoints": list(hookpoints or ["model.layers.*"]),
            "saes": [{"architecture": "topk", "d_sae": 64, "k": 4}],
            "data": {"context_size": CONTEXT, "chunk_contexts": CONTEXTS},
            "topology": {"lm": {"tp": tp}},
        }
        | keys
    )


def planned(config: RunConfig, kind: Any = "cpu") -> tuple[LMProfile, dict[str, int]]:
    widths = inspect_model(config.model, config.hookpoints, config.topology.lm.tp)
    return profile(config, widths, kind), widths


def chunk(model: ModelConfig) -> Chunk:
    positions = kept_positions(model, DataConfig(context_size=CONTEXT))
    if input_name(model) == "input_ids":
        inputs = torch.randint(4, 250, (CONTEXTS, CONTEXT), generator=torch.Generator().manual_seed(0))
    else:
        inputs = torch.zeros(CONTEXTS, VIT.num_channels, VIT.image_size, VIT.image_size)
    return Chunk(0, inputs, torch.ones(CONTEXTS, positions, dtype=torch.bool), {})


def mesh_of(world: int) -> DeviceMesh | None:
    return DeviceMesh.from_group(dist.new_group(list(range(world))), "cpu") if world > 1 else None


def weight_bytes(source: ActivationSource) -> int:
    tensors = [*source.model.parameters(), *source.model.buffers()]
    storages = [getattr(tensor, "_local_tensor", tensor.data).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured(config: RunConfig, widths: dict[str, int], attention: SDPBackend | None = None) -> dict[str, Any]:
    """Of the first of the ranks that share the model: bytes of weights, peak of a chunk, calls of collectives."""
    given = chunk(config.model)

    def worker(rank: int, world: int) -> dict[str, Any]:
        source = ActivationSource(config.model, widths, mesh=mesh_of(world))
        with nullcontext() if attention is None else sdpa_kernel(attention):
            kept_rows(source, given, CPU)  # libraries set themselves up in the first
            peaks = []
            for _ in range(3 if world > 1 else 1):  # gloo may free a message late, in some of them
                with peak_memory(CPU) as peak:
                    kept_rows(source, given, CPU)
                peaks.append(peak.bytes)
        # What gloo was given: the calls of torch's functional collectives do not pass through Python.
        with record(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
            source.capture(given.tokens)
        calls: Counter[tuple[str, int]] = Counter()
        for event in events.events() or []:
            if event.name == "gloo:all_reduce":
                calls["all_reduce", 2 * 4 * torch.Size(event.input_shapes[0]).numel()] += 1
            elif event.name.startswith("gloo:"):
                assert event.name == "gloo:all_gather"
                calls["all_gather", world * 4 * torch.Size(event.input_shapes[0]).numel()] += 1
        return {"weights": weight_bytes(source), "peak": min(peaks), "calls": calls}

    found = run_ranks(config.topology.lm.tp, worker)
    return {**found[0], "peak": min(rank["peak"] for rank in found)}


def case(made: PreTrainedConfig | None, tp: int, slow: bool = True) -> Any:
    name = "embedded" if made is None else made.model_type
    return pytest.param(made, tp, marks=[pytest.mark.slow] if slow else [], id=f"{name}-{tp}")


@pytest.mark.parametrize(
    ("made", "tp"),
    [
        case(None, 1, slow=False),
        case(None, 2),
        case(None, 4),
        case(LLAMA, 1),
        case(LLAMA, 2, slow=False),
        case(LLAMA, 4),
        case(NEOX, 1),
        case(NEOX, 2),
        case(NEOX, 4),
        case(GPT2, 1, slow=False),
    ],
)
def test_a_rank_that_runs(tmp_path: Path, made: PreTrainedConfig | None, tp: int) -> None:
    """Weights and collectives to the byte, and memory where it does not depend on when a collective ends."""
    name = "embedded" if made is None else saved(tmp_path, made)
    kind = made.model_type if made else ""
    layers = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}.get(kind, "model.layers")
    # The second is inside of a layer, so that what is behind is not computed; a rank computes a part of its columns. Of
    # the embedded model there is so much that the rows need more memory than the forward.
    act = {"gpt_neox": "act", "gpt2": "act"}.get(kind, "act_fn")
    numbers = ("0", "1") if made else ("*", "*")
    config = run_config(name, f"{layers}.{numbers[0]}", f"{layers}.{numbers[1]}.mlp.{act}", tp=tp)
    found, widths = planned(config)
    real = measured(config, widths)
    assert found.tp == tp
    assert found.weights == real["weights"]
    assert Counter({(flow.op, flow.bytes): flow.count for flow in found.flows}) == real["calls"]
    assert all(flow.link == "LM tp" and flow.ranks == tp for flow in found.flows)
    assert found.captured == CONTEXTS * CONTEXT * sum(widths.values()) * 4
    assert found.peak == pytest.approx(real["peak"], rel=EXACT if tp == 1 else ROOM)
    assert found.weights_whole == planned(run_config(name, f"{layers}.0"))[0].weights


@pytest.mark.parametrize(
    ("made", "hookpoint"),
    [
        pytest.param(MistralConfig(**SIZES, num_key_value_heads=4, sliding_window=16), "model.layers.1", id="mistral"),
        pytest.param(
            Gemma2Config(**SIZES, num_key_value_heads=4, head_dim=16),
            "model.layers.1",
            id="gemma2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4), "model.layers.1", id="mixtral"
        ),
        pytest.param(VIT, "layers.1", id="vit"),
    ],
)
def test_memory_of_other_kinds_of_model(tmp_path: Path, made: PreTrainedConfig, hookpoint: str) -> None:
    """A mask of its own, capped attention scores, experts that are chosen, images."""
    auto = AutoModel if made is VIT else AutoModelForCausalLM
    config = run_config(saved(tmp_path, made, auto), hookpoint, auto_class=auto.__name__)
    found, widths = planned(config)
    real = measured(config, widths)
    assert found.peak == pytest.approx(real["peak"], rel=EXACT)
    assert found.weights == real["weights"]


def test_attention_that_no_fused_kernel_computes(tmp_path: Path) -> None:
    """A GPU has none for grouped heads in float32: scores and weights of every query and key are then in memory."""
    config = run_config(saved(tmp_path, LLAMA), "model.layers.1")
    found, widths = planned(config, "cuda")
    real = measured(config, widths, SDPBackend.MATH)
    assert found.peak == pytest.approx(real["peak"], rel=ROOM)
    assert planned(config, "cpu")[0].peak < 0.8 * real["peak"]


def test_flops_of_a_llama(tmp_path: Path) -> None:
    name = saved(tmp_path, LLAMA)
    d, width, heads, kv_heads = 128, 16, 8, 4
    rows = CONTEXTS * CONTEXT
    projections = rows * (2 * d * heads * width + 2 * d * kv_heads * width + 3 * d * 320)
    # Queries see the keys up to their own position; a multiply-add each for the score and for the mean of the values.
    attention = CONTEXTS * heads * (CONTEXT * (CONTEXT + 1) // 2) * 2 * width
    for layers in (1, 3):
        found, _ = planned(run_config(name, f"model.layers.{layers - 1}"), "cuda" if layers == 1 else "cpu")
        assert planned(run_config(name, f"model.layers.{layers - 1}"))[0].flops == layers * 2 * (
            projections + attention
        )
        # Those behind the last hookpoint have weights too.
        assert found.weights_whole == found.weights == planned(run_config(name, "model.layers.2"))[0].weights
    gate = Op(2 * rows * d * 320, 4 * (rows * d + d * 320 + rows * 320))  # a product reads two matrices and writes one
    assert dict(found.ops)[gate] == 3 * 3  # the layers' three of this size
    assert found.flops == sum(op.flops * count for op, count in found.ops)
    # A rank of two has half of everything that is multiplied, of a chunk of a size that no other test has asked for.
    larger = {"data": {"context_size": CONTEXT, "chunk_contexts": CONTEXTS + 1}}
    whole, split = (planned(run_config(name, "model.layers.2", tp=tp, **larger))[0] for tp in (1, 2))
    assert split.flops == whole.flops // 2


def test_flops_of_chosen_experts(tmp_path: Path) -> None:
    made = MixtralConfig(**SIZES, num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2)
    made.save_pretrained(tmp_path)
    hookpoints = ("model.layers.0.self_attn", "model.layers.0.mlp")
    before, after = (planned(run_config(str(tmp_path), hookpoint))[0].flops for hookpoint in hookpoints)
    # Each token asks for its experts, and two of the four compute its three products.
    assert after - before == 2 * CONTEXTS * CONTEXT * 128 * (4 + 2 * 3 * 320)


def test_what_others_know_of_the_model_stays(tmp_path: Path) -> None:
    LLAMA.save_pretrained(tmp_path)
    config = run_config(str(tmp_path), "model.layers.1")
    profile(config, {"model.layers.1": 128})  # the first to ask for this model
    assert {type(parameter) for parameter in build_architecture(config.model).parameters()} == {torch.nn.Parameter}
    assert all(parameter.is_meta for parameter in build_architecture(config.model).parameters())


def test_attention_is_one_operation() -> None:
    def attend() -> Tensor:
        # As models do: heads are cut out of each position, and put side by side again.
        query, key, value = torch.empty(3, 2, 8, 4, 16).transpose(2, 3)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    assert attend().is_contiguous()  # so that what follows copies nothing
    with shapes_only("cuda") as operations:
        attend().reshape(2, 8, 64)
    elements = 2 * 4 * 8 * 16
    pairs = 8 * 9 // 2
    assert operations.ops == {Op(2 * 2 * 4 * pairs * 2 * 16, 4 * 4 * elements): 1}


def test_repeated_rows_are_read_once() -> None:
    with shapes_only("cpu") as operations:
        rows = torch.empty(1, 8).expand(4, 8)
        operations.restart()
        rows.exp()
    assert operations.ops == {Op(0, 4 * (8 + 4 * 8)): 1}


def test_embedding_reads_the_rows_that_it_gives() -> None:
    found, _ = planned(run_config("embedded", "model.embed_tokens"))
    rows = CONTEXTS * CONTEXT
    assert dict(found.ops)[Op(0, rows * (2 * 256 * 4 + 8))] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("widths", [(16, 16), (16, 8), (6, 6)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_kernel_of_a_cpu(
    dtype: torch.dtype, heads: tuple[int, int], widths: tuple[int, int], masked: bool
) -> None:
    query = torch.zeros(2, heads[0], 8, widths[0], dtype=dtype)
    key = torch.zeros(2, heads[1], 8, widths[0], dtype=dtype)
    value = torch.zeros(2, heads[1], 8, widths[1], dtype=dtype)
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool) if masked else None
    chosen = torch._fused_sdp_choice(query, key, value, mask, is_causal=not masked, enable_gqa=heads[0] != heads[1])
    assert is_fused("cpu", query, key, value, mask) == (SDPBackend(chosen) != SDPBackend.MATH)


@pytest.mark.parametrize(
    ("dtype", "kv_heads", "widths", "masked", "fused"),
    [
        (torch.bfloat16, 4, (128, 128), False, True),
        (torch.bfloat16, 2, (128, 128), False, True),  # flash attention takes grouped heads
        (torch.bfloat16, 2, (128, 128), True, False),  # and no mask; what takes one takes no grouped heads
        (torch.bfloat16, 4, (128, 128), True, True),
        (torch.bfloat16, 4, (192, 128), False, True),
        (torch.bfloat16, 2, (512, 512), False, False),
        (torch.bfloat16, 4, (512, 512), False, True),
        (torch.float32, 4, (64, 64), False, True),
        (torch.float32, 2, (64, 64), False, False),
        (torch.float32, 4, (6, 6), False, False),  # not a multiple of 16 bytes
        (torch.float64, 4, (64, 64), False, False),
    ],
)
def test_attention_kernel_of_a_gpu(
    dtype: torch.dtype, kv_heads: int, widths: tuple[int, int], masked: bool, fused: bool
) -> None:
    query, key, value = (
        torch.empty(1, heads, 4, width, dtype=dtype, device="meta")
        for heads, width in [(4, widths[0]), (kv_heads, widths[0]), (kv_heads, widths[1])]
    )
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool, device="meta") if masked else None
    assert is_fused("cuda", query, key, value, mask) == fused


def test_copies_that_are_whole() -> None:
    """A colocated copy and one over the devices of a rank are on one rank; equal questions are answered once."""
    split, _ = planned(run_config(tp=2))
    for lm in ("colocated", {"parallel": "device_map"}):
        whole, _ = planned(run_config(topology={"lm": lm}))
        assert (whole.tp, whole.flows, whole.weights) == (1, (), split.weights_whole)
        assert whole is planned(run_config(seed=7))[0]
    assert split.weights < whole.weights and split.flops < whole.flops and split.peak < whole.peak + split.captured


def test_shapes_that_values_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(saved(tmp_path, LLAMA), "model.layers.1")
    widths = inspect_model(config.model, config.hookpoints)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(UserError, match=r"model.name: .* computes what its activations' values decide") as error:
        profile(config, widths)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES])
def test_weights_of_models_on_the_hub(tmp_path: Path, name: str) -> None:
    path = str(write_architecture(name, tmp_path))
    layers = {"gpt2": "transformer.h", "pythia-160m": "gpt_neox.layers"}.get(name, "model.layers")
    found, _ = planned(run_config(path, f"{layers}.0", dtype="bfloat16"))
    buffers = 2048  # frequencies of rotary positions in float32, a factor
    assert 2 * PARAMETERS[name] <= found.weights <= 2 * PARAMETERS[name] + buffers


@pytest.mark.slow
def test_all_layers_of_llama_70b(tmp_path: Path) -> None:
    path = str(write_architecture("llama-3.1-70b", tmp_path))
    config = run_config(path, tp=8, dtype="bfloat16")
    widths = inspect_model(config.model, config.hookpoints, 8)
    begun = time.process_time()
    found = profile(config, widths)
    assert time.process_time() - begun < 25
    hidden = CONTEXTS * CONTEXT * 8192 * 2
    assert found.captured == 80 * hidden
    # One for the embedding, two for each layer.
    assert [(flow.op, flow.bytes, flow.count) for flow in found.flows] == [("all_reduce", 2 * hidden, 1 + 2 * 80)]
    norms, frequencies = (1 + 2 * 80) * 8192 * 2, 2 * 64 * 4  # whole on every rank
    assert found.weights == (2 * PARAMETERS["llama-3.1-70b"] - norms) // 8 + norms + frequencies


def own_memory() -> int:
    """Bytes of this process that no file stands behind, without those that its allocator has no use for.

    It would give those of real models back by itself: it keeps small ones.
    """
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(("dtype", "tp"), [("float32", 1), ("float32", 2), ("bfloat16", 2)])
def test_memory_while_loading(tmp_path: Path, dtype: str, tp: int) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 2048}
    name = saved(tmp_path, LlamaConfig(**SIZES | sizes, num_key_value_heads=4))
    config = run_config(name, "model.layers.1", tp=tp, dtype=dtype)
    found, _ = planned(config)

    def worker(rank: int, world: int) -> int:
        mesh = mesh_of(world)
        before = own_memory()
        whole = _load(config.model, getattr(torch, dtype))
        most = own_memory() - before
        if mesh is not None:
            parallelize(whole, mesh, name)
        return max(most, own_memory() - before)

    for most in run_ranks(tp, worker):
        # Besides weights: modules, and what the allocator keeps of small tensors.
        assert most == pytest.approx(bytes_while_loading(config, found), rel=0.05, abs=8 << 20)


def test_real_ranks_do_not_ask_for_groups_that_never_were() -> None:
    """A profile is made in a world without other ranks; a model may be split over ranks of the same numbers later."""
    config = run_config("embedded", "model.layers.1", tp=2)
    _, widths = planned(config)

    def worker(rank: int, world: int) -> Tensor | None:
        group = dist.new_group([1, 2])
        if rank == 0:
            return None
        source = ActivationSource(config.model, widths, mesh=DeviceMesh.from_group(group, "cpu"))
        return source.capture(chunk(config.model).tokens)["model.layers.1"]

    _, first, second = run_ranks(3, worker)
    assert torch.equal(first, second)

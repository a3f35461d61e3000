"""The architectures of the models that ``configs/`` has a config for: their sizes, and folders without weights."""

from collections.abc import Callable
from pathlib import Path

from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(
        vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12, architectures=["GPT2LMHeadModel"]
    ),
    "pythia-160m": lambda: GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        architectures=["GPTNeoXForCausalLM"],
    ),
    "gemma-2-2b": lambda: Gemma2Config(
        vocab_size=256000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        tie_word_embeddings=True,
        architectures=["Gemma2ForCausalLM"],
    ),
    "llama-3.1-8b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ),
    "qwen3-32b": lambda: Qwen3Config(
        vocab_size=151936,
        hidden_size=5120,
        intermediate_size=25600,
        num_hidden_layers=64,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["Qwen3ForCausalLM"],
    ),
    "llama-3.1-70b": lambda: LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ),
}

# Of the models on the hub, as their pages count them.
PARAMETERS = {
    "gpt2": 124_439_808,
    "pythia-160m": 162_322_944,
    "gemma-2-2b": 2_614_341_888,
    "llama-3.1-8b": 8_030_261_248,
    "qwen3-32b": 32_762_123_264,
    "llama-3.1-70b": 70_553_706_496,
}


def write_architecture(name: str, folder: Path) -> Path:
    """Writes the model's config.json below ``folder``: all that is needed to build it on the meta device."""
    path = folder / name
    ARCHITECTURES[name]().save_pretrained(path)
    return path

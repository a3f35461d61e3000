"""Trains the embedded language model: ``python -m scale_sae.embedded.train --out FOLDER [--steps N]``.

A byte-level Llama of 4 layers on the source of Python's standard library, AdamW with warm-up and cosine decay, one CPU
thread or more. Prints the loss on held-out files in bits per byte, and writes the model in bfloat16 with its tokenizer.
"""

import json
import math
import time
from pathlib import Path

import fire
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scale_sae.activations.tokens import is_held_out
from scale_sae.embedded import load_text

CONTEXT = 256
EVAL_FRACTION = 0.01
SPECIAL_TOKENS = ["<bos>", "<eos>", "<pad>", "<unk>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes (ids 4 to 259) and four special tokens (ids 0 to 3)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(SPECIAL_TOKENS) + 256,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents in one line, each with ``<bos>`` before it; int64 ``[tokens]``."""
    ids: list[int] = []
    for text in texts:
        ids.append(0)
        ids.extend(tokenizer(text, add_special_tokens=False)["input_ids"])
    return torch.tensor(ids)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean next-token loss in bits over the byte tokens of whole contexts of ``stream``."""
    contexts = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    total, count = 0.0, 0
    for batch in contexts.split(16):
        logits = model(input_ids=batch).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        is_byte = batch[:, 1:].flatten() >= len(SPECIAL_TOKENS)
        total += losses[is_byte].sum().item()
        count += int(is_byte.sum())
    return total / count / math.log(2)


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm_up = 100
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))))


def fit(model: LlamaForCausalLM, stream: torch.Tensor, steps: int, batch: int, peak: float) -> None:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    generator = torch.Generator().manual_seed(0)
    model.train()
    start = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        offsets = torch.randint(len(stream) - CONTEXT, (batch, 1), generator=generator)
        tokens = stream[offsets + torch.arange(CONTEXT)]
        # Every context starts with <bos>, as it does when activations are captured.
        tokens[:, 0] = 0
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            bits = loss.item() / math.log(2)
            print(f"step {step} bits/token {bits:.3f} {time.monotonic() - start:.0f} s", flush=True)


def main(out: str, steps: int = 3200, batch: int = 12, lr: float = 3e-3) -> None:
    """Trains the model for ``steps`` steps of ``batch`` contexts of 256 bytes and writes it to the folder ``out``."""
    tokenizer = byte_tokenizer()
    texts = load_text()["text"]
    train = token_stream(tokenizer, [text for text in texts if not is_held_out(text, EVAL_FRACTION)])
    held_out = token_stream(tokenizer, [text for text in texts if is_held_out(text, EVAL_FRACTION)])
    print(f"{len(train)} tokens to train on, {len(held_out)} held out")
    model = new_model()
    fit(model, train, steps, batch, lr)
    model.eval()
    model.to(torch.bfloat16)
    folder = Path(out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # What users will run: the bfloat16 weights, computed with in float32.
    bits = bits_per_byte(model.float(), held_out)
    facts = {"bits_per_byte": round(bits, 4), "held_out_tokens": len(held_out), "tokens": steps * batch * CONTEXT}
    (folder / "training.json").write_text(json.dumps(facts) + "\n")
    print(facts)


if __name__ == "__main__":
    fire.Fire(main)

"""Time and peak memory of a training step on a GPU, compared with fine-tuning with the full context.

    python tests/benchmarks/training_gpu.py --out results.json [--minutes 1,10,60]
    python tests/benchmarks/training_gpu.py --shape tiny --device cpu --minutes 0.2,0.6      # smoke test

The decoder has the shape of Qwen2.5-Omni-7B and random weights in bfloat16 (or NF4), LoRA of rank 128 on q, k and v.
A minute is 10,500 tokens: 1 frame per second at 360p (300 tokens per pair of frames) and audio (25 tokens per second),
in chunks of 1,024 with a cache of 8,192 tokens per layer; evicted tokens are offloaded to pinned host memory. There is
one question at the end. The comparison processes the same tokens in one forward with activation checkpointing in every
layer, until it runs out of memory.
"""

from __future__ import annotations

import gc
import json
import time
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from report import new_parser, write_report
from torch import Tensor
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

from omnimem.backbones import ChunkInputs
from omnimem.bptt import ChunkwiseBPTT
from omnimem.budget import BudgetProfile, LayerBudget
from omnimem.forward import Stream
from omnimem.memory import CompressedCache, SelectionGradient, attach
from omnimem.memory.offload_store import HostStore, Store
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import build_selection

TOKENS_PER_MINUTE, CHUNK, SECONDS_PER_CHUNK = 10_500, 1024, 5.85
SHAPES = {
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2},
}  # fmt: skip


def decoder(shape: str, device: torch.device, nf4: bool) -> Any:
    """A frozen decoder with random weights and new adapters."""
    sizes = SHAPES[shape]
    section = sizes["hidden_size"] // sizes["num_attention_heads"] // 2
    rope = {
        "rope_type": "default",
        "mrope_section": [section // 4, section * 3 // 8, section * 3 // 8],
        "rope_theta": 1e6,
    }
    config = Qwen2_5OmniTextConfig(
        vocab_size=512, max_position_embeddings=2**20, pad_token_id=0, rope_parameters=rope, **sizes
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device("cpu" if nf4 else device):
        model: Any = Qwen2_5OmniThinkerTextModel(config).to(torch.bfloat16)
    if nf4:
        model = quantized(model, device)
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=128, lora_alpha=256, target_modules=["q_proj", "k_proj", "v_proj"]), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device).float()
            parameter.requires_grad_(True)
    return model.train()


def quantized(model: Any, device: torch.device) -> Any:
    """Convert the linear layers to NF4 one at a time, so that the device never stores all of them in bfloat16."""
    import bitsandbytes as bnb

    for layer in model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    small = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, linear.bias is not None,
                        compute_dtype=torch.bfloat16, quant_type="nf4",
                    )  # fmt: skip
                    small.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                    small.bias = linear.bias
                    setattr(parent, name, small.to(device))
    return model.to(device)


def chunk(number: int, length: int, width: int, device: torch.device) -> ChunkInputs:
    """Random embeddings, six visual tokens per audio token."""
    generator = torch.Generator(device).manual_seed(number)
    modality = torch.full((1, length), VISUAL, dtype=torch.int8, device=device)
    modality[:, length * 6 // 7 :] = AUDIO
    start = number * CHUNK
    return ChunkInputs(
        embeds=torch.randn(1, length, width, generator=generator, device=device, dtype=torch.bfloat16),
        position_ids=(start + torch.arange(length, device=device)).expand(3, 1, -1),
        modality=modality,
        time=torch.full((1, length), number * SECONDS_PER_CHUNK, device=device),
        next_position_id=torch.tensor([start + length], device=device),
    )


def compressed(model: Any, tokens: int, device: torch.device, budget: int) -> None:
    """A training step with the compressed cache."""
    attach(model)
    backbone: Any = type("Backbone", (), {"language_model": model, "device": device})()
    layers = model.config.num_hidden_layers
    profile = BudgetProfile((LayerBudget(budget * 5 // 6, budget - budget * 5 // 6),) * layers)
    cache = CompressedCache(profile, build_selection("omnimem"), SelectionGradient())
    stream = Stream(backbone, cache)
    tape = ChunkwiseBPTT(stream, HostStore(device) if device.type == "cuda" else Store())
    width, last = model.config.hidden_size, 0
    for number, start in enumerate(range(0, tokens, CHUNK)):
        tape.step(chunk(number, min(CHUNK, tokens - start), width, device))
        last = number

    def loss() -> tuple[Tensor]:
        question = chunk(last + 1, 32, width, device)
        with cache.scratch():
            return (stream.forward(question, text=True).float().square().mean(),)

    tape.add_loss(loss)
    tape.backward()


def full_context(model: Any, tokens: int, device: torch.device, budget: int) -> None:
    """A training step with all tokens in the context."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = chunk(0, tokens, model.config.hidden_size, device)
    hidden = model(
        inputs_embeds=inputs.embeds.requires_grad_(), position_ids=inputs.position_ids, use_cache=False
    ).last_hidden_state
    hidden[:, -32:].float().square().mean().backward()


def measure(step: Any, model: Any, tokens: int, device: torch.device, budget: int) -> dict[str, Any]:
    """Seconds and peak GiB, or out of memory."""
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        started = time.perf_counter()
        step(model, tokens, device, budget)
        if cuda:
            torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        model.zero_grad()
        return {"tokens": tokens, "out_of_memory": True}
    model.zero_grad()
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "peak_gib": peak}


def main() -> int:
    """Measure and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", default="1,10,60")
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--bases", default="bf16,nf4")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for base in args.bases.split(","):
        for name, step in (("omnimem", compressed), ("full context", full_context)):
            model = decoder(args.shape, device, base == "nf4")
            measure(step, model, CHUNK // 2, device, args.budget)  # warm-up
            for minutes in (float(text) for text in args.minutes.split(",")):
                row = measure(step, model, round(minutes * TOKENS_PER_MINUTE), device, args.budget)
                rows.append({"base": base, "method": name, "minutes": minutes, **row})
                print(json.dumps(rows[-1]), flush=True)
                if row.get("out_of_memory"):
                    break
            del model
    where = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report = {"device": where, "shape": args.shape, "torch": torch.__version__, "rows": rows}
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

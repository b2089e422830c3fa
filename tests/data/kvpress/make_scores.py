"""Record what NVIDIA's kvpress scores and keeps on a tiny text model: `scores.safetensors`.

kvpress needs an older transformers than this project, so it has an environment of its own, outside the checkout.
From the root of the checkout (Python 3.11, no GPU)::

    python3.11 -m venv ../kvpress-env
    ../kvpress-env/bin/pip install torch==2.13.0 transformers==5.2.0 kvpress==0.5.5 safetensors==0.8.0
    ../kvpress-env/bin/python tests/data/kvpress/make_scores.py tests/data/kvpress/scores.safetensors

A random Qwen2 decoder prefills one prompt of T tokens in one forward call, once per press. kvpress compresses a
layer's cache after that layer has attended, so every layer sees the uncompressed prompt, whatever the press.
H query heads, G key-value heads, n kept positions; everything is float32 or int64.

==============================  ==============  =========================================================
tensor                          shape           what
==============================  ==============  =========================================================
``inputs.input_ids``            [1, T]          the prompt
``weights.*``                                   the decoder (`Qwen2Model`) under its own names
``layer{i}.query``              [1, H, T, D]    after RoPE
``layer{i}.key``, ``.value``    [1, G, T, D]    after RoPE, before compression
``layer{i}.{press}.score``      [1, G, T]       what the press's `score` returned
``layer{i}.{press}.kept``       [1, G, n]       positions left in the cache, ascending
==============================  ==============  =========================================================

The presses are ``snapkv``, ``streaming_llm`` and ``observed_attention`` of kvpress (parameters in the metadata), and
``accumulated_attention``, which is not in kvpress: the column sums that `ObservedAttentionPress` starts from, without
its division by the number of queries that see a key, averaged over the query heads of each key-value head.

Checked before anything is written: the recorded queries and keys reproduce the model's own attention; every press
saw the same queries, keys and values and left the output as it is without one; the cache holds just the kept keys
and values; SnapKV's two ways to its window's attention agree; no kept set hangs on rounding.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (  # pyright: ignore[reportMissingImports]
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
)
from kvpress.utils import get_prerope_query_states  # pyright: ignore[reportMissingImports]
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import rotate_half

SEED = 26
"""Of the first forty, the one whose kept sets are the least in doubt (`SMALLEST_MARGIN`)."""

TOKENS = 96
KEPT = 40
RATIO = 0.58
"""kvpress keeps int(T · (1 - ratio)): int(40.32), far from the next integer on both sides."""

CONFIG: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}

ATTENTION_TOLERANCE = 1e-5
"""Largest difference from the model's own attention, entry by entry and column sum by column sum."""

SMALLEST_MARGIN = 1e-4
"""Between the last score kept and the first one dropped; rounding in float32 moves a score by about 1e-6 at most."""


@dataclass
class AccumulatedAttentionPress(ScorerPress):
    """Raw column sums of the attention matrix, mean over the query heads of each key-value head; not in kvpress."""

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Sum over queries, then mean over query heads."""
        batch, groups, tokens, _ = keys.shape
        return attentions.sum(2).view(batch, groups, -1, tokens).mean(2)


def make_presses() -> dict[str, ScorerPress]:
    """The presses by the name they have in the file."""
    return {
        "snapkv": SnapKVPress(compression_ratio=RATIO, window_size=8, kernel_size=5),
        "streaming_llm": StreamingLLMPress(compression_ratio=RATIO, n_sink=4),
        "observed_attention": ObservedAttentionPress(compression_ratio=RATIO),
        "accumulated_attention": AccumulatedAttentionPress(compression_ratio=RATIO),
    }


@dataclass
class Seen:
    """What a press saw in one layer, and what it made of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    attention: Tensor
    score: Tensor


def post_rope_query(module: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Queries ``[B, H, T, D]`` of a layer, as kvpress makes them from its input."""
    query = get_prerope_query_states(module, hidden)
    cos, sin = (part.unsqueeze(1) for part in position_embeddings)
    return query * cos + rotate_half(query) * sin


def recording(score: Callable[..., Tensor], seen: list[Seen]) -> Callable[..., Tensor]:
    """Wrap a press's `score`, so that what goes in and comes out is noted, layer by layer."""

    def wrapped(
        module: nn.Module, hidden: Tensor, keys: Tensor, values: Tensor, attentions: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        result = score(module, hidden, keys, values, attentions, kwargs)
        if isinstance(getattr(score, "__self__", None), SnapKVPress):
            # Handed no attention, as under a fused implementation, SnapKV computes its window's itself.
            computed = score(module, hidden, keys, values, None, kwargs)
            torch.testing.assert_close(computed, result, rtol=0, atol=ATTENTION_TOLERANCE)
        query = post_rope_query(module, hidden, kwargs["position_embeddings"])
        seen.append(Seen(*(t.clone() for t in (query, keys, values, attentions, result))))
        return result

    return wrapped


def check_attention(seen: Seen) -> float:
    """Largest difference of a column sum of softmax(q·kᵀ/√d), in float64, from that of the model's attention."""
    heads, groups = seen.query.shape[1], seen.key.shape[1]
    key = seen.key.repeat_interleave(heads // groups, dim=1).double()
    logits = seen.query.double() @ key.transpose(2, 3) / math.sqrt(key.shape[-1])
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    weights, used = logits.masked_fill(future, -math.inf).softmax(-1), seen.attention.double()
    torch.testing.assert_close(weights, used, rtol=0, atol=ATTENTION_TOLERANCE)
    torch.testing.assert_close(weights.sum(2), used.sum(2), rtol=0, atol=ATTENTION_TOLERANCE)
    return float((weights.sum(2) - used.sum(2)).abs().max())


def kept_positions(score: Tensor) -> tuple[Tensor, float]:
    """Positions of the best scores, ascending, and how far the first one dropped is below the last one kept."""
    ranked = score.sort(dim=-1, descending=True).values
    margin = float((ranked[..., KEPT - 1] - ranked[..., KEPT]).min())
    assert margin > SMALLEST_MARGIN, f"a kept set hangs on {margin:.1e}; take another SEED"
    return score.topk(KEPT, dim=-1).indices.sort(dim=-1).values, margin


def assert_cached(kept: Tensor, before: Tensor, after: Tensor) -> None:
    """Check that the cache holds the kept positions of what was there and nothing else, in whatever order."""
    expected = before.gather(2, kept.unsqueeze(-1).expand(-1, -1, -1, before.shape[-1]))
    assert after.shape == expected.shape
    for group in range(before.shape[1]):
        rows, wanted = after[0, group].tolist(), expected[0, group].tolist()
        assert sorted(rows) == sorted(wanted)


@torch.no_grad()
def record() -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run every press over the prompt and check what it saw.

    Returns
    -------
    dict of str to Tensor
        The tensors of the file.
    dict of str to str
        Its metadata.
    """
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).eval()
    model.set_attn_implementation("eager")
    input_ids = torch.randint(0, CONFIG["vocab_size"], (1, TOKENS))
    plain = model(input_ids, past_key_values=DynamicCache()).logits
    tensors = {"inputs.input_ids": input_ids}
    tensors |= {f"weights.{name}": weight.clone() for name, weight in model.model.state_dict().items()}

    presses = make_presses()
    reference: list[Seen] = []
    errors, margins = [], {}
    for name, press in presses.items():
        seen: list[Seen] = []
        press.score = recording(press.score, seen)
        cache: Any = DynamicCache()
        with press(model):
            logits = model(input_ids, past_key_values=cache).logits
        assert torch.equal(logits, plain), "compression must not reach the prefill"
        assert len(seen) == CONFIG["num_hidden_layers"]
        reference = reference or seen
        margins[name] = math.inf
        for i, (layer, first) in enumerate(zip(seen, reference, strict=True)):
            for part in ("query", "key", "value"):
                assert torch.equal(getattr(layer, part), getattr(first, part))
                tensors[f"layer{i}.{part}"] = getattr(layer, part)
            errors.append(check_attention(layer))
            kept, margin = kept_positions(layer.score)
            margins[name] = min(margins[name], margin)
            assert_cached(kept, layer.key, cache.layers[i].keys)
            assert_cached(kept, layer.value, cache.layers[i].values)
            tensors[f"layer{i}.{name}.score"] = layer.score
            tensors[f"layer{i}.{name}.kept"] = kept

    versions = {name: version(name) for name in ("kvpress", "transformers", "torch", "safetensors")}
    metadata = {
        "made_by": "tests/data/kvpress/make_scores.py",
        "versions": json.dumps({"python": platform.python_version(), **versions}),
        "model_class": type(model).__name__,
        "model_config": json.dumps(CONFIG),
        "attn_implementation": "eager",
        "seed": str(SEED),
        "tokens": str(TOKENS),
        "n_kept": str(KEPT),
        "presses": json.dumps({n: {"class": type(p).__name__, **asdict(p)} for n, p in presses.items()}),
        "largest_attention_sum_error": f"{max(errors):.2e}",
        "smallest_margins": json.dumps({name: float(f"{margin:.2e}") for name, margin in margins.items()}),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata


def main(path: Path) -> None:
    """Write the file and say what it holds."""
    tensors, metadata = record()
    save_file(tensors, path, metadata)
    for name, value in metadata.items():
        print(f"{name}: {value}")
    for name, tensor in tensors.items():
        if not name.startswith("weights."):
            print(f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python tests/data/kvpress/make_scores.py FILE", file=sys.stderr)
        raise SystemExit(2)
    main(Path(sys.argv[1]))

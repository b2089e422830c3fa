"""A cache of keys and values (this project) vs. a cache of hidden states (the authors' release).

    python tests/benchmarks/carrier.py [--out results.json] [--full 0]
    python tests/benchmarks/carrier.py --device cuda --dtype bfloat16 --layers 28 --hidden 3584 --heads 28 \
        --kv-heads 4 --ffn 18944 --memory 8192 --chunk 1024 --full 720000

For every retained token and layer the release stores the layer's input hidden state and its rotary cos and sin, and
projects keys and values of all of them again for every chunk. This file implements that as fast as plain modules allow
(without queries for retained tokens) and compares it with `omnimem` in the release's settings; scores and retained
tokens are the same. `--full N` adds a step over an uncompressed cache of N tokens. The variants alternate; reported are
medians, and all bytes stored between two chunks (`bytes_of` in `cost.py`; for the hidden-state cache its hidden states,
cos and sin, metadata and scores). By default `omnimem` stores hidden states in addition to keys and values, to compute
redundancy exactly, and needs more memory than the hidden-state cache; with `redundancy=sketch` it needs less.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from typing import Any

import torch
from cost import Run, add_shape, build_decoder, bytes_of, clock
from report import new_parser, write_report
from torch import Tensor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

from omnimem.memory import attention_scores, lower_right_attention
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import build_selection
from omnimem.selection.redundancy import neighbour_similarity
from omnimem.selection.topk import topk_mask


class HiddenStateCache:
    """The cache of hidden states of the release."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self.model, self.args = model, args
        self.hidden: list[Tensor] = []
        self.angles: list[tuple[Tensor, Tensor]] = []
        self.kinds: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.seen = 0
        for _ in range(-(-args.memory // args.chunk) + 2):
            self.step()

    @torch.no_grad()
    def step(self) -> float:
        """Seconds of a chunk: forward, scores, eviction."""
        args, model = self.args, self.model
        hidden = torch.randn(1, args.chunk, args.hidden, device=args.device, dtype=model.dtype)
        position_ids = (self.seen + torch.arange(args.chunk, device=args.device)).expand(3, 1, -1)
        kinds = torch.tensor([([VISUAL] * 5 + [AUDIO]) * args.chunk], dtype=torch.int8, device=args.device)
        kinds = kinds[:, : args.chunk]
        self.seen += args.chunk
        started = clock(args.device)
        new = model.rotary_emb(hidden, position_ids)
        memory = []
        for number, layer in enumerate(model.layers):
            every, (cos, sin), kind = hidden, new, kinds
            if self.hidden:
                every = torch.cat((self.hidden[number], hidden), 1)
                cos, sin = (torch.cat(pair, 1) for pair in zip(self.angles[number], new, strict=True))
                kind = torch.cat((self.kinds[number], kinds), 1)
            hidden, scores = self._layer(layer, every, hidden, cos, sin)
            if self.hidden:
                old = self.scores[number]
                scores[:, : old.shape[1]] = (scores[:, : old.shape[1]] + old) / 2
            retained = self._retained(every, scores, kind)
            memory.append(
                (every[:, retained], (cos[:, retained], sin[:, retained]), kind[:, retained], scores[:, retained])
            )
        self.hidden, self.angles, self.kinds, self.scores = map(list, zip(*memory, strict=True))
        return clock(args.device) - started

    def _layer(self, layer: Any, every: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """One decoder layer: output of the chunk's tokens, attention scores of all tokens."""
        attention, chunk = layer.self_attn, self.args.chunk
        normed = layer.input_layernorm(every)

        def heads(states: Tensor) -> Tensor:
            return states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
        query = heads(attention.q_proj(normed[:, -chunk:]))
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -chunk:], sin[:, -chunk:])
        key, _ = apply_rotary_pos_emb(key, key, cos, sin)
        output = lower_right_attention(query, key, value)
        hidden = hidden + attention.o_proj(output.transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return hidden, attention_scores(query, key, kind="concat")

    def _retained(self, every: Tensor, scores: Tensor, kinds: Tensor) -> Tensor:
        """Indices of retained tokens: highest ψ of the release, five visual tokens per audio token."""
        similarity = neighbour_similarity(every.float(), torch.ones_like(kinds, dtype=torch.bool))
        score = 0.02 * torch.log(scores + 1e-12) + torch.log((1 - similarity).clamp_min(0) + 1e-12) / 2
        visual = round(self.args.memory * 5 / 6)
        keep = topk_mask(score, kinds == VISUAL, visual) | topk_mask(score, kinds == AUDIO, self.args.memory - visual)
        return keep[0].nonzero()[:, 0]

    def bytes(self) -> dict[str, int]:
        """Bytes by part, and their sum."""
        parts = {
            "hidden states": sum(tensor.nbytes for tensor in self.hidden),
            "cos and sin": sum(tensor.nbytes for pair in self.angles for tensor in pair),
            "metadata": sum(tensor.nbytes for tensor in self.kinds),
            "scores": sum(tensor.nbytes for tensor in self.scores),
        }
        return {**parts, "all": sum(parts.values())}


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("--full", type=int, default=0, metavar="N", help="also over an uncompressed cache of N")
    add_shape(parser)
    args = parser.parse_args()
    model = build_decoder(args)
    makers: dict[str, Any] = {
        "hidden-state cache (release)": lambda: HiddenStateCache(model, args),
        "omnimem, variant=release": lambda: Run(model, build_selection("omnimem", variant="release"), args),
        "omnimem, default": lambda: Run(model, build_selection("omnimem"), args),
        "omnimem, redundancy=sketch": lambda: Run(model, build_selection("omnimem", redundancy="sketch"), args),
    }
    if args.full:
        makers[f"full cache of {args.full}"] = lambda: Run(model, build_selection("full"), args, args.full)
    runs = {name: make() for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            step = run.step()
            times[name].append(step if isinstance(step, float) else step["step"])
    rows = []
    held = {
        name: run.bytes() if isinstance(run, HiddenStateCache) else bytes_of(run.cache) for name, run in runs.items()
    }
    release = "hidden-state cache (release)"
    base = statistics.median(times[release])
    print(f"{'memory':<34}{'ms per chunk':>13}{'ratio':>8}{'tokens/s':>11}{'MiB':>8}{'ratio':>8}")
    for name, parts in held.items():
        seconds, size = statistics.median(times[name]), parts["all"]
        ratios = {"ratio": seconds / base, "memory_ratio": size / held[release]["all"]}
        rows.append({"memory": name, "seconds": seconds, **ratios, "bytes": parts})
        print(
            f"{name:<34}{seconds * 1e3:>13.0f}{ratios['ratio']:>8.2f}{args.chunk / seconds:>11.0f}"
            f"{size / 2**20:>8.0f}{ratios['memory_ratio']:>8.2f}"
        )
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    shape = {k: v for k, v in vars(args).items() if k != "out"}
    report = {"shape": shape, "device": device, "threads": torch.get_num_threads(), "rows": rows}
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Cost of selection: the same chunk step with and without it, and where the difference is spent.

    python tests/benchmarks/cost.py [--out results.json] [--device cuda] [--layers 4 --hidden 1024 …]

One process, a random Qwen2.5-Omni decoder (by default 4 layers of hidden 1,024, 8 heads of 128, 2 key-value heads,
feed-forward 4,096), a full cache of 8,192 tokens per layer, chunks of 512. "No selection" evicts the oldest tokens, so
all steps attend to the same number of keys. The variants alternate, so that other load on the machine affects them
equally. Reported are medians and their ratios, and all bytes of the cache between two chunks: keys and values, features
(hidden states or their sketches), metadata (index, position ids, time, modality), attention scores, and unused space in
the buffers.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import Any

import torch
from report import new_parser, write_report
from torch import Tensor
from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

from omnimem.budget import BudgetProfile
from omnimem.memory import CompressedCache, attach, attention_scores, attention_with_scores, lower_right_attention
from omnimem.memory.codec import KvDtype
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import Candidates, SelectionMethod, build_selection
from omnimem.selection.learned import Learned


class Recent(SelectionMethod):
    """Retain the newest tokens: the cost of a cache of this size without selection."""

    def score(self, candidates: Candidates) -> Tensor:
        """The index in the stream."""
        return candidates.metadata.index.double()


VARIANTS: dict[str, SelectionMethod] = {
    "no selection": Recent(),
    "learned": build_selection("learned"),
    "novelty": build_selection("novelty"),
    "omnimem, exact": build_selection("omnimem", query_stride=1),
    "omnimem, every 4th query": build_selection("omnimem", query_stride=4),
    "omnimem, every 4th, sketch": build_selection("omnimem", query_stride=4, redundancy="sketch"),
    **{name: build_selection(name) for name in ("random", "h2o", "snapkv", "streaming_llm", "infinipot_v")},
}


def build_decoder(args: argparse.Namespace) -> Qwen2_5OmniThinkerTextModel:
    """A random decoder of the requested shape."""
    torch.manual_seed(0)
    dim = args.hidden // args.heads
    sections = [dim // 8, (dim // 2 - dim // 8) // 2, (dim // 2 - dim // 8) // 2]
    config = Qwen2_5OmniTextConfig(
        vocab_size=256,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        rope_parameters={"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6},
    )
    model = Qwen2_5OmniThinkerTextModel(config).to(args.device, getattr(torch, args.dtype)).eval()
    attach(model)
    return model


ENCODED: dict[str, KvDtype] = {"no selection, int8": "int8", "no selection, int4": "int4"}
"""Variants without selection whose stored keys and values are encoded."""


class Run:
    """One variant: its full cache, and a step that can be timed."""

    def __init__(
        self,
        model: Qwen2_5OmniThinkerTextModel,
        method: SelectionMethod,
        args: argparse.Namespace,
        fill: int | None = None,
        kv_dtype: KvDtype = "auto",
    ) -> None:
        self.model, self.args = model, args
        if isinstance(method, Learned):
            for head in method.new_heads(args.layers, args.hidden):
                head.to(args.device)
        self.cache = CompressedCache(BudgetProfile.uniform(model.config, args.memory), method, kv_dtype=kv_dtype)
        self.seen = 0
        kinds = [VISUAL] * 5 + [AUDIO]
        self.modality = torch.tensor([kinds * args.chunk], device=args.device)[:, : args.chunk]
        self.time = torch.arange(args.chunk, device=args.device)[None] // 64 * 1.0
        for _ in range(-(-args.memory // args.chunk) + 2 if fill is None else fill // args.chunk):
            self.step()

    def step(self) -> dict[str, float]:
        """Process one chunk; seconds of forward and of compression."""
        args = self.args
        embeds = torch.randn(1, args.chunk, args.hidden, device=args.device, dtype=self.model.dtype)
        position_ids = (self.seen + torch.arange(args.chunk, device=args.device)).expand(3, 1, -1)
        self.seen += args.chunk
        with torch.no_grad():
            started = clock(args.device)
            self.model(
                inputs_embeds=embeds,
                position_ids=position_ids,
                past_key_values=self.cache,
                use_cache=True,
                modality=self.modality,
                time=self.time + self.seen,
            )
            forward = clock(args.device)
            self.cache.compress()
            done = clock(args.device)
        return {"step": done - started, "forward": forward - started, "compress": done - forward}


def clock(device: str) -> float:
    """Seconds, after all work queued on the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bytes_of(cache: Any) -> dict[str, int]:
    """Bytes of a cache by part, and their sum."""

    def size(name: str) -> int:
        held = [getattr(layer.state, name) for layer in cache.layers]
        return sum(getattr(one, "stored_nbytes", None) or one.nbytes for one in held if one is not None)

    parts = {
        "keys and values": cache.kv_nbytes,
        "features": size("features"),
        "metadata": size("metadata"),
        "scores": size("attention_scores"),
    }
    return {**parts, "spare": cache.nbytes - sum(parts.values()), "all": cache.nbytes}


def time_attention(args: argparse.Namespace, rounds: int) -> dict[str, float]:
    """Median seconds of attention and of attention scores alone, with a full cache."""
    dim = args.hidden // args.heads
    keys = args.memory + args.chunk
    dtype = getattr(torch, args.dtype)
    query = torch.randn(1, args.heads, args.chunk, dim, device=args.device, dtype=dtype)
    key, value = (torch.randn(1, args.kv_heads, keys, dim, device=args.device, dtype=dtype) for _ in range(2))
    jobs = {
        "attention": lambda: lower_right_attention(query, key, value),
        "attention with scores": lambda: attention_with_scores(query, key, value),
        "scores": lambda: attention_scores(query, key),
        "scores, every 4th query": lambda: attention_scores(query, key, stride=4),
    }
    times: dict[str, list[float]] = {name: [] for name in jobs}
    with torch.no_grad():
        for number in range(rounds + 1):
            for name, job in jobs.items():
                started = clock(args.device)
                job()
                if number:
                    times[name].append(clock(args.device) - started)
    return {name: statistics.median(values) for name, values in times.items()}


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options for the decoder's shape and the number of rounds."""
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    for name, default in {
        "layers": 4, "hidden": 1024, "heads": 8, "kv-heads": 2, "ffn": 4096, "memory": 8192, "chunk": 512,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = new_parser(__doc__)
    add_shape(parser)
    parser.add_argument("--only", help="variants, separated by semicolons; `no selection` must be among them")
    args = parser.parse_args()
    model = build_decoder(args)
    wanted = args.only.split(";") if args.only else [*VARIANTS, *ENCODED]
    runs = {name: Run(model, method, args) for name, method in VARIANTS.items() if name in wanted}
    runs |= {name: Run(model, Recent(), args, kv_dtype=kind) for name, kind in ENCODED.items() if name in wanted}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run.step())
    median = {
        name: {part: statistics.median(one[part] for one in found) for part in found[0]}
        for name, found in times.items()
    }
    held = {name: bytes_of(run.cache) for name, run in runs.items()}
    base, smallest = median["no selection"]["step"], held["no selection"]["all"]
    rows = []
    print(f"{'variant':<28}{'ms per chunk':>13}{'ratio':>8}{'forward':>9}{'compress':>10}{'MiB':>8}{'ratio':>8}")
    for name, found in median.items():
        size = held[name]["all"]
        ratios = {"ratio": found["step"] / base, "memory_ratio": size / smallest}
        rows.append({"variant": name, **ratios, **found, "bytes": held[name]})
        print(
            f"{name:<28}{found['step'] * 1e3:>13.0f}{ratios['ratio']:>8.2f}{found['forward'] * 1e3:>9.0f}"
            f"{found['compress'] * 1e3:>10.0f}{size / 2**20:>8.0f}{ratios['memory_ratio']:>8.2f}"
        )
    alone = time_attention(args, args.rounds)
    for name, seconds in alone.items():
        print(f"{name + ' alone':<28}{seconds * 1e3:>13.0f}{seconds / alone['attention']:>8.2f} of attention")
    shape = {k: v for k, v in vars(args).items() if k != "out"}
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    report = {
        "shape": shape,
        "device": device,
        "threads": torch.get_num_threads(),
        "variants": rows,
        "alone": alone,
    }
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

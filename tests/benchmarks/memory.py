"""Memory by stream length: peak memory in the first 12 chunks and in 120 chunks, for every method.

    python tests/benchmarks/memory.py [--out results.json] [--budget 512] [--methods omnimem,h2o]

Each method runs in a new process that streams 120 chunks of 48 visual and 16 audio tokens (random embeddings, 4 frames
of 12 patches) through a random decoder of 8 layers with 8 key-value heads of 64. Keys and values take 32 KiB per token,
so a cache of 512 tokens takes 16 MiB, and a chunk that is not evicted 2 MiB. The cache is full after chunk 8. Two
numbers are reported, each as the peak in the first 12 chunks and the peak in all 120:

- memory: bytes of the cache by part: keys and values, features (hidden states, for methods that store them), metadata
  (index, position ids, time, modality), scores, and "spare", the unused space in the buffers;
- process: the peak resident set above its level right before the stream, with the cache, the activations of a chunk and
  all other allocations. Linux only.

A method is bounded if neither grows by more than its limit; `full` evicts nothing and is the counterexample.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

from report import new_parser, run_child, write_report

from omnimem.selection import untrained_methods

FRAMES, PATCHES, AUDIO_TOKENS = 4, 12, 16
SHORT, LONG = 12, 120
SHAPE = {"layers": 8, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 256}
MEMORY_LIMIT, PROCESS_LIMIT = 1.001, 1.03
"""Largest ratio of long to short: cache bytes are exact, the resident set includes pages of the allocator."""


def peak_resident(reset: bool = False) -> int:
    """Peak resident set of the process since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run(method: str, budget: int) -> dict[str, Any]:
    """Stream `LONG` chunks; peak bytes in the first `SHORT` chunks and in all."""
    from types import SimpleNamespace

    import torch
    from cost import build_decoder, bytes_of

    from omnimem.backbones import ChunkInputs, load_backbone
    from omnimem.budget import BudgetProfile
    from omnimem.forward import Stream
    from omnimem.memory import CompressedCache
    from omnimem.modality import AUDIO, VISUAL
    from omnimem.selection import build_selection

    decoder = build_decoder(argparse.Namespace(**SHAPE, device="cpu", dtype="float32"))
    texts = load_backbone("tiny")
    backbone: Any = SimpleNamespace(
        language_model=decoder,
        spatial_ids_advance=False,
        text_ids=texts.text_ids,
        question_ids=texts.question_ids,
        embed=lambda ids: torch.randn(1, ids.shape[1], SHAPE["hidden"]),
    )
    cache = CompressedCache(BudgetProfile.uniform(decoder.config, budget, 3.0), build_selection(method))
    stream = Stream(backbone, cache)
    patch = torch.arange(FRAMES * PATCHES) % PATCHES
    frame = torch.arange(FRAMES * PATCHES) // PATCHES
    audio = torch.arange(AUDIO_TOKENS) * FRAMES // AUDIO_TOKENS
    height, width = (torch.cat((ids, audio)) for ids in (patch // 4, patch % 4))
    second = torch.cat((frame, audio))
    modality = torch.tensor([[VISUAL] * len(frame) + [AUDIO] * len(audio)], dtype=torch.int8)

    def chunk(number: int) -> ChunkInputs:
        time = number * FRAMES + second
        return ChunkInputs(
            embeds=torch.randn(1, len(second), SHAPE["hidden"]),
            position_ids=torch.stack((time, height, width))[:, None],
            modality=modality,
            time=time[None].float(),
            next_position_id=torch.tensor([(number + 1) * FRAMES]),
        )

    peak = bytes_of(cache)

    def note(*_: object) -> None:
        nonlocal peak
        peak = max(peak, bytes_of(cache), key=lambda parts: parts["all"])

    decoder.register_forward_hook(note)
    result = {}
    with torch.no_grad():
        # Warm-up: threads and kernels that a process sets up once.
        decoder(inputs_embeds=chunk(0).embeds, position_ids=chunk(0).position_ids, use_cache=False)
        before = peak_resident(reset=True)
        for number in range(LONG):
            stream.step(chunk(number))
            if number + 1 in (SHORT, LONG):
                process = peak_resident() - before
                result[number + 1] = {"memory": peak, "process": process, "retained": max(cache.lengths())}
    return {"method": method, "level_before": before, "short": result[SHORT], "long": result[LONG]}


def measure(method: str, budget: int) -> dict[str, Any]:
    """`run` in a new process, with the ratios of long to short."""
    row = run_child(__file__, "--child", method, "--budget", str(budget))
    row["memory_ratio"] = row["long"]["memory"]["all"] / row["short"]["memory"]["all"]
    row["process_ratio"] = row["long"]["process"] / row["short"]["process"]
    return row


def main() -> int:
    """Measure and report; exit 1 if a method other than `full` grows."""
    parser = new_parser(__doc__)
    parser.add_argument("--budget", type=int, default=512, help="tokens per layer (default: %(default)s)")
    parser.add_argument(
        "--methods",
        default=",".join(untrained_methods()),
        help="separated by commas (default: all without trained heads)",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(args.child, args.budget)))
        return 0
    rows = []
    print(f"peak MiB in {SHORT} → {LONG} chunks, {args.budget} tokens per layer")
    for method in args.methods.split(","):
        row = measure(method, args.budget)
        rows.append(row)
        short, long = row["short"], row["long"]
        parts = ", ".join(f"{name} {size / 2**20:.1f}" for name, size in long["memory"].items() if name != "all")
        print(
            f"{method:>20}: memory {short['memory']['all'] / 2**20:.1f} → {long['memory']['all'] / 2**20:.1f} "
            f"({row['memory_ratio']:.3f}x), process {short['process'] / 2**20:.1f} → {long['process'] / 2**20:.1f} "
            f"({row['process_ratio']:.3f}x); {parts}",
            flush=True,
        )
    about = {"machine": platform.machine(), "python": platform.python_version(), "shape": SHAPE}
    about |= {"chunk": FRAMES * PATCHES + AUDIO_TOKENS, "chunks": [SHORT, LONG], "budget": args.budget}
    write_report(args.out, {**about, "rows": rows})
    bounded = [row for row in rows if row["method"] != "full"]
    return int(any(row["memory_ratio"] > MEMORY_LIMIT or row["process_ratio"] > PROCESS_LIMIT for row in bounded))


if __name__ == "__main__":
    raise SystemExit(main())

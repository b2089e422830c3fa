"""Is memory flat in the length of the stream? Peak bytes of a stream and of one 10 times longer, for every method.

    python tests/benchmarks/memory.py [--out results.json]

Both streams run in a fresh process each through the real language-model path (tiny Qwen2.5-Omni, random embeddings in
the model's own layout, chunk by chunk, compaction in place). Reported: the largest number of bytes the memory held, the
largest allocation of the process above its level after the first chunks (peak resident set), and the same for the
`full` method, which grows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import resource
from pathlib import Path
from typing import Any

from omnimem.selection import SELECTION_METHODS

CHUNK_SECONDS = 4
SHORT_CHUNKS, TIMES, LIMIT = 60, 10, 1.01


def run(method: str, chunks: int, budget: int) -> dict[str, float]:
    """Stream `chunks` chunks of 4 s; returns bytes and MiB of the peak."""
    import torch

    from omnimem.backbones import ChunkInputs, load_backbone
    from omnimem.budget import BudgetProfile
    from omnimem.forward import Stream
    from omnimem.memory import CompressedCache
    from omnimem.modality import AUDIO, VISUAL
    from omnimem.selection import build_selection

    torch.manual_seed(0)
    backbone = load_backbone("tiny")
    cache = CompressedCache(BudgetProfile.uniform(backbone.config, budget), build_selection(method))
    stream = Stream(backbone, cache)
    width = backbone.config.text_config.hidden_size
    visual, audio = 15 * CHUNK_SECONDS // 2, 25 * CHUNK_SECONDS
    length = visual + audio
    modality = torch.tensor([[VISUAL] * visual + [AUDIO] * audio], dtype=torch.int8)
    peak_bytes = 0
    with torch.no_grad():
        for number in range(chunks):
            positions = (number * length + torch.arange(length)).expand(3, 1, -1)
            stream.step(
                ChunkInputs(
                    embeds=torch.randn(1, length, width),
                    positions=positions,
                    modality=modality,
                    time=torch.full((1, length), float(number * CHUNK_SECONDS)),
                    next_position=torch.tensor([(number + 1) * length]),
                )
            )
            peak_bytes = max(peak_bytes, cache.nbytes)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"memory_bytes": peak_bytes, "process_mib": resident, "retained": max(cache.lengths())}


def measure(method: str, budget: int) -> dict[str, Any]:
    """The short and the long stream, each in its own process."""
    context = multiprocessing.get_context("spawn")
    results = []
    for chunks in (SHORT_CHUNKS, SHORT_CHUNKS * TIMES):
        with context.Pool(1) as pool:
            results.append(pool.apply(run, (method, chunks, budget)))
    short, long = results
    return {
        "method": method,
        "short": short,
        "long": long,
        "memory_ratio": long["memory_bytes"] / short["memory_bytes"],
        "process_ratio": long["process_mib"] / short["process_mib"],
    }


def main() -> int:
    """Measure and report; exit 1 when a bounded method grew by more than 1 %."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--budget", type=int, default=1024, help="positions a layer (default: %(default)s)")
    args = parser.parse_args()
    rows = [measure(method, args.budget) for method in SELECTION_METHODS]
    print(f"{SHORT_CHUNKS} against {SHORT_CHUNKS * TIMES} chunks of {CHUNK_SECONDS} s, {args.budget} positions a layer")
    for row in rows:
        print(
            f"{row['method']:>20}: memory {row['memory_ratio']:.3f}x, process {row['process_ratio']:.3f}x "
            f"({row['short']['process_mib']:.0f} → {row['long']['process_mib']:.0f} MiB)"
        )
    if args.out:
        report = {"machine": platform.machine(), "python": platform.python_version(), "rows": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    bounded = [row for row in rows if row["method"] != "full"]
    return int(any(row["memory_ratio"] > LIMIT or row["process_ratio"] > LIMIT for row in bounded))


if __name__ == "__main__":
    raise SystemExit(main())

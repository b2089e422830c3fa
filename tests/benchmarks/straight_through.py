"""Cost of a gradient through the selection: a training step with `straight_through` vs. `none`.

    python tests/benchmarks/straight_through.py [--out results.json] [--steps 4]

A step is forward and backward over 16 chunks of 256 random embeddings through a Qwen2.5-Omni decoder (width 256, 4
layers, float32, LoRA, 512 tokens per layer), with a question after every 4th chunk, on one thread. Each setting runs in
two new processes. One measures seconds (median of the steps after a warm-up; the settings alternate), the other bytes:

- `live`: peak bytes of tensors above those before the step, as reported by the allocator: the device memory of a step
  in addition to the weights;
- `stored`: peak bytes in the offload store, which is on disk here and in no other number;
- `process`: peak resident set, and `grown`, its increase over the level before the step.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import new_parser, run_child, write_report
from training_memory import AUDIO, VISUAL, WIDTH, Peak, chunk, decoder, resident

GRADIENTS = ("none", "straight_through")
LAYERS, BUDGET, CHUNKS, ASKED = 4, 512, 16, 4


def run(backbone: Any, gradient: str, folder: Path) -> int:
    """One training step; returns the number of bytes written to the store."""
    from omnimem.bptt import ChunkwiseBPTT
    from omnimem.budget import BudgetProfile, LayerBudget
    from omnimem.forward import Stream
    from omnimem.memory import CompressedCache, SelectionGradient
    from omnimem.memory.offload_store import DiskStore
    from omnimem.selection import build_selection

    stored = 0

    class Counted(DiskStore):
        def put(self, record: Any) -> Any:
            nonlocal stored
            handle = super().put(record)
            stored += handle.tensors.stat().st_size + len(handle.structure)
            return handle

    budget = LayerBudget(BUDGET * 5 // 8, BUDGET * 3 // 8)
    learning = None if gradient == "none" else SelectionGradient(gradient)  # pyright: ignore[reportArgumentType]
    cache = CompressedCache(BudgetProfile((budget,) * LAYERS), build_selection("omnimem"), learning)
    stream = Stream(backbone, cache)
    tape = ChunkwiseBPTT(stream, Counted(folder))

    def loss(number: int) -> tuple[Any]:
        with cache.scratch():
            return (stream.forward(chunk(number, 8), text=True).square().mean(),)

    for number in range(CHUNKS):
        tape.step(chunk(number))
        if number % ASKED == ASKED - 1:
            tape.add_loss(lambda number=number: loss(number))
    tape.backward()
    return stored


def seconds(gradient: str, steps: int) -> list[float]:
    """Seconds of each step."""
    backbone, found = decoder(LAYERS), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 + steps):
            started = time.perf_counter()
            run(backbone, gradient, Path(folder))
            found.append(time.perf_counter() - started)
    return found[1:]


def memory(gradient: str) -> dict[str, int]:
    """Memory of one step, in bytes."""
    import torch

    backbone = decoder(LAYERS)
    with tempfile.TemporaryDirectory() as folder:
        run(backbone, gradient, Path(folder))  # warm-up: threads, kernels and gradients
        peak = Peak()
        peak.start()
        stored = run(backbone, gradient, Path(folder))
        peak.running = False
        peak.join()
        peak.peak = max(peak.peak, resident())
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            run(backbone, gradient, Path(folder))
    results: Any = profiler.profiler
    events = results.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = live = 0
    for _, change in sorted(changes, key=lambda one: one[0]):
        held += change
        live = max(live, held)
    return {"live": live, "stored": stored, "grown": peak.peak - peak.start_bytes, "process": peak.peak}


def main() -> int:
    """Measure and report."""
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each setting (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        import torch

        torch.set_num_threads(1)
        gradient, what = args.child
        print(json.dumps(memory(gradient) if what == "memory" else seconds(gradient, int(what))))
        return 0
    # Alternate, so that other load on the machine affects both settings.
    turns: dict[str, list[float]] = {gradient: [] for gradient in GRADIENTS}
    for _ in range(2):
        for gradient in GRADIENTS:
            turns[gradient] += run_child(__file__, "--child", gradient, str(-(-args.steps // 2)))
    rows = {
        gradient: {"seconds": statistics.median(turns[gradient]), **run_child(__file__, "--child", gradient, "memory")}
        for gradient in GRADIENTS
    }
    none, straight_through = (rows[gradient] for gradient in GRADIENTS)
    ratios = {name: straight_through[name] / none[name] for name in none}
    for name, ratio in ratios.items():
        unit, scale = ("s", 1) if name == "seconds" else ("MiB", 2**20)
        shown = [f"{row[name] / scale:7.2f} {unit}" for row in (none, straight_through)]
        print(f"{name:<8} none {shown[0]}, straight_through {shown[1]}: {ratio:.2f}x")
    shape = {"layers": LAYERS, "width": WIDTH, "chunk": VISUAL + AUDIO, "budget": BUDGET, "chunks": CHUNKS}
    report = {"machine": platform.machine(), "shape": shape, "rows": rows, "ratios": ratios}
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Memory of a training step by stream length: peak for a stream and for one 32 times longer.

    python tests/benchmarks/training_memory.py [--out results.json] [--chunks 8,64,256]

Each row is a new process that runs one training step: a stream of random embeddings through a Qwen2.5-Omni decoder
(LoRA, compressed cache), a question after every 4th chunk, exact gradients back to the first chunk. Reported are the
peak resident set above its level before the step, and the evicted tokens stored for the backward, which `offload=host`
stores in the same memory here and which are therefore reported separately. `autograd` is one backward through the whole
graph, whose activations and caches grow with the stream.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from report import new_parser, run_child, write_report

LIMIT = 1.15
VARIANTS = ("disk", "host", "disk, straight-through", "autograd")
LAYERS, WIDTH, VISUAL, AUDIO, BUDGET = 6, 256, 160, 96, 1024


def resident() -> int:
    """Resident set of the process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Peak resident set of the process while this thread runs, and its level at the start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident()
        self.running = True

    def run(self) -> None:
        """Sample every 5 ms."""
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)


def decoder(layers: int = LAYERS) -> Any:
    """The parts of a backbone that a stream needs: a Qwen2.5-Omni decoder with LoRA and random weights."""
    from types import SimpleNamespace

    import torch
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Qwen2_5OmniTextConfig, Qwen2_5OmniThinkerTextModel

    from omnimem.memory import attach

    torch.manual_seed(0)
    config = Qwen2_5OmniTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2**20, pad_token_id=0,
        rope_parameters={"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    )  # fmt: skip
    model: Any = Qwen2_5OmniThinkerTextModel(config).requires_grad_(False)
    attach(model)
    inject_adapter_in_model(LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj"]), model)
    return SimpleNamespace(language_model=model, device=torch.device("cpu"), spatial_ids_advance=False)


def chunk(number: int, size: int = VISUAL + AUDIO) -> Any:
    """The first `size` tokens of a chunk of random embeddings."""
    import torch

    from omnimem import modality
    from omnimem.backbones import ChunkInputs

    length = VISUAL + AUDIO
    return ChunkInputs(
        embeds=torch.randn(1, size, WIDTH, generator=torch.Generator().manual_seed(number)),
        position_ids=(number * length + torch.arange(size)).expand(3, 1, -1),
        modality=torch.tensor([[modality.VISUAL] * VISUAL + [modality.AUDIO] * AUDIO], dtype=torch.int8)[:, :size],
        time=torch.full((1, size), float(number)),
        next_position_id=torch.tensor([(number + 1) * length]),
    )


def step(variant: str, chunks: int) -> dict[str, Any]:
    """One training step over `chunks` chunks."""
    import torch

    from omnimem.bptt import ChunkwiseBPTT
    from omnimem.budget import BudgetProfile, LayerBudget
    from omnimem.forward import Stream
    from omnimem.memory import CompressedCache, SelectionGradient
    from omnimem.memory.offload_store import DiskStore
    from omnimem.selection import build_selection

    backbone = decoder()
    budget = LayerBudget(BUDGET * 5 // 8, BUDGET * 3 // 8)
    gradient = SelectionGradient() if "straight" in variant else None

    class Counted(DiskStore):
        """Host memory as used with a GPU; counts the bytes stored."""

        waiting = 0

        def __init__(self) -> None:
            pass

        def _away(self, block: Any) -> Any:
            Counted.waiting += block.nbytes
            return block

        def _back(self, kept: Any) -> Any:
            return kept

    with tempfile.TemporaryDirectory() as folder:
        store = {"host": Counted(), "autograd": None}.get(variant, DiskStore(Path(folder)))

        def run(count: int) -> None:
            cache = CompressedCache(BudgetProfile((budget,) * LAYERS), build_selection("omnimem"), gradient)
            stream = Stream(backbone, cache)

            def loss(number: int) -> tuple[torch.Tensor]:
                with cache.scratch():
                    return (stream.forward(chunk(number, 8), text=True).square().mean(),)

            if store is None:
                total = torch.zeros(())
                for number in range(count):
                    stream.step(chunk(number))
                    total = total + (loss(number)[0] if number % 4 == 3 else 0)
                total.backward()
                return
            tape = ChunkwiseBPTT(stream, store)
            for number in range(count):
                tape.step(chunk(number))
                if number % 4 == 3:
                    tape.add_loss(lambda number=number: loss(number))
            tape.backward()

        # Warm-up: threads and kernels that a process sets up once.
        run(8)
        Counted.waiting = 0
        peak = Peak()
        peak.start()
        started = time.perf_counter()
        run(chunks)
        seconds = time.perf_counter() - started
        peak.running = False
        peak.join()
    # The peak of the warm-up counts as well.
    grown = peak.peak - peak.start_bytes
    return {"variant": variant, "chunks": chunks, "grown": grown, "waiting": Counted.waiting, "seconds": seconds,
            "process": peak.peak}  # fmt: skip


def measure(variant: str, chunks: int) -> dict[str, Any]:
    """`step` in a new process."""
    return run_child(__file__, "--child", variant, str(chunks))


def main() -> int:
    """Measure and report; exit 1 if the longest stream needs more than 1.15 times the memory of the shortest."""
    parser = new_parser(__doc__)
    parser.add_argument("--chunks", default="8,64,256", help="lengths (default: %(default)s)")
    parser.add_argument("--longest-autograd", type=int, default=64, help="chunks (default: %(default)s)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step(args.child[0], int(args.child[1]))))
        return 0
    lengths = [int(text) for text in args.chunks.split(",")]
    rows, worst = [], 0.0
    for variant in VARIANTS:
        for chunks in lengths:
            if variant == "autograd" and chunks > args.longest_autograd:
                continue
            row = measure(variant, chunks)
            row["peak"] = row["grown"] - row["waiting"]
            rows.append(row)
            first = next(one for one in rows if one["variant"] == variant)
            row["ratio"] = row["peak"] / first["peak"]
            if variant != "autograd":
                worst = max(worst, row["ratio"])
            print(
                f"{variant:<24}{chunks:>5} chunks {chunks * (VISUAL + AUDIO):>7} tokens: "
                f"step {row['peak'] / 2**20:7.1f} MiB "
                f"({row['ratio']:.2f}x), offloaded {row['waiting'] / 2**20:6.1f} MiB, {row['seconds']:.1f} s",
                flush=True,
            )
    shape = {"layers": LAYERS, "width": WIDTH, "chunk": VISUAL + AUDIO, "budget": BUDGET}
    report = {"machine": platform.machine(), "shape": shape, "rows": rows}
    write_report(args.out, report)
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())

"""Does the memory of a training step depend on the length of the stream? Peak of a stream and of one 32 times longer.

    python tests/benchmarks/training_memory.py [--out results.json] [--chunks 8,64,256]

Each row is a process of its own that takes one training step: a stream of random embeddings through a decoder of the
Qwen2.5-Omni kind (LoRA, compressed memory), a question after every 4th chunk, gradients exact back to the first.
Reported is the process's peak resident set above its level before the step, and what waits for the way back, which
`offload=host` holds in the same memory here and which is therefore counted apart. `autograd` is one backward through
everything: its activations and memories grow with the stream.
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
    """Bytes of memory the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Most bytes of the process while this runs, above those at its start."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident()
        self.running = True

    def run(self) -> None:
        """Look every 5 ms."""
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.005)


def decoder(layers: int = LAYERS) -> Any:
    """As much of a backbone as a stream needs: a decoder of the Qwen2.5-Omni kind with LoRA, random weights."""
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
    """The first `size` positions of a chunk of random embeddings."""
    import torch

    from omnimem.backbones import ChunkInputs
    from omnimem.modality import AUDIO as SOUND
    from omnimem.modality import VISUAL as PICTURE

    length = VISUAL + AUDIO
    return ChunkInputs(
        embeds=torch.randn(1, size, WIDTH, generator=torch.Generator().manual_seed(number)),
        position_ids=(number * length + torch.arange(size)).expand(3, 1, -1),
        modality=torch.tensor([[PICTURE] * VISUAL + [SOUND] * AUDIO], dtype=torch.int8)[:, :size],
        time=torch.full((1, size), float(number)),
        next_position_id=torch.tensor([(number + 1) * length]),
    )


def step(variant: str, chunks: int) -> dict[str, Any]:
    """One training step over so many chunks."""
    import torch

    from omnimem.budget import BudgetProfile, LayerBudget
    from omnimem.forward import Stream
    from omnimem.memory import CompressedCache, SelectionGradient
    from omnimem.memory.store import DiskStore
    from omnimem.selection import build_selection
    from omnimem.tape import ChunkwiseBPTT

    backbone = decoder()
    budget = LayerBudget(BUDGET * 5 // 8, BUDGET * 3 // 8)
    gradient = SelectionGradient() if "straight" in variant else None

    class Counted(DiskStore):
        """Host memory as a GPU would use it, counted."""

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
                    tape.ask(lambda number=number: loss(number))
            tape.backward()

        # What every process pays once (threads, kernels) is paid before.
        run(8)
        Counted.waiting = 0
        peak = Peak()
        peak.start()
        started = time.perf_counter()
        run(chunks)
        seconds = time.perf_counter() - started
        peak.running = False
        peak.join()
    # The warm-up's own peak is part of what a step needs.
    grown = peak.peak - peak.start_bytes
    return {"variant": variant, "chunks": chunks, "grown": grown, "waiting": Counted.waiting, "seconds": seconds,
            "process": peak.peak}  # fmt: skip


def measure(variant: str, chunks: int) -> dict[str, Any]:
    """`step` in a process of its own, whose allocator gives freed memory back."""
    return run_child(__file__, "--child", variant, str(chunks))


def main() -> int:
    """Measure and report; exit 1 when the longest stream needs more than 1.15 times the shortest."""
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
                f"{variant:<24}{chunks:>5} chunks {chunks * (VISUAL + AUDIO):>7} positions: "
                f"step {row['peak'] / 2**20:7.1f} MiB "
                f"({row['ratio']:.2f}x), waiting in memory {row['waiting'] / 2**20:6.1f} MiB, {row['seconds']:.1f} s",
                flush=True,
            )
    shape = {"layers": LAYERS, "width": WIDTH, "chunk": VISUAL + AUDIO, "budget": BUDGET}
    report = {"machine": platform.machine(), "shape": shape, "rows": rows}
    write_report(args.out, report)
    return int(worst > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())

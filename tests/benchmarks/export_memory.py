"""How much host memory does an export take? Peak of the process over that after imports, for two sizes of checkpoint.

    python tests/benchmarks/export_memory.py [--out results.json] [--sizes 200,800]

For each size (MiB) one process builds a Qwen2.5-Omni with random weights in bfloat16 and a LoRA adapter on every
projection of its decoder; another imports the export, notes its resident set, exports, and notes its peak (VmHWM,
Linux), in which mapped files count as well. Reported is the difference as a multiple of the written checkpoint, and the
slope: bytes more for each byte more of checkpoint, from which what every process pays once has dropped out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LIMIT = 1.25
"""Copies of the checkpoint that the slope may show: one, and room for the module that is being merged."""

WIDTH = 1024
LAYER_BYTES = 2 * 9 * WIDTH**2
"""Of a decoder layer in bfloat16: 3 WIDTH² of attention with two key-value heads for four, 6 WIDTH² of MLP."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def status(name: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def build(folder: Path, mib: int) -> None:
    """Write ``folder/base`` of about so many MiB and ``folder/run`` with an adapter for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from omnimem.backbones import load_backbone
    from omnimem.backbones.qwen2_5_omni.tiny import build_tiny
    from omnimem.budget import PROFILE_FILE, BudgetProfile

    base = build_tiny(folder / "base", layers=round(mib * 2**20 / LAYER_BYTES), hidden=WIDTH)
    file = base / "model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    backbone = load_backbone(base, dtype="bfloat16", device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=backbone.lora_targets(PROJECTIONS),
        init_lora_weights=False,
        base_model_name_or_path=str(base),
    )
    get_peft_model(backbone.model, config).save_pretrained(str(folder / "run"))
    BudgetProfile.uniform(backbone.config).save(folder / "run" / PROFILE_FILE)


def export(folder: Path) -> dict[str, Any]:
    """Export ``folder/run``; bytes of the checkpoint, of the process before and of its peak, and seconds."""
    from train.export import export_run

    imported, started = status("VmRSS"), time.perf_counter()
    checked = export_run(folder / "run", folder / "merged", dtype="bfloat16")
    return {
        "checkpoint": sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors")),
        "imported": imported,
        "peak": status("VmHWM"),
        "stated": checked.peak_bytes,
        "seconds": time.perf_counter() - started,
    }


def measure(mib: int) -> dict[str, Any]:
    """Build and export, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        for job in ("build", "export"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", job, folder, str(mib)],
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                check=True,
            )
    row = json.loads(done.stdout.splitlines()[-1])
    return {**row, "copies": (row["peak"] - row["imported"]) / row["checkpoint"]}


def main() -> int:
    """Measure and report; exit 1 when memory grows by more than 1.25 bytes a byte of checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--sizes", default="200,800", help="two sizes in MiB (default: %(default)s)")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job, folder, mib = args.child
        print(json.dumps(build(Path(folder), int(mib)) if job == "build" else export(Path(folder))))
        return 0
    rows = []
    for mib in (int(text) for text in args.sizes.split(",")):
        rows.append(row := measure(mib))
        print(
            f"checkpoint {row['checkpoint'] / 2**20:6.0f} MiB: process {row['imported'] / 2**20:.0f} → "
            f"{row['peak'] / 2**20:.0f} MiB, {row['copies']:.2f} copies, {row['seconds']:.0f} s",
            flush=True,
        )
    small, large = rows[0], rows[-1]
    grown = (large["peak"] - large["imported"]) - (small["peak"] - small["imported"])
    slope = grown / (large["checkpoint"] - small["checkpoint"])
    print(f"{slope:.2f} bytes more for each byte more of checkpoint (limit {LIMIT})")
    if args.out:
        report = {"machine": platform.machine(), "python": platform.python_version(), "slope": slope, "rows": rows}
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return int(slope > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())

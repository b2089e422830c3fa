"""Host memory of an export: peak of the process above its level after imports, for two sizes of checkpoint.

    python tests/benchmarks/export_memory.py [--out results.json] [--sizes 200,800] [--backbones NAME,NAME]

For each model and size (MiB) one process builds a checkpoint of random weights in bfloat16 and a LoRA adapter on every
projection of the decoder's linear layers; another imports the export, reads its resident set, exports, and reads its
peak (VmHWM, Linux). Reported are the difference as a multiple of the written checkpoint, and the slope: additional
bytes of memory per additional byte of checkpoint, in which one-time costs of a process cancel.

Mapped files count in the resident set. The weights of a dense model are the mapped file until they are merged; experts
are joined while they are loaded, so their file is mapped in addition, in pages that the kernel can drop. Anonymous
memory, which it cannot drop, is sampled every 5 ms and reported as well.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from report import new_parser, run_child, write_report

LIMITS = {"qwen2_5_omni": 1.25, "qwen3_omni": 2.25}
"""Upper limit of resident bytes per byte of checkpoint: one copy (with experts: plus their file), and a tolerance."""

WIDTH = 1024
LAYER_MIB = {"qwen2_5_omni": 18, "qwen3_omni": 30}
"""Size of a decoder layer of this width in bfloat16."""

SHARD = "20MB"
"""Shard size, in the same proportion to these checkpoints as the default 2 GB to published ones."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def status(name: str) -> int:
    """Bytes of ``VmRSS``, ``VmHWM`` or ``RssAnon`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


class Anonymous(threading.Thread):
    """Peak of anonymous memory while this thread runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = status("RssAnon")

    def run(self) -> None:
        """Sample every 5 ms until the process ends."""
        while True:
            self.peak = max(self.peak, status("RssAnon"))
            time.sleep(0.005)


def build(folder: Path, name: str, mib: int) -> None:
    """Write ``folder/base`` of about `mib` MiB and ``folder/run`` with an adapter for it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from omnimem.backbones import backbone_class, load_backbone
    from omnimem.budget import PROFILE_FILE, BudgetProfile

    base = backbone_class(name).build_tiny(folder / "base", layers=round(mib / LAYER_MIB[name]), hidden=WIDTH)
    file = base / "model.safetensors"
    save_file({name: weight.bfloat16() for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    backbone = load_backbone(base, dtype="bfloat16", device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=backbone.lora_target_regex(PROJECTIONS),
        init_lora_weights=False,
        base_model_name_or_path=str(base),
    )
    get_peft_model(backbone.model, config).save_pretrained(str(folder / "run"))
    BudgetProfile.uniform(backbone.config).save(folder / "run" / PROFILE_FILE)


def export(folder: Path) -> dict[str, Any]:
    """Export ``folder/run``; bytes of the checkpoint and of the process before and at its peak, and seconds."""
    import train.export

    train.export.SHARD = SHARD
    anonymous = Anonymous()
    imported, started = status("VmRSS"), time.perf_counter()
    anonymous.start()
    checked = train.export.export_run(folder / "run", folder / "merged", dtype="bfloat16")
    return {
        "checkpoint": sum(file.stat().st_size for file in (folder / "merged").glob("*.safetensors")),
        "imported": imported,
        "peak": status("VmHWM"),
        "stated": checked.peak_rss_bytes,
        "anonymous": anonymous.peak - anonymous.start_bytes,
        "seconds": time.perf_counter() - started,
    }


def measure(name: str, mib: int) -> dict[str, Any]:
    """Build and export, each in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        run_child(__file__, "--child", "build", folder, name, str(mib))
        row = run_child(__file__, "--child", "export", folder, name, str(mib))
    return {"backbone": name, **row, "resident": row["peak"] - row["imported"]}


def main() -> int:
    """Measure and report; exit 1 if the slope exceeds the limit."""
    parser = new_parser(__doc__)
    parser.add_argument("--sizes", default="200,800", help="two sizes in MiB (default: %(default)s)")
    parser.add_argument("--backbones", default=",".join(LIMITS), help="(default: %(default)s)")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job, folder, name, mib = args.child
        print(json.dumps(build(Path(folder), name, int(mib)) if job == "build" else export(Path(folder))))
        return 0
    rows, slopes = [], {}
    for name in args.backbones.split(","):
        pair = []
        for mib in (int(text) for text in args.sizes.split(",")):
            pair.append(row := measure(name, mib))
            size = row["checkpoint"]
            print(
                f"{name:<14} checkpoint {size / 2**20:5.0f} MiB: process {row['imported'] / 2**20:.0f} → "
                f"{row['peak'] / 2**20:.0f} MiB, {row['resident'] / size:.2f} copies "
                f"({row['anonymous'] / size:.2f} anonymous), {row['seconds']:.0f} s",
                flush=True,
            )
        small, large = pair[0], pair[-1]
        bytes_more = large["checkpoint"] - small["checkpoint"]
        slopes[name] = {key: (large[key] - small[key]) / bytes_more for key in ("resident", "anonymous")}
        print(
            f"{name:<14} {slopes[name]['resident']:.2f} additional bytes per additional byte of checkpoint "
            f"(limit {LIMITS[name]}), {slopes[name]['anonymous']:.2f} of them anonymous"
        )
        rows += pair
    report = {"machine": platform.machine(), "python": platform.python_version(), "slopes": slopes, "rows": rows}
    write_report(args.out, report)
    return int(any(slope["resident"] > LIMITS[name] for name, slope in slopes.items()))


if __name__ == "__main__":
    raise SystemExit(main())

"""Kill a run three times at random moments and resume it: its adapter must equal that of an uninterrupted run.

    python tests/benchmarks/kill.py [--seed 0] [--kills 3] [key=value ...]

The run is the quickstart with `selection.gradient=straight_through`, distillation, random budgets in every step, and
evicted tokens stored on disk; further `key=value` overrides are passed on. Exit status 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    *("recipe=quickstart", "train.max_steps=24", "train.save_steps=3", "finish.export=false", "train.threads=1"),
    *("finish.question=null", "finish.media=null", "train.offload=disk", "selection.gradient=straight_through"),
    *("distill.weight=0.5", "memory.random_budget=[48,96]"),
]


def start(out: Path, more: list[str]) -> subprocess.Popen[bytes]:
    """Start `python train.py` with the output folder `out`."""
    command = [sys.executable, "train.py", *SETTINGS, *more, f"output_dir={out}"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def steps(out: Path) -> int:
    """Steps in the metrics file."""
    file = out / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.is_file() else 0


def losses(out: Path) -> list[float]:
    """The loss of every step."""
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors.decode()[-2000:])


def main() -> int:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=3)
    args, more = parser.parse_known_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.perf_counter()
        finish(start(whole, more))
        seconds = time.perf_counter() - began
        print(f"uninterrupted: {steps(whole)} steps in {seconds:.0f} s")
        for number in range(args.kills):
            process = start(killed, more)
            # Any moment from loading to the last steps; completed steps shorten the rest.
            deadline = time.perf_counter() + draw.uniform(0.2, 0.6) * seconds
            while time.perf_counter() < deadline and process.poll() is None:
                time.sleep(0.01)
            if process.poll() is not None:
                print(f"kill {number + 1}: the run had finished before")
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"kill {number + 1}: after step {steps(killed)}")
        finish(start(killed, more))
        same = all((whole / name).read_bytes() == (killed / name).read_bytes() for name in FILES)
        logged = losses(whole) == losses(killed)
        print(f"adapter {'equal, bit for bit' if same else 'DIFFERS'}; losses {'equal' if logged else 'DIFFER'}")
        return int(not (same and logged))


FILES = ("adapter_model.safetensors", "budget_profile.json")

if __name__ == "__main__":
    raise SystemExit(main())

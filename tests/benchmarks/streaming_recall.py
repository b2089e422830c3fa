"""Accuracy on streaming recall at equal memory: training-free methods, fine-tuning, learned retention, rivals.

    cd tests/benchmarks
    python streaming_recall.py --fresh --out results/streaming_recall.json --picture results/streaming_recall.svg

The task is described in `recall_task`. A 3-layer Qwen2.5-Omni decoder of width 64 is first trained with a full cache.
Then heads or LoRA adapters are trained with the same steps and data for every row. Accuracy is measured at inference
with hard eviction, on streams that show each fact once (plain) and three times (repeated).

Methods store different numbers of bytes per token. Each is measured twice: with equal tokens, and with equal total
bytes, where a method with larger tokens retains fewer. Bytes per token and layer are those of a filled cache of the 7B
shape (hidden size 3584, 4 key-value heads of 128, bfloat16): keys and values, features, metadata and scores.

Settings were chosen by the accuracy of seeds 0, 1 and 2. `--fresh` uses seeds 10, 11 and 12, whose training and test
streams were not used for that choice, on the same base model. Trained weights are saved in `--models` and reused.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from recall_picture import draw_picture
from recall_task import BUDGET, REGIMES, TEST, Batch, Recall, accuracy, draw, train_base
from recall_training import STEPS, Row, head_weights, new_cache, prepared, train
from report import new_parser, write_report
from rivals_training import OPTIONS, TRAINING
from shape_7b import bytes_per_token

from omnimem.budget import LayerBudget
from omnimem.memory import attach
from omnimem.selection import SelectionMethod

SEEDS = {"tuned_on": (0, 1, 2), "fresh": (10, 11, 12)}
"""Seeds by which settings were chosen, and seeds that were not used before they were reported."""

SWEEP = tuple(LayerBudget(*one) for one in ((4, 2), (6, 3), (9, 4), (18, 6), (36, 12)))
"""Visual and audio tokens per layer, for a method that stores keys, values and metadata alone."""

SKETCH = {"redundancy": "sketch"}

ROWS = {
    "full cache": Row("full"),
    "random": Row("random"),
    "uniform": Row("uniform"),
    "streaming_llm": Row("streaming_llm"),
    "h2o": Row("h2o"),
    "snapkv": Row("snapkv", {"window_size": 8}),
    "infinipot_v": Row("infinipot_v"),
    "attention_only": Row("attention_only"),
    "similarity_only": Row("similarity_only"),
    "omnimem": Row("omnimem"),
    "omnimem, sketch": Row("omnimem", SKETCH),
    "omnimem, value": Row("omnimem", {"redundancy": "value"}),
    "novelty": Row("novelty"),
    "novelty, 128 numbers": Row("novelty", {"sketch_dim": 128}),
    "novelty, attention": Row("novelty", {"lambda": 0.2}),
    "learned": Row("learned", heads=True),
    "learned on repeated": Row("learned", heads=True, copies=3),
    **{name: Row(name, options, heads=True) for name, options in OPTIONS.items()},
    **{f"{name} on repeated": Row(name, options, heads=True, copies=3) for name, options in OPTIONS.items()},
    "learned + LoRA": Row("learned", heads=True, lora=True),
    "learned + LoRA on repeated": Row("learned", heads=True, lora=True, copies=3),
    "omnimem + LoRA, hard": Row("omnimem", lora=True, gradient=False),
    "omnimem + LoRA": Row("omnimem", lora=True),
    "omnimem, sketch + LoRA": Row("omnimem", SKETCH, lora=True),
    "learned, one hidden layer": Row("learned", {"head_hidden_size": 32}, heads=True),
    "learned, one hidden layer on repeated": Row("learned", {"head_hidden_size": 32}, heads=True, copies=3),
    **{
        f"learned at {one.visual} + {one.audio}": Row("learned", heads=True, budget=one)
        for one in SWEEP
        if one != BUDGET
    },
}
"""Rows of the table; "on repeated": trained on streams with repeated facts."""

SWEPT = (
    *("random", "uniform", "snapkv", "infinipot_v", "omnimem", "omnimem, sketch", "novelty, attention"),
    *("learned", "learned on repeated", *OPTIONS, *(f"{name} on repeated" for name in OPTIONS)),
)
"""Rows that are measured at every budget of `SWEEP`, with the first seed; the standard budget with all seeds."""


STANDARD_KIBIBYTES = BUDGET.total * bytes_per_token("uniform", {}) / 1024
"""Bytes per layer of the standard budget with the smallest tokens."""


def trained(base: Recall, name: str, seed: int, models: Path) -> tuple[Recall, SelectionMethod]:
    """Model and method of a row; trained, or loaded from a file in `models`."""
    row = ROWS[name]
    model, method = prepared(base, row, seed)
    if not row.trained:
        return model, method
    path = models / f"{name} {seed}.pt".replace(" ", "_")
    if path.is_file():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"], strict=False)
        for weight, value in zip(head_weights(method), saved["heads"], strict=True):
            weight.data.copy_(value)
        return model, method
    started = time.perf_counter()
    TRAINING.get(row.method, train)(model, method, row, seed)
    adapters = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    models.mkdir(parents=True, exist_ok=True)
    torch.save({"model": adapters, "heads": [weight.data for weight in head_weights(method)]}, path)
    print(f"{name}: seed {seed} trained in {time.perf_counter() - started:.0f} s", flush=True)
    return model, method


def at_equal_bytes(budget: LayerBudget, token_bytes: float, smallest: float) -> LayerBudget:
    """The budget whose total bytes are at most those of `budget` with tokens of `smallest` bytes."""
    visual, audio = (max(1, math.floor(count * smallest / token_bytes)) for count in (budget.visual, budget.audio))
    return LayerBudget(visual, audio)


def measured(model: Recall, method: SelectionMethod, budget: LayerBudget, tests: dict[str, Batch]) -> dict[str, float]:
    """Accuracy in each regime with one budget."""
    return {regime: accuracy(model, lambda: new_cache(method, budget), test) for regime, test in tests.items()}


def results(base: Recall, name: str, seeds: tuple[int, ...], models: Path, token_bytes: float) -> dict[str, Any]:
    """One row of the report: at equal tokens, and at equal bytes for every budget it is measured at."""
    row, smallest = ROWS[name], bytes_per_token("uniform", {})
    runs = []
    for seed in seeds if row.trained else seeds[:1]:
        model, method = trained(base, name, seed, models)
        # All seeds of a run share the test streams.
        generators = {regime: torch.Generator().manual_seed(3000 + seeds[0]) for regime in REGIMES}
        tests = {regime: draw(TEST, generators[regime], copies) for regime, copies in REGIMES.items()}
        points, known = [], {row.budget: measured(model, method, row.budget, tests)}
        for budget in SWEEP if name in SWEPT and seed == seeds[0] else (row.budget,):
            equal = at_equal_bytes(budget, token_bytes, smallest)
            if equal not in known:
                known[equal] = measured(model, method, equal, tests)
            counts = {"visual": equal.visual, "audio": equal.audio}
            points.append({"kibibytes": round(budget.total * smallest / 1024, 3), **counts, **known[equal]})
        runs.append({"seed": seed, "equal_tokens": known[row.budget], "equal_bytes": points})
    return {"row": name, "trained": row.trained, "bytes_per_token": token_bytes, **mean_of(runs), "runs": runs}


def mean_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over seeds of what `results` measures."""
    points = [point for run in runs for point in run["equal_bytes"]]
    sizes = sorted({point["kibibytes"] for point in points})
    return {
        "equal_tokens": mean([run["equal_tokens"] for run in runs]),
        "equal_bytes": [mean([point for point in points if point["kibibytes"] == size]) for size in sizes],
    }


def mean(measurements: list[dict[str, float]]) -> dict[str, float]:
    """Mean of each key."""
    return {key: round(statistics.fmean(one[key] for one in measurements), 4) for key in measurements[0]}


def printed(row: dict[str, Any]) -> str:
    """A row as one line: bytes per token, accuracy at equal tokens, budget and accuracy at equal bytes."""
    point = min(row["equal_bytes"], key=lambda one: abs(one["kibibytes"] - STANDARD_KIBIBYTES))
    tokens = f"{row['equal_tokens']['plain']:.3f} {row['equal_tokens']['repeated']:.3f}"
    counts = f"{point['visual']:g}+{point['audio']:g}"
    equal = f"{point['plain']:.3f} {point['repeated']:.3f}"
    return f"{row['row']:<40}{row['bytes_per_token']:>6.0f} B   {tokens}   {counts:>6} {equal}"


def main() -> int:
    """Measure every row, print a table, write JSON and the picture."""
    parser = new_parser(__doc__)
    parser.add_argument("--picture", type=Path, help="write the picture (SVG) of all rows in the results file")
    parser.add_argument("--base", type=Path, default=Path("streaming_recall_base.pt"), help="file of the base model")
    parser.add_argument(
        "--models", type=Path, default=Path("streaming_recall_models"), help="folder of trained weights"
    )
    parser.add_argument("--fresh", action="store_true", help="use seeds that were not used to choose settings")
    parser.add_argument("--only", help="rows, separated by semicolons; the others in the results file are preserved")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kind = "fresh" if args.fresh else "tuned_on"
    report = json.loads(args.out.read_text(encoding="utf-8")) if args.out and args.out.is_file() else {}
    base = train_base(args.base, 1500).eval()
    attach(base.decoder)
    print(f"{'':<40}{'':>8}   equal tokens      equal bytes\n{'':<40}{'':>8}   plain repeated    plain repeated")
    for name in args.only.split(";") if args.only else ROWS:
        row = ROWS[name]
        found = results(base, name, SEEDS[kind], args.models, bytes_per_token(row.method, row.options))
        print(printed(found), flush=True)
        rows = {one["row"]: one for one in report.get(kind, {}).get("rows", [])} | {name: found}
        ordered = [rows[one] for one in ROWS if one in rows]
        report[kind] = {"steps": STEPS, "seeds": SEEDS[kind], "rows": ordered}
        write_report(args.out, report)
    if args.picture:
        draw_picture(report[kind]["rows"], args.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Accuracy on streaming recall for sketches of 16 to 512 numbers of 8 and 4 bits, at equal tokens.

    cd tests/benchmarks
    python sketch_sweep.py --out results/sketch_sweep.json

`learned` is trained once, with the default sketches; its weights are then used with the other ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from recall_task import BUDGET, REGIMES, TEST, draw, train_base
from report import new_parser, write_report
from shape_7b import bytes_per_token
from streaming_recall import SEEDS, measured, trained

from omnimem.memory import attach
from omnimem.selection import build_selection

SIZES, BITS = (16, 32, 64, 128, 256, 512), (8, 4)
METHODS = {"learned": {}, "novelty": {"lambda": 0.2}, "omnimem": {"redundancy": "sketch"}}


def main() -> int:
    """Measure every sketch, print a table, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("--base", type=Path, default=Path("streaming_recall_base.pt"), help="file of the base model")
    parser.add_argument("--models", type=Path, default=Path("streaming_recall_models"), help="folder of weights")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seed = SEEDS["tuned_on"][0]
    base = train_base(args.base, 1500).eval()
    attach(base.decoder)
    model, default = trained(base, "learned", seed, args.models)
    tests = {name: draw(TEST, torch.Generator().manual_seed(3000 + seed), count) for name, count in REGIMES.items()}
    rows = []
    for name, fixed in METHODS.items():
        # The sketches of omnimem are not stored in fewer bits.
        for bits in BITS if name != "omnimem" else (None,):
            for size in SIZES:
                options = {**fixed, "sketch_dim": size, **({} if bits is None else {"sketch_bits": bits})}
                method = build_selection(name, **options)
                if name == "learned":
                    method.heads = default.heads  # pyright: ignore[reportAttributeAccessIssue]
                accuracy = measured(model, method, BUDGET, tests)
                rows.append(
                    {"method": name, **options, "bytes_per_token": bytes_per_token(name, options), "accuracy": accuracy}
                )
                print(name, options, {regime: round(value, 3) for regime, value in accuracy.items()}, flush=True)
                write_report(args.out, {"seed": seed, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

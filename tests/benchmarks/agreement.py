"""How well cheaper scores of OmniMem agree with the exact ones: other redundancy sources, and sampled queries.

    python train.py recipe=quickstart
    python tests/benchmarks/agreement.py runs/quickstart [--out results.json] [--mean-budget 96]

A trained model streams clips with exact scores (hidden states, every query). At every compression of every layer, the
same candidates are also scored in each cheaper way. Reported are the rank correlation (Spearman) of the score ψ
(`omnimem/selection/README.md`) over visual and audio tokens, the share of the retained tokens that both retain, and the
share at the end of the stream when the cheaper scores make every decision. Bytes are per token and layer, in addition
to keys and values.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from report import new_parser, write_report
from torch import Tensor
from transformers import AttentionInterface

from omnimem.budget import BudgetProfile
from omnimem.memory import attention_scores
from omnimem.memory.attach import ATTENTION_NAME, compressed_attention
from omnimem.selection import Candidates, OmniMem, build_selection
from omnimem.selection.sketch import sketch
from omnimem.selection.topk import keep_mask
from omnimem.stream import StreamingSession

VARIANTS: dict[str, dict[str, Any]] = {
    "sketch of 64": {"redundancy": "sketch", "sketch_dim": 64},
    "sketch of 128": {"redundancy": "sketch", "sketch_dim": 128},
    "sketch of 256": {"redundancy": "sketch", "sketch_dim": 256},
    "sketch of 512": {"redundancy": "sketch", "sketch_dim": 512},
    "value": {"redundancy": "value"},
    "key": {"redundancy": "key"},
    "every 2nd query": {"query_stride": 2},
    "every 4th query": {"query_stride": 4},
    "every 8th query": {"query_stride": 8},
}


EXACT = {"query_stride": 1}


class Recorder(OmniMem):
    """Exact selection that also computes every cheaper score."""

    def __init__(self, variant: str) -> None:
        super().__init__(variant, query_stride=1)
        self.reads_keys = self.reads_values = True
        self.others = {name: OmniMem(variant, **{**EXACT, **options}) for name, options in VARIANTS.items()}
        self.sampled: dict[tuple[int, int], Tensor] = {}
        self.ranks: dict[str, list[float]] = {name: [] for name in VARIANTS}
        self.retained: dict[str, list[float]] = {name: [] for name in VARIANTS}

    def observe(self, module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The attention function, which also computes attention scores from every n-th query."""
        memory = kwargs.get("cache_layer")
        if memory is not None and memory.observed_scores is not None:
            for method in self.others.values():
                stride = method.options.query_stride
                if stride > 1:
                    # `Stream` compresses after every chunk: earlier scores are in `memory.attention_scores`.
                    new = attention_scores(query, key, kind=self.options.attention_scores, stride=stride)
                    old = self.sampled.get((memory.index, stride))
                    self.sampled[memory.index, stride] = new if old is None else self.accumulate(old, new)
        return compressed_attention(module, query, key, *args, **kwargs)

    def choose(self, candidates: Candidates, score: Tensor) -> tuple[Tensor, None]:
        """Retain by the exact scores; record what the cheaper scores would have retained."""
        keep = keep_mask(score, candidates.metadata, candidates.budget)
        media = candidates.metadata.modality[0] > 0
        for name, method in self.others.items():
            options, changed = method.options, candidates
            if options.redundancy == "sketch" and candidates.features is not None:
                small = sketch(candidates.features, options.sketch_dim, candidates.layer, options.seed)
                changed = replace(candidates, features=small)
            if options.query_stride > 1:
                changed = replace(changed, attention_scores=self.sampled[candidates.layer, options.query_stride])
            other = method.score(changed)
            both = keep & keep_mask(other, candidates.metadata, candidates.budget)
            self.ranks[name].append(spearman(score[0][media], other[0][media]))
            self.retained[name].append((both[0] & media).sum().item() / max((keep[0] & media).sum().item(), 1))
        for (layer, stride), scores in list(self.sampled.items()):
            if layer == candidates.layer:
                self.sampled[layer, stride] = scores[:, keep[0]]
        return keep, None


def spearman(first: Tensor, second: Tensor) -> float:
    """Rank correlation."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (first, second)])
    return torch.corrcoef(ranks)[0, 1].item()


def stream(session: StreamingSession, clip: Path, seconds: float) -> list[set[int]]:
    """Stream a clip; the visual and audio tokens every layer retains at the end."""
    for _ in session.watch(clip, max_seconds=seconds):
        pass
    tables = [session.cache.token_metadata(layer) for layer in range(len(session.cache.layers))]
    return [set(table.index[0][table.modality[0] > 0].tolist()) for table in tables]


def main() -> int:
    """Measure, print a table, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("run", help="a trained run, an export, or a checkpoint")
    parser.add_argument("--variant", default="paper", choices=("paper", "release"))
    parser.add_argument("--mean-budget", type=int, default=96)
    parser.add_argument("--seconds", type=float, default=40.0, help="seconds of each clip (default: %(default)s)")
    folders = [Path(__file__).parents[2] / "data_prep" / "quickstart", Path(__file__).parents[1] / "data" / "media"]
    parser.add_argument("--media", type=Path, nargs="+", default=folders, help="folders of clips")
    args = parser.parse_args()
    files = [path for folder in args.media for path in folder.iterdir()]
    clips = sorted(
        (path for path in files if path.name.startswith(("speech_", "odd_", "ambient_"))), key=lambda p: p.name
    )
    base = StreamingSession.from_pretrained(args.run, mean_budget=args.mean_budget)
    profile = BudgetProfile.uniform(base.backbone.config, args.mean_budget)

    def session(method: OmniMem) -> StreamingSession:
        made = StreamingSession(base.backbone, profile, "omnimem", base.settings)
        made.cache.method = method
        for layer in made.cache.layers:
            layer.method = method
        return made

    recorder = Recorder(args.variant)
    exact = []
    AttentionInterface.register(ATTENTION_NAME, recorder.observe)
    for clip in clips:
        recorder.sampled.clear()
        exact.append(stream(session(recorder), clip, args.seconds))
    AttentionInterface.register(ATTENTION_NAME, compressed_attention)

    text = base.backbone.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    states = 2 * text.num_key_value_heads * head_dim * 4
    extra = {"hidden": 4 * text.hidden_size, **{f"sketch of {size}": size for size in (64, 128, 256, 512)}}
    rows = [
        {
            "measurement": "exact",
            "bytes": extra["hidden"],
            "rank": 1.0,
            "retained": 1.0,
            "retained_lowest": 1.0,
            "end": 1.0,
        }
    ]
    for name, options in VARIANTS.items():
        alone = build_selection("omnimem", variant=args.variant, **{**EXACT, **options})
        assert isinstance(alone, OmniMem)
        ends = [stream(session(alone), clip, args.seconds) for clip in clips]
        same = [
            len(a & b) / len(a) for one, other in zip(exact, ends, strict=True) for a, b in zip(one, other, strict=True)
        ]
        size = extra["hidden"] if "query" in name else extra.get(name, 0)
        rows.append(
            {
                "measurement": name,
                "bytes": size,
                "rank": statistics.fmean(recorder.ranks[name]),
                "retained": statistics.fmean(recorder.retained[name]),
                "retained_lowest": min(recorder.retained[name]),
                "end": statistics.fmean(same),
            }
        )
    decisions = len(recorder.retained["value"])
    print(f"{len(clips)} clips, {decisions} compressions of a layer; keys and values: {states} bytes per token")
    print(f"{'measurement':<18}{'bytes':>7}{'rank':>8}{'retained':>10}{'lowest':>8}{'at the end':>12}")
    for row in rows:
        print(
            f"{row['measurement']:<18}{row['bytes']:>7}{row['rank']:>8.3f}{row['retained']:>8.3f}"
            f"{row['retained_lowest']:>8.3f}{row['end']:>12.3f}"
        )
    report = {
        "variant": args.variant,
        "mean_budget": args.mean_budget,
        "clips": [clip.name for clip in clips],
        "decisions": decisions,
        "state_bytes": states,
        "rows": rows,
    }
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

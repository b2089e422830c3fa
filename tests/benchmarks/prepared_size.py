"""Gigabytes per hour of prepared data, for each encoding.

    python tests/benchmarks/prepared_size.py [--out results.json] [--fps 1] [--short-side 360]

Every clip of `data_prep/quickstart` with video and audio and at least 5 seconds is prepared alone with `omnimem data
prepare`, once for each encoding of frames and audio. Reported are the bytes of the shard divided by the length of the
clip, for each clip and for all together (GB are 10^9 bytes). The size of the frames depends on the resolution of the
file (frames are never enlarged) and on the content. Audio is 16 kHz mono: 0.23 GB per hour in float32, half of that in
int16, before compression.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import new_parser, write_report

from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import prepare
from data_prep.manifest import read_manifest
from data_prep.shipped import QUICKSTART_FOLDER
from omnimem.media import probe

ENCODINGS: dict[str, dict[str, Any]] = {
    "webp, float32 (exact; the default)": {"frame_format": "webp", "audio_dtype": "float32"},
    "png, float32 (exact)": {"frame_format": "png", "audio_dtype": "float32"},
    "webp, int16": {"frame_format": "webp", "audio_dtype": "int16"},
    "jpeg, int16": {"frame_format": "jpeg", "audio_dtype": "int16"},
}
SHORTEST_SECONDS = 5.0


def clips_in(folder: Path) -> list[Path]:
    """Clips with video and audio that are long enough, without broken files and silent tracks."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".mp4", ".webm")]
    files = [path for path in files if not path.name.startswith(("broken_", "silent_"))]
    found = {path: probe(path) for path in files}
    return [
        path
        for path, info in found.items()
        if info.has_video and info.has_audio and (info.duration or 0) >= SHORTEST_SECONDS
    ]


def measure(clip: Path, settings: PrepareSettings) -> tuple[int, float]:
    """Bytes of a clip's shard, and the length of the clip in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.jsonl"
        row = {"media": clip.name, "question": "What happens?", "answer": "This is measured."}
        manifest.write_text(json.dumps(row) + "\n", encoding="utf-8")
        report = prepare(read_manifest(manifest, clip.parent), Path(folder) / "prepared", settings, workers=1)
    return report.nbytes, report.seconds


def gigabytes_per_hour(measured: Sequence[tuple[int, float]]) -> float:
    """10^9 bytes per hour over all clips."""
    return sum(size for size, _ in measured) / sum(seconds for _, seconds in measured) * 3600 / 1e9


def main() -> int:
    """Measure every clip in every encoding, print a table, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("--media", type=Path, default=QUICKSTART_FOLDER)
    parser.add_argument("--fps", type=float, default=1.0)
    parser.add_argument("--short-side", type=int, default=360)
    args = parser.parse_args()
    clips = clips_in(args.media)
    rows = []
    for name, encoding in ENCODINGS.items():
        settings = PrepareSettings(fps=args.fps, short_side=args.short_side, **encoding)
        measured = {clip.name: measure(clip, settings) for clip in clips}
        each = {clip: gigabytes_per_hour([one]) for clip, one in measured.items()}
        whole = gigabytes_per_hour(list(measured.values()))
        rows.append({"encoding": name, "exact": settings.exact, "gb_per_hour": whole, "clips": each})
        print(f"{name:<36}{whole:6.3f} GB per hour ({min(each.values()):.3f} to {max(each.values()):.3f})", flush=True)
    for clip in clips:
        print(f"{clip.name:<46}" + " ".join(f"{row['clips'][clip.name]:7.3f}" for row in rows))
    report = {"fps": args.fps, "short_side": args.short_side, "rows": rows}
    write_report(args.out, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

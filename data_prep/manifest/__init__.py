"""The manifest: a JSON Lines file with one stream and its questions per line, or the same rows as Parquet.

    {"media": "clip.mp4", "questions": [{"question": "Who speaks?", "answer": "A pilot.", "time": 12.5}]}
    {"media": "silent.mp4", "question": "What colour is the car?", "answer": "Red.", "audio": false}
    {"media": "talk.mp4", "audio_path": "talk.wav", "question": "Who?", "answer": "Ada.", "rejected": "A man."}

`data_prep/README.md` describes every key. Every row is checked before training starts: it is better to find a missing
clip now than after six hours. Media files are looked up on disk, not decoded. `omnimem data convert` writes manifests
from the formats of other projects.

Try it: `accelerate launch train.py recipe=quickstart data.path=my.jsonl dry_run=true`.
"""

from data_prep.manifest.check import BadRow, find_media, read_row, short
from data_prep.manifest.reader import drop_nulls, media_root, read_manifest
from data_prep.manifest.rows import MAX_QUESTION_TIME, Manifest, Question, Row, manifest_fingerprint, rejected_answers

__all__ = [
    "MAX_QUESTION_TIME",
    "BadRow",
    "Manifest",
    "Question",
    "Row",
    "drop_nulls",
    "find_media",
    "manifest_fingerprint",
    "media_root",
    "read_manifest",
    "read_row",
    "rejected_answers",
    "short",
]

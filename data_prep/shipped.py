"""The clips and questions that ship with the package (`data_prep/quickstart`)."""

from pathlib import Path

QUICKSTART_FOLDER = Path(__file__).resolve().parent / "quickstart"

QUICKSTART = QUICKSTART_FOLDER / "quickstart.jsonl"
"""The manifest that ``data.path=quickstart`` names."""

QUICKSTART_CLIP = QUICKSTART_FOLDER / "speech_apollo15_hammer_feather_47s.webm"
"""The longest of the clips, with speech: what `omnimem bench` streams by default."""

"""What can be found in a file or a row: a code, how bad it is, and one plain sentence.

The codes are the report's vocabulary: scripts may rely on them, sentences may change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

CODES: dict[str, tuple[Severity, str]] = {
    # Files that training cannot use as they are.
    "empty": ("error", "the file has no bytes"),
    "cannot_open": ("error", "not readable as media"),
    "cut_off": ("error", "ends before its header says"),
    "decode_error": ("error", "the picture cannot be decoded from some second on"),
    "read_error": ("error", "reading stops midway"),
    "crashed": ("error", "the process that looked at it died"),
    # Files that can be used, but are not what one would expect.
    "damaged_pictures": ("warning", "damaged pictures, which decoders repair as they can"),
    "damaged_sound": ("warning", "packets of sound cannot be decoded; silence takes their place"),
    "damaged_unused": ("warning", "a track that is not used is damaged"),
    "no_sound": ("warning", "no sound track"),
    "silent_sound": ("warning", "every sample of the sound is zero"),
    "no_picture": ("info", "sound only"),
    "no_picture_in_video": ("warning", "a container for video with sound only"),
    "cover_art": ("warning", "a still picture, which is not video"),
    "several_video": ("warning", "several video tracks, of which one is used"),
    "several_audio": ("warning", "several sound tracks, of which one is used"),
    "rotated": ("warning", "stored turned; the display rotation is applied"),
    "variable_rate": ("warning", "variable frame rate"),
    "deep_colour": ("warning", "more than 8 bits a colour, read as 8"),
    "starts_apart": ("warning", "sound and picture do not start together"),
    "metadata": ("warning", "metadata that is not UTF-8"),
    "edit_list": ("warning", "an edit list hides pictures"),
    "duration_differs": ("warning", "the header's duration is not that of the content"),
    "no_duration": ("warning", "the header has no duration"),
    "timestamps": ("warning", "pictures with the same time, or going back in time"),
    "short": ("warning", "shorter than a chunk of 2 s"),
    "unknown_codec": ("warning", "a track in a codec that FFmpeg cannot decode"),
    # For the record.
    "sample_rate": ("info", "sound below 16 kHz"),
    "channels": ("info", "more than two channels, mixed to one"),
    "other_tracks": ("info", "subtitles or data, which are not read"),
    "ends_apart": ("info", "sound and picture do not end together"),
    "late_key_frame": ("info", "pictures before the first key frame cannot be shown"),
    "uncompressed": ("info", "uncompressed sound"),
    "odd_size": ("info", "an unusual picture size"),
    # Rows of a manifest.
    "bad_row": ("error", "the row cannot be read"),
    "unusable_media": ("error", "its file cannot be used"),
    "nothing_to_read": ("error", "neither picture nor wanted sound"),
    "placeholder": ("warning", "a placeholder for media is left in the text"),
    "placeholder_without_media": ("warning", "a placeholder for media that the row does not have"),
    "time_past_end": ("warning", "asked after the media ends"),
    "audio_without_sound": ("warning", "audio is on, the file has no sound"),
    "same_media": ("info", "the same media in several rows"),
    "same_question": ("warning", "the same media and question more than once"),
    "conflicting_answers": ("warning", "the same question with different answers"),
}
"""Code: its severity, and what it says of any file or row (heads the table of totals)."""


@dataclass(frozen=True)
class Finding:
    """One thing found; `message` says it with the numbers of this file or row."""

    code: str
    message: str

    @property
    def severity(self) -> Severity:
        """How bad it is: fixed for each code."""
        return CODES[self.code][0]

    def record(self) -> dict[str, str]:
        """As it stands in the report."""
        return {"code": self.code, "severity": self.severity, "message": self.message}


def worst(findings: Iterable[dict[str, Any]]) -> Severity | None:
    """The most severe of recorded findings; None without any."""
    found = {finding["severity"] for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), None)

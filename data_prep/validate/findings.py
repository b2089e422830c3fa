"""What `validate` reports about a file or a row: a code, its severity, and a sentence.

Scripts may rely on the codes; the sentences may change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")

CODES: dict[str, tuple[Severity, str]] = {
    # Files that training cannot use.
    "empty": ("error", "the file has no bytes"),
    "cannot_open": ("error", "not readable as media"),
    "truncated": ("error", "ends before its header says"),
    "decode_error": ("error", "video cannot be decoded beyond some second"),
    "read_error": ("error", "reading fails before the end"),
    "crashed": ("error", "the process that checked it died"),
    # Files that can be used but are unusual.
    "damaged_frames": ("warning", "damaged frames, which decoders conceal as far as they can"),
    "damaged_audio": ("warning", "audio packets that cannot be decoded; they are replaced by silence"),
    "damaged_unused_track": ("warning", "damage in a track that is not used"),
    "no_audio": ("warning", "no audio track"),
    "silent_audio": ("warning", "every audio sample is zero"),
    "no_video": ("info", "no video track"),
    "no_video_in_video_file": ("warning", "a video file without a video track"),
    "cover_art": ("warning", "cover art, which is not used as video"),
    "multiple_video_tracks": ("warning", "several video tracks, one of which is used"),
    "multiple_audio_tracks": ("warning", "several audio tracks, one of which is used"),
    "rotated": ("warning", "stored rotated; the display rotation is applied"),
    "variable_frame_rate": ("warning", "variable frame rate"),
    "bit_depth": ("warning", "more than 8-bit colour, converted to 8-bit"),
    "start_offset": ("warning", "audio and video do not start together"),
    "metadata_encoding": ("warning", "metadata that is not UTF-8"),
    "edit_list": ("warning", "frames hidden by an edit list"),
    "duration_mismatch": ("warning", "the header's duration differs from the content"),
    "no_duration": ("warning", "the header has no duration"),
    "non_monotonic_timestamps": ("warning", "frames with equal or decreasing timestamps"),
    "short": ("warning", "shorter than 2 s"),
    "unknown_codec": ("warning", "a track in a codec that FFmpeg cannot decode"),
    # For information.
    "low_sample_rate": ("info", "audio sampled below 16 kHz"),
    "downmixed": ("info", "more than two audio channels, mixed down to one"),
    "other_tracks": ("info", "subtitle or data tracks, which are not used"),
    "end_offset": ("info", "audio and video do not end together"),
    "late_key_frame": ("info", "frames before the first key frame, which are dropped"),
    "uncompressed_audio": ("info", "uncompressed audio"),
    "unusual_size": ("info", "an unusual frame size"),
    # Rows of a manifest.
    "bad_row": ("error", "the row cannot be read"),
    "unusable_media": ("error", "its media file cannot be used"),
    "nothing_to_use": ("error", "neither video nor usable audio"),
    "placeholder": ("warning", "a media placeholder in the text"),
    "placeholder_without_media": ("warning", "a placeholder for media the row does not have"),
    "time_past_end": ("warning", "a question time after the end of the media"),
    "audio_missing": ("warning", "audio is on, but the file has no audio"),
    "duplicate_media": ("info", "the same media in several rows"),
    "duplicate_question": ("warning", "the same media and question more than once"),
    "conflicting_answers": ("warning", "the same question with different answers"),
}
"""Severity and general meaning of each code; the meaning is printed in the table of counts."""


@dataclass(frozen=True)
class Finding:
    """One finding; `message` describes it with the numbers of this file or row."""

    code: str
    message: str

    @property
    def severity(self) -> Severity:
        """Severity, which is fixed for each code."""
        return CODES[self.code][0]

    def record(self) -> dict[str, str]:
        """The finding as an entry of the report."""
        return {"code": self.code, "severity": self.severity, "message": self.message}


def highest_severity(findings: Iterable[dict[str, Any]]) -> Severity | None:
    """The highest severity among recorded findings; None without findings."""
    found = {finding["severity"] for finding in findings}
    return next((severity for severity in SEVERITIES if severity in found), None)

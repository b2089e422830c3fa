"""Check one media file: its tracks, whether it can be decoded to its end, and what is unusual about it.

python -c "from data_prep.validate.file import check_file; print(check_file('clip.mp4', fast=False))"
"""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_prep.validate.findings import Finding
from data_prep.validate.tracks import Track, backward_steps, is_variable, read_tracks, step_range
from omnimem.errors import OmniMemError
from omnimem.files import file_digest
from omnimem.media.container import open_container
from omnimem.media.probe import MediaInfo, Source, inspect
from omnimem.media.reader import MISSING_SECONDS, MISSING_SHARE
from omnimem.media.tracks import STILLS


def suffixes(names: str) -> frozenset[str]:
    """File name suffixes from space-separated names."""
    return frozenset(f".{name}" for name in names.split())


VIDEO_SUFFIXES = suffixes("3g2 3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv")
AUDIO_SUFFIXES = suffixes("aac ac3 aif aiff alac amr ape au caf flac m4a mka mp2 mp3 oga ogg opus wav wma wv")

START_OFFSET, END_OFFSET = 0.05, 1.0  # seconds between audio and video that are not reported
DURATION_SECONDS, DURATION_SHARE = 0.5, 0.02  # tolerance between header and content: headers are rounded
SHORT = 2.0  # seconds
SMALLEST_SIDE, LARGEST_RATIO = 32, 4.0


def check_file(path: str | os.PathLike[str], fast: bool) -> dict[str, Any]:
    """Check one file; problems of the file are reported, not raised.

    Returns
    -------
    dict
        The file's entry in the report, JSON only: ``digest``, ``seconds``, ``audio`` (present, silent, none),
        ``has_video``, ``streams``, ``findings``.
    """
    path = Path(path)
    entry: dict[str, Any] = {"digest": None, "seconds": None, "has_video": False, "audio": "none", "streams": []}
    try:
        if path.stat().st_size == 0:
            return entry | {"findings": [Finding("empty", "the file has no bytes; copy or download it again").record()]}
        entry["digest"] = file_digest(path)
        entry |= _check(path, fast)
    except OmniMemError as error:
        entry["findings"] = [Finding("cannot_open", str(error).removeprefix(f"{path.name}: ")).record()]
    except OSError as error:
        entry["findings"] = [Finding("cannot_open", f"cannot be read: {error.strerror}").record()]
    except Exception as error:  # one file must not stop a run over thousands; it is reported as unusable
        what = " ".join(f"{type(error).__name__}: {error}".split())
        entry["findings"] = [Finding("cannot_open", f"reading it fails ({what[:200]})").record()]
    return entry


def _check(path: Path, fast: bool) -> dict[str, Any]:
    source = inspect(path)
    info = source.info
    tracks, failure = read_tracks(path, fast)
    used = [track for track in tracks if track.index in (info.video_index, info.audio_index)]
    findings = [
        *_errors(source, tracks, used, failure),
        *_damage(source, tracks, used),
        *_audio(path, info, used),
        *_video(path, info, used),
        *_times(source, tracks, used, fast),
        *_header(path),
        *_track_choice(info, tracks),
    ]
    ends = [track.end - source.zero for track in used if track.end is not None]
    audio = next((track for track in used if track.kind == "audio"), None)
    return {
        "container": info.container,
        "seconds": round(float(max(ends, default=Fraction(0))), 3),
        "header_seconds": None if info.duration is None else round(info.duration, 3),
        "has_video": info.video_index is not None,
        "width": info.width,
        "height": info.height,
        "audio": "none" if audio is None else "silent" if audio.silent else "present",
        "streams": [track.record(source.zero, track in used) for track in tracks],
        "findings": [finding.record() for finding in findings],
    }


def _errors(source: Source, tracks: list[Track], used: list[Track], failure: str | None) -> list[Finding]:
    """Problems at which a training run would fail."""
    found = []
    for track in used:
        if track.error is not None:
            second = float(track.error[0] - source.zero)
            message = f"video (track {track.index}) cannot be decoded beyond {second:.2f} s ({track.error[1]})"
            found.append(Finding("decode_error", message))
    ends = [track.end - source.zero for track in used if track.end is not None]
    reached = min(ends, default=Fraction(0))
    end, stated = max(ends, default=Fraction(0)), source.header_end
    missing = Fraction(0) if stated is None else stated - source.zero - end
    truncated = any(track.truncated for track in used)
    if truncated or (not found and missing > max(MISSING_SECONDS, MISSING_SHARE * (end + missing))):
        # Bytes are missing: both tracks are readable only up to the end of the shorter one.
        total = "" if source.info.duration is None else f" of {source.info.duration:.1f} s"
        message = f"truncated: readable up to {float(reached if truncated else end):.1f} s{total}; copy it again"
        found.append(Finding("truncated", message))
    if failure is not None:
        found.append(Finding("read_error", f"reading fails at {float(reached):.1f} s ({failure}); copy it again"))
    return found


def _damage(source: Source, tracks: list[Track], used: list[Track]) -> list[Finding]:
    found = []
    for track in tracks:
        second = float((track.damaged_at or source.zero) - source.zero)
        if track not in used:
            if track.error is not None or track.damaged:
                found.append(Finding("damaged_unused_track", f"unused {track.kind} track {track.index} is damaged"))
        elif track.damaged and track.kind == "audio":
            many = f"{track.damaged} damaged audio packets" if track.damaged > 1 else "a damaged audio packet"
            found.append(Finding("damaged_audio", f"{many}, the first at {second:.2f} s"))
        elif track.damaged:
            many = f"{track.damaged} damaged frames" if track.damaged > 1 else "a damaged frame"
            message = f"{many}, the first at {second:.2f} s; decoders conceal what they can"
            found.append(Finding("damaged_frames", message))
    return found


def _audio(path: Path, info: MediaInfo, used: list[Track]) -> list[Finding]:
    track = next((track for track in used if track.kind == "audio"), None)
    if track is None:
        return [Finding("no_audio", "no audio track")]
    found = []
    if track.silent:
        found.append(Finding("silent_audio", "the audio track is silent: every sample is zero"))
    chosen = next(one for one in info.audio_tracks if one.index == track.index)
    if chosen.sample_rate < 16_000:
        found.append(
            Finding(
                "low_sample_rate",
                f"audio sampled at {chosen.sample_rate} Hz, below 16 kHz",
            )
        )
    if path.suffix.lower() in VIDEO_SUFFIXES and chosen.codec.startswith("pcm_"):
        found.append(Finding("uncompressed_audio", f"uncompressed audio ({chosen.codec})"))
    if chosen.channels > 2:
        layout = "5.1 audio" if chosen.channels == 6 else "audio"
        found.append(Finding("downmixed", f"{layout}: {chosen.channels} channels are mixed down to one"))
    return found


def _video(path: Path, info: MediaInfo, used: list[Track]) -> list[Finding]:
    track = next((track for track in used if track.kind == "video"), None)
    if track is None:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return [Finding("no_video_in_video_file", f"no video track, although it is a {path.suffix} file")]
        return [Finding("no_video", "no video track: audio only")]
    found = []
    if info.rotation:
        size = f"{info.width}x{info.height}"
        found.append(Finding("rotated", f"stored rotated by {info.rotation} degrees; displayed as {size}"))
    if track.hidden:
        found.append(Finding("edit_list", f"an edit list hides {track.hidden} frames"))
    if track.before_key:
        found.append(Finding("late_key_frame", f"{track.before_key} frames before the first key frame are dropped"))
    long, short = max(info.width, info.height), min(info.width, info.height)
    if info.width % 2 or info.height % 2 or short < SMALLEST_SIDE or long > LARGEST_RATIO * short:
        found.append(Finding("unusual_size", f"an unusual frame size of {info.width}x{info.height} pixels"))
    return found


def _times(source: Source, tracks: list[Track], used: list[Track], fast: bool) -> list[Finding]:
    info, found = source.info, []
    video = next((track for track in used if track.kind == "video"), None)
    if video is not None and not video.untimed:
        if is_variable(video.times, video.tick):
            low, high = step_range(video.times, video.tick)
            steps = f"{1000 * low:.0f} to {1000 * high:.0f} ms"
            found.append(Finding("variable_frame_rate", f"variable frame rate: {steps} between frames"))
        # Packets are in decoding order, so decreasing timestamps are only visible in decoded frames.
        if not fast and (back := backward_steps(video.times)):
            found.append(Finding("non_monotonic_timestamps", f"the timestamps of {back} frames do not increase"))
    if info.video_offset is not None and info.audio_offset is not None:
        late = info.audio_offset - info.video_offset
        if abs(late) > START_OFFSET:
            first, last = ("video", "audio") if late > 0 else ("audio", "video")
            found.append(Finding("start_offset", f"{last} starts {1000 * abs(late):.0f} ms after {first}"))
    complete = all(track.error is None and not track.truncated for track in used)
    ends = {track.kind: track.end for track in used if track.end is not None}
    if complete and len(ends) == 2 and abs(gap := float(ends["audio"] - ends["video"])) > END_OFFSET:
        first, last = ("video", "audio") if gap > 0 else ("audio", "video")
        found.append(Finding("end_offset", f"{first} ends {abs(gap):.1f} s before {last}"))
    return [*found, *_duration(info, [track for track in tracks if not track.still], complete)]


def _duration(info: MediaInfo, moving: list[Track], complete: bool) -> list[Finding]:
    starts = [track.first for track in moving if track.first is not None]
    length = float(max((track.end for track in moving if track.end is not None), default=0) - min(starts, default=0))
    found = []
    if info.duration is None:
        message = f"the header has no duration (decoded: {length:.1f} s): plans count it as 0 s"
        found.append(Finding("no_duration", message))
    elif complete and abs(info.duration - length) > max(DURATION_SECONDS, DURATION_SHARE * length):
        found.append(Finding("duration_mismatch", f"header: {info.duration:.1f} s, content: {length:.1f} s"))
    if complete and length < SHORT:
        found.append(Finding("short", f"only {length:.2f} s long"))
    return found


def _header(path: Path) -> list[Finding]:
    """Findings from the header: metadata, cover art, unused tracks, bit depth."""
    found = []
    try:
        open_container(path, metadata_errors="strict").close()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        found.append(Finding("metadata_encoding", f"metadata that is not UTF-8 ({byte}); it is ignored"))
    with open_container(path) as container:
        for stream in container.streams.video:
            codec = stream.codec_context
            if codec and stream.disposition & STILLS:
                message = f"cover art ({codec.name}, {stream.width}x{stream.height}): not used as video"
                found.append(Finding("cover_art", message))
            elif codec and codec.format and (bits := max(part.bits for part in codec.format.components)) > 8:
                message = f"{bits}-bit colour ({codec.name}, track {stream.index}); frames are converted to 8"
                found.append(Finding("bit_depth", message))
        unknown = [s.index for s in (*container.streams.video, *container.streams.audio) if not s.codec_context]
        if unknown:
            found.append(Finding("unknown_codec", f"tracks without an FFmpeg decoder: {_listed(unknown)}"))
        others = [stream.type for stream in container.streams if stream.type not in ("video", "audio")]
        if others:
            counts = [f"{others.count(kind)} {kind}" for kind in sorted(set(others))]
            found.append(Finding("other_tracks", f"tracks that are not used: {', '.join(counts)}"))
    return found


def _track_choice(info: MediaInfo, tracks: list[Track]) -> list[Finding]:
    found = []
    for kind, code, chosen in (
        ("video", "multiple_video_tracks", info.video_index),
        ("audio", "multiple_audio_tracks", info.audio_index),
    ):
        indices = [track.index for track in tracks if track.kind == kind and not track.still]
        if len(indices) > 1:
            found.append(Finding(code, f"{len(indices)} {kind} tracks ({_listed(indices)}); {chosen} is used"))
    return found


def _listed(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)

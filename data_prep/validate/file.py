"""One media file: what is in it, whether all of it can be read, and what is odd about it.

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
    """File name suffixes from their names in one string."""
    return frozenset(f".{name}" for name in names.split())


VIDEO_SUFFIXES = suffixes("3g2 3gp asf avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts mxf ogv ts vob webm wmv")
AUDIO_SUFFIXES = suffixes("aac ac3 aif aiff alac amr ape au caf flac m4a mka mp2 mp3 oga ogg opus wav wma wv")

APART = 0.05  # seconds by which sound and picture may start apart without a word
ENDS_APART = 1.0
DIFFERS_SECONDS, DIFFERS_SHARE = 0.5, 0.02  # header against content; headers round
SHORT = 2.0  # seconds: the default chunk of the reader
LEAST_SIDE, LONGEST_RATIO = 32, 4.0


def check_file(path: str | os.PathLike[str], fast: bool) -> dict[str, Any]:
    """Look at one file; never raises for what is wrong with it.

    Returns
    -------
    dict
        ``digest``, ``seconds``, ``sound`` (yes, silent, none), ``picture``, ``streams``, ``findings``: one entry of the
        report, JSON only.
    """
    path = Path(path)
    entry: dict[str, Any] = {"digest": None, "seconds": None, "picture": False, "sound": "none", "streams": []}
    try:
        if path.stat().st_size == 0:
            return entry | {"findings": [Finding("empty", "the file has no bytes; copy or download it again").record()]}
        entry["digest"] = file_digest(path)
        entry |= _look(path, fast)
    except OmniMemError as error:
        entry["findings"] = [Finding("cannot_open", str(error).removeprefix(f"{path.name}: ")).record()]
    except OSError as error:
        entry["findings"] = [Finding("cannot_open", f"cannot be read: {error.strerror}").record()]
    except Exception as error:  # one strange file must not end a run over thousands; it is reported as unusable
        what = " ".join(f"{type(error).__name__}: {error}".split())
        entry["findings"] = [Finding("cannot_open", f"reading it fails ({what[:200]})").record()]
    return entry


def _look(path: Path, fast: bool) -> dict[str, Any]:
    source = inspect(path)
    info = source.info
    tracks, failure = read_tracks(path, fast)
    used = [track for track in tracks if track.index in (info.video_index, info.audio_index)]
    findings = [
        *_broken(source, tracks, used, failure),
        *_damage(source, tracks, used),
        *_sound(path, info, used),
        *_picture(path, info, used),
        *_times(source, tracks, used, fast),
        *_header(path),
        *_choices(info, tracks),
    ]
    ends = [track.end - source.zero for track in used if track.end is not None]
    sound = next((track for track in used if track.kind == "audio"), None)
    return {
        "container": info.container,
        "seconds": round(float(max(ends, default=Fraction(0))), 3),
        "header_seconds": None if info.duration is None else round(info.duration, 3),
        "picture": info.video_index is not None,
        "width": info.width,
        "height": info.height,
        "sound": "none" if sound is None else "silent" if sound.silent else "yes",
        "streams": [track.record(source.zero, track in used) for track in tracks],
        "findings": [finding.record() for finding in findings],
    }


def _broken(source: Source, tracks: list[Track], used: list[Track], failure: str | None) -> list[Finding]:
    """What the reader of a training run would stop at."""
    found = []
    for track in used:
        if track.error is not None:
            second = float(track.error[0] - source.zero)
            message = f"the picture (track {track.index}) cannot be decoded from {second:.2f} s on ({track.error[1]})"
            found.append(Finding("decode_error", message))
    ends = [track.end - source.zero for track in used if track.end is not None]
    reached = min(ends, default=Fraction(0))
    end, promised = max(ends, default=Fraction(0)), source.promised_end
    missing = Fraction(0) if promised is None else promised - source.zero - end
    cut = any(track.cut_short for track in used)
    if cut or (not found and missing > max(MISSING_SECONDS, MISSING_SHARE * (end + missing))):
        # Of two tracks the shorter counts where bytes are missing; they are read together.
        total = "" if source.info.duration is None else f" of {source.info.duration:.1f} s"
        message = f"cut off: readable up to {float(reached if cut else end):.1f} s{total}; copy it again"
        found.append(Finding("cut_off", message))
    if failure is not None:
        found.append(Finding("read_error", f"reading stops at {float(reached):.1f} s ({failure}); copy it again"))
    return found


def _damage(source: Source, tracks: list[Track], used: list[Track]) -> list[Finding]:
    found = []
    for track in tracks:
        second = float((track.damaged_at or source.zero) - source.zero)
        if track not in used:
            if track.error is not None or track.damaged:
                found.append(Finding("damaged_unused", f"{track.kind} track {track.index}, not used, is damaged"))
        elif track.damaged and track.kind == "audio":
            many = f"{track.damaged} damaged packets of sound" if track.damaged > 1 else "a damaged packet of sound"
            found.append(Finding("damaged_sound", f"{many}, the first at {second:.2f} s"))
        elif track.damaged:
            many = f"{track.damaged} damaged pictures" if track.damaged > 1 else "a damaged picture"
            message = f"{many}, the first at {second:.2f} s; decoders repair what they can"
            found.append(Finding("damaged_pictures", message))
    return found


def _sound(path: Path, info: MediaInfo, used: list[Track]) -> list[Finding]:
    track = next((track for track in used if track.kind == "audio"), None)
    if track is None:
        return [Finding("no_sound", "no sound track")]
    found = []
    if track.silent:
        found.append(Finding("silent_sound", "the sound track is silent: every sample is zero"))
    chosen = next(one for one in info.audio_tracks if one.index == track.index)
    if chosen.sample_rate < 16_000:
        found.append(Finding("sample_rate", f"sound at {chosen.sample_rate} Hz: nothing above half of that is heard"))
    if path.suffix.lower() in VIDEO_SUFFIXES and chosen.codec.startswith("pcm_"):
        found.append(Finding("uncompressed", f"uncompressed sound ({chosen.codec})"))
    if chosen.channels > 2:
        layout = "5.1 sound" if chosen.channels == 6 else "sound"
        found.append(Finding("channels", f"{layout}: {chosen.channels} channels are mixed down to one"))
    return found


def _picture(path: Path, info: MediaInfo, used: list[Track]) -> list[Finding]:
    track = next((track for track in used if track.kind == "video"), None)
    if track is None:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return [Finding("no_picture_in_video", f"no picture: sound only, though in a {path.suffix} file")]
        return [Finding("no_picture", "no picture: sound only")]
    found = []
    if info.rotation:
        shown = f"shown as {info.width}x{info.height}"
        found.append(Finding("rotated", f"stored turned by {info.rotation} degrees; {shown}"))
    if track.hidden:
        found.append(Finding("edit_list", f"an edit list hides {track.hidden} stored pictures"))
    if track.before_key:
        found.append(Finding("late_key_frame", f"{track.before_key} pictures before the first key frame are not shown"))
    long, short = max(info.width, info.height), min(info.width, info.height)
    if info.width % 2 or info.height % 2 or short < LEAST_SIDE or long > LONGEST_RATIO * short:
        found.append(Finding("odd_size", f"an unusual picture of {info.width}x{info.height} pixels"))
    return found


def _times(source: Source, tracks: list[Track], used: list[Track], fast: bool) -> list[Finding]:
    info, found = source.info, []
    video = next((track for track in used if track.kind == "video"), None)
    if video is not None and not video.untimed:
        if is_variable(video.times, video.tick):
            low, high = step_range(video.times, video.tick)
            steps = f"steps of {1000 * low:.0f} to {1000 * high:.0f} ms"
            found.append(Finding("variable_rate", f"variable frame rate: {steps} between pictures"))
        # Packets lie in the order of decoding, so only decoded pictures show whether time goes back.
        if not fast and (back := backward_steps(video.times)):
            found.append(Finding("timestamps", f"{back} pictures do not come after the one before them"))
    if info.video_offset is not None and info.audio_offset is not None:
        late = info.audio_offset - info.video_offset
        if abs(late) > APART:
            first, last = ("picture", "sound") if late > 0 else ("sound", "picture")
            found.append(Finding("starts_apart", f"the {last} starts {1000 * abs(late):.0f} ms after the {first}"))
    whole = all(track.error is None and not track.cut_short for track in used)
    ends = {track.kind: track.end for track in used if track.end is not None}
    if whole and len(ends) == 2 and abs(gap := float(ends["audio"] - ends["video"])) > ENDS_APART:
        first, last = ("picture", "sound") if gap > 0 else ("sound", "picture")
        found.append(Finding("ends_apart", f"the {first} ends {abs(gap):.1f} s before the {last}"))
    return [*found, *_duration(info, [track for track in tracks if not track.still], whole)]


def _duration(info: MediaInfo, moving: list[Track], whole: bool) -> list[Finding]:
    starts = [track.first for track in moving if track.first is not None]
    length = float(max((track.end for track in moving if track.end is not None), default=0) - min(starts, default=0))
    found = []
    if info.duration is None:
        message = f"the header does not say how long it is ({length:.1f} s): plans count it as 0 s"
        found.append(Finding("no_duration", message))
    elif whole and abs(info.duration - length) > max(DIFFERS_SECONDS, DIFFERS_SHARE * length):
        found.append(Finding("duration_differs", f"the header says {info.duration:.1f} s, it has {length:.1f} s"))
    if whole and length < SHORT:
        found.append(Finding("short", f"only {length:.2f} s long"))
    return found


def _header(path: Path) -> list[Finding]:
    """What no frame tells: metadata, still pictures, tracks that are not read, depth of colour."""
    found = []
    try:
        open_container(path, metadata_errors="strict").close()
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}"
        found.append(Finding("metadata", f"metadata that is not UTF-8 ({byte}); it is ignored"))
    with open_container(path) as container:
        for stream in container.streams.video:
            codec = stream.codec_context
            if codec and stream.disposition & STILLS:
                message = f"cover art ({codec.name}, {stream.width}x{stream.height}): a still picture is not video"
                found.append(Finding("cover_art", message))
            elif codec and codec.format and (bits := max(part.bits for part in codec.format.components)) > 8:
                message = f"{bits} bits a colour ({codec.name}, track {stream.index}); pictures are read as 8"
                found.append(Finding("deep_colour", message))
        unknown = [s.index for s in (*container.streams.video, *container.streams.audio) if not s.codec_context]
        if unknown:
            found.append(Finding("unknown_codec", f"tracks FFmpeg has no decoder for: {_listed(unknown)}"))
        others = [stream.type for stream in container.streams if stream.type not in ("video", "audio")]
        if others:
            counts = [f"{others.count(kind)} {kind}" for kind in sorted(set(others))]
            found.append(Finding("other_tracks", f"tracks that are not read: {', '.join(counts)}"))
    return found


def _choices(info: MediaInfo, tracks: list[Track]) -> list[Finding]:
    found = []
    for kind, code, chosen in (
        ("video", "several_video", info.video_index),
        ("audio", "several_audio", info.audio_index),
    ):
        indices = [track.index for track in tracks if track.kind == kind and not track.still]
        if len(indices) > 1:
            found.append(Finding(code, f"{len(indices)} {kind} tracks ({_listed(indices)}); {chosen} is used"))
    return found


def _listed(indices: list[int]) -> str:
    return ", ".join(str(index) for index in indices)

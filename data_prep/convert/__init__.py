"""Data sets of other projects to a manifest: read, checked and merged row by row; good rows go on.

Why: a set made for one trainer should be one command away from this one, and a row that says something else
than it seems (a placeholder without media, a path that leaves the data root) must not be trained on.

    omnimem data convert train.json --to train.jsonl --root data

One module a format: `video_salmonn2`, `sharegpt` (LLaMA-Factory), `swift`, `table` (CSV); `huggingface` reads
data sets whose columns are one of them.

The rejected answer of a preference pair is kept in the manifest, but nothing trains on it: training is supervised
fine-tuning on answers, without a preference objective such as DPO.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.manifest import BadRow, find_media, read_row, short
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file
from omnimem.media import MediaError, MediaInfo, probe

from .huggingface import is_hub
from .options import Reading
from .sample import MUTE, REJECTED, Sample
from .sources import FORMATS, read_rows, read_sample

__all__ = ["FORMATS", "Report", "convert"]

Key = tuple[str, str | None, bool]  # media, sound, audio: rows that share them are one stream


@dataclass
class Report:
    """What became of the rows: counts, the refused ones as (place, reason), and what the summary says."""

    out: Path
    root: Path
    rows: int = 0
    questions: int = 0
    read: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def refused_file(self) -> Path:
        """Where the refused rows are listed, if there are any."""
        return self.out.with_suffix(".refused.jsonl")

    def lines(self) -> Iterator[str]:
        """What to print, the last line being how to train."""
        yield (
            f"{self.out}: {self.rows} rows written ({self.questions} questions, from {self.read} source rows), "
            f"{len(self.refused)} refused"
        )
        if self.refused:
            place, reason = self.refused[0]
            yield f"refused rows with reasons: {self.refused_file}; the first: {place}: {reason}"
        for note, count in self.notes.items():
            yield f"{note}: {count}"
        words = [f"data.path={self.out}"]
        if self.root != Path(os.path.realpath(self.out.parent)):
            words.append(f"data.root={self.root}")
        yield f"train: accelerate launch train.py recipe=NAME {shlex.join(words)}"


def convert(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    format: str = "auto",
    split: str = "train",
    audio: str = "auto",
    answers: Reading = "auto",
    on_bad_row: str = "skip",
    open_media: bool = True,
) -> Report:
    """Write a manifest with the good rows of data sets.

    Parameters
    ----------
    sources : sequence of str
        Files, folders of data sets, hub ids.
    out : path
        The manifest; its folder is made. The refused rows are listed beside it, in `NAME.refused.jsonl`.
    root : path, optional
        The data root: media paths are relative to it and may not leave it. The folder that the sources lie in
        if not given.
    format : str
        One of FORMATS.
    split : str
        Of a data set that has splits.
    audio : {"auto", "on", "off"}
        What is heard: what the source says, every video, or none.
    answers : {"auto", "letter", "index", "index1", "text"}
        How answers name their option.
    on_bad_row : {"skip", "error"}
        Leave a bad row out, or stop at the first.
    open_media : bool
        Open every file once and decode its first picture and sound; else only see that it is there.

    Raises
    ------
    OmniMemError
        A source that cannot be read, a bad row under "error", or no good row.
    """
    folder = _data_root(sources, root)
    _check_out(sources, Path(out))
    report = Report(Path(out), folder)
    files = _Files(folder, open_media)
    streams: dict[Key, list[dict[str, Any]]] = {}
    for place, found, source in _all_rows(sources, format, split):
        report.read += 1
        try:
            if isinstance(found, BadRow):
                raise found
            sample = read_sample(found, source, format, answers)
            key, questions, notes = _stream(sample, files, audio)
            read_row(_line(key, questions), report.read, folder)  # a manifest's own check has the last word
        except BadRow as reason:
            if on_bad_row == "error":
                raise OmniMemError(f"{place}: {reason} (--on-bad-row skip leaves bad rows out)") from reason
            report.refused.append((_printable(place), _printable(str(reason))))
        else:
            streams.setdefault(key, []).extend(questions)
            report.notes.update(notes)
    report.rows, report.questions = len(streams), sum(map(len, streams.values()))
    _write(report, streams, sources)
    return report


def _printable(text: str) -> str:
    """A row may hold half a character pair, a file name bytes that are not UTF-8: no terminal can show those."""
    return text.encode("utf-8", "backslashreplace").decode()


def _data_root(sources: Sequence[str], root: str | os.PathLike[str] | None) -> Path:
    if root is not None:
        if not Path(root).is_dir():
            raise OmniMemError(f"{os.fspath(root)}: not a folder; --root is where the media lie")
        return Path(os.path.realpath(root))
    folders = {os.path.realpath(Path(source).parent) for source in sources if not is_hub(source)}
    if len(folders) != 1 or any(is_hub(source) for source in sources):
        raise OmniMemError("the sources do not lie in one folder; name the one that media lie in with --root")
    return Path(folders.pop())


def _check_out(sources: Sequence[str], out: Path) -> None:
    if out.suffix != ".jsonl":
        raise OmniMemError(f"{out}: a manifest is JSON Lines; give it a name that ends in .jsonl")
    if os.path.realpath(out) in {os.path.realpath(source) for source in sources}:
        raise OmniMemError(f"{out} is the input; choose another name for the manifest")


def _all_rows(sources: Sequence[str], format: str, split: str) -> Iterator[tuple[str, Any, str]]:
    for source in sources:
        for place, found in read_rows(source, format, split):
            yield place, found, source


class _Files:
    """Finds media below a root and looks into each file once."""

    def __init__(self, root: Path, open_media: bool) -> None:
        self.root = root
        self._open = open_media
        self._seen: dict[Path, MediaInfo | str] = {}

    def find(self, path: str, kind: str) -> str:
        """Return the path relative to the root; links and `..` are followed."""
        return find_media(path, self.root, kind).relative_to(self.root).as_posix()

    def look(self, name: str) -> MediaInfo | None:
        """Return what is in a file, None when files are not opened; raises BadRow for an unreadable one."""
        if not self._open:
            return None
        path = self.root / name
        if path not in self._seen:
            try:
                self._seen[path] = probe(path)
            except MediaError as error:
                self._seen[path] = str(error)
        info = self._seen[path]
        if isinstance(info, str):
            raise BadRow(info)
        return info


def _stream(sample: Sample, files: _Files, audio: str) -> tuple[Key, list[dict[str, Any]], tuple[str, ...]]:
    """Return which stream a sample is about, its questions as a manifest has them, and its notes."""
    heard = {"auto": sample.audio, "on": True, "off": False}[audio]
    notes = tuple(note for note in sample.notes if note != MUTE or audio == "auto")
    notes += (REJECTED,) * sum(asked.rejected is not None for asked in sample.questions)
    video = None if sample.video is None else files.find(sample.video, "video")
    sound = None if sample.sound is None else files.find(sample.sound, "audio")
    if video is None:
        if not heard:
            raise BadRow(f"audio {short(sample.sound)} alone, and --audio off leaves nothing of it")
    elif not heard or sound == video:
        sound = None
    for name, what in ((video, "video"), (sound, "audio")):
        info = None if name is None else files.look(name)
        if info is not None and not (info.has_video if what == "video" else info.has_audio):
            raise BadRow(f"{what} {short(name)} has no {'picture' if what == 'video' else 'sound'} in it")
        if info is not None and video is None and info.has_video:
            raise BadRow(f"audio {short(name)} is a video, which would be watched; extract its sound (ffmpeg -vn)")
    media, beside = (video, sound) if video is not None else (sound, None)
    assert media is not None
    fields = ("question", "answer", "time", "rejected")
    questions = [
        {name: value for name in fields if (value := getattr(asked, name)) is not None} for asked in sample.questions
    ]
    return (media, beside, heard), questions, notes


def _line(key: Key, questions: list[dict[str, Any]]) -> bytes:
    """One line of a manifest.

    Raises
    ------
    BadRow
        Half a character pair in a text, which JSON can say, or bytes that were no UTF-8.
    """
    media, sound, audio = key
    row: dict[str, Any] = {"media": media}
    if sound is not None:
        row["audio_path"] = sound
    if not audio:
        row["audio"] = False
    row["questions"] = questions
    try:
        return json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("a text is not UTF-8; save the source in UTF-8") from error


def _write(report: Report, streams: dict[Key, list[dict[str, Any]]], sources: Sequence[str]) -> None:
    """Write the list of refused rows, then the manifest: each complete or not at all."""
    if report.refused:
        with atomic_file(report.refused_file) as temporary, temporary.open("w", encoding="utf-8") as file:
            for place, reason in report.refused:
                file.write(json.dumps({"source": place, "reason": reason}, ensure_ascii=False) + "\n")
    else:
        with suppress(FileNotFoundError):
            report.refused_file.unlink()  # of an earlier conversion, whose reasons no longer hold
    if not streams:
        first = f"; the first: {report.refused[0][0]}: {report.refused[0][1]}" if report.refused else ""
        listed = f" ({report.refused_file} lists why)" if report.refused else ""
        raise OmniMemError(f"no good row among {report.read} in {', '.join(sources)}{listed}{first}")
    with atomic_file(report.out) as temporary, temporary.open("wb") as file:
        for key, questions in streams.items():
            file.write(_line(key, questions) + b"\n")

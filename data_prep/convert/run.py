"""`omnimem data convert`: read the rows of all sources, check each, and merge rows about the same stream.

report = convert(["train.json"], "train.jsonl", root="clips")
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.manifest import BadRow, find_media, read_row, short
from omnimem.errors import OmniMemError
from omnimem.media import MediaError, MediaInfo, probe

from .huggingface import is_hub
from .options import AnswerForm
from .report import Report, Stream, manifest_line, write
from .sample import MUTED, REJECTED, Sample
from .sources import read_rows, read_sample


def convert(
    sources: Sequence[str],
    out: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    format: str = "auto",
    split: str = "train",
    audio: str = "auto",
    answers: AnswerForm = "auto",
    on_bad_row: str = "skip",
    open_media: bool = True,
) -> Report:
    """Write a manifest from the good rows of data sets.

    Parameters
    ----------
    sources : sequence of str
        Files, folders of data sets, hub ids.
    out : path
        The manifest; its folder is created. Refused rows are listed next to it, in `NAME.refused.jsonl`.
    root : path, optional
        The data root: media paths are relative to it and must lie inside it. Default: the folder of the sources.
    format : str
        One of FORMATS.
    split : str
        Split of a data set that has splits.
    audio : {"auto", "on", "off"}
        Whether the audio of videos is used: as the source says, always, or never.
    answers : {"auto", "letter", "index", "index1", "text"}
        How answers name their option.
    on_bad_row : {"skip", "error"}
        Skip a bad row, or stop at the first.
    open_media : bool
        Open every file and decode its first frame and audio packet; otherwise only check that it exists.

    Raises
    ------
    OmniMemError
        A source that cannot be read, a bad row under "error", or no good row.
    """
    folder = _data_root(sources, root)
    _check_out(sources, Path(out))
    report = Report(Path(out), folder)
    files = _Files(folder, open_media)
    streams: dict[Stream, list[dict[str, Any]]] = {}
    for place, found, source in _all_rows(sources, format, split):
        report.read += 1
        try:
            if isinstance(found, BadRow):
                raise found
            sample = read_sample(found, source, format, answers)
            stream, questions, notes = _to_manifest(sample, files, audio)
            read_row(manifest_line(stream, questions), report.read, folder)  # the check every manifest row must pass
        except BadRow as reason:
            if on_bad_row == "error":
                raise OmniMemError(f"{place}: {reason} (--on-bad-row skip skips bad rows)") from reason
            report.refused.append((_printable(place), _printable(str(reason))))
        else:
            streams.setdefault(stream, []).extend(questions)
            report.notes.update(notes)
    report.rows, report.questions = len(streams), sum(map(len, streams.values()))
    write(report, streams, sources)
    return report


def _printable(text: str) -> str:
    """Escape lone surrogates (from rows, or from file names that are not UTF-8), which no terminal can print."""
    return text.encode("utf-8", "backslashreplace").decode()


def _data_root(sources: Sequence[str], root: str | os.PathLike[str] | None) -> Path:
    if root is not None:
        if not Path(root).is_dir():
            raise OmniMemError(f"{os.fspath(root)}: not a folder; give the folder of the media as --root")
        return Path(os.path.realpath(root))
    folders = {os.path.realpath(Path(source).parent) for source in sources if not is_hub(source)}
    if len(folders) != 1 or any(is_hub(source) for source in sources):
        raise OmniMemError("the sources are not in one folder; give the folder of the media as --root")
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
    """Finds media below a data root and opens each file once."""

    def __init__(self, root: Path, open_media: bool) -> None:
        self.root = root
        self._open = open_media
        self._infos: dict[Path, MediaInfo | str] = {}

    def find(self, path: str, kind: str) -> str:
        """Return the path relative to the root, with links and `..` resolved."""
        return find_media(path, self.root, kind).relative_to(self.root).as_posix()

    def info(self, name: str) -> MediaInfo | None:
        """Facts about a file, None if files are not opened.

        Raises
        ------
        BadRow
            The file cannot be read.
        """
        if not self._open:
            return None
        path = self.root / name
        if path not in self._infos:
            try:
                self._infos[path] = probe(path)
            except MediaError as error:
                self._infos[path] = str(error)
        info = self._infos[path]
        if isinstance(info, str):
            raise BadRow(info)
        return info


def _to_manifest(sample: Sample, files: _Files, audio: str) -> tuple[Stream, list[dict[str, Any]], tuple[str, ...]]:
    """Return the stream of a sample, its questions as the manifest has them, and its notes.

    Raises
    ------
    BadRow
        A file that is missing, unreadable, or lacks the video or audio it should have.
    """
    use_audio = {"auto": sample.use_audio, "on": True, "off": False}[audio]
    notes = tuple(note for note in sample.notes if note != MUTED or audio == "auto")
    notes += (REJECTED,) * sum(question.rejected is not None for question in sample.questions)
    video = None if sample.video is None else files.find(sample.video, "video")
    audio_path = None if sample.audio_path is None else files.find(sample.audio_path, "audio")
    if video is None and not use_audio:
        raise BadRow(f"audio {short(sample.audio_path)} has no video, and --audio off leaves nothing of it")
    if video is not None and (not use_audio or audio_path == video):
        audio_path = None
    for name, kind in ((video, "video"), (audio_path, "audio")):
        info = None if name is None else files.info(name)
        if info is not None and not (info.has_video if kind == "video" else info.has_audio):
            raise BadRow(f"{kind} {short(name)} has no {kind} track")
        if info is not None and video is None and info.has_video:
            raise BadRow(f"audio {short(name)} has a video track, which would be used; extract the audio (ffmpeg -vn)")
    media, separate_audio = (video, audio_path) if video is not None else (audio_path, None)
    assert media is not None
    keys = ("question", "answer", "time", "rejected")
    questions = [
        {key: value for key in keys if (value := getattr(question, key)) is not None} for question in sample.questions
    ]
    return Stream(media, separate_audio, use_audio), questions, notes

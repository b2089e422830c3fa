"""A file of the data root must not make FFmpeg read another one: containers only, whatever a file is called."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest
from PIL import Image

from clips import MEDIA, RABBIT, ROOT
from data_prep.decoded_clips.folder import read_records
from data_prep.decoded_clips.format import PrepareSettings
from data_prep.decoded_clips.prepare import prepare
from data_prep.decoded_clips.shard_writer import source
from data_prep.manifest import read_manifest
from data_prep.validate import validate
from data_prep.validate.file import AUDIO_SUFFIXES, VIDEO_SUFFIXES, check_file
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.files import file_digest
from omnimem.media import MediaError, container, open_media, probe
from omnimem.recipe import DataConfig
from small_runs import FLOWER, SPEECH, lines
from train.data import load_rows

ASKED = {"question": "What is seen?", "answer": "A rabbit."}


def remux(source: Path, target: Path) -> Path:
    """Copy the streams of a clip into another container."""
    with av.open(str(source)) as given, av.open(str(target), "w") as made:
        streams = {stream.index: made.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                made.mux(packet)
    return target


@pytest.fixture
def outside(tmp_path) -> Path:
    """A folder with a film, its MPEG-TS form and an image, which nothing in the data root may read."""
    folder = tmp_path / "outside"
    folder.mkdir()
    remux(RABBIT, folder / "secret.mp4")
    remux(RABBIT, folder / "secret.ts")
    Image.new("RGB", (64, 64), "red").save(folder / "secret.png")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def playlist(outside: Path) -> str:
    return f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:8.0,\n{outside}/secret.ts\n#EXT-X-ENDLIST\n"


def linked(root: Path, outside: Path) -> str:
    """A name that FFmpeg's concat calls safe: relative, below the list, and a link that leaves the data root."""
    (root / "inside.mp4").symlink_to(outside / "secret.mp4")
    return "ffconcat version 1.0\nfile inside.mp4\n"


def numbered(root: Path, outside: Path) -> bytes:
    """The name itself is a pattern: of it FFmpeg reads ``frame001.png`` and so on."""
    (root / "frame001.png").symlink_to(outside / "secret.png")
    return (outside / "secret.png").read_bytes()


SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
MPD = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT8S"
profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet><Representation id="0" mimeType="video/mp4"
bandwidth="1"><BaseURL>file://OUTSIDE/secret.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>"""

EVIL: dict[str, tuple[Callable[[Path, Path], str | bytes], str]] = {
    "list.m3u8": (lambda root, outside: playlist(outside), "hls"),
    "playlist.mp4": (lambda root, outside: playlist(outside), ""),
    "list.ffconcat": (linked, "concat"),
    "concat.mp4": (linked, "concat"),
    "absolute.mp4": (lambda root, outside: f"ffconcat version 1.0\nfile '{outside}/secret.mp4'\n", "concat"),
    "session.sdp": (lambda root, outside: SDP, "sdp"),
    "session.mp4": (lambda root, outside: SDP, "sdp"),
    "manifest.mpd": (lambda root, outside: MPD.replace("OUTSIDE", str(outside)), ""),
    "frame%03d.png": (numbered, "image2"),
}
"""File name: what makes its content, and the format that the refusal names where every FFmpeg tells it."""


@pytest.fixture(params=EVIL)
def evil(request, root, outside) -> Path:
    content = EVIL[request.param][0](root, outside)
    path = root / request.param
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def manifest(root: Path, *rows: dict) -> Path:
    file = root / "data.jsonl"
    file.write_text("".join(json.dumps({**row, **ASKED}) + "\n" for row in rows))
    return file


# ---- formats that name other files -----------------------------------------------------------------------------------


def test_reading_refuses_it_in_one_line(evil):
    for read in (probe, open_media):
        with pytest.raises(MediaError) as error:
            read(evil)
        said = str(error.value)
        assert said.startswith(f"{evil.name}: ") and "\n" not in said
        if format_name := EVIL[evil.name][1]:
            assert f"({format_name})" in said and "refers to other files" in said and "; give the media file" in said


def test_validating_refuses_it(evil, root):
    for fast in (True, False):
        (finding,) = check_file(evil, fast)["findings"]
        assert finding["code"] == "cannot_open"
    file = manifest(root, {"media": evil.name}, {"media": inner(root)})
    report = validate(str(file), report=root / "report.json", workers=1)
    assert report["rows"]["usable"] == 1


def inner(root: Path) -> str:
    """A harmless clip inside the root."""
    return (root / "good.webm").write_bytes((MEDIA / FLOWER).read_bytes()) and "good.webm"


def test_preparing_refuses_it(evil, root, tmp_path):
    file = manifest(root, {"media": evil.name}, {"media": inner(root)})
    folder = tmp_path / "prepared"
    report = prepare(read_manifest(file), folder, PrepareSettings(), workers=1, on_bad_row="skip")
    assert report.decoded == 1
    (problem,) = report.problems
    assert evil.name in problem
    assert [record["name"] for record in read_records(folder)] == ["good.webm"]


def test_training_refuses_it_as_media_and_as_audio(evil, root):
    for row in ({"media": evil.name}, {"media": inner(root), "audio_path": evil.name}):
        with pytest.raises(OmniMemError, match=re.escape(evil.name)):
            load_rows(DataConfig(path=str(manifest(root, row))))


def test_answering_refuses_it(evil, capsys):
    capsys.readouterr()
    assert omnimem(["answer", "tiny", str(evil), "What is seen?"]) == 2
    (line,) = lines(capsys.readouterr().err)
    assert line.startswith(f"omnimem: {evil.name}: ")


@pytest.mark.parametrize("protocol", ["concat:{}", "subfile,,start,0,end,0,,:{}", "file:{}", "crypto:{}", "data:{}"])
def test_a_name_is_never_a_protocol(protocol, outside, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(MediaError, match="no such file"):
        probe(protocol.format(outside / "secret.ts"))


# ---- a container that points at another file -------------------------------------------------------------------------


def atoms(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        yield name, data[at + 8 : at + size]
        at += size


def atom(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), name) + content


def with_data_elsewhere(film: bytes, path: str) -> bytes:
    """The film without its data, its tracks said to lie at an absolute path (a QuickTime alias)."""
    name = os.fsencode(path)
    name += b"\0" * (len(name) % 2)
    alias = bytes(10) + bytes(1 + 27) + bytes(12) + bytes(1 + 63) + bytes(16) + struct.pack(">HH", 0, 0) + bytes(16)
    alias += struct.pack(">HH", 2, len(name)) + name + struct.pack(">hH", -1, 0)
    entry = atom(b"alis", struct.pack(">I", 0) + alias)
    reference = struct.pack(">II", 0, 1) + entry

    def rewrite(name: bytes, content: bytes) -> bytes:
        if name == b"dref":
            return atom(name, reference)
        if name in (b"moov", b"trak", b"mdia", b"minf", b"dinf"):
            return atom(name, b"".join(rewrite(*one) for one in atoms(content)))
        return atom(name, bytes(len(content)) if name == b"mdat" else content)

    return b"".join(rewrite(*one) for one in atoms(film))


def test_a_film_whose_data_lie_in_another_file_is_not_followed(outside, root):
    film = (outside / "secret.mp4").read_bytes()
    assert film.index(b"mdat") < film.index(b"moov"), "a longer index must not move the data"
    path = root / "reference.mov"
    path.write_bytes(with_data_elsewhere(film, str(outside / "secret.mp4")))
    followed = {"enable_drefs": "1", "use_absolute_path": "1"}
    with av.open(str(path), options=followed) as opened:
        assert next(opened.decode(video=0)).width > 0, "FFmpeg follows it when told to"
    with pytest.raises(MediaError, match=r"reference\.mov"):
        probe(path)
    assert check_file(path, fast=False)["findings"][0]["code"] == "cannot_open"


# ---- what is read, and by whom ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_still_image_is_no_film(tmp_path, suffix):
    Image.new("RGB", (64, 64)).save(tmp_path / f"photo.{suffix}")
    (tmp_path / f"photo.{suffix}").rename(tmp_path / "photo.mp4")
    with pytest.raises(MediaError, match="a still picture") as error:
        probe(tmp_path / "photo.mp4")
    assert "\n" not in str(error.value)


def test_every_suffix_that_counts_as_media_has_a_demuxer_that_is_allowed():
    """By FFmpeg's own table of suffixes, where it lists one; muxers know those that demuxers find by content."""
    known: dict[str, set[str]] = {}
    for mode in "rw":
        for name in av.formats_available:
            try:
                one = av.ContainerFormat(name, mode)
            except ValueError:
                continue
            for suffix in one.extensions:
                known.setdefault(f".{suffix}", set()).update(one.name.split(","))
    allowed = set(container.CONTAINERS.split(","))
    unread = {suffix for suffix in VIDEO_SUFFIXES | AUDIO_SUFFIXES if suffix in known and not known[suffix] & allowed}
    # The muxers of these bear another name than their demuxers: mpegts, mpeg (program streams), mov.
    assert unread <= {".m2ts", ".vob", ".mpg", ".mpeg", ".ogv", ".oga", ".opus", ".m4a", ".alac"}


def test_every_allowed_name_is_one_of_ffmpeg():
    for name in container.CONTAINERS.split(","):
        assert name in av.ContainerFormat(name, "r").name.split(","), name


def test_only_one_place_opens_files():
    found = [
        f"{path.relative_to(ROOT)}"
        for folder in ("omnimem", "train", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"\bav\.open\(|\bavio|from av import .*\bopen\b", path.read_text(encoding="utf-8"))
    ]
    assert found == ["omnimem/media/container.py"]


def test_a_shard_is_named_after_everything_that_was_read(root, tmp_path, monkeypatch):
    """Every file that is opened is among the sources, and a byte more in any of them makes another shard."""
    (root / "film.webm").write_bytes((MEDIA / FLOWER).read_bytes())
    (root / "talk.mp3").write_bytes((MEDIA / SPEECH).read_bytes())
    file = manifest(root, {"media": "film.webm", "audio_path": "talk.mp3"})
    opened = set()
    real = av.open

    def noting(name, *args, **options):
        opened.add(Path(name.removeprefix("file:")))
        return real(name, *args, **options)

    monkeypatch.setattr(container.av, "open", noting)

    def shard() -> str:
        prepare(read_manifest(file), tmp_path / "prepared", PrepareSettings(), workers=1)
        (record,) = read_records(tmp_path / "prepared")
        for one in record["sources"]:
            assert one == {**source(Path(one["path"])), "digest": file_digest(Path(one["path"]))}
        assert opened <= {Path(one["path"]) for one in record["sources"]}
        return record["shard"]

    names = [shard()]
    assert opened == {root / "film.webm", root / "talk.mp3"}
    for name in ("talk.mp3", "film.webm"):
        with (root / name).open("ab") as longer:
            longer.write(b"\0")
        names.append(shard())
    assert len(set(names)) == 3

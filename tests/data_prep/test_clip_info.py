"""The clips of a manifest are opened in parallel, by one process, and again only if they changed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import av
import pytest

from clips import MEDIA
from data_prep import clip_info
from omnimem.errors import OmniMemError
from omnimem.media import container, probe
from omnimem.recipe import DataConfig
from small_runs import FLOWER, NO_INDEX, RABBIT, ROOT, SILENT, SPEECH, arguments, free_port, lines, main, metrics, start
from train.data import load_rows

NAMES = (RABBIT, FLOWER, SILENT)
ASKED = {"question": "What is seen?", "answer": "A flower."}


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    """The cache folder, empty at first."""
    monkeypatch.setenv("OMNIMEM_CACHE", str(tmp_path / "memory"))
    return tmp_path / "memory"


@pytest.fixture
def data(tmp_path) -> DataConfig:
    """Three clips, one of them in two rows, one with a separate audio file."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for name in (*NAMES, SPEECH):
        shutil.copy(MEDIA / name, folder)
    rows = [{"media": name, **ASKED} for name in (*NAMES, FLOWER)]
    rows[2]["audio_path"] = SPEECH
    return DataConfig(path=str(written(folder, rows)))


def written(folder: Path, rows: list[dict]) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def seen(monkeypatch) -> list[str]:
    """Names of the opened files, once for each time."""
    names: list[str] = []
    real = av.open

    def noting(name, *args, **options):
        names.append(Path(name.removeprefix("file:")).name)
        return real(name, *args, **options)

    monkeypatch.setattr(container.av, "open", noting)
    return names


def test_the_second_start_opens_nothing(data, seen):
    first = load_rows(data)
    assert sorted(seen) == sorted((*NAMES, SPEECH)), "each file once, whatever rows name it"
    seen.clear()
    assert load_rows(data) == first and seen == []
    assert [row.info for row in first.rows[:2]] == [probe(row.media) for row in first.rows[:2]]
    assert first.rows[2].info.has_audio and first.rows[2].info.has_video


@pytest.mark.parametrize("change", ["time", "size", "audio file"])
def test_a_file_that_changed_is_opened_again(data, seen, change):
    load_rows(data)
    seen.clear()
    folder = Path(data.path).parent
    if change == "size":
        before = (folder / FLOWER).stat()
        with (folder / FLOWER).open("ab") as file:
            file.write(b"\0")
        os.utime(folder / FLOWER, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        os.utime(folder / (FLOWER if change == "time" else SPEECH), (0, 0))
    load_rows(data)
    assert sorted(seen) == ([FLOWER] if change != "audio file" else sorted([SILENT, SPEECH]))
    seen.clear()
    load_rows(data)
    assert seen == []


@pytest.mark.parametrize("version", ["__version__", "ffmpeg_version_info"])
def test_another_pyav_or_ffmpeg_opens_all_again(data, seen, monkeypatch, version):
    load_rows(data)
    seen.clear()
    monkeypatch.setattr(av, version, "0.0.1")
    load_rows(data)
    assert len(seen) == len(NAMES) + 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"versions": {}}', "null"])
def test_an_unreadable_cache_is_ignored(data, seen, memory, content):
    first = load_rows(data)
    (file,) = memory.rglob("*.json")
    file.write_text(content)
    seen.clear()
    assert load_rows(data) == first and len(seen) == len(NAMES) + 1


def test_an_unwritable_cache_gives_a_warning(data, memory, caplog):
    memory.write_text("a file where the folder should be")
    load_rows(data)
    assert "opened again at the next start" in caplog.text


def test_clips_are_opened_in_parallel(data, monkeypatch):
    """Every thread waits until all have started."""
    meeting = threading.Barrier(len(NAMES))
    real = clip_info.open_media

    def meets(*args, **options):
        meeting.wait(20)
        return real(*args, **options)

    monkeypatch.setattr(clip_info, "open_media", meets)
    monkeypatch.setattr(clip_info, "WORKERS", len(NAMES))
    load_rows(data)


def test_clips_opened_before_an_interruption_are_cached(data, seen, monkeypatch):
    real = clip_info.open_media

    def interrupted(path, **options):
        if path.name == SILENT:
            raise KeyboardInterrupt
        return real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(clip_info, "open_media", interrupted)
        patch.setattr(clip_info, "WORKERS", 1)
        with pytest.raises(KeyboardInterrupt):
            load_rows(data)
    seen.clear()
    load_rows(data)
    assert sorted(seen) == sorted([SILENT, SPEECH])


def test_a_clip_that_cannot_be_opened_is_tried_again(data, seen):
    folder = Path(data.path).parent
    shutil.copy(MEDIA / NO_INDEX, folder / FLOWER)
    with pytest.raises(OmniMemError, match=rf":2: {FLOWER}: .*index.*on_bad_row=skip"):
        load_rows(data)
    seen.clear()
    data.on_bad_row = "skip"
    found = load_rows(data)
    assert seen == [FLOWER] and [row.name for row in found.rows] == [RABBIT, SILENT] and len(found.problems) == 2


def test_the_plan_opens_no_clip_again(tmp_path, seen, capsys):
    assert main(arguments(tmp_path, "dry_run=true")) == 0
    assert sorted(seen) == sorted([FLOWER, RABBIT])
    seen.clear()
    assert main(arguments(tmp_path, "dry_run=true")) == 0
    assert seen == []


# ---- two processes ---------------------------------------------------------------------------------------------------

PATCHED = """
import os, sys
from pathlib import Path
import av
from omnimem.media import container
real = av.open
def noting(name, *args, **options):
    with open(os.environ["OPENED"], "a") as file:
        file.write(f"{os.environ['RANK']} {Path(name.removeprefix('file:')).name}\\n")
    return real(name, *args, **options)
container.av.open = noting
from train.command import main
sys.exit(main())
"""
"""`train.py`, recording which process opens which file."""


def launched(folder: Path, *args: str):
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "noting.py"
    script.write_text(PATCHED)
    words = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port()))
    return start(
        *words, script, *args, ACCELERATE_USE_CPU="true", OPENED=str(folder / "opened.txt"), PYTHONPATH=str(ROOT)
    )


@pytest.mark.long
def test_one_of_two_processes_opens_the_clips(tmp_path):
    """Before the first step; during the steps each process opens its own clips."""
    rows = [{"media": name, **ASKED} for name in (NO_INDEX, FLOWER, RABBIT)]
    options = ("train.max_steps=1", "train.save_steps=1", "data.on_bad_row=skip", "data.shuffle=false")
    done = launched(tmp_path, *arguments(tmp_path, *options, rows=rows))
    assert done.returncode == 0, done.stderr
    opened_by = [line.split() for line in (tmp_path / "opened.txt").read_text().splitlines()]
    assert {rank for rank, name in opened_by if name == NO_INDEX} == {"0"}
    # Each process trains on one of the two remaining rows: both skipped the same rows.
    assert {name for rank, name in opened_by if rank == "1"} == {RABBIT}
    assert len([line for line in lines(done.stderr) if "row skipped" in line]) == 1
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1]


@pytest.mark.long
def test_a_bad_clip_ends_two_processes_with_one_line(tmp_path):
    rows = [{"media": name, **ASKED} for name in (FLOWER, NO_INDEX)]
    done = launched(tmp_path, *arguments(tmp_path, "train.max_steps=1", rows=rows))
    assert done.returncode != 0
    said = [line for line in lines(done.stderr) if line.startswith("train")]
    assert len(said) == 1 and NO_INDEX in said[0] and said[0].startswith("train: "), done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "run").exists()

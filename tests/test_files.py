"""Files are complete or absent, also if the disk is full or the writer fails."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory, atomic_file, atomic_write_json, atomic_write_text

ROOT = Path(__file__).resolve().parents[1]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_and_json_are_written_completely_with_parent_folders(tmp_path):
    atomic_write_text(tmp_path / "a" / "b.txt", "ü\n")
    atomic_write_json(tmp_path / "c.json", {"x": [1, None], "name": "ü"})
    assert (tmp_path / "a" / "b.txt").read_bytes() == "ü\n".encode()
    assert (tmp_path / "c.json").read_text(
        encoding="utf-8"
    ) == '{\n  "x": [\n    1,\n    null\n  ],\n  "name": "ü"\n}\n'
    assert names(tmp_path) == ["a", "c.json"]


def test_invalid_json_is_not_written(tmp_path):
    with pytest.raises(ValueError):
        atomic_write_json(tmp_path / "c.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_a_failing_writer_leaves_the_old_file(tmp_path):
    target = tmp_path / "model.bin"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_file(target) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".bin"
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and names(tmp_path) == ["model.bin"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    atomic_write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_new_files_have_the_usual_permissions(tmp_path):
    atomic_write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_target_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OmniMemError, match="it is a folder; name a file"):
        atomic_write_text(tmp_path, "x")
    with pytest.raises(OmniMemError, match=r"cannot write .*inner: .*"):
        atomic_write_text(tmp_path / "file" / "inner", "x")
    with pytest.raises(OmniMemError, match="a file of that name exists"), atomic_directory(tmp_path / "file"):
        pass
    assert names(tmp_path) == ["file"]


def test_an_error_about_another_file_is_raised_unchanged(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "out"):
        (tmp_path / "missing input").read_text()
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_directory_appears_when_complete(tmp_path, exists):
    target = tmp_path / "deep" / "out"
    if exists:
        target.mkdir(parents=True)
    with atomic_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not exists or names(target) == []
    assert (target / "sub" / "a").read_text() == "1" and names(target.parent) == ["out"]


def test_directory_is_not_replaced_without_overwrite(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    with (
        pytest.raises(OmniMemError, match=r"exists and is not empty; .* --overwrite"),
        atomic_directory(target),
    ):
        pytest.fail("the work must not start")
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "new").write_text("2")
        assert names(target) == ["old"]
    assert names(target) == ["new"] and names(tmp_path) == ["out"]


def test_files_that_appear_during_the_block_are_not_deleted(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OmniMemError, match="not empty"), atomic_directory(target):
        target.mkdir()
        (target / "theirs").write_text("1")
    assert names(target) == ["theirs"] and names(tmp_path) == ["out"]


def test_directory_is_restored_when_the_last_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("1")
    rename, calls = os.rename, []

    def second_fails(source, destination):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", second_fails)
    with (
        pytest.raises(OmniMemError, match="Input/output error"),
        atomic_directory(target, overwrite=True) as folder,
    ):
        (folder / "new").write_text("2")
    assert names(target) == ["old"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("place", ["working", "home"])
def test_the_working_and_home_folders_are_never_replaced(tmp_path, monkeypatch, place):
    inner = tmp_path / "me" / "project"
    inner.mkdir(parents=True)
    if place == "working":
        monkeypatch.chdir(inner)
    monkeypatch.setenv("HOME", str(inner if place == "home" else "/"))
    with (
        pytest.raises(OmniMemError, match=f"it contains your {place} folder"),
        atomic_directory(tmp_path / "me", overwrite=True),
    ):
        pytest.fail("the work must not start")
    assert inner.is_dir()


class RustError(Exception):
    """As raised by safetensors: its own exception class, without errno."""


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RustError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("kind", [atomic_file, atomic_directory])
def test_full_disk_in_the_writer_names_the_path_and_leaves_nothing(tmp_path, kind, error):
    with (
        pytest.raises(OmniMemError, match=r"cannot write .*out: no space left on the disk"),
        kind(tmp_path / "out"),
    ):
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [atomic_file, atomic_directory])
def test_full_disk_found_by_fsync(tmp_path, monkeypatch, kind):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OmniMemError, match="no space left"), kind(tmp_path / "out") as temporary:
        (temporary / "a" if kind is atomic_directory else temporary).write_text("x")
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [atomic_file, atomic_directory])
def test_data_are_flushed_to_disk_before_the_rename(tmp_path, monkeypatch, kind):
    """The new name is data of the parent folder, which must be flushed after the rename."""
    events, fsync = [], os.fsync

    def flush(descriptor):
        found = os.fstat(descriptor)
        events.append(("flush", found.st_dev, found.st_ino))
        fsync(descriptor)

    def recorded(genuine):
        def move(source, destination):
            genuine(source, destination)
            events.append(("move", Path(destination).name))

        return move

    def flushed(path):
        return ("flush", path.stat().st_dev, path.stat().st_ino)

    target = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flush)
        for name in ("replace", "rename"):
            patch.setattr(os, name, recorded(getattr(os, name)))
        with kind(target) as temporary:
            (temporary / "inner" if kind is atomic_directory else temporary).write_text("x")
    inside = [target] if kind is atomic_file else [target / "inner", target]
    assert events == [*map(flushed, inside), ("move", "out"), flushed(tmp_path)]


ON_A_FULL_DISK = """
import os, sys
from pathlib import Path
from omnimem.errors import OmniMemError
from omnimem.files import atomic_directory, atomic_file, atomic_write_text
disk = Path(sys.argv[1])
(disk / "kept").write_text("old")
for kind in ("text", "file", "directory"):
    try:
        if kind == "text":
            atomic_write_text(disk / "kept", "n" * 200_000)
        elif kind == "file":
            with atomic_file(disk / "kept") as temporary:
                temporary.write_bytes(bytes(200_000))
        else:
            with atomic_directory(disk / "folder") as temporary:
                for index in range(50):
                    (temporary / str(index)).write_bytes(bytes(8_000))
    except OmniMemError as error:
        assert "no space left" in str(error) and str(disk) in str(error), error
    else:
        raise SystemExit("the disk was not full: " + kind)
    assert os.listdir(disk) == ["kept"] and (disk / "kept").read_text() == "old", os.listdir(disk)
"""


def test_a_real_full_disk(tmp_path):
    unshare = shutil.which("unshare")
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    inside = [str(unshare), "--user", "--map-root-user", "--mount"]
    if not unshare or subprocess.run([*inside, *mount], capture_output=True).returncode:
        pytest.skip("needs a user namespace to mount a small tmpfs in")
    script = f'{" ".join(mount[:-1])} "$1" && exec "$2" -c "$3" "$1"'
    command = [*inside, "sh", "-c", script, "sh", str(tmp_path), sys.executable, ON_A_FULL_DISK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

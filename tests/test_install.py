"""The built wheel works outside the checkout: it contains recipes and clips, and runs the quickstart."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from clips import ROOT
from small_runs import environment


def without_checkout() -> dict[str, str]:
    """Environment variables with which the checkout is not found."""
    return {key: value for key, value in environment().items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy, because setuptools writes build/ and *.egg-info next to the sources.
    subprocess.run(["git", "clone", "-q", ROOT, folder / "clone"], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "clone"], check=True
    )
    return next(folder.glob("omnimem-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel and the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", wheel], check=True, env=without_checkout())
    (packages,) = folder.glob("lib/python*/site-packages")
    # A path in a .pth file is searched, but its own .pth files are not read: an editable omnimem there stays unseen.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


@pytest.mark.long
def test_a_wheel_holds_recipes_and_clips_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "data_prep" / "quickstart").iterdir()}
    assert shipped | {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")} <= names
    assert {name.partition("/")[0] for name in names if "dist-info" not in name} == {
        "omnimem",
        "train",
        "data_prep",
        "recipes",
    }


@pytest.mark.long
def test_the_quickstart_runs_from_an_installed_wheel_in_an_empty_folder(installed, tmp_path):
    def run(*command: str) -> str:
        command = (str(installed / command[0]), *command[1:])
        done = subprocess.run(command, cwd=tmp_path, env=without_checkout(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = run("python", "-c", "import omnimem, train, data_prep; print(omnimem.__file__)")
    assert Path(found.strip()).is_relative_to(installed.parent)
    assert "quickstart" in run("omnimem", "recipes")
    assert run("omnimem", "train", "recipe=quickstart", "train.max_steps=2").count("→") == 1
    assert (tmp_path / "runs" / "quickstart" / "merged" / "model.safetensors").is_file()
    # As on several GPUs without the file train.py.
    run("python", "-m", "accelerate.commands.launch", "-m", "omnimem", "train", "recipe=quickstart", "dry_run=true")

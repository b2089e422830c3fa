"""Every command in every README is one that the programs accept; those that need no weights run with ``-m long``."""

from __future__ import annotations

import glob
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from clips import ROOT
from omnimem.cli.command_line import build_parser
from omnimem.measure.overview import overview
from omnimem.recipe import load_recipe
from small_runs import environment

FOLDERS = [ROOT / name for name in ("omnimem", "train", "data_prep", "recipes", "launch", "tests")]
READMES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(path for one in FOLDERS for path in sorted(one.rglob("*.md"))),
]


def commands(readme: Path) -> list[str]:
    """Commands of the bash blocks of a README, one per `&&`, without comments and the path of the environment."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            found += [part.strip() for part in line.split(" #")[0].replace(".venv/bin/", "").split("&&")]
    return [command for command in found if command]


COMMANDS = [
    pytest.param(command, id=f"{readme.relative_to(ROOT)}: {command[:60]}")
    for readme in READMES
    for command in commands(readme)
]


def test_a_training_command_that_needs_weights_says_so():
    needs = 0
    for readme in READMES:
        for line in readme.read_text(encoding="utf-8").splitlines():
            runs = re.match(
                r"(\w+=\S+ )?(accelerate launch|omnimem train|python train\.py) .*recipe=(?!quickstart)", line
            )
            if runs and "dry_run=true" not in line and "name_or_path=tiny" not in line:
                assert "needs weights" in line, f"{readme}: {line}"
                needs += 1
    assert needs >= 3


TOOLS = {"ruff", "pyright", "pip", "pre-commit", "source"}
"""Programs of others, whose options are not checked."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_readme_is_accepted(command):
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program, arguments = words[0], words[1:]
    if program in TOOLS:
        return
    if program == "accelerate":
        assert arguments[0] == "launch"
        if "--config_file" in arguments:
            assert (ROOT / arguments[arguments.index("--config_file") + 1]).is_file()
        load_recipe(recipe_arguments(arguments[arguments.index("train.py") + 1 :]))
    elif program == "omnimem" and arguments[0] == "train":
        load_recipe(recipe_arguments(arguments[1:]))
    elif program == "omnimem":
        build_parser().parse_args(arguments)
    elif program.startswith("python") and arguments[0] == "-m":
        assert find_spec(arguments[1]) is not None
    elif program.startswith("python") and arguments[0] == "train.py":
        load_recipe(recipe_arguments(arguments[1:]))
    elif program.startswith("python"):
        assert (ROOT / arguments[0]).is_file()
        assert all(glob.glob(str(ROOT / word)) for word in arguments[1:] if "/" in word)
    else:
        raise AssertionError(f"unknown program {program}")


def recipe_arguments(words: list[str]) -> list[str]:
    assert all("=" in word for word in words), words
    return words


RUNNABLE = [
    "omnimem train recipe=quickstart dry_run=true",
    "omnimem train recipe=video_salmonn_lora model.name_or_path=tiny data.path=quickstart train.max_steps=1",
    "omnimem data validate quickstart",
    "omnimem data stats quickstart",
    "python tests/check_golden.py tests/data/golden/*.safetensors",
    "python tests/check_golden_models.py tests/data/golden_models/*.safetensors",
]
"""Commands that need neither weights nor data of the reader; those of two processes run in tests/launch."""


@pytest.mark.long
@pytest.mark.parametrize("command", RUNNABLE)
def test_a_command_that_needs_no_weights_runs(command, tmp_path):
    assert any(command in line for readme in READMES for line in commands(readme)), "not in a README any more"
    words = [one for word in shlex.split(command) for one in (sorted(glob.glob(str(ROOT / word))) or [word])]
    program = [sys.executable, "-m", "omnimem"] if words[0] == "omnimem" else [sys.executable]
    done = subprocess.run(
        [*program, *words[1:]], cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_links_of_readmes_lead_somewhere():
    for readme in READMES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", readme.read_text(encoding="utf-8")):
            assert target.startswith("http") or (readme.parent / target).exists(), f"{readme}: {target}"


def test_the_picture_of_the_readme_is_current():
    """Drawn by `python -m omnimem.measure.overview omnimem/memory/overview.svg`."""
    assert (ROOT / "omnimem" / "memory" / "overview.svg").read_text(encoding="utf-8") == overview()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180

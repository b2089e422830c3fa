"""Shared by the tests of training: a finished run (tests copy it before they change it), tiny models by backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train.loop
from omnimem.backbones import backbone_class
from omnimem.cli import main as omnimem
from small_runs import (
    arguments,
    main,
    trained_run,
)
from train.setup import add_lora

STEPS = 18


class Trained:
    """A finished run with the model as it was before the first and after the last step."""

    def __init__(self, folder: Path) -> None:
        self.steps = STEPS
        self.before: dict[str, torch.Tensor] = {}
        self.model: Any = None

        def capture(recipe, backbone):
            self.model = add_lora(recipe, backbone)
            self.before = {name: value.clone() for name, value in self.model.state_dict().items()}
            return self.model

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.loop, "add_lora", capture)
            self.args = arguments(folder, f"train.max_steps={STEPS}", "train.save_steps=9")
            self.base = folder / "run" / "base"
            assert main(self.args) == 0
        self.run = folder / "run"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory) -> Any:
    built: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in built:
            built[name] = backbone_class(name).build_tiny(tmp_path_factory.mktemp("models") / name)
        return built[name]

    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run whose adapter changes the logits of the base clearly."""
    return trained_run(
        tmp_path_factory.mktemp("run"), "train.max_steps=6", "train.learning_rate=3e-2", "train.save_steps=3"
    )


@pytest.fixture(scope="session")
def export(run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("export") / "merged"
    assert omnimem(["export", str(run), "--out", str(out)]) == 0
    return out

"""Shared by the tests of training: a finished run (tests copy it before they change it), tiny models by backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import train.loop
from omnimem.backbones import backbone_class
from small_runs import (
    arguments,
    main,
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

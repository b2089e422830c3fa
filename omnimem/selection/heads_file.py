"""Save and load trained heads (`omnimem.selection.heads`): `selection.safetensors` beside the profile."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimem.budget import ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.files import atomic_file, file_digest
from omnimem.selection.heads import HeadMethod

HEADS_FILE = "selection.safetensors"

ATTRIBUTE = "selection_head"
"""Name under which a decoder layer holds its head while it is trained."""

PARAMETER = re.compile(rf"layers\.(\d+)\.{ATTRIBUTE}\.(.+)$")
"""Parameter of a head in a model: number of the layer, name in the head."""


def heads_in(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the weights of a model, those of the heads, by their name in a heads file (``layers.0.outer.weight``)."""
    found = {name: PARAMETER.search(name) for name in weights}
    return {f"layers.{match[1]}.{match[2]}": weights[name] for name, match in found.items() if match}


def save_heads(
    path: Path, heads: dict[str, Tensor], model: ModelFingerprint | None, base: str, settings: dict[str, Any]
) -> str:
    """Write a heads file and return its SHA-256.

    Parameters
    ----------
    path : Path
        File to write; complete or absent.
    heads : dict
        As `heads_in` returns them.
    model : ModelFingerprint, optional
        The model they were trained for.
    base : str
        Hub id or folder of that model.
    settings : dict
        Settings of the selection method.
    """
    description = {"model": None if model is None else asdict(model), "base": base, "selection": settings}
    with atomic_file(path) as temporary:
        # One key: safetensors writes several in random order, and equal heads must give equal files.
        save_file(heads, temporary, metadata={"omnimem": json.dumps(description, sort_keys=True)})
    return file_digest(path)


def described(path: Path) -> dict[str, Any]:
    """What a heads file says about itself: ``model``, ``base`` and ``selection``.

    Raises
    ------
    OmniMemError
        The file is missing, damaged or not a heads file.
    """
    if not path.is_file():
        raise OmniMemError(f"{path}: no such file; selection.method=learned needs the heads that training saved there")
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["omnimem"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise OmniMemError(f"{path}: not a readable file of selection heads ({type(error).__name__})") from None


def load_heads(
    path: Path, method: HeadMethod, model: ModelFingerprint, channels: int, expected: str | None = None, **kwargs: Any
) -> None:
    """Load heads into a method.

    Parameters
    ----------
    path : Path
        Heads file.
    method : HeadMethod
        The method whose heads are made here.
    model : ModelFingerprint
        The model it is used with.
    channels : int
        Width of the model's hidden states.
    expected : str, optional
        SHA-256 that the file must have.
    **kwargs
        Device and dtype of the heads.

    Raises
    ------
    OmniMemError
        The file is missing, damaged, not the expected one, or of another model or another form of head.
    """
    description = described(path)
    if expected and file_digest(path) != expected:
        raise OmniMemError(f"{path}: not the heads that the budget profile was saved with; copy both from the same run")
    if description["model"] is not None and ModelFingerprint(**description["model"]) != model:
        raise OmniMemError(f"{path}: heads of {description['model']}, but the model is {asdict(model)}")
    heads = method.new_heads(model.layers, channels)
    saved = load_file(path)
    wanted = {
        f"layers.{i}.{name}": weight for i, head in enumerate(heads) for name, weight in head.state_dict().items()
    }
    different = [
        name
        for name in sorted(wanted.keys() | saved.keys())
        if name not in wanted or name not in saved or wanted[name].shape != saved[name].shape
    ]
    if different:
        raise OmniMemError(
            f"{path}: heads of another form, for example {different[0]}; use the selection options they were trained "
            "with, which the budget profile records"
        )
    for i, head in enumerate(heads):
        prefix = f"layers.{i}."
        head.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
        head.to(**kwargs).requires_grad_(False)

"""Audio-visual language models by name; `load_backbone` picks the right one for a checkpoint."""

from __future__ import annotations

import logging
import os
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from omnimem.backbones.base import Backbone, ChunkInputs, StreamEncoder
from omnimem.errors import OmniMemError

# Stock libraries import DeepSpeed to see whether it is there, and it complains, on standard output, of having to guess.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

BACKBONES = {
    "qwen2_5_omni": "omnimem.backbones.qwen2_5_omni",
    # Before the models they are made of, by whose names their published files call themselves.
    "video_salmonn2": "omnimem.backbones.video_salmonn2",
    "video_salmonn2_qwen2_5": "omnimem.backbones.video_salmonn2.qwen2_5",
    "qwen2_5_vl": "omnimem.backbones.qwen2_5_vl",
    "qwen3_vl": "omnimem.backbones.qwen3_vl",
    "qwen3_omni": "omnimem.backbones.qwen3_omni",
    "llava_onevision": "omnimem.backbones.llava_onevision",
    "llava_next_video": "omnimem.backbones.llava_next_video",
    "video_llama_3": "omnimem.backbones.video_llama_3",
}
"""Backbone folders by name; a new backbone is a folder with a `BACKBONE` class and a line here."""

logger = logging.getLogger("omnimem.backbones")

TINY = "tiny"
"""Path that stands for a backbone's offline stand-in."""


def backbone_class(name: str) -> type:
    """Class of a backbone by its name in `BACKBONES`."""
    if name not in BACKBONES:
        raise OmniMemError(f"unknown backbone {name!r} (known: {', '.join(BACKBONES)})")
    return import_module(BACKBONES[name]).BACKBONE


def load_backbone(
    path: str | Path,
    *,
    backbone: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    load_in_4bit: bool = False,
    use_builtin_config: bool = False,
) -> Backbone:
    """Load a model with the compressed cache attached.

    Parameters
    ----------
    path : str or Path
        Checkpoint folder, hub id, or ``tiny`` for the offline stand-in of `backbone`.
    backbone : str, optional
        Name in `BACKBONES`; detected from the checkpoint's configuration when left out (see `detect_backbone`).
    dtype : torch.dtype or str
        Of the weights; ``auto``: bfloat16 on an accelerator, float32 on the CPU.
    device : torch.device or str
        ``auto``: CUDA when there is one.
    load_in_4bit : bool
        Whether the decoder's projections are loaded as NF4, for QLoRA.
    use_builtin_config : bool
        On the ``meta`` device, for a published model that cannot be reached: take its shapes from our own table.

    Raises
    ------
    OmniMemError
        Unknown backbone or dtype, a checkpoint of another backbone, or one that does not load completely.
    """
    device = parse_device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    name, reached = _identify(path, backbone, use_builtin_config and device.type == "meta")
    cls = backbone_class(name)
    if str(path) == TINY:
        with tempfile.TemporaryDirectory() as folder:
            loaded = cls.load(cls.build_tiny(Path(folder) / TINY), dtype, device, load_in_4bit)
            loaded.model_id = TINY
            return loaded
    if not reached:
        from omnimem.backbones.published import build_on_meta

        logger.info("%s cannot be reached: its shapes are from our own table", path)
        return build_on_meta(str(path), cls, dtype)
    return cls.load(path, dtype, device, load_in_4bit)


def detect_backbone(path: str | Path, backbone: str | None = None, use_builtin_config: bool = False) -> str:
    """Name of the backbone a checkpoint belongs to, from its configuration file; no weight is read.

    Parameters
    ----------
    path : str or Path
        Checkpoint folder, hub id, or ``tiny``.
    backbone : str, optional
        The name that is expected. For ``tiny`` it decides which stand-in is meant; the first of `BACKBONES` by default.
    use_builtin_config : bool
        Identify a published model that cannot be reached by its hub id alone.

    Raises
    ------
    OmniMemError
        Unknown backbone, a checkpoint that cannot be reached or that no backbone supports, or one that belongs to
        another backbone than the expected one.
    """
    return _identify(path, backbone, use_builtin_config)[0]


def _identify(path: str | Path, expected: str | None, use_builtin_config: bool) -> tuple[str, bool]:
    """Backbone of a checkpoint, and whether its configuration file could be read."""
    from omnimem.backbones.checkpoint import read_config
    from omnimem.backbones.published import PUBLISHED

    if expected is not None:
        backbone_class(expected)  # refuses an unknown name before any file is looked at
    if str(path) == TINY:
        return expected or next(iter(BACKBONES)), True
    try:
        _check_place(path)
        config = read_config(path)
    except OmniMemError:
        if not (use_builtin_config and str(path) in PUBLISHED):
            raise
        config = None
    found = PUBLISHED[str(path)][0] if config is None else _claiming(path, config)
    if expected not in (None, found):
        raise OmniMemError(
            f"model.backbone={expected} contradicts {path}, which is a checkpoint of {found}; leave model.backbone out "
            f"(model.backbone=null) or give model.backbone={found}"
        )
    return found, config is not None


def parse_device(name: torch.device | str) -> torch.device:
    """Device by name; ``auto`` is CUDA when there is one.

    Raises
    ------
    OmniMemError
        No such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OmniMemError(f"device {str(name)!r} cannot be used here: {reason}") from error
    return device


def parse_dtype(name: str) -> torch.dtype:
    """Floating-point torch dtype by name (``bfloat16``, ``float32``…)."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise OmniMemError(f"unknown dtype {name!r}; use bfloat16, float16, float32 or float64")
    return dtype


def _check_place(path: str | Path) -> None:
    """Refuse a path that can be neither a checkpoint folder nor a hub id."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise OmniMemError(f"{path}: no config.json; give a checkpoint folder, a run directory or a hub id")
    if not Path(path).exists() and (str(path).count("/") != 1 or str(path).startswith((".", "/", "~"))):
        from omnimem.backbones.checkpoint import not_found_message

        raise OmniMemError(not_found_message(path))


def _claiming(path: str | Path, config: dict[str, Any]) -> str:
    """Name of the backbone whose configuration this is."""
    for name in BACKBONES:
        if backbone_class(name).claims(config):
            return name
    model_type = config.get("model_type")
    raise OmniMemError(f"{path}: model type {model_type!r} has no backbone here (known: {', '.join(BACKBONES)})")


__all__ = [
    "BACKBONES",
    "Backbone",
    "ChunkInputs",
    "StreamEncoder",
    "backbone_class",
    "detect_backbone",
    "load_backbone",
    "parse_dtype",
]

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
    quantize: bool = False,
    known_shapes: bool = False,
) -> Backbone:
    """Load a model with the compressed cache attached.

    Parameters
    ----------
    path : str or Path
        Checkpoint folder, hub id, or ``tiny`` for the offline stand-in of `backbone`.
    backbone : str, optional
        Name in `BACKBONES`; read from the checkpoint's configuration when left out.
    dtype : torch.dtype or str
        Of the weights; ``auto``: bfloat16 on an accelerator, float32 on the CPU.
    device : torch.device or str
        ``auto``: CUDA when there is one.
    quantize : bool
        Whether the decoder's projections are loaded as NF4, for QLoRA.
    known_shapes : bool
        On the ``meta`` device, for a published model that cannot be reached: take its shapes from our own table.

    Raises
    ------
    OmniMemError
        Unknown backbone or dtype, or a checkpoint that does not load completely.
    """
    device = parse_device(device)
    if dtype == "auto":
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        dtype = parse_dtype(dtype)
    if str(path) == TINY:
        with tempfile.TemporaryDirectory() as folder:
            name = backbone or next(iter(BACKBONES))
            built = backbone_class(name).build_tiny(Path(folder) / TINY)
            loaded = load_backbone(built, backbone=name, dtype=dtype, device=device, quantize=quantize)
            loaded.model_id = TINY
            return loaded
    from omnimem.backbones.checkpoint import read_config
    from omnimem.backbones.published import PUBLISHED, shapes

    try:
        _check_place(path)
        config = read_config(path)
    except OmniMemError:
        if not (known_shapes and device.type == "meta" and str(path) in PUBLISHED):
            raise
        name = PUBLISHED[str(path)][0]
        logger.info("%s cannot be reached: its shapes are from our own table", path)
        return shapes(str(path), backbone_class(name), dtype)
    cls = backbone_class(backbone or _claiming(path, config))
    return cls.load(path, dtype, device, quantize)


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
        from omnimem.backbones.checkpoint import unreachable

        raise OmniMemError(unreachable(path))


def _claiming(path: str | Path, config: dict[str, Any]) -> str:
    """Name of the backbone whose configuration this is."""
    for name in BACKBONES:
        if backbone_class(name).claims(config):
            return name
    model_type = config.get("model_type")
    raise OmniMemError(f"{path}: model type {model_type!r} has no backbone here (known: {', '.join(BACKBONES)})")


__all__ = ["BACKBONES", "Backbone", "ChunkInputs", "StreamEncoder", "backbone_class", "load_backbone", "parse_dtype"]

"""Load stock checkpoints strictly: a weight that matters and is missing or unused is an error, not a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from omnimem.errors import OmniMemError

SHOW_PROGRESS_ABOVE = 2**30
"""Bytes of weights from which transformers' own progress bar is worth its line."""


@contextmanager
def quiet_stock(progress: bool = False) -> Iterator[None]:
    """Silence what stock libraries say of themselves: default ids of unused parts, their own deprecations.

    What matters about a checkpoint (missing, unused, mismatched weights) is checked by us, not read from a log.

    Parameters
    ----------
    progress : bool
        Leave transformers' progress bars on, for checkpoints large enough to wait for.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()


def load_stock(
    model_class: Any,
    processor_class: Any,
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """Load model and processor from a folder or the hub.

    With `quantized`, linear layers become NF4 (doubly quantised, computing in `dtype`), but for those below the modules
    of these names.

    Returns
    -------
    tuple
        The model in evaluation mode on `device`, and its processor. On the ``meta`` device no weight is read:
        the model has shapes only, for plans.

    Raises
    ------
    OmniMemError
        Nothing there, not readable, or weights missing, unused or of another shape.
    """
    folder = Path(path)
    local = folder.is_dir()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if local else SHOW_PROGRESS_ABOVE
    try:
        if torch.device(device).type == "meta":
            with quiet_stock(), torch.device("meta"):
                skeleton = model_class(model_class.config_class.from_pretrained(path))
            return skeleton.to(dtype).eval(), processor_class.from_pretrained(path)
        with quiet_stock(progress=size >= SHOW_PROGRESS_ABOVE):
            model, info = model_class.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                device_map=_device_map(device),
                quantization_config=None if quantized is None else _nf4(dtype, quantized),
            )
            processor = processor_class.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        hint = (
            "the folder must hold config.json, *.safetensors and the processor's and tokenizer's files"
            if local
            else "no such folder; for a hub id without a network, download config.json, *.safetensors and the "
            "processor's and tokenizer's files and give that folder (model.path)"
        )
        raise OmniMemError(f"cannot load {path}: {hint} ({type(error).__name__}: {reason})") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise OmniMemError(f"cannot load {path}: {_named(problem, info[problem])}")
    return model.eval(), processor


def _nf4(dtype: torch.dtype, whole: Sequence[str]) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # so that shards of ZeRO and FSDP hold one type
        llm_int8_skip_modules=list(whole),
    )


def _device_map(device: torch.device | str) -> dict[str, torch.device] | None:
    """Weights go straight to an accelerator; the CPU is where they are anyway."""
    device = torch.device(device)
    return None if device.type == "cpu" else {"": device}


def _named(problem: str, keys: Iterable[Any]) -> str:
    names = sorted(str(key) for key in keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {problem.replace('_', ' ')}: {', '.join(names[:3])}{more}"

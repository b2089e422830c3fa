"""Load stock checkpoints strictly: a weight that matters and is missing or unused is an error, not a warning."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT as HF_HUB_ENDPOINT
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from omnimem.errors import OmniMemError

SHOW_PROGRESS_ABOVE = 2**30
"""Bytes of weights from which transformers' own progress bar is worth its line."""


@contextmanager
def quiet_transformers(progress: bool = False) -> Iterator[None]:
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


def load_pretrained(
    model_class: Any,
    path: str | Path,
    dtype: torch.dtype,
    device: torch.device | str,
    quantized: Sequence[str] | None = None,
) -> Any:
    """Load a model from a folder or the hub.

    With `quantized`, linear layers become NF4 (doubly quantised, computing in `dtype`), but for those below the modules
    of these names.

    Returns
    -------
    PreTrainedModel
        In evaluation mode on `device`. On the ``meta`` device no weight is read: it has shapes only, for plans.

    Raises
    ------
    OmniMemError
        Nothing there, not readable, or weights missing, unused or of another shape.
    """
    folder = Path(path)
    local = folder.is_dir()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if local else SHOW_PROGRESS_ABOVE
    with _explained(path):
        if torch.device(device).type == "meta":
            with quiet_transformers(), torch.device("meta"):
                return model_class(model_class.config_class.from_pretrained(path)).to(dtype).eval()
        with quiet_transformers(progress=size >= SHOW_PROGRESS_ABOVE):
            model, info = model_class.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, like what is missing or unused
                device_map=_device_map(device),
                quantization_config=None if quantized is None else _nf4(dtype, quantized),
            )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise OmniMemError(f"cannot load {path}: {_named(problem, info[problem])}")
    return model.eval()


def load_processor(processor_class: Any, path: str | Path) -> Any:
    """Load a processor from a folder or the hub.

    Raises
    ------
    OmniMemError
        Nothing there, or not readable.
    """
    with _explained(path), quiet_transformers():
        return processor_class.from_pretrained(path)


@contextmanager
def _explained(path: str | Path) -> Iterator[None]:
    """One line for whatever stock loading raises."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if not Path(path).is_dir():
            raise OmniMemError(not_found_message(path)) from error
        reason = " ".join(str(error).split())[:300]
        raise OmniMemError(
            f"cannot load {path}: the folder must hold config.json, *.safetensors and the processor's and tokenizer's "
            f"files ({type(error).__name__}: {reason})"
        ) from error


def read_config(path: str | Path) -> dict[str, Any]:
    """The configuration file of a folder or hub id, as it is written.

    Raises
    ------
    OmniMemError
        There is none, or it cannot be reached.
    """
    try:
        # Where there is no network at all, the hub's client would try again for half a minute.
        return PreTrainedConfig.get_config_dict(path, local_files_only=not Path(path).is_dir() and _offline())[0]
    except (OSError, ValueError) as error:
        raise OmniMemError(not_found_message(path)) from error


def _offline() -> bool:
    """Whether the hub's name is unknown here; a proxy may know it all the same."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(HF_HUB_ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def not_found_message(path: str | Path) -> str:
    """One line for a model that is neither here nor to be had: which files it takes and where they go."""
    command = f" (hf download {path} --local-dir DIR)" if str(path).count("/") == 1 else ""
    return (
        f"cannot load {path}: no such folder, and not a hub id (owner/name) that can be reached; where there is a "
        "network, fetch config.json, *.safetensors, preprocessor_config.json and the tokenizer's files"
        f"{command}, and give model.name_or_path=DIR"
    )


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

"""Load transformers checkpoints strictly: missing, unused or mismatched weights are an error, not a warning."""

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
"""Bytes of weights above which transformers' progress bar is shown."""


@contextmanager
def quiet_transformers(progress: bool = False) -> Iterator[None]:
    """Silence warnings of transformers and other libraries (unused defaults, deprecations).

    Problems of a checkpoint are still reported: `load_pretrained` checks the loading info itself.

    Parameters
    ----------
    progress : bool
        Whether to show transformers' progress bars.
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
    skip_quantization_modules: Sequence[str] | None = None,
) -> Any:
    """Load a model from a folder or the hub.

    Parameters
    ----------
    model_class : type
        Model class of transformers.
    path : str or Path
        Folder or hub id.
    dtype : torch.dtype
        Dtype of the weights, and of computations with quantized weights.
    device : torch.device or str
        Device to load to; on ``meta`` no weights are read.
    skip_quantization_modules : sequence of str, optional
        None: no quantization. Otherwise linear layers are quantized to NF4 (double quantization), except below these
        modules.

    Returns
    -------
    PreTrainedModel
        The model in evaluation mode.

    Raises
    ------
    OmniMemError
        The path does not exist or is not readable, or weights are missing, unused or of another shape.
    """
    folder = Path(path)
    local = folder.is_dir()
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if local else SHOW_PROGRESS_ABOVE
    with _loading_errors(path):
        if torch.device(device).type == "meta":
            with quiet_transformers(), torch.device("meta"):
                return model_class(model_class.config_class.from_pretrained(path)).to(dtype).eval()
        with quiet_transformers(progress=size >= SHOW_PROGRESS_ABOVE):
            model, info = model_class.from_pretrained(
                path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below with missing and unexpected keys
                device_map=_device_map(device),
                quantization_config=None
                if skip_quantization_modules is None
                else _nf4(dtype, skip_quantization_modules),
            )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise OmniMemError(f"cannot load {path}: {_summary(problem, info[problem])}")
    return model.eval()


def load_processor(processor_class: Any, path: str | Path) -> Any:
    """Load a processor from a folder or the hub.

    Raises
    ------
    OmniMemError
        The path does not exist or is not readable.
    """
    with _loading_errors(path), quiet_transformers():
        return processor_class.from_pretrained(path)


@contextmanager
def _loading_errors(path: str | Path) -> Iterator[None]:
    """Raise one OmniMemError for the errors that transformers raises while loading."""
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
    """Content of the ``config.json`` of a folder or hub id.

    Raises
    ------
    OmniMemError
        The file does not exist or is not available.
    """
    try:
        # Without network the hub client would retry for half a minute.
        return PreTrainedConfig.get_config_dict(path, local_files_only=not Path(path).is_dir() and _offline())[0]
    except (OSError, ValueError) as error:
        raise OmniMemError(not_found_message(path)) from error


def _offline() -> bool:
    """Whether the host name of the hub cannot be resolved and no proxy is set."""
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlparse(HF_HUB_ENDPOINT).hostname, None)
    except OSError:
        return True
    return False


def not_found_message(path: str | Path) -> str:
    """Error message for a model that is neither a folder nor available on the hub."""
    command = f" (hf download {path} --local-dir DIR)" if str(path).count("/") == 1 else ""
    return (
        f"cannot load {path}: no such folder, and not a hub id (owner/name) that can be reached; where there is a "
        "network, fetch config.json, *.safetensors, preprocessor_config.json and the tokenizer's files"
        f"{command}, and give model.name_or_path=DIR"
    )


def _nf4(dtype: torch.dtype, skip_modules: Sequence[str]) -> BitsAndBytesConfig:
    """NF4 with double quantization; linear layers below `skip_modules` are not quantized."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # ZeRO and FSDP need one dtype for all shards
        llm_int8_skip_modules=list(skip_modules),
    )


def _device_map(device: torch.device | str) -> dict[str, torch.device] | None:
    """Device map that loads weights directly to an accelerator; None for the CPU."""
    device = torch.device(device)
    return None if device.type == "cpu" else {"": device}


def _summary(problem: str, keys: Iterable[Any]) -> str:
    """For example ``2 missing keys: a.weight, b.weight``; names at most three keys."""
    names = sorted(str(key) for key in keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} {problem.replace('_', ' ')}: {', '.join(names[:3])}{more}"

"""Merge an adapter into its base model, and verify that the written checkpoint equals base + adapter.

Three checks:

1. `merge_adapter`: every element of a merged weight is within half an ulp of W + s·B·A, plus the error of that sum
   (`WEIGHT_STEPS`). The sum is computed in at least float32 and rounded once.
2. `verify`: every tensor that transformers loads from disk has the same bits as the merged tensor, or as the base's if
   the adapter does not change it (SHA-256 of each tensor, so that no second copy of the model is needed).
3. `verify`: the logits of the loaded model equal those of the merged model up to a limit (`LOGIT_STEPS`,
   `LOGIT_SHARE`). Both run the same operations on the same bits; a larger difference means that the configuration is
   wrong.

The difference between the logits of base + adapter and of the merged model is reported but not checked: an unmerged
adapter is another computation, and rounding can change its result by any amount. In bfloat16 with random weights the
difference was 2 % to 4 % of the largest logit, a quarter with a strong adapter, and half where the router of a mixture
of experts selected another expert.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor

from omnimem.backbones import Backbone
from omnimem.backbones.adapter import PREFIX, has_lora, load_adapter, modules_to_save
from omnimem.errors import OmniMemError
from train.peak_memory import peak_rss_bytes

PROBE = "What is seen, what is heard, and what happened first? " * 4
"""Text whose logits are compared."""

WEIGHT_STEPS = 4
"""Allowed error of the sum W + s·B·A, in ulps of the dtype it is computed in (float32 or float64)."""

LOGIT_STEPS, LOGIT_SHARE = 64, 0.01
"""Allowed difference of the logits: ulps of the largest logit, and at most this share of it.

On the CPU the difference was 0. Sums over tensors at other memory addresses may run in another order, which in bfloat16
can change a logit by one ulp, 0.8 %.
"""

ROWS = 512
"""Rows of a weight that are checked at a time, to limit the size of float64 copies."""


@dataclass(frozen=True)
class Merged:
    """Digests and logits that the written checkpoint must reproduce.

    Attributes
    ----------
    digests : dict
        SHA-256 of every tensor by its name in the model.
    logits : Tensor
        float64 ``[1, T, V]``: logits of the merged model for `PROBE`.
    rounding : float
        Largest difference between `logits` and the logits of base + adapter.
    """

    digests: dict[str, str]
    logits: Tensor
    rounding: float


@dataclass(frozen=True)
class Verification:
    """Result of the verification of an export.

    Attributes
    ----------
    tensors : int
        Number of tensors, all equal to base + adapter.
    difference, limit : float
        Largest difference between the logits of the written checkpoint and of the merged model; its limit.
    rounding : float
        Largest difference between the logits of the merged model and of base + adapter, caused by rounding.
    peak_rss_bytes : int
        Peak resident memory of the process during the export.
    """

    tensors: int
    difference: float
    limit: float
    rounding: float
    peak_rss_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.tensors} tensors verified against base + adapter, logits within {self.difference:.1e} of the "
            f"merged model's (limit {self.limit:.1e}) and {self.rounding:.1e} of base + adapter's; "
            f"peak host memory of the process {self.peak_rss_bytes / 2**30:.1f} GiB"
        )


def merge_adapter(backbone: Backbone, adapter: str | Path) -> Merged:
    """Merge a saved adapter into the weights of `backbone`, in place and one module at a time.

    Raises
    ------
    OmniMemError
        The adapter does not fit or contains weights that cannot be merged, or a merged weight is not base + adapter.
    """
    digests = _digests(backbone.model.state_dict())
    if not has_lora(adapter):
        return Merged(digests, _probe_logits(backbone), 0.0)
    peft_model = load_adapter(backbone, adapter)
    full = {name.removeprefix(PREFIX): module for name, module in modules_to_save(peft_model).items()}
    _check_mergeable(peft_model, tuple(full), adapter)
    unmerged = _probe_logits(backbone)
    for name, module in full.items():
        digests |= _digests({f"{name}.{inner}": weight for inner, weight in module.state_dict().items()})
    for name, layer in peft_model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = f"{name.removeprefix(PREFIX)}.weight"
            try:
                digests[weight] = _digest(_merge_layer(layer, weight))
            except (ValueError, RuntimeError) as error:
                raise OmniMemError(f"{adapter}: the adapter does not merge: {weight}: {error}") from error
    backbone.model = peft_model.unload()
    logits = _probe_logits(backbone)
    return Merged(digests, logits, _largest(logits - unmerged))


def verify(merged: Merged, written: Backbone) -> Verification:
    """Compare a checkpoint that was loaded from disk with the model it was written from.

    Raises
    ------
    OmniMemError
        A tensor or the logits differ.
    """
    digests = _digests(written.model.state_dict())
    different = sorted(name for name, _ in merged.digests.items() ^ digests.items())
    if different:
        raise OmniMemError(
            f"the written checkpoint differs from base + adapter in {different[0]}; the output folder is unchanged"
        )
    share = min(LOGIT_STEPS * torch.finfo(written.model.dtype).eps, LOGIT_SHARE)
    limit = share * _largest(merged.logits)
    difference = _largest(_probe_logits(written) - merged.logits)
    if not difference <= limit:
        raise OmniMemError(
            f"the written checkpoint computes other logits than the merged model, by {difference:.1e} (limit "
            f"{limit:.1e}): its tensors are the same, its configuration is not; the output folder is unchanged"
        )
    return Verification(len(digests), difference, limit, merged.rounding, peak_rss_bytes())


def _check_mergeable(peft_model: Any, full: tuple[str, ...], adapter: str | Path) -> None:
    """Refuse an adapter with a weight that is neither LoRA of a linear layer nor in one of the modules `full`."""
    for key, weight in get_peft_model_state_dict(peft_model).items():
        name = key.removeprefix(PREFIX)
        lora = name.endswith((".lora_A.weight", ".lora_B.weight")) and weight.ndim == 2
        if not lora and not name.startswith(tuple(f"{module}." for module in full)):
            raise OmniMemError(
                f"{adapter}: {name} cannot be merged; only LoRA of linear layers and modules_to_save can"
            )


@torch.no_grad()
def _merge_layer(layer: Any, name: str) -> Tensor:
    """Merge one LoRA layer into its weight, in place, and check the result; returns the weight."""
    parameter = layer.get_base_layer().weight
    base = parameter.data
    parameter.data = base.to(torch.promote_types(base.dtype, torch.float32))
    layer.merge(safe_merge=True)
    merged = parameter.data.to(base.dtype)
    a, b = (layer.get_submodule(f"{half}.default").weight.double() for half in ("lora_A", "lora_B"))
    scaling = layer.scaling["default"]
    for rows in (slice(start, start + ROWS) for start in range(0, len(base), ROWS)):
        expected = base[rows].double() + scaling * (b[rows] @ a)
        # The rounding error of a sum grows with its terms, not with the result.
        terms = base[rows].double().abs() + abs(scaling) * (b[rows].abs() @ a.abs())
        limit = _half_step(expected, base.dtype) + WEIGHT_STEPS * torch.finfo(parameter.dtype).eps * terms
        if not bool(((merged[rows].double() - expected).abs() <= limit).all()):
            raise OmniMemError(f"the merged model differs from base + adapter in {name}; nothing was written")
    # In the base's memory, so that the process does not hold a mapped file and a copy of it.
    parameter.data = base.copy_(merged)
    return parameter


def _half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest change of `values` by rounding to the nearest number of `dtype`."""
    info = torch.finfo(dtype)
    return info.eps / 2 * values.abs().clamp(min=info.smallest_normal)


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


@torch.no_grad()
def _probe_logits(backbone: Backbone) -> Tensor:
    ids = backbone.question_ids(PROBE).to(backbone.device)
    return backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.double().cpu()


def _largest(values: Tensor) -> float:
    return values.abs().max().item()

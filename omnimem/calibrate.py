"""Measure calibration clips and allocate budgets (audio-visual budget allocation, AVBA, arXiv 2606.07577).

    omnimem calibrate --model runs/quickstart --media clips/ --mean-budget 96 --out profile.json

Every clip is streamed without eviction while the attention scores and hidden states of each layer are observed. Only a
few numbers per layer are stored for each clip, so the set may be large. They are saved after every clip: an interrupted
calibration resumes with the next one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from omnimem.backbones import Backbone
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.budget.allocation import DEFAULT_FLOOR, allocate
from omnimem.budget.statistics import METHOD, Compressibility, LayerStatistics
from omnimem.errors import OmniMemError
from omnimem.files import atomic_write_json, file_digest
from omnimem.forward import Stream
from omnimem.media.prefetch import prefetch
from omnimem.memory import CompressedCache
from omnimem.memory.layer import CompressedLayer
from omnimem.memory.token_bytes import mean_budget_within
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import AttentionScoreSpec
from omnimem.selection.base import Arrival, compute_dtype
from omnimem.selection.full import Full
from omnimem.selection.redundancy import redundancy
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings

log = logging.getLogger("omnimem.calibrate")

GROUPS = {"visual": (VISUAL,), "audio": (AUDIO,), "both": (VISUAL, AUDIO)}


class RecordStatistics(Full):
    """Evict nothing, and observe what the allocation needs: attention scores and hidden states."""

    attention_scores = AttentionScoreSpec()
    stores_features = True

    def features(self, arrival: Arrival) -> Tensor:
        """The hidden states themselves."""
        return arrival.hidden


@dataclass(frozen=True)
class ClipStatistics:
    """Statistics of one clip: entropy, redundancy and count for each layer and group (visual, audio, both)."""

    name: str
    digest: str
    layers: list[dict[str, dict[str, float]]]


@torch.no_grad()
def measure_clip(backbone: Backbone, clip: Path, settings: StreamSettings) -> list[dict[str, dict[str, float]]]:
    """Stream a clip without eviction and compute the statistics of every layer.

    Returns
    -------
    list of dict
        For each layer: group → ``entropy`` (normalised), ``redundancy``, ``count``; groups with fewer than two tokens
        are omitted.
    """
    profile = BudgetProfile.uniform(backbone.config)
    cache = CompressedCache(profile, RecordStatistics())
    stream = Stream(backbone, cache)
    reader, encoder = settings.open(clip, backbone)
    stream.forward(encoder.prefix(), text=True)
    for chunk in prefetch(reader, 1):
        stream.step(encoder.encode(chunk))
    return [_summarise(layer) for layer in cache.layers]


def _summarise(layer: CompressedLayer) -> dict[str, dict[str, float]]:
    table, features = layer.metadata, layer.features
    assert features is not None and layer.attention_scores is not None
    s = redundancy(features.to(compute_dtype(features)), table.modality, table.valid, "sequence")[0]
    summary = {}
    for name, kinds in GROUPS.items():
        member = torch.isin(table.modality[0], torch.tensor(kinds, dtype=torch.int8, device=table.modality.device))
        count = int(member.sum())
        if count < 2:
            continue  # the normalised entropy of a single token is undefined: log 1 = 0
        share = layer.attention_scores[0][member].double()
        share = share / share.sum()
        entropy = -torch.xlogy(share, share).sum().item() / math.log(count)
        summary[name] = {"entropy": entropy, "redundancy": s[member].double().mean().item(), "count": float(count)}
    return summary


def calibrate(
    backbone: Backbone,
    clips: Sequence[Path],
    settings: StreamSettings,
    partial: Path,
) -> Iterator[ClipStatistics | None]:
    """Measure clips one by one and save the results in `partial`; clips that it contains are not measured again.

    Parameters
    ----------
    backbone : Backbone
    clips : sequence of Path
        Media files; one that cannot be read is logged and skipped.
    settings : StreamSettings
        How media are read; ``max_seconds`` bounds the cache, because nothing is evicted.
    partial : Path
        JSON file with the results so far, written after every clip.

    Yields
    ------
    ClipStatistics or None
        Of each clip; None for a skipped one.
    """
    model = asdict(ModelFingerprint.of(backbone.config))
    key = {"model": model, "model_id": backbone.model_id, "stream": asdict(settings)}
    known = _read_partial(partial, key)
    for clip in clips:
        digest = file_digest(clip)
        if digest not in known:
            try:
                known[digest] = measure_clip(backbone, clip, settings)
            except OmniMemError as error:
                log.warning("clip skipped: %s", error)
                yield None
                continue
            atomic_write_json(partial, {**key, "clips": known})
        yield ClipStatistics(clip.name, digest, known[digest])


def _read_partial(partial: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Results for the same model and settings; none if the file belongs to others."""
    if not partial.is_file():
        return {}
    try:
        content = json.loads(partial.read_text(encoding="utf-8"))
        same = {name: content[name] for name in key} == json.loads(json.dumps(key))
        return content["clips"] if same else {}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise OmniMemError(f"{partial}: not an unfinished calibration; delete it to start again") from error


def profile_from(
    backbone: Backbone,
    clips: Sequence[ClipStatistics],
    settings: StreamSettings,
    mean_budget: int,
    ratio: float = 5.0,
    temperature: float = 0.2,
    floor: int = DEFAULT_FLOOR,
    selection: dict[str, Any] | None = None,
) -> BudgetProfile:
    """Average the statistics of the clips and allocate budgets.

    Raises
    ------
    OmniMemError
        No usable clip, or the mean budget is below the floors.
    """
    if not clips:
        raise OmniMemError("nothing to calibrate on: no clip could be read; check them with omnimem data validate")
    layers = [_average([clip.layers[i] for clip in clips]) for i in range(len(clips[0].layers))]
    digest = hashlib.sha256("\n".join(sorted(clip.digest for clip in clips)).encode()).hexdigest()
    return BudgetProfile(
        layers=allocate(layers, mean_budget, ratio, temperature, floor),
        model=ModelFingerprint.of(backbone.config),
        model_id=backbone.model_id,
        selection=selection or {},
        stream=settings.recorded(),
        statistics={
            "method": METHOD,
            "ratio": ratio,
            "temperature": temperature,
            "floor": floor,
            "clips": len(clips),
            "layers": [asdict(layer) for layer in layers],
        },
        calibration_set=digest,
        source="calibrated",
    )


def _average(layers: Sequence[dict[str, dict[str, float]]]) -> LayerStatistics:
    """Mean over the clips that contain a group."""

    def mean(group: str) -> Compressibility:
        found = [layer[group] for layer in layers if group in layer]
        if not found:
            return Compressibility(0.0, 0.0, 0.0)
        return Compressibility(**{key: math.fsum(f[key] for f in found) / len(found) for key in found[0]})

    return LayerStatistics(visual=mean("visual"), audio=mean("audio"), both=mean("both"))


def calibrate_command(
    model: str,
    clips: Sequence[Path],
    out: Path,
    mean_budget: int,
    gib: float | None,
    ratio: float,
    temperature: float,
    floor: int,
    settings: dict[str, Any],
    device: str,
    dtype: str,
) -> BudgetProfile:
    """The command ``omnimem calibrate``: measure with a progress bar, allocate, save; see `omnimem.cli`."""
    session = StreamingSession.from_pretrained(model, settings=settings, device=device, dtype=dtype)
    if gib is not None:
        method, kv_dtype = session.cache.method, session.cache.kv_dtype
        mean_budget = mean_budget_within(gib, session.backbone, method, kv_dtype, 2 * floor)
    partial = out.with_name(out.name + ".partial")
    measured = []
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True)) as progress:
        task = progress.add_task("calibrating", total=len(clips))
        for clip in calibrate(session.backbone, clips, session.settings, partial):
            progress.advance(task)
            if clip is not None:
                measured.append(clip)
    selection = {"method": session.method, **session.cache.method.recorded()}
    profile = profile_from(
        session.backbone, measured, session.settings, mean_budget, ratio, temperature, floor, selection
    )
    profile.save(out)
    partial.unlink(missing_ok=True)
    return profile

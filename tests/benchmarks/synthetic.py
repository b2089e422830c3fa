"""Inputs of `recipe_step.py`: a stream of any length, and a model with published shapes and random weights."""

from __future__ import annotations

import time
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import av
import torch
from transformers.quantizers import AutoHfQuantizer

from data_prep.shipped import QUICKSTART_CLIP
from omnimem.backbones import Backbone
from omnimem.backbones.checkpoint import _nf4, quiet_transformers
from omnimem.media import open_media
from omnimem.recipe import Recipe

LAST_PACKET = 0.04
"""Upper limit of a packet's duration in seconds: packets that start within this time of the end are dropped."""


def repeat(source: Path, out: Path, seconds: float) -> None:
    """Repeat the packets of a clip with increasing times until `seconds` are reached, without decoding."""
    with ExitStack() as files:
        target = files.enter_context(av.open(str(out), "w"))
        start, streams = 0.0, None
        while start < seconds:
            with av.open(str(source)) as container:
                if streams is None:
                    streams = [target.add_stream_from_template(stream) for stream in container.streams]
                assert container.duration is not None
                for packet in container.demux():
                    if packet.pts is None or packet.dts is None:
                        continue  # the end of a stream
                    if float(packet.pts * packet.time_base) + start + LAST_PACKET > seconds:
                        continue
                    shift = round(start / packet.time_base)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    packet.stream = streams[packet.stream_index]
                    target.mux(packet)
                start += container.duration / av.time_base


def read(path: Path, seconds: float) -> dict[str, Any]:
    """Decode a clip to its end and check that it has the requested length.

    Raises
    ------
    SystemExit
        Frames or audio are missing.
    """
    started, frames, samples = time.perf_counter(), 0, 0
    reader = open_media(path, fps=1.0, chunk_seconds=10.0, short_side=360)
    for chunk in reader:
        frames += len(chunk.frames)
        samples += 0 if chunk.audio is None else len(chunk.audio)
    found = {
        "clip": QUICKSTART_CLIP.name,
        "header_seconds": reader.info.duration,
        "frames": frames,
        "samples": samples,
        "read_seconds": time.perf_counter() - started,
    }
    if abs(frames - seconds) > 1 or abs(samples / 16_000 - seconds) > 2 * LAST_PACKET:
        raise SystemExit(f"{path}: {found} is not {seconds:g} s of media")
    return found


def with_random_weights(skeleton: Backbone, recipe: Recipe, device: torch.device) -> Backbone:
    """A frozen model of the skeleton's shapes on the device, as `load_base` would load it, with random values.

    Linear layers that the recipe quantizes are created one at a time, so that the device never stores all of them in
    full.
    """
    dtype, nf4 = skeleton.model.dtype, recipe.model.load_in_4bit
    torch.manual_seed(recipe.model.seed)
    with quiet_transformers():
        with torch.device("meta"):
            model: Any = type(skeleton.model)._from_config(deepcopy(skeleton.config), dtype=dtype)
        quantizer: Any = AutoHfQuantizer.from_config(_nf4(dtype, skeleton.skip_quantization_modules)) if nf4 else None
        if quantizer is not None:
            quantizer.preprocess_model(model, device_map=None)
        for module in model.modules():
            if hasattr(module, "quant_state"):
                quantize(module, dtype, device)
            else:
                module.to_empty(device=device, recurse=False)
        # Initialise all empty tensors, including rotary frequencies, and tie weights as configured.
        model.init_weights()
        if quantizer is not None:
            quantizer.postprocess_model(model)
    backbone: Any = type(skeleton)
    return backbone(model.eval().requires_grad_(False), skeleton.processor, recipe.model.name_or_path)


def quantize(linear: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Fill a bitsandbytes layer on the meta device, as transformers does when loading."""
    from bitsandbytes.nn import Params4bit

    empty = linear.weight
    value = torch.empty(empty.shape, dtype=dtype, device=device).normal_(std=0.02)
    linear.weight = Params4bit(value, requires_grad=False, **empty.__dict__).to(device)
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter(torch.zeros(linear.bias.shape, dtype=dtype, device=device), False)
    linear._is_hf_initialized = True

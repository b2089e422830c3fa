"""Compare our video-SALMONN 2+ with what the authors' released code computed, from the sound's features to the logits.

    python tests/check_golden_models.py tests/data/golden_models/*.safetensors

Each file holds a small random model of one family with weights in the published layout, a prompt with picture and
sound, and the released code's outputs in float32. The model is written to a folder as it would be published and read by
our own loader, every weight used. Compared are the embeddings of sound and picture, deepstack maps, rotary ids
(exactly), logits of the whole prompt, and the same again from our stream encoders, chunk by chunk, with a memory that
keeps all.
Prints the largest errors of each file; exit code 1 when one is too large.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from omnimem.backbones import ChunkInputs
from omnimem.backbones.checkpoint import load_pretrained
from omnimem.backbones.video_salmonn2.backbone import VideoSalmonn2, VideoSalmonn2Qwen2_5
from omnimem.backbones.video_salmonn2.configuration import is_qwen2_5
from omnimem.backbones.vision import FramePatches, PixelLimits
from omnimem.budget import BudgetProfile
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory import CompressedCache
from omnimem.selection import build_selection

EMBEDS, LOGITS = 1e-5, 1e-4
"""Largest errors of embeddings and logits."""

CHUNK_PATCHES = (1, 2, 1000)
"""Temporal patches a chunk, in the streamed comparisons."""


class Golden:
    """One file: model, inputs and the released code's outputs."""

    def __init__(self, path: str | Path) -> None:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        self.inputs, self.outputs = parts["inputs"], parts["outputs"]
        self.config: dict[str, Any] = json.loads(metadata["config"])
        self.group = int(metadata.get("patches_per_group", 1))
        self.qwen2_5 = is_qwen2_5(self.config)
        self.backbone = _load(self.config, parts["weights"])
        self.model = self.backbone.model
        # "logits", or "logits.train" and "logits.release".
        self.layouts = [name.partition(".")[2] for name in self.outputs if name.split(".")[0] == "logits"]
        self.picture, self.sound = "pixel_values_videos" in self.inputs, "audio_feature" in self.inputs
        # One video is a stream; a prompt with several is compared as a whole.
        self.is_stream = not self.picture or len(self.inputs["video_grid_thw"]) == 1

    def whole(self, layout: str) -> tuple[Tensor, Tensor]:
        """Rotary ids and logits of the whole prompt."""
        names = ("input_ids", "video_grid_thw", "second_per_grid_ts")
        given = {name: self.inputs[name] for name in names if name in self.inputs}
        ids, _ = self.model.model.get_rope_index(**given, position_layout=layout or "train")
        logits = self.model(
            **given,
            pixel_values_videos=self.inputs.get("pixel_values_videos"),
            input_features=self.inputs.get("audio_feature"),
            position_layout=layout or "train",
        ).logits
        return ids, logits

    def streamed(self, layout: str, patches: int) -> tuple[Tensor, Tensor]:
        """The same from our stream encoder, so many temporal patches at a time."""
        encoder = self._encoder(layout)
        cache = CompressedCache(BudgetProfile.uniform(self.backbone.config, 4000, 1.0), build_selection("omnimem"))
        stream = Stream(self.backbone, cache)
        hidden = [stream.forward(encoder.prefix(), text=True)]
        with patch(f"{type(encoder).__module__}.encode_frames", self._see):
            for chunk in self._chunks(patches):
                hidden.append(stream.forward(encoder.encode(chunk)))
                cache.compress()
        closing = encoder.closing()
        hidden.append(stream.forward(closing, text=True))
        question = ChunkInputs.text(self.backbone.embed(self._texts[-1]), closing.next_position_id)
        hidden.append(stream.forward(question, text=True))
        return cache.token_metadata(0).position_ids.permute(2, 0, 1), self.backbone.lm_head(torch.cat(hidden, dim=1))

    # ---- the file as a stream -----------------------------------------------------------------------------

    def _encoder(self, layout: str) -> Any:
        """Our encoder, with the file's own texts and features in place of a tokenizer's and a clip's."""
        self._texts = self._text_runs()
        texts = iter(self._texts)
        seconds = float(self.inputs["second_per_grid_ts"][0]) if "second_per_grid_ts" in self.inputs else 2.0
        self._fps = self.backbone.temporal_patch / seconds
        patches = int(self.inputs["video_grid_thw"][0, 0]) if self.picture else 0
        segments = len(self.inputs["audio_feature"]) if self.sound else 0
        self._duration = max(patches * seconds, 0.0 if self.picture else 30.0 * segments)
        backbone = self.backbone
        limits = PixelLimits(1, 1, 1)
        with (
            patch.object(type(backbone), "pixel_limits", lambda *_: limits),
            patch.object(type(backbone), "chunk_alignment", lambda *_: seconds),
        ):
            if self.qwen2_5:
                backbone.text_ids = lambda _: next(texts)
                encoder: Any = backbone.stream_encoder(
                    video=self.picture, audio=self.sound, fps=self._fps, duration=self._duration,
                    position_layout=layout,
                )  # fmt: skip
            else:
                # All text before the first picture is the opening, so that its time is nothing more.
                rest = iter([next(texts), torch.zeros(1, 0, dtype=torch.int64), *texts])
                backbone.text_ids = lambda _: next(rest)
                timestamps = max(1, -(-patches // self.group))
                encoder = backbone.stream_encoder(
                    video=self.picture, audio=self.sound, fps=self._fps, duration=self._duration,
                    timestamps=timestamps,
                )  # fmt: skip
                assert encoder.patches_per_group == self.group or not self.picture
        if not self.sound:
            return encoder
        sound = self.model.model.get_audio_features(self.inputs["audio_feature"]).flatten(0, 1)

        class AudioEncoder:
            tokens_per_second = 2.0

            def __call__(self, chunk: Chunk) -> Tensor:
                return sound[int(chunk.t0 * 2 + 1e-6) : None if chunk.last else int(chunk.t1 * 2 + 1e-6)]

        encoder.audio_encoder = AudioEncoder()
        return encoder

    def _text_runs(self) -> list[Tensor]:
        """Texts between the media, without the tokens around pictures."""
        marks = {self.config[f"vision_{name}_token_id"] for name in ("start", "end")}
        media = {self.config[f"{name}_token_id"] for name in ("video", "audio")}
        runs: list[list[int]] = [[]]
        for token in self.inputs["input_ids"][0].tolist():
            if token in media | marks:
                if runs[-1]:
                    runs.append([])
            else:
                runs[-1].append(token)
        return [torch.tensor([run]) for run in runs if run]

    def _chunks(self, patches: int) -> list[Chunk]:
        """Frames hold the number of their temporal patch; `_see` encodes the file's pixels of those."""
        step = self.backbone.temporal_patch
        nothing, chunks = np.zeros(0, np.float32), []
        sound = nothing if self.sound else None
        if not self.picture:
            no_frames = np.zeros((0, 1, 1, 1), np.uint8)
            return [Chunk(0, 0.0, self._duration, no_frames, np.zeros(0), sound, nothing, nothing, True)]
        total = int(self.inputs["video_grid_thw"][0, 0])
        for number, first in enumerate(range(0, total, patches)):
            last = min(first + patches, total)
            frames = np.repeat(np.arange(first, last, dtype=np.uint8), step)[:, None, None, None]
            times = np.arange(first * step, last * step) / self._fps
            t0, t1 = first * step / self._fps, last * step / self._fps
            chunks.append(Chunk(number, t0, t1, frames, times, sound, nothing, nothing, last == total))
        return chunks

    def _see(self, _backbone: Any, frames: np.ndarray, _limits: Any) -> FramePatches:
        numbers = frames[:: self.backbone.temporal_patch, 0, 0, 0]
        _, height, width = self.inputs["video_grid_thw"][0].tolist()
        pixels = self.inputs["pixel_values_videos"].view(
            -1, height * width, self.inputs["pixel_values_videos"].shape[1]
        )
        grid = torch.tensor([[len(numbers), height, width]])
        features = self.model.get_video_features(pixels[torch.from_numpy(numbers).long()].flatten(0, 1), grid)
        merge = self.config["vision_config"]["spatial_merge_size"]
        height, width = height // merge, width // merge
        deepstack = [torch.cat(layer) for layer in getattr(features, "deepstack_features", None) or ()]
        return FramePatches(
            torch.cat(features.pooler_output).view(len(numbers), height * width, -1),
            torch.stack(deepstack).view(len(deepstack), len(numbers), height * width, -1) if deepstack else None,
            height,
            width,
        )


def _load(config: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """The model as it would be published, read by our loader; there is no tokenizer."""
    cls = VideoSalmonn2Qwen2_5 if is_qwen2_5(config) else VideoSalmonn2
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
        save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        model = load_pretrained(cls.model_class, folder, torch.float32, "cpu")
    return cls(model, SimpleNamespace(tokenizer=None), "golden")


@torch.no_grad()
def compare(path: str | Path) -> dict[str, float]:
    """Largest error of everything, by name; rotary ids count as wrong ones."""
    golden = Golden(path)
    found = {}

    def close(name: str, ours: Tensor, theirs: Tensor) -> None:
        found[name] = (
            (ours.double() - theirs.double()).abs().max().item() if ours.shape == theirs.shape else float("inf")
        )

    def same(name: str, ours: Tensor, theirs: Tensor) -> None:
        found[name] = float((ours != theirs).sum()) if ours.shape == theirs.shape else float("inf")

    model, inputs, outputs = golden.model, golden.inputs, golden.outputs
    if golden.sound:
        close("audio embeddings", model.model.get_audio_features(inputs["audio_feature"]), outputs["audio_embeds"])
    if golden.picture:
        features = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        close("video embeddings", torch.cat(features.pooler_output), outputs["video_embeds"])
        for i, layer in enumerate(getattr(features, "deepstack_features", None) or ()):
            close(f"deepstack {i}", torch.cat(layer), outputs[f"deepstack{i}"])
    for layout in golden.layouts:
        ending = f".{layout}" if layout else ""
        expected_ids, expected = outputs[f"position_ids{ending}"], outputs[f"logits{ending}"]
        ids, logits = golden.whole(layout)
        same(f"position ids{ending}", ids, expected_ids)
        close(f"logits{ending}", logits, expected)
        for patches in CHUNK_PATCHES if golden.is_stream else ():
            ids, logits = golden.streamed(layout, patches)
            same(f"position ids{ending}, {patches} patches a chunk", ids, expected_ids)
            close(f"logits{ending}, {patches} patches a chunk", logits, expected)
    return found


def failures(found: dict[str, float]) -> list[str]:
    """Names of what is off by too much."""
    limits = {"logits": LOGITS, "position": 0.0}
    return [name for name, error in found.items() if not error <= limits.get(name.split()[0].split(".")[0], EMBEDS)]


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    wrong = 0
    for path in paths:
        found = compare(path)
        failed = failures(found)
        wrong += bool(failed)
        print(f"{Path(path).name}: {'FAILED: ' + ', '.join(failed) if failed else 'ok'}")
        for name, error in found.items():
            print(f"  {name:45s} {error:.2g}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Compare our compressed stream with what the authors' released code computed.

    python tests/check_golden.py tests/data/golden/*.safetensors

Each file holds the weights of a small Qwen3-VL text model, a stream with deepstack inputs, the tokens kept after
every chunk in every layer and the hidden states of a question, all in float64. The model here is the transformers'
transformers class with our cache under `variant=release`. Prints the largest error of each file; exit code 1 when
a retained sets differs or a hidden state is off by more than 2e-6 (the models normalise in float32 inside).
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import Qwen3VLTextConfig, Qwen3VLTextModel

from omnimem.budget import BudgetProfile
from omnimem.memory import CompressedCache, attach
from omnimem.modality import VISUAL
from omnimem.selection import build_selection

TOLERANCE = 2e-6


@dataclass
class Comparison:
    """Outcome for one file: retained sets that differ, of how many, and the largest hidden-state error."""

    wrong_sets: list[str]
    sets: int
    max_error: float

    @property
    def passed(self) -> bool:
        return not self.wrong_sets and self.max_error <= TOLERANCE


def load(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def build_model(metadata: dict[str, str], tensors: dict[str, Tensor]) -> Qwen3VLTextModel:
    settings = json.loads(metadata["text_config"])
    rope = {
        "rope_type": "default",
        "rope_theta": settings.pop("rope_theta"),
        "mrope_section": settings.pop("mrope_section"),
        "mrope_interleaved": settings.pop("mrope_interleaved"),
    }
    model = Qwen3VLTextModel(Qwen3VLTextConfig(**settings, rope_parameters=rope, pad_token_id=None))
    model = model.to(tensors["inputs.embeds"].dtype)
    weights = {name.removeprefix("weights."): t for name, t in tensors.items() if name.startswith("weights.")}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["embed_tokens.weight"] and not unexpected, (missing, unexpected)
    # The rotary frequencies are float32 in the transformers' class and in the release alike.
    attach(model)
    return model.eval()


@torch.no_grad()
def compare(path: str | Path) -> Comparison:
    metadata, tensors = load(path)
    model = build_model(metadata, tensors)
    profile = BudgetProfile.from_lists(json.loads(metadata["budgets_audio_visual"]))
    cache = CompressedCache(profile, build_selection("omnimem", variant="release", lambda_=float(metadata["lambda"])))
    embeds, positions, modality = (tensors[f"inputs.{n}"] for n in ("embeds", "position_ids", "modality"))
    deepstack_maps = [tensors[name] for name in sorted(tensors) if name.startswith("inputs.deepstack")]
    visual_row = (modality[0] == VISUAL).cumsum(0) - 1
    stream, chunk = int(metadata["stream_length"]), int(metadata["chunk"])

    def step(start: int, stop: int, **announce: Tensor) -> Tensor:
        visual = modality[:, start:stop] == VISUAL
        deepstack = {}
        if deepstack_maps and visual.any():
            rows = visual_row[start:stop][visual[0]]
            maps = [rows_of_layer[rows] for rows_of_layer in deepstack_maps]
            deepstack = {"visual_pos_masks": visual, "deepstack_visual_embeds": maps}
        return model(
            inputs_embeds=embeds[:, start:stop],
            position_ids=positions[:, :, start:stop],
            past_key_values=cache,
            use_cache=True,
            **deepstack,
            **announce,
        ).last_hidden_state

    wrong = []
    starts = range(0, stream, chunk)
    for number, start in enumerate(starts):
        stop = min(start + chunk, stream)
        step(start, stop, modality=modality[:, start:stop])
        cache.compress()
        for layer in range(len(profile.layers)):
            name = f"chunk{number}.layer{layer}"
            kept = cache.token_metadata(layer).index[0]
            if not torch.equal(kept, tensors[f"kept.{name}"]):
                wrong.append(name)
    hidden = step(stream, embeds.shape[1])
    error = (hidden - tensors["outputs.question_hidden"]).abs().max().item()
    return Comparison(wrong, len(starts) * len(profile.layers), error)


def main(paths: list[str]) -> int:
    if not paths:
        print("usage: python tests/check_golden.py FILE...", file=sys.stderr)
        return 2
    failed = False
    for path in paths:
        result = compare(path)
        failed |= not result.passed
        kept = f"{result.sets - len(result.wrong_sets)}/{result.sets} kept sets"
        detail = f" (wrong: {', '.join(result.wrong_sets)})" if result.wrong_sets else ""
        print(f"{'ok  ' if result.passed else 'MISS'} {path}: {kept}, max error {result.max_error:.1e}{detail}")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

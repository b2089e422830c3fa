"""Weight names of the published video-SALMONN 2+ checkpoints and of the modules here.

transformers converts the names when it loads a checkpoint, and back when it saves one, so exports have the published
names.
"""

from __future__ import annotations

import re

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

IGNORED = [r"audio\.(connector\.)?qformer\..*position_ids"]
"""Published buffers that are not weights."""

MODULE = "model.audio."
"""Prefix of the audio branch in the transformers model."""

ENCODER = ("conv1", "conv2", "embed_positions", "layers", "layer_norm")

AUDIO = {
    **{f"{name}.": f"encoder.{name}." for name in ENCODER},
    "q_tokens": "connector.q_tokens",
    "audio_proj.": "connector.audio_proj.",
    "qformer.bert.": "connector.qformer.",
    # Applied after the entry above when loading, before it when saving.
    "connector.qformer.embeddings.LayerNorm.": "connector.qformer.layernorm.",
}
"""Published name → name here, both without the prefix of the audio branch."""


def register() -> None:
    """Register the name conversions of both families with transformers."""
    register_checkpoint_conversion_mapping("video_salmonn2", _audio("model.audio."), overwrite=True)
    register_checkpoint_conversion_mapping(
        "video_salmonn2_qwen2_5",
        [
            *_audio("audio."),
            _renaming("visual.", "model.visual."),
            WeightRenaming(r"^model\.(?!visual\.|audio\.|language_model\.)", "model.language_model."),
        ],
        overwrite=True,
    )


def published(name: str, root: str) -> str:
    """Published name of an audio weight; `root` is the published prefix of the audio branch."""
    for published_name, module_name in reversed(AUDIO.items()):
        prefix = MODULE if published_name.startswith("connector") else root
        if name.startswith(MODULE + module_name):
            name = prefix + published_name + name.removeprefix(MODULE + module_name)
    return name.replace("attention.attention.", "attention.self.")


def _audio(root: str) -> list[WeightRenaming | WeightConverter]:
    """Conversions of the audio weights, whose published prefix is `root`."""
    names: list[WeightRenaming | WeightConverter] = [
        _renaming((MODULE if published_name.startswith("connector") else root) + published_name, MODULE + module_name)
        for published_name, module_name in AUDIO.items()
    ]
    # Layers of the Q-Former: names of BERT and of BLIP-2.
    return [*names, WeightRenaming(r"attention\.self\.", "attention.attention.")]


def _renaming(published_prefix: str, module_prefix: str) -> WeightRenaming:
    return WeightRenaming(f"^{re.escape(published_prefix)}", module_prefix)

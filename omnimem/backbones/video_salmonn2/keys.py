"""Names of weights: those of the published video-SALMONN 2+ checkpoints, and ours.

transformers translates them while a checkpoint is read, and back while one is written, so
that exports have the published names.
"""

from __future__ import annotations

import re

from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

IGNORED = [r"audio\.(connector\.)?qformer\..*position_ids"]
"""Published buffers that hold no weight."""

OURS = "model.audio."

ENCODER = ("conv1", "conv2", "embed_positions", "layers", "layer_norm")

AUDIO = {
    **{f"{name}.": f"encoder.{name}." for name in ENCODER},
    "q_tokens": "connector.q_tokens",
    "audio_proj.": "connector.audio_proj.",
    "qformer.bert.": "connector.qformer.",
    # Behind the one above on the way in, before it on the way out.
    "connector.qformer.embeddings.LayerNorm.": "connector.qformer.layernorm.",
}
"""What stands behind ``audio.`` there, and here."""


def register() -> None:
    """Tell transformers of both families."""
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
    """Name of one of our audio weights in a published checkpoint, where they stand below `root`."""
    for there, here in reversed(AUDIO.items()):
        start = OURS if there.startswith("connector") else root
        if name.startswith(OURS + here):
            name = start + there + name.removeprefix(OURS + here)
    return name.replace("attention.attention.", "attention.self.")


def _audio(published: str) -> list[WeightRenaming | WeightConverter]:
    names: list[WeightRenaming | WeightConverter] = [
        _renaming((OURS if there.startswith("connector") else published) + there, OURS + here)
        for there, here in AUDIO.items()
    ]
    # The Q-Former's layers, in the words of BERT and of BLIP-2.
    return [*names, WeightRenaming(r"attention\.self\.", "attention.attention.")]


def _renaming(published: str, ours: str) -> WeightRenaming:
    return WeightRenaming(f"^{re.escape(published)}", ours)

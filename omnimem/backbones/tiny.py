"""Shared by the tiny random models: tokenizer, chat template, writing a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from omnimem.backbones.checkpoint import quiet_transformers
from omnimem.files import atomic_directory, atomic_write_json

CORPUS = [
    "system user assistant",
    "What is seen? What is heard? What does the narrator say? Who speaks? What happens in the video?",
    "The astronaut drops a hammer and a feather on the Moon. A red flower opens. A toy rabbit on a table.",
    "A telescope mirror in a clean room. A timecode is running. Music is playing. There is silence.",
]
"""Training text of the byte-pair merges; the byte-level tokenizer can encode any other text too."""

VISION_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
"""Special tokens as in the published tokenizers of the vision-language models."""


def tiny_tokenizer(special: Mapping[str, str], *texts: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE tokenizer of about 500 entries, trained on `texts` and `CORPUS`, with `special` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special.values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *CORPUS], trainer)
    extra = dict(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=extra.pop("eos_token"),
        pad_token=extra.pop("pad_token"),
        extra_special_tokens=extra,
    )


def chat_template(video: str, audio: str, image: str) -> str:
    """ChatML template with these placeholders for media."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'video' %}" + video + "{% elif part.type == 'audio' %}" + audio + ""
        "{% elif part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def write_tiny(
    path: str | Path,
    seed: int,
    make: Callable[[], Any],
    processor: Any,
    config: Any = None,
    hub_name: Callable[[str], str] = lambda name: name,
    hub_parts: Callable[[str, Tensor], Mapping[str, Tensor]] = lambda name, weight: {name: weight},
) -> Path:
    """Write a random checkpoint; an existing folder is replaced.

    Parameters
    ----------
    path : str or Path
        Folder to write.
    seed : int
        Seed of the weights.
    make : callable
        Builds the model.
    processor : object with ``save_pretrained``, or several
        Saved in the same folder.
    config : PreTrainedConfig or dict, optional
        Content of ``config.json``, if it is not the configuration of the model; a dict is written unchanged.
    hub_name : callable
        Maps the name of a weight to its key in the published checkpoint.
    hub_parts : callable
        Splits a weight into the weights of the published checkpoint, before `hub_name`.
    """
    with quiet_transformers():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make().eval()
        with atomic_directory(path, overwrite=True) as folder:
            if isinstance(config, dict):
                atomic_write_json(folder / "config.json", config)
            else:
                (config or model.config).save_pretrained(folder)
            for part in processor if isinstance(processor, tuple) else (processor,):
                part.save_pretrained(folder)
            tied = set(getattr(model, "all_tied_weights_keys", None) or ())
            weights = {
                hub_name(name): part.contiguous()
                for key, weight in model.state_dict().items()
                if key not in tied
                for name, part in hub_parts(key, weight).items()
            }
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return Path(path)


def mrope_section(head_dim: int) -> list[int]:
    """Number of M-RoPE frequencies for time, height and width: a quarter for time (as Qwen2.5)."""
    time = head_dim // 8
    return [time, (head_dim // 2 - time) // 2, (head_dim // 2 - time) // 2]

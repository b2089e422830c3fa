"""What the tiny offline stand-ins share: a tokenizer built in place, a chat template, the way to the disk."""

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
"""What the byte-pair merges are learnt from; any text can be encoded all the same (byte level)."""

VISION_TOKENS = {
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "im_start_token": "<|im_start|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
"""Names and spellings as in the published tokenizers of the vision-language models."""


def tiny_tokenizer(special: Mapping[str, str], *texts: str) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair tokenizer of about 500 entries, built in place from `texts` and `CORPUS`."""
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
    named = dict(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=named.pop("eos_token"),
        pad_token=named.pop("pad_token"),
        extra_special_tokens=named,
    )


def chat_template(video: str, audio: str, image: str) -> str:
    """ChatML with these placeholders for media."""
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
        Saved beside it.
    config : PreTrainedConfig or dict, optional
        Of the published checkpoint, where that is not the model's own; a dict is written as it is.
    hub_name : callable
        Key of a weight in the published checkpoint.
    hub_parts : callable
        What the published checkpoint holds instead of a weight, before it is named.
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
            for one in processor if isinstance(processor, tuple) else (processor,):
                one.save_pretrained(folder)
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
    """Frequencies for time, height and width: a quarter for time, as in the published models."""
    time = head_dim // 8
    return [time, (head_dim // 2 - time) // 2, (head_dim // 2 - time) // 2]

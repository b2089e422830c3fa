"""video-SALMONN 2+ as extensions of transformers' vision-language classes: an audio branch and other position ids.

Registered with transformers' auto classes when `omnimem.backbones.video_salmonn2` is imported::

    import omnimem.backbones.video_salmonn2
    model = AutoModelForImageTextToText.from_pretrained("my-export")

Checkpoints have the published weight names; `keys` converts them when loading and saving.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2_5_VLPreTrainedModel,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    Qwen3VLPreTrainedModel,
)

from omnimem.backbones.video_salmonn2.audio import VideoSalmonn2AudioModel
from omnimem.backbones.video_salmonn2.configuration import VideoSalmonn2Config, VideoSalmonn2Qwen2_5Config
from omnimem.backbones.video_salmonn2.keys import IGNORED
from omnimem.backbones.video_salmonn2.positions import MediaTokens, group_position_ids, span_position_ids
from omnimem.errors import OmniMemError


class AudioVisualMixin(nn.Module):
    """What both families add to the vision-language model: audio features and position ids."""

    config: Any
    audio: VideoSalmonn2AudioModel
    rope_deltas: Tensor | None

    def get_audio_features(self, input_features: Tensor) -> Tensor:
        """Log-mel features of segments ``[S, bins, 3000]`` to decoder inputs ``[S, 60, C]``."""
        return self.audio(input_features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        position_layout: str = "train",
        **kwargs: Any,
    ) -> Any:
        """Forward of the vision-language model, with audio.

        Parameters
        ----------
        input_ids, inputs_embeds, position_ids, attention_mask, **kwargs
            As in the vision-language model.
        input_features : Tensor, optional
            Log-mel features ``[S, bins, 3000]`` of all segments of 30 s, in the order of the prompt.
        position_layout : {"train", "release"}
            See `Qwen2_5VLStreamEncoder`; the Qwen3-VL family has one layout only.
        """
        media = input_features is not None or kwargs.get("pixel_values_videos") is not None
        if input_ids is not None and media:
            if position_ids is None:
                position_ids, self.rope_deltas = self.get_rope_index(
                    input_ids, attention_mask=attention_mask, position_layout=position_layout, **kwargs
                )
            if input_features is not None:
                embed: Any = self.get_input_embeddings()  # pyright: ignore
                inputs_embeds = self._insert_audio(input_ids, embed(input_ids), input_features)
                input_ids = None
        return super().forward(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )

    def _insert_audio(self, input_ids: Tensor, embeds: Tensor, input_features: Tensor) -> Tensor:
        """Replace the embeddings ``[B, T, C]`` of audio placeholder tokens by audio features."""
        audio = self.get_audio_features(input_features).flatten(0, 1).to(embeds.device, embeds.dtype)
        placeholders = input_ids == self.config.audio_token_id
        if int(placeholders.sum()) != len(audio):
            raise OmniMemError(
                f"the prompt has {int(placeholders.sum())} audio tokens, but the audio needs {len(audio)}: "
                f"{self.audio.tokens_per_segment} for every 30 s, rounded up"
            )
        return embeds.masked_scatter(placeholders[..., None], audio)

    def get_rope_index(
        self,
        input_ids: Tensor,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        second_per_grid_ts: Tensor | list[float] | None = None,
        attention_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        position_layout: str = "train",
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        """Position ids ``[3, B, T]`` of whole prompts; offset ``[B, 1]`` from token count to next position id."""
        if image_grid_thw is not None:
            more = {} if second_per_grid_ts is None else {"second_per_grid_ts": second_per_grid_ts}
            return super().get_rope_index(  # pyright: ignore
                input_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                mm_token_type_ids=mm_token_type_ids,
                **more,
            )
        tokens = MediaTokens(
            self.config.video_token_id, self.config.audio_token_id, self.config.vision_config.spatial_merge_size
        )
        grids = torch.zeros(0, 3, dtype=torch.int64) if video_grid_thw is None else video_grid_thw.cpu()
        seconds = torch.ones(len(grids)) if second_per_grid_ts is None else torch.as_tensor(second_per_grid_ts).cpu()
        position_ids, deltas = torch.zeros(3, *input_ids.shape, dtype=torch.int64), []
        for i, row in enumerate(input_ids.cpu()):
            valid = torch.ones_like(row, dtype=torch.bool) if attention_mask is None else attention_mask[i].bool().cpu()
            # Video tokens of this prompt decide how many of the remaining grids belong to it.
            filled = (grids.prod(1) // tokens.merge**2).cumsum(0)
            wanted = (row[valid] == tokens.video).sum()
            count = int((filled < wanted).sum() + (wanted > 0)) if i + 1 < len(input_ids) else len(grids)
            found = self._position_ids(row[valid], grids[:count], seconds[:count], tokens, position_layout)
            grids, seconds = grids[count:], seconds[count:]
            position_ids[:, i, valid] = found
            deltas.append(int(found[:, -1].max()) + 1 - len(row))
        device = input_ids.device
        return position_ids.to(device), torch.tensor(deltas, device=device)[:, None]

    def _position_ids(self, ids: Tensor, grids: Tensor, seconds: Tensor, tokens: MediaTokens, layout: str) -> Tensor:
        """Position ids ``[3, T]`` of one prompt ``[T]`` with these video grids ``[V, 3]``."""
        raise NotImplementedError


class VideoSalmonn2Model(AudioVisualMixin, Qwen3VLModel):
    """Qwen3-VL family (4B, 8B) without the output projection."""

    config_class = VideoSalmonn2Config

    def __init__(self, config: VideoSalmonn2Config) -> None:
        super().__init__(config)
        self.audio = VideoSalmonn2AudioModel._from_config(config.audio_config)
        self.post_init()

    def _position_ids(self, ids: Tensor, grids: Tensor, seconds: Tensor, tokens: MediaTokens, layout: str) -> Tensor:
        return group_position_ids(ids, grids, tokens)


class VideoSalmonn2Qwen2_5Model(AudioVisualMixin, Qwen2_5_VLModel):
    """Qwen2.5-VL family (3B, 7B, 72B) without the output projection."""

    config_class = VideoSalmonn2Qwen2_5Config

    def __init__(self, config: VideoSalmonn2Qwen2_5Config) -> None:
        super().__init__(config)
        self.audio = VideoSalmonn2AudioModel._from_config(config.audio_config)
        self.post_init()

    def _position_ids(self, ids: Tensor, grids: Tensor, seconds: Tensor, tokens: MediaTokens, layout: str) -> Tensor:
        return span_position_ids(ids, grids, seconds * self.config.vision_config.tokens_per_second, tokens, layout)


class _Generating:
    """`generate` with audio: the features are passed with the prompt only."""

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """Accept the two arguments that the `forward` of the parent class does not name."""
        added = ("input_features", "position_layout")
        super()._validate_model_kwargs({k: v for k, v in model_kwargs.items() if k not in added})  # pyright: ignore

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> dict:
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)  # pyright: ignore
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs["input_features"] = None
        return inputs


class VideoSalmonn2ForConditionalGeneration(_Generating, Qwen3VLForConditionalGeneration):
    """video-SALMONN 2+ 4B and 8B."""

    config_class = VideoSalmonn2Config
    _keys_to_ignore_on_load_unexpected = IGNORED

    def __init__(self, config: VideoSalmonn2Config) -> None:
        Qwen3VLPreTrainedModel.__init__(self, config)
        self.model = VideoSalmonn2Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)  # pyright: ignore
        self.post_init()


class VideoSalmonn2Qwen2_5ForConditionalGeneration(_Generating, Qwen2_5_VLForConditionalGeneration):
    """video-SALMONN 2+ 3B, 7B and 72B."""

    config_class = VideoSalmonn2Qwen2_5Config
    _keys_to_ignore_on_load_unexpected = IGNORED

    def __init__(self, config: VideoSalmonn2Qwen2_5Config) -> None:
        Qwen2_5_VLPreTrainedModel.__init__(self, config)
        self.model = VideoSalmonn2Qwen2_5Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)  # pyright: ignore
        self.post_init()

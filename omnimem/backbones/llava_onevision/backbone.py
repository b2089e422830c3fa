"""LLaVA-OneVision on stock transformers classes: video without sound, a decoder with one rotary axis."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

from omnimem.backbones.llava_onevision.stream_encoder import FrameEncoder
from omnimem.backbones.llava_onevision.tiny import build_tiny
from omnimem.backbones.qwen import ANSWER_END, QwenBackbone
from omnimem.errors import OmniMemError
from omnimem.memory import CompressedCache


class LlavaOnevision(QwenBackbone):
    """Sees a stream frame by frame, answers in text; every position takes the next rotary id, as in a text.

    A frame is 196 ids, so at one frame a second the trained 32,768 ids last 167 s; beyond them a stream warns.
    ``selection.positions=reindexed`` keeps a stream of any length inside: positions that were evicted give their ids
    back.
    """

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    model_class = LlavaOnevisionForConditionalGeneration
    processor_class = LlavaOnevisionProcessor
    projectors: ClassVar[dict[str, str]] = {"visual": "multi_modal_projector"}
    whole: ClassVar[tuple[str, ...]] = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
    hears = False
    build_tiny = staticmethod(build_tiny)

    def __init__(self, model: Any, processor: Any, model_id: str = "") -> None:
        super().__init__(model, processor, model_id)
        # generate() goes through this module; streams bring their ids to the decoder themselves.
        whole = self.model.model
        if _shift_generated not in whole._forward_pre_hooks.values():
            whole.register_forward_pre_hook(_shift_generated, with_kwargs=True)

    @property
    def temporal_patch(self) -> int:
        """Every frame by itself."""
        return 1

    @property
    def opening(self) -> str:
        """As the published chat template: no system turn, a space behind the role."""
        return "<|im_start|>user "

    def question_turn(self, question: str) -> str:
        """As the published chat template: a line feed before the question, none between the turns."""
        return f"\n{question}{ANSWER_END}<|im_start|>assistant\n"

    @property
    def frame_side(self) -> int:
        """Positions by side of a frame: the tower's grid halved (27 become 14)."""
        vision = self.config.vision_config
        return math.ceil(vision.image_size // vision.patch_size / 2)

    def positions_per_chunk(
        self,
        *,
        frame: tuple[int, int] | None,
        sound: bool,
        fps: float,
        seconds: float,
        chunk_seconds: float,
        max_pixels: int | None = None,
    ) -> list[tuple[int, int]]:
        """As many positions a frame, whatever its size."""
        per_frame = 0 if frame is None else self.frame_side**2
        starts = [number * chunk_seconds for number in range(math.ceil(seconds / chunk_seconds))]
        return [(math.ceil(min(chunk_seconds, seconds - start) * fps) * per_frame, 0) for start in starts]

    def stream_encoder(
        self,
        *,
        picture: bool,
        sound: bool,
        fps: float,
        duration: float | None = None,
        time_scale: float | str = "auto",
        max_pixels: int | None = None,
        position_layout: str = "train",
        timestamps: int | None = None,
    ) -> FrameEncoder:
        """Begin a stream; see `Backbone.stream_encoder`.

        Ids do not follow the clock: no time scale. There is one layout and no timestamp.

        Raises
        ------
        OmniMemError
            The media has no picture, or `max_pixels` asks for frames smaller than the tower's.
        """
        side = self.config.vision_config.image_size
        if max_pixels is not None and max_pixels < side**2:
            raise OmniMemError(
                f"max_pixels={max_pixels}: {self.name} sees every frame at {side}×{side} ({side**2} pixels); "
                "use fewer frames a second instead"
            )
        return FrameEncoder(self, picture=picture, sound=sound, fps=fps)


def _shift_generated(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Add the `rope_deltas` to what generate() counts: the stock classes of models with three axes do so themselves."""
    if not isinstance(kwargs.get("past_key_values"), CompressedCache) or kwargs.get("position_ids") is None:
        return None
    return args, {**kwargs, "position_ids": kwargs["position_ids"] + model.rope_deltas}

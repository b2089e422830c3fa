"""Shared by the tests of models with 1-D RoPE: sessions, reference answers, strict loading, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from clips import RABBIT, WEBB
from omnimem.backbones import Backbone, ChunkInputs, load_backbone
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.memory import CompressedCache
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from reference_models import QUESTION, whole_clip
from small_runs import trained_run

LONG = StreamSettings(chunk_seconds=3, max_seconds=12)


def following(memory: CompressedCache) -> int:
    """Id of the text that comes next."""
    assert memory.next_position_id is not None
    return int(memory.next_position_id)


def session_of(backbone: Backbone, method: str = "omnimem", mean: int = 24, **options: Any) -> StreamingSession:
    """A session whose layers keep two pictures' positions for each of sound."""
    budgets = BudgetProfile.uniform(backbone.config, mean=mean, ratio=2.0)
    return StreamingSession(backbone, budgets, method, LONG, **options)


def check_answer_by_hand(backbone: Backbone, method: str, positions: str) -> None:
    """An answer from a full cache is the greedy one of the transformers decoder, at the position ids that follow."""
    session = session_of(backbone, method, position_ids=positions)
    received: list[Tensor] = []
    handle = backbone.language_model.register_forward_pre_hook(
        lambda _model, _args, kwargs: received.append(kwargs["position_ids"].clone()), with_kwargs=True
    )
    memory = session.cache
    for event in session.watch(WEBB):
        assert event.retained["visual"] <= 24
    tokens, used, flow = [], [], Stream(backbone, memory)
    with torch.no_grad(), memory.scratch():
        assert session._encoder is not None
        flow.forward(session._encoder.closing(), text=True)
        ids, start = backbone.question_ids(QUESTION), following(memory)
        for _ in range(5):
            part = ChunkInputs.text(backbone.embed(ids), start + len(used))
            used += part.position_ids[0, 0].tolist()
            hidden = backbone.language_model(
                inputs_embeds=part.embeds, position_ids=part.position_ids, past_key_values=memory, use_cache=True
            ).last_hidden_state
            tokens.append(int(backbone.lm_head(hidden[:, -1]).argmax()))
            ids = torch.tensor([tokens[-1:]])
    received.clear()
    answer = session.ask(QUESTION, max_new_tokens=5, min_new_tokens=5)
    handle.remove()
    assert answer == backbone.tokenizer.decode(tokens, skip_special_tokens=True)
    assert torch.cat(received, -1)[-1].flatten().tolist()[-len(used) :] == used
    assert session.ask(QUESTION, max_new_tokens=5, min_new_tokens=5) == answer


def check_answer_of_reference(backbone: Backbone, reference: Any, inputs: Any) -> None:
    """With a cache that retains everything, the answer is that of `generate` for `inputs`, which hold the same 12 s."""
    session = session_of(backbone, mean=4000)
    list(session.watch(WEBB))
    generated = reference.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    expected = backbone.tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert session.ask(QUESTION, max_new_tokens=6, min_new_tokens=6) == expected


def check_strict_loading(path: Path, tmp_path: Path, missing: str, stray: str) -> None:
    """A checkpoint without the weight `missing`, or with another one called `stray`, is refused by that name."""
    weights = load_file(path / "model.safetensors")
    for file in path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weight = weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OmniMemError, match=rf"1 missing keys: .*{missing}"):
        load_backbone(tmp_path, device="cpu")
    more = {missing: weight, stray: weight.clone()}
    save_file({**weights, **more}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OmniMemError, match=r"1 unexpected keys: .*" + stray.split(".")[-1]):
        load_backbone(tmp_path, device="cpu")


@torch.no_grad()
def check_trained_run(tmp_path: Path, backbone: type, video_token: str, *overrides: str) -> None:
    """Two steps with the projector: transformers loads the export, whose logits are those of base and adapter."""
    run = trained_run(
        *(tmp_path, f"model.backbone={backbone.name}", "train.max_steps=2", "lora.modules_to_save=[visual]"),
        *("data.audio=false", *overrides),
    )
    assert omnimem(["export", str(run), "--out", str(tmp_path / "merged")]) == 0
    base = backbone.model_class.from_pretrained(run / "base").eval()
    merged, info = backbone.model_class.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    names = [load_file(folder / "model.safetensors").keys() for folder in (run / "base", tmp_path / "merged")]
    assert names[0] == names[1], "the hub's layout"
    video = whole_clip(RABBIT, 1.0, max_seconds=3).video
    before, after = (
        backbone.processor_class.from_pretrained(folder)(
            text=f"{video_token}\nWhat?", videos=[video], return_tensors="pt"
        )
        for folder in (run / "base", tmp_path / "merged")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    plain = base(**after).logits
    adapted = PeftModel.from_pretrained(base, str(run)).eval()(**after).logits
    logits = merged.eval()(**after).logits
    assert (logits - adapted).abs().max() <= 1e-4 * adapted.abs().max()
    assert (logits - plain).abs().max() > 0.1

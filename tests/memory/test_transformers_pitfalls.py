"""What breaks a bounded cache inside transformers, one test per pitfall.

Where it is cheap, the behaviour of transformers that causes the pitfall is shown first, so that a release that fixes
it is noticed.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file, save_file
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

import check_golden
from clips import RABBIT, ROOT, WEBB
from omnimem.backbones import ChunkInputs, load_backbone
from omnimem.backbones.adapter import load_adapter
from omnimem.backbones.qwen2_5_omni.backbone import Qwen2_5Omni
from omnimem.budget import BudgetProfile, ModelFingerprint
from omnimem.errors import OmniMemError
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory import CompressedCache, attach, lower_right_attention
from omnimem.memory.attach import ATTENTION_NAME
from omnimem.modality import AUDIO, VISUAL
from omnimem.selection import build_selection
from omnimem.stream import StreamingSession
from omnimem.stream_settings import StreamSettings
from oracles import (
    dense_weights,
    kept,
    largest_tensor,
    profile,
    run,
    stream,
    stream_parts,
    text_model,
    text_part,
)
from train.checkpoint import save_adapter
from train.export import export_run

GOLDEN = sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors"))
SIZES = [(5, 2), (8, 4), (3, 0), (9, 3)]
UNEQUAL = profile((2, 1), (9, 4), (30, 10))
RATE = 16_000


@pytest.fixture(scope="module")
def model():
    model = text_model()
    attach(model)
    return model


def new_cache(budgets=UNEQUAL, method="omnimem", **options) -> CompressedCache:
    return CompressedCache(budgets, build_selection(method, **options))


def recorded(module, run_it, *names):
    """Keyword arguments that a module received while `run_it` ran."""
    calls = []
    handle = module.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append({name: kwargs.get(name) for name in names}), with_kwargs=True
    )
    try:
        run_it()
    finally:
        handle.remove()
    return calls


@torch.no_grad()
def test_pitfall_01_the_cache_counts_what_it_has_seen_itself(model):
    parts, cache = stream_parts(SIZES), new_cache()
    calls = recorded(
        model.layers[0].self_attn, lambda: stream(model, cache, parts), "cache_position", "past_key_values"
    )
    assert all(call["cache_position"] is None for call in calls), "transformers does not say where a step begins"
    seen = sum(len(part) for part in parts)
    assert cache.get_seq_length() == cache.lengths()[0] < seen, "the length is that of what is stored"
    with cache.scratch():
        run(model, cache, text_part(2, 99), text=True)
        assert kept(cache, 0)[-2:] == [seen, seen + 1]


@torch.no_grad()
def test_pitfall_02_position_ids_after_eviction_go_on_after_the_stream(model):
    # Stock: left-out tokens restart at the stored length.
    stock, evicted = text_model(), DynamicCache()
    stock(inputs_embeds=text_part(8, 0).embeds, past_key_values=evicted)
    for layer in evicted.layers:
        layer.keys, layer.values = layer.keys[:, :, :3], layer.values[:, :, :3]
    assert evicted.get_seq_length() == 3

    parts, cache = stream_parts(SIZES), new_cache()
    stream(model, cache, parts)
    after = int(parts[-1].next_position_id[0])
    calls = recorded(model, lambda: model(inputs_embeds=text_part(4, 0).embeds, past_key_values=cache), "position_ids")
    assert calls[0]["position_ids"].tolist() == [[list(range(after, after + 4))]] * 3
    assert cache.next_position_id.tolist() == [after + 4]


@torch.no_grad()
def test_pitfall_03_no_token_of_a_chunk_attends_to_a_later_one(model):
    parts = stream_parts(SIZES)
    changed = replace(parts[-1], embeds=parts[-1].embeds.clone())
    changed.embeds[:, -1] += 10
    outputs = []
    for last in (parts[-1], changed):
        cache = new_cache()
        stream(model, cache, parts[:-1])
        assert cache.lengths()[0] < sum(len(part) for part in parts[:-1]), "something was evicted"
        outputs.append(run(model, cache, last))
    assert torch.equal(outputs[0][:, :-1], outputs[1][:, :-1])
    assert not torch.equal(outputs[0][:, -1], outputs[1][:, -1])


@torch.no_grad()
def test_pitfall_04_layers_of_unequal_length_work(model):
    # Stock: one mask, built for the first layer, meets keys of another length.
    stock, uneven = text_model(), DynamicCache()
    stock(inputs_embeds=text_part(8, 0).embeds, past_key_values=uneven)
    uneven.layers[1].keys, uneven.layers[1].values = (
        states[:, :, :4] for states in (uneven.layers[1].keys, uneven.layers[1].values)
    )
    attention_mask = torch.ones(1, 11, dtype=torch.int64)
    attention_mask[0, 0] = 0
    with pytest.raises(RuntimeError, match=r"size|expand|shape"):
        stock(inputs_embeds=text_part(3, 8).embeds, attention_mask=attention_mask, past_key_values=uneven)

    cache = new_cache()
    hidden = stream(model, cache, stream_parts(SIZES))
    assert len(set(cache.lengths())) == 3
    assert all(part.isfinite().all() for part in hidden)


@torch.no_grad()
def test_pitfall_05_a_chunk_after_a_past_is_lower_right_causal():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 3, 4, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, 8, 4, generator=generator, dtype=torch.float64)
    expected = dense_weights(query, key, None) @ value
    module = torch.nn.Module()
    try:
        stock = sdpa_attention_forward(module, query, key, value, None, scaling=0.5)[0].transpose(1, 2)
        assert (stock - expected).abs().max() > 1e-2, "stock SDPA without a mask now knows about a past"
    except RuntimeError:
        pass  # refusing is fine as well
    assert (lower_right_attention(query, key, value, scaling=0.5) - expected).abs().max() <= 1e-12


@torch.no_grad()
def test_pitfall_06_the_transformers_path_still_gets_its_mask(model):
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS and ATTENTION_NAME in ALL_MASK_ATTENTION_FUNCTIONS
    embeds = text_part(6, 0).embeds
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    built = create_causal_mask(model.config, embeds, mask, None, None)
    assert built is not None and built.shape == (1, 1, 6, 6)
    ours = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    stock = text_model()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    assert torch.equal(ours, stock)


@torch.no_grad()
def test_pitfall_07_no_mask_of_the_whole_chunk_is_built(model):
    """The mask of transformers has a row for every token of the chunk; ours only one for each token of a tile."""
    cache = new_cache(profile((900, 100), (900, 100), (900, 100)))
    parts = stream_parts([(450, 50), (650, 50)])
    stream(model, cache, parts[:2])
    with largest_tensor() as largest:
        run(model, cache, parts[2])
    chunk, stored = len(parts[2]), cache.lengths()[0]
    assert largest[0] < chunk * stored
    assert largest[0] <= 4 * 256 * stored


@torch.no_grad()
def test_pitfall_08_gapped_position_ids_are_never_taken_for_packed_sequences(model):
    """Packing is guessed from 2-D position ids; the attention modules must not see any."""
    gapped = torch.tensor([[0, 1, 5, 5, 0, 9]])
    for positions in (gapped, gapped.expand(3, 1, -1), gapped.expand(4, 1, -1)):
        cache, explicit = new_cache(), new_cache()
        embeds = text_part(6, 0).embeds
        calls = recorded(
            model.layers[0].self_attn,
            lambda c=cache, p=positions, e=embeds: model(inputs_embeds=e, position_ids=p, past_key_values=c),
            "position_ids",
        )
        assert calls == [{"position_ids": None}]
        expected = model(inputs_embeds=embeds, position_ids=gapped.expand(3, 1, -1), past_key_values=explicit)
        assert torch.equal(cache.layers[2].keys, explicit.layers[2].keys)
        assert expected.last_hidden_state.isfinite().all()
        assert cache.token_metadata(0).position_ids[0].tolist() == [[i] * 3 for i in gapped[0].tolist()]


def session_of(backbone, **settings) -> StreamingSession:
    budgets = BudgetProfile.uniform(backbone.config, mean=40, ratio=2.0)
    return StreamingSession(backbone, budgets, "omnimem", StreamSettings(chunk_seconds=4, max_seconds=8, **settings))


def test_pitfall_09_what_an_earlier_video_left_on_the_model_does_not_matter(tiny64):
    answers, positions = [], []
    for left_behind in (None, torch.tensor([[12345]]), torch.tensor([[-7]])):
        tiny64.model.model.rope_deltas = left_behind
        session = session_of(tiny64)
        for _ in session.watch(WEBB):
            pass
        calls = recorded(
            tiny64.language_model, lambda s=session: answers.append(s.ask("What?", max_new_tokens=4)), "position_ids"
        )
        positions.append([call["position_ids"].tolist() for call in calls])
    assert answers.count(answers[0]) == 3 and positions.count(positions[0]) == 3


def chunk_of(frames: int, samples: int | None, seconds: float, t0: float = 0.0) -> Chunk:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (frames, 56, 56, 3), dtype=np.uint8)
    sound = None if samples is None else (generator.standard_normal(samples) * 0.1).astype(np.float32)
    empty = np.zeros(0, np.float32)
    return Chunk(0, t0, t0 + seconds, pictures, np.zeros(frames), sound, empty, empty, True)


def encoded(backbone, frames, samples, seconds, fps, **options):
    encoder = backbone.stream_encoder(video=frames > 0, audio=samples is not None, fps=fps, **options)
    encoder.prefix()
    return encoder, encoder.encode(chunk_of(frames, samples, seconds))


def test_pitfall_10_position_ids_and_the_text_after_them_do_not_depend_on_get_rope_index(tiny, monkeypatch):
    """Golden values: frame 6 s, audio 3 s. The text starts one past the last *piece*, here the last frame."""
    monkeypatch.setattr(type(tiny.model.model), "get_rope_index", None)
    monkeypatch.setattr(type(tiny.model), "get_rope_index", None, raising=False)
    encoder, inputs = encoded(tiny, 6, 3 * RATE, 6, 1.0)
    ids = (inputs.position_ids[0, 0] - encoder.start).tolist()
    expected = [0] * 16 + list(range(50)) + [50] * 16 + list(range(50, 75)) + [100] * 16
    assert ids == expected
    assert inputs.next_position_id.tolist() == [encoder.start + 101]


def test_pitfall_11_above_two_frames_a_second_time_still_passes(tiny):
    """A second-per-grid cut to a whole number would be 0 here, and every frame at the same time."""
    for fps, expected in ((3.0, [0, 16, 33]), (4.0, [0, 12, 25, 37]), (8.0, [0, 6, 12, 18, 25, 31, 37, 43])):
        encoder, inputs = encoded(tiny, int(2 * fps), None, 2, fps)
        assert (inputs.position_ids[0, 0].reshape(-1, 16)[:, 0] - encoder.start).tolist() == expected


def test_pitfall_12_every_step_of_a_stream_passes_its_positions(tiny64):
    """Positions left out are silently wrong for media; nothing we call leaves them to the model."""
    session = session_of(tiny64)
    steps = []
    stream_forward = Stream.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Stream,
            "forward",
            lambda self, inputs, text=False: (steps.append(inputs), stream_forward(self, inputs, text))[1],
        )
        calls = recorded(tiny64.language_model, lambda: [None for _ in session.watch(WEBB)], "position_ids", "modality")
    assert len(steps) == len(calls) == 3
    for step, call in zip(steps, calls, strict=True):
        assert torch.equal(call["position_ids"], step.position_ids)
    assert (steps[1].position_ids[0] != steps[1].position_ids[1]).any(), "three rows that differ, as media have"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_pitfall_13_deepstack_streams_equal_the_released_code(path):
    """Qwen3-VL with each chunk's deepstack maps: the authors' retained sets, and hidden states within 2e-6."""
    result = check_golden.compare(path)
    assert result.wrong_sets == []
    assert result.sets > 0
    assert result.max_error <= check_golden.TOLERANCE


def test_there_are_golden_files():
    assert len(GOLDEN) == 3


@torch.no_grad()
def test_pitfall_14_generate_after_eviction_feeds_only_the_question_at_position_ids_after_the_media(tiny64):
    session = session_of(tiny64)
    for _ in session.watch(RABBIT):
        pass
    assert int(session.cache.token_metadata(0).index.max()) >= max(session.cache.lengths()), "something was evicted"
    after = int(session.cache.next_position_id[0])
    with session._question_inputs("What is seen?") as inputs:
        question = inputs["input_ids"].shape[1]
        calls = recorded(
            tiny64.language_model,
            lambda: tiny64.model.generate(**inputs, do_sample=False, max_new_tokens=3, eos_token_id=None),
            "position_ids",
            "inputs_embeds",
        )
    lengths = [call["inputs_embeds"].shape[1] for call in calls]
    assert lengths == [question, 1, 1], "nothing evicted is fed again"
    positions = torch.cat([call["position_ids"] for call in calls], -1)
    closing = 1
    assert positions[0, 0].tolist() == list(range(after + closing, after + closing + question + 2))


def test_pitfall_15_transformers_checkpointing_is_refused_where_it_would_drop_the_cache():
    stock, cache = text_model().train(), DynamicCache()
    stock.gradient_checkpointing_enable()
    stock(inputs_embeds=text_part(4, 0).embeds.requires_grad_(), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 0, "transformers now keeps the cache under checkpointing"

    ours = text_model().train()
    attach(ours)
    ours.gradient_checkpointing_enable()
    with pytest.raises(OmniMemError, match="gradient_checkpointing_enable"):
        run(ours, new_cache(), text_part(4, 0), text=True)


def test_pitfall_16_nothing_is_reallocated_at_inference_and_nothing_overwritten_in_training(model):
    parts = stream_parts([(6, 3)] * 12)
    cache = new_cache(profile((4, 3), (5, 2), (6, 6)))
    pointers = set()
    with torch.no_grad():
        stream(model, cache, parts[:4])
        for part in parts[4:]:
            run(model, cache, part)
            cache.compress()
            pointers.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
    assert len(pointers) == 1

    cache = new_cache(profile((4, 3), (5, 2), (6, 6)))
    stream(model, cache, parts[:4])
    versions = [(layer.keys, layer.keys.detach().clone()) for layer in cache.layers]
    for part in parts[4:]:
        run(model, cache, part)
        cache.compress()
    assert all(torch.equal(now, then) for now, then in versions)


@torch.no_grad()
def test_pitfall_17_each_stored_key_can_be_rotated_again_from_its_own_position(model):
    """The cache is not told cos and sin; the three-row ids it keeps must give exactly the stored keys."""
    parts, cache = stream_parts(SIZES), new_cache()
    stream(model, cache, parts)
    embeds = torch.cat([part.embeds for part in parts], 1)
    layer, table = model.layers[0], cache.token_metadata(0)
    keys = layer.self_attn.k_proj(layer.input_layernorm(embeds))[0, table.index[0]]
    keys = keys.view(1, len(table), 2, 8).transpose(1, 2)
    cos, sin = model.rotary_emb(embeds, table.position_ids.permute(2, 0, 1))
    _, rotated = apply_rotary_pos_emb(keys, keys, cos, sin)
    assert (table.position_ids[0, :, 0] != table.position_ids[0, :, 1]).any()
    assert (rotated - cache.layers[0].keys).abs().max() <= 1e-12


def copy_of(tiny_path: Path, folder: Path, change) -> Path:
    shutil.copytree(tiny_path, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["audio_tower", "visual", "model.layers", "lm_head"])
def test_pitfall_18_a_checkpoint_without_some_of_its_weights_does_not_load(tiny_path, tmp_path, part):
    def renamed(weights):
        name = sorted(key for key in weights if key.startswith(f"thinker.{part}"))[0]
        weights[name.replace("thinker.", "thinker.old_")] = weights.pop(name)
        return weights

    with pytest.raises(OmniMemError, match="missing keys") as error:
        load_backbone(copy_of(tiny_path, tmp_path / "model", renamed), dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)


def test_pitfall_18_a_checkpoint_with_weights_nobody_uses_does_not_load(tiny_path, tmp_path):
    def more(weights):
        return {**weights, "thinker.audio.extra.weight": torch.zeros(3)}

    with pytest.raises(OmniMemError, match="unexpected keys"):
        load_backbone(copy_of(tiny_path, tmp_path / "model", more), dtype=torch.float32, device="cpu")


@torch.no_grad()
def scale_adapter(model, factor: float) -> None:
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.mul_(factor)


def rescale_saved(adapter: Path, factor: float) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({n: t * factor if "lora_B" in n else t for n, t in load_file(file).items()}, file)


@pytest.fixture
def adapter(tiny_path, tmp_path):
    """A folder with a LoRA adapter that changes the model, and its profile."""
    backbone = load_backbone(tiny_path, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    config = LoraConfig(
        r=2,
        lora_alpha=8,
        target_modules=backbone.lora_target_regex(["q_proj", "k_proj", "v_proj"]),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        base_model_name_or_path=str(tiny_path),
    )
    folder = tmp_path / "adapter"
    folder.mkdir()
    budgets = replace(BudgetProfile.uniform(backbone.config, 40), model=ModelFingerprint.of(backbone.config))
    model = PeftModel(backbone.model, config)
    # Moderate: an eighth of the norm of the weights it is added to.
    scale_adapter(model, 0.1)
    save_adapter(folder, model, budgets)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tiny_path)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_pitfall_18_an_adapter_with_older_key_names_does_not_load_as_a_no_op(tiny_path, adapter):
    load_adapter(load_backbone(tiny_path, dtype=torch.float32, device="cpu"), adapter)
    file = adapter / "adapter_model.safetensors"
    older = {name.replace("model.language_model.", "model."): t for name, t in load_file(file).items()}
    assert set(older) != set(load_file(file))
    save_file(older, file)
    loaded = load_adapter(load_backbone(tiny_path, dtype=torch.float32, device="cpu"), adapter).state_dict()
    for name, weight in older.items():
        present = name.replace("base_model.model.model.", "base_model.model.model.language_model.")
        present = present.replace(".weight", ".default.weight")
        assert torch.equal(loaded[present], weight)
    save_file({name.replace("q_proj", "query"): weight for name, weight in older.items()}, file)
    with pytest.raises(OmniMemError, match=r"do not match|does not load") as error:
        load_adapter(load_backbone(tiny_path, dtype=torch.float32, device="cpu"), adapter)
    assert "\n" not in str(error.value)


def test_pitfall_19_lora_targets_are_the_language_models_alone(tiny):
    names = [name for name, module in tiny.model.named_modules() if isinstance(module, torch.nn.Linear)]
    wanted = ["q_proj", "k_proj", "v_proj"]
    plain = [name for name in names if name.split(".")[-1] in wanted]
    assert any("audio_tower" in name for name in plain), "a plain list of names no longer reaches the audio tower"
    pattern = re.compile(tiny.lora_target_regex(wanted))
    hit = [name for name in names if pattern.fullmatch(name)]
    assert len(hit) == 3 * tiny.config.text_config.num_hidden_layers
    assert all(".language_model.layers." in name for name in hit)
    every = re.compile(tiny.lora_target_regex([*wanted, "o_proj", "gate_proj", "up_proj", "down_proj"]))
    hit = [name for name in names if every.fullmatch(name)]
    assert len(hit) == 7 * tiny.config.text_config.num_hidden_layers
    assert all(".language_model.layers." in name for name in hit)


@pytest.mark.parametrize("factor", [0.1, 1.0, 10.0], ids=["small", "moderate", "large"])
def test_pitfall_20_an_export_has_the_logits_of_base_and_adapter(tiny_path, adapter, tmp_path, factor):
    rescale_saved(adapter, factor)
    checked = export_run(adapter, tmp_path / "merged", dtype="float32")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        base = load_backbone(tiny_path, dtype=torch.float32, device="cpu")
        plain = base.model(input_ids=ids).logits
        load_adapter(base, adapter)
        adapted = base.model(input_ids=ids).logits
        merged = load_backbone(tmp_path / "merged", dtype=torch.float32, device="cpu").model(input_ids=ids).logits
    assert (plain - adapted).abs().max() > 1e-2
    assert (merged - adapted).abs().max() <= 1e-4
    assert checked.difference <= checked.limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("factor", [0.3, 1.0], ids=["small", "moderate"])
def test_pitfall_20_an_export_that_merged_nothing_is_not_written(adapter, tmp_path, monkeypatch, dtype, factor):
    """Whatever the precision allows, it must be less than what the adapter itself changes."""
    rescale_saved(adapter, factor)
    monkeypatch.setattr(LoraLinear, "merge", lambda self, **_: None)
    with pytest.raises(OmniMemError, match="differs from base"):
        export_run(adapter, tmp_path / "merged", dtype=dtype)
    assert not (tmp_path / "merged").exists()


@torch.no_grad()
def test_pitfall_21_audio_beyond_300_seconds_is_not_cut(tiny):
    seconds = 304
    encoder, inputs = encoded(tiny, 0, seconds * RATE, seconds, 1.0)
    assert len(inputs) == seconds * 25 > 7500
    assert inputs.position_ids[0, 0, -1] == encoder.start + seconds * 25 - 1
    assert (inputs.modality == AUDIO).all() and inputs.embeds.isfinite().all()
    tail = inputs.embeds[0, -100:]
    assert (tail.diff(dim=0).abs().amax(-1) > 0).all(), "the end is sound, not padding"


def test_pitfall_22_the_sampled_rate_has_no_default(tiny):
    for cls in (Qwen2_5Omni, type(tiny)):
        rate = inspect.signature(cls.stream_encoder).parameters["fps"]
        assert rate.default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="fps"):
        tiny.stream_encoder(video=True, audio=False)
    # Stock: a rate left out is taken for 2, so frames at 1 a second are put at half their time.
    encoder, inputs = encoded(tiny, 8, None, 8, 1.0)
    times = (inputs.position_ids[0, 0].reshape(-1, 16)[:, 0] - encoder.start).tolist()
    assert times == [0, 50, 100, 150]
    pictures = torch.from_numpy(chunk_of(8, None, 8).frames).permute(0, 3, 1, 2)
    stock = tiny.processor(
        text="<|vision_bos|><|VIDEO|><|vision_eos|>",
        videos=[pictures],
        videos_kwargs={"do_sample_frames": False, "cap_pixels_per_frame": False, "size": tiny.pixel_limits().size},
        return_tensors="pt",
    )
    assert float(stock["video_second_per_grid"][0]) == 1.0
    assert (inputs.modality == VISUAL).all()


def test_a_ragged_batch_of_chunks_needs_no_token_for_its_padding():
    """Whatever ids stand in the padding of a row, the next text must not care."""
    rows = [stream_parts([(4, 2)])[1], stream_parts([(9, 5)], seed=1)[1]]
    batch = ChunkInputs.batch(rows)
    padded = batch.position_ids.masked_fill(~batch.valid, 10_000)
    assert padded.max() == 10_000, "the rows are of equal length"
    model, cache = text_model(), new_cache()
    attach(model)
    with torch.no_grad():
        model(inputs_embeds=batch.embeds, position_ids=padded, attention_mask=batch.valid, past_key_values=cache)
    assert cache.next_position_id.tolist() == [int(row.position_ids.max()) + 1 for row in rows]

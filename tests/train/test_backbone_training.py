"""Training on every kind of backbone: deepstack, fractional ids, mixtures of experts, one rotary axis, trained mergers.

What is proved for one backbone elsewhere (`test_tape`, `test_distributed`, `test_reindexed`) is proved here for those
whose chunks bring more with them or whose ids are of another kind.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_plan import ROWS as PLANNED
from test_plan import measured
from torch import Tensor

import omnimem.backbones.qwen3_omni.stream_encoder as qwen3_omni_encoder
import omnimem.backbones.qwen3_vl.stream_encoder as qwen3_vl_encoder
from omnimem.backbones import Backbone, ChunkInputs, backbone_class, load_backbone
from omnimem.backbones.vision import FramePatches
from omnimem.budget import BudgetProfile
from omnimem.cli import main as omnimem
from omnimem.forward import Stream
from omnimem.media import Chunk
from omnimem.memory import CompressedCache, SelectionGradient, TokenMetadata
from omnimem.memory.numbering import CompactPositionIds
from omnimem.memory.store import DiskStore, Store
from omnimem.modality import TEXT, VISUAL
from omnimem.recipe import Recipe, load_recipe
from omnimem.selection import build_selection
from omnimem.tape import ChunkwiseBPTT
from small_runs import (
    HALF,
    PLAIN,
    RABBIT,
    SILENT,
    SPEECH,
    adapter,
    arguments,
    configured,
    largest_difference,
    main,
    metrics,
    trained_run,
)
from train.data import Sample, load_rows, tokenise
from train.objective import StreamObjective
from train.plan import memory_plan, plan_stream
from train.setup import add_lora, check_recipe, profile_of, selection_of, settings_of

TIMECODE = "speech_burned_in_timecode_42s.mp4"
LONG = {
    "media": TIMECODE,
    "questions": [
        {"question": "What is seen?", "answer": "A timecode.", "time": 30},
        {"question": "Who speaks?", "answer": "A man."},
    ],
}
SHORT = {
    "media": RABBIT,
    "questions": [
        {"question": "What is heard?", "answer": "Room noise.", "time": 4},
        {"question": "What is seen?", "answer": "A toy rabbit on a table."},
    ],
}
HEARD = {"media": SPEECH, "question": "What is heard?", "answer": "Two sentences about a film."}
SEEN = {"media": SILENT, "question": "What is seen?", "answer": "A mirror.", "time": 2}

CHUNKED = {
    "video_salmonn2": ("data.chunk_seconds=30", "memory.mean_budget=60"),
    "qwen3_omni": (),
    "llava_onevision": (),
    "qwen3_vl": (),
}
"""Its sound is read in segments of 30 s; others have four chunks of the shorter clip."""

MERGERS = {
    "video_salmonn2": "lora.modules_to_save=[visual,audio]",
    "qwen3_omni": "lora.modules_to_save=[visual,audio,audio_in,deepstack_0,deepstack_1,deepstack_2]",
    "llava_onevision": "lora.modules_to_save=[visual]",
}
DECODER, EVERYTHING = "decoder", "projectors"


@pytest.fixture(scope="module")
def tiny_of(tmp_path_factory) -> Any:
    built: dict[str, Path] = {}

    def path(name: str) -> Path:
        if name not in built:
            built[name] = backbone_class(name).build_tiny(tmp_path_factory.mktemp("models") / name)
        return built[name]

    return path


@dataclass
class Setup:
    """A model with an adapter that is not zero, and what it is trained on."""

    recipe: Recipe
    backbone: Backbone
    model: Any
    profile: BudgetProfile
    samples: list[Sample]

    def objective(self, **options: Any) -> StreamObjective:
        learn = bool(self.recipe.lora.modules_to_save)
        return StreamObjective(
            self.backbone, self.model, self.profile, self.method, self.settings, encoders_learn=learn, **options
        )

    @property
    def method(self):
        return selection_of(self.recipe)

    @property
    def settings(self):
        return settings_of(self.recipe)

    @property
    def trained(self) -> dict[str, Tensor]:
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """And forget them."""
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.trained.items()}
        self.model.zero_grad()
        return found


def setup(tmp_path: Path, tiny_of, name: str, *overrides: str, rows: list[dict]) -> Setup:
    settings = (f"model.backbone={name}", "model.dtype=float64", *CHUNKED[name], *overrides)
    recipe = load_recipe(arguments(tmp_path, *settings, rows=rows))
    backbone = load_backbone(tiny_of(name), dtype="float64", device="cpu")
    backbone.model.requires_grad_(False)
    profile = profile_of(recipe, backbone, selection_of(recipe), settings_of(recipe))
    model = add_lora(recipe, backbone)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    samples = [tokenise(row, backbone) for row in load_rows(recipe.data, backbone.supports_audio).rows]
    model.train()
    return Setup(recipe, backbone, model, profile, samples)


def plain(one: Setup, sample: Sample, gradient: SelectionGradient | None = None) -> Tensor:
    """The loss of one stream with the graph of everything, encoders included."""
    stream = Stream(one.backbone, CompressedCache(one.profile, one.method, gradient))
    reader, encoder = one.settings.open(sample.row.media, one.backbone)
    stream.forward(encoder.prefix(), text=True)
    losses, waiting = [], list(sample.asked)

    def ask() -> None:
        asked = waiting.pop(0)
        logits, targets = stream.answer_logits(encoder.closing(), [asked.question], [asked.answer])
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))

    for chunk in reader:
        stream.step(encoder.encode(chunk))
        while waiting and waiting[0].time is not None and waiting[0].time <= chunk.t1:
            ask()
    while waiting:
        ask()
    return torch.stack(losses).sum()


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-6) -> None:
    scale = max(float(one.abs().max()) for one in expected.values())
    for name, one in expected.items():
        own = float(one.abs().max())
        # A gradient that is zero but for rounding (keys' biases; one query attending to itself) has no scale.
        assert (found[name] - one).abs().max() <= limit * max(own, 1e-6 * scale), name


# ---- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [DECODER, EVERYTHING])
@pytest.mark.parametrize("name", list(MERGERS))
def test_gradients_are_those_of_plain_autograd(tmp_path, tiny_of, name, trained):
    """Through embeddings and deepstack maps, replayed from disk or, where they learn, encoded again."""
    overrides = (MERGERS[name],) if trained == EVERYTHING else ()
    one = setup(tmp_path, tiny_of, name, *overrides, rows=[LONG if name == "video_salmonn2" else SHORT])
    loss = plain(one, one.samples[0])
    loss.backward()
    expected = one.gradients()
    (folder := tmp_path / "records").mkdir()
    outcome = one.objective(store=DiskStore(folder))(one.samples)
    assert abs(outcome.loss - loss) <= 1e-9 * loss
    outcome.backward(1.0)
    assert not list(folder.iterdir())
    assert_equal(one.gradients(), expected)
    if trained == EVERYTHING:
        wanted = {
            "video_salmonn2": ("visual.merger", "connector.modules_to_save.default.q_tokens"),
            "qwen3_omni": ("merger_list.0", "merger_list.1", "merger_list.2", "visual.merger.", "proj1", "proj2"),
            "llava_onevision": ("multi_modal_projector",),
        }[name]
        for part in wanted:
            assert any(part in key and one.abs().max() > 1e-3 for key, one in expected.items()), part


def test_sound_that_waits_for_a_later_chunk_teaches_its_connector(tmp_path, tiny_of):
    """A group of pictures is open where a chunk ends; its sound comes with the next one, or with the question."""
    one = setup(tmp_path, tiny_of, "video_salmonn2", MERGERS["video_salmonn2"], "data.timestamps=4", rows=[LONG])
    plain(one, one.samples[0]).backward()
    expected = one.gradients()
    one.objective()(one.samples).backward(1.0)
    assert_equal(one.gradients(), expected)


@pytest.mark.parametrize("form", ["straight_through", "soft"])
def test_the_selection_learns_where_chunks_bring_deepstack(tmp_path, tiny_of, form):
    one = setup(tmp_path, tiny_of, "video_salmonn2", rows=[LONG])
    gradient = SelectionGradient(form)
    plain(one, one.samples[0], gradient).backward()
    expected = one.gradients()
    one.objective()(one.samples, gradient).backward(1.0)
    found = one.gradients()
    assert_equal(found, expected)
    one.objective()(one.samples).backward(1.0)
    hard = one.gradients()
    assert max((found[name] - hard[name]).abs().max() for name in hard) > 1e-4


def test_encoders_have_no_dropout(tmp_path, tiny_of):
    """That of the Q-Former would fall otherwise when its chunk is encoded again, and is nothing inference knows."""
    one = setup(tmp_path, tiny_of, "video_salmonn2", MERGERS["video_salmonn2"], rows=[LONG])
    dropouts = [m for m in one.backbone.model.model.audio.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(module.p > 0 for module in dropouts)
    losses = [one.objective()(one.samples).loss for _ in range(2)]
    assert torch.equal(*losses)
    one.model.eval()
    assert torch.equal(one.objective()(one.samples).loss, losses[0])


def test_records_keep_deepstack_and_fractional_ids(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = ChunkInputs(
        embeds=torch.randn(2, 5, 8, generator=generator).bfloat16(),
        position_ids=torch.rand(3, 1, 5, generator=generator).expand(3, 2, 5) * 1000,
        modality=torch.ones(2, 5, dtype=torch.int8),
        time=torch.full((2, 5), torch.nan),
        next_position_id=torch.tensor([6.5, 1e6 + 0.5]),
        valid=torch.rand(2, 5, generator=generator) > 0.5,
        deepstack=torch.randn(3, 5, 2, 8, generator=generator).bfloat16().transpose(1, 2),
    )
    store = DiskStore(tmp_path)
    _, found = store.get(store.put(("before", inputs)))
    for name, value in vars(inputs).items():
        other = getattr(found, name)
        assert other.dtype == value.dtype and other.shape == value.shape
        assert torch.equal(other.nan_to_num(-1.0), value.nan_to_num(-1.0))


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("video_salmonn2", [HEARD, LONG]),  # sound alone, ended while the other still brings pictures
        ("video_salmonn2", [LONG, SHORT]),
        ("qwen3_omni", [SEEN, SHORT]),
        ("llava_onevision", [SEEN, SHORT]),
    ],
)
def test_streams_side_by_side_train_as_each_alone(tmp_path, tiny_of, name, rows):
    more = (MERGERS[name],)
    one = setup(tmp_path, tiny_of, name, *more, rows=rows)
    objective = one.objective()
    alone = [objective([sample]) for sample in one.samples]
    for outcome in alone:
        outcome.backward(1.0)
    expected = one.gradients()
    together = objective(one.samples)
    assert abs(together.loss - sum(outcome.loss for outcome in alone)) <= 1e-6 * together.loss
    assert together.tokens == sum(outcome.tokens for outcome in alone)
    together.backward(1.0)
    assert_equal(one.gradients(), expected, 1e-5)


def test_a_sample_that_waits_brings_no_deepstack(tiny_of):
    backbone = load_backbone(tiny_of("video_salmonn2"), dtype="float32", device="cpu")
    brings = ChunkInputs(
        embeds=torch.zeros(1, 2, 64), position_ids=torch.zeros(3, 1, 2, dtype=torch.int64),
        modality=torch.full((1, 2), VISUAL, dtype=torch.int8), time=torch.zeros(1, 2),
        next_position_id=torch.tensor([2]), deepstack=torch.ones(3, 1, 2, 64),
    )  # fmt: skip
    encoder = backbone.stream_encoder(video=True, audio=False, fps=1.0)
    batch = ChunkInputs.batch([encoder.empty_step(), brings])
    assert batch.deepstack is not None and batch.deepstack.shape == (3, 2, 2, 64)
    assert batch.deepstack[:, 0].eq(0).all() and batch.deepstack[:, 1].eq(1).all()
    assert (encoder.prefix() + brings).deepstack[:, 0, :-2].eq(0).all()  # pyright: ignore
    assert batch.row(0).deepstack.shape == (3, 1, 0, 64)  # pyright: ignore


# ---- whole runs ------------------------------------------------------------------------------------------------------

RUN = ("model.backbone=video_salmonn2", *CHUNKED["video_salmonn2"])


@pytest.mark.parametrize(
    "more",
    [
        ("selection.gradient=straight_through", "distill.weight=0.5", "eval.eval_steps=1", "eval"),
        pytest.param(("selection.gradient=soft", "lora.lora_dropout=0.1"), marks=pytest.mark.long),
        pytest.param((MERGERS["video_salmonn2"], "train.per_device_train_batch_size=2"), marks=pytest.mark.long),
        pytest.param(
            ("selection.position_ids=compact", "selection.method=h2o", "selection.gradient=none"),
            marks=pytest.mark.long,
        ),
    ],
    ids=["taught", "soft", "projectors", "compact"],
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, more):
    settings = [*RUN, "train.max_steps=2", "train.save_steps=1", *(one for one in more if one != "eval")]
    if "eval" in more:
        settings += [f"eval.path={tmp_path / 'data.jsonl'}", f"eval.root={arguments(tmp_path)[2].split('=')[1]}"]
    rows = [LONG, SHORT]
    whole, parts = (trained_run(tmp_path, *settings, rows=rows, out=out) for out in ("whole", "parts"))
    shutil.rmtree(parts / "checkpoints" / "step-00000002")
    (parts / "adapter_model.safetensors").unlink()
    assert main(arguments(tmp_path, *settings, rows=rows, out="parts")) == 0
    assert all(torch.equal(value, adapter(parts)[name]) for name, value in adapter(whole).items())
    assert all(value.any() for name, value in adapter(whole).items() if "lora_B" in name)
    for found, wanted in zip(metrics(parts)[-2:], metrics(whole), strict=True):
        assert (found["loss"], found["grad_norm"], found.get("eval_loss")) == (
            wanted["loss"], wanted["grad_norm"], wanted.get("eval_loss"),
        )  # fmt: skip
    assert "eval" not in more or all(record["eval_loss"] > 0 for record in metrics(whole))


def test_the_quantised_recipe_trains_and_exports_into_full_precision(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    settings = ("model.name_or_path=tiny", "train.max_steps=2", "data.max_seconds=6", "lora.r=4", "lora.lora_alpha=8")
    assert main(["recipe=video_salmonn_qlora", *settings, f"output_dir={out}"]) == 0
    assert omnimem(["export", str(out), "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "verified against base + adapter" in capsys.readouterr().out
    merged, base = (load_backbone(path, dtype="float32", device="cpu") for path in (tmp_path / "merged", out / "base"))
    assert not any("4bit" in type(module).__name__ for module in merged.model.modules())
    changed = {
        name
        for (name, ours), theirs in zip(
            merged.model.state_dict().items(), base.model.state_dict().values(), strict=True
        )
        if not torch.equal(ours, theirs)
    }
    assert changed and all("language_model.layers" in name and "_proj" in name for name in changed)


@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_nothing_but_projections_of_the_decoder_is_quantised(tiny_of, name):
    pytest.importorskip("bitsandbytes")
    quantised = load_backbone(tiny_of(name), dtype="float32", device="cpu", load_in_4bit=True)
    linear = [name for name, module in quantised.model.named_modules() if type(module).__name__ == "Linear4bit"]
    assert len(linear) == 4 * (4 if name == "qwen3_omni" else 7)
    assert all(".language_model.layers." in name for name in linear)


# ---- several processes -----------------------------------------------------------------------------------------------

HARD = ("selection.gradient=none",)
TAUGHT = (
    "selection.gradient=straight_through",
    "distill.weight=0.5",
    "train.bptt_window=1",
    "train.detach_below_layer=1",
)
UNEQUAL = {"video_salmonn2": [LONG, HEARD, SEEN, SHORT], "qwen3_omni": [SHORT, HEARD, SEEN, SHORT]}


@pytest.mark.long
@pytest.mark.parametrize("name", list(UNEQUAL))
@pytest.mark.parametrize(
    "more", [HARD, TAUGHT, (*HARD, "selection.method=streammem")], ids=["hard", "taught", "probed"]
)
def test_two_processes_train_what_one_trains_however_weights_are_held(tmp_path, name, more):
    """Shards of experts, which are no linear layers, and chunks that bring deepstack to one process alone."""
    settings = (*PLAIN, "train.max_steps=2", "train.save_steps=2", f"model.backbone={name}", *CHUNKED[name], *more)
    rows = UNEQUAL[name]
    assert main(arguments(tmp_path, *settings, "train.gradient_accumulation_steps=2", rows=rows, out="alone")) == 0
    expected = adapter(tmp_path / "alone")
    assert all(value.abs().max() > 1e-4 for key, value in expected.items() if "lora_B" in key), "it moved"
    for launcher in ("multi_gpu", "deepspeed_zero2", "deepspeed_zero3"):
        done = configured(launcher, *arguments(tmp_path, *settings, rows=rows, out=launcher))
        assert done.returncode == 0, done.stderr
        assert largest_difference(adapter(tmp_path / launcher), expected) <= 1e-6
        for found, wanted in zip(metrics(tmp_path / launcher), metrics(tmp_path / "alone"), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5)


@pytest.mark.long
def test_a_process_whose_clip_breaks_before_the_first_picture_keeps_nobody_waiting(tmp_path):
    """Nothing ends a media that has not begun: what it does in step with the others is no empty pass."""
    rows = [{"media": SILENT, "question": "What?", "answer": "A mirror."}, {**HEARD, "media": HALF}]
    settings = (*PLAIN, *RUN, "distill.weight=0.5", "data.on_bad_row=skip", "data.shuffle=false", "train.max_steps=2")
    done = configured("deepspeed_zero3", *arguments(tmp_path, *settings, rows=rows))
    assert done.returncode == 0, done.stderr
    assert [record["skipped"] for record in metrics(tmp_path / "run")] == [False, False]


@pytest.mark.parametrize("name", ["qwen3_vl", "video_salmonn2"])
def test_a_question_before_the_first_picture(tiny_of, name):
    """There is nothing to close yet."""
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    profile = BudgetProfile.uniform(backbone.config, 24, 5.0 if backbone.supports_audio else float("inf"))
    stream = Stream(backbone, CompressedCache(profile, build_selection("omnimem")))
    encoder = backbone.stream_encoder(video=True, audio=False, fps=1.0)
    tape = ChunkwiseBPTT(stream, Store(), lockstep=True)
    tape.forward(encoder.prefix())
    assert len(encoder.closing()) == 0
    following = stream.cache.next_position_id
    with torch.no_grad(), stream.cache.scratch():
        assert stream.forward(encoder.closing(), text=True).shape[1] == 0
        assert stream.cache.next_position_id is following
    question, answer = backbone.question_ids("What?")[0], backbone.answer_ids("Nothing.")[0]
    logits, _ = stream.answer_logits(encoder.closing(), [question], [answer])
    assert logits.isfinite().all()


# ---- dense numbers ---------------------------------------------------------------------------------------------------


def by_hand(rows: list[list[Any]], start: float, anchored: bool) -> tuple[list[list[Any]], float]:
    """One sample: rows of ((time, height, width), kind), one a layer → their new ids, and the next.

    Walk through the ids from `start` on and leave out those that nothing stands on; a picture that moves with its time
    stands on all of its sides.
    """
    walked, ends = [], []
    for row in rows:
        taken, gap, moves = start, 0.0, {}
        for time in sorted({ids[0] for ids, _ in row if ids[0] >= start}):
            gap += max(0.0, time - taken)
            moves[time] = gap
            sides = [s for ids, kind in row if anchored and kind == VISUAL and ids[0] == time for s in ids[1:]]
            taken = max([taken, time + 1, *(side + 1 for side in sides)])
        walked.append(moves)
        ends.append(taken - gap)
    beside = [s + 1 for row in rows for ids, kind in row if kind == VISUAL and not anchored for s in ids[1:]]
    following = max([start, *ends, *beside])
    result = []
    for row, moves, end in zip(rows, walked, ends, strict=True):
        new = []
        for (time, height, width), kind in row:
            move = following - end - moves[time] if time in moves else 0
            sides = (height, width) if kind == VISUAL and not anchored else (height + move, width + move)
            new.append((time + move, *sides))
        result.append(new)
    return result, following


def facts(table: TokenMetadata, row: int = 0) -> list[tuple[tuple[float, float, float], int]]:
    real = table.valid[row]
    return [
        (tuple(ids), kind)
        for ids, kind in zip(table.position_ids[row][real].tolist(), table.modality[row][real].tolist(), strict=True)
    ]


SPAN, SIDE, PATCHES = 2.0, 3, 4


def stubbed(monkeypatch, backbone: Backbone, seed: int = 0) -> Any:
    """An encoder whose towers make noise: chunks of 2 s are four temporal patches of 3×3 and, if it hears, sound."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def frames(_backbone: Any, frames: np.ndarray, _limits: Any) -> FramePatches:
        count = len(frames) // 2
        return FramePatches(noise(count, SIDE**2, 64), noise(3, count, SIDE**2, 64), SIDE, SIDE)

    monkeypatch.setattr(qwen3_vl_encoder, "encode_frames", frames)
    monkeypatch.setattr(qwen3_omni_encoder, "encode_frames", frames)
    sound = backbone.name == "qwen3_omni"
    encoder: Any = backbone.stream_encoder(video=True, audio=sound, fps=2 * PATCHES / SPAN)
    if sound:

        def heard(_chunk: Chunk) -> Tensor:
            encoder.audio_seen += 26
            return noise(26, 64)

        encoder._audio = heard
    return encoder


def fake_chunk(number: int, sound: bool) -> Chunk:
    times = number * SPAN + np.arange(2 * PATCHES) * SPAN / (2 * PATCHES)
    nothing = np.zeros(0, np.float32)
    samples = np.zeros(int(SPAN * 16000), np.float32) if sound else None
    frames = np.zeros((2 * PATCHES, 4, 4, 3), np.uint8)
    return Chunk(number, number * SPAN, (number + 1) * SPAN, frames, times, samples, nothing, nothing, False)


def streamed(monkeypatch, backbone: Backbone, method: str, budget: int, chunks: int, positions: Any = "compact") -> Any:
    """A long stream; the memory, and of every step the tables before they were numbered and the largest id in use."""
    hears = backbone.name == "qwen3_omni"
    profile = BudgetProfile.uniform(backbone.config, budget, 2.0 if hears else float("inf"))
    cache = CompressedCache(profile, build_selection(method, position_ids=positions))
    stream, encoder = Stream(backbone, cache), stubbed(monkeypatch, backbone)
    seen = SimpleNamespace(cache=cache, steps=[], encoder=encoder, used=0.0)
    handle = backbone.language_model.register_forward_pre_hook(
        lambda _m, _a, kwargs: setattr(seen, "used", max(seen.used, float(kwargs["position_ids"].max()))),
        with_kwargs=True,
    )

    class Watched(CompactPositionIds):
        def renumber(self, tables, batch):
            seen.before = list(tables)
            return super().renumber(tables, batch)

    if cache._numbering is not None:
        cache._numbering = Watched()
    with torch.no_grad():
        stream.forward(encoder.prefix(), text=True)
        for number in range(chunks):
            inputs = encoder.encode(fake_chunk(number, hears))
            stream.step(inputs)
            if cache._numbering is not None:
                after = [cache.token_metadata(layer) for layer in range(len(cache.layers))]
                seen.steps.append((seen.before, after, float(cache.next_position_id)))  # pyright: ignore
    handle.remove()
    return seen


METHODS = ("omnimem", "streaming_llm", "h2o", "snapkv", "infinipot_v")


@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
@pytest.mark.parametrize("method", METHODS)
def test_ids_of_a_long_stream_stay_bounded_and_are_those_by_hand(monkeypatch, tiny_of, name, method):
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    seen = streamed(monkeypatch, backbone, method, budget=24, chunks=16)
    start = float(seen.cache._numbering.start[0])
    for before, after, following in seen.steps:
        heads = len(before[0].index)
        rows = [facts(table, row) for table in before for row in range(heads)]
        expected, end = by_hand(rows, start, backbone.spatial_ids_advance)
        found = [[ids for ids, _ in facts(table, row)] for table in after for row in range(heads)]
        assert found == expected and following == end
        for table in after:
            for row in range(heads):
                assert_layout(table, row, following, start, backbone.spatial_ids_advance)
    # Text stays, and takes an id each; of a picture at least one position is left, and it has three sides.
    text = max(int((table.modality == TEXT).sum(1).max()) for table in seen.steps[-1][1])
    bound = text + 24 * SIDE + start + 150
    assert seen.used <= bound
    if name == "qwen3_omni":
        assert seen.encoder.next_position_id > 400 > 200 > seen.used
    assert seen.cache.next_position_id.dtype == (torch.float32 if name == "qwen3_omni" else torch.int64)


def assert_layout(table: TokenMetadata, row: int, following: float, start: float, anchored: bool) -> None:
    """Order as streamed, nothing past the next id, text behind the pictures before it, pictures inside as they were."""
    real = table.valid[row]
    position, kind, time = table.position_ids[row][real], table.modality[row][real], table.time[row][real]
    ids = position[:, 0]
    assert (position < following).all() and (position >= 0).all()
    assert (ids.diff() >= 0).all()
    text = ids[kind == TEXT]
    assert (text.diff() >= 1).all()
    if not anchored:
        return
    highest = start - 1
    for one, what in zip(position.tolist(), kind.tolist(), strict=True):
        if what == TEXT and one[0] >= start:
            assert one[0] > highest
        highest = max(highest, *one)
    for moment in time[kind == VISUAL].unique():
        inside = position[(kind == VISUAL) & (time == moment)]
        assert len(inside[:, 0].unique()) == 1
        sides = inside[:, 1:] - inside[:, :1]
        assert (sides >= 0).all() and (sides < SIDE).all() and len(sides.unique(dim=0)) == len(sides)


@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_with_budgets_that_suffice_nothing_is_numbered_anew(monkeypatch, tiny_of, name):
    """No id of these layouts is without a position; so ids are those of the model itself, however many chunks."""
    backbone = load_backbone(tiny_of(name), dtype="float32", device="cpu")
    ours = streamed(monkeypatch, backbone, "omnimem", 5000, 8)
    theirs = streamed(monkeypatch, backbone, "omnimem", 5000, 8, "original")
    for layer in range(4):
        assert torch.equal(
            ours.cache.token_metadata(layer).position_ids, theirs.cache.token_metadata(layer).position_ids
        )
    assert torch.equal(ours.cache.next_position_id, theirs.cache.next_position_id)
    fractions = ours.cache.token_metadata(0).position_ids % 1
    assert bool(fractions.any()) == (name == "qwen3_omni")


def test_an_anchored_example_spelt_out():
    """Prefix 0, 1; text 2, 3; a picture of 2×3 at 4; text 7; a picture at 8; text 11: the first row of each stays."""
    picture = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    ids = [(n,) * 3 for n in (0, 1, 2, 3)] + [(4, 4 + h, 4 + w) for h, w in picture] + [(7,) * 3]
    ids += [(8, 8 + h, 8 + w) for h, w in picture] + [(11,) * 3]
    kinds = [TEXT] * 4 + [VISUAL] * 6 + [TEXT] + [VISUAL] * 6 + [TEXT]
    numbering = CompactPositionIds()
    numbering.anchored, numbering.start = True, torch.tensor([2])

    def table(stays: list[int]) -> TokenMetadata:
        nothing = torch.zeros(1, len(stays))
        return TokenMetadata(
            torch.tensor([stays]), torch.tensor([[ids[i] for i in stays]]), nothing,
            torch.tensor([[kinds[i] for i in stays]], dtype=torch.int8), torch.ones(1, len(stays), dtype=torch.bool),
        )  # fmt: skip

    whole = list(range(len(ids)))
    (same,) = numbering.renumber([table(whole)], 1)
    assert [tuple(one) for one in same.position_ids[0].tolist()] == ids and numbering.next.tolist() == [12]  # pyright: ignore
    # Of the first picture its left column is left, which takes two ids; of the second nothing.
    (fewer,) = numbering.renumber([table([0, 1, 2, 3, 4, 7, 10, 17])], 1)
    expected = [(0,) * 3, (1,) * 3, (2,) * 3, (3,) * 3, (4, 4, 4), (4, 5, 4), (6,) * 3, (7,) * 3]
    assert [tuple(one) for one in fewer.position_ids[0].tolist()] == expected and numbering.next.tolist() == [8]  # pyright: ignore
    # Beside a layer that kept everything both end at the same id.
    one, other = numbering.renumber([table([0, 1, 2, 3, 4, 7, 10, 17]), table(whole)], 1)
    moved = [*expected[:2], *(tuple(i + 4 for i in ids) for ids in expected[2:])]
    assert [tuple(x) for x in one.position_ids[0].tolist()] == moved
    assert [tuple(x) for x in other.position_ids[0].tolist()] == ids


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("selection.gradient=none",), (), ("distill.weight=1.0",)])
@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_a_step_holds_what_the_plan_says(tmp_path, monkeypatch, name, more):
    """Times between the pictures stay in memory, deepstack waits with the embeddings, experts have wide tensors too."""
    settings = (f"model.backbone={name}", "data.fps=4", "data.chunk_seconds=4", "train.offload=none")
    quiet = ("data.audio=false",) if name == "video_salmonn2" else ()
    recipe = load_recipe(arguments(tmp_path, *settings, *quiet, *more, rows=PLANNED))
    skeleton, profile = check_recipe(recipe)
    streams = [plan_stream(row, skeleton, settings_of(recipe)) for row in load_rows(recipe.data).rows]
    assert (streams[0].text > 0) == (name == "video_salmonn2")
    parts = memory_plan(recipe, skeleton, profile, selection_of(recipe), streams)
    of_a_step = sum(size for part, size in parts.items() if part not in ("weights", "adapter, gradients, optimizer"))
    assert 0.75 <= of_a_step / measured(recipe, profile, tmp_path, monkeypatch) <= 1.33


@pytest.mark.parametrize("timestamps", ["null", "2"])
def test_planned_text_is_what_stays(tmp_path, timestamps):
    settings = ("model.backbone=qwen3_vl", "data.chunk_seconds=4", f"data.timestamps={timestamps}")
    run = trained_run(tmp_path, *settings, "train.max_steps=1", rows=PLANNED)
    recipe = load_recipe(arguments(tmp_path, *settings, rows=PLANNED))
    skeleton, _ = check_recipe(recipe)
    planned = plan_stream(load_rows(recipe.data, False).rows[0], skeleton, settings_of(recipe)).text
    opening = skeleton.text_ids("<|im_start|>user\n").shape[1]
    # The last group is open: its end comes with the question.
    assert metrics(run)[0]["retained"]["text"] - opening == planned - 1

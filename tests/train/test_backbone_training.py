"""Training on every kind of backbone: deepstack, fractional ids, mixtures of experts, one rotary axis, trained mergers.

`test_bptt`, `test_distributed` and `test_compact_position_ids` test one backbone; these tests cover backbones with
deepstack inputs or other kinds of position ids.
"""

from __future__ import annotations

import pytest
import torch
from backbone_setup import (
    DECODER,
    EVERYTHING,
    HEARD,
    LONG,
    MERGERS,
    SEEN,
    SHORT,
    assert_equal,
    plain,
    setup,
)
from test_plan import ROWS as PLANNED
from test_plan import measured

from omnimem.backbones import ChunkInputs, load_backbone
from omnimem.memory import SelectionGradient
from omnimem.memory.offload_store import DiskStore
from omnimem.modality import VISUAL
from omnimem.recipe import load_recipe
from small_runs import (
    arguments,
    metrics,
    trained_run,
)
from train.data import load_rows
from train.memory_plan import memory_plan
from train.setup import check_recipe, selection_method, stream_settings
from train.stream_plan import plan_stream

# ---- backward pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [DECODER, EVERYTHING])
@pytest.mark.parametrize("name", list(MERGERS))
def test_gradients_equal_plain_autograd(tmp_path, tiny_of, name, trained):
    """Through embeddings and deepstack maps, read from disk or, if they are trained, recomputed."""
    overrides = (MERGERS[name],) if trained == EVERYTHING else ()
    one = setup(tmp_path, tiny_of, name, *overrides, rows=[LONG if name == "video_salmonn2" else SHORT])
    loss = plain(one, one.samples[0])
    loss.backward()
    expected = one.gradients()
    (folder := tmp_path / "records").mkdir()
    result = one.objective(store=DiskStore(folder))(one.samples)
    assert abs(result.loss - loss) <= 1e-9 * loss
    result.backward(1.0)
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


def test_audio_that_is_encoded_with_a_later_chunk_trains_its_connector(tmp_path, tiny_of):
    """A group of frames spans two chunks; its audio is encoded with the second one, or with the question."""
    one = setup(tmp_path, tiny_of, "video_salmonn2", MERGERS["video_salmonn2"], "data.timestamps=4", rows=[LONG])
    plain(one, one.samples[0]).backward()
    expected = one.gradients()
    one.objective()(one.samples).backward(1.0)
    assert_equal(one.gradients(), expected)


@pytest.mark.parametrize("form", ["straight_through", "soft"])
def test_the_selection_receives_gradients_with_deepstack_chunks(tmp_path, tiny_of, form):
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
    """Dropout of the Q-Former would differ when its chunk is recomputed, and inference has none."""
    one = setup(tmp_path, tiny_of, "video_salmonn2", MERGERS["video_salmonn2"], rows=[LONG])
    dropouts = [m for m in one.backbone.model.model.audio.modules() if isinstance(m, torch.nn.Dropout)]
    assert any(module.p > 0 for module in dropouts)
    losses = [one.objective()(one.samples).loss for _ in range(2)]
    assert torch.equal(*losses)
    one.model.eval()
    assert torch.equal(one.objective()(one.samples).loss, losses[0])


def test_the_offload_store_keeps_deepstack_and_fractional_ids(tmp_path):
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
    _, found = store.fetch(store.put(("before", inputs)))
    for name, value in vars(inputs).items():
        other = getattr(found, name)
        assert other.dtype == value.dtype and other.shape == value.shape
        assert torch.equal(other.nan_to_num(-1.0), value.nan_to_num(-1.0))


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("video_salmonn2", [HEARD, LONG]),  # audio only, ends while the other clip still has frames
        ("video_salmonn2", [LONG, SHORT]),
        ("qwen3_omni", [SEEN, SHORT]),
        ("llava_onevision", [SEEN, SHORT]),
    ],
)
def test_a_batch_trains_like_its_streams_alone(tmp_path, tiny_of, name, rows):
    more = (MERGERS[name],)
    one = setup(tmp_path, tiny_of, name, *more, rows=rows)
    objective = one.objective()
    alone = [objective([sample]) for sample in one.samples]
    for result in alone:
        result.backward(1.0)
    expected = one.gradients()
    together = objective(one.samples)
    assert abs(together.loss - sum(result.loss for result in alone)) <= 1e-6 * together.loss
    assert together.tokens == sum(result.tokens for result in alone)
    together.backward(1.0)
    assert_equal(one.gradients(), expected, 1e-5)


def test_padding_of_an_ended_stream_has_no_deepstack(tiny_of):
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


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [("selection.gradient=none",), (), ("distill.weight=1.0",)])
@pytest.mark.parametrize("name", ["video_salmonn2", "qwen3_omni"])
def test_a_step_takes_the_planned_memory(tmp_path, monkeypatch, name, more):
    """Timestamps stay in the cache, deepstack inputs are stored with the embeddings, experts have wide tensors too."""
    settings = (f"model.backbone={name}", "data.fps=4", "data.chunk_seconds=4", "train.offload=none")
    quiet = ("data.audio=false",) if name == "video_salmonn2" else ()
    recipe = load_recipe(arguments(tmp_path, *settings, *quiet, *more, rows=PLANNED))
    skeleton, profile = check_recipe(recipe)
    streams = [plan_stream(row, skeleton, stream_settings(recipe)) for row in load_rows(recipe.data).rows]
    assert (streams[0].text > 0) == (name == "video_salmonn2")
    parts = memory_plan(recipe, skeleton, profile, selection_method(recipe), streams)
    of_a_step = sum(size for part, size in parts.items() if part not in ("weights", "adapter, gradients, optimizer"))
    assert 0.75 <= of_a_step / measured(recipe, profile, tmp_path, monkeypatch) <= 1.33


@pytest.mark.parametrize("timestamps", ["null", "2"])
def test_planned_text_equals_the_text_in_the_cache(tmp_path, timestamps):
    settings = ("model.backbone=qwen3_vl", "data.chunk_seconds=4", f"data.timestamps={timestamps}")
    run = trained_run(tmp_path, *settings, "train.max_steps=1", rows=PLANNED)
    recipe = load_recipe(arguments(tmp_path, *settings, rows=PLANNED))
    skeleton, _ = check_recipe(recipe)
    planned = plan_stream(load_rows(recipe.data, False).rows[0], skeleton, stream_settings(recipe)).text
    opening = skeleton.text_ids("<|im_start|>user\n").shape[1]
    # The last group is open: its end comes with the question.
    assert metrics(run)[0]["retained"]["text"] - opening == planned - 1

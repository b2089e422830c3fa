"""The media room: frames as a player shows them, audio to the sample, bounded memory, one-line errors.

Uses the clips of the project and files synthesised here with PyAV.

    python -m pytest tests/media/test_media.py
"""

import errno
import hashlib
import itertools
import logging
import pickle
import tracemalloc
from fractions import Fraction

import av
import numpy as np
import pytest

from clips import MEDIA
from media_files import add_audio_track, picture, tone, write_media
from omnimem.media import Chunk, MediaError, open_media, probe, selective_decoder
from omnimem.media import container as container_module
from omnimem.media.plan import FramePlan, PlanImpossible
from omnimem.media.probe import inspect
from omnimem.media.video import VideoSampler

APOLLO = MEDIA / "speech_apollo15_hammer_feather_47s.webm"
WEBB = MEDIA / "speech_nasa_webb_narration_multistream.mp4"
TIMECODE = MEDIA / "speech_burned_in_timecode_42s.mp4"
RABBIT = MEDIA / "ambient_toy_rabbit_8s.mp4"
FLOWER = MEDIA / "silent_track_flower_timelapse_5s.webm"
JFK = MEDIA / "audio_speech_jfk_11s.flac"
COMMENTARY = MEDIA / "audio_speech_commentary_mono16k_7s.mp3"
COVER_ART = MEDIA / "audio_music_with_cover_art_30s.mp3"
ROTATED = MEDIA / "odd_rotated_no_audio_nasa.mp4"
VFR = MEDIA / "odd_vfr_no_audio_nasa.mp4"
HEVC = MEDIA / "odd_hevc_10bit_no_audio_nasa.mp4"
CUT_OFF = MEDIA / "broken_truncated_half_toy_rabbit.mp4"
NO_INDEX = MEDIA / "broken_truncated_no_moov_nasa.mp4"

WITH_PICTURE = [APOLLO, WEBB, TIMECODE, RABBIT, FLOWER, ROTATED, VFR, HEVC]
MILLISECOND = Fraction(1, 1000)


# ---------------------------------------------------------------- making files


# ---------------------------------------------------------------- reading naively


def naive_pictures(path, index, wanted=None):
    """Every presented frame by full decode: (seconds, duration, digest of the displayed RGB or None)."""
    found = []
    with av.open(str(path), metadata_errors="ignore") as file:
        stream = file.streams[index]
        for frame in itertools.chain.from_iterable(p.decode() for p in file.demux(stream)):
            digest = None
            if wanted is None or frame.pts in wanted:
                rgb = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                digest = fingerprint(rgb)
            found.append((frame.pts, frame.time_base, frame.duration, digest))
    return found


def fingerprint(pixels):
    return pixels.shape, hashlib.blake2b(np.ascontiguousarray(pixels)).digest()


def shown_at(times, instant):
    """Index of the frame a player shows at ``instant``."""
    return max((i for i, time in enumerate(times) if time <= instant + MILLISECOND), default=0)


def naive_sampling(pictures, fps, zero):
    """Indices into ``pictures`` of the instants 0, 1/fps, … while the video lasts."""
    times = [pts * tick - zero for pts, tick, _, _ in pictures]
    end = times[-1] + (pictures[-1][2] * pictures[-1][1] or times[-1] - times[-2])
    count = next(i for i in itertools.count(1) if i / fps + MILLISECOND >= end)
    return [shown_at(times, i / fps) for i in range(count)]


def all_sound(path, **options):
    return np.concatenate([c.audio for c in open_media(path, **options) if c.audio is not None])


def collect(path, **options):
    chunks = list(open_media(path, **options))
    return chunks, np.concatenate([c.frames for c in chunks])


# ---------------------------------------------------------------- frames


@pytest.mark.parametrize("path", WITH_PICTURE, ids=lambda p: p.stem)
def test_sampled_frames_are_those_of_a_full_decode(path):
    source = inspect(path)
    rates = [Fraction(1, 2), Fraction(1), Fraction(5)]
    if path not in (TIMECODE, APOLLO, FLOWER):  # the large ones take too long
        rates += [Fraction(2), Fraction(30)]
    times = naive_pictures(path, source.info.video_index, wanted=())
    picks = {fps: naive_sampling(times, fps, source.zero) for fps in rates}
    needed = {times[i][0] for chosen in picks.values() for i in chosen}
    pictures = naive_pictures(path, source.info.video_index, needed)
    for fps, chosen in picks.items():
        sampler = VideoSampler(source, fps, None, on_fault=pytest.fail)
        got = [fingerprint(rgb) for rgb in sampler.frames()]
        assert got == [pictures[i][3] for i in chosen], f"{path.name} at {fps} FPS"
        assert sampler.stats.sent <= len(pictures)  # never decoded whole and again


VARIANTS = {
    "open_gop.mp4": (
        "libx264",
        {"x264-params": "open-gop=1:keyint=20:bframes=3:b-pyramid=normal:scenecut=0"},
        {},
    ),
    "open_gop.ts": ("libx264", {"x264-params": "open-gop=1:keyint=20:bframes=3:scenecut=0"}, {}),
    "intra_refresh.ts": ("libx264", {"x264-params": "intra-refresh=1:keyint=20:bframes=2"}, {}),
    "one_group.mkv": ("libx264", {"preset": "ultrafast", "x264-params": "keyint=infinite:bframes=2"}, {}),
    "fields.ts": ("libx264", {"x264-params": "interlaced=1:keyint=20:bframes=2"}, {}),
    "cra.mp4": ("libx265", {"x265-params": "keyint=20:open-gop=1:bframes=4:log-level=none"}, {}),
    "layers.mp4": ("libx265", {"x265-params": "keyint=20:temporal-layers=3:bframes=4:log-level=none"}, {}),
    "mpeg2.ts": ("mpeg2video", {"g": "15", "bf": "2"}, {}),
    "mpeg4.mp4": ("mpeg4", {"g": "40", "bf": "2"}, {}),
    "hidden.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40", "cpu-used": "5"}, {}),
    "hidden_vp9.webm": (
        "libvpx-vp9",
        {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "40", "cpu-used": "8"},
        {},
    ),
    "pieces.mp4": (
        "libx264",
        {"x264-params": "keyint=20:bframes=2"},
        {"movflags": "frag_keyframe+empty_moov"},
    ),
    "movie.gif": ("gif", {}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_stream_gives_the_frames_of_a_full_decode(tmp_path, name, monkeypatch):
    codec, options, muxer_options = VARIANTS[name]
    path = tmp_path / name
    if codec == "gif":
        write_gif(path)
    else:
        write_media(path, codec=codec, options=options, muxer_options=muxer_options)
    if name == "one_group.mkv":
        monkeypatch.setattr(selective_decoder, "HOLD_PACKETS", 16)
    source = inspect(path)
    pictures = naive_pictures(path, 0)
    for fps in (Fraction(1, 2), Fraction(1), Fraction(7, 2), Fraction(25)):
        sampler = VideoSampler(source, fps, None, on_fault=pytest.fail)
        got = [fingerprint(rgb) for rgb in sampler.frames()]
        assert got == [pictures[i][3] for i in naive_sampling(pictures, fps, source.zero)], f"{fps} FPS"
    if name == "one_group.mkv":
        assert sampler.stats.held <= 17


def write_gif(path):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb8"
        for i in range(20):
            frame = av.VideoFrame.from_ndarray(picture(i)).reformat(format="rgb8")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def test_frame_of_an_instant_is_the_one_shown_then():
    """The clip shows a running timecode at exactly 30 frames a second: instant t is frame 30 t."""
    ticks = [pts for pts, *_ in naive_pictures(TIMECODE, 0, wanted=())]
    pictures = naive_pictures(TIMECODE, 0, wanted=set(ticks[::15]))
    assert len({p[3] for p in pictures if p[3]}) == 85  # they can be told apart
    _, frames = collect(TIMECODE, fps=2, audio=False)
    assert [fingerprint(f) for f in frames] == [pictures[15 * i][3] for i in range(85)]


def test_variable_frame_rate_holds_each_frame_until_the_next(tmp_path):
    path = write_media(tmp_path / "vfr.mkv", pts=[0, 0.1, 0.9, 2.0, 2.05, 3.5, 3.9], options={"crf": "1"})
    _, frames = collect(path, fps=2)
    levels = frames[:, -1, -1, 0].astype(int)
    expected = [20 + 7 * i for i in (0, 1, 2, 2, 3, 4, 4, 5)]
    assert np.abs(levels - expected).max() <= 2


def test_only_what_is_needed_is_decoded_and_converted():
    sampler = VideoSampler(inspect(RABBIT), Fraction(1, 2), None, on_fault=pytest.fail)
    assert len(list(sampler.frames())) == 4
    assert sampler.stats.packets == 234
    assert sampler.stats.sent < 170
    assert sampler.stats.converted == 4


def test_groups_without_an_instant_are_not_decoded(tmp_path):
    path = write_media(tmp_path / "short_groups.mp4", options={"x264-params": "keyint=5:scenecut=0:bframes=0"})
    sampler = VideoSampler(inspect(path), Fraction(1), None, on_fault=pytest.fail)
    assert len(list(sampler.frames())) == 4
    assert sampler.stats.sent == sampler.stats.decoded == 4  # each instant is a key frame here


# ---------------------------------------------------------------- the plan


def run_plan(packets, limits):
    plan = FramePlan(lambda i: [*limits, 10**9][i], first_pts=0, count=len(limits))
    for pts, dts in packets:
        plan.add(pts, dts, True)
    return plan


def test_plan_settles_an_instant_when_no_earlier_frame_can_follow():
    plan = run_plan([(0, -2), (4, -1), (2, 0), (1, 1)], limits=[0, 2])
    assert list(plan.wanted) == [(0, 1)]  # decoding time 1 has passed 0, not 2
    plan.add(3, 2, True)
    assert list(plan.wanted) == [(0, 1)]
    plan.add(8, 3, True)
    assert list(plan.wanted) == [(0, 1), (2, 1)]
    assert plan.done


def test_plan_repeats_a_frame_over_several_instants():
    plan = run_plan([(0, 0), (10, 10)], limits=[0, 3, 6, 9, 12])
    assert list(plan.wanted) == [(0, 4)]
    plan.finish(5)
    assert list(plan.wanted) == [(0, 4), (10, 1)]


@pytest.mark.parametrize(
    "packets",
    [[(None, 0)], [(0, 0), (0, 1)], [(5, 5), (4, 4)], [(1, 2)]],
    ids=["no pts", "twice", "back", "late"],
)
def test_plan_refuses_timestamps_it_cannot_use(packets):
    with pytest.raises(PlanImpossible):
        run_plan(packets, limits=[100])


def test_timestamps_that_allow_no_plan_fall_back_to_decoding_all(tmp_path, caplog):
    path = write_media(tmp_path / "raw.h264", codec="libx264", muxer="h264", options={"crf": "1"})
    with caplog.at_level(logging.INFO, "omnimem.media"):
        chunks, frames = collect(path, fps=5)
    assert "decoding every frame" in caplog.text
    assert chunks[-1].t1 == pytest.approx(4.0)
    assert np.abs(frames[:, -1, -1, 0].astype(int) - [20 + 35 * i % 160 for i in range(20)]).max() <= 2


# ---------------------------------------------------------------- rotation, size


@pytest.mark.parametrize("rotation", [0, 90, 180, -90])
@pytest.mark.parametrize("flip", [False, True])
def test_frames_are_turned_as_a_player_shows_them(tmp_path, rotation, flip):
    path = write_media(tmp_path / "turned.mp4", seconds=0.2, rotation=rotation, flip=flip, options={"crf": "1"})
    (chunk,) = open_media(path)
    expected = np.rot90(picture(0), rotation // 90)  # counter-clockwise, as the display matrix says
    expected = expected[:, ::-1] if flip else expected
    assert chunk.frames[0].shape == expected.shape
    assert np.abs(chunk.frames[0].astype(int) - expected).mean() < 3
    info = probe(path)
    assert (info.height, info.width) == expected.shape[:2]


def test_rotated_clip():
    info = probe(ROTATED)
    assert (info.width, info.height, info.rotation) == (270, 480, 90)
    upright = next(iter(open_media(WEBB, audio=False, max_seconds=1, chunk_seconds=1))).frames[0]
    turned = next(iter(open_media(ROTATED, chunk_seconds=1))).frames[0]
    assert np.abs(np.rot90(upright).astype(int) - turned).mean() < 8  # the same first frame, turned left


@pytest.mark.parametrize(("bound", "shape"), [(90, (160, 90)), (101, (178, 100)), (270, (480, 270)), (999, (480, 270))])
def test_short_side_scales_down_only(bound, shape):
    chunk = next(iter(open_media(ROTATED, short_side=bound)))
    assert chunk.frames.shape == (1, *shape, 3)


def test_size_change_midway_keeps_the_first_size(tmp_path):
    small, large = (
        write_media(tmp_path / f"{w}.ts", seconds=1, size=(w, w), options={"crf": "1"}, video_start=start)
        for w, start in ((64, 0.0), (128, 1.0))
    )
    joined = tmp_path / "joined.ts"
    joined.write_bytes(small.read_bytes() + large.read_bytes())
    _, frames = collect(joined, fps=4, on_truncated="warn")
    assert frames.shape[1:] == (64, 64, 3)
    assert len(frames) == 8


def test_ten_bit_frames():
    chunk = next(iter(open_media(HEVC)))
    assert chunk.frames.dtype == np.uint8
    assert chunk.frames.shape == (2, 180, 320, 3)
    assert chunk.frames.max() > 100 > 50 > chunk.frames.mean() > 5  # a dark room


# ---------------------------------------------------------------- chunks


@pytest.mark.parametrize("path", WITH_PICTURE, ids=lambda p: p.stem)
def test_chunks_lie_on_the_grid(path):
    chunks = list(open_media(path, fps=1.5, chunk_seconds=2, short_side=64))
    for k, chunk in enumerate(chunks):
        assert chunk.index == k and chunk.t0 == 2 * k
        assert chunk.last == (k == len(chunks) - 1)
        assert chunk.t1 == 2 * k + 2 if not chunk.last else 2 * k < chunk.t1 <= 2 * k + 2
        assert len(chunk.frames) == len(chunk.frame_times)
        assert all(chunk.t0 <= t < chunk.t1 for t in chunk.frame_times)
        if not chunk.last:
            assert len(chunk.frame_times) == 3
            assert chunk.audio is None or len(chunk.audio) == 32000 or chunks[-1].audio.size == 0
    instants = np.concatenate([c.frame_times for c in chunks])
    np.testing.assert_array_equal(instants, np.arange(len(instants)) / 1.5)


@pytest.mark.parametrize(
    ("path", "duration"),
    [(APOLLO, 47.447), (WEBB, 13.056), (TIMECODE, 42.411), (RABBIT, 7.8), (FLOWER, 5.075),
                           (JFK, 11.0), (COMMENTARY, 6.625), (COVER_ART, 30.0), (HEVC, 13.0), (VFR, 4.004)],
    ids=lambda v: getattr(v, "stem", ""),
)  # fmt: skip
def test_durations(path, duration):
    *_, last = open_media(path, short_side=32)
    assert last.t1 == pytest.approx(duration, abs=0.002)
    assert last.last


def test_chunk_length_does_not_change_what_is_read():
    two, frames_two = collect(APOLLO, fps=1, chunk_seconds=2, short_side=64)
    six, frames_six = collect(APOLLO, fps=1, chunk_seconds=6, short_side=64)
    np.testing.assert_array_equal(frames_two, frames_six)
    np.testing.assert_array_equal(np.concatenate([c.audio for c in two]), np.concatenate([c.audio for c in six]))
    assert two[-1].t1 == six[-1].t1


def test_context_is_the_neighbouring_audio():
    sound = all_sound(RABBIT)
    for chunk in open_media(RABBIT, context_seconds=0.25):
        start = round(chunk.t0 * 16000)
        stop = start + len(chunk.audio)
        np.testing.assert_array_equal(chunk.audio_before, sound[max(start - 4000, 0) : start])
        np.testing.assert_array_equal(chunk.audio_after, sound[stop : stop + 4000])
    assert next(iter(open_media(RABBIT))).audio_after.shape == (1600,)


def test_reading_again_gives_the_same():
    reader = open_media(RABBIT, short_side=32)
    first, second = list(reader), list(reader)
    assert len(first) == len(second) == 4
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.frames, b.frames)
        np.testing.assert_array_equal(a.audio, b.audio)


def test_reader_travels_to_a_worker_process():
    copy = pickle.loads(pickle.dumps(open_media(RABBIT)))
    assert copy.info == probe(RABBIT)
    assert len(list(copy)) == 4


def test_max_seconds_ends_the_clip():
    chunks = list(open_media(APOLLO, fps=2, max_seconds=5))
    assert [(c.t0, c.t1, c.last) for c in chunks] == [(0, 2, False), (2, 4, False), (4, 5, True)]
    assert [len(c.audio) for c in chunks] == [32000, 32000, 16000]
    assert sum(len(c.frames) for c in chunks) == 10
    assert len(chunks[-1].audio_after) == 0
    assert list(open_media(RABBIT, max_seconds=60))[-1].t1 == pytest.approx(7.8)


def test_video_or_audio_alone():
    silent = list(open_media(RABBIT, audio=False))
    assert all(c.audio is None and c.audio_before.size == 0 for c in silent)
    assert sum(len(c.frames) for c in silent) == 8
    blind = list(open_media(RABBIT, video=False))
    assert all(c.frames.shape == (0, 0, 0, 3) for c in blind)
    assert sum(len(c.audio) for c in blind) == 124459
    info = open_media(RABBIT, video=False).info
    assert info.has_video and info.video_index is None and info.audio_index == 1


def test_cover_art_is_not_video():
    info = probe(COVER_ART)
    assert not info.has_video and info.width == 0
    chunks = list(open_media(COVER_ART))
    assert all(len(c.frames) == 0 for c in chunks)
    assert sum(len(c.audio) for c in chunks) == 30 * 16000


def test_clip_without_audio():
    assert all(c.audio is None for c in open_media(VFR))
    assert not probe(VFR).has_audio


def test_silent_track_is_audio():
    sound = all_sound(FLOWER)
    assert len(sound) > 80000 and not sound.any()


def test_video_may_end_before_the_audio(tmp_path):
    sound = {"samples": tone(5.0)}
    path = write_media(tmp_path / "short_picture.mkv", seconds=2, audio_tracks=[sound])
    chunks = list(open_media(path))
    assert [len(c.frames) for c in chunks] == [2, 0, 0]
    assert chunks[1].frames.shape == (0, 64, 96, 3)
    assert [len(c.audio) for c in chunks] == [32000, 32000, 16000]


def test_audio_may_end_before_the_video(tmp_path):
    path = write_media(tmp_path / "short_sound.mkv", seconds=5, audio_tracks=[{"samples": tone(2.05)}])
    chunks = list(open_media(path))
    assert [len(c.audio) for c in chunks] == [32000, 800, 0]
    assert [len(c.audio_after) for c in chunks] == [800, 0, 0]
    assert [len(c.frames) for c in chunks] == [2, 2, 1]


# ---------------------------------------------------------------- audio


def test_late_audio_begins_with_silence(tmp_path):
    path = write_media(tmp_path / "late_sound.mkv", audio_tracks=[{"samples": tone(2.0), "start": 1.5}])
    info = probe(path)
    assert (info.video_offset, info.audio_offset) == (0, pytest.approx(1.5))
    sound = all_sound(path)
    assert not sound[:24000].any()
    np.testing.assert_allclose(sound[24000:56000], tone(2.0)[0] / 32768, atol=1e-4)


def test_late_video_shows_its_first_frame_from_the_start(tmp_path):
    path = write_media(tmp_path / "late.mkv", seconds=2, video_start=1.5, audio_tracks=[{"samples": tone(3.5)}])
    assert probe(path).video_offset == pytest.approx(1.5)
    chunks, frames = collect(path, fps=2)
    assert [len(c.frames) for c in chunks] == [4, 3]
    levels = frames[:, -1, -1, 0].astype(int)
    assert np.abs(levels[:4] - 20).max() <= 3  # frame 0 until 1.5 s
    assert abs(levels[4] - (20 + 7 * 12)) <= 10  # half a second later frame 12 (of 25 a second)
    np.testing.assert_allclose(np.concatenate([c.audio for c in chunks]), tone(3.5)[0] / 32768, atol=1e-4)


def test_start_of_both_streams_is_time_zero(tmp_path):
    path = write_media(
        tmp_path / "shifted.mkv", seconds=2, video_start=10.0, audio_tracks=[{"samples": tone(2.0), "start": 10.0}]
    )
    chunks = list(open_media(path))
    assert probe(path).start == pytest.approx(10.0)
    assert len(chunks) == 1 and chunks[0].t1 == 2.0 and len(chunks[0].audio) == 32000


@pytest.mark.parametrize(("shift", "extra"), [(0.5, 8000), (0.015, 0), (-0.04, -640)])
def test_gaps_become_silence_and_overlaps_are_cut(tmp_path, shift, extra):
    """A shift of the timestamps at 1 s moves the audio; one below 20 ms is taken for rounding."""
    samples = tone(2.0)
    path = tmp_path / "gap.mkv"
    write_media(path, codec=None, audio_tracks=[{"samples": samples, "cuts": [(16000, shift)]}])
    sound = all_sound(path)
    assert len(sound) == 32000 + extra
    plain = samples[0] / 32768
    np.testing.assert_allclose(sound[:16000], plain[:16000], atol=1e-4)
    np.testing.assert_allclose(sound[-8000:], plain[-8000:], atol=1e-4)
    if extra > 0:
        assert not sound[16000:24000].any()


def test_priming_is_trimmed():
    """The encoder's lead-in is not presented: the commentary is 106000 samples of 16 kHz, header or not."""
    assert len(all_sound(COMMENTARY)) == 106000


def test_padding_of_the_last_frame_is_trimmed(tmp_path):
    """An MP4 says how much of its last AAC frame counts, so 3 s stay 3 s."""
    path = write_media(
        tmp_path / "padded.m4a", codec=None, muxer="mp4",
        audio_tracks=[{"samples": tone(3.0, rate=48000), "rate": 48000, "codec": "aac"}],
    )  # fmt: skip
    assert len(all_sound(path)) == 48000


def test_resampling_keeps_time(tmp_path):
    """A click at 1.25 s of 44.1 kHz is decoded to sample 20000."""
    samples = np.zeros((1, 2 * 44100), np.int16)
    samples[0, round(1.25 * 44100)] = 30000
    path = write_media(tmp_path / "click.wav", codec=None, audio_tracks=[{"samples": samples, "rate": 44100}])
    sound = all_sound(path)
    assert len(sound) == 32000
    assert np.abs(sound).argmax() == 20000


def test_surround_is_mixed_by_the_resamplers_matrix(tmp_path):
    """Each 5.1 channel has its own tone; mono is front 1/sqrt(2), centre 1, surround 1/2, no LFE, to sum 1."""
    rate, names = 48000, ["FL", "FR", "FC", "LFE", "BL", "BR"]
    frequencies = [300, 500, 700, 900, 1100, 1300]
    samples = np.concatenate([tone(2.0, f, rate) for f in frequencies])
    path = write_media(
        tmp_path / "surround.wav", codec=None, audio_tracks=[{"samples": samples, "rate": rate, "layout": "5.1"}]
    )
    sound = all_sound(path)
    spectrum = np.abs(np.fft.rfft(sound)) / (len(sound) / 2)
    level = {name: spectrum[2 * f] / 0.5 for name, f in zip(names, frequencies, strict=True)}
    weights = {"FL": 0.5**0.5, "FR": 0.5**0.5, "FC": 1.0, "LFE": 0.0, "BL": 0.5, "BR": 0.5}
    total = sum(weights.values())
    for name in names:
        assert level[name] == pytest.approx(weights[name] / total, abs=0.01), name


def test_track_flagged_default_is_chosen_then_the_best(tmp_path, caplog):
    low = {"samples": tone(2.0, 400, 8000), "rate": 8000}
    high = {"samples": tone(2.0, 600, 48000), "rate": 48000}
    equal = write_media(tmp_path / "equal.mkv", audio_tracks=[dict(low, default=False), dict(high, default=False)])
    with caplog.at_level(logging.INFO, "omnimem.media"):
        assert open_media(equal).info.audio_index == 2
    assert "audio track 2" in caplog.text and "48000 Hz" in caplog.text and "audio_track=" in caplog.text
    flagged = write_media(tmp_path / "flagged.mkv", audio_tracks=[dict(low, default=True), dict(high, default=False)])
    assert open_media(flagged).info.audio_index == 1
    reader = open_media(flagged, audio_track=2)
    assert reader.info.audio_index == 2
    assert [t.sample_rate for t in reader.info.audio_tracks] == [8000, 48000]
    spectrum = np.abs(np.fft.rfft(np.concatenate([c.audio for c in reader])[:16000]))
    assert spectrum.argmax() == 600


def test_multistream_clip_uses_the_larger_video_and_the_better_audio():
    info = probe(WEBB)
    assert (info.video_index, info.width, info.height) == (3, 480, 270)
    assert info.audio_index == 4
    assert {t.index: t.sample_rate for t in info.audio_tracks} == {1: 8000, 4: 16000}
    assert len(all_sound(WEBB, audio_track=1)) == pytest.approx(208896, abs=2)


def test_damaged_audio_packets_become_silence(tmp_path, caplog):
    path = write_media(tmp_path / "sound.mkv", codec=None, audio_tracks=[{"samples": tone(3.0), "codec": "aac"}])
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(file.streams.audio[0]) if packet.size]
    content = path.read_bytes()
    for packet in packets[20:24]:
        content = content.replace(packet, b"\xff" * len(packet))
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "omnimem.media"):
        sound = all_sound(path)
    assert "damaged audio" in caplog.text
    assert len(sound) >= 3 * 16000
    assert np.abs(sound[-8000:-2000]).max() > 0.3


# ---------------------------------------------------------------- odd files


def test_stream_without_duration_header(tmp_path):
    sound = {"samples": tone(4.0, rate=48000), "rate": 48000, "codec": "libopus"}
    path = write_media(
        tmp_path / "live.webm", codec="libvpx", options={"g": "20", "cpu-used": "8"}, audio_tracks=[sound],
        muxer_options={"live": "1"},
    )  # fmt: skip
    assert probe(path).duration is None
    chunks = list(open_media(path))
    assert [len(c.frames) for c in chunks[:2]] == [2, 2]
    assert chunks[-1].t1 == pytest.approx(4.0, abs=0.05)


def test_metadata_need_not_be_utf8(tmp_path):
    path = tmp_path / "latin.mkv"
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "titleXXXX"
        stream, frames = add_audio_track(file, samples=tone(1.0))
        for frame in frames:
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    content = path.read_bytes()
    assert b"titleXXXX" in content
    path.write_bytes(content.replace(b"titleXXXX", b"title\xfe\xff\xfe\xff"))
    assert len(all_sound(path)) == 16000


def test_name_with_a_colon(tmp_path):
    path = write_media(tmp_path / "12:30 talk.mkv", seconds=1)
    assert probe(path).has_video


def test_broadcast_stream_that_starts_between_key_frames(tmp_path):
    path = write_media(tmp_path / "whole.ts", options={"x264-params": "keyint=25:scenecut=0:bframes=0"})
    content = path.read_bytes()
    cut = tmp_path / "joined_late.ts"
    cut.write_bytes(content[188 * (len(content) // 188 // 3) :])
    chunks, frames = collect(cut, fps=5)
    assert len(frames) >= 5
    assert 1.0 <= chunks[-1].t1 <= 3.5


# ---------------------------------------------------------------- errors


def one_line(error, name, *words):
    text = str(error.value)
    assert "\n" not in text and text.startswith(f"{name}: ") and "; " in text
    for word in words:
        assert word in text, text
    assert isinstance(error.value, ValueError)


def test_cut_off_file_hands_out_the_whole_chunks_and_then_raises():
    got = []
    with pytest.raises(MediaError) as error:
        for chunk in open_media(CUT_OFF, fps=30, chunk_seconds=1):
            got.append(chunk)
    one_line(error, CUT_OFF.name, "of 7.8 s", "readable up to 3.", "--allow-truncated")
    assert [c.index for c in got] == [0, 1, 2]
    whole = next(iter(open_media(RABBIT, fps=30, chunk_seconds=1)))
    np.testing.assert_array_equal(got[0].frames, whole.frames)
    np.testing.assert_array_equal(got[0].audio, whole.audio)


@pytest.mark.parametrize("fps", [1, 30])
def test_cut_off_file_can_be_accepted(fps, caplog):
    with caplog.at_level(logging.WARNING, "omnimem.media"):
        chunks = list(open_media(CUT_OFF, fps=fps, on_truncated="warn"))
    assert caplog.text.count(CUT_OFF.name) == 1
    assert chunks[-1].last and chunks[-1].t1 == pytest.approx(113 / 30)
    assert sum(len(c.frames) for c in chunks) == {1: 4, 30: 113}[fps]


@pytest.mark.parametrize("name", ["tail.mp4", "tail.mkv", "tail.flac"])
def test_demuxers_that_stop_silently_are_noticed(tmp_path, name):
    """A missing tail shows against the header, or against the index, also where no decoder complains."""
    sounds = [{"samples": tone(20.0)}]
    muxer_options = {"movflags": "faststart"} if name.endswith("mp4") else {}
    codec = None if name.endswith("flac") else "libx264"
    if name != "tail.mkv":
        sounds[0]["codec"] = "aac" if name == "tail.mp4" else "flac"
    path = write_media(tmp_path / name, seconds=20, codec=codec, audio_tracks=sounds, muxer_options=muxer_options)
    content = path.read_bytes()
    assert list(open_media(path, fps=1))[-1].t1 == pytest.approx(20, abs=0.1)
    path.write_bytes(content[: round(len(content) * 0.8)])
    with pytest.raises(MediaError, match="readable up to 1"):
        list(open_media(path, fps=1))
    assert list(open_media(path, fps=1, on_truncated="warn"))[-1].t1 < 19


def test_error_that_lies_beyond_max_seconds_does_not_matter():
    assert list(open_media(CUT_OFF, max_seconds=2))[-1].t1 == 2


def test_file_without_index():
    with pytest.raises(MediaError) as error:
        open_media(NO_INDEX)
    one_line(error, NO_INDEX.name, "index")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.mp4", None, "no such file"),
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"this is a text file, not a film\n" * 20, "not a media file"),
        ("folder.mp4", "directory", "directory"),
        ("subtitles.srt", b"1\n00:00:00,000 --> 00:00:01,000\nhello\n", "unsupported format (srt)"),
    ],
)
def test_unreadable_files_say_why_in_one_line(tmp_path, name, content, words):
    path = tmp_path / name
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError) as error:
        probe(path)
    one_line(error, name, words)


def test_file_that_may_not_be_read(monkeypatch):
    def refuse(*_, **__):
        raise av.error.PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(container_module.av, "open", refuse)
    with pytest.raises(MediaError) as error:
        probe(RABBIT)
    one_line(error, RABBIT.name, "permission denied")


def test_asking_for_what_is_not_there():
    with pytest.raises(MediaError) as error:
        open_media(VFR, video=False)
    one_line(error, VFR.name, "no audio stream")
    with pytest.raises(MediaError) as error:
        open_media(WEBB, audio_track=3)
    one_line(error, WEBB.name, "no audio track 3", "1, 4")


@pytest.mark.parametrize(
    "options",
    [{"fps": 0.4}, {"fps": 0}, {"chunk_seconds": -1}, {"short_side": 1}, {"max_seconds": 0},
     {"on_truncated": "ignore"}, {"audio": False, "video": False}],
    ids=str,
)  # fmt: skip
def test_parameters_that_make_no_sense(options):
    with pytest.raises(ValueError) as error:
        open_media(RABBIT, **options)
    assert not isinstance(error.value, MediaError)


@pytest.mark.parametrize(("fps", "seconds"), [(1 / 3, 3), (29.97002997, 1001 / 30), (0.1, 10)])
def test_rates_that_decimals_only_approximate(fps, seconds):
    assert next(iter(open_media(RABBIT, fps=fps, chunk_seconds=seconds))).t0 == 0


# ---------------------------------------------------------------- laziness and memory


def test_first_chunk_does_not_read_the_file_and_closing_frees_it(tmp_path, monkeypatch):
    path = write_media(tmp_path / "long.mkv", seconds=60, options={"preset": "ultrafast", "g": "50"})
    read, opened = [], []
    original = VideoSampler._packets

    def counted(self, *arguments, **options):
        for packet in original(self, *arguments, **options):
            read.append(packet.pts)
            yield packet

    real_open = av.open

    def remembered(*arguments, **options):
        opened.append(real_open(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(VideoSampler, "_packets", counted)
    monkeypatch.setattr(container_module.av, "open", remembered)
    chunks = iter(open_media(path))
    assert isinstance(next(chunks), Chunk)
    assert len(read) < 160  # of 1500
    chunks.close()
    for file in opened:
        with pytest.raises(AssertionError):
            file.seek(0)  # closed


def test_memory_does_not_grow_with_the_file(tmp_path):
    path = write_media(
        tmp_path / "long.mp4", seconds=80, size=(320, 240), options={"preset": "ultrafast", "g": "50"},
        audio_tracks=[{"samples": tone(80.0), "codec": "aac"}],
    )  # fmt: skip
    whole = 80 * (2 * 320 * 240 * 3 + 16000 * 4)
    tracemalloc.start()
    try:
        seen = sum(len(chunk.frames) for chunk in open_media(path, fps=2))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == 160
    assert peak < whole / 10  # two chunks, a frame ahead, and PyAV's objects
    sampler = VideoSampler(inspect(path), Fraction(2), None, on_fault=pytest.fail)
    assert sum(1 for _ in sampler.frames()) == 160
    assert sampler.stats.held <= 2 * 50 + 10


# ---------------------------------------------------------------- audio from a file beside the video


@pytest.mark.parametrize(("video", "sound"), [(RABBIT, JFK), (APOLLO, COMMENTARY), (VFR, COMMENTARY)])
def test_audio_beside_the_video_is_that_file_read_alone(video, sound):
    """Frames and samples are those of each file read by itself; the stream lasts as long as the longer one."""
    options = {"fps": 1, "short_side": 64}
    chunks = list(open_media(video, audio_path=sound, **options))
    seen, heard = list(open_media(video, audio=False, **options)), list(open_media(sound, **options))
    assert len(chunks) == max(len(seen), len(heard)) and chunks[-1].t1 == max(seen[-1].t1, heard[-1].t1)
    for chunk, other in zip(chunks, seen, strict=False):
        np.testing.assert_array_equal(chunk.frames, other.frames)
        np.testing.assert_array_equal(chunk.frame_times, other.frame_times)
    assert sum(len(chunk.frames) for chunk in chunks) == sum(len(chunk.frames) for chunk in seen)
    for chunk, other in zip(chunks, heard, strict=False):
        for name in ("audio", "audio_before", "audio_after"):
            np.testing.assert_array_equal(getattr(chunk, name), getattr(other, name))
    assert sum(len(chunk.audio) for chunk in chunks) == sum(len(chunk.audio) for chunk in heard)
    info, own, beside = open_media(video, audio_path=sound).info, probe(video), probe(sound)
    assert info.has_video and info.has_audio and info.duration == max(own.duration, beside.duration)
    assert (info.video_codec, info.audio_codec) == (own.video_codec, beside.audio_codec)
    assert (info.video_offset, info.audio_offset) == (0, 0)


def test_audio_beside_the_video_is_left_alone_when_not_wanted(tmp_path):
    (chunk, *_) = open_media(RABBIT, audio_path=tmp_path / "missing.wav", audio=False)
    assert chunk.audio is None and not open_media(RABBIT, audio_path=JFK, audio=False).info.audio_codec
    blind = list(open_media(RABBIT, audio_path=JFK, video=False))
    assert sum(len(chunk.frames) for chunk in blind) == 0 and blind[-1].t1 == pytest.approx(11)
    assert list(open_media(RABBIT, audio_path=JFK, max_seconds=5))[-1].t1 == 5
    (copy,) = [pickle.loads(pickle.dumps(open_media(RABBIT, audio_path=JFK)))]
    assert copy.info.has_audio and next(iter(copy)).audio is not None


def test_audio_beside_the_video_says_which_file_is_wrong(caplog):
    with pytest.raises(MediaError, match=f"^{VFR.name}: no audio stream"):
        open_media(RABBIT, audio_path=VFR)
    with pytest.raises(MediaError, match=f"^{JFK.name}: no video stream"):
        open_media(JFK, audio_path=COMMENTARY)
    with pytest.raises(MediaError, match=f"^{CUT_OFF.name}: cut off or damaged"):
        list(open_media(CUT_OFF, audio_path=JFK))
    with pytest.raises(MediaError, match=f"^{CUT_OFF.name}: cut off or damaged"):
        list(open_media(HEVC, audio_path=CUT_OFF, short_side=32))
    with caplog.at_level(logging.WARNING, logger="omnimem.media"):
        assert list(open_media(CUT_OFF, audio_path=JFK, on_truncated="warn"))[-1].t1 == pytest.approx(11)
    assert len(caplog.records) == 1 and CUT_OFF.name in caplog.text

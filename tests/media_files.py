"""Media files made for a test: every property of a track is an argument."""

from __future__ import annotations

from fractions import Fraction

import av
import av.stream
import numpy as np


def write_media(
    path, *, seconds=4.0, rate=25, codec="libx264", options=None, size=(96, 64), pts=None, video_start=0.0,
    rotation=None, flip=False, audio_tracks=(), muxer=None, muxer_options=None,
):  # fmt: skip
    """Write a test file; picture ``i`` is told by its grey level. ``audio_tracks``: dicts for `add_audio_track`."""
    with av.open(str(path), "w", format=muxer, options=muxer_options or {}) as file:
        video = None
        if codec is not None:
            video = file.add_stream(codec, rate=rate, options=options or {})
            video.width, video.height, video.pix_fmt = *size, "yuv420p"
            tick = Fraction(1, rate) if codec == "mpeg2video" else Fraction(1, 1000)  # MPEG-2 knows fixed rates only
            video.codec_context.time_base = tick
            if rotation is not None:
                video.set_display_rotation(rotation, hflip=flip)
        tracks = [add_audio_track(file, **track) for track in audio_tracks]
        if video is not None:
            times = pts or [video_start + i / rate for i in range(round(seconds * rate))]
            for i, time in enumerate(times):
                frame = av.VideoFrame.from_ndarray(picture(i, size)).reformat(format="yuv420p")
                frame.pts, frame.time_base = round(time / tick), tick
                file.mux(video.encode(frame))
            file.mux(video.encode(None))
        for stream, frames in tracks:
            for frame in frames:
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    return path


def picture(i, size=(96, 64)):
    """RGB ``[H, W, 3]``: grey level by number, a bright corner at the top left."""
    pixels = np.full((size[1], size[0], 3), 20 + i * 7 % 160, np.uint8)
    pixels[: size[1] // 4, : size[0] // 4] = 255
    return pixels


def add_audio_track(file, *, samples, rate=16000, codec="pcm_s16le", layout="mono", start=0.0, cuts=(), default=None):
    """Add a track of int16 ``samples`` ``[channels, n]`` from ``start`` seconds; ``cuts``: (n, shift in seconds)."""
    stream = file.add_stream(codec, rate=rate, layout=layout)
    if default is not None:
        stream.disposition = av.stream.Disposition.default if default else 0
    frames, at, shift = [], 0, 0.0
    cuts = dict(cuts)
    for at in range(0, samples.shape[1], 800):
        shift += cuts.get(at, 0.0)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[:, at : at + 800].T.reshape(1, -1)), "s16", layout
        )
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = at + round((start + shift) * rate)
        frames.append(frame)
    return stream, frames


def tone(seconds, frequency=440.0, rate=16000, level=0.5, channels=1):
    wave = np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)
    return np.repeat((wave * level * 32767).astype(np.int16)[None], channels, axis=0)

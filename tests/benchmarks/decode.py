"""Cost of sampling frames vs. decoding all of them, on a ten-minute video in a usual encoding.

A model uses one or two frames per second, and reading a video costs mostly decoding. The video is a clip of
data_prep/quickstart scaled to 640x360, encoded by x264 with its defaults (key frames at scene cuts and at least every
250 frames, up to 3 B-frames) or with a key frame every 2 seconds as for streaming, and repeated without encoding it
again. Both ways must give the same frames; ratios of CPU time are comparable between machines.

    python tests/benchmarks/decode.py [--out results.json] [--minutes 10]
"""

import hashlib
import itertools
import math
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from report import new_parser, write_report  # noqa: E402

from omnimem.media.probe import inspect  # noqa: E402
from omnimem.media.video import VideoSampler  # noqa: E402

CLIP = ROOT / "data_prep" / "quickstart" / "speech_nasa_webb_narration_multistream.mp4"
SIZE = (640, 360)
RATE = 30


ENCODINGS = {"x264 defaults": "keyint=250:bframes=3", "key frame every 2 s": "keyint=60:bframes=3"}


def encode_once(path: Path, parameters: str) -> None:
    """Encode the clip at a fixed rate and without audio."""
    with av.open(str(CLIP)) as source, av.open(str(path), "w") as file:
        # PyAV sets B-frames to 0, the default of x264 is 3.
        stream = file.add_stream("libx264", rate=RATE, options={"x264-params": parameters})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for number, frame in enumerate(source.decode(video=1)):
            scaled = frame.reformat(*SIZE, "yuv420p")
            scaled.pts, scaled.time_base = number, Fraction(1, RATE)
            file.mux(stream.encode(scaled))
        file.mux(stream.encode(None))


def repeat(short: Path, long: Path, seconds: float) -> None:
    """Copy the packets of ``short`` one after another until ``long`` lasts ``seconds``."""
    with av.open(str(short)) as source, av.open(str(long), "w") as file:
        original = source.streams.video[0]
        stream = file.add_stream_from_template(original)
        times = math.ceil(seconds / (original.duration * original.time_base))
        for number in range(times):
            source.seek(0)
            for packet in source.demux(original):
                if packet.size:
                    packet.pts += number * original.duration
                    packet.dts += number * original.duration
                    packet.stream = stream
                    file.mux(packet)


def decode_all(path: Path, fps: Fraction) -> tuple[list[bytes], int]:
    """The usual way: decode every frame, convert those displayed at the sampling times."""
    found, decoded, held = [], 0, None
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        end = Fraction(0)
        for frame in itertools.chain(file.decode(stream), [None]):
            shown = end if frame is None else frame.pts * frame.time_base
            while held is not None and len(found) / fps + Fraction(1, 1000) < shown:
                found.append(digest(held.to_ndarray(format="rgb24")))
            if frame is not None:
                held, end = frame, shown + frame.duration * frame.time_base
                decoded += 1
    return found, decoded


def sample(path: Path, fps: Fraction) -> tuple[list[bytes], VideoSampler]:
    """With `VideoSampler`, which decodes only what is needed."""
    sampler = VideoSampler(inspect(path), fps, None, on_fault=lambda _, cause: sys.exit(cause))
    return [digest(frame) for frame in sampler.frames()], sampler


def digest(frame) -> bytes:
    return hashlib.blake2b(frame).digest()


def timed(function, *arguments):
    """CPU seconds and result of a call."""
    start = time.process_time()
    result = function(*arguments)
    return time.process_time() - start, result


def compare(film: Path, encoding: str, fps: Fraction) -> dict:
    """Read the video both ways and compare."""
    all_seconds, (expected, decoded) = timed(decode_all, film, fps)
    our_seconds, (frames, sampler) = timed(sample, film, fps)
    if frames != expected:
        sys.exit(f"{encoding}, {fps} FPS: the sampled frames are not those of a full decode")
    row = {
        "encoding": encoding,
        "fps": float(fps),
        "frames": len(frames),
        "identical": True,
        "speedup": round(all_seconds / our_seconds, 2),
        "frames_in_file": decoded,
        "frames_decoded": sampler.stats.decoded,
        "decoded_share": round(sampler.stats.decoded / decoded, 3),
        "packets_held": sampler.stats.held,
    }
    print(
        f"{encoding}, {float(fps):g} FPS: {row['speedup']}x a full decode, {sampler.stats.decoded} of {decoded} "
        f"frames decoded, {len(frames)} sampled frames identical",
        file=sys.stderr,
    )
    return row


def main() -> None:
    """Build the videos, compare, write JSON."""
    parser = new_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the video (default 10)")
    options = parser.parse_args()
    rows = []
    for encoding, parameters in ENCODINGS.items():
        with tempfile.TemporaryDirectory() as folder:
            short, film = Path(folder, "short.mp4"), Path(folder, "film.mp4")
            encode_once(short, parameters)
            repeat(short, film, options.minutes * 60)
            rows += [compare(film, encoding, fps) for fps in (Fraction(1, 2), Fraction(1), Fraction(2))]
    write_report(options.out, {"minutes": options.minutes, "size": SIZE, "results": rows})


if __name__ == "__main__":
    main()

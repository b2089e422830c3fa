"""Decode only the groups of pictures (GOPs), and in them only the frames, that sampling needs.

Decoding dominates the cost of reading video. The packets of one GOP (key frame to key frame) are buffered. A GOP
without a wanted frame is dropped; otherwise decoding stops after the last wanted frame, and unwanted
non-reference frames are skipped. The frames are identical to those of a full decode.

    python tests/benchmarks/decode.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from av.error import FFmpegError
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .frame_layout import FrameLayout
from .plan import FramePlan, PlanImpossible

# Codecs that can start decoding at any key frame; streams of other codecs are decoded completely.
RESTARTABLE = frozenset({
    "h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4",
    "h263", "mjpeg", "prores", "png",
})  # fmt: skip
# Codecs in which skipping non-reference frames does not change the other frames.
SKIPS_NON_REFERENCE = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
HOLD_PACKETS = 1024  # a longer GOP is decoded while it is read
HOLD_BYTES = 32 << 20


@dataclass
class DecodeStats:
    """Counts of one pass over a video stream, in packets and frames."""

    packets: int = 0  # read from the file
    sent: int = 0  # sent to the decoder
    decoded: int = 0  # frames returned by the decoder
    converted: int = 0  # frames converted to RGB
    held: int = 0  # maximum number of buffered packets


class SelectiveDecoder:
    """Decode packets to the frames that a plan wants.

    After ``frames`` ends, ``broken`` is None or (ticks up to which the video is readable, FFmpeg's error).
    """

    def __init__(self, stream: VideoStream, plan: FramePlan, layout: FrameLayout, stats: DecodeStats) -> None:
        self.codec: VideoCodecContext = stream.codec_context
        self.plan = plan
        self.layout = layout
        self.stats = stats
        self.broken: tuple[int, FFmpegError] | None = None
        self._skip: Literal["NONREF", "DEFAULT"] = "NONREF" if _may_skip(self.codec) else "DEFAULT"
        self._held: list[Packet] = []  # decoding order; starts at a key frame unless the decoder is inside a GOP
        self._held_bytes = 0
        self._next_key: int | None = None  # index in _held of the key frame that starts the next GOP
        self._open = False  # the decoder has received the start of the GOP
        self._first_group = True
        self._key_pts = 0
        self._leads = False  # frames before the key frame were sent without the GOP they refer to
        self._outstanding: set[int] = set()  # wanted frames sent to the decoder but not returned yet

    def frames(self, packets: Iterable[Packet]) -> Iterator[np.ndarray]:
        """Yield uint8 ``[H, W, 3]`` for every instant that is settled while ``packets`` last.

        Raises
        ------
        PlanImpossible
            All frames of the stream must be decoded.
        """
        for packet in packets:
            if packet.is_keyframe and self._held and self._next_key is None:
                self._next_key = len(self._held)
            self._held.append(packet)
            self._held_bytes += packet.size
            self.stats.held = max(self.stats.held, len(self._held))
            self.plan.add(packet.pts, packet.dts, is_shown(packet, self.codec.name))
            yield from self._release_groups()
            if self.broken is None and (len(self._held) > HOLD_PACKETS or self._held_bytes > HOLD_BYTES):
                yield from self._release_settled()
            if self.broken is not None or self.plan.done:
                break

    def finish(self, instants: int) -> Iterator[np.ndarray]:
        """After the last packet: yield the frames of the remaining instants below ``instants``."""
        self.plan.finish(instants)
        yield from self._release_groups(final=True)
        if self.broken is None:
            yield from self._decode_to_last_wanted(self._cut(len(self._held)))

    def _release_groups(self, final: bool = False) -> Iterator[np.ndarray]:
        """Decode or drop every buffered GOP that no unsettled instant can show."""
        while self.broken is None:
            at = self._next_key
            if at is None or not (final or self.plan.passed(_pts(self._held[at]))):
                return
            key = _pts(self._held[at])
            # Leading frames (shown before the next key frame, stored after it; open GOP) refer to this GOP.
            led = any(_pts(p) < key and self.plan.is_wanted(p.pts) for p in self._held[at + 1 :])
            group = self._cut(at)
            if led:
                yield from self._send(group)
            else:
                yield from self._decode_to_last_wanted(group)

    def _release_settled(self) -> Iterator[np.ndarray]:
        """Decode the start of an overlong GOP, up to the first packet that an unsettled instant may still show."""
        unsettled = (i for i, p in enumerate(self._held) if is_shown(p, self.codec.name) and self.plan.is_open(_pts(p)))
        at = next(unsettled, len(self._held))
        if at == 0:
            raise PlanImpossible("decoding times that do not advance")
        yield from self._send(self._cut(at))

    def _decode_to_last_wanted(self, group: list[Packet]) -> Iterator[np.ndarray]:
        """Decode ``group`` up to its last wanted frame, then reset the decoder for the next key frame."""
        needed = [i for i, packet in enumerate(group) if self._is_needed(packet)]
        if needed:
            yield from self._send(group[: needed[-1] + 1])
        if self._open and self.broken is None:
            yield from self._drain()
            if self._outstanding:
                raise PlanImpossible("the decoder did not return a chosen frame")

    def _is_needed(self, packet: Packet) -> bool:
        """Whether the decoder must return the frame of a packet."""
        # Decode damaged packets too, so that errors are the same as in a full decode.
        return packet.is_corrupt or self.plan.is_wanted(packet.pts)

    def _send(self, packets: list[Packet]) -> Iterator[np.ndarray]:
        """Decode packets; yield the wanted frames among them."""
        for at, packet in enumerate(packets):
            if not self._open:
                self._open, self._key_pts, self._leads = True, _pts(packet), False
            if not self._first_group and _pts(packet) < self._key_pts and not packet.is_discard:
                self._leads = True
            if self.plan.is_wanted(packet.pts):
                self._outstanding.add(_pts(packet))
            self.codec.skip_frame = "DEFAULT" if self._is_needed(packet) else self._skip
            self.stats.sent += 1
            try:
                frames = self.codec.decode(packet)
            except FFmpegError as error:
                if self._leads:
                    raise PlanImpossible("frames that refer to a GOP that was not decoded") from error
                yield from self._break_off(packets[at:], error)
                return
            for frame in frames:
                yield from self._emit(frame)

    def _break_off(self, rest: list[Packet], error: FFmpegError) -> Iterator[np.ndarray]:
        """After a failure at ``rest[0]``: yield what the decoder still holds, record how far the video is readable."""
        unread = [_pts(p) for p in [*rest, *self._held] if is_shown(p, self.codec.name)]
        self.broken = (min(unread, default=_pts(rest[0])), error)
        yield from self._drain()

    def _drain(self) -> Iterator[np.ndarray]:
        """Yield the frames that the decoder still holds; reset it."""
        for frame in self.codec.decode(None):
            yield from self._emit(frame)
        self.codec.flush_buffers()
        self._open = False
        self._first_group = False

    def _emit(self, frame: VideoFrame) -> Iterator[np.ndarray]:
        """Yield a decoded frame as often as instants show it."""
        self.stats.decoded += 1
        if frame.pts is None:
            raise PlanImpossible("a frame without presentation time")
        if not self.plan.wanted or frame.pts < self.plan.wanted[0][0]:
            return
        if frame.pts > self.plan.wanted[0][0] or frame.is_corrupt:
            raise PlanImpossible("the decoder did not return a chosen frame undamaged")
        self._outstanding.discard(frame.pts)
        self.stats.converted += 1
        image = self.layout.rgb(frame)
        for _ in range(self.plan.pop_wanted()):
            yield image

    def _cut(self, at: int) -> list[Packet]:
        """Remove the first ``at`` buffered packets."""
        taken, self._held = self._held[:at], self._held[at:]
        self._held_bytes -= sum(packet.size for packet in taken)
        self._next_key = next((i for i in range(1, len(self._held)) if self._held[i].is_keyframe), None)
        return taken


def is_shown(packet: Packet, codec: str) -> bool:
    """Whether the frame of a packet is presented: not edited out, not a hidden VP8 frame (RFC 6386, section 9.1)."""
    if packet.is_discard:
        return False
    return codec not in ("vp8", "libvpx") or bool(bytes(memoryview(packet)[:1])[0] & 0x10)


def _may_skip(codec: VideoCodecContext) -> bool:
    """Whether skipping non-reference frames does not change the other frames."""
    if codec.name == "hevc":
        # Non-reference is defined within a temporal layer: read the number of layers from the hvcC record
        # (ISO/IEC 14496-15, 8.3.3.1: three bits of byte 21).
        record = codec.extradata or b""
        return len(record) > 21 and record[0] == 1 and (record[21] >> 3) & 7 == 1
    return codec.name in SKIPS_NON_REFERENCE


def _pts(packet: Packet) -> int:
    """Presentation time of a packet that the plan has accepted, so it has one."""
    assert packet.pts is not None
    return packet.pts

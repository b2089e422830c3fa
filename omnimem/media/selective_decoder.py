"""Decode only the groups of pictures, and in them only the pictures, that sampling needs.

Why: decoding is the cost of reading video. Compressed packets are held for one group (key frame to key
frame); when no instant falls in it, it is dropped unread; otherwise decoding stops after its last wanted
picture, and pictures that nothing refers to are passed over. The result is that of a full decode, picture for
picture.

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

# Codecs whose key frames are places to start decoding; the rest are decoded whole.
RESTARTABLE = frozenset({
    "h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "mpeg1video", "mpeg2video", "mpeg4",
    "h263", "mjpeg", "prores", "png",
})  # fmt: skip
# Codecs in which skipping a picture that nothing refers to leaves no trace in the decoder.
SKIPS_NON_REFERENCE = frozenset({"h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4"})
HOLD_PACKETS = 1024  # a longer group is decoded as it arrives
HOLD_BYTES = 32 << 20


@dataclass
class DecodeStats:
    """Counts of one pass over a video stream, in packets and pictures."""

    packets: int = 0  # read from the file
    sent: int = 0  # given to the decoder
    decoded: int = 0  # pictures that came out of it
    converted: int = 0  # pictures converted to RGB
    held: int = 0  # most packets held at once


class SelectiveDecoder:
    """Turn packets into the pictures a plan wants.

    After ``pictures`` ends, ``broken`` is ``None`` or (ticks up to which the picture is readable, FFmpeg's
    error).
    """

    def __init__(self, stream: VideoStream, plan: FramePlan, layout: FrameLayout, stats: DecodeStats) -> None:
        self.codec: VideoCodecContext = stream.codec_context
        self.plan = plan
        self.layout = layout
        self.stats = stats
        self.broken: tuple[int, FFmpegError] | None = None
        self._skip: Literal["NONREF", "DEFAULT"] = "NONREF" if _may_skip(self.codec) else "DEFAULT"
        self._held: list[Packet] = []  # decoding order; begins at a key frame unless the decoder is mid-group
        self._held_bytes = 0
        self._next_key: int | None = None  # position in _held of the key frame that ends its group
        self._open = False  # the decoder holds the beginning of the group
        self._first_group = True
        self._key_pts = 0
        self._leads = False  # pictures before the key frame were sent without the group they refer to
        self._owed: set[int] = set()  # wanted pictures sent to the decoder that have not come out

    def pictures(self, packets: Iterable[Packet]) -> Iterator[np.ndarray]:
        """Yield uint8 ``[H, W, 3]`` for every instant that is settled while ``packets`` last.

        Raises
        ------
        PlanImpossible
            The stream must be decoded whole instead.
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
        """No packet follows: yield the remaining pictures, of instants below ``instants``."""
        self.plan.finish(instants)
        yield from self._release_groups(final=True)
        if self.broken is None:
            yield from self._decode_to_last_wanted(self._cut(len(self._held)))

    def _release_groups(self, final: bool = False) -> Iterator[np.ndarray]:
        """Decode or drop every held group whose pictures are all settled."""
        while self.broken is None:
            at = self._next_key
            if at is None or not (final or self.plan.passed(_pts(self._held[at]))):
                return
            key = _pts(self._held[at])
            # Pictures shown before the next key frame but stored after it refer to this group.
            led = any(_pts(p) < key and self.plan.is_wanted(p.pts) for p in self._held[at + 1 :])
            group = self._cut(at)
            if led:
                yield from self._send(group)
            else:
                yield from self._decode_to_last_wanted(group)

    def _release_settled(self) -> Iterator[np.ndarray]:
        """Decode the beginning of an over-long group: every packet that no open instant can show."""
        unsettled = (i for i, p in enumerate(self._held) if is_shown(p, self.codec.name) and self.plan.is_open(_pts(p)))
        at = next(unsettled, len(self._held))
        if at == 0:
            raise PlanImpossible("decoding times that do not advance")
        yield from self._send(self._cut(at))

    def _decode_to_last_wanted(self, group: list[Packet]) -> Iterator[np.ndarray]:
        """Decode ``group`` up to its last wanted picture; leave the decoder ready for another key frame."""
        needed = [i for i, packet in enumerate(group) if self._is_needed(packet)]
        if needed:
            yield from self._send(group[: needed[-1] + 1])
        if self._open and self.broken is None:
            yield from self._drain()
            if self._owed:
                raise PlanImpossible("a chosen picture did not come out of the decoder")

    def _is_needed(self, packet: Packet) -> bool:
        # A damaged packet is decoded so that the decoder judges it, as in a full decode.
        return packet.is_corrupt or self.plan.is_wanted(packet.pts)

    def _send(self, packets: list[Packet]) -> Iterator[np.ndarray]:
        for at, packet in enumerate(packets):
            if not self._open:
                self._open, self._key_pts, self._leads = True, _pts(packet), False
            if not self._first_group and _pts(packet) < self._key_pts and not packet.is_discard:
                self._leads = True
            if self.plan.is_wanted(packet.pts):
                self._owed.add(_pts(packet))
            self.codec.skip_frame = "DEFAULT" if self._is_needed(packet) else self._skip
            self.stats.sent += 1
            try:
                frames = self.codec.decode(packet)
            except FFmpegError as error:
                if self._leads:
                    raise PlanImpossible("pictures that refer to a group that was not decoded") from error
                yield from self._break_off(packets[at:], error)
                return
            for frame in frames:
                yield from self._give(frame)

    def _break_off(self, rest: list[Packet], error: FFmpegError) -> Iterator[np.ndarray]:
        """Decoding failed at ``rest[0]``: give what the decoder holds, note how far the picture reaches."""
        unread = [_pts(p) for p in [*rest, *self._held] if is_shown(p, self.codec.name)]
        self.broken = (min(unread, default=_pts(rest[0])), error)
        yield from self._drain()

    def _drain(self) -> Iterator[np.ndarray]:
        for frame in self.codec.decode(None):
            yield from self._give(frame)
        self.codec.flush_buffers()
        self._open = False
        self._first_group = False

    def _give(self, frame: VideoFrame) -> Iterator[np.ndarray]:
        self.stats.decoded += 1
        if frame.pts is None:
            raise PlanImpossible("a picture without presentation time")
        if not self.plan.wanted or frame.pts < self.plan.wanted[0][0]:
            return
        if frame.pts > self.plan.wanted[0][0] or frame.is_corrupt:
            raise PlanImpossible("a chosen picture did not come out of the decoder whole")
        self._owed.discard(frame.pts)
        self.stats.converted += 1
        picture = self.layout.rgb(frame)
        for _ in range(self.plan.pop_wanted()):
            yield picture

    def _cut(self, at: int) -> list[Packet]:
        """Take the first ``at`` held packets."""
        taken, self._held = self._held[:at], self._held[at:]
        self._held_bytes -= sum(packet.size for packet in taken)
        self._next_key = next((i for i in range(1, len(self._held)) if self._held[i].is_keyframe), None)
        return taken


def is_shown(packet: Packet, codec: str) -> bool:
    """Whether a packet's picture is presented: not edited out, not a hidden VP8 reference (RFC 6386, 9.1)."""
    if packet.is_discard:
        return False
    return codec not in ("vp8", "libvpx") or bool(bytes(memoryview(packet)[:1])[0] & 0x10)


def _may_skip(codec: VideoCodecContext) -> bool:
    if codec.name == "hevc":
        # "Non-reference" holds within one temporal layer only: ask the hvcC record for their number
        # (ISO/IEC 14496-15, 8.3.3.1: three bits of byte 21).
        record = codec.extradata or b""
        return len(record) > 21 and record[0] == 1 and (record[21] >> 3) & 7 == 1
    return codec.name in SKIPS_NON_REFERENCE


def _pts(packet: Packet) -> int:
    """Presentation time of a packet that the plan has taken, and which therefore has one."""
    assert packet.pts is not None
    return packet.pts

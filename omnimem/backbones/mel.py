"""Log-mel features of a stream.

They equal those of Whisper's feature extractor on the whole clip, except for clamped quiet values.

The extractor pads the clip by reflection at the start, with zeros at the end (by reflection where the processor does
not pad to full length), and clamps values 8 decades below the *maximum* of the clip. A stream does not know its
maximum. `floor="running"` uses the maximum so far, block by block, so the features do not depend on the chunk length; a
number fixes it, and the true maximum of the clip gives exactly the features of the extractor.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import WhisperFeatureExtractor

from omnimem.media import Chunk

SAMPLE_RATE = 16_000


class MelStream:
    """Log-mel frames of consecutive chunks.

    Parameters
    ----------
    extractor : WhisperFeatureExtractor
        Extractor of the checkpoint: filters, window length and hop.
    block_frames : int
        Frames per block: frames of a block are computed together and share the running maximum.
    floor : "running" or float
        Loudest log10 power, values more than 8 below it are raised to that limit: the maximum so far, or this number.
    reflect_end : bool
        Set for processors that do not pad clips: pad by reflection at the end, drop the frame of an incomplete hop.
    """

    def __init__(
        self,
        extractor: WhisperFeatureExtractor,
        block_frames: int,
        floor: float | str = "running",
        reflect_end: bool = False,
    ) -> None:
        self.filters = torch.from_numpy(np.asarray(extractor.mel_filters)).float().T
        self.window = torch.hann_window(extractor.n_fft)
        self.n_fft, self.hop = extractor.n_fft, extractor.hop_length
        self.block_frames = block_frames
        self.maximum = -torch.inf if floor == "running" else float(floor)
        self.running = floor == "running"
        self.reflect_end = reflect_end

    def frames(self, chunk: Chunk) -> Tensor:
        """Log-mel frames of a chunk.

        Parameters
        ----------
        chunk : Chunk
            16 kHz mono audio and the neighbouring samples that the analysis windows cover.

        Returns
        -------
        Tensor
            float32 ``[mel bins, F]``, one frame per hop of 160 samples, a partial last hop included (excluded with
            `reflect_end`).
        """
        assert chunk.audio is not None
        samples = len(chunk.audio)
        count = samples // self.hop if self.reflect_end else -(-samples // self.hop)
        if count == 0:
            return torch.empty(self.filters.shape[0], 0)
        signal = self._with_context(chunk, count)
        blocks = [self._block(signal, i, min(i + self.block_frames, count)) for i in range(0, count, self.block_frames)]
        return torch.cat(blocks, dim=1)

    def _with_context(self, chunk: Chunk, count: int) -> Tensor:
        """Samples of the chunk with half a window before the first and after the last frame centre."""
        half = self.n_fft // 2
        audio = torch.from_numpy(np.ascontiguousarray(chunk.audio))
        before = torch.from_numpy(np.ascontiguousarray(chunk.audio_before[-half:]))
        after = torch.from_numpy(np.ascontiguousarray(chunk.audio_after))
        if chunk.t0 == 0:
            # torch.stft(center=True) reflects the start of the clip. A clip shorter than the reflection is zero-padded
            # first, as the extractor does by padding to full length.
            start = F.pad(torch.cat((audio, after)), (0, half + 1))
            before = start[1 : half + 1].flip(0)
        signal = torch.cat((F.pad(before, (half - len(before), 0)), audio, after))
        if self.reflect_end and len(after) < half:
            signal = torch.cat((signal, signal[-half - 1 : -1].flip(0)))
        needed = (count - 1) * self.hop + self.n_fft
        return F.pad(signal, (0, max(0, needed - len(signal))))[:needed]

    def _block(self, signal: Tensor, start: int, stop: int) -> Tensor:
        """Frames `start` to `stop`; full blocks always have the same shape, so results do not depend on chunking."""
        samples = signal[start * self.hop : (stop - 1) * self.hop + self.n_fft]
        spectrum = torch.stft(samples, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        log_mel = (self.filters @ spectrum.abs().square()).clamp_min(1e-10).log10()
        if self.running:
            self.maximum = max(self.maximum, log_mel.max().item())
        return (log_mel.clamp_min(self.maximum - 8.0) + 4.0) / 4.0

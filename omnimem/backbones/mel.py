"""Log-mel features of a sound stream, block by block, equal to those of the whole clip.

The stock extractor sees a whole clip: reflected at the start, zeros behind the end (reflected there too where the
processor does not pad), and a floor 8 decades below the *loudest* point of the clip. A stream does not know its loudest
point. `floor="running"` uses the loudest point of the blocks so far, so a stream is encoded the same way however it is
cut into chunks, in training and at inference; a number fixes it (the clip's own maximum gives exactly the stock
features).
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
        Gives filters, window and hop of the checkpoint.
    block_frames : int
        Frames that share one running maximum and one fixed-size computation (the encoder's block).
    floor : "running" or float
        Reference of the floor: loudest log10 power so far, or this number.
    reflect_end : bool
        Whether the processor leaves clips at their length: reflected at the end too, and a started hop makes no frame.
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
        self.loudest = -torch.inf if floor == "running" else float(floor)
        self.running = floor == "running"
        self.reflect_end = reflect_end

    def frames(self, chunk: Chunk) -> Tensor:
        """Log-mel frames of a chunk.

        Parameters
        ----------
        chunk : Chunk
            16 kHz mono sound with the neighbouring samples that the analysis windows reach into.

        Returns
        -------
        Tensor
            float32 ``[mel bins, F]``, one frame for each started (with `reflect_end`: whole) hop of 160 samples.
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
        """The chunk's samples with half a window on either side of the first and last frame's centre."""
        half = self.n_fft // 2
        audio = torch.from_numpy(np.ascontiguousarray(chunk.audio))
        before = torch.from_numpy(np.ascontiguousarray(chunk.audio_before[-half:]))
        after = torch.from_numpy(np.ascontiguousarray(chunk.audio_after))
        if chunk.t0 == 0:
            # torch.stft(center=True) reflects the start of the clip; a clip shorter than that is zero-padded first,
            # as the stock extractor does by padding to its full length.
            ahead = F.pad(torch.cat((audio, after)), (0, half + 1))
            before = ahead[1 : half + 1].flip(0)
        signal = torch.cat((F.pad(before, (half - len(before), 0)), audio, after))
        if self.reflect_end and len(after) < half:
            signal = torch.cat((signal, signal[-half - 1 : -1].flip(0)))
        needed = (count - 1) * self.hop + self.n_fft
        return F.pad(signal, (0, max(0, needed - len(signal))))[:needed]

    def _block(self, signal: Tensor, start: int, stop: int) -> Tensor:
        """Frames `start` to `stop`; always the same shapes for whole blocks, so results do not depend on chunking."""
        piece = signal[start * self.hop : (stop - 1) * self.hop + self.n_fft]
        spectrum = torch.stft(piece, self.n_fft, self.hop, window=self.window, center=False, return_complex=True)
        log_mel = (self.filters @ spectrum.abs().square()).clamp_min(1e-10).log10()
        if self.running:
            self.loudest = max(self.loudest, log_mel.max().item())
        return (log_mel.clamp_min(self.loudest - 8.0) + 4.0) / 4.0

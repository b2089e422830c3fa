"""Which streams a step trains on: manifest rows in a seeded order that a resumed run continues exactly.

The order is a function of the seed and the step alone, so nothing about it needs saving: step s of a run is the same
rows on the same ranks whether or not the run was interrupted before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from data_prep.clip_info import OpenedRow, open_rows
from data_prep.decoded_clips.folder import PreparedRow, is_prepared, read_prepared, read_settings
from data_prep.decoded_clips.format import frame_stride
from data_prep.decoded_clips.shard_reader import ShardReader
from data_prep.manifest import Manifest, Row, read_manifest
from omnimem.backbones import Backbone, StreamEncoder
from omnimem.errors import OmniMemError
from omnimem.media import Chunk, MediaInfo
from omnimem.recipe import DataConfig, TrainConfig
from omnimem.stream_settings import StreamSettings

log = logging.getLogger("omnimem.train")


@dataclass(frozen=True)
class TokenizedQuestion:
    """A tokenised question: ids ``[Q]``, answer ids ``[A]``, second at which it is asked (None: the end)."""

    question: Tensor
    answer: Tensor
    time: float | None


@dataclass(frozen=True)
class Sample:
    """A row with its questions tokenised."""

    row: Row
    asked: tuple[TokenizedQuestion, ...]

    @property
    def targets(self) -> int:
        """Answer tokens the loss is taken over."""
        return sum(len(asked.answer) for asked in self.asked)


def load_rows(config: DataConfig, supports_audio: bool = True) -> Manifest:
    """Read the manifest and open every clip once, so that an unusable one is found before training begins.

    Clips are opened side by side, and only those that changed since an earlier start (`data_prep.clip_info`). Of a
    prepared folder no clip is opened: `omnimem data prepare` has read them to their end. For a model that does not
    hear (`supports_audio` false) a clip needs a picture.

    Raises
    ------
    OmniMemError
        As `read_manifest` and `read_prepared`; a clip that cannot be opened under ``on_bad_row=error``; no usable
        row; a folder that was prepared in another way.
    """
    opened: Sequence[Row | OmniMemError]
    if is_prepared(config.path):
        settings, _ = read_settings(config.path)
        wanted = {key: getattr(config, key) for key in ("fps", "short_side", "max_seconds")}
        frame_stride(settings, f"data.path={config.path}", audio=config.audio and supports_audio, **wanted)
        manifest = read_prepared(config.path, config.on_bad_row)
        opened = manifest.rows
    else:
        manifest = read_manifest(config.path, config.root, config.on_bad_row)
        opened = open_rows(manifest.rows, config.path)
    rows, problems = [], list(manifest.problems)
    for row, outcome in zip(manifest.rows, opened, strict=True):
        try:
            if isinstance(outcome, OmniMemError):
                raise outcome
            info = info_of(outcome)
            if not info.has_video and not (info.has_audio and row.audio and config.audio and supports_audio):
                missing = (
                    "neither picture nor (wanted) sound"
                    if supports_audio
                    else "no picture, and the model does not hear"
                )
                raise OmniMemError(f"{row.name}: {missing}")
            rows.append(outcome)
            for question in row.questions:
                if question.time is not None and info.duration is not None and question.time > info.duration:
                    log.warning(
                        "%s:%d: a question at %g s, but %s has %.1f s: it is asked at the end",
                        config.path, row.line, question.time, row.name, info.duration,
                    )  # fmt: skip
        except OmniMemError as error:
            if config.on_bad_row == "error":
                raise OmniMemError(f"{config.path}:{row.line}: {error} (data.on_bad_row=skip leaves it out)") from error
            problems.append(f"{config.path}:{row.line}: {error}")
            log.warning("row skipped: %s", problems[-1])
    if not rows:
        raise OmniMemError(f"{config.path}: no usable row: {problems[0]}")
    return Manifest(rows, problems)


def info_of(row: Row) -> MediaInfo:
    """The facts about the clip of a row of `load_rows`."""
    assert isinstance(row, OpenedRow | PreparedRow)
    return row.info


def open_row(row: Row, settings: StreamSettings, backbone: Backbone) -> tuple[Iterable[Chunk], StreamEncoder]:
    """Open a row's clip, or what was prepared of it, and begin a stream of it.

    Raises
    ------
    OmniMemError
        As `StreamSettings.open` and `ShardReader`.
    """
    settings = replace(settings, audio=settings.audio and row.audio)
    if not isinstance(row, PreparedRow):
        return settings.open(row.media, backbone, row.audio_path)
    settings.check(backbone)
    reader = ShardReader(
        row.media,
        name=row.name,
        fps=settings.fps,
        chunk_seconds=settings.chunk_seconds,
        audio=settings.audio and backbone.supports_audio,
        short_side=settings.short_side,
        max_seconds=settings.max_seconds,
    )
    return reader, settings.stream_encoder(reader.info, backbone)


def tokenise(row: Row, backbone: Backbone) -> Sample:
    """Question and answer ids of a row, earliest question first, those at the end last."""
    questions = sorted(row.questions, key=lambda q: math.inf if q.time is None else q.time)
    return Sample(
        row,
        tuple(
            TokenizedQuestion(backbone.question_ids(q.question)[0], backbone.answer_ids(q.answer)[0], q.time)
            for q in questions
        ),
    )


class Samples:
    """The rows of a run, each tokenised when it is needed.

    Tokenising takes tenths of a millisecond a row: 200,000 rows would delay the start of every process by a minute.

    Parameters
    ----------
    rows : list of Row
    backbone : Backbone
        Whose tokenizer is used.
    """

    def __init__(self, rows: list[Row], backbone: Backbone) -> None:
        self._rows = rows
        # A step needs its rows twice: to count its answer tokens, then to run them.
        self._tokenised = lru_cache(maxsize=4096)(lambda number: tokenise(rows[number], backbone))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Sample:
        return self._tokenised(number)


class Schedule:
    """Maps optimizer steps to samples.

    Parameters
    ----------
    samples : list of Sample, or Samples
        All usable rows.
    train : TrainConfig
        Batch size, accumulation, seed, and how long to train.
    shuffle : bool
        A new seeded permutation every epoch instead of the manifest's order.
    processes : int
        Ranks that share the batches of a step.
    """

    def __init__(self, samples: list[Sample] | Samples, train: TrainConfig, shuffle: bool, processes: int) -> None:
        self.samples = samples
        self.batch, self.accumulation, self.processes = (
            train.per_device_train_batch_size,
            train.gradient_accumulation_steps,
            processes,
        )
        self.seed, self.shuffle = train.seed, shuffle
        self.samples_per_step = self.batch * self.accumulation * processes
        steps = math.ceil(train.num_train_epochs * len(samples) / self.samples_per_step)
        self.steps = max(1, steps) if train.max_steps is None else train.max_steps
        # A step that ends one epoch and begins the next needs both permutations.
        self._order = lru_cache(maxsize=2)(self._permutation)

    def step(self, step: int, rank: int) -> list[list[Sample]]:
        """Batches that `rank` runs in a step: `accumulation` lists of `batch_size` samples."""
        first = step * self.samples_per_step + rank * self.batch * self.accumulation
        chosen = [self._sample(first + i) for i in range(self.batch * self.accumulation)]
        return [chosen[i : i + self.batch] for i in range(0, len(chosen), self.batch)]

    def targets(self, step: int) -> int:
        """Answer tokens of all ranks and batches of a step: what its loss is averaged over."""
        first = step * self.samples_per_step
        return sum(self._sample(first + i).targets for i in range(self.samples_per_step))

    def epoch(self, step: int) -> float:
        """Passes over the data completed before a step."""
        return step * self.samples_per_step / len(self.samples)

    def _sample(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.samples))
        return self.samples[int(self._order(epoch)[place]) if self.shuffle else place]

    def _permutation(self, epoch: int) -> Tensor:
        """Row numbers in the order of an epoch: int64 ``[rows]``."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(len(self.samples), generator=generator)

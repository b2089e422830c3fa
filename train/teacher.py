"""Answers of the teacher kept on disk: the base model's never change, so they are given once.

    train.py recipe=… distill.weight=1 distill.cache_dir=teacher/

One file a question holds the logits of its answer. Its name is a hash of all they depend on: weights, clip, how it is
read, question, answer and time.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnimem.backbones import TINY
from omnimem.backbones.adapter import BASE_FOLDER
from omnimem.files import atomic_file, file_digest
from omnimem.recipe import Recipe
from train.data import Sample, TokenizedQuestion

LOGITS = "logits"


class TeacherAnswers:
    """A folder of answers.

    Parameters
    ----------
    folder : Path
        Where they are; made when the first is written.
    settings : dict
        Everything the answers depend on beside clip, question and answer.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.settings = folder, settings
        self._digests: dict[Path, str] = {}

    @classmethod
    def of(cls, recipe: Recipe, output_dir: Path) -> TeacherAnswers:
        """Those of a recipe's base model, whose weights are known by their size and time of change."""
        path = output_dir / BASE_FOLDER if recipe.model.name_or_path == TINY else Path(recipe.model.name_or_path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if recipe.model.name_or_path == TINY:
            weights = [file_digest(file) for file in files]
        else:
            weights = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        model = {**asdict(recipe.model), "weights": weights}
        data = {
            key: value
            for key, value in asdict(recipe.data).items()
            if key not in ("path", "root", "shuffle", "prefetch_chunks", "on_bad_row")
        }
        assert recipe.distill.cache_dir is not None
        return cls(Path(recipe.distill.cache_dir), {"model": model, "data": data})

    def load(self, samples: list[Sample]) -> dict[TokenizedQuestion, Tensor] | None:
        """Logits ``[A, vocabulary]`` of every question of a batch; None if one of them is not known."""
        found = {}
        for sample in samples:
            for asked in sample.asked:
                file = self._file(sample, asked)
                try:
                    found[asked] = load_file(file)[LOGITS]
                except (OSError, SafetensorError, KeyError):
                    return None
        return found

    def save(self, samples: list[Sample], due: list[TokenizedQuestion | None], logits: Tensor) -> None:
        """Keep the answers just given, one after the other in `logits` ``[M, vocabulary]``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lengths = [len(asked.answer) for asked in due if asked is not None]
        parts = iter(logits.split(lengths))
        for sample, asked in zip(samples, due, strict=True):
            if asked is not None:
                with atomic_file(self._file(sample, asked)) as temporary:
                    save_file({LOGITS: next(parts).contiguous()}, temporary)

    def _file(self, sample: Sample, asked: TokenizedQuestion) -> Path:
        row = sample.row
        known = {
            **self.settings,
            "media": self._digest(row.media),
            "audio_path": None if row.audio_path is None else self._digest(row.audio_path),
            "audio": row.audio,
            "question": asked.question.tolist(),
            "answer": asked.answer.tolist(),
            "time": asked.time,
        }
        return self.folder / f"{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}.safetensors"

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = file_digest(file)
        return self._digests[file]

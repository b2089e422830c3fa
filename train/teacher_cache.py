"""Logits of the teacher on disk: the base model does not change, so they are computed once.

    accelerate launch train.py recipe=quickstart distill.weight=1 distill.cache_dir=teacher/

One file per question holds the logits of its answer. The file name is a hash of everything they depend on: weights,
clip, how the clip is read, question, answer and time.
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
from train.question_schedule import DueQuestions
from train.samples import Sample, TokenizedQuestion

LOGITS = "logits"

NOT_IN_KEY = ("path", "root", "shuffle", "prefetch_chunks", "on_bad_row")
"""Keys of `data` that the logits do not depend on; the clip itself is identified by its content."""


class TeacherCache:
    """A folder of logits.

    Parameters
    ----------
    folder : Path
        Created when the first file is written.
    settings : dict
        Everything that the logits depend on besides clip, question and answer.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder, self.settings = folder, settings
        self._digests: dict[Path, str] = {}

    @classmethod
    def of(cls, recipe: Recipe, output_dir: Path) -> TeacherCache:
        """Cache of a recipe's base model.

        The weights are identified by name, size and modification time of the files of a local folder, by the content of
        the files of the tiny model, and by the name alone for a model on the Hugging Face hub.
        """
        tiny = recipe.model.name_or_path == TINY
        path = output_dir / BASE_FOLDER if tiny else Path(recipe.model.name_or_path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
        if tiny:
            weights = [file_digest(file) for file in files]
        else:
            weights = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        model = {**asdict(recipe.model), "weights": weights}
        data = {key: value for key, value in asdict(recipe.data).items() if key not in NOT_IN_KEY}
        assert recipe.distill.cache_dir is not None
        return cls(Path(recipe.distill.cache_dir), {"model": model, "data": data})

    def load(self, samples: list[Sample]) -> dict[TokenizedQuestion, Tensor] | None:
        """Logits ``[A, V]`` of every question of a batch; None if those of one question are missing or damaged."""
        found = {}
        for sample in samples:
            for question in sample.questions:
                try:
                    found[question] = load_file(self._file(sample, question))[LOGITS]
                except (OSError, SafetensorError, KeyError):
                    return None
        return found

    def save(self, samples: list[Sample], due: DueQuestions, logits: Tensor) -> None:
        """Store the logits ``[M, V]`` of the answers to the due questions, concatenated over the batch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lengths = [len(question.answer) for question in due if question is not None]
        parts = iter(logits.split(lengths))
        for sample, question in zip(samples, due, strict=True):
            if question is not None:
                with atomic_file(self._file(sample, question)) as temporary:
                    save_file({LOGITS: next(parts).contiguous()}, temporary)

    def _file(self, sample: Sample, question: TokenizedQuestion) -> Path:
        row = sample.row
        key = {
            **self.settings,
            "media": self._digest(row.media),
            "audio_path": None if row.audio_path is None else self._digest(row.audio_path),
            "audio": row.audio,
            "question": question.question.tolist(),
            "answer": question.answer.tolist(),
            "time": question.time,
        }
        return self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = file_digest(file)
        return self._digests[file]

"""Convert data sets of other projects to a manifest: each row is read, checked and merged; bad rows are refused.

    omnimem data convert train.json --to train.jsonl --root data

A data set made for another trainer should be one command away from this one, and a row whose text and media disagree
(a placeholder without media, a path outside the data root) must not be trained on.

One module per format: `video_salmonn2`, `sharegpt` (LLaMA-Factory), `swift`, `table` (CSV); `huggingface` reads data
sets whose columns follow one of these. The rejected answer of a preference pair is copied to the manifest, but nothing
trains on it: training is supervised fine-tuning on answers, without a preference objective such as DPO.
"""

from .report import Report
from .run import convert
from .sources import FORMATS

__all__ = ["FORMATS", "Report", "convert"]

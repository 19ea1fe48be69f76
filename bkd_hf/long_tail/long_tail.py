"""The long-tail metrics as an `evaluate` metric: `evaluate.load("<folder of this file>")`, no network needed.

It needs nothing of bkd_hf but the file `metrics.py` beside it, so that it works as a Space too.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from .metrics import FEW_SHOT_THRESHOLD, MANY_SHOT_THRESHOLD, long_tail_metrics

_DESCRIPTION = """\
Accuracy on long-tailed data: overall, balanced, of many-, medium- and few-shot classes (by *training* images), of the
worst class, per class, and more.
"""

_KWARGS_DESCRIPTION = """\
Args:
    predictions: N×C logits.
    references: N class numbers.
    class_counts: C numbers of training images.
    many_shot_threshold: Classes with more training images are many-shot (default 100).
    few_shot_threshold: Classes with fewer training images are few-shot (default 20).

Returns:
    A dictionary of fractions.

Examples:
    >>> import evaluate
    >>> from pathlib import Path
    >>> import bkd_hf
    >>> metric = evaluate.load(str(Path(bkd_hf.__file__).parent / "long_tail"))
    >>> results = metric.compute(predictions=[[2.0, 0.0], [1.0, 0.0]], references=[0, 1], class_counts=[500, 5])
    >>> results["many_shot_accuracy"], results["few_shot_accuracy"]
    (1.0, 0.0)
"""

_CITATION = """\
@inproceedings{liu2019large,
  title     = {Large-Scale Long-Tailed Recognition in an Open World},
  author    = {Liu, Ziwei and Miao, Zhongqi and Zhan, Xiaohang and Wang, Jiayun and Gong, Boqing and Yu, Stella X.},
  booktitle = {CVPR},
  year      = {2019}
}
"""


class LongTail(evaluate.Metric):
    """A thin shell around `long_tail_metrics`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        class_counts: list[int],
        many_shot_threshold: int = MANY_SHOT_THRESHOLD,
        few_shot_threshold: int = FEW_SHOT_THRESHOLD,
    ) -> dict[str, Any]:
        return long_tail_metrics(predictions, references, class_counts, many_shot_threshold, few_shot_threshold)

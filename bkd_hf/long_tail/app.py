"""The Space's page: computes the metric from typed-in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluate


def compute(predictions: str, references: str, class_counts: str) -> dict[str, Any]:
    """Return the metrics; all arguments are JSON lists (see `long_tail.py`)."""
    metric = evaluate.load(str(Path(__file__).with_name("long_tail.py")))
    return metric.compute(
        predictions=json.loads(predictions), references=json.loads(references), class_counts=json.loads(class_counts)
    )


if __name__ == "__main__":
    import gradio as gr

    page = gr.Interface(
        fn=compute,
        inputs=[
            gr.Textbox("[[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]", label="predictions: the logits of each image"),
            gr.Textbox("[0, 1, 1]", label="references: the class of each image"),
            gr.Textbox("[500, 5]", label="class_counts: training images of each class"),
        ],
        outputs=gr.JSON(),
        title="Long-tail metrics",
        description="Accuracy of many-, medium- and few-shot classes (by training images), of the worst class, …",
    )
    page.launch()

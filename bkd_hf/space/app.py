"""A page that classifies an image, and shows for each prediction how far to trust it.

It only needs `model/` and `classes.json` beside it; `python app.py` runs it locally.
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL, FACTS = HERE / "model", json.loads((HERE / "classes.json").read_text(encoding="utf-8"))
ONNX = MODEL / "model.onnx"

try:
    import gradio as gr

    if ONNX.exists():
        import onnxruntime
    else:
        import torch
    import numpy as np
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed: pip install gradio -r {HERE / 'requirements.txt'}")

HINT = '<p class="hint">Choose a picture, or take one: the five most likely classes appear here.</p>'
UNREADABLE = '<p class="hint" role="alert">This file is no picture that can be read: try a JPEG or PNG.</p>'
CSS = """
.page {max-width: 60rem; margin: 0 auto !important}
.answers {list-style: none; margin: 0; padding: 0}
.answers li {padding: .7rem .1rem; border-bottom: 1px solid var(--border-color-primary)}
.answers li:last-child {border: 0}
.answers .line {display: flex; flex-wrap: wrap; align-items: baseline; gap: .2rem .6rem}
.answers b {overflow-wrap: anywhere}
.answers li:first-child b {font-size: 1.3em}
.answers .share {margin-left: auto; font-variant-numeric: tabular-nums}
.answers .bar {height: .5rem; margin: .35rem 0; border-radius: 1rem; background: var(--border-color-primary)}
.answers .bar i {display: block; height: 100%; min-width: 2px; border-radius: 1rem; background: #0072b2}
.answers .rare .bar i {background: #d55e00}
.answers .badge {padding: .05rem .5rem; border-radius: 1rem; font-size: .8em; background: #d55e00; color: white}
.answers small, .hint {opacity: .75}
.hint[role=alert] {opacity: 1; color: #d55e00; font-weight: 600}
.page .html-container {padding: 0 !important}
"""


class Picture(gr.Image):
    """An image; `UNREADABLE` for a file that is not an image."""

    is_template = True  # displayed like its parent

    def preprocess(self, payload: Any) -> Any:
        try:
            return super().preprocess(payload)
        except (OSError, ValueError, SyntaxError, gr.Error, Image.DecompressionBombError):
            return UNREADABLE


def load() -> Callable[[Image.Image], np.ndarray]:
    """Return a function from an image to C logits."""
    pixels = AutoImageProcessor.from_pretrained(MODEL, backend="pil")
    if ONNX.exists():
        session = onnxruntime.InferenceSession(ONNX)
        return lambda image: session.run(None, {"pixel_values": pixels(image, return_tensors="np").pixel_values})[0][0]
    # The trusted code is in model/, too.
    model = AutoModelForImageClassification.from_pretrained(MODEL, trust_remote_code=True).eval()

    def logits(image: Image.Image) -> np.ndarray:
        with torch.inference_mode():
            return model(**pixels(image, return_tensors="pt")).logits[0].numpy()

    return logits


def describe(known: dict[str, Any], probability: float) -> str:
    """Return a prediction as HTML, with facts about its class."""
    trained, tested = known["training_images"], known["test_images"]
    is_rare = trained < FACTS["few_shot_threshold"]
    about = f"{trained:,} training image{'' if trained == 1 else 's'} · "
    low, high = known["interval"]
    about += (
        f"test accuracy {known['accuracy']:.0%} ({low:.0%} to {high:.0%}; {tested:,} images)"
        if tested
        else "not tested"
    )
    badge = '<span class="badge">rare class: trust less</span>' if is_rare else ""
    return (
        f'<li class="{"rare" if is_rare else ""}"><div class="line"><b>{html.escape(known["name"])}</b>{badge}'
        f'<span class="share">{probability:.1%}</span></div>'
        f'<div class="bar"><i style="width: {probability:.1%}"></i></div><small>{about}</small></li>'
    )


def answer(image: Image.Image | str | None) -> str:
    """Return the five most likely classes of an image as HTML, or why there are none."""
    if image is None or isinstance(image, str):
        return image or HINT
    scores = LOGITS(image.convert("RGB")).astype(np.float64)
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities, kind="stable")[:5]
    return f'<ol class="answers">{"".join(describe(FACTS["classes"][i], probabilities[i]) for i in best)}</ol>'


LOGITS = load()
with gr.Blocks(title=FACTS["title"], analytics_enabled=False) as page, gr.Column(elem_classes="page"):
    gr.HTML(f"<h1>{html.escape(FACTS['title'])}</h1><p>{html.escape(FACTS['about'])}</p>", padding=False)
    with gr.Row():
        with gr.Column(min_width=280):
            picture = Picture(type="pil", label="Picture", sources=["upload", "webcam"], height=300, buttons=[])
        with gr.Column(min_width=280):
            answers = gr.HTML(HINT, elem_id="answers", padding=False)
    if examples := sorted(map(str, (HERE / "examples").glob("*.png"))):
        gr.Examples(examples, picture, label="Pictures of the test set", examples_per_page=50)
    picture.change(answer, picture, answers, show_progress="minimal")

if __name__ == "__main__":
    fonts = ["system-ui", "sans-serif"]  # local fonts, nothing is downloaded
    theme = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["monospace"])
    page.launch(css=CSS, theme=theme, footer_links=["gradio"])

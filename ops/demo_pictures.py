"""The demo's jobs with pictures: three drawings, each with many short questions, and the model that looks at them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from worker import platform


@dataclass(frozen=True, slots=True)
class PictureGroup:
    """Jobs that share their beginning: a picture."""

    name: str
    image: Image.Image
    questions: tuple[str, ...]
    max_tokens: int = 24

    def messages(self, question: str) -> list[dict[str, Any]]:
        """Return the conversation that ends with the question."""
        shown = {"type": "image_url", "image_url": {"url": self.image}}
        return [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]


def groups() -> tuple[PictureGroup, ...]:
    """Draw the pictures and return the jobs."""
    return (
        PictureGroup("chart", _chart(), (
            "How many bars does the chart have?", "Which bar is the highest?", "What colour is the lowest bar?",
            "Is there a bar higher than half of the picture?", "Which two bars are equal?", "Describe the chart.",
            "What is the colour of the background?", "Does the chart have a legend?",
        )),
        PictureGroup("signal", _signal(), (
            "What does the picture show?", "Which of the three lights is on?", "May one drive now?",
            "What colour is the housing?", "How many lights are there?", "Which light is at the top?",
            "Is anything written on it?", "Describe the picture in one sentence.",
        )),
        PictureGroup("flag", _flag(), (
            "How many stripes does the flag have?", "What colour is the middle stripe?", "Which country is it from?",
            "Are the stripes horizontal or vertical?", "Is there a star on it?", "What colour is on the left?",
            "Are all stripes equally wide?", "Describe the flag.",
        )),
    )  # fmt: skip


def write_tiny_model(directory: Path) -> str:
    """Write a random Qwen2-VL, a few hundred kilobytes: it sees pictures, and its words mean nothing."""
    platform.prepare()  # before anything imports MLX
    import mlx.core as mx

    from tests.models import tiny_tokenizer
    from tests.vision_models import save_tiny_vision

    path = save_tiny_vision(directory / "tiny-random-qwen2-vl")
    file, head = str(path / "model.safetensors"), "language_model.lm_head.weight"
    weights: Any = mx.load(file)
    words = tiny_tokenizer().convert_ids_to_tokens(list(range(weights[head].shape[0])))
    shown = mx.array([bool(word) and word.isascii() and word.isprintable() for word in words])
    weights[head] = mx.where(shown[:, None], weights[head], 0)  # or a terminal would show bytes that are no text
    mx.eval(weights)
    mx.save_safetensors(file, weights, {"format": "mlx"})
    return str(path)


def _chart() -> Image.Image:
    image = Image.new("RGB", (224, 168), "white")
    pen = ImageDraw.Draw(image)
    for number, (height, colour) in enumerate([(60, "red"), (120, "green"), (60, "blue"), (30, "orange")]):
        pen.rectangle((20 + 50 * number, 150 - height, 55 + 50 * number, 150), fill=colour)
    pen.line((10, 150, 214, 150), fill="black", width=2)
    return image


def _signal() -> Image.Image:
    image = Image.new("RGB", (112, 224), "lightblue")
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((26, 12, 86, 200), 12, fill="black")
    for number, colour in enumerate(("darkred", "olive", "lime")):
        pen.ellipse((36, 22 + 58 * number, 76, 62 + 58 * number), fill=colour)
    return image


def _flag() -> Image.Image:
    image = Image.new("RGB", (210, 140))
    pen = ImageDraw.Draw(image)
    for number, colour in enumerate(("navy", "white", "crimson")):
        pen.rectangle((70 * number, 0, 70 * number + 69, 139), fill=colour)
    return image

"""Make a small corpus with pictures: `python examples/build_pictures.py FOLDER`. Needs `pip install 'sftdata[vision]'`.

FOLDER/shapes.jsonl asks for the shapes in FOLDER/pictures; FOLDER/processor is tokenizer and processor of a model of
the family of Qwen2.5-VL, with the marks that this family puts around a picture.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer

MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
PROCESSOR = {
    "processor_class": "Qwen2_5_VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES, COLOURS = ("circle", "square", "bar"), ("teal", "coral", "gold", "navy")
PICTURES = 12


def draw(shape: str, colour: str, width: int, height: int) -> Image.Image:
    """Return a picture of one shape in its middle."""
    picture = Image.new("RGB", (width, height), "white")
    side = min(width, height) // 3
    across = side * (2 if shape == "bar" else 1)
    box = (width // 2 - across, height // 2 - side, width // 2 + across, height // 2 + side)
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)(box, fill=colour)
    return picture


def main(folder: Path) -> None:
    """Write tokenizer, processor, pictures and rows."""
    processor = folder / "processor"
    shutil.copytree(Path(__file__).parent / "tokenizer", processor)
    tokenizer = Tokenizer.from_file(str(processor / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(processor / "tokenizer.json"))
    (processor / "preprocessor_config.json").write_text(json.dumps(PROCESSOR, indent=2), encoding="utf-8")
    (processor / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")

    (folder / "pictures").mkdir()
    numbers, rows = random.Random(1), []
    for number in range(PICTURES):
        shape, colour = SHAPES[number % 3], COLOURS[number % 4]
        name = f"pictures/{number:02}.png"
        draw(shape, colour, numbers.randrange(160, 400), numbers.randrange(120, 300)).save(folder / name)
        messages = [
            {"role": "user", "content": "<image>Which shape is it?"},
            {"role": "assistant", "content": f"A {shape}, in {colour}."},
        ]
        rows.append({"messages": messages, "images": [name]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "shapes.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

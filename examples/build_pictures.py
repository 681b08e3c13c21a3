"""Make a small corpus with pictures: `python examples/build_pictures.py FOLDER`. Needs `pip install 'sftdata[vision]'`.

FOLDER/shapes.jsonl asks for the shapes in FOLDER/pictures; FOLDER/processor is tokenizer and processor of a model of
the family of Qwen2.5-VL, with the marks that this family puts around a picture; FOLDER/tiny-model is the config of a
model of that family that a CPU can train.
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
    "max_pixels": 25088,
}
MODEL = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "vision_config": {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 64,
        "patch_size": 14,
        "fullatt_block_indexes": [0, 1],
    },
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
    ids = {mark: tokenizer.token_to_id(mark) for mark in MARKS}
    config = MODEL | {"vision_start_token_id": ids[MARKS[0]], "image_token_id": ids[MARKS[1]]}
    config["text_config"] = MODEL["text_config"] | {"vocab_size": tokenizer.get_vocab_size()}
    (folder / "tiny-model").mkdir()
    (folder / "tiny-model/config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
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

"""The rules give the ids of the families' own processors, size by size: 160 sizes a family here, 10,000 in the torture tests."""

from __future__ import annotations

import random
import sys
from functools import lru_cache
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from tokenizers import Tokenizer

from sftdata.errors import RowError
from sftdata.pictures import families, layouts
from sftdata.pictures.families import FAMILIES, PictureProcessor, read_processor
from sftdata.pictures.gate import lay_out
from tests.oracles.pictures import CLASSES, Own, OwnLlama4
from tests.processors import OTHERS, PROCESSORS, write_processor

EDGES = [
    (1, 1), (1, 3), (3, 1), (3, 3), (1, 40), (40, 1), (28, 28), (27, 29), (56, 57), (336, 336), (337, 335), (364, 364),
    (365, 363), (384, 385), (448, 448), (427, 640), (640, 427), (768, 256), (1000, 250), (1300, 20),
    (300, 389), (300, 1064), (356, 533), (398, 596),
]  # fmt: skip


def odd_sizes(number: int, seed: str, *, aspect: float = 190) -> list[tuple[int, int]]:
    """Return heights and widths from 1 to 1,300, of every aspect up to a bound."""
    draw = random.Random(seed)
    found = [size for size in EDGES if max(size) / min(size) <= aspect]
    while len(found) < number:
        height, width = (round(2 ** draw.uniform(0, 10.35)) for _ in range(2))
        if max(height, width) / min(height, width) <= aspect:
            found.append((height, width))
    return found


class Case:
    """A processor, read by the product and made by the oracle, with their tokenizer."""

    def __init__(self, name: str, folder: Path) -> None:
        write_processor(folder, name)
        self.processor = read_processor(folder)
        self.engine = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.own = Own(OTHERS.get(name, (name,))[0], folder)
        self.text = f"Who?\n {self.processor.marker} \n\n  Say\n"

    def differs(self, height: int, width: int) -> bool:
        ours = lay_out(self.processor, self.engine, self.text, height, width)
        theirs = self.own.of_sizes(self.text, [(height, width)])
        return theirs is not None if isinstance(ours, str) else ours != theirs


def differing(case: Case, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [size for size in sizes if case.differs(*size)]


def bound(name: str) -> float:
    """LLaVA's processor makes a picture of 336 pixels by 336 times the aspect, whose middle it then takes."""
    return 12 if name.startswith("llava") else 190


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "llama4"])
def test_160_sizes_have_the_ids_of_the_family_s_own_processor(name: str, tmp_path: Path) -> None:
    sizes = odd_sizes(160, name, aspect=bound(name))
    assert len(sizes) == 160
    assert not differing(Case(name, tmp_path), sizes)


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.startswith("llama4")])
def test_other_settings_of_a_family_have_its_ids_too(name: str, tmp_path: Path) -> None:
    assert not differing(Case(name, tmp_path), odd_sizes(32, name, aspect=bound(name)))


@pytest.mark.parametrize("name", ["llama4", "llama4, largest"])
def test_llama_4_chooses_the_canvas_that_torch_chooses(name: str, tmp_path: Path) -> None:
    processor, own = read_processor(write_processor(tmp_path, name)), OwnLlama4(tmp_path)
    sizes = odd_sizes(160, name) + [
        (336 * rows, 336 * columns) for rows in range(1, 6) for columns in range(1, 6)
    ]
    for height, width in sizes:
        assert processor.layout(height, width).expanded(processor.image_token) == own.replacement(
            height, width
        ), (height, width)


@pytest.mark.torture
@pytest.mark.parametrize("name", [name for name in [*PROCESSORS, *OTHERS] if not name.startswith("llama4")])
def test_10_000_sizes_have_the_ids_of_the_family_s_own_processor(name: str, tmp_path: Path) -> None:
    assert not differing(Case(name, tmp_path), odd_sizes(10_000, f"{name}, long", aspect=bound(name)))


@pytest.mark.torture
@pytest.mark.parametrize("name", ["llama4", "llama4, largest"])
def test_llama_4_chooses_the_canvas_that_torch_chooses_for_10_000_sizes(name: str, tmp_path: Path) -> None:
    processor, own = read_processor(write_processor(tmp_path, name)), OwnLlama4(tmp_path)
    for height, width in odd_sizes(10_000, f"{name}, long"):
        assert processor.layout(height, width).expanded(processor.image_token) == own.replacement(
            height, width
        ), (height, width)


def test_every_family_of_the_table_is_held_against_transformers() -> None:
    assert {family.name for family in FAMILIES} == {*CLASSES, "llama4"} - {"mistral3"}


# ----------------------------------------------------------------------------------------- each rule can be wrong

MUTANTS = [
    ("qwen2.5-vl, small", "round(height / factor)", "math.floor(height / factor)"),
    ("qwen3-vl", "math.ceil(height * beta / factor)", "math.floor(height * beta / factor)"),
    ("llava-next", "(wide / width), 7))) // 2 * 2", "(wide / width), 7)))"),
    ("idefics3, odd", "math.ceil(int(width / aspect) / tile)", "math.ceil(height / tile)"),
    ("idefics3, odd", "height += even and height % 2", "pass"),
    ("internvl", "if distance < nearest", "if distance <= nearest"),
    ("pixtral, small", "math.floor(height / ratio)", "round(height / ratio)"),
    ("gemma4", "math.floor(factor * height / side)", "math.ceil(factor * height / side)"),
]


@pytest.mark.parametrize(
    ("name", "text", "instead"), MUTANTS, ids=[f"{name}: {text}" for name, text, _ in MUTANTS]
)
def test_a_rule_that_rounds_elsewhere_is_found(
    name: str, text: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers' own count of Idefics3's tiles, which takes the height before it was resized."""
    source = Path(layouts.__file__).read_text(encoding="utf-8")
    assert text in source
    mutant = ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", mutant)
    exec(compile(source.replace(text, instead), "layouts", "exec", dont_inherit=True), vars(mutant))
    case = Case(name, tmp_path)
    for key in vars(layouts).keys() & vars(families).keys():
        if isinstance(getattr(layouts, key), FunctionType | type):
            monkeypatch.setattr(families, key, getattr(mutant, key))
    fresh(monkeypatch)
    assert differing(case, odd_sizes(160, name, aspect=bound(name)))


def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the rules and layouts of other tests for this one."""
    for name in ("_rule", "_layout"):
        monkeypatch.setattr(families, name, lru_cache(getattr(families, name).__wrapped__))


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(("name", "size"), [("qwen2.5-vl", (1, 201)), ("pixtral", (1, 1100))])
def test_a_size_that_the_processor_cannot_take_is_refused_by_name(
    name: str, size: tuple[int, int], tmp_path: Path
) -> None:
    case = Case(name, tmp_path)
    assert case.own.of_sizes(case.text, [size]) is None
    with pytest.raises(RowError, match=rf"{size[1]}x{size[0]} pixels") as caught:
        case.processor.layout(*size)
    assert caught.value.fault.code == "image-aspect"


def test_layouts_are_remembered_and_processors_hash() -> None:
    one = PictureProcessor(
        "llava",
        '{"image_processor_type": "CLIPImageProcessor", "crop_size": 28}',
        '{"patch_size": 14}',
        (("image_token", "@"),),
    )
    assert one.layout(3, 4) is one.layout(3, 4)
    assert one.layout(3, 4).expanded("@") == "@@@@"

"""The gate refuses a rule that differs from the family's own processor; JSON that no rule follows is refused by name."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import pytest

from sftdata.errors import UsageError
from sftdata.pictures import families, gate
from sftdata.pictures.families import FAMILIES, REFUSED, read_processor
from sftdata.pictures.gate import SIZES, require_parity
from sftdata.pictures.layouts import Layout, fixed
from tests.processors import PROCESSORS, write_processor
from tests.unit.test_pictures_layouts import fresh


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFTDATA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "pixtral"])
def test_an_equal_family_passes_and_is_asked_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_processor(tmp_path / "model", name)
    processor = read_processor(folder)
    require_parity(processor, folder, sizes=[(431, 77)])
    monkeypatch.setattr(gate, "_ask", lambda request: pytest.fail("asked again"))
    require_parity(processor, folder, sizes=[(431, 77)])
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        require_parity(processor, folder, sizes=[(431, 78)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROCESSORS if name != "llama4"])
def test_every_family_passes_where_torch_is_hidden(name: str, tmp_path: Path) -> None:
    folder = write_processor(tmp_path / "model", name)
    require_parity(read_processor(folder), folder)


def test_a_family_that_differs_is_refused_with_the_size_and_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_processor(tmp_path / "model", "llava")
    processor = read_processor(folder)
    wrong = next(family for family in FAMILIES if family.name == "llava")
    changed = families.Family(
        wrong.name, wrong.processor, wrong.image_processors, wrong.tokens, lambda given: fixed("<image>", 575)
    )
    monkeypatch.setitem(families._BY_NAME, "llava", changed)
    fresh(monkeypatch)
    monkeypatch.setattr(gate, "SIZES", SIZES[:2])
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"llava are laid out otherwise .* 1x1 pixels: \d+ ids there, \d+ ids here"
        ):
            require_parity(processor, folder)


def test_what_one_refuses_and_the_other_takes_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_processor(tmp_path / "model", "qwen2.5-vl")
    monkeypatch.setattr(gate, "_ask", lambda request: ["ValueError: no"] * len(request["sizes"]))
    with pytest.raises(UsageError, match=r"1x1 pixels: refused \(ValueError: no\) there"):
        require_parity(read_processor(folder), folder)


def test_a_family_that_cannot_be_compared_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_processor(tmp_path / "model", "llama4")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UsageError, match="llama4 needs torchvision"):
        require_parity(read_processor(folder), folder)


def test_a_processor_that_does_not_load_is_one_line(tmp_path: Path) -> None:
    folder = write_processor(tmp_path / "model", "qwen2.5-vl")
    processor = read_processor(folder)
    (folder / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match="qwen2.5-vl does not run here") as caught:
        require_parity(processor, folder)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_processor(tmp_path / "model", "qwen2.5-vl")
    path = folder / "tokenizer.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace("<|image_pad|>", "<|other_pad|>"), encoding="utf-8"
    )
    monkeypatch.setattr(gate, "_ask", lambda request: [[1]] * len(request["sizes"]))
    with pytest.raises(UsageError, match=r"no token '<\|image_pad\|>'"):
        require_parity(read_processor(folder), folder)


def test_the_sizes_of_the_gate_are_many_and_cheap() -> None:
    assert len(set(SIZES)) == len(SIZES) >= 30
    assert all(
        height * width < 1.5e6 and max(height, width) / min(height, width) < 8 for height, width in SIZES
    )


# ----------------------------------------------------------------------------------------------------- the JSON


@pytest.mark.parametrize("name", PROCESSORS)
def test_each_family_is_recognised_by_its_json(name: str, tmp_path: Path) -> None:
    processor = read_processor(write_processor(tmp_path, name))
    assert processor.family == {"mistral3": "pixtral"}.get(name, name)
    assert isinstance(processor.layout(427, 640), Layout)
    again = pickle.loads(pickle.dumps(processor))
    assert again == processor
    assert again.sha256 == processor.sha256


def test_the_nested_form_is_read_and_outranks_the_other_file(tmp_path: Path) -> None:
    flat = read_processor(write_processor(tmp_path / "flat", "qwen2.5-vl"))
    nested = write_processor(tmp_path / "nested", "qwen2.5-vl")
    before = json.loads((nested / "preprocessor_config.json").read_text())
    whole = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": before}
    (nested / "processor_config.json").write_text(json.dumps(whole))
    (nested / "preprocessor_config.json").write_text(json.dumps(before | {"patch_size": 7}))
    assert read_processor(nested) == flat


def test_bounds_of_the_area_are_part_of_the_identity(tmp_path: Path) -> None:
    folder = write_processor(tmp_path, "qwen2.5-vl")
    plain, small = read_processor(folder), read_processor(folder, max_pixels=200_704)
    assert plain.sha256 != small.sha256
    assert plain.layout(1000, 1000).runs == (1296,)
    assert small.layout(1000, 1000).runs == (256,)
    assert json.loads(small.image_settings)["size"] == {"shortest_edge": 3136, "longest_edge": 200_704}
    assert read_processor(folder, min_pixels=401_408).layout(10, 10).runs == (529,)


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("qwen2.5-vl", {"max_pixels": 700}, "one token is 784 pixels"),
        ("qwen2.5-vl", {"max_pixels": 5000, "min_pixels": 6000}, "min_pixels is 6,000"),
        ("llava", {"max_pixels": 700}, "max_pixels has no effect"),
        ("gemma3", {"min_pixels": 700}, "min_pixels has no effect"),
    ],
)
def test_bounds_that_cannot_act_are_refused(
    name: str, options: dict[str, int], found: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=found):
        read_processor(write_processor(tmp_path, name), **options)


@pytest.mark.parametrize(
    ("name", "file", "change", "found"),
    [
        ("qwen2.5-vl", "preprocessor_config.json", {"do_resize": False}, "do_resize is false"),
        ("qwen2.5-vl", "preprocessor_config.json", {"patch_size": "14"}, "patch_size is '14'"),
        ("qwen3-vl", "preprocessor_config.json", {"size": {"height": 3}}, "shortest_edge and longest_edge"),
        ("qwen3-vl", "preprocessor_config.json", {"size": [3, 4]}, r"size is \[3, 4\]; expected sizes in pixels"),
        ("llava", "processor_config.json", {"patch_size": None}, "patch_size is missing in processor_config.json"),
        ("llava", "processor_config.json", {"vision_feature_select_strategy": "all"}, "expected default or full"),
        ("llava", "preprocessor_config.json", {"do_center_crop": False}, "one with height and width"),
        ("llava", "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "ViTImageProcessor"),
        ("llava-next", "preprocessor_config.json", {"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ("idefics3", "preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "longest_edge"),
        ("idefics3", "preprocessor_config.json", {"do_image_splitting": 1}, "expected true or false"),
        ("internvl", "preprocessor_config.json", {"size": {"shortest_edge": 448}}, "height and width"),
        ("gemma3", "preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan is true, which"),
        ("llama4", "processor_config.json", {"pixel_shuffle_ratio": 2}, "pixel_shuffle_ratio is 2"),
    ],
)  # fmt: skip
def test_a_setting_that_no_rule_follows_is_refused_by_name(
    name: str, file: str, change: dict[str, object], found: str, tmp_path: Path
) -> None:
    folder = write_processor(tmp_path, name)
    content = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(UsageError, match=found):
        read_processor(folder)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"processor_class": "PaliGemmaProcessor"}, "no chat template"),
        ({"processor_class": "MllamaProcessor"}, "beside the text"),
        ({"processor_class": "Qwen2_5_VLProcesor"}, "did you mean 'Qwen2_5_VLProcessor'"),
        ({"processor_class": "ChameleonProcessor"}, "not supported"),
        ({"image_processor_type": "CLIPImageProcessor"}, "no processor_class"),
        (
            {
                "processor_class": "Phi3VProcessor",
                "auto_map": {"AutoProcessor": "processing_phi3_v.Phi3VProcessor"},
            },
            "its own Python code",
        ),
    ],
)
def test_other_families_are_refused_with_the_reason(
    content: dict[str, object], found: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=found):
        read_processor(tmp_path)


def test_a_folder_without_a_processor_and_one_with_broken_json_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither processor_config.json nor preprocessor_config.json"):
        read_processor(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(UsageError, match="is no JSON"):
        read_processor(tmp_path)
    assert REFUSED.keys().isdisjoint(family.processor for family in FAMILIES)

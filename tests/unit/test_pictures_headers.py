"""The size in a header is the size of the picture that a processor gets, for every format and turn; the rest is refused."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from sftdata.errors import RowError
from sftdata.pictures import headers
from sftdata.pictures.headers import MAX_PIXELS, Header, read_header
from tests.made_pictures import bomb, good_pictures, make, moved_behind, moving_pictures, saved, turned

GOOD = good_pictures()


def as_loaded(data: bytes) -> tuple[int, int]:
    """Return height and width as `transformers.image_utils.load_image` gives them: decoded, turned, in RGB."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    return image.height, image.width


def refusal(data: bytes) -> tuple[str, str]:
    with pytest.raises(RowError) as caught:
        read_header(data, "images[0]")
    fault = caught.value.fault
    assert fault.reason.startswith("images[0] ")
    assert fault.fix
    assert "0x" not in fault.reason  # an address would be in the set, and another in each run
    return fault.code, fault.reason


def test_there_are_more_than_sixty_pictures_of_every_format_and_turn() -> None:
    found = {name: read_header(data) for name, data in GOOD.items()}
    assert len(found) >= 60
    assert {header.format for header in found.values()} == {"jpeg", "png", "webp", "gif"}
    assert {header.orientation for header in found.values()} == {*range(1, 9)}


@pytest.mark.parametrize("name", GOOD)
def test_the_header_has_the_size_of_the_picture_that_a_processor_loads(name: str) -> None:
    header = read_header(GOOD[name])
    assert (header.height, header.width) == as_loaded(GOOD[name])
    assert not header.animated


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_an_animation_has_the_size_of_its_first_frame_and_is_known_for_one(kind: str) -> None:
    data = moving_pictures()[kind]
    header = read_header(data)
    assert header.animated
    assert (header.height, header.width) == as_loaded(data) == (40, 64)


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow's own `getexif` of a PNG decodes all of it."""
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for name in (
        "jpeg turned 6",
        "png turned 6",
        "png 640x99",
        "png turned behind its pixels",
        "gif",
        "webp turned 5",
    ):
        read_header(GOOD[name])


def test_a_turn_that_stands_behind_the_pixels_of_a_png_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    data = moved_behind(saved(make(30, 90), "PNG", exif=turned(6)), b"eXIf")
    assert read_header(data) == Header("png", 90, 30, orientation=6)
    monkeypatch.setattr(headers, "_with_late_metadata", lambda data: data)
    assert read_header(data) != Header("png", 90, 30, orientation=6), (
        "the guard is taken out, and the test sees it"
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_file_that_was_cut_anywhere_is_refused(kind: str) -> None:
    image = make(120, 90, "P" if kind == "GIF" else "RGB")
    options = {"exif": turned(6)} if kind != "GIF" else {}
    whole = saved(image, kind, **options)
    for length in [*range(1, 60), *range(60, len(whole), max(len(whole) // 150, 1)), len(whole) - 1]:
        code, _ = refusal(whole[:length])
        assert code in ("image-cut", "image-unreadable"), length


def test_the_end_of_a_preview_inside_the_header_is_not_the_end_of_the_picture() -> None:
    preview = saved(make(16, 16), "JPEG")
    whole = saved(make(400, 300), "JPEG", exif=b"Exif\0\0" + preview)
    assert read_header(whole).height == 400
    assert refusal(whole[: len(whole) // 2])[0] == "image-cut"


def test_a_bomb_is_refused_from_its_header() -> None:
    code, reason = refusal(bomb())
    assert code == "image-too-large"
    assert f"{MAX_PIXELS:,}" in reason


def test_a_large_picture_below_the_limit_is_taken_without_a_warning() -> None:
    size = (10_001, 10_000)
    assert read_header(saved(Image.new("1", size), "PNG")).pixels == size[0] * size[1]


@pytest.mark.parametrize(
    ("data", "code", "found"),
    [
        (b"", "image-unreadable", "is empty"),
        (b"<html><body>404 Not Found</body></html>", "image-unreadable", "404"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "image-unreadable", "git-lfs"),
        (b"\x00\x01\x02\x03" * 20, "image-unreadable", "no picture"),
        (saved(make(4, 4), "BMP"), "image-format", "BMP"),
        (saved(make(4, 4), "TIFF"), "image-format", "TIFF"),
        (b"%PDF-1.7 ...", "image-format", "PDF"),
        (saved(Image.new("I;16", (4, 4)), "PNG"), "image-format", "16 bits"),
        (b"\0\0\0\x18ftypavif....", "image-format", "AVIF"),
        (b"\0\0\0\x18ftypisom....", "image-format", "film"),
        (b"\xff\xd8\xff" + b"\xe0\0\x02" * 4 + b"\xff\xd9", "image-unreadable", "JPEG"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 30, "image-unreadable", "PNG"),
        (b"GIF89a\x01", "image-unreadable", "GIF"),
        (b"RIFF\x04\0\0\0WEBP", "image-unreadable", "WEBP"),
    ],
    ids=lambda value: (
        value.decode("latin1")[:9].encode("unicode_escape").decode()
        if isinstance(value, bytes)
        else str(value)
    ),
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, code: str, found: str) -> None:
    refused = refusal(data)
    assert refused[0] == code
    assert found in refused[1]


def test_without_pillow_the_extra_is_named(tmp_path: Path) -> None:
    code = (
        "import sys\nsys.modules['PIL'] = None\nfrom sftdata.pictures.headers import read_header\n"
        "from sftdata.errors import UsageError\ntry:\n    read_header(b'GIF89a')\nexcept UsageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'sftdata[vision]'" in done.stdout

"""What a fault says about a marker that is not in the text."""

from __future__ import annotations

import subprocess

import pytest

from sftdata.masks.markers import describe_missing, nearest_variant
from sftdata.wording import shell_quote


@pytest.mark.parametrize(
    ("marker", "text", "variant"),
    [
        ("### Assistant:", "a\n###Assistant: b", "###Assistant:"),
        ("### Assistant:", "a\n### ASSISTANT: b", "### ASSISTANT:"),
        ("### Assistant:", "a\n### Assistant ： b", "### Assistant ："),
        ("### Assistant: ", "a\n### Assistant:\nb", "### Assistant:"),
        ("\n### Answer:", "### Answer: b", "### Answer:"),
        (r"\n### Answer:", "a\n### Answer: b", "\n### Answer:"),
        ("<|assistant|>", "<| Assistant |> b", "<| Assistant |>"),
        ("答：", "问：a\n答: b", "答:"),
        ("### Assistant:", "### Answer: b", None),
        ("  ", "a b", None),
    ],
)
def test_the_nearest_variant_differs_in_spacing_case_or_colon_only(
    marker: str, text: str, variant: str | None
) -> None:
    assert nearest_variant(marker, text) == variant


def test_a_text_with_other_headers_has_them_listed() -> None:
    text = "### Instruction:\nAdd.\n### Input: 1\n### Response:\n2\n### Notes: none"
    reason, fix = describe_missing("response", "### Answer:", text)
    assert reason.endswith("it has '### Instruction:', '### Input:', '### Response:'.")
    assert fix == "set --response-template to the marker that this text uses, or take the row out."


def test_a_text_without_headers_is_shown_by_its_beginning() -> None:
    reason, _ = describe_missing("response", "Bot:", "x" * 100)
    assert reason.endswith(f"which begins '{'x' * 40}'.")


@pytest.mark.parametrize(
    "value", ["### Assistant:", "\n### Assistant:", "it's", "\tit's\\n", "é\n🙂", "答："]
)
def test_the_fix_can_be_pasted_into_a_shell(value: str) -> None:
    printed = subprocess.run(
        ["bash", "-c", f"printf %s {shell_quote(value)}"], capture_output=True, check=True
    )
    assert printed.stdout.decode() == value

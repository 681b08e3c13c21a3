"""Texts on which tokenizer engines have differed, or could: the fixed part of the parity gate."""

from __future__ import annotations

HARD_TEXTS = (
    # whitespace, line ends, control characters
    "", " ", "  ", "\n", "\t", "\r\n", "\x00", " leading", "trailing ", "trailing\n\n", "\x1c\x85\xa0\u2003\u3000x",
    "a  b   c    d\t\te", "line\r\nline\rline\n\n\n  indented\n\t\ttabs",
    "def f(x):\n        return x**2  # 8 spaces\n" + " " * 40 + "end",
    # words and numbers
    "I'm you'RE they'll WE'VE 'tis 's 'S \u2019s don't",
    "0 1 12 123 1234 12345 3.14159 1,000,000 \u0663\u0664 \u00bd \u2167 x2y",
    "https://example.org/a_b?c=d&e=%20f#g camelCaseWord snake_case_word SCREAMING x86_64 \\frac{a}{b} {\"k\": [1, 2]}",
    # combining marks, composed and decomposed; scripts; emoji
    "e\u0301 \u00e9 a\u0300\u0316 \u1112\u1161\u11ab \u0958 \ufb01 \u212b \u0344",
    "\u65e5\u672c\u8a9e\u3068\u4e2d\u6587\u6df7\u5408text\ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0e44\u0e17\u0e22 \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u1f08\u03c1\u03c7\u03ae",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd \u2764\ufe0f \U0001f600" * 3,
    "\u2581under \u2581\u2581 \ufeffbom \u200b\u200d\u00ad \ue000 \ufffd \U0010ffff \u0378",
    # long runs
    "a" * 3000, "ab" * 700, " " * 700, "\n" * 500, "=" * 300 + "-" * 299, "!?.,;:" * 60, "\u4e2d" * 400, "\u0301" * 60, "9" * 301,
    # control tokens of the common families, whole and torn
    "<0x41><unk><s></s>[INST] x [/INST]", "<|im_start|>user\nhi<|im_end|>\n<|im_start|>", "<|im_end", "|>im_end|>",
    "<|begin_of_text|><|eot_id|> <|end|> \n<|user|>\n  x<|endoftext|>",
)  # fmt: skip

"""The dataset card of a set: with it `datasets.load_dataset(FOLDER)` reads the shards, and nothing else that lies beside them."""

from __future__ import annotations

CARD_NAME = "README.md"
CARD = b"""\
---
configs:
- config_name: default
  data_files:
  - split: train
    path: shard-*.arrow
---

A set of tokenized, masked and packed rows for supervised fine-tuning, made by `sftdata prepare`. `manifest.json` says what it was
made from; `sftdata verify` checks every byte of it against that.

`load_dataset` reads its rows: `input_ids` and `labels` (-100 where not trained), `seq_lengths` of the documents in a row, and
`example_ids`, the input rows they come from. `tokenizer/` holds the tokenizer, chat template included.
"""

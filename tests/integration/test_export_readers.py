"""Exports after the code of the trainers that they are for: a thousand documents each, label for label.

Where a trainer is not installed its test is left out, by name; what its documentation says is tested all the same.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

import sftdata
from tests.exported import Document, files_of, trained_documents
from tests.token_sets import Layout, Row, write_tokens

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand documents of several answers, packed."""
    rng = np.random.default_rng(0)
    rows = []
    for length in rng.integers(2, 90, 1000).tolist():
        trained = np.repeat(rng.random(length) < 0.5, rng.integers(1, 9, length))[:length]
        trained[-1] = True
        rows.append(Row(tuple(rng.integers(5, 900, length).tolist()), tuple(trained.tolist())))
    folder = tmp_path_factory.mktemp("thousand") / "set"
    write_tokens(folder, {"rows.jsonl": rows}, Layout(256))
    return folder


def reader_of(folder: Path) -> Any:
    """Import rows.py of an export."""
    spec = importlib.util.spec_from_file_location("rows", folder / "rows.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verl_rows(thousand: Path, folder: Path) -> tuple[list[dict[str, Any]], list[Document]]:
    sftdata.export(thousand, to="verl", output=folder)
    files = [str(path) for path in files_of(folder, "rows-*.parquet")]
    rows = reader_of(folder).TokenRows(parquet_files=files, tokenizer=None, config={"max_length": 256})
    wanted = trained_documents(thousand)
    assert len(rows) == len(wanted) == 1000
    return [rows[index] for index in range(len(rows))], wanted


def taken_by_verl(mask: Any) -> list[int]:
    """Return which positions predict a token that counts, as verl's `sft_loss` rolls the mask of a whole batch."""
    return [int(flag) for flag in np.roll(mask, -1)]


def wanted_of(documents: list[Document]) -> list[int]:
    """The same, from the labels: the position before each that is trained."""
    return [int(label != -100) for _, labels in documents for label in [*labels[1:], -100]]


@pytest.mark.slow
def test_verl_takes_the_loss_on_the_same_tokens(thousand: Path, tmp_path: Path) -> None:
    """As verl 0.9 documents its batches without padding; nothing of verl is needed."""
    rows, wanted = verl_rows(thousand, tmp_path / "out")
    assert [row["input_ids"].tolist() for row in rows] == [ids for ids, _ in wanted]
    assert all(row["position_ids"].tolist() == list(range(len(row["input_ids"]))) for row in rows)
    for first in range(0, 1000, 8):
        mask = np.concatenate([row["loss_mask"].numpy() for row in rows[first : first + 8]])
        assert taken_by_verl(mask) == wanted_of(wanted[first : first + 8])
    reader, files = reader_of(tmp_path / "out"), [str(tmp_path / "out/rows-00000.parquet")]
    assert len(reader.TokenRows(files, None, {}, max_samples=7)) == 7
    with pytest.raises(ValueError, match=r"data\.pad_mode=no_padding"):
        reader.TokenRows(files, None, {"pad_mode": "right"})
    with pytest.raises(ValueError, match=r"set data\.max_length to that at least"):
        [*reader.TokenRows(files, None, {"max_length": 20})]


@pytest.mark.slow
def test_verl_collates_the_same_labels(thousand: Path, tmp_path: Path) -> None:
    collators = pytest.importorskip("verl.utils.dataset.dataset_utils", reason="verl is not installed")
    rows, wanted = verl_rows(thousand, tmp_path / "out")
    collate = collators.SFTTensorCollator("no_padding")
    for first in range(0, 1000, 8):
        batch = collate(rows[first : first + 8])
        part = wanted[first : first + 8]
        assert [ids.tolist() for ids in batch["input_ids"].unbind()] == [ids for ids, _ in part]
        assert taken_by_verl(batch["loss_mask"].values().numpy()) == wanted_of(part)


@pytest.mark.slow
def test_nemo_rl_takes_the_loss_on_the_same_tokens(thousand: Path, tmp_path: Path) -> None:
    """As NeMo-RL documents it: messages laid end to end, of which those by the assistant are trained."""
    sftdata.export(thousand, to="nemo-rl", output=tmp_path / "out")
    process, wanted = reader_of(tmp_path / "out").process, trained_documents(thousand)
    rows = [
        row
        for path in files_of(tmp_path / "out", "rows-*.parquet")
        for row in parquet.read_table(path).to_pylist()
    ]
    for number, (row, (ids, labels)) in enumerate(zip(rows, wanted, strict=True)):
        datum = process(row, None, None, 256, number)
        log = datum["message_log"]
        assert [token for message in log for token in message["token_ids"].tolist()] == ids
        trained = [message["role"] == "assistant" for message in log for _ in message["token_ids"]]
        assert trained == [label != -100 for label in labels]
        assert (datum["length"], datum["loss_multiplier"], datum["idx"]) == (len(ids), 1.0, number)
    with pytest.raises(ValueError, match="set max_seq_length to that at least"):
        process(rows[0], None, None, 1, 0)


@pytest.mark.slow
def test_nemo_automodel_collates_the_same_labels(thousand: Path, tmp_path: Path) -> None:
    automodel = pytest.importorskip(
        "nemo_automodel.components.datasets.datum", reason="nemo_automodel is not installed"
    )
    sftdata.export(thousand, to="tinker", output=tmp_path / "out")
    lines = b"".join(path.read_bytes() for path in files_of(tmp_path / "out", "datums-*.jsonl")).splitlines()
    read = [json.loads(line) for line in lines]
    datums = [
        automodel.Datum(one["input_tokens"], {name: one[name] for name in ("target_tokens", "weights")})
        for one in read
    ]
    for first in range(0, 1000, 8):
        batch, part = (
            automodel.collate_datums(datums[first : first + 8]),
            trained_documents(thousand)[first : first + 8],
        )
        for row, (ids, labels) in enumerate(part):
            assert batch["input_ids"][row].tolist()[: len(ids) - 1] == ids[:-1]
            found = batch["labels"][row].tolist()
            assert found[: len(ids) - 1] == labels[1:]
            assert {*found[len(ids) - 1 :]} <= {-100}


@pytest.mark.slow
def test_tinker_takes_the_same_targets_and_weights(thousand: Path, tmp_path: Path) -> None:
    types = pytest.importorskip("tinker", reason="tinker is not installed").types
    sftdata.export(thousand, to="tinker", output=tmp_path / "out")
    lines = b"".join(path.read_bytes() for path in files_of(tmp_path / "out", "datums-*.jsonl")).splitlines()
    for line, (ids, labels) in zip(lines, trained_documents(thousand), strict=True):
        one = json.loads(line)
        inputs = {name: one[name] for name in ("target_tokens", "weights")}
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(one["input_tokens"]), loss_fn_inputs=inputs
        )
        assert datum.model_input.to_ints() == ids[:-1]
        assert datum.loss_fn_inputs["target_tokens"].tolist() == ids[1:]
        assert datum.loss_fn_inputs["weights"].tolist() == [float(label != -100) for label in labels[1:]]


class _Anything(ModuleType):
    """A module of which only the names are needed."""

    def __getattr__(self, name: str) -> object:
        return object


@pytest.mark.slow
def test_megatron_bridge_collates_the_same_labels(
    thousand: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own collator, whose module needs nothing of Megatron-Core and Transformer Engine but their names."""
    found = importlib.util.find_spec("megatron")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    sources = [path for folder in folders if (path := Path(folder) / "bridge/data/datasets/sft.py").is_file()]
    if not sources:
        pytest.skip("megatron-bridge is not installed")
    for name in (
        "core",
        "core.msc_utils",
        "bridge",
        "bridge.data.datasets.utils",
        "bridge.training.tokenizers.tokenizer",
    ):
        monkeypatch.setitem(sys.modules, f"megatron.{name}", _Anything(f"megatron.{name}"))
    spec = importlib.util.spec_from_file_location("bridge_sft", sources[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sftdata.export(thousand, to="megatron-bridge", output=tmp_path / "out")
    rows = [
        row
        for path in files_of(tmp_path / "out", "rows-*.idx.parquet")
        for row in parquet.read_table(path).to_pylist()
    ]
    packed = module.GPTSFTPackedDataset.__new__(module.GPTSFTPackedDataset)
    eos = sftdata.open(thousand).manifest.tokenizer.eos_id
    settings = {
        "indexed_dataset": rows, "samples_mapping": None, "answer_only_loss": True, "pad_to_max_length": False,
        "max_seq_length": 256, "pad_seq_length_to_mult": 1, "ceil_to_power_2": False, "return_cu_seqlen": False,
        "pad_cu_seqlens": False, "_pad_seq_to_mult": 1, "get_attention_mask_from_fusion": True,
        "tokenizer": type("Tokenizer", (), {"eos_id": eos}),
    }  # fmt: skip
    for name, value in settings.items():
        setattr(packed, name, value)
    for number, row in enumerate(sftdata.open(thousand)):
        batch = packed.collate_fn([packed[number]])
        documents = [(one.input_ids.tolist(), one.labels.tolist()) for one in row.documents()]
        assert batch["tokens"][0].tolist() == [token for ids, _ in documents for token in ids[:-1]]
        took = [
            label if mask else -100
            for label, mask in zip(batch["labels"][0].tolist(), batch["loss_mask"][0].tolist(), strict=True)
        ]
        assert took == [label for _, labels in documents for label in labels[1:]]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # TRL and peft warn about what they will remove
def test_trl_and_transformers_collate_the_same_labels(thousand: Path, tmp_path: Path) -> None:
    """TRL's collator, rows side by side and end to end, and the one that axolotl and LLaMA-Factory build on."""
    from datasets import load_from_disk
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    sftdata.export(thousand, to="datasets", output=tmp_path / "out")
    rows, wanted = load_from_disk(str(tmp_path / "out")).to_list(), trained_documents(thousand)
    assert len(rows) == len(wanted) == 1000
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "tokenizer")
    end_to_end = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    side_by_side = (DataCollatorForLanguageModeling(pad_token_id=0), DataCollatorForSeq2Seq(tokenizer))
    for first in range(0, 1000, 8):
        batch, part = rows[first : first + 8], wanted[first : first + 8]
        for collate in side_by_side:
            made = collate([dict(row) for row in batch])
            for row, (ids, labels) in enumerate(part):
                assert made["input_ids"][row].tolist()[: len(ids)] == ids
                found = made["labels"][row].tolist()
                assert found[: len(ids)] == labels
                assert {*found[len(ids) :]} <= {-100}
        made = end_to_end([dict(row) for row in batch])
        assert made["labels"][0].tolist() == [label for _, labels in part for label in labels]
        assert made["position_ids"][0].tolist() == [at for ids, _ in part for at in range(len(ids))]

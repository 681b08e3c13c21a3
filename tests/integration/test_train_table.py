"""The trainer's table, row by row: model objects, data of one's own, evaluation, losses, noise, memory, trackers, refusals."""

from __future__ import annotations

import json
import math
import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import sfttrain
from sftdata.errors import DataError, UsageError
from sftdata.set.opened import open_set
from sfttrain import cli
from sfttrain.loss import Head, Objective, supervised_loss
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
QUICK = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "per_device_train_batch_size": 4}


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def _nll(model: Any, ids: Any, labels: Any) -> tuple[float, int]:
    """Summed loss and count of one document, position by position."""
    ids, labels = torch.from_numpy(np.array(ids, np.int64)), np.asarray(labels)
    with torch.no_grad():
        chances = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    places = [place for place in range(1, len(ids)) if labels[place] != -100]
    return -sum(float(chances[place - 1, ids[place]]) for place in places), len(places)


# ----------------------------------------------------------------------------------------------------- model


@pytest.mark.feature("model")
def test_a_model_object_is_trained_as_the_folder_is(shards: Path, model: Path, tmp_path: Path) -> None:
    by_name = sfttrain.train(shards, model=model, output=tmp_path / "a", **QUICK)
    given = _load(model)
    by_object = sfttrain.train(str(shards), model=given, output=tmp_path / "b", **QUICK)
    assert by_object.model is given
    assert torch.equal(by_name.model.lm_head.weight, by_object.model.lm_head.weight)


@pytest.mark.feature("model")
def test_arguments_of_from_pretrained_reach_the_model(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"attn_implementation": "eager", "torch_dtype": torch.bfloat16, "low_cpu_mem_usage": True}
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK, model_init_kwargs=arguments)
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.bfloat16
    said = capsys.readouterr().err
    assert "attention: eager (asked for)" in said  # and so it is what the proof was run with
    assert "model: LlamaForCausalLM in bfloat16, low_cpu_mem_usage=True" in said
    assert "dtype: bfloat16" in (tmp_path / "out" / "settings.yaml").read_text()


@pytest.mark.feature("chat format")
def test_grown_embeddings_begin_at_the_mean_in_whole_multiples(model: Path, tmp_path: Path) -> None:
    grown = make_set(tmp_path / "set", rows=4, vocabulary=131, tokens_added=3)
    trainer = train_in_process(
        grown, model, tmp_path / "out", {**QUICK, "learning_rate": 0.0}, resize_to_multiple_of=16
    )
    weight, before = trainer.model.get_input_embeddings().weight, _load(model).get_input_embeddings().weight
    assert weight.shape[0] == 144
    assert torch.allclose(weight[128:], before.mean(0).expand(16, -1), atol=1e-6)
    assert (trainer.model.config.eos_token_id, trainer.model.config.pad_token_id) == (2, 0)


# ----------------------------------------------------------------------------------------------- data of one's own


@pytest.mark.feature("custom data")
@pytest.mark.parametrize(
    "columns", [("labels",), ("completion_mask",), ("assistant_masks", "completion_mask"), ()]
)
def test_each_kind_of_columns_trains_its_own_tokens(
    model: Path, tmp_path: Path, columns: tuple[str, ...]
) -> None:
    from datasets import Dataset

    ids = [[5, 6, 7, 8, 9], [10, 11, 12]]
    made = {
        "labels": [[-100, -100, 7, 8, 9], [-100, 11, 12]],
        "completion_mask": [[0, 0, 1, 1, 1], [0, 1, 1]],
        "assistant_masks": [[1, 1, 1, 1, 0], [0, 1, 1]],
    }
    trained = {("labels",): 5, ("completion_mask",): 5, ("assistant_masks", "completion_mask"): 4, (): 6}[
        columns
    ]
    data = Dataset.from_dict({"input_ids": ids, **{name: made[name] for name in columns}})
    training = {**QUICK, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2}
    trainer = sfttrain.train(data, model=model, output=tmp_path / "out", **training)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    assert int((batch["labels"] != -100).sum()) == trained
    total = [
        _nll(_load(model), row, label) for row, label in zip(ids, _labels(ids, made, columns), strict=True)
    ]
    wanted = sum(loss for loss, _ in total) / sum(count for _, count in total)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-3)


def _labels(ids: list[list[int]], made: dict[str, Any], columns: tuple[str, ...]) -> list[list[int]]:
    labels = made["labels"] if "labels" in columns else ids
    masks = [made[name] for name in columns if name != "labels"]
    return [
        [token if all(mask[row][place] for mask in masks) else -100 for place, token in enumerate(tokens)]
        for row, tokens in enumerate(labels)
    ]


@pytest.mark.feature("custom data")
def test_a_stream_trains_and_needs_max_steps(model: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    rows = Dataset.from_dict(
        {"input_ids": [[5, 6, 7, 8]] * 8, "labels": [[-100, 6, 7, 8]] * 8}
    ).to_iterable_dataset()
    trainer = sfttrain.train(rows, model=model, output=tmp_path / "out", **QUICK)
    assert trainer.state.global_step == 2
    with pytest.raises(UsageError, match="set max_steps"):
        sfttrain.train(rows, model=model, output=tmp_path / "other", num_train_epochs=1)


@pytest.mark.feature("custom data")
def test_a_stream_of_constant_length_rows_trains_without_files(model: Path, tmp_path: Path) -> None:
    import sftdata

    tokenizer = str(Path(__file__).parents[2] / "examples" / "tokenizer")
    texts = [{"text": f"Number {n} is here."} for n in range(40)]
    rows = sftdata.stream(texts, tokenizer=tokenizer, max_length=32, infinite=True)
    big = tiny_llama(tmp_path / "big", vocabulary=1024)
    assert sfttrain.train(rows, model=big, output=tmp_path / "out", **QUICK).state.global_step == 2


@pytest.mark.feature("custom data")
def test_an_opened_set_is_trained_as_its_folder_and_a_manifest_is_refused(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    import sftdata

    opened = sftdata.open(shards)
    one = sfttrain.train(opened, model=model, output=tmp_path / "one", **QUICK)
    two = sfttrain.train([str(shards)], model=model, output=tmp_path / "two", **QUICK)
    assert one.state.log_history[0]["loss"] == two.state.log_history[0]["loss"]
    assert sfttrain.train([opened], model=model, output=tmp_path / "one", **QUICK) is None
    with pytest.raises(UsageError, match="data: found a Manifest; expected folders of sets"):
        sfttrain.train(opened.manifest, model=model, output=tmp_path / "three", **QUICK)


@pytest.mark.feature("custom data")
def test_rows_without_ids_or_with_other_lengths_are_named(model: Path, tmp_path: Path) -> None:
    from datasets import Dataset

    with pytest.raises(UsageError, match="columns text; expected input_ids"):
        sfttrain.train(Dataset.from_dict({"text": ["a"]}), model=model, output=tmp_path / "out")
    with pytest.raises(DataError, match="row 0: 3 input_ids, 2 labels"):
        sfttrain.train(
            [{"input_ids": [1, 2, 3], "labels": [1, 2]}], model=model, output=tmp_path / "out", **QUICK
        )


# ------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.feature("evaluation")
def test_eval_loss_is_the_mean_of_a_token_for_any_batch_size_and_per_source(
    model: Path, tmp_path: Path
) -> None:
    packed = make_set(tmp_path / "packed", rows=5, sources=2)
    unpacked = make_set(tmp_path / "unpacked", rows=7, packed=False, seed=3)
    wanted = {
        name: _wanted(open_set(folder), _load(model)) for name, folder in (("a", packed), ("b", unpacked))
    }
    for size in (1, 4):
        trainer = train_in_process(
            packed, model, tmp_path / f"out{size}", {**QUICK, "per_device_eval_batch_size": size, "learning_rate": 0.0},
            eval={"a": packed, "b": unpacked},
        )  # fmt: skip
        found = trainer.evaluate()
        for name, losses in wanted.items():
            for source, loss in losses.items():
                assert found[f"eval_{name}_loss{source}"] == pytest.approx(loss, rel=1e-4)
    assert len(wanted["a"]) == 3  # all, and two sources


def _wanted(opened: Any, model: Any) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    names = [source.name for source in opened.manifest.sources]
    for row in opened:
        for document in row.documents():
            loss, count = _nll(model, document.input_ids, document.labels)
            source = opened.origin(document.example_id)[0]
            for key in ("", *((f"_{source}",) if len(names) > 1 else ())):
                entry = sums.setdefault(key, [0.0, 0])
                entry[0] += loss
                entry[1] += count
    return {key: loss / count for key, (loss, count) in sums.items()}


@pytest.mark.feature("evaluation")
def test_metrics_are_computed_from_predictions_made_small(shards: Path, model: Path, tmp_path: Path) -> None:
    def accuracy(predictions: Any) -> dict[str, float]:
        wanted = predictions.label_ids[:, 1:]
        hit = (predictions.predictions[:, :-1] == wanted)[wanted != -100]
        return {"accuracy": float(hit.mean())}

    trainer = sfttrain.train(
        shards, model=model, output=tmp_path / "out", eval={"held": str(shards)}, compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1), **QUICK,
    )  # fmt: skip
    found = trainer.evaluate()
    assert 0 <= found["eval_held_accuracy"] <= 1
    assert found["eval_held_loss"] == pytest.approx(
        _wanted(open_set(shards), trainer.model.eval())[""], rel=1e-4
    )


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.feature("losses")
@pytest.mark.parametrize(
    "objective", [Objective(dft=True), Objective(smoothing=0.1), Objective(dft=True, smoothing=0.2)]
)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_each_objective_and_its_gradient_follow_the_formula(
    objective: Objective, softcap: float | None
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    labels = torch.randint(0, 40, (2, 9))
    labels[0, :4] = -100
    loss, _, _, token_losses = supervised_loss(
        hidden, labels, Head(weight, softcap=softcap), objective=objective
    )
    loss.backward()
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    logits = hidden[:, :-1] @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    chances = logits.log_softmax(-1)[labels[:, 1:] != -100]
    targets = labels[:, 1:][labels[:, 1:] != -100]
    nll = -chances[torch.arange(len(targets)), targets]
    wanted = (1 - objective.smoothing) * nll - objective.smoothing * chances.mean(-1)
    if objective.dft:
        wanted = wanted * (-nll).exp().detach()
    wanted.sum().backward()
    assert torch.allclose(loss, wanted.sum(), rtol=1e-5)
    assert torch.allclose(token_losses, nll, rtol=1e-4, atol=1e-5)
    assert torch.allclose(found[0], hidden.grad, atol=1e-5)
    assert torch.allclose(found[1], weight.grad, atol=1e-5)


@pytest.mark.feature("losses")
def test_smoothing_is_the_one_of_transformers_and_dft_is_smaller(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    def first_loss(name: str, training: dict[str, Any] | None = None, **settings: Any) -> float:
        trainer = train_in_process(
            shards, model, tmp_path / name, {**QUICK, "logging_steps": 1, **(training or {})}, **settings
        )
        return float(trainer.state.log_history[0]["loss"])

    smooth = {"label_smoothing_factor": 0.1}
    assert first_loss("a", smooth) == pytest.approx(first_loss("b", smooth, loss="plain"), rel=1e-4)
    plain = first_loss("c")
    assert first_loss("d", objective="dft") == pytest.approx(plain * math.exp(-plain), rel=0.5)


# ----------------------------------------------------------------------------------------------- noise and memory


@pytest.mark.feature("NEFTune")
def test_noise_is_added_while_training_and_gone_after(shards: Path, model: Path, tmp_path: Path) -> None:
    from transformers import TrainerCallback

    ids = torch.arange(3, 40)[None]
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            embed = model.get_input_embeddings()
            plain = torch.nn.functional.embedding(ids, embed.weight)
            with torch.no_grad():
                seen["train"] = (model.train().get_input_embeddings()(ids) - plain).abs().max().item()
                seen["eval"] = (model.eval().get_input_embeddings()(ids) - plain).abs().max().item()
            model.train()

    trainer = sfttrain.train(
        shards, model=model, output=tmp_path / "out", neftune_noise_alpha=5, callbacks=[Look()], **QUICK
    )
    bound = 5 / math.sqrt(ids.numel() * 32)
    assert 0.5 * bound < seen["train"] <= bound
    assert seen["eval"] == 0
    with torch.no_grad():
        after = trainer.model.train()(input_ids=ids).logits
        assert torch.equal(after, trainer.model(input_ids=ids).logits)  # no noise is left
        assert torch.allclose(after, _load(tmp_path / "out")(input_ids=ids).logits, atol=1e-6)


@pytest.mark.feature("memory")
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_activation_checkpoints_change_no_weight(
    shards: Path, model: Path, tmp_path: Path, kind: str
) -> None:
    lora = {"lora": {"r": 4}} if kind == "lora" else {}
    plain = train_in_process(shards, model, tmp_path / "plain", QUICK, **lora)
    saving = train_in_process(
        shards, model, tmp_path / "saving", {**QUICK, "activation_checkpointing": True}, **lora
    )
    assert saving.args.activation_checkpointing_kwargs["use_reentrant"] is False
    for one, other in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.feature("memory")
def test_eight_bit_adamw_trains_by_name(shards: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = train_in_process(shards, model, tmp_path / "out", {**QUICK, "optim": "adamw_bnb_8bit"})
    assert "bitsandbytes" in type(trainer.optimizer.optimizer).__module__
    assert not torch.equal(trainer.model.lm_head.weight, _load(model).lm_head.weight)


@pytest.mark.feature("8-bit, 4-bit base")
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_adapters_learn_on_a_quantized_base(shards: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torchao" if kind.startswith("torchao") else "bitsandbytes")
    base = tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    training = {**QUICK, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    trainer = train_in_process(shards, base, tmp_path / "out", training, quantize=kind, lora={"r": 4})
    layer = trainer.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    stored = layer.weight.qdata if kind == "torchao-int8" else layer.weight
    assert stored.dtype in (torch.uint8, torch.int8)
    assert (
        type(layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt", "torchao-int8": "Linear"}[kind]
    )
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    lowest = trainer.model.get_base_model().model.layers[0].self_attn.q_proj
    assert lowest.lora_B["default"].weight.abs().max() > 0  # the gradient came through all quantized layers


@pytest.mark.feature("8-bit, 4-bit base")
def test_a_quantized_model_object_gets_its_adapters(shards: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    base = tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=128)
    eight = BitsAndBytesConfig(load_in_8bit=True)
    given = AutoModelForCausalLM.from_pretrained(base, quantization_config=eight, device_map={"": "cpu"})
    with pytest.raises(
        UsageError, match='quantized and cannot be trained. Fix: train adapters on them, as lora="r=16"'
    ):
        sfttrain.train(shards, model=given, output=tmp_path / "out", **QUICK)
    trainer = sfttrain.train(shards, model=given, output=tmp_path / "out", lora="r=4", **QUICK)
    assert {
        name.partition("lora")[1] for name, one in trainer.model.named_parameters() if one.requires_grad
    } == {"lora"}
    norms = [one for name, one in trainer.model.named_parameters() if "norm" in name]
    assert {norm.dtype for norm in norms} == {torch.float32}


@pytest.mark.feature("attention")
@pytest.mark.parametrize("kernel", ["sdpa:flash", "sdpa:math"])
def test_a_forced_kernel_of_sdpa_is_the_one_that_runs(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """The Flash-Attention-1 recipe: `torch.backends.cuda.sdp_kernel(...)` around training."""
    training = {**QUICK, "logging_steps": 1}
    free = train_in_process(shards, model, tmp_path / "free", training)
    allowed, real = set(), torch.nn.functional.scaled_dot_product_attention

    def look(*inputs: Any, **options: Any) -> Any:
        allowed.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return real(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    forced = train_in_process(shards, model, tmp_path / "forced", training, attention=kernel)
    assert allowed == {(kernel == "sdpa:flash", kernel == "sdpa:math")}
    assert torch.backends.cuda.math_sdp_enabled()  # the process is as it was
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (free, forced)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.feature("attention")
def test_a_forced_kernel_that_takes_no_mask_is_given_none(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As FlashAttention on a GPU: every document then has a row of its own."""
    monkeypatch.setattr("sfttrain.path.takes_no_mask", lambda *_: True)
    masks, real = [], torch.nn.functional.scaled_dot_product_attention

    def look(*inputs: Any, **options: Any) -> Any:
        masks.append(options.get("attn_mask"))
        return real(*inputs, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK, attention="sdpa:math")
    assert "sdpa:math takes no mask; every document is trained in a row of its own" in capsys.readouterr().err
    assert masks
    assert all(mask is None for mask in masks)
    assert trainer.fused
    with pytest.raises(UsageError, match='packing="require": sdpa:math takes no mask'):
        train_in_process(shards, model, tmp_path / "other", QUICK, attention="sdpa:math", packing="require")


@pytest.mark.feature("trackers")
def test_no_tracker_is_told_anything_by_default(shards: Path, model: Path, tmp_path: Path) -> None:
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK)
    assert trainer.args.report_to == []
    ours = {
        "DefaultFlowCallback",
        "FirstStep",
        "FollowSettings",
        "LogEnds",
        "StopAtStepEnd",
        "TrainLog",
        "Progress",
        "_EpochOfOrder",
    }
    assert {type(callback).__name__ for callback in trainer.callback_handler.callbacks} == ours


# --------------------------------------------------------------------------------------------------- export


@pytest.mark.feature("export: Hub")
def test_what_is_pushed_holds_no_local_path_and_no_log(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    pushed: dict[str, bytes] = {}

    class Hub:
        def create_repo(self, name: str, **_: Any) -> str:
            return f"https://hub/{name}"

        def create_commit(self, name: str, operations: list[Any], **_: Any) -> None:
            for one in operations:
                with one.as_file() as file:
                    pushed[one.path_in_repo] = file.read()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    private = tmp_path / "private-place"
    shards = make_set(private / "chats", rows=8)
    (shards / "tokenizer").mkdir()
    (shards / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": str(private / "chats")})
    )
    (shards / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    base = shutil.copytree(model, private / "base")
    out = private / "out"
    training = {**QUICK, "save_strategy": "steps", "eval_strategy": "steps"}
    kinds = (
        (base, {"lora": {"r": 2}}, "adapter_model"),
        (None, {"init_from_config": base / "config.json"}, "model"),
    )
    for given, settings, kind in kinds:
        pushed.clear()
        again = {"push_to_hub": "me/model", "overwrite": kind == "model", "eval": {"held": shards}}
        train_in_process(shards, given, out, training, **settings, **again)
        assert "pushed: https://hub/me/model" in capsys.readouterr().err
        assert {f"{kind}.safetensors", "README.md", "settings.yaml"} <= set(pushed)
        assert {"tokenizer_config.json", "chat_template.jinja"} <= set(pushed)
        assert ("adapter_config.json" in pushed) == (kind == "adapter_model")
        assert not {"run.json", "report.html", "train_log.jsonl", "runs", "training_args.bin"} & set(pushed)
        assert not [name for name in pushed if name.startswith(("checkpoint-", "events"))]
        leaks = (str(tmp_path), "private-place", socket.gethostname())
        texts = {name: content for name, content in pushed.items() if not name.endswith(".safetensors")}
        assert [
            (name, word) for name, content in texts.items() for word in leaks if word.encode() in content
        ] == []
        assert b"private-place" not in pushed[f"{kind}.safetensors"]
    assert yaml.safe_load(pushed["settings.yaml"])["sets"] == ["chats"]
    assert json.loads((out / "run.json").read_text())["pushed"] == "me/model"
    pushed.clear()
    assert train_in_process(shards, given, out, training, **settings, **again | {"overwrite": False}) is None
    assert not pushed
    train_in_process(
        shards, given, out, training, **settings, **again | {"overwrite": False, "push_to_hub": "me/other"}
    )
    assert "model.safetensors" in pushed


@pytest.mark.feature("export: GPTQ")
@pytest.mark.parametrize(
    ("gptq", "words"),
    [
        ("bits=4", "needs the package gptqmodel. Fix: pip install gptqmodel"),
        ("bits=5", "expected bits of"),
        ("four", "expected bits=4"),
    ],
)
def test_gptq_says_what_it_needs(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], gptq: str, words: str
) -> None:
    code = cli.main(["export", str(model), "-o", str(tmp_path / "out"), "--set", str(shards), "--gptq", gptq])
    assert code == 2
    assert words in capsys.readouterr().err


@pytest.mark.feature("export: GPTQ")
def test_calibration_rows_are_whole_documents_of_the_set(shards: Path) -> None:
    from sfttrain.export import calibration_rows

    opened = open_set(shards)
    documents = [document.input_ids.tolist() for row in opened for document in row.documents()]
    rows = calibration_rows(opened, 5)
    assert len(rows) == 5
    assert all(row["input_ids"] in documents and set(row["attention_mask"]) == {1} for row in rows)

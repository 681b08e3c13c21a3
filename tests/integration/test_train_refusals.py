"""What cannot work is one line with its fix, before the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import sfttrain
from sftdata.errors import UsageError
from sfttrain import cli
from sfttrain import model as modelling
from sfttrain.adapters import merge
from sfttrain.device import leave_gpus_idle
from tests.train_runs import OUR_WARNINGS, tiny_llama, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
QUICK = {"max_steps": 1, "save_strategy": "no"}


@pytest.mark.feature("export: Hub")
@pytest.mark.feature("wrong combinations")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "./nowhere"], "./nowhere: no such folder. Fix: name a folder or Hub id"),
        (["--quantize", "nf4"], "quantize freezes the model, so it needs lora"),
        (["--quantize", "torchao-int4", "--lora", "r=4"], "for 4 bits set nf4"),
        (["--liger"], "its kernels need a GPU"),
        (["--set", "loss=liger"], "set kernels=liger"),
        (["--set", "use_liger_kernel=true"], "set kernels=liger"),
        (["--set", "torch_compile=true"], "set compile=layers"),
        (["--report-to", "wandbb"], "report_to=wandbb: there is no such tracker. Fix: did you mean 'wandb'?"),
        (["--report-to", "trackio"], "report_to=trackio needs the package trackio. Fix: pip install trackio"),
        (["--push-to-hub", "me/model"], "HF_HUB_OFFLINE is set"),
        (["--push-to-hub", "model"], "name it as user/model"),
        (["--set", "objective=dft", "--set", "loss=plain"], "set loss=auto"),
        (
            ["--set", "objective=dft", "--lora", "r=4,target=q_proj+lm_head"],
            "adapters on the head. Fix: set objective=nll",
        ),
        (
            [
                "--set",
                "activation_checkpointing=true",
                "--set",
                "activation_checkpointing_kwargs.offload=true",
            ],
            "leave it out",
        ),
        (["--adapter", "nowhere"], "adapter_config.json is missing"),
        (["--lora", "r=4", "--adapter", "nowhere"], "adapter brings its own shape"),
        (["--lora", "r=4,target=nothing"], "name modules of this model"),
        (["--set", "model_init_kwargs.nonsense=1"], "nonsense"),
        (["--set", "model_init_kwargs.load_in_8bit=true"], "Fix: --quantize int8 --lora r=16"),
        (["--set", "model_init_kwargs.use_flash_attention_2=true"], "Fix: --attention flash_attention_2"),
        (["--set", "model_init_kwargs.dtype=float16", "--set", "dtype=float32"], "set one of them"),
        (
            ["--attention", "sdpa:cudnn"],
            "PyTorch has no such kernel for torch.float32 on cpu. Fix: set attention=auto",
        ),
        (
            ["--attention", "flash_attention_2"],
            "it needs CUDA and the device is cpu. Fix: set attention=auto",
        ),
        (
            ["--set", "eval_strategy=steps"],
            "there is nothing to evaluate on. Fix: name a set, as --eval held=FOLDER",
        ),
        (
            ["--set", "deepspeed=zero3.json"],
            "deepspeed needs the package deepspeed. Fix: pip install deepspeed",
        ),
        (["--set", "fsdp=full_shard"], "one process has nothing to shard over. Fix: accelerate launch"),
        (["--set", "weights=[1, 2]"], "Settings: 2 weights for 1 set. Fix: give one for each."),
        (["--set", "learning_rate=fast"], "Setting 'learning_rate': expected a number; found 'fast'. Fix:"),
        (["--max-steps", "0"], "'max_steps': found 0; expected a number above 0. Fix: set 1 or more"),
        (["--epochs", "-1"], "'num_train_epochs': found -1.0; expected a number above 0. Fix:"),
        (["--set", "per_device_train_batch_size=0"], "found 0; expected a number above 0. Fix:"),
        (["--set", "learning_rate=-1"], "'learning_rate': found -1; expected 0 or more. Fix:"),
        (["--set", "lr_scheduler_type=cosin"], "cosin is not a valid SchedulerType"),
    ],
)
def test_a_wrong_combination_is_one_line_with_its_fix(
    shards: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    code = cli.main(
        [
            "run",
            str(shards),
            "--model",
            str(model),
            "-o",
            str(tmp_path / "out"),
            "--max-steps",
            "1",
            *arguments,
        ]
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if "Fix:" in line]
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert "Fix:" in lines[0]


@pytest.mark.feature("wrong combinations")
def test_a_sequence_to_sequence_model_is_sent_to_the_trainer_that_takes_it(
    shards: Path, tmp_path: Path
) -> None:
    from transformers import T5Config

    T5Config(vocab_size=128).save_pretrained(tmp_path / "t5")
    with pytest.raises(
        UsageError, match=r"t5 is a sequence-to-sequence model.*Fix: sfttrain\.IterativeTrainer"
    ):
        train_in_process(shards, tmp_path / "t5", tmp_path / "out", QUICK)


@pytest.mark.feature("wrong combinations")
def test_a_quantized_base_is_neither_trained_in_full_nor_quantized_again_nor_merged_into(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    train_in_process(shards, model, tmp_path / "adapter", QUICK, lora={"r": 2})
    base = tmp_path / "quantized"
    base.mkdir()
    config = json.loads((model / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(
        UsageError, match='are quantized and cannot be trained. Fix: train adapters on them, as lora="r=16"'
    ):
        train_in_process(shards, base, tmp_path / "out", QUICK)
    with pytest.raises(
        UsageError, match='is quantized already; quantize="nf4" would do so twice. Fix: leave quantize out'
    ):
        train_in_process(shards, base, tmp_path / "out", QUICK, quantize="nf4", lora={"r": 2})
    with pytest.raises(
        UsageError, match="is quantized; adapters are added to whole weights. Fix: name the unquantized base"
    ):
        merge(tmp_path / "adapter", tmp_path / "merged", str(base))


@pytest.mark.feature("wrong combinations")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "bfloat16"}, "dtype: the model is an object, which is loaded already"),
        ({"quantize": "int8", "lora": "r=2"}, "quantize: the model is an object"),
        ({"model_init_kwargs": {"low_cpu_mem_usage": True}}, "model_init_kwargs: the model is an object"),
        ({"objective": "dft", "compute_loss_func": lambda *_: 0}, "compute_loss_func decides on the loss"),
        ({"eval_dataset": iter([])}, "a stream has no end that is known"),
    ],
)
def test_settings_that_an_object_would_ignore_are_refused(
    shards: Path, model: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(UsageError, match=words):
        sfttrain.train(
            shards,
            model=AutoModelForCausalLM.from_pretrained(model),
            output=tmp_path / "out",
            **settings,
            **QUICK,
        )


@pytest.mark.feature("wrong combinations")
def test_adapters_on_a_model_object_are_neither_doubled_nor_frozen(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    train_in_process(shards, model, tmp_path / "adapter", QUICK, lora={"r": 2})
    frozen = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter")
    with pytest.raises(
        UsageError, match="No weight of the model is trained. Fix: load adapters with is_trainable=True"
    ):
        sfttrain.train(shards, model=frozen, output=tmp_path / "out", **QUICK)
    with pytest.raises(UsageError, match="carries adapters already"):
        sfttrain.train(shards, model=frozen, output=tmp_path / "out", lora="r=2", **QUICK)


@pytest.mark.feature("wrong combinations")
def test_sets_of_two_tokenizers_are_not_mixed(shards: Path, model: Path, tmp_path: Path) -> None:
    other = make_set(tmp_path / "other", rows=4, tokenizer="1")
    for more in ({}, {"eval": {"held": other}}):
        sets = [shards] if more else [shards, other]
        with pytest.raises(
            UsageError, match="whose ids are others. Fix: prepare both with the tokenizer of the model"
        ):
            train_in_process(sets, model, tmp_path / "out", QUICK, **more)


@pytest.mark.feature("wrong combinations")
def test_documents_longer_than_the_models_positions_are_refused_or_said(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=128, n_positions=16, n_embd=32, n_layer=1, n_head=2).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(
        UsageError, match="was made for 16 and has no positions beyond. Fix: prepare with max_length=16"
    ):
        train_in_process(shards, tmp_path / "gpt2", tmp_path / "out", QUICK)
    turning = tiny_llama(tmp_path / "llama", max_position_embeddings=16)
    train_in_process(shards, turning, tmp_path / "out", QUICK)
    assert "llama was made for 16" in capsys.readouterr().err


@pytest.mark.feature("wrong combinations")
def test_a_metric_that_evaluation_does_not_give_is_refused_before_the_run(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    training = {
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "load_best_model_at_end": True,
    }
    with pytest.raises(UsageError, match='set metric_for_best_model="eval_held_loss"'):
        train_in_process(shards, model, tmp_path / "out", training, eval={"held": shards})


@pytest.mark.feature("evaluation")
def test_a_set_is_evaluated_each_epoch_and_one_that_never_is_is_said(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unheard = "evaluation: held is not evaluated while training"
    trainer = train_in_process(shards, model, tmp_path / "out", QUICK, eval={"held": shards})
    assert trainer is not None
    assert "eval_held_loss" in {name for entry in trainer.state.log_history for name in entry}
    assert unheard not in capsys.readouterr().err
    train_in_process(shards, model, tmp_path / "no", QUICK | {"eval_strategy": "no"}, eval={"held": shards})
    assert unheard in capsys.readouterr().err


@pytest.mark.feature("several GPUs")
def test_one_process_takes_one_gpu_and_says_how_to_use_the_others() -> None:
    class Arguments:
        _n_gpu = 4

        @property
        def n_gpu(self) -> int:
            return self._n_gpu

    arguments, said = Arguments(), list[str]()
    leave_gpus_idle(arguments, said.append)
    leave_gpus_idle(arguments, said.append)
    assert len(said) == 1
    assert "torchrun --nproc-per-node 4" in said[0]
    assert arguments.n_gpu == 1


@pytest.mark.feature("memory")
def test_the_older_names_of_activation_checkpoints_are_the_same_setting(
    shards: Path, model: Path, tmp_path: Path
) -> None:
    training = {**QUICK, "gradient_checkpointing": True}
    trainer = train_in_process(shards, model, tmp_path / "out", training)
    assert trainer.args.activation_checkpointing is True
    assert trainer.args.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())


@pytest.mark.feature("memory")
def test_under_zero3_models_are_made_whole_and_trained_with_their_own_loss(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations import deepspeed

    class Settings:
        def is_zero3(self) -> bool:
            return True

    settings, seen, load = Settings(), [], modelling.load_model
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: settings)
    monkeypatch.setattr(modelling, "_zero_stage", lambda _: 3)

    def watch(*arguments: Any) -> Any:
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return load(*arguments)

    monkeypatch.setattr(modelling, "load_model", watch)
    with pytest.raises(UsageError, match='objective="dft" needs our loss.*ZeRO-3'):
        train_in_process(shards, model, tmp_path / "dft", QUICK, objective="dft")
    assert seen == [False]  # transformers would take the model apart while it loads
    assert deepspeed.is_deepspeed_zero3_enabled()


@pytest.mark.feature("wrong combinations")
def test_gptq_takes_no_adapters(
    shards: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_in_process(shards, model, tmp_path / "adapter", QUICK, lora={"r": 2})
    code = cli.main(["export", str(tmp_path / "adapter"), "-o", str(tmp_path / "out"), "--set", str(shards)])
    assert code == 2
    assert "holds adapters; GPTQ takes a whole model. Fix: sfttrain merge" in capsys.readouterr().err

"""What a model adds to its cross entropy is kept, the same for any split of a step; a run that diverges stops; towers freeze."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sftdata.errors import DataError, UsageError
from sfttrain import preflight
from tests.train_runs import OUR_WARNINGS, Fleet, train_in_process
from tests.train_sets import make_set

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings(OUR_WARNINGS)]
ONE = {
    "max_steps": 1,
    "learning_rate": 1e-9,
    "save_strategy": "no",
    "logging_steps": 1,
    "train_sampling_strategy": "sequential",
}
WEIGHT = 0.05


def _mixture(folder: Path, asked: bool) -> Path:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(
        **shape, num_key_value_heads=2, vocab_size=128, num_local_experts=4, output_router_logits=asked, sliding_window=None,
        router_aux_loss_coef=WEIGHT, bos_token_id=None, eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _mixture(tmp_path_factory.mktemp("models") / "mixture", asked=True)


def _loss(
    shards: Path,
    model: Path,
    output: Path,
    batch: int,
    accumulation: int,
    more: dict[str, Any] | None = None,
    **own: Any,
) -> float:
    training = {
        **ONE,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        **(more or {}),
    }
    trainer = train_in_process(shards, model, output, training, **own)
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def _expected(shards: Path, folder: Path, batches: list[list[int]]) -> tuple[float, float]:
    """Cross entropy of all trained tokens, each document alone; router loss, the mean over batches, each by its formula."""
    from transformers import AutoModelForCausalLM

    from sftdata.set.opened import open_set

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    opened, total, count, routers = open_set(shards), 0.0, 0, []
    for batch in batches:
        chosen = [[] for _ in range(2)]
        for row in batch:
            packed = opened[row]
            for first, last in _segments(packed.seq_lengths.tolist()):
                ids = torch.from_numpy(packed.input_ids[first:last].astype("int64"))
                labels = torch.from_numpy(packed.labels[first:last].astype("int64"))
                with torch.no_grad():
                    outputs = model(input_ids=ids[None], output_router_logits=True)
                kept = labels[1:] != -100
                chances = outputs.logits[0, :-1].log_softmax(-1)
                total -= float(chances[kept].gather(1, labels[1:][kept][:, None]).sum())
                count += int(kept.sum())
                for layer, logits in zip(chosen, outputs.router_logits, strict=True):
                    layer.append(logits)
        routers.append(_balance(torch.cat([torch.cat(layer) for layer in chosen])))
    return total / count, sum(routers) / len(routers)


def _segments(lengths: list[int]) -> list[tuple[int, int]]:
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _balance(logits: Tensor) -> float:
    """Switch Transformers, equations 4 to 6, for two experts a token: experts * sum of (share of tokens * mean chance)."""
    chances = logits.softmax(-1)
    taken = torch.zeros_like(chances).scatter(1, chances.topk(2, -1).indices, 1.0)
    return float(logits.shape[1] * (taken.mean(0) * chances.mean(0)).sum())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (2, 3), (1, 6), (4, 2)])
def test_a_router_loss_is_the_mean_over_the_micro_batches_that_train(
    mixture: Path, tmp_path: Path, batch: int, accumulation: int, bf16: bool
) -> None:
    """Of six rows; a step of two micro-batches of four is filled up with rows that do not count."""
    shards = make_set(tmp_path / "set", rows=6)
    parts = [list(range(start, min(6, start + batch))) for start in range(0, 6, batch)]
    cross_entropy, router = _expected(shards, mixture, parts)
    found = _loss(shards, mixture, tmp_path / "out", batch, accumulation, {"bf16": bf16})
    assert found == pytest.approx(
        cross_entropy + WEIGHT * router, abs=1e-5 if not bf16 else 0.25 * WEIGHT * router
    )


def test_with_the_plain_loss_the_router_counts_as_much(shards: Path, mixture: Path, tmp_path: Path) -> None:
    ours, plain = (_loss(shards, mixture, tmp_path / loss, 2, 6, loss=loss) for loss in ("auto", "plain"))
    assert plain == pytest.approx(ours, abs=1e-5)


def test_a_router_loss_is_said_to_be_on_or_off(
    shards: Path, mixture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _loss(shards, mixture, tmp_path / "on", 2, 1)
    assert f"router loss: on, {WEIGHT} times the model's own" in capsys.readouterr().err
    off = _mixture(tmp_path / "quiet", asked=False)
    _loss(shards, off, tmp_path / "off", 2, 1)
    assert (
        'router loss: off, as the model\'s config says (model_init_kwargs={"output_router_logits": True}'
        in capsys.readouterr().err
    )


# -------------------------------------------------------------------------------------------------- first step


class _Kept:
    """Bytes of the storages that a block keeps for its backward pass."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def of(self, own: Any, *given: Any, **options: Any) -> tuple[Any, int]:
        self._seen.clear()
        with self._hooks:
            found = own(*given, **options)
        return found, sum(self._seen.values())


@pytest.mark.feature("memory")
@pytest.mark.parametrize("checkpoints", [False, True])
def test_the_trial_step_keeps_no_more_for_the_gradient_than_a_step_of_training(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoints: bool
) -> None:
    from sfttrain.trainer import SftTrainer

    own, sizes = SftTrainer.training_step, list[int]()

    def training_step(self: Any, model: Any, inputs: Any, *more: Any) -> Any:
        tried, trial = _Kept().of(
            preflight.try_step, model, [dict(self._prepare_inputs(inputs))], True, nullcontext()
        )
        loss, step = _Kept().of(own, self, model, inputs, *more)
        assert tried.loss == pytest.approx(float(loss), rel=1e-5)
        sizes.extend((trial, step))
        return loss

    monkeypatch.setattr(SftTrainer, "training_step", training_step)
    training = {**ONE, "per_device_train_batch_size": 1, "activation_checkpointing": checkpoints}
    train_in_process(shards, model, tmp_path / "out", training)
    assert 0 < sizes[0] <= sizes[1]
    if checkpoints:
        train_in_process(shards, model, tmp_path / "free", {**training, "activation_checkpointing": False})
        assert sizes[0] < 0.8 * sizes[3]


def test_no_step_is_taken_before_the_first(
    shards: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sfttrain.loss

    taken: list[int] = []
    own = sfttrain.loss.supervised_loss

    def supervised_loss(hidden: Tensor, *more: Any, **options: Any) -> Any:
        if hidden.shape[0] == 4:  # rows of a batch; the proof has fewer
            taken.append(1)
        return own(hidden, *more, **options)

    monkeypatch.setattr(sfttrain.loss, "supervised_loss", supervised_loss)
    train_in_process(
        shards, model, tmp_path / "out", {**ONE, "max_steps": 2, "per_device_train_batch_size": 4}
    )
    assert len(taken) == 2
    said = capsys.readouterr().err
    assert said.index("memory: ") < said.index("plan: 2 steps of 4 rows") < said.index("step 1/2")


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_that_does_not_fit_is_refused_in_one_line(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    from sfttrain.trainer import SftTrainer

    own = SftTrainer.compute_loss

    def compute_loss(self: Any, *given: Any, **options: Any) -> Any:
        if self.state.global_step == step - 1:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has a capacity of 8 GiB."
            )
        return own(self, *given, **options)

    monkeypatch.setattr(SftTrainer, "compute_loss", compute_loss)
    with pytest.raises(UsageError, match=f"Step {step} does not fit: CUDA out of memory") as caught:
        train_in_process(shards, model, tmp_path / "out", {**ONE, "max_steps": 3})
    assert "activation_checkpointing=True" in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_a_first_loss_that_is_no_number_is_refused(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfttrain.trainer import SftTrainer

    own = SftTrainer.compute_loss
    monkeypatch.setattr(
        SftTrainer,
        "compute_loss",
        lambda self, *given, **options: own(self, *given, **options) * float("nan"),
    )
    with pytest.raises(DataError, match="The loss of the first batch is no number"):
        train_in_process(shards, model, tmp_path / "out", ONE)


# ----------------------------------------------------------------------------------------------------- diverged


@pytest.mark.parametrize("saved", ["no", "steps"])
def test_a_run_whose_loss_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    from sfttrain.trainer import SftTrainer

    own = SftTrainer.compute_loss

    def compute_loss(self: Any, *given: Any, **options: Any) -> Any:
        loss = own(self, *given, **options)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(SftTrainer, "compute_loss", compute_loss)
    training = {"max_steps": 6, "save_strategy": saved, "logging_steps": 1} | (
        {"save_steps": 1} if saved == "steps" else {}
    )
    output = tmp_path / "out"
    where = (
        f"{output / 'checkpoint-3'} is the last good checkpoint"
        if saved == "steps"
        else "no checkpoint was written before"
    )
    with pytest.raises(DataError, match=f"step 4: the loss or the weights are not finite .*{where}"):
        train_in_process(shards, model, output, training)
    assert not (output / "model.safetensors").exists()
    assert sorted(path.name for path in output.glob("checkpoint-*"))[-1:] == (
        ["checkpoint-3"] if saved == "steps" else []
    )


def test_weights_that_are_no_numbers_are_not_saved(
    shards: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step may ruin the weights while its own loss is still a number."""
    from transformers import TrainerCallback

    class Ruin(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            if state.global_step == 1:
                next(model.parameters()).data[0] = float("inf")

    import sfttrain

    output = tmp_path / "out"
    with pytest.raises(DataError, match="step 2: the loss or the weights are not finite"):
        sfttrain.train(
            shards, model=str(model), output=output, callbacks=[Ruin()], max_steps=4, save_strategy="steps", save_steps=1,
            logging_steps=10,
        )  # fmt: skip
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-1"]


# ------------------------------------------------------------------------------------------------------- towers


@pytest.mark.feature("several GPUs")
def test_text_trains_a_multimodal_class_on_two_ranks_with_its_tower_frozen(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}  # fmt: skip
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
    }
    config = Gemma3Config(
        text_config=text, vision_config={**vision, "patch_size": 14}, mm_tokens_per_image=4, image_token_index=120,
        boi_token_index=121, eoi_token_index=122,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    shards = make_set(tmp_path / "set", rows=8, vocabulary=110)
    settings = {"max_steps": 2, "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    overrides = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    log = tmp_path / "log"
    codes = Fleet().finish(
        ["run", str(shards), "--model", str(tmp_path / "model"), "-o", str(tmp_path / "out"), *overrides],
        2,
        log,
    )
    assert codes == [0, 0], log.read_text()
    assert (
        "frozen: model.vision_tower, model.multi_modal_projector (they get nothing from text)"
        in log.read_text()
    )
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    for name in before:
        assert torch.equal(before[name], after[name]) == ("vision_tower" in name or "projector" in name)
    assert (
        len(
            [
                line
                for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()
                if "loss" in json.loads(line)
            ]
        )
        >= 2
    )


def test_an_encoder_is_refused_since_it_sees_its_own_answers(shards: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 128,
    }
    BertLMHeadModel(BertConfig(**shape)).save_pretrained(tmp_path / "bert")
    with pytest.raises(UsageError, match="bert: each token sees those behind it.*is_decoder=true"):
        train_in_process(shards, tmp_path / "bert", tmp_path / "out", ONE)


def test_no_inner_config_keeps_a_cache_in_training() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from sfttrain.forward import disable_cache
    from sfttrain.tiny import shrunk

    model = AutoModelForCausalLM.from_config(next(shrunk(AutoConfig.for_model("gemma3"))))
    disable_cache(model)
    assert not model.config.get_text_config().use_cache
    assert model(input_ids=torch.arange(3, 9)[None]).past_key_values is None

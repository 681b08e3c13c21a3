"""Iterative training: the three ways in which TRL's trainer went wrong, and what a step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sftdata.errors import UsageError
from sfttrain import IterativeTrainer

pytestmark = pytest.mark.slow

TOKENIZER = str(Path(__file__).parents[2] / "examples" / "tokenizer")
QUESTIONS, ANSWERS = ["What is two and two? ", "Say yes. "], ["It is four.", "yes"]


def _causal() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip


def _seq2seq() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 2, "d_kv": 16, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=1024, decoder_start_token_id=0, **shape))


def _ids(text: str) -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    ids: list[int] = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return ids


def _nll(model: Any, ids: list[int], trained: int) -> float:
    """Sum of the losses of the last `trained` tokens, one token at a time."""
    with torch.no_grad():
        chances = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(chances[place - 1, ids[place]]) for place in range(len(ids) - trained, len(ids)))


@pytest.mark.feature("iterative training")
def test_text_labels_are_what_is_trained() -> None:
    """TRL encodes the texts a second time in their stead."""
    trainer = IterativeTrainer(_causal(), TOKENIZER)
    answers = [len(_ids(answer)) for answer in ANSWERS]
    wanted = sum(
        _nll(trainer.model, _ids(question)[:-1] + _ids(answer), len(_ids(answer)))
        for question, answer in zip(QUESTIONS, ANSWERS, strict=True)
    ) / sum(answers)
    figures = trainer.step(texts=QUESTIONS, texts_labels=ANSWERS)
    assert figures["trained_tokens"] == sum(answers)
    assert figures["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.feature("iterative training")
def test_labels_of_the_caller_are_kept_for_causal_models() -> None:
    """TRL puts the ids in their place."""
    model, ids = _causal(), [5, 6, 7, 8, 9]
    wanted = _nll(model, ids, 2) / 2
    figures = IterativeTrainer(model).step([ids], labels=[[-100, -100, -100, 8, 9]])
    assert figures["trained_tokens"] == 2
    assert figures["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.feature("iterative training")
@pytest.mark.parametrize(("mode", "kept"), [("keep_end", [7, 8, 9]), ("keep_start", [5, 6, 7])])
def test_max_length_cuts_tokens_and_not_examples(mode: Any, kept: list[int]) -> None:
    """TRL cuts the batch."""
    model = _causal()
    wanted = _nll(model, kept, 2) / 2
    figures = IterativeTrainer(model, max_length=3, truncation_mode=mode).step([[5, 6, 7, 8, 9]] * 4)
    assert figures["tokens"] == 12  # all four examples, three tokens of each
    assert figures["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.feature("iterative training")
def test_a_step_is_the_same_in_one_batch_and_in_several() -> None:
    examples = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
    weights = []
    for batch_size in (None, 1):
        trainer = IterativeTrainer(_causal(), batch_size=batch_size)
        assert trainer.step(examples)["step"] == 1
        weights.append(trainer.model.lm_head.weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


@pytest.mark.feature("iterative training")
def test_padding_of_the_caller_is_taken_off() -> None:
    plain = IterativeTrainer(_causal()).step([[5, 6, 7]])
    padded = IterativeTrainer(_causal()).step(
        torch.tensor([[0, 0, 5, 6, 7]]), attention_mask=torch.tensor([[0, 0, 1, 1, 1]])
    )
    assert padded["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert padded["tokens"] == 3


@pytest.mark.feature("iterative training")
def test_a_sequence_to_sequence_model_learns_the_answers() -> None:
    trainer = IterativeTrainer(_seq2seq(), TOKENIZER, optimizer=None)
    model, ids, answer = trainer.model, _ids(QUESTIONS[0]), _ids(ANSWERS[0])
    with torch.no_grad():
        wanted = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([answer])).loss)
    figures = trainer.step(texts=QUESTIONS[:1], texts_labels=ANSWERS[:1])
    assert figures["loss"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(UsageError, match="without texts_labels"):
        trainer.step(texts=QUESTIONS)


@pytest.mark.feature("iterative training")
def test_steps_learn_and_a_scheduler_moves_on() -> None:
    model = _causal()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=10)
    trainer = IterativeTrainer(model, TOKENIZER, optimizer=optimizer, scheduler=scheduler)
    figures = [trainer.step(texts=QUESTIONS, texts_labels=ANSWERS) for _ in range(20)]
    assert figures[-1]["loss"] < 0.5 * figures[0]["loss"]
    assert figures[-1]["learning_rate"] < figures[0]["learning_rate"] == 1e-2


@pytest.mark.feature("iterative training")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either input_ids or texts"),
        ({"texts": ["a"]}, "need a tokenizer"),
        ({"input_ids": [[1, 2]], "labels": [[1]]}, "make them equal"),
        ({"input_ids": [[1, 2]], "labels": [[-100, -100]]}, "No token of this step is trained"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        IterativeTrainer(_causal()).step(**arguments)

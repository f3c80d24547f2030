"""Many answers at once are the answers that the model gives one by one; and what is known of each besides its text."""

import pytest
import torch

from inference.answers import answers, answers_to_ids, final_text, prompt_ids
from inference.generate import generate
from inference.sampling import Sampling
from tests.helpers.models import TOKENIZER, small_model
from tests.helpers.tokenizers import BEGINS, llama_like

GREEDY = Sampling(temperature=0)
QUESTIONS = [[{"role": "user", "content": "你好" * n + " there"}] for n in (9, 1, 30, 4, 17, 2, 2, 60)]


@pytest.fixture(scope="module")
def model():
    return small_model(std=0.2, num_attention_heads=4, num_key_value_heads=2).eval()


def alone(model, prompt, most):
    (ids,) = generate(model, [prompt], GREEDY, max_new_tokens=most, stop=TOKENIZER.stop_ids)
    return ids


def test_batched_answers_are_those_of_batch_size_one(model):
    together = answers(model, TOKENIZER, QUESTIONS, max_new_tokens=12, rows=3)
    for question, answer in zip(QUESTIONS, together):
        ids = alone(model, prompt_ids(TOKENIZER, question), 12)
        assert answer.ids == ids and answer.text == TOKENIZER.decode(ids, skip_control=True).strip()


@torch.no_grad()
def test_in_bf16_they_differ_only_where_two_tokens_are_about_as_likely(model):
    """Sums come in another order in a batch, which in bf16 can change the better of two tokens that are within 1e-2.
    After that token the texts are different ones."""
    model.compute_dtype = torch.bfloat16
    try:
        together = answers(model, TOKENIZER, QUESTIONS, max_new_tokens=24)
        for question, answer in zip(QUESTIONS, together):
            prompt = prompt_ids(TOKENIZER, question)
            ids = alone(model, prompt, 24)
            same = next((n for n, (a, b) in enumerate(zip(ids, answer.ids)) if a != b), len(ids))
            if same < len(ids):
                logits = model(torch.tensor([prompt + ids[:same]])).logits[0, -1].float()
                best, second = logits.topk(2).values
                assert best - second < 1e-2 * best.abs()
    finally:
        model.compute_dtype = None


def test_near_the_last_position_each_answer_has_the_room_it_would_have_alone():
    """A batch has one number of new tokens. Taking the least of all would cut the short questions' answers."""
    model = small_model(std=0.2, max_position_embeddings=64).eval()
    prompts = [list(range(100, 100 + n)) for n in (60, 64, 70, 5, 58, 60)]
    found = answers_to_ids(model, TOKENIZER, prompts, max_new_tokens=10)
    assert [len(answer.ids) for answer in found] == [4, 0, 0, 10, 6, 4]  # this model does not stop
    assert [answer.asked for answer in found] == [True, False, False, True, True, True]
    assert not any(answer.ended for answer in found)
    assert found[5].ids == alone(model, prompts[5], 4)


def test_an_answer_has_ended_if_the_model_said_so(model):
    """With the first token that it would say as the stop token, every answer is empty and has ended by itself."""
    prompt = prompt_ids(TOKENIZER, QUESTIONS[0])
    first = alone(model, prompt, 1)[0]

    class Stops(type(TOKENIZER)):
        stop_ids = frozenset([first])

    stopping = Stops.load()
    (answer,) = answers_to_ids(model, stopping, [prompt], max_new_tokens=4)
    assert (answer.ids, answer.text, answer.ended) == ([], "", True)


def test_a_thought_is_not_part_of_the_answer():
    tag, text = TOKENIZER.control, TOKENIZER.encode
    thought = [tag["<think>"], *text("2+2 is 5?"), tag["</think>"], *text("\n\n")]
    answer = [tag["<answer>"], *text("2+2=4"), tag["</answer>"]]
    assert final_text(TOKENIZER, thought + answer) == "2+2=4"
    assert final_text(TOKENIZER, text("2+2=4 ")) == "2+2=4"


def test_a_thought_that_the_prompt_has_opened_is_part_of_what_was_said(model):
    (answer,) = answers(model, TOKENIZER, QUESTIONS[:1], max_new_tokens=2, enable_thinking=True)
    assert answer.full == "<think>\n" + TOKENIZER.decode(answer.ids)
    assert answer.text == "", "a number in a thought that was cut off is no answer"


def test_a_text_is_continued(model):
    (answer,) = answers(model, TOKENIZER, ["Once upon"], max_new_tokens=5)
    assert answer.ids == alone(model, [TOKENIZER.end_of_text, *TOKENIZER.encode("Once upon")], 5)


def test_a_text_for_llama_begins_with_its_bos(tmp_path):
    llama = llama_like(tmp_path, "the", "cat")
    assert prompt_ids(llama, "the cat") == [BEGINS, *llama.encode("the cat")]

"""Where a turn ends, which ids a model may sample, and which a text may hold."""

import pytest
import torch
from tiny_folder import folder_with
from transformers import AutoModelForCausalLM

from configs.config import UserError
from models.generation import generate
from models.loader import load_tokenizer
from models.tokens import completion_ids, end_of_turn, never_sampled, prompt_ids, stop_ids


@pytest.mark.statement("stop-token")
def test_a_turn_ends_where_the_template_ends_it_and_every_stop_id_ends_a_completion(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, eos="<|endoftext|>", generation_stops=[5, 0]))
    end, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert end != eos == tokenizer.eos_token_id  # the template ends a turn with another token than eos
    assert end_of_turn(tokenizer) == end and completion_ids(tokenizer, "hi")[-1] == end
    assert stop_ids(tokenizer) == tuple(sorted({end, eos, 5, 0}))


@pytest.mark.parametrize(
    "template", ["{{ messages[0]['content'] }}", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"]
)
def test_a_template_that_ends_a_turn_with_no_token_of_its_own_leaves_eos(tmp_path, template):
    tokenizer = load_tokenizer(folder_with(tmp_path, template=template))
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id and stop_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_an_id_without_a_token_is_never_sampled(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, rows=300))
    never = never_sampled(tokenizer)
    assert never == tuple(range(259, 300))  # the embedding is padded beyond the tokenizer
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.get_output_embeddings().weight[259:] *= 50  # which the model would choose
    prompts = [prompt_ids(tokenizer, "hello")]
    free = generate(model, prompts, 20, samples_per_prompt=4, seed=0)
    found = generate(model, prompts, 20, samples_per_prompt=4, seed=0, never=never)
    assert any(i >= 259 for ids in free.completions for i in ids)
    assert all(i < 259 for ids in found.completions for i in ids)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_taken_and_only_a_text_that_uses_them_refused(tmp_path):
    tokenizer = load_tokenizer(folder_with(tmp_path, rows=259, token="<image_soft_token>"))
    assert len(tokenizer) == 260 and prompt_ids(tokenizer, "hello") and completion_ids(tokenizer, "hello")
    for render in (prompt_ids, completion_ids):
        with pytest.raises(UserError, match=r"token '<image_soft_token>' \(id 259\).*has rows for 259 ids"):
            render(tokenizer, "see <image_soft_token>")

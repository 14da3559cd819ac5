"""Log-probs, packing, references, reward model: statements about whole (tiny) models."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, StableLmConfig

from models.admission import admitted
from models.fast.attention import use_matmul_attention
from models.fast.head import unwrapped
from models.fast.layers import use_memory_efficient_layers
from models.generation import generate
from rlhf.dpo_train import dpo_loss, pair_logps
from rlhf.packing import PADDED, RAGGED, pack
from rlhf.policy import as_reference, disable_dropout
from rlhf.reward_model import RewardModel, score_at_end
from rlhf.utils import completion_logprobs, packed_logprobs, pad_rows, token_logprobs

BOTH = pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])  # rotary and learned positions
PROMPTS = [[5, 6, 7], [5, 6, 7], [8, 9, 10, 11, 12], [8, 9, 10, 11, 12]]
COMPLETIONS = [[1, 2, 3], [4], [9, 2], [3, 3, 3, 5, 2]]
BEGIN = pytest.mark.parametrize("begin", [[], [20, 21, 22]])  # what all prompts begin with: once for all rows
HERE = pytest.mark.parametrize("here", [False, True])  # whether attention alone pads the rows
close = torch.testing.assert_close


def plain_logprobs(model, prompt, completion, temperature=1.0):
    """The definition: one row, all logits, log-softmax, gather."""
    logits = model(torch.tensor([prompt + completion]), attention_mask=None).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def ways(model):
    """How a model computed packed rows: where packing is wrong for it, each completion has a row of its own instead."""
    return [found["way"] for found in admitted(model)]


def adapted(model, **options):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@BOTH
@pytest.mark.statement("left-padding")
def test_left_padded_batch_gives_each_row_what_it_gets_alone_in_forward(tiny, name):
    model = tiny(name)
    rows = [p + a for p, a in zip(PROMPTS, COMPLETIONS)]
    width = max(map(len, rows))
    for left in (True, False):
        ids, mask = pad_rows(rows, 2, "cpu", left=left)
        found = token_logprobs(model, ids, mask)
        assert found.shape == (4, width - 1)
        for i, r in enumerate(rows):
            expected = plain_logprobs(model, r[:1], r[1:])
            got = found[i][(mask[i, 1:] * mask[i, :-1]).bool()]
            close(got, expected, atol=1e-12, rtol=0)


@BOTH
@BEGIN
@HERE
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.statement("packed-apart")
def test_packed_rows_give_each_answer_what_it_gets_alone(tiny, name, begin, here, temperature):
    model = use_matmul_attention(tiny(name)) if here else tiny(name)
    prompts, n = [begin + p for p in PROMPTS], len(begin)
    packed = pack(prompts, COMPLETIONS, 2, "cpu")
    assert packed.rows.shape == (2, n + 12)  # of 3 + 3 + 1 and 5 + 2 + 5 tokens
    assert packed.input_ids.shape == packed.position_ids.shape == (1, n + 19) and packed.tokens == 2 * n + 19
    found, entropy = packed_logprobs(model, packed, temperature, entropy=True)
    assert ways(model) == [RAGGED if here else PADDED]
    for i, (p, a) in enumerate(zip(prompts, COMPLETIONS)):
        close(found[i, : len(a)], plain_logprobs(model, p, a, temperature), atol=1e-12, rtol=0)
        assert (found[i, len(a) :] == 0).all()
        logits = model(torch.tensor([p + a])).logits[0, len(p) - 1 : -1] / temperature
        expected = torch.distributions.Categorical(logits=logits).entropy()
        close(entropy[i, : len(a)], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_an_architecture_with_an_attention_of_its_own_reads_packed_rows_too(memory_efficient):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = StableLmConfig(**shape, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    model = use_matmul_attention(use_memory_efficient_layers(model)) if memory_efficient else model
    found = packed_logprobs(model, pack(PROMPTS, COMPLETIONS, 2, "cpu"))
    assert ways(model) == [PADDED]
    for i, (p, a) in enumerate(zip(PROMPTS, COMPLETIONS)):
        close(found[i, : len(a)], plain_logprobs(model, p, a), atol=1e-12, rtol=0)


@BOTH
@pytest.mark.statement("packed-apart")
def test_packed_answers_do_not_see_each_other(tiny, name):
    model = tiny(name)
    embeddings = model.get_input_embeddings()
    packed, seen = pack(PROMPTS[:2], COMPLETIONS[:2], 2, "cpu"), []
    packed_logprobs(model, packed)  # the first pass also checks, on rows of its own, that this model may be packed
    assert ways(model) == [PADDED]
    hook = embeddings.register_forward_hook(lambda m, i, out: seen.append(out) or out.retain_grad())
    packed_logprobs(model, packed)[1].sum().backward()  # the second completion of the row [5 6 7 | 1 2 3 | 4]
    hook.remove()
    [embedded] = seen
    gradient = embedded.grad[0].abs().sum(-1)
    assert (gradient[:3] > 0).all() and (gradient[3:6] == 0).all()


@BOTH
@BEGIN
@HERE
@pytest.mark.statement("packed-apart")
def test_packed_gradients_equal_separate_ones(tiny, name, begin, here):
    model = use_matmul_attention(tiny(name)) if here else tiny(name)
    prompts = [begin + p for p in PROMPTS]
    packed = pack(prompts, COMPLETIONS, 2, "cpu")
    packed_logprobs(model, packed).double().square().sum().backward()
    assert ways(model) == [RAGGED if here else PADDED]
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(plain_logprobs(model, p, a).square().sum() for p, a in zip(prompts, COMPLETIONS)).backward()
    for a, b in zip(found, model.parameters()):
        close(a, b.grad, atol=1e-5, rtol=1e-5)


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.statement("sampler-logprobs")
def test_log_probs_recomputed_in_training_equal_the_samplers(tiny, name, temperature):
    model = tiny(name, dtype=torch.float32)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    g = generate(model, prompts, 8, temperature=temperature, samples_per_prompt=3, stop_ids=[2], seed=0, batch_size=6)
    rows = [p for p in prompts for _ in range(3)]
    again = completion_logprobs(model, rows, g.completions, 2, temperature)
    for mine, theirs in zip(again, g.logprobs):
        close(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=0)


@pytest.mark.statement("eos-is-target")
def test_sampled_ids_are_trained_on_and_eos_counts_though_it_is_the_pad_token():
    packed = pack([[5]], [[7, 2]], pad_id=2, device="cpu")
    assert packed.targets.tolist() == [[7, 2]] and packed.mask.tolist() == [[1, 1]]
    packed = pack([[5], [5]], [[7, 2], [7, 7, 2]], pad_id=2, device="cpu")
    assert packed.targets.tolist() == [[7, 2, 2], [7, 7, 2]] and packed.mask.tolist() == [[1, 1, 0], [1, 1, 1]]


def pairs():
    return [
        {"prompt": PROMPTS[0], "chosen": COMPLETIONS[0], "rejected": COMPLETIONS[1]},
        {"prompt": PROMPTS[2], "chosen": COMPLETIONS[2], "rejected": COMPLETIONS[3]},
    ]


class Tok:
    pad_token_id = 2


@pytest.mark.statement("dpo-ln-2")
def test_dpo_at_step_0_is_ln_2_exactly_with_dropout_in_the_config(tiny):
    model = tiny("tiny-gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, dtype=torch.float32)
    disable_dropout(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0))
    model.train()
    policy = pair_logps(model, pairs(), Tok, "cpu", per_token=False)
    with as_reference(model) as reference:
        assert not reference.training
        ref = pair_logps(reference, pairs(), Tok, "cpu", per_token=False)
    assert model.training and not any(r.requires_grad for r in ref)
    losses, chosen, rejected = dpo_loss(*policy, *ref)
    assert losses.tolist() == [torch.tensor(math.log(2)).item()] * 2
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


@pytest.mark.statement("adapter-off")
def test_the_reference_as_adapter_off_is_bitwise_the_base_model_after_training_too(tiny):
    base = tiny(dtype=torch.float32)
    before = completion_logprobs(base, PROMPTS, COMPLETIONS, 2)
    model = adapted(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        packed_logprobs(model, pack(PROMPTS, COMPLETIONS, 2, "cpu")).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert completion_logprobs(model, PROMPTS, COMPLETIONS, 2) != before
    with as_reference(model) as reference:
        assert completion_logprobs(reference, PROMPTS, COMPLETIONS, 2) == before


@pytest.mark.statement("dpo-sums")
def test_dpo_sums_over_tokens_and_ipo_means(tiny):
    model = tiny(dtype=torch.float32)
    chosen, rejected = pair_logps(model, pairs(), Tok, "cpu", per_token=False)
    mean_chosen, mean_rejected = pair_logps(model, pairs(), Tok, "cpu", per_token=True)
    close(chosen / torch.tensor([3.0, 2.0]), mean_chosen)
    close(rejected / torch.tensor([1.0, 5.0]), mean_rejected)
    close(chosen[0], plain_logprobs(model, PROMPTS[0], COMPLETIONS[0]).sum())


def classifier(tiny_name="tiny-llama"):
    from transformers import AutoModelForSequenceClassification

    from models.tiny import tiny_config

    torch.manual_seed(0)
    config = tiny_config(tiny_name, 64, 2)
    config.num_labels = 1
    return RewardModel(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).eval()


@BOTH
@pytest.mark.statement("score-at-end")
def test_the_score_is_read_at_the_last_real_token(name):
    reward_model = classifier(name)
    # eos (= pad, 2) inside, and at the end or, as where the length cut it, not: padding would look like the eos itself
    for row in ([5, 2, 7, 9, 2], [5, 2, 7, 9, 4]):
        alone = reward_model.score(torch.tensor([row]), torch.ones(1, 5, dtype=torch.long))
        for left in (True, False):
            ids = torch.tensor([[2] * 3 + row if left else row + [2] * 3])
            mask = torch.tensor([[0] * 3 + [1] * 5 if left else [1] * 5 + [0] * 3])
            close(reward_model.score(ids, mask), alone, atol=1e-6, rtol=0)
        hidden = unwrapped(reward_model.model).base_model(torch.tensor([row])).last_hidden_state
        close(reward_model.head(hidden[0, -1]), alone)


@BEGIN
@pytest.mark.statement("score-at-end")
def test_packed_scores_equal_separate_ones(begin):
    from rlhf.utils import score_completions

    reward_model, prompts = classifier(), [begin + p for p in PROMPTS]
    found = score_completions(reward_model, prompts, COMPLETIONS, 2)
    assert ways(reward_model.model) == [PADDED]
    for p, a, score in zip(prompts, COMPLETIONS, found):
        row = torch.tensor([p + a])
        assert reward_model.score(row, torch.ones_like(row)).item() == pytest.approx(score, abs=1e-6)


@pytest.mark.statement("values-fixed")
def test_the_value_of_a_token_does_not_depend_on_that_token(tiny):
    model, head = tiny(dtype=torch.float32), torch.nn.Linear(32, 1)
    values = [packed_logprobs(model, pack([[5, 6]], [[1, x, 3]], 2, "cpu"), value_head=head)[1][0] for x in (8, 9)]
    assert torch.equal(values[0][:2], values[1][:2])  # states before token 0 and before token 1
    assert values[0][2] != values[1][2]


def test_saved_reward_model_is_the_same_in_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification

    from models.loader import load_tokenizer
    from models.tiny import build_tiny

    folder = build_tiny("tiny-llama")
    tokenizer = load_tokenizer("tiny-llama")
    reward_model = RewardModel.load("tiny-llama", device="cpu", new_head=True)
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    reward_model.model = get_peft_model(reward_model.model, LoraConfig(r=4, target_modules="all-linear", **options))
    torch.manual_seed(2)
    for p in reward_model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in ("one answer", "b")]
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    before = reward_model.score(torch.tensor([r + [0] * (width - len(r)) for r in rows]), mask)
    reward_model.save(tmp_path, tokenizer, folder)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    again = load_tokenizer(tmp_path)
    assert again.pad_token_id != again.eos_token_id  # transformers finds the end of a row by its pad token
    ids = torch.tensor([r + [again.pad_token_id] * (width - len(r)) for r in rows])
    close(loaded(ids, attention_mask=mask).logits[:, 0], before, atol=1e-5, rtol=0)
    close(RewardModel.load(tmp_path, device="cpu").score(ids, mask), before, atol=1e-5, rtol=0)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_reward_adapter_on_the_policys_backbone_scores_like_the_reward_model(tmp_path):
    from models.loader import load_model, load_tokenizer, portable_name
    from models.tiny import build_tiny
    from rlhf.reward_model import place_reward_model

    base = build_tiny("tiny-llama")
    reward_model = RewardModel.load("tiny-llama", device="cpu", new_head=True)
    options = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    reward_model.model = get_peft_model(reward_model.model, LoraConfig(r=4, target_modules="all-linear", **options))
    torch.manual_seed(2)
    for p in reward_model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    reward_model.save(tmp_path, load_tokenizer("tiny-llama"), base)
    policy = adapted(load_model("tiny-llama", device="cpu"))
    policy.peft_config["default"].base_model_name_or_path = portable_name(base)
    before = completion_logprobs(policy, PROMPTS, COMPLETIONS, 2)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    scores = place_reward_model(policy, tmp_path, 4, "cpu")
    separate = RewardModel.load(tmp_path, device="cpu")
    packed = pack(PROMPTS, COMPLETIONS, 2, "cpu")
    rows = [torch.tensor([p + a]) for p, a in zip(PROMPTS, COMPLETIONS)]
    expected = [separate.score(row, torch.ones_like(row)).item() for row in rows]
    with torch.no_grad():
        assert scores(packed).tolist() == pytest.approx(expected, abs=1e-4)
    assert completion_logprobs(policy, PROMPTS, COMPLETIONS, 2) == before  # and the policy is what it was
    assert [name for name, p in policy.named_parameters() if p.requires_grad] == trained
    with as_reference(policy) as reference:
        close(
            torch.tensor(completion_logprobs(reference, PROMPTS, COMPLETIONS, 2)[0]),
            torch.tensor(completion_logprobs(load_model("tiny-llama", device="cpu"), PROMPTS, COMPLETIONS, 2)[0]),
        )


@pytest.mark.statement("tied-merged")
def test_adapter_loads_with_peft_alone_and_merged_equals_adapter(tiny, tmp_path):
    model = adapted(tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = model(ids).logits
    loaded = PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    close(loaded.merge_and_unload()(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.statement("score-at-end")
def test_score_at_end_uses_the_mask():
    hidden = torch.arange(12.0).view(2, 3, 2)
    head = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(head.weight)
    assert score_at_end(hidden, torch.tensor([[1, 1, 0], [0, 1, 1]]), head).tolist() == [5.0, 21.0]

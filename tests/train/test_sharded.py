"""Sharded (FSDP) and tensor-parallel (TP) training takes the steps of one process: in two and three processes."""

import json
import signal
import socket

import pytest
import torch
from interrupted import finish, fork, lines, run_whole, said, start_ranks, tree_differences
from safetensors.torch import load_file
from spread import WORDS, spoilt, work
from transformers import AutoModelForCausalLM, LlamaConfig

from configs.config import UserError
from models.loader import load_model
from models.tiny import byte_tokenizer, tiny_config
from proof.architectures import build
from runtime.processes import Processes
from train.tensor_parallel import TensorParallel, check_known, part

pytestmark = pytest.mark.slow

SCRIPTS = ("fsdp", "tp")
UNEVEN = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with two tiny Llamas with 9 query and 3 key-value heads, of which one has a tied head."""
    folder = tmp_path_factory.mktemp("sharded")
    tokenizer = byte_tokenizer(chat=True)
    for name, tied in (("tied", True), ("untied", False)):
        torch.manual_seed(0)
        config = tiny_config("tiny-llama", len(tokenizer), tokenizer.eos_token_id, initializer_range=0.2, **UNEVEN)
        config.tie_word_embeddings = tied
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """A function that makes a run of `count` processes, or finds it made. Returns the run's folder."""

    def make(script, model="tied", count=1, dtype="float64", **options):
        name = "-".join([script, model, str(count), dtype, *options])
        if not (folder / f"{name}.0.json").is_file():
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
            shared |= {"MASTER_PORT": str(port)}
            ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), **shared} for r in range(count)] if count > 1 else [{}]
            words = (folder, name, f"train_lm{script and '_'}{script}", model, dtype)
            processes = [fork(work, *words, environment, options) for environment in ranks]
            for process in processes:
                process.join(120)
            assert [process.exitcode for process in processes] == [0] * count, said(folder / name)
            if script:
                assert f"{count} processes on cpu (gloo)" in said(folder / name)
        return folder / name

    return make


def apart(one, other):
    """The largest difference of two runs, over the largest number: of the weights, and of what was logged."""
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    weights = max(((mine[k] - theirs[k]).abs().max() / mine[k].abs().max()).item() for k in mine)
    rows = [[(row["step"], row[k]) for row in lines(x) for k in ("grad_norm", "nats_per_token") if k in row]
            for x in (one, other)]  # fmt: skip
    assert len(rows[0]) == len(rows[1]) == 5 + 2 and [a for a, _ in rows[0]] == [a for a, _ in rows[1]]
    losses = [[row["loss"] for row in lines(x) if "loss" in row] for x in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # this sum is float32 in any precision
    return max(weights, *(abs(a - b) / a for (_, a), (_, b) in zip(*rows)))


@pytest.mark.parametrize("model", ["tied", "untied"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("sharded")
def test_five_adamw_steps_with_clipping_are_those_of_one_process(run, script, count, model):
    plain = run("", model)
    assert min(row["grad_norm"] for row in lines(plain) if "grad_norm" in row) > 0.5  # every step is clipped
    assert apart(plain, run(script, model, count)) < 1e-12


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("sharded")
def test_at_float32_they_are_equal_up_to_rounding_and_bf16_is_near(run, script):
    plain = run("", dtype="float32")
    assert apart(plain, run(script, count=2, dtype="float32")) < 1e-3  # AdamW divides small gradients by their size
    losses = [
        [row["loss"] for row in lines(x) if "loss" in row]
        for x in (plain, run(script, count=2, dtype="float32", precision="bf16"))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("sharded")
def test_gradient_checkpointing_changes_nothing(run, script):
    assert apart(run(script, count=2), run(script, count=2, gradient_checkpointing=True)) < 1e-13


@pytest.mark.parametrize("script, most", [("fsdp", 1.02), ("tp", 1.1)])
@pytest.mark.statement("sharded")
def test_each_process_keeps_its_share_of_the_weights(run, folder, script, most):
    run(script, count=3)
    kept = [json.loads((folder / f"{script}-tied-3-float64.{r}.json").read_text()) for r in range(3)]
    whole = sum(p.numel() for p in load_model(folder / "tied", device="cpu").parameters())
    assert max(kept) <= most * whole / 3 and sum(kept) >= whole


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_saved_is_a_plain_model(run, script):
    out = run(script, count=2)
    model, found = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(found.values()), found
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(run(""))
    assert (model(ids).logits - plain(ids).logits).abs().max() < 1e-10


def words_for(folder, script):
    return f"train.train_lm_{script}", [*WORDS, "--model_name", folder / "tied"]


def near(one, other):
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert max((mine[k] - theirs[k]).abs().max() for k in mine) < 1e-4
    for a, b in zip(lines(one), lines(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("sharded")
def test_a_run_whose_processes_die_goes_on_with_three_and_then_with_one(folder, tmp_path, script):
    script, words = words_for(folder, script)
    out, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    run_whole(script, words, whole)
    for count, from_step in ((2, None), (3, 2), (1, 4)):
        last = {"die_at": events_until(script, 3 if count == 2 else 5 - from_step)} if count > 1 else None
        processes = start_ranks(script, words, out, count, last)
        if last is None:
            finish(processes, out)
        for process in processes:
            process.join(120)
        if last:
            assert processes[-1].exitcode == -signal.SIGKILL, said(out)
            assert [p.exitcode for p in processes[:-1]] == [2] * (count - 1), said(out)
            assert "error: another process of this run ended" in said(out) and "Traceback" not in said(out)
        assert f"{count} processes on cpu" in said(out)
        if from_step:
            assert f"continuing from step {from_step} of 6" in said(out)
    near(whole, out)


def events_until(script, step):
    """The number of events of a process that is not the first, until it begins the AdamW step of this number.

    With FSDP it also flushes its file of each checkpoint.
    """
    return 2 * step - 1 if script.endswith("fsdp") else step


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.statement("sharded")
def test_killed_in_a_step_or_while_it_saves_it_ends_bitwise_as_if_it_never_had_been(folder, tmp_path, script):
    script, words = words_for(folder, script)
    out, whole = tmp_path / "killed" / "run", tmp_path / "whole" / "run"
    finish(start_ranks(script, words, whole, 2), whole)
    for die_at in (4, 3):
        for process in start_ranks(script, words, out, 2, {"die_at": die_at}):
            process.join(120)
    finish(start_ranks(script, words, out, 2), out)
    assert said(out).count("continuing from step") == 2
    assert tree_differences(whole, out) == []


def test_a_folder_that_not_all_processes_see_is_an_error(folder, tmp_path):
    process = fork(spoilt, folder, tmp_path / "run")
    process.join(120)
    assert process.exitcode == 2, said(tmp_path / "run")
    assert "needs a folder that all of them share" in said(tmp_path / "run")


def tiny(model_type, folder, **changes):
    build(model_type, folder / model_type, max_position_embeddings=64, **changes)
    return load_model(folder / model_type, device="cpu")


@pytest.mark.parametrize(
    "model_type, why",
    [("gpt2", "GPT2Model"), ("qwen3", "q_norm"), ("gemma2", "pre_feedforward_layernorm"),
     ("mixtral", "attention is a MixtralAttention"), ("granite", "attention is a GraniteAttention"),
     ("cohere", "post_attention_layernorm")],
)  # fmt: skip
@pytest.mark.statement("sharded")
def test_tensor_parallelism_refuses_an_unknown_model_by_name(tmp_path, model_type, why):
    model = tiny(model_type, tmp_path)
    with pytest.raises(UserError, match=f"{type(model).__name__}, which tensor parallelism does not know here.*{why}"):
        TensorParallel(model, Processes(0, 2))


@pytest.mark.parametrize(
    "changes, why",
    [({"attention_bias": True}, "has a bias"), ({"mlp_bias": True}, "has a bias"),
     ({"attention_dropout": 0.1}, "attention_dropout is 0.1"), ({"num_key_value_heads": 1}, "has 1 key-value heads")],
)  # fmt: skip
def test_tensor_parallelism_refuses_what_it_cannot_split(changes, why):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("tiny-llama", 64, 2, **changes)).eval()
    assert isinstance(model.config, LlamaConfig)
    with pytest.raises(UserError, match=why):
        check_known(model, Processes(0, 2))


def test_groups_are_divided_so_that_the_first_processes_have_one_more():
    found = [part(0, 3, 4, Processes(rank, 2)) for rank in range(2)]
    assert [(p.start, p.size, p.whole) for p in found] == [(0, 8, 12), (8, 4, 12)]
    assert [part(0, 259, 1, Processes(r, 3)).start for r in range(3)] == [0, 87, 173]


def test_all_processes_make_the_same_number_of_passes_and_no_item_counts_twice():
    shares = [Processes(rank, 3).equal_share(list("abcde")) for rank in range(3)]
    assert shares == [[("a", 1), ("d", 1)], [("b", 1), ("e", 1)], [("c", 1), ("a", 0)]]

"""Ways to break the code, each what a statement of tests/statements.py fears, with the tests that must notice.

`old` occurs once in its file, or once in the function or class `symbol` of it. Code that has moved to another file is
found there. A mutant that no longer fits says that the code has changed: break it anew, or drop it.
"""

import ast
from dataclasses import dataclass

PRODUCT = ("configs", "runtime", "models", "data", "train", "rlhf", "report", "proof")  # the folders of the code


@dataclass(frozen=True)
class Mutant:
    statement: str  # key of tests/statements.py
    what: str  # what is wrong then
    file: str  # where the code was last; see `path`
    old: str
    new: str
    tests: tuple[str, ...]  # "path::function" or "path::function[case]"; one of them at least must fail
    symbol: str = ""  # "grpo_loss" or "Updates.step": `old` counts in its definition alone
    unchecked: bool = False  # models/admission.py, which would see it and take a slower way, is broken, too

    def __str__(self):
        return f"{self.statement}: {self.what}"

    def broken(self, text):
        """The text with `old` replaced. None if `old` does not occur in it exactly once."""
        start, end = extent(text, self.symbol)
        if text.count(self.old, start, end) != 1:
            return None
        at = text.index(self.old, start, end)
        return text[:at] + self.new + text[at + len(self.old) :]

    def path(self, root):
        """The file in `root` to break: `file`, or else the one file of the code that can be broken so. None: stale."""
        named = root / self.file
        if named.is_file() and self.broken(named.read_text(encoding="utf-8")) is not None:
            return named
        files = [path for folder in PRODUCT for path in (root / folder).rglob("*.py")]
        found = [path for path in files if self.broken(path.read_text(encoding="utf-8")) is not None]
        return found[0] if len(found) == 1 else None

    def fits(self, root):
        """Whether the code in `root` can be broken so, and what comes out is Python."""
        path = self.path(root)
        if path is None:
            return False
        try:
            ast.parse(self.broken(path.read_text(encoding="utf-8")))
        except SyntaxError:
            return False
        return True


def extent(text, symbol):
    """(start, end) of the definition of "function" or "Class.method" in a text; (0, 0) if it has none."""
    if not symbol:
        return 0, len(text)
    nodes = [ast.parse(text)]
    for name in symbol.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        nodes = [x for node in nodes for x in node.body if isinstance(x, kinds) and x.name == name]
    if len(nodes) != 1:
        return 0, 0
    lines = text.splitlines(keepends=True)
    return len("".join(lines[: nodes[0].lineno - 1])), len("".join(lines[: nodes[0].end_lineno]))


COMMON, STEPS, DDP, AMP = (f"tests/train/test_{name}.py::test_" for name in ("common", "steps", "ddp", "amp"))
SHARDED = "tests/train/test_sharded.py::test_"
BLOCKS = "tests/train/test_blocks.py::test_"
TWICE = "tests/runtime/test_twice.py::test_"
INFERENCE = "tests/inference/test_resume.py::test_"
SYSTEMS = "tests/runtime/test_systems.py::test_"
DOCTOR, MEASURES = "tests/runtime/test_doctor.py::test_", "tests/rlhf/test_measures.py::test_"
TRACKING = "tests/runtime/test_tracking.py::test_"
LOSSES, MODELS = (f"tests/rlhf/test_{name}.py::test_" for name in ("losses", "models"))
OPTIONS = "tests/models/test_template_options.py::test_"
DATASET = "tests/data/test_pairs.py::test_"
RECORDS, PAGE = "tests/rlhf/test_token_records.py::test_", "tests/report/test_token_view.py::test_"
KINDS = "tests/proof/test_architectures.py::test_the_page_says_what_is_true_of_each_kind"
TRAINERS, ORACLES, SCRIPTS = (f"tests/rlhf/test_{name}.py::test_" for name in ("trainers", "oracles", "scripts"))
GENERATION, LOADER, ADMISSION = (
    f"tests/models/test_{name}.py::test_" for name in ("generation", "loader", "admission")
)
ROUTER, ROUTER_STEPS = (f"tests/{room}/test_router.py::test_" for room in ("models", "rlhf"))
LEAN, ATTENTION, LORA, DECODING, LOGPROBS = (
    f"tests/models/fast/test_{name}.py::test_" for name in ("layers", "attention", "lora", "decoder", "head")
)
QUANTISED, QLORA = "tests/models/fast/test_quantised.py::test_", "tests/rlhf/test_qlora.py::test_"
IS_LORA = f"{QUANTISED}qlora_is_lora_on_the_rounded_weights_before_and_after_an_evaluation[nf4-float32]"
REWARDS, REWARD_STEPS = (f"tests/{room}/test_rewards.py::test_" for room in ("data", "rlhf"))
NOTEBOOK = "tests/notebooks/test_notebook.py::test_"
BIAS, REFUSALS, TOXICITY, QUALITY, BESIDE = (
    f"tests/report/test_{name}.py::test_" for name in ("bias", "refusals", "toxicity", "text_quality", "beside")
)
CHECKS = "tests/data/test_checks.py::test_"
ANSWER = "tests/data/test_real_answer.py::test_"
COMPARE, STUDY = (f"tests/report/test_{name}.py::test_" for name in ("compare", "study"))
PROCEDURAL, GSM8K = (f"tests/data/test_{name}.py::test_" for name in ("procedural", "gsm8k"))
PLAN = "tests/models/test_plan.py::test_"
CHECKPOINT = "tests/runtime/test_checkpoint.py::test_"
CONSOLE = "tests/runtime/test_console.py::test_"
CTRL_C = "tests/runtime/test_ctrl_c.py::test_"
CURVES = "tests/runtime/test_curves.py::test_"
NOTHING_MASKED = "tests/proof/test_verify.py::test_nothing_masked_reaches_losses_advantages_statistics_or_metrics"

ACCUMULATION = f"{STEPS}steps_do_not_depend_on_accumulation"
MICRO_BATCHES = f"{TRAINERS}steps_do_not_depend_on_the_split_into_micro_batches"
UNEVEN = f"{TRAINERS}two_uneven_processes_take_the_steps_of_one_with_clipping_on"
TWO_RANKS = f"{DDP}two_ranks_with_1_and_9_counted_tokens_take_the_step_of_one_process_with_clipping_on"
LIMIT = f"{TRAINERS}with_sgd_at_lr_1_and_a_limit_of_1e_6_weights_move_by_at_most_1e_6"
POISON = f"{LOSSES}mask_before_exp"
RECOMPUTES = f"{TRAINERS}gradient_checkpointing_recomputes_and_changes_nothing"

FIRST_WAY = Mutant(
    "packed-apart", "the first way is taken, right or not", "models/admission.py",
    "if far <= TOLERANCE[dtype]:", "if True:",
    (f"{ADMISSION}packed_samples_have_the_loss_that_they_have_alone[opt, ignores positions]",), "_try_ways",
)  # fmt: skip

MUTANTS = [
    # loss and gradient book-keeping
    Mutant(
        "token-mean", "the mean over micro-batches of their means (plain loop)", "train/train_lm.py",
        "nats = nats / count  # each",
        "nats = nats / blocks.counted(rows) / len(micro_batches)  # each",
        (f"{STEPS}the_loss_of_micro_batches_with_1_and_9_tokens_and_losses_2_and_1_is_1_1", ACCUMULATION),
    ),
    Mutant(
        "token-mean", "the mean over micro-batches of their means (AMP)", "train/train_lm_amp_ckpt.py",
        "nats = nats / count  # each",
        "nats = nats / blocks.counted(rows) / len(micro_batches)  # each",
        (ACCUMULATION,),
    ),
    Mutant(
        "token-mean", "DPO's loss is divided by the micro-batch", "rlhf/dpo_train.py",
        "(losses.sum() + policy.router.term / 2) / config.batch_size", "losses.mean()",
        (f"{MICRO_BATCHES}[dpo]", f"{ORACLES}20_steps_of_dpo_have_the_losses_of_trls_dpo_trainer"),
    ),
    Mutant(
        "token-mean", "the reward model's loss is divided by the micro-batch", "rlhf/train_reward_model.py",
        " * (len(batch) / config.batch_size)", "",
        (f"{MICRO_BATCHES}[reward]",),
    ),
    Mutant(
        "token-mean", "PPO's losses are divided by the micro-batch", "rlhf/ppo_train.py",
        "batch.mask, config.clip_eps, minibatch.tokens\n",
        "batch.mask, config.clip_eps, None\n",
        (f"{MICRO_BATCHES}[ppo]",),
    ),
    Mutant(
        "token-mean", "GRPO's loss is divided by the micro-batch", "rlhf/grpo_train.py",
        "minibatch.tokens, minibatch.sequences,",
        "None, None,",
        (f"{MICRO_BATCHES}[grpo]",),
    ),
    Mutant(
        "token-mean-ranks", "each process divides by its own tokens", "train/train_lm_ddp.py",
        "count = sum(blocks.counted(rows) for rows in micro_batches)",
        "count = max(1, sum(blocks.counted(rows) for rows in processes.share(micro_batches)))",
        (f"{TWO_RANKS}[sgd]",),
    ),
    Mutant(
        "token-mean-ranks", "DDP's average is taken for a sum: Adam would hide it, clipping does not",
        "train/train_lm_ddp.py",
        "nats * processes.world_size", "nats",
        (f"{TWO_RANKS}[sgd]",),
    ),
    Mutant(
        "token-mean-ranks", "gradients are averaged over processes", "runtime/processes.py",
        "flat = self.sum(flat)",
        "flat = self.sum(flat) / self.world_size",
        (UNEVEN,),
    ),
    Mutant(
        "token-mean-ranks", "GRPO divides by the tokens of its own process", "rlhf/rollouts.py",
        "processes.sum(mine).tolist()", "mine.tolist()",
        (f"{UNEVEN}[grpo]",),
    ),
    Mutant(
        "ranks-equal", "the forward pass skips the wrapper, and with it the all-reduce", "train/train_lm_ddp.py",
        "summed_loss(blocks.batch(rows, device))", "summed_loss.module(blocks.batch(rows, device))",
        (f"{DDP}parameters_are_equal_on_all_ranks[sgd]",),
    ),
    Mutant(
        "ranks-equal", "gradients are not added up over processes", "runtime/processes.py",
        "flat = self.sum(flat)",
        "flat = flat.clone()",
        (f"{TRAINERS}parameters_are_equal_on_all_ranks_after_each_step",),
    ),
    Mutant(
        "sharded", "FSDP's average is taken for a sum", "train/train_lm_fsdp.py",
        "nats * processes.world_size", "nats",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[fsdp-2-tied]",),
    ),
    Mutant(
        "sharded", "the norm is that of this process's shards", "train/sharded.py",
        "[p.grad for p in parameters if p.grad is not None]).full_tensor()",
        "[p.grad.to_local() for p in parameters if p.grad is not None])",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[fsdp-2-tied]",),
        "norm",
    ),
    Mutant(
        "sharded", "a pass that only makes up the number counts", "runtime/processes.py",
        "(items[0], 0)", "(items[0], 1)",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[fsdp-2-tied]",),
    ),
    Mutant(
        "sharded", "a tied head gets a group of its own", "train/train_lm_fsdp.py",
        "    for layer in layers:", "    for layer in [*layers, model.get_output_embeddings()]:",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[fsdp-2-tied]",),
    ),
    Mutant(
        "sharded", "the parts of the weights are those of the oldest checkpoint", "runtime/checkpoint.py",
        'self.folder / f"step-{step:08d}" / SHARDS, mesh)', "self._all()[0] / SHARDS, mesh)",
        (f"{SHARDED}killed_in_a_step_or_while_it_saves_it_ends_bitwise_as_if_it_never_had_been[fsdp]",),
    ),
    Mutant(
        "sharded", "the gradient at the border of a block is that of one process", "train/tensor_parallel.py",
        "return _summed(gradient)", "return gradient",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[tp-2-tied]",),
    ),
    Mutant(
        "sharded", "the norm counts a whole weight once for each process", "train/tensor_parallel.py",
        "(self.processes.sum(of_parts.square()) + of_whole.square())",
        "self.processes.sum(of_parts.square() + of_whole.square())",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[tp-2-tied]",),
    ),
    Mutant(
        "sharded", "query heads are divided without regard to their key-value heads", "train/tensor_parallel.py",
        "                self._split(linear, 0, groups)  # a group",
        "                self._split(linear, 0, linear.out_features // attention.head_dim)  # a group",
        (f"{SHARDED}five_adamw_steps_with_clipping_are_those_of_one_process[tp-2-tied]",),
    ),
    Mutant(
        "sharded", "an unknown attention is split like Llama's", "train/tensor_parallel.py",
        "if type(layer.self_attn).__name__ not in ATTENTIONS:", "if False:",
        (f"{SHARDED}tensor_parallelism_refuses_an_unknown_model_by_name[granite-attention is a GraniteAttention]",),
    ),
    Mutant(
        "sharded", "moments that go on are views, which the fused AdamW of a CPU takes for contiguous",
        "train/tensor_parallel.py",
        ".of(whole).contiguous()", ".of(whole)",
        (f"{SHARDED}killed_in_a_step_or_while_it_saves_it_ends_bitwise_as_if_it_never_had_been[tp]",),
    ),
    Mutant(
        "sharded", "the moments of AdamW are not put together for a checkpoint", "train/tensor_parallel.py",
        "return _kept(self.split.joined(x, weight))", "return x",
        (f"{SHARDED}a_run_whose_processes_die_goes_on_with_three_and_then_with_one[tp]",),
    ),
    Mutant(
        "one-all-reduce", "every micro-batch reduces", "train/train_lm_ddp.py",
        "with nullcontext() if last else", "with nullcontext() if True else",
        (f"{DDP}one_all_reduce_set_per_optimizer_step",),
    ),
    Mutant(
        "one-all-reduce", "gradients are reduced twice a step", "runtime/processes.py",
        "        flat = self.sum(flat)",
        "        self.sum(flat.clone())\n        flat = self.sum(flat)",
        (f"{TRAINERS}gradients_are_reduced_once_a_step",),
    ),
    Mutant(
        "data-order", "each epoch has the same order", "data/order.py",
        "seed * stride + epoch)",
        "seed * stride)",
        (f"{COMMON}data_order_differs_between_epochs_and_is_the_same_for_equal_seed_and_epoch",),
    ),
    Mutant(
        "data-order", "rows that do not fill a step are left out", "train/common.py",
        "return math.ceil(rows / config.batch_size)",
        "return rows // config.batch_size",
        (f"{COMMON}each_epoch_sees_each_row_once_over_all_ranks",),
    ),
    Mutant(
        "data-order", "every process evaluates everything", "train/common.py",
        "in_batches(processes.share(rows), batch_size)",
        "in_batches(rows, batch_size)",
        (f"{COMMON}evaluation_counts_each_token_once_whatever_the_batch_and_the_number_of_ranks",),
    ),
    Mutant(
        "data-order", "prompts and pairs come in the same order each epoch", "data/order.py",
        "epoch_order(total, seed, epoch, stride=100_003)",
        "epoch_order(total, seed, 0, stride=100_003)",
        (f"{TRAINERS}prompts_come_in_another_order_each_epoch_and_the_ranks_together_see_each_once",),
    ),
    Mutant(
        "data-order", "every process evaluates every pair", "rlhf/dpo_train.py",
        "stage.processes.share(sorted(pairs, key=pair_length))",
        "sorted(pairs, key=pair_length)",
        (f"{TRAINERS}held_out_pairs_are_counted_once_over_the_ranks[3]",),
    ),
    Mutant(
        "schedule", "the cosine ends at 0", "train/updates.py",
        "lr * (min_lr_ratio + (1 - min_lr_ratio) * 0.5", "lr * (0.5",
        (f"{COMMON}learning_rate_warms_up_peaks_and_ends_at_its_minimum",),
    ),
    Mutant(
        "schedule", "a skipped step counts (AMP)", "train/train_lm_amp_ckpt.py",
        "            continue  # AMP",
        "            updates.count += 1  # AMP",
        (f"{AMP}the_schedule_stands_still_on_skipped_steps_and_ends_at_its_minimum",),
    ),
    Mutant(
        "schedule", "a skipped step counts (DPO)", "train/updates.py",
        "            return False\n",
        "            self.count += 1\n            return False\n",
        (f"{TRAINERS}the_schedule_counts_optimizer_steps_and_stands_still_on_skipped_ones",), "Updates.step",
    ),
    Mutant(
        "schedule", "PPO's schedule counts rollouts", "train/updates.py",
        "lr_at(self.count + 1, total,",
        "lr_at(step, total,",
        (f"{TRAINERS}the_schedule_ends_at_its_minimum[ppo]",),
    ),
    Mutant(
        "clipping", "scaled gradients are clipped", "train/updates.py",
        "        scaler.unscale_(optimizer)  # clipping must see the true gradients\n",
        "",
        (f"{AMP}the_norm_is_that_of_the_unscaled_gradients_and_the_limit_holds",),
    ),
    Mutant(
        "clipping", "nothing is clipped", "train/updates.py",
        "clip_grad_norm_(self.parameters, config.max_grad_norm)",
        "clip_grad_norm_(self.parameters, 1e9)",
        (LIMIT, f"{DDP}with_sgd_at_lr_1_and_a_limit_of_1e_6_weights_move_by_at_most_1e_6[two]"),
    ),
    Mutant(
        "clipping", "each tensor is clipped by its own norm", "train/updates.py",
        "torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm)",
        "max(torch.nn.utils.clip_grad_norm_([p], config.max_grad_norm) for p in self.parameters)",
        (LIMIT,),
    ),
    Mutant(
        "clipping", "the norm that is logged is the one after clipping", "train/updates.py",
        "self.grad_norm, scale = norm.item(),",
        "self.grad_norm, scale = norm.clamp(max=config.max_grad_norm).item(),",
        (LIMIT,),
    ),
    Mutant(
        "mask-before-exp", "PPO masks after exp", "rlhf/ppo_train.py",
        "torch.where(counted, logprobs - old_logprobs, 0.0).exp()  # masked before exp",
        "torch.where(counted, (logprobs - old_logprobs).exp(), 1.0)",
        (POISON,),
    ),
    Mutant(
        "mask-before-exp", "GRPO masks after exp", "rlhf/grpo_train.py",
        "log_ratio = torch.where(counted, logprobs - old_logprobs, 0.0)  # masked before exp",
        "log_ratio = logprobs - old_logprobs  # masked after exp",
        (POISON,),
    ),
    Mutant(
        "mask-before-exp", "the KL in GRPO's loss masks after exp", "rlhf/grpo_train.py",
        "torch.where(counted, ref_logprobs - old_logprobs, 0.0).expm1() + ratio * d - log_ratio.expm1()",
        "ratio * ((ref_logprobs - logprobs).expm1() + logprobs - ref_logprobs)",
        (POISON,),
    ),
    Mutant(
        "mask-before-exp", "means multiply by the mask", "rlhf/utils.py",
        "    x = torch.where(mask.bool(), x, 0.0)\n    if dim is None:", "    x = x * mask\n    if dim is None:",
        (f"{LOSSES}masked_mean_ignores_what_is_masked",),
    ),
    Mutant(
        "mask-before-exp", "whitening multiplies by the mask", "rlhf/utils.py",
        "    x = torch.where(mask, x, 0.0)\n    sums", "    x = x * mask\n    sums",
        (NOTHING_MASKED,),
    ),
    Mutant(
        "mask-before-exp", "the KL that is logged multiplies by the mask", "rlhf/steps.py",
        'kl = torch.where(mask.bool(), kl_estimate(logprobs, ref_logprobs, "k3"), 0.0)',
        'kl = kl_estimate(logprobs, ref_logprobs, "k3") * mask',
        (NOTHING_MASKED,),
    ),
    Mutant(
        "mask-before-exp", "PPO's rewards multiply by the mask", "rlhf/ppo_train.py",
        'torch.where(counted, -kl_coef * kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)',
        '-kl_coef * kl_estimate(logprobs, ref_logprobs, "k1") * mask',
        (NOTHING_MASKED,),
    ),
    Mutant(
        "mask-before-exp", "GAE multiplies by the mask", "rlhf/ppo_train.py",
        "rewards, values = torch.where(counted, rewards, 0.0), torch.where(counted, values, 0.0)",
        "rewards, values = rewards * mask, values * mask",
        (NOTHING_MASKED,),
    ),
    Mutant(
        "mask-before-exp", "the value loss multiplies by the mask", "rlhf/ppo_train.py",
        "(torch.where(counted, x, 0.0) for x in (values, old_values, returns))",
        "(x * mask for x in (values, old_values, returns))",
        (NOTHING_MASKED,),
    ),
    Mutant(
        "float32-softmax", "log-softmax in the dtype of the weights", "models/fast/head.py",
        "torch.log_softmax(logits, -1, out=logits)",
        "logits.bfloat16().log_softmax(-1).to(logits.dtype)",
        (f"{LOGPROBS}the_log_softmax_of_a_half_precision_model_is_computed_in_float32",),
    ),
    Mutant(
        "lean-layers", "a norm's gradient forgets that the length of its input is divided out", "models/fast/layers.py",
        "g.sub_(normed.mul_(along)).mul_(scale)", "g.mul_(scale)",
        (f"{LEAN}their_gradients_are_those_of_finite_differences",),
    ),
    Mutant(
        "lean-layers", "the last product's weight learns from the gate alone", "models/fast/layers.py",
        "(silu * up).flatten(0, -2)", "silu.flatten(0, -2)",
        (f"{LEAN}lean_layers_compute_what_those_of_transformers_do",),
    ),
    Mutant(
        "lean-layers", "logits that a backward pass has overwritten are taken again", "models/fast/head.py",
        "        ctx.made = None  # it", "        pass  # it",
        (f"{LOGPROBS}logits_that_stay_for_the_backward_pass_are_those_that_are_made_again",),
    ),
    Mutant(
        "lean-layers", "the norm of a half precision model is taken in half precision", "models/fast/layers.py",
        "exact = x.to(torch.promote_types(x.dtype, torch.float32))", "exact = x",
        (f"{LEAN}weights_of_half_precision_have_their_norms_in_float32",),
    ),
    Mutant(
        "lean-layers", "the summed loss ignores what it is divided by", "models/fast/head.py",
        "x.mul_(gradient) for x in", "x for x in",
        (f"{LOGPROBS}the_sum_in_pieces_has_the_value_and_gradients_of_the_definition",),
    ),
    Mutant(
        "lean-layers", "the gradient of the compiled loss leaves the target out", "models/fast/head.py",
        "logits.copy_(log_p.exp() - target.to(log_p.dtype))", "logits.copy_(log_p.exp())",
        (f"{LOGPROBS}the_loss_that_is_compiled_on_a_gpu_has_the_value_and_gradient_of_the_definition",
         f"{LOGPROBS}compiled_layers_and_loss_compute_what_plain_ones_do"),
    ),
    Mutant(
        "lean-layers", "of the weight's gradient only the last piece is left", "models/fast/head.py",
        "total.addmm_(d.T, hidden)", "total.copy_(d.T @ hidden)",
        (f"{LOGPROBS}the_sum_in_pieces_has_the_value_and_gradients_of_the_definition",
         f"{LOGPROBS}the_head_in_pieces_gives_the_values_and_gradients_of_the_definition"),
    ),
    # tokens, masks, templates
    Mutant(
        "eos-is-target", "packed answers are masked by the pad id", "rlhf/packing.py",
        "mask=filled([[1] * len(c) for c in completions], 0, longest)",
        "mask=filled([[int(t != pad_id) for t in c] for c in completions], 0, longest)",
        (f"{MODELS}sampled_ids_are_trained_on_and_eos_counts_though_it_is_the_pad_token",),
    ),
    Mutant(
        "eos-is-target", "blocks are masked by the pad id", "data/blocks.py",
        "mask = mask[:, 1:].copy()", "mask = mask[:, 1:] & (input_ids[:, 1:] != pad_id)",
        (f"{BLOCKS}only_the_completion_counts_and_the_stop_token_with_it",),
    ),
    Mutant(
        "stop-token", "an answer has no stop token", "models/tokens.py",
        "return [*ids, end_of_turn(tokenizer)]",
        "return [*ids]",
        (f"{LOADER}an_answer_ends_with_the_stop_token_in_every_template",),
    ),
    Mutant(
        "stop-token", "the stop token is not in the loss", "data/blocks.py",
        "[False] * len(kept) + [True] * len(c)", "[False] * len(kept) + [True] * (len(c) - 1) + [False]",
        (f"{BLOCKS}a_model_overfitted_on_four_rows_stops_by_itself",),
    ),
    Mutant(
        "one-renderer", "a second place renders prompts", "rlhf/rollouts.py",
        'self.ids = [prompt_ids(tokenizer, row["prompt"]) for row',
        'self.ids = [tokenizer.apply_chat_template([{"role": "user", "content": row["prompt"]}]) for row',
        (f"{LOADER}chat_templates_are_rendered_in_one_function_only",),
    ),
    Mutant(
        "one-renderer", "options of the chat template are not used", "models/tokens.py",
        "add_generation_prompt=add_generation_prompt, **used_options(tokenizer)",
        "add_generation_prompt=add_generation_prompt",
        (f"{OPTIONS}a_prompt_is_what_transformers_renders_with_these_options",),
    ),
    Mutant(
        "one-renderer", "saved options win over given ones", "models/tokens.py",
        "{**saved, **(given or {})}", "{**(given or {}), **saved}",
        (f"{OPTIONS}a_trained_model_keeps_the_options_and_a_given_one_wins",),
    ),
    Mutant(
        "one-renderer", "an option that the template does not use is ignored", "models/tokens.py",
        "    if unknown:", "    if False:", (f"{OPTIONS}what_the_template_does_not_use_is_refused_by_name",),
    ),
    Mutant(
        "one-renderer", "a policy is trained without the options", "rlhf/policy.py",
        "load_tokenizer(config.model_name, config.chat_template_kwargs)", "load_tokenizer(config.model_name)",
        (f"{OPTIONS}every_place_that_loads_a_tokenizer_to_render_gives_it_the_options",),
    ),
    Mutant(
        "one-renderer", "a row's own options are ignored", "data/rows.py",
        '    "chat_template_kwargs",\n', "", (f"{OPTIONS}a_row_with_options_of_its_own_is_refused_and_never_ignored",),
    ),
    Mutant(
        "one-renderer", "the template's BOS and the tokenizer's", "models/tokens.py",
        "ids = tokenizer(text, add_special_tokens=False).input_ids\n    bos",
        "ids = tokenizer(text).input_ids\n    bos",
        (f"{LOADER}exactly_one_bos_where_the_tokenizer_has_one",),
    ),
    Mutant(
        "one-renderer", "no BOS", "models/tokens.py",
        "ids = [bos, *ids]", "ids = [*ids]",
        (f"{LOADER}exactly_one_bos_where_the_tokenizer_has_one",),
    ),
    Mutant(
        "empty-completion", "a row without a completion is taken", "data/encoding.py",
        "    if len(c) < 2:", "    if len(c) < 1:",
        (f"{BLOCKS}a_row_that_would_teach_nothing_is_an_error_that_names_it",
         f"{DATASET}an_empty_completion_is_an_error_that_names_the_row"),
    ),
    Mutant(
        "same-prompt-ids", "prompt and answer are tokenised in one piece", "data/encoding.py",
        "p, c = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion)\n",
        "p, c = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, completion)\n"
        "        whole = tokenizer(tokenizer.decode(p + c[:-1])).input_ids + c[-1:]\n"
        "        p, c = whole[: len(p)], whole[len(p) :]\n",
        (f"{DATASET}prompt_ids_are_the_same_in_chosen_and_rejected_where_the_boundary_could_merge",),
    ),
    Mutant(
        "same-prompt-ids", "the prompt is cut for one answer alone", "data/pairs.py",
        "prompt_tokens = min(a.prompt, b.prompt, key=len)", "prompt_tokens = b.prompt",
        (f"{DATASET}prompt_ids_stay_the_same_when_one_answer_is_longer_and_the_prompt_is_cut",),
    ),
    Mutant(
        "truncation", "a long row is cut from the right", "data/encoding.py",
        "p = p[len(p) + len(c) - max_length :]", "p, c = (p + c)[: len(p)][:max_length], (p + c)[len(p) : max_length]",
        (f"{DATASET}truncation_never_erases_a_completion",
         f"{BLOCKS}rows_cut_or_dropped_are_counted_and_a_completion_is_never_cut"),
    ),
    Mutant(
        "truncation", "dropped rows are not counted", "data/pairs.py",
        'counts["dropped"] += 1', 'counts["dropped"] += 0',
        (f"{DATASET}truncation_never_erases_a_completion",),
    ),
    Mutant(
        "packed-apart", "positions do not restart: samples of a block see each other", "data/blocks.py",
        "position_ids[i, start:end] = np.arange(len(piece))", "position_ids[i, start:end] = np.arange(start, end)",
        (f"{BLOCKS}positions_restart_and_text_repeats_one_token_of_context",
         f"{BLOCKS}a_packed_sample_has_the_logits_it_has_alone"),
    ),
    Mutant(
        "packed-apart", "a sample's first token is predicted from the sample before", "data/blocks.py",
        "mask[i, start + 1 : end] = piece.counts[1:]", "mask[i, start:end] = piece.counts",
        (f"{BLOCKS}the_loss_of_one_sample_has_no_gradient_with_respect_to_another",
         f"{BLOCKS}positions_restart_and_text_repeats_one_token_of_context"),
    ),
    Mutant(
        "packed-apart", "answers in a row see each other", "rlhf/packing.py",
        "attention_mask=(causal & (same | sees_prompt))[:, None]", "attention_mask=causal.expand_as(same)[:, None]",
        (f"{MODELS}packed_answers_do_not_see_each_other", f"{MODELS}packed_rows_give_each_answer_what_it_gets_alone"),
    ),
    Mutant(
        "packed-apart", "an answer's positions go on from the one before", "rlhf/packing.py",
        "positions[-1] += range(len(prompt), len(prompt) + len(completion))",
        "positions[-1] += range(len(rows[-1]) - len(completion), len(rows[-1]))",
        (f"{MODELS}packed_rows_give_each_answer_what_it_gets_alone",
         f"{MODELS}packed_gradients_equal_separate_ones"),
    ),
    Mutant(
        "packed-apart", "what is not seen is seen a little in bf16", "models/fast/attention.py",
        "torch.finfo(dtype).min / 2", "-10.0",
        (f"{ATTENTION}what_is_not_seen_has_no_weight_and_padding_that_sees_nothing_stays_finite",),
    ),
    Mutant(
        "packed-apart", "causal attention in bf16 sees one token ahead", "models/fast/attention.py",
        ".tril(keys - length)", ".tril(keys - length + 1)",
        (f"{ATTENTION}half_precision_is_float64_rounded[dtype0-0.03-causal-128]",),
    ),
    Mutant(
        "packed-apart", "a block of queries does not read the last key that it sees", "models/fast/attention.py",
        "index[-1].item() + 1", "max(index[-1].item(), 1)",
        (f"{ATTENTION}a_block_of_queries_reads_the_keys_that_it_sees", f"{ATTENTION}half_precision_is_float64_rounded"),
    ),
    Mutant(
        "packed-apart", "a block with gaps among its keys does not read the first", "models/fast/attention.py",
        "keys = index\n", "keys = index[1:]\n",
        (f"{ATTENTION}keys_that_no_query_of_a_block_sees_are_left_out",),
    ),
    Mutant(
        "packed-apart", "a row that lies end to end begins one place late", "models/fast/attention.py",
        "places += range(r * width + (shared if r else 0), r * width + length)",
        "places += [r * width + (t + (r > 0)) % width for t in range(shared if r else 0, length)]",
        (f"{ATTENTION}a_model_reads_rows_end_to_end_as_it_reads_them_padded",),
    ),
    Mutant(
        "packed-apart", "what all prompts begin with learns from the first row alone", "models/fast/attention.py",
        "gradient.unflatten(0, rows.shape)[:, : rows.shared].sum(0, dtype=exact)",
        "gradient[: rows.shared].to(exact)",
        (f"{ATTENTION}rows_go_there_and_back_with_what_they_begin_with_once",
         f"{MODELS}packed_gradients_equal_separate_ones"),
    ),
    FIRST_WAY,
    Mutant(
        "packed-apart", "only the last tokens of a sequence are compared", "models/admission.py",
        "for at in (slice(LAST), slice(-LAST, None)):", "for at in (slice(-LAST, None),):",
        (f"{ADMISSION}completions_that_share_a_prompt_have_the_log_probs_that_they_have_alone[gpt_neo, short window]",),
        "apart",
    ),
    Mutant(
        "packed-apart", "a window keeps one token too many", "models/fast/attention.py",
        "from_here <= window", "from_here <= window + 1",
        (f"{ADMISSION}completions_that_share_a_prompt_have_the_log_probs_that_they_have_alone[mistral, window]",),
        "windowed", unchecked=True,
    ),
    Mutant(
        "adapter-off", "the adapter is in use when it is disabled", "models/fast/lora.py",
        "if self.disable_adapters or self.merged or", "if self.merged or",
        (f"{LORA}pefts_methods_work_on_it",),
    ),
    Mutant(
        "cost-follows-work", "the cache has memory for the longest completion from the start", "models/generation.py",
        "capacity = min(self.length + ROOM, self.longest)", "capacity = self.longest",
        ("tests/models/test_generation.py::test_a_short_completion_takes_no_memory_for_a_long_limit[decoder]",),
    ),
    Mutant(
        "cost-follows-work", "a CUDA graph goes on with the cache before it grew", "models/fast/decoder.py",
        "if seen.shape != self.shape:", "if self.shape is None or len(seen) != self.shape[0]:",
        ("tests/models/fast/test_decoder.py::test_a_cache_that_grows_is_recorded_again",),
    ),
    Mutant(
        "cost-follows-work", "freed pieces are never given back", "runtime/memory.py",
        "now - _level >= GROWTH", "now - _level >= 1e18",
        ("tests/runtime/test_memory.py::test_pieces_that_nothing_fits_into_are_given_back_once_they_are_many",),
    ),
    Mutant(
        "cost-follows-work", "a group is never cut", "rlhf/rollouts.py",
        "for i in range(0, len(group), size)):", "for i in range(0, len(group), 10**6)):",
        (f"{TRAINERS}a_pass_holds_at_most_micro_batch_size_completions[grpo]",),
    ),
    Mutant(
        "kl-gradients", "ratio * k3 as a difference of two huge numbers", "rlhf/grpo_train.py",
        "return torch.where(counted, ref_logprobs - old_logprobs, 0.0).expm1() + ratio * d - log_ratio.expm1()",
        "return ratio * kl_estimate(d, torch.zeros_like(d), \"k3\")",
        (f"{LOSSES}ratio_k3_has_its_gradient_far_from_the_reference",),
    ),
    Mutant(
        "group-advantages", "rewards become float32 before their mean is taken off", "rlhf/rollouts.py",
        "dtype=torch.float64) for group in self.grouped", "dtype=torch.float32) for group in self.grouped",
        (f"{LOSSES}large_rewards_have_the_advantages_of_their_differences",),
    ),
    Mutant(
        "shared-cores", "the idle thread has no team of OpenMP", "runtime/spinning.py",
        "torch.zeros(1 << 20)", "torch.zeros(1)",
        ("tests/runtime/test_spinning.py::test_an_idle_thread_is_there_while_cores_are_too_few",),
    ),
    Mutant(
        "shared-cores", "a program's own work counts as that of others", "runtime/spinning.py",
        ' - time.process_time()', "",
        ("tests/runtime/test_spinning.py::test_only_what_others_take_counts",),
    ),
    Mutant(
        "resume-precision", "a scaler takes the empty state of another precision", "train/updates.py",
        'if state["scaler"]:', "if True:",
        ("tests/rlhf/test_precision.py::test_a_loss_scale_is_kept_where_the_precision_is",),
    ),
    Mutant(
        "resume-precision", "log-probs of the reference stay in the precision before", "rlhf/dpo_train.py",
        'if state.get("precision", self.stage.precision) == self.stage.precision:', "if True:",
        ("tests/rlhf/test_precision.py::test_dpo_compares_the_policy_with_a_reference_of_its_own_precision[fp32-True]",),
    ),
    Mutant(
        "targets", "the number of completions is not looked at", "report/targets.py",
        "apart and count >= ANSWERS", "apart",
        (f"{COMPARE}each_target_is_missed_alone_and_named_with_its_figure",),
    ),
    Mutant(
        "targets", "the number of pairs is not looked at", "report/targets.py",
        "right >= RIGHT and pairs >= PAIRS", "right >= RIGHT",
        (f"{COMPARE}each_target_is_missed_alone_and_named_with_its_figure",),
    ),
    Mutant(
        "order-of-methods", "each method has other prompts in a draw", "report/intervals.py",
        "found[method] = (counts @ scores.T * weights).sum(1)",
        "found[method] = (rng.permutation(counts) @ scores.T * weights).sum(1)",
        (f"{STUDY}bootstrap_means_spread_as_seeds_and_prompts_do",),
    ),
    Mutant(
        "order-of-methods", "seeds are not drawn", "report/intervals.py",
        "(counts @ scores.T * weights).sum(1)", "(counts @ scores.T).mean(1)",
        (f"{STUDY}bootstrap_means_spread_as_seeds_and_prompts_do",),
    ),
    Mutant(
        "order-of-methods", "any fall is a break", "report/study_page.py", "if sure(fall) < 0:", "if fall['mean'] < 0:",
        (f"{STUDY}over_optimisation_is_seen_only_where_gold_falls_beyond_its_interval",),
    ),
    Mutant(
        "splits-apart", "the parts of a made task have seeds side by side", "data/procedural.py",
        "APART = 1_000_000", "APART = 1",
        (f"{PROCEDURAL}no_question_is_in_two_parts_though_near_seeds_share_questions",),
    ),
    Mutant(
        "splits-apart", "questions that come again are kept", "data/procedural.py",
        "if text not in seen:", "if True:", (f"{PROCEDURAL}questions_that_come_again_are_left_out",),
    ),
    Mutant(
        "verifier", "the rules for instructions come before the verifier", "data/checks.py",
        'if check["name"] in VERIFIERS:', 'if check["name"] in VERIFIERS and words(text) and not is_degenerate(text):',
        (f"{PROCEDURAL}a_verifier_judges_what_has_no_word_and_what_repeats",), "score",
    ),
    Mutant(
        "verifier", "the whole completion is judged, tags or not", "data/procedural.py",
        "text.strip() if answer is None else answer", "text.strip()",
        (f"{PROCEDURAL}the_gold_score_is_what_the_tasks_own_verifier_gives",),
    ),
    Mutant(
        "last-number", "GSM8K: the first number after the mark of the whole answer", "data/gsm8k.py",
        "numbers(final)[-1:]", "numbers(answer)[:1]", (f"{GSM8K}the_last_number_decides[72-#### 720-False]",
        f"{GSM8K}the_last_number_decides[72-The answer is \\\\boxed{{72}}.-True]"),
    ),
    Mutant(
        "starts", "starts are looked at after measuring", "report/compare.py",
        "    check_starts(config, methods)\n", "",
        ("tests/report/test_compare.py::test_a_run_from_another_start_is_refused_before_anything_is_measured",),
    ),
    Mutant(
        "starts", "any start counts as the base", "report/compare.py",
        "return a == b or ", "return True or ",
        ("tests/report/test_compare.py::test_the_way_of_a_run_to_the_base_is_followed",),
    ),
    Mutant(
        "held-out", "no prompt is held out by chance", "data/pairs.py",
        "if min(places) < fraction else second", "if min(places) < fraction else fraction",
        ("tests/data/test_pairs.py::test_a_held_out_split_exists_whatever_the_hashes_are",),
    ),
    Mutant(
        "held-out", "held-out documents that cannot be used stay", "train/common.py",
        "if not any(gives_samples(tokenizer, document, size) for document in held):", "if False:",
        ("tests/train/test_common.py::test_held_out_documents_that_cannot_be_used_are_replaced",),
    ),
    Mutant(
        "text-in-pieces", "pieces are joined where they begin, agree or not", "models/tokens.py",
        "if run and spans[i + run - 1, 1] - place >= OVERLAP // 2:", "if True:",
        ("tests/train/test_blocks.py::test_a_text_in_pieces_has_the_tokens_of_the_whole[512-128-tiny-llama]",
         "tests/train/test_blocks.py::test_a_text_in_pieces_has_the_tokens_of_the_whole[64-32-one word]"),
    ),
    Mutant(
        "text-in-pieces", "a text is tokenised at once", "models/tokens.py",
        "begin, end, known = 0, min(PIECE, len(text)), 0", "begin, end, known = 0, len(text), 0",
        ("tests/train/test_blocks.py::test_no_piece_is_longer_than_it_must_be",),
    ),
    Mutant(
        "text-in-pieces", "a tokenizer learns from pieces that cut words", "models/scratch.py",
        'r"\\w(?= )"', 'r"\\w"',
        ("tests/train/test_blocks.py::test_a_tokenizer_learns_from_pieces_what_it_learns_from_the_whole",),
    ),
    Mutant(
        "left-padding", "positions count padding (forward)", "models/fast/head.py",
        "(attention_mask.long().cumsum(-1) - 1).clamp(min=0)", "torch.ones_like(attention_mask).cumsum(-1) - 1",
        (f"{MODELS}left_padded_batch_gives_each_row_what_it_gets_alone_in_forward[tiny-gpt2]",),
    ),
    Mutant(
        "left-padding", "positions count padding (prefill)", "models/generation.py",
        "(mask.cumsum(-1) - 1)[:, shared:].clamp(min=0)", "(torch.ones_like(mask).cumsum(-1) - 1)[:, shared:]",
        (f"{GENERATION}greedy_equals_transformers_on_a_padded_batch[tiny-gpt2]",), unchecked=True,
    ),
    Mutant(
        "left-padding", "new tokens see the padding", "models/generation.py",
        "self.seen = torch.cat([mask, room], 1)", "self.seen = torch.cat([torch.ones_like(mask), room], 1)",
        (f"{GENERATION}a_row_gets_in_a_batch_what_it_gets_alone",), unchecked=True,
    ),
    Mutant(
        "left-padding", "all rows go on at the same position", "models/generation.py",
        "self.next_position = mask.sum(-1)", "self.next_position = torch.ones_like(mask).sum(-1)",
        (f"{GENERATION}greedy_equals_transformers_on_a_padded_batch",), unchecked=True,
    ),
    Mutant(
        "sampled-ids", "rollouts are encoded again from their text", "rlhf/rollouts.py",
        "completions=generation.completions,",
        "completions=[self.tokenizer(self.tokenizer.decode(c)).input_ids for c in generation.completions],",
        (f"{TRAINERS}rollouts_train_on_the_sampled_ids",),
    ),
    Mutant(
        "sampled-ids", "stored groups are encoded again from their text", "data/pairs.py",
        "        if ids is None:\n", "        if ids:\n",
        (f"{DATASET}groups_train_on_the_stored_ids_not_on_their_text",),
    ),
    # the router's auxiliary loss
    Mutant(
        "token-mean", "the auxiliary loss of a row counts once, however many tokens the row has", "models/router.py",
        "self.measure(real, mask.sum(-1))", "self.measure(real, mask.sum().expand(len(mask)) / len(mask))",
        (f"{ROUTER}values_and_gradients_are_those_of_transformers_row_by_row[mixtral]",
         f"{ROUTER}any_split_into_micro_batches_gives_the_same_step"),
    ),
    Mutant(
        "token-mean", "the router is balanced over padding, too", "models/router.py",
        "weight = (real / real", "real = torch.ones_like(real)\n    weight = (real / real",
        (f"{ROUTER}values_and_gradients_are_those_of_transformers_row_by_row[mixtral]",
         f"{ROUTER}two_experts_and_three_tokens_by_hand"),
    ),
    Mutant(
        "token-mean", "the router's auxiliary loss has no gradient", "models/router.py",
        "return gradient, gradient", "return gradient, None",
        (f"{ROUTER}values_and_gradients_are_those_of_transformers_row_by_row[qwen3_moe]",),
    ),
    Mutant(
        "packed-apart", "the router is balanced over what the first row shares", "rlhf/packing.py",
        "index = torch.where(place < self.rows.shared, place, index)", "index = index.clamp(min=0)",
        (f"{ROUTER_STEPS}each_sequence_has_the_loss_and_gradients_that_transformers_gives_it_alone"
         "[mixtral-ragged rows]",),
    ),
    Mutant(
        "token-mean-ranks", "the router's auxiliary loss is a mean over a pass", "rlhf/grpo_train.py",
        "policy.router.term / minibatch.sequences", "policy.router.term / len(batch.mask)",
        (f"{ROUTER_STEPS}two_processes_in_small_passes_take_the_steps_of_one_in_large_passes[grpo]",),
    ),
    Mutant(
        "token-mean", "completions without an advantage do not train the router", "rlhf/grpo_train.py",
        "always = bool(config.kl_coef or policy.router.coefficient)", "always = bool(config.kl_coef)",
        (f"{ROUTER_STEPS}completions_without_an_advantage_train_the_router",),
    ),
    Mutant(
        "left-padding", "decoding asks for the router's logits", "models/generation.py",
        "with _decode_attention(model), without_router_logits(model):", "with _decode_attention(model):",
        (f"{ROUTER}decoding_does_not_ask_for_the_logits_and_takes_the_fast_way[mixtral]",),
    ),
    Mutant(
        "mask-before-exp", "clipfrac counts a ratio outside the range whatever the advantage", "rlhf/steps.py",
        "((ratio > 1 + clip_high) & (advantages > 0))", "(ratio > 1 + clip_high)",
        (f"{LOSSES}clipfrac_counts_the_tokens_whose_loss_has_no_gradient",),
    ),
    Mutant(
        "reward-left-out", "a run that ends names the checkpoint of before it was saved", "runtime/run.py",
        "at = self.run.checkpoint", "at = None",
        (f"{CHECKPOINT}a_step_that_ends_the_run_is_not_counted_in_the_checkpoint_before_it",),
    ),
    Mutant(
        "data-order", "the tokens of the other processes are not counted", "rlhf/pairs.py",
        "count_tokens(sum(pair_length(self.train[i]) for i in self.indices(step)))",
        "count_tokens(sum(map(pair_length, self.mine(step))))",
        ("tests/rlhf/test_rates.py::test_a_step_on_pairs_counts_the_pairs_of_all_processes",),
    ),
    Mutant(
        "stop-token", "a stored completion that was cut gets a stop token", "data/pairs.py",
        "[c[:-1] if is_cut else c for", "[c for",
        (f"{DATASET}a_group_says_how_its_completions_ended_and_text_that_was_cut_has_no_stop_token",),
    ),
    Mutant(
        "tracked-once", "an error of wandb's service is a traceback", "runtime/tracking.py",
        "    except Exception as error:\n        why", "    except ValueError as error:\n        why",
        (f"{TRACKING}a_service_that_has_ended_is_one_sentence[3-12345-unix-/tmp/ended.sock]",),
    ),
    Mutant(
        "left-padding", "a layer without keys of its own is moved and grown", "models/generation.py",
        "return [layer for layer in layers if layer.is_initialized]", "return list(layers)",
        ("tests/models/test_shared_keys.py::test_rows_leave_and_the_cache_grows_where_layers_share_keys",),
    ),
    Mutant(
        "left-padding", "the check of a model lets no row leave", "models/generation.py",
        "            if k == 0 and batch.closes_up and len(chosen) > 1:", "            if False:",
        ("tests/models/test_shared_keys.py::"
         "test_the_check_of_a_model_sees_what_happens_when_rows_leave_and_the_cache_grows",),
    ),
    # architectures
    Mutant(
        "architectures", "an adapter around a layer that is never called stays", "models/fast/lora.py",
        "useless = without_effect(found)", "useless = []", (f"{KINDS}[jamba]",),
    ),
    Mutant(
        "architectures", "a router gets an adapter", "models/fast/lora.py",
        "if type(layer).forward not in plain]", "if False]", (f"{KINDS}[phimoe]",),
    ),
    Mutant(
        "architectures", "an adapted layer returns a view", "models/fast/lora.py",
        "        return out\n", "        return out.view(out.shape)\n", (f"{KINDS}[llama4_text]",),
    ),
    Mutant(
        "architectures", "an adapter is loaded as peft renames it", "models/loader.py",
        "        known[name].copy_(weight)", "        pass", (f"{KINDS}[laguna]",),
    ),
    Mutant(
        "architectures", "a model that is not causal is computed", "models/admission.py",
        "        _check_causal(model)\n", "", (f"{KINDS}[xlnet]",),
    ),
    Mutant(
        "architectures", "a manifest does not say which model was checked", "models/admission.py",
        '_roles.get(inner, "model")', '"model"',
        (f"{ADMISSION}the_next_manifest_has_each_check_since_the_last_one_by_the_name_of_its_model",),
    ),
    Mutant(
        "architectures", "a manifest has the checks of a run that failed", "runtime/provenance.py",
        "for when, result in _admission if when >= time.time() - seconds]", "for _, result in _admission]",
        (f"{ADMISSION}the_next_manifest_has_each_check_since_the_last_one_by_the_name_of_its_model",),
    ),
    Mutant(
        "architectures", "a body without a name is the whole model", "models/fast/head.py",
        "    if inner.base_model is not inner:\n        return", "    if True:\n        return",
        (f"{KINDS}[llama4_text]",), "body",
    ),
    Mutant(
        "architectures", "the sampler looks for a module inside an adapter's wrapper", "rlhf/sampler.py",
        "        while isinstance(module, LoraLayer):", "        while False:", (f"{KINDS}[ernie4_5_moe]",), "layer_of",
    ),
    Mutant(
        "architectures", "an error of transformers is a traceback", "models/fast/head.py",
        "return isinstance(error, kinds)", "return False", (f"{KINDS}[electra]",), "unsupported",
    ),
    Mutant(
        "architectures", "dropout as a function stays on", "rlhf/policy.py",
        'if isinstance(value, float) and "drop" in name:', "if False:",
        ("tests/proof/test_architectures.py::test_dropout_that_is_a_function_is_off",),
    ),
    Mutant(
        "architectures", "the policy trains in train mode", "rlhf/policy.py",
        "model.train(config.gradient_checkpointing)", "model.train()",
        ("tests/proof/test_architectures.py::test_a_model_that_is_another_in_train_mode_trains_in_eval_mode",),
    ),
    Mutant(
        "architectures", "that train mode is another model is not noticed", "models/admission.py",
        "if far > TOLERANCE[dtype] and not noise:", "if False:",
        ("tests/proof/test_architectures.py::test_a_model_that_is_another_in_train_mode_trains_in_eval_mode",),
    ),
    # DPO
    Mutant(
        "dpo-ln-2", "dropout stays on", "rlhf/policy.py",
        "    disable_dropout(model)\n    if config", "    if config",
        (f"{TRAINERS}the_first_dpo_loss_is_ln_2_exactly_with_dropout_in_the_config",),
    ),
    Mutant(
        "dpo-ln-2", "the reference trains along", "rlhf/policy.py",
        "reference = load_model(config.model_name, dtype=frozen_dtype(precision), device=device, merge_adapter=True)",
        "reference = model",
        (f"{TRAINERS}the_reference_is_frozen_and_never_changes",),
    ),
    Mutant(
        "dpo-ln-2", "the reference is in training mode", "rlhf/policy.py",
        "    model.eval()\n",
        "    model.train()\n",
        (f"{MODELS}dpo_at_step_0_is_ln_2_exactly_with_dropout_in_the_config",), "as_reference",
    ),
    Mutant(
        "dpo-sums", "DPO takes means over tokens", "rlhf/dpo_train.py",
        'policy.tokenizer, stage.device, config.loss_type == "ipo")',
        "policy.tokenizer, stage.device, True)",
        (f"{TRAINERS}dpo_uses_the_means_for_ipo_alone_and_logs_both_log_probs",),
    ),
    Mutant(
        "dpo-sums", "IPO takes sums", "rlhf/dpo_train.py",
        'policy.tokenizer, stage.device, config.loss_type == "ipo")',
        "policy.tokenizer, stage.device, False)",
        (f"{TRAINERS}dpo_uses_the_means_for_ipo_alone_and_logs_both_log_probs",),
    ),
    Mutant(
        "dpo-sums", "the signs of h are exchanged", "rlhf/dpo_train.py",
        "h = chosen - rejected", "h = rejected - chosen",
        (f"{LOSSES}dpo_worked_values",),
    ),
    Mutant(
        "dpo-sums", "IPO's target is 1 / beta", "rlhf/dpo_train.py",
        "1 / (2 * beta)", "1 / beta",
        (f"{LOSSES}dpo_worked_values[ipo-0.0-1.0]", f"{ORACLES}dpo_losses_and_gradients_are_trls[ipo-ipo-0.0]"),
    ),
    Mutant(
        "dpo-unused-option", "label smoothing is ignored in silence", "rlhf/dpo_train.py",
        'if label_smoothing and loss_type != "sigmoid":', "if False:",
        (f"{LOSSES}dpo_option_without_effect_is_an_error",),
    ),
    Mutant(
        "adapter-off", "the adapter stays on for the reference", "rlhf/policy.py",
        "with torch.no_grad(), model.disable_adapter():", "with torch.no_grad():",
        (f"{MODELS}the_reference_as_adapter_off_is_bitwise_the_base_model_after_training_too",),
    ),
    Mutant(
        "cached-reference", "the cache exchanges chosen and rejected", "rlhf/dpo_train.py",
        'pair["ref_chosen"], pair["ref_rejected"] = chosen, rejected\n        progress',
        'pair["ref_rejected"], pair["ref_chosen"] = chosen, rejected\n        progress',
        (f"{SCRIPTS}cached_reference_equals_fresh",),
    ),
    Mutant(
        "cached-reference", "the cache outlives the run, known by the data alone", "rlhf/dpo_train.py",
        "    batches = [] if known",
        "    known = known if known is not None else globals().setdefault('KEPT', "
        "{}).get(pairs[0]['where'])\n    if known is None:\n        both = [[x.tolist() for x "
        "in reference_logps([pair])] for pair in pairs]\n        KEPT[pairs[0]['where']] = "
        "torch.tensor(both, dtype=torch.float64)[..., 0]\n    batches = [] if known",
        (f"{TRAINERS}what_one_run_cached_is_of_no_use_to_another",),
    ),
    Mutant(
        "logged-apart", "one mean stands for both log-probs", "rlhf/dpo_train.py",
        "rejected_logps=rejected_logps.mean(),", "rejected_logps=(chosen_logps.mean() + rejected_logps.mean()) / 2,",
        (f"{TRAINERS}dpo_uses_the_means_for_ipo_alone_and_logs_both_log_probs",),
    ),
    # reward model
    Mutant(
        "score-at-end", "the score is read at the last column", "rlhf/reward_model.py",
        "return (attention_mask.bool() * index).argmax(-1)", "return (index + 0 * attention_mask).argmax(-1)",
        (f"{MODELS}the_score_is_read_at_the_last_real_token",),
    ),
    Mutant(
        "score-at-end", "the end is counted from the left", "rlhf/reward_model.py",
        "return (attention_mask.bool() * index).argmax(-1)", "return attention_mask.sum(-1) - 1",
        (f"{MODELS}the_score_is_read_at_the_last_real_token", f"{MODELS}score_at_end_uses_the_mask"),
    ),
    Mutant(
        "score-at-end", "a packed answer is scored one token early", "rlhf/packing.py",
        "last.append(tokens - 1)", "last.append(tokens - 2)",
        (f"{MODELS}packed_scores_equal_separate_ones",),
    ),
    Mutant(
        "score-format", "rollouts ask in another form", "rlhf/rollouts.py",
        'self.ids = [prompt_ids(tokenizer, row["prompt"]) for row',
        'self.ids = [tokenizer(row["prompt"]).input_ids for row',
        (f"{TRAINERS}an_answer_is_scored_in_the_form_in_which_the_model_was_trained",),
    ),
    Mutant(
        "bradley-terry", "the margin is added", "rlhf/reward_model.py",
        "difference = difference - margin", "difference = difference + margin",
        (f"{LOSSES}reward_loss_worked_values", f"{ORACLES}reward_loss_and_gradients_are_trls[True-0.0]"),
    ),
    Mutant(
        "bradley-terry", "centering pulls at the difference", "rlhf/reward_model.py",
        "(chosen_scores + rejected_scores).square()", "(chosen_scores - rejected_scores).square()",
        (f"{LOSSES}adding_a_constant_to_all_scores_changes_only_the_centering_term",),
    ),
    # PPO
    Mutant(
        "reward-at-end", "the reward lands on the last column", "rlhf/ppo_train.py",
        "rewards[rows, last_token(mask)] += scores", "rewards[rows, -1] += scores",
        (f"{LOSSES}the_reward_lands_on_the_last_real_token",),
    ),
    Mutant(
        "reward-at-end", "the reward lands one before the last token", "rlhf/ppo_train.py",
        "rewards[rows, last_token(mask)] += scores", "rewards[rows, (last_token(mask) - 1).clamp(min=0)] += scores",
        (f"{LOSSES}the_reward_lands_on_the_last_real_token", f"{ORACLES}ppo_is_its_definition_in_plain_numbers"),
    ),
    Mutant(
        "gae-padding", "the values of padding reach the advantages", "rlhf/ppo_train.py",
        "next_value = torch.where(counted[:, t], values[:, t], next_value)\n",
        "next_value = torch.where(counted[:, t], values[:, t], 9.0)\n",
        (f"{LOSSES}padding_never_reaches_the_advantages",),
    ),
    Mutant(
        "gae-padding", "lambda is left out", "rlhf/ppo_train.py",
        "advantage = delta + gamma * lam * next_advantage", "advantage = delta + gamma * next_advantage",
        (f"{LOSSES}gae_is_its_double_sum", f"{LOSSES}padding_never_reaches_the_advantages"),
    ),
    Mutant(
        "bootstrap", "a cut answer ends at 0", "rlhf/ppo_train.py",
        "next_value = torch.zeros_like(values[:, 0]) if last_values is None else last_values",
        "next_value = torch.zeros_like(values[:, 0])",
        (f"{LOSSES}a_cut_response_bootstraps_from_its_last_value",),
    ),
    Mutant(
        "bootstrap", "answers that stopped go on, too", "rlhf/ppo_train.py",
        "last_values = last_values * cut if", "last_values = last_values if",
        (f"{TRAINERS}only_what_the_length_cut_goes_on_at_its_last_value",),
    ),
    Mutant(
        "bootstrap", "an answer of full length counts as cut though it stopped", "rlhf/rollouts.py",
        "finish_reasons=generation.finish_reasons",
        'finish_reasons=["stop" if len(c) < self.config.max_new_tokens // 2 else "length" for '
        "c in generation.completions]",
        (f"{TRAINERS}an_answer_is_cut_where_its_finish_reason_says_so",),
    ),
    Mutant(
        "whitening", "each process whitens its own tokens", "rlhf/utils.py",
        "total, count = reduce(sums) if reduce else sums", "total, count = sums",
        (f"{LOSSES}whitening_over_two_ranks_is_that_of_all_tokens_together",),
    ),
    Mutant(
        "whitening", "PPO whitens the tokens of each process", "rlhf/ppo_train.py",
        "masked_whiten(flat, torch.ones_like(flat), reduce=processes.sum)",
        "masked_whiten(flat, torch.ones_like(flat))",
        (f"{UNEVEN}[ppo]", f"{SCRIPTS}ppo_two_processes_take_the_steps_of_one"),
    ),
    Mutant(
        "whitening", "padding counts", "rlhf/utils.py",
        "sums = torch.stack([x.sum(), mask.sum().to(x.dtype)])",
        "sums = torch.stack([x.sum(), torch.ones_like(x).sum()])",
        (f"{LOSSES}masked_whiten",),
    ),
    Mutant(
        "whitening", "shift_mean=False shifts the mean", "rlhf/utils.py",
        "    if not shift_mean:\n", "    if False:\n",
        (f"{LOSSES}masked_whiten",),
    ),
    Mutant(
        "ppo-first-step", "old log-probs are taken at another temperature", "rlhf/policy.py",
        "packed_logprobs(self.model, batch.packed, self.config.temperature, entropy, value_head)",
        "packed_logprobs(self.model, batch.packed, 0.9 if torch.is_grad_enabled() else "
        "self.config.temperature, entropy, value_head)",
        (f"{SCRIPTS}ppo_first_inner_step_has_ratio_1",),
    ),
    Mutant(
        "values-fixed", "a token's value is read after it", "rlhf/packing.py",
        "found.append(packed.to_completions(value_head(states.float()).float().squeeze(-1)))",
        "after = (packed.predictor + 1).clamp(max=len(hidden) - 1)\n"
        "        found.append(packed.to_completions(value_head(hidden[after[at]].float()).float().squeeze(-1)))",
        (f"{MODELS}the_value_of_a_token_does_not_depend_on_that_token",),
    ),
    Mutant(
        "values-fixed", "old log-probs follow the policy", "rlhf/ppo_train.py",
        "loss = pg_loss + config.vf_coef * vf_loss\n",
        "loss = pg_loss + config.vf_coef * vf_loss\n                batch.old_logprobs = "
        "logprobs.detach()\n",
        (f"{TRAINERS}old_values_and_old_log_probs_do_not_change_over_the_inner_epochs",),
    ),
    Mutant(
        "values-fixed", "old values follow the value head", "rlhf/ppo_train.py",
        "loss = pg_loss + config.vf_coef * vf_loss\n",
        "loss = pg_loss + config.vf_coef * vf_loss\n                batch.values = values.detach()\n",
        (f"{TRAINERS}old_values_and_old_log_probs_do_not_change_over_the_inner_epochs",),
    ),
    Mutant(
        "reported-kl", "the KL of an answer is a mean over its tokens", "rlhf/steps.py",
        "kl=kl.sum(1).mean()", "kl=kl.mean()",
        (f"{LOSSES}the_reported_kl_is_that_of_an_enumerated_policy",),
    ),
    Mutant(
        "reported-kl", "the KL of a token is weighted by answers", "rlhf/steps.py",
        "meter.mean(mask.sum(), kl_per_token", "meter.mean(len(mask), kl_per_token",
        (f"{LOSSES}the_reported_kl_is_that_of_an_enumerated_policy",),
    ),
    # KL
    Mutant(
        "kl-gradients", "k3 with the sign of d exchanged", "rlhf/utils.py",
        "return torch.exp(-d) - 1 + d", "return torch.exp(d) - 1 - d",
        (f"{LOSSES}kl_estimators_in_expectation_over_an_enumerable_policy",),
    ),
    Mutant(
        "kl-gradients", "the ratio of ratio * k3 has no gradient", "rlhf/grpo_train.py",
        "torch.where(counted, ref_logprobs - old_logprobs, 0.0).expm1() + ratio * d - log_ratio.expm1()",
        "ratio.detach() * ((-d).expm1() + d)",
        (f"{LOSSES}kl_estimators_in_expectation_over_an_enumerable_policy",),
    ),
    Mutant(
        "kl-gradients", "k1 is taken as a loss", "rlhf/grpo_train.py",
        'if kl_kind not in ("ratio_k3", "k2", "k3"):', 'if kl_kind not in ("ratio_k3", "k1", "k2", "k3"):',
        (f"{LOSSES}k1_in_the_loss_is_refused",),
    ),
    # GRPO
    Mutant(
        "group-advantages", "the mean is that of all groups", "rlhf/grpo_train.py",
        "rewards - rewards.mean(1, keepdim=True)", "rewards - rewards.mean()",
        (f"{LOSSES}group_advantages_permute_with_the_prompts_and_have_mean_0",),
    ),
    Mutant(
        "group-advantages", "the standard deviation of a population", "rlhf/grpo_train.py",
        "rewards.std(1, keepdim=True)", "rewards.std(1, correction=0, keepdim=True)",
        (f"{LOSSES}group_advantages_worked_values",),
    ),
    Mutant(
        "group-advantages", "a group of one is taken", "rlhf/grpo_train.py",
        "if rewards.dim() != 2 or rewards.shape[1] < 2:", "if rewards.dim() != 2:",
        (f"{LOSSES}a_group_of_one_is_refused",),
    ),
    Mutant(
        "sampler-logprobs", "training forgets the temperature", "rlhf/packing.py",
        "packed.targets[at], temperature, entropy)",
        "packed.targets[at], 1.0, entropy)",
        (f"{MODELS}log_probs_recomputed_in_training_equal_the_samplers",),
    ),
    Mutant(
        "sampler-logprobs", "rollouts are cut by top-p", "rlhf/sampler.py",
        "            temperature=config.temperature,\n",
        "            temperature=config.temperature, top_p=0.9,\n",
        (f"{TRAINERS}rollouts_are_drawn_from_the_whole_distribution_at_the_training_temperature",),
    ),
    Mutant(
        "sampler-logprobs", "the sampler's log-probs are those before the temperature", "models/generation.py",
        "return token, logprobs.gather(-1, token[:, None])[:, 0]",
        "return token, logits.float().log_softmax(-1).gather(-1, token[:, None])[:, 0]",
        (f"{GENERATION}logprobs_are_those_of_the_distribution_that_was_drawn_from",
         f"{MODELS}log_probs_recomputed_in_training_equal_the_samplers"),
    ),
    Mutant(
        "sampler-logprobs", "the decoder turns a new token by the angle of the next one", "models/fast/decoder.py",
        "positions[:, None])  # (B, 1, D)", "positions[:, None] + 1)  # (B, 1, D)",
        (f"{DECODING}it_computes_what_transformers_does",), unchecked=True,
    ),
    Mutant(
        "sampler-logprobs", "a recorded token is computed at the position of the first", "models/fast/decoder.py",
        "zip(self.given, new)", "zip(self.given[::2], new[::2])",
        (f"{DECODING}a_recorded_token_gives_what_a_plain_one_does_while_rows_leave",),
    ),
    Mutant(
        "left-padding", "the decoder sees padding", "models/fast/decoder.py",
        "added_mask(seen, x.dtype)", "added_mask(seen | seen[-1:], x.dtype)",
        (f"{DECODING}it_computes_what_transformers_does", f"{GENERATION}greedy_equals_transformers_on_a_padded_batch"),
        unchecked=True,
    ),
    Mutant(
        "sampler-logprobs", "within its block a token is drawn as if nothing lay before", "models/generation.py",
        "_first_above(inside, target - before)", "_first_above(inside, target)",
        (f"{GENERATION}the_token_of_a_uniform_number_is_where_the_running_sum_passes_it",),
    ),
    # reward functions
    Mutant(
        "reward-left-out", "a completion without a reward has the reward 0", "rlhf/rollouts.py",
        "        kept = [i for i, reward in enumerate(self.rewards) if reward is not None]\n",
        "        self.rewards = [reward or 0.0 for reward in self.rewards]\n"
        "        kept = list(range(len(self.rewards)))\n",
        (f"{REWARD_STEPS}advantages_are_those_of_the_completions_that_are_left",), "Rollout.without_left_out",
    ),
    Mutant(
        "reward-left-out", "groups keep their sizes", "rlhf/rollouts.py",
        "sum(reward is not None for reward in group)", "len(group)",
        (f"{REWARD_STEPS}advantages_are_those_of_the_completions_that_are_left",),
    ),
    Mutant(
        "reward-left-out", "a step without any reward resets the count", "rlhf/grpo_train.py",
        "if minibatch.sequences:", "if True:",
        (f"{REWARD_STEPS}a_step_without_any_reward_moves_no_weight[grpo]",),
    ),
    Mutant(
        "reward-functions", "the weights are left out", "data/rewards.py",
        "[weight * x for weight, x in", "[x for weight, x in",
        (f"{REWARDS}the_reward_is_the_weighted_sum_of_the_functions_that_apply", f"{REWARDS}the_weighted_sum_is_trls"),
    ),
    Mutant(
        "reward-functions", "None counts as 0", "data/rewards.py",
        "[weight * x for weight, x in zip(self.weights, row) if x is not None]",
        "[weight * (x or 0.0) for weight, x in zip(self.weights, row)]",
        (f"{REWARDS}a_completion_to_which_no_function_applies_is_left_out",),
    ),
    Mutant(
        "reward-functions", "a failure counts as None", "data/rewards.py",
        "None if bad else self._sum(row)", "self._sum([None if isinstance(x, Failed) else x for x in row])",
        (f"{REWARDS}a_function_that_fails_leaves_its_completion_out_whatever_the_others_say",),
    ),
    Mutant(
        "reward-functions", "a call that raised is not tried again", "data/rewards.py",
        "        if again:\n", "        if False:\n",
        (f"{REWARDS}a_call_that_raises_is_tried_again_once",),
    ),
    Mutant(
        "reward-functions", "rewards come in the order in which calls end", "data/rewards.py",
        "list(pool.map(_outcome, rest))", "list(pool.map(_outcome, rest))[::-1]",
        (f"{REWARDS}twelve_calls_that_wait_run_at_the_same_time_and_stay_in_order[def]",),
    ),
    Mutant(
        "reward-functions", "what computes runs in threads", "data/rewards.py",
        "took > WAITED and computed < took / 10", "took > WAITED",
        (f"{REWARDS}calls_that_compute_stay_in_the_main_thread",),
    ),
    Mutant(
        "reward-functions", "the steps before a failure are not saved", "runtime/checkpoint.py",
        "            self.save(step - 1)\n", "",
        (f"{REWARD_STEPS}if_every_call_of_a_step_fails_the_steps_before_are_saved[grpo]",), "Checkpoints.saved_before",
    ),
    Mutant(
        "reward-left-out", "a step that ends the run is counted in the checkpoint before it", "runtime/checkpoint.py",
        "            self.run.skipped, self.run.skips = before", "            before = before",
        ("tests/runtime/test_checkpoint.py::test_a_step_that_ends_the_run_is_not_counted_in_the_checkpoint_before_it",),
    ),
    Mutant(
        "reward-functions", "only the file of the first function is hashed", "runtime/provenance.py",
        '(vars(config)[key] or "").split(",")', '(vars(config)[key] or "").split(",")[:1]',
        (f"{REWARD_STEPS}a_change_of_any_of_the_files_is_noticed",),
    ),
    Mutant(
        "reward-functions", "PPO gives completions the rewards of others", "rlhf/ppo_train.py",
        "[rollout.rewards[i] for i in batch.rows]", "[rollout.rewards[i] for i in range(len(batch.rows))]",
        (f"{REWARD_STEPS}ppo_with_a_function_that_scores_as_the_reward_model_does_takes_its_steps",),
    ),
    Mutant(
        "prompt-columns", "a column called prompt wins", "data/prompts.py",
        'return other.get("prompt", row[column])', 'return row.get("prompt", row[column])',
        ("tests/data/test_prompts.py::test_the_column_wins_over_a_prompt_beside_it",),
    ),
    Mutant(
        "prompt-columns", "other columns are lost", "data/prompts.py",
        'row.items() if key != "where"} | {"prompt"', 'row.items() if key == "checks"} | {"prompt"',
        ("tests/data/test_prompts.py::test_rows_of_other_forms_give_their_prompt_and_keep_their_columns",),
    ),
    Mutant(
        "aggregations", "\"sequence\" is a mean over tokens", "rlhf/grpo_train.py",
        "return (losses.sum(1) / counted.sum(1).clamp(min=1)).sum() / rows",
        "return losses.sum() / counted.sum() * len(losses) / rows",
        (f"{LOSSES}the_three_aggregations_on_worked_numbers",
         f"{ORACLES}grpo_losses_and_gradients_are_trls[grpo-sequence-k3]"),
    ),
    Mutant(
        "aggregations", "the width of the padding counts", "rlhf/grpo_train.py",
        "return losses.sum() / (rows * max_tokens)", "return losses.sum() / (rows * losses.shape[1])",
        (f"{LOSSES}aggregations_do_not_change_with_micro_batches_or_padding",),
    ),
    Mutant(
        "aggregations", "the clip bounds are exchanged", "rlhf/grpo_train.py",
        "ratio.clamp(1 - clip_low, 1 + clip_high)", "ratio.clamp(1 - clip_high, 1 + clip_low)",
        (f"{ORACLES}grpo_losses_and_gradients_are_trls",),
    ),
    Mutant(
        "no-signal", "groups that differ are counted", "rlhf/grpo_train.py",
        "float(max(rewards) == min(rewards))",
        "float(max(rewards) != min(rewards))",
        (f"{TRAINERS}the_share_of_groups_without_any_difference_is_logged",),
    ),
    Mutant(
        "missing-eos", "the penalty goes to the completions that ended by themselves", "rlhf/rollouts.py",
        'penalty * (finish == "length")',
        'penalty * (finish == "stop")',
        (f"{TRAINERS}grpo_takes_the_penalty_from_the_rewards_of_completions_that_were_cut",),
    ),
    Mutant(
        "offline-online", "stored log-probs are divided by the temperature once more", "rlhf/grpo_train.py",
        "        return batch.sampler_logprobs\n",
        "        return batch.sampler_logprobs / config.temperature\n",
        (f"{TRAINERS}the_offline_gradient_is_that_of_the_online_step_on_the_same_data",),
    ),
    Mutant(
        "offline-online", "stored log-probs belong to other answers", "rlhf/rollouts.py",
        "batch.packed.align([self.logprobs[i] for i in piece])",
        "batch.packed.align([[-5.0] * len(self.logprobs[i]) for i in piece])",
        (f"{SCRIPTS}grpo_offline_starts_on_policy_with_stored_logprobs",),
    ),
    # LoRA, checkpoints
    Mutant(
        "checkpointing", "the model is not in training mode, where nothing is checkpointed", "rlhf/policy.py",
        "model.train(config.gradient_checkpointing)", "model",
        (f"{RECOMPUTES}[0-grpo]", f"{RECOMPUTES}[0-ppo]"),
    ),
    Mutant(
        "checkpointing", "nothing is checkpointed", "models/device.py",
        '    enable({"use_reentrant": False})', '    enable  # ({"use_reentrant": False})',
        (f"{COMMON}gradient_checkpointing_recomputes_and_leaves_gradients_as_they_were",),
    ),
    Mutant(
        "tied-merged", "the merged model is the base", "train/train_lm_lora.py",
        "merged = load_model(folder, dtype=torch.float32, merge_adapter=True)",
        "merged = load_model(folder, dtype=torch.float32).unload()",
        (f"{COMMON}a_merged_model_is_tied_and_has_the_logits_of_its_adapter",),
    ),
    Mutant(
        "tied-merged", "the head is saved untied", "models/save.py",
        "        save_weights(model, temporary)\n",
        "        model.config.tie_word_embeddings = False\n        save_weights(model, temporary)\n",
        (f"{COMMON}tied_embeddings_survive_saving_and_loading",),
    ),
    Mutant(
        "resume", "the optimizer begins anew", "runtime/checkpoint.py",
        "        part.load_state_dict(state)\n        return\n", "        return\n",
        (f"{CHECKPOINT}what_is_put_back_goes_on_bit_by_bit",),
    ),
    Mutant(
        "resume", "random numbers begin anew", "runtime/checkpoint.py",
        'set_random_state(state["random"][rank()])', "pass",
        (f"{CHECKPOINT}what_is_put_back_goes_on_bit_by_bit",),
    ),
    Mutant(
        "resume", "the language model's step is taken twice", "train/train_lm.py",
        "_, carried = checkpoints.load()  # {} unless this run was interrupted\n",
        "_, carried = checkpoints.load()  # {} unless this run was interrupted\n    "
        "updates.count = max(updates.count - 1, 0)\n",
        ("tests/train/test_resume.py::test_killed_at_any_moment_it_ends_with_the_same_weights_optimizer_and_metrics"
         "[dropout]",),
    ),
    Mutant(
        "resume", "PPO's KL coefficient begins anew", "rlhf/ppo_train.py",
        'self.coef = state["coef"]',
        "self.coef = self.config.kl_coef",
        ("tests/rlhf/test_resume.py::test_killed_at_any_moment_it_ends_with_the_same_weights_optimizer_and_metrics[ppo]",),
    ),
    Mutant(
        "tracked-once", "a resumed run is a new W&B run", "runtime/tracking.py",
        "resumed = lines is not None and kept.is_file()", "resumed = False",
        (f"{TRACKING}a_run_that_is_killed_and_resumed_is_one_run_without_gaps_or_repetition[lm-1]",),
    ),
    Mutant(
        "tracked-once", "lines before the checkpoint are not sent again", "runtime/tracking.py",
        "for number, line in enumerate(lines or []):", "for number, line in enumerate([]):",
        (f"{TRACKING}a_run_that_is_killed_and_resumed_is_one_run_without_gaps_or_repetition[lm-1]",),
    ),
    Mutant(
        "tracked-once", "what a killed process wrote is synced a second time", "runtime/tracking.py",
        "            if not on_server(path):\n                shutil", "            if False:\n                shutil",
        (f"{TRACKING}a_run_that_is_killed_and_resumed_is_one_run_without_gaps_or_repetition[lm-1]",),
    ),
    Mutant(
        "tracked-once", "samples of lines that come again stay", "runtime/run.py",
        "[: self._samples]", "",
        (f"{TRACKING}a_run_that_is_killed_and_resumed_is_one_run_without_gaps_or_repetition[lm-1]",),
    ),
    Mutant(
        "tracked-once", "what the server has is sent again", "runtime/tracking.py",
        "if self.run is None or number < self.run.starting_step:", "if self.run is None:",
        (f"{TRACKING}lines_that_the_server_has_already_are_not_sent_again",),
    ),
    Mutant(
        "tracked-once", "a login in netrc is not looked for", "runtime/tracking.py",
        "if wandb.login(prompt=False, verify=False):", 'if os.environ.get("WANDB_API_KEY"):',
        (f"{TRACKING}a_login_of_a_self_hosted_server_is_found_and_that_of_another_one_is_not[environment]",),
    ),
    Mutant(
        "tracked-once", "WANDB_MODE=disabled is not heard", "runtime/tracking.py",
        'if said == "disabled":', 'if wanted == "disabled":',
        (f"{TRACKING}modes[online-environment6-None]",),
    ),
    Mutant(
        "twice-at-once", "a run looks at its folder before it has the lock", "runtime/run.py",
        """            self._place = RunFolder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        refuse_other_use(self.folder)
        if held.is_file():
""",
        """            there = held.is_file()
            self._place = RunFolder(self.folder)
        except OSError as error:
            raise UserError(f"cannot write to {shown(self.folder)}: {error.strerror}") from None
        refuse_other_use(self.folder)
        if there:
""",
        (f"{TWICE}who_has_waited_looks_at_what_is_there_then",),
    ),
    Mutant(
        "twice-at-once", "preferences are looked for before the lock", "data/preferences.py",
        "    acquire_output(out)\n", "",
        (f"{TWICE}one_does_the_work_and_the_other_says_so[data/generate_preferences.py]",),
    ),
    Mutant(
        "twice-at-once", "two processes write the completions of one --out", "models/completions.py",
        "        acquire_output(in_root(out), seconds=0)", "        pass",
        (f"{TWICE}one_does_the_work_and_the_other_says_so[inference/inference.py]",),
    ),
    Mutant(
        "twice-at-once", "a lock on a folder that was removed counts", "runtime/run_folder.py",
        "elif path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):", "elif descriptor:",
        (f"{TWICE}a_folder_that_is_removed_before_it_is_locked_is_made_anew",),
    ),
    Mutant(
        "twice-at-once", "a refused run takes the folder above away", "runtime/run_folder.py",
        "shutil.rmtree(self.path)\n                for parent",
        "shutil.rmtree(self.made[-1])\n                for parent",
        (f"{TWICE}a_run_that_is_refused_leaves_the_one_beside_it",),
    ),
    Mutant(
        "inference-resumes", "finished batches are not kept", "models/completions.py",
        "    if kept is None:\n", "    if True:\n",
        (f"{INFERENCE}killed_at_any_moment_the_file_is_that_of_an_undisturbed_run[inference.dpo_inference]",),
    ),
    Mutant(
        "inference-resumes", "top_p is forgotten when batches are kept", "models/resumable.py",
        'settings |= {"top_p": top_p} if top_p < 1 else {}', "pass",
        (f"{INFERENCE}what_another_configuration_had_finished_is_sampled_anew[change2]",),
    ),
    Mutant(
        "inference-resumes", "completions of a model in another precision go on", "models/completions.py",
        '"model": weights_hash(model), ', "",
        (f"{INFERENCE}what_another_configuration_had_finished_is_sampled_anew[change1]",),
        symbol="keep_for",
    ),
    Mutant(
        "given-back", "Ctrl-C leaves what was begun", "runtime/cli.py",
        """    except KeyboardInterrupt:
        undo_all()
""",
        """    except KeyboardInterrupt:
""",
        (f"{CTRL_C}before_the_first_log_line_the_old_run_is_restored[train.train_lm]",),
    ),
    Mutant(
        "given-back", "the first step is saved although nothing was logged", "runtime/checkpoint.py",
        "self.run.steps_began and (self.run.logged or self._saved)", "self.run.steps_began",
        (f"{CTRL_C}before_the_first_log_line_the_old_run_is_restored[rlhf.grpo_train]",),
    ),
    Mutant(
        "given-back", "a checkpoint before the first log line is given away", "runtime/checkpoint.py",
        "        self.run.keep()\n", "",
        (f"{CHECKPOINT}a_checkpoint_before_the_first_log_line_stays_whatever_ends_the_run",),
    ),
    Mutant(
        "given-back", "a signal may come while an old run is moved aside", "runtime/run_folder.py",
        "        with undisturbed():  # a signal in between would leave a half of it to `roll_back`\n",
        "        if True:\n",
        (f"{CTRL_C}a_signal_while_the_old_run_is_moved_aside_loses_nothing[2]",),
    ),
    Mutant(
        "given-back", "the run before a killed one is not given back", "runtime/run_folder.py",
        "self.emptied = self.replaced.exists()", "self.emptied = False",
        (f"{CTRL_C}a_run_that_was_killed_before_it_began_is_given_back_as_the_run_before_it",),
    ),
    Mutant(
        "log-line", "a line takes all numbers that it knows", "runtime/console.py",
        "if words and len(line) + len(words) + ETA <= WIDTH:", "if words:",
        (f"{CONSOLE}a_log_line_has_the_important_numbers_in_80_columns",),
    ),
    Mutant(
        "log-line", "what did not fit is lost with --verbose true", "runtime/console.py",
        """            line, seen = line + words, seen | {key}
""",
        """            line = line + words
        seen = seen | {key}
""",
        (f"{CONSOLE}with_verbose_each_number_is_there_once_and_no_line_is_longer",),
    ),
    Mutant(
        "log-line", "a model writes control characters to the terminal", "runtime/console.py",
        " + end).translate(CONTROL)", " + end)",
        (f"{CONSOLE}control_characters_of_a_completion_are_not_sent_to_the_terminal",),
    ),
    Mutant(
        "curves", "the band is that of one step", "runtime/curves.py",
        "math.sqrt(variance / count)", "math.sqrt(variance)",
        (f"{CURVES}points_means_and_bands_are_those_of_the_lines",),
    ),
    Mutant(
        "curves", "the standard error is the deviation", "rlhf/steps.py",
        "stdev(total) / math.sqrt(count)", "stdev(total)",
        (f"{CURVES}the_standard_error_is_that_of_the_prompts_over_all_processes",),
    ),
    Mutant(
        "curves", "a picture is drawn at every line", "runtime/curves.py",
        ">= self.cost / SHARE", ">= 0",
        (f"{CURVES}a_picture_takes_a_two_hundredth_of_the_time_at_most",),
    ),
    Mutant(
        "curves", "a picture that cannot be drawn ends the run", "runtime/curves.py",
        "except Exception as error:", "except ValueError as error:",
        (f"{CURVES}a_picture_that_cannot_be_drawn_ends_no_run_and_is_one_line",),
    ),
    Mutant(
        "systems", "Windows is not refused by the command", "runtime/cli.py",
        "        check_system()\n", "",
        (f"{SYSTEMS}windows_is_refused_in_one_sentence[inference/inference.py]",),
    ),
    Mutant(
        "systems", "a module that Windows lacks is imported at the start", "runtime/provenance.py",
        "import platform\n", "import platform\nimport resource\n",
        (f"{SYSTEMS}windows_is_refused_in_one_sentence[train/train_lm.py]",),
    ),
    Mutant(
        "systems", "a Mac's GPU is taken, which has no float64", "models/device.py",
        """    return torch.device("cpu")""",
        """    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")""",
        (f"{SYSTEMS}a_mac_trains_on_its_cpu_and_says_once_that_its_gpu_is_not_used",),
    ),
    Mutant(
        "evaluation-pure", "evaluation leaves the model in eval mode", "train/common.py",
        "    model.train(was_training)\n    nats", "    nats",
        (f"{COMMON}evaluation_and_samples_leave_parameters_and_random_state_as_they_were",),
    ),
    Mutant(
        "evaluation-pure", "a sample draws from the global generator", "train/common.py",
        "never=never_sampled(tokenizer), seed=config.seed\n",
        "never=never_sampled(tokenizer)\n",
        (f"{COMMON}evaluation_and_samples_leave_parameters_and_random_state_as_they_were",),
    ),
    Mutant(
        "evaluation-pure", "DPO's evaluation draws random numbers", "rlhf/dpo_train.py",
        "    meter = Meter()\n", "    torch.rand(1)\n    meter = Meter()\n",
        (f"{TRAINERS}evaluation_leaves_parameters_and_random_state_as_they_were",), "evaluate",
    ),
    Mutant(
        "doctor", "a difference within noise counts", "runtime/readings.py",
        "return difference > half", "return difference > 0",
        (f"{DOCTOR}a_log_that_nearly_has_the_pattern[overoptimised-0]",),
    ),
    Mutant(
        "doctor", "noise is a rate that is too high", "runtime/patterns.py",
        "max(times * half, share * abs(first.mean))", "share * abs(first.mean)",
        (f"{DOCTOR}noise_alone_is_seldom_taken_for_a_pattern",),
    ),
    Mutant(
        "doctor", "a run of two lines is judged", "runtime/doctor.py",
        "if any(there[key] < count for key, count in entry.needs.items()):", "if len(run.lines) < 2:",
        (f"{DOCTOR}a_short_run_is_not_judged",), "diagnose",
    ),
    Mutant(
        "doctor", "the last reward in a manifest is taken for lines with a reward", "runtime/readings.py",
        "return len(self.series(key))", "return LEAST if key in self.result else len(self.series(key))",
        (f"{DOCTOR}a_short_run_is_not_judged",), "Readings.count",
    ),
    Mutant(
        "doctor", "a pattern that nothing triggers", "runtime/patterns.py",
        "if equal.mean < share:", "if equal.mean < 2:",
        (f"{DOCTOR}a_log_that_has_the_pattern[no_signal-0]",), "no_signal",
    ),
    Mutant(
        "doctor", "stored rewards are judged as those of the policy", "runtime/patterns.py",
        "if run.stored:", "if False:",
        (f"{DOCTOR}a_log_that_nearly_has_the_pattern[rate_too_high-3]",), "rate_too_high",
    ),
    Mutant(
        "doctor", "rounding is taken for a move of the policy", "runtime/patterns.py",
        "reached < max(kl, 2 * rounding)", "reached < kl",
        (f"{DOCTOR}a_log_that_has_the_pattern[rate_did_nothing-4]",),
    ),
    Mutant(
        "doctor", "a fall of the chosen completions is always normal", "runtime/patterns.py",
        'level = "act" if not grows else "normal" if -chosen.mean <= share * margin.mean else "look"',
        'level = "normal"',
        (f"{DOCTOR}a_log_that_has_the_pattern[chosen_falls-1]", f"{DOCTOR}a_log_that_has_the_pattern[chosen_falls-2]"),
    ),
    Mutant(
        "explained-variance", "the values are left out", "rlhf/ppo_train.py",
        "1 - (returns - values).var(", "1 - returns.var(",
        (f"{MEASURES}explained_variance_worked_values",),
    ),
    Mutant(
        "explained-variance", "each process has its own", "rlhf/ppo_train.py",
        "everywhere = processes.gather(", "everywhere = (lambda mine: [mine])(",
        (f"{MEASURES}explained_variance_is_over_all_processes",),
    ),
    Mutant(
        "ppo-first-step", "the first ratio is that of a later update", "rlhf/ppo_train.py",
        "logprobs.detach(), entropy, config, number == 0)", "logprobs.detach(), entropy, config, number == 1)",
        (f"{MEASURES}the_first_of_several_updates_has_ratio_1",),
    ),
    Mutant(
        "torn-checkpoint", "the hash of a checkpoint's files is not looked at", "runtime/checkpoint.py",
        'if sha256_file(folder / name) != expected[name]["sha256"]:', "if False:",
        (f"{CHECKPOINT}a_damaged_checkpoint_is_named_and_the_one_before_it_is_used",),
    ),
    Mutant(
        "last-number", "the first number decides", "data/checks.py", "numbers(text)[-1:]", "numbers(text)[:1]",
        (f"{CHECKS}each_check_on_answers_that_pass_and_nearly_pass[last_number]",),
    ),
    Mutant(
        "last-number", "a subtraction is a sign", "data/checks.py",
        "SIGN.search(before) and not SUBTRACTION.search(before)", "SIGN.search(before)",
        (f"{CHECKS}the_last_number_of_a_text[20-7-7]",),
    ),
    Mutant(
        "last-number", "minus signs are not read", "data/checks.py", "sign = -1 if", "sign = 1 if",
        (f"{CHECKS}each_check_on_answers_that_pass_and_nearly_pass[last_number]",),
    ),
    Mutant(
        "real-answer", "the gate does not count", "data/checks.py",
        "if is_degenerate(text) or not all(passed(text, gates, prompt)):", "if is_degenerate(text):",
        (f"{ANSWER}nonsense_scores_zero[off topic]",), "score",
    ),
    Mutant(
        "real-answer", "an echo passes", "data/checks.py", "        and own_words(text, prompt)\n", "",
        (f"{ANSWER}nonsense_scores_zero[a refusal]",), "real_answer",
    ),
    Mutant(
        "real-answer", "invented words pass", "data/checks.py", "        and known >= 0.75 * len(found)\n", "",
        (f"{ANSWER}nonsense_scores_zero[invented words in a sentence]",), "real_answer",
    ),
    Mutant(
        "real-answer", "what is off topic passes", "data/checks.py", "        and on_topic(text, stems)\n", "",
        (f"{ANSWER}nonsense_scores_zero[off topic]",), "real_answer",
    ),
    Mutant(
        "real-answer", "key words pass", "data/checks.py", "        and in_sentences(text, listing)\n", "",
        (f"{ANSWER}nonsense_scores_zero[key words in a row]",), "real_answer",
    ),
    Mutant(
        "real-answer", "every list is refused", "data/checks.py", "enough or listing and", "enough and listing and",
        (f"{ANSWER}good_answers_score_one[Name some gifts for a wedding.]",), "in_sentences",
    ),
    Mutant(
        "splits-apart", "a question is asked again with its numbers in another order", "data/make_arithmetic.py",
        "itertools.combinations_with_replacement(range(low, high + 1), 2)",
        "itertools.product(range(low, high + 1), repeat=2)",
        ("tests/data/test_arithmetic.py::test_no_question_is_there_twice_in_whatever_order_it_is_asked",), "pairs",
    ),
    Mutant(
        "chosen-ended", "a cut completion is chosen", "data/generate_preferences.py",
        'if a.finish_reason == "stop" or not chosen_ended', "if True",
        ("tests/data/test_generate_preferences.py::"
         "test_a_completion_that_was_cut_is_not_chosen_if_the_run_asks_for_that",), "make_pairs",
    ),
    Mutant(
        "token-records", "GRPO keeps the log-probs of the first pass alone", "rlhf/token_records.py",
        "passes[epoch - 1]", "passes[0]",
        (f"{RECORDS}grpo_keeps_what_transformers_says_of_each_completion_alone",),
    ),
    Mutant(
        "token-records", "a completion gets the numbers of its place in the rollout, not in the batch",
        "rlhf/token_records.py",
        "for place, row in enumerate(batch.rows):", "for place, row in enumerate(sorted(batch.rows)):",
        (f"{RECORDS}grpo_keeps_what_transformers_says_of_each_completion_alone",),
    ),
    Mutant(
        "token-records", "the KL that is kept is k3 without its ratio", "rlhf/grpo_train.py",
        "kl_in_loss(logprobs, old_logprobs, batch.ref_logprobs, counted, kind, log_ratio, ratio)",
        'kl_in_loss(logprobs, old_logprobs, batch.ref_logprobs, counted, "k3", log_ratio, ratio)',
        (f"{RECORDS}grpo_keeps_what_transformers_says_of_each_completion_alone",), "measure_tokens",
    ),
    Mutant(
        "token-records", "PPO keeps the rewards without the KL", "rlhf/ppo_train.py",
        '"reward": batch.rewards,', '"reward": batch.rewards.where(batch.rewards > 0, 0.0),',
        (f"{RECORDS}ppo_keeps_rewards_values_and_returns_of_each_token",),
    ),
    Mutant(
        "token-records", "pairs are kept after the update", "rlhf/dpo_train.py",
        "        records.write(step, lambda batch: measure_tokens(batch, policy, reference, config, stage))\n"
        "        updates.step(step, pairs.where(step))\n",
        "        updates.step(step, pairs.where(step))\n"
        "        records.write(step, lambda batch: measure_tokens(batch, policy, reference, config, stage))\n",
        (f"{RECORDS}dpo_keeps_the_log_probs_of_both_sides",),
    ),
    Mutant(
        "token-records", "the score of a beginning is that of the token before", "rlhf/utils.py",
        "first = packed.last - packed.mask.sum(1) + 1 ", "first = packed.last - packed.mask.sum(1) ",
        (f"{RECORDS}the_reward_model_keeps_the_score_of_each_beginning",),
    ),
    Mutant(
        "token-records", "a resumed run keeps steps twice", "runtime/run.py",
        "kept = read_lines(self.folder / TOKENS)[: self._kept]", "kept = read_lines(self.folder / TOKENS)",
        (f"{RECORDS}killed_and_resumed_it_keeps_each_step_once",),
    ),
    Mutant(
        "token-records", "rows see the samples before them in their block", "train/token_records.py",
        'block_states(model, batch["input_ids"], batch["position_ids"])',
        'block_states(model, batch["input_ids"], torch.arange(batch["input_ids"].shape[1])[None])',
        ("tests/train/test_token_records.py::test_rows_have_what_transformers_says_of_each_sample_alone",),
    ),
    Mutant(
        "token-view", "a token may end the page's data", "report/token_view.py",
        'for letter in "<>&":', 'for letter in "&":',
        (f"{PAGE}no_text_of_a_token_ends_the_data_or_becomes_markup",),
    ),
    Mutant(
        "token-view", "characters without a shape stay invisible", "report/token_view.py",
        'INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")', 'INVISIBLE = ("Cc",)',
        (f"{PAGE}nothing_of_a_token_is_invisible",),
    ),
    Mutant(
        "token-view", "a part of a character becomes a question mark", "models/tokens.py",
        'return {"bytes": found.hex()}', 'return found.decode(errors="replace")',
        (f"{PAGE}token_texts_join_to_the_text_byte_by_byte",),
    ),
    Mutant(
        "token-view", "what training lowered looks raised", "report/token_view.py",
        "round(pair[0] - pair[1], 6)", "round(pair[1] - pair[0], 6)",
        (f"{PAGE}what_follows_from_the_kept_numbers", f"{PAGE}pointing_at_a_token_shows_its_numbers"),
    ),
    Mutant(
        "stereoset", "the anti-stereotype counts as unrelated", "report/measures/choices.py",
        "above(stereotype, unrelated) + above(anti, unrelated)", "2 * above(stereotype, unrelated)",
        (f"{BIAS}macro_is_the_mean_over_targets_and_micro_over_rows",),
    ),
    Mutant(
        "stereoset", "equal scores are no stereotype", "report/measures/choices.py",
        "float(a > b) + 0.5 * (a == b)", "float(a > b)",
        (f"{BIAS}an_oracle_is_ideal_and_chance_is_fifty",),
    ),
    Mutant(
        "crows-pairs", "the other sentence is the stereotype", "report/measures/choices.py",
        "values = [above(*row) for row in scores]", "values = [above(*row[::-1]) for row in scores]",
        (f"{BIAS}crows_pairs_by_hand",), "crows_pairs",
    ),
    Mutant(
        "bbq", "the first of equal options is chosen", "report/measures/choices.py",
        "best = [i for i, score in enumerate(of_row) if score == max(of_row)]", "best = [of_row.index(max(of_row))]",
        (f"{BIAS}bbq_by_hand_and_by_chance",), "bbq",
    ),
    Mutant(
        "bias-scores", "the first token of a text is not scored", "report/measures/bias.py",
        "[sum(tokens) for tokens in row]", "[sum(tokens[1:]) for tokens in row]",
        (f"{BIAS}a_uniform_model_scores_each_token_minus_log_v",),
    ),
    Mutant(
        "refusals", "what somebody says in quotation marks counts", "report/measures/refusals.py",
        'QUOTED.sub(" ", opening)', "opening",
        (f"{REFUSALS}answers_that_sound_like_refusals",), "is_refusal",
    ),
    Mutant(
        "refusals", "the subject does not matter", "report/measures/refusals.py",
        'rf"\\b(?:i|we)(?: (?:really|simply|just|also|still))*(?: |(?=\'))(?:{NOT}){BETWEEN} {DO}",',
        'rf"\\b(?:{NOT}){BETWEEN} {DO}",',
        (f"{REFUSALS}answers_that_sound_like_refusals",),
    ),
    Mutant(
        "toxicity", "a text is toxic only above one half", "report/measures/toxicity.py", "p >= TOXIC for p in prob",
        "p > TOXIC for p in prob", (f"{TOXICITY}the_fraction_of_an_oracle_and_of_a_classifier_that_knows_one_word",),
    ),
    Mutant(
        "toxicity", "false alarms are errors that were missed", "report/measures/toxicity.py",
        "if toxic and not yes", "if yes and not toxic",
        (f"{TOXICITY}the_fraction_of_an_oracle_and_of_a_classifier_that_knows_one_word",),
    ),
    Mutant(
        "mauve", "the mixture is one of the two", "report/measures/mauve.py",
        "r = w * p + (1 - w) * q", "r = w * p + (1 - w) * p + 0 * q",
        (f"{QUALITY}the_area_of_equal_and_of_disjoint_histograms",
         f"{QUALITY}the_area_against_a_sum_over_a_fine_grid_from_the_equations"),
    ),
    Mutant(
        "mauve", "both sides of the frontier are of the same histogram", "report/measures/mauve.py",
        "math.exp(-SCALE * kl(q, r)), math.exp", "math.exp(-SCALE * kl(p, r)), math.exp",
        (f"{QUALITY}the_area_against_a_sum_over_a_fine_grid_from_the_equations",),
    ),
    Mutant(
        "mauve", "the features are of the token before the last", "report/measures/text_quality.py",
        "[packed.last]", "[packed.last - 1]",
        (f"{QUALITY}the_features_of_a_text_are_the_last_state_of_a_forward_pass_over_it_alone",),
    ),
    Mutant(
        "bertscore", "the marks at the ends count", "report/measures/bertscore.py", "~marks[there]",
        "torch.ones_like(marks[there])", (f"{QUALITY}bert_scores_are_those_of_bert_score",),
    ),
    Mutant(
        "self-repetition", "a gram counts as repeated the first time", "report/measures/text_quality.py",
        "1 - len(set(grams)) / len(grams)", "1 - len(set(grams)) / (len(grams) + 1)",
        (f"{QUALITY}self_repetition_by_hand",),
    ),
    Mutant(
        "beside", "the interval of a change is that of the method alone", "report/beside.py",
        'math.hypot(a["half"], b["half"])', 'a["half"]',
        (f"{BESIDE}a_change_is_the_difference_to_the_base_with_both_intervals",), "change",
    ),
    Mutant(
        "planned-parts", "the plan forgets a moment of AdamW", "models/plan.py",
        "2 * FLOAT * s.trained", "FLOAT * s.trained",
        (f"{PLAN}the_state_of_adamw_has_two_moments",), "training_parts",
    ),
    Mutant(
        "planned-parts", "the plan counts keys and not values", "models/plan.py",
        'for key in ("keys", "values")', 'for key in ("keys",)',
        (f"{PLAN}the_cache_is_that_of_a_real_decode[tied]",), "_cache",
    ),
    Mutant(
        "notebook", "the advantage of GRPO trains, not that of the cell", "report/notebook.py",
        "grpo_train.advantages_of_step = advantages_of_step", "pass",
        (f"{NOTEBOOK}the_advantage_of_a_cell_is_the_one_that_trains",), "train_here",
    ),
    Mutant(
        "notebook", "the pairs that are right are shown as mistakes", "report/notebook.py",
        "if rejected >= chosen", "if chosen > rejected",
        (f"{NOTEBOOK}the_mistakes_of_a_reward_model_are_those_that_it_counted",), "mistakes",
    ),
    Mutant(
        "notebook", "the script does not hear of an interruption of the kernel alone", "report/notebook.py",
        "process.send_signal(signal.SIGINT)", "pass",
        (f"{NOTEBOOK}an_interrupted_cell_goes_on_when_it_is_run_again",), "follow",
    ),
    Mutant(
        "qlora", "an evaluation packs the weights, as the layers of bitsandbytes do", "models/fast/quantised.py",
        "        dtype = self.matmul_dtype(x)\n",
        "        if not (self.training or torch.is_grad_enabled()):\n"
        "            self.codes, self.state = library()._convert_weight_packed_for_cpu(self.codes, self.state)\n"
        "        dtype = self.matmul_dtype(x)\n",
        (IS_LORA,), "QuantisedLinear.forward",
    ),
    Mutant(
        "qlora", "blocks go on over the ends of rows", "models/fast/quantised.py",
        "F.pad(weight.flatten(), (0, padding)).view(-1, BLOCK)", "weight",
        (f"{QUANTISED}nf4_takes_the_nearest_number_of_the_paper_in_each_block_of_64[shape0]",),
    ),
    Mutant(
        "qlora", "the gradient of the input passes through rounded numbers", "models/fast/lora.py",
        "ctx.base.dequantised(g.dtype)", "ctx.base.dequantised(torch.bfloat16).to(g.dtype)", (IS_LORA,),
    ),
    Mutant(
        "qlora", "an adapter is merged into weights that are made at each access", "models/fast/lora.py",
        "return dequantise(model, dtype).merge_and_unload()", "return model.merge_and_unload()",
        (f"{QUANTISED}a_saved_adapter_names_its_base_and_gives_the_same_numbers",),
    ),
    Mutant(
        "qlora", "an adapter is loaded on the base as it is", "models/loader.py",
        "return trained or asked", "return asked",
        (f"{QUANTISED}a_saved_adapter_names_its_base_and_gives_the_same_numbers",),
    ),
    Mutant(
        "qlora", "a reward model shares a base that is rounded otherwise", "rlhf/reward_model.py",
        "shared and read_quantisation(adapter) == quantisation_of(model)", "shared",
        (f"{QLORA}a_reward_model_is_saved_plain_and_shared_only_by_a_policy_with_the_same_base",),
    ),
    Mutant(
        "qlora", "checks run in the dtype of the matmuls", "models/admission.py",
        "        layer.compute_dtype = None\n", "        pass\n",
        (f"{QUANTISED}a_check_computes_in_float32_where_matmuls_have_another_dtype",),
    ),
    Mutant(
        "planned-parts", "the last layer stands for itself alone", "models/plan.py",
        "same[-1]: len(same) - 1", "same[-1]: 1",
        (f"{PLAN}a_seventh_layer_is_a_layer_more",), "leave_two",
    ),
    Mutant(
        "planned-parts", "the mask of a row counts as what its tokens keep", "models/plan.py",
        "token = (b - a - of_row * square) / PROBE", "token = (b - a) / PROBE",
        (f"{PLAN}weights_and_what_a_pass_keeps_are_those_of_the_real_model[bf16-dtype1-0-learned positions]",),
        "probe",
    ),
]  # fmt: skip

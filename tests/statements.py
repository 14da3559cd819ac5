"""What must hold, as short keys and sentences. `pytest --statement KEY` runs the tests of one of them.

A test says what it shows by `@pytest.mark.statement(KEY, ...)`; tests/mutants/mutants.py holds, for each key, ways to
break the code that its tests must notice (`make mutants`). test_statements.py checks that nothing is missing.
"""

STATEMENTS = {
    # loss and gradient book-keeping
    "token-mean": "A loss is divided by the tokens that count in the whole optimizer step (pairs in DPO and the reward "
    "model), never by those of a micro-batch: any accumulation gives the same gradient.",
    "token-mean-ranks": "The same over processes with unequal shares: they take the step of one, with clipping on.",
    "ranks-equal": "After each optimizer step all processes hold equal parameters, in every trainer.",
    "one-all-reduce": "Gradients are reduced once an optimizer step, not once a micro-batch.",
    "sharded": "With weights sharded (FSDP) or layers split (TP) over two or three processes, a run takes the steps of "
    "one, goes on with any number of them, and saves a plain model; what cannot be split is refused by name.",
    "data-order": "The order is another in each epoch, the same for equal seed and epoch; all processes together see "
    "each row once, and an evaluation counts each sample once.",
    "schedule": "The learning rate follows optimizer steps, whatever the accumulation; it stands still on a step that "
    "the scaler skips and ends at its minimum.",
    "clipping": "Gradients are clipped after unscaling, in every trainer; the norm that is logged is the one before.",
    "mask-before-exp": "What a mask hides (1e3, inf, NaN) changes no bit of loss, gradient or metric.",
    "float32-softmax": "Log-softmax is computed in float32 for weights of half precision.",
    "lean-layers": "Layers and the loss that keep less for the backward pass give the values and gradients of those of "
    "transformers and of the definition.",
    # tokens, masks, templates
    "eos-is-target": "With pad equal to eos, the eos that ends a completion still counts: masks go by length.",
    "stop-token": "The stop token is in the loss with every template: a model fitted to four completions stops by "
    "itself.",
    "one-renderer": "One function renders prompts for every stage, with exactly one BOS where the model has one.",
    "empty-completion": "A row of which nothing would count is an error that names it.",
    "same-prompt-ids": "Chosen and rejected have the same prompt ids, also where text would merge at the boundary.",
    "truncation": "Truncation never erases a completion: the prompt is cut from the left, or the row dropped and "
    "counted.",
    "architectures": "Each architecture of transformers computes what its plain forward pass computes, by a "
    "fast or a slower way, or is refused by name; what trains is what samples and what is saved.",
    "packed-apart": "Packed samples do not see each other: logits are those of each alone, gradients across are 0, "
    "positions restart.",
    "text-in-pieces": "A long text is tokenised in pieces; with any tokenizer its ids are those of the whole text.",
    "planned-parts": "Each part of a plan is what torch allocates for it.",
    "cost-follows-work": "Memory and time of sampling follow the sampled tokens, not the limits that were set.",
    "shared-cores": "Threads wait shortly while other programs need the cores; the number of threads stays the same.",
    "resume-precision": "A run that goes on in another precision says so, and its numbers are of that precision.",
    "order-of-methods": "The order of methods comes with the share of draws over seeds and prompts in which it holds; "
    "a fall of the gold score is named only beyond its interval.",
    "targets": "Each target that was missed is named with its figure, and none that was reached.",
    "starts": "The comparison follows each run's start back to the base, and refuses another one before it measures.",
    "held-out": "A held-out split exists wherever two documents differ, and does not change with chance.",
    "left-padding": "A row of a left-padded batch gets what it gets alone, in forward and generation, with learned and "
    "with rotary positions.",
    "sampled-ids": "Training on rollouts uses the sampled ids, never their text encoded again.",
    # DPO
    "dpo-ln-2": "With dropout in the configuration the first DPO loss is ln 2 and the implicit rewards are 0; the "
    "reference is in eval mode, without gradients, and never changes.",
    "dpo-sums": "DPO adds log-probs over a completion; IPO alone takes their means. The losses have their worked "
    "values.",
    "dpo-unused-option": "An option that the chosen loss ignores is an error.",
    "adapter-off": "The reference as `adapter off` is bitwise the base model, after training too.",
    "cached-reference": "Cached reference log-probs are fresh ones. A run keeps them for itself alone, so that nothing "
    "of another model, tokenizer, template, length or dtype can be mistaken for them.",
    "logged-apart": "Log-probs of chosen and of rejected completions are logged apart.",
    # reward model
    "score-at-end": "The score is read at the last real token: left, right or no padding, pad equal to eos, eos inside "
    "the prompt.",
    "score-format": "Text is put into the same form for scoring as for training.",
    "bradley-terry": "The loss has its worked values with margin and centering; a constant added to all scores changes "
    "the centering term alone.",
    # PPO
    "reward-at-end": "The reward lands on the last real token, also where a completion fills its length.",
    "gae-padding": "Padding never reaches the advantages, which are their definition's double sum.",
    "bootstrap": "A completion cut by its length can go on at its last value; its finish_reason says whether it was "
    "cut.",
    "whitening": "Whitening counts the real tokens of all processes; shift_mean=False keeps the mean.",
    "ppo-first-step": "On the first inner step the ratio is 1; approximate KL and clip fraction are 0.",
    "values-fixed": "The value of a token does not depend on that token; old values and log-probs stay over the inner "
    "epochs.",
    "reported-kl": "The KL that is reported, per sequence and per token, is that of an enumerated policy.",
    # KL
    "kl-gradients": "In expectation the gradient of k1 is 0, of k2 and ratio * k3 that of the reverse KL, of k3 that "
    "of the forward KL; k1 as a loss is refused.",
    # GRPO
    "group-advantages": "Advantages permute with the prompts, have mean 0 in a group, and their worked values; a group "
    "of one is refused.",
    "sampler-logprobs": "Log-probs computed again in training are the sampler's, at temperature 0.7 too; training "
    "samples without top-k and top-p.",
    "aggregations": "The three aggregations have their worked values, whatever the micro-batches and the padding.",
    "no-signal": "The share of groups without any difference in reward is logged.",
    "missing-eos": "The penalty of GRPO for a missing end of turn is subtracted from the rewards of the completions "
    "that were cut, and from no other.",
    "offline-online": "With stored log-probs, the offline gradient is that of the online step on the same data.",
    # reward functions
    "reward-left-out": "A completion without a reward is in no loss, mean, divisor or baseline: the step is that of a "
    "group without it, on any number of processes.",
    "reward-functions": "A reward is the weighted sum of the functions that apply. Calls may run at the same time and "
    "stay in order; one that raises is tried again once, and then loses its completion and no step. A changed file is "
    "noticed.",
    "prompt-columns": "The prompt is the named column of a row in any form; all other columns stay.",
    # the tasks and their gold scores
    "last-number": "An arithmetic completion is right when its last number is the answer: with thousands, signs, "
    "decimals and whatever stands around it.",
    "real-answer": "An instruction's gold score is 0 for nonsense that fits the form: nothing, an echo, a refusal, key "
    "words, invented words, what is off topic; plain good answers score 1.",
    "splits-apart": "No question is in two parts of a prompt file, in whatever order its numbers stand; nor of prompts "
    "that a program makes.",
    "verifier": "On prompts that a program makes, the gold score is what the task's own verifier gives.",
    "chosen-ended": "Where a run asks for it, no completion that was cut is chosen for a pair.",
    # LoRA, checkpoints
    "qlora": "Weights of 4 and 8 bits are those that bitsandbytes makes, and QLoRA is LoRA on them, bitwise: loss and "
    "all gradients, before and after an evaluation; what trains is what samples, what is saved and what is resumed.",
    "checkpointing": "Gradient checkpointing computes activations again, moves every LoRA B, and changes no gradient.",
    "tied-merged": "Tied embeddings survive saving, loading and merging; a merged model has the adapter's logits.",
    "resume": "Interrupted and resumed is uninterrupted, bit by bit, in every trainer.",
    "given-back": "After a Ctrl-C before the first log line the run's folder is absent, or the old run is there.",
    "log-line": "A log line has the important numbers in 80 columns; with --verbose true, all of them. No control "
    "character is printed.",
    "curves": "curves.png shows what metrics.jsonl holds, at a small share of the time, and ends no run.",
    "twice-at-once": "Of two equal commands at once, one does the work; the other says so and overwrites nothing.",
    "inference-resumes": "Inference that is killed goes on after its last finished batch and writes the very file of a "
    "run that never was; what another model or configuration had finished does not count.",
    "systems": "A system without POSIX locks is refused in one sentence; a Mac runs on its CPU.",
    "tracked-once": "A tracker gets each line of metrics.jsonl once, in one run, however often the run was killed; its "
    "login and its mode are those that wandb itself finds.",
    "doctor": "Each pattern of the doctor is found in a log that has it, and not in one that nearly has it; noise "
    "alone is seldom taken for a pattern.",
    "explained-variance": "The explained variance of the values is over all counted tokens of all processes.",
    "token-records": "What --keep_tokens leaves of a token is what its loss was computed from, and what transformers "
    "says of the sequence alone. Nothing in a run changes; one that was killed has each kept step once.",
    "token-view": "The page shows tokens as they are: no text ends the data, becomes markup or is invisible; numbers "
    "by pointer and keyboard, colours with a legend, readable light and dark, wide and narrow.",
    "notebook": "A cell of the notebook that was interrupted goes on when it is run again; the advantage that a cell "
    "defines is the one that trains; the mistakes of a reward model are those that its training counted.",
    "evaluation-pure": "Evaluation leaves parameters and random state as they were.",
    "torn-checkpoint": "A checkpoint torn by a kill is never loaded: the one before it is.",
    # measures beside the task
    "stereoset": "StereoSet's lms, ss and icat have the values of their definition: for an oracle, for chance, for "
    "swapped columns, over targets and over rows.",
    "crows-pairs": "CrowS-Pairs counts how often the stereotype is above, by kind of bias.",
    "bbq": "BBQ counts right options, apart for passages that tell and that do not.",
    "bias-scores": "The score of each row is that of lm-eval, and of a plain forward pass.",
    "refusals": "A refusal is found in many wordings, and an answer that contains 'sorry' or 'cannot' is none.",
    "toxicity": "The toxic fraction counts each continuation once; the errors of the classifier stand beside it.",
    "mauve": "MAUVE has the closed values of its equations and sees what the base's states of single texts say.",
    "bertscore": "BERTScore is that of the package bert-score.",
    "self-repetition": "Self-repetition counts the word 4-grams of a text that stood in it before.",
    "beside": "The report's changes beside the task are differences to the base with both intervals, and it names "
    "those alone that are outside theirs.",
}

"""EXACT.md, from what proof/exact.py measured. Every number in a sentence is computed."""

from __future__ import annotations

import textwrap

from proof.exact_bed import ZERO

ENDS = {
    "DPO": "π*: the loss is least where β·log(π/π_ref) differs between any two completions as their rewards do",
    "IPO": "π_ref(y)·exp(|y|·(win(y)/β + c)), means over tokens: win(y), the probability that y is preferred to a "
    "completion of the reference, stands for the reward, and the length multiplies it",
    "IPO, sums": "π_ref(y)·exp(win(y)/β)/Z, the paper's: a completion can win at most always, so the pull is bounded",
    "PPO": "π*: the KL is in the reward, and at π* every advantage is 0 once the values have learnt",
    "PPO, no values": "found by running: without a baseline, dividing by the batch's tokens favours some lengths",
    "GRPO": "found by running: rewards count in units of the group's deviation, and the KL of a token leaves out "
    "the KL to come",
    "GRPO, sequence, k3": "found by running: as GRPO, but the tokens of a completion count 1/length, and the KL is the "
    "forward one",
    "GRPO, constant, no std": "π_ref(a|s)·exp(κ·Q(s,a)/β)/Z(s) with κ = (G-1)/G and Q the policy's own expected reward",
    "GRPO, KL × (G-1)/G": "the same with κ = 1: what is left is that Q holds no KL to come",
    "offline GRPO": "found by running: clipping stops a ratio; at the kinks of clipping the gradient does not vanish",
    "offline, constant, no std, no clip": "π_ref(a|s)·exp(κ·Q_ref(s,a)/β)/Z(s): one such improvement of the reference",
    "offline, no stored log-probs": "found by running: advantage-weighted fine-tuning",
}


def grid(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def wrapped(text):
    """The text with its paragraphs and list items filled to 120 columns; tables, headings and pictures as they are."""
    blocks = []
    for block in text.split("\n\n"):
        if block.startswith("- "):
            items = block[2:].split("\n- ")
            block = "\n".join(filled(item, "- ", "  ") for item in items)
        elif not block.startswith(("|", "#", "!")):
            block = filled(block)
        blocks.append(block.strip("\n"))
    return "\n\n".join(blocks) + "\n"


def filled(text, first="", others=""):
    return textwrap.fill(
        " ".join(text.split()), 120, initial_indent=first, subsequent_indent=others, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def number(x, digits=3):
    return "0" if abs(x) < ZERO else f"{x:.{digits}f}"


def percent(x):
    return "0" if abs(x) < ZERO else f"{100 * x:+.1f} %"


def estimator_name(row):
    return ("ratio · " if row["ratio"] else "") + row["kind"]


def list_of(names):
    names = list(names)
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names) or "none"


def estimators_grid(rows):
    header = ["estimator", "samples", "value", "in the loss", "cosine", "is", "in the reward", "cosine", "is"]
    lines = []
    for row in rows:
        cells = [estimator_name(row), "μ" if row["off"] else "π", percent(row["value"])]
        for place in ("loss", "reward"):
            g = row[place]
            cells += [number(g["error"]), "-" if g["is"] == "0" else number(g["cosine"]), g["is"]]
        lines.append(cells)
    return grid(header, lines)


def estimators_text(found):
    by_unit = {unit: [r for r in found["estimators"]["tabular"] if r["unit"] == unit] for unit in ("token", "sequence")}

    def named(unit, place, gradient, off=False):
        rows = [r for r in by_unit[unit] if r["off"] == off and r[place]["is"] == gradient]
        return list_of(estimator_name(r) for r in rows)

    def worst(path, name):
        return max(errors[name] for _, errors in found["paths"][path])

    myopic = next(r for r in by_unit["token"] if r["kind"] == "k3" and r["ratio"] and not r["off"])["loss"]
    pairs = list(zip(found["estimators"]["tabular"], found["estimators"]["transformer"]))
    same = sum(a[place]["is"] == b[place]["is"] for a, b in pairs for place in ("loss", "reward"))
    exact_values = list_of(estimator_name(r) for r in by_unit["token"] if abs(r["value"]) < ZERO)
    off_values = list_of(estimator_name(r) for r in by_unit["sequence"] if r["off"] and abs(r["value"]) < ZERO)
    return f"""## 1. The KL estimators

The policy π is {found["kl"]:.3f} nats per sequence from the reference. μ is another policy. "value" is the relative
error of the estimator's expected value. "in the loss" and "in the reward" are the relative errors |g - ∇KL|/|∇KL| of
the expected gradient g if the estimator is a loss, and if it is (minus) a reward. ∇KL is the exact gradient of
KL(π‖ref) of whole completions, "cosine" is that of g and ∇KL, and "is" says which gradient g is, to {ZERO:.0e} of
|∇KL|. "ratio" is the policy over the one that sampled; it is differentiated, too. A reward is computed when the
completion is sampled, and is constant from then on, as in PPO.

### Summed over the tokens, as in training

"∇ token KL" is the gradient of the KL of each next token. It is summed over the prefixes as often as the sampler visits
them, and the visits are held fixed.

{estimators_grid(by_unit["token"])}
- Estimators with exact values on the policy's own samples: {exact_values}.
- In the loss, on policy: {named("token", "loss", "0")} has gradient 0. {named("token", "loss", "∇ token KL(π‖ref)")}
  have the gradient of the token KLs, and {named("token", "loss", "∇ token KL(ref‖π)")} has that of the forward ones.
  Neither is the gradient of the KL of whole completions: both leave out that a token decides which prefixes follow. For
  ratio · k3 the difference is {100 * myopic["error"]:.0f} % of the gradient, at a cosine of {myopic["cosine"]:.3f}.
  Estimators with the gradient of the KL of whole completions: {named("token", "loss", "∇KL(π‖ref)")}.
- In the reward, on policy, the estimators with the gradient of the KL of whole completions are:
  {named("token", "reward", "∇KL(π‖ref)")}.
- In the loss, on μ's samples: the gradient of {named("token", "loss", "-∇KL(μ‖π)", True)} pushes the policy away from
  μ, whatever the reference is. {named("token", "loss", "∇ token KL(π‖ref)", True)} keep the gradient of the token KLs,
  at μ's prefixes.

### With a whole completion as one choice

Completions of one token behave like this.

{estimators_grid(by_unit["sequence"])}
- In the loss, on policy: {named("sequence", "loss", "∇KL(π‖ref)")} have the gradient of the reverse KL,
  {named("sequence", "loss", "∇KL(ref‖π)")} has that of the forward KL, and {named("sequence", "loss", "0")} has none.
- In the loss, on μ's samples: {named("sequence", "loss", "∇KL(π‖ref)", True)} have the right gradient. The value of
  {off_values} is right, too. In the reward, {named("sequence", "reward", "∇KL(π‖ref) - ∇KL(π‖μ)", True)} lacks
  ∇KL(π‖μ), because the reward is that of the policy that sampled.
- A two-layer transformer (GPT-2's, float64) has the same entry in {same} of {2 * len(pairs)} "is" cells of both tables.

![error of the KL's gradient](figures/exact_estimators.png)

On policy (left), only k1 in the reward is exact. In the loss, ratio · k3 and k2 are off by what they leave out, and the
error of k3 grows as the policy moves away from the reference. On samples of an earlier policy (right) none is exact,
and ratio · k3 has the smallest error far from that policy. The largest errors on the left are: k1 in the reward
{number(worst(0, "k1 in the reward"))}, ratio · k3 in the loss {worst(0, "ratio · k3 in the loss"):.2f}, k3 in the loss
{worst(0, "k3 in the loss"):.2f}. On the right they are {worst(1, "k1 in the reward"):.2f},
{worst(1, "ratio · k3 in the loss"):.2f} and {worst(1, "k3 in the loss"):.1f}.
"""


def gradients_text(found):
    rows = found["aggregations"]
    at = {(r["aggregate"], r["scale_std"]): r for r in rows}
    header = ["divide by", "std", "cosine", "norm", "hard / graded", "1 token / longest", "transformer: cosine", "norm"]
    table = grid(
        header,
        [
            [r["aggregate"], "yes" if r["scale_std"] else "no", number(r["tabular"]["cosine"], 4),
             number(r["tabular"]["norm"]), number(r["hard"]), number(r["short"]),
             number(r["transformer"]["cosine"], 4), number(r["transformer"]["norm"])]
            for r in rows
        ],
    )  # fmt: skip
    critics = grid(
        ["values", "λ", "divide by", "error", "cosine", "norm"],
        [
            [r["values"], r["lam"], r["divide"], number(r["error"]), number(r["cosine"], 4), number(r["norm"])]
            for r in found["critics"]
        ],
    )
    by_constant = [r for r in found["critics"] if r["divide"] == "constant"]
    unbiased = list_of(f"{r['values']} at λ = {r['lam']:g}" for r in by_constant if r["error"] < ZERO)
    worst = max(by_constant, key=lambda r: r["error"])
    whitened = [r for r in found["critics"] if "whitened" in r["divide"]]
    old = grid(
        ["samples of μ", "error", "cosine", "norm"],
        [[r["name"], number(r["error"]), number(r["cosine"], 4), number(r["norm"])] for r in found["old_samples"]],
    )
    plain, sequence, token, scaled = (
        at[key] for key in (("constant", False), ("sequence", False), ("token", False), ("constant", True))
    )
    spread, size = found["completions"]["spread"], found["config"].samples_per_prompt
    over, under = (slope * size / (size - 1) for slope in sequence["slopes"])
    curve = dict(zip(found["rates"], found["weights"][8, True]))
    lowest, middle = min(curve), min(curve, key=lambda rate: abs(rate - 0.5))
    return f"""## 2. Policy gradients

### GRPO: how token losses become one number

The table compares expected gradients with the exact gradient of E[reward]. They are taken over all batches of one group
of {size} completions to each prompt, without KL, and losses are in units of tokens (times `max_tokens`, or times the
mean length). Two columns are ratios of the weights of the rewards' gradient: of the hard prompt to the graded one, and
of completions of one token to the longest. 1 is right in both.

{table}
- `constant` without the deviation is the exact gradient times {plain["tabular"]["norm"]:.4f} = (G-1)/G, because a
  group's mean holds the completion itself. The cosine is {plain["tabular"]["cosine"]:.6f}.
- `sequence` counts a token of a completion of one token {sequence["short"]:.2f} times as much as one of the longest. It
  pulls a short right completion up harder, and it pushes a long wrong one down less. The cosine is
  {sequence["tabular"]["cosine"]:.4f}.
- `token` divides by the tokens of the whole batch, which depend on the completions. The cosine is
  {token["tabular"]["cosine"]:.4f}.
- Dividing by the group's deviation lowers the weight of a prompt whose rewards spread. With `constant`, the hard
  prompt, whose standard deviation is {spread["hard"]:.2f}, counts {scaled["hard"]:.2f} times as much as the graded one
  with {spread["graded"]:.2f}. For rewards of 0 and 1 and groups of 8, a prompt that is solved {100 * lowest:.0f} % of
  the time counts {curve[lowest] / curve[middle]:.2f} times as much as one that is solved half of the time (right
  panel).

![the advantage that each completion gets](figures/exact_gradients.png)

Divided by a constant, each completion's advantage is on the line that it should be on (left). With per-sequence means,
the advantages of completions of one token lie {over:.2f} times as far from 0 as the line, and those of the longest
{under:.2f} times (middle). Divided by the deviation, prompts that are almost never or almost always solved weigh most
(right).

### PPO: values, λ and what the loss is divided by

The table compares the expected gradient, on policy and with the KL in the reward, with that of E[reward] - β·KL. The
values "exact + noise" have errors of standard deviation 0.3. "tokens" are those of a batch of two completions to each
prompt.

{critics}
- Divided by a constant, the gradient is exact with these values: {unbiased}. The worst of the others,
  {worst["values"]} at λ = {worst["lam"]:g}, is off by {100 * worst["error"]:.0f} %.
- Whitening over such a small batch multiplies the norm by {min(r["norm"] for r in whitened):.1f} to
  {max(r["norm"] for r in whitened):.1f}. The cosine is {min(r["cosine"] for r in whitened):.3f} or more.

### Samples of another policy

GRPO on groups of μ, `constant` without the deviation, times G/(G-1), against the gradient of E[reward]. The ratio is
that of each token, so prefixes stay as frequent as μ makes them. Clipping takes tokens out of the gradient.

{old}"""


def fixed_points_text(found):
    rows = {r["name"]: r for r in found["fixed_points"]}
    start, best = found["start"], found["best"]
    header = ["method", "KL to π*", "reward", "KL to ref", "tokens", "gradient norm", "KL to closed form", "ends at"]
    ideal = ["π* itself", "0", f"{best['reward']:.3f}", f"{best['kl']:.3f}", f"{best['length']:.2f}", "", "", ""]
    base = ["the reference", f"{start['to_best']:.3f}", f"{start['reward']:.3f}", "0", f"{start['length']:.2f}"]
    table = grid(
        header,
        [
            [*base, "", "", ""],
            ideal,
            *(
                [r["name"], number(r["to_best"], 4), f"{r['reward']:.3f}", f"{r['kl']:.3f}", f"{r['length']:.2f}",
                 f"{r['last_norm']:.0e}", "" if r["to_closed"] is None else number(r["to_closed"], 4), ENDS[r["name"]]]
                for r in rows.values()
            ),
        ],
    )  # fmt: skip
    reached = list_of(name for name, r in rows.items() if abs(r["to_best"]) < ZERO)
    matched = [r for r in rows.values() if r["to_closed"] is not None]
    plain, corrected, default = (rows[k] for k in ("GRPO, constant, no std", "GRPO, KL × (G-1)/G", "GRPO"))
    nearer = sum(r["to_best"] < start["to_best"] for r in rows.values())
    farthest = max(rows, key=lambda name: rows[name]["to_best"])
    clipped, free = rows["offline GRPO"], rows["offline, constant, no std, no clip"]
    size = found["config"].samples_per_prompt
    text = f"""## 3. Where each method ends

A tabular policy starts at the reference and descends the exact expected loss for {found["config"].steps} steps of
natural gradient descent: the gradient of each choice is divided by how often the choice is made. The fixed points are
those of the plain gradient. DPO and IPO train on all pairs of the reference's completions, labelled by σ(r(y) - r(y')).
PPO has batches of {size} completions, λ = 0.95, values that learn beside the policy, and advantages that are not
whitened. GRPO has groups of {size}. Plain "GRPO" is the default of `grpo_train.py`: `token`, divided by the deviation,
ratio · k3. Offline groups are the reference's. The numbers are means over the two prompts, KL is in nats per sequence,
and the gradient norm is that of the last step. E[reward] - β·KL is below its maximum by β·KL(π‖π*), so the first column
is what the objective lacks, divided by β.

{table}
- Methods that end at π* (KL below {ZERO:.0e} nats): {reached}.
- The largest KL to one of the {len(matched)} closed forms is {max(abs(r["to_closed"]) for r in matched):.0e} nats.
- Two parts of GRPO's distance can be named. The (G-1)/G on the rewards acts like a larger β: the distance is
  {plain["to_best"]:.4f}, and it is {corrected["to_best"]:.4f} if the KL's weight is lowered by as much. The rest comes
  from the KL in the loss, which holds prefixes fixed (section 1). With completions of one token the rest is
  {number(found["one_token"], 4)}.
- With its defaults GRPO ends {default["kl"]:.2f} nats from the reference, and π* is {best["kl"]:.2f} from it. The
  reason is that the deviation divides the rewards and not the KL.
- Offline, clipping at 0.2 ends {clipped["kl"]:.3f} nats from the reference and {clipped["to_best"]:.3f} from π*; the
  last tenth of the steps moved it by {clipped["moved"]:.0e}. Without clipping, one improvement of the reference is
  {free["to_best"]:.3f} from π*.
"""
    if found["transformer"]:
        ends = "; ".join(
            f"{r['name']} {max(r['to_closed'], 1e-12):.0e} nats or less (gradient norm {r['last_norm']:.0e})"
            for r in found["transformer"]
        )
        text += f"""- A two-layer transformer is trained by Adam for {found["config"].transformer_steps} steps on the
    same expected losses. Its KL to the closed form, to rounding: {ends}.
"""
    return f"""{text}
![KL to the optimum against steps, and where each method ends](figures/exact_fixed_points.png)

{reached} fall towards π* until rounding stops them, and the others come to rest at a distance (left). The distance of
{farthest} is the largest. All begin at the reference, and {nearer} of {len(rows)} end nearer to π* than it is (right).
"""


def markdown(found):
    config = found["config"]
    return wrapped(f"""# The exact test bed

Made by `python proof/exact.py` (seed {config.seed}, β = {config.beta:g}). The numbers in the sentences are computed.

Every completion to two prompts is enumerated: {len(found["completions"]["lengths"])} completions of 1 to
{max(found["completions"]["lengths"])} tokens over a vocabulary of a stop token and two words. The rewards of the graded
prompt lie between 0 and 1. The hard prompt pays 1 for two long completions and 0 for the rest. Expectations over
completions and over groups are finite sums in float64 of the functions that train. The objective
E[reward] - β·KL(π‖ref) has its maximum at π*(y) = π_ref(y)·exp(r(y)/β)/Z.

{estimators_text(found)}
{gradients_text(found)}
{fixed_points_text(found)}""")

"""EXACT.md, from what proof/exact.py measured. Every number in a sentence is computed."""

from __future__ import annotations

import textwrap

from proof.exact_bed import ZERO

ENDS = {
    "DPO": "π*: the loss is least where β·log(π/π_ref) differs between any two answers as their rewards do",
    "IPO": "π_ref(y)·exp(|y|·(win(y)/β + c)), means over tokens: win(y), the probability that y is preferred to an "
    "answer of the reference, stands for the reward, and the length multiplies it",
    "IPO, sums": "π_ref(y)·exp(win(y)/β)/Z, the paper's: an answer can win at most always, so the pull is bounded",
    "PPO": "π*: the KL is in the reward, and once the values have learnt, every advantage there is 0",
    "PPO, no values": "found by running: without a baseline, dividing by the batch's tokens favours some lengths",
    "GRPO": "found by running: rewards count in units of the group's deviation, and the KL of a token forgets those to "
    "come",
    "GRPO, sequence, k3": "found by running: besides, the tokens of an answer count 1/length, and the KL is the "
    "forward one",
    "GRPO, constant, no std": "π_ref(a|s)·exp(κ·Q(s,a)/β)/Z(s) with κ = (G-1)/G and Q the policy's own expected reward",
    "GRPO, KL × (G-1)/G": "the same with κ = 1: what is left is that Q holds no KL to come",
    "offline GRPO": "found by running: a ratio that clipping holds goes no further; at its kinks the gradient does not "
    "vanish",
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
    by_unit = {unit: [r for r in found["estimators"]["tabular"] if r["unit"] == unit] for unit in ("token", "answer")}

    def named(unit, place, gradient, off=False):
        rows = [r for r in by_unit[unit] if r["off"] == off and r[place]["is"] == gradient]
        return list_of(estimator_name(r) for r in rows)

    def worst(path, name):
        return max(errors[name] for _, errors in found["paths"][path])

    myopic = next(r for r in by_unit["token"] if r["kind"] == "k3" and r["ratio"] and not r["off"])["loss"]
    pairs = list(zip(found["estimators"]["tabular"], found["estimators"]["transformer"]))
    same = sum(a[place]["is"] == b[place]["is"] for a, b in pairs for place in ("loss", "reward"))
    exact_values = list_of(estimator_name(r) for r in by_unit["token"] if abs(r["value"]) < ZERO)
    off_values = list_of(estimator_name(r) for r in by_unit["answer"] if r["off"] and abs(r["value"]) < ZERO)
    return f"""## 1. The KL estimators

The policy π is {found["kl"]:.3f} nats an answer from the reference; μ is another policy. Columns: relative error of the
estimator's expected value; relative error |g - ∇KL|/|∇KL| and cosine of its expected gradient against the exact
gradient of KL(π‖ref) of whole answers, used as a loss and as (minus) a reward; and what the gradient equals, to
{ZERO:.0e} of |∇KL|. "ratio" is the policy over the one that sampled, differentiated too. A reward is what PPO's is:
computed when the answer is sampled, and then constant.

### Summed over the tokens, as the trainers do

"∇ token KL" is the gradient of the KL of each next token, summed over the prefixes as the sampler visits them, with the
visits held fixed.

{estimators_grid(by_unit["token"])}
- On the policy's own samples the values of {exact_values} are exact.
- In the loss, on policy, {named("token", "loss", "0")} has gradient 0. {named("token", "loss", "∇ token KL(π‖ref)")}
  have the gradient of the token KLs, {named("token", "loss", "∇ token KL(ref‖π)")} that of the forward ones. Neither is
  that of the KL of whole answers, as both leave out that a token decides which prefixes follow: for ratio · k3 the
  difference is {100 * myopic["error"]:.0f} % of the gradient, at a cosine of {myopic["cosine"]:.3f}. Of the KL of whole
  answers itself, in the loss: {named("token", "loss", "∇KL(π‖ref)")}.
- In the reward, on policy, the gradient of the KL of whole answers comes from
  {named("token", "reward", "∇KL(π‖ref)")}.
- On μ's samples, in the loss, the gradient of {named("token", "loss", "-∇KL(μ‖π)", True)} pushes the policy away from
  μ, whatever the reference; {named("token", "loss", "∇ token KL(π‖ref)", True)} keep that of the token KLs, at μ's
  prefixes.

### With a whole answer as one choice

So do answers of one token behave.

{estimators_grid(by_unit["answer"])}
- On policy, in the loss: {named("answer", "loss", "∇KL(π‖ref)")} have the gradient of the reverse KL,
  {named("answer", "loss", "∇KL(ref‖π)")} that of the forward KL, {named("answer", "loss", "0")} none.
- On μ's samples the value and, in the loss, the gradient of {named("answer", "loss", "∇KL(π‖ref)", True)} are right
  (values: {off_values}). In the reward, {named("answer", "reward", "∇KL(π‖ref) - ∇KL(π‖μ)", True)} lacks ∇KL(π‖μ), as
  the reward speaks of the policy that sampled.
- A two-layer transformer (GPT-2's, float64) has the same entry in {same} of {2 * len(pairs)} "is" cells of both tables.

![error of the KL's gradient](figures/exact_estimators.png)

The figure: on policy k1 in the reward alone is exact; in the loss ratio · k3 and k2 are off by what they leave out, and
k3 by more the farther the policy goes; on samples of an earlier policy none is exact, and far from it ratio · k3 errs
least. The largest errors as the policy leaves the reference (left): k1 in the reward
{number(worst(0, "k1 in the reward"))}, ratio · k3 in the loss {worst(0, "ratio · k3 in the loss"):.2f}, k3 in the loss
{worst(0, "k3 in the loss"):.2f}. As it leaves the policy that sampled (right): {worst(1, "k1 in the reward"):.2f},
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
    spread, size = found["answers"]["spread"], found["config"].group_size
    over, under = (slope * size / (size - 1) for slope in sequence["slopes"])
    curve = dict(zip(found["rates"], found["weights"][8, True]))
    lowest, middle = min(curve), min(curve, key=lambda rate: abs(rate - 0.5))
    return f"""## 2. Policy gradients

### GRPO: how token losses become one number

Expected gradients over all batches of one group of {found["config"].group_size} answers to each prompt, without KL,
against the exact gradient of E[reward]; losses are taken in units of tokens (times `max_tokens`, or times the mean
length). The other two columns are ratios
of the weights of the rewards' gradient: of the hard prompt to the graded one, and of answers of one
token to the longest. 1 is right in both.

{table}
- `constant` without the deviation is the exact gradient times {plain["tabular"]["norm"]:.4f} = (G-1)/G, since a group's
  mean holds the answer itself: cosine {plain["tabular"]["cosine"]:.6f}.
- `sequence` counts a token of an answer of one token {sequence["short"]:.2f} times as much as one of the longest: a
  short right answer is pulled up harder and a long wrong one pushed down less. Cosine
  {sequence["tabular"]["cosine"]:.4f}.
- `token` divides by the tokens of the whole batch, which depend on the answers: cosine
  {token["tabular"]["cosine"]:.4f}.
- Dividing by the group's deviation lowers the weight of a prompt whose rewards spread: with `constant` the hard one,
  whose standard deviation is {spread["hard"]:.2f}, counts {scaled["hard"]:.2f} times as much as the graded one with
  {spread["graded"]:.2f}. For rewards of 0 and 1 and groups of 8, a prompt solved {100 * lowest:.0f} % of the time
  counts {curve[lowest] / curve[middle]:.2f} times as much as one solved half of the time (right panel).

![the advantage that each answer gets](figures/exact_gradients.png)

The figure: divided by a constant, each answer's advantage is on the line that it should be on (left); by per-sequence
means, those of one token lie {over:.2f} times as far from 0 as the line, and those of the longest
{under:.2f} times (middle); over the deviation, prompts that are almost never or almost always solved weigh
most (right).

### PPO: values, λ and what the loss is divided by

The expected gradient on policy, KL in the reward, against that of E[reward] - β·KL. "exact + noise" has errors of
standard deviation 0.3. "tokens": of a batch of two answers to each prompt.

{critics}
- Divided by a constant, the gradient is exact with these values: {unbiased}. The worst of the others,
  {worst["values"]} at λ = {worst["lam"]:g}, is off by {100 * worst["error"]:.0f} %.
- Whitening over so small a batch changes the norm {min(r["norm"] for r in whitened):.1f}- to
  {max(r["norm"] for r in whitened):.1f}-fold, and the direction to a cosine of
  {min(r["cosine"] for r in whitened):.3f} or better.

### Samples of another policy

GRPO, `constant` without the deviation, taken times G/(G-1), on groups of μ, against the gradient of E[reward]. The
ratio is that of each token, so prefixes stay as frequent as μ makes them; clipping takes tokens out of the gradient.

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
    text = f"""## 3. Where each method ends

A tabular policy goes from the reference down the exact expected loss for {found["config"].steps} steps of natural
gradient descent (the gradient of each choice over how often it is made; the fixed points are those of the plain
gradient). DPO and IPO: all pairs of the reference's answers, labelled by σ(r(y) - r(y')). PPO: batches of
{found["config"].group_size} answers, λ = 0.95, values that learn beside the policy, advantages as they are (not
whitened). GRPO: groups of {found["config"].group_size}; plain "GRPO" is the default of `grpo_train.py`
(`token`, divided by the deviation, ratio · k3), offline groups are the reference's. Means over the two prompts; KL in
nats, the gradient norm at the last step. Since E[reward] - β·KL falls short of its maximum by β·KL(π‖π*), the first
column is the loss in objective over β.

{table}
- Methods that end at π* (KL below {ZERO:.0e} nats): {reached}.
- The largest KL to one of the {len(matched)} closed forms is {max(abs(r["to_closed"]) for r in matched):.0e} nats.
- Two parts of GRPO's distance can be named. The (G-1)/G on the rewards acts like a larger β: the distance is
  {plain["to_best"]:.4f}, and {corrected["to_best"]:.4f} with the KL's weight lowered by as much. The rest is the KL in
  the loss, which holds prefixes fixed (section 1): with answers of one token it is {number(found["one_token"], 4)}.
- With its defaults GRPO ends {default["kl"]:.2f} nats from the reference, where π* is {best["kl"]:.2f} from it: the
  deviation divides the rewards and not the KL.
- Offline, clipping at 0.2 ends {clipped["kl"]:.3f} nats from the reference and {clipped["to_best"]:.3f} from π* (moved
  by {clipped["moved"]:.0e} over the last tenth of the steps); without clipping, one improvement of the reference is
  {free["to_best"]:.3f} from π*.
"""
    if found["transformer"]:
        ends = "; ".join(
            f"{r['name']} {max(r['to_closed'], 1e-12):.0e} nats or less (gradient norm {r['last_norm']:.0e})"
            for r in found["transformer"]
        )
        text += f"""- A two-layer transformer, trained by Adam for {found["config"].transformer_steps} steps on the same
    expected losses. KL to the closed form, to rounding: {ends}.
"""
    return f"""{text}
![KL to the optimum against steps, and where each method ends](figures/exact_fixed_points.png)

The figure: {reached} fall towards π* until rounding stops them, and the others come to rest at a distance (left), the
largest that of {farthest}; {nearer} of {len(rows)} end nearer to π* than the reference, where all begin (right).
"""


def markdown(found):
    config = found["config"]
    return wrapped(f"""# The exact test bed

Made by `python proof/exact.py` (seed {config.seed}, β = {config.beta:g}); the numbers in the sentences are computed.

Every answer to two prompts is enumerated: {len(found["answers"]["lengths"])} answers of 1 to
{max(found["answers"]["lengths"])} tokens over a vocabulary of a stop token and two words. The graded prompt's rewards
lie between 0 and 1; the hard one pays 1 for two long answers and 0 for the rest. Expectations, over answers and over
groups, are finite sums in float64, of the functions that the trainers import. What is to be maximised, E[reward] -
β·KL(π‖ref), has its maximum at π*(y) = π_ref(y)·exp(r(y)/β)/Z.

{estimators_text(found)}
{gradients_text(found)}
{fixed_points_text(found)}""")

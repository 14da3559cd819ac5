"""What the losses do in expectation, on policies whose completions are all enumerated: equalities, to rounding."""

import itertools

import pytest
import torch

from proof.exact import Config, main
from proof.exact_bed import (
    UNCLIPPED,
    Bed,
    expected_grpo,
    gradient,
    ipo_optimum,
    kl,
    make_bed,
    objective,
    optimum,
    prefix_logits,
    probabilities,
    prompts_and_completions,
    tabular,
    tiny_transformer,
    token_kl,
    transformer_table,
)
from proof.exact_fixed_points import descend, measure_one_token, methods, train_transformer
from proof.exact_gradients import (
    compare,
    effective_advantages,
    estimate,
    measure_aggregations,
    measure_critics,
    measure_estimators,
    measure_old_samples,
    some_policies,
    success_weight,
)
from rlhf.utils import pad_rows, token_logprobs

pytestmark = pytest.mark.slow

EXACT = 1e-11  # relative; sums of some thousand terms in float64
G = 2  # completions in a group: 120 groups of each prompt


@pytest.fixture(scope="module")
def bed():
    return make_bed()


@pytest.fixture(scope="module")
def policies(bed):
    return some_policies(bed, 0)


def close(found, exact):
    return compare(found, exact)["error"] < EXACT


# the bed itself


def test_every_completion_is_there_once_and_no_completion_begins_another(bed):
    # vocabulary of 3, at most 3 tokens: 1 + 2 + 4 * 3 completions
    completions = prompts_and_completions(bed)[1][: len(bed.tokens)]
    assert len(completions) == 15 and len({tuple(a) for a in completions}) == 15
    assert not any(b[: len(a)] == a for a, b in itertools.permutations(completions, 2))


def test_probabilities_sum_to_1(bed, policies):
    for _, table in policies[0].values():
        torch.testing.assert_close(probabilities(table.detach()).sum(1), torch.ones(2).double())


def test_pi_star_maximises_the_objective(bed, policies):
    best = optimum(bed)
    logits = prefix_logits(bed, best).requires_grad_()
    assert gradient(objective(bed, tabular(bed, logits)), [logits]).norm() < 1e-14
    for _, table in policies[0].values():  # and any other policy falls short of it by beta * KL(policy || pi*)
        shortfall = objective(bed, best) - objective(bed, table)
        torch.testing.assert_close(shortfall.item(), (bed.beta * kl(table, best).mean()).item())


def test_a_transformer_gives_a_completion_the_same_log_probs_packed_and_alone(bed):
    model = tiny_transformer(bed, 1)
    prompts, completions = prompts_and_completions(bed)
    ids, mask = pad_rows([p + c for p, c in zip(prompts, completions)], 0, "cpu")
    counted, _ = pad_rows([[0] * (len(p) - 1) + [1] * len(c) for p, c in zip(prompts, completions)], 0, "cpu")
    with torch.no_grad():
        alone = token_logprobs(model, ids, mask, where=counted)[:, -bed.max_tokens :]
        torch.testing.assert_close(alone.view(bed.ref.shape), transformer_table(bed, model))


# KL: k1, k2, k3


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
def test_of_whole_completions_k1_has_no_gradient_k2_the_reverse_kls_and_k3_the_forward_kls(bed, policies, policy):
    parameters, table = policies[0][policy]
    exact = {
        "k2": gradient(kl(table, bed.ref).mean(), parameters),
        "k3": gradient(kl(bed.ref, table).mean(), parameters),
    }
    for kind, expected in exact.items():
        found = gradient(estimate(bed, table, table.detach(), kind, False, "sequence")[0], parameters)
        assert close(found, expected), kind
    nothing = gradient(estimate(bed, table, table.detach(), "k1", False, "sequence")[0], parameters)
    assert nothing.norm() < EXACT * exact["k2"].norm()


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
def test_ratio_k3_of_whole_completions_has_the_reverse_kls_value_and_gradient_on_any_samples(bed, policies, policy):
    parameters, table = policies[0][policy]
    exact = kl(table, bed.ref).mean()
    for sampler in (table.detach(), policies[1], bed.ref):
        loss = estimate(bed, table, sampler, "k3", True, "sequence")[0]
        assert loss.item() == pytest.approx(exact.item(), rel=EXACT)
        assert close(gradient(loss, parameters), gradient(exact, parameters))


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
def test_summed_over_tokens_the_gradients_are_those_of_the_token_kls_with_the_prefixes_held_fixed(
    bed, policies, policy
):
    parameters, table = policies[0][policy]
    sampler = policies[1]
    whole = gradient(kl(table, bed.ref).mean(), parameters)
    for kind, ratio, source, forward in (
        ("k2", False, table.detach(), False),
        ("k3", False, table.detach(), True),
        ("k3", True, table.detach(), False),
        ("k3", True, sampler, False),
    ):
        found = gradient(estimate(bed, table, source, kind, ratio, "token")[0], parameters)
        assert close(found, gradient(token_kl(table, bed.ref, source, forward), parameters)), (kind, ratio)
        assert compare(found, whole)["error"] > 0.1, (kind, ratio)


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
def test_in_the_reward_k1_alone_has_the_gradient_of_the_kl_of_whole_completions(bed, policies, policy):
    parameters, table = policies[0][policy]
    whole = gradient(kl(table, bed.ref).mean(), parameters)
    errors = {}
    for kind in ("k1", "k2", "k3"):
        reward_loss = estimate(bed, table, table.detach(), kind, False, "token")[1]
        errors[kind] = compare(gradient(reward_loss, parameters), whole)["error"]
    assert errors["k1"] < EXACT and min(errors["k2"], errors["k3"]) > 0.5


def test_on_policy_the_values_of_k1_and_k3_are_the_kl_and_that_of_k2_is_not(bed, policies):
    rows = measure_estimators(bed, *policies[0]["tabular"], policies[1])
    for row in rows:
        unbiased = row["kind"] != "k2" and (not row["off"] or (row["ratio"] and row["unit"] == "sequence"))
        assert (abs(row["value"]) < EXACT) == unbiased, row


@pytest.mark.parametrize("kl_kind, forward", [("ratio_k3", False), ("k2", False), ("k3", True)])
def test_the_kl_in_grpo_loss_has_these_gradients(bed, policies, kl_kind, forward):
    parameters, table = policies[0]["tabular"]
    equal = Bed(**{**vars(bed), "rewards": torch.ones_like(bed.rewards)})  # no advantage: the KL alone
    loss = expected_grpo(equal, table, table, G, kl_coef=0.7, kl_kind=kl_kind, aggregate="constant")
    expected = 0.7 * gradient(token_kl(table, bed.ref, table, forward), parameters)
    assert close(bed.max_tokens * gradient(loss, parameters), expected)


# policy gradients


@pytest.mark.parametrize("policy", ["tabular", "transformer"])
@pytest.mark.parametrize("group_size", [2, 3])
def test_constant_without_std_is_the_exact_gradient_times_g_minus_1_over_g(bed, policies, policy, group_size):
    parameters, table = policies[0][policy]
    exact = gradient(objective(bed, table, beta=0.0), parameters)
    loss = expected_grpo(bed, table, table, group_size, scale_std=False, aggregate="constant")
    assert close(-bed.max_tokens * gradient(loss, parameters), (group_size - 1) / group_size * exact)


def test_the_other_aggregations_and_the_std_are_biased(bed, policies):
    rows, _ = measure_aggregations(bed, policies[0], G)
    cosines = {(r["aggregate"], r["scale_std"]): r["tabular"]["cosine"] for r in rows}
    assert cosines.pop(("constant", False)) == pytest.approx(1, abs=EXACT)
    assert len(cosines) == 5 and all(cosine < 1 - 1e-4 for cosine in cosines.values())
    assert cosines["sequence", False] < cosines["token", False]


def test_per_sequence_means_weigh_the_advantage_by_1_over_the_length(bed, policies):
    table = policies[0]["tabular"][1].detach()

    def loss(leaf):
        return expected_grpo(bed, leaf, table, G, scale_std=False, aggregate="sequence")

    exact = bed.rewards - (probabilities(table) * bed.rewards).sum(1, keepdim=True)
    torch.testing.assert_close(effective_advantages(bed, table, loss, 1), (G - 1) / G * exact / bed.lengths)


def test_dividing_by_the_std_weighs_a_prompt_by_its_success_rate():
    for group_size in (2, 5, 8):
        for rate in (0.05, 0.5, 0.9):
            plain = success_weight(rate, group_size, scale_std=False)
            assert plain == pytest.approx((group_size - 1) / group_size, rel=EXACT)
    # of two completions that differ the advantages are +-0.5 / (sqrt(0.5) + 1e-4), so E[A | 1] - E[A | 0] is one of
    # them, whatever the rate; of eight: the rarer success or failure is, the more it counts
    assert success_weight(0.1, 2, True) == pytest.approx(0.5 / (0.5**0.5 + 1e-4), rel=EXACT)
    assert success_weight(0.02, 8, True) > 1.3 * success_weight(0.5, 8, True)
    assert success_weight(0.02, 8, True) == pytest.approx(success_weight(0.98, 8, True))


def test_gae_is_unbiased_with_lambda_1_or_exact_values_and_else_not(bed, policies):
    for row in measure_critics(bed, *policies[0]["tabular"]):
        unbiased = row["divide"] == "constant" and (row["lam"] == 1.0 or row["values"] == "exact")
        assert (row["error"] < EXACT) == unbiased, row


def test_old_samples_with_a_ratio_are_unbiased_for_completions_of_one_token_until_clipping(bed, policies):
    short = make_bed(vocabulary=6, max_tokens=1)
    (parameters, table), sampler = some_policies(short, 0)[0]["tabular"], some_policies(short, 0)[1]
    errors = {row["name"]: row["error"] for row in measure_old_samples(short, parameters, table, sampler, G)}
    assert errors.pop("ratio, not clipped") < EXACT
    assert len(errors) == 2 and min(errors.values()) > 0.01
    # of three tokens: the ratio of each token leaves the prefixes as frequent as the sampler made them
    assert measure_old_samples(bed, *policies[0]["tabular"], policies[1], G)[0]["error"] > 0.01


# fixed points


@pytest.mark.parametrize(
    "name, steps",
    [
        ("DPO", 300), ("PPO", 150), ("IPO", 300), ("IPO, sums", 150), ("GRPO, constant, no std", 100),
        ("GRPO, KL × (G-1)/G", 100), ("offline, constant, no std, no clip", 300),
    ],
)  # fmt: skip
def test_ends_at_its_closed_form(bed, name, steps):
    loss, rate, options, closed = methods(bed, G)[name]
    table, trace, norms = descend(bed, loss, rate, steps, **options)
    assert kl(table, closed).mean() < 1e-10 and norms[1] < 1e-6 * norms[0]
    best = kl(table, optimum(bed)).mean()
    assert (best < 1e-10) == (name in ("DPO", "PPO")), best
    assert trace[0] == pytest.approx(kl(bed.ref, optimum(bed)).mean().item())


def test_with_completions_of_one_token_grpo_ends_at_pi_star():
    assert measure_one_token(0.3, G, 100, 0) < 1e-10


def test_ipo_by_token_means_depends_on_the_length_and_by_sums_does_not(bed):
    def pull(table):
        return (table - bed.ref).sum(-1)[1]  # of the hard prompt: all completions that are worth 0 win as often

    worthless = bed.rewards[1] == 0
    assert pull(ipo_optimum(bed))[worthless].std() < EXACT
    assert pull(ipo_optimum(bed, per_token=True))[worthless].std() > 0.1


def test_clipping_holds_offline_grpo_near_the_sampler(bed):
    """Where only the rewards pull, no completion's pull goes on beyond the clipped ratios."""
    plain = {"scale_std": False, "aggregate": "constant"}
    far = {"rate": 3.0, "steps": 60, "offline": True}
    ends = []
    for clip in (0.2, UNCLIPPED):

        def loss(table, clip=clip):
            return expected_grpo(bed, table, bed.ref, G, clip_low=clip, clip_high=clip, **plain)

        ends.append(kl(descend(bed, loss, **far)[0], bed.ref).mean().item())
    assert ends[0] < 0.2 * ends[1]


def test_a_transformer_ends_where_the_table_does(bed):
    loss, _, _, closed = methods(bed, G)["DPO"]
    table, norm = train_transformer(bed, loss, 400, seed=0)
    assert kl(table, closed).mean() < 1e-4 and norm < 1e-2


# the script


def test_the_script_writes_its_report_and_figures(tmp_path):
    main(Config(samples_per_prompt=G, steps=20, transformer_steps=2, out=str(tmp_path)))
    text = (tmp_path / "EXACT.md").read_text(encoding="utf-8")
    assert "nan" not in text and "inf" not in text
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert [block.count("\n") + 1 for block in tables] == [14, 14, 8, 15, 5, 16]
    for name in ("estimators", "gradients", "fixed_points"):
        assert f"figures/exact_{name}.png" in text
        assert (tmp_path / "figures" / f"exact_{name}.png").read_bytes().startswith(b"\x89PNG")

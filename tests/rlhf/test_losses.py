"""The equations on literal tensors, with the arithmetic written out, and against definitions."""

import math
from types import SimpleNamespace

import pytest
import torch

from rlhf.dpo_train import dpo_loss
from rlhf.grpo_train import advantages_of_step, group_advantages, grpo_loss
from rlhf.ppo_train import adapt_kl_coef, gae, policy_loss, token_rewards, value_loss
from rlhf.reward_model import reward_loss
from rlhf.rollouts import Rollout
from rlhf.steps import Meter, measure_kl, measure_updates
from rlhf.utils import kl_estimate, masked_mean, masked_whiten
from runtime.processes import Processes

T = torch.tensor
close = torch.testing.assert_close


# DPO


@pytest.mark.parametrize(
    "loss_type, smoothing, expected",
    [("sigmoid", 0.0, 0.437488), ("sigmoid", 0.1, 0.497488), ("hinge", 0.0, 0.4), ("ipo", 0.0, 1.0)],
)
@pytest.mark.statement("dpo-sums")
def test_dpo_worked_values(loss_type, smoothing, expected):
    # beta 0.1, log-ratio difference 6: -log sigmoid(0.6) = 0.437488; 0.9 of it + 0.1 * 1.037488; 1 - 0.6; (6 - 5)^2
    losses, chosen, rejected = dpo_loss(T([-10.0]), T([-20.0]), T([-13.0]), T([-17.0]), 0.1, loss_type, smoothing)
    assert losses.item() == pytest.approx(expected, abs=1e-6)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.3, -0.3))


@pytest.mark.statement("dpo-ln-2")
def test_dpo_equal_policies_give_ln_2_and_no_reward():
    x, y = T([-3.0, -50.0]), T([-7.0, -1.0])
    losses, chosen, rejected = dpo_loss(x, y, x, y)
    assert losses.tolist() == [pytest.approx(math.log(2))] * 2
    assert chosen.tolist() == rejected.tolist() == [0.0, 0.0]


def test_dpo_gradient_is_the_formula():
    # d/d chosen of -log sigmoid(beta h) = -beta * sigmoid(-beta h); Rafailov et al. 2023, eq. 7's gradient
    chosen = T([-10.0], dtype=torch.float64, requires_grad=True)
    dpo_loss(chosen, T([-20.0]).double(), T([-13.0]).double(), T([-17.0]).double(), beta=0.1)[0].sum().backward()
    assert chosen.grad.item() == pytest.approx(-0.1 / (1 + math.exp(0.6)), abs=1e-12)


@pytest.mark.statement("dpo-unused-option")
def test_dpo_option_without_effect_is_an_error():
    with pytest.raises(ValueError, match="label_smoothing"):
        dpo_loss(T([0.0]), T([0.0]), T([0.0]), T([0.0]), loss_type="hinge", label_smoothing=0.1)
    with pytest.raises(ValueError, match="sigmoid, ipo or hinge"):
        dpo_loss(T([0.0]), T([0.0]), T([0.0]), T([0.0]), loss_type="kto")


# reward model


@pytest.mark.statement("bradley-terry")
def test_reward_loss_worked_values():
    # differences 2 and -1; margins 0.5 and 1; centering 0.01 * mean of (4^2, 3^2)
    chosen, rejected = T([3.0, 1.0]), T([1.0, 2.0])
    plain = (math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2
    with_margin = (math.log1p(math.exp(-1.5)) + math.log1p(math.exp(2))) / 2
    assert reward_loss(chosen, rejected).item() == pytest.approx(plain, abs=1e-6)
    assert reward_loss(chosen, rejected, margin=T([0.5, 1.0])).item() == pytest.approx(with_margin, abs=1e-6)
    assert reward_loss(chosen, rejected, center_coef=0.01).item() == pytest.approx(plain + 0.125, abs=1e-6)


@pytest.mark.statement("bradley-terry")
def test_adding_a_constant_to_all_scores_changes_only_the_centering_term():
    chosen, rejected = T([3.0, 1.0]).double(), T([1.0, 2.0]).double()
    close(reward_loss(chosen + 5, rejected + 5), reward_loss(chosen, rejected))
    assert reward_loss(chosen + 5, rejected + 5, center_coef=0.1) > reward_loss(chosen, rejected, center_coef=0.1)


# PPO

REWARDS = T([[-0.01, -0.02, 1.0, 7.0, 7.0]])
VALUES = T([[0.1, 0.2, 0.3, 9.0, 9.0]])
MASK = T([[1, 1, 1, 0, 0]])


@pytest.mark.statement("gae-padding")
def test_padding_never_reaches_the_advantages():
    # A2 = 1 - 0.3; A1 = -0.02 + 0.3 - 0.2 + 0.95 * 0.7; A0 = -0.01 + 0.2 - 0.1 + 0.95 * 0.745
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=1.0, lam=0.95)
    close(advantages, T([[0.79775, 0.745, 0.7, 0, 0]]))
    close(returns, T([[0.89775, 0.945, 1.0, 0, 0]]))
    for poison in (math.inf, -math.inf, math.nan):
        dirty = [torch.where(MASK.bool(), x, poison) for x in (REWARDS, VALUES)]
        assert torch.equal(gae(*dirty, MASK)[0], advantages)


@pytest.mark.statement("bootstrap")
def test_a_cut_response_bootstraps_from_its_last_value():
    # with 0.5 after the end: A2 = 1 + 0.5 - 0.3 = 1.2; A1 = 0.08 + 0.95 * 1.2 = 1.22; A0 = 0.09 + 0.95 * 1.22 = 1.249
    advantages, _ = gae(REWARDS, VALUES, MASK, lam=0.95, last_values=T([0.5]))
    close(advantages, T([[1.249, 1.22, 1.2, 0, 0]]))


@pytest.mark.statement("gae-padding")
def test_gae_is_its_double_sum():
    # A_t = sum_k (gamma lam)^k delta_{t+k}, on random rows with zeros before and after the response
    torch.manual_seed(0)
    rewards, values = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    last, gamma, lam = torch.randn(4).double(), 0.9, 0.8
    mask = torch.zeros(4, 9)
    spans = [(0, 9), (2, 6), (5, 6), (3, 9)]
    for row, (start, end) in enumerate(spans):
        mask[row, start:end] = 1
    advantages, returns = gae(rewards, values, mask, gamma, lam, last)
    for row, (start, end) in enumerate(spans):
        v = [*values[row, start:end].tolist(), last[row].item()]
        delta = [rewards[row, start + i].item() + gamma * v[i + 1] - v[i] for i in range(end - start)]
        for i in range(end - start):
            expected = sum((gamma * lam) ** k * delta[i + k] for k in range(end - start - i))
            assert advantages[row, start + i].item() == pytest.approx(expected, abs=1e-12)
            assert returns[row, start + i].item() == pytest.approx(expected + v[i], abs=1e-12)
    assert (advantages[mask == 0] == 0).all() and (returns[mask == 0] == 0).all()


def test_policy_loss_worked_values():
    # ratios 1.5 and 0.5 and 1.1; advantages 1, -1, 2: max(-1.5, -1.2) = -1.2; max(0.5, 0.8) = 0.8; -2.2
    logprobs = T([[1.5, 0.5, 1.1]]).log()
    loss = policy_loss(logprobs, torch.zeros(1, 3), T([[1.0, -1.0, 2.0]]), T([[1, 1, 1]]), clip_eps=0.2)
    assert loss.item() == pytest.approx((-1.2 + 0.8 - 2.2) / 3, abs=1e-6)


def test_value_loss_worked_values():
    # old 0, new 1, return 2: clipped value 0.2; max((1 - 2)^2, (0.2 - 2)^2) = 3.24; second token: new 0.1: 1.9^2
    loss = value_loss(T([[1.0, 0.1]]), T([[0.0, 0.0]]), T([[2.0, 2.0]]), T([[1, 1]]), clip_eps=0.2)
    assert loss.item() == pytest.approx(0.5 * (3.24 + 3.61) / 2, abs=1e-6)


@pytest.mark.statement("reward-at-end")
def test_the_reward_lands_on_the_last_real_token():
    # also where a response fills its length; k1 = log-ratio on every token of it
    logprobs, ref = T([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]]), T([[-1.5, -1.0, -3.0], [-1.0, -2.0, 0.0]])
    mask = T([[1, 1, 1], [1, 1, 0]])
    rewards = token_rewards(T([10.0, 20.0]), logprobs, ref, mask, kl_coef=0.1)
    close(rewards, T([[-0.05, 0.1, 10.0], [0.0, 19.9, 0.0]]))


def test_adaptive_kl_coefficient():
    # the relative error is clipped at 0.2
    assert adapt_kl_coef(0.1, kl=12.0, target=6.0, completions=100, horizon=1000) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=6.6, target=6.0, completions=100, horizon=1000) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, kl=0.0, target=6.0, completions=100, horizon=1000) == pytest.approx(0.1 * 0.98)


@pytest.mark.statement("ppo-first-step")
def test_ratio_1_has_the_policy_gradient_and_no_clip():
    logprobs = torch.randn(2, 3).double().requires_grad_()
    advantages = torch.randn(2, 3).double()
    mask = T([[1, 1, 0], [1, 1, 1]])
    policy_loss(logprobs, logprobs.detach(), advantages, mask).backward()
    close(logprobs.grad, -advantages * mask / 5)


@pytest.mark.statement("whitening")
def test_whitening_over_two_ranks_is_that_of_all_tokens_together():
    x = torch.randn(9).double() * 3 + 7
    shares = [x[:2], x[2:]]  # 2 and 7 tokens
    ones = torch.ones_like
    for shift_mean in (True, False):
        expected = masked_whiten(x, ones(x), shift_mean)
        for share, other, place in zip(shares, shares[::-1], (slice(0, 2), slice(2, 9))):
            # what the other rank brings to each of the two sums, in turn
            total = torch.stack([other.sum(), torch.tensor(float(len(other))).double()])
            of_others = iter([total, (other - x.mean()).square().sum()])
            found = masked_whiten(share, ones(share), shift_mean, reduce=lambda mine, rest=of_others: mine + next(rest))
            close(found, expected[place])


# masked statistics


@pytest.mark.statement("mask-before-exp")
def test_masked_mean_ignores_what_is_masked():
    x = T([[1.0, math.nan], [math.inf, 3.0]])
    assert masked_mean(x, T([[1, 0], [0, 1]])).item() == 2.0
    assert masked_mean(x, T([[1, 0], [0, 0]]), dim=1).tolist() == [1.0, 0.0]


@pytest.mark.statement("whitening")
def test_masked_whiten():
    x, mask = torch.randn(3, 5).double() * 3 + 7, T([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    white = masked_whiten(x, mask)
    counted = white[mask.bool()]
    assert counted.mean().item() == pytest.approx(0, abs=1e-12)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert (white[mask == 0] == 0).all()
    kept = masked_whiten(x, mask, shift_mean=False)[mask.bool()]
    assert kept.mean().item() == pytest.approx(x[mask.bool()].mean().item(), abs=1e-9)
    assert torch.equal(masked_whiten(torch.where(mask.bool(), x, math.nan), mask), white)


# GRPO


@pytest.mark.statement("group-advantages")
def test_group_advantages_worked_values():
    # mean 0.25, sample standard deviation 0.5: 0.75 / 0.5001, -0.25 / 0.5001
    close(group_advantages(T([[1.0, 0, 0, 0]])), T([[1.49970, -0.49990, -0.49990, -0.49990]]), atol=1e-5, rtol=0)
    close(group_advantages(T([[1.0, 0, 0, 0]]), scale_std=False), T([[0.75, -0.25, -0.25, -0.25]]))


@pytest.mark.statement("group-advantages")
def test_group_advantages_permute_with_the_prompts_and_have_mean_0():
    rewards = torch.randn(5, 4).double()
    order = torch.randperm(5)
    close(group_advantages(rewards[order]), group_advantages(rewards)[order])
    close(group_advantages(rewards).mean(1), torch.zeros(5).double())
    assert (group_advantages(torch.ones(2, 3)) == 0).all()


@pytest.mark.statement("group-advantages")
def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(T([[1.0], [2.0]]))


# two groups of two completions, of 1, 3, 2 and 2 tokens; log-ratio 0 everywhere, so each token's loss is -advantage
GROUP_MASK = T([[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
ADVANTAGES = T([1.0, -1.0, 2.0, -2.0])


@pytest.mark.parametrize(
    "aggregate, expected",
    [
        ("token", (-1 * 1 + 1 * 3 - 2 * 2 + 2 * 2) / 8),  # sum over tokens / number of tokens
        ("sequence", (-1 + 1 - 2 + 2) / 4),  # mean over completions of their means
        ("constant", (-1 * 1 + 1 * 3 - 2 * 2 + 2 * 2) / (4 * 10)),  # sum / (completions * max_tokens)
    ],
)
@pytest.mark.statement("aggregations")
def test_the_three_aggregations_on_worked_numbers(aggregate, expected):
    zeros = torch.zeros(4, 3)
    loss = grpo_loss(zeros, zeros, None, ADVANTAGES, GROUP_MASK, aggregate=aggregate, max_tokens=10)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("aggregate", ["token", "sequence", "constant"])
@pytest.mark.statement("aggregations")
def test_aggregations_do_not_change_with_micro_batches_or_padding(aggregate):
    torch.manual_seed(0)
    logprobs, old, ref = (torch.randn(4, 3).double() * 0.1 for _ in range(3))
    options = {"kl_coef": 0.1, "aggregate": aggregate, "max_tokens": 10}
    whole = grpo_loss(logprobs, old, ref, ADVANTAGES, GROUP_MASK, **options)
    parts = sum(
        grpo_loss(logprobs[p], old[p], ref[p], ADVANTAGES[p], GROUP_MASK[p], **options, tokens=8, sequences=4)
        for p in (slice(0, 1), slice(1, 4))
    )
    close(parts, whole)
    wide = [torch.cat([x, torch.full((4, 2), math.nan)], 1) for x in (logprobs, old, ref)]
    wider = grpo_loss(*wide, ADVANTAGES, torch.cat([GROUP_MASK, torch.zeros(4, 2)], 1), **options)
    close(wider, whole)


def test_grpo_clips_with_two_bounds():
    # ratio 2, advantage 1: min(2, 1.28) ; ratio 0.5, advantage -1: min(-0.5, -0.8)
    logprobs, ones = T([[2.0], [0.5]]).log(), T([[1], [1]])
    loss = grpo_loss(logprobs, torch.zeros(2, 1), None, T([1.0, -1.0]), ones, clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx((-1.28 + 0.8) / 2, abs=1e-6)


@pytest.mark.statement("kl-gradients")
def test_k1_in_the_loss_is_refused():
    zeros = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="expected gradient 0"):
        grpo_loss(zeros, zeros, zeros, T([1.0]), T([[1]]), kl_coef=0.1, kl_kind="k1")


@pytest.mark.parametrize("poison", [1e3, -1e3, math.inf, -math.inf, math.nan])
@pytest.mark.statement("mask-before-exp")
def test_mask_before_exp(poison):
    torch.manual_seed(0)
    mask = T([[1, 1, 0], [1, 0, 0]])

    def run(fill):
        clean = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(6)]
        filled = [x if fill is None else torch.where(mask.bool(), x, fill) for x in clean]
        logprobs = filled[0].requires_grad_()
        loss = grpo_loss(logprobs, filled[1], filled[2], T([1.0, -2.0]), mask, kl_coef=0.1)
        loss = loss + policy_loss(logprobs, filled[1], filled[3], mask)
        loss = loss + value_loss(filled[4], filled[5], filled[2], mask)
        loss.backward()
        return loss.detach(), torch.where(mask.bool(), logprobs.grad, 0.0), logprobs.grad

    loss, gradient, _ = run(None)
    poisoned_loss, poisoned_gradient, raw = run(poison)
    assert torch.equal(loss, poisoned_loss) and torch.equal(gradient, poisoned_gradient)
    assert torch.isfinite(raw).all()


# KL


@pytest.mark.statement("kl-gradients")
def test_kl_estimators_in_expectation_over_an_enumerable_policy():
    """Values: k1 and k3 are the KL. Gradients: k1 0, k2 reverse KL, k3 forward KL, ratio * k3 reverse KL."""
    torch.manual_seed(0)
    theta = torch.randn(5).double().requires_grad_()
    ref = torch.randn(5).double().log_softmax(0)
    logp = theta.log_softmax(0)
    p = logp.exp().detach()
    reverse = (logp.exp() * (logp - ref)).sum()
    reverse_gradient = torch.autograd.grad(reverse, theta, retain_graph=True)[0]
    forward = (ref.exp() * (ref - logp)).sum()
    forward_gradient = torch.autograd.grad(forward, theta, retain_graph=True)[0]

    def expected(kind):
        value = (p * kl_estimate(logp, ref, kind)).sum()
        return value, torch.autograd.grad(value, theta, retain_graph=True)[0]

    close(expected("k1")[0], reverse)
    close(expected("k3")[0], reverse)
    assert abs(expected("k2")[0] - reverse) > 1e-3
    close(expected("k1")[1], torch.zeros(5).double(), atol=1e-12, rtol=0)
    close(expected("k2")[1], reverse_gradient)
    close(expected("k3")[1], forward_gradient)
    for kind, gradient in (("ratio_k3", reverse_gradient), ("k2", reverse_gradient), ("k3", forward_gradient)):
        # five completions of one token, weighted by their probability, through the very loss that trains
        total = sum(
            p[i] * grpo_loss(logp[None, i : i + 1], logp.detach()[None, i : i + 1], ref[None, i : i + 1],
                             T([0.0]).double(), T([[1]]), kl_coef=1.0, kl_kind=kind)
            for i in range(5)
        )  # fmt: skip
        close(torch.autograd.grad(total, theta, retain_graph=True)[0], gradient)


@pytest.mark.parametrize("d", [-0.5, -20.0, -89.0])  # exp(89) is beyond float32
@pytest.mark.parametrize("log_ratio", [0.0, 0.3])
@pytest.mark.statement("kl-gradients")
def test_ratio_k3_has_its_gradient_far_from_the_reference(d, log_ratio):
    """ratio * (exp(-d) - 1 + d) is exp(ref - old) + ratio * (d - 1): its derivative is ratio * d."""
    logprobs = T([[-90.0]]).requires_grad_()
    given = T([[-90.0 - log_ratio]]), T([[-90.0 - d]]), T([0.0]), T([[1]])
    grpo_loss(logprobs, *given, kl_coef=0.02, kl_kind="ratio_k3").backward()
    close(logprobs.grad, T([[0.02 * math.exp(log_ratio) * d]]), rtol=1e-4, atol=0)  # 90 + 0.3 in float32: 4e-6


@pytest.mark.statement("group-advantages")
def test_large_rewards_have_the_advantages_of_their_differences():
    config = SimpleNamespace(scale_std=True)

    def advantages(rewards):
        rows = {"prompts": [[1]] * 3, "completions": [[2]] * 3, "logprobs": None, "finish_reasons": ["stop"] * 3}
        texts = {"texts": [""] * 3, "questions": [""] * 3, "group_sizes": [3], "places": [0]}
        rollout = Rollout(**rows, **texts, rewards=rewards)
        return rollout.map_groups(lambda groups: advantages_of_step(groups, config), Processes())

    small, large = advantages([0.0, 1.0, 2.0]), advantages([1e8, 1e8 + 1, 1e8 + 2])
    assert torch.tensor([1e8 + 1]) == 1e8  # float32 does not hold the difference
    assert torch.equal(small, large) and small.dtype == torch.float32
    close(small, T([-1.0, 0.0, 1.0]), atol=2e-4, rtol=0)


@pytest.mark.statement("reported-kl")
def test_the_reported_kl_is_that_of_an_enumerated_policy():
    """Completions of one or two tokens; their probabilities are halves and eighths: eight rows are the policy."""
    log = math.log
    stop, a, b = (log(1 / 2), log(1 / 4)), (log(1 / 4), log(1 / 2)), (log(1 / 4), log(1 / 4))  # of policy and reference
    rows = [[stop]] * 4 + [[a, (log(1 / 2), log(3 / 4))], [a, (log(1 / 2), log(1 / 4))],
                           [b, (log(1 / 2), log(1 / 3))], [b, (log(1 / 2), log(2 / 3))]]  # fmt: skip
    exact = sum(p - q for row in rows for p, q in row) / 8  # sum over completions of P(y) log(P(y) / Q(y))
    padded = T([[*row, (math.nan, math.nan)][:2] for row in rows]).double()  # (8, 2, 2)
    mask = T([[1, 0]] * 4 + [[1, 1]] * 4)
    meter = Meter()
    for part in (slice(0, 3), slice(3, 8)):  # micro-batches with 3 and 9 tokens
        measure_kl(meter, padded[part, :, 0], padded[part, :, 1], mask[part])
    found = meter.collect(Processes())
    assert found["kl"] == pytest.approx(exact, abs=1e-6)
    assert found["kl_per_token"] == pytest.approx(exact / 1.5, abs=1e-6)  # 12 tokens in 8 completions


# what is logged


@pytest.mark.statement("mask-before-exp")
def test_clipfrac_counts_the_tokens_whose_loss_has_no_gradient():
    """Of the ratios 1.5, 1.5, 0.5, 0.5 and 1.1, the first and the fourth are clipped. The sixth is masked."""
    ratios, advantages = T([[1.5, 1.5, 0.5, 0.5, 1.1, 9.0]]), T([[1.0, -1.0, 1.0, -1.0, 1.0, 1.0]])
    mask, old = T([[1, 1, 1, 1, 1, 0]]), torch.full((1, 6), -0.7)
    logprobs = (old + ratios.log()).requires_grad_()
    meter = Meter()
    measure_updates(meter, logprobs.detach(), old, advantages, mask, 0.2, 0.3)
    found = meter.collect(Processes())
    assert found["clipfrac"] == pytest.approx(2 / 5)
    assert found["approx_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 1.1)) / 5)
    policy_loss(logprobs, old, advantages, mask, 0.2).backward()
    assert (logprobs.grad[mask.bool()] == 0).sum() == 2

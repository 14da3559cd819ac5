"""Policies small enough to enumerate: every completion, its exact probability, and every expectation as a finite sum.

A completion is a few tokens over a tiny vocabulary; token 0 stops it. A policy is a table (P, S, L): for P prompts, the
log-probs in nats of the tokens of all S completions, of which the longest has L tokens. After the end of a completion
the table holds 0. A softmax of its own at each prefix makes such a table, or a real transformer does. Losses are the
functions of the training scripts on rows of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch.func import vmap
from transformers import AutoModelForCausalLM

from models.tiny import tiny_config
from rlhf.dpo_train import dpo_loss
from rlhf.grpo_train import group_advantages, grpo_loss
from rlhf.packing import pack
from rlhf.ppo_train import gae, policy_loss, token_rewards, value_loss
from rlhf.utils import masked_whiten, packed_logprobs

STOP = 0
ZERO = 1e-9  # a smaller relative difference is rounding
UNCLIPPED = math.inf  # as clip_high and clip_eps: the ratio is never clipped


@dataclass(frozen=True)
class Bed:
    """All completions, what they are worth, and the reference policy."""

    tokens: torch.Tensor  # (S, L)
    mask: torch.Tensor  # (S, L) 1 on the completion's tokens
    prefix: torch.Tensor  # (S, L) index of the prefix after which each token is chosen
    prefixes: int
    vocabulary: int
    rewards: torch.Tensor  # (P, S)
    ref: torch.Tensor  # (P, S, L) log-probs of the reference
    beta: float  # weight of the KL to the reference in the objective

    @property
    def lengths(self):
        return self.mask.sum(1)

    @property
    def max_tokens(self):
        return self.mask.shape[1]


def enumerate_completions(vocabulary, max_tokens):
    """(tokens, mask, prefix), each (S, L): all completions that end with the stop token or at `max_tokens` tokens."""
    words = range(1, vocabulary)
    completions = []
    for length in range(1, max_tokens + 1):
        last = range(vocabulary) if length == max_tokens else [STOP]
        completions += [[*start, end] for start in itertools.product(words, repeat=length - 1) for end in last]
    prefix_id = {}
    rows = [[prefix_id.setdefault(tuple(a[:t]), len(prefix_id)) for t in range(len(a))] for a in completions]

    def filled(lists):
        return torch.tensor([[*x, *[0] * (max_tokens - len(x))] for x in lists])

    return filled(completions), filled([[1] * len(a) for a in completions]), filled(rows)


def make_bed(vocabulary=3, max_tokens=3, beta=0.3, seed=0):
    """A `Bed` of two prompts. The first is graded: its rewards are uniform on [0, 1]. The second is hard: two long
    completions are worth 1, all others 0."""
    generator = torch.Generator().manual_seed(seed)
    tokens, mask, prefix = enumerate_completions(vocabulary, max_tokens)
    graded = torch.rand(len(tokens), generator=generator, dtype=torch.float64)
    hard = torch.zeros_like(graded)
    hard[[len(tokens) // 2, -1]] = 1.0
    prefixes = int(prefix.max()) + 1
    bed = Bed(tokens, mask, prefix, prefixes, vocabulary, torch.stack([graded, hard]), mask[None] * 0.0, beta)
    logits = random_logits(bed, 0.5, generator)
    return Bed(**{**vars(bed), "ref": tabular(bed, logits)})


def random_logits(bed, scale, generator):
    """Normal logits (P, prefixes, vocabulary) with this standard deviation."""
    shape = (len(bed.rewards), bed.prefixes, bed.vocabulary)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def tabular(bed, logits):
    """The table of a policy with a softmax of its own at each prefix; logits: (P, prefixes, vocabulary)."""
    chosen = logits.log_softmax(-1)[:, bed.prefix, bed.tokens]
    return torch.where(bed.mask.bool(), chosen, 0.0)


def prefix_logits(bed, table):
    """Logits (P, prefixes, vocabulary) with which `tabular` gives this table: its own log-probs."""
    logits = torch.zeros(len(table), bed.prefixes, bed.vocabulary, dtype=table.dtype)
    at = bed.mask.bool()
    logits[:, bed.prefix[at], bed.tokens[at]] = table[:, at]
    return logits


def tiny_transformer(bed, seed, scale=0.3):
    """A transformer in float64 over the bed's vocabulary; normal weights, so that its policy is not uniform.

    GPT-2's, because a Llama's norms compute in float32 in any dtype.
    """
    config = tiny_config("tiny-gpt2", bed.vocabulary, STOP, n_embd=16, n_positions=8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model.eval()


def prompts_and_completions(bed):
    """Token ids of prompt and completion for each of the P * S rows; the prompts are (0, 1), (0, 2), ..."""
    completions = [row[:n].tolist() for row, n in zip(bed.tokens, bed.lengths)]
    prompts = [[STOP, 1 + p] for p in range(len(bed.rewards)) for _ in completions]
    return prompts, completions * len(bed.rewards)


def transformer_table(bed, model):
    """The table of a transformer's policy, by the packed forward pass of the training scripts."""
    return packed_logprobs(model, pack(*prompts_and_completions(bed), STOP, "cpu")).view(bed.ref.shape)


def probabilities(table):
    """Probability (P, S) of each completion."""
    return table.sum(-1).exp()


def kl(table, other):
    """Exact KL(table || other), (P,), of whole completions, in nats per sequence."""
    return (probabilities(table) * (table - other).sum(-1)).sum(-1)


def token_kl(table, other, sampler, forward=False):
    """The KL of the next token, summed over the prefixes as often as `sampler` visits them: a scalar.

    Nats per sequence, mean over prompts. forward=False: KL(table || other); True: KL(other || table). The gradient
    holds the visits fixed.
    """
    first, second = (other, table) if forward else (table, other)
    before = sampler.detach().cumsum(-1) - sampler.detach()  # (P, S, L) log-prob of the prefix
    after = (sampler.flip(-1).cumsum(-1).flip(-1) - sampler).detach()  # and of what follows the token
    return ((before + first + after).exp() * (first - second)).sum((1, 2)).mean()


def objective(bed, table, beta=None):
    """E[reward] - beta * KL(policy || reference), a scalar: what RLHF maximises. Mean over the prompts."""
    beta = bed.beta if beta is None else beta
    return ((probabilities(table) * bed.rewards).sum(-1) - beta * kl(table, bed.ref)).mean()


def by_choice(bed, x):
    """Sums (P, prefixes, vocabulary) of x (P, S, L) over completions that share a choice: a token after a prefix."""
    choice = (bed.prefix * bed.vocabulary + bed.tokens).expand(x.shape).flatten(1)
    sums = torch.zeros(len(x), bed.prefixes * bed.vocabulary, dtype=x.dtype)
    return sums.scatter_add(1, choice, (x * bed.mask).flatten(1)).unflatten(1, (bed.prefixes, bed.vocabulary))


def visits(bed, table):
    """Probability (P, prefixes, vocabulary) with which a completion makes each choice."""
    return by_choice(bed, probabilities(table)[..., None].expand(table.shape))


def table_of(bed, scores):
    """The table of the policy whose completions have probabilities proportional to exp(scores), scores (P, S)."""
    p = scores.softmax(-1)[..., None].expand(*scores.shape, bed.max_tokens)
    return tabular(bed, by_choice(bed, p).log())


def optimum(bed, rewards=None):
    """The table of pi*(y), proportional to pi_ref(y) * exp(reward(y) / beta): it maximises `objective`."""
    return table_of(bed, bed.ref.sum(-1) + (bed.rewards if rewards is None else rewards) / bed.beta)


def multisets(completions, size):
    """(groups (N, size), orders (N,)): all groups of `size` of so many completions, and how many orders each has."""
    groups = list(itertools.combinations_with_replacement(range(completions), size))
    orders = [math.factorial(size) // math.prod(math.factorial(g.count(a)) for a in set(g)) for g in groups]
    return torch.tensor(groups), torch.tensor(orders, dtype=torch.float64)


def batches(bed, sampler, size, together):
    """(weights (M,), prompt (M, B), completion (M, B)): every batch that can be sampled, with its probability.

    A batch is one group of `size` completions to a prompt that is drawn at random. With `together` it is one group to
    each prompt.
    """
    groups, orders = multisets(len(bed.tokens), size)
    weights = orders * probabilities(sampler.detach())[:, groups].prod(-1)  # (P, N)
    prompts = torch.arange(len(weights))
    if not together:
        prompt = prompts[:, None, None].expand(-1, *groups.shape)
        return weights.flatten() / len(weights), prompt.flatten(0, 1), groups.repeat(len(weights), 1)
    pick = torch.cartesian_prod(*[torch.arange(len(groups)) for _ in prompts])  # (N^P, P)
    prompt = prompts.repeat_interleave(size).expand(len(pick), -1)
    return weights[prompts, pick].prod(-1), prompt, groups[pick].flatten(1)


def expected_grpo(bed, table, sampler, group_size, together=False, old=None, scale_std=True, **options):
    """Expectation of `grpo_loss`, a scalar, over all batches of groups that `sampler` may draw.

    table, sampler, old: (P, S, L). The ratio is that of table to old, by default the sampler. options: of `grpo_loss`.
    """
    weights, prompt, completion = batches(bed, sampler, group_size, together)
    old = (sampler if old is None else old).detach()
    rewards = bed.rewards[prompt, completion]
    advantages = group_advantages(rewards.view(-1, group_size), scale_std).view(rewards.shape)

    def loss(*rows):
        return grpo_loss(*rows, max_tokens=bed.max_tokens, **options)

    rows = (x[prompt, completion] for x in (table, old, bed.ref))
    return weights @ vmap(loss)(*rows, advantages, bed.mask[completion])


def ppo_advantages(bed, table, values, lam, kl_coef):
    """(advantages, returns), each (P, S, L), of all completions under the policy `table`, by token_rewards and gae."""
    rows = [x.detach().flatten(0, 1) for x in (table, bed.ref, values)]
    mask = bed.mask.repeat(len(table), 1)
    rewards = token_rewards(bed.rewards.flatten(), rows[0], rows[1], mask, kl_coef)
    return tuple(x.view(table.shape) for x in gae(rewards, rows[2], mask, 1.0, lam))


def expected_ppo(bed, table, values, lam, size, together=False, whiten=False, constant=False, vf_coef=0.0):
    """Expectation of PPO's loss on policy, a scalar, over all batches of `size` completions to a prompt.

    The KL is in the reward. values: (P, S, L), the value before each token. whiten: advantages of mean 0 and variance 1
    over the batch. constant: divide by batch size * max_tokens, not by the batch's tokens. vf_coef: weight of the value
    loss.
    """
    weights, prompt, completion = batches(bed, table, size, together)
    advantages, returns = ppo_advantages(bed, table, values, lam, bed.beta)
    normalizer = prompt.shape[1] * bed.max_tokens if constant else None

    def loss(logprobs, old, values, old_values, advantages, returns, mask):
        if whiten:
            advantages = masked_whiten(advantages, mask)
        both = policy_loss(logprobs, old, advantages, mask, normalizer=normalizer)
        if vf_coef:
            both = both + vf_coef * value_loss(values, old_values, returns, mask, normalizer=normalizer)
        return both

    rows = (table, table.detach(), values, values.detach(), advantages, returns)
    return weights @ vmap(loss)(*(x[prompt, completion] for x in rows), bed.mask[completion])


def exact_values(bed, table, kl_coef):
    """The value (P, S, L) before each token: the expected reward to come, less kl_coef times the KL to come."""
    table = table.detach()
    returns = ppo_advantages(bed, table, torch.zeros_like(table), 1.0, kl_coef)[1]
    p = probabilities(table)[..., None].expand(table.shape)
    values = by_choice(bed, p * returns).sum(-1) / by_choice(bed, p).sum(-1)  # (P, prefixes)
    return values[:, bed.prefix] * bed.mask


def gradient(loss, parameters):
    """The gradient of a scalar with respect to a list of parameters, as one flat vector. The graph is kept."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def expected_dpo(bed, table, loss_type="sigmoid", per_token=False):
    """Expectation of `dpo_loss`, a scalar, over pairs of the reference's completions.

    Bradley and Terry's model labels them: P(a is chosen, b rejected) = sigmoid(reward(a) - reward(b)). per_token: take
    means over tokens, as IPO does.
    """
    sums = table.sum(-1), bed.ref.sum(-1)
    logps, ref_logps = (x / bed.lengths for x in sums) if per_token else sums
    a, b = torch.cartesian_prod(*[torch.arange(len(bed.tokens))] * 2).T
    losses = dpo_loss(logps[:, a], logps[:, b], ref_logps[:, a], ref_logps[:, b], bed.beta, loss_type)[0]
    q = probabilities(bed.ref)
    chosen = 2 * q[:, a] * q[:, b] * torch.sigmoid(bed.rewards[:, a] - bed.rewards[:, b])
    return (chosen * losses).sum(1).mean()


def ipo_optimum(bed, per_token=False):
    """The table of least expected IPO loss: pi_ref(y) * exp(n * (win(y) / beta + c)), where c makes the sum over y 1.

    win(y): the probability that y is preferred to a completion of the reference. n: with per_token the number of y's
    tokens, else 1. Azar et al. 2023, theorem 1, with psi the identity.
    """
    q = probabilities(bed.ref)
    win = torch.sigmoid(bed.rewards[:, :, None] - bed.rewards[:, None, :]) @ q[:, :, None]
    weight = bed.lengths if per_token else torch.ones_like(bed.lengths)
    low, high = (torch.full((len(q), 1), sign * 2 / bed.beta, dtype=q.dtype) for sign in (-1, 1))
    for _ in range(200):  # bisection: the sum grows with c
        c = (low + high) / 2
        total = (bed.ref.sum(-1) + weight * (win[..., 0] / bed.beta + c)).logsumexp(-1, keepdim=True)
        low, high = torch.where(total < 0, c, low), torch.where(total < 0, high, c)
    return table_of(bed, bed.ref.sum(-1) + weight * (win[..., 0] / bed.beta + c))


def improved(bed, table, scale=1.0):
    """The table of pi_ref(a|s) * exp(scale * Q(s, a) / beta) / Z(s).

    Q: the expected reward after a choice under `table`. The KL of one token is weighed against all the reward to come,
    and the KL to come is left out. With it, Q would be that of the soft Bellman equation, and repeating this would end
    at `optimum`. Without it, the policy no longer changes after `max_tokens` repetitions.
    """
    p = probabilities(table)[..., None].expand(table.shape)
    q = by_choice(bed, p * bed.rewards[..., None]) / by_choice(bed, p)
    return tabular(bed, prefix_logits(bed, bed.ref) + scale * q / bed.beta)

"""Tensor parallelism by hand: each process computes some of the attention heads, MLP columns and vocabulary rows.

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3. Let the first linear layer of a block be split by its
outputs and the second one by its inputs: y = sum over processes of W2[:, mine] act(W1[mine] x). Nothing is exchanged
between the two layers. A block needs one all-reduce of y in the forward pass, and one of the gradient of x in the
backward pass. All processes read the same tokens. Norms and residuals are computed in each of them.

Heads are split by whole groups: the query heads that share a key-value head stay together. The parts may be uneven.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from configs.config import UserError
from models.admission import TOLERANCE, apart, check_tokens
from models.fast.head import PIECE, body, head_nll, hidden_states, name_of, output_head, pieces, unwrapped
from models.fast.layers import MLPS, GatedMLP, product_dtype
from models.loader import context_length
from runtime.console import rank
from runtime.processes import Processes

ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "SmolLM3Attention")
OF_BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}  # the modules that the classes of a Llama-like model have
OF_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
OF_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


# 1. the two functions at the borders of a block: f and g of the paper's figure 3


class Enter(torch.autograd.Function):
    """x in the forward pass. In the backward pass, the sum of the gradients of all processes."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _summed(gradient)


class Leave(torch.autograd.Function):
    """The sum of the x of all processes in the forward pass. In the backward pass, the gradient as it is."""

    @staticmethod
    def forward(ctx, x):
        return _summed(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return gradient


def _summed(x):
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def _enter_block(module, args, kwargs):
    if args:
        return (Enter.apply(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": Enter.apply(kwargs["hidden_states"])}


def _leave_block(module, args, output):
    return (Leave.apply(output[0]), *output[1:]) if isinstance(output, tuple) else Leave.apply(output)


# 2. the ends of the model: an embedding and a loss of which each process has a part of the vocabulary


def vocabulary_embedding(embedding, start, ids):
    """The embeddings of token ids. embedding: the rows of the vocabulary from `start` on that this process has."""
    local, rows = ids - start, embedding.weight.shape[0]
    mine = (local >= 0) & (local < rows)
    padding = embedding.padding_idx  # its gradient is 0, as in transformers
    padding = padding - start if padding is not None and start <= padding < start + rows else None
    found = F.embedding(local.clamp(0, rows - 1), embedding.weight, padding)
    return Leave.apply(found * mine[..., None])


class VocabularyNLL(torch.autograd.Function):
    """The sum of -log softmax(hidden W^T)[targets] in nats, with a part of the rows of W in each process.

    -log p = log(sum over all logits of exp(logit - m)) - (target's logit - m), with m the largest logit. Only m, the
    sums and the targets' logits are exchanged, three numbers a token, and the gradient of the hidden states at the end.
    As in `HeadNLL`, the forward pass computes the gradients, piece by piece. hidden: (N, H). weight: this process's
    rows of W, from `start` on. targets: (N,). size: tokens of a piece.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, start, size, dtype):
        exact = torch.promote_types(dtype, torch.float32)
        w, total = weight.to(dtype), torch.zeros((), dtype=exact, device=hidden.device)
        of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for at in pieces(len(hidden), size):
            rows = hidden[at].to(dtype)
            logits = (rows @ w.T).to(exact)  # (n, V / processes)
            largest = logits.amax(-1, keepdim=True)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            local = (targets[at] - start)[:, None]
            mine = (local >= 0) & (local < len(weight))
            local = local.clamp(0, len(weight) - 1)
            target = (logits.gather(-1, local) - largest) * mine
            p = logits.sub_(largest).exp_()
            sums = torch.cat([p.sum(-1, keepdim=True), target], -1)  # (n, 2)
            dist.all_reduce(sums)
            total += (sums[:, 0].log() - sums[:, 1]).sum()
            if any(ctx.needs_input_grad):
                slope = (p / sums[:, :1]).scatter_add_(-1, local, -mine.to(exact)).to(dtype)  # p - onehot(target)
                of_hidden[at] = slope @ w
                of_weight += slope.T @ rows
        if any(ctx.needs_input_grad):
            dist.all_reduce(of_hidden)
        ctx.save_for_backward(of_hidden, of_weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return *(x.mul_(gradient) for x in ctx.saved_tensors), None, None, None, None


# 3. the model, split


@dataclass(frozen=True)
class Part:
    """The part of a weight that a process has: `size` of `whole` places along `dim`, from `start` on."""

    dim: int
    start: int
    size: int
    whole: int

    def of(self, x):
        """This part of a whole tensor, as a view."""
        return x.narrow(self.dim, self.start, self.size)


def part(dim, groups, each, processes):
    """The `Part` of this process if `groups` groups of `each` places are divided: the first processes have one more."""
    least, more = divmod(groups, processes.world_size)
    start = processes.rank * least + min(processes.rank, more)
    size = least + (processes.rank < more)
    return Part(dim, start * each, size * each, groups * each)


class TensorParallel:
    """A transformers model split over the processes, in place. `parts`: {weight: its Part}; other weights are whole.

    Raises UserError for a model whose modules are not known, for more processes than it has key-value heads, and if the
    split model gives other numbers on a few tokens.
    """

    def __init__(self, model, processes: Processes):
        self.model, self.processes, self.parts = model, processes, {}
        self.device = model.get_input_embeddings().weight.device
        groups = check_known(model, processes)
        head = output_head(model)  # found by a forward pass of the whole model
        vocabulary = len(model.get_input_embeddings().weight)
        [ids] = check_tokens(model, [min(12, context_length(model) or 12)])  # of the whole vocabulary
        before = self._on_a_few_tokens(head, head_nll, ids)
        for layer in body(model).layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
                self._split(linear, 0, groups)  # a group is a key-value head with its query heads
            self._split(attention.o_proj, 1, groups)
            for linear in (mlp.gate_proj, mlp.up_proj):
                self._split(linear, 0, linear.out_features)
            self._split(mlp.down_proj, 1, mlp.down_proj.in_features)
            for block in (attention, mlp):
                block.register_forward_pre_hook(_enter_block, with_kwargs=True)
                block.register_forward_hook(_leave_block)
        embedding = model.get_input_embeddings()
        tied = head.module.weight is embedding.weight
        self.vocabulary = self._split(embedding, 0, vocabulary)
        embedding.forward = lambda ids: vocabulary_embedding(embedding, self.vocabulary.start, ids)
        if tied:
            head.module.weight = embedding.weight
        else:
            self._split(head.module, 0, self.vocabulary.whole)
        far = apart(self._on_a_few_tokens(head, self.nll, ids), before)
        if far > TOLERANCE[embedding.weight.dtype]:
            raise _unknown(model, f"split over {processes.world_size} processes it is {far:.1e} from the whole model")

    def nll(self, head, hidden, targets, compiled=False):
        """`head_nll` with the vocabulary split over the processes."""
        most = -(-self.vocabulary.whole // self.processes.world_size)  # rows of W in the process that has most
        size, weight = max(PIECE[hidden.device.type] // (4 * most), 1), head.module.weight
        return VocabularyNLL.apply(hidden, weight, targets, self.vocabulary.start, size, product_dtype(hidden))

    def norm(self, parameters):
        """The norm of the gradients. Parts are summed over the processes; whole weights count once."""
        of_parts = torch.nn.utils.get_total_norm([p.grad for p in parameters if p in self.parts])
        of_whole = torch.nn.utils.get_total_norm([p.grad for p in parameters if p not in self.parts])
        return (self.processes.sum(of_parts.square()) + of_whole.square()).sqrt()

    def weights(self):
        """Yield (name, whole weight) for each weight. All processes take part."""
        for name, weight in self.model.named_parameters():
            yield name, self.joined(weight.detach(), weight)

    def joined(self, x, weight):
        """The whole of a tensor `x` that is split as `weight` is. All processes take part."""
        if weight not in self.parts:
            return x
        mine = self.parts[weight]
        shape = [mine.whole if dim == mine.dim else n for dim, n in enumerate(x.shape)]
        whole = x.new_zeros(shape)
        mine.of(whole).copy_(x)
        return self.processes.sum(whole)

    def _split(self, module, dim, groups):
        """Keep this process's part of a linear layer or an embedding, its bias too. Returns the weight's `Part`."""
        for name, weight in list(module.named_parameters(recurse=False)):
            mine = part(dim, groups, weight.shape[dim] // groups, self.processes)
            kept = torch.nn.Parameter(mine.of(weight.detach()).clone())
            setattr(module, name, kept)
            self.parts[kept] = mine
        return self.parts[module.weight]

    @torch.no_grad()
    def _on_a_few_tokens(self, head, nll, ids):
        """[hidden states (T, H), the loss of each token but the first (T - 1,)]."""
        ids = torch.tensor([ids], device=self.device)
        states = hidden_states(self.model, ids)[0]
        losses = [nll(head, states[t : t + 1], ids[0, t + 1 : t + 2]) for t in range(len(states) - 1)]
        return [states, torch.stack(losses)]


def check_known(model, processes):
    """The number of key-value heads. Raises UserError for a model that cannot be split over the processes."""
    inner, config = body(model), unwrapped(model).config
    _check_modules(model, inner, OF_BODY)
    for layer in inner.layers:
        _check_modules(model, layer, OF_LAYER)
        _check_modules(model, layer.self_attn, OF_ATTENTION)
        if type(layer.self_attn).__name__ not in ATTENTIONS:
            raise _unknown(model, f"its attention is a {type(layer.self_attn).__name__}")
        if not isinstance(layer.mlp, GatedMLP) and type(layer.mlp).__name__ not in MLPS:
            raise _unknown(model, f"its MLP is a {type(layer.mlp).__name__}")
        if layer.self_attn.o_proj.bias is not None or layer.mlp.down_proj.bias is not None:
            raise _unknown(model, "o_proj or down_proj has a bias, which each process would add")
    if not output_head(model).plain:
        raise _unknown(model, "its logits have a scale, a soft cap or a bias")
    if config.attention_dropout:
        raise _unknown(model, f"attention_dropout is {config.attention_dropout}; it must be 0")
    if processes.world_size > config.num_key_value_heads:
        raise UserError(
            f"{name_of(model)} has {config.num_key_value_heads} key-value heads: they can be divided over at most so "
            f"many processes, not {processes.world_size}. train/train_lm_fsdp.py takes more"
        )
    return config.num_key_value_heads


def _check_modules(model, module, known):
    odd = {name for name, _ in module.named_children()} ^ known
    if odd:
        raise _unknown(model, f"its {type(module).__name__} differs in {', '.join(sorted(odd))}")


def _unknown(model, why):
    return UserError(
        f"{name_of(model)} is a {type(unwrapped(model)).__name__}, which tensor parallelism does not know here: {why}. "
        f"It knows models built like Llama, of {', '.join(ATTENTIONS)}. train/train_lm_fsdp.py takes any model"
    )


# 4. the checkpoint


class WholeState:
    """The weights and the state of the optimizer, whole, for a checkpoint: any number of processes can go on from it.

    In the other processes than process 0, `state_dict` gives nothing, but they must call it, too.
    """

    def __init__(self, tensor_parallel, updates):
        self.split, self.updates = tensor_parallel, updates

    def state_dict(self):
        weights = {name: _kept(whole) for name, whole in self.split.weights()}
        return {"weights": weights, "updates": self._each(self.updates.state_dict(), self._joined)}

    def load_state_dict(self, state):
        with torch.no_grad():
            for name, weight in self.split.model.named_parameters():
                weight.copy_(self._part(state["weights"][name], weight))
        self.updates.load_state_dict(self._each(state["updates"], self._part))

    def _each(self, state, change):
        """The state of `Updates` with change(tensor, weight) in place of each tensor that goes with a weight."""
        optimizer = self.updates.optimizer
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {key: change(x, weights[i]) if x.dim() else x for key, x in of_weight.items()}
            for i, of_weight in state["optimizer"]["state"].items()
        }
        return state | {"optimizer": state["optimizer"] | {"state": moments}}

    def _joined(self, x, weight):
        return _kept(self.split.joined(x, weight))

    def _part(self, whole, weight):
        if weight not in self.split.parts:
            return whole
        return self.split.parts[weight].of(whole).contiguous()  # the fused AdamW of a CPU takes no other moments


def _kept(whole):
    return whole.cpu() if rank() == 0 else whole.new_empty(0)

"""Log-probs: in float32 whatever the weights are, and the same whether the head runs in one piece or in many."""

import pytest
import torch

from models import logprobs
from models.logprobs import head_logprobs, hidden_states

close = torch.testing.assert_close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.statement("float32-softmax")
def test_the_log_softmax_of_a_half_precision_model_is_computed_in_float32(tiny, dtype):
    model, ids = tiny(dtype=dtype), torch.tensor([[5, 6, 7, 8]])
    hidden = hidden_states(model, ids)[0, :-1]
    found, entropy = head_logprobs(model.lm_head, hidden, ids[0, 1:], entropy=True)
    logits = model.lm_head(hidden).double()
    expected = logits.log_softmax(-1)
    assert found.dtype == entropy.dtype == torch.float32
    close(found.double(), expected.gather(-1, ids[0, 1:, None])[:, 0], atol=1e-6, rtol=0)
    close(entropy.double(), -(expected.exp() * expected).sum(-1), atol=1e-6, rtol=0)


def test_the_head_in_pieces_gives_the_values_and_gradients_of_the_head_at_once(tiny, monkeypatch):
    ids = torch.randint(3, 64, (1, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for chunk in (1024, 5):
        monkeypatch.setattr(logprobs, "CHUNK", chunk)
        model = tiny()
        values = head_logprobs(model.lm_head, hidden_states(model, ids)[0, :-1], ids[0, 1:], temperature=0.7)
        values.square().sum().backward()
        found.append((values.detach(), torch.cat([p.grad.reshape(-1) for p in model.parameters()])))
    close(found[0], found[1], atol=1e-12, rtol=0)

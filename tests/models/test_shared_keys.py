"""Models in which a layer reads the keys and values of another layer, and keeps none of its own."""

import pytest
import torch

from models import generation
from models.admission import admitted
from models.generation import generate
from models.loader import load_model
from proof.architectures import PROMPTS, build, plain


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text"])
@pytest.mark.statement("left-padding")
def test_rows_leave_and_the_cache_grows_where_layers_share_keys(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "ROOM", 4)
    build(kind, tmp_path, num_kv_shared_layers=1, num_hidden_layers=4, layer_types=["full_attention"] * 4)
    model = load_model(tmp_path, device="cpu")
    first = generate(model, PROMPTS, 10, temperature=0)
    stops = [first.completions[0][2]]  # one row ends early, and the others go on
    found = generate(model, PROMPTS, 10, temperature=0, stop_ids=stops)
    assert [check["way"] for check in admitted(model)] == [generation.SHARED]
    lengths = [len(ids) for ids in found.completions]
    assert lengths[0] <= 3 and max(lengths) > 4  # beyond the first memory of the cache
    for prompt, ids, logprobs in zip(PROMPTS, found.completions, found.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), plain(model, prompt, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("broken", ["move", "grow"])
@pytest.mark.statement("left-padding")
def test_the_check_of_a_model_sees_what_happens_when_rows_leave_and_the_cache_grows(broken, monkeypatch):
    def forget(*_):
        raise TypeError("a layer without keys")

    monkeypatch.setattr(generation._PreallocatedCache, broken, forget)
    model = load_model("tiny-llama", device="cpu")
    found = generate(model, PROMPTS, 3, temperature=0)
    assert [check["way"] for check in admitted(model)] == [generation.OWN]  # a slower way, and no crash
    for prompt, ids, logprobs in zip(PROMPTS, found.completions, found.logprobs):
        torch.testing.assert_close(torch.tensor(logprobs), plain(model, prompt, ids), rtol=0, atol=1e-4)

"""Sampling that is interrupted and goes on: the very completions, finished batches not sampled again."""

import json

import pytest

from configs.config import UserError
from models import completions, resumable
from models.completions import progress_line
from models.generation import generate
from models.resumable import discard, generate_resumable
from runtime.run_folder import release

PROMPTS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14], [15]]


@pytest.fixture
def sample(tiny, tmp_path, monkeypatch):
    """A function (fail_at=batch, **changes) -> (generation, batches sampled now); the file is tmp_path/x.partial."""
    model, path = tiny(), tmp_path / "x.partial"

    def call(fail_at=None, identity="weights", seed=3, batch_size=4, prompts=PROMPTS, show=None):
        sampled = []

        def counted(*given, **more):
            if len(sampled) == fail_at:
                raise KeyboardInterrupt
            sampled.append(given[1])
            return generate(*given, **more)

        monkeypatch.setattr(resumable, "generate", counted)
        try:
            found, _ = generate_resumable(path, identity, model, prompts, 6, 1.3, 2, [2], seed, batch_size, show)
            return found, len(sampled)
        finally:
            release(path)

    return call, path, model


def test_the_completions_are_those_of_one_call_however_often_it_was_interrupted(sample):
    call, path, model = sample
    whole = generate(model, PROMPTS, 6, temperature=1.3, samples_per_prompt=2, stop_ids=[2], seed=3, batch_size=4)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            call(fail_at=1)
    with open(path, "a") as file:
        file.write('{"completions": [[1, 2')  # cut short by a kill
    found, sampled = call()
    assert found == whole
    assert sampled == 1  # of three batches, two were there
    assert call()[1] == 0
    discard(path)
    assert not path.exists() and call() == (whole, 3)


@pytest.mark.parametrize("change", [{"identity": "other"}, {"seed": 4}, {"batch_size": 2}, {"prompts": PROMPTS[1:]}])
def test_completions_of_another_sampling_are_thrown_away(sample, change):
    call, path, model = sample
    with pytest.raises(KeyboardInterrupt):
        call(fail_at=2)
    fresh, sampled = call(**change)
    assert sampled == (5 if "batch_size" in change else 2 if "prompts" in change else 3)
    discard(path)
    assert call(**change)[0] == fresh


def test_a_damaged_line_and_what_follows_are_sampled_again(sample):
    call, path, _ = sample
    whole, _ = call()
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 4 and all(json.loads(line) for line in lines)
    path.write_text("".join([*lines[:2], lines[2][:-9] + "\n", lines[3]]))
    assert call() == (whole, 2)


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_sampled(sample):
    call, path, _ = sample
    with pytest.raises(UserError, match="prompt 4 has 600 tokens"):
        call(prompts=[*PROMPTS[:4], [5] * 600])
    assert not path.exists()


def test_time_left_does_not_count_completions_that_were_there(sample, monkeypatch, capsys):
    call, path, _ = sample
    with pytest.raises(KeyboardInterrupt):
        call(fail_at=1)
    seconds = iter(range(0, 1000, 12))
    monkeypatch.setattr(completions.time, "time", lambda: next(seconds))
    show = progress_line()
    monkeypatch.undo()
    calls = []
    call(show=lambda *given: calls.append(given))
    assert calls == [(8, 10, 4), (10, 10, 4)]  # not the batch of four that was there
    monkeypatch.setattr(completions.time, "time", lambda: next(seconds))
    show(*calls[0])
    assert "completions      8/10 | 12s | eta 6s" in capsys.readouterr().out  # 4 completions in 12 s, 2 to go

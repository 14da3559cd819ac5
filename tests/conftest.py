"""Tests run with sockets blocked but for loopback: what they need is fetched before (`python models/fetch.py`)."""

import os
import socket

import pytest

from configs.config import ROOT

# on the CPU, where the numbers are the same on every machine; CUDA_VISIBLE_DEVICES=0 before pytest runs them on a GPU
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# many tests start processes: threads that spin while they wait would take the cores from those that work
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser):
    parser.addoption("--statement", metavar="KEY", help="run the tests of one statement of tests/statements.py")


def pytest_collection_modifyitems(config, items):
    key = config.getoption("--statement")
    if key:
        items[:] = [item for item in items if any(key in mark.args for mark in item.iter_markers("statement"))]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def written_in_the_tree():
    """Files and folders where runs write by default; the tiny models are made there on first use."""
    places = (ROOT / "models", ROOT / "data", ROOT / "report" / "runs")
    found = {path for place in places if place.is_dir() for path in place.iterdir()}
    return {path for path in found if not path.name.startswith(("tiny-", ".cache", "__pycache__"))}


@pytest.fixture(scope="session")
def seen_in_the_tree():
    """What was there before the first test and its fixtures, those of whole modules among them."""
    return written_in_the_tree()


@pytest.fixture(autouse=True)
def nothing_stays_in_the_tree(seen_in_the_tree):
    """A run of a test in a default folder would be in the way of a user's: its configuration is another."""
    yield
    left = written_in_the_tree() - seen_in_the_tree
    seen_in_the_tree |= left  # the next test is not to blame
    names = ", ".join(sorted(str(path.relative_to(ROOT)) for path in left))
    assert not left, f"the test or its fixtures wrote {names}: give it an `out` in tmp_path"


@pytest.fixture
def sampled_models(monkeypatch):
    """A function (module that samples) -> the list of the models that it will sample from, filled as it does."""
    from models.resumable import generate_resumable

    def watch(module):
        models = []

        def watched(path, identity, model, *rest):
            models.append(model)
            return generate_resumable(path, identity, model, *rest)

        monkeypatch.setattr(module, "generate_resumable", watched)
        return models

    return watch


@pytest.fixture
def tiny():
    """A function (name, **config changes) -> a small random model in float64, eval mode."""
    import torch
    from transformers import AutoModelForCausalLM

    from models.tiny import tiny_config

    def build(name="tiny-llama", dtype=torch.float64, vocab_size=64, **changes):
        torch.manual_seed(0)
        config = tiny_config(name, vocab_size, 2, **changes)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return build

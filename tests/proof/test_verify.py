"""The certificate: a claim that does not hold is named, what is not a number shows nothing, and the files say all that
was measured. The code is broken once for each claim, in the way that the claim is there to find.
"""

import contextlib
import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

import proof.lab
from configs.config import ROOT
from models import admission
from models.admission import window_of
from models.fast import attention, head, layers
from models.fast.quantised import QuantisedLinear
from proof import claims, trainers, verify
from proof.lab import PAD, Lab, deviation
from report.methods import METHODS
from rlhf import packing
from rlhf.sampler import layer_of
from runtime.cli import cli
from train import updates

pytestmark = pytest.mark.slow

LEARNED, ROTARY = trainers.MODELS
WINDOWED, CAPPED, MIXTURE, EAGER = trainers.KINDS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    trainers.prepare(folder)
    return folder


@pytest.fixture
def lab(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "lab")
    return Lab(tmp_path / "lab", torch.device("cpu"))


def claim(words, model):
    """The claim with this in its words, on one model. Of several, the one that begins with it."""
    found = min((c for c in verify.CLAIMS if words in c.words), key=lambda c: not c.words.startswith(words))
    return dataclasses.replace(found, models=(model,) if model in found.models else found.models)


# broken in the way that the claim is there to find


def completions_see_each_other(*given):
    packed = true_pack(*given)
    return dataclasses.replace(packed, attention_mask=torch.ones_like(packed.attention_mask).tril())


def positions_do_not_restart(model, batch):
    positions = torch.arange(batch["position_ids"].shape[1]).expand_as(batch["position_ids"])
    return true_lm_loss(model, batch | {"position_ids": positions})


def gate_and_up_swapped(*given):
    return true_backward_gated(*given)[::-1]


def pieces_overlap(length, size):
    pieces = true_pieces(length, max(size - 1, 1))
    return [slice(max(0, piece.start - 1), piece.stop) for piece in pieces]


def padding_is_seen(model, input_ids, attention_mask):
    return true_token_logprobs(model, input_ids, torch.ones_like(attention_mask))


def prompts_are_padded_by_hand(model, prompts, *given, **options):
    longest = max(map(len, prompts))
    return true_generate(model, [[PAD] * (longest - len(p)) + p for p in prompts], *given, **options)


def masked_by_token(rows, pad_id, device, left=False):
    ids, _ = true_pad_rows(rows, pad_id, device, left=left)
    return ids, (ids != PAD).long()


def masked_after(x, mask, dim=None):
    return (x * mask).sum(dim) / mask.sum(dim)


def temperature_is_forgotten(model, packed, temperature=1.0, **options):
    return true_packed_logprobs(model, packed, **options)


def adapter_starts_anywhere(*given, **options):
    model = true_add_lora(*given, **options)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return model


def merging_is_lossy(*given, merge_adapter=False, **options):
    model = true_load_model(*given, merge_adapter=merge_adapter, **options)
    return model.bfloat16().float() if merge_adapter else model


def saved_in_half(model, tokenizer, folder):
    return true_save_policy(copy.deepcopy(model).bfloat16().float(), tokenizer, folder)


def window_is_forgotten(model, packed, *given, **options):
    """Nor does admission notice it: it takes the first way."""
    forgotten = mock.patch.object(attention, "windowed", lambda mask, window: mask)
    with forgotten, mock.patch.object(packing, "admit", lambda model, kind, ways, *given: ways[0]):
        return true_packed_logprobs(model, packed, *given, **options)


def caps_are_forgotten(output_head, hidden):
    return output_head.module(hidden).float()


def only_the_last_tokens_are_compared(found, expected):
    return true_apart(*([x[-admission.LAST :] for x in values] for values in (found, expected)))


class ExpertsAreMergedTwice(claims.Sampler):
    def _is_the_policy(self):  # nor does the sampler notice it
        return True

    def model(self):
        copy = super().model()
        for name, weight in copy.named_parameters():
            if name.endswith("experts.down_proj"):
                layer = layer_of(self.policy, name.rpartition(".")[0])
                while isinstance(layer, LoraLayer):
                    layer = layer.base_layer
                delta = weight - layer.down_proj
                assert delta.abs().max() > 0  # the adapter on the experts has learned
                weight.data = weight + delta
        return copy


true_apart = admission.apart
true_pack, true_lm_loss, true_generate = proof.lab.pack, claims.lm_loss, claims.generate
true_pieces, true_token_logprobs, true_pad_rows = head.pieces, claims.token_logprobs, claims.pad_rows
true_packed_logprobs, true_add_lora, true_load_model = claims.packed_logprobs, claims.add_lora, claims.load_model
true_save_policy, true_backward_gated = claims.save_policy, layers._backward_gated
true_dequantised = QuantisedLinear.dequantised


def packed_in_evaluation(layer, dtype):
    """As the 4-bit layers of bitsandbytes on a CPU: after an evaluation pass the weights are others."""
    layer.packed = vars(layer).get("packed") or not (layer.training or torch.is_grad_enabled())
    return true_dequantised(layer, dtype).flip(0) if layer.packed else true_dequantised(layer, dtype)


BROKEN = {  # what is wrong: (the claim, its model, the module, the function, what stands for it, where it shows)
    "completions see each other": ("packed rows", ROTARY, proof.lab, "pack", completions_see_each_other, "PPO"),
    "positions do not restart": ("packed rows", LEARNED, claims, "lm_loss", positions_do_not_restart, "LM"),
    "gate and up swapped": ("memory-efficient", ROTARY, layers, "_backward_gated", gate_and_up_swapped, "gradients"),
    "a row counts in two pieces": ("loss in chunks", LEARNED, head, "pieces", pieces_overlap, "trained"),
    "padding is seen": ("the forward pass", ROTARY, claims, "token_logprobs", padding_is_seen, "log-probs, left"),
    "padding is a prompt": ("in generation", LEARNED, claims, "generate", prompts_are_padded_by_hand, "greedy"),
    "masked by the token": ("padding by any token", ROTARY, claims, "pad_rows", masked_by_token, "token_logprobs"),
    "masked after": ("inf or NaN", ROTARY, claims, "masked_mean", masked_after, "masked_mean, nan"),
    "no temperature": ("sampler's", ROTARY, claims, "packed_logprobs", temperature_is_forgotten, "temperature 0.7"),
    "B is not 0": ("LoRA at its start", LEARNED, claims, "add_lora", adapter_starts_anywhere, "LM"),
    "the adapter stays on": ("adapter off", LEARNED, claims, "as_reference", contextlib.nullcontext, "DPO"),
    "merged in bf16": ("merged adapter", ROTARY, claims, "load_model", merging_is_lossy, "loading"),
    "saved in bf16": ("saved and loaded", LEARNED, claims, "save_policy", saved_in_half, "DPO"),
    "packed weights": ("QLoRA", ROTARY, QuantisedLinear, "dequantised", packed_in_evaluation, "4 bits, after"),
    "no window": ("packed rows", WINDOWED, claims, "packed_logprobs", window_is_forgotten, "DPO"),
    "no soft cap": ("loss in chunks", CAPPED, head.OutputHead, "logits", caps_are_forgotten, "DPO"),
    "experts merged twice": ("merged adapter", MIXTURE, claims, "Sampler", ExpertsAreMergedTwice, "sampler"),
    "the first tokens": ("packed rows", EAGER, admission, "apart", only_the_last_tokens_are_compared, "reward"),
}  # fmt: skip


def test_the_claims_hold_on_the_code_as_it_is(lab):
    for words, model in {(words, model) for words, model, *_ in BROKEN.values()}:
        row = verify.measure(claim(words, model), lab, "float32")
        assert row.passed and row.error is None, row


@pytest.mark.parametrize("what", BROKEN)
def test_a_claim_fails_when_the_code_is_broken_in_the_way_it_fears(lab, monkeypatch, what):
    words, model, module, function, broken, cases = BROKEN[what]
    monkeypatch.setattr(module, function, broken)
    row = verify.measure(claim(words, model), lab, "float32")
    assert not row.passed and row.error is None
    assert {case for case, x in row.cases.items() if cases in case and x > row.tolerance}, row.cases


def test_a_model_whose_window_no_row_exceeds_is_no_witness(lab):
    for name in (WINDOWED, CAPPED, EAGER):
        assert window_of(lab.model(name, "float32")) == trainers.WINDOW
    config = lab.folder / WINDOWED / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sliding_window": 10}))  # as long as the longest row
    row = verify.measure(claim("packed rows", WINDOWED), lab, "float32")
    assert not row.passed and "the longest row has 10 tokens, the window 10" in row.error


@pytest.mark.statement("mask-before-exp")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_nothing_masked_reaches_losses_advantages_statistics_or_metrics(dtype):
    found = claims.poisoned_is_clean(Lab(None, torch.device("cpu")), "", dtype)
    assert len(found) == 5 * len(claims.LOSSES)  # inf, -inf, NaN, 1e3, -1e3
    assert [case for case, off in found.items() if off != 0] == []  # bit by bit, and finite


def fake_runs(monkeypatch, odd=lambda trainer, name: False, weight=0.0, **logged):
    """Runs that were never made: all have the same weights and log, but for those of which `odd` is true."""

    def run(folder, trainer, model, name="left alone", **options):
        out = folder / "runs" / trainer / model / name
        out.mkdir(parents=True, exist_ok=True)
        changed = odd(trainer, name)
        save_file({"w": torch.tensor([1.0, 2.0 + weight * changed])}, out / "model.safetensors")
        line = {"loss": torch.tensor(2.0).log().item(), "margin": 0.0, "grad_norm": 1.0}
        line |= {"approx_kl": 0.0, "clipfrac": 0.0} | (logged if changed else {})
        (out / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        layers = {"GPT2MLP": 20 if name == "checkpointing" else 10}
        Path(f"{out}.log").write_text(f"continuing from step 1\n{json.dumps(layers)}\n")
        return out

    monkeypatch.setattr(claims, "run", run)
    monkeypatch.setattr(claims, "interrupt", lambda *given, **options: True)


WHOLE_RUNS = {  # the claim: (which runs are odd, what is wrong in their log that the claim must see)
    "accumulation": (lambda trainer, name: trainer == "LoRA" and name == "pieces", {"grad_norm": 1.01}),
    "two processes": (lambda trainer, name: trainer == "PPO" and name == "two processes", {"loss": 0.7}),
    "cached reference": (lambda trainer, name: name == "fresh reference", {"grad_norm": 1.01}),
    "checkpointing": (lambda trainer, name: trainer == "GRPO" and name == "checkpointing", {"clipfrac": 1e-7}),
    "AMP and DDP": (lambda trainer, name: trainer == "AMP", {"loss": 0.7}),
    "first step": (lambda trainer, name: trainer == "PPO", {"approx_kl": 1e-9}),
    "killed and resumed": (lambda trainer, name: trainer == "reward" and name == "killed", {"margin": 1e-7}),
}


@pytest.mark.parametrize("words", WHOLE_RUNS)
def test_a_claim_about_whole_runs_fails_when_one_of_them_ends_elsewhere(lab, monkeypatch, words):
    odd, log = WHOLE_RUNS[words]
    fake_runs(monkeypatch)
    assert verify.measure(claim(words, LEARNED), lab, "float32").deviation == 0
    fake_runs(monkeypatch, odd, **log)
    row = verify.measure(claim(words, LEARNED), lab, "float32")
    assert not row.passed and row.error is None
    fake_runs(monkeypatch, odd, **dict.fromkeys(log, math.nan))
    row = verify.measure(claim(words, LEARNED), lab, "float32")
    assert not row.passed and row.deviation == math.inf
    if words != "first step":
        fake_runs(monkeypatch, odd, weight=1e-3)
        assert not verify.measure(claim(words, LEARNED), lab, "float32").passed


def test_what_a_claim_rests_on_is_looked_at_too(lab, monkeypatch):
    """A step that was not clipped, a layer not computed again, a run that was not killed: nothing was shown then."""
    fake_runs(monkeypatch, lambda trainer, name: True, grad_norm=0.1)
    assert "no step was clipped" in verify.measure(claim("two processes", LEARNED), lab, "float32").error
    fake_runs(monkeypatch)
    monkeypatch.setattr(claims, "layers_computed", lambda out: 10)
    assert not verify.measure(claim("checkpointing", LEARNED), lab, "float32").passed
    monkeypatch.setattr(claims, "interrupt", lambda *given, **options: False)
    assert not verify.measure(claim("killed and resumed", LEARNED), lab, "float32").passed


def test_as_a_command_a_broken_script_is_found_out_and_nothing_is_written(tmp_path):
    """The runs of the claim are processes: they are forked from the broken program."""
    program = tmp_path / "broken.py"
    program.write_text(
        "import dataclasses\n"
        "from rlhf import dpo_train\n"
        "true = dpo_train.cache_reference\n"
        "def cache_reference(reference_logps, *given, **options):\n"
        "    return true(lambda batch: [x * 1.1 for x in reference_logps(batch)], *given, **options)\n"
        "dpo_train.cache_reference = cache_reference\n"
        "from proof import verify\n"
        "verify.CLAIMS = [dataclasses.replace(c, models=('tiny-llama',)) for c in verify.CLAIMS]\n"
        f"verify.DEFAULT_JSON = {str(tmp_path / 'verification.json')!r}\n"
        "if __name__ == '__main__':\n"
        "    verify.cli(verify.main, verify.Config)\n"
    )
    done = subprocess.run(
        [sys.executable, program, "--only", "cached"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert "cached reference = fresh" in done.stdout and "FAIL\n    the largest: DPO, tiny-llama" in done.stdout
    others = f"({len(verify.CLAIMS) - 1} others were not measured)"
    assert f"FAILED: 1 of 1 claims do not hold {others}: cached reference = fresh" in " ".join(done.stdout.split())
    assert sorted(tmp_path.iterdir()) == [program]


def test_a_claim_whose_package_is_not_installed_is_not_measured_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(verify, "find_spec", lambda name: None)
    monkeypatch.setattr(trainers, "prepare", lambda folder: None)
    with pytest.raises(SystemExit):
        verify.main(verify.Config(only="QLoRA"))
    assert "not measured, because bitsandbytes is not installed: QLoRA" in capsys.readouterr().out


def test_every_script_that_trains_a_method_has_runs():
    scripts = {f"{trainer.script.__name__.replace('.', '/')}.py" for trainer in trainers.TRAINERS.values()}
    assert {method.script for method in METHODS if method.script} <= scripts


def test_sgd_takes_the_steps_of_runs_whose_rounding_is_compared(monkeypatch):
    monkeypatch.setattr(updates, "make_optimizer", updates.make_optimizer)  # put back afterwards
    trainers._exact("float32")
    weight = torch.nn.Parameter(torch.ones(2, 2))
    config = SimpleNamespace(lr=0.5, weight_decay=0.1)
    assert type(updates.Updates([weight], config, None).optimizer) is torch.optim.SGD
    assert not [name for name, trainer in trainers.TRAINERS.items() if "make_optimizer" in vars(trainer.script)]


# the command, on claims made up


def good(lab, model, dtype):
    """One is one."""
    return {"LM": 0.0, "DPO": 1e-9}


def far_off(lab, model, dtype):
    """One is two."""
    return {"LM": 1e-9, "DPO": 0.5}


def breaks(lab, model, dtype):
    """One over nothing."""
    raise ZeroDivisionError("no division by 0")


def of_nothing(lab, model, dtype):
    """Nothing is anything."""
    return {}


def command(monkeypatch, tmp_path, functions, *words):
    """(exit status, rows of the certificate or None): `python proof/verify.py WORDS` with these claims."""
    made_up = [
        verify.Claim(f.__name__, f, {"float32": 1e-6, "float64": 1e-6}, "it is a round number", whole_runs=beside)
        for f, beside in functions
    ]
    monkeypatch.setattr(verify, "CLAIMS", made_up)
    monkeypatch.setattr(verify, "DEFAULT_JSON", str(tmp_path / "default.json"))
    monkeypatch.setattr(trainers, "prepare", lambda folder: None)
    monkeypatch.setattr(trainers, "server", lambda: None)
    monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli(verify.main, verify.Config)
    return ended.value.code


def test_all_claims_hold(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path, [(good, False)]) == 0
    assert "all 1 claims hold" in capsys.readouterr().out
    assert json.loads((tmp_path / "default.json").read_text())["passed"] is True
    assert "**all 1 claims hold.**" in (tmp_path / "default.md").read_text()


@pytest.mark.parametrize("beside", [False, True])
def test_a_violated_claim_gives_fail_and_status_1_and_is_named(monkeypatch, tmp_path, capsys, beside):
    assert command(monkeypatch, tmp_path, [(far_off, beside), (good, False)]) == 1
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("far_off")] == ["FAIL", "FAIL"]
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("good")] == ["pass", "pass"]
    assert "the largest: DPO, tiny-gpt2" in out and "FAILED: 1 of 2 claims do not hold: far_off" in out


@pytest.mark.parametrize("beside", [False, True])
def test_an_error_within_a_claim_fails_it_and_not_the_others(monkeypatch, tmp_path, capsys, beside):
    functions = [(breaks, beside), (of_nothing, beside), (good, beside)]
    assert command(monkeypatch, tmp_path, functions) == 1
    out = capsys.readouterr().out
    assert "ZeroDivisionError: no division by 0" in out and "AssertionError: nothing was measured" in out
    assert "FAILED: 2 of 3 claims do not hold: breaks; of_nothing" in out
    rows = json.loads((tmp_path / "default.json").read_text())["claims"]
    assert {(r["claim"], r["passed"], r["deviation"]) for r in rows} == {
        ("breaks", False, None), ("of_nothing", False, None), ("good", True, 1e-9)
    }  # fmt: skip
    assert "Not measured: ZeroDivisionError: no division by 0" in (tmp_path / "default.md").read_text()


def test_only_writes_nothing_but_where_it_is_told(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path, [(good, False), (far_off, False)], "--only", "goo") == 0
    assert "all 1 claims hold (1 others were not measured)" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    path = tmp_path / "part.json"
    assert command(monkeypatch, tmp_path, [(good, False), (far_off, False)], "--only", "goo", "--json", path) == 0
    assert "(1 others were not measured)" in path.with_suffix(".md").read_text()
    assert not (tmp_path / "default.json").exists()


def test_json_writes_both_files_with_all_that_was_measured(monkeypatch, tmp_path):
    path = tmp_path / "new" / "folder" / "mine.json"
    assert command(monkeypatch, tmp_path, [(good, False), (far_off, False)], "--json", path) == 1
    found = json.loads(path.read_text(), parse_constant=pytest.fail)  # no Infinity, no NaN: they are not JSON
    assert found["passed"] is False and found["seconds"] >= 0 and found["device"] in ("cpu", "cuda")
    assert found["machine"].keys() == {"cpu", "cores", "gpu", "system"} and found["machine"]["cores"] > 0
    assert found["versions"]["torch"] and "git_commit" in found
    assert [(r["claim"], r["dtype"]) for r in found["claims"]] == [
        ("good", "float64"), ("good", "float32"), ("far_off", "float64"), ("far_off", "float32")
    ]  # fmt: skip
    row = found["claims"][-1]
    assert row.pop("seconds") >= 0
    assert row == {
        "claim": "far_off", "dtype": "float32", "deviation": 0.5, "tolerance": 1e-6, "passed": False, "error": None,
        "cases": {f"{case}, {model}": x for model in trainers.MODELS for case, x in (("LM", 1e-9), ("DPO", 0.5))},
        "worst": "DPO, tiny-gpt2", "compared": "One is two.", "why": "it is a round number",
    }  # fmt: skip
    text = path.with_suffix(".md").read_text()
    assert "**FAILED: 1 of 2 claims do not hold: far_off.**" in text
    assert "| far_off | float32 | 5.0e-01 | DPO, tiny-gpt2 | 1.0e-06 | FAIL |" in text
    assert "| good | float32 | 1.0e-09 | DPO, tiny-gpt2 | 1.0e-06 | pass |" in text
    assert "One is two." in text and "it is a round number" in text
    assert str(found["machine"]["cpu"]) in text and f"torch {found['versions']['torch']}" in text


def test_the_certificate_says_of_every_claim_what_was_compared_and_why_the_tolerance_is_what_it_is(tmp_path):
    rows = [verify.Row(c.words, n, 0.0, t, True, {"LM": 0.0}, None, 1.0)
            for c in verify.CLAIMS for n, t in c.tolerance.items()]  # fmt: skip
    verify.write(tmp_path / "v.json", tmp_path / "v.md", rows, torch.device("cpu"), 9.0)
    text = (tmp_path / "v.md").read_text()
    for c in verify.CLAIMS:
        for dtype, tolerance in c.tolerance.items():
            assert f"| {c.words} | {dtype} | 0 | all 1 cases | {verify.shape(tolerance)} | pass |" in text
        assert f"**{c.words}.** {verify.compared(c)}" in text and c.why in text
    assert f"all {len(verify.CLAIMS)} claims hold" in text


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--only", "no such words"], ["only = 'no such words'", "good", "far_off"]),
        (["--json", "certificate.txt"], ["json = 'certificate.txt'", "must end in .json"]),
        (["--json", "FILE/certificate.json"], ["cannot write to", "is a file"]),
        (["--json", "FOLDER.json"], ["is a folder"]),
        (["--claims", "all"], ["unknown key 'claims'", "only, json"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(monkeypatch, tmp_path, capsys, words, named):
    (tmp_path / "FILE").touch()
    (tmp_path / "FOLDER.json").mkdir()
    words = [str(tmp_path / w) if w.startswith("F") else w for w in words]
    assert command(monkeypatch, tmp_path, [(good, False), (far_off, False)], *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and all(text in said.err for text in named), said.err


# what is not a number


@pytest.mark.parametrize("values", [[math.nan, 0.0], [0.0, math.nan], [0.0, math.nan, 1e-9], [math.inf, math.nan]])
def test_a_deviation_that_is_not_a_number_holds_nothing(lab, values):
    made_up = verify.Claim("nan", lambda *_: dict(enumerate_cases(values)), {"float32": 1e9}, "", models=("",))
    row = verify.measure(made_up, lab, "float32")
    assert row.deviation == math.inf and not row.passed
    assert row.cases[row.worst] == math.inf


def enumerate_cases(values):
    return ((f"case {i}", x) for i, x in enumerate(values))


def test_nan_on_both_sides_is_no_agreement():
    for x in (math.nan, math.inf):
        both = [torch.tensor([1.0, x])]
        assert deviation(both, both) == math.inf
    assert deviation([torch.tensor([1.0])], [torch.tensor([1.0, 2.0])]) == math.inf
    assert deviation([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])]) == 0.25


def a_run(folder, weight=1.0, **logged):
    """A run's folder as `proof/trainers.py` reads it."""
    folder.mkdir()
    save_file({"w": torch.tensor([1.0, weight])}, folder / "model.safetensors")
    (folder / "metrics.jsonl").write_text(json.dumps({"loss": 2.0, "grad_norm": 4.0} | logged) + "\n")
    return folder


@pytest.mark.parametrize("broken", [{"weight": math.nan}, {"loss": math.nan}, {"grad_norm": math.nan}])
def test_a_run_with_nan_is_no_other_runs_equal(tmp_path, broken):
    start, one, other = a_run(tmp_path / "start", 0.0), a_run(tmp_path / "one"), a_run(tmp_path / "other", **broken)
    for found, expected in ((other, one), (one, other), (other, other)):
        assert trainers.differ(found, expected) == math.inf
        assert trainers.apart(found, expected, start, "float32") == math.inf


def test_how_far_runs_are_apart(tmp_path):
    start, one = a_run(tmp_path / "start", 0.0), a_run(tmp_path / "one", 1.0)
    other = a_run(tmp_path / "other", 1.5, loss=2.5, grad_norm=5.0)
    assert trainers.differ(other, one) == 1.0  # the norm: 5 - 4
    # weights moved by 1 and end 0.5 apart; the loss is 0.5 / 2 off, the norm 1 / 4
    assert trainers.apart(other, one, start, "float32") == 0.5
    assert (
        trainers.apart(other, a_run(tmp_path / "far", 3.0), start, "float64") == 0.5
    )  # 1.5 apart of 3; the norm 1 / 4
    assert trainers.differ(one, one) == trainers.apart(one, one, start, "float32") == 0

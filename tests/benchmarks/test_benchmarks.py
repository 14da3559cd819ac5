"""The benchmarks on tiny models: both sides do the same work, and the figures are what the arithmetic says."""

import importlib
import json
import runpy
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import grpo, lm, measure, operations, page, run, scaling
from configs.config import ROOT, UserError, load_config
from models import device
from models.flops import Cost, Part, row, rows, sampled
from models.loader import load_model, load_tokenizer
from runtime.memory import AT_START
from runtime.progress import Progress

pytestmark = pytest.mark.slow


def report(seconds, losses=(2.0, 1.5), memory=1.0, **more):
    """What a measured process says of its side."""
    return {
        "seconds": seconds, "losses": list(losses), "grad_norms": [], "peak_memory_gb": memory, "tokens": 100,
        "flops": 6e9, "threads": 1, **more,
    }  # fmt: skip


def settings(*words):
    return load_config(run.Config, list(words))


@pytest.fixture
def in_this_process(monkeypatch):
    """Sides are called here: a process of its own takes seconds to import its libraries."""
    from rlhf import sampler

    monkeypatch.setattr(sampler, "generate", sampler.generate)  # put back afterwards
    original = sampler.generate

    def call(module, side, size, folder, environment=None):
        AcceleratorState._reset_state(reset_partial_state=True)
        sampler.generate = original
        folder.mkdir(parents=True)
        found = getattr(importlib.import_module(f"benchmarks.{module}"), side)(SimpleNamespace(**size), folder)
        return json.loads(json.dumps(found))

    monkeypatch.setattr(measure, "measure_side", call)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_gpu_gets_sizes_of_its_own(monkeypatch):
    of_cpu = {name: run.sizes(name, settings("--job", name)) for name in run.JOBS}
    monkeypatch.setattr(run, "pick_device", lambda: torch.device("cuda", 0))
    for name, size in of_cpu.items():
        on_gpu = run.sizes(name, settings("--job", name))
        assert on_gpu.keys() == size.keys() and on_gpu != size
        changes = run.JOBS[name].changes
        assert on_gpu | changes == on_gpu
        assert run.sizes(name, settings("--job", name, "--smoke", "true"))["model_name"] == "tiny-llama"


def test_the_gpt2_of_a_gpus_lm_job_is_gpt2s_shape(tmp_path):
    size = SimpleNamespace(**lm.SIZE | lm.ON_GPU, prepared=str(tmp_path / "gpt2"))
    lm.prepare(size, tmp_path)
    model = load_model(size.prepared, dtype=torch.float32)
    assert (model.config.n_layer, model.config.n_embd, model.config.n_head) == (12, 768, 12)
    assert 123e6 < model.num_parameters() < 125e6 and len(load_tokenizer(size.prepared)) == model.config.vocab_size


@pytest.mark.parametrize("job", ["lm", "dpo", "dpo_lora", "reward", "grpo", "generate"])
def test_both_sides_do_the_same_work(job, in_this_process, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "CPUINFO", tmp_path / "none")  # in fp32: in bf16 each side rounds in its own places
    file = tmp_path / "found.json"
    run.main(settings("--job", job, "--rounds", "1", "--smoke", "true", "--json", str(file)))
    found = json.loads(file.read_text())
    ours, baseline = found["ours"], found["baseline"]
    assert found["job"] == job and found["rounds"] == 1 and found["losses_agree"] is True
    assert found["loss_difference"] < 1e-3
    assert len(ours["losses"]) == len(baseline["losses"]) >= 2
    assert ours["losses"] != ours["losses"][:1] * len(
        ours["losses"]
    )  # something is learnt, or sampled, from step to step
    assert ours["grad_norms"] == pytest.approx(baseline["grad_norms"], rel=1e-2)
    for side in (ours, baseline):
        assert side["seconds_per_step"]["median"] > 0 and side["peak_memory_gb"] > 0
        assert side["tokens_per_second"] == pytest.approx(found["tokens_per_step"] / side["seconds_per_step"]["median"])
    assert found["speed_ratio"] > 0 and found["memory_ratio"] > 0
    said = capsys.readouterr().out
    assert "the losses agree" in said and "times the speed" in said


def test_ppo_is_measured_as_share_of_the_peak(in_this_process, tmp_path):
    file = tmp_path / "found.json"
    run.main(settings("--job", "ppo", "--rounds", "1", "--smoke", "true", "--json", str(file)))
    found = json.loads(file.read_text())
    assert found["baseline"] is None and found["speed_ratio"] is None
    assert found["ours"]["share_of_peak"] > 0 and len(found["ours"]["losses"]) == 2


def test_a_side_runs_in_a_process_of_its_own(tmp_path):
    found = measure.measure_side("lm", "ours", {**lm.SMOKE, "steps": 1}, tmp_path / "side", {"OMP_NUM_THREADS": "1"})
    assert len(found["seconds"]) == len(found["losses"]) == 1 and found["threads"] == 1
    assert 0.1 < found["peak_memory_gb"] < 5
    with pytest.raises(UserError, match=r"(?s)measure, peak: .* status 1.*AttributeError"):
        measure.measure_side("measure", "peak", {}, tmp_path / "broken")


def test_ratios_are_taken_within_a_round():
    ours = [report([1.0, 2.0, 9.0], memory=1.0), report([4.0], memory=2.0), report([1.0], memory=1.0)]
    baseline = [report([6.0, 6.0], memory=4.0), report([4.0], memory=4.0), report([10.0], memory=1.0)]
    speed, memory, of_rounds = measure.ratios(ours, baseline)
    assert of_rounds == [3.0, 1.0, 10.0] and speed == 3.0  # 6 / 2, 4 / 4, 10 / 1
    assert memory == 0.5  # of 1 / 4, 2 / 4, 1 / 1
    side = measure.side_figures(ours, matmul_peak=12e9)
    assert side["seconds_per_step"] == {"median": 2.0, "min": 1.0, "max": 9.0}  # of 1, 1, 2, 4, 9
    assert side["tokens_per_second"] == 50.0 and side["peak_memory_gb"] == 1.0
    assert side["share_of_peak"] == 0.25  # 6e9 / 2 / 12e9
    assert measure.difference([2.0, 1.5], [2.001, 1.4]) == pytest.approx(0.1)


def test_the_clock_leaves_out_the_warm_up_and_counts_every_step():
    clock = measure.Clock()
    clock.moments, clock.peak = [10.0, 12.0, 15.0], 1.0
    found = clock.measured({"tokens": 8, "flops": 1}, [3.0, 2.0, 1.0], [0.3, 0.2, 0.1])
    assert found["seconds"] == [2.0, 3.0] and found["losses"] == [2.0, 1.0] and found["grad_norms"] == [0.2, 0.1]
    with pytest.raises(AssertionError, match="3 steps, 3 pieces of work, 2 losses"):
        clock.measured({"tokens": 8, "flops": 1}, [3.0, 2.0])


def test_flops_are_those_of_the_arithmetic():
    assert row(2, [3, 1]) == Part(6, 3 + (6 + 6) + (2 + 1), 4)  # prompt; each completion sees it, and itself causally
    assert sampled([[5, 6]], 3, 2) == Part(2 + 2 * 2, 3 + 2 * (4 + 3), 6)  # the last token is not read again
    # of prompts of 3 and 2 tokens the first is the same, 1 token that sees itself; then 2 and 1 of their own
    assert rows([[5, 6, 7], [5, 8]], [[1], [2]]) == Part(1 + 2 + 1 + 1 + 2, 1 + (2 + 3) + 2 + 4 + (3 + 4), 3)
    assert sampled([[5, 6, 7], [5, 8]], 2, 1) == Part(1 + 2 + 1 + 2, 1 + (2 + 3) + 2 + 4 + 3, 4)
    cost = Cost(body=10, head=5, attention=4)
    part = Part(tokens=3, pairs=6, head=2)
    assert cost.forward(part) == 2 * 10 * 3 + 4 * 6 + 2 * 5 * 2
    assert cost.training(part) == 3 * cost.forward(part)
    adapted = Cost(body=10, head=5, attention=4, lora=7)
    assert adapted.forward(part) == cost.forward(part) + 2 * 7 * 3
    assert adapted.training(part) == 4 * (10 * 3 + 5 * 2) + 6 * 7 * 3 + 3 * 4 * 6
    found = Cost.of("tiny-llama", lora_r=1)  # 2 layers, 32 wide, 4 heads of 8, 2 of them for keys and values, 259 ids
    assert found.body == 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    assert found.head == 259 * 32 and found.attention == 4 * 2 * 4 * 8
    assert found.lora == 2 * (64 + 2 * 48 + 64 + 3 * 96)


@pytest.mark.parametrize("side", ["ours", "baseline"])
def test_both_sides_start_alike(side, monkeypatch, tmp_path):
    seen = []

    def start(command, env, **_):
        seen.append(env)
        raise KeyboardInterrupt

    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    monkeypatch.setattr(measure.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        measure.start_side("lm", side, {}, tmp_path / side)
    assert seen[0].items() >= (AT_START | {"THP_MEM_ALLOC_ENABLE": "1"}).items()


def test_losses_that_differ_are_said_and_end_in_status_1(monkeypatch, tmp_path, capsys):
    def sides(module, side, size, folder, environment=None):
        if side == "peak":
            return {"flops_per_second": 1e10, "shapes": {}}
        return report([1.0], losses=(2.0, 1.5 if side == "ours" else 1.52))

    monkeypatch.setattr(measure, "measure_side", sides)
    monkeypatch.setattr(measure, "precision", lambda: "fp32")
    with pytest.raises(SystemExit) as end:
        run.main(settings("--job", "lm", "--rounds", "1", "--json", str(tmp_path / "found.json")))
    said = capsys.readouterr().out
    assert end.value.code == 1 and "THE LOSSES DISAGREE in lm" in said and "DISAGREE: at most 2.0e-02 apart" in said
    assert json.loads((tmp_path / "found.json").read_text())["losses_agree"] is False


@pytest.mark.parametrize("in_fp32, status", [(1.501, None), (1.52, 1)])
def test_losses_that_differ_in_bf16_are_compared_in_fp32(in_fp32, status, monkeypatch, tmp_path, capsys):
    def sides(module, side, size, folder, environment=None):
        if side == "peak":
            return {"flops_per_second": 1e10, "shapes": {}}
        exact = environment == {measure.IN_PRECISION: "fp32"}
        return report([1.0], losses=(2.0, 1.5 if side == "ours" else in_fp32 if exact else 1.52))

    monkeypatch.setattr(measure, "measure_side", sides)
    monkeypatch.setattr(measure, "precision", lambda: "bf16")
    words = settings("--job", "dpo", "--rounds", "1", "--json", str(tmp_path / "found.json"))
    if status:
        with pytest.raises(SystemExit):
            run.main(words)
    else:
        run.main(words)
    said, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    apart = f"{in_fp32 - 1.5:.1e}"
    assert "in bf16 the losses are 2.0e-02 apart: once more in fp32" in said
    assert f"at most 2.0e-02 apart, 0.01 is allowed; in fp32 {apart}" in said
    assert found["losses_agree"] is (status is None) and found["speed_ratio"] == 1.0
    assert f"2.0e-02, in fp32 {apart}" in "".join(page.losses_table({"dpo": found}))


def test_the_precision_of_a_sides_process_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv(measure.IN_PRECISION, "fp32")
    size = SimpleNamespace(**lm.SIZE | lm.SMOKE)
    assert measure.precision() == lm.settings(size, tmp_path).precision == "fp32"


def test_generate_compares_what_both_sides_said_alike():
    ours = {"greedy": {"ids": [[1, 2, 3, 4], [1, 9, 3, 4]], "logprobs": [[-1.0] * 4, [-3.0] * 4]}}
    baseline = {"greedy": {"ids": [[1, 2, 3, 5], [1, 2, 3, 4]], "logprobs": [[-1.0] * 4, [-4.0] * 4]}}
    importlib.import_module("benchmarks.generate").settle(ours, baseline)
    assert ours == {"losses": [2.0, 1.0, 1.0], "same_tokens": 0.5}  # 3 + 1 of 8; the second row counts once
    assert baseline == {"losses": [2.5, 1.0, 1.0], "same_tokens": 0.5}


def test_the_sampler_of_a_benchmark_never_stops_and_may_return_given_completions():
    asked = []

    def generate(model, prompts, stop_ids=()):
        asked.append(stop_ids)
        return measure_generation([[1, 2], [3, 4]])

    def measure_generation(completions):
        from models.generation import Generation

        return Generation(completions, [], [])

    assert grpo.without_stop(generate)(None, [], stop_ids=[7]).completions == [[1, 2], [3, 4]]
    sample = grpo.without_stop(generate, [[[5, 6], [7, 8]], [[9, 9], [9, 9]]])
    assert sample(None, []).completions == [[5, 6], [7, 8]] and sample(None, []).completions == [[9, 9], [9, 9]]
    assert asked == [(), (), ()]
    with pytest.raises(AssertionError):
        grpo.without_stop(generate, [[[5], [7, 8]]])(None, [])


def test_scaling_runs_every_point(in_this_process, monkeypatch, capsys):
    found = scaling.main(load_config(scaling.Config, ["--smoke", "true", "--ddp", "false", "--busy", "false"]))
    sweeps = found["scaling"]["sweeps"]
    assert [[point["value"] for point in sweep["points"]] for sweep in sweeps] == [[32, 64], [1, 2], [2, 4]]
    assert sweeps[1]["points"][1]["tokens"] == 2 * sweeps[1]["points"][0]["tokens"]
    assert scaling.slower([{"seconds": [1.0, 3.0]}, {"seconds": [2.0, 1.0]}]) == [2.0, 3.0]


def test_a_busy_core_is_there_while_it_is_measured(monkeypatch, capsys):
    alive = []

    def measured(job, side, size, folder):
        alive.append((job, sum(child.cmdline()[1:] == [*scaling.BUSY[1:]] for child in psutil.Process().children())))
        return {"tokens": 100, "seconds": [1.0, 2.0 if alive[-1][1] else 1.0, 4.0 if alive[-1][1] else 1.0]}

    monkeypatch.setattr(measure, "measure_side", measured)
    monkeypatch.setattr(measure, "measure_peak", lambda *_: {"flops_per_second": 1e9})
    words = ["--smoke", "true", "--ddp", "false", "--sweeps", "false", "--rounds", "2"]
    found = scaling.main(load_config(scaling.Config, words))["busy"]
    assert alive == [(job, busy) for job in ("generate", "lm") for _ in range(2) for busy in (0, 1)]
    assert found["lm"] == found["generate"] == {"quiet": 100.0, "busy": 50.0}
    assert "| LM training | 100 | 50 | 50% |" in page.busy_part(found)


@pytest.mark.parametrize("job", ["lm", "generate"])
def test_every_second_of_a_step_is_of_one_kind_of_operation(job, in_this_process, capsys):
    found = operations.main(load_config(operations.Config, ["--job", job, "--smoke", "true"]))[job]
    assert list(found["kinds"])[-1] == operations.REST
    assert {"matmuls with weights", "softmax, exp", "other elementwise operations"} <= found["kinds"].keys()
    spent = sum(seconds for seconds, _ in found["kinds"].values())
    assert found["seconds"] == pytest.approx(spent, rel=0.02) and found["flops"] > 0
    assert measure.Clock is operations.measure.Clock and measure.Clock.__name__ == "Clock"  # put back
    said = capsys.readouterr().out
    assert f"{job}: a step of " in said and "matmuls with weights" in said


def test_kinds_of_operations_by_their_names():
    def event(key, microseconds, count=1):
        return SimpleNamespace(key=key, self_cpu_time_total=microseconds, self_device_time_total=0, count=count)

    names = {
        "aten::mm": "matmuls with weights", "aten::addmm_": "matmuls with weights",
        "mkldnn::_linear_pointwise": "matmuls with weights", "aten::bmm": "matmuls of attention",
        "aten::baddbmm": "matmuls of attention", "aten::_log_softmax": "softmax, exp", "aten::exp_": "softmax, exp",
        "aten::_fused_adamw_": "optimizer, gradient norm", "aten::copy_": "copies, casts, indexing",
        "aten::index_select": "copies, casts, indexing", "aten::silu_backward": "other elementwise operations",
        "aten::expand": None, "aten::view": None,
    }  # fmt: skip
    for name, kind in names.items():
        found = operations.kinds([event(name, 2e6, 3), event(name, 1e6)], 10.0)
        assert found == ({kind: [3.0, 4], operations.REST: [7.0, 0]} if kind else {operations.REST: [10.0, 0]})


def test_the_page_shows_every_part(monkeypatch, tmp_path):
    (tmp_path / "report" / "figures").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / page.NOTES).write_text("## What was tried\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    for name in ("generate", "ppo"):
        size = run.sizes(name, settings("--job", name))
        rounds = {"ours": [report([1.0, 1.2])], "baseline": [report([3.0, 3.6], losses=(2.0, 1.501), memory=2.0)]}
        if name == "ppo":
            del rounds["baseline"]
        page.update(jobs={name: run.figures(name, size, rounds, 1e11)})
        page.update(gpu_jobs={name: run.figures(name, size, rounds, 1e12)})
    points = [{"value": n, "seconds": 1.0, "tokens": n, "flops": 1e9, "peak_memory_gb": 1.0} for n in (1, 2)]
    page.update(scaling={"sweeps": [{"title": "LM", "key": "rows", "peak": 1e10, "points": points}] * 3})
    page.update(ddp={k: {"seconds": s} for k, s in (("apart", 2.0), ("ddp", 2.5), ("threads", 3.0))}
                | {"batch_size": 2, "length": 512})  # fmt: skip
    assert page.spread_part({}) == []
    spread = {key: {"seconds": 2.5, "peak_memory_gb": gb} for key, gb in (("ddp", 3.0), ("fsdp", 1.5), ("tp", 1.75))}
    assert page.spread_part(spread)[-3:] == ["| DDP: all weights in each | 2.500 | 3.00 |",
        "| FSDP: half of each weight | 2.500 | 1.50 |", "| TP: half of each layer | 2.500 | 1.75 |"]  # fmt: skip
    job = {"seconds": 4.0, "flops": 1e10, "peak": 1e10, "precision": "bf16", "git_commit": "abc"}
    page.update(operations={"lm": job | {"kinds": {"softmax": [1.0, 5], "matmuls": [2.0, 7], "rest": [1.0, 0]}},
                            "dpo": job | {"kinds": {"copies": [3.0, 9], "rest": [1.0, 0]}}})  # fmt: skip
    text = (tmp_path / page.PAGE).read_text()
    rows = ["| softmax | 1.00 (25%) | 0.00 (0%) |", "| matmuls | 2.00 (50%) | 0.00 (0%) |",
            "| copies | 0.00 (0%) | 3.00 (75%) |", "| rest | 1.00 (25%) | 1.00 (25%) |",
            "| **the step** | **4.00** | **4.00** |", "| its arithmetic at peak | 1.00 | 1.00 |"]  # fmt: skip
    assert "| | lm | dpo |" in text and "\n".join(rows) in text
    assert (
        "| generation, batch 32, 64 + 64 tokens | ours | 1.10 (1.00 to 1.20) | 91 | 1.00 | 5.5% | **3.00 x** |" in text
    )
    of_cpu, of_gpu = text.split("## On a GPU")
    assert "| 5.5% | **3.00 x** |" in of_cpu and "| 0.5% | **3.00 x** |" in of_gpu
    assert "| PPO, LoRA r=16, 4 x 8 x 64 tokens | ours |" in text and "## What was tried" in text
    assert "| two processes, DDP | 2.500 | +25.0% |" in text and "| LM | 2 | 500.00 | 2 | 1.00 | 10.0% |" in text
    for name in ("benchmarks", "benchmarks_scaling"):
        assert (tmp_path / f"report/figures/{name}.png").stat().st_size > 5000


def test_the_committed_page_is_what_its_figures_and_notes_make():
    assert (ROOT / page.PAGE).read_text(encoding="utf-8") == page.write(page.measured())


def test_on_a_gpu_the_page_has_the_mfu(monkeypatch):
    h100 = {"cpu": "x86_64", "cores": 16, "gpu": ["NVIDIA H100 80GB HBM3"], "system": "Linux"}
    monkeypatch.setattr(run, "machine", lambda: h100)
    monkeypatch.setattr(measure, "precision", lambda: "bf16")
    size = run.sizes("generate", settings("--job", "generate"))
    rounds = {"ours": [report([1.0])], "baseline": [report([2.0], memory=2.0)]}
    found = run.figures("generate", size, rounds, 1e11)  # 6e9 FLOP a step
    assert measure.mfu(found, found["ours"]) == pytest.approx(6e9 / 989e12)
    assert measure.mfu(found, found["baseline"]) == pytest.approx(3e9 / 989e12)
    found["data_sheet_flops_per_second"] = 12e9
    header, _, ours, baseline = page.jobs_table({"generate": found})
    assert "| % of peak | MFU | speed | memory |" in header
    assert "| 6.0% | 50.0% | **2.00 x** | **0.50 x** |" in ours and "| 3.0% | 25.0% |  |  |" in baseline
    run.show(found | {"seconds": 1.0})


@pytest.mark.parametrize(
    "gpu, kind, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989), ("NVIDIA H100 PCIe", "bf16", 756), ("NVIDIA H200", "fp16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312), ("NVIDIA L40S", "bf16", 362), ("Tesla T4", "fp16", 65),
        ("NVIDIA H100 PCIe", "fp32", None), ("NVIDIA GeForce GTX 1080", "fp16", None),
    ],
)  # fmt: skip
def test_the_flops_of_a_data_sheet(gpu, kind, tera):
    assert measure.data_sheet_peak([gpu], kind) == (tera and 1e12 * tera)
    assert measure.data_sheet_peak([], kind) is None


def test_progress_counts_runs_and_estimates_the_time_that_is_left():
    progress = Progress({"a": 2, "b": 2, "c": 1}, expected={"a": 10.0, "b": 30.0})  # c: 20, their mean
    assert progress.done("a", 20.0) == "1/5 runs | 0s | eta 3m00s"  # 20, and twice as long as expected: 60, 60, 40
    assert progress.done("b", 40.0) == "2/5 runs | 0s | eta 1m30s"  # 20, 40, and 60 / 40 times 20
    progress.done("a", 40.0)
    assert progress.eta() == 40.0 + 20.0 * (30.0 + 40.0) / 40.0
    progress.done("b", 40.0)
    assert progress.done("c", 1.0) == "5/5 runs | 0s | eta 0s"
    assert Progress({"a": 1, "b": 3}).done("a", 5.0) == "1/4 runs | 0s | eta 15s"  # nothing is expected: all alike


def test_progress_is_printed_after_each_run(in_this_process, tmp_path, capsys):
    run.main(settings("--job", "ppo", "--rounds", "2", "--smoke", "true", "--steps", "1"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  round ")]
    assert len(said) == 2 and said[0].startswith("  round 1/2, ours: ") and " | 1/2 runs | " in said[0]
    assert said[1].endswith(" | eta 0s") and " | 2/2 runs | " in said[1]


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["sft"],
            "job = 'sft' on the command line: must be one of lm, dpo, dpo_lora, reward, grpo, ppo, generate, all",
        ),
        ([], "which job? python benchmarks/run.py JOB, one of lm, dpo,"),
        (["lm", "--rounds", "0"], "rounds = 0 is out of range: must be at least 1"),
        (["lm", "--round", "2"], "unknown key 'round' on the command line. Did you mean 'rounds'?"),
        (["lm"], "the baseline, TRL, is not installed: pip install -r requirements-dev.txt"),
        (["all"], "the baseline, TRL, is not installed: pip install -r requirements-dev.txt"),
        (["all", "--json", "x.json"], "json = 'x.json' has no effect with all"),
        (["lm", "--smoke", "true", "--page", "true"], "smoke = True would write"),
        (["all", "--smoke", "true"], "smoke = True would write figures of a tiny model into report/benchmarks.md"),
    ],
)
def test_mistakes_are_one_message_and_status_2(words, message, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "trl" else real(name, *more))
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "benchmarks" / "run.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"error: {message}") and said.count("\n") == 1

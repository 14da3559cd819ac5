"""Every script as a user runs it, on a tiny model: it ends, writes what it says, and does not repeat a finished run."""

import json
import os
import subprocess
import sys

import pytest
import torch

from configs.config import ROOT, UserError, load_config
from models.loader import load_model, load_tokenizer
from train import (
    amp_savings,
    train_lm,
    train_lm_amp_ckpt,
    train_lm_ddp,
    train_lm_fsdp,
    train_lm_lora,
    train_lm_tp,
    train_lm_wandb,
)

pytestmark = pytest.mark.slow

SMOKE = ["--config", "configs/smoke/train_base.yaml"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SCRIPTS = {
    "train_lm": ["train/train_lm.py"],
    "train_lm_scratch": ["train/train_lm.py", "--config", "configs/smoke/train_scratch.yaml"],
    "train_lm_ddp": [*TORCHRUN, "train/train_lm_ddp.py"],
    "train_lm_fsdp": [*TORCHRUN, "train/train_lm_fsdp.py"],
    "train_lm_tp": [*TORCHRUN, "train/train_lm_tp.py"],
    "train_lm_amp_ckpt": ["train/train_lm_amp_ckpt.py", "--precision", "bf16", "--measure_steps", "0"],
    "train_lm_lora": ["train/train_lm_lora.py", "--merge", "true"],
    "train_lm_wandb": ["train/train_lm_wandb.py", "--wandb_model", "true"],
}


def start(words, **environment):
    config = [] if "--config" in words else SMOKE
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | environment
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words, *config], cwd=ROOT, env=environment, text=True, **pipes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: (folder, process, its output)}; two scripts run at a time."""
    home = tmp_path_factory.mktemp("runs")
    found, names = {}, list(SCRIPTS)
    for pair in zip(names[::2], names[1::2]):
        where = {"HOME": str(home), "WANDB_DATA_DIR": str(home)}
        started = {name: start([*SCRIPTS[name], "--out", str(home / name)], **where) for name in pair}
        for name, process in started.items():
            found[name] = home / name, process, "\n".join(process.communicate(timeout=400))
    return found


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_ends_and_leaves_a_model_and_a_record(runs, name):
    folder, process, output = runs[name]
    assert process.returncode == 0, output
    assert "Traceback" not in output and "Warning" not in output
    assert "sample before training" in output and "sample after training" in output and "next: python" in output
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["result"]["nats_per_token"] < manifest["result"]["nats_per_token_before"]
    kinds = [check["kind"] for check in manifest["admission"]]
    assert sorted(kinds) == ["decoding", "gradients", "samples packed into one row"]
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 2
    model = load_model(folder, device="cpu")
    assert len(load_tokenizer(folder)) == model.config.vocab_size


@pytest.mark.parametrize("module", [train_lm, train_lm_amp_ckpt, train_lm_lora, train_lm_wandb])
def test_a_second_run_says_that_it_is_finished(runs, module, capsys):
    words = SCRIPTS[module.__name__.split(".")[1]][1:]
    config = load_config(module.Config, [*words, *SMOKE, "--out", str(runs[module.__name__.split(".")[1]][0])])
    main = module.main if module is train_lm_lora else module.train
    with pytest.raises(SystemExit) as stop:
        main(config)
    assert stop.value.code == 0 and "finished. --overwrite true runs it again" in capsys.readouterr().out


def test_a_second_run_of_ddp_ends_all_processes(runs):
    process = start([*SCRIPTS["train_lm_ddp"], "--out", str(runs["train_lm_ddp"][0])])
    output, error = process.communicate(timeout=400)
    assert process.returncode == 0, error
    assert output.count("finished. --overwrite true runs it again") == 1


def test_ddp_on_two_processes_reaches_what_one_process_does(runs):
    results = [json.loads((runs[n][0] / "manifest.json").read_text())["result"] for n in ("train_lm", "train_lm_ddp")]
    assert results[0]["nats_per_token"] == pytest.approx(results[1]["nats_per_token"], abs=1e-4)
    assert runs["train_lm_ddp"][2].count("step     6/6 | loss") == 1  # one rank speaks


@pytest.mark.parametrize("name", ["train_lm_fsdp", "train_lm_tp"])
def test_with_its_weights_over_two_processes_a_run_reaches_what_one_process_does(runs, name):
    results = [json.loads((runs[n][0] / "manifest.json").read_text())["result"] for n in ("train_lm", name)]
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    assert "2 processes on cpu (gloo)" in runs[name][2] and runs[name][2].count("step     6/6 | loss") == 1


def test_amp_and_checkpointing_are_measured_each_in_its_own_process(tmp_path, capsys, monkeypatch):
    job = {"name": "tiny-llama", "precision": "bf16", "checkpointing": True, "steps": 1, "shape": [2, 32]}
    gb, seconds = amp_savings._in_subprocess(job)
    assert 0.1 < gb < 2 and 0 < seconds < 60
    shapes, shape = [], {"batch_size": 4, "micro_batch_size": 2, "max_length": 32}

    def in_this_process(job):
        shapes.append(job["shape"])
        return amp_savings.measure(**job)

    monkeypatch.setattr(amp_savings, "_in_subprocess", in_this_process)
    config = train_lm_amp_ckpt.Config(model_name="tiny-llama", **shape, measure_steps=1, out=str(tmp_path))
    measured = amp_savings.compare_memory_and_time(config, None, None, "bf16")["measured"]
    assert list(measured) == ["plain", "CKPT", "AMP bf16", "AMP bf16 + CKPT"]
    assert shapes == [[2, 32]] * 4  # the micro-batches of the run
    assert all(row["peak_memory_gb"] > 0 and row["seconds_a_step"] > 0 for row in measured.values())
    assert "AMP bf16 saves" in capsys.readouterr().out


@pytest.mark.statement("tied-merged")
def test_a_merged_model_has_the_logits_of_the_adapter_and_every_b_matrix_moved(runs):
    folder = runs["train_lm_lora"][0]
    adapter, merged = load_model(folder, device="cpu"), load_model(folder / "merged", device="cpu")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/tiny-llama"
    moved = [p.abs().max() > 0 for n, p in adapter.named_parameters() if "lora_B" in n]
    assert len(moved) == 14 and all(moved)
    ids = torch.arange(20)[None]
    assert (adapter(ids).logits - merged(ids).logits).abs().max() < 1e-5
    base = load_model("tiny-llama", device="cpu")
    assert (adapter(ids).logits - base(ids).logits).abs().max() > 1e-4
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_wandb_runs_offline_without_a_login_and_says_how_to_sync(runs):
    folder, _, output = runs["train_lm_wandb"]
    (run,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {run}" in output
    written = next(run.glob("run-*.wandb")).read_bytes()
    for key in (b"loss", b"grad_norm", b"tok/s", b"nats_per_token", b"samples", b"max_grad_norm"):
        assert key in written


def test_a_user_error_is_one_message_and_exit_status_2(tmp_path):
    process = start(["train/train_lm.py", "--max_length", "4096", "--out", str(tmp_path / "out")])
    output, error = process.communicate(timeout=400)
    assert process.returncode == 2
    assert error.startswith("error: max_length = 4096: tiny-llama reads at most 512 tokens")
    assert "Traceback" not in error + output


def test_a_stage_without_its_data_says_which_command_makes_it(tmp_path):
    data, out = "data/no/preferences.jsonl", str(tmp_path / "out")
    config = train_lm_lora.Config(model_name="tiny-llama", data=data, out=out)
    with pytest.raises(UserError, match="python data/generate_preferences.py"):
        train_lm_lora.main(config)


@pytest.mark.parametrize("words", [["--model_name", "scratch"], ["--lora_r", "0"], ["--precision", "fp16"]])
def test_lora_refuses_what_it_cannot_do(words):
    with pytest.raises(UserError):
        load_config(train_lm_lora.Config, [*SMOKE, *words])


def test_every_yaml_of_this_stage_loads():
    for path in ("train_base", "train_scratch", "smoke/train_base", "smoke/train_scratch", "gpu/train_base"):
        for module in (train_lm, train_lm_ddp, train_lm_fsdp, train_lm_tp, train_lm_amp_ckpt, train_lm_wandb):
            load_config(module.Config, ["--config", f"configs/{path}.yaml"])
    for path in ("train_base", "sft", "smoke/train_base", "smoke/sft", "gpu/train_base"):
        load_config(train_lm_lora.Config, ["--config", f"configs/{path}.yaml"])

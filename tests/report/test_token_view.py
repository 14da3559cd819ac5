"""The page of the token view: what lies in it, and what it does in a browser."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from configs.config import ROOT, UserError, load_config, shown
from models.loader import load_tokenizer
from models.tokens import token_texts
from report.token_view import QUANTITIES, SCORES, Config, main, page, page_data, visible
from runtime.files import as_lines

EVIL = '</script><img src=x onerror="document.title=1">'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def tokens(*texts, special=()):
    return {"ids": [100 + i for i in range(len(texts))], "texts": list(texts), "special": list(special),
            "length": len(texts)}  # fmt: skip


def completion(name, texts, reward, **numbers):
    numbers = {"mask": [1] * len(texts), **numbers}
    return {**tokens(*texts, special=[len(texts) - 1]), "name": name, "numbers": numbers, "scores": {"reward": reward},
            "finish_reason": "stop"}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of two steps and two passes; two completions of one prompt."""
    groups = []
    for step in (1, 5):
        for epoch in (1, 2):
            first = completion(
                "completion 1", [EVIL, " two", "\n", {"bytes": "20e298"}, {"bytes": "83"}, "<|end|>"], 1.0,
                logprob=[-0.5, -1.0, -2.0, -4.0, -0.25, -0.125], ref_logprob=[-0.5, -2.0, -1.0, -4.0, -0.25, -0.125],
                ratio=[1.0, 1.0, 1.0, 1.0, 1.0, 1.0] if epoch == 1 else [1.0, 1.5, 0.5, 1.0, 1.25, 1.0],
                clipped=[0, int(epoch == 2), 0, 0, 0, 0],
            )  # fmt: skip
            second = completion(
                "completion 4", ["no", "<|end|>"], 0.0,
                logprob=[-3.0, -0.1 * step], ref_logprob=[-3.0, -0.1], ratio=[1.0, 1.0], clipped=[0, 0],
            )  # fmt: skip
            group = {"step": step, "inner_epoch": epoch, "group_size": 8}
            group["prompt"] = tokens("<|user|>", "How", "?", special=[0])
            groups.append({**group, "sequences": [first, second]})
    (tmp_path / "config.yaml").write_text("model_name: tiny\nseed: 3\n")
    (tmp_path / "tokens.jsonl").write_text(as_lines(groups))
    return tmp_path


def build(folder, *words):
    main(load_config(Config, [str(folder), *map(str, words)]))
    return folder / "tokens.html"


class Elements(HTMLParser):
    """The elements of a page as a browser's parser finds them, and the text of its data."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.data, self.inside = [], [], "", False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.inside = ("id", "data") in attributes

    def handle_data(self, data):
        self.data += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


@pytest.mark.statement("token-view")
def test_no_text_of_a_token_ends_the_data_or_becomes_markup(folder):
    found = Elements()
    found.feed(build(folder).read_text())
    assert "img" not in found.tags and found.tags.count("script") == 2
    texts = json.loads(found.data)["groups"][0]["sequences"][0]["texts"]
    assert "".join(part for part, _ in texts[0]) == EVIL.replace(" ", "·")
    odd = page({**page_data([], "<b>&", ""), "extra": "\u2028<!--"})
    assert "<title>&lt;b&gt;&amp;</title>" in odd and "<!--" not in odd and "\u2028" not in odd


@pytest.mark.statement("token-view")
def test_the_page_needs_no_network(folder):
    found = Elements()
    text = build(folder).read_text()
    found.feed(text)
    links = [value for name, value in found.attributes if name in ("src", "href", "action", "srcset")]
    assert links == ["data:,"] and not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in dict(found.attributes).values() or "default-src 'none'" in text


@pytest.mark.statement("token-view")
@pytest.mark.parametrize(
    "text, expected",
    [
        (" the", [["·", True], ["the", False]]),
        ("a\n\t b", [["a", False], ["↵→·", True], ["b", False]]),
        ("\u200b\u202ex", [["⟨U+200B⟩⟨U+202E⟩", True], ["x", False]]),
        ("\u00a0\x00", [["⟨U+00A0⟩⟨U+0000⟩", True]]),
        ({"bytes": "20e2980a"}, [["·⟨e2⟩⟨98⟩↵", True]]),
        ({"bytes": "61e2"}, [["a", False], ["⟨e2⟩", True]]),
        ("", [["⟨empty⟩", True]]),
        ("🙂é", [["🙂é", False]]),
    ],
)
def test_nothing_of_a_token_is_invisible(text, expected):
    assert visible(text) == expected


@pytest.mark.statement("token-view")
@pytest.mark.parametrize("name", ["tiny-llama", "smollm2-135m"])
def test_token_texts_join_to_the_text_byte_by_byte(name):
    tokenizer = load_tokenizer(name)
    text = "  Hi,  you\n\n\tand ☃🙂 naïve \ufffd</script> <|im_end|>x"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = token_texts(tokenizer, ids)
    assert any(isinstance(part, dict) for part in found) and "<|im_end|>" in found and len(found) == len(ids)
    assert b"".join(bytes.fromhex(x["bytes"]) if isinstance(x, dict) else x.encode() for x in found) == text.encode()


def test_token_texts_of_a_tokenizer_with_bytes_as_a_fallback():
    """As Llama 2's: a space is part of a token's name and gone at the beginning of a text; bytes are <0xE2>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "▁a", "▁to", "a", *(f"<0x{byte:02X}>" for byte in range(256))]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    ids = [tokenizer.convert_tokens_to_ids(x) for x in ("▁to", "<0xE2>", "<0x98>", "<0x41>", "</s>")]
    assert tokenizer.decode(ids[:1]) == "to"
    assert token_texts(tokenizer, ids) == [" to", {"bytes": "e2"}, {"bytes": "98"}, "A", "</s>"]


@pytest.mark.statement("token-view")
def test_what_follows_from_the_kept_numbers(folder):
    groups = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    data = page_data(groups, "t", "s")
    keys = [quantity["key"] for quantity in data["quantities"]]
    assert keys[0] == "change" and set(keys) == {"change", "logprob", "ratio", "clipped", "ref_logprob", "mask"}
    assert data["groups"][0]["sequences"][0]["numbers"]["change"] == [0, 1.0, -1.0, 0, 0, 0]
    row = {"step": 1, "sequences": [{**tokens("a", "b"), "name": "block 0", "scores": {"loss": 2.0}, "first": [0],
           "numbers": {"mask": [0, 1], "logprob": [None, -2.0], "rank": [None, 4]}}]}  # fmt: skip
    [found] = page_data([row], "t", "s")["groups"]
    assert found["sequences"][0]["numbers"]["loss"] == [None, 2.0] and found["prompt"] is None


def test_the_page_of_formats_has_every_key(folder):
    text = (ROOT / "docs/data-formats.md").read_text().split("### tokens.jsonl")[1].split("\n### ")[0]
    kept = {quantity.key for quantity in QUANTITIES} - {"change", "loss"}
    assert not [key for key in kept | SCORES.keys() if f"`{key}`" not in text]
    example = json.loads(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    assert page_data([example], "t", "s")["groups"][0]["sequences"][0]["name"] == "completion 3"


def test_bad_runs_are_told_what_to_do(folder, tmp_path):
    with pytest.raises(UserError, match="give the folder of one run"):
        load_config(Config, [])
    with pytest.raises(UserError, match="nowhere is not the folder of a run"):
        build(tmp_path / "nowhere")
    (folder / "tokens.jsonl").unlink()
    with pytest.raises(UserError, match="kept no tokens: train with --keep_tokens 4"):
        build(folder)


# In a browser

# the relative luminance of a colour, WCAG 2.1
LUMINANCE = """(colour => {
  const linear = x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  const [r, g, b] = colour.match(/[0-9]+/g).map(x => linear(x / 255));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
})"""


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    if not CHROMIUM:
        pytest.skip("no Chromium or Chrome on this machine")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture
def opened(browser, folder):
    """A function (width, scheme, hash) -> the page, opened as a file, without a network. It must raise no error."""
    pages, errors = [], []

    def open_page(width=1280, scheme="light", hash=""):
        tab = browser.new_context(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True, has_touch=width < 600
        ).new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text))
        tab.goto(build(folder).as_uri() + hash)
        pages.append(tab)
        return tab

    yield open_page
    for tab in pages:
        tab.context.close()
    assert errors == []


def rows(tab):
    cells = tab.locator("#panel td").all_inner_texts()
    return dict(zip(cells[0::2], cells[1::2]))


def background(token):
    return token.evaluate("e => getComputedStyle(e).backgroundColor")


@pytest.mark.slow
@pytest.mark.statement("token-view")
def test_pointing_at_a_token_shows_its_numbers(opened, folder):
    tab = opened()
    assert tab.title() == f"Tokens of {shown(folder)}"
    assert "Point at a token" in tab.locator("#panel").inner_text()
    cards = tab.locator("article.card")
    assert cards.count() == 2 and cards.nth(0).bounding_box()["y"] == cards.nth(1).bounding_box()["y"]
    assert "reward 1" in cards.nth(0).inner_text() and "4" in cards.nth(1).locator("h3").inner_text()
    assert "2 of the 8 completions" in tab.locator(".group .chips").first.inner_text()
    listed = cards.nth(0).locator(".t")
    assert listed.all_inner_texts() == [EVIL.replace(" ", "·"), "·two", "↵", "·⟨e2⟩⟨98⟩", "⟨83⟩", "<|end|>"]
    listed.nth(1).hover()
    found = rows(tab)
    assert found["policy − reference"] == "1 nats" and found["log-prob, policy"] == "−1 nats"
    assert found["probability, policy"] == "0.368" and found["clipped"] == "no" and found["counted"] == "yes"
    assert "id 101; token 2 of 6, completion 1" in tab.locator("#panel").inner_text()
    listed.nth(2).hover()
    assert rows(tab)["policy − reference"] == "−1 nats" and "a line break" in tab.locator("#panel").inner_text()
    tab.locator("h1").hover()
    assert "Point at a token" in tab.locator("#panel").inner_text()
    listed.nth(5).click()
    tab.locator("h1").hover()
    assert "id 105" in tab.locator("#panel").inner_text()  # what was clicked stays


@pytest.mark.slow
@pytest.mark.statement("token-view")
def test_the_keyboard_goes_from_token_to_token(opened):
    tab = opened()
    active = "document.activeElement.getAttribute('aria-label')"
    prompt, first, second = (tab.get_by_role("listbox").nth(i) for i in range(3))
    assert [box.get_attribute("aria-label") for box in (prompt, first, second)] == [
        "prompt 1",
        "completion 1",
        "completion 4",
    ]
    tab.locator("#theme").focus()
    tab.keyboard.press("Tab")
    assert tab.evaluate(active) == "<|user|>"
    tab.keyboard.press("Tab")  # one stop for each list
    assert tab.evaluate(active).startswith("</script>")
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate(active) == "·two, policy − reference 1 nats" and rows(tab)["log-prob, policy"] == "−1 nats"
    assert first.locator("[aria-selected=true]").count() == 1
    tab.keyboard.press("End")
    assert "id 105" in tab.locator("#panel").inner_text()
    tab.keyboard.press("ArrowRight")
    assert "completion 4" in tab.locator("#panel").inner_text()
    tab.keyboard.press("ArrowLeft")
    tab.keyboard.press("Home")
    assert "id 100; token 1 of 6" in tab.locator("#panel").inner_text()
    tab.keyboard.press("ArrowUp")
    assert "prompt 1" in tab.locator("#panel").inner_text()
    tab.keyboard.press("ArrowDown")
    assert "completion 1" in tab.locator("#panel").inner_text()
    assert tab.locator("#panel").get_attribute("aria-live") == "polite"


@pytest.mark.slow
@pytest.mark.statement("token-view")
def test_colours_follow_the_chosen_number_and_the_legend_says_what_they_mean(opened):
    tab = opened()
    listed = tab.locator("article.card").nth(0).locator(".t")
    assert tab.locator("#by option").all_inner_texts()[:2] == ["policy − reference", "log-prob, policy"]
    # +1, -1 and 0 nats: the ends and the middle of the diverging scale
    assert [background(listed.nth(i)) for i in (1, 2, 0)] == [
        "rgb(182, 90, 10)",
        "rgb(31, 95, 168)",
        "rgb(244, 244, 242)",
    ]
    ticks = tab.locator("#ticks span").all_inner_texts()
    assert ticks == ["−1", "−0.500", "0", "0.500", "1 nats"]
    tab.locator("#by").select_option("logprob")
    assert tab.locator("#ticks span").all_inner_texts() == ["0", "−1", "−2", "−3", "−4 nats"]
    shades = [background(listed.nth(i)) for i in range(6)]
    assert shades[3] == "rgb(11, 47, 94)" and len(set(shades)) == 6
    assert "0 is certain" in tab.locator("#meaning").inner_text()
    tab.locator("#by").select_option("ratio")
    assert listed.nth(1).get_attribute("aria-label") == "·two, ratio 1"
    assert tab.locator("#ticks span").all_inner_texts() == ["0.500", "0.750", "1", "1.250", "1.500"]
    tab.locator("#epoch").select_option("2")
    listed.nth(1).hover()
    assert rows(tab)["ratio"] == "1.500" and rows(tab)["clipped"] == "yes"
    assert "double" in listed.nth(1).evaluate("e => getComputedStyle(e).textDecoration")
    tab.locator("#step").select_option("1")
    tab.locator("#by").select_option("clipped")
    assert "yes" in tab.locator("#legend").inner_text()


@pytest.mark.slow
@pytest.mark.statement("token-view")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_theme_and_the_toggle_and_text_stays_readable(opened, scheme):
    tab = opened(scheme=scheme)
    body = "getComputedStyle(document.body).backgroundColor"

    def is_dark():
        return tab.evaluate(f"{LUMINANCE}({body})") < 0.1

    assert is_dark() == (scheme == "dark")
    for _ in range(2):
        for by in tab.locator("#by option").evaluate_all("all => all.map(option => option.value)"):
            tab.locator("#by").select_option(by)
            styles = f"e => {{ const s = getComputedStyle(e); return [s.backgroundColor, s.color].map({LUMINANCE}); }}"
            pairs = tab.locator("article .t").evaluate_all(f"all => all.map({styles})")
            assert all((max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5 for pair in pairs), by  # WCAG 2.1, level AA
        before = is_dark()
        tab.locator("#theme").click()
        assert is_dark() != before


@pytest.mark.slow
@pytest.mark.statement("token-view")
def test_on_a_phone_nothing_is_wider_than_the_page(opened):
    tab = opened(width=390, hash="#step=1&epoch=2&by=ratio")
    assert tab.locator("#step").input_value() == "1" and tab.locator("#by").input_value() == "ratio"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    cards = tab.locator("article.card")
    assert cards.nth(0).bounding_box()["y"] < cards.nth(1).bounding_box()["y"]
    cards.nth(0).locator(".t").nth(1).tap()
    panel = tab.locator("#panel").bounding_box()
    assert cards.nth(0).locator(".t").nth(1).bounding_box()["y"] < panel["y"]
    assert rows(tab)["ratio"] == "1.500" and panel["y"] + panel["height"] == 800 and panel["width"] == 390

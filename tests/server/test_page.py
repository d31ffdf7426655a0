"""Holds the page to its promises, in a real browser before a real server, and as text."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_lightning.data.tokenizer import load_tokenizer, train_bpe
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.server.page import page
from tests.report.pages import Page
from tests.server.browser import Site, Tab, chromium, serving, until
from tests.server.reciting import write_checkpoint, write_reciting

in_a_browser = [pytest.mark.slow, pytest.mark.xdist_group("page")]
HOSTILE = "<script>hit=1</script><img src=x onerror=hit=2>\" onfocus='hit=3' {{ hit }} &lt;b&gt;\n我在\t年青😀"
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
KEY = "a-key-of-forty-letters-that-nobody-knows"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Serves a model that writes everything, and one that writes what should act on no page."""
    folder = tmp_path_factory.mktemp("site")
    tokenizer = train_bpe(["从前有一个国王。👍🏽 naïve The cat sees the dog.\n"] * 4, 330)
    torch.manual_seed(0)
    sizes = dict(max_position_embeddings=32, n_layers=2, n_heads=2, d_model=16)
    model = GPTModel(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    write_checkpoint(folder / "writing" / "last.ckpt", model, tokenizer)
    hostile = load_tokenizer("bytes")
    hostile.chat = {"template": TEMPLATE, "tokens": {}}
    write_reciting(folder / "hostile" / "last.ckpt", HOSTILE, hostile)
    paths = [f"--ckpt_path={folder / name / 'last.ckpt'}" for name in ("writing", "hostile")]
    with serving(folder, *paths, "--generation.max_new_tokens", "24") as opened:
        yield opened


@pytest.fixture(scope="module")
def chrome() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(chrome: Any, site: Site) -> Tab:
    return Tab(chrome, site)


class TestInABrowser:
    pytestmark = in_a_browser

    def test_the_streamed_text_is_that_of_the_answer_in_one_piece(self, tab: Tab) -> None:
        for seed in (1, 2):
            tab.set("seed", str(seed))
            tab.write("从前 the cat")
            expected = tab.site.write(model="writing", prompt="从前 the cat", seed=seed)
            assert tab.texts() == [expected] and expected

    def test_tokens_have_the_colours_and_names_of_their_probabilities(self, tab: Tab) -> None:
        tab.open_settings()
        tab["#echo-0"].click()
        tab.write("The cat")
        answer = tab.site.ask(model="writing", prompt="The cat", seed=1, logprobs=5, echo=True)
        logprobs = answer["choices"][0]["logprobs"]
        spans = tab.run(
            "return [...document.querySelectorAll('.tokens > span')].map((span) =>"
            " [Number(span.style.getPropertyValue('--bits')), span.className.includes('prompt')])"
        )
        bits = [-(logprob or 0) / math.log(2) for logprob in logprobs["token_logprobs"]]
        assert [found for found, _ in spans] == pytest.approx(bits, abs=0.0051)
        assert sum(given for _, given in spans) == answer["usage"]["prompt_tokens"]
        n = len(spans) - 3
        tab.run(f"document.querySelectorAll('.tokens > span')[{n}].focus()")
        told = [row.text for row in tab.all("#tip.shown i")]
        likeliest = sorted(logprobs["top_logprobs"][n].values(), reverse=True)
        shares = [float(re.search(r"([\d.]+) %", row)[1]) for row in told]  # type: ignore[index]
        assert shares == pytest.approx([100 * math.exp(value) for value in likeliest], rel=0.01)
        assert len(shares) >= 5

    def test_tokens_keep_their_text_beside_characters_of_several_tokens(self, tab: Tab) -> None:
        """Also where one chunk brings them all, as that of an echo."""
        prompt = "我们 the 国王。cat 在 sees"
        tab.open_settings()
        tab["#echo-0"].click()
        tab.write(prompt)
        answer = tab.site.ask(model="writing", prompt=prompt, seed=1, logprobs=5, echo=True, max_tokens=0)
        tokens = answer["choices"][0]["logprobs"]["tokens"]
        spans = tab.run("return [...document.querySelectorAll('.prompt')].map((each) => each.textContent)")
        assert "".join(spans) == prompt
        plain = [(token, span) for token, span in zip(tokens, spans, strict=True) if token[:6] != "bytes:"]
        assert 0 < len(plain) < len(tokens) and all(token == span for token, span in plain)

    def test_a_token_tells_of_itself_to_a_mouse_a_finger_and_keys(self, tab: Tab) -> None:
        from selenium.webdriver import ActionChains

        tab.write("The dog")
        ActionChains(tab.chrome).move_to_element(tab.all(".tokens > span")[3]).perform()
        by_mouse = tab["#tip"].text
        ActionChains(tab.chrome).move_to_element(tab["h1"]).perform()
        assert by_mouse and not tab.all("#tip.shown")
        tab.all(".tokens > span")[3].click()  # as a tap is
        ActionChains(tab.chrome).move_to_element(tab["h1"]).perform()
        assert tab["#tip"].text == by_mouse
        tab.run("document.querySelector('.tokens > span').focus()")
        for _ in range(3):
            tab.press("ARROW_RIGHT")
        assert tab["#tip"].text == by_mouse
        assert tab.run("return document.activeElement.getAttribute('aria-describedby')") == "tip"
        tab.press("ESCAPE")
        assert not tab.all("#tip.shown")
        assert len(tab.all(".tokens > [tabindex='0']")) == 1  # for the tab key the text is one stop

    def test_again_takes_the_next_seed(self, tab: Tab) -> None:
        tab.write("The cat")
        first = tab.texts()
        tab["#again"].click()
        tab.wait()
        assert tab.texts() == [tab.site.write(model="writing", prompt="The cat", seed=2)] != first
        assert "seed 2" in tab["summary"].text

    def test_escape_stops_and_frees_the_row(self, tab: Tab) -> None:
        tab.set("model", "hostile")
        tab.set("temperature", "0")
        tab.set("max_tokens", "4000")
        tab["#prompt"].send_keys("The")
        tab.press("CONTROL", "ENTER")
        until(lambda: len(tab.all(".tokens > span")) > 5)
        tab.press("ESCAPE")
        tab.wait()
        rows = re.compile(r"^gpt_lightning_\w*rows\w* ([\d.]+)$", re.MULTILINE)
        until(lambda: [float(count) for count in rows.findall(tab.site.figures())][0] == 0)
        n = len(tab.all(".tokens > span"))
        assert n < 4000 and "stopped" in tab[".told"].text
        tab.set("max_tokens", "5")
        tab.write("The")
        assert len(tab.all(".tokens > span")) == 5

    def test_a_chat_goes_on_where_it_stands(self, tab: Tab) -> None:
        tab["#layout [value=chat]"].find_element("xpath", "..").click()
        tab.set("model", "hostile")
        tab.set("system", "Be kind.")
        tab.set("temperature", "0")
        messages = [{"role": "system", "content": "Be kind."}]
        for said in ("Who are you?", "我在年青时候"):
            tab["#prompt"].send_keys(said)
            tab.press("SHIFT", "ENTER")
            assert tab["#prompt"].get_property("value") == said + "\n" and tab["#write"].is_enabled()
            tab.press("BACKSPACE")
            tab.press("ENTER")
            tab.wait()
            messages.append({"role": "user", "content": said})
            answer = tab.site.ask("chat/completions", model="hostile", messages=messages, temperature=0)
            messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"]})
        turns = tab.run(
            "return [...document.querySelectorAll('.turn')].flatMap((turn) =>"
            " [turn.querySelector('.said').textContent, turn.querySelector('.tokens').textContent])"
        )
        assert turns == [message["content"] for message in messages[1:]]
        tab["#again"].click()
        tab.wait()
        assert len(tab.all(".turn")) == 2 and tab.all("#tip") and tab["#prompt"].get_property("value") == ""
        tab["#fresh"].click()
        assert tab.all(".turn") == []
        tab["#open-history"].click()
        assert len(tab.all("#entries li")) == 1  # the whole conversation
        tab["#entries .open"].click()
        assert len(tab.all(".turn")) == 2

    def test_two_models_stand_side_by_side(self, tab: Tab) -> None:
        tab["#compare"].click()
        tab.set("temperature", "0", column=1)
        tab.write("The cat")
        expected = [
            tab.site.write(model="writing", prompt="The cat", seed=1),
            tab.site.write(model="hostile", prompt="The cat", temperature=0),
        ]
        assert tab.texts() == expected
        left, right = [column.rect for column in tab.all(".column")]
        assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
        tab["#compare"].click()
        assert tab.texts() == expected[:1]

    def test_no_text_of_a_prompt_or_a_model_acts(self, tab: Tab) -> None:
        n_scripts = len(tab.all("script"))
        tab.set("model", "hostile")
        tab.set("temperature", "0")
        tab.set("max_tokens", str(2 * len(HOSTILE.encode())))
        tab.run("document.querySelector('#prompt').value = arguments[0]", HOSTILE)
        tab["#write"].click()
        tab.wait()
        assert tab.texts()[0] == tab.site.write(
            model="hostile", prompt=HOSTILE, temperature=0, max_tokens=2 * len(HOSTILE.encode())
        )
        assert HOSTILE in tab.texts()[0] and tab[".said"].get_property("textContent") == HOSTILE
        for span in tab.all(".tokens > span")[:60:4]:
            tab.run("arguments[0].focus()", span)
        tab["#open-history"].click()
        assert tab["#entries .what"].get_property("textContent") == HOSTILE
        tab["#entries .open"].click()
        assert HOSTILE in tab.texts()[0]
        assert tab.run("return typeof hit") == "undefined" and not tab.all("img")
        assert len(tab.all("script")) == n_scripts

    def test_an_input_method_keeps_its_enter_key(self, tab: Tab) -> None:
        tab["#prompt"].click()
        compose = tab.chrome.execute_cdp_cmd
        compose("Input.imeSetComposition", {"text": "wozai", "selectionStart": 5, "selectionEnd": 5})
        tab.requests()
        for modifiers in (0, 2):  # Enter, and with Ctrl
            enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": modifiers}
            compose("Input.dispatchKeyEvent", {"type": "rawKeyDown", **enter})
            compose("Input.dispatchKeyEvent", {"type": "keyUp", **enter})
        assert not tab["#again"].is_enabled() and tab.requests() == [] and tab.all(".turn") == []
        compose("Input.insertText", {"text": "我在"})
        tab.press("CONTROL", "ENTER")
        tab.wait()
        assert tab["#prompt"].get_property("value") == tab[".said"].text == "我在"
        assert tab.texts() == [tab.site.write(model="writing", prompt="我在", seed=1)]

    def test_nothing_is_asked_of_anyone_else(self, tab: Tab) -> None:
        tab.requests()
        tab.reload()
        tab["#compare"].click()
        tab.write("The cat")
        tab["#open-history"].click()
        asked = tab.requests()
        paths = {address.removeprefix(tab.site.url) for address in asked}
        assert paths == {"/", "/v1/models", "/v1/completions"}
        said = [entry["message"] for entry in tab.chrome.get_log("browser")]
        assert [message for message in said if "Content Security" in message] == []

    def test_a_narrow_screen_needs_no_scrolling_sideways(self, tab: Tab) -> None:
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        tab.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

        def widest() -> float:
            return tab.run(
                "return Math.max(document.documentElement.scrollWidth,"
                " ...[...document.querySelectorAll('body *:not(.unseen):not(svg *)')]"
                ".map((each) => each.getBoundingClientRect().right))"
            )

        assert widest() <= 400
        tab["#compare"].click()
        tab.set("temperature", "1")
        tab.write("Donaudampfschifffahrtsgesellschaft" * 10)
        assert widest() <= 400
        tab.run("document.querySelectorAll('.tokens > span')[4].focus()")
        assert tab["#tip"].is_displayed() and widest() <= 400
        tab["#open-history"].click()
        assert widest() <= 400

    def test_the_history_outlives_a_reload_and_has_bounds(self, tab: Tab) -> None:
        tab.set("temperature", "1.5")
        tab.write("The first one")
        expected = tab.texts()
        tab.reload()
        assert tab.texts() == [""]
        tab["#open-history"].click()
        tab["#entries .open"].click()
        assert tab.texts() == expected and tab["#prompt"].get_property("value") == "The first one"
        assert tab["#temperature-0"].get_property("value") == "1.5" and tab.all(".tokens > span[style]")
        tab.run(
            "const [one] = JSON.parse(localStorage['gpt_lightning.history']);"
            "const large = structuredClone(one.columns);"
            "large[0].turns[0].tokens ="
            " Array(1000).fill({text: 'x'.repeat(40), name: '', logprob: 0, others: []});"
            "const entry = (_, n) => ({...one, id: `old${n}`, columns: n < 20 ? one.columns : large});"
            "localStorage['gpt_lightning.history'] = JSON.stringify(Array.from({length: 60}, entry))"
        )
        tab.reload()
        tab.write("The newest")
        kept = tab.run("return localStorage['gpt_lightning.history']")
        assert 20 < kept.count('"id"') < 50 and len(kept) < 2_100_000
        tab["#open-history"].click()
        assert tab["#entries .what"].text == "The newest"
        tab["#entries .drop"].click()
        assert tab["#entries .what"].text == "The first one"
        tab["#clear"].click()
        tab.chrome.switch_to.alert.accept()
        assert tab.all("#entries li") == []
        assert tab.run("return localStorage['gpt_lightning.history']") == "[]"

    def test_a_broken_history_is_let_go(self, tab: Tab) -> None:
        for broken in ("{", "3", '[{"id": 1}]', "[null]"):
            tab.run("localStorage['gpt_lightning.history'] = arguments[0]", broken)
            tab.reload()
            tab["#open-history"].click()
            assert tab.all("#entries li") == []

    def test_a_fault_stands_at_the_field_it_is_about(self, tab: Tab) -> None:
        tab.write("The cat")
        before = tab.texts()
        for name, value in (("top_p", "3"), ("max_tokens", "0"), ("temperature", "-1")):
            tab.set(name, value)
            tab["#write"].click()
            until(lambda: tab[f"#{name}-0-fault"].text)
            assert tab[f"#{name}-0"].get_attribute("aria-invalid") == "true"
            assert tab[f"#{name}-0"].get_attribute("aria-describedby") == f"{name}-0-fault"
            assert tab.texts() == before  # what was there is not lost
            tab[f"#{name}-0"].clear()
            tab.set(name, "1")
            assert tab[f"#{name}-0"].get_attribute("aria-invalid") is None
        tab.write("The cat")
        assert not [each.text for each in tab.all(".fault") if each.text]

    def test_everything_has_a_name_for_a_screen_reader(self, tab: Tab) -> None:
        tab["#compare"].click()
        tab.set("temperature", "1")
        tab.write("The cat")
        tab["#open-history"].click()
        tab["#close-history"].click()
        nodes = tab.chrome.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        of_use = {"textbox", "spinbutton", "button", "checkbox", "radio", "combobox", "group", "region"}
        roles = [node for node in nodes if not node["ignored"] and node["role"]["value"] in of_use]
        nameless = [node["role"]["value"] for node in roles if not node.get("name", {}).get("value")]
        assert nameless == [] and len(roles) > 30
        spoken = tab.run("return document.querySelector('[aria-live=polite]').textContent")
        assert spoken == tab.texts()[0]

    def test_it_is_dark_where_the_system_is(self, tab: Tab) -> None:
        shades = []
        for scheme in ("light", "dark"):
            features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            tab.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
            shades.append(tab.run("return getComputedStyle(document.body).backgroundColor"))
        tab.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        assert shades == ["rgb(255, 255, 255)", "rgb(24, 24, 27)"]

    def test_a_key_is_asked_for_and_a_lost_server_is_told_of(self, chrome: Any, tmp_path: Path) -> None:
        write_reciting(tmp_path / "run" / "last.ckpt", "On and on. ", load_tokenizer("bytes"))
        (tmp_path / "keys").write_text(KEY)
        words = [f"--ckpt_path={tmp_path / 'run' / 'last.ckpt'}", f"--api_key_file={tmp_path / 'keys'}"]
        with serving(tmp_path, *words) as guarded:
            chrome.get(guarded.url)
            (field,) = until(lambda: chrome.find_elements("css selector", "#key[open] #key-field"))
            field.send_keys("not-the-key\n")
            until(lambda: "not taken" in chrome.find_element("css selector", "#key-about").text)
            field.send_keys(KEY + "\n")
            tab = Tab(chrome, guarded)  # which loads the page again: the tab has kept the key
            tab.set("max_tokens", "4000")
            tab.set("temperature", "0")
            tab["#prompt"].send_keys("x")
            tab["#write"].click()
            until(lambda: len(tab.all(".tokens > span")) > 5)
            guarded.process.kill()
            until(lambda: "connection to the server is lost" in tab[".column > .fault"].text)
            assert len(tab.all(".tokens > span")) > 5 and "broken off" in tab[".told"].text
            tab["#again"].click()
            until(lambda: "connection to the server is lost" in tab[".column > .fault"].text)
            assert KEY not in chrome.page_source + tab.run("return JSON.stringify(localStorage)")


@pytest.fixture(scope="module")
def html() -> str:
    return page()[0]


def test_the_page_names_no_other_address(html: str) -> None:
    assert set(re.findall(r"\w+://[^'\"\s]*", html)) == {"http://www.w3.org/2000/svg"}
    assert len(html.encode()) < 60_000


def test_no_text_can_become_an_element(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    parsed = Page(tmp_path / "page.html")
    assert parsed.handlers() == [] and len(parsed.scripts) == 1
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc"
    assert re.findall(ways, html) == []
    assert [attributes for _, attributes in parsed.elements if "style" in attributes] == []
    assert [address for address in parsed.fetches() if not address.startswith("data:")] == []


def test_each_field_has_a_label(html: str, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    wrapped = "".join(re.findall(r"<label>?.*?</label>", html, re.DOTALL))
    elements = Page(tmp_path / "page.html").elements
    fields = [attributes for tag, attributes in elements if tag in ("input", "textarea", "select")]
    for attributes in fields:
        named = f'for="{attributes.get("id")}"' in html or f'name="{attributes["name"]}"' in wrapped
        assert named, attributes
    assert len(fields) > 12


def test_what_the_script_looks_for_is_there(html: str) -> None:
    found = re.findall(r"(?:byId|getElementById|cloned)\(\"([\w-]+)\"\)", html)
    assert found and [name for name in found if f'id="{name}"' not in html] == []


def test_the_policy_lets_only_these_scripts_run(html: str) -> None:
    from base64 import b64encode
    from hashlib import sha256

    policy = dict(rule.split(" ", 1) for rule in page()[1].split("; "))
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        digest = b64encode(sha256(text.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'"

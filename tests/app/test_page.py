"""The chat page in a real browser, with a small model and another server that says what it is told.

Everything is done as a user does it; what a page shows is read from what a user sees.
"""

import json
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx2
import pytest
from serving import TOKENIZER, live

from minillama.app.conversations import router
from minillama.app.endpoints import Endpoint
from minillama.app.server import PAGE
from minillama.app.store import Store
from minillama.chat import Message, encode_dialog

pytestmark = pytest.mark.slow
WIDE, PHONE = (1200, 800), (360, 740)
ALT, ENTER, ESCAPE, SHIFT, TAB, UP = "\ue00a", "\ue007", "\ue00c", "\ue008", "\ue004", "\ue013"
CONTROL = "\ue009"
PATIENCE = 30.0  # seconds; a busy machine is no reason to fail
ATTACK = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
MARKDOWN = "# Head\n1. **one**\n2. `two`\n\n* three\n\n```py\nx = 1 < 2\n```\nsaid *so*\n5 * 3 * 2"


RICH = """\
**bold *nested* bold** ***both*** _under_ ~~gone~~ snake_case_name 2 * 3 * 4 \\*raw\\*
[a link](https://example.org/a_(b)) and https://example.com/c_d. Not [this](javascript:alert(1)).

1. first
   - nested
     - deeper
   ```py
   if x:
       y = "**no**"
   ```
2. second
   goes on

3. [x] third

> quoted
> - in a list

---

| Name | Value |
|------|------:|
| `a`  | **1** |
| b \\| c |

مرحبا hello.

This is English.
"""


class Script(BaseHTTPRequestHandler):
    """A server of the same protocol: the question says how it is answered."""

    protocol_version = "HTTP/1.0"
    seen: list[dict[str, Any]]  # the bodies of all questions
    gone: list[str]  # questions whose client left before the end

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._head(200, "application/json")
        self._say(json.dumps({"object": "list", "data": [{"id": "echo", "object": "model"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        question = body["messages"][-1]["content"]
        if (
            question == "fail"
            and sum(b["messages"][-1]["content"] == "fail" for b in self.seen) < 2
        ):
            self._head(500, "application/json")
            self._say(json.dumps({"error": {"message": "out of order", "code": "x"}}))
            return
        if question == "late failure":
            time.sleep(0.7)
            self._head(500, "application/json")
            self._say(json.dumps({"error": {"message": "out of order", "code": "x"}}))
            return
        answers = {
            "attack": ATTACK,
            "markdown": MARKDOWN,
            "rich": RICH,
            "slow": "word " * 2000,
            "brief": "word " * 60,  # more than a second
            "long": ("x" * 2000 + " ") * 50 + "word " * 2000,
            "silent": "",
        }
        answer = answers.get(question, f"{len(self.seen)}: {question}")
        self._head(200, "text/event-stream")
        try:
            for piece in re.findall(r"\S+\s*|\s+", answer):
                self._event({"choices": [{"index": 0, "delta": {"content": piece}}]})
                time.sleep(0.02)
            if question == "break":
                self._event({"error": {"message": "the engine broke"}})
                return
            self._event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 12345}})
            self._say("data: [DONE]\n\n")
        except OSError:
            self.gone.append(question)

    def _head(self, status: int, media_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.end_headers()

    def _event(self, value: dict[str, Any]) -> None:
        self._say(f"data: {json.dumps(value)}\n\n")

    def _say(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()


@pytest.fixture(scope="module")
def script() -> Iterator[type[Script]]:
    Script.seen, Script.gone = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever)
    thread.start()
    Script.url = f"http://127.0.0.1:{server.server_port}/v1"  # type: ignore[attr-defined]
    yield Script
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def url(script, tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    store = Store(folder / "conversations.sqlite")
    endpoints = [Endpoint("script", script.url)]
    with live(folder, page=PAGE, conversations=router(store), endpoints=endpoints) as address:
        yield address
    store.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[Any]:
    """Chromium without a screen, with a profile of its own."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("needs a browser: apt install chromium chromium-driver")
    from selenium import webdriver

    profile = tmp_path_factory.mktemp("profile")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{switch}")
    downloads = {"download.default_directory": str(profile / "downloads")}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.downloads = profile / "downloads"
    yield driver
    driver.quit()


class Page:
    """What a user does with the page, and sees on it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def find(self, selector: str) -> Any:
        return self.until(lambda: self.all(selector), f"{selector} on the page")[0]

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements("css selector", selector)

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """The first value that is something."""
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            try:
                if value := condition():
                    return value
            except StaleElementReferenceException:
                pass  # drawn anew in the meantime
            time.sleep(0.02)
        pytest.fail(f"There was not: {what}. The page says: {self.find('main').text!r}")

    def press(self, *keys: str, hold: str | None = None) -> None:
        """Keys, as the keyboard sends them to what has the focus."""
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.driver)
        if hold:
            chain.key_down(hold)
        chain.send_keys(*keys)
        if hold:
            chain.key_up(hold)
        chain.perform()

    def new(self, model: str = "script/echo") -> None:
        self.driver.get("about:blank")
        self.driver.get(self.url)
        self.find("#model option")
        self.choose(model)

    def open(self, **conversation: Any) -> None:
        """A conversation that was kept before."""
        kept = httpx2.post(f"{self.url}/api/conversations", json=conversation).raise_for_status()
        self.driver.get("about:blank")
        self.driver.get(f"{self.url}#{kept.json()['id']}")
        self.find(".turn")

    def choose(self, model: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(self.find("#model")).select_by_value(model)

    def reload(self) -> None:
        self.driver.refresh()
        self.find(".turn")

    def ask(self, question: str) -> None:
        self.find("#question").send_keys(question, "\ue007")  # Enter

    def answered(self, n_turns: int) -> list[str]:
        """What was said, once there are so many turns and no answer is coming."""
        self.until(
            lambda: len(self.all(".turn .text")) == n_turns and not self.all(".coming"),
            f"{n_turns} turns",
        )
        return [text.text for text in self.all(".turn .text")]

    def finished(self) -> None:
        """The last question has an answer, or an error."""
        last = ".turn:last-child .note"
        self.until(
            lambda: (
                self.all(".error") or any("first after" in note.text for note in self.all(last))
            ),
            "an answer",
        )

    def button(self, text: str, within: str = "body") -> Any:
        return self.until(
            lambda: [b for b in self.all(f"{within} button") if b.text == text], f"button {text}"
        )[-1]

    def click(self, text: str, within: str = "body") -> None:
        self.button(text, within).click()

    def double_click(self, button: Any) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).double_click(button).perform()

    def words(self, more_than: int) -> int:
        """How many words have come, once they are so many."""
        return self.until(
            lambda: (n := self.find(".coming .text").text.count("word")) > more_than and n, "words"
        )

    def value(self, selector: str) -> str:
        return self.find(selector).get_property("value")

    def focused(self) -> str:
        """The id of what has the focus; its tag, where it has none."""
        active = self.driver.switch_to.active_element
        return active.get_attribute("id") or active.tag_name

    def kept(self) -> dict[str, Any]:
        """The conversation that is shown, as it was kept; its address comes once it is."""
        number = self.until(lambda: self.driver.current_url.partition("#")[2], "an address")
        url = f"{self.url}/api/conversations/{number}"
        return httpx2.get(url).raise_for_status().json()

    def kept_with(self, n_messages: int) -> dict[str, Any]:
        """The same once it has so many messages."""
        there = self.until(
            lambda: len(self.kept()["messages"]) >= n_messages and self.kept(), "all"
        )
        assert len(there["messages"]) == n_messages
        return there

    def titles(self) -> list[str]:
        return [link.text for link in self.all("#list a")]

    def overflow(self) -> int:
        """By how many pixels something is wider than the screen."""
        return self.driver.execute_script(
            "return Math.max(...['html', '#transcript', '#options', '#shelf', '#pieces'].map("
            "  (s) => document.querySelector(s)).map((e) => e.scrollWidth - e.clientWidth))"
        )


@pytest.fixture
def page(driver, url) -> Iterator[Page]:
    driver.set_window_size(*WIDE)
    page = Page(driver, url)
    page.new()
    yield page
    # A refused request is logged by the browser; a broken page or policy would be, too.
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert [each for each in said if "Failed to load resource" not in each] == []


def test_a_question_is_answered_as_it_comes_and_both_are_there_after_a_reload(page, script):
    page.ask("slow")
    first = page.words(more_than=0)
    page.words(more_than=first + 40)
    page.driver.find_element("css selector", "#send").click()  # it stops now
    page.answered(2)
    page.ask("how are you?")
    question, _, second, answer = page.answered(4)
    assert (question, second) == ("slow", "how are you?")
    assert answer == f"{len(script.seen)}: how are you?"
    note = page.all(".turn .note")[-1].text
    assert re.fullmatch(r"12,345 tokens · [\d.,]+ tokens/s · first after [\d.]+ s", note)
    assert [m["role"] for m in script.seen[-1]["messages"]] == ["user", "assistant", "user"]
    before = page.answered(4)
    page.reload()
    assert page.answered(4) == before
    assert page.titles()[0] == "slow"
    assert page.driver.title == "slow · minillama"


def test_a_stopped_answer_is_kept_as_far_as_it_came_and_its_server_is_told(page, script):
    n_gone = len(script.gone)
    page.ask("slow")
    page.until(lambda: page.find(".coming .text").text.count("word") > 3, "words")
    page.press("\ue00c")  # Escape
    text = page.answered(2)[1]
    assert 3 < text.count("word") < 2000
    assert page.all(".turn .note")[-1].text.endswith("· stopped")
    page.until(lambda: len(script.gone) > n_gone, "a client that left")
    page.reload()
    assert page.answered(2)[1] == text


def test_who_leaves_the_page_keeps_what_had_come(page):
    page.ask("slow")
    page.until(lambda: page.find(".coming .text").text.count("word") > 3, "words")
    page.driver.get("about:blank")
    page.driver.back()
    assert page.answered(2)[1].count("word") > 3
    assert page.all(".turn .note")[-1].text.endswith("· stopped")


def test_another_model_answers_from_now_on(page):
    page.choose("small")
    page.ask("Ben?")
    page.answered(2)
    page.until(lambda: page.find("#count").text.endswith("of 256 tokens"), "the count of tokens")
    page.choose("script/echo")
    page.ask("second")
    page.answered(4)
    assert [name.text for name in page.all(".turn h2")] == ["You", "small", "You", "script/echo"]
    page.driver.execute_script("localStorage.clear()")  # not the browser: the conversation knows
    page.reload()
    assert page.find("#model").get_property("value") == "script/echo"


@pytest.mark.parametrize(
    ("tokens", "first", "seconds", "said"),
    [
        (4, 0.059, 0.0593, "4 tokens · 67.5 tokens/s · first after 0.059 s"),
        (12345, 0.2, 1.2, "12,345 tokens · 12,300 tokens/s · first after 0.20 s"),
        (41, 0.5, 10.5, "41 tokens · 4 tokens/s · first after 0.50 s"),
    ],
    ids=["all at once", "fast", "slow"],
)
def test_how_fast_an_answer_came(page, tokens, first, seconds, said):
    detail = {"completion_tokens": tokens, "first_token": first, "seconds": seconds}
    question = {"role": "user", "content": "one"}
    page.open(messages=[question, {"role": "assistant", "content": "two", "detail": detail}])
    assert page.find(".turn .note").text == said


def test_a_second_answer_stands_beside_the_first(page):
    page.ask("again")
    first = page.answered(2)[1]
    page.click("Regenerate")
    page.until(lambda: "2 of 2" in page.find("#turns").text, "the second answer")
    second = page.answered(2)[1]
    assert first != second
    page.click("‹")
    assert page.answered(2)[1] == first
    page.reload()
    assert page.answered(2)[1] == first
    page.click("›")
    assert page.answered(2)[1] == second
    page.ask("on")
    assert page.answered(4)[1] == second


def test_an_edited_question_begins_a_branch(page, script):
    page.ask("one")
    page.answered(2)
    page.ask("two")
    before = page.answered(4)
    page.click("Edit", ".turn:first-child")
    page.find(".turn textarea").send_keys(" changed\ue007")
    page.until(lambda: "2 of 2" in page.find("#turns").text, "the branch")
    after = page.answered(2)
    assert after[0] == "one changed"
    assert [m["content"] for m in script.seen[-1]["messages"]] == ["one changed"]
    page.click("‹")
    assert page.answered(4) == before
    page.click("Edit", ".turn:nth-child(3)")
    page.press("\ue00c")
    assert page.answered(4) == before


def test_what_an_answer_says_is_text_and_never_code(page):
    page.ask("attack")
    assert page.answered(2) == ["attack", ATTACK]
    page.ask(ATTACK)
    page.answered(4)
    page.find("#show-prompt").click()
    page.press("\ue00c")
    page.reload()
    assert page.answered(4)[1:3] == [ATTACK, ATTACK]
    assert page.driver.title == "attack · minillama"
    assert page.all(".turn script, .turn img") == []


def test_the_policy_stops_what_gets_in_all_the_same(page):
    page.driver.execute_script(
        "const image = document.createElement('img');"
        "image.setAttribute('onerror', 'document.title = \"broken\"');"
        "image.src = 'data:image/png;base64,';"
        "document.body.append(image);"
        "const code = document.createElement('script');"
        "code.textContent = 'document.title = \"broken\"';"
        "document.body.append(code);"
    )
    time.sleep(0.3)
    assert page.driver.title == "minillama"
    refused = [entry["message"] for entry in page.driver.get_log("browser")]
    assert sum("Content Security Policy" in each for each in refused) == 2


def test_answers_in_markdown_are_set(page):
    page.ask("markdown")
    page.answered(2)
    answer = page.all(".turn .text")[1]

    def within(selector):
        return [found.text for found in answer.find_elements("css selector", selector)]

    assert within("h3") == ["Head"]
    assert within("ol li") == ["one", "two"]
    assert within("ul li") == ["three"]
    assert within("strong") == ["one"]
    assert within("li code") == ["two"]
    assert within("pre code") == ["x = 1 < 2"]
    assert within("em") == ["so"]
    assert within("p") == ["said so\n5 * 3 * 2"]


def test_richer_answers_in_markdown_are_set(page):
    page.ask("rich")
    page.answered(2)
    answer = page.all(".turn .text")[1]

    def within(selector):
        return [found.text for found in answer.find_elements("css selector", selector)]

    assert within("strong") == ["bold nested bold", "both", "1"]
    assert within("em") == ["nested", "both", "under"]
    assert within("s") == ["gone"]
    assert "snake_case_name 2 * 3 * 4 *raw*" in within("p")[0]
    assert "Not [this](javascript:alert(1))." in within("p")[0]
    links = answer.find_elements("css selector", "a")
    assert [a.get_attribute("href") for a in links] == [
        "https://example.org/a_(b)",
        "https://example.com/c_d",
    ]
    assert {(a.get_attribute("rel"), a.get_attribute("target")) for a in links} == {
        ("noopener noreferrer", "_blank")
    }
    assert within(".text > ol > li > ul > li > ul > li") == ["deeper"]
    assert within(".text > ol > li > .code code") == ['if x:\n    y = "**no**"']
    assert within(".text > ol > li")[1:] == ["second\ngoes on", "☑ third"]
    assert within("blockquote > p") == ["quoted"]
    assert within("blockquote > ul > li") == ["in a list"]
    assert len(within("hr")) == 1
    assert within("th") == ["Name", "Value"]
    assert within("td") == ["a", "1", "b | c", ""]
    assert within("td.end") == ["1", ""]
    arabic, english = answer.find_elements("css selector", ".text > p")[-2:]
    assert (arabic.value_of_css_property("direction"), arabic.text) == ("rtl", "مرحبا hello.")
    assert english.value_of_css_property("direction") == "ltr"
    page.driver.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    answer.find_element("css selector", ".code button").click()
    page.find("#question").click()
    page.press("v", hold=CONTROL)
    code = 'if x:\n    y = "**no**"\n'
    page.until(lambda: page.value("#question") == code, "the copied code")


@pytest.mark.parametrize(
    "text",
    [
        "> " * 5000,
        "- " * 5000 + "x",
        "- a\n" * 5000,
        "|-" * 5000 + "\n" + "|-" * 5000,
        "*a **b " * 5000,
        "~~a_b _c" * 2000,
        "``a `b ```c " * 2000,
        "`" * 9999,
        "[" * 9999,
        "https://" * 2000,
    ],
    ids=lambda text: text[:8].strip(),
)
def test_no_answer_takes_long_to_set(page, text):
    page.open(messages=[{"role": "user", "content": "one"}])
    took = page.driver.execute_script(
        "const began = performance.now();"
        "document.querySelector('.turn .text').replaceWith(formatted(arguments[0]));"
        "document.body.offsetHeight;"
        "return performance.now() - began",
        text,
    )
    assert took < 5000  # milliseconds; a busy machine is no reason to fail


def test_an_error_stands_in_its_place_and_can_be_tried_again(page):
    page.ask("fail")
    alert = page.find(".error[role=alert]")
    assert "out of order" in alert.text
    page.click("Try again")
    assert page.answered(2)[0] == "fail"
    assert page.all(".error") == []
    page.ask("break")
    page.until(lambda: "the engine broke" in page.find("#turns").text, "the error")
    assert page.all(".turn .note")[-1].text.endswith("broke off")


@pytest.fixture
def full(monkeypatch) -> Any:
    """No answer can be kept until `full.undo()`."""
    add = Store.add

    def no_answer(store, conversation, parent, role, *rest):
        if role == "assistant":
            raise OSError("The disk is full.")
        return add(store, conversation, parent, role, *rest)

    monkeypatch.setattr(Store, "add", no_answer)
    return monkeypatch


def test_an_answer_that_cannot_be_kept_is_shown_and_can_be_kept_later(page, full):
    page.ask("one")
    assert "The answer could not be kept: The disk is full." in page.find(".error").text
    said = page.answered(2)
    assert said[1].endswith(": one")
    assert "Get an answer" not in page.find("#turns").text  # it has one
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    page.find("#list a").click()
    assert page.answered(2) == said  # it waits
    full.undo()
    page.double_click(page.button("Try to keep it again"))
    page.until(lambda: not page.all(".error"), "an end of the error")
    page.reload()
    assert page.answered(2) == said
    page.kept_with(2)


def test_an_answer_that_was_not_kept_is_kept_before_the_next_question(page, full):
    page.ask("one")
    page.find(".error")
    page.ask("two")
    page.until(lambda: page.value("#question") == "two", "the question, which was not sent")
    assert "could not be kept yet" in page.find("#refused").text
    full.undo()
    page.ask("")
    said = page.answered(4)
    assert said[0] == "one"
    assert said[1].endswith(": one")
    assert said[2] == "two"
    page.reload()
    assert page.answered(4) == said


def test_an_error_waits_where_it_belongs(page):
    page.ask("late failure")
    page.find(".coming")
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    page.until(lambda: not page.all("#list .busy"), "the end of the answer")
    assert page.all(".error") == []
    page.find("#list a").click()
    assert "out of order" in page.find(".error").text


def test_a_long_answer_is_kept_while_it_comes(page):
    page.ask("long")
    page.kept_with(2)  # the beginning of the answer
    length = len(page.kept()["messages"][1]["content"])
    page.until(lambda: len(page.kept()["messages"][1]["content"]) > length, "more of it")
    count = page.words(more_than=30)
    page.reload()
    text = page.answered(2)[1]
    assert len(text) > 2**16  # a page that is left can send so many bytes
    assert text.count("word") >= count
    assert page.all(".turn .note")[-1].text.endswith("· stopped")
    page.kept_with(2)


def test_a_question_without_an_answer_can_be_answered(page):
    page.open(messages=[{"role": "user", "content": "one"}], settings={"model": "script/echo"})
    page.click("Get an answer")
    assert page.answered(2)[1].endswith(": one")
    assert "Get an answer" not in page.find("#turns").text


def test_a_double_click_sends_an_edit_once(page):
    page.ask("one")
    page.answered(2)
    page.click("Edit")
    page.press(" changed")
    page.double_click(page.button("Send", "#turns"))
    page.until(lambda: "2 of 2" in page.find("#turns").text, "the branch")
    assert page.answered(2)[1].endswith(": one changed")
    page.kept_with(4)


def test_an_edit_survives_all_that_is_drawn_in_the_meantime(page):
    page.ask("one")
    page.answered(2)
    page.ask("brief")
    page.find(".coming")
    page.click("Edit", ".turn:first-child")
    page.press(" changed")
    field = page.find(".turn textarea")
    assert not page.button("Send", "#turns").is_enabled()
    assert "An answer is coming" in page.find("#turns").text
    page.press(ENTER)
    page.until(lambda: not page.all(".coming"), "the end of the answer")
    assert (page.focused(), field.get_property("value")) == ("textarea", "one changed")
    page.find("#show-options").click()
    page.find("#system").send_keys("Be kind.")
    field.click()
    page.until(lambda: page.find(".turn").text == "System\nBe kind.", "the system message")
    assert field.get_property("value") == "one changed"
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    page.find("#list a").click()
    assert page.value(".turn textarea") == "one changed"
    page.find(".turn textarea").send_keys(ENTER)
    page.until(lambda: "2 of 2" in page.find("#turns").text, "the branch")
    assert page.answered(3)[1] == "one changed"


def test_a_name_that_is_being_typed_survives_the_end_of_an_answer(page):
    page.ask("brief")
    page.find(".coming")
    page.until(lambda: page.titles()[0] == "brief", "the conversation in the list")
    page.find("#list li button").click()
    page.press("half")
    page.until(lambda: not page.all(".coming"), "the end of the answer")
    assert page.value("#list input") == "half"
    assert page.kept()["title"] == "brief"
    page.press(" a name", ENTER)
    page.until(lambda: page.titles()[0] == "half a name", "the whole name")


def test_a_selection_survives_the_end_of_an_answer(page):
    page.ask("one")
    said = page.answered(2)[1]
    page.ask("brief")
    page.find(".coming")
    page.driver.execute_script(
        "getSelection().selectAllChildren(document.querySelectorAll('.turn .text')[1])"
    )
    page.answered(4)
    assert page.driver.execute_script("return getSelection().toString()").strip() == said


def test_enter_and_a_double_click_do_not_stop_an_answer(page):
    page.find("#question").send_keys("slow")
    page.double_click(page.find("#send"))
    page.words(more_than=30)
    page.ask("the next")
    page.words(more_than=40)
    assert page.value("#question") == "the next"
    for field in ("#search", "#system"):
        if field == "#system":
            page.find("#show-options").click()
        page.find(field).send_keys("x", ESCAPE)
        page.words(more_than=page.words(more_than=0) + 5)
    assert not page.find("#options").is_displayed()
    page.find("#send").click()
    assert page.answered(3)[1] == "slow"
    page.find("#show-options").click()
    page.find("#question").send_keys(ESCAPE)
    assert not page.find("#options").is_displayed()


def test_a_marker_in_a_question_is_refused_with_a_way_out(page):
    page.choose("small")
    page.ask("Ben [INST] Ada")
    refusal = page.find(".error").text
    assert "contains [INST], which" in refusal
    assert "neutralise" not in refusal
    page.click("Send with spaces in the markers")
    assert page.answered(2)[0] == "Ben [INST] Ada"
    page.reload()
    page.ask("Ben?")  # the first question goes along, and is no error any more
    page.answered(4)
    assert page.all(".error") == []
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    assert not page.find("#neutralise").is_selected()


def test_export_and_import(page):
    page.ask("one")
    page.answered(2)
    page.click("Regenerate")
    page.until(lambda: "2 of 2" in page.find("#turns").text, "the second answer")
    said = page.answered(2)
    page.find("#show-options").click()
    shutil.rmtree(page.driver.downloads, ignore_errors=True)
    page.click("Export JSON")
    page.click("Markdown")
    files = [page.driver.downloads / name for name in ("one.json", "one.md")]
    page.until(lambda: all(map(Path.exists, files)), "the downloads")
    exported = json.loads(files[0].read_text())
    assert [m["content"] for m in exported["messages"]] == said
    assert len(exported["aside"]) == 1
    assert files[1].read_text() == f"# one\n\n## You\n\none\n\n## script/echo\n\n{said[1]}\n"
    exported["title"] = "Brought back"
    files[0].write_text(json.dumps(exported))
    page.new()
    page.find("#file").send_keys(str(files[0]))
    assert page.answered(2) == said
    assert "2 of 2" in page.find("#turns").text
    page.until(lambda: page.titles()[0] == "Brought back", "the title")
    files[0].write_text('{"messages": [{"role": "user"}]}')
    page.find("#file").send_keys(str(files[0]))
    page.until(lambda: "one.json was not taken over" in page.find("#list-note").text, "a refusal")


def test_search_rename_and_delete(page):
    page.ask("the armadillo")
    page.answered(2)
    page.find("#search").send_keys("ARMADIL")
    page.until(lambda: page.titles() == ["the armadillo"], "what was searched")
    page.find("#list li button").click()
    page.find("#list input").send_keys("\ue009a\ue000", "Of animals\ue007")
    page.until(lambda: page.titles() == ["Of animals"], "the new name")
    assert page.driver.title == "Of animals · minillama"
    page.all("#list li button")[1].click()
    assert page.find("#delete-title").text == "Delete “Of animals”?"
    page.click("Keep", "#delete")
    page.all("#list li button")[1].click()
    page.click("Delete", "#delete")
    page.until(lambda: page.find("#list-note").text == "Nothing found.", "an empty list")
    assert page.all(".turn") == []


def test_nothing_is_asked_with_an_option_that_cannot_be(page, script):
    page.find("#show-options").click()
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("9\t")
    page.find("#show-options").click()
    seen = len(script.seen)
    page.ask("one")
    page.until(lambda: page.find("#options").is_displayed(), "the wrong option")
    assert page.find("#question").get_attribute("value") == "one"  # it is not lost
    assert len(script.seen) == seen
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("1\t")
    page.ask("")
    page.answered(2)
    assert script.seen[-1]["temperature"] == 1


def test_options_are_sent_and_kept(page, script):
    page.find("#show-options").click()
    for name, value in {"temperature": "0", "top_p": "", "max_tokens": "9", "seed": "3"}.items():
        page.find(f"#{name}").clear()
        page.find(f"#{name}").send_keys(value, "\t")
    page.find("#stop").send_keys("END\n\\n\\n\t")
    page.find("#system").send_keys("Be kind.\t")
    page.ask("one")
    page.answered(3)
    sent = {key: value for key, value in script.seen[-1].items() if key != "messages"}
    assert sent == {
        "model": "echo",
        "temperature": 0,
        "max_tokens": 9,
        "seed": 3,
        "stop": ["END", "\n\n"],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert script.seen[-1]["messages"][0] == {"role": "system", "content": "Be kind."}
    page.find("#system").send_keys(" And brief.\t")
    page.until(lambda: "And brief." in page.find(".turn").text, "the changed message")
    page.reload()
    page.answered(3)
    page.find("#show-options").click()
    values = [page.find(f"#{name}").get_property("value") for name in ("seed", "top_p", "system")]
    assert values == ["3", "", "Be kind. And brief."]
    page.driver.execute_script("localStorage.clear()")


def test_further_options_are_sent_where_they_are_set(page, script):
    page.find("#show-options").click()
    values = {"top_k": 5, "min_p": 0.05, "repetition_penalty": 1.1}
    for name, value in values.items():
        page.find(f"#{name}").send_keys(str(value), TAB)
    page.ask("one")
    page.answered(2)
    assert {name: script.seen[-1].get(name) for name in values} == values
    page.reload()
    assert {name: float(page.value(f"#{name}")) for name in values} == values
    page.find("#show-options").click()
    page.click("Reset")
    assert [page.value(f"#{name}") for name in values] == ["", "", ""]
    page.until(lambda: "top_k" not in page.kept()["settings"], "the defaults, kept")


def test_a_new_chat_begins_with_the_defaults(page):
    page.find("#show-options").click()
    page.find("#temperature").clear()
    page.find("#temperature").send_keys("0", TAB)
    page.find("#system").send_keys("Be kind.", TAB)
    assert page.find(".turn").text == "System\nBe kind."  # before there is a question
    page.ask("one")
    page.answered(3)
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    assert (page.value("#system"), page.value("#temperature")) == ("", "0.6")
    assert page.value("#model") == "script/echo"


def test_a_new_chat_has_a_model_that_is_served(page):
    page.driver.execute_script(
        "localStorage.setItem('model', 'gone/model');"
        "localStorage.setItem('settings', JSON.stringify({model: 'gone/model'}))"
    )
    page.driver.refresh()
    page.until(lambda: page.value("#model") == "small", "the first model")
    page.open(messages=[{"role": "user", "content": "one"}], settings={"model": "gone/model"})
    gone = "gone/model (not served now)"
    page.until(lambda: gone in page.find("#model").text, gone)
    assert page.value("#model") == "gone/model"
    page.press("n", hold=ALT)
    page.until(lambda: page.value("#model") == "small", "a model that is served")
    assert gone not in page.find("#model").text
    page.driver.execute_script("localStorage.clear()")


def test_a_page_can_be_used_before_the_models_are_known(driver, tmp_path):
    store = Store(tmp_path / "conversations.sqlite")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = Endpoint("silent", f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with live(
            tmp_path, page=PAGE, conversations=router(store), endpoints=[endpoint]
        ) as address:
            page = Page(driver, address)
            driver.get_log("browser")
            driver.get(address)
            assert "What would you like to ask?" in page.find("#turns").text
            assert page.all("#model option") == []
            page.press(ESCAPE)
            page.ask("Ben?")
            assert page.answered(2)[0] == "Ben?"
            assert page.all(".turn h2")[1].text == "small"
            assert driver.get_log("browser") == []
            driver.get("about:blank")
    store.close()


def test_of_two_conversations_the_one_that_was_chosen_last_is_shown(page, monkeypatch):
    for name in ("first", "second"):
        page.new()
        page.ask(name)
        page.answered(2)
    slow, read = page.kept()["id"], Store.read

    def late(store, conversation):
        if conversation == slow:
            time.sleep(0.7)
        return read(store, conversation)

    page.new()
    page.until(lambda: page.titles()[:2] == ["second", "first"], "the list")
    monkeypatch.setattr(Store, "read", late)
    second, first = page.all("#list a")[:2]
    second.click()
    first.click()
    page.until(lambda: page.all(".turn"), "a conversation")
    time.sleep(1)
    assert page.answered(2)[0] == "first"
    assert page.find("#list [aria-current]").text == "first"


def test_what_is_typed_while_a_question_is_kept_is_the_next_one(page, monkeypatch):
    create = Store.create

    def late(*arguments):
        time.sleep(0.7)
        return create(*arguments)

    monkeypatch.setattr(Store, "create", late)
    page.ask("one")
    page.press("two")
    page.answered(2)
    assert page.value("#question") == "two"
    monkeypatch.setattr(Store, "create", lambda *_: (_ for _ in ()).throw(OSError("No room.")))
    page.new()
    page.ask("three")
    page.until(lambda: "No room." in page.find("#refused").text, "the reason")
    assert page.value("#question") == "three"


def test_what_another_tab_has_kept_is_shown_when_one_comes_back(page):
    page.ask("one")
    page.answered(2)
    kept = page.kept_with(2)
    form = {"parent": kept["head"], "role": "user", "content": "from elsewhere"}
    url = f"{page.url}/api/conversations/{kept['id']}/messages"
    httpx2.post(url, json=form).raise_for_status()
    page.driver.execute_script("document.dispatchEvent(new Event('visibilitychange'))")
    assert page.answered(3)[2] == "from elsewhere"


def turns(n: int, content: str) -> list[dict[str, str]]:
    """Messages of a user and an assistant, as a conversation is kept."""
    return [{"role": ("user", "assistant")[i % 2], "content": f"{i} {content}"} for i in range(n)]


@pytest.mark.parametrize(
    ("n_messages", "content", "n_sent", "n_left"),
    [(1000, "x", 499, 502), (40, "x" * 60_000, 3, 38)],
    ids=["many messages", "many characters"],
)
def test_of_a_long_conversation_the_newest_turns_are_sent(
    page, script, n_messages, content, n_sent, n_left
):
    system, said = {"role": "system", "content": "Be kind."}, turns(n_messages, content)
    page.open(messages=[system, *said], settings={"model": "script/echo"})
    page.ask("one")
    page.finished()
    assert page.all(".error") == []
    said = [*said, {"role": "user", "content": "one"}]
    assert script.seen[-1]["messages"] == [system, *said[-n_sent:]]
    assert said[-n_sent]["role"] == "user"
    left = f"The oldest {n_left} messages are not sent any more"
    page.until(lambda: page.find("#count").text == left, left)


def test_what_is_not_sent_counts_as_forgotten(page):
    said = turns(1000, "Ben.")
    form = {"model": "small", "messages": said, "max_tokens": 9, "truncation": "auto"}
    read = httpx2.post(f"{page.url}/api/prompt", json=form).raise_for_status().json()
    assert read["forgotten"] > 500
    page.open(messages=said, settings={"model": "small", "max_tokens": 9})
    left = f"oldest {read['forgotten']} messages do not fit any more"
    count = f"{len(read['ids'])} of 256 tokens; the {left}"
    page.until(lambda: page.find("#count").text == count, count)
    page.find("#show-prompt").click()
    left = f"The oldest {read['forgotten']} messages are left out: they do not fit."
    page.until(lambda: page.find("#prompt-note").text.endswith(left), left)
    page.press("\ue00c")
    page.ask("Ben?")
    page.finished()
    assert page.all(".error") == []


def test_the_prompt_is_what_the_model_reads(page):
    page.choose("small")
    page.find("#question").send_keys("Ben had a boat.")
    page.find("#show-prompt").click()
    expected = encode_dialog([Message("user", "Ben had a boat.")], TOKENIZER).ids
    page.until(lambda: len(page.all("#pieces .piece")) == len(expected), "all the pieces")
    assert [int(i.text) for i in page.all("#pieces i")] == expected
    assert [b.text for b in page.all("#pieces .control b")] == ["<s>"]
    text = "".join(b.text for b in page.all("#pieces b")).replace("·", " ")
    assert text == "<s> [INST] Ben had a boat. [/INST]"
    assert len(page.all("#pieces .piece.user")) == len(expected)
    page.press("\ue00c")
    page.until(
        lambda: page.find("#count").text == f"{len(expected)} of 256 tokens", "the same count"
    )
    page.choose("script/echo")
    page.find("#show-prompt").click()
    page.until(lambda: page.find("#prompt-note").text, "why there is nothing to see")


def test_the_focus_stays_where_one_goes_on(page):
    page.driver.refresh()
    page.until(lambda: page.value("#model") == "script/echo", "the model that was chosen")
    assert page.focused() == "question"
    assert page.find("#show-options").get_attribute("aria-expanded") == "false"
    page.find("#question").send_keys("one")
    page.find("#send").click()
    page.answered(2)
    assert page.focused() == "question"
    assert page.driver.title == "one · minillama"
    for text, keys in (("Regenerate", [ENTER]), ("Edit", [ENTER, " changed", ENTER])):
        page.driver.execute_script("arguments[0].focus()", page.button(text, "#turns"))
        page.press(*keys)
        page.until(lambda: "2 of 2" in page.find("#turns").text, "the branch")
        page.answered(2)
        assert page.focused() == "question"
    page.press("n", hold=ALT)
    page.until(lambda: not page.all(".turn"), "a new chat")
    page.find("#list a").click()
    page.until(lambda: page.focused() == "question", "the focus in the question")
    page.answered(2)
    page.ask("brief")
    page.find(".coming")
    copy = page.button("Copy", "#turns")
    page.driver.execute_script("arguments[0].focus()", copy)
    page.answered(4)
    assert page.driver.switch_to.active_element == copy


def test_a_text_is_copied_with_and_without_a_clipboard(page):
    page.ask("one")
    said = page.answered(2)[1]
    page.driver.execute_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page.click("Copy")
    assert page.button("Copied")
    page.find("#question").click()
    page.press("v", hold=CONTROL)
    page.until(lambda: page.value("#question") == said, "what was copied")
    assert page.button("Copy")  # again, after a while


def test_a_letter_that_is_typed_with_alt_is_a_letter(page):
    press = (
        "return document.activeElement.dispatchEvent(new KeyboardEvent('keydown',"
        " {key: arguments[0], code: arguments[1], altKey: true, bubbles: true, cancelable: true}))"
    )
    page.find("#question").click()
    assert page.driver.execute_script(press, "ó", "KeyO")
    assert not page.find("#options").is_displayed()
    assert not page.driver.execute_script(press, "o", "KeyO")
    assert page.find("#options").is_displayed()
    page.find("#theme").click()
    assert not page.driver.execute_script(press, "ó", "KeyO")
    assert not page.find("#options").is_displayed()
    page.driver.execute_script("localStorage.clear()")


def test_the_enter_of_an_input_method_ends_no_name(page):
    page.ask("one")
    page.answered(2)
    page.find("#list li button").click()
    page.press("half")
    page.driver.execute_script(
        "document.activeElement.dispatchEvent("
        " new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    time.sleep(0.3)
    assert page.value("#list input") == "half"
    page.press(ESCAPE)


def test_the_keyboard_is_enough(page):
    focused = page.focused
    page.press("n", hold=ALT)
    assert focused() == "question"
    page.press("one")
    page.press(ENTER, hold=SHIFT)
    page.press("two", ENTER)
    assert page.answered(2)[0] == "one\ntwo"
    page.press("r", hold=ALT)
    page.until(lambda: "2 of 2" in page.find("#turns").text, "a second answer")
    page.answered(2)
    page.find("#question").send_keys("")
    page.press(UP)
    page.press(" three", ENTER)
    page.until(lambda: page.answered(2)[0] == "one\ntwo three", "the edited question")
    page.press("o", hold=ALT)
    page.until(lambda: page.find("#options").is_displayed(), "the options")
    page.press("o", hold=ALT)
    page.until(lambda: not page.find("#options").is_displayed(), "no options")
    page.press("m", hold=ALT)
    assert focused() == "model"
    page.press("/", hold=ALT)
    assert page.find("#keys").is_displayed()
    page.press(ESCAPE)
    page.until(lambda: not page.find("#keys").is_displayed(), "no list of keys")
    page.press("k", hold=ALT)
    assert focused() == "search"
    page.press(TAB)
    assert page.driver.switch_to.active_element.text.startswith("one two")
    page.press(TAB, ENTER)  # rename
    page.press("x", ENTER)
    page.until(lambda: page.titles()[0] == "x", "the new name")
    page.press("p", hold=ALT)
    assert page.find("#prompt").is_displayed()
    page.press(ESCAPE)


def test_whatever_can_be_operated_has_a_name(page):
    page.ask("one")
    page.answered(2)
    page.find("#show-options").click()
    operable = page.all("button, input, select, textarea, a, [role=meter], section, nav, aside")
    shown = [each for each in operable if each.is_displayed()]
    assert len(shown) > 25
    nameless = [e.get_attribute("outerHTML") for e in shown if not e.accessible_name]
    assert nameless == []
    assert "one" in page.driver.execute_script("return document.querySelector('#status').innerText")


def test_a_phone_has_no_horizontal_scrolling(page):
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        page.new()
        assert not page.find("#shelf").is_displayed()
        page.ask("x" * 300 + " https://example.org/" + "y" * 300)
        page.answered(2)
        page.ask("markdown")
        page.answered(4)
        assert page.overflow() == 0
        for name in ("shelf", "options"):
            page.find(f"#show-{name}").click()
            assert page.find(f"#{name}").is_displayed()
            assert page.overflow() == 0
            page.press(ESCAPE)
            assert not page.find(f"#{name}").is_displayed()
        page.choose("small")
        page.find("#show-prompt").click()
        page.find("#prompt-note")
        assert page.overflow() == 0
        page.press(ESCAPE)
        page.find("#show-shelf").click()
        page.find("#list a").click()
        page.until(lambda: not page.find("#shelf").is_displayed(), "the dialogue")
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_on_a_touch_screen_enter_begins_a_line(page):
    touch = "Emulation.setTouchEmulationEnabled"
    page.driver.execute_cdp_cmd(touch, {"enabled": True})
    try:
        page.new()
        page.ask("one")
        page.press("two")
        assert page.value("#question") == "one\ntwo"
        page.find("#send").click()
        assert page.answered(2)[0] == "one\ntwo"
    finally:
        page.driver.execute_cdp_cmd(touch, {"enabled": False})


def test_light_and_dark(page):
    def paper():
        return page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")

    colours = [paper()]
    for _ in range(3):
        page.find("#theme").click()
        colours.append(paper())
    assert len(set(colours)) == 2
    assert colours[0] == colours[3]
    page.find("#theme").click()
    page.find("#theme").click()
    dark = paper()
    page.driver.refresh()
    page.find("#theme")
    assert paper() == dark
    page.driver.execute_script("localStorage.clear()")


def test_a_server_with_a_token_asks_for_it(driver, tmp_path):
    driver.set_window_size(*WIDE)
    store = Store(tmp_path / "conversations.sqlite")
    with live(tmp_path, page=PAGE, conversations=router(store), token="secret") as address:
        page = Page(driver, address)
        driver.get(address)
        for given in ("wrong", "secret"):
            page.until(lambda: page.find("#token").is_displayed(), "the question for the token")
            assert page.find("#token-wrong").is_displayed() == (given == "secret")
            page.find("#token-field").send_keys(given, ENTER)
            page.until(lambda: not page.value("#token-field"), "the next")
        page.until(lambda: not page.find("#token").is_displayed(), "the end of the questions")
        page.choose("small")
        page.ask("Ben?")
        page.answered(2)
        page.reload()
        page.answered(2)
        assert not page.find("#token").is_displayed()
        driver.get("about:blank")
    store.close()


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_text_stands_out_from_its_ground(scheme):
    """A contrast of 4.5 at least, as WCAG 2.2 wants it (1.4.3)."""
    pairs = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", PAGE.read_text())
    colour = {name: both[scheme] for name, *both in pairs}
    grounds = dict.fromkeys(("ink", "quiet"), ("paper", "shelf", "raised"))
    grounds |= dict.fromkeys(("system", "user", "assistant"), ("paper", "raised"))
    grounds |= {f"{name}-tint": ("ink", name) for name in ("system", "user", "assistant")}
    grounds["on-accent"] = ("accent",)
    for text, behind in grounds.items():
        for ground in behind:
            bright, dim = sorted((luminance(colour[text]), luminance(colour[ground])))[::-1]
            assert (bright + 0.05) / (dim + 0.05) >= 4.5, f"{text} on {ground}"

"""Drive the page at `/` in Chromium: `python scripts/page_check.py [--pictures FOLDER] [--url http://127.0.0.1:8000]`.

Needs `selenium`, Debian's `chromium` and `chromium-driver`. Without `--url` the page is served by `page_double.py` and
every behaviour is tried; with it a server that runs already answers, and what depends on no particular text is. Prints
one line a check and leaves with 1 at the first that fails. `--pictures` keeps what each state looks like.
"""

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page_double import Double
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PROBLEMS = "window.problems = []; addEventListener('error', e => problems.push(e.message)); "
REJECTED = "addEventListener('unhandledrejection', e => problems.push(String(e.reason))); "
BLOCKED = "addEventListener('securitypolicyviolation', e => problems.push('blocked ' + e.blockedURI));"


class Page:
    """One browser window on one address."""

    def __init__(self, url: str, pictures: Path | None) -> None:
        options = webdriver.ChromeOptions()
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(flag)
        self.driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
        self.url, self.pictures = url, pictures
        source = {"source": PROBLEMS + REJECTED + BLOCKED}
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", source)

    def open(self, width: int = 1280, height: int = 800, scheme: str = "light", fresh: bool = True) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get(self.url)
        if fresh:
            self.js("localStorage.clear(); sessionStorage.clear()")
            self.driver.get(self.url)
        self.until("state.began")

    def js(self, code: str) -> Any:
        return self.driver.execute_script(code)

    def until(self, condition: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not self.js(f"return Boolean({condition})"):
            if time.monotonic() > end:
                raise AssertionError(f"did not come about in {seconds:.0f} s: {condition}")
            time.sleep(0.03)

    def holds(self, condition: str) -> None:
        assert self.js(f"return Boolean({condition})"), f"is not so: {condition}"

    def keys(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def click(self, css: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, css).click()

    def ask(self, text: str, wait: bool = True) -> None:
        before = self.js("return state.turns.length")
        self.driver.find_element(By.ID, "input").send_keys(text, Keys.ENTER)
        self.until(f"state.turns.length === {before} + 1")
        if wait:
            self.until("!state.running")

    def picture(self, name: str) -> None:
        if self.pictures:
            time.sleep(0.4)
            self.driver.save_screenshot(str(self.pictures / f"{name}.png"))

    def clean(self) -> None:
        assert self.js("return problems") == [], f"the page complained: {self.js('return problems')}"


def conversation(page: Page) -> None:
    """Two turns, both in the request; the answer and its numbers are there."""
    page.open()
    page.ask("Hello")
    page.holds("state.turns[0].pieces.length > 0 && !state.turns[0].error")
    page.holds("state.turns[0].box.textContent === textOf(state.turns[0], 'content')")
    page.holds("state.turns[0].foot.textContent.includes('tokens')")
    page.ask("And then?")
    page.holds("state.turns.length === 2 && request(state.turns[1])[1].messages?.length !== 1")
    page.picture("chat")


def touch(page: Page) -> None:
    """A click and the arrow keys choose tokens; their experts are drawn and listed; one expert's tokens are marked."""
    page.open()
    page.ask("Hello")
    page.click(".tokens-of .t:nth-child(3)")
    page.holds("state.chosen && !$('token-grid').hidden && document.querySelectorAll('#token-list li').length")
    before = page.js("return state.chosen.number")
    page.js("document.querySelector('.tokens-of').focus()")
    page.keys(Keys.ARROW_RIGHT)
    page.holds(f"state.chosen.number === {before} + 1 && document.querySelectorAll('.t.chosen').length === 1")
    page.click("#token-list button")
    page.holds("document.querySelectorAll('.t.hit').length > 0")
    page.picture("token")
    page.keys(Keys.ESCAPE)
    page.holds("document.querySelectorAll('.t.hit').length === 0")
    page.js("$('colour').selectedIndex = 1; $('colour').onchange()")
    page.holds("document.querySelectorAll('.t.coloured').length > 1")
    page.picture("coloured")


def heat_map(page: Page) -> None:
    """The load of all experts is drawn within a frame or two, walks by keyboard and is not asked for while hidden."""
    page.open()
    page.until("state.load && state.grid")
    cost = page.js("const t = performance.now(); for (let i = 0; i < 10; i++) drawLoad(); return performance.now() - t")
    print(f"    the heat map is drawn in {cost / 10:.1f} ms")
    page.js("$('load').focus()")
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    page.holds("$('load-point').textContent.includes('expert 2:')")
    page.click("#panel-close")
    page.js("window.looks = 0; const real = fetch; window.fetch = (...a) => { looks += 1; return real(...a); }")
    time.sleep(2.2)
    page.holds("looks === 0")


def stop(page: Page) -> None:
    """Escape ends an answer; what came stays; Shift+Enter is a new line."""
    page.open()
    ActionChains(page.driver).send_keys("a").key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()
    page.keys("b")
    page.holds("$('input').value === 'a\\nb' && !state.turns.length")
    page.js("$('input').value = ''")
    page.ask("endless", wait=False)
    page.until("state.turns[0]?.pieces.length > 3")
    page.keys(Keys.ESCAPE)
    page.until("!state.running", 10)
    page.holds("state.turns[0].notes.includes('stopped') && !state.turns[0].error && !$('send').hidden")


def last_turn(page: Page) -> None:
    """Regenerate, edit and delete act on the last turn; a new chat is empty."""
    page.open()
    page.ask("one")
    page.ask("two")
    buttons = "[...state.turns.at(-1).foot.querySelectorAll('button')]"
    page.js(f"{buttons}.find(b => b.textContent === 'Regenerate').click()")
    page.until("!state.running && state.turns[1].pieces.length")
    page.js(f"{buttons}.find(b => b.textContent === 'Edit').click()")
    page.holds("$('input').value === 'two' && state.turns.length === 1")
    page.js(f"{buttons}.find(b => b.textContent === 'Delete').click()")
    page.holds("state.turns.length === 0 && !$('empty').hidden")


def settings(page: Page) -> None:
    """Settings are kept and sent; nothing is sent for an empty field."""
    page.open()
    page.click("#settings-button")
    page.picture("settings")
    for name, value in (("temperature", "0"), ("top_k", "5"), ("seed", "7"), ("system", "Be short.")):
        page.driver.find_element(By.ID, name).send_keys(value)
    page.click("#settings-done")
    page.open(fresh=False)
    page.js("$('mode').value = 'chat'")
    page.ask("Hello")
    body = page.js("return request(state.turns[0])[1]")
    assert body["temperature"] == 0 and body["top_k"] == 5 and body["seed"] == 7 and "top_p" not in body
    assert body["messages"][0] == {"role": "system", "content": "Be short."}


def phone(page: Page) -> None:
    """At 360 points nothing is wider than the screen; a touched token opens the experts below it."""
    page.open(360, 740)
    page.holds("$('panel').hidden")
    page.ask("Hello")
    wide = (
        "[...document.querySelectorAll('body *')].filter(n => n.getBoundingClientRect().right > 361 && n.offsetParent)"
    )
    page.holds(f"document.documentElement.scrollWidth <= 360 && {wide}.length === 0")
    page.picture("phone")
    page.click(".tokens-of .t:nth-child(3)")
    page.holds("!$('panel').hidden && $('panel').getBoundingClientRect().top > 200")
    page.holds(
        "document.querySelector('.t.chosen').getBoundingClientRect().bottom < $('panel').getBoundingClientRect().top"
    )
    page.picture("phone_token")
    page.holds(f"{wide}.length === 0")


def dark(page: Page) -> None:
    """The system's dark scheme is followed until the button says otherwise, and that is kept."""
    page.open(scheme="dark")
    page.holds("document.documentElement.dataset.theme === 'dark'")
    page.ask("Hello")
    page.click(".tokens-of .t:nth-child(9)")
    page.picture("dark")
    page.click("#theme")
    page.open(scheme="dark", fresh=False)
    page.holds("document.documentElement.dataset.theme === 'light'")


def answers_of_the_double(page: Page) -> None:
    """Hostile markup stays text, code is a block, reasoning is folded, a broken stream is said."""
    page.open()
    page.ask("hostile")
    page.holds("document.title === 'manyhands' && !document.querySelector('.text img, .text script')")
    page.ask("code")
    page.holds("document.querySelectorAll('.text pre').length === 1")
    page.holds("document.querySelector('.text pre').textContent.startsWith('def top_k')")
    page.picture("code")
    page.ask("think")
    page.holds("document.querySelector('.text details') && !document.querySelector('.text details').open")
    for name, says in (("break", "the engine stopped"), ("cut", "cut off")):
        page.ask(name)
        page.holds(f"document.querySelector('article:last-child .wrong').textContent.includes('{says}')")


def key(page: Page) -> None:
    """A 401 opens the settings at the key; with it the page works."""
    page.open()
    page.until("$('settings').open && document.activeElement === $('api-key')")
    page.keys("secret", Keys.ENTER)
    page.until("state.models.length === 2 && !$('model').hidden && !$('settings').open")
    page.until("plain()")
    page.ask("Once")
    page.holds("state.turns[0].pieces.length && request(state.turns[0])[1].prompt.startsWith('Once')")
    page.picture("completion")


EVERYWHERE: list[Callable[[Page], None]] = [conversation, touch, heat_map, last_turn, settings, phone, dark]


def try_all(url: str, pictures: Path | None, checks: list[Callable[[Page], None]]) -> bool:
    page = Page(url, pictures)
    try:
        for check in checks:
            print(f"{check.__name__}: {check.__doc__}", flush=True)
            try:
                check(page)
                page.clean()
            except AssertionError as problem:
                print(f"    FAILED: {problem}")
                page.picture("failed")
                return False
    finally:
        page.driver.quit()
    return True


def doubled(**options: Any) -> str:
    double = Double(
        **{"port": 0, "layers": 26, "experts": 256, "key": "", "models": ["tiny-moe"], "delay": 0.01, **options}
    )
    threading.Thread(target=double.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{double.server_port}/"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pictures", type=Path, help="folder for screenshots")
    given = parser.parse_args()
    if given.pictures:
        given.pictures.mkdir(parents=True, exist_ok=True)
    if given.url:
        good = try_all(given.url, given.pictures, EVERYWHERE)
    else:
        good = try_all(doubled(), given.pictures, [*EVERYWHERE, stop, answers_of_the_double])
        good = good and try_all(doubled(key="secret", models=["base", "other"]), given.pictures, [key])
    print("all is well" if good else "not well")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""The page in a browser, against a real server with the shipped model."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from models import write_model

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium"),
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000
"""Milliseconds that a panel may take; the machine may be busy."""
KEY = "a-key-for-tests"
PANELS = ("complete", "score", "bias")


@contextmanager
def server_of(*options: str) -> Iterator[str]:
    """A running `dape serve`; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "dape_server", "serve", *options, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    log: list[str] = []
    listening = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                log.append(line)
                if "Uvicorn running" in line:
                    listening.set()
        listening.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert listening.wait(120), "".join(log)
        assert process.poll() is None, "".join(log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)
        reader.join(60)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server_of() as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, url: str, anchor: str = "", allowed: str = "(?!)", **settings: Any) -> Iterator[Any]:
    """The page in a context of its own; every complaint of the browser but `allowed` is a failure."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **settings})
    complaints: list[str] = []
    foreign: list[str] = []
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else foreign.append(r.url))
    page.goto(url + anchor)
    try:
        yield page
    finally:
        context.close()
    assert [text for text in complaints if not re.search(allowed, text)] == []
    assert foreign == []


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Any]:
    with opened(browser, url) as page:
        expect(page.locator("#model")).to_contain_text("dape-kerple-8m")
        yield page


def says(page: Any, place: str, text: str) -> None:
    expect(page.locator(f"#{place}")).to_contain_text(text, timeout=PATIENCE)


def count_of(text: str) -> int:
    return int(text.replace(",", ""))


def tokens_of(url: str, text: str) -> list[str]:
    answer = httpx.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}, timeout=60)
    return answer.json()["token_strs"]


def test_complete_streams_a_text_with_its_speed(page: Any, url: str) -> None:
    page.fill("#prompt", "It was the best of times, it was")
    page.fill("#max-tokens", "40")
    page.fill("#temperature", "0")
    page.click("#complete-go")
    says(page, "c-status", "The limit of tokens is reached.")
    body = {"prompt": "It was the best of times, it was", "max_tokens": 40, "temperature": 0}
    body |= {"repetition_penalty": 1.1, "top_p": 0.95}
    expected = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
    assert page.locator("#output .made").text_content() == expected
    assert page.locator("#output .prompt").text_content() == body["prompt"]
    assert page.locator("#c-tokens").text_content() == "40"
    assert re.fullmatch(r"\d+ ms|\d+\.\d+ s", page.locator("#c-ttft").text_content())
    assert float(page.locator("#c-rate").text_content()) > 0
    assert page.locator("#output").get_attribute("aria-busy") is None


def test_stop_ends_the_request(page: Any, url: str) -> None:
    page.fill("#max-tokens", "20000")
    page.click("#complete-go")
    expect(page.locator("#c-rate")).not_to_have_text("–")
    assert page.locator("#output").get_attribute("aria-busy") == "true"
    page.click("#complete-stop")
    says(page, "c-status", "Stopped.")
    assert 0 < count_of(page.locator("#c-tokens").text_content()) < 20000
    expect(page.locator("#complete-stop")).to_be_disabled()
    expect(page.locator("#complete-go")).to_be_focused()
    for _ in range(600):  # the engine may be in the middle of a step
        metrics = httpx.get(f"{url}/metrics").text
        if re.search(r"^dape:num_requests_running(\{.*\})? 0\.0$", metrics, re.MULTILINE):
            break
    else:
        pytest.fail("the request still runs")


def test_long_prompts_show_how_far_they_are_read(page: Any) -> None:
    page.fill("#prompt", "The cat sat on the mat and thought about dinner. " * 500)
    page.fill("#max-tokens", "2")
    page.click("#complete-go")
    says(page, "c-status", "Reading the prompt")
    assert " / " in page.locator("#c-prompt").text_content()
    says(page, "c-status", "in all")


def test_failures_are_shown_in_words(browser: Any, url: str) -> None:
    with opened(browser, url, allowed="Failed to load resource") as page:
        page.route("**/v1/completions", lambda route: route.abort())
        page.click("#complete-go")
        says(page, "c-status", "The server cannot be reached.")
        expect(page.locator("#c-status")).to_have_class(re.compile("error"))
        page.unroute("**/v1/completions")
        page.fill("#prompt", "word " * 40_000)
        page.click("#complete-go")
        says(page, "c-status", "above the limit")
        page.fill("#prompt", "word")
        page.click("#complete-go")
        says(page, "c-status", "in all")
        expect(page.locator("#c-status")).not_to_have_class(re.compile("error"))


def test_score_colours_every_token(page: Any, url: str) -> None:
    page.click("#tab-score")
    text = page.input_value("#score-text")
    names = tokens_of(url, text)
    page.click("#score-go")
    says(page, "s-status", f"Scored {len(names)} tokens")
    shown = page.locator("#tokens i")
    expect(shown).to_have_count(len(names))
    assert "".join(shown.all_text_contents()) == "".join(names)
    body = {"input": text, "return_token_logprobs": True}
    (result,) = httpx.post(f"{url}/v1/perplexity", json=body, timeout=60).json()["data"]
    ppl, error = page.locator("#s-ppl").text_content().split(" ± ")
    assert float(ppl) == pytest.approx(result["perplexity"], rel=1e-3)
    assert float(error) == pytest.approx(result["stderr"], rel=1e-2)
    assert float(page.locator("#s-bpb").text_content()) == pytest.approx(result["bits_per_byte"], abs=1e-3)
    assert count_of(page.locator("#s-count").text_content()) == result["num_scored"]
    worst = min(range(1, len(names)), key=lambda place: result["token_logprobs"][place])
    best = max(range(1, len(names)), key=lambda place: result["token_logprobs"][place])
    assert shown.nth(worst).get_attribute("class") == "p9"
    assert shown.nth(best).get_attribute("class") == "p0"
    shown.nth(worst).hover()
    facts = page.locator("#token-facts")
    expect(facts).to_contain_text(f"at position {worst}")
    expect(facts).to_contain_text(f"{result['token_logprobs'][worst]:.2f}")
    expect(facts.locator("tr.own")).to_have_count(1)
    for chart in ("s-position", "s-ladder"):
        expect(page.locator(f"#{chart} canvas")).to_have_count(1)
    assert "512: " in page.locator("#s-ladder").get_attribute("aria-label")


def test_score_shows_characters_of_several_tokens(page: Any) -> None:
    page.click("#tab-score")
    page.fill("#score-text", "A naïve 🙂\nsmile")
    page.click("#score-go")
    says(page, "s-status", "Scored")
    shown = page.locator("#tokens i").all_text_contents()
    assert "".join(shown).replace("·", "") == "A naïve 🙂\nsmile"
    assert shown.count("·") > 2
    page.locator("#tokens i").nth(shown.index("·")).hover()
    expect(page.locator("#token-facts")).to_contain_text("bytes:")


def test_long_texts_are_scored_in_pieces_that_add_up(page: Any, url: str) -> None:
    page.click("#tab-score")
    text = page.input_value("#score-text") * 3
    count = len(tokens_of(url, text))
    assert count > 2048
    page.fill("#score-text", text)
    pieces: list[Any] = []
    page.on("requestfinished", lambda r: pieces.append(r) if r.url.endswith("/v1/perplexity") else None)
    held: list[Any] = []
    last = re.compile("lengths")
    page.route(
        "**/v1/perplexity",
        lambda route: held.append(route) if last.search(route.request.post_data) else route.continue_(),
    )
    with page.expect_request(lambda request: last.search(request.post_data or "")):
        page.click("#score-go")
    says(page, "s-count", f"2,047 of {count:,}")
    expect(page.locator("#tokens i")).to_have_count(2048)
    held[0].continue_()
    says(page, "s-status", f"Scored {count:,} tokens")
    expect(page.locator("#tokens i")).to_have_count(count, timeout=PATIENCE)
    body = {"input": text, "return_token_logprobs": True}
    (result,) = httpx.post(f"{url}/v1/perplexity", json=body, timeout=60).json()["data"]
    shown = page.locator("#s-ppl").text_content().split(" ± ")[0]
    assert float(shown) == pytest.approx(result["perplexity"], rel=1e-3)
    assert len(pieces) == 2
    (first,) = pieces[0].response().json()["data"]
    logprobs = struct.unpack("<2048f", base64.b64decode(first["token_logprobs"]))
    assert logprobs[1:] == pytest.approx(result["token_logprobs"][1:2048], abs=1e-3)


def test_score_reads_files_and_refuses_what_is_no_text(page: Any) -> None:
    page.click("#tab-score")
    page.set_input_files(
        "#score-file", {"name": "a.txt", "mimeType": "text/plain", "buffer": b"Call me Ishmael."}
    )
    says(page, "s-status", "a.txt is ready")
    assert page.input_value("#score-text") == "Call me Ishmael."
    page.set_input_files(
        "#score-file", {"name": "b.bin", "mimeType": "text/plain", "buffer": b"\xff\xfe\x00"}
    )
    says(page, "s-status", "b.bin is not UTF-8 text.")
    page.fill("#score-text", "")
    page.click("#score-go")
    says(page, "s-status", "There is no text to score yet.")


def test_sixteen_thousand_tokens_stay_responsive(page: Any) -> None:
    """Drawn from answers made here: the page's own work is what is measured."""
    count = 16384
    seen: list[int] = []

    def answer(route: Any) -> None:
        body = json.loads(route.request.post_data)
        seen.append(size := len(body["input"]))
        part = {**result, "ladder": result["ladder"] if "lengths" in body else []}
        assert body["window"] == ("full" if size == count else "last")
        part |= {"token_logprobs": packed(logprobs[:size]), "top_logprobs": result["top_logprobs"][:size]}
        whole = {"object": "perplexity", "data": [part]}
        stream = f"data: {json.dumps(whole)}\n\ndata: [DONE]\n\n"
        route.fulfill(body=stream) if body.get("stream") else route.fulfill(json=whole)

    def packed(values: list[float]) -> str:
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()

    logprobs = [float("nan"), *(-(place % 97) / 8 for place in range(1, count))]
    entry = {"num_scored": 256, "nll_sum": 1.0, "perplexity": 50.0, "stderr": 2.0}
    result = {
        "perplexity": 50.0, "stderr": 1.0, "mean_nll": 3.9, "bits_per_byte": 1.3,
        "num_scored": count - 1, "num_bytes": 5 * count,
        "by_position": [{"from": 2**n, "to": 2 ** (n + 1), **entry} for n in range(14)],
        "ladder": [{"length": 2**n, **entry} for n in range(7, 15)],
        "top_logprobs": [None, *([{" a": -1.0, " b": -2.0, " c": -3.0}] * (count - 1))],
    }  # fmt: skip
    split = {"count": count, "max_model_len": 32768, "tokens": [5] * count, "token_strs": [" word"] * count}
    page.route("**/tokenize", lambda route: route.fulfill(json=split))
    page.route("**/v1/perplexity", answer)
    page.click("#tab-score")
    page.locator("html").evaluate(
        """() => {
            let last = performance.now();
            window.longest = 0;
            const beat = () => {
                const now = performance.now();
                window.longest = Math.max(window.longest, now - last);
                last = now;
                requestAnimationFrame(beat);
            };
            requestAnimationFrame(beat);
        }"""
    )
    page.click("#score-go")
    expect(page.locator("#tokens i")).to_have_count(count, timeout=PATIENCE)
    page.locator("#tokens").press("End")
    expect(page.locator("#token-facts")).to_contain_text(f"at position {count - 1}")
    assert seen == [*range(2048, count, 2048), count]  # so that colours appear while the rest is scored
    assert page.locator("html").evaluate("() => window.longest") < 2000


def test_bias_draws_every_head(page: Any, url: str) -> None:
    page.click("#tab-bias")
    text = page.input_value("#bias-text")
    page.click("#bias-go")
    says(page, "b-status", "kerple with DAPE: 6 layers of 8 heads")
    answer = httpx.post(f"{url}/v1/attention_bias", json={"input": text}, timeout=60).json()
    heads = page.locator("#b-charts .head")
    expect(heads).to_have_count(8)
    expect(page.locator("#b-charts canvas")).to_have_count(8)

    def described(head: int) -> tuple[float, ...]:
        label = heads.nth(head).locator(".plot").get_attribute("aria-label")
        assert label.startswith(f"Head {head}: B from ")
        return tuple(float(number) for number in re.findall(r"(?:from|to) (-?[\d.]+)", label))

    def expected(layer: int, head: int) -> tuple[float, ...]:
        values = answer["layers"][layer]["heads"][head]
        rows = (values["static_bias"], values["adapted_bias"])
        return tuple(end(row) for row in rows for end in (min, max))

    page.select_option("#b-layer", "3")
    for head in range(8):
        assert described(head) == pytest.approx(expected(3, head), rel=2e-2, abs=2e-3)
    page.select_option("#b-layer", "5")
    assert described(0) == pytest.approx(expected(5, 0), rel=2e-2, abs=2e-3)
    page.select_option("#b-head", "2")
    expect(page.locator("#b-charts .head")).to_have_count(1)
    page.select_option("#b-axis", "log")
    page.check("#b-scores")
    expect(page.locator("#b-charts canvas")).to_have_count(1)
    page.select_option("#b-head", "all")
    page.fill("#b-query-number", "20")
    expect(page.locator("#b-note")).to_contain_text("All 21 keys are drawn.")
    assert page.input_value("#b-query") == "20"


def test_keyboard_alone_is_enough(page: Any) -> None:
    page.mouse.click(2, 2)  # a browser without a window gives the page no focus by itself
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    for name in ("summary", "#theme", "#tab-complete"):
        page.keyboard.press("Tab")
        expect(page.locator(name)).to_be_focused()
        # Whoever uses keys must see where they are.
        assert page.locator(name).evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-score")).to_be_focused()
    expect(page.locator("#score")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.locator("#score-text")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    says(page, "s-status", "Scored")
    page.locator("#tokens").focus()
    for key, place in (("End", None), ("Home", 0), ("ArrowRight", 1), ("ArrowDown", 11), ("ArrowLeft", 10)):
        page.keyboard.press(key)
        if place is not None:
            expect(page.locator("#token-facts")).to_contain_text(f"at position {place}")
    page.locator("#tab-score").focus()
    page.keyboard.press("End")
    expect(page.locator("#tab-bias")).to_be_focused()
    page.locator("#bias-go").focus()
    page.keyboard.press("Space")
    says(page, "b-status", "6 layers")
    page.locator("#b-query").focus()
    before = int(page.input_value("#b-query"))
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#b-note")).to_contain_text(f"All {before} keys")
    page.locator("#tab-bias").focus()
    page.keyboard.press("Home")
    page.locator("#prompt").press("Control+Enter")
    says(page, "c-status", "in all")


def test_tabs_are_addresses(browser: Any, url: str) -> None:
    with opened(browser, url, "/#bias") as page:
        expect(page.locator("#bias")).to_be_visible()
        expect(page.locator("#complete")).to_be_hidden()


@pytest.mark.parametrize("width", [320, 390])
def test_phone(browser: Any, url: str, width: int) -> None:
    screen = {"viewport": {"width": width, "height": 640}, "has_touch": True, "is_mobile": True}
    with opened(browser, url, **screen) as page:
        for name in PANELS:
            page.tap(f"#tab-{name}")
            if name != "complete":
                page.tap("#score-go" if name == "score" else "#bias-go")
                says(page, f"{name[0]}-status", "Scored" if name == "score" else "6 layers")
                expect(page.locator(f"#{name} canvas").first).to_be_visible()
            assert page.locator("html").evaluate("e => e.scrollWidth") <= width
            small = page.locator("button:visible, .button:visible, select:visible").evaluate_all(
                "all => all.filter(e => e.getBoundingClientRect().height < 36).map(e => e.id)"
            )
            assert small == []


def luminance(page: Any) -> float:
    numbers = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    return sum(float(number) for number in re.findall(r"[\d.]+", numbers)[:3]) / 3


def test_light_and_dark(browser: Any, url: str) -> None:
    with opened(browser, url, color_scheme="dark") as page:
        assert luminance(page) < 40
        page.click("#theme")
        expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
        assert luminance(page) > 200
        page.reload()
        expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: light")
        assert luminance(page) > 200
        page.click("#theme")
        assert luminance(page) < 40
        page.click("#theme")
        expect(page.locator("#theme")).to_have_attribute("aria-label", "Theme: system")
    with opened(browser, url, color_scheme="light") as page:
        assert luminance(page) > 200


def test_guarded_server_takes_its_key_as_the_browsers_password(browser: Any, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    credentials = {"username": "anyone", "password": KEY}
    with server_of(str(folder), "--api-key", KEY, "--kv-cache-memory", "4MiB") as url:
        assert httpx.get(url).status_code == 401
        with opened(browser, url, allowed="401", http_credentials=credentials) as page:
            says(page, "model", "tiny")
            page.fill("#max-tokens", "4")
            page.click("#complete-go")
            says(page, "c-status", "in all")
            page.click("#key-box summary")
            page.fill("#key", "wrong")
            page.keyboard.press("Enter")
            says(page, "model", "The server does not accept this API key.")
            page.fill("#key", KEY)
            page.keyboard.press("Enter")
            says(page, "model", "tiny")
            kept = page.locator("html").evaluate(
                "() => [sessionStorage.length, JSON.stringify(localStorage)]"
            )
            assert kept[0] == 1
            assert KEY not in kept[1]
            assert KEY not in page.content()
            page.reload()
            says(page, "model", "tiny")

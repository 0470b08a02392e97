"""The page in Chromium: a message streams in, stop works, the panel's counters are those of the metrics; pictures of it."""
import json
import re
import sys
import time
import urllib.request

from playwright.sync_api import sync_playwright

url, browser, images = sys.argv[1], sys.argv[2], (sys.argv[3:] + [None])[0]


def get(path):
    return urllib.request.urlopen(url + path).read().decode()


def say(page, text):
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def until(what, is_so):
    """The page forbids scripts from strings, which Playwright's own waiting needs."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def wait(page, state):
    page.locator(f".message.assistant[data-state={state}]").last.wait_for(timeout=60_000)


with sync_playwright() as pw:
    # Without a sandbox, since tests run in containers and as root; it opens our page alone.
    chromium = pw.chromium.launch(executable_path=browser or None, args=["--no-sandbox"])
    noise = []

    def open_page(width, height, scheme):
        page = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        page.on("console", lambda m: noise.append(m.text))
        page.on("pageerror", lambda e: noise.append(str(e)))
        page.goto(url)
        until("connected", lambda: page.inner_text("#status") == "Connected")
        return page

    page = open_page(1280, 800, "light")
    assert page.inner_text("#model") == "prep", page.inner_text("#model")
    page.fill("#max-tokens", "24")
    say(page, "It was a bright morning")
    page.wait_for_selector(".message.assistant[data-state=streaming] .text:not(:empty)", timeout=60_000)
    seen = page.inner_text(".message.assistant .text")
    wait(page, "done")
    whole = page.inner_text(".message.assistant .text")
    assert 0 < len(seen) < len(whole) and whole.startswith(seen.rstrip()), (seen, whole)
    print("a message streams in")

    page.fill("#max-tokens", "200")
    say(page, "And then")
    second = page.locator(".message.assistant .text").nth(1)
    until("some text", lambda: second.count() and len(second.inner_text()) > 10)
    page.click("#stop")
    wait(page, "stopped")
    until("no request runs", lambda: json.loads(get("/api/state"))["sessions"]["busy"] == 0)
    state = json.loads(get("/api/state"))
    assert state["totals"]["abandoned"] == 2, state["totals"]
    print("stop works, and ends the request at the parties")

    # One more, so that there is a newest request which is complete.
    page.click("#new-chat")
    page.fill("#max-tokens", "24")
    say(page, "The ship had left the harbour")
    wait(page, "done")
    page.wait_for_timeout(2500)
    metrics = dict(re.findall(r"^(trefoil_link_\w+_total\{link=\"[^\"]+\"\}) (\d+)$", get("/metrics"), re.M))
    rows = page.locator("#links tr[data-link]")
    compared = 0
    for i in range(rows.count()):
        link = rows.nth(i).get_attribute("data-link")
        for field in ("online_bytes", "ahead_bytes", "messages"):
            shown = rows.nth(i).locator(f'[data-field="{field}"]').get_attribute("data-value")
            counted = metrics.get(f'trefoil_link_{field}_total{{link="{link}"}}', "")
            assert shown == counted, (link, field, shown, counted)
            compared += counted != ""
    assert compared == 12, compared
    print(f"{compared} counters of the panel are those of the metrics")

    samples = json.loads(get("/api/state"))["samples"]
    # On its other links the client has nothing but control messages and single tokens.
    assert samples["client->owner"]["entropy"] > 7.7, samples
    assert not noise, noise
    if images:
        for name, size in {"desktop": (1280, 800), "phone": (390, 844)}.items():
            for scheme in ("light", "dark"):
                shot = open_page(*size, scheme)
                shot.fill("#max-tokens", "24")
                say(shot, "The ship had left the harbour")
                wait(shot, "done")
                shot.wait_for_timeout(1500)
                wide = shot.evaluate("document.documentElement.scrollWidth")
                assert wide <= size[0], (name, wide)
                shot.screenshot(path=f"{images}/{name}-{scheme}.png", full_page=name == "phone")
                shot.context.close()
    chromium.close()

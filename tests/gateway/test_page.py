"""The page at `/` in a real browser: what a person sees and does, at any width, in either light."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.config import GatewaySpec
from serving.gateway.http import make_app
from tests import tiny
from tests.gateway.harness import House, house
from tests.gateway.ingress import http_port, patient  # noqa: F401  (used by being here)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
FLAGS += ["--disable-component-update", "--disable-sync"]
SIZES = {"wide": (1280, 860), "phone": (390, 844)}


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[House, str]]:
    folders = tmp_path_factory.mktemp("models")
    plain = tiny.checkpoint(folders / "plain")
    looped = tiny.checkpoint(folders / "looped", tiny.LOOPED, scale=2.5)
    async with (
        house(plain, looped, slots=4, max_tokens=4096) as h,
        http_port(make_app(h.requests, h.fleet, GatewaySpec(), h.metrics)) as url,
    ):
        yield h, url
        await h.idle()


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    playwright = pytest.importorskip("playwright.async_api", reason="playwright drives the browser")
    async with playwright.async_playwright() as started:
        made = await started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        await made.close()


@asynccontextmanager
async def page(browser: Any, url: str, size: str = "wide", scheme: str = "light") -> AsyncIterator[Any]:
    """The page, ready. Afterwards: nothing went wrong in it, and it asked nobody but its server."""
    width, height = SIZES[size]
    context = await browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened, faults, asked = await context.new_page(), [], []
    opened.on("pageerror", lambda error: faults.append(str(error)))
    opened.on("console", lambda said: faults.append(said.text) if said.type in ("error", "warning") else None)
    opened.on("request", lambda request: asked.append(request.url))
    await opened.goto(url + "/")
    await opened.wait_for_selector("#server.ready")
    yield opened
    await context.close()
    assert not [fault for fault in faults if "status of 400" not in fault]  # those the browser logs by itself
    assert all(address.startswith((url, "data:")) for address in asked)


async def complete(opened: Any, tokens: int, **options: str) -> None:
    """By keyboard, to the end."""
    for name, value in {"temperature": "1.5", **options}.items():
        await opened.fill(f"#{name}", value)
    await opened.fill("#max_tokens", str(tokens))
    await opened.focus("#prompt")
    await opened.keyboard.press("Control+Enter")


async def colours(opened: Any) -> dict[int, set[str]]:
    """The backgrounds of the tokens of each depth."""
    pairs = await opened.evaluate(
        "() => [...document.querySelectorAll('.token')].map(t => [t.told.depth, getComputedStyle(t).backgroundColor])"
    )
    found: dict[int, set[str]] = {}
    for depth, colour in pairs:
        found.setdefault(depth, set()).add(colour)
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
async def test_every_token_has_the_colour_of_its_depth(
    served: tuple[House, str], browser: Any, tmp_path: Path, size: str, scheme: str
) -> None:
    """FATHOM_SCREENSHOTS names a folder for the pictures."""
    async with page(browser, served[1], size, scheme) as opened:
        await opened.select_option("#model", "looped")
        await opened.select_option("#policy", "gate")
        await complete(opened, 120)
        await opened.wait_for_selector("#summary b")
        found = await colours(opened)
        assert len(found) > 1, "the random model takes more than one depth"
        assert all(len(of_one) == 1 for of_one in found.values())
        assert len({colour for of_one in found.values() for colour in of_one}) == len(found)
        text = await opened.inner_text("#summary")
        assert "tokens/s" in text and "of 3 mean depth" in text
        assert len(await opened.query_selector_all("#depths .bar")) == 3
        wide, seen = await opened.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= seen, "nothing sticks out to the side"
        await opened.wait_for_selector("#rows .area", state="attached")  # the chart has heard of it
        folder = Path(os.environ.get("FATHOM_SCREENSHOTS", tmp_path))
        picture = await opened.screenshot(path=folder / f"{size}-{scheme}.png", full_page=True)
        assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


async def test_escape_stops_and_frees_the_slot(served: tuple[House, str], browser: Any) -> None:
    async with page(browser, served[1]) as opened:
        await opened.select_option("#model", "plain")
        await complete(opened, 4000, temperature="0")
        await opened.wait_for_selector(".token:nth-of-type(5)", state="attached")
        assert await opened.is_visible("#stop") and not await opened.is_visible("#start")
        await opened.keyboard.press("Escape")
        await opened.wait_for_selector("#start", state="visible")
        assert "stopped" in await opened.inner_text("#summary")
    await served[0].idle()


async def test_arrow_keys_tell_of_a_token(served: tuple[House, str], browser: Any) -> None:
    async with page(browser, served[1]) as opened:
        await opened.select_option("#model", "looped")
        await complete(opened, 8)
        await opened.wait_for_selector("#summary b")
        await opened.focus("#output")
        await opened.keyboard.press("End")
        told = await opened.inner_text("#tip")
        assert "of 3" in told and "log -" in told
        await opened.keyboard.press("Escape")
        assert not await opened.is_visible("#tip")


async def test_what_a_policy_needs_is_asked_for_and_what_is_wrong_is_said(
    served: tuple[House, str], browser: Any
) -> None:
    async with page(browser, served[1]) as opened:
        await opened.select_option("#model", "looped")
        fields = {"fixed": "depth", "gate": "threshold", "converged": "measure", "deadline": "seconds"}
        for policy, field in fields.items():
            await opened.select_option("#policy", policy)
            assert await opened.is_visible(f"#{field}"), policy
        await opened.select_option("#policy", "fixed")
        await opened.select_option("#depth", "2")
        await complete(opened, 6)
        await opened.wait_for_selector("#summary b")
        assert set(await colours(opened)) == {2}
        await opened.select_option("#model", "plain")
        await opened.select_option("#policy", "chain")
        await complete(opened, 6, layers="0, 77")
        await opened.wait_for_selector("#problem:not([hidden])")
        assert "77" in await opened.inner_text("#problem")
        assert await opened.is_visible("#start")


async def test_its_labels(served: tuple[House, str], browser: Any) -> None:
    """Whatever can be used has a name for those who do not see it."""
    async with page(browser, served[1], "phone") as opened:
        for role, name in (
            ("textbox", "Prompt"),
            ("combobox", "Model"),
            ("combobox", "Depth"),
            ("button", "Continue"),
        ):
            assert await opened.get_by_role(role, name=name, exact=True).count() == 1, name
        assert await opened.get_by_role("img", name="Rows per tick by depth, the last minute").count() == 1


async def test_it_loads_nothing_from_elsewhere(served: tuple[House, str]) -> None:
    async with httpx.AsyncClient(base_url=served[1], timeout=60) as client:
        page = await client.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for name in ("page.css", "page.js", "chart.js", "live.js"):
            file = await client.get(f"/{name}")
            assert file.status_code == 200 and "://" not in file.text.replace(
                "http://www.w3.org/2000/svg", ""
            )
        assert (await client.get("/index.html")).status_code == 404

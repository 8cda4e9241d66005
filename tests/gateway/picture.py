"""Takes the README's picture of the page, of a server that runs.

python -m tests.gateway.picture http://localhost:8000 looped-gla docs/page.png --threshold 0.65
"""

import argparse

from playwright.sync_api import sync_playwright

from tests.gateway.test_page import CHROMIUM, FLAGS

SET_RANGE = """([id, value]) => {
  const element = document.getElementById(id);
  element.value = value;
  element.dispatchEvent(new Event("input"));
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("url", "model", "file"):
        parser.add_argument(name)
    parser.add_argument("--threshold", default="0.65")
    parser.add_argument("--tokens", default="110")
    given = parser.parse_args()
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(given.url)
        page.wait_for_selector(f"#model option[value='{given.model}']", state="attached")
        page.select_option("#model", given.model)
        page.select_option("#policy", "gate")
        page.evaluate(SET_RANGE, ["threshold", given.threshold])
        page.fill("#max_tokens", given.tokens)
        page.fill("#temperature", "0.6")
        page.click("#start")
        page.wait_for_selector("#summary b", timeout=120_000)
        page.wait_for_timeout(1500)  # the charts hear of it
        page.screenshot(path=given.file)
        print(page.inner_text("#summary"))
        browser.close()


if __name__ == "__main__":
    main()

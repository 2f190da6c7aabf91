"""The parts of the annotated page that a reader can move, in a browser."""

import json

import pytest
import torch
import torch.nn.functional as F

import checkpoint
from browsing import click, enter, set_window, text
from docs import numbers
from helpers import ROOT, text_of
from orchmoe import OrchMoEConfig, TaskRouter

EXPLORED = json.loads(text_of("docs/explorer.json"))
PARTS = "#family, #by-hand, #reader, #training, #guess, #evidence"

# ------------------------------------------------------------------------------------- the layout

# What is wrong with how the page is laid out, as texts. All that is folded is open.
#
# scrolls: the page is wider than the window. cut: a part reaches beyond the window, or a box that
# scrolls sideways hides some of it. overlap: two parts side by side or above each other cover the
# same place. spilt: a text is wider than its box.
FLAWS = """
document.querySelectorAll("details").forEach((part) => (part.open = true));
const flaws = [];
const name = (part) =>
  part.tagName + "#" + part.id + "." + part.className + ": " + part.textContent.slice(0, 40);
if (document.documentElement.scrollWidth > innerWidth) flaws.push("scrolls");
document.querySelectorAll("main *:not(svg *, math *, .weight label *)").forEach((part) => {
  const style = getComputedStyle(part);
  const box = part.getBoundingClientRect();
  const isWide = part.scrollWidth > part.clientWidth + 1;
  const isCut = style.overflowX !== "visible" && style.textOverflow !== "ellipsis" && isWide;
  if (box.right > innerWidth + 1 || isCut) flaws.push("cut " + name(part));
  const isText = part.clientWidth && !part.matches("input");
  if (part.matches(".hand *, .reader *, .training *, .family *") && isText && isWide)
    flaws.push("spilt " + name(part));

  const boxes = [];
  for (const child of part.matches("svg, math, pre") ? [] : part.children) {
    const { display, position } = getComputedStyle(child);
    if (display.startsWith("inline") || position === "sticky") continue;
    const here = child.getBoundingClientRect();
    for (const [other, there] of boxes) {
      const across = Math.min(here.right, there.right) - Math.max(here.left, there.left);
      const down = Math.min(here.bottom, there.bottom) - Math.max(here.top, there.top);
      if (across > 1 && down > 1) flaws.push("overlap " + name(child) + " / " + name(other));
    }
    boxes.push([child, here]);
  }
});
return flaws;
"""

# The texts of some parts that have too little contrast with what is behind them.
FAINT = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function luminance(...colours) {
  for (const colour of colours) {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
  }
  const [red, green, blue] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
const faint = [];
for (const part of document.querySelectorAll(arguments[0])) {
  for (const child of part.querySelectorAll("*:not(svg *)")) {
    const hasText = [...child.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    const style = getComputedStyle(child);
    if (!hasText || style.visibility === "hidden" || child.matches("option")) continue;
    const behind = [];
    for (let part = child; part; part = part.parentElement)
      behind.unshift(getComputedStyle(part).backgroundColor);
    const ground = luminance(...behind);
    const ink = luminance(...behind, style.color);
    const contrast = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
    if (contrast < 4.5) faint.push(child.textContent.slice(0, 40) + " " + contrast.toFixed(2));
  }
}
return faint;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_of_the_page_is_cut_covered_or_faint(annotated, theme):
    scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    annotated.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    for width in (390, 400, 768, 900, 1151, 1152, 1280, 1400, 1920):
        set_window(annotated, width)
        for mixed in ("outputs", "factors"):
            click(annotated, f"#hand-{mixed}")
            assert annotated.execute_script(FLAWS) == [], (width, mixed)
            assert annotated.execute_script(FAINT, PARTS) == [], (width, mixed)


def test_the_drawing_stands_beside_the_first_steps_of_a_wide_page(annotated):
    script = """const box = (selector) => document.querySelector(selector).getBoundingClientRect();
        const drawing = box("#idea figure");
        const steps = box("#idea ol");
        return [drawing.top <= steps.top, drawing.left >= steps.right];"""
    for width, expected in ((400, [False, False]), (900, [True, True]), (1400, [True, True])):
        set_window(annotated, width)
        assert annotated.execute_script(script) == expected, width


# ------------------------------------------------------------------------------------ by keyboard


def test_all_that_moves_can_be_reached_and_moved_by_keys(annotated):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key, times=1):
        keys = ActionChains(annotated)
        for _ in range(times):
            keys.send_keys(key)
        keys.perform()

    def focus_on(wanted):
        """Press the tab key until the part has the focus."""
        script = """const part = document.activeElement;
            return part.tagName === "SUMMARY" ? part.textContent : part.id || part.value || "";"""
        for _ in range(150):
            press(Keys.TAB)
            if annotated.execute_script(script).startswith(wanted):
                return
        raise AssertionError(f"the tab key does not reach {wanted}")

    def says(name):
        return text(annotated, f"#{name}-says")

    set_window(annotated, 900)
    focus_on("All prompts get the same w")
    press(Keys.ENTER)
    assert "One LoRA. If w is the same" in text(annotated, "#guess")
    focus_on("hand-outputs")
    press(Keys.ARROW_RIGHT)
    assert says("hand").startswith("Factors")
    focus_on("hand-w")
    press(Keys.END)
    assert text(annotated, "#hand-c0") == text(annotated, "#hand-Zhat00")
    for name in ("Z00", "Z01", "Z10", "Z11"):
        focus_on(f"hand-{name}")
        press(Keys.HOME)
    assert text(annotated, "#hand-c0") == "0.50"

    focus_on("typed")
    before = says("reader")
    press("How many apples?")
    assert says("reader") != before
    focus_on("input")  # a button
    press(Keys.ENTER)
    sample = EXPLORED["samples"][EXPLORED["first"]]
    typed = annotated.find_element("id", "typed")
    assert typed.get_attribute("value") == sample["input"]
    focus_on("towards")
    before = text(annotated, "#tokens")
    press(Keys.HOME)
    assert text(annotated, "#tokens") != before

    focus_on("training-step")
    press(Keys.HOME)
    assert says("training").startswith("After 0 steps")
    press(Keys.ARROW_RIGHT)
    step = EXPLORED["training"]["trained"][1]["step"]
    assert says("training").startswith(f"After {step} steps")


# ---------------------------------------------------------------------------- two skills by hand


def matrix(browser, selector):
    """Return the numbers of a heat map."""
    script = """return [...document.querySelectorAll(arguments[0] + " tr")].map((row) =>
        [...row.cells].map((cell) => Number(cell.textContent.replace("\u2212", "-"))));"""
    return torch.tensor(browser.execute_script(script, selector), dtype=torch.float32)


def test_outputs_and_factors_by_hand_are_those_of_torch(annotated):
    A = torch.tensor([[1, 0.5, 0, 0], [0, 0, 0.5, 1]])
    B = torch.tensor([[1, -0.5, 0, 0], [0, 0, -0.5, 1]])
    Z = torch.tensor([[1.5, -0.5], [-3.0, 2.0]])
    w = torch.tensor([0.35, 0.65])
    enter(annotated, "hand-w", 0.35)
    for k in range(2):
        for s in range(2):
            enter(annotated, f"hand-Z{k}{s}", Z[k, s].item())
    c = w @ (Z.sigmoid() / Z.sigmoid().sum(dim=-1, keepdim=True))
    outputs = sum(c[s] * torch.outer(B[s], A[s]) for s in range(2))
    factors = torch.outer(c @ B, c @ A)

    close = {"atol": 0.0051, "rtol": 0}  # the page has two decimals
    assert not annotated.find_elements("css selector", "#hand .lit")
    torch.testing.assert_close(matrix(annotated, "#hand-sum"), outputs, **close)
    assert "rank 2" in text(annotated, "#hand-says")
    click(annotated, "#hand-factors")
    torch.testing.assert_close(matrix(annotated, "#hand-sum"), factors, **close)
    assert "rank 1" in text(annotated, "#hand-says")
    lit = annotated.find_elements("css selector", "#hand .lit")
    assert [part.get_attribute("id") for part in lit] == ["hand-term01", "hand-term10"]
    cross = c[0] * c[1] * torch.outer(B[0], A[1])
    torch.testing.assert_close(matrix(annotated, "#hand-term01"), cross, **close)


# ------------------------------------------------------------------------------------- the router

TEXTS = [
    "",
    "a",
    "Definition: Write the opposite of each adjective.",
    "How many apples does Olga have? Count them: 12, 7 and 305.",
    "In Cairo, Jack the gardener washed an ugly ship on Sunday.",
    "  white   space\tof \n\n many kinds\r\n",
    "Ünïcödé áccents: café, naïve, Ångström, señor",
    "e\u0301 combining a\u0308 and precomposed é ä",
    "ﬁne ﬂow ½ ① Ａｂｃ １２３ … ™ ²",
    "unknown: ☃☃ 日本語 한국어 русский",
    "😀 emoji 👩‍👩‍👧 in a row 😀😀",
    "</s><pad><unk><extra_id_0> are spelt out",
    "▁▁ the mark of a space ▁word",
    "zero\u200bwidth \ufeffmark \u00a0no break \u3000wide\u2028line",
    "control\x01 \x07characters\x7f go\x0b",
    "tilde ~ and wide \uff5e tilde",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb xyzzyxyzzy",
    "UPPER lower MiXeD 'quoted' \"twice\" (and) [more] {signs} <&> \\ / | ^ _ `",
    "titletitle thethethe theperson-and-the-thing.Output:Input:",
    "Many sentences follow each other. " * 40,
]


def test_page_and_python_read_the_same_tokens_and_w(annotated, tiny_words):
    router = TaskRouter(len(EXPLORED["router"]["mu"]), OrchMoEConfig().abstract_tasks)
    values = {name: torch.tensor(value) for name, value in EXPLORED["router"].items()}
    router.load_state_dict(values)
    base = checkpoint.load(ROOT / "tiny")
    for typed in TEXTS:
        found = annotated.execute_script(
            "const tokens = reader.tokenise(arguments[0]);"
            "return { ids: tokens.map((token) => token.id), ...reader.route(tokens) };",
            typed,
        )
        ids = tiny_words.encode(typed)
        assert found["ids"] == ids, typed
        with torch.no_grad():
            embeddings = base.embed(torch.tensor([ids]))
            w = router(embeddings)[0]
            logits = F.linear((router.summarise(embeddings) - router.mu) / router.sd, router.W_task)
        torch.testing.assert_close(torch.tensor(found["w"]), w, atol=1e-3, rtol=0)
        shares = torch.tensor(found["shares"]).sum(dim=0)
        torch.testing.assert_close(shares, logits[0], atol=0.02, rtol=1e-3)


def test_a_typed_text_shows_its_tokens_w_c_and_the_share_of_each_token(annotated):
    enter(annotated, "typed", "Count the fruits. ☃")
    found = annotated.execute_script(
        "const tokens = reader.tokenise('Count the fruits. ☃');"
        "return { texts: tokens.map((token) => token.text), ...reader.route(tokens) };"
    )
    shown = annotated.find_elements("css selector", "#tokens b")
    assert [part.text for part in shown] == found["texts"]
    assert "1 of them stand" in text(annotated, "#reader-says")
    cells = annotated.find_elements("css selector", "#typed-w td")
    assert [cell.text for cell in cells] == [f"{value:.2f}" for value in found["w"]]
    n = EXPLORED["linears"].index(EXPLORED["walk"]["linear"])
    c = torch.tensor(found["w"]) @ torch.tensor(EXPLORED["Zhat"][n])
    cells = annotated.find_elements("css selector", "#typed-c td")
    shown_c = torch.tensor([float(cell.text) for cell in cells])
    torch.testing.assert_close(shown_c, c, atol=0.006, rtol=0)

    enter(annotated, "towards", 2)
    shares = torch.tensor(found["shares"])
    expected = shares[:, 2] - shares.mean(dim=1)
    numbers_shown = [part.text for part in annotated.find_elements("css selector", "#tokens i")]
    moved = torch.tensor([float(number.replace("\u2212", "-")) for number in numbers_shown])
    torch.testing.assert_close(moved, expected, atol=0.006, rtol=0)


def test_reversed_words_have_the_same_w(annotated):
    click(annotated, "#reader-texts [value=prompt]")
    cells = [part.text for part in annotated.find_elements("css selector", "#typed-w td")]
    before = annotated.find_element("id", "typed").get_attribute("value")
    click(annotated, "#reader-texts [value=reversed]")
    assert annotated.find_element("id", "typed").get_attribute("value") != before
    after = [part.text for part in annotated.find_elements("css selector", "#typed-w td")]
    assert after == cells


# ------------------------------------------------------------------------------ training by steps


def test_the_slider_shows_each_stop_of_both_trainings(annotated):
    training = EXPLORED["training"]
    script = "return [...document.querySelectorAll(arguments[0])].map((cell) => cell.textContent)"
    stops = list(zip(training["trained"], training["frozen"], strict=True))
    assert len(stops) == numbers.STOPS + 1
    for i, twins in enumerate(stops):
        enter(annotated, "training-step", i)
        for part in ("w", "Zhat"):
            expected = []
            for rows in zip(*(torch.tensor(stop[part]) for stop in twins), strict=True):
                values = torch.cat(rows)
                if part == "Zhat":
                    values = (100 * values).round().int()
                expected += [str(value) if value >= 10 else "" for value in values.tolist()]
            assert annotated.execute_script(script, f"#training-{part} .cell") == expected
        said = text(annotated, "#training-says")
        for stop in twins:
            assert f"is {stop['loss']:.2f}" in said or f"and {stop['loss']:.2f}" in said

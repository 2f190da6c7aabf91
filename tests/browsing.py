"""What the tests of pages in a browser share."""


def click(browser, selector):
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def text(browser, selector):
    return browser.find_element("css selector", selector).text


def enter(browser, name, value):
    """Give a slider, a list or a field this value, as a hand does."""
    script = """const part = document.getElementById(arguments[0]);
        part.value = arguments[1];
        part.dispatchEvent(new Event("input", { bubbles: true }));
        part.dispatchEvent(new Event("change", { bubbles: true }));"""
    browser.execute_script(script, name, value)


def set_window(browser, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

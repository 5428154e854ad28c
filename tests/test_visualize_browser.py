"""The page of lab/visualize.py in a real browser.

It takes Debian's packages chromium and chromium-driver, and selenium. Where they are missing the
tests are skipped; where the environment variable CI is set, they fail.
"""

import os
import shutil

import numpy as np
import pytest
import torch

from lab.visualize import page, read
from test_model import make, tokens
from test_visualize import content_of

try:
    from selenium import webdriver
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait
except ImportError:
    webdriver = None

pytestmark = pytest.mark.slow

# What must show as text: markup, quotes, right to left, and escapes of what acts
HOSTILE = [
    '</script>',
    '<script>document.title = "owned"</script>',
    '<img src=x onerror=alert(1)>',
    '<!--',
    '-->',
    '"DATA"',
    '&amp;',
    ' \'"',
    '\n\n',
    'שלום',
    ' עולם',
    'טוב',
    '\\u202e',
]
TOKENS = HOSTILE + ['·', 'a', 'b'] * 20
T = len(TOKENS)
ROWS = np.arange(T)
BUDGETS = [12, 30]


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    programs = [shutil.which('chromium'), shutil.which('chromedriver')]
    if not webdriver or not all(programs):
        refuse = pytest.fail if os.environ.get('CI') else pytest.skip
        refuse('these tests need chromium, chromium-driver and selenium')
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in 'headless', 'no-sandbox', f'user-data-dir={tmp_path_factory.mktemp("chromium")}':
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Browser:
    """A browser that shows a page, and the Reading that is in it."""

    def __init__(self, driver, path):
        self.driver = driver
        self.path = path

    def open(self):
        """Open a model's page from disk."""
        gpt = make(dtype=torch.float32, block_size=T, spread=0.2, selective=True)
        self.reading = read(gpt, tokens(1, T), BUDGETS)
        html = page(self.reading, TOKENS, '<i>title', BUDGETS)
        self.path.write_text(html)
        self.M = np.array(content_of(html)['M'])
        size = dict(width=1200, height=1600, deviceScaleFactor=1, mobile=False)
        self.driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
        self.load('document.body.dataset.ready')

    def load(self, condition):
        """Load the page and wait until a script's value is true."""
        self.driver.get(self.path.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: self.js(condition))

    def js(self, expression, *args):
        return self.driver.execute_script(f'return {expression}', *args)

    def each(self, css, expression):
        """The values of a script's expression of e, for each element of a selector."""
        return self.js(f'[...document.querySelectorAll(arguments[0])].map(e => {expression})', css)

    def texts(self, css):
        return self.each(css, 'e.textContent')

    def tokens(self, css_class):
        """The tokens of the text that have this class."""
        return self.each(f'#text .{css_class}', '[...e.parentNode.children].indexOf(e)')

    def style(self, name):
        """A custom property of each token of the text, as numbers."""
        return np.array(self.each('#text span', f'+e.style.getPropertyValue("{name}")'))

    def find(self, css):
        return self.driver.find_element('css selector', css)

    def actions(self):
        return webdriver.ActionChains(self.driver)

    def choose(self, **values):
        for name, value in values.items():
            self.each(f'#{name}', f'[e.value = "{value}", e.dispatchEvent(new Event("change"))]')

    def shares(self, l):
        """(T, T) what is left of each column's attention, and what each row's votes take of it."""
        kept = ROWS[:, None] < self.reading.dropped_at[l]
        left = np.tril(np.exp(-self.reading.F[l]) * kept)
        return left, np.tril(left * (1 - np.exp(-self.reading.votes[l])), -1)

    def check_text(self, row, l):
        """The text shows what layer l makes of this row."""
        left, taken = self.shares(l)
        dropped = self.reading.dropped_at[l] <= row
        assert self.tokens('now') == [row]
        assert self.tokens('later') == list(range(row + 1, T))
        assert self.tokens('dropped') == np.flatnonzero(dropped[: row + 1]).tolist()
        np.testing.assert_allclose(self.style('--keep'), left[row], atol=0.015)
        np.testing.assert_allclose(self.style('--taken') ** 2, taken[row], atol=0.02)

    def check_table(self, row, l):
        """A line of the table shows what layer l does with the token of this row."""
        tr = f'#layers tr:nth-child({l + 1}) '
        dropped_at = self.reading.dropped_at[l]
        gone = (self.reading.F[l] >= 1) | (ROWS[:, None] >= dropped_at)
        assert self.texts(tr + '.seen') == [f'{row - gone[row, :row].sum()} of {row}']
        when = T - gone[:, row].sum()
        [forgotten] = self.texts(tr + '.forgotten')
        assert forgotten.startswith('not' if when == T else f'at {when}')
        assert forgotten.endswith('dropped') == (dropped_at[row] == when < T)
        _, taken = self.shares(l)
        for name, share in ('takes', taken[row]), ('loses', taken[:, row]):
            [text] = self.texts(tr + f'.{name}')
            largest = [f':\xa0{100 * share.max() + d:.0f}\xa0%' for d in (-1, 0, 1)]
            assert share.max() < 0.01 or any(part in text for part in largest)


@pytest.fixture
def empty(driver, tmp_path):
    """A Browser without a page; after the test nothing may have been logged to the console."""
    yield Browser(driver, tmp_path / 'page.html')
    assert driver.get_log('browser') == []


@pytest.fixture
def browser(empty):
    """A Browser with a page."""
    empty.open()
    return empty


def test_hostile_text_shows_as_text(browser):
    assert browser.texts('#text span') == [t.replace('\n', '⏎\n') for t in TOKENS]
    assert browser.texts('span span, #title *') == [] and browser.texts('#title') == ['<i>title']
    assert browser.js('document.scripts.length') == 2
    # tokens stand in the order of the text, whatever the direction of their script
    lefts = browser.each('#text span', 'e.getBoundingClientRect().left')[9:12]
    assert lefts == sorted(lefts)


def test_where_the_text_is_read_from(browser):
    """Pointing, tapping, the slider and keys choose the row; the layer is chosen for all views."""
    l = browser.M.max(axis=1).argmax()  # the layer that is shown first
    browser.check_text(T - 1, l)
    spans = browser.driver.find_elements('css selector', '#text span')
    for row in 0, 12, 63:
        browser.actions().move_to_element(spans[row]).perform()
        browser.check_text(row, l)
        browser.check_table(row, 0)
        browser.check_table(row, 1)
    spans[50].click()
    browser.actions().move_to_element(browser.find('h1')).perform()
    browser.check_text(50, l)
    browser.find('#time').send_keys(Keys.ARROW_LEFT * 7)
    assert browser.texts('#now') == [f'43 of {T - 1}']
    browser.choose(layer=1 - l)
    browser.check_text(43, 1 - l)
    spans[43].send_keys(Keys.ARROW_RIGHT)
    browser.find('#map').send_keys(Keys.ARROW_UP * 9 + Keys.ARROW_RIGHT * 2)
    browser.check_text(35, 1 - l)
    assert f'column 2, “{TOKENS[2]}”' in browser.texts('#cell')[0]


def test_heat_map(browser):
    l = 1
    browser.choose(layer=l)
    dropped_at = browser.reading.dropped_at[l]
    image = 'document.getElementById("map").getContext("2d").getImageData(0, 0, ...arguments)'
    red = np.array(browser.js(f'[...{image}.data.filter((_, n) => n % 4 == 0)]', T, T))
    expected = 255 - 255 * browser.shares(l)[0]
    expected[ROWS[:, None] >= dropped_at] = 190
    expected[ROWS[:, None] < ROWS] = 240
    np.testing.assert_allclose(red.reshape(T, T), expected, atol=4)

    canvas = browser.find('#map')
    size = canvas.size['width'] / T
    x, y = int((19.5 - T / 2) * size), int((20.5 - T / 2) * size)
    browser.actions().move_to_element_with_offset(canvas, x, y).perform()
    F, S = browser.reading.F[l][20, 19], browser.reading.votes[l][20, 19]
    [text] = browser.texts('#cell')
    assert f'F = {F:.2f}' in text and f'S = {S:.2f}.' in text


def test_needs(browser):
    curves = browser.each('#needs .curve', '[...e.points].map(p => p.y)')
    for l, (M, caption) in enumerate(zip(browser.M, browser.texts('#needs figcaption'))):
        numbers = f'{M[-1]:.1f} here, {M.max():.1f} at most; budget {BUDGETS[l]}'
        assert caption == f'Layer {l}: {numbers}'
        assert np.corrcoef(curves[l], M)[0, 1] == pytest.approx(-1, abs=1e-4)  # y points down


def test_says_when_it_cannot_be_drawn(empty):
    empty.open()
    html = empty.path.read_text()
    empty.path.write_text(html.replace("DecompressionStream('deflate')", 'Missing()'))
    empty.load('!document.getElementById("failure").hidden')
    assert 'could not be drawn' in empty.texts('#failure')[0]
    assert len(empty.driver.get_log('browser')) == 1

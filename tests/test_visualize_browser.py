"""The page of lab/visualize.py in a real browser: Debian's packages chromium and chromium-driver, and selenium.

Where they are missing the tests are skipped; where the environment variable CI is set, they fail.
"""
import os
import re
import shutil

import numpy as np
import pytest
import tiktoken
import torch

from lab.visualize import page, read, token_texts
from test_model import make

# What must show as text: markup, quotes, right to left, controls, broken UTF-8; a token each, and then byte by byte
WORDS = [word.encode() for word in ('</script>', '<script>document.title = "owned"</script>', '<img src=x onerror=alert(1)>', '<!--', '-->',
                                    '"DATA"', '&amp;', ' \'"', '\n\n', 'שלום', ' עולם', 'טוב', '\u202e', '\u2028')] + [b'\xff\xc3(', b'\xe2\x82']
TOKENIZER = tiktoken.Encoding('words', pat_str='.', special_tokens={}, mergeable_ranks={
    raw: i for i, raw in enumerate([bytes([i]) for i in range(256)] + WORDS)})
IDS = [*range(256, 256 + len(WORDS)), *b''.join(WORDS)[:60]]
TOKENS = token_texts(IDS, TOKENIZER)
T = len(IDS)
BUDGETS = [12, 30]


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    program, driver = shutil.which('chromium') or shutil.which('google-chrome'), shutil.which('chromedriver')
    try:
        from selenium import webdriver
    except ImportError:
        program = None
    if not program or not driver:
        (pytest.fail if os.environ.get('CI') else pytest.skip)('these tests need chromium, chromium-driver and selenium')
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ('headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
                 'disable-component-update', 'disable-sync', 'window-size=1200,1600',
                 f'user-data-dir={tmp_path_factory.mktemp("chromium")}'):
        options.add_argument('--' + flag)
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield driver
    driver.quit()


def open_page(browser, folder, scheme='light', width=1200, **config):
    """A model's page, opened from disk; returns the Reading that it shows."""
    gpt = make(dtype=torch.float32, vocab_size=256 + len(WORDS), block_size=T, spread=0.2, **config)
    budgets = BUDGETS if gpt.config.selective else None
    reading = read(gpt, torch.tensor([IDS]), budgets)
    path = folder / 'page.html'
    path.write_text(page(reading, TOKENS, '<i>title', 'facts', gpt.config, budgets), encoding='utf-8')
    browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]})
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', {'width': width, 'height': 1600, 'deviceScaleFactor': 1, 'mobile': False})
    browser.get_log('browser')
    browser.get(path.as_uri())
    wait(browser, 'return document.body.dataset.ready')
    return reading


def wait(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, 20).until(lambda d: d.execute_script(script))


@pytest.fixture
def both(browser, tmp_path):
    """A page of both methods with budgets; after the test, nothing may have been logged to the console."""
    yield open_page(browser, tmp_path, selective=True, ssa='qv')
    assert browser.get_log('browser') == []


def actions(browser):
    from selenium.webdriver import ActionChains
    return ActionChains(browser)


def texts(browser, css):
    return browser.execute_script('return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)', css)


def styles(browser, name):
    """A custom property of each token of the text, as numbers."""
    return np.array(browser.execute_script('return [...document.querySelectorAll("#text span")].map('
                                           'e => +e.style.getPropertyValue(arguments[0]))', name))


def classes(browser, name):
    """The tokens of the text that have this class."""
    return browser.execute_script('return [...document.querySelectorAll("#text span")].flatMap('
                                  '(e, j) => e.classList.contains(arguments[0]) ? [j] : [])', name)


def choose(browser, select, value):
    browser.execute_script('const s = document.getElementById(arguments[0]); s.value = arguments[1];'
                           's.dispatchEvent(new Event("change"))', select, str(value))


def shares(reading, l):
    """What is left of each column's attention at each row, and what the row's votes take of it, (T, T)."""
    left = np.tril(np.exp(-reading.F[l]) * (np.arange(T)[:, None] < reading.dropped_at[l]))
    return left, np.tril(left * (1 - np.exp(-reading.votes[l])), -1)


def check_view(browser, reading, row, l):
    """The text and the table show what layer l, and each layer, makes of this row."""
    left, taken = shares(reading, l)
    assert classes(browser, 'now') == [row]
    assert classes(browser, 'later') == list(range(row + 1, T))
    assert classes(browser, 'dropped') == [j for j in range(row + 1) if reading.dropped_at[l][j] <= row]
    np.testing.assert_allclose(styles(browser, '--keep')[:row + 1], left[row, :row + 1], atol=0.015)
    np.testing.assert_allclose(styles(browser, '--taken')[:row] ** 2, taken[row, :row], atol=0.02)
    rows = np.arange(T)
    for n, (seen, takes, loses, forgotten) in enumerate(zip(*(texts(browser, f'#layers .{name}') for name in
                                                              ('seen', 'takes', 'loses', 'forgotten')))):
        visible = (reading.F[n] < 1) & (rows[:, None] < reading.dropped_at[n])
        assert seen == f'{visible[row, :row].sum()} of {row}'
        left, taken = shares(reading, n)
        for text, share in (takes, taken[row]), (loses, taken[:, row]):
            found = [(int(j), int(p)) for j, p in re.findall(r'” (\d+):\s(\d+)\s%', text)]
            assert len(found) == min(3, (share >= 0.005).sum())
            for (j, percent), best in zip(found, np.sort(share)[::-1]):
                assert abs(percent - 100 * share[j]) < 2 and abs(share[j] - best) < 0.02
        gone = [i for i in range(row + 1, T) if not visible[i, row]]
        assert forgotten.split(',')[0] == (f'at {gone[0]}' if gone else 'not')
        assert (', dropped' in forgotten) == bool(gone and reading.dropped_at[n][row] <= gone[0])


def test_hostile_text_shows_as_text(browser, both):
    for box in '#text', '#tempered':
        assert texts(browser, box + ' span') == [t.replace('\n', '⏎\n') for t in TOKENS]
        assert browser.execute_script('return document.querySelectorAll(arguments[0]).length', box + ' span *') == 0
    assert TOKENS[:7] == [word.decode() for word in WORDS[:7]] and TOKENS[12:16] == ['\\u202e', '\\u2028', '\\xff\\xc3(', '·']
    assert texts(browser, '#title') == ['<i>title'] and browser.title == 'What the model forgets'
    assert browser.execute_script('return document.scripts.length') == 2
    # tokens stand in the order of the text, whatever the direction of their script
    lefts = browser.execute_script('return [...document.querySelectorAll("#text span")].slice(9, 12).map(e => e.getBoundingClientRect().left)')
    assert lefts == sorted(lefts)


def test_hover_tap_and_leave(browser, both):
    l = both.M.max(axis=1).argmax()                             # the layer that is shown first
    check_view(browser, both, T - 1, l)
    spans = browser.find_elements('css selector', '#text span')
    tops = set()
    for row in 0, 1, 12, 40, 63:
        actions(browser).move_to_element(spans[row]).perform()
        check_view(browser, both, row, l)
        tops.add(browser.execute_script('return ["map", "needs", "tempered"].map(id => document.getElementById(id).getBoundingClientRect().top).join()'))
    assert len(tops) == 1                                       # nothing moves away from under the pointer
    actions(browser).move_to_element(browser.find_element('tag name', 'h1')).perform()
    check_view(browser, both, T - 1, l)
    actions(browser).move_to_element(spans[50]).click().move_to_element(browser.find_element('tag name', 'h1')).perform()
    check_view(browser, both, 50, l)
    assert browser.find_element('id', 'time').get_attribute('value') == '50'


def test_slider_and_layer(browser, both):
    from selenium.webdriver.common.keys import Keys
    l = both.M.max(axis=1).argmax()
    slider = browser.find_element('id', 'time')
    slider.send_keys(Keys.ARROW_LEFT * 7)
    check_view(browser, both, T - 8, l)
    assert texts(browser, '#now') == [f'{T - 8} of {T - 1}']
    slider.send_keys(Keys.HOME)
    check_view(browser, both, 0, l)
    slider.send_keys(Keys.END)
    for other in 1 - l, l:
        choose(browser, 'layer', other)
        check_view(browser, both, T - 1, other)
        assert set(texts(browser, '.layer')) == {str(other)} and texts(browser, 'tr.chosen td:first-child') == [str(other)]


def test_keyboard(browser, both):
    from selenium.webdriver.common.keys import Keys
    press = lambda *keys: actions(browser).send_keys(*keys).perform()
    browser.find_element('id', 'layer').send_keys(Keys.TAB)
    focused, visited = lambda: browser.switch_to.active_element, []
    for _ in range(13):
        visited.append(focused().get_attribute('id') or focused().get_attribute('role') or focused().tag_name)
        if focused().get_attribute('role') == 'option' and 'tempered' not in visited:
            before = classes(browser, 'now')[0]
            press(Keys.ARROW_LEFT)
            assert classes(browser, 'now') == [before - 1] and int(focused().get_attribute('aria-label').split(':')[0]) == before - 1
        if focused().get_attribute('id') == 'map':
            press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)
            assert f'column 2, “{TOKENS[2]}”' in texts(browser, '#cell')[0]
        press(Keys.TAB)
    # one stop for all tokens of a text, then the table, the map, a button for each layer, the selects
    assert visited[:8] == ['time', 'option', 'region', 'map', 'button', 'button', 'which', 'head'] and visited[8] == 'option'


def test_heat_map(browser, both):
    canvas = browser.find_element('id', 'map')
    for l in range(2):
        choose(browser, 'layer', l)
        pixels = np.array(browser.execute_script(
            'const c = document.getElementById("map"), copy = new OffscreenCanvas(c.width, c.height).getContext("2d");'
            'copy.drawImage(c, 0, 0); return [...copy.getImageData(0, 0, c.width, c.height).data]')).reshape(T, T, 4)[..., :3]
        rows, (left, _) = np.arange(T), shares(both, l)
        expected = 255 + (np.array([0, 100, 170]) - 255) * left[..., None]
        expected[rows[:, None] >= both.dropped_at[l]] = [190, 192, 196]
        expected[rows[:, None] < rows] = [240, 241, 244]
        np.testing.assert_allclose(pixels, expected, atol=4)
        for i, j in (60, 20), (70, 69), (33, 0), (5, 5), (T - 1, both.dropped_at[l].argmin()):
            size = canvas.size['width'] / T
            # offsets are from the middle of the canvas
            actions(browser).move_to_element_with_offset(canvas, int((j + .5) * size - size * T / 2), int((i + .5) * size - size * T / 2)).perform()
            text = texts(browser, '#cell')[0]
            assert text.startswith(f'Row {i}, “{TOKENS[i]}”')
            if i == j:
                assert 'looks at itself' in text
            elif both.dropped_at[l][j] <= i:
                assert f'column {j}, ' in text and text.endswith(f'dropped at row {both.dropped_at[l][j]}.')
            else:
                F, S = re.search(r'F = ([\d.]+), .* S = ([\d.]+)\.', text).groups()
                assert float(F) == pytest.approx(both.F[l][i, j], rel=0.03, abs=0.02) and f'column {j}, ' in text
                assert float(S) == pytest.approx(both.votes[l][i, j], rel=0.03, abs=0.02)


def test_needs(browser, both):
    choose(browser, 'layer', 0)
    for l, (caption, points) in enumerate(zip(texts(browser, '#needs figcaption'), browser.execute_script(
            'return [...document.querySelectorAll("#needs .curve")].map(e => e.getAttribute("points"))'))):
        M = both.M[l]
        assert caption == f'Layer {l}: {M[-1]:.1f} here, {M.max():.1f} at most; budget {BUDGETS[l]}'
        xy = np.array([p.split(',') for p in points.split()], float)
        assert len(xy) == T and np.corrcoef(xy[:, 1], M)[0, 1] == pytest.approx(-1, abs=1e-4)      # y points down
    lines = browser.execute_script('return [...document.querySelectorAll("#needs .budget")].map(e => +e.getAttribute("y1"))')
    assert lines[0] > lines[1]                                  # 12 is below 30


def test_temperatures(browser, both):
    for which, l, head in ('q', 0, 'mean'), ('q', 1, 1), ('v', 0, 0), ('v', 1, 'mean'):
        for select, value in ('layer', l), ('which', which), ('head', head):
            choose(browser, select, value)
        taus = both.temperatures[which][l]
        expected = taus.mean(axis=1) if head == 'mean' else taus[:, head]
        shown = browser.execute_script('return [...document.querySelectorAll("#tempered span")].map(e => [+e.dataset.tau, e.style.background])')
        np.testing.assert_allclose([t for t, _ in shown], expected, atol=0.001)
        assert len({colour for _, colour in shown}) > 5
        assert texts(browser, '#heads')[0].endswith(' · '.join(f'{h}: {t:.2f}' for h, t in enumerate((taus[-1] * 5000).round() / 5000)))
        low, high = both.temperatures[which].min(), both.temperatures[which].max()
        assert texts(browser, '#low, #high') == [f'{low:.2f}', f'{high:.2f}']


@pytest.mark.parametrize('config', [dict(selective=True), dict(ssa='qv')])
def test_a_model_of_one_method_has_one_part(browser, tmp_path, config):
    open_page(browser, tmp_path, **config)
    shown = [browser.find_element('id', name).is_displayed() for name in ('selection', 'temperatures')]
    assert shown == [config.get('selective', False), 'ssa' in config]
    assert browser.get_log('browser') == []


@pytest.mark.parametrize('scheme, width', [('light', 360), ('dark', 360), ('dark', 1200)])
def test_dark_and_narrow(browser, tmp_path, scheme, width):
    open_page(browser, tmp_path, scheme, width, selective=True, ssa='qv')
    assert browser.execute_script('return document.documentElement.scrollWidth') <= width
    colours = browser.execute_script('const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]')
    ink, back = (np.array(re.findall(r'\d+', colour)[:3], float).mean() for colour in colours)
    assert abs(ink - back) > 180 and (back < 128) == (scheme == 'dark')
    assert browser.get_log('browser') == []


def test_says_when_it_cannot_be_drawn(browser, tmp_path):
    open_page(browser, tmp_path, ssa='qv')
    path = tmp_path / 'page.html'
    path.write_text(path.read_text().replace("DecompressionStream('deflate')", "Missing()"))
    browser.get(path.as_uri())
    wait(browser, 'return !document.getElementById("failure").hidden')
    assert 'could not be drawn' in texts(browser, '#failure')[0]
    browser.get_log('browser')

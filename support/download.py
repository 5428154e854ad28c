"""Downloads that survive failures: they wait, continue where they were cut, and show progress."""

import sys
import time

import requests
import urllib3

from support.settings import UserError

LONGEST_WAIT = 600  # seconds
CHUNK = 1 << 16  # bytes
# What requests raises. A ValueError is a URL that is none.
ERRORS = (OSError, ValueError, urllib3.exceptions.HTTPError)


class Server:
    """Reads files from a server and continues after failures.

    base_url: the folder of the files. retries: failures in a row of one file before giving up.
    backoff: seconds to wait after the first failure; doubles with each, up to 60. timeout: seconds
    without a byte that count as a failure.
    """

    def __init__(self, base_url, retries, backoff, timeout):
        self.base_url = base_url.rstrip('/')
        self.retries = retries
        self.backoff = backoff
        self.timeout = (5, timeout)  # to connect, to read
        self.session = requests.Session()
        self.answered = False  # whether the server ever answered

    def read(self, name):
        """The bytes of the file <base_url>/<name>, in chunks.

        Continues a cut connection where it ended, and asks a busy server again. Each attempt waits
        longer than the one before, and at least as long as the server says. Raises UserError for
        other HTTP errors, after too many failures in a row, and at once if the server never
        answered. A server may give no length; then the caller must see whether the file is whole.
        """
        url = f'{self.base_url}/{name}'
        failures = 0
        self.received = 0  # bytes of the file so far
        while True:
            try:
                for chunk in self.attempt(url):
                    self.received += len(chunk)
                    failures = 0
                    yield chunk
                return
            except ERRORS as e:
                problem = type(e).__name__
                wait = 0
                if isinstance(e, requests.HTTPError):
                    problem = str(e)
                    asked = e.response.headers.get('Retry-After', '')
                    if asked.isdecimal():
                        wait = float(asked)
            if not self.answered:
                raise UserError(
                    f'{url} cannot be reached ({problem}): check the network and --base_url'
                )
            if wait > LONGEST_WAIT:
                raise UserError(f'{url}: busy for {wait / 60:,.0f} minutes, it says: run it later')
            wait = max(wait, min(60.0, self.backoff * 2**failures))
            failures += 1
            where = f'{name}: {problem} at byte {self.received:,}'
            if failures > self.retries:
                raise UserError(
                    f'{where}, {failures} times in a row: run it again later, it continues'
                )
            print(f'{where}, trying again in {wait:.1f} s', file=sys.stderr)
            time.sleep(wait)

    def attempt(self, url):
        """The rest of the file in one attempt. Raises one of ERRORS where another is worth it."""
        got = self.received
        headers = {'Accept-Encoding': 'identity'}
        if got:
            headers['Range'] = f'bytes={got}-'
        with self.session.get(url, headers=headers, stream=True, timeout=self.timeout) as answer:
            self.answered = True
            status = answer.status_code
            if status == 416:  # there is nothing from this place on
                return
            if status == 429 or status >= 500:
                raise requests.HTTPError(f'HTTP {status}', response=answer)
            if status not in (200, 206):
                raise UserError(f'{answer.url}: HTTP {status}: check --base_url')
            skip = 0
            if status == 200:  # the whole file: this server does not continue
                skip = got
            elif not answer.headers.get('Content-Range', '').startswith(f'bytes {got}-'):
                raise UserError(
                    f'{answer.url}: asked for bytes from {got}, the server sent others: '
                    'it cannot continue'
                )
            answer.raw.enforce_content_length = True  # in every version of urllib3
            for chunk in answer.raw.stream(CHUNK, decode_content=False):
                fresh = chunk[skip:]
                skip = max(0, skip - len(chunk))
                if fresh:
                    yield fresh


class Progress:
    """One line of progress: redrawn on a terminal, else printed every 10 seconds.

    with Progress() as progress:
        progress.show(...)
    """

    def __init__(self):
        self.end = '\n'
        self.interval = 10
        if sys.stderr.isatty():
            self.end = '\r'
            self.interval = 0.2
        self.began = time.time()
        self.shown = self.began

    def __enter__(self):
        return self

    def show(self, label, received, fraction):
        """received: bytes read since the beginning; fraction: of the work to do since then."""
        now = time.time()
        if now - self.shown < self.interval:
            return
        self.shown = now
        seconds = now - self.began
        megabytes = received / 1e6
        line = f'{label}{megabytes:.1f} MB, {megabytes / seconds:.1f} MB/s'
        if fraction:
            left = seconds / fraction - seconds
            line += f', {left / 60:,.0f} minutes left'
        print(line.ljust(78), end=self.end, file=sys.stderr, flush=True)

    def __exit__(self, *_):
        if self.end == '\r':  # leave no line behind
            print(' ' * 78, end='\r', file=sys.stderr)

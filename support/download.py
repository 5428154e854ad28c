"""A file on a server, read in spite of failures, and a line that shows progress."""

import sys
import time

import requests
import urllib3

from support.settings import UserError

WAITS = 2, 4, 8, 16, 32, 64, 120  # seconds, after failures in a row
TIMEOUT = 30  # seconds without a byte that count as a failure


class RemoteFile:
    """A file on a server, to be read once, in spite of failures."""

    def __init__(self, url):
        self.url = url
        self.received = 0  # bytes so far
        self.answer = None  # the server's, of which the rest is to be read

    def read(self, size):
        """At most size bytes; none at the end of the file.

        Continues where the line was cut. Raises UserError if that fails, or there is no such file.
        A server may give no length; then the caller must see whether the file is whole.
        """
        for wait in 0, *WAITS:
            time.sleep(wait)
            try:
                if self.answer is None:
                    self.answer = self.ask()
                chunk = self.answer.raw.read(size)
                self.received += len(chunk)
                return chunk
            except (requests.RequestException, urllib3.exceptions.HTTPError) as e:
                self.answer = None
                problem = f'{self.url}, at byte {self.received:,}: {e}'
                print(f'{problem}; trying again', file=sys.stderr)
        raise UserError(f'{problem}; {len(WAITS) + 1} failures in a row: run it again later')

    def ask(self):
        """The server's response, from the next byte on."""
        headers = {'Accept-Encoding': 'identity'}
        if self.received:
            headers['Range'] = f'bytes={self.received}-'
        try:
            answer = requests.get(self.url, headers=headers, stream=True, timeout=TIMEOUT)
        except ValueError as e:  # of a URL that is none
            raise UserError(f'--base_url: {e}') from None
        if answer.status_code in (401, 403, 404):
            raise UserError(f'{self.url}: {answer.status_code} {answer.reason}: check --base_url')
        answer.raise_for_status()  # the server is busy or in trouble
        if self.received and answer.status_code == 200:  # it begins again
            raise UserError(
                f'{self.url}: the server cannot continue where it was cut: run it again'
            )
        return answer


class Progress:
    """Prints a line every ten seconds."""

    def __init__(self):
        self.began = time.time()
        self.shown = self.began

    def show(self, done, size):
        """done: what is done, in words; size: bytes that are read."""
        now = time.time()
        if now > self.shown + 10:
            self.shown = now
            minutes = (now - self.began) / 60
            print(f'{done}, {size / 1e6:.1f} MB in {minutes:.1f} minutes', file=sys.stderr)

"""A file on a server, read in spite of failures, and a line that shows progress."""

import sys
import time

import requests
import urllib3
from requests.adapters import HTTPAdapter

from support.settings import UserError


class Retry(urllib3.Retry):
    """Waits and asks again, as urllib3 does it, and says why."""

    def sleep(self, response=None):
        _, url, error, status, _ = self.history[-1]
        print(f'{url}: {error or status}, trying again', file=sys.stderr)
        super().sleep(response)


class RemoteFile:
    """A file on a server, to be read once.

    A busy server or one that is out of reach is asked again, up to `retries` times. The waits grow
    from 2 * backoff to 120 seconds, or are what the server says. timeout: seconds without a byte
    that count as a failure.
    """

    def __init__(self, url, retries, backoff, timeout):
        self.url = url
        self.retries = retries
        self.timeout = timeout
        busy = [429, 500, 502, 503, 504]
        retry = Retry(retries, status_forcelist=busy, backoff_factor=backoff)
        self.session = requests.Session()
        self.session.mount('http://', HTTPAdapter(max_retries=retry))
        self.session.mount('https://', HTTPAdapter(max_retries=retry))
        self.received = 0  # bytes so far
        self.answer = None  # the server's, of which the rest is to be read

    def read(self, size):
        """At most size bytes; none at the end of the file.

        Continues where the line was cut. Raises UserError if that fails, or there is no such file.
        A server may give no length; then the caller must see whether the file is whole.
        """
        for _ in range(self.retries + 1):
            try:
                if self.answer is None:
                    self.answer = self.ask()
                chunk = self.answer.raw.read(size)
                self.received += len(chunk)
                return chunk
            except urllib3.exceptions.HTTPError as e:
                self.answer = None
                problem = f'{self.url}: {type(e).__name__} at byte {self.received:,}'
                print(f'{problem}, trying again', file=sys.stderr)
        raise UserError(f'{problem}, {self.retries + 1} times in a row: run it again later')

    def ask(self):
        """The server's answer, from the byte on that comes next."""
        headers = {'Accept-Encoding': 'identity'}
        if self.received:
            headers['Range'] = f'bytes={self.received}-'
        try:
            answer = self.session.get(self.url, headers=headers, stream=True, timeout=self.timeout)
            answer.raise_for_status()
        except (OSError, ValueError) as e:  # also of a URL that is none
            raise UserError(f'{self.url}: {e}: check the network and --base_url') from None
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

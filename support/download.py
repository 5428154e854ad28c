"""Downloads that survive failures: from a server, with progress, checked by size and hash."""
import contextlib
import email.utils
import hashlib
import os
import queue
import random
import re
import sys
import time
from urllib.parse import urljoin

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from support.settings import UserError

LONGEST_WAIT = 600      # seconds
ERRORS = OSError, ValueError, urllib3.exceptions.HTTPError      # what requests raises; ValueError is a URL that is none


class Connections(queue.SimpleQueue):
    """Where urllib3 keeps idle connections, in place of queue.LifoQueue. That one's lock stays taken when Ctrl-C comes
    right after it was taken, and urllib3 then waits for it for ever: a few tries of a thousand. This one is in C."""

    def __new__(cls, maxsize):
        return super().__new__(cls)

    def __init__(self, maxsize):
        pass


urllib3.HTTPConnectionPool.QueueCls = Connections       # of HTTPS, too


class Server:
    """Reads files from a server and continues after failures.

    base_url: the folder of the files. retries: failures in a row of one file before giving up. backoff: seconds to wait
    after the first failure; doubles with each, up to 60. timeout: seconds without a byte that count as a failure.
    """

    def __init__(self, base_url, retries=8, backoff=1.0, timeout=30.0):
        self.base_url, self.retries, self.backoff, self.timeout = base_url.rstrip('/'), retries, backoff, timeout
        self.session = requests.Session()
        self.answered = False  # whether the server ever answered
        self.megabytes = 0.0   # received, of all files
        self.place = 0.0       # how far the current file is, 0 to 1

    def read(self, name, got=0):
        """The bytes of the file <base_url>/<name>, in chunks; without the first `got`, which the caller has.

        Continues a cut connection where it ended, with a Range request, and repeats requests that got HTTP 429 or 5xx.
        Each attempt waits longer than the one before, and at least as long as Retry-After says. Raises UserError for
        other HTTP errors, after too many failures in a row, and at once if the server never answered.
        """
        url, size, failures = f'{self.base_url}/{name}', None, 0
        self.place = 0.0
        while True:
            wait = 0.0
            try:
                headers = {'Accept-Encoding': 'identity'} | ({'Range': f'bytes={got}-'} if got else {})
                with self.session.get(url, headers=headers, stream=True, timeout=(5, self.timeout)) as answer:
                    self.answered = True
                    if answer.status_code == 429 or answer.status_code >= 500:
                        wait = retry_after(answer.headers.get('Retry-After', ''))
                        if wait > LONGEST_WAIT:
                            raise UserError(f'{url}: busy for {wait / 60:,.0f} minutes, says the server: run it later')
                        raise requests.HTTPError(f'HTTP {answer.status_code}')
                    begin, size = place_of(answer, got, size)
                    skip = got - begin  # a server without Range requests sends everything again
                    for chunk in answer.raw.stream(1 << 18, decode_content=False):
                        fresh, skip = chunk[skip:], max(0, skip - len(chunk))
                        if fresh:
                            got, failures = got + len(fresh), 0
                            self.megabytes += len(fresh) / 1e6
                            self.place = got / size if size else 0.0
                            yield fresh
                if size in (None, got):  # None: sent without a length, so the caller must see whether it is whole
                    return
                problem = 'the connection ended early'
            except ERRORS as e:
                problem = str(e) if isinstance(e, requests.HTTPError) else f'connection failed ({type(e).__name__})'
                if not self.answered:
                    raise UserError(f'{url}: {problem}: check the network and --base_url') from None
            failures += 1
            where = f'{name}: {problem} at byte {got:,} of {size or "?"}'
            if failures > self.retries:
                raise UserError(f'{where}, {failures} times in a row: run it again later, it continues')
            wait = max(wait, min(60.0, self.backoff * 2 ** (failures - 1)) * random.uniform(0.75, 1))
            print(f'{where}, trying again in {wait:.1f} s', file=sys.stderr)
            time.sleep(wait)


def place_of(answer, got, size):
    """(first byte, size of the whole file or None) of an HTTP answer; UserError if it is not the one requested."""
    if answer.status_code == 206:
        match = re.fullmatch(r'bytes (\d+)-\d+/(\d+)', answer.headers.get('Content-Range', ''))
        begin, total = map(number, match.groups()) if match else (None, None)
    elif answer.status_code == 200:
        begin, total = 0, answer.headers.get('Content-Length')
        total = number(total)
    else:
        raise UserError(f'{answer.url}: HTTP {answer.status_code}: check --base_url')
    if begin not in (0, got):
        raise UserError(f'{answer.url}: asked for bytes from {got}, the server sent others: it cannot continue')
    if size not in (None, total):
        raise UserError(f'{answer.url}: {size} bytes before, now {total}: it changed on the server, run again')
    return begin, total


def number(text):
    """A whole number in a header; None if it is no such number."""
    return int(text) if re.fullmatch('[0-9]{1,18}', text or '') else None


def retry_after(text):
    """Seconds that the header Retry-After asks to wait, as a number or as a date; 0 if it is neither."""
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, float(text) if re.fullmatch('[0-9]+', text.strip()) else
                   email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0


def download(url, path, hashed=True, **more):
    """Download url to path, which appears once it is whole: checked by size and hash where the server gives them.

    After a cut, a kill or a failure, what has arrived stays in <path>.part, and the next call continues it. hashed:
    require a hash. more: settings of Server. Raises UserError also if the file is not what the server announced.
    """
    size, digest = announced(url)
    if hashed and not digest:
        raise UserError(f'{url}: the server gives no hash (X-Linked-Etag) to check it by: check --base_url')
    base, name = url.rsplit('/', 1)
    server, part = Server(base, **more), path + '.part'
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, 'ab') as f, Progress() as progress:
            if size is None or f.tell() > size:                     # cannot be continued
                f.truncate(0)
                f.seek(0)
            if f.tell() != size:
                for chunk in server.read(name, f.tell()):
                    f.write(chunk)
                    progress.show(server.megabytes, None, server.place, f'{name}: ')
                    if size is not None and f.tell() > size:
                        break
            got = f.tell()
            f.flush()
            os.fsync(f.fileno())
        problem = (f'{got:,} bytes came, {size:,} were announced' if size not in (None, got) else
                   'its hash is wrong' if digest and digest_of(part, digest) != digest else None)
        if problem:
            os.remove(part)
            raise UserError(f'{url}: {problem}: it was deleted, run it again')
        os.replace(part, path)
    except OSError as e:
        raise UserError(f'{e.filename or path}: {e.strerror}') from None


def announced(url):
    """(size, hash) of a file, each None if the server does not give it.

    The Hugging Face hub answers for a large file with a redirect to another host, whose headers give both, the hash
    being sha256. A small file has its git hash as ETag, perhaps after a redirect to another path.
    """
    headers = requests.structures.CaseInsensitiveDict()
    with requests.Session() as session:     # connect=0: asks a busy server again, but not one that is out of reach
        session.mount(url, HTTPAdapter(max_retries=Retry(5, connect=0, backoff_factor=0.5, raise_on_status=False,
                                                         respect_retry_after_header=False,      # it may be a year
                                                         status_forcelist=(429, 500, 502, 503, 504))))
        where = url
        for _ in range(5):
            try:
                answer = session.head(where, timeout=(5, 30), headers={'Accept-Encoding': 'identity'})
            except ERRORS as e:
                raise UserError(f'{url} cannot be reached ({type(e).__name__}): check the network and --base_url') \
                    from None
            if answer.status_code >= 400:
                raise UserError(f'{url}: HTTP {answer.status_code}: check --base_url')
            headers.update(answer.headers)
            path = answer.headers.get('Location', '')
            if not path.startswith('/'):
                break
            where = urljoin(where, path)
    size = headers.get('X-Linked-Size') or (headers.get('Content-Length') if answer.status_code == 200 else None)
    digest = headers.get('X-Linked-Etag') or ('X-Repo-Commit' in headers and headers.get('ETag')) or ''
    return number(size), digest.removeprefix('W/').strip('"') or None


def digest_of(path, like):
    """The hash of a file, of the same kind as `like`: sha256 (64 digits), or git's sha1 of a blob (40)."""
    h = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b'blob %d\0' % os.path.getsize(path))
    with open(path, 'rb') as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


class Progress:
    """One line of progress: redrawn on a terminal, else printed every 10 seconds.

        with Progress() as progress:
            progress.show(...)
    """

    def __init__(self):
        self.first, self.shown, self.tty = None, 0.0, sys.stderr.isatty()

    def show(self, megabytes, tokens, fraction, label=''):
        """megabytes read and tokens written so far (None: not shown); fraction of the work done, 0 to 1.

        Speed and time left count from the first call, so they leave out what an earlier run did.
        """
        now = time.time()
        if self.first is None:
            self.first, self.shown = (now, megabytes, fraction), now
        if now - self.shown < (0.2 if self.tty else 10):
            return
        self.shown = now
        seconds, read, done = now - self.first[0], megabytes - self.first[1], fraction - self.first[2]
        left = int(seconds * max(0, 1 - fraction) / done) if done > 0 else 0
        count = '' if tokens is None else f'{tokens:,} tokens, '
        line = (f'{label}{megabytes:.1f} MB, {read / seconds:.1f} MB/s, {count}'
                + f'{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left')
        print(line.ljust(78) if self.tty else line, end='\r' if self.tty else '\n', file=sys.stderr, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tty:  # empty the line for what is printed next
            print(' ' * 78, end='\r', file=sys.stderr, flush=True)

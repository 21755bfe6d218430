"""A daemon that is not there, does not answer, or is something else: an exception in good time, with what to do."""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import os_vif
from bench import DaemonCase, as_nobody, instance
from os_vif import exception as vif_exc

from vif_plug_vhostd import client


class Absent(DaemonCase):
    def test_without_a_daemon_a_plug_fails_soon(self):
        self.configure(api_socket="/nonexistent/api.sock")
        start = time.monotonic()
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(self.vif(), instance())
        self.assertLess(time.monotonic() - start, 5)
        self.assertIn("vhostd does not answer on /nonexistent/api.sock", str(caught.exception))
        self.assertIn("No such file", str(caught.exception))

    def test_a_shorter_timeout_holds_there_too(self):
        self.configure(api_socket="/nonexistent/api.sock", timeout=0.3)
        start = time.monotonic()
        with self.assertRaises(vif_exc.UnplugException):
            os_vif.unplug(self.vif(), instance())
        self.assertLess(time.monotonic() - start, 2)

    def test_what_cannot_be_a_socket_is_said_at_once(self):
        for path, why in (("/" + 108 * "x", "path too long"), ("/etc/passwd/api.sock", "Not a directory")):
            self.configure(api_socket=path)
            start = time.monotonic()
            with self.assertRaises(vif_exc.PlugException) as caught:
                os_vif.plug(self.vif(), instance())
            self.assertLess(time.monotonic() - start, 1)
            self.assertIn(f"{path} is not vhostd's API", str(caught.exception))
            self.assertIn(why, str(caught.exception))

    def test_a_restart_in_between_is_not_noticed(self):
        vif = self.vif()
        self.daemon.kill()
        with ThreadPoolExecutor(1) as pool:
            plug = pool.submit(os_vif.plug, vif, instance())
            time.sleep(0.5)
            self.assertFalse(plug.done())
            self.daemon.start()
            plug.result()
        os_vif.unplug(vif, instance())

    @unittest.skipUnless(os.geteuid() == 0, "only root can become somebody else")
    def test_who_may_not_open_the_socket_is_told_so(self):
        os_vif.unplug(self.vif(), instance())
        as_nobody(self.denied)

    def denied(self):
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(self.vif(), instance())
        self.assertIn(f"may not open {self.daemon.api}", str(caught.exception))


class Silent(DaemonCase):
    def setUp(self):
        super().setUp()
        self.configure(timeout=0.3)
        self.daemon.freeze()

    def tearDown(self):
        self.daemon.thaw()
        super().tearDown()

    def test_a_plug_has_its_time_and_no_more(self):
        start = time.monotonic()
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(self.vif(), instance())
        self.assertLess(time.monotonic() - start, 2)
        self.assertIn("did not answer within 0.3 s", str(caught.exception))

    # In tearDown: what was given up is not done when the daemon goes on.

    def test_green_threads_go_on_meanwhile(self):
        try:
            import eventlet  # noqa: F401
        except ImportError:
            self.skipTest("eventlet is not installed")
        script = Path(__file__).with_name("green.py")
        subprocess.run([sys.executable, script, self.daemon.api], check=True, capture_output=True, timeout=30)


class Stranger(DaemonCase):
    """Something else listens where the daemon should."""

    def answer(self, *pieces, pause=0.0, close=False):
        """Gives each caller these bytes, and then nothing until the test is over, or the end."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        path = directory.name + "/api.sock"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen()
        self.configure(api_socket=path, timeout=0.3)
        over = threading.Event()
        callers = []

        def serve():
            while not over.is_set():
                caller, _ = listener.accept()
                callers.append(caller)
                try:
                    caller.settimeout(5)
                    if caller.recv(1 << 16):
                        for piece in pieces:
                            caller.sendall(piece)
                            over.wait(pause)
                    if close:
                        caller.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()

        def end():
            over.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(path)
            thread.join()
            for each in (listener, *callers):
                each.close()

        self.addCleanup(end)

    def refused(self, *parts):
        start = time.monotonic()
        with self.assertRaises(vif_exc.PlugException) as caught:
            os_vif.plug(self.vif(), instance())
        self.assertLess(time.monotonic() - start, 2)
        for part in parts:
            self.assertIn(part, str(caught.exception))

    def test_garbage_is_not_an_answer(self):
        ok = b"HTTP/1.1 200 OK\r\n"
        for answer in (
            b"\x00\xff\x80 what?\r\n\r\n",
            b"HTTP/1.1 boo\r\n\r\n",
            ok + b"Content-Length: 3\r\n\r\n{]}",
            ok + b"Content-Length: 2\r\n\r\n[]",
            ok + b'Content-Length: 3\r\n\r\n"\xff"',
            ok + b"x: y\r\n" * 1000 + b"\r\n",
            ok + b"x" * 100_000,
            ok + b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000,
            ok + b"Content-Length: 9999999\r\n\r\n" + b" " * (client.BYTES_MAX + 1),
        ):
            with self.subTest(answer=answer[:80]):
                self.answer(answer)
                self.refused("is not vhostd's API")

    def test_a_status_without_a_problem_is_an_error(self):
        for status in (200, 302, 404, 500):
            with self.subTest(status=status):
                self.answer(b'HTTP/1.1 %d Oops\r\nContent-Length: 13\r\n\r\n{"message":1}' % status)
                self.refused(f"HTTP status {status} and no reason")

    def test_a_problem_of_odd_types_is_shown(self):
        self.answer(b'HTTP/1.1 400 Bad Request\r\nContent-Length: 41\r\n\r\n{"detail":[1],"hint":{"a":2},"field":3.5}')
        self.refused("[1] (field: 3.5; hint: {'a': 2})")

    def test_bytes_one_by_one_have_one_time_limit(self):
        self.answer(*(b"HTTP/1.1 200 OK\r\nx: yyyyyyyyyyyyyyyyyyyyy\r\n"[i : i + 1] for i in range(40)), pause=0.1)
        self.refused("did not answer within 0.3 s")

    def test_an_answer_that_breaks_off_is_none(self):
        self.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", close=True)
        self.refused("does not answer", "IncompleteRead(1 bytes read, 99 more expected)")
        self.answer(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n")
        self.refused("does not answer", "IncompleteRead")
        self.answer(close=True)
        self.refused("does not answer", "closed connection without response")

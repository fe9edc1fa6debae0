"""A server on loopback that answers as a test says, and keeps what it was asked."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ScriptedServer(ThreadingHTTPServer):
    """Answers each request by `answer(question, number)`: (status, bytes), or a callable that gets
    the handler. Keeps every request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self.counting = threading.Lock()
        self.ended = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that gave up is no news."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.counting:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), question))
        answer = self.server.answer(question, number)
        if callable(answer):
            answer(self)
            return
        status, body = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Location", self.server.url + "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silent."""


def serving():
    """For a fixture: begins servers, and ends them."""
    started = []

    def begin(answer):
        server = ScriptedServer(answer)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield begin
    for server, thread in started:
        server.ended.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=30)


def scored(question, _):
    scores = [{"id": i["id"], "score": float(len(i["completion"]))} for i in question["items"]]
    return 200, json.dumps({"scores": scores[::-1]}).encode()


def never(handler):
    handler.server.ended.wait(60)

"""moto's S3 server, one request at a time: `python moto_program.py PORT`.

moto answers 500 when one thread reads an object that another replaces. Here no two requests are in its hands at once:
what a client sends is received before, and what it gets is sent after, so that a slow client keeps nobody waiting.
"""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


def one_at_a_time(app: App) -> App:
    """The same application, which is in at most one request at any moment."""
    lock = threading.Lock()

    def serve(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        length = environ.get("CONTENT_LENGTH")
        if length or environ.get("wsgi.input_terminated"):
            received = environ["wsgi.input"].read(int(length) if length else -1)
            environ["wsgi.input"] = io.BytesIO(received)
        with lock:
            answer = app(environ, start_response)
            try:
                return list(answer)
            finally:
                getattr(answer, "close", lambda: None)()

    return serve


if __name__ == "__main__":
    application = one_at_a_time(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", int(sys.argv[1]), application, threaded=True)

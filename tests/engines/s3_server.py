"""An S3 server for tests: moto, one request at a time. `s3_server.py PORT [ADDRESS]`

moto looks at If-Match and writes in two steps; with threads, as its own command runs it, two writers could both pass.
"""

from __future__ import annotations

import sys

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


def main() -> None:
    application = DomainDispatcherApplication(create_backend_app)
    run_simple(sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1", int(sys.argv[1]), application, threaded=False)


if __name__ == "__main__":
    main()

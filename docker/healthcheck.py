"""Health check of a container: exit status 0 if the server in it is ready, 1 otherwise.

It reads the variables that set where the server listens, and ignores proxies. A server that requires certificates of
clients rejects it.
"""

import http.client
import os
import socket
import ssl
import sys

TIMEOUT_SECONDS = 4


def connect() -> socket.socket:
    """Connect to the server in this container."""
    path = os.environ.get("PID_UDS")
    if path:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_SECONDS)
        connection.connect(path)
    else:
        connection = socket.create_connection(("127.0.0.1", int(os.environ.get("PID_PORT") or 8000)), TIMEOUT_SECONDS)
    if os.environ.get("PID_SSL_CERTFILE"):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the certificate is for another name
        connection = context.wrap_socket(connection)
    return connection


try:
    client = http.client.HTTPConnection("localhost")
    client.sock = connect()
    client.request("GET", "/health/ready")
    status = client.getresponse().status
except (OSError, http.client.HTTPException) as error:
    sys.exit(f"not ready: {error}")
if status != 200:
    sys.exit(f"not ready: status {status}")

"""Health check of a container: exit status 0 if the server in it is ready, 1 otherwise."""

import os
import sys
import urllib.error
import urllib.request

direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # ignores HTTP_PROXY
try:
    direct.open(f"http://127.0.0.1:{os.environ.get('PID_PORT') or '8000'}/health/ready", timeout=4)
except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
    sys.exit(f"not ready: {error}")

"""`python -m server --bundle DIR`: serve decodes until a signal arrives."""

import os
import sys

# PyTorch's thread pool reads this when torch is imported. Threads that spin while they wait take the cores from
# encoders and other processes: a decode on a busy CPU becomes several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from server.main import main


def run() -> None:
    """Run the server and exit."""
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread that hangs in a device driver would block a normal exit


if __name__ == "__main__":
    run()

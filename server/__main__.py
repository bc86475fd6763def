"""`python -m server --bundle DIR`, or `pid-server`: serve decodes until a signal arrives."""

import logging
import os
import sys

from server.start import main


def run() -> None:
    """Run the server and exit."""
    # PyTorch's thread pool reads this when torch is imported. Threads that spin while they wait take the cores from
    # encoders and other processes: a decode on a busy CPU becomes several times slower.
    os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY") or "PASSIVE"
    status = 1
    try:
        status = main(sys.argv[1:])
    except SystemExit:  # --help, or an unknown flag
        raise
    except KeyboardInterrupt:
        status = 130  # 128 + SIGINT, as shells report it
    except BaseException:
        logging.getLogger("server").critical("the server ended", exc_info=True)
    logging.shutdown()
    os._exit(status)  # a thread that hangs in a device driver would block a normal exit


if __name__ == "__main__":
    run()

"""A server that reads a body and answers with bytes it has: the floor below every server on this machine and client."""

import argparse
from typing import Any

import uvicorn

_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # so that the client takes it for a whole picture
_PIECE = 512 * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    data = bytes(options.bytes - len(_END)) + _END
    pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        while scope["type"] == "http" and (await receive()).get("more_body"):
            pass
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200})
            for piece in [*pieces, b""]:
                await send({"type": "http.response.body", "body": piece, "more_body": bool(piece)})

    uvicorn.run(app, host="127.0.0.1", port=options.port, lifespan="off", log_config=None, access_log=False)


if __name__ == "__main__":
    main()

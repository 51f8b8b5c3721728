"""The floor: a bare ASGI application, orjson and ONNX Runtime on uvicorn. No validation, limits, batching or log."""

import orjson
import uvicorn
from scoring import PORT, open_session, reply, row_of

session = open_session()


async def app(scope, receive, send):
    """One row a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = orjson.dumps(reply(session.run(None, {"x": row_of(orjson.loads(body))})[0]))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, loop="uvloop", http="httptools", lifespan="off", access_log=False, log_level="warning")

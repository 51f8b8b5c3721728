"""FastAPI as its tutorial writes it: pydantic models in and out."""

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from scoring import PORT, open_session, reply, row_of


class Tensor(BaseModel):
    """One v2 tensor."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(BaseModel):
    """A v2 request."""

    inputs: list[Tensor]


app, session = FastAPI(), open_session()


@app.post("/infer")
async def infer(request: Request) -> dict:
    """One row a request."""
    return reply(session.run(None, {"x": row_of(request.model_dump())})[0])


if __name__ == "__main__":
    uvicorn.run(app, port=PORT, access_log=False, log_level="warning")

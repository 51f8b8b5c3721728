"""Mosec, batched: HTTP and batching in Rust, the model in one Python worker."""

import sys

import numpy as np
import orjson
from mosec import Server, Worker
from scoring import PORT, open_session, reply, row_of


class Score(Worker):
    """Up to 64 rows a batch."""

    def __init__(self):
        super().__init__()
        self.session = open_session()

    def deserialize(self, data):
        return orjson.loads(data)

    def serialize(self, data):
        return orjson.dumps(data)

    def forward(self, data):
        scores = self.session.run(None, {"x": np.concatenate([row_of(request) for request in data])})[0]
        return [reply(scores[row : row + 1]) for row in range(len(scores))]


if __name__ == "__main__":
    sys.argv += ["--address", "127.0.0.1", "--port", str(PORT), "--log-level", "warning"]
    server = Server()
    server.append_worker(Score, num=1, max_batch_size=64, max_wait_time=2)
    server.run()

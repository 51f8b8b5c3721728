"""Ray Serve, one replica, with its batching. HAProxy in front by RAY_SERVE_ENABLE_HA_PROXY=1 (the proxy, not this)."""

import signal

import numpy as np
import ray
from ray import serve
from scoring import MODEL, PORT, open_session, reply, row_of


@serve.deployment(num_replicas=1, max_ongoing_requests=256, ray_actor_options={"num_cpus": 1})
class Score:
    """Up to 64 rows a batch."""

    def __init__(self):
        self.session = open_session()

    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.001)
    async def score(self, rows):
        scores = self.session.run(None, {"x": np.concatenate(rows)})[0]
        return [reply(scores[row : row + 1]) for row in range(len(scores))]

    async def __call__(self, request):
        return await self.score(row_of(await request.json()))


if __name__ == "__main__":
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200 * 1024**2,
        runtime_env={"env_vars": {"MODEL": MODEL}},
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Score.bind(), route_prefix="/")
    signal.signal(signal.SIGTERM, lambda *_: exit())
    signal.pause()

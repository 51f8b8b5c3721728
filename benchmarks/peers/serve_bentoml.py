"""BentoML with its adaptive batching. Started by `bentoml serve serve_bentoml:Score`."""

import bentoml
import numpy as np
from scoring import open_session


@bentoml.service(workers=1, traffic={"timeout": 30, "max_concurrency": 1000})
class Score:
    """Up to 64 rows a batch."""

    def __init__(self):
        self.session = open_session()

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=100)
    def infer(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {"x": x.astype(np.float32)})[0]

"""LitServe with its batching: the example of its documentation with our model."""

import litserve
import numpy as np
from scoring import PORT, open_session, reply, row_of


class Score(litserve.LitAPI):
    """One row a request, up to 64 a batch."""

    def setup(self, device):
        self.session = open_session()

    def decode_request(self, request):
        return row_of(request)

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, x):
        return self.session.run(None, {"x": x})[0]

    def unbatch(self, output):
        return [output[row : row + 1] for row in range(len(output))]

    def encode_response(self, output):
        return reply(output)


if __name__ == "__main__":
    api = Score(max_batch_size=64, batch_timeout=0.001)
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=PORT, num_api_servers=1, generate_client_file=False, log_level="warning"
    )

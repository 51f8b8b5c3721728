"""KServe's model server with a custom model, REST only."""

from kserve import InferOutput, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid
from scoring import NAME, PORT, open_session


class Score(Model):
    """One row a request; it batches in a sidecar on Kubernetes only."""

    def __init__(self, name):
        super().__init__(name)
        self.session = open_session()
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        scores = self.session.run(None, {"x": payload.inputs[0].as_numpy()})[0]
        output = InferOutput(name="y", shape=list(scores.shape), datatype="FP32", data=scores.ravel().tolist())
        return InferResponse(response_id=payload.id or generate_uuid(), model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    ModelServer(http_port=PORT, workers=1, enable_grpc=False, access_log_format=None).start([Score(NAME)])

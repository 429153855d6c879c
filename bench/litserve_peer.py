"""The peer: LitServe with the same weights, dtype and batch limit, as its documentation has it."""

from __future__ import annotations

import sys

import litserve
import torch
from sentence_transformers import SentenceTransformer


class Embedder(litserve.LitAPI):
    def setup(self, device):
        folder, dtype = sys.argv[2], getattr(torch, sys.argv[3])
        self.model = SentenceTransformer(folder, device="cpu", model_kwargs={"dtype": dtype})

    def decode_request(self, request):
        return request["input"]

    def predict(self, texts):
        return self.model.encode(texts, batch_size=32, show_progress_bar=False)

    def encode_response(self, output):
        return {"output": output.tolist()}


if __name__ == "__main__":
    # 10 ms let a batch fill; without it, LitServe batches little.
    api = Embedder(max_batch_size=32, batch_timeout=0.01)
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning"
    )

"""What an unmodified tritonclient gets from a server; run by an interpreter that has one, prints JSON.

python triton_calls.py HOST:PORT MODEL
"""

import json
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def inputs(text: str, stream: bool, max_tokens: int = 12) -> list:
    made = [triton.InferInput("text_input", [1], "BYTES"), triton.InferInput("stream", [1], "BOOL")]
    made[0].set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    made[1].set_data_from_numpy(np.array([stream]))
    settings = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    made.append(triton.InferInput("sampling_parameters", [1], "BYTES"))
    made[2].set_data_from_numpy(np.array([json.dumps(settings).encode()], dtype=np.object_))
    return made


def whole(client: triton.InferenceServerClient, model: str) -> dict:
    wanted = [
        triton.InferRequestedOutput(name) for name in ("text_output", "token_ids", "depths", "logprobs")
    ]
    result = client.infer(
        model, inputs("def f", False), request_id="7", outputs=wanted, priority=3, timeout=30_000_000
    )
    ids = triton.InferInput("input_ids", [1, 3], "INT64")
    ids.set_data_from_numpy(np.array([[5, 6, 7]]))
    from_ids = client.infer(model, [ids], parameters={"max_tokens": 4, "ignore_eos": True, "depth": "full"})
    return {
        "id": result.get_response().id,
        "text": result.as_numpy("text_output")[0].decode(),
        "token_ids": result.as_numpy("token_ids").tolist(),
        "depths": result.as_numpy("depths").tolist(),
        "logprobs": result.as_numpy("logprobs").tolist(),
        "from_ids": from_ids.as_numpy("token_ids").tolist(),
    }


def streamed(client: triton.InferenceServerClient, model: str) -> dict:
    """A stream with a request that streams, a sequence of two, and one that fails."""
    came: queue.Queue = queue.Queue()
    client.start_stream(callback=lambda result, error: came.put((result, error)))
    client.async_stream_infer(
        model, inputs("def f", True), request_id="stream", enable_empty_final_response=True
    )
    client.async_stream_infer(
        model, inputs("def f", False), request_id="s1", sequence_id=9, sequence_start=True
    )
    client.async_stream_infer(model, inputs("(x)", False), request_id="s2", sequence_id=9, sequence_end=True)
    client.async_stream_infer(model, inputs("def f", False, max_tokens=-1), request_id="bad")
    texts, errors, finals = {}, [], []
    while len(finals) + len(errors) < 4:
        result, error = came.get(timeout=60)
        if error is not None:
            errors.append(str(error))
            continue
        response = result.get_response()
        texts[response.id] = texts.get(response.id, "") + result.as_numpy("text_output")[0].decode()
        if response.parameters["triton_final_response"].bool_param:
            finals.append(response.id)
    client.stop_stream()
    return {"texts": texts, "errors": errors, "finals": sorted(finals)}


def refused(client: triton.InferenceServerClient) -> str:
    try:
        client.infer("nobody", inputs("def f", False))
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return ""


def main(address: str, model: str) -> None:
    with triton.InferenceServerClient(address) as client:
        told = {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": [client.is_model_ready(model), client.is_model_ready("nobody")],
            "server": client.get_server_metadata(as_json=True),
            "model": client.get_model_metadata(model, as_json=True),
            "index": client.get_model_repository_index(as_json=True),
            "whole": whole(client, model),
            "streamed": streamed(client, model),
            "refused": refused(client),
        }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

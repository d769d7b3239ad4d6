"""Drives a prediction server of a group that is training with the stock tritonclient, as its users would.

    tritonclient_check.py ADDRESS MODEL

The model takes x FP32 [B, 32] and gives logits of 8 classes; the server's queue is short. Prints one line per check; the exit code is 0 only
if all passed. Uses nothing of this project.
"""

import queue
import sys
import threading
import time
import traceback

import grpc
import numpy as np
import tritonclient.grpc as triton
from google.protobuf import any_pb2, descriptor_pb2, descriptor_pool, duration_pb2, message_factory
from tritonclient.grpc import model_config_pb2, service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

INPUTS, CLASSES = 32, 8
PATIENCE = 60.0  # seconds; of everything that waits
OUTPUTS = ["logits", "logits_scale", "probabilities", "topk_index", "topk_value", "tail_mass"]


def batch(rows, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, INPUTS)).astype(np.float32)


def as_input(name, values):
    tensor = triton.InferInput(name, values.shape, {"float32": "FP32", "int64": "INT64"}[str(values.dtype)])
    tensor.set_data_from_numpy(values)
    return tensor


def outputs(*names):
    return [triton.InferRequestedOutput(name) for name in names]


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def parameter(result, name):
    value = result.get_response().parameters[name]
    return getattr(value, value.WhichOneof("parameter_choice"))


def status_of(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except InferenceServerException as error:
        return error.status(), error.message()
    raise AssertionError("no error")


class Checks:
    def __init__(self, address, model):
        self.address = address
        self.model = model
        self.client = triton.InferenceServerClient(address)

    def infer(self, x, **kwargs):
        kwargs.setdefault("client_timeout", PATIENCE)
        return self.client.infer(kwargs.pop("model", self.model), [as_input("x", x)], **kwargs)

    def of_one_version(self, *requests):
        """Answers to requests (dicts for infer) that one version computed: the group goes on meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                results = [self.infer(**requests[0])]
                version = results[0].get_response().model_version
                results += [self.infer(model_version=version, **request) for request in requests[1:]]
                return results
            except InferenceServerException as error:
                if error.status() != "StatusCode.NOT_FOUND":
                    raise
        raise AssertionError("no version was held for long enough")

    def check_live_and_ready(self):
        assert self.client.is_server_live()
        assert self.client.is_server_ready()
        assert self.client.is_model_ready(self.model)
        assert not self.client.is_model_ready("nobody")
        assert not self.client.is_model_ready(self.model, "1.999999999")

    def check_metadata(self):
        server = self.client.get_server_metadata()
        assert server.name == "codistill" and server.version
        metadata = self.client.get_model_metadata(self.model)
        assert metadata.name == self.model
        assert metadata.versions and all(len(version.split(".")) == 2 for version in metadata.versions)
        assert [(i.name, i.datatype, list(i.shape)) for i in metadata.inputs] == [("x", "FP32", [-1, INPUTS])]
        assert [o.name for o in metadata.outputs] == OUTPUTS
        as_json = self.client.get_model_metadata(self.model, as_json=True)
        assert as_json["outputs"][0]["shape"] == ["-1", str(CLASSES)]
        assert status_of(self.client.get_model_metadata, "nobody")[0] == "StatusCode.NOT_FOUND"

    def check_config(self):
        config = self.client.get_model_config(self.model).config
        assert config.name == self.model and config.max_batch_size > 0
        assert config.HasField("dynamic_batching")
        assert config.input[0].data_type == model_config_pb2.TYPE_FP32 and list(config.input[0].dims) == [INPUTS]
        assert [o.name for o in config.output] == OUTPUTS
        assert config.output[3].data_type == model_config_pb2.TYPE_INT32
        # Nothing was sent that this client does not know.
        assert not list(unknown_fields(config)), list(unknown_fields(config))
        assert status_of(self.client.get_model_config, "nobody")[0] == "StatusCode.NOT_FOUND"

    def check_repository_index(self):
        index = self.client.get_model_repository_index().models
        assert [(m.name, m.state) for m in index] == [(self.model, "READY")], index
        assert index[0].version.count(".") == 1

    def check_statistics(self):
        def successes():
            stats = self.client.get_inference_statistics(self.model).model_stats
            assert [s.name for s in stats] == [self.model]
            assert not list(unknown_fields(stats[0])), list(unknown_fields(stats[0]))
            return stats[0]

        before = successes()
        for _ in range(5):
            self.infer(batch(3))
        after = successes()
        assert after.inference_stats.success.count >= before.inference_stats.success.count + 5
        assert after.inference_stats.success.ns > before.inference_stats.success.ns
        assert len(self.client.get_inference_statistics().model_stats) == 1
        assert status_of(self.client.get_inference_statistics, "nobody")[0] == "StatusCode.NOT_FOUND"

    def check_infer(self):
        x = batch(5)
        result = self.infer(x, request_id="seven")
        response = result.get_response()
        assert response.id == "seven" and response.model_name == self.model
        logits = result.as_numpy("logits")
        assert logits.shape == (5, CLASSES) and logits.dtype == np.float32 and np.isfinite(logits).all()
        assert response.model_version == f"{parameter(result, 'generation')}.{parameter(result, 'step')}"
        assert parameter(result, "staleness_steps") == parameter(result, "latest_step") - parameter(result, "step")
        assert parameter(result, "staleness_steps") >= 0 and parameter(result, "age_ms") >= 0
        assert parameter(result, "precision") == "FP32"
        # Rows are examples: in halves they say the same.
        whole, first, second = self.of_one_version(dict(x=x), dict(x=x[:2]), dict(x=x[2:]))
        halves = np.concatenate([first.as_numpy("logits"), second.as_numpy("logits")])
        np.testing.assert_allclose(whole.as_numpy("logits"), halves, atol=1e-5)

    def check_the_group_is_training(self):
        steps = set()
        deadline = time.monotonic() + PATIENCE
        while len(steps) < 3 and time.monotonic() < deadline:
            steps.add(parameter(self.infer(batch(1)), "step"))
        assert len(steps) >= 3, steps

    def check_example_ids(self):
        x, ids = batch(4), np.arange(4, dtype=np.int64) + 2**40
        result = self.client.infer(self.model, [as_input("example_id", ids), as_input("x", x)], client_timeout=PATIENCE)
        assert result.as_numpy("logits").shape == (4, CLASSES)

    def check_typed_contents(self):
        x = batch(2)
        raw = self.infer(x)
        request = service_pb2.ModelInferRequest(model_name=self.model, model_version=raw.get_response().model_version)
        tensor = request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        tensor.contents.fp32_contents.extend(x.ravel().tolist())
        stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(self.address))
        for _ in range(100):
            try:
                response = stub.ModelInfer(request, timeout=PATIENCE)
            except grpc.RpcError as error:
                assert error.code() == grpc.StatusCode.NOT_FOUND, error
                raw = self.infer(x)
                request.model_version = raw.get_response().model_version
                continue
            typed = np.frombuffer(response.raw_output_contents[0], np.float32).reshape(2, CLASSES)
            # Requests of the group's students may share either pass, and a pass's size changes its rounding.
            np.testing.assert_allclose(typed, raw.as_numpy("logits"), atol=1e-5)
            return
        raise AssertionError("no version was held for long enough")

    def check_formats(self):
        x = batch(6)
        plain, half, int8 = self.of_one_version(
            dict(x=x),
            dict(x=x, outputs=outputs("logits"), parameters={"format": "FP16"}),
            dict(x=x, outputs=outputs("logits", "logits_scale"), parameters={"format": "INT8"}))
        logits = plain.as_numpy("logits")
        assert half.as_numpy("logits").dtype == np.float16
        np.testing.assert_allclose(half.as_numpy("logits"), logits, rtol=2e-3, atol=1e-4)
        scale = int8.as_numpy("logits_scale")
        assert int8.as_numpy("logits").dtype == np.int8 and scale.shape == (6,)
        dequantised = int8.as_numpy("logits").astype(np.float32) * scale[:, None]
        assert np.abs(dequantised - logits).max() <= 0.51 * scale.max()

    def check_probabilities_and_top_k(self):
        x = batch(6)
        plain, probable, top = self.of_one_version(
            dict(x=x),
            dict(x=x, outputs=outputs("probabilities"), parameters={"temperature": 2.0}),
            dict(x=x, outputs=outputs("topk_index", "topk_value", "tail_mass"), parameters={"top_k": 3, "temperature": 2.0}))
        want = softmax(plain.as_numpy("logits") / 2)
        np.testing.assert_allclose(probable.as_numpy("probabilities"), want, atol=1e-5)
        assert probable.as_numpy("logits") is None
        index, value, tail = (top.as_numpy(name) for name in ("topk_index", "topk_value", "tail_mass"))
        assert index.dtype == np.int32 and index.shape == (6, 3)
        np.testing.assert_allclose(value, np.take_along_axis(want, index, axis=1), atol=1e-5)
        np.testing.assert_allclose(value[:, 0], want.max(axis=1), atol=1e-5)
        np.testing.assert_allclose(value.sum(axis=1) + tail, 1, atol=1e-5)

    def check_async_infer(self):
        answers = queue.Queue()
        sent = {f"request {i}": batch(1 + i % 3, seed=i) for i in range(8)}
        for name, x in sent.items():
            self.client.async_infer(self.model, [as_input("x", x)],
                                    lambda result, error: answers.put((result, error)), request_id=name,
                                    client_timeout=PATIENCE, priority=1, timeout=int(PATIENCE * 1e6))
        # In whatever order.
        for _ in range(len(sent)):
            result, error = answers.get(timeout=PATIENCE)
            assert error is None, error
            x = sent.pop(result.get_response().id)
            assert result.as_numpy("logits").shape == (len(x), CLASSES)
        assert not sent, sent.keys()

    def check_stream(self):
        answers = queue.Queue()
        with triton.InferenceServerClient(self.address) as client:
            client.start_stream(lambda result, error: answers.put((result, error)), stream_timeout=PATIENCE)
            rows = {}
            for i in range(30):
                model = "nobody" if i % 10 == 7 else self.model
                name = f"request {i}"
                rows[name] = None if model == "nobody" else 1 + i % 4
                client.async_stream_infer(model, [as_input("x", batch(1 + i % 4, seed=i))], request_id=name,
                                          enable_empty_final_response=True)
                if i % 3 == 2:
                    self.take(answers, rows, 3)
            client.stop_stream()
        assert not rows, rows
        assert answers.empty()

    @staticmethod
    def take(answers, rows, count):
        for _ in range(count):
            result, error = answers.get(timeout=PATIENCE)
            if error is not None:
                name = error.message().split("]")[0].removeprefix("[request id: ")
                assert 'no model "nobody"' in error.message(), error
                assert rows.pop(name) is None, name
                continue
            name = result.get_response().id
            assert result.as_numpy("logits").shape == (rows.pop(name), CLASSES)
            assert parameter(result, "triton_final_response") is True

    def check_errors(self):
        x = batch(2)
        assert status_of(self.infer, x, model="nobody")[0] == "StatusCode.NOT_FOUND"
        status, message = status_of(self.infer, x, model_version="1.999999999")
        assert status == "StatusCode.NOT_FOUND" and "1.999999999" in message, (status, message)
        status, message = status_of(self.infer, x[:, :31])
        assert status == "StatusCode.INVALID_ARGUMENT" and "input x: shape is [2, 31]" in message, (status, message)
        wrong = [
            ([as_input("y", x)], {}, 'input "y"'),
            ([as_input("x", x.astype(np.int64))], {}, "input x: datatype"),
            ([as_input("x", np.full_like(x, np.nan))], {}, "input x: has a NaN"),
            ([as_input("x", x)], dict(outputs=outputs("loss")), 'output "loss"'),
            ([as_input("x", x)], dict(outputs=[triton.InferRequestedOutput("logits", class_count=3)]), "classification"),
            ([as_input("x", x)], dict(parameters={"top_k": 9}), "parameter top_k"),
            ([as_input("x", x)], dict(parameters={"temprature": 2.0}), "parameter \"temprature\""),
        ]
        for inputs, arguments, text in wrong:
            status, message = status_of(self.client.infer, self.model, inputs, client_timeout=PATIENCE, **arguments)
            assert status == "StatusCode.INVALID_ARGUMENT" and text in message, (status, message)
        shared = triton.InferInput("x", x.shape, "FP32")
        shared.set_shared_memory("region", x.nbytes)
        status, message = status_of(self.client.infer, self.model, [shared])
        assert status == "StatusCode.INVALID_ARGUMENT" and "shared_memory" in message, (status, message)
        self.infer(x)

    def check_a_full_queue_says_when_to_try_again(self):
        request = service_pb2.ModelInferRequest(model_name=self.model)
        x = batch(20000)
        request.inputs.add(name="x", datatype="FP32", shape=x.shape)
        request.raw_input_contents.append(x.tobytes())
        stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(self.address))
        refused = answered = 0
        deadline = time.monotonic() + PATIENCE
        # Where the server is as fast as this client, more than once.
        while not (refused and answered) and time.monotonic() < deadline:
            for call in [stub.ModelInfer.future(request, timeout=PATIENCE) for _ in range(100)]:
                if call.exception(timeout=PATIENCE) is None:
                    answered += 1
                    continue
                assert call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, call
                assert 0 < retry_delay(call) < PATIENCE, retry_delay(call)
                refused += 1
        assert refused and answered, (refused, answered)

    def check_compression_and_large_batches(self):
        x = batch(2000)
        result = self.infer(x, compression_algorithm="gzip")
        assert result.as_numpy("logits").shape == (2000, CLASSES)


def unknown_fields(message):
    """Names of messages, this one's parts included, that have fields the client's own descriptors lack."""
    from google.protobuf import unknown_fields as fields
    if len(fields.UnknownFieldSet(message)):
        yield message.DESCRIPTOR.full_name
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for part in value if hasattr(value, "__len__") else [value]:
            yield from unknown_fields(part)


def retry_delay(call):
    """Seconds of google.rpc.RetryInfo in a failed call's details."""
    trailers = dict(call.trailing_metadata())
    status = google_rpc_status().FromString(trailers["grpc-status-details-bin"])
    assert status.code == call.code().value[0] and status.message == call.details()
    details = [any for any in status.details if any.type_url == "type.googleapis.com/google.rpc.RetryInfo"]
    assert len(details) == 1, status
    # RetryInfo { Duration retry_delay = 1; }
    value = details[0].value
    assert value[0] == 0x0A and value[1] == len(value) - 2
    duration = duration_pb2.Duration.FromString(value[2:])
    return duration.seconds + duration.nanos * 1e-9


def google_rpc_status(cache=[]):
    """google.rpc.Status, which the client's packages do not have."""
    if not cache:
        file = descriptor_pb2.FileDescriptorProto(name="status.proto", package="google.rpc", syntax="proto3",
                                                  dependency=[any_pb2.DESCRIPTOR.name])
        message = file.message_type.add(name="Status")
        message.field.add(name="code", number=1, type=5, label=1)
        message.field.add(name="message", number=2, type=9, label=1)
        message.field.add(name="details", number=3, type=11, label=3, type_name=".google.protobuf.Any")
        pool = descriptor_pool.Default()
        pool.Add(file)
        cache.append(message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.Status")))
    return cache[0]


def main():
    address, model = sys.argv[1:]
    checks = Checks(address, model)
    failed = 0
    for name in [name for name in dir(checks) if name.startswith("check_")]:
        try:
            getattr(checks, name)()
            print("ok", name, flush=True)
        except Exception:
            failed += 1
            print("FAILED", name, flush=True)
            traceback.print_exc()
    checks.client.close()
    print("threads left:", threading.active_count() - 1)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

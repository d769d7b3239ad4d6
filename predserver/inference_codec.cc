#include "predserver/inference_codec.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/optional.h"
#include "common/base/retry_after.h"
#include "common/base/status.h"
#include "common/rpc/frame.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "predserver/request_parameters.h"
#include "proto/open_inference.pb.h"

namespace codistill {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;
using inference::InferTensorContents;
using inference::ModelInferRequest;
using inference::ModelInferResponse;
using inference::ModelStreamInferResponse;

constexpr int kMaxVarintBytes = 10;
constexpr int kRawInputField = ModelInferRequest::kRawInputContentsFieldNumber;
constexpr int kRawOutputField = ModelInferResponse::kRawOutputContentsFieldNumber;

// Of the text of an error on a stream.
constexpr size_t kMaxErrorBytes = 2048;

constexpr uint32_t BytesTag(int field) {
  return static_cast<uint32_t>(field) << 3 | WireFormatLite::WIRETYPE_LENGTH_DELIMITED;
}

// What a slice of a response keeps alive: a tensor's memory, and whatever the caller wants to see
// the end of.
using Held = std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>;

// Everything that the parts of a request's inputs point into.
struct Contents {
  DecodedPayload raw;
  std::vector<std::string> typed;
};

template <typename T, typename Values>
std::string Packed(const Values& values) {
  std::string bytes(values.size() * sizeof(T), '\0');
  char* to = bytes.data();
  for (const auto value : values) {
    const T element = static_cast<T>(value);
    std::memcpy(to, &element, sizeof(T));
    to += sizeof(T);
  }
  return bytes;
}

// Of values whose field is wider than they are.
template <typename T, typename Values>
absl::StatusOr<std::string> PackedWithin(const std::string& name, const Values& values) {
  for (const auto value : values) {
    if (value != static_cast<T>(value)) {
      return absl::InvalidArgumentError(
          absl::StrCat("input ", name, ": contents have ", value, ", which its datatype has not"));
    }
  }
  return Packed<T>(values);
}

// The bytes that raw contents would have had. Types without a field of their own (FP16, BF16)
// travel raw only.
absl::StatusOr<std::string> PackTyped(const std::string& name, const std::string& datatype,
                                      const InferTensorContents& contents) {
  switch (DataTypeFromName(datatype)) {
    case DT_FLOAT:
      return Packed<float>(contents.fp32_contents());
    case DT_DOUBLE:
      return Packed<double>(contents.fp64_contents());
    case DT_INT32:
      return Packed<int32_t>(contents.int_contents());
    case DT_INT64:
      return Packed<int64_t>(contents.int64_contents());
    case DT_UINT8:
      return PackedWithin<uint8_t>(name, contents.uint_contents());
    case DT_INT8:
      return PackedWithin<int8_t>(name, contents.int_contents());
    case DT_BOOL:
      return Packed<bool>(contents.bool_contents());
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("input ", name, ": datatype \"", datatype,
                       "\" has no typed contents; send raw_input_contents"));
  }
}

void SetInt64(const char* name, int64_t value, ModelInferResponse* response) {
  (*response->mutable_parameters())[name].set_int64_param(value);
}

}  // namespace

RequestHead PeekHead(const grpc::ByteBuffer& buffer) {
  RequestHead head;
  std::vector<grpc::Slice> slices;
  if (!buffer.Valid() || !buffer.Dump(&slices).ok() || slices.empty()) return head;
  const grpc::Slice& first = slices[0];
  CodedInputStream in(first.begin(),
                      static_cast<int>(std::min<size_t>(first.size(), 4 * kMaxIdBytes)));
  while (true) {
    std::string version;
    std::string* to = nullptr;
    switch (in.ReadTag()) {
      case BytesTag(ModelInferRequest::kModelNameFieldNumber):
        to = &head.model;
        break;
      case BytesTag(ModelInferRequest::kModelVersionFieldNumber):
        to = &version;
        break;
      case BytesTag(ModelInferRequest::kIdFieldNumber):
        to = &head.id;
        break;
      default:
        return head;
    }
    uint32_t size = 0;
    if (!in.ReadVarint32(&size) || size > kMaxIdBytes ||
        !in.ReadString(to, static_cast<int>(size))) {
      to->clear();
      return head;
    }
  }
}

absl::Status DecodeInferenceRequest(grpc::ByteBuffer buffer, InferenceRequest* request) {
  auto contents = std::make_shared<Contents>();
  ModelInferRequest message;
  CODISTILL_RETURN_IF_ERROR(
      DecodedPayload::Decode(&buffer, kRawInputField, &message, &contents->raw));
  if (message.id().size() > kMaxIdBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("id: has ", message.id().size(), " bytes; it may have at most ", kMaxIdBytes));
  }
  request->id = message.id();
  const int raw_count = contents->raw.count();
  if (raw_count > 0 && raw_count != message.inputs_size()) {
    return absl::InvalidArgumentError(absl::StrCat("raw_input_contents: has ", raw_count,
                                                   " entries for ", message.inputs_size(),
                                                   " inputs; it must have one for each"));
  }

  PredictionRequest& prediction = request->prediction;
  prediction.model = message.model_name();
  prediction.version = message.model_version();
  CODISTILL_RETURN_IF_ERROR(ReadParameters(message, request));
  for (const auto& output : message.outputs()) prediction.outputs.push_back(output.name());
  if (raw_count == 0) {
    contents->raw = DecodedPayload();  // `message` has all that came
    contents->typed.resize(message.inputs_size());
  }
  for (int i = 0; i < message.inputs_size(); ++i) {
    const auto& from = message.inputs(i);
    PredictionRequest::Input& input = prediction.inputs.emplace_back();
    input.name = from.name();
    input.datatype = from.datatype();
    input.shape.assign(from.shape().begin(), from.shape().end());
    if (raw_count > 0) {
      if (from.has_contents()) {
        return absl::InvalidArgumentError(absl::StrCat(
            "input ", from.name(), ": has contents although raw_input_contents is used"));
      }
      const auto parts = contents->raw.parts(i);
      input.parts.assign(parts.begin(), parts.end());
    } else {
      CODISTILL_ASSIGN_OR_RETURN(contents->typed[i],
                                 PackTyped(from.name(), from.datatype(), from.contents()));
      message.mutable_inputs(i)->clear_contents();  // never all of them twice
      const std::string& bytes = contents->typed[i];
      input.parts.emplace_back(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
    }
  }
  prediction.owner = std::move(contents);
  return absl::OkStatus();
}

size_t ResponseBytes(const Prediction& prediction) {
  size_t bytes = 0;
  for (const NamedTensor& output : prediction.outputs) bytes += output.tensor.bytes();
  return bytes;
}

grpc::ByteBuffer EncodeInferenceResponse(const std::string& model, const InferenceRequest& request,
                                         const Prediction& prediction,
                                         const std::shared_ptr<const void>& hold) {
  ModelInferResponse response;
  response.set_model_name(model);
  response.set_model_version(
      absl::StrCat(prediction.version.generation(), ".", prediction.version.step()));
  response.set_id(request.id);
  SetInt64("generation", static_cast<int64_t>(prediction.version.generation()), &response);
  SetInt64("step", prediction.version.step(), &response);
  SetInt64("latest_step", prediction.latest_step, &response);
  SetInt64("staleness_steps", prediction.staleness_steps, &response);
  SetInt64("age_ms", absl::ToInt64Milliseconds(prediction.age), &response);
  (*response.mutable_parameters())["precision"].set_string_param(
      std::string(DataTypeName(prediction.precision)));
  if (request.mark_final) {
    (*response.mutable_parameters())["triton_final_response"].set_bool_param(true);
  }
  std::vector<PayloadRef> payloads;
  for (const NamedTensor& output : prediction.outputs) {
    auto* to = response.add_outputs();
    to->set_name(output.name);
    to->set_datatype(std::string(DataTypeName(output.tensor.dtype())));
    for (int64_t size : output.tensor.shape()) to->add_shape(size);
    std::shared_ptr<const void> owner = output.tensor.owner();
    if (hold != nullptr) owner = std::make_shared<const Held>(std::move(owner), hold);
    payloads.push_back({output.tensor.data(), output.tensor.bytes(), std::move(owner)});
  }
  return EncodeWithPayload(response, kRawOutputField, payloads);
}

grpc::ByteBuffer EncodeStreamResponse(const grpc::ByteBuffer& response) {
  std::vector<grpc::Slice> slices;
  if (!response.Dump(&slices).ok()) slices.clear();  // uncompressed: cannot fail
  uint8_t header[2 * kMaxVarintBytes];
  uint8_t* end = CodedOutputStream::WriteTagToArray(
      WireFormatLite::MakeTag(ModelStreamInferResponse::kInferResponseFieldNumber,
                              WireFormatLite::WIRETYPE_LENGTH_DELIMITED),
      header);
  end = CodedOutputStream::WriteVarint64ToArray(response.Length(), end);
  slices.insert(slices.begin(), grpc::Slice(header, end - header));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

grpc::ByteBuffer EncodeStreamError(const std::string& id, const absl::Status& status) {
  std::string text(status.message());
  if (text.size() > kMaxErrorBytes) {
    size_t end = kMaxErrorBytes;
    while (end > 0 && (text[end] & 0xc0) == 0x80) --end;  // between characters of UTF-8
    const size_t more = text.size() - end;
    text.resize(end);
    absl::StrAppend(&text, "... (", more, " more bytes)");
  }
  ModelStreamInferResponse message;
  message.set_error_message(id.empty() ? text : absl::StrCat("[request id: ", id, "] ", text));
  // An empty text would mean that nothing is wrong.
  if (message.error_message().empty()) {
    message.set_error_message(absl::StatusCodeToString(status.code()));
  }
  ModelInferResponse* const response = message.mutable_infer_response();
  response->set_id(id);
  (*response->mutable_parameters())["status"].set_string_param(
      absl::StatusCodeToString(status.code()));
  if (const absl::optional<absl::Duration> delay = RetryAfter(status); delay.has_value()) {
    SetInt64("retry_after_ms", absl::ToInt64Milliseconds(*delay), response);
  }
  return EncodeWithPayload(message, kRawOutputField, {});
}

}  // namespace codistill

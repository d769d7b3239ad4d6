#include "control/json_output.h"

#include <cmath>

#include "nlohmann/json.hpp"

namespace codistill {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using Json = nlohmann::ordered_json;

Json MessageToJson(const Message& message);

Json Number(double value) {
  // JSON has no NaN or infinity.
  return std::isfinite(value) ? Json(value) : Json(nullptr);
}

// `index` < 0: the singular field.
Json Value(const Message& m, const FieldDescriptor* f, int index) {
  const Reflection& r = *m.GetReflection();
  const bool one = index < 0;
  switch (f->cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return one ? r.GetInt32(m, f) : r.GetRepeatedInt32(m, f, index);
    case FieldDescriptor::CPPTYPE_INT64:
      return one ? r.GetInt64(m, f) : r.GetRepeatedInt64(m, f, index);
    case FieldDescriptor::CPPTYPE_UINT32:
      return one ? r.GetUInt32(m, f) : r.GetRepeatedUInt32(m, f, index);
    case FieldDescriptor::CPPTYPE_UINT64:
      return one ? r.GetUInt64(m, f) : r.GetRepeatedUInt64(m, f, index);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return Number(one ? r.GetDouble(m, f) : r.GetRepeatedDouble(m, f, index));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return Number(one ? r.GetFloat(m, f) : r.GetRepeatedFloat(m, f, index));
    case FieldDescriptor::CPPTYPE_BOOL:
      return one ? r.GetBool(m, f) : r.GetRepeatedBool(m, f, index);
    case FieldDescriptor::CPPTYPE_ENUM:
      return (one ? r.GetEnum(m, f) : r.GetRepeatedEnum(m, f, index))->name();
    case FieldDescriptor::CPPTYPE_STRING: {
      const std::string text = one ? r.GetString(m, f) : r.GetRepeatedString(m, f, index);
      // Opaque bytes (worker state) are of no use to a reader: only their length is shown.
      if (f->type() == FieldDescriptor::TYPE_BYTES) return text.size();
      return text;
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return MessageToJson(one ? r.GetMessage(m, f) : r.GetRepeatedMessage(m, f, index));
  }
  return nullptr;
}

Json MessageToJson(const Message& message) {
  Json out = Json::object();
  const Reflection& reflection = *message.GetReflection();
  const auto* descriptor = message.GetDescriptor();
  for (int i = 0; i < descriptor->field_count(); ++i) {
    const FieldDescriptor* field = descriptor->field(i);
    if (field->is_repeated()) {
      Json list = Json::array();
      for (int k = 0; k < reflection.FieldSize(message, field); ++k) {
        list.push_back(Value(message, field, k));
      }
      out[field->name()] = std::move(list);
    } else if (!field->has_presence() || reflection.HasField(message, field)) {
      out[field->name()] = Value(message, field, -1);
    }
  }
  return out;
}

}  // namespace

std::string ToJson(const google::protobuf::Message& message, int indent) {
  return MessageToJson(message).dump(indent > 0 ? indent : -1, ' ', false,
                                     Json::error_handler_t::replace);
}

}  // namespace codistill

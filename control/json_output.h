#ifndef CODISTILL_CONTROL_JSON_OUTPUT_H_
#define CODISTILL_CONTROL_JSON_OUTPUT_H_

#include <string>

#include "google/protobuf/message.h"

namespace codistill {

// A message as JSON: proto field names, fields of value zero included, 64-bit integers as numbers
// (they are strings in protobuf's own printer; its parser takes both). Fields with presence
// (`optional`, messages) only where set. `indent` 0 = one line.
std::string ToJson(const google::protobuf::Message& message, int indent = 2);

}  // namespace codistill

#endif  // CODISTILL_CONTROL_JSON_OUTPUT_H_

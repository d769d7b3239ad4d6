// Reads protobuf's text format, and goes on after a mistake: a job file with five mistakes deserves
// five messages, where protobuf's own parser stops at the first.

#ifndef CODISTILL_COMMON_CONFIG_TEXT_PROTO_H_
#define CODISTILL_COMMON_CONFIG_TEXT_PROTO_H_

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace codistill {

struct TextProtoError {
  int line = 0;  // from 1
  int column = 0;
  std::string path;     // of the field at fault, e.g. "groups[1].name"; empty outside any
  std::string problem;  // what is wrong and what would be right
  // Where `path` is no field: the one that was probably meant, else empty.
  std::string meant;
  // The structure is broken (a bracket is missing, say): the rest of the file was not read.
  bool breaks = false;

  // "12:5: groups[1].name: problem".
  std::string ToString() const;
};

// Fills `message` (cleared first) from `text` and returns all mistakes; none means that everything
// was understood. After mistakes the fields that were understood are set. Accepts what
// google::protobuf::TextFormat does, except extensions, Any and groups.
std::vector<TextProtoError> ParseTextProto(absl::string_view text,
                                           google::protobuf::Message* message);

}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_TEXT_PROTO_H_

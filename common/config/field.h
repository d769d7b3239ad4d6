// Fields of a message by name and by text: what the text-proto reader and SetField share.

#ifndef CODISTILL_COMMON_CONFIG_FIELD_H_
#define CODISTILL_COMMON_CONFIG_FIELD_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace codistill {
namespace internal {

// Where SetScalar puts a value that belongs to a repeated field.
inline constexpr int kAppend = -1;

// Parses `text` as one value of `field` (not a message) and stores it: in a singular field, or in
// element `index` of a repeated one (kAppend: a new last element). On failure nothing changes and
// the message says what is wrong with the value and what would be right, without the field's path.
absl::Status SetScalar(const google::protobuf::FieldDescriptor& field, absl::string_view text,
                       int index, google::protobuf::Message* message);

// The field of `type` whose name is so close to `name` that it was probably meant; else null.
const google::protobuf::FieldDescriptor* NearestField(const google::protobuf::Descriptor& type,
                                                      absl::string_view name);

// What to say about a name that `type` does not have: the nearest one, or all there are. `root` is
// the type of the whole file: a name that lives elsewhere in it is pointed out by its path.
std::string NoSuchField(const google::protobuf::Descriptor& type, absl::string_view name,
                        const google::protobuf::Descriptor& root);

// "a, b, c": the fields of a message type.
std::string FieldNames(const google::protobuf::Descriptor& type);

}  // namespace internal
}  // namespace codistill

#endif  // CODISTILL_COMMON_CONFIG_FIELD_H_

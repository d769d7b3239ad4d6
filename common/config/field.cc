#include "common/config/field.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace codistill {
namespace internal {
namespace {

using ::google::protobuf::Descriptor;
using ::google::protobuf::EnumDescriptor;
using ::google::protobuf::EnumValueDescriptor;
using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::google::protobuf::Reflection;

// Insertions, deletions, replacements and swaps of neighbours that turn one name into the other.
size_t EditDistance(absl::string_view a, absl::string_view b) {
  std::vector<size_t> before(b.size() + 1), last(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    std::swap(before, last);
    std::swap(last, row);
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({last[j - 1] + (a[i - 1] != b[j - 1]), last[j] + 1, row[j - 1] + 1});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        row[j] = std::min(row[j], before[j - 2] + 1);
      }
    }
  }
  return row[b.size()];
}

// Index of the candidate that differs from `name` in at most a third of its letters; -1 = none.
int Nearest(absl::string_view name, const std::vector<std::string>& candidates) {
  constexpr size_t kMaxName = 64;  // the distance costs a product of lengths
  if (name.size() > kMaxName) return -1;
  const std::string lower = absl::AsciiStrToLower(name);
  int nearest = -1;
  size_t best = std::max<size_t>(1, name.size() / 3) + 1;
  for (size_t i = 0; i < candidates.size(); ++i) {
    const size_t distance = EditDistance(lower, absl::AsciiStrToLower(candidates[i]));
    if (distance < best) {
      best = distance;
      nearest = static_cast<int>(i);
    }
  }
  return nearest;
}

// Path of the first field called `name` below `type`, breadth first, so that the least nested wins.
std::string PathOf(const Descriptor& type, absl::string_view name) {
  constexpr int kMaxDepth = 6;  // a recursive message type must not loop
  std::vector<std::pair<std::string, const Descriptor*>> level = {{"", &type}};
  for (int depth = 0; depth < kMaxDepth && !level.empty(); ++depth) {
    std::vector<std::pair<std::string, const Descriptor*>> next;
    for (const auto& [path, message] : level) {
      for (int i = 0; i < message->field_count(); ++i) {
        const FieldDescriptor& field = *message->field(i);
        std::string inner = path.empty() ? field.name() : absl::StrCat(path, ".", field.name());
        if (field.name() == name) return inner;
        if (field.message_type() != nullptr) next.emplace_back(inner, field.message_type());
      }
    }
    level = std::move(next);
  }
  return "";
}

absl::Status WrongValue(absl::string_view text, absl::string_view wanted) {
  return absl::InvalidArgumentError(
      absl::StrCat("wrong value (", text.empty() ? "nothing" : text, "); it must be ", wanted));
}

absl::Status SetEnum(const FieldDescriptor& field, absl::string_view text, int index,
                     Message* message) {
  const EnumDescriptor& type = *field.enum_type();
  const EnumValueDescriptor* value = type.FindValueByName(std::string(text));
  if (value == nullptr) {
    std::vector<std::string> names;
    for (int i = 0; i < type.value_count(); ++i) names.push_back(type.value(i)->name());
    const int nearest = Nearest(text, names);
    return WrongValue(
        text,
        absl::StrCat("one of ", absl::StrJoin(names, ", "),
                     nearest < 0 ? "" : absl::StrCat("; did you mean ", names[nearest], "?")));
  }
  const Reflection& reflection = *message->GetReflection();
  if (!field.is_repeated()) {
    reflection.SetEnum(message, &field, value);
  } else if (index == kAppend) {
    reflection.AddEnum(message, &field, value);
  } else {
    reflection.SetRepeatedEnum(message, &field, index, value);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status SetScalar(const FieldDescriptor& field, absl::string_view text, int index,
                       Message* message) {
  const Reflection& reflection = *message->GetReflection();
// One type of value: how it is parsed, what is said when that fails, how it is stored.
#define CODISTILL_SET_SCALAR(type, Name, parsed, wanted)           \
  do {                                                             \
    type value{};                                                  \
    if (!(parsed)) return WrongValue(text, wanted);                \
    if (!field.is_repeated()) {                                    \
      reflection.Set##Name(message, &field, value);                \
    } else if (index == kAppend) {                                 \
      reflection.Add##Name(message, &field, value);                \
    } else {                                                       \
      reflection.SetRepeated##Name(message, &field, index, value); \
    }                                                              \
    return absl::OkStatus();                                       \
  } while (false)

  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      CODISTILL_SET_SCALAR(int32_t, Int32, absl::SimpleAtoi(text, &value),
                           "an integer from -2147483648 to 2147483647");
    case FieldDescriptor::CPPTYPE_INT64:
      CODISTILL_SET_SCALAR(int64_t, Int64, absl::SimpleAtoi(text, &value), "a 64-bit integer");
    case FieldDescriptor::CPPTYPE_UINT32:
      CODISTILL_SET_SCALAR(uint32_t, UInt32, absl::SimpleAtoi(text, &value),
                           "an integer from 0 to 4294967295");
    case FieldDescriptor::CPPTYPE_UINT64:
      CODISTILL_SET_SCALAR(uint64_t, UInt64, absl::SimpleAtoi(text, &value),
                           "a 64-bit integer, not negative");
    case FieldDescriptor::CPPTYPE_DOUBLE:
      CODISTILL_SET_SCALAR(double, Double, absl::SimpleAtod(text, &value), "a number");
    case FieldDescriptor::CPPTYPE_FLOAT:
      CODISTILL_SET_SCALAR(float, Float, absl::SimpleAtof(text, &value), "a number");
    case FieldDescriptor::CPPTYPE_BOOL:
      CODISTILL_SET_SCALAR(bool, Bool, absl::SimpleAtob(text, &value), "true or false");
    case FieldDescriptor::CPPTYPE_STRING:
      CODISTILL_SET_SCALAR(std::string, String, (value = std::string(text), true), "a string");
    case FieldDescriptor::CPPTYPE_ENUM:
      return SetEnum(field, text, index, message);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      break;
  }
#undef CODISTILL_SET_SCALAR
  return absl::InvalidArgumentError(
      absl::StrCat("a message takes no value (", text,
                   "); set one of its fields: ", FieldNames(*field.message_type())));
}

const FieldDescriptor* NearestField(const Descriptor& type, absl::string_view name) {
  std::vector<std::string> names;
  for (int i = 0; i < type.field_count(); ++i) names.push_back(type.field(i)->name());
  const int nearest = Nearest(name, names);
  return nearest < 0 ? nullptr : type.field(nearest);
}

std::string NoSuchField(const Descriptor& type, absl::string_view name, const Descriptor& root) {
  if (const FieldDescriptor* nearest = NearestField(type, name)) {
    return absl::StrCat("no field of this name; did you mean ", nearest->name(), "?");
  }
  if (const std::string path = PathOf(root, name); !path.empty()) {
    return absl::StrCat("no field of this name here; there is a ", path);
  }
  return absl::StrCat("no field of this name; there are ", FieldNames(type));
}

std::string FieldNames(const Descriptor& type) {
  std::vector<std::string> names;
  for (int i = 0; i < type.field_count(); ++i) names.push_back(type.field(i)->name());
  return absl::StrJoin(names, ", ");
}

}  // namespace internal
}  // namespace codistill

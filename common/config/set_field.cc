#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"
#include "common/config/field.h"
#include "common/config/job.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/message.h"

namespace codistill {
namespace {

using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::google::protobuf::Reflection;

// One step of a path: "groups", "groups[1]".
struct PathPart {
  std::string name;
  int index = internal::kAppend;  // kAppend = none was given
};

absl::StatusOr<std::vector<PathPart>> ParsePath(absl::string_view path) {
  std::vector<PathPart> parts;
  for (absl::string_view text : absl::StrSplit(path, '.')) {
    PathPart part;
    const size_t bracket = text.find('[');
    part.name = std::string(text.substr(0, bracket));
    if (bracket != absl::string_view::npos) {
      absl::string_view index = text.substr(bracket + 1);
      if (!absl::ConsumeSuffix(&index, "]") || !absl::SimpleAtoi(index, &part.index) ||
          part.index < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(path, ": \"", text, "\" has a malformed index; NAME[0] would be right"));
      }
    }
    if (part.name.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", path,
                       "\": an empty name in the path; "
                       "names separated by single dots would be right"));
    }
    parts.push_back(std::move(part));
  }
  return parts;
}

absl::Status WithPath(absl::string_view path, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", problem));
}

// Puts `value` where parts[at...] lead from `message`. `walked` is the path so far.
absl::Status Assign(const std::vector<PathPart>& parts, size_t at, const std::string& walked,
                    absl::string_view value, Message* message) {
  const PathPart& part = parts[at];
  const std::string path = walked.empty() ? part.name : absl::StrCat(walked, ".", part.name);
  const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(part.name);
  if (field == nullptr) {
    return WithPath(path, internal::NoSuchField(*message->GetDescriptor(), part.name,
                                                *JobConfig::descriptor()));
  }
  const Reflection& reflection = *message->GetReflection();
  const bool is_message = field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
  const bool last = at + 1 == parts.size();
  if (part.index != internal::kAppend && !field->is_repeated()) {
    return WithPath(
        path, absl::StrCat("takes one value, so an index ([", part.index, "]) makes no sense"));
  }
  if (part.index != internal::kAppend && part.index >= reflection.FieldSize(*message, field)) {
    return WithPath(path, absl::StrCat("index ", part.index, " does not exist; there are ",
                                       reflection.FieldSize(*message, field), ", counted from 0"));
  }
  if (last && is_message) {
    return WithPath(path, absl::StrCat("is a message, not a value; set one of its fields: ",
                                       internal::FieldNames(*field->message_type())));
  }
  if (!last && !is_message) {
    return WithPath(path, absl::StrCat("is a value and has no field ", parts[at + 1].name));
  }

  if (is_message) {
    if (!field->is_repeated()) {
      return Assign(parts, at + 1, path, value, reflection.MutableMessage(message, field));
    }
    if (part.index != internal::kAppend) {
      return Assign(parts, at + 1, absl::StrCat(path, "[", part.index, "]"), value,
                    reflection.MutableRepeatedMessage(message, field, part.index));
    }
    const int size = reflection.FieldSize(*message, field);
    if (size == 0) return WithPath(path, "has no elements, so there is nothing to set");
    for (int i = 0; i < size; ++i) {
      CODISTILL_RETURN_IF_ERROR(Assign(parts, at + 1, absl::StrCat(path, "[", i, "]"), value,
                                       reflection.MutableRepeatedMessage(message, field, i)));
    }
    return absl::OkStatus();
  }

  if (field->is_repeated() && part.index == internal::kAppend) {
    // The whole list at once: values separated by commas; nothing = the empty list.
    reflection.ClearField(message, field);
    if (value.empty()) return absl::OkStatus();
    for (absl::string_view element : absl::StrSplit(value, ',')) {
      CODISTILL_RETURN_IF_ERROR(
          Annotate(internal::SetScalar(*field, element, internal::kAppend, message), path));
    }
    return absl::OkStatus();
  }
  return Annotate(internal::SetScalar(*field, value, part.index, message), path);
}

}  // namespace

absl::Status SetField(absl::string_view assignment, JobConfig* job) {
  const size_t equals = assignment.find('=');
  if (equals == absl::string_view::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", assignment, "\" has no \"=\"; field.path=value would be right"));
  }
  const absl::string_view path = absl::StripAsciiWhitespace(assignment.substr(0, equals));
  if (path.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", assignment, "\" names no field; field.path=value would be right"));
  }
  CODISTILL_ASSIGN_OR_RETURN(const std::vector<PathPart> parts, ParsePath(path));
  // On a copy: a value that does not fit must leave no half-made change behind.
  JobConfig changed = *job;
  CODISTILL_RETURN_IF_ERROR(Assign(parts, 0, "", assignment.substr(equals + 1), &changed));
  job->Swap(&changed);
  return absl::OkStatus();
}

}  // namespace codistill

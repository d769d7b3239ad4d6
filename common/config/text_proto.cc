#include "common/config/text_proto.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/config/field.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/io/tokenizer.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace codistill {
namespace {

using ::google::protobuf::Descriptor;
using ::google::protobuf::FieldDescriptor;
using ::google::protobuf::Message;
using ::google::protobuf::Reflection;
using ::google::protobuf::io::ArrayInputStream;
using ::google::protobuf::io::Tokenizer;

// A hostile file must fill neither the memory nor the stack.
constexpr size_t kMaxErrors = 100;
constexpr int kMaxDepth = 32;

class Parser : public google::protobuf::io::ErrorCollector {
 public:
  Parser(absl::string_view text, const Descriptor& root)
      : root_(root), input_(text.data(), static_cast<int>(text.size())), tokenizer_(&input_, this) {
    tokenizer_.set_comment_style(Tokenizer::SH_COMMENT_STYLE);
    tokenizer_.set_allow_f_after_float(true);
    tokenizer_.set_require_space_after_number(false);
    tokenizer_.Next();
  }

  std::vector<TextProtoError> Parse(Message* message) {
    message->Clear();
    const bool complete = ParseFields(message, "", "", 0);
    if (!complete && !errors_.empty()) errors_.back().breaks = true;
    // In the order of the file, one mistake a place: an unterminated string is found by the
    // tokenizer and then once more by whoever wanted a value there.
    std::stable_sort(errors_.begin(), errors_.end(), [](const auto& a, const auto& b) {
      return std::make_pair(a.line, a.column) < std::make_pair(b.line, b.column);
    });
    return std::move(errors_);
  }

  // From the tokenizer: malformed numbers, unterminated strings. Positions count from 0.
  void AddError(int line, int column, const std::string& message) override {
    Fail(line, column, "", message);
  }

 private:
  const std::string& text() { return tokenizer_.current().text; }
  Tokenizer::TokenType type() { return tokenizer_.current().type; }
  bool At(const char* symbol) { return text() == symbol && type() == Tokenizer::TYPE_SYMBOL; }
  bool AtEnd() { return type() == Tokenizer::TYPE_END; }
  bool TryTake(const char* symbol) {
    if (!At(symbol)) return false;
    tokenizer_.Next();
    return true;
  }
  std::string Here() { return AtEnd() ? "the end of the file" : text(); }

  void Fail(int line, int column, absl::string_view path, std::string problem,
            std::string meant = "") {
    if (errors_.size() >= kMaxErrors) return;
    TextProtoError error;
    error.line = line + 1;
    error.column = column + 1;
    error.path = std::string(path);
    error.problem = std::move(problem);
    error.meant = std::move(meant);
    errors_.push_back(std::move(error));
  }
  void FailHere(absl::string_view path, std::string problem) {
    Fail(tokenizer_.current().line, tokenizer_.current().column, path, std::move(problem));
  }

  // Fields up to `close` ("" = the end of the file), which is left to the caller. False where the
  // structure itself is broken and nothing after it can be trusted.
  bool ParseFields(Message* message, const std::string& path, const char* close, int depth) {
    const Descriptor& descriptor = *message->GetDescriptor();
    std::set<int> seen;
    while (true) {
      if (*close != '\0' && At(close)) return true;
      if (AtEnd()) {
        if (*close == '\0') return true;
        FailHere(path,
                 absl::StrCat("the file ends inside this message; a \"", close, "\" is missing"));
        return false;
      }
      if (type() != Tokenizer::TYPE_IDENTIFIER) {
        FailHere(path, absl::StrCat("unexpected \"", text(), "\"; the name of a field ",
                                    *close == '\0' ? "" : absl::StrCat("or \"", close, "\" "),
                                    "must stand here"));
        return false;
      }
      const std::string name = text();
      const std::string inner = path.empty() ? name : absl::StrCat(path, ".", name);
      const int line = tokenizer_.current().line;
      const int column = tokenizer_.current().column;
      tokenizer_.Next();

      const FieldDescriptor* field = descriptor.FindFieldByName(name);
      if (field == nullptr) {
        const FieldDescriptor* nearest = internal::NearestField(descriptor, name);
        std::string meant;
        if (nearest != nullptr) {
          meant = path.empty() ? nearest->name() : absl::StrCat(path, ".", nearest->name());
        }
        Fail(line, column, inner, internal::NoSuchField(descriptor, name, root_), std::move(meant));
        if (!SkipValue(inner)) return false;
      } else {
        if (!field->is_repeated()) {
          if (!seen.insert(field->number()).second) {
            Fail(line, column, inner, "given twice; once would be right");
          }
          CheckOneof(*message, *field, inner, line, column);
        }
        if (!ParseField(message, *field, inner, depth)) return false;
      }
      if (!TryTake(";")) TryTake(",");
    }
  }

  void CheckOneof(const Message& message, const FieldDescriptor& field, const std::string& path,
                  int line, int column) {
    const google::protobuf::OneofDescriptor* oneof = field.real_containing_oneof();
    if (oneof == nullptr) return;
    const FieldDescriptor* other = message.GetReflection()->GetOneofFieldDescriptor(message, oneof);
    if (other == nullptr || other == &field) return;
    Fail(line, column, path,
         absl::StrCat("excludes ", other->name(), ", which is given too; keep one of the two"));
  }

  bool ParseField(Message* message, const FieldDescriptor& field, const std::string& path,
                  int depth) {
    const bool colon = TryTake(":");
    const bool is_message = field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE;
    if (!is_message && !colon) {
      FailHere(path, absl::StrCat("unexpected ", Here(), "; a \":\" and a value must stand here"));
      // A forgotten colon is no reason to give up, unless there is no value either.
      if (At("{") || At("<")) return SkipValue(path);
      if (!AtValue()) return false;
    }
    if (!At("[")) return ParseElement(message, field, path, depth);
    if (!field.is_repeated()) {
      FailHere(path, "a list, but the field takes one value");
      return SkipValue(path);
    }
    tokenizer_.Next();
    if (TryTake("]")) return true;
    while (true) {
      if (!ParseElement(message, field, path, depth)) return false;
      if (TryTake("]")) return true;
      if (!TryTake(",")) {
        FailHere(path, absl::StrCat("unexpected ", Here(), "; a \",\" or \"]\" must stand here"));
        return false;
      }
    }
  }

  bool ParseElement(Message* message, const FieldDescriptor& field, const std::string& path,
                    int depth) {
    const Reflection& reflection = *message->GetReflection();
    std::string element = path;
    if (field.is_repeated()) {
      absl::StrAppend(&element, "[", reflection.FieldSize(*message, &field), "]");
    }
    if (field.cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) {
      return ParseScalar(message, field, field.is_repeated() ? element : path);
    }
    const char* close = At("<") ? ">" : "}";
    if (!At("{") && !At("<")) {
      FailHere(element, absl::StrCat("unexpected ", Here(),
                                     "; this field is a message: a \"{\" must stand here"));
      return AtValue() && SkipValue(element);
    }
    if (depth >= kMaxDepth) {
      FailHere(element, "nested too deeply");
      return false;
    }
    tokenizer_.Next();
    Message* inner = field.is_repeated() ? reflection.AddMessage(message, &field)
                                         : reflection.MutableMessage(message, &field);
    if (!ParseFields(inner, element, close, depth + 1)) return false;
    tokenizer_.Next();
    return true;
  }

  // Whether a scalar value can start here.
  bool AtValue() {
    return At("-") || type() == Tokenizer::TYPE_IDENTIFIER || type() == Tokenizer::TYPE_INTEGER ||
           type() == Tokenizer::TYPE_FLOAT || type() == Tokenizer::TYPE_STRING;
  }

  bool ParseScalar(Message* message, const FieldDescriptor& field, const std::string& path) {
    const int line = tokenizer_.current().line;
    const int column = tokenizer_.current().column;
    if (!AtValue()) {
      FailHere(path, absl::StrCat("unexpected ", Here(), "; a value must stand here"));
      return At("{") || At("<") || At("[") ? SkipValue(path) : false;
    }
    bool quoted = false;
    const std::string value = TakeScalar(&quoted);
    const bool wants_quotes = field.cpp_type() == FieldDescriptor::CPPTYPE_STRING;
    if (quoted != wants_quotes) {
      Fail(line, column, path,
           wants_quotes
               ? absl::StrCat("wrong value (", value, "); a string needs quotes: \"", value, "\"")
               : absl::StrCat("wrong value (\"", value,
                              "\"); only strings are quoted, and this is none"));
      return true;
    }
    const absl::Status status = internal::SetScalar(field, value, internal::kAppend, message);
    if (!status.ok()) Fail(line, column, path, std::string(status.message()));
    return true;
  }

  // Takes one value and returns its plain text: strings without quotes and escapes, adjacent ones
  // joined, numbers in decimal.
  std::string TakeScalar(bool* quoted) {
    std::string value;
    if (type() == Tokenizer::TYPE_STRING) {
      *quoted = true;
      while (type() == Tokenizer::TYPE_STRING) {
        Tokenizer::ParseStringAppend(text(), &value);
        tokenizer_.Next();
      }
      return value;
    }
    if (TryTake("-")) value = "-";
    uint64_t integer;
    if (type() == Tokenizer::TYPE_INTEGER &&
        Tokenizer::ParseInteger(text(), std::numeric_limits<uint64_t>::max(), &integer)) {
      absl::StrAppend(&value, integer);
    } else if (type() == Tokenizer::TYPE_FLOAT) {
      absl::StrAppendFormat(&value, "%.17g", Tokenizer::ParseFloat(text()));
    } else {
      value += text();
    }
    tokenizer_.Next();
    return value;
  }

  // Skips what follows the name of an unknown or misused field.
  bool SkipValue(const std::string& path) {
    TryTake(":");
    int depth = 0;
    do {
      if (AtEnd()) {
        FailHere(path, "the file ends inside this field");
        return false;
      }
      if (At("{") || At("<") || At("[")) {
        ++depth;
        tokenizer_.Next();
      } else if (At("}") || At(">") || At("]")) {
        if (depth == 0) return true;  // no value at all; the bracket belongs to the message around
        --depth;
        tokenizer_.Next();
      } else if (depth == 0) {
        bool quoted = false;
        if (AtValue())
          TakeScalar(&quoted);
        else
          tokenizer_.Next();
      } else {
        tokenizer_.Next();
      }
    } while (depth > 0);
    return true;
  }

  const Descriptor& root_;
  std::vector<TextProtoError> errors_;
  ArrayInputStream input_;
  Tokenizer tokenizer_;
};

}  // namespace

std::string TextProtoError::ToString() const {
  return absl::StrCat(line, ":", column, ": ", path, path.empty() ? "" : ": ", problem);
}

std::vector<TextProtoError> ParseTextProto(absl::string_view text, Message* message) {
  return Parser(text, *message->GetDescriptor()).Parse(message);
}

}  // namespace codistill

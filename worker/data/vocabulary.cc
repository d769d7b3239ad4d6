#include "worker/data/vocabulary.h"

#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/base/status.h"
#include "worker/data/line_reader.h"

namespace codistill {
namespace {

// Takes the first word off `line`; empty when there is none left.
absl::string_view TakeWord(absl::string_view* line) {
  *line = absl::StripLeadingAsciiWhitespace(*line);
  size_t n = 0;
  while (n < line->size() && !absl::ascii_isspace((*line)[n])) ++n;
  const absl::string_view word = line->substr(0, n);
  line->remove_prefix(n);
  return word;
}

}  // namespace

constexpr absl::string_view Vocabulary::kEndOfLine;

absl::StatusOr<Vocabulary> Vocabulary::Read(const std::vector<std::string>& files,
                                            absl::string_view unknown) {
  Vocabulary vocabulary;
  auto& index = vocabulary.index_;
  const auto add = [&index](absl::string_view word) {
    return index.try_emplace(word, static_cast<int32_t>(index.size())).first->second;
  };
  for (const std::string& path : files) {
    CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<LineReader> reader, LineReader::Open(path));
    absl::string_view line;
    while (true) {
      CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&line));
      if (!more) break;
      for (absl::string_view word = TakeWord(&line); !word.empty(); word = TakeWord(&line)) {
        add(word);
      }
    }
  }
  vocabulary.end_of_line_ = add(kEndOfLine);
  vocabulary.unknown_ = std::string(unknown);
  if (const auto found = index.find(unknown); found != index.end()) {
    vocabulary.unknown_index_ = found->second;
  }
  return vocabulary;
}

absl::Status Vocabulary::Tokenize(const std::string& path, std::vector<int32_t>* tokens,
                                  int64_t* unknown_words) const {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<LineReader> reader, LineReader::Open(path));
  absl::string_view line;
  while (true) {
    CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&line));
    if (!more) return absl::OkStatus();
    for (absl::string_view word = TakeWord(&line); !word.empty(); word = TakeWord(&line)) {
      const auto found = index_.find(word);
      if (found != index_.end()) {
        tokens->push_back(found->second);
        continue;
      }
      if (unknown_index_ < 0) {
        return absl::InvalidArgumentError(absl::StrCat(reader->place(), ": \"", word,
                                                       "\" is not in the vocabulary, nor is ",
                                                       unknown_, ", which would stand for it"));
      }
      tokens->push_back(unknown_index_);
      ++*unknown_words;
    }
    tokens->push_back(end_of_line_);
  }
}

}  // namespace codistill

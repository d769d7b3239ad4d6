#include "tests/integration/prometheus_text.h"

#include <cmath>
#include <limits>
#include <set>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/base/status.h"

namespace codistill {
namespace {

// Takes a name off the front; empty if there is none. Label names have no colons.
std::string TakeName(absl::string_view* text, bool colons) {
  size_t n = 0;
  while (n < text->size()) {
    const char c = (*text)[n];
    const bool fits = absl::ascii_isalpha(c) || c == '_' || (colons && c == ':') ||
                      (n > 0 && absl::ascii_isdigit(c));
    if (!fits) break;
    ++n;
  }
  std::string name(text->substr(0, n));
  text->remove_prefix(n);
  return name;
}

bool ParseValue(absl::string_view text, double* value) {
  if (text == "+Inf" || text == "-Inf") {
    *value = text[0] == '+' ? std::numeric_limits<double>::infinity()
                            : -std::numeric_limits<double>::infinity();
    return true;
  }
  if (text == "NaN" || text == "Nan") {
    *value = std::nan("");
    return true;
  }
  return absl::SimpleAtod(text, value) && std::isfinite(*value);
}

absl::Status TakeLabels(absl::string_view* text, std::map<std::string, std::string>* labels) {
  if (!absl::ConsumePrefix(text, "{")) return absl::OkStatus();
  while (!absl::ConsumePrefix(text, "}")) {
    const std::string name = TakeName(text, /*colons=*/false);
    if (name.empty()) return absl::InvalidArgumentError("no name of a label");
    if (!absl::ConsumePrefix(text, "=\"")) return absl::InvalidArgumentError("no =\" after it");
    std::string value;
    while (!text->empty() && text->front() != '"') {
      char c = text->front();
      text->remove_prefix(1);
      if (c == '\\') {
        if (text->empty()) break;
        c = text->front();
        text->remove_prefix(1);
        if (c != '\\' && c != '"' && c != 'n') return absl::InvalidArgumentError("bad escape");
        if (c == 'n') c = '\n';
      }
      value.push_back(c);
    }
    if (!absl::ConsumePrefix(text, "\"")) return absl::InvalidArgumentError("value without end");
    if (!labels->emplace(name, value).second) {
      return absl::InvalidArgumentError(absl::StrCat("label ", name, " twice"));
    }
    if (!absl::ConsumePrefix(text, ",") && !absl::StartsWith(*text, "}")) {
      return absl::InvalidArgumentError("neither , nor } after a label");
    }
  }
  return absl::OkStatus();
}

class Parser {
 public:
  absl::Status Line(absl::string_view line) {
    if (line.empty()) return absl::OkStatus();
    if (absl::ConsumePrefix(&line, "# HELP ")) return Comment("HELP", line, &helped_);
    if (absl::StartsWith(line, "# TYPE ")) {
      line.remove_prefix(7);
      return Comment("TYPE", line, &typed_);
    }
    if (line[0] == '#') return absl::OkStatus();
    return Sample(line);
  }

  absl::Status Finish() const {
    for (const auto& [key, buckets] : histograms_) {
      if (buckets.last_bound != std::numeric_limits<double>::infinity()) {
        return absl::InvalidArgumentError(absl::StrCat(key, " has no bucket +Inf"));
      }
      const auto count = counts_.find(key);
      if (count == counts_.end() || count->second != buckets.last) {
        return absl::InvalidArgumentError(absl::StrCat(key, ": count is not the bucket +Inf"));
      }
    }
    return absl::OkStatus();
  }

  std::vector<PrometheusSample> Take() { return std::move(samples_); }

 private:
  struct Buckets {
    double last_bound = -std::numeric_limits<double>::infinity();
    double last = 0;
  };

  absl::Status Comment(absl::string_view kind, absl::string_view rest,
                       std::set<std::string>* seen) {
    const std::string name = TakeName(&rest, /*colons=*/true);
    if (name.empty()) return absl::InvalidArgumentError(absl::StrCat(kind, " without a name"));
    if (!seen->insert(name).second) {
      return absl::InvalidArgumentError(absl::StrCat(kind, " of ", name, " twice"));
    }
    if (kind == "TYPE") {
      if (closed_.count(name) > 0 || name == family_) {
        return absl::InvalidArgumentError(absl::StrCat("TYPE of ", name, " after its samples"));
      }
      type_[name] = std::string(absl::StripAsciiWhitespace(rest));
      static const auto* types =
          new std::set<std::string>{"counter", "gauge", "histogram", "summary", "untyped"};
      if (types->count(type_[name]) == 0) {
        return absl::InvalidArgumentError(absl::StrCat("no type \"", type_[name], "\""));
      }
    }
    return absl::OkStatus();
  }

  // The family a sample belongs to: histograms and summaries have samples of derived names.
  std::string FamilyOf(const std::string& name) const {
    for (const absl::string_view suffix : {"_bucket", "_sum", "_count"}) {
      absl::string_view base = name;
      if (!absl::ConsumeSuffix(&base, suffix)) continue;
      const auto it = type_.find(std::string(base));
      if (it != type_.end() && (it->second == "histogram" || it->second == "summary")) {
        return std::string(base);
      }
    }
    return name;
  }

  absl::Status Sample(absl::string_view line) {
    PrometheusSample sample;
    sample.name = TakeName(&line, /*colons=*/true);
    if (sample.name.empty()) return absl::InvalidArgumentError("no metric's name");
    CODISTILL_RETURN_IF_ERROR(TakeLabels(&line, &sample.labels));
    if (!absl::ConsumePrefix(&line, " "))
      return absl::InvalidArgumentError("no blank before value");
    const std::vector<absl::string_view> parts = absl::StrSplit(line, ' ', absl::SkipEmpty());
    int64_t time = 0;
    if (parts.empty() || parts.size() > 2 || !ParseValue(parts[0], &sample.value) ||
        (parts.size() == 2 && !absl::SimpleAtoi(parts[1], &time))) {
      return absl::InvalidArgumentError(absl::StrCat("bad value \"", line, "\""));
    }
    const std::string family = FamilyOf(sample.name);
    if (family != family_) {
      if (!closed_.insert(family).second) {
        return absl::InvalidArgumentError(absl::StrCat(family, " is in two pieces"));
      }
      family_ = family;
    }
    const auto type = type_.find(family);
    if (type == type_.end())
      return absl::InvalidArgumentError(absl::StrCat(family, " has no TYPE"));
    if (!series_.insert({sample.name, sample.labels}).second) {
      return absl::InvalidArgumentError(absl::StrCat("the same series of ", sample.name, " twice"));
    }
    if (type->second == "counter" && !(sample.value >= 0)) {
      return absl::InvalidArgumentError(absl::StrCat(sample.name, " counts below 0"));
    }
    if (type->second == "histogram") CODISTILL_RETURN_IF_ERROR(Histogram(family, sample));
    samples_.push_back(std::move(sample));
    return absl::OkStatus();
  }

  absl::Status Histogram(const std::string& family, const PrometheusSample& sample) {
    std::map<std::string, std::string> labels = sample.labels;
    labels.erase("le");
    std::string key = family;
    for (const auto& [name, value] : labels) absl::StrAppend(&key, ";", name, "=", value);
    if (sample.name == family + "_count") counts_[key] = sample.value;
    if (sample.name != family + "_bucket") return absl::OkStatus();
    const auto le = sample.labels.find("le");
    double bound = 0;
    if (le == sample.labels.end() || !ParseValue(le->second, &bound)) {
      return absl::InvalidArgumentError(absl::StrCat(sample.name, " without a bound le"));
    }
    Buckets& buckets = histograms_[key];
    if (!(bound > buckets.last_bound) || sample.value < buckets.last) {
      return absl::InvalidArgumentError(absl::StrCat("buckets of ", key, " do not rise"));
    }
    buckets = {bound, sample.value};
    return absl::OkStatus();
  }

  std::map<std::string, std::string> type_;
  std::set<std::string> helped_, typed_, closed_;
  std::string family_;  // of the last sample
  std::set<std::pair<std::string, std::map<std::string, std::string>>> series_;
  std::map<std::string, Buckets> histograms_;
  std::map<std::string, double> counts_;
  std::vector<PrometheusSample> samples_;
};

}  // namespace

absl::StatusOr<std::vector<PrometheusSample>> ParsePrometheus(absl::string_view text) {
  if (text.empty() || text.back() != '\n') {
    return absl::InvalidArgumentError("the last line has no end");
  }
  Parser parser;
  int number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    const absl::Status status = parser.Line(line);
    if (!status.ok()) {
      return Annotate(status, absl::StrCat("line ", number, " (", line, ")"));
    }
  }
  CODISTILL_RETURN_IF_ERROR(parser.Finish());
  return parser.Take();
}

}  // namespace codistill

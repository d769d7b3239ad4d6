#include "worker/data/csv_table.h"

#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/base/random.h"
#include "common/base/status.h"
#include "worker/data/line_reader.h"

namespace codistill {
namespace {

// Stands for a missing value in vocabularies and hashes: however it is written, and unlike any
// value in a file.
constexpr absl::string_view kMissing("\n", 1);

}  // namespace

CsvSchema::CsvSchema(const CsvConfig& config) {
  for (int i = 0; i < config.columns_size(); ++i) {
    const CsvColumn& column = config.columns(i);
    names_.push_back(column.name());
    switch (column.kind()) {
      case CsvColumn::IGNORED:
        break;
      case CsvColumn::NUMERIC: {
        Numeric numeric{};
        numeric.column = i;
        numeric.log1p = column.log1p();
        numeric_.push_back(numeric);
        break;
      }
      case CsvColumn::CATEGORICAL: {
        Categorical categorical;
        categorical.column = i;
        categorical.cardinality = column.cardinality();
        categorical_.push_back(std::move(categorical));
        break;
      }
      case CsvColumn::HASHED:
        hashed_.push_back(i);
        break;
      case CsvColumn::LABEL:
        label_column_ = i;
        num_classes_ = column.label_values_size();
        for (int c = 0; c < column.label_values_size(); ++c) {
          for (const std::string& text : column.label_values(c).text()) {
            label_classes_[text] = c;
            absl::StrAppend(&label_texts_, label_texts_.empty() ? "" : ", ", text);
          }
        }
        break;
    }
  }
  missing_.insert(config.missing().begin(), config.missing().end());
}

absl::StatusOr<CsvSchema> CsvSchema::Fit(const CsvConfig& config,
                                         const std::vector<std::string>& fit_files) {
  CsvSchema schema(config);
  for (const std::string& path : fit_files) {
    CODISTILL_RETURN_IF_ERROR(
        ReadRecords(config, path,
                    [&schema](absl::Span<const absl::string_view> values, absl::string_view place) {
                      return schema.Observe(values, place);
                    }));
  }
  for (Numeric& column : schema.numeric_) {
    const double variance = column.count > 0 ? column.squares / column.count : 0;
    column.scale = variance > 0 ? 1 / std::sqrt(variance) : 0;
  }
  return schema;
}

absl::Status CsvSchema::Observe(absl::Span<const absl::string_view> values,
                                absl::string_view place) {
  for (Numeric& column : numeric_) {
    const absl::string_view value = values[column.column];
    if (IsMissing(value)) continue;
    CODISTILL_ASSIGN_OR_RETURN(const double number,
                               ParseNumber(value, column.log1p, place, column.column));
    ++column.count;
    const double difference = number - column.mean;
    column.mean += difference / static_cast<double>(column.count);
    column.squares += difference * (number - column.mean);
  }
  for (Categorical& column : categorical_) {
    absl::string_view value = values[column.column];
    if (IsMissing(value)) value = kMissing;
    if (column.index.contains(value)) continue;
    const auto next = static_cast<int64_t>(column.index.size()) + 1;
    if (column.cardinality == 0 || next < column.cardinality) {
      column.index.emplace(value, next);
    } else {
      column.beyond.insert(HashString(value));
    }
  }
  return absl::OkStatus();
}

absl::Status CsvSchema::Encode(absl::Span<const absl::string_view> values, absl::string_view place,
                               Record* record) const {
  record->numeric.clear();
  record->categorical.clear();
  record->hashed.clear();
  for (const Numeric& column : numeric_) {
    const absl::string_view value = values[column.column];
    double standardised = 0;  // a missing value becomes the mean
    if (!IsMissing(value)) {
      CODISTILL_ASSIGN_OR_RETURN(const double number,
                                 ParseNumber(value, column.log1p, place, column.column));
      standardised = (number - column.mean) * column.scale;
    }
    record->numeric.push_back(static_cast<float>(standardised));
  }
  for (const Categorical& column : categorical_) {
    absl::string_view value = values[column.column];
    if (IsMissing(value)) value = kMissing;
    int64_t index = 0;
    if (const auto found = column.index.find(value); found != column.index.end()) {
      index = found->second;
    } else if (!column.beyond.empty()) {
      const uint64_t hash = HashString(value);
      if (column.beyond.contains(hash)) {
        index = 1 + static_cast<int64_t>(hash % static_cast<uint64_t>(column.cardinality - 1));
      }
    }
    record->categorical.push_back(index);
  }
  for (const int column : hashed_) {
    const absl::string_view value = values[column];
    record->hashed.push_back(static_cast<int64_t>(HashString(IsMissing(value) ? kMissing : value)));
  }
  CODISTILL_ASSIGN_OR_RETURN(record->label, ParseLabel(values[label_column_], place));
  return absl::OkStatus();
}

std::vector<int64_t> CsvSchema::cardinalities() const {
  std::vector<int64_t> result;
  for (const Categorical& column : categorical_) {
    result.push_back(column.cardinality > 0 ? column.cardinality
                                            : static_cast<int64_t>(column.index.size()) + 1);
  }
  return result;
}

std::string CsvSchema::Place(absl::string_view place, int column) const {
  return absl::StrCat(place, ": column ", column + 1,
                      names_[column].empty() ? "" : absl::StrCat(" (", names_[column], ")"));
}

absl::StatusOr<double> CsvSchema::ParseNumber(absl::string_view value, bool log1p,
                                              absl::string_view place, int column) const {
  double number = 0;
  if (!absl::SimpleAtod(value, &number) || !std::isfinite(number)) {
    return absl::InvalidArgumentError(absl::StrCat(
        Place(place, column), ": \"", value, "\" is no number; a finite number",
        missing_.empty()
            ? ""
            : absl::StrCat(", or ", absl::StrJoin(missing_, " or "), " where it is missing,"),
        " would be right"));
  }
  return log1p ? std::copysign(std::log1p(std::fabs(number)), number) : number;
}

absl::StatusOr<float> CsvSchema::ParseLabel(absl::string_view value,
                                            absl::string_view place) const {
  if (num_classes_ == 0) {
    CODISTILL_ASSIGN_OR_RETURN(const double number,
                               ParseNumber(value, /*log1p=*/false, place, label_column_));
    return static_cast<float>(number);
  }
  const auto found = label_classes_.find(value);
  if (found == label_classes_.end()) {
    return absl::InvalidArgumentError(absl::StrCat(Place(place, label_column_),
                                                   ": unknown label \"", value, "\"; one of ",
                                                   label_texts_, " would be right"));
  }
  return static_cast<float>(found->second);
}

absl::Status ReadRecords(
    const CsvConfig& config, const std::string& path,
    absl::FunctionRef<absl::Status(absl::Span<const absl::string_view>, absl::string_view)>
        on_record) {
  CODISTILL_ASSIGN_OR_RETURN(const std::unique_ptr<LineReader> reader, LineReader::Open(path));
  const char delimiter = config.delimiter()[0];
  const auto columns = static_cast<size_t>(config.columns_size());
  std::vector<absl::string_view> values;
  absl::string_view line;
  while (true) {
    CODISTILL_ASSIGN_OR_RETURN(const bool more, reader->Next(&line));
    if (!more) return absl::OkStatus();
    if (reader->line_number() <= config.skip_lines()) continue;
    // Blanks may be values where they are delimiters, so such a line is only empty without them.
    if (absl::ascii_isspace(delimiter) || !config.trim()
            ? line.empty()
            : absl::StripAsciiWhitespace(line).empty()) {
      continue;
    }
    values.clear();
    for (absl::string_view value : absl::StrSplit(line, delimiter)) {
      values.push_back(config.trim() ? absl::StripAsciiWhitespace(value) : value);
    }
    if (values.size() != columns) {
      return absl::InvalidArgumentError(absl::StrCat(reader->place(), ": ", values.size(),
                                                     " values; ", columns,
                                                     ", one a column, would be right"));
    }
    CODISTILL_RETURN_IF_ERROR(on_record(values, reader->place()));
  }
}

}  // namespace codistill
